"""Shapes: boxes, and masks from an array, an image or a file, and into JSON."""

from __future__ import annotations

import base64
import binascii
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from lrd_helpers.pictures import PNG_PREFIX, data_uri

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 as fractions of the canvas in [0, 1], y downwards."""


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
    def of(cls, value: Any) -> Mask:
        """The mask that `value` is, yes where it is more than half of the way from 0 to the top.

        Args:
            value: a `Mask`; an array or tensor (height, width) of yes and no, of numbers in [0, 1]
                or of bytes 0–255; a PIL image (its alpha channel, or else its brightness); the path
                of an image file; or what `to_text` gives.

        Raises:
            ValueError: none of these, nothing in it, or a file that is no image.
        """
        if isinstance(value, Mask):
            return value
        if isinstance(value, str) and value.startswith("data:"):
            value = _image_of_text(value)
        if isinstance(value, (str, os.PathLike)):
            value = _image_of_file(value)
        pixels = _pixels(value)
        if not pixels.any():
            raise ValueError("is empty: no pixel of it is set; paint where the object should be")
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


def _pixels(value: Any) -> numpy.ndarray:
    if isinstance(value, Image.Image):
        value = value.getchannel("A") if "A" in value.getbands() else value.convert("L")
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    try:
        array = numpy.asarray(value)
    except (ValueError, TypeError):  # a list of rows of unequal length
        array = numpy.asarray(None)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "buif":
        raise ValueError(
            f"is {_described(value, array)}, but should be a picture of yes and no: an array "
            "(height, width), an image or the path of one"
        )
    if array.dtype == bool:
        return array
    if not numpy.isfinite(array).all() or array.min() < 0 or array.max() > 255:
        raise ValueError("has values outside 0 to 1 (or 0 to 255)")
    return array > (127 if array.max() > 1 else 0.5)


def _described(value: Any, array: numpy.ndarray) -> str:
    if array.ndim and array.dtype.kind in "buif":
        return f"an array of shape {array.shape}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _image_of_text(text: str) -> Image.Image:
    try:
        data = base64.b64decode(text.partition(",")[2], validate=True)
        return _loaded(io.BytesIO(data))
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError):
        raise ValueError(
            f"begins with 'data:' but is no picture; it should be {PNG_PREFIX}…"
        ) from None


def _image_of_file(path: str | os.PathLike[str]) -> Image.Image:
    try:
        return _loaded(Path(path))
    except FileNotFoundError:
        raise ValueError(f"is {os.fspath(path)!r}, but there is no such file") from None
    except (UnidentifiedImageError, SyntaxError):
        raise ValueError(f"is {os.fspath(path)!r}, which is no image file") from None
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"is {os.fspath(path)!r}, which cannot be read: {reason}") from None


def _loaded(source: Path | io.BytesIO) -> Image.Image:
    with Image.open(source) as image:
        image.load()
        return image.copy()
