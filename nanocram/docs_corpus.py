"""The offline corpus: English prose out of the docstrings of the installed Python packages, and two tasks made of it.

`sources = ["docs"]` in a config makes prepare.py read it: about 12 MB of English without a network, out of the packages of
requirements.txt and of those that they require.
"""

import ast
import inspect
import multiprocessing
import random
import re
import signal
from collections import Counter
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

TASK_CHARS = 1_500_000  # characters of held-out documentation that the tasks are made of
TASK_ROWS = {"train": 3000, "dev": 1000}
STOP_WORDS = set(
    "a an and are as at be but by can do for from given has have if in into is it its must no not of on only or should "
    "so such than that the their then there these this to used using was we when where which will with you".split()
)


def required_packages():
    """{name: distribution} of requirements.txt and of all that it requires, whatever else is installed."""
    todo = re.findall(r"(?m)^[A-Za-z][\w.-]*", (Path(__file__).parent / "requirements.txt").read_text())
    found = {}
    while todo:
        try:
            distribution = metadata.distribution(todo.pop())
        except metadata.PackageNotFoundError:
            continue  # required on other platforms only
        if distribution.name not in found:
            found[distribution.name] = distribution
            todo += [re.match(r"[\w.-]+", r)[0] for r in distribution.requires or [] if "extra ==" not in r]
    return found


def package_documents():
    """Yields (text, package), one document a Python file: its docstrings' paragraphs, one a line, none of them twice."""
    jobs = []
    for name, distribution in sorted(required_packages().items()):
        for file in sorted(distribution.files or []):
            if file.suffix in (".py", ".pyi") and not re.search(r"(^|/|_)(tests?|_vendor)(/|_)", str(file)):
                jobs.append((name, str(file.locate())))
    seen = set()
    # Ctrl-C is the parent's to handle
    with multiprocessing.Pool(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        results = pool.imap(file_prose, jobs, chunksize=32)
        for name, found in tqdm(results, "docstrings", len(jobs), unit=" files", disable=None):
            new = [p for p in dict.fromkeys(found) if p not in seen]
            seen.update(new)
            yield "\n".join(new), name


def file_prose(job):
    name, path = job
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, OSError):
        return name, []  # a template, or written for another Python
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found += prose(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call):  # torch and numpy document their C functions as add_docstr(function, "text")
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and len(argument.value) > 200:
                    found += prose(inspect.cleandoc(argument.value))
    return name, found


def is_english(text):
    """Enough words, mostly letters, and a fifth of the words among the commonest of English."""
    words = re.findall(r"[a-z]+", text.lower())
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(words) >= 8 and letters >= 0.8 * len(text) and sum(w in STOP_WORDS for w in words) >= len(words) / 5


def prose(docstring):
    """The English paragraphs of a docstring, each on one line: no doctests, literal blocks, types or headings."""
    found, paragraph = [], []
    literal = None  # inside a doctest or literal block: lines indented deeper than this are skipped
    previous, hanging = 0, False  # indent of the last line; whether it opened an item, whose next lines are deeper

    def end():
        text = re.sub(r":\w+:`~?([^`<]*)[^`]*`|`+", r"\1", " ".join(paragraph))  # the text of roles, without backticks
        if is_english(text):
            found.append(text)
        paragraph.clear()

    for line in docstring.splitlines():
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text and literal is not None and indent <= literal:
            literal = None
        item = re.match(r"(:\w+ [\w*]+:|[\w*`]+( \([^)]*\))?:(?= )|[-*+] )", text)  # "name: what it is", or of a list
        if not text or item or indent < previous or (indent > previous and not hanging):
            end()
        previous, hanging = indent, bool(item)
        if text.startswith((">>>", "..")) or text.endswith("::"):
            literal = indent - 1 if text.startswith((">>>", "... ")) else indent  # a doctest's output is not indented
            text = text[:-1] if text.endswith("::") and not text.startswith("..") else ""
        elif literal is not None:
            if not text and literal < indent:
                literal = None  # a blank line ends a doctest
            continue
        if re.fullmatch(r"([=\-~^#*])\1{2,}", text):
            paragraph.clear()  # the line before was a heading
        elif re.match(r"[\w*,. `\\]+ : ", text):
            end()  # "name : type" of a numpy docstring
        elif text:
            paragraph.append(text[item.end() if item else 0 :].strip())
    end()
    return found


def write_tasks(documents, folder, seed):
    """Two tasks from held-out documents [(text, package)], train and dev from different files. They are no part of GLUE.

    docs_package: which package a paragraph comes from. docs_next: does the second paragraph follow the first one?
    """
    rng = random.Random(seed)
    documents = rng.sample(documents, len(documents))
    cut = len(documents) * TASK_ROWS["train"] // sum(TASK_ROWS.values())
    sizes = Counter()
    for text, package in documents:
        sizes[package] += len(text)
    packages = sorted(p for p, _ in sizes.most_common(6))
    for part, own in {"train": documents[:cut], "dev": documents[cut:]}.items():
        files = [(text.split("\n"), package) for text, package in own]
        everything = [line for lines, _ in files for line in lines]
        examples = []
        for package in packages:
            lines = [line for lines, p in files if p == package for line in lines]
            examples += [(line, package) for line in rng.sample(lines, min(len(lines), TASK_ROWS[part] // len(packages)))]
        rng.shuffle(examples)
        write_tsv(folder / "docs_package" / f"{part}.tsv", ["text", "label"], examples)
        pairs = [pair for lines, _ in files for pair in zip(lines, lines[1:])]
        pairs = rng.sample(pairs, min(len(pairs), TASK_ROWS[part]))
        pairs = [(a, b, "next") if i % 2 else (a, rng.choice(everything), "other") for i, (a, b) in enumerate(pairs)]
        write_tsv(folder / "docs_next" / f"{part}.tsv", ["text_a", "text_b", "label"], pairs)


def write_tsv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ("\t".join(cell.replace("\t", " ") for cell in row) for row in [header, *rows])
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
