"""Read documents from any source, and mix several sources by weight.

A source is a file, a folder or a glob of txt, jsonl, csv or parquet files (also .gz and .zst), a
data set on the hub, or "docs". Local txt, jsonl and csv files are read by the few lines here, since
a bad row must not stop a run. pyarrow reads parquet, and `datasets` reads the hub.
"""

import contextlib
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import tempfile
import time
import zlib

from nanocram.docs_corpus import package_documents, required_packages
from nanocram.faults import Fault, one_line

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")
KNOWN = tuple(suffix + end for suffix in SUFFIXES for end in ("", *COMPRESSED))
OWN_KEYS = ("column", "weight", "where")  # of a source, next to "files" or what `datasets` takes
BUFFER = 1000  # rows that a stream is shuffled through; a thousand books fit into memory
MAX_LINE = 1 << 24  # characters of a text file to read at a time; a line may exceed the memory
MAX_TEXT = 1_000_000  # characters of a document of a text file; a longer one is cut at a line end
MAX_JSON = 1 << 27  # characters of a line of JSON; a longer one is left out
MANY_LINES = 1000  # of a row of a csv file, which a stray quote may have swallowed
MAX_FIELD = 10**8  # characters of a field of a csv file
HEAD = 400  # bytes of a file that tell its encoding
GAP = re.compile(r"[\s,]*")  # between the elements of a JSON array
INPUT = 1 << 11  # bytes to decompress at a time, which may become 32,768 times as many
GIVE_UP = 1000  # rows of one file without the column, after which it is no use to go on
WAITS = (1, 4, 16, 64, 256)  # seconds before the hub is tried again
MAX_FAILED = 3  # parts of a data set on the hub that fail one after the other before it is over
TORN = (EOFError, gzip.BadGzipFile, zlib.error, csv.Error)  # errors of a truncated file


# --------------------------------------------------------------------------------------------------
# The sources of a config


def check_sources(sources):
    """Return the sources as dicts. Raise Fault for one that cannot be meant."""
    # the command line takes a path with a comma for two
    if all(isinstance(source, str) for source in sources):
        path = ",".join(sources)
        if os.path.exists(os.path.expanduser(path)):
            sources = [path]
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


def source_stamps(entries):
    """Return what tells whether sources have changed: their files, sizes and dates, revisions."""
    files = []
    size = 0
    revisions = {}
    for entry in entries:
        if entry.get("files", "docs") != "docs":
            for path in sorted(local_files(entry["files"])):
                stat = os.stat(path)
                files.append([path, stat.st_size, stat.st_mtime_ns])
                size += stat.st_size
        elif "files" in entry:
            found = required_packages().items()
            revisions["docs"] = {name: distribution.version for name, distribution in found}
        else:
            revisions[entry["path"]] = hub_revision(entry)
    digest = hashlib.blake2b(json.dumps(files).encode(), digest_size=8).hexdigest()
    return {"files": len(files), "bytes": size, "digest": digest, "revisions": revisions}


def hub_revision(entry):
    """Return the commit of a data set on the hub, or None if it cannot be had."""
    if "data_files" in entry:
        return None
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(entry["path"], revision=entry.get("revision"), timeout=10)
    except Exception:  # no network, no such data set: reading it will say more
        return None
    return info.sha


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
        columns = {column, *(key.partition(".")[0] for key in where)}
        rows = local_rows(name, columns, seed, txt_document, counts)
        is_one_file = os.path.isfile(os.path.expanduser(name))
    else:
        rows = hub_rows({k: v for k, v in entry.items() if k not in OWN_KEYS}, seed, counts)
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
            yield as_text(row[column]), ""
        else:
            counts["rows that `where` leaves out"] += 1

    # not one row had the column, so it is the name of the column that is wrong
    if other_columns and not has_column:
        columns = ", ".join(" ".join(str(name).split())[:30] for name in other_columns[:9])
        hint = " (a csv file needs a header)" if ".csv" in name else ""
        raise Fault(f"{name} has no column {column!r}; its columns: {columns}{hint}")


