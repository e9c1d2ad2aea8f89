"""Tests of tools/inspect_data.py."""

import json
from pathlib import Path

import numpy as np
from conftest import TINY
from test_prepare import bins

from nanocram.rules import RAW_TEXT
from tools.inspect_data import find_sentences


def sentence_in(tokenizer, rows):
    """Return a text that is 16 tokens of a row, and whose tokens are these."""
    for row in rows:
        ids = row[4:20].tolist()
        text = tokenizer.decode(ids)
        if tokenizer.encode(text, add_special_tokens=False).ids == ids:
            return text


def test_rows_and_overlap(run, tiny_data):
    rows, _, meta, tokenizer = bins()
    text = sentence_in(tokenizer, rows)
    for table, name in (("RTE", "dev"), ("CoLA", "train"), ("QNLI", "test")):
        Path("glue", table).mkdir(parents=True, exist_ok=True)
        other = "gol " * 12
        lines = {
            "RTE": f"index\tsentence1\tsentence2\tlabel\n0\t{other}\t{text}\tentailment\n",
            "CoLA": f"gj04\t1\t\t{other}\n",
            # a sentence of QNLI is Wikipedia's; only its questions are looked for
            "QNLI": f"index\tquestion\tsentence\n0\t{other}\t{text}\n",
        }
        Path("glue", table, f"{name}.tsv").write_text(lines[table])
    message, output = run("inspect_data.py", "data/tiny", "--rows=3", "--overlap=glue")
    assert message is None and output.count(f" of {len(rows)}: ") == 3, output
    assert "RTE/dev.tsv: 1 of 1 sentences of 8 tokens or more are in data/tiny" in output
    assert "Raw text, no downstream data: broken" in output

    # meta.json has it, and nothing else has changed; the corpus still trains
    found = json.loads(Path("data/tiny/meta.json").read_text())
    overlap = {"CoLA/train.tsv": [0, 1], "QNLI/test.tsv": [0, 1], "RTE/dev.tsv": [1, 1]}
    assert found == meta | {"overlap": overlap}
    assert run("train.py", *TINY, "--max_steps=1")[0] is None
    rule = json.loads(Path("out/tiny/rules.json").read_text())[RAW_TEXT]
    assert rule["verdict"] == "broken" and "1 of 1 sentences (RTE/dev.tsv)" in rule["did"]
    assert "holds no GLUE" in run("inspect_data.py", "data/tiny", "--overlap=data")[0]


def test_sentences_that_the_end_of_a_row_cuts():
    """Rows of 32 in any order: each part of the sentence is where its row is."""
    rng = np.random.default_rng(0)
    rows = rng.integers(100, 60000, (50, 32)).astype(np.uint16)
    flat = rows.ravel()
    ids = {"whole": flat[70:90].copy(), "next": flat[340:360].copy()}
    # cut after 12, 8 and 10 of 20 tokens; the rows of the two parts do not follow each other
    cuts = [("head", 12, 20, 40), ("tail", 8, 22, 42), ("half", 10, 24, 44)]
    for name, cut, first, second in cuts:
        sentence = rng.integers(100, 60000, 20).astype(np.uint16)
        rows[first, 32 - cut :] = sentence[:cut]
        rows[second, : 20 - cut] = sentence[cut:]
        ids[name] = sentence
    # longer than a row, and 8 tokens that could not be cut in two parts of 8
    ids["long"] = flat[10 * 32 + 5 : 10 * 32 + 75].copy()
    ids["short"] = flat[28:36].copy()
    expected = set(ids)
    # not there: other words, the first 8 tokens alone, and too little at the end of a row
    ids["other"] = rng.integers(100, 60000, 20).astype(np.uint16)
    ids["begins"] = np.concatenate([rows[30, 3:11], ids["other"]])
    ids["little"] = np.concatenate([rows[31, 24:], ids["other"]])
    assert find_sentences(rows, ids) == expected


def test_the_summary_is_that_of_prepare(run, tiny_data):
    message, output = run("inspect_data.py", "data/tiny", "--rows=0")
    assert message is None, message
    lines = [line for line in output.splitlines() if line.startswith("  ")]
    assert len(lines) > 8 and set(lines) <= set(tiny_data.splitlines())
    assert "row 0 of" not in output


def test_a_folder_without_data(run):
    message, _ = run("inspect_data.py", "data/nothing")
    assert message == "inspect_data.py: data/nothing holds no prepared data; run prepare.py first"
