"""Text to bins: python prepare.py config/demo.py  ->  data/<dataset>/{train.bin, val.bin, tokenizer.json, meta.json}

1. Read all sources once into one spool file; put aside the documents with the smallest hashes for validation.
2. Train a vocabulary on a sample of the others.
3. Tokenize, drop documents that compress badly, join the rest with <sep>, cut out what is there twice if asked to, and cut
   the tokens into rows of seq_len.
4. Write the rows in training order, so that training reads them sequentially.

All of it happens in data/<dataset>.tmp, which is renamed when it is complete. Of a finished data set, --peek=3 prints some
rows, and --overlap=FOLDER counts the dev sentences of GLUE that are in it.
"""

import hashlib
import heapq
import itertools
import json
import os
import random
import re
import shutil
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from configurator import configure, one_line, write_json
from package_docs import TASK_CHARS, write_tasks
from rows import deduplicate, n_ids, require_memory, show_overlap, show_rows, show_summary, special_token, write_training_rows
from sources import check_sources, local_files, read_documents

dataset = "demo"  # name of the corpus: the bins are written to data/<dataset>
sources = ["docs"]  # "docs", files, folders or globs, or dicts: {"files": ...} or what datasets.load_dataset takes
txt_document = "blank_line"  # {blank_line, line, file} what is a document in a .txt file: up to a blank line, a line, all
tokenizer_kind = "wordpiece"  # {wordpiece, bpe, unigram} kind of the vocabulary
vocab_size = 32768  # [16, 65536] entries of the vocabulary, special tokens included
seq_len = 128  # [1, 65536] tokens a row
tokenizer_file = ""  # a given tokenizer.json, or one on the hub as owner/dataset/path/in/it.json; empty = train one
tokenizer_chars = 400_000_000  # [1, inf) raw characters, sampled from all, that the vocabulary is trained on
val_rows = 2048  # [1, inf) rows held out for validation
max_chars = 0  # [0, inf) raw characters to read in all, 0 = everything
max_rows = 0  # [0, inf) training rows to keep after ordering, 0 = all
filter_ratio = 0.0  # [0, inf) drop documents with more tokens per raw character than this, 0 = off
dedup_tokens = 0  # [0, inf) cut out every later occurrence of a run of so many tokens, 0 = off
order = "shuffle"  # {shuffle, sentence_length, unigram, reverse_unigram, word_length, fragment} of the training rows
insert_sep = True  # end each document with <sep>
insert_cls = False  # begin each document with <cls>
plain_quotes = True  # normaliser: " for `` and ''
lowercase = True  # normaliser: lower-case the text
strip_accents = True  # normaliser: e for é
ascii_only = True  # normaliser: drop what is not ASCII
seed = 1337  # [0, inf) seed of shuffles and samples
peek = 0  # [0, inf) rows to print of a finished data set
overlap = ""  # folder of GLUE, to count its dev sentences in a finished data set

SPECIAL_TOKENS = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]
NON_ASCII = r"[^\x00-\x7F]+"
BLOCK = 1 << 24  # bytes of the spool that are read at a time
MAX_DOCUMENT = 1_000_000  # characters; a longer text is cut into several documents
CHARS_PER_TOKEN = 8  # more than any vocabulary reaches: sizes the held-out text before there is a vocabulary


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


