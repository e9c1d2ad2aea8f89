"""Train many recipes under one budget, one after the other, and make one table of them.

python -m tools.sweep crammed bert_base half_depth --seeds=2 --scale=cpu [--key=value ...]

A name is a recipe (config/NAME.py), or an entry of config/ablations.py, which changes the crammed
recipe; mine+rotary+relu2 is config/mine.py with two such changes. The others are compared with the
first one. Each is prepared and trained with every seed, then scored if tasks are named
(--tasks=cola,rte). Other --key=value words go to all stages, before what an entry changes. The
same command continues a sweep that was stopped, and skips what is done. A run that fails does not
end the sweep.

Runs by the clock are only fair on a machine that has nothing else to do. With --tokens=N the first
entry sees N tokens, and each other one as many as it would in the same time. Its speed is measured
first, in turns with that of the first entry, without the seconds of count_tokens. Schedules are
then functions of the steps.

OUT/NAME-SEED/ are runs like any other; OUT/table.md and OUT/sweep.png are the result. With two
seeds or more the table ends with how far each entry is from the first one, seed by seed, and the
95 % interval of that. --table makes the table of the runs that are there; their config.json,
log.jsonl and glue.json are enough.

For more than one machine, --print runs nothing and prints one shell line per run, for any job
system. Each line prepares its corpus unless it is there, trains, and scores; run in any order, and
again if one was killed, they leave what the sweep itself would. --table collects.
"""

import argparse
import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

import train
from model import Config
from nanocram.configurator import ROOT, resolve
from nanocram.faults import Fault, read_json, replace_file, run_script, write_json
from nanocram.runs import add_time_fraction, fill_in_defaults, read_log
from tools.bench import Recipe, model_config, relative_speeds
from tools.plot import draw_losses

FIRST_SEED = 1337
# keys that, with the model and the batch, decide how long a step takes
WORK = ["seq_len", "mask_rate", "mask_80_10_10", "optimizer", "dtype", "device", "compile"]
# columns of the table of which no difference is shown
ABOUT = {"layers", "width", "passed at", "M tokens", "epochs", "speed", "k tokens/s"}
# the loss, and that at words that are visible nowhere else in the row, and at the others
LOSSES = ["val_loss", "val_loss_new", "val_loss_seen"]
ERROR = "val_loss_se"  # standard error of val_loss over validation rows
# digits after the point in the table's columns; elsewhere 1
DIGITS = {"layers": 0, "width": 0, "passed at": 2, "epochs": 2, "speed": 2}
DIGITS |= dict.fromkeys(LOSSES, 3)
NOT_IN_MEAN = {"wnli", "ax"}  # GLUE's average leaves them out, too
SAME_COMMAND = "the same command continues"


@dataclass
class Reference:
    """What the first entry with a finished run reached, to compare the others with."""

    loss: float  # mean of its last val_loss
    files: tuple  # hashes of the tokenizer and of val.bin


@dataclass
class Entry:
    """The finished runs of one entry."""

    rows: dict  # {seed: {column of the table: number}}
    is_comparable: bool  # whether val_loss is measured on the files of the reference


# --------------------------------------------------------------------------------------------------
# Entries


def stage_words(name, words):
    """Return the command line of a stage for the entry `name`. words: of the sweep, for all."""
    # a name that is no recipe is a change of the crammed one
    base, *changes = name.split("+")
    if base == "ablations" or not (ROOT / "config" / f"{base}.py").exists():
        changes = [base, *changes]
        base = "crammed"

    # a scale comes first and the changes last, since both compute with the keys before them
    scales = [word for word in words if word.startswith("--scale=")]
    others = [word for word in words if word not in scales]
    ablations = [f"--ablation={change}" for change in changes]
    return [f"config/{base}.py", *scales, *others, *ablations]


