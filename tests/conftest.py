"""Small inputs that the tests make themselves, and a way to run the scripts as a user does."""

import functools
import gc
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
os.environ["OMP_NUM_THREADS"] = "1"  # for models this small a second thread mostly waits
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from nanocram import configurator, device  # noqa: E402

TINY_DATA = [
    "--dataset=tiny",
    "--sources=text.txt",
    "--vocab_size=90",
    "--seq_len=32",
    "--val_rows=16",
    "--max_chars=0",
    "--max_rows=0",
    "--filter_ratio=0.0",
    "--order=shuffle",
]
TINY_MODEL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--n_inner=64", "--max_len=64"]
TINY_TRAIN = [
    "--out_dir=out/tiny",
    "--batch_size=8",
    "--micro_batch_size=8",
    "--batch_ramp=0.0",
    "--log_seconds=0",
    "--compile=False",
    "--device=cpu",
    "--dtype=float32",
    "--learning_rate=0.003",
]
TINY = [*TINY_DATA, *TINY_MODEL, *TINY_TRAIN]
PEAK = functools.cache(device.peak_flops)  # measured once


def sentences(n_documents, seed=0):
    """Return documents of a toy language in which most words fix the next one.

    So attention has something to learn.
    """
    rng = random.Random(seed)
    syllables = [(a, b) for a in "bdfg" for b in "aeio"]
    words = [a + b + c for a, b in syllables for c in "lmnr"]
    documents = []
    for _ in range(n_documents):
        lines = []
        for _ in range(rng.randint(3, 9)):
            i = rng.randrange(64)
            line = []
            for _ in range(rng.randint(4, 12)):
                line.append(words[i])
                i = (5 * i + 3) % 64 if rng.random() < 0.9 else rng.randrange(64)
            lines.append(" ".join(line) + ".")
        documents.append("\n".join(lines))
    return documents


def pytest_collection_finish():
    """Keep what is imported by now out of garbage collections, which took half of some tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder to work in, with the repository's config files and a small text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(sentences(400)))
    os.utime(text, (0, 0))  # prepare.py reads a text again if its date has changed
    return tmp_path


@pytest.fixture
def run(home, monkeypatch, capsys):
    """run("train.py", "--key=value", ...) runs a stage, or a tool, in this process.

    Returns (exit message or None, output). An absolute path is a script elsewhere.
    """
    monkeypatch.setattr(device, "peak_flops", PEAK)

    def go(script, *args):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", [script, *args])
        capsys.readouterr()
        message = None
        try:
            if (ROOT / script).exists():
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                module = f"tools.{script.removesuffix('.py')}"
                runpy.run_module(module, run_name="__main__", alter_sys=False)
        except SystemExit as e:
            message = e.code
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            torch.use_deterministic_algorithms(False)
        captured = capsys.readouterr()
        return message, captured.out + captured.err

    return go


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A folder that keeps what many tests begin with; see made_once."""
    return tmp_path_factory.mktemp("shelf")


def made_once(shelf, folder, make):
    """Return the output of make(), which fills a folder. The next test gets a copy of both."""
    said = shelf / f"{folder}.said"
    if said.exists():
        shutil.copytree(shelf / folder, folder)
        return said.read_text()
    message, output = make()
    assert message is None, message
    shutil.copytree(folder, shelf / folder)
    said.write_text(output)
    return output


@pytest.fixture
def tiny_data(run, shelf):
    """The tiny corpus in data/tiny. Returns what prepare.py has said."""
    return made_once(shelf, "data", lambda: run("prepare.py", *TINY))


@pytest.fixture
def read_once(monkeypatch):
    """The source of each stage is read once, not for each of a hundred entries."""
    monkeypatch.setattr(configurator, "Stage", functools.cache(configurator.Stage))


def command(script, *args):
    """Return the command line of a stage or a tool, which needs ROOT in PYTHONPATH."""
    if (ROOT / "tools" / script).exists():
        return [sys.executable, "-m", f"tools.{script.removesuffix('.py')}", *args]
    return [sys.executable, str(ROOT / script), *args]


def start(script, *args, cwd):
    """Start the script as a process of its own, for what kills processes."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(script, *args), cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True
    )
