"""Masked language modelling until the wall clock expires: python train.py config/demo.py

data/<dataset>/{train,val}.bin  ->  out/<run>/{model.pt, ckpt.pt, log.jsonl, rules.json, ...}

Every schedule is a function of progress in [0, 1]: elapsed seconds over the budget, or steps over
max_steps for runs that must be repeatable to the last bit. A stopped run continues with the same
command. init_from starts from weights that exist. Several GPUs, which are outside the rules of
cramming, give the same curve as one: torchrun --nproc_per_node=2 train.py config/demo.py
"""

import os

# Threads that wait fall asleep sooner: next to other work a step is several times as fast
# (results/bench). libgomp reads this while torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import json
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import BERT, Config, flops_per_token
from nanocram import ranks
from nanocram.configurator import configure, keys_given
from nanocram.cooccurrence import initialize_from_counts
from nanocram.device import compile_checked, make_deterministic, peak_flops, pick_device, pick_dtype
from nanocram.faults import Fault, is_out_of_memory, run_script, sha256_of, write_json
from nanocram.optim import make_optimizers, step_unless
from nanocram.pretrained import adopt_architecture, load_origin
from nanocram.rules import rules_record, with_origin
from nanocram.runs import Log, Run, StopRequest, save_torch, start_wandb

# the run
out_dir = "out/demo"  # folder of the run
dataset = "demo"  # corpus: data/<dataset>, as prepare.py wrote it
# {auto, never} auto continues a stopped run; never starts anew and overwrites what is in out_dir
resume = "auto"
# weights to start from: "scratch" (random ones), the folder of a run, its ckpt.pt (a branch, with
# its optimizer), or a Hugging Face BERT (folder or hub id); the architecture is then theirs
init_from = "scratch"
# (0, inf) hours of wall clock from the first step on; counting (count_tokens) and evaluation count
budget_hours = 24.0
max_steps = 0  # [0, inf) steps; 0 = the clock decides, else the clock is ignored
seed = 1337  # [0, inf) seed of the weights and of the masks

# the objective
mask_rate = 0.25  # (0, 1) fraction of a row's positions to predict
# of those 80 % become <mask>, 10 % a random token, 10 % stay; else all become <mask>
mask_80_10_10 = True
# [0, 100_000_000] tokens whose neighbours are counted for the first embedding, 0 = random embedding
count_tokens = 0

# the batch
batch_size = 8192  # [1, inf) rows per step, at the end of the ramp
# [1, inf) rows per forward pass, a divisor of both batch keys; changes memory and speed alone
micro_batch_size = 128
batch_ramp = 0.6  # [0, 1] fraction of progress over which the batch grows, 0 = no ramp
batch_ramp_rows = 128  # [1, inf) rows in the ramp's first batch, and in each increment

# the optimizer
learning_rate = 1e-3  # (0, inf) peak learning rate
# {constant, linear, cosine, inverse_sqrt, triangle, trapezoid, ramp} of the learning rate
schedule = "triangle"
# [0, 1) fraction of progress with a linear warm-up,
# for schedule: constant, linear, cosine, inverse_sqrt, trapezoid
warmup = 0.0
# (0, 1) fraction of progress in which the learning rate falls to zero,
# for schedule: inverse_sqrt, triangle, trapezoid, ramp
cooldown = 0.25
# [0, 1] where the triangle begins, as a fraction of its peak, for schedule: triangle
triangle_base = 0.25
# {adamw, muon, Adam, RAdam, NAdam, Adafactor} muon is NorMuon for the matrices of the blocks
optimizer = "adamw"
# [0, inf) decay of matrices and embeddings, none on norms, biases and scalars
weight_decay = 0.01
# [0, 1) decay of the first moment, for optimizer: adamw, muon, Adam, RAdam, NAdam
beta1 = 0.9
# [0, 1) decay of the second moment, for optimizer: adamw, muon, Adam, RAdam, NAdam
beta2 = 0.98
adam_eps = 1e-12  # (0, inf) Adam's epsilon, for optimizer: adamw, muon, Adam, RAdam, NAdam
grad_clip = 0.5  # [0, inf) largest norm of the gradient, 0 = no clipping

