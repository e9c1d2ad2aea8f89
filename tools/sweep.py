"""Many runs under one budget, one after the other, and one table of them:

    python sweep.py crammed bert_base half_depth post_norm --seeds=2 --scale=cpu --out=out/sweep [--key=value ...]

A name is a recipe (config/NAME.py), or an entry of config/ablations.py, which changes the crammed recipe; mine+rotary+relu2
is config/mine.py with two such changes. The first one is what the others are compared with. Each is prepared and trained
with every seed, then scored if tasks are named (--tasks=cola,rte). Other words go to all stages, before what an entry
changes. The same command continues a sweep that was stopped, and skips what is done; a run that fails does not end it.
--table=True runs nothing.

Runs by the clock are only fair on a machine that has nothing else to do. With --tokens=N the first entry sees N tokens, and
each other one as many as it would in the same time: its speed is measured first, in turns with that of the first entry (which
leaves out the seconds of count_tokens). Schedules are then functions of the share of the steps.

out/sweep/<name>-<seed>/ are runs like any other; out/sweep/table.md and sweep.png are what came out. With two seeds or more
the table ends with how far each entry is from the first one, seed by seed, and the 95 % interval of that. For --table=True
their config.json, log.jsonl and glue.json are enough.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy import stats

import checkpoint
import train
from bench import our_config, relative_speeds
from configurator import ROOT, check, configure, literal, replace_file, write_json

seeds = 1  # [1, inf) runs of each entry, with the seeds 1337, 1338, ...
out = "out/sweep"  # folder of the runs and of the table
tokens = 0  # [0, inf) tokens that the first entry sees, 0 = the clock decides
table = False  # only make the table of what is there
OWN = {"seeds": (seeds, "[1, inf)"), "out": (out, ""), "tokens": (tokens, "[0, inf)"), "table": (table, "")}
ABOUT = {"layers", "width", "passed at", "M tokens", "epochs", "speed", "k tokens/s"}  # columns without a difference
DIGITS = {"layers": 0, "width": 0, "val_loss": 3, "passed at": 2, "epochs": 2, "speed": 2}  # of the table's columns, else 1
# what else a step's time is of
WORK = ["seq_len", "mask_rate", "mask_rate_end", "mask_80_10_10", "optimizer", "dtype", "device", "compile"]


def words_of(name, extra):
    """What to say to a stage so that it runs `name`."""
    base, *changes = name.split("+")
    if base == "ablations" or not (ROOT / "config" / f"{base}.py").exists():
        base, changes = "crammed", [base, *changes]
    scale = [word for word in extra if word.startswith("--scale=")]
    rest = [word for word in extra if word not in scale]
    return [f"config/{base}.py", *scale, *rest, *[f"--ablation={change}" for change in changes]]


def steps_of(configs):
    """{name: max_steps}: `tokens` of the first entry, and of the others what their speed makes of the same time.

    One that does not run is not in it.
    """
    recipes, works, new, path = {}, {}, {}, Path(out) / "speeds.json"
    for name, config in configs.items():
        vars(train).update({k: config[k] for k in ("batch_size", "batch_ramp", "batch_ramp_rows")})
        rows = np.mean([train.batch_rows(p) for p in np.linspace(0, 1, 1001)])
        micro = config["micro_batch_size"]
        recipes[name] = config, max(round(rows / micro), 1) * micro, micro, rows * config["seq_len"]
        work = repr([our_config(config), recipes[name][1:], [config[key] for key in WORK]])  # equal work, equal speed
        works[name] = hashlib.sha256(work.encode()).hexdigest()[:16]
    saved, first = json.loads(path.read_text()) if path.exists() else {}, next(iter(configs))
    speeds = {work: speed for speed, work in saved.values()}
    if works[first] not in speeds:
        saved, speeds = {}, {works[first]: 1.0}
    for name, work in works.items():
        if work not in speeds:
            new.setdefault(work, name)
    if new:
        found = relative_speeds({name: recipes[name][:3] for name in [first, *new.values()]})
        speeds |= {work: found[name] * speeds[works[first]] for work, name in new.items() if name in found}
    write_json(path, saved | {name: [speeds[work], work] for name, work in works.items() if work in speeds})
    shares = {name: speeds[work] / speeds[works[first]] for name, work in works.items() if work in speeds}
    return {name: max(round(tokens * share / recipes[name][3]), 1) for name, share in shares.items()}


def call(script, words):
    """Runs a stage. Whatever stops the sweep stops it first, and lets it save.

    Each has a compile cache of its own: compilation is part of the budget, so all runs have to pay for it.
    """
    print(f"== {script} {' '.join(words)}", flush=True)
    cache = tempfile.TemporaryDirectory()
    child = subprocess.Popen([sys.executable, ROOT / script, *words], env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache.name})

    def stop(number, frame):
        child.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        return child.wait()
    except KeyboardInterrupt:  # a Ctrl-C in the terminal has reached the child, too
        child.wait()
        raise
    finally:
        cache.cleanup()


def run(name, seed, extra):
    """Does what is left to do of one entry with one seed. Returns why it failed, or None."""
    folder, words = Path(out) / f"{name}-{seed}", words_of(name, extra)
    config, finished = configure("train.py", words), (folder / "model.pt").exists()
    data = Path("data") / config["dataset"] / "meta.json"
    if (data.exists() or not finished) and call("prepare.py", words):  # which refuses what was prepared otherwise
        return "prepare.py failed"
    if not finished:
        if call("train.py", [*words, f"--out_dir={folder}", f"--seed={seed}"]):
            return "train.py failed"
    else:
        done = checkpoint.completed(json.loads((folder / "config.json").read_text()))
        free = {*checkpoint.FREE_KEYS, "seed", "vocab_size", *(key for key in done if key.endswith("_sha256"))}
        if changed := [k for k in sorted(done.keys() - free) if done[k] != config.get(k)]:  # or the code has it no longer
            return f"{folder} is a run with another {', '.join(changed)}"
        if data.exists() and json.loads(data.read_text())["sha256"]["train"] != done["train_sha256"]:
            return f"{folder} is a run on another train.bin"
    if any(word.startswith("--tasks=") for word in extra) and call("finetune_glue.py", [*words, f"--out_dir={folder}"]):
        return "finetune_glue.py failed"
    return None


def passes(curve, loss):
    """The first x of a curve [(x, y)] of straight lines at which y is no more than `loss`; nan if there is none."""
    for (x0, y0), (x1, y1) in zip(curve[:1] + curve, curve):
        if y1 <= loss:
            return x1 - (x1 - x0) * (loss - y1) / (y0 - y1) if y0 > y1 else x1
    return np.nan


def result(folder, speed, goal, files):
    """What a run reached, {column: number}, and the sha256 of the two files that make its val_loss; or None: unfinished.

    goal: a val_loss of the same `files`, of which to say when the run passed it; or both None.
    """
    entries = checkpoint.read_log(folder / "log.jsonl")
    evaluations = [e for e in entries if "val_loss" in e]
    if not evaluations or evaluations[-1]["progress"] < 1:
        return None
    config, last = json.loads((folder / "config.json").read_text()), evaluations[-1]
    checkpoint.add_shares(entries, config)
    own_files = config["tokenizer_sha256"], config["val_sha256"]
    speeds = [e["tokens_per_s"] for e in entries if "tokens_per_s" in e]
    row = {"layers": config["n_layer"], "width": config["n_embd"], "val_loss": last["val_loss"]}
    if own_files == files:
        row["passed at"] = passes([(e["share"], e["val_loss"]) for e in evaluations], goal)
    row |= {"M tokens": last["tokens"] / 1e6, "epochs": [e["epoch"] for e in entries if "epoch" in e][-1]}
    row |= {"speed": speed} if speed else {"k tokens/s": np.median(speeds) / 1e3}
    if (folder / "glue.json").exists():
        scores = json.loads((folder / "glue.json").read_text())["rows"].get("run", {})
        row |= {task: entry["median"] for task, entry in scores.items()}
        if len(tasks := sorted(scores.keys() - {"wnli", "ax"})) > 1:
            row[f"mean of {', '.join(tasks)}"] = np.mean([scores[task]["median"] for task in tasks])
    return row, own_files


def collect(names):
    """{name: ({seed: row} of its runs, whether their val_loss compares with that of the first one with a run)}."""
    found, goal, files, path = {}, None, None, Path(out) / "speeds.json"
    relative = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        folders = {log.parent.name.removeprefix(f"{name}-"): log.parent for log in Path(out).glob(f"{name}-*/log.jsonl")}
        speed = relative[name][0] / relative[names[0]][0] if {name, names[0]} <= relative.keys() else None
        results = {int(seed): result(folders[seed], speed, goal, files) for seed in sorted(folders) if seed.isdigit()}
        results = {seed: found for seed, found in results.items() if found}
        rows = {seed: row for seed, (row, _) in results.items()}
        if goal is None and results:
            goal, files = np.mean([row["val_loss"] for row in rows.values()]), next(iter(results.values()))[1]
        found[name] = rows, all(own_files == files for _, own_files in results.values())
    return found


def cell(values, digits):
    if not values:
        return ""
    if np.isnan(values).any():
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def difference(pairs, digits):
    """'mean [95 % interval], p' of how far the first of each pair is from the second, by Student's t."""
    gaps = -np.diff(pairs).flatten()
    mean, error, freedom = gaps.mean(), stats.sem(gaps), len(gaps) - 1
    half = stats.t.ppf(0.975, freedom) * error
    p = f", p = {2 * stats.t.sf(abs(mean) / error, freedom):.2g}" if error > 1e-9 else ""
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]{p}"


