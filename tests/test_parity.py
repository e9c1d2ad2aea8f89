"""Each fast path against the plain one, on real text (the docs corpus): minutes, so only `make
slow` runs it.
"""

import numpy as np
import pytest
from test_train import log

PATHS = {
    "plain": ["--dtype=float32", "--compile=False"],
    "compiled": ["--dtype=float32", "--compile=True"],
    "bf16": ["--dtype=bfloat16", "--compile=False"],
    "bf16_compiled": ["--dtype=bfloat16", "--compile=True"],
    "micro_batches": ["--dtype=bfloat16", "--compile=True", "--micro_batch_size=4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("position", ["rotary", "scaled_sinusoidal"])
def test_every_fast_path_gives_the_plain_curve(run, home, position):
    """200 steps: the means of the losses of each 20 differ by less than 0.02 nats, far less than
    they fall.
    """
    assert run("prepare.py", "config/demo.py")[0] is None
    curves = {}
    for name, changes in PATHS.items():
        args = [
            "--max_steps=200",
            "--batch_size=16",
            "--micro_batch_size=16",
            f"--position={position}",
            "--log_seconds=0",
        ]
        message, output = run(
            "train.py", "config/demo.py", f"--out_dir=out/{name}", *args, *changes
        )
        assert message is None and "warning" not in output, output
        curves[name] = np.array([e["loss"] for e in log(name)]).reshape(-1, 20).mean(1)
    for name, curve in curves.items():
        worst = np.abs(curve - curves["plain"]).max()
        print(
            f"{position}, {name}: {curve[0]:.3f} -> {curve[-1]:.3f}, at most {worst:.4f} from plain"
        )
        assert worst < 0.02 and curve[-1] < curve[0] - 0.5
