"""Tests of nanocram/spool.py: the spool gives back what was written."""

from collections import Counter

import numpy as np
import pytest
from conftest import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocram import spool

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXT, max_size=9), st.integers(1, 9))
def test_the_spool_is_read_whatever_the_blocks(tmp_path_factory, texts, block):
    path = tmp_path_factory.mktemp("spool") / "spool"
    path.write_bytes(b"".join(f"{i:016x}{text}\0".encode() for i, text in enumerate(texts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "BLOCK", block)
        assert list(spool.read_spool(path, -1)) == texts
        assert list(spool.read_spool(path, 2)) == texts[3:]


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab \n\t\u00a0\u2028\u3000", max_size=200), st.integers(2, 20))
def test_pieces_lose_nothing_and_cut_at_white_space(text, size):
    parts = list(spool.cut_text(text, size))
    assert "".join(parts) == text and all(len(p) <= size for p in parts)
    for a, b in zip(parts, parts[1:]):
        assert b[0].isspace() or not any(c.isspace() for c in a[1:])


def test_texts_that_differ_in_blanks_marks_or_capitals_share_a_hash():
    """Against the definition: equal letters and digits in lower case, or equal texts if none."""
    texts = [
        "Bal dem.",
        "bal  dem",
        "BAL\u00a0DÉM",
        "bal dém!",
        "“bal„ dem",
        "bald em 1",
        "ﬁ",
        "FI",
    ]
    texts += ["中文，中", "中文 中", "...", "....", "_", "", "१२", "٣"]
    hashes = {text: spool.content_hash(text.encode()) for text in texts}
    for a in texts:
        for b in texts:
            keys = ["".join(filter(str.isalnum, text.lower())) for text in (a, b)]
            same = keys[0] == keys[1] and (keys[0] != "" or a == b)
            assert (hashes[a] == hashes[b]) == same, (a, b)


def split(path, documents, budget):
    """Spool documents. Return (texts held out, texts that are left for training)."""
    pairs = [(text, "") for text in documents]
    held, _ = spool.write_spool(path, pairs, budget, 0, 0, 0, 0, Counter())
    return [d.text for d in held], list(spool.read_spool(path / "spool", held[-1].hash))


def test_copies_that_differ_in_blanks_are_held_out_together(tmp_path):
    documents = sentences(400)
    copies = [d.replace(" ", "  ", 3).replace(".", "!", 1).upper() for d in documents]
    held, training = split(tmp_path, documents + copies, 9000)
    letters = [["".join(filter(str.isalnum, d.lower())) for d in part] for part in (held, training)]
    assert len(held) > 20 and len(training) == 800 - 2 * len(held)
    assert not set(letters[0]) & set(letters[1])


def test_a_long_document_is_held_out_by_pieces(tmp_path):
    """Half of the text is two books: about half of what is held out is of them."""
    books = ["\n".join(sentences(2500, seed)).upper() for seed in (1, 2)]
    articles = sentences(5000)
    held, training = split(tmp_path, [*articles, *books], 400_000)
    for part in (held, training):
        size = [sum(len(d) for d in part if d.isupper() == upper) for upper in (True, False)]
        assert 0.3 < size[0] / sum(size) < 0.7
    whole = "".join("".join(d.split()) for d in [*articles, *books])
    parts = "".join("".join(d.split()) for d in held + training)
    assert Counter(whole) == Counter(parts) and max(map(len, training)) <= 20_000


@pytest.mark.parametrize("n_wanted", [50, 1000, 15_000, 60_000, 10**6])
def test_the_sample_is_the_part_of_the_spool_that_was_asked_for(tmp_path, n_wanted):
    """Taken while spooling, or from the whole spool: the same documents, about as many as asked."""
    pairs = [(f"{i} bal dem {i * i}", "") for i in range(4000)]
    n_chars = sum(len(text) for text, _ in pairs)
    counts = Counter()
    held, limit = spool.write_spool(tmp_path, pairs, 900, n_wanted, 7, 0, 0, counts)
    spool.save_reading(tmp_path, held, limit, counts)
    assert (tmp_path / "sample").exists() == (2 * n_wanted < n_chars)
    fraction = min(n_wanted / n_chars, 1)
    found = list(spool.read_sample(tmp_path, held[-1].hash, fraction, 7))
    spool.save_reading(tmp_path, held, 0, counts)
    assert list(spool.read_sample(tmp_path, held[-1].hash, fraction, 7)) == found
    assert sum(map(len, found)) == pytest.approx(min(n_wanted, n_chars), rel=0.1, abs=200)
    # the sample was enough, so that nobody had to read the spool
    if n_wanted >= 1000:
        assert limit >= 0.8 * fraction * spool.N_HASHES
    # from the beginning to the end, in the order of the spool
    training = list(spool.read_spool(tmp_path / "spool", held[-1].hash))
    places = [training.index(text) for text in found]
    assert places == sorted(places)
    if n_wanted > 1000:
        assert np.mean(places) == pytest.approx(2000, rel=0.1)
    # what lies on the disk has a bound
    if (tmp_path / "sample").exists():
        halvings = np.log2(spool.N_HASHES / limit)
        assert (tmp_path / "sample").stat().st_size < (halvings + 2) * 3 * n_wanted + 3000
