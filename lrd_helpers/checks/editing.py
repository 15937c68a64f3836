"""The exercises of notebook 10: the way to noise, change inside, touched cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from lrd_helpers.checks import Mistake, check_function, normal
from lrd_helpers.ddpm import NoiseSchedule

BARS = NoiseSchedule.scaled_linear().alphas_cumprod


def check_way_there(function: Callable[..., Any]) -> None:
    """Exercise 1, `way_there(z, score, move, times, bars)`: DDIM from a picture to noise."""

    def move(z: Tensor, epsilon: Tensor, bar: Tensor, bar_to: Tensor) -> Tensor:
        z0 = (z - (1 - bar).sqrt() * epsilon) / bar.sqrt()
        return bar_to.sqrt() * z0 + (1 - bar_to).sqrt() * epsilon

    def score(z: Tensor, t: int) -> Tensor:
        """Another ε for another z and another time; cells look at their neighbours."""
        return 0.6 * torch.tanh(z + 0.002 * t) + 0.3 * avg_pool2d(z, 3, 1, 1)

    def walk(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The loop over levels; `step(levels, level, …)` makes the latents of `level`."""

        def way_there(z: Tensor, score: Any, move: Any, times: list[int], bars: Tensor) -> Tensor:
            levels = [z]
            for level in range(1, len(times)):
                levels.append(step(levels, level, score, move, times, bars))
            return torch.stack(levels)

        return way_there

    def case(times: list[int], seed: int) -> tuple[Any, ...]:
        return normal(1, 4, 4, 5, seed=seed), score, move, times, BARS[times]

    right = walk(
        lambda levels, n, score, move, times, bars: move(
            levels[-1], score(levels[-1], times[n]), bars[n - 1], bars[n]
        )
    )
    check_function(
        function,
        right,
        [case([0, 1, 201, 401, 601], 0), case([0, 301, 801], 1)],
        expected="z_0 … z_T, stacked; from each level to the next one move(z, ε, its ᾱ, the next "
        "level's ᾱ) with ε = score(z, the next level's time)",
        hint="each step begins at levels[-1]; which time and which two ᾱ belong to it?",
        mistakes=[
            Mistake(
                "the U-Net is told the time of the level that z has, not of the one it goes to",
                "on the way back this step is made with the noisier level's time; tell it that",
                walk(
                    lambda levels, n, score, move, times, bars: move(
                        levels[-1], score(levels[-1], times[n - 1]), bars[n - 1], bars[n]
                    )
                ),
            ),
            Mistake(
                "the two levels of move have changed places",
                "z comes from the cleaner level and goes to the noisier one",
                walk(
                    lambda levels, n, score, move, times, bars: move(
                        levels[-1], score(levels[-1], times[n]), bars[n], bars[n - 1]
                    )
                ),
            ),
            Mistake(
                "ε is asked for at the picture each time",
                "the U-Net should look at the z that the step begins with, levels[-1]",
                walk(
                    lambda levels, n, score, move, times, bars: move(
                        levels[-1], score(levels[0], times[n]), bars[n - 1], bars[n]
                    )
                ),
            ),
            Mistake(
                "each level is reached from the picture in one leap",
                "each step begins where the last one ended",
                walk(
                    lambda levels, n, score, move, times, bars: move(
                        levels[0], score(levels[-1], times[n]), bars[0], bars[n]
                    )
                ),
            ),
            Mistake(
                "the right levels, the noise first",
                "the picture is level 0",
                lambda *case: right(*case).flip(0),
            ),
        ],
        axes=("level", "picture", "channel", "row", "column"),
    )


def check_redraw_inside(function: Callable[..., Any]) -> None:
    """Exercise 2, `redraw_inside(step, levels, changing, noise)`: blended after each step."""

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
        expected="x of shape (channels, height, width): noise inside and levels[-1] outside at "
        "first; then for each level T … 1 one step, and after it levels[level − 1] outside again",
        hint="for level in range(len(levels) - 1, 0, -1): step, then "
        "torch.where(changing, x, levels[level - 1])",
        mistakes=[
            Mistake(
                "what is put back is as noisy as before the step",
                "step(x, level) brings x to level − 1, so levels[level - 1] fits",
                walk(lambda x, pages, changing, level: torch.where(changing, x, pages[level])),
            ),
            Mistake(
                "the clean picture is put back at every step",
                "x is still noisy, so must be what is put beside it: levels[level - 1]",
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
        axes=("channel", "row", "column"),
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
        axes=("row", "column"),
    )
