"""Trains the segmenter: a U-Net that says of every pixel which sticker, place and colour it is.

Channels 0 to 17 are logits over stickers and places (a background pixel's class is the scene's
place), channels 18 to 26 logits over colours and "none". It must also be right on what a diffusion
model draws, so three quarters of what it sees is damaged: blurred, noisy, faded, or decoded from
disturbed latents.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers.hf_argparser import HfArg

from lrd_helpers.storybook import COLOURS, IMAGE_SIZE, PLACES, STICKERS, Rendering, StorybookDataset
from lrd_helpers.training import export, loop
from lrd_helpers.training.options import ASSETS, SceneOptions, command, parse
from lrd_helpers.training.sheets import save_sheet

WHAT = STICKERS + PLACES


@dataclass(frozen=True)
class SegmenterOptions(SceneOptions):
    """The options of this training."""

    minutes: float = 30.0
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    ema_decay: float = 0.995
    run: Path = Path("runs/segmenter")
    output: Path = ASSETS / "storybook-segmenter"
    coarse_steps: int = HfArg(default=5000, help="first steps, on pictures of half the size")


def labels(
    rendering: Rendering,
) -> tuple[Int[Tensor, "batch height width"], Int[Tensor, "batch height width"]]:
    """Per pixel: the index in STICKERS + PLACES, and the index in COLOURS + ("none",)."""
    places = torch.tensor([WHAT.index(scene.place) for scene in rendering.scenes])
    what = places[:, None, None].repeat(1, *rendering.images.shape[-2:])
    colour = torch.full_like(what, len(COLOURS))
    names = list(COLOURS)
    for row, (scene, masks) in enumerate(zip(rendering.scenes, rendering.masks, strict=True)):
        for placed, mask in zip(scene.stickers, masks, strict=False):
            what[row][mask] = STICKERS.index(placed.sticker)
            colour[row][mask] = names.index(placed.colour)
    return what, colour


def damage(
    images: Float[Tensor, "batch 3 height width"],
    generator: torch.Generator,
    vae: AutoencoderKL | None,
) -> Float[Tensor, "batch 3 height width"]:
    """Leaves the first quarter of the batch clean; the rest looks like a model's poor pictures."""
    images = images.clone()
    quarter = len(images) // 4
    if vae is not None and quarter:
        with torch.no_grad():
            latents = vae.encode(2 * images[quarter : 2 * quarter] - 1).latent_dist.mean
            strength = 0.5 * torch.rand(quarter, 1, 1, 1, generator=generator)
            noise = torch.randn(latents.shape, generator=generator) / vae.config.scaling_factor
            images[quarter : 2 * quarter] = vae.decode(latents + strength * noise).sample / 2 + 0.5
    u = torch.rand(len(images), 4, 1, 1, 1, generator=generator)
    for row in range(2 * quarter, len(images)):
        radius = int(4 * u[row, 0])
        if radius:
            kernel = 2 * radius + 1
            images[row] = functional.avg_pool2d(
                images[row], kernel, 1, radius, count_include_pad=False
            )
    damaged = images[2 * quarter :]
    noise = torch.randn(damaged.shape, generator=generator)
    damaged = damaged + 0.12 * u[2 * quarter :, 1] ** 2 * noise
    gain, shift = 0.8 + 0.4 * u[2 * quarter :, 2], 0.1 * u[2 * quarter :, 3] - 0.05
    images[2 * quarter :] = (damaged - 0.5) * gain + 0.5 + shift
    return images.clamp(0, 1)


class SegmenterTraining(nn.Module):
    """The segmenter with its loss: cross-entropy of what plus cross-entropy of colour."""

    def __init__(self, start_from: Path | None, vae: AutoencoderKL | None) -> None:
        super().__init__()
        self.unet = (
            UNet2DModel(
                sample_size=128,
                in_channels=3,
                out_channels=len(WHAT) + len(COLOURS) + 1,
                block_out_channels=(16, 32, 64, 96, 128),
                down_block_types=("DownBlock2D",) * 5,
                up_block_types=("UpBlock2D",) * 5,
                layers_per_block=1,
                norm_num_groups=8,
                add_attention=False,
            )
            if start_from is None
            else UNet2DModel.from_pretrained(start_from, torch_dtype=torch.float32)
        )
        self.damaged_by = [vae]  # in a list, so that it is no submodule and is not trained

    def forward(self, batch: Rendering, generator: torch.Generator) -> dict[str, Tensor]:
        what, colour = labels(batch)
        images = damage(batch.images, generator, self.damaged_by[0])
        logits = self.unet(2 * images.to(self.unet.device) - 1, 0).sample.float()
        targets = what.to(logits.device), colour.to(logits.device)
        what_losses = functional.cross_entropy(logits[:, : len(WHAT)], targets[0], reduction="none")
        colour_losses = functional.cross_entropy(
            logits[:, len(WHAT) :], targets[1], reduction="none"
        )
        # Stickers and background count alike, though stickers are an eighth of the pixels:
        # otherwise their shapes and colours, the hardest of all, are learned last.
        stickers = targets[0] < len(STICKERS)
        weights = (~stickers) / (~stickers).sum().clamp(min=1) + stickers / stickers.sum().clamp(1)
        sticker_loss = (what_losses * weights * stickers).sum()
        place_loss = (what_losses * weights * ~stickers).sum()
        colour_loss = (colour_losses * weights).sum()
        loss = sticker_loss + place_loss + colour_loss
        return {
            "loss": loss,
            "sticker": sticker_loss,
            "place": place_loss,
            "colour": colour_loss,
        }


