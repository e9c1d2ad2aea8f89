import json
import random
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, made_once, sentences, start
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_glue as G
from nanocram import scorecard
from nanocram.configurator import resolve
from nanocram.faults import Fault
from nanocram.glue import YES_NO
from nanocram.rules import FINE_TUNING

LABELS = ["entailment", "neutral", "contradiction"]
SMALL = [
    "--glue_dir=glue",
    "--glue_epochs=1",
    "--glue_seeds=2",
    "--glue_max_len=32",
    "--glue_learning_rate=0.001",
]


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join("\t".join(map(str, r)) + "\n" for r in ([header] if header else []) + rows)
    )


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
        write(
            root / f"MRPC/{part}.tsv",
            header,
            rows(n, ["0", "1"], 1, 2, ['He said "no', *texts], texts),
        )
        header = (
            "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()
        )
        write(
            root / f"STS-B/{part}.tsv",
            header,
            rows(n, *"0123456", texts, texts, ["0.0", "2.500", "5.000"]),
        )
        header = "id qid1 qid2 question1 question2 is_duplicate".split()
        write(
            root / f"QQP/{part}.tsv",
            header,
            [*rows(n, 1, 2, 3, texts, texts, ["0", "1"]), [1, 2, 3, "torn"]],
        )
        write(
            root / f"QNLI/{part}.tsv",
            ["index", "question", "sentence", "label"],
            rows(n, 0, texts, texts, YES_NO),
        )
        write(
            root / f"RTE/{part}.tsv",
            ["index", "sentence1", "sentence2", "label"],
            rows(n, 0, texts, texts, YES_NO),
        )
        write(
            root / f"WNLI/{part}.tsv",
            ["index", "sentence1", "sentence2", "label"],
            rows(n, 0, texts, texts, ["0", "1"]),
        )
        header, labels = (
            ["index", "sentence1", "sentence2", "gold_label"],
            ["entailment", "neutral", "contradiction"],
        )
        for name in [part] if part == "train" else ["dev_matched", "dev_mismatched"]:
            write(
                root / f"MNLI/{name}.tsv",
                header,
                [*rows(n, 0, texts, texts, labels), [0, "a", "b", "-"]],
            )


@pytest.fixture
def model(run, tiny_data, shelf):
    made_once(shelf, "out", lambda: run("train.py", *TINY, "--max_steps=5"))


# --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(5, 9), max_size=60),
    st.lists(st.integers(5, 9), max_size=60),
    st.integers(8, 40),
)
def test_pairs_are_cut_from_the_longer_text(a, b, limit):
    row = G.join(a, b, {"cls": 2, "sep": 3}, limit)
    assert (
        row[0] == 2
        and row[-1] == 3
        and row.count(3) == 2
        and len(row) == min(len(a) + len(b) + 3, limit)
    )
    cut = row.index(3)
    left, right = row[1:cut], row[cut + 1 : -1]
    assert left == a[: len(left)] and right == b[: len(right)]
    if len(left) < len(a):  # what was cut is at least as long as the other
        assert len(left) >= len(right) - 1
    if len(right) < len(b):
        assert len(right) >= len(left) - 1


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(1, 16), st.integers(0, 5)
)
def test_batches(lengths, size, seed):
    lengths = np.array(lengths)
    everything = np.concatenate(G.batches(lengths, size))
    assert sorted(everything) == list(range(len(lengths)))
    found = G.batches(lengths, size, np.random.default_rng(seed))
    assert all(len(b) == size for b in found) and len(found) == len(lengths) // size
    assert len({i for b in found for i in b}) == len(found) * size


