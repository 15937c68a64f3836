"""Text, layouts or a picture to layers: `LayerDiffPipeline`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lrd_helpers.layerdiff.alpha import RGBA, decode_layers, encode_layers, over
from lrd_helpers.layerdiff.stack import LayerStack, StackLayer, check_stack, named_text
from lrd_helpers.layerdiff.unet import (
    MOST_LAYERS,
    LayeredUNet2DConditionModel,
    Stacks,
    slot_identities,
)
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.messages import excerpt
from lrd_helpers.methods.guidance import NORM, vision_guidance
from lrd_helpers.methods.layerdiff import StackRun, layer_denoising
from lrd_helpers.methods.regions import layer_name
from lrd_helpers.naming import colour_of_prompt
from lrd_helpers.pictures import Picture, picture_of, rgba_of
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.sampling.model import checked_finite
from lrd_helpers.sampling.run import returned_latents
from lrd_helpers.sampling.steps import (
    Generators,
    Steps,
    check_count,
    check_generators,
    check_scheduler,
    finite_number,
)
from lrd_helpers.words import warn_of_texts

with quiet_libraries():
    from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor
    from PIL import ImageColor
    from transformers import CLIPTextModel, CLIPTokenizer

SEEN_AGAIN = 0.5
"""How much of a painted ξ each step sees again, and only where the layer should not be."""

LEAST = 0.004
"""A layer nobody named is dropped if its alpha covers less of the canvas: 8 × 8 of 128 × 128."""

Fixed = Mapping[int | Literal["background", "composite"], Picture]


@dataclass(frozen=True)
class StackPrompts:
    """What one stack should show.

    Attributes:
        caption: the composite's prompt.
        background: the background's.
        layers: of each layer, the furthest back first; "" where nobody says.
        places: the layers of a `Layout`, whose boxes or masks guide the slots; () without.
        fixed: the pictures that are given, by layer number, "background" or "composite".
    """

    caption: str
    background: str
    layers: tuple[str, ...]
    places: tuple[Layer, ...] = ()
    fixed: Fixed | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt of each slot."""
        return (self.background, *self.layers, self.caption)

    @property
    def named_texts(self) -> list[tuple[str, str]]:
        """Each prompt after what messages call it."""
        layers = [(f"layer {n + 1} {text!r}", text) for n, text in enumerate(self.layers)]
        return [("caption", self.caption), ("background", self.background), *layers]

    def negatives(self, usual: str) -> tuple[str, ...]:
        """The negative prompt of each slot: that of a layout's layer comes before the usual."""
        layers = [each.negative_prompt for each in self.places] or [None] * len(self.layers)
        return (usual, *(usual if each is None else each for each in layers), usual)


@dataclass
class LayerDiffOutput(BaseOutput):
    """What `LayerDiffPipeline` returns.

    Attributes:
        stacks: a `LayerStack` a picture; or, as `output_type` says, for each picture a tensor
            ("pt": RGBA in [0, 1]; "latent": scaled latents) or an array ("np", channels last) of
            all slots: background, layers back to front, composite.
    """

    stacks: list[LayerStack] | list[Tensor] | list[np.ndarray]


