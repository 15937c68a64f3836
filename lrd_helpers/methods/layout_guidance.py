"""Layout-guidance (Chen, Laina, Vedaldi 2023): x_t moves so that words attend to their boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lrd_helpers.attention import AttentionMaps
from lrd_helpers.methods.plain import CaptionMethod, caption_step, check_options, words_of_layers
from lrd_helpers.methods.regions import captions
from lrd_helpers.sampling.run import Run, State
from lrd_helpers.sampling.steps import noise_level


@dataclass(frozen=True)
class LayoutGuidance(CaptionMethod):
    """Backward guidance: x_t moves so that words attend to their boxes (Chen et al. 2023, 3.3).

        E(A, B, i) = (1 − Σ_{u ∈ B} A_ui / Σ_u A_ui)²
        x̂_t ← x̂_t − η σ_t² ∇ mean E,       x̂_t = x_0 + σ_t ε

    for each word i of each layer, each head, and the maps of the U-Net's middle and of its first
    block up with cross-attention. The U-Net looks at x_t = x̂_t / √(1 + σ_t²), for which the same
    step is x_t ← x_t − η σ_t² / (1 + σ_t²) ∇ mean E. Maps are their code's: of each word apart.

    Attributes:
        strength: η (30 in their code).
        steps: the share of the steps, in [0, 1], that are guided (10 of 51).
        repeats: how often x_t moves in each of them, at most.
        threshold: guidance ends for good where the mean energy is not above it.
    """

    strength: float = 30.0
    steps: float = 0.2
    repeats: int = 5
    threshold: float = 0.2

    def __post_init__(self) -> None:
        check_options(self, shares=("steps",))

    def sample(self, run: Run) -> Iterator[State]:
        words = words_of_layers(run)
        regions = captions(run)
        blocks = middle_and_first_up(run.model.pipe.unet)
        watched = {
            "words": [word for spoken in words for word in spoken.phrase],
            "layers": lambda name: name.startswith(blocks),
            "heads": True,
        }

        def mean_energy(attention: AttentionMaps) -> Float[Tensor, ""]:
            energies = []
            for spoken, layer in zip(words, run.layout.layers, strict=True):
                maps = [m for word in spoken.phrase for m in attention.detailed(*word).values()]
                parts = [attention_energy(m[0, 0], layer.cells(*m.shape[-2:])) for m in maps]
                energies.append(torch.stack(parts).mean())
            return torch.stack(energies).mean()

        x, energy, last = run.x_T, math.inf, round(self.steps * len(run.steps))
        for i, t in run.steps.until(len(run.steps)):
            variance = noise_level(run.steps.scheduler, t) ** 2
            rate = self.strength * variance / (1 + variance)
            for _ in range(self.repeats if i < last else 0):
                if energy <= self.threshold:
                    break
                energy, x = run.descended(x, t, mean_energy, rate, **watched)
            state = caption_step(run, regions, i, t, x)
            yield state
            x = state.x


def attention_energy(
    maps: Float[Tensor, "heads height width"], inside: Bool[Tensor, "height width"]
) -> Float[Tensor, ""]:
    """E = (1 − Σ_{u ∈ B} A_u / Σ_u A_u)², the mean over heads, in [0, 1] (Chen et al. 2023).

    A head that looks at the word nowhere counts as 1, without a gradient: with a sum near the
    smallest number there is, the gradient of the quotient would not be finite.
    """
    whole = maps.sum(dim=(1, 2)).clamp(min=torch.finfo(maps.dtype).tiny ** 0.5)
    share = (maps * inside.to(maps)).sum(dim=(1, 2)) / whole
    return (1 - share).square().mean()


def middle_and_first_up(unet: torch.nn.Module) -> tuple[str, ...]:
    """How the names of the layers begin whose maps layout-guidance looks at."""
    ups = [n for n, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")]
    return ("mid_block.", *(f"up_blocks.{number}." for number in ups[:1]))
