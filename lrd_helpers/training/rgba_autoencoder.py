"""Trains an autoencoder of layers with alpha, from the shipped one.

Four channels go in and come out; the shipped weights stay, new ones begin at 0. Latents of opaque
scenes are held to those of the shipped encoder, so that its U-Net can read them. With
--freeze-encoder only the decoder learns: from the shipped autoencoder, which sees no alpha, that
is the way of layers laid on grey; from a finished RGBA autoencoder, sharper layers for a U-Net that
stays valid. With --masks three channels stay three, and a layer is two pictures, its colours on
grey and its mask (the paper's way, tuned).

Loss: L1 + 5·MSE + 2·|∇x − ∇y|₁ of layers laid over black, white, grey and a random colour, the same
of alpha, 3e-4·KL, and the squared distance of scaled latents of opaque scenes to the shipped ones.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.hf_argparser import HfArg

from lrd_helpers.autoencoder import gradient_loss, kl_divergence, psnr
from lrd_helpers.layerdiff.alpha import (
    RGBA,
    decode_layers,
    encode_layers,
    grown,
    over,
    pictures_of,
)
from lrd_helpers.measure.layers import alpha_sad, blended_psnr, colour_error, soft_iou
from lrd_helpers.storybook import STYLES, Rendering, StorybookDataset
from lrd_helpers.training import export, loop
from lrd_helpers.training.latent_cache import encoded
from lrd_helpers.training.options import ASSETS, TrainingOptions, check_trained, command, parse
from lrd_helpers.training.sheets import save_sheet

STICKER_SHARES = (0.0, 0.5, 0.25, 0.15, 0.1)
EMPTY_LAYERS = 0.04
OPAQUE = 0.25  # of a batch: whole scenes, so that those stay what they are


@dataclass(frozen=True)
class RGBAOptions(TrainingOptions):
    """The options of this training."""

    batch_size: int = 4
    weight_decay: float = 0.0
    run: Path = Path("runs/rgba-autoencoder")
    output: Path = Path("runs/rgba-autoencoder/model")
    start_from: Path | None = ASSETS / "storybook" / "vae"
    masks: bool = HfArg(default=False, help="a layer's mask is a grey picture beside its colours")
    freeze_encoder: bool = HfArg(default=False, help="train the decoder only")
    autoencoder: Path = HfArg(
        default=ASSETS / "storybook" / "vae",
        help="the autoencoder whose latents of opaque scenes are kept",
    )

    def check(self) -> None:
        super().check()
        check_trained(
            "--autoencoder", self.autoencoder, "autoencoder", "autoencoder", "config.json"
        )
        if self.start_from is None:
            raise ValueError("--from: this training grows an autoencoder; name a finished one")


def picture_loss(prediction: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """L1 + 5·MSE + 2·|∇x − ∇y|₁, of pictures in [-1, 1], as the shipped autoencoder's."""
    return (
        functional.l1_loss(prediction, target)
        + 5 * functional.mse_loss(prediction, target)
        + 2 * gradient_loss(prediction, target)
    )


class RGBATraining(nn.Module):
    """The autoencoder with its loss."""

    def __init__(self, options: RGBAOptions) -> None:
        super().__init__()
        vae = AutoencoderKL.from_pretrained(options.start_from, torch_dtype=torch.float32)
        self.vae = vae if options.masks or vae.config.in_channels == 4 else grown(vae)
        if options.freeze_encoder:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        before = AutoencoderKL.from_pretrained(options.autoencoder, torch_dtype=torch.float32)
        self.before = [before.eval().requires_grad_(False)]  # in a list: it is not trained

    def forward(self, batch: Rendering, generator: torch.Generator) -> dict[str, Tensor]:
        rgba, opaque = mixed(batch, generator)
        rgba = rgba.to(self.vae.device)
        pictures = pictures_of(self.vae, rgba)
        posterior = self.vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(rgba.device)
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = kl_divergence(posterior.mean.float(), posterior.logvar.float()) / noise[0].numel()
        if self.vae.config.in_channels == 3:
            losses = {"picture": picture_loss(decoded, pictures)}
        else:
            losses = rgba_losses(decoded / 2 + 0.5, rgba, generator)
        held = self.distance(posterior.mean.float()[:opaque], rgba[:opaque])
        loss = sum(losses.values()) + 3e-4 * kl + held
        return {"loss": loss, **losses, "kl": kl, "held": held}

    def distance(self, means: Tensor, rgba: RGBA) -> Float[Tensor, ""]:
        """The mean squared distance of scaled latents to the shipped encoder's."""
        before = self.before[0].to(means.device)
        with torch.no_grad():
            target = before.encode(2 * rgba[:, :3] - 1).latent_dist.mean.float()
        return functional.mse_loss(means, target) * self.vae.config.scaling_factor**2


def rgba_losses(
    decoded: RGBA, truth: RGBA, generator: torch.Generator
) -> dict[str, Float[Tensor, ""]]:
    """The loss over flat grounds (AlphaVAE: Wang et al. 2025), and of alpha alone."""
    colour = torch.rand(len(truth), 3, 1, 1, generator=generator).to(truth.device)
    grounds = (0.0, 1.0, 0.5, colour)
    blended = [
        picture_loss(2 * over(decoded, ground) - 1, 2 * over(truth, ground) - 1)
        for ground in grounds
    ]
    alpha = picture_loss(2 * decoded[:, 3:] - 1, 2 * truth[:, 3:] - 1)
    return {"blended": sum(blended) / len(blended), "alpha": alpha}


