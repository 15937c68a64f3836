"""What the user wants, where, and in which order: `Layer` and `Layout`, in Python and in JSON.

layout = Layout(
    caption="a red car and a yellow star at night",
    background="at night",
    layers=[Layer("a red car", box=(0.05, 0.55, 0.50, 0.95)),        # first = furthest back
            Layer("a yellow star", mask="star.png")])                # a box or a mask
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import numbers
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float
from PIL import ImageColor
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from torch import Tensor

from lrd_helpers.files import write_atomically
from lrd_helpers.mask import Mask

if TYPE_CHECKING:
    from PIL import Image

VERSION = 1
"""The version written into a layout's JSON; a file without one is read as this version."""

Box = tuple[float, float, float, float]

Overlap = Literal["over", "small_over_large", "mean", "weighted"]
"""Whose a cell is that several layers cover; see `Layout.masks`."""

_Class = TypeVar("_Class", bound=type)


class LayoutError(ValueError):
    """A layout that cannot be used: one sentence with file, layer, field and a remedy."""


# ------------------------------------------------------------------ what a field may hold


def _checked_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is {_shown(value)}, but should be text")
    if not value.strip():
        raise ValueError("is empty; say what should be there, for example 'a red car'")
    return " ".join(value.split())


def _checked_box(value: Any) -> Box | None:
    if value is None:
        return None
    if hasattr(value, "tolist"):  # NumPy, torch
        value = value.tolist()
    given = _shown(value)
    wanted = "(x0, y0, x1, y1) with 0 ≤ x0 < x1 ≤ 1 and 0 ≤ y0 < y1 ≤ 1"
    if isinstance(value, (str, bytes, dict)) or not hasattr(value, "__len__") or len(value) != 4:
        raise ValueError(f"is {given}, but should be four numbers {wanted}")
    if not all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in value):
        raise ValueError(f"is {given}, but should be four numbers {wanted}")
    x0, y0, x1, y1 = box = tuple(_float(v) for v in value)
    if not all(math.isfinite(v) for v in box):
        raise ValueError(
            f"is {given}, which is not a finite number everywhere; it should be {wanted}"
        )
    if max(box) > 2:
        raise ValueError(
            f"is {given}, which is outside [0, 1] and looks like pixels or 0–1000 coordinates; "
            f"divide x by the picture's width and y by its height (or all by 1000) to get {wanted}"
        )
    if min(box) < 0 or max(box) > 1:
        inside = tuple(min(max(v, 0.0), 1.0) for v in box)
        x0, y0, x1, y1 = inside
        remedy = f"{_shown(inside)} is the part inside" if x0 < x1 and y0 < y1 else f"use {wanted}"
        raise ValueError(f"is {given}, which is outside [0, 1]; {remedy}")
    if x1 < x0 or y1 < y0:
        ordered = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        from_size = (x0, y0, min(x0 + x1, 1.0), min(y0 + y1, 1.0))
        raise ValueError(
            f"is {given}, whose corners are swapped (it should be {wanted}); "
            f"{_shown(ordered)} would work, or {_shown(from_size)} if it is x, y, width, height"
        )
    if x1 == x0 or y1 == y0:
        raise ValueError(f"is {given}, which has no area; it should be {wanted}")
    return box


def _checked_colour(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(
            f"is {_shown(value)}, but should be a name like 'red' or a hex like '#ff0000'"
        )
    try:
        ImageColor.getrgb(value)
    except ValueError:
        names = difflib.get_close_matches(value.lower(), ImageColor.colormap, n=3)
        nearest = f"; the nearest names are {', '.join(names)}" if names else ""
        raise ValueError(
            f"is {value!r}, which is no colour name of CSS and no hex like '#ff0000'{nearest}"
        ) from None
    return value


def _checked_strength(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"is {_shown(value)}, but should be a number (1 = as strong as usual)")
    if not math.isfinite(_float(value)):
        raise ValueError(f"is {_shown(value)}, but should be finite (1 = as strong as usual)")
    return float(value)


def _checked_share(value: Any) -> float | None:
    if value is None:
        return None
    wanted = "should be a share of the steps, a number between 0 (the first) and 1 (the last)"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"is {_shown(value)}, but {wanted}")
    if not 0 <= _float(value) <= 1:
        raise ValueError(f"is {_shown(value)}, but {wanted}")
    return float(value)


