import csv
import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, sentences, start
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import prepare
import rows
import sources
from package_docs import prose


def bins(name="tiny"):
    folder = Path("data") / name
    meta = json.loads((folder / "meta.json").read_text())
    parts = [np.fromfile(folder / f"{p}.bin", np.uint16).reshape(-1, meta["seq_len"]) for p in ("train", "val")]
    return *parts, meta, Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_files_and_meta(tiny_data):
    train, val, meta, tokenizer = bins()
    assert meta["special_ids"] == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert [tokenizer.id_to_token(i) for i in range(5)] == prepare.SPECIAL_TOKENS
    assert (len(train), len(val), meta["vocab_size"]) == (meta["train_rows"], 16, tokenizer.get_vocab_size())
    for name, file in {"train": "train.bin", "val": "val.bin", "tokenizer": "tokenizer.json"}.items():
        assert meta["sha256"][name] == hashlib.sha256((Path("data/tiny") / file).read_bytes()).hexdigest()
    assert json.loads(Path("data/tiny/config.json").read_text())["seq_len"] == 32
    assert not list(Path("data").glob("*.tmp"))


def test_every_token_is_in_one_row_and_no_validation_document_in_training(tiny_data):
    """Against an independent tokenization of the text: the tokens of train.bin are those of all other documents."""
    train, val, meta, tokenizer = bins()
    ids = [tokenizer.encode(d, add_special_tokens=False).ids for d in Path("text.txt").read_text().split("\n\n")]
    documents = {tuple(d) for d in ids}
    stream, held = val.ravel().tolist(), set()
    while 3 in stream:
        cut = stream.index(3)
        held.add(tuple(stream[:cut]))
        stream = stream[cut + 1 :]
    assert len(held) > 3 and held <= documents  # whole documents, and a <sep> after each
    held |= {d for d in documents if stream and list(d[: len(stream)]) == stream}  # the one that the last row cuts
    expected = np.bincount([t for d in ids if tuple(d) not in held for t in [*d, 3]], minlength=90)
    missing = expected - np.bincount(train.ravel(), minlength=90)
    assert (missing >= 0).all() and missing.sum() < 32, missing  # but for the last row, which is not full
    assert meta["counts"]["tokens"] == expected.sum()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(5, 99), max_size=40), min_size=1, max_size=12), st.integers(1, 9), st.integers(1, 60))
def test_pack_keeps_every_token_in_order(tmp_path_factory, documents, seq_len, size):
    """pack() with a tokenizer that reads numbers: the rows are the documents, each with <sep>, up to the last full row."""
    numbers = Tokenizer(models.WordLevel({str(i): i for i in range(100)}, unk_token="1"))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("pack") / "rows"
    old, batches = prepare.seq_len, prepare.batches
    prepare.seq_len, prepare.batches = seq_len, lambda texts: batches(texts, size)  # several, so that they have seams
    texts, ids = [" ".join(map(str, d)) for d in documents], {"cls": 2, "sep": 3, "unk": 1}
    n_rows, _ = prepare.pack(path, numbers, texts, ids, prepare.Counter(), 0, None)
    prepare.seq_len, prepare.batches = old, batches
    expected = [t for d in documents if d for t in [*d, 3]]  # a document without tokens leaves no <sep> either
    assert np.fromfile(path, np.uint16).tolist() == expected[: len(expected) // seq_len * seq_len]
    assert n_rows == len(expected) // seq_len


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXT, max_size=9), st.integers(1, 9))
def test_the_spool_is_read_whatever_the_blocks(tmp_path_factory, texts, block):
    path = tmp_path_factory.mktemp("spool") / "spool"
    path.write_bytes(b"".join(t.encode() + b"\0" for t in texts))
    own, prepare.BLOCK = prepare.BLOCK, block
    try:
        assert list(prepare.read_spool(path, -1)) == texts
    finally:
        prepare.BLOCK = own


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab \n", max_size=200), st.integers(2, 20))
def test_pieces_lose_nothing_and_cut_at_white_space(text, size):
    parts = list(prepare.pieces(text, size))
    assert "".join(parts) == text and all(len(p) <= size for p in parts)
    for a, b in zip(parts, parts[1:]):
        assert b[0] in " \n" or not any(c in " \n" for c in a[1:])


