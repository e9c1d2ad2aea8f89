"""Show a finished data set: python -m tools.inspect_data data/demo --rows=3 --overlap=data/glue

Prints the summary that prepare.py ends with, and some training rows as text. With --overlap it also
counts the sentences of GLUE that are in the training rows, and leaves the result in meta.json, from
which the scorecard says whether the corpus is free of downstream data.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from nanocram.faults import Fault, read_json, run_script, write_json
from nanocram.progress import progress_bar
from nanocram.rows import (
    chunks,
    count_tokens,
    print_rows,
    print_summary,
    training_rows,
    window_hashes,
)
from nanocram.rules import overlap_verdict

N_TOKENS = 8  # of a sentence, at least; shorter ones are in many texts by chance
TEXT_COLUMN = re.compile(r"sentence[12]?|question[12]?|#[12] String")  # in a header of GLUE
# In these tasks only one text was written for the data set. The other one is from raw text, such as
# Wikipedia, which may well be in a corpus.
WRITTEN_COLUMN = {"QNLI": "question", "MNLI": "sentence2", "RTE": "sentence2"}
COLA_COLUMN = 3  # CoLA has no header, but for its test set


def sentences_of(path):
    """Return the different sentences in a table of GLUE, sorted."""
    # find the columns of text
    lines = [line.split("\t") for line in path.read_text("utf-8", "replace").split("\n")]
    pattern = WRITTEN_COLUMN.get(path.parent.name, TEXT_COLUMN)
    columns = [i for i, name in enumerate(lines[0]) if re.fullmatch(pattern, name.strip())]
    if columns:
        lines = lines[1:]
    else:
        columns = [COLA_COLUMN]

    # a damaged line may be too short
    sentences = set()
    for line in lines:
        sentences.update(line[i] for i in columns if i < len(line))
    return sorted(sentences)


def find_sentences(rows, sentences):
    """Return which of the sentences are in the rows, whole or cut by the end of a row.

    rows: (number of rows, seq_len) uint16, in any order, so that the other part of a sentence that
    is cut may be anywhere. It counts if a row has at least half of it, and N_TOKENS tokens.
    sentences: {anything: its token ids}, of at least N_TOKENS each.
    """
    # index the sentences by the hashes of their first and of their last tokens
    by_hash = {}
    for name, ids in sentences.items():
        for start in {0, len(ids) - N_TOKENS}:
            part = ids[start : start + N_TOKENS]
            key = int(window_hashes(part, N_TOKENS)[0])
            by_hash.setdefault(key, []).append((name, start))
    wanted = np.array(sorted(by_hash), np.uint64)

    # look up every run of tokens, and compare what is around it
    found = set()
    seq_len = rows.shape[1]
    for part in progress_bar(chunks(rows), "searching"):
        tokens = np.array(rows[part]).ravel()
        hashes = window_hashes(tokens, N_TOKENS)
        for at in np.flatnonzero(np.isin(hashes, wanted)):
            for name, start in by_hash[int(hashes[at])]:
                ids = sentences[name]
                if name not in found and is_there(tokens, at - start, at, ids, seq_len):
                    found.add(name)
    return found


def is_there(tokens, at, window, ids, seq_len):
    """Return whether a sentence is at a place, whole or as far as one row has it.

    tokens: rows one after the other. at: where the sentence would begin, which may be before them.
    window: where N_TOKENS of its tokens are, as their hash says.
    """
    # whole, in one row or in two that follow each other
    end = at + len(ids)
    if at >= 0 and np.array_equal(tokens[at:end], ids):
        return True

    # its beginning at the end of the row, or its end at the beginning: the other part is elsewhere
    row = window // seq_len
    low = max(at, row * seq_len)
    high = min(end, (row + 1) * seq_len)
    needed = max(N_TOKENS, min(len(ids), seq_len) / 2)
    return high - low >= needed and np.array_equal(tokens[low:high], ids[low - at : high - at])


def find_overlap(folder, rows, glue):
    """Print and return {table of GLUE: [sentences that are in the training rows, all of them]}.

    Sentences and rows are normalised alike, since both are compared as token ids.
    """
    glue = Path(glue).expanduser()
    files = sorted(path for path in glue.glob("*/*.tsv") if re.match("train|dev|test", path.name))
    if not files:
        raise Fault(f"overlap = {str(glue)!r} holds no GLUE (CoLA/dev.tsv and so on)")

    # {(file, sentence): token ids} of the sentences that are long enough
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sentences = {}
    for file in files:
        texts = sentences_of(file)
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings):
            if len(encoding.ids) >= N_TOKENS:
                sentences[file, text] = np.array(encoding.ids, np.uint16)

    # count per table; a sentence that is in two tables counts in both
    found = find_sentences(rows, sentences)
    n_found = Counter(file for file, _ in found)
    n_all = Counter(file for file, _ in sentences)
    overlap = {}
    for file in files:
        overlap[str(file.relative_to(glue))] = [n_found[file], n_all[file]]
        what = f"sentences of {N_TOKENS} tokens or more"
        print(f"{file}: {n_found[file]:,} of {n_all[file]:,} {what} are in {folder}")
    return overlap


def main(argv=None):
    # read the command line
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the data set, data/NAME")
    parser.add_argument("--rows", type=int, default=3, help="training rows to print")
    parser.add_argument(
        "--overlap", metavar="GLUE", help="folder of GLUE, to look for its sentences"
    )
    args = parser.parse_args(argv)

    # show the data set
    if not (args.folder / "meta.json").exists():
        raise Fault(f"{args.folder} holds no prepared data; run prepare.py first")
    rows = training_rows(args.folder)
    print_summary(args.folder, count_tokens(rows))
    print_rows(args.folder, args.rows)
    if args.overlap:
        overlap = find_overlap(args.folder, rows, args.overlap)
        path = args.folder / "meta.json"
        write_json(path, read_json(path) | {"overlap": overlap})
        verdict = overlap_verdict(overlap)
        print(f"{path} has it now. Raw text, no downstream data: {verdict['verdict']}")


if __name__ == "__main__":
    run_script(main)
