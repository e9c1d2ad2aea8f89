"""Tasks, their files, and their metrics: GLUE, the offline tasks of the docs corpus, and one's own.

`load_task` reads a task from the official download, from the hub, or from one's own files.
`write_predictions` and `zip_predictions` write the test sets' answers for the GLUE server.
"""

import io
import json
import math
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from nanocram.docs_corpus import TASKS
from nanocram.faults import Fault, one_line, replace_file
from nanocram.sources import TORN, open_bytes, rows_of_file


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
# what a dict in `tasks` describes, and of which type
OWN_TASK = {
    "name": str,
    "train": str,
    "dev": str,
    "columns": list,
    "label": str,
    "labels": list,
    "metric": str,
}
MANY_CLASSES = 20  # numbers that are not whole, and more different ones than that, are no classes
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
    if metric in ("pearson", "spearman"):
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
    names = []
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else entry
        if name in names:
            raise Fault(f"`tasks` has two of the name {name!r}")
        names.append(name)
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
        part = name if name == "train" else "dev"
        if name not in ("train", task.name):
            part = f"dev {name}"
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
        return load_own(entry)
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
    folder = Path("data") / dataset / "tasks" / name
    train = read_table(folder / "train.tsv", TASKS[name], "label")
    dev = read_table(folder / "dev.tsv", TASKS[name], "label")
    labels = sorted({y for _, _, y in train})
    return Task(name, train, {name: dev}, labels, "accuracy")


# --------------------------------------------------------------------------------------------------
# Tasks of one's own


class Row(NamedTuple):
    """An example in a file of one's own."""

    place: str  # "FILE, row N", for messages
    first: str
    second: str | None
    label: object


def load_own(entry):
    """Return the task that a dict describes: name, train, dev, columns, label, labels, metric.

    train, dev: files, see own_rows. columns: of one or two texts. label: the column of the label.
    labels: its values in order, by default sorted; the second one is the positive one for f1.
    """
    entry = {"label": "label", "metric": "accuracy", "labels": [], **entry}
    require_own_task(entry)
    is_regression = entry["metric"] in ("pearson", "spearman")
    train = labelled_rows(entry, "train", is_regression)
    dev = labelled_rows(entry, "dev", is_regression)

    # values
    if is_regression:
        train = [(row.first, row.second, value_of(row)) for row in train]
        dev = [(row.first, row.second, value_of(row)) for row in dev]
        return Task(entry["name"], train, {entry["name"]: dev}, [], entry["metric"])

    # classes: a dev set with a class that training never shows would measure something else
    labels = class_names(entry, train)
    forms = [in_one_form(label) for label in labels]
    in_train = {in_one_form(row.label) for row in train}
    for row in [*train, *dev]:
        if in_one_form(row.label) not in in_train:
            raise Fault(f"{row.place}: the label {row.label!r} is never in {entry['train']}")
        if in_one_form(row.label) not in forms:
            raise Fault(f"{row.place}: the label {row.label!r} is none of {', '.join(labels)}")
    train = [(row.first, row.second, forms.index(in_one_form(row.label))) for row in train]
    dev = [(row.first, row.second, forms.index(in_one_form(row.label))) for row in dev]
    return Task(entry["name"], train, {entry["name"]: dev}, labels, entry["metric"])


def require_own_task(entry):
    """Raise Fault if the dict of an own task has keys or values that cannot be meant."""
    wanted = "name, train, dev, columns (one or two), label, labels, metric"
    if entry.keys() != OWN_TASK.keys():
        raise Fault(f"an own task has {wanted}; not {entry}")
    for key, kind in OWN_TASK.items():
        if not isinstance(entry[key], kind):
            what = "a text" if kind is str else "a list"
            raise Fault(f"{key} = {entry[key]!r} of the task {entry['name']!r} is not {what}")
    columns = entry["columns"]
    if len(columns) not in (1, 2) or not all(isinstance(column, str) for column in columns):
        raise Fault(f"an own task has {wanted}; not columns = {columns}")

    # scores are kept by name, and files are named after it
    name = entry["name"]
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise Fault(f"the name {name!r} of a task is no plain name of letters, digits, - and .")
    if entry["metric"] not in METRICS or name in [*NINE, "wnli", "ax", *TASKS]:
        known = ", ".join(METRICS)
        raise Fault(f"the task {name!r} needs a name of its own, and a metric of {known}")


def labelled_rows(entry, part, is_regression):
    """Return the Rows with a label of the file entry[part]; the others are counted.

    Empty labels, "-" and, of classes, -1 and NaN mean that there is none, unless `labels` has them.
    Raise Fault for a row that is no example.
    """
    path = entry[part]
    columns, label = entry["columns"], entry["label"]
    no_label = {"", "-", "None"}
    if not is_regression:
        no_label |= {"-1", "nan"}
    no_label -= {in_one_form(name) for name in entry["labels"]}

    rows = []
    n_rows = 0
    label_exists = False
    for place, fields in own_rows(path):
        n_rows += 1
        texts = [text_of(fields, column, place) for column in columns]
        label_exists |= label in fields
        value = fields.get(label)
        if isinstance(value, (list, dict)):
            raise Fault(f"{place}: the label {value!r} is not one value; a row has one label")
        if in_one_form(value) in no_label:
            continue
        second = texts[1] if len(texts) == 2 else None
        rows.append(Row(place, texts[0], second, value))

    if n_rows and not label_exists:
        raise Fault(f"{path} has no column {label!r}; its columns are {', '.join(fields)}"[:300])
    if len(rows) < n_rows:
        print(f"{path}: {n_rows - len(rows):,} rows without a label were left out")
    if len(rows) < 2:
        raise Fault(f"{path} has {len(rows)} examples; a task needs two or more in each part")
    return rows