def test_batches_waste_little_on_padding():
    lengths = np.minimum(
        np.random.default_rng(0).gamma(5, 3, 4000).astype(int) + 4, 120
    )  # short, as CoLA's
    found = G.batches(lengths, 16, np.random.default_rng(0))
    rows = [[5] * n for n in lengths]
    width = sum(G.collate(rows, b, {"pad": 0, "sep": 3}, "cpu", 128)[0].numel() for b in found)
    assert 1 - sum(lengths[b].sum() for b in found) / width < 0.1
    assert [b[0] for b in found] != [b[0] for b in G.batches(lengths, 16, np.random.default_rng(1))]


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
    rule = card["rules"][FINE_TUNING]
    assert rule["verdict"] == "broken" and "more than 5 epochs" in rule["did"]
    assert "glue_epochs differ" in rule["did"] and f"{FINE_TUNING}: broken" in output

    # nothing is lost, and a line says so
    line = "3 old scores of rte are in out/tiny/glue.json.bak now, since glue_epochs was 1, now 6"
    assert line in output
    (kept,) = map(json.loads, Path("out/tiny/glue.json.bak").read_text().splitlines())
    assert kept["entry"] == second and (kept["row"], kept["task"]) == ("run", "rte")


def card_row(init="run"):
    return json.loads(Path("out/tiny/glue.json").read_text())["rows"][init]


def test_a_score_belongs_to_its_weights_and_its_tokenizer(run, glue, model):
    args = [*TINY, *SMALL, "--tasks=rte", "--glue_seeds=1"]
    for tasks in ("rte", "cola"):
        run("finetune_glue.py", *args, f"--tasks={tasks}")
    first = card_row()
    assert "seed 0" not in run("finetune_glue.py", *args)[1]

    # noise in the weights: another score, and all tasks of the row were of the old ones
    saved = torch.load("out/tiny/model.pt", weights_only=True)
    saved["model"]["embedding.weight"] += 1.0
    torch.save(saved, "out/tiny/model.pt")
    output = run("finetune_glue.py", *args)[1]
    assert "run: rte, seed 0:" in output
    assert "1 old scores of cola are in out/tiny/glue.json.bak now, since the weights" in output
    second = card_row()
    assert second.keys() == {"rte"} and second["rte"]["weights"] != first["rte"]["weights"]
    kept = map(json.loads, Path("out/tiny/glue.json.bak").read_text().splitlines())
    assert {line["task"]: line["entry"] for line in kept} == first

    # without pretraining, weights are nothing that scores depend on; the tokenizer is
    scratch = [*args, "--glue_init=scratch"]
    run("finetune_glue.py", *scratch)
    saved["model"]["embedding.weight"] += 1.0
    torch.save(saved, "out/tiny/model.pt")
    assert "seed 0:" not in run("finetune_glue.py", *scratch)[1]
    path = Path("out/tiny/tokenizer.json")
    path.write_text(path.read_text().replace('"##', '"#+', 1))
    assert "since the tokenizer changed" in run("finetune_glue.py", *scratch)[1]


def test_a_score_that_is_older_than_a_key_is_kept_aside(run, glue, model):
    args = [*TINY, *SMALL, "--glue_seeds=1"]
    run("finetune_glue.py", *args, "--tasks=rte,cola")
    card = json.loads(Path("out/tiny/glue.json").read_text())
    for task in ("rte", "cola"):
        del card["rows"]["run"][task]["settings"]["glue_warmup"]
        del card["rows"]["run"][task]["weights"]
    Path("out/tiny/glue.json").write_text(json.dumps(card))
    output = run("finetune_glue.py", *args, "--tasks=rte")[1]
    assert "glue.json.bak now, since glue_warmup was None, now 0.1; its weights were not" in output
    # what was not asked for stays, and the card says that it may be of another model
    assert card_row()["cola"] == card["rows"]["run"]["cola"]
    assert "The scores of pretrained are not all of the same weights" in output


