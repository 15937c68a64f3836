"""The exercises of notebook 09: IoU, picture success, a bootstrap interval, the sign test."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.checks import Mistake, check_function
from lrd_helpers.mask import Box
from lrd_helpers.measure import box_iou, picture_success
from lrd_helpers.widgets.side_by_side import sign_test


def _iou_with_ghosts(a: Box, b: Box) -> float:
    """The notebook's `colleagues_iou`: boxes apart in both directions get more than 0."""
    return _iou(a, b, shared=lambda width, height: max(width * height, 0.0))


def _iou(a: Box, b: Box, shared: Callable[[float, float], float]) -> float:
    """IoU with `shared` for the area that both cover, from its width and height (0 or below)."""
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    both = shared(min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))
    return both / (areas - both)


def check_iou(function: Callable[..., Any]) -> None:
    """Exercise 1, `iou(a, b)`: what both boxes cover over what either covers."""
    check_function(
        function,
        box_iou,
        [
            ((0.1, 0.2, 0.5, 0.6), (0.3, 0.3, 0.8, 0.7)),
            ((0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.5, 0.75)),
            ((0.4, 0.4, 0.6, 0.9), (0.3, 0.5, 0.7, 0.8)),
            ((0.1, 0.1, 0.4, 0.4), (0.6, 0.7, 0.9, 0.8)),  # apart in both directions
            ((0.1, 0.1, 0.4, 0.9), (0.6, 0.1, 0.9, 0.5)),  # side by side
            ((0.2, 0.1, 0.5, 0.3), (0.1, 0.6, 0.4, 0.9)),  # one above the other
        ],
        expected="the area that both boxes cover over the area that at least one covers, 0 to 1",
        hint="what both cover is a box as well: from the larger of the two left edges to the "
        "smaller of the two right ones, and the same from top to bottom",
        mistakes=[
            Mistake(
                "the four ghosts are still there: boxes that are apart get more than 0",
                "two boxes that are apart in both directions share a width and a height below 0; "
                "look at what becomes of the two when they are multiplied",
                _iou_with_ghosts,
            ),
            Mistake(
                "boxes that are apart get something other than 0",
                "where the boxes are apart, what they share comes out below 0 in width or height, "
                "and no length is: 0 takes its place before the two are multiplied",
                lambda a, b: _iou(a, b, lambda width, height: width * height),
            ),
            Mistake(
                "a gap between two boxes counts as an area that they share",
                "a length below 0 says that there is a gap: nothing is shared, whatever its size",
                lambda a, b: _iou(a, b, lambda width, height: abs(width * height)),
            ),
            Mistake(
                "boxes one above the other get something other than 0: only the width is cut off",
                "what is done to the width is to be done to the height",
                lambda a, b: _iou(a, b, lambda width, height: max(width, 0.0) * height),
            ),
            Mistake(
                "boxes side by side get something other than 0: only the height is cut off",
                "what is done to the height is to be done to the width",
                lambda a, b: _iou(a, b, lambda width, height: width * max(height, 0.0)),
            ),
        ],
        tolerance=1e-6,
    )


def check_share_right(function: Callable[..., Any]) -> None:
    """Exercise 2, `share_right(ious, count)`: picture success of pictures with `count` layers."""

    def right(ious: list[list[float]], count: int) -> float:
        return fmean(picture_success(each) for each in ious if len(each) == count)

    check_function(
        function,
        right,
        [
            ([[0.9, 0.8], [0.9, 0.05], [0.3], [0.7, 0.5], [0.2, 0.1]], 2),
            ([[0.6, 0.9, 0.1], [0.9], [0.5, 0.8, 0.7], [0.4, 0.9, 0.3]], 3),
            ([[0.2], [0.8], [0.9, 0.9], [0.5], [0.51], [0.6, 0.1]], 1),
        ],
        expected="among the pictures with `count` layers the share of those whose layers all have "
        "an IoU of at least 0.5",
        hint="first [picture for picture in ious if len(picture) == count], then min(picture) >= "
        "0.5 for each of them",
        mistakes=[
            Mistake(
                "the share of the layers that succeed, not of the pictures",
                "a picture counts once, and only if every layer of it succeeds: min(picture)",
                lambda ious, count: fmean(iou >= 0.5 for p in ious if len(p) == count for iou in p),
            ),
            Mistake(
                "a picture counts if any of its layers succeeds",
                "all of them must: min(picture) or all(…), not max or any",
                lambda ious, count: fmean(max(p) >= 0.5 for p in ious if len(p) == count),
            ),
            Mistake(
                "a picture counts if the mean of its IoUs is at least 0.5",
                "a mean forgives what is missing; the worst layer decides: min(picture)",
                lambda ious, count: fmean(fmean(p) >= 0.5 for p in ious if len(p) == count),
            ),
            Mistake(
                "an IoU of exactly 0.5 does not count",
                "from 0.5 on: >=, not >",
                lambda ious, count: fmean(min(p) > 0.5 for p in ious if len(p) == count),
            ),
            Mistake(
                "the share is of all pictures, whatever their number of layers",
                "divide by the number of pictures with `count` layers",
                lambda ious, count: (
                    right(ious, count) * fmean(len(picture) == count for picture in ious)
                ),
            ),
        ],
        tolerance=1e-6,
    )


