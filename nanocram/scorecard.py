"""The scorecard: every score in glue.json, and as a table above the published rows in glue.md."""

import contextlib
import json
import os
from statistics import median, stdev

from nanocram.docs_corpus import TASKS
from nanocram.faults import Fault, lock, read_json, replace_file, write_json
from nanocram.glue import NINE
from nanocram.rules import differing, overlap_of_run, read_record, rules_lines, verdicts

WITHOUT_COLA = [task for task in NINE if task != "cola"]
# published scores, in the order of NINE
PER_TASK = {
    "BERT-base, fully trained [paper]": [83.2, 83.4, 91.9, 86.7, 59.2, 90.6, 87.7, 89.3, 56.5],
    "BERT-base, no pretraining [paper]": [34.1, 34.1, 79.9, 17.8, 47.3, 50.0, 68.6, 77.9, 0.0],
    "crammed, A6000, first version [paper]": [83.9, 84.1, 92.2, 84.6, 53.8, 89.5, 87.3, 87.5, 44.5],
    "crammed, best released checkpoint [card]": [84.1, 84.6, 92.0, 87.4, 58.5, 90.2, 87.5, 88.9, 53.3],  # noqa: E501
}  # fmt: skip
PUBLISHED = {title: dict(zip(NINE, scores)) for title, scores in PER_TASK.items()}
# medians and independent reruns, all of them a day of one GPU, of which only these are published
PUBLISHED |= {
    "crammed, A6000, 13 exaFLOP [icml]": {"average": 80.4},
    "crammed, A4000, 8 exaFLOP [icml]": {"average": 79.2},
    "crammed, rerun, 2080 Ti, 5 exaFLOP [he]": {"average": 78.9, "sd": 0.7},
    "crammed, rerun, A6000, 13 exaFLOP [ufb]": {
        "average_without_cola": 83.6,
        "sst2": 91.9,
        "stsb": 85.2,
        "rte": 58.8,
        "qnli": 90.4,
        "qqp": 89.0,
        "mrpc": 87.6,
    },
}
SOURCES = [
    "[paper] arXiv 2212.14034",
    "[icml] its ICML 2023 version, medians",
    "[card] JonasGeiping/crammed-bert on the Hugging Face hub",
    "[he] He & Hofmann, arXiv 2311.01906, 3 seeds",
    "[ufb] Belcak & Wattenhofer, arXiv 2311.10770",
]
TITLES = {"run": "pretrained", "scratch": "no pretraining"}  # of the rows of glue.json
ENTRY = {"metric", "scores", "median", "sd", "epochs", "settings", "partial"}  # at least

# --------------------------------------------------------------------------------------------------
# glue.json


def read_card(out):
    """Return the content of out/glue.json, or an empty card. Raise Fault if it is damaged."""
    path = out / "glue.json"
    if not path.exists():
        return {"rows": {}}
    card = read_json(path)
    if not is_card(card):
        raise Fault(f"{path} is damaged: it is no scorecard; remove it, or restore a copy")
    return card


def is_card(card):
    """Return whether a value has the form of a card: {"rows": {init: {task: entry}}}."""
    # rows of entries
    rows = card.get("rows") if isinstance(card, dict) else None
    if not isinstance(rows, dict):
        return False
    if not all(isinstance(row, dict) for row in rows.values()):
        return False

    # and each entry has what the card is made of
    entries = []
    for row in rows.values():
        entries += row.values()
    return all(isinstance(entry, dict) and entry.keys() >= ENTRY for entry in entries)


@contextlib.contextmanager
def open_card(out, known):
    """Yield the content of out/glue.json to be changed; then write it, and glue.md.

    One process at a time has it open, so that none loses what another one has added. If the file
    was damaged meanwhile it is put aside, and `known`, as this process last saw it, is used.
    """
    path = out / "glue.json"
    with lock(out / "glue.lock", path, patience=600):
        try:
            card = read_card(out)
        except Fault as e:
            os.replace(path, out / "glue.json.damaged")
            print(f"warning: {e}. It is now {path}.damaged; the scores known here are kept")
            card = known
        yield card
        write_card(out, card)


