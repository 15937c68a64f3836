"""A model behind one protocol: what Stable Diffusion's versions do differently."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lrd_helpers.attention import (
    AttentionMaps,
    Compose,
    capture_attention,
    composed_attention,
)
from lrd_helpers.messages import excerpt
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.sampling.memory import Memory, digest
from lrd_helpers.sampling.steps import Generators
from lrd_helpers.words import PromptTokens, WordError

with quiet_libraries():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
        retrieve_latents,
    )

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline

Latents = Float[Tensor, "rows channels height width"]
Images = Float[Tensor, "pictures 3 height_ width_"]
Embedding = tuple[Tensor, ...]
"""Of a text: what cross-attention reads ("tokens features"), and XL's pooled text ("pooled")."""

CELLS_AT_ONCE = 2**16
"""So many latent cells go through the U-Net at once where no `chunk_size` is given: 256 rows of
128 × 128 pixels, or 16 of 512 × 512. More take memory, and hardly any time less."""


class Model(ABC):
    """What a method may ask of a model, and all that Stable Diffusion's versions share.

    Each text is encoded once, and alone: a picture must not depend on what else is in the batch.

    Args:
        pipe: a pipeline of Stable Diffusion; it holds the models.
        like: latents, for their size, device and precision.
        prompt_embeds: texts that need not be encoded, with their embeddings (see `shapes`).
        image_embeds: of an IP-Adapter, for each adapter [unconditional, conditional] of one
            picture.
        chunk_size: so many rows go through the U-Net at once, and pictures through the autoencoder;
            None: rows of `CELLS_AT_ONCE` cells, and `at_once` pictures.
        at_once: pictures that the autoencoder takes at once.
        guidance_scale: for models into which guidance is distilled.
        cross_attention_kwargs: for the attention processors, such as LoRA's {"scale": 0.5}.

    Raises:
        ValueError: embeddings of another kind or size.
    """

    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    """The parts of the pipeline that a text is encoded with."""

    def __init__(
        self,
        pipe: StableDiffusionPipeline | StableDiffusionXLPipeline,
        like: Tensor,
        *,
        prompt_embeds: Any = None,
        image_embeds: Sequence[Tensor] | None = None,
        chunk_size: int | None = None,
        at_once: int = 1,
        guidance_scale: float = 5.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.pipe, self.like, self.chunk_size = pipe, like[:0], chunk_size
        self.guidance_scale, self.cross_attention_kwargs = guidance_scale, cross_attention_kwargs
        self.image_embeds = image_embeds
        self.at_once = min(chunk_size or at_once, at_once)
        self.given = self._checked({} if prompt_embeds is None else prompt_embeds)
        self._embeddings = {
            text: tuple(part.to(like) for part in parts) for text, parts in self.given.items()
        }

    # -------------------------------------------------------------- what the versions differ in

    @property
    def shapes(self) -> Sequence[tuple[int | str, ...]]:
        """Of each part of a text's embedding; a name stands for any size."""
        features = self.pipe.unet.config.cross_attention_dim
        return [("tokens", features if isinstance(features, int) else "features")]

    @abstractmethod
    def _encoded(self, text: str) -> Embedding:
        """A text's embedding from the text encoders."""

    @abstractmethod
    def tensors(self, prompts: Sequence[str], negatives: Sequence[str]) -> dict[str, Tensor]:
        """What a callback may look at beside the latents, by diffusers' names, a row a text."""

    def is_zero(self, text: str) -> bool:
        """Whether zeros stand for this negative prompt, and not its embedding."""
        return False

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While pictures are drawn; after it, come what may, nothing stays behind."""
        try:
            yield
        finally:
            if hasattr(self.pipe, "prompts_of_rows"):
                self.pipe.prompts_of_rows = self.pipe.pictures_of_rows = None
            self.pipe.maybe_free_model_hooks()

    # -------------------------------------------------------------- texts

    def encode_texts(self, texts: Iterable[str]) -> None:
        """All at once, so that an offloaded text encoder is fetched once and not between steps."""
        for text in texts:
            if not self.is_zero(text):
                self.embedding(text)

    def embedding(self, text: str, conditional: bool = True) -> Embedding:
        """What the U-Net reads of a text, as a prompt or as a negative prompt."""
        if not conditional and self.is_zero(text):
            like = self.embedding(next(iter(self._embeddings), ""))
            return tuple(map(torch.zeros_like, like))
        if text not in self._embeddings:
            parts = [
                checked_finite(part, f"the embeddings of {text!r}") for part in self._encoded(text)
            ]
            self._embeddings[text] = tuple(part.to(self.like) for part in parts)
        return self._embeddings[text]

    @property
    def _lora(self) -> dict[str, float | None]:
        """How strong a LoRA of the text encoders is."""
        return {"lora_scale": (self.cross_attention_kwargs or {}).get("scale")}

    def stacked(self, texts: Sequence[str], conditional: Sequence[bool], part: int = 0) -> Tensor:
        """One part of the texts' embeddings, a row a text."""
        rows = zip(texts, conditional, strict=True)
        return torch.stack([self.embedding(text, asked)[part] for text, asked in rows])

    def _checked(self, given: Any) -> dict[str, Embedding]:
        """The parts of embeddings that were given; refuse those of another kind or size."""
        shapes = " and ".join(f"({', '.join(map(str, shape))})" for shape in self.shapes)
        if not isinstance(given, Mapping):
            raise ValueError(
                f"prompt_embeds is a {type(given).__name__}, but should say whose embedding it "
                f'is: {{"a red car": embedding, …}}, each of shape {shapes}'
            )
        checked = {}
        for text, embedding in given.items():
            parts = tuple(embedding) if isinstance(embedding, (tuple, list)) else (embedding,)
            sizes = [tuple(getattr(part, "shape", ())) for part in parts]
            if not (len(sizes) == len(self.shapes) and all(map(_fits, sizes, self.shapes))):
                has = " and ".join(map(str, sizes))
                raise ValueError(
                    f"prompt_embeds[{excerpt(text)}] has shape {has}, but should be {shapes}"
                )
            checked[text] = parts
        return checked

    def tokens(self, prompt: str) -> PromptTokens:
        """Which tokens of a prompt are which of its words.

        Raises:
            WordError: there is no tokenizer to say so.
        """
        tokenizer = self.pipe.tokenizer
        if tokenizer is None:
            raise WordError("the pipeline has no tokenizer, so no word of a prompt can be found")
        # Textual inversion spells one learnt word as several.
        return PromptTokens.encode(tokenizer, self.pipe.maybe_convert_prompt(prompt, tokenizer))

    def watched(self, prompt: str, **options: Any) -> AbstractContextManager[AttentionMaps]:
        """`capture_attention` of all rows that ask for a prompt."""
        return capture_attention(self.pipe, prompt, **options)

    def watched_rows(
        self, prompts: Sequence[str], **options: Any
    ) -> AbstractContextManager[AttentionMaps]:
        """`capture_attention` of calls that have one row for each of the prompts."""
        tokenizer = self.pipe.tokenizer
        spelled = [self.pipe.maybe_convert_prompt(prompt, tokenizer) for prompt in prompts]
        return capture_attention(
            self.pipe.unet, spelled, tokenizer=tokenizer, guided=False, **options
        )

    def composed(
        self, prompt: str, texts: Sequence[str], compose: Compose, **options: Any
    ) -> AbstractContextManager[None]:
        """`composed_attention` of all rows that ask for a prompt."""
        read = self.stacked(texts, [True] * len(texts))
        return composed_attention(self.pipe, prompt, read, compose, **options)

    # -------------------------------------------------------------- the U-Net

    def __call__(
        self,
        x: Latents,
        t: Tensor,
        texts: Sequence[str],
        pictures: Sequence[int],
        conditional: Sequence[bool],
        *,
        watched: bool = True,
        memory: Memory | None = None,
    ) -> Latents:
        """The U-Net's predictions for rows of noisy latents, each with a text.

        Args:
            x: the rows, as the U-Net knows them (see `Steps.model_input`).
            t: the timestep.
            texts: of each row.
            pictures: the picture that each row is a part of.
            conditional: whether the row's text is a prompt, or stands for no prompt.
            watched: whether `capture_attention` may look at these rows.
            memory: has the answers that need not be asked for again. Not for calls in a block of
                `composed` or `watched`, whose answers depend on more.

        Raises:
            ValueError: numbers that are not finite.
        """
        if memory is not None:
            return self._remembered(x, t, texts, pictures, conditional, watched, memory)
        checked_finite(x, f"the noisy latents at t = {float(t):g}")
        size = self.rows_at_once(x)
        prompts = [
            text if asked and watched else None
            for text, asked in zip(texts, conditional, strict=True)
        ]
        parts = []
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            self._announce(prompts[rows], pictures[rows])
            conditions = self.conditions(texts[rows], conditional[rows])
            parts.append(self.pipe.unet(x[rows], t, **conditions, return_dict=False)[0])
        return checked_finite(torch.cat(parts), f"the U-Net's predictions at t = {float(t):g}")

    def _remembered(
        self,
        x: Latents,
        t: Tensor,
        texts: Sequence[str],
        pictures: Sequence[int],
        conditional: Sequence[bool],
        watched: bool,
        memory: Memory,
    ) -> Latents:
        """`__call__` for the rows whose answers the memory does not have."""

        def key(row: int) -> bytes | None:
            if watched and conditional[row] and texts[row] in memory.watched:
                return None
            given = self.conditions([texts[row]], [conditional[row]])
            return digest("unet", x[row], float(t), given)

        def ask(rows: list[int]) -> Latents:
            parts = ([part[row] for row in rows] for part in (texts, pictures, conditional))
            return self(x[rows], t, *parts, watched=watched)

        return memory.answers([*map(key, range(len(x)))], ask)

    def rows_at_once(self, x: Latents) -> int:
        """How many rows of such latents go through the U-Net at once."""
        most = getattr(self.pipe, "cells_at_once", CELLS_AT_ONCE)
        return self.chunk_size or max(1, most // (x.shape[-2] * x.shape[-1]))

    def conditions(self, texts: Sequence[str], conditional: Sequence[bool]) -> dict[str, Any]:
        """The U-Net's arguments beside the latents and the timestep."""
        conditions: dict[str, Any] = {
            "encoder_hidden_states": self.stacked(texts, conditional),
            "cross_attention_kwargs": self.cross_attention_kwargs,
            "timestep_cond": None,
        }
        if self.distilled:
            scale = torch.tensor([self.guidance_scale - 1])
            size = self.pipe.unet.config.time_cond_proj_dim
            embedding = self.pipe.get_guidance_scale_embedding(scale, size).to(self.like)
            conditions["timestep_cond"] = embedding.expand(len(texts), -1)
        if self.image_embeds is not None:
            rows = [int(asked) for asked in conditional]
            images = [each[[row % len(each) for row in rows]] for each in self.image_embeds]
            conditions["added_cond_kwargs"] = {"image_embeds": images}
        return conditions

    @property
    def distilled(self) -> bool:
        """Whether guidance is distilled into the U-Net, as in LCM's."""
        return self.pipe.unet.config.time_cond_proj_dim is not None

    def _announce(self, prompts: Sequence[str | None], pictures: Sequence[int]) -> None:
        """Tell `capture_attention` which rows are which."""
        if hasattr(self.pipe, "prompts_of_rows"):
            self.pipe.prompts_of_rows, self.pipe.pictures_of_rows = list(prompts), list(pictures)

    # -------------------------------------------------------------- pictures and latents

    def encode(self, images: Images, **options: Any) -> Latents:
        """See `encode_images`."""
        parts = images.to(self.pipe.vae.dtype).split(self.at_once)
        encoded = [encode_images(self.pipe.vae, part, **options) for part in parts]
        return torch.cat(encoded).to(self.like)

    def decode(
        self, latents: Latents, generator: Generators = None, *, memory: Memory | None = None
    ) -> Images:
        """See `decode_latents`; a list of generators has one for each picture.

        A memory has the pictures that need not be decoded again; not with a generator.
        """
        if memory is not None:
            keys = [digest("vae", row) for row in latents]
            return memory.answers(keys, lambda rows: self.decode(latents[rows]))
        images = []
        for first in range(0, len(latents), self.at_once):
            rows = slice(first, first + self.at_once)
            part = latents[rows].to(self.pipe.vae.dtype)
            of_rows = generator[rows] if isinstance(generator, Sequence) else generator
            images.append(decode_latents(self.pipe.vae, part, generator=of_rows))
        return torch.cat(images)


class StableDiffusion(Model):
    """Stable Diffusion 1.x and 2.x: one text encoder."""

    def _encoded(self, text: str) -> Embedding:
        embedding, _ = self.pipe.encode_prompt(text, self.like.device, 1, False, **self._lora)
        return (embedding[0],)

    def tensors(self, prompts: Sequence[str], negatives: Sequence[str]) -> dict[str, Tensor]:
        return {
            "prompt_embeds": self.stacked(prompts, [True] * len(prompts)),
            "negative_prompt_embeds": self.stacked(negatives, [False] * len(negatives)),
        }


class StableDiffusionXL(Model):
    """Stable Diffusion XL (Podell et al. 2023): two text encoders, pooled text, and sizes.

    The words of a prompt are found by the first tokenizer; both cut a text up alike. What XL can be
    told of sizes is that the picture was made at the size that is drawn, and not cropped.
    """

    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    @property
    def shapes(self) -> Sequence[tuple[int | str, ...]]:
        config = self.pipe.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return [*super().shapes, (pooled,)]

    @property
    def time_ids(self) -> Float[Tensor, "6"]:
        """Original size, corner of the crop, and target size, in pixels."""
        height, width = (side * self.pipe.vae_scale_factor for side in self.like.shape[-2:])
        return self.like.new_tensor([height, width, 0, 0, height, width])

    def is_zero(self, text: str) -> bool:
        zeros = self.pipe.config.force_zeros_for_empty_prompt
        return zeros and text == "" and text not in self.given

    def _encoded(self, text: str) -> Embedding:
        embedding, _, pooled, _ = self.pipe.encode_prompt(
            text, None, self.like.device, 1, False, **self._lora
        )
        return embedding[0], pooled[0]

    def conditions(self, texts: Sequence[str], conditional: Sequence[bool]) -> dict[str, Any]:
        conditions = super().conditions(texts, conditional)
        conditions.setdefault("added_cond_kwargs", {}).update(
            text_embeds=self.stacked(texts, conditional, part=1),
            time_ids=self.time_ids.expand(len(texts), -1),
        )
        return conditions

    def tensors(self, prompts: Sequence[str], negatives: Sequence[str]) -> dict[str, Tensor]:
        yes = [True] * len(prompts)
        return {
            "prompt_embeds": self.stacked(prompts, yes),
            "add_text_embeds": self.stacked(prompts, yes, part=1),
            "add_time_ids": self.time_ids.expand(len(prompts), -1),
        }

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """As for every model; and an autoencoder that overflows in half precision is in single."""
        vae = self.pipe.vae
        upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast")
        if upcast:
            vae.to(torch.float32)
        try:
            with super().drawing():
                yield
        finally:
            if upcast:
                vae.to(torch.float16)


def model_of(
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline,
    size: tuple[int, int],
    **options: Any,
) -> Model:
    """The model of a pipeline, for pictures of height × width pixels.

    Args:
        pipe: any pipeline of Stable Diffusion 1.x, 2.x or XL.
        size: height and width in pixels.
        options: of `Model`.

    Raises:
        ValueError: see `check_kind` and `Model`.
    """
    check_kind(pipe)
    cells = (side // pipe.vae_scale_factor for side in size)
    like = torch.empty(
        (0, pipe.unet.config.in_channels, *cells),
        device=pipe._execution_device,
        dtype=pipe.unet.dtype,
    )
    kind = StableDiffusionXL if hasattr(pipe, "text_encoder_2") else StableDiffusion
    return kind(pipe, like, **options)


def check_kind(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline) -> None:
    """Refuse what is not Stable Diffusion 1.x, 2.x or XL.

    Raises:
        ValueError: an inpainting U-Net, XL's refiner, a U-Net that wants other conditions, or one
            of another kind than its pipeline.
    """
    unet, config = type(pipe.unet).__name__, pipe.unet.config
    if not any(getattr(module, "is_cross_attention", False) for module in pipe.unet.modules()):
        raise ValueError(f"this {unet} has no cross-attention, so no prompt can reach it")
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"this {unet} takes {config.in_channels} channels where latents have "
            f"{config.out_channels}, as for inpainting; use the model it was made from, which "
            "draws from text alone"
        )
    extra = getattr(config, "addition_embed_type", None)
    if extra not in (None, "text_time"):
        raise ValueError(
            f"this {unet} wants more than a prompt (addition_embed_type is {extra!r}); use a "
            "Stable Diffusion 1.x, 2.x or XL model"
        )
    if hasattr(pipe, "text_encoder_2") != (extra == "text_time"):
        needed = "LayeredRenderingXLPipeline" if extra else "LayeredRenderingPipeline"
        raise ValueError(
            f"the {unet} is of another kind than its {type(pipe).__name__} (addition_embed_type is "
            f"{extra!r}); it belongs into a {needed}"
        )
    if extra and (encoder := pipe.text_encoder_2) is not None:
        sizes = config.projection_class_embeddings_input_dim - encoder.config.projection_dim
        if sizes == 5 * config.addition_time_embed_dim:  # two sizes and a score
            raise ValueError(REFINER)


REFINER = (
    "this is a refiner of Stable Diffusion XL (it asks for an aesthetics score), which only "
    "finishes pictures; use the base model, such as stabilityai/stable-diffusion-xl-base-1.0"
)


def _fits(size: Sequence[int], shape: Sequence[int | str]) -> bool:
    return len(size) == len(shape) and all(
        isinstance(want, str) or side == want for side, want in zip(size, shape, strict=True)
    )


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL,
    images: Images,
    *,
    sample: bool = False,
    generator: torch.Generator | None = None,
) -> Latents:
    """Images in [−1, 1] → latents that vary by about 1, as the U-Net knows them.

    Args:
        vae: any autoencoder of diffusers.
        images: in the autoencoder's precision.
        sample: draw from the posterior instead of taking its mean.
        generator: of that draw.

    Raises:
        ValueError: numbers that are not finite.
    """
    mode = "sample" if sample else "argmax"
    latents = retrieve_latents(vae.encode(images), generator, sample_mode=mode)
    checked_finite(latents, "the autoencoder's latents of the picture")
    if shift := vae.config.get("shift_factor"):
        latents = latents - shift
    if statistics := _statistics(vae, latents):
        mean, spread = statistics
        return (latents - mean) * vae.config.scaling_factor / spread
    return latents * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Latents, *, generator: Generators = None) -> Images:
    """Latents → images in about [−1, 1]; the inverse of `encode_images`.

    Args:
        vae: any autoencoder of diffusers.
        latents: in the autoencoder's precision.
        generator: for autoencoders whose decoder draws noise.

    Raises:
        ValueError: numbers that are not finite.
    """
    latents = checked_finite(latents, "the latents to decode")
    if statistics := _statistics(vae, latents):
        mean, spread = statistics
        latents = latents * spread / vae.config.scaling_factor + mean
    else:
        latents = latents / vae.config.scaling_factor
    if shift := vae.config.get("shift_factor"):
        latents = latents + shift
    images = vae.decode(latents, return_dict=False, generator=generator)[0]
    return checked_finite(images, "the pixels from the autoencoder")


def _statistics(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and spread of each channel's latents, where the autoencoder tells (Playground 2.5)."""
    mean, spread = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or spread is None:
        return None
    return like.new_tensor(mean)[:, None, None], like.new_tensor(spread)[:, None, None]


def checked_finite(values: Tensor, what: str) -> Tensor:
    """The same values. What is not finite must not become a picture: it would be a black one.

    Raises:
        ValueError: NaN or infinity among them.
    """
    if not values.isfinite().all():
        raise ValueError(
            f"{what} are not finite (NaN or infinite): use float32, a scheduler that the model was "
            "trained for, a smaller strength, or check the model's weights"
        )
    return values
