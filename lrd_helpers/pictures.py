"""Pictures as PIL images, as numbers and as text: every conversion, in one place.

So every picture that comes in is turned as its EXIF says; 16 bits, integers and floats are scaled
to the top of their format; transparency is laid on white; an animation is its first frame.
"""

from __future__ import annotations

import base64
import io
import os
import warnings
from typing import Any

import numpy
import torch
from jaxtyping import Float, Shaped
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lrd_helpers.files import checked_file
from lrd_helpers.messages import excerpt

Picture = Image.Image | Shaped[Tensor, "*_shape"] | Shaped[numpy.ndarray, "*_shape"]
"""A PIL image, a tensor (channels, height, width) or an array (height, width, channels). Of 1, 3 or
4 channels the fourth is alpha; floats are in [0, 1], bytes and 16 bits have their own top."""

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF")
"""The kinds of picture files that are read, by Pillow's names; none of them runs a program."""

MOST_BYTES = 2**28
"""A larger file is not read. The pixels are limited by Pillow's `Image.MAX_IMAGE_PIXELS`."""

TOPS = (1, 255, 65535)
"""What white may be: of floats in [0, 1], of bytes, of 16 bits."""

ROUNDING = 1e-5
"""So far outside of its range, as a part of it, a number still counts as rounded."""

LIKE_BYTES = 16
"""Floats from 0 to more than this are 0–255, and no picture in [0, 1] that overshoots."""

PNG_PREFIX = "data:image/png;base64,"
"""How a data URI of a PNG begins."""

SHOWN_SIDE = 1024
"""So many pixels of a picture's longer side are enough for a page."""

SHOWN_BYTES = 200_000
"""A picture in a page takes at most so many bytes: a notebook keeps two or three copies of it."""


# ------------------------------------------------------------------ files


def read_picture(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """The picture in a file, or in a file's bytes, upright and in its own mode.

    An animation gives its first frame, with a warning.

    Raises:
        ValueError: no picture, or too large; what it is instead, to stand after "the picture ".
    """
    if isinstance(source, bytes):
        return _decoded(io.BytesIO(source))
    name = excerpt(os.fspath(source))
    try:
        data = checked_file(source, MOST_BYTES)
    except FileNotFoundError:
        raise ValueError(f"is {name}, but there is no such file") from None
    except OSError as error:
        raise ValueError(f"is {name}, which cannot be read: {error.strerror}") from None
    if not data:
        raise ValueError(f"is {name}, which is an empty file")
    try:
        return _decoded(io.BytesIO(data))
    except ValueError as error:
        raise ValueError(f"is {name}, which {error}") from None


def _decoded(source: io.BytesIO) -> Image.Image:
    Image.init()
    kinds = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(source, formats=kinds)  # reads the size only
        with opened:
            picture = upright(opened)
            # A phone's MPO has its previews as further frames.
            animated = opened.format != "MPO" and getattr(opened, "is_animated", False)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ValueError(f"is no image file of these kinds: {', '.join(kinds)}") from None
    except Exception as error:  # damaged files raise whatever their decoder comes upon
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"cannot be read: {' '.join(reason.split())[:80]}") from None
    if animated:
        warnings.warn("a picture is animated; its first frame is taken", stacklevel=3)
    return picture


# ------------------------------------------------------------------ images of PIL


def upright(image: Image.Image) -> Image.Image:
    """A copy of the image in its own mode, turned as its EXIF says: no second time, if repeated."""
    _load(image)
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF: the picture is shown as it lies, as viewers do
        return image.copy()


def _load(image: Image.Image) -> None:
    """Load the pixels, and mend two things that Pillow gets wrong."""
    raw = image.tile[0][3] if getattr(image, "tile", None) else None  # the file's mode
    name = getattr(image, "filename", "")
    if image.format == "TIFF":  # a file with a name is mapped into memory: askew, if it is turned
        image.filename = ""
    image.load()
    if image.format == "TIFF":
        image.filename = name
    # A PNG's transparent grey or colour is left in the depth of the file, not of the pixels.
    value = image.info.get("transparency")
    if isinstance(value, int) and raw in ("L;2", "L;4"):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[raw]
    if isinstance(value, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in value)


