"""Tasks of one's own: read their files, and refuse what is wrong with them.

`load_own` is called by glue.py for each dict in `tasks`. A mistake ends in one line that names the
file and the row; what is left out is counted.
"""

import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from nanocram.faults import Fault, one_line
from nanocram.sources import TORN, open_bytes, rows_of_file

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
REGRESSION = ("pearson", "spearman")  # metrics of values; the others are of classes


class Row(NamedTuple):
    """An example in a file of one's own."""

    place: str  # "FILE, row N", for messages
    first: str
    second: str | None
    label: object


def load_own(entry, metrics, taken):
    """Return (name, train, dev, labels, metric) of the task that a dict describes.

    Its keys are those of OWN_TASK. train, dev: files, see own_rows; their examples are returned as
    (text, second text or None, class number or value). columns: of one or two texts. label: the
    column of the label. labels: its values in order, by default sorted; the second one is the
    positive one for f1. metrics: the names of those there are. taken: names of other tasks.
    """
    entry = {"label": "label", "metric": "accuracy", "labels": [], **entry}
    require_own_task(entry, metrics, taken)
    name, metric = entry["name"], entry["metric"]
    is_regression = metric in REGRESSION
    train = labelled_rows(entry, "train", is_regression)
    dev = labelled_rows(entry, "dev", is_regression)

    # values
    if is_regression:
        train = [(row.first, row.second, value_of(row)) for row in train]
        dev = [(row.first, row.second, value_of(row)) for row in dev]
        return name, train, dev, [], metric

    # classes: a dev set with a class that training never shows would measure something else
    labels = class_names(entry, train)
    forms = [in_one_form(label) for label in labels]
    in_train = {in_one_form(row.label) for row in train}
    for row in [*train, *dev]:
        if in_one_form(row.label) not in in_train:
            raise Fault(f"{row.place}: the label {row.label!r} is never in {entry['train']}")
        if in_one_form(row.label) not in forms:
            known = ", ".join(labels)[:200]
            raise Fault(f"{row.place}: the label {row.label!r} is none of {known}")

    # their numbers
    train = [(row.first, row.second, forms.index(in_one_form(row.label))) for row in train]
    dev = [(row.first, row.second, forms.index(in_one_form(row.label))) for row in dev]
    return name, train, dev, labels, metric


def require_own_task(entry, metrics, taken):
    """Raise Fault if the dict of an own task has keys or values that cannot be meant."""
    # keys, and the types of their values
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
    if entry["metric"] not in metrics or name in taken:
        known = ", ".join(metrics)
        raise Fault(f"the task {name!r} needs a name of its own, and a metric of {known}")


def labelled_rows(entry, part, is_regression):
    """Return the Rows with a label of the file entry[part]; the others are counted.

    Empty labels, "-" and, of classes, -1 and NaN mean that there is none, unless `labels` has them.
    Raise Fault for a row that is no example.
    """
    # what stands for no label
    path = entry[part]
    columns, label = entry["columns"], entry["label"]
    no_label = {"", "-", "None"}
    if not is_regression:
        no_label |= {"-1", "nan"}
    no_label -= {in_one_form(name) for name in entry["labels"]}

    # the texts and the label of each row
    rows = []
    n_rows = 0
    label_exists = False
    for place, fields in own_rows(path, {*columns, label}):
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

    # say what is missing
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
    if text.lower() == "true":
        return "1"
    if text.lower() == "false":
        return "0"
    # a number that is not whole stays as it is
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


def own_rows(path, wanted):
    """Yield (place, {column: value}) of the rows of a table; place is "FILE, row N", from row 1.

    wanted: names of columns; a .parquet is read with these only.
    path: .tsv (tabs, no quoting), .csv, .parquet, .jsonl or .json (a list of objects), plain, .gz
    or .zst. Raise Fault if it is none of them, or damaged.
    """
    if not Path(path).expanduser().is_file():
        raise Fault(f"{path} is missing; or leave its task out of `tasks`")
    file = str(Path(path).expanduser())
    number = 0
    kind = Path(path.removesuffix(".gz").removesuffix(".zst")).suffix
    try:
        # the files of other systems
        with open_bytes(file) as f:
            if f.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise Fault(f"{path} is UTF-16; save it as UTF-8")

        # the readers, two of which are those of the corpora
        if kind in (".csv", ".parquet"):
            rows = rows_of_file(file, wanted, "file", Counter())
        elif kind in (".jsonl", ".json"):
            rows = json_objects(file, kind)
        elif kind == ".tsv":
            rows = tsv_objects(file)
        else:
            kinds = ".tsv, .csv, .parquet, .json, .jsonl, each also .gz or .zst"
            raise Fault(f"{path} is of an unknown kind; known are {kinds}")

        # the rows
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
