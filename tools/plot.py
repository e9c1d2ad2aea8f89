"""Pictures of runs.

python plot.py out/x [out/y ...] [--x=clock|tokens|progress] [--out=FILE.png]   curves of log.jsonl
python plot.py out/x --card [--out=FILE.png]                     the scorecard of glue.json beside the published rows
python plot.py out/x out/y ... --scaling [--out=FILE.png]        models of several sizes: loss by compute, with a power law

Runs that differ in nothing but the seed share a colour, and their validation losses are drawn as their mean and range.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from scipy.stats import linregress

from checkpoint import add_shares, completed, read_log
from scorecard import DOCS, NINE, PUBLISHED

try:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("plot.py: needs `pip install matplotlib`")

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito: colour-blind safe
PANELS = {
    "loss": "training loss (nats per masked token)",
    "val_loss": "validation loss (nats per masked token)",
    "tokens_per_s": "tokens per second",
    "lr": "learning rate",
    "batch_size": "rows in a batch",
    "grad_norm": "norm of the gradient",
}
X = {
    "clock": ("hours of wall clock", "hours", 1),
    "tokens": ("million tokens seen", "tokens", 1e-6),
    "progress": ("share of the time", "share", 1),
}


def log_of(run):
    path = Path(run) / "log.jsonl"
    if not path.exists():
        sys.exit(f"plot.py: {path} does not exist; name the folder of a run, as in out/demo")
    entries = read_log(path)
    if not entries:
        sys.exit(f"plot.py: {path} is empty: the run has only begun")
    config = path.with_name("config.json")
    add_shares(entries, json.loads(config.read_text()) if config.exists() else {})
    return entries


def comparable(runs):
    """Whether the runs' validation losses measure the same thing: same tokenizer, same val.bin."""
    files = [Path(run) / "config.json" for run in runs]
    configs = [json.loads(file.read_text()) if file.exists() else {"val_sha256": file} for file in files]
    return len({(c.get("tokenizer_sha256"), c.get("val_sha256")) for c in configs}) == 1


def recipes(runs):
    """The runs in lists of those that differ in the seed and in nothing else."""
    found = []  # (config but for the seed, {seed: run})
    for run in runs:
        path = Path(run) / "config.json"
        config = json.loads(path.read_text()) if path.exists() else {"file": str(path)}
        seed, config = config.get("seed"), {**completed(config), "seed": None, "out_dir": None, "resume": None}
        seeds = next((seeds for other, seeds in found if other == config and seed not in seeds), {})
        if not seeds:
            found.append((config, seeds))
        seeds[seed] = run
    return [list(seeds.values()) for _, seeds in found]


def mean_and_range(curves):
    """(xs, mean, lowest, highest) of curves (xs, ys), in straight lines between their points, where all have some; or None."""
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    if low > high:
        return None
    grid = np.unique(np.concatenate([xs for xs, _ in curves]).clip(low, high))
    ys = np.array([np.interp(grid, xs, ys) for xs, ys in curves])
    return grid, ys.mean(0), ys.min(0), ys.max(0)


def draw_curves(runs, x, file):
    logs = {run: log_of(run) for run in runs}
    label, field, factor = X[x]
    if x == "clock" and max(e["hours"] for log in logs.values() for e in log) <= 2:
        label, factor = "minutes of wall clock", 60
    fig, axes = plt.subplots(2, 3, figsize=(14, 7), constrained_layout=True)
    for seeds, color in zip(recipes(runs), COLORS * len(runs)):
        name = Path(seeds[0]).name + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")
        for ax, key in zip(axes.flat, PANELS):
            points = [[(factor * e[field], e[key]) for e in logs[run] if e.get(key) is not None] for run in seeds]
            curves = [np.array(p).T for p in points if p]
            look = {"color": color, "marker": "o" if key == "val_loss" else None, "ms": 4, "lw": 1.3}
            if key == "val_loss" and len(curves) > 1 and (band := mean_and_range(curves)):
                xs, mean, lowest, highest = band
                ax.fill_between(xs, lowest, highest, color=color, alpha=0.25, lw=0)
                ax.plot(xs, mean, color=color, lw=1.3)
                look |= {"ms": 2, "lw": 0}  # their points alone
            for i, (xs, ys) in enumerate(curves):
                ax.plot(xs, ys, label=None if i else name, **look)
    for ax, (key, title) in zip(axes.flat, PANELS.items()):
        ax.set(title=title, xlabel=label)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if key in ("tokens_per_s", "batch_size", "lr"):
            ax.set_ylim(bottom=0)
    axes[1, 2].set_yscale("log")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    if not comparable(runs):
        axes[0, 1].set_title("validation loss: NOT comparable, other tokenizer or val.bin", color="#D55E00")
        print("plot.py: warning: the runs differ in tokenizer or val.bin, so their losses measure different things")
    fig.savefig(file, dpi=120)


