"""What transformers loads from an exported folder."""

import copy
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, sentences
from safetensors.torch import load_file
from test_finetune_glue import SMALL, glue  # noqa: F401
from tokenizers import Tokenizer

from finetune_glue import collate
from model import BERT, Classifier, Config
from nanocram.huggingface import to_export
from nanocram.rules import NO_MODEL, SCRATCH
from nanocram.tokenizer import train_tokenizer
from tools import modeling_nanocram as own
from tools.export_hf import export
from tools.fill_mask import fill_mask, mark_as_in_pretraining

SWITCHES = {
    "position": "rotary",
    "qk_norm": True,
    "neighbour_keys": True,
    "value_residual": True,
    "embedding_skip": True,
    "norm": "rmsnorm",
    "activation": "relu2",
    "bias": True,
    "head_transform": True,
    "decoder_bias": True,
    "tie_weights": False,
}
BERT_BASE = {
    "norm_place": "post",
    "bias": True,
    "glu": False,
    "position": "learned",
    "final_norm": False,
    "head_transform": True,
    "decoder_bias": True,
    "token_types": 2,
}
MODERN = {"position": "rotary", "first_norm": False, "head_transform": True}
# the changes of the architecture, and the class that loads it
ARCHITECTURES = {
    "crammed": ({}, "NanocramForMaskedLM"),
    "nanocram": (SWITCHES, "NanocramForMaskedLM"),
    "bert": (BERT_BASE, "BertForMaskedLM"),
    "modern": (MODERN, "ModernBertForMaskedLM"),
}
TEXT = "balo <mask> fan gon."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(lambda: sentences(200), "wordpiece", 90, True, True, True)


def random_bert(**changes):
    """A small model, no parameter of which is 0 or 1."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_inner": 64}
    model = BERT(Config(**sizes, max_len=64, **changes)).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return model


def write_run(folder, model, tokenizer, insert_cls=False):
    """Write what train.py leaves of a run, and the description of its corpus."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    torch.save({"config": vars(model.config), "model": model.state_dict()}, folder / "model.pt")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"dataset": "tiny", "train_sha256": "abc", "out_dir": str(folder.resolve())}
    (folder / "config.json").write_text(json.dumps(config))
    sources = ["/home/me/texts", {"path": "wikimedia/wikipedia", "name": "20231101.en"}]
    settings = {"insert_cls": insert_cls, "sources": sources}
    Path("data/tiny").mkdir(parents=True, exist_ok=True)
    meta = {"seq_len": 32, "sha256": {"train": "abc"}, "settings": settings}
    Path("data/tiny/meta.json").write_text(json.dumps(meta))


@pytest.fixture
def folder(tokenizer, tmp_path, monkeypatch):
    """folder("nanocram") is the exported folder of a model of that name in ARCHITECTURES."""
    monkeypatch.chdir(tmp_path)

    def make(name):
        write_run(f"out/{name}", random_bert(**ARCHITECTURES[name][0]), tokenizer)
        export(f"out/{name}", name)
        return name

    return make


