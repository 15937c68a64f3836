"""Layered rendering (LRDiff, Algorithm 1) as a diffusers pipeline."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lrd_helpers.attention import capture_attention
from lrd_helpers.guidance import constant_delta, decoded_delta, dynamic_delta, vision_guidance
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.method import Method, method_named
from lrd_helpers.placement import object_pixels, pasted
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.regions import Region, Regions, batched, parts_of_steps, stacked
from lrd_helpers.sampling import MOST_NOISE, ddim_like, noise_level
from lrd_helpers.words import (
    PromptTokens,
    WordError,
    colour_of_prompt,
    nearest_words,
    object_of_prompt,
    unknown_words,
)

with quiet_libraries():
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        rescale_noise_cfg,
        retrieve_timesteps,
    )
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
        retrieve_latents,
    )
    from diffusers.utils import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor

RELEVANCE_NOISE = 0.4
"""Where, as a share of the training timesteps, the relevance of a layer's prompt is asked for."""

RELEVANCE_SAMPLES = 2
"""How many noises that is the mean of."""

FULL = (0, 0, 1, 1)  # the box of the whole canvas

EARLY_REPEAT = 0.01
"""The share of ξ that an early repeat adds once more (the authors' script: "about 1 %")."""


@dataclass(frozen=True)
class LayerTrace:
    """What the layers of one picture did; index 0 is the background, i + 1 is `layers[i]`.

    Attributes:
        guidance: ξ^i, in units of x_T ~ N(0, I); 0 for the background.
        x0: at each layered step the clean latents each layer's prediction speaks of,
            x̂_0 = (x_t − σ ε̂^i) / α; NaN where a layer took no part. With fuse="collage" the steps
            are those of the sketches.
        collage: with fuse="collage" the clean latents that the last steps go on from, else None.
    """

    guidance: Float[Tensor, "layers+1 channels height width"]
    x0: Float[Tensor, "steps layers+1 channels height width"]
    collage: Float[Tensor, "channels height width"] | None = None


