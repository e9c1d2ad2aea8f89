"""Verdicts on the rules: what is known to be kept or broken, and what nobody has looked at."""

import json
from pathlib import Path

import pytest

from nanocram.faults import sha256_of, write_json
from nanocram.rules import (
    NO_MODEL,
    ONE_DAY,
    RAW_TEXT,
    SCRATCH,
    overlap_of_run,
    rules_lines,
    rules_record,
    verdicts,
)

CONFIG = {"count_tokens": 0}
WIKIPEDIA = {"path": "wikimedia/wikipedia", "name": "20231101.en"}
THEIRS = "JonasGeiping/the_pile_WordPiecex32768_2efdb9d060d1ae95faf952ec1a50f020"


def record_of(sources, tokenizer="", overlap=None, hours=24.0, world=1):
    settings = {"sources": sources, "tokenizer_file": tokenizer}
    meta = {"settings": settings, "overlap": overlap}
    return rules_record(meta, CONFIG, hours, "cuda", world)


def words(record):
    return [one["verdict"] for one in record.values()]


@pytest.mark.parametrize(
    "source, verdict",
    [
        (WIKIPEDIA, "kept"),
        ("docs", "kept"),
        ({"path": THEIRS, "column": "input_ids"}, "kept"),
        ({"path": "HuggingFaceFW/fineweb-edu"}, "broken"),
        ("fineweb_edu/*.parquet", "broken"),
        ("texts/FineWeb Edu/", "broken"),
        ({"files": "mlfoundations/DCLM-baseline-1.0"}, "broken"),
        ({"path": "HuggingFaceTB/smollm-corpus", "name": "cosmopedia-v2"}, "broken"),
        # anything may be in these
        ("texts/", "not checked"),
        ({"path": "someone/allenai-c4"}, "not checked"),
        ({"path": "json", "data_files": "allenai/c4"}, "not checked"),
    ],
)
def test_sources_are_known_by_their_names(source, verdict):
    assert record_of([source])[NO_MODEL]["verdict"] == verdict
    assert record_of([WIKIPEDIA, source])[NO_MODEL]["verdict"] == verdict


def test_a_tokenizer_is_known_by_where_it_came_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("alone", "model", "corpus", "borrowed"):
        Path(folder).mkdir()
        Path(folder, "tokenizer.json").write_text("{}")
    Path("model/vocab.txt").write_text("")
    sha256 = {"tokenizer": sha256_of("corpus/tokenizer.json")}
    write_json("corpus/meta.json", {"sha256": sha256, "settings": {"tokenizer_file": ""}})
    # a corpus whose tokenizer is itself a given one
    given = {"tokenizer_file": "model/tokenizer.json"}
    write_json("borrowed/meta.json", {"sha256": sha256, "settings": given})
    expected = {
        f"{THEIRS}/tokenizer/tokenizer.json": "kept",
        "corpus/tokenizer.json": "kept",
        "model/tokenizer.json": "broken",
        "borrowed/tokenizer.json": "broken",
        "alone/tokenizer.json": "not checked",
        "gone/tokenizer.json": "not checked",
    }
    for path, verdict in expected.items():
        found = record_of([WIKIPEDIA], path)[NO_MODEL]
        assert found["verdict"] == verdict, (path, found)
    # another file beside the same meta.json is not the corpus's
    Path("corpus/tokenizer.json").write_text("[]")
    assert record_of([WIKIPEDIA], "corpus/tokenizer.json")[NO_MODEL]["verdict"] == "not checked"


def test_downstream_data_and_time():
    assert words(record_of([WIKIPEDIA])) == ["kept", "kept", "not checked", "kept"]
    some = {"SST-2/train.tsv": [40, 1000], "RTE/dev.tsv": [0, 200]}
    found = record_of([WIKIPEDIA], overlap=some)[RAW_TEXT]
    assert found["verdict"] == "kept" and "40 of 1,000 sentences (SST-2/train.tsv)" in found["did"]
    most = some | {"RTE/dev.tsv": [150, 200]}
    assert record_of([WIKIPEDIA], overlap=most)[RAW_TEXT]["verdict"] == "broken"
    assert record_of([WIKIPEDIA], overlap={"a": [0, 0]})[RAW_TEXT]["verdict"] == "not checked"
    for hours, world, verdict in ((24.0, 1, "kept"), (24.1, 1, "broken"), (1.0, 2, "broken")):
        assert record_of(["docs"], hours=hours, world=world)[ONE_DAY]["verdict"] == verdict
    meta = {"settings": {"sources": ["docs"], "tokenizer_file": ""}}
    start = rules_record(meta, {"count_tokens": 0, "init_from": "some/bert"}, 1, "cpu", 1)[SCRATCH]
    assert start["verdict"] == "broken" and "some/bert" in start["did"]


def test_inside_the_rules_is_said_if_all_five_are_kept():
    entry = {"settings": {"glue_epochs": 5}}
    rows = {"run": {"rte": entry, "cola": entry}}
    record = record_of([WIKIPEDIA], overlap={"RTE/dev.tsv": [0, 200]})
    lines = rules_lines(verdicts(rows, record))
    assert lines[0] == "Inside the rules of cramming:" and sum(": kept (" in x for x in lines) == 5
    cases = [
        (rows, record_of([WIKIPEDIA])),
        (rows, {}),
        (rows | {"some/bert": {}}, record),
        ({"run": {"rte": {"settings": {"glue_epochs": 6}}}}, record),
        ({"run": {"rte": entry, "cola": {"settings": {"glue_epochs": 4}}}}, record),
    ]
    for other_rows, other_record in cases:
        assert "Inside" not in str(rules_lines(verdicts(other_rows, other_record)))
    # what an older version wrote
    old = {rule: {"ok": True, "did": "x"} for rule in record}
    assert words(verdicts(rows, old)) == ["not checked"] * 4 + ["kept"]


def test_an_overlap_that_was_searched_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overlap = {"RTE/dev.tsv": [150, 200]}
    Path("out").mkdir()
    Path("data/x").mkdir(parents=True)
    Path("out/config.json").write_text(json.dumps({"dataset": "x", "train_sha256": "a"}))
    assert overlap_of_run(Path("out")) is None
    for sha256, expected in (("a", overlap), ("b", None)):
        meta = {"sha256": {"train": sha256}, "overlap": overlap}
        Path("data/x/meta.json").write_text(json.dumps(meta))
        assert overlap_of_run(Path("out")) == expected
    assert verdicts({}, record_of([WIKIPEDIA]), overlap)[RAW_TEXT]["verdict"] == "broken"