def test_same_seed_same_bytes_and_another_seed_another_order(run):
    for name, seed in (("tiny", 1), ("b", 1), ("c", 2)):
        assert run("prepare.py", *TINY, f"--dataset={name}", f"--seed={seed}")[0] is None
    a, b, c = (bins(n)[2]["sha256"] for n in ("tiny", "b", "c"))
    assert a == b and a["val"] == c["val"] and a["train"] != c["train"]


def test_filter_and_order_leave_validation_alone(run):
    run("prepare.py", *TINY)
    message, output = run("prepare.py", *TINY, "--dataset=b", "--filter_ratio=0.4", "--order=fragment", "--max_rows=50")
    assert message is None and "documents dropped by the filter" in output
    (train, _, a, _), (other, _, b, _) = bins(), bins("b")
    assert a["sha256"]["val"] == b["sha256"]["val"] and a["sha256"]["tokenizer"] == b["sha256"]["tokenizer"]
    assert len(other) == 50 < len(train)


def test_the_filter_drops_by_tokens_per_character(run):
    rng = random.Random(0)
    gibberish = "\n\n".join(" ".join("".join(rng.choices("0123", k=50)) for _ in range(6)) for _ in range(40))
    Path("text.txt").write_text(Path("text.txt").read_text() + "\n\n" + gibberish)
    run("prepare.py", *TINY)
    run("prepare.py", *TINY, "--dataset=b", "--filter_ratio=0.55")
    assert 30 <= bins("b")[2]["counts"]["documents dropped by the filter"] <= 40  # some of them are held out


def test_the_vocabulary_is_made_of_a_sample_of_all_sources(run):
    Path("b.txt").write_text(Path("text.txt").read_text().translate(str.maketrans("bdfg", "1234")))
    for name, n in (("tiny", 10**9), ("b", 20_000)):
        args = [*TINY, "--sources=text.txt,b.txt", f"--dataset={name}", f"--tokenizer_chars={n}"]
        assert run("prepare.py", *args)[0] is None
    assert bins("b")[2]["sha256"]["tokenizer"] != bins()[2]["sha256"]["tokenizer"]
    assert {"b", "1"} <= bins("b")[3].get_vocab().keys()


@pytest.mark.parametrize("order", ["sentence_length", "fragment", "word_length", "unigram", "reverse_unigram"])
def test_orders(run, order):
    """Each order's key, computed here from its definition, goes one way down the file."""
    assert run("prepare.py", *TINY, f"--order={order}")[0] is None
    train, _, meta, tokenizer = bins()
    counts = np.bincount(train.ravel(), minlength=meta["vocab_size"]) + 1
    keys = {
        "sentence_length": lambda r: -np.sum(r == tokenizer.token_to_id(".")),
        "fragment": lambda r: -np.sum(r == 3),
        "word_length": lambda r: sum(
            len(t.removeprefix("##")) + (not t.startswith("##")) for t in map(tokenizer.id_to_token, r)
        ),
        "unigram": lambda r: np.mean(np.log2(counts[r] / counts.sum())),
        "reverse_unigram": lambda r: -np.mean(np.log2(counts[r] / counts.sum())),
    }
    values = np.array([keys[order](r) for r in train])
    assert (np.diff(values) >= -1e-9).all() and len(set(values.round(6))) > 2
    assert run("prepare.py", *TINY, f"--order={order}", "--dataset=cut", "--max_rows=50")[0] is None
    assert (bins("cut")[0] == train[:50]).all()


def test_normaliser_and_round_trip(run):
    lines = ["Café  ``x'' ÉTÉ", "naïve résumé 中 end"] * 200
    Path("text.txt").write_text("\n\n".join(f"{line} {d}" for line, d in zip(lines, sentences(400))))
    run("prepare.py", *TINY)
    tokenizer = bins()[3]
    assert tokenizer.normalizer.normalize_str("Café  ``x'' É中") == 'cafe "x" e'
    text = sentences(1)[0].replace("\n", " ").replace(".", " .")
    assert tokenizer.decode(tokenizer.encode(text).ids).replace(" .", ".") == text.replace(" .", ".")
    run("prepare.py", *TINY, "--dataset=b", "--lowercase=False", "--strip_accents=False", "--ascii_only=False")
    assert bins("b")[3].normalizer.normalize_str("Café 中") == "Café 中"


