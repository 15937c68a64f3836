"""Where boxes overlap: how hard that is to draw, is the overlap in its place, who is in front?"""

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Bool
from torch import Tensor

from lrd_helpers.layout import Layout
from lrd_helpers.mask import Box
from lrd_helpers.measure.clip import Clip
from lrd_helpers.measure.detectors import Detection, Detector, box_iou
from lrd_helpers.measure.regions import NOISE_FLOOR, REFERENCE_PIXELS
from lrd_helpers.measure.scores import found_boxes, things_by_layer
from lrd_helpers.pictures import Picture, pixels_of


def overlapping_pairs(layout: Layout) -> list[tuple[int, int]]:
    """The pairs of layers whose boxes share an area, by their numbers: (further back, in front)."""
    boxes = [layer.bounding_box for layer in layout.layers]
    pairs = combinations(range(len(boxes)), 2)
    return [(back, front) for back, front in pairs if box_iou(boxes[back], boxes[front]) > 0]


def overlay_score(clip: Clip, layout: Layout) -> float:
    """Σ IoU(B_i, B_j) · cos(p_i, p_j) over the pairs whose boxes overlap; 0 where none does.

    OverLayScore (Li et al. 2025, OverLayBench): how hard a layout is to draw. Much overlap is, and
    the more so between things that are alike. The boxes are those of the layers, p their prompts.
    """
    pairs = overlapping_pairs(layout)
    if not pairs:
        return 0.0
    texts = clip.encode_texts([layer.prompt for layer in layout.layers])
    boxes = [layer.bounding_box for layer in layout.layers]
    return sum(box_iou(boxes[a], boxes[b]) * float(texts[a] @ texts[b]) for a, b in pairs)


def overlap_ious(detector: Detector, image: Picture, layout: Layout) -> list[float]:
    """For each of `overlapping_pairs`: IoU, in [0, 1], of the overlap asked for with that found.

    O-mIoU (Li et al. 2025, OverLayBench) is their mean over a picture, and then over pictures. The
    overlap of two things is what their boxes (`found_boxes`: of what is visible) share. 0 where a
    thing is missing, or where the two do not overlap.
    """
    found = found_boxes(detector, image, layout)
    asked = [layer.bounding_box for layer in layout.layers]
    return [
        0.0
        if found[a] is None or found[b] is None
        else box_iou(_shared(found[a], found[b]), _shared(asked[a], asked[b]))
        for a, b in overlapping_pairs(layout)
    ]


def _shared(a: Box, b: Box) -> Box:
    """What two boxes share; without area where that is nothing."""
    x0, y0 = max(a[0], b[0]), max(a[1], b[1])
    return x0, y0, max(x0, min(a[2], b[2])), max(y0, min(a[3], b[3]))


def front_seen(detector: Detector, image: Picture, layout: Layout) -> list[bool | None]:
    """For each of `overlapping_pairs` whether the thing in front is seen in front.

    In the cells that belong to both layers, more pixels must show the front thing than the back
    one. Where one of the two is missing, or neither is seen there, the order is wrong. None where
    the picture cannot tell: both are missing, the layers share less than a detector can see
    (`NOISE_FLOOR`), or the detector knows no pixels.

    The corners of a box say little: where a star stands in front of a house, most of what their
    boxes share may show the house. So give layers their shapes as masks where these are known.
    """
    things = things_by_layer(detector, image, layout)
    height, width = pixels_of(image).shape[-2:]
    answers: list[bool | None] = []
    for back, front in overlapping_pairs(layout):
        both = layout.layers[back].cells(height, width) & layout.layers[front].cells(height, width)
        pair = [*things[back], *things[front]]
        blind = any(thing.mask is None for thing in pair)
        if not pair or blind or both.sum() < NOISE_FLOOR * both.numel() / REFERENCE_PIXELS:
            answers.append(None)
        elif not (things[back] and things[front]):
            answers.append(False)
        else:
            answers.append(_seen(things[front], both) > _seen(things[back], both))
    return answers


def _seen(things: Sequence[Detection], where: Bool[Tensor, "height width"]) -> int:
    """How many of the cells show the things."""
    return int((torch.stack([thing.mask.cpu() for thing in things]).any(0) & where).sum())
