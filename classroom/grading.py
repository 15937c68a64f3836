"""Grades what a class has handed in, whatever state it is in.

    python grading.py ASSIGNMENT      collected submissions, all students; prints points and notes

The kit copies this file into the course, where nbgrader's own commands and its formgrader use the
two preprocessors through nbgrader_config.py. `Restore` runs the answers in the notebook as it was
released, `Execute` keeps to limits of time and output. Both write what was odd into the notebook.

An answer runs in the process that grades it: whoever sets out to cheat can. Grade the work of
strangers in a container.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from nbgrader import preprocessors
from nbgrader.apps.api import NbGraderAPI
from nbgrader.utils import is_grade, is_locked, is_solution
from traitlets import Integer, List
from traitlets.config.loader import Config, PyFileConfigLoader

NOTES = "grading_notes"
"""In the metadata of an autograded notebook: a sentence for each thing that was odd."""

LONGEST_NOTE = 300


# ------------------------------------------------------------------ the answers, put back in place


def restored(submitted: NotebookNode, released: NotebookNode) -> tuple[NotebookNode, list[str]]:
    """The released notebook with the submitted answers, and notes on what else was changed.

    An answer is found by its cell's id, or else by nbgrader's id, or else by the call of its check.
    What was written into other cells that are not locked is kept as well, and so are new code
    cells, each below the released cell that it followed.
    """
    notes, matched = _matched(submitted, released)
    place = {number: cell_id for cell_id, number in matched.items()}
    added: dict[str | None, list[NotebookNode]] = {}
    last = None
    for number, cell in enumerate(submitted.cells):
        last = place.get(number, last)
        if number not in place and cell.cell_type == "code":
            name = f"added-{number}"
            added.setdefault(last, []).append(new_code_cell(cell.source, id=name))
    cells = added.get(None, [])
    for cell in released.cells:
        if cell.id in matched and not is_locked(cell):
            cell.source = submitted.cells[matched[cell.id]].source
        cells += [cell, *added.get(cell.id, [])]
    released.cells = cells
    return released, notes


def _matched(submitted: NotebookNode, released: NotebookNode) -> tuple[list[str], dict[str, int]]:
    """Notes, and for the id of each released cell the number of the submitted one."""
    notes: list[str] = []
    matched: dict[str, int] = {}
    for cell in released.cells:
        candidates = _candidates(cell, submitted)
        if candidates:
            matched[cell.id] = candidates[0]
        if "nbgrader" not in cell.metadata:
            continue
        if not candidates:
            what = "its empty stub" if is_solution(cell) else "it"
            notes.append(f"{named(cell)} was deleted: {what} was put back")
            continue
        found = submitted.cells[candidates[0]]
        if len(candidates) > 1:
            notes.append(f"{named(cell)} is there {len(candidates)} times: the first counts")
        if is_locked(cell) and found.source.strip() != cell.source.strip():
            notes.append(f"{named(cell)} was changed, which nobody may: it was put back")
        elif found.cell_type != "code" or _settings(found) != _settings(cell):
            notes.append(f"{named(cell)} had other metadata than released: they were put back")
    return notes, matched


def _candidates(cell: NotebookNode, submitted: NotebookNode) -> list[int]:
    """Which submitted cells may be this released one: by the surest sign that any of them has."""

    name = _settings(cell).get("grade_id")
    signs = [lambda other: other.get("id") == cell.id]
    if name:
        signs.append(lambda other: _settings(other).get("grade_id") == name)
    if is_solution(cell):
        call = cell.source.splitlines()[-1]
        signs.append(lambda other: call in other.source)
    for sign in signs:
        if numbers := [i for i, other in enumerate(submitted.cells) if sign(other)]:
            return numbers
    return []


def _settings(cell: NotebookNode) -> dict[str, Any]:
    """What nbgrader and the execution go by; a learner may have put anything there."""
    settings = cell.metadata.get("nbgrader")
    settings = dict(settings) if isinstance(settings, dict) else {}
    settings.pop("checksum", None)
    return {**settings, "tags": cell.metadata.get("tags", [])}


def named(cell: NotebookNode) -> str:
    """What a cell is called in notes."""
    if number := _exercise(cell):
        return f"the {'points' if is_grade(cell) else 'answer'} cell of exercise {number}"
    return "the set-up cell" if is_locked(cell) else "an added cell"


def _exercise(cell: NotebookNode) -> str | None:
    number = re.match(r"exercise-(\d+)-(stub|points)$", cell.id)
    return number[1] if number else None


class Restore(preprocessors.NbGraderPreprocessor):
    """`restored`, as the first thing that nbgrader does with a submission."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        course, name = self.parent.parent.coursedir, resources["nbgrader"]["notebook"]
        folder = course.format_path(
            course.release_directory, ".", resources["nbgrader"]["assignment"]
        )
        released = nbformat.read(Path(folder) / f"{name}.ipynb", as_version=4)
        nb, notes = restored(nb, released)
        nb.metadata[NOTES] = notes
        return nb, resources