def _checked_mask(value: Any) -> Mask | None:
    return None if value is None else Mask.of(value)


def _float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _shown(value: Any) -> str:
    """`value` as an error message shows it: short, and numbers without binary dust."""
    if isinstance(value, (tuple, list)):
        text = "(" + ", ".join(f"{v:.10g}" if type(v) is float else repr(v) for v in value) + ")"
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


# ------------------------------------------------------------------ one sentence for any mistake

_UNKNOWN = ("unexpected_keyword_argument", "unexpected_positional_argument")


def _sentence(error: ValidationError, cls: type, data: Any, file: str | None) -> str:
    """The first of pydantic's complaints as one sentence with file, layer, field and remedy."""
    complaints = error.errors(include_url=False)
    # A misspelt field is also a missing one; the misspelling is what helps.
    first = next((c for c in complaints if c["type"] in _UNKNOWN), complaints[0])
    path = [part for part in first["loc"] if part != "Layer"]
    where = [file] if file else []
    if cls is Layer:
        prompt = data.get("prompt")
        where += ["layer" + (f" {_shown(prompt)}" if isinstance(prompt, str) and prompt else "")]
    elif len(path) >= 2 and path[0] == "layers" and isinstance(path[1], int):
        where += [f"layer {path[1] + 1}{_prompt_of(data, path[1])}"]
        path, cls = path[2:], Layer
    known = [f.name for f in fields(cls)]
    field = str(path[0]) if path else ""
    if field.isdecimal():  # given by position
        field = known[int(field)] if int(field) < len(known) else f"argument {int(field) + 1}"
    what = {
        "value_error": lambda: str(first.get("ctx", {}).get("error", first["msg"])),
        "missing": lambda: "is missing",
        "missing_argument": lambda: "is missing",
        "too_short": lambda: "is empty; give at least one layer with a prompt and a box",
        "unexpected_keyword_argument": lambda: _unknown_field(field, known),
        "unexpected_positional_argument": lambda: "must be given by name, not by position",
        "string_type": lambda: f"is {_shown(first['input'])}, but should be text",
        "dataclass_type": lambda: (
            f"is {_shown(first['input'])}, but should have {', '.join(known)}"
        ),
        "tuple_type": lambda: f"is {_shown(first['input'])}, but should be a list of layers",
    }.get(first["type"], lambda: f"is {_shown(first['input'])}: {first['msg']}")()
    if field:
        where += [field]
    return ", ".join(where) + " " + what


def _prompt_of(data: Any, index: int) -> str:
    try:
        layer = data["layers"][index]
        prompt = layer["prompt"] if isinstance(layer, dict) else layer.prompt
    except (TypeError, KeyError, IndexError, AttributeError):
        return ""
    return f" {_shown(prompt)}" if isinstance(prompt, str) and prompt.strip() else ""


