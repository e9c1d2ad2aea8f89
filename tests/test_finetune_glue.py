import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import finetune_glue as G

SMALL = ["--glue_dir=glue", "--glue_epochs=1", "--glue_seeds=2", "--glue_max_len=32", "--glue_learning_rate=0.001"]


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, r)) + "\n" for r in ([header] if header else []) + rows))


@pytest.fixture
def glue(home):
    """All nine tasks in the layout of the official download, tiny, with its quirks."""
    texts = [d.replace("\n", " ") for d in sentences(60)]
    rng = random.Random(0)

    def rows(n, *columns):
        return [[rng.choice(c) if isinstance(c, list) else c for c in columns] for _ in range(n)]

    for part, n in (("train", 48), ("dev", 20)):
        root = Path("glue")
        write(root / f"CoLA/{part}.tsv", None, rows(n, "gj04", ["0", "1"], "", texts))
        write(root / f"SST-2/{part}.tsv", ["sentence", "label"], rows(n, texts, ["0", "1"]))
        header = ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        write(root / f"MRPC/{part}.tsv", header, rows(n, ["0", "1"], 1, 2, ['He said "no', *texts], texts))
        header = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()
        write(root / f"STS-B/{part}.tsv", header, rows(n, *"0123456", texts, texts, ["0.0", "2.500", "5.000"]))
        header = "id qid1 qid2 question1 question2 is_duplicate".split()
        write(root / f"QQP/{part}.tsv", header, [*rows(n, 1, 2, 3, texts, texts, ["0", "1"]), [1, 2, 3, "torn"]])
        write(root / f"QNLI/{part}.tsv", ["index", "question", "sentence", "label"], rows(n, 0, texts, texts, G.YES_NO))
        write(root / f"RTE/{part}.tsv", ["index", "sentence1", "sentence2", "label"], rows(n, 0, texts, texts, G.YES_NO))
        write(root / f"WNLI/{part}.tsv", ["index", "sentence1", "sentence2", "label"], rows(n, 0, texts, texts, ["0", "1"]))
        header, labels = ["index", "sentence1", "sentence2", "gold_label"], ["entailment", "neutral", "contradiction"]
        for name in [part] if part == "train" else ["dev_matched", "dev_mismatched"]:
            write(root / f"MNLI/{name}.tsv", header, [*rows(n, 0, texts, texts, labels), [0, "a", "b", "-"]])


@pytest.fixture
def model(run, tiny_data):
    message, _ = run("train.py", *TINY, "--max_steps=5")
    assert message is None


# ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_classification_metrics_against_scikit_learn(pairs):
    p, y = np.array(pairs).T
    assert G.accuracy(p, y) == pytest.approx(100 * accuracy_score(y, p))
    assert G.f1(p, y) == pytest.approx(100 * f1_score(y, p, zero_division=0.0))
    assert G.matthews(p, y) == pytest.approx(100 * matthews_corrcoef(y, p), abs=1e-9)


def test_pearson_and_constants():
    p, y = np.random.default_rng(0).normal(size=(2, 30))
    assert G.pearson(p, y) == pytest.approx(100 * pearsonr(p, y)[0]) == pytest.approx(100 * np.corrcoef(p, y)[0, 1])
    assert G.pearson(np.ones(5), np.arange(5.0)) == 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(5, 9), max_size=60), st.lists(st.integers(5, 9), max_size=60), st.integers(8, 40))
def test_pairs_are_cut_from_the_longer_text(a, b, limit):
    old, G.glue_max_len = G.glue_max_len, limit
    row = G.join(a, b, {"cls": 2, "sep": 3})
    G.glue_max_len = old
    assert row[0] == 2 and row[-1] == 3 and row.count(3) == 2 and len(row) == min(len(a) + len(b) + 3, limit)
    cut = row.index(3)
    left, right = row[1:cut], row[cut + 1 : -1]
    assert left == a[: len(left)] and right == b[: len(right)]
    if len(left) < len(a):  # what was cut is at least as long as the other
        assert len(left) >= len(right) - 1
    if len(right) < len(b):
        assert len(right) >= len(left) - 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(1, 16), st.integers(0, 5))
def test_batches(lengths, size, seed):
    lengths = np.array(lengths)
    everything = np.concatenate(G.batches(lengths, size))
    assert sorted(everything) == list(range(len(lengths)))
    found = G.batches(lengths, size, np.random.default_rng(seed))
    assert all(len(b) == size for b in found) and len(found) == len(lengths) // size
    assert len({i for b in found for i in b}) == len(found) * size


