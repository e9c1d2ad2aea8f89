"""Between Hugging Face's BERT and ours: weights by name, config and tokenizer of a folder or of a hub id.

finetune_glue.py uses it to score a fully trained BERT under the same protocol: --glue_init=google-bert/bert-base-uncased
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model import Config

# ours: Hugging Face's, in BertForMaskedLM. Without a suffix: .weight and .bias. Three names make one fused layer.
LAYER = "bert.encoder.layer.{i}."
NAMES = {
    "embedding.weight": "bert.embeddings.word_embeddings.weight",
    "position_embedding.weight": "bert.embeddings.position_embeddings.weight",
    "type_embedding.weight": "bert.embeddings.token_type_embeddings.weight",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "blocks.{i}.qkv": [LAYER + f"attention.self.{name}" for name in ("query", "key", "value")],
    "blocks.{i}.out": LAYER + "attention.output.dense",
    "blocks.{i}.norm1": LAYER + "attention.output.LayerNorm",
    "blocks.{i}.up": LAYER + "intermediate.dense",
    "blocks.{i}.down": LAYER + "output.dense",
    "blocks.{i}.norm2": LAYER + "output.LayerNorm",
    "transform": "cls.predictions.transform.dense",
    "transform_norm": "cls.predictions.transform.LayerNorm",
    "decoder_bias": "cls.predictions.bias",
}


def name_pairs(n_layer):
    """[(our name, [their names])] of every tensor of a BERT with n_layer blocks."""
    pairs = []
    for ours, theirs in NAMES.items():
        theirs = theirs if isinstance(theirs, list) else [theirs]
        for i in range(n_layer) if "{i}" in ours else [0]:
            for suffix in [""] if ours.endswith(".weight") or ours == "decoder_bias" else [".weight", ".bias"]:
                pairs.append((ours.format(i=i) + suffix, [t.format(i=i) + suffix for t in theirs]))
    return pairs


def from_hf(state, n_layer):
    """Their state dict, of BertForMaskedLM or BertModel, in our names. KeyError if a tensor of the encoder is missing."""
    old = {"gamma": "weight", "beta": "bias"}  # names in the first BERT checkpoints
    state = {".".join(old.get(part, part) for part in name.split(".")): tensor for name, tensor in state.items()}
    state = {name if name.startswith(("bert.", "cls.")) else f"bert.{name}": tensor for name, tensor in state.items()}
    pairs = name_pairs(n_layer)
    if "cls.predictions.bias" not in state:  # BertModel has no head
        pairs = [(ours, theirs) for ours, theirs in pairs if not theirs[0].startswith("cls.")]
    return {ours: torch.cat([state[t] for t in theirs]).float() for ours, theirs in pairs}


def to_hf(state, n_layer):
    """The inverse: our state dict of a BERT-base-like model in the names of BertForMaskedLM."""
    out = {}
    for ours, theirs in name_pairs(n_layer):
        out |= dict(zip(theirs, state[ours].chunk(len(theirs))))
    return out


def load_bert(source):
    """(Config, weights, tokenizer, pooler or None) of a folder, or of a hub id, that holds a Hugging Face BERT.

    pooler: {weight, bias} of BERT's own pooling layer. Reads config.json, tokenizer.json or vocab.txt, model.safetensors or
    pytorch_model.bin (weights only: the file can run no code). SystemExit, one line, for anything else.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            files = ["config.json", "tokenizer.json", "vocab.txt", "model.safetensors", "pytorch_model.bin"]
            folder = Path(snapshot_download(source, allow_patterns=files))
        except Exception as e:
            reason = (str(e).strip() or "no reason given").splitlines()[0]
            sys.exit(f"export_hf.py: {source!r} is no folder, and the hub gives {type(e).__name__}: {reason}")
    try:
        c = json.loads((folder / "config.json").read_text())
        kinds = c["model_type"], c.get("hidden_act", "gelu"), c.get("position_embedding_type", "absolute")
        if kinds != ("bert", "gelu", "absolute"):
            sys.exit(f"export_hf.py: {folder} is a {', '.join(kinds)}; only a bert, gelu, absolute can be loaded")
        state = load_weights(folder)
        weights = from_hf(state, c["num_hidden_layers"])
    except (OSError, KeyError, ValueError) as e:
        sys.exit(f"export_hf.py: {folder} is no complete BERT: {type(e).__name__}: {e}")
    config = Config(
        vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"], n_embd=c["hidden_size"],
        n_inner=c["intermediate_size"], max_len=c["max_position_embeddings"], norm_eps=c.get("layer_norm_eps", 1e-12),
        norm_place="post", bias=True, glu=False, position="learned", final_norm=False, token_types=c["type_vocab_size"],
        head_transform="decoder_bias" in weights, decoder_bias="decoder_bias" in weights,
    )  # fmt: skip
    pooler = {k: v.float() for k in ("weight", "bias") for n, v in state.items() if n.endswith(f"pooler.dense.{k}")}
    return config, weights, load_tokenizer(folder), pooler or None


def load_weights(folder):
    if (folder / "model.safetensors").exists():
        try:
            from safetensors.torch import load_file
        except ImportError:
            sys.exit(f"export_hf.py: {folder / 'model.safetensors'} needs `pip install safetensors`")
        return load_file(folder / "model.safetensors")
    try:
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:
        raise ValueError(f"pytorch_model.bin cannot be read: {type(e).__name__}") from e


def load_tokenizer(folder):
    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if not (folder / "vocab.txt").exists():
        sys.exit(f"export_hf.py: {folder} has neither tokenizer.json nor vocab.txt")
    from tokenizers.implementations import BertWordPieceTokenizer

    settings = folder / "tokenizer_config.json"
    lowercase = json.loads(settings.read_text()).get("do_lower_case", True) if settings.exists() else True
    return Tokenizer.from_str(BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lowercase).to_str())
