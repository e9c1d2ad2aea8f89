import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY
from test_finetune_glue import SMALL, glue, model  # noqa: F401

from nanocram.glue import GLUE, NINE
from nanocram.scorecard import PUBLISHED, average, table, with_seed

fine_tuning = pytest.mark.usefixtures("glue", "model")


def test_a_seed_takes_its_place_and_the_last_epoch_counts():
    first = with_seed({}, 0, {"epochs": [10.0, 20.0], "seconds": 1})
    assert first["scores"] == [20.0] and first["median"] == 20.0 and first["sd"] == 0.0
    second = with_seed(first, 1, {"epochs": [50.0, 40.0], "seconds": 2})
    assert second["scores"] == [20.0, 40.0] and second["seconds"] == [1, 2]
    assert second["median"] == 30.0 and second["sd"] == pytest.approx(np.std([20, 40], ddof=1))
    again = with_seed(second, 0, {"epochs": [5.0], "seconds": 3})
    assert again["scores"] == [5.0, 40.0] and again["epochs"] == [[5.0], [50.0, 40.0]]


def test_seeds_may_come_in_any_order():
    later = with_seed({}, 3, {"epochs": [10.0], "seconds": 1, "accuracy": 7.0})
    both = with_seed(later, 1, {"epochs": [30.0], "seconds": 2, "accuracy": 8.0})
    assert both["seeds"] == [1, 3] and both["scores"] == [30.0, 10.0]
    # an old entry has no seeds, and lacks what was not measured then
    old = {"scores": [1.0, 2.0], "epochs": [[1.0], [2.0]], "seconds": [1, 1]}
    more = with_seed(old, 2, {"epochs": [3.0], "seconds": 1, "accuracy": 9.0})
    assert more["seeds"] == [0, 1, 2] and more["scores"] == [1.0, 2.0, 3.0]
    assert more["accuracy"] == [None, None, 9.0]


WRITER = """
import sys
from pathlib import Path
from nanocram.scorecard import open_card, with_seed
for seed in range(int(sys.argv[1]), 60, 2):
    with open_card(Path("."), {"rows": {}}) as card:
        row = card["rows"].setdefault("run", {})
        settings = {"glue_epochs": 1}
        old = row.get("rte", {"metric": "accuracy", "partial": False, "settings": settings})
        row["rte"] = old | with_seed(old, seed, {"epochs": [float(seed)], "seconds": 1})
"""


def test_two_processes_lose_no_score(tmp_path):
    """Each adds 30 seeds to the same task, at the same time."""
    command = [sys.executable, "-c", WRITER]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([*command, str(i)], cwd=tmp_path, env=env) for i in (0, 1)]
    assert [process.wait() for process in both] == [0, 0]
    entry = json.loads((tmp_path / "glue.json").read_text())["rows"]["run"]["rte"]
    assert entry["seeds"] == list(range(60)) and entry["scores"] == [float(i) for i in range(60)]


def test_published_averages():
    """Each published row that has all nine numbers has the average that the paper states."""
    stated = {"BERT-base, fully": 80.9, "BERT-base, no": 45.5, "crammed, A6000, first": 78.6}
    stated |= {"crammed, best": 80.7}
    for title, expected in stated.items():
        (row,) = [scores for name, scores in PUBLISHED.items() if name.startswith(title)]
        assert average(row, NINE) == pytest.approx(expected, abs=0.06), title
    everything = {task: entry_of(50.0) for task in NINE}
    lines = table("GLUE", NINE, {"ours": everything}, PUBLISHED)
    ends = {line.split(" | ")[0].strip("| "): line.split(" | ")[-2:] for line in lines[2:-1]}
    assert ends["crammed, A6000, 13 exaFLOP [icml]"] == ["80.4", " |"]
    assert ends["crammed, rerun, 2080 Ti, 5 exaFLOP [he]"] == ["78.9 ± 0.7", " |"]
    assert ends["crammed, rerun, A6000, 13 exaFLOP [ufb]"] == ["", "83.6 |"]
    # for one task, rows that lack it are left out
    lines = table("GLUE", ["mnli"], {"ours": everything}, PUBLISHED)
    assert not any("icml" in line or "[he]" in line for line in lines)


