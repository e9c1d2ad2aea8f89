"""Keep all documents in one file, the spool, while prepare.py reads them more than once.

The sources are read only once, into the spool. Meanwhile the documents with the smallest content
hashes are held out for validation. Later reads of the spool leave them and their copies out, since
a document is held out if its hash is not above that of the last one held out. A long document is
held out by parts: the others are in training, and validation holds what the corpus holds.
"""

import hashlib
import heapq
import os
import re
import shutil
import string
import unicodedata
from typing import NamedTuple

import numpy as np

from nanocram.faults import Fault, read_json, write_json
from nanocram.progress import progress_bar

BLOCK = 1 << 24  # bytes of the spool that are read at a time
MAX_DOCUMENT = 20_000  # characters; a longer text is cut into several documents
HASH_DIGITS = 16  # hexadecimal digits before each text in the spool
N_HASHES = 1 << 64
SCRAMBLE = 0x9E3779B97F4A7C15  # an odd number, so that multiplying keeps hashes different

ALNUM = (string.ascii_letters + string.digits).encode()
OTHER_ASCII = bytes(set(range(128)) - set(ALNUM))
TO_LOWER = bytes.maketrans(string.ascii_uppercase.encode(), string.ascii_lowercase.encode())
OUTSIDE_ASCII = re.compile(rb"[\x80-\xff]+")
NO_LETTER = re.compile(r"[\W_]+")


def cut_text(text, size):
    """Yield the parts of a text, each of at most `size` characters.

    A cut is at white space, which no token spans, or anywhere if there is no white space.
    """
    start = 0
    while len(text) - start > size:
        cut = start + size
        while cut > start and not text[cut].isspace():
            cut -= 1
        if cut == start:
            cut = start + size
        yield text[start:cut]
        start = cut
    yield text[start:]


def require_disk(folder, need):
    """Raise Fault if the disk has less than `need` bytes."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise Fault(
            f"{need / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free; lower max_chars"
        )


# --------------------------------------------------------------------------------------------------
# Documents that are held out


def digest(data):
    """Return a hash of bytes, an integer of 64 bits that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def content_hash(data):
    """Return a hash of the letters and digits of a text in UTF-8, in lower case.

    Texts that differ in blanks, punctuation or capitals share it.
    """
    # most characters are ASCII, which bytes.translate handles ten times as fast
    key = data.translate(TO_LOWER, OTHER_ASCII)
    if not key.isascii():
        key = OUTSIDE_ASCII.sub(letters_of, key)
    return digest(key or data)


def letters_of(match):
    """Return the letters and digits of a match in UTF-8, in lower case."""
    return NO_LETTER.sub("", match[0].decode().lower()).encode()


class Held(NamedTuple):
    """A document, or a row, that is held out."""

    hash: int
    data: bytes  # a text in UTF-8, or the token ids of a row
    label: str  # the package, if it is documentation

    @property
    def text(self):
        return self.data.decode()


class SmallestHashes:
    """Keep the items with the smallest content hashes until they weigh `budget`.

    The choice depends on the contents only, not on their order. Equal contents count once, and
    `weight` is the sum of the weights of what is kept.
    """

    def __init__(self, budget):
        self.budget = budget
        self.weight = 0
        self.hashes = set()
        self.heap = []  # of (-hash, weight, data, label), so that the largest hash is on top

    def add(self, h, data, weight, label=""):
        """Add an item of hash h, and drop the largest hashes while the others weigh enough."""
        if h in self.hashes:
            return
        heapq.heappush(self.heap, (-h, weight, data, label))
        self.hashes.add(h)
        self.weight += weight

        # the budget may be exceeded by less than the last item
        while self.weight - self.heap[0][1] >= self.budget:
            dropped, dropped_weight, _, _ = heapq.heappop(self.heap)
            self.hashes.discard(-dropped)
            self.weight -= dropped_weight

    def sorted(self):
        """Return what is kept as a list of Held, the smallest hash first."""
        return sorted(Held(-negative, data, label) for negative, _, data, label in self.heap)


# --------------------------------------------------------------------------------------------------
# A spool of texts, each after its hash and before a NUL byte


def clean_text(text, counts):
    """Return a text in NFC without NUL and outer white space, and count what is wrong with it.

    NFC writes é as one character, which some files have as e and an accent. The result is empty if
    this is no text, or if nothing is left of it.
    """
    if not isinstance(text, str):
        counts["rows without text"] += 1
        return ""
    text = text.replace("\0", "").strip()

    # JSON can hold lone surrogates, which no file can
    try:
        text.encode()
    except UnicodeEncodeError:
        counts["documents with lone surrogates"] += 1
        text = text.encode("utf-8", "replace").decode()

    text = unicodedata.normalize("NFC", text)

    # what is left, and whether decoding has put a replacement character into it
    if not text:
        counts["empty documents"] += 1
    if "\ufffd" in text:
        counts["documents with broken UTF-8"] += 1
    return text


class Sample:
    """Write a random part of the documents to a spool of its own, for the vocabulary.

    Whether a document belongs to it depends on its hash and the seed: sample_key is below `limit`.
    As nobody knows how many documents will come, the limit halves whenever the sample has twice the
    characters that are wanted. Readers leave out what is above their own limit.
    """

    def __init__(self, f, n_wanted, seed):
        self.f = f
        self.n_wanted = n_wanted
        self.seed = seed
        self.limit = N_HASHES
        self.n_chars = 0

    def add(self, h, record, n_chars):
        """Write a document of hash h if it belongs to the sample."""
        if sample_key(h, self.seed) >= self.limit:
            return
        self.f.write(record)
        self.n_chars += n_chars
        if self.n_chars > 2 * self.n_wanted:
            self.limit //= 2
            self.n_chars /= 2


