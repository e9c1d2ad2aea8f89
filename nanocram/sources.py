"""Documents of any source: files, folders and globs of txt, jsonl, csv, parquet (.gz, .zst), data sets on the hub, "docs".

Local txt, jsonl and csv are read by the few lines here, since a bad row must not stop a run, and parquet by pyarrow; the hub
goes through `datasets`.
"""

import csv
import glob
import gzip
import io
import json
import os
import random
import shutil
import sys
import tempfile
import zlib

from configurator import one_line
from package_docs import package_documents

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
KNOWN = tuple(suffix + z for suffix in SUFFIXES for z in ("", ".gz", ".zst"))
TORN = (EOFError, gzip.BadGzipFile, zlib.error, csv.Error)  # what reading a truncated file raises
BUFFER = 1000  # documents that a stream is shuffled through; a thousand books fit into memory


def check_sources(sources):
    """The entries as dicts. SystemExit, one line, for one that cannot be meant."""
    entries = []
    for source in sources:
        entry = {"files": source} if isinstance(source, str) else source
        if not isinstance(entry, dict) or not isinstance(entry.get("files", entry.get("path")), str):
            sys.exit(
                f"prepare.py: the source {source!r} is neither a path nor a dict with `files`, or with `path` for the hub"
            )
        if not isinstance(entry.get("column", ""), str):
            sys.exit(f"prepare.py: the column {entry['column']!r} of a source is no name")
        weight, where = entry.get("weight", 1), entry.get("where", {})
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
            sys.exit(f"prepare.py: the weight {weight!r} of a source is no positive number")
        if not isinstance(where, dict) or not all(isinstance(k, str) and isinstance(v, list) for k, v in where.items()):
            sys.exit(f"prepare.py: where = {where!r} of a source is no dict of column: [allowed values]")
        if "files" in entry and (odd := entry.keys() - {"files", "column", "weight", "where"}):
            sys.exit(f"prepare.py: a source with `files` has no {min(odd)!r}; it has column, weight, where")
        entries.append(entry)
    return entries


def read_documents(entry, seed, txt_document, counts):
    """(document, label) of one entry of check_sources; the label is the package for "docs", and empty elsewhere.

    A document is what stands in the column: a text, or the token ids of a tokenized row. Bad rows are counted, a bad
    source ends the process with one line.
    """
    if entry.get("files") == "docs":
        yield from package_documents()
        return
    name, column, where = entry.get("files", entry.get("path")), entry.get("column", "text"), entry.get("where", {})
    hub = {k: v for k, v in entry.items() if k not in ("column", "weight", "where")}
    found, first, missing = False, None, 0
    one = "path" in entry or os.path.isfile(os.path.expanduser(name))  # of many files some may hold something else
    for row in local_rows(name, seed, txt_document, counts) if "files" in entry else hub_rows(hub, seed):
        if not isinstance(row, dict) or column not in row:
            counts["rows without text"] += 1
            first, missing = first or (isinstance(row, dict) and row), missing + 1
            if one and missing == 1000 and not found:
                break
            continue
        found = True
        if all(nested(row, key) in allowed for key, allowed in where.items()):
            yield row[column], ""
        else:
            counts["rows that `where` leaves out"] += 1
    if first and not found:
        sys.exit(f"prepare.py: {name} has no column {column!r}; its columns: {', '.join(map(str, first))}")


