"""What transformers loads from an exported folder, in a new process and another folder."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, command
from safetensors.torch import load_file
from test_finetune_glue import SMALL, glue  # noqa: F401
from tokenizers import Tokenizer

from finetune_glue import collate
from model import BERT, Classifier, Config

CHECK = """
import sys, torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, pipeline
folder, trust = sys.argv[1], sys.argv[2] == "True"
expected = torch.load(sys.argv[3], weights_only=True)
assert not [name for name in sys.modules if name in ("model", "train", "tools", "nanocram")]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust).eval()
batch = tokenizer(expected["texts"], padding=True, return_tensors="pt")
assert batch["input_ids"].tolist() == expected["ids"].tolist(), batch["input_ids"]
with torch.no_grad():
    logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
real = batch["attention_mask"].bool()
print("largest difference", (logits - expected["logits"])[real].abs().max().item())
assert torch.allclose(logits[real], expected["logits"][real], atol=1e-5)
fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
found = fill("bal " + tokenizer.mask_token + " dem")
assert len(found) == 5 and 0 < found[0]["score"] <= 1
half = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.bfloat16)
assert half(**batch).logits.dtype == torch.bfloat16
hidden = AutoModel.from_pretrained(folder, trust_remote_code=trust)(**batch).last_hidden_state
assert hidden.shape[:2] == real.shape
loss = model(**batch, labels=batch["input_ids"]).loss
loss.backward()
kind = AutoModelForSequenceClassification
kind.from_pretrained(folder, trust_remote_code=trust, num_labels=3)(**batch)
"""


def loads_in_transformers(folder, trust, expected, cwd, check=CHECK):
    torch.save(expected, cwd / "expected.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"}
    args = [sys.executable, "-c", check, str(folder), str(trust), str(cwd / "expected.pt")]
    process = subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]


ARCHITECTURES = {
    "crammed": (["--position=scaled_sinusoidal"], True),
    "rotary": ("--position=rotary --qk_norm=True --neighbour_keys=True --value_residual=True "
               "--embedding_skip=True --norm=rmsnorm --activation=relu2".split(), True),
    "bert": ("--norm_place=post --bias=True --glu=False --position=learned --final_norm=False "
             "--head_transform=True --decoder_bias=True --token_types=2".split(), False),
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
    ids, mask = (
        torch.tensor([getattr(e, what) for e in encodings]) for what in ("ids", "attention_mask")
    )
    assert (ids == tokenizer.token_to_id("<mask>")).sum() == 1
    with torch.no_grad():
        logits = model.logits(model.encode(ids, mask.bool()))
    assert ("modeling_nanocram.py" in os.listdir("exported")) == trust
    away = tmp_path_factory.mktemp("away")
    loads_in_transformers(
        home / "exported", trust, {"texts": texts, "ids": ids, "logits": logits}, away
    )
    if (
        name == "bert"
    ):  # training has seen segment 0 alone: the exported segment 1 must not be its random start
        rows = load_file("exported/model.safetensors")[
            "bert.embeddings.token_type_embeddings.weight"
        ]
        assert torch.equal(rows[1], rows[0]) and not torch.equal(
            rows[1], saved["model"]["type_embedding.weight"][1]
        )
    card = Path("exported/README.md").read_text()
    assert "Validation loss" in card and "Rules of cramming" in card
    message, _ = run("export_hf.py", "out/tiny", "--to=exported")
    assert "exists and is not empty" in message
    words = shlex.join(command("export_hf.py", "out/tiny", "--to=cut"))
    script = f"ulimit -f 8; exec {words}"  # like a full disk
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    reason = (
        "File too large: cut" if trust else "cut could not be written"
    )  # of our own file, and of safetensors'
    assert process.returncode == 1 and process.stderr.startswith(f"export_hf.py: {reason}"), (
        process.stderr
    )
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
    message, _ = run(
        "finetune_glue.py", *TINY, *SMALL, "--tasks=rte", "--glue_save=True", "--glue_seeds=1"
    )
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
    loads_in_transformers(
        home / "exported", True, {"texts": texts, "logits": logits}, away, CHECK_CLASSIFIER
    )
    message, _ = run(
        "finetune_glue.py", *TINY, *SMALL, "--tasks=cola", "--glue_save=True", "--glue_seeds=1"
    )
    assert run("export_hf.py", "out/tiny", "--to=single", "--task=cola")[0] is None
    encoded = Tokenizer.from_file("single/tokenizer.json").encode("bal dem")
    assert encoded.ids == [
        2,
        *tokenizer.encode("bal dem", add_special_tokens=False).ids,
        3,
        3,
    ]  # as in fine-tuning
    assert (
        encoded.type_ids
        == collate([encoded.ids], [0], {"pad": 0, "sep": 3}, "cpu", 64)[2][0].tolist()
    )
    Path("out/tiny/scratch/classifiers").mkdir(parents=True)
    shutil.copy("out/tiny/classifiers/cola.pt", "out/tiny/scratch/classifiers/mrpc.pt")
    assert (
        "there is one in scratch/ of out/tiny"
        in run("export_hf.py", "out/tiny", "--to=third", "--task=mrpc")[0]
    )
    assert run("export_hf.py", "out/tiny/scratch", "--to=third", "--task=mrpc")[0] is None
    Path("out/tiny/classifiers/cola.pt").write_bytes(b"damaged")
    assert "cannot be read" in run("export_hf.py", "out/tiny", "--to=fourth", "--task=cola")[0]
    Path("out/tiny/classifiers/cola.pt").unlink()
    assert (
        "--glue_save=True writes it"
        in run("export_hf.py", "out/tiny", "--to=other", "--task=cola")[0]
    )
    assert (
        "does not exist" in run("export_hf.py", "out/none", "--to=other")[0]
        and not Path("other").exists()
    )
