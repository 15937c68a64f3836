"""Denoising diffusion from scratch: noise schedules, closed-form noising, loss, two samplers.

Time t counts from 0 (the least noise; the papers' t = 1) to T − 1, as in diffusers. Data has any
shape behind the batch and should vary by about 1: pictures in [-1, 1]. Every formula is built from

    x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε,   ε ~ N(0, I),   ᾱ_t = ∏_{s ≤ t} (1 − β_s)

Papers: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), improved DDPM (Nichol & Dhariwal 2021),
LDM (Rombach et al. 2022), v-prediction (Salimans & Ho 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lrd_helpers.sampling import predictions
from lrd_helpers.sampling.predictions import Kind

Data = Float[Tensor, "batch *shape"]
Times = Int[Tensor, "batch"]
Model = Callable[[Data, Times], Data]
"""A network: noisy data and its times in, a prediction of the data's shape out."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How much noise each of the T forward steps adds: β_t in (0, 1), the variance of its noise.

    Raises:
        ValueError: no steps, or a β outside (0, 1).
    """

    betas: Float[Tensor, "steps"]

    def __post_init__(self) -> None:
        if not len(self.betas):
            raise ValueError("a schedule needs at least one step")
        least, most = float(self.betas.min()), float(self.betas.max())
        if not 0 < least <= most < 1:
            raise ValueError(f"every β must lie in (0, 1), but they are {least:g} to {most:g}")

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> NoiseSchedule:
        """β in equal steps (DDPM, section 4). With fewer steps β must grow as 1000 / steps."""
        return cls(torch.linspace(start, end, steps))

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012
    ) -> NoiseSchedule:
        """√β in equal steps: Stable Diffusion's (the "linear" of LDM's code)."""
        return cls(torch.linspace(start**0.5, end**0.5, steps) ** 2)

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, most: float = 0.999) -> NoiseSchedule:
        """ᾱ falls like a squared cosine, and no β exceeds `most` (improved DDPM, Eq. 17)."""
        bars = [
            math.cos((t / steps + offset) / (1 + offset) * math.pi / 2) ** 2
            for t in range(steps + 1)
        ]
        return cls(torch.tensor([min(1 - bars[t + 1] / bars[t], most) for t in range(steps)]))

    @property
    def steps(self) -> int:
        """T, the number of forward steps."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, "steps"]:
        """ᾱ_t = ∏ (1 − β_s): the share of x_t's variance that is still signal (DDPM, Eq. 4)."""
        return (1 - self.betas).cumprod(0)

    @property
    def snr(self) -> Float[Tensor, "steps"]:
        """ᾱ_t / (1 − ᾱ_t): the signal-to-noise ratio, a ratio of variances."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def timesteps(
        self, count: int | None = None, spacing: Literal["trailing", "leading"] = "trailing"
    ) -> list[int]:
        """`count` of the T times (all by default), noisiest first: what a sampler visits.

        "trailing" begins at T − 1, where x is pure noise; "leading" ends at 0 (diffusers' default)
        and begins too early (Lin et al. 2024, section 3.3).

        Raises:
            ValueError: `count` is not within 1 … T.
        """
        count = self.steps if count is None else count
        if not 1 <= count <= self.steps:
            raise ValueError(f"{count} of {self.steps} steps: give a number from 1 to {self.steps}")
        if spacing == "trailing":
            return [round(self.steps - i * self.steps / count) - 1 for i in range(count)]
        return [i * (self.steps // count) for i in reversed(range(count))]


def q_sample(x0: Data, t: Times, noise: Data, schedule: NoiseSchedule) -> Data:
    """x_t = √ᾱ_t·x_0 + √(1 − ᾱ_t)·ε: t + 1 forward steps in one (DDPM, Eq. 4).

    Raises:
        ValueError: a time outside 0 … T − 1.
    """
    signal, spread = _coefficients(schedule, t, x0)
    return signal * x0 + spread * noise


def convert(
    prediction: Data, x_t: Data, t: Times, schedule: NoiseSchedule, *, given: Kind, wanted: Kind
) -> Data:
    """The same prediction in other words: ε, x_0 and v follow from each other and x_t.

    DDPM, Eq. 9 and 15; v as in Salimans & Ho, appendix D. ε → x_0 divides by √ᾱ_t: where almost no
    signal is left, a small error in ε is a large one in x_0.

    Raises:
        ValueError: an unknown kind, or a time outside 0 … T − 1.
    """
    signal, spread = _coefficients(schedule, t, x_t)
    return predictions.convert(prediction, x_t, signal, spread, given=given, wanted=wanted)


def training_loss(
    model: Model,
    x0: Data,
    schedule: NoiseSchedule,
    *,
    generator: torch.Generator,
    kind: Kind = "epsilon",
) -> Float[Tensor, ""]:
    """E‖ε − ε_θ(x_t, t)‖², a mean over all elements: L_simple (DDPM, Eq. 14 and Algorithm 1).

    Each sample gets its own t, uniform in 0 … T − 1. With another `kind` the network is held
    against x_0 or v in place of ε.
    """
    t = torch.randint(schedule.steps, (len(x0),), generator=generator, device=generator.device)
    t, noise = t.to(x0.device), _noise_like(x0, generator)
    x_t = q_sample(x0, t, noise, schedule)
    target = convert(noise, x_t, t, schedule, given="epsilon", wanted=kind)
    return functional.mse_loss(model(x_t, t), target)


def posterior(
    x0: Data, x_t: Data, t: int, previous: int, schedule: NoiseSchedule
) -> tuple[Data, Float[Tensor, ""]]:
    """Mean and variance of q(x_previous | x_t, x_0): one step back, were x_0 known (DDPM, Eq. 7).

        μ̃ = √ᾱ_prev·β/(1 − ᾱ_t)·x_0 + √α·(1 − ᾱ_prev)/(1 − ᾱ_t)·x_t,   β̃ = (1 − ᾱ_prev)/(1 − ᾱ_t)·β

    α = 1 − β = ᾱ_t/ᾱ_prev, so that times may be skipped; `previous` = −1 is the clean data.
    """
    bar, bar_previous = _bar(schedule, t), _bar(schedule, previous)
    alpha = bar / bar_previous
    mean = (bar_previous.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - bar_previous) * x_t) / (
        1 - bar
    )
    return mean, (1 - bar_previous) / (1 - bar) * (1 - alpha)


def ddpm_sample(
    model: Model,
    x_T: Data,
    schedule: NoiseSchedule,
    *,
    generator: torch.Generator,
    timesteps: list[int] | None = None,
    kind: Kind = "epsilon",
    clip: float | None = None,
    variance: Literal["small", "large"] = "small",
) -> Iterator[Data]:
    """Ancestral sampling: yields x_T, then x after every step; the last is x_0 (DDPM, Algorithm 2).

    Args:
        x_T: pure noise, N(0, I).
        generator: of the noise added in every step but the last.
        timesteps: those to visit, noisiest first; all by default.
        kind: what the model predicts.
        clip: the guess of x_0 is kept within ±clip; 1 for pictures, None for no limit.
        variance: "small" is β̃ of Eq. 7, "large" is β (DDPM, section 3.2).
    """
    x = x_T
    yield x
    for t, previous in _pairs(schedule, timesteps):
        x0 = _guess(model, x, t, schedule, kind, clip)
        mean, small = posterior(x0, x, t, previous, schedule)
        large = 1 - _bar(schedule, t) / _bar(schedule, previous)
        x = mean
        if previous >= 0:
            x = mean + (small if variance == "small" else large).sqrt() * _noise_like(x, generator)
        yield x


def ddim_sample(
    model: Model,
    x_T: Data,
    schedule: NoiseSchedule,
    *,
    generator: torch.Generator | None = None,
    timesteps: list[int] | None = None,
    kind: Kind = "epsilon",
    clip: float | None = None,
    eta: float = 0.0,
) -> Iterator[Data]:
    """DDIM: yields x_T, then x after every step; the last is x_0 (Song et al. 2021, Eq. 12 and 16).

    Arguments as in `ddpm_sample`. `eta` scales the fresh noise: 0 draws none, so that x_T alone
    decides; 1 is DDPM with the small variance.

    Raises:
        ValueError: `eta` > 0 without a generator.
    """
    if eta > 0 and generator is None:
        raise ValueError(f"eta = {eta:g} draws noise: give a generator")
    x = x_T
    yield x
    for t, previous in _pairs(schedule, timesteps):
        x0 = _guess(model, x, t, schedule, kind, clip)
        epsilon = convert(x0, x, _times(x, t), schedule, given="x0", wanted="epsilon")
        bar_previous = _bar(schedule, previous)
        sigma = eta * posterior(x0, x, t, previous, schedule)[1].sqrt()
        x = bar_previous.sqrt() * x0 + (1 - bar_previous - sigma**2).sqrt() * epsilon
        if eta > 0 and previous >= 0:
            x = x + sigma * _noise_like(x, generator)
        yield x


def _coefficients(schedule: NoiseSchedule, t: Times, like: Data) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1 − ᾱ_t), shaped so that they multiply `like`."""
    if t.min() < 0 or t.max() >= schedule.steps:
        span = f"{int(t.min())} to {int(t.max())}"
        raise ValueError(f"t is {span}, but this schedule has 0 to {schedule.steps - 1}")
    bar = schedule.alphas_cumprod.to(like.device)[t].reshape(-1, *[1] * (like.ndim - 1))
    return bar.sqrt(), (1 - bar).sqrt()


def _bar(schedule: NoiseSchedule, t: int) -> Float[Tensor, ""]:
    return schedule.alphas_cumprod[t] if t >= 0 else torch.tensor(1.0)


def _pairs(schedule: NoiseSchedule, timesteps: list[int] | None) -> list[tuple[int, int]]:
    """Each time with the one that follows it on the way down, −1 after the last."""
    times = schedule.timesteps() if timesteps is None else timesteps
    return list(zip(times, [*times[1:], -1], strict=True))


@torch.no_grad()
def _guess(
    model: Model, x: Data, t: int, schedule: NoiseSchedule, kind: Kind, clip: float | None
) -> Data:
    times = _times(x, t)
    x0 = convert(model(x, times), x, times, schedule, given=kind, wanted="x0")
    return x0 if clip is None else x0.clamp(-clip, clip)


def _times(x: Data, t: int) -> Times:
    return torch.full((len(x),), t, device=x.device)


def _noise_like(x: Data, generator: torch.Generator) -> Data:
    """From the generator's own device, so that a seed means the same noise on every machine."""
    return torch.randn(x.shape, generator=generator, device=generator.device).to(x)
