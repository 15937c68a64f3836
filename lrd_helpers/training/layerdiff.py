"""Trains the layered model: background, layers with alpha and their composite, drawn together.

From the shipped U-Net, with blocks that are silent at first (`lrd_helpers.layerdiff.unet`), on
latents of the RGBA autoencoder. Loss: the squared error of the noise of every slot that is to be
drawn, weighted over the noise levels. Each slot has a noise level of its own: what is given is
clean and counts nothing. So one model learns three tasks: text → layers (nothing given), image →
layers (the composite given) and layer inpainting (some slots given).

The stages are runs of their own, each --from the folder that the run before it has made; README.md
has their options. With --data, a share of the batches are stacks that `lrd_helpers construct` has
made of pictures.
"""

import hashlib
import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import compute_snr
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.hf_argparser import HfArg

from lrd_helpers.layerdiff.alpha import decode_layers, encode_layers, over
from lrd_helpers.layerdiff.pipeline import LayerDiffPipeline
from lrd_helpers.layerdiff.stack import LayerStack
from lrd_helpers.layerdiff.unet import (
    COMPOSITE,
    MOST_LAYERS,
    LayeredUNet2DConditionModel,
    slot_identities,
)
from lrd_helpers.storybook import (
    IMAGE_SIZE,
    Rendering,
    Scene,
    StorybookDataset,
    caption_of,
    sample_caption,
    seeded,
)
from lrd_helpers.training import export, loop
from lrd_helpers.training.latent_cache import CACHE_BATCH, SceneCache
from lrd_helpers.training.latent_diffusion import (
    EMPTY_CAPTIONS,
    min_snr,
    noise_schedule,
    root_snr,
    stratified_timesteps,
    uniform_timesteps,
)
from lrd_helpers.training.layered_shards import StackShards, rendering_of
from lrd_helpers.training.options import (
    ASSETS,
    CacheOptions,
    SceneOptions,
    check_trained,
    command,
    parse,
)
from lrd_helpers.training.sheets import save_sheet

TASKS = ("text", "image", "inpainting")
CAPTION_ALONE = 0.2  # of the stacks: prompts of layers are left out, as layers="auto" does
PROMPTS_ALONE = 0.05
EMPTY_SLOTS = 0.15  # of the batches: more slots than there are layers, which stay empty
WEIGHTS = {"min-snr": min_snr, "root-snr": root_snr}
SHEET_STEPS = 15
GUIDANCE = 4.0

Stacks = Float[Tensor, "batch slots channels height width"]


class StackBatch(NamedTuple):
    """What the layered U-Net learns from in one step; all stacks have as many slots."""

    latents: Stacks  # scaled
    prompts: list[list[str]]  # of each slot; the composite's is the caption
    identities: Int[Tensor, "slots"]
    clean: Bool[Tensor, "batch slots"]  # the slots that are given


@dataclass(frozen=True)
class LayerDiffOptions(CacheOptions, SceneOptions):
    """The options of this training."""

    minutes: float = 180.0
    batch_size: int = 12
    learning_rate: float = 5e-4
    warmup: int = 200
    ema_decay: float = 0.999
    cache: int = 16_000
    run: Path = Path("runs/layerdiff")
    output: Path = Path("runs/layerdiff/model")
    sticker_shares: list[float] = HfArg(
        default_factory=lambda: [0.05, 0.95, 0.0, 0.0, 0.0],
        help="how many of the stacks have 0, 1, 2, 3 and 4 layers; only their ratio counts",
        metadata={"metavar": "SHARE"},
    )
    pipeline: Path = HfArg(
        default=ASSETS / "storybook", help="folder of the pipeline whose U-Net the model grows from"
    )
    autoencoder: Path = HfArg(
        default=Path("runs/rgba-autoencoder/model"),
        help="folder of a finished RGBA autoencoder; one of three channels has masks as pictures",
    )
    tasks: list[float] = HfArg(
        default_factory=lambda: [1.0, 0.0, 0.0],
        help="how many of the stacks are text → layers, image → layers and layer inpainting; only "
        "their ratio counts",
        metadata={"metavar": "SHARE"},
    )
    weighting: Literal["min-snr", "root-snr"] = HfArg(
        default="root-snr",
        help="of the loss over the noise levels; root-snr cares more for the very noisy ones",
    )
    spread: float | None = HfArg(
        default=1.2,
        help="draw timesteps from a logit-normal distribution of this spread",
        metadata={"metavar": "DEVIATION"},
    )
    data: list[str] | None = HfArg(
        default=None,
        help="shards of layers that `lrd_helpers construct` has made, such as 'layers/*.tar'",
        metadata={"metavar": "SHARDS"},
    )
    data_share: float = HfArg(
        default=0.5, help="with --data: how many of the batches are drawn from these shards"
    )

    def check(self) -> None:
        super().check()
        if not 0 < self.data_share <= 1:
            raise ValueError(
                f"--data-share: it is {self.data_share:g}, but should be above 0, at most 1"
            )
        if len(self.tasks) != len(TASKS):
            raise ValueError(f"--tasks: {len(self.tasks)} shares, but 3 are expected: {TASKS}")
        if not all(0 <= share < math.inf for share in self.tasks) or not sum(self.tasks):
            raise ValueError("--tasks: none can be negative, and one must be more than 0")
        needed = "config.json"
        check_trained("--autoencoder", self.autoencoder, "autoencoder", "rgba_autoencoder", needed)
        needed = "model_index.json"
        check_trained("--pipeline", self.pipeline, "pipeline", "latent_diffusion", needed)


