"""Fine-tune a model on GLUE, or on the offline tasks of the docs corpus, and write the scorecard.

python finetune_glue.py config/demo.py [--glue_init=scratch]: out/<run>/model.pt  ->  out/<run>/{glue.json, glue.md}

The protocol is the paper's "GLUE sane": the same hyperparameters for all tasks, 5 epochs, the last one counts (nothing is
selected on dev data), the median over several seeds. A further call adds rows and tasks; finished seeds are not repeated.
"""

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median, stdev

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from tokenizers import Tokenizer
from tqdm import tqdm

from configurator import configure, replace_file, write_json
from export_hf import load_bert
from model import BERT, Classifier, Config
from train import pick_device, pick_dtype

out_dir = "out/demo"  # folder of the run
dataset = "demo"  # corpus of the run; its offline tasks, if any, are in data/<dataset>/tasks
glue_init = "run"  # start: run (its model.pt), scratch (random weights), or the folder or hub id of a Hugging Face BERT
tasks = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]  # of these, wnli, docs_package, docs_next
glue_dir = ""  # folder in the layout of the official download (CoLA/train.tsv, ...); empty = nyu-mll/glue from the hub
glue_epochs = 5  # [1, inf) epochs; the rules allow up to 5
glue_batch_size = 16  # [1, inf) examples a step
glue_learning_rate = 4e-5  # (0, inf) peak learning rate
glue_warmup = 0.1  # [0, 1) share of the steps with a linear warm-up; a cosine to zero follows
glue_weight_decay = 0.0  # [0, inf) decoupled weight decay
glue_dropout = 0.1  # [0, 1) dropout on embeddings, attention, residual branches and in the head
glue_pooling = "first"  # {first, mean} what the head sees: the first position, or the mean of all
glue_seeds = 5  # [1, inf) runs a task, with seeds 0, 1, ...; their median counts
glue_max_train = 0  # [0, inf) training examples a task, 0 = all
glue_max_len = 128  # [8, inf) tokens of an example, special ones included; the longer text is cut first
device = "auto"  # {auto, cuda, mps, cpu} where to train
dtype = "auto"  # {auto, float32, bfloat16, float16} of the activations; auto is what the hardware does best

# task: (folder, columns of the texts, of the label, labels in the hub's order or [] for regression, metric, rows of train,
# of dev). The columns are those of the official download; HUB_COLUMNS has the hub's where they differ.
YES_NO = ["entailment", "not_entailment"]
GLUE = {
    "cola": ("CoLA", ["sentence"], "label", ["0", "1"], "matthews", 8551, 1043),
    "sst2": ("SST-2", ["sentence"], "label", ["0", "1"], "accuracy", 67349, 872),
    "mrpc": ("MRPC", ["#1 String", "#2 String"], "Quality", ["0", "1"], "f1", 3668, 408),
    "stsb": ("STS-B", ["sentence1", "sentence2"], "score", [], "pearson", 5749, 1500),
    "qqp": ("QQP", ["question1", "question2"], "is_duplicate", ["0", "1"], "f1", 363846, 40430),
    "mnli": ("MNLI", ["sentence1", "sentence2"], "gold_label", ["entailment", "neutral", "contradiction"], "accuracy",
             392702, 9815),
    "qnli": ("QNLI", ["question", "sentence"], "label", YES_NO, "accuracy", 104743, 5463),
    "rte": ("RTE", ["sentence1", "sentence2"], "label", YES_NO, "accuracy", 2490, 277),
    "wnli": ("WNLI", ["sentence1", "sentence2"], "label", ["0", "1"], "accuracy", 635, 71),
}  # fmt: skip
HUB_COLUMNS = {"mrpc": ["sentence1", "sentence2"], "mnli": ["premise", "hypothesis"]}
DOCS = {
    "docs_package": ["text"],
    "docs_next": ["text_a", "text_b"],
}  # no GLUE: prepare.py makes them for the offline demo
NINE = ["mnli", "mnli_mm", "sst2", "stsb", "rte", "qnli", "qqp", "mrpc", "cola"]  # what the GLUE average is over


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of predictions p and labels y, in percent; 0 where a constant leaves nothing to correlate


