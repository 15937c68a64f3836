"""A model behind one protocol: what Stable Diffusion's versions do differently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from lrd_helpers.attention import AttentionMaps, capture_attention
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.sampling.steps import Generators
from lrd_helpers.words import PromptTokens, WordError

with quiet_libraries():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
        retrieve_latents,
    )

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline

Latents = Float[Tensor, "rows channels height width"]
Images = Float[Tensor, "pictures 3 height_ width_"]

CELLS_AT_ONCE = 2**16
"""So many latent cells go through the U-Net at once where no `chunk_size` is given: 256 rows of
128 × 128 pixels, or 16 of 512 × 512. More take memory, and hardly any time less."""


class Model(Protocol):
    """What a method may ask of a model."""

    def __call__(
        self,
        x: Latents,
        t: Tensor,
        texts: Sequence[str],
        pictures: Sequence[int],
        conditional: Sequence[bool],
        *,
        watched: bool = True,
    ) -> Latents: ...

    def encode(self, images: Images) -> Latents: ...

    def decode(self, latents: Latents) -> Images: ...


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: one text encoder, embeddings "tokens features".

    Each text is encoded once, and alone: a picture must not depend on what else is in the batch.

    Args:
        pipe: a pipeline of Stable Diffusion; it holds the models.
        like: latents, for their device and precision.
        prompt_embeds: texts that need not be encoded, with their embeddings.
        image_embeds: of an IP-Adapter, for each adapter [unconditional, conditional] of one
            picture.
        chunk_size: so many rows go through the U-Net at once, and pictures through the autoencoder;
            None: rows of `CELLS_AT_ONCE` cells, and `at_once` pictures.
        at_once: pictures that the autoencoder takes at once.
        guidance_scale: for models into which guidance is distilled.
        cross_attention_kwargs: for the attention processors, such as LoRA's {"scale": 0.5}.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        like: Tensor,
        *,
        prompt_embeds: Mapping[str, Float[Tensor, "tokens features"]] | None = None,
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
        self.given = dict(prompt_embeds or {})
        self._embeddings = {text: given.to(like) for text, given in self.given.items()}

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
            self.embedding(text)

    def embedding(self, text: str) -> Float[Tensor, "tokens features"]:
        """What the U-Net reads of a text."""
        if text not in self._embeddings:
            scale = (self.cross_attention_kwargs or {}).get("scale")
            embedding = self.pipe.encode_prompt(text, self.like.device, 1, False, lora_scale=scale)
            embedding = checked_finite(embedding[0][0], f"the embeddings of {text!r}")
            self._embeddings[text] = embedding.to(self.like)
        return self._embeddings[text]

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
    ) -> Latents:
        """The U-Net's predictions for rows of noisy latents, each with a text.

        Args:
            x: the rows, as the U-Net knows them (see `Steps.model_input`).
            t: the timestep.
            texts: of each row.
            pictures: the picture that each row is a part of.
            conditional: whether the row's text is a prompt, or stands for no prompt.
            watched: whether `capture_attention` may look at these rows.

        Raises:
            ValueError: numbers that are not finite.
        """
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

    def rows_at_once(self, x: Latents) -> int:
        """How many rows of such latents go through the U-Net at once."""
        return self.chunk_size or max(1, CELLS_AT_ONCE // (x.shape[-2] * x.shape[-1]))

    def conditions(self, texts: Sequence[str], conditional: Sequence[bool]) -> dict[str, Any]:
        """The U-Net's arguments beside the latents and the timestep."""
        conditions: dict[str, Any] = {
            "encoder_hidden_states": torch.stack([self.embedding(text) for text in texts]),
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

    def decode(self, latents: Latents, generator: Generators = None) -> Images:
        """See `decode_latents`; a list of generators has one for each picture."""
        images = []
        for first in range(0, len(latents), self.at_once):
            rows = slice(first, first + self.at_once)
            part = latents[rows].to(self.pipe.vae.dtype)
            of_rows = generator[rows] if isinstance(generator, Sequence) else generator
            images.append(decode_latents(self.pipe.vae, part, generator=of_rows))
        return torch.cat(images)


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
    latents = latents / vae.config.scaling_factor
    if shift := vae.config.get("shift_factor"):
        latents = latents + shift
    images = vae.decode(latents, return_dict=False, generator=generator)[0]
    return checked_finite(images, "the pixels from the autoencoder")


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
