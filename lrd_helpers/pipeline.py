"""Layouts to pictures: pipelines of diffusers (Stable Diffusion, and XL) that take a `method`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lrd_helpers.adapters import check_lora, check_textual_inversion
from lrd_helpers.layout import Layout, checked_text
from lrd_helpers.messages import excerpt
from lrd_helpers.methods import Method, check_opacity, named
from lrd_helpers.methods.regions import Fields, layer_name
from lrd_helpers.pictures import picture_of
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.sampling.model import CELLS_AT_ONCE, check_kind, checked_finite
from lrd_helpers.sampling.regions import Regions, stacked
from lrd_helpers.sampling.run import Run, State, returned_latents
from lrd_helpers.sampling.steps import (
    Generators,
    Steps,
    check_count,
    check_generators,
    check_scheduler,
    finite_number,
    learned_steps,
)
from lrd_helpers.words import warn_of_texts

with quiet_libraries():
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.pipelines import auto_pipeline
    from diffusers.utils import BaseOutput

Callback = Callable[..., dict[str, Any] | None]


@dataclass(frozen=True)
class LayerTrace:
    """What the layers of one picture did; index 0 is the background, i + 1 is `layers[i]`.

    Attributes:
        guidance: ξ^i, in units of x_T ~ N(0, I); 0 for the background.
        x0: at each layered step the clean latents each layer's prediction speaks of,
            x̂_0 = (x_t − σ ε̂^i) / α; NaN where a layer took no part. With a collage the steps are
            those of the sketches.
        collage: with a collage the clean latents that the last steps go on from, else None.
    """

    guidance: Float[Tensor, "layers+1 channels height width"]
    x0: Float[Tensor, "steps layers+1 channels height width"]
    collage: Float[Tensor, "channels height width"] | None = None


@dataclass
class LayeredRenderingOutput(BaseOutput):
    """What `LayeredRenderingPipeline` and `LayeredRenderingXLPipeline` return.

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


