"""Super-resolution by conditioning: twice the size, drawn in latents, the small picture in sight.

A picture as condition needs no attention: it is laid on top of the noisy latents as more channels
(latent diffusion, Rombach et al. 2022, section 4.4). And since bicubic interpolation is nearly
right already, only what it lacks is drawn, the residual of the latents (SRDiff, Li et al. 2022):

    z(large picture) = z(enlarged small picture) + σ_r·x_0,   x_0 drawn by diffusion
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.sampling.model import decode_latents, encode_images

with quiet_libraries():
    from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DModel

FACTOR = 2  # how many times wider and higher the picture becomes
CELL = 4  # pixels of the small picture along a latent cell: the autoencoder's 8, divided by FACTOR

Images = Float[Tensor, "batch 3 height width"]
LargeImages = Float[Tensor, "batch 3 large_height large_width"]
Latents = Float[Tensor, "batch channels rows columns"]
Levels = Float[Tensor, "batch"]


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion's betas, stretched so that the last step is pure noise; v-prediction.

    Then one step from pure noise already is the mean of all answers, and few more are needed
    (Lin et al. 2024, sections 3.1 to 3.3).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def shrink(images: LargeImages) -> Images:
    """Half the size: each pixel is the mean of the four it stands for."""
    return functional.avg_pool2d(images, FACTOR)


def enlarge(images: Images) -> LargeImages:
    """Twice the size by bicubic interpolation, not clamped: what a learned upsampler must beat."""
    return functional.interpolate(images, scale_factor=FACTOR, mode="bicubic")


def back_project(large: LargeImages, small: Images) -> LargeImages:
    """large + enlarge(small − shrink(large)): what the small picture knows is kept.

    One step of iterative back-projection (Irani & Peleg 1991, Eq. 1). It undoes what the
    autoencoder got wrong in areas, and leaves the edges to the model.
    """
    return (large + enlarge(small - shrink(large))).clamp(0, 1)


def with_noise(images: Images, levels: Levels, noise: Images) -> Images:
    """The small picture with noise of standard deviation `levels`, clamped to [0, 1].

    Noise hides a poor picture's faults, and leaves more to the model's own idea of a picture
    (conditioning augmentation: cascaded diffusion, Ho et al. 2021, section 4.1).
    """
    return (images + levels[:, None, None, None] * noise).clamp(0, 1)


def residual_scale(levels: Levels) -> Levels:
    """σ_r: the standard deviation of the residual at each noise level.

    Measured on storybook scenes with the shipped autoencoder: 0.08 without noise, and 4.3 times the
    level for the noise, independent of each other.
    """
    return (0.08**2 + (4.3 * levels) ** 2).sqrt()


@torch.no_grad()
def encode(images: LargeImages, vae: AutoencoderKL) -> Latents:
    """Scaled latents of images in [0, 1]: the posterior's mean times the scaling factor."""
    return encode_images(vae, (2 * images - 1).to(vae.device, vae.dtype))


@torch.no_grad()
def decode(latents: Latents, vae: AutoencoderKL) -> LargeImages:
    """Images in [0, 1] of scaled latents."""
    return (decode_latents(vae, latents) / 2 + 0.5).clamp(0, 1)


def condition(small: Images, base: Latents) -> Float[Tensor, "batch all_channels rows columns"]:
    """What is laid on top of the noisy latents: `base` and every pixel of the small picture.

    The 4 × 4 pixels under a latent cell become channels of that cell, so that nothing is lost.

    Args:
        small: in [0, 1]; sides divisible by 4.
        base: the scaled latents of the enlarged small picture, one cell for 4 × 4 small pixels.
    """
    return torch.cat([base, functional.pixel_unshuffle(2 * small - 1, CELL).to(base)], 1)


@torch.no_grad()
def upsample(
    small: Images,
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    vae: AutoencoderKL,
    *,
    generator: torch.Generator,
    steps: int = 8,
    noise_level: float = 0.0,
    consistent: bool = True,
) -> LargeImages:
    """Pictures of twice the size, in [0, 1], on the device of the U-Net.

    Args:
        small: pictures in [0, 1], sides divisible by 4. The model was trained at 64 × 64 pixels; as
            it only has convolutions, other sizes work too.
        unet, scheduler: as `lrd_helpers.models.load_upsampler` gives them.
        vae: the autoencoder they were trained with: the one of the storybook pipeline.
        generator: of all noise.
        steps: of the scheduler.
        noise_level: standard deviation of noise on the small picture, 0 to 0.05 as trained.
        consistent: end with `back_project`, so that the result, shrunk, is the small picture again.

    Raises:
        ValueError: sides that are not divisible by 4, or a noise level below 0.
    """
    if small.shape[2] % CELL or small.shape[3] % CELL:
        height, width = small.shape[2:]
        raise ValueError(
            f"the picture is {width} × {height} pixels, but both sides must be divisible by {CELL}:"
            f" cut it to {width // CELL * CELL} × {height // CELL * CELL}"
        )
    if noise_level < 0:
        raise ValueError(f"noise_level is {noise_level:g}, but must be 0 or more (0.05 is much)")

    def draw(shape: torch.Size) -> Tensor:  # on the generator's device: a seed means one picture
        return torch.randn(shape, generator=generator, device=generator.device).to(small)

    small = small.to(unet.device, unet.dtype)
    levels = torch.full((len(small),), float(noise_level), device=unet.device)
    seen = with_noise(small, levels, draw(small.shape)).to(unet.dtype) if noise_level else small
    base = encode(enlarge(seen).clamp(0, 1), vae).to(unet.dtype)
    scale = residual_scale(levels)[:, None, None, None].to(unet.dtype)
    conditions = condition(seen, base)

    scheduler.set_timesteps(steps, device=unet.device)
    residual = draw(base.shape) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(residual, t)
        prediction = unet(torch.cat([scaled, conditions], 1), t, class_labels=1000 * levels).sample
        residual = scheduler.step(prediction, t, residual, generator=generator).prev_sample
    large = decode(base + scale * residual, vae)
    return back_project(large, small) if consistent else large
