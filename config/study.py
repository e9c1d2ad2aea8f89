# The study of the paper's rows (results/study): config/crammed.py at the scale "cpu" of
# config/ablations.py, on 100 million characters of Wikipedia and of books that are in the public
# domain. A row is an entry of config/ablations.py:
#
#   python -m tools.sweep study study+no_positions study+mask_15 --tokens=10_000_000
from nanocram.configurator import overrides_named, resolve

exec(open("config/crammed.py").read())
globals().update(overrides_named("scale", "cpu", resolve("train.py", ["config/crammed.py"])))
out_dir = "out/study"

# results/study/corpus.md has the counts. In the books, Project Gutenberg's own texts around each
# book have been removed.
dataset = "study"
sources = [
    {
        "path": "wikimedia/wikipedia",
        "name": "20231101.en",
        "revision": "b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
        "split": "train",
        "weight": 59,
    },
    {
        "path": "sedthh/gutenberg_english",
        "revision": "cda7f8404377b6d006923984e24090a570ee6791",
        "split": "train",
        "column": "TEXT",
        "weight": 41,
    },
]
max_chars = 100_000_000
