"""The exercises of notebook 06: a word's map, likeness of maps, top-k positions, map and mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.checks import Mistake, check_function


def _random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ exercise 1


def check_word_map(function: Callable[..., Any]) -> None:
    """Exercise 1, `word_map(weights, tokens, height, width)`: summed over tokens, mean of heads."""

    def weights(heads: int, positions: int, tokens: int, seed: int) -> Tensor:
        return (3 * _random(heads, positions, tokens, seed=seed)).softmax(dim=-1)

    def word_map(
        *,
        over_tokens: Callable[[Tensor], Tensor] = lambda x: x.sum(-1),
        over_heads: Callable[[Tensor], Tensor] = lambda x: x.mean(0),
        softmax: bool = False,
        scale: Callable[[Tensor], Tensor] = lambda x: x,
        shape: Callable[[Tensor, int, int], Tensor] = lambda x, h, w: x.reshape(h, w),
    ) -> Callable[..., Tensor]:
        def answer(weights: Tensor, tokens: Sequence[int], height: int, width: int) -> Tensor:
            weights = weights.softmax(dim=-1) if softmax else weights
            flat = over_heads(over_tokens(weights[..., list(tokens)]))
            return scale(shape(flat, height, width))

        return answer

    check_function(
        function,
        word_map(),
        [
            (weights(2, 15, 6, 0), [3], 3, 5),
            (weights(4, 8, 7, 1), [1, 2], 4, 2),
            (weights(3, 12, 9, 2), [4, 6, 7], 2, 6),
        ],
        expected="the sum over the word's tokens and the mean over the heads, of shape (height, "
        "width)",
        hint="weights[..., tokens] picks the word's columns; which axes are left over?",
        mistakes=[
            Mistake(
                "the word's tokens are averaged",
                "shares of one softmax add up: a word of two tokens gets the sum of both",
                word_map(over_tokens=lambda x: x.mean(-1)),
            ),
            Mistake(
                "only the word's first token counts",
                "a word may be spelled in several tokens, and a phrase always is: add them up",
                word_map(over_tokens=lambda x: x[..., 0]),
            ),
            Mistake(
                "the heads are added up",
                "each head has a softmax of its own: only their mean is a share between 0 and 1",
                word_map(over_heads=lambda x: x.sum(0)),
            ),
            Mistake(
                "only one head counts",
                "take the mean over all heads, the first axis",
                word_map(over_heads=lambda x: x[0]),
            ),
            Mistake(
                "rows and columns are mixed up",
                "positions run along the rows of the picture: reshape to (height, width)",
                word_map(shape=lambda x, h, w: x.reshape(w, h).T),
            ),
            Mistake(
                "the softmax is taken a second time",
                "`weights` are shares already, they add up to 1 over all tokens",
                word_map(softmax=True),
            ),
            Mistake(
                "the map is scaled so that its largest value is 1",
                "leave the shares as they are: else maps cannot be compared with each other",
                word_map(scale=lambda x: x / x.max()),
            ),
            Mistake(
                "the map is scaled so that it adds up to 1",
                "leave the shares as they are: else maps cannot be compared with each other",
                word_map(scale=lambda x: x / x.sum()),
            ),
        ],
        tolerance=1e-5,
    )


# ------------------------------------------------------------------ exercise 2


def check_similarity(function: Callable[..., Any]) -> None:
    """Exercise 2, `similarity(a, b)`: Pearson's correlation of two maps."""

    def parts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a - a.mean(), b - b.mean()

    def right(a: Tensor, b: Tensor) -> float:
        a, b = parts(a, b)
        return float((a * b).sum() / ((a**2).sum() * (b**2).sum()).sqrt())

    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / (a.norm() * b.norm()))

    def without_root(a: Tensor, b: Tensor) -> float:
        a, b = parts(a, b)
        return float((a * b).sum() / ((a**2).sum() * (b**2).sum()))

    def covariance(a: Tensor, b: Tensor) -> float:
        a, b = parts(a, b)
        return float((a * b).mean())

    def sum_of_products(a: Tensor, b: Tensor) -> float:
        a, b = parts(a, b)
        return float((a * b).sum())

    def n_and_n_minus_1(a: Tensor, b: Tensor) -> float:
        x, y = parts(a, b)
        return float((x * y).mean() / (a.std() * b.std()))

    first, second = _random(4, 5, seed=0), _random(4, 5, seed=1)
    check_function(
        function,
        right,
        [
            (first, second),
            (first, 0.3 * first + 0.2),
            (first, 1 - first),
            (_random(3, 3, seed=2), _random(3, 3, seed=3) ** 2),
        ],
        expected="Σ(a − ā)(b − b̄) / √(Σ(a − ā)² · Σ(b − b̄)²), one number",
        hint="take each map's mean off first; a map with itself must give 1, with 1 − itself −1",
        mistakes=[
            Mistake(
                "the means are still in it: that is the cosine",
                "maps are positive everywhere, so without taking the means off all look alike",
                cosine,
            ),
            Mistake(
                "it is divided by the squares' sums, not by their root",
                "the square root of Σ(a − ā)² · Σ(b − b̄)² belongs below the line",
                without_root,
            ),
            Mistake(
                "this is the covariance: it depends on how bright the maps are",
                "divide by √(Σ(a − ā)² · Σ(b − b̄)²)",
                covariance,
            ),
            Mistake(
                "nothing is divided: it grows with the maps' brightness and size",
                "divide by √(Σ(a − ā)² · Σ(b − b̄)²)",
                sum_of_products,
            ),
            Mistake(
                "it mixes a mean over n with a spread over n − 1: a map with itself gives less "
                "than 1",
                "torch's .std() divides by n − 1; use sums above and below the line",
                n_and_n_minus_1,
            ),
            Mistake(
                "the sign is lost",
                "opposite maps should give −1: no square and no absolute value around it all",
                lambda a, b: abs(right(a, b)),
            ),
            Mistake(
                "the sign is lost: this is the square of the correlation",
                "opposite maps should give −1: do not square the result",
                lambda a, b: right(a, b) ** 2,
            ),
        ],
    )


