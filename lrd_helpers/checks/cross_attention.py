"""The exercises of notebook 06: a word's map, a map to mend, map against mask."""

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
        axes=("row", "column"),
    )


def check_mended_map(function: Callable[..., Any]) -> None:
    """Exercise 2, `mended_map(query, key, heads, token)`: the softmax goes over the tokens."""

    def fits(query: Tensor, key: Tensor, heads: int) -> Tensor:
        """(heads, positions, tokens): what the softmax gets."""
        q, k = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key))
        return q @ k.transpose(1, 2) / q.shape[-1] ** 0.5

    def over(axis: int) -> Callable[..., Tensor]:
        def mapped(query: Tensor, key: Tensor, heads: int, token: int) -> Tensor:
            return fits(query, key, heads).softmax(dim=axis)[..., token].mean(dim=0)

        return mapped

    def shared(query: Tensor, key: Tensor, heads: int, token: int) -> Tensor:
        attention = over(2)(query, key, heads, token)
        return attention / attention.sum()

    def mean_first(query: Tensor, key: Tensor, heads: int, token: int) -> Tensor:
        return fits(query, key, heads).mean(dim=0).softmax(dim=-1)[:, token]

    def case(positions: int, tokens: int, heads: int, token: int, seed: int) -> tuple[Any, ...]:
        query, key = (2 * normal(n, 6 * heads, seed=seed + n) for n in (positions, tokens))
        return query, key, heads, token

    check_function(
        function,
        over(2),
        [case(12, 7, 2, 3, 0), case(9, 5, 4, 0, 100), case(16, 6, 3, 5, 200)],
        expected="the mean over the heads of the token's shares, of shape (positions,), where at "
        "each position the shares of all tokens are 1 together",
        hint="take one position and one head: add up the shares of all tokens; is it 1?",
        mistakes=[
            Mistake(
                "each token's shares add up to 1 over the positions, as in your colleague's",
                "who chooses among what? A position chooses among the tokens",
                over(1),
            ),
            Mistake(
                "the shares add up to 1 over the heads",
                "each head has a softmax of its own; within it, a position chooses among the "
                "tokens",
                over(0),
            ),
            Mistake(
                "right up to a factor: the map is divided by its sum",
                "then every word would have the same total again; leave the shares as they are",
                shared,
            ),
            Mistake(
                "the heads are averaged before the softmax",
                "each head makes shares of its own; average those",
                mean_first,
            ),
        ],
        tolerance=1e-5,
        axes=("position",),
    )


def check_mask_iou(function: Callable[..., Any]) -> None:
    """Exercise 3, `mask_iou(attention, mask, share)`: the region above a share of the peak."""

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
