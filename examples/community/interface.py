"""The pipeline for users of diffusers: Algorithm 1 of `lrd_helpers` behind the arguments they know.

`generate.py` makes layered_rendering_diffusion.py of this file and of what it imports from the
package. A name that is defined here stands in place of the package's: the ends of the algorithm
(texts, attention, masks, the words of a prompt) are shorter here than there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from jaxtyping import Bool, Float
from PIL import ImageColor
from torch import Tensor, nn
from torch.nn import functional

from lrd_helpers.attention import (
    Layers,
    _cross_attention,
    _maps,
    _modules,
    _resized,
    _uncompiled,
)
from lrd_helpers.layout import Layer, Layout, LayoutError
from lrd_helpers.mask import Box, tight_box
from lrd_helpers.messages import excerpt
from lrd_helpers.methods.choices import Choices
from lrd_helpers.methods.guidance import check_words
from lrd_helpers.methods.lrdiff import layered_denoising
from lrd_helpers.methods.regions import Phases, layer_name, warn_of_hidden_layers
from lrd_helpers.naming import WordError
from lrd_helpers.pipeline import (
    Callback,
    check_layouts,
    check_noise,
    check_sampling,
    for_each_layout,
    tensor_names,
)
from lrd_helpers.sampling.model import CELLS_AT_ONCE, checked_finite, decode_latents
from lrd_helpers.sampling.run import Run, returned_latents
from lrd_helpers.sampling.steps import Generators, Steps, finite_number

METHODS = {
    # The choices that obey best on the course's small model.
    "lrdiff": Choices(
        delta="contrast", inside=0.6, outside=0.5, guide="both", layered_fraction=0.4
    ),
    # The paper's K, λ and t0 are not published; these are the course's.
    "paper": Choices(delta="dynamic", inside=1.0, outside=1.0),
}
"""Algorithm 1 with two sets of the choices that it leaves open."""


class LayeredRenderingDiffusionPipeline(StableDiffusionPipeline):
    """Boxes or masks → picture, without training: LRDiff (Qi et al. 2024), Algorithm 1.

    For Stable Diffusion 1.x and 2.x with any of their schedulers; DDIM is best. Everything but
    `__call__` is `StableDiffusionPipeline`'s: loading, saving, offloading, LoRA.
    """

    _callback_tensor_inputs = ["latents"]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        layers: Sequence[dict[str, Any] | tuple[str, Box]],
        background: str = "",
        *,
        method: str = "lrdiff",
        choices: dict[str, Any] | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Float[Tensor, "pictures channels height_ width_"] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draw a picture in which each layer is where it should be.

        Args:
            prompt: the whole picture in words, "a red car and a yellow star at night".
            layers: from back to front: where two overlap, the later one is seen. Each is a pair
                ("a red car", (x0, y0, x1, y1)), its corners as fractions of the picture in [0, 1];
                or a dict of what `Layer` has, such as {"prompt": "a red car", "box": (…), "colour":
                "red"}, with "mask", an array (height, width) of True and False, for any shape.
            background: what is behind all layers, "at night"; empty: the prompt.
            method: "lrdiff" or "paper"; see `METHODS`.
            choices: changes of the method's `Choices`, {"inside": 0.3, "layered_fraction": 0.5}.
            negative_prompt: in place of the empty prompt; a layer's own comes first.
            height: of the picture in pixels, divisible by 8; the model's own size by default.
            width: likewise.
            num_inference_steps: T, the denoising steps.
            guidance_scale: γ of classifier-free guidance, s + γ (s(y) − s); off where γ ≤ 1.
            guidance_rescale: φ of Lin et al. 2024, Eq. 16; 0 = off.
            num_images_per_prompt: pictures from as many initial noises, drawn as one batch.
            eta: η of DDIM, for schedulers that have it.
            generator: where the noise comes from; a list has one for each picture.
            latents: the initial noise ~ N(0, I), instead of drawing it.
            cross_attention_kwargs: for the attention processors, such as LoRA's {"scale": 0.5}.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False gives a tuple (images, nsfw_content_detected).
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": …}) after each step;
                it may return other latents, set `pipe._interrupt`, change `pipe._guidance_scale`.
            callback_on_step_end_tensor_inputs: which tensors it gets: "latents".

        Raises:
            ValueError: an argument that cannot work, before the first U-Net call; or numbers that
                are not finite, while it draws.
        """
        choices = chosen(method, choices)
        layout = layout_of(prompt, layers, background)
        check_unet(self.unet)
        size = self._size(height, width)
        check_layouts(self, [layout], size)
        check_sampling(self, num_inference_steps, num_images_per_prompt, None)
        tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._guidance_scale = finite_number("guidance_scale", guidance_scale)
        self._guidance_rescale = finite_number("guidance_rescale", guidance_rescale)
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
        model = Model(self, size)
        run = Run(
            model,
            Steps(
                self.scheduler,
                num_inference_steps,
                device=model.like.device,
                eta=eta,
                generator=generator,
            ),
            layouts=[layout] * num_images_per_prompt,
            negatives=for_each_layout(negative_prompt, [layout]) * num_images_per_prompt,
            x_T=model.like.new_empty(num_images_per_prompt, *model.like.shape[1:]),
            guidance_scale=self._guidance_scale,
            guidance_rescale=self._guidance_rescale,
            generator=generator,
        )
        check_noise(latents, generator, run.x_T.shape)
        check_run(run, choices)
        run.draw_noise(latents)
        try:
            x = self._draw(run, choices, callback_on_step_end)
            images, nsfw = self._pictures(run, x, output_type)
        finally:
            self.maybe_free_model_hooks()
        if not return_dict:
            return images, nsfw
        return StableDiffusionPipelineOutput(images, nsfw)

    def to_json_string(self) -> str:
        """The text of `model_index.json`: a saved folder is one of `StableDiffusionPipeline`."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = StableDiffusionPipeline.__name__
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        size = self.unet.config.sample_size
        own = (size, size) if isinstance(size, int) else size
        return tuple(
            side or cells * self.vae_scale_factor
            for side, cells in zip((height, width), own, strict=True)
        )

    def _draw(
        self, run: Run, choices: Choices, callback: Callback | None
    ) -> Float[Tensor, "pictures channels height width"]:
        """Iterate over Algorithm 1: progress, callbacks and interruption are not its matter."""
        x, self._num_timesteps = run.x_T, len(run.steps)
        with self.progress_bar(total=len(run.steps)) as progress_bar:
            for number, state in enumerate(layered_denoising(run, choices)):
                if callback is not None:
                    changed = callback(self, number, state.t, {"latents": state.x})
                    if changed is not None:
                        state.x = returned_latents(changed, state.x)
                    run.guidance_scale = self._guidance_scale
                    run.guidance_rescale = self._guidance_rescale
                x = state.x
                progress_bar.update()
                if self.interrupt:
                    break
        return checked_finite(x, "the latents")

    def _pictures(
        self, run: Run, x: Float[Tensor, "pictures channels height width"], output_type: str
    ) -> tuple[Any, list[bool] | None]:
        """Pictures as `output_type` says, and what the safety checker makes of them."""
        if output_type == "latent":
            return x, None
        images = decode_latents(self.vae, x.to(self.vae.dtype), generator=run.generator)
        images, nsfw = self.run_safety_checker(images, images.device, self.unet.dtype)
        shown = [not hit for hit in nsfw or [False] * len(images)]
        return self.image_processor.postprocess(images, output_type, do_denormalize=shown), nsfw


# ------------------------------------------------------------------ before the first U-Net call


def chosen(method: str, changes: dict[str, Any] | None) -> Choices:
    """The choices of a method, with some of them changed."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method is {excerpt(method)}, but should be one of {', '.join(METHODS)}")
    for name in changes or {}:
        if name not in vars(METHODS[method]):
            known = ", ".join(vars(METHODS[method]))
            raise ValueError(f"there is no choice {excerpt(name)}; there are {known}")
    choices = replace(METHODS[method], **(changes or {}))
    if choices.fuse != "steps":
        raise ValueError(
            f"fuse is {choices.fuse!r}, but Algorithm 1, all there is here, is 'steps'"
        )
    return choices


