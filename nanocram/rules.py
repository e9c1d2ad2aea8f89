"""The rules of cramming: what a run did about each of them, and the verdict on its scores.

A verdict is one of three words. What cannot be known from here is "not checked", never "kept".
"""

import os
from pathlib import Path

from nanocram.faults import Fault, read_json, sha256_of

KEPT, BROKEN, NOT_CHECKED = "kept", "broken", "not checked"
SCRATCH = "1 a masked language model from scratch"
NO_MODEL = "2 no pretrained model in the pipeline"
RAW_TEXT = "3 raw text, no downstream data"
ONE_DAY = "4 one GPU, 24 hours"
FINE_TUNING = "5 brief fine-tuning, the same for all tasks"
MAX_EPOCHS = 5
MAX_HOURS = 24.05  # the last step may end late
# Fraction of the sentences of one table of GLUE. 97 MB of Wikipedia and old books have at most
# 0.4 % of any, a corpus that contains SST-2's training file 99.8 % of these.
MAX_OVERLAP = 0.05

# These were filtered, scored or written by a model, as their cards and papers say. Names are
# compared by their lower-case letters and digits, so that any spelling is found.
MODEL_FILTERED = [
    "finewebedu",
    "fineweb2edu",
    "finewebhq",
    "ultrafineweb",
    "dclm",
    "nemotroncc",
    "smollmcorpus",
    "cosmopedia",
    "tinystories",
    "finemath",
    "stackedu",
    "openwebmath",
    "proofpile",
    "redpajama",
    "slimpajama",
    "ccnet",
    "culturax",
    "zyda",
    "essentialweb",
]
# beginnings of the ids on the hub of the corpora that the paper uses
RAW_CORPORA = (
    "wikimedia/wikipedia",
    "bookcorpus/bookcorpus",
    "lucadiliello/bookcorpusopen",
    "allenai/c4",
    "monology/pile-uncopyrighted",
    "EleutherAI/the_pile_deduplicated",
    "oscar-corpus/",
    "JonasGeiping/the_pile_WordPiecex",
)
# files that lie next to the tokenizer of a pretrained model
MODEL_FILES = ["model.safetensors", "pytorch_model.bin", "tf_model.h5", "vocab.txt"]


def entry(verdict, did):
    """Return what a record has about one rule."""
    return {"verdict": verdict, "did": did}


# --------------------------------------------------------------------------------------------------
# Pretraining


def rules_record(meta, config, hours, device, world):
    """Return what a pretraining run did about each rule, for rules.json. Rule 5 is on fine-tuning.

    meta: the content of meta.json of the corpus. config: the resolved config of the run.
    hours: of wall clock, on `world` devices of the kind `device`.
    """
    # counting pairs of tokens is representation learning, so it takes time of the budget
    start = config.get("init_from", "scratch")
    did = "random initial weights" if start == "scratch" else f"begins with the weights of {start}"
    n_counted = config["count_tokens"]
    if n_counted:
        did += f", an embedding from about {n_counted:,} tokens of train.bin, on the clock"

    in_time = hours < MAX_HOURS and world == 1
    return {
        SCRATCH: entry(KEPT if start == "scratch" else BROKEN, did),
        NO_MODEL: pipeline_verdict(meta["settings"]),
        RAW_TEXT: overlap_verdict(meta.get("overlap")),
        ONE_DAY: entry(KEPT if in_time else BROKEN, f"{hours:.3f} h on {world} {device}"),
    }


def pipeline_verdict(settings):
    """Return the entry of rule 2: where the tokenizer and the sources are from.

    settings: those of the corpus, in meta.json.
    """
    found = [tokenizer_verdict(settings["tokenizer_file"])]
    found += [source_verdict(source) for source in settings["sources"]]
    words = [verdict for verdict, _ in found]
    if BROKEN in words:
        worst = BROKEN
    elif NOT_CHECKED in words:
        worst = NOT_CHECKED
    else:
        worst = KEPT
    return entry(worst, "; ".join(what for verdict, what in found if verdict == worst))


def source_verdict(source):
    """Return (verdict, reason) for one of `sources`: what is known of its name."""
    letters = "".join(c for c in str(source).lower() if c.isalnum())
    for name in MODEL_FILTERED:
        if name in letters:
            return BROKEN, f"a model has filtered or written {source}"
    if source == "docs":
        return KEPT, "documentation of the installed packages"
    path = source.get("path", "") if isinstance(source, dict) else ""
    is_local = os.path.exists(path) or "data_files" in source
    if path.startswith(RAW_CORPORA) and not is_local:
        return KEPT, path
    return NOT_CHECKED, f"what {source} holds is not known here"


