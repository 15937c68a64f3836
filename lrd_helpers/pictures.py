"""Pictures as PIL images, as numbers and as text: every conversion, in one place."""

from __future__ import annotations

import base64
import io

import numpy
import torch
from jaxtyping import Float, UInt8
from PIL import Image
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
    `on_white` takes it into account.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
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
    return PNG_PREFIX + base64.b64encode(png_of(image, optimize=optimize)).decode()
