"""Text to bins: python prepare.py config/demo.py  ->  data/<dataset>/{train.bin, val.bin, tokenizer.json, meta.json}

1. Read all sources once into one spool file; put aside the documents with the smallest hashes for validation.
2. Train a WordPiece vocabulary on a sample of the others.
3. Tokenize, drop documents that compress badly, join the rest with <sep> and cut them into rows of seq_len tokens.
4. Write the rows in training order, so that training reads them sequentially.

All of it happens in data/<dataset>.tmp, which is renamed when it is complete.
"""

import glob
import gzip
import hashlib
import heapq
import io
import json
import os
import random
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from configurator import configure, write_json
from package_docs import TASK_CHARS, package_documents, write_tasks

dataset = "demo"  # name of the corpus: the bins are written to data/<dataset>
sources = ["docs"]  # "docs", files, folders or globs of txt, jsonl, csv, parquet, or dicts for datasets.load_dataset
vocab_size = 32768  # [16, 65536] entries of the WordPiece vocabulary, special tokens included
seq_len = 128  # [1, 65536] tokens a row
tokenizer_file = ""  # a given tokenizer.json; empty = train a WordPiece vocabulary on the corpus
tokenizer_chars = 400_000_000  # [1, inf) raw characters, sampled from all, that the vocabulary is trained on
val_rows = 2048  # [1, inf) rows held out for validation
max_chars = 0  # [0, inf) raw characters to read in all, 0 = everything
max_rows = 0  # [0, inf) training rows to keep after ordering, 0 = all
filter_ratio = 0.0  # [0, inf) drop documents with more tokens per raw character than this, 0 = off
order = "shuffle"  # {shuffle, sentence_length, unigram, reverse_unigram, word_length, fragment} of the training rows
insert_sep = True  # end each document with <sep>
insert_cls = False  # begin each document with <cls>
lowercase = True  # normaliser: lower-case the text
strip_accents = True  # normaliser: e for é
ascii_only = True  # normaliser: drop what is not ASCII
seed = 1337  # [0, inf) seed of shuffles and samples

SPECIAL_TOKENS = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
MAX_DOCUMENT = 1_000_000  # characters; a longer text is cut into several documents
CHARS_PER_TOKEN = 8  # more than any vocabulary reaches: sizes the held-out text before there is a vocabulary
CHUNK = 65536  # rows


# ---------------------------------------------------------------------------------------------------------------------
# Sources. Each yields (text, label); the label is the package for "docs" and empty elsewhere


def read_documents(source, counts):
    """All documents of one entry of `sources`. Bad rows are counted, a bad source ends the process with one line."""
    if source == "docs":
        yield from package_documents()
    elif isinstance(source, dict):
        entry = {"split": "train", **source}
        column = entry.pop("column", "text")
        yield from dataset_documents(entry, column, str(entry.get("path")))
    else:
        for path in local_files(source):
            plain = path.removesuffix(".gz").removesuffix(".zst")
            try:
                if plain.endswith((".csv", ".parquet")):
                    entry = {"path": plain.rpartition(".")[2], "data_files": path, "split": "train"}
                    yield from dataset_documents(entry, "text", path)
                else:
                    with open_text(path) as f:
                        yield from json_lines(f, path, counts) if plain.endswith(".jsonl") else blocks(f)
            except (EOFError, gzip.BadGzipFile, zlib.error):
                counts["truncated files"] += 1
                print(f"prepare.py: warning: {path} is truncated or damaged; what could be read of it is used")


def local_files(source):
    """The files of a path or glob, in an order shuffled by the seed."""
    source, known = os.path.expanduser(source), tuple(s + z for s in SUFFIXES for z in ("", ".gz", ".zst"))
    if os.path.isdir(source):
        files = [p for p in glob.glob(f"{glob.escape(source)}/**", recursive=True) if p.endswith(known)]
    else:
        files = [source] if os.path.isfile(source) else [p for p in glob.glob(source, recursive=True) if os.path.isfile(p)]
    if not files:
        sys.exit(f"prepare.py: the source {source!r} is no file, folder or glob that holds any of {', '.join(known)}")
    if odd := [p for p in files if not p.endswith(known)]:
        sys.exit(f"prepare.py: {odd[0]} is of an unknown kind; known are {', '.join(known)}")
    files.sort()
    random.Random(seed).shuffle(files)
    return files


