"""How near a layer with alpha is to the true layer."""

import torch
from jaxtyping import Float
from torch import Tensor

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
    squares = torch.zeros(len(layers))
    for ground in torch.tensor(GROUNDS)[:, :, None, None]:
        difference = [
            each[:, 3:] * each[:, :3] + (1 - each[:, 3:]) * ground for each in (layers, truth)
        ]
        squares += (difference[0] - difference[1]).square().flatten(1).mean(1)
    return -10 * (squares / len(GROUNDS)).clamp(min=1e-10).log10()
