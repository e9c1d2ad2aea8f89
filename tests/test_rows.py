"""Tests of nanocram/rows.py: deduplication and training orders against their definitions."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, sentences
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_prepare import bins

from nanocram import rows
from nanocram.faults import Fault


@pytest.mark.parametrize(
    "order", ["sentence_length", "fragment", "word_length", "unigram", "reverse_unigram"]
)
def test_orders(run, order):
    """Each order's key, computed here from its definition, goes one way down the file."""
    assert run("prepare.py", *TINY, f"--order={order}")[0] is None
    train, _, meta, tokenizer = bins()
    counts = np.bincount(train.ravel(), minlength=meta["vocab_size"]) + 1
    keys = {
        "sentence_length": lambda r: -np.sum(r == tokenizer.token_to_id(".")),
        "fragment": lambda r: -np.sum(r == 3),
        "word_length": lambda r: sum(
            len(t.removeprefix("##")) + (not t.startswith("##"))
            for t in map(tokenizer.id_to_token, r)
        ),
        "unigram": lambda r: np.mean(np.log2(counts[r] / counts.sum())),
        "reverse_unigram": lambda r: -np.mean(np.log2(counts[r] / counts.sum())),
    }
    values = np.array([keys[order](r) for r in train])
    # the keys are sums in fp32, of up to 32 x 8: half a unit of their last place is 1e-5
    assert (np.diff(values) >= -1e-6).all() and len(set(values.round(6))) > 2
    assert run("prepare.py", *TINY, f"--order={order}", "--dataset=cut", "--max_rows=50")[0] is None
    assert (bins("cut")[0] == train[:50]).all()


def cut_plainly(text, n):
    """Return a string without its repeats, and the runs of n that were cut out.

    "<" and ">" stand for the marks. Strings are compared by slices, and looked up by find().
    """
    kept, runs = list(text), []
    for i in range(len(text) - n + 1):
        run = text[i : i + n]
        if "<" not in run and ">" not in run and run in "".join(kept)[:i]:
            kept[i : i + n] = " " * n  # a hole that no run spans
            runs.append(run)
    return "".join(kept), runs


def as_tokens(text):
    return np.frombuffer(text.encode("utf-16-le"), np.uint16)


MARKS = as_tokens("<>").tolist()


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abc<>", max_size=60), st.integers(1, 7))
@example("abcdXbcdeYcdefZcde", 3)
@example("abcabdca", 2)  # of the first ca, the last token is cut out
def test_repeats_against_a_plain_implementation(text, n):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK", 7)  # blocks have seams
        patch.setattr(rows, "ROWS", 3)
        cut = rows.repeated(as_tokens(text), n, MARKS)
    expected, runs = cut_plainly(text, n)
    assert "".join(" " if c else t for t, c in zip(text, cut)) == expected
    assert all(run in expected for run in runs)  # of everything one occurrence stays


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab<>", max_size=40), st.integers(1, 5))
def test_runs_whose_hashes_collide_are_not_taken_for_repeats(text, n):
    with pytest.MonkeyPatch.context() as patch:
        same = lambda tokens, n: np.zeros(len(tokens) - n + 1, np.uint64)  # noqa: E731
        patch.setattr(rows, "window_hashes", same)
        cut = rows.repeated(as_tokens(text), n, MARKS)
    kept = "".join(" " if c else t for t, c in zip(text, cut))
    for i in range(len(text) - n + 1):
        if cut[i : i + n].all() and not cut[i + n : i + n + 1].any():
            assert text[i : i + n] in kept


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<ab><><cd>", "<ab><cd>"),
        ("<><><a>", "<a>"),
        ("ab>>>cd>", "ab>cd>"),
        (">a>", "a>"),
        ("<<a<<b<", "<a<b<"),
        ("<a><", "<a><"),
        ("", ""),
    ],
)
def test_documents_of_which_nothing_is_left_leave_no_marks(text, expected):
    tokens = as_tokens(text)
    left = tokens[~rows.in_empty_document(tokens, *MARKS)]
    assert left.tobytes().decode("utf-16-le") == expected


def test_deduplication_keeps_the_marks_of_documents(run):
    documents = sentences(300)
    Path("text.txt").write_text("\n\n".join([*documents, *(d + " gol" for d in documents)]))
    message, _ = run("prepare.py", *TINY, "--insert_cls=True", "--dedup_tokens=12")
    assert message is None, message
    stream = bins()[0]
    tokens = stream.ravel()[:-1]
    order = bins()[2]["counts"]
    assert order["tokens dropped as repeats"] > 1000
    # rows are shuffled, so look at neighbours in a row only
    pairs = [(a, b) for row in stream.tolist() for a, b in zip(row, row[1:])]
    assert {b for a, b in pairs if a == 3} == {2} and {a for a, b in pairs if b == 2} == {3}
    assert (tokens == 2).sum() > 100


