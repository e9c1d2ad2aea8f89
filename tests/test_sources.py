"""Tests of nanocram/sources.py: all kinds of files, mixtures, and bad input."""

import csv
import errno
import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, sentences
from test_prepare import bins

from nanocram import sources
from nanocram.configurator import resolve
from nanocram.faults import Fault


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


def test_a_folder_without_permission(run, monkeypatch):
    """It is refused by name, and a file is left out and counted. Emulated, for root reads all."""
    Path("closed/in").mkdir(parents=True)
    Path("closed.txt").write_text("bal")
    scandir = os.scandir
    open_bytes = sources.open_bytes

    def refuse(path, function):
        if Path(path).name in ("in", "closed.txt"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return function(path)

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path, scandir))
    monkeypatch.setattr(sources, "open_bytes", lambda path: refuse(path, open_bytes))
    message, _ = run("prepare.py", *TINY, "--sources=closed")
    assert "closed/in cannot be read: Permission denied" in message
    counts = Counter()
    assert len(texts_of("*.txt", counts)) == 400
    assert counts["files that cannot be read"] == 1


def test_odd_names_and_kinds_of_files(run):
    """A pipe, which never ends, and a link to itself are no files; names may have line ends."""
    folder = Path("new\nline")
    folder.mkdir()
    (folder / "a\nb.txt").write_text(Path("text.txt").read_text())
    os.mkfifo(folder / "pipe.txt")
    (folder / "self.txt").symlink_to("self.txt")
    assert len(texts_of(str(folder), Counter())) == 400
    (folder / "c.md").write_text("bal")
    message, _ = run("prepare.py", *TINY, "--sources=new\nline/*.md")
    assert message == "prepare.py: new line/c.md is of an unknown kind" + message.split("kind")[1]
    assert "\n" not in message


def test_a_file_that_grows_while_it_is_read(run, monkeypatch):
    """What is there at its end is used, and the text counts as changed afterwards."""
    documents = sources.txt_documents
    rest = "\n\n".join(sentences(100, seed=3))

    def grow(lines, kind):
        with open("text.txt", "a") as f:
            f.write("\n\n" + rest)
        return documents(lines, kind)

    monkeypatch.setattr(sources, "txt_documents", grow)
    assert run("prepare.py", *TINY)[0] is None
    assert bins()[2]["counts"]["documents"] == 500
    monkeypatch.setattr(sources, "txt_documents", documents)
    assert "though its sources have changed" in run("prepare.py", *TINY)[1]


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


def texts_of(source, counts, **keys):
    entry = {"files": source, **keys}
    return [text for text, _ in sources.read_documents(entry, 0, "blank_line", counts)]


