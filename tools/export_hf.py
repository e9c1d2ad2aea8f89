"""Write a folder that `transformers` loads, from a run or from one of its classifiers.

python -m tools.export_hf out/x --to=FOLDER                 the masked language model of a run
python -m tools.export_hf out/x --to=FOLDER --task=mrpc     a classifier that glue_save has kept

A model with the architecture of BERT becomes a BertForMaskedLM. Any other one brings its own
modelling file, for which `transformers` asks trust_remote_code=True.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, processors

from model import BERT, Config, rename_old_parameters
from nanocram.faults import Fault, one_line, run_script
from nanocram.huggingface import to_hf
from nanocram.rules import read_record, rules_lines, verdicts
from nanocram.runs import open_run, read_log
from nanocram.tokenizer import special_token

ROOT = Path(__file__).resolve().parent.parent
# The architecture of BERT, and the fields of Config in which BERTs may differ
BERT_CONFIG = Config(
    norm_place="post",
    bias=True,
    glu=False,
    position="learned",
    final_norm=False,
    head_transform=True,
    decoder_bias=True,
)
SIZES = "vocab_size n_layer n_head n_embd n_inner max_len norm_eps rotary_base token_types dropout"
AUTO_MAP = {
    "AutoConfig": "modeling_nanocram.NanocramConfig",
    "AutoModel": "modeling_nanocram.NanocramModel",
    "AutoModelForMaskedLM": "modeling_nanocram.NanocramForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_nanocram.NanocramForSequenceClassification",
}

# --------------------------------------------------------------------------------------------------
# config.json


def is_bert(config):
    """Return whether BertForMaskedLM has this architecture."""
    for name, value in vars(BERT_CONFIG).items():
        if name not in SIZES.split() and getattr(config, name) != value:
            return False
    return config.token_types > 0


def bert_config(config):
    """Return the settings of BertForMaskedLM for a Config."""
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "max_position_embeddings": config.max_len,
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.token_types,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }


def own_config(config, kind):
    """Return the settings of a class in modeling_nanocram.py for a Config."""
    return {
        "model_type": "nanocram",
        "architectures": [kind],
        "auto_map": AUTO_MAP,
        "architecture": vars(config),
    }


# --------------------------------------------------------------------------------------------------
# The files of the folder


def write_masked_lm(folder, model, tokenizer):
    """Write the model of a run, a BERT, into the folder. Return the class that loads it."""
    # a class of transformers, or the one of modeling_nanocram.py
    config = model.config
    if is_bert(config):
        settings = bert_config(config)
        weights = to_hf(model.state_dict(), config.n_layer)
    else:
        # for the person who fine-tunes it, with the dropout that BERT has
        settings = own_config(replace(config, dropout=0.1), "NanocramForMaskedLM")
        weights = encoder_weights(model)
        write_modeling_file(folder)
    write_weights(folder, settings, weights, tokenizer)
    write_tokenizer(folder, tokenizer, config)
    return settings["architectures"][0]


def write_classifier(folder, saved):
    """Write a saved classifier into the folder. Return the class that loads it."""
    # BERTs of Hugging Face were fine-tuned on `[CLS] A [SEP]`, which their tokenizers write
    config = Config(**saved["config"])
    tokenizer = Tokenizer.from_str(saved["tokenizer"])
    if not saved["pair"] and saved["init"] in ("run", "scratch"):
        join_single_texts_as_in_fine_tuning(tokenizer)

    # the encoder and the head
    model = BERT(config)
    encoder = {}
    head = {}
    for name, tensor in rename_old_parameters(saved["model"]).items():
        if name.startswith("bert."):
            encoder[name.removeprefix("bert.")] = tensor
        else:
            head[name] = tensor
    model.load_state_dict(encoder)
    weights = encoder_weights(model) | head

    # a regression has one output, without a name
    kind = "NanocramForSequenceClassification"
    labels = saved["labels"] or ["score"]
    settings = own_config(config, kind) | {
        "pooling": saved["pooling"],
        "pooler_width": len(head["pooler.bias"]),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    write_modeling_file(folder)
    write_weights(folder, settings, weights, tokenizer)
    write_tokenizer(folder, tokenizer, config)
    return kind


def encoder_weights(model):
    """Return the state dict of a BERT for modeling_nanocram.py, with its tables of positions."""
    tensors = model.state_dict() | dict(model.named_buffers())
    return {f"bert.{name}": tensor for name, tensor in tensors.items()}


def join_single_texts_as_in_fine_tuning(tokenizer):
    """Make the tokenizer write one text as `<cls> A <sep> <sep>`, as finetune_glue.py does."""
    cls = special_token(tokenizer, "cls")
    sep = special_token(tokenizer, "sep")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep} {sep}:1",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


def write_modeling_file(folder):
    """Write model.py and tools/modeling_nanocram.py as one file that needs no other."""
    # the classes import from transformers, and all else is in model.py
    added = (ROOT / "tools" / "modeling_nanocram.py").read_text()
    header, classes = added.split("# exported from here on")
    imports = [line for line in header.splitlines() if line.startswith("from transformers")]
    last_import = "import torch.nn.functional as F\n"
    text = (ROOT / "model.py").read_text()
    text = text.replace(last_import, last_import + "\n".join(imports) + "\n", 1)
    (folder / "modeling_nanocram.py").write_text(text + classes)


def write_weights(folder, settings, weights, tokenizer):
    """Write config.json and model.safetensors."""
    from safetensors.torch import save_file

    pad_id = tokenizer.token_to_id(special_token(tokenizer, "pad"))
    settings = settings | {"dtype": "float32", "pad_token_id": pad_id}
    # safetensors refuses tensors whose rows are not next to each other
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")


def write_tokenizer(folder, tokenizer, config):
    """Write tokenizer.json and tokenizer_config.json."""
    # a model without segments takes no token_type_ids
    inputs = ["input_ids", "attention_mask"]
    if config.token_types:
        inputs.insert(1, "token_type_ids")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_len,
        "model_input_names": inputs,
    }
    for name in ("pad", "unk", "cls", "sep", "mask"):
        settings[f"{name}_token"] = special_token(tokenizer, name)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))


def write_readme(folder, run, task, init):
    """Write the model card, README.md, with the run's own numbers."""
    # what it is
    kind = f"A classifier for {task}" if task else "A masked language model"
    starts = {"run": "pretrained from scratch", "scratch": "without pretraining,"}
    start = starts.get(init, f"started from {init},")
    lines = [
        "---",
        "library_name: transformers",
        "---",
        f"# {run.name}",
        "",
        f"{kind}, {start} with nanoCram.",
        "If there is a modeling_nanocram.py, load model and tokenizer with "
        "`trust_remote_code=True`.",
        "",
    ]

    # its last evaluation
    log = run / "log.jsonl"
    evaluations = []
    if log.exists():
        evaluations = [entry for entry in read_log(log) if "val_loss" in entry]
    for entry in evaluations[-1:]:
        right = f"{entry['val_accuracy']:.1%} of the masked tokens right"
        steps = f"{entry['step']:,} steps and {entry['tokens'] / 1e6:,.0f} M tokens"
        lines.append(
            f"Validation loss {entry['val_loss']:.3f} nats ({right}) after "
            f"{entry['hours']:.2f} hours, {steps}."
        )

    # the scores with the rules, or the rules alone; the settings
    if (run / "glue.md").exists():
        card = (run / "glue.md").read_text()
        lines += ["", card.replace("# Scorecard", "## Scorecard")]
    elif (run / "rules.json").exists():
        lines += ["", *rules_lines(verdicts({}, read_record(run)))]
    if (run / "config.json").exists():
        config = (run / "config.json").read_text().strip()
        lines += ["", "## Configuration", "", "```json", config, "```"]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------------------


