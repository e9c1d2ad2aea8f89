"""Make the offline corpus: English out of the docstrings of the installed packages, and two tasks.

`sources = ["docs"]` in a config makes prepare.py read it. It is about 12 MB of English without a
network, out of the packages of requirements.txt and of those that they require.
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

from nanocram.configurator import ROOT
from nanocram.progress import progress_bar

TASKS = {"docs_package": ["text"], "docs_next": ["text_a", "text_b"]}  # their columns of text
TASK_CHARS = 1_500_000  # characters of held-out documentation that the tasks are made of
TASK_ROWS = {"train": 3000, "dev": 1000}
N_PACKAGES = 6  # classes of docs_package
LONG_TEXT = 200  # characters of a text in a function call that may be documentation
STOP_WORDS = set(
    "a an and are as at be but by can do for from given has have if in into is it its must no not "
    "of on only or should so such than that the their then there these this to used using was we "
    "when where which will with you".split()
)

TESTS = re.compile(r"(^|/|_)(tests?|_vendor)(/|_)")  # folders and files that are left out
ROLE_OR_TICKS = re.compile(r":\w+:`~?([^`<]*)[^`]*`|`+")  # :func:`~name <target>`, or backticks
ITEM = re.compile(r"(:\w+ [\w*]+:|[\w*`]+( \([^)]*\))?:(?= )|[-*+] )")  # "name: text", "- text"
UNDERLINE = re.compile(r"([=\-~^#*])\1{2,}")
NAME_AND_TYPE = re.compile(r"[\w*,. `\\]+ : ")  # "name : type" of a numpy docstring


# --------------------------------------------------------------------------------------------------
# Documents: one per Python file


def required_packages():
    """Return {name: distribution} of requirements.txt and of all that those require."""
    # begin with the names at the beginning of a line
    requirements = (ROOT / "requirements.txt").read_text()
    todo = re.findall(r"(?m)^[A-Za-z][\w.-]*", requirements)
    found = {}
    while todo:
        try:
            distribution = metadata.distribution(todo.pop())
        except metadata.PackageNotFoundError:
            continue  # required on other platforms only
        if distribution.name in found:
            continue

        # go on with what it requires, without its optional extras
        found[distribution.name] = distribution
        needed = [r for r in distribution.requires or [] if "extra ==" not in r]
        todo += [re.match(r"[\w.-]+", requirement)[0] for requirement in needed]
    return found


def package_documents():
    """Yield (text, package) of each Python file.

    The text is the paragraphs of its docstrings, one per line, without those of an earlier file.
    """
    # the files of all packages, without their tests
    jobs = []
    for name, distribution in sorted(required_packages().items()):
        for file in sorted(distribution.files or []):
            if file.suffix in (".py", ".pyi") and not TESTS.search(str(file)):
                jobs.append((name, str(file.locate())))

    # parse them in parallel; Ctrl-C is for the parent to handle
    seen = set()
    with multiprocessing.Pool(initializer=leave_signals) as pool:
        results = pool.imap(prose_of_file, jobs, chunksize=32)
        for name, found in progress_bar(results, "docstrings", len(jobs), unit=" files"):
            new = [paragraph for paragraph in dict.fromkeys(found) if paragraph not in seen]
            seen.update(new)
            yield "\n".join(new), name


def leave_signals():
    """Leave Ctrl-C to the parent, and end at once if it says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def prose_of_file(job):
    """Return (package, English paragraphs) of a job (package, path of a Python file)."""
    name, path = job
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, OSError):
        return name, []  # a template, or written for another Python

    # the docstrings, and other text that documents something
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found += prose(ast.get_docstring(node) or "")
        # torch and numpy document their C functions as add_docstr(function, "text")
        elif isinstance(node, ast.Call):
            for text in long_texts(node.args):
                found += prose(inspect.cleandoc(text))
    return name, found


def long_texts(arguments):
    """Return the arguments of a call that are long texts."""
    constants = [node.value for node in arguments if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str) and len(value) > LONG_TEXT]


# --------------------------------------------------------------------------------------------------
# English paragraphs of a docstring


def prose(docstring):
    """Return the English paragraphs of a docstring, each on one line and without markup."""
    texts = [ROLE_OR_TICKS.sub(r"\1", paragraph) for paragraph in paragraphs(docstring)]
    return [text for text in texts if is_english(text)]


def is_english(text):
    """Return whether a text is English.

    It has enough words, is mostly letters, and a fifth of its words are among the commonest ones.
    """
    words = re.findall(r"[a-z]+", text.lower())
    letters = sum(c.isalpha() or c == " " for c in text)
    common = sum(word in STOP_WORDS for word in words)
    return len(words) >= 8 and letters >= 0.8 * len(text) and common >= len(words) / 5