def as_text(value):
    """Return a value of a column. Parquet without the mark of UTF-8 has texts as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def nested(row, name):
    """Return row["a"]["b"] for the name "a.b", and None if there is no such value."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def hub_rows(entry, seed, counts):
    """Yield the rows of a data set on the hub, streamed and shuffled through a buffer.

    A part (a file on the hub) that fails is left out from there on, counted and named.
    """
    import datasets

    # open it
    name = entry.get("data_files", entry.get("path"))
    try:
        stream = datasets.load_dataset(**{"split": "train", **entry}, streaming=True)
        parts = list(range(stream.num_shards))
    except Exception as e:
        hint = ""
        if "data_files" not in entry:
            hint = "; is the hub reachable, is the name right, is it gated (`hf auth login`)?"
        raise Fault(f"cannot read {name}: {one_line(e)}{hint}") from e

    def rows():
        n_failed = 0  # parts that failed one after the other
        random.Random(seed).shuffle(parts)
        for part in parts:
            try:
                yield from rows_of_part(stream.shard(num_shards=len(parts), index=part))
                n_failed = 0
            except Exception as e:
                n_failed += 1
                counts["damaged parts"] += 1
                print(f"warning: part {part} of {len(parts)} of {name} ends early: {one_line(e)}")
                if n_failed == min(MAX_FAILED, len(parts)):
                    raise Fault(f"cannot read {name}: {one_line(e)}") from e

    yield from shuffled(rows(), seed)


def rows_of_part(stream):
    """Yield the rows of a stream, and go on from its state after errors of the network."""
    waits = iter(WAITS)
    while True:
        try:
            for row in stream:
                yield row
                waits = iter(WAITS)
            return
        except OSError as e:
            wait = next(waits, None)
            if wait is None:
                raise
            print(f"warning: {one_line(e)}; trying again in {wait} s")
            time.sleep(wait)
            stream.load_state_dict(stream.state_dict())


def shuffled(rows, seed):
    """Yield rows in another order: each stays in a buffer for a random time."""
    rng = random.Random(seed)
    buffer = []
    for row in rows:
        if len(buffer) < BUFFER:
            buffer.append(row)
            continue
        i = rng.randrange(BUFFER)
        yield buffer[i]
        buffer[i] = row
    rng.shuffle(buffer)
    yield from buffer


# --------------------------------------------------------------------------------------------------
# Local files


def local_rows(source, columns, seed, txt_document, counts):
    """Yield the rows of the files of a path or glob, each a dict. A text file has rows of text.

    columns: names of the columns that are needed.
    """
    # say what is left out of a folder
    folder = os.path.expanduser(source)
    others = []
    if os.path.isdir(folder):
        others = [path for path in files_below(folder) if not path.endswith(KNOWN)]
    if others:
        counts["files left out for their suffix"] += len(others)
        print(f"warning: {len(others):,} files of {source} have an unknown suffix: {others[0]!r}")

    for path in local_files(source, seed):
        try:
            yield from rows_of_file(path, columns, txt_document, counts)
        except TORN:
            counts["truncated files"] += 1
            print(f"warning: {path} is truncated or damaged; what could be read of it is used")
        except OSError as e:
            counts["files that cannot be read"] += 1
            print(f"warning: {path} cannot be read to its end: {one_line(e)}")


def local_files(source, seed=0):
    """Return the files of a path or glob, in an order that is shuffled by the seed."""
    # find them
    source = os.path.expanduser(source)
    if os.path.isdir(source):
        files = [path for path in files_below(source) if path.endswith(KNOWN)]
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
    """Return the files in a folder and its subfolders."""
    files = []
    seen = set()
    for inner, subfolders, names in os.walk(folder, onerror=refuse_folder, followlinks=True):
        # a link may lead back up
        if os.path.realpath(inner) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(inner))

        paths = [os.path.join(inner, name) for name in names]
        files += [path for path in paths if os.path.isfile(path)]
    return files


def refuse_folder(error):
    raise Fault(f"{error.filename} cannot be read: {error.strerror}")


