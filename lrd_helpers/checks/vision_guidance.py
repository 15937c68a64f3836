"""The exercises of notebook 07: a whisper's loudness, ξ, ξ at every step, δ from attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.checks import Mistake, check_function, normal
from lrd_helpers.methods.guidance import dynamic_delta, vision_guidance


def check_snr_of_mean(function: Callable[..., Any]) -> None:
    """Exercise 1, `snr_of_mean(bar, variance, cells)`: ᾱ·v over (1 − ᾱ)/n."""
    check_function(
        function,
        lambda bar, variance, cells: bar * variance / ((1 - bar) / cells),
        [(0.5, 1.0, 1), (0.1, 0.6, 16), (0.0047, 0.4, 64), (0.9, 0.25, 4)],
        expected="variance of the signal, ᾱ·v, over variance of the noise, (1 − ᾱ)/n",
        hint="the mean of n independent numbers of variance s has variance s/n; and a number that "
        "is multiplied by a has a variance multiplied by a²",
        mistakes=[
            Mistake(
                "the noise of one cell, not that of a mean over n",
                "averaging over n cells divides the variance of the noise by n",
                lambda bar, variance, cells: bar * variance / (1 - bar),
            ),
            Mistake(
                "the noise grows with the number of cells",
                "a mean over more cells has *less* noise: the ratio gets larger with n",
                lambda bar, variance, cells: bar * variance / ((1 - bar) * cells),
            ),
            Mistake(
                "the noise is divided by √n",
                "√n is for the spread; the variance of a mean over n cells is divided by n",
                lambda bar, variance, cells: bar * variance / ((1 - bar) / cells**0.5),
            ),
            Mistake(
                "a ratio of spreads, not of variances",
                "no square roots: ᾱ and 1 − ᾱ are shares of variance already",
                lambda bar, variance, cells: (bar * variance * cells / (1 - bar)) ** 0.5,
            ),
        ],
        tolerance=1e-6,
    )


def check_xi(function: Callable[..., Any]) -> None:
    """Exercise 2, `xi(delta, mask, inside, outside)`: δ·(inside·M − outside·(1 − M)) (Eq. 5)."""

    def box(height: int, width: int) -> Tensor:
        mask = torch.zeros(height, width)
        mask[1:3, 2:] = 1
        return mask

    check_function(
        function,
        vision_guidance,
        [
            (normal(4, seed=0), box(5, 6), 0.2, 0.2),
            (normal(4, seed=1), box(4, 4), 0.05, 0.2),
            (normal(3, seed=2), box(3, 7), 1.0, 0.0),
        ],
        axes=("channel", "row", "column"),
        expected="inside·δ where the mask is 1, −outside·δ where it is 0; of shape (channels, "
        "height, width)",
        hint="delta[:, None, None] * field with a field of shape (height, width): inside where the "
        "mask is 1, −outside where it is 0",
        mistakes=[
            Mistake(
                "nothing outside",
                "outside, −outside·δ is added: the minus keeps second copies away",
                lambda delta, mask, a, b: vision_guidance(delta, mask, a, 0.0),
            ),
            Mistake(
                "outside has the sign of inside: +outside·δ",
                "outside the object is suppressed: minus",
                lambda delta, mask, a, b: vision_guidance(delta, mask, a, -b),
            ),
            Mistake(
                "−outside·δ is added everywhere, inside too",
                "outside only: multiply by 1 − mask",
                lambda delta, mask, a, b: vision_guidance(delta, mask, a - b, b),
            ),
            Mistake(
                "the two strengths have changed places",
                "`inside` belongs to mask, `outside` to 1 − mask",
                lambda delta, mask, a, b: vision_guidance(delta, mask, b, a),
            ),
        ],
    )


def check_guided_step(function: Callable[..., Any]) -> None:
    """Exercise 3, `guided_step(score, step, x, xi, t)`: step(score(x + ξ, t), t, x)."""

    def score(x: Tensor, t: float) -> Tensor:
        return torch.tanh(x) + 0.1 * t

    def step(epsilon: Tensor, t: float, x: Tensor) -> Tensor:
        return 1.1 * x - (0.4 + 0.1 * t) * epsilon

    def case(t: float, seed: int) -> tuple[Any, ...]:
        x, xi = (normal(2, 4, 3, 3, seed=seed + i) for i in range(2))
        return score, step, x, 0.5 * xi, t

    check_function(
        function,
        lambda score, step, x, xi, t: step(score(x + xi, t), t, x),
        [case(0.9, 0), case(0.2, 10)],
        axes=("picture", "channel", "row", "column"),
        expected="step(score(x + ξ, t), t, x): seen with ξ, stepped without",
        hint="ξ is a pair of glasses: the U-Net looks through it, but it is not painted into x",
        mistakes=[
            Mistake(
                "ξ stays in the latents: it is added anew at every step and piles up",
                "step from x without ξ: the third argument of step is x",
                lambda score, step, x, xi, t: step(score(x + xi, t), t, x + xi),
            ),
            Mistake(
                "the U-Net does not see ξ",
                "score(x + xi, t)",
                lambda score, step, x, xi, t: step(score(x, t), t, x),
            ),
            Mistake(
                "ξ is added to the answer, not to what the U-Net sees",
                "score(x + xi, t) in place of score(x, t) + xi",
                lambda score, step, x, xi, t: step(score(x, t) + xi, t, x),
            ),
            Mistake(
                "this is the answer of the U-Net, without the step",
                "give the answer to step(…, t, x)",
                lambda score, step, x, xi, t: score(x + xi, t),
            ),
        ],
    )


def check_delta_from_attention(function: Callable[..., Any]) -> None:
    """Exercise 4, `delta_from_attention(x, attention, k)`: mean of x at the k largest (Eq. 6)."""

    def case(channels: int, height: int, width: int, k: int, seed: int) -> tuple[Any, ...]:
        attention = normal(height, width, seed=seed + 1).softmax(1)
        return normal(channels, height, width, seed=seed), attention, k

    check_function(
        function,
        dynamic_delta,
        [case(4, 5, 6, 3, 0), case(4, 3, 3, 5, 2), case(2, 4, 7, 1, 4)],
        axes=("channel",),
        expected="the mean of x over the k positions with the largest attention, of shape "
        "(channels,)",
        hint="attention.flatten().topk(k).indices are the positions, x.flatten(1)[:, positions] "
        "what x holds there",
        mistakes=[
            Mistake(
                "the sum over the positions, not their mean",
                "1/|S|: divide by k",
                lambda x, attention, k: k * dynamic_delta(x, attention, k),
            ),
            Mistake(
                "the mean over all positions",
                "S is a choice: only the k positions where the attention is largest",
                lambda x, attention, k: x.mean((1, 2)),
            ),
            Mistake(
                "the mean over all positions, weighted by attention",
                "inside S all positions count the same, outside S none",
                lambda x, attention, k: (x * attention).sum((1, 2)) / attention.sum(),
            ),
            Mistake(
                "the positions with the *smallest* attention",
                "topk gives the largest; not -attention, not largest=False",
                lambda x, attention, k: dynamic_delta(x, -attention, k),
            ),
        ],
    )
