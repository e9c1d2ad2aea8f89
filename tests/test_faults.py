"""Files and locks; many kills at random moments are minutes, so only `make slow` runs them."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from test_train import log, weights

from nanocram import faults
from nanocram.faults import Fault, lock, replace_file

KILLS = 10


def test_a_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replace_file(path) as f:
        f.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    with replace_file(path) as f:
        f.write(b"new")
    assert path.read_text() == "new"


# --------------------------------------------------------------------------------------------------
# Locks

HOLD = """
import sys, time
from nanocram.faults import lock
with lock(sys.argv[1], "the folder"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path):
    """Start a process that holds the lock."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_keeps_others_out_until_its_process_ends_or_is_killed(tmp_path):
    path = tmp_path / "lock"
    process = hold(path)
    with pytest.raises(Fault, match=f"the folder is in use by process {process.pid} on "):
        with lock(path, "the folder", patience=0.1):
            pass
    process.kill()
    with lock(path, "the folder"):
        assert f"process {os.getpid()}" in path.read_text()
        with pytest.raises(Fault, match=f"process {os.getpid()}"):
            with lock(path, "the folder", patience=0.0):
                pass
    with lock(path, "the folder", patience=0.0):
        pass


@pytest.mark.parametrize("system", ["no flock", "a network file system"])
def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch, capsys, system):
    def refuse(f, how):
        raise OSError(errno.ENOLCK, "No locks available")

    if system == "no flock":
        monkeypatch.setattr(faults, "fcntl", None)
    else:
        monkeypatch.setattr(faults.fcntl, "flock", refuse)
    with lock(tmp_path / "lock", "the folder"):
        pass
    assert capsys.readouterr().out.count("warning") == 1


# --------------------------------------------------------------------------------------------------
# Kills and a full disk


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase, settings",
    [
        ("training", ["--checkpoint_minutes=0.004", "--eval_minutes=9.0"]),
        ("checkpoints", ["--checkpoint_minutes=0.00001", "--eval_minutes=9.0"]),
        ("evaluation", ["--checkpoint_minutes=0.004", "--eval_minutes=0.00001"]),
    ],
)
def test_kill_9_at_random_moments_loses_nothing(run, tiny_data, home, phase, settings):
    """In a run that mostly trains, saves, or evaluates: the final weights and log are those of an
    undisturbed run.
    """
    rng, args = random.Random(phase), [*TINY, "--max_steps=2000", "--dropout=0.1"]
    assert (
        run(
            "train.py",
            *args,
            "--out_dir=out/whole",
            "--checkpoint_minutes=9.0",
            "--eval_minutes=9.0",
        )[0]
        is None
    )
    kills = torn = 0
    while kills < KILLS:
        path = Path("out/tiny/log.jsonl")
        old = path.stat().st_ino if path.exists() else None
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *args, *settings], stdout=subprocess.DEVNULL
        )
        while (
            not path.exists() or path.stat().st_ino == old
        ):  # until this part has cut the log of the one before
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.8))
        assert process.poll() is None, "the run ended before all kills"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        torn += Path("out/tiny/ckpt.pt.tmp").exists()
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree("out/tiny", "copy")
        if Path("copy/ckpt.pt").exists():
            torch.load("copy/ckpt.pt", weights_only=True)
    assert run("train.py", *args, *settings)[0] is None
    print(f"{phase}: {kills} kills, {torn} of them while a checkpoint was written")
    a, b = weights("whole"), weights()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [(e["step"], e["loss"]) for e in log()] == [(e["step"], e["loss"]) for e in log("whole")]


@pytest.mark.slow
def test_a_disk_that_is_full(run, tiny_data, home):
    """On a tmpfs that holds one checkpoint, not two: the old one stays, one line says why, and
    with room it goes on.
    """
    disk = Path("disk")
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        args = [
            *TINY,
            "--max_steps=300",
            "--out_dir=disk/tiny",
            "--log_seconds=1.0",
            "--checkpoint_minutes=0.001",
        ]
        message, _ = run("train.py", *args)
        assert message.endswith("what was saved before is intact") and "\n" not in message
        step = torch.load("disk/tiny/ckpt.pt", weights_only=True)["step"]
        assert not Path("disk/tiny/model.pt").exists() and not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        message, output = run("train.py", *args)
        assert message is None and f"at step {step:,}" in output
    finally:
        subprocess.run(["umount", disk])


def test_a_terminal_without_a_character_ends_no_run():
    code = "from nanocram.faults import run_script; run_script(lambda: print('\u2581bal'))"
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\\u2581bal\n"), done.stderr