def in_new_process(check, *args):
    """Run a program in another folder, without the repository and without a network."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(Path("hf").resolve()), "HF_HUB_OFFLINE": "1"}
    Path("away").mkdir()
    words = [sys.executable, "-c", check, *args]
    done = subprocess.run(words, cwd="away", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


CHECK = """
import sys, torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, pipeline
for name in ("crammed", "nanocram", "bert", "modern"):
    expected = torch.load(f"../{name}.pt", weights_only=True)
    folder = f"../{name}"
    trust = {"trust_remote_code": name in ("crammed", "nanocram")}
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True, **trust)
    assert type(model).__name__ == expected["kind"]
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    batch = tokenizer(expected["texts"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == expected["ids"].tolist(), batch["input_ids"]
    assert tokenizer.model_max_length == 32 and len(tokenizer("a " * 99, truncation=True)[0]) == 32
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.allclose(logits[real], expected["logits"][real], atol=1e-5)
    answers = pipeline("fill-mask", model=model, tokenizer=tokenizer)(expected["texts"][0])
    for answer, (token, probability) in zip(answers, expected["answers"], strict=True):
        assert answer["token_str"] == token and abs(answer["score"] - probability) < 1e-6
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, **trust)
    assert half(**batch).last_hidden_state.dtype == torch.bfloat16
    kind = AutoModelForSequenceClassification
    assert kind.from_pretrained(folder, num_labels=3, **trust)(**batch).logits.shape == (3, 3)
assert not [name for name in sys.modules if name in ("model", "train", "tools", "nanocram")]
"""


def test_transformers_gives_our_logits_and_answers(folder, tokenizer):
    """In a new process, from which BertForMaskedLM and ModernBertForMaskedLM run no code of ours.

    Texts end with <sep> as in pretraining, and an empty one is no empty sequence.
    """
    texts = [TEXT, "fan", ""]
    ours = Tokenizer.from_str(tokenizer.to_str())
    rows = [[*ours.encode(text, add_special_tokens=False).ids, 3] for text in texts]
    ids, mask, types = collate(rows, [0, 1, 2], {"pad": 0, "sep": 3}, "cpu", 64)
    mark_as_in_pretraining(ours, None)
    for name, (changes, kind) in ARCHITECTURES.items():
        folder(name)
        assert os.path.exists(f"{name}/modeling_nanocram.py") == kind.startswith("Nanocram")
        model = random_bert(**changes)
        with torch.no_grad():
            logits = model.logits(model.encode(ids, mask, types))
        (answers,) = fill_mask(model, ours, TEXT)
        expected = {"kind": kind, "texts": texts, "ids": ids, "logits": logits, "answers": answers}
        torch.save(expected, f"{name}.pt")
        mode = Path(name, "model.safetensors").stat().st_mode
        assert mode == Path(name, "config.json").stat().st_mode and mode & stat.S_IRGRP
    # training has seen segment 0 alone: the exported segment 1 must not be its random start
    rows = load_file("bert/model.safetensors")["bert.embeddings.token_type_embeddings.weight"]
    assert torch.equal(rows[0], rows[1])
    in_new_process(CHECK)


VARIANTS = [
    {},
    SWITCHES,
    {"position": "learned", "token_types": 2},
    {"position": "sinusoidal", "glu": False, "norm_place": "post"},
    {"position": "none", "embedding_norm": False, "final_norm": False},
    {"position": "rotary", "attention": "flash"},
    {"attention": "fourier"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(map(str, c.values())))
def test_our_class_computes_what_the_model_does(changes):
    """From ids or embeddings, with positions given or not; and the hidden states of each block."""
    model = random_bert(**changes)
    config = own.NanocramConfig(**vars(model.config))
    theirs = own.NanocramForMaskedLM(config).eval()
    theirs.load_state_dict(to_export(model.state_dict()), strict=not model.config.tie_weights)
    theirs.tie_weights()
    ids = torch.randint(5, 90, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    types = torch.arange(9).repeat(2, 1) // 5
    with torch.no_grad():
        hidden = model.encode(ids, mask.bool(), types)
        expected = model.logits(hidden)
    inputs = {"attention_mask": mask, "token_type_ids": types, "output_hidden_states": True}
    found = theirs(ids, **inputs)
    embeddings = theirs.get_input_embeddings()(ids)
    positions = torch.arange(9).repeat(2, 1)
    again = theirs(inputs_embeds=embeddings, position_ids=positions, **inputs)
    for out in (found, again):
        assert torch.allclose(out.logits, expected, atol=1e-5)
        assert len(out.hidden_states) == 3
        assert torch.allclose(out.hidden_states[-1], hidden, atol=1e-5)
    if model.config.position not in ("none",) and model.config.attention == "softmax":
        other = theirs(ids, position_ids=positions.flip(1), **inputs).logits
        assert not torch.allclose(other, expected, atol=1e-3)

    # the weights of attention: applied to the values they give its output
    if model.config.attention != "softmax":
        with pytest.raises(ValueError, match="has no softmax"):
            theirs(ids, output_attentions=True)
        return
    weights = theirs(ids, mask, types, output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (2, 2, 9, 9)
    assert (weights[0][1, :, :, 5:] == 0).all()
    first = []
    hook = theirs.model.bert.blocks[0].attention.register_forward_hook(
        lambda module, args, out: first.extend([module.qkv(args[0]), out[0], args[4]])
    )
    theirs(ids, mask, types)
    hook.remove()
    values = first[0].view(2, 9, 3, 2, 16)[:, :, 2].transpose(1, 2)
    if first[2] is not None:  # of value_residual; these are the first block's values
        values = values * first[2].sum()
    mixed = (weights[0] @ values).transpose(1, 2).reshape(2, 9, 32)
    output = theirs.model.bert.blocks[0].attention.out(mixed)
    assert torch.allclose(output, first[1], atol=1e-5)


KINDS = {
    "Model": {},
    "ForMaskedLM": {"labels": lambda ids, i: [t if j <= i else -100 for j, t in enumerate(ids)]},
    "ForSequenceClassification": {"labels": lambda ids, i: i % 2},
    "ForTokenClassification": {"labels": lambda ids, i: [1] * (i + 1) + [-100] * (7 - i)},
    "ForQuestionAnswering": {
        "start_positions": lambda ids, i: i,
        "end_positions": lambda ids, i: 7,
    },
}


@pytest.fixture(scope="module")
def nanocram_folder(tokenizer, tmp_path_factory):
    """An exported folder with all of nanocram's switches."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write_run("out/nanocram", random_bert(**SWITCHES), tokenizer)
        export("out/nanocram", "nanocram")
    return home / "nanocram"


def one_step(model, rows, parts, folder, **more):
    """Return the parameters after one step of plain SGD by Trainer, on 8 rows in so many parts."""
    from transformers import Trainer, TrainingArguments

    model = copy.deepcopy(model)
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8 // parts,
        gradient_accumulation_steps=parts,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **more,
    )
    Trainer(model, args, train_dataset=rows).train()
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_behaves_as_any_of_transformers(nanocram_folder, tmp_path, kind):
    from transformers import AutoTokenizer, pipeline

    warnings.simplefilter("ignore")
    cls = getattr(own, f"Nanocram{kind}")
    torch.manual_seed(0)
    settings = {"hidden_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model = cls.from_pretrained(nanocram_folder, **settings)
    ids = torch.randint(5, 90, (8, 8))
    rows = []
    for i, row in enumerate(ids.tolist()):
        labels = {name: make(row, i) for name, make in KINDS[kind].items()}
        rows.append({"input_ids": row, "attention_mask": [1] * 8, **labels})
    labels = {name: torch.tensor([row[name] for row in rows]) for name in KINDS[kind]}

    # settings change the model; hidden states, tuples and unknown arguments
    other = cls.from_pretrained(nanocram_folder, rotary_base=10.0).eval()
    assert not torch.allclose(other.base_model(ids)[0], model.eval().base_model(ids)[0], atol=1e-3)
    model.train()
    out = model(ids, **labels, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    plain = model(ids, **labels, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], out[0])
    with pytest.raises(TypeError, match="nonsense"):
        model(ids, nonsense=1)

    # save, load, other dtype
    model.save_pretrained(tmp_path / "saved")
    again = cls.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.eval()(ids, return_dict=False)[0], model.eval()(ids)[0])
    half = cls.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half(ids)[0].dtype == torch.bfloat16
    model.train()

    # resize, freeze, int8
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(93)
    assert torch.isfinite(larger(ids + 3)[0]).all() and larger.config.vocab_size == 93
    if kind == "ForMaskedLM":
        assert larger(ids).logits.shape == (8, 8, 93)
    frozen = copy.deepcopy(model)
    frozen.base_model.requires_grad_(False)
    n_free = sum(p.requires_grad for p in frozen.parameters())
    assert n_free == {"Model": 0, "ForMaskedLM": 5, "ForSequenceClassification": 4}.get(kind, 2)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) >= 8 and {type(layer) for layer in layers} == {torch.nn.Linear}

    # gradients, with and without checkpointing
    model(ids)[0].sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    n_calls = []
    block = model.base_model.bert.blocks[0].feed_forward
    hook = block.register_forward_pre_hook(lambda *args: n_calls.append(1))
    model.gradient_checkpointing_enable()
    model(ids)[0].sum().backward()
    hook.remove()
    assert len(n_calls) == 2
    for name, gradient in expected.items():
        assert torch.allclose(dict(model.named_parameters())[name].grad, gradient, atol=1e-5), name
    model.gradient_checkpointing_disable()
    model.zero_grad()

    # LoRA on all linear layers
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear"))
    assert torch.allclose(lora(input_ids=ids)[0], model(ids)[0], atol=1e-6)
    assert len([n for n, _ in lora.named_parameters() if ".up.lora_A." in n]) == 2

    # Trainer: a batch in parts is the same batch
    pytest.importorskip("accelerate")
    if kind != "Model":
        whole = one_step(model, rows, 1, tmp_path)
        parts = one_step(model, rows, 4, tmp_path)
        for name, p in whole.items():
            assert torch.allclose(p, parts[name], atol=1e-5), name
        assert max((whole[n] - p).abs().max() for n, p in model.named_parameters()) > 1e-3

    # pipelines
    name = {
        "Model": "feature-extraction",
        "ForMaskedLM": "fill-mask",
        "ForSequenceClassification": "text-classification",
        "ForTokenClassification": "token-classification",
    }.get(kind)
    if name:
        words = AutoTokenizer.from_pretrained(nanocram_folder, trust_remote_code=True)
        assert pipeline(name, model=model.eval(), tokenizer=words)(TEXT)


