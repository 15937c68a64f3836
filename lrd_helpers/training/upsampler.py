"""Trains the latent upsampler: 64 → 128 px, a small U-Net that sees the picture it is to enlarge.

The loss is the v-prediction's (Salimans & Ho 2022) on what the latents of the bicubically enlarged
picture lack. Half of the small pictures have noise on them, up to --noise-level, and the U-Net is
told how much: it may then be asked to trust a poor picture less.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lrd_helpers.autoencoder import psnr
from lrd_helpers.storybook import STYLES, StorybookDataset, seeded
from lrd_helpers.training import loop
from lrd_helpers.training.latent_cache import encoded_once
from lrd_helpers.training.latent_diffusion import CACHE_BATCH
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


class EnlargementCache:
    """Small pictures and latents of the first scenes of a stream, and batches drawn from them."""

    def __init__(
        self, vae: AutoencoderKL, options: argparse.Namespace, reader: int, readers: int
    ) -> None:
        self.options, self.reader = options, reader
        styles = ("flat",) * 6 + STYLES[1:]  # as the autoencoder's
        stream = StorybookDataset(CACHE_BATCH, seed=options.seed, styles=styles)

        def make(number: int) -> dict[str, Tensor]:
            images, generator = stream.batch(number).images, seeded(options.seed, 3, number)
            levels = options.noise_level * torch.rand(len(images), generator=generator)
            levels[::2] = 0
            small = shrink(images)
            small = with_noise(small, levels, torch.randn(small.shape, generator=generator))
            half = options.mixed_precision == "bf16"
            with torch.autocast(vae.device.type, torch.bfloat16, enabled=half):
                base = encode(enlarge(small).clamp(0, 1), vae).float().cpu()
                residual = encode(images, vae).float().cpu() - base
            return {
                "small": (255 * small).round().byte(),
                "levels": levels,
                "base": base.half(),
                "residual": residual.half(),
            }

        numbers = range(reader, max(1, options.cache // CACHE_BATCH // readers) * readers, readers)
        noise = f"{options.noise_level:g}"
        name = f"small-{options.cache}-{options.seed}-{noise}-{reader}-of-{readers}.safetensors"
        self.kept = encoded_once(options.run / name, vae, numbers, make, quiet=reader > 0)

    def batches(self, start: int) -> Iterator[Enlargements]:
        """Batch number n depends on (seed, n, reader) alone."""
        while True:
            generator = seeded(self.options.seed, 2, start, self.reader)
            count = len(self.kept["levels"])
            rows = torch.randint(count, (self.options.batch_size,), generator=generator)
            chosen = {name: tensor[rows].float() for name, tensor in self.kept.items()}
            yield Enlargements(**chosen | {"small": chosen["small"] / 255})
            start += 1


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
    parser = loop.parser(
        "upsampler",
        __doc__,
        minutes=40,
        batch_size=32,
        learning_rate=1e-3,
        ema_decay=0.999,
        warmup=100,
        output=loop.ASSETS / "storybook-upsampler",
    )
    parser.add_argument(
        "--autoencoder",
        type=Path,
        default=loop.ASSETS / "storybook" / "vae",
        help="folder of the finished first stage",
    )
    parser.add_argument("--cache", type=int, default=12_000, help="scenes encoded once and kept")
    parser.add_argument(
        "--noise-level",
        type=float,
        default=0.05,
        help="the most noise on a small picture (standard deviation); 0 for none",
    )
    options = loop.parse(parser, arguments)
    if options.noise_level < 0:
        parser.error(f"--noise-level {options.noise_level}: must be 0 or more")
    if not (options.autoencoder / "config.json").exists():
        parser.error(
            f"--autoencoder {options.autoencoder}: no autoencoder there; train it first: "
            "python -m lrd_helpers.training.autoencoder"
        )
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
    with loop.replacing_folder(options.output) as folder:
        trainee.unet.half().save_pretrained(folder)
        trainee.scheduler.save_pretrained(folder / "scheduler")
        loop.model_card(
            folder,
            title="storybook: latent upsampler, 64 → 128 px",
            what=__doc__.strip(),
            options=options,
            progress=progress,
            scores=scores,
        )
    print(scores)


if __name__ == "__main__":
    loop.command(main)