def small_job(n_epochs, **more):
    """Return (classifier, arguments of finetune) of a toy task with dropout."""
    from test_model import bert

    torch.manual_seed(0)
    classifier = G.Classifier(bert(dropout=0.1), 2)
    words = [f"--glue_epochs={n_epochs}", "--glue_learning_rate=1e-3"]
    config = resolve("finetune_glue.py", words) | more
    rows, y = np.random.default_rng(0).integers(5, 50, (64, 12)).tolist(), np.arange(64) % 2
    dev, ids, bar = {"x": (rows, y, "accuracy")}, {"pad": 0, "sep": 3}, G.tqdm(disable=True)
    return classifier, ((rows, y), dev, ids, 7, config, bar)


def test_a_seed_continues_from_its_last_epoch(tmp_path):
    """Killed in its third epoch, it ends with the weights of an undisturbed run, bit for bit."""
    whole, arguments = small_job(4)
    expected = G.finetune(whole, *arguments)

    class Killed(BaseException):
        pass

    class Bar:
        n = 0

        def update(self, n):
            self.n += n
            if self.n > 2.5 * 64:
                raise Killed

    path = tmp_path / "checkpoints" / "x-7.pt"
    half, arguments = small_job(4)
    with pytest.raises(Killed):
        checkpoint = G.Checkpoint(path, {"a": 1}, 0.0)
        G.finetune(half, *arguments[:-1], Bar(), checkpoint)
    rest, arguments = small_job(4)
    found = G.finetune(rest, *arguments, G.Checkpoint(path, {"a": 1}, 0.0))
    assert found.epochs == expected.epochs and found.seconds > 0
    for name, tensor in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], tensor), name

    # a checkpoint of something else counts as none, as does a damaged one
    for origin, damage in (({"a": 2}, False), ({"a": 1}, True)):
        if damage:
            path.write_bytes(path.read_bytes()[:1000])
        again, arguments = small_job(4)
        bar = G.tqdm(disable=True)
        assert G.Checkpoint(path, origin, 1.0).load({"model": again}).n_epochs == 0
    assert not bar.n


def test_a_loss_that_is_not_finite_is_noticed_soon(monkeypatch):
    """After 5 steps here, long before the end of an epoch of 4,000."""
    monkeypatch.setattr(G, "CHECK_STEPS", 5)
    classifier, (train, *rest) = small_job(1, glue_batch_size=1)
    with torch.no_grad():
        classifier.bert.embedding.weight[train[0][3][0]] = float("nan")
    train = (train[0] * 60, np.tile(train[1], 60))
    with pytest.raises(Fault, match="the loss became nan within .* steps; lower glue_learning"):
        G.finetune(classifier, train, *rest)


def test_a_damaged_file_costs_no_seed(run, glue, model, monkeypatch):
    args = [*TINY, *SMALL, "--tasks=rte", "--glue_seeds=1"]
    # before training it is refused
    for name in ("glue.json", "rules.json"):
        path = Path("out/tiny") / name
        before = path.read_bytes() if path.exists() else None
        for text in ("{", "[]", '{"rows": {"run": {"rte": {}}}}'):
            path.write_text(text)
            message, output = run("finetune_glue.py", *args)
            assert message and f"out/tiny/{name} is damaged" in message and "\n" not in message
            assert "seed 0:" not in output
            if name == "rules.json":
                break
        path.unlink()
        if before:
            path.write_bytes(before)

    # damaged while the second task trains: the first one is known still, the second one is kept
    write_card = scorecard.write_card

    def write_and_damage(out, card):
        write_card(out, card)
        if len(card["rows"]["run"]) == 1:
            (out / "glue.json").write_text("{")
            (out / "rules.json").write_text("{")

    monkeypatch.setattr(scorecard, "write_card", write_and_damage)
    message, output = run("finetune_glue.py", *args, "--tasks=rte,cola")
    assert message is None and "glue.json.damaged; the scores known here are kept" in output
    assert card_row().keys() == {"rte", "cola"} and "rules.json is damaged" in output


