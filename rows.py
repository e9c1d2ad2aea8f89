"""What happens to packed rows of tokens: repeats are cut out, the training order is made; and a look at finished bins.

Everything here is for files larger than memory, but deduplication, which says beforehand what it needs.
"""

import hashlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

CHUNK = 65536  # rows that are worked on at a time
BUCKET = 1 << 28  # bytes of rows that are put in order at a time


def n_ids(tokenizer):
    return max(tokenizer.get_vocab().values()) + 1  # a given vocabulary may have holes


# ---------------------------------------------------------------------------------------------------------------------
# Deduplication


def window_hashes(tokens, n):
    """(len(tokens) - n + 1,) uint64: a polynomial hash of every run of n tokens, by doubling the width."""
    powers, base, width, done, result = tokens.astype(np.uint64) + np.uint64(1), 0x9E3779B97F4A7C15, 1, 0, None
    while n:
        if n & 1:
            longer = powers[done:][: len(tokens) - done - width + 1]
            result = longer if result is None else result[: len(longer)] * np.uint64(base) + longer
            done += width
        n >>= 1
        if n:
            powers = powers[:-width] * np.uint64(base) + powers[width:]
            base, width = base * base % 2**64, 2 * width
    return result


def repeated(tokens, n, sep):
    """(len(tokens),) bool: the tokens in a later occurrence of a run of n or more, runs that hold a <sep> apart.

    Equal hashes only suggest a repeat; each is then compared token by token.
    """
    mark = np.zeros(len(tokens), bool)
    if len(tokens) <= n:
        return mark
    hashes = np.empty(len(tokens) - n + 1, np.uint64)
    for i in range(0, len(hashes), 1 << 24):
        part = window_hashes(tokens[i : i + (1 << 24) + n - 1], n)
        hashes[i : i + len(part)] = part
    seps = np.concatenate([[0], np.cumsum(tokens == sep, dtype=np.uint32)])
    whole = seps[n:] == seps[: len(hashes)]
    for top in range(16):  # a sixteenth at a time, by the first bits of the hash
        starts = np.flatnonzero(whole & (hashes >> np.uint64(60) == top))
        starts = starts[np.argsort(hashes[starts], kind="stable")]
        later, before = starts[1:], starts[:-1]
        same = hashes[later] == hashes[before]
        later, before = later[same], before[same]
        equal = np.ones(len(later), bool)
        for k in range(n):
            equal &= tokens[later + k] == tokens[before + k]
        for k in range(n):
            mark[later[equal] + k] = True
        for h in np.unique(hashes[later[~equal]]):  # different runs with one hash, mixed: one by one
            seen = set()
            for i in starts[hashes[starts] == h]:
                run = tokens[i : i + n].tobytes()
                mark[i : i + n] |= run in seen
                seen.add(run)
    return mark


def available_memory():
    if os.path.exists("/proc/meminfo"):
        return 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def deduplicate(path, n, seq_len, sep, counts):
    """Rewrites the rows of `path` without the repeats of runs of n tokens. Returns their number."""
    n_tokens = os.path.getsize(path) // 2
    if (need := 24 * n_tokens) > available_memory():
        sys.exit(
            f"prepare.py: dedup_tokens needs about {need / 1e9:.1f} GB of memory, {available_memory() / 1e9:.1f} GB are free; "
            "set dedup_tokens = 0 or max_chars"
        )
    print(f"deduplicating {n_tokens:,} tokens")
    tokens = np.fromfile(path, np.uint16)
    tokens = tokens[~repeated(tokens, n, sep)]
    ends = tokens == sep
    tokens = tokens[~(ends & np.concatenate([[True], ends[:-1]]))]  # documents of which nothing is left
    n_rows = len(tokens) // seq_len
    counts["tokens dropped as repeats"] = n_tokens - len(tokens)
    tokens[: n_rows * seq_len].tofile(path)
    return n_rows


# ---------------------------------------------------------------------------------------------------------------------
# Order


def order_table(rows, order, tokenizer, sep):
    """(vocab_size,) float: summed over a row's tokens it is the row's sort key, smallest first. None for a shuffle."""
    size = n_ids(tokenizer)
    if order == "sentence_length":  # most full stops first: many short sentences [repo]
        return -(np.arange(size) == tokenizer.token_to_id(".")).astype(float)
    if order == "fragment":  # most ends of documents first
        return -(np.arange(size) == sep).astype(float)
    if order == "word_length":  # fewest decoded characters first
        tokens = [tokenizer.id_to_token(i) or "" for i in range(size)]
        space = any(t.startswith("##") for t in tokens)  # in other kinds of vocabularies it is a character of the token
        return np.array([len(t) - 2 if t.startswith("##") else len(t) + space for t in tokens], float)
    if order in ("unigram", "reverse_unigram"):  # rarest tokens first, or last; add-one smoothing [repo]
        n = np.ones(size)
        for i in range(0, len(rows), CHUNK):
            n += np.bincount(rows[i : i + CHUNK].ravel(), minlength=size)
        return np.log2(n / n.sum()) * (1 if order == "unigram" else -1)
    return None


