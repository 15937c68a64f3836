"""Layers that can be taken apart, moved and put back: `LayerStack`, and what is done to one.

A stack is never changed: each edit returns another one. The pixels of a layer that is moved,
restacked, hidden or made translucent stay what they are, also where the canvas does not show them.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy
import torch
from PIL import Image, ImageColor

from lrd_helpers.layout import Layout, checked_colour, checked_text
from lrd_helpers.mask import Box, Mask
from lrd_helpers.messages import excerpt, sentence
from lrd_helpers.pictures import picture_of, rgba_of

SEEN = 128
"""From this alpha on a pixel counts as part of its layer."""

FURTHEST = 2**24
"""Pixels that a layer may be away from where it was made: all file formats can hold it."""

GREY = 32
"""Below this saturation, of 255, a colour has no hue."""


class StackError(ValueError):
    """A stack that cannot be, or an edit that cannot be made: one sentence with the layer."""

    def __init__(self, text: str) -> None:
        super().__init__(sentence(text))


@dataclass(frozen=True)
class StackLayer:
    """One layer: what it is, and its pixels.

    Attributes:
        prompt: what the layer shows, "a red car"; empty where nobody said.
        image: RGBA, straight (not premultiplied) colours, complete also where others hide it.
        offset: how far it was moved from where it was made, in pixels to the right and downwards.
        opacity: factor on its alpha, 0 to 1.
        hidden: whether it is left out of the picture.
    """

    prompt: str
    image: Image.Image
    _: KW_ONLY
    offset: tuple[int, int] = (0, 0)
    opacity: float = 1.0
    hidden: bool = False

    def __post_init__(self) -> None:
        called = _called(self.prompt)
        if not isinstance(self.image, Image.Image):
            raise StackError(f"{called}: image is {excerpt(self.image)}, but should be one of PIL")
        if not _is_number(self.opacity) or not 0 <= self.opacity <= 1:
            raise StackError(
                f"{called}: opacity is {excerpt(self.opacity)}, but should be a number from 0 to 1"
            )
        if not _is_offset(self.offset):
            raise StackError(
                f"{called}: offset is {excerpt(self.offset)}, but should be two whole numbers of "
                f"pixels, at most {FURTHEST} away"
            )
        if not isinstance(self.hidden, bool | numpy.bool_):
            raise StackError(
                f"{called}: hidden is {excerpt(self.hidden)}, but should be True or False"
            )
        x, y = self.offset
        checked = {"opacity": float(self.opacity), "offset": (int(x), int(y))}
        checked |= {"prompt": named_text("prompt", self.prompt), "hidden": bool(self.hidden)}
        try:
            checked["image"] = _bare(rgba_of(self.image))
        except ValueError as error:  # 16 bits or floats that no format has
            raise StackError(f"{called}: {error}") from None
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def mask(self) -> Mask | None:
        """Where on the canvas the layer is, whatever lies in front; None where it is empty."""
        alpha = torch.from_numpy(numpy.array(self.shown().getchannel("A")))
        return Mask.of(alpha >= SEEN) if bool((alpha >= SEEN).any()) else None

    @property
    def box(self) -> Box | None:
        """x0, y0, x1, y1 in [0, 1] around `mask`; None where the layer is empty."""
        return None if (mask := self.mask) is None else mask.box

    def shown(self) -> Image.Image:
        """The pixels where they were moved to; what left the canvas is not there."""
        if self.offset == (0, 0):
            return self.image
        moved = Image.new("RGBA", self.image.size)
        moved.paste(self.image, self.offset)
        return moved


@dataclass(frozen=True)
class LayerStack:
    """A background, layers in front of it, and the picture that the model made of them.

    Attributes:
        background: opaque, RGB; laid on white where it is transparent.
        layers: the furthest back first.
        caption: the whole picture in words.
        background_prompt: what the background shows.
        composite: the picture that was predicted beside the layers, or that the layers were taken
            from, RGB; None where there is none. Edits leave it as it is: `flatten` is the picture
            of now.
    """

    background: Image.Image
    layers: tuple[StackLayer, ...]
    _: KW_ONLY
    caption: str = ""
    background_prompt: str = ""
    composite: Image.Image | None = None

    def __post_init__(self) -> None:
        for name in ("background", "composite"):
            if name == "background" or self.composite is not None:
                try:
                    picture = _bare(picture_of(getattr(self, name)))
                except ValueError as error:
                    raise StackError(f"{name}: {error}") from None
                object.__setattr__(self, name, picture)
        object.__setattr__(self, "layers", tuple(self.layers))
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, StackLayer):
                raise StackError(f"layer {number} is {excerpt(layer)}, but should be a StackLayer")
            self._check_size(_called(layer.prompt), layer.image)
        if self.composite is not None:
            self._check_size("composite", self.composite)
        for name in ("caption", "background_prompt"):
            object.__setattr__(self, name, named_text(name, getattr(self, name)))

    def _check_size(self, called: str, image: Image.Image) -> None:
        if image.size != self.size:
            raise StackError(
                f"{called} is {image.width} × {image.height}, but the background is "
                f"{self.background.width} × {self.background.height}; resize it"
            )

    # -------------------------------------------------------------- looking

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as PIL has them."""
        return self.background.size

    def flatten(self) -> Image.Image:
        """The layers that are not hidden laid over the background, back to front: RGB.

        x ← a·c + (1 − a)·x, a = opacity · α  (*over*, Porter & Duff 1984).
        """
        picture = numpy.asarray(self.background, dtype=numpy.float32)
        for layer in self.layers:
            if not layer.hidden:
                pixels = numpy.asarray(layer.shown(), dtype=numpy.float32)
                alpha = layer.opacity * pixels[..., 3:] / 255
                picture = alpha * pixels[..., :3] + (1 - alpha) * picture
        return Image.fromarray(picture.round().astype(numpy.uint8))

    def layout(self) -> Layout:
        """Caption, background and boxes of the layers that show something, as a `Layout`.

        Raises:
            LayoutError: there is no such layer, or no caption.
        """
        layers = [
            {"prompt": layer.prompt, "box": box, "opacity": layer.opacity}
            for layer in self.layers
            if layer.prompt and not layer.hidden and (box := layer.box) is not None
        ]
        return Layout(self.caption, background=self.background_prompt, layers=layers)

    def number(self, layer: int | str) -> int:
        """Which layer is meant: its number, counted from 0 (the furthest back), or its prompt.

        Raises:
            StackError: there is none, or several have this prompt.
        """
        if isinstance(layer, numbers.Integral) and not isinstance(layer, bool):
            if not -len(self.layers) <= layer < len(self.layers):
                raise StackError(f"there is no layer {layer}; the stack has {self._numbers()}")
            return int(layer) % len(self.layers)
        prompts = [each.prompt for each in self.layers]
        if prompts.count(layer) != 1:
            if layer in prompts:
                same = [n for n, prompt in enumerate(prompts) if prompt == layer]
                raise StackError(f"{excerpt(layer)} is the prompt of layers {same}; give a number")
            near = difflib.get_close_matches(str(layer)[:50], prompts, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; it has {self._numbers()}"
            raise StackError(f"no layer of the stack is {excerpt(layer)}{meant}")
        return prompts.index(layer)

    def _numbers(self) -> str:
        named = [f"{n} ({each.prompt})" for n, each in enumerate(self.layers)]
        return ", ".join(named) or "no layers"

    # -------------------------------------------------------------- edits

    def changed(self, layer: int | str, **changes: object) -> LayerStack:
        """With other attributes of one layer, such as `opacity=0.5` or `hidden=True`."""
        number, layers = self.number(layer), list(self.layers)
        layers[number] = replace(layers[number], **changes)
        return replace(self, layers=tuple(layers))

    def moved(self, layer: int | str, by: tuple[float, float]) -> LayerStack:
        """One layer moved to the right and downwards, in shares of the canvas.

        By whole pixels, so that the layer's pixels stay equal: moved back, it is what it was.

        Raises:
            StackError: not two finite numbers, or too far (`FURTHEST`).
        """
        number = self.number(layer)
        if not _is_pair(by) or not all(_is_number(share) and math.isfinite(share) for share in by):
            raise StackError(
                f"by is {excerpt(by)}, but should be two numbers, (0.1, 0) for example"
            )
        x, y = (
            start + round(share * side)
            for start, share, side in zip(self.layers[number].offset, by, self.size, strict=True)
        )
        return self.changed(number, offset=(x, y))

    def restacked(self, order: Sequence[int | str]) -> LayerStack:
        """The layers in another order, the furthest back first.

        Raises:
            StackError: a layer is left out or named twice.
        """
        numbers = [self.number(layer) for layer in order]
        if sorted(numbers) != list(range(len(self.layers))):
            raise StackError(f"the order {list(order)} should name each of {self._numbers()} once")
        return replace(self, layers=tuple(self.layers[number] for number in numbers))

    def without(self, layer: int | str) -> LayerStack:
        """One layer fewer; what it hid is seen."""
        number = self.number(layer)
        return replace(self, layers=self.layers[:number] + self.layers[number + 1 :])

    def added(self, layer: StackLayer, at: int | None = None) -> LayerStack:
        """One layer more, in front of all or as number `at`, counted from 0 (the furthest back).

        Raises:
            StackError: another size, or no such place.
        """
        at = len(self.layers) if at is None else at
        if at not in range(len(self.layers) + 1):
            raise StackError(f"at is {excerpt(at)}, but should be 0 to {len(self.layers)}")
        return replace(self, layers=(*self.layers[:at], layer, *self.layers[at:]))

    def recoloured(self, layer: int | str, colour: str) -> LayerStack:
        """One layer in another colour: outlines, shades and alpha stay.

        In HSV: each pixel's hue turns as far as from the layer's main colour to `colour`, and its
        saturation and value are multiplied by the ratio of theirs. Of a grey or white layer the
        grey pixels take hue and saturation of `colour`. Black stays black.

        Args:
            layer: not empty, its main colour not black.
            colour: a CSS name, or a hex like "#ff8800".

        Raises:
            StackError: an empty or black layer, or no colour.
        """
        number = self.number(layer)
        image, called = self.layers[number].image, _called(self.layers[number].prompt)
        pixels = numpy.asarray(image)
        solid = pixels[..., 3] >= SEEN
        if not solid.any():
            raise StackError(f"{called} is empty: it has no colour")
        try:
            wanted = ImageColor.getrgb(checked_colour(colour))[:3]
        except ValueError as error:
            raise StackError(f"colour {error}") from None
        hsv, old, new = map(_hsv, (pixels[..., :3], _main_colour(pixels[solid][:, :3]), wanted))
        if old[2] < GREY / 2:
            raise StackError(f"{called} is black, and black stays black in every other colour")
        if old[1] < GREY:
            hsv[hsv[..., 1] < GREY, :2] = new[:2]
        else:
            hsv[..., 0] += new[0] - old[0]
            hsv[..., 1] *= new[1] / old[1]
        hsv[..., 2] *= new[2] / old[2]
        hsv[..., 0] %= 256
        rgb = Image.fromarray(hsv.round().clip(0, 255).astype(numpy.uint8), "HSV").convert("RGB")
        rgb.putalpha(image.getchannel("A"))
        return self.changed(number, image=rgb)


def check_stack(stack: object) -> None:
    """Refuse what is no stack, such as a picture."""
    if not isinstance(stack, LayerStack):
        raise TypeError(f"stack is of type {type(stack).__name__}, but should be a LayerStack")


def _hsv(colours: object) -> numpy.ndarray:
    """Hue, saturation and value, 0 to 255, in the shape of the RGB colours (…, 3)."""
    rgb = numpy.asarray(colours, dtype=numpy.uint8)
    image = Image.fromarray(numpy.ascontiguousarray(rgb.reshape(-1, 1, 3))).convert("HSV")
    return numpy.asarray(image, dtype=numpy.float32).reshape(rgb.shape)


def _main_colour(pixels: numpy.ndarray) -> numpy.ndarray:
    """The colour of the largest of 8 × 8 × 8 bins: not the outline's, not the mean of both."""
    bins = (pixels // 32).astype(int) @ [64, 8, 1]
    return pixels[bins == numpy.bincount(bins).argmax()].mean(0).round().astype(numpy.uint8)


def _called(prompt: object) -> str:
    return f"layer {excerpt(prompt, 24)}" if prompt else "a layer"


def named_text(name: str, value: object) -> str:
    """As `checked_text`; the message says of what.

    Raises:
        StackError: no text.
    """
    try:
        return checked_text(value)
    except ValueError as error:
        raise StackError(f"{name} {error}") from None


def _bare(image: Image.Image) -> Image.Image:
    """Without what the image's file said beside the pixels: equal pixels are equal images."""
    image.info = {}
    return image


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_pair(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _is_offset(value: object) -> bool:
    whole = numbers.Integral
    return _is_pair(value) and all(
        isinstance(step, whole) and not isinstance(step, bool) and abs(step) <= FURTHEST
        for step in value
    )