class LayeredRenderingMixin:
    """Layout to picture, by any of `METHODS`: what makes a layered pipeline of one of diffusers'.

    Everything but `__call__` is diffusers': `from_pretrained`, `from_pipe`, `components`, `to`,
    offloading, slicing, LoRA, IP-Adapter. A saved folder is a plain Stable Diffusion folder (the
    method lives in the sampler, not in the weights), and any such folder loads as this class. As in
    diffusers, `from_pipe` casts the models that both pipelines share to float32 unless told
    otherwise: `from_pipe(pipe, torch_dtype=torch.float16)`.

    Best with DDIM. PNDM, the scheduler in many Stable Diffusion folders, extrapolates from four
    predictions, and here these change with the prompts: on storybook it obeys much less.
    """

    plain: ClassVar[type[DiffusionPipeline]]
    """The pipeline of diffusers that a saved folder is one of."""

    default_steps: int = 25
    """T where a call names none. `load_pipeline` sets it for few-step models, as the next two."""

    default_guidance_scale: float = 5.0
    """γ where a call names none."""

    cells_at_once: int = CELLS_AT_ONCE
    """So many latent cells go through the U-Net at once where a call has no `chunk_size`."""

    prompts_of_rows: list[str | None] | None = None
    """The prompt of each row of the batch the U-Net is computing, None for an unconditional row:
    what `capture_attention` goes by. None while nothing is drawn."""

    pictures_of_rows: list[int] | None = None
    """The picture that each of these rows is a part of."""

    @torch.inference_mode(False)  # no method could take a gradient there
    @torch.no_grad()
    def __call__(
        self,
        layouts: Layout | Sequence[Layout],
        *,
        method: str | Method = "collage",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        inside: float | None = None,
        outside: float | None = None,
        layered_fraction: float | None = None,
        chunk_size: int | None = None,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Float[Tensor, "pictures channels height_ width_"] | None = None,
        canvas: Image.Image | Sequence[Image.Image] | None = None,
        prompt_embeds: Mapping[str, Tensor | tuple[Tensor, ...]] | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        output_layers: bool = False,
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> LayeredRenderingOutput | tuple:
        """Draw each layout by a method.

        Args:
            layouts: one layout or several, drawn as one batch where the method can.
            method: a name of `lrd_helpers.METHODS`, or options of your own, such as
                `dataclasses.replace(METHODS["paper"], fuse="once")` or `BoxDiff(strength=10)`.
            height: of the pictures in pixels, divisible by 8; the model's own size by default.
            width: likewise.
            num_inference_steps: T, the denoising steps; by default `default_steps`, or all that a
                distilled model has learned.
            timesteps: these timesteps, largest first, for schedulers that take them.
            sigmas: these noise levels, largest first, for schedulers that take them.
            guidance_scale: γ of classifier-free guidance, s + γ (s(y) − s); off where γ ≤ 1. By
                default `default_guidance_scale`, or 1 for a distilled model, which has its guidance
                built in.
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
            canvas: with a collage the picture that objects are pasted onto, instead of the
                background's sketch; of the size that is drawn, one for each layout, whose
                `background` says what it shows. The last steps change all of it: see
                `lrd_helpers.editing` for how the rest is kept.
            prompt_embeds: texts that are not to be encoded, with their embeddings "tokens
                features", in XL pairs of them and the pooled text "pooled": every text that the
                U-Net is asked, so with `background_in_prompts` "a red car at night", not
                "a red car". The empty text is what unguided rows read (in XL zeros, if not given).
            ip_adapter_image: picture or pictures for the loaded IP-Adapter, which all regions see.
            ip_adapter_image_embeds: instead of it, what `prepare_ip_adapter_image_embeds` makes.
            cross_attention_kwargs: for the attention processors, such as LoRA's {"scale": 0.5}.
            output_type: "pil", "np", "pt" or "latent".
            output_layers: also return each layer's ξ and predictions, where the method has them.
            return_dict: False gives a tuple (images, nsfw_content_detected, masks, layers).
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": …}) after each step,
                `num_timesteps` times (by default 8 of 25: sketches are not its business). It may
                return other latents, set `pipe._interrupt`, change `pipe._guidance_scale`. While
                each layer runs alone it sees them put together; what it returns is then the picture
                that every layer goes on from. Methods that draw one picture at a time call it for
                each picture.
            callback_on_step_end_tensor_inputs: which tensors the callback gets: "latents";
                others in `_callback_tensor_inputs`, a row a region, which it may not change.

        Raises:
            ValueError: an argument that cannot work, before the first U-Net call; or numbers that
                are not finite, while it draws.
        """
        changes = {"inside": inside, "outside": outside, "layered_fraction": layered_fraction}
        method = named(method, **{name: v for name, v in changes.items() if v is not None})
        layouts = [layouts] if isinstance(layouts, Layout) else list(layouts)
        size = height or self._default_size(0), width or self._default_size(1)
        check_kind(self)
        check_layouts(self, layouts, size)
        check_scheduler(self.scheduler)
        learned = learned_steps(self.scheduler)
        if guidance_scale is None:
            guidance_scale = 1.0 if learned else self.default_guidance_scale
        if timesteps is not None or sigmas is not None:
            num_inference_steps = None
        elif num_inference_steps is None:
            num_inference_steps = learned or self.default_steps
        check_sampling(self, num_inference_steps, num_images_per_prompt, chunk_size)
        names = tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        canvas = checked_canvas(canvas, layouts, size)
        check_traces(method, output_layers)
        guidance_scale = finite_number("guidance_scale", guidance_scale)
        guidance_rescale = finite_number("guidance_rescale", guidance_rescale)
        # What StableDiffusionPipeline keeps while it runs; callbacks read and change it.
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._clip_skip, self._interrupt = None, False
        # One entry a picture: layout 0, layout 0, …, layout 1, … as StableDiffusionPipeline does.
        count = num_images_per_prompt
        options = {"timesteps": timesteps, "sigmas": sigmas, "eta": eta, "generator": generator}
        steps = Steps(self.scheduler, num_inference_steps, device=self._execution_device, **options)
        run = Run.begin(
            self,
            _repeated(layouts, count),
            size,
            steps,
            negatives=_repeated(for_each_layout(negative_prompt, layouts), count),
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            canvas=_repeated(canvas, count),
            prompt_embeds=prompt_embeds,
            image_embeds=self._image_embeds(ip_adapter_image, ip_adapter_image_embeds),
            chunk_size=chunk_size,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        check_noise(latents, generator, run.x_T.shape)
        check_opacity(run, method)
        for part in method.parts(run, count):
            method.check(part)
        warn_of_words(self, layouts)
        run.draw_noise(latents)
        with run.model.drawing():
            latents, traces = self._draw(run, method, callback_on_step_end, names, output_layers)
            images, nsfw = self._images(run, latents, output_type)
        masks = [layout.masks(*run.size, overlap=method.overlap) for layout in run.layouts]
        if not return_dict:
            return images, nsfw, masks, traces
        return LayeredRenderingOutput(images, nsfw, masks, traces)

    def _draw(
        self,
        run: Run,
        method: Method,
        callback: Callback | None,
        names: Sequence[str],
        output_layers: bool,
    ) -> tuple[Float[Tensor, "pictures channels height width"], list[LayerTrace] | None]:
        """Iterate over the method's states: progress, callbacks, interruption and traces."""
        sketches, self._num_timesteps = method.count(next(method.parts(run)))
        total = (sketches + self._num_timesteps) * (1 if method.batched else len(run.x_T))
        latents, traces = [], []
        with self.progress_bar(total=total) as progress_bar:
            for part in method.parts(run):
                x, number, recorded = part.x_T, 0, []
                for state in () if self.interrupt else method.sample(part):
                    if callback is not None and not state.sketch:
                        self._call_back(callback, names, part, state, number)
                        number += 1
                    x = state.latents
                    if output_layers and state.xi is not None:
                        recorded.append(Recorded.of(part, state))
                    progress_bar.update()
                    if self.interrupt:
                        break
                latents.append(x)
                traces += _traces(part, recorded) if output_layers else []
        return checked_finite(torch.cat(latents), "the latents"), traces or None

    def _images(
        self, run: Run, latents: Float[Tensor, "pictures channels height width"], output_type: str
    ) -> tuple[list[Image.Image] | np.ndarray | Tensor, list[bool] | None]:
        """Pictures as `output_type` says, and what the safety checker makes of them."""
        if output_type == "latent":
            return latents, None
        images = run.model.decode(latents, run.generator)
        images, nsfw = self._looked_through(images)
        shown = [not hit for hit in nsfw or [False] * len(images)]
        return self.image_processor.postprocess(images, output_type, do_denormalize=shown), nsfw

    def _call_back(
        self, callback: Callback, names: Sequence[str], run: Run, state: State, number: int
    ) -> None:
        """Show a state to a callback and take over what it changes."""
        latents, entries = state.latents, state.regions.entries
        tensors = {"latents": latents}
        if set(names) - tensors.keys():
            prompts, negatives = zip(*((e.prompt, e.negative) for e in entries), strict=True)
            tensors |= run.model.tensors(prompts, negatives)
        given = {name: tensors[name] for name in names}
        changed = callback(self, number, state.t, dict(given))
        changed = {} if changed is None else changed
        new = returned_latents(changed, latents)
        for name in given.keys() & changed.keys() - {"latents"}:
            rest = changed[name]
            if not torch.equal(rest, given[name][len(given[name]) - len(rest) :]):
                raise ValueError(
                    f"the callback changed {name}, but a text has one embedding in all steps; give "
                    "it as prompt_embeds"
                )
        if new is not latents:
            state.latents = new
        run.guidance_scale = self._guidance_scale
        run.guidance_rescale = self._guidance_rescale

    def _default_size(self, axis: int) -> int:
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else size[axis]) * self.vae_scale_factor

    def _image_embeds(self, image: Any, image_embeds: list[Tensor] | None) -> list[Tensor] | None:
        """What the IP-Adapters see: for each, [unconditional, conditional] of one picture."""
        adapters = getattr(self.unet, "encoder_hid_proj", None)
        loaded = self.unet.config.encoder_hid_dim_type == "ip_image_proj" and adapters is not None
        if image is None and image_embeds is None:
            if loaded:
                raise ValueError(
                    "an IP-Adapter is loaded, but there is no ip_adapter_image for it; give one, "
                    "or call unload_ip_adapter() first"
                )
            return None
        if not loaded:
            raise ValueError("ip_adapter_image: no IP-Adapter is loaded; call load_ip_adapter()")
        return self.prepare_ip_adapter_image_embeds(
            _plain(image), image_embeds, self._execution_device, 1, self.do_classifier_free_guidance
        )

    def _looked_through(self, images: Tensor) -> tuple[Tensor, list[bool] | None]:
        """The pictures in [−1, 1] as diffusers' pipeline lets them pass, and its objections."""
        raise NotImplementedError

    def load_lora_weights(self, lora: Any, adapter_name: str | None = None, **options: Any) -> None:
        """As diffusers; a LoRA of another family is refused before it is loaded."""
        check_lora(self, lora, **options)
        super().load_lora_weights(lora, adapter_name, **options)

    def load_textual_inversion(self, inversion: Any, *arguments: Any, **options: Any) -> None:
        """As diffusers; learnt words for another text encoder are refused before they are added."""
        named = dict(zip(("token", "tokenizer", "text_encoder"), arguments, strict=False)) | options
        rest = {k: v for k, v in named.items() if k not in ("token", "tokenizer", "text_encoder")}
        check_textual_inversion(named.get("text_encoder") or self.text_encoder, inversion, **rest)
        super().load_textual_inversion(inversion, **named)

    def to_json_string(self) -> str:
        """The text of `model_index.json`: that of `plain`.

        So a folder that `save_pretrained` wrote opens with this class, with `plain` and with
        `DiffusionPipeline`, with no code of ours.
        """
        index = json.loads(super().to_json_string())
        index["_class_name"] = self.plain.__name__
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


class LayeredRenderingPipeline(LayeredRenderingMixin, StableDiffusionPipeline):
    """Layout to picture with Stable Diffusion 1.x or 2.x: see `LayeredRenderingMixin`."""

    plain = StableDiffusionPipeline
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def _looked_through(self, images: Tensor) -> tuple[Tensor, list[bool] | None]:
        return self.run_safety_checker(images, images.device, self.unet.dtype)


class LayeredRenderingXLPipeline(LayeredRenderingMixin, StableDiffusionXLPipeline):
    """Layout to picture with Stable Diffusion XL: see `LayeredRenderingMixin`.

    XL is told that each picture was made at the size that is drawn, and not cropped.
    """

    plain = StableDiffusionXLPipeline
    _callback_tensor_inputs = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    _denoising_end = None

    def _looked_through(self, images: Tensor) -> tuple[Tensor, list[bool] | None]:
        return (images if self.watermark is None else self.watermark.apply_watermark(images)), None


# So AutoPipelineForImage2Image.from_pipe and its sisters know what to make of these pipelines.
auto_pipeline.SUPPORTED_TASKS_MAPPINGS.append(
    {
        "stable-diffusion": LayeredRenderingPipeline,
        "stable-diffusion-xl": LayeredRenderingXLPipeline,
    }
)


# ------------------------------------------------------------------ traces


@dataclass(frozen=True)
class Recorded:
    """What one state tells of the layers."""

    regions: Regions
    x0: Float[Tensor, "rows channels height width"] | None
    xi: Fields
    collage: Float[Tensor, "pictures channels height width"] | None

    @classmethod
    def of(cls, run: Run, state: State) -> Recorded:
        x0 = None
        if state.scores is not None:
            x0 = run.steps.x0(state.seen, state.scores, state.t)
        return cls(state.regions, x0, state.xi, state.collage)


def _traces(run: Run, recorded: Sequence[Recorded]) -> list[LayerTrace]:
    steps = [each for each in recorded if each.x0 is not None]
    collage = recorded[-1].collage if recorded else None
    traces = []
    for number, layout in enumerate(run.layouts):
        layers = len(layout.layers)
        xi = recorded[0].xi[number] if recorded else [None] * layers
        x0 = run.x_T.new_full((len(steps), layers + 1, *run.x_T.shape[1:]), math.nan)
        for step, each in enumerate(steps):
            for row, region in enumerate(each.regions.entries):
                if region.picture == number:
                    x0[step, region.layer] = each.x0[row]
        its_collage = None if collage is None else collage[number]
        traces.append(LayerTrace(stacked([None, *xi], run.x_T), x0, its_collage))
    return traces


# ------------------------------------------------------------------ before the first U-Net call


def check_layouts(
    pipe: LayeredRenderingMixin, layouts: Sequence[Layout], size: tuple[int, int]
) -> None:
    if not layouts or not all(isinstance(layout, Layout) for layout in layouts):
        kinds = sorted({type(layout).__name__ for layout in layouts}) or ["nothing"]
        raise ValueError(f"layouts is {', '.join(kinds)}, but should be a Layout or several")
    factor = pipe.vae_scale_factor
    if any(side % factor or side < factor for side in size):
        near = tuple(max(factor, round(side / factor) * factor) for side in size)
        raise ValueError(
            f"height and width are {size[0]} and {size[1]}, but should be divisible by {factor}; "
            f"{near[0]} and {near[1]} would work"
        )


def check_sampling(
    pipe: LayeredRenderingMixin, steps: int | None, pictures: int, chunk_size: int | None
) -> None:
    most = pipe.scheduler.config.num_train_timesteps
    if steps is not None:
        check_count("num_inference_steps", steps, most)
    check_count("num_images_per_prompt", pictures)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)