def test_the_loss_of_a_classifier_follows_its_labels(nanocram_folder):
    cls = own.NanocramForSequenceClassification
    ids = torch.randint(5, 90, (4, 8))

    # one of three, several of three, a value
    model = cls.from_pretrained(nanocram_folder, num_labels=3).eval()
    out = model(ids, labels=torch.tensor([0, 1, 2, 0]))
    logp = out.logits.log_softmax(-1)
    assert torch.isclose(out.loss, -(logp[0, 0] + logp[1, 1] + logp[2, 2] + logp[3, 0]) / 4)
    model = cls.from_pretrained(nanocram_folder, num_labels=3).eval()
    several = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    out = model(ids, labels=several)
    p = out.logits.sigmoid()
    expected = -(several * p.log() + (1 - several) * (1 - p).log()).mean()
    assert torch.isclose(out.loss, expected)
    model = cls.from_pretrained(nanocram_folder, num_labels=1).eval()
    for values in (torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([[1], [2], [3], [4]])):
        out = model(ids, labels=values)
        assert torch.isclose(out.loss, (out.logits[:, 0] - torch.arange(1, 5)).square().mean())


def test_a_native_model_needs_no_line_of_ours(folder, tmp_path):
    """Heads, checkpointing, other attention, sentence-transformers, ONNX: trust_remote_code off."""
    import transformers

    name = folder("modern")
    ids = torch.randint(5, 90, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    # heads, and their losses through checkpointed layers
    for kind, labels in {
        "TokenClassification": {"labels": torch.ones_like(ids)},
        "SequenceClassification": {"labels": torch.tensor([0, 1])},
        "QuestionAnswering": {
            "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([3, 4]),
        },
    }.items():
        model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(name)
        assert type(model).__module__.startswith("transformers.")
        model.gradient_checkpointing_enable()
        model.train()
        model(ids, mask, **labels).loss.backward()
        assert model.get_input_embeddings().weight.grad.abs().max() > 0
    assert model._supports_flash_attn
    # the head for whole texts sees the mean of all tokens
    model = transformers.AutoModelForSequenceClassification.from_pretrained(name).eval()
    hidden = model.model(ids, mask).last_hidden_state
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert torch.allclose(model(ids, mask).logits, model.classifier(model.head(pooled)), atol=1e-5)
    # attention of another kind
    cls = transformers.AutoModel
    eager = cls.from_pretrained(name, attn_implementation="eager")(ids, mask)
    sdpa = cls.from_pretrained(name, attn_implementation="sdpa")(ids, mask)
    real = mask.bool()
    assert torch.allclose(eager.last_hidden_state[real], sdpa.last_hidden_state[real], atol=1e-5)


def test_a_model_card_says_what_the_hub_asks(folder, monkeypatch, capsys):
    from huggingface_hub import ModelCard

    export_dir = folder("crammed")
    shutil.rmtree(export_dir)
    run = Path("out/crammed")
    entry = {"metric": "matthews", "scores": [40.0, 42.0], "median": 41.0, "sd": 1.4}
    entry |= {"n_train": 8551, "n_dev": 1043, "partial": False, "settings": {}, "epochs": [[41.0]]}
    card = {"rows": {"run": {"cola": entry}, "/home/me/bert": {"cola": entry}}}
    (run / "glue.json").write_text(json.dumps(card | {"rules": "inside all of them"}))
    rules = {
        SCRATCH: {"verdict": "kept", "did": "random initial weights"},
        NO_MODEL: {"verdict": "broken", "did": "tokenizer /home/me/tokenizer.json"},
    }
    (run / "rules.json").write_text(json.dumps(rules))
    evaluation = {"step": 9, "tokens": 5e6, "hours": 0.5, "val_loss": 3.4321, "val_accuracy": 0.4}
    (run / "log.jsonl").write_text(json.dumps(evaluation) + "\n")
    export(run, export_dir, license="apache-2.0", language="de")

    text = Path(export_dir, "README.md").read_text()
    data = ModelCard(text).data
    assert (data.license, data.language) == ("apache-2.0", "de")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "fill-mask")
    assert data.datasets == ["wikimedia/wikipedia"] and "nanocram" in data.tags
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_config) == ("nyu-mll/glue", "cola")
    assert (result.metric_type, result.metric_value) == ("matthews_correlation", 41.0)
    assert f"Rules of cramming: {SCRATCH}: kept; {NO_MODEL}: broken; 3 raw text" in text
    assert "not checked." in text and "3.432 nats" in text and "32 tokens" in text
    assert "41.0 ± 1.4" in text and re.search(r"commit [0-9a-f]{7}", text)
    assert f"python -m tools.export_hf out/crammed --to={export_dir}" in text
    assert "/home" not in text and str(Path.cwd()) not in text

    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(program, {})
    assert "token_str" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["crammed", "modern"])
