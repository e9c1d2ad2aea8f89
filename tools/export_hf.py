"""To and from Hugging Face: a folder that `transformers` loads, and a BERT of theirs in our names.

python export_hf.py out/x --to=FOLDER                 the masked language model of a run
python export_hf.py out/x --to=FOLDER --task=mrpc     a classifier that finetune_glue.py --glue_save=True has kept

A model with the architecture of BERT becomes a BertForMaskedLM, any other one brings its own modelling file, for which
`transformers` asks trust_remote_code=True. finetune_glue.py scores a BERT of theirs: --glue_init=google-bert/bert-base-uncased
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, processors

from configurator import one_line
from model import BERT, Config
from rows import special_token

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


def stop(message):
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")  # other scripts load models, too


def load_run(run):
    """(Config, weights, tokenizer) of a finished run. SystemExit, one line, where there is none or it is damaged."""
    if not (run / "model.pt").exists():
        stop(f"{run / 'model.pt'} does not exist; run train.py first, or name the folder of a finished run")
    try:
        saved = torch.load(run / "model.pt", map_location="cpu", weights_only=True)  # can run no code
        config, weights = Config(**saved["config"]), saved["model"]
        if config.token_types:  # pretraining has seen one segment: the others begin as it
            weights["type_embedding.weight"][1:] = weights["type_embedding.weight"][0]
        return config, weights, Tokenizer.from_file(str(run / "tokenizer.json"))
    except Exception as e:
        stop(f"model.pt or tokenizer.json in {run} cannot be read (damaged, of another version?): {one_line(e)}")


def load_bert(source):
    """(Config, weights, tokenizer, pooler or None) of a folder, or of a hub id, that holds a Hugging Face BERT.

    pooler: {weight, bias} of BERT's own pooling layer. Reads config.json, tokenizer.json or vocab.txt, model.safetensors or
    pytorch_model.bin (weights only: the file can run no code). SystemExit, one line, for anything else.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            files = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
            files += ["model.safetensors", "pytorch_model.bin"]
            folder = Path(snapshot_download(source, allow_patterns=files))
        except Exception as e:
            stop(f"{source!r} is no folder, and the hub gives {one_line(e)}")
    try:
        c = json.loads((folder / "config.json").read_text())
        kinds = c["model_type"], c.get("hidden_act", "gelu"), c.get("position_embedding_type", "absolute")
        if kinds != ("bert", "gelu", "absolute"):
            stop(f"{folder} is a {', '.join(kinds)}; only a bert, gelu, absolute can be loaded")
        state = load_weights(folder)
        weights, tokenizer = from_hf(state, c["num_hidden_layers"]), load_tokenizer(folder)
    except Exception as e:  # safetensors and tokenizers raise nothing more special
        stop(f"{folder} is no complete BERT: {one_line(e)}")
    config = Config(
        vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"], n_embd=c["hidden_size"],
        n_inner=c["intermediate_size"], max_len=c["max_position_embeddings"], norm_eps=c.get("layer_norm_eps", 1e-12),
        norm_place="post", bias=True, glu=False, position="learned", final_norm=False, token_types=c["type_vocab_size"],
        head_transform="decoder_bias" in weights, decoder_bias="decoder_bias" in weights,
    )  # fmt: skip
    pooler = {k: v.float() for k in ("weight", "bias") for n, v in state.items() if n.endswith(f"pooler.dense.{k}")}
    return config, weights, tokenizer, pooler or None


def load_weights(folder):
    if (folder / "model.safetensors").exists():
        try:
            from safetensors.torch import load_file
        except ImportError:
            stop(f"{folder / 'model.safetensors'} needs `pip install safetensors`")
        return load_file(folder / "model.safetensors")
    return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)


def load_tokenizer(folder):
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    if not (folder / "vocab.txt").exists():
        stop(f"{folder} has neither tokenizer.json nor vocab.txt")
    from tokenizers.implementations import BertWordPieceTokenizer

    settings = folder / "tokenizer_config.json"
    lowercase = json.loads(settings.read_text()).get("do_lower_case", True) if settings.exists() else True
    return Tokenizer.from_str(BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lowercase).to_str())


