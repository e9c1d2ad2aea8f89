"""The layout of the project: what may import what, and where a script may print and exit."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

STAGES = ["prepare", "train", "finetune_glue"]
TOP = [*STAGES, "model"]
LIBRARY = sorted(p for p in (ROOT / "nanocram").glob("*.py") if p.stem != "__init__")
TOOLS = sorted(p for p in (ROOT / "tools").glob("*.py") if p.stem != "__init__")
EVERY_FILE = [*(ROOT / f"{name}.py" for name in TOP), *LIBRARY, *TOOLS]


def label(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Return the modules that a file imports anywhere, as "package.module" or "module"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def of_project(path):
    """Return what of the project a file imports: model, a stage, nanocram or tools."""
    return {name.partition(".")[0] for name in imports(path)} & {*TOP, "nanocram", "tools"}


def test_four_scripts_stand_on_top():
    assert sorted(p.stem for p in ROOT.glob("*.py")) == sorted(TOP)
    for folder in ("nanocram", "tools"):
        assert (ROOT / folder / "__init__.py").read_text() == ""


def test_the_model_imports_nothing_of_the_project():
    assert of_project(ROOT / "model.py") == set()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_imports_the_model_and_the_library(name):
    assert of_project(ROOT / f"{name}.py") <= {"model", "nanocram"}


@pytest.mark.parametrize("path", LIBRARY, ids=label)
def test_the_library_imports_no_stage_and_no_tool(path):
    assert of_project(path) <= {"model", "nanocram"}


def test_no_library_file_needs_itself():
    """The imports of nanocram/ have no cycle."""
    needs = {}
    for path in LIBRARY:
        names = {name.split(".")[1] for name in imports(path) if name.startswith("nanocram.")}
        needs[path.stem] = names & {p.stem for p in LIBRARY}
    while needs:
        free = [name for name, others in needs.items() if not others & needs.keys()]
        assert free, f"a cycle among {', '.join(needs)}"
        for name in free:
            del needs[name]


def modules_after(code):
    """Return the modules that are loaded after some code ran in a new process."""
    code += "\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_train_never_loads_datasets():
    assert "datasets" not in modules_after("import train")


def test_prepare_has_no_import_of_torch():
    """Libraries may load it; what the file says, and what it imports of the project, does not."""
    files = [ROOT / "prepare.py"]
    for path in files:
        assert "torch" not in {name.partition(".")[0] for name in imports(path)}, path
        for name in imports(path):
            other = ROOT / f"{name.replace('.', '/')}.py"
            if other.exists() and other not in files:
                files.append(other)
    assert ROOT / "nanocram" / "tokenizer.py" in files


@pytest.mark.parametrize("path", [ROOT / f"{name}.py" for name in STAGES], ids=label)
def test_only_main_reads_the_keys_of_a_stage(path):
    """A function that uses a key's name has it as an argument or a variable of its own."""
    from nanocram.configurator import Stage

    keys = Stage(path).own.keys()
    assert len(keys) > 15
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name == "main":
            continue
        used = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        local = {n.id for n in used if isinstance(n.ctx, ast.Store)}
        local |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        read = {n.id for n in used if isinstance(n.ctx, ast.Load)} & keys
        # the builtin compile() and the like are no keys where they are called
        called = {
            n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and hasattr(n.func, "id")
        }
        assert not read - local - called, f"{path.name}: {node.name} reads {read - local - called}"


def test_the_keys_that_may_differ_between_parts_of_a_run_are_keys_of_train():
    import train
    from nanocram.configurator import Stage

    assert train.FREE_KEYS < Stage(ROOT / "train.py").own.keys()


@pytest.mark.parametrize("path", EVERY_FILE, ids=label)
def test_nobody_writes_the_globals_of_a_module(path):
    """Neither another module's nor its own. configure() does it once, for the calling stage."""
    text = path.read_text()
    assert not re.search(r"vars\(\w+\)\.update|globals\(\)\.update|globals\(\)\[", text)
    modules = {name.partition(".")[0] for name in imports(path)} | {
        name.rpartition(".")[2] for name in imports(path) if name.startswith(("nanocram", "tools"))
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    written = target.value.id
                    known = written in modules and written in {*TOP, *(p.stem for p in LIBRARY)}
                    local = re.search(rf"\b{written} = |\b{written},|\({written}", text)
                    assert not known or local, f"{path.name} writes {written}.{target.attr}"


@pytest.mark.parametrize("path", LIBRARY, ids=label)
def test_library_code_raises_one_exception_and_never_exits(path):
    """It names no script that prints its messages: it does not know which one runs."""
    text = path.read_text()
    allowed = {"Fault", "EOFError", "OSError", "KeyError", None}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Raise):
            name = getattr(getattr(node.exc, "func", None), "id", None)
            assert name in allowed, f"line {node.lineno} raises {name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "exit":
                assert path.stem in ("faults", "configurator"), f"line {node.lineno} exits"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.match(r"(prepare|train|finetune_glue|\w+)\.py: ", node.value)


def test_lines_are_short_and_functions_too():
    """Lines up to 100 characters, but for tables; no function over 60 lines, but train.main."""
    for path in EVERY_FILE:
        text = path.read_text()
        for number, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 100 or "noqa: E501" in line, f"{path}, line {number}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                limit = 200 if (path.name, node.name) == ("train.py", "main") else 60
                assert length <= limit, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", [p for p in TOOLS if p.stem != "modeling_nanocram"], ids=label)
def test_a_tool_explains_itself(path):
    """python -m tools.NAME --help works without anything else, and ends without an error."""
    name = f"tools.{path.stem}"
    done = subprocess.run(
        [sys.executable, "-m", name, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr
