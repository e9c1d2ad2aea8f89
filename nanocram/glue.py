"""Tasks, their files, and their metrics: GLUE, and the offline tasks of the docs corpus.

`load_task` reads a task from the official download or the hub; own_tasks.py reads one's own.
`write_predictions` and `zip_predictions` write the test sets' answers for the GLUE server.
"""

import math
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from nanocram.docs_corpus import TASKS
from nanocram.faults import Fault, one_line, replace_file
from nanocram.own_tasks import REGRESSION, load_own


class GlueTask(NamedTuple):
    """A task of GLUE, as the official download has it."""

    folder: str
    columns: list  # of the one or two texts
    label: str  # column of the label
    labels: list  # in the hub's order; [] for regression
    metric: str
    n_train: int  # examples
    n_dev: int  # examples in all dev sets together
    n_test: list  # examples in each test set


SENTENCE = ["sentence"]
SENTENCES = ["sentence1", "sentence2"]
BINARY = ["0", "1"]
YES_NO = ["entailment", "not_entailment"]
NLI = ["entailment", "neutral", "contradiction"]
GLUE = {
    "cola": GlueTask("CoLA", SENTENCE, "label", BINARY, "matthews", 8551, 1043, [1063]),
    "sst2": GlueTask("SST-2", SENTENCE, "label", BINARY, "accuracy", 67349, 872, [1821]),
    "mrpc": GlueTask("MRPC", ["#1 String", "#2 String"], "Quality", BINARY, "f1",
                     3668, 408, [1725]),
    "stsb": GlueTask("STS-B", SENTENCES, "score", [], "pearson", 5749, 1500, [1379]),
    "qqp": GlueTask("QQP", ["question1", "question2"], "is_duplicate", BINARY, "f1",
                    363846, 40430, [390965]),
    "mnli": GlueTask("MNLI", SENTENCES, "gold_label", NLI, "accuracy", 392702, 19647, [9796, 9847]),
    "qnli": GlueTask("QNLI", ["question", "sentence"], "label", YES_NO, "accuracy",
                     104743, 5463, [5463]),
    "rte": GlueTask("RTE", SENTENCES, "label", YES_NO, "accuracy", 2490, 277, [3000]),
    "wnli": GlueTask("WNLI", SENTENCES, "label", BINARY, "accuracy", 635, 71, [146]),
}  # fmt: skip
# the nine numbers of the GLUE average, which leaves out wnli
NINE = ["mnli", "mnli_mm", "sst2", "stsb", "rte", "qnli", "qqp", "mrpc", "cola"]
# columns of the texts on the hub, if they are named differently there
HUB_COLUMNS = {"mrpc": SENTENCES, "mnli": ["premise", "hypothesis"]}
AX_ROWS = 1104  # examples of the diagnostic set, which the MNLI model answers
HINT = "; gluebenchmark.com/tasks has it, --glue_dir='' reads the hub"

# --------------------------------------------------------------------------------------------------
# Metrics of predictions p and labels y, in percent; 0 if a constant leaves nothing to correlate


def matthews(p, y):
    """Return the correlation of two or more classes (Gorodkin 2004), R3 of the diagnostic set."""
    classes = np.union1d(p, y)
    n_p = np.array([(p == c).sum() for c in classes], dtype=float)
    n_y = np.array([(y == c).sum() for c in classes], dtype=float)
    # both of these, and the covariance, are times the square of the number of examples
    n = len(y)
    variance_p = n**2 - n_p @ n_p
    variance_y = n**2 - n_y @ n_y
    spread = math.sqrt(variance_p * variance_y)
    if not spread:
        return 0.0
    covariance = (p == y).sum() * n - n_p @ n_y
    return 100 * float(covariance) / spread


def f1(p, y):
    """Return the F1 of class 1."""
    both = (p == 1) & (y == 1)
    hits = int(both.sum())
    wrong = int((p != y).sum())
    if not hits:
        return 0.0
    return 100 * 2 * hits / (2 * hits + wrong)


def accuracy(p, y):
    """Return the fraction of equal classes."""
    return 100 * float((p == y).mean())


def varies(p, y):
    """Return whether a correlation of two vectors is defined."""
    return np.ptp(p) > 0 and np.ptp(y) > 0


