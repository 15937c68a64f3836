"""Checks for the notebooks' exercises: they take your function and say what it computes instead.

A check prints and never raises: on an untouched stub "not implemented yet: …", on a mistake what it
saw, what it expected and a hint. `is_right` and `points` are for programs: they print nothing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["Mistake", "check_function", "explain", "is_right", "normal", "points"]


def normal(*shape: int, seed: int) -> Tensor:
    """Numbers from N(0, 1) for the cases of a check: a seed always gives the same ones."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Mistake:
    """A wrong version that people write, and what helps against it."""

    saw: str
    """What the wrong version computes, as the second half of "your function …"."""
    hint: str
    function: Callable[..., Tensor | float]
    """The wrong version itself: called with the arguments of the right one."""


def check_function(
    function: Callable[..., Any],
    solution: Callable[..., Tensor | float],
    cases: Sequence[tuple[Any, ...]],
    *,
    expected: str,
    hint: str,
    mistakes: Sequence[Mistake] = (),
    tolerance: float = 1e-4,
    axes: Sequence[str] = (),
    where: Callable[[Callable[..., Any], tuple[Any, ...]], str] | None = None,
) -> None:
    """Compares `function` with `solution` on every case and prints the verdict; never raises.

    Args:
        function: the learner's. One that returns None or … or raises NotImplementedError counts as
            not written yet.
        solution: the right one. It returns tensors, or else numbers.
        cases: the arguments of each call. Every call gets copies of its tensors, lists and
            dictionaries.
        expected: the formula, in words or symbols.
        hint: for a mistake that is none of `mistakes`.
        mistakes: the likeliest, five at most. They are tried in their order; the first that agrees
            with `function` in all cases is named.
        tolerance: largest absolute difference that still counts as equal.
        axes: what the axes of the result count ("row", "column"), to say where a mistake is.
        where: says of `function` and a case's arguments where it goes wrong; "" if it cannot.
    """
    name = getattr(function, "__name__", "your function")
    outputs = []
    for case in cases:
        arguments = _copies(case)
        try:
            output = function(*arguments)
        except NotImplementedError:
            output = None
        except Exception as error:
            explain(name, f"it raised {type(error).__name__}: {error}", expected, hint)
            return
        if output is None or output is ...:
            print(f"not implemented yet: {name}")
            return
        right = solution(*_copies(case))
        if fault := _wrong_kind(output, right):
            explain(name, *fault, hint)
            return
        if any(not _same(a, b) for a, b in zip(arguments, case, strict=True)):
            explain(
                name,
                "it changed its arguments in place",
                "arguments that are the same after the call",
                "write x = x + y in place of x += y, and sorted(x) in place of x.sort()",
            )
            return
        outputs.append(_numbers(output))

    def agrees_with(other: Callable[..., Tensor | float]) -> bool:
        values = [_numbers(other(*_copies(case))) for case in cases]
        return all(
            a.shape == b.shape and bool(((a - b).abs() <= tolerance).all())
            for a, b in zip(outputs, values, strict=True)
        )

    if agrees_with(solution):
        print(f"✓ {name}: right ({len(cases)} cases)")
        return
    for mistake in mistakes:
        if agrees_with(mistake.function):
            explain(name, mistake.saw, expected, mistake.hint)
            return
    for output, case in zip(outputs, cases, strict=True):
        right = _numbers(solution(*_copies(case)))
        differences = (output - right).abs().nan_to_num(nan=float("inf"))
        if differences.max() > tolerance:
            i = torch.unravel_index(differences.argmax(), right.shape)
            place = where(function, _copies(case)) if where else ""
            place = place or _place([int(number) for number in i], axes)
            saw, wanted = float(output[i]), float(right[i])
            explain(name, f"{saw:.4g}{place}", f"{wanted:.4g}, from {expected}", hint)
            return


def _place(index: list[int], axes: Sequence[str]) -> str:
    """Where a number stands in a result, as in "… at row 3, column 4"; "" if it is the only one."""
    if axes:
        return " at " + ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))
    return f" at {index}" if index else ""


def explain(name: str, saw: str, expected: str, hint: str) -> None:
    """Print what is wrong with the answer `name`, each of the three in a line of its own."""
    print(f"✗ {name}\n  saw:      {saw}\n  expected: {expected}\n  hint:     {hint}")


def is_right(check: Callable[[Any], None], answer: Any) -> bool:
    """Whether `check` says ✓ of `answer`. What either of them prints is not shown."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        check(answer)
    # The verdict comes last, so an answer that prints "✓" itself does not pass by that.
    return printed.getvalue().splitlines()[-1].startswith("✓ ")


def points(check: Callable[[Any], None], answer: Any, *, of: int) -> int:
    """What an answer is worth in a class: all the points `of` its exercise where it is right, or 0.

    nbgrader takes the number below a cell for its points.
    """
    return of if is_right(check, answer) else 0


def _wrong_kind(output: Any, right: Tensor | float) -> tuple[str, str] | None:
    """What was seen and expected, where the output is of another type or shape."""
    if not isinstance(right, Tensor):
        a_number = isinstance(output, Real) or (isinstance(output, Tensor) and not output.ndim)
        return None if a_number else (f"a {type(output).__name__}", "a number")
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}", f"a tensor of shape {tuple(right.shape)}"
    if output.shape != right.shape:
        return f"the shape {tuple(output.shape)}", f"the shape {tuple(right.shape)}"
    return None


def _numbers(output: Tensor | float) -> Tensor:
    """A tensor that can be subtracted from another one: yes and no become 1 and 0."""
    if not isinstance(output, Tensor):
        return torch.tensor(float(output), dtype=torch.float64)
    return output.detach().double()


def _copies(case: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.clone()
        if isinstance(value, Tensor)
        else value.copy()
        if isinstance(value, (list, dict))
        else value
        for value in case
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, dict)):  # the same things in the same order
        a, b = ([*x, *x.values()] if isinstance(x, dict) else x for x in (a, b))
        return list(map(id, a)) == list(map(id, b))
    return True
