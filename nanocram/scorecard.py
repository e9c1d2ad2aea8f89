"""The scorecard: every score in glue.json, and as a table below the published rows in glue.md."""

from statistics import median, stdev

from nanocram.docs_corpus import TASKS
from nanocram.faults import read_json, replace_file, write_json
from nanocram.glue import NINE
from nanocram.rules import differing, rules_line

# published scores, in the order of NINE
PUBLISHED = {
    "BERT-base, fully trained [paper]": [83.2, 83.4, 91.9, 86.7, 59.2, 90.6, 87.7, 89.3, 56.5],
    "BERT-base, no pretraining [paper]": [34.1, 34.1, 79.9, 17.8, 47.3, 50.0, 68.6, 77.9, 0.0],
    "crammed, A6000, first version [paper]": [83.9, 84.1, 92.2, 84.6, 53.8, 89.5, 87.3, 87.5, 44.5],
    "crammed, best released checkpoint [card]": [84.1, 84.6, 92.0, 87.4, 58.5, 90.2, 87.5, 88.9, 53.3],  # noqa: E501
}  # fmt: skip
TITLES = {"run": "pretrained", "scratch": "no pretraining"}  # of the rows of glue.json

# --------------------------------------------------------------------------------------------------
# glue.json


def read_card(out):
    """Return the content of out/glue.json, or an empty card."""
    path = out / "glue.json"
    if not path.exists():
        return {"rows": {}}
    return read_json(path)


def with_seed(old, seed, measured):
    """Return what was measured on a task, lists with one element per seed, and its statistics.

    old: the task's entry in a row of the card, or {}. measured: {name: value of this seed}, where
    "epochs" has the score after each epoch. The last epoch counts.
    """
    lists = {}
    for name, value in measured.items():
        before = old.get(name, [])
        lists[name] = [*before[:seed], value, *before[seed + 1 :]]
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
    record = {}
    if (out / "rules.json").exists():
        record = read_json(out / "rules.json")
    card["rules"] = rules_line(card, record)

    medians = {init: medians_of(row) for init, row in card["rows"].items()}
    without_cola = [task for task in NINE if task != "cola"]
    card["average"] = {init: average(row, NINE) for init, row in medians.items()}
    card["average_without_cola"] = {
        init: average(row, without_cola) for init, row in medians.items()
    }

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
    entries = {}
    for row in rows.values():
        entries.update(row)

    # a table per kind of task; wnli and ax are not in the GLUE average
    glue = [task for task in NINE if task in entries]
    docs = [task for task in TASKS if task in entries]
    other = [task for task in entries if task not in [*glue, *docs]]
    lines = ["# Scorecard", ""]
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
    metrics = [f"{task} {entry['metric']}" for task, entry in entries.items()]
    lines.append(f"Metrics: {', '.join(metrics)}.")
    if glue:
        sources = (
            "[paper] arXiv 2212.14034, [card] JonasGeiping/crammed-bert on the Hugging Face hub"
        )
        lines.append(f"Published rows: {sources}.")

    lines += warnings(rows)
    lines.append(f"Rules of cramming: {card['rules']}.")
    return "\n".join(lines) + "\n"


def table(title, tasks, rows, published=None, mean=True):
    """Return the lines of a markdown table of rows, {title: {task: entry}}, and a blank line.

    published: {title: scores in the order of NINE}, below the rows. mean: with columns of means.
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

    # the published rows
    for name, scores in (published or {}).items():
        numbers = dict(zip(NINE, scores))
        cells = [f"{numbers[task]:.1f}" for task in tasks]
        lines.append([name, *cells, *mean_cells(numbers, means)])
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def score_cell(entry):
    """Return "median ± standard deviation", the latter if there are several seeds."""
    cell = f"{entry['median']:.1f}"
    if len(entry["scores"]) > 1:
        cell += f" ± {entry['sd']:.1f}"
    return cell


def mean_cells(numbers, means):
    """Return the mean of {task: number} over each list of tasks, empty if a task is missing."""
    cells = []
    for tasks in means.values():
        mean = average(numbers, tasks)
        cells.append("" if mean is None else f"{mean:.1f}")
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

    settings = []
    for row in rows.values():
        settings += [entry["settings"] for entry in row.values()]
    differ = ", ".join(differing(settings))
    if differ:
        lines.append(f"Not all scores have the same {differ}; see glue.json.")
    return lines
