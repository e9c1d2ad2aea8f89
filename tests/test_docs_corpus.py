"""Tests of nanocram/docs_corpus.py: the English of docstrings, and the two tasks."""

import csv
from pathlib import Path

import numpy as np
from conftest import TINY
from test_prepare import bins

from nanocram import docs_corpus
from nanocram.docs_corpus import prose


def test_prose_of_docstrings():
    doc = """Compute the mean of the values along the given axis of the array.

    Parameters
    ----------
    axis : int, optional
        The axis along which the mean is computed, or all of them if this is not given.
    Args:
        x (Tensor): the input that is to be averaged, and it can be of any shape
            and of any type that is a number.

    Examples
    --------
    >>> mean([1, 2, 3, 4, 5, 6, 7, 8, 9])
    the output of this and that is not to be in the text

    For example::

        this is a literal block and it is not to be in the text

    The :func:`sum` of the elements is divided by the ``number`` of the elements.
    1 2 3 4 5 6 7 8 9 10 11 12
    """
    import inspect

    assert prose(inspect.cleandoc(doc)) == [
        "Compute the mean of the values along the given axis of the array.",
        "The axis along which the mean is computed, or all of them if this is not given.",
        "the input that is to be averaged, and it can be of any shape and of any type that is a "
        "number.",
        "The sum of the elements is divided by the number of the elements. "
        "1 2 3 4 5 6 7 8 9 10 11 12",
    ]


def test_docs_source_makes_tasks_from_held_out_files(run, monkeypatch):
    """With three packages: tasks are well-formed, and no training row has one of their texts."""
    import importlib.metadata

    found = {n: importlib.metadata.distribution(n) for n in ("networkx", "fsspec", "mpmath")}
    monkeypatch.setattr(docs_corpus, "required_packages", lambda: found)
    monkeypatch.setattr(docs_corpus, "TASK_CHARS", 60_000)
    message, _ = run("prepare.py", *TINY, "--sources=docs", "--vocab_size=2000")
    assert message is None, message
    train, _, meta, tokenizer = bins()
    rows = {
        part: list(
            csv.reader(open(f"data/tiny/tasks/docs_next/{part}.tsv"), delimiter="\t", quoting=3)
        )
        for part in ("train", "dev")
    }
    assert rows["train"][0] == ["text_a", "text_b", "label"] and {
        r[2] for r in rows["dev"][1:]
    } == {"next", "other"}
    assert not {r[0] for r in rows["train"]} & {r[0] for r in rows["dev"][1:]}
    in_train = {tuple(w) for r in train for w in np.lib.stride_tricks.sliding_window_view(r, 12)}
    texts = [tokenizer.encode(r[0], add_special_tokens=False).ids for r in rows["train"][1:]]
    hits = [tuple(t[i : i + 12]) in in_train for t in texts for i in range(0, len(t) - 12, 12)]
    assert len(hits) > 100 and np.mean(hits) < 0.1  # set phrases of licences apart
    labels = {
        line.split("\t")[1]
        for line in Path("data/tiny/tasks/docs_package/train.tsv").read_text().splitlines()[1:]
    }
    assert labels == set(found)
    weighted = "--sources=[{'files': 'docs', 'weight': 2}]"
    assert run("prepare.py", *TINY, weighted, "--vocab_size=2000", "--dataset=weighted")[0] is None
    one, other = (
        sorted(p.read_bytes() for p in Path("data", name, "tasks").glob("*/*"))
        for name in ("tiny", "weighted")
    )
    assert one == other and len(one) == 4
