"""Tests of nanocram/tokenizer.py: vocabularies, special tokens and encoding."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, sentences, start
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import bins

from nanocram.tokenizer import encode_ahead, train_tokenizer


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
    letters = st.text(alphabet="aAbB9 \n\t.,'\"`<>-_éÉåªﬁ\u0301\u00a0ß中", max_size=60)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(letters, max_size=4))
    def check(texts):
        found = [ids.tolist() for _, ids in encode_ahead(tokenizer, texts)]
        assert found == [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

    check()


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