def is_deep(image: Image.Image) -> bool:
    """Whether it has grey values of more than 8 bits, which Pillow cuts off if it converts them."""
    return image.mode.startswith(("I", "F"))


def alpha_of(image: Image.Image) -> Image.Image | None:
    """How opaque an upright image is, 0 to 255; None for an image without transparency."""
    if not image.has_transparency_data:
        return None
    if is_deep(image):
        opaque = numpy.asarray(image) != image.info["transparency"]
        return Image.fromarray(opaque).convert("L")
    return image.convert("RGBA").getchannel("A")


def picture_of(picture: Picture) -> Image.Image:
    """The picture as an upright RGB image of PIL, on white where it is transparent.

    Floats outside [0, 1] are cut off, as every screen would.

    Raises:
        ValueError: as for `pixels_of`.
    """
    if not isinstance(picture, Image.Image):
        pixels = (255 * pixels_of(picture).clamp(0, 1)).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image = upright(picture)
    alpha = alpha_of(image)
    image = _of_bytes(image).convert("RGB")
    if alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def rgba_of(image: Image.Image) -> Image.Image:
    """An upright RGBA image; colours stay under what is transparent.

    Raises:
        ValueError: as for `pixels_of`.
    """
    image = upright(image)
    rgba = _of_bytes(image).convert("RGBA")
    if (alpha := alpha_of(image)) is not None:
        rgba.putalpha(alpha)
    return rgba


def _of_bytes(image: Image.Image) -> Image.Image:
    """An image of more than 8 bits with 8; another as it is."""
    if not is_deep(image):
        return image
    numbers = numpy.asarray(image).astype(numpy.float32)
    numbers *= 255 / top_of(numpy.asarray(image), "the picture ")
    return Image.fromarray(numbers.clip(0, 255).round().astype(numpy.uint8))


# ------------------------------------------------------------------ numbers


def pixels_of(picture: Picture) -> Float[Tensor, "3 height width"]:
    """The picture as numbers in single precision and on the CPU, 0 black and 1 white.

    Floats are taken as they are, also a little outside [0, 1]. Grey is repeated, alpha laid on
    white, and axes of length one around the picture are dropped.

    Raises:
        ValueError: another shape, numbers that are not finite, or floats that go to 255.
    """
    if isinstance(picture, Image.Image):
        picture = numpy.asarray(picture_of(picture))
    numbers = _channels_last(picture)
    top = top_of(numbers, "the picture ") if numbers.dtype.kind != "f" else 1
    if top == 1 and not numpy.isfinite(numbers).all():
        raise ValueError("the picture has values that are not finite (NaN or infinite)")
    if top == 1 and numbers.min() >= 0 and numbers.max() > LIKE_BYTES:
        raise ValueError(
            f"the picture has values from {numbers.min():g} to {numbers.max():g}, but floats "
            "should be in [0, 1]; divide them by 255, or make them uint8"
        )
    numbers = numbers.astype(numpy.float32) / numpy.float32(top)
    if numbers.shape[-1] == 4:
        numbers = numbers[..., :3] * numbers[..., 3:] + (1 - numbers[..., 3:])
    if numbers.shape[-1] == 1:
        numbers = numbers.repeat(3, -1)
    return torch.from_numpy(numbers).permute(2, 0, 1)


