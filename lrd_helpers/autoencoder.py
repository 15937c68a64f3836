"""The first stage: what makes latents a good place for diffusion, and pictures sharp again."""

import itertools

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

Images = Float[Tensor, "batch 3 height width"]
Latents = Float[Tensor, "batch channels height width"]
Codebook = Float[Tensor, "codes channels"]
Codes = Int[Tensor, "batch height width"]


# ------------------------------------------------------------------ KL regularisation


def kl_divergence(
    mean: Float[Tensor, "batch *latent"], log_variance: Float[Tensor, "batch *latent"]
) -> Float[Tensor, ""]:
    """KL(N(mean, variance) ‖ N(0, 1)) in nats, summed over a latent, averaged over the batch.

    Kingma & Welling 2013, appendix B; the "KL-reg." of latent diffusion (Rombach et al. 2022, 3.1).
    """
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
    return divergence.flatten(1).sum(1).mean()


def reparameterise(
    mean: Float[Tensor, "batch *latent"],
    log_variance: Float[Tensor, "batch *latent"],
    noise: Float[Tensor, "batch *latent"],
) -> Float[Tensor, "batch *latent"]:
    """z = μ + σ·ε: a draw from N(μ, σ²) through which gradients flow to μ and σ.

    Kingma & Welling 2013, section 2.4. `noise` is ε, drawn from N(0, 1).
    """
    return mean + (log_variance / 2).exp() * noise


def scaling_factor(latents: Float[Tensor, "batch *latent"]) -> Float[Tensor, ""]:
    """1/σ̂ of all numbers of all latents: what they are multiplied with before diffusion.

    Rombach et al. 2022, appendix G: σ̂² is the mean of (z − μ̂)², μ̂ the mean of z; one number for
    all channels. 0.18215 in Stable Diffusion is this, of one batch.
    """
    return 1 / (latents - latents.mean()).square().mean().sqrt()


# ------------------------------------------------------------------ VQ regularisation


def nearest_codes(latents: Latents, codebook: Codebook) -> Codes:
    """argmin_k ‖z − e_k‖ at every position (VQ-VAE: van den Oord et al. 2017, Eq. 1)."""
    vectors = latents.movedim(1, -1).flatten(0, -2)
    shape = (latents.shape[0], *latents.shape[2:])
    return torch.cdist(vectors, codebook).argmin(1).reshape(shape)


def look_up(codes: Codes, codebook: Codebook) -> Latents:
    """The codebook's vector at every position (VQ-VAE, Eq. 2)."""
    return codebook[codes].movedim(-1, 1)


def straight_through(latents: Latents, quantised: Latents) -> Latents:
    """The values of `quantised` with the gradient of `latents`: z + sg[e − z] (VQ-VAE, 3.2).

    argmin has no gradient; so the decoder's is handed to the encoder as it is.
    """
    return latents + (quantised - latents).detach()


def codebook_loss(
    latents: Latents, quantised: Latents, commitment: float = 0.25
) -> Float[Tensor, ""]:
    """‖sg[z] − e‖² + commitment·‖z − sg[e]‖², means over all numbers (VQ-VAE, Eq. 3).

    The first term moves the codes to the latents, the second keeps the latents near their codes.
    """
    moves_codes = functional.mse_loss(quantised, latents.detach())
    return moves_codes + commitment * functional.mse_loss(latents, quantised.detach())


def perplexity(codes: Int[Tensor, "*shape"], count: int) -> Float[Tensor, ""]:
    """exp of the entropy of how often each of `count` codes is used: how many are really in use."""
    shares = torch.bincount(codes.flatten(), minlength=count) / codes.numel()
    return torch.special.entr(shares).sum().exp()


# ------------------------------------------------------------------ losses on pictures


def gradient_loss(
    prediction: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
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


def perceptual_distance(
    first: list[Float[Tensor, "batch _ _ _"]], second: list[Float[Tensor, "batch _ _ _"]]
) -> Float[Tensor, "batch"]:
    """Σ_l mean over positions of ‖f̂_l − ĝ_l‖²: how differently a network sees two pictures.

    LPIPS (Zhang et al. 2018, Eq. 1) with all weights w_l = 1: the features of every layer are made
    to have length 1 at each position, then compared.

    Args:
        first, second: a network's feature maps of two batches of pictures, layer by layer.

    Raises:
        ValueError: another number of layers in one than in the other, or none.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            f"{len(first)} and {len(second)} feature maps: give the same layers of both, at least 1"
        )
    total = torch.zeros(len(first[0]), device=first[0].device)
    for features, others in zip(first, second, strict=True):
        difference = functional.normalize(features, dim=1) - functional.normalize(others, dim=1)
        total = total + difference.square().sum(1).mean((1, 2))
    return total


class PatchDiscriminator(nn.Module):
    """Real or made? One answer for each patch: a PatchGAN (Isola et al. 2017, section 3.2.2).

    4×4 convolutions, `layers` of them with stride 2, and leaky ReLUs. An answer sees 10 × 10 pixels
    with one layer, 22 × 22 with two, 46 × 46 with three, and nothing else: the paper's batch
    normalisation is left out.
    """

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        widths = [3, *(width * 2**layer for layer in range(layers))]
        blocks: list[nn.Module] = []
        for enter, leave in itertools.pairwise(widths):
            blocks += [nn.Conv2d(enter, leave, 4, 2, 1), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, images: Images) -> Float[Tensor, "batch 1 rows columns"]:
        """Positive where a patch looks real, negative where it looks made; any real number."""
        return self.net(images)


def hinge_loss(
    real: Float[Tensor, "*answers"], made: Float[Tensor, "*answers"]
) -> Float[Tensor, ""]:
    """E[max(0, 1 − D(x))] + E[max(0, 1 + D(x̂))]: the discriminator's (Lim & Ye 2017, section 3).

    An answer that is right by a margin of 1 costs nothing. (VQGAN's code halves the sum.) The
    autoencoder's side is −E[D(x̂)].
    """
    return functional.relu(1 - real).mean() + functional.relu(1 + made).mean()


def adaptive_weight(
    reconstruction: Float[Tensor, ""],
    adversarial: Float[Tensor, ""],
    last_layer: Tensor,
    *,
    delta: float = 1e-6,
    most: float = 1e4,
) -> Float[Tensor, ""]:
    """λ = ‖∇ reconstruction‖ / (‖∇ adversarial‖ + δ): both losses pull equally hard.

    The gradients are those at the weights of the decoder's last layer (VQGAN: Esser et al. 2021,
    Eq. 7). λ itself is a constant for the optimiser, and at most `most`, as in their code.
    """
    gradients = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction, adversarial)
    ]
    return (gradients[0] / (gradients[1] + delta)).clamp(max=most).detach()
