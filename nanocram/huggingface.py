"""BERTs of Hugging Face in our names, and ours in theirs.

`load_bert` reads a BERT from a folder or from the hub, so that it can be scored like a run of ours.
`from_hf` and `to_hf` translate state dicts; tests compare the logits with those of `transformers`.
"""

import json
from pathlib import Path

import torch

from model import Config
from nanocram.faults import Fault, one_line
from nanocram.tokenizer import TOKENIZER_FILES, read_tokenizer

# Our name of a tensor, and the names in BertForMaskedLM whose tensors it stacks.
# A name without a suffix stands for its .weight and its .bias; {i} is the number of the block.
EMBEDDINGS = "bert.embeddings."
LAYER = "bert.encoder.layer.{i}."
HEAD = "cls.predictions."
NAMES = {
    "embedding.weight": [EMBEDDINGS + "word_embeddings.weight"],
    "position_embedding.weight": [EMBEDDINGS + "position_embeddings.weight"],
    "type_embedding.weight": [EMBEDDINGS + "token_type_embeddings.weight"],
    "embedding_norm": [EMBEDDINGS + "LayerNorm"],
    "blocks.{i}.attention.qkv": [
        LAYER + "attention.self.query",
        LAYER + "attention.self.key",
        LAYER + "attention.self.value",
    ],
    "blocks.{i}.attention.out": [LAYER + "attention.output.dense"],
    "blocks.{i}.norm1": [LAYER + "attention.output.LayerNorm"],
    "blocks.{i}.feed_forward.up": [LAYER + "intermediate.dense"],
    "blocks.{i}.feed_forward.down": [LAYER + "output.dense"],
    "blocks.{i}.norm2": [LAYER + "output.LayerNorm"],
    "transform": [HEAD + "transform.dense"],
    "transform_norm": [HEAD + "transform.LayerNorm"],
    "decoder_bias": [HEAD + "bias"],
}
# all that load_bert reads; a repository on the hub holds the same weights in other formats, too
HUB_FILES = ["config.json", "model.safetensors", "pytorch_model.bin", *TOKENIZER_FILES]

# --------------------------------------------------------------------------------------------------
# Names


def name_pairs(n_layer):
    """Return [(our name, [their names])] for every tensor of a BERT with n_layer blocks."""
    pairs = []
    for ours, theirs in NAMES.items():
        # one pair per block, and per weight and bias
        n_blocks = n_layer if "{i}" in ours else 1
        is_tensor = ours.endswith(".weight") or ours == "decoder_bias"
        suffixes = [""] if is_tensor else [".weight", ".bias"]
        for i in range(n_blocks):
            for suffix in suffixes:
                names = [name.format(i=i) + suffix for name in theirs]
                pairs.append((ours.format(i=i) + suffix, names))
    return pairs


def modern_name(name):
    """Return the name that a tensor of any BERT checkpoint has in BertForMaskedLM of today."""
    parts = name.split(".")
    # the first BERT checkpoints had TensorFlow's names for the weight and the bias of a norm
    if parts[-1] == "gamma":
        parts[-1] = "weight"
    elif parts[-1] == "beta":
        parts[-1] = "bias"
    # a BertModel alone has no prefix
    if parts[0] not in ("bert", "cls"):
        parts = ["bert", *parts]
    return ".".join(parts)


def from_hf(state, n_layer):
    """Return a state dict of BertForMaskedLM or BertModel in our names, in fp32.

    Raise KeyError if a tensor of the encoder is missing.
    """
    state = {modern_name(name): tensor for name, tensor in state.items()}
    has_head = HEAD + "bias" in state
    ours = {}
    for our_name, their_names in name_pairs(n_layer):
        # a BertModel alone has no head; a tensor of the encoder must be there
        if their_names[0].startswith(HEAD) and not has_head:
            continue
        parts = [state[name] for name in their_names]
        ours[our_name] = torch.cat(parts).float()
    return ours


def to_hf(state, n_layer):
    """Return our state dict of a BERT in the names of BertForMaskedLM: the inverse of from_hf."""
    theirs = {}
    for our_name, their_names in name_pairs(n_layer):
        # their queries, keys and values are thirds of one matrix of ours
        parts = state[our_name].chunk(len(their_names))
        theirs.update(zip(their_names, parts))
    return theirs


# --------------------------------------------------------------------------------------------------
# Files


def load_bert(source):
    """Return (Config, weights, tokenizer, pooler or None) of a Hugging Face BERT.

    source: a folder, or an id on the hub. pooler: {"weight", "bias"} of BERT's own pooling layer.
    Raise Fault if it is anything else than a complete BERT.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = download(source)
    try:
        settings = json.loads((folder / "config.json").read_text())
        require_bert(settings, folder)
        state = read_weights(folder)
        weights = from_hf(state, settings["num_hidden_layers"])
        config = our_config(settings, has_head="decoder_bias" in weights)
        tokenizer = read_tokenizer(folder)
    except Fault:
        raise
    except Exception as e:  # safetensors and tokenizers raise nothing more special
        raise Fault(f"{folder} is no complete BERT: {one_line(e)}") from e

    # trained with next-sentence prediction; a classifier may begin with it
    pooler = {}
    for name, tensor in state.items():
        if "pooler.dense." in name:
            pooler[name.rpartition(".")[2]] = tensor.float()
    return config, weights, tokenizer, pooler or None


def download(source):
    """Return the local folder of a model on the hub, with the files that load_bert reads."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as e:
        raise Fault(f"{source!r} is no folder, and the hub gives {one_line(e)}") from e


def require_bert(settings, folder):
    """Raise Fault if config.json describes a model that ours cannot be."""
    kinds = [
        settings["model_type"],
        settings.get("hidden_act", "gelu"),
        settings.get("position_embedding_type", "absolute"),
    ]
    if kinds != ["bert", "gelu", "absolute"]:
        raise Fault(f"{folder} is a {', '.join(kinds)}; only a bert, gelu, absolute can be loaded")


def our_config(settings, has_head):
    """Return the Config for the settings in their config.json."""
    return Config(
        vocab_size=settings["vocab_size"],
        n_layer=settings["num_hidden_layers"],
        n_head=settings["num_attention_heads"],
        n_embd=settings["hidden_size"],
        n_inner=settings["intermediate_size"],
        max_len=settings["max_position_embeddings"],
        norm_eps=settings.get("layer_norm_eps", 1e-12),
        # what all BERTs have in common
        norm_place="post",
        bias=True,
        glu=False,
        position="learned",
        final_norm=False,
        token_types=settings["type_vocab_size"],
        # the head of masked language modelling, if the file has it
        head_transform=has_head,
        decoder_bias=has_head,
    )


def read_weights(folder):
    """Return the state dict in model.safetensors or pytorch_model.bin. Neither can run code."""
    path = folder / "model.safetensors"
    if not path.exists():
        path = folder / "pytorch_model.bin"
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise Fault(f"{path} needs `pip install safetensors`") from e
    return load_file(path)
