"""Putting objects where they belong: find what a layer draws alone, move it into the layer's place.

A layer that runs alone draws its object wherever the noise suggests. Early in the sampling the
picture is still a sketch, and a sketch can be moved: the model then finishes it in its new place.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from lrd_helpers.layout import Box
from lrd_helpers.mask import connected_regions, tight_box

MARGIN = 0.05
"""A share of the object's box that is cut off on every side, so that it comes out larger.

What is placed shrinks a little while the model goes on: without this, objects fill 92 % of the
width and height of their boxes.
"""


def otsu_threshold(values: Float[Tensor, "height width"]) -> float:
    """Otsu's threshold: between two groups of values, each as uniform as can be.

        t = argmax  w_0 w_1 (μ_0 − μ_1)²

    with w the groups' shares of the values and μ their means. Source: Otsu 1979.
    """
    ordered = values.float().flatten().sort().values
    below = torch.arange(1, len(ordered), device=values.device)
    above = len(ordered) - below
    sums = ordered.cumsum(0)
    difference = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    best = int((below * above * difference.square()).argmax())
    return float(ordered[best] + ordered[best + 1]) / 2


def object_mask(
    with_object: Float[Tensor, "channels height width"],
    without: Float[Tensor, "channels height width"],
) -> Bool[Tensor, "height width"]:
    """Where a layer's picture differs from the background's.

        D = ‖x̂_0(layer) − x̂_0(background)‖, the norm over the channels
        M = the connected part of {D ≥ Otsu's threshold} with the largest sum of D

    Args:
        with_object: x̂_0 of a layer alone.
        without: x̂_0 of the background, from the same noise.
    """
    difference = (with_object - without).float().square().sum(0).sqrt()
    parts = connected_regions(difference >= otsu_threshold(difference))
    return max(parts, key=lambda part: float(difference[part].sum()))


def object_box(mask: Bool[Tensor, "height width"]) -> Box:
    """The box around an `object_mask`, less `MARGIN` on the sides that are not the canvas' own."""
    x0, y0, x1, y1 = tight_box(mask)
    width, height = MARGIN * (x1 - x0), MARGIN * (y1 - y0)
    return (
        x0 + width * (x0 > 0),
        y0 + height * (y0 > 0),
        x1 - width * (x1 < 1),
        y1 - height * (y1 < 1),
    )


def moved(
    picture: Float[Tensor, "channels height width"], source: Box, target: Box
) -> Float[Tensor, "channels height width"]:
    """The picture moved and stretched so that what was in `source` is in `target` (bilinear)."""
    height, width = picture.shape[-2:]
    grids = []
    for cells, low, high in ((width, 0, 2), (height, 1, 3)):
        centres = (torch.arange(cells, device=picture.device) + 0.5) / cells
        share = (centres - target[low]) / (target[high] - target[low])
        grids.append(source[low] + share * (source[high] - source[low]))
    x, y = torch.meshgrid(*grids, indexing="xy")
    grid = 2 * torch.stack([x, y], -1)[None] - 1
    return functional.grid_sample(
        picture[None].float(), grid, padding_mode="border", align_corners=False
    )[0].to(picture)


def placed(
    background: Float[Tensor, "channels height width"],
    picture: Float[Tensor, "channels height width"],
    box: Box,
    cells: Bool[Tensor, "height width"],
) -> Float[Tensor, "channels height width"]:
    """x̂_0 of the background with a layer's object in its place.

    What lies around the object comes along: cut out at its outline, some of it would stay behind.

    Args:
        background: x̂_0 of the background.
        picture: x̂_0 of the layer alone.
        box: where the object should be.
        cells: what it may cover there.
    """
    source = object_box(object_mask(picture, background))
    return torch.where(cells, moved(picture, source, box), background)
