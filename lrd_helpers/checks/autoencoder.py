"""The exercises of notebook 02: KL, a draw with gradients, nearest codes with gradients, scale."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.autoencoder import (
    kl_divergence,
    look_up,
    nearest_codes,
    reparameterise,
    scaling_factor,
    straight_through,
)
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


def check_draw(function: Callable[..., Any]) -> None:
    """Exercise 2, `draw(mean, log_variance, noise)`: z = μ + σ·ε."""
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


def check_quantise(function: Callable[..., Any]) -> None:
    """Exercise 3, `quantise(latents, codebook)`: the nearest codes, gradients passed through.

    A case is called for its values, or for the gradient of a sum of its values with random weights
    with respect to the latents, or to the codebook.
    """

    def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
        return look_up(nearest_codes(latents, codebook), codebook)

    def best_by_product(latents: Tensor, codebook: Tensor) -> Tensor:
        return look_up(torch.einsum("bchw,kc->bkhw", latents, codebook).argmax(1), codebook)

    def looked_at(quantise: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(quantise)
        def look(latents: Tensor, codebook: Tensor, at: str) -> Any:
            if at == "values":
                return quantise(latents, codebook)
            latents, codebook = latents.requires_grad_(), codebook.requires_grad_()
            with torch.enable_grad():
                values = quantise(latents, codebook)
                # A stub is found with the first case, whose output is looked at as it is.
                loss = (values * normal(*values.shape, seed=9)).sum() + 0 * latents.sum()
            wanted = latents if at == "latents" else codebook
            [gradient] = torch.autograd.grad(loss, wanted, allow_unused=True)
            return torch.zeros_like(wanted) if gradient is None else gradient

        return look

    latents, codebook = normal(2, 3, 4, 4, seed=6), normal(5, 3, seed=7)
    check_function(
        looked_at(function),
        looked_at(lambda z, e: straight_through(z, nearest(z, e))),
        [(latents, codebook, at) for at in ("values", "latents", "codebook")],
        expected="at each position the nearest row of the codebook, with the gradient of the "
        "latents: z + (e − z).detach()",
        hint="the nearest row by torch.cdist and argmin; then a sum that is e, with z's gradient",
        mistakes=[
            Mistake(
                "the right values, but no gradient reaches the encoder",
                "argmin and indexing stop it; return latents + (quantised - latents).detach()",
                looked_at(lambda z, e: nearest(z, e).detach()),
            ),
            Mistake(
                "the right values, but the gradient goes to the codebook, none to the encoder",
                "detach the difference, not the latents: latents + (quantised - latents).detach()",
                looked_at(nearest),
            ),
            Mistake(
                "the right values, but the gradient goes to the latents and to the codebook",
                "the codebook has a loss of its own: detach the whole difference, "
                "(quantised - latents).detach()",
                looked_at(lambda z, e: nearest(z, e) + z - z.detach()),
            ),
            Mistake(
                "codes that are chosen by the largest product, not by the smallest distance",
                "a long code has a large product with everything; compare ‖z − e‖: nearest_codes",
                looked_at(lambda z, e: straight_through(z, best_by_product(z, e))),
            ),
        ],
    )


def check_factor(function: Callable[..., Any]) -> None:
    """Exercise 4, `factor(latents)`: 1/σ̂ of all the numbers in a batch of latents."""
    check_function(
        function,
        lambda latents: float(scaling_factor(latents)),
        [(3 * normal(4, 4, 5, 5, seed=8) + 2,), (0.2 * normal(4, 3, 8, 8, seed=9) - 1,)],
        expected="one number, 1/√(mean of (z − μ̂)²), over all numbers of the batch",
        hint="one μ̂ and one σ̂ for everything: latents.std() is σ̂",
        tolerance=1e-2,  # with n − 1 or with n: both are right
        mistakes=[
            Mistake(
                "σ̂ itself",
                "latents are multiplied with the factor and must then have a deviation of 1: 1/σ̂",
                lambda latents: latents.std(),
            ),
            Mistake(
                "1/σ̂²: the square root is missing",
                "the numbers scale with σ̂; the variance with its square",
                lambda latents: 1 / latents.var(),
            ),
            Mistake(
                "1 over the mean square's root: the mean is not taken off first",
                "σ̂² is the mean of (z − μ̂)²; use latents.std()",
                lambda latents: 1 / latents.square().mean().sqrt(),
            ),
        ],
    )