def matthews(p, y):
    tp, tn, fp, fn = (int(((p == a) & (y == b)).sum()) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
    spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return 100 * (tp * tn - fp * fn) / spread if spread else 0.0


def f1(p, y):
    hits, wrong = int(((p == 1) & (y == 1)).sum()), int((p != y).sum())
    return 100 * 2 * hits / (2 * hits + wrong) if hits else 0.0


def accuracy(p, y):
    return 100 * float((p == y).mean())


def pearson(p, y):
    return 100 * float(stats.pearsonr(p, y)[0]) if np.ptp(p) > 0 and np.ptp(y) > 0 else 0.0


METRICS = {"matthews": matthews, "f1": f1, "accuracy": accuracy, "pearson": pearson}


# ---------------------------------------------------------------------------------------------------------------------
# Tasks. An example is (text, second text or None, label)


def read_tsv(path, columns, label, header=None):
    """The examples of a tab-separated file without quoting. Rows with missing fields (QQP has some) are counted."""
    if not path.exists():
        sys.exit(f"finetune_glue.py: {path} is missing; get it, leave its task out of `tasks`, or --glue_dir='' for the hub")
    examples, skipped = [], 0
    csv.field_size_limit(10**9)
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
        rows = csv.reader((line.replace("\0", "") for line in f), delimiter="\t", quoting=csv.QUOTE_NONE)
        header = header or next(rows, [])
        if missing := [c for c in [*columns, label] if c not in header]:
            sys.exit(f"finetune_glue.py: {path} has no column {missing[0]!r}; its header is {', '.join(header)[:200]!r}")
        *texts, last = (header.index(c) for c in [*columns, label])
        for row in rows:
            if len(row) <= max(*texts, last) or not row[last]:
                skipped += 1
            else:
                examples.append((row[texts[0]], row[texts[1]] if len(texts) == 2 else None, row[last]))
    if skipped:
        print(f"finetune_glue.py: {path}: {skipped} rows with missing fields were left out")
    return examples


def load_folder(task, dev_sets):
    folder, columns, label, *_ = GLUE[task]
    header = ["source", "label", "mark", "sentence"] if task == "cola" else None  # CoLA's files have none
    parts = [read_tsv(Path(glue_dir) / folder / f"{stem}.tsv", columns, label, header) for stem in ["train", *dev_sets]]
    if task == "mnli":  # "-" marks pairs on which the annotators did not agree
        parts = [[e for e in part if e[2] != "-"] for part in parts]
    return parts


def load_hub(task, dev_sets):
    import datasets

    _, columns, _, labels, *_ = GLUE[task]
    try:
        data = datasets.load_dataset("nyu-mll/glue", task)
    except Exception as e:
        reason = (str(e).strip() or "no reason given").splitlines()[0]
        sys.exit(
            f"finetune_glue.py: cannot load nyu-mll/glue: {type(e).__name__}: {reason}; --glue_dir=FOLDER reads a local copy"
        )
    parts = []
    for split in ["train", *(d.replace("dev", "validation") for d in dev_sets)]:
        texts = [data[split][c] for c in HUB_COLUMNS.get(task, columns)]
        second = texts[1] if len(texts) == 2 else [None] * len(texts[0])
        targets = [labels[y] if labels else y for y in data[split]["label"]]
        parts.append(list(zip(texts[0], second, targets)))
    return parts


def load_task(task):
    """(train examples, {dev set: examples}, number of classes or 1 for regression, metric, whether rows are missing)."""
    if task in DOCS:
        folder = Path("data") / dataset / "tasks" / task
        parts = [read_tsv(folder / f"{part}.tsv", DOCS[task], "label") for part in ("train", "dev")]
        names, labels, metric, partial = [task], sorted({y for _, _, y in parts[0]}), "accuracy", False
    elif task in GLUE:
        _, _, _, labels, metric, n_train, n_dev = GLUE[task]
        names = ["mnli", "mnli_mm"] if task == "mnli" else [task]
        dev_sets = ["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"]
        parts = load_folder(task, dev_sets) if glue_dir else load_hub(task, dev_sets)
        partial = len(parts[0]) < n_train or any(len(p) < n_dev for p in parts[1:])
    else:
        sys.exit(f"finetune_glue.py: there is no task {task!r}; known are {', '.join([*GLUE, *DOCS])}")
    if not all(parts):
        sys.exit(f"finetune_glue.py: {task} has a part without examples")
    try:
        parts = [[(a, b, labels.index(y) if labels else float(y)) for a, b, y in part] for part in parts]
    except ValueError as e:
        sys.exit(f"finetune_glue.py: {task} has a label that is not one of {labels or 'the numbers'}: {e}")
    return parts[0], dict(zip(names, parts[1:])), len(labels) or 1, metric, partial


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def join(a, b, ids, last_sep=True):
    """`<cls> A <sep> B <sep>`, with an empty B for one text [repo], cut to glue_max_len from the longer of the two."""
    keep = glue_max_len - 3
    if len(a) + len(b) > keep:
        n_b = min(len(b), max(keep - len(a), keep // 2))
        a, b = a[: keep - n_b], b[:n_b]
    return [ids["cls"], *a, ids["sep"], *b, *[ids["sep"]] * last_sep]


def encode(tokenizer, ids, examples):
    """Token ids (a list a row) and labels of the examples. BERT itself is given `[CLS] A [SEP]`, as it was trained."""
    one_sep = glue_init not in ("run", "scratch") and examples[0][1] is None
    sides = ([a for a, _, _ in examples], [b or "" for _, b, _ in examples])
    a, b = ([e.ids for e in tokenizer.encode_batch_fast(side, add_special_tokens=False)] for side in sides)
    labels = np.array([y for _, _, y in examples])
    return [join(x, y, ids, not one_sep) for x, y in zip(a, b)], labels if labels.dtype == int else labels.astype(np.float32)


def batches(lengths, size, rng=None):
    """Batches of row numbers, of similar lengths. With rng in random order and without a partial one, else every row once.

    Deviation: [repo] mixes lengths. Rows are shuffled, sorted within pools of 50 batches, and the batches shuffled again.
    """
    if rng is None:
        order = np.argsort(lengths, kind="stable")
        return [order[i : i + size] for i in range(0, len(order), size)]
    order = rng.permutation(len(lengths))[: len(lengths) // size * size]
    pools = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
    found = [b for pool in pools for b in pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, size)]
    return [found[i] for i in rng.permutation(len(found))]


def collate(rows, index, ids, where):
    """Padded ids, mask and segments (1 behind the first <sep>), each (B, T), T a multiple of 8."""
    lengths = torch.tensor([len(rows[i]) for i in index])
    tokens = np.full((len(index), -(-int(lengths.max()) // 8) * 8), ids["pad"])
    for line, i in zip(tokens, index):
        line[: len(rows[i])] = rows[i]
    tokens = torch.from_numpy(tokens)
    mask = torch.arange(tokens.size(1)) < lengths[:, None]
    is_sep = (tokens == ids["sep"]).long()
    types = ((is_sep.cumsum(1) - is_sep) > 0).long() * mask
    return tokens.to(where), mask.to(where), types.to(where)


# ---------------------------------------------------------------------------------------------------------------------


def finetune(make_model, train, dev, n_classes, seed, ids, where, bar):
    """One run on train (rows, labels). Returns the predictions {dev set: classes or values} after the last epoch."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = make_model(n_classes).to(where).train()
    decay = {"lr": glue_learning_rate, "weight_decay": glue_weight_decay}
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-6, fused=True, **decay)
    scaler = torch.amp.GradScaler(where, enabled=model.bert.dtype == torch.float16)
    rows, labels = train
    labels, lengths = torch.from_numpy(labels), np.array([len(r) for r in rows])
    size = min(glue_batch_size, len(rows))
    total, step = glue_epochs * (len(rows) // size), 0
    for _ in range(glue_epochs):
        for index in batches(lengths, size, rng):
            step += 1
            p, w = step / total, glue_warmup
            factor = p / w if p < w else 0.5 * (1 + math.cos(math.pi * (p - w) / (1 - w)))
            for group in opt.param_groups:
                group["lr"] = glue_learning_rate * factor
            out = model(*collate(rows, index, ids, where))
            y = labels[index].to(where)
            loss = F.mse_loss(out[:, 0], y.float()) if n_classes == 1 else F.cross_entropy(out, y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad(set_to_none=True)
            bar.update(len(index))
    if not math.isfinite(loss.item()):
        sys.exit(f"finetune_glue.py: the loss is {float(loss)} at the end; lower glue_learning_rate, or --dtype=float32")
    model.eval()
    predictions = {}
    with torch.no_grad():
        for name, (rows, _) in dev.items():
            predictions[name] = np.zeros(len(rows))
            for index in batches(np.array([len(r) for r in rows]), 64):
                out = model(*collate(rows, index, ids, where))
                predictions[name][index] = (out[:, 0] if n_classes == 1 else out.argmax(-1)).cpu()
    return predictions


# ---------------------------------------------------------------------------------------------------------------------
# The card


def averages(row):
    """(GLUE average, the same without CoLA) of {task: entry}; None where not all of the nine (eight) numbers are there."""
    without = [t for t in NINE if t != "cola"]
    return tuple(
        sum(row[t]["median"] for t in names) / len(names) if all(t in row for t in names) else None
        for names in (NINE, without)
    )


def rules_line(card, record):
    """Whether the scores are inside the rules of cramming, and which rule is broken if not."""
    if not record and {"run", "scratch"} & card["rows"].keys():
        return "unknown, since rules.json of the pretraining run is missing"
    broken = [f"{rule} ({entry['did']})" for rule, entry in record.items() if not entry["ok"]]
    settings = [entry["settings"] for row in card["rows"].values() for entry in row.values()]
    broken += [f"2 (the row {init} starts from pretrained weights)" for init in card["rows"] if init not in ("run", "scratch")]
    if any(s["glue_epochs"] > 5 for s in settings):
        broken.append("5 brief fine-tuning (more than 5 epochs)")
    if any(s != settings[0] for s in settings):
        broken.append("5 the same hyperparameters for all tasks (they differ)")
    return "broken: " + "; ".join(broken) if broken else "inside all of them"


def cell(entry):
    spread = f" ± {entry['sd']:.1f}" if len(entry["scores"]) > 1 else ""
    return f"{entry['median']:.1f}{spread}"


def card_text(card):
    """The scorecard as markdown."""
    names = {"run": "pretrained", "scratch": "no pretraining"}
    rows, lines = card["rows"], ["# Scorecard", ""]
    entries = {t: entry for row in rows.values() for t, entry in row.items()}
    shown = [t for t in [*NINE, "wnli", *DOCS] if t in entries]
    for title, group in (
        ("GLUE dev", [t for t in shown if t not in DOCS]),
        ("Offline tasks, not GLUE", [t for t in shown if t in DOCS]),
    ):
        if not group:
            continue
        complete = all(t in group for t in NINE)
        means = ["average", "without CoLA"] if complete else [f"mean of these {len(group)}"]
        lines += [f"| {title} | " + " | ".join(group + means) + " |", "|---" * (1 + len(group + means)) + "|"]
        for init, row in rows.items():
            cells = [cell(row[t]) if t in row else "" for t in group]
            own = [row[t]["median"] for t in group if t in row]
            values = averages(row) if complete else [sum(own) / len(group) if len(own) == len(group) else None]
            cells += ["" if v is None else f"{v:.1f}" for v in values]
            lines.append(f"| {names.get(init, init)} | " + " | ".join(cells) + " |")
        lines.append("")
    seeds = sorted({len(entry["scores"]) for row in rows.values() for entry in row.values()})
    lines.append(f"Median ± standard deviation over {' or '.join(map(str, seeds))} fine-tuning seeds, in percent.")
    lines.append("Metrics: " + ", ".join(f"{t} {entries[t]['metric']}" for t in shown) + ".")
    partial = {f"{t} ({row[t]['n_train']:,} training examples)" for row in rows.values() for t in row if row[t]["partial"]}
    if partial:
        lines.append(f"On partial data, not comparable with published scores: {', '.join(sorted(partial))}.")
    return "\n".join([*lines, f"Rules of cramming: {card['rules']}.", ""])


def write_card(out, card):
    record = json.loads((out / "rules.json").read_text()) if (out / "rules.json").exists() else {}
    card["rules"] = rules_line(card, record)
    card["average"] = {init: averages(row)[0] for init, row in card["rows"].items()}
    card["average_without_cola"] = {init: averages(row)[1] for init, row in card["rows"].items()}
    write_json(out / "glue.json", card)
    with replace_file(out / "glue.md") as f:
        f.write(card_text(card).encode())


def load_start(out):
    """(Config, weights, tokenizer, special ids, pretrained pooler or None) of the run, or of a Hugging Face BERT."""
    pooler = None
    try:
        if glue_init not in ("run", "scratch"):
            model_config, weights, tokenizer, pooler = load_bert(glue_init)
            model_config = replace(model_config, dropout=glue_dropout)
        else:
            saved = torch.load(out / "model.pt", map_location="cpu", weights_only=True)  # can run no code
            model_config, weights = Config(**saved["config"] | {"dropout": glue_dropout}), saved["model"]
            tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    except FileNotFoundError:
        sys.exit(f"finetune_glue.py: {out / 'model.pt'} does not exist; run train.py with the same config first")
    except Exception as e:
        reason = (str(e).strip() or "no reason given").splitlines()[0]
        sys.exit(f"finetune_glue.py: model.pt or tokenizer.json in {out} cannot be read: {type(e).__name__}: {reason}")
    sizes = max(tokenizer.get_vocab().values()) + 1, model_config.vocab_size
    if sizes[0] != sizes[1]:
        sys.exit(f"finetune_glue.py: {out}: tokenizer.json has {sizes[0]} ids, but model.pt {sizes[1]}")
    tokenizer.encode_special_tokens = True  # "<mask>" in a text is text
    if glue_max_len > model_config.max_len:
        sys.exit(f"finetune_glue.py: glue_max_len = {glue_max_len} is over the model's max_len = {model_config.max_len}")
    ids = {}
    for name in ("pad", "cls", "sep"):
        found = tokenizer.token_to_id(f"<{name}>")
        ids[name] = tokenizer.token_to_id(f"[{name.upper()}]") if found is None else found
    return model_config, weights, tokenizer, ids, pooler


def main(config):
    out, where = Path(out_dir), pick_device(device)
    model_config, weights, tokenizer, ids, pooler = load_start(out)
    out.mkdir(parents=True, exist_ok=True)

    def make_model(n_classes):
        bert = BERT(model_config)
        if glue_init != "scratch":
            bert.load_state_dict(weights)
        bert.dtype = pick_dtype(where, dtype)
        model = Classifier(bert, n_classes, glue_pooling, glue_dropout, len(pooler["bias"]) if pooler else 1024)
        if pooler:
            model.pooler.load_state_dict(pooler)
        return model

    own = {k: v for k, v in config.items() if k in globals()}
    settings = {k: v for k, v in own.items() if k.startswith("glue_") and k not in ("glue_dir", "glue_init", "glue_seeds")}
    card = json.loads((out / "glue.json").read_text()) if (out / "glue.json").exists() else {"rows": {}}
    card["settings"] = own
    row, jobs = card["rows"].setdefault(glue_init, {}), []
    for task in tasks:
        train, dev, n_classes, metric, partial = load_task(task)
        if 0 < glue_max_train < len(train):
            pick = np.random.default_rng(0).choice(len(train), glue_max_train, replace=False)
            train, partial = [train[i] for i in pick], True
        entry = {"metric": metric, "n_train": len(train), "partial": partial, "settings": settings}
        # scores of the same task, data and settings stand; others do until a new one takes their place
        same = all(name in row and entry.items() <= row[name].items() for name in dev)
        done = min(len(row[name]["scores"]) for name in dev) if same else 0
        train, dev = encode(tokenizer, ids, train), {name: encode(tokenizer, ids, part) for name, part in dev.items()}
        jobs += [(task, seed, train, dev, n_classes, entry) for seed in range(done, glue_seeds)]

    total = sum(glue_epochs * len(train[0]) for _, _, train, *_ in jobs)
    with tqdm(total=total, unit=" examples", disable=None, smoothing=0) as bar:
        for task, seed, train, dev, n_classes, entry in jobs:
            bar.set_description(f"{glue_init}: {task}, seed {seed}")
            predictions = finetune(make_model, train, dev, n_classes, seed, ids, where, bar)
            for name, (_, labels) in dev.items():
                scores = row[name]["scores"][:seed] if seed else []
                scores.append(METRICS[entry["metric"]](predictions[name], labels))
                row[name] = entry | {"scores": scores, "median": median(scores), "sd": stdev(scores) if seed else 0.0}
                tqdm.write(f"{glue_init}: {name}, seed {seed}: {entry['metric']} {scores[-1]:.1f}")
            sys.stdout.flush()
            write_card(out, card)
    write_card(out, card)
    print("\n" + card_text(card))


if __name__ == "__main__":
    config = configure(__file__)
    globals().update({k: v for k, v in config.items() if k in globals()})
    try:
        main(config)
    except torch.OutOfMemoryError:
        sys.exit("finetune_glue.py: out of memory; lower glue_batch_size or glue_max_len")
    except OSError as e:
        sys.exit(f"finetune_glue.py: {e.strerror or e}: {e.filename}; finished seeds are saved, the same command continues")
    except KeyboardInterrupt:
        sys.exit("finetune_glue.py: interrupted; finished seeds are saved, the same command continues")