def bootstrap_interval(values: Tensor, chosen: Tensor) -> Tensor:
    """2.5 % and 97.5 % quantile of the means of the samples; `chosen`: (samples, size)."""
    return _ends(values[chosen].mean(1))


def _ends(numbers: Tensor, outside: float = 0.05) -> Tensor:
    """Where the middle of the numbers begins and ends, with a share of them outside."""
    return torch.stack([numbers.quantile(outside / 2), numbers.quantile(1 - outside / 2)])


def check_interval(function: Callable[..., Any]) -> None:
    """Exercise 3, `interval(values, chosen)`: the 95 % percentile bootstrap of the mean."""

    def case(size: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(size, generator=generator) ** 2
        return values, torch.randint(size, (samples, size), generator=generator)

    check_function(
        function,
        bootstrap_interval,
        [case(12, 400, 0), case(7, 1000, 1)],
        expected="the 2.5 % and the 97.5 % quantile of the samples' means, as a tensor of two",
        hint="values[chosen] has the shape (samples, size): one row is one sample, so .mean(1)",
        mistakes=[
            Mistake(
                "the quantiles of the values, not of means",
                "that says where 95 % of the *layouts* lie; how sure the mean is, the means of the "
                "samples say",
                lambda values, chosen: _ends(values),
            ),
            Mistake(
                "the quantiles of all drawn values, without a mean",
                "each row of values[chosen] becomes one number, its mean, first",
                lambda values, chosen: _ends(values[chosen].flatten()),
            ),
            Mistake(
                "means over the wrong axis",
                "a row of values[chosen] is a sample: .mean(1), one mean a sample",
                lambda values, chosen: _ends(values[chosen].mean(0)),
            ),
            Mistake(
                "from 5 % to 95 %: an interval of 90 %",
                "95 % inside leaves 5 % outside, and half of that on each side: 0.025 and 0.975",
                lambda values, chosen: _ends(values[chosen].mean(1), outside=0.1),
            ),
        ],
        tolerance=1e-5,
    )


def check_p_value(function: Callable[..., Any]) -> None:
    """Exercise 4, `p_value(wins, losses)`: the two-sided sign test."""

    def probability(wins: int, losses: int) -> float:
        """Of exactly so many wins, if a coin decided."""
        return math.comb(wins + losses, wins) / 2 ** (wins + losses)

    def tail(wins: int, losses: int) -> float:
        """Of as many wins or more."""
        return sum(probability(k, wins + losses - k) for k in range(wins, wins + losses + 1))

    def larger_tail(wins: int, losses: int) -> float:
        return tail(max(wins, losses), min(wins, losses))

    check_function(
        function,
        sign_test,
        [(8, 2), (5, 5), (1, 7), (11, 4), (0, 6), (6, 5)],
        expected="the probability that a fair coin is at least as one-sided: both tails, at most 1",
        hint="n = wins + losses; the sum of comb(n, k) / 2**n for k from max(wins, losses) to n is "
        "one tail",
        mistakes=[
            Mistake(
                "one tail only",
                "a coin could have been as one-sided in favour of the other: twice the tail",
                larger_tail,
            ),
            Mistake(
                "at a draw a probability above 1",
                "at a draw both tails hold the middle; at most 1: min(1, …)",
                lambda wins, losses: 2 * larger_tail(wins, losses),
            ),
            Mistake(
                "the tail of the wins, also where there are fewer wins than losses",
                "begin at the larger of the two: max(wins, losses)",
                lambda wins, losses: min(1.0, 2 * tail(wins, losses)),
            ),
            Mistake(
                "the probability of exactly this count",
                "every single count is unlikely when there are many: add up all that are at least "
                "as one-sided",
                probability,
            ),
        ],
        tolerance=1e-6,
    )
