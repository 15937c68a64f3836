"""The steps of one drawing: the one place that knows how the schedulers of diffusers differ."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lrd_helpers.messages import excerpt
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.sampling.predictions import Kind, convert, shift_of_input

with quiet_libraries():
    from diffusers import DDIMScheduler, PNDMScheduler
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

MOST_NOISE = 100.0
"""The noise level that stands for pure noise; Stable Diffusion's own schedule ends at 14.6."""

KINDS: dict[str, Kind] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
"""A scheduler's `prediction_type` → what the network predicts."""

MEMORY = (
    "cur_model_output",
    "cur_sample",
    "derivatives",
    "ets",
    "last_sample",
    "model_outputs",
    "prev_derivative",
    "sample",
)
"""Where the schedulers of several steps keep earlier predictions and samples."""

FEW = 10
"""So few `original_inference_steps`, or fewer, of a scheduler of LCM's or TCD's kind say that its
model was distilled to just these, guidance built in. (Diffusers' default, 50, says nothing.)"""

Scheduler = TypeVar("Scheduler")


def is_a(scheduler: SchedulerMixin, name: str) -> bool:
    """Whether a scheduler is of this class; importing it would import SciPy's statistics, too."""
    return name in [kind.__name__ for kind in type(scheduler).__mro__]


Generators = torch.Generator | Sequence[torch.Generator] | None


def derived(kind: type[Scheduler], scheduler: SchedulerMixin, **changes: Any) -> Scheduler:
    """A scheduler of another kind with the noise schedule ᾱ of this one.

    `from_config` alone would drop what this one left at its own class's default, such as the β of
    `LCMScheduler()`, and take the other kind's defaults instead.
    """
    taken = inspect.signature(kind.__init__).parameters
    config = {name: value for name, value in scheduler.config.items() if name in taken}
    return kind.from_config(config, **changes)


def learned_steps(scheduler: SchedulerMixin) -> int | None:
    """The steps of a distilled model, which knows their timesteps alone; None for other models."""
    steps = scheduler.config.get("original_inference_steps")
    return steps if steps is not None and steps <= FEW else None


