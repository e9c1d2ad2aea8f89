"""Write a folder that `transformers` loads, from a run or from one of its classifiers.

python -m tools.export_hf out/x --to=FOLDER                 the masked language model of a run
python -m tools.export_hf out/x --to=FOLDER --task=mrpc     a classifier that glue_save has kept

A model with the architecture of BERT becomes a BertForMaskedLM, and one of config/modern.py a
ModernBertForMaskedLM. Any other one brings its own modelling file, for which `transformers` asks
trust_remote_code=True.
"""

import argparse
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, processors

from model import BERT, Config, rename_old_parameters
from nanocram.faults import Fault, one_line, read_json, run_script
from nanocram.glue import NINE
from nanocram.huggingface import MODERN_CONFIG, modern_settings, to_export, to_hf, to_modern
from nanocram.rules import read_record, verdicts
from nanocram.runs import open_run, read_log
from nanocram.scorecard import card_text, read_card
from nanocram.tokenizer import special_ids, special_token
from tools.fill_mask import corpus_of, mark_as_in_pretraining

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
MODERN_SIZES = f"{SIZES} bias decoder_bias tie_weights".replace("token_types ", "")
AUTO_MAP = {
    "AutoConfig": "modeling_nanocram.NanocramConfig",
    "AutoModel": "modeling_nanocram.NanocramModel",
    "AutoModelForMaskedLM": "modeling_nanocram.NanocramForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_nanocram.NanocramForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_nanocram.NanocramForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_nanocram.NanocramForQuestionAnswering",
}
# the hub's names of our metrics
METRIC_NAMES = {
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}

# --------------------------------------------------------------------------------------------------
# config.json


def has_architecture(config, reference, free):
    """Return whether two Configs agree in all fields but those named in `free`."""
    for name, value in vars(reference).items():
        if name not in free.split() and getattr(config, name) != value:
            return False
    return True


def is_bert(config):
    """Return whether BertForMaskedLM has this architecture."""
    return has_architecture(config, BERT_CONFIG, SIZES) and config.token_types > 0


def bert_settings(config):
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


def own_settings(config, kind):
    """Return the settings of a class in modeling_nanocram.py for a Config."""
    fields = vars(replace(config, dropout=0.1))
    return {"model_type": "nanocram", "architectures": [kind], "auto_map": AUTO_MAP, **fields}


# --------------------------------------------------------------------------------------------------
# The model


@dataclass
class Export:
    """What a folder is made of."""

    settings: dict  # config.json
    weights: dict  # model.safetensors
    tokenizer: Tokenizer
    max_len: int  # tokens of the longest text that the model was trained on
    inputs: list  # what the tokenizer gives the model

    @property
    def kind(self):
        """The name of the class that loads it."""
        return self.settings["architectures"][0]

    @property
    def is_own(self):
        """Whether that class is in modeling_nanocram.py."""
        return self.kind.startswith("Nanocram")


def masked_lm(run):
    """Return the Export of a run. All of them have the dropout of BERT, for who fine-tunes them."""
    model, tokenizer = open_run(run)
    config = model.config
    state = model.state_dict()
    # a class of transformers, or the one of modeling_nanocram.py
    if is_bert(config):
        settings = bert_settings(config)
        weights = to_hf(state, config.n_layer)
    elif has_architecture(config, MODERN_CONFIG, MODERN_SIZES):
        names = ("embedding", "attention", "mlp", "classifier")
        # without <cls> a head for whole texts sees the mean
        settings = modern_settings(config) | {"classifier_pooling": "mean"}
        settings |= {f"{name}_dropout": 0.1 for name in names}
        weights = to_modern(state)
    else:
        settings = own_settings(config, "NanocramForMaskedLM") | {"pooling": "mean"}
        weights = to_export(state)

    # texts as in pretraining
    meta = corpus_of(run)
    max_len = config.max_len
    if meta is None:
        where = "the corpus of this run is not in data/"
        print(f"warning: {where}, so model_max_length is max_len = {max_len}, not its rows'")
    else:
        max_len = meta["seq_len"]
    mark_as_in_pretraining(tokenizer, meta)
    return Export(settings, weights, tokenizer, max_len, inputs_of(config))


