"""Turn text into bins: python prepare.py config/demo.py

1. Read all sources once into one spool file, which other data sets of the same text use again, and
   hold out the documents with the smallest hashes.
2. Train a vocabulary on a sample of the other documents.
3. Tokenize: the held-out documents become the validation rows. Drop the others that compress badly,
   join the rest with <sep>, and cut the tokens into rows of seq_len.
4. Cut out repeats if asked to, and write the rows in training order, so that training reads them
   sequentially.

The result is data/<dataset>/ with train.bin and val.bin (rows of uint16 token ids), tokenizer.json,
meta.json and config.json. It is made in data/<dataset>.tmp, which is renamed when it is complete.
`python -m tools.inspect_data data/<dataset>` shows a finished data set.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np

from nanocram.configurator import Stage, configure
from nanocram.docs_corpus import TASK_CHARS, write_tasks
from nanocram.faults import (
    Fault,
    lock,
    read_json,
    replace_file,
    run_script,
    sha256_of,
    write_json,
)
from nanocram.progress import progress_bar
from nanocram.rows import (
    SENTENCE_ENDS,
    deduplicate,
    order_table,
    print_rows,
    print_summary,
    require_memory,
    write_training_rows,
)
from nanocram.sources import (
    check_sources,
    expected_chars,
    has_docs,
    mix_sources,
    source_stamps,
)
from nanocram.spool import (
    load_reading,
    read_sample,
    read_spool,
    require_disk,
    save_reading,
    split_rows,
    write_spool,
)
from nanocram.tokenizer import (
    Losses,
    encode_ahead,
    load_tokenizer,
    special_ids,
    train_tokenizer,
    vocab_size_of,
    warn_of_unknown,
)

dataset = "demo"  # name of the corpus: the bins are written to data/<dataset>

# text
# "docs", files, folders or globs, or dicts: {"files": ...} or what datasets.load_dataset takes
sources = ["docs"]
# {blank_line, line, file} what ends a document in a .txt file
txt_document = "blank_line"
max_chars = 0  # [0, inf) characters to read in all, 0 = everything

# vocabulary
tokenizer_kind = "wordpiece"  # {wordpiece, bpe, unigram} kind of the vocabulary
vocab_size = 32768  # [16, 65536] entries of the vocabulary, special tokens included
# a given tokenizer.json, or one on the hub as owner/dataset/path/in/it.json; or that of a model:
# the folder of a run or of a Hugging Face BERT, or a hub id; empty = train one
tokenizer_file = ""
# [1, inf) raw characters, sampled from all, that the vocabulary is trained on
tokenizer_chars = 400_000_000
lowercase = True  # normaliser: lower-case the text
strip_accents = True  # normaliser: e for é
ascii_only = True  # normaliser: drop what is not ASCII

# rows
seq_len = 128  # [1, 65536] tokens per row
val_rows = 2048  # [1, inf) rows held out for validation
max_rows = 0  # [0, inf) training rows to keep after ordering, 0 = all
insert_sep = True  # end each document with <sep>
insert_cls = False  # begin each document with <cls>
# [0, inf) drop documents with more tokens per normalised character than this, and documents of
# which the normaliser deletes more than a third of the letters, 0 = off
filter_ratio = 0.0
# [0, inf) cut out every later occurrence of a run of this many tokens, 0 = off
dedup_tokens = 0
# {shuffle, sentence_length, unigram, reverse_unigram, word_length, fragment} order of training rows
order = "shuffle"
seed = 1337  # [0, inf) seed of shuffles and samples

# --------------------------------------------------------------------------------------------------

# characters per token, for sizes before there is a vocabulary
CHARS_PER_TOKEN = 8  # more than any vocabulary reaches
DEDUP_CHARS_PER_TOKEN = 3  # less than most vocabularies reach
ORDER_CHARS = 10_000_000  # characters by the end of which an order must have shown its meaning
# characters per second of one core: an AMD EPYC, on 100 M characters of Wikipedia and books
READ_SPEED = 40e6  # by one process, whatever the number of cores
TRAIN_SPEED = 7e6
ENCODE_SPEED = 6e6
BYTES_PER_CHAR = 2  # of disk: the text, and its tokens twice
PACK_TOKENS = 1 << 18  # tokens that are joined before they are written
SHORT = 500  # characters of a document; those of books and articles have more
READING_KEYS = ("sources", "txt_document", "max_chars", "seed", "val_rows", "seq_len")
VOCABULARY_KEYS = ("tokenizer_kind", "vocab_size", "tokenizer_chars")
VOCABULARY_KEYS += ("lowercase", "strip_accents", "ascii_only", "seed")
DROPPED = ("without tokens", "dropped by the filter")  # documents that are read and not kept
N_EXAMPLES = 3  # dropped documents of which the summary shows the beginning


# --------------------------------------------------------------------------------------------------
# 1. Read


def read_sources(folder, entries, config, counts):
    """Read all sources into folder/spool, and a sample for the vocabulary into folder/sample.

    Returns (documents that are held out, the smallest hash first; limit of the sample).
    """
    # there is no vocabulary yet that could count tokens, so hold out enough for any
    budget = config["val_rows"] * config["seq_len"] * CHARS_PER_TOKEN
    if has_docs(entries):
        budget += TASK_CHARS
    documents = mix_sources(entries, config["seed"], config["txt_document"], counts)
    if config["order"] == "sentence_length":
        documents = require_sentences(documents, config["ascii_only"])
    sample_chars = 0 if config["tokenizer_file"] else config["tokenizer_chars"]
    held, sample_limit = write_spool(
        folder,
        documents,
        budget,
        sample_chars,
        config["seed"],
        config["max_chars"],
        expected_chars(entries, config["max_chars"]),
        counts,
    )

    # hold out at most a fifth of a small corpus
    if not held:
        problems = "".join(f"; {what}: {n:,}" for what, n in counts.items())
        raise Fault(f"the sources {config['sources']} hold no text{problems}")
    while len(held) > 1 and n_chars_of(held) > counts["characters"] / 5:
        held.pop()
    if next(read_spool(folder / "spool", held[-1].hash), None) is None:
        raise Fault(
            f"the {counts['documents']:,} documents of the corpus are all one text, which is held "
            "out for validation; add other text"
        )
    warn_of_documents(config["txt_document"], counts)
    return held, sample_limit


def warn_of_documents(txt_document, counts):
    """Print a warning if the documents look as if they were cut, or decoded, in the wrong way."""
    n = counts["documents"]
    if counts["documents with broken UTF-8"] > n / 10:
        print(
            f"warning: {counts['documents with broken UTF-8']:,} documents are not in UTF-8; are "
            "they in Latin-1? Convert them: iconv -f latin1 -t utf-8"
        )
    if counts["documents of .txt files"] > n / 2 and counts["characters"] < SHORT * n:
        print(
            f"warning: documents have {counts['characters'] // n} characters on average with "
            f"txt_document={txt_document}; if each .txt file is one document, say "
            "txt_document=file"
        )


def require_sentences(documents, ascii_only):
    """Yield the documents. Raise Fault if the first of them have no sentence ends to order by."""
    ends = "." if ascii_only else SENTENCE_ENDS
    n_chars = 0
    has_ends = False
    for text, label in documents:
        if isinstance(text, str) and not has_ends:
            n_chars += len(text)
            has_ends = any(end in text for end in ends)
            if n_chars > ORDER_CHARS and not has_ends:
                break
        yield text, label
    if n_chars and not has_ends:
        hint = "; ascii_only=True deletes those of other scripts" if ascii_only else ""
        raise Fault(
            f"order=sentence_length finds no sentence end in the first {n_chars:,} characters"
            f"{hint}; set another order"
        )


def n_chars_of(held):
    """Return how many characters the held-out documents have together."""
    return sum(len(document.text) for document in held)


# --------------------------------------------------------------------------------------------------
# 2. Vocabulary


def make_tokenizer(kept, cutoff, n_chars, config):
    """Train a tokenizer on a sample of the documents in kept/spool that are not held out.

    cutoff: hash up to which documents are held out.
    n_chars: characters of the others.
    """
    fraction = min(config["tokenizer_chars"] / n_chars, 1)
    return train_tokenizer(
        functools.partial(read_sample, kept, cutoff, fraction, config["seed"]),
        config["tokenizer_kind"],
        config["vocab_size"],
        config["lowercase"],
        config["strip_accents"],
        config["ascii_only"],
    )


# --------------------------------------------------------------------------------------------------
# 3. Tokens


def write_validation(path, tokenizer, encoded, config):
    """Write the first held-out documents as at most val_rows rows.

    encoded: pairs of (text, token ids).
    Returns (documents that it takes, rows).
    """
    # take documents until the rows are full
    n_needed = config["val_rows"] * config["seq_len"]
    n_marks = int(config["insert_cls"]) + int(config["insert_sep"])
    n_taken = 0
    n_tokens = 0
    documents = []
    for _, tokens in encoded:
        n_taken += 1
        if len(tokens):
            documents.append(tokens)
            n_tokens += len(tokens) + n_marks
        if n_tokens >= n_needed:
            break

    # write them
    marked = with_marks(documents, tokenizer, config["insert_cls"], config["insert_sep"])
    n_rows = pack(path, marked, config["seq_len"]) // config["seq_len"]
    if not n_rows:
        raise Fault(
            "the documents that are held out do not fill one row; add text, or does the normaliser "
            "not suit it?"
        )
    if n_rows < config["val_rows"]:
        print(f"warning: the corpus is small: {n_rows} rows are held out, not {config['val_rows']}")
        return n_taken, n_rows

    # cut off what is more than val_rows
    os.truncate(path, 2 * n_needed)
    return n_taken, config["val_rows"]


def write_unordered(path, tokenizer, texts, config, counts):
    """Tokenize, filter and pack the training documents, in the order in which they come.

    Returns the beginnings of the first few documents that the filter dropped.
    """
    dropped = []
    unk = special_ids(tokenizer)["unk"]
    losses = Losses(tokenizer)
    encoded = encode_ahead(tokenizer, texts)
    kept = filter_documents(encoded, config["filter_ratio"], unk, losses, counts, dropped)
    marked = with_marks(kept, tokenizer, config["insert_cls"], config["insert_sep"])
    counts["tokens packed"] = pack(path, marked, config["seq_len"])
    counts["tokens of the last, partial row"] = counts["tokens packed"] % config["seq_len"]
    return dropped


def filter_documents(encoded, filter_ratio, unk, losses, counts, dropped):
    """Yield the token ids of the documents that are kept, and count the others.

    encoded: pairs of (text, token ids).
    losses: what the normaliser leaves of a text.
    dropped: a list to which the beginnings of the first few dropped documents are appended.
    """
    for text, tokens in encoded:
        n_chars, lost, n_deleted = losses.count(text)
        counts["characters that the normaliser deletes"] += n_deleted
        if not len(tokens):
            counts["documents without tokens"] += 1
            continue

        # many tokens per character: tables, code, other languages; few letters left: other scripts
        compresses_badly = len(tokens) > filter_ratio * n_chars
        if filter_ratio and (compresses_badly or lost > 1 / 3):
            counts["documents dropped by the filter"] += 1
            if len(dropped) < N_EXAMPLES:
                dropped.append(" ".join(text[:100].split()))
            continue

        counts["documents kept"] += 1
        counts["unknown tokens"] += int((tokens == unk).sum())
        counts["characters kept"] += n_chars
        yield tokens


def with_marks(documents, tokenizer, insert_cls, insert_sep):
    """Yield the token ids of the documents, each between <cls> and <sep> if asked for."""
    ids = special_ids(tokenizer)
    cls = np.array([ids["cls"]], np.uint16)
    sep = np.array([ids["sep"]], np.uint16)
    for tokens in documents:
        if insert_cls:
            yield cls
        yield tokens
        if insert_sep:
            yield sep


def pack(path, arrays, seq_len):
    """Join arrays of token ids and write them as rows of seq_len. Return the number of tokens.

    The tokens after the last full row are counted, but not written.
    """
    n_tokens = 0
    waiting = [np.zeros(0, np.uint16)]
    n_waiting = 0
    with open(path, "wb") as f:
        for array in arrays:
            waiting.append(array)
            n_waiting += len(array)
            n_tokens += len(array)
            if n_waiting >= PACK_TOKENS:
                waiting = [write_full_rows(f, waiting, seq_len)]
                n_waiting = len(waiting[0])
        write_full_rows(f, waiting, seq_len)
    return n_tokens


def write_full_rows(f, arrays, seq_len):
    """Write joined arrays up to the last full row. Return the tokens after it."""
    tokens = np.concatenate(arrays)
    end = len(tokens) // seq_len * seq_len
    f.write(tokens[:end])  # not tofile, which does not notice a full disk
    return tokens[end:]


# --------------------------------------------------------------------------------------------------
# Steps 1 to 3: from the sources to val.bin and to `unordered`, the training rows


def rows_from_texts(work, kept, entries, config, counts):
    """Turn texts into rows. Return (tokenizer, beginnings of documents that the filter dropped).

    kept: folder of the spool and of vocabularies, which other data sets share.
    """
    # a given tokenizer that cannot be used is found now, not after hours of reading
    tokenizer = None
    if config["tokenizer_file"]:
        tokenizer = load_tokenizer(config["tokenizer_file"])

    # read
    spool = kept / "spool"
    held = read_or_take(kept, entries, config, counts)
    require_disk(kept, os.path.getsize(spool))

    # vocabulary
    if tokenizer is None:
        file = kept / f"tokenizer-{key_of(config, VOCABULARY_KEYS)}.json"
        if not file.exists():
            n_chars = counts["characters"] - n_chars_of(held)
            trained = make_tokenizer(kept, held[-1].hash, n_chars, config)
            with replace_file(file) as f:
                f.write(trained.to_str(pretty=True).encode())
        tokenizer = load_tokenizer(str(file))
    tokenizer.encode_special_tokens = True  # "<mask>" in a text is text
    require_ends(tokenizer, config["order"])
    print(f"vocabulary: {vocab_size_of(tokenizer):,} entries")

    # validation rows, and tasks made of what they do not need
    encoded = list(encode_ahead(tokenizer, (document.text for document in held)))
    warn_of_unknown(tokenizer, encoded)
    n_val, counts["validation rows"] = write_validation(
        work / "val.bin", tokenizer, encoded, config
    )
    reserved = held[:n_val]
    unused = held[n_val:]
    cutoff = reserved[-1].hash
    returned = []
    if has_docs(entries):
        documentation = [document for document in unused if document.label]
        pairs = [(document.text, document.label) for document in documentation]
        write_tasks(pairs, work / "tasks", config["seed"])
        reserved += documentation
        cutoff = held[-1].hash
        returned = [document.text for document in unused if not document.label]

    # training rows of all others
    texts = itertools.chain(read_spool(spool, cutoff, counts), returned)
    n_chars = counts["characters"] - n_chars_of(reserved)
    texts = with_progress(texts, n_chars)
    dropped = write_unordered(work / "unordered", tokenizer, texts, config, counts)

    # each document that was read is in one place
    counts["documents held out"] -= len(returned)
    parts = [counts[f"documents {what}"] for what in ("kept", "held out", *DROPPED)]
    if sum(parts) != counts["documents"]:
        raise Fault(f"{spool} has changed while it was read; remove {kept}, and start again")
    return tokenizer, dropped


def read_or_take(kept, entries, config, counts):
    """Read the sources, or take what another data set, or a stopped run, has read of them.

    Returns the documents that are held out, the smallest hash first.
    """
    # the spool is complete if what is known of it lies next to it
    if (kept / "reading.json").exists():
        print(f"the text in {kept} is used again; remove that folder to read the sources anew")
        held = load_reading(kept, counts)
    else:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        held, sample_limit = read_sources(kept, entries, config, counts)
        save_reading(kept, held, sample_limit, counts)
    print(f"read {counts['documents']:,} documents, {counts['characters']:,} characters")
    return held


def spool_folder(stamps, config):
    """Return the folder of a text that is kept for other data sets with the same sources.

    Its name says which settings and files it was made of.
    """
    return Path("data/.spool") / key_of({**config, "stamps": stamps}, [*READING_KEYS, "stamps"])


def key_of(config, names):
    """Return a short name for the values of some keys."""
    values = json.dumps([config[name] for name in names])
    return hashlib.sha256(values.encode()).hexdigest()[:12]


def require_ends(tokenizer, order):
    """Raise Fault if an order by sentences cannot be had with this vocabulary."""
    if order == "sentence_length" and not order_table([], order, tokenizer).any():
        raise Fault(
            "order=sentence_length needs the end of a sentence (.) in the vocabulary; set another "
            "order, or a larger vocab_size"
        )


def with_progress(texts, n_chars):
    """Yield the texts, and show how many of their n_chars characters are taken."""
    bar = progress_bar(desc="tokenizing", total=n_chars, unit=" chars", unit_scale=True)
    with bar:
        for text in texts:
            bar.update(len(text))
            yield text


def rows_from_ids(work, entries, config, counts):
    """Copy rows that are tokenized already. Return their tokenizer."""
    # refuse what does not go with token ids
    if any(entry.get("column") != "input_ids" for entry in entries) or not config["tokenizer_file"]:
        raise Fault(
            "tokenized rows (column input_ids) need their tokenizer_file, and no other sources "
            "beside"
        )
    if config["filter_ratio"] or config["max_chars"]:
        raise Fault(
            "filter_ratio and max_chars are for texts; set both to 0 for tokenized rows (input_ids)"
        )

    # copy them
    tokenizer = load_tokenizer(config["tokenizer_file"])
    size = vocab_size_of(tokenizer)
    rows = mix_sources(entries, config["seed"], config["txt_document"], counts)
    split_rows(work, rows, config["seq_len"], size, config["val_rows"], counts)
    os.remove(work / "spool")
    counts["validation rows"] = config["val_rows"]
    return tokenizer


# --------------------------------------------------------------------------------------------------
# 4. Order, and a description


def build(work, kept, entries, stamps, config, settings):
    """Write the whole data set into the folder `work`.

    Returns (how often each token occurs, beginnings of documents that the filter dropped).
    """
    # steps 1 to 3
    counts = Counter()
    dropped = []
    if any(entry.get("column") == "input_ids" for entry in entries):
        tokenizer = rows_from_ids(work, entries, config, counts)
    else:
        tokenizer, dropped = rows_from_texts(work, kept, entries, config, counts)
    tokenizer.encode_special_tokens = True
    tokenizer.save(str(work / "tokenizer.json"))

    # step 4: cut out repeats, and put the rows in order
    unordered = work / "unordered"
    ids = special_ids(tokenizer)
    sep = ids["sep"]
    n_rows = os.path.getsize(unordered) // (2 * config["seq_len"])
    if config["dedup_tokens"]:
        marks = (ids["cls"], sep)
        n_rows = deduplicate(unordered, config["dedup_tokens"], config["seq_len"], marks, counts)
    if not n_rows:
        raise Fault(
            f"not one row of {config['seq_len']} tokens is left of the corpus; "
            "is filter_ratio too small?"
        )
    n_rows, sha, token_counts = write_training_rows(
        work,
        (n_rows, config["seq_len"]),
        config["order"],
        config["max_rows"],
        sep,
        config["seed"],
    )
    os.remove(unordered)
    counts["tokens"] = n_rows * config["seq_len"]

    # describe them
    meta = {
        "vocab_size": vocab_size_of(tokenizer),
        "seq_len": config["seq_len"],
        "special_ids": ids,
        "train_rows": n_rows,
        "val_rows": counts.pop("validation rows"),
        "sha256": {
            "train": sha,
            "val": sha256_of(work / "val.bin"),
            "tokenizer": sha256_of(work / "tokenizer.json"),
        },
        "settings": settings,
        "sources": stamps,
        "counts": {what: int(n) for what, n in counts.items() if n},
    }
    write_json(work / "config.json", config)
    write_json(work / "meta.json", meta)
    return token_counts, dropped


# --------------------------------------------------------------------------------------------------


def settings_of(config):
    """Return (this script's keys with their values, and with their defaults), as JSON has them."""
    keys = Stage(__file__).own
    try:
        settings = json.loads(json.dumps({name: config[name] for name in keys}))
    except TypeError as e:
        raise Fault(
            f"sources hold something that config.json cannot: {e}; use strings and numbers"
        ) from e
    return settings, {name: key.default for name, key in keys.items()}


def is_prepared(folder, settings, defaults):
    """Return whether a data set is there already. Raise Fault if it has other settings."""
    if not (folder / "meta.json").exists():
        if os.path.lexists(folder):
            raise Fault(
                f"{folder} exists, but holds no prepared data; choose another dataset name, "
                "or remove it"
            )
        return False

    # a key that is younger than the data set had its default, and one that is gone does not count
    old = defaults | read_json(folder / "meta.json")["settings"]
    changed = [key for key, value in settings.items() if old[key] != value]
    if changed:
        changes = "; ".join(f"{key} was {old[key]!r}, now {settings[key]!r}" for key in changed)
        raise Fault(
            f"{folder} was prepared otherwise: {changes}; choose another dataset name, or remove it"
        )
    return True


def print_expected(n_chars, tokenizer_chars):
    """Print about how long it takes to prepare a text, and how much disk. 0 characters: unknown."""
    if not n_chars:
        return
    n_cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        n_cores = len(os.sched_getaffinity(0))
    training = min(n_chars, tokenizer_chars) / TRAIN_SPEED
    seconds = n_chars / READ_SPEED + (training + n_chars / ENCODE_SPEED) / n_cores
    cores = "1 core" if n_cores == 1 else f"{n_cores} cores"
    print(
        f"expected: {n_chars / 1e6:,.1f} M characters, about {math.ceil(seconds / 60)} min on "
        f"{cores} (downloads take longer), {BYTES_PER_CHAR * n_chars / 1e6:,.1f} MB of disk"
    )


def make(folder, kept, entries, stamps, config, settings):
    """Make the data set aside, and rename it to `folder`. Returns what build() does."""
    work = Path(f"{folder}.tmp")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up, then end
    try:
        # start anew, even if a killed run has left something
        shutil.rmtree(work, ignore_errors=True)
        n_bytes = expected_chars(entries, config["max_chars"])
        print_expected(n_bytes, config["tokenizer_chars"])
        if not (kept / "reading.json").exists():
            require_disk("data", BYTES_PER_CHAR * n_bytes)
        if config["dedup_tokens"]:
            require_memory(n_bytes // DEDUP_CHARS_PER_TOKEN)

        # all steps, and the final name
        work.mkdir()
        found = build(work, kept, entries, stamps, config, settings)
        for path in work.rglob("*"):
            if path.is_file():
                with open(path, "r+b") as f:  # Windows synchronises only what may be written
                    os.fsync(f.fileno())
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not (kept / "reading.json").exists():
            shutil.rmtree(kept, ignore_errors=True)

    # say what the folder of the text takes
    if kept.exists():
        size = os.path.getsize(kept / "spool")
        print(f"{kept} ({size / 1e9:.1f} GB) keeps the text for other data sets; remove it if done")
    return found


def main(config):
    start = time.monotonic()
    folder = Path("data") / dataset

    # refuse what cannot be, before anything is written
    if not re.fullmatch(r"\w[\w.-]*", dataset):
        raise Fault(f"dataset = {dataset!r} is no plain name for a folder in data/")
    settings, defaults = settings_of(config)
    entries = check_sources(sources)
    if order == "fragment" and not insert_sep:
        raise Fault("order=fragment counts the <sep> at the ends of documents; set insert_sep=True")

    # one process for a data set, and one for a text that several share
    Path("data/.spool").mkdir(parents=True, exist_ok=True)
    stamps = source_stamps(entries)
    kept = spool_folder(stamps, config)
    text = f"the text in {kept}"
    with lock(f"data/.spool/{dataset}.lock", folder), lock(f"{kept}.lock", text):
        if is_prepared(folder, settings, defaults):
            changed = stamps != read_json(folder / "meta.json").get("sources", stamps)
            hint = ", though its sources have changed since" if changed else ""
            print(f"{folder} is already prepared{hint}; remove it to start anew")
            return
        token_counts, dropped = make(folder, kept, entries, stamps, config, settings)

    print_summary(folder, token_counts, dropped)
    print_rows(folder, 1)
    print(f"{folder} is ready after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_script(
        lambda: main(configure(globals())),
        kept="nothing was kept but texts that were read whole, in data/.spool",
    )
