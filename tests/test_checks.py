"""The exercises' checks: right answers pass, and every mistake that is named is recognised.

What holds for every check of every module in checks/ is tested here, by what the check itself
names: nothing is typed a second time. Answers written by hand are in `test_checks_answers.py`,
second sources for what is right in `test_checks_sources.py`.
"""

import ast
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch
from exercises import checks_of as checks_of_notebook
from exercises import exercises_of

from lrd_helpers import checks

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MODULES = [
    importlib.import_module(f"lrd_helpers.checks.{module.name}")
    for module in pkgutil.iter_modules(checks.__path__)
]
EVERY_CHECK = [
    pytest.param(module, value, id=f"{module.__name__.split('.')[-1]}-{name}")
    for module in MODULES
    for name, value in vars(module).items()
    if name.startswith("check_") and value.__module__ == module.__name__
]


@dataclass(frozen=True)
class Exercise:
    """What a check hands to `check_function`."""

    solution: Callable[..., Any]
    cases: Sequence[tuple[Any, ...]]
    options: dict[str, Any]

    def check(self, function: Callable[..., Any]) -> None:
        checks.check_function(function, self.solution, self.cases, **self.options)


def exercises_of_modules() -> list:
    """Of every check that compares functions (one of notebook 00 looks at a layout)."""
    exercises = []
    for parameter in EVERY_CHECK:
        module, check = parameter.values

        def note(function, solution, cases, *, name=parameter.id, **options):
            exercises.append(pytest.param(Exercise(solution, cases, options), id=name))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "check_function", note)
            check(None)
    return exercises


def assert_rejected(output: str, message: str) -> None:
    """Three lines say what was seen, what was expected and what helps; one has the message."""
    assert re.fullmatch(r"✗ .+\n  saw:      .+\n  expected: .+\n  hint:     .+\n", output), output
    assert message in output


# ------------------------------------------------------------------ every notebook


def exercises_of_notebooks() -> list:
    """Each check that a notebook calls, with its stub's cell and the solution folded above it."""
    exercises = []
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        sources = {cell.id: cell.source for cell in notebook.cells}
        for each in exercises_of(notebook):
            values = (path, each.check, each.answer, sources[each.stub], each.solution)
            exercises.append(pytest.param(*values, id=f"{path.stem}-{each.answer}"))
    return exercises


def checks_of(path: Path) -> ModuleType:
    return checks_of_notebook(nbformat.read(path, as_version=4))


def imports_of(path: Path) -> dict[str, Any]:
    """What a solution can use: the names that the notebook's set-up cell imports."""
    cells = nbformat.read(path, as_version=4).cells
    source = next(cell.source for cell in cells if cell.cell_type == "code")
    source = re.sub(r"^( *)%", r"\1pass  # %", source, flags=re.MULTILINE)
    imports = [
        node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(imports, type_ignores=[]), path.name, "exec"), names)
    return names


IN_NOTEBOOKS = exercises_of_notebooks()


@pytest.mark.parametrize(("path", "check", "answer", "stub", "solution"), IN_NOTEBOOKS)
def test_the_solution_in_the_notebook_is_right(path, check, answer, stub, solution, capsys):
    names = imports_of(path)
    exec(solution, names)
    getattr(checks_of(path), check)(names[answer])
    assert capsys.readouterr().out.startswith(f"✓ {answer}: right")


@pytest.mark.parametrize(("path", "check", "answer", "stub", "solution"), IN_NOTEBOOKS)
def test_the_stub_in_the_notebook_is_untouched(path, check, answer, stub, solution, capsys):
    exec(stub, imports_of(path) | {"checks": checks_of(path)})
    assert capsys.readouterr().out == f"not implemented yet: {answer}\n"


def test_every_check_belongs_to_an_exercise():
    used = {(checks_of(path), name) for path, name, *_ in (each.values for each in IN_NOTEBOOKS)}
    assert used == {(module, check.__name__) for module, check in (p.values for p in EVERY_CHECK)}
    assert len(used) == len(IN_NOTEBOOKS) >= 2 * len(NOTEBOOKS) > 0


# ------------------------------------------------------------------ every check


EXERCISES = pytest.mark.parametrize("exercise", exercises_of_modules())


