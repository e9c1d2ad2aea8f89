"""Change packed rows of tokens: cut out what is there twice, write the others in training order.

Rows are uint16 arrays (number of rows, seq_len). The files may be larger than memory, except for
deduplication, which says beforehand how much it needs.
"""

import contextlib
import hashlib
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from nanocram.faults import Fault, read_json
from nanocram.progress import progress_bar
from nanocram.tokenizer import vocab_size_of

CHUNK = 1 << 23  # tokens that are worked on at a time
ROWS = 1 << 20  # rows whose places are worked on at a time
BUCKET = 1 << 28  # bytes of rows that are put in order at a time, in memory
PARTS = 16  # parts of all window hashes that are sorted one after the other, to save memory
# characters that end a sentence: "." as in the authors' code, and Unicode's Sentence_Terminal of
# the scripts in use outside ASCII
SENTENCE_ENDS = set(".。．｡！？‼⁇⁈⁉։؟۔؝؞܀܁܂߹।॥၊။።፧፨᙮។៕᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿⳹⳺⳻⸮꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫༎།")
NOWHERE = np.iinfo(np.uint32).max  # the place of a row that is not written


def chunks(rows):
    """Return slices of `rows` that have about CHUNK tokens each."""
    size = max(CHUNK // rows.shape[1], 1)
    starts = range(0, len(rows), size)
    return [slice(start, start + size) for start in starts]


def count_tokens(rows, size=65536):
    """Return how often each token id occurs: (size,) int64."""
    n = np.zeros(size, np.int64)
    for part in chunks(rows):
        tokens = rows[part].ravel()
        n += np.bincount(tokens, minlength=size)
    return n


# --------------------------------------------------------------------------------------------------
# Deduplication


def deduplicate(path, n, seq_len, marks, counts):
    """Rewrite the rows of a file without the repeats of runs of n tokens. Return their number.

    marks: the ids of <cls> and <sep>.
    """
    n_tokens = os.path.getsize(path) // 2
    require_memory(n_tokens)
    print(f"deduplicating {n_tokens:,} tokens")
    tokens = np.fromfile(path, np.uint16)
    tokens = tokens[~repeated(tokens, n, marks)]
    tokens = tokens[~in_empty_document(tokens, *marks)]
    counts["tokens dropped as repeats"] = n_tokens - len(tokens)

    n_rows = len(tokens) // seq_len
    with open(path, "wb") as f:
        f.write(tokens[: n_rows * seq_len])
    return n_rows


def in_empty_document(tokens, cls, sep):
    """Return which tokens are the <cls> or <sep> of a document of which nothing is left: bool."""
    is_cls = tokens == cls
    is_sep = tokens == sep
    is_mark = is_cls | is_sep
    after_mark = np.concatenate([[True], is_mark[:-1]])
    before_mark = np.concatenate([is_mark[1:], [False]])
    return is_sep & after_mark | is_cls & before_mark


def repeated(tokens, n, marks):
    """Return which tokens are in a later occurrence of a run of n tokens: (length,) bool.

    From left to right, an occurrence is cut out if an earlier one, which ends before it begins, is
    still whole. So that one stays: what is cut out later lies after it. Runs with one of the marks
    in them do not count.
    """
    starts, group = runs_that_recur(tokens, n, marks)
    first = np.flatnonzero(np.diff(group, prepend=-1))  # of each group, in `starts`
    data = tokens.tobytes()
    cut = bytearray(len(tokens))
    order = np.argsort(starts)
    for block in range(0, len(order), ROWS):
        for k in order[block : block + ROWS].tolist():
            # the earliest occurrence that is still whole; it may be this one
            i = int(starts[k])
            g = group[k]
            j = int(starts[first[g]])
            while j + n <= i and cut.find(1, j, j + n) >= 0:
                first[g] += 1
                j = int(starts[first[g]])

            # equal hashes only suggest a repeat, so compare the tokens
            if j + n <= i and data[2 * j : 2 * (j + n)] == data[2 * i : 2 * (i + n)]:
                cut[i : i + n] = bytes([1]) * n
    return np.frombuffer(cut, bool)


def runs_that_recur(tokens, n, marks):
    """Return the runs of n tokens that have the hash of another one, as two arrays.

    The first has the positions where they begin, the second a number for each hash. Both are sorted
    by hash, and then by position.
    """
    # a hash for every run; most memory goes there
    n_runs = max(len(tokens) - n + 1, 0)
    hashes = np.empty(n_runs, np.uint64)
    for i in range(0, n_runs, CHUNK):
        part = window_hashes(tokens[i : i + CHUNK + n - 1], n)
        hashes[i : i + len(part)] = part

    # a run has no mark in it if as many come before its end as before its beginning
    marks_before = np.zeros(len(tokens) + 1, np.uint32)
    np.cumsum(np.isin(tokens, marks), out=marks_before[1:])
    has_mark = marks_before[n:] != marks_before[:n_runs]
    del marks_before

    # the first four bits of a hash say which part it belongs to, so equal hashes share a part
    part_of = (hashes >> np.uint64(60)).astype(np.uint8)
    part_of[has_mark] = PARTS
    found = [np.zeros(0, np.int64)]
    for part in range(PARTS):
        starts = np.flatnonzero(part_of == part)
        starts = starts[np.argsort(hashes[starts], kind="stable")]
        is_same = np.diff(hashes[starts]) == 0
        recurs = np.zeros(len(starts), bool)
        recurs[1:] |= is_same
        recurs[:-1] |= is_same
        found.append(starts[recurs])

    starts = np.concatenate(found)
    is_new = np.diff(hashes[starts], prepend=np.uint64(0)) != 0
    group = np.cumsum(is_new)
    return starts, group - group[:1]


def window_hashes(tokens, n):
    """Return a polynomial hash of every run of n tokens: (length - n + 1,) uint64.

    The hash of two adjacent runs is that of the first times a power of the base, plus that of the
    second. So the hashes of runs of 1, 2, 4, ... tokens follow from each other, and the binary
    digits of n say which of them make up a run of n.
    """
    width = 1
    hashes = tokens.astype(np.uint64) + np.uint64(1)  # of every run of `width` tokens
    power = 0x9E3779B97F4A7C15  # base to the power of `width`, modulo 2 ** 64
    result = None  # hashes of runs of `done` tokens
    done = 0
    while n:
        # append `width` tokens to the runs that are done
        if n & 1:
            next_run = hashes[done:]
            if result is None:
                result = next_run
            else:
                result = result[: len(next_run)] * np.uint64(power) + next_run
            done += width

        # double the width
        n >>= 1
        if n:
            hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
            power = power * power % 2**64
            width *= 2
    return result


def require_memory(n_tokens):
    """Raise Fault if there is too little memory to deduplicate n_tokens."""
    need = 40 * n_tokens
    free = available_memory()
    if need > free:
        raise Fault(
            f"dedup_tokens needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free;"
            " set dedup_tokens = 0 or max_chars"
        )


def available_memory():
    """Return the memory in bytes that this process may still use."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize  # Windows does not say
    if not os.path.exists("/proc/meminfo"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    report = Path("/proc/meminfo").read_text()
    kilobytes = re.search(r"MemAvailable: +(\d+)", report)[1]
    free = 1024 * int(kilobytes)

    # a container may have less than the machine
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            used = (group / "memory.current").read_text()
            free = min(free, int(limit) - int(used))
    return free


# --------------------------------------------------------------------------------------------------
# Order


def write_training_rows(work, shape, order, max_rows, sep, seed):
    """Write the rows of work/unordered to work/train.bin, in training order.

    shape: (number of rows, seq_len) of the rows.
    max_rows: rows to keep after ordering, 0 = all.
    Returns (rows written, SHA-256 of the file, how often each token occurs).
    """
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    rows = np.memmap(work / "unordered", np.uint16, "r", shape=shape)
    table = order_table(rows, order, tokenizer, sep)
    places = training_order(rows, table, seed)
    if max_rows:
        places = places[:max_rows]
    sha, token_counts = write_ordered(rows, places, work / "train.bin")
    return len(places), sha, token_counts


def order_table(rows, order, tokenizer, sep=None):
    """Return what each token adds to the sort key of its row: (vocab_size,) float.

    Rows with the smallest keys come first. The result is None for a shuffle, which needs no keys.
    """
    size = vocab_size_of(tokenizer)

    table = np.zeros(size)

    # most full stops first, so rows of many short sentences [repo]
    if order == "sentence_length":
        for token, i in tokenizer.get_vocab().items():
            if token.removeprefix("##").removeprefix("▁") in SENTENCE_ENDS:
                table[i] = -1
        return table

    # most ends of documents first
    if order == "fragment":
        table[sep] = -1
        return table

    # fewest characters of text first; WordPiece has no space in a token, but most words follow one
    if order == "word_length":
        tokens = [tokenizer.id_to_token(i) or "" for i in range(size)]
        is_wordpiece = any(token.startswith("##") for token in tokens)
        for i, token in enumerate(tokens):
            table[i] = len(token)
            if token.startswith("##"):
                table[i] -= len("##")
            elif is_wordpiece:
                table[i] += 1
        return table

    # rarest tokens first, or commonest ones; with add-one smoothing [repo]
    if order in ("unigram", "reverse_unigram"):
        n = np.ones(size) + count_tokens(rows, size)
        log_frequency = np.log2(n / n.sum())
        return log_frequency if order == "unigram" else -log_frequency
    return None


def training_order(rows, table, seed):
    """Return the numbers of the rows in training order: (number of rows,) uint32.

    The rows are shuffled, then sorted by the sum of table[token] over their tokens if there is a
    table. Rows with equal keys stay shuffled.
    """
    order = np.arange(len(rows), dtype=np.uint32)
    np.random.default_rng(seed).shuffle(order)
    if table is None:
        return order
    return sort_by_keys(order, sort_keys(rows, table))


def sort_keys(rows, table):
    """Return the sort key of each row: (number of rows,) float32."""
    keys = np.empty(len(rows), np.float32)
    for part in chunks(rows):
        keys[part] = table[rows[part]].sum(1)
    if np.ptp(keys) == 0 and len(keys) > 1:
        raise Fault("all rows are alike to this `order`; use another, or shuffle")
    return keys


def sort_by_keys(shuffled, keys):
    """Return row numbers, sorted by keys[row]; equal keys stay in the given order."""
    # One number holds the key in its upper half and the place in `shuffled` in its lower half, so
    # it can be sorted in place. argsort would need half as much memory again.
    packed = np.empty(len(shuffled), np.uint64)
    for start in range(0, len(shuffled), ROWS):
        rows = shuffled[start : start + ROWS]
        end = start + len(rows)
        upper = sortable_bits(keys[rows]).astype(np.uint64)
        lower = np.arange(start, end, dtype=np.uint64)
        packed[start:end] = upper << np.uint64(32) | lower
    packed.sort()

    # the lower halves are the places in sorted order
    order = np.empty_like(shuffled)
    for start in range(0, len(order), ROWS):
        end = start + ROWS
        places = packed[start:end] & np.uint64(0xFFFFFFFF)
        order[start:end] = shuffled[places]
    return order


def sortable_bits(keys):
    """Return integers that sort like the given float32 numbers: uint32."""
    bits = (keys + 0).view(np.uint32)  # + 0 makes -0.0 and 0.0 equal
    # flip all bits of negative numbers, and the sign bit of the others
    is_negative = bits >> 31 == 1
    bits[is_negative] ^= np.uint32(0x7FFFFFFF)
    return bits ^ np.uint32(0x80000000)


def write_ordered(rows, order, path):
    """Write rows[order] to a file, with sequential reads and writes only.

    The rows go into buckets first, each of which can be put in order in memory. Returns (SHA-256
    of the file, how often each token occurs).
    """
    sha = hashlib.sha256()
    token_counts = np.zeros(65536, np.int64)
    buckets = fill_buckets(rows, order, path)
    with open(path, "wb") as f:
        for bucket in progress_bar(buckets, "writing", unit=" buckets"):
            block = read_bucket(bucket, rows.shape[1])
            sha.update(block)
            token_counts += count_tokens(block)
            f.write(block)
            os.remove(bucket)
    return sha.hexdigest(), token_counts


def fill_buckets(rows, order, path):
    """Write each row to the bucket that its place in rows[order] falls into.

    A row in a bucket is its place there, 32 bits as two uint16, and then its tokens. Returns the
    files of the buckets, which lie next to `path`.
    """
    # the place of each row in the file
    place = np.full(len(rows), NOWHERE, np.uint32)
    for start in range(0, len(order), ROWS):
        part = order[start : start + ROWS]
        place[part] = np.arange(start, start + len(part))

    # one pass over the rows, with all buckets open
    seq_len = rows.shape[1]
    rows_per_bucket = max(BUCKET // (2 * seq_len), 1)
    n_buckets = math.ceil(len(order) / rows_per_bucket)
    buckets = [path.with_name(f"bucket{b}") for b in range(n_buckets)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(bucket, "wb")) for bucket in buckets]
        for part in progress_bar(chunks(rows), "sorting", unit=f" x {CHUNK} tokens"):
            places = place[part]
            is_written = places != NOWHERE
            block = rows[part][is_written]
            places = places[is_written]
            bucket_of = places // rows_per_bucket
            for b in np.unique(bucket_of):
                chosen = bucket_of == b
                inside = places[chosen] - np.uint32(b * rows_per_bucket)
                halves = inside.view(np.uint16).reshape(-1, 2)
                files[b].write(np.hstack([halves, block[chosen]]))
    return buckets


def read_bucket(path, seq_len):
    """Return the rows of a bucket in their order: (rows of the bucket, seq_len) uint16."""
    data = np.fromfile(path, np.uint16).reshape(-1, 2 + seq_len)
    halves = data[:, :2].copy()
    places = halves.view(np.uint32).ravel()
    block = np.empty((len(data), seq_len), np.uint16)
    block[places] = data[:, 2:]
    return block


# --------------------------------------------------------------------------------------------------
# A look at a finished data set


def training_rows(folder):
    """Return the rows of train.bin, mapped into memory: (number of rows, seq_len) uint16."""
    seq_len = read_json(folder / "meta.json")["seq_len"]
    tokens = np.memmap(folder / "train.bin", np.uint16, "r")
    return tokens.reshape(-1, seq_len)


def print_summary(folder, token_counts, dropped=()):
    """Print what is in a finished data set.

    token_counts: how often each token occurs in train.bin.
    dropped: beginnings of documents that the filter dropped.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = read_json(folder / "meta.json")
    counts = meta["counts"]
    special_ids = meta["special_ids"].values()

    # sizes
    for what, n in counts.items():
        print(f"  {what}: {n:,}")
    if "characters kept" in counts:
        print(f"  characters per token: {counts['characters kept'] / counts['tokens packed']:.2f}")
    unknown = token_counts[meta["special_ids"]["unk"]]
    print(f"  fraction of <unk>: {unknown / token_counts.sum():.4%}")
    print(f"  train.bin: {meta['train_rows']:,} rows of {meta['seq_len']}", end="")
    print(f", val.bin: {meta['val_rows']:,}")

    # tokens; the longest ones often show what should not be in the corpus
    vocabulary = tokenizer.get_vocab().items()
    tokens = [token for token, i in vocabulary if i not in special_ids]
    tokens.sort(key=lambda token: (-len(token), token))
    print(f"  longest tokens: {' '.join(tokens[:10])}")
    by_frequency = np.argsort(-token_counts)[:10]
    occurring = [int(i) for i in by_frequency if token_counts[i]]
    frequent = [tokenizer.id_to_token(i) or "?" for i in occurring]
    print(f"  most frequent: {' '.join(frequent)}")

    # the filter
    for text in dropped:
        print(f"  dropped by the filter: {text} ...")
    n_dropped = counts.get("documents dropped by the filter", 0)
    if n_dropped > counts.get("documents", 0) / 5:
        print(
            f"warning: filter_ratio = {meta['settings']['filter_ratio']} dropped more than a fifth "
            "of the documents; a small vocabulary needs a larger ratio, or 0"
        )


def print_rows(folder, count):
    """Print the text of some training rows, at equal distances from the first to the last one."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = training_rows(folder)
    count = min(count, len(rows))
    for i in np.linspace(0, len(rows) - 1, count).astype(int):
        text = tokenizer.decode(rows[i].tolist(), skip_special_tokens=False)
        print(f"row {i:,} of {len(rows):,}: {text}\n")
