"""Layered rendering (LRDiff, Algorithm 1) as a diffusers pipeline."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from lrd_helpers.guidance import colour_of_prompt, constant_delta, vision_guidance
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.vocabulary import nearest_words, unknown_words

with quiet_libraries():
    from diffusers import StableDiffusionPipeline
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.utils import BaseOutput


@dataclass
class LayeredRenderingOutput(BaseOutput):
    """What `LayeredRenderingPipeline` returns.

    Attributes:
        images: the pictures, as `output_type` says; those of one layout stand together.
        nsfw_content_detected: the safety checker's answers, None without one.
        masks: for each picture the visible masks it was composed with, "layers+1 height width" at
            the latents' resolution; index 0 is the background, index i + 1 is `layers[i]`.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None
    masks: list[Tensor]


@dataclass(frozen=True)
class Regions:
    """What the U-Net is asked in one step: R regions of B pictures as one flat batch.

    Regions whose unconditional input is the same (same picture, ξ = 0, same negative prompt) share
    one of the U ≤ R unconditional rows.
    """

    picture: Int[Tensor, "regions"]
    """The picture that region i is a part of."""
    mask: Float[Tensor, "regions 1 height width"]
    """M^i: where its answer counts. In each picture the masks sum to 1 everywhere."""
    field: Float[Tensor, "regions channels height width"]
    """ξ^i."""
    guided: bool
    """Whether any ξ^i is not zero."""
    prompt: Float[Tensor, "regions tokens features"]
    """y^i, encoded."""
    negative: Float[Tensor, "rows tokens features"]
    """What stands for "no prompt", encoded."""
    asker: Int[Tensor, "rows"]
    """The region whose input an unconditional row is computed on."""
    row: Int[Tensor, "regions"]
    """The unconditional row that region i uses."""


