"""The exercises' checks: right answers pass, and every mistake that is named is recognised.

What holds for every notebook and every module in checks/ is tested here, for all there are. Answers
written for one notebook's exercises are in `test_checks_NAME.py`, those for 01 below:
`assert_diagnosed(check, answer, said, capsys)` is what they need.
"""

import ast
import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch

from lrd_helpers import checks
from lrd_helpers.checks import ddpm as ddpm_checks

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
CHECK = re.compile(r"^checks\.(check_\w+)\((\w+)\)", re.MULTILINE)
MODULES = [
    importlib.import_module(f"lrd_helpers.checks.{module.name}")
    for module in pkgutil.iter_modules(checks.__path__)
]


def checks_in(module: ModuleType) -> list[Callable[[Any], None]]:
    """The checks that a module of checks/ offers."""
    return [
        value
        for name, value in vars(module).items()
        if name.startswith("check_") and value.__module__ == module.__name__
    ]


EVERY_CHECK = [
    pytest.param(module, check, id=f"{module.__name__.split('.')[-1]}-{check.__name__}")
    for module in MODULES
    for check in checks_in(module)
]


def assert_diagnosed(
    check: Callable[[Any], None], answer: Any, said: str, capsys: pytest.CaptureFixture
) -> None:
    """The check says `said` of an answer; said is "✓" or a part of what is wrong with it."""
    check(answer)
    out = capsys.readouterr().out
    assert said in out
    if said != "✓":
        assert re.fullmatch(r"✗ .+\n  saw:      .+\n  expected: .+\n  hint:     .+\n", out), out


def exercises() -> list:
    """Each check that a notebook calls, with its stub's cell and the solution folded above it."""
    found = []
    for path in NOTEBOOKS:
        solution = None
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown" and "<summary>Solution" in cell.source:
                [solution] = re.findall(
                    r"<summary>Solution.*?```python\n(.*?)```", cell.source, flags=re.DOTALL
                )
            if cell.cell_type == "code" and (call := CHECK.search(cell.source)):
                name = f"{path.stem}-{call[2]}"
                found.append(pytest.param(path, call[1], call[2], cell.source, solution, id=name))
                solution = None
    return found


def checks_of(path: Path) -> ModuleType:
    """The module of a notebook's checks: `from lrd_helpers.checks import … as checks`."""
    source = path.read_text(encoding="utf-8")
    [name] = re.findall(r"from lrd_helpers\.checks import (\w+) as checks", source)
    return importlib.import_module(f"lrd_helpers.checks.{name}")


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


@pytest.mark.parametrize(("path", "check", "answer", "stub", "solution"), exercises())
def test_the_solution_in_the_notebook_is_right(path, check, answer, stub, solution, capsys):
    names = imports_of(path)
    exec(solution, names)
    getattr(checks_of(path), check)(names[answer])
    assert capsys.readouterr().out.startswith(f"✓ {answer}: right")


@pytest.mark.parametrize(("path", "check", "answer", "stub", "solution"), exercises())
def test_the_stub_in_the_notebook_is_untouched(path, check, answer, stub, solution, capsys):
    exec(stub, imports_of(path) | {"checks": checks_of(path)})
    assert capsys.readouterr().out == f"not implemented yet: {answer}\n"


@pytest.mark.parametrize(("module", "check"), EVERY_CHECK)
def test_every_check_belongs_to_an_exercise(module, check):
    used = {(checks_of(path), name) for path, name, *_ in (one.values for one in exercises())}
    assert (module, check.__name__) in used


@pytest.mark.parametrize(("module", "check"), EVERY_CHECK)
def test_every_mistake_that_a_check_names_is_recognised(module, check, monkeypatch, capsys):
    """Each wrong version, taken for the learner's, is called by its own name and no other's."""
    calls = []

    def note(function, solution, cases, **options):
        calls.append((function, solution, cases, options))

    if not hasattr(module, "check_function"):
        pytest.skip("it does not compare functions; its answers are in a test of its own")
    monkeypatch.setattr(module, "check_function", note)
    check(None)
    if not calls:
        pytest.skip("it does not compare functions; its answers are in a test of its own")
    for _, solution, cases, options in calls:
        checks.check_function(solution, solution, cases, **options)
        assert capsys.readouterr().out.startswith("✓ ")
        assert options.get("mistakes"), "no mistake is named: which one do people make?"
        for mistake in options["mistakes"]:
            checks.check_function(mistake.function, solution, cases, **options)
            said = capsys.readouterr().out.splitlines()
            assert said[1:2] + said[3:] == [
                f"  saw:      {mistake.saw}",
                f"  hint:     {mistake.hint}",
            ]


