"""Tests of nanocram/tokenizer.py: vocabularies, special tokens and encoding."""

import itertools
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, sentences, start
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import bins
from tokenizers import Tokenizer, models

from nanocram.faults import Fault
from nanocram.tokenizer import (
    FastEncoder,
    Losses,
    encode_ahead,
    make_normalizer,
    train_tokenizer,
)


def test_the_vocabulary_is_made_of_a_sample_of_all_sources(run):
    Path("b.txt").write_text(Path("text.txt").read_text().translate(str.maketrans("bdfg", "1234")))
    for name, n in (("tiny", 10**9), ("b", 20_000)):
        args = [*TINY, "--sources=text.txt,b.txt", f"--dataset={name}", f"--tokenizer_chars={n}"]
        assert run("prepare.py", *args)[0] is None
    assert bins("b")[2]["sha256"]["tokenizer"] != bins()[2]["sha256"]["tokenizer"]
    assert {"b", "1"} <= bins("b")[3].get_vocab().keys()


def test_normaliser_and_round_trip(run):
    lines = ["Café  ``x'' ÉTÉ", "naïve résumé 中 end"] * 200
    Path("text.txt").write_text(
        "\n\n".join(f"{line} {d}" for line, d in zip(lines, sentences(400)))
    )
    run("prepare.py", *TINY)
    tokenizer = bins()[3]
    assert tokenizer.normalizer.normalize_str("Café  ``x'' É中") == 'cafe "x" e'
    text = sentences(1)[0].replace("\n", " ").replace(".", " .")
    assert tokenizer.decode(tokenizer.encode(text).ids).replace(" .", ".") == text.replace(
        " .", "."
    )
    run(
        "prepare.py",
        *TINY,
        "--dataset=b",
        "--lowercase=False",
        "--strip_accents=False",
        "--ascii_only=False",
    )
    assert bins("b")[3].normalizer.normalize_str("Café 中") == "Café 中"


