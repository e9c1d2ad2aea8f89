"""What finetune_glue.py scores: GLUE's tasks, the offline ones of the docs corpus, and one's own; their metrics."""

import json
import math
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from configurator import one_line, replace_file
from scorecard import DOCS, NINE

# task: (folder, columns of the texts, of the label, labels in the hub's order or [] for regression, metric, rows of train,
# of the dev sets together, of each test set). The columns are the official download's; HUB_COLUMNS where the hub's differ.
YES_NO = ["entailment", "not_entailment"]
GLUE = {
    "cola": ("CoLA", ["sentence"], "label", ["0", "1"], "matthews", 8551, 1043, [1063]),
    "sst2": ("SST-2", ["sentence"], "label", ["0", "1"], "accuracy", 67349, 872, [1821]),
    "mrpc": ("MRPC", ["#1 String", "#2 String"], "Quality", ["0", "1"], "f1", 3668, 408, [1725]),
    "stsb": ("STS-B", ["sentence1", "sentence2"], "score", [], "pearson", 5749, 1500, [1379]),
    "qqp": ("QQP", ["question1", "question2"], "is_duplicate", ["0", "1"], "f1", 363846, 40430, [390965]),
    "mnli": ("MNLI", ["sentence1", "sentence2"], "gold_label", ["entailment", "neutral", "contradiction"], "accuracy",
             392702, 19647, [9796, 9847]),
    "qnli": ("QNLI", ["question", "sentence"], "label", YES_NO, "accuracy", 104743, 5463, [5463]),
    "rte": ("RTE", ["sentence1", "sentence2"], "label", YES_NO, "accuracy", 2490, 277, [3000]),
    "wnli": ("WNLI", ["sentence1", "sentence2"], "label", ["0", "1"], "accuracy", 635, 71, [146]),
}  # fmt: skip
HUB_COLUMNS = {"mrpc": ["sentence1", "sentence2"], "mnli": ["premise", "hypothesis"]}
AX_ROWS = 1104  # the diagnostic set, answered by the MNLI model
HINT = "; gluebenchmark.com/tasks has it, --glue_dir='' reads the hub"

# ---------------------------------------------------------------------------------------------------------------------
# Metrics of predictions p and labels y, in percent; 0 where a constant leaves nothing to correlate


def matthews(p, y):
    """For two classes or more (Gorodkin 2004), which is the R3 of the diagnostic set."""
    classes = np.union1d(p, y)
    n_p, n_y = np.array([[(x == c).sum() for c in classes] for x in (p, y)], dtype=float)
    spread = math.sqrt((len(y) ** 2 - n_p @ n_p) * (len(y) ** 2 - n_y @ n_y))
    return 100 * float((p == y).sum() * len(y) - n_p @ n_y) / spread if spread else 0.0


def f1(p, y):
    hits, wrong = int(((p == 1) & (y == 1)).sum()), int((p != y).sum())
    return 100 * 2 * hits / (2 * hits + wrong) if hits else 0.0


def accuracy(p, y):
    return 100 * float((p == y).mean())


def pearson(p, y):
    return 100 * float(stats.pearsonr(p, y)[0]) if np.ptp(p) > 0 and np.ptp(y) > 0 else 0.0


def spearman(p, y):
    return 100 * float(stats.spearmanr(p, y)[0]) if np.ptp(p) > 0 and np.ptp(y) > 0 else 0.0


METRICS = {"matthews": matthews, "f1": f1, "accuracy": accuracy, "pearson": pearson, "spearman": spearman}
ALSO = {"f1": "accuracy", "pearson": "spearman"}  # GLUE's second metrics: in glue.json, beside the one that counts


# ---------------------------------------------------------------------------------------------------------------------
# Tasks. An example is (text, second text or None, label); the label is None in a test set


@dataclass
class Task:
    name: str
    train: list
    dev: dict  # {name on the card: examples}
    test: dict  # {file name for the GLUE server: examples}
    labels: list  # [] for regression
    metric: str
    partial: bool = False  # whether rows of train or dev are missing


def read_table(path, columns, label, header=None, hint=""):
    """The examples of a .jsonl, or of a tab-separated file without quoting. Rows with missing fields (QQP has some) are
    counted and left out; in a test set (label None) they stay, as the server counts rows."""
    if not path.exists():
        sys.exit(f"finetune_glue.py: {path} is missing{hint}; or leave its task out of `tasks`")
    examples, skipped, wanted = [], 0, [*columns, label] if label else columns
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as f:
        if path.suffix == ".jsonl":
            try:
                rows = [dict(json.loads(line)) for line in f if line.strip()]
            except (ValueError, TypeError) as e:
                sys.exit(f"finetune_glue.py: {path} has a line that is not a JSON object: {e}")
            header = list(rows[0]) if rows else []
        else:
            lines = (line.rstrip("\r\n").split("\t") for line in f)
            header = header or next(lines, [])
            rows = (dict(zip(header, line)) for line in lines)
        if missing := [c for c in wanted if c not in header]:
            sys.exit(f"finetune_glue.py: {path} has no column {missing[0]!r}; its header is {', '.join(header)[:200]!r}")
        for row in rows:
            fields = [row.get(c) for c in wanted]
            if label and (None in fields or fields[-1] == ""):
                skipped += 1
                continue
            texts = ["" if x is None else str(x) for x in fields[: len(columns)]]
            examples.append((texts[0], texts[1] if len(texts) == 2 else None, fields[-1] if label else None))
    if skipped:
        print(f"finetune_glue.py: {path}: {skipped} rows with missing fields were left out")
    return examples


def load_part(task, part, folder):
    """Examples of a part of a GLUE task: train, dev or test, for MNLI dev_matched, ..., from `folder`, or "" for the hub."""
    name, columns, label, labels, *_ = GLUE[task]
    label = None if part.startswith("test") else label
    if folder:
        # CoLA's files have no header, but for the test set
        header = ["source", "label", "mark", "sentence"] if task == "cola" and label else None
        examples = read_table(Path(folder).expanduser() / name / f"{part}.tsv", columns, label, header, HINT)
        return [e for e in examples if e[2] != "-"]  # on these pairs of MNLI the annotators did not agree
    return hub_examples(task, part.replace("dev", "validation"), HUB_COLUMNS.get(task, columns), labels, label)


def hub_examples(name, split, columns, labels, label):
    import datasets

    try:
        data = datasets.load_dataset("nyu-mll/glue", name, split=split)
    except Exception as e:
        sys.exit(f"finetune_glue.py: cannot load nyu-mll/glue: {one_line(e)}; --glue_dir=FOLDER reads a local copy")
    texts = [data[c] for c in columns]
    targets = [(labels[y] if labels else y) if label else None for y in data["label"]]
    return list(zip(texts[0], texts[1] if len(texts) == 2 else [None] * len(texts[0]), targets))


def load_diagnostic(folder):
    """The diagnostic set: (examples, whether they have labels, as only diagnostic-full.tsv of the official site has)."""
    if not folder:
        return hub_examples("ax", "test", HUB_COLUMNS["mnli"], [], None), False
    full = Path(folder).expanduser() / "diagnostic" / "diagnostic-full.tsv"
    if full.exists():
        return read_table(full, ["Premise", "Hypothesis"], "Label"), True
    return read_table(full.with_name("diagnostic.tsv"), GLUE["mnli"][1], None, hint=HINT), False


def load_glue(name, folder, submit, ax):
    """A GLUE task. submit: with its test sets; ax: the diagnostic set, too."""
    long_name, _, _, labels, metric, n_train, n_dev, n_test = GLUE[name]
    kinds = {"": "_matched", "_mm": "_mismatched"} if name == "mnli" else {"": ""}
    train = load_part(name, "train", folder)
    dev = {name + short: load_part(name, f"dev{long}", folder) for short, long in kinds.items()}
    task = Task(name, train, dev, {}, labels, metric)
    task.partial = len(task.train) < n_train or sum(map(len, dev.values())) < n_dev
    if submit:
        files = {"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"} if name == "mnli" else {long_name: "test"}
        task.test = {file: load_part(name, part, folder) for file, part in files.items()}
    if ax:
        examples, has_labels = load_diagnostic(folder)
        task.dev |= {"ax": examples} if has_labels else {}
        task.test["AX"] = [(a, b, None) for a, b, _ in examples]
    for (file, examples), rows in zip(task.test.items(), [*n_test, AX_ROWS]):
        if submit and len(examples) != rows:
            sys.exit(f"finetune_glue.py: {file}'s test set has {len(examples)} rows, the GLUE server wants {rows}")
    return task


