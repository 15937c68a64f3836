"""How well a picture obeys its layout and its caption.

| function | question | range |
|---|---|---|
| `layout_iou`, `success_rate` | is each layer where it was asked for? | 0 to 1 |
| `attribute_accuracy` | has the thing in its place the colour that was asked for? | yes or no |
| `leakage` | how much of it, or of its colour, is elsewhere? | 0 (none) to 1 |
| `average_precision` | the first one as detectors are judged, over many pictures | 0 to 1 |
| `clip_score`, `text_image_similarity` | does the picture fit the caption? | ±100, ±1 |

What looks at the picture is an argument: any `Detector` finds things, any `Clip` compares pictures
with words. `StorybookDetector` and `StorybookClip` are the shipped ones; `ZeroShotDetector` and
`PretrainedClip` take models of transformers that know the real world.

    ious = layout_iou(StorybookDetector(), image, layout)      # one number a layer
    score = clip_score(StorybookClip(), image, layout.caption)
"""

import contextlib
import difflib
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.mask import Box, connected_regions
from lrd_helpers.models import load_clip, load_segmenter
from lrd_helpers.pictures import Picture, picture_of, pixels_of
from lrd_helpers.storybook import COLOURS, PLACES, STICKERS, tight_boxes
from lrd_helpers.words import colour_of_prompt, object_of_prompt

REFERENCE_PIXELS = 128 * 128
NOISE_FLOOR = 20
"""Regions of fewer pixels (of 128 × 128) are noise, not objects.

The smallest sticker the world draws covers about a hundred pixels. Along a blurred outline single
pixels look like something else, and one of them is enough to stretch a box across the picture.
"""

FRAGMENT = 90
"""Regions of fewer pixels (of 128 × 128) that touch another sticker belong to it.

Where a picture is blurred or badly drawn, a bit of a mushroom's cap looks like a flower. No whole
sticker is so small. Where all but such a bit is hidden behind another it is missed, which is rarer.
This constant and the next ones were chosen on true scenes through the autoencoder, where the truth
is known.
"""

PART = 0.2
"""A region that touches a sticker of its own colour and is smaller than this share of it belongs
to it: the tip of a rocket, say, that looks like a mushroom. Two things of one colour do touch in
the world, but a third thing seen where there are two is more frequent by far.
"""

GAP = 2  # pixels (of 128 × 128); parts at most twice this apart are one thing: sail and hull

SECOND_COLOUR = 0.3  # a smaller share of an object in another colour is a detail, not an object
COLOUR_REACH = 2  # pixels (of 128 × 128) that far around say what colour a pixel of a sticker has

SEGMENTER_STRIDE = 16  # picture sides are brought to a multiple: the U-Net halves them repeatedly
BATCH_SIZE = 8  # more is slower on CPUs: a layer of 32 pictures is allocated anew at every use


# ------------------------------------------------------------------ what looks at the picture


@dataclass(frozen=True, eq=False)
class Detection:
    """One thing that was found.

    Attributes:
        box: (x0, y0, x1, y1) as fractions of the picture, the tight one of what is visible.
        score: how sure the detector is, in [0, 1].
        mask: the pixels, where the detector knows them.
    """

    box: Box
    score: float
    mask: Bool[Tensor, "height width"] | None


@runtime_checkable
class Detector(Protocol):
    """Finds in one picture what each of several prompts names."""

    def __call__(self, image: Picture, prompts: Sequence[str]) -> list[list[Detection]]:
        """One list a prompt, empty where nothing was found.

        A thing that answers to several prompts ("a car", "a red car") is the same `Detection`
        object in each of their lists.
        """
        ...


@runtime_checkable
class Clip(Protocol):
    """Puts pictures and words into one space, as vectors of length 1."""

    def encode_images(self, images: Sequence[Picture]) -> Float[Tensor, "images channels"]: ...

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts channels"]: ...


# ------------------------------------------------------------------ the storybook's detector


@dataclass(frozen=True, eq=False)
class FoundSticker(Detection):
    """A connected region of one sticker in one colour."""

    sticker: str
    colour: str


