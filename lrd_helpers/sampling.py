"""One picture being drawn from a caption: the steps of a diffusion model, one method each.

x = sampling.noise
for _, t in sampling.steps():
    x = sampling.step(sampling.scores(x, t, ["a red car"]), t, x)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lrd_helpers.attention import AttentionMaps, capture_attention
from lrd_helpers.layout import Layout
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.words import PromptTokens

with quiet_libraries():
    from diffusers import DDIMScheduler
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionPipeline


def ddim_like(scheduler: SchedulerMixin, timestep_spacing: str = "leading") -> DDIMScheduler:
    """DDIM with the noise schedule of another scheduler."""
    return DDIMScheduler.from_config(
        scheduler.config,
        timestep_spacing=timestep_spacing,
        clip_sample=False,
        set_alpha_to_one=False,
    )


@dataclass(frozen=True)
class Sampling:
    """What every method needs of the pipeline while it draws one picture."""

    pipe: StableDiffusionPipeline
    layout: Layout
    timesteps: Tensor
    noise: Float[Tensor, "1 channels height width"]
    """x_T, in the scheduler's units."""
    guidance_scale: float
    negative_prompt: str
    generator: torch.Generator | None
    embeddings: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        pipe: StableDiffusionPipeline,
        layout: Layout,
        *,
        size: tuple[int | None, int | None],
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str,
        generator: torch.Generator | None,
        latents: Float[Tensor, "1 channels height width"] | None,
    ) -> Sampling:
        """Set the scheduler's timesteps and draw x_T, as Stable Diffusion's pipeline does.

        Raises:
            ValueError: a size or a number of steps that cannot work, or a distilled model.
        """
        factor, own = pipe.vae_scale_factor, pipe.unet.config.sample_size
        own = (own, own) if isinstance(own, int) else own
        height, width = (one or cells * factor for one, cells in zip(size, own, strict=True))
        if height % factor or width % factor:
            near = tuple(max(1, round(side / factor)) * factor for side in (height, width))
            raise ValueError(
                f"height and width are {height} and {width}, but should be divisible by {factor}; "
                f"{near[0]} and {near[1]} would work"
            )
        most = pipe.scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= most:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, but should be between 1 and "
                f"{most}, the steps the model was trained with"
            )
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                f"guidance is distilled into this {type(pipe.unet).__name__} (it has a "
                "time_cond_proj_dim); use a model without"
            )
        device = pipe._execution_device
        timesteps, _ = retrieve_timesteps(pipe.scheduler, num_inference_steps, device)
        channels, dtype = pipe.unet.config.in_channels, pipe.unet.dtype
        # x_T ~ N(0, I), times the scheduler's init_noise_sigma
        noise = pipe.prepare_latents(1, channels, height, width, dtype, device, generator, latents)
        return cls(pipe, layout, timesteps, noise, guidance_scale, negative_prompt, generator)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def tokens(self) -> PromptTokens:
        return PromptTokens.encode(self.pipe.tokenizer, self._caption)

    @property
    def _caption(self) -> str:
        # Textual inversion spells one learnt word as several.
        return self.pipe.maybe_convert_prompt(self.layout.caption, self.pipe.tokenizer)

    def steps(self) -> Iterator[tuple[int, Tensor]]:
        """(0, T), (1, …), … with the pipeline's progress bar."""
        yield from enumerate(self.pipe.progress_bar(self.timesteps))

    def scores(
        self,
        x: Float[Tensor, "rows channels height width"],
        t: Tensor,
        prompts: Sequence[str],
        negatives: Sequence[str | None] = (None,),
    ) -> Float[Tensor, "rows channels height width"]:
        """s(x_t) + γ (s(x_t, y) − s(x_t)) for a prompt y a row; None is the negative prompt."""
        x = self.pipe.scheduler.scale_model_input(x, t)
        texts = [self._text(prompt) for prompt in prompts]
        if not self.guided:
            return self._unet(x, t, texts)
        negatives = [self.negative_prompt if one is None else one for one in negatives]
        texts = [self._text(negative) for negative in negatives] + texts
        unconditional, conditional = self._unet(torch.cat([x, x]), t, texts).chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def step(self, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """x_{t−1}."""
        extra = self.pipe.prepare_extra_step_kwargs(self.generator, 0.0)
        return self.pipe.scheduler.step(prediction, t, x, **extra, return_dict=False)[0]

    def descended(
        self,
        latents: Float[Tensor, "1 channels height width"],
        t: Tensor,
        loss: Callable[[AttentionMaps], Float[Tensor, ""]],
        rate: float,
        **watched: Any,
    ) -> tuple[float, Float[Tensor, "1 channels height width"]]:
        """L and x_t − rate · ∇L, for a loss on the caption's attention maps.

        The gradient is with respect to what the U-Net looks at, x_t = α x_0 + σ ε with
        α² + σ² = 1, so that a rate means the same with every scheduler.
        """
        scheduler, text = self.pipe.scheduler, self._text(self.layout.caption)
        with torch.enable_grad(), self.watched(guided=False, gradients=True, **watched) as maps:
            x = scheduler.scale_model_input(latents, t).detach().requires_grad_()
            self._unet(x, t, [text])
            value = loss(maps)
            (gradient,) = torch.autograd.grad(rate * value, x)
        unit = scheduler.scale_model_input(torch.ones_like(latents), t)
        return value.item(), latents - gradient / unit

    def watched(self, **options: Any) -> contextlib.AbstractContextManager[AttentionMaps]:
        """`capture_attention` with the caption."""
        return capture_attention(
            self.pipe.unet, self._caption, tokenizer=self.pipe.tokenizer, **options
        )

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers in [0, 1)."""
        device = None if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, device=device).to(self.noise.device)

    def flat_latents(self) -> Float[Tensor, "1 channels height width"]:
        """The latents of a picture of one random colour."""
        vae, factor = self.pipe.vae, self.pipe.vae_scale_factor
        size = [side * factor for side in self.noise.shape[-2:]]
        pixels = (2 * self.uniform(1, 3, 1, 1) - 1).expand(-1, -1, *size).to(vae.dtype)
        latents = vae.encode(pixels).latent_dist.sample(self.generator)
        return (latents * vae.config.scaling_factor).to(self.noise)

    def _text(self, text: str) -> Float[Tensor, "1 tokens features"]:
        if text not in self.embeddings:
            embedding = self.pipe.encode_prompt(text, self.noise.device, 1, False)[0]
            self.embeddings[text] = embedding.to(self.noise)
        return self.embeddings[text]

    def _unet(self, x: Tensor, t: Tensor, texts: Sequence[Tensor]) -> Tensor:
        return self.pipe.unet(x, t, encoder_hidden_states=torch.cat(texts), return_dict=False)[0]


MOST_NOISE = 100.0
"""The noise level that stands for pure noise; Stable Diffusion's own schedule ends at 14.6."""


def noise_level(scheduler: SchedulerMixin, t: Tensor) -> float:
    """σ/α of x_t = α x_0 + σ ε at t, from 0 to `MOST_NOISE`.

    t may lie between two training steps (Euler, Karras): interpolated, as those schedulers do.
    """
    least = 1 / (1 + MOST_NOISE**2)
    alphas_cumprod = scheduler.alphas_cumprod.double().cpu().clamp(min=least).numpy()
    levels = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    return float(np.interp(float(t), np.arange(len(levels)), levels))
