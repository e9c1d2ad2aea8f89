"""Fine-tune a model on GLUE, or on the offline tasks of the docs corpus, and write the scorecard.

python finetune_glue.py config/demo.py [--glue_init=scratch]: out/<run>/model.pt  ->  out/<run>/{glue.json, glue.md}

The protocol is the paper's "GLUE sane": the same hyperparameters for all tasks, 5 epochs, the last one counts (nothing is
selected on dev data), the median over several seeds. A further call adds rows and tasks; finished seeds are not repeated.
"""

import hashlib
import json
import math
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median, stdev

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import torch_save
from configurator import configure, one_line
from export_hf import load_bert, load_run
from glue import ALSO, METRICS, load_task, write_predictions, zip_predictions
from hardware import no_memory, pick_device, pick_dtype, repeatable
from model import BERT, Classifier
from muon import Muon, split
from rows import n_ids, special_token
from scorecard import card_text, write_card

out_dir = "out/demo"  # folder of the run
dataset = "demo"  # corpus of the run; its offline tasks, if any, are in data/<dataset>/tasks
glue_init = "run"  # start: run (its model.pt), scratch (random weights), or the folder or hub id of a Hugging Face BERT
tasks = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]  # of these, wnli, ax, docs_package, docs_next, dicts
glue_dir = ""  # folder in the layout of the official download (CoLA/train.tsv, ...); empty = nyu-mll/glue from the hub
glue_epochs = 5  # [1, inf) epochs; the rules allow up to 5
glue_batch_size = 16  # [1, inf) examples a step
glue_optimizer = "adamw"  # {adamw, muon} muon for the matrices of the blocks, and AdamW for the rest
glue_learning_rate = 4e-5  # (0, inf) peak learning rate
glue_warmup = 0.1  # [0, 1) share of the steps with a linear warm-up; a cosine to zero follows
glue_weight_decay = 0.0  # [0, inf) decoupled weight decay
glue_dropout = 0.1  # [0, 1) dropout on embeddings, attention, residual branches and in the head
glue_pooling = "first"  # {first, mean} what the head sees: the first position, or the mean of all
glue_seeds = 5  # [1, inf) runs a task, with seeds 0, 1, ...; their median counts
glue_max_train = 0  # [0, inf) training examples a task, 0 = all
glue_submit = False  # also predict the test sets, with the first seed, into a zip for the GLUE server
glue_save = False  # keep the classifiers of the first seed in out_dir/classifiers, for export_hf.py
glue_max_len = 128  # [8, inf) tokens of an example, special ones included; the longer text is cut first
device = "auto"  # {auto, cuda, mps, cpu} where to train
dtype = "auto"  # {auto, float32, bfloat16, float16} of the activations; auto is what the hardware does best

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
    labels = np.array([0 if y is None else y for *_, y in examples])
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
    """Padded ids, mask and segments (1 behind the first <sep>), each (B, T), on a GPU with T a multiple of 8 where it can."""
    parts = [torch.tensor(rows[i]) for i in index]
    tokens = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=ids["pad"])
    if where == "cuda":
        tokens = F.pad(tokens, (0, min(-tokens.size(1) % 8, glue_max_len - tokens.size(1))), value=ids["pad"])
    mask = torch.arange(tokens.size(1)) < torch.tensor([len(p) for p in parts])[:, None]
    is_sep = (tokens == ids["sep"]).long()
    types = ((is_sep.cumsum(1) - is_sep) > 0).long() * mask
    return tokens.to(where), mask.to(where), types.to(where)


# ---------------------------------------------------------------------------------------------------------------------


