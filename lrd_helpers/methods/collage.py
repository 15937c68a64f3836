"""Our best method, which is no LRDiff: sketch each layer alone, put the objects into a collage.

The collage is noised and denoised with the caption, as in SDEdit (Meng et al. 2022) and Collage
Diffusion (Sarukkai et al. 2023). Here the model itself makes the parts: in a few quick steps each
layer is drawn alone, to the end; its object is found in that picture, and stretched into its box.

A layer with an opacity is pasted by it, and its object is kept as pasted, with what shines through
it: at each of the last steps its cells are put back to the collage, as in blended latent diffusion
(Avrahami et al. 2023). So nothing improves it. Finished like the rest it is not translucent: the
model has seen no such thing and makes an opaque object of it, or none. Of the way from the picture
without the object to the opaque one, colours go so far (six layouts, 25 steps, least to most):

| opacity | kept | finished |
|---|---|---|
| .25 | .09 to .23 | .03 to .22 |
| .50 | .39 to .57 | .16 to .95 |
| .75 | .69 to .83 | .81 to .99 |

The caption still names an object that is hardly seen, and the last steps may draw it elsewhere.

A sketch does not depend on the boxes (without ξ). So a run with a `memory` draws no sketch anew
when a box is dragged, and a single layer's when its prompt changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from lrd_helpers.layout import Layer
from lrd_helpers.mask import Box
from lrd_helpers.methods.choices import Choices
from lrd_helpers.methods.guidance import painted, prepared
from lrd_helpers.methods.placement import object_pixels, pasted
from lrd_helpers.methods.plain import general_denoising
from lrd_helpers.methods.regions import FULL, Plan
from lrd_helpers.sampling.regions import Regions
from lrd_helpers.sampling.run import Rows, Run, State

RELEVANCE_NOISE = 0.4
"""Where, as a share of the training timesteps, the relevance of a layer's prompt is asked for."""

RELEVANCE_SAMPLES = 2
"""How many noises that is the mean of."""


def collage_of_sketches(run: Run, choices: Choices) -> Iterator[State]:
    """Sketch each layer, find its object, paste it into its box, noise it all, and finish."""
    plan = prepared(run, choices)
    begin, regions = plan.layered, plan.regions[0]
    sketch_run = replace(run, steps=run.steps.sketching(choices.sketch_steps))
    x = painted(run, plan) if choices.guide != "steps" else run.x_T[regions.picture]
    sketches = yield from sketched(run, sketch_run, plan, x)
    relevance = relevance_of_prompts(sketch_run, sketches, regions)
    images, glass = placed(run, sketches, relevance, regions, choices)
    clean = run.model.encode(2 * images - 1)
    noise = run.noise(clean.shape) if begin < len(run.steps) else None  # nothing is left to do
    x = run.steps.begin_at(begin, clean, noise)
    t = run.steps.timesteps[begin - 1]
    state = State(begin - 1, t, x, regions, sketch=True, xi=plan.xi, collage=clean)
    yield state
    kept = functional.adaptive_max_pool2d(glass, run.size) > 0.5
    finishing = general_denoising(run, state.x, start=begin)
    for state in finishing:
        if kept.any():
            state.x = torch.where(kept, run.steps.noised(clean, noise, state.i + 1), state.x)
        yield state


def sketched(run: Run, sketch_run: Run, plan: Plan, x: Rows) -> Iterator[State]:
    """Each layer and the background drawn alone, to the end, in a few steps of DDIM.

    Args:
        run: the drawing, whose first noise is `x`.
        sketch_run: the same with quick steps.
        plan: what the regions are asked.
        x: x_T, a row a region.

    Returns:
        The clean latents, a row a region.
    """
    regions = plan.regions[0]
    steps = sketch_run.steps
    x = run.steps.model_input(x, run.steps.timesteps[0]) / steps.unit(steps.timesteps[0])
    for i, t in steps.until(len(steps)):
        seen = sketch_run.seen(x, t)
        scores = sketch_run.scores(seen, t, regions, run.memory)
        x = steps.step(scores, t, x)
        state = State(i, t, x, regions, seen, scores, alone=True, sketch=True, xi=plan.xi)
        yield state
        x = state.x
    return x