def export(run, to, task=None):
    """Write the folder `to`, of a run or of its classifier for a task. Raise Fault if it cannot be.

    The folder appears only when it is complete.
    """
    try:
        from safetensors import SafetensorError
    except ImportError as e:
        raise Fault("this needs `pip install safetensors`") from e
    # look at everything before anything is written
    run = Path(run)
    to = Path(to).expanduser()
    if to.exists() and any(to.iterdir()):
        raise Fault(f"{to} exists and is not empty; choose another folder")
    if task:
        saved = load_classifier(run, task)
    else:
        model, tokenizer = open_run(run)

    # write next to it, then rename
    aside = to.with_name(to.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        if task:
            kind = write_classifier(aside, saved)
            write_readme(aside, run, task, saved["init"])
        else:
            kind = write_masked_lm(aside, model, tokenizer)
            write_readme(aside, run, None, "run")
        if to.exists():
            to.rmdir()
        aside.rename(to)
    except SafetensorError as e:
        raise Fault(f"{to} could not be written: {one_line(e)}") from e
    except OSError as e:  # that of a full disk names no file
        raise Fault(f"{e.strerror or e}: {e.filename or to}") from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{to} is ready: {kind}")


def load_classifier(run, task):
    """Return what finetune_glue.py saved of a task, with glue_save=True."""
    path = run / "classifiers" / f"{task}.pt"
    if not path.exists():
        others = sorted(run.glob(f"*/classifiers/{task}.pt"))
        folders = ", ".join(f"{other.parts[-3]}/" for other in others)
        hint = "finetune_glue.py with --glue_save=True writes it"
        if folders:
            hint = f"there is one in {folders} of {run}"
        raise Fault(f"{path} does not exist; {hint}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        Config(**saved["config"])
        Tokenizer.from_str(saved["tokenizer"])
    except Exception as e:  # tokenizers raises nothing more special
        raise Fault(f"{path} cannot be read: {one_line(e)}") from e
    return saved


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_hf",
        description="Write a folder that transformers loads.",
    )
    parser.add_argument("run", help="folder of a finished run, such as out/demo")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="what to write")
    parser.add_argument("--task", help="the classifier of this task, which glue_save=True has kept")
    args = parser.parse_args(argv)
    export(args.run, args.to, args.task)


if __name__ == "__main__":
    run_script(main)