def test_the_notebooks_have_exercises():
    assert len(exercises()) >= 2 * len(NOTEBOOKS) > 0


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
        (lambda x: x / 0, "nan as number 0", "0, from 2·x"),
        (lambda x: 3 * x, "6 as number 2", "4, from 2·x"),
        (changes_its_argument, "it changed its arguments in place", "the same after the call"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_raised(function, saw, expected, capsys):
    lines = check(function, capsys).splitlines()
    assert lines[0].startswith("✗ ")
    assert saw in lines[1]
    assert expected in lines[2]
    assert lines[3].removeprefix("  hint:").strip()


def how_many(x):
    return len(x)


@pytest.mark.parametrize(
    ("function", "said"),
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
def test_a_function_may_return_a_number_and_take_a_list(function, said, capsys):
    values = [3, 1, 2]
    mistake = checks.Mistake("the first is left out", "begin at 0", lambda x: len(x[1:]))
    checks.check_function(
        function, how_many, [(values,)], expected="the length", hint="len", mistakes=[mistake]
    )
    assert said in capsys.readouterr().out
    assert values == [3, 1, 2]


def test_a_named_mistake_is_named(capsys):
    mistake = checks.Mistake("the sign is wrong", "it grows", lambda x: -2 * x)
    said = check(lambda x: -(x + x), capsys, [mistake])
    assert "the sign is wrong" in said
    assert "it grows" in said


# ------------------------------------------------------------------ notebook 01


def column(bar, x):
    return bar.reshape(-1, *[1] * (x.ndim - 1))


def jump(signal, noise_share):
    """An answer to exercise 1 made of two formulas in ᾱ."""

    def answer(x0, t, noise, alphas_cumprod):
        bar = column(alphas_cumprod[t], x0)
        return signal(bar) * x0 + noise_share(bar) * noise

    return answer


def loss(compare, **wrong):
    def answer(model, x0, t, noise, alphas_cumprod):
        x_t = jump(torch.sqrt, lambda bar: (1 - bar) ** 0.5)(x0, t, noise, alphas_cumprod)
        seen = x0 if wrong.get("sees_clean") else x_t
        return compare(model(seen, t), x0 if wrong.get("clean_target") else noise)

    return answer


def step_back(formula):
    def answer(x, t, epsilon, noise, betas):
        bar = (1 - betas).cumprod(0)[t]
        return formula(x, t, epsilon, noise * (t > 0), betas[t], bar)

    return answer


def ddim(x0_formula, back):
    def answer(x, epsilon, bar, bar_previous):
        return back(x0_formula(x, epsilon, bar), epsilon, bar, bar_previous)

    return answer


def mean_square(a, b):
    return ((a - b) ** 2).mean()


def guess(x, e, bar):
    return (x - (1 - bar) ** 0.5 * e) / bar**0.5


def put_back(x0, e, bar, previous):
    return previous**0.5 * x0 + (1 - previous) ** 0.5 * e


ANSWERS = [
    ("jump", jump(torch.sqrt, lambda b: (1 - b).sqrt()), "✓"),
    ("jump", jump(lambda b: b, lambda b: 1 - b), "no square roots"),
    ("jump", jump(torch.sqrt, lambda b: 1 - b), "the noise lacks its square root"),
    ("jump", jump(lambda b: b, lambda b: (1 - b).sqrt()), "the signal lacks its square root"),
    ("jump", jump(torch.sqrt, lambda b: -((1 - b).sqrt())), "the noise is subtracted"),
    ("jump", jump(lambda b: (1 - b).sqrt(), torch.sqrt), "changed places"),
    (
        "jump",
        lambda x0, t, noise, bars: bars[t].sqrt() * x0 + (1 - bars[t]).sqrt() * noise,
        "raised",
    ),
    ("jump", lambda x0, t, noise, bars: x0[:1], "the shape (1, 2)"),
    ("noise_loss", loss(mean_square), "✓"),
    ("noise_loss", loss(mean_square, clean_target=True), "the clean x_0"),
    ("noise_loss", loss(mean_square, sees_clean=True), "is shown the clean x_0"),
    ("noise_loss", loss(lambda a, b: ((a - b) ** 2).sum()), "added up"),
    ("noise_loss", loss(lambda a, b: (a - b).mean()), "cancel"),
    ("noise_loss", loss(lambda a, b: (b - a).mean()), "cancel"),
    ("noise_loss", loss(lambda a, b: -mean_square(a, b)), "the sign is wrong"),
    ("noise_loss", loss(lambda a, b: mean_square(a, b) ** 0.5), "the root of the mean square"),
    ("noise_loss", loss(lambda a, b: (a - b) ** 2), "the shape (4, 2)"),
    (
        "step_back",
        step_back(
            lambda x, t, e, z, b, bar: (x - b / (1 - bar) ** 0.5 * e) / (1 - b) ** 0.5 + b**0.5 * z
        ),
        "✓",
    ),
    (
        "step_back",
        step_back(
            lambda x, t, e, z, b, bar: (x + b / (1 - bar) ** 0.5 * e) / (1 - b) ** 0.5 + b**0.5 * z
        ),
        "the mess grows",
    ),
    (
        "step_back",
        step_back(
            lambda x, t, e, z, b, bar: (x - b / (1 - bar) ** 0.5 * e) / (1 - b) ** 0.5 + b * z
        ),
        "scaled by β_t: the square root is missing",
    ),
    (
        "step_back",
        step_back(lambda x, t, e, z, b, bar: (x - b / (1 - bar) * e) / (1 - b) ** 0.5 + b**0.5 * z),
        "β_t/(1 − ᾱ_t): the square root is missing",
    ),
    (
        "step_back",
        step_back(
            lambda x, t, e, z, b, bar: (x - b / (1 - bar) ** 0.5 * e) / bar**0.5 + b**0.5 * z
        ),
        "undoes all steps at once",
    ),
    (
        "step_back",
        step_back(lambda x, t, e, z, b, bar: (x - b / (1 - bar) ** 0.5 * e) / (1 - b) + b**0.5 * z),
        "divided by 1 − β_t",
    ),
    (
        "step_back",
        step_back(lambda x, t, e, z, b, bar: (x - b / (1 - bar) ** 0.5 * e) / (1 - b) ** 0.5),
        "no fresh noise",
    ),
    (
        "step_back",
        lambda x, t, e, z, betas: (
            (x - betas[t] / (1 - (1 - betas).cumprod(0)[t]) ** 0.5 * e) / (1 - betas[t]) ** 0.5
            + betas[t] ** 0.5 * z
        ),
        "noise is added at t = 0",
    ),
    ("step_back", lambda x, t, e, z, betas: x.mean(0), "the shape (2,)"),
    ("ddim_step", ddim(guess, put_back), "✓"),
    (
        "ddim_step",
        ddim(lambda x, e, bar: (x + (1 - bar) ** 0.5 * e) / bar**0.5, put_back),
        "is added",
    ),
    (
        "ddim_step",
        ddim(
            lambda x, e, bar: (x - (1 - bar) * e) / bar,
            lambda x0, e, bar, previous: previous * x0 + (1 - previous) * e,
        ),
        "no square roots",
    ),
    ("ddim_step", ddim(lambda x, e, bar: x - (1 - bar) ** 0.5 * e, put_back), "not divided by √ᾱ"),
    (
        "ddim_step",
        ddim(guess, lambda x0, e, bar, previous: previous**0.5 * x0 + (1 - bar) ** 0.5 * e),
        "old level",
    ),
    (
        "ddim_step",
        ddim(guess, lambda x0, e, bar, previous: x0 + (1 - previous) ** 0.5 * e),
        "not scaled by √ᾱ_prev",
    ),
    (
        "ddim_step",
        ddim(guess, lambda x0, e, bar, previous: previous**0.5 * x0),
        "without any noise",
    ),
    ("ddim_step", lambda x, e, bar, previous: x[None], "the shape (1, 4, 2)"),
]


@pytest.mark.parametrize(("exercise", "answer", "said"), ANSWERS)
def test_every_answer_of_notebook_01_is_diagnosed(exercise, answer, said, capsys):
    assert_diagnosed(getattr(ddpm_checks, f"check_{exercise}"), answer, said, capsys)
