"""Shapes: boxes, and masks from an array, an image or a file, and into JSON."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from jaxtyping import Bool
from PIL import Image, ImageChops, ImageColor
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from lrd_helpers.pictures import (
    PNG_PREFIX,
    alpha_of,
    array_of,
    data_uri,
    described,
    is_deep,
    read_picture,
    top_of,
    upright,
    without_extra_axes,
)

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 as fractions of the canvas in [0, 1], y downwards."""

TINT = 24
"""Channels of 0–255 that are this near to one another are grey: what JPEG makes of grey is not."""

MOST_LABELS = 32
"""A picture with more values has soft edges, or is a photo, but is no map of labels."""


@dataclass(frozen=True)
class Mask:
    """Where something is, pixel by pixel. A value: equal if the pixels are, and hashable.

    Attributes:
        height: in pixels.
        width: likewise.
        bits: the pixels row by row, eight a byte, as `numpy.packbits` puts them.
    """

    height: int
    width: int
    bits: bytes = field(repr=False)

    @classmethod
    def of(cls, value: Any, *, label: int | str | None = None) -> Mask:
        """The mask that `value` is: white is where the object goes, black is not.

        White is more than half of the way to the top of the value's own format: True, 1 of
        integers that are only 0 and 1, 1.0, 255 of bytes, 65535 of 16 bits. Of an image that is
        transparent in some places only this counts: the object goes where it is opaque. EXIF turns
        an image first.

        Args:
            value: a `Mask`; an array, tensor or lists (height, width), where axes of length one are
                dropped; a PIL image; the path of an image file; or what `to_text` gives.
            label: of a map of labels (a class or an object a number), the number that is meant: a
                grey value, an index of a palette in colours, or else a colour like "#c08080".

        Raises:
            ValueError: none of these, nothing white in it, a map of labels without a `label`, or a
                file that `read_picture` refuses.
        """
        if isinstance(value, Mask) and label is None:
            return value
        source = _source(value)
        pixels = _pixels(source) if label is None else _labelled(source, label)
        return cls(*pixels.shape, numpy.packbits(pixels).tobytes())

    def pixels(self) -> Bool[Tensor, "{self.height} {self.width}"]:
        """The mask as a tensor."""
        bits = numpy.unpackbits(numpy.frombuffer(self.bits, numpy.uint8))
        flat = bits[: self.height * self.width].astype(bool)
        return torch.from_numpy(flat).view(self.height, self.width)

    def cells(self, height: int, width: int) -> Bool[Tensor, "{height} {width}"]:
        """The mask at another size: a cell is covered if at least half of its area is.

        Where that leaves nothing, the one cell that is covered most stays.
        """
        covered = functional.adaptive_avg_pool2d(self.pixels()[None].float(), (height, width))[0]
        return covered >= min(0.5, float(covered.max()))

    @property
    def box(self) -> Box:
        """The tight box around the mask."""
        return tight_box(self.pixels())

    def image(self) -> Image.Image:
        """A black picture, white where the mask is, of one bit a pixel."""
        return Image.fromarray(self.pixels().numpy())

    def to_text(self) -> str:
        """The mask as a PNG in a data URI, which a browser shows and `of` reads."""
        return data_uri(self.image(), optimize=True)


def tight_box(mask: Bool[Tensor, "height width"]) -> Box:
    """The smallest box around a mask that is not empty."""
    height, width = mask.shape
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return (
        int(columns[0]) / width,
        int(rows[0]) / height,
        (int(columns[-1]) + 1) / width,
        (int(rows[-1]) + 1) / height,
    )


def connected_regions(
    mask: Bool[Tensor, "height width"], least: int = 1, *, gap: int = 0
) -> list[Bool[Tensor, "height width"]]:
    """The connected parts (8 neighbours) of a mask with at least `least` cells, largest first.

    Parts with at most 2 · `gap` cells between them are one: they are widened by `gap` cells for the
    question. Of parts of one size, the part whose last cell (widened, row by row) comes first is
    first.
    """
    cells = mask.cpu().numpy()
    wide = ndimage.maximum_filter(cells, 2 * gap + 1, mode="constant") if gap else cells
    labels, count = ndimage.label(wide, numpy.ones((3, 3)))
    if not count:
        return []
    numbers = numpy.arange(1, count + 1)
    last = ndimage.maximum(numpy.arange(wide.size).reshape(wide.shape), labels, numbers)
    sizes = ndimage.sum_labels(cells, labels, numbers)
    regions = [
        cells & (labels == numbers[i]) for i in numpy.lexsort((last, -sizes)) if sizes[i] >= least
    ]
    return [torch.from_numpy(region).to(mask.device) for region in regions]


# ------------------------------------------------------------------ what a mask is made of


def _source(value: Any) -> Image.Image | numpy.ndarray:
    """The upright image, or the array (height, width), that `value` stands for."""
    if isinstance(value, str) and value.startswith("data:"):
        return _image_of_text(value)
    if isinstance(value, (str, os.PathLike)):
        return read_picture(value)
    if isinstance(value, Image.Image):
        return upright(value)
    array = without_extra_axes(array_of(value), 2)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "buif":
        raise ValueError(
            f"is {described(value, array)}, but should be a picture of yes and no: an array "
            "(height, width), an image or the path of one"
        )
    return array


