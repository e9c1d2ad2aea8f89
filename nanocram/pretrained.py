"""Start a run from weights that exist, which the key init_from names.

They are those of a finished run (its folder), of a Hugging Face BERT (its folder, or an id on the
hub), or of a checkpoint (a ckpt.pt, next to its tokenizer.json). The first two get a new optimizer.
A checkpoint is a branch: its optimizer goes on. The clock and the schedule begin anew for all.

The architecture is that of the weights, and the corpus must have the tokenizer of the weights.
"""

from dataclasses import dataclass
from pathlib import Path

from model import BERT, Config
from nanocram.faults import Fault, one_line, read_json
from nanocram.huggingface import load_bert
from nanocram.runs import CHECKPOINTS, open_run, read_checkpoint
from nanocram.tokenizer import read_tokenizer, tokenizer_difference

# keys of the model that are free: `dropout` has no weights, and positions can be added or cut off
FREE = {"dropout", "max_len", "vocab_size"}


@dataclass
class Origin:
    """What a run starts from."""

    source: str  # the key init_from
    config: dict  # the fields of the model's Config
    weights: dict  # {name: tensor}; empty if the run itself has a checkpoint, which it continues
    checkpoint: dict  # of a branch, else empty

    def restore(self, model, optimizers, scaler, lr):
        """Load the weights, and for a branch the optimizers. Return the row of the corpus to read.

        lr: the learning rate of the first step.
        """
        model.load_state_dict(fit_weights(self.weights, model.config, self.source))
        print(f"starting from {self.source}")
        if not self.checkpoint:
            return 0

        # the state of the optimizers, with the learning rate and the decay of this run
        old_lr = self.checkpoint["optimizers"][0]["param_groups"][0]["lr"]
        for optimizer, saved in zip(optimizers, self.checkpoint["optimizers"]):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(saved | {"param_groups": groups})
        if self.checkpoint["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(self.checkpoint["scaler"])
        if abs(lr - old_lr) > 0.01 * old_lr:
            jump = f"the learning rate was {old_lr:.3g} there, and begins with {lr:.3g} here"
            print(f"warning: {jump}; a branch from a plateau goes on with the same")
        return self.checkpoint["rows"]


# --------------------------------------------------------------------------------------------------
# Read the weights


def load_origin(config, data):
    """Return the Origin of a run with this config. Raise Fault if it cannot start there.

    data: the folder of the corpus.
    """
    source = config["init_from"]
    if config["count_tokens"]:
        raise Fault("count_tokens makes an embedding, and init_from brings one; unset one of them")

    # a run that was killed continues from its own checkpoint, also if the source is gone
    folder = Path(config["out_dir"])
    has_checkpoint = any((folder / name).exists() for name in CHECKPOINTS)
    if config["resume"] == "auto" and has_checkpoint and (folder / "config.json").exists():
        return Origin(source, read_json(folder / "config.json"), {}, {})

    # read it, whatever it is
    path = Path(source)
    checkpoint = {}
    if path.is_file():
        checkpoint = load_branch(path, config)
        own_config = checkpoint["config"]
        weights = checkpoint["model"]
        tokenizer = tokenizer_in(path.parent)
    elif (path / "log.jsonl").exists() and not (path / "model.pt").exists():
        branch = f"--init_from={path}/ckpt.pt branches off"
        raise Fault(f"{path} is not finished, so it has no model.pt; {branch}")
    elif (path / "model.pt").exists():
        model, tokenizer = open_run(path)
        own_config = vars(model.config)
        weights = model.state_dict()
    else:
        bert = load_bert(source)
        own_config = vars(bert.config)
        weights = bert.weights
        tokenizer = bert.tokenizer
        if not bert.config.head_transform:
            print(f"{source} has no head for masked words; its embedding is the decoder")

    # ids mean something only with the tokenizer that gave them
    difference = tokenizer_difference(tokenizer, tokenizer_in(data))
    if difference:
        raise Fault(
            f"the corpus in {data} has another {difference} than {source}; "
            f"prepare.py with --tokenizer_file={source_of_tokenizer(source)} makes one that fits"
        )
    return Origin(source, own_config, weights, checkpoint)


def load_branch(path, config):
    """Return the checkpoint from which a run branches off. Raise Fault if its optimizer differs."""
    checkpoint = read_checkpoint(path)
    old = checkpoint["config"]["optimizer"]
    if old != config["optimizer"]:
        now = f"optimizer was {old!r}, now {config['optimizer']!r}"
        raise Fault(f"a branch goes on with the optimizer of {path}: {now}")
    if checkpoint["config"]["train_sha256"] != config["train_sha256"]:
        checkpoint["rows"] = 0  # another corpus, which begins at its first row
    return checkpoint


def tokenizer_in(folder):
    try:
        return read_tokenizer(folder)
    except Exception as e:  # tokenizers raises nothing more special
        raise Fault(f"the tokenizer in {folder} cannot be read: {one_line(e)}") from e


def source_of_tokenizer(source):
    """Return what the key tokenizer_file is for these weights: a checkpoint's is in its folder."""
    return str(Path(source).parent) if Path(source).is_file() else source


# --------------------------------------------------------------------------------------------------
# Fit the model to the weights, and the weights to the corpus


def adopt_architecture(config, origin, given, seq_len):
    """Return a run's config with the architecture of an Origin.

    given: the keys that were set on purpose. Raise Fault if one of the model's differs.
    """
    # the architecture, with fields that are younger than the weights at their defaults
    names = Config.__dataclass_fields__.keys()
    fields = {name: value for name, value in origin.config.items() if name in names}
    architecture = vars(Config(**fields))

    # what was set on purpose must agree with it
    changed = []
    for name in names - FREE:
        if name in given and config[name] != architecture[name]:
            changed.append(f"{name} is {architecture[name]!r} there, {config[name]!r} here")
    if changed:
        what = f"init_from={origin.source} has another architecture: {'; '.join(sorted(changed))}"
        raise Fault(f"{what}; leave these keys out")

    free = {name: config[name] for name in FREE}
    if "max_len" not in given:
        free["max_len"] = max(architecture["max_len"], seq_len)
    is_resized = (
        architecture["position"] == "learned" and free["max_len"] != architecture["max_len"]
    )
    if origin.checkpoint and is_resized:
        what = f"a branch keeps its {architecture['max_len']} learned positions and their optimizer"
        raise Fault(f"{what}; start from the folder of the finished run for {free['max_len']}")
    if free["vocab_size"] > architecture["vocab_size"]:
        sizes = f"{architecture['vocab_size']:,} tokens, the corpus {free['vocab_size']:,}"
        raise Fault(f"{origin.source} has an embedding of {sizes}")
    return config | architecture | free


def fit_weights(weights, config, source):
    """Return weights for this Config, with fewer tokens or other learned positions if it has them.

    Raise Fault if they do not fit otherwise.
    """
    weights = dict(weights)
    # an embedding may have more rows than its tokenizer has ids
    for name in ("embedding.weight", "decoder.weight", "decoder_bias"):
        if name in weights and len(weights[name]) > config.vocab_size:
            n_more = len(weights[name]) - config.vocab_size
            print(f"{name} loses {n_more} rows for which the tokenizer has no token")
            weights[name] = weights[name][: config.vocab_size]

    # learned positions
    name = "position_embedding.weight"
    if name in weights:
        weights[name] = fit_positions(weights[name], config.max_len)

    shapes = {key: tensor.shape for key, tensor in BERT(config).state_dict().items()}
    if {key: tensor.shape for key, tensor in weights.items()} != shapes:
        raise Fault(f"the weights of {source} do not fit their own architecture; is it complete?")
    return weights


def fit_positions(table, max_len):
    """Return a table (max_len, D) of learned positions. Later ones begin as copies of the first.

    So did Longformer (Beltagy et al. 2020, arXiv 2004.05150): attention to near tokens, which is
    learned, works at every position from the start.
    """
    n = len(table)
    if max_len > n:
        print(f"learned positions {n} to {max_len - 1} begin as copies of 0 to {n - 1}, in turns")
    if max_len < n:
        print(f"learned positions {max_len} to {n - 1} are cut off")
    repeats = -(-max_len // n)
    return table.repeat(repeats, 1)[:max_len]