@pytest.mark.parametrize("to_ascii", [True, False])
def test_ascii_is_encoded_as_the_whole_tokenizer_does(monkeypatch, to_ascii):
    for key, value in {"vocab_size": 80, "ascii_only": to_ascii, "strip_accents": to_ascii}.items():
        monkeypatch.setattr(prepare, key, value)
    words = " ".join(map("".join, itertools.product("ab9é", repeat=4)))
    tokenizer = prepare.train_tokenizer(lambda: iter([words, "é å ª ß 中 - < . , '"] * 9))
    letters = st.text(alphabet="aAbB9 \n\t.,'\"`<>-_éÉåªﬁ\u0301\u00a0ß中", max_size=60)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(letters, max_size=4))
    def check(texts):
        found = [ids.tolist() for _, batch in prepare.encode_ahead(tokenizer, texts) for ids in batch]
        assert found == [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

    check()


def test_transformers_opens_the_tokenizer_and_encodes_alike(tiny_data):
    from transformers import PreTrainedTokenizerFast

    own = bins()[3]
    theirs = PreTrainedTokenizerFast(tokenizer_file="data/tiny/tokenizer.json")
    for text in [*sentences(5), "Ünknown wörds!", ""]:
        assert theirs(text)["input_ids"] == own.encode(text).ids
    assert theirs("bal", "dem")["input_ids"] == own.encode("bal", "dem").ids


def test_special_tokens_in_a_text_are_text(run):
    Path("text.txt").write_text("\n\n".join(d + " <mask> <sep> <pad>" for d in sentences(400)))
    assert run("prepare.py", *TINY)[0] is None
    train, _, meta, _ = bins()
    assert not np.isin(train, [0, 2, 4]).any() and (train == 3).sum() <= 400


def test_the_vocabulary_is_the_same_in_another_process(tiny_data, home):
    process = start("prepare.py", *TINY, "--dataset=b", cwd=home)
    process.communicate()
    assert bins("b")[2]["sha256"] == bins()[2]["sha256"]


def test_rare_characters_leave_room_for_words(run):
    Path("text.txt").write_text("\n\n".join(f"{d} {chr(0x4E00 + i)}" for i, d in enumerate(sentences(400))))
    assert run("prepare.py", *TINY, "--ascii_only=False")[0] is None
    vocab = bins()[3].get_vocab()
    assert len(vocab) == 90 and sum(len(t.removeprefix("##")) > 1 for t in vocab) > 30
    assert bins()[2]["counts"]["unknown tokens"] > 100


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_other_kinds_of_vocabularies(run, home, kind):
    from transformers import PreTrainedTokenizerFast

    Path("text.txt").write_text("\n\n".join(sentences(400, seed=5)))
    args = [*TINY, f"--tokenizer_kind={kind}", "--order=word_length", "--vocab_size=56"]
    message, _ = run("prepare.py", *args)
    assert message is None, message
    train, _, meta, tokenizer = bins()
    assert tokenizer.get_vocab_size() == 56 and meta["special_ids"]["mask"] == 4
    text = sentences(1)[0].replace("\n", " ").replace(".", " .")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(text).ids) < len(text) * 0.6 and meta["counts"].get("unknown tokens", 0) == 0
    theirs = PreTrainedTokenizerFast(tokenizer_file="data/tiny/tokenizer.json")
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    lengths = [sum(len(tokenizer.id_to_token(int(i))) for i in r) for r in train]  # "▁" stands for the space
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    process = start("prepare.py", *args, "--dataset=b", cwd=home)
    process.communicate()
    assert bins("b")[2]["sha256"] == meta["sha256"]
    assert run("prepare.py", *args, "--dataset=c", "--order=sentence_length")[0] is None
    stops = [tokenizer.decode(row.tolist()).count(".") for row in bins("c")[0]]  # BPE has them with the space before them
    assert stops == sorted(stops, reverse=True) and stops[0] > stops[-1]


def test_insert_cls(run):
    run("prepare.py", *TINY, "--insert_cls=True")
    val = bins()[1].ravel()
    assert val[0] == 2 and (val[1:][val[:-1] == 3] == 2).all()


