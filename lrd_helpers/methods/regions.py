"""Who is asked what, where, at which step: the plan of layered rendering."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lrd_helpers.layout import Layer, Layout, Overlap
from lrd_helpers.methods.choices import Choices, Fuse
from lrd_helpers.sampling.regions import Region, Regions, batched
from lrd_helpers.sampling.run import Method, Run

FULL = (0, 0, 1, 1)  # the box of the whole canvas

REFERENCE_CELLS = 16
"""Latent cells a side of storybook's canvas: numbers of cells, and amounts of noise, were chosen
there."""

MUCH = 10
"""A layered step that takes more than so many times as long as a plain one is warned of."""

Fields = Sequence[Sequence[Tensor | None]]
"""ξ of each layer of each picture, None where it is zero."""


def times_wider(size: Sequence[int]) -> float:
    """How many times wider than storybook's a canvas of so many cells is; 1 where it is smaller.

    Stable Diffusion's of 512 pixels is 4 times as wide, XL's of 1024 pixels 8 times.
    """
    return max(1.0, math.sqrt(math.prod(size)) / REFERENCE_CELLS)


@dataclass(frozen=True)
class Phases:
    """How the steps are shared out.

    Attributes:
        fuse: as in `Choices`; "collage" is "steps" where every layer fills the canvas and hides it.
        layered: so many steps, from the first on, are layered (with a collage: left out).
        alone: in so many of them each layer runs alone.
    """

    fuse: Fuse
    layered: int
    alone: int


def phases(run: Run, choices: Choices) -> Phases:
    """How the steps of a run are shared out."""
    fuse = choices.fuse
    if fuse == "collage" and not any(
        layer.bounding_box != FULL or layer.opacity < 1
        for layout in run.layouts
        for layer in layout.layers
    ):
        fuse = "steps"  # what fills the canvas is in its place
    layered = round(choices.layered_fraction * len(run.steps))
    if fuse == "collage" and layered:
        layered = run.steps.late_start(choices.layered_fraction, times_wider(run.size))
    return Phases(fuse, layered, 0 if fuse == "steps" else layered)


# ------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Plan:
    """What the U-Net is asked, step by step.

    Attributes:
        regions: for each step; steps that ask the same have the same `Regions`.
        layered: so many steps are layered: t0 of Algorithm 1.
        end: from this step on, only the captions are asked. Later than `layered` where a layer has
            a later end of its own.
        repeats: after so many first steps a share of ξ is added again.
        xi: ξ of each layer; None where no step is layered.
    """

    regions: list[Regions]
    layered: int
    end: int
    repeats: int
    xi: Fields | None

    @property
    def texts(self) -> list[str]:
        """All texts that will be asked, each once."""
        entries = [entry for regions in dict.fromkeys(self.regions) for entry in regions.entries]
        return list(dict.fromkeys(text for e in entries for text in (e.prompt, e.negative)))


def make_plan(run: Run, choices: Choices, xi: Fields | None = None) -> Plan:
    """What the U-Net is asked at each step of a run; each batch is made once.

    Args:
        run: the layouts, their negative prompts and the steps.
        choices: see `regions_of`; `guide` says whether the regions have ξ.
        xi: ξ of each layer.
    """
    phase = phases(run, choices)
    made: dict[tuple, Regions] = {}
    steps, end = [], phase.layered
    for step in range(len(run.steps)):
        active = tuple(
            tuple(_takes_part(layer, step, phase.layered, len(run.steps)) for layer in each.layers)
            for each in run.layouts
        )
        layered = step < phase.layered
        key = layered, active
        if any(map(any, active)):
            end = max(end, step + 1)
        if key not in made:
            entries = [
                region
                for number in range(len(run.layouts))
                for region in regions_of(run, number, active[number], choices, phase.fuse, layered)
            ]
            if xi is not None and layered and choices.guide != "noise":
                entries = [
                    replace(region, field=_seen_field(run, region, choices, xi))
                    if region.layer
                    else region
                    for region in entries
                ]
            made[key] = batched(entries, run.x_T, share=not (layered and phase.alone))
        steps.append(made[key])
    repeats = choices.early_repeats if choices.guide != "steps" else 0
    return Plan(steps, phase.layered, end, min(repeats, phase.layered, len(steps) - 1), xi)


def _seen_field(run: Run, region: Region, choices: Choices, xi: Fields) -> Tensor | None:
    """What a layer sees of its ξ at each step; with guide="both" only what is outside the layer."""
    field = xi[region.picture][region.layer - 1]
    if field is None or choices.guide == "steps":
        return field
    layer = run.layouts[region.picture].layers[region.layer - 1]
    return field * ~layer.cells(*run.size).to(field.device)


def regions_of(
    run: Run, number: int, active: Sequence[bool], choices: Choices, fuse: Fuse, layered: bool
) -> list[Region]:
    """The parts of one picture in one step, without ξ: the background and every layer in sight.

    Args:
        run: the layouts and their negative prompts.
        number: of the picture.
        active: for each layer whether it takes part in this step.
        choices: its `overlap`, `negative_objects` and `background_in_prompts` count here.
        fuse: see `Phases`.
        layered: whether this is a layered step, so that the background has its own prompt.
    """
    layout, negative = run.layouts[number], run.negatives[number]
    layers = [n for n, takes_part in enumerate(active) if takes_part]
    background = background_prompt(layout) if layered else layout.caption
    unwanted = [negative] if negative else []
    if layered and choices.negative_objects:
        unwanted += [layout.layers[n].prompt for n in layers]
    masks = torch.ones(1, *run.size)
    if layers:
        part = replace(layout, layers=[layout.layers[n] for n in layers])
        masks = part.masks(*run.size, overlap=choices.overlap)
    regions = [Region(number, 0, background, " and ".join(unwanted), masks[0])]
    for n, mask in zip(layers, masks[1:], strict=True):
        layer = layout.layers[n]
        unwanted_here = negative if layer.negative_prompt is None else layer.negative_prompt
        prompt = asked_prompt(layer, layout, choices)
        regions.append(Region(number, n + 1, prompt, unwanted_here, mask))
    # What is hidden completely costs nothing. The background is needed to find objects by.
    keeps_background = fuse == "collage" and layered
    return [
        region for region in regions if region.mask.any() or (keeps_background and not region.layer)
    ]


def background_prompt(layout: Layout) -> str:
    """What the U-Net is asked for the background: the caption where the layout has none."""
    return layout.background or layout.caption


@runtime_checkable
class AsksForLayers(Protocol):
    """A method that asks for layers, with or without the background in their prompts."""

    background_in_prompts: bool


def asked_prompt(layer: Layer, layout: Layout, choices: AsksForLayers) -> str:
    """What the U-Net is asked for a layer: its prompt, with the background if choices say so."""
    if choices.background_in_prompts and layout.background:
        return f"{layer.prompt} {layout.background}"
    return layer.prompt


def captions(run: Run) -> Regions:
    """The whole pictures, each asked for its caption: ordinary classifier-free guidance."""
    whole = torch.ones(run.size)
    return batched(
        [
            Region(number, 0, layout.caption, run.negatives[number], whole)
            for number, layout in enumerate(run.layouts)
        ],
        run.x_T,
    )


def every_region(
    run: Run, overlap: Overlap = "over", choices: AsksForLayers | None = None
) -> list[Region]:
    """The background and every layer of the only picture, at every step, seen or hidden."""
    layout, usual = run.layout, run.negatives[0]
    texts = [(background_prompt(layout), None)]
    for layer in layout.layers:
        prompt = asked_prompt(layer, layout, choices) if choices else layer.prompt
        texts.append((prompt, layer.negative_prompt))
    masks = layout.masks(*run.size, overlap=overlap)
    return [
        Region(0, number, prompt, usual if negative is None else negative, mask)
        for number, ((prompt, negative), mask) in enumerate(zip(texts, masks, strict=True))
    ]


def _takes_part(layer: Layer, step: int, layered_steps: int, steps: int) -> bool:
    end = layered_steps if layer.end is None else round(layer.end * steps)
    return round(layer.start * steps) <= step < end


# ------------------------------------------------------------------ what cannot work


def layer_name(number: int, layer: Layer) -> str:
    """How messages call a layer: layer 1 'a red car'."""
    return f"layer {number + 1} {layer.prompt!r}"


def check_texts(run: Run, regions: Iterable[Regions], guiding: Iterable[str] = ()) -> None:
    """Refuse texts that cannot be encoded; warn of embeddings that nobody asks for.

    Args:
        run: its model has the embeddings that were given.
        regions: what will be asked.
        guiding: the prompts that ξ is made from.

    Raises:
        ValueError: there is no text encoder, and embeddings are missing.
    """
    model = run.model
    asked = {text: f"ξ is made from what the model says of {text!r}" for text in guiding}
    for region in (region for each in regions for region in each.entries):
        who = f"layer {region.layer}" if region.layer else "the background or caption"
        asked[region.prompt] = f"{who} asks {region.prompt!r}"
        if not model.is_zero(region.negative):
            asked.setdefault(region.negative, f"{who} has the negative prompt {region.negative!r}")
    missing = [reason for text, reason in asked.items() if text not in model.given]
    absent = [name for name in model.encoders if getattr(model.pipe, name) is None]
    if missing and absent:
        raise ValueError(
            f"the pipeline has no {absent[0]}, and prompt_embeds lacks: " + "; ".join(missing)
        )
    for text in model.given.keys() - asked.keys():
        warnings.warn(
            f"prompt_embeds has {text!r}, but nobody asks for it; what is asked: "
            + ", ".join(map(repr, asked)),
            stacklevel=6,
        )


def check_no_canvas(run: Run, remedy: str) -> None:
    """Refuse a canvas that nothing would be put onto."""
    if run.canvas is not None:
        raise ValueError(f"canvas: nothing would be pasted onto it; {remedy}")


def check_no_times(run: Run, because: str) -> None:
    """Refuse layers with a start or an end."""
    for layout in run.layouts:
        for number, layer in enumerate(layout.layers):
            if layer.start > 0 or layer.end is not None:
                raise ValueError(
                    f"{layer_name(number, layer)} has a start or an end, but {because}; use a "
                    "method with fuse='steps'"
                )


def warn_of_cost(run: Run, regions: Regions) -> None:
    """Say how long it will take where a layered step is far more than a plain one."""
    times = len(regions.entries) / regions.pictures
    if times > MUCH:
        layers = max(len(layout.layers) for layout in run.layouts)
        warnings.warn(
            f"with {layers} layers the U-Net is asked {len(regions.entries)} prompts at once: a "
            f"layered step takes up to {times:.0f} × as long as one of method='plain'",
            stacklevel=6,
        )


def warn_of_hidden_layers(run: Run, method: Method) -> None:
    """A layer that others cover completely is not drawn: say so."""
    for layout in run.layouts:
        masks = layout.masks(*run.size, overlap=method.overlap)
        for number, layer in enumerate(layout.layers):
            if masks[number + 1].any() or not layer.opacity:
                continue
            cells = layer.cells(*run.size)
            others = ", ".join(
                layer_name(n, other)
                for n, other in enumerate(layout.layers)
                if n != number and (other.cells(*run.size) & cells).any()
            )
            warnings.warn(
                f"{layer_name(number, layer)} is completely hidden by {others} and will not be "
                "drawn; move it to the front (later in the list) or make it larger",
                stacklevel=6,
            )
