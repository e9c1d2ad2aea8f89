"""Tests of nanocram/spool.py: the spool gives back what was written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocram import spool

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXT, max_size=9), st.integers(1, 9))
def test_the_spool_is_read_whatever_the_blocks(tmp_path_factory, texts, block):
    path = tmp_path_factory.mktemp("spool") / "spool"
    path.write_bytes(b"".join(t.encode() + b"\0" for t in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "BLOCK", block)
        assert list(spool.read_spool(path, -1)) == texts


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab \n", max_size=200), st.integers(2, 20))
def test_pieces_lose_nothing_and_cut_at_white_space(text, size):
    parts = list(spool.cut_text(text, size))
    assert "".join(parts) == text and all(len(p) <= size for p in parts)
    for a, b in zip(parts, parts[1:]):
        assert b[0] in " \n" or not any(c in " \n" for c in a[1:])