def test_all_local_kinds_of_files(run):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    import zstandard

    parts = np.array_split(sentences(400), 5)
    folder = Path("corpus/deep")
    folder.mkdir(parents=True)
    rows = "".join(json.dumps({"text": d, "meta": {"set": "x"}}) + "\n" for d in parts[1])
    (folder / "a.txt").write_text("\n\n".join(parts[0]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as f:
        f.write(rows)
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(rows.replace("bal", "dem").encode()))
    parquet.write_table(pyarrow.table({"id": range(len(parts[2])), "text": list(parts[2])}), folder / "d.parquet")
    with open(folder / "e.csv", "w", newline="") as f:
        csv.writer(f).writerows([["n", "text"], *([i, d] for i, d in enumerate(parts[3]))])
    (folder / "ignored.md").write_text("not a known kind")
    with gzip.open(folder / "odd[1].csv.gz", "wb") as f:
        f.write((folder / "e.csv").read_bytes().replace(b"bal", b"fal"))
    (folder / "g.parquet.zst").write_bytes(zstandard.compress((folder / "d.parquet").read_bytes()))
    (folder / "up").symlink_to("..")  # a loop
    (folder / "lost.txt").symlink_to("nowhere")
    message, output = run("prepare.py", *TINY, "--sources=corpus")
    assert message is None, message
    assert bins()[2]["counts"]["documents"] == len(parts[0]) + 2 * sum(map(len, parts[1:4]))
    assert run("prepare.py", *TINY, "--dataset=b", "--sources=corpus/**/*.jsonl*")[0] is None
    assert bins("b")[2]["counts"]["documents"] == 2 * len(parts[1])
    (folder / "other.csv").write_text("id,title\n" + "1,bal\n" * 1200)  # no texts, and read first
    seed = next(s for s in range(1000) if sources.local_files("corpus", s)[0].endswith("other.csv"))
    message, _ = run("prepare.py", *TINY, "--dataset=c", "--sources=corpus", f"--seed={seed}")
    assert message is None, message
    counts = bins("c")[2]["counts"]
    assert counts["rows without text"] == 1200 and counts["documents"] == bins()[2]["counts"]["documents"]


@pytest.mark.parametrize("kind, documents", [("blank_line", 400), ("line", 2000), ("file", 4)])
def test_what_a_document_of_a_text_file_is(run, kind, documents):
    for i, part in enumerate(np.array_split(sentences(400), 4)):
        Path(f"part{i}.txt").write_text("\n\n".join(part))
    message, _ = run("prepare.py", *TINY, "--sources=part*.txt", f"--txt_document={kind}", "--val_rows=4")
    assert message is None or kind == "file" and "too few" in message, message
    if kind == "file":
        assert sum(1 for p in range(4) for _ in documents_of(f"part{p}.txt", kind)) == 4
    else:
        lines = sum(bool(line.strip()) for i in range(4) for line in Path(f"part{i}.txt").read_text().splitlines())
        assert bins()[2]["counts"]["documents"] == (lines if kind == "line" else documents)


def documents_of(path, kind):
    return sources.read_documents({"files": path}, 0, kind, prepare.Counter())


def test_sources_in_proportion(run):
    """One source of three times the weight: three times the characters, until one of them ends."""
    Path("a.txt").write_text("\n\n".join("bal " + d for d in sentences(300)))
    Path("b.jsonl").write_text("\n".join(json.dumps({"body": d.upper()}) for d in sentences(300, seed=1)))
    mix = [{"files": "a.txt", "weight": 3}, {"files": "b.jsonl", "column": "body", "weight": 1.0}]
    message, output = run("prepare.py", *TINY, f"--sources={mix!r}", "--lowercase=False", "--vocab_size=120")
    assert message is None and "source 1 of 2 has ended" in output, message
    size = {True: 0, False: 0}
    for text, _ in zip(Path("a.txt").read_text().split("\n\n"), range(400)):
        size[False] += len(text)
    assert bins()[2]["counts"]["characters"] == pytest.approx(size[False] * 4 / 3, rel=0.02)


def test_where_and_nested_columns(run):
    """The Pile's natural-text subset is a filter of this kind, on meta.pile_set_name."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ["Books3", "Github", "PubMed"]
    rows = [{"text": d, "meta": {"pile_set_name": names[i % 3]}} for i, d in enumerate(sentences(600))]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    where = {"meta.pile_set_name": ["Books3", "PubMed"]}
    sources = [{"files": "a.jsonl"}, {"path": "parquet", "data_files": "a.parquet"}, {"files": "a.parquet"}]
    for i, source in enumerate(sources):
        message, _ = run("prepare.py", *TINY, f"--dataset=w{i}", f"--sources={[source | {'where': where}]!r}")
        assert message is None, message
        counts = bins(f"w{i}")[2]["counts"]
        assert counts["documents"] == 400 and counts["rows that `where` leaves out"] == 200


def test_tokenized_rows_go_straight_into_bins(run, tiny_data):
    """The schema of the paper's own data on the hub: rows of input_ids, with their tokenizer.json."""
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


def repeated_by_definition(tokens, n, sep):
    mark, seen = [False] * len(tokens), {}
    for i in range(len(tokens) - n + 1):
        run = tuple(tokens[i : i + n])
        if sep in run:
            continue
        if i >= seen.setdefault(run, i) + n:
            mark[i : i + n] = [True] * n
    return mark


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 7), st.booleans())
def test_repeats_against_their_definition(tokens, n, collide):
    """With a hash that is right, and with one that is the same for every run; in blocks of 7."""
    own, chunk, rows.CHUNK = rows.window_hashes, rows.CHUNK, 7
    if collide:
        rows.window_hashes = lambda tokens, n: np.zeros(len(tokens) - n + 1, np.uint64)
    try:
        mark = rows.repeated(np.array(tokens, np.uint16), n, 3)
    finally:
        rows.window_hashes, rows.CHUNK = own, chunk
    assert mark.tolist() == repeated_by_definition(tokens, n, 3) or len(tokens) <= n


