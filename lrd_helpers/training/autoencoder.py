"""Trains the first stage: AutoencoderKL, 128 px → 16×16×4, on scenes of all styles.

Loss: L1 + 5·MSE + 2·|∇x − ∇y|₁ + 3e-4·KL (per latent value), all on images in [-1, 1]. The squares
are for the colours: a flat area in a wrong hue costs L1 little beside all the outlines.

With --freeze-encoder only the decoder learns. The latents stay as they are, so a U-Net that was
trained on them stays valid while the pictures get sharper.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional
from transformers.hf_argparser import HfArg

from lrd_helpers.autoencoder import gradient_loss, kl_divergence, psnr
from lrd_helpers.storybook import STYLES, Rendering, StorybookDataset
from lrd_helpers.training import export, loop
from lrd_helpers.training.options import ASSETS, TrainingOptions, command, parse
from lrd_helpers.training.sheets import save_sheet

WIDTHS = (16, 32, 64, 96)


@dataclass(frozen=True)
class AutoencoderOptions(TrainingOptions):
    """The options of this training."""

    batch_size: int = 4
    weight_decay: float = 0.0
    run: Path = Path("runs/autoencoder")
    output: Path = ASSETS / "storybook" / "vae"
    freeze_encoder: bool = HfArg(default=False, help="train the decoder only")

    def check(self) -> None:
        super().check()
        if self.freeze_encoder and not self.start_from:
            raise ValueError("--freeze-encoder needs --from: the encoder that is to be kept")


class AutoencoderTraining(nn.Module):
    """The autoencoder with its loss."""

    def __init__(self, start_from: Path | None = None, freeze_encoder: bool = False) -> None:
        super().__init__()
        self.vae = (
            AutoencoderKL(
                block_out_channels=WIDTHS,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=8,
                sample_size=128,
                mid_block_add_attention=False,
            )
            if start_from is None
            else AutoencoderKL.from_pretrained(start_from, torch_dtype=torch.float32)
        )
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)

    def forward(self, batch: Rendering, generator: torch.Generator) -> dict[str, Tensor]:
        images = (2 * batch.images - 1).to(self.vae.device)
        posterior = self.vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        l1 = functional.l1_loss(reconstruction, images)
        mse = functional.mse_loss(reconstruction, images)
        edges = gradient_loss(reconstruction, images)
        kl = kl_divergence(posterior.mean.float(), posterior.logvar.float()) / noise[0].numel()
        loss = l1 + 5 * mse + 2 * edges + 3e-4 * kl
        return {"loss": loss, "l1": l1, "mse": mse, "edges": edges, "kl": kl}


@torch.no_grad()
def evaluate(vae: AutoencoderKL, scenes: int = 1000) -> dict[str, object]:
    """PSNR on held-out flat scenes (decoding the posterior's mean), and the latents' scale."""
    ratios, squares = [], []
    for number in range(scenes // 50):
        images = StorybookDataset(50, seed=loop.HELD_OUT_SEED).batch(number).images
        latents = vae.encode(2 * images - 1).latent_dist.mean
        reconstruction = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        ratios.append(psnr(reconstruction, images))
        squares.append(latents.square().mean())
    return {
        "PSNR (dB), 1,000 held-out scenes": round(float(torch.cat(ratios).mean()), 2),
        "standard deviation of latents": round(float(torch.stack(squares).mean().sqrt()), 4),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(AutoencoderOptions, "autoencoder", __doc__, arguments)
    torch.manual_seed(options.seed)
    trainee = AutoencoderTraining(options.start_from, options.freeze_encoder)

    def batches(start: int, reader: int, readers: int) -> StorybookDataset:
        # Flat scenes are what the other models see; an eighth each is enough for the other styles.
        return StorybookDataset(
            options.batch_size,
            seed=options.seed,
            start=start,
            reader=reader,
            readers=readers,
            styles=("flat",) * 6 + STYLES[1:],
        )

    def sample(path: Path) -> None:
        images = StorybookDataset(16, seed=loop.HELD_OUT_SEED, styles=STYLES).batch(0).images
        reconstruction = trainee.vae(2 * images.to(trainee.vae.device) - 1).sample / 2 + 0.5
        save_sheet(torch.stack([images, reconstruction.cpu()], 1).flatten(0, 1), path, columns=8)

    progress = loop.train(trainee, options, batches=batches, sample=sample)
    scores = evaluate(trainee.vae)
    # Latents are divided by their standard deviation, so that diffusion starts from unit variance.
    if not options.freeze_encoder:
        trainee.vae.register_to_config(scaling_factor=1 / scores["standard deviation of latents"])
    with export.exported(
        options, progress, scores, title="storybook: autoencoder", what=__doc__
    ) as folder:
        trainee.vae.half().save_pretrained(folder)


if __name__ == "__main__":
    command(main)
