"""Read documents from any source, and mix several sources by weight.

A source is a file, a folder or a glob of txt, jsonl, csv or parquet files (also .gz and .zst), a
data set on the hub, or "docs". Local txt, jsonl and csv files are read by the few lines here, since
a bad row must not stop a run. pyarrow reads parquet, and `datasets` reads the hub.
"""

import contextlib
import csv
import glob
import gzip
import io
import json
import os
import random
import shutil
import tempfile
import zlib

from nanocram.docs_corpus import package_documents
from nanocram.faults import Fault, one_line

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")
KNOWN = tuple(suffix + end for suffix in SUFFIXES for end in ("", *COMPRESSED))
OWN_KEYS = ("column", "weight", "where")  # of a source, next to "files" or what `datasets` takes
BUFFER = 1000  # rows that a stream is shuffled through; a thousand books fit into memory
MAX_LINE = 1 << 24  # characters of a text file to read at a time; a line may exceed the memory
MAX_TEXT = 1_000_000  # characters of a document of a text file; a longer one is cut at a line end
MAX_FIELD = 10**8  # characters of a field of a csv file
GIVE_UP = 1000  # rows of one file without the column, after which it is no use to go on
TORN = (EOFError, gzip.BadGzipFile, zlib.error, csv.Error)  # errors of a truncated file


# --------------------------------------------------------------------------------------------------
# The sources of a config


def check_sources(sources):
    """Return the sources as dicts. Raise Fault for one that cannot be meant."""
    return [check_source(source) for source in sources]


def check_source(source):
    """Return a source as a dict: a path becomes {"files": path}."""
    entry = {"files": source} if isinstance(source, str) else source
    if not isinstance(entry, dict) or not isinstance(entry.get("files", entry.get("path")), str):
        raise Fault(
            f"the source {source!r} is neither a path nor a dict with `files`, "
            "or with `path` for the hub"
        )

    # column: where the text is
    column = entry.get("column", "text")
    if not isinstance(column, str):
        raise Fault(f"the column {column!r} of a source is no name")

    # weight: the fraction of the corpus, up to a common factor
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0:
        raise Fault(f"the weight {weight!r} of a source is no positive number")

    # where: the values of other columns that a row must have
    where = entry.get("where", {})
    is_valid = isinstance(where, dict) and all(
        isinstance(name, str) and isinstance(allowed, list) for name, allowed in where.items()
    )
    if not is_valid:
        raise Fault(f"where = {where!r} of a source is no dict of column: [allowed values]")

    # anything else is for `datasets`
    unknown = entry.keys() - {"files", *OWN_KEYS}
    if "files" in entry and unknown:
        raise Fault(f"a source with `files` has no {min(unknown)!r}; it has column, weight, where")
    return entry


def has_docs(entries):
    """Return whether "docs", the documentation of the installed packages, is one of the sources."""
    return any(entry.get("files") == "docs" for entry in entries)


def expected_chars(entries, max_chars):
    """Return how many characters will be read as far as it is known, and 0 if it is not.

    The size of local files is known; a compressed file counts four times.
    """
    # the characters of all local files, as if each took one byte
    local = [entry["files"] for entry in entries if entry.get("files", "docs") != "docs"]
    size = 0
    for source in local:
        for path in local_files(source):
            factor = 4 if path.endswith((*COMPRESSED, ".parquet")) else 1
            size += factor * os.path.getsize(path)

    # other sources may have any size, up to the limit
    if not max_chars:
        return size
    if len(local) == len(entries):
        return min(size, max_chars)
    return max_chars


# --------------------------------------------------------------------------------------------------
# Documents


def mix_sources(entries, seed, txt_document, counts):
    """Yield (document, label) of all sources in turns.

    The next document comes from the source that has the fewest characters, or token ids, for its
    weight. If weights are given, the end of one source ends the corpus, to keep the proportions.
    """
    streams = [read_documents(entry, seed, txt_document, counts) for entry in entries]
    weights = [entry.get("weight", 1.0) for entry in entries]
    is_weighted = any("weight" in entry for entry in entries)
    taken = [0.0] * len(streams)  # characters divided by the weight
    while streams:
        # the turn of the source that has had least
        turn = taken.index(min(taken))
        pair = next(streams[turn], None)
        if pair is not None:
            if isinstance(pair[0], (str, list)):
                taken[turn] += len(pair[0]) / weights[turn]
            yield pair

        # the end of a source
        elif is_weighted:
            print(
                f"source {turn + 1} of {len(entries)} has ended; to keep the proportions, "
                "the corpus ends with it"
            )
            return
        else:
            del streams[turn], taken[turn], weights[turn]