@torch.no_grad()
def evaluate(unet: UNet2DModel, vae: AutoencoderKL | None, scenes: int = 500) -> dict[str, object]:
    """Share of visible sticker pixels with sticker and colour right, and of right places."""
    right = {"clean": [], "damaged": []}
    places = []
    for number in range(scenes // 20):
        rendering = StorybookDataset(20, seed=loop.HELD_OUT_SEED).batch(number)
        what, colour = labels(rendering)
        stickers = what < len(STICKERS)
        generator = torch.Generator().manual_seed(number)
        for name, images in (
            ("clean", rendering.images),
            ("damaged", damage(rendering.images, generator, vae)),
        ):
            logits = unet(2 * images - 1, 0).sample
            both = (logits[:, : len(WHAT)].argmax(1) == what) & (
                logits[:, len(WHAT) :].argmax(1) == colour
            )
            right[name].append(both[stickers])
            if name == "clean":
                guess = logits[:, len(STICKERS) : len(WHAT)].mean((2, 3)).argmax(1) + len(STICKERS)
                truth = torch.tensor([WHAT.index(scene.place) for scene in rendering.scenes])
                places.append(guess == truth)
    scores = {
        f"sticker and colour right, pixels of {scenes} {name} held-out scenes": round(
            float(torch.cat(pixels).float().mean()), 4
        )
        for name, pixels in right.items()
    }
    return {**scores, "place right, clean": round(float(torch.cat(places).float().mean()), 4)}


@torch.no_grad()
def sample_sheet(unet: UNet2DModel, path: Path) -> None:
    """Held-out pictures, damaged, each beside the colours that the model sees in it."""
    images = StorybookDataset(32, seed=loop.HELD_OUT_SEED).batch(0).images
    images = damage(images, torch.Generator().manual_seed(0), None)[::2]
    logits = unet(2 * images.to(unet.device) - 1, 0).sample.float().cpu()
    palette = torch.tensor([*COLOURS.values(), (0.0, 0.0, 0.0)])
    seen = palette[logits[:, len(WHAT) :].argmax(1)].permute(0, 3, 1, 2)
    save_sheet(torch.stack([images, seen], 1).flatten(0, 1), path, columns=8)


def main(arguments: list[str] | None = None) -> None:
    options = parse(SegmenterOptions, "segmenter", __doc__, arguments)
    torch.manual_seed(options.seed)
    autoencoder = ASSETS / "storybook" / "vae"
    vae = (
        AutoencoderKL.from_pretrained(autoencoder, torch_dtype=torch.float32)
        if autoencoder.exists()
        else None
    )
    trainee = SegmenterTraining(options.start_from, vae)

    def batches(start: int, reader: int, readers: int) -> Iterator[Rendering]:
        # Shapes can be learned at half the size for a quarter of the work; fine edges come after.
        for end, size in ((options.coarse_steps, IMAGE_SIZE // 2), (None, IMAGE_SIZE)):
            stream = StorybookDataset(
                options.batch_size,
                seed=options.seed,
                start=start,
                reader=reader,
                readers=readers,
                sticker_shares=options.sticker_shares,
                size=size,
            )
            steps = None if end is None else max(0, end - start)
            yield from itertools.islice(stream, steps)
            start += steps or 0

    progress = loop.train(
        trainee, options, batches=batches, sample=lambda path: sample_sheet(trainee.unet, path)
    )
    scores = evaluate(trainee.unet, vae)
    with export.exported(
        options, progress, scores, title="storybook: segmenter", what=__doc__
    ) as folder:
        trainee.unet.half().save_pretrained(folder)


if __name__ == "__main__":
    command(main)
