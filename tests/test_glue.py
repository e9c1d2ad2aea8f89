from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from test_finetune_glue import glue  # noqa: F401

from nanocram.glue import GLUE, accuracy, f1, load_task, matthews, pearson, spearman


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_classification_metrics_against_scikit_learn(pairs):
    p, y = np.array(pairs).T
    assert accuracy(p, y) == pytest.approx(100 * accuracy_score(y, p))
    assert f1(p, y) == pytest.approx(100 * f1_score(y, p, zero_division=0.0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_matthews_of_two_or_three_classes_against_scikit_learn(pairs):
    p, y = np.array(pairs).T
    assert matthews(p, y) == pytest.approx(100 * matthews_corrcoef(y, p), abs=1e-9)
    p, y = p > 0, y > 0
    assert matthews(p, y) == pytest.approx(100 * matthews_corrcoef(y, p), abs=1e-9)


def test_pearson_and_constants():
    p, y = np.random.default_rng(0).normal(size=(2, 30))
    assert (
        pearson(p, y)
        == pytest.approx(100 * pearsonr(p, y)[0])
        == pytest.approx(100 * np.corrcoef(p, y)[0, 1])
    )
    ranks = np.argsort(np.argsort(p)), np.argsort(np.argsort(y))
    assert spearman(p, y) == pytest.approx(100 * np.corrcoef(*ranks)[0, 1])
    assert pearson(np.ones(5), np.arange(5.0)) == spearman(np.ones(5), np.arange(5.0)) == 0.0


def test_files_with_quirks(glue, capsys):  # noqa: F811
    for name in GLUE:
        task = load_task(name, "glue")
        assert (
            len(task.train) == 48 and all(len(d) == 20 for d in task.dev.values()) and task.partial
        ), task
        assert len(task.labels) == {"stsb": 0, "mnli": 3}.get(name, 2)
        assert {y for *_, y in task.train} <= (
            {0.0, 2.5, 5.0} if name == "stsb" else set(range(len(task.labels)))
        )
        assert (task.train[0][1] is None) == (name in ("cola", "sst2"))
    assert list(load_task("mnli", "glue").dev) == ["mnli", "mnli_mm"]
    assert "QQP/train.tsv: 1 rows with missing fields" in capsys.readouterr().out
    assert any(
        '"' in a for a, _, _ in load_task("mrpc", "glue").train
    )  # a quotation mark is a character like others
    Path("glue/SST-2/dev.tsv").write_bytes(
        b"sentence\tlabel\nbal \xff dem\t1\n\t0\nbal\rdem\t1\r\n"
    )
    assert [text for text, *_ in load_task("sst2", "glue").dev["sst2"]] == [
        "bal \ufffd dem",
        "",
        "bal\rdem",
    ]


def test_hub_layout(monkeypatch):
    """The columns and integer labels of nyu-mll/glue, as its card has them."""
    import datasets

    def fake(path, task, split):
        assert path == "nyu-mll/glue"
        mnli = {
            f"{part}_{kind}"
            for part in ("validation", "test")
            for kind in ("matched", "mismatched")
        }
        assert split in {"mnli": {"train", *mnli}, "ax": {"test"}}.get(
            task, {"train", "validation", "test"}
        )
        pairs = {
            "mnli": ("premise", "hypothesis"),
            "ax": ("premise", "hypothesis"),
            "cola": ("sentence",),
        }
        columns = pairs.get(task, ("sentence1", "sentence2"))
        label = [-1, -1] if split.startswith("test") else [2, 0] if task == "mnli" else [1, 0]
        return datasets.Dataset.from_dict(
            {**{c: [c, "x"] for c in columns}, "label": label, "idx": [0, 1]}
        )

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_task("mnli", "").train == [("premise", "hypothesis", 2), ("x", "x", 0)]
    assert load_task("cola", "").dev == {"cola": [("sentence", None, 1), ("x", None, 0)]}
    assert load_task("mrpc", "").train[0] == ("sentence1", "sentence2", 1)
    task = load_task("mnli", "", ax=True)
    assert task.test == {"AX": [("premise", "hypothesis", None), ("x", "x", None)]} and list(
        task.dev
    ) == ["mnli", "mnli_mm"]