def _image_of_text(text: str) -> Image.Image:
    fault = "is not in base64"
    try:
        data = base64.b64decode(text.partition(",")[2], validate=True)
        fault = None
        return read_picture(data)
    except ValueError as error:
        raise ValueError(
            f"begins with 'data:' but is no picture, as it {fault or error}; it should be "
            f"{PNG_PREFIX}…"
        ) from None


def _pixels(source: Image.Image | numpy.ndarray) -> numpy.ndarray:
    """Where the mask is: by the alpha where that tells, or else by the brightness."""
    if not isinstance(source, Image.Image):
        return _bright(source)
    if (alpha := alpha_of(source)) is not None:
        least, largest = alpha.getextrema()
        if largest == 0:
            raise ValueError("is transparent everywhere; paint where the object should be")
        if least <= 127 and least < largest:
            return _above_half(numpy.asarray(alpha), "an alpha")
    labels, kind = _labels(source)
    if kind == "grey":
        return _bright(labels)
    colours = source.convert("RGB")
    bright = numpy.asarray(colours.convert("L")) > 127
    # Of two colours the bright one is meant; which of more, nobody can tell.
    if bright.all() or not bright.any() or colours.getcolors(2) is None:
        raise ValueError(_choose(labels, kind))
    return bright


def _bright(numbers: numpy.ndarray) -> numpy.ndarray:
    """Where the numbers are above half of their top, unless they are labels.

    Labels are a few whole numbers. Taken as brightness they lose most of what is not 0, or all but
    the 255 that outlines the objects.
    """
    half = _half(numbers)
    low, high = numbers[(numbers > 0) & (numbers <= half)], numbers[numbers > half]
    if half > 0.5 and low.size:
        values = numpy.unique(numbers)
        few = len(values) <= MOST_LABELS and (values == values.round()).all()
        outline = high.size and high.min() == high.max() and low.max() < half / 2
        if few and (low.size > high.size or outline):
            raise ValueError(_choose(numbers, "grey"))
    return _above_half(numbers, "values")


def _above_half(numbers: numpy.ndarray, what: str) -> numpy.ndarray:
    half = _half(numbers)
    yes = numbers > half
    if yes.any():
        return yes
    if not numbers.any():
        raise ValueError("is empty: no pixel of it is set; paint where the object should be")
    raise ValueError(
        f"has {what} from {numbers.min():g} to {numbers.max():g}, but none above {half:g}, half of "
        "white, where the object should be"
    )


def _half(numbers: numpy.ndarray) -> float:
    """Half of white; of integers that are only 0 and 1, 1 is white."""
    top = top_of(numbers)
    return 0.5 if numbers.max() <= 1 else top / 2


def _labelled(source: Image.Image | numpy.ndarray, label: int | str) -> numpy.ndarray:
    """Where a map of labels has this one."""
    labels, kind = _labels(source)
    number = label
    if kind == "colours" and isinstance(label, str):
        number = int.from_bytes(ImageColor.getcolor(label, "RGB"), "big")
    yes = numpy.zeros(labels.shape, bool) if isinstance(number, str) else labels == number
    if not yes.any():
        raise ValueError(f"has no label {label!r}; it has {_listed(labels, kind)[1]}")
    return yes


def _labels(source: Image.Image | numpy.ndarray) -> tuple[numpy.ndarray, str]:
    """The number of each pixel, and its kind: "grey", "palette" (an index), "colours" (#RRGGBB)."""
    if not isinstance(source, Image.Image) or is_deep(source) or source.mode in ("1", "L"):
        return numpy.asarray(source), "grey"
    colours = source.convert("RGB")
    first, *others = colours.split()
    if all(ImageChops.difference(first, other).getextrema()[1] <= TINT for other in others):
        return numpy.asarray(colours.convert("L")), "grey"
    if source.mode == "P":
        return numpy.asarray(source), "palette"
    return numpy.asarray(colours) @ numpy.array([1 << 16, 1 << 8, 1], numpy.int32), "colours"


def _choose(labels: numpy.ndarray, kind: str) -> str:
    names, text = _listed(labels, kind)
    return (  # the first is the background
        f"is not in black and white, but has {text}, as a map of labels has; choose one, for "
        f"example Mask.of(…, label={names[:2][-1]!r})"
    )


def _listed(labels: numpy.ndarray, kind: str) -> tuple[list[int | str], str]:
    """The first values of a map of labels, as `Mask.of` takes them and as text."""
    # Of colours there may be millions, which `unique` would sort.
    counted = kind == "colours"
    values = numpy.bincount(labels.ravel()).nonzero()[0] if counted else numpy.unique(labels)
    first = [f"#{value:06x}" if counted else value for value in values[:8].tolist()]
    more = f", … ({len(values):,} in all)" if len(values) > 8 else ""
    what = "colours" if counted else "values"
    return first, f"the {what} {', '.join(map(str, first))}{more}"
