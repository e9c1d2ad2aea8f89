"""Ask a trained model to fill <mask>: python fill_mask.py out/demo "returns the <mask> of the array." [--top=5]"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model import BERT, Config


def fill_mask(run, text, top=5):
    """The likeliest tokens at each <mask> of the text: [[(token, probability), ...], ...]. SystemExit on mistakes."""
    run = Path(run)
    if not (run / "model.pt").exists():
        sys.exit(f"fill_mask.py: {run / 'model.pt'} does not exist; name the folder of a finished run, as in out/demo")
    saved = torch.load(run / "model.pt", map_location="cpu", weights_only=True)
    model = BERT(Config(**saved["config"])).eval()
    model.load_state_dict(saved["model"])
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in ("<mask>", "[MASK]")}
    mask_name, mask_id = next((n, i) for n, i in ids.items() if i is not None)
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)  # training rows have no <cls> either
    where = (tokens == mask_id).nonzero().flatten()
    if not len(where):
        sys.exit(f"fill_mask.py: the text has no {mask_name}")
    if len(tokens) > model.config.max_len:
        sys.exit(f"fill_mask.py: the text has {len(tokens)} tokens, more than max_len = {model.config.max_len}")
    with torch.no_grad():
        best = model(tokens[None], where).softmax(-1).topk(top)
    return [[(tokenizer.id_to_token(i), p) for i, p in zip(*row)] for row in zip(best.indices.tolist(), best.values.tolist())]


if __name__ == "__main__":
    args = [a for a in sys.argv[1:] if not a.startswith("--top=")]
    top = [a[6:] for a in sys.argv[1:] if a.startswith("--top=")]
    if len(args) != 2 or not all(t.isdigit() for t in top):
        sys.exit(__doc__)
    for found in fill_mask(*args, *map(int, top)):
        print(", ".join(f"{token} {p:.1%}" for token, p in found))