def test_dev_predictions_are_kept(run, glue, model):
    """A score is what its predictions say."""
    run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte,stsb")
    row = card_row()
    for seed in (0, 1):
        lines = Path(f"out/tiny/predictions/rte-{seed}.tsv").read_text().splitlines()
        assert lines[0] == "index\tprediction\tlabel" and len(lines) == 21
        pairs = [line.split("\t")[1:] for line in lines[1:]]
        right = [a == b for a, b in pairs]
        assert 100 * np.mean(right) == pytest.approx(row["rte"]["scores"][seed])
        assert {a for pair in pairs for a in pair} <= {*YES_NO}
        lines = Path(f"out/tiny/predictions/stsb-{seed}.tsv").read_text().splitlines()
        p, y = np.array([line.split("\t")[1:] for line in lines[1:]], float).T
        assert 100 * np.corrcoef(p, y)[0, 1] == pytest.approx(row["stsb"]["scores"][seed], abs=0.01)


def test_what_is_in_a_task_and_what_is_cut_is_said(run, glue, model):
    rows = [[0, "bal " * 10000, "dem", "entailment"], [1, "a", "b", "not_entailment"]]
    write(Path("glue/RTE/dev.tsv"), ["index", "sentence1", "sentence2", "label"], rows)
    message, output = run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte,stsb", "--glue_seeds=1")
    assert message is None
    assert "rte, dev: 2 examples: entailment 1, not_entailment 1" in output
    assert re.search(
        r"rte, train: 48 examples: (not_)?entailment \d+, (not_)?entailment \d+", output
    )
    assert re.search(r"stsb, dev: 20 examples: from [\d.]+ to 5, mean \d\.\d\d", output)
    assert "rte, dev: 1 of 2 have more than 32 tokens (glue_max_len), and their ends are" in output


def test_two_calls_at_once_keep_each_others_tasks(run, glue, model, monkeypatch):
    """After the first card that is written, another process writes a task of its own."""
    write_card, joined = scorecard.write_card, []

    def write_and_be_joined(out, card):
        write_card(out, card)
        if not joined:
            joined.append(json.loads((out / "glue.json").read_text()))
            row = joined[0]["rows"]["run"]
            row["theirs"] = row["cola"]
            (out / "glue.json").write_text(json.dumps(joined[0]))

    monkeypatch.setattr(scorecard, "write_card", write_and_be_joined)
    assert run("finetune_glue.py", *TINY, *SMALL, "--tasks=cola,rte", "--glue_seeds=1")[0] is None
    row = json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]
    assert row.keys() == {"cola", "rte", "theirs"} and row["theirs"] == row["cola"]


def test_same_seed_same_score_and_pretrained_differs_from_scratch(run, glue, model):
    scores = []
    for init in ("run", "run", "scratch"):
        Path("out/tiny/glue.json").unlink(missing_ok=True)
        assert (
            run("finetune_glue.py", *TINY, *SMALL, "--tasks=stsb", f"--glue_init={init}")[0] is None
        )
        scores.append(
            json.loads(Path("out/tiny/glue.json").read_text())["rows"][init]["stsb"]["scores"]
        )
    assert scores[0] == scores[1] != scores[2] and scores[0][0] != scores[0][1]


def test_a_task_that_can_be_learned_is_learned(run, glue, model):
    """Which of two words a text holds, with any seed: a linear probe of the mean would do."""
    words = [["bal", "0"], ["dem", "1"]]
    rows = [[f"fal gol {w} fin", y] for w, y in words * 200]
    for part in ("train", "dev"):
        write(Path(f"glue/SST-2/{part}.tsv"), ["sentence", "label"], rows)
    args = [
        "--tasks=sst2",
        "--glue_epochs=5",
        "--glue_seeds=3",
        "--glue_learning_rate=0.003",
        "--glue_pooling=mean",
    ]
    assert run("finetune_glue.py", *TINY, *SMALL, *args)[0] is None
    assert (
        min(json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]["sst2"]["scores"])
        > 95
    )


