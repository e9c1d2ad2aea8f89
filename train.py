"""Masked language modelling until the wall clock expires: python train.py config/demo.py

data/<dataset>/{train,val}.bin  ->  out/<run>/{model.pt, ckpt.pt, log.jsonl, tokenizer.json, config.json, rules.json}

Every schedule is a function of progress in [0, 1]: elapsed seconds over the budget, or steps over max_steps for runs that
must be repeatable to the last bit. A stopped run continues with the same command. Several GPUs, outside the rules of
cramming, give the same curve as one: torchrun --nproc_per_node=2 train.py config/demo.py
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import cut_log, load_checkpoint, torch_save
from configurator import configure, write_json
from cooccurrence import begin_with_counts
from hardware import compiled, no_memory, peak_flops, pick_device, pick_dtype, repeatable
from model import BERT, Config, flops_per_token
from muon import Muon, split
from scorecard import rules_record

out_dir = "out/demo"  # folder of the run
dataset = "demo"  # corpus: data/<dataset>, as prepare.py wrote it
resume = "auto"  # {auto, never} auto continues a stopped run; never starts anew and overwrites what is in out_dir
budget_hours = 24.0  # (0, inf) hours of wall clock from counting (count_tokens) and the first step on, evaluation included
max_steps = 0  # [0, inf) steps; 0 = the clock decides, else the clock is ignored
seed = 1337  # [0, inf) seed of the weights and of the masks
count_tokens = 0  # [0, 100_000_000] tokens of whose neighbours the embedding is first made (cooccurrence.py), 0 = random
mask_rate = 0.25  # (0, 1) share of a row's positions to predict
mask_rate_end = 0.0  # [0, 1) share to which mask_rate moves in a line with progress, 0 = it stays
mask_80_10_10 = True  # of those 80 % become <mask>, 10 % a random token, 10 % stay; else all become <mask>
batch_size = 8192  # [1, inf) rows a step, at the end of the ramp
micro_batch_size = 128  # [1, inf) rows a forward pass, a divisor of both batch keys; changes memory and speed, not the result
batch_ramp = 0.6  # [0, 1] share of progress over which the batch grows, 0 = no ramp
batch_ramp_rows = 128  # [1, inf) rows in the ramp's first batch, and in each increment
learning_rate = 1e-3  # (0, inf) peak learning rate
schedule = "triangle"  # {constant, linear, cosine, inverse_sqrt, triangle, trapezoid, ramp} of the learning rate
warmup = 0.0  # [0, 1) share of progress with a linear warm-up; triangle and ramp have their own
cooldown = 0.25  # (0, 1) share of progress in which inverse_sqrt, triangle, trapezoid and ramp fall to zero
triangle_base = 0.25  # [0, 1] where the triangle begins, as a share of its peak
optimizer = "adamw"  # {adamw, adam, muon} adam: BERT's L2 decay in the gradient; muon: NorMuon for the blocks' matrices
weight_decay = 0.01  # [0, inf) decay of matrices and embeddings, none on norms, biases and scalars
beta1 = 0.9  # [0, 1) Adam's decay of the first moment
beta2 = 0.98  # [0, 1) Adam's decay of the second moment
adam_eps = 1e-12  # (0, inf) Adam's epsilon
grad_clip = 0.5  # [0, inf) largest norm of the gradient, 0 = no clipping
device = "auto"  # {auto, cuda, mps, cpu} where to train
dtype = "auto"  # {auto, float32, bfloat16, float16} of the activations; auto is what the hardware does best
compile = True  # torch.compile; falls back to eager where it does not work
eval_minutes = 30.0  # (0, inf) minutes between evaluations; the last one always takes place
checkpoint_minutes = 15.0  # (0, inf) minutes between checkpoints
log_seconds = 10.0  # [0, inf) seconds between log lines, 0 = every step
check_data = False  # compare train.bin with its sha256 in meta.json first
wandb_log = False  # log to Weights & Biases too; needs `pip install wandb`

# ---------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of progress p in [0, 1]


def learning_rate_factor(p):
    """The learning rate at progress p as a share of its peak."""
    rise = min(1.0, p / warmup) if warmup else 1.0
    since = max(0.0, p - warmup) / (1 - warmup)  # progress since the warm-up
    top, fall = min(p, 1 - cooldown), min(1.0, (1 - p) / cooldown)  # rises up to the cool-down; falls from there to zero
    return {
        "constant": rise,
        "linear": rise * (1 - since),
        "cosine": rise * 0.5 * (1 + math.cos(math.pi * since)),
        "trapezoid": rise * fall,
        "inverse_sqrt": rise * math.sqrt(warmup / max(top, warmup, 1e-9)) * fall,
        "triangle": (triangle_base + (1 - triangle_base) * top / (1 - cooldown)) * fall,  # "budget-triangle2" [repo]
        "ramp": top * fall,
    }[schedule]


def batch_rows(p):
    """Rows in the global batch at progress p: grows by batch_ramp_rows until it is batch_size at p = batch_ramp."""
    if not batch_ramp:
        return batch_size
    return min(batch_ramp_rows * (math.floor(batch_size * p / (batch_ramp * batch_ramp_rows)) + 1), batch_size)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def n_masked(seq_len, rate):
    return max(round(rate * seq_len), 1)


def mask_tokens(ids, count, mask_id, vocab_size, generator, mix=True, room=0):
    """Masks exactly `count` positions of every row of ids (B, T); special tokens are not spared.

    Of those round(80 %) become mask_id, round(10 %) a random token of the whole vocabulary, the rest stay as they are;
    without `mix` all become mask_id. Returns inputs (B, T), positions in the row (B, count), targets (B, count); with
    `room` > count as many positions, the last of them neither masked nor, with a target of -100, in the loss.
    """
    # topk sorts by the noise: the order of the positions is random, so the first ones are a random subset
    positions = torch.rand(ids.shape, generator=generator, device=ids.device).topk(max(count, room), dim=1).indices
    targets = ids.gather(1, positions)
    n_mask, n_random = (round(0.8 * count), round(0.1 * count)) if mix else (count, 0)
    fill = targets.clone()
    fill[:, :n_mask] = mask_id
    shape = (len(ids), n_random)
    fill[:, n_mask : n_mask + n_random] = torch.randint(vocab_size, shape, generator=generator, device=ids.device)
    targets[:, count:] = -100
    return ids.scatter(1, positions, fill), positions, targets


def flat(positions, seq_len):
    """Positions (B, k) in rows to indices into the flattened batch (B * seq_len)."""
    return (positions + torch.arange(len(positions), device=positions.device)[:, None] * seq_len).flatten()


@torch.no_grad()
def evaluate(model, rows, mask_id, where, batch=64):
    """(val_loss in nats, accuracy) over rows (N, T): 15 % of the positions, by a fixed seed, all replaced by <mask>."""
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same positions on every device
    model.eval()
    loss = correct = total = 0
    for i in range(0, len(rows), batch):
        ids = torch.from_numpy(rows[i : i + batch].astype(np.int64))
        inputs, positions, targets = mask_tokens(ids, n_masked(ids.size(1), 0.15), mask_id, 1, generator, mix=False)
        targets = targets.flatten().to(where)
        logits = model(inputs.to(where), flat(positions, ids.size(1)).to(where)).float()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        correct += (logits.argmax(-1) == targets).sum().item()
        total += len(targets)
    model.train()
    return loss / total, correct / total


# ---------------------------------------------------------------------------------------------------------------------
# Data


def load_bins(folder):
    """(train, val, meta): the bins as read-only (rows, seq_len) maps. SystemExit where they do not match meta.json."""
    if not (folder / "meta.json").exists():
        sys.exit(f"train.py: {folder} holds no prepared data; run prepare.py with the same config first")
    meta, bins = json.loads((folder / "meta.json").read_text()), []
    again = f"remove {folder}, run prepare.py again"
    for part in ("train", "val"):
        path, shape = folder / f"{part}.bin", (meta[f"{part}_rows"], meta["seq_len"])
        size, expected = path.stat().st_size if path.exists() else 0, 2 * shape[0] * shape[1]
        if size != expected:
            sys.exit(f"train.py: {path} has {size:,} bytes, meta.json says {expected:,}; {again}")
        bins.append(np.memmap(path, np.uint16, "r", shape=shape))
    for name in ["val.bin", "tokenizer.json"] + ["train.bin"] * check_data:
        with open(folder / name, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != meta["sha256"][name.partition(".")[0]]:
                sys.exit(f"train.py: {folder / name} is not the file that meta.json describes (sha256); {again}")
    return *bins, meta


def forecast(rows, meta, speed, state):
    """Says how long the corpus lasts at `speed` tokens/s, and warns where only the head of a sorted one will be seen."""
    seen, order = state["tokens"] + speed * max(budget_hours * 3600 - state["elapsed"], 0), meta["settings"]["order"]
    tqdm.write(
        f"{budget_hours:.3g} h of budget, the corpus lasts {rows.size / speed / 3600:.3g} h at {speed:,.0f} tokens/s: "
        f"{seen / rows.size:.0%} of one epoch"
    )
    if order != "shuffle" and seen < 0.9 * rows.size:
        tqdm.write(
            f"train.py: warning: the corpus is sorted by {order} and only its head will be seen; "
            f"prepare.py with max_rows={seen / rows.shape[1]:.0f} cuts after sorting, max_chars before"
        )


def next_rows(rows, cursor, count, where):
    """`count` rows from `cursor` on, around the end of the corpus, as int64 ids (count, seq_len) on the device."""
    ids = torch.from_numpy(rows[np.arange(cursor, cursor + count) % len(rows)].astype(np.int32))
    if where == "cuda":
        ids = ids.pin_memory()
    return ids.to(where, non_blocking=where == "cuda").long()  # only pinned memory outlives its tensor


# ---------------------------------------------------------------------------------------------------------------------
# A step


def make_optimizers(model):
    """Matrices and embeddings decay; norms, biases and scalars do not (deviation: [repo] decays the position scalar)."""
    matrices, rest = split(model, model.config.glu) if optimizer == "muon" else ([], model.parameters())
    adam = {weight_decay: [], 0.0: []}
    for p in rest:
        adam[weight_decay if p.ndim >= 2 else 0.0].append(p)
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    groups = [{"params": params, "weight_decay": decay} for decay, params in adam.items()]
    opts = [kind(groups, lr=learning_rate, betas=(beta1, beta2), eps=adam_eps, fused=True)]
    return opts + ([Muon(matrices, learning_rate, weight_decay, model.dtype)] if matrices else [])


def out_of_memory(micro):
    if micro == 1:
        return "out of memory; the model is too large for this device"
    smaller = max(d for d in range(1, micro) if micro % d == 0)
    return f"out of memory; --micro_batch_size={smaller} needs less for the same result"


def first_non_finite(model, batches):
    """The first module whose output on one of the batches is not finite: where a run broke."""
    names = []

    def look(name):
        return lambda module, inputs, output: None if output.isfinite().all() else names.append(name)

    hooks = [module.register_forward_hook(look(name or "the loss")) for name, module in model.named_modules()]
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    for hook in hooks:
        hook.remove()
    return names[0] if names else "none, only gradients"


# ---------------------------------------------------------------------------------------------------------------------


def main(config):
    reason = ""  # to stop

    def stop(number, frame):
        nonlocal reason
        reason = "stopped"
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    where, rank, world = pick_device(device), 0, 1
    if max_steps:
        repeatable(where)
    if dist.is_torchelastic_launched():  # by torchrun
        from torch import _dynamo  # noqa: F401  imported after the group, by an optimizer, it keeps the threads of gloo

        gpu, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if where == "cuda":
            if gpu >= gpus:
                sys.exit(f"train.py: torchrun starts more processes than there are GPUs here; --nproc_per_node={gpus}")
            torch.cuda.set_device(gpu)
        dist.init_process_group("cpu:gloo,cuda:nccl" if where == "cuda" else "gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
        if rank:
            sys.stdout = open(os.devnull, "w")

    out, folder, ramp_rows = Path(out_dir), Path("data") / dataset, batch_ramp_rows if batch_ramp else 0
    if batch_size % world or ramp_rows % world:
        sys.exit(f"train.py: batch_size and batch_ramp_rows must be divisible by the number of processes, {world}")
    micro = math.gcd(micro_batch_size, batch_size // world, ramp_rows // world)  # rows a forward pass on this device
    if micro != micro_batch_size:
        if world == 1:
            sys.exit(f"train.py: micro_batch_size = {micro_batch_size} must divide batch_size and batch_ramp_rows")
        print(f"train.py: micro-batches of {micro} rows, which divide each process's part of batch_size and batch_ramp_rows")
    if schedule == "inverse_sqrt" and not warmup:
        sys.exit("train.py: schedule=inverse_sqrt falls from the end of its warm-up; set warmup, for instance to 0.06")
    train_rows, val_rows, meta = load_bins(folder)
    seq_len, mask_id, vocab_size = meta["seq_len"], meta["special_ids"]["mask"], meta["vocab_size"]
    config = {k: v for k, v in config.items() if k in globals() or k in Config.__dataclass_fields__}
    config |= {"vocab_size": vocab_size} | {f"{name}_sha256": sha for name, sha in meta["sha256"].items()}
    if count_tokens and (vocab_size < config["n_embd"] or seq_len < 2):
        sys.exit("train.py: count_tokens needs a vocabulary as large as n_embd, and rows of two tokens or more")
    if (out / "model.pt").exists() and resume == "auto":
        sys.exit(f"train.py: {out} holds a finished run; choose another out_dir, or --resume=never to overwrite it")
    if out.exists() and any(out.iterdir()) and not (out / "log.jsonl").exists():
        sys.exit(f"train.py: {out} holds files that are not of a run; choose another out_dir")
    ckpt = load_checkpoint(out / "ckpt.pt", config) if (out / "ckpt.pt").exists() and resume == "auto" else None

    torch.manual_seed(seed)
    try:
        model = BERT(Config(**{k: config[k] for k in Config.__dataclass_fields__})).to(where)
    except ValueError as e:
        sys.exit(f"train.py: {e}")
    if seq_len > model.config.max_len:
        sys.exit(f"train.py: the rows have {seq_len} tokens, more than max_len = {model.config.max_len}")
    model.dtype = pick_dtype(where, dtype)
    state = {"step": 0, "tokens": 0, "rows": 0, "elapsed": 0.0, "world": world}
    if count_tokens and not ckpt:
        began = time.monotonic()
        if rank == 0:
            begin_with_counts(model, train_rows, count_tokens)
        for p in model.parameters() if world > 1 else []:
            dist.broadcast(p.data, 0)
        state["elapsed"] = time.monotonic() - began
        print(f"about {min(count_tokens, train_rows.size):,} tokens counted in {state['elapsed']:.1f} s")
    opts = make_optimizers(model)
    scaler = torch.amp.GradScaler(where, enabled=model.dtype == torch.float16)
    if wandb_log and rank == 0:
        try:
            import wandb
        except ImportError:
            sys.exit("train.py: wandb_log=True needs `pip install wandb`")
        wandb.init(project="nanocram", name=out.name, config=config, id=str(out).replace("/", "-"), resume=ckpt and "allow")

    def restore(ckpt):
        model.load_state_dict(ckpt["model"])
        for opt, saved in zip(opts, ckpt["optimizers"]):
            opt.load_state_dict(saved)
        if ckpt["scaler"]:  # empty where that part of the run was not in fp16
            scaler.load_state_dict(ckpt["scaler"])

    if ckpt:
        restore(ckpt)
        state = {k: ckpt[k] for k in state}
        state["world"] = max(state["world"], world)  # devices, at most, in any part of the run: rule 4
        if ckpt["torch"] != str(torch.__version__):
            print(f"train.py: warning: the run began with torch {ckpt['torch']}, this is {torch.__version__}")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if ckpt:
            # kills must not stretch the budget: what a part of the run took after its last checkpoint counts as well
            state["elapsed"] = max(state["elapsed"], cut_log(out / "log.jsonl", state["step"]))
            print(f"continuing {out} at step {state['step']:,}, {state['elapsed'] / 3600:.3f} h into the budget")
        else:
            (out / "log.jsonl").write_text("")
            shutil.copy(folder / "tokenizer.json", out)
            for name in ("ckpt.pt", "model.pt", "rules.json", "glue.json", "glue.md", "submission.zip"):
                (out / name).unlink(missing_ok=True)
            for name in ("submission", "classifiers", "scratch"):
                shutil.rmtree(out / name, ignore_errors=True)
        write_json(out / "config.json", config)
    del ckpt

    rates = mask_rate, mask_rate_end or mask_rate
    flops = flops_per_token(model.config, seq_len, n_masked(seq_len, sum(rates) / 2))
    peak, peak_name = peak_flops(where, model.dtype)
    exaflop = f", {peak * world * budget_hours * 3600 / 1e18:.3g} exaFLOP"
    budget = f"{max_steps:,} steps" if max_steps else f"{budget_hours:.3g} h{exaflop}"
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {str(model.dtype)[6:]}; {len(train_rows):,} rows of")
    print(f"{seq_len} tokens; {budget} at a peak of {peak / 1e12:.1f} TFLOP/s ({world} x {peak_name})")

    log = open(os.devnull if rank else out / "log.jsonl", "a", buffering=1)
    bar = tqdm(
        total=max_steps or round(budget_hours * 3600),
        bar_format="{percentage:3.0f}%|{bar}| {n:.0f}/{total} " + ("steps" if max_steps else "s") + "{postfix}",
        disable=True if rank else None,  # plain lines where the output is no terminal
    )

    def write_log(**entry):
        head = {k: state[k] for k in ("step", "tokens")} | {"hours": state["elapsed"] / 3600, "progress": progress}
        log.write(json.dumps(head | entry) + "\n")
        if wandb_log and rank == 0:
            wandb.log(head | entry, step=state["step"])
        bar.n = min(state["step"] if max_steps else round(state["elapsed"]), bar.total)
        if bar.disable or "loss" not in entry:
            values = ", ".join(f"{k} {v:,.4g}" for k, v in entry.items() if v is not None)
            tqdm.write(f"step {state['step']:,}, {state['elapsed']:,.0f} s: {values}")
            sys.stdout.flush()
        else:
            values = f"loss {entry['loss'] or math.nan:.3f}, {entry['tokens_per_s']:,.0f} tokens/s, MFU {entry['mfu']:.0%}"
            bar.set_postfix_str(values)

    # Steps whose loss or gradient is not finite are left out, on the device. So many in a row need help; fp16 begins with
    # some, until its scaler has found a scale.
    too_many, last_recovery = 20 if scaler.is_enabled() else 3, -math.inf
    generator = torch.Generator(where)
    model.train()
    step_model, batches, first_step, forecast_said = model, [], state["step"], False
    loss_sum = skipped = streak = grad_norm = torch.zeros((), device=where)
    lr, rows, steps, tokens = 0.0, 0, 0, 0  # the last two since the last log line, as are loss_sum and skipped
    timer = time.monotonic()  # start of the log interval; evaluations and checkpoints move it on
    start = timer - state["elapsed"]
    last_eval = last_checkpoint = state["elapsed"]
    while True:
        now = time.monotonic()
        state["elapsed"] = now - start
        stop_now, log_now = reason != "", now - timer >= log_seconds
        save = state["elapsed"] - last_checkpoint >= 60 * checkpoint_minutes
        if world > 1:  # a signal to anyone stops all, and the clock of rank 0 is everyone's
            mine = [stop_now, *(x * (rank == 0) for x in (log_now, save, state["elapsed"]))]
            shared = torch.tensor(mine, dtype=torch.float64)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            stop_now, log_now, save, state["elapsed"] = *map(bool, shared[:3]), shared[3].item()
        progress = min(state["step"] / max_steps if max_steps else state["elapsed"] / (budget_hours * 3600), 1.0)
        done = progress >= 1.0

        # log
        if steps and (done or log_now):
            left_out = int(skipped)  # waits for the device
            now = time.monotonic()
            speed = tokens / max(now - timer, 1e-9)
            if tokens and not forecast_said and not max_steps:
                forecast(train_rows, meta, speed, state)
                forecast_said = True
            write_log(
                loss=loss_sum.item() / (steps - left_out) if steps > left_out else None,
                lr=lr,
                batch_size=rows,
                grad_norm=float(grad_norm) if math.isfinite(grad_norm) else None,
                tokens_per_s=speed,
                mfu=speed * flops / peak / world,
                epoch=state["rows"] / len(train_rows),
                skipped=left_out,
            )
            steps, tokens, timer = 0, 0, now
            loss_sum, skipped = torch.zeros_like(loss_sum), torch.zeros_like(skipped)
        if (save or done or stop_now or not steps) and streak >= too_many:
            if not (out / "ckpt.pt").exists() or state["step"] - int(streak) - last_recovery < 100:
                sys.exit(
                    f"train.py: loss or gradient not finite {int(streak)} times in a row, step {state['step']:,}, learning "
                    f"rate {lr:.3g}, gradient norm {float(grad_norm):.3g}, first module with such an output: "
                    f"{first_non_finite(model, batches)}; lower learning_rate, or --dtype=float32; "
                    "what was saved is intact"
                )
            ckpt = load_checkpoint(out / "ckpt.pt", config)
            restore(ckpt)
            write_log(back_to_step=ckpt["step"], skipped=int(streak))
            last_recovery, streak = state["step"], torch.zeros_like(streak)
            del ckpt

        # evaluate
        if rank == 0 and (done or (state["elapsed"] - last_eval >= 60 * eval_minutes and not stop_now)):
            val_loss, val_accuracy = evaluate(model, val_rows, mask_id, where)
            state["elapsed"] = last_eval = time.monotonic() - start
            write_log(val_loss=val_loss, val_accuracy=val_accuracy, flops=flops * state["tokens"])

        # save
        if save or done or stop_now:
            if rank == 0:
                parts = {
                    "model": model.state_dict(),
                    "optimizers": [opt.state_dict() for opt in opts],
                    "scaler": scaler.state_dict(),
                }
                torch_save(out / "ckpt.pt", {**parts, **state, "config": config, "torch": str(torch.__version__)})
            last_checkpoint = state["elapsed"]

        # stop
        if done:
            break
        if stop_now:
            if world > 1:
                dist.barrier()  # rank 0 has saved
                dist.destroy_process_group()
            how = "the same command" if resume == "auto" else "--resume=auto"
            further = f", {how} continues" if reason in ("stopped", "") else ""  # as it is, it would be out of memory again
            sys.exit(f"train.py: {reason or 'stopped'}; saved at step {state['step']:,}{further}")
        timer += time.monotonic() - now

        # step
        lr = learning_rate * learning_rate_factor(progress)
        for group in [group for opt in opts for group in opt.param_groups]:
            group["lr"] = lr
        rows = batch_rows(progress)
        ids = next_rows(train_rows, state["rows"], rows, where)
        # masks and dropout depend on seed and step alone: not on interruptions, nor masks on how the batch is split
        step_seed = int(np.random.SeedSequence([seed, state["step"]]).generate_state(1)[0])
        count = n_masked(seq_len, rates[0] + (rates[1] - rates[0]) * progress)
        room = n_masked(seq_len, max(rates))  # so that shapes stay what they were compiled for
        inputs, positions, targets = mask_tokens(
            ids, count, mask_id, vocab_size, generator.manual_seed(step_seed), mask_80_10_10, room
        )
        mine = slice(rows // world * rank, rows // world * (rank + 1))
        parts = zip(*(x[mine].split(micro) for x in (inputs, positions, targets)))
        batches = [(i, flat(p, seq_len), t.flatten()) for i, p, t in parts]
        step_loss = torch.zeros((), device=where)
        try:
            if compile and state["step"] == first_step:
                step_model = compiled(model, lambda loss, share=micro / rows: scaler.scale(loss * share), *batches[0])
            torch.manual_seed(step_seed + 1 + rank)
            for batch in batches:
                if reason and world == 1:
                    break
                loss = step_model(*batch) * (micro / rows)
                scaler.scale(loss).backward()
                step_loss += loss.detach()
        except RuntimeError as e:
            if not no_memory(e):
                raise
            reason = out_of_memory(micro)
            if world > 1:  # the others wait for this process's gradients
                sys.exit(f"train.py: {reason}; what was saved before is intact")
        if reason and world == 1:  # do not let a large batch delay the checkpoint; this step is done again, from its start
            model.zero_grad(set_to_none=True)
            continue
        if world > 1:  # by hand, once a step: DDP would add hooks, a wrapper, and other names to save five lines
            for tensor in [step_loss, *(p.grad for p in model.parameters())]:
                dist.all_reduce(tensor)
        for opt in opts:
            scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        bad = ~(step_loss.isfinite() & grad_norm.isfinite())
        for opt in opts:
            opt.found_inf = bad.float()  # both leave such a step out; scaler.step would ask each optimizer's own gradients
            if where != "mps" or not bad:  # whose fused step ignores found_inf
                opt.step()
        scaler.update()
        model.zero_grad(set_to_none=True)
        loss_sum = loss_sum + step_loss.where(~bad, 0.0)
        skipped = skipped + bad
        streak = (streak + 1) * bad
        if (state["rows"] + rows) // len(train_rows) > state["rows"] // len(train_rows):
            tqdm.write(f"the corpus ends at step {state['step']:,}; it starts again, with other masks")
        state["step"] += 1
        state["tokens"] += rows * seq_len
        state["rows"] += rows
        steps, tokens = steps + 1, tokens + rows * seq_len
        if state["step"] == first_step + 1 and log_seconds:
            step_loss.item()  # waits for the device; the first step compiles, so its time says nothing about the speed
            tokens, timer = 0, time.monotonic()

    bar.close()
    if rank == 0:
        record = rules_record(meta["settings"], count_tokens, state["elapsed"] / 3600, where, state["world"])
        write_json(out / "rules.json", record)
        torch_save(out / "model.pt", {"config": vars(model.config), "model": model.state_dict()})
        used, hours = flops * state["tokens"], state["elapsed"] / 3600
        print(
            f"{out / 'model.pt'}: val_loss {val_loss:.3f} nats after {hours:.3f} h, {state['step']:,} steps, "
            f"{state['tokens'] / 1e6:.1f} M tokens, {used / 1e18:.3g} exaFLOP, "
            f"{used / (peak * world * max(hours * 3600, 1e-9)):.0%} of the peak"
        )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    config = configure(__file__, also=["model.py"])
    globals().update({k: v for k, v in config.items() if k in globals()})
    try:
        main(config)
    except RuntimeError as e:
        if not no_memory(e):
            raise
        what = "the model for this device, or count_tokens for this machine"
        sys.exit(f"train.py: out of memory before or after a step: {what} is too large; what was saved before is intact")
    except OSError as e:
        sys.exit(f"train.py: {e.strerror or e}: {e.filename or out_dir}; what was saved before is intact")