# the machine
device = "auto"  # {auto, cuda, mps, cpu} where to train
# {auto, float32, bfloat16, float16} of the activations; auto is what the hardware does best
dtype = "auto"
compile = True  # torch.compile; falls back to eager if it does not work
eval_minutes = 30.0  # (0, inf) minutes between evaluations; the last one always takes place
checkpoint_minutes = 15.0  # (0, inf) minutes between checkpoints
log_seconds = 10.0  # [0, inf) seconds between log lines, 0 = every step
wandb_log = False  # log to Weights & Biases too; needs `pip install wandb`

# --------------------------------------------------------------------------------------------------

# What may differ between the parts of one run; another value elsewhere is another experiment.
FREE_KEYS = {"resume", "out_dir", "device", "dtype", "compile", "micro_batch_size"}
FREE_KEYS |= {"eval_minutes", "checkpoint_minutes", "log_seconds", "wandb_log"}


# --------------------------------------------------------------------------------------------------
# Schedules: pure functions of progress p in [0, 1]


def progress_of(step, elapsed, budget_hours, max_steps):
    """Return the progress after `step` steps and `elapsed` seconds of the budget."""
    if max_steps:
        return min(step / max_steps, 1.0)
    return min(elapsed / (budget_hours * 3600), 1.0)


def learning_rate_factor(p, schedule, warmup, cooldown, triangle_base):
    """Return the learning rate at progress p as a fraction of its peak."""
    rise = min(1.0, p / warmup) if warmup else 1.0
    # progress since the warm-up, from 0 to 1
    since = max(0.0, p - warmup) / (1 - warmup)
    # `top` rises until the cool-down begins; `fall` is 1 until then, and goes to zero
    top = min(p, 1 - cooldown)
    fall = min(1.0, (1 - p) / cooldown)
    if schedule == "constant":
        return rise
    if schedule == "linear":
        return rise * (1 - since)
    if schedule == "cosine":
        return rise * 0.5 * (1 + math.cos(math.pi * since))
    if schedule == "trapezoid":
        return rise * fall
    if schedule == "inverse_sqrt":
        return rise * math.sqrt(warmup / max(top, warmup, 1e-9)) * fall
    if schedule == "triangle":  # "budget-triangle2" [repo]
        return (triangle_base + (1 - triangle_base) * top / (1 - cooldown)) * fall
    if schedule == "ramp":
        return top * fall
    raise Fault(f"schedule = {schedule!r} has no formula in learning_rate_factor")


def batch_rows(p, batch_size, batch_ramp, batch_ramp_rows):
    """Return the rows in the global batch at progress p.

    The batch grows in steps of batch_ramp_rows until it is batch_size at p = batch_ramp.
    """
    if not batch_ramp:
        return batch_size
    increments = math.floor(batch_size * p / (batch_ramp * batch_ramp_rows))
    return min(batch_ramp_rows * (increments + 1), batch_size)


def rates_at(p, config):
    """Return (learning rate, rows in the global batch) of a run's config at progress p."""
    c = config
    shape = (c["schedule"], c["warmup"], c["cooldown"], c["triangle_base"])
    lr = c["learning_rate"] * learning_rate_factor(p, *shape)
    return lr, batch_rows(p, c["batch_size"], c["batch_ramp"], c["batch_ramp_rows"])


def rows_that_fit(rows, p, config, speed, unit):
    """Return `rows`, or fewer if the step would take more than half of what is left at progress p.

    So the last steps become shorter and shorter, and the schedule reaches its end. A step of a
    third of the budget could begin at 90 % of it otherwise, with a high learning rate.
    speed: rows per second, 0 if unknown. unit: rows of one forward pass, which every step has.
    """
    if config["max_steps"] or not speed:
        return rows
    seconds_left = (1 - p) * config["budget_hours"] * 3600
    passes = math.floor(seconds_left / 2 * speed / unit)
    return min(rows, max(passes, 1) * unit)


def tokens_of_all_steps(config, seq_len):
    """Return the tokens that a run of max_steps steps sees."""
    steps = config["max_steps"]
    ramp = (config["batch_size"], config["batch_ramp"], config["batch_ramp_rows"])
    return seq_len * sum(batch_rows(step / steps, *ramp) for step in range(steps))


