"""The size that a model wants its pictures in."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def resized(
    images: Float[Tensor, "batch channels _ _"], height: int, width: int
) -> Float[Tensor, "batch channels {height} {width}"]:
    """The images, or logits, at another size: bilinear, and smoothed before they shrink."""
    if images.shape[-2:] == (height, width):
        return images
    return functional.interpolate(images, (height, width), mode="bilinear", antialias=True)