def saved_classifier(saved):
    """Return the Export of a saved classifier."""
    # BERTs of Hugging Face were fine-tuned on `[CLS] A [SEP]`, which their tokenizers write
    config = Config(**saved["config"])
    tokenizer = Tokenizer.from_str(saved["tokenizer"])
    if saved["init"] in ("run", "scratch"):
        mark_as_in_fine_tuning(tokenizer)

    # the encoder without its head for masked tokens, and the head that was fine-tuned
    model = BERT(config)
    encoder = {}
    head = {}
    for name, tensor in rename_old_parameters(saved["model"]).items():
        if name.startswith("bert."):
            encoder[name.removeprefix("bert.")] = tensor
        else:
            head[f"classifier.{name}"] = tensor
    model.load_state_dict(encoder)
    weights = to_export(encoder)
    weights = {name: tensor for name, tensor in weights.items() if name.startswith("model.")}

    # a regression has one output, without a name
    labels = saved["labels"] or ["score"]
    problem = "single_label_classification" if saved["labels"] else "regression"
    settings = own_settings(config, "NanocramForSequenceClassification") | {
        "pooling": saved["pooling"],
        "pooler_width": len(head["classifier.pooler.bias"]),
        "problem_type": problem,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    max_len = saved.get("max_len", config.max_len)
    return Export(settings, weights | head, tokenizer, max_len, inputs_of(config))


def mark_as_in_fine_tuning(tokenizer):
    """Make the tokenizer write one text as `<cls> A <sep> <sep>`, as finetune_glue.py does."""
    cls = special_token(tokenizer, "cls")
    sep = special_token(tokenizer, "sep")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep} {sep}:1",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


def inputs_of(config):
    """Return what the tokenizer gives the model: token_type_ids only if it has segments."""
    if config.token_types:
        return ["input_ids", "token_type_ids", "attention_mask"]
    return ["input_ids", "attention_mask"]


# --------------------------------------------------------------------------------------------------
# The files of the folder


def write_model(folder, made):
    """Write config.json, model.safetensors, and the modelling file if one is needed."""
    from safetensors.torch import save_file

    # the ids of the special tokens, which have other defaults in transformers
    ids = special_ids(made.tokenizer)
    settings = made.settings | {"dtype": "float32", "pad_token_id": ids["pad"]}
    settings |= {"cls_token_id": ids["cls"], "bos_token_id": ids["cls"]}
    settings |= {"sep_token_id": ids["sep"], "eos_token_id": ids["sep"]}
    config = folder / "config.json"
    config.write_text(json.dumps(settings, indent=1) + "\n")
    if made.is_own:
        write_modeling_file(folder)

    # safetensors refuses tensors whose rows are not next to each other, and makes a private file
    weights = {name: tensor.contiguous() for name, tensor in made.weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shutil.copymode(config, folder / "model.safetensors")


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


def write_tokenizer(folder, made):
    """Write tokenizer.json and tokenizer_config.json."""
    # of transformers' own, and then the tokenizer itself
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": made.max_len,
        "model_input_names": made.inputs,
    }
    for name in ("pad", "unk", "cls", "sep", "mask"):
        settings[f"{name}_token"] = special_token(made.tokenizer, name)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (folder / "tokenizer.json").write_text(made.tokenizer.to_str(pretty=True))


# --------------------------------------------------------------------------------------------------
# The model card


@dataclass
class About:
    """What the card says about a model, besides what its run has measured."""

    run: Path
    task: str | None  # of a classifier
    init: str  # what a classifier started from
    name: str  # of the folder
    license: str
    language: str

    @property
    def origin(self):
        """What the weights came from, without a local path."""
        starts = {"run": "pretrained from scratch", "scratch": "without pretraining"}
        return starts.get(self.init, f"started from {Path(self.init).name}")


def write_model_card(folder, made, about):
    """Write README.md: the hub's metadata, a program to try, and the run's own numbers."""
    card = read_card(about.run)
    scores = card["rows"].get(about.init, {})
    if about.task:
        scores = {task: entry for task, entry in scores.items() if task.startswith(about.task)}

    # YAML in which each value is JSON
    lines = ["---"]
    for key, value in metadata(about, scores).items():
        if value:
            lines.append(f"{key}: {json.dumps(value)}")
    kind = f"A classifier for {about.task}" if about.task else "A masked language model"
    lines += ["---", f"# {about.name}", "", f"{kind}, {about.origin}, made with nanoCram.", ""]

    # how to use it, and what was measured
    lines += ["```python", *program(made, about), "```", ""]
    lines.append(
        f"Trained on texts of up to {made.max_len} tokens, special ones included. "
        "The tokenizer cuts longer ones with `truncation=True`."
    )
    lines += measured(about)
    if scores:
        rows = {about.init: scores}
        text = card_text(card | {"rows": rows}).replace("# Scorecard", "## Scores")
        lines += ["", text.partition("Rules of cramming:")[0].strip()]
    lines += made_by(about)
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def metadata(about, scores):
    """Return what the hub shows and searches. scores: {task: entry of glue.json}."""
    # what it was trained on
    datasets = hub_sources(corpus_of(about.run))
    if about.task in NINE:
        datasets.append("nyu-mll/glue")
    # a classifier's own score, or the median over all seeds of what was fine-tuned from the model
    results = []
    for task, entry in scores.items():
        metric = METRIC_NAMES.get(entry["metric"], entry["metric"])
        value = entry["scores"][0] if about.task else entry["median"]
        dataset = {"type": task, "name": task, "split": "validation"}
        if task in NINE:
            dataset |= {"type": "nyu-mll/glue", "name": f"GLUE {task}", "config": task}
        results.append(
            {
                "task": {"type": "text-classification"},
                "dataset": dataset,
                "metrics": [{"type": metric, "value": round(value, 2)}],
            }
        )
    return {
        "license": about.license,
        "language": about.language,
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if about.task else "fill-mask",
        "tags": ["nanocram", "bert", "cramming"],
        "datasets": datasets,
        "model-index": [{"name": about.name, "results": results}] if results else [],
    }