def rates_of_checkpoint(checkpoint, config):
    """Return (learning rate, rows) with which a checkpoint goes on under a run's config."""
    budget = (config["budget_hours"], config["max_steps"])
    p = progress_of(checkpoint["step"], checkpoint["elapsed"], *budget)
    return rates_at(p, config)


# --------------------------------------------------------------------------------------------------
# Data


def load_bins(folder):
    """Return (train_rows, val_rows, meta). The rows are read-only maps (rows, seq_len) of uint16.

    Raises Fault if they do not match meta.json.
    """
    if not (folder / "meta.json").exists():
        raise Fault(f"{folder} holds no prepared data; run prepare.py with the same config first")
    meta = json.loads((folder / "meta.json").read_text())
    again = f"remove {folder}, run prepare.py again"
    bins = []
    for part in ("train", "val"):
        path = folder / f"{part}.bin"
        shape = (meta[f"{part}_rows"], meta["seq_len"])
        expected = 2 * shape[0] * shape[1]
        size = path.stat().st_size if path.exists() else 0
        if size != expected:
            raise Fault(f"{path} has {size:,} bytes, meta.json says {expected:,}; {again}")
        bins.append(np.memmap(path, np.uint16, "r", shape=shape))
    # train.bin may be huge: its size has to do
    for name in ("val.bin", "tokenizer.json"):
        if sha256_of(folder / name) != meta["sha256"][name.partition(".")[0]]:
            path = folder / name
            raise Fault(f"{path} is not the file that meta.json describes (sha256); {again}")
    return *bins, meta


def next_rows(rows, cursor, count, device):
    """Return `count` rows from `cursor` on as ids (count, seq_len) int64 on the device.

    After the last row of the corpus comes the first one again.
    """
    index = np.arange(cursor, cursor + count) % len(rows)
    ids = torch.from_numpy(rows[index].astype(np.int32))
    if device != "cuda":
        return ids.to(device).long()
    # the copy goes on while the GPU works; only pinned memory may outlive its tensor
    return ids.pin_memory().to(device, non_blocking=True).long()


def forecast(rows, meta, speed, tokens, seconds_left, budget_hours):
    """Say how long the corpus lasts at `speed` tokens/s.

    Warns if only the head of a sorted corpus will be seen, or if the corpus is repeated.
    """
    order = meta["settings"]["order"]
    seen = tokens + speed * max(seconds_left, 0)
    lasts = rows.size / speed / 3600
    tqdm.write(
        f"{budget_hours:.3g} h of budget, the corpus lasts {lasts:.3g} h at {speed:,.0f} tokens/s: "
        f"{seen / rows.size:.0%} of one epoch"
    )
    fitting = ""
    if "characters" in meta["counts"]:
        fitting = f"; max_chars={meta['counts']['characters'] * seen / rows.size:.2g} fits"
    if order != "shuffle" and seen < 0.9 * rows.size:
        tqdm.write(
            f"warning: the corpus is sorted by {order} and only its head will be seen; "
            f"prepare.py with max_rows={seen / rows.shape[1]:.0f} cuts after sorting, "
            f"max_chars before{fitting}"
        )
    if seen > 1.1 * rows.size:
        again = "" if order == "shuffle" else f", and its order ({order}) comes round again"
        tqdm.write(
            f"warning: the corpus will be seen {seen / rows.size:.1f} times{again}; "
            f"with more text it would not be repeated{fitting}"
        )


# --------------------------------------------------------------------------------------------------
# Masks


def n_masked(seq_len, rate):
    """Return how many positions of a row are masked. All rows have as many: shapes are fixed."""
    return max(round(rate * seq_len), 1)