@dataclass
class LayeredRenderingOutput(BaseOutput):
    """What `LayeredRenderingPipeline` returns.

    Attributes:
        images: the pictures, as `output_type` says; those of one layout stand together.
        nsfw_content_detected: the safety checker's answers, None without one.
        masks: for each picture the visible masks it was composed with, "layers+1 height width" at
            the latents' resolution; index 0 is the background, index i + 1 is `layers[i]`.
        layers: for each picture what its layers did, where `output_layers` asked for it.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None
    masks: list[Tensor]
    layers: list[LayerTrace] | None = None


class LayeredRenderingPipeline(StableDiffusionPipeline):
    """Layout to picture: a Stable Diffusion pipeline whose sampler is LRDiff's Algorithm 1.

    Everything but `__call__` is `StableDiffusionPipeline`'s: `from_pretrained`, `from_pipe`,
    `components`, `to`, offloading, slicing, LoRA. A saved folder is a plain Stable Diffusion folder
    (the method lives in the sampler, not in the weights), and any such folder loads as this class.
    As in diffusers, `from_pipe` casts the models that both pipelines share to float32 unless told
    otherwise: `from_pipe(pipe, torch_dtype=torch.float16)`.

    Best with DDIM. PNDM, the scheduler in many Stable Diffusion folders, extrapolates from four
    predictions, and here these change with the prompts: on storybook it obeys much less.
    """

    _callback_tensor_inputs = ["latents"]

    prompts_of_rows: list[str | None] | None = None
    """The prompt of each row of the batch the U-Net is computing, None for an unconditional one:
    what `capture_attention` goes by. None while nothing is drawn."""

    pictures_of_rows: list[int] | None = None
    """The picture that each of these rows is a part of."""

    @torch.no_grad()
    def __call__(
        self,
        layouts: Layout | Sequence[Layout],
        *,
        method: str | Method = "default",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        inside: float | None = None,
        outside: float | None = None,
        layered_fraction: float | None = None,
        chunk_size: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "pictures channels height_ width_"] | None = None,
        canvas: Image.Image | Sequence[Image.Image] | None = None,
        prompt_embeds: Mapping[str, Float[Tensor, "tokens features"]] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        output_layers: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LayeredRenderingOutput | tuple:
        """Draw each layout (LRDiff, Algorithm 1).

        For the first part of the steps the U-Net looks at x_t + ξ^i for each layer i and for the
        background (ξ = 0), and its answers are put together by the visible masks; then ordinary
        classifier-free guidance with the caption gives texture and coherence. By default, in place
        of the first part, each layer is sketched alone, its object is moved into place, and the
        collage is noised; each such choice has a name in `Method`.

        A constant δ comes from `Layer.colour`, else from the colour word of the layer's prompt; a
        layer without either has ξ = 0 and is composed by its mask alone. ξ is built on the layer's
        whole shape, also where others hide it: a half-hidden car is still a whole car behind.

        Args:
            layouts: one layout or several, drawn as one batch.
            method: "default", "paper", "authors" or "unofficial" (`lrd_helpers.method.METHODS`), or
                any `Method`, such as `dataclasses.replace(METHODS["paper"], fuse="once")`.
            height: of the pictures in pixels, divisible by 8; the model's own size by default.
            width: likewise.
            num_inference_steps: T, the denoising steps.
            timesteps: these timesteps, largest first, for schedulers that take them.
            sigmas: these noise levels, largest first, for schedulers that take them.
            guidance_scale: γ of classifier-free guidance, s + γ (s(y) − s); off where γ ≤ 1.
            guidance_rescale: φ of Lin et al. 2024, Eq. 16; 0 = off.
            negative_prompt: in place of the empty prompt; one for all or one for each layout. A
                layer's own `negative_prompt` comes first.
            num_images_per_prompt: pictures for each layout.
            inside: in place of the method's strength of +δ where the layer is.
            outside: in place of the method's strength of −δ where it is not.
            layered_fraction: in place of the method's part of the steps that is layered.
            chunk_size: at most so many samples go through the U-Net at once; None: all. Through the
                autoencoder never more than there are pictures.
            eta: η of DDIM, for schedulers that have it.
            generator: where the noise comes from; a list has one for each picture.
            latents: the initial noise ~ N(0, I), instead of drawing it.
            canvas: with fuse="collage" the picture that objects are pasted onto, instead of the
                background's sketch; of the size that is drawn, one for each layout, whose
                `background` says what it shows. The last steps change all of it, unless a callback
                puts back what should stay: see `lrd_helpers.editing`.
            prompt_embeds: texts that are not to be encoded, with their embeddings: every text that
                the U-Net is asked, so with `background_in_prompts` "a red car at night", not
                "a red car".
            cross_attention_kwargs: for the attention processors, such as LoRA's {"scale": 0.5}.
            output_type: "pil", "np", "pt" or "latent".
            output_layers: also return each layer's ξ and predictions.
            return_dict: False gives a tuple (images, nsfw_content_detected, masks, layers).
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": …}) after each step
                (by default the first is number 17 of 25: sketches are not its business); it may
                return other latents, set `pipe._interrupt`, change `pipe._guidance_scale`.
                While each layer runs alone it sees them put together; what it returns is then the
                picture that every layer goes on from.
            callback_on_step_end_tensor_inputs: which tensors the callback gets; only "latents".

        Raises:
            ValueError: an argument that cannot work, before the first U-Net call.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        layouts = [layouts] if isinstance(layouts, Layout) else list(layouts)
        height, width = height or self._default_size(0), width or self._default_size(1)
        changes = {"inside": inside, "outside": outside, "layered_fraction": layered_fraction}
        changes = {name: value for name, value in changes.items() if value is not None}
        method = method_named(method, **changes)
        self._check_layouts(layouts, method, height, width)
        self._check_sampling(
            layouts,
            method,
            height,
            width,
            num_inference_steps if timesteps is None and sigmas is None else 1,
            num_images_per_prompt,
            chunk_size,
            latents,
            callback_on_step_end_tensor_inputs,
        )
        if canvas is not None and not isinstance(canvas, (list, tuple)):
            canvas = [canvas]
        self._check_canvas(canvas, layouts, height, width)
        negatives = _one_each(negative_prompt, layouts)
        self._check_texts(layouts, prompt_embeds or {})
        # What StableDiffusionPipeline keeps while it runs; callbacks read and change it.
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._clip_skip, self._interrupt = None, False
        device = self._execution_device

        # One entry a picture: layout 0, layout 0, …, layout 1, … as StableDiffusionPipeline does.
        layouts = [layout for layout in layouts for _ in range(num_images_per_prompt)]
        negatives = [negative for negative in negatives for _ in range(num_images_per_prompt)]
        if canvas is not None:
            canvas = [
                image.convert("RGB") for image in canvas for _ in range(num_images_per_prompt)
            ]
            canvas = self.image_processor.preprocess(canvas) / 2 + 0.5

        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )
        self._num_timesteps = len(timesteps)
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
        try:
            latents, traces = self._sample(
                layouts,
                negatives,
                method,
                timesteps,
                num_inference_steps,
                latents,
                canvas,
                _Texts(self, dict(prompt_embeds or {}), latents),
                chunk_size,
                generator,
                self.prepare_extra_step_kwargs(generator, eta),
                callback_on_step_end,
                output_layers,
            )
            images, nsfw = latents, None
            if output_type != "latent":
                images = self.vae.decode(
                    latents / self.vae.config.scaling_factor, return_dict=False, generator=generator
                )[0]
                images, nsfw = self.run_safety_checker(images, device, self.unet.dtype)
        finally:
            # Also where a callback raised: nothing stays behind.
            self.prompts_of_rows = self.pictures_of_rows = None
            self.maybe_free_model_hooks()
        shown = [True] * len(layouts) if nsfw is None else [not hit for hit in nsfw]
        images = self.image_processor.postprocess(
            images, output_type=output_type, do_denormalize=shown
        )
        masks = [layout.masks(*latents.shape[-2:], overlap=method.overlap) for layout in layouts]
        if not return_dict:
            return images, nsfw, masks, traces
        return LayeredRenderingOutput(
            images=images, nsfw_content_detected=nsfw, masks=masks, layers=traces
        )

    # -------------------------------------------------------------- Algorithm 1

    def _sample(
        self,
        layouts: list[Layout],
        negatives: list[str],
        method: Method,
        timesteps: Tensor,
        num_inference_steps: int,
        latents: Float[Tensor, "pictures channels height width"],
        canvas: Float[Tensor, "pictures 3 _height _width"] | None,
        texts: _Texts,
        chunk_size: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        step_arguments: dict[str, Any],
        callback_on_step_end: Callable[..., dict[str, Any]] | None,
        output_layers: bool,
    ) -> tuple[Tensor, list[LayerTrace] | None]:
        method, layered_steps, alone_steps = self._phases(layouts, method, len(timesteps))
        pasting = method.fuse == "collage" and layered_steps > 0
        if pasting and type(self.scheduler).__name__ == "LMSDiscreteScheduler":
            raise ValueError(
                "LMSDiscreteScheduler counts on predictions of all earlier steps, and with fuse="
                "'collage' these are not made; use EulerDiscreteScheduler, or a method with "
                "fuse='steps'"
            )
        if canvas is not None and not pasting:
            raise ValueError(
                "canvas: nothing would be pasted onto it; that takes fuse='collage', a "
                "layered_fraction above 0 and a layer that does not fill the picture"
            )
        pictures, size = len(layouts), latents.shape[-2:]
        plan = parts_of_steps(layouts, negatives, method, len(timesteps), layered_steps, size)
        looked_at = _looked_at(layouts, method) if layered_steps else []
        texts.check(plan, [layer.prompt for _, layer in looked_at])
        fields: list[list[Tensor | None]] = [[None] * len(layout.layers) for layout in layouts]
        if layered_steps:
            fields = self._fields(layouts, method, latents, timesteps[0], texts, chunk_size)
        # All at once, so that an offloaded text encoder is fetched once and not between two steps.
        parts = _encoded(plan, fields, method, layered_steps, alone_steps, texts, latents)
        first = parts[0]
        if method.guide == "noise" and layered_steps:
            fields_of_rows = stacked(
                [fields[e.picture][e.layer - 1] if e.layer else None for e in first.entries],
                latents,
            )
            # In the latents' own units: Euler's are σ times larger than those the U-Net sees.
            rows = latents[first.picture] + fields_of_rows / self._unit(latents, timesteps[0])
            latents = rows if alone_steps else first.composed(rows, pictures)
        elif alone_steps:
            latents = latents[first.picture]
        own_arguments = step_arguments
        if alone_steps and isinstance(step_arguments.get("generator"), list):
            several = [step_arguments["generator"][e.picture] for e in first.entries]
            own_arguments = step_arguments | {"generator": several}

        predictions: list[tuple[Regions, Tensor]] = []
        collages = [None] * pictures
        warm_up = len(timesteps) - num_inference_steps * self.scheduler.order
        begin, total = 0, num_inference_steps
        if pasting:
            begin, order = layered_steps, self.scheduler.order
            total = method.sketch_steps + sum(
                i == len(timesteps) - 1 or (i + 1 > warm_up and (i + 1) % order == 0)
                for i in range(begin, len(timesteps))
            )
        with self.progress_bar(total=total) as progress_bar:
            if begin:
                noise = self.scheduler.scale_model_input(latents, timesteps[0])
                sketches, predictions = self._sketches(
                    noise, first, method, chunk_size, progress_bar
                )
                if self.interrupt:
                    backgrounds = [n for n, one in enumerate(first.entries) if not one.layer]
                    latents = sketches[backgrounds]
                else:
                    relevance = self._relevance(sketches, first, pictures, chunk_size, generator)
                    collages = self._collages(
                        layouts, method, sketches, relevance, first, canvas, chunk_size
                    )
                    self._begin_at(begin)
                    latents = self._noised(collages, timesteps[begin:], generator)
            for i, t in enumerate(timesteps[begin:], start=begin):
                if self.interrupt:
                    continue
                # t = T … t0: layered denoising; t = t0 − 1 … 1: general denoising
                regions = parts[i]
                by_itself = i < alone_steps
                # ξ is added after scale_model_input: that is what brings the latents of every
                # scheduler to the x_t = α x_0 + σ ε with α² + σ² = 1 that the U-Net knows, so ξ is
                # as strong with Euler, whose latents are x_0 + (σ/α) ε, as with DDIM. The scheduler
                # steps from x_t without ξ.
                x = self.scheduler.scale_model_input(latents, t)
                x = x if by_itself else x[regions.picture]
                scores = self._scores(x, t, regions, chunk_size)
                if output_layers and i < layered_steps:
                    predictions.append((regions, self._x0(x, scores, t)))
                # Φ_t = Σ_i M^i ⊙ […]                                             (Eq. 8b)
                prediction = scores if by_itself else regions.composed(scores, pictures)
                if begin and i == begin:
                    self._restart_pndm(prediction)
                # x_{t−1} = α̃ x_t + β̃ Φ_t + σ ε                                  (Eq. 8a)
                arguments = own_arguments if by_itself else step_arguments
                latents = self.scheduler.step(
                    prediction, t, latents, **arguments, return_dict=False
                )[0]
                if method.guide == "noise" and i < min(
                    method.early_repeats, layered_steps, len(timesteps) - 1
                ):
                    again = EARLY_REPEAT * fields_of_rows / self._unit(latents, timesteps[i + 1])
                    latents = latents + (again if by_itself else first.composed(again, pictures))
                if by_itself and i == alone_steps - 1:
                    by_itself = False
                    self._compose_memory(regions, latents.shape, pictures)
                    latents = regions.composed(latents, pictures)
                if callback_on_step_end is not None:
                    # A callback sees pictures, also while each layer still runs alone.
                    whole = regions.composed(latents, pictures) if by_itself else latents
                    outputs = callback_on_step_end(self, i, t, {"latents": whole}) or {}
                    changed = outputs.get("latents", whole)
                    if changed is not whole:
                        latents = changed[regions.picture] if by_itself else changed
                # A scheduler of order 2 has two timesteps for one step.
                if i == len(timesteps) - 1 or (
                    i + 1 > warm_up and (i + 1) % self.scheduler.order == 0
                ):
                    progress_bar.update()
        if len(latents) != pictures:  # interrupted before the layers were put together
            latents = regions.composed(latents, pictures)
        traces = None
        if output_layers:
            traces = _traces(layouts, fields, predictions, collages, latents)
        return latents, traces

    def _phases(self, layouts: list[Layout], method: Method, steps: int) -> tuple[Method, int, int]:
        """The method, and how many steps are layered, and in how many each layer is alone."""
        if method.fuse == "collage" and not any(
            layer.bounding_box != FULL for layout in layouts for layer in layout.layers
        ):
            method = replace(method, fuse="steps")  # what fills the canvas is in its place
        layered_steps = round(method.layered_fraction * steps)
        if method.fuse == "collage" and layered_steps:
            order = self.scheduler.order
            layered_steps = max(1, round(method.layered_fraction * steps / order)) * order
            if method.layered_fraction == 1:
                layered_steps = steps  # also where that is half a step
            if isinstance(self.scheduler, PNDMScheduler):
                # Its first steps are of another kind, and it cannot begin among them.
                own = 1 if self.scheduler.config.skip_prk_steps else self.scheduler.pndm_order * 3
                layered_steps = max(layered_steps, own + 1)
            layered_steps = min(layered_steps, steps)
        alone_steps = 0 if method.fuse == "steps" else layered_steps
        return method, layered_steps, alone_steps

    def _scores(
        self,
        x: Float[Tensor, "regions channels height width"],
        t: Tensor,
        regions: Regions,
        chunk_size: int | None,
    ) -> Float[Tensor, "regions channels height width"]:
        """s(x_t + ξ^i) + γ (s(x_t + ξ^i, y^i) − s(x_t + ξ^i)) for each region i  (LRDiff, Eq. 8b).

        Ordinary classifier-free guidance is the case of one region with M = 1 and ξ = 0.
        """
        ratio = 0.0 if regions.field is None else self._noise_to_signal(t)
        # Where there is no signal at all (α = 0) there is nothing to guide yet.
        guided = regions.field is not None and math.isfinite(ratio)
        if guided:
            x = x + regions.field
        prompts = [region.prompt for region in regions.entries]
        pictures = regions.picture.tolist()
        if self.do_classifier_free_guidance:
            rows = len(regions.asker)
            score = self._unet_in_chunks(
                torch.cat([x[regions.asker], x]),
                t,
                torch.cat([regions.negative, regions.prompt]),
                [None] * rows + prompts,
                regions.picture[regions.asker].tolist() + pictures,
                chunk_size,
            )
            unconditional, conditional = score[:rows][regions.row], score[rows:]
            score = unconditional + self.guidance_scale * (conditional - unconditional)
            if self.guidance_rescale > 0:
                score = rescale_noise_cfg(score, conditional, self.guidance_rescale)
        else:
            score = self._unet_in_chunks(x, t, regions.prompt, prompts, pictures, chunk_size)
        if guided:
            score = score + self._as_seen_from_x_t(ratio) * regions.field
        return score

    def _unet_in_chunks(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Tensor,
        embeddings: Float[Tensor, "batch tokens features"],
        prompts: list[str | None],
        pictures: list[int],
        chunk_size: int | None,
    ) -> Float[Tensor, "batch channels height width"]:
        condition = None
        if self.unet.config.time_cond_proj_dim is not None:  # guidance is distilled into it (LCM)
            condition = self.get_guidance_scale_embedding(
                torch.tensor([self.guidance_scale - 1]), self.unet.config.time_cond_proj_dim
            ).to(x)
        parts = []
        for first in range(0, len(x), chunk_size or len(x)):
            some = slice(first, first + (chunk_size or len(x)))
            self.prompts_of_rows = prompts[some]
            self.pictures_of_rows = pictures[some]
            parts.append(
                self.unet(
                    x[some],
                    t,
                    encoder_hidden_states=embeddings[some],
                    timestep_cond=None if condition is None else condition.expand(len(x[some]), -1),
                    cross_attention_kwargs=self.cross_attention_kwargs,
                    return_dict=False,
                )[0]
            )
        return torch.cat(parts)

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
        }[self._prediction_type]

    def _x0(self, x: Tensor, scores: Tensor, t: Tensor) -> Tensor:
        """x̂_0 of each region's prediction; NaN where ε is predicted from nothing but ε."""
        ratio = self._noise_to_signal(t)
        if not math.isfinite(ratio):  # α = 0, σ = 1
            known = {"v_prediction": -scores, "sample": scores}
            return known.get(self._prediction_type, torch.full_like(x, math.nan))
        alpha = 1 / math.sqrt(1 + ratio**2)
        return {
            "epsilon": lambda: x / alpha - ratio * scores,
            "v_prediction": lambda: alpha * x - ratio * alpha * scores,
            "sample": lambda: scores,
        }[self._prediction_type]()

    @property
    def _prediction_type(self) -> str:
        return self.scheduler.config.get("prediction_type", "epsilon")

    def _noise_to_signal(self, t: Tensor) -> float:
        """σ/α at t; inf at pure noise, as where a schedule is rescaled to zero terminal SNR."""
        ratio = noise_level(self.scheduler, t)
        return ratio if ratio < 0.99 * MOST_NOISE else math.inf

    def _unit(self, latents: Tensor, t: Tensor) -> float:
        """What `scale_model_input` multiplies latents with at t."""
        return float(self.scheduler.scale_model_input(torch.ones_like(latents[:1]), t).flatten()[0])

    def _compose_memory(self, regions: Regions, shape: torch.Size, pictures: int) -> None:
        """Schedulers of several steps remember earlier predictions: they are put together too."""

        def composed(value: Any) -> Any:
            if isinstance(value, Tensor) and value.shape == shape:
                return regions.composed(value, pictures)
            if isinstance(value, list):
                return [composed(one) for one in value]
            return value

        for name, value in list(vars(self.scheduler).items()):
            if isinstance(value, (Tensor, list)):
                setattr(self.scheduler, name, composed(value))

    def _restart_pndm(self, prediction: Tensor) -> None:
        """PNDM cannot do without earlier predictions: let the collage's first stand for them."""
        if isinstance(self.scheduler, PNDMScheduler):
            self.scheduler.ets = [prediction] * 3

    # -------------------------------------------------------------- objects into their places

    def _noised(
        self,
        collages: Float[Tensor, "pictures channels height width"],
        timesteps: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Float[Tensor, "pictures channels height width"]:
        """The clean latents at the first of the remaining timesteps."""
        if not len(timesteps):
            return collages
        ratio = self._noise_to_signal(timesteps[0])
        alpha = 1 / math.sqrt(1 + ratio**2)
        noise = randn_tensor(collages.shape, generator, collages.device, collages.dtype)
        return (alpha * collages + ratio * alpha * noise) / self._unit(collages, timesteps[0])

    # -------------------------------------------------------------- a collage of sketches

    def _sketches(
        self,
        noise: Float[Tensor, "regions channels height width"],
        regions: Regions,
        method: Method,
        chunk_size: int | None,
        progress_bar: Any,
    ) -> tuple[Float[Tensor, "regions channels height width"], list[tuple[Regions, Tensor]]]:
        """Each layer and the background drawn alone, to the end, in a few steps of DDIM.

        Returns:
            The clean latents, and what was believed at each step.
        """
        x, predictions = noise, []
        with self._ddim() as scheduler:
            scheduler.set_timesteps(method.sketch_steps, device=noise.device)
            for t in scheduler.timesteps:
                if self.interrupt:
                    continue
                scores = self._scores(x, t, regions, chunk_size)
                predictions.append((regions, self._x0(x, scores, t)))
                x = scheduler.step(scores, t, x, return_dict=False)[0]
                progress_bar.update()
        self._check_finite(x, f"the {type(self.unet).__name__}'s predictions")
        return x, predictions

    def _check_finite(self, values: Tensor, what: str) -> None:
        if not values.isfinite().all():
            raise ValueError(
                f"{what} are not finite, so no object can be found in them; use float32, a "
                "scheduler that the model was trained for, or a method with fuse='steps'"
            )

    def _relevance(
        self,
        sketches: Float[Tensor, "regions channels height width"],
        regions: Regions,
        pictures: int,
        chunk_size: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Float[Tensor, "regions height width"]:
        """How much the answer to a noised sketch depends on the layer's prompt, cell by cell.

        R = mean over noises of ‖s(x_t, layer) − s(x_t, background)‖   (DiffEdit, section 3.2)
        """
        backgrounds = {one.picture: n for n, one in enumerate(regions.entries) if not one.layer}
        rows = [n for n, one in enumerate(regions.entries) if one.layer]
        others = [backgrounds[regions.entries[n].picture] for n in rows]
        relevance = torch.zeros_like(sketches[:, 0], dtype=torch.float32)
        if not rows:
            return relevance
        shape = (pictures, *sketches.shape[1:])
        asked = [None] * (2 * len(rows))  # not for whoever looks at the attention to a prompt
        numbers = [regions.entries[n].picture for n in rows + others]
        with self._ddim() as scheduler:
            steps = scheduler.config.num_train_timesteps
            t = torch.tensor(round(RELEVANCE_NOISE * steps), device=sketches.device)
            ratio = self._noise_to_signal(t)
            alpha = 1 / math.sqrt(1 + ratio**2)
            for _ in range(RELEVANCE_SAMPLES):
                noise = randn_tensor(shape, generator, sketches.device, sketches.dtype)
                x = alpha * (sketches + ratio * noise[regions.picture])[rows]
                prompts = regions.prompt[rows + others]
                answers = self._unet_in_chunks(
                    torch.cat([x, x]), t, prompts, asked, numbers, chunk_size
                )
                own, other = answers.chunk(2)
                difference = (own - other).float().square().sum(1).sqrt()
                relevance[rows] += difference / RELEVANCE_SAMPLES
        return relevance

    def _collages(
        self,
        layouts: list[Layout],
        method: Method,
        sketches: Float[Tensor, "regions channels height width"],
        relevance: Float[Tensor, "regions height width"],
        regions: Regions,
        canvas: Float[Tensor, "pictures 3 _height _width"] | None,
        chunk_size: int | None,
    ) -> Float[Tensor, "pictures channels height width"]:
        """The latents of each canvas, or background, with the layers' objects in their places."""
        factor = self.vae.config.scaling_factor
        most = min(chunk_size or len(layouts), len(layouts))  # as many as the last decoding takes
        parts = (sketches / factor).to(self.vae.dtype).split(most)
        decoded = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in parts])
        self._check_finite(decoded, f"the {type(self.vae).__name__}'s pictures")
        decoded = (decoded / 2 + 0.5).clamp(0, 1)
        size = decoded.shape[-2:]
        collages: dict[int, Tensor] = {}
        for picture, one in zip(decoded, regions.entries, strict=True):
            if not one.layer:
                collages[one.picture] = picture
        backgrounds = dict(collages)  # by these the objects are found
        if canvas is not None:
            collages = dict(enumerate(canvas.to(decoded)))
        empty = dict(collages)
        entries = list(zip(decoded, relevance, regions.entries, strict=True))
        if method.overlap == "small_over_large":
            areas = {
                (one.picture, one.layer): float(_layer_of(layouts, one).cells(*size).float().mean())
                for one in regions.entries
                if one.layer
            }
            entries.sort(
                key=lambda entry: areas.get((entry[2].picture, entry[2].layer), 2.0), reverse=True
            )
        for picture, relevant, one in entries:
            layer = _layer_of(layouts, one)
            if layer is None:
                continue
            background = backgrounds[one.picture]
            if layer.bounding_box == FULL:  # what fills the canvas is in its place
                mask = torch.ones_like(picture[0], dtype=torch.bool)
            else:
                mask = object_pixels(picture, background, relevant)
            cells = layer.cells(*size).to(picture.device)
            where = mask, layer.bounding_box, cells
            behind = collages[one.picture]
            if method.overlap in ("mean", "weighted"):
                share = layouts[one.picture].masks(*size, overlap=method.overlap)[one.layer]
                below = empty[one.picture]
                alone = pasted(below, picture, *where)
                collages[one.picture] = behind + share.to(behind) * (alone - below)
            else:
                collages[one.picture] = pasted(behind, picture, *where)
        images = 2 * torch.stack([collages[n] for n in range(len(layouts))]) - 1
        encoded = [
            retrieve_latents(self.vae.encode(part), sample_mode="argmax")
            for part in images.to(self.vae.dtype).split(most)
        ]
        return (torch.cat(encoded) * factor).to(sketches)

    @contextlib.contextmanager
    def _ddim(self) -> Iterator[DDIMScheduler]:
        """Inside, the pipeline's scheduler is DDIM with the same noise schedule."""
        own = self.scheduler
        # Only a model of zero terminal SNR has learned to begin at the very end.
        spacing = "trailing" if own.config.get("rescale_betas_zero_snr") else "leading"
        self.scheduler = ddim_like(own, spacing)
        try:
            yield self.scheduler
        finally:
            self.scheduler = own

    def _begin_at(self, step: int) -> None:
        """Let the scheduler know that its first step is a later one."""
        if isinstance(self.scheduler, PNDMScheduler):
            self.scheduler.counter = step  # it counts its predictions; see also `_restart_pndm`
        elif hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(step)
            self.scheduler._step_index = None  # it may have been asked for the first step's unit

    # -------------------------------------------------------------- vision guidance

    def _fields(
        self,
        layouts: list[Layout],
        method: Method,
        latents: Tensor,
        t: Tensor,
        texts: _Texts,
        chunk_size: int | None,
    ) -> list[list[Float[Tensor, "channels height width"] | None]]:
        """ξ of each layer of each picture, None where it is zero."""
        looked_at = _looked_at(layouts, method)
        # In units of N(0, I), which the latents of some schedulers are not.
        noise = self.scheduler.scale_model_input(latents, t)
        maps = iter(self._attention_maps(looked_at, method, noise, t, texts, chunk_size))
        deltas: dict[str, Tensor] = {}  # colour → δ, each computed once
        fields: list[list[Tensor | None]] = [[] for _ in layouts]
        for number, layout in enumerate(layouts):
            for layer in layout.layers:
                if not _is_guided(layer, method):
                    fields[number].append(None)
                    continue
                attention = None if method.delta == "constant" else next(maps)
                delta = self._delta(layer, method, noise[number], attention, deltas)
                if delta is None:
                    fields[number].append(None)
                    continue
                mask = layer.cells(*latents.shape[-2:]).to(latents.device, torch.float32)
                strengths = method.inside * layer.strength, method.outside * layer.strength
                field = vision_guidance(delta, mask, *strengths)
                if method.weighted:
                    field = torch.where(mask > 0, field * attention / attention.max(), field)
                fields[number].append(field)
        return fields

    def _delta(
        self,
        layer: Layer,
        method: Method,
        noise: Tensor,
        attention: Tensor | None,
        deltas: dict[str, Tensor],
    ) -> Float[Tensor, "channels"] | None:
        if method.delta == "dynamic":
            return dynamic_delta(noise, attention, method.top_k)
        if method.delta == "decoded":
            return decoded_delta(self.vae, noise, attention, method.top_k).to(noise.device)
        colour = layer.colour or colour_of_prompt(layer.prompt)
        if colour is None:
            return None
        if colour not in deltas:
            deltas[colour] = constant_delta(self.vae, colour, device=noise.device)
        return deltas[colour]

    def _attention_maps(
        self,
        looked_at: list[tuple[int, Layer]],
        method: Method,
        noise: Tensor,
        t: Tensor,
        texts: _Texts,
        chunk_size: int | None,
    ) -> list[Float[Tensor, "height width"]]:
        """Where the model looks at t = T when it reads each layer's word (LRDiff, section 3.2)."""
        maps = []
        size = chunk_size or max(1, len(looked_at))
        for first in range(0, len(looked_at), size):
            some = looked_at[first : first + size]
            prompts = [self.maybe_convert_prompt(layer.prompt, self.tokenizer) for _, layer in some]
            with capture_attention(
                self.unet,
                prompts,
                layers=method.attention,
                tokenizer=self.tokenizer,
                guided=False,
            ) as attention:
                self._unet_in_chunks(
                    noise[[number for number, _ in some]],
                    t,
                    torch.stack([texts[layer.prompt] for _, layer in some]),
                    [layer.prompt for _, layer in some],
                    [number for number, _ in some],
                    None,
                )
            for row, (_, layer) in enumerate(some):
                word = layer.word or object_of_prompt(layer.prompt)
                shape = tuple(noise.shape[-2:])
                maps.append(attention.pooled(word, prompt=row, size=shape)[0])
        return maps

    # -------------------------------------------------------------- before the first U-Net call

    def _default_size(self, axis: int) -> int:
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else size[axis]) * self.vae_scale_factor

    def _check_layouts(
        self, layouts: list[Layout], method: Method, height: int, width: int
    ) -> None:
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
        size = (height // factor, width // factor)
        positions = height * width if method.delta == "decoded" else size[0] * size[1]
        if method.delta != "constant" and method.top_k > positions:
            raise ValueError(
                f"top_k is {method.top_k}, but there are only {positions} positions to choose from"
            )
        for layout in layouts:
            masks = layout.masks(*size, overlap=method.overlap)
            for number, layer in enumerate(layout.layers):
                name = f"layer {number + 1} {layer.prompt!r}"
                if method.delta != "constant":
                    self._check_word(name, layer)
                if method.fuse != "steps" and (layer.start > 0 or layer.end is not None):
                    raise ValueError(
                        f"{name} has a start or an end, but with fuse={method.fuse!r} every layer "
                        "runs alone up to the same step; use a method with fuse='steps'"
                    )
                if not masks[number + 1].any():
                    cells = layer.cells(*size)
                    others = ", ".join(
                        f"layer {n + 1} {other.prompt!r}"
                        for n, other in enumerate(layout.layers)
                        if n != number and (other.cells(*size) & cells).any()
                    )
                    warnings.warn(
                        f"{name} is completely hidden by {others} and will not be drawn; move it "
                        "to the front (later in the list) or make it larger",
                        stacklevel=4,
                    )

    def _check_word(self, name: str, layer: Layer) -> None:
        prompt = self.maybe_convert_prompt(layer.prompt, self.tokenizer)
        try:
            tokens = PromptTokens.encode(self.tokenizer, prompt)
            tokens.positions(layer.word or object_of_prompt(layer.prompt))
        except WordError as error:
            raise WordError(f"{name}, word: {error}") from None

    def _check_sampling(
        self,
        layouts: list[Layout],
        method: Method,
        height: int,
        width: int,
        num_inference_steps: int,
        num_images_per_prompt: int,
        chunk_size: int | None,
        latents: Tensor | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        kind = type(self.unet).__name__
        if getattr(self.unet.config, "addition_embed_type", None) is not None:
            raise ValueError(
                f"this {kind} wants more than a prompt (addition_embed_type is "
                f"{self.unet.config.addition_embed_type!r}, as in Stable Diffusion XL); use a "
                "Stable Diffusion 1.x or 2.x model"
            )
        if not any(getattr(module, "is_cross_attention", False) for module in self.unet.modules()):
            raise ValueError(f"this {kind} has no cross-attention, so no prompt can reach it")
        scheduler = type(self.scheduler).__name__
        if not hasattr(self.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{scheduler} has no alphas_cumprod, so it is no scheduler of Stable Diffusion; "
                "use DDIMScheduler, EulerDiscreteScheduler or another one of "
                "pipe.scheduler.compatibles"
            )
        if self._prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"{scheduler}'s prediction_type is {self._prediction_type!r}, but should be "
                "'epsilon', 'v_prediction' or 'sample'"
            )
        if not 1 <= num_inference_steps <= self.scheduler.config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, but should be between 1 and "
                f"{self.scheduler.config.num_train_timesteps}, the steps the model was trained with"
            )
        most = self.scheduler.config.num_train_timesteps - 1
        if method.fuse == "collage" and method.sketch_steps > most:
            raise ValueError(f"sketch_steps is {method.sketch_steps}, but should be at most {most}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}, but should be ≥ 1")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}, but should be ≥ 1, or None for all")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(sorted(unknown))}, but only "
                f"{', '.join(self._callback_tensor_inputs)} can be given to a callback"
            )
        if latents is not None:
            factor = self.vae_scale_factor
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

    def _check_canvas(
        self,
        canvas: Sequence[Image.Image] | None,
        layouts: list[Layout],
        height: int,
        width: int,
    ) -> None:
        if canvas is None:
            return
        if not all(isinstance(image, Image.Image) for image in canvas):
            kinds = ", ".join(sorted({type(image).__name__ for image in canvas}))
            raise ValueError(f"canvas has {kinds}, but should have PIL images")
        if len(canvas) != len(layouts):
            raise ValueError(
                f"canvas has {len(canvas)} pictures for {len(layouts)} layouts; give one for each"
            )
        for image in canvas:
            if image.has_transparency_data:
                raise ValueError("canvas is transparent in places; lay it on a colour first")
            if image.size != (width, height):
                raise ValueError(
                    f"canvas is {image.width} × {image.height}, but the picture will be {width} × "
                    f"{height}; resize it"
                )

    def _check_texts(self, layouts: list[Layout], prompt_embeds: Mapping[str, Tensor]) -> None:
        """Refuse embeddings of another size; warn of words that the model does not know."""
        features = self.unet.config.cross_attention_dim
        for text, embedding in prompt_embeds.items():
            if embedding.ndim != 2 or (isinstance(features, int) and len(embedding[0]) != features):
                raise ValueError(
                    f"prompt_embeds[{text!r}] has shape {tuple(embedding.shape)}, but should be "
                    f"(tokens, {features})"
                )
        for layout in layouts:
            named = [("caption", layout.caption), ("background", layout.background)]
            for number, layer in enumerate(layout.layers, start=1):
                name = f"layer {number} {layer.prompt!r}"
                named.append((name, layer.prompt))
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


