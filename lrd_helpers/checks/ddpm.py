"""The exercises of notebook 01: noise in one jump, the loss, one step back, one step of DDIM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lrd_helpers.checks import Mistake, check_function, normal
from lrd_helpers.ddpm import NoiseSchedule, q_sample

SCHEDULE = NoiseSchedule.linear(20, 0.005, 0.4)
BARS, BETAS = SCHEDULE.alphas_cumprod, SCHEDULE.betas


def check_jump(function: Callable[..., Any]) -> None:
    """Exercise 1, `jump(x0, t, noise, alphas_cumprod)`: x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε."""

    def mixed(signal: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor]) -> Any:
        def jump(x0: Tensor, t: Tensor, noise: Tensor, bars: Tensor) -> Tensor:
            bar = bars[t].reshape(-1, *[1] * (x0.ndim - 1))
            return signal(bar) * x0 + spread(bar) * noise

        return jump

    def case(t: list[int], *shape: int, seed: int) -> tuple[Tensor, ...]:
        x0, noise = (normal(len(t), *shape, seed=seed + i) for i in range(2))
        return x0, torch.tensor(t), noise, BARS

    check_function(
        function,
        lambda x0, t, noise, bars: q_sample(x0, t, noise, SCHEDULE),
        [case([0, 3, 7, 12, 19], 2, seed=0), case([1, 9, 18], 3, 4, 4, seed=2)],
        expected="√ᾱ_t·x_0 + √(1 − ᾱ_t)·ε, of the shape of x_0",
        hint="every sample has its own t: alphas_cumprod[t] is one number a sample; reshape it to "
        "(batch, 1, …) so that it multiplies whole samples, pictures too",
        mistakes=[
            Mistake(
                "it mixes ᾱ_t·x_0 and (1 − ᾱ_t)·ε: no square roots",
                "ᾱ is a share of the variance; the numbers themselves scale with its square root",
                mixed(lambda bar: bar, lambda bar: 1 - bar),
            ),
            Mistake(
                "it mixes √ᾱ_t·x_0 and (1 − ᾱ_t)·ε: the noise lacks its square root",
                "variances add up to 1: (√ᾱ)² + (√(1 − ᾱ))² = 1",
                mixed(lambda bar: bar.sqrt(), lambda bar: 1 - bar),
            ),
            Mistake(
                "signal and noise have changed places",
                "at t = 0 almost everything is signal: ᾱ_0 is close to 1 and belongs to x_0",
                mixed(lambda bar: (1 - bar).sqrt(), lambda bar: bar.sqrt()),
            ),
        ],
    )


def check_noise_loss(function: Callable[..., Any]) -> None:
    """Exercise 2, `noise_loss(model, x0, t, noise, alphas_cumprod)`: mean (ε − ε_θ(x_t, t))²."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) + 0.1 * t.reshape(-1, *[1] * (x.ndim - 1))

    def guess(model: Callable[..., Tensor], x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return model(q_sample(x0, t, noise, SCHEDULE), t)

    def case(*shape: int, seed: int) -> tuple[Any, ...]:
        x0, noise = (normal(4, *shape, seed=seed + i) for i in range(2))
        return model, x0, torch.tensor([0, 6, 13, 19]), noise, BARS

    check_function(
        function,
        lambda model, x0, t, noise, bars: mse_loss(guess(model, x0, t, noise), noise),
        [case(2, seed=0), case(3, 2, 2, seed=2)],
        expected="one number, the mean over all elements of (model(x_t, t) − noise)²",
        hint="x_t = q_sample(…) first, then the model's guess, then the mean squared difference",
        mistakes=[
            Mistake(
                "the guess is held against the clean x_0",
                "this network is asked for the noise: compare with `noise`",
                lambda model, x0, t, noise, bars: mse_loss(guess(model, x0, t, noise), x0),
            ),
            Mistake(
                "the network is shown the clean x_0",
                "what it sees must be noisy: model(x_t, t)",
                lambda model, x0, t, noise, bars: mse_loss(model(x0, t), noise),
            ),
            Mistake(
                "the squared differences are added up, not averaged",
                "`.mean()` in place of `.sum()`: the loss must not grow with the picture",
                lambda model, x0, t, noise, bars: mse_loss(
                    guess(model, x0, t, noise), noise, reduction="sum"
                ),
            ),
            Mistake(
                "the differences are not squared but taken as they are: they cancel",
                "square before you take the mean",
                lambda model, x0, t, noise, bars: (guess(model, x0, t, noise) - noise).mean(),
            ),
        ],
    )


def check_step_back(function: Callable[..., Any]) -> None:
    """Exercise 3, `step_back(x, t, epsilon, noise, betas)`: DDPM, Algorithm 2, line 4, σ² = β_t."""

    def step(
        *,
        divisor: Callable[[Tensor], Tensor] = lambda bar: (1 - bar).sqrt(),
        stretch: Callable[[Tensor, Tensor], Tensor] = lambda beta, bar: (1 - beta).sqrt(),
        spread: Callable[[Tensor], Tensor] = Tensor.sqrt,
        last: bool = False,
    ) -> Callable[..., Tensor]:
        def step_back(x: Tensor, t: int, epsilon: Tensor, noise: Tensor, betas: Tensor) -> Tensor:
            beta, bar = betas[t], (1 - betas).cumprod(0)[t]
            mean = (x - beta / divisor(bar) * epsilon) / stretch(beta, bar)
            return mean + spread(beta) * noise if t > 0 or last else mean

        return step_back

    x, epsilon, noise = (normal(4, 2, seed=seed) for seed in range(3))
    check_function(
        function,
        step(),
        [(x, t, epsilon, noise, BETAS) for t in (19, 8, 1, 0)],
        expected="(x_t − β_t/√(1 − ᾱ_t)·ε̂)/√(1 − β_t) + √β_t·z, and no z at t = 0",
        hint="β_t = betas[t]; ᾱ_t is a product over all s ≤ t: (1 - betas).cumprod(0)[t]",
        axes=("grain", "coordinate"),
        mistakes=[
            Mistake(
                "noise is added at t = 0 as well",
                "the last step is the picture itself: no noise where t == 0",
                step(last=True),
            ),
            Mistake(
                "the predicted noise is added, so the mess grows",
                "the sign: a step back takes noise away, x_t − …·ε̂",
                lambda x, t, epsilon, noise, betas: step()(x, t, -epsilon, noise, betas),
            ),
            Mistake(
                "the fresh noise is scaled by β_t: the square root is missing",
                "β_t is a variance, noise is scaled by its square root",
                step(spread=lambda beta: beta),
            ),
            Mistake(
                "ε̂ is scaled by β_t/(1 − ᾱ_t): the square root is missing",
                "x_t holds √(1 − ᾱ_t)·ε, so that is what one divides by",
                step(divisor=lambda bar: 1 - bar),
            ),
            Mistake(
                "the mean is divided by √ᾱ_t, which undoes all steps at once",
                "one step shrinks by √(1 − β_t): divide by that",
                step(stretch=lambda beta, bar: bar.sqrt()),
            ),
        ],
    )


def check_ddim_step(function: Callable[..., Any]) -> None:
    """Exercise 4, `ddim_step(x, epsilon, bar, bar_previous)`: DDIM's Eq. 12 with σ = 0."""

    def clean(x: Tensor, epsilon: Tensor, bar: Tensor) -> Tensor:
        return (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()

    def noisy(x0: Tensor, epsilon: Tensor, bar: Tensor) -> Tensor:
        return bar.sqrt() * x0 + (1 - bar).sqrt() * epsilon

    x, epsilon = normal(4, 2, seed=0), normal(4, 2, seed=1)
    levels = [(BARS[12], BARS[5]), (BARS[19], BARS[18]), (BARS[3], torch.tensor(1.0))]
    check_function(
        function,
        lambda x, e, bar, previous: noisy(clean(x, e, bar), e, previous),
        [(x, epsilon, bar, previous) for bar, previous in levels],
        expected="x̂_0 = (x − √(1 − ᾱ)·ε̂)/√ᾱ, then √ᾱ_prev·x̂_0 + √(1 − ᾱ_prev)·ε̂",
        hint="two lines: guess x_0 from x and ε̂, then use exercise 1 with ᾱ_prev and the same ε̂",
        axes=("grain", "coordinate"),
        mistakes=[
            Mistake(
                "√(1 − ᾱ)·ε̂ is added where it should be taken away",
                "the sign: solve x = √ᾱ·x_0 + √(1 − ᾱ)·ε for x_0",
                lambda x, e, bar, previous: noisy(clean(x, -e, bar), e, previous),
            ),
            Mistake(
                "no square roots",
                "ᾱ is a share of the variance; the numbers scale with its square root",
                lambda x, e, bar, previous: (
                    previous * (x - (1 - bar) * e) / bar + (1 - previous) * e
                ),
            ),
            Mistake(
                "the guess of x_0 is not divided by √ᾱ",
                "solve x = √ᾱ·x_0 + √(1 − ᾱ)·ε for x_0: the last step is a division",
                lambda x, e, bar, previous: noisy(x - (1 - bar).sqrt() * e, e, previous),
            ),
            Mistake(
                "the noise is put back at the old level, √(1 − ᾱ)",
                "after the step there is less noise: √(1 − ᾱ_prev)",
                lambda x, e, bar, previous: (
                    previous.sqrt() * clean(x, e, bar) + (1 - bar).sqrt() * e
                ),
            ),
        ],
    )
