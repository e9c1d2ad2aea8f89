"""BERTs of Hugging Face in our names, and ours in theirs.

`load_bert` reads a BERT from a folder or from the hub, so that it can be scored like a run of ours:
a BERT, the crammed BERT that the authors of the paper have released, a ModernBERT of the form of
config/modern.py, or what tools.export_hf writes. Tests compare the logits with those of
`transformers`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

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
# The same for the crammed BERT of the paper's authors, whose names begin with "encoder." [repo].
CRAMMED_LAYER = "layers.{i}."
CRAMMED_NAMES = {
    "embedding.weight": ["embedding.word_embedding.weight"],
    "position_scale": ["embedding.pos_embedding.scale_factor"],
    "embedding_norm": ["embedding.norm"],
    "blocks.{i}.norm1": [CRAMMED_LAYER + "norm1"],
    "blocks.{i}.attention.qkv.weight": [
        CRAMMED_LAYER + "attn.self_attention.query_key_value.weight"
    ],
    "blocks.{i}.attention.out.weight": [CRAMMED_LAYER + "attn.dense.weight"],
    "blocks.{i}.norm2": [CRAMMED_LAYER + "norm2"],
    "blocks.{i}.feed_forward.up.weight": [CRAMMED_LAYER + "ffn.dense_in.weight"],
    "blocks.{i}.feed_forward.down.weight": [CRAMMED_LAYER + "ffn.dense_out.weight"],
    "final_norm": ["final_norm"],
}
# all that load_bert reads; a repository on the hub holds the same weights in several formats
HUB_FILES = ["config.json", *TOKENIZER_FILES]
WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin"]  # the first one that exists is read


class Pretrained(NamedTuple):
    """What a row of the scorecard can start from."""

    config: Config
    weights: dict  # a state dict with our names, in fp32
    tokenizer: Tokenizer
    pooler: dict | None  # {"weight", "bias"} of BERT's own pooling layer
    two_seps: bool  # whether a single text ends with <sep> <sep>, as an empty second one would


# --------------------------------------------------------------------------------------------------
# Names


def name_pairs(n_layer, names=NAMES):
    """Return [(our name, [their names])] for every tensor of a BERT with n_layer blocks."""
    pairs = []
    for ours, theirs in names.items():
        # one pair per block, and per weight and bias
        n_blocks = n_layer if "{i}" in ours else 1
        is_tensor = ours.endswith((".weight", "decoder_bias", "position_scale"))
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
# The crammed BERT of the paper's authors


def from_crammed(state, n_layer, n_head):
    """Return a state dict of the authors' model in our names, in fp32.

    Raise KeyError if a tensor is missing.
    """
    # torch.compile and the language model around the encoder put names in front
    theirs = {}
    for name, tensor in state.items():
        name = name.removeprefix("_orig_mod.").removeprefix("encoder.")
        theirs[name] = tensor
    ours = {}
    for our_name, (their_name,) in name_pairs(n_layer, CRAMMED_NAMES):
        tensor = theirs[their_name].float()
        if our_name.endswith("qkv.weight"):
            # their rows are (heads, 3, width / heads), ours (3, heads, width / heads)
            by_head = tensor.view(n_head, 3, -1, tensor.size(1))
            tensor = by_head.transpose(0, 1).reshape(tensor.shape)
        ours[our_name] = tensor
    return ours


def crammed_config(arch, folder):
    """Return the Config for `arch` in their config.json. Raise Fault if ours cannot be that."""
    embedding = arch["embedding"]
    attention = arch["attention"]
    found = [
        arch["norm"],
        arch["nonlin"],
        embedding["pos_embedding"],
        attention["type"],
        arch.get("norm_scheme", "pre"),
    ]
    wanted = ["LayerNorm", "GELUglu", "scaled-sinusoidal", "self-attention", "pre"]
    if found != wanted:
        what = f"{folder} is a crammed BERT with {', '.join(found)}"
        raise Fault(f"{what}; only {', '.join(wanted)} can be loaded")
    return Config(
        vocab_size=embedding["vocab_size"],
        n_layer=arch["num_transformer_layers"],
        n_head=attention["num_attention_heads"],
        n_embd=arch["hidden_size"],
        n_inner=arch["intermed_size"],
        max_len=embedding["max_seq_length"],
        norm_eps=arch["norm_eps"],
    )


# --------------------------------------------------------------------------------------------------
# ModernBERT, if all of its attention is global

# a part of our name of a tensor, and what stands there in ModernBertForMaskedLM
MODERN_NAMES = {
    "embedding.": "model.embeddings.tok_embeddings.",
    "embedding_norm.": "model.embeddings.norm.",
    "blocks.": "model.layers.",
    ".norm1.": ".attn_norm.",
    ".attention.qkv.": ".attn.Wqkv.",
    ".attention.out.": ".attn.Wo.",
    ".norm2.": ".mlp_norm.",
    ".feed_forward.up.": ".mlp.Wi.",
    ".feed_forward.down.": ".mlp.Wo.",
    "final_norm.": "model.final_norm.",
    "transform.": "head.dense.",
    "transform_norm.": "head.norm.",
    "decoder_bias": "decoder.bias",
}
# The architecture of ModernBERT with global attention only, see config/modern.py
MODERN_CONFIG = Config(position="rotary", first_norm=False, head_transform=True)
# settings that some other ModernBERT may have in another way
MODERN_VALUES = {
    "norm_bias": True,
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "rope_type": "default",
}


def modern_settings(config):
    """Return the settings of ModernBertForMaskedLM for a Config of this architecture."""
    theta = config.rotary_base
    rotary = {"rope_type": "default", "rope_theta": theta}
    return {
        "model_type": "modernbert",
        "architectures": ["ModernBertForMaskedLM"],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner // 2,
        "max_position_embeddings": config.max_len,
        "hidden_activation": "gelu",
        "norm_eps": config.norm_eps,
        "norm_bias": True,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "classifier_bias": config.bias,
        "decoder_bias": config.decoder_bias,
        "tie_word_embeddings": config.tie_weights,
        # global attention in all layers: in the words of transformers 5, and of transformers 4
        "layer_types": ["full_attention"] * config.n_layer,
        "rope_parameters": {"full_attention": rotary, "sliding_attention": rotary},
        "global_attn_every_n_layers": 1,
        "global_rope_theta": theta,
        "local_rope_theta": theta,
    }


def require_modern(settings, folder):
    """Raise Fault if config.json describes a ModernBERT that ours cannot be."""
    # the layers, in the words of transformers 5 or of transformers 4
    every = settings.get("global_attn_every_n_layers", 3)
    layers = settings.get("layer_types")
    if layers is None and every == 1:
        layers = ["full_attention"]
    if layers is None or "sliding_attention" in layers:
        what = "has local attention and two bases of its rotary positions"
        raise Fault(f"{folder} is a ModernBERT that {what}; only one without them can be loaded")

    # the rest
    rotary = settings.get("rope_parameters") or {}
    rotary = rotary.get("full_attention") or {}
    found = {
        "norm_bias": settings.get("norm_bias", False),
        "hidden_activation": settings.get("hidden_activation", "gelu"),
        "classifier_activation": settings.get("classifier_activation", "gelu"),
        "rope_type": rotary.get("rope_type", "default"),
    }
    for name, value in MODERN_VALUES.items():
        if found[name] != value:
            raise Fault(f"{folder} has {name} = {found[name]}; only {value} can be loaded")


def modern_config(settings, has_head):
    """Return the Config for the settings of a ModernBERT."""
    rotary = settings.get("rope_parameters") or {}
    rotary = rotary.get("full_attention") or {}
    return replace(
        MODERN_CONFIG,
        vocab_size=settings["vocab_size"],
        n_layer=settings["num_hidden_layers"],
        n_head=settings["num_attention_heads"],
        n_embd=settings["hidden_size"],
        n_inner=2 * settings["intermediate_size"],
        max_len=settings["max_position_embeddings"],
        norm_eps=settings.get("norm_eps", 1e-5),
        bias=settings.get("mlp_bias", False),
        rotary_base=rotary.get("rope_theta") or settings.get("global_rope_theta", 160000.0),
        head_transform=has_head,
        decoder_bias=has_head and settings.get("decoder_bias", True),
        tie_weights=not has_head or settings.get("tie_word_embeddings", True),
    )


def swap_gate(name, tensor):
    """Return the first layer of a gated one with its halves swapped; another tensor as it is."""
    if ".feed_forward.up." in name:
        value, gate = tensor.chunk(2)
        return torch.cat([gate, value])
    return tensor


def to_modern(state):
    """Return our state dict in the names of ModernBertForMaskedLM."""
    theirs = {}
    for our_name, tensor in state.items():
        name = our_name
        for ours, their in MODERN_NAMES.items():
            name = name.replace(ours, their)
        theirs[name] = swap_gate(our_name, tensor)
    return theirs


def from_modern(settings, state):
    """Return (Config, state dict in our names, in fp32) of a ModernBERT, for its settings.

    A head for masked language modelling is read, too, and no other one.
    """
    has_head = "ModernBertForMaskedLM" in settings.get("architectures", [])
    config = modern_config(settings, has_head)
    ours = {}
    for their_name, tensor in state.items():
        # a ModernBertModel alone has no prefix
        name = their_name
        if name.startswith(("embeddings.", "layers.", "final_norm.")):
            name = f"model.{name}"
        is_head = name.startswith(("head.", "decoder."))
        is_copy = name == "decoder.weight" and config.tie_weights
        if is_copy or not (name.startswith("model.") or is_head and has_head):
            continue
        for our, their in MODERN_NAMES.items():
            name = name.replace(their, our)
        ours[name] = swap_gate(name, tensor).float()
    return config, ours


# --------------------------------------------------------------------------------------------------
# Our own class in tools/modeling_nanocram.py

EXPORT_HEAD = ("transform.", "transform_norm.", "decoder.")


def to_export(state):
    """Return our state dict of a BERT in the names of NanocramForMaskedLM."""
    theirs = {}
    for name, tensor in state.items():
        if name == "decoder_bias":
            name = "decoder.bias"
        if not name.startswith(EXPORT_HEAD):
            name = f"model.bert.{name}"
        theirs[name] = tensor
    return theirs


def from_export(settings, state):
    """Return (Config, state dict in our names, in fp32) of a folder that has to_export's names.

    A head for masked language modelling is read, too, and no other one.
    """
    fields = {name: settings[name] for name in vars(Config()) if name in settings}
    config = Config(**fields)
    has_head = "NanocramForMaskedLM" in settings["architectures"]
    if not has_head:
        config = replace(config, head_transform=False, decoder_bias=False, tie_weights=True)

    ours = {}
    for name, tensor in state.items():
        # a NanocramModel alone has no prefix
        inside = name.removeprefix("model.")
        if inside.startswith("bert."):
            ours[inside.removeprefix("bert.")] = tensor.float()
        elif name == "decoder.bias":
            ours["decoder_bias"] = tensor.float()
        elif has_head and name.startswith(EXPORT_HEAD):
            ours[name] = tensor.float()
    if config.tie_weights:
        ours.pop("decoder.weight", None)
    return config, ours


# --------------------------------------------------------------------------------------------------
# Files


def load_bert(source):
    """Return a Pretrained from a folder, or from the id of a repository on the hub.

    Raise Fault if it is anything else than a complete BERT.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = download(source)
    try:
        settings = json.loads((folder / "config.json").read_text())
        kind = settings["model_type"]
        if kind == "crammedBERT":
            config = crammed_config(settings["arch"], folder)
            state = read_weights(folder)
            weights = from_crammed(state, config.n_layer, config.n_head)
        elif kind == "modernbert":
            require_modern(settings, folder)
            state = read_weights(folder)
            config, weights = from_modern(settings, state)
        elif kind == "nanocram":
            state = read_weights(folder)
            config, weights = from_export(settings, state)
        else:
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
    return Pretrained(config, weights, tokenizer, pooler or None, two_seps=kind == "crammedBERT")


def download(source):
    """Return the local folder of a model on the hub, with the files that load_bert reads."""
    try:
        from huggingface_hub import snapshot_download

        # one file of weights: the second one only if the first one does not exist
        for name in WEIGHT_FILES:
            folder = Path(snapshot_download(source, allow_patterns=[*HUB_FILES, name]))
            if (folder / name).exists():
                break
        return folder
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
    first, second = WEIGHT_FILES
    path = folder / first
    if not path.exists():
        path = folder / second
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise Fault(f"{path} needs `pip install safetensors`") from e
    return load_file(path)
