import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from test_finetune_glue import glue, write  # noqa: F401

from nanocram.faults import Fault
from nanocram.glue import (
    GLUE,
    Task,
    accuracy,
    constant_score,
    describe,
    f1,
    load_task,
    matthews,
    pearson,
    spearman,
    write_dev_predictions,
    write_predictions,
)


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


@pytest.mark.parametrize("n_train, n_dev", [(48, 20), (49, 20), (48, 21)])
def test_a_task_is_partial_if_either_part_lacks_examples(glue, monkeypatch, n_train, n_dev):  # noqa: F811
    monkeypatch.setitem(GLUE, "rte", GLUE["rte"]._replace(n_train=n_train, n_dev=n_dev))
    assert load_task("rte", "glue").partial == ((n_train, n_dev) != (48, 20))


def test_metrics_and_classes_of_glue():
    """As gluebenchmark.com names the metrics, and in the order of the hub's classes."""
    metrics = {"cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "pearson"}
    for name, spec in GLUE.items():
        assert spec.metric == metrics.get(name, "accuracy")
    assert GLUE["rte"].labels == GLUE["qnli"].labels == ["entailment", "not_entailment"]
    assert GLUE["mnli"].labels == ["entailment", "neutral", "contradiction"]


def test_the_two_test_sets_of_mnli(glue, monkeypatch):  # noqa: F811
    monkeypatch.setitem(GLUE, "mnli", GLUE["mnli"]._replace(n_test=[1, 1]))
    for part in ("matched", "mismatched"):
        write(Path(f"glue/MNLI/test_{part}.tsv"), ["sentence1", "sentence2"], [[part, "x"]])
    test = load_task("mnli", "glue", submit=True).test
    assert test["MNLI-m"] == [("matched", "x", None)]
    assert test["MNLI-mm"] == [("mismatched", "x", None)]


def test_a_row_with_an_empty_label_is_left_out(glue, capsys):  # noqa: F811
    rows = [["a", "b", ""], ["c", "d", "entailment"]]
    write(Path("glue/RTE/dev.tsv"), ["sentence1", "sentence2", "label"], rows)
    assert load_task("rte", "glue").dev["rte"] == [("c", "d", 0)]
    assert "RTE/dev.tsv: 1 rows with missing fields" in capsys.readouterr().out


def test_what_is_written_of_predictions(tmp_path):
    """Values for the server are cut to 0 to 5; the table of dev has the prediction first."""
    path = tmp_path / "a.tsv"
    write_predictions(path, [-0.2, 5.3, 2.5], [])
    assert path.read_text() == "index\tprediction\n0\t0.000\n1\t5.000\n2\t2.500\n"
    write_dev_predictions(path, [1, 0], [0, 0], ["no", "yes"])
    assert path.read_text().splitlines()[1:] == ["0\tyes\tno", "1\tno\tno"]


def test_the_commonest_of_many_classes_are_named():
    examples = [("a", None, label) for label in range(8) for _ in range(9 - label)]
    (line,) = describe(Task("x", examples, {}, list("abcdefgh"), "accuracy"))
    expected = "x, train: 44 examples: a 9, b 8, c 7, d 6, e 5, f 4, 2 more classes"
    assert line == expected


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


def test_the_answer_that_ignores_the_text():
    """By hand: MRPC's dev set has 279 of 408 in class 1, which is the commonest in train, too."""
    train, dev = np.array([1, 1, 0]), np.array([1] * 279 + [0] * 129)
    assert constant_score("f1", train, dev) == pytest.approx(100 * 2 * 279 / (408 + 279))
    assert constant_score("accuracy", train, dev) == pytest.approx(100 * 279 / 408)
    assert constant_score("matthews", train, dev) == 0.0
    assert constant_score("accuracy", np.array([0, 0, 1]), np.array([1, 1, 1, 0])) == 25.0
    assert constant_score("pearson", np.array([1.0, 2.5]), np.array([0.0, 5.0])) == 0.0


# --------------------------------------------------------------------------------------------------
# Tasks of one's own


def own(file, **changes):
    entry = {"name": "x", "train": file, "dev": file, "columns": ["text"], **changes}
    return load_task(entry, "")


def jsonl(file, *pairs):
    lines = [json.dumps({"text": text, "label": label}) for text, label in pairs]
    Path(file).write_text("\n".join(lines) + "\n")


def tsv(file, *rows):
    Path(file).write_text("text\tlabel\n" + "".join("\t".join(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_own_files_of_every_kind_are_one_task(folder):
    import pandas

    rows = [("one, two", "yes"), ('say "no"', "no"), ("line\nend", "no")]
    expected = [("one, two", None, 1), ('say "no"', None, 0), ("line\nend", None, 0)]
    frame = pandas.DataFrame(rows, columns=["text", "label"])
    frame.to_csv("a.csv", index=False)
    frame.to_parquet("a.parquet")
    frame.to_json("a.json", orient="records", indent=1)
    frame.to_json("a.jsonl", orient="records", lines=True)
    with gzip.open("a.jsonl.gz", "wt") as f:
        f.write(Path("a.jsonl").read_text())
    with gzip.open("a.csv.gz", "wt", newline="") as f:
        f.write(Path("a.csv").read_text())
    for file in ("a.csv", "a.parquet", "a.json", "a.jsonl", "a.jsonl.gz", "a.csv.gz"):
        assert own(file).train == expected, file

    # what pandas writes with tabs is quoted, which a .tsv is not
    frame.to_csv("a.tsv", index=False, sep="\t", quoting=csv.QUOTE_MINIMAL)
    with pytest.raises(Fault, match="a.tsv, row 2 is quoted like a .csv; .* need .csv or .jsonl"):
        own("a.tsv")


def test_labels_of_one_meaning_are_one_class(folder, capsys):
    tsv("ints.tsv", ("a", "0"), ("b", "1"))
    forms = {"floats": ("0.0", "1.0"), "bools": ("False", "True "), "spaces": ("0 ", " 1")}
    for file, (no, yes) in forms.items():
        tsv(f"{file}.tsv", ("a", no), ("b", yes))
        task = own("ints.tsv", dev=f"{file}.tsv")
        assert task.labels == ["0", "1"] and task.dev["x"] == task.train
    jsonl("bools.jsonl", ("a", False), ("b", True))
    assert own("bools.jsonl", dev="ints.tsv").dev["x"] == [("a", None, 0), ("b", None, 1)]
    tsv("cases.tsv", ("a", "pos"), ("b", "Pos"), ("c", "neg"))
    assert own("cases.tsv").labels == ["Pos", "neg", "pos"]
    assert "warning: the labels Pos, pos of x differ in case alone" in capsys.readouterr().out


def test_what_has_no_label_is_counted_and_left_out(folder, capsys):
    none = [("n", "-"), ("n", ""), ("n", None), ("n", -1), ("n", float("nan"))]
    jsonl("a.jsonl", *none, ("a", 0), ("b", 1))
    with open("a.jsonl", "a") as f:
        f.write('{"text": "lacks it"}\n')
    assert own("a.jsonl").train == [("a", None, 0), ("b", None, 1)]
    assert "a.jsonl: 6 rows without a label were left out" in capsys.readouterr().out
    # these are labels if they are named, and -1 is a value
    jsonl("b.jsonl", ("a", -1), ("b", 1), ("c", "-"))
    assert own("b.jsonl", labels=[-1, "-", 1]).train[2] == ("c", None, 1)
    jsonl("c.jsonl", ("a", -1), ("b", 1.5))
    assert own("c.jsonl", metric="pearson").train == [("a", None, -1.0), ("b", None, 1.5)]


def test_own_files_that_are_wrong_are_named_with_the_row(folder):
    good = [("a", 0), ("b", 1)]
    jsonl("good.jsonl", *good)
    jsonl("list.jsonl", *good, ("c", ["a", "b"]))
    jsonl("tokens.jsonl", *good, (["c", "d"], 1))
    jsonl("word.jsonl", *good, ("c", "high"))
    jsonl("nan.jsonl", *good, ("c", float("nan")))
    jsonl("new.jsonl", *good, ("c", 2))
    jsonl("single.jsonl", ("a", 0))
    jsonl("floats.jsonl", *[("a", i * 0.37) for i in range(2000)])
    jsonl("texts.jsonl", *[("a", f"text {i}") for i in range(100)])
    tsv("tab.tsv", ("a", "0"), ("b", "c", "1"))
    tsv("short.tsv", ("a", "0"), ("b",))
    Path("broken.jsonl").write_text('{"text": "a", "label": 0}\n{"text": \n')
    Path("object.json").write_text('{"text": "a", "label": 0}')
    Path("wide.csv").write_text("text,label\na,0\nb,1,2\n")
    Path("narrow.csv").write_text("label,text\n0,a\n1\n")
    Path("utf16.tsv").write_bytes("text\tlabel\na\t0\nb\t1\n".encode("utf-16"))
    Path("a.xml").write_text("<a/>")
    Path("torn.jsonl.gz").write_bytes(gzip.compress(Path("texts.jsonl").read_bytes())[:-20])
    value = {"metric": "pearson"}
    cases = [
        ("list.jsonl", {}, "list.jsonl, row 3: the label ['a', 'b'] is not one value"),
        ("tokens.jsonl", {}, "row 3: the column 'text' holds ['c', 'd'], which is not a text"),
        ("word.jsonl", value, "row 3: the label 'high' is no finite number"),
        ("nan.jsonl", value, "nan.jsonl, row 3: the label nan is no finite number"),
        ("good.jsonl", {"dev": "new.jsonl"}, "new.jsonl, row 3: the label 2 is never in good.json"),
        ("single.jsonl", {}, "single.jsonl has 1 examples; a task needs two"),
        ("floats.jsonl", {}, "2,000 different numbers as labels: is it regression"),
        ("texts.jsonl", {}, "100 different labels in 100 rows: is 'label' the right column?"),
        ("tab.tsv", {}, "tab.tsv, row 2 has 3 fields, the header 2"),
        ("short.tsv", {}, "short.tsv, row 2 has 1 fields, the header 2"),
        ("broken.jsonl", {}, "broken.jsonl, row 2 is a line that is not a JSON object"),
        ("object.json", {}, "object.json is no list of objects"),
        ("wide.csv", {}, "wide.csv, row 2 has more fields than the header"),
        ("narrow.csv", {}, "narrow.csv, row 2: the column 'text' holds None"),
        ("utf16.tsv", {}, "utf16.tsv is UTF-16"),
        ("a.xml", {}, "a.xml is of an unknown kind"),
        ("torn.jsonl.gz", {}, "torn.jsonl.gz is truncated or damaged after row"),
        ("good.jsonl", {"columns": ["body"]}, "row 1 has no column 'body'; its columns are text"),
        ("good.jsonl", {"label": "y"}, "good.jsonl has no column 'y'; its columns are text, label"),
        ("good.jsonl", {"train": ["a.tsv"]}, "train = ['a.tsv'] of the task 'x' is not a text"),
        ("good.jsonl", {"labels": 2}, "labels = 2 of the task 'x' is not a list"),
        ("good.jsonl", {"metric": ["f1"]}, "metric = ['f1'] of the task 'x' is not a text"),
        ("good.jsonl", {"name": 3}, "name = 3 of the task 3 is not a text"),
        ("good.jsonl", {"name": "../x"}, "the name '../x' of a task is no plain name"),
        ("good.jsonl", {"columns": "text"}, "columns = 'text' of the task 'x' is not a list"),
    ]
    for file, changes, expected in cases:
        with pytest.raises(Fault) as e:
            own(file, **changes)
        assert expected in str(e.value) and len(str(e.value)) < 320 and "\n" not in str(e.value)
