"""The README's CPU commands, in its order, each made small by overrides."""

import re
import shlex
from pathlib import Path

from conftest import ROOT, TINY_DATA, TINY_MODEL
from test_finetune_glue import glue, write  # noqa: F401

TRAIN = ["--batch_size=8", "--micro_batch_size=4", "--max_steps=3", "--compile=False"]
SMALL = {
    "prepare.py": TINY_DATA[1:],
    "train.py": [*TINY_MODEL, *TRAIN],
    "sweep.py": [*TINY_DATA[1:], *TINY_MODEL, *TRAIN, "--eval_minutes=0.0001", "--seeds=1"],
    "finetune_glue.py": "--glue_dir=glue --glue_seeds=1 --glue_epochs=1 --glue_max_len=64".split(),
}
NEEDED = ["prepare.py", "train.py", "finetune_glue.py", "plot.py", "export_hf.py", "sweep.py"]


def commands():
    """Return [[script, argument, ...], ...] of the indented `python` lines, but those for a GPU."""
    text = (ROOT / "README.md").read_text()
    found = []
    for line in re.findall(r"(?m)^    python (.*)$", text):
        words = shlex.split(line, comments=True)
        if words[0] == "-m":
            words[:2] = [words[1].removeprefix("tools.") + ".py"]
        if not re.search(r"config/(crammed|nanocram)\.py", line):
            found.append(words)
    return found


def test_the_commands_of_the_readme(run, glue, home):  # noqa: F811
    rows = [[f"{w} dem", y] for w, y in (("bal", "spam"), ("fal", "ham"))] * 20
    for file in ("a.tsv", "b.tsv"):
        write(Path(file), ["text", "label"], rows)
    Path("texts").symlink_to(".")
    for script in ("prepare.py", "train.py"):  # as `make demo` does
        assert run(script, "config/demo.py", *SMALL[script])[0] is None
    found = commands()
    assert len(found) >= 12 and {c[0] for c in found} >= set(NEEDED)
    for script, *args in found:
        given = {a.partition("=")[0] for a in args if not a.startswith("--sources")} - {"--seeds"}
        extra = [e for e in SMALL.get(script, []) if e.partition("=")[0] not in given]
        message, output = run(script, *args, *extra)
        assert message is None, f"{script} {args}: {message}"
        assert output.strip()
    assert Path("out/cpu/glue.md").exists() and Path("my_bert/model.safetensors").exists()