def pearson(p, y):
    """Return the linear correlation of two vectors of values."""
    if not varies(p, y):
        return 0.0
    return 100 * float(stats.pearsonr(p, y)[0])


def spearman(p, y):
    """Return the correlation of the ranks of two vectors of values."""
    if not varies(p, y):
        return 0.0
    return 100 * float(stats.spearmanr(p, y)[0])


METRICS = {
    "matthews": matthews,
    "f1": f1,
    "accuracy": accuracy,
    "pearson": pearson,
    "spearman": spearman,
}
# GLUE's second metric, which glue.json has next to the one that counts
ALSO = {"f1": "accuracy", "pearson": "spearman"}


def constant_score(metric, train, dev):
    """Return the score of the answer that ignores the text: the commonest class, or the mean.

    train, dev: arrays of labels. What counts as common is known from train.
    """
    if metric in REGRESSION:
        answer = train.mean()
    else:
        answer = np.bincount(train).argmax()
    return METRICS[metric](np.full(len(dev), answer), dev)


# --------------------------------------------------------------------------------------------------
# Tasks


@dataclass
class Task:
    """A task with its examples. An example is (text, second text or None, label).

    After load_task a label is a class number, or a value in a regression. A test set has None.
    """

    name: str
    train: list
    dev: dict  # {name on the card: examples}
    labels: list  # names of the classes; [] for regression
    metric: str
    test: dict = field(default_factory=dict)  # {name of the GLUE server's file: examples}
    partial: bool = False  # whether examples of train or dev are missing


def load_tasks(entries, glue_dir, dataset="", submit=False):
    """Yield the Task of each entry of `tasks`, and print the size of its parts.

    Raise Fault if there are none, or if two of them have one name. The entry "ax" gives the task
    "mnli" the diagnostic set. The rest is as in load_task.
    """
    if not entries:
        raise Fault("`tasks` is empty; it lists what to fine-tune, such as cola,rte")
    # scores are kept by name, so each name is there once
    names = []
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else entry
        if name in names:
            raise Fault(f"`tasks` has two of the name {name!r}")
        names.append(name)

    # ax is no task of its own: the model of mnli answers it
    ax = "ax" in names
    if ax and "mnli" not in names:
        raise Fault("the model of mnli answers ax; add mnli to `tasks`")
    for entry in entries:
        if entry != "ax":
            task = load_task(entry, glue_dir, dataset, submit, ax)
            for line in describe(task):
                print(line)
            yield task


def describe(task):
    """Return a line per part of a task: how many examples it has, and of which labels."""
    lines = []
    for name, examples in {"train": task.train, **task.dev}.items():
        # a second dev set has a name of its own
        part = name if name == "train" else "dev"
        if name not in ("train", task.name):
            part = f"dev {name}"

        # the commonest classes, or the range of the values
        labels = [label for _, _, label in examples]
        if task.labels:
            common = Counter(labels).most_common(6)
            counts = [f"{task.labels[label]} {n:,}" for label, n in common]
            found = ", ".join(counts)
            n_more = len(set(labels)) - len(common)
            if n_more:
                found += f", {n_more} more classes"
        else:
            mean = sum(labels) / len(labels)
            found = f"from {min(labels):g} to {max(labels):g}, mean {mean:.2f}"
        lines.append(f"{task.name}, {part}: {len(examples):,} examples: {found}")
    return lines


def load_task(entry, glue_dir, dataset="", submit=False, ax=False):
    """Return the Task of an entry of `tasks`. Raise Fault if it cannot be read.

    glue_dir: a local copy of GLUE, or "" for the hub. dataset: the corpus of the offline tasks.
    submit: with the test sets. ax: MNLI with the diagnostic set.
    """
    if isinstance(entry, dict):
        taken = [*NINE, "wnli", "ax", *TASKS]
        name, train, dev, labels, metric = load_own(entry, METRICS, taken)
        return Task(name, train, {name: dev}, labels, metric)
    if isinstance(entry, str) and entry in GLUE:
        task = load_glue(entry, glue_dir, submit, ax and entry == "mnli")
    elif isinstance(entry, str) and entry in TASKS:
        task = load_docs(entry, dataset)
    else:
        known = ", ".join([*GLUE, "ax", *TASKS])
        raise Fault(f"there is no task {entry!r}; known are {known}, and dicts")

    # turn the labels into numbers
    if not all([task.train, *task.dev.values()]):
        raise Fault(f"{task.name} has a part without examples")
    try:
        task.train = with_numbers(task.train, task.labels)
        for name, examples in task.dev.items():
            task.dev[name] = with_numbers(examples, task.labels)
    except ValueError as e:
        known = task.labels or "the numbers"
        raise Fault(f"{task.name} has a label that is not one of {known}: {e}") from e
    return task