def ddim_like(scheduler: SchedulerMixin, timestep_spacing: str = "leading") -> DDIMScheduler:
    """DDIM with the noise schedule of another scheduler.

    Raises:
        ValueError: a distilled model's, which does not know DDIM's timesteps.
    """
    if learned := learned_steps(scheduler):
        raise ValueError(
            f"this model was distilled to {learned} steps and cannot be inverted or drawn with by "
            "other ones; use the model that it was distilled from"
        )
    return derived(
        DDIMScheduler,
        scheduler,
        timestep_spacing=timestep_spacing,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse schedulers that are none of Stable Diffusion's, in one sentence.

    Raises:
        ValueError: it has no noise schedule of α and σ, or predicts something else.
    """
    name = type(scheduler).__name__
    if not (hasattr(scheduler, "alphas_cumprod") or is_a(scheduler, "EDMEulerScheduler")):
        raise ValueError(
            f"{name} has no alphas_cumprod, so it is no scheduler of Stable Diffusion; use "
            "DDIMScheduler, EulerDiscreteScheduler or another one of pipe.scheduler.compatibles"
        )
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in KINDS:
        *first, last = map(repr, KINDS)
        raise ValueError(
            f"{name}'s prediction_type is {kind!r}, but should be {', '.join(first)} or {last}"
        )


def check_few_steps(scheduler: SchedulerMixin, steps: int | None) -> None:
    """Refuse too few steps for the Runge-Kutta steps that PNDM begins with.

    Raises:
        ValueError: it says how many there should be.
    """
    if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps:
        least = scheduler.pndm_order
        if steps is not None and steps < least:
            raise ValueError(
                f"PNDMScheduler begins with Runge-Kutta steps, for which it needs at least {least} "
                f"steps, not {steps}; PNDMScheduler.from_config(…, skip_prk_steps=True) needs none"
            )


def check_learned(
    scheduler: SchedulerMixin, steps: int | None, timesteps: Sequence[int] | None
) -> None:
    """Refuse steps that a distilled model has not learned.

    Raises:
        ValueError: it says how many it has.
    """
    learned = learned_steps(scheduler)
    if learned is None:
        return
    if steps is not None and steps > learned:
        raise ValueError(
            f"num_inference_steps is {steps}, but this model was distilled to {learned} steps; "
            f"{learned} would work"
        )
    if timesteps is not None:
        raise ValueError(
            f"timesteps: this model was distilled to {learned} timesteps and knows no others; give "
            f"num_inference_steps={learned}"
        )


def check_count(name: str, value: object, most: int | None = None) -> None:
    """Refuse what is no whole number from 1 on, or more than the model was trained for."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1 or (most is not None and value > most):
        wanted = "from 1 on" if most is None else f"between 1 and {most}"
        raise ValueError(f"{name} is {excerpt(value)}, but should be a whole number {wanted}")


def finite_number(name: str, value: object) -> float:
    """The number, which is neither NaN nor infinite.

    Raises:
        ValueError: it is, or it is no number.
    """
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise ValueError(f"{name} is {excerpt(value)}, but should be a finite number")


def check_generators(generator: object, pictures: int) -> None:
    """Refuse what is no generator, or a list with more or fewer than there are pictures."""
    several = isinstance(generator, Sequence) and not isinstance(generator, str)
    for each in generator if several else [generator]:
        if each is not None and not isinstance(each, torch.Generator):
            raise ValueError(
                f"generator is {excerpt(each)}, but should be a torch.Generator, such as "
                "torch.Generator().manual_seed(0)"
            )
    if several and len(generator) != pictures:
        raise ValueError(
            f"generator is a list of {len(generator)}, but there are {pictures} pictures; give one "
            "for each, or one for all"
        )


class Steps:
    """The timesteps of one drawing, noisiest first, and what happens at each.

    Latents are in the scheduler's units: x_t = α x_0 + σ ε for most, x_0 + (σ/α) ε for Euler's
    kind. `model_input` brings them to what the U-Net knows, for which α² + σ² = 1.

    Attributes:
        timesteps: as the scheduler has them. One of order 2 visits most of them twice.
        order: of the scheduler: so many timesteps make one whole step.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None,
        *,
        device: torch.device | str = "cpu",
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        generator: Generators = None,
    ) -> None:
        """Set the scheduler's timesteps, as Stable Diffusion's pipeline does.

        Args:
            scheduler: one of `compatibles` of Stable Diffusion's; it is used, not copied.
            num_inference_steps: T; not needed where `timesteps` or `sigmas` are given.
            device: of the timesteps.
            timesteps: these timesteps, for schedulers that take them.
            sigmas: these noise levels, for schedulers that take them.
            eta: η of DDIM, for schedulers that have it.
            generator: of the noise that some schedulers add; a list has one for each picture.
        """
        self.scheduler, self.generator = scheduler, generator
        self._renew = lambda generator: Steps(
            scheduler,
            num_inference_steps,
            device=device,
            timesteps=timesteps,
            sigmas=sigmas,
            eta=eta,
            generator=generator,
        )
        check_few_steps(scheduler, num_inference_steps)
        check_learned(scheduler, num_inference_steps, timesteps)
        self.timesteps, _ = retrieve_timesteps(
            scheduler, num_inference_steps, device, timesteps, sigmas
        )
        self.order = scheduler.order
        accepted = inspect.signature(scheduler.step).parameters
        eta = finite_number("eta", eta)
        self._eta = {"eta": eta} if "eta" in accepted else {}
        self._takes_generator = "generator" in accepted
        self._first_is_late = False

    def __len__(self) -> int:
        return len(self.timesteps)

    def renewed(self, generator: Generators) -> Steps:
        """The same steps once more, for another picture: the scheduler forgets the first."""
        return self._renew(generator)

    def until(self, end: int) -> Iterator[tuple[int, Tensor]]:
        """(0, t_0), (1, t_1), … up to step `end`, which is not among them."""
        yield from enumerate(self.timesteps[:end])

    def since(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """(start, t_start), … to the last one."""
        yield from enumerate(self.timesteps[start:], start=start)

    # -------------------------------------------------------------- units and noise levels

    def model_input(self, x: Tensor, t: Tensor) -> Tensor:
        """x_t as the U-Net knows it."""
        return self.scheduler.scale_model_input(x, t)

    def unit(self, t: Tensor) -> float:
        """What `model_input` multiplies latents with at t."""
        return float(self.model_input(torch.ones(1), t))

    def level(self, t: Tensor) -> float:
        """σ/α at t, from 0 to infinity: infinity is pure noise (zero terminal SNR)."""
        level = noise_level(self.scheduler, t)
        return level if level < 0.99 * MOST_NOISE else math.inf

    def coefficients(self, t: Tensor) -> tuple[float, float]:
        """α and σ of what the U-Net sees at t."""
        level = self.level(t)
        if math.isinf(level):
            return 0.0, 1.0
        data = self.scheduler.config.get("sigma_data", 1.0)  # EDM: the data's spread
        alpha = 1 / math.sqrt(data**2 + level**2)
        return alpha, level * alpha

    @property
    def kind(self) -> Kind:
        """What the network predicts."""
        return KINDS[self.scheduler.config.get("prediction_type", "epsilon")]

    def x0(self, seen: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """x̂_0 of a prediction at what the U-Net saw; NaN where ε says nothing of it (α = 0)."""
        alpha, sigma = self.coefficients(t)
        if is_a(self.scheduler, "EDMEulerScheduler"):  # its predictions are preconditioned
            return self.scheduler.precondition_outputs(seen / alpha, prediction, sigma / alpha)
        if alpha == 0 and self.kind == "epsilon":
            return torch.full_like(seen, math.nan)
        return convert(prediction, seen, alpha, sigma, given=self.kind, wanted="x0")

    def shift_of_input(self, t: Tensor) -> float | None:
        """See `predictions.shift_of_input`; None at pure noise, where nothing can be guided yet."""
        alpha, sigma = self.coefficients(t)
        return None if alpha == 0 else shift_of_input(self.kind, alpha, sigma)

    # -------------------------------------------------------------- one step

    def step(
        self,
        prediction: Float[Tensor, "rows channels height width"],
        t: Tensor,
        x: Float[Tensor, "rows channels height width"],
        pictures: Sequence[int] | None = None,
    ) -> Float[Tensor, "rows channels height width"]:
        """x_{t−1} = α̃ x_t + β̃ Φ_t + σ ε (LRDiff, Eq. 8a).

        Args:
            prediction: Φ_t.
            t: the timestep.
            x: x_t.
            pictures: which picture each row is a part of, where rows are not pictures.
        """
        arguments: dict[str, Any] = dict(self._eta)
        generator = self.generator
        if isinstance(generator, Sequence) and pictures is not None:
            generator = [generator[number] for number in pictures]
        if self._takes_generator:
            arguments["generator"] = generator
        elif generator is not None and is_a(self.scheduler, "DPMSolverSDEScheduler"):
            # Its Brownian motion has a seed in place of a generator, by default one of its own.
            several = isinstance(generator, Sequence)
            self.scheduler.noise_sampler_seed = (
                [each.initial_seed() for each in generator] if several else generator.initial_seed()
            )
        if is_a(self.scheduler, "LMSDiscreteScheduler"):
            # By default it would count on predictions that a late beginning has not made.
            arguments["order"] = min(4, len(self.scheduler.derivatives) + 1)
        if self._first_is_late and isinstance(self.scheduler, PNDMScheduler):
            self.scheduler.ets = [prediction] * 3  # the first one stands for those before it
        self._first_is_late = False
        return self.scheduler.step(prediction, t, x, **arguments, return_dict=False)[0]

    def merge_memory(self, merge: Callable[[Tensor], Tensor]) -> None:
        """Put together what the scheduler remembers, where rows become pictures.

        Args:
            merge: rows → pictures.
        """

        def merged(value: Any) -> Any:
            if isinstance(value, list):
                return [merged(each) for each in value]
            return merge(value) if isinstance(value, Tensor) else value

        for name in MEMORY:
            if hasattr(self.scheduler, name):
                setattr(self.scheduler, name, merged(getattr(self.scheduler, name)))
        if hasattr(self.scheduler, "noise_sampler"):
            self.scheduler.noise_sampler = None  # it has the rows' shape; the next step makes one

    # -------------------------------------------------------------- beginning late

    def late_start(self, share: float, noisier: float = 1.0) -> int:
        """The step that a drawing can begin with when about `share` of the steps are left out.

        At least one whole step is left out; `len(self)` where nothing remains.

        Args:
            share: of the steps, in [0, 1].
            noisier: begin so much earlier that σ/α is up to so many times what it is there. The
                mean of a part of a canvas of twice the width is known twice as well under the same
                σ/α, so twice of that hides as much (Hoogeboom et al. 2023: simple diffusion).
        """
        if share == 1:
            return len(self)
        start = max(1, round(share * len(self) / self.order)) * self.order
        if noisier > 1 and start < len(self):
            most = noisier * self.level(self.timesteps[start])
            earlier = range(self.order, start, self.order)
            start = next((i for i in earlier if self.level(self.timesteps[i]) <= most), start)
        if isinstance(self.scheduler, PNDMScheduler):
            # Its first steps are of another kind, and it cannot begin among them.
            of_its_kind = 1 if self.scheduler.config.skip_prk_steps else 12
            start = max(start, of_its_kind + 1)
        return min(start, len(self))

    def begin_at(
        self,
        start: int,
        clean: Float[Tensor, "pictures channels height width"],
        noise: Float[Tensor, "pictures channels height width"] | None,
    ) -> Float[Tensor, "pictures channels height width"]:
        """Let the first step be a later one; returns the clean latents with that step's noise.

        Without noise where `start` is `len(self)`: then no step is left.
        """
        if start == len(self):
            return clean
        if isinstance(self.scheduler, PNDMScheduler):
            self.scheduler.counter = start  # it counts its predictions
        elif hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
            self.scheduler._step_index = None  # it may have been asked for the first step's unit
        self._first_is_late = True
        return self.noised(clean, noise, start)

    def noised(
        self,
        clean: Float[Tensor, "pictures channels height width"],
        noise: Float[Tensor, "pictures channels height width"],
        i: int,
    ) -> Float[Tensor, "pictures channels height width"]:
        """Clean latents with the noise that step `i`, the next, begins with; at the end, none."""
        if i == len(self):
            return clean
        t = self.timesteps[i]
        alpha, sigma = self.coefficients(t)
        return (alpha * clean + sigma * noise) / self.unit(t)

    # -------------------------------------------------------------- sketches

    def sketch_steps(self, wanted: int) -> int:
        """How many steps `sketching` makes of those wanted: a distilled model has learned few."""
        return min(wanted, learned_steps(self.scheduler) or wanted)

    def sketching(self, num_inference_steps: int) -> Steps:
        """A few steps of DDIM with the same noise schedule.

        EDM's Euler and the scheduler of a distilled model sketch with themselves.
        """
        scheduler = self.scheduler
        num_inference_steps = self.sketch_steps(num_inference_steps)
        if is_a(scheduler, "EDMEulerScheduler") or learned_steps(scheduler):
            quick = type(scheduler).from_config(scheduler.config)
        else:
            # Only a model of zero terminal SNR has learned to begin at the very end.
            zero_snr = scheduler.config.get("rescale_betas_zero_snr")
            quick = ddim_like(scheduler, "trailing" if zero_snr else "leading")
        return Steps(quick, num_inference_steps, device=self.timesteps.device)

    def timestep_at(self, share: float) -> Tensor:
        """The timestep at this share of the noise schedule, 0 = clean, 1 = pure noise.

        Of a distilled model the nearest that it has learned.
        """
        if is_a(self.scheduler, "EDMEulerScheduler"):
            return self.timesteps[round((1 - share) * (len(self) - 1))]
        t = round(share * self.scheduler.config.num_train_timesteps)
        if learned_steps(self.scheduler):
            return min(self.timesteps, key=lambda learned: abs(int(learned) - t))
        return torch.tensor(t, device=self.timesteps.device)


def noise_level(scheduler: SchedulerMixin, t: Tensor) -> float:
    """σ/α of x_t = α x_0 + σ ε at t, from 0 to `MOST_NOISE`.

    t may lie between two training steps (Euler, Karras): interpolated, as those schedulers do.
    """
    if is_a(scheduler, "EDMEulerScheduler"):  # t = ln(σ) / 4 (Karras et al. 2022, Table 1)
        return min(math.exp(4 * float(t)), MOST_NOISE)
    least = 1 / (1 + MOST_NOISE**2)
    alphas_cumprod = scheduler.alphas_cumprod.double().cpu().clamp(min=least).numpy()
    levels = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    return float(np.interp(float(t), np.arange(len(levels)), levels))
