"""Draw pictures of runs.

python -m tools.plot out/x [out/y ...]            the curves of log.jsonl
python -m tools.plot out/x [out/y ...] --card     the scores of glue.json, next to published ones
python -m tools.plot out/x out/y ... --scaling    loss by compute for models of several sizes

Runs that differ in nothing but the seed share a colour. Their validation losses are drawn as their
mean and range.
"""

import argparse
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import linregress

from nanocram.configurator import ROOT
from nanocram.docs_corpus import TASKS
from nanocram.faults import Fault, read_json, run_script
from nanocram.glue import NINE
from nanocram.runs import add_time_fraction, fill_in_defaults, read_log
from nanocram.scorecard import PUBLISHED, TITLES, read_card, tables, warnings

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LOSS = "validation loss (nats per masked token)"
PANELS = {  # keys of log.jsonl: titles
    "loss": "training loss (nats per masked token)",
    "val_loss": LOSS,
    "tokens_per_s": "tokens per second",
    "lr": "learning rate",
    "batch_size": "rows in a batch",
    "grad_norm": "norm of the gradient",
}
FROM_ZERO = ("tokens_per_s", "batch_size", "lr")  # panels whose axis begins at 0

HATCHES = ["", "//", "..", "xx"]  # of grey bars
# a colour per line, then another line style for more lines than colours
LINES = [
    {"ls": style, "color": color} for style, color in itertools.product(["-", "--", ":"], COLORS)
]


@dataclass
class Axis:
    """A horizontal axis: its label, the key of log.jsonl, and the factor to the label's unit."""

    label: str
    key: str
    factor: float


X = {
    "clock": Axis("hours of wall clock", "hours", 1),
    "tokens": Axis("million tokens seen", "tokens", 1e-6),
    "progress": Axis("fraction of the time", "time_fraction", 1),
}


# --------------------------------------------------------------------------------------------------
# Figures


def new_figure(width, height):
    """Return an empty figure of that size in inches. It needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise Fault("needs `pip install matplotlib`") from e
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, file):
    """Write a figure. Raise Fault if the folder is missing or the suffix is unknown."""
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as e:
        raise Fault(f"{file} cannot be written: {e}") from e


def clean(axes, grid="both"):
    """Remove the frame's upper and right line, and draw a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)


# --------------------------------------------------------------------------------------------------
# Runs


def config_of(run):
    """Return the config of a run, or None if it has none."""
    path = Path(run) / "config.json"
    return read_json(path) if path.exists() else None


def entries_of(run):
    """Return the entries of a run's log, each with its `time_fraction`."""
    path = Path(run) / "log.jsonl"
    if not path.exists():
        raise Fault(f"{path} does not exist; name the folder of a run, such as out/demo")
    entries = read_log(path)
    if not entries:
        raise Fault(f"{path} is empty: the run has only begun")
    add_time_fraction(entries, config_of(run) or {})
    return entries


def have_one_validation(runs):
    """Return whether the validation losses of runs compare: one tokenizer and one val.bin."""
    files = set()
    for run in runs:
        config = config_of(run)
        if config is None:
            files.add(str(run))
        else:
            files.add((config.get("tokenizer_sha256"), config.get("val_sha256")))
    return len(files) == 1


def group_by_recipe(runs):
    """Return lists of the runs that differ in the seed and in nothing else."""
    groups = []  # [(config without what may differ, {seed: run})]
    for run in runs:
        config = config_of(run)
        if config is None:
            config = {"run": str(run)}
        seed = config.get("seed")
        recipe = fill_in_defaults(config, ROOT / "train.py")
        recipe |= {"seed": None, "out_dir": None, "resume": None}

        # join the first group of this recipe that lacks the seed, or begin one
        for other, seeds in groups:
            if other == recipe and seed not in seeds:
                seeds[seed] = run
                break
        else:
            groups.append((recipe, {seed: run}))
    return [list(seeds.values()) for _, seeds in groups]


# --------------------------------------------------------------------------------------------------
# Curves


