"""The exercises of notebook 06: a word's map, likeness of maps, top-k positions, map and mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.checks import Mistake, check_function, normal


def _map(*shape: int, seed: int) -> Tensor:
    """Numbers from 0 to 1, as in a map of attention."""
    return normal(*shape, seed=seed).sigmoid()


def check_word_map(function: Callable[..., Any]) -> None:
    """Exercise 1, `word_map(weights, tokens, height, width)`: summed over tokens, mean of heads."""

    def right(weights: Tensor, tokens: Sequence[int], height: int, width: int) -> Tensor:
        return weights[..., tokens].sum(-1).mean(0).reshape(height, width)

    def weights(heads: int, positions: int, tokens: int, seed: int) -> Tensor:
        return normal(heads, positions, tokens, seed=seed).softmax(dim=-1)

    check_function(
        function,
        right,
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
                lambda weights, tokens, h, w: right(weights, tokens, h, w) / len(tokens),
            ),
            Mistake(
                "only the word's first token counts",
                "a word may be spelled in several tokens, and a phrase always is: add them up",
                lambda weights, tokens, h, w: right(weights, tokens[:1], h, w),
            ),
            Mistake(
                "the heads are added up",
                "each head has a softmax of its own: only their mean is a share between 0 and 1",
                lambda weights, tokens, h, w: right(weights, tokens, h, w) * len(weights),
            ),
            Mistake(
                "rows and columns are mixed up",
                "positions run along the rows of the picture: reshape to (height, width)",
                lambda weights, tokens, h, w: right(weights, tokens, w, h).T,
            ),
        ],
        tolerance=1e-5,
    )


def check_similarity(function: Callable[..., Any]) -> None:
    """Exercise 2, `similarity(a, b)`: Pearson's correlation of two maps."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / (a.norm() * b.norm()))

    def covariance(a: Tensor, b: Tensor) -> float:
        return float(((a - a.mean()) * (b - b.mean())).mean())

    first, second = _map(4, 5, seed=0), _map(4, 5, seed=1)
    check_function(
        function,
        lambda a, b: cosine(a - a.mean(), b - b.mean()),
        [
            (first, second),
            (first, 0.3 * first + 0.2),
            (first, 1 - first),
            (_map(3, 3, seed=2), _map(3, 3, seed=3) ** 2),
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
                "this is the covariance: it depends on how bright the maps are",
                "divide by √(Σ(a − ā)² · Σ(b − b̄)²)",
                covariance,
            ),
            Mistake(
                "it mixes a mean over n with a spread over n − 1: a map with itself gives less "
                "than 1",
                "torch's .std() divides by n − 1; use sums above and below the line",
                lambda a, b: covariance(a, b) / float(a.std() * b.std()),
            ),
        ],
    )


def check_top_positions(function: Callable[..., Any]) -> None:
    """Exercise 3, `top_positions(attention, k)`: row and column of the k largest, largest first."""

    def right(attention: Tensor, k: int) -> Tensor:
        indices, width = attention.flatten().topk(k).indices, attention.shape[1]
        return torch.stack([indices // width, indices % width], dim=1)

    def divided_by_height(attention: Tensor, k: int) -> Tensor:
        indices, height = attention.flatten().topk(k).indices, attention.shape[0]
        return torch.stack([indices // height, indices % height], dim=1)

    def in_reading_order(attention: Tensor, k: int) -> Tensor:
        return (attention >= attention.flatten().topk(k).values[-1]).nonzero()

    check_function(
        function,
        right,
        [(_map(4, 7, seed=0), 5), (_map(6, 3, seed=1), 1), (_map(5, 8, seed=2), 12)],
        expected="(row, column) of each of the k largest values, largest first, of shape (k, 2)",
        hint="attention.flatten().topk(k).indices, and then: how many positions has one row?",
        mistakes=[
            Mistake(
                "rows and columns have changed places",
                "row = index // width, column = index % width, and the row comes first",
                lambda attention, k: right(attention, k).flip(1),
            ),
            Mistake(
                "the index is divided by the height",
                "a row has as many positions as the map is *wide*: divide by the width",
                divided_by_height,
            ),
            Mistake(
                "the right positions, the faintest first",
                "topk already gives the largest first: leave its order",
                lambda attention, k: right(attention, k).flip(0),
            ),
            Mistake(
                "the right positions, but in reading order",
                "leave topk's order, largest first",
                in_reading_order,
            ),
        ],
        tolerance=0,
    )


def check_mask_iou(function: Callable[..., Any]) -> None:
    """Exercise 4, `mask_iou(attention, mask, share)`: the region above a share of the peak."""

    def scored(score: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., float]:
        return lambda attention, mask, share: float(
            score(attention >= share * attention.max(), mask)
        )

    def iou(a: Tensor, b: Tensor) -> Tensor:
        return (a & b).sum() / (a | b).sum()

    def case(top: int, left: int, bottom: int, right: int, share: float, seed: int):
        mask = torch.zeros(6, 8, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        return 0.4 * _map(6, 8, seed=seed) * (0.6 + 0.4 * mask), mask, share

    check_function(
        function,
        scored(iou),
        [case(1, 2, 4, 5, 0.5, 0), case(0, 0, 3, 8, 0.7, 1), case(2, 3, 6, 7, 0.3, 2)],
        expected="|region ∩ mask| / |region ∪ mask|, region = attention ≥ share · peak, one number",
        hint="`&` and `|` of two boolean tensors are intersection and union; .sum() counts them",
        mistakes=[
            Mistake(
                "the threshold is `share` itself, not a share of the peak",
                "maps differ in brightness: the threshold is share · attention.max()",
                lambda attention, mask, share: float(iou(attention >= share, mask)),
            ),
            Mistake(
                "intersection over the mask: a map that is bright everywhere gets 1",
                "that is the recall; divide by the union, (region | mask).sum()",
                scored(lambda region, mask: (region & mask).sum() / mask.sum()),
            ),
            Mistake(
                "intersection over the region: one bright cell in the mask gets 1",
                "that is the precision; divide by the union, (region | mask).sum()",
                scored(lambda region, mask: (region & mask).sum() / region.sum()),
            ),
            Mistake(
                "intersection over the sum of both areas",
                "the sum counts what they share twice; the union is (region | mask).sum()",
                scored(lambda region, mask: (region & mask).sum() / (region.sum() + mask.sum())),
            ),
        ],
    )
