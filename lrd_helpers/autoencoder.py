"""The first stage's losses: what makes latents a good place for diffusion."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Images = Float[Tensor, "batch 3 height width"]


def kl_divergence(
    mean: Float[Tensor, "batch *latent"], log_variance: Float[Tensor, "batch *latent"]
) -> Float[Tensor, ""]:
    """KL(N(mean, variance) ‖ N(0, 1)) in nats, summed over a latent, averaged over the batch.

    Kingma & Welling 2013, appendix B; the "KL-reg." of latent diffusion (Rombach et al. 2022, 3.1).
    """
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
    return divergence.flatten(1).sum(1).mean()


def gradient_loss(prediction: Images, target: Images) -> Float[Tensor, ""]:
    """|∇prediction − ∇target|₁: a blurred edge costs as much as a misplaced one.

    The world is drawn with outlines; a plain L1 lets them wash out, since they are few pixels.
    """
    loss = torch.zeros((), device=target.device)
    for axis in (-1, -2):
        loss = loss + functional.l1_loss(prediction.diff(dim=axis), target.diff(dim=axis))
    return loss


def psnr(prediction: Images, target: Images) -> Float[Tensor, "batch"]:
    """Peak signal-to-noise ratio in dB of images in [0, 1]: 10·log₁₀(1 / mean squared error)."""
    return -10 * (prediction - target).square().flatten(1).mean(1).log10()