def text_of(fields, column, place):
    """Return the text in a column of a row. Raise Fault if there is none."""
    if column not in fields:
        found = ", ".join(map(str, fields))[:200]
        raise Fault(f"{place} has no column {column!r}; its columns are {found}")
    text = fields[column]
    if text is None or isinstance(text, (list, dict, bool)):
        raise Fault(f"{place}: the column {column!r} holds {str(text)[:40]}, which is not a text")
    return str(text)


def in_one_form(label):
    """Return a label as text. 1, 1.0, "1 " and true are one label."""
    text = str(label).strip()
    if text.lower() in ("true", "false"):
        return "1" if text.lower() == "true" else "0"
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def value_of(row):
    """Return the label of a row as a finite number."""
    try:
        value = float(row.label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Fault(f"{row.place}: the label {row.label!r} is no finite number; pearson needs one")
    return value


def class_names(entry, train):
    """Return the names of the classes of an own task: those it gives, or those in train, sorted."""
    # 1 and 1.0 are one class, whose name is the first one that train has
    names = {}
    for row in train:
        names.setdefault(in_one_form(row.label), str(row.label).strip())
    labels = [str(name).strip() for name in entry["labels"]] or sorted(names.values())

    # refuse what is no set of classes
    n = len(labels)
    n_fractions = sum(is_fraction(name) for name in labels)
    if n_fractions and n > MANY_CLASSES:
        advice = 'is it regression (metric="pearson")?'
        raise Fault(f"{entry['train']} has {n:,} different numbers as labels: {advice}")
    if n > max(MANY_CLASSES, len(train) // 2):
        found = f"{n:,} different labels in {len(train):,} rows"
        raise Fault(f"{entry['train']} has {found}: is {entry['label']!r} the right column?")
    if n == 1 or (entry["metric"] == "f1" and n != 2):
        needed = "f1 needs two, the other metrics two or more"
        raise Fault(f"{entry['name']} has the labels {labels}; {needed}")

    # "pos" and "Pos" are probably one, but who knows
    lower = Counter(name.lower() for name in labels)
    alike = [name for name in labels if lower[name.lower()] > 1]
    if alike:
        print(f"warning: the labels {', '.join(alike)} of {entry['name']} differ in case alone")
    return labels


def is_fraction(text):
    """Return whether a text is a number that is not whole."""
    try:
        return not float(text).is_integer()
    except ValueError:
        return False


def own_rows(path):
    """Yield (place, {column: value}) of the rows of a table; place is "FILE, row N", from row 1.

    path: .tsv (tabs, no quoting), .csv, .parquet, .jsonl or .json (a list of objects), plain, .gz
    or .zst. Raise Fault if it is none of them, or damaged.
    """
    if not Path(path).expanduser().is_file():
        raise Fault(f"{path} is missing; or leave its task out of `tasks`")
    file = str(Path(path).expanduser())
    kind = Path(path.removesuffix(".gz").removesuffix(".zst")).suffix
    try:
        with open_bytes(file) as f:
            if f.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise Fault(f"{path} is UTF-16; save it as UTF-8")
        if kind in (".csv", ".parquet"):
            rows = rows_of_file(file, "file", Counter())
        elif kind in (".jsonl", ".json"):
            rows = json_objects(file, kind)
        elif kind == ".tsv":
            rows = tsv_objects(file)
        else:
            kinds = ".tsv, .csv, .parquet, .json, .jsonl, each also .gz or .zst"
            raise Fault(f"{path} is of an unknown kind; known are {kinds}")
        number = 0
        for number, row in enumerate(rows, 1):
            place = f"{path}, row {number}"
            if not isinstance(row, dict):
                raise Fault(f"{place} is a line that is not a JSON object")
            if None in row:
                raise Fault(f"{place} has more fields than the header")
            yield place, row
    except TORN as e:
        raise Fault(f"{path} is truncated or damaged after row {number}: {one_line(e)}") from e


def open_text(path):
    """Open a text file, decompressed. A byte-order mark is dropped, broken UTF-8 is replaced."""
    return io.TextIOWrapper(open_bytes(path), "utf-8-sig", errors="replace", newline="\n")


def json_objects(path, kind):
    """Yield the values in a .jsonl file, or of the list in a .json file; None for a broken line."""
    with open_text(path) as f:
        if kind == ".json":
            try:
                values = json.load(f)
            except ValueError as e:
                raise Fault(f"{path} is no JSON: {one_line(e)}") from e
            if not isinstance(values, list):
                raise Fault(f"{path} is no list of objects")
            yield from values
            return
        for line in f:
            if line.isspace():
                continue
            try:
                yield json.loads(line)
            except ValueError:
                yield None


def tsv_objects(path):
    """Yield the rows of a .tsv file as dicts. Raise Fault if it is not what its header says."""
    with open_text(path) as f:
        header = f.readline().rstrip("\r\n").split("\t")
        for number, line in enumerate(f, 1):
            fields = line.rstrip("\r\n").split("\t")
            advice = "tabs, line ends and quotes inside a text need .csv or .jsonl"
            if len(fields) != len(header):
                found = f"{len(fields)} fields, the header {len(header)}"
                raise Fault(f"{path}, row {number} has {found}; {advice}")
            # pandas writes a quotation mark as two, in a field between two more
            if any(re.fullmatch(r'"([^"]|"")*""([^"]|"")*"', field) for field in fields):
                raise Fault(f"{path}, row {number} is quoted like a .csv; {advice}")
            yield dict(zip(header, fields))


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
    if not folder:
        return hub_examples("ax", "test", HUB_COLUMNS["mnli"], [], None), False
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
