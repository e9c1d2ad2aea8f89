import io
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, command
from tokenizers import Tokenizer

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
    ids = torch.tensor(
        [tokenizer.encode("bal", add_special_tokens=False).ids + [4]]
    )  # before the first mask
    full = [*ids[0].tolist(), *tokenizer.encode("fal", add_special_tokens=False).ids, 4]
    full += [*tokenizer.encode(".", add_special_tokens=False).ids, 3]
    p = bert.logits(bert.encode(torch.tensor([full])))[0].softmax(-1)
    expected = []
    for at in (i for i, t in enumerate(full) if t == 4):
        best = p[at].topk(3)
        expected.append(
            ", ".join(
                f"{tokenizer.id_to_token(int(i))} {x:.1%}"
                for i, x in zip(best.indices, best.values)
            )
        )
    assert output.splitlines() == expected


def test_texts_from_stdin_and_mistakes(run, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("bal <mask>\n\ndem <mask> fal\n"))
    message, output = run("fill_mask.py", "out/tiny")
    assert message is None and len(output.splitlines()) == 2
    assert "the text has no <mask>: 'bal'" in run("fill_mask.py", "out/tiny", "bal")[0]
    assert "more than max_len = 64" in run("fill_mask.py", "out/tiny", "<mask> " + "bal " * 99)[0]
    assert "does not exist" in run("fill_mask.py", "out/none", "bal <mask>")[0]
    message, output = run("fill_mask.py", "out/tiny", "bal <mask>", "--top=0")
    assert message == 2 and "python -m tools.fill_mask" in output and "--top" in output
    args = command("fill_mask.py", "out/tiny", "--interactive")
    said = "bal\nbal <mask>\n\n"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(args, input=said, capture_output=True, text=True, env=env)
    assert process.returncode == 0 and "has no <mask>" in process.stdout
    assert process.stdout.count("%") == 5