def resolve_entries(names, words):
    """Return {name: config}. Raise Fault if a word is wrong or two entries do not compare."""
    configs = {}
    budgets = set()
    for name in names:
        config = resolve("train.py", stage_words(name, words))
        configs[name] = config
        budgets.add((config["budget_hours"], config["max_steps"]))
    if len(budgets) > 1:
        raise Fault("these recipes have different budgets; --budget_hours=H gives them the same")

    # two entries may become the same at this scale
    seen = {}
    for name, config in configs.items():
        experiment = config | {"out_dir": None, "dataset": None}
        for other, other_experiment in seen.items():
            if experiment == other_experiment:
                raise Fault(f"{name} and {other} are the same experiment here; leave one out")
        seen[name] = experiment
    return configs


# --------------------------------------------------------------------------------------------------
# Steps, if tokens are counted and not hours


def steps_of(configs, tokens, path):
    """Return {name: max_steps} in the time in which the first entry sees `tokens`.

    An entry that does not run is not in the result. path: file of the measured speeds.
    """
    # what is timed: as many whole micro-batches as an average batch has
    recipes = {}
    tokens_per_step = {}
    for name, config in configs.items():
        rows = mean_batch_rows(config)
        micro_rows = config["micro_batch_size"]
        n_micro_batches = max(round(rows / micro_rows), 1)
        recipes[name] = Recipe(config, n_micro_batches * micro_rows, micro_rows)
        tokens_per_step[name] = rows * config["seq_len"]

    # as many tokens as the speed allows
    steps = {}
    for name, speed in measure_speeds(recipes, tokens_per_step, path).items():
        n_steps = tokens * speed / tokens_per_step[name]
        steps[name] = max(round(n_steps), 1)
    return steps


def mean_batch_rows(config):
    """Return the mean rows of a batch over the whole run."""
    keys = ("batch_size", "batch_ramp", "batch_ramp_rows")
    sizes = [config[key] for key in keys]
    rows = []
    for progress in np.linspace(0, 1, 1001):
        rows.append(train.batch_rows(progress, *sizes))
    return np.mean(rows)


def hash_of_work(recipe, tokens_per_step):
    """Return a short hash of what decides the speed of a recipe: equal work, equal speed."""
    batch = (recipe.rows, recipe.micro_rows, tokens_per_step)
    keys = [recipe.config[key] for key in WORK]
    work = repr([model_config(recipe.config), batch, keys])
    return hashlib.sha256(work.encode()).hexdigest()[:16]


def measure_speeds(recipes, tokens_per_step, path):
    """Return {name: tokens per second, as a multiple of the first recipe's}.

    Speeds that the file `path` has are not measured again. A recipe that does not run is left out.
    """
    works = {}
    for name, recipe in recipes.items():
        works[name] = hash_of_work(recipe, tokens_per_step[name])
    first = next(iter(works))

    # speeds are relative to one entry: without it, those of the file say nothing
    saved = read_json(path) if path.exists() else {}
    known = {work: speed for speed, work in saved.values()}
    if works[first] not in known:
        saved = {}
        known = {works[first]: 1.0}

    # measure each kind of work once
    new = {}
    for name, work in works.items():
        if work not in known:
            new.setdefault(work, name)
    if new:
        measured = [first, *new.values()]
        found = relative_speeds({name: recipes[name] for name in measured})
        for work, name in new.items():
            if name in found:
                known[work] = found[name] * known[works[first]]

    # save them for the table and for the next call
    works = {name: work for name, work in works.items() if work in known}
    for name, work in works.items():
        saved[name] = [known[work], work]
    write_json(path, saved)
    return {name: known[work] / known[works[first]] for name, work in works.items()}


# --------------------------------------------------------------------------------------------------
# Runs


def run_stage(script, words):
    """Run a stage and return its exit status. What stops the sweep stops the stage first.

    Each call has a compile cache of its own: compilation is part of the budget, so that all runs
    have to pay for it.
    """
    print(f"== {script} {' '.join(words)}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, ROOT / script, *words]
        process = subprocess.Popen(command, env=environment)

        def stop(number, frame):
            process.terminate()
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, stop)
        try:
            return process.wait()
        except KeyboardInterrupt:
            # a Ctrl-C in the terminal has reached the stage, too: let it save
            process.wait()
            raise