def read_documents(entry, seed, txt_document, counts):
    """Yield (document, label) of one source.

    A document is what the row has in the column: a text, or a list of token ids. The label is the
    package for "docs", and empty for others. Bad rows are counted; a bad source raises Fault.
    """
    if entry.get("files") == "docs":
        yield from package_documents()
        return

    # open the source
    column = entry.get("column", "text")
    where = entry.get("where", {})
    name = entry.get("files", entry.get("path"))
    if "files" in entry:
        rows = local_rows(name, seed, txt_document, counts)
        is_one_file = os.path.isfile(os.path.expanduser(name))
    else:
        rows = hub_rows({k: v for k, v in entry.items() if k not in OWN_KEYS}, seed)
        is_one_file = True

    # read it
    has_column = False
    n_without = 0
    other_columns = None  # of the first row that lacks the column
    for row in rows:
        # many files may include some that hold something else, but one file is alike to its end
        if not isinstance(row, dict) or column not in row:
            counts["rows without text"] += 1
            n_without += 1
            if isinstance(row, dict) and not other_columns:
                other_columns = list(row)
            if is_one_file and n_without == GIVE_UP and not has_column:
                break
            continue

        # the row counts if its other columns have allowed values
        has_column = True
        if all(nested(row, key) in allowed for key, allowed in where.items()):
            yield row[column], ""
        else:
            counts["rows that `where` leaves out"] += 1

    # not one row had the column, so it is the name of the column that is wrong
    if other_columns and not has_column:
        columns = ", ".join(map(str, other_columns))
        raise Fault(f"{name} has no column {column!r}; its columns: {columns}")