def mask_tokens(ids, count, mask_id, vocab_size, generator, mix=True, rank=0, world=1):
    """Mask exactly `count` positions of every row of ids (B, T). Special tokens are not spared.

    Of these, round(80 %) become mask_id, round(10 %) a random token of the whole vocabulary, and
    the rest stay as they are. Without `mix` all become mask_id.
    rank, world: of the processes that each have B rows of one batch. The random numbers are drawn
    for the whole batch, so that they do not depend on the number of processes.

    Returns inputs (B, T), positions in the row (B, count), targets (B, count).
    """
    B, T = ids.shape
    mine = slice(B * rank, B * (rank + 1))

    # the largest `count` of T random numbers; they come sorted by the numbers, so in random order,
    # and the first 80 % of the positions are a random 80 %
    noise = torch.rand((B * world, T), generator=generator, device=ids.device)[mine]
    positions = noise.topk(count, dim=1).indices
    targets = ids.gather(1, positions)

    n_mask, n_random = count, 0
    if mix:
        n_mask, n_random = round(0.8 * count), round(0.1 * count)
    fill = targets.clone()
    fill[:, :n_mask] = mask_id
    shape = (B * world, n_random)
    random_ids = torch.randint(vocab_size, shape, generator=generator, device=ids.device)
    fill[:, n_mask : n_mask + n_random] = random_ids[mine]
    return ids.scatter(1, positions, fill), positions, targets


def flat_positions(positions, seq_len):
    """Return positions (B, k) in rows as indices (B * k,) into the flat batch (B * seq_len)."""
    first = torch.arange(len(positions), device=positions.device)[:, None] * seq_len
    return (positions + first).flatten()


def split_batch(batch, micro_batch_size):
    """Return a masked batch as micro-batches [(inputs (b, T), flat positions, flat targets), ...].

    batch: what mask_tokens returns.
    """
    seq_len = batch[0].size(1)
    inputs, positions, targets = (part.split(micro_batch_size) for part in batch)
    micro_batches = []
    for i, p, t in zip(inputs, positions, targets):
        micro_batches.append((i, flat_positions(p, seq_len), t.flatten()))
    return micro_batches


# --------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, rows, mask_id, device, batch=64):
    """Return the losses in nats and the accuracy over rows (N, T), as entries of the log.

    Always measured the same way, whatever the training objective: 15 % of the positions, chosen by
    a fixed seed, all replaced by <mask>. val_loss_se is the standard error of val_loss over rows.
    val_loss_new is the loss at words that are visible nowhere else in the row, val_loss_seen that
    at the others: a model that copies well is told from one that has learned more.
    """
    # on the CPU: the same positions on every device
    generator = torch.Generator().manual_seed(0)
    model.eval()
    losses, seen, correct = [], [], []
    for i in range(0, len(rows), batch):
        ids = torch.from_numpy(rows[i : i + batch].astype(np.int64))
        count = n_masked(ids.size(1), 0.15)
        inputs, positions, targets = mask_tokens(ids, count, mask_id, 1, generator, mix=False)
        seen.append((inputs[:, None, :] == targets[:, :, None]).any(-1))
        positions = flat_positions(positions, ids.size(1)).to(device)
        flat_targets = targets.flatten().to(device)
        logits = model(inputs.to(device), positions).float()
        loss = F.cross_entropy(logits, flat_targets, reduction="none")
        losses.append(loss.view(targets.shape).double().cpu())
        correct.append((logits.argmax(-1) == flat_targets).cpu())
    model.train()

    # each (N, masked positions per row)
    losses = torch.cat(losses)
    seen = torch.cat(seen)
    return {
        "val_loss": losses.mean().item(),
        "val_loss_se": losses.mean(1).std().item() / math.sqrt(len(rows))
        if len(rows) > 1
        else None,
        "val_loss_new": losses[~seen].mean().item() if not seen.all() else None,
        "val_loss_seen": losses[seen].mean().item() if seen.any() else None,
        "val_accuracy": torch.cat(correct).double().mean().item(),
    }


# --------------------------------------------------------------------------------------------------
# A step


def prepare_forward(model, compile, micro_batches, device):
    """Return what computes the loss of a micro-batch: the model, compiled if asked for.

    The gradient is checked first. With several processes, each gets the mean gradient of all.
    """
    forward = model
    if compile:
        # say what takes so long
        message = "compiling the model, and checking its gradient; that may take a minute or two"
        slow = threading.Timer(5, tqdm.write, [message])
        slow.start()
        try:
            forward = compile_checked(model, *micro_batches[0])
        finally:
            slow.cancel()
    return ranks.wrap(forward, device)


def set_learning_rate(optimizers, lr):
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = lr