# ------------------------------------------------------------------ exercise 3


def check_top_positions(function: Callable[..., Any]) -> None:
    """Exercise 3, `top_positions(attention, k)`: row and column of the k largest, largest first."""

    def positions(
        *,
        largest: bool = True,
        pair: Callable[[Tensor, int, int], tuple[Tensor, Tensor]] = lambda i, h, w: (i // w, i % w),
        order: Callable[[Tensor], Tensor] = lambda i: i,
    ) -> Callable[..., Tensor]:
        def answer(attention: Tensor, k: int) -> Tensor:
            chosen = order(attention.flatten().topk(k, largest=largest).indices)
            return torch.stack(pair(chosen, *attention.shape), dim=1)

        return answer

    check_function(
        function,
        positions(),
        [
            (_random(4, 7, seed=0), 5),
            (_random(6, 3, seed=1), 1),
            (_random(5, 8, seed=2), 12),
        ],
        expected="(row, column) of each of the k largest values, largest first, of shape (k, 2)",
        hint="attention.flatten().topk(k).indices, and then: how many positions has one row?",
        mistakes=[
            Mistake(
                "these are the k smallest values",
                "topk takes the largest unless it is told largest=False",
                positions(largest=False),
            ),
            Mistake(
                "rows and columns have changed places",
                "row = index // width, column = index % width, and the row comes first",
                positions(pair=lambda i, h, w: (i % w, i // w)),
            ),
            Mistake(
                "the index is divided by the height",
                "a row has as many positions as the map is *wide*: divide by the width",
                positions(pair=lambda i, h, w: (i // h, i % h)),
            ),
            Mistake(
                "the right positions, the faintest first",
                "topk already gives the largest first: leave its order",
                positions(order=lambda i: i.flip(0)),
            ),
            Mistake(
                "the right positions, but in reading order",
                "leave topk's order, largest first",
                positions(order=lambda i: i.sort().values),
            ),
        ],
        tolerance=0,
    )


# ------------------------------------------------------------------ exercise 4


def check_mask_iou(function: Callable[..., Any]) -> None:
    """Exercise 4, `mask_iou(attention, mask, share)`: the region above a share of the peak."""

    def iou(
        *,
        level: Callable[[Tensor, float], Tensor | float] = lambda a, share: share * a.max(),
        score: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a & b).sum() / (a | b).sum(),
        below: bool = False,
    ) -> Callable[..., float]:
        def answer(attention: Tensor, mask: Tensor, share: float) -> float:
            region = attention >= level(attention, share)
            return float(score(~region if below else region, mask))

        return answer

    def box(top: int, left: int, bottom: int, right: int) -> Tensor:
        mask = torch.zeros(6, 8, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        return mask

    def case(mask: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor, float]:
        return 0.4 * _random(6, 8, seed=seed) * (0.6 + 0.4 * mask), mask, share

    check_function(
        function,
        iou(),
        [
            case(box(1, 2, 4, 5), 0.5, 0),
            case(box(0, 0, 3, 8), 0.7, 1),
            case(box(2, 3, 6, 7), 0.3, 2),
        ],
        expected="|region ∩ mask| / |region ∪ mask|, region = attention ≥ share · peak, one number",
        hint="`&` and `|` of two boolean tensors are intersection and union; .sum() counts them",
        mistakes=[
            Mistake(
                "the threshold is `share` itself, not a share of the peak",
                "maps differ in brightness: the threshold is share · attention.max()",
                iou(level=lambda a, share: share),
            ),
            Mistake(
                "the threshold is a share of the way from the least value to the peak",
                "asked for is share · attention.max()",
                iou(level=lambda a, share: a.min() + share * (a.max() - a.min())),
            ),
            Mistake(
                "the region is what lies *below* the threshold",
                "region = attention >= share * attention.max()",
                iou(below=True),
            ),
            Mistake(
                "intersection over the mask: a map that is bright everywhere gets 1",
                "that is the recall; divide by the union, (region | mask).sum()",
                iou(score=lambda a, b: (a & b).sum() / b.sum()),
            ),
            Mistake(
                "intersection over the region: one bright cell in the mask gets 1",
                "that is the precision; divide by the union, (region | mask).sum()",
                iou(score=lambda a, b: (a & b).sum() / a.sum()),
            ),
            Mistake(
                "intersection over the sum of both areas",
                "the sum counts what they share twice; the union is (region | mask).sum()",
                iou(score=lambda a, b: (a & b).sum() / (a.sum() + b.sum())),
            ),
            Mistake(
                "twice the intersection over the sum of both areas: that is Dice's coefficient",
                "IoU divides by the union, in which what they share counts once",
                iou(score=lambda a, b: 2 * (a & b).sum() / (a.sum() + b.sum())),
            ),
            Mistake(
                "the share of cells on which both agree",
                "the empty ground would count as success; divide the intersection by the union",
                iou(score=lambda a, b: (a == b).float().mean()),
            ),
        ],
    )
