"""The teaching kit, made from the notebooks as they are committed: `make classroom`.

    python classroom/kit.py [NAME ...] [--output FOLDER]

It writes a student copy and a solved copy of each notebook, a course for nbgrader with an
assignment for each notebook, and the teacher's guide. What a class has handed in is not touched.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import nbformat
import tomllib
from exercises import CALL, SOLUTION, Exercise, checks_of, exercises_of
from grading import course_api, reason
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from lrd_helpers.checks import Mistake
from lrd_helpers.files import check_folder, write_atomically

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests"))
from public_address import NAME, NUMBER  # noqa: E402

OUTPUT = ROOT / "outputs" / "classroom"
SKIPPED = "skip-execution"
"""Cells with this tag are not run when a submission is graded: an answer needs none of them."""


# ------------------------------------------------------------------ three kinds of copies


def student_copy(notebook: NotebookNode, address: str) -> NotebookNode:
    """The notebook without solutions and outputs; what it links to is at `address`.

    Its badge is left out: on Colab it would open the notebook with the solutions.
    """
    notebook = _stripped(notebook, address)
    title = notebook.cells[0]
    title.source = re.sub(r"^\[!\[Open In Colab\].*\n+", "", title.source)
    for cell in notebook.cells:
        cell.source = SOLUTION.sub("", cell.source).rstrip()
    return notebook


def solved_copy(notebook: NotebookNode, address: str) -> NotebookNode:
    """The notebook with every solution in its exercise's cell, without outputs."""
    solutions = {each.stub: each for each in exercises_of(notebook)}
    notebook = _stripped(notebook, address)
    for cell in notebook.cells:
        if exercise := solutions.get(cell.id):
            cell.source = f"{exercise.solution}{CALL.search(cell.source)[0]}"
    return notebook


def assignment(notebook: NotebookNode, address: str) -> NotebookNode:
    """nbgrader's source: the student copy, each solution in its stub, a graded cell below each."""
    exercises = {each.stub: each for each in exercises_of(notebook)}
    notebook = student_copy(notebook, address)
    cells, set_up = [], next(cell for cell in notebook.cells if cell.cell_type == "code")
    for cell in notebook.cells:
        cells.append(cell)
        if exercise := exercises.get(cell.id):
            cell.source = _with_solution(cell.source, exercise.solution)
            cell.metadata = _graded(cell.id, solution=True)
            cells.append(_points_cell(exercise))
        elif cell is set_up:
            cell.metadata = _graded(cell.id, locked=True)
        elif cell.cell_type == "code":
            cell.metadata.setdefault("tags", []).append(SKIPPED)
        elif cell.cell_type == "markdown":  # nbgrader has a folder for each assignment
            cell.source = re.sub(rf"\]\(({NAME})\.ipynb", r"](../\1/\1.ipynb", cell.source)
    notebook.cells = cells
    return notebook


def _stripped(notebook: NotebookNode, address: str) -> NotebookNode:
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = cell.source.replace("](../", f"]({address}/blob/main/")
    return notebook


def _with_solution(stub: str, solution: str) -> str:
    """The stub with a region that nbgrader replaces by an empty line, so that the stub is left."""
    call = CALL.search(stub)
    region = f"### BEGIN SOLUTION\n{solution}### END SOLUTION"
    return f"{stub[: call.start()]}\n{region}\n{call[0].lstrip()}"


def _points_cell(exercise: Exercise) -> NotebookNode:
    worth = "1 point" if exercise.points == 1 else f"{exercise.points} points"
    name = f"exercise-{exercise.number}-points"
    source = f"""# Exercise {exercise.number}, {worth}. Leave this cell as it is.
import lrd_helpers.checks

lrd_helpers.checks.points(checks.{exercise.check}, {exercise.answer}, of={exercise.points})"""
    metadata = _graded(name, locked=True, grade=True, points=exercise.points)
    return new_code_cell(source, id=name, metadata=metadata)


def _graded(name: str, **kinds: Any) -> NotebookNode:
    flags = {"grade": False, "locked": False, "solution": False, "task": False}
    return nbformat.from_dict(
        {"nbgrader": {**flags, "grade_id": name, "schema_version": 3, **kinds}}
    )


# ------------------------------------------------------------------ the teacher's guide


def guide(notebooks: dict[str, NotebookNode]) -> str:
    """README.md of this folder and, for each notebook, minutes, points and typical mistakes."""
    readme = (HERE / "README.md").read_text(encoding="utf-8").replace("../notebooks/", "student/")
    parts = [readme, "## Notebook by notebook\n"]
    parts += [_chapter(name, notebook) for name, notebook in notebooks.items()]
    return "\n".join(parts)