@pytest.mark.parametrize("to_ascii", [True, False])
def test_ascii_is_encoded_as_the_whole_tokenizer_does(to_ascii):
    words = " ".join(map("".join, itertools.product("ab9é", repeat=4)))
    tokenizer = train_tokenizer(
        lambda: iter([words, "é å ª ß 中 - < . , '"] * 9),
        kind="wordpiece",
        vocab_size=80,
        lowercase=True,
        strip_accents=to_ascii,
        ascii_only=to_ascii,
    )
    tokenizer.encode_special_tokens = True
    letters = st.text(alphabet="aAbB9 \n\t.,'\"`<>-_éÉåªﬁ\u0301\u00a0ß中", max_size=60)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(letters, max_size=4))
    def check(texts):
        found = [ids.tolist() for _, ids in encode_ahead(tokenizer, texts)]
        assert found == [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

    check()
    long = [
        "b" * 250,
        "-" * 101 + " a",
        "é" * 99 + "É" * 30,
        "a" * 100,
        "’" * 101,
        "ab \u1fef\u212a",
    ]
    found = [ids.tolist() for _, ids in encode_ahead(tokenizer, long)]
    assert found == [e.ids for e in tokenizer.encode_batch(long, add_special_tokens=False)]
    # as few texts as possible need the slow way
    fast = FastEncoder(tokenizer)
    is_fast = [ids is not None for ids in fast.encode(["b a, ab", "é b", "b" * 101])]
    assert is_fast == [True, to_ascii, False]


def test_transformers_opens_the_tokenizer_and_encodes_alike(tiny_data):
    from transformers import PreTrainedTokenizerFast

    own = bins()[3]
    theirs = PreTrainedTokenizerFast(tokenizer_file="data/tiny/tokenizer.json")
    for text in [*sentences(5), "Ünknown wörds!", ""]:
        assert theirs(text)["input_ids"] == own.encode(text).ids
    assert theirs("bal", "dem")["input_ids"] == own.encode("bal", "dem").ids


def test_special_tokens_in_a_text_are_text(run):
    Path("text.txt").write_text("\n\n".join(d + " <mask> <sep> <pad>" for d in sentences(400)))
    assert run("prepare.py", *TINY)[0] is None
    train, _, meta, _ = bins()
    assert not np.isin(train, [0, 2, 4]).any() and (train == 3).sum() <= 400


def test_the_vocabulary_is_the_same_in_another_process(tiny_data, home):
    process = start("prepare.py", *TINY, "--dataset=b", cwd=home)
    process.communicate()
    assert bins("b")[2]["sha256"] == bins()[2]["sha256"]


def test_rare_characters_leave_room_for_words(run):
    Path("text.txt").write_text(
        "\n\n".join(f"{d} {chr(0x4E00 + i)}" for i, d in enumerate(sentences(400)))
    )
    assert run("prepare.py", *TINY, "--ascii_only=False")[0] is None
    vocab = bins()[3].get_vocab()
    assert len(vocab) == 90 and sum(len(t.removeprefix("##")) > 1 for t in vocab) > 30
    assert bins()[2]["counts"]["unknown tokens"] > 100


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_other_kinds_of_vocabularies(run, home, kind):
    from transformers import PreTrainedTokenizerFast

    Path("text.txt").write_text("\n\n".join(sentences(400, seed=5)))
    args = [*TINY, f"--tokenizer_kind={kind}", "--order=word_length", "--vocab_size=56"]
    message, _ = run("prepare.py", *args)
    assert message is None, message
    train, _, meta, tokenizer = bins()
    assert tokenizer.get_vocab_size() == 56 and meta["special_ids"]["mask"] == 4
    text = sentences(1)[0].replace("\n", " ").replace(".", " .")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert (
        len(tokenizer.encode(text).ids) < len(text) * 0.6
        and meta["counts"].get("unknown tokens", 0) == 0
    )
    theirs = PreTrainedTokenizerFast(tokenizer_file="data/tiny/tokenizer.json")
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    lengths = [
        sum(len(tokenizer.id_to_token(int(i))) for i in r) for r in train
    ]  # "▁" stands for the space
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    process = start("prepare.py", *args, "--dataset=b", cwd=home)
    process.communicate()
    assert bins("b")[2]["sha256"] == meta["sha256"]
    assert run("prepare.py", *args, "--dataset=c", "--order=sentence_length")[0] is None
    stops = [
        tokenizer.decode(row.tolist()).count(".") for row in bins("c")[0]
    ]  # BPE has them with the space before them
    assert stops == sorted(stops, reverse=True) and stops[0] > stops[-1]


def test_a_given_tokenizer_and_its_special_tokens(run):
    run("prepare.py", *TINY)
    text = Path("data/tiny/tokenizer.json").read_text()
    for name in ("pad", "unk", "cls", "sep", "mask"):
        text = text.replace(f"<{name}>", f"[{name.upper()}]")
    data = json.loads(text)
    vocab = data["model"]["vocab"]
    moved = {
        "[MASK]": vocab["."],
        ".": vocab["[MASK]"],
        "[SEP]": vocab["[PAD]"],
        "[PAD]": vocab["[SEP]"],
    }
    vocab |= moved
    for token in data["added_tokens"]:
        token["id"] = vocab[token["content"]]
    data["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    Path("bert.json").write_text(json.dumps(data))
    message, _ = run("prepare.py", *TINY, "--dataset=b", "--tokenizer_file=bert.json")
    assert message is None, message
    expected = {"pad": 3, "unk": 1, "cls": 2, "sep": 0, "mask": moved["[MASK]"]}
    assert bins("b")[2]["special_ids"] == expected
    there = np.arange(90)
    there[[4, 3, 0, moved["[MASK]"]]] = [moved["[MASK]"], 0, 3, 4]
    assert (bins("b")[0] == there[bins()[0]]).all()
    message, _ = run(
        "prepare.py", *TINY, "--dataset=d", f"--tokenizer_file={Path('bert.json').resolve()}"
    )
    assert message is None and bins("d")[2]["sha256"] == bins("b")[2]["sha256"]
    Path("bert.json").write_text(json.dumps(data).replace("[MASK]", "[OTHER]"))
    message, _ = run("prepare.py", *TINY, "--dataset=c", "--tokenizer_file=bert.json")
    assert "neither <mask> nor [MASK]" in message


def trained(text, vocab_size, kind="wordpiece", to_ascii=False):
    """Return a tokenizer of a text, which is given again and again."""
    texts = text if isinstance(text, list) else [text]
    return train_tokenizer(
        lambda: iter(texts),
        kind=kind,
        vocab_size=vocab_size,
        lowercase=True,
        strip_accents=to_ascii,
        ascii_only=to_ascii,
    )


def tokens_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).tokens


def test_an_ideograph_is_a_word_and_a_rare_one_costs_one_token():
    rng = random.Random(0)
    common = "的一是不了人我在有他这为之大来"
    texts = ["".join(rng.choices(common, k=40)) + "。 " + d for d in sentences(50)]
    tokenizer = trained(texts, 120)
    found = tokens_of(tokenizer, "大来龘人。bal")
    assert found == ["大", "来", "<unk>", "人", "。", "bal"]
    assert not any(t.startswith("##") and t[2] in common for t in tokenizer.get_vocab())


@pytest.mark.parametrize(
    "script", [(0x0E01, 0x0E2E), (0x1780, 0x17A2), (0x0E81, 0x0EA2), (0x1000, 0x1020)]
)
def test_a_rare_character_does_not_lose_its_clause(script):
    """Thai, Khmer, Lao and Burmese write clauses without spaces."""
    rng = random.Random(0)
    letters = [c for c in map(chr, range(*script)) if c.isalpha()][:20]
    words = ["".join(rng.choices(letters, k=4)) for _ in range(60)]
    texts = ["".join(rng.choices(words, k=12)) for _ in range(99)]
    tokenizer = trained(texts, 160)
    found = tokens_of(tokenizer, texts[0] + "龘" + texts[1])
    assert found.count("<unk>") == 1 and len(found) < len(texts[0] + texts[1])
    text = "".join(token.removeprefix("##") for token in found)
    assert text == texts[0] + "<unk>" + texts[1]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_words_of_any_length_are_encoded(kind):
    rng = random.Random(0)
    texts = ["".join(rng.choices("ACGT", k=rng.randint(300, 900))) for _ in range(60)]
    tokenizer = trained(texts, 64, kind, to_ascii=True)
    for text, ids in encode_ahead(tokenizer, [*texts[:3], "a " * 10 + texts[3], "gattaca" * 1000]):
        assert 1 not in ids
        written = "".join(tokenizer.id_to_token(i) for i in ids.tolist())
        assert written.replace("##", "").replace("▁", "") == text.lower().replace(" ", "")
        assert len(ids) < 0.7 * len(text)


def test_spaces_of_unicode_separate_words_and_invisible_marks_do_not():
    texts = [*sentences(50), "é"]
    for to_ascii in (True, False):
        tokenizer = trained(texts, 90, to_ascii=to_ascii)
        plain = tokens_of(tokenizer, "bal dem gol")
        for space in "\u00a0\u2028\u2029\u3000\u2003\u202f\u205f\u1680\u0085\u200b\t\n":
            assert tokens_of(tokenizer, f"bal{space}dem{space}{space}gol") == plain, repr(space)
        for mark in "\u00ad\u2060\ufeff":
            assert tokens_of(tokenizer, f"b{mark}al de{mark}m gol") == plain


def test_a_text_without_composed_characters_gives_the_same_data(run):
    text = "\n\n".join(f"ｶﾞ ä é {d} ｶﾞｶﾞ lä ñú" for d in sentences(400))
    for form in ("NFC", "NFD"):
        Path(f"{form}.txt").write_text(unicodedata.normalize(form, text))
        for times in "12":
            args = [f"--sources={form}.txt", "--strip_accents=False", "--ascii_only=False"]
            assert run("prepare.py", *TINY, *args, f"--dataset={form}{times}")[0] is None
    metas = [bins(name)[2] for name in ("NFC1", "NFC2", "NFD1", "NFD2")]
    assert all(m["sha256"] == metas[0]["sha256"] for m in metas)
    assert all(m["counts"] == metas[0]["counts"] for m in metas)
    assert "ガ" in bins("NFC1")[3].get_vocab()  # only NFKC composes the halves ｶ and ﾞ


def test_unknown_tokens_are_named(run):
    rare = "ßðþøł" * 3 + "đ"
    texts = [f"{d} {rare[i % 16]}{rare[i % 16]} x" for i, d in enumerate(sentences(400))]
    Path("text.txt").write_text("\n\n".join(texts))
    message, output = run("prepare.py", *TINY, "--ascii_only=False", "--vocab_size=64")
    assert message is None, message
    assert "of the tokens are <unk>" in output
    named = output.split("that the vocabulary lacks: ")[1].split(";")[0].split()
    assert set(named) <= set(rare) and 0 < len(named) <= 10
    assert "of the tokens are <unk>" not in run("prepare.py", *TINY, "--dataset=b")[1]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aÄé ß中бд. \t\u00ad\u0301", max_size=30), st.booleans())
def test_losses_are_those_of_the_normaliser(text, to_ascii):
    text = unicodedata.normalize("NFC", text)
    tokenizer = Tokenizer(models.WordLevel({}, ""))
    tokenizer.normalizer = make_normalizer(True, to_ascii, to_ascii)
    n_written, lost, n_deleted = Losses(tokenizer).count(text)
    normal = tokenizer.normalizer.normalize_str(text)
    letters = sum(map(str.isalpha, text))
    assert letters * (1 - lost) == pytest.approx(sum(map(str.isalpha, normal)))
    # blanks at the ends are written, and so are accents that a deleted character kept apart
    extra = text.count(" ") + sum(map(bool, map(unicodedata.combining, text)))
    assert len(normal) <= n_written <= len(normal) + extra
    kept = sum(bool(tokenizer.normalizer.normalize_str(f"x{c}x") != "xx") for c in text)
    assert len(text) - n_deleted == kept


def test_a_vocabulary_that_is_too_large_is_told_a_size_that_works():
    words = "यह एक छोटा वाक्य है जिसमें कई शब्द होते हैं और भाषा हिन्दी किताब पढ़ना अच्छा".split()
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=30)) for _ in range(50)]
    with pytest.raises(Fault, match="set vocab_size to") as fault:
        trained(texts, 150)
    size = int(str(fault.value).split("set vocab_size to ")[1].split(",")[0])
    assert trained(texts, size).get_vocab_size() == size
