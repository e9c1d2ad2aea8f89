import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from test_finetune_glue import SMALL, glue, model  # noqa: F401

from nanocram.glue import GLUE, NINE
from nanocram.scorecard import average, with_seed

fine_tuning = pytest.mark.usefixtures("glue", "model")


def test_a_seed_takes_its_place_and_the_last_epoch_counts():
    first = with_seed({}, 0, {"epochs": [10.0, 20.0], "seconds": 1})
    assert first["scores"] == [20.0] and first["median"] == 20.0 and first["sd"] == 0.0
    second = with_seed(first, 1, {"epochs": [50.0, 40.0], "seconds": 2})
    assert second["scores"] == [20.0, 40.0] and second["seconds"] == [1, 2]
    assert second["median"] == 30.0 and second["sd"] == pytest.approx(np.std([20, 40], ddof=1))
    again = with_seed(second, 0, {"epochs": [5.0], "seconds": 3})
    assert again["scores"] == [5.0, 40.0] and again["epochs"] == [[5.0], [50.0, 40.0]]


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
    assert "On partial data" in text and "Rules of cramming: inside all of them." in text


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
    assert message is None and "(in the row run, glue_warmup differ)" in output
