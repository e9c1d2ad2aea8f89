"""One config file for all stages: `python train.py config/demo.py --seed=2 --ablation=rotary`.

A stage is a script that calls `configure(globals())`. Its keys are the lower-case assignments above
its first def, class or ruler that have a comment, at the end of the line or directly above it. The
keys of the model are the fields of the `Config` that the stage imports. A comment may open with
what is allowed: `[0, 1)` is a range, `{auto, never}` a choice. It may end with the values of
another key with which this one has a meaning: `for schedule: linear, cosine`.

A config file may set the keys of every stage. So the other stages, which are the scripts in the
same folder that call configure, are read from their source; a key that none of them has is refused.
--scale=NAME and --ablation=NAME stand for the overrides of that name in config/ablations.py.
"""

import ast
import copy
import difflib
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from nanocram.faults import Fault, one_line

ROOT = Path(__file__).resolve().parent.parent
RULER = re.compile(r"#\s*-{10,}")
UNKNOWN = object()  # the default of another stage's key that its source alone does not tell
PLAIN = (str, int, float, bool, list, tuple, dict, type(None))  # what config.json can hold


@dataclass
class Key:
    default: object
    comment: str

    def check(self, name, value):
        """Return the value in the default's type, with ~ expanded. Raise Fault if not allowed."""
        # what a shell or a config file writes more shortly
        default = self.default
        if isinstance(value, str):
            value = os.path.expanduser(value)
        if isinstance(default, list) and isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(default, list) and isinstance(value, dict):
            value = [value]
        if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
            value = type(default)(value)
        if isinstance(default, float) and type(value) is int:
            value = float(value)

        # the type of the default
        if default is not UNKNOWN and default is not None and type(value) is not type(default):
            kinds = type(value).__name__, type(default).__name__
            raise Fault(
                f"{name} = {value!r} is of type {kinds[0]}, not {kinds[1]} like {default!r}"
            )

        # what the comment allows
        if choice := re.match(r"\{(.+?)\}", self.comment):
            options = choice[1].split(", ")
            if value not in options:
                hint = did_you_mean(value, options)
                raise Fault(f"{name} = {value!r} is none of {', '.join(options)}{hint}")
        if limits := re.match(r"([\[(])([^,\s]+), ([^,\s]+)([\])])", self.comment):
            low, high = float(limits[2]), float(limits[3])
            above = value >= low if limits[1] == "[" else value > low
            below = value <= high if limits[4] == "]" else value < high
            if not (above and below):  # so NaN is outside, too
                raise Fault(f"{name} = {value!r} is outside {limits[0]}")
        return value


def did_you_mean(name, known):
    near = difflib.get_close_matches(str(name), known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


# --------------------------------------------------------------------------------------------------
# Keys, read from the source of a stage or of a model's Config


def key_section(tree, lines):
    """Return the statements of a script above its first def, class or ruler."""
    section = []
    has_keys = False  # a ruler above the first assignment is a header
    end = 0
    for node in tree.body:
        ruled = any(RULER.match(line) for line in lines[end : node.lineno - 1])
        if ruled and has_keys or isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        section.append(node)
        has_keys = has_keys or isinstance(node, (ast.Assign, ast.AnnAssign))
        end = node.end_lineno
    return section


def comment_of(node, lines):
    """Return the comment that ends a statement's last line, or that stands directly above it."""
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
    if rest.startswith("#"):
        return rest.lstrip("# ")
    above = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("# "))
    return " ".join(above)


def declared_in(body, lines, values=None):
    """Return ({name: Key}, names that only lack a comment) of the assignments among statements.

    values: {name: default} if the code has run. Otherwise the defaults are evaluated from the
    source, with the builtins, math and the keys above as variables.
    """
    keys = {}
    bare = set()
    known = {"math": math}
    for node in body:
        # a lower-case name on the left of a plain assignment
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        name = target.id
        if not name.islower() or name.startswith("_"):
            continue

        # its default
        if values is not None:
            default = values.get(name, UNKNOWN)
        else:
            try:
                default = eval(compile(ast.Expression(node.value), "default", "eval"), dict(known))
            except Exception:
                default = UNKNOWN
        if default is not UNKNOWN:
            known[name] = default

        # a comment makes it a key
        if comment := comment_of(node, lines):
            keys[name] = Key(default, comment)
        else:
            bare.add(name)
    return keys, bare