# ------------------------------------------------------------------ running it, within limits


class Execute(preprocessors.Execute):
    """Runs a submission within limits; an exercise has its points only where a number says so.

    Left to itself, nbgrader gives all points to a cell that printed nothing, also because it never
    ran.
    """

    timeout = Integer(60, help="Seconds for a cell").tag(config=True)
    set_up_timeout = Integer(300, help="Seconds for the set-up cell").tag(config=True)
    whole_timeout = Integer(300, help="Seconds for all other cells together").tag(config=True)
    most_characters = Integer(200_000, help="Output of a cell that is kept").tag(config=True)
    raise_on_iopub_timeout = False  # a flood of output is cut off, and the next cell is run
    extra_arguments = List(["--log-level=ERROR"])  # of the kernel itself, not of the cells

    def preprocess(self, nb: NotebookNode, *rest: Any) -> tuple[NotebookNode, Any]:
        notes = nb.metadata.setdefault(NOTES, [])
        self._spent, self._printed = 0.0, Counter()
        try:
            super().preprocess(nb, *rest)
        except DeadKernelError:
            notes.append("an answer ended the kernel: what comes after it was not run")
        for cell in nb.cells:
            if is_grade(cell) and not _outputs(cell, "execute_result", "error"):
                error = {"ename": "NoPoints", "evalue": "no number came out of this cell"}
                cell.outputs = [new_output("error", traceback=[error["evalue"]], **error)]
        notes += self._notes(nb)
        if notes:
            text = "\n".join(["**Notes from the grading**\n", *(f"- {note}" for note in notes)])
            nb.cells.insert(0, new_markdown_cell(text, id="grading-notes"))
        return nb, self.resources

    def timeout_func(self, cell: NotebookNode) -> int:
        """Seconds that a cell may take; in place of nbclient's trait of this name."""
        if _is_set_up(cell):
            return self.set_up_timeout
        return int(max(1, min(self.timeout, self.whole_timeout - self._spent)))

    def preprocess_cell(self, cell: NotebookNode, resources: Any, index: int) -> Any:
        start = time.monotonic()
        try:
            return super().preprocess_cell(cell, resources, index)
        finally:
            if not _is_set_up(cell):
                self._spent += time.monotonic() - start

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, index: int) -> Any:
        """Drops what a cell prints or shows beyond the limit, but a short result never."""
        most, kind, content = self.most_characters, msg["msg_type"], msg["content"]
        if kind == "error":
            content["evalue"] = content["evalue"][:LONGEST_NOTE]
            content["traceback"] = [part[:most] for part in content["traceback"]]
        if kind in ("stream", "display_data", "update_display_data", "execute_result"):
            size, before = len(str(content)), self._printed[index]
            self._printed[index] += size
            if before + size > most and not (kind == "execute_result" and size < most):
                if kind != "stream" or before >= most:
                    return None
                content["text"] = f"{content['text'][: most - before]}\n…\n"
        return super().process_message(msg, cell, index)

    def _notes(self, nb: NotebookNode) -> list[str]:
        """What went wrong while it ran: at most a sentence for each exercise and other cell."""
        notes: dict[str, str] = {}
        for index, cell in enumerate(nb.cells):
            said = ""
            if errors := _outputs(cell, "error"):
                said = f"raises {errors[0].ename}: {errors[0].evalue}"
                if is_locked(cell):
                    said = f"{said} (though it is as released)"
                if self.error_on_timeout["ename"] in [error.ename for error in errors]:
                    said = "took too long and was stopped"
            elif self._printed[index] > self.most_characters:
                said = f"printed {self._printed[index]:,} characters: the rest was dropped"
            if said:
                note = " ".join(f"{named(cell)} {said}".split())[:LONGEST_NOTE]
                notes.setdefault(_exercise(cell) or cell.id, note)
        return list(notes.values())


