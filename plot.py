"""Pictures of runs: python plot.py out/cpu [out/other ...] [--out=FILE.png]

Loss, validation loss, learning rate and tokens/s of one or several runs against minutes of wall clock, from log.jsonl.
"""

import json
import sys
from pathlib import Path

try:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("plot.py: needs `pip install matplotlib`")

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito: colour-blind safe


def read_log(run):
    path = Path(run) / "log.jsonl"
    if not path.exists():
        sys.exit(f"plot.py: {path} does not exist; name the folder of a run, as in out/demo")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [e for e in entries if "loss" in e], [e for e in entries if "val_loss" in e]


def comparable(runs):
    """Whether the runs' validation losses measure the same thing: same tokenizer, same val.bin."""
    configs = [json.loads((Path(run) / "config.json").read_text()) for run in runs]
    return len({(c.get("tokenizer_sha256"), c.get("val_sha256")) for c in configs}) == 1


def draw(runs, file):
    fig, axes = plt.subplots(2, 2, sharex=True, figsize=(11, 7), constrained_layout=True)
    panels = [("loss", "training loss (nats per masked token)"), ("val_loss", "validation loss (nats per masked token)")]
    panels += [("lr", "learning rate"), ("tokens_per_s", "tokens per second")]
    for run, color in zip(runs, COLORS * len(runs)):
        train, val = read_log(run)
        for ax, (key, _) in zip(axes.flat, panels):
            entries = val if key == "val_loss" else train
            marker = "o" if key == "val_loss" else None
            label = Path(run).name
            ax.plot(
                [60 * e["hours"] for e in entries], [e[key] for e in entries], color=color, marker=marker, ms=4, label=label
            )
    for ax, (_, title) in zip(axes.flat, panels):
        ax.set(title=title, xlabel="minutes of wall clock")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1, 1].set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False)
    if not comparable(runs):
        axes[0, 1].set_title("validation loss: NOT comparable, other tokenizer or val.bin", color="#D55E00")
        print("plot.py: warning: the runs differ in tokenizer or val.bin, so their losses measure different things")
    fig.savefig(file, dpi=120)
    print(file)


if __name__ == "__main__":
    runs = [a for a in sys.argv[1:] if not a.startswith("--")]
    options = dict(a[2:].partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
    if not runs or options.keys() - {"out"}:
        sys.exit(__doc__.strip())
    draw(runs, options.get("out", str(Path(runs[0]) / "curves.png")))
