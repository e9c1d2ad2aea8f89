"""The programs of docs/use.md, on a tiny model."""

import re
import warnings
from pathlib import Path

import pytest
from conftest import ROOT
from test_export_hf import folder, tokenizer  # noqa: F401

TEXT = (ROOT / "docs" / "use.md").read_text()
PROGRAMS = dict(re.findall(r"## (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL))
# extras that a program needs besides transformers, if these words are in it
NEEDED = {
    "Trainer": ["accelerate"],
    "sentence_transformers": ["sentence_transformers"],
    "peft": ["peft"],
    "onnx": ["onnxruntime", "onnxscript"],
}
# one program each; ModernBERT has no code of ours, so two are enough
CASES = [("crammed", title) for title in PROGRAMS]
CASES += [("modern", "Compare texts"), ("modern", "Without PyTorch (ONNX)")]


def test_each_section_has_a_program():
    assert len(PROGRAMS) == TEXT.count("\n## ") == 7


@pytest.mark.parametrize("name, title", CASES)
def test_a_program_runs(folder, capsys, name, title):  # noqa: F811
    program = PROGRAMS[title]
    for word, modules in NEEDED.items():
        for module in modules:
            if word in program:
                pytest.importorskip(module)
    Path(folder(name)).rename("my_bert")
    if name == "modern":
        program = program.replace(", trust_remote_code=True", "")
    warnings.simplefilter("ignore")
    names = {}
    exec(compile(program, title, "exec"), names)
    output = capsys.readouterr().out
    if title == "Fill masks":
        assert output.count("%") == 5
    elif "ONNX" in title:
        assert float(output.rpartition(":")[2]) < 1e-5
    elif title == "Compare texts":
        model = names["model"]
        batch = model.tokenizer(["fan gon."], return_tensors="pt")
        hidden = model[0].auto_model(**batch).last_hidden_state
        mean = hidden.mean(1)[0].detach().numpy()
        assert model.encode("fan gon.") == pytest.approx(mean, abs=1e-5)