def finish_run(name, seed, words, out):
    """Do what is left of one entry with one seed. Return why it failed, or None."""
    folder = out / f"{name}-{seed}"
    words = stage_words(name, words)
    config = resolve("train.py", words)
    data = Path("data") / config["dataset"] / "meta.json"
    is_finished = (folder / "model.pt").exists()

    # prepare.py refuses a data set that was prepared otherwise
    if data.exists() or not is_finished:
        if run_stage("prepare.py", words):
            return "prepare.py failed"

    # train, or look whether the finished run is this one
    own_words = [*words, f"--out_dir={folder}"]
    if is_finished:
        if reason := why_not_the_same(folder, config, data):
            return reason
    elif run_stage("train.py", [*own_words, f"--seed={seed}"]):
        return "train.py failed"

    # score
    if any(word.startswith("--tasks=") for word in words):
        if run_stage("finetune_glue.py", own_words):
            return "finetune_glue.py failed"
    return None


def shell_line(name, seed, words, out):
    """Return the shell command that does all of one entry with one seed, in the repository."""
    folder = out / f"{name}-{seed}"
    words = stage_words(name, words)
    own_words = [*words, f"--out_dir={folder}"]

    # a finished run is not trained again; each run pays for its own compilation
    prepare = shlex.join(["python", "prepare.py", *words])
    train = shlex.join(["python", "train.py", *own_words, f"--seed={seed}"])
    is_done = f"test -f {shlex.quote(str(folder / 'model.pt'))}"
    parts = [prepare, f"{{ {is_done} || TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) {train}; }}"]
    if any(word.startswith("--tasks=") for word in words):
        parts.append(shlex.join(["python", "finetune_glue.py", *own_words]))
    return " && ".join(parts)


def print_lines(names, configs, args, words):
    """Print the shell line of each run, the first seed of all entries first."""
    # measure how many steps each entry gets; the lines alone go to the standard output
    steps = {}
    if args.tokens:
        with contextlib.redirect_stdout(sys.stderr):
            args.out.mkdir(parents=True, exist_ok=True)
            steps = steps_of(configs, args.tokens, args.out / "speeds.json")
        for name in names:
            if name not in steps:
                print(f"{name} does not run, see above", file=sys.stderr)
        names = [name for name in names if name in steps]

    # all entries with one seed, then with the next
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
        for name in names:
            own_words = words
            if steps:
                own_words = [*words, f"--max_steps={steps[name]}"]
            print(shell_line(name, seed, own_words, args.out))


def why_not_the_same(folder, config, data):
    """Return how a finished run differs from a config and its data (meta.json), or None.

    A key that the code no longer has is a difference, too.
    """
    done = fill_in_defaults(read_json(folder / "config.json"), ROOT / "train.py")
    free = {*train.FREE_KEYS, "seed", "vocab_size"}
    if config["init_from"] != "scratch":
        free |= Config.__dataclass_fields__.keys()  # the weights decide
    changed = []
    for key in sorted(done.keys() - free):
        if not key.endswith("_sha256") and done[key] != config.get(key):
            changed.append(key)
    if changed:
        return f"{folder} is a run with another {', '.join(changed)}"
    if data.exists() and read_json(data)["sha256"]["train"] != done["train_sha256"]:
        return f"{folder} is a run on another train.bin"
    return None


def run_all(names, configs, args, words):
    """Run all entries with all seeds, and write the table after each. Return {name: why failed}."""
    # with --tokens, measure how many steps each entry gets
    failed = {}
    steps = {}
    if args.tokens:
        steps = steps_of(configs, args.tokens, args.out / "speeds.json")
        for name in names:
            if name not in steps:
                failed[name] = "does not run, see above"

    # seed by seed, so that a sweep that is stopped has compared all entries with some seeds
    runnable = [name for name in names if name not in failed]
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
        for name in runnable:
            own_words = words
            if steps:
                own_words = [*words, f"--max_steps={steps[name]}"]
            if reason := finish_run(name, seed, own_words, args.out):
                failed[name] = reason
                print(f"{name}: {reason}", flush=True)
            write_table(names, failed, args.out)
    return failed