def training_step(model, forward, optimizers, scaler, micro_batches, grad_clip, stop=None):
    """Take one step of all optimizers on a batch. Return (loss, grad_norm, is_bad), on the device.

    forward: the model, or what torch.compile and ranks.wrap made of it. micro_batches: as of
    split_batch.
    grad_clip: largest norm of the gradient, 0 = no clipping. is_bad: loss or gradient was not
    finite, and no weight has changed. stop: a StopRequest; once it has a reason, the step is given
    up and None returned.
    """
    # forward and backward: the gradient is the mean over the micro-batches, and after the last one
    # the mean of that over all processes
    fraction = 1 / len(micro_batches)
    step_loss = torch.zeros((), device=micro_batches[0][0].device)
    for i, micro_batch in enumerate(micro_batches):
        if stop and stop.reason and ranks.world_size() == 1:
            model.zero_grad(set_to_none=True)
            return None
        ranks.share_gradient(forward, i == len(micro_batches) - 1)
        loss = forward(*micro_batch) * fraction
        scaler.scale(loss).backward()
        step_loss += loss.detach()
    step_loss = ranks.mean(step_loss)

    # clip
    for opt in optimizers:
        scaler.unscale_(opt)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)

    # step, unless something is not finite; scaler.step would ask for each optimizer's own gradients
    is_bad = ~(step_loss.isfinite() & grad_norm.isfinite())
    for opt in optimizers:
        step_unless(is_bad, opt)
    scaler.update()
    model.zero_grad(set_to_none=True)
    return step_loss, grad_norm, is_bad


class Interval:
    """What happened since the last log line. Sums stay on the device: reading them waits for it."""

    def __init__(self, device):
        self.loss_sum = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.steps = 0
        self.tokens = 0
        self.start = time.monotonic()

    def add(self, loss, is_bad, tokens):
        self.loss_sum = self.loss_sum + loss.where(~is_bad, 0.0)
        self.skipped = self.skipped + is_bad
        self.steps += 1
        self.tokens += tokens

    def speed(self):
        """Wait for the device. Return the tokens per second."""
        self.loss_sum.item()
        return self.tokens / max(time.monotonic() - self.start, 1e-9)

    def close(self):
        """Wait for the device. Return (mean loss or None, tokens per second, steps left out)."""
        speed = self.speed()
        skipped = int(self.skipped)
        loss = None
        if self.steps > skipped:
            loss = self.loss_sum.item() / (self.steps - skipped)
        return loss, speed, skipped


# --------------------------------------------------------------------------------------------------
# When something goes wrong


def out_of_memory_advice(micro):
    if micro == 1:
        return "out of memory; the model is too large for this device"
    smaller = max(d for d in range(1, micro) if micro % d == 0)
    return f"out of memory; --micro_batch_size={smaller} needs less for the same result"


def first_non_finite(model, batches):
    """Return the name of the first module whose output on one of the batches is not finite."""
    names = []

    def watch(name):
        def look(module, inputs, output):
            if isinstance(output, tuple):
                output = output[0]
            if not output.isfinite().all():
                names.append(name)

        return look

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(watch(name or "the loss")))
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    for hook in hooks:
        hook.remove()
    return names[0] if names else "none, only gradients"


def diagnosis(step, streak, lr, grad_norm, module):
    return (
        f"loss or gradient not finite {streak} times in a row, step {step:,}, learning rate "
        f"{lr:.3g}, gradient norm {grad_norm:.3g}, first module with such an output: {module}; "
        "lower learning_rate, or --dtype=float32; what was saved is intact"
    )


# --------------------------------------------------------------------------------------------------
# Before and after the loop


def config_of_run(config, own_names, meta):
    """Return the keys of this script and of the model, and the hashes of the data."""
    names = own_names | Config.__dataclass_fields__.keys()
    config = {name: value for name, value in config.items() if name in names}
    hashes = {f"{name}_sha256": sha256 for name, sha256 in meta["sha256"].items()}
    return config | {"vocab_size": meta["vocab_size"]} | hashes