def nested(row, name):
    """row["a"]["b"] for the name "a.b"; None where there is none."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def local_rows(source, seed, txt_document, counts):
    for path in local_files(source, seed):
        plain = path.removesuffix(".gz").removesuffix(".zst")
        try:
            if plain.endswith(".parquet"):
                with tempfile.NamedTemporaryFile(suffix=".parquet") as whole:
                    if plain != path:
                        shutil.copyfileobj(open_bytes(path), whole)
                        whole.flush()
                    yield from parquet_rows(whole.name if plain != path else path)
                continue
            with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="replace", newline="") as f:
                if plain.endswith(".csv"):
                    csv.field_size_limit(10**8)
                    yield from csv.DictReader(line.replace("\0", "") for line in f)
                else:
                    yield from json_lines(f, counts) if plain.endswith((".jsonl", ".json")) else txt_documents(f, txt_document)
        except TORN:
            counts["truncated files"] += 1
            print(f"prepare.py: warning: {path} is truncated or damaged; what could be read of it is used")


def local_files(source, seed=0):
    """The files of a path or glob, in an order shuffled by the seed."""
    source = os.path.expanduser(source)
    if os.path.isdir(source):
        files, seen = [], set()
        for folder, folders, names in os.walk(source, onerror=unreadable, followlinks=True):
            if os.path.realpath(folder) in seen:  # a link back up
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            files += [path for name in names if name.endswith(KNOWN) and os.path.isfile(path := os.path.join(folder, name))]
    else:
        found = [source] if os.path.isfile(source) else sorted(glob.glob(source, recursive=True))
        files = list({os.path.realpath(path): path for path in found if os.path.isfile(path)}.values())  # ** follows loops
    if not files:
        sys.exit(f"prepare.py: the source {source!r} is no file, folder or glob that holds any of {', '.join(KNOWN)}")
    if odd := [p for p in files if not p.endswith(KNOWN)]:
        sys.exit(f"prepare.py: {odd[0]} is of an unknown kind; known are {', '.join(KNOWN)}")
    files.sort()
    random.Random(seed).shuffle(files)
    return files


def unreadable(error):
    sys.exit(f"prepare.py: {error.filename} cannot be read: {error.strerror}")


def open_bytes(path):
    if path.endswith(".gz"):
        return gzip.open(path)
    if path.endswith(".zst"):
        try:
            import zstandard  # noqa: F401
        except ImportError:
            sys.exit(f"prepare.py: {path} needs `pip install zstandard`")
        return io.BufferedReader(Zst(path), 1 << 20)
    return open(path, "rb")


class Zst(io.RawIOBase):
    """A .zst file that raises EOFError where it is torn; zstandard's own reader takes the tear for the end."""

    def __init__(self, path):
        self.file, self.frame, self.rest, self.out = open(path, "rb"), None, b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, target):
        import zstandard

        while not self.out:
            data = self.rest or self.file.read(1 << 16)
            if not data and self.frame and not self.frame.eof:
                raise EOFError
            if not data:
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self.out = memoryview(self.frame.decompress(data))
            except zstandard.ZstdError as e:
                raise EOFError from e
            self.rest = self.frame.unused_data
        n = min(len(target), len(self.out))
        target[:n], self.out = self.out[:n], self.out[n:]
        return n

    def close(self):
        self.file.close()
        super().close()


def txt_documents(lines, txt_document):
    """Documents of a text file: up to a blank line, a line each, or the whole file; cut at a million characters."""
    document, size = [], 0
    try:
        for line in iter(lambda: lines.readline(1 << 24), ""):  # a line may be larger than memory
            blank = line.isspace()
            ends = txt_document == "line" or (txt_document == "blank_line" and blank) or size > 1_000_000
            if document and ends:
                yield {"text": "".join(document)}
                document, size = [], 0
            if not blank:
                document.append(line)
                size += len(line)
    finally:  # also where the file is torn
        if document and not isinstance(sys.exception(), GeneratorExit):
            yield {"text": "".join(document)}


def json_lines(lines, counts):
    for line in lines:
        if line.isspace():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            counts["rows that are not JSON"] += 1


def parquet_rows(path):
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as e:
        raise EOFError from e


def hub_rows(entry, seed):
    """Rows of a data set on the hub, streamed and shuffled through a buffer."""
    import datasets

    try:
        yield from datasets.load_dataset(**{"split": "train", **entry}, streaming=True).shuffle(seed=seed, buffer_size=BUFFER)
    except Exception as e:
        hint = "" if "data_files" in entry else "; is the hub reachable, is the name right, is it gated (`hf auth login`)?"
        name = entry.get("data_files", entry.get("path"))
        sys.exit(f"prepare.py: cannot read {name}: {one_line(e)}{hint}")
