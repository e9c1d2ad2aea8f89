"""Runs that start from other weights: continued pretraining, branches, and what is refused."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_DATA, TINY_TRAIN
from test_huggingface import our_bert, their_bert
from test_train import log, sabotage, weights
from tokenizers import normalizers, pre_tokenizers

import train
from nanocram import tokenizer as tokenizer_module
from nanocram.pretrained import fit_positions
from nanocram.rules import rules_lines, verdicts
from nanocram.tokenizer import load_tokenizer, tokenizer_difference

# no key of the model: the architecture is that of the weights
FREE = [*TINY_DATA, *TINY_TRAIN, "--init_from=out/tiny", "--out_dir=out/next"]


@pytest.fixture
def origin(run, tiny_data):
    """A finished run in out/tiny, with a constant rate and more weights than the default has."""
    args = ["--max_steps=12", "--schedule=constant", "--optimizer=muon", "--value_residual=True"]
    message, output = run("train.py", *TINY, *args)
    assert message is None, message


def config_of(name):
    return json.loads(Path(f"out/{name}/config.json").read_text())


def rows():
    import numpy as np

    return np.fromfile("data/tiny/val.bin", np.uint16).reshape(-1, 32)


# --------------------------------------------------------------------------------------------------
# Continued pretraining


def test_a_run_starts_with_the_weights_and_the_architecture_of_another(run, origin):
    message, output = run("train.py", *FREE, "--max_steps=3", "--dropout=0.1", "--max_len=48")
    assert message is None and "starting from out/tiny" in output, message
    first, last = log("next", "val_loss")
    assert first["step"] == 0 and last["step"] == 3
    assert first["val_loss"] == pytest.approx(log("tiny", "val_loss")[-1]["val_loss"], abs=1e-6)

    config = config_of("next")
    found = [config[key] for key in ("n_layer", "n_embd", "value_residual", "dropout", "max_len")]
    assert found == [2, 32, True, 0.1, 48]
    saved = torch.load("out/next/ckpt.pt", weights_only=True)
    steps = {int(state["step"]) for state in saved["optimizers"][0]["state"].values()}
    assert steps == {3} and saved["step"] == 3  # a new optimizer, a new clock

    record = json.loads(Path("out/next/rules.json").read_text())
    assert [rule[0] for rule, e in record.items() if e["verdict"] == "broken"] == ["1", "2"]
    lines = " ".join(rules_lines(verdicts({"run": {}}, record)))
    assert "1 a masked language model from scratch" in lines
    assert "started from the weights of out/tiny" in lines


def test_what_does_not_fit_is_refused_before_anything_is_touched(run, origin):
    """Also a key that is set to its default, which the weights do not have."""
    for args, expected in [
        (["--n_layer=3"], "has another architecture: n_layer is 2 there, 3 here"),
        (["--n_layer=16", "--glu=False"], "glu is True there, False here; n_layer is 2 there, 16"),
        (["--count_tokens=100"], "count_tokens makes an embedding"),
        (["--init_from=out/none"], "'out/none' is no folder, and the hub gives"),
        (["--max_len=16"], "rows have 32 tokens, more than max_len = 16"),
    ]:
        message, _ = run("train.py", *FREE, "--max_steps=2", *args)
        assert expected in message and "\n" not in message

    # another tokenizer: the line says how to get the same one, and it works
    other = ["--dataset=other", "--vocab_size=80"]
    assert run("prepare.py", *TINY, *other)[0] is None
    message, _ = run("train.py", *FREE, *other, "--max_steps=2")
    assert "data/other has another vocabulary than out/tiny" in message
    shutil.rmtree("data/other")
    assert "--tokenizer_file=out/tiny" in message
    assert run("prepare.py", *TINY, *other, "--tokenizer_file=out/tiny", "--seed=3")[0] is None
    os.remove("out/tiny/model.pt")
    message, _ = run("train.py", *FREE, *other, "--max_steps=2")
    assert "out/tiny is not finished" in message and not Path("out/next").exists()
    assert run("train.py", *FREE, *other, "--max_steps=2", "--init_from=out/tiny/ckpt.pt",
               "--optimizer=muon")[0] is None  # fmt: skip


def test_a_killed_run_continues_without_the_weights_it_started_from(run, origin, monkeypatch):
    args = [*FREE, "--max_steps=6"]
    assert run("train.py", *args, "--out_dir=out/whole")[0] is None

    def ctrl_c(loss, model):
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        sabotage(patch, {4}, ctrl_c)
        assert "stopped; saved at step 4" in run("train.py", *args)[0]
    shutil.rmtree("out/tiny")
    assert "n_embd is 32 there, 64 here" in run("train.py", *args, "--n_embd=64")[0]
    message, output = run("train.py", *args)
    assert message is None and "continuing out/next at step 4" in output, message
    a, b = weights("whole"), weights("next")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [e["step"] for e in log("next", "val_loss")] == [0, 6]


def test_a_hugging_face_bert_is_trained_on(run, home):
    """Its first loss is that of load_bert's model, and its table of positions grows."""
    their_bert(home / "bert")
    args = ["--tokenizer_file=bert", "--init_from=bert", "--out_dir=out/tiny"]
    assert run("prepare.py", *TINY, *args)[0] is None
    message, output = run("train.py", *FREE, *args, "--max_steps=2")
    assert message is None and "positions" not in output, message
    model = our_bert(home / "bert")
    expected = train.evaluate(model, rows(), 4, "cpu")["val_loss"]
    assert log("tiny", "val_loss")[0]["val_loss"] == pytest.approx(expected, abs=1e-5)
    assert not torch.equal(weights()["embedding.weight"], model.embedding.weight)

    message, output = run("train.py", *FREE, *args, "--max_steps=2", "--out_dir=o", "--max_len=100")
    assert message is None, message
    assert "learned positions 40 to 99 begin as copies of 0 to 39, in turns" in output
    assert log("tiny")[0]["loss"] == log("../o")[0]["loss"]  # the rows have 32 tokens