def open_text(path):
    if path.endswith(".gz"):
        raw = gzip.open(path)
    elif path.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            sys.exit(f"prepare.py: {path} needs `pip install zstandard`")
        raw = zstandard.open(path)
    else:
        raw = open(path, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace")


def blocks(lines):
    """Documents of a text file: a blank line ends one, and so does MAX_DOCUMENT."""
    document, size = [], 0
    for line in lines:
        if document and (not line.strip() or size > MAX_DOCUMENT):
            yield "".join(document), ""
            document, size = [], 0
        if line.strip():
            document.append(line)
            size += len(line)
    if document:
        yield "".join(document), ""


def json_lines(lines, path, counts):
    found = False
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            counts["rows that are not JSON"] += 1
            continue
        if isinstance(row, dict) and "text" not in row and not found:
            sys.exit(f"prepare.py: {path} has no column 'text'; its columns: {', '.join(row)}")
        found = found or isinstance(row, dict)
        yield row.get("text") if isinstance(row, dict) else None, ""


def dataset_documents(entry, column, name):
    """Documents of a data set on the hub, or of a file that `datasets` reads, streamed and shuffled through a buffer."""
    import datasets

    try:
        for row in datasets.load_dataset(**entry, streaming=True).shuffle(seed=seed, buffer_size=10_000):
            if column not in row:
                sys.exit(f"prepare.py: {name} has no column {column!r}; its columns: {', '.join(row)}")
            yield row[column], ""
    except Exception as e:
        reason = (str(e).strip() or "no reason given").splitlines()[0]
        hint = "" if "data_files" in entry else "; is the hub reachable, and are path, name and split right?"
        sys.exit(f"prepare.py: cannot read {name}: {type(e).__name__}: {reason}{hint}")


# ---------------------------------------------------------------------------------------------------------------------
# The spool: all documents in one file, separated by NUL, and those that are held out


def pieces(text, size):
    """Cuts a long text at white space, which no token spans; where there is none, anywhere."""
    start = 0
    while len(text) - start > size:
        cut = max(text.rfind(" ", start + 1, start + size), text.rfind("\n", start + 1, start + size))
        cut = start + size if cut < 0 else cut
        yield text[start:cut]
        start = cut
    yield text[start:]


def digest(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def spool(path, counts):
    """Reads all sources into `path`, taking turns by characters read. Returns the held-out [(hash, text, label)], sorted.

    Held out are the documents with the smallest hashes. So the choice depends on the documents alone, whatever their
    order, and an exact copy of a held-out document is known by its hash.
    """
    budget = val_rows * seq_len * CHARS_PER_TOKEN + (TASK_CHARS if "docs" in sources else 0)
    streams = [read_documents(s, counts) for s in sources]
    taken, held, held_chars, hashes = [0] * len(streams), [], 0, set()
    total = max_chars or sum(os.path.getsize(p) for s in sources if isinstance(s, str) and s != "docs" for p in local_files(s))
    with (
        open(path, "wb") as f,
        tqdm(desc="reading", total=total or None, unit=" chars", unit_scale=True, disable=None) as bar,
    ):
        while streams and not (max_chars and counts["characters"] >= max_chars):
            turn = taken.index(min(taken))
            document = next(streams[turn], None)
            if document is None:
                del streams[turn], taken[turn]
                continue
            text, label = document
            if not isinstance(text, str):
                counts["rows without text"] += 1
                continue
            # JSON can hold lone surrogates, which no file can
            text = text.replace("\0", "").encode("utf-8", "replace").decode().strip()
            if not text:
                counts["empty documents"] += 1
                continue
            counts["documents with broken UTF-8"] += "\ufffd" in text
            for part in pieces(text, MAX_DOCUMENT):
                counts["documents"] += 1
                counts["characters"] += len(part)
                taken[turn] += len(part)
                bar.update(len(part))
                f.write(part.encode() + b"\0")
                if (h := digest(part)) in hashes:
                    continue
                heapq.heappush(held, (-h, part, label))
                hashes.add(h)
                held_chars += len(part)
                while held_chars - len(held[0][1]) >= budget:
                    h, out, _ = heapq.heappop(held)
                    hashes.discard(-h)
                    held_chars -= len(out)
    if not held:
        sys.exit(f"prepare.py: the sources {sources} hold no text")
    if counts["characters"] < 5 * held_chars:
        sys.exit(
            f"prepare.py: the corpus has {counts['characters']:,} characters in {counts['documents']:,} documents, too few to "
            f"hold out val_rows = {val_rows} rows of {seq_len} tokens; lower val_rows, or add text"
        )
    return sorted((-h, text, label) for h, text, label in held)


def read_spool(path, cutoff):
    """The documents of the spool, without those that are held out (hash up to cutoff)."""
    rest = b""
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            *documents, rest = (rest + block).split(b"\0")
            for document in documents:
                text = document.decode()
                if digest(text) > cutoff:
                    yield text


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def train_tokenizer(sample):
    """The paper's tokenizer [repo]: normaliser, split at white space and punctuation, WordPiece.

    sample: a function that returns an iterator over texts, the same ones each time.
    """
    steps = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    steps += [normalizers.NFD() if strip_accents else normalizers.NFKC()]
    steps += [normalizers.Lowercase()] * lowercase + [normalizers.StripAccents()] * strip_accents
    steps += [normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Replace(Regex(r"[^\x00-\x7F]+"), "")] * ascii_only
    trained = Tokenizer(models.WordPiece(unk_token="<unk>"))
    trained.normalizer, trained.pre_tokenizer = normalizers.Sequence(steps), pre_tokenizers.Whitespace()

    # The commonest characters, at most a quarter of the vocabulary; texts with others (Wikipedia has thousands) see a space.
    n = np.zeros(sys.maxunicode + 1, np.int64)
    for batch in batches(sample()):
        n += np.bincount(np.frombuffer("".join(batch).encode("utf-32-le"), np.uint32), minlength=len(n))
    forms = {int(c): trained.normalizer.normalize_str(chr(c)) for c in np.flatnonzero(n)}
    counts = Counter('"')  # comes out of `` and ''
    for c, form in forms.items():
        counts.update({x: int(n[c]) for x in form if not x.isspace()})
    alphabet = sorted(sorted(counts, key=lambda x: (-counts[x], x))[: vocab_size // 4])
    rare = {c: " " for c, form in forms.items() if any(x not in alphabet and not x.isspace() for x in form)}

    # The trainer numbers "##c" in the order of a hash table, and ties between merges follow these numbers. As special
    # tokens in sorted order they make the vocabulary the same in each run; the tokenizer proper is then made without them.
    fixed, bar = SPECIAL_TOKENS + [f"##{c}" for c in alphabet], sys.stderr.isatty()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=bar)
    trained.train_from_iterator((t.translate(rare) for t in sample()) if rare else sample(), trainer)
    if (size := trained.get_vocab_size()) != vocab_size:
        sys.exit(
            f"prepare.py: the corpus is too small for vocab_size = {vocab_size}: it gives {size} entries; "
            f"set vocab_size to {size} or less, or add text"
        )
    tokenizer = Tokenizer(models.WordPiece(vocab=trained.get_vocab(), unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<cls>", "<sep>")],
    )
    return tokenizer


def load_tokenizer(path):
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as e:  # tokenizers raises nothing more special
        sys.exit(f"prepare.py: tokenizer_file = {path!r} cannot be read: {e}")
    if n_ids(tokenizer) > 65536:
        sys.exit(f"prepare.py: {path} has {n_ids(tokenizer):,} ids; those over 65,535 do not fit into uint16")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def n_ids(tokenizer):
    return max(tokenizer.get_vocab().values()) + 1  # a given vocabulary may have holes


def special_ids(tokenizer):
    """{pad, unk, cls, sep, mask: id}, found by the names that the paper (<mask>) or BERT ([MASK]) gives them."""
    ids = {}
    for token in SPECIAL_TOKENS:
        name = token[1:-1]
        found = [i for t in (token, f"[{name.upper()}]") if (i := tokenizer.token_to_id(t)) is not None]
        if not found:
            sys.exit(f"prepare.py: the tokenizer {tokenizer_file!r} has neither {token} nor [{name.upper()}]")
        ids[name] = found[0]
    return ids


def encode(tokenizer, documents):
    """Token ids of each document, a list of uint16 arrays."""
    parts = [(i, piece) for i, text in enumerate(documents) for piece in pieces(text, 20_000)]
    ids = [[] for _ in documents]
    for (i, _), encoding in zip(parts, tokenizer.encode_batch_fast([p for _, p in parts], add_special_tokens=False)):
        ids[i].append(np.array(encoding.ids, np.uint16))
    return [np.concatenate(arrays) for arrays in ids]


def batches(texts, size=1 << 20):
    """Groups of documents of about `size` characters together."""
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= size:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def pack(path, tokenizer, texts, ids, counts, ratio, total):
    """Tokenizes, filters and joins the documents; writes full rows of seq_len tokens to `path`. Returns their number."""
    head, tail = [np.uint16([ids["cls"]])] * insert_cls, [np.uint16([ids["sep"]])] * insert_sep
    rest, n_rows, todo = np.zeros(0, np.uint16), 0, batches(texts)
    bar = tqdm(desc="tokenizing", total=total, unit=" chars", unit_scale=True, disable=None)
    with open(path, "wb") as f, ThreadPoolExecutor(1) as pool, bar:
        batch = next(todo, None)
        job = pool.submit(encode, tokenizer, batch or [])
        while batch is not None:
            documents, encoded, batch = batch, job.result(), next(todo, None)
            job = pool.submit(encode, tokenizer, batch or [])  # encode the next batch while this one is written
            parts = [rest]
            for text, tokens in zip(documents, encoded):
                bar.update(len(text))
                if not len(tokens):
                    counts["documents without tokens"] += 1
                    continue
                if ratio and len(tokens) > ratio * len(text):
                    counts["documents dropped by the filter"] += 1
                    continue
                counts["unknown tokens"] += int((tokens == ids["unk"]).sum())
                counts["characters kept"] += len(text)
                counts["tokens"] += len(tokens) + len(head) + len(tail)
                parts += [*head, tokens, *tail]
            joined = np.concatenate(parts)
            full = len(joined) // seq_len
            joined[: full * seq_len].tofile(f)
            n_rows, rest = n_rows + full, joined[full * seq_len :]
    return n_rows


# ---------------------------------------------------------------------------------------------------------------------
# Order


def order_table(rows, tokenizer, ids):
    """(vocab_size,) float: summed over a row's tokens it is the row's sort key, smallest first. None for a shuffle."""
    size = n_ids(tokenizer)
    if order == "sentence_length":  # most full stops first: many short sentences [repo]
        return -(np.arange(size) == tokenizer.token_to_id(".")).astype(float)
    if order == "fragment":  # most ends of documents first
        return -(np.arange(size) == ids["sep"]).astype(float)
    if order == "word_length":  # fewest decoded characters first
        tokens = [tokenizer.id_to_token(i) or "" for i in range(size)]
        return np.array([len(t) - 2 if t.startswith("##") else len(t) + 1 for t in tokens], float)
    if order in ("unigram", "reverse_unigram"):  # rarest tokens first, or last; add-one smoothing [repo]
        n = np.ones(size)
        for i in range(0, len(rows), CHUNK):
            n += np.bincount(rows[i : i + CHUNK].ravel(), minlength=size)
        return np.log2(n / n.sum()) * (1 if order == "unigram" else -1)
    return None


def write_ordered(rows, table, path):
    """Writes (rows, seq_len) in training order, ties in shuffled order. Returns (number of rows, sha256)."""
    permutation = np.random.default_rng(seed).permutation(len(rows))
    if table is not None:
        keys = np.concatenate([table[rows[i : i + CHUNK]].sum(1) for i in range(0, len(rows), CHUNK)])
        if np.ptp(keys) == 0 and len(keys) > 1:
            sys.exit(f"prepare.py: order = {order!r} does not tell the rows apart; are its tokens in them? See insert_sep")
        permutation = permutation[np.argsort(keys[permutation], kind="stable")]
    permutation = permutation[: max_rows or None]
    sha = hashlib.sha256()
    with open(path, "wb") as f:
        for i in tqdm(range(0, len(permutation), CHUNK), "ordering", unit=f" x {CHUNK} rows", disable=None):
            block = rows[permutation[i : i + CHUNK]].tobytes()
            sha.update(block)
            f.write(block)
    return len(permutation), sha.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------


def build(work, config, settings):
    """Writes the whole data set into the folder `work`."""
    counts = Counter()
    held = spool(work / "spool", counts)
    texts = [text for _, text, _ in held]
    cutoff, total = held[-1][0], counts["characters"] - sum(map(len, texts))
    print(f"read {counts['documents']:,} documents, {counts['characters']:,} characters")

    if tokenizer_file:
        tokenizer = load_tokenizer(tokenizer_file)
    else:

        def sample():
            rng = random.Random(seed)
            return (t for t in read_spool(work / "spool", cutoff) if rng.random() < tokenizer_chars / total)

        tokenizer = train_tokenizer(sample)
    tokenizer.encode_special_tokens = True  # "<mask>" in a text is text
    tokenizer.save(str(work / "tokenizer.json"))
    ids = special_ids(tokenizer)
    print(f"vocabulary: {n_ids(tokenizer):,} entries")

    lengths = [len(tokens) and len(tokens) + insert_cls + insert_sep for tokens in encode(tokenizer, texts)]
    n_val = int(np.searchsorted(np.cumsum(lengths), val_rows * seq_len)) + 1  # documents that fill the rows
    n_rows = pack(work / "val.bin", tokenizer, texts[:n_val], ids, Counter(), 0, None)
    if n_rows < val_rows:
        sys.exit(
            f"prepare.py: the held-out documents fill {n_rows} of {val_rows} val_rows; does the normaliser suit the text?"
        )
    os.truncate(work / "val.bin", val_rows * seq_len * 2)
    if "docs" in sources:
        write_tasks([(text, label) for _, text, label in held[n_val:] if label], work / "tasks", seed)
    else:
        cutoff, total = held[n_val - 1][0], counts["characters"] - sum(map(len, texts[:n_val]))  # the others train

    n_rows = pack(work / "unordered", tokenizer, read_spool(work / "spool", cutoff), ids, counts, filter_ratio, total)
    if not n_rows:
        sys.exit(f"prepare.py: not one row of {seq_len} tokens is left of the corpus; is filter_ratio too small?")
    rows = np.memmap(work / "unordered", np.uint16, "r", shape=(n_rows, seq_len))
    n_rows, sha = write_ordered(rows, order_table(rows, tokenizer, ids), work / "train.bin")
    del rows
    os.remove(work / "spool")
    os.remove(work / "unordered")

    counts = {k: int(v) for k, v in counts.items() if v}
    meta = {
        "vocab_size": n_ids(tokenizer),
        "seq_len": seq_len,
        "special_ids": ids,
        "train_rows": n_rows,
        "val_rows": val_rows,
        "sha256": {"train": sha},
        "settings": settings,
        "counts": counts,
    }
    for name, file in {"val": "val.bin", "tokenizer": "tokenizer.json"}.items():
        meta["sha256"][name] = hashlib.sha256((work / file).read_bytes()).hexdigest()
    write_json(work / "config.json", config)
    write_json(work / "meta.json", meta)

    for what, number in counts.items():
        print(f"  {what}: {number:,}")
    print(f"  characters per token: {counts['characters kept'] / counts['tokens']:.2f}")
    print(f"  train.bin: {n_rows:,} rows of {seq_len}, val.bin: {val_rows:,}")
    if counts.get("documents dropped by the filter", 0) > counts["documents"] / 5:
        print(f"prepare.py: warning: filter_ratio = {filter_ratio} dropped more than a fifth of the documents; "
              "a small vocabulary needs a larger ratio, or 0")  # fmt: skip
    row = np.fromfile(work / "train.bin", np.uint16, seq_len)
    print(f"  the first one: {tokenizer.decode(row.tolist(), skip_special_tokens=False)[:300]} ...")


def main(config):
    start, folder = time.monotonic(), Path("data") / dataset
    if not re.fullmatch(r"\w[\w.-]*", dataset):
        sys.exit(f"prepare.py: dataset = {dataset!r} is no plain name for a folder in data/")
    try:
        settings = json.loads(json.dumps({k: v for k, v in config.items() if k in globals()}))
    except TypeError as e:
        sys.exit(f"prepare.py: sources hold something that config.json cannot: {e}; use strings and numbers")
    if odd := [s for s in sources if not isinstance(s, (str, dict))]:
        sys.exit(f"prepare.py: the source {odd[0]!r} is neither a path nor a dict for datasets.load_dataset")
    if (folder / "meta.json").exists():
        old = json.loads((folder / "meta.json").read_text())["settings"]
        if changed := [f"{k} was {old.get(k)!r}, now {v!r}" for k, v in settings.items() if old.get(k) != v]:
            sys.exit(
                f"prepare.py: {folder} was prepared otherwise: {'; '.join(changed)}; choose another dataset name, or remove it"
            )
        print(f"{folder} is already prepared; remove it to start anew")
        return
    if os.path.lexists(folder):
        sys.exit(f"prepare.py: {folder} exists, but holds no prepared data; choose another dataset name, or remove it")
    work = Path(f"{folder}.tmp")
    try:
        shutil.rmtree(work, ignore_errors=True)  # what a killed run left
        work.mkdir(parents=True)
        build(work, config, settings)
        for file in work.rglob("*"):
            if file.is_file():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
        os.replace(work, folder)
    except OSError as e:
        sys.exit(f"prepare.py: {e.strerror or e}: {e.filename or work}; nothing was kept")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; nothing was kept")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{folder} is ready after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    config = configure(__file__)
    globals().update({k: v for k, v in config.items() if k in globals()})
    main(config)
