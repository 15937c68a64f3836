"""How long each notebook takes, core path and side roads apart: `make minutes`.

python tests/course_minutes.py             print it for all of them
python tests/course_minutes.py 01_ddpm     for this one
python tests/course_minutes.py --write     and write it into each notebook's goals

Reading: words / 200 + lines of code / 20. Of a text cell no formula counts for more than one word;
pictures and what is folded count for none. Of the code the set-up cell, the stubs of exercises and
cells with a folded source are not counted. Exercises take the minutes in their headings. Waiting is
what a text cell says ("running everything takes about 70 seconds"), else a minute and a half.

A cell with the tag `side-road` belongs to a side road; so does all of a notebook like 02b_…, and of
the project, whose milestones take the minutes in their headings.
`test_course_minutes.py` holds the notebooks against what is said here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import nbformat
from execute_notebooks import HIDDEN_SOURCE, chosen, text_of
from nbformat import NotebookNode

from lrd_helpers.files import write_atomically

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
from exercises import CALL, HEADING

SIDE_ROAD = "side-road"
WAITING = 1.5
"""Minutes until all cells of a notebook have run, where it does not say how many seconds."""

TIME = re.compile(r"^\*\*Time\*\* .*?(?= \*\*|$)", re.MULTILINE)
"""Where a notebook says how long it takes: this script's line, which is not counted itself."""

MILESTONE = re.compile(r"^## \d+ · .+ \(milestone, (\d+) minutes\)$", re.MULTILINE)
"""A section of the project."""

SECONDS = re.compile(r"running everything takes about (\d+) seconds")


@dataclass
class Part:
    """The core path of a notebook, or its side roads."""

    words: int = 0
    code: int = 0
    exercises: int = 0
    waiting: float = 0

    @property
    def reading(self) -> int:
        """Minutes."""
        return ceil(self.words / 200 + self.code / 20)

    @property
    def minutes(self) -> int:
        """All of it, each kind rounded up."""
        return self.reading + self.exercises + ceil(self.waiting)


def words(text: str) -> int:
    """How many words of Markdown one reads: nothing folded, no pictures, a formula as one word."""
    text = TIME.sub("", text)
    for unread in (r"<details>.*?</details>", r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?", r"<[^>]+>"):
        text = re.sub(unread, " ", text, flags=re.DOTALL)
    text = re.sub(r"\$\$.+?\$\$|\$[^$\n]+\$", " formula ", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)\s]*\)", "] ", text)  # where a link leads to
    return len([word for word in text.split() if re.search(r"\w", word)])


def lines(cell: NotebookNode) -> int:
    """The lines of a code cell."""
    return len(cell.source.rstrip().splitlines())


def read_as_code(cell: NotebookNode) -> bool:
    """Whether one reads the cell's source: not the set-up, a stub, or what is folded."""
    if cell.cell_type != "code" or cell.id == "setup" or CALL.search(cell.source):
        return False
    return HIDDEN_SOURCE not in cell.metadata.get("tags", [])


def is_side_road(name: str) -> bool:
    """Whether the whole notebook is one, as 02b_… and the project are."""
    return re.match(r"\d\d([a-z]_|_project$)", name) is not None


def measured(notebook: NotebookNode) -> tuple[Part, Part]:
    """Core path and side roads of a notebook; waiting counts as core."""
    core, side = Part(), Part()
    core.waiting = WAITING
    for cell in notebook.cells:
        part = side if SIDE_ROAD in cell.metadata.get("tags", []) else core
        if read_as_code(cell):
            part.code += lines(cell)
        elif cell.cell_type == "markdown":
            part.words += words(cell.source)
            tasks = [minutes for *_, minutes in HEADING.findall(cell.source)]
            part.exercises += sum(map(int, tasks + MILESTONE.findall(cell.source)))
            if seconds := SECONDS.search(cell.source):
                core.waiting = int(seconds[1]) / 60
    return core, side


