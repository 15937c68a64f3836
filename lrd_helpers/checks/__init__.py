"""Checks for the notebooks' exercises: they take your function and say what it computes instead.

A check prints and never raises: on an untouched stub "not implemented yet: …", on a mistake what it
saw, what it expected and a hint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Mistake", "check_function"]


@dataclass(frozen=True)
class Mistake:
    """A wrong version that people write, and what helps against it."""

    saw: str
    """What the wrong version computes, as the second half of "your function …"."""
    hint: str
    function: Callable[..., Tensor]
    """The wrong version itself: called with the arguments of the right one."""


def check_function(
    function: Callable[..., Any],
    solution: Callable[..., Tensor],
    cases: Sequence[tuple[Any, ...]],
    *,
    expected: str,
    hint: str,
    mistakes: Sequence[Mistake] = (),
    tolerance: float = 1e-4,
) -> None:
    """Compares `function` with `solution` on every case and prints the verdict; never raises.

    Args:
        function: the learner's. One that returns None or … or raises NotImplementedError counts as
            not written yet.
        solution: the right one.
        cases: the arguments of each call. Every call gets copies of its tensors.
        expected: the formula, in words or symbols.
        hint: for a mistake that is none of `mistakes`.
        mistakes: tried in their order; the first that agrees with `function` in all cases is named.
        tolerance: largest absolute difference that still counts as equal.
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
            _print(name, f"it raised {type(error).__name__}: {error}", expected, hint)
            return
        if output is None or output is ...:
            print(f"not implemented yet: {name}")
            return
        right = solution(*_copies(case))
        if fault := _wrong_kind(output, right):
            _print(name, *fault, hint)
            return
        if any(not _same(a, b) for a, b in zip(arguments, case, strict=True)):
            _print(
                name,
                "it changed its arguments in place",
                "arguments that are the same after the call",
                "write x = x + y in place of x += y",
            )
            return
        outputs.append(output)

    def agrees_with(other: Callable[..., Tensor]) -> bool:
        values = [other(*_copies(case)) for case in cases]
        return all(
            a.shape == b.shape and bool(((a - b).abs() <= tolerance).all())
            for a, b in zip(outputs, values, strict=True)
        )

    if agrees_with(solution):
        print(f"✓ {name}: right ({len(cases)} cases)")
        return
    for mistake in mistakes:
        if agrees_with(mistake.function):
            _print(name, mistake.saw, expected, mistake.hint)
            return
    for output, case in zip(outputs, cases, strict=True):
        right = solution(*_copies(case))
        differences = (output - right).abs().nan_to_num(nan=float("inf"))
        if differences.max() > tolerance:
            i = int(differences.argmax())
            saw, wanted = float(output.flatten()[i].detach()), float(right.flatten()[i])
            where = f" as number {i} of the flattened result" if right.ndim else ""
            _print(name, f"{saw:.4g}{where}", f"{wanted:.4g}, from {expected}", hint)
            return


def _print(name: str, saw: str, expected: str, hint: str) -> None:
    print(f"✗ {name}\n  saw:      {saw}\n  expected: {expected}\n  hint:     {hint}")


def _wrong_kind(output: Any, right: Tensor) -> tuple[str, str] | None:
    """What was seen and expected, where the output is no tensor or has another shape."""
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}", f"a tensor of shape {tuple(right.shape)}"
    if output.shape != right.shape:
        return f"the shape {tuple(output.shape)}", f"the shape {tuple(right.shape)}"
    return None


def _copies(case: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in case)


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else True