def test_an_exported_folder_is_fine_tuned_again(folder, run, glue, name):  # noqa: F811
    words = [*TINY, *SMALL, "--tasks=rte", "--out_dir=out/eval", "--glue_seeds=1"]
    message, output = run("finetune_glue.py", *words, f"--glue_init={folder(name)}")
    assert message is None, message
    assert f"| {name} |" in output


def test_a_corpus_whose_documents_begin_with_cls(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("out/x", random_bert(), tokenizer, insert_cls=True)
    export("out/x", "x")
    assert Tokenizer.from_file("x/tokenizer.json").encode("").tokens == ["<cls>", "<sep>"]


def test_a_corpus_that_is_not_here(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run("out/x", random_bert(), tokenizer)
    shutil.rmtree("data")
    export("out/x", "x")
    assert "warning: the corpus of this run is not in data/" in capsys.readouterr().out
    assert json.loads(Path("x/tokenizer_config.json").read_text())["model_max_length"] == 64
    assert Tokenizer.from_file("x/tokenizer.json").encode("").tokens == ["<sep>"]


CUT = """
from nanocram.faults import Fault
from tools.export_hf import export
for name in ("crammed", "bert"):
    try:
        export(f"out/{name}", "cut")
    except Fault as e:
        print(e)
"""


def test_a_folder_is_complete_or_not_there(folder, run):
    """A limit on the size of files is like a full disk: for our own files, and for safetensors'."""
    for name in ("crammed", "bert"):
        folder(name)
    message, _ = run("export_hf.py", "out/bert", "--to=bert")
    assert "exists and is not empty" in message
    script = f"ulimit -f 8; exec {shlex.join([sys.executable, '-c', CUT])}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    first, second = done.stdout.splitlines()
    assert first.startswith("File too large: cut") and "cut could not be written" in second
    assert not list(Path(".").glob("cut*"))


def test_fine_tuned_classifiers_export_too(run, tiny_data, glue):  # noqa: F811
    """With the head, the marks around a text and the length that fine-tuning had."""
    from transformers import AutoTokenizer, pipeline

    run("train.py", *TINY, "--max_steps=5")
    words = [*TINY, *SMALL, "--tasks=rte,cola,stsb", "--glue_save=True", "--glue_seeds=1"]
    message, _ = run("finetune_glue.py", *words, "--glue_max_len=24")
    assert message is None, message
    for task in ("rte", "cola", "stsb"):
        assert run("export_hf.py", "out/tiny", f"--to={task}", f"--task={task}")[0] is None

    # pairs
    cls = own.NanocramForSequenceClassification
    saved = torch.load("out/tiny/classifiers/rte.pt", weights_only=True)
    model = Classifier(BERT(Config(**saved["config"])), 2, saved["pooling"]).eval()
    model.load_state_dict(saved["model"])
    ours = Tokenizer.from_file("out/tiny/tokenizer.json")
    ids = torch.tensor([ours.encode("bal dem", "fal gol").ids])
    tokenizer = AutoTokenizer.from_pretrained("rte", trust_remote_code=True)
    batch = tokenizer("bal dem", "fal gol", return_tensors="pt")
    assert batch["input_ids"].tolist() == ids.tolist() and tokenizer.model_max_length == 24
    theirs, info = cls.from_pretrained("rte", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = model(ids, torch.ones_like(ids).bool())
        assert torch.allclose(theirs.eval()(**batch).logits, expected, atol=1e-6)
    assert theirs.config.id2label == {0: "entailment", 1: "not_entailment"}
    card = Path("rte/README.md").read_text()
    assert "accuracy" in card and "nyu-mll/glue" in card and "text-classification" in card

    # one text
    encoded = Tokenizer.from_file("cola/tokenizer.json").encode("bal dem")
    assert encoded.ids == [2, *ours.encode("bal dem", add_special_tokens=False).ids, 3, 3]
    types = collate([encoded.ids], [0], {"pad": 0, "sep": 3}, "cpu", 64)[2]
    assert encoded.type_ids == types[0].tolist()

    # a regression: the value itself, not its sigmoid
    model = cls.from_pretrained("stsb")
    tokenizer = AutoTokenizer.from_pretrained("stsb", trust_remote_code=True)
    texts = {"text": "bal dem", "text_pair": "fal gol"}
    (answer,) = [pipeline("text-classification", model=model, tokenizer=tokenizer)(texts)]
    batch = tokenizer("bal dem", "fal gol", return_tensors="pt")
    assert answer["score"] == pytest.approx(model(**batch).logits.item(), abs=1e-6)

    # what is not there
    Path("out/tiny/scratch/classifiers").mkdir(parents=True)
    shutil.copy("out/tiny/classifiers/cola.pt", "out/tiny/scratch/classifiers/mrpc.pt")
    message, _ = run("export_hf.py", "out/tiny", "--to=other", "--task=mrpc")
    assert "there is one in scratch/ of out/tiny" in message
    assert run("export_hf.py", "out/tiny/scratch", "--to=third", "--task=mrpc")[0] is None
    Path("out/tiny/classifiers/cola.pt").write_bytes(b"damaged")
    message, _ = run("export_hf.py", "out/tiny", "--to=other", "--task=cola")
    assert "cannot be read" in message
    Path("out/tiny/classifiers/cola.pt").unlink()
    message, _ = run("export_hf.py", "out/tiny", "--to=other", "--task=cola")
    assert "--glue_save=True writes it" in message
    message, _ = run("export_hf.py", "out/none", "--to=other")
    assert "does not exist" in message and not Path("other").exists()