def layout_of(prompt: str, layers: Iterable[Any], background: str) -> Layout:
    """The layout, of dicts or of pairs of a prompt and a box."""
    if isinstance(layers, (list, tuple)):
        pair = ("prompt", "box")
        layers = [
            dict(zip(pair, each, strict=True))
            if isinstance(each, (list, tuple)) and len(each) == len(pair)
            else each
            for each in layers
        ]
    try:
        return Layout(prompt, background=background, layers=layers)
    except LayoutError as error:
        raise LayoutError(re.sub("^caption", "prompt", str(error))) from None


def check_unet(unet: nn.Module) -> None:
    """Refuse what does not draw from one text alone."""
    config = unet.config
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"this U-Net takes {config.in_channels} channels where latents have "
            f"{config.out_channels}, as for inpainting; use the model it was made from"
        )
    if config.time_cond_proj_dim is not None or config.addition_embed_type is not None:
        raise ValueError(
            "this U-Net wants more than a prompt, as that of XL or LCM does; use a Stable "
            "Diffusion 1.x or 2.x"
        )


def check_run(run: Run, choices: Choices) -> None:
    """Refuse what Algorithm 1 cannot do, and warn of layers that will not be seen."""
    positions = run.size[0] * run.size[1]
    if choices.delta == "decoded":
        positions *= run.model.pipe.vae_scale_factor**2
    if choices.looks and choices.top_k > positions:
        raise ValueError(
            f"top_k is {choices.top_k}, but there are only {positions} positions to choose from"
        )
    for number, layer in enumerate(run.layouts[0].layers):
        if layer.opacity < 1:
            raise ValueError(
                f"{layer_name(number, layer)} has an opacity of {layer.opacity:g}, but Algorithm 1 "
                "knows none; leave it out"
            )
    check_words(run, choices)
    warn_of_hidden_layers(run, choices)


