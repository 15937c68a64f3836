"""The exercises of notebook 04b: a style's statistics, joined tokens, the loss of two parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.autoencoder import kl_divergence
from lrd_helpers.checks import Mistake, check_function, normal
from lrd_helpers.style import join


def check_style_statistics(function: Callable[..., Any]) -> None:
    """Exercise 1, `style_statistics(features)`: each channel's mean and spread over the picture.

    σ is √variance (AdaIN: Huang & Belongie 2017, Eq. 5 and 6). With N or N − 1, with or without a
    small ε in the root: all pass.
    """

    def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
        return features.mean((2, 3)), features.std((2, 3))

    def case(batch: int, channels: int, height: int, width: int, seed: int) -> tuple[Tensor]:
        size = 0.5 + normal(batch, channels, 1, 1, seed=seed).sigmoid()
        place = 3 * normal(batch, channels, 1, 1, seed=seed + 1)
        return (place + size * normal(batch, channels, height, width, seed=seed + 2),)

    check_function(
        function,
        lambda features: torch.cat(statistics(features), 1),
        [case(2, 3, 20, 16, 0), case(3, 5, 12, 30, 10), case(1, 2, 18, 18, 20)],
        axes=("picture", "number"),
        expected="the means of all channels, then their spreads √variance: (batch, 2·channels)",
        hint="take mean and std over the last two axes, (2, 3); torch.cat(…, 1) puts them in a row",
        tolerance=0.02,  # N or N − 1, of at least 320 numbers, must make no difference
        mistakes=[
            Mistake(
                "the spreads are variances: the square root is missing",
                "σ = √variance: .std, or .var with .sqrt()",
                lambda x: torch.cat([x.mean((2, 3)), x.var((2, 3))], 1),
            ),
            Mistake(
                "the spreads are the roots of the mean squares: the mean was not taken off",
                "spread is around the mean: .std does it",
                lambda x: torch.cat([x.mean((2, 3)), x.square().mean((2, 3)).sqrt()], 1),
            ),
            Mistake(
                "the spreads come first",
                "means first: torch.cat([mean, spread], 1)",
                lambda x: torch.cat(statistics(x)[::-1], 1),
            ),
            Mistake(
                "mean and spread of each channel stand side by side",
                "all means, then all spreads: torch.cat(…, 1), not stack and flatten",
                lambda x: torch.stack(statistics(x), 2).flatten(1),
            ),
        ],
    )


def check_joined(function: Callable[..., Any]) -> None:
    """Exercise 2, `joined(text, style, strength)`: [text; strength·style], token after token."""

    def case(batch: int, words: int, tokens: int, width: int, strength: float, seed: int):
        text, style = (normal(batch, n, width, seed=seed + n) for n in (words, tokens))
        return text, style, strength

    check_function(
        function,
        join,
        [case(2, 5, 3, 4, 0.5, 0), case(1, 7, 2, 6, 1.0, 10), case(3, 2, 4, 5, 0.2, 20)],
        axes=("picture", "token", "feature"),
        expected="[text; strength·style] of shape (batch, words + tokens, features)",
        hint="torch.cat([…, …], 1): axis 0 is the batch, 1 the tokens, 2 the features",
        mistakes=[
            Mistake(
                "the style stands before the text",
                "text first: the U-Net was tuned with the style behind it, and so is ours",
                lambda text, style, strength: torch.cat([strength * style, text], 1),
            ),
            Mistake(
                "strength is ignored",
                "strength·style",
                lambda text, style, strength: join(text, style, 1.0),
            ),
            Mistake(
                "the text is scaled, too",
                "strength belongs to the style alone: the words stay as they are",
                lambda text, style, strength: strength * join(text, style, 1.0),
            ),
            Mistake(
                "the text fades as the style grows",
                "nothing is mixed here: the words stay as they are, the style's tokens join them",
                lambda text, style, strength: join((1 - strength) * text, style, strength),
            ),
        ],
    )


def check_two_part_loss(function: Callable[..., Any]) -> None:
    """Exercise 3, `two_part_loss(noise, prediction, mean, log_variance, kl_weight)`.

    ‖ε − ε̂‖² (a mean over all numbers) + w·KL(N(μ, σ²) ‖ N(0, 1)) in nats, a mean over the batch.
    """

    def loss(weighted_kl: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., float]:
        return lambda noise, prediction, mean, log_variance, kl_weight: float(
            (noise - prediction).square().mean() + weighted_kl(mean, log_variance, kl_weight)
        )

    def case(batch: int, code: int, kl_weight: float, seed: int):
        noise, prediction = (normal(batch, 4, 3, 5, seed=seed + i) for i in range(2))
        mean, log_variance = (normal(batch, code, seed=seed + i) for i in range(2, 4))
        return noise, prediction, 1.5 * mean, log_variance - 1, kl_weight

    check_function(
        function,
        loss(lambda m, v, weight: weight * kl_divergence(m, v)),
        [case(3, 2, 0.5, 0), case(2, 4, 0.1, 10), case(5, 3, 2.0, 20)],
        expected="mean((noise − prediction)²) + kl_weight·KL, with KL = ½·Σ(μ² + σ² − 1 − log σ²) "
        "summed over a code and averaged over the batch",
        hint="σ² is log_variance.exp(); .sum(1).mean() sums over each code and averages the codes",
        mistakes=[
            Mistake(
                "the KL is subtracted",
                "both parts are to be small: their sum is the loss",
                loss(lambda m, v, weight: -weight * kl_divergence(m, v)),
            ),
            Mistake(
                "the KL is not weighted",
                "kl_weight·KL",
                loss(lambda m, v, weight: kl_divergence(m, v)),
            ),
            Mistake(
                "the KL is averaged over the numbers of a code",
                "the nats of a code's numbers add up: .sum(1), then the mean over the batch",
                loss(lambda m, v, weight: weight * kl_divergence(m, v) / m.shape[1]),
            ),
            Mistake(
                "the KL is summed over the batch",
                "the batch is averaged: .sum(1).mean()",
                loss(lambda m, v, weight: weight * kl_divergence(m, v) * len(m)),
            ),
            Mistake(
                "the KL lacks its ½",
                "½·Σ(μ² + σ² − 1 − log σ²)",
                loss(lambda m, v, weight: 2 * weight * kl_divergence(m, v)),
            ),
        ],
    )