def hub_sources(meta):
    """Return the data sets of the hub among the sources of a corpus. meta: meta.json, or None."""
    found = []
    sources = meta["settings"]["sources"] if meta else []
    for source in sources:
        path = source["path"] if isinstance(source, dict) and "path" in source else ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists():
            found.append(path)
    return found


def program(made, about):
    """Return the lines of a program that uses the folder."""
    trust = ", trust_remote_code=True" if made.is_own else ""
    task = "text-classification" if about.task else "fill-mask"
    text = f'"the capital of france is {special_token(made.tokenizer, "mask")}."'
    if about.task:
        text = '{"text": "a first text", "text_pair": "and a second one, if the task has two"}'
    return [
        "from transformers import pipeline",
        "",
        f'answer = pipeline("{task}", model="{about.name}"{trust})',
        f"print(answer({text}))",
    ]


def measured(about):
    """Return the lines on the last evaluation of the run, and on the rules of cramming."""
    # the last evaluation
    lines = []
    log = about.run / "log.jsonl"
    evaluations = []
    if log.exists():
        evaluations = [entry for entry in read_log(log) if "val_loss" in entry]
    for entry in evaluations[-1:]:
        right = f"{entry['val_accuracy']:.1%} of the masked tokens right"
        steps = f"{entry['step']:,} steps and {entry['tokens'] / 1e6:,.0f} M tokens"
        hours = f"{entry['hours']:.2f} hours"
        loss = f"Validation loss {entry['val_loss']:.3f} nats ({right})"
        lines += ["", f"{loss} after {hours}, {steps}."]

    # the verdicts alone: what the run did may name a local path
    if (about.run / "rules.json").exists():
        found = verdicts({}, read_record(about.run))
        words = "; ".join(f"{rule}: {entry['verdict']}" for rule, entry in found.items())
        lines += ["", f"Rules of cramming: {words}."]
    return lines


def made_by(about):
    """Return the lines on the code and the settings, without what names a local path."""
    # the code
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True)
    commit = done.stdout.strip() or "unknown"
    task = f" --task={about.task}" if about.task else ""
    command = f"python -m tools.export_hf out/{about.run.name} --to={about.name}{task}"
    lines = ["", f"Written by nanoCram, commit {commit}: `{command}`."]
    # the settings
    if (about.run / "config.json").exists():
        config = read_json(about.run / "config.json")
        kept = {key: value for key, value in config.items() if "/" not in str(value)}
        text = json.dumps(kept, indent=1)
        lines += ["", "## Settings of pretraining", "", "```json", text, "```"]
    return lines


# --------------------------------------------------------------------------------------------------


def export(run, to, task=None, license="mit", language="en"):
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
    init = "run"
    if task:
        saved = load_classifier(run, task)
        init = saved["init"]
        made = saved_classifier(saved)
    else:
        made = masked_lm(run)
    about = About(run, task, init, to.name, license, language)

    # write next to it, then rename
    aside = to.with_name(to.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write_model(aside, made)
        write_tokenizer(aside, made)
        write_model_card(aside, made, about)
        if to.exists():
            to.rmdir()
        aside.rename(to)
    except SafetensorError as e:
        raise Fault(f"{to} could not be written: {one_line(e)}") from e
    except OSError as e:  # that of a full disk names no file
        raise Fault(f"{e.strerror or e}: {e.filename or to}") from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{to} is ready: {made.kind}")


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
    parser.add_argument("--license", default="mit", help="of the weights, for the model card")
    parser.add_argument("--language", default="en", help="of the texts, for the model card")
    args = parser.parse_args(argv)
    export(args.run, args.to, args.task, args.license, args.language)


if __name__ == "__main__":
    run_script(main)