def rows_of_file(path, columns, txt_document, counts):
    """Yield the rows of one file, each a dict. Raise one of TORN after the rows of a torn file."""
    plain = path.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith(".parquet"):
        yield from parquet_rows(path, columns, plain != path, counts)
        return

    # a byte-order mark is dropped, broken UTF-8 is replaced, and csv needs line ends as they are
    raw = open_bytes(path)
    encoding = encoding_of(raw.peek(HEAD)[:HEAD])
    if encoding.startswith("utf-16"):
        print(f"{path} is in UTF-16")
    with io.TextIOWrapper(raw, encoding, errors="replace", newline="") as f:
        if plain.endswith(".csv"):
            yield from csv_rows(f, path, counts)
        elif plain.endswith(".txt"):
            for row in txt_documents(f, txt_document):
                counts["documents of .txt files"] += 1
                yield row
        else:
            yield from json_rows(f, plain.endswith(".json"), counts)


def encoding_of(head):
    """Return the encoding of a file that begins with these bytes: UTF-8, or UTF-16."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"

    # without a byte-order mark, every other byte is 0 in most texts
    n_zeros = head[::2].count(0), head[1::2].count(0)
    if n_zeros[1] > len(head) / 4 and not n_zeros[0]:
        return "utf-16-le"
    if n_zeros[0] > len(head) / 4 and not n_zeros[1]:
        return "utf-16-be"
    return "utf-8-sig"


def csv_rows(lines, path, counts):
    """Yield the rows of a csv file with a header. Say which of them has an odd number of lines."""
    csv.field_size_limit(MAX_FIELD)
    reader = csv.DictReader(line.replace("\0", "") for line in iter(bounded(lines), ""))
    before = 0
    for row in reader:
        if reader.line_num - before > MANY_LINES:
            counts["csv rows of more than 1,000 lines"] += 1
            print(
                f"warning: a row of {path} begins in line {before + 1} and has "
                f"{reader.line_num - before:,} lines; is a quote missing?"
            )
        before = reader.line_num
        yield row


def bounded(lines):
    """Return a function that reads the next line of a file, or so much of it as memory holds."""
    return lambda: lines.readline(MAX_JSON)


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


def json_rows(lines, may_be_array, counts):
    """Yield the value of each line that is JSON, or the elements of one array."""
    first = lines.readline(MAX_JSON)
    if may_be_array and first.lstrip().startswith("["):
        yield from array_rows(lines, first, counts)
        return

    is_inside = False  # of a line that is too long
    for line in itertools.chain([first], iter(bounded(lines), "")):
        is_whole = line.endswith("\n") or len(line) < MAX_JSON
        if is_inside or not is_whole:
            counts["rows that are too long"] += not is_inside
            is_inside = not is_whole
            continue
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            counts["rows that are not JSON"] += 1


def array_rows(lines, text, counts):
    """Yield the elements of a JSON array. Its file begins with `text`, and `lines` has the rest."""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    while True:
        at = GAP.match(text, at).end()
        if text.startswith("]", at):
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            # the element may go on after what has been read
            more = lines.read(MAX_LINE)
            if not more or len(text) - at > MAX_JSON:
                counts["arrays that are not JSON to their end"] += 1
                return
            text = text[at:] + more
            at = 0
        else:
            yield row


def parquet_rows(path, columns, is_compressed, counts):
    """Yield the rows of a parquet file, which is decompressed first if it is a .gz or .zst.

    Only the columns that are needed are read. A damaged part is left out, counted and named.
    """
    import pyarrow
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(open(path, "rb"))
        if is_compressed:
            whole = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(open_bytes(path), whole)
        try:
            file = pyarrow.parquet.ParquetFile(whole)
        except (pyarrow.ArrowException, OSError) as e:
            raise EOFError from e

        # without the columns, the names of the others say what the file has
        names = file.schema_arrow.names
        if not columns & set(names):
            yield from [dict.fromkeys(names)] * file.metadata.num_rows
            return

        for group in range(file.num_row_groups):
            n_left = file.metadata.row_group(group).num_rows
            try:
                needed = sorted(columns & set(names))
                for batch in file.iter_batches(1000, [group], needed):
                    yield from batch.to_pylist()
                    n_left -= len(batch)
            except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as e:
                counts["rows in damaged parts"] += n_left
                print(f"warning: {n_left:,} rows of {path} are left out: {one_line(e)}")


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
            data = self.rest or self.file.read(INPUT)
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
