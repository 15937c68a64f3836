"""How near a layer with alpha is to the true layer, and how well a stack holds together."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Pictures = Float[Tensor, "batch 3 height width"]  # in [0, 1]
Layers = Float[Tensor, "batch 4 height width"]  # straight colours and alpha, in [0, 1]
Scores = Float[Tensor, "batch"]

GROUNDS = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0))
"""Black, white, grey, magenta, green: a wrong alpha shows on one of them at least."""


def soft_iou(layers: Layers, truth: Layers) -> Scores:
    """Σ min(α, α*) / Σ max(α, α*): the overlap of two alphas; 1 where both layers are empty."""
    alpha, true = layers[:, 3].flatten(1), truth[:, 3].flatten(1)
    union = torch.maximum(alpha, true).sum(1)
    return torch.where(union > 0, torch.minimum(alpha, true).sum(1) / union.clamp(min=1e-9), 1.0)


def alpha_sad(layers: Layers, truth: Layers) -> Scores:
    """Σ |α − α*|, in thousands of pixels, as matting counts it (Rhemann et al. 2009)."""
    return (layers[:, 3] - truth[:, 3]).abs().flatten(1).sum(1) / 1000


def colour_error(layers: Layers, truth: Layers) -> Scores:
    """The mean |c − c*| over the channels, weighted by the true alpha (LayerD: Suzuki et al. 2025).

    NaN for an empty true layer: it has no colour.
    """
    true = truth[:, 3].flatten(1)
    error = (layers[:, :3] - truth[:, :3]).abs().mean(1).flatten(1)
    return (true * error).sum(1) / true.sum(1)


def blended_psnr(layers: Layers, truth: Layers) -> Scores:
    """PSNR in dB of the layers laid over `GROUNDS`: of the mean squared error over all of them."""
    squares = layers.new_zeros(len(layers))
    for ground in layers.new_tensor(GROUNDS)[:, :, None, None]:
        difference = [
            each[:, 3:] * each[:, :3] + (1 - each[:, 3:]) * ground for each in (layers, truth)
        ]
        squares += (difference[0] - difference[1]).square().flatten(1).mean(1)
    return -10 * (squares / len(GROUNDS)).clamp(min=1e-10).log10()


def psnr(pictures: Pictures, truth: Pictures, where: Tensor | None = None) -> Scores:
    """PSNR in dB of pictures in [0, 1]; NaN where `where` (batch, height, width) is nowhere."""
    squares = (pictures - truth).square().mean(1)
    weights = torch.ones_like(squares) if where is None else where.to(squares)
    mean = (weights * squares).flatten(1).sum(1) / weights.flatten(1).sum(1)
    return -10 * mean.clamp(min=1e-10).log10()


def ssim(pictures: Pictures, truth: Pictures) -> Scores:
    """Structural similarity (Wang et al. 2004): Gaussian windows of 11 × 11, σ = 1.5, in [0, 1]."""
    line = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, -1, -1)

    def mean(x: Pictures) -> Pictures:
        return functional.conv2d(x, window, groups=3)

    a, b = mean(pictures), mean(truth)
    spread_a, spread_b = mean(pictures**2) - a**2, mean(truth**2) - b**2
    together = mean(pictures * truth) - a * b
    light = (2 * a * b + 0.01**2) / (a**2 + b**2 + 0.01**2)
    form = (2 * together + 0.03**2) / (spread_a + spread_b + 0.03**2)
    return (light * form).flatten(1).mean(1)


def composed(
    background: Pictures, layers: Float[Tensor, "batch layers 4 height width"]
) -> Pictures:
    """The layers laid over the background, back to front."""
    picture = background
    for layer in layers.unbind(1):
        picture = layer[:, 3:] * layer[:, :3] + (1 - layer[:, 3:]) * picture
    return picture


def order_right(
    composite: Float[Tensor, "3 height width"],
    back: Float[Tensor, "4 height width"],
    front: Float[Tensor, "4 height width"],
    least: float = 0.005,
) -> bool | None:
    """Whether a picture shows the front layer where two of its layers overlap.

    Where both are opaque, the picture's colours are nearer to the front layer's than to the back's.

    Returns:
        None where the overlap is less than `least` of the canvas, or both have one colour there.
    """
    both = (back[3] > 0.5) & (front[3] > 0.5)
    if float(both.float().mean()) < least:
        return None
    errors = [(composite - layer[:3]).abs().sum(0)[both].mean() for layer in (front, back)]
    apart = (front[:3] - back[:3]).abs().sum(0)[both].mean()
    return None if float(apart) < 0.1 else bool(errors[0] < errors[1])
