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

CHUNK = 1 << 23  # tokens that are worked on at a time
BUCKET = 1 << 28  # bytes of rows that are put in order at a time


def chunks(rows):
    """Slices of `rows` (n, seq_len) of about CHUNK tokens."""
    size = max(CHUNK // rows.shape[1], 1)
    return [slice(i, i + size) for i in range(0, len(rows), size)]


def special_token(tokenizer, name):
    """What the tokenizer calls its pad, unk, cls, sep or mask: <mask> as the paper, or [MASK] as BERT; None if neither."""
    return next((t for t in (f"<{name}>", f"[{name.upper()}]") if tokenizer.token_to_id(t) is not None), None)


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

    Later is what begins behind the end of the first occurrence. Equal hashes only suggest a repeat; each is then compared
    token by token.
    """
    mark = np.zeros(len(tokens), bool)
    if len(tokens) <= n:
        return mark
    hashes = np.empty(len(tokens) - n + 1, np.uint64)
    for i in range(0, len(hashes), CHUNK):
        part = window_hashes(tokens[i : i + CHUNK + n - 1], n)
        hashes[i : i + len(part)] = part
    seps = np.zeros(len(tokens) + 1, np.uint32)
    np.cumsum(tokens == sep, out=seps[1:])
    part = np.where(seps[n:] == seps[: len(hashes)], hashes >> np.uint64(60), 16).astype(np.uint8)
    del seps
    for sixteenth in range(16):
        starts = np.flatnonzero(part == sixteenth)
        starts = starts[np.argsort(hashes[starts], kind="stable")]
        h = hashes[starts]
        new = np.concatenate([[True], h[1:] != h[:-1]])[: len(h)]
        first = starts[np.maximum.accumulate(np.where(new, np.arange(len(h)), 0))] if len(h) else starts
        later, first = starts[~new], first[~new]
        equal = np.ones(len(later), bool)
        for k in range(n):
            equal &= tokens[later + k] == tokens[first + k]
        repeat = later[equal & (later >= first + n)]
        for k in range(n):
            mark[repeat + k] = True
        for h in np.unique(hashes[later[~equal]]):  # different runs with one hash: one by one
            seen = {}
            for i in starts[hashes[starts] == h].tolist():
                mark[i : i + n] |= i >= seen.setdefault(tokens[i : i + n].tobytes(), i) + n
    return mark


def available_memory():
    if not os.path.exists("/proc/meminfo"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    group = Path("/sys/fs/cgroup")  # of a container, which may have less than the machine
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return free


def require_memory(n_tokens):
    """SystemExit if there is too little for deduplicate."""
    if (need := 40 * n_tokens) > (free := available_memory()):
        sys.exit(
            f"prepare.py: dedup_tokens needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            "set dedup_tokens = 0 or max_chars"
        )


def deduplicate(path, n, seq_len, sep, counts):
    """Rewrites the rows of `path` without the repeats of runs of n tokens. Returns their number."""
    n_tokens = os.path.getsize(path) // 2
    require_memory(n_tokens)
    print(f"deduplicating {n_tokens:,} tokens")
    tokens = np.fromfile(path, np.uint16)
    tokens = tokens[~repeated(tokens, n, sep)]
    ends = tokens == sep
    tokens = tokens[~(ends & np.concatenate([[True], ends[:-1]]))]  # documents of which nothing is left
    n_rows = len(tokens) // seq_len
    counts["tokens dropped as repeats"] = n_tokens - len(tokens)
    with open(path, "wb") as f:
        f.write(tokens[: n_rows * seq_len])
    return n_rows


# ---------------------------------------------------------------------------------------------------------------------
# Order


def order_table(rows, order, tokenizer, sep):
    """(vocab_size,) float: summed over a row's tokens it is the row's sort key, smallest first. None for a shuffle."""
    size = n_ids(tokenizer)
    if order == "sentence_length":  # most full stops first: many short sentences [repo]
        stops = [tokenizer.token_to_id(token) for token in (".", "▁.")]  # alone; with the space, as BPE has it
        return -np.isin(np.arange(size), [i for i in stops if i is not None]).astype(float)
    if order == "fragment":  # most ends of documents first
        return -(np.arange(size) == sep).astype(float)
    if order == "word_length":  # fewest decoded characters first
        tokens = [tokenizer.id_to_token(i) or "" for i in range(size)]
        space = any(t.startswith("##") for t in tokens)  # in other kinds of vocabularies it is a character of the token
        return np.array([len(t) - 2 if t.startswith("##") else len(t) + space for t in tokens], float)
    if order in ("unigram", "reverse_unigram"):  # rarest tokens first, or last; add-one smoothing [repo]
        n = np.ones(size)
        for part in chunks(rows):
            n += np.bincount(rows[part].ravel(), minlength=size)
        return np.log2(n / n.sum()) * (1 if order == "unigram" else -1)
    return None


def training_order(rows, table, seed):
    """(number of rows,) uint32: the order of the rows by their key, smallest first, ties and all else shuffled."""
    order = np.arange(len(rows), dtype=np.uint32)
    np.random.default_rng(seed).shuffle(order)
    if table is not None:
        keys = np.empty(len(rows), np.float32)
        for part in chunks(rows):
            keys[part] = table[rows[part]].sum(1)
        if np.ptp(keys) == 0 and len(keys) > 1:
            sys.exit("prepare.py: the `order` does not tell the rows apart; are its tokens in them? See insert_sep")
        # key and place in the shuffled order in one number, sorted in place: argsort would need half as much memory again
        packed = np.empty(len(rows), np.uint64)
        for i in range(0, len(rows), 1 << 20):
            bits = (keys[order[i : i + (1 << 20)]] + 0).view(np.uint32)  # no -0.0
            bits ^= np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))  # integers that sort as the floats do
            packed[i : i + len(bits)] = bits.astype(np.uint64) << np.uint64(32)
            packed[i : i + len(bits)] |= np.arange(i, i + len(bits), dtype=np.uint64)
        del keys
        packed.sort()
        shuffled, order = order, np.empty_like(order)
        for i in range(0, len(order), 1 << 20):
            order[i : i + (1 << 20)] = shuffled[packed[i : i + (1 << 20)] & np.uint64(0xFFFFFFFF)]
    return order


def write_ordered(rows, order, path):
    """Writes rows[order], by sequential reads and writes alone: first into buckets that fit into memory.

    Returns (sha256, how often each token occurs).
    """
    nowhere = np.iinfo(np.uint32).max
    place = np.full(len(rows), nowhere, np.uint32)  # of each row in the file
    for i in range(0, len(order), 1 << 20):
        place[order[i : i + (1 << 20)]] = np.arange(i, min(i + (1 << 20), len(order)))
    width, per_bucket = rows.shape[1], max(BUCKET // (2 * rows.shape[1]), 1)
    buckets = [path.with_name(f"bucket{i}") for i in range(-(-len(order) // per_bucket))]
    files = [open(b, "wb") for b in buckets]
    for part in tqdm(chunks(rows), "sorting", unit=f" x {CHUNK} tokens", disable=None):
        block, to = rows[part], place[part]
        for b in np.unique(to[to != nowhere] // per_bucket):
            pick = (to // per_bucket == b) & (to != nowhere)
            inside = to[pick] - np.uint32(b * per_bucket)  # travels in front of its row, as two uint16
            files[b].write(np.concatenate([inside.view(np.uint16).reshape(-1, 2), block[pick]], axis=1))
    sha, n = hashlib.sha256(), np.zeros(65536, np.int64)
    with open(path, "wb") as f:
        for bucket, file in tqdm(zip(buckets, files), "writing", len(buckets), unit=" buckets", disable=None):
            file.close()
            data = np.fromfile(bucket, np.uint16).reshape(-1, width + 2)
            block = np.empty((len(data), width), np.uint16)
            block[np.ascontiguousarray(data[:, :2]).view(np.uint32)[:, 0]] = data[:, 2:]
            del data
            sha.update(block)
            for part in chunks(block):
                n += np.bincount(block[part].ravel(), minlength=65536)
            f.write(block)
            os.remove(bucket)
    return sha.hexdigest(), n


def write_training_rows(work, shape, order, max_rows, sep, seed):
    """work/unordered, rows of this shape, to work/train.bin in order. Returns (rows written, sha256, count of each token)."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    rows = np.memmap(work / "unordered", np.uint16, "r", shape=shape)
    permutation = training_order(rows, order_table(rows, order, tokenizer, sep), seed)[: max_rows or None]
    return len(permutation), *write_ordered(rows, permutation, work / "train.bin")


# ---------------------------------------------------------------------------------------------------------------------
# A look at a finished data set


def show_rows(folder, count):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = json.loads((folder / "meta.json").read_text())
    rows = np.memmap(folder / "train.bin", np.uint16, "r").reshape(-1, meta["seq_len"])
    for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int):
        print(f"row {i:,} of {len(rows):,}: {tokenizer.decode(rows[i].tolist(), skip_special_tokens=False)}\n")