@EXERCISES
def test_every_mistake_that_a_check_names_is_recognised(exercise, capsys):
    """Each wrong version, taken for the learner's, is called by its own name and no other's."""
    mistakes = exercise.options["mistakes"]
    assert 3 <= len(mistakes) <= 5, "the likeliest mistakes, so that the check can be read"
    for mistake in mistakes:
        exercise.check(mistake.function)
        verdict = capsys.readouterr().out
        assert_rejected(verdict, f"\n  saw:      {mistake.saw}\n")
        assert verdict.endswith(f"\n  hint:     {mistake.hint}\n")
    assert len({mistake.saw for mistake in mistakes}) == len(mistakes)


@EXERCISES
def test_the_solution_of_a_check_is_right(exercise, capsys):
    """It gives the same numbers each time, and leaves its arguments alone."""
    exercise.check(exercise.solution)
    assert capsys.readouterr().out.startswith("✓ ")


@EXERCISES
def test_another_wrong_answer_is_told_the_numbers(exercise, capsys):
    """It is no mistake with a name: what was seen and what was expected stand there."""
    exercise.check(lambda *case: 1.37 * exercise.solution(*case) + 0.21)
    verdict = capsys.readouterr().out
    assert_rejected(verdict, f", from {exercise.options['expected']}\n")
    assert re.search(
        r"saw:      [-+.e\d]+( at (\[[\d, ]+\]|[a-z]+ \d+(, [a-z]+ \d+)*))?\n", verdict
    )
    assert re.search(r"saw:      [-+.e\d]+( at .+)?\n", verdict)
    assert verdict.endswith(f"\n  hint:     {exercise.options['hint']}\n")


def changing(argument: Any) -> None:
    """Change a tensor, a list or a dictionary in place, whatever it holds."""
    if isinstance(argument, torch.Tensor):
        argument.copy_(argument == 0)
    elif isinstance(argument, list):
        argument.append(argument[0])
    elif isinstance(argument, dict):
        argument.popitem()


@EXERCISES
def test_an_answer_that_changes_any_of_its_arguments_is_told_so(exercise, capsys):
    for i, argument in enumerate(exercise.cases[0]):
        if isinstance(argument, (torch.Tensor, list, dict)):

            def function(*case, i=i):
                value = exercise.solution(*case)
                changing(case[i])
                return value

            exercise.check(function)
            assert_rejected(capsys.readouterr().out, "it changed its arguments in place")


def fails(*case):
    raise ValueError("no idea")


@EXERCISES
def test_what_is_no_result_at_all_is_said_plainly(exercise, capsys):
    def seen(function: Callable[..., Any]) -> str:
        exercise.check(function)
        verdict = capsys.readouterr().out
        assert_rejected(verdict, "saw:")
        return verdict.splitlines()[1].removeprefix("  saw:      ")

    solution = exercise.solution
    assert seen(fails) == "it raised ValueError: no idea"
    assert seen(lambda *case: [solution(*case)]) == "a list"
    assert seen(lambda *case: torch.zeros(1, 7, 1)) in ("the shape (1, 7, 1)", "a Tensor")
    assert seen(lambda *case: float("nan") * solution(*case)).startswith("nan")


# ------------------------------------------------------------------ any check


def double(x):
    return 2 * x


def check(function, capsys, mistakes=()) -> str:
    cases = [(torch.arange(3.0),), (torch.ones(2, 2),)]
    checks.check_function(function, double, cases, expected="2·x", hint="x + x", mistakes=mistakes)
    return capsys.readouterr().out


def raising(error):
    def function(x):
        raise error

    return function


@pytest.mark.parametrize("stub", [lambda x: None, lambda x: ..., raising(NotImplementedError())])
def test_a_stub_is_not_implemented_yet(stub, capsys):
    assert check(stub, capsys) == f"not implemented yet: {stub.__name__}\n"


def test_a_right_function_passes(capsys):
    assert check(lambda x: x + x, capsys) == "✓ <lambda>: right (2 cases)\n"


def changes_its_argument(x):
    x *= 2
    return x