def test_parquet_as_it_is_found(tmp_path, capsys):
    """Bytes are text, other columns are not read, and a damaged page costs only its part."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    documents = sentences(4000)
    dates = pyarrow.array([0] * 3999 + [300_000_000_000], pyarrow.timestamp("s"))  # no datetime
    table = {"text": [d.encode() for d in documents], "date": dates}
    parquet.write_table(
        pyarrow.table(table), tmp_path / "a.parquet", row_group_size=1000, use_dictionary=False
    )
    counts = Counter()
    assert texts_of(str(tmp_path / "a.parquet"), counts) == documents and not counts
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = b"\xff" * 4000
    (tmp_path / "b.parquet").write_bytes(data)
    found = texts_of(str(tmp_path / "b.parquet"), counts)
    assert 2000 <= len(found) < 4000 and set(found) < set(documents)
    assert counts["rows in damaged parts"] == 4000 - len(found)
    assert "b.parquet are left out" in capsys.readouterr().out


def test_json_arrays_utf_16_and_files_without_a_suffix(tmp_path, capsys):
    documents = sentences(30)
    rows = [{"text": d} for d in documents]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "c.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "d.txt").write_bytes("\n\n".join(documents).encode("utf-16"))
    (tmp_path / "wiki_00").write_text("bal")
    counts = Counter()
    found = Counter(text.strip() for text in texts_of(str(tmp_path), counts))
    assert found == Counter(documents * 4)
    assert counts == {"files left out for their suffix": 1, "documents of .txt files": 30}
    output = capsys.readouterr().out
    assert "wiki_00" in output and "d.txt is in UTF-16" in output


def test_utf_16_without_a_mark(tmp_path, capsys):
    documents = ["bal démé.", "fal gol: ж"] * 200
    for order in ("le", "be"):
        (tmp_path / f"{order}.txt").write_bytes("\n\n".join(documents).encode(f"utf-16-{order}"))
        found = texts_of(str(tmp_path / f"{order}.txt"), Counter())
        assert [text.strip() for text in found] == documents
    assert "be.txt is in UTF-16" in capsys.readouterr().out
    binary = b"\0\0\1\0" * 200
    assert sources.encoding_of(binary) == sources.encoding_of(b"") == "utf-8-sig"


@pytest.mark.parametrize("size", [1, 7, 50, 10**6])
def test_an_array_of_json_is_read_by_parts(tmp_path, monkeypatch, size):
    """Whatever the parts; the elements before a tear are used, and memory has a bound."""
    monkeypatch.setattr(sources, "MAX_LINE", size)
    rows = [{"text": f"{d} ] \\ [", "n": [i, {}]} for i, d in enumerate(sentences(20))]
    whole = " [" + json.dumps(rows, indent=1)[1:]
    counts = Counter()
    for text, n in ((whole, 20), (whole[:-300], 19), ("[" + " " * 3000 + "]", 0), ("[]", 0)):
        (tmp_path / "a.json").write_text(text)
        found = texts_of(str(tmp_path / "a.json"), counts)
        assert found == [row["text"] for row in rows][: len(found)] and n - 2 <= len(found) <= n
    assert counts == {"arrays that are not JSON to their end": 1}
    monkeypatch.setattr(sources, "MAX_JSON", 500)
    (tmp_path / "b.json").write_text('[{"text": "bal"},' + "x" * 10_000 + whole[2:])
    assert texts_of(str(tmp_path / "b.json"), counts) == ["bal"]


def test_csv_without_a_header_and_with_a_stray_quote(tmp_path, capsys):
    documents = sentences(400)
    with open(tmp_path / "a.csv", "w", newline="") as f:
        csv.writer(f).writerows(enumerate(documents))
    with pytest.raises(Fault) as fault:
        texts_of(str(tmp_path / "a.csv"), Counter())
    message = str(fault.value)
    assert len(message) < 300 and "\n" not in message and "needs a header" in message
    lines = ["text,n", *(f"{' '.join(d.split())},1" for d in documents * 6)]
    lines[100] = '"' + lines[100]
    (tmp_path / "b.csv").write_text("\n".join(lines))
    counts = Counter()
    assert len(texts_of(str(tmp_path / "b.csv"), counts)) == 100
    assert counts["csv rows of more than 1,000 lines"] == 1
    assert "b.csv begins in line 101" in capsys.readouterr().out


def test_lines_of_json_that_exceed_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_JSON", 500)
    lines = [json.dumps({"text": text}) for text in ("bal", "x" * 5000, "dem", "y" * 487, "gol")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    counts = Counter()
    assert texts_of(str(tmp_path / "a.jsonl"), counts) == ["bal", "dem", "y" * 487, "gol"]
    assert counts == {"rows that are too long": 1}


def test_a_bomb_of_zst_is_read_in_small_parts(tmp_path):
    import zstandard

    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"a" * 300_000_000))
    with sources.open_bytes(str(tmp_path / "a.txt.zst")) as f:
        f.read(1)
        assert len(f.raw.output) <= sources.INPUT // 4 * 131_072


class Stream:
    """Rows of a data set in parts, with the faults of a bad day."""

    def __init__(self, parts, faults=None, at=0):
        self.parts, self.faults, self.at = parts, faults or {}, at
        self.num_shards = len(parts)

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        return Stream([self.parts[index]], self.faults)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def __iter__(self):
        (rows,) = self.parts
        for row in rows[self.at :]:
            if self.faults.get(row):
                raise self.faults[row].pop() if len(self.faults[row]) > 1 else self.faults[row][0]
            self.at += 1
            yield {"text": row}


def hub_texts(monkeypatch, stream):
    import datasets

    waited, counts = [], Counter()
    monkeypatch.setattr(datasets, "load_dataset", lambda **keys: stream)
    monkeypatch.setattr(sources.time, "sleep", waited.append)
    rows = sources.read_documents({"path": "a/b"}, 0, "line", counts)
    return [text for text, _ in rows], waited, counts


def test_the_hub_is_asked_again_and_bad_parts_are_skipped(monkeypatch, capsys):
    parts = [[f"{p}-{i}" for i in range(3000)] for p in range(4)]
    every = {row for part in parts for row in part}
    # three errors of the network, and then it works; a list that is used up is no fault
    once = Stream(parts, {"1-1700": [ConnectionError("gone"), TimeoutError("slow")]})
    once.faults["1-1700"] = Used([ConnectionError("gone"), TimeoutError("slow")])
    found, waited, counts = hub_texts(monkeypatch, once)
    assert len(found) == 12_000 and set(found) == every and waited == [1, 4] and not counts
    assert found[:3000] != sorted(found[:3000])
    bad = Stream(parts, {"2-100": [ValueError("a bad page")]})
    found, waited, counts = hub_texts(monkeypatch, bad)
    assert len(found) == 9100 and not waited and counts == {"damaged parts": 1}
    assert "part 2 of 4 of a/b ends early: ValueError: a bad page" in capsys.readouterr().out
    gone = Stream(parts, {f"{p}-0": [ConnectionError("gone")] for p in range(4)})
    with pytest.raises(Fault, match="cannot read a/b: ConnectionError: gone"):
        hub_texts(monkeypatch, gone)


def test_the_study_reads_wikipedia_and_books_by_their_weights(home, monkeypatch):
    """Files with the columns that the two data sets have on the hub, in place of the hub."""
    import datasets

    # an article is short, a book long
    articles = {"id": [], "url": [], "title": [], "text": []}
    for i in range(4000):
        values = (str(i), f"https://en.wikipedia.org/{i}", f"Title {i}", f"article {i}. " * 20)
        for column, value in zip(articles.values(), values):
            column.append(value)
    books = {"TEXT": [f"book {i}.\r\n" * 900 for i in range(60)]}
    books |= {"SOURCE": ["gutenberg"] * 60, "METADATA": ['{"text_id": 1, "title": "x"}'] * 60}
    files = {"wikimedia/wikipedia": "articles.parquet", "sedthh/gutenberg_english": "books.parquet"}
    for columns, name in zip((articles, books), files.values()):
        datasets.Dataset.from_dict(columns).to_parquet(name)

    # what is asked of the hub is one commit each
    load, asked = datasets.load_dataset, []

    def load_local(path, revision, split, streaming, name=None):
        asked.append((path, name, split, bool(re.fullmatch("[0-9a-f]{40}", revision))))
        return load("parquet", data_files=files[path], split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    config = resolve("prepare.py", ["config/study.py"])
    assert (config["max_chars"], config["seed"]) == (100_000_000, 1337)
    entries = sources.check_sources(config["sources"])
    counts = Counter()
    n_chars = Counter()
    for text, _ in sources.mix_sources(entries, 1337, "blank_line", counts):
        n_chars[text.split()[0]] += len(text)
        if n_chars.total() > 700_000:
            break
    assert n_chars["article"] / n_chars.total() == pytest.approx(0.59, abs=0.01)
    assert n_chars["book"] / n_chars.total() == pytest.approx(0.41, abs=0.01)
    assert not counts
    assert asked == [
        ("wikimedia/wikipedia", "20231101.en", "train", True),
        ("sedthh/gutenberg_english", None, "train", True),
    ]


class Used(list):
    """Faults that happen once each."""

    def __len__(self):
        return 2 if list.__len__(self) else 0
