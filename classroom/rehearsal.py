"""A class rehearsed with nbgrader, every assignment: `make classroom-check`.

    python classroom/rehearsal.py [NAME ...]

The kit is made in a temporary folder. Three students fetch each assignment and hand it in, with
right answers, wrong ones and none; a teacher collects and grades them. All points are expected for
the first, no point for the others, and nothing odd to be noted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
from exercises import CALL, Exercise, exercises_of
from grading import Marks, course_api, grade, reason
from kit import ROOT, read_notebooks, with_exercises, write_kit
from nbformat import NotebookNode
from nbgrader.apps.api import NbGraderAPI
from nbgrader.utils import temp_attrs
from traitlets.config import Config


def right(exercise: Exercise) -> str:
    return exercise.solution


def wrong(exercise: Exercise) -> str:
    """Never the right numbers; where no function is asked for, another kind of thing."""
    if not exercise.solution.startswith("def "):
        return f'{exercise.answer} = "another kind of thing"\n'
    spoilt = "(lambda right: lambda *case: 1.37 * right(*case) + 0.21)"
    return f"{exercise.solution}\n\n{exercise.answer} = {spoilt}({exercise.answer})\n"


def write(
    work: NotebookNode, exercises: Sequence[Exercise], answer: Callable[[Exercise], str]
) -> None:
    """Write an answer above the call of the check in every exercise's cell."""
    cells = {cell.id: cell for cell in work.cells}
    for exercise in exercises:
        cell = cells[exercise.stub]
        cell.source = f"{answer(exercise)}{CALL.search(cell.source)[0]}"


def released_course(folder: Path, notebooks: dict[str, NotebookNode]) -> NbGraderAPI:
    """A kit in `folder` with an exchange of its own, where the assignments are released."""
    write_kit(folder, notebooks)
    config = Config()
    config.Exchange.root, config.Exchange.cache = str(folder / "exchange"), str(folder / "cache")
    config.Exchange.assignment_dir = str(folder / "student")
    config.ExchangeCollect.check_owner = False  # one account hands in for all
    api = course_api(folder / "course", config)
    for name in notebooks:
        _succeed(api.release_assignment(name))
    return api


def hand_in(
    api: NbGraderAPI, name: str, student: str, work: Callable[[NotebookNode], None]
) -> None:
    """Fetch an assignment, let `work` be done in its notebook, and submit it."""
    options = {"coursedir": api.coursedir, "authenticator": api.authenticator, "parent": api}
    with temp_attrs(api.coursedir, assignment_id=name, student_id=student):
        fetch = api.exchange.FetchAssignment(**options)
        fetch.assignment_dir = str(Path(fetch.assignment_dir).parent / student)
        fetch.start()
        file = Path(fetch.dest_path) / f"{name}.ipynb"
        notebook = nbformat.read(file, as_version=4)
        work(notebook)
        file.write_text(nbformat.writes(notebook), encoding="utf-8")
        submit = api.exchange.Submit(**options)
        submit.assignment_dir = fetch.assignment_dir
        submit.start()


def collected(api: NbGraderAPI, name: str) -> dict[str, Marks]:
    """The marks of all students who handed in."""
    _succeed(api.collect(name))
    return {marks.student: marks for marks in grade(api, name)}


def _succeed(done: dict[str, Any]) -> None:
    if not done["success"]:
        raise RuntimeError(f"nbgrader fails: {reason(done)}")


def hand_in_three(api: NbGraderAPI, name: str, exercises: Sequence[Exercise]) -> None:
    """The work of the students "right", "wrong" and "empty"."""
    for student, answer in {"right": right, "wrong": wrong}.items():
        hand_in(api, name, student, lambda work, answer=answer: write(work, exercises, answer))
    hand_in(api, name, "empty", lambda work: None)


def unexpected(marks: dict[str, Marks], exercises: Sequence[Exercise]) -> list[str]:
    """What is not as it should be with the marks of these three: a sentence each."""
    of = sum(exercise.points for exercise in exercises)
    faults = []
    for student, points in {"right": of, "wrong": 0, "empty": 0}.items():
        got = marks[student]
        if (got.points, got.of) != (points, of):
            faults.append(f"{student} has {got.points} of {got.of}, but should have {points}")
        faults += [f"{student}: {note}" for note in got.notes]
    return faults


def main(arguments: Sequence[str]) -> int:
    """Rehearse the assignments; returns the exit code: 1 if the marks are not as expected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01_ddpm; default: all")
    start, faults = time.perf_counter(), []
    try:
        names = parser.parse_args(arguments).names
        notebooks = with_exercises(read_notebooks(ROOT / "notebooks", names))
        with tempfile.TemporaryDirectory() as folder:
            api = released_course(Path(folder), notebooks)
            for name, notebook in notebooks.items():
                exercises = exercises_of(notebook)
                hand_in_three(api, name, exercises)
                marks = collected(api, name)
                points = (f"{each.student} {each.points:g}" for each in marks.values())
                print(f"{name:22}", *points, sep="  ", flush=True)
                faults += [f"{name}: {fault}" for fault in unexpected(marks, exercises)]
        print(f"{len(notebooks)} assignments, {time.perf_counter() - start:.0f} s")
    except (ValueError, OSError, RuntimeError) as error:
        faults.append(str(error))
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