def _chapter(name: str, notebook: NotebookNode) -> str:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    question = re.search(rf"^# {NUMBER} · (.+)$", text, re.MULTILINE)[1]
    facts = re.findall(r"^\*\*(?:Time|You should know)\*\* .+$", text, re.MULTILINE)
    lines = [f"### {name}: {question}", "", *(f"{fact}  " for fact in facts), ""]
    exercises = exercises_of(notebook)
    if not exercises:
        return "\n".join([*lines, "No exercises, no assignment.", ""])
    lines += ["| exercise | difficulty | minutes | points |", "|---|---|---|---|"]
    for each in exercises:
        row = (f"{each.number} · {each.title}", each.difficulty, each.minutes, each.points)
        lines.append(f"| {' | '.join(map(str, row))} |")
    checks = checks_of(notebook)
    lines += ["", "Typical mistakes, and what the check says to them:", ""]
    for each in exercises:
        for mistake in mistakes_of(checks, each.check):
            lines.append(f"- Exercise {each.number}: {mistake.saw}. *{mistake.hint}*")
    return "\n".join([*lines, ""])


def mistakes_of(checks: ModuleType, check: str) -> Sequence[Mistake]:
    """The wrong versions that a check names; none where it compares no functions."""
    silent = contextlib.redirect_stdout(io.StringIO())
    with mock.patch.object(checks, "check_function") as compared, silent:
        getattr(checks, check)(None)
    return compared.call_args.kwargs.get("mistakes", ()) if compared.called else ()


# ------------------------------------------------------------------ writing it


def read_notebooks(folder: Path, names: Sequence[str] = ()) -> dict[str, NotebookNode]:
    """The notebooks of these names; all, if there are none.

    Raises:
        ValueError: a name that is none of them, or an exercise that has not the form of the others.
    """
    paths = sorted(folder.glob("*.ipynb"))
    there = {path.stem: path for path in paths if re.fullmatch(NAME, path.stem)}
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"there is no notebook {unknown[0]!r}; there are {', '.join(there)}")
    notebooks = {}
    for name in names or there:
        notebooks[name] = nbformat.read(there[name], as_version=4)
        try:
            exercises_of(notebooks[name])
        except ValueError as error:
            raise ValueError(f"{name}.ipynb, {error}") from None
    return notebooks


def with_exercises(notebooks: dict[str, NotebookNode]) -> dict[str, NotebookNode]:
    """Those of which there is an assignment: the project has a rubric instead."""
    return {name: notebook for name, notebook in notebooks.items() if exercises_of(notebook)}


def write_kit(output: Path, notebooks: dict[str, NotebookNode]) -> None:
    """Write the kit of these notebooks, and let nbgrader make its assignments, where exercises are.

    Raises:
        OSError: a file cannot be written.
        RuntimeError: nbgrader refuses an assignment.
    """
    check_folder(output)
    with (ROOT / "pyproject.toml").open("rb") as file:
        address = tomllib.load(file)["project"]["urls"]["Repository"]
    kinds: dict[str, Callable[..., NotebookNode]] = {
        "student/{0}.ipynb": student_copy,
        "solutions/{0}.ipynb": solved_copy,
        "course/source/{0}/{0}.ipynb": assignment,
    }
    graded = with_exercises(notebooks)
    files = {
        kind.format(name): nbformat.writes(copied(notebook, address), indent=1, ensure_ascii=False)
        for kind, copied in kinds.items()
        for name, notebook in (graded if copied is assignment else notebooks).items()
    }
    files["guide.md"] = guide(notebooks)
    for name in ("nbgrader_config.py", "grading.py"):
        files[f"course/{name}"] = (HERE / name).read_text(encoding="utf-8")
    for name, text in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    api = course_api(output / "course")
    for name in graded:
        done = api.generate_assignment(name)
        if not done["success"]:
            raise RuntimeError(f"nbgrader refuses the assignment {name}: {reason(done)}")


def main(arguments: Sequence[str]) -> int:
    """Write the kit; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_ddpm; default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        notebooks = read_notebooks(ROOT / "notebooks", options.names)
        write_kit(options.output.resolve(), notebooks)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    number = sum(len(exercises_of(notebook)) for notebook in notebooks.values())
    print(f"{options.output}: {len(notebooks)} notebooks, {number} exercises; begin with guide.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
