"""Layout against picture: is each layer where it was asked for, in its colour, and only there?"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.mask import Box
from lrd_helpers.measure.detectors import Detection, Detector, box_iou
from lrd_helpers.naming import colour_of_prompt, object_of_layer
from lrd_helpers.pictures import Picture


def found_boxes(detector: Detector, image: Picture, layout: Layout) -> list[Box | None]:
    """For each layer the tight box around everything that shows its prompt; None if nothing does.

    Everything: an object cut in two by a nearer layer counts whole, and a second copy elsewhere
    makes the box too large, as it should. Where several layers name the same thing (two red
    balls), each thing counts only for the layer whose box it fits best.
    """
    return [_hull(detections) for detections in things_by_layer(detector, image, layout)]


def _hull(detections: Sequence[Detection]) -> Box | None:
    if not detections:
        return None
    x0, y0, x1, y1 = zip(*(detection.box for detection in detections), strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def things_by_layer(detector: Detector, image: Picture, layout: Layout) -> list[list[Detection]]:
    """For each layer the things that count for it; see `found_boxes`."""
    prompts = list(dict.fromkeys(layer.prompt for layer in layout.layers))
    by_prompt = dict(zip(prompts, detector(image, prompts), strict=True))
    candidates = [by_prompt[layer.prompt] for layer in layout.layers]

    def misfit(thing: Detection, number: int) -> tuple[float, float]:
        asked = layout.layers[number].bounding_box
        return -box_iou(thing.box, asked), math.dist(_centre(thing.box), _centre(asked))

    def best_layer(thing: Detection) -> int:
        rivals = [
            number
            for number, things in enumerate(candidates)
            if any(thing is other for other in things)
        ]
        return min(rivals, key=lambda rival: misfit(thing, rival))

    return [
        [thing for thing in things if best_layer(thing) == number]
        for number, things in enumerate(candidates)
    ]


def layout_iou(detector: Detector, image: Picture, layout: Layout) -> list[float]:
    """IoU of each layer, in [0, 1]: what was asked for against what is there; 0 for nothing.

    A box is held against the tight box; a mask against the pixels of what is there, of which the
    part hidden by nearer layers is not expected.

    Raises:
        ValueError: a layer with a mask, and a detector that knows no pixels.
    """
    by_layer = things_by_layer(detector, image, layout)
    ious = []
    for number, (layer, things) in enumerate(zip(layout.layers, by_layer, strict=True)):
        if not things:
            ious.append(0.0)
        elif layer.mask is None:
            ious.append(box_iou(_hull(things), layer.box))
        else:
            ious.append(_mask_iou(things, layout, number))
    return ious


def _mask_iou(things: list[Detection], layout: Layout, number: int) -> float:
    if any(thing.mask is None for thing in things):
        prompt = layout.layers[number].prompt
        raise ValueError(
            f"layer {number + 1} {prompt!r} has a mask, but the detector gives boxes only; give "
            "the layer a box to measure it"
        )
    seen = torch.stack([thing.mask for thing in things]).any(0)
    asked = layout.masks(*seen.shape)[number + 1].bool()
    return float((seen & asked).sum() / (seen | asked).sum())


def success_rate(ious: Sequence[Sequence[float]], threshold: float = 0.5) -> float:
    """The share of all layers of several pictures that succeeded; see `success`.

    Raises:
        ValueError: there are no layers.
    """
    succeeded = [each for picture in ious for each in success(picture, threshold)]
    if not succeeded:
        raise ValueError("there are no layers to judge")
    return sum(succeeded) / len(succeeded)


def success(ious: Sequence[float], threshold: float = 0.5) -> list[bool]:
    """Which layers of `layout_iou` succeeded: IoU ≥ 0.5 with what the prompt names.

    The right sticker and colour are in the IoU already: anything else has an IoU of 0.
    """
    return [iou >= threshold for iou in ious]


def picture_success(ious: Sequence[float], threshold: float = 0.5) -> bool:
    """Whether all layers of a picture succeeded; see `success`.

    Raises:
        ValueError: there are no layers.
    """
    return success_rate([ious], threshold) == 1


def attribute_accuracy(
    detector: Detector, image: Picture, layout: Layout, threshold: float = 0.5
) -> list[bool | None]:
    """For each layer whether the thing in its place also has the colour that was asked for.

    The thing is what the prompt's object ("a car") finds in the layer's place, whatever its colour:
    the box with the largest IoU, at least `threshold`. Where there is none, the attribute is wrong
    too. None for a layer whose prompt names no colour.
    """
    answers: list[bool | None] = []
    for layer in layout.layers:
        if colour_of_prompt(layer.prompt) is None:
            answers.append(None)
            continue
        things, coloured = detector(image, [_named(layer), layer.prompt])
        fits = [box_iou(thing.box, layer.bounding_box) for thing in things]
        best = things[fits.index(max(fits))] if fits and max(fits) >= threshold else None
        # The same place, not the same object: a detector may look anew for each prompt.
        answers.append(
            best is not None
            and any(box_iou(best.box, other.box) >= threshold for other in coloured)
        )
    return answers


def leakage(detector: Detector, image: Picture, layout: Layout) -> list[float]:
    """For each layer the share, in [0, 1], of what should be in its place that is elsewhere.

    Looked for is the layer's object in any colour ("a car"), and its colour on the other layers'
    objects ("a red star", where a yellow star was asked for). Elsewhere is outside the boxes of all
    layers with that object, or with that object in that colour. Shares of the pixels of what is
    there (of the boxes' cells, where the detector knows no pixels); 0 where nothing is.
    """
    shares = []
    for layer in layout.layers:
        leaks = _leaks_of(layer, layout)
        masks, elsewhere = [], []
        for prompt, things in zip(leaks, detector(image, list(leaks)), strict=True):
            places = _places_of(*leaks[prompt], layout)
            for thing in things:
                mask = _cells_of(thing.box) if thing.mask is None else thing.mask.cpu()
                masks.append(mask)
                for place in places:
                    mask = mask & ~_cells_of(place, mask.shape)
                elsewhere.append(mask)
        share = 0.0
        if masks:
            share = float(torch.stack(elsewhere).any(0).sum() / torch.stack(masks).any(0).sum())
        shares.append(share)
    return shares


def _leaks_of(layer: Layer, layout: Layout) -> dict[str, tuple[str, str | None]]:
    """What a layer can leak: its object, and its colour on others'; prompt → object and colour."""
    colour, thing = colour_of_prompt(layer.prompt), object_of_layer(layer).lower()
    leaks = {_named(layer): (thing, None)}
    for other in layout.layers:
        if colour and colour_of_prompt(other.prompt) not in (None, colour):
            thing = object_of_layer(other).lower()
            leaks[f"a {colour} {thing}"] = (thing, colour)
    return dict(sorted(leaks.items()))


def _places_of(thing: str, colour: str | None, layout: Layout) -> list[Box]:
    """The boxes in which an object was asked for, of any colour or of that one."""
    return [
        layer.bounding_box
        for layer in layout.layers
        if object_of_layer(layer).lower() == thing
        and colour in (None, colour_of_prompt(layer.prompt))
    ]


def _named(layer: Layer) -> str:
    """A prompt for a layer's object, whatever its colour."""
    return f"a {object_of_layer(layer).lower()}"


def _cells_of(box: Box, size: Sequence[int] = (128, 128)) -> Bool[Tensor, "height width"]:
    return Layer("a place", box=box).cells(*size)


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
