"""How far a long loop is: a bar on a terminal, and elsewhere a line every minute."""

import sys

from tqdm import tqdm

SECONDS_PER_LINE = 60.0


class Lines:
    """A file that tqdm can write a bar to. It prints each state of the bar as a line of its own."""

    def write(self, text):
        # without the characters that move the cursor
        text = text.replace("\x1b[A", "").strip()
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress_bar(items=None, desc=None, total=None, **options):
    """Return tqdm(items, desc, total, **options), for a terminal or for a file.

    A file, as with nohup, gets one line every minute and one at the end, and none from a loop that
    takes less than a minute.
    """
    if not sys.stderr.isatty():
        seconds = SECONDS_PER_LINE
        # miniters: look at the clock at each item
        options |= {"file": Lines(), "mininterval": seconds, "delay": seconds, "miniters": 1}
    return tqdm(items, desc, total, **options)