class LayerDiffPipeline(DiffusionPipeline):
    """Layers that are generated together, by a trained layered U-Net (after LayerDiff).

    Everything but the calls is diffusers': `from_pretrained`, `save_pretrained`, `to`, offloading.

    Args:
        vae: an autoencoder of layers, with four channels (colours and alpha).
        text_encoder: of all prompts.
        tokenizer: likewise.
        unet: draws background, layers and composite in slots that hear each other.
        scheduler: of any kind that predicts ε, x_0 or v.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: LayeredUNet2DConditionModel,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        cells = self.unet.config.unet_config["sample_size"]
        height, width = (cells, cells) if isinstance(cells, int) else cells
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`: no further step is made."""
        return self._interrupt

    # -------------------------------------------------------------- the call

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Layout | Sequence[str | Layout] = "",
        *,
        layers: Sequence[str] | Literal["auto"] = "auto",
        background: str = "",
        image: Picture | None = None,
        fixed: Fixed | None = None,
        num_inference_steps: int = 15,
        guidance_scale: float = 3.0,
        guide_from: Literal["alone", "together"] = "alone",
        self_mask_scale: float = 0.0,
        inside: float = 0.5,
        outside: float = 0.5,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        output_type: Literal["pil", "pt", "np", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
    ) -> LayerDiffOutput | tuple:
        """Draw stacks: text → layers, a layout → layers, a picture → layers, and what is between.

        Args:
            prompt: the caption of the whole picture, or a layout, whose boxes (or masks) guide its
                layers; or several of them.
            layers: a prompt for each layer, the furthest back first; "auto" asks for as many as the
                model has, and drops those that stay empty. A layout has its own.
            background: what is behind all layers. A layout has its own.
            image: the picture to be taken apart: it is the composite, and given.
            fixed: other pictures that are given, by the layer's number from 0 (an image of PIL with
                alpha) or "background". They are not drawn: they come back pixel for pixel.
            num_inference_steps: T.
            guidance_scale: γ of classifier-free guidance; off where γ ≤ 1.
            guide_from: what guidance leads away from: "alone", a slot without prompt and without
                the others, so that they agree better; "together", without prompts only.
            self_mask_scale: s of self-mask guidance; 0 = off. It costs half as much again.
            inside: how strongly ξ says where a layer's object is, for layouts.
            outside: how strongly ξ says where it is not.
            negative_prompt: in place of the empty prompt, for all slots. A layout's layer may have
                another.
            num_images_per_prompt: stacks for each prompt.
            eta: η of DDIM.
            generator: where the noise comes from; a list has one for each stack.
            output_type: see `LayerDiffOutput`.
            return_dict: False gives a tuple (stacks,).
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": …}) after each step,
                with latents "pictures slots channels height width"; may return others, or set
                `pipe._interrupt`.

        Raises:
            ValueError: an argument that cannot work, before the first U-Net call; or numbers that
                are not finite.
        """
        several = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        given = given_by(image, fixed)
        wanted = [self._wanted(each, layers, background, given) for each in several]
        if not wanted:
            raise ValueError("prompt is empty; give a caption, a layout, or a list of them")
        self._check(num_inference_steps, num_images_per_prompt, generator, len(wanted))
        check_output(output_type, callback_on_step_end)
        if guide_from not in ("alone", "together"):
            raise ValueError(f"guide_from is {guide_from!r}, but should be 'alone' or 'together'")
        strengths = {
            "guidance_scale": guidance_scale,
            "self_mask_scale": self_mask_scale,
            "inside": inside,
            "outside": outside,
        }
        strengths = {name: finite_number(name, value) for name, value in strengths.items()}
        negative = named_text("negative_prompt", negative_prompt or "")
        texts = [text for each in wanted for text in each.named_texts]
        warn_of_texts(self.tokenizer, texts, stacklevel=5)
        wanted = [each for each in wanted for _ in range(num_images_per_prompt)]
        steps = Steps(
            self.scheduler,
            num_inference_steps,
            device=self._execution_device,
            eta=eta,
            generator=generator,
        )
        with self._drawing():
            run = self._begin(wanted, steps, negative, strengths["inside"], strengths["outside"])
            run.guidance_scale = strengths["guidance_scale"]
            run.guide_from = guide_from
            run.self_mask_scale = strengths["self_mask_scale"]
            latents = self._denoised(run, callback_on_step_end)
            stacks = self._stacks(wanted, latents, output_type)
        return LayerDiffOutput(stacks=stacks) if return_dict else (stacks,)

    # -------------------------------------------------------------- with a stack that is there

    def decompose(
        self, image: Picture, layers: Sequence[str] | Literal["auto"] = "auto", **options: Any
    ) -> LayerStack:
        """A picture taken apart: image → layers.

        Args:
            image: of the model's size.
            layers: what is in it, the furthest back first; "auto": that is to be found.
            options: of `__call__`, such as `prompt` (the caption) and `background`.
        """
        return self._one_stack(layers=layers, image=image, **options)

    def redraw(
        self, stack: LayerStack, layer: int | str, prompt: str | None = None, **options: Any
    ) -> LayerStack:
        """One layer generated anew; all other layers and the background stay, pixel for pixel.

        Args:
            stack: hidden layers stay hidden, and the model does not see them.
            layer: its number or its prompt.
            prompt: what the layer should show now; None: what it showed.
            options: of `__call__`, such as `generator` and `guidance_scale`.
        """
        check_stack(stack)
        number = stack.number(layer)
        text = named_text("prompt", stack.layers[number].prompt if prompt is None else prompt)
        asked = replace(
            stack.changed(number, prompt=text, offset=(0, 0), hidden=False),
            caption=recaptioned(stack, number, text),
        )
        shown = [n for n, each in enumerate(asked.layers) if not each.hidden]
        fixed = {place: _visible(asked.layers[n]) for place, n in enumerate(shown) if n != number}
        drawn = self._one_stack(
            prompt=asked.caption,
            layers=[asked.layers[n].prompt for n in shown],
            background=asked.background_prompt,
            fixed={"background": asked.background, **fixed},
            **options,
        )
        new = drawn.layers[shown.index(number)].image
        return replace(asked.changed(number, image=new), composite=drawn.composite)

    def add_layer(
        self, stack: LayerStack, prompt: str, at: int | None = None, **options: Any
    ) -> LayerStack:
        """One more layer, generated for the stack; all others stay, pixel for pixel.

        Args:
            stack: of fewer layers than the model has.
            prompt: what the new layer shows.
            at: its number; None: in front of all.
            options: of `__call__`.
        """
        check_stack(stack)
        at = len(stack.layers) if at is None else at
        empty = StackLayer(prompt, Image.new("RGBA", stack.size))
        caption = f"{prompt} and {stack.caption}" if stack.caption else prompt
        return self.redraw(replace(stack.added(empty, at), caption=caption), at, **options)

    @torch.inference_mode(False)
    @torch.no_grad()
    def harmonise(
        self,
        stack: LayerStack,
        strength: float = 0.5,
        *,
        num_inference_steps: int = 15,
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
    ) -> Image.Image:
        """The stack as one coherent picture: flattened, noised, and drawn to the end by the model.

        The composite's slot begins at `strength` of the steps with the flattened picture under
        noise; the layers stand clean in theirs, and guide it (as DreamLayer, whose layers are
        pasted; SDEdit: Meng et al. 2022).

        Args:
            strength: 0 keeps the flattened picture, 1 draws anew from the layers alone.
        """
        check_stack(stack)
        guidance_scale = finite_number("guidance_scale", guidance_scale)
        if not 0 <= finite_number("strength", strength) <= 1:
            raise ValueError(f"strength is {strength}, but should be 0 to 1")
        flat = stack.flatten()
        shown = [layer for layer in stack.layers if not layer.hidden]
        fixed = {number: _visible(layer) for number, layer in enumerate(shown)}
        texts = tuple(layer.prompt for layer in shown)
        given = {"background": stack.background, **fixed}
        wanted = self._wanted(stack.caption, texts, stack.background_prompt, given)
        self._check(num_inference_steps, 1, generator, 1)
        steps = Steps(
            self.scheduler, num_inference_steps, device=self._execution_device, generator=generator
        )
        start = steps.late_start(1 - strength) if strength < 1 else 0
        if start == len(steps):
            return flat
        with self._drawing():
            run = self._begin([wanted], steps, "", 0.0, 0.0)
            run.guidance_scale = guidance_scale
            if start:
                clean = run.clean.clone()
                clean[:, -1] = self._encoded(_rgba(flat))
                rows = steps.begin_at(start, clean.flatten(0, 1), run.x.flatten(0, 1))
                run.x = rows.unflatten(0, run.x.shape[:2])
            latents = self._denoised(run, None, start)
            return self._stacks([wanted], latents, "pil")[0].composite

    def _one_stack(self, **options: Any) -> LayerStack:
        """What a call makes, where that is a single stack."""
        if taken := options.keys() & {"num_images_per_prompt", "output_type", "return_dict"}:
            raise ValueError(f"{min(taken)}: one LayerStack is drawn here; leave it out")
        if isinstance(options.get("prompt"), (list, tuple)):
            raise ValueError("prompt is a list, but one LayerStack is drawn here; give one caption")
        return self(**options).stacks[0]

    # -------------------------------------------------------------- what is asked for

    def _wanted(
        self,
        prompt: str | Layout,
        layers: Sequence[str] | Literal["auto"],
        background: str,
        fixed: Fixed,
    ) -> StackPrompts:
        """The prompts of one stack, checked; of a layer that is given, it may be empty."""
        if isinstance(prompt, Layout):
            if layers != "auto" or background:
                raise ValueError(
                    "a layout has its own layers and background; leave out "
                    f"{'layers' if layers != 'auto' else 'background'}"
                )
            check_places(prompt)
            texts = tuple(layer.prompt for layer in prompt.layers)
            wanted = StackPrompts(prompt.caption, prompt.background, texts, prompt.layers, fixed)
        elif isinstance(prompt, str):
            if isinstance(layers, str) and layers == "auto":
                texts = ("",) * MOST_LAYERS
            elif not is_list_of_texts(layers):
                raise ValueError(
                    f"layers is {excerpt(layers)}, but should be a list of prompts or 'auto'"
                )
            else:
                texts = tuple(named_text(f"layer {n + 1}", text) for n, text in enumerate(layers))
                nobody = [n for n, text in enumerate(texts) if not text and n not in fixed]
                if nobody:
                    raise ValueError(
                        f"layer {nobody[0] + 1} has an empty prompt; say what it shows, leave it "
                        "out, or use layers='auto'"
                    )
            caption = named_text("prompt", prompt)
            wanted = StackPrompts(caption, named_text("background", background), texts, fixed=fixed)
        else:
            raise ValueError(f"prompt is {excerpt(prompt)}, but should be a text or a Layout")
        if len(wanted.layers) > MOST_LAYERS:
            raise ValueError(
                f"{len(wanted.layers)} layers: the model was trained for up to {MOST_LAYERS}; draw "
                "some of them later, with add_layer on the flattened stack as background"
            )
        return replace(wanted, fixed=checked_fixed(wanted, self.size))

    def _check(self, steps: int, pictures: int, generator: Generators, prompts: int) -> None:
        check_scheduler(self.scheduler)
        check_count("num_inference_steps", steps, self.scheduler.config.num_train_timesteps)
        check_count("num_images_per_prompt", pictures)
        check_generators(generator, prompts * pictures)

    # -------------------------------------------------------------- the run

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """After it, come what may, models that are offloaded are back where they were."""
        try:
            yield
        finally:
            self.maybe_free_model_hooks()

    def _begin(
        self,
        wanted: Sequence[StackPrompts],
        steps: Steps,
        negative: str,
        inside: float,
        outside: float,
    ) -> StackRun:
        """Texts, noise, given slots and ξ of stacks, filled up to the largest one's slots."""
        slots = max(len(each.layers) for each in wanted) + 2
        device, dtype = self._execution_device, self.unet.dtype
        height, width = (side // self.vae_scale_factor for side in self.size)
        shape = (len(wanted), slots, self.unet.config.unet_config["in_channels"], height, width)
        empty = self._encoded(torch.zeros(1, 4, *self.size))[0]
        present = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        identities = torch.zeros(shape[:2], dtype=torch.long, device=device)
        given, clean = present.clone(), torch.zeros(shape, device=device, dtype=dtype)
        x, painted, seen = clean.clone(), clean.clone(), clean.clone()
        for row, each in enumerate(wanted):
            count = len(each.layers) + 2
            present[row, :count] = True
            identities[row, :count] = slot_identities(count - 2).to(device)
            generator = steps.generator
            if isinstance(generator, Sequence):
                generator = generator[row]
            x[row, :count] = randn_tensor((count, *shape[2:]), generator, device, dtype)
            for slot, rgba in given_pictures(each).items():
                given[row, slot] = True
                clean[row, slot] = self._encoded(rgba)[0]
            for slot, place in enumerate(each.places, start=1):
                cells = place.cells(height, width).to(empty)
                delta = place.strength * self._delta(place, empty)
                painted[row, slot] = vision_guidance(delta, cells, inside, outside)
                seen[row, slot] = vision_guidance(delta, cells, 0.0, SEEN_AGAIN * outside)
        text = torch.stack(
            [
                self._read([texts + ("",) * (slots - len(texts)) for texts in asked])
                for asked in ([w.negatives(negative) for w in wanted], [w.texts for w in wanted])
            ]
        )
        painted[given] = seen[given] = 0
        return StackRun(
            unet=self.unet,
            steps=steps,
            text=text,
            identities=identities,
            present=present,
            given=given,
            clean=clean,
            x=(x + painted) * self.scheduler.init_noise_sigma,
            empty=empty,
            xi=seen if seen.any() else None,
        )

    def _denoised(self, run: StackRun, callback: Callable | None, start: int = 0) -> Stacks:
        self._interrupt = False
        x = run.x
        with self.progress_bar(total=len(run.steps) - start) as progress:
            for state in layer_denoising(run, start):
                if callback is not None:
                    changed = callback(self, state.i, state.t, {"latents": state.x})
                    state.x = returned_latents({} if changed is None else changed, state.x)
                x = state.x
                progress.update()
                if self.interrupt:
                    break
        return checked_finite(x, "the latents")

    def _read(self, texts: Sequence[Sequence[str]]) -> Float[Tensor, "batch slots tokens width"]:
        """The embeddings of each slot's prompt."""
        flat = [text for stack in texts for text in stack]
        known = list(dict.fromkeys(flat))
        tokens = self.tokenizer(
            known, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        embeddings = self.text_encoder(tokens.to(self._execution_device))[0]
        rows = [known.index(text) for text in flat]
        return embeddings[rows].unflatten(0, (len(texts), -1))

    def _encoded(self, rgba: RGBA) -> Float[Tensor, "batch channels height width"]:
        rgba = rgba.to(self._execution_device, self.vae.dtype)
        return encode_layers(self.vae, rgba).to(self.unet.dtype)

    def _delta(
        self, layer: Layer, empty: Float[Tensor, "channels height width"]
    ) -> Float[Tensor, "channels"]:
        """δ from an empty layer's latent to an opaque one's of the layer's colour, or grey."""
        colour = layer.colour or colour_of_prompt(layer.prompt) or "grey"
        rgb = torch.tensor(ImageColor.getrgb(colour)[:3]) / 255
        flat = torch.cat([rgb, torch.ones(1)])[None, :, None, None].expand(1, 4, *self.size)
        way = self._encoded(flat)[0].mean((1, 2)) - empty.mean((1, 2))
        return NORM * torch.nn.functional.normalize(way.float(), dim=0).to(empty)

    # -------------------------------------------------------------- what comes out

    def _stacks(
        self, wanted: Sequence[StackPrompts], latents: Stacks, output_type: str
    ) -> list[LayerStack] | list[Tensor] | list[np.ndarray]:
        kept = [rows[: len(each.texts)] for rows, each in zip(latents, wanted, strict=True)]
        if output_type == "latent":
            return kept
        pixels = [decode_layers(self.vae, rows.to(self.vae.dtype)).cpu() for rows in kept]
        for rgba, each in zip(pixels, wanted, strict=True):
            checked_finite(rgba, "the pixels from the autoencoder")
            for slot, picture in given_pictures(each).items():
                rgba[slot] = picture[0]
        if output_type == "pt":
            return pixels
        if output_type == "np":
            return [rgba.movedim(1, -1).numpy() for rgba in pixels]
        return [stack_of(each, rgba) for each, rgba in zip(wanted, pixels, strict=True)]


# ------------------------------------------------------------------ pictures and slots


def stack_of(wanted: StackPrompts, rgba: Float[Tensor, "slots 4 height width"]) -> LayerStack:
    """Pixels of all slots as a stack; a layer nobody named is dropped where it is empty."""
    layers = []
    for number, (text, pixels) in enumerate(zip(wanted.layers, rgba[1:-1], strict=True)):
        if not text and float(pixels[3].mean()) < LEAST:
            continue
        opacity = wanted.places[number].opacity if wanted.places else 1.0
        layers.append(StackLayer(text, _image_of(pixels), opacity=opacity))
    ends = [_image_of(over(rgba[slot], 1.0)) for slot in (0, -1)]
    return LayerStack(
        ends[0],
        tuple(layers),
        caption=wanted.caption,
        background_prompt=wanted.background,
        composite=ends[1],
    )


def given_pictures(wanted: StackPrompts) -> dict[int, Float[Tensor, "1 4 height width"]]:
    """The given pictures as RGBA, by slot: background 0, layers from 1 on, composite −1."""
    slots = {"background": 0, "composite": len(wanted.texts) - 1}
    return {
        slots[place] if isinstance(place, str) else place + 1: _rgba(image)
        for place, image in (wanted.fixed or {}).items()
    }


def check_places(layout: Layout) -> None:
    """Refuse what a layered model's slots do not heed, in a sentence."""
    for number, layer in enumerate(layout.layers):
        if layer.start != 0 or layer.end is not None:
            raise ValueError(
                f"{layer_name(number, layer)} starts or ends late, but slots are drawn from the "
                "first step to the last; leave out start and end"
            )


def check_output(output_type: str, callback: Callable | None) -> None:
    """Refuse another type than `LayerDiffOutput` has, and callbacks that slots cannot obey."""
    if output_type not in ("pil", "pt", "np", "latent"):
        raise ValueError(
            f"output_type is {output_type!r}, but should be 'pil', 'pt', 'np' or 'latent'"
        )
    theirs = isinstance(callback, (PipelineCallback, MultiPipelineCallbacks))
    if callback is not None and (theirs or not callable(callback)):
        raise ValueError(
            f"callback_on_step_end is {excerpt(callback)}, but should be a function f(pipe, step, "
            "timestep, tensors); callbacks of diffusers change prompts, which a stack has many of"
        )


def is_list_of_texts(layers: object) -> bool:
    """Whether it has an order and nothing but texts."""
    listed = isinstance(layers, Sequence) and not isinstance(layers, str)
    return listed and all(isinstance(text, str) for text in layers)


def given_by(image: Picture | None, fixed: Fixed | None) -> Fixed:
    """All pictures that are given, by layer number, "background" or "composite"."""
    if fixed is not None and not isinstance(fixed, Mapping):
        raise ValueError(
            f"fixed is {excerpt(fixed)}, but should be a dict of pictures, such as "
            '{0: image} or {"background": image}'
        )
    given = dict(fixed or {})
    if image is not None and given.setdefault("composite", image) is not image:
        raise ValueError("image is the composite, and fixed has another; give one of them")
    return given


def checked_fixed(wanted: StackPrompts, size: tuple[int, int]) -> dict[int | str, Image.Image]:
    """The given pictures, upright: RGBA of layers, RGB of the others.

    Raises:
        ValueError: a slot that is not there, no picture, or one of another size than is drawn.
    """
    numbers, checked = range(len(wanted.layers)), {}
    for place, picture in (wanted.fixed or {}).items():
        whole = isinstance(place, Integral) and not isinstance(place, bool)
        if place not in ("background", "composite") and not (whole and place in numbers):
            raise ValueError(
                f"fixed has a picture for {excerpt(place)}, but there are 'background', "
                f"'composite' and layers {list(numbers)}"
            )
        called = f"the picture of {f'layer {place}' if whole else place}"
        kinds = Image.Image if whole else (Image.Image, Tensor, np.ndarray)
        if not isinstance(picture, kinds):
            raise ValueError(f"{called} is {excerpt(picture)}, but should be an image of PIL")
        try:
            image = rgba_of(picture) if whole else picture_of(picture)
        except ValueError as error:
            raise ValueError(f"{called}: {error}") from None
        if image.size != size[::-1]:
            raise ValueError(
                f"{called} is {image.width} × {image.height}, but should be {size[1]} × "
                f"{size[0]}; resize it"
            )
        checked[place] = image
    return checked


def recaptioned(stack: LayerStack, number: int, prompt: str) -> str:
    """The caption with another prompt of a layer, where its prompt stands there."""
    old = stack.layers[number].prompt
    places = [*re.finditer(rf"(?<!\w){re.escape(old)}(?!\w)", stack.caption)] if old else []
    alike = sum(layer.prompt == old for layer in stack.layers[:number])
    if not places:
        return stack.caption
    first, last = places[min(alike, len(places) - 1)].span()
    return stack.caption[:first] + prompt + stack.caption[last:]


def _visible(layer: StackLayer) -> Image.Image:
    """A layer's pixels where they were moved to, its opacity in their alpha."""
    image = layer.shown()
    if layer.opacity < 1:
        image = image.copy()
        image.putalpha(image.getchannel("A").point(lambda a: round(layer.opacity * a)))
    return image


def _rgba(image: Image.Image) -> Float[Tensor, "1 4 height width"]:
    pixels = np.array(image.convert("RGBA"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _image_of(pixels: Float[Tensor, "channels height width"]) -> Image.Image:
    """Pixels in [0, 1] of three or four channels as an image."""
    return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())
