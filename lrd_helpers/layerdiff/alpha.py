"""Layers with alpha as latents: three ways, told apart by the autoencoder's channels and training.

| way | encoder | decoder | latents |
|---|---|---|---|
| grown from the shipped autoencoder (Qwen-Image-Layered, AlphaVAE) | RGBA, tuned | RGBA | 4 |
| colours laid on grey (ART) | frozen, sees no alpha | RGBA | 4 |
| the mask as a grey picture (LayerDiff, as read here) | RGB, twice | RGB, twice | 4 + 4 |

The first two are an `AutoencoderKL` of four channels, the third is any of three.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lrd_helpers.quiet import quiet_libraries

with quiet_libraries():
    from diffusers import AutoencoderKL

GREY = 0.5  # the ground that an encoder sees behind a layer: 0 in [-1, 1]

RGBA = Float[Tensor, "*batch 4 height width"]
"""Straight (not premultiplied) colours and alpha, in [0, 1]."""


def over(
    rgba: RGBA, ground: float | Float[Tensor, "*#batch 3 #height #width"]
) -> Float[Tensor, "*batch 3 height width"]:
    """α·c + (1 − α)·ground: the layer laid over a ground (Porter & Duff 1984)."""
    colour, alpha = rgba[..., :3, :, :], rgba[..., 3:, :, :]
    return alpha * colour + (1 - alpha) * ground


def straightened(
    on_grey: Float[Tensor, "batch 3 height width"], alpha: Float[Tensor, "batch 1 height width"]
) -> RGBA:
    """The layer that laid over grey gives `on_grey`; any colour will do where alpha is 0."""
    colour = GREY + (on_grey - GREY) / alpha.clamp(min=1 / 255)
    return torch.cat([colour, alpha], 1).clamp(0, 1)


def widened(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights in the shapes that `model` has, with zeros for the channels that are new."""
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    wide = {}
    for name, weight in weights.items():
        wide[name] = weight.new_zeros(shapes[name])
        wide[name][tuple(slice(length) for length in weight.shape)] = weight
    return wide


def grown(vae: AutoencoderKL) -> AutoencoderKL:
    """An RGBA autoencoder that sees and decodes opaque pictures as `vae` does, weight for weight.

    A fourth channel goes in with weights 0, and comes out with weights 0 and bias 1: opaque.
    """
    config = {name: x for name, x in vae.config.items() if not name.startswith("_")}
    rgba = AutoencoderKL.from_config(config | {"in_channels": 4, "out_channels": 4})
    weights = widened(vae.state_dict(), rgba)
    weights["decoder.conv_out.bias"][3] = 1.0
    rgba.load_state_dict(weights)
    return rgba


def pictures_of(vae: AutoencoderKL, rgba: RGBA) -> Float[Tensor, "pictures channels height width"]:
    """What the encoder is given, in [-1, 1]: RGBA on grey; or first all colours, then all masks."""
    on_grey, alpha = over(rgba, GREY), rgba[:, 3:]
    if vae.config.in_channels == 4:
        return 2 * torch.cat([on_grey, alpha], 1) - 1
    return 2 * torch.cat([on_grey, alpha.expand(-1, 3, -1, -1)]) - 1


def encode_layers(vae: AutoencoderKL, rgba: RGBA) -> Float[Tensor, "batch latent rows columns"]:
    """Scaled latents of layers, the posterior's mean: 4 channels, or 4 + 4 (colour, mask)."""
    means = vae.encode(pictures_of(vae, rgba)).latent_dist.mean * vae.config.scaling_factor
    return torch.cat(means.split(len(rgba)), 1)


def decode_layers(vae: AutoencoderKL, latents: Float[Tensor, "batch latent rows columns"]) -> RGBA:
    """The layers that scaled latents stand for."""
    codes = torch.cat(latents.split(vae.config.latent_channels, 1)) / vae.config.scaling_factor
    pictures = vae.decode(codes).sample.float() / 2 + 0.5
    if vae.config.out_channels == 4:
        return pictures.clamp(0, 1)
    on_grey, masks = pictures.clamp(0, 1).chunk(2)
    return straightened(on_grey, masks.mean(1, keepdim=True))
