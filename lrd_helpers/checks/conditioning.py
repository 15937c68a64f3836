"""The exercises of notebook 04: cross-attention, a style's statistics, joined tokens, the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.autoencoder import kl_divergence
from lrd_helpers.checks import Mistake, check_function
from lrd_helpers.style import join


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ exercise 1


def check_cross_attention(function: Callable[..., Any]) -> None:
    """Exercise 1, `cross_attention(x, c, to_q, to_k, to_v)`: softmax(QKᵀ/√d)·V (LDM, section 3.3).

    Q comes from the picture's positions x, K and V from the condition's tokens c.
    """

    def attention(
        *,
        scale: Callable[[int], float] = lambda d: d**-0.5,
        weigh: Callable[[Tensor], Tensor] = lambda fits: fits.softmax(-1),
        value: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda c, to_k, to_v: c @ to_v.T,
    ) -> Callable[..., Tensor]:
        def cross_attention(x: Tensor, c: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor):
            q, k, v = x @ to_q.T, c @ to_k.T, value(c, to_k, to_v)
            return weigh(q @ k.T * scale(q.shape[-1])) @ v

        return cross_attention

    def case(positions: int, tokens: int, width: int, condition: int, d: int, seed: int):
        return (
            _random(positions, width, seed=seed),
            _random(tokens, condition, seed=seed + 1),
            _random(d, width, seed=seed + 2),
            _random(d, condition, seed=seed + 3),
            _random(d, condition, seed=seed + 4),
        )

    check_function(
        function,
        attention(),
        [case(3, 2, 5, 4, 7, 0), case(6, 4, 3, 8, 5, 10), case(2, 9, 6, 3, 4, 20)],
        expected="softmax(QKᵀ/√d)·V, a row a position of x, with Q from x and K, V from c",
        hint="three lines: q, k, v by @ with the matrices' .T (q from x, k and v from c); the "
        "softmax of q @ k.T / d**0.5 along its last axis; times v",
        mistakes=[
            Mistake(
                "QKᵀ is not scaled",
                "a sum over d numbers grows with √d: divide by it before the softmax",
                attention(scale=lambda d: 1.0),
            ),
            Mistake(
                "QKᵀ is divided by d: the square root is missing",
                "it is /√d: the spread, not the variance, of a sum over d numbers",
                attention(scale=lambda d: 1 / d),
            ),
            Mistake(
                "QKᵀ is multiplied by √d",
                "divide by √d, so that the softmax does not become all or nothing",
                attention(scale=lambda d: d**0.5),
            ),
            Mistake(
                "the wrong sign: what fits worst gets the most",
                "softmax of +QKᵀ/√d",
                attention(scale=lambda d: -(d**-0.5)),
            ),
            Mistake(
                "the softmax runs over the positions of the picture",
                "each position shares 1 among the tokens: the softmax is along the last axis",
                attention(weigh=lambda fits: fits.softmax(0)),
            ),
            Mistake(
                "the softmax runs over positions and tokens together",
                "each position has a softmax of its own, along the last axis",
                attention(weigh=lambda fits: fits.flatten().softmax(0).reshape(fits.shape)),
            ),
            Mistake(
                "there is no softmax",
                "QKᵀ/√d says how well they fit; the softmax makes shares of it that sum to 1",
                attention(weigh=lambda fits: fits),
            ),
            Mistake(
                "the keys are handed out in place of the values",
                "V = c·W_Vᵀ: what a token is found by and what it says are two things",
                attention(value=lambda c, to_k, to_v: c @ to_k.T),
            ),
        ],
    )


# ------------------------------------------------------------------ exercise 2


def check_style_statistics(function: Callable[..., Any]) -> None:
    """Exercise 2, `style_statistics(features)`: each channel's mean and spread over the picture.

    σ is √variance (AdaIN: Huang & Belongie 2017, Eq. 5 and 6). With N or N − 1, with or without a
    small ε in the root: all pass.
    """

    def statistics(
        spread: Callable[[Tensor], Tensor] = lambda x: x.std(-1, correction=0),
        combine: Callable[[Tensor, Tensor], Tensor] = lambda mean, spread: torch.cat(
            [mean, spread], 1
        ),
    ) -> Callable[[Tensor], Tensor]:
        return lambda features: combine(features.flatten(2).mean(-1), spread(features.flatten(2)))

    def case(batch: int, channels: int, height: int, width: int, seed: int) -> tuple[Tensor]:
        size = 0.5 + _random(batch, channels, 1, 1, seed=seed).sigmoid()
        place = 3 * _random(batch, channels, 1, 1, seed=seed + 1)
        return (place + size * _random(batch, channels, height, width, seed=seed + 2),)

    check_function(
        function,
        statistics(),
        [case(2, 3, 20, 16, 0), case(3, 5, 12, 30, 10), case(1, 2, 18, 18, 20)],
        expected="the means of all channels, then their spreads √variance: (batch, 2·channels)",
        hint="take mean and std over the last two axes, (2, 3); torch.cat(…, 1) puts them in a row",
        tolerance=0.02,  # N or N − 1, of at least 320 numbers, must make no difference
        mistakes=[
            Mistake(
                "the spreads are variances: the square root is missing",
                "σ = √variance: .std, or .var with .sqrt()",
                statistics(lambda x: x.var(-1)),
            ),
            Mistake(
                "the spreads are the roots of the mean squares: the mean was not taken off",
                "spread is around the mean: .std does it",
                statistics(lambda x: x.square().mean(-1).sqrt()),
            ),
            Mistake(
                "the spreads are mean absolute differences",
                "square the differences, average, take the root: .std does it",
                statistics(lambda x: (x - x.mean(-1, keepdim=True)).abs().mean(-1)),
            ),
            Mistake(
                "the spreads come first",
                "means first: torch.cat([mean, spread], 1)",
                statistics(combine=lambda mean, spread: torch.cat([spread, mean], 1)),
            ),
            Mistake(
                "mean and spread of each channel stand side by side",
                "all means, then all spreads: torch.cat(…, 1), not stack and flatten",
                statistics(combine=lambda mean, spread: torch.stack([mean, spread], 2).flatten(1)),
            ),
            Mistake(
                "the means stand there twice",
                "the second half is each channel's spread",
                statistics(combine=lambda mean, spread: torch.cat([mean, mean], 1)),
            ),
        ],
    )


# ------------------------------------------------------------------ exercise 3


def check_joined(function: Callable[..., Any]) -> None:
    """Exercise 3, `joined(text, style, strength)`: [text; strength·style], token after token."""

    def joining(combine: Callable[[Tensor, Tensor, float], list[Tensor]]) -> Callable[..., Tensor]:
        return lambda text, style, strength: torch.cat(combine(text, style, strength), 1)

    def case(batch: int, words: int, tokens: int, width: int, strength: float, seed: int):
        return (
            _random(batch, words, width, seed=seed),
            _random(batch, tokens, width, seed=seed + 1),
            strength,
        )

    check_function(
        function,
        join,
        [case(2, 5, 3, 4, 0.5, 0), case(1, 7, 2, 6, 1.0, 10), case(3, 2, 4, 5, 0.2, 20)],
        expected="[text; strength·style] of shape (batch, words + tokens, features)",
        hint="torch.cat([…, …], 1): axis 0 is the batch, 1 the tokens, 2 the features",
        mistakes=[
            Mistake(
                "the style stands before the text",
                "text first: the U-Net was tuned with the style behind it, and so is ours",
                joining(lambda text, style, strength: [strength * style, text]),
            ),
            Mistake(
                "strength is ignored",
                "strength·style",
                joining(lambda text, style, strength: [text, style]),
            ),
            Mistake(
                "the text is scaled, too",
                "strength belongs to the style alone: the words stay as they are",
                joining(lambda text, style, strength: [strength * text, strength * style]),
            ),
            Mistake(
                "the text is scaled instead of the style",
                "strength·style, and the words as they are",
                joining(lambda text, style, strength: [strength * text, style]),
            ),
            Mistake(
                "the text fades as the style grows",
                "nothing is mixed here: the words stay as they are, the style's tokens join them",
                joining(lambda text, style, strength: [(1 - strength) * text, strength * style]),
            ),
            Mistake(
                "the style is scaled by 1 − strength",
                "strength 0 is no style",
                joining(lambda text, style, strength: [text, (1 - strength) * style]),
            ),
        ],
    )


# ------------------------------------------------------------------ exercise 4


def check_two_part_loss(function: Callable[..., Any]) -> None:
    """Exercise 4, `two_part_loss(noise, prediction, mean, log_variance, kl_weight)`.

    ‖ε − ε̂‖² (a mean over all numbers) + w·KL(N(μ, σ²) ‖ N(0, 1)) in nats, a mean over the batch.
    """

    def loss(
        *,
        error: Callable[[Tensor], Tensor] = lambda gap: gap.square().mean(),
        kl: Callable[[Tensor, Tensor], Tensor] = kl_divergence,
        weight: Callable[[float], float] = lambda kl_weight: kl_weight,
    ) -> Callable[..., float]:
        def two_part_loss(
            noise: Tensor, prediction: Tensor, mean: Tensor, log_variance: Tensor, kl_weight: float
        ) -> float:
            return float(error(noise - prediction) + weight(kl_weight) * kl(mean, log_variance))

        return two_part_loss

    def terms(m: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (m**2 + v.exp() - 1 - v)

    def case(batch: int, code: int, kl_weight: float, seed: int):
        noise, prediction = (_random(batch, 4, 3, 5, seed=seed + i) for i in range(2))
        mean, log_variance = (_random(batch, code, seed=seed + i) for i in range(2, 4))
        return noise, prediction, 1.5 * mean, log_variance - 1, kl_weight

    check_function(
        function,
        loss(),
        [case(3, 2, 0.5, 0), case(2, 4, 0.1, 10), case(5, 3, 2.0, 20)],
        expected="mean((noise − prediction)²) + kl_weight·KL, with KL = ½·Σ(μ² + σ² − 1 − log σ²) "
        "summed over a code and averaged over the batch",
        hint="σ² is log_variance.exp(); .sum(1).mean() sums over each code and averages the codes",
        mistakes=[
            Mistake(
                "the KL is subtracted",
                "both parts are to be small: their sum is the loss",
                loss(weight=lambda w: -w),
            ),
            Mistake(
                "the KL is not weighted",
                "kl_weight·KL",
                loss(weight=lambda w: 1.0),
            ),
            Mistake(
                "the noise's error is alone: there is no KL",
                "add kl_weight·KL",
                loss(weight=lambda w: 0.0),
            ),
            Mistake(
                "the KL is averaged over the numbers of a code",
                "the nats of a code's numbers add up: .sum(1), then the mean over the batch",
                loss(kl=lambda m, v: terms(m, v).mean()),
            ),
            Mistake(
                "the KL is summed over the batch",
                "the batch is averaged: .sum(1).mean()",
                loss(kl=lambda m, v: terms(m, v).sum()),
            ),
            Mistake(
                "the KL lacks its ½",
                "½·Σ(μ² + σ² − 1 − log σ²)",
                loss(kl=lambda m, v: 2 * kl_divergence(m, v)),
            ),
            Mistake(
                "the KL takes σ where σ² belongs",
                "log_variance is log σ²: its exponential is σ² already, without a root",
                loss(kl=lambda m, v: (terms(m, v) + 0.5 * ((v / 2).exp() - v.exp())).sum(1).mean()),
            ),
            Mistake(
                "log σ² has the wrong sign in the KL",
                "− log σ²: it is what keeps σ from shrinking to nothing",
                loss(kl=lambda m, v: (terms(m, v) + v).sum(1).mean()),
            ),
            Mistake(
                "the KL takes log_variance for the variance",
                "the encoder gives log σ²: σ² is log_variance.exp()",
                loss(kl=lambda m, v: 0.5 * (m**2 + v - 1 - v.abs().log()).sum(1).mean()),
            ),
            Mistake(
                "the KL takes μ where μ² belongs",
                "½·Σ(μ² + …): the square punishes both signs",
                loss(kl=lambda m, v: (terms(m, v) + 0.5 * (m - m**2)).sum(1).mean()),
            ),
            Mistake(
                "the squared errors are added up",
                "a mean over all numbers, so that the loss does not depend on the picture's size",
                loss(error=lambda gap: gap.square().sum()),
            ),
            Mistake(
                "the noise's error is the root of the mean square",
                "the mean square itself: no root",
                loss(error=lambda gap: gap.square().mean().sqrt()),
            ),
            Mistake(
                "the differences are averaged without being squared: they cancel",
                "square first, then average",
                loss(error=lambda gap: gap.mean()),
            ),
        ],
    )
