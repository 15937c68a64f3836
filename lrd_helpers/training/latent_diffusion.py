"""Trains the second stage: a U-Net on latents of the frozen autoencoder, reading a frozen encoder.

Stable Diffusion's recipe (Rombach et al. 2022): scaled_linear betas, noise prediction, a frozen
text encoder, a tenth of the captions left empty for classifier-free guidance; losses weighted by
min-SNR, γ = 5 (Hang et al. 2023), or by --weighting. Latents are encoded once and kept; captions
are drawn anew at every visit, so that one scene teaches several. With --see, features of the U-Net
also have to tell what stands in each cell (after REPA, Yu et al. 2024, with the renderer's truth in
place of a pretrained encoder). With --ghosts, flawed versions of a scene stand in its noise, which
teaches to take back what the caption does not name. With --keep, exported is a mean of the weights
it began with and those it ended with. With --data, pictures and captions come from webdataset
shards.
"""

import argparse
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.training_utils import compute_snr
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from lrd_helpers.storybook import (
    COLOURS,
    STICKERS,
    PlacedSticker,
    Rendering,
    Scene,
    StorybookDataset,
    render_scenes,
    sample_caption,
    sample_scene,
    seeded,
)
from lrd_helpers.storybook.stickers import aspect_ratio
from lrd_helpers.training import loop
from lrd_helpers.training.latent_cache import encoded_once
from lrd_helpers.training.shards import Condition, ShardPairs, shard_list
from lrd_helpers.training.sheets import save_sheet

MIN_SNR_GAMMA = 5.0
LEAST_SNR = 0.04  # "root-snr" weighs what is noisier than this no more: there is little to see
EMPTY_CAPTIONS = 0.1
CACHE_BATCH = 64
SEEING_BLOCKS = (0, 1)  # the U-Net's up-blocks whose features are asked what stands where

Latents = Float[Tensor, "batch 4 height width"]
Classes = Int[Tensor, "batch height width"]


class Batch(NamedTuple):
    """What is learned from in one step."""

    latents: Latents
    captions: list[str]
    classes: Classes | None = None  # what each cell shows, if known
    flawed: Latents | None = None  # the same scenes with one mistake each, see `flawed_scene`


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion's: 1000 steps, betas linear in their square root from .00085 to .012."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def loss_weights(snr: Float[Tensor, "batch"], weighting: str = "min-snr") -> Float[Tensor, "batch"]:
    """How much the squared error of the predicted noise counts at each signal-to-noise ratio.

    "min-snr": min(SNR, γ) / SNR, the errors of x̂_0 weighted by min(SNR, γ) (Hang et al. 2023).
    "root-snr": SNR^-1/2, and so the errors of x̂_0 by SNR^1/2: more for the noisy middle, where it
    is decided how many things there are and where. It is close to what EDM's loss comes to (Karras
    et al. 2022, table 1).
    """
    if weighting == "min-snr":
        return snr.clamp(max=MIN_SNR_GAMMA) / snr
    return snr.clamp(min=LEAST_SNR) ** -0.5


def stratified_timesteps(
    count: int, steps: int, generator: torch.Generator, spread: float | None = None
) -> Int[Tensor, "count"]:
    """Timesteps, one from each of `count` equally probable parts of [0, steps), in random order.

    Each is uniform; together they cover the range, which takes noise from the mean loss (Kingma et
    al. 2021, appendix I.1). With `spread` each is logit-normal instead, with mean 0 and `spread`
    as standard deviation: more of the middle (Esser et al. 2024, section 3.1).
    """
    parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    order = torch.randperm(count, generator=generator)
    if spread is not None:
        parts = torch.sigmoid(spread * torch.special.ndtri(parts))
    return (parts[order] * steps).long().clamp(max=steps - 1)


