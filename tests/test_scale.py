"""docs/scale.md: its commands, made small, and a corpus that datatrove has written."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, TINY_DATA, TINY_MODEL, sentences
from test_train import log

from nanocram.docs_corpus import package_documents

SMALL = {
    "prepare.py": [word for word in TINY_DATA if not word.startswith("--dataset")],
    "train.py": [*TINY_MODEL, "--max_len=128", "--max_steps=6", "--compile=False", "--device=cpu"],
}
SMALL["train.py"] += ["--batch_size=4", "--micro_batch_size=4", "--log_seconds=0"]


def commands(heading):
    """Return [[script, argument, ...], ...] of the `python` lines of a section."""
    text = (ROOT / "docs" / "scale.md").read_text()
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [shlex.split(line) for line in re.findall(r"(?m)^    python (.*)$", section)]


def test_the_commands_for_two_lengths(run, home):
    """The second part has longer rows, the first one's tokenizer, and the rate falls to zero."""
    found = commands("Two lengths")
    assert [words[0] for words in found] == ["prepare.py", "train.py"] * 2
    for script, *args in found:
        extra = SMALL[script]
        if "config/two_lengths.py" in args:
            extra = [word for word in extra if "seq_len" not in word] + ["--seq_len=64"]
        message, output = run(script, *args, *extra)
        assert message is None, f"{script} {args}: {message}"
    assert "starting from out/cpu_128/ckpt.pt" in output and "warning: the learning" not in output
    rates = [entry["lr"] for entry in log("two_lengths")]
    assert rates[0] == 2e-3 and rates[-1] < rates[0] / 5
    assert log("two_lengths")[0]["tokens"] == 4 * 64
    metas = [json.loads(Path(f"data/{name}/meta.json").read_text()) for name in ("cpu", "cpu_512")]
    assert metas[0]["special_ids"] == metas[1]["special_ids"]


def test_the_commands_that_train_on(run, home):
    """Each begins with the val_loss with which the run before has ended."""
    Path("texts").symlink_to(".")
    for script in ("prepare.py", "train.py"):
        assert run(script, "config/cpu.py", *SMALL[script])[0] is None
    for script, *args in commands("Train on from weights that exist"):
        given = {word.partition("=")[0] for word in args}
        extra = [word for word in SMALL[script] if word.partition("=")[0] not in given]
        message, output = run(script, *args, *extra)
        assert message is None, f"{script} {args}: {message}"
    first = log("branch", "val_loss")[0]
    last = log("plateau", "val_loss")[-1]
    assert (first["step"], first["val_loss"]) == (0, last["val_loss"])


def test_a_corpus_that_datatrove_has_written(run, home):
    """Its JsonlWriter, if it is installed, else files of the same form."""
    documents = sentences(400)
    try:
        write_with_datatrove(documents)
    except ImportError:
        write_as_datatrove(documents)
    sources = [{"files": "corpus", "where": {"metadata.language": ["en"]}}]
    message, output = run("prepare.py", *TINY_DATA, f"--sources={sources!r}")
    assert message is None, message
    counts = json.loads(Path("data/tiny/meta.json").read_text())["counts"]
    assert counts["documents"] == 300
    assert counts["characters"] == sum(map(len, documents[:300]))


def write_with_datatrove(documents):
    from datatrove.data import Document
    from datatrove.pipeline.writers import JsonlWriter

    with JsonlWriter("corpus") as writer:
        for i, text in enumerate(documents):
            document = Document(text=text, id=f"a/{i}", metadata={"language": language(i)})
            writer.write(document, rank=i % 2)


def write_as_datatrove(documents):
    Path("corpus").mkdir()
    for rank in range(2):
        with gzip.open(f"corpus/{rank:05}.jsonl.gz", "wt", encoding="utf-8") as f:
            for i in range(rank, len(documents), 2):
                metadata = {"language": language(i)}
                document = {"text": documents[i], "id": f"a/{i}", "metadata": metadata}
                text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
                f.write(text + "\n")


def language(i):
    return "en" if i < 300 else "de"


# --------------------------------------------------------------------------------------------------
# What it brings, in minutes on a CPU