def draw_card(run, file):
    path = Path(run) / "glue.json"
    if not path.exists():
        sys.exit(f"plot.py: {path} does not exist; finetune_glue.py writes it")
    card = json.loads(path.read_text())
    found = {t for row in card["rows"].values() for t in row}
    tasks = [t for t in NINE if t in found] or [t for t in DOCS if t in found] or sorted(found)
    bars = {{"run": "pretrained", "scratch": "no pretraining"}.get(k, k): row for k, row in card["rows"].items()}
    partial = any(entry["partial"] for row in card["rows"].values() for entry in row.values())
    published = PUBLISHED if set(tasks) <= set(NINE) else {}
    n, width = len(bars) + len(published), 0.8 / (len(bars) + len(published))
    fig, ax = plt.subplots(figsize=(max(7, 1.6 * len(tasks) + 2), 4.5), constrained_layout=True)
    for i, (name, row) in enumerate(bars.items()):
        at = [j + (i - (n - 1) / 2) * width for j, t in enumerate(tasks) if t in row]
        entries = [row[t] for t in tasks if t in row]
        values, spread = [e["median"] for e in entries], [e["sd"] for e in entries]
        ax.bar(at, values, width, yerr=spread, color=COLORS[i], label=name, error_kw={"lw": 1})
    for i, (name, numbers) in enumerate(published.items(), len(bars)):
        values = dict(zip(NINE, numbers))
        at = [j + (i - (n - 1) / 2) * width for j in range(len(tasks))]
        ax.bar(
            at,
            [values[t] for t in tasks],
            width,
            color="0.75",
            edgecolor="0.3",
            hatch=["", "//", "..", "xx"][i % 4],
            label=name,
        )
    ax.set_xticks(range(len(tasks)), [f"{t}\n{next(r[t]['metric'] for r in bars.values() if t in r)}" for t in tasks])
    note = "; partial data, not comparable with published rows" if partial and published else ""
    ax.set(ylabel="percent", title=f"median and standard deviation over fine-tuning seeds{note}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    fig.savefig(file, dpi=120)


def draw_losses(losses, file):
    """{name: val_loss of each seed}: a dot each; the first one's range, with two seeds or more, as a band behind all."""
    first, *others = losses
    names = [first, *sorted(others, key=lambda name: np.mean(losses[name]))]
    fig, ax = plt.subplots(figsize=(8, 1.2 + 0.3 * len(names)), constrained_layout=True)
    ax.axvspan(min(losses[first]), max(losses[first]), color=COLORS[0], alpha=0.15, lw=0)
    for i, name in enumerate(names):
        ax.plot(losses[name], [i] * len(losses[name]), "o", color=COLORS[name != first], ms=6, alpha=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel="validation loss (nats per masked token); a dot is a pretraining seed")
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(file, dpi=120)


def power_law(points):
    """Fits loss = (c / flops) ** b to those (flops, loss) that no point with less compute undercuts: the envelope.

    Returns (c, b, the envelope). ValueError where that has fewer than three points.
    """
    envelope = []
    for flops, loss in sorted(points):
        if not envelope or loss < envelope[-1][1]:
            envelope.append((flops, loss))
    if len(envelope) < 3:
        raise ValueError("--scaling takes three points on the envelope; evaluate more often, or name more runs")
    fit = linregress(*np.log(envelope).T)
    return math.exp(-fit.intercept / fit.slope), -fit.slope, envelope


def jackknife(runs):
    """Standard error of power_law's b over runs, each a list of points: leaves out one at a time. nan if they are too few.

    The points of one run are not independent, and most are from before its learning rate has come down; runs are.
    """
    if len(runs) < 3:
        return math.nan
    try:
        left = [power_law(sum(runs[:i] + runs[i + 1 :], []))[1] for i in range(len(runs))]
    except ValueError:
        return math.nan
    return math.sqrt((len(left) - 1) * np.var(left))


def draw_scaling(runs, file):
    """val_loss by compute and by the clock, a curve a run, and the power law of the envelope over all."""
    logs = [[e for e in log_of(run) if "flops" in e] for run in runs]
    if not comparable(runs):
        sys.exit("plot.py: --scaling takes runs of one tokenizer and val.bin")
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True, sharey=True)
    styles = ["-", "--", ":"]  # for more runs than colours
    for i, (run, log) in enumerate(zip(runs, logs)):
        look = {"color": COLORS[i % len(COLORS)], "ls": styles[i // len(COLORS) % 3], "marker": "o", "ms": 3, "lw": 1.3}
        for ax, key, unit in zip(axes, ("flops", "hours"), (1, 60)):
            ax.plot([unit * e[key] for e in log], [e["val_loss"] for e in log], label=Path(run).name, **look)
    points = [[(e["flops"], e["val_loss"]) for e in log] for log in logs]
    (c, b, envelope), error = power_law(sum(points, [])), jackknife(points)
    xs = np.geomspace(envelope[0][0], envelope[-1][0])
    axes[0].plot(xs, (c / xs) ** b, color="0.4", lw=3, alpha=0.4, label=f"(C / FLOPs)^b, b = {b:.3f} ± {error:.3f} over runs")
    axes[0].set(xscale="log", yscale="log", xlabel="FLOPs of the model, forward and backward")
    axes[1].set(xlabel="minutes of wall clock")
    axes[0].set_ylabel("validation loss (nats per masked token)")
    for numbers in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        numbers("{x:.1f}")
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    fig.savefig(file, dpi=120)
    print(
        f"loss = (C / FLOPs)^b with C = {c:.3g} and b = {b:.4f} ± {error:.4f} (leaving out one run at a time), "
        f"fitted to the {len(envelope)} points on the envelope"
    )


if __name__ == "__main__":
    runs = [a for a in sys.argv[1:] if not a.startswith("--")]
    options = dict(a[2:].partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
    if not runs or options.keys() - {"out", "x", "card", "scaling"} or options.get("x", "clock") not in X:
        sys.exit(__doc__.strip())
    picture = next((name for name in ("card", "scaling") if name in options), "curves")
    file = options.get("out", str(Path(runs[0]) / f"{picture}.png"))
    try:
        if picture == "card":
            draw_card(runs[0], file)
        elif picture == "scaling":
            draw_scaling(runs, file)
        else:
            draw_curves(runs, options.get("x", "clock"), file)
    except (OSError, ValueError) as e:  # a folder that is not there, a suffix that matplotlib does not know
        sys.exit(f"plot.py: {file}: {e}")
    print(file)
