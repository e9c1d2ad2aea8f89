import pytest

from nanocram.rules import rules_line, rules_record


@pytest.mark.parametrize(
    "tokenizer, source, hours, world, rule",
    [
        ("bert.json", "a", 1, 1, "2"),
        ("", "HuggingFaceFW/fineweb-edu", 1, 1, "2"),
        ("", "a", 24.1, 1, "4"),
        ("", "a", 1, 2, "4"),
        ("", "a", 24, 1, ""),
    ],
)
def test_a_broken_rule_is_named(tokenizer, source, hours, world, rule):
    record = rules_record(
        {"tokenizer_file": tokenizer, "sources": [source]}, 0, hours, "cuda", world
    )
    assert [k[0] for k, r in record.items() if not r["ok"]] == list(rule)
    assert rules_line({"rows": {}}, record).startswith(f"broken: {rule} " if rule else "inside")
    assert rules_line({"rows": {"run": {}}}, {}).startswith("unknown")
