"""Trains the second stage: a U-Net on latents of the frozen autoencoder, reading a frozen encoder.

Stable Diffusion's recipe (Rombach et al. 2022): scaled_linear betas, noise prediction, a frozen
text encoder, a tenth of the captions left empty for classifier-free guidance; losses weighted by
min-SNR, γ = 5 (Hang et al. 2023), or by --weighting. Latents are encoded once and kept; captions
are drawn anew at every visit, so that a scene teaches several. With --see, features of the U-Net
also have to tell what stands in each cell (after REPA, Yu et al. 2024, with the renderer's truth in
place of a pretrained encoder). With --ghosts, flawed versions of a scene stand in its noise, which
teaches to take back what the caption does not name. With --keep, exported is a mean of the weights
the training began with and those it ended with. With --data, pictures and captions come from
webdataset shards.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

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
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.hf_argparser import HfArg

from lrd_helpers.storybook import (
    StorybookDataset,
    render_scenes,
    sample_caption,
    sample_scene,
    seeded,
)
from lrd_helpers.training import export, loop
from lrd_helpers.training.ghosts import Ghosts, flawed_scene
from lrd_helpers.training.latent_cache import CACHE_BATCH, Batch, Latents, SceneCache, encoded
from lrd_helpers.training.options import (
    ASSETS,
    CacheOptions,
    SceneOptions,
    check_trained,
    command,
    parse,
)
from lrd_helpers.training.seeing import Seeing, cell_classes
from lrd_helpers.training.shards import Condition, ShardPairs
from lrd_helpers.training.sheets import save_sheet

MIN_SNR_GAMMA = 5.0
LEAST_SNR = 0.04  # root_snr weighs what is noisier than this no more: there is little to see
EMPTY_CAPTIONS = 0.1
TIMESTEPS = 1000
SHEET_STEPS = 20
TEXT_ENCODER = Path("runs") / "text-encoder" / "model"


# ------------------------------------------------------------------ the objective


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion's: 1000 steps, betas linear in their square root from .00085 to .012."""
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def min_snr(snr: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """min(SNR, γ) / SNR: the errors of x̂_0 weighted by min(SNR, γ) (Hang et al. 2023).

    Without it the nearly clean steps, which decide nothing, take most of the effort.
    """
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


def root_snr(snr: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """SNR^-1/2, and so the errors of x̂_0 by SNR^1/2: more for the noisy middle.

    There it is decided how many things there are and where. It is close to what EDM's loss comes to
    (Karras et al. 2022, table 1).
    """
    return snr.clamp(min=LEAST_SNR) ** -0.5


def uniform_timesteps(count: int, generator: torch.Generator) -> Int[Tensor, "count"]:
    """Timesteps that are all equally probable."""
    return torch.randint(TIMESTEPS, (count,), generator=generator)


def stratified_timesteps(
    count: int, generator: torch.Generator, *, steps: int = TIMESTEPS, spread: float | None = None
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


def noise_alone(
    noise: Latents,
    batch: Batch,
    snr: Float[Tensor, "batch"],
    empty: Bool[Tensor, "batch"],
    generator: torch.Generator,
) -> Latents:
    """ε as it was drawn."""
    return noise


@dataclass(frozen=True)
class Extras:
    """What the objective has beyond notebook 03's. As it stands: min-SNR weights, nothing else.

    Attributes:
        timesteps: (count, generator) → timesteps.
        noise: (noise, batch, SNR, empty captions, generator) → what is added and asked for.
        weights: SNR → what each picture's error counts.
    """

    timesteps: Callable[..., Int[Tensor, "batch"]] = uniform_timesteps
    noise: Callable[..., Latents] = noise_alone
    weights: Callable[[Float[Tensor, "batch"]], Float[Tensor, "batch"]] = min_snr


STRATIFIED = Extras(timesteps=stratified_timesteps)


class LatentDiffusionTraining(nn.Module):
    """A U-Net with the noise-prediction loss, and the frozen text encoder that it reads.

    A text encoder that learned with the U-Net, from nothing, lowered the loss and spoiled the maps:
    every word's token came to say the same, and the end mark said it all.

    Args:
        start_from: the folder of a pipeline to go on from; None for a U-Net without experience.
        text_encoder: the folder of a text encoder to read by instead of the pipeline's; the U-Net's
            keys and values then begin anew.
        extras: of training steps; a model is judged without them.
    """

    def __init__(
        self,
        start_from: Path | None = None,
        text_encoder: Path | None = None,
        extras: Extras = STRATIFIED,
    ) -> None:
        super().__init__()
        self.scheduler, self.extras = noise_schedule(), extras
        if start_from is not None:
            self.tokenizer = CLIPTokenizer.from_pretrained(start_from / "tokenizer")
            self.text_encoder = CLIPTextModel.from_pretrained(
                start_from / "text_encoder", dtype=torch.float32
            )
            self.unet = UNet2DConditionModel.from_pretrained(
                start_from / "unet", torch_dtype=torch.float32
            )
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
                attention_head_dim=(2, 4, 4),  # diffusers' name; the numbers are heads, not sizes
            )
        if text_encoder is not None:
            self._read_by(text_encoder)
        self.text_encoder.requires_grad_(False)
        if not torch.cuda.is_available():
            # On CPUs the fused attention's backward pass is slower than the plain one's.
            self.unet.set_attn_processor(AttnProcessor())
        self.trained_unet: Callable[..., UNet2DConditionOutput] = self.unet.__call__

    def _read_by(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.text_encoder = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
        weights = {
            name: weight
            for name, weight in self.unet.state_dict().items()
            if not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        }
        config = {name: x for name, x in self.unet.config.items() if not name.startswith("_")}
        config["cross_attention_dim"] = self.text_encoder.config.hidden_size
        self.unet = UNet2DConditionModel(**config)
        self.unet.load_state_dict(weights, strict=False)

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
        if self.training:
            return self.objective(batch, generator, self.trained_unet, self.extras)
        return self.objective(batch, generator, self.unet, Extras())

    def objective(
        self,
        batch: Batch,
        generator: torch.Generator,
        unet: Callable[..., UNet2DConditionOutput],
        extras: Extras,
    ) -> dict[str, Tensor]:
        """w(t)·‖ε − ε_θ(z_t, t, τ(y))‖² (LDM, Eq. 3), a tenth of the captions left empty."""
        z, device = batch.latents, self.unet.device
        empty = torch.rand(len(z), generator=generator) < EMPTY_CAPTIONS
        captions = ["" if drop else y for drop, y in zip(empty, batch.captions, strict=True)]
        text = self.encoded_text(captions)  # τ(y)
        noise = torch.randn(z.shape, generator=generator)  # ε ~ N(0, I)
        t = extras.timesteps(len(z), generator)
        snr = compute_snr(self.scheduler, t)
        noise = extras.noise(noise, batch, snr, empty, generator)
        z_t = self.scheduler.add_noise(z, noise, t)  # √ᾱ_t·z + √(1 − ᾱ_t)·ε
        guess = unet(z_t.to(device), t.to(device), text).sample.float()  # ε_θ(z_t, t, τ(y))
        squares = (guess - noise.to(device)).square().flatten(1).mean(1)
        loss = (extras.weights(snr.to(device)) * squares).mean()
        return {"loss": loss, "mse": squares.mean()}


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


# ------------------------------------------------------------------ what it learns from


@dataclass(frozen=True)
class LatentDiffusionOptions(CacheOptions, SceneOptions):
    """The options of this training."""

    free: ClassVar[tuple[str, ...]] = (*SceneOptions.free, "compile", "keep")

    minutes: float = 180.0
    learning_rate: float = 7e-4
    warmup: int = 300
    decay: float = 0.6
    ema_decay: float = 0.9995
    run: Path = Path("runs/latent-diffusion")
    output: Path = ASSETS / "storybook"
    autoencoder: Path = HfArg(
        default=ASSETS / "storybook" / "vae", help="folder of the finished first stage"
    )
    text_encoder: Path | None = HfArg(
        default=None,
        help="a text encoder to read by instead of that of --from; the U-Net's keys and values "
        f"then begin anew (without --from: {TEXT_ENCODER})",
        metadata={"metavar": "FOLDER"},
    )
    weighting: Literal["min-snr", "root-snr"] = HfArg(
        default="min-snr",
        help="of the loss over the noise levels; root-snr cares more for the very noisy ones",
    )
    see: float = HfArg(
        default=0.0,
        help="of a second loss: features of the U-Net have to tell what stands in each cell "
        "(0: none; storybook scenes only)",
        metadata={"metavar": "WEIGHT"},
    )
    spread: float | None = HfArg(
        default=None,
        help="draw timesteps from a logit-normal distribution of this spread: 1.2, say, for a "
        "quarter more of those between 200 and 800 (without: all are equally probable)",
        metadata={"metavar": "DEVIATION"},
    )
    ghosts: float = HfArg(
        default=0.0,
        help="of the pictures in whose noise a flawed version of the scene stands: a thing too "
        "much, say, that is to be taken back (storybook scenes only)",
        metadata={"metavar": "SHARE"},
    )
    keep: float = HfArg(
        default=0.0,
        help="of the weights the training starts from in those that are exported: half-way between "
        "the two a model keeps more of what the training was not about (Wortsman et al. 2022)",
        metadata={"metavar": "SHARE"},
    )
    compile: bool = HfArg(
        default=False,
        help="torch.compile the U-Net: minutes of waiting first, then a quarter more steps "
        "a second (2 CPU cores; needs a C++ compiler)",
    )
    data: list[str] | None = HfArg(
        default=None,
        help="webdataset shards, such as 'shards/{0000..0009}.tar', in place of storybook scenes; "
        "'pipe:COMMAND' runs COMMAND in a shell, so never take it from a stranger",
        metadata={"metavar": "SHARDS"},
    )
    only: list[str] = HfArg(
        default_factory=list,
        help="with --data: leave out pairs whose .json does not fulfil 'punsafe<0.3' and the like",
        metadata={"metavar": "CONDITION"},
    )
    least_side: int | None = HfArg(
        default=None,
        help="with --data: leave out smaller pictures; by default those smaller than the model's",
        metadata={"metavar": "PIXELS"},
    )

    @property
    def reads_by(self) -> Path | None:
        """The folder of the text encoder; None for the one that the pipeline of --from has."""
        return self.text_encoder or (None if self.start_from else TEXT_ENCODER)

    def check(self) -> None:
        super().check()
        if not self.data and (self.only or self.least_side):
            raise ValueError(
                "--only and --least-side are for --data; storybook scenes are all good"
            )
        if self.data and self.see:
            raise ValueError(
                "--see is for storybook scenes: nobody knows what stands where in those of --data"
            )
        if self.data and self.ghosts:
            raise ValueError("--ghosts is for storybook scenes: --data cannot be drawn once more")
        if not 0 <= self.ghosts <= 1:
            raise ValueError(f"--ghosts {self.ghosts:g}: it must be a share, from 0 to 1")
        if not 0 <= self.keep < 1:
            raise ValueError(f"--keep {self.keep:g}: it must be a share, from 0 to less than 1")
        if self.keep and (not self.start_from or self.text_encoder):
            raise ValueError("--keep is for going on from a U-Net (--from) and its text encoder")
        if self.see < 0:
            raise ValueError(f"--see {self.see:g}: a weight cannot be negative")
        if self.spread is not None and not 0 < self.spread < math.inf:
            raise ValueError(f"--spread {self.spread:g}: it must be a number above 0")
        needed = "config.json"
        check_trained("--autoencoder", self.autoencoder, "autoencoder", "autoencoder", needed)
        if self.reads_by is not None:
            check_trained("--text-encoder", self.reads_by, "text encoder", "text_encoder", needed)

    def extras(self) -> Extras:
        """What these options add to the objective."""
        return Extras(
            timesteps=partial(stratified_timesteps, spread=self.spread),
            noise=Ghosts(self.ghosts) if self.ghosts else noise_alone,
            weights=root_snr if self.weighting == "root-snr" else min_snr,
        )


class LatentCache(SceneCache):
    """Latents of the first scenes of a stream, what their cells show, and captions drawn anew."""

    options: LatentDiffusionOptions

    def __init__(
        self, vae: AutoencoderKL, options: LatentDiffusionOptions, reader: int, readers: int
    ) -> None:
        self.stream = StorybookDataset(
            CACHE_BATCH, seed=options.seed, sticker_shares=options.sticker_shares
        )
        shares = "-".join(f"{share:g}" for share in options.sticker_shares)
        kind = "cells-latents-flaws" if options.ghosts else "cells-latents"
        name = f"{kind}-{options.cache}-{options.seed}-{shares}"
        super().__init__(name, vae, options, reader, readers)
        self.scenes = [scene for number in self.numbers for scene in self.stream.scenes(number)]

    def tensors(self, number: int) -> dict[str, Tensor]:
        with self.half_precision():
            rendering = self.stream.batch(number)
            kept = {"latents": encoded(self.vae, rendering.images).half()}
            if self.options.ghosts:
                generator = seeded(self.options.seed, 3, number)
                flawed = [flawed_scene(scene, generator) for scene in rendering.scenes]
                kept["flawed"] = encoded(self.vae, render_scenes(flawed).images).half()
        factor = rendering.images.shape[-1] // kept["latents"].shape[-1]
        return kept | {"classes": cell_classes(rendering, factor).byte()}

    def batch(self, number: int) -> Batch:
        generator = seeded(self.options.seed, 2, number, self.reader)
        rows = torch.randint(len(self.scenes), (self.options.batch_size,), generator=generator)
        scenes = [self.scenes[row] for row in rows.tolist()]
        return Batch(
            self.kept["latents"][rows].float(),
            [sample_caption(scene.stickers, scene.place, generator) for scene in scenes],
            self.kept["classes"][rows].long(),
            self.kept["flawed"][rows].float() if self.options.ghosts else None,
        )


def shard_pairs(options: LatentDiffusionOptions, size: int, **more: Any) -> ShardPairs:
    """What --data, --only and --least-side ask for."""
    return ShardPairs(
        options.data,
        size,
        least_side=options.least_side,
        conditions=[Condition(text) for text in options.only],
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


# ------------------------------------------------------------------ the command


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


@torch.no_grad()
def mix_with(unet: UNet2DConditionModel, folder: Path, share: float) -> None:
    """Moves the U-Net's weights by `share` of the way toward those in the folder."""
    start = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
    for name, weight in unet.state_dict().items():
        weight.lerp_(start[name].to(weight.device), share)


def sample_sheet(pipe: StableDiffusionPipeline, captions: list[str], path: Path) -> None:
    """A picture for each caption, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        captions,
        num_inference_steps=SHEET_STEPS,
        guidance_scale=5.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    save_sheet(images.cpu().float(), path, columns=8)


def main(arguments: list[str] | None = None) -> None:
    options = parse(LatentDiffusionOptions, "latent_diffusion", __doc__, arguments)
    torch.manual_seed(options.seed)
    vae = AutoencoderKL.from_pretrained(options.autoencoder, torch_dtype=torch.float32).eval()
    if torch.cuda.is_available():
        vae.cuda()
    trainee = LatentDiffusionTraining(options.start_from, options.reads_by, options.extras())
    if options.compile:
        trainee.compile_unet()
    size = trainee.unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    held_out, streams = None, []
    if options.data:
        held_out = shard_pairs(options, size, held_out=True)
        captions = [caption for _, caption in islice(shard_pairs(options, size).one_pass(), 24)]
    else:
        captions = [sample_scene(seeded(loop.HELD_OUT_SEED, i)).caption for i in range(24)]

    def batches(start: int, reader: int, readers: int) -> Iterable[Batch]:
        if not options.data:
            return LatentCache(vae, options, reader, readers).batches(start)
        streams.append(shard_pairs(options, size, reader=reader, readers=readers))
        return shard_batches(vae, streams[-1], options.batch_size, start)

    progress = loop.train(
        Seeing(trainee, options.see) if options.see else trainee,
        options,
        batches=batches,
        sample=lambda path: sample_sheet(pipeline(trainee, vae), captions, path),
    )
    if options.keep:
        mix_with(trainee.unet, options.start_from / "unet", options.keep)
    scores = evaluate(trainee, vae.cpu(), held_out)
    data = None
    if streams:
        data = f"{len(streams[0].shards)} shards: {streams[0].summary()}"
        print(data)
    trainee.unet.set_attn_processor(AttnProcessor2_0())
    with export.exported(
        options,
        progress,
        scores,
        title="storybook: a complete Stable Diffusion pipeline",
        what=__doc__,
        data=data,
    ) as folder:
        pipeline(trainee, vae).to(torch.float16).save_pretrained(folder)
        export.read_in_single_precision(folder / "text_encoder")
        # The first stage as it was shipped, with its own card.
        shutil.rmtree(folder / "vae")
        shutil.copytree(options.autoencoder, folder / "vae")


if __name__ == "__main__":
    command(main)
