"""Trains the latent upsampler: 64 → 128 px, a small U-Net that sees the picture it is to enlarge.

The loss is the v-prediction's (Salimans & Ho 2022) on what the latents of the bicubically enlarged
picture lack. Half of the small pictures have noise on them, up to --noise-level, and the U-Net is
told how much: it may then be asked to trust a poor picture less.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.hf_argparser import HfArg

from lrd_helpers.autoencoder import psnr
from lrd_helpers.storybook import STYLES, StorybookDataset, seeded
from lrd_helpers.training import export, loop
from lrd_helpers.training.latent_cache import CACHE_BATCH, SceneCache
from lrd_helpers.training.options import ASSETS, CacheOptions, check_trained, command, parse
from lrd_helpers.training.sheets import save_sheet
from lrd_helpers.upsampling import (
    CELL,
    back_project,
    condition,
    decode,
    encode,
    enlarge,
    noise_schedule,
    residual_scale,
    shrink,
    upsample,
    with_noise,
)

Latents = Float[Tensor, "batch 4 rows columns"]


@dataclass(frozen=True)
class UpsamplerOptions(CacheOptions):
    """The options of this training."""

    minutes: float = 40.0
    run: Path = Path("runs/upsampler")
    output: Path = ASSETS / "storybook-upsampler"
    cache: int = 12_000
    autoencoder: Path = HfArg(
        default=ASSETS / "storybook" / "vae", help="folder of the finished first stage"
    )
    noise_level: float = HfArg(
        default=0.05, help="the most noise on a small picture (standard deviation); 0 for none"
    )

    def check(self) -> None:
        super().check()
        if not self.noise_level >= 0:
            raise ValueError(f"--noise-level {self.noise_level}: must be 0 or more")
        needed = "config.json"
        check_trained("--autoencoder", self.autoencoder, "autoencoder", "autoencoder", needed)


@dataclass(frozen=True)
class Enlargements:
    """A batch of small pictures, and what bicubic interpolation lacks of the large ones."""

    small: Float[Tensor, "batch 3 height width"]  # in [0, 1], with noise on it
    levels: Float[Tensor, "batch"]  # the noise's standard deviation
    base: Latents  # of the enlarged small picture
    residual: Latents  # latents of the large picture − base


class UpsamplerTraining(nn.Module):
    """The U-Net with its loss."""

    def __init__(self, start_from: Path | None = None) -> None:
        super().__init__()
        self.scheduler = noise_schedule()
        self.unet = (
            UNet2DModel(
                sample_size=16,
                in_channels=4 + 4 + 3 * CELL**2,  # noisy residual, base, the small picture's pixels
                out_channels=4,
                block_out_channels=(64, 96),
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
                layers_per_block=1,
                norm_num_groups=16,
                add_attention=False,
                class_embed_type="timestep",
            )
            if start_from is None
            else UNet2DModel.from_pretrained(start_from, torch_dtype=torch.float32)
        )

    def forward(self, batch: Enlargements, generator: torch.Generator) -> dict[str, Tensor]:
        device = self.unet.device
        x0 = batch.residual / residual_scale(batch.levels)[:, None, None, None]
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(x0),), generator=generator
        )
        noisy = self.scheduler.add_noise(x0, noise, timesteps)
        target = self.scheduler.get_velocity(x0, noise, timesteps)
        seen = torch.cat([noisy, condition(batch.small, batch.base)], 1)
        prediction = self.unet(
            seen.to(device), timesteps.to(device), class_labels=1000 * batch.levels.to(device)
        ).sample.float()
        return {"loss": functional.mse_loss(prediction, target.to(device))}


class EnlargementCache(SceneCache):
    """Small pictures and latents of the first scenes of a stream, and batches drawn from them."""

    options: UpsamplerOptions

    def __init__(
        self, vae: AutoencoderKL, options: UpsamplerOptions, reader: int, readers: int
    ) -> None:
        styles = ("flat",) * 6 + STYLES[1:]  # as the autoencoder's
        self.stream = StorybookDataset(CACHE_BATCH, seed=options.seed, styles=styles)
        name = f"small-{options.cache}-{options.seed}-{options.noise_level:g}"
        super().__init__(name, vae, options, reader, readers)

    def tensors(self, number: int) -> dict[str, Tensor]:
        images = self.stream.batch(number).images
        generator = seeded(self.options.seed, 3, number)
        levels = self.options.noise_level * torch.rand(len(images), generator=generator)
        levels[::2] = 0
        small = shrink(images)
        small = with_noise(small, levels, torch.randn(small.shape, generator=generator))
        with self.half_precision():
            base = encode(enlarge(small).clamp(0, 1), self.vae).float().cpu()
            residual = encode(images, self.vae).float().cpu() - base
        return {
            "small": (255 * small).round().byte(),
            "levels": levels,
            "base": base.half(),
            "residual": residual.half(),
        }

    def batch(self, number: int) -> Enlargements:
        generator = seeded(self.options.seed, 2, number, self.reader)
        count = len(self.kept["levels"])
        rows = torch.randint(count, (self.options.batch_size,), generator=generator)
        chosen = {name: tensor[rows].float() for name, tensor in self.kept.items()}
        return Enlargements(**chosen | {"small": chosen["small"] / 255})


def evaluate(
    unet: UNet2DModel, scheduler: DDIMScheduler, vae: AutoencoderKL, scenes: int = 256
) -> dict[str, object]:
    """PSNR on held-out scenes: bicubic, upsampled, and the most the autoencoder lets through.

    "nothing drawn" is the bicubic picture through the autoencoder: where the U-Net starts from.
    """
    ratios: dict[str, list[Tensor]] = {}
    for number in range(scenes // 32):
        images = StorybookDataset(32, seed=loop.HELD_OUT_SEED).batch(number).images
        small = shrink(images)
        bicubic = enlarge(small).clamp(0, 1)
        drawn = upsample(small, unet, scheduler, vae, generator=seeded(0, number), consistent=False)
        for name, large in (
            ("bicubic", bicubic),
            ("nothing drawn", decode(encode(bicubic, vae), vae)),
            ("upsampled", drawn),
            ("the autoencoder alone", decode(encode(images, vae), vae)),
        ):
            ratios.setdefault(name, []).append(psnr(large, images))
            consistent = back_project(large, small)
            ratios.setdefault(f"{name}, back-projected", []).append(psnr(consistent, images))
    return {
        f"PSNR (dB), {name}, {scenes} held-out scenes": round(float(torch.cat(each).mean()), 2)
        for name, each in ratios.items()
    }


def sample_sheet(trainee: UpsamplerTraining, vae: AutoencoderKL, path: Path) -> None:
    """Eight held-out scenes, one a row: the small picture, bicubic, upsampled, the true one."""
    images = StorybookDataset(8, seed=loop.HELD_OUT_SEED, styles=STYLES).batch(0).images
    small = shrink(images)
    large = upsample(small, trainee.unet, trainee.scheduler, vae, generator=seeded(0)).cpu()
    pixels = functional.interpolate(small, scale_factor=2, mode="nearest")
    rows = torch.stack([pixels, enlarge(small).clamp(0, 1), large.float(), images], 1)
    save_sheet(rows.flatten(0, 1), path, columns=4)


def main(arguments: list[str] | None = None) -> None:
    options = parse(UpsamplerOptions, "upsampler", __doc__, arguments)
    torch.manual_seed(options.seed)
    vae = AutoencoderKL.from_pretrained(options.autoencoder, torch_dtype=torch.float32).eval()
    if torch.cuda.is_available():
        vae.cuda()
    trainee = UpsamplerTraining(options.start_from)
    progress = loop.train(
        trainee,
        options,
        batches=lambda start, reader, readers: EnlargementCache(
            vae, options, reader, readers
        ).batches(start),
        sample=lambda path: sample_sheet(trainee, vae, path),
    )
    scores = evaluate(trainee.unet, trainee.scheduler, vae.cpu())
    with export.exported(
        options,
        progress,
        scores,
        title="storybook: latent upsampler, 64 → 128 px",
        what=__doc__,
    ) as folder:
        trainee.unet.half().save_pretrained(folder)
        trainee.scheduler.save_pretrained(folder / "scheduler")


if __name__ == "__main__":
    command(main)
