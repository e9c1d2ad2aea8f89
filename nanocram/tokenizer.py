"""Train a vocabulary, load one, and turn text into token ids.

A tokenizer has three parts: the normaliser changes the characters (lower case, no accents), the
pre-tokenizer splits a text into words, and the model splits a word into entries of the vocabulary.
"""

import functools
import itertools
import json
import os
import re
import sys
import unicodedata
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from nanocram.faults import Fault, one_line
from nanocram.spool import MAX_DOCUMENT, cut_text

SPECIAL_TOKENS = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]  # their ids are 0 to 4
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]  # of a model
NON_ASCII = r"[^\x00-\x7F]+"
WIDE_SPACE = r"[^\S\x00-\x7F]|\x{200B}"  # no-break, ideographic and other spaces of Unicode
INVISIBLE = r"[\x{AD}\x{2060}\x{FEFF}]+"  # soft hyphen, word joiner, byte-order mark
MANY_SPACES = re.compile(" {2,}")
OUTSIDE_ASCII = re.compile(NON_ASCII)
MAX_WORD = 100  # characters of a word that are tokenized together; the time grows with the square
MAX_IDS = 65536  # what fits into uint16
BATCH_CHARS = 1 << 20  # characters of documents that are tokenized together
PIECE_CHARS = 2000  # characters of a document that are tokenized at a time; the time grows with it
N_LOST = 10  # lost characters that a warning names
THREADS = 3  # batches in work, so that the cores stay busy while ids are made into arrays


# --------------------------------------------------------------------------------------------------
# Special tokens


def special_token(tokenizer, name):
    """Return what a tokenizer calls its pad, unk, cls, sep or mask, or None if it has none.

    The paper has <mask>, BERT has [MASK].
    """
    for token in (f"<{name}>", f"[{name.upper()}]"):
        if tokenizer.token_to_id(token) is not None:
            return token
    return None


def special_ids(tokenizer):
    """Return {"pad", "unk", "cls", "sep", "mask": id}. Raise Fault if one of them is missing."""
    ids = {}
    for name in ("pad", "unk", "cls", "sep", "mask"):
        token = special_token(tokenizer, name)
        if token is None:
            raise Fault(f"the tokenizer has neither <{name}> nor [{name.upper()}]")
        ids[name] = tokenizer.token_to_id(token)
    return ids


def vocab_size_of(tokenizer):
    """Return the largest id plus one. A given vocabulary may have holes, so its size is less."""
    return max(tokenizer.get_vocab().values()) + 1


# --------------------------------------------------------------------------------------------------
# Load


def load_tokenizer(path):
    """Return the tokenizer of a tokenizer.json: a file, or owner/dataset/path on the hub.

    Or that of a model: the folder of a run or of a Hugging Face BERT, or an id on the hub.

    Raise Fault if it cannot be read, has too many ids, or lacks a special token.
    """
    # read it
    try:
        file = os.path.expanduser(path)
        if is_on_the_hub(file):
            file = download(file)
        if is_model(file):
            tokenizer = read_tokenizer(model_folder(file))
        else:
            tokenizer = Tokenizer.from_file(file)
    except Fault:
        raise
    except Exception as e:  # tokenizers raises nothing more special
        raise Fault(f"the tokenizer {str(path)!r} cannot be read: {one_line(e)}") from e

    # check it now, not after hours of work
    size = vocab_size_of(tokenizer)
    if size > MAX_IDS:
        raise Fault(f"{path} has {size:,} ids; those over {MAX_IDS - 1:,} do not fit into uint16")
    try:
        special_ids(tokenizer)
    except Fault as e:
        raise Fault(f"{path}: {e}") from None

    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def is_on_the_hub(path):
    """Return whether a path is owner/dataset/path: deep enough, and not in a local folder."""
    first = path.split("/")[0] or "/"
    return path.count("/") >= 2 and not os.path.exists(first)


def download(path):
    """Return the local copy of a file on the hub, owner/dataset/path."""
    from huggingface_hub import hf_hub_download

    owner, dataset, inside = path.split("/", 2)
    return hf_hub_download(f"{owner}/{dataset}", inside, repo_type="dataset")


# --------------------------------------------------------------------------------------------------
# The tokenizer of a model


def is_model(path):
    """Return whether a path is a folder, or looks like the id of a model: name or owner/name."""
    is_id = path.count("/") <= 1 and not path.endswith(".json") and not path.startswith((".", "/"))
    return os.path.isdir(path) or (is_id and not os.path.exists(path))


def model_folder(source):
    """Return the folder of a model, or the local copy of its tokenizer if it is on the hub."""
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=TOKENIZER_FILES))