def mean_and_range(curves):
    """Return (xs, mean, lowest, highest) of curves [(xs, ys)], or None if they do not overlap.

    Curves are straight lines between their points. The result covers the xs that all of them have.
    """
    low = max(xs[0] for xs, _ in curves)
    high = min(xs[-1] for xs, _ in curves)
    if low > high:
        return None
    every_x = np.concatenate([xs for xs, _ in curves])
    grid = np.unique(every_x.clip(low, high))
    every_y = np.array([np.interp(grid, xs, ys) for xs, ys in curves])
    return grid, every_y.mean(0), every_y.min(0), every_y.max(0)


def curve_of(entries, key, x):
    """Return (xs, ys) of one key of a log, as an array of shape (2, points)."""
    points = []
    for entry in entries:
        if entry.get(key) is not None:
            point = (x.factor * entry[x.key], entry[key])
            points.append(point)
    return np.array(points).T


def draw_seeds(axes, key, curves, line, name):
    """Draw one quantity of the runs of one recipe, a curve (xs, ys) per seed."""
    style = line | {"lw": 1.3, "ms": 4}
    if key == "val_loss":
        style["marker"] = "o"

    # validation losses of several seeds: a line for the mean, a band for the range
    band = None
    if key == "val_loss" and len(curves) > 1:
        band = mean_and_range(curves)
    if band:
        xs, mean, lowest, highest = band
        faint = {"color": line["color"], "alpha": 0.25, "lw": 0}
        axes.fill_between(xs, lowest, highest, **faint)
        axes.plot(xs, mean, lw=1.3, **line)
        style |= {"ms": 2, "lw": 0}

    # only the first seed is named in the legend
    for i, (xs, ys) in enumerate(curves):
        axes.plot(xs, ys, label=None if i else name, **style)


def x_axis(name, logs):
    """Return the axis of that name; the clock shows minutes if no run takes over two hours."""
    if name == "clock":
        longest = max(entries[-1]["hours"] for entries in logs)
        if longest <= 2:
            return Axis("minutes of wall clock", "hours", 60)
    return X[name]


def draw_curves(runs, x_name, file):
    """Draw the six quantities of PANELS by the clock, tokens or progress. Return the figure."""
    logs = {run: entries_of(run) for run in runs}
    x = x_axis(x_name, logs.values())
    figure = new_figure(14, 7)
    grid = figure.subplots(2, 3)
    panels = dict(zip(PANELS, grid.flat))

    # a line per recipe
    for i, seeds in enumerate(group_by_recipe(runs)):
        line = LINES[i % len(LINES)]
        name = Path(seeds[0]).name
        if len(seeds) > 1:
            # a sweep names its runs recipe-seed
            name = re.sub(r"-\d+$", "", name)
            name = f"{name}, {len(seeds)} seeds"
        for key, axes in panels.items():
            curves = [curve_of(logs[run], key, x) for run in seeds]
            curves = [curve for curve in curves if curve.size]
            draw_seeds(axes, key, curves, line, name)

    # titles and axes
    for key, axes in panels.items():
        axes.set(title=PANELS[key], xlabel=x.label)
        clean(axes)
        if key in FROM_ZERO:
            axes.set_ylim(bottom=0)
    panels["grad_norm"].set_yscale("log")
    handles, labels = panels["loss"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)

    # a warning where a reader would compare what does not compare
    if not have_one_validation(runs):
        title = "validation loss: NOT comparable, other tokenizer or val.bin"
        panels["val_loss"].set_title(title, color="red")
        print("warning: the runs differ in tokenizer or val.bin: their losses do not compare")
    save(figure, file)
    return figure


def draw_losses(losses, file):
    """Draw {name: [val_loss of each seed]} as dots, with the range of the first entry as a band."""
    # the first entry on top, then the others from best to worst
    first, *others = losses
    means = {name: np.mean(losses[name]) for name in others}
    names = [first, *sorted(others, key=means.get)]
    figure = new_figure(8, 1.2 + 0.3 * len(names))
    axes = figure.subplots()

    # the range of the first one, behind all of them
    faint = {"color": COLORS[0], "alpha": 0.15, "lw": 0}
    axes.axvspan(min(losses[first]), max(losses[first]), **faint)
    for i, name in enumerate(names):
        color = COLORS[0] if name == first else COLORS[1]
        heights = np.full(len(losses[name]), i)
        axes.plot(losses[name], heights, "o", color=color, ms=6, alpha=0.8)

    # names downwards
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"{LOSS}; a dot is a pretraining seed")
    clean(axes, grid="x")
    save(figure, file)
    return figure


