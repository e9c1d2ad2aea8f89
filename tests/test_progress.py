import io
import itertools
import sys

import pytest
import tqdm

from nanocram.progress import progress_bar


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def ticks(monkeypatch):
    """ticks(n) yields 0 .. n - 1, one every 10 seconds of a clock that stands still meanwhile."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])

    def go(n):
        for i in range(n):
            now[0] += 10
            yield i

    return go


def test_a_file_gets_a_line_every_minute_and_one_at_the_end(ticks, capsys):
    total = 0
    bar = progress_bar(desc="outer", total=100 * 63, unit=" chars", unit_scale=True)
    with bar:
        for i in progress_bar(ticks(63), "inner", 63):  # one loop in another, as in prepare.py
            bar.update(100)
            total += i
    assert total == 62 * 63 // 2
    text = capsys.readouterr().err
    assert "\r" not in text and "\x1b" not in text and "\n\n" not in text
    for desc in ("inner", "outer"):
        lines = [line for line in text.splitlines() if line.startswith(desc)]
        assert len(lines) in (11, 12)  # ten whole minutes, and the end
        assert "100%" in lines[-1] and "10:30" in lines[-1]
        assert "05:" in lines[4] and "chars/s" in lines[4] or desc == "inner"


def test_a_file_gets_nothing_from_a_short_loop(ticks, capsys):
    assert list(progress_bar(ticks(5), "short")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(ticks, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress_bar(itertools.islice(ticks(9), 3), "short", 3))
    states = sys.stderr.getvalue().split("\r")
    assert len(states) > 3 and "3/3" in states[-1]
