import csv
import gzip
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, sentences, start
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import prepare
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
@given(st.lists(st.lists(st.integers(5, 99), max_size=40), min_size=1, max_size=12), st.integers(1, 9))
def test_pack_keeps_every_token_in_order(tmp_path_factory, documents, seq_len):
    """pack() with a tokenizer that reads numbers: the rows are the documents, each with <sep>, up to the last full row."""

    class Numbers:
        def encode_batch_fast(self, texts, add_special_tokens):
            return [type("E", (), {"ids": [int(w) for w in t.split()]}) for t in texts]

    path = tmp_path_factory.mktemp("pack") / "rows"
    old, prepare.seq_len = prepare.seq_len, seq_len
    texts, ids = [" ".join(map(str, d)) for d in documents], {"cls": 2, "sep": 3, "unk": 1}
    n_rows = prepare.pack(path, Numbers(), texts, ids, prepare.Counter(), 0, None)
    prepare.seq_len = old
    expected = [t for d in documents if d for t in [*d, 3]]  # a document without tokens leaves no <sep> either
    assert np.fromfile(path, np.uint16).tolist() == expected[: len(expected) // seq_len * seq_len]
    assert n_rows == len(expected) // seq_len


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
    message, output = run("prepare.py", *TINY, "--sources=corpus")
    assert message is None, message
    assert bins()[2]["counts"]["documents"] == sum(map(len, parts[:4])) + len(parts[1])
    assert run("prepare.py", *TINY, "--dataset=b", "--sources=corpus/**/*.jsonl*")[0] is None
    assert bins("b")[2]["counts"]["documents"] == 2 * len(parts[1])


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
    Path("bert.json").write_text(json.dumps(data).replace("[MASK]", "[OTHER]"))
    message, _ = run("prepare.py", *TINY, "--dataset=c", "--tokenizer_file=bert.json")
    assert "neither <mask> nor [MASK]" in message


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--vocab_size=5000"], "too small for vocab_size = 5000"),
        (["--sources=empty.txt"], "hold no text"),
        (["--sources=[1]"], "the source 1 is neither"),
        (["--dataset=.."], "no plain name"),
        (["--order=fragment", "--insert_sep=False"], "does not tell the rows apart"),
        (["--val_rows=5000"], "too few to hold out val_rows = 5000"),
        (["--sources=nothing.txt"], "'nothing.txt' is no file, folder or glob"),
        (["--sources={'path': 'wikimedia/wikipedia', 'name': '20231101.en'}"], "cannot read wikimedia/wikipedia"),
        (["--sources=columns.jsonl"], "no column 'text'; its columns: body, id"),
        (["--sources=columns.parquet"], "no column 'text'; its columns: body"),
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
    Path("odd.xml").write_text("<a/>")
    Path("empty.txt").write_text("\n\n \n")
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
        pass
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