def test_window_hashes_differ_where_windows_do():
    tokens = np.random.default_rng(0).integers(0, 3, 3000).astype(np.uint16)
    for n in (1, 2, 3, 5, 8, 18):
        windows = {}
        for i, h in enumerate(rows.window_hashes(tokens, n).tolist()):
            assert windows.setdefault(h, tuple(tokens[i : i + n])) == tuple(tokens[i : i + n])
        assert len(windows) == len({tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)})


def test_deduplication_of_a_corpus(run):
    paragraph = sentences(1, seed=99)[0] * 3
    documents = [f"{d}\n{paragraph}" if i % 4 == 0 else d for i, d in enumerate(sentences(400))]
    Path("text.txt").write_text("\n\n".join(documents))
    assert run("prepare.py", *TINY)[0] is None
    message, output = run("prepare.py", *TINY, "--dataset=b", "--dedup_tokens=24")
    assert message is None and "tokens dropped as repeats" in output, message
    (train, _, a, tokenizer), (less, _, b, _) = bins(), bins("b")
    assert a["sha256"]["val"] == b["sha256"]["val"]
    n = len(tokenizer.encode(paragraph, add_special_tokens=False).ids)
    dropped = b["counts"]["tokens dropped as repeats"]
    assert 0.6 * 100 * n < dropped < 1.6 * 100 * n and len(train) - len(less) == pytest.approx(dropped / 32, abs=2)


def test_what_does_not_fit_is_refused_first(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rows, "available_memory", lambda: 1000)
        message, _ = run("prepare.py", *TINY, "--dedup_tokens=24")
        assert "dedup_tokens needs about" in message and not Path("data/tiny").exists()
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert "0.0 GB of disk are needed" in run("prepare.py", *TINY)[0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 50), st.integers(2, 400), st.randoms())
def test_rows_are_written_in_their_order_whatever_the_buckets(tmp_path_factory, n, width, keep, bucket, rng):
    table = np.arange(n * width, dtype=np.uint16).reshape(n, width)
    permutation = np.array(rng.sample(range(n), n)[: keep or None])
    path = tmp_path_factory.mktemp("order") / "train.bin"
    own, rows.BUCKET, chunk, rows.CHUNK = rows.BUCKET, bucket, rows.CHUNK, 7
    sha, counts = rows.write_ordered(table, permutation, path)
    rows.BUCKET, rows.CHUNK = own, chunk
    assert (np.fromfile(path, np.uint16).reshape(-1, width) == table[permutation]).all()
    assert sha == hashlib.sha256(path.read_bytes()).hexdigest() and counts.sum() == table[permutation].size
    assert [p.name for p in path.parent.iterdir()] == ["train.bin"]


def test_ties_are_shuffled():
    table = np.repeat(np.array([[1], [0], [2]], np.uint16), 500, axis=0)
    order = rows.training_order(table, np.array([-1.5, 0.0, 2.0]), 0)
    assert (np.diff(table[order, 0].astype(int)) >= 0).all() and sorted(order) == list(range(1500))
    for part in np.split(order, 3):
        assert abs(np.corrcoef(part, range(500))[0, 1]) < 0.15


