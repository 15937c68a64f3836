"""Vision guidance: the field ξ that tells one layer where its object is (LRDiff, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from PIL import ImageColor
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

NORM = 2.0
"""The Euclidean norm of a constant δ: about that of one cell of x_T ~ N(0, I) in 4 channels."""

GREY = "#808080"
"""The colour without a direction: δ points from its latent to that of the colour asked for."""


def vision_guidance(
    delta: Float[Tensor, "channels"],
    mask: Float[Tensor, "height width"],
    inside: float,
    outside: float,
) -> Float[Tensor, "channels height width"]:
    """ξ = δ·(inside·M − outside·(1 − M)): added to one layer's noisy latents (LRDiff, Eq. 5).

    `inside` = `outside` = λ is the paper; 0.05 / 0.20 is the authors' script.
    """
    return delta[:, None, None] * (inside * mask - outside * (1 - mask))


@torch.no_grad()
def constant_delta(
    vae: AutoencoderKL,
    colour: str,
    *,
    size: int = 128,
    device: torch.device | str | None = None,
) -> Float[Tensor, "channels"]:
    """δ of a flat colour: from grey's latent to the colour's, scaled to norm `NORM` (LRDiff, 3.2).

        z(c) = scaling_factor · mean over cells of E(flat picture of colour c)
        δ    = NORM · (z(colour) − z(grey)) / |z(colour) − z(grey)|

    The paper takes z(colour) itself, chosen by a person. Without taking grey away δ would mostly
    say "a flat picture", whatever the colour; and with one norm for all, a strength λ means the
    same for every colour and model. λ = 0.2 is what our trial used.

    Args:
        vae: the autoencoder of the model that will be guided (δ is in its latent space).
        colour: a CSS name or a hex like "#ff8800".
        size: height and width of the flat pictures in pixels.
        device: where to compute; the autoencoder's own by default.

    Returns:
        δ in single precision; zero where the colour is grey itself.

    Raises:
        ValueError: the colour is no name and no hex.
    """
    device = vae.device if device is None else device
    rgb = torch.tensor([ImageColor.getrgb(c)[:3] for c in (GREY, colour)], dtype=torch.float32)
    pixels = (rgb / 127.5 - 1)[:, :, None, None].expand(-1, -1, size, size)
    latents = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mean.float()
    grey, flat = (latents * vae.config.scaling_factor).mean(dim=(2, 3))
    return NORM * torch.nn.functional.normalize(flat - grey, dim=0)


def dynamic_delta(
    latents: Float[Tensor, "channels height width"],
    attention: Float[Tensor, "height width"],
    top_k: int,
) -> Float[Tensor, "channels"]:
    """δ = 1/|S| · Σ_{(j,k) ∈ S} x_T[j,k], S the `top_k` positions of largest attention (Eq. 6).

    The paper's λ is not in it: it is the strength that `vision_guidance` multiplies δ with.

    Args:
        latents: x_T ~ N(0, I).
        attention: the map of the object's word at t = T, of the same height and width.
        top_k: K, from 1 to height · width.
    """
    chosen = attention.flatten().topk(top_k).indices
    return latents.flatten(1)[:, chosen].float().mean(dim=1)


@torch.no_grad()
def decoded_delta(
    vae: AutoencoderKL,
    latents: Float[Tensor, "channels height width"],
    attention: Float[Tensor, "height width"],
    top_k: int,
) -> Float[Tensor, "channels"]:
    """δ as the authors' script has it: the latent of the mean colour that x_T shows at the object.

        rgb = D(x_T / scaling_factor)                        the initial noise as a picture
        c   = mean of rgb at the `top_k` pixels of largest attention, the map brought to its size
        δ   = scaling_factor · mean over cells of E(flat picture of colour c)

    Args:
        vae: the autoencoder of the model that will be guided.
        latents: x_T ~ N(0, I).
        attention: the map of the object's word at t = T, of any height and width.
        top_k: how many pixels; 20 in the script.
    """
    scaling_factor = vae.config.scaling_factor
    rgb = vae.decode((latents[None] / scaling_factor).to(vae.dtype)).sample[0].float()
    pixels = torch.nn.functional.interpolate(
        attention[None, None].float(), size=rgb.shape[-2:], mode="bilinear"
    )
    colour = dynamic_delta(rgb, pixels[0, 0], top_k)
    flat = colour[None, :, None, None].expand(-1, -1, *rgb.shape[-2:])
    latent = vae.encode(flat.to(vae.dtype)).latent_dist.mean[0].float()
    return latent.mean(dim=(1, 2)) * scaling_factor