def differences(found, columns):
    """Lines of a second Markdown table: how far each entry is from the first one, over the seeds that both have."""
    (first, (reference, _)), *others = found.items()
    measures, lines = [c for c in columns if c not in ABOUT], []
    for name, (rows, comparable) in others:
        both, cells = sorted(rows.keys() & reference.keys()), []
        for c in measures:
            pairs = [(rows[s][c], reference[s][c]) for s in both if c in rows[s] and c in reference[s]]
            complete = len(pairs) == len(both) > 1 and (comparable or c != "val_loss")
            cells.append(difference(pairs, DIGITS.get(c, 1)) if complete else "")
        if any(cells):
            lines.append(f"| {name} | {len(both)} | " + " | ".join(cells) + " |")
    text = f"Against {first}, over the n seeds that both have; empty where one was not scored: mean of the differences "
    text += "[its 95 % interval by Student's t], p of this one comparison."
    head = ["| | n | " + " | ".join(measures) + " |", "|---" * (len(measures) + 2) + "|"]
    return ["", text, "", *head, *lines] if lines else []


def report(names, failed):
    """Writes and returns the Markdown tables: mean ± standard deviation over n pretraining seeds, and differences.

    Also {name: losses}.
    """
    found = collect(names)
    every = [row for rows, _ in reversed(found.values()) for row in rows.values()]  # the first entry has not all columns
    columns = list(dict.fromkeys(c for row in every for c in row)) or ["val_loss"]
    lines = ["| | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, (rows, comparable) in found.items():
        cells = [cell([row[c] for row in rows.values() if c in row], DIGITS.get(c, 1)) for c in columns]
        if rows and not comparable:
            cells[columns.index("val_loss")] = f"({cells[columns.index('val_loss')]})"
        lines.append(" | ".join([f"| {name}", f"{len(rows)}{', ' * (name in failed)}{failed.get(name, '')}", *cells]) + " |")
    if not all(comparable for _, comparable in found.values()):
        lines += ["", "In brackets: with another tokenizer or val.bin than the first row's; these val_loss do not compare."]
    if "speed" in columns:
        lines += ["", "Speed: tokens a second as a share of the first entry's, measured side by side before the runs."]
    if "passed at" in columns:
        lines += ["", "Passed at: share of its time at which val_loss was the first entry's last (mean); - not in every run."]
    lines += differences(found, columns)
    text = "\n".join(lines) + "\n"
    with replace_file(Path(out) / "table.md") as f:
        f.write(text.encode())
    return text, {name: [row["val_loss"] for row in rows.values()] for name, (rows, ok) in found.items() if rows and ok}


def main(names, extra):
    # ends here if a word is wrong; a table can be of runs whose recipe is gone
    configs = {} if table else {name: configure("sweep.py", words_of(name, extra)) for name in names}
    if len({(config["budget_hours"], config["max_steps"]) for config in configs.values()}) > 1:
        sys.exit("sweep.py: these recipes have different budgets; --budget_hours=H gives them the same")
    for i, (name, config) in enumerate(configs.items()):
        for other in list(configs)[:i]:
            if not [k for k in config if config[k] != configs[other][k] and k not in ("out_dir", "dataset")]:
                sys.exit(f"sweep.py: {name} and {other} are the same experiment here; leave one out")
    Path(out).mkdir(parents=True, exist_ok=True)
    steps = steps_of(configs) if tokens and not table else {}
    failed = {name: "does not run, see above" for name in names if steps and name not in steps}
    for seed in [] if table else range(1337, 1337 + seeds):
        for name in [name for name in names if name in steps or not steps]:
            if reason := run(name, seed, [*extra, *([f"--max_steps={steps[name]}"] if steps else [])]):
                failed[name] = reason
                print(f"sweep.py: {name}: {reason}", flush=True)
            report(names, failed)
    text, losses = report(names, failed)
    print(text)
    if losses:
        try:
            from plot import draw_losses

            draw_losses(losses, Path(out) / "sweep.png")
        except SystemExit as reason:  # no matplotlib
            print(reason)
    if failed:
        sys.exit(
            f"sweep.py: {len(failed)} of {len(names)} entries failed: {', '.join(failed)}; the same command tries them again"
        )


if __name__ == "__main__":
    names = [Path(word).stem if word.endswith(".py") else word for word in sys.argv[1:] if not word.startswith("-")]
    extra = []
    for word in sys.argv[1:]:
        key, _, value = word.removeprefix("--").partition("=")
        if key in OWN and "=" in word:
            globals()[key] = check(key, literal(value), *OWN[key])
        elif key in ("seed", "out_dir"):
            sys.exit(
                f"sweep.py: {key} is what the sweep itself sets; --seeds=2 means two seeds, --out=FOLDER where all runs are"
            )
        elif word.startswith("-"):
            extra.append(word)
    if not names or {"--help", "-h"} & set(extra):
        sys.exit(__doc__.strip())
    try:
        main(names, extra)
    except KeyboardInterrupt:
        sys.exit("sweep.py: interrupted; the same command continues")
    except OSError as e:
        sys.exit(f"sweep.py: {e.strerror or e}: {e.filename or out}")