# --------------------------------------------------------------------------------------------------
# What the runs reached


def first_crossing(curve, loss):
    """Return the first x at which y is at most `loss`, on straight lines between points [(x, y)].

    It is not a number if there is none.
    """
    x0, y0 = curve[0]
    for x1, y1 in curve:
        if y1 <= loss < y0:
            return x1 - (x1 - x0) * (loss - y1) / (y0 - y1)
        if y1 <= loss:
            return x1
        x0, y0 = x1, y1
    return np.nan


def read_run(folder, speed, reference):
    """Return ({column: number}, the hashes that decide its val_loss) of a run, or None.

    None is for a run that is not finished. speed: relative to the first entry, or None.
    reference: to say when the run passed its loss, or None.
    """
    # a run is finished if its last evaluation was at the end
    entries = read_log(folder / "log.jsonl")
    evaluations = [entry for entry in entries if "val_loss" in entry]
    if not evaluations or evaluations[-1]["progress"] < 1:
        return None
    config = read_json(folder / "config.json")
    add_time_fraction(entries, config)
    files = (config["tokenizer_sha256"], config["val_sha256"])
    last = evaluations[-1]

    # columns in the order of the table
    row = {"layers": config["n_layer"], "width": config["n_embd"]}
    for kind in [*LOSSES, ERROR]:
        if last.get(kind) is not None:  # older logs lack some
            row[kind] = last[kind]
    if reference and files == reference.files:
        curve = [(entry["time_fraction"], entry["val_loss"]) for entry in evaluations]
        row["passed at"] = first_crossing(curve, reference.loss)
    row["M tokens"] = last["tokens"] / 1e6
    row["epochs"] = [entry["epoch"] for entry in entries if "epoch" in entry][-1]
    if speed:
        row["speed"] = speed
    else:
        speeds = [entry["tokens_per_s"] for entry in entries if "tokens_per_s" in entry]
        row["k tokens/s"] = np.median(speeds) / 1e3
    return row | read_scores(folder), files


def read_scores(folder):
    """Return {task: median score} of a run, and their mean if there are two or more."""
    path = folder / "glue.json"
    if not path.exists():
        return {}
    entries = read_json(path)["rows"].get("run", {})
    scores = {task: entry["median"] for task, entry in entries.items()}
    tasks = sorted(scores.keys() - NOT_IN_MEAN)
    if len(tasks) > 1:
        scores[f"mean of {', '.join(tasks)}"] = np.mean([scores[task] for task in tasks])
    return scores


def read_entries(names, out):
    """Return {name: Entry} of the runs in a folder."""
    path = out / "speeds.json"
    speeds = read_json(path) if path.exists() else {}
    reference = None
    entries = {}
    for name in names:
        speed = None
        if name in speeds and names[0] in speeds:
            speed = speeds[name][0] / speeds[names[0]][0]

        # the finished runs, by the number at the end of their names
        rows = {}
        files = []
        prefix = Path(name).name + "-"  # an entry of a page may be in a folder of its own
        for log in sorted(out.glob(f"{name}-*/log.jsonl")):
            seed = log.parent.name.removeprefix(prefix)
            if not seed.isdigit():
                continue
            found = read_run(log.parent, speed, reference)
            if found:
                rows[int(seed)], run_files = found
                files.append(run_files)

        # the first entry that has some is what the others are compared with
        if reference is None and rows:
            losses = [row["val_loss"] for row in rows.values()]
            reference = Reference(np.mean(losses), files[0])
        entries[name] = Entry(rows, all(own == reference.files for own in files))
    return entries


# --------------------------------------------------------------------------------------------------
# The table