def _unknown_field(field: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
    guess = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"is no known field (known: {', '.join(known)}){guess}"


def _one_sentence(cls: _Class) -> _Class:
    """Let `cls(…)` raise a `LayoutError` of one sentence where pydantic raises a report."""
    validated: Callable[..., None] = cls.__init__

    @functools.wraps(validated)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        try:
            validated(self, *args, **given)
        except ValidationError as error:
            data = dict(zip((f.name for f in fields(cls)), args, strict=False)) | given
            raise LayoutError(_sentence(error, cls, data, None)) from None

    cls.__init__ = __init__
    return cls


# ------------------------------------------------------------------ the two types


@_one_sentence
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Layer:
    """One object: what it is, where, and how strongly it is asked for.

    Attributes:
        prompt: what the object is, "a red car".
        box: where it is, (x0, y0, x1, y1) as fractions of the canvas in [0, 1], y downwards.
        mask: where it is, pixel by pixel, in place of a box: an array (height, width), an image, or
            the path of an image file (see `Mask.of`); of any size, stretched to the canvas.
        negative_prompt: what this layer should not show; None takes the picture's own.
        colour: the flat colour whose latent is the layer's constant δ, a CSS name or a hex like
            "#ff8800"; None takes the first colour word of the prompt, and no guidance where there
            is none.
        word: the word or phrase of the prompt whose attention map a dynamic δ looks at; None takes
            the last word before the first preposition ("car" of "a red car on grass").
        strength: factor on the strength of this layer's vision guidance; 1 = as the pipeline's
            arguments say, 0 = none.
        start: the share of the steps, in [0, 1], after which the layer begins to count. Before, its
            place belongs to what lies behind it.
        end: the share of the steps after which it no longer counts; None: as the pipeline's
            `layered_fraction` says.

    Raises:
        LayoutError: one sentence that names the layer and the field.
    """

    prompt: Annotated[str, BeforeValidator(_checked_text)]
    box: Annotated[Box | None, BeforeValidator(_checked_box)] = None
    _: KW_ONLY
    mask: Annotated[Mask | None, BeforeValidator(_checked_mask)] = None
    negative_prompt: str | None = None
    colour: Annotated[str | None, BeforeValidator(_checked_colour)] = None
    word: str | None = None
    strength: Annotated[float, BeforeValidator(_checked_strength)] = 1.0
    start: Annotated[float, BeforeValidator(_checked_share)] = 0.0
    end: Annotated[float | None, BeforeValidator(_checked_share)] = None

    @model_validator(mode="after")
    def _fits_together(self) -> Layer:
        if (self.box is None) == (self.mask is None):
            has = "neither a box nor a mask" if self.box is None else "both a box and a mask"
            raise ValueError(f"has {has}; give one of them, for example box=(0.1, 0.5, 0.6, 0.9)")
        if self.end is not None and self.end <= self.start:
            raise ValueError(
                f"ends at {self.end:g} of the steps, but starts at {self.start:g}; end should be "
                "later than start"
            )
        return self

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


@_one_sentence
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Layout:
    """A picture to be made: a caption, a background, and layers from back to front.

    Attributes:
        caption: the whole picture in words, "a red car and a yellow star at night".
        background: what is behind all layers, "at night"; empty: the caption is used.
        layers: at least one, first = furthest back. Where two overlap, the later one is seen.

    Raises:
        LayoutError: one sentence that names the layer and the field.
    """

    caption: Annotated[str, BeforeValidator(_checked_text)]
    _: KW_ONLY
    background: str = ""
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]

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

        A layer that others hide completely has an empty mask.

        Raises:
            ValueError: another overlap rule.
        """
        if overlap not in get_args(Overlap):
            raise ValueError(
                f"overlap is {overlap!r}, but should be one of {', '.join(get_args(Overlap))}"
            )
        cells = [layer.cells(height, width) for layer in self.layers]
        if overlap in ("mean", "weighted"):
            shares = torch.stack(cells).float()
            if overlap == "weighted":
                boxes = [layer.bounding_box for layer in self.layers]
                shares = shares * torch.stack([_bell(box, height, width) for box in boxes])
            background = ~torch.stack(cells).any(0, keepdim=True)
            shares = torch.cat([background.float(), shares])
            return shares / shares.sum(0)
        order = list(range(len(cells)))
        if overlap == "small_over_large":
            order.sort(key=lambda number: -int(cells[number].sum()))
        owner = torch.zeros(height, width, dtype=torch.long)
        for number in order:
            owner[cells[number]] = number + 1
        numbers_ = torch.arange(len(cells) + 1)
        return (owner == numbers_[:, None, None]).float()

    def draw(self, image: Image.Image | Tensor, *, longest_side: int = 512) -> Image.Image:
        """`image`, enlarged, with each layer's outline, number and prompt drawn over it.

        Args:
            image: a PIL image, or a tensor (3, height, width) in [0, 1], of any size.
            longest_side: of the result, in pixels.
        """
        from lrd_helpers.plotting import draw_layout  # which knows layouts, so not at the top

        return draw_layout(image, self, longest_side=longest_side)

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
        data = {"version": VERSION, "caption": self.caption, "background": self.background}
        text = json.dumps(data | {"layers": layers}, indent=2, ensure_ascii=False) + "\n"
        # A box on one line. Strings are safe: JSON writes no line break inside them.
        return re.sub(r"\[\n([-+.\de,\s]+)\n\s*\]", _on_one_line, text)

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
        name = os.fspath(file) if file is not None else None
        prefix = f"{name}: " if name else ""
        try:
            data = json.loads(text, object_pairs_hook=_without_duplicates)
        except json.JSONDecodeError as error:
            raise LayoutError(
                f"{prefix}not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            ) from None
        except RecursionError:
            raise LayoutError(f"{prefix}not a layout: it is nested too deeply") from None
        except ValueError as error:
            raise LayoutError(f"{prefix}{str(error).partition(';')[0]}") from None
        if not isinstance(data, dict):
            raise LayoutError(f"{prefix}not a layout: expected an object {{…}}, got {_shown(data)}")
        version = data.pop("version", VERSION)
        if type(version) is not int or version != VERSION:
            raise LayoutError(
                f"{prefix}version is {_shown(version)}, but this package reads version {VERSION}"
            )
        if name is not None:
            _resolve_masks(data, Path(name).parent)
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise LayoutError(_sentence(error, cls, data, name)) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Layout:
        """The layout in the JSON file `path`.

        Raises:
            LayoutError: the file cannot be read, or what `from_json` refuses; names the file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise LayoutError(f"{os.fspath(path)}: not JSON: it is not text in UTF-8") from None
        except OSError as error:
            raise LayoutError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from None
        return cls.from_json(text, file=path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to `path`, whole or not at all.

        Raises:
            OSError: a missing folder, a full disk, …; what was at `path` is then untouched.
        """
        write_atomically(path, self.to_json().encode())


def _resolve_masks(data: dict[str, Any], folder: Path) -> None:
    """A mask's path in a file is relative to the folder of that file."""
    layers = data.get("layers")
    for layer in layers if isinstance(layers, list) else []:
        mask = layer.get("mask") if isinstance(layer, dict) else None
        if isinstance(mask, str) and not mask.startswith("data:"):
            layer["mask"] = str(folder / mask)


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + " ".join(match[1].split()) + "]"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice in one object, and only one can count")
    return dict(pairs)


# ------------------------------------------------------------------ boxes of other conventions


def box_from_coco(box: Sequence[float], width: float, height: float) -> Box:
    """COCO's (x, y, w, h) in pixels of a `width` × `height` picture → (x0, y0, x1, y1)."""
    x, y, w, h = box
    return (x / width, y / height, (x + w) / width, (y + h) / height)


def box_to_coco(box: Box, width: float, height: float) -> Box:
    """(x0, y0, x1, y1) → COCO's (x, y, w, h) in pixels of a `width` × `height` picture."""
    x0, y0, x1, y1 = box
    return (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)


def box_from_thousandths(box: Sequence[float]) -> Box:
    """(y0, x0, y1, x1) in 0–1000, as many language models write → (x0, y0, x1, y1) in [0, 1]."""
    y0, x0, y1, x1 = box
    return (x0 / 1000, y0 / 1000, x1 / 1000, y1 / 1000)


def box_to_thousandths(box: Box) -> Box:
    """(x0, y0, x1, y1) in [0, 1] → (y0, x0, y1, x1) in 0–1000."""
    x0, y0, x1, y1 = box
    return (1000 * y0, 1000 * x0, 1000 * y1, 1000 * x1)