class _Texts:
    """Texts → embeddings "tokens features", each encoded once.

    Each text alone: a picture must not depend on what else is in the batch.
    """

    def __init__(
        self, pipe: LayeredRenderingPipeline, known: dict[str, Tensor], latents: Tensor
    ) -> None:
        self.pipe, self.latents = pipe, latents
        self.known = {text: embedding.to(latents) for text, embedding in known.items()}

    def check(self, plan: Sequence[Sequence[Region]], guiding: Sequence[str]) -> None:
        """Refuse texts that cannot be encoded; warn of embeddings that nobody asks for.

        Args:
            plan: what the U-Net will be asked, step by step.
            guiding: the prompts whose attention maps are looked at.
        """
        asked = {text: f"the prompt {text!r} whose attention is looked at" for text in guiding}
        for entry in itertools.chain.from_iterable(plan):
            who = f"layer {entry.layer}" if entry.layer else "the background or caption"
            asked[entry.prompt] = f"{who} asks {entry.prompt!r}"
            asked.setdefault(entry.negative, f"{who} has the negative prompt {entry.negative!r}")
        missing = [said for text, said in asked.items() if text not in self.known]
        if missing and self.pipe.text_encoder is None:
            raise ValueError(
                "the pipeline has no text_encoder, and prompt_embeds lacks: " + "; ".join(missing)
            )
        for text in self.known.keys() - asked.keys():
            warnings.warn(
                f"prompt_embeds has {text!r}, but nobody asks for it; what is asked: "
                + ", ".join(map(repr, asked)),
                stacklevel=4,
            )

    def __getitem__(self, text: str) -> Float[Tensor, "tokens features"]:
        if text not in self.known:
            pipe = self.pipe
            scale = (pipe.cross_attention_kwargs or {}).get("scale")
            embeddings = pipe.encode_prompt(text, self.latents.device, 1, False, lora_scale=scale)
            self.known[text] = embeddings[0][0].to(self.latents)
        return self.known[text]