def micro_batch_rows(config, world):
    """Return the rows per forward pass on this device. Raise Fault if the batch cannot be split."""
    size, micro = config["batch_size"], config["micro_batch_size"]
    ramp_rows = config["batch_ramp_rows"] if config["batch_ramp"] else 0
    if size % world or ramp_rows % world:
        what = "batch_size and batch_ramp_rows must be divisible by the number of processes"
        raise Fault(f"{what}, {world}")
    rows = math.gcd(micro, size // world, ramp_rows // world)
    if rows != micro and world == 1:
        raise Fault(f"micro_batch_size = {micro} must divide batch_size and batch_ramp_rows")
    if rows != micro:
        why = "which divide each process's part of batch_size and batch_ramp_rows"
        print(f"micro-batches of {rows} rows, {why}")
    return rows


def build_model(config, seq_len, device):
    """Return the model of a config on the device. Raise Fault if there is none for these rows."""
    if config["schedule"] == "inverse_sqrt" and not config["warmup"]:
        what = "schedule=inverse_sqrt falls from the end of its warm-up"
        raise Fault(f"{what}; set warmup, for instance to 0.06")
    if config["count_tokens"] and (config["vocab_size"] < config["n_embd"] or seq_len < 2):
        what = "count_tokens needs a vocabulary as large as n_embd"
        raise Fault(f"{what}, and rows of two tokens or more")
    try:
        model = BERT(Config(**{name: config[name] for name in Config.__dataclass_fields__}))
    except ValueError as e:
        raise Fault(e) from e
    if seq_len > model.config.max_len:
        most = f"max_len = {model.config.max_len}"
        raise Fault(f"the rows have {seq_len} tokens, more than {most}")
    return model.to(device)


def count_neighbours(model, rows, tokens, rank):
    """Begin with an embedding that is counted in the corpus. Return the seconds that it took."""
    began = time.monotonic()
    if rank == 0:
        initialize_from_counts(model, rows, tokens)
    ranks.copy_from_first([p.data for p in model.parameters()])
    seconds = time.monotonic() - began
    print(f"about {min(tokens, rows.size):,} tokens counted in {seconds:.1f} s")
    return seconds


def restore(run, origin, model, opts, scaler, state, first_lr):
    """Load the run's checkpoint, or what it starts from, if there is one. Change `state` to that.

    origin: of load_origin, or None. first_lr: the learning rate of the first step.
    """
    checkpoint = run.checkpoint
    if checkpoint:
        run.restore(checkpoint, model, opts, scaler)
        # rule 4 counts the most devices of any part of the run
        world = max(state["world"], checkpoint["world"])
        state.update({name: checkpoint[name] for name in state}, world=world)
    elif origin:
        state["rows"] = origin.restore(model, opts, scaler, first_lr)


def describe(model, rows, peak, peak_name, world, budget_hours, max_steps):
    """Print the size of the run."""
    n = sum(p.numel() for p in model.parameters())
    budget = f"{max_steps:,} steps"
    if not max_steps:
        exaflop = peak * world * budget_hours * 3600 / 1e18
        budget = f"{budget_hours:.3g} h, {exaflop:.3g} exaFLOP"
    print(
        f"{n:,} parameters in {str(model.dtype)[6:]}; {len(rows):,} rows of {rows.shape[1]} tokens"
    )
    print(f"{budget} at a peak of {peak / 1e12:.1f} TFLOP/s ({world} x {peak_name})")


def write_result(run, model, state, record, evaluation, flops, peak):
    """Write rules.json and model.pt, and print what the run has reached.

    record: the content of rules.json. evaluation: of `evaluate`. flops: per token. peak: FLOP/s.
    """
    write_json(run.folder / "rules.json", record)
    path = run.folder / "model.pt"
    save_torch(path, {"config": vars(model.config), "model": model.state_dict()})

    used = flops * state["tokens"]
    of_peak = used / (peak * max(state["elapsed"], 1e-9))
    hours = f"after {state['elapsed'] / 3600:.3f} h"
    work = f"{state['step']:,} steps, {state['tokens'] / 1e6:.1f} M tokens"
    work = f"{hours}, {work}, {used / 1e18:.3g} exaFLOP, {of_peak:.0%} of the peak"
    print(f"{path}: val_loss {evaluation['val_loss']:.3f} nats {work}")


# --------------------------------------------------------------------------------------------------


def main(config):
    # the machine
    stop = StopRequest()
    device = pick_device(config["device"])
    if max_steps:
        make_deterministic(device)
    rank, world, group_is_ours = ranks.start(device)

    # the data, and a config that holds all that decides what is learned
    folder = Path("data") / dataset
    train_rows, val_rows, meta = load_bins(folder)
    seq_len = meta["seq_len"]
    mask_id = meta["special_ids"]["mask"]
    vocab_size = meta["vocab_size"]
    config = config_of_run(config, globals().keys(), meta)
    micro = micro_batch_rows(config, world)
    origin = None
    if init_from != "scratch":
        origin = load_origin(config, folder)
        given = keys_given(__file__, sys.argv[1:])
        config = adopt_architecture(config, origin, given, seq_len)
    run = Run(out_dir, config, __file__, FREE_KEYS, rates_of_checkpoint, resume, rank)

    # the model and its optimizers: from scratch, from other weights, or from the checkpoint
    torch.manual_seed(seed)
    model = build_model(config, seq_len, device)
    model.dtype = pick_dtype(device, dtype)
    state = {"step": 0, "tokens": 0, "rows": 0, "elapsed": 0.0, "world": world}
    if count_tokens and not run.checkpoint:
        state["elapsed"] = count_neighbours(model, train_rows, count_tokens, rank)
    betas = (beta1, beta2)
    opts = make_optimizers(model, optimizer, learning_rate, weight_decay, betas, adam_eps)
    scaler = torch.amp.GradScaler(device, enabled=model.dtype == torch.float16)
    wandb = start_wandb(run.folder, config, run.checkpoint) if wandb_log and rank == 0 else None
    restore(run, origin, model, opts, scaler, state, first_lr=rates_at(0.0, config)[0])
    corpus = int(config["train_sha256"][:12], 16)
    ranks.require_same([state["step"], corpus], "checkpoint and corpus")
    if rank == 0:
        run.begin(state, folder / "tokenizer.json")
    run.checkpoint = origin = None  # their memory is needed

    # what the loop reports
    count = n_masked(seq_len, mask_rate)
    flops = flops_per_token(model.config, seq_len, count)
    peak, peak_name = peak_flops(device, model.dtype)
    describe(model, train_rows, peak, peak_name, world, budget_hours, max_steps)
    log = Log(run.folder, rank, budget_hours, max_steps, tokens_of_all_steps(config, seq_len))
    log.wandb = wandb

    # Steps that are not finite are left out. So many of them in a row need help; fp16 begins with
    # some, until its scaler has found a scale.
    too_many = 20 if scaler.is_enabled() else 3
    last_recovery = -math.inf
    streak = grad_norm = torch.zeros((), device=device)
    forward = model
    generator = torch.Generator(device)
    micro_batches = []
    lr = rows = measured = 0
    first_step = state["step"]
    forecast_rows = 0  # the batch at the last forecast
    model.train()
    interval = Interval(device)
    start = interval.start - state["elapsed"]
    last_eval = last_checkpoint = state["elapsed"]
    if init_from != "scratch" and first_step == 0:
        last_eval = -math.inf  # evaluate at once: what can these weights do on this corpus?

    while True:
        # where are we? a signal to any process stops all, and the clock is rank 0's
        now = time.monotonic()
        state["elapsed"] = now - start
        stop_now, log_now, save_now, state["elapsed"], speed = ranks.agree(
            stop.reason != "",
            now - interval.start >= log_seconds,
            state["elapsed"] - last_checkpoint >= 60 * checkpoint_minutes,
            state["elapsed"],
            measured,
        )
        progress = progress_of(state["step"], state["elapsed"], budget_hours, max_steps)
        done = progress >= 1.0

        # log
        if interval.steps and (done or log_now):
            loss, measured, skipped = interval.close()
            now = time.monotonic()
            grown = forecast_rows < rows == batch_size
            if interval.tokens and not max_steps and (forecast_rows == 0 or grown):
                left = budget_hours * 3600 - state["elapsed"]
                forecast(train_rows, meta, measured, state["tokens"], left, budget_hours)
                forecast_rows = rows
            log.write(
                state,
                progress,
                loss=loss,
                lr=lr,
                batch_size=rows,
                grad_norm=float(grad_norm) if math.isfinite(grad_norm) else None,
                tokens_per_s=measured,
                mfu=measured * flops / peak / world,
                epoch=state["rows"] / len(train_rows),
                skipped=skipped,
            )
            interval = Interval(device)
            now = interval.start

        # go back to the checkpoint if too many steps in a row were not finite; the data move on
        look = save_now or done or stop_now or not interval.steps
        if look and streak >= too_many:
            since_recovery = state["step"] - int(streak) - last_recovery
            if not run.saved() or since_recovery < 100:
                module = first_non_finite(model, micro_batches)
                raise Fault(diagnosis(state["step"], int(streak), lr, float(grad_norm), module))
            ckpt = run.load_checkpoint()
            run.restore(ckpt, model, opts, scaler)
            log.write(state, progress, back_to_step=ckpt["step"], skipped=int(streak))
            last_recovery = state["step"]
            streak = torch.zeros_like(streak)
            del ckpt

        # evaluate
        eval_now = state["elapsed"] - last_eval >= 60 * eval_minutes and not stop_now
        if rank == 0 and (done or eval_now):
            evaluation = evaluate(model, val_rows, mask_id, device)
            state["elapsed"] = last_eval = time.monotonic() - start
            log.write(state, progress, **evaluation, flops=flops * state["tokens"])

        # save
        if save_now or done or stop_now:
            if rank == 0:
                run.save(state, model, opts, scaler)
            last_checkpoint = state["elapsed"]

        # stop
        if done:
            break
        if stop_now:
            ranks.finish(group_is_ours)
            how = "the same command" if resume == "auto" else "--resume=auto"
            # out of memory, the same command would be out of memory again
            more = f", {how} continues" if stop.reason in ("stopped", "") else ""
            raise Fault(f"{stop.reason or 'stopped'}; saved at step {state['step']:,}{more}")
        interval.start += time.monotonic() - now

        # the next batch: masks and dropout depend on seed and step alone, not on interruptions, and
        # masks not on how the batch is split
        lr, rows = rates_at(progress, config)
        rows = rows_that_fit(rows, progress, config, speed / seq_len, micro * world)
        set_learning_rate(opts, lr)
        mine = rows // world
        ids = next_rows(train_rows, state["rows"] + rank * mine, mine, device)
        step_seed = int(np.random.SeedSequence([seed, state["step"]]).generate_state(1)[0])
        generator.manual_seed(step_seed)
        draw = (generator, mask_80_10_10, rank, world)
        batch = mask_tokens(ids, count, mask_id, vocab_size, *draw)
        micro_batches = split_batch(batch, micro)

        # step
        try:
            if state["step"] == first_step:
                forward = prepare_forward(model, compile, micro_batches, device)
                interval.start = time.monotonic()  # to compile says nothing about the speed
            torch.manual_seed(step_seed + 1 + rank)
            result = training_step(model, forward, opts, scaler, micro_batches, grad_clip, stop)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            stop.reason = out_of_memory_advice(micro)
            if world > 1:  # the others wait for this process's gradients
                raise Fault(f"{stop.reason}; what was saved before is intact") from e
            result = None
        if result is None:  # save first; the step is done again, from its start
            model.zero_grad(set_to_none=True)
            continue
        loss, grad_norm, is_bad = result
        streak = (streak + 1) * is_bad
        interval.add(loss, is_bad, rows * seq_len)

        # count
        if state["rows"] < len(train_rows) <= state["rows"] + rows:
            step = f"{state['step']:,}"
            tqdm.write(f"the corpus ends at step {step}; it starts again, with other masks")
        state["step"] += 1
        state["tokens"] += rows * seq_len
        state["rows"] += rows
        if state["step"] == first_step + 1:
            measured = interval.speed()
            if log_seconds:  # the first step is slower: the log begins with the next
                interval.tokens = 0
                interval.start = time.monotonic()

    # the end
    log.close()
    if rank == 0:
        hours = state["elapsed"] / 3600
        record = rules_record(meta, config, hours, device, state["world"])
        record = with_origin(record, init_from)
        write_result(run, model, state, record, evaluation, flops, peak * world)
    del forward  # its wrapper waits for threads of the process group, and hung after its end
    ranks.finish(group_is_ours)
    run.close()


if __name__ == "__main__":
    run_script(
        lambda: ranks.run(main, configure(globals())),
        kept="what was saved before is intact",
        out_of_memory="before or after a step: the model, or count_tokens, is too large here",
    )
