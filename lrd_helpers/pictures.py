"""Pictures as PIL images, as numbers and as text: every conversion, in one place."""

from __future__ import annotations

import base64
import io

import numpy
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

Picture = (
    Image.Image
    | Float[Tensor, "3 _height _width"]
    | Float[numpy.ndarray, "_height _width 3"]
    | UInt8[numpy.ndarray, "_height _width 3"]
)
"""A PIL image, a tensor or an array; float tensors and arrays in [0, 1]."""

PNG_PREFIX = "data:image/png;base64,"
"""How a data URI of a PNG begins."""

SHOWN_SIDE = 1024
"""So many pixels of a picture's longer side are enough for a page."""

SHOWN_BYTES = 200_000
"""A picture in a page takes at most so many bytes: a notebook keeps two or three copies of it."""


def pixels_of(picture: Picture) -> Float[Tensor, "3 height width"]:
    """The picture as numbers in [0, 1], in single precision and on the CPU."""
    if isinstance(picture, Tensor):
        return picture.detach().float().cpu()
    if isinstance(picture, Image.Image):
        picture = numpy.asarray(picture.convert("RGB"))
    numbers = numpy.array(picture, numpy.float32)
    if picture.dtype == numpy.uint8:
        numbers /= 255
    return torch.from_numpy(numbers).permute(2, 0, 1)


def picture_of(picture: Picture) -> Image.Image:
    """The picture as an RGB image of PIL.

    Numbers outside [0, 1] are cut off, as every screen would. An alpha channel is left out;
    `on_white` takes it into account. A photo that says how the camera was held is turned upright.
    """
    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture).convert("RGB")
    if isinstance(picture, Tensor):
        picture = pixels_of(picture).permute(1, 2, 0).numpy()
    if picture.dtype == numpy.uint8:
        return Image.fromarray(picture)
    return Image.fromarray((255 * picture.clip(0, 1)).round().astype(numpy.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """The image as RGB, white shining through where it is transparent."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


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