def relevance_of_prompts(
    run: Run, sketches: Rows, regions: Regions
) -> Float[Tensor, "rows height width"]:
    """How much the answer to a noised sketch depends on the layer's prompt, cell by cell.

    R = mean over noises of ‖s(x_t, layer) − s(x_t, background)‖   (DiffEdit, section 3.2)
    """
    entries = regions.entries
    backgrounds = {entry.picture: n for n, entry in enumerate(entries) if not entry.layer}
    rows = [n for n, entry in enumerate(entries) if entry.layer]
    relevance = torch.zeros_like(sketches[:, 0], dtype=torch.float32)
    if not rows:
        return relevance
    asked = [*rows, *(backgrounds[entries[n].picture] for n in rows)]
    t = run.steps.timestep_at(RELEVANCE_NOISE)
    alpha, level = run.steps.coefficients(t)[0], run.steps.level(t)
    for _ in range(RELEVANCE_SAMPLES):
        noise = run.noise((regions.pictures, *sketches.shape[1:]))
        x = alpha * (sketches + level * noise[regions.picture])[rows]
        answers = run.model(
            torch.cat([x, x]),
            t,
            [entries[n].prompt for n in asked],
            [entries[n].picture for n in asked],
            [True] * len(asked),
            watched=False,  # it is no step of the picture
            memory=run.memory,
        )
        with_layer, without = answers.chunk(2)
        difference = (with_layer - without).float().square().sum(1).sqrt()
        relevance[rows] += difference / RELEVANCE_SAMPLES
    return relevance


def placed(
    run: Run,
    sketches: Rows,
    relevance: Float[Tensor, "rows height width"],
    regions: Regions,
    choices: Choices,
) -> tuple[Float[Tensor, "pictures 3 height_ width_"], Float[Tensor, "pictures 1 height_ width_"]]:
    """Each canvas, or background, in [0, 1], with the layers' objects in their places.

    And 1 where the frontmost object is translucent, else 0.
    """
    decoded = run.model.decode(sketches, memory=run.memory)
    decoded = (decoded / 2 + 0.5).clamp(0, 1)
    size = decoded.shape[-2:]
    entries = regions.entries
    backgrounds = {e.picture: decoded[n] for n, e in enumerate(entries) if not e.layer}
    empty = dict(backgrounds) if run.canvas is None else dict(enumerate(run.canvas.to(decoded)))
    images, glass = dict(empty), {n: torch.zeros_like(each[:1]) for n, each in empty.items()}
    for row in _back_to_front(run, regions, choices, size):
        picture, layer = entries[row].picture, _layer(run, regions, row)
        where = _from_and_to(layer, decoded[row], backgrounds[picture], relevance[row])
        is_glass = torch.full_like(glass[picture], layer.opacity < 1)
        glass[picture] = pasted(glass[picture], is_glass, *where)
        if choices.overlap in ("mean", "weighted"):
            share = run.layouts[picture].masks(*size, overlap=choices.overlap)
            alone = pasted(empty[picture], decoded[row], *where)
            part = share[entries[row].layer].to(alone) * (alone - empty[picture])
            images[picture] = images[picture] + part
        else:
            images[picture] = pasted(images[picture], decoded[row], *where, layer.opacity)
    pictures = range(regions.pictures)
    return torch.stack([images[n] for n in pictures]), torch.stack([glass[n] for n in pictures])


def _from_and_to(
    layer: Layer,
    picture: Float[Tensor, "3 height width"],
    background: Float[Tensor, "3 height width"],
    relevance: Float[Tensor, "cell_rows cell_columns"],
) -> tuple[Bool[Tensor, "height width"], Box, Bool[Tensor, "height width"]]:
    """Where a layer's object is in its picture, and the box and cells that it belongs into."""
    if layer.bounding_box == FULL:  # what fills the canvas is in its place
        mask = torch.ones_like(picture[0], dtype=torch.bool)
    else:
        mask = object_pixels(picture, background, relevance)
    return mask, layer.bounding_box, layer.cells(*mask.shape).to(mask.device)


def _back_to_front(run: Run, regions: Regions, choices: Choices, size: Sequence[int]) -> list[int]:
    """The rows that are layers, in the order in which they are pasted."""
    rows = [n for n, entry in enumerate(regions.entries) if entry.layer]
    if choices.overlap != "small_over_large":
        return rows
    areas = {n: float(_layer(run, regions, n).cells(*size).float().mean()) for n in rows}
    return sorted(rows, key=areas.__getitem__, reverse=True)


def _layer(run: Run, regions: Regions, row: int) -> Layer:
    entry = regions.entries[row]
    return run.layouts[entry.picture].layers[entry.layer - 1]
