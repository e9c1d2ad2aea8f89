"""One config file for all stages: `python train.py config/demo.py --seed=2 --ablation=rotary`.

A key is a plain assignment at the top of a stage script, or a field of model.py's Config, with a comment that says what
it is. The comment may open with what is allowed: `[0, 1)` is a range, `{auto, never}` a choice. The scripts are read
with `ast`, so a config file may set keys of every stage, and a key that no stage declares is refused.

--scale=NAME and --ablation=NAME stand for the overrides of that name in config/ablations.py.
"""

import ast
import contextlib
import copy
import difflib
import functools
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
STAGES = ["prepare.py", "model.py", "train.py", "finetune_glue.py"]


@functools.cache
def declared(script):
    """The keys of one stage, read from its source: {name: (default, comment)}."""
    source = (ROOT / script).read_text(encoding="utf-8")
    body = ast.parse(source).body
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            body = node.body
    lines, keys = source.splitlines(), {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith("_"):
            comment = lines[node.lineno - 1].partition("  # ")[2]
            keys[target.id] = (ast.literal_eval(node.value), comment)
    return keys


def did_you_mean(name, known):
    near = difflib.get_close_matches(str(name), known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def check(key, value, default, comment):
    """Returns the value in the default's type, ~ expanded; SystemExit where type, range or choice do not allow it."""
    if isinstance(value, str):
        value = os.path.expanduser(value)
    if isinstance(default, list) and isinstance(value, (str, dict)):
        value = [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else [value]
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        value = type(default)(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        kinds = type(value).__name__, type(default).__name__
        sys.exit(f"config: {key} = {value!r} is of type {kinds[0]}, not {kinds[1]} as in {key} = {default!r}")
    if choice := re.match(r"\{(.+?)\}", comment):
        if value not in (options := choice[1].split(", ")):
            sys.exit(f"config: {key} = {value!r} is none of {', '.join(options)}{did_you_mean(value, options)}")
    if limits := re.match(r"([\[(])([^,\s]+), ([^,\s]+)([\])])", comment):
        low, high = float(limits[2]), float(limits[3])
        above = value >= low if limits[1] == "[" else value > low
        below = value <= high if limits[4] == "]" else value < high
        if not (above and below):  # also catches nan
            sys.exit(f"config: {key} = {value!r} is outside {limits[0]}")
    return value


def run_file(path, **names):
    """The names that a file sets, beside those given. A leading _, functions and modules do not count."""
    names["__file__"] = path
    try:
        exec(compile(Path(path).read_text(encoding="utf-8-sig"), path, "exec"), names)
    except FileNotFoundError as e:
        sys.exit(f"config: {e.filename} does not exist; run from the repository's folder, as in config/demo.py")
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(f"config: {path} cannot be read: {one_line(e)}")
    except Exception as e:
        own = isinstance(e, SyntaxError) and e.filename in (path, None)  # not that of a base which the file execs
        line = e.lineno if own else e.__traceback__.tb_next.tb_lineno
        sys.exit(f"config: {path}, line {line}: {type(e).__name__}: {e}")
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, ModuleType) and not callable(v)}


def named(kind, name, config):
    """The overrides that config/ablations.py, with the keys so far as its variables, lists under `name`."""
    table = run_file("config/ablations.py", **copy.deepcopy(config))[kind + "s"]
    if name not in table:
        sys.exit(f"config: {name!r} is none of the {kind}s in config/ablations.py{did_you_mean(name, table)}")
    return table[name].items()


def literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def configure(script, argv=None, also=()):
    """Resolves defaults, then config files and `--key=value` overrides as they come, for every stage.

    script: the calling stage's file name; its keys, and those of the scripts in `also`, are what --help prints.
    Returns {key: value} for the keys of all stages. Every mistake ends the process with one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    script = Path(script).name
    stages = {s: declared(s) for s in STAGES}
    if "--help" in argv or "-h" in argv:
        print(f"usage: python {script} config/FILE.py [--key=value ...]\n")
        for stage in [script, *also]:
            print(f"{stage}:")
            for key, (default, comment) in stages[stage].items():
                print(f"  --{key}={default!r}".ljust(34) + f"  {comment}")
        print("--scale=NAME and --ablation=NAME are listed in config/ablations.py")
        sys.exit(0)

    keys = {k: v for stage in stages.values() for k, v in stage.items()} | stages.get(script, {})
    config = {k: default for k, (default, _) in keys.items()}
    for arg in argv:
        name, _, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--"):
            where, given = arg, run_file(arg).items()
        elif "=" not in arg:
            sys.exit(f"config: {arg}: an override is written --key=value")
        elif name in ("scale", "ablation"):
            where, given = "config/ablations.py", named(name, text, config)
        else:
            where, given = "the command line", [(name, literal(text))]
        for key, value in given:
            if key not in keys:
                sys.exit(f"config: no stage knows the key {key!r} of {where}{did_you_mean(key, keys)} (--help lists them)")
            config[key] = check(key, value, *keys[key])
    return config


@contextlib.contextmanager
def replace_file(path):
    """Yields a binary file that appears under its name only when complete: written aside, fsynced, renamed."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def one_line(error):
    """An exception as its type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def write_json(path, value):
    with replace_file(path) as f:
        f.write((json.dumps(value, indent=1) + "\n").encode())