def with_numbers(examples, labels):
    """Return the examples with class numbers or values as labels.

    Raise ValueError for a label that is not one of `labels`, or no number.
    """
    if labels:
        return [(a, b, labels.index(str(y))) for a, b, y in examples]
    return [(a, b, float(y)) for a, b, y in examples]


def load_glue(name, folder, submit, ax):
    """Return a GLUE task. submit: with its test sets. ax: with the diagnostic set."""
    # MNLI has two dev sets, one on the genres of the training set and one on others
    spec = GLUE[name]
    dev_parts = {name: "dev"}
    test_parts = {spec.folder: "test"}
    if name == "mnli":
        dev_parts = {"mnli": "dev_matched", "mnli_mm": "dev_mismatched"}
        test_parts = {"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"}
    train = load_part(name, "train", folder)
    dev = {key: load_part(name, part, folder) for key, part in dev_parts.items()}
    task = Task(name, train, dev, spec.labels, spec.metric)
    n_dev = sum(map(len, dev.values()))
    task.partial = len(train) < spec.n_train or n_dev < spec.n_dev

    # the server takes complete test sets only
    if submit:
        for (file, part), n_test in zip(test_parts.items(), spec.n_test):
            task.test[file] = load_part(name, part, folder)
            require_rows(file, task.test[file], n_test)
    if ax:
        examples, has_labels = load_diagnostic(folder)
        if has_labels:
            task.dev["ax"] = examples
        task.test["AX"] = [(a, b, None) for a, b, _ in examples]
        if submit:
            require_rows("AX", examples, AX_ROWS)
    return task


def require_rows(file, examples, n_test):
    if len(examples) != n_test:
        found = f"{file}'s test set has {len(examples)} rows"
        raise Fault(f"{found}, the GLUE server wants {n_test}")


def load_docs(name, dataset):
    """Return an offline task of the docs corpus, as data/<dataset>/tasks has it."""
    # written by prepare.py, for a corpus that contains "docs"
    folder = Path("data") / dataset / "tasks" / name
    train = read_table(folder / "train.tsv", TASKS[name], "label")
    dev = read_table(folder / "dev.tsv", TASKS[name], "label")
    labels = sorted({y for _, _, y in train})
    return Task(name, train, {name: dev}, labels, "accuracy")


# --------------------------------------------------------------------------------------------------
# Files of the official download and the hub


def load_part(task, part, folder):
    """Return the examples of a part of a GLUE task: train, dev, test, or for MNLI dev_matched, ...

    folder: the local copy of GLUE, or "" for the hub.
    """
    spec = GLUE[task]
    label = None if part.startswith("test") else spec.label
    if not folder:
        split = part.replace("dev", "validation")
        columns = HUB_COLUMNS.get(task, spec.columns)
        return hub_examples(task, split, columns, spec.labels, label)

    header = None
    if task == "cola" and label:  # only CoLA's test set has a header
        header = ["source", "label", "mark", "sentence"]
    path = Path(folder) / spec.folder / f"{part}.tsv"
    examples = read_table(path, spec.columns, label, header, HINT)
    # on some pairs of MNLI the annotators did not agree; their label is "-"
    return [example for example in examples if example[2] != "-"]


def load_diagnostic(folder):
    """Return the examples of the diagnostic set, and whether they have labels.

    Of all copies, only diagnostic-full.tsv of the official site has the labels.
    """
    # the hub has the texts alone
    if not folder:
        return hub_examples("ax", "test", HUB_COLUMNS["mnli"], [], None), False

    # a folder may have either file
    full = Path(folder).expanduser() / "diagnostic" / "diagnostic-full.tsv"
    if full.exists():
        return read_table(full, ["Premise", "Hypothesis"], "Label"), True
    plain = full.with_name("diagnostic.tsv")
    return read_table(plain, GLUE["mnli"].columns, None, hint=HINT), False


