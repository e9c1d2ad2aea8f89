"""Fill in the tables of a page of results from the runs next to it, and draw their figures.

python -m tools.fill_page results/study/README.md

A page is written by hand, but for the numbers. In a table whose first column is called `row`, each
row names an entry of a sweep in backticks: no positions (`no_positions`). Its runs are the folders
no_positions-SEED/ next to the page; those of `long/crammed` are long/crammed-SEED/. The columns
that are called as in the table of tools.sweep (n, val_loss, speed, cola, ...) are filled in, and so
is `difference`, that of val_loss from the table's first row. Everything else stays as it is: other
columns, and rows without a finished run.

`difference` has its 95 % interval by Student's t. Its spread is that of the first row of the page
over seeds, since most rows have one seed or two; so it assumes that all rows spread alike.

The figure of a table is drawn as soon as two of its rows compare. It is named after the heading,
and a link to it is written below the table unless there is one.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from scipy import stats

from nanocram.faults import Fault, replace_file, run_script
from tools.plot import draw_losses
from tools.sweep import DIGITS, mean_cell, read_entries


def cells_of(line):
    """Return the cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def entry_named(cell):
    """Return (the name of the entry, what the row is called) of a row's first cell."""
    code = re.search(r"`(.+?)`", cell)
    if not code:
        raise Fault(f"the row {cell!r} names no entry in backticks")
    title = cell.replace(code[0], "").replace("()", "").strip()
    return code[1], title or code[1]


def losses_of(entry):
    return [row["val_loss"] for row in entry.rows.values()]


def difference(entry, first, spread):
    """Return 'mean [95 % interval]' of an entry's val_loss minus that of a table's first row.

    spread: val_loss of the runs that say how far seeds are apart. With one of them there is no
    interval.
    """
    digits = DIGITS["val_loss"]
    own, other = losses_of(entry), losses_of(first)
    mean = np.mean(own) - np.mean(other)
    text = f"{mean:+.{digits}f}"
    if len(spread) > 1:
        error = np.std(spread, ddof=1) * np.sqrt(1 / len(own) + 1 / len(other))
        half = stats.t.ppf(0.975, len(spread) - 1) * error
        text += f" [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
    return text


def fill_table(lines, folder, spread):
    """Return (lines of a table with its numbers, {row: [val_loss]} of what compares).

    spread: as in difference; the table's own first row if it is empty.
    """
    head, ruler, *rows = lines
    titles = cells_of(head)
    names = [entry_named(cells_of(row)[0]) for row in rows]
    entries = read_entries([name for name, _ in names], folder)
    first = entries[names[0][0]]
    spread = spread or losses_of(first)

    filled = [head, ruler]
    losses = {}
    for line, (name, title) in zip(rows, names):
        # a row without runs keeps what stands there
        entry = entries[name]
        if not entry.rows:
            filled.append(line)
            continue
        cells = cells_of(line)
        known = {column for row in entry.rows.values() for column in row}
        for i, column in enumerate(titles):
            if column == "n":
                cells[i] = str(len(entry.rows))
            elif column in known:
                cells[i] = mean_cell(entry, column)
            elif column == "difference" and entry is not first:
                compares = first.rows and entry.is_comparable
                cells[i] = difference(entry, first, spread) if compares else ""
        filled.append("| " + " | ".join(cells) + " |")
        if entry.is_comparable:
            losses[title] = losses_of(entry)
    return filled, losses


def fill_page(page):
    """Fill in all tables of a page, and draw the figure of each."""
    lines = page.read_text(encoding="utf-8").splitlines()
    filled = []
    spread = []
    with_table = set()  # headings, each of which names one figure
    title = page.parent.name
    while lines:
        line = lines.pop(0)
        if line.startswith("#"):
            title = line.lstrip("# ")
        if not line.startswith("| row |"):
            filled.append(line)
            continue

        # a table, up to the line that is none
        if title in with_table:
            raise Fault(
                f"two tables stand under the heading {title!r}; give the second one its own"
            )
        with_table.add(title)
        table = [line]
        while lines and lines[0].startswith("|"):
            table.append(lines.pop(0))
        table, losses = fill_table(table, page.parent, spread)
        filled += table
        spread = spread or next(iter(losses.values()), [])

        # its figure
        if len(losses) > 1:
            file = re.sub(r"\W+", "_", title.lower()).strip("_") + ".png"
            draw_losses(losses, page.parent / file)
            link = f"![{title}]({file})"
            if link not in lines:
                filled += ["", link]
    with replace_file(page) as f:
        f.write(("\n".join(filled) + "\n").encode())


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tools.fill_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("page", type=Path, help="a Markdown file, in the folder of the runs")
    page = parser.parse_args(argv).page
    if not page.is_file():
        raise Fault(f"{page} does not exist")
    fill_page(page)


if __name__ == "__main__":
    run_script(main)