class LayerDiffTraining(nn.Module):
    """The layered U-Net with its loss, and the frozen text encoder that it reads.

    Args:
        channels: of a layer's latents: 4, or 4 + 4 where masks are pictures of their own.
    """

    def __init__(self, options: LayerDiffOptions, channels: int = 4) -> None:
        super().__init__()
        folder, self.options, self.scheduler = options.pipeline, options, noise_schedule()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder", dtype=torch.float32
        ).requires_grad_(False)
        if options.start_from is not None:
            self.model = LayeredUNet2DConditionModel.from_pretrained(
                options.start_from / "unet", torch_dtype=torch.float32
            )
        else:
            unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
            self.model = LayeredUNet2DConditionModel.grown(unet, channels)
        if not torch.cuda.is_available():
            # On CPUs the fused attention's backward pass is slower than the plain one's.
            self.set_attention(AttnProcessor())

    def set_attention(self, processor: AttnProcessor | AttnProcessor2_0) -> None:
        """How every attention of the model is computed."""
        for module in self.model.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(processor)

    def encoded_text(self, prompts: list[list[str]]) -> Float[Tensor, "batch slots tokens width"]:
        """The embeddings of each slot's prompt."""
        flat = [prompt for stack in prompts for prompt in stack]
        tokens = self.tokenizer(
            flat, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        embeddings = self.text_encoder(tokens.to(self.text_encoder.device))[0]
        return embeddings.unflatten(0, (len(prompts), -1))

    def forward(self, batch: StackBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """w(t)·‖ε_k − ε_θ(…)_k‖², the mean over all slots k that are drawn.

        All of them share t, as they do in sampling; the given ones are clean, at t = 0.
        """
        z, clean, device = batch.latents, batch.clean, self.model.device
        text = self.encoded_text(batch.prompts)
        noise = torch.randn(z.shape, generator=generator)
        if self.training:
            t = stratified_timesteps(len(z), generator, spread=self.options.spread)
        else:
            t = uniform_timesteps(len(z), generator)
        z_t = self.scheduler.add_noise(z, noise, t)
        z_t = torch.where(clean[:, :, None, None, None], z, z_t)
        times = torch.where(clean, 0, t[:, None])
        guess = self.model(
            z_t.to(device), times.to(device), text, text[:, -1], batch.identities.to(device)
        ).sample.float()
        squares = (guess - noise.to(device)).square().flatten(2).mean(2)
        drawn = (~clean).to(squares)
        weights = WEIGHTS[self.options.weighting](compute_snr(self.scheduler, t)).to(squares)
        errors = drawn * weights[:, None] * squares
        loss = errors.sum() / drawn.sum()
        return {"loss": loss, **by_kind(squares, drawn)}


def by_kind(
    squares: Float[Tensor, "batch slots"], drawn: Float[Tensor, "batch slots"]
) -> dict[str, Float[Tensor, ""]]:
    """The plain errors of backgrounds, layers and composites; 0 where no such slot was drawn."""
    kinds = {"background": slice(0, 1), "layers": slice(1, -1), "composite": slice(-1, None)}
    return {
        kind: (squares * drawn)[:, part].sum() / drawn[:, part].sum().clamp(min=1)
        for kind, part in kinds.items()
    }


# ------------------------------------------------------------------ what it learns from


@torch.no_grad()
def encoded_stacks(
    vae: AutoencoderKL, rendering: Rendering
) -> Float[Tensor, "batch 6 channels rows columns"]:
    """Scaled latents of backgrounds, layers (complete behind what hides them) and composites."""
    opaque = torch.ones_like(rendering.images[:, :1])
    stacks = torch.zeros(len(opaque), MOST_LAYERS + 2, 4, *opaque.shape[2:])
    stacks[:, 0] = torch.cat([rendering.backgrounds, opaque], 1)
    stacks[:, 1 : 1 + rendering.layers.shape[1]] = rendering.rgba
    stacks[:, COMPOSITE] = torch.cat([rendering.images, opaque], 1)
    seen = stacks[:, :, 3].flatten(2).any(2)  # an empty layer's latents are the same each time
    some = encode_layers(
        vae, torch.cat([stacks[seen], torch.zeros_like(stacks[:1, 0])]).to(vae.device)
    ).cpu()
    latents = some[-1].repeat(*seen.shape, 1, 1, 1)
    latents[seen] = some[:-1].to(latents)
    return latents


def sample_prompts(scene: Scene, layers: int, generator: torch.Generator) -> list[str]:
    """Prompts of background, layers (empty for a slot that stays empty) and composite.

    A tenth are all empty, for classifier-free guidance; of some only the caption is left, of a few
    only the others. Now and then a colour goes unnamed.
    """
    kind = float(torch.rand((), generator=generator))
    caption = sample_caption(scene.stickers, scene.place, generator)
    colours = (torch.rand(layers, generator=generator) > 0.1).tolist()
    things = [
        caption_of((placed,), scene.place, name_colours=named, name_place=False)
        for placed, named in zip(scene.stickers, colours, strict=False)
    ]
    return some_prompts(kind, scene.place, things, caption, layers)


def some_prompts(
    kind: float, place: str, things: Sequence[str], caption: str, layers: int
) -> list[str]:
    """The prompts that are left, by a number `kind` that is uniform in [0, 1)."""
    prompts = [place, *things, *[""] * (layers - len(things))]
    if kind < EMPTY_CAPTIONS:
        return [""] * (layers + 2)
    if kind < EMPTY_CAPTIONS + CAPTION_ALONE:
        return [""] * (layers + 1) + [caption]
    return [*prompts, "" if kind > 1 - PROMPTS_ALONE else caption]


def sample_given(
    shares: list[float], count: int, slots: int, generator: torch.Generator
) -> Bool[Tensor, "count slots"]:
    """Which slots are given: none, the composite, or some of the others (all: it is to compose)."""
    tasks = torch.multinomial(torch.tensor(shares), count, True, generator=generator)
    given = torch.zeros(count, slots, dtype=torch.bool)
    given[:, -1] = tasks == TASKS.index("image")
    for row in (tasks == TASKS.index("inpainting")).nonzero().flatten().tolist():
        kept = int(torch.randint(1, slots, (), generator=generator))
        given[row, torch.randperm(slots - 1, generator=generator)[:kept]] = True
    return given


class StackBatches(SceneCache):
    """Batches of stacks that were encoded once; those of a batch have equally many layers."""

    options: LayerDiffOptions

    def group(self, layers: Sequence[int]) -> None:
        """Tell the rows apart by how many layers they have."""
        self.rows = [
            [row for row, count in enumerate(layers) if count == number]
            for number in range(MOST_LAYERS + 1)
        ]

    def prompts(self, row: int, layers: int, generator: torch.Generator) -> list[str]:
        """Prompts of background, `layers` layers and composite."""
        raise NotImplementedError

    def batch(self, number: int) -> StackBatch:
        generator = seeded(self.options.seed, 2, number, self.reader)
        sizes = torch.tensor([float(len(rows)) for rows in self.rows])
        layers = int(torch.multinomial(sizes, 1, generator=generator))
        picks = torch.randint(
            len(self.rows[layers]), (self.options.batch_size,), generator=generator
        )
        rows = [self.rows[layers][pick] for pick in picks.tolist()]
        if layers < MOST_LAYERS and torch.rand((), generator=generator) < EMPTY_SLOTS:
            layers = int(torch.randint(layers + 1, MOST_LAYERS + 1, (), generator=generator))
        slots = slot_identities(layers)
        identities = slots.clone()
        # Any of the layers' identities, in order: so all of them learn what a layer is.
        some = torch.randperm(MOST_LAYERS, generator=generator)[:layers] + 1
        identities[1:-1] = some.sort().values
        return StackBatch(
            self.kept["stacks"][rows][:, slots].float(),
            [self.prompts(row, layers, generator) for row in rows],
            identities,
            sample_given(self.options.tasks, len(rows), len(identities), generator),
        )


class StackCache(StackBatches):
    """The stacks of the first scenes of a stream."""

    def __init__(
        self, vae: AutoencoderKL, options: LayerDiffOptions, reader: int, readers: int
    ) -> None:
        shares = options.sticker_shares
        self.stream = StorybookDataset(CACHE_BATCH, seed=options.seed, sticker_shares=shares)
        name = f"stacks-{options.cache}-{options.seed}-{'-'.join(f'{x:g}' for x in shares)}"
        super().__init__(name, vae, options, reader, readers)
        self.scenes = [scene for number in self.numbers for scene in self.stream.scenes(number)]
        self.group([len(scene.stickers) for scene in self.scenes])

    def tensors(self, number: int) -> dict[str, Tensor]:
        with self.half_precision():
            return {"stacks": encoded_stacks(self.vae, self.stream.batch(number)).half()}

    def prompts(self, row: int, layers: int, generator: torch.Generator) -> list[str]:
        return sample_prompts(self.scenes[row], layers, generator)


class ShardCache(StackBatches):
    """The first stacks in the shards of `--data`, at most as many as `--cache` says.

    Raises:
        ValueError: no stack can be used.
    """

    def __init__(
        self, vae: AutoencoderKL, options: LayerDiffOptions, reader: int, readers: int
    ) -> None:
        def stacks() -> Iterator[LayerStack]:
            in_order = (stack for _, stack in shards.in_order())
            return itertools.islice(in_order, reader, options.cache, readers)

        shards = StackShards(options.data, IMAGE_SIZE)
        self.texts = [
            (stack.background_prompt, [layer.prompt for layer in stack.layers], stack.caption)
            for stack in stacks()
        ]
        if not self.texts:
            raise ValueError(f"--data: no stack can be used: {shards.summary(3) or 'none there'}")
        print(f"{len(shards.shards)} shards of layers: {shards.summary()}")
        self.stream = stacks()
        rounds = -(-len(self.texts) // CACHE_BATCH)
        name = f"shards-{options.cache}-{digest_of_files(shards.shards)}"
        super().__init__(name, vae, options, reader, readers, rounds)
        self.group([len(things) for _, things, _ in self.texts])

    def tensors(self, number: int) -> dict[str, Tensor]:
        rendering = rendering_of(list(itertools.islice(self.stream, CACHE_BATCH)))
        with self.half_precision():
            return {"stacks": encoded_stacks(self.vae, rendering).half()}

    def prompts(self, row: int, layers: int, generator: torch.Generator) -> list[str]:
        place, things, caption = self.texts[row]
        kind = float(torch.rand((), generator=generator))
        return some_prompts(kind, place, things, caption, layers)


def digest_of_files(files: Sequence[str | Path]) -> str:
    """A short name for files: others, or of another size, have another name."""
    sizes = [(str(each), each.stat().st_size if isinstance(each, Path) else 0) for each in files]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]


def stack_batches(
    vae: AutoencoderKL, options: LayerDiffOptions, start: int, reader: int, readers: int
) -> Iterator[StackBatch]:
    """All batches from number `start` on; which are of --data depends on (seed, number, reader)."""
    if not options.data:
        return StackCache(vae, options, reader, readers).batches(start)
    pictures = ShardCache(vae, options, reader, readers)
    if options.data_share == 1:
        return pictures.batches(start)
    scenes = StackCache(vae, options, reader, readers)

    def batch(number: int) -> StackBatch:
        u = float(torch.rand((), generator=seeded(options.seed, 3, number, reader)))
        return (pictures if u < options.data_share else scenes).batch(number)

    return map(batch, itertools.count(start))


# ------------------------------------------------------------------ the command


@torch.no_grad()
def drawn_stacks(
    trainee: LayerDiffTraining,
    prompts: list[list[str]],
    generator: torch.Generator,
    given: Stacks,
    clean: Bool[Tensor, "batch slots"],
) -> Stacks:
    """Scaled latents of stacks, by DDIM with classifier-free guidance, for the sheets.

    Args:
        given: the slots that are not drawn, where `clean`.
    """
    slots, device = len(prompts[0]), trainee.model.device
    identities = slot_identities(slots - 2).to(device)
    text = trainee.encoded_text([*prompts, *[[""] * slots] * len(prompts)])
    scheduler = noise_schedule()
    scheduler.set_timesteps(SHEET_STEPS)
    z = torch.randn(given.shape, generator=generator).to(device)
    clean, given = clean.to(device), given.to(device)
    for t in scheduler.timesteps.tolist():
        z = torch.where(clean[:, :, None, None, None], given, z)
        times = torch.where(clean, 0, t).repeat(2, 1)
        noise = trainee.model(z.repeat(2, 1, 1, 1, 1), times, text, text[:, -1], identities).sample
        asked, unasked = noise.chunk(2)
        z = scheduler.step(unasked + GUIDANCE * (asked - unasked), t, z).prev_sample
    return torch.where(clean[:, :, None, None, None], given, z)


def sample_sheet(trainee: LayerDiffTraining, vae: AutoencoderKL, layers: int, path: Path) -> None:
    """Exploded stacks, one a row: background, layers on white and grey, composed, composite.

    The last two rows were given their composite: image → layers.
    """
    stream = StorybookDataset(6, seed=loop.HELD_OUT_SEED, sticker_count=layers)
    rendering = stream.batch(0)
    prompts = [
        [
            scene.place,
            *[caption_of((placed,), scene.place, name_place=False) for placed in scene.stickers],
            caption_of(scene.stickers, scene.place),
        ]
        for scene in rendering.scenes
    ]
    identities = slot_identities(layers)
    true = encoded_stacks(vae, rendering)[:, identities]
    clean = torch.zeros(true.shape[:2], dtype=torch.bool)
    clean[4:, -1] = True
    latents = drawn_stacks(trainee, prompts, torch.Generator().manual_seed(0), true, clean)
    rgba = (
        decode_layers(vae, latents.flatten(0, 1).to(vae.device)).cpu().unflatten(0, true.shape[:2])
    )
    composed = rgba[:, 0, :3]
    for layer in rgba[:, 1:-1].unbind(1):
        composed = over(layer, composed)
    shown = [rgba[:, 0, :3], *over(rgba[:, 1:-1], 1.0).unbind(1), composed, rgba[:, -1, :3]]
    save_sheet(torch.stack(shown, 1).flatten(0, 1), path, columns=len(shown))


@torch.no_grad()
def evaluate(trainee: LayerDiffTraining, vae: AutoencoderKL, batches: int = 8) -> dict[str, object]:
    """The loss of each task on held-out stacks of the same kind, with prompts as in training."""
    stream = StorybookDataset(
        CACHE_BATCH, seed=loop.HELD_OUT_SEED, sticker_shares=trainee.options.sticker_shares
    )
    sums = dict.fromkeys(TASKS, 0.0)
    count = 0
    for number in range(batches):
        rendering = stream.batch(number)
        stacks = encoded_stacks(vae, rendering)
        for layers in range(MOST_LAYERS + 1):
            rows = [i for i, s in enumerate(rendering.scenes) if len(s.stickers) == layers]
            if not rows:
                continue
            identities, generator = slot_identities(layers), seeded(number, layers)
            prompts = [sample_prompts(rendering.scenes[row], layers, generator) for row in rows]
            for task in TASKS:
                shares = [float(task == each) for each in TASKS]
                given = sample_given(shares, len(rows), len(identities), seeded(number, 1))
                batch = StackBatch(stacks[rows][:, identities], prompts, identities, given)
                sums[task] += float(trainee(batch, seeded(number, 2))["loss"]) * len(rows)
            count += len(rows)
    return {
        f"weighted noise-prediction loss, {task}, {count:,} held-out stacks": round(
            total / count, 5
        )
        for task, total in sums.items()
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(LayerDiffOptions, "layerdiff", __doc__, arguments)
    torch.manual_seed(options.seed)
    vae = AutoencoderKL.from_pretrained(options.autoencoder, torch_dtype=torch.float32).eval()
    if torch.cuda.is_available():
        vae.cuda()
    pictures = 1 if vae.config.in_channels == 4 else 2  # of a layer: RGBA, or colours and mask
    trainee = LayerDiffTraining(options, pictures * vae.config.latent_channels)
    usual = max(range(MOST_LAYERS + 1), key=lambda layers: options.sticker_shares[layers])

    progress = loop.train(
        trainee,
        options,
        batches=partial(stack_batches, vae, options),
        sample=partial(sample_sheet, trainee, vae, usual),
    )
    scores = evaluate(trainee, vae.cpu())
    trainee.set_attention(AttnProcessor2_0())
    data = None
    if options.data:
        data = f"{options.data_share:.0%} layers constructed from pictures, in {options.data}"
    with export.exported(
        options,
        progress,
        scores,
        title="storybook: layers generated together",
        what=__doc__,
        data=data,
        grown_from=options.pipeline,
    ) as folder:
        trainee.model.half().save_pretrained(folder / "unet")
        for part in ("text_encoder", "tokenizer", "scheduler"):
            shutil.copytree(options.pipeline / part, folder / part)
        shutil.copytree(options.autoencoder, folder / "vae")
        LayerDiffPipeline(
            vae, trainee.text_encoder, trainee.tokenizer, trainee.model, trainee.scheduler
        ).save_config(folder)


if __name__ == "__main__":
    command(main)
