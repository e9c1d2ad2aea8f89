# The paper's study, one entry per row: what it changes in the crammed recipe. All three stages take
# --ablation=NAME (python train.py config/crammed.py --ablation=rotary), and tools.sweep runs many.
#
# This file is run with the keys of the config as its variables. So an entry says `n_layer // 2`,
# and that means half the layers of any recipe, also after --scale=cpu. "[repo]" is the authors'
# code, see config/crammed.py.
#
# Several changes are joined by +. What is each part of the recipe worth? In tools.sweep:
#
#   original_both+unfiltered_unsorted           everything as BERT had it
#   original_training+unfiltered_unsorted       but the architecture
#   original_architecture+unfiltered_unsorted   but the training
#   original_both                               but the data
#   crammed                                     nothing


def _heads(n):
    """Return the width that n heads of the same size make, and its feed-forward layer."""
    return {"n_head": n, "n_embd": n_embd // n_head * n, "n_inner": n_inner // n_head * n}


def _batch(parts):
    """Return the rows of that part of the batch, or of one micro-batch if it is larger."""
    return max(batch_size // parts, micro_batch_size)


scales = {
    # Minutes of two CPU cores: a third of the width, a quarter of the layers and of the
    # vocabulary, a 128th of the batch. Rotary positions, since with the scaled sinusoid attention
    # does not begin to pay in so short a time (results/README.md).
    "cpu": {
        "out_dir": f"{out_dir}_cpu",
        "dataset": f"{dataset}_cpu",
        "max_chars": 50_000_000,  # about an epoch
        "max_rows": 0,
        "vocab_size": vocab_size // 4,
        "filter_ratio": 1.2 * filter_ratio,  # a smaller vocabulary makes more tokens
        "val_rows": 1024,
        "n_layer": n_layer // 4,
        **_heads(n_head // 3),
        "position": "rotary" if position == "scaled_sinusoidal" else position,
        "rotary_base": 1000.0 if position in ("scaled_sinusoidal", "rotary") else rotary_base,
        "batch_size": max(batch_size // 128, 16),
        "batch_ramp_rows": 16,
        "micro_batch_size": 16,
        "learning_rate": 2 * learning_rate,
        "budget_hours": budget_hours / 144,  # ten minutes
        "eval_minutes": 2.0,
        "checkpoint_minutes": 5.0,
        "glue_learning_rate": 2e-4,
        "glue_pooling": "mean",
        "glue_max_train": 8000,
        "glue_seeds": 3,
    },
}

# BERT with what lets it train in a day, pre-norm [repo: arch crammed-bert-simple]
_minimal_architecture = {
    "n_layer": n_layer * 3 // 4,
    "bias": True,
    "glu": False,
    "position": "learned",
    "final_norm": False,
    "head_transform": True,
    "decoder_bias": True,
}
architecture = {
    # BERT's
    "original_architecture": _minimal_architecture | {"norm_place": "post", "token_types": 2},
    "minimal_architecture": _minimal_architecture,
    "fourier": {"attention": "fourier", "position": "scaled_sinusoidal"},
    "flash": {"attention": "flash"},
    "two_thirds_of_heads": {"n_head": max(n_head * 2 // 3, 1)},
    "third_of_heads": {"n_head": max(n_head // 3, 1)},
    "one_head": {"n_head": 1},
    # the paper's positions; this changes something only after --scale=cpu
    "scaled_sinusoidal_positions": {"position": "scaled_sinusoidal"},
    "rotary": {"position": "rotary"},
    "learned_positions": {"position": "learned"},
    "sinusoidal_positions": {"position": "sinusoidal"},
    "no_positions": {"position": "none"},
    "qk_norm": {"qk_norm": True},
    "neighbour_keys": {"position": "rotary", "neighbour_keys": True},
    "value_residual": {"value_residual": True},
    "biases": {"bias": True},
    "no_gating": {"glu": False},
    "no_gating_same_size": {"glu": False, "n_inner": n_inner * 3 // 4},
    "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2"},
    "rmsnorm": {"norm": "rmsnorm"},
    "post_norm": {"norm_place": "post", "final_norm": False},
    "no_embedding_norm": {"embedding_norm": False},
    "no_final_norm": {"final_norm": False},
    "head_transform": {"head_transform": True},
    "decoder_bias": {"decoder_bias": True},
    "untied": {"tie_weights": False},
    # the ladder of sizes, all trained for the same time; at full scale 2 to 24 layers, and widths
    # of 256 to 1,024
    "eighth_depth": {"n_layer": max(n_layer // 8, 1)},
    "quarter_depth": {"n_layer": max(n_layer // 4, 1)},
    "half_depth": {"n_layer": max(n_layer // 2, 1)},
    "three_quarters_depth": {"n_layer": max(n_layer * 3 // 4, 1)},
    "one_and_a_half_depth": {"n_layer": n_layer * 3 // 2},
    "third_width": _heads(round(n_head / 3)),
    "half_width": _heads(n_head // 2),
    "two_thirds_width": _heads(round(n_head * 2 / 3)),
    "four_thirds_width": _heads(round(n_head * 4 / 3)),
    # three shapes with four times the parameters of the blocks, which grow with the depth and with
    # the square of the width: 16 x 256, 7 x 384 and 4 x 512 with --scale=cpu
    "four_times_depth": {"n_layer": 4 * n_layer},
    "wider_and_deeper": {"n_layer": round(n_layer * 16 / 9), **_heads(round(n_head * 3 / 2))},
    "double_width": _heads(2 * n_head),
}

# BERT's training as [repo] runs it, with its schedule tied to the budget
_original_training = {
    "optimizer": "Adam",  # with the decay in the gradient, as the authors ran it
    "learning_rate": learning_rate / 10,
    "beta2": 0.999,
    "adam_eps": 1e-8,
    "grad_clip": 0.0,
    "dropout": 0.1,
    "mask_rate": 0.15,
    "batch_size": _batch(16),
    "batch_ramp": 0.0,
    "schedule": "cosine",
    "warmup": 0.06,
}
# and with the decay, the epsilon and the clipping of BERT's own code, as in config/bert_base.py
_original_training_decoupled = _original_training | {
    "optimizer": "adamw",
    "adam_eps": 1e-6,
    "grad_clip": 1.0,
}
training = {
    "original_training": _original_training,
    "original_training_decoupled": _original_training_decoupled,
    "original_both": _original_training | architecture["original_architecture"],
    "original_both_decoupled": _original_training_decoupled | architecture["original_architecture"],
    "minimal_training": {
        "learning_rate": learning_rate / 2,
        "grad_clip": 0.0,
        "mask_rate": 0.15,
        "batch_ramp": 0.0,
        "schedule": "cosine",
        "warmup": 0.06,
    },
    "adam_l2": {"optimizer": "Adam"},
    "radam": {"optimizer": "RAdam"},
    "nadam": {"optimizer": "NAdam"},
    # its step is a fraction of the weights' size, so its rate has another scale
    "adafactor": {"optimizer": "Adafactor", "learning_rate": 10 * learning_rate},
    "muon": {"optimizer": "muon", "learning_rate": 3 * learning_rate},
    "dropout": {"dropout": 0.1},
    "constant_schedule": {"schedule": "constant"},
    "linear_schedule": {"schedule": "linear"},
    "cosine_schedule": {"schedule": "cosine"},
    "inverse_sqrt_schedule": {"schedule": "inverse_sqrt", "warmup": 0.06},
    "one_cycle_schedule": {"triangle_base": 0.0, "cooldown": 0.5},
    "trapezoid_schedule": {"schedule": "trapezoid", "warmup": 0.06},
    "ramp_schedule": {"schedule": "ramp"},
    "mask_15": {"mask_rate": 0.15},
    "mask_20": {"mask_rate": 0.2},
    "mask_40": {"mask_rate": 0.4},
    "mask_60": {"mask_rate": 0.6},
    "mask_only": {"mask_80_10_10": False},
    "counted_embedding": {"count_tokens": 25_000_000, "decoder_bias": True},
    # at full scale 8,192, 4,096, 2,048, 1,024 and 512 rows; with --scale=cpu 64, 32 and 16, and so
    # that there are five as well, 128 and 256
    "no_batch_ramp": {"batch_ramp": 0.0},
    "double_batch": {"batch_size": 2 * batch_size},
    "double_batch_no_ramp": {"batch_size": 2 * batch_size, "batch_ramp": 0.0},
    "four_times_batch": {"batch_size": 4 * batch_size},
    "four_times_batch_no_ramp": {"batch_size": 4 * batch_size, "batch_ramp": 0.0},
    "half_batch": {"batch_size": _batch(2)},
    "half_batch_no_ramp": {"batch_size": _batch(2), "batch_ramp": 0.0},
    "quarter_batch": {"batch_size": _batch(4)},
    "quarter_batch_no_ramp": {"batch_size": _batch(4), "batch_ramp": 0.0},
    "eighth_batch": {"batch_size": _batch(8)},
    "eighth_batch_no_ramp": {"batch_size": _batch(8), "batch_ramp": 0.0},
    "sixteenth_batch": {"batch_size": _batch(16)},
    "sixteenth_batch_no_ramp": {"batch_size": _batch(16), "batch_ramp": 0.0},
}

data = {
    "unfiltered": {"filter_ratio": 0.0},
    "tighter_filter": {"filter_ratio": 0.9 * filter_ratio},
    "looser_filter": {"filter_ratio": 1.2 * filter_ratio},
    "unsorted": {"order": "shuffle"},
    "unfiltered_unsorted": {"filter_ratio": 0.0, "order": "shuffle"},
    "unigram_order": {"order": "unigram"},
    "reverse_unigram_order": {"order": "reverse_unigram"},
    "word_length_order": {"order": "word_length"},
    "fragment_order": {"order": "fragment"},
    "dedup": {"dedup_tokens": 18},  # about 75 bytes
    "with_cls": {"insert_cls": True},
    "without_sep": {"insert_sep": False},
    # unfiltered: a small vocabulary needs more tokens for the same text
    "vocab_eighth": {"vocab_size": vocab_size // 8, "filter_ratio": 0.0},
    "vocab_quarter": {"vocab_size": vocab_size // 4, "filter_ratio": 0.0},
    "vocab_half": {"vocab_size": vocab_size // 2, "filter_ratio": 0.0},
    "vocab_double": {"vocab_size": vocab_size * 2, "filter_ratio": 0.0},
    # 2^15 with --scale=cpu; 2^16 is as much as a token id of 16 bits can be
    "vocab_four_times": {"vocab_size": min(vocab_size * 4, 2**16), "filter_ratio": 0.0},
    "bpe_tokenizer": {"tokenizer_kind": "bpe"},
    "unigram_tokenizer": {"tokenizer_kind": "unigram"},
}
_sources = {
    "bookcorpus_wikipedia": [
        {"path": "bookcorpus/bookcorpus", "revision": "refs/convert/parquet", "split": "train"},
        {"path": "wikimedia/wikipedia", "name": "20231101.en", "split": "train"},
    ],
    "c4": [{"path": "allenai/c4", "name": "en", "split": "train"}],
    "pile_deduplicated": [{"path": "EleutherAI/the_pile_deduplicated", "split": "train"}],
    # the authors' list; this copy of the Pile lacks Books3
    "pile_natural_text": [
        {
            "path": "monology/pile-uncopyrighted",
            "split": "train",
            "where": {"meta.pile_set_name": ["Gutenberg (PG-19)", "Books3", "Wikipedia (en)"]},
        }
    ],
    # the web, filtered by rules and without any model
    "refinedweb": [{"path": "tiiuae/falcon-refinedweb", "split": "train", "column": "content"}],
    "oscar": [{"files": "oscar/*.jsonl.zst", "column": "content"}],
}
# Each source as it is (the first one is the paper's "original data"), filtered, and sorted as well
for _name, _entries in _sources.items():
    data[f"{_name}_raw"] = {"sources": _entries, "filter_ratio": 0.0, "order": "shuffle"}
    data[f"{_name}_filtered"] = {"sources": _entries, "order": "shuffle"}
    data[_name] = {"sources": _entries}

# Each entry has folders of its own
ablations = {}
for _name, _changes in (architecture | training).items():
    ablations[_name] = {"out_dir": f"{out_dir}_{_name}", **_changes}
for _name, _changes in data.items():
    ablations[_name] = {
        "out_dir": f"{out_dir}_{_name}",
        "dataset": f"{dataset}_{_name}",
        **_changes,
    }
