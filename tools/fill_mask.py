"""Ask a trained model to fill <mask>.

python -m tools.fill_mask out/demo "returns the <mask> of the array." [--top=5]    one text
python -m tools.fill_mask out/demo < FILE                                          a text per line
python -m tools.fill_mask out/demo --interactive                                   with a prompt
"""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing

from nanocram.faults import Fault, read_json, run_script
from nanocram.runs import open_run
from nanocram.tokenizer import special_token


def corpus_of(run):
    """Return meta.json of the corpus that a run was trained on, or None if it is not here."""
    path = Path(run) / "config.json"
    if not path.exists():
        return None
    config = read_json(path)
    path = Path("data") / config["dataset"] / "meta.json"
    if not path.exists():
        return None
    meta = read_json(path)
    if meta["sha256"]["train"] != config.get("train_sha256"):
        return None
    return meta


def mark_as_in_pretraining(tokenizer, meta):
    """Make a tokenizer put the special tokens around a text that the rows of pretraining have.

    Documents end with <sep>. They begin with <cls> only if the corpus says so: see insert_cls.
    meta: meta.json of the corpus, or None.
    """
    names = ["sep"]
    begin = ""
    if meta is not None and meta["settings"]["insert_cls"]:
        names.append("cls")
        begin = special_token(tokenizer, "cls") + " "
    sep = special_token(tokenizer, "sep")
    tokens = [special_token(tokenizer, name) for name in names]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin}$A {sep}",
        pair=f"{begin}$A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens],
    )


def fill_mask(model, tokenizer, text, top=5):
    """Return the likeliest tokens at each mask of a text: [[(token, probability), ...], ...].

    tokenizer: after mark_as_in_pretraining.
    Raise Fault if the text has no mask, or too many tokens for the model.
    """
    mask = special_token(tokenizer, "mask")
    tokens = torch.tensor(tokenizer.encode(text).ids)
    positions = (tokens == tokenizer.token_to_id(mask)).nonzero().flatten()
    if len(positions) == 0:
        raise Fault(f"the text has no {mask}")
    if len(tokens) > model.config.max_len:
        limit = f"max_len = {model.config.max_len}"
        raise Fault(f"the text has {len(tokens)} tokens, more than {limit}")

    # the model computes its logits at the masks only
    with torch.no_grad():
        probabilities = model(tokens[None], positions).softmax(-1)
    best = probabilities.topk(min(top, model.config.vocab_size))
    found = []
    for ids, values in zip(best.indices.tolist(), best.values.tolist()):
        found.append([(tokenizer.id_to_token(i), p) for i, p in zip(ids, values)])
    return found


def print_answers(model, tokenizer, text, top):
    """Print one line per mask of the text."""
    for candidates in fill_mask(model, tokenizer, text, top):
        answers = [f"{token} {p:.1%}" for token, p in candidates]
        print(", ".join(answers), flush=True)


def ask(mask):
    """Yield the texts that a person types, until there is an empty one, Ctrl-D or Ctrl-C."""
    try:
        while text := input(f"text with {mask}: "):
            yield text
    except (EOFError, KeyboardInterrupt):
        print()


def read_lines():
    """Yield the lines of stdin that are not empty."""
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
    except UnicodeDecodeError as e:
        raise Fault(f"a text is not in the encoding of this terminal: {e}") from e


def positive(text):
    """Return the number of an argument that must be 1 or more."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv=None):
    # arguments
    parser = argparse.ArgumentParser(
        prog="python -m tools.fill_mask",
        description="Ask a trained model to fill <mask>.",
        epilog="Without a text, texts are read from stdin, one per line.",
    )
    parser.add_argument("run", help="folder of a finished run, such as out/demo")
    parser.add_argument(
        "text", nargs="?", help='with one <mask> or more: "the <mask> of the array"'
    )
    parser.add_argument("--interactive", action="store_true", help="ask for texts with a prompt")
    parser.add_argument("--top", type=positive, default=5, help="tokens per mask (default: 5)")
    args = parser.parse_args(argv)

    # the model
    model, tokenizer = open_run(args.run)
    model.eval()
    tokenizer.encode_special_tokens = False  # "<mask>" in a text is the mask
    mark_as_in_pretraining(tokenizer, corpus_of(args.run))
    # the texts
    if args.text is not None:
        texts = [args.text]
    elif args.interactive:
        texts = ask(special_token(tokenizer, "mask"))
    else:
        texts = read_lines()

    # a mistake at the prompt can be corrected
    for text in texts:
        try:
            print_answers(model, tokenizer, text, args.top)
        except Fault as e:
            if not args.interactive:
                raise Fault(f"{e}: {text[:60]!r}") from e
            print(e)


if __name__ == "__main__":
    run_script(main)