def _is_set_up(cell: NotebookNode) -> bool:
    return is_locked(cell) and not is_grade(cell)


def _outputs(cell: NotebookNode, *kinds: str) -> list[NotebookNode]:
    return [output for output in cell.get("outputs", []) if output.output_type in kinds]


# ------------------------------------------------------------------ a whole class


@dataclass(frozen=True)
class Marks:
    """What a student has for an assignment."""

    student: str
    points: float | None
    """None where it could not be graded at all."""
    of: float
    notes: list[str]


def course_api(course: Path, config: Config | None = None) -> NbGraderAPI:
    """nbgrader, as the course's nbgrader_config.py wants it, and then `config`."""
    here = os.path.dirname(sys.executable)
    if here not in os.environ["PATH"].split(os.pathsep):  # nbgrader calls its `alembic` by name
        os.environ["PATH"] = os.pathsep.join([here, os.environ["PATH"]])
    # nbgrader counts on what SQLAlchemy warns of.
    warnings.filterwarnings("ignore", message="Object of type <Submitted")
    wanted = PyFileConfigLoader("nbgrader_config.py", path=str(course)).load_config()
    wanted.merge(config or {})
    return NbGraderAPI(config=wanted)


def reason(done: dict[str, Any]) -> str:
    """Why nbgrader failed: the last error that it logged."""
    text = f"{done.get('error', '')}\n{done.get('log', '')}"
    errors = re.findall(r"^ *([\w.]+(?:Error|Exception|Entry): .+)$", text, re.MULTILINE)
    return (errors or ["it does not say why"])[-1][:LONGEST_NOTE]


def grade(api: NbGraderAPI, assignment: str) -> Iterator[Marks]:
    """Autograde every student's submission; yields the marks of each, in order of their names.

    Raises:
        ValueError: there is no such assignment, or nobody has handed it in.
    """
    course = api.coursedir
    submitted = course.format_path(course.submitted_directory, "*", assignment)
    students = sorted(Path(path).parent.name for path in glob.glob(submitted))
    if assignment not in api.get_released_assignments() | api.get_source_assignments():
        raise ValueError(f"there is no assignment {assignment!r}")
    if not students:
        raise ValueError(f"nobody has handed in {assignment!r}: there is no {submitted}")
    for student in students:
        yield _graded(api, assignment, student)


def _graded(api: NbGraderAPI, assignment: str, student: str) -> Marks:
    course, file = api.coursedir, f"{assignment}.ipynb"
    folder = Path(course.format_path(course.submitted_directory, student, assignment))
    with api.gradebook as gradebook:
        of = gradebook.find_assignment(assignment).max_score
    try:
        nbformat.read(folder / file, as_version=4)
    except FileNotFoundError:
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        return Marks(student, None, of, [f"{file} was not handed in; there is {there}"])
    except Exception as error:  # whatever nbformat trips over in what is no notebook
        said = f"{file} is not a notebook: {type(error).__name__}"
        return Marks(student, None, of, [said])
    done = api.autograde(assignment, student)
    if not done["success"]:
        return Marks(student, None, of, [f"nbgrader fails: {reason(done)}"])
    graded = Path(course.format_path(course.autograded_directory, student, assignment)) / file
    notes = nbformat.read(graded, as_version=4).metadata.get(NOTES, [])
    with api.gradebook as gradebook:
        points = gradebook.find_submission(assignment, student).score
    return Marks(student, points, of, notes)


def main(arguments: Sequence[str]) -> int:
    """Grade an assignment and print the marks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assignment", help="such as 01_ddpm")
    name = parser.parse_args(arguments).assignment
    try:
        for marks in grade(course_api(Path(__file__).resolve().parent), name):
            points = "none" if marks.points is None else f"{marks.points:g}"
            print(f"{marks.student:24} {points:>4} of {marks.of:g}", flush=True)
            print("".join(f"    {note}\n" for note in marks.notes), end="", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
