"""Tests of nanocram/sources.py: all kinds of files, mixtures, and bad input."""

import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, sentences
from test_prepare import bins

from nanocram import sources


def documents_of(path, kind):
    return sources.read_documents({"files": path}, 0, kind, Counter())


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
    parquet.write_table(
        pyarrow.table({"id": range(len(parts[2])), "text": list(parts[2])}), folder / "d.parquet"
    )
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
    assert (
        counts["rows without text"] == 1200
        and counts["documents"] == bins()[2]["counts"]["documents"]
    )


@pytest.mark.parametrize("kind, documents", [("blank_line", 400), ("line", 2000), ("file", 4)])
def test_what_a_document_of_a_text_file_is(run, kind, documents):
    for i, part in enumerate(np.array_split(sentences(400), 4)):
        Path(f"part{i}.txt").write_text("\n\n".join(part))
    message, _ = run(
        "prepare.py", *TINY, "--sources=part*.txt", f"--txt_document={kind}", "--val_rows=4"
    )
    assert message is None or kind == "file" and "too few" in message, message
    if kind == "file":
        assert sum(1 for p in range(4) for _ in documents_of(f"part{p}.txt", kind)) == 4
    else:
        lines = sum(
            bool(line.strip())
            for i in range(4)
            for line in Path(f"part{i}.txt").read_text().splitlines()
        )
        assert bins()[2]["counts"]["documents"] == (lines if kind == "line" else documents)


def test_sources_in_proportion(run):
    """One source of three times the weight: three times the characters, until one of them ends."""
    Path("a.txt").write_text("\n\n".join("bal " + d for d in sentences(300)))
    Path("b.jsonl").write_text(
        "\n".join(json.dumps({"body": d.upper()}) for d in sentences(300, seed=1))
    )
    mix = [{"files": "a.txt", "weight": 3}, {"files": "b.jsonl", "column": "body", "weight": 1.0}]
    message, output = run(
        "prepare.py", *TINY, f"--sources={mix!r}", "--lowercase=False", "--vocab_size=120"
    )
    assert message is None and "source 1 of 2 has ended" in output, message
    size = {True: 0, False: 0}
    for text, _ in zip(Path("a.txt").read_text().split("\n\n"), range(400)):
        size[False] += len(text)
    assert bins()[2]["counts"]["characters"] == pytest.approx(size[False] * 4 / 3, rel=0.02)


def test_where_and_nested_columns(run):
    """The Pile's natural-text subset is a filter of this kind, on meta.pile_set_name."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ["Books3", "Github", "PubMed"]
    rows = [
        {"text": d, "meta": {"pile_set_name": names[i % 3]}} for i, d in enumerate(sentences(600))
    ]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    where = {"meta.pile_set_name": ["Books3", "PubMed"]}
    sources = [
        {"files": "a.jsonl"},
        {"path": "parquet", "data_files": "a.parquet"},
        {"files": "a.parquet"},
    ]
    for i, source in enumerate(sources):
        message, _ = run(
            "prepare.py", *TINY, f"--dataset=w{i}", f"--sources={[source | {'where': where}]!r}"
        )
        assert message is None, message
        counts = bins(f"w{i}")[2]["counts"]
        assert counts["documents"] == 400 and counts["rows that `where` leaves out"] == 200


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_without_permission(run):
    Path("closed/in").mkdir(parents=True)
    os.chmod("closed/in", 0)
    assert (
        "closed/in cannot be read: Permission denied"
        in run("prepare.py", *TINY, "--sources=closed")[0]
    )


def test_a_torn_zst_is_noticed(run):
    import zstandard

    whole = zstandard.compress("\n\n".join(sentences(300, seed=1)).encode())
    Path("a.txt.zst").write_bytes(whole + whole)  # two frames are one file
    assert (
        len(list(documents_of("a.txt.zst", "blank_line"))) == 599
    )  # the last and the first document are one
    Path("torn.txt.zst").write_bytes(whole[:-40])
    Path("noise.txt.zst").write_bytes(whole[:2000] + b"x" * 2000)
    Path("torn.parquet").write_bytes(b"PAR1 and no more")
    message, output = run(
        "prepare.py", *TINY, "--sources=text.txt,torn.txt.zst,noise.txt.zst,torn.parquet"
    )
    assert (
        message is None
        and bins()[2]["counts"]["truncated files"] == 3
        and "torn.txt.zst is truncated" in output
    )


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
    Path("a.jsonl").write_bytes(
        "\n".join(good + bad).encode() + b'\n{"text": "bal \xff dem \\u0000"}\n'
    )
    Path("b.jsonl").write_text("")
    Path("c.txt").write_bytes(
        b"\xef\xbb\xbfbal dem\r\nfal\r\n\r\ngol\r\n"
    )  # a byte-order mark, CRLF: two documents
    with gzip.open("whole.txt.gz", "wt") as f:
        f.write("\n\n".join(sentences(300, seed=1)))
    Path("torn.txt.gz").write_bytes(Path("whole.txt.gz").read_bytes()[:-400])
    whole = "".join(text for text, _ in documents_of("whole.txt.gz", "file"))
    (torn,) = (text for text, _ in documents_of("torn.txt.gz", "file"))
    assert whole.startswith(torn) and len(torn) > 0.9 * len(whole)
    message, output = run("prepare.py", *TINY, "--sources=a.jsonl,b.jsonl,c.txt,torn.txt.gz")
    assert message is None, message
    counts = bins()[2]["counts"]
    assert (
        counts["rows that are not JSON"] == 2
        and counts["rows without text"] == 3
        and counts["empty documents"] == 1
    )
    assert counts["documents with broken UTF-8"] == 1 and counts["truncated files"] == 1
    assert counts["documents"] > 400 + 2 + 2 + 100 and "torn.txt.gz is truncated" in output


def test_one_long_line_is_cut_and_max_chars_stops(run):
    Path("long.txt").write_text("bal dem fal gol. " * 150_000)
    message, _ = run("prepare.py", *TINY, "--sources=text.txt,long.txt")
    assert message is None, message
    counts = bins()[2]["counts"]
    assert counts["documents"] == 400 + 128 and counts["characters"] > 2_500_000
    message, _ = run("prepare.py", *TINY, "--dataset=b", "--max_chars=50_000")
    assert message is None, message
    assert 50_000 <= bins("b")[2]["counts"]["characters"] < 52_000
