"""Trains style conditioning: a style encoder, and the part of the U-Net that listens to it.

The reference never shows the scene that is to be drawn: it is another one in the same style. So
its content cannot help, and the code learns to leave it out. The loss has two parts, as in latent
diffusion's first stage: the noise prediction's (the reconstruction), and KL(N(μ, σ²) ‖ N(0, 1)) of
the code, times --kl-weight. A style at strength s is kept with probability s; otherwise, and
without a style, scenes are flat, as the U-Net draws them from the start.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import compute_snr
from jaxtyping import Float
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from lrd_helpers.autoencoder import kl_divergence, reparameterise
from lrd_helpers.storybook import (
    STYLES,
    Scene,
    StorybookDataset,
    render_scenes,
    sample_caption,
    sample_scene,
    seeded,
)
from lrd_helpers.style import StyleConditioning, StyleEncoder, join, styled_prompt, weight_sum
from lrd_helpers.training import export, loop
from lrd_helpers.training.latent_cache import CACHE_BATCH, Latents, SceneCache, encoded
from lrd_helpers.training.latent_diffusion import EMPTY_CAPTIONS, min_snr, uniform_timesteps
from lrd_helpers.training.options import ASSETS, CacheOptions, check_trained, command, parse
from lrd_helpers.training.sheets import save_sheet

NO_STYLE, FULL_STYLE = 0.1, 0.6  # shares of references at strength 0 and 1; the rest lie between
SHEET_STEPS = 20
TUNED = ("attn2", "norm", "proj_in", "proj_out", "conv_in", "conv_out")

Images = Float[Tensor, "batch 3 _height _width"]


@dataclass(frozen=True)
class StyleOptions(CacheOptions):
    """The options of this training."""

    minutes: float = 40.0
    learning_rate: float = 5e-4
    run: Path = Path("runs/style")
    output: Path = ASSETS / "storybook-style"
    cache: int = 16_000
    pipeline: Path = HfArg(
        default=ASSETS / "storybook",
        help="folder of the finished pipeline whose U-Net is fine-tuned",
    )
    tune: list[str] = HfArg(
        default_factory=lambda: list(TUNED),
        help="the U-Net's weights with one of these in their names learn; all others stay",
        metadata={"metavar": "PART"},
    )
    kl_weight: float = HfArg(default=1e-4, help="of the code's KL, in nats")
    code_size: int = HfArg(default=2, help="numbers in a style's code")
    tokens: int = HfArg(default=4, help="tokens that a style adds")

    def check(self) -> None:
        super().check()
        needed = "model_index.json"
        check_trained("--pipeline", self.pipeline, "pipeline", "latent_diffusion", needed)


@dataclass(frozen=True)
class Pairs:
    """A batch: what is to be drawn, and pictures of other scenes in the style asked for."""

    latents: Latents
    captions: list[str]
    references: Images  # in [0, 1]
    strengths: Float[Tensor, "batch"]  # in [0, 1]


class StyleTraining(nn.Module):
    """Style encoder and U-Net with the loss; only the weights named by `tuned` learn.

    Args:
        pipe: the finished pipeline. Its U-Net is changed in place.
        start_from: a finished style conditioning to go on from; it decides what is tuned.
        tuned: the U-Net's weights that have one of these in their names.
        kl_weight: of the code's KL divergence in nats.
        encoder: options of the `StyleEncoder`.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        start_from: Path | None = None,
        *,
        tuned: str | tuple[str, ...] = TUNED,
        kl_weight: float = 1e-4,
        **encoder: int,
    ) -> None:
        super().__init__()
        self.pipe = [pipe]  # in a list, so that its parts are not trained
        self.unet, self.kl_weight = pipe.unet, kl_weight
        self.base = weight_sum(self.unet)
        if start_from is None:
            tuned = (tuned,) if isinstance(tuned, str) else tuned
            size = self.unet.config.cross_attention_dim
            self.encoder = StyleEncoder(token_size=size, **encoder)
            names = [name for name, _ in self.unet.named_parameters()]
            for part in tuned:
                if not any(part in name for name in names):
                    raise ValueError(f"no weight of the U-Net has {part!r} in its name")
            self.tuned = [name for name in names if any(part in name for part in tuned)]
        else:
            before = StyleConditioning.from_pretrained(start_from)
            self.encoder, self.tuned = before.encoder, list(before.unet_weights)
            # The U-Net may have been trained further since: its style then starts from the old one.
            self.unet.load_state_dict(before.unet_weights, strict=False)
        for name, weight in self.unet.named_parameters():
            weight.requires_grad_(name in self.tuned)
        if not torch.cuda.is_available():
            # On CPUs the fused attention's backward pass is slower than the plain one's.
            self.unet.set_attn_processor(AttnProcessor())

    @torch.no_grad()
    def text_tokens(self, captions: list[str]) -> Float[Tensor, "batch tokens features"]:
        """The captions' embeddings."""
        pipe = self.pipe[0]
        tokens = pipe.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(pipe.text_encoder.device)
        return pipe.text_encoder(tokens)[0]

    def noise_losses(
        self,
        latents: Latents,
        tokens: Float[Tensor, "batch tokens features"],
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """Squared error of the predicted noise for each picture, min-SNR-weighted and plain."""
        scheduler, device = self.pipe[0].scheduler, self.unet.device
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = uniform_timesteps(len(latents), generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy.to(device), timesteps.to(device), tokens).sample.float()
        squares = (prediction - noise.to(device)).square().flatten(1).mean(1)
        snr = compute_snr(scheduler, timesteps).to(device)
        return min_snr(snr) * squares, squares

    def forward(self, batch: Pairs, generator: torch.Generator) -> dict[str, Tensor]:
        device = self.unet.device
        empty = torch.rand(len(batch.captions), generator=generator) < EMPTY_CAPTIONS
        captions = [
            "" if drop else caption for drop, caption in zip(empty, batch.captions, strict=True)
        ]
        mean, log_variance = (
            part.float() for part in self.encoder.encode(batch.references.to(device))
        )
        noise = torch.randn(mean.shape, generator=generator).to(device)
        style = self.encoder.tokens(reparameterise(mean, log_variance, noise)).float()
        tokens = join(self.text_tokens(captions), style, batch.strengths.to(device))
        weighted, squares = self.noise_losses(batch.latents, tokens, generator)
        kl = kl_divergence(mean, log_variance)
        loss = weighted.mean() + self.kl_weight * kl
        return {"loss": loss, "noise": weighted.mean(), "mse": squares.mean(), "kl": kl}

    def conditioning(self) -> StyleConditioning:
        """What is shipped, in half precision."""
        weights = self.unet.state_dict()
        weights = {name: weights[name].half() for name in self.tuned}
        return StyleConditioning(self.encoder.half(), weights, self.base)


class StyledPairs(SceneCache):
    """Scenes of all styles, encoded once, and batches of them with fresh references."""

    def __init__(
        self, vae: AutoencoderKL, options: StyleOptions, reader: int, readers: int
    ) -> None:
        self.stream = StorybookDataset(CACHE_BATCH, seed=options.seed, styles=STYLES)
        super().__init__(f"styled-{options.cache}-{options.seed}", vae, options, reader, readers)
        self.latents = self.kept["latents"]
        self.scenes = [scene for number in self.numbers for scene in self.stream.scenes(number)]
        self.rows = {
            style: [row for row, scene in enumerate(self.scenes) if scene.style == style]
            for style in STYLES
        }

    def tensors(self, number: int) -> dict[str, Tensor]:
        with self.half_precision():
            return {"latents": encoded(self.vae, self.stream.batch(number).images).half()}

    def batch(self, number: int) -> Pairs:
        generator = seeded(self.options.seed, 2, number, self.reader)
        rows, references, strengths = [], [], []
        for _ in range(self.options.batch_size):
            kind, partial, kept, row = torch.rand(4, generator=generator).tolist()
            strength = 0.0 if kind < NO_STYLE else 1.0 if kind < NO_STYLE + FULL_STYLE else partial
            style = STYLES[int(torch.randint(len(STYLES), (), generator=generator))]
            rows_of_style = self.rows[style if kept < strength else "flat"]
            rows.append(rows_of_style[int(row * len(rows_of_style))])
            references.append(sample_scene(generator, style=style))
            strengths.append(strength)
        targets = [self.scenes[row] for row in rows]
        return Pairs(
            self.latents[rows].float(),
            [sample_caption(scene.stickers, scene.place, generator) for scene in targets],
            render_scenes(references).images,
            torch.tensor(strengths),
        )


def held_out_scenes(style: str, count: int, first: int = 0) -> list[Scene]:
    """Scenes that no training saw; the same ones in every style."""
    stream = StorybookDataset(count, seed=loop.HELD_OUT_SEED)
    return [replace(scene, style=style) for scene in stream.scenes(first)]


@torch.no_grad()
def evaluate(
    trainee: StyleTraining, before: UNet2DConditionModel, scenes: int = 128
) -> dict[str, object]:
    """Noise-prediction losses on held-out scenes: does the style help, and does content leak?

    A reference that is the very picture to be drawn must not help more than another one of the
    same style. Flat scenes without a style must cost no more than they did `before`.
    """
    vae, scores, measured = trainee.pipe[0].vae, {}, f"{scenes} held-out scenes"
    for style in STYLES:
        images, others = (
            render_scenes(held_out_scenes(style, scenes, first)).images for first in (0, 1)
        )
        latents = encoded(vae, images)
        text = trainee.text_tokens([scene.caption for scene in held_out_scenes(style, scenes)])
        for name, references, strength in (
            ("another scene as reference", others, 1.0),
            ("itself as reference", images, 1.0),
            ("no reference", images, 0.0),
        ):
            tokens = join(text, trainee.encoder(references), strength)
            weighted, _ = trainee.noise_losses(latents, tokens, seeded(0))
            scores[f"loss, {style}, {name}, {measured}"] = round(float(weighted.mean()), 5)
        if style == "flat":
            unet, trainee.unet = trainee.unet, before
            weighted, _ = trainee.noise_losses(latents, text, seeded(0))
            trainee.unet = unet
            name = f"loss, flat, U-Net before this training, {measured}"
            scores[name] = round(float(weighted.mean()), 5)
    return scores


@torch.no_grad()
def sample_sheet(trainee: StyleTraining, path: Path) -> None:
    """First row: references; below, a caption a row: without style, and in each reference's."""
    captions = [scene.caption for scene in held_out_scenes("flat", 5, 2)]
    pictures = torch.cat([render_scenes(held_out_scenes(style, 1, 3)).images for style in STYLES])
    style = trainee.encoder(pictures.to(trainee.encoder.device)).cpu()
    style = torch.cat([style[:1], style])
    rows = [torch.cat([torch.ones_like(pictures[:1]), pictures])]
    pipe = trainee.pipe[0]
    pipe.set_progress_bar_config(disable=True)
    for caption in captions:
        prompt = styled_prompt(pipe, caption, style, [0.0, 1.0, 1.0, 1.0])
        drawn = pipe(
            **prompt,
            num_inference_steps=SHEET_STEPS,
            guidance_scale=5.0,
            output_type="pt",
            generator=[torch.Generator().manual_seed(0) for _ in style],
        ).images
        rows.append(drawn.cpu().float())
    save_sheet(torch.cat(rows), path, columns=4)


def main(arguments: list[str] | None = None) -> None:
    options = parse(StyleOptions, "style", __doc__, arguments)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(options.pipeline, torch_dtype=torch.float32)
    pipe.to(device)
    trainee = StyleTraining(
        pipe,
        options.start_from,
        tuned=tuple(options.tune),
        kl_weight=options.kl_weight,
        code_size=options.code_size,
        token_count=options.tokens,
    )
    progress = loop.train(
        trainee,
        options,
        batches=lambda start, reader, readers: StyledPairs(
            pipe.vae, options, reader, readers
        ).batches(start),
        sample=lambda path: sample_sheet(trainee, path),
    )
    pipe.to("cpu")
    before = UNet2DConditionModel.from_pretrained(
        options.pipeline / "unet", torch_dtype=torch.float32
    )
    scores = evaluate(trainee, before)
    trainee.unet.set_attn_processor(AttnProcessor2_0())
    with export.exported(
        options,
        progress,
        scores,
        title="storybook: style from a reference picture",
        what=__doc__,
        data=f"storybook scenes in the styles {', '.join(STYLES)}, seed {options.seed}",
    ) as folder:
        trainee.conditioning().save_pretrained(folder)


if __name__ == "__main__":
    command(main)
