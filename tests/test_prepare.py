"""Tests of prepare.py, from the text to the finished data set."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY, sentences, start
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import prepare
from nanocram import faults, rows, spool, tokenizer
from nanocram.tokenizer import SPECIAL_TOKENS


def bins(name="tiny"):
    folder = Path("data") / name
    meta = json.loads((folder / "meta.json").read_text())
    parts = [
        np.fromfile(folder / f"{p}.bin", np.uint16).reshape(-1, meta["seq_len"])
        for p in ("train", "val")
    ]
    return *parts, meta, Tokenizer.from_file(str(folder / "tokenizer.json"))


def made():
    """Return the data sets, whole or not, and the texts that are not whole."""
    texts = [path for path in Path("data").glob(".spool/*") if path.is_dir()]
    broken = [path for path in texts if not (path / "reading.json").exists()]
    return [path for path in Path("data").glob("*") if path.name != ".spool"] + broken


def test_files_and_meta(tiny_data):
    train, val, meta, tokenizer = bins()
    assert meta["special_ids"] == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert [tokenizer.id_to_token(i) for i in range(5)] == SPECIAL_TOKENS
    assert (len(train), len(val), meta["vocab_size"]) == (
        meta["train_rows"],
        16,
        tokenizer.get_vocab_size(),
    )
    for name, file in {
        "train": "train.bin",
        "val": "val.bin",
        "tokenizer": "tokenizer.json",
    }.items():
        assert (
            meta["sha256"][name]
            == hashlib.sha256((Path("data/tiny") / file).read_bytes()).hexdigest()
        )
    assert json.loads(Path("data/tiny/config.json").read_text())["seq_len"] == 32
    assert not list(Path("data").glob("*.tmp"))


def test_every_token_is_in_one_row_and_no_validation_document_in_training(tiny_data):
    """Tokenized independently: train.bin has the tokens of all documents but the held-out ones."""
    train, val, meta, tokenizer = bins()
    ids = [
        tokenizer.encode(d, add_special_tokens=False).ids
        for d in Path("text.txt").read_text().split("\n\n")
    ]
    documents = {tuple(d) for d in ids}
    stream, held = val.ravel().tolist(), set()
    while 3 in stream:
        cut = stream.index(3)
        held.add(tuple(stream[:cut]))
        stream = stream[cut + 1 :]
    assert len(held) > 3 and held <= documents  # whole documents, and a <sep> after each
    held |= {
        d for d in documents if stream and list(d[: len(stream)]) == stream
    }  # the one that the last row cuts
    expected = np.bincount([t for d in ids if tuple(d) not in held for t in [*d, 3]], minlength=90)
    missing = expected - np.bincount(train.ravel(), minlength=90)
    assert (missing >= 0).all() and missing.sum() < 32, (
        missing
    )  # but for the last row, which is not full
    assert meta["counts"]["tokens packed"] == expected.sum()
    assert meta["counts"]["tokens"] == train.size


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(5, 99), max_size=40), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(1, 60),
)
def test_pack_keeps_every_token_in_order(tmp_path_factory, documents, seq_len, size):
    """With a tokenizer that reads numbers: rows are the documents, each with <sep>, while full."""
    vocabulary = dict(zip(SPECIAL_TOKENS, range(5))) | {str(i): i for i in range(5, 100)}
    numbers = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("pack") / "rows"
    texts = [" ".join(map(str, d)) for d in documents]
    config = {"seq_len": seq_len, "filter_ratio": 0.0, "insert_cls": False, "insert_sep": True}
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:  # several batches, so that they have seams
        patch.setattr(tokenizer, "BATCH_CHARS", size)
        patch.setattr(prepare, "PACK_TOKENS", size)
        prepare.write_unordered(path, numbers, texts, config, counts)
    expected = [
        t for d in documents if d for t in [*d, 3]
    ]  # a document without tokens leaves no <sep> either
    assert np.fromfile(path, np.uint16).tolist() == expected[: len(expected) // seq_len * seq_len]
    assert counts["tokens packed"] == len(expected)


def test_same_seed_same_bytes_and_another_seed_another_order(run):
    for name, seed in (("tiny", 1), ("b", 1), ("c", 2)):
        assert run("prepare.py", *TINY, f"--dataset={name}", f"--seed={seed}")[0] is None
    a, b, c = (bins(n)[2]["sha256"] for n in ("tiny", "b", "c"))
    assert a == b and a["val"] == c["val"] and a["train"] != c["train"]


def test_filter_and_order_leave_validation_alone(run):
    run("prepare.py", *TINY)
    message, output = run(
        "prepare.py",
        *TINY,
        "--dataset=b",
        "--filter_ratio=0.4",
        "--order=fragment",
        "--max_rows=50",
    )
    assert message is None and "documents dropped by the filter" in output
    (train, _, a, _), (other, _, b, _) = bins(), bins("b")
    assert (
        a["sha256"]["val"] == b["sha256"]["val"]
        and a["sha256"]["tokenizer"] == b["sha256"]["tokenizer"]
    )
    assert len(other) == 50 < len(train)


def test_the_filter_drops_by_tokens_per_character(run):
    rng = random.Random(0)
    gibberish = "\n\n".join(
        " ".join("".join(rng.choices("0123", k=50)) for _ in range(6)) for _ in range(40)
    )
    Path("text.txt").write_text(Path("text.txt").read_text() + "\n\n" + gibberish)
    run("prepare.py", *TINY)
    run("prepare.py", *TINY, "--dataset=b", "--filter_ratio=0.55")
    assert (
        30 <= bins("b")[2]["counts"]["documents dropped by the filter"] <= 40
    )  # some of them are held out


def test_the_filter_counts_characters_not_bytes():
    """Six tokens are too many for ten characters at a ratio of 0.5, however many bytes they are."""
    losses = SimpleNamespace(count=lambda text: (len(text), 0.0, 0))
    six = np.full(6, 7)
    encoded = [("d" * 10, six), ("é" * 10, six), ("é" * 12, six)]
    counts = Counter()
    kept = list(prepare.filter_documents(encoded, 0.5, 1, losses, counts, []))
    assert len(kept) == 1 and counts["documents dropped by the filter"] == 2


def test_the_vocabulary_is_trained_on_no_text_that_is_held_out(tmp_path):
    documents = sentences(100)
    pairs = [(text, "") for text in documents]
    held, limit = spool.write_spool(tmp_path, pairs, 3000, 0, 0, 0, 0, Counter())
    spool.save_reading(tmp_path, held, limit, Counter())
    sample = set(spool.read_sample(tmp_path, held[-1].hash, 1.0, 0))
    assert held and sample == set(documents) - {document.text for document in held}


def test_the_filter_judges_what_the_normaliser_leaves(run):
    """Documents in another script are dropped; one that is mostly English is not."""
    greek = [d.translate(str.maketrans("abdegilmnor", "αβδεγιλμνορ")) for d in sentences(100, 7)]
    mixed = [f"{d} {d} {greek[i][:60]}" for i, d in enumerate(sentences(100, 8))]
    Path("text.txt").write_text("\n\n".join([*sentences(400), *greek, *mixed]))
    assert run("prepare.py", *TINY)[0] is None
    message, _ = run("prepare.py", *TINY, "--dataset=b", "--filter_ratio=0.9")
    assert message is None, message
    (_, val, off, _), (_, same, on, _) = bins(), bins("b")
    assert (val == same).all()  # validation documents are never dropped
    assert 80 <= on["counts"]["documents dropped by the filter"] <= 100
    assert "documents dropped by the filter" not in off["counts"]
    letters = sum(not c.isascii() for d in greek + mixed for c in d)
    assert 0.8 * letters < off["counts"]["characters that the normaliser deletes"] <= letters


def test_insert_cls(run):
    run("prepare.py", *TINY, "--insert_cls=True")
    val = bins()[1].ravel()
    assert val[0] == 2 and (val[1:][val[:-1] == 3] == 2).all()


def test_tokenized_rows_go_straight_into_bins(run, tiny_data):
    """The schema of the paper's own data on the hub: rows of input_ids, and tokenizer.json."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = np.random.default_rng(0).integers(5, 90, (500, 32))
    rows[7] = rows[300]
    parquet.write_table(pyarrow.table({"input_ids": rows.tolist()}), "ids.parquet")
    source = [{"path": "parquet", "data_files": "ids.parquet", "column": "input_ids"}]
    args = [*TINY, f"--sources={source!r}", "--tokenizer_file=data/tiny/tokenizer.json"]
    message, _ = run("prepare.py", *args, "--dataset=b")
    assert message is None, message
    train, val, meta, _ = bins("b")
    both = sorted(map(tuple, [*train, *val]))
    assert set(both) == set(map(tuple, rows)) and len(val) == 16
    assert not set(map(tuple, train)) & set(map(tuple, val))
    assert np.abs(np.diff([rows.tolist().index(r.tolist()) for r in train])).mean() > 50  # shuffled
    for change, expected in [
        (["--seq_len=16"], "has 32 tokens, not seq_len = 16"),
        (["--val_rows=600"], "499 different rows, too few for val_rows = 600"),
        (["--tokenizer_file="], "need their tokenizer_file"),
        ([f"--sources={[*source, 'text.txt']!r}"], "no other sources beside"),
    ]:
        message, _ = run("prepare.py", *args, "--dataset=c", *change)
        assert expected in message and not Path("data/c").exists()
    for bad in (90, 70_000):
        rows[3, 3] = bad
        parquet.write_table(pyarrow.table({"input_ids": rows.tolist()}), "ids.parquet")
        assert "an id outside [0, 90)" in run("prepare.py", *args, "--dataset=c")[0]


