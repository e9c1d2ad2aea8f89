"""Fine-tune a model on GLUE, or on the offline tasks of the docs corpus, and write the scorecard.

python finetune_glue.py config/demo.py [--glue_init=scratch]
out/<run>/model.pt  ->  out/<run>/{glue.json, glue.md}

The protocol is the paper's "GLUE sane". All tasks have the same hyperparameters. There are 5 epochs
and the last one counts, so that nothing is selected on dev data. The median over several seeds is
the score. A further call adds rows and tasks to the card; finished seeds are not repeated, unless
the weights, the tokenizer, the examples or a setting have changed. The paper used MNLI alone to
develop the recipe and this protocol, so its other scores are not selected on their dev sets.
"""

import os

# Threads that wait fall asleep sooner: next to other work a step is several times as fast
# (results/bench). libgomp reads this while torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import hashlib
import math
import platform
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import BERT, Classifier
from nanocram.configurator import configure
from nanocram.device import make_deterministic, pick_device, pick_dtype
from nanocram.faults import Fault, one_line, run_script
from nanocram.glue import (
    ALSO,
    METRICS,
    Task,
    constant_score,
    load_tasks,
    write_dev_predictions,
    write_predictions,
    zip_predictions,
)
from nanocram.huggingface import load_bert
from nanocram.optim import make_optimizers
from nanocram.rules import differing, read_record
from nanocram.runs import open_run, save_torch
from nanocram.scorecard import card_text, open_card, put_aside, read_card, seeds_of, with_seed
from nanocram.tokenizer import special_ids, vocab_size_of

out_dir = "out/demo"  # folder of the run
dataset = "demo"  # corpus of the run; its offline tasks, if any, are in data/<dataset>/tasks
# what to fine-tune
glue_init = "run"  # run (its model.pt), scratch (random weights), or a folder or id of Hugging Face
# of these, and of wnli, ax, docs_package, docs_next, and dicts that describe tasks of your own
tasks = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
# folder like the official download (CoLA/train.tsv, ...); empty = nyu-mll/glue from the hub
glue_dir = ""
glue_max_train = 0  # [0, inf) training examples per task, 0 = all
glue_max_len = 128  # [8, inf) tokens per example, special ones included; the longer text is cut
# training
glue_epochs = 5  # [1, inf) epochs; the rules allow up to 5
glue_batch_size = 16  # [1, inf) examples per step
glue_optimizer = "adamw"  # {adamw, muon} muon: for the matrices of the blocks, AdamW for the rest
glue_learning_rate = 4e-5  # (0, inf) peak learning rate
glue_warmup = 0.1  # [0, 1) fraction of the steps with a linear warm-up; a cosine to zero follows
glue_weight_decay = 0.0  # [0, inf) decoupled weight decay
glue_dropout = 0.1  # [0, 1) dropout on embeddings, attention, residual branches and in the head
glue_pooling = "first"  # {first, mean} the head sees the first position, or the mean of all
glue_seeds = 5  # [1, inf) runs per task, with seeds 0, 1, ...; their median counts
# output
glue_submit = False  # predict the test sets with the first seed, in a zip for the GLUE server
glue_save = False  # keep the first seed's classifiers in out_dir/classifiers, for tools.export_hf
# [0, inf) save the state after an epoch if the last save is that many minutes old
glue_checkpoint_minutes = 0.5
# hardware
device = "auto"  # {auto, cuda, mps, cpu} where to train
dtype = "auto"  # {auto, float32, bfloat16, float16} of activations; auto: what the device does best

# --------------------------------------------------------------------------------------------------
# Batches