def read_tokenizer(folder):
    """Return the tokenizer in tokenizer.json, or the one that vocab.txt describes."""
    path = folder / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    # the first BERT checkpoints have a vocabulary only
    from tokenizers.implementations import BertWordPieceTokenizer

    vocabulary = folder / "vocab.txt"
    if not vocabulary.exists():
        raise Fault(f"{folder} has neither tokenizer.json nor vocab.txt")
    lowercase = True
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        lowercase = json.loads(settings.read_text()).get("do_lower_case", True)
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=lowercase)
    return Tokenizer.from_str(tokenizer.to_str())


def tokenizer_difference(first, second):
    """Return which part of two tokenizers differs, or "" if they give the same ids for any text.

    Not their bytes: padding, truncation and what goes around a text may differ.
    """
    if first.get_vocab() != second.get_vocab():
        return "vocabulary"
    one, other = (json.loads(tokenizer.to_str()) for tokenizer in (first, second))
    if one["normalizer"] != other["normalizer"]:
        return "normaliser"
    if one["pre_tokenizer"] != other["pre_tokenizer"]:
        return "pre-tokeniser"
    # the merges of BPE and the scores of a unigram model are no part of get_vocab()
    for part in ("type", "merges", "vocab"):
        if one["model"].get(part) != other["model"].get(part):
            return "model"
    return ""


# --------------------------------------------------------------------------------------------------
# Train


def train_tokenizer(sample, kind, vocab_size, lowercase, strip_accents, ascii_only):
    """Train the paper's tokenizer [repo], or another one.

    sample: a function that returns an iterator over texts in NFC, the same ones each time.
    kind: wordpiece as in the paper, bpe or unigram.
    """
    normalizer = make_normalizer(lowercase, strip_accents, ascii_only)
    tokenizer = train_up_to(vocab_size, sample, kind, normalizer, strip_accents)
    size = tokenizer.get_vocab_size()

    # A small corpus has too few different words. A smaller vocabulary has fewer characters, and may
    # then fall short again, so look for a size that can be reached.
    if size != vocab_size:
        works = vocab_size
        while size < works:
            works = size
            size = train_up_to(works, sample, kind, normalizer, strip_accents).get_vocab_size()
        hint = "; ascii_only=True drops all other scripts" if ascii_only else ""
        raise Fault(
            f"the corpus is too small for vocab_size = {vocab_size}; set vocab_size to {works}, "
            f"or add text{hint}"
        )

    # what encode() puts around a text, or a pair of texts, unless told not to
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<cls>", "<sep>")],
    )
    return tokenizer