def test_glue_max_train_is_noted(run, glue, model):
    run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte", "--glue_max_train=32")
    assert (
        "pretrained: rte (32 training and 20 dev examples)" in Path("out/tiny/glue.md").read_text()
    )


def test_the_diagnostic_set_is_scored_with_the_mnli_model(run, glue, model):
    header = ["Lexical Semantics", "Premise", "Hypothesis", "Label"]
    write(
        Path("glue/diagnostic/diagnostic-full.tsv"),
        header,
        [["", f"bal {y}", "dem", y] for y in [*LABELS] * 4],
    )
    message, output = run("finetune_glue.py", *TINY, *SMALL, "--tasks=mnli,ax", "--glue_seeds=1")
    assert message is None, message
    row = json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]
    assert (
        row["ax"]["metric"] == "matthews"
        and -100 <= row["ax"]["median"] <= 100
        and "Other tasks | ax |" in output
    )
    lines = Path("out/tiny/submission/AX.tsv").read_text().splitlines()
    assert len(lines) == 13 and {line.split("\t")[1] for line in lines[1:]} <= {*LABELS}
    assert "add mnli to `tasks`" in run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte,ax")[0]


def test_predictions_for_the_server(run, glue, model, monkeypatch):
    """The server's files: a row for each test row, in order, even for a torn one.

    They have the server's labels, or values from 0 to 5.
    """
    texts = ["bal dem", "fal", "gol"]
    write(
        Path("glue/CoLA/test.tsv"), ["index", "sentence"], [[i, texts[i % 3]] for i in range(1063)]
    )
    header = "index genre filename year old_index source1 source2 sentence1 sentence2".split()
    write(
        Path("glue/STS-B/test.tsv"),
        header,
        [[i, *"012345", texts[i % 3], texts[i % 2]] for i in range(1378)] + [[1378]],
    )
    write(
        Path("glue/RTE/test.tsv"),
        ["index", "sentence1", "sentence2"],
        [[i, "a", "b"] for i in range(3000)],
    )
    args = [*TINY, *SMALL, "--glue_seeds=1", "--glue_submit=True"]
    message, output = run("finetune_glue.py", *args, "--tasks=cola,stsb,rte")
    assert message is None and "the GLUE server also wants SST-2, MRPC, QQP" in output, message
    with zipfile.ZipFile("out/tiny/submission.zip") as z:
        assert z.namelist() == ["CoLA.tsv", "RTE.tsv", "STS-B.tsv"]
        files = {
            n: [line.split("\t") for line in z.read(n).decode().splitlines()] for n in z.namelist()
        }
    assert all(rows[0] == ["index", "prediction"] for rows in files.values())
    assert all(
        [int(r[0]) for r in rows[1:]] == list(range(len(rows) - 1)) for rows in files.values()
    )
    assert {name: len(rows) - 1 for name, rows in files.items()} == {
        "CoLA.tsv": 1063,
        "RTE.tsv": 3000,
        "STS-B.tsv": 1379,
    }
    assert {r[1] for r in files["RTE.tsv"][1:]} <= {*YES_NO} and {
        r[1] for r in files["CoLA.tsv"][1:]
    } <= {"0", "1"}
    assert all(0 <= float(r[1]) <= 5 for r in files["STS-B.tsv"][1:])
    assert (
        len({r[1] for r in files["CoLA.tsv"][1::3]}) == 1
    )  # the same text, the same answer, whatever it is padded to
    _, output = run("finetune_glue.py", *args, "--tasks=cola,stsb,rte")
    assert "seed 0:" not in output  # nothing is done twice
    before = Path("out/tiny/submission/RTE.tsv").read_bytes()
    _, output = run("finetune_glue.py", *args, "--tasks=rte", "--glue_init=scratch")
    assert (
        "out/tiny/scratch/submission.zip" in output
        and Path("out/tiny/submission/RTE.tsv").read_bytes() == before
    )
    write(Path("glue/RTE/test.tsv"), ["index", "sentence1", "sentence2"], [[0, "a", "b"]])
    assert (
        "RTE's test set has 1 rows, the GLUE server wants 3000"
        in run("finetune_glue.py", *args, "--tasks=rte")[0]
    )


