"""Filling masks, what a model copies, and pictures."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from tokenizers import Tokenizer

import plot
from model import BERT, Config


@pytest.fixture
def model(run, tiny_data):
    assert run("train.py", *TINY, "--max_steps=30")[0] is None


def test_the_answers_are_the_models(run, model):
    assert run("fill_mask.py", "out/tiny", "<mask>")[0] is None
    message, output = run("fill_mask.py", "out/tiny", "bal <mask> fal <mask>.", "--top=3")
    assert message is None, message
    saved = torch.load("out/tiny/model.pt", weights_only=True)
    bert = BERT(Config(**saved["config"])).eval()
    bert.load_state_dict(saved["model"])
    tokenizer = Tokenizer.from_file("out/tiny/tokenizer.json")
    ids = torch.tensor([tokenizer.encode("bal", add_special_tokens=False).ids + [4]])  # before the first mask
    full = [*ids[0].tolist(), *tokenizer.encode("fal", add_special_tokens=False).ids, 4]
    full += tokenizer.encode(".", add_special_tokens=False).ids
    p = bert.logits(bert.encode(torch.tensor([full])))[0].softmax(-1)
    expected = []
    for at in (i for i, t in enumerate(full) if t == 4):
        best = p[at].topk(3)
        expected.append(", ".join(f"{tokenizer.id_to_token(int(i))} {x:.1%}" for i, x in zip(best.indices, best.values)))
    assert output.splitlines() == expected


def test_texts_from_stdin_and_mistakes(run, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("bal <mask>\n\ndem <mask> fal\n"))
    message, output = run("fill_mask.py", "out/tiny")
    assert message is None and len(output.splitlines()) == 2
    assert "the text has no <mask>: 'bal'" in run("fill_mask.py", "out/tiny", "bal")[0]
    assert "more than max_len = 64" in run("fill_mask.py", "out/tiny", "<mask> " + "bal " * 99)[0]
    assert "does not exist" in run("fill_mask.py", "out/none", "bal <mask>")[0]
    assert "python fill_mask.py" in run("fill_mask.py", "out/tiny", "bal <mask>", "--top=0")[0]
    said = "bal\nbal <mask>\n\n"
    args = [sys.executable, ROOT / "fill_mask.py", "out/tiny", "--interactive"]
    process = subprocess.run(args, input=said, capture_output=True, text=True)
    assert process.returncode == 0 and "has no <mask>" in process.stdout and process.stdout.count("%") == 5


def test_rows_that_repeat_themselves_are_what_copying_is_measured_on(run, model):
    """In the losses of the run's own log, and where all rows of val.bin already say everything twice."""
    message, output = run("bench.py", "copying", "out/tiny")
    assert message is None, message
    once, twice = output.split(": val_loss ")[1].split(", where the second half of a row repeats the first ")
    logged = [json.loads(line) for line in Path("out/tiny/log.jsonl").read_text().splitlines()]
    assert float(once) == pytest.approx(logged[-1]["val_loss"], abs=0.001) and float(once) != float(twice)
    rows = np.fromfile("data/tiny/val.bin", np.uint16).reshape(-1, 32)
    rows[:, 16:] = rows[:, :16]
    rows.tofile("data/tiny/val.bin")
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    meta["sha256"]["val"] = hashlib.sha256(rows.tobytes()).hexdigest()
    Path("data/tiny/meta.json").write_text(json.dumps(meta))
    expected = f"out/tiny: val_loss {twice.strip()}, where the second half of a row repeats the first {twice}"
    assert run("bench.py", "copying", "out/tiny")[1] == expected
    assert "out/none/model.pt does not exist" in run("bench.py", "copying", "out/none")[0]