def sample_key(h, seed):
    """Return a number below N_HASHES, a random one for each hash."""
    return (h ^ seed) * SCRAMBLE % N_HASHES


def write_spool(folder, documents, budget, sample_chars, seed, max_chars, expected_chars, counts):
    """Write documents to folder/spool, and a sample of them to folder/sample.

    documents: pairs of (text, label).
    budget: characters to hold out.
    sample_chars: characters of the sample, 0 = none.
    max_chars: characters after which to stop, 0 = never.
    expected_chars: characters that the documents have, for the progress bar; 0 if unknown.
    Returns (documents that are held out, the smallest hash first; limit of the sample).
    """
    held = SmallestHashes(budget)
    total = expected_chars or None
    bar = progress_bar(desc="reading", total=total, unit=" chars", unit_scale=True)
    with open(folder / "spool", "wb") as f, open(folder / "sample", "wb") as sampled, bar:
        sample = Sample(sampled, sample_chars, seed)
        for text, label in documents:
            text = clean_text(text, counts)
            if not text:
                continue

            # a part counts as a document of its own, so that some of the parts are held out
            for part in cut_text(text, MAX_DOCUMENT):
                counts["documents"] += 1
                counts["characters"] += len(part)
                bar.update(len(part))
                data = part.encode()
                h = content_hash(data)
                record = b"%016x%b\0" % (h, data)
                f.write(record)
                held.add(h, data, len(part), label)
                sample.add(h, record, len(part))

            if max_chars and counts["characters"] >= max_chars:
                break

    # a sample of all documents would be the spool again
    if sample.limit == N_HASHES:
        os.remove(folder / "sample")
    return held.sorted(), sample.limit


def read_spool(path, cutoff, counts=None):
    """Yield the texts of a spool whose hash is above `cutoff`, which those held out are not.

    counts: where the others are counted, if given.
    """
    for h, data in read_records(path):
        if h > cutoff:
            yield data.decode()
        elif counts is not None:
            counts["documents held out"] += 1


def read_sample(folder, cutoff, fraction, seed):
    """Yield a random fraction of the texts whose hash is above `cutoff`, always the same ones.

    They come from the sample, or from the spool if the sample has too few.
    """
    limit = round(fraction * N_HASHES)
    path = folder / "spool"
    sample_limit = read_json(folder / "reading.json").get("sample_limit", 0)
    if limit <= sample_limit < N_HASHES:
        path = folder / "sample"
    for h, data in read_records(path):
        if h > cutoff and sample_key(h, seed) < limit:
            yield data.decode()


def read_records(path):
    """Yield (hash, text in UTF-8) of the documents of a spool."""
    rest = b""  # the beginning of a document that the next block continues
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            *documents, rest = (rest + block).split(b"\0")
            for document in documents:
                yield int(document[:HASH_DIGITS], 16), document[HASH_DIGITS:]


def save_reading(folder, held, sample_limit, counts):
    """Write what is known of a complete spool next to it. A spool without this is incomplete."""
    held = [[document.hash, document.text, document.label] for document in held]
    reading = {"held": held, "sample_limit": sample_limit, "counts": counts}
    write_json(folder / "reading.json", reading)


def load_reading(folder, counts):
    """Return the held-out documents of a complete spool, and add to the counts."""
    reading = read_json(folder / "reading.json")
    counts.update(reading["counts"])
    return [Held(h, text.encode(), label) for h, text, label in reading["held"]]


# --------------------------------------------------------------------------------------------------
# A spool of rows that are tokenized already, each seq_len ids of two bytes


def split_rows(work, documents, seq_len, vocab_size, val_rows, counts):
    """Write rows to work/val.bin if they are held out, and to work/unordered if not.

    documents: pairs of (list of seq_len token ids, label). Raise Fault for a row that does not fit.
    """
    # write all rows to a spool, and hold out those with the smallest hashes
    held = SmallestHashes(val_rows)
    with open(work / "spool", "wb") as f:
        for row, _ in progress_bar(documents, "reading", unit=" rows", unit_scale=True):
            if not isinstance(row, list) or not all(type(i) is int for i in row):
                counts["rows without token ids"] += 1
                continue
            require_fit(row, seq_len, vocab_size)
            data = np.array(row, np.uint16).tobytes()
            f.write(data)
            held.add(digest(data), data, 1)

    # validation
    validation = held.sorted()
    if len(validation) < val_rows:
        n = len(validation)
        raise Fault(f"the sources have {n} different rows, too few for val_rows = {val_rows}")
    with open(work / "val.bin", "wb") as f:
        f.writelines(row.data for row in validation)

    # training
    cutoff = validation[-1].hash
    with open(work / "spool", "rb") as spool, open(work / "unordered", "wb") as f:
        while data := spool.read(2 * seq_len):
            if digest(data) > cutoff:
                f.write(data)
                counts["tokens"] += seq_len


def require_fit(row, seq_len, vocab_size):
    """Raise Fault if a row has another length, or ids that the tokenizer does not have."""
    if len(row) != seq_len:
        raise Fault(f"a row of the source has {len(row)} tokens, not seq_len = {seq_len}")
    if min(row) < 0 or max(row) >= vocab_size:
        limits = f"[0, {vocab_size})"
        raise Fault(f"a row of the source has an id outside {limits}, the tokenizer's")
