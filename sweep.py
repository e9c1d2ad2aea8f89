"""Many runs under one budget, one after the other, and one table of them:

    python sweep.py crammed bert_base rotary post_norm --seeds=2 --scale=cpu --out=out/sweep [--key=value ...]

A name is a recipe (config/NAME.py) or an entry of config/ablations.py, which changes the crammed recipe; the first one is
what the others are compared with. Each is prepared and trained with every seed, then scored if tasks are named
(--tasks=cola,rte). All other words go to the three stages. The same command continues a sweep that was stopped, and skips
what is done; a run that fails does not end it. --table=True runs nothing.

out/sweep/<name>-<seed>/ are runs like any other; out/sweep/table.md and sweep.png are what came out.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from configurator import ROOT, configure

OWN = {"seeds": 1, "out": "out/sweep", "table": False}  # the sweep's own options; seeds are 1337, 1338, ...


def words_of(name, extra):
    """What to say to a stage so that it runs `name`."""
    recipe = (ROOT / "config" / f"{name}.py").exists() and name != "ablations"
    scale = [word for word in extra if word.startswith("--scale=")]
    rest = [word for word in extra if not word.startswith("--scale=")]
    return [f"config/{name if recipe else 'crammed'}.py", *scale, *([] if recipe else [f"--ablation={name}"]), *rest]


def run(name, seed, out, extra):
    """Runs what is left to do of one entry with one seed. Returns the stage that failed, or None."""
    folder, words = out / f"{name}-{seed}", words_of(name, extra)
    scored = any(word.startswith("--tasks=") for word in extra)
    for script in ["prepare.py", "train.py", *["finetune_glue.py"] * scored]:
        own = [] if script == "prepare.py" else [f"--out_dir={folder}"]
        own += [f"--seed={seed}"] if script == "train.py" else []
        if script == "train.py" and (folder / "model.pt").exists():
            continue
        print(f"== {script} {' '.join(words + own)}", flush=True)
        if subprocess.run([sys.executable, ROOT / script, *words, *own]).returncode:
            return script
    return None


def result(folder):
    """What a finished run reached, {column: number}, and the sha256 of the two files that make its val_loss."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    config = json.loads((folder / "config.json").read_text())
    last = [e for e in entries if "val_loss" in e][-1]
    speeds = [e["tokens_per_s"] for e in entries if "tokens_per_s" in e]
    row = {"val_loss": last["val_loss"], "M tokens": last["tokens"] / 1e6, "k tokens/s": np.median(speeds) / 1e3}
    if (folder / "glue.json").exists():
        scores = json.loads((folder / "glue.json").read_text())["rows"].get("run", {})
        row |= {task: entry["median"] for task, entry in scores.items()}
    return row, (config["tokenizer_sha256"], config["val_sha256"])


def collect(names, out):
    """{name: ([row of each finished seed], whether its val_loss compares with that of the first name)}."""
    found, reference = {}, None
    for name in names:
        folders = sorted(path.parent for path in out.glob(f"{name}-*/model.pt") if path.parent.name[len(name) + 1 :].isdigit())
        results = [result(folder) for folder in folders]
        reference = reference or next((files for _, files in results), None)
        found[name] = [row for row, _ in results], all(files == reference for _, files in results)
    return found


def cell(values, digits):
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def table(found, failed):
    """The Markdown table: mean ± standard deviation over the n pretraining seeds."""
    columns = list(dict.fromkeys(column for rows, _ in found.values() for row in rows for column in row))
    lines = ["| | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, (rows, comparable) in found.items():
        cells = [cell([row[c] for row in rows if c in row], 3 if c == "val_loss" else 1) for c in columns]
        if rows and not comparable:
            cells[0] = f"({cells[0]})"
        n = f"{len(rows)}, {failed[name]} failed" if name in failed else len(rows)
        lines.append(f"| {name} | {n} | " + " | ".join(cells) + " |")
    if not all(comparable for _, comparable in found.values()):
        lines += ["", "In brackets: another tokenizer or val.bin, so that this val_loss says nothing about the others."]
    return "\n".join(lines) + "\n"


def main(argv):
    names = [word for word in argv if not word.startswith("--")]
    given = {word[2:].partition("=")[0]: word.partition("=")[2] for word in argv if word.startswith("--")}
    extra = [word for word in argv if word.startswith("--") and word[2:].partition("=")[0] not in OWN]
    if not names or "help" in given or not given.get("seeds", "1").isdigit():
        sys.exit(__doc__.strip())
    for name in names:
        configure("sweep.py", words_of(name, extra))  # a wrong name or key ends the sweep before it begins
    out, failed = Path(given.get("out", OWN["out"])), {}
    out.mkdir(parents=True, exist_ok=True)
    seeds = [] if given.get("table", "False") == "True" else range(1337, 1337 + int(given.get("seeds", OWN["seeds"])))
    for seed in seeds:
        for name in names:
            if stage := run(name, seed, out, extra):
                failed[name] = stage
            found = collect(names, out)
            (out / "table.md").write_text(table(found, failed))
    found = collect(names, out)
    text = table(found, failed)
    (out / "table.md").write_text(text)
    print(text)
    if losses := {
        name: [row["val_loss"] for row in rows] for name, (rows, comparable) in found.items() if rows and comparable
    }:
        try:
            from plot import draw_losses

            draw_losses(losses, out / "sweep.png")
        except SystemExit as reason:  # no matplotlib
            print(reason)
    if failed:
        sys.exit(
            f"sweep.py: {len(failed)} of {len(names)} entries failed: {', '.join(failed)}; the same command tries them again"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("sweep.py: interrupted; the same command continues")
