"""Putting objects where they belong: find what a layer draws alone, move it into the layer's place.

A layer that is drawn alone has its object wherever the noise suggests. There it can be found
(`object_pixels`) and moved (`pasted`), and the model goes on in the new place. A collage that is
noised and denoised: Collage Diffusion (Sarukkai et al. 2023), SDEdit (Meng et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from lrd_helpers.mask import Box, connected_regions, tight_box

REFERENCE_PIXELS = 128
"""The side of storybook's pictures: lengths in pixels were chosen there."""

RIM = 2
"""How many pixels (of 128) around an object are pasted with it: outlines are dark, and thin."""


GAP = 2
"""Parts with at most twice so many pixels (of 128) between them are one object."""


def scaled(pixels: int, size: Sequence[int]) -> int:
    """A length of a picture of 128 × 128 pixels in those of one of another size, at least 1."""
    return max(1, round(pixels * min(size) / REFERENCE_PIXELS))


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


def object_pixels(
    with_object: Float[Tensor, "3 height width"],
    without: Float[Tensor, "3 height width"],
    relevance: Float[Tensor, "cell_rows cell_columns"],
) -> Bool[Tensor, "height width"]:
    """Where a layer's finished picture shows its object, and not only another background.

        D = ‖picture − background‖ √R, the norm over the colours, the mean of 3 × 3 pixels
        M = the connected part of {D ≥ Otsu's threshold}, without thin lines, of the largest sum

    Parts with a `GAP` between them are one.
    A line such as a horizon that is a little higher is thinner than 3 pixels (of 128), or R is
    small there.

    Args:
        with_object: the layer's picture, in [0, 1].
        without: the background's.
        relevance: R, how much what the model would draw there depends on the layer's prompt (as in
            DiffEdit, Couairon et al. 2023), at any size.
    """
    height, width = with_object.shape[-2:]
    side = 2 * round(1.5 * min(height, width) / REFERENCE_PIXELS - 0.5) + 1  # odd
    side = max(3, side)
    around = {"kernel_size": side, "stride": 1, "padding": side // 2}
    difference = (with_object - without).float().square().sum(0, keepdim=True).sqrt()
    difference = functional.avg_pool2d(difference, **around, count_include_pad=False)[0]
    relevance = functional.interpolate(
        relevance[None, None].float(), (height, width), mode="bilinear", align_corners=False
    )[0, 0]
    difference = difference * relevance.sqrt()
    high = difference >= otsu_threshold(difference)
    eroded = -functional.max_pool2d(-high[None].float(), **around)
    thick = functional.max_pool2d(eroded, **around)[0] > 0
    parts = connected_regions(thick if thick.any() else high, gap=scaled(GAP, (height, width)))
    return max(parts, key=lambda part: float(difference[part].sum()))


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


def pasted(
    canvas: Float[Tensor, "channels height width"],
    picture: Float[Tensor, "channels height width"],
    mask: Bool[Tensor, "height width"],
    box: Box,
    cells: Bool[Tensor, "height width"],
    opacity: float = 1.0,
) -> Float[Tensor, "channels height width"]:
    """The canvas with a picture's object on it, stretched into a box.

    Args:
        canvas: what lies behind.
        picture: where the object is now.
        mask: its pixels there.
        box: where its tight box should be.
        cells: what it may cover, and a rim around.
        opacity: how much of the canvas it hides there, from 0 to 1.
    """
    rim = scaled(RIM, mask.shape)
    around = {"kernel_size": 2 * rim + 1, "stride": 1, "padding": rim}
    source = tight_box(mask)
    wide = functional.max_pool2d(mask[None].float(), **around)
    allowed = functional.max_pool2d(cells[None].float(), **around)
    alpha = opacity * (moved(wide, source, box) * allowed).to(canvas)
    return alpha * moved(picture, source, box) + (1 - alpha) * canvas