def nested(row, name):
    """Return row["a"]["b"] for the name "a.b", and None if there is no such value."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def hub_rows(entry, seed):
    """Yield the rows of a data set on the hub, streamed and shuffled through a buffer."""
    import datasets

    arguments = {"split": "train", **entry}
    try:
        stream = datasets.load_dataset(**arguments, streaming=True)
        yield from stream.shuffle(seed=seed, buffer_size=BUFFER)
    except Exception as e:
        name = entry.get("data_files", entry.get("path"))
        hint = ""
        if "data_files" not in entry:
            hint = "; is the hub reachable, is the name right, is it gated (`hf auth login`)?"
        raise Fault(f"cannot read {name}: {one_line(e)}{hint}") from e


# --------------------------------------------------------------------------------------------------
# Local files


def local_rows(source, seed, txt_document, counts):
    """Yield the rows of the files of a path or glob, each a dict. A text file has rows of text."""
    for path in local_files(source, seed):
        try:
            yield from rows_of_file(path, txt_document, counts)
        except TORN:
            counts["truncated files"] += 1
            print(f"warning: {path} is truncated or damaged; what could be read of it is used")


def local_files(source, seed=0):
    """Return the files of a path or glob, in an order that is shuffled by the seed."""
    # find them
    source = os.path.expanduser(source)
    if os.path.isdir(source):
        files = files_below(source)
    else:
        found = [source] if os.path.isfile(source) else sorted(glob.glob(source, recursive=True))
        # each file once, though ** may follow a link in a circle
        by_real_path = {os.path.realpath(path): path for path in found if os.path.isfile(path)}
        files = list(by_real_path.values())

    # refuse what cannot be read
    kinds = ", ".join(KNOWN)
    if not files:
        raise Fault(f"the source {source!r} is no file, folder or glob that holds any of {kinds}")
    for path in files:
        if not path.endswith(KNOWN):
            raise Fault(f"{path} is of an unknown kind; known are {kinds}")

    # the order must not depend on the file system
    files.sort()
    random.Random(seed).shuffle(files)
    return files


def files_below(folder):
    """Return the files of known kinds in a folder and its subfolders."""
    files = []
    seen = set()
    for inner, subfolders, names in os.walk(folder, onerror=refuse_folder, followlinks=True):
        # a link may lead back up
        if os.path.realpath(inner) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(inner))

        paths = [os.path.join(inner, name) for name in names if name.endswith(KNOWN)]
        files += [path for path in paths if os.path.isfile(path)]
    return files


def refuse_folder(error):
    raise Fault(f"{error.filename} cannot be read: {error.strerror}")


def rows_of_file(path, txt_document, counts):
    """Yield the rows of one file, each a dict. Raise one of TORN after the rows of a torn file."""
    plain = path.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith(".parquet"):
        yield from parquet_rows(path, is_compressed=plain != path)
        return

    # a byte-order mark is dropped, broken UTF-8 is replaced, and csv needs line ends as they are
    as_text = {"encoding": "utf-8-sig", "errors": "replace", "newline": ""}
    with io.TextIOWrapper(open_bytes(path), **as_text) as f:
        if plain.endswith(".csv"):
            csv.field_size_limit(MAX_FIELD)
            yield from csv.DictReader(line.replace("\0", "") for line in f)
        elif plain.endswith(".txt"):
            yield from txt_documents(f, txt_document)
        else:
            yield from json_lines(f, counts)


def txt_documents(lines, txt_document):
    """Yield {"text": document} of an open text file.

    txt_document: whether a document ends at a blank line, with each line, or with the file. It
    also ends at a million characters.
    """
    document = []
    size = 0
    tear = None
    while True:
        # the part of a torn document before the tear is used
        try:
            line = lines.readline(MAX_LINE)
        except TORN as e:
            tear = e
            break
        if not line:
            break

        is_blank = line.isspace()
        ends = txt_document == "line" or (txt_document == "blank_line" and is_blank)
        # one may end at this line, which only belongs to the next one then
        if document and (ends or size > MAX_TEXT):
            yield {"text": "".join(document)}
            document = []
            size = 0
        if not is_blank:
            document.append(line)
            size += len(line)

    # the last document has no end in the file
    if document:
        yield {"text": "".join(document)}
    if tear:
        raise tear


def json_lines(lines, counts):
    """Yield the value of each line that is JSON, and count the others."""
    for line in lines:
        if line.isspace():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            counts["rows that are not JSON"] += 1


def parquet_rows(path, is_compressed):
    """Yield the rows of a parquet file, which is decompressed first if it is a .gz or .zst."""
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        if is_compressed:
            whole = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".parquet"))
            shutil.copyfileobj(open_bytes(path), whole)
            whole.flush()
            path = whole.name
        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
                yield from batch.to_pylist()
        except pyarrow.ArrowInvalid as e:
            raise EOFError from e


def open_bytes(path):
    """Open a file for reading, decompressed."""
    if path.endswith(".gz"):
        return gzip.open(path)
    if path.endswith(".zst"):
        try:
            import zstandard  # noqa: F401
        except ImportError as e:
            raise Fault(f"{path} needs `pip install zstandard`") from e
        return io.BufferedReader(ZstandardFile(path), 1 << 20)
    return open(path, "rb")


class ZstandardFile(io.RawIOBase):
    """A .zst file that raises EOFError if it is torn.

    zstandard's own reader takes a tear for the end.
    """

    def __init__(self, path):
        self.file = open(path, "rb")
        self.frame = None  # the decompressor of the current frame; a file may have several
        self.rest = b""  # read, not decompressed: the beginning of the next frame
        self.output = memoryview(b"")  # decompressed, not yet handed out

    def readable(self):
        return True

    def readinto(self, target):
        """Fill `target` with decompressed bytes. Return their number, 0 at the end."""
        import zstandard

        # decompress until there is something to hand out
        while not self.output:
            data = self.rest or self.file.read(1 << 16)
            in_frame = self.frame is not None and not self.frame.eof
            if not data and in_frame:
                raise EOFError
            if not data:
                return 0

            # a frame begins; large windows are those of `zstd --long`
            if not in_frame:
                decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
                self.frame = decompressor.decompressobj()
            try:
                self.output = memoryview(self.frame.decompress(data))
            except zstandard.ZstdError as e:
                raise EOFError from e
            self.rest = self.frame.unused_data

        # hand out as much as fits
        n = min(len(target), len(self.output))
        target[:n] = self.output[:n]
        self.output = self.output[n:]
        return n

    def close(self):
        self.file.close()
        super().close()