def mixed(batch: Rendering, generator: torch.Generator) -> tuple[RGBA, int]:
    """First whole scenes, then a layer of each of the others; and how many are whole.

    A whole scene is opaque: with its stickers, or the place alone. A few layers are empty.
    """
    count = len(batch.images)
    opaque = max(1, round(OPAQUE * count))
    bare = torch.rand(opaque, generator=generator) < 0.3
    whole = torch.where(
        bare[:, None, None, None], batch.backgrounds[:opaque], batch.images[:opaque]
    )
    whole = torch.cat([whole, torch.ones_like(whole[:, :1])], 1)
    layers, rgba = [], batch.rgba
    for row in range(opaque, count):
        which = int(torch.randint(len(batch.scenes[row].stickers), (), generator=generator))
        empty = torch.rand((), generator=generator) < EMPTY_LAYERS
        layers.append(rgba[row, which] * (0 if empty else 1))
    return torch.cat([whole, torch.stack(layers)]) if layers else whole, opaque


# ------------------------------------------------------------------ how good it is


def true_layers(count: int, batch: int = 25) -> list[RGBA]:
    """Held-out layers, in batches."""
    stream = StorybookDataset(batch, seed=loop.HELD_OUT_SEED, sticker_shares=STICKER_SHARES)
    kept: list[Tensor] = []
    number = 0
    while sum(map(len, kept)) < count:
        rendering = stream.batch(number)
        kept += [
            rendering.rgba[row, : len(scene.stickers)] for row, scene in enumerate(rendering.scenes)
        ]
        number += 1
    return list(torch.cat(kept)[:count].split(batch))


@torch.no_grad()
def evaluate(
    vae: AutoencoderKL, before: AutoencoderKL, count: int = 1000, scenes: int = 200
) -> dict[str, object]:
    """Scores on held-out true layers, and on whole held-out scenes; no chance in it."""
    rows = []
    for rgba in true_layers(count):
        made = decode_layers(vae, encode_layers(vae, rgba))
        rows.append(
            torch.stack(
                [score(made, rgba) for score in (soft_iou, alpha_sad, colour_error, blended_psnr)],
                1,
            )
        )
    iou, sad, colour, blended = torch.cat(rows).mean(0).tolist()
    whole, distances = [], []
    for number in range(scenes // 50):
        images = StorybookDataset(50, seed=loop.HELD_OUT_SEED).batch(number).images
        rgba = torch.cat([images, torch.ones_like(images[:, :1])], 1)
        latents = encode_layers(vae, rgba)
        whole.append(psnr(over(decode_layers(vae, latents), 0.0), images))
        colours = latents[:, : vae.config.latent_channels]
        distances.append((colours - encoded(before, images)).square().mean())
    layers, opaque = f"{count:,} held-out layers", f"{scenes:,} held-out scenes"
    return {
        f"alpha soft IoU, {layers}": round(iou, 4),
        f"alpha SAD (thousands of pixels), {layers}": round(sad, 4),
        f"RGB L1, {layers}": round(colour, 4),
        f"PSNR over five grounds (dB), {layers}": round(blended, 2),
        f"PSNR (dB), {opaque}": round(float(torch.cat(whole).mean()), 2),
        f"RMS distance to the shipped latents, {opaque}": round(
            float(torch.stack(distances).mean().sqrt()), 4
        ),
    }


def sample_sheet(vae: AutoencoderKL, path: Path) -> None:
    """Eight layers and four scenes, each beside its reconstruction, on magenta."""
    layers = true_layers(8, 8)[0]
    images = StorybookDataset(4, seed=loop.HELD_OUT_SEED).batch(0).images
    rgba = torch.cat([layers, torch.cat([images, torch.ones_like(images[:, :1])], 1)])
    made = decode_layers(vae, encode_layers(vae, rgba.to(vae.device))).cpu()
    ground = torch.tensor([1.0, 0.0, 1.0])[None, :, None, None]
    pairs = torch.stack([over(rgba, ground), over(made, ground)], 1).flatten(0, 1)
    save_sheet(pairs, path, columns=8)


def main(arguments: list[str] | None = None) -> None:
    options = parse(RGBAOptions, "rgba_autoencoder", __doc__, arguments)
    torch.manual_seed(options.seed)
    trainee = RGBATraining(options)

    def batches(start: int, reader: int, readers: int) -> StorybookDataset:
        return StorybookDataset(
            options.batch_size,
            seed=options.seed,
            start=start,
            reader=reader,
            readers=readers,
            styles=("flat",) * 6 + STYLES[1:],
            sticker_shares=STICKER_SHARES,
        )

    progress = loop.train(
        trainee,
        options,
        batches=batches,
        sample=lambda path: sample_sheet(trainee.vae, path),
    )
    scores = evaluate(trainee.vae, trainee.before[0].cpu())
    with export.exported(
        options, progress, scores, title="storybook: autoencoder of layers", what=__doc__
    ) as folder:
        trainee.vae.half().save_pretrained(folder)


if __name__ == "__main__":
    command(main)
