"""The folder out/<run> of a pretraining run: begin or continue it, checkpoint, log, model.

What was saved survives kill -9, a full disk and a change of the code. The checkpoint before the
last one is kept, too: a disk or a network may damage a file that was written without an error.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from model import BERT
from nanocram.configurator import defaults_of
from nanocram.faults import Fault, lock, one_line, replace_file, write_json
from nanocram.progress import SECONDS_PER_LINE

CHECKPOINT_PARTS = "model optimizers scaler step tokens rows elapsed world torch".split()
CHECKPOINTS = ["ckpt.pt", "ckpt.old.pt"]  # the last one, and the one before
# files that say nothing about whether a folder is that of a run: locks, and logs of schedulers
NOT_OF_A_RUN = ["*.lock", "*.log", "slurm-*.out"]
# keys of the length of a run, and of the learning rate and the batch that depend on it
BUDGET_KEYS = {"budget_hours", "max_steps"}
# What other scripts make of a run, or an earlier run left: none of it belongs to a new one.
OUTPUT_FILES = [*CHECKPOINTS, "model.pt", "rules.json", "glue.json", "glue.md", "submission.zip"]
OUTPUT_FOLDERS = ["submission", "classifiers", "predictions", "checkpoints", "scratch"]


def save_torch(path, value, keep=None):
    """Write torch.save's file, complete or not at all.

    keep: path under which an older file stays.
    """
    with replace_file(path) as f:
        try:
            torch.save(value, f)
        except RuntimeError as e:  # torch's writer replaces the file's own error
            message = f"could not be written ({str(e).splitlines()[0]})"
            raise OSError(errno.EIO, message, str(path)) from e
        if keep and path.exists():
            f.flush()
            os.fsync(f.fileno())
            os.replace(path, keep)


def open_run(folder, **changes):
    """Return (BERT on the CPU in fp32, Tokenizer) of a finished run.

    changes: fields of the model's Config to replace, for example dropout=0.1.
    """
    folder = Path(folder)
    try:
        model = BERT.from_run(folder, **changes)
    except (FileNotFoundError, ValueError) as e:
        raise Fault(e) from e
    path = folder / "tokenizer.json"
    try:
        return model, Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises nothing more special
        raise Fault(f"{path} cannot be read: {one_line(e)}") from e


def fill_in_defaults(config, script="train.py"):
    """Return a run's config, with keys that the script has got since then at their defaults."""
    return defaults_of(script) | config


# --------------------------------------------------------------------------------------------------
# The folder