def digest(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class HeldOut:
    """Those with the smallest hashes of all that is added, as few as weigh `budget` together, each content once.

    So the choice depends on the contents alone, whatever their order, and an exact copy of one is known by its hash.
    """

    def __init__(self, budget):
        self.budget, self.weight, self.heap, self.hashes = budget, 0, [], set()

    def add(self, data, weight, *item):
        if (h := digest(data)) in self.hashes:
            return
        heapq.heappush(self.heap, (-h, weight, *item))
        self.hashes.add(h)
        self.weight += weight
        while self.weight - self.heap[0][1] >= self.budget:
            h, weight, *_ = heapq.heappop(self.heap)
            self.hashes.discard(-h)
            self.weight -= weight

    def sorted(self):
        """[(hash, item ...)], the smallest hash first."""
        return sorted((-h, *item) for h, _, *item in self.heap)


def documents(counts):
    """(document, label) of all sources, in turns: each has its share, by `weight`, of the characters or token ids."""
    entries = check_sources(sources)
    streams = [read_documents(entry, seed, txt_document, counts) for entry in entries]
    weights = [entry.get("weight", 1.0) for entry in entries]
    taken = [0.0] * len(streams)
    while streams:
        turn = taken.index(min(taken))
        document = next(streams[turn], None)
        if document is not None:
            taken[turn] += len(document[0] or "") / weights[turn] if isinstance(document[0], (str, list)) else 0
            yield document
        elif any("weight" in entry for entry in entries):
            print(f"source {turn + 1} of {len(sources)} has ended; to keep the proportions, the corpus ends with it")
            return
        else:
            del streams[turn], taken[turn], weights[turn]


def expected_bytes():
    """Size of the text that will be read as far as it is known, at most max_chars; 0 where it is not."""
    files = [entry["files"] for entry in check_sources(sources) if entry.get("files", "docs") != "docs"]
    packed = (".gz", ".zst", ".parquet")
    size = sum(os.path.getsize(p) * (4 if p.endswith(packed) else 1) for f in files for p in local_files(f))
    return min(size, max_chars) if max_chars and len(files) == len(sources) else max_chars or size


def with_docs():
    return any(entry.get("files") == "docs" for entry in check_sources(sources))


def spool(path, counts):
    """Reads all sources into `path`. Returns the held-out [(hash, text, label)], sorted."""
    held = HeldOut(val_rows * seq_len * CHARS_PER_TOKEN + (TASK_CHARS if with_docs() else 0))
    bar = tqdm(desc="reading", total=expected_bytes() or None, unit=" chars", unit_scale=True, disable=None)
    with open(path, "wb") as f, bar:
        for text, label in documents(counts):
            if not isinstance(text, str):
                counts["rows without text"] += 1
                continue
            # JSON can hold lone surrogates, which no file can
            try:
                text = text.replace("\0", "").strip()
                text.encode()
            except UnicodeEncodeError:
                counts["documents with lone surrogates"] += 1
                text = text.encode("utf-8", "replace").decode()
            if not text:
                counts["empty documents"] += 1
                continue
            counts["documents with broken UTF-8"] += "\ufffd" in text
            for part in pieces(text, MAX_DOCUMENT):
                counts["documents"] += 1
                counts["characters"] += len(part)
                bar.update(len(part))
                data = part.encode()
                f.write(data + b"\0")
                held.add(data, len(part), part, label)
            if max_chars and counts["characters"] >= max_chars:
                break
    if not held.heap:
        why = "".join(f"; {what}: {n:,}" for what, n in counts.items())
        sys.exit(f"prepare.py: the sources {sources} hold no text{why}")
    if counts["characters"] < 5 * held.weight:
        sys.exit(
            f"prepare.py: the corpus has {counts['characters']:,} characters in {counts['documents']:,} documents, too few to "
            f"hold out val_rows = {val_rows} rows of {seq_len} tokens; lower val_rows, or add text"
        )
    return held.sorted()


def read_spool(path, cutoff):
    """The documents of the spool, without those that are held out (hash up to cutoff)."""
    rest = b""
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            *documents, rest = (rest + block).split(b"\0")
            for document in documents:
                if digest(document) > cutoff:
                    yield document.decode()


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def train_tokenizer(sample):
    """The paper's tokenizer [repo]: normaliser, split at white space and punctuation, WordPiece; or BPE or Unigram.

    sample: a function that returns an iterator over texts, the same ones each time.
    """
    steps = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')] * plain_quotes
    steps += [normalizers.NFD() if strip_accents else normalizers.NFKC()]
    steps += [normalizers.Lowercase()] * lowercase + [normalizers.StripAccents()] * strip_accents
    steps += [normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Replace(Regex(NON_ASCII), "")] * ascii_only
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
    common = set(sorted(counts, key=lambda x: (-counts[x], x))[: vocab_size // 4])
    rare = {c: " " for c, form in forms.items() if any(x not in common and not x.isspace() for x in form)}
    alphabet = sorted(common)

    texts = lambda: (t.translate(rare) for t in sample()) if rare else sample()  # noqa: E731
    if tokenizer_kind != "wordpiece":
        return train_bpe_or_unigram(texts(), trained.normalizer, alphabet)
    # The trainer numbers "##c" in the order of a hash table, and ties between merges follow these numbers. As special
    # tokens in sorted order they make the vocabulary the same in each run; the tokenizer proper is then made without them.
    fixed, bar = SPECIAL_TOKENS + [f"##{c}" for c in alphabet], sys.stderr.isatty()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=bar)
    trained.train_from_iterator(texts(), trainer)
    require_size(trained.get_vocab_size())
    tokenizer = Tokenizer(models.WordPiece(vocab=trained.get_vocab(), unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return with_template(tokenizer)


def train_bpe_or_unigram(texts, normalizer, alphabet):
    """The paper's ablations of the tokenizer; the first token of a word begins with a "▁"."""
    common = {"vocab_size": vocab_size, "special_tokens": SPECIAL_TOKENS, "initial_alphabet": alphabet}
    common["show_progress"] = sys.stderr.isatty()
    if tokenizer_kind == "bpe":
        tokenizer, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(**common)
    else:
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="<unk>", **common)
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoders.Metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace()])
    tokenizer.train_from_iterator(texts, trainer)
    require_size(tokenizer.get_vocab_size())
    if tokenizer_kind == "unigram":  # its scores are sums in the order of a hash table: the last digits differ
        n = len(SPECIAL_TOKENS)
        pieces = [(piece, round(score, 3)) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
        pieces[n:] = sorted(pieces[n:], key=lambda p: (-p[1], p[0]))
        tokenizer.model = models.Unigram(pieces, unk_id=SPECIAL_TOKENS.index("<unk>"))
    return with_template(tokenizer)


def require_size(size):
    if size != vocab_size:
        sys.exit(
            f"prepare.py: the corpus is too small for vocab_size = {vocab_size}: it gives {size} entries; "
            f"set vocab_size to {size} or less, or add text" + "; ascii_only=True drops all other scripts" * ascii_only
        )


def with_template(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<cls>", "<sep>")],
    )
    return tokenizer


def load_tokenizer(path):
    path = os.path.expanduser(path)
    try:
        if path.count("/") >= 2 and not os.path.exists(path.split("/")[0] or "/"):
            from huggingface_hub import hf_hub_download

            owner, name, inside = path.split("/", 2)
            path = hf_hub_download(f"{owner}/{name}", inside, repo_type="dataset")
        tokenizer = Tokenizer.from_file(path)
    except Exception as e:  # tokenizers raises nothing more special
        sys.exit(f"prepare.py: tokenizer_file = {tokenizer_file!r} cannot be read: {one_line(e)}")
    if n_ids(tokenizer) > 65536:
        sys.exit(f"prepare.py: {path} has {n_ids(tokenizer):,} ids; those over 65,535 do not fit into uint16")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_ids(tokenizer):
    """{pad, unk, cls, sep, mask: id}."""
    ids = {}
    for name in ("pad", "unk", "cls", "sep", "mask"):
        token = special_token(tokenizer, name)
        if token is None:
            sys.exit(f"prepare.py: the tokenizer {tokenizer_file!r} has neither <{name}> nor [{name.upper()}]")
        ids[name] = tokenizer.token_to_id(token)
    return ids


def ascii_tokenizer(tokenizer):
    """The same without those steps of the normaliser that leave ASCII text as it is, which take a third of the time."""
    spec = json.loads(tokenizer.to_str())
    steps = (spec["normalizer"] or {}).get("normalizers", [])
    if json.dumps([steps, spec["added_tokens"]], ensure_ascii=False).isascii():  # or ASCII could turn into other text
        idle = [{"type": form} for form in ("NFC", "NFD", "NFKC", "NFKD", "StripAccents")]
        idle += [{"type": "Replace", "pattern": {"Regex": NON_ASCII}, "content": ""}]
        steps[:] = [step for step in steps if step not in idle]
    plain = Tokenizer.from_str(json.dumps(spec))
    plain.encode_special_tokens = tokenizer.encode_special_tokens
    return plain


def splits_at_spaces(tokenizer):
    """Whether white space ends every token, so that a text may be cut there."""
    spec = json.loads(tokenizer.to_str())["pre_tokenizer"] or {"type": None}
    return spec.get("pretokenizers", [spec])[0]["type"] in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")


def encode(tokenizer, plain, size, documents):
    """Token ids of each document, a list of uint16 arrays. plain: ascii_tokenizer(tokenizer); size: of the pieces."""
    parts = [(i, part) for i, text in enumerate(documents) for part in pieces(text, size)]
    encodings = {}
    for some, ascii in ((plain, True), (tokenizer, False)):
        index = [k for k, (_, part) in enumerate(parts) if part.isascii() == ascii]
        encodings |= zip(index, some.encode_batch_fast([parts[k][1] for k in index], add_special_tokens=False))
    ids = [[] for _ in documents]
    for k, (i, _) in enumerate(parts):
        ids[i].append(np.array(encodings[k].ids, np.uint16))
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


def encode_ahead(tokenizer, texts, threads=3):
    """(documents, their token ids) a batch. With three in work the cores stay busy while ids are made into arrays."""
    plain, jobs, size = ascii_tokenizer(tokenizer), deque(), 2_000 if splits_at_spaces(tokenizer) else MAX_DOCUMENT
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches(texts):
            jobs.append((batch, pool.submit(encode, tokenizer, plain, size, batch)))
            if len(jobs) > threads:
                batch, job = jobs.popleft()
                yield batch, job.result()
        for batch, job in jobs:
            yield batch, job.result()


def pack(path, tokenizer, texts, ids, counts, ratio, total):
    """Tokenizes, filters and joins the documents; writes full rows of seq_len tokens to `path`.

    Returns their number, and the beginnings of the first few documents that were dropped.
    """
    dropped = []
    head, tail = [np.uint16([ids["cls"]])] * insert_cls, [np.uint16([ids["sep"]])] * insert_sep
    rest, n_rows = np.zeros(0, np.uint16), 0
    bar = tqdm(desc="tokenizing", total=total, unit=" chars", unit_scale=True, disable=None)
    with open(path, "wb") as f, bar:
        for documents, encoded in encode_ahead(tokenizer, texts):
            parts = [rest]
            for text, tokens in zip(documents, encoded):
                bar.update(len(text))
                if not len(tokens):
                    counts["documents without tokens"] += 1
                    continue
                if ratio and len(tokens) > ratio * len(text):
                    counts["documents dropped by the filter"] += 1
                    dropped += [" ".join(text[:100].split())] * (len(dropped) < 3)
                    continue
                counts["unknown tokens"] += int((tokens == ids["unk"]).sum())
                counts["characters kept"] += len(text)
                counts["tokens"] += len(tokens) + len(head) + len(tail)
                parts += [*head, tokens, *tail]
            joined = np.concatenate(parts)
            full = len(joined) // seq_len
            f.write(joined[: full * seq_len])  # numpy's tofile would not notice a full disk
            n_rows, rest = n_rows + full, joined[full * seq_len :]
    counts["tokens of the last, partial row"] = len(rest)
    return n_rows, dropped


def copy_rows(work, size, counts):
    """Rows that are tokenized already: to val.bin those with the smallest hashes, the others to `unordered`.

    size: ids of the tokenizer. Returns the number of the others.
    """
    held = HeldOut(val_rows)
    with open(work / "spool", "wb") as f:
        for row, _ in tqdm(documents(counts), "reading", unit=" rows", unit_scale=True, disable=None):
            if not isinstance(row, list) or not all(type(i) is int for i in row):
                counts["rows without token ids"] += 1
                continue
            if len(row) != seq_len:
                sys.exit(f"prepare.py: a row of the source has {len(row)} tokens, not seq_len = {seq_len}")
            if not 0 <= min(row) <= max(row) < size:
                sys.exit(f"prepare.py: a row of the source has an id outside [0, {size}), the tokenizer's")
            data = np.array(row, np.uint16).tobytes()
            f.write(data)
            held.add(data, 1, data)
    validation, n_rows = held.sorted(), 0
    if len(validation) < val_rows:
        sys.exit(f"prepare.py: the sources have {len(validation)} different rows, too few for val_rows = {val_rows}")
    (work / "val.bin").write_bytes(b"".join(data for _, data in validation))
    with open(work / "spool", "rb") as spool, open(work / "unordered", "wb") as f:
        while data := spool.read(2 * seq_len):
            if digest(data) > validation[-1][0]:
                f.write(data)
                n_rows += 1
    counts["tokens"] = n_rows * seq_len
    return n_rows


# ---------------------------------------------------------------------------------------------------------------------


def build(work, config, settings):
    """Writes the whole data set into the folder `work`. Returns what the summary needs beside it."""
    counts = Counter()
    columns = {entry.get("column", "text") for entry in check_sources(sources)}
    if "input_ids" in columns:
        if columns != {"input_ids"} or not tokenizer_file:
            sys.exit("prepare.py: tokenized rows (column input_ids) need their tokenizer_file, and no other sources beside")
        if filter_ratio or max_chars:
            sys.exit("prepare.py: filter_ratio and max_chars are for texts; set both to 0 for tokenized rows (input_ids)")
        tokenizer = load_tokenizer(tokenizer_file)
        ids, dropped = special_ids(tokenizer), []
        n_rows = copy_rows(work, n_ids(tokenizer), counts)
    else:
        tokenizer, ids, n_rows, dropped = tokenize(work, counts)
    os.remove(work / "spool")
    tokenizer.encode_special_tokens = True  # "<mask>" in a text is text
    tokenizer.save(str(work / "tokenizer.json"))
    if dedup_tokens:
        n_rows = deduplicate(work / "unordered", dedup_tokens, seq_len, ids["sep"], counts)
    if not n_rows:
        sys.exit(f"prepare.py: not one row of {seq_len} tokens is left of the corpus; is filter_ratio too small?")
    n_rows, sha, n = write_training_rows(work, (n_rows, seq_len), order, max_rows, ids["sep"], seed)
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

    return n, dropped


def tokenize(work, counts):
    """From the sources to val.bin and `unordered`: (tokenizer, special ids, rows in `unordered`, some dropped texts)."""
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file else None
    if tokenizer:
        special_ids(tokenizer)  # ends here, and not after hours, if one is missing
    held = spool(work / "spool", counts)
    texts = [text for _, text, _ in held]
    cutoff, total = held[-1][0], counts["characters"] - sum(map(len, texts))
    print(f"read {counts['documents']:,} documents, {counts['characters']:,} characters")

    if not tokenizer:

        def sample():
            rng = random.Random(seed)
            return (t for t in read_spool(work / "spool", cutoff) if rng.random() < tokenizer_chars / total)

        tokenizer = train_tokenizer(sample)
    tokenizer.encode_special_tokens = True
    ids = special_ids(tokenizer)
    print(f"vocabulary: {n_ids(tokenizer):,} entries")

    encoded = (tokens for _, batch in encode_ahead(tokenizer, texts) for tokens in batch)
    lengths = [len(tokens) and len(tokens) + insert_cls + insert_sep for tokens in encoded]
    n_val = int(np.searchsorted(np.cumsum(lengths), val_rows * seq_len)) + 1  # documents that fill the rows
    n_rows, _ = pack(work / "val.bin", tokenizer, texts[:n_val], ids, Counter(), 0, None)
    if n_rows < val_rows:
        sys.exit(
            f"prepare.py: the held-out documents fill {n_rows} of {val_rows} val_rows; does the normaliser suit the text?"
        )
    os.truncate(work / "val.bin", val_rows * seq_len * 2)
    if with_docs():
        write_tasks([(text, label) for _, text, label in held[n_val:] if label], work / "tasks", seed)
    else:
        cutoff, total = held[n_val - 1][0], counts["characters"] - sum(map(len, texts[:n_val]))  # the others train
    # of other sources beside "docs", what validation does not need trains
    back = [text for _, text, label in held[n_val:] if not label and with_docs()]
    texts = itertools.chain(read_spool(work / "spool", cutoff), back)
    return tokenizer, ids, *pack(work / "unordered", tokenizer, texts, ids, counts, filter_ratio, total)


def look(folder):
    if peek:
        show_rows(folder, peek)
    if overlap:
        show_overlap(folder, overlap)


def main(config):
    start, folder = time.monotonic(), Path("data") / dataset
    if not re.fullmatch(r"\w[\w.-]*", dataset):
        sys.exit(f"prepare.py: dataset = {dataset!r} is no plain name for a folder in data/")
    try:
        settings = {k: v for k, v in config.items() if k in globals() and k not in ("peek", "overlap")}
        settings = json.loads(json.dumps(settings))
    except TypeError as e:
        sys.exit(f"prepare.py: sources hold something that config.json cannot: {e}; use strings and numbers")
    check_sources(sources)
    if (folder / "meta.json").exists() and (peek or overlap):
        return look(folder)
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
        Path("data").mkdir(exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)  # what a killed run left
        # the text and its tokens at once, which a small vocabulary makes as large; later the tokens, twice
        if (need := 2 * expected_bytes()) > (free := shutil.disk_usage("data").free):
            sys.exit(f"prepare.py: {need / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free; lower max_chars")
        if dedup_tokens:
            require_memory(expected_bytes() // CHARS_PER_TOKEN)
        work.mkdir(parents=True)
        made = build(work, config, settings)
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
    show_summary(folder, *made)
    print(f"{folder} is ready after {time.monotonic() - start:.0f} s")
    look(folder)


if __name__ == "__main__":
    config = configure(__file__)
    globals().update({k: v for k, v in config.items() if k in globals()})
    main(config)