def train_up_to(vocab_size, sample, kind, normalizer, strip_accents):
    """Train a tokenizer of at most vocab_size entries; a small corpus gives fewer."""
    # The commonest characters are entries of their own, at most half of the vocabulary. Texts with
    # others (Wikipedia has thousands) are trained on with a space in their place.
    counts = count_characters(composed(sample(), strip_accents))
    characters = by_frequency(counts, normalizer)
    alphabet, others = divide(characters, vocab_size // 2, kind)
    rare = rare_characters(counts, normalizer, alphabet)
    texts = composed(sample(), strip_accents)
    if rare:
        texts = (text.translate(rare) for text in texts)

    # normalise the texts here if that is possible, which is faster
    fast = AsciiNormalizer(normalizer)
    first = normalizer
    if fast.makes_ascii:
        texts = map(fast.normalize, texts)
        first = None

    if kind == "wordpiece":
        tokenizer = train_wordpiece(texts, first, alphabet, others, vocab_size)
    elif kind == "bpe":
        tokenizer = train_bpe(texts, first, alphabet, vocab_size)
    else:
        tokenizer = train_unigram(texts, first, alphabet, vocab_size)
    tokenizer.normalizer = normalizer
    return tokenizer


def make_normalizer(lowercase, strip_accents, ascii_only):
    """Return the normaliser: plain quotes and spaces, Unicode form, then what is asked for."""
    steps = [
        normalizers.Replace("``", '"'),
        normalizers.Replace("''", '"'),
    ]
    if ascii_only:
        steps.append(normalizers.Replace(Regex(WIDE_SPACE), " "))
    else:
        steps.append(normalizers.Replace(Regex(INVISIBLE), ""))

    # NFD splits é into e and an accent, which can then be stripped
    if strip_accents:
        steps.append(normalizers.NFD())
    else:
        steps.append(normalizers.NFKC())
    if lowercase:
        steps.append(normalizers.Lowercase())
    if strip_accents:
        steps.append(normalizers.StripAccents())

    steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if ascii_only:
        steps.append(normalizers.Replace(Regex(NON_ASCII), ""))
    return normalizers.Sequence(steps)


def count_characters(texts):
    """Return {character: how often it occurs}."""
    n = np.zeros(sys.maxunicode + 1, np.int64)
    for batch in batches(texts):
        codes = np.frombuffer("".join(batch).encode("utf-32-le"), np.uint32)
        n += np.bincount(codes, minlength=len(n))
    return {chr(code): int(n[code]) for code in np.flatnonzero(n)}


def composed(texts, strip_accents):
    """Yield texts in NFKC if the normaliser composes characters, so that each stands for itself."""
    if strip_accents:
        return texts
    return (unicodedata.normalize("NFKC", text) for text in texts)


def by_frequency(counts, normalizer):
    """Return the characters of the normalised text without white space, the commonest first.

    counts: {character: how often it occurs} in the text as it is.
    """
    normalized = Counter('"')  # what `` and '' become
    for character, n in counts.items():
        for c in set(normalizer.normalize_str(character)):
            if not c.isspace():
                normalized[c] += n
    return sorted(normalized, key=lambda c: (-normalized[c], c))


def divide(characters, room, kind):
    """Return (the first characters, sorted, as many as take `room` entries; the others)."""
    n = 0
    for c in characters:
        # WordPiece has "c" and "##c", but an ideograph is a word of its own
        room -= 1 if kind != "wordpiece" or is_ideograph(c) else 2
        if room < 0:
            break
        n += 1
    return sorted(characters[:n]), characters[n:]


def rare_characters(counts, normalizer, alphabet):
    """Return a table for str.translate: a space for characters that the alphabet cannot write."""
    common = set(alphabet)
    table = {}
    for character in counts:
        form = normalizer.normalize_str(character)
        if any(c not in common and not c.isspace() for c in form):
            table[ord(character)] = " "
    return table


def train_wordpiece(texts, normalizer, alphabet, others, vocab_size):
    """Train the paper's kind of vocabulary. A token inside a word begins with ##.

    normalizer: what the texts still need, or None.
    others: characters outside the alphabet, the commonest first.
    """
    # The trainer numbers "##c" in the order of a hash table, and ties between merges follow these
    # numbers. As special tokens in sorted order they make the vocabulary the same in each run.
    inside = [c for c in alphabet if not is_ideograph(c)]
    trained = Tokenizer(models.WordPiece(unk_token="<unk>"))
    if normalizer:
        trained.normalizer = normalizer
    trained.pre_tokenizer = word_splitter(inside)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + [f"##{c}" for c in inside],
        show_progress=sys.stderr.isatty(),
    )
    trained.train_from_iterator(texts, trainer)

    # where there are too few words, as in Chinese, there is room for more characters
    vocabulary = trained.get_vocab()
    for c in others:
        if len(vocabulary) < vocab_size:
            vocabulary.setdefault(c, len(vocabulary))

    # the tokenizer proper has the same vocabulary, but only our five as special tokens
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def is_ideograph(character):
    """Return whether a character is a word of its own, as those of Chinese are in BERT."""
    return unicodedata.name(character, "").startswith("CJK ")


def word_splitter(inside):
    """Return what splits a text into words: runs of letters and digits, runs of other signs.

    A character outside ASCII that is not among those `inside` words is a word of its own, so that
    a rare one costs one <unk> and not the word or, without spaces, the clause around it. A word of
    more than MAX_WORD characters is cut.
    """
    known = r"\x00-\x7F" + "".join(c for c in inside if not c.isascii())
    alone = rf"[^{known}\s\x{{200B}}]"
    word = rf"[\w&&[{known}]]{{1,{MAX_WORD}}}"
    signs = rf"[[^\w\s]&&[{known}]]{{1,{MAX_WORD}}}"
    return pre_tokenizers.Split(Regex(f"{alone}|{word}|{signs}"), "removed", invert=True)