def test_positions_are_copied_in_turns_or_cut_off():
    table = torch.arange(6.0).view(3, 2)
    assert fit_positions(table, 8)[:, 0].tolist() == [0, 2, 4, 0, 2, 4, 0, 2]
    assert fit_positions(table, 2)[:, 0].tolist() == [0, 2]


def test_tokenizers_are_compared_by_what_they_do(tiny_data):
    path = "data/tiny/tokenizer.json"
    first = load_tokenizer(path)

    def changed(name=None, value=None):
        second = load_tokenizer(path)
        if name:
            setattr(second, name, value)
        return second

    padded = changed()
    padded.enable_padding(length=9)
    padded.enable_truncation(7)
    padded.post_processor = None
    assert padded.to_str() != first.to_str() and tokenizer_difference(first, padded) == ""
    assert tokenizer_difference(first, changed("normalizer", normalizers.NFC())) == "normaliser"
    words = pre_tokenizers.WhitespaceSplit()
    assert tokenizer_difference(first, changed("pre_tokenizer", words)) == "pre-tokeniser"
    second = changed()
    second.add_tokens(["entirely"])
    assert tokenizer_difference(first, second) == "vocabulary"


def test_the_tokenizer_of_a_model_on_the_hub(tiny_data, home, monkeypatch):
    import huggingface_hub

    their_bert(home / "bert")
    asked = []

    def snapshot(source, allow_patterns):
        asked.append(source)
        return str(home / "bert")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    for source in ("bert-tiny", "someone/bert-tiny"):
        assert load_tokenizer(source).token_to_id("[MASK]") == 4
    assert asked == ["bert-tiny", "someone/bert-tiny"]
    assert not tokenizer_module.is_model("data/tiny/tokenizer.json")
    assert not tokenizer_module.is_model("bert.json")


# --------------------------------------------------------------------------------------------------
# Branches


def test_a_branch_goes_on_with_the_optimizer_and_the_corpus(run, origin):
    branch = [*FREE, "--init_from=out/tiny/ckpt.pt", "--schedule=linear", "--max_steps=4"]
    message, output = run("train.py", *branch, "--optimizer=muon", "--weight_decay=0.5")
    assert message is None and "warning" not in output, message

    # from the plateau's rate to zero, after the rows that the plateau has read
    old, new = (torch.load(f"out/{name}/ckpt.pt", weights_only=True) for name in ("tiny", "next"))
    steps = {int(state["step"]) for state in new["optimizers"][0]["state"].values()}
    assert steps == {16} and new["step"] == 4 and new["rows"] == old["rows"] + 32
    assert new["optimizers"][0]["param_groups"][0]["weight_decay"] == 0.5
    rates = [entry["lr"] for entry in log("next")]
    assert rates == pytest.approx([0.003, 0.00225, 0.0015, 0.00075])
    momentum = [state["momentum"] for state in old["optimizers"][1]["state"].values()]
    assert all(m.norm() > 0 for m in momentum)

    # a jump is a warning; another optimizer is refused
    output = run("train.py", *branch, "--optimizer=muon", "--learning_rate=0.1", "--out_dir=o")[1]
    assert "warning: the learning rate was 0.003 there, and begins with 0.1 here" in output
    message, _ = run("train.py", *branch, "--optimizer=adamw", "--out_dir=out/b")
    assert "optimizer was 'muon', now 'adamw'" in message
    with open("out/tiny/ckpt.pt", "r+b") as f:
        f.truncate(1000)
    message, _ = run("train.py", *branch, "--optimizer=muon", "--out_dir=out/b")
    assert "out/tiny/ckpt.pt cannot be read" in message and not Path("out/b").exists()


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_longer_budget_is_for_a_rate_that_stays(run, tiny_data, schedule):
    """Then the run is that of the longer budget. Else the line says how to branch."""
    args = [*TINY, f"--schedule={schedule}"]
    assert run("train.py", *args, "--max_steps=4")[0] is None
    os.remove("out/tiny/model.pt")
    assert "max_steps was 4, now 3" in run("train.py", *args, "--max_steps=3")[0]
    message, output = run("train.py", *args, "--max_steps=7")
    if schedule == "linear":
        assert "learning rate 0 and 8 rows become 0.00129 and 8" in message
        assert "--init_from=out/tiny/ckpt.pt --schedule=linear" in message
        return
    assert message is None and "continuing out/tiny at step 4" in output, message
    assert run("train.py", *args, "--max_steps=7", "--out_dir=out/whole")[0] is None
    a, b = weights("whole"), weights()
    assert all(torch.equal(a[key], b[key]) for key in a)