class LayeredRenderingPipeline(StableDiffusionPipeline):
    """Layout to picture: a Stable Diffusion pipeline whose sampler is LRDiff's Algorithm 1.

    Everything but `__call__` is `StableDiffusionPipeline`'s: `from_pretrained`, `from_pipe`,
    `components`, `to`, offloading, slicing, LoRA. A saved folder is a plain Stable Diffusion folder
    (the method lives in the sampler, not in the weights), and any such folder loads as this class.
    """

    _callback_tensor_inputs = ["latents"]

    @torch.no_grad()
    def __call__(
        self,
        layouts: Layout | Sequence[Layout],
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        inside: float = 0.2,
        outside: float = 0.2,
        layered_fraction: float = 0.6,
        chunk_size: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "pictures channels height_ width_"] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LayeredRenderingOutput | tuple:
        """Draw each layout (LRDiff, Algorithm 1, with a constant δ for each layer).

        For the first `layered_fraction` of the steps the U-Net looks at x_t + ξ^i for each layer i
        and for the background (ξ = 0), and its answers are put together by the visible masks; then
        ordinary classifier-free guidance with the caption gives texture and coherence.

        δ comes from `Layer.colour`, else from the colour word of the layer's prompt; a layer
        without either has ξ = 0 and is composed by its mask alone. ξ is built on the layer's whole
        mask, also where others hide it: a half-hidden car is still a whole car behind.

        Args:
            layouts: one layout or several, drawn as one batch.
            height: of the pictures in pixels, divisible by 8; the model's own size by default.
            width: likewise.
            num_inference_steps: T, the denoising steps.
            guidance_scale: γ of classifier-free guidance, s + γ (s(y) − s); off where γ ≤ 1.
            negative_prompt: in place of the empty prompt; one for all or one for each layout. A
                layer's own `negative_prompt` comes first.
            num_images_per_prompt: pictures for each layout.
            inside: strength of +δ where the layer is (λ = `inside` = `outside` is the paper).
            outside: strength of −δ where it is not.
            layered_fraction: which part of the steps, in [0, 1], is layered (the paper's t0).
            chunk_size: at most so many samples go through the U-Net at once; None: all.
            eta: η of DDIM, for schedulers that have it.
            generator: where the noise comes from; a list has one for each picture.
            latents: the initial noise ~ N(0, I), instead of drawing it.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False gives a tuple (images, nsfw_content_detected, masks).
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": …}) after each step;
                it may return other latents, set `pipe._interrupt`, change `pipe._guidance_scale`.
            callback_on_step_end_tensor_inputs: which tensors the callback gets; only "latents".

        Raises:
            ValueError: an argument that cannot work, before the first U-Net call.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        layouts = [layouts] if isinstance(layouts, Layout) else list(layouts)
        height, width = height or self._default_size(0), width or self._default_size(1)
        negatives = self._check(
            layouts,
            height,
            width,
            num_inference_steps,
            negative_prompt,
            num_images_per_prompt,
            layered_fraction,
            chunk_size,
            latents,
            callback_on_step_end_tensor_inputs,
        )
        self._warn_of_unknown_words(layouts)
        # What StableDiffusionPipeline keeps while it runs; callbacks read and change it.
        self._guidance_scale, self._guidance_rescale = guidance_scale, 0.0
        self._clip_skip, self._cross_attention_kwargs, self._interrupt = None, None, False
        device = self._execution_device

        # One entry a picture: layout 0, layout 0, …, layout 1, … as StableDiffusionPipeline does.
        layouts = [layout for layout in layouts for _ in range(num_images_per_prompt)]
        negatives = [negative for negative in negatives for _ in range(num_images_per_prompt)]

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        layered_steps = round(layered_fraction * len(timesteps))

        # x_T ~ N(0, I), times the scheduler's init_noise_sigma
        latents = self.prepare_latents(
            len(layouts),
            self.unet.config.in_channels,
            height,
            width,
            self.unet.dtype,
            device,
            generator,
            latents,
        )
        size = latents.shape[-2:]
        masks = [layout.masks(*size) for layout in layouts]
        plain = self._captions(layouts, negatives, latents)
        layered = plain
        if layered_steps:
            layered = self._layers(layouts, negatives, masks, latents, inside, outside)

        step_arguments = self.prepare_extra_step_kwargs(generator, eta)
        warm_up = len(timesteps) - num_inference_steps * self.scheduler.order
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                # t = T … t0: layered denoising; t = t0 − 1 … 1: general denoising
                regions = layered if i < layered_steps else plain
                prediction = self._predict(latents, t, regions, chunk_size)
                # x_{t−1} = α̃ x_t + β̃ Φ_t + σ ε                                  (Eq. 8a)
                latents = self.scheduler.step(
                    prediction, t, latents, **step_arguments, return_dict=False
                )[0]
                if callback_on_step_end is not None:
                    outputs = callback_on_step_end(self, i, t, {"latents": latents})
                    latents = (outputs or {}).get("latents", latents)
                # A scheduler of order 2 has two timesteps for one step.
                if i == len(timesteps) - 1 or (
                    i + 1 > warm_up and (i + 1) % self.scheduler.order == 0
                ):
                    progress_bar.update()

        images, nsfw = latents, None
        if output_type != "latent":
            images = self.vae.decode(
                latents / self.vae.config.scaling_factor, return_dict=False, generator=generator
            )[0]
            images, nsfw = self.run_safety_checker(images, device, self.unet.dtype)
        shown = [True] * len(layouts) if nsfw is None else [not hit for hit in nsfw]
        images = self.image_processor.postprocess(
            images, output_type=output_type, do_denormalize=shown
        )
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, nsfw, masks
        return LayeredRenderingOutput(images=images, nsfw_content_detected=nsfw, masks=masks)

    # -------------------------------------------------------------- one step

    def _predict(
        self,
        latents: Float[Tensor, "pictures channels height width"],
        t: Tensor,
        regions: Regions,
        chunk_size: int | None,
    ) -> Float[Tensor, "pictures channels height width"]:
        """Φ_t = Σ_i M^i ⊙ [s(x_t + ξ^i) + γ (s(x_t + ξ^i, y^i) − s(x_t + ξ^i))]  (LRDiff, Eq. 8b).

        Ordinary classifier-free guidance is the case of one region with M = 1 and ξ = 0.
        """
        ratio = self._noise_to_signal(t) if regions.guided else 0.0
        # Where there is no signal at all (α = 0) there is nothing to guide yet.
        guided = regions.guided and math.isfinite(ratio)

        # ξ is added after scale_model_input: that is what brings the latents of every scheduler to
        # the x_t = α x_0 + σ ε with α² + σ² = 1 that the U-Net knows, so ξ is as strong with Euler,
        # whose latents are x_0 + (σ/α) ε, as with DDIM. The scheduler steps from x_t without ξ.
        x = self.scheduler.scale_model_input(latents, t)[regions.picture]
        if guided:
            x = x + regions.field
        if self.do_classifier_free_guidance:
            both = torch.cat([x[regions.asker], x])
            prompts = torch.cat([regions.negative, regions.prompt])
            rows = len(regions.asker)
            score = self._unet_in_chunks(both, t, prompts, chunk_size)
            unconditional, conditional = score[:rows][regions.row], score[rows:]
            score = unconditional + self.guidance_scale * (conditional - unconditional)
        else:
            score = self._unet_in_chunks(x, t, regions.prompt, chunk_size)

        if guided:
            score = score + self._as_seen_from_x_t(ratio) * regions.field
        # The masks partition the canvas: each cell gets one summand, in any order.
        return torch.zeros_like(latents).index_add(0, regions.picture, regions.mask * score)

    def _unet_in_chunks(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Tensor,
        prompts: Float[Tensor, "batch tokens features"],
        chunk_size: int | None,
    ) -> Float[Tensor, "batch channels height width"]:
        chunk_size = chunk_size or len(x)
        chunks = zip(x.split(chunk_size), prompts.split(chunk_size), strict=True)
        return torch.cat(
            [self.unet(x, t, encoder_hidden_states=y, return_dict=False)[0] for x, y in chunks]
        )

    def _as_seen_from_x_t(self, ratio: float) -> float:
        """The c of s + c ξ with which an answer to x_t + ξ means the same noise ε̂ at x_t.

        Algorithm 1 is written for ε̂. From x = α x_0 + σ ε and v = α ε − σ x_0 follow
        v = (ε − σ x) / α and x_0 = (x − σ ε) / α: the same ε̂ seen from x instead of x + ξ is
        v + (σ/α) ξ, or x_0 − ξ/α. `ratio` is σ/α.
        """
        return {
            "epsilon": 0.0,
            "v_prediction": ratio,
            "sample": -math.sqrt(1 + ratio**2),
        }[self.scheduler.config.get("prediction_type", "epsilon")]

    def _noise_to_signal(self, t: Tensor) -> float:
        """σ/α at t; inf at (nearly) pure noise, where a schedule is rescaled to zero terminal SNR.

        t may lie between two training steps (Euler, Karras): interpolated, as those schedulers do.
        """
        alphas_cumprod = self.scheduler.alphas_cumprod.double().cpu().numpy()
        alpha_squared = np.clip(alphas_cumprod, 1e-12, 1.0)
        ratios = np.sqrt((1 - alpha_squared) / alpha_squared)
        ratio = float(np.interp(float(t), np.arange(len(ratios)), ratios))
        # Stable Diffusion's own schedule ends at 14.6.
        return ratio if ratio < 100 else math.inf

    # -------------------------------------------------------------- what is asked

    def _captions(self, layouts: list[Layout], negatives: list[str], latents: Tensor) -> Regions:
        """General denoising: each picture is one region with its caption."""
        ones = torch.ones(latents.shape[-2:])
        entries = [
            (number, layout.caption, negative, ones, None)
            for number, (layout, negative) in enumerate(zip(layouts, negatives, strict=True))
        ]
        return self._regions(entries, latents)

    def _layers(
        self,
        layouts: list[Layout],
        negatives: list[str],
        masks: list[Tensor],
        latents: Tensor,
        inside: float,
        outside: float,
    ) -> Regions:
        """Layered denoising: in each picture the background (ξ = 0) and every layer in sight."""
        deltas: dict[str, Tensor] = {}  # colour → δ, each computed once
        entries = []
        for number, layout in enumerate(layouts):
            background = layout.background or layout.caption
            regions = [(background, negatives[number], None)]
            for layer in layout.layers:
                negative = layer.negative_prompt
                negative = negatives[number] if negative is None else negative
                field = self._field(layer, latents, deltas, inside, outside)
                regions.append((layer.prompt, negative, field))
            for (prompt, negative, field), mask in zip(regions, masks[number], strict=True):
                if mask.any():  # what is hidden completely costs nothing
                    entries.append((number, prompt, negative, mask, field))
        return self._regions(entries, latents)

    def _field(
        self,
        layer: Layer,
        latents: Tensor,
        deltas: dict[str, Tensor],
        inside: float,
        outside: float,
    ) -> Float[Tensor, "channels height width"] | None:
        """ξ of one layer, or None where it is zero."""
        colour = layer.colour or colour_of_prompt(layer.prompt)
        inside, outside = inside * layer.strength, outside * layer.strength
        if colour is None or inside == outside == 0:
            return None
        if colour not in deltas:
            deltas[colour] = constant_delta(self.vae, colour, device=latents.device)
        mask = layer.mask(*latents.shape[-2:]).float().to(latents.device)
        return vision_guidance(deltas[colour], mask, inside, outside)

    def _regions(
        self, entries: list[tuple[int, str, str, Tensor, Tensor | None]], latents: Tensor
    ) -> Regions:
        """Entries (picture, prompt, negative prompt, mask, ξ or None for zero) as one batch."""
        device, dtype = latents.device, latents.dtype
        encoded: dict[str, Tensor] = {}

        def encode(text: str) -> Tensor:
            # Each text alone: a picture must not depend on what else is in the batch.
            if text not in encoded:
                encoded[text] = self.encode_prompt(text, device, 1, False)[0][0]
            return encoded[text]

        zero = torch.zeros(latents.shape[1:])
        rows: dict[tuple, int] = {}  # (picture, negative prompt, ξ) → unconditional row
        asker, row = [], []
        for number, (picture, _, negative, _, field) in enumerate(entries):
            key = (picture, negative, None if field is None else number)
            if key not in rows:
                rows[key] = len(asker)
                asker.append(number)
            row.append(rows[key])
        fields = [zero.to(device) if field is None else field for *_, field in entries]
        return Regions(
            picture=torch.tensor([entry[0] for entry in entries], device=device),
            mask=torch.stack([entry[3] for entry in entries])[:, None].to(device, dtype),
            field=torch.stack(fields).to(dtype),
            guided=any(entry[4] is not None for entry in entries),
            prompt=torch.stack([encode(entry[1]) for entry in entries]).to(dtype),
            negative=torch.stack([encode(entries[number][2]) for number in asker]).to(dtype),
            asker=torch.tensor(asker, device=device),
            row=torch.tensor(row, device=device),
        )

    # -------------------------------------------------------------- before the first U-Net call

    def _default_size(self, axis: int) -> int:
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else size[axis]) * self.vae_scale_factor

    def _check(
        self,
        layouts: list[Layout],
        height: int,
        width: int,
        num_inference_steps: int,
        negative_prompt: str | Sequence[str] | None,
        num_images_per_prompt: int,
        layered_fraction: float,
        chunk_size: int | None,
        latents: Tensor | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> list[str]:
        """Raise a ValueError for what cannot work; return one negative prompt for each layout."""
        if not layouts or not all(isinstance(layout, Layout) for layout in layouts):
            kinds = sorted({type(layout).__name__ for layout in layouts}) or ["nothing"]
            raise ValueError(f"layouts is {', '.join(kinds)}, but should be a Layout or several")
        factor = self.vae_scale_factor
        if height % factor or width % factor or min(height, width) < factor:
            near = tuple(max(factor, round(side / factor) * factor) for side in (height, width))
            raise ValueError(
                f"height and width are {height} and {width}, but should be divisible by {factor}; "
                f"{near[0]} and {near[1]} would work"
            )
        if not 1 <= num_inference_steps <= self.scheduler.config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, but should be between 1 and "
                f"{self.scheduler.config.num_train_timesteps}, the steps the model was trained with"
            )
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}, but should be ≥ 1")
        if not 0 <= layered_fraction <= 1:
            raise ValueError(
                f"layered_fraction is {layered_fraction}, but should be between 0 (no layered "
                "step) and 1 (all steps)"
            )
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}, but should be ≥ 1, or None for all")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(sorted(unknown))}, but only "
                f"{', '.join(self._callback_tensor_inputs)} can be given to a callback"
            )
        if latents is not None:
            shape = (
                len(layouts) * num_images_per_prompt,
                self.unet.config.in_channels,
                height // factor,
                width // factor,
            )
            if tuple(latents.shape) != shape:
                raise ValueError(
                    f"latents has shape {tuple(latents.shape)}, but should have {shape}"
                )
            if not latents.isfinite().all():
                raise ValueError("latents has values that are not finite (NaN or infinite)")
        if negative_prompt is None or isinstance(negative_prompt, str):
            return [negative_prompt or ""] * len(layouts)
        if len(negative_prompt) != len(layouts):
            raise ValueError(
                f"negative_prompt has {len(negative_prompt)} entries for {len(layouts)} layouts; "
                "give one text for all, or one for each layout"
            )
        return list(negative_prompt)

    def _warn_of_unknown_words(self, layouts: list[Layout]) -> None:
        for layout in layouts:
            named = [("caption", layout.caption), ("background", layout.background)]
            for number, layer in enumerate(layout.layers, start=1):
                named.append((f"layer {number} {layer.prompt!r}", layer.prompt))
            for name, text in named:
                for word in unknown_words(self.tokenizer, text):
                    near = ", ".join(nearest_words(self.tokenizer, word))
                    warnings.warn(
                        f"{name}: the model does not know the word {word!r}"
                        + (f"; the nearest it knows: {near}" if near else ""),
                        stacklevel=3,
                    )

    def to_json_string(self) -> str:
        """The text of `model_index.json`: a plain Stable Diffusion pipeline's.

        So a folder that `save_pretrained` wrote opens with this class, with
        `StableDiffusionPipeline` and with `DiffusionPipeline`, with no code of ours.
        """
        index = json.loads(super().to_json_string())
        index["_class_name"] = StableDiffusionPipeline.__name__
        return json.dumps(index, indent=2, sort_keys=True) + "\n"
