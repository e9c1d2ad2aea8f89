"""tools/fill_page.py: what it writes into a page, and what it leaves alone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from nanocram.configurator import resolve
from nanocram.faults import Fault
from tools import fill_page, sweep

PAGE = """# A page

## Baseline

| row | n | val_loss |
|---|---|---|
| `crammed` | not run yet | |

## Which positions?

| row | n | val_loss | difference | speed | cola | the paper | here |
|---|---|---|---|---|---|---|---|
| rotary (`crammed`) | not run yet | | | | | the recipe | |
| none (`no_positions`) | not run yet | | | | | worse | agrees |
| learned (`learned_positions`) | not run yet | | | | | a \u2212 b | |
| other words (`vocab_half`) | not run yet | | | | | ? | |
| more time (`long/crammed`) | not run yet | | | | | | |

| other | n |
|---|---|
| `crammed` | by hand |

Words by hand.
"""


def write_run(name, seed, loss, score=None, tokenizer="one"):
    folder = Path(f"results/{name}-{seed}")
    folder.mkdir(parents=True)
    config = {"n_layer": 2, "n_embd": 32, "val_sha256": "x", "tokenizer_sha256": tokenizer}
    (folder / "config.json").write_text(json.dumps(config))
    log = [
        {"step": 1, "hours": 0.1, "tokens_per_s": 9.0, "epoch": 0.1},
        {
            "step": 9,
            "hours": 0.9,
            "tokens": 9,
            "progress": 1,
            "val_loss": loss,
            "val_loss_se": 0.03,
        },
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    if score:
        scores = {"rows": {"run": {"cola": {"median": score}}}}
        (folder / "glue.json").write_text(json.dumps(scores))


def test_a_page_gets_its_numbers_and_keeps_its_words(home):
    """The interval is that of one run against the mean of four, with the spread of the four."""
    baseline = [4.31, 4.346, 4.348, 4.36]
    for i, loss in enumerate(baseline):
        write_run("crammed", 1337 + i, loss, score=20.0 + i if i < 2 else None)
    write_run("no_positions", 1337, 5.0)
    write_run("vocab_half", 1337, 3.0, tokenizer="other")
    write_run("long/crammed", 1337, 4.0)
    Path("results/speeds.json").write_text('{"crammed": [1.0, "a"], "no_positions": [1.25, "b"]}')
    page = Path("results/README.md")
    page.write_text(PAGE)
    fill_page.main([str(page)])
    lines = page.read_text().splitlines()

    # means, spreads and differences
    mean, s = np.mean(baseline), np.std(baseline, ddof=1)
    half = stats.t(3).ppf(0.975) * s * np.sqrt(1 + 1 / 4)
    assert f"| `crammed` | 4 | {mean:.3f} ± {s:.3f} |" in lines
    start = f"| rotary (`crammed`) | 4 | {mean:.3f} ± {s:.3f} |  | 1.00 | 20.5 ± 0.7 (n = 2) |"
    assert f"{start} the recipe |  |" in lines
    gap = f"{5 - mean:+.3f} [{5 - mean - half:+.3f}, {5 - mean + half:+.3f}]"
    row = f"| none (`no_positions`) | 1 | 5.000 ± 0.030 s.e. | {gap} | 1.25 |  | worse | agrees |"
    assert row in lines
    assert any(
        line.startswith("| more time (`long/crammed`) | 1 | 4.000 ± 0.030") for line in lines
    )
    assert "| other words (`vocab_half`) | 1 | (3.000 ± 0.030 s.e.) |  |  |  | ? |  |" in lines

    # what has no runs, and what is by hand, stays; the figure is linked once
    old = PAGE.splitlines()
    for line in (old[14], *old[18:]):
        assert line in lines
    assert Path("results/which_positions.png").read_bytes()[:4] == b"\x89PNG"
    assert not Path("results/baseline.png").exists()
    assert lines.count("![Which positions?](which_positions.png)") == 1
    text = page.read_text()
    fill_page.main([str(page)])
    assert page.read_text() == text


def test_mistakes_in_a_page(home):
    with pytest.raises(Fault, match="x.md does not exist"):
        fill_page.main(["x.md"])
    Path("x.md").write_text("| row | n |\n|---|---|\n| crammed | |\n")
    with pytest.raises(Fault, match="'crammed' names no entry in backticks"):
        fill_page.main(["x.md"])
    table = "| row | n |\n|---|---|\n| `crammed` | |\n\n"
    Path("x.md").write_text("## One\n" + 2 * table)
    with pytest.raises(Fault, match="two tables stand under the heading 'One'"):
        fill_page.main(["x.md"])


def test_every_row_of_the_page_of_the_study_can_be_run(monkeypatch, read_once):
    """Its names are recipes or entries of config/ablations.py, after the folder of the runs."""
    monkeypatch.chdir(ROOT)
    page = Path("results/study/README.md")
    if not page.exists():
        pytest.skip("there are no results")
    names = re.findall(r"^\| [^|]*`(.+?)`[^|]* \|", page.read_text(), re.M)
    assert len(names) > 70
    for name in set(names):
        entry = name.rpartition("/")[2]
        resolve("train.py", sweep.stage_words(entry, ["--scale=cpu"]))
