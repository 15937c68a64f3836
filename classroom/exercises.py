"""The exercises of a notebook, which all have one form."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType

from nbformat import NotebookNode

POINTS = {"easy": 1, "medium": 2, "hard": 3}
SOLUTION = re.compile(
    r"<details><summary>Solution</summary>\n\n```python\n(.*?)```\n</details>", re.DOTALL
)
HEADING = re.compile(r"^### Exercise (\d+) · (.+) \((\w+), (\d+) minutes\)$", re.MULTILINE)
CALL = re.compile(r"\n\nchecks\.(check_\w+)\((\w+)\)$")


@dataclass(frozen=True)
class Exercise:
    """An exercise of a notebook: a heading, hints and a folded solution, and below them a stub."""

    number: int
    title: str
    difficulty: str
    minutes: int
    text: str
    """The id of the cell with the heading."""
    stub: str
    """The id of the cell with the stub."""
    solution: str
    check: str
    answer: str
    """The name that the stub defines and the check is given."""

    @property
    def points(self) -> int:
        return POINTS[self.difficulty]


def exercises_of(notebook: NotebookNode) -> list[Exercise]:
    """The exercises, from the first to the last.

    Raises:
        ValueError: one has not the form of the others; says which cell, and what is missing.
    """
    exercises = []
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type == "markdown" and "\n### Exercise " in f"\n{cell.source}":
            try:
                exercises.append(_exercise(cell, below))
            except ValueError as error:
                raise ValueError(f"cell {cell.id!r}: {error}") from None
    numbers = [exercise.number for exercise in exercises]
    if numbers != [*range(1, len(numbers) + 1)]:
        raise ValueError(f"the exercises have the numbers {numbers}, but should count from 1")
    return exercises


def _exercise(cell: NotebookNode, below: NotebookNode | None) -> Exercise:
    heading, solutions = HEADING.findall(cell.source), SOLUTION.findall(cell.source)
    if len(heading) != 1 or heading[0][2] not in POINTS:
        form = "### Exercise 1 · Title (easy, 5 minutes)"
        raise ValueError(f"no heading like {form!r}, with one of {', '.join(POINTS)}")
    if len(solutions) != 1:
        raise ValueError(f"{len(solutions)} folded solutions, but one is expected")
    call = CALL.search(below.source) if below and below.cell_type == "code" else None
    if call is None:
        raise ValueError("no code cell below it that ends in checks.check_…(…)")
    number, title, difficulty, minutes = heading[0]
    return Exercise(
        int(number),
        title,
        difficulty,
        int(minutes),
        cell.id,
        below.id,
        solutions[0],
        *call.groups(),
    )


def checks_of(notebook: NotebookNode) -> ModuleType:
    """The module of a notebook's checks: `from lrd_helpers.checks import … as checks`."""
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    [name] = re.findall(r"^from lrd_helpers\.checks import (\w+) as checks$", source, re.MULTILINE)
    return importlib.import_module(f"lrd_helpers.checks.{name}")