# ---------------------------------------------------------------------------------------------------------------------
# From ours to theirs


def is_bert(config):
    """Whether BertForMaskedLM is this architecture."""
    wanted = Config(norm_place="post", bias=True, glu=False, position="learned", final_norm=False, head_transform=True,
                    decoder_bias=True)  # fmt: skip
    sizes = "vocab_size n_layer n_head n_embd n_inner max_len norm_eps rotary_base token_types dropout".split()
    same = {k: v for k, v in vars(wanted).items() if k not in sizes}
    return same.items() <= vars(config).items() and config.token_types > 0


def bert_config(config):
    return {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head, "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner, "max_position_embeddings": config.max_len, "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.token_types, "hidden_act": "gelu", "pad_token_id": 0,
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    }  # fmt: skip


def own_config(config, kind, **more):
    names = {"AutoConfig": "NanocramConfig", "AutoModel": "NanocramModel", "AutoModelForMaskedLM": "NanocramForMaskedLM",
             "AutoModelForSequenceClassification": "NanocramForSequenceClassification"}  # fmt: skip
    auto_map = {auto: f"modeling_nanocram.{name}" for auto, name in names.items()}
    return {"model_type": "nanocram", "architectures": [kind], "auto_map": auto_map, "architecture": vars(config), **more}


def modelling_file():
    """One self-contained file: model.py, then what hf_model.py adds."""
    here = Path(__file__).resolve().parent
    imports, added = (here / "hf_model.py").read_text().split("# exported from here on")
    imports = "\n".join(line for line in imports.splitlines() if line.startswith("from transformers"))
    text = (here / "model.py").read_text()
    return text.replace("import torch.nn.functional as F\n", f"import torch.nn.functional as F\n{imports}\n", 1) + added