def show_summary(folder, n, dropped):
    """What came out. n: how often each token occurs in train.bin; dropped: beginnings of texts that the filter dropped."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = json.loads((folder / "meta.json").read_text())
    counts, special = meta["counts"], meta["special_ids"]
    for what, number in counts.items():
        print(f"  {what}: {number:,}")
    if "characters kept" in counts:
        print(f"  characters per token: {counts['characters kept'] / counts['tokens']:.2f}")
    print(f"  share of <unk>: {n[special['unk']] / n.sum():.4%}")
    print(f"  train.bin: {meta['train_rows']:,} rows of {meta['seq_len']}, val.bin: {meta['val_rows']:,}")
    vocabulary = [t for t, i in tokenizer.get_vocab().items() if i not in special.values()]
    print(f"  longest tokens: {' '.join(sorted(vocabulary, key=lambda t: (-len(t), t))[:10])}")
    print(f"  most frequent: {' '.join(tokenizer.id_to_token(int(i)) or '?' for i in np.argsort(-n)[:10] if n[i])}")
    for text in dropped:
        print(f"  dropped by the filter: {text} ...")
    if counts.get("documents dropped by the filter", 0) > counts.get("documents", 0) / 5:
        print(
            f"prepare.py: warning: filter_ratio = {meta['settings']['filter_ratio']} dropped more than a fifth of the "
            "documents; a small vocabulary needs a larger ratio, or 0"
        )
    show_rows(folder, 1)


def show_overlap(folder, glue):
    """Counts the dev sentences of GLUE (8 tokens or more) that stand, normalised alike, whole in a training row."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta = json.loads((folder / "meta.json").read_text())
    rows = np.memmap(folder / "train.bin", np.uint16, "r").reshape(-1, meta["seq_len"])
    starts, files = {}, sorted(Path(glue).expanduser().glob("*/dev*.tsv"))  # {hash of the first 8 tokens: [(file, ids)]}
    if not files:
        sys.exit(f"prepare.py: overlap = {glue!r} holds no GLUE (CoLA/dev.tsv and so on)")
    total, hits = Counter(), {str(file): set() for file in files}
    for file in files:
        header, *lines = (line.split("\t") for line in file.read_text("utf-8", "replace").split("\n"))
        columns = [i for i, name in enumerate(header) if re.fullmatch(r"sentence[12]?|question[12]?|#[12] String", name)]
        lines += [header] * (not columns)  # CoLA has no header
        cells = sorted({line[i] for line in lines for i in columns or [3] if i < len(line)})
        for cell, encoding in zip(cells, tokenizer.encode_batch_fast(cells, add_special_tokens=False)):
            if len(encoding.ids) >= 8:
                total[str(file)] += 1
                ids = np.array(encoding.ids, np.uint16)
                starts.setdefault(int(window_hashes(ids[:8], 8)[0]), []).append((str(file), cell, ids))
    wanted = np.array(sorted(starts), np.uint64)
    for part in tqdm(chunks(rows), "searching", disable=None):
        block = np.array(rows[part])
        found = window_hashes(block.ravel(), 8)
        for at in np.flatnonzero(np.isin(found, wanted)):
            row = block[at // block.shape[1]]
            for file, cell, ids in starts[int(found[at])]:
                if np.array_equal(row[at % len(row) :][: len(ids)], ids):
                    hits[file].add(cell)
    for file in hits:
        print(f"{file}: {len(hits[file]):,} of {total[file]:,} sentences of 8 tokens or more are whole in a row of {folder}")
