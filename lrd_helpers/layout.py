"""What the user wants, where, and in which order: `Layer` and `Layout`.

layout = Layout(
    caption="a red car and a yellow star at night",
    background="at night",
    layers=[Layer("a red car", box=(0.05, 0.55, 0.50, 0.95)),        # first = furthest back
            Layer("a yellow star", mask="star.png")])                # a box or a mask
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float
from PIL import ImageColor
from torch import Tensor

from lrd_helpers.files import write_atomically
from lrd_helpers.layout_json import (
    box_from_centre,
    box_from_xywh,
    fields_of,
    json_of,
    text_of_file,
)
from lrd_helpers.mask import Box, Mask
from lrd_helpers.messages import excerpt, in_file, sentence

Overlap = Literal["over", "small_over_large", "mean", "weighted"]
"""Whose a cell is that several layers cover; see `Layout.masks`."""

LONGEST_TEXT = 2000
"""Characters of a prompt or another text. The models read 77 tokens, some 300 characters."""

ROUNDING = 1e-5
"""How far a box may lie outside [0, 1]: other programs write six decimals. It is cut off."""

_UNREADABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Control characters, lone surrogates, and what no XML can hold."""

_Class = TypeVar("_Class", bound=type)


class LayoutError(ValueError):
    """A layout that cannot be used: one sentence with file, layer, field and a remedy."""


# ------------------------------------------------------------------ what a field may hold


def _checked_prompt(value: Any) -> str:
    text = checked_text(value)
    if not text:
        raise ValueError("is empty; say what should be there, for example 'a red car'")
    return text


