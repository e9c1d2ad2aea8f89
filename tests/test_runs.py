"""The folder of a run: its lock, what else may lie there, and two checkpoints."""

import functools
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import TINY, start
from test_train import log, weights

from nanocram import runs
from nanocram.faults import lock


@pytest.mark.parametrize("damage", ["torn", "missing", "both torn"])
def test_a_damaged_checkpoint_has_a_predecessor(run, tiny_data, damage):
    """A kill between two renames leaves the older one alone, too."""
    args = [*TINY, "--max_steps=8", "--checkpoint_minutes=0.0000001"]
    assert run("train.py", *args)[0] is None
    whole = weights()
    os.remove("out/tiny/model.pt")
    last, before = Path("out/tiny/ckpt.pt"), Path("out/tiny/ckpt.old.pt")
    steps = [torch.load(path, weights_only=True)["step"] for path in (last, before)]
    assert steps == [8, 7]

    half = last.read_bytes()[: last.stat().st_size // 2]
    if damage == "missing":
        os.remove(last)
    else:
        last.write_bytes(half)
    if damage == "both torn":
        before.write_bytes(half)
        assert "ckpt.old.pt cannot be read" in run("train.py", *args)[0]
        return
    message, output = run("train.py", *args)
    assert message is None and "continuing out/tiny at step 7" in output
    assert ("warning: out/tiny/ckpt.pt cannot be read" in output) == (damage == "torn")
    assert all(torch.equal(whole[key], value) for key, value in weights().items())
    assert [entry["step"] for entry in log()] == list(range(1, 9))
    assert torch.load(before, weights_only=True)["step"] == 7


def test_one_process_at_a_time(run, tiny_data, home, monkeypatch):
    """The second one is refused, and has changed nothing; a kill lets the third one in."""
    monkeypatch.setattr(runs, "lock", functools.partial(lock, patience=0.1))
    endless = [*TINY, "--max_steps=100_000", "--checkpoint_minutes=0.001"]
    process = start("train.py", *endless, cwd=home)
    while not Path("out/tiny/ckpt.pt").exists():
        assert process.poll() is None
    for resume in ("auto", "never"):
        message, _ = run("train.py", *endless, f"--resume={resume}")
        assert f"out/tiny is in use by process {process.pid} on {os.uname().nodename}" in message
        assert "\n" not in message and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    message, output = run("train.py", *TINY, "--max_steps=5", "--resume=never")
    assert message is None and len(log()) == 5, message


def test_two_that_begin_at_once(tmp_path):
    """Both have found no folder; the second one sees that the first has begun."""
    (tmp_path / "tokenizer.json").write_text("{}")
    args = ({}, "train.py", set(), None, "auto")
    first, second = (runs.Run(tmp_path / "run", *args) for _ in range(2))
    first.begin({}, tmp_path / "tokenizer.json")
    first.close()
    with pytest.raises(runs.Fault, match="another process has begun a run"):
        second.begin({}, tmp_path / "tokenizer.json")


def test_the_log_of_a_scheduler_is_no_reason_to_refuse(run, tiny_data):
    Path("out/tiny").mkdir(parents=True)
    for name in ("job.log", "slurm-17.out", "slurm-17_3.out", "glue.lock"):
        Path("out/tiny", name).write_text("starting")
    assert run("train.py", *TINY, "--max_steps=2")[0] is None
    assert Path("out/tiny/slurm-17.out").exists()
    Path("out/mine").mkdir(parents=True)
    for name in ("job.log", "notes.out"):
        Path("out/mine", name).write_text("mine")
    message, _ = run("train.py", *TINY, "--max_steps=2", "--out_dir=out/mine")
    assert "files that are not of a run" in message and len(os.listdir("out/mine")) == 2


def test_signals_are_caught_in_the_main_thread_only():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    made = []
    thread = threading.Thread(target=lambda: made.append(runs.StopRequest()))
    thread.start()
    thread.join()
    assert made[0].reason == ""
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def lines_of_log(tmp_path, monkeypatch, capsys, seconds, max_steps=0, max_tokens=0):
    """Return what a log in a file of output says, with an entry of training every 10 s."""
    clock = [1000.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    written = runs.Log(tmp_path, 0, 0.5, max_steps, max_tokens)
    for elapsed in range(10, seconds + 1, 10):
        clock[0] += 10
        state = {"step": elapsed // 5, "tokens": 20 * elapsed, "elapsed": float(elapsed)}
        written.write(state, elapsed / 1800, loss=3.25, tokens_per_s=20.0, mfu=0.5)
    written.write(state, elapsed / 1800, val_loss=4.0)
    written.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == seconds // 10 + 1
    return capsys.readouterr().out.splitlines()


def test_a_file_gets_a_line_every_minute_that_says_how_long_it_takes(tmp_path, monkeypatch, capsys):
    *training, evaluation = lines_of_log(tmp_path, monkeypatch, capsys, 180)
    assert [line.partition(" s,")[0] for line in training] == [
        "step 2, 10",
        "step 14, 70",
        "step 26, 130",
    ]
    speed = "loss 3.250, 20 tokens/s, MFU 50%"
    assert training[1] == f"step 14, 70 s, 4%: {speed}, 28:50 left"  # of half an hour
    assert evaluation == "step 36, 180 s: val_loss 4"


def test_the_time_left_of_a_number_of_steps_is_that_of_their_tokens(tmp_path, monkeypatch, capsys):
    first = lines_of_log(tmp_path, monkeypatch, capsys, 10, max_steps=1000, max_tokens=80200)[0]
    assert first.endswith(", 1:06:40 left")  # 80,000 tokens at 20 per second