def test_ones_own_task(run, home, model):
    rows = [[f"fal {w}", w] for w in ("bal", "dem", "gol")] * 60
    write(Path("a.tsv"), ["what", "kind"], rows)
    Path("a.jsonl").write_text(
        "".join(json.dumps({"what": x, "kind": y, "more": 1}) + "\n" for x, y in rows)
    )
    scores = []
    for file in ("a.tsv", "a.jsonl"):
        own = {
            "name": f"words_{file[2:]}",
            "train": file,
            "dev": file,
            "columns": ["what"],
            "label": "kind",
        }
        args = [f"--tasks={[own]!r}", "--glue_epochs=8", "--glue_seeds=3", "--glue_pooling=mean"]
        message, output = run("finetune_glue.py", *TINY, *SMALL, *args)
        assert message is None and f"| {own['name']} |" in output and "mean of" not in output, (
            message
        )
        scores.append(
            json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"][own["name"]]["median"]
        )
    assert scores[0] == scores[1] > 95, scores
    numbers = own | {"name": "n", "metric": "pearson", "train": "n.tsv", "dev": "n.tsv"}
    write(Path("n.tsv"), ["what", "kind"], [["bal", 1], ["dem", 2.5]] * 20)
    assert run("finetune_glue.py", *TINY, *SMALL, f"--tasks={[numbers]!r}")[0] is None
    for change, expected in [
        ({"columns": []}, "columns (one or two)"),
        ({"metrics": "f1"}, "an own task has"),
        ({"metric": "bleu"}, "needs a name of its own"),
        ({"name": "rte"}, "needs a name of its own"),
        ({"label": "sort"}, "has no column 'sort'"),
        ({"dev": "none.tsv"}, "none.tsv is missing; or leave"),
        ({"metric": "pearson"}, "row 1: the label 'bal' is no finite number"),
        ({"metric": "f1"}, "f1 needs two"),
        ({"labels": ["bal"]}, "has the labels ['bal']"),
        ({"labels": ["bal", "dem"]}, "row 3: the label 'gol' is none of bal, dem"),
    ]:
        message, _ = run("finetune_glue.py", *TINY, *SMALL, f"--tasks={[own | change]!r}")
        assert expected in message and "\n" not in message
    for line in ("no json", "5", "null"):
        Path("a.jsonl").write_text(f'{line}\n{{"what": "x", "kind": "y"}}\n')
        assert (
            "a line that is not a JSON object"
            in run("finetune_glue.py", *TINY, *SMALL, f"--tasks={[own]!r}")[0]
        )
    submit = [
        "--glue_submit=True",
        "--glue_init=scratch",
        "--glue_seeds=1",
    ]  # of a task that has no test set
    assert run("finetune_glue.py", *TINY, *SMALL, f"--tasks={[numbers]!r}", *submit)[0] is None


def test_every_epoch_is_kept_and_the_last_one_counts(run, glue, model):
    assert run("finetune_glue.py", *TINY, *SMALL, "--tasks=stsb", "--glue_epochs=3")[0] is None
    entry = json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]["stsb"]
    assert [len(e) for e in entry["epochs"]] == [3, 3] and [
        e[-1] for e in entry["epochs"]
    ] == entry["scores"]
    assert len(set(entry["epochs"][0])) == 3 and all(s > 0 for s in entry["seconds"])
    assert len(entry["spearman"]) == 2 and all(-100 <= s <= 100 for s in entry["spearman"])