def checked_text(value: Any) -> str:
    """The text on one line, with one space between words: line breaks mean nothing to a model.

    Raises:
        ValueError: no text, longer than `LONGEST_TEXT`, or with a character that is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"is {excerpt(value)}, but should be text")
    if len(value) > LONGEST_TEXT:
        raise ValueError(
            f"has {len(value)} characters, but should have at most {LONGEST_TEXT}; the models read "
            "some 300 of them"
        )
    text = " ".join(value.split())
    if wrong := _UNREADABLE.search(text):
        raise ValueError(
            f"is {excerpt(value)}, in which {wrong[0]!r} is no character to be read; leave it out"
        )
    return text


def _checked_box(value: Any) -> Box:
    if hasattr(value, "tolist"):  # NumPy, torch
        value = value.tolist()
    given = excerpt(value)
    wanted = "(x0, y0, x1, y1) with 0 ≤ x0 < x1 ≤ 1 and 0 ≤ y0 < y1 ≤ 1"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 4:
        raise ValueError(f"is {given}, but should be four numbers {wanted}")
    if not all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in value):
        raise ValueError(f"is {given}, but should be four numbers {wanted}")
    box = tuple(_float(v) for v in value)
    if not all(math.isfinite(v) for v in box):
        raise ValueError(
            f"is {given}, which is not a finite number everywhere; it should be {wanted}"
        )
    if max(box) > 2:
        raise ValueError(
            f"is {given}, which is outside [0, 1]; if it is in pixels or 0–1000, divide x by the "
            "picture's width and y by its height, or all by 1000"
        )
    x0, y0, x1, y1 = inside = tuple(min(max(v, 0.0), 1.0) for v in box)
    if max(abs(a - b) for a, b in zip(box, inside, strict=True)) > ROUNDING:
        remedy = f"{excerpt(inside)} is the part inside" if x0 < x1 and y0 < y1 else f"use {wanted}"
        raise ValueError(f"is {given}, which is outside [0, 1]; {remedy}")
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"is {given}, {_no_corners(inside)}")
    return inside


def _no_corners(box: Box) -> str:
    """What is wrong with a box in [0, 1] that has no area, and which box may be meant."""
    x0, y0, x1, y1 = box
    ordered = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    fault = "whose corners are swapped" if x0 != x1 and y0 != y1 else "which has no area"
    conventions = {"x, y, width, height": box_from_xywh, "centre, width, height": box_from_centre}
    meant = [
        f"{names} ({convert.__name__})"
        for names, convert in conventions.items()
        if all(-ROUNDING <= v <= 1 + ROUNDING for v in convert(box)) and x1 > 0 and y1 > 0
    ]
    if meant:
        return f"{fault}; perhaps it is {' or '.join(meant)}, and the other boxes are suspect, too"
    if x0 != x1 and y0 != y1:
        return f"{fault}; {excerpt(ordered)} would work"
    return f"{fault}; it should have x0 < x1 and y0 < y1"


def checked_colour(value: Any) -> str:
    """The name or hex of a colour as it stands.

    Raises:
        ValueError: no colour; with the nearest names.
    """
    if not isinstance(value, str):
        raise ValueError(
            f"is {excerpt(value)}, but should be a name like 'red' or a hex like '#ff0000'"
        )
    try:
        possible = max(ImageColor.getrgb(value)) <= 255  # "rgb(999, 0, 0)" is read, too
    except ValueError:
        possible = False
    if not possible:
        names = difflib.get_close_matches(value[:50].lower(), ImageColor.colormap, n=3)
        nearest = f"; the nearest names are {', '.join(names)}" if names else ""
        raise ValueError(
            f"is {excerpt(value)}, which is no colour name of CSS and no hex like '#ff0000'"
            + nearest
        )
    return value


def _checked_strength(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"is {excerpt(value)}, but should be a number (1 = as strong as usual)")
    if not math.isfinite(_float(value)):
        raise ValueError(f"is {excerpt(value)}, but should be finite (1 = as strong as usual)")
    return float(value)


def _from_0_to_1(wanted: str) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not 0 <= _float(value) <= 1:
            raise ValueError(f"is {excerpt(value)}, but should be {wanted}")
        return float(value)

    return check


_checked_share = _from_0_to_1(
    "a share of the steps, a number between 0 (the first) and 1 (the last)"
)
_checked_opacity = _from_0_to_1("a number from 0 (not seen) to 1 (nothing shines through)")


def _float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


# ------------------------------------------------------------------ one sentence for any mistake


def _strict(cls: _Class) -> _Class:
    """Let `cls(…)` refuse missing, unknown and misplaced arguments with a `LayoutError`."""
    filled: Callable[..., None] = cls.__init__
    names = [field.name for field in fields(cls)]
    places = [field.name for field in fields(cls) if not field.kw_only]

    @functools.wraps(filled)
    def __init__(self: Any, /, *values: Any, **named: Any) -> None:
        given = dict(zip(names, values, strict=False)) | named
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
        # A misspelt field is also a missing field; the misspelling is what helps.
        if unknown := [name for name in named if name not in names]:
            fault = _unknown_field(unknown[0], names)
        elif len(values) > len(places):
            fault = f"{names[len(places)]} must be given by name, not by position"
        elif twice := [name for name in places[: len(values)] if name in named]:
            fault = f"{twice[0]} is given twice, by position and by name"
        elif missing:
            fault = f"{missing[0]} is missing"
        else:
            return filled(self, *values, **named)
        layer = f"{_layer_called(given.get('prompt'))}, " if cls is Layer else ""
        raise LayoutError(layer + fault)

    cls.__init__ = __init__
    return cls


def _unknown_field(name: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(name[:50], names, n=1, cutoff=0.5)
    guess = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{excerpt(name)} is no known field (known: {', '.join(names)}){guess}"


def _layer_called(prompt: Any) -> str:
    called = isinstance(prompt, str) and prompt.strip()
    return f"layer {excerpt(prompt, 24)}" if called else "layer"


def _check_fields(instance: Any, checks: dict[str, Callable[[Any], Any]], place: str = "") -> None:
    """Put what `checks` make of the fields in their place; an error names the place and field."""
    for name, check in checks.items():
        try:
            value = check(getattr(instance, name))
        except LayoutError:  # of a layer of the layout: it says already which
            raise
        except ValueError as error:
            raise LayoutError(sentence(f"{place}{name} {error}", 240)) from None
        object.__setattr__(instance, name, value)


# ------------------------------------------------------------------ the two types


@_strict
@dataclass(frozen=True)
class Layer:
    """One object: what it is, where, and how strongly it is asked for.

    Attributes:
        prompt: what the object is, "a red car".
        box: where it is, by its corners: (x0, y0, x1, y1) as fractions of the canvas in [0, 1], y
            downwards. `lrd_helpers.layout_json` has a converter for each other convention
            (`box_from_xywh`, `box_from_centre`, …). Up to 1e-5 outside [0, 1] is rounding.
        mask: where it is, pixel by pixel, in place of a box: an array (height, width), an image, or
            the path of an image file; white (or opaque, in an image that is transparent elsewhere)
            is the object. Of any size, stretched to the canvas. `Mask.of` has all the rules, and
            reads maps of labels.
        negative_prompt: what this layer should not show; None takes the picture's own.
        colour: the flat colour whose latent is the layer's constant δ, a CSS name or a hex like
            "#ff8800"; None takes the one that the prompt says of its object (see
            `lrd_helpers.naming.named_by`), and no guidance where it says none.
        word: the word or phrase that names the object: where a dynamic δ and the methods that steer
            by words look, and what metrics look for; None takes a guess by English grammar ("car"
            of "a red car on grass"; see `lrd_helpers.naming.named_by`). Prompts in other scripts
            need it.
        strength: factor on the strength of this layer's vision guidance; 1 = as the pipeline's
            arguments say, 0 = none.
        opacity: how much of what lies behind the layer hides, from 0 to 1: 1 = nothing shines
            through, 0 = the layer is not seen. For methods that are `translucent` (the collage,
            LaRender); the others refuse it.
        start: the share of the steps, in [0, 1], after which the layer begins to count. Before, its
            place belongs to what lies behind it.
        end: the share of the steps after which it no longer counts; None: as the pipeline's
            `layered_fraction` says.

    Raises:
        LayoutError: one sentence that names the layer and the field.
    """

    prompt: str
    box: Box | None = None
    _: KW_ONLY
    mask: Mask | None = None
    negative_prompt: str | None = None
    colour: str | None = None
    word: str | None = None
    strength: float = 1.0
    opacity: float = 1.0
    start: float = 0.0
    end: float | None = None

    def __post_init__(self) -> None:
        layer = _layer_called(self.prompt)
        checks = {
            "prompt": _checked_prompt,
            "box": _optional(_checked_box),
            "mask": _optional(Mask.of),
            "negative_prompt": _optional(checked_text),
            "colour": _optional(checked_colour),
            "word": _optional(checked_text),
            "strength": _checked_strength,
            "opacity": _checked_opacity,
            "start": _checked_share,
            "end": _optional(_checked_share),
        }
        _check_fields(self, checks, f"{layer}, ")
        if (self.box is None) == (self.mask is None):
            has = "neither a box nor a mask" if self.box is None else "both a box and a mask"
            raise LayoutError(
                f"{layer} has {has}; give one of them, for example box=(0.1, 0.5, 0.6, 0.9)"
            )
        if self.end is not None and self.end <= self.start:
            raise LayoutError(
                f"{layer} ends at {self.end:g} of the steps, but starts at {self.start:g}; end "
                "should be later than start"
            )

    @property
    def bounding_box(self) -> Box:
        """The box, or the tight one around the mask."""
        return self.mask.box if self.box is None else self.box

    def cells(self, height: int, width: int) -> Bool[Tensor, "{height} {width}"]:
        """The cells of a `height` × `width` canvas that the layer covers, whatever lies in front.

        A cell is covered if its centre is in the box. A box so thin that it holds no centre covers
        the one row (or column) in which its own middle lies. Of a mask, a cell is covered if half
        of its area is, and if that leaves nothing, the cell that is covered most: no layer is ever
        lost by rounding.
        """
        if self.mask is not None:
            return self.mask.cells(height, width)
        x0, y0, x1, y1 = self.box
        return _covered(y0, y1, height)[:, None] & _covered(x0, x1, width)[None, :]


def _covered(low: float, high: float, cells: int) -> Bool[Tensor, "{cells}"]:
    centre = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    covered = (low <= centre) & (centre < high)
    if not covered.any():
        covered[min(int((low + high) / 2 * cells), cells - 1)] = True
    return covered


def _bell(box: Box, height: int, width: int) -> Float[Tensor, "{height} {width}"]:
    """A Gaussian over the box: 1 in its middle, e⁻² in the middle of its edges."""
    x0, y0, x1, y1 = box
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    square = ((y - (y0 + y1) / 2) / (y1 - y0))[:, None] ** 2
    square = square + ((x - (x0 + x1) / 2) / (x1 - x0))[None, :] ** 2
    # Never quite 0: a cell far out on a box of no width must still belong to someone.
    return torch.exp(-8 * square).clamp(min=1e-6)


def _checked_layers(value: Any) -> tuple[Layer, ...]:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise ValueError(f"is {excerpt(value)}, but should be a list of layers")
    layers = []
    for number, layer in enumerate(value, start=1):
        if isinstance(layer, dict):
            try:
                layer = Layer(**layer)
            except LayoutError as error:
                fault = str(error).removeprefix("layer")
                raise LayoutError(f"layer {number}{fault}") from None
        if not isinstance(layer, Layer):
            names = ", ".join(field.name for field in fields(Layer))
            raise LayoutError(f"layer {number} is {excerpt(layer)}, but should have {names}")
        layers.append(layer)
    if not layers:
        raise ValueError("is empty; give at least one layer with a prompt and a box")
    return tuple(layers)


@_strict
@dataclass(frozen=True)
class Layout:
    """A picture to be made: a caption, a background, and layers from back to front.

    Attributes:
        caption: the whole picture in words, "a red car and a yellow star at night".
        background: what is behind all layers, "at night"; empty: the caption is used.
        layers: at least one, first = furthest back. Where two overlap, the later one is seen.

    Raises:
        LayoutError: one sentence that names the layer and the field.
    """

    caption: str
    _: KW_ONLY
    background: str = ""
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        checks = {
            "caption": _checked_prompt,
            "background": checked_text,
            "layers": _checked_layers,
        }
        _check_fields(self, checks)

    def masks(
        self, height: int, width: int, *, overlap: Overlap = "over"
    ) -> Float[Tensor, "{len(self.layers)+1} {height} {width}"]:
        """The *visible* masks: index 0 is the background, index i + 1 is `layers[i]`.

        They partition the canvas: in each cell they sum to 1. Where no layer is, the background is;
        where one is, it has the cell to itself; where several are, `overlap` decides:

        - "over": the cell is the frontmost one's, the one that is latest in the list.
        - "small_over_large": the cell is that of the smallest layer, whatever the list says (the
          authors' script paints the largest area first).
        - "mean": all have the same share (MultiDiffusion, Bar-Tal et al. 2023, Eq. 5).
        - "weighted": shares fall off as a Gaussian from the middle of each layer's box (Mixture of
          Diffusers, Jiménez 2023, section 3), so that there is no seam.

        Of what would be its part of a cell a layer with an opacity takes that share only, and
        leaves the rest to what lies behind it ("over", "small_over_large") or to the background
        ("mean", "weighted"). A layer that others hide completely has an empty mask.

        Raises:
            ValueError: another overlap rule.
        """
        if overlap not in get_args(Overlap):
            raise ValueError(
                f"overlap is {overlap!r}, but should be one of {', '.join(get_args(Overlap))}"
            )
        cells = [layer.cells(height, width) for layer in self.layers]
        opacity = torch.tensor([layer.opacity for layer in self.layers])[:, None, None]
        if overlap in ("mean", "weighted"):
            shares = torch.stack(cells).float()
            if overlap == "weighted":
                boxes = [layer.bounding_box for layer in self.layers]
                shares = shares * torch.stack([_bell(box, height, width) for box in boxes])
            background = ~torch.stack(cells).any(0, keepdim=True)
            shares = torch.cat([background.float(), shares])
            shares = shares / shares.sum(0)
            background = shares[:1] + ((1 - opacity) * shares[1:]).sum(0, keepdim=True)
            return torch.cat([background, opacity * shares[1:]])
        order = list(range(len(cells)))
        if overlap == "small_over_large":
            order.sort(key=lambda number: -int(cells[number].sum()))
        masks, free = torch.zeros(len(cells) + 1, height, width), torch.ones(height, width)
        for number in reversed(order):
            masks[number + 1] = free * cells[number] * opacity[number]
            free = free - masks[number + 1]
        masks[0] = free
        return masks

    def to_json(self) -> str:
        """The layout as JSON text (indented, ending in a newline) with its `version`.

        Fields of a layer that have their default are left out; a mask is written as a PNG in a data
        URI, so that the file needs no other.
        """
        layers = []
        for layer in self.layers:
            given = {f.name: getattr(layer, f.name) for f in fields(Layer)}
            given = {f.name: given[f.name] for f in fields(Layer) if given[f.name] != f.default}
            if layer.mask is not None:
                given["mask"] = layer.mask.to_text()
            layers.append(given)
        return json_of({"caption": self.caption, "background": self.background, "layers": layers})

    @classmethod
    def from_json(cls, text: str, *, file: str | os.PathLike[str] | None = None) -> Layout:
        """The layout in JSON `text`.

        Args:
            text: what `to_json` writes.
            file: where it comes from: named in messages, and a mask's path is relative to it.

        Raises:
            LayoutError: not JSON (says line and column), a field given twice or not known, another
                version, or a value that `Layer` or `Layout` refuses.
        """
        try:
            given = fields_of(text, file)
        except ValueError as error:
            raise LayoutError(str(error)) from None
        try:
            return cls(**given)
        except LayoutError as error:
            raise LayoutError(in_file(file, str(error), ", ")) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Layout:
        """The layout in the JSON file `path`.

        Raises:
            LayoutError: the file cannot be read, or what `from_json` refuses; names the file.
        """
        try:
            text = text_of_file(path)
        except ValueError as error:
            raise LayoutError(str(error)) from None
        return cls.from_json(text, file=path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to `path`, whole or not at all.

        Raises:
            OSError: a missing folder, a full disk, …; what was at `path` is then untouched.
        """
        write_atomically(path, self.to_json().encode())
