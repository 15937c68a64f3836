"""MultiDiffusion (Bar-Tal et al. 2023): each region is denoised with its own prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lrd_helpers.layout import Overlap
from lrd_helpers.methods.plain import check_options
from lrd_helpers.methods.regions import (
    check_no_canvas,
    check_no_times,
    check_texts,
    every_region,
    warn_of_cost,
)
from lrd_helpers.sampling.regions import Regions, batched
from lrd_helpers.sampling.run import Method, Rows, Run, State


@dataclass(frozen=True)
class MultiDiffusion(Method):
    """Each region is denoised with its own prompt; a cell takes the mean of its regions.

        Ψ(x_t) = Σ_i M_i ⊗ Φ(x_t^i, y_i) / Σ_j M_j             (Bar-Tal et al. 2023, section 3)
        x_t^i  = M_i ⊗ x_t + (1 − M_i) ⊗ b_t                    (bootstrapping, section 4.2)

    b_t is a random flat colour, noised to t, new at each step: an object that begins in front of it
    does not grow beyond its mask. As Φ is linear in the prediction, the mean of the predictions
    gives the same Ψ, and it is right for schedulers that add noise as well.

    Attributes:
        bootstrapping: the share of the steps, in [0, 1], that have it: the first 20 % in the paper.
        background_in_prompts: the background is added to each layer's prompt: "a red car at night".
    """

    bootstrapping: float = 0.2
    background_in_prompts: bool = False

    overlap: ClassVar[Overlap] = "mean"

    def __post_init__(self) -> None:
        check_options(self, shares=("bootstrapping",))

    def check(self, run: Run) -> None:
        check_no_canvas(run, "that takes method='collage'")
        check_no_times(run, "MultiDiffusion draws every layer at every step")
        regions = self.regions(run)
        check_texts(run, [regions])
        warn_of_cost(run, regions)

    def regions(self, run: Run) -> Regions:
        """The background and every layer, with the share M_i / Σ_j M_j of each cell."""
        entries = every_region(run, self.overlap, self)
        if not entries[0].mask.any():  # layers cover the background
            entries = entries[1:]
        # Each looks at latents of its own, so none shares its unconditional row.
        return batched(entries, run.x_T, share=False)

    def sample(self, run: Run) -> Iterator[State]:
        regions, x = self.regions(run), run.x_T
        begin = round(self.bootstrapping * len(run.steps))
        colours = [flat_latents(run) for _ in range(begin)]
        for i, t in run.steps.until(len(run.steps)):
            views = x[regions.picture]
            if i < begin:
                views = bootstrapped(run, regions, views, colours, t)
            seen = run.seen(views, t)
            scores = run.scores(seen, t, regions)
            psi = regions.composed(scores)
            state = State(i, t, run.step(psi, t, x), regions, seen, scores)
            yield state
            x = state.x


def flat_latents(run: Run) -> Float[Tensor, "1 channels height width"]:
    """The latents of a picture of one random colour."""
    factor = run.model.pipe.vae_scale_factor
    size = [side * factor for side in run.size]
    pixels = (2 * run.uniform(1, 3, 1, 1) - 1).expand(-1, -1, *size)
    return run.model.encode(pixels, sample=True, generator=run.generator)


def bootstrapped(
    run: Run, regions: Regions, views: Rows, colours: Sequence[Tensor], t: Tensor
) -> Rows:
    """x_t^i = M_i ⊗ x_t + (1 − M_i) ⊗ b_t, b_t one of the flat colours, noised to t (4.2)."""
    whole = torch.ones(run.size)
    masks = [
        run.layout.layers[entry.layer - 1].cells(*run.size).to(whole) if entry.layer else whole
        for entry in regions.entries
    ]
    masks = torch.stack(masks).to(views)[:, None]
    chosen = (run.uniform(len(masks)) * len(colours)).long()
    flat = torch.cat([colours[number] for number in chosen])
    scheduler = run.steps.scheduler
    noise = (run.x_T / scheduler.init_noise_sigma).expand_as(flat)
    return masks * views + (1 - masks) * scheduler.add_noise(flat, noise, t.expand(len(flat)))
