"""docs/scale.md: its commands, made small, and a corpus that datatrove has written."""

import gzip
import json
import re
import shlex
from pathlib import Path

from conftest import ROOT, TINY_DATA, TINY_MODEL, sentences
from test_train import log

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
