"""Layers that can be taken apart, moved and put back: `LayerStack`, and what is done to one.

A stack is never changed: each edit returns another one. The pixels of a layer that is moved,
restacked, hidden or made translucent stay what they are, also where the canvas does not show them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy
import torch
from PIL import Image, ImageColor

from lrd_helpers.layout import Layout, checked_text
from lrd_helpers.mask import Box, Mask
from lrd_helpers.messages import excerpt
from lrd_helpers.pictures import picture_of, upright

SEEN = 128
"""From this alpha on a pixel counts as part of its layer."""


class StackError(ValueError):
    """A stack that cannot be, or an edit that cannot be made: one sentence with the layer."""


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
        if not isinstance(self.image, Image.Image):
            raise StackError(f"{_called(self.prompt)} has no image of PIL")
        checked_text(self.prompt)
        if not 0 <= self.opacity <= 1:
            raise StackError(
                f"{_called(self.prompt)}: opacity is {self.opacity}, but should be 0 to 1"
            )
        object.__setattr__(self, "image", upright(self.image).convert("RGBA"))

    @property
    def mask(self) -> Mask | None:
        """Where on the canvas the layer is, whatever lies in front; None where it is empty."""
        alpha = torch.from_numpy(numpy.array(self.shown().getchannel("A")))
        return Mask.of(alpha >= SEEN) if bool((alpha >= SEEN).any()) else None

    @property
    def box(self) -> Box | None:
        """x0, y0, x1, y1 in [0, 1] around `mask`; None where the layer is empty."""
        mask = self.mask
        return None if mask is None else mask.box

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
        background: opaque, RGB.
        layers: the furthest back first.
        caption: the whole picture in words.
        background_prompt: what the background shows.
        composite: the picture that was predicted beside the layers, or that the layers were taken
            from; None where there is none. Edits leave it as it is: `flatten` is what is now.
    """

    background: Image.Image
    layers: tuple[StackLayer, ...]
    _: KW_ONLY
    caption: str = ""
    background_prompt: str = ""
    composite: Image.Image | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "background", picture_of(self.background))
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            if layer.image.size != self.background.size:
                raise StackError(
                    f"{_called(layer.prompt)} is {_size(layer.image)}, but the background is "
                    f"{_size(self.background)}; resize it"
                )
        for name in ("caption", "background_prompt"):
            checked_text(getattr(self, name))

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
            {"prompt": layer.prompt, "box": layer.box, "opacity": layer.opacity}
            for layer in self.layers
            if layer.box is not None and layer.prompt and not layer.hidden
        ]
        return Layout(self.caption, background=self.background_prompt, layers=layers)

    def number(self, layer: int | str) -> int:
        """Which layer is meant: its number, counted from 0 (the furthest back), or its prompt.

        Raises:
            StackError: there is none, or several have this prompt.
        """
        if isinstance(layer, int) and not isinstance(layer, bool):
            if not -len(self.layers) <= layer < len(self.layers):
                raise StackError(f"there is no layer {layer}; the stack has {self._numbers()}")
            return layer % len(self.layers)
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
        """
        number = self.number(layer)
        steps = [round(share * side) for share, side in zip(by, self.size, strict=True)]
        x, y = self.layers[number].offset
        return self.changed(number, offset=(x + steps[0], y + steps[1]))

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
        """One layer more, in front of all or as number `at`."""
        at = len(self.layers) if at is None else at
        return replace(self, layers=(*self.layers[:at], layer, *self.layers[at:]))

    def recoloured(self, layer: int | str, colour: str) -> LayerStack:
        """One layer in another colour: outlines, shades and alpha stay.

        In HSV: each pixel's hue turns as far as from the layer's mean colour to `colour`, and its
        saturation and value are multiplied by the ratio of theirs. Black stays black.

        Args:
            layer: not empty.
            colour: a CSS name, or a hex like "#ff8800".
        """
        number = self.number(layer)
        image = self.layers[number].image
        pixels = numpy.asarray(image)
        solid = pixels[..., 3] >= SEEN
        if not solid.any():
            raise StackError(f"{_called(self.layers[number].prompt)} is empty: it has no colour")
        try:
            wanted = Image.new("RGB", (1, 1), ImageColor.getrgb(colour)[:3])
        except ValueError:
            raise StackError(f"{excerpt(colour)} is no colour name of CSS and no hex") from None
        hsv = numpy.asarray(image.convert("RGB").convert("HSV"), dtype=numpy.float32)
        mean = Image.fromarray(_main_colour(pixels[solid][:, :3])[None, None])
        old, new = (
            numpy.asarray(x.convert("HSV"), dtype=numpy.float32)[0, 0] for x in (mean, wanted)
        )
        hsv = hsv * [1, *(new[1:] / old[1:].clip(min=1))]
        hsv[..., 0] = (hsv[..., 0] + new[0] - old[0]) % 256
        rgb = Image.fromarray(hsv.clip(0, 255).astype(numpy.uint8), "HSV").convert("RGB")
        rgb.putalpha(image.getchannel("A"))
        return self.changed(number, image=rgb)


def _main_colour(pixels: numpy.ndarray) -> numpy.ndarray:
    """The colour of the largest of 8 × 8 × 8 bins: not the outline's, not the mean of both."""
    bins = (pixels // 32).astype(int) @ [64, 8, 1]
    return pixels[bins == numpy.bincount(bins).argmax()].mean(0).round().astype(numpy.uint8)


def _called(prompt: object) -> str:
    return f"layer {excerpt(prompt, 24)}" if prompt else "a layer"


def _size(image: Image.Image) -> str:
    return f"{image.width} × {image.height}"
