"""How much should the autoencoder shrink? f = 2, 4, 8 and 16 on 64-pixel scenes.

    python benchmarks/downsampling.py [--steps 1500] [--minutes 4]

For each f an autoencoder is trained on the same scenes, then an unconditional diffusion model on
its latents, of the same shape and for the same time on the processor: what a small f gains in
detail it must pay for in the second training. Writes the table that notebook 02 plots,
lrd_helpers/assets/downsampling.csv, and the pictures beside it, downsampling.png: a row of real
scenes, then a row for each f, six of them decoded and six drawn.
"""

import argparse
import csv
import io
import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DModel
from jaxtyping import Float
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from lrd_helpers import ddpm
from lrd_helpers.autoencoder import kl_divergence, psnr
from lrd_helpers.files import write_atomically
from lrd_helpers.measure import StorybookClip
from lrd_helpers.models import ASSETS
from lrd_helpers.storybook import StorybookDataset
from lrd_helpers.training.autoencoder import AutoencoderTraining
from lrd_helpers.training.loop import HELD_OUT_SEED
from lrd_helpers.training.sheets import save_sheet

SIZE = 64
WIDTHS = {2: (16, 32), 4: (16, 32, 64), 8: (16, 32, 64, 96), 16: (16, 32, 64, 96, 96)}
BATCH = 8
Images = Float[Tensor, "batch 3 height width"]


def scenes(count: int, seed: int) -> Images:
    """(count, 3, 64, 64) in [0, 1]."""
    return StorybookDataset(count, seed=seed, size=SIZE).batch(0).images


def train_autoencoder(f: int, steps: int) -> AutoencoderKL:
    """The shipped autoencoder's training, with another f: the same loss and number of channels."""
    torch.manual_seed(0)
    trainee = AutoencoderTraining()
    trainee.vae = AutoencoderKL(
        block_out_channels=WIDTHS[f],
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS[f]),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS[f]),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(trainee.parameters(), 1.5e-3, weight_decay=0)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.05)
    stream, generator = StorybookDataset(BATCH, size=SIZE), torch.Generator().manual_seed(0)
    for number in tqdm(range(steps), desc=f"f = {f}, autoencoder", mininterval=5):
        batch = stream.batch(number)
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainee(batch, generator)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        decay.step()
    return trainee.vae.eval()


@torch.no_grad()
def in_chunks(function, data: Tensor, size: int = 32) -> Tensor:
    return torch.cat([function(part) for part in data.split(size)])


class Denoiser(torch.nn.Module):
    """The same small U-Net for every f; only the number of positions it works on differs."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=8,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t).sample


def train_diffusion(latents: Tensor, minutes: float, f: int) -> tuple[Denoiser, int]:
    """As many steps as fit into `minutes` of processor time; the averaged model and how many."""
    torch.manual_seed(0)
    model, generator = Denoiser(), torch.Generator().manual_seed(0)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule, began, steps, done = ddpm.NoiseSchedule.scaled_linear(), time.process_time(), 0, 0.0
    with tqdm(total=100, desc=f"f = {f}, diffusion", mininterval=5) as bar:
        while done < 1:
            for group in optimizer.param_groups:  # a short warm-up, then down to 0 in time
                group["lr"] = 1e-3 * min(1, (steps + 1) / 50) * (1 - done) ** 0.7
            chosen = torch.randint(len(latents), (32,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                loss = ddpm.training_loss(model, latents[chosen], schedule, generator=generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(model)
            steps += 1
            done = (time.process_time() - began) / (60 * minutes)
            bar.update(min(100, int(100 * done)) - bar.n)
    return ema.module.eval(), steps


def distance(a: Float[Tensor, "m channels"], b: Float[Tensor, "n channels"]) -> float:
    """1000·MMD² between two sets of CLIP vectors, unbiased, with a Gaussian kernel of width ½.

    The idea of CMMD (Jayasumana et al. 2024), with our small CLIP: 0 is no difference.
    """

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return torch.exp(-2 * torch.cdist(p, q) ** 2)

    within = [
        (kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1)) for x in (a, b)
    ]  # without each vector's pair with itself
    return 1000 * float(within[0] + within[1] - 2 * kernel(a, b).mean())


def measure(f: int, options: argparse.Namespace) -> tuple[dict[str, object], Images, Images]:
    """A row of the table, reconstructions of the first held-out scenes, and generated pictures."""
    vae = train_autoencoder(f, options.steps)
    clip, held_out = StorybookClip(), scenes(options.pictures, HELD_OUT_SEED)
    real = clip.encode_images(list(scenes(2 * options.pictures, HELD_OUT_SEED + 1)))

    def encode(images: Images) -> Tensor:
        return vae.encode(2 * images - 1).latent_dist.parameters

    def decode(latents: Tensor) -> Images:
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    mean, log_variance = in_chunks(encode, held_out).chunk(2, 1)
    rebuilt = in_chunks(decode, mean)
    latents = in_chunks(encode, scenes(options.scenes, 1)).chunk(2, 1)[0]
    scale = 1 / latents.std()
    model, diffusion_steps = train_diffusion(scale * latents, options.minutes, f)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    schedule = ddpm.NoiseSchedule.scaled_linear()

    def draw(x_T: Tensor) -> Images:
        *_, z = ddpm.ddim_sample(model, x_T, schedule, timesteps=schedule.timesteps(25))
        return decode(z / scale)

    drawn = in_chunks(draw, noise)
    row = {
        "f": f,
        "numbers": mean[0].numel(),
        "psnr": round(float(psnr(rebuilt, held_out).mean()), 2),
        "kl_bits_per_pixel": round(
            float(kl_divergence(mean, log_variance)) / math.log(2) / SIZE**2, 3
        ),
        "distance_rebuilt": round(distance(clip.encode_images(list(rebuilt)), real), 2),
        "distance_drawn": round(distance(clip.encode_images(list(drawn)), real), 2),
        "diffusion_steps": diffusion_steps,
    }
    return row, rebuilt, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="of each autoencoder, batches of 8")
    parser.add_argument("--minutes", type=float, default=4, help="of each diffusion model's time")
    parser.add_argument("--scenes", type=int, default=4096, help="the diffusion models train on")
    parser.add_argument("--pictures", type=int, default=256, help="measured with")
    parser.add_argument("--f", type=int, nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--table", type=Path, default=ASSETS / "downsampling.csv")
    parser.add_argument("--sheet", type=Path, default=ASSETS / "downsampling.png")
    options = parser.parse_args()
    rows, sheet = [], [scenes(options.pictures, HELD_OUT_SEED)[:12]]
    for f in options.f:
        row, rebuilt, drawn = measure(f, options)
        print(row, flush=True)
        rows.append(row)
        sheet += [rebuilt[:6], drawn[:6]]
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(options.table, text.getvalue().encode())
    save_sheet(torch.cat(sheet), options.sheet, columns=12)


if __name__ == "__main__":
    main()