def tensor_names(
    pipe: LayeredRenderingMixin, callback: Callback | None, names: Sequence[str]
) -> Sequence[str]:
    """Which tensors a callback gets; those of diffusers say so themselves."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    if unknown := set(names) - set(pipe._callback_tensor_inputs):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {', '.join(sorted(unknown))}, but only "
            f"{', '.join(pipe._callback_tensor_inputs)} can be given to a callback"
        )
    return names


def check_traces(method: Method, output_layers: bool) -> None:
    if output_layers and not method.traces:
        raise ValueError(f"output_layers: {type(method).__name__} predicts no layers apart")


def check_noise(latents: Tensor | None, generator: Generators, shape: Sequence[int]) -> None:
    check_generators(generator, shape[0])
    if latents is None:
        return
    if tuple(latents.shape) != tuple(shape):
        raise ValueError(
            f"latents has shape {tuple(latents.shape)}, but should have {tuple(shape)}"
        )
    if not latents.isfinite().all():
        raise ValueError("latents has values that are not finite (NaN or infinite)")


def checked_canvas(
    canvas: Image.Image | Sequence[Image.Image] | None,
    layouts: Sequence[Layout],
    size: tuple[int, int],
) -> list[Image.Image] | None:
    """The canvases in RGB, one for each layout."""
    if canvas is None:
        return None
    images = list(canvas) if isinstance(canvas, (list, tuple)) else [canvas]
    if not all(isinstance(image, Image.Image) for image in images):
        kinds = ", ".join(sorted({type(image).__name__ for image in images}))
        raise ValueError(f"canvas has {kinds}, but should have PIL images")
    if len(images) != len(layouts):
        raise ValueError(
            f"canvas has {len(images)} pictures for {len(layouts)} layouts; give one for each"
        )
    images = [picture_of(image) for image in images]
    for image in images:
        if image.size != size[::-1]:
            raise ValueError(
                f"canvas is {image.width} × {image.height}, but the picture will be {size[1]} × "
                f"{size[0]}; resize it"
            )
    return images


def for_each_layout(text: str | Sequence[str] | None, layouts: Sequence[Layout]) -> list[str]:
    """The negative prompt of each layout, "" for none."""
    if text is None or isinstance(text, str):
        text = [text or ""] * len(layouts)
    if not isinstance(text, (list, tuple)):
        raise ValueError(f"negative_prompt is {excerpt(text)}, but should be text or a list of it")
    if len(text) != len(layouts):
        raise ValueError(
            f"negative_prompt has {len(text)} entries for {len(layouts)} layouts; give one text "
            "for all, or one for each layout"
        )
    try:
        return [checked_text(negative) for negative in text]
    except ValueError as error:
        raise ValueError(f"negative_prompt {error}") from None


def warn_of_words(pipe: LayeredRenderingMixin, layouts: Sequence[Layout]) -> None:
    """Warn of what the model does not know or read in the texts of layouts."""
    for layout in layouts:
        warn_of_texts(pipe.tokenizer, texts_of_layout(layout), stacklevel=6)


def texts_of_layout(layout: Layout) -> list[tuple[str, str]]:
    """How messages call each text that the model reads, and the text."""
    texts = [("caption", layout.caption), ("background", layout.background)]
    return texts + [(layer_name(n, layer), layer.prompt) for n, layer in enumerate(layout.layers)]


def _plain(images: Any) -> Any:
    """Pictures, or lists of lists of them: those of PIL by the rules of `lrd_helpers.pictures`."""
    if isinstance(images, (list, tuple)):
        return [_plain(image) for image in images]
    return picture_of(images) if isinstance(images, Image.Image) else images


def _repeated(values: list | None, count: int) -> list | None:
    """a, b → a, a, …, b, b, …"""
    return None if values is None else [value for value in values for _ in range(count)]