def hub_examples(name, split, columns, labels, label):
    """Return the examples of a split of nyu-mll/glue; without labels if `label` is None."""
    import datasets

    try:
        data = datasets.load_dataset("nyu-mll/glue", name, split=split)
    except Exception as e:
        local = "--glue_dir=FOLDER reads a local copy"
        raise Fault(f"cannot load nyu-mll/glue: {one_line(e)}; {local}") from e

    # the hub has numbers for classes
    first = data[columns[0]]
    nothing = [None] * len(first)
    second = nothing
    if len(columns) == 2:
        second = data[columns[1]]
    targets = data["label"]
    if not label:
        targets = nothing
    elif labels:
        targets = [labels[y] for y in targets]
    return list(zip(first, second, targets))


def read_table(path, columns, label, header=None, hint=""):
    """Return the examples in a tab-separated file, which knows no quoting.

    columns: of one or two texts. label: column of the label, or None for a test set.
    header: the column names if the file does not begin with them.
    Rows with missing fields (QQP has some) are counted and left out. In a test set they stay, since
    the GLUE server counts the rows.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise Fault(f"{path} is missing{hint}; or leave its task out of `tasks`")
    wanted = [*columns, label] if label else columns
    examples = []
    skipped = 0
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as f:
        # find the columns; the labels of a test set are not read
        lines = (line.rstrip("\r\n").split("\t") for line in f)
        header = header or next(lines, [])
        for column in wanted:
            if column not in header:
                found = ", ".join(header)[:200]
                raise Fault(f"{path} has no column {column!r}; its header is {found!r}")

        # take the texts and the label of each row
        for line in lines:
            row = dict(zip(header, line))
            fields = [row.get(column) for column in wanted]
            if label and (None in fields or fields[-1] == ""):
                skipped += 1
                continue
            target = fields.pop() if label else None
            texts = ["" if text is None else text for text in fields]
            second = texts[1] if len(texts) == 2 else None
            examples.append((texts[0], second, target))
    if skipped:
        print(f"{path}: {skipped} rows with missing fields were left out")
    return examples


# --------------------------------------------------------------------------------------------------
# The GLUE server


def write_predictions(path, predictions, labels):
    """Write a file of the GLUE server: per row the index, and the name of the label or a value.

    The only regression, STS-B, has values from 0 to 5.
    """
    lines = ["index\tprediction\n"]
    for i, prediction in enumerate(predictions):
        if labels:
            answer = labels[int(prediction)]
        else:
            answer = f"{min(max(prediction, 0.0), 5.0):.3f}"
        lines.append(f"{i}\t{answer}\n")
    with replace_file(path) as f:
        f.write("".join(lines).encode())


def write_dev_predictions(path, predictions, answers, labels):
    """Write a table of what a model said about each dev example, and of what is right.

    answers: the right classes, or the values of a regression. labels: the names of the classes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["index\tprediction\tlabel\n"]
    for i, (prediction, answer) in enumerate(zip(predictions, answers)):
        if labels:
            lines.append(f"{i}\t{labels[int(prediction)]}\t{labels[answer]}\n")
        else:
            lines.append(f"{i}\t{prediction:.9g}\t{answer:.9g}\n")
    with replace_file(path) as f:
        f.write("".join(lines).encode())


def zip_predictions(folder):
    """Zip folder/submission for the GLUE server. Return a line that says what the zip has."""
    path = folder / "submission.zip"
    files = sorted((folder / "submission").glob("*.tsv"))
    with replace_file(path) as f, zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as z:
        for file in files:
            z.write(file, file.name)

    # MNLI has two files instead of one, and the diagnostic set has its own
    wanted = [spec.folder for spec in GLUE.values() if spec.folder != "MNLI"]
    wanted += ["MNLI-m", "MNLI-mm", "AX"]
    found = [file.stem for file in files]
    missing = ", ".join(name for name in wanted if name not in found)
    note = f"; the GLUE server also wants {missing}: add their tasks" if missing else ""
    return f"{path} has the test sets' predictions of seed 0{note}"