def test_peek_and_overlap(run, tiny_data):
    tokenizer = bins()[3]
    slices = [r[4:20].tolist() for r in bins()[0]]
    ids = next(s for s in slices if tokenizer.encode(tokenizer.decode(s), add_special_tokens=False).ids == s)
    row = tokenizer.decode(ids)
    Path("glue/RTE").mkdir(parents=True)
    other = "gol " * 12
    Path("glue/RTE/dev.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n0\t{row}\t{other}\tentailment\n")
    message, output = run("prepare.py", *TINY, "--peek=3", "--overlap=glue")
    assert message is None and output.count(f" of {len(slices)}: ") == 3, output
    assert "RTE/dev.tsv: 1 of 2 sentences of 8 tokens or more are whole in a row of data/tiny" in output
    assert "holds no GLUE" in run("prepare.py", *TINY, "--overlap=data")[0]


def test_the_summary(tiny_data):
    for part in ("share of <unk>: 0.0", "longest tokens: ", "most frequent: . ", "row 0 of", "characters per token: "):
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
    assert process.returncode == 1 and "nothing was kept" in process.stderr.splitlines()[-1], process.stderr
    assert not list(Path("data").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_without_permission(run):
    Path("closed/in").mkdir(parents=True)
    os.chmod("closed/in", 0)
    assert "closed/in cannot be read: Permission denied" in run("prepare.py", *TINY, "--sources=closed")[0]


def test_a_torn_zst_is_noticed(run):
    import zstandard

    whole = zstandard.compress("\n\n".join(sentences(300, seed=1)).encode())
    Path("a.txt.zst").write_bytes(whole + whole)  # two frames are one file
    assert len(list(documents_of("a.txt.zst", "blank_line"))) == 599  # the last and the first document are one
    Path("torn.txt.zst").write_bytes(whole[:-40])
    Path("noise.txt.zst").write_bytes(whole[:2000] + b"x" * 2000)
    Path("torn.parquet").write_bytes(b"PAR1 and no more")
    message, output = run("prepare.py", *TINY, "--sources=text.txt,torn.txt.zst,noise.txt.zst,torn.parquet")
    assert message is None and bins()[2]["counts"]["truncated files"] == 3 and "torn.txt.zst is truncated" in output


def test_bad_rows_are_counted_and_the_rest_is_used(run):
    good = [json.dumps({"text": d}) for d in sentences(400)]
    bad = [
        "{not json",
        "null",
        "[" * 100_000,
        json.dumps({"text": None}),
        json.dumps({"text": 3}),
        json.dumps({"text": " \n"}),
        json.dumps({"text": "\ud800 bal"}),
    ]
    Path("a.jsonl").write_bytes("\n".join(good + bad).encode() + b'\n{"text": "bal \xff dem \\u0000"}\n')
    Path("b.jsonl").write_text("")
    Path("c.txt").write_bytes(b"\xef\xbb\xbfbal dem\r\nfal\r\n\r\ngol\r\n")  # a byte-order mark, CRLF: two documents
    with gzip.open("whole.txt.gz", "wt") as f:
        f.write("\n\n".join(sentences(300, seed=1)))
    Path("torn.txt.gz").write_bytes(Path("whole.txt.gz").read_bytes()[:-400])
    whole = "".join(text for text, _ in documents_of("whole.txt.gz", "file"))
    (torn,) = (text for text, _ in documents_of("torn.txt.gz", "file"))
    assert whole.startswith(torn) and len(torn) > 0.9 * len(whole)
    message, output = run("prepare.py", *TINY, "--sources=a.jsonl,b.jsonl,c.txt,torn.txt.gz")
    assert message is None, message
    counts = bins()[2]["counts"]
    assert counts["rows that are not JSON"] == 2 and counts["rows without text"] == 3 and counts["empty documents"] == 1
    assert counts["documents with broken UTF-8"] == 1 and counts["truncated files"] == 1
    assert counts["documents"] > 400 + 2 + 2 + 100 and "torn.txt.gz is truncated" in output


def test_one_long_line_is_cut_and_max_chars_stops(run):
    Path("long.txt").write_text("bal dem fal gol. " * 150_000)
    message, _ = run("prepare.py", *TINY, "--sources=text.txt,long.txt")
    assert message is None, message
    counts = bins()[2]["counts"]
    assert counts["documents"] == 400 + 3 and counts["characters"] > 2_500_000
    message, _ = run("prepare.py", *TINY, "--dataset=b", "--max_chars=50_000")
    assert message is None, message
    assert 50_000 <= bins("b")[2]["counts"]["characters"] < 52_000


def test_a_given_tokenizer_and_its_special_tokens(run):
    run("prepare.py", *TINY)
    text = Path("data/tiny/tokenizer.json").read_text()
    for name in ("pad", "unk", "cls", "sep", "mask"):
        text = text.replace(f"<{name}>", f"[{name.upper()}]")
    data = json.loads(text)
    vocab = data["model"]["vocab"]
    moved = {"[MASK]": vocab["."], ".": vocab["[MASK]"], "[SEP]": vocab["[PAD]"], "[PAD]": vocab["[SEP]"]}
    vocab |= moved
    for token in data["added_tokens"]:
        token["id"] = vocab[token["content"]]
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    Path("bert.json").write_text(json.dumps(data))
    message, _ = run("prepare.py", *TINY, "--dataset=b", "--tokenizer_file=bert.json")
    assert message is None, message
    expected = {"pad": 3, "unk": 1, "cls": 2, "sep": 0, "mask": moved["[MASK]"]}
    assert bins("b")[2]["special_ids"] == expected
    there = np.arange(90)
    there[[4, 3, 0, moved["[MASK]"]]] = [moved["[MASK]"], 0, 3, 4]
    assert (bins("b")[0] == there[bins()[0]]).all()
    message, _ = run("prepare.py", *TINY, "--dataset=d", f"--tokenizer_file={Path('bert.json').resolve()}")
    assert message is None and bins("d")[2]["sha256"] == bins("b")[2]["sha256"]
    Path("bert.json").write_text(json.dumps(data).replace("[MASK]", "[OTHER]"))
    message, _ = run("prepare.py", *TINY, "--dataset=c", "--tokenizer_file=bert.json")
    assert "neither <mask> nor [MASK]" in message


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--vocab_size=5000"], "too small for vocab_size = 5000"),
        (["--sources=cyrillic.txt"], "or add text; ascii_only=True drops all other scripts"),
        (["--sources=empty.txt"], "hold no text"),
        (["--sources=array.json"], "hold no text; rows without text: 1"),
        (["--sources=[{'files': 'text.jsonl', 'where': {'a.b': ['x']}}]"], "no text; rows that `where` leaves out: 1"),
        (["--sources=[1]"], "the source 1 is neither"),
        (["--sources=[{'files': ['a']}]"], "is neither a path nor a dict"),
        (["--sources=[{'files': 'text.txt', 'wieght': 3}]"], "has no 'wieght'"),
        (["--sources=[{'files': 'text.txt', 'weight': 0}]"], "the weight 0 of a source"),
        (["--sources=[{'files': 'text.txt', 'where': {'a': 'b'}}]"], "no dict of column: [allowed values]"),
        (["--tokenizer_file=config/none/tokenizer.json"], "cannot be read"),
        (["--dataset=.."], "no plain name"),
        (["--order=fragment", "--insert_sep=False"], "does not tell the rows apart"),
        (["--val_rows=5000"], "too few to hold out val_rows = 5000"),
        (["--sources=nothing.txt"], "'nothing.txt' is no file, folder or glob"),
        (["--sources={'path': 'wikimedia/wikipedia', 'name': '20231101.en'}"], "cannot read wikimedia/wikipedia"),
        (["--sources=columns.jsonl"], "no column 'text'; its columns: body, id"),
        (["--sources=columns.parquet"], "no column 'text'; its columns: body"),
        (["--sources=columns.csv"], "no column 'text'; its columns: a, b, None"),
        (["--sources=[{'files': 'columns.csv', 'column': ['a']}]"], "the column ['a'] of a source is no name"),
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
    Path("empty.txt").write_text("\n\n \n")
    Path("cyrillic.txt").write_text("\n\n".join("бал дем. " * (i + 1) for i in range(400)))
    Path("array.json").write_text('[{"text": "bal"}]')
    Path("text.jsonl").write_text('{"text": "bal"}\n')
    message, _ = run("prepare.py", *TINY, *args)
    assert expected in str(message) and "\n" not in message
    assert not list(Path(".").glob("data/*"))


def test_prepared_data_is_kept_and_never_mixed_up(run, tiny_data):
    before = Path("data/tiny/train.bin").stat().st_mtime_ns
    message, output = run("prepare.py", *TINY)
    assert message is None and "already prepared" in output
    message, _ = run("prepare.py", *TINY, "--vocab_size=80")
    assert "vocab_size was 90, now 80" in message and Path("data/tiny/train.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("phase", ["spool", "tokenizer.json", "unordered", "train.bin"])
def test_killed_in_any_phase_it_starts_anew(home, phase):
    """kill -9 as soon as a phase's file appears: nothing half-written under the final name, and the next run is whole."""
    Path("text.txt").write_text("\n\n".join(sentences(3000)))
    process = start("prepare.py", *TINY, cwd=home)
    while not Path("data/tiny.tmp", phase).exists() and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    _, error = process.communicate()
    assert process.returncode == -9 or phase == "train.bin", error  # the last kill may come too late
    assert Path("data/tiny").exists() == Path("data/tiny/meta.json").exists()
    process = start("prepare.py", *TINY, cwd=home)
    _, error = process.communicate()
    assert process.returncode == 0 and not Path("data/tiny.tmp").exists(), error
    train, val, meta, _ = bins()
    assert meta["sha256"]["train"] == hashlib.sha256(train.tobytes()).hexdigest()


def test_prose_of_docstrings():
    doc = """Compute the mean of the values along the given axis of the array.

    Parameters
    ----------
    axis : int, optional
        The axis along which the mean is computed, or all of them if this is not given.
    Args:
        x (Tensor): the input that is to be averaged, and it can be of any shape
            and of any type that is a number.

    Examples
    --------
    >>> mean([1, 2, 3, 4, 5, 6, 7, 8, 9])
    the output of this and that is not to be in the text

    For example::

        this is a literal block and it is not to be in the text

    The :func:`sum` of the elements is divided by the ``number`` of the elements.
    1 2 3 4 5 6 7 8 9 10 11 12
    """
    import inspect

    assert prose(inspect.cleandoc(doc)) == [
        "Compute the mean of the values along the given axis of the array.",
        "The axis along which the mean is computed, or all of them if this is not given.",
        "the input that is to be averaged, and it can be of any shape and of any type that is a number.",
        "The sum of the elements is divided by the number of the elements. 1 2 3 4 5 6 7 8 9 10 11 12",
    ]


def test_docs_source_makes_tasks_from_held_out_files(run, monkeypatch):
    """With three packages in place of thirty: tasks are well-formed, and none of their texts is in a training row."""
    import importlib.metadata

    import package_docs

    found = {n: importlib.metadata.distribution(n) for n in ("networkx", "fsspec", "mpmath")}
    monkeypatch.setattr(package_docs, "required_packages", lambda: found)
    monkeypatch.setattr(package_docs, "TASK_CHARS", 60_000)
    message, _ = run("prepare.py", *TINY, "--sources=docs", "--vocab_size=2000")
    assert message is None, message
    train, _, meta, tokenizer = bins()
    rows = {
        part: list(csv.reader(open(f"data/tiny/tasks/docs_next/{part}.tsv"), delimiter="\t", quoting=3))
        for part in ("train", "dev")
    }
    assert rows["train"][0] == ["text_a", "text_b", "label"] and {r[2] for r in rows["dev"][1:]} == {"next", "other"}
    assert not {r[0] for r in rows["train"]} & {r[0] for r in rows["dev"][1:]}
    in_train = {tuple(w) for r in train for w in np.lib.stride_tricks.sliding_window_view(r, 12)}
    texts = [tokenizer.encode(r[0], add_special_tokens=False).ids for r in rows["train"][1:]]
    hits = [tuple(t[i : i + 12]) in in_train for t in texts for i in range(0, len(t) - 12, 12)]
    assert len(hits) > 100 and np.mean(hits) < 0.1  # set phrases of licences apart
    labels = {line.split("\t")[1] for line in Path("data/tiny/tasks/docs_package/train.tsv").read_text().splitlines()[1:]}
    assert labels == set(found)
    weighted = "--sources=[{'files': 'docs', 'weight': 2}]"
    assert run("prepare.py", *TINY, weighted, "--vocab_size=2000", "--dataset=weighted")[0] is None
    one, other = (sorted(p.read_bytes() for p in Path("data", name, "tasks").glob("*/*")) for name in ("tiny", "weighted"))
    assert one == other and len(one) == 4
