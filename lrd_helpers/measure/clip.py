"""Words against picture: CLIP models, and what they say of a picture and its caption."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lrd_helpers.measure.resize import resized
from lrd_helpers.models import load_clip
from lrd_helpers.pictures import Picture, picture_of, pixels_of


@runtime_checkable
class Clip(Protocol):
    """Puts pictures and words into one space, as vectors of length 1."""

    def encode_images(self, images: Sequence[Picture]) -> Float[Tensor, "images channels"]: ...

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts channels"]: ...


class PretrainedClip:
    """Compares pictures with texts by any CLIP model.

    Args:
        model: a `CLIPModel` of transformers.
        processor: its `CLIPProcessor`.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.tokenizer = model.eval(), processor.tokenizer
        self._image_processor = processor.image_processor

    @torch.no_grad()
    def encode_images(self, images: Sequence[Picture]) -> Float[Tensor, "images channels"]:
        """Pictures of any size → vectors of length 1."""
        like = next(self.model.parameters())
        pixels = self._pixel_values(images).to(like.device, like.dtype)
        # Not get_image_features: what it returns differs between versions of transformers.
        vectors = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
        return functional.normalize(vectors.float().cpu(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts channels"]:
        """Texts → vectors of length 1; what exceeds the model's number of tokens is cut off."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask)
        vectors = self.model.text_projection(output.pooler_output)
        return functional.normalize(vectors.float().cpu(), dim=-1)

    def _pixel_values(self, images: Sequence[Picture]) -> Float[Tensor, "images 3 side side"]:
        pictures = [picture_of(image) for image in images]
        return self._image_processor(pictures, return_tensors="pt")["pixel_values"]


class StorybookClip(PretrainedClip):
    """Compares storybook pictures with captions by the shipped CLIP model.

    Args:
        model: a `CLIPModel` that takes pixels in [-1, 1]; default: the shipped model.
        tokenizer: its `CLIPTokenizer`; to be given exactly when `model` is.
    """

    def __init__(self, model: nn.Module | None = None, tokenizer: object | None = None) -> None:
        if (model is None) != (tokenizer is None):
            raise ValueError("give both a model and its tokenizer, or neither")
        if model is None:
            model, tokenizer = load_clip()
        self.model, self.tokenizer = model.eval(), tokenizer

    def _pixel_values(self, images: Sequence[Picture]) -> Float[Tensor, "images 3 side side"]:
        # Without a detour through bytes: what the autoencoder gives is what is looked at.
        side = self.model.config.vision_config.image_size
        pixels = torch.cat([resized(pixels_of(image)[None], side, side) for image in images])
        return (pixels - 0.5) / 0.5


def clip_score(clip: Clip, image: Picture, text: str) -> float:
    """100 · cos(image, text), in [−100, 100] (CLIPScore, Hessel et al. 2021, without its 2.5)."""
    return 100 * text_image_similarity(clip, [image], [text])


def text_image_similarity(clip: Clip, images: Sequence[Picture], texts: Sequence[str]) -> float:
    """T2I-Sim: the mean of cos(image, its text) over pictures, in [−1, 1] (as BoxDiff reports it).

    Raises:
        ValueError: no pictures, or another number of texts.
    """
    if not images or len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures and {len(texts)} texts cannot be compared")
    return float((clip.encode_images(images) * clip.encode_texts(texts)).sum(1).mean())