def join(a, b, ids, max_len, last_sep=True):
    """Return `<cls> A <sep> B <sep>`, cut to max_len tokens from the longer one of the two texts.

    a, b: lists of token ids. For a task with one text B is empty, as in [repo].
    """
    limit = max_len - 3
    if len(a) + len(b) > limit:
        # B may have half of the space, or more if A needs less
        space = max(limit // 2, limit - len(a))
        n_b = min(len(b), space)
        a = a[: limit - n_b]
        b = b[:n_b]
    row = [ids["cls"], *a, ids["sep"], *b]
    if last_sep:
        row.append(ids["sep"])
    return row


def batches(lengths, size, rng=None):
    """Return batches of row numbers, each an array, of rows of similar lengths.

    With rng they come in random order, all of the same size; the rest of the rows is left out.
    Without rng every row comes once.
    """
    if rng is None:
        order = np.argsort(lengths, kind="stable")
        return [order[i : i + size] for i in range(0, len(order), size)]

    # A batch is padded to its longest row, and padding takes as much time as text. If all rows were
    # sorted, the batches would be the same in each epoch. So the rows are shuffled, sorted within
    # pools of 50 batches, and the batches shuffled. Deviation: [repo] mixes lengths.
    n_full = len(lengths) // size
    order = rng.permutation(len(lengths))
    order = order[: n_full * size]
    found = []
    for i in range(0, len(order), 50 * size):
        pool = order[i : i + 50 * size]
        by_length = np.argsort(lengths[pool], kind="stable")
        found.extend(pool[by_length].reshape(-1, size))
    return [found[i] for i in rng.permutation(n_full)]


def collate(rows, index, ids, device, max_len):
    """Return ids, mask and segments, each (B, T), of the rows in a batch, on the device.

    mask is True at real tokens. The segment is 1 after the first <sep>, 0 before it and in padding.
    """
    # pad to the longest row; a GPU is faster if T is a multiple of 8
    pad = ids["pad"]
    parts = [torch.tensor(rows[i]) for i in index]
    tokens = pad_sequence(parts, batch_first=True, padding_value=pad)
    T = tokens.size(1)
    if device == "cuda":
        longer = min(-T % 8, max_len - T)
        tokens = F.pad(tokens, (0, longer), value=pad)
        T = tokens.size(1)

    # tell text from padding, and the first text from the second
    lengths = torch.tensor([len(part) for part in parts])
    mask = torch.arange(T) < lengths[:, None]
    is_sep = (tokens == ids["sep"]).long()
    n_seps_before = is_sep.cumsum(1) - is_sep
    types = (n_seps_before > 0).long() * mask
    return tokens.to(device), mask.to(device), types.to(device)


# --------------------------------------------------------------------------------------------------
# One fine-tuning run

CHECK_STEPS = 100  # steps after which the loss is looked at; each look waits for the GPU


def learning_rate_factor(progress, warmup):
    """Return the learning rate as a fraction of its peak. progress: steps done, as a fraction.

    The rate grows from zero, since at first the head is random, and so are the gradients that it
    sends into the pretrained weights. Then a cosine takes it back to zero: the weights settle.
    """
    if progress < warmup:
        return progress / warmup
    after = (progress - warmup) / (1 - warmup)
    return 0.5 * (1 + math.cos(math.pi * after))


def loss_of(outputs, labels):
    """Return the loss of outputs (B, n_classes) against labels (B,).

    Classes have the cross-entropy. A regression has one output per text, and its squared error.
    """
    if outputs.size(1) == 1:
        return F.mse_loss(outputs[:, 0], labels.float())
    return F.cross_entropy(outputs, labels)


def finetune(model, train, dev, ids, seed, config, bar, checkpoint=None):
    """Train a classifier on (rows, labels), and score it on the dev sets after each epoch.

    dev: {name: (rows, labels, metric)}. Rows are lists of token ids, labels an array.
    checkpoint: a Checkpoint, to continue after a kill. Return the Result.
    """
    rows, labels = train
    labels = torch.from_numpy(labels)
    batch_size = min(config["glue_batch_size"], len(rows))
    n_steps = config["glue_epochs"] * (len(rows) // batch_size)
    lengths = np.array([len(row) for row in rows])
    max_len = config["glue_max_len"]
    peak = config["glue_learning_rate"]
    decay = config["glue_weight_decay"]
    name = config["glue_optimizer"]
    optimizers = make_optimizers(model, name, peak, decay, betas=(0.9, 0.98), eps=1e-6)  # [repo]
    device = model.head.weight.device.type
    # in fp16 small gradients would become 0, so the loss is scaled up
    scaler = torch.amp.GradScaler(device, enabled=model.bert.dtype == torch.float16)
    parts = {"model": model, "scaler": scaler}
    parts |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}
    result = checkpoint.load(parts) if checkpoint else Result()

    step = result.n_epochs * (len(rows) // batch_size)
    bar.update(step * batch_size)
    for epoch in range(result.n_epochs, config["glue_epochs"]):
        # an epoch's order and dropout depend on nothing before it, so it can be the first after a
        # kill
        began = time.monotonic()
        rng = np.random.default_rng([seed, epoch])
        torch.manual_seed(1000 * seed + epoch + 1)
        model.train()  # with dropout, which predict turns off
        for index in batches(lengths, batch_size, rng):
            # set the learning rate
            step += 1
            factor = learning_rate_factor(step / n_steps, config["glue_warmup"])
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * factor

            # learn from the batch: all weights move, not those of the head only
            outputs = model(*collate(rows, index, ids, device, max_len))
            loss = loss_of(outputs, labels[index].to(device))
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad(set_to_none=True)
            bar.update(len(index))
            if step % CHECK_STEPS == 0 or step == n_steps:
                require_finite(loss.item(), step)

        # only measure: nothing stops early or goes back to a better epoch
        result.add_epoch(model, dev, ids, max_len, time.monotonic() - began)
        if checkpoint and step < n_steps:
            checkpoint.save(parts, result)
    return result


def require_finite(loss, step):
    """Raise Fault if the loss is infinite or not a number: all weights would be lost."""
    if not math.isfinite(loss):
        hint = "lower glue_learning_rate, or --dtype=float32"
        raise Fault(f"the loss became {loss} within {step:,} steps; {hint}")


@dataclass
class Result:
    """What one fine-tuning run has measured so far."""

    epochs: dict = field(default_factory=dict)  # {name on the card: score after each epoch}
    also: dict = field(default_factory=dict)  # {name: second metric after the last epoch}
    n_epochs: int = 0
    seconds: float = 0.0
    # {name: class or value of each dev example after the last epoch}; a checkpoint lacks it
    predictions: dict = field(default_factory=dict)

    def add_epoch(self, model, dev, ids, max_len, seconds):
        """Score the model on the dev sets, see finetune. seconds: of training in this epoch."""
        began = time.monotonic()
        for name, (rows, labels, metric) in dev.items():
            found = predict(model, rows, ids, max_len)
            score = METRICS[metric](found, labels)
            self.epochs.setdefault(name, []).append(score)
            if metric in ALSO:
                self.also[name] = METRICS[ALSO[metric]](found, labels)
            self.predictions[name] = found
        self.n_epochs += 1
        self.seconds += seconds + time.monotonic() - began


class Checkpoint:
    """The state of one fine-tuning run after an epoch, in a file until its scores are saved."""

    def __init__(self, path, origin, minutes):
        """origin: what the scores depend on. minutes: how old the last save must be for another."""
        self.path = path
        self.origin = origin
        self.seconds = 60 * minutes
        self.last_save = time.monotonic()

    def load(self, parts):
        """Load a saved state into {name: model, optimizer or scaler}. Return its Result.

        A file of other weights, examples or settings, or a damaged one, counts as none.
        """
        if not self.path.exists():
            return Result()
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            result = Result(**saved["result"])
            if saved["origin"] != self.origin:
                return Result()
        except Exception as e:  # torch raises nothing more special
            print(f"warning: {self.path} cannot be read: {one_line(e)}; the seed begins anew")
            return Result()
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        tqdm.write(f"{self.path}: continuing after {result.n_epochs} epochs")
        return result

    def save(self, parts, result):
        """Write the state, unless the last save was a moment ago: that is soon repeated."""
        if time.monotonic() - self.last_save < self.seconds:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        states = {name: part.state_dict() for name, part in parts.items()}
        measured = vars(result) | {"predictions": {}}
        save_torch(self.path, states | {"origin": self.origin, "result": measured})
        self.last_save = time.monotonic()


@torch.no_grad()
def predict(model, rows, ids, max_len):
    """Return the class, or in a regression the value, of each row of token ids, (len(rows),)."""
    model.eval()
    device = model.head.weight.device.type
    lengths = np.array([len(row) for row in rows])
    predictions = np.zeros(len(rows))
    for index in batches(lengths, 64):
        outputs = model(*collate(rows, index, ids, device, max_len))
        is_regression = outputs.size(1) == 1
        best = outputs[:, 0] if is_regression else outputs.argmax(-1)
        predictions[index] = best.cpu()
    return predictions


# --------------------------------------------------------------------------------------------------
# What every run begins with


class Start:
    """The encoder, the tokenizer and the pretrained head, if any, that all runs begin with."""

    def __init__(self, config, device):
        """Load the run or the Hugging Face BERT. Raise Fault if it cannot be fine-tuned."""
        out = config["out_dir"]
        self.init = config["glue_init"]
        self.is_ours = self.init in ("run", "scratch")
        self.pooling = config["glue_pooling"]
        self.max_len = config["glue_max_len"]
        self.device = device
        self.dtype = pick_dtype(device, config["dtype"])

        # the weights
        if self.is_ours:
            bert, self.tokenizer = open_run(out, dropout=config["glue_dropout"])
            self.model_config = bert.config
            self.weights = {} if self.init == "scratch" else bert.state_dict()
            self.pooler = None
            self.two_seps = True
        else:
            theirs = load_bert(self.init)
            self.weights, self.tokenizer = theirs.weights, theirs.tokenizer
            self.pooler, self.two_seps = theirs.pooler, theirs.two_seps
            self.model_config = replace(theirs.config, dropout=config["glue_dropout"])
            try:
                BERT(self.model_config).load_state_dict(self.weights)
            except (RuntimeError, ValueError) as e:
                message = f"the weights of {self.init} do not fit their config"
                raise Fault(f"{message}: {one_line(e)}") from e

        # the tokenizer; the embedding of a Hugging Face BERT may have more rows than it needs
        n_ids = vocab_size_of(self.tokenizer)
        n_rows = self.model_config.vocab_size
        if n_ids > n_rows or (n_ids < n_rows and self.is_ours):
            raise Fault(f"{out}: tokenizer.json has {n_ids} ids, but model.pt {n_rows}")
        if self.max_len > self.model_config.max_len:
            limit = f"the model's max_len = {self.model_config.max_len}"
            raise Fault(f"glue_max_len = {self.max_len} is over {limit}")
        self.tokenizer.encode_special_tokens = True  # "<mask>" in a text is text
        self.ids = special_ids(self.tokenizer)

    def identity(self):
        """Return the SHA-256 of the weights with their architecture, and of the tokenizer.

        A score belongs to both. Without pretraining there is an architecture only.
        """
        architecture = replace(self.model_config, dropout=0.0)
        weights = hashlib.sha256(repr(vars(architecture)).encode())
        for part in (self.weights, self.pooler or {}):
            for name, tensor in sorted(part.items()):
                weights.update(name.encode())
                weights.update(tensor.contiguous().numpy())
        tokenizer = hashlib.sha256(self.tokenizer.to_str().encode())
        return {"weights": weights.hexdigest(), "tokenizer": tokenizer.hexdigest()}

    def encode(self, examples, what):
        """Return a list of token ids per example (text, second text or None, label).

        what: names the examples, to say how many of them are cut.
        """
        first = [a for a, _, _ in examples]
        second = [b or "" for _, b, _ in examples]
        first = self.tokenizer.encode_batch_fast(first, add_special_tokens=False)
        second = self.tokenizer.encode_batch_fast(second, add_special_tokens=False)
        # the original BERT was trained on `[CLS] A [SEP]` if there is one text
        is_single = examples[0][1] is None
        last_sep = self.two_seps or not is_single
        rows = []
        n_cut = 0
        for a, b in zip(first, second):
            n_cut += len(a.ids) + len(b.ids) + 3 > self.max_len
            rows.append(join(a.ids, b.ids, self.ids, self.max_len, last_sep))
        if n_cut:
            found = f"{n_cut:,} of {len(rows):,} have more than {self.max_len} tokens"
            print(f"{what}: {found} (glue_max_len), and their ends are cut")
        return rows

    def classifier(self, n_classes, seed):
        """Return a new classifier on the device, with the random numbers of a seed.

        The encoder turns the tokens of a text into one vector each, (B, T, n_embd). The head needs
        one vector per text, (B, n_embd): that of <cls>, which sees all other tokens (pooling
        "first"), or the mean over all real tokens (pooling "mean"). Then the head computes
        linear -> tanh -> dropout -> linear -> (B, n_classes). It is 1024 units wide as in the
        paper, or as wide as BERT's own pooling layer if there are pretrained weights for it.
        """
        # the weights that are not loaded are random, and differ between seeds
        torch.manual_seed(seed)
        bert = BERT(self.model_config)
        if self.weights:
            bert.load_state_dict(self.weights)
        bert.dtype = self.dtype
        width = len(self.pooler["bias"]) if self.pooler else 1024
        model = Classifier(bert, n_classes, self.pooling, self.model_config.dropout, width)
        if self.pooler:
            model.pooler.load_state_dict(self.pooler)
        return model.to(self.device)


# --------------------------------------------------------------------------------------------------
# The list of jobs


@dataclass
class Job:
    """One fine-tuning run: a task with one seed."""

    task: Task
    seed: int
    train: tuple  # (rows of token ids, labels)
    dev: dict  # {name on the card: (rows, labels, metric)}
    test: dict  # {file for the GLUE server: rows}, which the first seed predicts
    origin: dict  # what the scores depend on, as glue.json has it
    folder: Path  # for predictions, classifiers and the checkpoint
    files: dict  # {name: path} of what the first seed writes

    def checkpoint(self):
        """Return the path of the checkpoint of this run."""
        return self.folder / "checkpoints" / f"{self.task.name}-{self.seed}.pt"

    def n_examples(self, batch_size):
        """Return the examples in an epoch of full batches."""
        n_rows = len(self.train[0])
        return n_rows - n_rows % min(batch_size, n_rows)


def missing_jobs(task, row, folder, start, config, settings):
    """Return the jobs of a task whose results are missing in a row of the card.

    folder: for all files. settings: what all scores of this call depend on, a dict.
    """
    # what these scores depend on
    limit_examples(task, config["glue_max_train"])
    content = (task.train, task.dev, task.labels, task.metric)
    origin = {
        "n_train": len(task.train),
        "partial": task.partial,
        "examples": hashlib.sha256(repr(content).encode()).hexdigest()[:16],
        **settings,
    }

    # keep the scores that depend on the same; others stay until a new one replaces them
    entries = [row.get(name, {}) for name in task.dev]
    done = set(range(config["glue_seeds"]))
    for entry in entries:
        if changes(entry, origin):
            done = set()
        done &= set(seeds_of(entry))

    # the first seed also writes files; if one of them is missing, run it again
    files = {file: folder / "submission" / f"{file}.tsv" for file in task.test}
    if config["glue_save"]:
        files["classifier"] = folder / "classifiers" / f"{task.name}.pt"
    if done and not all(is_written(path, entries) for path in files.values()):
        done.discard(0)
    seeds = [seed for seed in range(config["glue_seeds"]) if seed not in done]
    if not seeds:
        return []

    # turn texts into token ids
    train = (start.encode(task.train, f"{task.name}, train"), labels_of(task, task.train))
    dev = {}
    for name, examples in task.dev.items():
        metric = "matthews" if name == "ax" else task.metric
        rows = start.encode(examples, f"{name}, dev")
        dev[name] = (rows, labels_of(task, examples), metric)
    test = {}
    for file, examples in task.test.items():
        test[file] = start.encode(examples, f"{file}, test")
    return [Job(task, seed, train, dev, test, origin, folder, files) for seed in seeds]


def changes(entry, origin):
    """Return what an entry of the card and new scores do not have in common, as texts."""
    if not entry:
        return []
    found = []
    old, new = entry["settings"], origin["settings"]
    for key in differing([old, new]):
        found.append(f"{key} was {old.get(key)!r}, now {new.get(key)!r}")
    for what in ("weights", "tokenizer", "examples"):
        if what not in entry:
            found.append(f"its {what} were not recorded")
        elif entry[what] != origin[what]:
            found.append(f"the {what} changed")
    return found


def limit_examples(task, limit):
    """Leave `limit` random training examples of a task, the same ones for all seeds; 0 = all."""
    n = len(task.train)
    if 0 < limit < n:
        chosen = np.random.default_rng(0).choice(n, limit, replace=False)
        task.train = [task.train[i] for i in chosen]
        task.partial = True


def is_written(path, entries):
    """Return whether a file exists, and comes from the scores of these entries of the card."""
    return path.exists() and all(str(path) in entry["files"] for entry in entries)


def labels_of(task, examples):
    """Return the labels of the examples as an array: classes, or values of a regression."""
    kind = np.int64 if task.labels else np.float32
    return np.array([label for _, _, label in examples], kind)


# --------------------------------------------------------------------------------------------------
# Results


def run_job(job, start, config, bar):
    """Fine-tune and score, and write the files. Return the Result."""
    # fine-tune
    task = job.task
    n_classes = len(task.labels) or 1
    model = start.classifier(n_classes, job.seed)
    origin = job.origin | {"seed": job.seed}
    checkpoint = Checkpoint(job.checkpoint(), origin, config["glue_checkpoint_minutes"])
    result = finetune(model, job.train, job.dev, start.ids, job.seed, config, bar, checkpoint)

    # write files
    for name, found in result.predictions.items():
        path = job.folder / "predictions" / f"{name}-{job.seed}.tsv"
        write_dev_predictions(path, found, job.dev[name][1], task.labels)
    if job.seed == 0:
        for path in job.files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        for file, rows in job.test.items():
            predictions = predict(model, rows, start.ids, start.max_len)
            write_predictions(job.files[file], predictions, task.labels)
        if "classifier" in job.files:
            save_torch(job.files["classifier"], saved_classifier(model, task, start))
    return result


def saved_classifier(model, task, start):
    """Return what a file in classifiers/ holds: all that the export to Hugging Face needs."""
    return {
        "config": vars(start.model_config),
        "model": model.state_dict(),
        "labels": task.labels,
        "pooling": start.pooling,
        "pair": task.train[0][1] is not None,
        "init": start.init,
        "max_len": start.max_len,
        "tokenizer": start.tokenizer.to_str(),
    }


def add_to_card(card, out, init, job, result):
    """Add a result to the row `init` of an open card, at the place of its seed, and print it.

    What it replaces goes to glue.json.bak: older scores of these tasks that depend on something
    else, and, since a row is of one model, those of other weights or another tokenizer.
    """
    row = card["rows"].setdefault(init, {})
    for name, entry in list(row.items()):
        reasons = changes(entry, job.origin) if name in job.dev else []
        for what in ("weights", "tokenizer"):
            is_other = what in entry and entry[what] != job.origin[what]
            if is_other and name not in job.dev:
                reasons.append(f"the {what} changed")
        if reasons:
            put_aside(out, init, name, entry, reasons)
            del row[name]

    train_labels = job.train[1]
    for name, (_, dev_labels, metric) in job.dev.items():
        old = row.get(name, {})
        measured = {"epochs": result.epochs[name], "seconds": result.seconds}
        if metric in ALSO:
            measured[ALSO[metric]] = result.also[name]
        files = set(old.get("files", []))
        if job.seed == 0:
            files.update(map(str, job.files.values()))
        row[name] = {
            "metric": metric,
            "n_dev": len(dev_labels),
            "constant": constant_score(metric, train_labels, dev_labels),
            **with_seed(old, job.seed, measured),
            **job.origin,
            "files": sorted(files),
        }
        done = f"{metric} {result.epochs[name][-1]:.1f}, {result.seconds:.0f} s"
        tqdm.write(f"{init}: {name}, seed {job.seed}: {done}")
    sys.stdout.flush()


# --------------------------------------------------------------------------------------------------


def main(config):
    # load what all runs begin with
    out = Path(out_dir)
    device_type = pick_device(device)
    make_deterministic(device_type)
    start = Start(config, device_type)
    out.mkdir(parents=True, exist_ok=True)

    # what the card says about its scores; some keys change none of them
    own = {key: value for key, value in config.items() if key in globals()}
    no_change = ["glue_dir", "glue_init", "glue_seeds", "glue_submit", "glue_save"]
    no_change.append("glue_checkpoint_minutes")
    settings = {}
    for key, value in own.items():
        if key.startswith("glue_") and key not in no_change:
            settings[key] = value
    settings["dtype"] = str(start.dtype).removeprefix("torch.")
    origin = {"settings": settings, **start.identity()}
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    made_by = {"settings": own, "versions": versions}

    # find what is missing; each start but the run has its own folder of files. Damaged files are
    # refused now, not after hours.
    card = read_card(out)
    read_record(out)
    row = card["rows"].get(glue_init, {})
    folder = out
    if glue_init != "run":
        folder = out / glue_init.strip("./").replace("/", "-")
    jobs = []
    for task in load_tasks(tasks, glue_dir, dataset, glue_submit):
        jobs += missing_jobs(task, row, folder, start, config, origin)

    # fine-tune; each result is saved at once
    n_examples = glue_epochs * sum(job.n_examples(glue_batch_size) for job in jobs)
    with tqdm(total=n_examples, unit=" examples", disable=None, smoothing=0) as bar:
        for job in jobs:
            bar.set_description(f"{glue_init}: {job.task.name}, seed {job.seed}")
            result = run_job(job, start, config, bar)
            # another process may have added a task meanwhile
            with open_card(out, card) as card:
                card |= made_by
                add_to_card(card, out, glue_init, job, result)
            job.checkpoint().unlink(missing_ok=True)

    # write the card even if no score was missing: an average or the rules may have changed
    with open_card(out, card) as card:
        card |= made_by
        card["rows"].setdefault(glue_init, {})
    if glue_submit and (folder / "submission").exists():
        print(zip_predictions(folder))
    print("\n" + card_text(card))


if __name__ == "__main__":
    run_script(
        lambda: main(configure(globals())),
        kept="finished seeds are saved, the same command continues",
        out_of_memory="lower glue_batch_size or glue_max_len",
    )