def _layer_of(layouts: list[Layout], region: Region) -> Layer | None:
    return layouts[region.picture].layers[region.layer - 1] if region.layer else None


def _one_each(negative_prompt: str | Sequence[str] | None, layouts: list[Layout]) -> list[str]:
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * len(layouts)
    if len(negative_prompt) != len(layouts):
        raise ValueError(
            f"negative_prompt has {len(negative_prompt)} entries for {len(layouts)} layouts; "
            "give one text for all, or one for each layout"
        )
    return list(negative_prompt)


def _is_guided(layer: Layer, method: Method) -> bool:
    return bool(layer.strength and (method.inside or method.outside))


def _looked_at(layouts: list[Layout], method: Method) -> list[tuple[int, Layer]]:
    """The layers whose attention makes their δ, each with the number of its picture."""
    if method.delta == "constant":
        return []
    return [
        (number, layer)
        for number, layout in enumerate(layouts)
        for layer in layout.layers
        if _is_guided(layer, method)
    ]


def _encoded(
    plan: list[list[Region]],
    fields: list[list[Tensor | None]],
    method: Method,
    layered_steps: int,
    alone_steps: int,
    texts: _Texts,
    latents: Tensor,
) -> list[Regions]:
    """What each step asks as a batch, with ξ and the texts' embeddings; each made once."""
    made: dict[tuple, Regions] = {}
    parts = []
    for step, entries in enumerate(plan):
        alone = step < alone_steps
        guided = method.guide == "steps" and step < layered_steps
        key = id(entries), alone, guided
        if key not in made:
            if guided:
                entries = [
                    replace(one, field=fields[one.picture][one.layer - 1]) if one.layer else one
                    for one in entries
                ]
            made[key] = batched(entries, texts.__getitem__, latents, share=not alone)
        parts.append(made[key])
    return parts


def _traces(
    layouts: list[Layout],
    fields: list[list[Tensor | None]],
    predictions: list[tuple[Regions, Tensor]],
    collages: Sequence[Tensor | None],
    latents: Tensor,
) -> list[LayerTrace]:
    traces = []
    for number, (layout, collage) in enumerate(zip(layouts, collages, strict=True)):
        x0 = latents.new_full(
            (len(predictions), len(layout.layers) + 1, *latents.shape[1:]), math.nan
        )
        for step, (regions, predicted) in enumerate(predictions):
            for row, region in enumerate(regions.entries):
                if region.picture == number:
                    x0[step, region.layer] = predicted[row]
        traces.append(LayerTrace(stacked([None, *fields[number]], latents), x0, collage))
    return traces