def read_checkpoint(path):
    """Return a checkpoint, on the CPU. Raise Fault if it is damaged or missing."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for part in ["config", *CHECKPOINT_PARTS]:
            checkpoint[part]
    except Exception as e:
        advice = "remove it, or --resume=never starts anew"
        raise Fault(f"{path} cannot be read: {one_line(e)}; {advice}") from e
    return checkpoint


class Run:
    """The folder of one run, and its checkpoint if there is one to continue."""

    def __init__(self, folder, config, script, free_keys, rates, resume, rank=0):
        """Look at the folder; change nothing but its lock. Raise Fault if this run cannot be there.

        free_keys: what may differ between the parts of one run.
        rates: function of (checkpoint, config) that returns the learning rate and the batch.
        """
        self.folder = Path(folder)
        self.config = config
        self.script = script
        self.free_keys = free_keys
        self.rates = rates
        self.is_locked = rank != 0  # the first process has the lock for all
        self.held = contextlib.ExitStack()

        # the folder is new, or that of a run
        is_run = (self.folder / "log.jsonl").exists()
        if not is_run and self.has_other_files():
            raise Fault(f"{folder} holds files that are not of a run; choose another out_dir")
        # a run that another process is working on is not looked at
        if is_run:
            self.lock()
        if (self.folder / "model.pt").exists() and resume == "auto":
            advice = "choose another out_dir, or --resume=never to overwrite it"
            more = f"--init_from={folder} starts another run from it"
            raise Fault(f"{folder} holds a finished run; {advice}; {more}")

        # a checkpoint to continue
        self.path = self.folder / CHECKPOINTS[0]
        self.is_damaged = False
        self.checkpoint = None
        if self.saved() and resume == "auto":
            self.checkpoint = self.load_checkpoint()

    def has_other_files(self):
        """Return whether the folder has files that are neither locks nor logs of a scheduler."""
        paths = self.folder.iterdir() if self.folder.exists() else []
        return any(not any(map(path.match, NOT_OF_A_RUN)) for path in paths)

    def lock(self):
        """Keep other processes out of the folder until this one ends, however it ends."""
        if not self.is_locked:
            self.held.enter_context(lock(self.folder / "train.lock", self.folder))
            self.is_locked = True

    def close(self):
        """Let other processes into the folder."""
        self.held.close()

    def saved(self):
        """Return the paths of the checkpoints that exist, the last one first."""
        paths = [self.folder / name for name in CHECKPOINTS]
        return [path for path in paths if path.exists()]

    def load_checkpoint(self):
        """Return the last checkpoint, or the one before if that is damaged, on the CPU.

        Raise Fault if all are damaged, or of another experiment.
        """
        last, *older = self.saved()
        try:
            checkpoint = read_checkpoint(last)
        except Fault as e:
            if not older:
                raise
            print(f"warning: {e}; the one before is taken, {older[0].name}")
            self.is_damaged = True
            checkpoint = read_checkpoint(older[0])

        # what has changed since
        old = fill_in_defaults(checkpoint["config"], self.script)
        changed = {}
        for key, value in old.items():
            if key not in self.free_keys and self.config.get(key) != value:
                changed[key] = f"{key} was {value!r}, now {self.config.get(key)!r}"
        if changed and changed.keys() <= BUDGET_KEYS and self.is_longer_than(old):
            self.require_same_rates(checkpoint, old)
        elif changed:
            what = f"{last} is of another experiment: {'; '.join(changed.values())}"
            raise Fault(f"{what}; choose another out_dir, or --resume=never")
        return checkpoint

    def is_longer_than(self, old):
        """Return whether the config has a larger budget than an old one, of the same kind."""
        new = self.config
        same_kind = bool(new["max_steps"]) == bool(old["max_steps"])
        return same_kind and all(new[key] >= old[key] for key in BUDGET_KEYS)

    def require_same_rates(self, checkpoint, old):
        """Raise Fault if a longer budget changes the learning rate or the batch at once."""
        before = self.rates(checkpoint, old)
        after = self.rates(checkpoint, self.config)
        if not math.isclose(before[0], after[0]) or before[1] != after[1]:
            jump = "learning rate {:.3g} and {} rows become {:.3g} and {}".format(*before, *after)
            branch = f"--init_from={self.path} --schedule=linear --warmup=0.0 --out_dir=ANOTHER"
            what = f"with a longer budget, the schedule of {self.folder} jumps here ({jump})"
            raise Fault(f"{what}; {branch} branches off, with a budget of its own")

    def restore(self, checkpoint, model, optimizers, scaler):
        """Load a checkpoint into the model, its optimizers and the loss scaler."""
        if checkpoint["model"].keys() != model.state_dict().keys():
            what = f"{self.path} was saved by another version of the model, with other parameters"
            raise Fault(f"{what}; continue it with that version, or --resume=never")
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)

        # the scaler, and what may explain that the curve goes on differently
        if checkpoint["scaler"]:  # empty if that part of the run was not in fp16
            scaler.load_state_dict(checkpoint["scaler"])
        if checkpoint["torch"] != str(torch.__version__):
            versions = f"torch {checkpoint['torch']}, this is {torch.__version__}"
            print(f"warning: the run began with {versions}")

    def begin(self, state, tokenizer):
        """Create the folder, or cut its log back to the checkpoint. Sets the clock in `state`.

        tokenizer: the file to keep a copy of.
        """
        # all checks have passed: the first change on the disk
        log = self.folder / "log.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.is_locked:
            self.lock()
            if log.exists():
                raise Fault(f"another process has begun a run in {self.folder}; do not start two")

        # go on, or begin with an empty log and none of the files of an older run
        if self.checkpoint:
            # kills must not stretch the budget: time after the last checkpoint counts as well
            state["elapsed"] = max(state["elapsed"], truncate_log(log, state["step"]))
            hours = state["elapsed"] / 3600
            where = f"at step {state['step']:,}, {hours:.3f} h into the budget"
            print(f"continuing {self.folder} {where}")
        else:
            log.write_text("")
            shutil.copy(tokenizer, self.folder / "tokenizer.json")
            for name in OUTPUT_FILES:
                (self.folder / name).unlink(missing_ok=True)
            for name in OUTPUT_FOLDERS:
                shutil.rmtree(self.folder / name, ignore_errors=True)

        write_json(self.folder / "config.json", self.config)

    def save(self, state, model, optimizers, scaler):
        """Write ckpt.pt, and keep the one before. state: {step, tokens, rows, elapsed, world}."""
        parts = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
        }
        more = {"config": self.config, "torch": str(torch.__version__)}

        # a damaged one takes the place of none that can be read
        keep = None if self.is_damaged else self.folder / CHECKPOINTS[1]
        save_torch(self.path, parts | state | more, keep)
        self.is_damaged = False


class StopRequest:
    """A reason to stop before the end: a signal that has arrived, or lack of memory."""

    def __init__(self):
        self.reason = ""
        # Python allows no handler in another thread, in which Ray Train runs its workers
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.reason = "stopped"
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait


# --------------------------------------------------------------------------------------------------
# The log


def read_log(path):
    """Return the entries of a log.jsonl, without lines that are damaged, which are counted.

    A kill may have torn the last line; that is nothing to tell.
    """
    entries = []
    damaged = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and "hours" in entry:
            entries.append(entry)
        elif number < len(lines):
            damaged.append(number)
    if damaged:
        found = f"{len(damaged):,} damaged lines, the first is line {damaged[0]}"
        print(f"warning: {path} has {found}; they are left out")
    return entries


def truncate_log(path, step):
    """Drop the log lines after `step`. Return the time of the last line, in seconds."""
    # the time of the steps that are lost stays spent
    entries = read_log(path)
    hours = max((entry["hours"] for entry in entries), default=0.0)
    kept = [entry for entry in entries if entry["step"] <= step]
    kept.append({"step": step, "hours": hours, "resumed": True})  # keeps the time for the next kill
    with replace_file(path) as f:
        f.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())
    return hours * 3600


def add_time_fraction(entries, config):
    """Give each entry of a log its `time_fraction`: the part of the run's time that has passed.

    By the clock, that is its progress. With max_steps, progress is the fraction of the steps,
    and the steps of a growing batch take longer and longer. Then it is the fraction of the
    tokens, as soon as all of them are seen.
    """
    last = entries[-1]
    by_tokens = config.get("max_steps") and last.get("progress") == 1
    for entry in entries:
        if by_tokens and "tokens" in entry:
            entry["time_fraction"] = entry["tokens"] / last["tokens"]
        else:
            entry["time_fraction"] = entry.get("progress")


class Log:
    """log.jsonl, and what it says on the terminal: as a bar, or in a file as lines."""

    def __init__(self, folder, rank, budget_hours, max_steps, max_tokens):
        """Open the log to append to it. Ranks other than 0 write nothing.

        max_tokens: the tokens of all max_steps steps, 0 if the clock decides.
        """
        self.file = open(os.devnull if rank else folder / "log.jsonl", "a", buffering=1)
        self.budget_hours = budget_hours
        self.max_steps = max_steps
        self.max_tokens = max_tokens
        self.next_line = -math.inf  # when a line about training is due
        self.wandb = None
        unit = "steps" if max_steps else "s"
        self.bar = tqdm(
            total=max_steps or round(budget_hours * 3600),
            bar_format="{percentage:3.0f}%|{bar}| {n:.0f}/{total} " + unit + "{postfix}",
            disable=True if rank else None,  # None: plain lines if the output is no terminal
        )

    def write(self, state, progress, **entry):
        """Write one entry, after the step, tokens, hours and progress that it belongs to."""
        # the file
        elapsed = state["elapsed"]
        head = {"step": state["step"], "tokens": state["tokens"]}
        head |= {"hours": elapsed / 3600, "progress": progress}
        self.file.write(json.dumps(head | entry) + "\n")
        if self.wandb:
            self.wandb.log(head | entry, step=state["step"])

        # the terminal
        self.bar.n = min(state["step"] if self.max_steps else round(elapsed), self.bar.total)
        where = f"step {state['step']:,}, {elapsed:,.0f} s"
        if "loss" not in entry:
            shown = [f"{name} {x:,.4g}" for name, x in entry.items() if x is not None]
            tqdm.write(f"{where}: {', '.join(shown)}")
            return
        line = self.training_line(state, entry)
        if not self.bar.disable:
            self.bar.set_postfix_str(line)
        elif time.monotonic() >= self.next_line:
            print(f"{where}, {progress:.0%}: {line}")
            self.next_line = time.monotonic() + SECONDS_PER_LINE

    def training_line(self, state, entry):
        """Return the loss, the speed, and how long the run still takes at this speed."""
        loss = math.nan if entry["loss"] is None else entry["loss"]
        speed = entry["tokens_per_s"]
        line = f"loss {loss:.3f}, {speed:,.0f} tokens/s, MFU {entry['mfu']:.0%}"

        # by the clock, or by what is left to do; a batch that grows is in that already
        if not self.max_steps:
            seconds = self.budget_hours * 3600 - state["elapsed"]
        elif speed:
            seconds = (self.max_tokens - state["tokens"]) / speed
        else:
            return line
        return f"{line}, {tqdm.format_interval(max(seconds, 0))} left"

    def close(self):
        self.bar.close()
        self.file.close()


def start_wandb(folder, config, resumed):
    """Return the module wandb with a run begun or continued. Raise Fault if it is not installed."""
    try:
        import wandb
    except ImportError as e:
        raise Fault("wandb_log=True needs `pip install wandb`") from e
    resume = "allow" if resumed else None
    name = str(folder).replace("/", "-")
    wandb.init(project="nanocram", name=folder.name, config=config, id=name, resume=resume)
    return wandb
