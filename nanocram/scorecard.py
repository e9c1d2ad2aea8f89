"""The scorecard: glue.json, where every score is kept, as a table beside the published rows and the rules of cramming."""

import json

from configurator import replace_file, write_json

DOCS = {"docs_package": ["text"], "docs_next": ["text_a", "text_b"]}  # no GLUE: prepare.py makes them for the offline demo
NINE = ["mnli", "mnli_mm", "sst2", "stsb", "rte", "qnli", "qqp", "mrpc", "cola"]  # what the GLUE average is over
PUBLISHED = {  # in the order of NINE
    "BERT-base, fully trained [paper]": [83.2, 83.4, 91.9, 86.7, 59.2, 90.6, 87.7, 89.3, 56.5],
    "BERT-base, no pretraining [paper]": [34.1, 34.1, 79.9, 17.8, 47.3, 50.0, 68.6, 77.9, 0.0],
    "crammed, A6000, first version [paper]": [83.9, 84.1, 92.2, 84.6, 53.8, 89.5, 87.3, 87.5, 44.5],
    "crammed, best released checkpoint [card]": [84.1, 84.6, 92.0, 87.4, 58.5, 90.2, 87.5, 88.9, 53.3],
}


def average(numbers, names):
    """Mean of {task: number} over names; None where one is missing."""
    return sum(numbers[t] for t in names) / len(names) if set(names) <= numbers.keys() else None


def differing(settings):
    """The keys in which these dicts are not all the same."""
    return sorted({k for s in settings for k in s.keys() | settings[0].keys() if s.get(k) != settings[0].get(k)})


def rules_record(settings, count_tokens, hours, where, world):
    """What a pretraining run did about each rule of cramming, for rules.json; the fifth is on fine-tuning.

    settings: those of the corpus, in meta.json; count_tokens: train.py's; hours on `world` devices of the kind `where`.
    """
    given = settings["tokenizer_file"]
    counted = f", an embedding from about {count_tokens:,} tokens of train.bin, on the clock" if count_tokens else ""
    return {
        "1 a masked language model from scratch": {"ok": True, "did": f"random initial weights{counted}"},
        "2 no pretrained model in the pipeline": {
            "ok": not given and "fineweb-edu" not in str(settings["sources"]).lower(),  # which a model has filtered
            "did": f"tokenizer {given or 'trained on the corpus'}, sources {settings['sources']}",
        },
        "3 raw text, no downstream data": {"ok": True, "did": "not checked here; prepare.py --overlap=FOLDER looks for GLUE"},
        "4 one GPU, 24 hours": {"ok": hours < 24.05 and world == 1, "did": f"{hours:.3f} h on {world} {where}"},
    }


def rules_line(card, record):
    """Whether the scores are inside the rules of cramming, and which rule is broken if not."""
    if not record and {"run", "scratch"} & card["rows"].keys():
        return "unknown, since rules.json of the pretraining run is missing"
    broken = [f"{rule} ({entry['did']})" for rule, entry in record.items() if not entry["ok"]]
    broken += [f"2 (the row {init} starts from pretrained weights)" for init in card["rows"] if init not in ("run", "scratch")]
    settings = {init: [entry["settings"] for entry in row.values()] for init, row in card["rows"].items()}
    if any(s["glue_epochs"] > 5 for row in settings.values() for s in row):
        broken.append("5 brief fine-tuning (more than 5 epochs)")
    for init, row in settings.items():
        if differ := differing(row):
            broken.append(f"5 the same hyperparameters for all tasks (in the row {init}, {', '.join(differ)} differ)")
    return "broken: " + "; ".join(broken) if broken else "inside all of them"


def table(title, names, rows, published=None, mean=True):
    """Lines of a markdown table of rows {title: {task: entry}}, with the published rows beneath, and with means."""
    means = {"average" if set(NINE) <= set(names) else f"mean of these {len(names)}": names} if mean else {}
    if mean and "cola" in names and len(names) > 1:
        means["without CoLA"] = [t for t in names if t != "cola"]
    lines = [[title, *names, *means], ["---"] * (1 + len(names) + len(means))]
    values = {name: {t: e["median"] for t, e in row.items()} for name, row in rows.items()}
    values |= {name: dict(zip(NINE, numbers)) for name, numbers in (published or {}).items()}
    for name, numbers in values.items():
        spread = {t: f" ± {e['sd']:.1f}" for t, e in rows.get(name, {}).items() if len(e["scores"]) > 1}
        cells = [f"{numbers[t]:.1f}{spread.get(t, '')}" if t in numbers else "" for t in names]
        ends = [average(numbers, m) for m in means.values()]
        lines.append([name, *cells, *("" if x is None else f"{x:.1f}" for x in ends)])
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def card_text(card):
    """The scorecard as markdown."""
    names = {"run": "pretrained", "scratch": "no pretraining"}
    rows, lines = {names.get(init, init): row for init, row in card["rows"].items()}, ["# Scorecard", ""]
    entries = {t: entry for row in rows.values() for t, entry in row.items()}
    glue = [t for t in NINE if t in entries]
    docs = [t for t in DOCS if t in entries]
    if glue:
        lines += table("GLUE dev", glue, rows, PUBLISHED)
    if docs:
        lines += table("Offline tasks, not GLUE", docs, rows)
    if own := [t for t in entries if t not in [*glue, *docs]]:  # wnli and ax, too, are not in the average
        lines += table("Other tasks", own, rows, mean=False)
    seeds = sorted({len(entry["scores"]) for row in rows.values() for entry in row.values()})
    lines.append(f"Median ± standard deviation over {' or '.join(map(str, seeds))} fine-tuning seeds, in percent.")
    lines.append("Metrics: " + ", ".join(f"{t} {entry['metric']}" for t, entry in entries.items()) + ".")
    if glue:
        lines.append("Published rows: [paper] arXiv 2212.14034, [card] JonasGeiping/crammed-bert on the Hugging Face hub.")
    for title, row in rows.items():
        if partial := [
            f"{t} ({e['n_train']:,} training and {e['n_dev']:,} dev examples)" for t, e in row.items() if e["partial"]
        ]:
            lines.append(f"On partial data, not comparable with published scores: {title}: {', '.join(partial)}.")
    if differ := differing([e["settings"] for row in rows.values() for e in row.values()]):
        lines.append(f"Not all scores have the same {', '.join(differ)}; see glue.json.")
    return "\n".join([*lines, f"Rules of cramming: {card['rules']}.", ""])


def write_card(out, card):
    record = json.loads((out / "rules.json").read_text()) if (out / "rules.json").exists() else {}
    card["rules"] = rules_line(card, record)
    for key, names in (("average", NINE), ("average_without_cola", [t for t in NINE if t != "cola"])):
        card[key] = {init: average({t: e["median"] for t, e in row.items()}, names) for init, row in card["rows"].items()}
    write_json(out / "glue.json", card)
    with replace_file(out / "glue.md") as f:
        f.write(card_text(card).encode())