def put_aside(out, init, task, entry, reasons):
    """Append an entry that others replace to out/glue.json.bak, and say why. The card is open."""
    line = {"row": init, "task": task, "replaced, since": reasons, "entry": entry}
    with open(out / "glue.json.bak", "a") as f:
        f.write(json.dumps(line) + "\n")
    n = len(entry["scores"])
    why = "; ".join(reasons)
    print(f"{init}: {n} old scores of {task} are in {out}/glue.json.bak now, since {why}")


def seeds_of(entry):
    """Return the seeds of the scores of an entry, {} if there is none; once they were 0, 1, ..."""
    return entry.get("seeds", list(range(len(entry.get("scores", [])))))


def with_seed(old, seed, measured):
    """Return what was measured on a task, lists with one element per seed, and its statistics.

    old: the task's entry in a row of the card, or {}. measured: {name: value of this seed}, where
    "epochs" has the score after each epoch. The last epoch counts.
    """
    # put each value at the place of its seed
    seeds = sorted({*seeds_of(old), seed})
    lists = {"seeds": seeds}
    for name, value in measured.items():
        by_seed = dict(zip(seeds_of(old), old.get(name, [])))
        by_seed[seed] = value
        lists[name] = [by_seed.get(one) for one in seeds]

    # the score of a seed is that of its last epoch
    scores = [after_epoch[-1] for after_epoch in lists["epochs"]]
    return {
        "scores": scores,
        "median": median(scores),
        "sd": stdev(scores) if len(scores) > 1 else 0.0,
        **lists,
    }


def write_card(out, card):
    """Write out/glue.json and out/glue.md, with the averages and the verdict on the rules."""
    # rules.json is of the pretraining; a Hugging Face BERT has none
    try:
        record = read_record(out)
    except Fault as e:
        print(f"warning: {e}")
        record = {}
    card["rules"] = verdicts(card["rows"], record, overlap_of_run(out))

    # averages
    medians = {init: medians_of(row) for init, row in card["rows"].items()}
    card["average"] = {init: average(row, NINE) for init, row in medians.items()}
    card["average_without_cola"] = {
        init: average(row, WITHOUT_COLA) for init, row in medians.items()
    }

    # for machines, and for people
    write_json(out / "glue.json", card)
    with replace_file(out / "glue.md") as f:
        f.write(card_text(card).encode())


def medians_of(row):
    """Return {task: median score} of a row of glue.json."""
    return {task: entry["median"] for task, entry in row.items()}


def average(numbers, tasks):
    """Return the mean of {task: number} over the tasks, or None if one is missing."""
    if not set(tasks) <= numbers.keys():
        return None
    return sum(numbers[task] for task in tasks) / len(tasks)


# --------------------------------------------------------------------------------------------------
# glue.md


def card_text(card):
    """Return the scorecard as markdown."""
    rows = {TITLES.get(init, init): row for init, row in card["rows"].items()}
    lines = ["# Scorecard", "", *tables(rows), *warnings(rows)]
    if lines[-1]:
        lines.append("")
    # an older card has one sentence
    rules = card.get("rules", {})
    if isinstance(rules, dict):
        lines += rules_lines(rules)
    return "\n".join(lines) + "\n"


def tables(rows):
    """Return the lines of the tables of rows, {title: {task: entry}}, and what the numbers are."""
    entries = {}
    for row in rows.values():
        entries.update(row)

    # a table per kind of task; wnli and ax are not in the GLUE average
    glue = [task for task in NINE if task in entries]
    docs = [task for task in TASKS if task in entries]
    other = [task for task in entries if task not in [*glue, *docs]]
    lines = []
    if glue:
        lines += table("GLUE dev", glue, rows, PUBLISHED)
    if docs:
        lines += table("Offline tasks, not GLUE", docs, rows)
    if other:
        lines += table("Other tasks", other, rows, mean=False)

    # what the numbers are
    n_seeds = set()
    for row in rows.values():
        n_seeds |= {len(entry["scores"]) for entry in row.values()}
    seeds = " or ".join(map(str, sorted(n_seeds)))
    lines.append(f"Median ± standard deviation over {seeds} fine-tuning seeds, in percent.")
    metrics = []
    for task, entry in entries.items():
        both = " / accuracy" if "accuracy" in entry else ""
        metrics.append(f"{task} {entry['metric']}{both}")
    lines.append(f"Metrics: {', '.join(metrics)}.")
    if constant_answers(rows, entries):
        lines.append("A constant answer: the commonest class, or the mean, of the training set.")
    if glue:
        lines.append(f"Published rows: {', '.join(SOURCES)}.")
    return lines


