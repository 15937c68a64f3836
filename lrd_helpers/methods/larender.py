"""LaRender (Zhan and Liu 2025): cross-attention renders the layers front to back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lrd_helpers.methods.guidance import tokens_of_object
from lrd_helpers.methods.plain import caption_step, check_options
from lrd_helpers.methods.regions import (
    captions,
    check_no_canvas,
    check_no_times,
    check_texts,
    every_region,
)
from lrd_helpers.naming import WordError, named_by
from lrd_helpers.sampling.regions import batched
from lrd_helpers.sampling.run import Method, Run, State


@dataclass(frozen=True)
class LaRender(Method):
    """Each cross-attention renders what it answers to the layers, front to back (ICCV 2025).

        R = (1/S) Σ_i T_i (1 − e^{−σ_i}) M_i R_i,    T_i = exp(−Σ_{j in front of i} σ_j M_j)

    R_i is the answer to layer i's prompt (the background is furthest back), M_i its box times its
    object's attention (`presences`), S the sum of what the R_i are multiplied by. The density falls
    over the N steps ("inverse_proportional" in their script): at first what is in front hides all.

        σ = −ln(1 − α) · N/(k + 1)            at step k = 0 … N − 1
        σ_i = −ln(1 − o_i (1 − e^{−σ}))       for a layer's opacity o_i (`densities`)

    The constants are those of their script, for XL; the guidance scale is the run's, not their 7.
    Theirs has an α for each object, which N/(k + 1) makes nearly opaque in the first steps; here an
    opacity of 0.3 is 0.3 in every step. They also average the attention over rows without a prompt.
    The caption is read by XL's pooled text alone, and of negative prompts only the picture's.

    Attributes:
        alpha: α: how much of what is behind it a layer hides in the last step, between 0 and 1.
    """

    alpha: float = 0.8

    translucent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 < self.alpha < 1:
            raise ValueError(
                f"alpha is {self.alpha}, but should be between 0 and 1, both excluded: 0.8 hides "
                "most of what is behind a layer"
            )

    def check(self, run: Run) -> None:
        check_no_canvas(run, "that takes method='collage'")
        check_no_times(run, "LaRender renders every layer at every step")
        check_texts(run, [captions(run), batched(every_region(run), run.x_T)])
        for number, layer in enumerate(run.layout.layers):
            tokens_of_object(run, number, layer)

    def sample(self, run: Run) -> Iterator[State]:
        layers, regions, x = run.layout.layers, captions(run), run.x_T
        texts = [region.prompt for region in every_region(run)]
        objects = [tokens_of_object(run, number, layer) for number, layer in enumerate(layers)]
        objects = [tokens_of_background(run), *objects]

        @cache
        def cells(*size: int) -> Bool[Tensor, "layers _ _"]:
            return torch.stack([layer.cells(*size) for layer in layers]).to(x.device)

        for i, t in run.steps.until(len(run.steps)):
            sigma = -math.log(1 - self.alpha) * len(run.steps) / (i + 1)
            sigmas = densities(sigma, [1.0, *(layer.opacity for layer in layers)])

            def compose(
                answers: Float[Tensor, "texts height width features"],
                attention: Float[Tensor, "texts height width"],
                sigmas: Sequence[float] = sigmas,
            ) -> Float[Tensor, "height width features"]:
                present = presences(attention, cells(*attention.shape[1:]))
                return rendered(answers, present, sigmas)

            with run.model.composed(run.layout.caption, texts, compose, columns=objects):
                state = caption_step(run, regions, i, t, x)
            yield state
            x = state.x


def densities(sigma: float, opacities: Sequence[float]) -> list[float]:
    """σ_i = −ln(1 − o_i (1 − e^{−σ})): what hides 1 − e^{−σ} of all behind it hides o_i of that."""
    return [sigma if o == 1 else -math.log1p(o * math.expm1(-sigma)) for o in opacities]


def tokens_of_background(run: Run) -> list[int]:
    """Which tokens of the background's prompt are its object; none where it names none."""
    background = run.layout.background
    if background:
        with suppress(WordError):
            return run.model.tokens(background).positions(named_by(background).word)
    return []


def presences(
    attention: Float[Tensor, "texts height width"], cells: Bool[Tensor, "layers height width"]
) -> Float[Tensor, "texts height width"]:
    """M = (A − min A) / (max A − min A), of a layer only in its cells; the background is first.

    A map that is the same everywhere says nothing: then M is 1. The background is never quite 0, so
    that it is what is seen where nothing else is; in the authors' script nothing is.
    """
    least, most = attention.amin(dim=(1, 2), keepdim=True), attention.amax(dim=(1, 2), keepdim=True)
    maps = torch.where(most > least, (attention - least) / (most - least), 1.0)
    return torch.cat([maps[:1].clamp(min=1e-6), cells * maps[1:]])


def rendered(
    answers: Float[Tensor, "texts height width features"],
    present: Float[Tensor, "texts height width"],
    densities: Sequence[float],
) -> Float[Tensor, "height width features"]:
    """R = (1/S) Σ_i T_i (1 − e^{−σ_i}) M_i R_i; the first text is furthest back."""
    sigma = present.new_tensor(densities)[:, None, None]
    depths = sigma * present
    in_front = depths.flip(0).cumsum(dim=0).flip(0) - depths
    shares = torch.exp(-in_front) * (1 - torch.exp(-sigma)) * present
    shares = shares / shares.sum(dim=0)
    return (shares[..., None].to(answers) * answers).sum(dim=0)
