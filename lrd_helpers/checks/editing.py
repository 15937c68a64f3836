"""The exercises of notebook 10: PSNR outside, DDIM both ways, touched cells, drawing inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from lrd_helpers.checks import Mistake, check_function, normal
from lrd_helpers.ddpm import NoiseSchedule

BARS = NoiseSchedule.scaled_linear().alphas_cumprod


def check_kept(function: Callable[..., Any]) -> None:
    """Exercise 1, `kept(before, after, changed)`: −10·log₁₀ of the mean squared error outside."""

    def decibels(differences: Tensor) -> float:
        return float(-10 * differences.square().mean().log10())

    def right(before: Tensor, after: Tensor, changed: Tensor) -> float:
        return decibels((after - before)[:, ~changed])

    def case(seed: int, height: int, width: int, share: float) -> tuple[Tensor, ...]:
        """Much was changed in `share` of the picture, little elsewhere."""
        before = normal(3, height, width, seed=seed).sigmoid()
        changed = torch.zeros(height, width, dtype=torch.bool)
        changed[: round(share * height), 1:] = True
        size = torch.where(changed, 0.5, 0.02)
        return before, (before + size * normal(3, height, width, seed=seed + 1)), changed

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
                lambda before, after, changed: decibels(after - before),
            ),
            Mistake(
                "the PSNR inside, of what was meant to change",
                "turn the mask over: ~changed is what should have stayed",
                lambda before, after, changed: right(before, after, ~changed),
            ),
            Mistake(
                "the changed pixels are set to 0, but counted in the mean",
                "zeros make every picture look kept: choose pixels, [:, ~changed], in place of "
                "multiplying",
                lambda before, after, changed: decibels((after - before) * ~changed),
            ),
            Mistake(
                "the right size with the wrong sign",
                "the better, the higher: −10·log₁₀",
                lambda before, after, changed: -right(before, after, changed),
            ),
        ],
        tolerance=1e-3,
    )


def check_ddim_move(function: Callable[..., Any]) -> None:
    """Exercise 2, `ddim_move(x, epsilon, bar, bar_to)`: √ᾱ'·x̂_0 + √(1 − ᾱ')·ε, both ways."""

    def clean(x: Tensor, epsilon: Tensor, bar: Tensor) -> Tensor:
        return (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()

    def noisy(x0: Tensor, epsilon: Tensor, bar: Tensor) -> Tensor:
        return bar.sqrt() * x0 + (1 - bar).sqrt() * epsilon

    x, epsilon = (normal(2, 4, 3, 5, seed=seed) for seed in range(2))
    check_function(
        function,
        lambda x, e, bar, bar_to: noisy(clean(x, e, bar), e, bar_to),
        [(x, epsilon, BARS[t], BARS[t_to]) for t, t_to in ((601, 561), (201, 601), (41, 1))],
        expected="√bar_to·x̂_0 + √(1 − bar_to)·epsilon with x̂_0 = (x − √(1 − bar)·epsilon)/√bar, "
        "of x's shape",
        hint="two lines: first which clean picture x̂_0 this ε means, at the level that x has; "
        "then as much of the same ε on it as the other level has",
        mistakes=[
            Mistake(
                "it stops at x̂_0, the clean picture",
                "put noise back on it: √bar_to·x̂_0 + √(1 − bar_to)·epsilon",
                lambda x, e, bar, bar_to: clean(x, e, bar),
            ),
            Mistake(
                "the two levels have changed places",
                "x has the level `bar`; it should come to the level `bar_to`",
                lambda x, e, bar, bar_to: noisy(clean(x, e, bar_to), e, bar),
            ),
            Mistake(
                "x̂_0 is not divided by √bar",
                "the picture in x is faded to √bar of itself: divide",
                lambda x, e, bar, bar_to: noisy(x - (1 - bar).sqrt() * e, e, bar_to),
            ),
            Mistake(
                "no square roots",
                "ᾱ is a share of the variance; the numbers themselves scale with √ᾱ and √(1 − ᾱ)",
                lambda x, e, bar, bar_to: bar_to * (x - (1 - bar) * e) / bar + (1 - bar_to) * e,
            ),
        ],
    )


def check_touched_cells(function: Callable[..., Any]) -> None:
    """Exercise 3, `touched_cells(mask, factor)`: the cells with at least one pixel of the mask."""

    def share(mask: Tensor, factor: int) -> Tensor:
        return avg_pool2d(mask[None].float(), factor)[0]

    def shape(height: int, width: int, *areas: tuple[slice, slice]) -> Tensor:
        mask = torch.zeros(height, width, dtype=torch.bool)
        for rows, columns in areas:
            mask[rows, columns] = True
        return mask

    check_function(
        function,
        lambda mask, factor: max_pool2d(mask[None].float(), factor)[0],
        [
            # A corner of one pixel, whole cells, most of a cell, a cell's middle; never just half.
            (shape(16, 24, (slice(3, 10), slice(7, 17))), 8),
            (shape(20, 12, (slice(0, 9), slice(1, 7)), (slice(18, 20), slice(10, 11))), 4),
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
                lambda mask, factor: share(mask, factor) >= 0.5,
            ),
            Mistake(
                "only cells that are covered wholly",
                "one pixel is enough: the maximum, not the minimum, of a cell",
                lambda mask, factor: share(mask, factor) == 1,
            ),
            Mistake(
                "the share of each cell that is covered, not yes or no",
                "yes where it is more than 0",
                share,
            ),
            Mistake(
                "one pixel of each cell, the upper left one",
                "all pixels of a cell count: max_pool2d looks at each of them",
                lambda mask, factor: mask[::factor, ::factor],
            ),
        ],
    )


def check_redraw_inside(function: Callable[..., Any]) -> None:
    """Exercise 4, `redraw_inside(step, known, changing, noise)`: blended after each step."""

    def step(x: Tensor, level: int) -> Tensor:
        """From a level to the next lower one; cells look at their neighbours, as in a U-Net."""
        return 0.7 * torch.tanh(x + 0.1 * level) + 0.3 * avg_pool2d(x, 3, 1, 1)

    def walk(put_back: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The loop over levels; `put_back(x, pages, changing, level)` ends each step."""

        def redraw_inside(step: Any, pages: Tensor, changing: Tensor, noise: Tensor) -> Tensor:
            x = torch.where(changing, noise, pages[-1])
            for level in range(len(pages) - 1, 0, -1):
                x = put_back(step(x, level), pages, changing, level)
            return x

        return redraw_inside

    def at_the_end(x: Tensor, pages: Tensor, changing: Tensor, level: int) -> Tensor:
        return torch.where(changing, x, pages[0]) if level == 1 else x

    def case(levels: int, height: int, width: int, seed: int) -> tuple[Any, ...]:
        changing = torch.zeros(height, width, dtype=torch.bool)
        changing[1:3, 2:] = True
        pages = normal(levels, 4, height, width, seed=seed)
        return step, pages, changing, normal(4, height, width, seed=seed + 1)

    right = walk(lambda x, pages, changing, level: torch.where(changing, x, pages[level - 1]))
    check_function(
        function,
        right,
        [case(5, 4, 6, 0), case(3, 5, 5, 10)],
        expected="x of shape (channels, height, width): noise inside and known[-1] outside at "
        "first; then for each level T … 1 one step, and after it known[level − 1] outside again",
        hint="for level in range(len(known) - 1, 0, -1): step, then "
        "torch.where(changing, x, known[level - 1])",
        mistakes=[
            Mistake(
                "what is put back is as noisy as before the step",
                "step(x, level) brings x to level − 1, so known[level - 1] fits",
                walk(lambda x, pages, changing, level: torch.where(changing, x, pages[level])),
            ),
            Mistake(
                "the clean picture is put back at every step",
                "x is still noisy, so must be what is put beside it: known[level - 1]",
                walk(lambda x, pages, changing, level: torch.where(changing, x, pages[0])),
            ),
            Mistake(
                "the picture is put back only once, at the end",
                "then the inside was drawn for other surroundings: put back after *each* step",
                walk(at_the_end),
            ),
            Mistake(
                "inside and outside have changed places",
                "torch.where(changing, new, old): new where it may change",
                lambda step, pages, changing, noise: right(step, pages, ~changing, noise),
            ),
        ],
    )