def test_what_does_not_fit_is_refused_first(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rows, "available_memory", lambda: 1000)
        message, _ = run("prepare.py", *TINY, "--dedup_tokens=24")
        assert "dedup_tokens needs about" in message and not Path("data/tiny").exists()
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert "0.0 GB of disk are needed" in run("prepare.py", *TINY)[0]


def test_the_summary(tiny_data):
    for part in (
        "fraction of <unk>: 0.0",
        "longest tokens: ",
        "most frequent: . ",
        "row 0 of",
        "characters per token: ",
    ):
        assert part in tiny_data


@pytest.mark.parametrize("seq_len", [1, 4096])
def test_extreme_rows(run, seq_len):
    Path("text.txt").write_text("\n\n".join(sentences(1200)))
    assert run("prepare.py", *TINY, f"--seq_len={seq_len}", "--val_rows=1")[0] is None
    train, val, _, _ = bins()
    assert train.shape[1] == seq_len and val.shape == (1, seq_len)


def test_a_full_disk_leaves_nothing(run, home):
    """A limit on the size of files stands for the disk."""
    script = f"ulimit -f 40; exec {sys.executable} {ROOT / 'prepare.py'} " + " ".join(TINY)
    process = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert process.returncode == 1 and "nothing was kept" in process.stderr.splitlines()[-1], (
        process.stderr
    )
    assert not made()


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--vocab_size=5000"], "too small for vocab_size = 5000"),
        (["--sources=cyrillic.txt"], "or add text; ascii_only=True drops all other scripts"),
        (["--sources=empty.txt"], "hold no text"),
        (["--sources=array.json"], "hold no text; rows without text: 1"),
        (
            ["--sources=[{'files': 'text.jsonl', 'where': {'a.b': ['x']}}]"],
            "no text; rows that `where` leaves out: 1",
        ),
        (["--sources=[1]"], "the source 1 is neither"),
        (["--sources=[{'files': ['a']}]"], "is neither a path nor a dict"),
        (["--sources=[{'files': 'text.txt', 'wieght': 3}]"], "has no 'wieght'"),
        (["--sources=[{'files': 'text.txt', 'weight': 0}]"], "the weight 0 of a source"),
        (
            ["--sources=[{'files': 'text.txt', 'where': {'a': 'b'}}]"],
            "no dict of column: [allowed values]",
        ),
        (["--tokenizer_file=config/none/tokenizer.json"], "cannot be read"),
        (["--dataset=.."], "no plain name"),
        (["--order=fragment", "--insert_sep=False"], "set insert_sep=True"),
        (
            ["--order=sentence_length", "--sources=no_stop.txt"],
            "no sentence end in the first 3,200 characters",
        ),
        (["--sources=copies.txt"], "the 400 documents of the corpus are all one text"),
        (["--sources=nothing.txt"], "'nothing.txt' is no file, folder or glob"),
        (
            ["--sources={'path': 'wikimedia/wikipedia', 'name': '20231101.en'}"],
            "cannot read wikimedia/wikipedia",
        ),
        (["--sources=columns.jsonl"], "no column 'text'; its columns: body, id"),
        (["--sources=columns.parquet"], "no column 'text'; its columns: body"),
        (["--sources=columns.csv"], "no column 'text'; its columns: a, b, None"),
        (
            ["--sources=[{'files': 'columns.csv', 'column': ['a']}]"],
            "the column ['a'] of a source is no name",
        ),
        (["--sources=odd.xml"], "unknown kind"),
        (["--filter_ratio=0.01"], "is filter_ratio too small?"),
        (["--tokenizer_file=odd.xml"], "cannot be read"),
        (["--seq_len=0"], "outside [1, 65536]"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(run, args, expected):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    Path("columns.jsonl").write_text('{"body": "x", "id": 1}\n')
    parquet.write_table(pyarrow.table({"body": ["x"]}), "columns.parquet")
    Path("columns.csv").write_text("a,b\n1,2,3\n")
    Path("odd.xml").write_text("<a/>")
    Path("copies.txt").write_text("\n\n".join(["bal dem. gol"] * 400))
    Path("no_stop.txt").write_text("bal dem!" * 400)
    Path("empty.txt").write_text("\n\n \n")
    Path("cyrillic.txt").write_text("\n\n".join("бал дем. " * (i + 1) for i in range(400)))
    Path("array.json").write_text("[3]")
    Path("text.jsonl").write_text('{"text": "bal"}\n')
    message, _ = run("prepare.py", *TINY, *args)
    assert expected in str(message) and "\n" not in message
    assert not made()


def test_prepared_data_is_kept_and_never_mixed_up(run, tiny_data):
    before = Path("data/tiny/train.bin").stat().st_mtime_ns
    message, output = run("prepare.py", *TINY)
    assert message is None and "already prepared" in output
    message, _ = run("prepare.py", *TINY, "--vocab_size=80")
    assert (
        "vocab_size was 90, now 80" in message
        and Path("data/tiny/train.bin").stat().st_mtime_ns == before
    )


def test_data_of_an_older_version_is_known_again(run, tiny_data):
    """A setting that is gone does not count, and one that is younger had its default."""
    path = Path("data/tiny/meta.json")
    meta = json.loads(path.read_text())
    del meta["settings"]["dedup_tokens"]
    path.write_text(json.dumps(meta | {"settings": meta["settings"] | {"plain_quotes": False}}))
    message, output = run("prepare.py", *TINY)
    assert message is None and "already prepared" in output
    message, _ = run("prepare.py", *TINY, "--dedup_tokens=24")
    assert "dedup_tokens was 0, now 24" in message


@pytest.mark.parametrize("phase", ["spool", "tokenizer.json", "unordered", "train.bin"])
def test_killed_in_any_phase_it_continues(home, phase):
    """kill -9 when a phase's file appears leaves nothing half-written; the next run is whole."""
    Path("text.txt").write_text("\n\n".join(sentences(3000)))
    process = start("prepare.py", *TINY, cwd=home)
    appears = f"data/.spool/*/{phase}" if phase == "spool" else f"data/tiny.tmp/{phase}"
    while not list(Path(".").glob(appears)) and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    _, error = process.communicate()
    assert process.returncode == -9 or phase == "train.bin", (
        error
    )  # the last kill may come too late
    assert Path("data/tiny").exists() == Path("data/tiny/meta.json").exists()
    process = start("prepare.py", *TINY, cwd=home)
    output, error = process.communicate()
    assert process.returncode == 0 and not Path("data/tiny.tmp").exists(), error
    assert "is used again" in output or phase == "spool" or "already prepared" in output
    train, val, meta, _ = bins()
    assert meta["sha256"]["train"] == hashlib.sha256(train.tobytes()).hexdigest()


def test_sigterm_leaves_nothing_that_is_never_used(home):
    Path("text.txt").write_text("\n\n".join(sentences(3000)))
    process = start("prepare.py", *TINY, cwd=home)
    while not list(Path("data").glob(".spool/*/spool")) and process.poll() is None:
        time.sleep(0.0005)
    process.terminate()
    _, error = process.communicate()
    assert process.returncode == 1 and "interrupted; nothing was kept" in error
    assert not made()


def test_a_text_is_read_once_for_data_sets_that_differ_later(run, tiny_data):
    message, output = run("prepare.py", *TINY, "--dataset=b", "--order=fragment")
    assert message is None and "is used again" in output
    a, b = bins()[2], bins("b")[2]
    assert all(a["sha256"][part] == b["sha256"][part] for part in ("val", "tokenizer"))
    before, after = a["counts"], b["counts"]
    assert before == after and before["documents"] == 400
    read = before["documents kept"] + before["documents held out"]
    assert read == 400
    # a text that has changed is read again, and a finished data set says so
    Path("text.txt").write_text(Path("text.txt").read_text() + "\n\nbal dem.")
    message, output = run("prepare.py", *TINY, "--dataset=c")
    assert message is None and "is used again" not in output
    assert "though its sources have changed" in run("prepare.py", *TINY)[1]


def test_one_process_prepares_a_data_set(run, monkeypatch):
    monkeypatch.setattr(faults.lock.__wrapped__, "__defaults__", (0.1,))
    Path("data/.spool").mkdir(parents=True)
    with faults.lock("data/.spool/tiny.lock", "this test"):
        assert "data/tiny is in use by process" in run("prepare.py", *TINY)[0]
    assert not made()


@pytest.mark.parametrize("text, n_rows", [(sentences(400), 500), (["\n".join(sentences(300))], 16)])
def test_a_small_corpus_holds_out_what_fits(run, text, n_rows):
    Path("text.txt").write_text("\n\n".join(text))
    message, output = run("prepare.py", *TINY, f"--val_rows={n_rows}")
    assert message is None, message
    train, val, meta, _ = bins()
    assert 0 < len(val) == meta["val_rows"] <= n_rows and len(train) > len(val)
    assert f"rows are held out, not {n_rows}" in output or len(val) == n_rows


def test_fsync_of_windows(run, monkeypatch):
    """It refuses what was opened for reading."""
    fcntl = pytest.importorskip("fcntl")
    fsync = os.fsync

    def of_windows(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError("Bad file descriptor")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", of_windows)
    assert run("prepare.py", *TINY)[0] is None


def test_a_system_that_does_not_say_how_much_memory_it_has(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    rows.require_memory(10**9)


def test_time_and_disk_are_said_at_the_start(run, monkeypatch, capsys):
    """By hand: 12 GB at 40 MB/s; 0.4 at 7 and 12 at 6 M characters/s on 4 cores: 13.6 min."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    prepare.print_expected(12_000_000_000, 400_000_000)
    output = capsys.readouterr().out
    assert "12,000.0 M characters, about 14 min on 4 cores" in output
    assert "24,000.0 MB of disk" in output
    output = run("prepare.py", *TINY)[1]
    size = os.path.getsize("text.txt")
    assert output.index(f"expected: {size / 1e6:,.1f} M characters") < output.index("read 400")
