"""Our best method, which is no LRDiff: sketch each layer alone, put the objects into a collage.

The collage is noised and denoised with the caption, as in SDEdit (Meng et al. 2022) and Collage
Diffusion (Sarukkai et al. 2023). Here the model itself makes the parts: in a few quick steps each
layer is drawn alone, to the end; its object is found in that picture, and stretched into its box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from lrd_helpers.layout import Layer
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
    images = placed(run, sketches, relevance, regions, choices)
    clean = run.model.encode(2 * images - 1)
    noise = run.noise(clean.shape) if begin < len(run.steps) else None  # nothing is left to do
    x = run.steps.begin_at(begin, clean, noise)
    t = run.steps.timesteps[begin - 1]
    state = State(begin - 1, t, x, regions, sketch=True, xi=plan.xi, collage=clean)
    yield state
    yield from general_denoising(run, state.x, start=begin)


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
        scores = sketch_run.scores(seen, t, regions)
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
) -> Float[Tensor, "pictures 3 height_ width_"]:
    """Each canvas, or background, in [0, 1], with the layers' objects in their places."""
    decoded = (run.model.decode(sketches) / 2 + 0.5).clamp(0, 1)
    size = decoded.shape[-2:]
    entries = regions.entries
    backgrounds = {e.picture: decoded[n] for n, e in enumerate(entries) if not e.layer}
    empty = dict(backgrounds) if run.canvas is None else dict(enumerate(run.canvas.to(decoded)))
    images = dict(empty)
    for row in _back_to_front(run, regions, choices, size):
        picture, layer = entries[row].picture, _layer(run, regions, row)
        if layer.bounding_box == FULL:  # what fills the canvas is in its place
            mask = torch.ones(size, dtype=torch.bool, device=decoded.device)
        else:
            mask = object_pixels(decoded[row], backgrounds[picture], relevance[row])
        where = mask, layer.bounding_box, layer.cells(*size).to(decoded.device)
        if choices.overlap in ("mean", "weighted"):
            share = run.layouts[picture].masks(*size, overlap=choices.overlap)
            alone = pasted(empty[picture], decoded[row], *where)
            part = share[entries[row].layer].to(alone) * (alone - empty[picture])
            images[picture] = images[picture] + part
        else:
            images[picture] = pasted(images[picture], decoded[row], *where, layer.opacity)
    return torch.stack([images[number] for number in range(regions.pictures)])


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