def table(title, tasks, rows, published=None, mean=True):
    """Return the lines of a markdown table of rows, {title: {task: entry}}, and a blank line.

    published: {title: {task or kind of mean: score}}, below the rows. mean: with columns of means.
    """
    # the columns
    means = {}
    if mean:
        name = "average" if set(NINE) <= set(tasks) else f"mean of these {len(tasks)}"
        means[name] = tasks
    if mean and "cola" in tasks and len(tasks) > 1:
        means["without CoLA"] = [task for task in tasks if task != "cola"]
    header = [title, *tasks, *means]
    lines = [header, ["---"] * len(header)]

    # the rows of this card
    for name, row in rows.items():
        cells = [score_cell(row[task]) if task in row else "" for task in tasks]
        lines.append([name, *cells, *mean_cells(medians_of(row), means)])

    # what needs no model
    constant = constant_answers(rows, tasks)
    if constant:
        cells = [f"{constant[task]:.1f}" if task in constant else "" for task in tasks]
        lines.append(["a constant answer", *cells, *mean_cells(constant, means)])

    # the published rows, as far as they have one of these columns
    for name, numbers in (published or {}).items():
        cells = [f"{numbers[task]:.1f}" if task in numbers else "" for task in tasks]
        cells += mean_cells(numbers, means)
        if any(cells):
            lines.append([name, *cells])
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def score_cell(entry):
    """Return "median ± standard deviation" if there are several seeds, and accuracy next to F1."""
    cell = f"{entry['median']:.1f}"
    if len(entry["scores"]) > 1:
        cell += f" ± {entry['sd']:.1f}"
    known = [accuracy for accuracy in entry.get("accuracy", []) if accuracy is not None]
    if known:
        cell += f" / {median(known):.1f}"
    return cell


def constant_answers(rows, tasks):
    """Return {task: score of the constant answer}, from the first row that knows it."""
    found = {}
    for row in rows.values():
        for task in tasks:
            if "constant" in row.get(task, {}):
                found.setdefault(task, row[task]["constant"])
    return found


def mean_cells(numbers, means):
    """Return the mean of {task: number} over each list of tasks, empty if a task is missing.

    Some published rows have only the average of all nine, or that without CoLA.
    """
    cells = []
    for tasks in means.values():
        mean = average(numbers, tasks)
        if mean is None and set(tasks) == set(NINE):
            mean = numbers.get("average")
        if mean is None and set(tasks) == set(WITHOUT_COLA):
            mean = numbers.get("average_without_cola")
        cell = "" if mean is None else f"{mean:.1f}"
        if cell and "sd" in numbers:
            cell += f" ± {numbers['sd']:.1f}"
        cells.append(cell)
    return cells


def warnings(rows):
    """Return the lines that say which scores are not comparable with others."""
    lines = []
    for title, row in rows.items():
        partial = []
        for task, entry in row.items():
            if entry["partial"]:
                n_train, n_dev = entry["n_train"], entry["n_dev"]
                partial.append(f"{task} ({n_train:,} training and {n_dev:,} dev examples)")
        if partial:
            found = ", ".join(partial)
            lines.append(
                f"On partial data, not comparable with published scores: {title}: {found}."
            )

    # a row is of one model
    for title, row in rows.items():
        made_of = [
            {key: entry.get(key) for key in ("weights", "tokenizer")} for entry in row.values()
        ]
        differ = " and ".join(differing(made_of))
        if differ:
            lines.append(f"The scores of {title} are not all of the same {differ}; see glue.json.")

    # all rows have one protocol
    settings = []
    for row in rows.values():
        settings += [entry["settings"] for entry in row.values()]
    differ = ", ".join(differing(settings))
    if differ:
        lines.append(f"Not all scores have the same {differ}; see glue.json.")
    return lines