def test_what_was_not_kept_the_first_time_costs_one_seed(run, glue, model):
    args = [*TINY, *SMALL, "--tasks=rte", "--glue_seeds=3"]
    run("finetune_glue.py", *args)
    before = json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]["rte"]
    _, output = run("finetune_glue.py", *args, "--glue_save=True")
    assert (
        "seed 0" in output
        and "seed 1" not in output
        and Path("out/tiny/classifiers/rte.pt").exists()
    )
    after = json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]["rte"]
    assert after["scores"] == before["scores"] and after["epochs"] == before["epochs"]
    assert (
        "seed" not in run("finetune_glue.py", *args, "--glue_save=True")[1].split("# Scorecard")[0]
    )


def test_other_examples_are_another_score(run, home, model):
    own = {"name": "x", "train": "a.tsv", "dev": "a.tsv", "columns": ["t"]}
    for words in ("bal dem", "fal gol"):
        write(Path("a.tsv"), ["t", "label"], [[w, w] for w in words.split()] * 20)
        assert "x, seed 0" in run("finetune_glue.py", *TINY, *SMALL, f"--tasks={[own]!r}")[1]
    other = own | {"metric": "f1"}
    assert "x, seed 0: f1" in run("finetune_glue.py", *TINY, *SMALL, f"--tasks={[other]!r}")[1]
    assert (
        "two of the name 'x'"
        in run("finetune_glue.py", *TINY, *SMALL, f"--tasks={[own, other]!r}")[0]
    )


def test_the_protocol_is_the_recipes(monkeypatch):
    """Warm-up over a tenth, then a cosine to zero; dropout in every epoch."""
    from test_model import bert

    rates, classifier = [], G.Classifier(bert(), 2)

    class Spy(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            for group in self.param_groups:
                assert (group["betas"], group["eps"]) == ((0.9, 0.98), 1e-6)
                assert group["weight_decay"] == 0.0 and classifier.training
            (rate,) = {group["lr"] for group in self.param_groups}
            rates.append(rate)
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    config = resolve("finetune_glue.py", ["--glue_epochs=2"])
    rows, y = [[2, 7 + i % 2, 3, 3] for i in range(167)], np.arange(167) % 2
    dev, ids, bar = {"x": (rows, y, "accuracy")}, {"pad": 0, "sep": 3}, G.tqdm(disable=True)
    G.finetune(classifier, (rows, y), dev, ids, 0, config, bar)
    p = np.arange(1, 21) / 20  # 10 full batches an epoch
    assert rates == pytest.approx(
        4e-5 * np.where(p < 0.1, p / 0.1, 0.5 * (1 + np.cos(np.pi * (p - 0.1) / 0.9)))
    )


def test_muon_turns_the_blocks_matrices_and_adamw_the_rest():
    """Steps of Muon have a root mean square of 0.2 times the rate (Liu et al. 2025).

    AdamW's first step is the rate itself.
    """
    from test_model import bert

    classifier = G.Classifier(bert(), 2)
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    words = "--glue_optimizer=muon --glue_epochs=1 --glue_warmup=0.0 --glue_learning_rate=1e-3"
    config = resolve("finetune_glue.py", words.split())
    rows, y = np.random.default_rng(0).integers(5, 50, (32, 24)).tolist(), np.arange(32) % 2
    ids, bar = {"pad": 0, "sep": 3}, G.tqdm(disable=True)
    G.finetune(classifier, (rows, y), {}, ids, 0, config, bar)
    rate = 1e-3 / 2  # of the first of two steps; the second one is at the end of the cosine
    for name, p in classifier.named_parameters():
        change = p.detach() - before[name]
        if name.startswith("bert.blocks.") and p.ndim == 2:
            is_stacked = "qkv" in name or "up" in name
            width = classifier.bert.config.n_embd if is_stacked else len(change)
            for part in change.split(width):
                assert part.square().mean().sqrt() == pytest.approx(0.2 * rate, rel=0.01), name
        elif name in ("pooler.weight", "head.weight"):
            assert 0.9 < change.abs().max() / rate < 1.01, name


def test_padding_changes_no_prediction_and_segments_begin_after_the_first_sep():
    from test_model import bert

    ids = {"pad": 0, "sep": 3}
    _, mask, types = G.collate([[2, 7, 3, 8, 8, 3], [2, 7, 3]], [0, 1], ids, "cpu", 128)
    assert mask.sum(1).tolist() == [6, 3] and types.tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6]
    rows, classifier = [[2, *[7] * n, 3, 3] for n in (1, 5, 20, 3)], G.Classifier(bert(), 1, "mean")
    alone = [G.predict(classifier, [row], ids, 128)[0] for row in rows]
    assert np.allclose(G.predict(classifier, rows, ids, 128), alone, atol=1e-5)
    assert np.ptp(alone) > 1e-4