def test_batches_waste_little_on_padding():
    lengths = np.random.default_rng(0).integers(5, 120, 4000)
    found = G.batches(lengths, 16, np.random.default_rng(0))
    width = sum(16 * -(-lengths[b].max() // 8) * 8 for b in found)
    assert 1 - sum(lengths[b].sum() for b in found) / width < 0.1
    assert [b[0] for b in found] != [b[0] for b in G.batches(lengths, 16, np.random.default_rng(1))]


def test_files_with_quirks(glue, monkeypatch, capsys):
    monkeypatch.setattr(G, "glue_dir", "glue")
    for task in G.GLUE:
        train, dev, n_classes, metric, partial = G.load_task(task)
        assert len(train) == 48 and all(len(d) == 20 for d in dev.values()) and partial, task
        assert n_classes == {"stsb": 1, "mnli": 3}.get(task, 2)
        assert {y for _, _, y in train} <= ({0.0, 2.5, 5.0} if task == "stsb" else set(range(n_classes)))
        assert (train[0][1] is None) == (task in ("cola", "sst2"))
    assert list(G.load_task("mnli")[1]) == ["mnli", "mnli_mm"]
    assert "QQP/train.tsv: 1 rows with missing fields" in capsys.readouterr().out
    assert any('"' in a for a, _, _ in G.load_task("mrpc")[0])  # a quotation mark is a character like others
    Path("glue/SST-2/dev.tsv").write_bytes(b"sentence\tlabel\nbal \xff dem\t1\n\t0\n")
    assert len(G.load_task("sst2")[1]["sst2"]) == 2


def test_all_tasks_make_a_card_with_the_average(run, glue, model):
    everything = "--tasks=" + ",".join(G.GLUE)
    for init in ("scratch", "run"):
        message, output = run("finetune_glue.py", *TINY, *SMALL, everything, f"--glue_init={init}", "--glue_seeds=1")
        assert message is None, message
    card = json.loads(Path("out/tiny/glue.json").read_text())
    assert set(card["rows"]) == {"run", "scratch"} and set(card["rows"]["run"]) == {*G.NINE, "wnli"}
    expected = np.mean([card["rows"]["run"][t]["median"] for t in G.NINE])
    assert card["average"]["run"] == pytest.approx(expected)
    assert card["average_without_cola"]["run"] == pytest.approx(
        np.mean([card["rows"]["run"][t]["median"] for t in G.NINE[:-1]])
    )
    text = Path("out/tiny/glue.md").read_text()
    assert "| pretrained |" in text and "| no pretraining |" in text and "without CoLA" in text and text in output
    assert "On partial data" in text and "Rules of cramming: inside all of them." in text


def test_no_average_unless_all_nine_are_there(run, glue, model):
    run("finetune_glue.py", *TINY, *SMALL, "--tasks=cola,rte")
    card = json.loads(Path("out/tiny/glue.json").read_text())
    text = Path("out/tiny/glue.md").read_text()
    assert card["average"] == {"run": None} and "mean of these 2" in text and "average |" not in text
    entry = card["rows"]["run"]["rte"]
    assert entry["metric"] == "accuracy" and len(entry["scores"]) == 2 and entry["n_train"] == 48
    assert entry["median"] == pytest.approx(np.median(entry["scores"])) and entry["sd"] == pytest.approx(
        np.std(entry["scores"], ddof=1)
    )


def test_a_second_call_adds_and_repeats_nothing(run, glue, model):
    args = [*TINY, *SMALL]
    assert "seed 1" in run("finetune_glue.py", *args, "--tasks=rte")[1]
    first = json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]["rte"]
    _, output = run("finetune_glue.py", *args, "--tasks=rte,mrpc", "--glue_seeds=3")
    assert "rte, seed 2" in output and "rte, seed 1" not in output and "mrpc, seed 0" in output
    second = json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]["rte"]
    assert second["scores"][:2] == first["scores"] and len(second["scores"]) == 3
    _, output = run("finetune_glue.py", *args, "--tasks=rte", "--glue_epochs=6", "--glue_seeds=1")
    card = json.loads(Path("out/tiny/glue.json").read_text())
    assert len(card["rows"]["run"]["rte"]["scores"]) == 1  # other settings, other scores
    assert "more than 5 epochs" in card["rules"] and "they differ" in card["rules"] and "broken" in output