def train_bpe(texts, normalizer, alphabet, vocab_size):
    """Train byte-pair encoding, an ablation of the paper."""
    tokenizer = with_word_marks(Tokenizer(models.BPE(unk_token="<unk>")), normalizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_unigram(texts, normalizer, alphabet, vocab_size):
    """Train a unigram language model of word pieces, an ablation of the paper."""
    tokenizer = with_word_marks(Tokenizer(models.Unigram()), normalizer)
    trainer = trainers.UnigramTrainer(
        unk_token="<unk>",
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)

    # The scores are sums in the order of a hash table, so their last digits differ between runs.
    # Rounded and sorted they are the same.
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    entries = [(token, round(score, 3)) for token, score in vocabulary]
    special = entries[: len(SPECIAL_TOKENS)]
    others = sorted(entries[len(SPECIAL_TOKENS) :], key=lambda entry: (-entry[1], entry[0]))
    tokenizer.model = models.Unigram(special + others, unk_id=SPECIAL_TOKENS.index("<unk>"))
    return tokenizer


def with_word_marks(tokenizer, normalizer):
    """Give a tokenizer a normaliser, and words of which the first token begins with a "▁"."""
    if normalizer:
        tokenizer.normalizer = normalizer
    words = [pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


# --------------------------------------------------------------------------------------------------
# Encode


def encode_ahead(tokenizer, texts):
    """Yield (text, its token ids as a uint16 array) for each text, several batches ahead."""
    fast = FastEncoder(tokenizer)
    piece = PIECE_CHARS if splits_at_spaces(tokenizer) else MAX_DOCUMENT
    jobs = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in batches(texts):
            jobs.append((batch, pool.submit(encode, tokenizer, fast, piece, batch)))
            if len(jobs) > THREADS:
                done, job = jobs.popleft()
                yield from zip(done, job.result())
        for batch, job in jobs:
            yield from zip(batch, job.result())


def batches(texts):
    """Yield lists of texts that have about BATCH_CHARS characters together."""
    batch = []
    n_chars = 0
    for text in texts:
        batch.append(text)
        n_chars += len(text)
        if n_chars >= BATCH_CHARS:
            yield batch
            batch = []
            n_chars = 0
    if batch:
        yield batch


def encode(tokenizer, fast, piece, texts):
    """Return the token ids of each text, a list of uint16 arrays without special tokens.

    fast: the FastEncoder of the tokenizer.
    piece: characters after which a text is cut.
    """
    # cut the texts into pieces, and remember of which text each one is
    pieces = []
    owners = []
    for i, text in enumerate(texts):
        for part in cut_text(text, piece):
            pieces.append(part)
            owners.append(i)

    # encode most pieces the fast way, and the others with the whole tokenizer
    ids = fast.encode(pieces)
    others = [k for k in range(len(pieces)) if ids[k] is None]
    found = tokenizer.encode_batch_fast([pieces[k] for k in others], add_special_tokens=False)
    for k, encoding in zip(others, found):
        ids[k] = np.array(encoding.ids, np.uint16)

    # join the ids of each text
    parts = [[] for _ in texts]
    for i, array in zip(owners, ids):
        parts[i].append(array)
    return [np.concatenate(arrays) for arrays in parts]


class FastEncoder:
    """Encode texts of which the normaliser makes ASCII as the whole tokenizer does, but faster.

    The tokenizer in here has no normaliser, and the plainest pre-tokenizer.
    """

    def __init__(self, tokenizer):
        spec = json.loads(tokenizer.to_str())
        spec["normalizer"] = None
        if is_word_splitter(spec["pre_tokenizer"]):
            spec["pre_tokenizer"] = {"type": "Whitespace"}
        self.bare = Tokenizer.from_str(json.dumps(spec))
        self.bare.encode_special_tokens = True
        self.unk = special_ids(tokenizer)["unk"]

        # the special tokens in a text are looked for before it is normalised, unless they are text
        self.normalizer = AsciiNormalizer(tokenizer.normalizer)
        if not tokenizer.encode_special_tokens:
            self.normalizer = AsciiNormalizer(None)

    def encode(self, texts):
        """Return the token ids of each text, or None for those that need the whole tokenizer."""
        normal = [self.normalizer.normalize(text) for text in texts]
        chosen = [k for k in range(len(texts)) if normal[k] is not None]
        found = self.bare.encode_batch_fast([normal[k] for k in chosen], add_special_tokens=False)

        # <unk> may be a word of more than MAX_WORD characters, which the whole tokenizer cuts
        ids = [None] * len(texts)
        for k, encoding in zip(chosen, found):
            array = np.array(encoding.ids, np.uint16)
            if not (array == self.unk).any():
                ids[k] = array
        return ids


class AsciiNormalizer:
    """Do what one of our normalisers does to texts of which it makes ASCII, but faster.

    It is written in Python, for the normalisers of `tokenizers` track where each character comes
    from. Runs of spaces stay, which no tokenizer of ours can tell from one space.
    """

    def __init__(self, normalizer):
        flags = flags_of(normalizer)
        self.is_ours = flags is not None
        self.lowercase, self.strip_accents, self.ascii_only = flags or (False, False, False)
        # without accents, each character is normalised for itself
        self.makes_ascii = self.strip_accents and self.ascii_only
        if self.makes_ascii:
            self.form_of = functools.cache(normalizer.normalize_str)

    def normalize(self, text):
        """Return the normalised text, or None if it may have characters outside ASCII."""
        is_ascii = text.isascii()
        if not self.is_ours or not (is_ascii or self.makes_ascii):
            return None
        text = text.replace("``", '"').replace("''", '"')
        if not is_ascii:
            text = OUTSIDE_ASCII.sub(lambda match: "".join(map(self.form_of, match[0])), text)
        return text.lower() if self.lowercase else text


def flags_of(normalizer):
    """Return the arguments with which make_normalizer makes this normaliser, or None."""
    for flags in itertools.product((False, True), repeat=3):
        if normalizer and make_normalizer(*flags).__getstate__() == normalizer.__getstate__():
            return flags
    return None


def is_word_splitter(spec):
    """Return whether a pre-tokenizer, as tokenizer.json has it, is that of word_splitter."""
    pattern = (spec or {}).get("pattern", {}).get("Regex", "")
    return pattern.startswith(r"[^\x00-\x7F") and pattern.endswith(f"]]{{1,{MAX_WORD}}}")


def splits_at_spaces(tokenizer):
    """Return whether white space ends every token, so that a text may be cut there."""
    spec = json.loads(tokenizer.to_str())["pre_tokenizer"] or {"type": None}
    first = spec.get("pretokenizers", [spec])[0]
    kinds = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
    return first["type"] in kinds or is_word_splitter(first)


# --------------------------------------------------------------------------------------------------
# What a tokenizer loses


class Losses:
    """Count what a normaliser leaves of a text. It looks up each character in a table."""

    def __init__(self, tokenizer):
        self.normalizer = tokenizer.normalizer
        size = sys.maxunicode + 1
        self.is_known = np.zeros(size, bool)  # whether the tables have the character
        self.n_written = np.zeros(size, np.uint8)  # characters that it becomes
        self.is_letter = np.zeros(size, bool)
        self.is_letter[:128] = [chr(code).isalpha() for code in range(128)]
        self.is_lost = np.zeros(size, bool)  # whether it is a letter and becomes none
        self.is_deleted = np.zeros(size, bool)  # whether it becomes nothing

    def count(self, text):
        """Return (characters after normalisation, fraction of letters lost, characters deleted)."""
        # a run of spaces becomes one
        n_written = len(text)
        if "  " in text:
            n_written = len(MANY_SPACES.sub(" ", text))
        if text.isascii():
            return n_written, 0.0, 0

        # only characters outside ASCII become several, or none
        all_codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        codes = all_codes[all_codes > 127]
        for code in np.unique(codes[~self.is_known[codes]]):
            self.look_up(chr(code))
        n_written += int(self.n_written[codes].sum()) - len(codes)
        n_deleted = int(self.is_deleted[codes].sum())
        n_lost = int(self.is_lost[codes].sum())
        if not n_lost:
            return n_written, 0.0, n_deleted
        return n_written, n_lost / int(self.is_letter[all_codes].sum()), n_deleted

    def look_up(self, character):
        """Fill the tables for a character, by what becomes of it between two letters."""
        around = f"q{character}q"
        if self.normalizer:
            around = self.normalizer.normalize_str(around)
        form = around.partition("q")[2].rpartition("q")[0]
        code = ord(character)
        self.is_known[code] = True
        self.n_written[code] = len(form)
        self.is_letter[code] = character.isalpha()
        self.is_lost[code] = character.isalpha() and not any(c.isalpha() for c in form)
        self.is_deleted[code] = not form


def warn_of_unknown(tokenizer, encoded):
    """Print a warning if more than 1 % of the tokens of some texts are <unk>.

    encoded: pairs of (text, token ids).
    """
    unk = special_ids(tokenizer)["unk"]
    n_tokens = 0
    n_unknown = 0
    for _, tokens in encoded:
        n_tokens += len(tokens)
        n_unknown += int((tokens == unk).sum())
    if n_unknown <= n_tokens / 100:
        return

    # a character is lost if it is unknown alone
    characters = Counter()
    for text, _ in encoded:
        characters.update(text)
    lost = []
    for c, _ in characters.most_common():
        if len(lost) < N_LOST and unk in tokenizer.encode(c, add_special_tokens=False).ids:
            lost.append(c)
    print(
        f"warning: {n_unknown / n_tokens:.1%} of the tokens are <unk>, of which a model learns "
        f"nothing; the commonest characters that the vocabulary lacks: {' '.join(lost) or 'none'}; "
        "a larger vocab_size keeps more of them"
    )
