"""The exercises of notebook 10: PSNR outside, DDIM both ways, touched cells, drawing inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from lrd_helpers.checks import Mistake, check_function
from lrd_helpers.ddpm import NoiseSchedule

BARS = NoiseSchedule.scaled_linear().alphas_cumprod


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ exercise 1


def check_kept(function: Callable[..., Any]) -> None:
    """Exercise 1, `kept(before, after, changed)`: −10·log₁₀ of the mean squared error outside."""

    def decibels(error: Tensor) -> float:
        return float(-10 * error.log10())

    def squares(before: Tensor, after: Tensor) -> Tensor:
        return (after - before).square()

    def right(before: Tensor, after: Tensor, changed: Tensor) -> float:
        return decibels(squares(before, after)[:, ~changed].mean())

    def case(seed: int, height: int, width: int, share: float) -> tuple[Tensor, ...]:
        """Much was changed in `share` of the picture, little elsewhere."""
        before = _random(3, height, width, seed=seed).sigmoid()
        changed = torch.zeros(height, width, dtype=torch.bool)
        changed[: round(share * height), 1:] = True
        size = torch.where(changed, 0.5, 0.02)
        return before, (before + size * _random(3, height, width, seed=seed + 1)), changed

    check_function(
        function,
        right,
        [case(0, 8, 10, 0.5), case(10, 12, 6, 0.25), case(20, 5, 5, 0.8)],
        expected="−10·log₁₀(mean of the squared differences where `changed` is not set)",
        hint="`(after - before)[:, ~changed]` are the differences outside, as (3, pixels); square "
        "them, take the mean, then −10·log₁₀",
        mistakes=[
            Mistake(
                "the PSNR of the whole picture, with what was meant to change",
                "only the pixels outside count: [:, ~changed]",
                lambda before, after, changed: decibels(squares(before, after).mean()),
            ),
            Mistake(
                "the PSNR inside, of what was meant to change",
                "turn the mask over: ~changed is what should have stayed",
                lambda before, after, changed: decibels(squares(before, after)[:, changed].mean()),
            ),
            Mistake(
                "the changed pixels are set to 0, but counted in the mean",
                "zeros make every picture look kept: choose pixels, [:, ~changed], in place of "
                "multiplying",
                lambda before, after, changed: decibels((squares(before, after) * ~changed).mean()),
            ),
            Mistake(
                "the right size with the wrong sign",
                "the better, the higher: −10·log₁₀",
                lambda before, after, changed: -right(before, after, changed),
            ),
            Mistake(
                "half as many decibels: a square root too many",
                "10·log₁₀ belongs to the mean *square* (it would be 20·log₁₀ with its root)",
                lambda before, after, changed: right(before, after, changed) / 2,
            ),
            Mistake(
                "twice as many decibels: 20·log₁₀ of the mean square",
                "20·log₁₀ belongs to the root of the mean square, 10·log₁₀ to the mean square",
                lambda before, after, changed: right(before, after, changed) * 2,
            ),
            Mistake(
                "the natural logarithm",
                "decibels are made with log10",
                lambda before, after, changed: float(
                    -10 * squares(before, after)[:, ~changed].mean().log()
                ),
            ),
            Mistake(
                "the mean of the absolute differences, not of their squares",
                ".square() before .mean()",
                lambda before, after, changed: decibels((after - before)[:, ~changed].abs().mean()),
            ),
            Mistake(
                "the mean squared error itself",
                "now −10·log₁₀ of it",
                lambda before, after, changed: float(squares(before, after)[:, ~changed].mean()),
            ),
        ],
        tolerance=1e-3,
    )


# ------------------------------------------------------------------ exercise 2


def check_ddim_move(function: Callable[..., Any]) -> None:
    """Exercise 2, `ddim_move(x, epsilon, bar, bar_to)`: √ᾱ'·x̂_0 + √(1 − ᾱ')·ε, both ways."""

    def clean(x: Tensor, epsilon: Tensor, bar: Tensor) -> Tensor:
        return (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()

    def noisy(x0: Tensor, epsilon: Tensor, bar: Tensor) -> Tensor:
        return bar.sqrt() * x0 + (1 - bar).sqrt() * epsilon

    x, epsilon = (_random(2, 4, 3, 5, seed=seed) for seed in range(2))
    check_function(
        function,
        lambda x, epsilon, bar, bar_to: noisy(clean(x, epsilon, bar), epsilon, bar_to),
        [
            (x, epsilon, BARS[601], BARS[561]),
            (x, epsilon, BARS[201], BARS[601]),
            (x, epsilon, BARS[41], BARS[1]),
        ],
        expected="√bar_to·x̂_0 + √(1 − bar_to)·epsilon with x̂_0 = (x − √(1 − bar)·epsilon)/√bar, "
        "of x's shape",
        hint="two lines: first which clean picture x̂_0 this ε means, at the level that x has; "
        "then as much of the same ε on it as the other level has",
        mistakes=[
            Mistake(
                "it stops at x̂_0, the clean picture",
                "put noise back on it: √bar_to·x̂_0 + √(1 − bar_to)·epsilon",
                lambda x, epsilon, bar, bar_to: clean(x, epsilon, bar),
            ),
            Mistake(
                "x is treated as a clean picture, and noised",
                "first take the noise out that x has: x̂_0 = (x − √(1 − bar)·epsilon)/√bar",
                lambda x, epsilon, bar, bar_to: noisy(x, epsilon, bar_to),
            ),
            Mistake(
                "the two levels have changed places",
                "x has the level `bar`; it should come to the level `bar_to`",
                lambda x, epsilon, bar, bar_to: noisy(clean(x, epsilon, bar_to), epsilon, bar),
            ),
            Mistake(
                "nothing moves: x̂_0 gets the noise of the level it came from",
                "the second line has bar_to",
                lambda x, epsilon, bar, bar_to: noisy(clean(x, epsilon, bar), epsilon, bar),
            ),
            Mistake(
                "x̂_0 is not divided by √bar",
                "the picture in x is faded to √bar of itself: divide",
                lambda x, epsilon, bar, bar_to: noisy(
                    x - (1 - bar).sqrt() * epsilon, epsilon, bar_to
                ),
            ),
            Mistake(
                "no square roots",
                "ᾱ is a share of the variance; the numbers themselves scale with √ᾱ and √(1 − ᾱ)",
                lambda x, epsilon, bar, bar_to: (
                    bar_to * (x - (1 - bar) * epsilon) / bar + (1 - bar_to) * epsilon
                ),
            ),
            Mistake(
                "ε is added where it should be taken out",
                "x̂_0 is x *without* noise: minus",
                lambda x, epsilon, bar, bar_to: noisy(clean(x, -epsilon, bar), epsilon, bar_to),
            ),
            Mistake(
                "x̂_0 is faded to the new level, but gets no noise",
                "add √(1 − bar_to)·epsilon",
                lambda x, epsilon, bar, bar_to: bar_to.sqrt() * clean(x, epsilon, bar),
            ),
        ],
    )


# ------------------------------------------------------------------ exercise 3


def check_touched_cells(function: Callable[..., Any]) -> None:
    """Exercise 3, `touched_cells(mask, factor)`: the cells with at least one pixel of the mask."""

    @functools.wraps(function)
    def as_numbers(mask: Tensor, factor: int) -> Any:
        """Yes and no as 1 and 0: they are compared by subtraction."""
        cells = function(mask, factor)
        return cells.float() if isinstance(cells, Tensor) else cells

    def pooled(rule: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
        """The cells for whose share of set pixels the rule holds."""
        return lambda mask, factor: rule(avg_pool2d(mask[None].float(), factor)[0]).float()

    def touched(mask: Tensor, factor: int) -> Tensor:
        return max_pool2d(mask[None].float(), factor)[0]

    def shape(height: int, width: int, *areas: tuple[slice, slice]) -> Tensor:
        mask = torch.zeros(height, width, dtype=torch.bool)
        for rows, columns in areas:
            mask[rows, columns] = True
        return mask

    check_function(
        as_numbers,
        touched,
        [
            # a corner of one pixel, whole cells, most of a cell, a cell's middle
            (shape(16, 24, (slice(3, 10), slice(7, 17))), 8),
            (shape(20, 12, (slice(0, 9), slice(2, 7)), (slice(18, 20), slice(10, 11))), 4),
            (shape(12, 18, (slice(2, 9), slice(4, 5)), (slice(6, 11), slice(12, 18))), 6),
        ],
        expected="yes and no of shape (height / factor, width / factor): yes where at least one of "
        "the cell's pixels is in the mask",
        hint="the largest of a cell's pixels: torch.nn.functional.max_pool2d(mask[None].float(), "
        "factor)[0] > 0",
        mistakes=[
            Mistake(
                "only cells of which at least half is covered",
                "a wheel that reaches into a cell by two pixels must go as well: one pixel is "
                "enough",
                pooled(lambda share: share >= 0.5),
            ),
            Mistake(
                "only cells of which more than half is covered",
                "a wheel that reaches into a cell by two pixels must go as well: one pixel is "
                "enough",
                pooled(lambda share: share > 0.5),
            ),
            Mistake(
                "only cells that are covered wholly",
                "one pixel is enough: the maximum, not the minimum, of a cell",
                pooled(lambda share: share == 1),
            ),
            Mistake(
                "the share of each cell that is covered, not yes or no",
                "yes where it is more than 0",
                pooled(lambda share: share),
            ),
            Mistake(
                "one pixel of each cell, the upper left one",
                "all pixels of a cell count: max_pool2d looks at each of them",
                lambda mask, factor: mask[::factor, ::factor].float(),
            ),
            Mistake(
                "one pixel of each cell, the middle one",
                "all pixels of a cell count: max_pool2d looks at each of them",
                lambda mask, factor: mask[factor // 2 :: factor, factor // 2 :: factor].float(),
            ),
            Mistake(
                "yes and no have changed places",
                "yes where the object is",
                lambda mask, factor: 1 - touched(mask, factor),
            ),
        ],
    )


# ------------------------------------------------------------------ exercise 4


def check_redraw_inside(function: Callable[..., Any]) -> None:
    """Exercise 4, `redraw_inside(step, known, changing, noise)`: blended after each step."""

    def step(x: Tensor, level: int) -> Tensor:
        """From a level to the next lower one; cells look at their neighbours, as in a U-Net."""
        return 0.7 * torch.tanh(x + 0.1 * level) + 0.3 * avg_pool2d(x, 3, 1, 1)

    def walk(
        *,
        begin: Callable[..., Tensor] = lambda known, changing, noise: torch.where(
            changing, noise, known[-1]
        ),
        back: Callable[..., Tensor] = lambda x, known, changing, level: torch.where(
            changing, x, known[level - 1]
        ),
        levels: Callable[[int], range] = lambda top: range(top, 0, -1),
        end: Callable[..., Tensor] = lambda x, known, changing: x,
    ) -> Callable[..., Tensor]:
        def redraw_inside(
            step: Callable[..., Tensor], known: Tensor, changing: Tensor, noise: Tensor
        ) -> Tensor:
            x = begin(known, changing, noise)
            for level in levels(len(known) - 1):
                x = back(step(x, level), known, changing, level)
            return end(x, known, changing)

        return redraw_inside

    def case(levels: int, height: int, width: int, seed: int) -> tuple[Any, ...]:
        changing = torch.zeros(height, width, dtype=torch.bool)
        changing[1:3, 2:] = True
        known = _random(levels, 4, height, width, seed=seed)
        return step, known, changing, _random(4, height, width, seed=seed + 1)

    check_function(
        function,
        walk(),
        [case(5, 4, 6, 0), case(3, 5, 5, 10)],
        expected="x of shape (channels, height, width): noise inside and known[-1] outside at "
        "first; then for each level T … 1 one step, and after it known[level − 1] outside again",
        hint="for level in range(len(known) - 1, 0, -1): step, then "
        "torch.where(changing, x, known[level - 1])",
        mistakes=[
            Mistake(
                "what is put back is as noisy as before the step",
                "step(x, level) brings x to level − 1, so known[level - 1] fits",
                walk(back=lambda x, known, changing, level: torch.where(changing, x, known[level])),
            ),
            Mistake(
                "the clean picture is put back at every step",
                "x is still noisy, so must be what is put beside it: known[level - 1]",
                walk(back=lambda x, known, changing, level: torch.where(changing, x, known[0])),
            ),
            Mistake(
                "nothing is put back: the whole picture may change",
                "after each step torch.where(changing, x, known[level - 1])",
                walk(back=lambda x, known, changing, level: x),
            ),
            Mistake(
                "the picture is put back only once, at the end",
                "then the inside was drawn for other surroundings: put back after *each* step",
                walk(
                    back=lambda x, known, changing, level: x,
                    end=lambda x, known, changing: torch.where(changing, x, known[0]),
                ),
            ),
            Mistake(
                "it is put back before each step, and so not after the last one",
                "first the step, then torch.where",
                lambda step, known, changing, noise: walk(
                    begin=lambda known, changing, noise: noise.expand_as(known[-1]),
                    back=lambda x, known, changing, level: x,
                )(
                    lambda x, level: step(torch.where(changing, x, known[level]), level),
                    known,
                    changing,
                    noise,
                ),
            ),
            Mistake(
                "inside and outside have changed places",
                "torch.where(changing, new, old): new where it may change",
                lambda step, known, changing, noise: walk()(step, known, ~changing, noise),
            ),
            Mistake(
                "inside and outside have changed places after the steps (not at the beginning)",
                "torch.where(changing, x, known[level - 1])",
                walk(
                    back=lambda x, known, changing, level: torch.where(
                        changing, known[level - 1], x
                    )
                ),
            ),
            Mistake(
                "it begins with the picture's own x_T everywhere; the noise is not used",
                "x_T remembers the old object: begin with torch.where(changing, noise, known[-1])",
                walk(begin=lambda known, changing, noise: known[-1]),
            ),
            Mistake(
                "it begins with new noise everywhere",
                "outside begins with the picture's own x_T: known[-1]",
                walk(begin=lambda known, changing, noise: noise),
            ),
            Mistake(
                "the levels are walked upwards, from clean to noisy",
                "range(len(known) - 1, 0, -1)",
                walk(levels=lambda top: range(1, top + 1)),
            ),
            Mistake(
                "one step is missing: it stops at level 1",
                "range(top, 0, -1) ends with 1, whose step leads to level 0",
                walk(levels=lambda top: range(top, 1, -1)),
            ),
        ],
    )