def mean_and_deviation(values, digits):
    """Return 'mean ± standard deviation', or '-' if a value is not a number, or ''."""
    if not values:
        return ""
    if np.isnan(values).any():
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    if len(set(values)) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text


def mean_cell(entry, column):
    """Return the cell of a column in the first table: the mean over the runs, and its spread."""
    values = [row[column] for row in entry.rows.values() if column in row]
    text = mean_and_deviation(values, DIGITS.get(column, 1))
    if column == "val_loss":
        text += error_of_one_run(entry)

    # how many runs, if not all: some may lack scores
    if 0 < len(values) < len(entry.rows):
        text += f" (n = {len(values)})"

    # brackets for a loss on other data than the first entry's
    if column in LOSSES and values and not entry.is_comparable:
        text = f"({text})"
    return text


def error_of_one_run(entry):
    """Return ' ± standard error, s.e.' of an entry's val_loss if it has one run, or ''."""
    rows = list(entry.rows.values())
    if len(rows) != 1 or ERROR not in rows[0]:
        return ""
    return f" ± {rows[0][ERROR]:.{DIGITS['val_loss']}f} s.e."


def difference(pairs, digits):
    """Return 'mean [95 % interval], p' of first minus second of each pair, by Student's t."""
    gaps = -np.diff(pairs).flatten()
    mean = gaps.mean()
    error = stats.sem(gaps)
    freedom = len(gaps) - 1
    half = stats.t.ppf(0.975, freedom) * error
    text = f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
    if error > 1e-9:
        text += f", p = {2 * stats.t.sf(abs(mean) / error, freedom):.2g}"
    return text


def columns_of(entries):
    """Return the columns of the table. The first entry lacks some, so begin with the last one."""
    columns = {}
    for entry in reversed(entries.values()):
        for row in entry.rows.values():
            columns |= dict.fromkeys(row)
    columns.pop(ERROR, None)  # is part of val_loss
    return list(columns) or ["val_loss"]


def markdown(titles, rows):
    """Return the lines of a Markdown table."""
    lines = ["| | " + " | ".join(titles) + " |"]
    lines.append("|---" * (len(titles) + 1) + "|")
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return lines


def main_table(entries, columns, failed):
    """Return the lines of the first table: the mean of each column over the seeds."""
    rows = []
    for name, entry in entries.items():
        n = str(len(entry.rows))
        if name in failed:
            n += f", {failed[name]}"
        cells = [mean_cell(entry, column) for column in columns]
        rows.append([name, n, *cells])
    return markdown(["n", *columns], rows)


def notes(entries, columns):
    """Return the lines that explain the first table, as far as it needs them."""
    lines = []
    if any(error_of_one_run(entry) for entry in entries.values()):
        lines.append(
            "s.e.: of one run, the standard error of val_loss over validation rows. Without it, ± "
            "is the standard deviation over runs."
        )
    if not all(entry.is_comparable for entry in entries.values()):
        lines.append(
            "In brackets: with another tokenizer or val.bin than the first row's; these val_loss "
            "do not compare."
        )
    if "speed" in columns:
        lines.append(
            "Speed: tokens a second as a share of the first entry's, measured side by side before "
            "the runs."
        )
    if "passed at" in columns:
        lines.append(
            "Passed at: share of its time at which val_loss was the first entry's last (mean); - "
            "not in every run."
        )
    spaced = []
    for line in lines:
        spaced += ["", line]
    return spaced


