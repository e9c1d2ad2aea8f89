"""Show a finished data set: python -m tools.inspect_data data/demo --rows=3 --overlap=data/glue

Prints the summary that prepare.py ends with, and some training rows as text. With --overlap it also
counts the dev sentences of GLUE that are in the training rows.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from nanocram.faults import Fault, run_script
from nanocram.rows import (
    chunks,
    count_tokens,
    print_rows,
    print_summary,
    training_rows,
    window_hashes,
)

N_TOKENS = 8  # of a sentence, at least; shorter ones are in many texts by chance
TEXT_COLUMN = re.compile(r"sentence[12]?|question[12]?|#[12] String")  # in a header of GLUE
COLA_COLUMN = 3  # CoLA has no header


def sentences_of(path):
    """Return the different sentences in a table of GLUE, sorted."""
    # find the columns of text
    lines = [line.split("\t") for line in path.read_text("utf-8", "replace").split("\n")]
    columns = [i for i, name in enumerate(lines[0]) if TEXT_COLUMN.fullmatch(name)]
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
    """Return which of the sentences are whole in one row.

    rows: (number of rows, seq_len) uint16.
    sentences: {anything: its token ids}, of at least N_TOKENS each.
    """
    # index the sentences by the hash of their first tokens
    begins_with = {}
    for name, ids in sentences.items():
        beginning = int(window_hashes(ids[:N_TOKENS], N_TOKENS)[0])
        begins_with.setdefault(beginning, []).append(name)
    wanted = np.array(sorted(begins_with), np.uint64)

    # look up every run of tokens, and compare the rest of the row
    found = set()
    seq_len = rows.shape[1]
    for part in tqdm(chunks(rows), "searching", disable=None):
        block = np.array(rows[part])
        hashes = window_hashes(block.ravel(), N_TOKENS)
        for at in np.flatnonzero(np.isin(hashes, wanted)):
            rest = block[at // seq_len, at % seq_len :]
            for name in begins_with[int(hashes[at])]:
                ids = sentences[name]
                if np.array_equal(rest[: len(ids)], ids):
                    found.add(name)
    return found


def print_overlap(folder, rows, glue):
    """Print, for each table, how many dev sentences of GLUE are whole in a training row.

    Sentences and rows are normalised alike, since both are compared as token ids.
    """
    files = sorted(Path(glue).expanduser().glob("*/dev*.tsv"))
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
    for file in files:
        total = sum(name == file for name, _ in sentences)
        hits = sum(name == file for name, _ in found)
        what = f"sentences of {N_TOKENS} tokens or more"
        print(f"{file}: {hits:,} of {total:,} {what} are whole in a row of {folder}")


def main(argv=None):
    # read the command line
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the data set, data/NAME")
    parser.add_argument("--rows", type=int, default=3, help="training rows to print")
    parser.add_argument(
        "--overlap", metavar="GLUE", help="folder of GLUE, to look for its dev sets"
    )
    args = parser.parse_args(argv)

    # show the data set
    if not (args.folder / "meta.json").exists():
        raise Fault(f"{args.folder} holds no prepared data; run prepare.py first")
    rows = training_rows(args.folder)
    print_summary(args.folder, count_tokens(rows))
    print_rows(args.folder, args.rows)
    if args.overlap:
        print_overlap(args.folder, rows, args.overlap)


if __name__ == "__main__":
    run_script(main)
