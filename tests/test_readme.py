"""The README's CPU commands, in its order, each made small by overrides."""

import re
import shlex
from pathlib import Path

from conftest import ROOT, TINY_DATA, TINY_MODEL
from test_finetune_glue import glue, write  # noqa: F401

SMALL = {
    "prepare.py": [*TINY_DATA[1:]],
    "train.py": [*TINY_MODEL, "--batch_size=8", "--micro_batch_size=4", "--max_steps=3", "--compile=False"],
    "sweep.py": [*TINY_DATA[1:], *TINY_MODEL, "--max_steps=3", "--eval_minutes=0.0001", "--compile=False", "--seeds=1"],
    "finetune_glue.py": ["--glue_dir=glue", "--glue_seeds=1", "--glue_epochs=1", "--glue_max_len=64"],
}


def commands():
    """[[script, argument, ...], ...] of all indented lines that begin with `python`, but those for a GPU."""
    lines = re.findall(r"(?m)^    python (\w+\.py .*)$", (ROOT / "README.md").read_text())
    return [shlex.split(line, comments=True) for line in lines if not re.search("(crammed|nanocram).py", line)]


def test_the_commands_of_the_readme(run, glue, home):  # noqa: F811
    rows = [[f"{w} dem", y] for w, y in (("bal", "spam"), ("fal", "ham"))] * 20
    for file in ("a.tsv", "b.tsv"):
        write(Path(file), ["text", "label"], rows)
    Path("texts").symlink_to(".")
    for script in ("prepare.py", "train.py"):  # as `make demo` does
        assert run(script, "config/demo.py", *SMALL[script])[0] is None
    found = commands()
    assert len(found) >= 12 and {c[0] for c in found} >= {
        "prepare.py",
        "train.py",
        "finetune_glue.py",
        "plot.py",
        "export_hf.py",
        "sweep.py",
    }
    for script, *args in found:
        extra = SMALL.get(script, [])
        given = {a.partition("=")[0] for a in args if not a.startswith("--sources")} - {"--seeds"}
        message, output = run(script, *args, *(e for e in extra if e.partition("=")[0] not in given))
        assert message is None, f"{script} {args}: {message}"
        assert output.strip()
    assert Path("out/cpu/glue.md").exists() and Path("my_bert/model.safetensors").exists()