def difference_table(entries, columns):
    """Return the lines of the second table: how far each entry is from the first one.

    Only the seeds that both have count. Without two such seeds there is no table.
    """
    (first, reference), *others = entries.items()
    measures = [column for column in columns if column not in ABOUT]
    rows = []
    for name, entry in others:
        seeds = sorted(entry.rows.keys() & reference.rows.keys())
        cells = []
        for column in measures:
            pairs = []
            for seed in seeds:
                own_row = entry.rows[seed]
                reference_row = reference.rows[seed]
                if column in own_row and column in reference_row:
                    pairs.append((own_row[column], reference_row[column]))
            # an interval takes two seeds or more; a seed that was not scored hides the column
            is_complete = len(pairs) == len(seeds) > 1
            if is_complete and (entry.is_comparable or column not in LOSSES):
                cells.append(difference(pairs, DIGITS.get(column, 1)))
            else:
                cells.append("")
        if any(cells):
            rows.append([name, str(len(seeds)), *cells])
    if not rows:
        return []
    text = (
        f"Against {first}, over the n seeds that both have; empty where one was not scored: mean "
        "of the differences [its 95 % interval by Student's t], p of this one comparison."
    )
    return ["", text, "", *markdown(["n", *measures], rows)]


def write_table(names, failed, out):
    """Write table.md. Return its text, and {name: [val_loss]} of the entries that compare."""
    # the table
    entries = read_entries(names, out)
    columns = columns_of(entries)
    lines = main_table(entries, columns, failed)
    lines += notes(entries, columns)
    lines += difference_table(entries, columns)
    text = "\n".join(lines) + "\n"
    with replace_file(out / "table.md") as f:
        f.write(text.encode())

    # what the picture shows
    losses = {}
    for name, entry in entries.items():
        if entry.rows and entry.is_comparable:
            losses[name] = [row["val_loss"] for row in entry.rows.values()]
    return text, losses


# --------------------------------------------------------------------------------------------------


def parse(argv):
    """Return the sweep's own arguments, and the words for the stages."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("names", nargs="+", metavar="NAME", help="recipes, or ablations of crammed")
    parser.add_argument("--seeds", **number, default=1, help="runs of each entry (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), help="folder of the runs")
    parser.add_argument("--tokens", **number, default=0, help="in place of the clock (default: 0)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--print", action="store_true", help="run nothing, print a line per run")
    mode.add_argument("--table", action="store_true", help="run nothing, only make the table")
    args, words = parser.parse_known_intermixed_args(argv)

    # config/mine.py is the recipe mine
    for i, name in enumerate(args.names):
        if name.endswith(".py"):
            args.names[i] = Path(name).stem

    # refuse what makes no sense, and what would make all runs one run
    if args.seeds < 1:
        raise Fault(f"seeds = {args.seeds} is outside [1, inf)")
    if args.tokens < 0:
        raise Fault(f"tokens = {args.tokens} is outside [0, inf)")
    for word in words:
        key = word.removeprefix("--").partition("=")[0]
        if key in ("seed", "out_dir"):
            raise Fault(
                f"{key} is what the sweep itself sets; --seeds=2 means two seeds, --out=FOLDER "
                "where all runs are"
            )
    return args, words


def main(argv=None):
    # what is wrong ends the sweep here; a table can be of runs whose recipe is gone
    args, words = parse(argv)
    configs = {}
    if not args.table:
        # with --print, the standard output has the lines alone
        output = sys.stderr if args.print else sys.stdout
        with contextlib.redirect_stdout(output):
            configs = resolve_entries(args.names, words)

    if args.tokens and any(config["init_from"] != "scratch" for config in configs.values()):
        raise Fault("--tokens cannot measure the models of init_from; set --max_steps instead")
    if args.print:
        print_lines(args.names, configs, args, words)
        return

    # run what is missing
    args.out.mkdir(parents=True, exist_ok=True)
    failed = {}
    if not args.table:
        failed = run_all(args.names, configs, args, words)

    # show what came out
    text, losses = write_table(args.names, failed, args.out)
    print(text)
    if losses:
        try:
            draw_losses(losses, args.out / "sweep.png")
        except Fault as reason:  # no matplotlib
            print(reason)
    if failed:
        raise Fault(
            f"{len(failed)} of {len(args.names)} entries failed: {', '.join(failed)}; the same "
            "command tries them again"
        )


if __name__ == "__main__":
    run_script(main, kept=SAME_COMMAND)
