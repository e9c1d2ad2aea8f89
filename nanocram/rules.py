"""The rules of cramming: what a run did about each of them, and the verdict on its scores."""


def rules_record(settings, count_tokens, hours, device, world):
    """Return what a pretraining run did about each rule, for rules.json. Rule 5 is on fine-tuning.

    settings: those of the corpus, in meta.json. count_tokens: the key of that name.
    hours: of wall clock, on `world` devices of the kind `device`.
    """
    # rule 2: a given tokenizer may be of a pretrained model, and a model has filtered FineWeb-Edu
    tokenizer_file = settings["tokenizer_file"]
    is_filtered = "fineweb-edu" in str(settings["sources"]).lower()

    # counting pairs of tokens is representation learning, so it takes time of the budget
    start = "random initial weights"
    if count_tokens:
        counted = f"an embedding from about {count_tokens:,} tokens of train.bin"
        start = f"{start}, {counted}, on the clock"
    tokenizer = f"tokenizer {tokenizer_file or 'trained on the corpus'}"
    inspect = "python -m tools.inspect_data FOLDER --overlap=GLUE"
    return {
        "1 a masked language model from scratch": {"ok": True, "did": start},
        "2 no pretrained model in the pipeline": {
            "ok": not tokenizer_file and not is_filtered,
            "did": f"{tokenizer}, sources {settings['sources']}",
        },
        "3 raw text, no downstream data": {
            "ok": True,
            "did": f"not checked here; {inspect} looks for GLUE",
        },
        "4 one GPU, 24 hours": {
            "ok": hours < 24.05 and world == 1,  # the last step may end late
            "did": f"{hours:.3f} h on {world} {device}",
        },
    }


def with_origin(record, init_from):
    """Return the record of a run, with rules 1 and 2 broken if it started from other weights.

    init_from: the key of that name.
    """
    if init_from == "scratch":
        return record
    changed = {}
    for rule, entry in record.items():
        if rule.startswith("1"):
            entry = {"ok": False, "did": f"started from the weights of {init_from}"}
        elif rule.startswith("2"):
            entry = {"ok": False, "did": f"weights of {init_from}; {entry['did']}"}
        changed[rule] = entry
    return changed


def differing(settings):
    """Return the keys in which these dicts are not all the same."""
    # a key that one of them lacks differs, too
    keys = set()
    for one in settings:
        for key in one.keys() | settings[0].keys():
            if one.get(key) != settings[0].get(key):
                keys.add(key)
    return sorted(keys)


def rules_line(card, record):
    """Return whether the scores of a card are inside the rules, and otherwise what breaks them.

    record: the content of rules.json, {} if there is none.
    """
    rows = card["rows"]
    if not record and {"run", "scratch"} & rows.keys():
        return "unknown, since rules.json of the pretraining run is missing"

    # rules 1 to 4, on pretraining
    broken = []
    for rule, entry in record.items():
        if not entry["ok"]:
            broken.append(f"{rule} ({entry['did']})")
    for init in rows:
        if init not in ("run", "scratch"):
            broken.append(f"2 (the row {init} starts from pretrained weights)")

    # rule 5, on fine-tuning
    settings = {}
    for init, row in rows.items():
        settings[init] = [entry["settings"] for entry in row.values()]
    if any(one["glue_epochs"] > 5 for one in sum(settings.values(), [])):
        broken.append("5 brief fine-tuning (more than 5 epochs)")
    for init, row in settings.items():
        differ = ", ".join(differing(row))
        if differ:
            rule = "5 the same hyperparameters for all tasks"
            broken.append(f"{rule} (in the row {init}, {differ} differ)")

    if broken:
        return "broken: " + "; ".join(broken)
    return "inside all of them"