def tokenizer_verdict(path):
    """Return (verdict, reason) for a tokenizer_file: where it came from.

    A tokenizer is no pretrained model, but one that came with a pretrained model is.
    """
    if not path:
        return KEPT, "tokenizer trained on the corpus"
    if path.startswith(RAW_CORPORA) and not os.path.exists(path):
        return KEPT, f"tokenizer of the data set {path}"

    # what lies in its folder
    file = Path(path).expanduser()
    for name in MODEL_FILES:
        if file.with_name(name).exists():
            return BROKEN, f"the tokenizer {path} came with the pretrained model in {name}"
    try:
        meta = read_json(file.with_name("meta.json"))
        is_of_corpus = meta["sha256"]["tokenizer"] == sha256_of(file)
        if is_of_corpus:
            return tokenizer_verdict(meta["settings"]["tokenizer_file"])
    except (OSError, Fault, KeyError, TypeError):
        pass
    return NOT_CHECKED, f"where the tokenizer {path} is from is not known"


def overlap_verdict(overlap):
    """Return the entry of rule 3. overlap: as inspect_data leaves it in meta.json, or None.

    Some sentences of GLUE are in raw text, since its tasks were made of raw text. A corpus that
    contains a data set has most sentences of one table.
    """
    if not overlap:
        search = "python -m tools.inspect_data data/NAME --overlap=GLUE"
        return entry(NOT_CHECKED, f"{search} looks for GLUE in the corpus")
    fractions = {}
    for table, (n_found, n) in overlap.items():
        if n:
            fractions[table] = n_found / n
    if not fractions:
        return entry(NOT_CHECKED, "no table of GLUE had a sentence to look for")
    worst = max(fractions, key=fractions.get)
    n_found, n = overlap[worst]
    did = f"of {len(overlap)} tables of GLUE, at most {n_found:,} of {n:,} sentences ({worst})"
    verdict = KEPT if fractions[worst] <= MAX_OVERLAP else BROKEN
    return entry(verdict, f"{did} are in the corpus")


def overlap_of_run(out):
    """Return the overlap in meta.json of the corpus of a run, or None.

    It may have been searched after the run. A corpus of the same name with other rows has none.
    """
    try:
        config = read_json(out / "config.json")
        meta = read_json(Path("data") / config["dataset"] / "meta.json")
        if meta["sha256"]["train"] == config["train_sha256"]:
            return meta.get("overlap")
    except (OSError, Fault, KeyError, TypeError):
        pass
    return None


# --------------------------------------------------------------------------------------------------
# The scores


def read_record(out):
    """Return the content of out/rules.json, {} if there is none. Raise Fault if it is damaged."""
    path = out / "rules.json"
    if not path.exists():
        return {}
    record = read_json(path)
    if not isinstance(record, dict) or not all(isinstance(one, dict) for one in record.values()):
        raise Fault(f"{path} is damaged: it is no record of the rules; remove it")
    return record


def verdicts(rows, record, overlap=None):
    """Return {rule: {"verdict", "did"}} for the rows of a card.

    record: the content of rules.json, {} if there is none. overlap: see overlap_of_run.
    """
    # rules 1 to 4, on pretraining
    unknown = entry(NOT_CHECKED, "rules.json of the pretraining run is missing")
    found = {}
    for rule in (SCRATCH, NO_MODEL, RAW_TEXT, ONE_DAY):
        found[rule] = record.get(rule, unknown)
        # older records told "ok" without having looked
        if "verdict" not in found[rule]:
            found[rule] = entry(NOT_CHECKED, "recorded by an older version")
    if overlap:
        found[RAW_TEXT] = overlap_verdict(overlap)
    pretrained = [init for init in rows if init not in ("run", "scratch")]
    if pretrained:
        names = ", ".join(pretrained)
        found[NO_MODEL] = entry(BROKEN, f"the row {names} starts from pretrained weights")

    # rule 5, on fine-tuning
    if not any(rows.values()):
        found[FINE_TUNING] = entry(NOT_CHECKED, "nothing was fine-tuned")
        return found
    broken = []
    for init, row in rows.items():
        settings = [one.get("settings", {}) for one in row.values()]
        epochs = [one.get("glue_epochs", 0) for one in settings]
        if max(epochs, default=0) > MAX_EPOCHS:
            broken.append(f"more than {MAX_EPOCHS} epochs in the row {init}")
        differ = ", ".join(differing(settings))
        if differ:
            broken.append(f"in the row {init}, {differ} differ")
    did = "; ".join(broken) or f"at most {MAX_EPOCHS} epochs, alike in each row"
    found[FINE_TUNING] = entry(BROKEN if broken else KEPT, did)
    return found


def with_origin(record, init_from):
    """Return the record of a run, with rules 1 and 2 broken if it started from other weights.

    init_from: the key of that name.
    """
    if init_from == "scratch":
        return record
    changed = dict(record)
    changed[SCRATCH] = entry(BROKEN, f"started from the weights of {init_from}")
    changed[NO_MODEL] = entry(BROKEN, f"weights of {init_from}; {record[NO_MODEL]['did']}")
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


def rules_lines(found):
    """Return lines of markdown about {rule: {"verdict", "did"}}: a word per rule, and why."""
    if all(one["verdict"] == KEPT for one in found.values()):
        lines = ["Inside the rules of cramming:", ""]
    else:
        lines = ["Rules of cramming:", ""]
    for rule, one in found.items():
        lines.append(f"* {rule}: {one['verdict']} ({one['did']})")
    return lines
