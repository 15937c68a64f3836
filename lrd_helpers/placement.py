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
from lrd_helpers.mask import tight_box

THRESHOLD = 0.25
"""The object is where the words make at least this share of their largest difference."""


def object_mask(
    with_object: Float[Tensor, "channels height width"],
    without: Float[Tensor, "channels height width"],
    threshold: float = THRESHOLD,
) -> Bool[Tensor, "height width"]:
    """Where a prediction with the object's words differs from one without them.

        D = mean over 3 × 3 of Σ_channels (s(x_t, y) − s(x_t, background))²
        M = the connected part of {D ≥ threshold · max D} in which D is largest

    Args:
        with_object: a layer's prediction with its own prompt.
        without: the prediction for the same latents with the background's prompt.
        threshold: in (0, 1].
    """
    square = (with_object - without).float().square().sum(0)
    difference = functional.avg_pool2d(square[None], 3, 1, 1, count_include_pad=False)[0]
    candidates = (difference >= threshold * difference.max()).float()
    part = torch.zeros_like(candidates)
    part.view(-1)[difference.argmax()] = 1
    while True:  # grows to the neighbours until nothing is added
        grown = functional.max_pool2d(part[None], 3, 1, 1)[0] * candidates
        if torch.equal(grown, part):
            return part > 0
        part = grown


def object_box(mask: Bool[Tensor, "height width"]) -> Box:
    """The box that the object of an `object_mask` fills.

    The mean over 3 × 3 made the mask one cell larger on every side but the canvas' own: that cell
    is taken off again, where two are left. Without this, objects fill four fifths of their boxes.
    """

    def sides(low: float, high: float, cells: int) -> tuple[float, float]:
        margin = min(1, max(0, (high - low) * cells / 2 - 1)) / cells
        return low + margin * (low > 0), high - margin * (high < 1)

    x0, y0, x1, y1 = tight_box(mask)
    (x0, x1), (y0, y1) = sides(x0, x1, mask.shape[1]), sides(y0, y1, mask.shape[0])
    return x0, y0, x1, y1


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
    objects: list[Float[Tensor, "channels height width"]],
    masks: list[Bool[Tensor, "height width"]],
    boxes: list[Box],
    cells: list[Bool[Tensor, "height width"]],
) -> Float[Tensor, "channels height width"]:
    """x̂_0 of the whole picture: the objects cut out, each moved into its box, back to front.

    Args:
        background: x̂_0 of the background alone.
        objects: x̂_0 of each layer alone.
        masks: where the object is in it, from `object_mask`.
        boxes: where it should be.
        cells: what it may cover there.
    """
    canvas = background
    for picture, mask, box, allowed in zip(objects, masks, boxes, cells, strict=True):
        source = object_box(mask)
        cover = moved(mask[None].to(picture), source, box) * allowed
        canvas = canvas * (1 - cover) + moved(picture, source, box) * cover
    return canvas