class Stage:
    """The keys of one script: `own` and those of its `model`; `bare` names lack a comment."""

    def __init__(self, path, namespace=None):
        """Read a script. namespace: its globals if it is the one that runs."""
        self.path = Path(path)
        source = self.path.read_text(encoding="utf-8")
        lines = source.splitlines()
        tree = ast.parse(source)
        section = key_section(tree, lines)
        self.is_stage = "configure(globals())" in source
        self.own, self.bare = {}, set()
        if self.is_stage:
            self.own, self.bare = declared_in(section, lines, namespace)

        # what may hide a key, and the keys of the model
        self.below = tree.body[len(section) :]
        if namespace is None:
            self.model = self.model_keys_from_source(tree)
        else:
            self.model = model_keys_of_class(namespace.get("Config"))

    def refuse_what_cannot_be_a_key(self):
        """Raise Fault if another definition replaces a key, or config.json cannot hold it."""
        # a function, class or variable of the same name further down
        for node in self.below:
            names = {getattr(node, "name", None)}
            if isinstance(node, ast.Assign):
                names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            for name in names & self.own.keys():
                place = f"{self.path.name}, line {node.lineno}"
                raise Fault(f"{place}: {name} is also a key of this script; rename one of the two")

        # a default of another type
        for name, key in self.own.items():
            if key.default is not UNKNOWN and not isinstance(key.default, PLAIN):
                kind = type(key.default).__name__
                place = f"{self.path.name}: {name}"
                raise Fault(f"{place} is a {kind}, but a key is a number, a text, a list or a dict")

    def model_keys_from_source(self, tree):
        """Return the keys of the Config that the script defines or imports from its folder."""
        path = self.path
        for node in tree.body:
            names = node.names if isinstance(node, ast.ImportFrom) else []
            if "Config" in [alias.name for alias in names]:
                path = self.path.with_name(f"{node.module}.py")
        return keys_of_config(path) if path.exists() else {}


def model_keys_of_class(config_class):
    """Return the keys of a Config class that was imported, with the defaults that it has."""
    if config_class is None:
        return {}
    path = sys.modules[config_class.__module__].__file__
    return keys_of_config(Path(path), vars(config_class()))


def keys_of_config(path, defaults=None):
    """Return {name: Key} of the class Config in a file, or {} if it has none."""
    source = path.read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            return declared_in(node.body, source.splitlines(), defaults)[0]
    return {}


def other_stages(path):
    """Return the stages next to a script, without itself. A file that is no Python is none."""
    stages = []
    for other in sorted(Path(path).parent.glob("*.py")):
        if other.resolve() == Path(path).resolve():
            continue
        try:
            stage = Stage(other)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        if stage.is_stage:
            stages.append(stage)
    return stages


# --------------------------------------------------------------------------------------------------
# Values, from config files and overrides