def val_losses(name):
    return [entry["val_loss"] for entry in log(name, "val_loss")]


@pytest.mark.slow
def test_training_on_beats_the_model_before_and_one_from_scratch(run, home):
    """From the documentation of torch to that of other packages, equal steps, three seeds."""
    with open("torch.txt", "w") as torch_file, open("others.txt", "w") as others:
        for text, package in package_documents():
            file = torch_file if package == "torch" else others
            file.write(text[:20_000].replace("\n\n", "\n") + "\n\n")

    # one tokenizer, of the first kind of text
    data = ["--vocab_size=2048", "--seq_len=64", "--val_rows=64", "--filter_ratio=0.0"]
    data += ["--order=shuffle", "--max_rows=0", "--max_chars=10_000_000"]
    model = "--n_layer=2 --n_head=2 --n_embd=64 --n_inner=256 --position=rotary".split()
    model += ["--rotary_base=1000.0", "--compile=False", "--learning_rate=0.005"]
    model += ["--batch_size=32", "--micro_batch_size=32", "--batch_ramp=0.0", "--device=cpu"]
    first = [*data, "--dataset=torch", "--sources=torch.txt"]
    second = [*data, "--dataset=others", "--sources=others.txt", "--tokenizer_file=out/a1"]
    assert run("prepare.py", *first)[0] is None

    gains = []
    for seed in (1, 2, 3):
        words = [*model, f"--seed={seed}"]
        args = [*first, *words, "--max_steps=600", f"--out_dir=out/a{seed}"]
        assert run("train.py", *args)[0] is None
        if seed == 1:
            assert run("prepare.py", *second)[0] is None
        words += [*second, "--max_steps=200"]
        on = ["--out_dir=out/on", f"--init_from=out/a{seed}", "--resume=never"]
        assert run("train.py", *words, *on)[0] is None
        assert run("train.py", *words, "--out_dir=out/scratch", "--resume=never")[0] is None
        before, after = val_losses("on")[0], val_losses("on")[-1]
        gains.append((before - after, val_losses("scratch")[-1] - after))
    print(f"lower than before, and than from scratch, by {gains} nats")
    assert min(min(pair) for pair in gains) > 0


@pytest.mark.slow
def test_a_second_phase_of_long_rows_lowers_the_loss_there(run, home):
    """In the toy language of the tests, with equal tokens: rows of 32, then a tenth in 128."""
    Path("text.txt").write_text("\n\n".join(sentences(3000)))
    model = [*TINY_MODEL, "--max_len=128", "--position=rotary", "--rotary_base=100.0"]
    model += ["--n_embd=64", "--n_inner=128", "--compile=False", "--device=cpu"]
    model += ["--batch_ramp=0.0", "--learning_rate=0.003"]
    short = [*TINY_DATA, *model, "--batch_size=32", "--micro_batch_size=32"]
    long = [*TINY_DATA, *model, "--dataset=long", "--seq_len=128", "--tokenizer_file=out/a"]
    long += ["--batch_size=8", "--micro_batch_size=8"]
    assert run("prepare.py", *short)[0] is None
    constant = ["--schedule=constant", "--warmup=0.05", "--max_steps=540"]
    assert run("train.py", *short, *constant, "--out_dir=out/a")[0] is None
    assert run("prepare.py", *long)[0] is None

    # the second phase, against a run that has had all of its time in short rows
    two = ["--init_from=out/a/ckpt.pt", "--schedule=linear", "--max_steps=60", "--out_dir=out/two"]
    assert run("train.py", *long, *two)[0] is None
    args = ["--schedule=trapezoid", "--cooldown=0.1", "--warmup=0.05", "--max_steps=600"]
    assert run("train.py", *short, *args, "--out_dir=out/one")[0] is None
    args = ["--init_from=out/one", "--max_steps=1", "--out_dir=out/look"]
    assert run("train.py", *long, *args)[0] is None
    one, two = val_losses("look")[0], val_losses("two")[-1]
    print(f"on rows of 128: {two:.3f} with the second phase, {one:.3f} without")
    assert two < one