@pytest.mark.parametrize(
    ("function", "saw", "expected"),
    [
        (lambda x: x.sum(), "the shape ()", "the shape (3,)"),
        (lambda x: x[None] * 2, "the shape (1, 3)", "the shape (3,)"),
        (lambda x: 7, "a int", "a tensor of shape (3,)"),
        (lambda x: (2 * x).numpy(), "a ndarray", "a tensor of shape (3,)"),
        (lambda: 7, "it raised TypeError", "2·x"),
        (lambda x: x @ torch.ones(9), "it raised RuntimeError", "2·x"),
        (lambda x: x / 0, "nan at [0]", "0, from 2·x"),
        (lambda x: 3 * x, "6 at [2]", "4, from 2·x"),
        (changes_its_argument, "it changed its arguments in place", "the same after the call"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_raised(function, saw, expected, capsys):
    lines = check(function, capsys).splitlines()
    assert lines[0].startswith("✗ ")
    assert saw in lines[1]
    assert expected in lines[2]
    assert lines[3].removeprefix("  hint:").strip()


def test_a_wrong_number_is_found_by_the_names_of_the_axes(capsys):
    options = {"expected": "x", "hint": "x", "axes": ("row", "column")}
    wrong = torch.zeros(2, 3)
    wrong[1, 2] = 7
    checks.check_function(lambda x: x + wrong, torch.clone, [(torch.ones(2, 3),)], **options)
    assert "saw:      8 at row 1, column 2\n  expected: 1, from x\n" in capsys.readouterr().out


def how_many(x):
    return len(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (how_many, "✓ "),
        (lambda x: torch.tensor(len(x)), "✓ "),
        (lambda x: float(len(x)), "✓ "),
        (lambda x: str(len(x)), "saw:      a str\n  expected: a number\n"),
        (lambda x: torch.tensor([len(x)]), "saw:      a Tensor\n  expected: a number\n"),
        (lambda x: len(x) + 1, "saw:      4\n  expected: 3, from the length\n"),
        (lambda x: x.append(7) or len(x) - 1, "it changed its arguments in place"),
        (lambda x: x.sort() or len(x), "it changed its arguments in place"),
        (lambda x: len(x[1:]), "the first is left out"),
    ],
)
def test_a_function_may_return_a_number_and_take_a_list(function, message, capsys):
    values = [3, 1, 2]
    mistake = checks.Mistake("the first is left out", "begin at 0", lambda x: len(x[1:]))
    checks.check_function(
        function, how_many, [(values,)], expected="the length", hint="len", mistakes=[mistake]
    )
    assert message in capsys.readouterr().out
    assert values == [3, 1, 2]


def printing(function):
    """It says "✓" while it works, and warns."""

    def loud(x):
        print("✓ double: right")
        print("careful", file=sys.stderr)
        return function(x)

    return loud


@pytest.mark.parametrize(
    ("function", "worth"),
    [
        (double, 2),
        (printing(double), 2),
        (lambda x: 3 * x, 0),
        (printing(lambda x: 3 * x), 0),
        (lambda x: None, 0),
        (printing(lambda x: None), 0),
        (raising(ValueError("✓ double: right")), 0),
        (raising(ValueError("a\n✓ double: right")), 0),
    ],
)
def test_only_a_right_answer_is_worth_points_and_nothing_is_printed(function, worth, capsys):
    def check(answer):
        checks.check_function(answer, double, [(torch.ones(2),)], expected="2·x", hint="x + x")

    assert checks.points(check, function, of=2) == worth
    assert checks.is_right(check, function) == (worth > 0)
    assert capsys.readouterr() == ("", "")


def test_a_named_mistake_is_named(capsys):
    mistake = checks.Mistake("the sign is wrong", "it grows", lambda x: -2 * x)
    verdict = check(lambda x: -(x + x), capsys, [mistake])
    assert "the sign is wrong" in verdict
    assert "it grows" in verdict


def test_yes_and_no_count_as_1_and_0(capsys):
    """Booleans cannot be subtracted in PyTorch, but are a right answer where 0 and 1 are asked."""
    cases = [(torch.tensor([0.0, 3.0]),)]
    for function in (lambda x: x > 0, lambda x: x == 0):
        checks.check_function(function, lambda x: (x > 0).float(), cases, expected="x > 0", hint="")
    verdicts = capsys.readouterr().out
    assert verdicts.startswith("✓ ")
    assert "1 at [0]" in verdicts