@dataclass(frozen=True, eq=False)
class Description:
    """What a storybook picture shows: a place and stickers, the largest first."""

    place: str
    place_score: float  # mean probability over the background, in [0, 1]
    stickers: tuple[FoundSticker, ...]


class StorybookDetector:
    """Finds stickers by their name and colour with the shipped segmenter.

    Args:
        model: called as `model(2 * images - 1, timestep=0).sample`, gives for images
            (batch, 3, height, width) in [0, 1] the logits (batch, 27, height, width): 12 stickers
            and 6 places (a background pixel's class is the place), then 8 colours and "none".
            Default: the shipped one.
        noise_floor: smallest region that counts, in pixels of a 128 × 128 picture.
    """

    def __init__(self, model: nn.Module | None = None, *, noise_floor: float = NOISE_FLOOR) -> None:
        self.model = (load_segmenter() if model is None else model).eval()
        self.noise_floor = noise_floor

    @property
    def rules(self) -> str:
        """What its answers depend on besides its weights, to be kept beside what it measured."""
        return (
            f"noise floor {self.noise_floor:g}, fragments {FRAGMENT}, parts {PART:g}, gap {GAP}, "
            f"second colour {SECOND_COLOUR:g}, colour reach {COLOUR_REACH}"
        )

    def __call__(self, image: Picture, prompts: Sequence[str]) -> list[list[Detection]]:
        """The stickers each prompt names; a prompt without a colour takes any colour.

        Raises:
            ValueError: a prompt that does not name exactly one sticker, or several colours.
        """
        wanted = [sticker_and_colour(prompt) for prompt in prompts]
        found = self.describe(image).stickers
        return [
            [
                thing
                for thing in found
                if thing.sticker == sticker and colour in (None, thing.colour)
            ]
            for sticker, colour in wanted
        ]

    def find(self, image: Picture, prompt: str) -> Bool[Tensor, "height width"] | None:
        """All pixels that show the prompt, or None if there are none above the noise floor."""
        found = self(image, [prompt])[0]
        return torch.stack([thing.mask for thing in found]).any(0) if found else None

    def describe(self, image: Picture) -> Description:
        """Everything the picture shows."""
        return self.describe_all([image])[0]

    @torch.no_grad()
    def describe_all(self, images: Sequence[Picture]) -> list[Description]:
        """`describe` for many pictures; neighbours of one size share a forward pass."""
        descriptions = []
        for _, group in itertools.groupby(map(pixels_of, images), key=lambda pixels: pixels.shape):
            pictures = list(group)
            for first in range(0, len(pictures), BATCH_SIZE):
                logits = self._logits(torch.stack(pictures[first : first + BATCH_SIZE]))
                descriptions += [self._description(one) for one in logits]
        return descriptions

    def _logits(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        like = next(self.model.parameters())
        height, width = images.shape[-2:]
        sides = [
            max(1, round(side / SEGMENTER_STRIDE)) * SEGMENTER_STRIDE for side in (height, width)
        ]
        images = _resized(images, *sides).to(like.device, like.dtype)
        logits = self.model(images * 2 - 1, timestep=0).sample.float().cpu()
        classes = len(STICKERS) + len(PLACES) + len(COLOURS) + 1
        if logits.shape[1] != classes:
            raise ValueError(
                f"the segmenter gives {logits.shape[1]} channels, but {classes} are "
                "expected: 12 stickers, 6 places, 8 colours and 'none'"
            )
        return _resized(logits, height, width)

    def _description(self, logits: Float[Tensor, "classes height width"]) -> Description:
        kinds = logits[: len(STICKERS) + len(PLACES)].softmax(0)
        # The last channel, "none", takes part in the probability but is never the answer:
        # what is a sticker has a colour.
        colours = logits[len(STICKERS) + len(PLACES) :].softmax(0)[:-1]
        winner = self._with_parts(self._without_fragments(kinds.argmax(0)), colours.argmax(0))

        background = winner >= len(STICKERS)
        places = kinds[len(STICKERS) :, background if background.any() else ~background].mean(1)
        stickers = [
            FoundSticker(
                box=_box_of(region),
                score=float((kinds[number] * colours[colour])[region].mean()),
                mask=region,
                sticker=STICKERS[number],
                colour=list(COLOURS)[colour],
            )
            for number in winner.unique().tolist()
            if number < len(STICKERS)
            for whole in self._regions(winner == number)
            for colour, region in self._parts_by_colour(whole, colours)
        ]
        stickers.sort(key=lambda thing: int(thing.mask.sum()), reverse=True)
        return Description(PLACES[int(places.argmax())], float(places.max()), tuple(stickers))

    def _without_fragments(
        self, winner: Int[Tensor, "height width"]
    ) -> Int[Tensor, "height width"]:
        """The same classes, small regions taken over by the stickers around them."""
        sticker = winner < len(STICKERS)
        least = math.ceil(FRAGMENT * winner.numel() / REFERENCE_PIXELS)
        sure = torch.zeros_like(sticker)
        for number in winner[sticker].unique().tolist():
            for region in connected_regions(winner == number, least):
                sure |= region
        while True:  # neighbour by neighbour, until nothing that is left touches a large region
            votes = functional.one_hot(winner.where(sure, len(STICKERS)), len(STICKERS) + 1)
            votes = functional.avg_pool2d(
                votes[..., :-1].permute(2, 0, 1).float(), 3, stride=1, padding=1
            )
            taken = sticker & ~sure & (votes.sum(0) > 0)
            if not taken.any():
                return winner
            winner = votes.argmax(0).where(taken, winner)
            sure |= taken

    def _with_parts(
        self, winner: Int[Tensor, "height width"], colours: Int[Tensor, "height width"]
    ) -> Int[Tensor, "height width"]:
        """The same classes, but small regions named like the larger ones of their colour that they
        touch (`PART`), the smallest first."""
        while True:
            regions = [
                (int(region.sum()), number, int(colours[region].mode().values), region)
                for number in winner.unique().tolist()
                if number < len(STICKERS)
                for region in self._connected(winner == number)
            ]
            regions.sort(key=lambda one: one[0])
            for size, number, colour, region in regions:
                around = functional.max_pool2d(region[None].float(), 3, 1, padding=1)[0].bool()
                wholes = [
                    (larger, name)
                    for larger, name, its_colour, whole in regions
                    if name != number
                    and its_colour == colour
                    and size < PART * larger
                    and (around & whole).any()
                ]
                if wholes:
                    winner = winner.where(~region, max(wholes)[1])
                    break
            else:
                return winner

    def _connected(
        self, mask: Bool[Tensor, "height width"], gap: int = 0
    ) -> list[Bool[Tensor, "height width"]]:
        least = math.ceil(self.noise_floor * mask.numel() / REFERENCE_PIXELS)
        return connected_regions(mask, max(1, least), gap=gap)

    def _regions(self, mask: Bool[Tensor, "height width"]) -> list[Bool[Tensor, "height width"]]:
        scale = mask.numel() / REFERENCE_PIXELS
        return self._connected(mask, gap=round(GAP * scale**0.5))

    def _parts_by_colour(
        self, region: Bool[Tensor, "height width"], colours: Float[Tensor, "colours height width"]
    ) -> list[tuple[int, Bool[Tensor, "height width"]]]:
        """A red ball that touches a blue one is two objects; a red ball with a blue dot is one."""
        # Mean colours, since thin outlines easily take on another.
        reach = round(COLOUR_REACH * (region.numel() / REFERENCE_PIXELS) ** 0.5)
        inside = region[None].float()
        colours, weight = (
            functional.avg_pool2d(values, 2 * reach + 1, stride=1, padding=reach)
            for values in (colours * inside, inside)
        )
        colours = colours / weight.clamp(min=1e-6)
        counts = torch.bincount(colours.argmax(0)[region], minlength=len(colours))
        kept = (counts >= SECOND_COLOUR * counts.sum()).nonzero()[:, 0]
        if len(kept) < 2:
            return [(int(counts.argmax()), region)]
        nearest = kept[colours[kept].argmax(0)]
        return [
            (colour, part)
            for colour in kept.tolist()
            for part in self._regions(region & (nearest == colour))
        ]


class ZeroShotDetector:
    """Finds what prompts name in photographs and anything else, by a detector of transformers.

    Args:
        find: a pipeline for "zero-shot-object-detection", such as `transformers.pipeline(task,
            model="google/owlv2-base-patch16-ensemble", revision=…)`.
        threshold: how sure it must be, in [0, 1].
    """

    def __init__(self, find: Callable[..., list[dict]], *, threshold: float = 0.1) -> None:
        self.find, self.threshold = find, threshold

    def __call__(self, image: Picture, prompts: Sequence[str]) -> list[list[Detection]]:
        """The boxes that it gives for each prompt; it knows no pixels."""
        picture = picture_of(image)
        found: dict[str, list[Detection]] = {prompt: [] for prompt in prompts}
        for one in self.find(picture, candidate_labels=list(found), threshold=self.threshold):
            sides = {"xmin": picture.width, "ymin": picture.height}
            sides |= {"xmax": picture.width, "ymax": picture.height}
            box = tuple(min(1.0, max(0.0, one["box"][name] / sides[name])) for name in sides)
            found[one["label"]].append(Detection(box, float(one["score"]), None))
        return [found[prompt] for prompt in prompts]


def sticker_and_colour(prompt: str) -> tuple[str, str | None]:
    """The sticker and the colour (None if it names none) of a prompt such as "a red car".

    Raises:
        ValueError: no sticker, several stickers, or several colours.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    stickers = [word for word in STICKERS if word in words]
    colours = [word for word in COLOURS if word in words]
    if len(stickers) != 1:
        named = " and ".join(stickers) or "no sticker"
        near = [match for word in words for match in difflib.get_close_matches(word, STICKERS, 1)]
        guess = f"; did you mean {near[0]!r}?" if near and not stickers else ""
        raise ValueError(
            f"{prompt!r} names {named}, but should name exactly one of {', '.join(STICKERS)}{guess}"
        )
    if len(colours) > 1:
        raise ValueError(
            f"{prompt!r} names the colours {' and '.join(colours)}, but should name one or none"
        )
    return stickers[0], colours[0] if colours else None


# ------------------------------------------------------------------ layout against picture


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1); 0 where either has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def found_boxes(detector: Detector, image: Picture, layout: Layout) -> list[Box | None]:
    """For each layer the tight box around everything that shows its prompt; None if nothing does.

    Everything: an object cut in two by a nearer one counts whole, and a second copy elsewhere
    makes the box too large, as it should. Where several layers name the same thing (two red
    balls), each thing counts only for the layer whose box it fits best.
    """
    boxes = [[thing.box for thing in things] for things in _found(detector, image, layout)]
    return [
        (
            min(box[0] for box in own),
            min(box[1] for box in own),
            max(box[2] for box in own),
            max(box[3] for box in own),
        )
        if own
        else None
        for own in boxes
    ]


def _found(detector: Detector, image: Picture, layout: Layout) -> list[list[Detection]]:
    """For each layer the things that count for it; see `found_boxes`."""
    prompts = list(dict.fromkeys(layer.prompt for layer in layout.layers))
    by_prompt = dict(zip(prompts, detector(image, prompts), strict=True))
    found = [by_prompt[layer.prompt] for layer in layout.layers]

    def misfit(thing: Detection, number: int) -> tuple[float, float]:
        asked = layout.layers[number].bounding_box
        return -box_iou(thing.box, asked), math.dist(_centre(thing.box), _centre(asked))

    def fits_best(thing: Detection) -> int:
        rivals = [n for n, things in enumerate(found) if any(thing is other for other in things)]
        return min(rivals, key=lambda rival: misfit(thing, rival))

    return [
        [thing for thing in things if fits_best(thing) == number]
        for number, things in enumerate(found)
    ]


def layout_iou(detector: Detector, image: Picture, layout: Layout) -> list[float]:
    """IoU of each layer, in [0, 1]: what was asked for against what was found; nothing found = 0.

    A box is held against the tight box, a mask against the pixels that were found, of which the
    part hidden by nearer layers is not expected.

    Raises:
        ValueError: a layer with a mask, and a detector that knows no pixels.
    """
    boxes = found_boxes(detector, image, layout)
    ious = []
    for number, (layer, box) in enumerate(zip(layout.layers, boxes, strict=True)):
        if box is None:
            ious.append(0.0)
        elif layer.mask is None:
            ious.append(box_iou(box, layer.box))
        else:
            ious.append(_mask_iou(_found(detector, image, layout)[number], layout, number))
    return ious


def _mask_iou(things: list[Detection], layout: Layout, number: int) -> float:
    if any(thing.mask is None for thing in things):
        prompt = layout.layers[number].prompt
        raise ValueError(
            f"layer {number + 1} {prompt!r} has a mask, but the detector gives boxes only; give "
            "the layer a box to measure it"
        )
    found = torch.stack([thing.mask for thing in things]).any(0)
    asked = layout.masks(*found.shape)[number + 1].bool()
    return float((found & asked).sum() / (found | asked).sum())


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

    The right sticker and colour are in the IoU already: of anything else nothing is found.
    """
    return [iou >= threshold for iou in ious]


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
        things, coloured = detector(image, [_any_colour(layer.prompt), layer.prompt])
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
    objects ("a red star", where a yellow one was asked for). Elsewhere is outside the boxes of all
    layers with that object, or with that object in that colour. Shares of the pixels that were
    found (of the boxes' cells, where the detector knows no pixels); 0 where nothing was.
    """
    shares = []
    for layer in layout.layers:
        colour = colour_of_prompt(layer.prompt)
        wanted = {_any_colour(layer.prompt)}
        for other in layout.layers:
            if colour and colour_of_prompt(other.prompt) not in (None, colour):
                wanted.add(f"a {colour} {object_of_prompt(other.prompt)}")
        prompts = sorted(wanted)
        found, elsewhere = [], []
        for prompt, things in zip(prompts, detector(image, prompts), strict=True):
            places = [
                other.bounding_box
                for other in layout.layers
                if object_of_prompt(other.prompt) == object_of_prompt(prompt)
                and colour_of_prompt(prompt) in (None, colour_of_prompt(other.prompt))
            ]
            for thing in things:
                mask = _cells_of(thing.box) if thing.mask is None else thing.mask.cpu()
                found.append(mask)
                for place in places:
                    mask = mask & ~_cells_of(place, mask.shape)
                elsewhere.append(mask)
        share = 0.0
        if found:
            share = float(torch.stack(elsewhere).any(0).sum() / torch.stack(found).any(0).sum())
        shares.append(share)
    return shares


def _any_colour(prompt: str) -> str:
    return f"a {object_of_prompt(prompt)}"


def _cells_of(box: Box, size: Sequence[int] = (128, 128)) -> Bool[Tensor, "height width"]:
    return Layer("a place", box=box).cells(*size)


def average_precision(
    detector: Detector, pairs: Sequence[tuple[Picture, Layout]]
) -> dict[str, float]:
    """AP of the layers' boxes as COCO has it: the layouts are the truth, the detector looks.

    As the papers on layouts measure it: the area under precision against recall, the mean over IoU
    thresholds .50, .55, … .95 and over the prompts. In each picture the detector is asked for that
    picture's own prompts. By pycocotools, which must be installed.

    Returns:
        "AP", and "AP50" and "AP75" with one threshold each, in [0, 1].

    Raises:
        ValueError: no pictures.
        ImportError: pycocotools is not installed.
    """
    if not pairs:
        raise ValueError("there are no pictures to judge")
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ImportError("average precision needs pycocotools: pip install pycocotools") from None

    def rectangle(box: Box) -> list[float]:
        # In thousandths: COCO counts pixels, and only ratios matter here.
        x0, y0, x1, y1 = (1000 * value for value in box)
        return [x0, y0, x1 - x0, y1 - y0]

    prompts = sorted({layer.prompt for _, layout in pairs for layer in layout.layers})
    truth, found = [], []
    for number, (image, layout) in enumerate(pairs, start=1):
        for layer in layout.layers:
            box = rectangle(layer.bounding_box)
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": number,
                    "category_id": prompts.index(layer.prompt),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        own = list(dict.fromkeys(layer.prompt for layer in layout.layers))
        for prompt, things in zip(own, detector(image, own), strict=True):
            found += [
                {
                    "image_id": number,
                    "category_id": prompts.index(prompt),
                    "bbox": rectangle(thing.box),
                    "score": thing.score,
                }
                for thing in things
            ]
    if not found:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every step it takes
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": number} for number in range(1, len(pairs) + 1)],
            "categories": [{"id": n, "name": prompt} for n, prompt in enumerate(prompts)],
            "annotations": truth,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(evaluation.stats[i]) for i, name in enumerate(("AP", "AP50", "AP75"))}


# ------------------------------------------------------------------ words against picture


class PretrainedClip:
    """Compares pictures with texts by any CLIP model.

    Args:
        model: a `CLIPModel` of transformers.
        processor: its `CLIPProcessor`.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.tokenizer = model.eval(), processor.tokenizer
        self._image_processor = processor.image_processor

    @torch.no_grad()
    def encode_images(self, images: Sequence[Picture]) -> Float[Tensor, "images channels"]:
        """Pictures of any size → vectors of length 1."""
        like = next(self.model.parameters())
        pixels = self._pixel_values(images).to(like.device, like.dtype)
        # Not get_image_features: what it returns differs between versions of transformers.
        vectors = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
        return functional.normalize(vectors.float().cpu(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts channels"]:
        """Texts → vectors of length 1; what exceeds the model's number of tokens is cut off."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask)
        vectors = self.model.text_projection(output.pooler_output)
        return functional.normalize(vectors.float().cpu(), dim=-1)

    def _pixel_values(self, images: Sequence[Picture]) -> Float[Tensor, "images 3 side side"]:
        pictures = [picture_of(image) for image in images]
        return self._image_processor(pictures, return_tensors="pt")["pixel_values"]


class StorybookClip(PretrainedClip):
    """Compares storybook pictures with captions by the shipped CLIP model.

    Args:
        model: a `CLIPModel` that takes pixels in [-1, 1]; default: the shipped one.
        tokenizer: its `CLIPTokenizer`; to be given exactly when `model` is.
    """

    def __init__(self, model: nn.Module | None = None, tokenizer: object | None = None) -> None:
        if (model is None) != (tokenizer is None):
            raise ValueError("give both a model and its tokenizer, or neither")
        if model is None:
            model, tokenizer = load_clip()
        self.model, self.tokenizer = model.eval(), tokenizer

    def _pixel_values(self, images: Sequence[Picture]) -> Float[Tensor, "images 3 side side"]:
        # Without a detour through bytes: what the autoencoder gives is what is looked at.
        side = self.model.config.vision_config.image_size
        pixels = torch.cat([_resized(pixels_of(image)[None], side, side) for image in images])
        return (pixels - 0.5) / 0.5


def clip_score(clip: Clip, image: Picture, text: str) -> float:
    """100 · cos(image, text), in [−100, 100] (CLIPScore, Hessel et al. 2021, without its 2.5)."""
    return 100 * text_image_similarity(clip, [image], [text])


def text_image_similarity(clip: Clip, images: Sequence[Picture], texts: Sequence[str]) -> float:
    """T2I-Sim: the mean of cos(image, its text) over pictures, in [−1, 1] (as BoxDiff reports it).

    Raises:
        ValueError: no pictures, or another number of texts.
    """
    if not images or len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures and {len(texts)} texts cannot be compared")
    return float((clip.encode_images(images) * clip.encode_texts(texts)).sum(1).mean())


# ------------------------------------------------------------------ pictures and boxes as numbers


def _resized(
    images: Float[Tensor, "batch channels _ _"], height: int, width: int
) -> Float[Tensor, "batch channels {height} {width}"]:
    if images.shape[-2:] == (height, width):
        return images
    return functional.interpolate(images, (height, width), mode="bilinear", antialias=True)


def _box_of(mask: Bool[Tensor, "height width"]) -> Box:
    x0, y0, x1, y1 = tight_boxes(mask).tolist()
    return x0, y0, x1, y1


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
