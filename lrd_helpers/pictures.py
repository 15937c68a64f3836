"""Pictures as PIL images and as tensors."""

import numpy
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

Picture = Image.Image | Float[Tensor, "3 _height _width"]
"""A PIL image, or a tensor in [0, 1]."""


def pixels_of(image: Picture) -> Float[Tensor, "3 height width"]:
    """The picture as numbers in [0, 1], on the CPU."""
    if isinstance(image, Image.Image):
        array = numpy.asarray(image.convert("RGB"), numpy.float32) / 255
        return torch.from_numpy(array).permute(2, 0, 1)
    return image.detach().float().cpu()


def picture_of(image: Picture) -> Image.Image:
    """The picture as an RGB image of PIL."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = (255 * pixels_of(image).clamp(0, 1)).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
