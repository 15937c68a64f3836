"""The exercises of notebook 05: a noisy start, blended latents, one step of noise more, Euler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.checks import Mistake, check_function
from lrd_helpers.ddpm import NoiseSchedule

BARS = NoiseSchedule.scaled_linear().alphas_cumprod
STEPS_20 = torch.arange(951, 0, -50)
STEPS_8 = torch.arange(876, 0, -125)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _noisy(z: Tensor, noise: Tensor, bar: Tensor) -> Tensor:
    return bar.sqrt() * z + (1 - bar).sqrt() * noise


# ------------------------------------------------------------------ exercise 1


def check_noisy_start(function: Callable[..., Any]) -> None:
    """Exercise 1, `noisy_start(z, noise, strength, timesteps, alphas_cumprod)`: SDEdit's beginning.

    √ᾱ_t·z + √(1 − ᾱ_t)·ε at the first of the last int(strength·N) of the N timesteps.
    """

    def start(
        *,
        index: Callable[[int, int], int] = lambda count, steps: steps - count,
        mix: Callable[[Tensor, Tensor, Tensor], Tensor] = _noisy,
    ) -> Callable[..., Tensor]:
        def noisy_start(
            z: Tensor, noise: Tensor, strength: float, timesteps: Tensor, bars: Tensor
        ) -> Tensor:
            steps = len(timesteps)
            place = index(int(strength * steps), steps)
            return mix(z, noise, bars[timesteps[place]])

        return noisy_start

    z, noise = (_random(2, 4, 3, 5, seed=seed) for seed in range(2))
    check_function(
        function,
        start(),
        [
            (z, noise, strength, times, BARS)
            for strength, times in (
                (0.25, STEPS_20),
                (0.8, STEPS_20),
                (0.95, STEPS_20),
                (0.375, STEPS_8),
            )
        ],
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
                "all the noise of timesteps[0], whatever the strength",
                "strength says where to begin: skip the first N − int(strength·N) timesteps",
                start(index=lambda count, steps: 0),
            ),
            Mistake(
                "it begins one step too late",
                "with n steps left the first of them is timesteps[N − n]",
                start(index=lambda count, steps: steps - count + 1),
            ),
            Mistake(
                "the picture is mixed with ᾱ_t and 1 − ᾱ_t: no square roots",
                "ᾱ is a share of the variance; the numbers themselves scale with its square root",
                start(mix=lambda z, noise, bar: bar * z + (1 - bar) * noise),
            ),
            Mistake(
                "the shares of picture and noise have changed places",
                "√ᾱ_t belongs to z: at small t nearly all is picture",
                start(mix=lambda z, noise, bar: _noisy(noise, z, bar)),
            ),
            Mistake(
                "noise is added on top of the whole picture",
                "the picture shrinks as the noise grows: √ᾱ_t·z",
                start(mix=lambda z, noise, bar: z + (1 - bar).sqrt() * noise),
            ),
            Mistake(
                "the picture shrinks, but there is no noise",
                "add √(1 − ᾱ_t)·noise",
                start(mix=lambda z, noise, bar: bar.sqrt() * z),
            ),
        ],
    )


# ------------------------------------------------------------------ exercise 2


def check_blended(function: Callable[..., Any]) -> None:
    """Exercise 2, `blended(x, z, noise, mask, bar)`: mask·x + (1 − mask)·(√ᾱ·z + √(1 − ᾱ)·ε)."""

    def blend(
        *,
        known: Callable[[Tensor, Tensor, Tensor], Tensor] = _noisy,
        inside: Callable[[Tensor], Tensor] = lambda mask: mask,
    ) -> Callable[..., Tensor]:
        def blended(x: Tensor, z: Tensor, noise: Tensor, mask: Tensor, bar: Tensor) -> Tensor:
            new = inside(mask)
            return new * x + (1 - new) * known(z, noise, bar)

        return blended

    x, z, noise = (_random(2, 4, 6, 8, seed=seed) for seed in range(2, 5))
    hole = torch.zeros(2, 1, 6, 8)
    hole[0, :, 1:4, 2:7], hole[1, :, :2] = 1, 1
    check_function(
        function,
        blend(),
        [(x, z, noise, hole, bar) for bar in BARS[[30, 500, 951]]],
        expected="mask·x + (1 − mask)·(√ᾱ·z + √(1 − ᾱ)·noise), of x's shape",
        hint="two lines: first the known latents, as noisy as x is; then x in the hole "
        "(mask 1) and the known latents around it (mask 0)",
        mistakes=[
            Mistake(
                "hole and surroundings have changed places",
                "mask is 1 in the hole: there x stays, around it comes what is known",
                blend(inside=lambda mask: 1 - mask),
            ),
            Mistake(
                "what is put around the hole has no noise",
                "x is still noisy, so its surroundings must be as noisy: √ᾱ·z + √(1 − ᾱ)·noise",
                blend(known=lambda z, noise, bar: z),
            ),
            Mistake(
                "what is put around the hole is faded, but has no noise",
                "add √(1 − ᾱ)·noise",
                blend(known=lambda z, noise, bar: bar.sqrt() * z),
            ),
            Mistake(
                "what is put around the hole is pure noise",
                "√ᾱ·z is missing: the noisy version of what is *known*",
                blend(known=lambda z, noise, bar: noise),
            ),
            Mistake(
                "the known latents are ᾱ·z + (1 − ᾱ)·noise: no square roots",
                "ᾱ is a share of the variance; the numbers themselves scale with its square root",
                blend(known=lambda z, noise, bar: bar * z + (1 - bar) * noise),
            ),
            Mistake(
                "the shares of the known latents and the noise have changed places",
                "√ᾱ belongs to z: near the end (ᾱ near 1) nearly all is picture",
                blend(known=lambda z, noise, bar: _noisy(noise, z, bar)),
            ),
            Mistake(
                "x is covered with the known latents everywhere",
                "multiply them by (1 − mask), and x by mask",
                lambda x, z, noise, mask, bar: _noisy(z, noise, bar),
            ),
            Mistake(
                "the known latents are added to x in the hole, too",
                "they belong outside only: (1 − mask) times",
                lambda x, z, noise, mask, bar: mask * x + _noisy(z, noise, bar),
            ),
            Mistake(
                "x stays as it is outside the hole, and the known latents are added",
                "x belongs into the hole only: mask times",
                lambda x, z, noise, mask, bar: x + (1 - mask) * _noisy(z, noise, bar),
            ),
        ],
    )


# ------------------------------------------------------------------ exercise 3


def check_noisier(function: Callable[..., Any]) -> None:
    """Exercise 3, `noisier(x, noise, bar, bar_noisier)`: the forward process from one ᾱ to another.

    √r·x + √(1 − r)·ε with r = ᾱ_noisier / ᾱ (RePaint, Algorithm 1, line 10, for several steps).
    """

    def forward(
        share: Callable[[Tensor, Tensor], Tensor],
        mix: Callable[[Tensor, Tensor, Tensor], Tensor] = _noisy,
    ) -> Callable[..., Tensor]:
        return lambda x, noise, bar, more: mix(x, noise, share(bar, more))

    x, noise = (_random(2, 4, 3, 5, seed=seed) for seed in range(5, 7))
    pairs = ((1, 101), (351, 551), (451, 951))
    check_function(
        function,
        forward(lambda bar, more: more / bar),
        [(x, noise, BARS[less], BARS[more]) for less, more in pairs],
        expected="√r·x + √(1 − r)·noise with r = bar_noisier / bar, of x's shape",
        hint="if x has bar of signal left and the result must have bar_noisier, which share of "
        "what is there may stay? The variance then lacks 1 − r, which the noise fills",
        mistakes=[
            Mistake(
                "it noises x as if x were clean",
                "x has noise already: only the ratio r = bar_noisier / bar of it has to go",
                forward(lambda bar, more: more),
            ),
            Mistake(
                "the shares are r and 1 − r: no square roots",
                "r is a share of the variance; the numbers themselves scale with its square root",
                forward(lambda bar, more: more / bar, lambda x, noise, r: r * x + (1 - r) * noise),
            ),
            Mistake(
                "the shares of x and the noise have changed places",
                "√r belongs to x: for a small jump r is near 1 and x hardly changes",
                forward(lambda bar, more: more / bar, lambda x, noise, r: _noisy(noise, x, r)),
            ),
            Mistake(
                "x shrinks, but no noise comes in",
                "add √(1 − r)·noise",
                forward(lambda bar, more: more / bar, lambda x, noise, r: r.sqrt() * x),
            ),
            Mistake(
                "noise is added, but x does not shrink",
                "√r·x: otherwise the variance would grow with every jump",
                forward(
                    lambda bar, more: more / bar, lambda x, noise, r: x + (1 - r).sqrt() * noise
                ),
            ),
            Mistake(
                "the noise has the variance bar − bar_noisier",
                "x has shrunk by √r, its own noise too; what is missing is 1 − r",
                lambda x, noise, bar, more: (more / bar).sqrt() * x + (bar - more).sqrt() * noise,
            ),
        ],
    )


# ------------------------------------------------------------------ exercise 4


def check_euler_step(function: Callable[..., Any]) -> None:
    """Exercise 4, `euler_step(x, epsilon, bar, bar_next)`: along ε from one σ to the next.

    x/√ᾱ' = x/√ᾱ + (σ' − σ)·ε with σ = √((1 − ᾱ)/ᾱ) (DDIM, Eq. 13 and 14).
    """

    def sigma(bar: Tensor) -> Tensor:
        return ((1 - bar) / bar).sqrt()

    x, epsilon = (_random(2, 4, 3, 5, seed=seed) for seed in range(7, 9))
    one = torch.tensor(1.0)
    check_function(
        function,
        lambda x, e, bar, after: after.sqrt() * (x / bar.sqrt() + (sigma(after) - sigma(bar)) * e),
        [
            (x, epsilon, BARS[951], BARS[801]),
            (x, epsilon, BARS[401], BARS[301]),
            (x, epsilon, BARS[51], one),
        ],
        expected="√bar_next·(x/√bar + (σ_next − σ)·epsilon) with σ = √((1 − ᾱ)/ᾱ), of x's shape",
        hint="three lines: blow x up to x/√bar, go (σ_next − σ)·epsilon, shrink by √bar_next",
        mistakes=[
            Mistake(
                "it goes away from the picture: the step has the wrong sign",
                "σ falls, so (σ_next − σ) is negative: noise is taken away",
                lambda x, e, bar, after: (
                    after.sqrt() * (x / bar.sqrt() - (sigma(after) - sigma(bar)) * e)
                ),
            ),
            Mistake(
                "x is not divided by √bar before the step",
                "the straight line holds for x/√ᾱ = x_0 + σ·ε, not for x",
                lambda x, e, bar, after: after.sqrt() * (x + (sigma(after) - sigma(bar)) * e),
            ),
            Mistake(
                "the result is still x/√ᾱ: it is not shrunk again",
                "multiply by √bar_next at the end",
                lambda x, e, bar, after: x / bar.sqrt() + (sigma(after) - sigma(bar)) * e,
            ),
            Mistake(
                "neither is x divided by √bar nor the result multiplied by √bar_next",
                "the straight line holds for x/√ᾱ = x_0 + σ·ε, not for x",
                lambda x, e, bar, after: x + (sigma(after) - sigma(bar)) * e,
            ),
            Mistake(
                "σ is √(1 − ᾱ)",
                "after dividing by √ᾱ the noise has grown as well: σ = √((1 − ᾱ)/ᾱ)",
                lambda x, e, bar, after: (
                    after.sqrt() * (x / bar.sqrt() + ((1 - after).sqrt() - (1 - bar).sqrt()) * e)
                ),
            ),
            Mistake(
                "σ is (1 − ᾱ)/ᾱ: no square root",
                "(1 − ᾱ)/ᾱ is a variance; σ is its square root",
                lambda x, e, bar, after: (
                    after.sqrt() * (x / bar.sqrt() + ((1 - after) / after - (1 - bar) / bar) * e)
                ),
            ),
            Mistake(
                "all the noise is taken away at once: this is the guess of x_0",
                "stop at σ_next: (σ_next − σ)·epsilon, not −σ·epsilon",
                lambda x, e, bar, after: (x - (1 - bar).sqrt() * e) / bar.sqrt(),
            ),
        ],
    )
