"""RAG (Chen et al. 2024): regions are denoised apart first, then cross-attention knows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from lrd_helpers.methods.plain import caption_step, check_options
from lrd_helpers.methods.regions import (
    captions,
    check_no_canvas,
    check_no_times,
    check_texts,
    every_region,
    warn_of_hidden_layers,
)
from lrd_helpers.sampling.regions import Region, Regions, batched
from lrd_helpers.sampling.run import Method, Run, State


@dataclass(frozen=True)
class RAG(Method):
    """Region-aware generation: hard binding, then soft refinement (Chen et al., ICCV 2025).

    Hard binding: in the first steps each layer is also denoised apart, as a picture of its
    bounding box's size with its own prompt, and then pasted into the picture:

        x_{t−1} ← M_i ⊗ x^i_{t−1} + (1 − M_i) ⊗ x_{t−1},    back to front

    Soft refinement: at every step each cross-attention's answer to the caption, R, is blended with
    its answers R_i to the regions' prompts, each where its region is:

        R ← (1 − δ) R + δ Σ_i M_i R_i

    Theirs is a script for FLUX. Its two constants are kept: 2 of 20 steps, δ = 1. What only FLUX
    has is left out: there the picture's tokens in a box are replaced in every block, too. A layer's
    x^i_T is the part of x_T in its box, so that all methods begin alike, where theirs is drawn
    anew; and the layers' prompts stand for the longer ones that a language model writes there.

    Attributes:
        binding: the share of the steps, in [0, 1], with hard binding.
        refinement: δ, in [0, 1].
    """

    binding: float = 0.1
    refinement: float = 1.0

    def __post_init__(self) -> None:
        check_options(self, shares=("binding", "refinement"))

    def check(self, run: Run) -> None:
        check_no_canvas(run, "that takes method='collage'")
        check_no_times(run, "RAG draws every layer at every step")
        check_texts(run, [captions(run), self.regions(run)])
        warn_of_hidden_layers(run, self)

    def regions(self, run: Run) -> Regions:
        """The picture, which stands for the background, and every layer in sight."""
        entries = [each for each in every_region(run) if each.mask.any() or not each.layer]
        return batched(entries, run.x_T, share=False)

    def sample(self, run: Run) -> Iterator[State]:
        caption, regions = captions(run), self.regions(run)
        bound = round(self.binding * len(run.steps))
        rows = run.x_T[regions.picture]
        for i, t in run.steps.until(bound):
            seen = run.seen(rows, t)
            with self.refined(run):
                whole = run.scores(seen[:1], t, caption)
            layers = zip(regions.entries[1:], seen[1:], strict=True)
            apart = [scored_apart(run, region, x, t, whole) for region, x in layers]
            scores = torch.cat([whole, *apart])
            x = run.step(scores, t, rows, regions)
            state = State(i, t, x, regions, seen, scores, alone=True)
            yield state
            rows = torch.cat([state.latents, state.x[1:]])  # pasted
        x = run.merged(rows, regions) if bound else run.x_T
        for i, t in run.steps.since(bound):
            with self.refined(run):
                state = caption_step(run, caption, i, t, x)
            yield state
            x = state.x

    def refined(self, run: Run) -> AbstractContextManager[None]:
        """In the block cross-attention answers R ← (1 − δ) R + δ Σ_i M_i R_i to the caption."""
        layout, delta = run.layout, self.refinement
        texts = [layout.caption, *(region.prompt for region in every_region(run))]

        @cache
        def weights(*size: int) -> Float[Tensor, "texts _ _ 1"]:
            masks = delta * layout.masks(*size)
            return torch.cat([torch.full_like(masks[:1], 1 - delta), masks])[..., None]

        def blended(
            answers: Float[Tensor, "texts height width features"],
            _: Float[Tensor, "texts height width"],
        ) -> Float[Tensor, "height width features"]:
            return (weights(*answers.shape[1:3]).to(answers) * answers).sum(dim=0)

        return run.model.composed(layout.caption, texts, blended)


def scored_apart(
    run: Run,
    region: Region,
    seen: Float[Tensor, "channels height width"],
    t: Tensor,
    whole: Float[Tensor, "1 channels height width"],
) -> Float[Tensor, "1 channels height width"]:
    """The guided prediction for a layer as a picture of its box's size; outside the box `whole`."""
    cells = run.layout.layers[region.layer - 1].cells(*run.size).nonzero()
    (top, left), (bottom, right) = cells.amin(dim=0).tolist(), (cells.amax(dim=0) + 1).tolist()
    part = seen[None, :, top:bottom, left:right]
    asked = batched([replace(region, mask=torch.ones(part.shape[-2:]))], part)
    scores = whole.clone()
    scores[..., top:bottom, left:right] = run.scores(part, t, asked)
    return scores
