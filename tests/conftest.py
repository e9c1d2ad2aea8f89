"""Small inputs that the tests make themselves, and a way to run the scripts as a user does, in an empty folder."""

import functools
import os
import random
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
os.environ["OMP_NUM_THREADS"] = "1"  # for models this small a second thread mostly waits
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import hardware  # noqa: E402
import train  # noqa: E402

TINY_DATA = [
    "--dataset=tiny",
    "--sources=text.txt",
    "--vocab_size=90",
    "--seq_len=32",
    "--val_rows=16",
    "--max_chars=0",
]
TINY_DATA += ["--max_rows=0", "--filter_ratio=0.0", "--order=shuffle"]
TINY_MODEL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--n_inner=64", "--max_len=64"]
TINY_TRAIN = ["--out_dir=out/tiny", "--batch_size=8", "--micro_batch_size=8", "--batch_ramp=0.0", "--log_seconds=0"]
TINY_TRAIN += ["--compile=False", "--device=cpu", "--dtype=float32", "--learning_rate=0.003"]
TINY = [*TINY_DATA, *TINY_MODEL, *TINY_TRAIN]
PEAK = functools.cache(hardware.peak_flops)  # measured once


def sentences(n_documents, seed=0):
    """Documents of a toy language in which most words fix the next one, so that attention has something to learn."""
    rng = random.Random(seed)
    words = [a + b + c for a in "bdfg" for b in "aeio" for c in "lmnr"]
    documents = []
    for _ in range(n_documents):
        lines = []
        for _ in range(rng.randint(3, 9)):
            i, line = rng.randrange(64), []
            for _ in range(rng.randint(4, 12)):
                line.append(words[i])
                i = (5 * i + 3) % 64 if rng.random() < 0.9 else rng.randrange(64)
            lines.append(" ".join(line) + ".")
        documents.append("\n".join(lines))
    return documents


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder to work in, with the repository's config files and a small text."""
    keys = dict(vars(train))  # which bench.py and sweep.py set
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "text.txt").write_text("\n\n".join(sentences(400)))
    yield tmp_path
    vars(train).update(keys)


@pytest.fixture
def run(home, monkeypatch, capsys):
    """run("train.py", "--key=value", ...) runs a script in this process and returns (exit message or None, output)."""

    monkeypatch.setattr(hardware, "peak_flops", PEAK)

    def go(script, *args):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", [script, *args])
        capsys.readouterr()
        message = None
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            message = e.code
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
        captured = capsys.readouterr()
        return message, captured.out + captured.err

    return go


@pytest.fixture
def tiny_data(run):
    message, output = run("prepare.py", *TINY)
    assert message is None, message
    return output


def start(script, *args, cwd):
    """The script as a process of its own, for what kills processes."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, ROOT / script, *args], cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)