def _channels_last(picture: Tensor | numpy.ndarray) -> numpy.ndarray:
    array = without_extra_axes(array_of(picture), 3)
    first = isinstance(picture, Tensor)
    if array.ndim == 3 and array.shape[0 if first else -1] not in (1, 3, 4):
        array = without_extra_axes(array, 2)
    if array.ndim == 2:
        array = array[None] if first else array[..., None]
    channels = array.shape[0 if first else -1] if array.ndim == 3 else None
    if channels not in (1, 3, 4) or not array.size or array.dtype.kind not in "buif":
        wanted = "(3, height, width)" if first else "(height, width, 3)"
        raise ValueError(
            f"the picture is {described(picture, array)}, but should be a PIL image, or numbers of "
            f"shape {wanted}"
        )
    return array.transpose(1, 2, 0) if first else array


def array_of(value: Any) -> numpy.ndarray:
    """Numbers in an array, a tensor or lists as an array; of another kind, as one of objects."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value  # NumPy has no bfloat16
    try:
        return numpy.asarray(value)
    except (ValueError, TypeError):  # a list of rows of unequal length
        return numpy.asarray(None)


def without_extra_axes(array: numpy.ndarray, axes: int) -> numpy.ndarray:
    """The array without the first or last axes that have length one, where it has more than `axes`.

    Of shape (1, 1, height, width) and with `axes` = 2 it has (height, width).
    """
    while array.ndim > axes and array.shape[0] == 1:
        array = array[0]
    while array.ndim > axes and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def described(value: Any, array: numpy.ndarray) -> str:
    """What a message says of a value that is no picture: its shape where it has numbers."""
    if array.ndim and array.dtype.kind in "buif":
        return f"an array of shape {array.shape}"
    return excerpt(value)


def top_of(numbers: numpy.ndarray, subject: str = "") -> int:
    """White: the top of the numbers' own format.

    1 for yes and no, 255 for bytes, 65535 for 16 bits without a sign. Of other numbers it is the
    least of `TOPS` that none exceeds; for integers not 1.

    Args:
        numbers: any shape, not empty.
        subject: what a message begins with.

    Raises:
        ValueError: numbers that are not finite, below 0 or above 65535; rounding is forgiven.
    """
    kind, size = numbers.dtype.kind, numbers.dtype.itemsize
    if kind == "b":
        return 1
    if kind == "u" and size <= 2:
        return 2 ** (8 * size) - 1
    least, largest = numbers.min(), numbers.max()
    wanted = f"{subject}has values outside 0 to 1 (or 0 to 255, or to 65535)"
    if not numpy.isfinite([least, largest]).all():
        raise ValueError(f"{wanted}: some are not finite (NaN or infinite)")
    tops = TOPS if kind == "f" else TOPS[1:]
    top = next((top for top in tops if largest <= (1 + ROUNDING) * top), None)
    if top is not None and least >= -ROUNDING * top:
        return top
    raise ValueError(f"{wanted}: they go from {least:g} to {largest:g}")


# ------------------------------------------------------------------ what goes out


def png_of(image: Image.Image, *, optimize: bool = False) -> bytes:
    """The image as the bytes of a PNG file; `optimize` looks longer for a smaller file."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=optimize)
    return file.getvalue()


def data_uri(image: Image.Image, *, optimize: bool = False) -> str:
    """The image as a PNG in a data URI, which a browser shows and JSON can hold."""
    return _uri_of(png_of(image, optimize=optimize), "png")


def reduced_data_uri(picture: Picture, longest_side: int = SHOWN_SIDE) -> str:
    """The picture in a data URI, reduced to what a page shows: to look at, not to compute with.

    A PNG, or where that has more than `SHOWN_BYTES` (a photo), a JPEG of the best quality that has
    not: small drawings keep every pixel.

    Args:
        picture: of any size.
        longest_side: a longer side is reduced to so many pixels.
    """
    image = picture_of(picture)
    image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    png = png_of(image)
    if len(png) <= SHOWN_BYTES:
        return _uri_of(png, "png")
    for quality in range(90, 0, -10):
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=quality)
        if file.tell() <= SHOWN_BYTES:
            break
    return _uri_of(file.getvalue(), "jpeg")


def _uri_of(file: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
