import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file
from test_finetune_glue import SMALL, glue  # noqa: F401
from tokenizers import Tokenizer
from transformers import BertConfig, BertForMaskedLM, BertModel

from export_hf import from_hf, load_bert, to_hf
from finetune_glue import collate
from model import BERT, Classifier, Config

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] . bal dem fal gol fin dar".split() + [f"w{i}" for i in range(38)]


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
    assert torch.allclose(ours.encode(ids, mask, types)[mask], out.last_hidden_state[mask], atol=1e-5)
    pooler = load_bert(tmp_path)[3]
    model = Classifier(ours, 2, pooler_width=32).eval()
    model.pooler.load_state_dict(pooler)
    pooled = torch.tanh(model.pooler(ours.encode(ids, mask, types)[:, 0]))
    assert torch.allclose(pooled, out.pooler_output, atol=1e-5)


def test_names_map_back_and_forth(tmp_path):
    theirs = their_bert(tmp_path)
    state = theirs.state_dict()
    back = to_hf(from_hf(state, 2), 2)
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids"}
    assert back.keys() == state.keys() - tied and all(torch.equal(back[k], state[k]) for k in back)
    first = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
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
    with pytest.raises(SystemExit, match="no complete BERT"):
        load_bert(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_tokenizer_from_vocab_txt(tmp_path):
    their_bert(tmp_path)
    tokenizer = load_bert(tmp_path)[2]
    assert tokenizer.encode("Bal dem?").tokens == ["[CLS]", "bal", "dem", "[UNK]", "[SEP]"]


def test_a_bert_is_scored_under_the_same_protocol(run, glue, home):  # noqa: F811
    their_bert(home / "bert")
    message, output = run("finetune_glue.py", *TINY, *SMALL, "--tasks=cola,rte", "--glue_init=bert", "--out_dir=out/eval")
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
        with pytest.raises(SystemExit) as e:
            load_bert(source)
        assert expected in str(e.value) and "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# From ours to theirs, loaded in a fresh process, from another folder


CHECK = """
import sys, torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, trust, expected = sys.argv[1], sys.argv[2] == "True", torch.load(sys.argv[3], weights_only=True)
assert not [name for name in sys.modules if name in ("model", "train", "hf_model")]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust).eval()
batch = tokenizer(expected["texts"], padding=True, return_tensors="pt")
assert batch["input_ids"].tolist() == expected["ids"].tolist(), batch["input_ids"]
with torch.no_grad():
    logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
real = batch["attention_mask"].bool()
print("largest difference", (logits - expected["logits"])[real].abs().max().item())
assert torch.allclose(logits[real], expected["logits"][real], atol=1e-5)
found = pipeline("fill-mask", model=model, tokenizer=tokenizer)("bal " + tokenizer.mask_token + " dem")
assert len(found) == 5 and 0 < found[0]["score"] <= 1
half = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.bfloat16)
assert half(**batch).logits.dtype == torch.bfloat16
hidden = AutoModel.from_pretrained(folder, trust_remote_code=trust)(**batch).last_hidden_state
assert hidden.shape[:2] == real.shape
loss = model(**batch, labels=batch["input_ids"]).loss
loss.backward()
AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=trust, num_labels=3)(**batch)
"""


def loads_in_transformers(folder, trust, expected, cwd, check=CHECK):
    torch.save(expected, cwd / "expected.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"}
    args = [sys.executable, "-c", check, str(folder), str(trust), str(cwd / "expected.pt")]
    process = subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]


