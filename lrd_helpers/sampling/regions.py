"""What the U-Net is asked in one step: the regions of all pictures as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """One part of one picture in one step: what is asked, and where the answer counts."""

    picture: int
    layer: int
    """0 is the background (or, in general denoising, the whole picture), i + 1 is `layers[i]`."""
    prompt: str
    negative: str
    """What stands for "no prompt"."""
    mask: Float[Tensor, "height width"]
    field: Float[Tensor, "channels height width"] | None = None
    """ξ, or None where it is zero."""


@dataclass(frozen=True, eq=False)
class Regions:
    """R regions of B pictures as one flat batch.

    Regions whose unconditional input is the same (same picture, ξ = 0, same negative prompt) share
    one of the U ≤ R unconditional rows.
    """

    entries: tuple[Region, ...]
    picture: Int[Tensor, "regions"]
    """The picture that region i is a part of."""
    pictures: int
    """B."""
    mask: Float[Tensor, "regions 1 height width"]
    """M^i: where its answer counts. In each picture the masks sum to 1 everywhere."""
    field: Float[Tensor, "regions channels height width"] | None
    """ξ^i, or None where all are zero."""
    region_of_row: tuple[int, ...]
    """The region whose input an unconditional row is computed on."""
    unconditional_of: Int[Tensor, "regions"]
    """The unconditional row that region i uses."""

    def composed(
        self, parts: Float[Tensor, "regions channels height width"]
    ) -> Float[Tensor, "pictures channels height width"]:
        """Σ_i M^i ⊙ parts^i for each picture."""
        whole = parts.new_zeros(self.pictures, *parts.shape[1:])
        # The masks partition the canvas: each cell gets one summand, in any order.
        return whole.index_add(0, self.picture, self.mask.to(parts) * parts)


def batched(
    entries: Sequence[Region],
    like: Float[Tensor, "pictures channels height width"],
    *,
    share: bool = True,
) -> Regions:
    """Regions of several pictures as one batch.

    Args:
        entries: the regions.
        like: latents of the pictures, for their number, device and precision.
        share: whether regions of one picture look at the same latents, so that those with ξ = 0
            have one unconditional row in common.
    """
    rows: dict[tuple, int] = {}  # (picture, negative prompt, ξ) → unconditional row
    region_of_row, unconditional_of = [], []
    for number, region in enumerate(entries):
        alone = number if region.field is not None or not share else None
        key = (region.picture, region.negative, alone)
        if key not in rows:
            rows[key] = len(region_of_row)
            region_of_row.append(number)
        unconditional_of.append(rows[key])
    guided = any(region.field is not None for region in entries)
    return Regions(
        entries=tuple(entries),
        picture=torch.tensor([region.picture for region in entries], device=like.device),
        pictures=len(like),
        mask=torch.stack([region.mask for region in entries])[:, None].to(like),
        field=stacked([region.field for region in entries], like) if guided else None,
        region_of_row=tuple(region_of_row),
        unconditional_of=torch.tensor(unconditional_of, device=like.device),
    )


def stacked(
    fields: Sequence[Tensor | None], like: Float[Tensor, "_ channels height width"]
) -> Float[Tensor, "regions channels height width"]:
    """Fields as one tensor in the precision of `like`, zero where there is none."""
    zero = torch.zeros_like(like[0])
    return torch.stack([zero if field is None else field.to(like) for field in fields])
