"""The exercises of notebook 02: KL, a sample with gradients, one scale for all latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.autoencoder import kl_divergence, reparameterise, scaling_factor
from lrd_helpers.checks import Mistake, check_function, normal

MEAN, LOG_VARIANCE = normal(3, 4, seed=0), normal(3, 4, seed=1)
MAPS = normal(2, 4, 3, 3, seed=2), normal(2, 4, 3, 3, seed=3)  # a mean and log σ² at each place


def check_kl(function: Callable[..., Any]) -> None:
    """Exercise 1, `kl(mean, log_variance)`: ½·Σ(μ² + σ² − 1 − log σ²), averaged over the batch."""

    def with_deviation(mean: Tensor, log_variance: Tensor) -> Tensor:
        terms = 0.5 * (mean**2 + (log_variance / 2).exp() - 1 - log_variance)
        return terms.flatten(1).sum(1).mean()

    check_function(
        function,
        kl_divergence,
        [(MEAN, LOG_VARIANCE), MAPS, (torch.zeros(2, 3), torch.zeros(2, 3))],
        expected="one number, ½·Σ(μ² + σ² − 1 − log σ²) of each latent, its mean over the batch",
        hint="log_variance.exp() is σ²; sum over everything but the batch, then take the mean",
        tolerance=1e-3,
        mistakes=[
            Mistake(
                "the mean over all numbers: a latent's numbers are averaged, not added up",
                "the numbers of one latent are independent, so their divergences add up: .sum(1)",
                lambda mean, log_variance: kl_divergence(mean, log_variance) / mean[0].numel(),
            ),
            Mistake(
                "the sum over the batch, too",
                "add up within a latent, then average over the batch: .flatten(1).sum(1).mean()",
                lambda mean, log_variance: kl_divergence(mean, log_variance) * len(mean),
            ),
            Mistake(
                "twice the divergence",
                "the factor ½ in front is missing",
                lambda mean, log_variance: 2 * kl_divergence(mean, log_variance),
            ),
            Mistake(
                "it is negative: the sign is wrong",
                "this is what is made small: ½·(μ² + σ² − 1 − log σ²)",
                lambda mean, log_variance: -kl_divergence(mean, log_variance),
            ),
            Mistake(
                "σ stands where σ² should be",
                "log_variance is log σ²; its exp is σ² already, without a half in the exponent",
                with_deviation,
            ),
        ],
    )


def check_sampled(function: Callable[..., Any]) -> None:
    """Exercise 2, `sampled(mean, log_variance, noise)`: z = μ + σ·ε."""
    check_function(
        function,
        reparameterise,
        [(MEAN, LOG_VARIANCE, normal(3, 4, seed=4)), (*MAPS, normal(2, 4, 3, 3, seed=5))],
        expected="μ + σ·ε with σ = exp(½·log σ²), of the shape of the mean",
        hint="three steps: the variance from its logarithm, σ as its root, then μ + σ·ε",
        mistakes=[
            Mistake(
                "the noise is scaled by the variance σ²",
                "noise is scaled by σ, the square root: (log_variance / 2).exp()",
                lambda mean, log_variance, noise: mean + log_variance.exp() * noise,
            ),
            Mistake(
                "the noise is scaled by log σ²",
                "log_variance is a logarithm: σ = (log_variance / 2).exp()",
                lambda mean, log_variance, noise: mean + log_variance * noise,
            ),
            Mistake(
                "the noise is not scaled at all",
                "σ is what the encoder says about its own uncertainty: multiply the noise with it",
                lambda mean, log_variance, noise: mean + noise,
            ),
        ],
    )


def check_scaled(function: Callable[..., Any]) -> None:
    """Exercise 3, `scaled(latents)`: all numbers of a batch times one factor, 1/σ̂."""
    everywhere, of_channel = None, (0, 2, 3)

    def by(deviation_over: Any, mean_over: Any = ()) -> Callable[..., Tensor]:
        def scaled(latents: Tensor) -> Tensor:
            if mean_over != ():
                latents = latents - latents.mean(mean_over, keepdim=True)
            return latents / latents.std(deviation_over, keepdim=True)

        return scaled

    uneven = torch.tensor([1.0, 2.0, 3.0, 0.5])[:, None, None]
    check_function(
        function,
        lambda latents: latents * scaling_factor(latents),
        [(uneven * normal(4, 4, 5, 5, seed=8) + uneven,), (0.2 * normal(4, 4, 8, 8, seed=9) - 1,)],
        expected="latents/σ̂, one σ̂ for all numbers of the batch, of the latents' shape",
        hint="decoding divides all numbers by one factor, so scaling may only multiply by one",
        tolerance=2e-2,  # with n − 1 or with n: both are right
        mistakes=[
            Mistake(
                "each channel has a mean and a deviation of its own: this is the colleague's code",
                "what is taken off each channel is never put back; one number for everything",
                by(of_channel, of_channel),
            ),
            Mistake(
                "each channel has a factor of its own",
                "a channel that is wider than the others must stay wider: one σ̂ for everything",
                by(of_channel),
            ),
            Mistake(
                "each picture has a factor of its own",
                "nobody knows a picture's factor when it comes from noise: one σ̂ for the batch",
                by((1, 2, 3)),
            ),
            Mistake(
                "the mean is taken off, and never put back",
                "decoding only divides by the factor, so a shift stays in the picture",
                by(everywhere, everywhere),
            ),
            Mistake(
                "the latents times σ̂",
                "they must become as wide as the noise: divide by σ̂",
                lambda latents: latents * latents.std(),
            ),
        ],
    )