ARCHITECTURES = {
    "crammed": (["--position=scaled_sinusoidal"], True),
    "rotary": ("--position=rotary --qk_norm=True --neighbour_keys=True --value_residual=True --embedding_skip=True "
               "--norm=rmsnorm --activation=relu2".split(), True),
    "bert": ("--norm_place=post --bias=True --glu=False --position=learned --final_norm=False --head_transform=True "
             "--decoder_bias=True --token_types=2".split(), False),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_transformers_loads_gives_our_logits(run, tiny_data, home, tmp_path_factory, name):
    changes, trust = ARCHITECTURES[name]
    assert run("train.py", *TINY, "--max_steps=30", *changes)[0] is None
    message, output = run("export_hf.py", "out/tiny", "--to=exported")
    assert message is None and ("BertForMaskedLM" in output) == (not trust), message
    saved = torch.load("out/tiny/model.pt", weights_only=True)
    model = BERT(Config(**saved["config"])).eval()
    model.load_state_dict(saved["model"])
    tokenizer = Tokenizer.from_file("out/tiny/tokenizer.json")
    texts = ["bal <mask> fal gol.", "fin"]
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    encodings = tokenizer.encode_batch(texts)
    ids, mask = (torch.tensor([getattr(e, what) for e in encodings]) for what in ("ids", "attention_mask"))
    assert (ids == tokenizer.token_to_id("<mask>")).sum() == 1
    with torch.no_grad():
        logits = model.logits(model.encode(ids, mask.bool()))
    assert ("modeling_nanocram.py" in os.listdir("exported")) == trust
    away = tmp_path_factory.mktemp("away")
    loads_in_transformers(home / "exported", trust, {"texts": texts, "ids": ids, "logits": logits}, away)
    if name == "bert":  # training has seen segment 0 alone: the exported segment 1 must not be its random start
        rows = load_file("exported/model.safetensors")["bert.embeddings.token_type_embeddings.weight"]
        assert torch.equal(rows[1], rows[0]) and not torch.equal(rows[1], saved["model"]["type_embedding.weight"][1])
    card = Path("exported/README.md").read_text()
    assert "Validation loss" in card and "Rules of cramming" in card
    message, _ = run("export_hf.py", "out/tiny", "--to=exported")
    assert "exists and is not empty" in message
    script = f"ulimit -f 8; exec {sys.executable} {ROOT / 'export_hf.py'} out/tiny --to=cut"  # as a full disk
    process = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    reason = "File too large: cut" if trust else "cut could not be written"  # of our own file, and of safetensors'
    assert process.returncode == 1 and process.stderr.startswith(f"export_hf.py: {reason}"), process.stderr
    assert process.stderr.count("\n") == 1
    assert not list(Path(".").glob("cut*"))


CHECK_CLASSIFIER = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, expected = sys.argv[1], torch.load(sys.argv[3], weights_only=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
batch = tokenizer(*expected["texts"], padding=True, return_tensors="pt")
logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
assert torch.allclose(logits, expected["logits"], atol=1e-5)
assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
"""


def test_a_fine_tuned_classifier_exports_too(run, tiny_data, glue, home, tmp_path_factory):  # noqa: F811
    run("train.py", *TINY, "--max_steps=5")
    message, _ = run("finetune_glue.py", *TINY, *SMALL, "--tasks=rte", "--glue_save=True", "--glue_seeds=1")
    assert message is None, message
    assert run("export_hf.py", "out/tiny", "--to=exported", "--task=rte")[0] is None
    saved = torch.load("out/tiny/classifiers/rte.pt", weights_only=True)
    model = Classifier(BERT(Config(**saved["config"])), 2).eval()
    model.load_state_dict(saved["model"])
    tokenizer = Tokenizer.from_file("out/tiny/tokenizer.json")
    ids = torch.tensor([tokenizer.encode("bal dem", "fal gol").ids])
    with torch.no_grad():
        logits = model(ids, torch.ones_like(ids).bool())
    away = tmp_path_factory.mktemp("away")
    texts = (["bal dem"], ["fal gol"])
    loads_in_transformers(home / "exported", True, {"texts": texts, "logits": logits}, away, CHECK_CLASSIFIER)
    message, _ = run("finetune_glue.py", *TINY, *SMALL, "--tasks=cola", "--glue_save=True", "--glue_seeds=1")
    assert run("export_hf.py", "out/tiny", "--to=single", "--task=cola")[0] is None
    encoded = Tokenizer.from_file("single/tokenizer.json").encode("bal dem")
    assert encoded.ids == [2, *tokenizer.encode("bal dem", add_special_tokens=False).ids, 3, 3]  # as in fine-tuning
    assert encoded.type_ids == collate([encoded.ids], [0], {"pad": 0, "sep": 3}, "cpu")[2][0].tolist()
    Path("out/tiny/scratch/classifiers").mkdir(parents=True)
    shutil.copy("out/tiny/classifiers/cola.pt", "out/tiny/scratch/classifiers/mrpc.pt")
    assert "there is one in scratch/ of out/tiny" in run("export_hf.py", "out/tiny", "--to=third", "--task=mrpc")[0]
    assert run("export_hf.py", "out/tiny/scratch", "--to=third", "--task=mrpc")[0] is None
    Path("out/tiny/classifiers/cola.pt").write_bytes(b"damaged")
    assert "cannot be read" in run("export_hf.py", "out/tiny", "--to=fourth", "--task=cola")[0]
    Path("out/tiny/classifiers/cola.pt").unlink()
    assert "--glue_save=True writes it" in run("export_hf.py", "out/tiny", "--to=other", "--task=cola")[0]
    assert "does not exist" in run("export_hf.py", "out/none", "--to=other")[0] and not Path("other").exists()
