"""Pictures: what they show, by hand, and what they refuse."""

import builtins
import json
import math
from pathlib import Path

import pytest
from conftest import TINY
from scipy.stats import linregress

from nanocram import runs
from nanocram.faults import Fault
from tools import plot

PNG = b"\x89PNG"
ENTRY = {
    "metric": "f1",
    "median": 70.0,
    "sd": 1.0,
    "partial": True,
    "scores": [70.0],
    "epochs": [[70.0]],
    "settings": {},
    "n_train": 10,
    "n_dev": 5,
}


@pytest.fixture
def model(run, tiny_data):
    assert run("train.py", *TINY, "--max_steps=30")[0] is None


def is_png(file):
    return Path(file).read_bytes()[:4] == PNG


def test_pictures(run, model):
    assert run("train.py", *TINY, "--max_steps=10", "--out_dir=out/b")[0] is None

    # curves
    for args, file in [
        (["out/tiny"], "out/tiny/curves.png"),
        (["out/tiny", "out/b", "--x=tokens", "--out=two.png"], "two.png"),
    ]:
        message, output = run("plot.py", *args)
        assert message is None and "NOT" not in output and is_png(file)
    message, output = run("plot.py", "out/tiny", "out/b", "--scaling", "--out=laws.png")
    assert "three points on the envelope" in message
    config = json.loads(Path("out/b/config.json").read_text())
    Path("out/b/config.json").write_text(json.dumps(config | {"val_sha256": "other"}))
    assert "differ in tokenizer or val.bin" in run("plot.py", "out/tiny", "out/b")[1]
    message, _ = run("plot.py", "out/tiny", "out/b", "--scaling")
    assert "runs of one tokenizer and val.bin" in message

    # the scorecard
    card = {"rows": {"run": {"mrpc": ENTRY}, "scratch": {"mrpc": ENTRY}}}
    Path("out/tiny/glue.json").write_text(json.dumps(card))
    message, output = run("plot.py", "out/tiny", "--card")
    assert message is None and is_png("out/tiny/card.png") and "| pretrained | 70.0 |" in output
    assert "finetune_glue.py writes it" in run("plot.py", "out/b", "--card")[0]

    # a run without a config, with a torn log, with an empty one, and none at all
    Path("out/b/config.json").unlink()
    with open("out/b/log.jsonl", "a") as f:
        f.write('{"step": 9, "ho')
    assert run("plot.py", "out/b")[0] is None
    Path("out/b/log.jsonl").write_text("")
    assert "is empty" in run("plot.py", "out/b")[0]
    assert "plot.py: none/x.png" in run("plot.py", "out/tiny", "--out=none/x.png")[0]
    assert "log.jsonl does not exist" in run("plot.py", "out/none")[0]
    message, output = run("plot.py", "out/tiny", "--y=3")
    assert message == 2 and "usage: python -m tools.plot" in output


def test_without_matplotlib_there_is_one_line(run, home, monkeypatch):
    imported = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    Path("log.jsonl").write_text('{"hours": 1.0}\n')
    assert run("plot.py", ".")[0] == "plot.py: needs `pip install matplotlib`"


def test_the_bars_of_a_card_are_its_medians(home):
    """Two tasks and two rows of our own, then the published ones; the second row lacks a task."""
    rows = {"run": {"rte": ENTRY, "mrpc": ENTRY | {"median": 80.0}}, "scratch": {"mrpc": ENTRY}}
    Path("glue.json").write_text(json.dumps({"rows": rows}))
    (axes,) = plot.draw_card(["."], "card.png").axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["rte\nf1", "mrpc\nf1"]
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    heights = [[bar.get_height() for bar in container] for container in bars]
    assert heights[:3] == [[70.0, 80.0], [70.0], [59.2, 89.3]] and len(heights) == 7
    assert bars[1][0].get_center()[0] > 0.5  # the second row's bar stands at the second task
    assert "not comparable" in axes.get_title()


def test_one_card_over_several_runs(run, home):
    """As many rows as there are, with the name of their run, in the picture and in the table."""
    for i in range(9):
        Path(f"out/run{i}").mkdir(parents=True)
        card = {"rows": {"run": {"rte": ENTRY | {"median": 50.0 + i}}}}
        Path(f"out/run{i}/glue.json").write_text(json.dumps(card))
    folders = [f"out/run{i}" for i in range(9)]
    message, output = run("plot.py", *folders, "--card", "--out=card.png")
    assert message is None and is_png("card.png")
    assert all(f"| out/run{i}, pretrained | 5{i}.0 |" in output for i in range(9))
    assert "BERT-base, fully trained" in output and "On partial data" in output
    figure = plot.draw_card(folders, "card.png")
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:9] == [f"out/run{i}, pretrained" for i in range(9)] and len(set(names)) == 14
    Path("out/run3/glue.json").write_text("{")
    message, _ = run("plot.py", *folders, "--card")
    assert message.startswith("plot.py: out/run3/glue.json is damaged") and "\n" not in message