def test_window_hashes_differ_where_windows_do():
    tokens = np.random.default_rng(0).integers(0, 3, 3000).astype(np.uint16)
    for n in (1, 2, 3, 5, 8, 18):
        windows = {}
        for i, h in enumerate(rows.window_hashes(tokens, n).tolist()):
            assert windows.setdefault(h, tuple(tokens[i : i + n])) == tuple(tokens[i : i + n])
        assert len(windows) == len({tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)})


def test_deduplication_of_a_corpus(run):
    paragraph = sentences(1, seed=99)[0] * 3
    documents = [f"{d}\n{paragraph}" if i % 4 == 0 else d for i, d in enumerate(sentences(400))]
    Path("text.txt").write_text("\n\n".join(documents))
    assert run("prepare.py", *TINY)[0] is None
    message, output = run("prepare.py", *TINY, "--dataset=b", "--dedup_tokens=24")
    assert message is None and "tokens dropped as repeats" in output, message
    (train, _, a, tokenizer), (less, _, b, _) = bins(), bins("b")
    assert a["sha256"]["val"] == b["sha256"]["val"]
    n = len(tokenizer.encode(paragraph, add_special_tokens=False).ids)
    dropped = b["counts"]["tokens dropped as repeats"]
    assert 0.6 * 100 * n < dropped < 1.6 * 100 * n and len(train) - len(less) == pytest.approx(
        dropped / 32, abs=2
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 50), st.integers(2, 400), st.randoms())
def test_rows_are_written_in_their_order_whatever_the_buckets(
    tmp_path_factory, n, width, keep, bucket, rng
):
    table = np.arange(n * width, dtype=np.uint16).reshape(n, width)
    permutation = np.array(rng.sample(range(n), n)[: keep or None])
    path = tmp_path_factory.mktemp("order") / "train.bin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BUCKET", bucket)
        patch.setattr(rows, "CHUNK", 7)
        patch.setattr(rows, "ROWS", 5)
        sha, counts = rows.write_ordered(table, permutation, path)
    assert (np.fromfile(path, np.uint16).reshape(-1, width) == table[permutation]).all()
    assert (
        sha == hashlib.sha256(path.read_bytes()).hexdigest()
        and counts.sum() == table[permutation].size
    )
    assert [p.name for p in path.parent.iterdir()] == ["train.bin"]


def test_ties_are_shuffled(monkeypatch):
    table = np.repeat(np.array([[1], [0], [2]], np.uint16), 500, axis=0)
    order = rows.training_order(table, np.array([-1.5, 0.0, 2.0]), 0)
    assert (np.diff(table[order, 0].astype(int)) >= 0).all() and sorted(order) == list(range(1500))
    for part in np.split(order, 3):
        assert abs(np.corrcoef(part, range(500))[0, 1]) < 0.15
    monkeypatch.setattr(rows, "ROWS", 100)  # blocks change nothing
    assert (rows.training_order(table, np.array([-1.5, 0.0, 2.0]), 0) == order).all()


def test_rows_that_are_all_alike_have_no_order():
    with pytest.raises(Fault, match="all rows are alike"):
        rows.sort_keys(np.ones((3, 2), np.uint16), np.arange(5.0))


def test_a_container_has_less_memory_than_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "Path", lambda path: tmp_path / path.lstrip("/"))
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n"}
    files |= {"sys/fs/cgroup/memory.max": "600000\n", "sys/fs/cgroup/memory.current": "200000\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert rows.available_memory() == 400_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert rows.available_memory() == 1_024_000


def test_the_fraction_of_unknown_tokens_is_said(tiny_data, capsys):
    token_counts = np.zeros(65536, np.int64)
    token_counts[[1, 9]] = 5, 95
    rows.print_summary(Path("data/tiny"), token_counts)
    assert "fraction of <unk>: 5.0000%" in capsys.readouterr().out


def test_bits_sort_like_the_numbers():
    numbers = np.array([-np.inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 2.0, np.inf], np.float32)
    bits = rows.sortable_bits(numbers).astype(int)
    assert (np.diff(bits) > 0).tolist() == (np.diff(numbers) > 0).tolist()
    assert (np.diff(bits) >= 0).all()


def test_deduplication_asks_for_40_bytes_a_token(monkeypatch):
    monkeypatch.setattr(rows, "available_memory", lambda: 40_000)
    rows.require_memory(1000)
    with pytest.raises(Fault, match="dedup_tokens needs about"):
        rows.require_memory(1001)