def training_order(rows, table, seed):
    """(number of rows,) int64: the order of the rows by their key, smallest first, ties and all else shuffled."""
    key = np.random.default_rng(seed).integers(1 << 32, size=len(rows), dtype=np.uint64)
    if table is not None:
        sums = np.empty(len(rows), np.float32)
        for i in range(0, len(rows), CHUNK):
            sums[i : i + CHUNK] = table[rows[i : i + CHUNK]].sum(1)
        if np.ptp(sums) == 0 and len(sums) > 1:
            sys.exit("prepare.py: the `order` does not tell the rows apart; are its tokens in them? See insert_sep")
        bits = (sums + np.float32(0)).view(np.int32)  # + 0 turns -0 into 0
        bits ^= (bits >> 31) & 0x7FFFFFFF  # integers in the order of the floats
        key |= (bits.astype(np.int64) + (1 << 31)).astype(np.uint64) << np.uint64(32)
    return np.argsort(key)


def write_ordered(rows, permutation, path):
    """Writes rows[permutation], by sequential reads and writes alone: first into buckets that fit into memory.

    Returns (sha256, how often each token occurs).
    """
    rank = np.full(len(rows), -1, np.int64)
    rank[permutation] = np.arange(len(permutation))
    width, per_bucket = rows.shape[1], max(BUCKET // (2 * rows.shape[1]), 1)
    buckets = [path.with_name(f"bucket{i}") for i in range(-(-len(permutation) // per_bucket))]
    files = [open(b, "wb") for b in buckets]
    for i in tqdm(range(0, len(rows), CHUNK), "sorting", unit=f" x {CHUNK} rows", disable=None):
        to = rank[i : i + CHUNK]
        for b in np.unique(to[to >= 0] // per_bucket):
            pick = to // per_bucket == b
            place = (to[pick] - b * per_bucket).astype(np.uint32)  # travels in front of its row, as two uint16
            np.concatenate([place.view(np.uint16).reshape(-1, 2), rows[i : i + CHUNK][pick]], axis=1).tofile(files[b])
    sha, n = hashlib.sha256(), np.zeros(65536, np.int64)
    with open(path, "wb") as f:
        for bucket, file in tqdm(zip(buckets, files), "writing", len(buckets), unit=" buckets", disable=None):
            file.close()
            data = np.fromfile(bucket, np.uint16).reshape(-1, width + 2)
            block = np.empty((len(data), width), np.uint16)
            block[np.ascontiguousarray(data[:, :2]).view(np.uint32)[:, 0]] = data[:, 2:]
            sha.update(block)
            n += np.bincount(block.ravel(), minlength=65536)
            block.tofile(f)
            os.remove(bucket)
    return sha.hexdigest(), n


# ---------------------------------------------------------------------------------------------------------------------
# A look at a finished data set


def show_rows(folder, count):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = json.loads((folder / "meta.json").read_text())
    rows = np.memmap(folder / "train.bin", np.uint16, "r").reshape(-1, meta["seq_len"])
    for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int):
        print(f"row {i:,} of {len(rows):,}: {tokenizer.decode(rows[i].tolist(), skip_special_tokens=False)}\n")


def show_overlap(folder, glue):
    """Counts the dev sentences of GLUE (8 tokens or more) that stand, normalised alike, inside a training row."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = json.loads((folder / "meta.json").read_text())
    rows = np.memmap(folder / "train.bin", np.uint16, "r").reshape(-1, meta["seq_len"])
    starts, files = {}, sorted(Path(glue).expanduser().glob("*/dev*.tsv"))  # {hash of the first 8 tokens: [(file, ids)]}
    if not files:
        sys.exit(f"prepare.py: overlap = {glue!r} holds no GLUE (CoLA/dev.tsv and so on)")
    total, hits = Counter(), {str(file): set() for file in files}
    for file in files:
        cells = {c for line in file.read_text(errors="replace").splitlines()[1:] for c in line.split("\t") if " " in c}
        for cell, encoding in zip(cells, tokenizer.encode_batch_fast(list(cells), add_special_tokens=False)):
            if len(encoding.ids) >= 8:
                total[str(file)] += 1
                ids = np.array(encoding.ids, np.uint16)
                starts.setdefault(int(window_hashes(ids[:8], 8)[0]), []).append((str(file), cell, ids))
    wanted = np.array(sorted(starts), np.uint64)
    for i in tqdm(range(0, len(rows), CHUNK // 4), "searching", disable=None):
        block = np.array(rows[i : i + CHUNK // 4])
        found = window_hashes(block.ravel(), 8)
        for at in np.flatnonzero(np.isin(found, wanted)):
            row = block[at // block.shape[1]]
            for file, cell, ids in starts[int(found[at])]:
                if np.array_equal(row[at % len(row) :][: len(ids)], ids):
                    hits[file].add(cell)
    for file in hits:
        print(f"{file}: {len(hits[file]):,} of {total[file]:,} sentences are in {folder}")