def finetune(make_model, train, dev, test, n_classes, seed, ids, where, bar):
    """One run on train, (rows, labels). dev: {name: (rows, labels, metric)}, test: {file: rows}.

    Returns ({dev set: score after each epoch}, {dev set: second metric}, {test set: classes or values}, model).
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = make_model(n_classes).to(where)
    matrices, rest = split(model, model.bert.config.glu) if glue_optimizer == "muon" else ([], model.parameters())
    rates = {"lr": glue_learning_rate, "weight_decay": glue_weight_decay}
    opts = [torch.optim.AdamW(rest, betas=(0.9, 0.98), eps=1e-6, fused=True, **rates)]
    opts += [Muon(matrices, dtype=model.bert.dtype, **rates)] if matrices else []
    scaler = torch.amp.GradScaler(where, enabled=model.bert.dtype == torch.float16)
    rows, labels = train
    labels, lengths = torch.from_numpy(labels), np.array([len(r) for r in rows])
    size = min(glue_batch_size, len(rows))
    total, step = glue_epochs * (len(rows) // size), 0
    scores, also = {name: [] for name in dev}, {}
    for _ in range(glue_epochs):
        model.train()
        for index in batches(lengths, size, rng):
            step += 1
            p, w = step / total, glue_warmup
            factor = p / w if p < w else 0.5 * (1 + math.cos(math.pi * (p - w) / (1 - w)))
            for group in (group for opt in opts for group in opt.param_groups):
                group["lr"] = glue_learning_rate * factor
            out = model(*collate(rows, index, ids, where))
            y = labels[index].to(where)
            loss = F.mse_loss(out[:, 0], y.float()) if n_classes == 1 else F.cross_entropy(out, y)
            scaler.scale(loss).backward()
            for opt in opts:
                scaler.step(opt)
            scaler.update()
            model.zero_grad(set_to_none=True)
            bar.update(len(index))
        if not math.isfinite(loss.item()):
            sys.exit(f"finetune_glue.py: the loss became {float(loss)}; lower glue_learning_rate, or --dtype=float32")
        for name, (dev_rows, dev_labels, metric) in dev.items():
            found = predict(model, dev_rows, n_classes, ids, where)
            scores[name].append(METRICS[metric](found, dev_labels))
            also[name] = METRICS[ALSO.get(metric, metric)](found, dev_labels)
    return scores, also, {file: predict(model, rows, n_classes, ids, where) for file, rows in test.items()}, model


@torch.no_grad()
def predict(model, rows, n_classes, ids, where):
    """Classes, or values where n_classes is 1, of the rows of token ids, (len(rows),)."""
    model.eval()
    predictions = np.zeros(len(rows))
    for index in batches(np.array([len(r) for r in rows]), 64):
        out = model(*collate(rows, index, ids, where))
        predictions[index] = (out[:, 0] if n_classes == 1 else out.argmax(-1)).cpu()
    return predictions


def load_start(out):
    """(Config, weights, tokenizer, special ids, pretrained pooler or None) of the run, or of a Hugging Face BERT."""
    if glue_init in ("run", "scratch"):
        (model_config, weights, tokenizer), pooler = load_run(out), None
    else:
        model_config, weights, tokenizer, pooler = load_bert(glue_init)
    model_config = replace(model_config, dropout=glue_dropout)
    sizes = n_ids(tokenizer), model_config.vocab_size
    if sizes[0] > sizes[1] or (sizes[0] < sizes[1] and glue_init in ("run", "scratch")):  # Hugging Face's may be padded
        sys.exit(f"finetune_glue.py: {out}: tokenizer.json has {sizes[0]} ids, but model.pt {sizes[1]}")
    tokenizer.encode_special_tokens = True  # "<mask>" in a text is text
    if glue_max_len > model_config.max_len:
        sys.exit(f"finetune_glue.py: glue_max_len = {glue_max_len} is over the model's max_len = {model_config.max_len}")
    try:
        BERT(model_config).load_state_dict(weights)
    except (RuntimeError, ValueError) as e:
        sys.exit(f"finetune_glue.py: the weights of {glue_init} do not fit their config: {one_line(e)}")
    ids = {name: tokenizer.token_to_id(special_token(tokenizer, name)) for name in ("pad", "cls", "sep")}
    return model_config, weights, tokenizer, ids, pooler


def main(config):
    out, where = Path(out_dir), pick_device(device)
    repeatable(where)
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
    free = ("glue_dir", "glue_init", "glue_seeds", "glue_submit", "glue_save")  # they change no score
    settings = {k: v for k, v in own.items() if k.startswith("glue_") and k not in free}
    settings["dtype"] = str(pick_dtype(where, dtype))[6:]
    made_by = {"settings": own, "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}}

    def load_card():
        card = json.loads((out / "glue.json").read_text()) if (out / "glue.json").exists() else {"rows": {}}
        return card | made_by, card["rows"].setdefault(glue_init, {})

    (card, row), jobs = load_card(), []
    # predictions and classifiers of each start
    kept = out if glue_init == "run" else out / glue_init.strip("./").replace("/", "-")
    names = [task.get("name") if isinstance(task, dict) else task for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        sys.exit(f"finetune_glue.py: `tasks` has two of the name {twice.pop()!r}")
    if "ax" in tasks and "mnli" not in tasks:
        sys.exit("finetune_glue.py: the model of mnli answers ax; add mnli to `tasks`")
    for task in (load_task(t, glue_dir, dataset, glue_submit, "ax" in tasks) for t in tasks if t != "ax"):
        if 0 < glue_max_train < len(task.train):
            pick = np.random.default_rng(0).choice(len(task.train), glue_max_train, replace=False)
            task.train, task.partial = [task.train[i] for i in pick], True
        examples = hashlib.sha256(repr((task.train, task.dev, task.labels, task.metric)).encode()).hexdigest()[:16]
        common = {"n_train": len(task.train), "partial": task.partial, "settings": settings, "examples": examples}
        # scores of the same data and settings stand; others do until a new one takes their place
        same = all(name in row and common.items() <= row[name].items() for name in task.dev)
        done = min(len(row[name]["scores"]) for name in task.dev) if same else 0
        files = {file: kept / "submission" / f"{file}.tsv" for file in task.test}
        files |= {"classifier": kept / "classifiers" / f"{task.name}.pt"} if glue_save else {}
        seeds = list(range(done, glue_seeds))
        if same and not all(str(f) in row[name]["files"] and f.exists() for f in files.values() for name in task.dev):
            seeds = [0, *(x for x in seeds if x)]
        if seeds:
            train, test = encode(tokenizer, ids, task.train), {f: encode(tokenizer, ids, x)[0] for f, x in task.test.items()}
            metrics = {name: "matthews" if name == "ax" else task.metric for name in task.dev}
            dev = {name: (*encode(tokenizer, ids, x), metrics[name]) for name, x in task.dev.items()}
            jobs += [(task, seed, train, dev, test if seed == 0 else {}, common, files, same) for seed in seeds]

    counts = [len(rows) - len(rows) % min(glue_batch_size, len(rows)) for _, _, (rows, _), *_ in jobs]  # no partial batches
    with tqdm(total=glue_epochs * sum(counts), unit=" examples", disable=None, smoothing=0) as bar:
        for task, seed, train, dev, test, common, files, same in jobs:
            bar.set_description(f"{glue_init}: {task.name}, seed {seed}")
            start, n_classes = time.monotonic(), len(task.labels) or 1
            epochs, also, predictions, model = finetune(make_model, train, dev, test, n_classes, seed, ids, where, bar)
            seconds = time.monotonic() - start
            if seed == 0:
                for path in files.values():
                    path.parent.mkdir(parents=True, exist_ok=True)
                for file, values in predictions.items():
                    write_predictions(files[file], values, task.labels)
                if glue_save:
                    parts = {"config": vars(model_config), "model": model.state_dict(), "labels": task.labels}
                    parts |= {"pooling": glue_pooling, "pair": task.train[0][1] is not None, "init": glue_init}
                    torch_save(files["classifier"], parts | {"tokenizer": tokenizer.to_str()})
            card, row = load_card()  # to which another process may have added a task since
            for name, (_, dev_labels, metric) in dev.items():
                old = row[name] if seed or same else {}
                new = {"epochs": epochs[name], "seconds": seconds} | ({ALSO[metric]: also[name]} if metric in ALSO else {})
                every = {k: [*old.get(k, [])[:seed], v, *old.get(k, [])[seed + 1 :]] for k, v in new.items()}
                scores = [e[-1] for e in every["epochs"]]
                spread = {"scores": scores, "median": median(scores), "sd": stdev(scores) if len(scores) > 1 else 0.0}
                made = {"files": sorted({*old.get("files", []), *map(str, files.values())})}
                row[name] = {"metric": metric, "n_dev": len(dev_labels)} | spread | every | common | made
                tqdm.write(f"{glue_init}: {name}, seed {seed}: {metric} {scores[seed]:.1f}, {seconds:.0f} s")
            sys.stdout.flush()
            write_card(out, card)
    card, _ = load_card()
    write_card(out, card)
    if (kept / "submission").exists() and glue_submit:
        zip_predictions(kept)
    print("\n" + card_text(card))


if __name__ == "__main__":
    config = configure(__file__)
    globals().update({k: v for k, v in config.items() if k in globals()})
    try:
        main(config)
    except RuntimeError as e:
        if not no_memory(e):
            raise
        sys.exit("finetune_glue.py: out of memory; lower glue_batch_size or glue_max_len")
    except OSError as e:
        where = e.filename or out_dir
        sys.exit(f"finetune_glue.py: {e.strerror or e}: {where}; finished seeds are saved, the same command continues")
    except KeyboardInterrupt:
        sys.exit("finetune_glue.py: interrupted; finished seeds are saved, the same command continues")