def phases(run: Run, choices: Choices) -> Phases:
    """How the steps are shared out: the first are layered."""
    return Phases("steps", layered=round(choices.layered_fraction * len(run.steps)), alone=0)


# ------------------------------------------------------------------ the model


class Model:
    """What the algorithm asks of Stable Diffusion 1.x and 2.x.

    Each text is encoded once, and alone: a picture must not depend on what else is in the batch.

    Args:
        pipe: holds the models.
        size: height and width of the pictures in pixels.
    """

    distilled = False

    def __init__(self, pipe: StableDiffusionPipeline, size: tuple[int, int]) -> None:
        self.pipe = pipe
        self.like = torch.empty(
            (0, pipe.unet.config.in_channels, *(side // pipe.vae_scale_factor for side in size)),
            device=pipe._execution_device,
            dtype=pipe.unet.dtype,
        )
        self._embeddings: dict[str, Tensor] = {}

    def encode_texts(self, texts: Iterable[str]) -> None:
        """All at once, so that an offloaded text encoder is fetched once and not between steps."""
        for text in texts:
            self.embedding(text)

    def embedding(self, text: str) -> Float[Tensor, "tokens features"]:
        """What the U-Net reads of a text."""
        if text not in self._embeddings:
            scale = (self.pipe.cross_attention_kwargs or {}).get("scale")
            encoded, _ = self.pipe.encode_prompt(text, self.like.device, 1, False, lora_scale=scale)
            encoded = checked_finite(encoded[0], f"the embeddings of {text!r}")
            self._embeddings[text] = encoded.to(self.like)
        return self._embeddings[text]

    def __call__(
        self,
        x: Float[Tensor, "rows channels height width"],
        t: Tensor,
        texts: Sequence[str],
        pictures: Sequence[int],
        conditional: Sequence[bool],
        *,
        watched: bool = True,
    ) -> Float[Tensor, "rows channels height width"]:
        """The U-Net's predictions for rows of noisy latents, each with a text."""
        checked_finite(x, f"the noisy latents at t = {float(t):g}")
        size = self.rows_at_once(x)
        parts = []
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            answers = self.pipe.unet(
                x[rows],
                t,
                encoder_hidden_states=torch.stack([self.embedding(text) for text in texts[rows]]),
                cross_attention_kwargs=self.pipe.cross_attention_kwargs,
                return_dict=False,
            )
            parts.append(answers[0])
        return checked_finite(torch.cat(parts), f"the U-Net's predictions at t = {float(t):g}")

    def rows_at_once(self, x: Float[Tensor, "rows channels height width"]) -> int:
        """How many rows of such latents go through the U-Net at once."""
        return max(1, CELLS_AT_ONCE // (x.shape[-2] * x.shape[-1]))

    def tokens(self, prompt: str) -> PromptTokens:
        """Which tokens of a prompt are which of its words."""
        return PromptTokens(self.pipe, prompt)

    @contextmanager
    def watched_rows(self, prompts: Sequence[str], *, layers: Layers) -> Iterator[AttentionMaps]:
        """Watch the cross-attention of a call of the U-Net with one row for each prompt."""
        unet = self.pipe.unet
        maps = AttentionMaps([self.tokens(prompt) for prompt in prompts], self.like.shape[-2:])
        with _uncompiled(unet), ExitStack() as stack:
            for layer in _cross_attention(unet, _modules(unet), layers).values():
                handle = layer.register_forward_hook(maps.note, with_kwargs=True)
                stack.callback(handle.remove)
            yield maps


# ------------------------------------------------------------------ attention


@dataclass
class AttentionMaps:
    """Where the rows of one call of the U-Net look when they read a word.

    Attributes:
        prompts: the tokens of each row's prompt.
        size: height and width of the latents.
        layers: for each layer softmax(QKᵀ/√d) of each row, the mean over the heads.
    """

    prompts: Sequence[PromptTokens]
    size: tuple[int, int]
    layers: list[Float[Tensor, "rows height_ width_ tokens"]] = field(default_factory=list)

    def note(self, layer: Attention, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook of a cross-attention layer."""
        query, key = layer.to_q(args[0]), layer.to_k(kwargs["encoder_hidden_states"])
        every, (height, width) = range(key.shape[1]), self.size
        while height * width > query.shape[1]:
            height, width = (height + 1) // 2, (width + 1) // 2
        rows = [_maps(layer, query, key, None, row, every) for row in range(len(query))]
        self.layers.append(torch.cat(rows).unflatten(1, (height, width)))

    def pooled(
        self, word: str, *, prompt: int, size: tuple[int, int]
    ) -> Float[Tensor, "1 height width"]:
        """The map of a word of one row's prompt: the sum of its tokens, the mean over layers."""
        columns = self.prompts[prompt].positions(word)
        maps = [layer[None, prompt, :, :, columns].sum(dim=-1) for layer in self.layers]
        return torch.stack([_resized(each, size) for each in maps]).mean(dim=0)


class PromptTokens:
    """The tokens of a prompt, as the pipeline encodes it."""

    def __init__(self, pipe: StableDiffusionPipeline, prompt: str) -> None:
        self.prompt, self._tokenizer = prompt, pipe.tokenizer
        # Textual inversion spells one learnt word as several.
        self._spelled = lambda text: pipe.maybe_convert_prompt(text, pipe.tokenizer)
        read = pipe.tokenizer(self._spelled(prompt), truncation=True)
        self._ids = list(read.input_ids)

    def positions(self, word: str) -> list[int]:
        """Which of them are a word's or a phrase's, everywhere that it stands."""
        ids = self._tokenizer(self._spelled(word), add_special_tokens=False).input_ids
        starts = [n for n in range(len(self._ids)) if ids and self._ids[n : n + len(ids)] == ids]
        if not starts:
            raise WordError(
                f"{excerpt(word)} is not in what the model reads of the prompt {self.prompt!r}"
            )
        return [start + n for start in starts for n in range(len(ids))]


# ------------------------------------------------------------------ the words of a prompt


_NAME_ENDS = re.compile(
    r"[,;.:()]|\b(?:on|in|at|of|with|by|under|over|above|below|behind|beside|near|and|from|to"
    r"|inside|between|through|against|wearing|holding|made)\b"
)
_PICTURE_OF = re.compile(r"^(?:an? |the )?(?:\w+ )?(?:photo|picture|image|painting|drawing) of ")


def _name(prompt: str) -> list[str]:
    """The words up to the first comma or preposition: "a red car" of "a red car on grass"."""
    return _NAME_ENDS.split(_PICTURE_OF.sub("", prompt.lower()))[0].split()


def object_of_layer(layer: Layer) -> str:
    """The word that names a layer's object: its `word`, else the last one of the name."""
    words = [layer.word] if layer.word else _name(layer.prompt)
    if not words:
        raise WordError(f"which word names the object of {excerpt(layer.prompt)}? Give it as word")
    return words[-1]


def colour_of_prompt(prompt: str) -> str | None:
    """The first colour of CSS in the name; None without."""
    return next((word for word in _name(prompt) if word in ImageColor.colormap), None)


# ------------------------------------------------------------------ masks


@dataclass(frozen=True, eq=False)
class Mask:
    """Where something is, pixel by pixel: an array (height, width), stretched to the canvas."""

    array: Bool[Tensor, "height width"]

    @classmethod
    def of(cls, value: Any) -> Mask:
        """Only True and False count: what a grey value means, nobody can tell."""
        array = numpy.asarray(value)
        if array.ndim != 2 or array.dtype != bool:
            raise ValueError(
                f"is of shape {array.shape} and type {array.dtype}, but should be an array "
                "(height, width) of True and False: numpy.asarray(image.convert('L')) > 127"
            )
        if not array.any():
            raise ValueError("is empty: no pixel of it is set")
        return cls(torch.from_numpy(array.copy()))

    def cells(self, height: int, width: int) -> Bool[Tensor, "{height} {width}"]:
        """A cell is covered if half of its area is; else the one that is covered most."""
        covered = functional.adaptive_avg_pool2d(self.array[None].float(), (height, width))[0]
        return covered >= min(0.5, float(covered.max()))

    @property
    def box(self) -> Box:
        """The tight box around the mask."""
        return tight_box(self.array)