def measured_part(notebook: NotebookNode, sections: set[int], exercises: set[int]) -> Part:
    """Of the core path: the goals, these sections, and of their exercises these.

    A heading without a number, such as the summary's, begins a part that is not read.
    """
    reading, read = [], True
    for cell in notebook.cells:
        for level, title in re.findall(r"^(##|###) (.+)$", cell.source, flags=re.MULTILINE):
            if cell.cell_type != "markdown":
                continue
            exercise, section = HEADING.match(f"### {title}"), re.match(r"(\d+) · ", title)
            if level == "##":
                in_section = read = bool(section) and int(section[1]) in sections
            else:
                read = in_section and (not exercise or int(exercise[1]) in exercises)
        if read and SIDE_ROAD not in cell.metadata.get("tags", []):
            reading.append(cell)
    core, _ = measured(nbformat.v4.new_notebook(cells=reading))
    return core


def together(parts: Iterable[Part]) -> Part:
    """Words, lines and minutes added up."""
    kinds = zip(*((p.words, p.code, p.exercises, p.waiting) for p in parts), strict=True)
    return Part(*map(sum, kinds))


def stated(name: str, notebook: NotebookNode) -> str:
    """The line that belongs into the notebook's goals."""
    core, side = measured(notebook)
    if is_side_road(name):  # all that there is to read
        core, side = together((core, side)), Part()
    line = f"**Time** about {core.minutes} minutes: reading {core.reading}, "
    line += f"exercises {core.exercises}, waiting {ceil(core.waiting)}"
    return line + (f"; side roads another {side.minutes}." if side.minutes else ".")


def write(path: Path) -> bool:
    """Write that line into the notebook at `path`; whether another one stood there.

    Raises:
        ValueError: there is no line for it, or more than one.
    """
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    places = [c for c in notebook.cells if c.cell_type == "markdown" and TIME.search(c.source)]
    if len(places) != 1:
        raise ValueError(
            f"{path.name}: {len(places)} text cells have a line that begins with '**Time** ', "
            "but it should be one, the goals"
        )
    line = stated(path.stem, notebook)
    places[0].source = TIME.sub(lambda _: line, places[0].source, count=1)
    changed = text_of(notebook)
    if changed != text:
        write_atomically(path, changed.encode())
    return changed != text


def table(notebooks: dict[str, NotebookNode]) -> str:
    """A row for each notebook, core path on the left and side roads on the right, and the sums."""
    parts = {}
    for name, notebook in notebooks.items():
        core, side = measured(notebook)
        parts[name] = (Part(), together((core, side))) if is_side_road(name) else (core, side)
    columns = list(zip(*parts.values(), strict=True))
    minutes = [sum(part.minutes for part in column) for column in columns]
    kinds = f"{'words':>7}{'code':>6}{'exercises':>11}{'waiting':>9}{'minutes':>9}"
    rows = [f"{'':26}{'core path':>42}{'side roads':>42}", f"{'':26}{kinds}{kinds}"]
    rows += [
        f"{name:26}{_row(core, core.minutes)}{_row(side, side.minutes)}"
        for name, (core, side) in parts.items()
    ]
    rows.append(f"{'together':26}{''.join(map(_row, map(together, columns), minutes))}")
    rows.append("core path {:.1f} hours, side roads {:.1f}".format(*(m / 60 for m in minutes)))
    return "\n".join(rows)


def _row(part: Part, minutes: int) -> str:
    return f"{part.words:7}{part.code:6}{part.exercises:11}{part.waiting:9.1f}{minutes:9}"


def main(arguments: Sequence[str]) -> int:
    """Print the table, and write the lines if that is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_ddpm; default: all")
    parser.add_argument("--write", action="store_true", help="write each notebook's line as well")
    options = parser.parse_args(arguments)
    try:
        paths = chosen(options.names)
        print(table({path.stem: nbformat.read(path, as_version=4) for path in paths}))
        for path in paths if options.write else ():
            print(f"{path.stem:26}{'written' if write(path) else 'as it was'}")
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