def test_pictures(run, model):
    assert run("train.py", *TINY, "--max_steps=10", "--out_dir=out/b")[0] is None
    for args, file in [
        (["out/tiny"], "out/tiny/curves.png"),
        (["out/tiny", "out/b", "--x=tokens", "--out=two.png"], "two.png"),
    ]:
        message, output = run("plot.py", *args)
        assert message is None and "NOT" not in output and Path(file).read_bytes()[:4] == b"\x89PNG"
    message, output = run("plot.py", "out/tiny", "out/b", "--scaling", "--out=laws.png")
    assert "three points on the envelope" in message
    config = json.loads(Path("out/b/config.json").read_text())
    Path("out/b/config.json").write_text(json.dumps(config | {"val_sha256": "other"}))
    assert "differ in tokenizer or val.bin" in run("plot.py", "out/tiny", "out/b")[1]
    entry = {"metric": "f1", "median": 70.0, "sd": 1.0, "partial": True}
    Path("out/tiny/glue.json").write_text(json.dumps({"rows": {"run": {"mrpc": entry}, "scratch": {"mrpc": entry}}}))
    assert run("plot.py", "out/tiny", "--card")[0] is None and Path("out/tiny/card.png").read_bytes()[:4] == b"\x89PNG"
    assert "finetune_glue.py writes it" in run("plot.py", "out/b", "--card")[0]
    Path("out/b/config.json").unlink()
    with open("out/b/log.jsonl", "a") as f:
        f.write('{"step": 9, "ho')
    assert run("plot.py", "out/b")[0] is None
    assert "is empty" in (Path("out/b/log.jsonl").write_text(""), run("plot.py", "out/b"))[1][0]
    assert "plot.py: none/x.png" in run("plot.py", "out/tiny", "--out=none/x.png")[0]
    assert "log.jsonl does not exist" in run("plot.py", "out/none")[0]
    assert "python plot.py" in run("plot.py", "out/tiny", "--y=3")[0]


def test_seeds_of_one_recipe_become_a_mean_and_a_range(home):
    """The range by hand: lines from (0, 4) to (2, 2) and from (1, 5) to (3, 3), which both are there from 1 to 2."""
    found = plot.mean_and_range([([0, 2], [4, 2]), ([1, 3], [5, 3])])
    assert [list(x) for x in found] == [[1, 2], [4, 3], [3, 2], [5, 4]]
    assert plot.mean_and_range([([3], [4.0]), ([1, 2], [8.0, 7.0])]) is None
    settings = [{"seed": 1, "n_layer": 2}, {"seed": 1, "n_layer": 3}, {"seed": 2, "n_layer": 2}, None]
    settings[2] |= {"qk_norm": False, "resume": "never"}  # of younger code, which knows a key more, and repeated
    settings.append(settings[0])  # the same experiment once more is not another seed
    for i, config in enumerate(settings):
        Path(f"run{i}").mkdir()
        if config:
            Path(f"run{i}/config.json").write_text(json.dumps(config | {"out_dir": f"run{i}", "max_steps": 8}))
        found = (0.5, 25, 5 + i), (1.0, 100, 4 + i)  # half of the steps of a growing batch are a quarter of the tokens
        entries = [{"progress": p, "tokens": tokens, "hours": 1, "val_loss": loss} for p, tokens, loss in found]
        lines = [{"progress": 0.1, "tokens": 1, "hours": 1, "loss": 7.0}, *entries]
        Path(f"run{i}/log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    runs = [f"run{i}" for i in range(5)]
    assert plot.recipes(runs) == [["run0", "run2"], ["run1"], ["run3"], ["run4"]]
    plot.draw_curves(runs[:3], "progress", "seeds.png")
    _, validation, *_ = plot.plt.gcf().axes
    (legend,) = plot.plt.gcf().legends
    assert [text.get_text() for text in legend.get_texts()] == ["run0, 2 seeds", "run1"]
    (band,) = validation.collections
    assert band.get_datalim(validation.transData).extents.tolist() == [0.25, 4, 1, 7]
    mean, *points = validation.lines
    assert mean.get_xydata().tolist() == [[0.25, 6], [1, 5]] and points[1].get_xydata().tolist() == [[0.25, 7], [1, 6]]
    assert validation.get_xlabel() == "share of the time"