def paragraphs(docstring):
    """Yield the paragraphs, without doctests, literal blocks, types and headings."""
    paragraph = []
    literal = None  # inside a doctest or literal block: lines indented deeper than this are skipped
    previous = 0  # indentation of the line before
    is_hanging = False  # whether that line opened an item, whose next lines are deeper
    for line in [*docstring.splitlines(), ""]:  # the blank line ends the last paragraph
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text and literal is not None and indent <= literal:
            literal = None

        # a paragraph ends at a blank line, a new item, or another indentation
        item = ITEM.match(text)
        is_deeper = indent > previous and not is_hanging
        if not text or item or indent < previous or is_deeper:
            yield " ".join(paragraph)
            paragraph = []
        previous = indent
        is_hanging = bool(item)

        # a doctest or a literal block begins, goes on, or ends
        if opens_literal(text):
            literal = indent
            if text.startswith((">>>", "... ")):
                literal = indent - 1  # the output of a doctest is not indented
            text = text_before_literal(text)
        elif literal is not None:
            if not text and literal < indent:
                literal = None  # a blank line ends a doctest
            continue

        # an underline makes a heading of the line before; a type ends a paragraph
        if UNDERLINE.fullmatch(text):
            paragraph = []
        elif NAME_AND_TYPE.match(text):
            yield " ".join(paragraph)
            paragraph = []
        elif text:
            start = item.end() if item else 0
            paragraph.append(text[start:].strip())


def opens_literal(text):
    """Return whether a line belongs to a doctest or directive, or ends with the "::" of a block."""
    return text.startswith((">>>", "..")) or text.endswith("::")


def text_before_literal(text):
    """Return what a line that opens a literal adds to its paragraph: "Example::" is "Example:"."""
    if text.endswith("::") and not text.startswith(".."):
        return text[:-1]
    return ""


# --------------------------------------------------------------------------------------------------
# Two tasks for the offline demo, which are no part of GLUE


def write_tasks(documents, folder, seed):
    """Write both tasks, train and dev out of different files.

    docs_package: which package is a paragraph from? docs_next: does the second paragraph follow the
    first one? documents: pairs of (text, package) that are held out of the corpus.
    """
    # shuffle, so that both parts have files of all packages
    rng = random.Random(seed)
    documents = rng.sample(documents, len(documents))
    packages = largest_packages(documents)

    # no file has examples in both parts
    cut = len(documents) * TASK_ROWS["train"] // sum(TASK_ROWS.values())
    for part, own in (("train", documents[:cut]), ("dev", documents[cut:])):
        files = [(text.split("\n"), package) for text, package in own]
        examples = {
            "docs_package": package_examples(files, packages, TASK_ROWS[part], rng),
            "docs_next": next_examples(files, TASK_ROWS[part], rng),
        }
        for task, rows in examples.items():
            write_tsv(folder / task / f"{part}.tsv", [*TASKS[task], "label"], rows)


def largest_packages(documents):
    """Return the names of the packages with the most text, sorted."""
    sizes = Counter()
    for text, package in documents:
        sizes[package] += len(text)
    return sorted(package for package, _ in sizes.most_common(N_PACKAGES))


def package_examples(files, packages, n, rng):
    """Return n examples (paragraph, package) in random order, equally many of each package.

    files: pairs of (paragraphs, package).
    """
    examples = []
    for package in packages:
        lines = []
        for own, name in files:
            if name == package:
                lines += own
        chosen = rng.sample(lines, min(len(lines), n // len(packages)))
        examples += [(line, package) for line in chosen]
    rng.shuffle(examples)
    return examples


def next_examples(files, n, rng):
    """Return n examples (paragraph, paragraph, label).

    The second paragraph of every other pair is a random one, and the label says so.
    """
    # all paragraphs, and all pairs that follow each other
    everything = []
    neighbours = []
    for lines, _ in files:
        everything += lines
        neighbours += zip(lines, lines[1:])

    # half of the pairs stay as they are
    examples = []
    for i, (a, b) in enumerate(rng.sample(neighbours, min(len(neighbours), n))):
        if i % 2:
            examples.append((a, b, "next"))
        else:
            examples.append((a, rng.choice(everything), "other"))
    return examples


def write_tsv(path, header, rows):
    """Write a table with a header, one row per line and a tab between two cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        for row in [header, *rows]:
            f.write("\t".join(cell.replace("\t", " ") for cell in row) + "\n")
