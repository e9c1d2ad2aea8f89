"""Ask a trained model to fill <mask>.

python fill_mask.py out/demo "returns the <mask> of the array." [--top=5]    one text
python fill_mask.py out/demo < FILE                                          a text a line
python fill_mask.py out/demo --interactive                                   the same, with a prompt
"""

import sys
from pathlib import Path

import torch

from configurator import one_line
from export_hf import load_run
from model import BERT
from rows import special_token


def load(run):
    """(model, tokenizer, name of the mask token) of a finished run. SystemExit, one line, if there is none."""
    config, weights, tokenizer = load_run(Path(run))
    model = BERT(config).eval()
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        sys.exit(f"fill_mask.py: {run} cannot be read: {one_line(e)}")
    tokenizer.encode_special_tokens = False
    return model, tokenizer, special_token(tokenizer, "mask")


def fill_mask(model, tokenizer, mask, text, top=5):
    """The likeliest tokens at each mask of the text: [[(token, probability), ...], ...]. ValueError, one line, on mistakes."""
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)  # training rows have no <cls> either
    where = (tokens == tokenizer.token_to_id(mask)).nonzero().flatten()
    if not len(where):
        raise ValueError(f"the text has no {mask}")
    if len(tokens) > model.config.max_len:
        raise ValueError(f"the text has {len(tokens)} tokens, more than max_len = {model.config.max_len}")
    with torch.no_grad():
        best = model(tokens[None], where).softmax(-1).topk(min(top, model.config.vocab_size))
    return [[(tokenizer.id_to_token(i), p) for i, p in zip(*row)] for row in zip(best.indices.tolist(), best.values.tolist())]


def main(args):
    words = [a for a in args if not a.startswith("--")]
    options = dict(a[2:].partition("=")[::2] for a in args if a.startswith("--"))
    top = options.get("top", "5")
    if len(words) not in (1, 2) or options.keys() - {"top", "interactive"} or not top.isdecimal() or top == "0":
        sys.exit(__doc__.strip())
    run = load(words[0])
    interactive = "interactive" in options
    prompt = iter(lambda: input(f"text with {run[2]}: "), "")
    texts = words[1:] or (prompt if interactive else (line for line in map(str.strip, sys.stdin) if line))
    for text in texts:
        try:
            for found in fill_mask(*run, text, int(top)):
                print(", ".join(f"{token} {p:.1%}" for token, p in found), flush=True)
        except ValueError as e:
            if not interactive:
                sys.exit(f"fill_mask.py: {e}: {text[:60]!r}")
            print(e)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (EOFError, KeyboardInterrupt):
        print()
    except UnicodeDecodeError as e:
        sys.exit(f"fill_mask.py: a text is not in the encoding of this terminal: {e}")