def model_card(run, what):
    """README.md of the folder, with the run's own numbers."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] if (run / "log.jsonl").exists() else []
    final = [e for e in log if "val_loss" in e][-1:]
    lines = [
        "---",
        "library_name: transformers",
        "---",
        f"# {run.name}",
        "",
        what,
        "Where there is a modeling_nanocram.py, load model and tokenizer with `trust_remote_code=True`.",
        "",
    ]
    for e in final:
        lines.append(
            f"Validation loss {e['val_loss']:.3f} nats ({e['val_accuracy']:.1%} of the masked tokens right) after "
            f"{e['hours']:.2f} hours, {e['step']:,} steps and {e['tokens'] / 1e6:,.0f} M tokens."
        )
    if (run / "rules.json").exists():
        rules = json.loads((run / "rules.json").read_text())
        lines += ["", "Rules of cramming:", ""] + [
            f"* {k}: {'yes' if v['ok'] else 'NO'} ({v['did']})" for k, v in rules.items()
        ]
    if (run / "glue.md").exists():
        lines += ["", (run / "glue.md").read_text().replace("# Scorecard", "## Scorecard")]
    if (run / "config.json").exists():
        lines += ["", "## Configuration", "", "```json", (run / "config.json").read_text().strip(), "```"]
    return "\n".join(lines) + "\n"


def export(run, to, task=None):
    """Writes the folder `to`. SystemExit, one line, on mistakes."""
    try:
        from safetensors import SafetensorError
    except ImportError:
        sys.exit("export_hf.py: needs `pip install safetensors`")
    run, to = Path(run), Path(to).expanduser()
    if to.exists() and any(to.iterdir()):
        sys.exit(f"export_hf.py: {to} exists and is not empty; choose another folder")
    if task:
        source = run / "classifiers" / f"{task}.pt"
        if not source.exists():
            elsewhere = ", ".join(f"{found.parts[-3]}/" for found in sorted(run.glob(f"*/classifiers/{task}.pt")))
            hint = f"there is one in {elsewhere} of {run}" if elsewhere else "finetune_glue.py with --glue_save=True writes it"
            sys.exit(f"export_hf.py: {source} does not exist; {hint}")
        try:
            saved = torch.load(source, map_location="cpu", weights_only=True)
            config, weights, tokenizer = Config(**saved["config"]), saved["model"], Tokenizer.from_str(saved["tokenizer"])
        except Exception as e:
            sys.exit(f"export_hf.py: {source} cannot be read: {one_line(e)}")
    else:
        saved, (config, weights, tokenizer) = None, load_run(run)
    aside = to.with_name(to.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        kind = write_folder(aside, run, task, config, weights, tokenizer, saved)
        if to.exists():
            to.rmdir()
        aside.rename(to)
    except SafetensorError as e:
        sys.exit(f"export_hf.py: {to} could not be written: {one_line(e)}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{to} is ready: {kind}")


def write_folder(folder, run, task, config, weights, tokenizer, saved):
    """Fills the folder with a run's model, or with what finetune_glue.py saved of a task. Returns the model's class."""
    from safetensors.torch import save_file

    special = {}
    for name in ("pad", "unk", "cls", "sep", "mask"):
        special[f"{name}_token"] = special_token(tokenizer, name)
    if is_bert(config) and not task:
        hf, weights = bert_config(config), to_hf(weights, config.n_layer)
    else:
        bert = BERT(config)  # for the tables of positions
        bert.load_state_dict({k.removeprefix("bert."): v for k, v in weights.items() if not task or k.startswith("bert.")})
        heads = {k: v for k, v in weights.items() if k.startswith(("pooler.", "head."))} if task else {}
        tables = {f"bert.{k}": v for k, v in bert.named_buffers()}
        weights = {f"bert.{k}": v for k, v in bert.state_dict().items()} | tables | heads
        more = {}
        if task:
            more = {"pooling": saved["pooling"], "pooler_width": len(heads["pooler.bias"])}
            more |= {"id2label": dict(enumerate(saved["labels"] or ["score"]))}
            more |= {"label2id": {label: i for i, label in more["id2label"].items()}}
            if not saved["pair"] and saved["init"] in ("run", "scratch"):  # as finetune_glue.py joins a single text
                cls, sep = (special[f"{name}_token"] for name in ("cls", "sep"))
                pairs = [(token, tokenizer.token_to_id(token)) for token in (cls, sep)]
                single, pair = f"{cls} $A {sep} {sep}:1", f"{cls} $A {sep} $B:1 {sep}:1"
                tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=pairs)
        kind = "NanocramForSequenceClassification" if task else "NanocramForMaskedLM"
        hf = own_config(config if task else replace(config, dropout=0.1), kind, **more)  # for who fine-tunes it, as BERT's
        (folder / "modeling_nanocram.py").write_text(modelling_file())
    hf |= {"dtype": "float32", "pad_token_id": tokenizer.token_to_id(special["pad_token"])}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf, indent=1) + "\n")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_len, **special}
    names = ["input_ids", *["token_type_ids"] * (config.token_types > 0), "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_input_names": names}, indent=1) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    init = saved.get("init", "run") if task else "run"
    start = {"run": "pretrained from scratch", "scratch": "without pretraining,"}.get(init, f"started from {init},")
    card = model_card(run, f"{f'A classifier for {task}' if task else 'A masked language model'}, {start} with nanoCram.")
    (folder / "README.md").write_text(card)
    return hf["architectures"][0]


if __name__ == "__main__":
    runs = [a for a in sys.argv[1:] if not a.startswith("--")]
    options = dict(a[2:].partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
    if len(runs) != 1 or not options.get("to") or options.keys() - {"to", "task"}:
        sys.exit(__doc__.strip())
    try:
        export(runs[0], options["to"], options.get("task"))
    except OSError as e:
        sys.exit(f"export_hf.py: {e.strerror or e}: {e.filename or options['to']}")
