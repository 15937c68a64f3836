"""The exercises of notebook 03: Stable Diffusion's betas, loss, guided answer, averaged weights."""

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
        axes=("step",),
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


def check_guided_answer(function: Callable[..., Any]) -> None:
    """Exercise 3, `guided_answer(unet, x, t, text, empty, scale)`: s + γ·(s(y) − s), in one call.

    The halves of the batch must be put together and taken apart in one and the same order.
    """

    def unet(x: Tensor, t: Tensor, text: Tensor) -> UNetOutput:
        return UNetOutput((x + text.mean((1, 2))[:, None, None, None]).tanh())

    def answer(
        doubled: Callable[[Tensor], Tensor],
        texts: Callable[[Tensor, Tensor], Tensor],
        mixed: Callable[[Tensor, Tensor, float], Tensor] = lambda s, s_y, g: s + g * (s_y - s),
    ) -> Callable[..., Tensor]:
        def guided_answer(
            unet: Any, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, scale: float
        ) -> Tensor:
            both = texts(empty.expand_as(text), text)
            return mixed(*unet(doubled(x), t, both).sample.chunk(2), scale)

        return guided_answer

    def halves(x: Tensor) -> Tensor:
        return torch.cat([x, x])

    def in_pairs(empty: Tensor, text: Tensor) -> Tensor:
        return torch.stack([empty, text], 1).flatten(0, 1)

    def one_after_the_other(empty: Tensor, text: Tensor) -> Tensor:
        return torch.cat([empty, text])

    def case(batch: int, scale: float, seed: int) -> tuple[Any, ...]:
        x, text = normal(batch, 4, 3, 3, seed=seed), 2 * normal(batch, 6, 8, seed=seed + 1)
        return unet, x, torch.tensor(9), text, normal(1, 6, 8, seed=seed + 2), scale

    check_function(
        function,
        answer(halves, one_after_the_other),
        [case(1, 5.0, 0), case(4, 5.0, 10), case(3, 1.0, 20), case(2, 0.0, 30)],
        axes=("picture", "channel", "row", "column"),
        expected="for each picture of x: its answer without caption + scale·(its answer with its "
        "own caption − the one without), of x's shape",
        hint="write down, for two pictures, which noise and which text stand in each row of the "
        "batch, and which rows chunk(2) puts into which half",
        mistakes=[
            Mistake(
                "with one picture it is right; with several, pictures get each other's captions",
                "torch.cat puts noises in two blocks; the texts stand in pairs, and chunk(2) cuts "
                "into blocks again: all three must agree",
                answer(halves, in_pairs),
            ),
            Mistake(
                "noises and texts stand in pairs, but chunk(2) takes the upper and lower half",
                "pairs are taken apart by [::2] and [1::2], blocks by chunk(2)",
                answer(lambda x: x.repeat_interleave(2, 0), in_pairs),
            ),
            Mistake(
                "it goes away from the caption: the halves have changed places",
                "the empty text comes first in the batch, so the first half is without caption",
                answer(halves, lambda empty, text: torch.cat([text, empty])),
            ),
            Mistake(
                "it starts at the answer with the caption, so it goes one step too far",
                "that is the formula of Ho & Salimans, whose w is our scale − 1",
                answer(halves, one_after_the_other, lambda s, s_y, g: s_y + g * (s_y - s)),
            ),
            Mistake(
                "the answer without the caption is not taken off",
                "only what the caption *adds* is made larger: scale·(with − without)",
                answer(halves, one_after_the_other, lambda s, s_y, g: s + g * s_y),
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