# --------------------------------------------------------------------------------------------------
# The scorecard


def card_tasks(rows):
    """Return the tasks to draw: those of GLUE's average, else the offline ones, else all."""
    found = set()
    for row in rows.values():
        found |= row.keys()
    for names in (NINE, TASKS):
        if chosen := [task for task in names if task in found]:
            return chosen
    return sorted(found)


def rows_of_cards(runs):
    """Return {title: row} of the cards of one or more runs. A row is {task: entry}."""
    rows = {}
    for run in runs:
        if not (Path(run) / "glue.json").exists():
            raise Fault(f"{run}/glue.json does not exist; finetune_glue.py writes it")
        for init, row in read_card(Path(run))["rows"].items():
            title = TITLES.get(init, init)
            if len(runs) > 1:
                title = f"{run}, {title}"
            rows[title] = row
    return rows


def draw_card(runs, file):
    """Draw the medians in the cards of runs, and published ones if all tasks are GLUE's.

    Print the same as tables.
    """
    rows = rows_of_cards(runs)
    print("\n".join([*tables(rows), *warnings(rows)]))
    tasks = card_tasks(rows)
    published = {}
    for title, scores in PUBLISHED.items():
        if set(tasks) <= scores.keys():
            published[title] = scores

    # a group of bars per task, which leaves a fifth of the space between groups
    n_bars = len(rows) + len(published)
    width = 0.8 / n_bars
    centre = (n_bars - 1) / 2
    inches = len(tasks) * max(1.6, 0.2 * n_bars) + 4
    height = max(4.5, 0.25 * n_bars)  # of the legend
    figure = new_figure(max(9, inches), height)
    axes = figure.subplots()

    # our own bars, with the standard deviation over fine-tuning seeds
    for i, (title, row) in enumerate(rows.items()):
        offset = (i - centre) * width
        present = [task for task in tasks if task in row]
        xs = [tasks.index(task) + offset for task in present]
        medians = [row[task]["median"] for task in present]
        deviations = [row[task]["sd"] for task in present]
        look = {"color": COLORS[i % len(COLORS)], "hatch": HATCHES[i // len(COLORS) % len(HATCHES)]}
        axes.bar(xs, medians, width, yerr=deviations, label=title, **look)

    # published ones, in grey
    for i, (title, scores) in enumerate(published.items()):
        offset = (len(rows) + i - centre) * width
        xs = np.arange(len(tasks)) + offset
        heights = [scores[task] for task in tasks]
        grey = {"color": "0.75", "edgecolor": "0.3", "hatch": HATCHES[i % len(HATCHES)]}
        axes.bar(xs, heights, width, label=title, **grey)

    # titles and axes
    labels = [f"{task}\n{metric_of(rows, task)}" for task in tasks]
    axes.set_xticks(range(len(tasks)), labels)
    title = "median and standard deviation over fine-tuning seeds"
    if published and is_partial(rows):
        title += "; partial data, not comparable with published rows"
    axes.set(ylabel="percent", title=title)
    clean(axes, grid="y")
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    save(figure, file)
    return figure


def metric_of(rows, task):
    """Return the name of a task's metric, from the first row that has the task."""
    for row in rows.values():
        if task in row:
            return row[task]["metric"]


def is_partial(rows):
    """Return whether a score of any row is on a part of a task's data."""
    for row in rows.values():
        if any(entry["partial"] for entry in row.values()):
            return True
    return False


# --------------------------------------------------------------------------------------------------
# Scaling


def power_law(points):
    """Fit loss = (c / flops) ** b to the envelope of points (flops, loss).

    The envelope are the points that no point with less compute undercuts. Return (c, b, envelope).
    """
    envelope = []
    for flops, loss in sorted(points):
        if not envelope or loss < envelope[-1][1]:
            envelope.append((flops, loss))
    if len(envelope) < 3:
        raise Fault(
            "--scaling takes three points on the envelope; evaluate more often, or name more runs"
        )

    # a straight line in logarithms: log loss = b log c - b log flops
    log_flops, log_loss = np.log(envelope).T
    fit = linregress(log_flops, log_loss)
    c = math.exp(-fit.intercept / fit.slope)
    return c, -fit.slope, envelope


def jackknife(runs):
    """Return the standard error of power_law's b, leaving out one run (a list of points) at a time.

    The points of one run are not independent, and most are from before its learning rate has come
    down; runs are independent. With fewer than three runs the error is not a number.
    """
    if len(runs) < 3:
        return math.nan
    slopes = []
    for left_out in range(len(runs)):
        others = runs[:left_out] + runs[left_out + 1 :]
        try:
            _, slope, _ = power_law(sum(others, []))
        except Fault:
            return math.nan
        slopes.append(slope)
    return math.sqrt((len(runs) - 1) * np.var(slopes))


def draw_scaling(runs, file):
    """Draw val_loss by compute and by the clock, a curve per run, and the envelope's power law."""
    if not have_one_validation(runs):
        raise Fault("--scaling takes runs of one tokenizer and val.bin")
    logs = []  # of each run, its evaluations
    points = []
    for run in runs:
        log = [entry for entry in entries_of(run) if "flops" in entry]
        logs.append(log)
        points.append([(entry["flops"], entry["val_loss"]) for entry in log])
    c, b, envelope = power_law(sum(points, []))
    error = jackknife(points)

    # the law first, so that the curves lie on top of it
    figure = new_figure(14, 4.5)
    by_compute, by_clock = figure.subplots(1, 2, sharey=True)
    xs = np.geomspace(envelope[0][0], envelope[-1][0])
    ys = (c / xs) ** b
    law = f"(C / FLOPs)^b, b = {b:.3f} ± {error:.3f} over runs"
    by_compute.plot(xs, ys, color="0.4", lw=3, alpha=0.4, label=law)

    # a line per run
    for i, (run, log) in enumerate(zip(runs, logs)):
        line = LINES[i % len(LINES)]
        style = line | {"marker": "o", "ms": 3, "lw": 1.3}
        losses = [entry["val_loss"] for entry in log]
        flops = [entry["flops"] for entry in log]
        minutes = [60 * entry["hours"] for entry in log]
        by_compute.plot(flops, losses, label=Path(run).name, **style)
        by_clock.plot(minutes, losses, **style)

    # titles and axes
    by_compute.set(xscale="log", yscale="log", ylabel=LOSS)
    by_compute.set_xlabel("FLOPs of the model, forward and backward")
    by_compute.yaxis.set_major_formatter("{x:.1f}")
    by_compute.yaxis.set_minor_formatter("{x:.1f}")
    by_clock.set_xlabel("minutes of wall clock")
    for axes in (by_compute, by_clock):
        clean(axes)
        axes.grid(alpha=0.3, which="both")
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    save(figure, file)

    print(
        f"loss = (C / FLOPs)^b with C = {c:.3g} and b = {b:.4f} ± {error:.4f} (leaving out one run "
        f"at a time), fitted to the {len(envelope)} points on the envelope"
    )
    return figure


# --------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as out/demo")
    parser.add_argument("--x", choices=X, default="clock", help="horizontal axis of the curves")
    parser.add_argument("--out", metavar="FILE", help="the picture (default: in the first run)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--card", action="store_true", help="draw and print the scores of the runs")
    kind.add_argument("--scaling", action="store_true", help="draw loss by compute, with its law")
    args = parser.parse_args(argv)

    if args.card:
        file = args.out or Path(args.runs[0]) / "card.png"
        draw_card(args.runs, file)
    elif args.scaling:
        file = args.out or Path(args.runs[0]) / "scaling.png"
        draw_scaling(args.runs, file)
    else:
        file = args.out or Path(args.runs[0]) / "curves.png"
        draw_curves(args.runs, args.x, file)
    print(file)


if __name__ == "__main__":
    run_script(main)
