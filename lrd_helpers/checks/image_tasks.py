"""The exercises of notebook 05: a noisy start, blended latents, one step of noise more, Euler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.checks import Mistake, check_function, normal
from lrd_helpers.ddpm import NoiseSchedule

BARS = NoiseSchedule.scaled_linear().alphas_cumprod
STEPS_20 = torch.arange(951, 0, -50)
STEPS_8 = torch.arange(876, 0, -125)


def _noisy(z: Tensor, noise: Tensor, bar: Tensor) -> Tensor:
    return bar.sqrt() * z + (1 - bar).sqrt() * noise


def _without_roots(z: Tensor, noise: Tensor, bar: Tensor) -> Tensor:
    return bar * z + (1 - bar) * noise


def _on_top(z: Tensor, noise: Tensor, bar: Tensor) -> Tensor:
    return z + (1 - bar).sqrt() * noise


def check_noisy_start(function: Callable[..., Any]) -> None:
    """Exercise 1, `noisy_start(z, noise, strength, timesteps, alphas_cumprod)`: SDEdit's beginning.

    √ᾱ_t·z + √(1 − ᾱ_t)·ε at the first of the last int(strength·N) of the N timesteps.
    """

    def start(
        mix: Callable[[Tensor, Tensor, Tensor], Tensor] = _noisy,
        index: Callable[[int, int], int] = lambda count, steps: steps - count,
    ) -> Callable[..., Tensor]:
        def noisy_start(
            z: Tensor, noise: Tensor, strength: float, timesteps: Tensor, bars: Tensor
        ) -> Tensor:
            steps = len(timesteps)
            return mix(z, noise, bars[timesteps[index(int(strength * steps), steps)]])

        return noisy_start

    z, noise = (normal(2, 4, 3, 5, seed=seed) for seed in range(2))
    shares = [(0.25, STEPS_20), (0.8, STEPS_20), (0.95, STEPS_20), (0.375, STEPS_8)]
    check_function(
        function,
        start(),
        [(z, noise, strength, timesteps, BARS) for strength, timesteps in shares],
        expected="√ᾱ_t·z + √(1 − ᾱ_t)·noise, of z's shape, with t = timesteps[N − int(strength·N)]",
        hint="N = len(timesteps); int(strength·N) steps are left to do, so the first "
        "N − int(strength·N) are skipped; then √ᾱ_t and √(1 − ᾱ_t)",
        mistakes=[
            Mistake(
                "a large strength adds little noise: the wrong end of the timesteps is skipped",
                "timesteps[0] is the noisiest; strength 1 must begin there",
                start(index=lambda count, steps: count),
            ),
            Mistake(
                "it begins one step too late",
                "with n steps left the first of them is timesteps[N − n]",
                start(index=lambda count, steps: steps - count + 1),
            ),
            Mistake(
                "the picture is mixed with ᾱ_t and 1 − ᾱ_t: no square roots",
                "ᾱ is a share of the variance; the numbers themselves scale with its square root",
                start(_without_roots),
            ),
            Mistake(
                "noise is added on top of the whole picture",
                "the picture shrinks as the noise grows: √ᾱ_t·z",
                start(_on_top),
            ),
        ],
    )


def check_blended(function: Callable[..., Any]) -> None:
    """Exercise 2, `blended(x, z, noise, mask, bar)`: mask·x + (1 − mask)·(√ᾱ·z + √(1 − ᾱ)·ε)."""

    def right(x: Tensor, z: Tensor, noise: Tensor, mask: Tensor, bar: Tensor) -> Tensor:
        return mask * x + (1 - mask) * _noisy(z, noise, bar)

    x, z, noise = (normal(2, 4, 6, 8, seed=seed) for seed in range(2, 5))
    hole = torch.zeros(2, 1, 6, 8)
    hole[0, :, 1:4, 2:7], hole[1, :, :2] = 1, 1
    check_function(
        function,
        right,
        [(x, z, noise, hole, bar) for bar in BARS[[30, 500, 951]]],
        expected="mask·x + (1 − mask)·(√ᾱ·z + √(1 − ᾱ)·noise), of x's shape",
        hint="two lines: first the known latents, as noisy as x is; then x in the hole "
        "(mask 1) and the known latents around it (mask 0)",
        mistakes=[
            Mistake(
                "hole and surroundings have changed places",
                "mask is 1 in the hole: there x stays, around it comes what is known",
                lambda x, z, noise, mask, bar: right(x, z, noise, 1 - mask, bar),
            ),
            Mistake(
                "what is put around the hole has no noise",
                "x is still noisy, so its surroundings must be as noisy: √ᾱ·z + √(1 − ᾱ)·noise",
                lambda x, z, noise, mask, bar: mask * x + (1 - mask) * z,
            ),
            Mistake(
                "the known latents are ᾱ·z + (1 − ᾱ)·noise: no square roots",
                "ᾱ is a share of the variance; the numbers themselves scale with its square root",
                lambda x, z, noise, mask, bar: (
                    mask * x + (1 - mask) * _without_roots(z, noise, bar)
                ),
            ),
            Mistake(
                "the known latents are added to x in the hole, too",
                "they belong outside only: (1 − mask) times",
                lambda x, z, noise, mask, bar: mask * x + _noisy(z, noise, bar),
            ),
        ],
    )


def check_noisier(function: Callable[..., Any]) -> None:
    """Exercise 3, `noisier(x, noise, bar, bar_noisier)`: the forward process from one ᾱ to another.

    √r·x + √(1 − r)·ε with r = ᾱ_noisier / ᾱ (RePaint, Algorithm 1, line 10, for several steps).
    """
    x, noise = (normal(2, 4, 3, 5, seed=seed) for seed in range(5, 7))
    pairs = ((1, 101), (351, 551), (451, 951))
    check_function(
        function,
        lambda x, noise, bar, more: _noisy(x, noise, more / bar),
        [(x, noise, BARS[less], BARS[more]) for less, more in pairs],
        expected="√r·x + √(1 − r)·noise with r = bar_noisier / bar, of x's shape",
        hint="if x has bar of signal left and the result must have bar_noisier, which share of "
        "what is there may stay? The variance then lacks 1 − r, which the noise fills",
        mistakes=[
            Mistake(
                "it noises x as if x were clean",
                "x has noise already: only the ratio r = bar_noisier / bar of it has to go",
                lambda x, noise, bar, more: _noisy(x, noise, more),
            ),
            Mistake(
                "the shares are r and 1 − r: no square roots",
                "r is a share of the variance; the numbers themselves scale with its square root",
                lambda x, noise, bar, more: _without_roots(x, noise, more / bar),
            ),
            Mistake(
                "noise is added, but x does not shrink",
                "√r·x: otherwise the variance would grow with every jump",
                lambda x, noise, bar, more: _on_top(x, noise, more / bar),
            ),
            Mistake(
                "the noise has the variance bar − bar_noisier",
                "x has shrunk by √r, its own noise too; what is missing is 1 − r",
                lambda x, noise, bar, more: (more / bar).sqrt() * x + (bar - more).sqrt() * noise,
            ),
        ],
    )


def check_euler_step(function: Callable[..., Any]) -> None:
    """Exercise 4, `euler_step(x, epsilon, bar, bar_next)`: along ε from one σ to the next.

    x/√ᾱ' = x/√ᾱ + (σ' − σ)·ε with σ = √((1 − ᾱ)/ᾱ) (DDIM, Eq. 13 and 14).
    """

    def euler(sigma: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda x, e, bar, after: (
            after.sqrt() * (x / bar.sqrt() + (sigma(after) - sigma(bar)) * e)
        )

    right = euler(lambda bar: ((1 - bar) / bar).sqrt())
    x, epsilon = (normal(2, 4, 3, 5, seed=seed) for seed in range(7, 9))
    levels = [(BARS[951], BARS[801]), (BARS[401], BARS[301]), (BARS[51], torch.tensor(1.0))]
    check_function(
        function,
        right,
        [(x, epsilon, bar, after) for bar, after in levels],
        expected="√bar_next·(x/√bar + (σ_next − σ)·epsilon) with σ = √((1 − ᾱ)/ᾱ), of x's shape",
        hint="three lines: blow x up to x/√bar, go (σ_next − σ)·epsilon, shrink by √bar_next",
        mistakes=[
            Mistake(
                "it goes away from the picture: the step has the wrong sign",
                "σ falls, so (σ_next − σ) is negative: noise is taken away",
                lambda x, e, bar, after: right(x, -e, bar, after),
            ),
            Mistake(
                "x is not divided by √bar before the step",
                "the straight line holds for x/√ᾱ = x_0 + σ·ε, not for x",
                lambda x, e, bar, after: right(x * bar.sqrt(), e, bar, after),
            ),
            Mistake(
                "the result is still x/√ᾱ: it is not shrunk again",
                "multiply by √bar_next at the end",
                lambda x, e, bar, after: right(x, e, bar, after) / after.sqrt(),
            ),
            Mistake(
                "σ is √(1 − ᾱ)",
                "after dividing by √ᾱ the noise has grown as well: σ = √((1 − ᾱ)/ᾱ)",
                euler(lambda bar: (1 - bar).sqrt()),
            ),
        ],
    )