def run_config_file(path, **names):
    """Return the names that a config file sets, in addition to the given ones.

    Names with a leading underscore, functions and modules do not count.
    """
    names["__file__"] = path
    try:
        exec(compile(Path(path).read_text(encoding="utf-8-sig"), path, "exec"), names)
    except FileNotFoundError as e:
        raise Fault(
            f"{e.filename} does not exist; run from the repository's folder, like config/demo.py"
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise Fault(f"{path} cannot be read: {one_line(e)}") from e
    except Exception as e:
        if isinstance(e, SyntaxError) and e.filename in (path, None):
            line = e.lineno
        else:  # the error may lie in a base that the file executes: name the line of this file
            line = e.__traceback__.tb_next.tb_lineno
        raise Fault(f"{path}, line {line}: {type(e).__name__}: {e}") from e

    # helpers of the file are no keys
    found = {}
    for name, value in names.items():
        if not name.startswith("_") and not isinstance(value, ModuleType) and not callable(value):
            found[name] = value
    return found


def overrides_named(kind, name, config):
    """Return the overrides that config/ablations.py lists under a name.

    The file runs with the keys so far as its variables. kind: scale or ablation.
    """
    table = run_config_file("config/ablations.py", **copy.deepcopy(config))[f"{kind}s"]
    if name not in table:
        hint = did_you_mean(name, table)
        raise Fault(f"{name!r} is none of the {kind}s in config/ablations.py{hint}")
    return table[name]


def literal(text):
    """Return the Python literal that a text is, or else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def resolve_stage(stage, argv):
    """Return {key: value} for the keys of all stages: defaults, then argv in its order."""
    stage.refuse_what_cannot_be_a_key()
    others = other_stages(stage.path)

    # {key: its declarations}; what this stage and its model declare, they declare alone
    declared = {}
    for keys in [other.own for other in others] + [other.model for other in others]:
        for name, key in keys.items():
            declared.setdefault(name, []).append(key)
    for name, key in (stage.model | stage.own).items():
        declared[name] = [key]

    # defaults, as far as they are known
    config = {}
    for name, keys in declared.items():
        known = [key.default for key in keys if key.default is not UNKNOWN]
        if known:
            config[name] = copy.deepcopy(known[0])

    # config files and overrides, each of which replaces what came before
    when = {}
    for i, word in enumerate(argv):
        inherited = set()
        name, _, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            origin, given = word, run_config_file(word)
            inherited = given.keys() - assigned_in(word)
        elif "=" not in word:
            raise Fault(f"{word}: an override is written --key=value")
        elif name in ("scale", "ablation"):
            origin, given = "config/ablations.py", overrides_named(name, text, config)
        else:
            # a name may look like a number: --dataset=2024
            is_text = name in declared and isinstance(declared[name][0].default, str)
            origin, given = "the command line", {name: text if is_text else literal(text)}
        for key, value in given.items():
            if key not in declared:
                raise Fault(unknown_key(key, origin, declared, [stage, *others]))
            config[key] = first_accepted(declared[key], key, value)
            when[key] = (i, key not in inherited)
    for name, keys in declared.items():
        drop_if_meaningless(name, keys[0], config, when, name in stage.own | stage.model)
    return config


def assigned_in(path):
    """Return the names that a config file assigns itself, not through a base that it executes."""
    names = set()
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8-sig"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def drop_if_meaningless(name, key, config, when, is_own):
    """Set a key back to its default if another setting makes it meaningless.

    Raises Fault if it was set together with that setting, or later. when: {key: place of the last
    word that set it}.
    """
    # the other key, and the values with which this one has a meaning
    condition = re.search(r"for (\w+): ([\w, ]+)$", key.comment)
    if not condition or config.get(name, key.default) == key.default:
        return
    other = condition[1]
    allowed = condition[2].split(", ")
    if config.get(other) in allowed:
        return

    # on purpose, or left over from a base
    what = f"{name} = {config[name]!r} has no meaning with {other} = {config[other]!r}"
    never = (-1, False)
    if when.get(name, never) >= when.get(other, never):
        raise Fault(f"{what}, only with {', '.join(allowed)}; leave it out")
    if is_own:
        print(f"{what}; it was set before, and is left out")
    config[name] = copy.deepcopy(key.default)


def keys_given(script, argv):
    """Return the keys that config files and overrides set, whatever they set them to."""
    config = resolve(script, argv)
    given = set()
    for word in argv:
        name, _, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            given |= run_config_file(word).keys()
        elif name in ("scale", "ablation"):
            given |= overrides_named(name, text, config).keys()
        else:
            given.add(name)
    return given


def first_accepted(keys, name, value):
    """Return the value as one declaration of a key takes it. Raise the Fault of the first."""
    faults = []
    for key in keys:
        try:
            return key.check(name, value)
        except Fault as e:
            faults.append(e)
    raise faults[0]


def unknown_key(key, origin, declared, stages):
    for stage in stages:
        if key in stage.bare:
            return f"{key} in {stage.path.name} needs a comment that says what it is, to be a key"
    hint = did_you_mean(key, declared)
    return f"no stage knows the key {key!r} of {origin}{hint} (--help lists them)"


def print_help(stage):
    print(f"usage: python {stage.path.name} config/FILE.py [--key=value ...]")
    for title, keys in (("keys", stage.own), ("the model", stage.model)):
        if keys:
            print(f"\n{title}:")
        for name, key in keys.items():
            print(f"  --{name}={key.default!r}".ljust(34) + f"  {key.comment}")
    print("\n--scale=NAME and --ablation=NAME are listed in config/ablations.py")


def configure(namespace):
    """Resolve the command line for a stage, given its globals(), and set its own keys there.

    Returns {key: value} for the keys of all stages. Every mistake raises Fault.
    """
    stage = Stage(namespace["__file__"], namespace)
    if {"--help", "-h"} & set(sys.argv[1:]):
        print_help(stage)
        sys.exit(0)
    config = resolve_stage(stage, sys.argv[1:])
    namespace.update({name: config[name] for name in stage.own})
    return config


def defaults_of(script):
    """Return {key: default} of a script's own keys and of its model."""
    stage = Stage(script)
    keys = stage.model | stage.own
    return {name: key.default for name, key in keys.items() if key.default is not UNKNOWN}


def resolve(script, argv):
    """Return what configure would return for a script and its arguments, without running it.

    script: a path, or the name of a script in the repository's folder.
    """
    path = Path(script) if Path(script).exists() else ROOT / script
    return resolve_stage(Stage(path), argv)
