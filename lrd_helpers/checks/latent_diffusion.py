"""The exercises of notebook 03: Stable Diffusion's betas, its loss, guidance, averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lrd_helpers.checks import Mistake, check_function, normal
from lrd_helpers.ddpm import NoiseSchedule, q_sample

SCHEDULE = NoiseSchedule.scaled_linear(20, 0.02, 0.5)
BARS = SCHEDULE.alphas_cumprod
SCALING_FACTOR = 0.4


def check_scaled_linear(function: Callable[..., Any]) -> None:
    """Exercise 1, `scaled_linear(steps, start, end)`: the squares of √β in equal steps."""
    check_function(
        function,
        lambda steps, start, end: NoiseSchedule.scaled_linear(steps, start, end).betas,
        [(1000, 0.00085, 0.012), (50, 0.01, 0.3), (3, 0.04, 0.16)],
        expected="(√start, …, √end in equal steps)², of shape (steps,)",
        hint="torch.linspace(a, b, steps) gives equal steps from a to b, both ends included",
        mistakes=[
            Mistake(
                "β itself grows in equal steps: that is DDPM's linear schedule",
                "take the square roots of both ends first, and square what linspace gives",
                lambda steps, start, end: torch.linspace(start, end, steps),
            ),
            Mistake(
                "these are the square roots of β",
                "the roots grow in equal steps, but asked for are the β: square them",
                lambda steps, start, end: torch.linspace(start**0.5, end**0.5, steps),
            ),
            Mistake(
                "β² grows in equal steps: root and square have changed places",
                "roots first, then equal steps, then squares",
                lambda steps, start, end: torch.linspace(start**2, end**2, steps) ** 0.5,
            ),
        ],
        tolerance=1e-6,
    )


@dataclass(frozen=True)
class UNetOutput:
    """What a U-Net of diffusers returns: the prediction is its field `sample`."""

    sample: Tensor


def check_latent_loss(function: Callable[..., Any]) -> None:
    """Exercise 2, `latent_loss(unet, z, text, t, noise, alphas_cumprod, scaling_factor)`.

    E‖ε − ε_θ(z_t, t, τ(y))‖², z_t from scaling factor · E(picture) (LDM, Eq. 3).
    """

    def unet(x: Tensor, t: Tensor, text: Tensor) -> UNetOutput:
        shift = 0.1 * t + text.mean((1, 2))
        return UNetOutput(torch.tanh(x) + shift[:, None, None, None])

    def loss(
        *,
        scale: Callable[[Tensor, float], Tensor] = lambda z, factor: z * factor,
        seen: Callable[..., Tensor] = lambda clean, t, noise: q_sample(clean, t, noise, SCHEDULE),
        target: Callable[[Tensor, Tensor], Tensor] = lambda clean, noise: noise,
    ) -> Callable[..., Tensor]:
        def latent_loss(
            unet: Any, z: Tensor, text: Tensor, t: Tensor, noise: Tensor, bars: Tensor, factor: Any
        ) -> Tensor:
            clean = scale(z, factor)
            return mse_loss(unet(seen(clean, t, noise), t, text).sample, target(clean, noise))

        return latent_loss

    def case(batch: int, size: int, t: list[int], seed: int) -> tuple[Any, ...]:
        z, noise = (normal(batch, 4, size, size, seed=seed + i) for i in range(2))
        text = normal(batch, 6, 8, seed=seed + 2)
        return unet, 2.5 * z, text, torch.tensor(t), noise, BARS, SCALING_FACTOR

    check_function(
        function,
        loss(),
        [case(4, 3, [0, 6, 13, 19], 0), case(2, 5, [3, 17], 10)],
        expected="one number, the mean over all elements of (unet(z_t, t, text).sample − noise)², "
        "z_t from scaling_factor·z",
        hint="clean = scaling_factor * z; z_t = √ᾱ_t·clean + √(1 − ᾱ_t)·ε with ᾱ_t of shape "
        "(batch, 1, 1, 1); the U-Net's answer is unet(z_t, t, text).sample",
        mistakes=[
            Mistake(
                "the scaling factor is missing",
                "the schedule is made for latents that vary by 1: multiply z by scaling_factor",
                loss(scale=lambda z, factor: z),
            ),
            Mistake(
                "z is divided by the scaling factor",
                "encoding multiplies, decoding divides: this is the encoding side",
                loss(scale=lambda z, factor: z / factor),
            ),
            Mistake(
                "the guess is held against the clean latents",
                "this network is asked for the noise: compare with `noise`",
                loss(target=lambda clean, noise: clean),
            ),
            Mistake(
                "the U-Net is shown the clean latents",
                "what it sees must be noisy: unet(z_t, t, text)",
                loss(seen=lambda clean, t, noise: clean),
            ),
        ],
    )


def check_guided(function: Callable[..., Any]) -> None:
    """Exercise 3, `guided(unconditional, conditional, scale)`: s + γ·(s(y) − s)."""
    without, with_caption = (normal(2, 4, 3, 3, seed=seed) for seed in range(2))
    check_function(
        function,
        lambda s, s_y, scale: s + scale * (s_y - s),
        [
            *((without, with_caption, scale) for scale in (5.0, 1.0, 0.0)),
            (normal(3, 2, seed=2), normal(3, 2, seed=3), 7.5),
        ],
        expected="unconditional + scale·(conditional − unconditional), of their shape",
        hint="start at the answer without the caption and go `scale` times the way to the other",
        mistakes=[
            Mistake(
                "the two halves have changed places: it goes away from the caption",
                "start at `unconditional`; scale = 1 must give `conditional`",
                lambda s, s_y, scale: s_y + scale * (s - s_y),
            ),
            Mistake(
                "the difference has the wrong sign: it goes away from the caption",
                "towards the caption is conditional − unconditional",
                lambda s, s_y, scale: s + scale * (s - s_y),
            ),
            Mistake(
                "it starts at `conditional`, so it goes one step too far",
                "that is the formula of Ho & Salimans, whose w is our scale − 1",
                lambda s, s_y, scale: s_y + scale * (s_y - s),
            ),
            Mistake(
                "the answer without the caption is not taken off",
                "only what the caption *adds* is made larger: scale·(conditional − unconditional)",
                lambda s, s_y, scale: s + scale * s_y,
            ),
        ],
    )


def check_ema_update(function: Callable[..., Any]) -> None:
    """Exercise 4, `ema_update(average, weight, decay)`: decay·average + (1 − decay)·weight."""
    weight = normal(3, 4, seed=1)
    check_function(
        function,
        lambda average, weight, decay: decay * average + (1 - decay) * weight,
        [
            (normal(3, 4, seed=0), weight, 0.9),
            (torch.zeros(3, 4), weight, 0.999),
            (normal(2, 2, 3, 3, seed=2), normal(2, 2, 3, 3, seed=3), 0.5),
        ],
        expected="decay·average + (1 − decay)·weight, of their shape",
        hint="two shares that add up to 1; a decay near 1 changes the average only a little",
        mistakes=[
            Mistake(
                "the shares have changed places: the average jumps to the new weight",
                "a decay of 0.999 keeps 99.9 % of the *average*",
                lambda average, weight, decay: (1 - decay) * average + decay * weight,
            ),
            Mistake(
                "the new weight counts in full: the average grows without end",
                "the shares must add up to 1: (1 − decay)·weight",
                lambda average, weight, decay: decay * average + weight,
            ),
            Mistake(
                "it moves away from the weight",
                "the sign: average + (1 − decay)·(weight − average)",
                lambda average, weight, decay: average - (1 - decay) * (weight - average),
            ),
        ],
    )
