"""What the U-Net is asked in one step of Algorithm 1: the parts of all pictures as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.method import Method


@dataclass(frozen=True)
class Region:
    """One part of one picture in one step: what is asked, and where the answer counts."""

    picture: int
    layer: int
    """0 is the background (or, in general denoising, the whole picture), i + 1 is `layers[i]`."""
    prompt: str
    negative: str
    mask: Float[Tensor, "height width"]
    field: Float[Tensor, "channels height width"] | None = None
    """ξ, or None where it is zero."""


@dataclass(frozen=True)
class Regions:
    """What the U-Net is asked in one step: R regions of B pictures as one flat batch.

    Regions whose unconditional input is the same (same picture, ξ = 0, same negative prompt) share
    one of the U ≤ R unconditional rows.
    """

    entries: tuple[Region, ...]
    picture: Int[Tensor, "regions"]
    """The picture that region i is a part of."""
    mask: Float[Tensor, "regions 1 height width"]
    """M^i: where its answer counts. In each picture the masks sum to 1 everywhere."""
    field: Float[Tensor, "regions channels height width"] | None
    """ξ^i, or None where all are zero."""
    prompt: Float[Tensor, "regions tokens features"]
    """y^i, encoded."""
    negative: Float[Tensor, "rows tokens features"]
    """What stands for "no prompt", encoded."""
    asker: Int[Tensor, "rows"]
    """The region whose input an unconditional row is computed on."""
    row: Int[Tensor, "regions"]
    """The unconditional row that region i uses."""

    def composed(
        self, parts: Float[Tensor, "regions channels height width"], pictures: int
    ) -> Float[Tensor, "pictures channels height width"]:
        """Σ_i M^i ⊙ parts^i for each picture."""
        whole = parts.new_zeros(pictures, *parts.shape[1:])
        # The masks partition the canvas: each cell gets one summand, in any order.
        return whole.index_add(0, self.picture, self.mask.to(parts) * parts)


def asked_prompt(layer: Layer, layout: Layout, method: Method) -> str:
    """What the U-Net is asked for a layer: its prompt, with the background where `method` says."""
    if method.background_in_prompts and layout.background:
        return f"{layer.prompt} {layout.background}"
    return layer.prompt


def regions_of(
    number: int,
    layout: Layout,
    negative: str,
    active: Sequence[bool],
    method: Method,
    size: Sequence[int],
    layered: bool,
) -> list[Region]:
    """The parts of one picture in one step, without ξ: the background and every layer in sight.

    Args:
        number: of the picture in the batch.
        layout: what it should show.
        negative: its negative prompt, "" for none.
        active: for each layer whether it takes part in this step.
        method: its `overlap`, `negative_objects` and `background_in_prompts` count here.
        size: height and width of the latents.
        layered: whether this is a layered step, so that the background has its own prompt.
    """
    layers = [n for n, takes_part in enumerate(active) if takes_part]
    background = layout.caption
    if layered:
        background = layout.background or layout.caption
    unwanted = [negative] if negative else []
    if layered and method.negative_objects:
        unwanted += [layout.layers[n].prompt for n in layers]
    masks = torch.ones(1, *size)
    if layers:
        part = replace(layout, layers=[layout.layers[n] for n in layers])
        masks = part.masks(*size, overlap=method.overlap)
    regions = [Region(number, 0, background, " and ".join(unwanted), masks[0])]
    for n, mask in zip(layers, masks[1:], strict=True):
        layer = layout.layers[n]
        own = negative if layer.negative_prompt is None else layer.negative_prompt
        prompt = asked_prompt(layer, layout, method)
        regions.append(Region(number, n + 1, prompt, own, mask))
    # What is hidden completely costs nothing. The background is needed to find objects by.
    return [
        region
        for region in regions
        if region.mask.any() or (method.fuse == "collage" and not region.layer)
    ]


def parts_of_steps(
    layouts: Sequence[Layout],
    negatives: Sequence[str],
    method: Method,
    steps: int,
    layered_steps: int,
    size: Sequence[int],
) -> list[list[Region]]:
    """For each step the parts of all pictures; steps that ask the same have one list in common.

    Args:
        layouts: one a picture.
        negatives: so are these negative prompts.
        method: see `regions_of`.
        steps: of the whole sampling.
        layered_steps: how many of them, from the first on, are layered.
        size: height and width of the latents.
    """
    known: dict[tuple, list[Region]] = {}
    plan = []
    for step in range(steps):
        active = tuple(
            tuple(_takes_part(layer, step, layered_steps, steps) for layer in layout.layers)
            for layout in layouts
        )
        key = step < layered_steps, active
        if key not in known:
            known[key] = [
                region
                for number, layout in enumerate(layouts)
                for region in regions_of(
                    number, layout, negatives[number], active[number], method, size, key[0]
                )
            ]
        plan.append(known[key])
    return plan


def _takes_part(layer: Layer, step: int, layered_steps: int, steps: int) -> bool:
    end = layered_steps if layer.end is None else round(layer.end * steps)
    return round(layer.start * steps) <= step < end


def batched(
    entries: list[Region],
    encode: Callable[[str], Float[Tensor, "tokens features"]],
    latents: Float[Tensor, "rows channels height width"],
    *,
    share: bool,
) -> Regions:
    """Parts of several pictures as one batch.

    Args:
        entries: the parts.
        encode: a text's embedding.
        latents: only for their size, device and precision.
        share: whether parts of one picture look at the same latents, so that those with ξ = 0 have
            one unconditional row in common.
    """
    rows: dict[tuple, int] = {}  # (picture, negative prompt, ξ) → unconditional row
    asker, row = [], []
    for number, region in enumerate(entries):
        own = number if region.field is not None or not share else None
        key = (region.picture, region.negative, own)
        if key not in rows:
            rows[key] = len(asker)
            asker.append(number)
        row.append(rows[key])
    guided = any(region.field is not None for region in entries)
    whole = lambda numbers: torch.tensor(numbers, device=latents.device)  # noqa: E731
    return Regions(
        entries=tuple(entries),
        picture=whole([region.picture for region in entries]),
        mask=torch.stack([region.mask for region in entries])[:, None].to(latents),
        field=stacked([region.field for region in entries], latents) if guided else None,
        prompt=torch.stack([encode(region.prompt) for region in entries]),
        negative=torch.stack([encode(entries[number].negative) for number in asker]),
        asker=whole(asker),
        row=whole(row),
    )


def stacked(
    fields: list[Tensor | None], latents: Tensor
) -> Float[Tensor, "regions channels height width"]:
    """Fields as one tensor in the precision of `latents`, zero where there is none."""
    zero = torch.zeros_like(latents[0])
    return torch.stack([zero if field is None else field.to(latents) for field in fields])
