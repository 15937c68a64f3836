"""Paint-with-words (eDiff-I, Balaji et al. 2022): more attention to a layer's words where it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lrd_helpers.attention import control_words
from lrd_helpers.methods.plain import (
    CaptionMethod,
    check_options,
    general_denoising,
    words_of_layers,
)
from lrd_helpers.sampling.run import Run, State
from lrd_helpers.sampling.steps import noise_level


@dataclass(frozen=True)
class PaintWithWords(CaptionMethod):
    """Forward guidance: where a layer is, its words get more attention (eDiff-I, section 4.3).

        softmax((QKᵀ + w A) / √d) V,    w = w′ · log(1 + σ) · max(QKᵀ)

    A is 1 where a token belongs to a layer that is visible there, and σ is the noise level.

    Attributes:
        strength: w′. The paper leaves it to the user.
    """

    strength: float = 0.4

    def __post_init__(self) -> None:
        check_options(self)

    def sample(self, run: Run) -> Iterator[State]:
        words = words_of_layers(run)
        masks, tokens = run.layout.masks(*run.size)[1:], run.model.tokens(run.layout.caption)
        places = [
            ([token for word in spoken.phrase for token in tokens.positions(*word)], mask)
            for spoken, mask in zip(words, masks, strict=True)
        ]

        def control(logits: Tensor, name: str, t: Tensor) -> Tensor | None:
            weight = self.strength * math.log1p(noise_level(run.steps.scheduler, t))
            return painted(logits, places, weight) if weight else None

        caption = run.layout.caption
        with run.model.watched(caption, words=words[0].thing, control=control):
            yield from general_denoising(run, run.x_T)


def painted(
    logits: Float[Tensor, "rows heads height width tokens"],
    places: Sequence[tuple[Sequence[int], Float[Tensor, "_ _"]]],
    weight: float,
) -> Float[Tensor, "rows heads height width tokens"]:
    """(QKᵀ + `weight` · max(QKᵀ) · A) / √d from QKᵀ/√d, the maximum being that of each picture.

    Args:
        logits: QKᵀ/√d of one layer of the U-Net.
        places: the tokens of each word or phrase, and its mask (of any size).
        weight: w′ · log(1 + σ).
    """
    largest = logits.amax(dim=(1, 2, 3, 4), keepdim=True)
    for tokens, mask in places:
        logits = control_words(logits, tokens, mask, add=weight * largest)
    return logits
