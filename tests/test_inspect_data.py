"""Tests of tools/inspect_data.py."""

from pathlib import Path

from test_prepare import bins


def test_rows_and_overlap(run, tiny_data):
    tokenizer = bins()[3]
    slices = [r[4:20].tolist() for r in bins()[0]]
    ids = next(
        s
        for s in slices
        if tokenizer.encode(tokenizer.decode(s), add_special_tokens=False).ids == s
    )
    row = tokenizer.decode(ids)
    Path("glue/RTE").mkdir(parents=True)
    other = "gol " * 12
    Path("glue/RTE/dev.tsv").write_text(
        f"index\tsentence1\tsentence2\tlabel\n0\t{row}\t{other}\tentailment\n"
    )
    message, output = run("inspect_data.py", "data/tiny", "--rows=3", "--overlap=glue")
    assert message is None and output.count(f" of {len(slices)}: ") == 3, output
    assert (
        "RTE/dev.tsv: 1 of 2 sentences of 8 tokens or more are whole in a row of data/tiny"
        in output
    )
    assert "holds no GLUE" in run("inspect_data.py", "data/tiny", "--overlap=data")[0]


def test_the_summary_is_that_of_prepare(run, tiny_data):
    message, output = run("inspect_data.py", "data/tiny", "--rows=0")
    assert message is None, message
    lines = [line for line in output.splitlines() if line.startswith("  ")]
    assert len(lines) > 8 and set(lines) <= set(tiny_data.splitlines())
    assert "row 0 of" not in output


def test_a_folder_without_data(run):
    message, _ = run("inspect_data.py", "data/nothing")
    assert message == "inspect_data.py: data/nothing holds no prepared data; run prepare.py first"