def test_same_seed_same_score_and_pretrained_differs_from_scratch(run, glue, model):
    scores = []
    for init in ("run", "run", "scratch"):
        Path("out/tiny/glue.json").unlink(missing_ok=True)
        assert run("finetune_glue.py", *TINY, *SMALL, "--tasks=stsb", f"--glue_init={init}")[0] is None
        scores.append(json.loads(Path("out/tiny/glue.json").read_text())["rows"][init]["stsb"]["scores"])
    assert scores[0] == scores[1] != scores[2] and scores[0][0] != scores[0][1]


def test_a_task_that_can_be_learned_is_learned(run, glue, model):
    """Which of two words a text holds: a linear probe would do, so the loop must."""
    words = [["bal", "0"], ["dem", "1"]]
    rows = [[f"fal gol {w} fin", y] for w, y in words * 200]
    for part in ("train", "dev"):
        write(Path(f"glue/SST-2/{part}.tsv"), ["sentence", "label"], rows)
    args = ["--tasks=sst2", "--glue_epochs=5", "--glue_seeds=1", "--glue_learning_rate=0.003"]
    assert run("finetune_glue.py", *TINY, *SMALL, *args)[0] is None
    assert json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]["sst2"]["median"] > 95


def test_glue_max_train_is_noted(run, glue, model):
    run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte", "--glue_max_train=32")
    assert "rte (32 training examples)" in Path("out/tiny/glue.md").read_text()


def test_hub_layout(monkeypatch):
    """The columns and integer labels of nyu-mll/glue, as its card has them."""
    import datasets

    def fake(path, task):
        assert path == "nyu-mll/glue"
        columns = {"mnli": ("premise", "hypothesis"), "cola": ("sentence",), "mrpc": ("sentence1", "sentence2")}[task]
        label = [2, 0] if task == "mnli" else [1, 0]
        part = datasets.Dataset.from_dict({**{c: [c, "x"] for c in columns}, "label": label, "idx": [0, 1]})
        names = ["train", "validation_matched", "validation_mismatched"] if task == "mnli" else ["train", "validation"]
        return datasets.DatasetDict({n: part for n in names})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert G.load_task("mnli")[0] == [("premise", "hypothesis", 2), ("x", "x", 0)]
    assert G.load_task("cola")[1] == {"cola": [("sentence", None, 1), ("x", None, 0)]}
    assert G.load_task("mrpc")[0][0] == ("sentence1", "sentence2", 1)


def test_mistakes_end_in_one_line(run, glue, model):
    cases = [
        (["--tasks=rte", "--out_dir=out/none"], "run train.py"),
        (["--tasks=rtee"], "there is no task 'rtee'"),
        (["--tasks=rte", "--glue_dir=nothing"], "nothing/RTE/train.tsv is missing"),
        (["--tasks=rte", "--glue_dir="], "cannot load nyu-mll/glue"),
        (["--tasks=rte", "--glue_max_len=100"], "over the model's max_len = 64"),
        (["--tasks=docs_next"], "docs_next/train.tsv is missing"),
    ]
    write(Path("glue/CoLA/dev.tsv"), ["a", "b"], [["c", "d"]])
    cases.append((["--tasks=cola"], "cola has a part without examples"))
    write(Path("glue/QNLI/train.tsv"), ["index", "q", "s", "label"], [[0, "a", "b", "entailment"]])
    cases.append((["--tasks=qnli"], "has no column 'question'"))
    write(Path("glue/MNLI/train.tsv"), ["sentence1", "sentence2", "gold_label"], [["a", "b", "maybe"]])
    cases.append((["--tasks=mnli"], "mnli has a label that is not one of"))
    for args, expected in cases:
        message, _ = run("finetune_glue.py", *TINY, *SMALL, *args)
        assert expected in str(message) and "\n" not in message
    assert not Path("out/tiny/glue.json").exists()
    saved = torch.load("out/tiny/model.pt", weights_only=True)
    torch.save({**saved, "config": {**saved["config"], "vocab_size": 99}}, "out/tiny/model.pt")
    assert "tokenizer.json has" in run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte")[0]
    Path("out/tiny/model.pt").write_bytes(b"damaged")
    assert "cannot be read" in run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte")[0]
