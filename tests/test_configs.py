"""Each config file runs through all three stages, made small by overrides."""

import json
from pathlib import Path

import pytest
from conftest import TINY_DATA, TINY_MODEL
from test_configurator import CONFIGS
from test_finetune_glue import glue  # noqa: F401

SMALL = [
    *TINY_DATA,
    *TINY_MODEL,
    "--batch_size=8",
    "--micro_batch_size=4",
    "--batch_ramp_rows=4",
    "--max_steps=4",
    "--compile=False",
]


# two_lengths.py begins with the weights of a finished run: tests/test_scale.py has it
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "two_lengths.py"])
def test_config(run, glue, name):  # noqa: F811
    tasks = [
        "--tasks=cola,rte",
        "--glue_dir=glue",
        "--glue_seeds=1",
        "--glue_max_len=64",
        "--glue_init=run",
    ]
    for script in ("prepare.py", "train.py", "finetune_glue.py"):
        message, output = run(script, f"config/{name}", *SMALL, *tasks)
        assert message is None, f"{script}: {message}"
    out = Path("out") / name.removesuffix(".py")
    assert json.loads((out / "glue.json").read_text())["rows"]["run"]["rte"]["scores"]
    assert "pretrained" in output
