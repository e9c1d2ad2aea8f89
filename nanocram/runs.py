"""The checkpoint and the log of a run, which survive kill -9, a full disk and a change of the code."""

import errno
import json
import sys

import torch

from configurator import declared, one_line, replace_file

# What may differ between the parts of one run; a change of anything else would be another experiment.
FREE_KEYS = """resume out_dir device dtype compile micro_batch_size eval_minutes checkpoint_minutes log_seconds check_data
wandb_log""".split()


def completed(config):
    """A run's config; a key that is younger than the run has its default."""
    keys = {**declared("train.py"), **declared("model.py")}
    return {k: value for k, (value, _) in keys.items() if k not in FREE_KEYS} | config


def load_checkpoint(path, config):
    """The checkpoint, on the CPU. SystemExit if it is damaged, or of another experiment."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        old = completed(ckpt["config"])
        _ = [ckpt[k] for k in "model optimizers scaler step tokens rows elapsed world torch".split()]
    except Exception as e:
        sys.exit(f"train.py: {path} cannot be read: {one_line(e)}; remove it, or --resume=never starts anew")
    changed = [f"{k} was {old[k]!r}, now {config.get(k)!r}" for k in old if k not in FREE_KEYS and config.get(k) != old[k]]
    if changed:
        sys.exit(f"train.py: {path} is of another experiment: {'; '.join(changed)}; choose another out_dir, or --resume=never")
    return ckpt


def read_log(path):
    """The entries of a log.jsonl, but for a line that a kill has torn."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def add_shares(entries, config):
    """Gives each entry of a log its `share`, of the run's time.

    That is progress, but with max_steps progress is a share of the steps, and those of a growing batch take longer and longer:
    then it is the share of the tokens, once all are seen.
    """
    last = entries[-1]
    by_tokens = config.get("max_steps") and last.get("progress") == 1
    for e in entries:
        e["share"] = e["tokens"] / last["tokens"] if by_tokens and "tokens" in e else e.get("progress")


def cut_log(path, step):
    """Drops the log lines after `step`, and a torn one. Returns the time of the latest one before that, in seconds."""
    entries = read_log(path)
    hours = max((entry["hours"] for entry in entries), default=0.0)
    kept = [entry for entry in entries if entry["step"] <= step]
    kept.append({"step": step, "hours": hours, "resumed": True})  # for the next kill
    with replace_file(path) as f:
        f.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())
    return hours * 3600


def torch_save(path, value):
    """torch.save, complete or not at all: what stood at `path` goes when the new file is whole and was read back."""
    with replace_file(path) as f:
        try:
            torch.save(value, f)
            f.flush()
            torch.load(f.name, map_location="cpu", weights_only=True)
        except RuntimeError as e:  # torch's writer replaces the error of the file by its own
            raise OSError(errno.EIO, f"could not be written ({str(e).splitlines()[0]})", str(path)) from e