def test_killed_it_repeats_one_seed_at_most(run, glue, model, home):
    args = [*TINY, *SMALL, "--tasks=rte,mrpc,cola", "--glue_seeds=6"]
    process = start("finetune_glue.py", *args, cwd=home)
    while not Path("out/tiny/glue.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    before = json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]
    message, output = run("finetune_glue.py", *args)
    assert (
        message is None
        and output.count(", seed ") + sum(len(e["scores"]) for e in before.values()) == 18
    )
    whole = json.loads(Path("out/tiny/glue.json").read_text())["rows"]["run"]
    assert all(whole[t]["scores"][: len(e["scores"])] == e["scores"] for t, e in before.items())


def test_odd_texts(run, glue, model):
    """Empty texts, and one of ten thousand words, are examples like others."""
    write(
        Path("glue/RTE/dev.tsv"),
        ["index", "sentence1", "sentence2", "label"],
        [[0, "", "", "entailment"], [1, "bal " * 9999, "dem", "entailment"]],
    )
    assert run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte", "--glue_seeds=1")[0] is None


def test_mistakes_end_in_one_line(run, glue, model):
    cases = [
        (["--tasks=rte", "--out_dir=out/none"], "run train.py"),
        (["--tasks=rtee"], "there is no task 'rtee'"),
        (["--tasks=rte", "--glue_dir=nothing"], "nothing/RTE/train.tsv is missing"),
        (["--tasks=rte", "--glue_dir="], "cannot load nyu-mll/glue"),
        (["--tasks=rte", "--glue_max_len=100"], "over the model's max_len = 64"),
        (["--tasks=docs_next"], "docs_next/train.tsv is missing"),
        (["--tasks="], "`tasks` is empty"),
    ]
    write(Path("glue/CoLA/dev.tsv"), ["a", "b"], [["c", "d"]])
    cases.append((["--tasks=cola"], "cola has a part without examples"))
    write(Path("glue/QNLI/train.tsv"), ["index", "q", "s", "label"], [[0, "a", "b", "entailment"]])
    cases.append((["--tasks=qnli"], "has no column 'question'"))
    write(
        Path("glue/MNLI/train.tsv"), ["sentence1", "sentence2", "gold_label"], [["a", "b", "maybe"]]
    )
    cases.append((["--tasks=mnli"], "mnli has a label that is not one of"))
    for args, expected in cases:
        message, _ = run("finetune_glue.py", *TINY, *SMALL, *args)
        assert expected in str(message) and "\n" not in message
    assert not Path("out/tiny/glue.json").exists()
    saved = torch.load("out/tiny/model.pt", weights_only=True)
    config = {**saved["config"], "vocab_size": 99}
    weights = {**saved["model"], "embedding.weight": torch.zeros(99, 32)}
    torch.save({"config": config, "model": weights}, "out/tiny/model.pt")
    assert "tokenizer.json has" in run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte")[0]
    torch.save({"config": config, "model": saved["model"]}, "out/tiny/model.pt")
    assert "cannot be read" in run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte")[0]
    Path("out/tiny/model.pt").write_bytes(b"damaged")
    assert "cannot be read" in run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte")[0]