def load_docs(name, dataset):
    """An offline task of the docs corpus, as prepare.py wrote it."""
    folder = Path("data") / dataset / "tasks" / name
    parts = [read_table(folder / f"{part}.tsv", DOCS[name], "label") for part in ("train", "dev")]
    return Task(name, parts[0], {name: parts[1]}, {}, sorted({y for *_, y in parts[0]}), "accuracy")


def load_own(entry):
    """One's own task: {"name", "train", "dev": files (.tsv or .jsonl), "columns": one or two, "label", "labels", "metric"}.

    label: the column; labels: its values in order (the second is the positive one for f1), by default sorted.
    """
    entry = {"label": "label", "metric": "accuracy", "labels": [], **entry}
    keys = {"name", "train", "dev", "columns", "label", "labels", "metric"}
    if entry.keys() != keys or len(entry["columns"]) not in (1, 2):
        sys.exit(
            f"finetune_glue.py: an own task has name, train, dev, columns (one or two), label, labels, metric; not {entry}"
        )
    if entry["metric"] not in METRICS or entry["name"] in [*NINE, "wnli", "ax", *DOCS]:
        sys.exit(f"finetune_glue.py: the task {entry['name']!r} needs a name of its own, and a metric of {', '.join(METRICS)}")
    train, dev = (read_table(Path(entry[part]).expanduser(), entry["columns"], entry["label"]) for part in ("train", "dev"))
    labels = [str(y) for y in entry["labels"]] or sorted({str(y) for *_, y in train})
    labels = [] if entry["metric"] in ("pearson", "spearman") else labels
    if len(labels) == 1 or (entry["metric"] == "f1" and len(labels) != 2):
        sys.exit(f"finetune_glue.py: {entry['name']} has the labels {labels}; f1 needs two, the other metrics two or more")
    return Task(entry["name"], train, {entry["name"]: dev}, {}, labels, entry["metric"])


def load_task(entry, glue_dir, dataset="", submit=False, ax=False):
    """The Task of an entry of `tasks`, with the labels as numbers. SystemExit, one line, if it cannot be.

    glue_dir: a local copy of GLUE, or "" for the hub; dataset: whose offline tasks; submit: with the test sets; ax: MNLI
    with the diagnostic set.
    """
    if isinstance(entry, dict):
        task = load_own(entry)
    elif isinstance(entry, str) and entry in GLUE:
        task = load_glue(entry, glue_dir, submit, ax and entry == "mnli")
    elif isinstance(entry, str) and entry in DOCS:
        task = load_docs(entry, dataset)
    else:
        sys.exit(f"finetune_glue.py: there is no task {entry!r}; known are {', '.join([*GLUE, 'ax', *DOCS])}, and dicts")

    def number(examples):
        return [(a, b, task.labels.index(str(y)) if task.labels else float(y)) for a, b, y in examples]

    if not all([task.train, *task.dev.values()]):
        sys.exit(f"finetune_glue.py: {task.name} has a part without examples")
    try:
        task.train, task.dev = number(task.train), {name: number(part) for name, part in task.dev.items()}
    except ValueError as e:
        sys.exit(f"finetune_glue.py: {task.name} has a label that is not one of {task.labels or 'the numbers'}: {e}")
    return task


# ---------------------------------------------------------------------------------------------------------------------
# The GLUE server


def write_predictions(path, predictions, labels):
    """A file of the GLUE server: index, and the label's name, or for STS-B the value within 0 to 5."""
    names = [labels[int(p)] for p in predictions] if labels else [f"{min(max(p, 0.0), 5.0):.3f}" for p in predictions]
    with replace_file(path) as f:
        f.write(("index\tprediction\n" + "".join(f"{i}\t{name}\n" for i, name in enumerate(names))).encode())


def zip_predictions(out):
    with replace_file(out / "submission.zip") as f, zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as z:
        for path in sorted((out / "submission").glob("*.tsv")):
            z.write(path, path.name)
    wanted = [*(folder for folder, *_ in GLUE.values() if folder != "MNLI"), "MNLI-m", "MNLI-mm", "AX"]
    missing = [name for name in wanted if not (out / "submission" / f"{name}.tsv").exists()]
    note = f"; the GLUE server also wants {', '.join(missing)}: add their tasks" if missing else ""
    print(f"{out / 'submission.zip'} has the test sets' predictions of seed 0{note}")
