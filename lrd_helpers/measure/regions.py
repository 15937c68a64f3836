"""From the class of every pixel to stickers: which regions are things, and which are parts of them.

The constants were chosen on true scenes through the autoencoder, where the truth is known. Areas
and lengths are in pixels of a picture of 128 × 128.
"""

import math
from typing import NamedTuple

import numpy
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from lrd_helpers.mask import connected_regions
from lrd_helpers.storybook import STICKERS

REFERENCE_PIXELS = 128 * 128

NOISE_FLOOR = 20.0
"""Smaller regions are noise, not objects.

The smallest sticker the world draws covers about a hundred pixels. Along a blurred outline single
pixels look like something else, and a single pixel can stretch a box across the picture.
"""

FRAGMENT = 90.0
"""Smaller regions that touch another sticker belong to it.

Where a picture is blurred or badly drawn, a bit of a mushroom's cap looks like a flower. No whole
sticker is so small. Where all but such a bit is hidden behind another it is missed, which is rarer.
"""

PART = 0.2
"""A region that touches a sticker of its colour and is smaller than this share of it belongs to it:
the tip of a rocket, say, that looks like a mushroom. Two things of one colour do touch in the
world, but a third thing seen where there are two is more frequent by far.
"""

GAP = 2.0  # parts at most twice this length apart are one thing: sail and hull
SECOND_COLOUR = 0.3  # a smaller share of an object in another colour is a detail, not an object
COLOUR_REACH = 2.0  # pixels that far around say what colour a pixel of a sticker has


def without_fragments(classes: Int[Tensor, "height width"]) -> Int[Tensor, "height width"]:
    """The same classes, small regions (`FRAGMENT`) taken over by the stickers around them."""
    sticker = classes < len(STICKERS)
    least = _area(FRAGMENT, sticker)
    sure = torch.zeros_like(sticker)
    for number in classes[sticker].unique().tolist():
        for region in connected_regions(classes == number, least):
            sure |= region
    while True:  # neighbour by neighbour, until nothing that is left touches a large region
        votes = functional.one_hot(classes.where(sure, len(STICKERS)), len(STICKERS) + 1)
        votes = functional.avg_pool2d(
            votes[..., :-1].permute(2, 0, 1).float(), 3, stride=1, padding=1
        )
        taken = sticker & ~sure & (votes.sum(0) > 0)
        if not taken.any():
            return classes
        classes = votes.argmax(0).where(taken, classes)
        sure |= taken


class _Region(NamedTuple):
    size: int
    sticker: int
    colour: int
    mask: Bool[Tensor, "height width"]


def with_parts(
    classes: Int[Tensor, "height width"], colours: Int[Tensor, "height width"], noise_floor: float
) -> Int[Tensor, "height width"]:
    """The same classes, but small regions named like the larger ones of their colour that they
    touch (`PART`), the smallest first."""
    while True:
        regions = [
            _Region(int(mask.sum()), number, int(colours[mask].mode().values), mask)
            for number in classes.unique().tolist()
            if number < len(STICKERS)
            for mask in _connected(classes == number, noise_floor)
        ]
        regions.sort(key=lambda region: region.size)
        for part in regions:
            wholes = _wholes(part, regions)
            if wholes:
                classes = classes.where(~part.mask, max(wholes)[1])
                break
        else:
            return classes


def _wholes(part: _Region, regions: list[_Region]) -> list[tuple[int, int]]:
    """Size and sticker of the regions that `part` may belong to."""
    around = ndimage.binary_dilation(part.mask.numpy(), numpy.ones((3, 3)))
    return [
        (region.size, region.sticker)
        for region in regions
        if region.sticker != part.sticker
        and region.colour == part.colour
        and part.size < PART * region.size
        and (around & region.mask.numpy()).any()
    ]


def things(
    mask: Bool[Tensor, "height width"], noise_floor: float
) -> list[Bool[Tensor, "height width"]]:
    """The regions of a mask that are things, the largest first; parts with a narrow gap are one."""
    return _connected(mask, noise_floor, gap=_length(GAP, mask))


def things_by_colour(
    thing: Bool[Tensor, "height width"],
    colours: Float[Tensor, "colours height width"],
    noise_floor: float,
) -> list[tuple[int, Bool[Tensor, "height width"]]]:
    """A red ball that touches a blue ball is two things; a red ball with a blue dot is one."""
    # Mean colours, since thin outlines easily take on another.
    reach = _length(COLOUR_REACH, thing)
    inside = thing[None].float()
    colours, weight = (
        functional.avg_pool2d(values, 2 * reach + 1, stride=1, padding=reach)
        for values in (colours * inside, inside)
    )
    colours = colours / weight.clamp(min=1e-6)
    counts = torch.bincount(colours.argmax(0)[thing], minlength=len(colours))
    kept = (counts >= SECOND_COLOUR * counts.sum()).nonzero()[:, 0]
    if len(kept) < 2:
        return [(int(counts.argmax()), thing)]
    nearest = kept[colours[kept].argmax(0)]
    return [
        (colour, part)
        for colour in kept.tolist()
        for part in things(thing & (nearest == colour), noise_floor)
    ]


def _connected(
    mask: Bool[Tensor, "height width"], noise_floor: float, gap: int = 0
) -> list[Bool[Tensor, "height width"]]:
    return connected_regions(mask, max(1, _area(noise_floor, mask)), gap=gap)


def _area(area: float, mask: Tensor) -> int:
    """An area of the reference picture in pixels of `mask`."""
    return math.ceil(area * mask.numel() / REFERENCE_PIXELS)


def _length(length: float, mask: Tensor) -> int:
    """A length of the reference picture in pixels of `mask`."""
    return round(length * (mask.numel() / REFERENCE_PIXELS) ** 0.5)
