"""Teaches stickers of your own to the shipped pipeline: new words, and a U-Net that draws them.

    python -m lrd_helpers.training.new_sticker --stickers robot.svg --output runs/robot/model

Each word becomes a token. Its embedding begins as the mean of those of the stickers that the model
knows (textual inversion, Gal et al. 2023, begins with a single such word), and learns with all
weights of the U-Net. Half of the scenes show a new sticker. The other half are the world's own, so
that the model keeps what it could (rehearsal; DreamBooth, Ruiz et al. 2023, has the model itself
draw such pictures). The loss is that of `latent_diffusion`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor
from transformers import AddedToken
from transformers.hf_argparser import HfArg

from lrd_helpers.layout import Layout
from lrd_helpers.measure import Detector, OwnStickerDetector
from lrd_helpers.models import load_pipeline, no_progress_bars
from lrd_helpers.pipeline import LayeredRenderingPipeline
from lrd_helpers.storybook import (
    STICKERS,
    Scene,
    Sticker,
    StorybookDataset,
    layout_of_scene,
    own_sticker,
    render_scenes,
    sample_caption,
    sample_layout,
    scene_with,
    seeded,
)
from lrd_helpers.training import export, loop
from lrd_helpers.training.latent_cache import CACHE_BATCH, Batch, SceneCache, encoded
from lrd_helpers.training.latent_diffusion import (
    SHEET_STEPS,
    STRATIFIED,
    LatentDiffusionTraining,
    noise_schedule,
    pipeline,
    sample_sheet,
)
from lrd_helpers.training.options import ASSETS, CacheOptions, check_trained, command, parse
from lrd_helpers.words import known_words


@dataclass(frozen=True)
class NewStickerOptions(CacheOptions):
    """The options of this training."""

    minutes: float = 9.0
    learning_rate: float = 5e-4
    warmup: int = 50
    decay: float = 0.6
    weight_decay: float = 0.0  # it would move the embeddings of all other words, too
    ema_decay: float = 0.99
    cache: int = 3_000
    start_from: Path | None = ASSETS / "storybook"
    run: Path = Path("runs/new-sticker")
    output: Path = Path("runs/new-sticker/model")
    stickers: list[str] = HfArg(
        default_factory=list,
        help="SVG files; a sticker's word is its file's name",
        metadata={"metavar": "FILE"},
    )
    new: float = HfArg(
        default=0.5, help="of the scenes that show a new sticker", metadata={"metavar": "SHARE"}
    )

    def check(self) -> None:
        super().check()
        if not 0 < self.new <= 1:
            raise ValueError(f"--new {self.new:g}: it must be a share, more than 0 and at most 1")
        if self.start_from is None:
            raise ValueError("--from: a new sticker is taught to a finished pipeline")
        check_trained("--from", self.start_from, "pipeline", "latent_diffusion", "model_index.json")


class NewStickerTraining(LatentDiffusionTraining):
    """A pipeline's U-Net, all of it, and the embeddings of new words; other words stay as they are.

    Args:
        start_from: the folder of the pipeline to go on from.
        words: none of which it knows.

    Raises:
        ValueError: no words, a word twice, or a word that its tokenizer has.
    """

    def __init__(self, start_from: Path, words: Sequence[str]) -> None:
        super().__init__(start_from, extras=STRATIFIED)
        known = known_words(self.tokenizer) + list(self.tokenizer.get_added_vocab())
        for number, word in enumerate(words):
            if word in known or word in words[:number]:
                raise ValueError(f"the model knows the word {word!r}: give the sticker another")
        if not words:
            raise ValueError("there are no new stickers to teach")
        nouns = [f"{name}</w>" for name in STICKERS if name in known]
        if not nouns:
            raise ValueError(f"{start_from}: its tokenizer knows none of the world's stickers")
        like = self.tokenizer.convert_tokens_to_ids(nouns)
        self.tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])
        self.text_encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        embeddings = self.text_encoder.get_input_embeddings().weight
        new = torch.zeros(len(embeddings), 1)
        new[-len(words) :] = 1
        with torch.no_grad():
            embeddings[-len(words) :] = embeddings[like].mean(0)
        embeddings.requires_grad_(True)
        embeddings.register_hook(lambda gradient: gradient * new.to(gradient))


class NewStickerCache(SceneCache):
    """Scenes, a share of which show a new sticker, encoded once; captions drawn anew."""

    options: NewStickerOptions

    def __init__(
        self,
        stickers: Sequence[Sticker],
        vae: torch.nn.Module,
        options: NewStickerOptions,
        reader: int = 0,
        readers: int = 1,
    ) -> None:
        self.stickers, self.stream = stickers, StorybookDataset(CACHE_BATCH, seed=options.seed)
        drawings = hashlib.sha256(repr(stickers).encode()).hexdigest()[:12]
        name = f"latents-{options.cache}-{options.seed}-{options.new:g}-{drawings}"
        super().__init__(name, vae, options, reader, readers)
        self.scenes = [scene for number in self.numbers for scene in self.drawn(number)]

    def drawn(self, number: int) -> list[Scene]:
        """The scenes of batch `number`; the new stickers take turns."""
        scenes = self.stream.scenes(number)
        generator = seeded(self.options.seed, 4, number)
        for row in range(round(self.options.new * len(scenes))):
            scenes[row] = scene_with(self.stickers[row % len(self.stickers)], generator)
        return scenes

    def tensors(self, number: int) -> dict[str, Tensor]:
        with self.half_precision():
            images = render_scenes(self.drawn(number)).images
            return {"latents": encoded(self.vae, images).half()}

    def batch(self, number: int) -> Batch:
        generator = seeded(self.options.seed, 2, number, self.reader)
        rows = torch.randint(len(self.scenes), (self.options.batch_size,), generator=generator)
        scenes = [self.scenes[row] for row in rows.tolist()]
        captions = [sample_caption(scene.stickers, scene.place, generator) for scene in scenes]
        return Batch(self.kept["latents"][rows].float(), captions)


def teach(
    stickers: Sequence[Sticker], options: NewStickerOptions
) -> tuple[LayeredRenderingPipeline, loop.Progress]:
    """The pipeline that knows the stickers' words and draws them, on the CPU; and how it got there.

    Raises:
        ValueError: options that cannot work, a word that the model knows.
    """
    options.check()
    torch.manual_seed(options.seed)
    with no_progress_bars():
        trainee = NewStickerTraining(options.start_from, [sticker.name for sticker in stickers])
    pipe = load_pipeline(options.start_from, "cuda" if torch.cuda.is_available() else "cpu")
    vae = pipe.vae.float()
    captions = [
        scene_with(stickers[n % len(stickers)], seeded(loop.HELD_OUT_SEED, n)).caption
        for n in range(24)
    ]
    progress = loop.train(
        trainee,
        options,
        batches=lambda start, reader, readers: NewStickerCache(
            stickers, vae, options, reader, readers
        ).batches(start),
        sample=lambda path: sample_sheet(pipeline(trainee, vae), captions, path),
    )
    trainee.text_encoder.requires_grad_(False)
    trainee.unet.set_attn_processor(AttnProcessor2_0())
    pipe.register_modules(
        tokenizer=trainee.tokenizer, text_encoder=trainee.text_encoder, unet=trainee.unet
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cpu"), progress


# ------------------------------------------------------------------ did it work?


def layouts_with(sticker: Sticker, count: int) -> list[Layout]:
    """Held-out layouts of one layer, which is the new sticker; each in some colour and place."""
    scenes = (
        scene_with(sticker, seeded(loop.HELD_OUT_SEED, n), sticker_count=1) for n in range(count)
    )
    return [layout_of_scene(scene) for scene in scenes]


def share_seen(
    pipe: LayeredRenderingPipeline, detector: Detector, layouts: Sequence[Layout]
) -> float:
    """Of the layouts' captions: in how many of their pictures the first layer's thing is seen.

    Drawn from the caption alone, so its box does not count; its colour does.
    """
    images = pipe(
        list(layouts),
        method="plain",
        num_inference_steps=SHEET_STEPS,
        guidance_scale=5.0,
        generator=[seeded(loop.HELD_OUT_SEED, 7, n) for n in range(len(layouts))],
    ).images
    seen = [
        bool(detector(image, [layout.layers[0].prompt])[0])
        for image, layout in zip(images, layouts, strict=True)
    ]
    return sum(seen) / len(seen)


def evaluate(
    pipe: LayeredRenderingPipeline, stickers: Sequence[Sticker], start_from: Path, count: int = 48
) -> dict[str, object]:
    """How often the new stickers are seen, and the world's, before and after."""
    detector, scores = OwnStickerDetector(stickers), {}
    for sticker in stickers:
        seen = share_seen(pipe, detector, layouts_with(sticker, count))
        scores[f"pictures that show {sticker} in its colour, {count} captions"] = round(seen, 3)
    known = [sample_layout(seeded(loop.HELD_OUT_SEED, n), sticker_count=1) for n in range(count)]
    for when, which in (("before", load_pipeline(start_from, "cpu")), ("after", pipe)):
        which.set_progress_bar_config(disable=True)
        seen = share_seen(which, detector, known)
        name = f"pictures that show one of the world's stickers in its colour, {count} captions"
        scores[f"{name}, {when}"] = round(seen, 3)
    return scores


# ------------------------------------------------------------------ the command


def main(arguments: list[str] | None = None) -> None:
    options = parse(NewStickerOptions, "new_sticker", __doc__, arguments)
    stickers = [own_sticker(path.stem, path) for path in map(Path, options.stickers)]
    pipe, progress = teach(stickers, options)
    scores = evaluate(pipe, stickers, options.start_from)
    names = ", ".join(sticker.name for sticker in stickers)
    with export.exported(
        options,
        progress,
        scores,
        title=f"storybook, with new stickers: {names}",
        what=__doc__,
    ) as folder:
        parts = dict(pipe.components) | {"scheduler": noise_schedule()}
        whole = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        whole.to(torch.float16).save_pretrained(folder)
        export.read_in_single_precision(folder / "text_encoder")


if __name__ == "__main__":
    command(main)