def test_a_damaged_log_is_told(run, model):
    path = Path("out/tiny/log.jsonl")
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"\xff\x00{", b"[1]", *lines[1:], b'{"step": 9']))
    message, output = run("plot.py", "out/tiny")
    assert message is None and "log.jsonl has 2 damaged lines, the first is line 2" in output


def test_seeds_of_one_recipe_become_a_mean_and_a_range(home):
    """The range by hand: lines from (0, 4) to (2, 2) and from (1, 5) to (3, 3), together 1 to 2."""
    found = plot.mean_and_range([([0, 2], [4, 2]), ([1, 3], [5, 3])])
    assert [list(x) for x in found] == [[1, 2], [4, 3], [3, 2], [5, 4]]
    assert plot.mean_and_range([([3], [4.0]), ([1, 2], [8.0, 7.0])]) is None

    # two seeds of one recipe, another recipe, a run without a config, and the first run once more,
    # which is not another seed; the second seed's code was younger and knew a key more
    settings = [{"seed": 1, "n_layer": 2}, {"seed": 1, "n_layer": 3}, {"seed": 2, "n_layer": 2}]
    settings[2] |= {"qk_norm": False, "resume": "never"}
    settings += [None, settings[0]]
    for i, config in enumerate(settings):
        Path(f"run{i}").mkdir()
        if config:
            config = config | {"out_dir": f"run{i}", "max_steps": 8}
            Path(f"run{i}/config.json").write_text(json.dumps(config))
        entries = [{"progress": 0.1, "tokens": 1, "hours": 1, "loss": 7.0}]
        # half of the steps of a growing batch are a quarter of the tokens
        for progress, tokens, loss in (0.5, 25, 5 + i), (1.0, 100, 4 + i):
            entry = {"progress": progress, "tokens": tokens, "hours": 1, "val_loss": loss}
            entries.append(entry)
        Path(f"run{i}/log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))

    folders = [f"run{i}" for i in range(5)]
    groups = [["run0", "run2"], ["run1"], ["run3"], ["run4"]]
    assert plot.group_by_recipe(folders) == groups
    figure = plot.draw_curves(folders[:3], "progress", "seeds.png")
    _, validation, *_ = figure.axes
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["run0, 2 seeds", "run1"]
    (band,) = validation.collections
    assert band.get_datalim(validation.transData).extents.tolist() == [0.25, 4, 1, 7]
    mean, *points = validation.lines
    assert mean.get_xydata().tolist() == [[0.25, 6], [1, 5]]
    assert points[1].get_xydata().tolist() == [[0.25, 7], [1, 6]]
    assert validation.get_xlabel() == "fraction of the time"


def test_the_fraction_of_the_time_is_that_of_the_tokens_if_steps_are_counted():
    """A batch that grows: half of the steps are a quarter of the tokens."""
    entries = [
        {"hours": 1.0, "resumed": True},
        {"progress": 0.5, "tokens": 25},
        {"progress": 1.0, "tokens": 100},
    ]
    cases = (({"max_steps": 10}, [None, 0.25, 1.0]), ({"max_steps": 0}, [None, 0.5, 1.0]))
    for config, expected in cases:
        runs.add_time_fraction(entries, config)
        assert [entry["time_fraction"] for entry in entries] == expected
    runs.add_time_fraction(entries[:2], {"max_steps": 10})  # not yet finished
    assert entries[1]["time_fraction"] == 0.5


# --------------------------------------------------------------------------------------------------
# Scaling


def test_the_power_law_is_found_again():
    """Points on 5 (1e12 / C)^0.1 and others above it, which are not on the envelope."""
    law = [(c, 5 * (1e12 / c) ** 0.1) for c in (1e12, 1e13, 1e14, 1e15)]
    above = [(c * 2, loss + 0.5) for c, loss in law]
    c, b, envelope = plot.power_law(law + above)
    assert envelope == law and math.isclose(b, 0.1) and math.isclose((c / 1e14) ** b, law[2][1])
    assert math.isnan(plot.jackknife([law[:1], law[1:2], law[2:3]]))  # any two have no law
    assert plot.jackknife([law, above, law]) < 1e-9 and math.isnan(plot.jackknife([law, above]))
    with pytest.raises(Fault, match="three points on the envelope"):
        plot.power_law(law[:2] + [(c, 9.0) for c, _ in law])


def test_the_error_of_the_power_law_is_the_jackknifes():
    """Three runs, all of whose points are on the envelope, by the formula."""
    runs = [
        [(1e12, 5.0), (2e12, 4.8)],
        [(4e12, 4.5), (8e12, 4.1)],
        [(1.6e13, 3.9), (3.2e13, 3.5)],
    ]
    slopes = []
    for i in range(3):
        points = [p for j, run in enumerate(runs) if j != i for p in run]
        log_flops = [math.log(c) for c, _ in points]
        log_losses = [math.log(loss) for _, loss in points]
        slopes.append(-linregress(log_flops, log_losses).slope)
    # (n - 1) / n times the sum of squares
    expected = math.sqrt(2 / 3 * sum((b - sum(slopes) / 3) ** 2 for b in slopes))
    assert math.isclose(plot.jackknife(runs), expected)
