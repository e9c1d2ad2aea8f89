"""Embeddings out of counts, against the formulas written out pair by pair."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from test_model import bert
from test_train import weights

import train
from nanocram import cooccurrence


def counted(rows):
    """{(w, c): n(w, c)}: each two tokens of a row that are d <= 4 apart, 5 - d times, both ways."""
    n = Counter()
    for row in rows.tolist():
        for i, w in enumerate(row):
            for j, c in enumerate(row):
                if 0 < abs(i - j) <= 4:
                    n[w, c] += 5 - abs(i - j)
    return n


def ppmi(rows, vocab_size):
    pairs, n = counted(rows), Counter()
    for (w, _), count in pairs.items():
        n[w] += count
    smoothed = sum(count**0.75 for count in n.values())
    matrix = np.zeros((vocab_size, vocab_size))
    for (w, c), count in pairs.items():
        matrix[w, c] = max(0.0, math.log(count / n[w]) - math.log(n[c] ** 0.75 / smoothed))
    return matrix, n


def zipf(shape, vocab_size, seed=0):
    """Rows in which some tokens are common, and tokens 0 to 4 never occur, as in a corpus."""
    p = 1 / np.arange(1, vocab_size - 4)
    rng = np.random.default_rng(seed)
    return rng.choice(np.arange(5, vocab_size), shape, p=p / p.sum()).astype(np.uint16)


@pytest.mark.parametrize("shape", [(140, 9), (70, 3), (1, 30), (30, 1)], ids=str)
def test_pairs_are_counted_by_their_distance(shape, monkeypatch):
    monkeypatch.setattr(cooccurrence, "STRIP", 7)  # 3 strips
    rows = zipf(shape, 20)
    expected = np.zeros((20, 20))
    for pair, count in counted(rows).items():
        expected[pair] = count
    assert np.array_equal(cooccurrence.count_pairs(rows, 20, 10**8), expected)


def test_a_part_of_a_sorted_corpus_is_from_all_over():
    """Row i holds only token i / 40: a fifth of all tokens is a fifth of the rows of each."""
    rows = np.repeat(np.arange(80, dtype=np.uint16), 40)[:, None].repeat(6, axis=1)
    whole, part = (
        cooccurrence.count_pairs(rows, 80, tokens).diagonal()
        for tokens in (rows.size, rows.size // 5)
    )
    assert np.array_equal(whole, [40 * 2 * (5 * 4 + 4 * 3 + 3 * 2 + 2 * 1)] * 80)
    assert 0.15 < (part.sum() / whole.sum()).item() < 0.25 and (part > 0).sum() >= 64


@pytest.mark.parametrize("width", [25, 10])
def test_word_vectors_are_the_best_factors_of_the_ppmi(width, monkeypatch):
    """Up to a rotation and a factor: their products are those of PPMI in its first directions."""
    monkeypatch.setattr(cooccurrence, "STRIP", 7)
    rows = zipf((300, 8), 25)
    matrix, n = ppmi(rows, 25)
    u, s, _ = np.linalg.svd(matrix)
    expected = (u[:, :width] * s[:width] ** 2) @ u[:, :width].T
    vectors, frequencies = cooccurrence.word_vectors(rows, 25, width, 10**8)
    assert vectors.shape == (25, width)
    assert vectors.std().item() == pytest.approx(2.56 / width**0.5, rel=1e-4)
    products = (vectors @ vectors.T).numpy()
    assert np.allclose(products / np.trace(products), expected / np.trace(expected), atol=2e-5)
    total = sum(n.values())
    assert np.allclose(frequencies[5:], [math.log(n[i] / total) for i in range(5, 25)], atol=1e-4)
    assert (frequencies[:5] < frequencies[5:].min()).all()


def test_in_a_large_vocabulary_they_are_nearly_the_best():
    rows = zipf((6000, 16), 900)
    matrix, _ = ppmi(rows, 900)
    u, s, _ = np.linalg.svd(matrix)
    vectors, _ = cooccurrence.word_vectors(rows, 900, 64, 10**8)
    basis, _ = np.linalg.qr((vectors / vectors.std()).double().numpy())
    assert 0.9 < np.square(basis.T @ matrix).sum() / np.square(s[:64]).sum() <= 1.0001


def test_the_rotation_is_of_the_seed_and_spreads_evenly():
    rows = zipf((300, 8), 40)
    torch.manual_seed(3)
    a, _ = cooccurrence.word_vectors(rows, 40, 24, 10**8)
    torch.manual_seed(3)
    b, _ = cooccurrence.word_vectors(rows, 40, 24, 10**8)
    size = a[5:].square().mean(0)
    assert torch.equal(a, b) and size.max() < 10 * size.min()


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_never_occur_keep_their_random_embedding(tied):
    """And frequent ones do not, whose vectors are short as well."""
    model, rows = bert(decoder_bias=True, tie_weights=tied), zipf((200, 8), 50)
    before = model.embedding.weight.detach().clone()
    model.embedding.weight.data *= 100  # longer than any vector
    cooccurrence.initialize_from_counts(model, rows, 10**8)
    after = model.embedding.weight.detach()
    assert torch.equal(after[:5], 100 * before[:5])
    lengths = after[5:].norm(dim=1)
    assert 0.1 < lengths.min() < lengths.max() < 10
    assert model.decoder_bias[5] > model.decoder_bias[20] > model.decoder_bias[0]


def test_one_matrix_of_counts_is_all_the_memory_it_takes():
    """Of 4 V^2 bytes, which at 32,768 tokens are 4.3 GB, and some strips."""
    code = """if True:
        import re, numpy as np
        from nanocram import cooccurrence
        def peak():
            status = open("/proc/self/status").read()
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
        cooccurrence.STRIP = 1024  # less than 32 MB may stay on the heap
        rows = np.random.default_rng(0).integers(0, 8192, (4000, 64)).astype(np.uint16)
        cooccurrence.word_vectors(rows[:100] % 256, 256, 8, 10**8)
        before = peak()
        cooccurrence.word_vectors(rows, 8192, 8, 10**8)
        print((peak() - before) / (4 * 8192**2))
    """
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert 1 < float(process.stdout) < 2


def test_a_corpus_of_one_word_has_no_vectors_and_no_nan():
    vectors, frequencies = cooccurrence.word_vectors(np.full((9, 8), 7, np.uint16), 20, 16, 10**8)
    assert vectors.norm(dim=1).max() < 0.1 and frequencies.isfinite().all()


def test_a_run_begins_with_the_vectors_of_its_corpus(run, tiny_data, monkeypatch):
    """And has it in its record of the rules, and does not count again when it goes on."""
    args = [*TINY, "--max_steps=1", "--learning_rate=1e-9", "--count_tokens=10_000_000"]
    message, said = run("train.py", *args)
    counted_tokens = os.path.getsize("data/tiny/train.bin") // 2
    assert message is None and f"{counted_tokens:,} tokens counted" in said
    matrix, n = ppmi(np.fromfile("data/tiny/train.bin", np.uint16).reshape(-1, 32), 90)
    u, s, _ = np.linalg.svd(matrix)
    expected = (u[:, :32] * s[:32] ** 2) @ u[:, :32].T
    embedding = weights()["embedding.weight"].double().numpy()
    kept = [i for i in range(90) if i in n]
    products, expected = (x[np.ix_(kept, kept)] for x in (embedding @ embedding.T, expected))
    assert np.allclose(products / np.trace(products), expected / np.trace(expected), atol=1e-3)
    rules = json.loads(Path("out/tiny/rules.json").read_text())
    assert "10,000,000 tokens" in rules["1 a masked language model from scratch"]["did"]
    Path("out/tiny/model.pt").unlink()
    monkeypatch.setattr(cooccurrence, "word_vectors", None)
    assert run("train.py", *args)[0] is None


def test_the_seconds_of_counting_are_on_the_clock(run, tiny_data, monkeypatch):
    slow = cooccurrence.word_vectors

    def counts_for_two_seconds(*args):
        clock.offset = 2.0
        return slow(*args)

    class clock:
        offset, monotonic = 0.0, train.time.monotonic

    monkeypatch.setattr(cooccurrence, "word_vectors", counts_for_two_seconds)
    monkeypatch.setattr("time.monotonic", lambda: clock.monotonic() + clock.offset)
    message, said = run("train.py", *TINY, "--max_steps=3", "--count_tokens=1000")
    assert message is None and "1,000 tokens counted in 2." in said
    first = json.loads(Path("out/tiny/log.jsonl").read_text().splitlines()[0])
    assert 2.0 < first["hours"] * 3600 < 20