def cell_classes(rendering: Rendering, factor: int = 8) -> Int[Tensor, "batch height width"]:
    """What most of each cell of factor × factor pixels shows: 0 for the place, or 1 + a number that
    counts through all stickers in all colours."""
    coverage = functional.avg_pool2d(rendering.masks.float(), factor)
    coverage = torch.cat([1 - coverage.sum(1, keepdim=True), coverage], 1)
    kinds = torch.zeros(coverage.shape[:2], dtype=torch.long)
    for row, scene in enumerate(rendering.scenes):
        for z, placed in enumerate(scene.stickers):
            sticker, colour = STICKERS.index(placed.sticker), list(COLOURS).index(placed.colour)
            kinds[row, 1 + z] = 1 + sticker * len(COLOURS) + colour
    winner = coverage.argmax(1)
    return kinds.gather(1, winner.flatten(1)).view_as(winner)


def flawed_scene(scene: Scene, generator: torch.Generator) -> Scene:
    """The scene with one of the mistakes that a U-Net makes, of those that a caption tells: a thing
    too much (in three of ten cases one of those there are, smaller, once more), one too few, or
    one in another colour (one time in eight by chance the same).
    """
    draw, *numbers = torch.rand(7, generator=generator).tolist()
    stickers = list(scene.stickers)
    kind = int(torch.randint(len(STICKERS) * len(COLOURS), (), generator=generator))
    sticker, colour = STICKERS[kind // len(COLOURS)], list(COLOURS)[kind % len(COLOURS)]
    one = int(numbers[3] * len(stickers))
    if not stickers or draw < 0.8:
        longest = 0.16 * (0.5 / 0.16) ** numbers[0]
        size = (
            longest * min(1, aspect_ratio(sticker)),
            longest * min(1, 1 / aspect_ratio(sticker)),
        )
        more = PlacedSticker(sticker, colour, (0.5, 0.5), size)
        if stickers and draw < 0.25:
            # Smaller, so that the two can be told apart: which of two alike is one too much?
            smaller = tuple((0.4 + 0.5 * numbers[0]) * side for side in stickers[one].size)
            more = replace(stickers[one], size=smaller, flip=numbers[5] < 0.5)
        centre = tuple(
            side / 2 + (1 - side) * at for side, at in zip(more.size, numbers[1:3], strict=True)
        )
        stickers.insert(int(numbers[4] * (len(stickers) + 1)), replace(more, centre=centre))
    elif draw < 0.9:
        del stickers[one]
    else:
        stickers[one] = replace(stickers[one], colour=colour)
    return replace(scene, stickers=tuple(stickers))


class LatentDiffusionTraining(nn.Module):
    """A U-Net with the noise-prediction loss, and the text encoder that it reads.

    The text encoder is frozen. Trained jointly from nothing it found a way that lowers the loss and
    spoils the maps: every word's own token came to say the same, and the end mark said it all.

    Args:
        start_from: the folder of a pipeline to go on from; None for a U-Net without experience.
        text_encoder: the folder of a text encoder to read by instead of the pipeline's own; the
            U-Net's keys and values then begin anew.
        weighting: see `loss_weights`.
        see: weight of the loss of seeing; with 0 there is none, and nothing that sees.
        spread: of the timesteps learned from, see `stratified_timesteps`.
        ghosts: share of the pictures in whose noise a flawed version of the scene shines through,
            half of them as strong as the scene itself, the others less. Asked for is the scene
            without the flaw: so the U-Net learns to take back what the caption does not name,
            which Gaussian noise never shows it, but its own steps of sampling do. Of pictures
            whose caption is left empty nobody could tell; they have none.
    """

    def __init__(
        self,
        start_from: Path | None = None,
        text_encoder: Path | None = None,
        *,
        weighting: str = "min-snr",
        see: float = 0.0,
        spread: float | None = None,
        ghosts: float = 0.0,
    ) -> None:
        super().__init__()
        self.scheduler = noise_schedule()
        self.weighting, self.see, self.spread, self.ghosts = weighting, see, spread, ghosts
        if start_from is not None:
            single = {"torch_dtype": torch.float32}
            self.tokenizer = CLIPTokenizer.from_pretrained(start_from / "tokenizer")
            self.text_encoder = CLIPTextModel.from_pretrained(
                start_from / "text_encoder", dtype=torch.float32
            )
            self.unet = UNet2DConditionModel.from_pretrained(start_from / "unet", **single)
        else:
            if text_encoder is None:
                raise ValueError("start_from or text_encoder: the U-Net has to read by something")
            self.unet = UNet2DConditionModel(
                sample_size=16,
                in_channels=4,
                out_channels=4,
                down_block_types=("CrossAttnDownBlock2D",) * 3,
                up_block_types=("CrossAttnUpBlock2D",) * 3,
                block_out_channels=(64, 128, 192),
                layers_per_block=1,
                norm_num_groups=16,
                attention_head_dim=(2, 4, 4),
            )  # diffusers' name; the numbers are heads, not sizes
        if text_encoder is not None:
            self._read_by(text_encoder)
        self.text_encoder.requires_grad_(False)
        if not torch.cuda.is_available():
            # On CPUs the fused attention's backward pass is slower than the plain one's.
            self.unet.set_attn_processor(AttnProcessor())
        self.features: dict[int, Tensor] = {}
        self.seeing = nn.ModuleDict()
        if see:
            for number in SEEING_BLOCKS:
                block = self.unet.up_blocks[number]
                width = block.resnets[-1].out_channels
                self.seeing[str(number)] = nn.Sequential(
                    nn.GroupNorm(16, width),
                    nn.Conv2d(width, 192, 1),
                    nn.SiLU(),
                    nn.Conv2d(192, 1 + len(STICKERS) + 1 + len(COLOURS), 1),
                )
                block.register_forward_hook(partial(self._keep_features, number))
        self.trained_unet: Callable[..., UNet2DConditionOutput] = self.unet.__call__

    def _keep_features(self, number: int, block: nn.Module, given: tuple, features: Tensor) -> None:
        self.features[number] = features

    def _loss_of_seeing(self, classes: Classes) -> Tensor:
        """Cross-entropy of sticker and of colour in each cell, and at each kept block."""
        total = 0.0
        stickers = 1 + len(STICKERS)
        for number, head in self.seeing.items():
            answers = head(self.features.pop(int(number))[: len(classes)]).float()
            stride = classes.shape[-1] // answers.shape[-1]
            truth = classes[:, stride // 2 :: stride, stride // 2 :: stride].to(answers.device)
            sticker = torch.where(truth > 0, 1 + (truth - 1) // len(COLOURS), 0)
            colour = torch.where(truth > 0, 1 + (truth - 1) % len(COLOURS), 0)
            total = total + functional.cross_entropy(answers[:, :stickers], sticker)
            total = total + functional.cross_entropy(answers[:, stickers:], colour)
        return total / len(self.seeing)

    def _read_by(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.text_encoder = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
        known = {
            name: value
            for name, value in self.unet.state_dict().items()
            if not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        }
        width = self.text_encoder.config.hidden_size
        own = {name: one for name, one in self.unet.config.items() if not name.startswith("_")}
        self.unet = UNet2DConditionModel(**own | {"cross_attention_dim": width})
        self.unet.load_state_dict(known, strict=False)

    def compile_unet(self) -> None:
        """From now on training steps run the U-Net compiled; its weights and names stay."""
        self.trained_unet = torch.compile(self.unet.__call__)

    def encoded_text(self, captions: list[str]) -> Float[Tensor, "batch tokens channels"]:
        """The captions' embeddings."""
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(tokens.to(self.text_encoder.device))[0]

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        latents, captions, classes, flawed = batch
        device = self.unet.device
        empty = torch.rand(len(captions), generator=generator) < EMPTY_CAPTIONS
        captions = ["" if drop else caption for drop, caption in zip(empty, captions, strict=True)]
        noise = torch.randn(latents.shape, generator=generator)
        steps = self.scheduler.config.num_train_timesteps
        if self.training:
            timesteps = stratified_timesteps(len(latents), steps, generator, self.spread)
        else:
            timesteps = torch.randint(steps, (len(latents),), generator=generator)
        snr = compute_snr(self.scheduler, timesteps)
        if self.ghosts and self.training:
            draws, strength, whole = torch.rand(3, len(latents), generator=generator)
            strength = torch.where(whole < 0.5, 1.0, strength)
            # In units of the noise; in units of x_0 it is `strength` until little noise is left.
            strength = strength * snr.sqrt().clamp(max=2) * (draws < self.ghosts) * ~empty
            noise = noise + strength[:, None, None, None] * (flawed - latents)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        text = self.encoded_text(captions)
        unet = self.trained_unet if self.training else self.unet
        prediction = unet(noisy.to(device), timesteps.to(device), text).sample.float()
        squares = (prediction - noise.to(device)).square().flatten(1).mean(1)
        # min-SNR: without it the nearly clean steps, which decide nothing, take most of the effort.
        snr = snr.to(device)
        loss = (loss_weights(snr, self.weighting) * squares).mean()
        losses = {"loss": loss, "mse": squares.mean()}
        if self.see and self.training:
            seen = self._loss_of_seeing(classes)
            losses |= {
                "loss": loss + self.see * seen,
                "noise": (loss_weights(snr) * squares).mean(),
                "seen": seen,
            }
        return losses


def pipeline(trainee: LatentDiffusionTraining, vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The parts as the pipeline that is shipped."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=trainee.text_encoder,
        tokenizer=trainee.tokenizer,
        unet=trainee.unet,
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class LatentCache:
    """Latents of the first scenes of a stream, encoded once, and batches drawn from them."""

    def __init__(
        self, vae: AutoencoderKL, options: argparse.Namespace, reader: int, readers: int
    ) -> None:
        self.options, self.reader = options, reader
        numbers = range(reader, max(1, options.cache // CACHE_BATCH // readers) * readers, readers)
        stream = StorybookDataset(
            CACHE_BATCH, seed=options.seed, sticker_shares=options.sticker_shares
        )

        def encode(number: int) -> dict[str, Tensor]:
            half = options.mixed_precision == "bf16"
            with torch.autocast(vae.device.type, torch.bfloat16, enabled=half):
                rendering = stream.batch(number)
                latents = encoded(vae, rendering.images).half()
                known = {"latents": latents}
                if options.ghosts:
                    generator = seeded(options.seed, 3, number)
                    wrong = [flawed_scene(scene, generator) for scene in rendering.scenes]
                    known["flawed"] = encoded(vae, render_scenes(wrong).images).half()
            factor = rendering.images.shape[-1] // latents.shape[-1]
            return known | {"classes": cell_classes(rendering, factor).byte()}

        shares_name = "-".join(f"{share:g}" for share in options.sticker_shares)
        # Another name whenever the stream changes: the latents must be those of its scenes.
        name = f"cells-latents-{options.cache}-{options.seed}-{shares_name}-{reader}-of-{readers}"
        file = options.run / f"{name}{'-with-flaws' if options.ghosts else ''}.safetensors"
        self.kept = encoded_once(file, vae, numbers, encode, quiet=reader > 0)
        self.scenes = [scene for number in numbers for scene in stream.scenes(number)]

    def batches(self, start: int) -> Iterator[Batch]:
        """Batch number n depends on (seed, n, reader) alone."""
        number = start
        while True:
            generator = seeded(self.options.seed, 2, number, self.reader)
            rows = torch.randint(len(self.scenes), (self.options.batch_size,), generator=generator)
            chosen = [self.scenes[row] for row in rows.tolist()]
            yield Batch(
                self.kept["latents"][rows].float(),
                [sample_caption(scene.stickers, scene.place, generator) for scene in chosen],
                self.kept["classes"][rows].long(),
                self.kept["flawed"][rows].float() if self.options.ghosts else None,
            )
            number += 1


def shard_pairs(options: argparse.Namespace, size: int, **more: object) -> ShardPairs:
    """What --data, --only and --least-side ask for."""
    conditions = [Condition(text) for text in options.only]
    return ShardPairs(
        shard_list(options.data),
        size,
        least_side=options.least_side,
        conditions=conditions,
        seed=options.seed,
        **more,
    )


def shard_batches(
    vae: AutoencoderKL, pairs: ShardPairs, batch_size: int, start: int
) -> Iterator[Batch]:
    """Batches of encoded pairs from number `start` on; those before are read, but not encoded."""
    stream = islice(pairs, start * batch_size, None)
    while True:
        pictures, captions = zip(*islice(stream, batch_size), strict=True)
        yield Batch(encoded(vae, torch.stack(pictures)), list(captions))


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Float[Tensor, "batch 3 _height _width"]) -> Latents:
    """The latents of images in [0, 1]: the mean of the posterior, times the scaling factor."""
    posterior = vae.encode(2 * images.to(vae.device) - 1).latent_dist
    return (posterior.mean * vae.config.scaling_factor).cpu()


@torch.no_grad()
def evaluate(
    trainee: LatentDiffusionTraining, vae: AutoencoderKL, pairs: ShardPairs | None
) -> dict[str, object]:
    """The loss on scenes, or on the pairs, never trained on.

    benchmarks/targets.py says how good the pictures are.
    """
    batches, what = [], "1,024 held-out scenes"
    if pairs is None:
        for number in range(16):
            rendering = StorybookDataset(64, seed=loop.HELD_OUT_SEED).batch(number)
            batches.append((rendering.images, rendering.captions))
    else:
        held_out = list(islice(pairs.one_pass(), 1024))
        what = f"{len(held_out):,} held-out pairs"
        for first in range(0, len(held_out), 64):
            pictures, captions = zip(*held_out[first : first + 64], strict=True)
            batches.append((torch.stack(pictures), list(captions)))
    if not batches:
        return {}  # too few pairs for one in a hundred
    losses = [
        trainee(Batch(encoded(vae, images), captions), seeded(number))["loss"] * len(captions)
        for number, (images, captions) in enumerate(batches)
    ]
    mean = float(sum(losses)) / sum(len(captions) for _, captions in batches)
    return {f"weighted noise-prediction loss, {what}": round(mean, 5)}


def main(arguments: list[str] | None = None) -> None:
    parser = loop.parser(
        "latent_diffusion",
        __doc__,
        minutes=180,
        batch_size=32,
        learning_rate=7e-4,
        ema_decay=0.9995,
        decay=0.6,
        warmup=300,
        output=loop.ASSETS / "storybook",
        run=Path("runs") / "latent-diffusion",
    )
    parser.add_argument(
        "--autoencoder",
        type=Path,
        default=loop.ASSETS / "storybook" / "vae",
        help="folder of the finished first stage",
    )
    parser.add_argument("--cache", type=int, default=32_000, help="scenes encoded once and kept")
    loop.add_sticker_shares(parser)
    parser.add_argument(
        "--text-encoder",
        type=Path,
        metavar="FOLDER",
        help="a text encoder to read by instead of the one that --from has; the U-Net's keys and "
        "values then begin anew (without --from: runs/text-encoder/model)",
    )
    parser.add_argument(
        "--weighting",
        choices=("min-snr", "root-snr"),
        default="min-snr",
        help="of the loss over the noise levels; root-snr cares more for the very noisy ones",
    )
    parser.add_argument(
        "--see",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="of a second loss: features of the U-Net have to tell what stands in each cell "
        "(0: none; storybook scenes only)",
    )
    parser.add_argument(
        "--spread",
        type=float,
        metavar="DEVIATION",
        help="draw timesteps from a logit-normal distribution of this spread: 1.2, say, for a "
        "quarter more of those between 200 and 800 (without: all are equally probable)",
    )
    parser.add_argument(
        "--ghosts",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the pictures in whose noise a flawed version of the scene stands: a thing too "
        "much, say, that is to be taken back (storybook scenes only)",
    )
    parser.add_argument(
        "--keep",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the weights the training starts from in those that are exported: half-way between "
        "the two a model keeps more of what the training was not about (Wortsman et al. 2022)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the U-Net: minutes of waiting first, then a quarter more steps "
        "a second (2 CPU cores; needs a C++ compiler)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SHARDS",
        help="webdataset shards, such as 'shards/{0000..0009}.tar', in place of storybook scenes",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="CONDITION",
        help="with --data: leave out pairs whose .json does not fulfil 'punsafe<0.3' and the like",
    )
    parser.add_argument(
        "--least-side",
        type=int,
        metavar="PIXELS",
        help="with --data: leave out smaller pictures; by default those smaller than the model's",
    )
    options = loop.parse(parser, arguments)
    if not options.data and (options.only or options.least_side):
        parser.error("--only and --least-side are for --data; storybook scenes are all good")
    if options.data and options.see:
        parser.error("--see is for storybook scenes: of --data nobody knows what stands where")
    if not 0 <= options.ghosts <= 1:
        parser.error(f"--ghosts {options.ghosts:g}: it must be a share, from 0 to 1")
    if options.data and options.ghosts:
        parser.error("--ghosts is for storybook scenes: --data cannot be drawn once more")
    if not 0 <= options.keep < 1:
        parser.error(f"--keep {options.keep:g}: it must be a share, from 0 to less than 1")
    if options.keep and (not options.start_from or options.text_encoder):
        parser.error("--keep is for going on from a U-Net (--from) with its own text encoder")
    if options.see < 0:
        parser.error(f"--see {options.see:g}: a weight cannot be negative")
    if options.spread is not None and not 0 < options.spread < math.inf:
        parser.error(f"--spread {options.spread:g}: it must be a number above 0")
    if not (options.autoencoder / "config.json").exists():
        parser.error(
            f"--autoencoder {options.autoencoder}: no autoencoder there; train it first: "
            "python -m lrd_helpers.training.autoencoder"
        )
    if not options.start_from and not options.text_encoder:
        options.text_encoder = Path("runs") / "text-encoder" / "model"
    if options.text_encoder and not (options.text_encoder / "config.json").exists():
        parser.error(
            f"--text-encoder {options.text_encoder}: no text encoder there; train one first: "
            "python -m lrd_helpers.training.text_encoder"
        )
    torch.manual_seed(options.seed)
    vae = AutoencoderKL.from_pretrained(options.autoencoder, torch_dtype=torch.float32).eval()
    if torch.cuda.is_available():
        vae.cuda()
    trainee = LatentDiffusionTraining(
        options.start_from,
        options.text_encoder,
        weighting=options.weighting,
        see=options.see,
        spread=options.spread,
        ghosts=options.ghosts,
    )
    if options.compile:
        trainee.compile_unet()
    size = trainee.unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    held_out, streams = None, []
    if options.data:
        held_out = shard_pairs(options, size, held_out=True)
        first = list(islice(shard_pairs(options, size).one_pass(), 24))
        sheet_captions = [caption for _, caption in first]
    else:
        sheet_captions = [sample_scene(seeded(loop.HELD_OUT_SEED, i)).caption for i in range(24)]

    def batches(start: int, reader: int, readers: int) -> Iterator:
        if not options.data:
            return LatentCache(vae, options, reader, readers).batches(start)
        streams.append(shard_pairs(options, size, reader=reader, readers=readers))
        return shard_batches(vae, streams[-1], options.batch_size, start)

    def sample(path: Path) -> None:
        pipe = pipeline(trainee, vae)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            sheet_captions,
            num_inference_steps=20,
            guidance_scale=5.0,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images
        save_sheet(images.cpu().float(), path, columns=8)

    progress = loop.train(
        trainee,
        options,
        sample=sample,
        batches=batches,
    )
    if options.keep:
        start = UNet2DConditionModel.from_pretrained(
            options.start_from / "unet", torch_dtype=torch.float32
        ).state_dict()
        for name, weight in trainee.unet.state_dict().items():
            weight.lerp_(start[name].to(weight.device), options.keep)
    # Whatever was learned from: judged is by the noise, weighted as it always was.
    trainee.weighting = "min-snr"
    scores = evaluate(trainee, vae.cpu(), held_out)
    data = None
    if streams:
        data = f"{len(streams[0].shards)} shards: {streams[0].summary()}"
        print(data)
    trainee.unet.set_attn_processor(AttnProcessor2_0())
    with loop.replacing_folder(options.output) as folder:
        pipeline(trainee, vae).to(torch.float16).save_pretrained(folder)
        loop.read_in_single_precision(folder / "text_encoder")
        # The first stage as it was shipped, with its own card.
        shutil.rmtree(folder / "vae")
        shutil.copytree(options.autoencoder, folder / "vae")
        loop.model_card(
            folder,
            title="storybook: a complete Stable Diffusion pipeline",
            what=__doc__.strip(),
            options=options,
            progress=progress,
            scores=scores,
            data=data,
        )
    print(scores)


if __name__ == "__main__":
    loop.command(main)