def entry_of(score):
    return {"median": score, "sd": 0.0, "scores": [score], "metric": "accuracy", "partial": False}


def test_an_average_needs_all_tasks():
    assert average({"rte": 50.0, "cola": 10.0, "mrpc": 0.0}, ["rte", "cola"]) == 30.0
    assert average({"rte": 50.0}, ["rte", "cola"]) is None


@fine_tuning
def test_all_tasks_make_a_card_with_the_average(run):
    everything = "--tasks=" + ",".join(GLUE)
    for init in ("scratch", "run"):
        message, output = run(
            "finetune_glue.py", *TINY, *SMALL, everything, f"--glue_init={init}", "--glue_seeds=1"
        )
        assert message is None, message
    card = json.loads(Path("out/tiny/glue.json").read_text())
    assert set(card["rows"]) == {"run", "scratch"} and set(card["rows"]["run"]) == {*NINE, "wnli"}
    expected = np.mean([card["rows"]["run"][t]["median"] for t in NINE])
    assert card["average"]["run"] == pytest.approx(expected)
    assert card["average_without_cola"]["run"] == pytest.approx(
        np.mean([card["rows"]["run"][t]["median"] for t in NINE[:-1]])
    )
    text = Path("out/tiny/glue.md").read_text()
    assert (
        "| pretrained |" in text
        and "| no pretraining |" in text
        and "without CoLA" in text
        and text in output
    )
    assert "On partial data" in text and "1 a masked language model from scratch: kept" in text
    assert "3 raw text, no downstream data: not checked" in text and "Inside" not in text
    # F1 has accuracy next to it; the constant answer of regression has no correlation
    assert re.search(r"\| pretrained \|.* \d+\.\d / \d+\.\d \|", text)
    assert re.search(r"\| a constant answer \| \d.* \|", text)
    assert card["rows"]["run"]["stsb"]["constant"] == 0.0


@fine_tuning
def test_no_average_unless_all_nine_are_there(run):
    run("finetune_glue.py", *TINY, *SMALL, "--tasks=cola,rte")
    card = json.loads(Path("out/tiny/glue.json").read_text())
    text = Path("out/tiny/glue.md").read_text()
    assert (
        card["average"] == {"run": None} and "mean of these 2" in text and "average |" not in text
    )
    entry = card["rows"]["run"]["rte"]
    assert entry["metric"] == "accuracy" and len(entry["scores"]) == 2 and entry["n_train"] == 48
    assert entry["median"] == pytest.approx(np.median(entry["scores"])) and entry[
        "sd"
    ] == pytest.approx(np.std(entry["scores"], ddof=1))


@fine_tuning
def test_the_card_sets_published_rows_beneath(run):
    _, output = run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte,cola", "--glue_seeds=1")
    assert (
        "| BERT-base, fully trained [paper] | 59.2 | 56.5 | 57.9 | 59.2 |" in output
    )  # mean 57.85 of these two
    assert "not comparable with published scores" in output


@fine_tuning
def test_a_score_of_other_settings_is_named_on_the_card(run):
    """Also if one of the scores is from a version of the script without the setting."""
    run("finetune_glue.py", *TINY, *SMALL, "--tasks=cola", "--glue_seeds=1")
    card = json.loads(Path("out/tiny/glue.json").read_text())
    del card["rows"]["run"]["cola"]["settings"]["glue_warmup"]
    Path("out/tiny/glue.json").write_text(json.dumps(card))
    message, output = run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte", "--glue_seeds=1")
    assert message is None and "in the row run, glue_warmup differ" in output
