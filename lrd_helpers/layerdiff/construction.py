"""Layers out of plain pictures: where a layered model's training data come from.

After LayerDiff's data (Huang et al. 2024), topmost first: caption the picture, find each thing that
the caption names, segment it, order the things by depth, fill what the front one hides, cut it out
with its alpha. The next thing then stands there whole, and is found, segmented and cut out like it.
What is left in the end is the background. Gates, each a number with limits, say what to keep.

    result = take_apart(picture, "a red car and a yellow star on grass", storybook_stages())
    result.kept, result.verdicts, result.stack

| stage | in the storybook, by the shipped models |
|---|---|
| `Caption` | the detector's description, where there is no caption |
| `StorybookNames` | the stickers that the caption names, and the place |
| `Localise`, `Segment` | `StorybookDetector`, which knows the pixels of what it finds |
| `OrderByCompletion`, `Fill` | the pipeline, by `lrd_helpers.editing.fill` |
| `Cut`, `Finish` | (no model) |

A stage takes a `Work` and returns the next. It gets its models once, when it is made, and keeps
nothing between two pictures: so it can run anywhere, also as an actor in a process of its own.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy
import torch
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage
from torch import Tensor

from lrd_helpers.editing import fill
from lrd_helpers.layerdiff.stack import LayerStack, StackLayer
from lrd_helpers.mask import Mask
from lrd_helpers.measure import Detection, Detector, StorybookDetector
from lrd_helpers.measure.layers import psnr
from lrd_helpers.models import load_pipeline, load_segmenter
from lrd_helpers.pictures import Picture, picture_of, pixels_of
from lrd_helpers.storybook import COLOURS, PLACES, STICKERS, PlacedSticker, caption_of

if TYPE_CHECKING:
    from lrd_helpers.pipeline import LayeredRenderingPipeline

MOST_THINGS = 4
"""Things that a caption may name: as many layers as the layered model has."""

TOUCHING = 3
"""Pixels between two things, at most, of which one may hide a part of the other."""

SLACK = 0.02
"""A thing that grows by so little may be whole: outlines are never quite the same."""

Pixels = Bool[Tensor, "height width"]
Worst = Callable[..., tuple[float, "Thing"]]  # min or max


# ------------------------------------------------------------------ gates


@dataclass(frozen=True)
class Gate:
    """A number that has to be within limits.

    Attributes:
        fault: what is wrong where it is not, as it is counted.
        least, most: the limits; what is exactly there passes.
    """

    fault: str
    least: float = -math.inf
    most: float = math.inf


GATES: Mapping[str, Gate] = {
    "named": Gate("names no thing, or more than four", least=1, most=MOST_THINGS),
    "found": Gate("a thing that is named is not found", least=1.0),
    "sure": Gate("a thing is not seen surely", least=0.6),
    "size": Gate("a thing is too small", least=0.004),
    "order": Gate("which thing is in front is not sure", least=0.3),
    "gone": Gate("a thing is still seen where it was cut out", most=0.1),
    "hidden": Gate("too much of a thing had to be invented", most=0.4),
    "recomposed": Gate("the layers do not give the picture", least=27.0),
}
"""The gates, in the order in which they are met.

named: how many things the caption names · found: share of these that the detector finds ·
sure: its score, 0 to 1, for the thing it is least sure of · size: share of the canvas that is seen
of the smallest thing · order: how sure it is that the front thing is in front of what it touches,
as the stage that orders them measures it · gone: share of the pixels of a thing that still show it
after it was taken away · hidden: share of a layer that was hidden · recomposed: PSNR in dB between
the picture and the layers laid over one another.
"""


@dataclass(frozen=True)
class Verdict:
    """What a gate said.

    Attributes:
        gate: its name.
        of: the prompt of the thing in question; empty where it is the whole picture.
        value: the number.
        passed: whether it was within the limits.
    """

    gate: str
    of: str
    value: float
    passed: bool


# ------------------------------------------------------------------ what stages hand on


@dataclass(frozen=True, eq=False)
class Thing:
    """A thing that the caption names.

    Attributes:
        prompt: its name, "a red car".
        detection: where it is in the picture of now; None before it was looked for.
        mask: its pixels there, hidden ones not included; None before it was segmented.
        seen: how many pixels of it the first picture shows.
    """

    prompt: str
    detection: Detection | None = None
    mask: Pixels | None = None
    seen: int = 0


@dataclass(frozen=True, eq=False)
class Work:
    """A picture that is being taken apart: what a stage is given, and what it returns.

    Attributes:
        original: the picture, RGB.
        picture: what is left of it, RGB of the same size.
        caption: the original in words; empty where nobody said.
        place: what the background shows, "on grass".
        things: what is still to be cut out; `Order…` puts the front one first.
        behind: the picture without the front thing; None before that was filled.
        layers: what was cut out, the front one first.
        verdicts: what the gates said.
        gates: the gates.
        stack: the result; None before it is finished.
    """

    original: Image.Image
    picture: Image.Image
    caption: str = ""
    place: str = ""
    things: tuple[Thing, ...] = ()
    behind: Image.Image | None = None
    layers: tuple[StackLayer, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    gates: Mapping[str, Gate] = field(default_factory=lambda: GATES)
    stack: LayerStack | None = None

    @property
    def kept(self) -> bool:
        """Whether there is a stack, and all gates have passed it."""
        return self.stack is not None and not self.fault

    @property
    def fault(self) -> str:
        """Why it is left out, as it is counted: of the first gate that did not pass it; or ""."""
        failed = (verdict.gate for verdict in self.verdicts if not verdict.passed)
        return next((self.gates[name].fault for name in failed), "")

    def judged(self, gate: str, value: float, of: str = "") -> Work:
        """The same with one verdict more; a value that is NaN does not pass."""
        passed = self.gates[gate].least <= value <= self.gates[gate].most
        return replace(self, verdicts=(*self.verdicts, Verdict(gate, of, float(value), passed)))

    def judged_worst(self, gate: str, values: Sequence[float], worst: Worst = min) -> Work:
        """`judged` by the worst of the values of all things; as it is where there are no things."""
        pairs = zip(values, self.things, strict=True)
        if not self.things:
            return self
        value, thing = worst(pairs, key=lambda pair: pair[0])
        return self.judged(gate, value, thing.prompt)


@runtime_checkable
class Stage(Protocol):
    """One step of taking a picture apart."""

    def __call__(self, work: Work) -> Work:
        """The work after this step; as it is where there is nothing to do."""
        ...


# ------------------------------------------------------------------ stages


class Caption:
    """Captions a picture that has no caption."""

    def __init__(self, captioner: Callable[[Image.Image], str]) -> None:
        self.captioner = captioner

    def __call__(self, work: Work) -> Work:
        return work if work.caption else replace(work, caption=self.captioner(work.original))


class StorybookNames:
    """The stickers that a caption names, and the place; without one, the place that is seen."""

    def __init__(self, detector: StorybookDetector) -> None:
        self.detector = detector
        self.pattern = rf"\b(?:an? )?(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(STICKERS)})\b"

    def __call__(self, work: Work) -> Work:
        caption = work.caption.lower()
        places = [place for place in PLACES if place in caption]
        place = places[0] if places else self.detector.describe(work.original).place
        things = tuple(map(Thing, re.findall(self.pattern, caption)))
        return replace(work, place=place, things=things).judged("named", len(things))


class Localise:
    """Finds each thing by its name; what is not found is dropped.

    A detection is that of one thing only: two cars are not found in one.
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    def __call__(self, work: Work) -> Work:
        if not work.things:
            return work
        prompts = [thing.prompt for thing in work.things]
        answers = assigned(self.detector(work.picture, prompts))
        missing = [name for name, answer in zip(prompts, answers, strict=True) if answer is None]
        things = tuple(
            replace(thing, detection=answer, mask=answer.mask)
            for thing, answer in zip(work.things, answers, strict=True)
            if answer is not None
        )
        work = replace(work, things=things)
        work = work.judged("found", 1 - len(missing) / len(prompts), ", ".join(missing))
        return work.judged_worst("sure", [thing.detection.score for thing in things])


def assigned(answers: Sequence[Sequence[Detection]]) -> list[Detection | None]:
    """A detection for each prompt, each for one only: the surest first; None where none is left."""
    pairs = [(answer, n) for n, each in enumerate(answers) for answer in each]
    pairs.sort(key=lambda pair: (len(answers[pair[1]]), -pair[0].score))
    given: dict[int, Detection] = {}
    taken: set[int] = set()
    for answer, n in pairs:
        if n not in given and id(answer) not in taken:
            given[n] = answer
            taken.add(id(answer))
    return [given.get(n) for n in range(len(answers))]


class Segment:
    """The pixels of each thing that was found as a box only.

    Args:
        segmenter: gives the mask of the thing in each of several boxes of a picture; None where
            the detector knows the pixels.
    """

    def __init__(
        self, segmenter: Callable[[Image.Image, Sequence[Detection]], list[Pixels]] | None = None
    ) -> None:
        self.segmenter = segmenter

    def __call__(self, work: Work) -> Work:
        if not work.things:
            return work
        boxes = [thing.detection for thing in work.things if thing.mask is None]
        if boxes and self.segmenter is None:
            raise ValueError("the detector knows no pixels; give `Segment` a segmenter")
        masks = iter(self.segmenter(work.picture, boxes) if boxes else [])
        things = [
            thing if thing.mask is not None else replace(thing, mask=next(masks))
            for thing in work.things
        ]
        areas = [int(thing.mask.sum()) for thing in things]
        pairs = list(zip(things, areas, strict=True))
        things = tuple(replace(thing, seen=thing.seen or area) for thing, area in pairs)
        work = replace(work, things=things)
        if not work.layers:
            pixels = work.picture.width * work.picture.height
            return work.judged_worst("size", [area / pixels for area in areas])
        shown = [thing.seen / max(area, 1) for thing, area in pairs]
        return work.judged_worst("hidden", [max(0.0, 1 - share) for share in shown], max)


Filler = Callable[[Image.Image, Pixels, str], Image.Image]
"""The picture without what stands in a mask, where it shows what a prompt says."""


class OrderByCompletion:
    """The front thing first, by what turns up behind each thing when it is taken away.

    Of two things that touch, each is taken away for a try. Where the other one then grows into its
    pixels it was hidden by it; the front thing was whole already and does not grow (the dual
    completion of Zhan et al. 2020, "Self-supervised scene de-occlusion"). The gate's number is

        (g_back − g_front + e) / (g_back + g_front + e),   e = `SLACK`

    where g is by what share of its pixels each of the two grows without the other: 1 where only the
    back one grows, or neither (then the order does not matter), 0 where both grow alike. A thing
    that touches no other one needs no try, and no gate.
    """

    def __init__(self, filler: Filler, detector: Detector) -> None:
        self.filler, self.detector = filler, detector

    def __call__(self, work: Work) -> Work:
        near = touching([thing.mask for thing in work.things])
        alone = next((n for n, others in enumerate(near) if not others), None)
        if not work.things or alone is not None:
            return in_front(work, alone or 0)
        tries = [self._without(work, n, others) for n, others in enumerate(near)]
        growths = [each for _, each in tries]
        sureness = [
            min(sureness_of(growths[front][back], growths[back][front]) for back in others)
            for front, others in enumerate(near)
        ]
        front = max(range(len(sureness)), key=sureness.__getitem__)
        work = work.judged("order", sureness[front], work.things[front].prompt)
        return replace(in_front(work, front), behind=tries[front][0])

    def _without(
        self, work: Work, number: int, others: Sequence[int]
    ) -> tuple[Image.Image, dict[int, float]]:
        """The picture without a thing, and by what share of itself each other one grows into it."""
        thing = work.things[number]
        behind = self.filler(work.picture, thing.mask, prompt_behind(work, number))
        prompts = [work.things[other].prompt for other in others]
        answers = assigned(self.detector(behind, prompts))
        growths = {}
        for other, answer in zip(others, answers, strict=True):
            new = 0 if answer is None else int((_cells(answer, behind) & thing.mask).sum())
            growths[other] = new / int(work.things[other].mask.sum())
        return behind, growths


def sureness_of(back: float, front: float) -> float:
    """How sure it is, from -1 to 1, what is in front, by the growths of both."""
    return (back - front + SLACK) / (back + front + SLACK)


def in_front(work: Work, number: int) -> Work:
    """The same with this thing first; the others keep their order."""
    first = work.things[number : number + 1]
    rest = work.things[:number] + work.things[number + 1 :]
    return replace(work, things=first + rest, behind=None)


def touching(masks: Sequence[Pixels]) -> list[list[int]]:
    """For each mask the numbers of the others that are at most `TOUCHING` pixels away."""
    wide = [ndimage.distance_transform_edt(~mask.numpy()) <= TOUCHING for mask in masks]
    return [
        [m for m, mask in enumerate(masks) if m != n and (wide[n] & mask.numpy()).any()]
        for n in range(len(masks))
    ]


def prompt_behind(work: Work, number: int) -> str:
    """What is seen where a thing was taken away: the things that it touches, and the place.

    Others are not named: what stands elsewhere would be drawn a second time.
    """
    near = touching([thing.mask for thing in work.things])[number]
    things = " and ".join(work.things[other].prompt for other in near)
    return f"{things} {work.place}".strip()


class Fill:
    """What the front thing hides; a gate asks whether it is gone."""

    def __init__(self, filler: Filler, detector: Detector) -> None:
        self.filler, self.detector = filler, detector

    def __call__(self, work: Work) -> Work:
        if not work.things:
            return work
        front = work.things[0]
        behind = work.behind or self.filler(work.picture, front.mask, prompt_behind(work, 0))
        [answers] = self.detector(behind, [front.prompt])
        still = sum(int((_cells(each, behind) & front.mask).sum()) for each in answers)
        share = min(1.0, still / max(1, int(front.mask.sum())))
        return replace(work, behind=behind).judged("gone", share, front.prompt)


def _cells(detection: Detection, picture: Image.Image) -> Pixels:
    """The pixels of a detection, or of its box where the detector knows no pixels."""
    if detection.mask is not None:
        return detection.mask
    x0, y0, x1, y1 = detection.box
    cells = torch.zeros(picture.height, picture.width, dtype=torch.bool)
    rows = slice(math.floor(y0 * picture.height), math.ceil(y1 * picture.height))
    cells[rows, math.floor(x0 * picture.width) : math.ceil(x1 * picture.width)] = True
    return cells


class Cut:
    """Cuts the front thing out with its alpha; what is left is the picture behind it."""

    def __call__(self, work: Work) -> Work:
        if not work.things:
            return work
        front, *rest = work.things
        rgba = cut_out(pixels_of(work.picture), pixels_of(work.behind), front.mask)
        numbers = (255 * rgba).round().byte().permute(1, 2, 0).numpy()
        layer = StackLayer(front.prompt, Image.fromarray(numpy.ascontiguousarray(numbers)))
        return replace(
            work,
            picture=work.behind,
            things=tuple(rest),
            behind=None,
            layers=(*work.layers, layer),
        )


def cut_out(
    picture: Float[Tensor, "3 height width"],
    behind: Float[Tensor, "3 height width"],
    mask: Pixels,
) -> Float[Tensor, "4 height width"]:
    """A thing with straight colours and alpha, from the picture with it and the picture without it.

    Well inside the mask α is 1, well outside 0. One pixel on each side of its edge is a mixture
    I = α·F + (1 − α)·B of the thing's colour F, which is that of the nearest pixel inside, and the
    colour B behind it:

        α = ⟨I − B, F − B⟩ / ‖F − B‖²

    and where F and B are alike, α is that of the mask. The colours there are those that give back
    I over B.

    Args:
        picture: I, in [0, 1].
        behind: B, in [0, 1].
        mask: not empty.
    """
    cells = mask.numpy()
    inside, outside = ndimage.binary_erosion(cells), ~ndimage.binary_dilation(cells)
    sure = inside if inside.any() else cells
    rows, columns = ndimage.distance_transform_edt(
        ~sure, return_distances=False, return_indices=True
    )
    colour = picture[:, rows, columns]
    apart = (colour - behind).square().sum(0)
    alpha = ((picture - behind) * (colour - behind)).sum(0) / apart.clamp(min=1e-6)
    alpha = torch.where(apart > 0.02, alpha.clamp(0, 1), mask.float())
    alpha = alpha.masked_fill(torch.from_numpy(sure), 1).masked_fill(torch.from_numpy(outside), 0)
    straight = behind + (picture - behind) / alpha.clamp(min=1 / 255)
    colour = torch.where(alpha > 0.5, straight, colour).clamp(0, 1)
    return torch.cat([colour, alpha[None]])


class Finish:
    """The stack of what was cut out over what is left."""

    def __call__(self, work: Work) -> Work:
        if work.things or not work.layers:
            return work
        stack = LayerStack(
            work.picture,
            work.layers[::-1],
            caption=work.caption,
            background_prompt=work.place,
            composite=work.original,
        )
        made, true = (pixels_of(image)[None] for image in (stack.flatten(), work.original))
        return replace(work, stack=stack).judged("recomposed", float(psnr(made, true)))


# ------------------------------------------------------------------ all of it


def rounds(first: Sequence[Stage], each: Sequence[Stage]) -> tuple[Stage, ...]:
    """All stages of a picture, in order: `each` once for every thing that there may be."""
    return (*first, *each * MOST_THINGS, Finish())


def take_apart(
    picture: Picture,
    caption: str,
    stages: Sequence[Stage],
    *,
    gates: Mapping[str, Gate] = GATES,
    go_on: bool = False,
) -> Work:
    """A picture as a stack of layers, and what the gates say of it.

    Args:
        picture: of the size that the stages' models draw.
        caption: what it shows; "" where nobody said.
        stages: such as `storybook_stages` gives.
        gates: with limits of your own: GATES | {"sure": Gate("…", least=0.8)}.
        go_on: also after a gate that does not pass it, to measure what the gates are worth.

    Returns:
        The last `Work`: `kept`, `fault`, `verdicts`, and the `stack`, which is None where a gate
        stopped the work, or where nothing was found.
    """
    image = picture_of(picture)
    work = Work(image, image, " ".join(caption.split()), gates=gates)
    for stage in stages:
        work = stage(work)
        if work.fault and not go_on:
            break
    return work


def timed(
    stages: Sequence[Stage],
    seconds: Counter[str],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Stage, ...]:
    """The same stages, which add to `seconds` how long each took, by its name."""

    def watched(stage: Stage) -> Stage:
        name = getattr(stage, "__name__", type(stage).__name__)

        def step(work: Work) -> Work:
            begun = clock()
            try:
                return stage(work)
            finally:
                seconds[name] += clock() - begun

        return step

    return tuple(map(watched, stages))


def storybook_stages(
    pipe: LayeredRenderingPipeline | None = None, detector: StorybookDetector | None = None
) -> tuple[Stage, ...]:
    """The stages by the shipped models.

    Args:
        pipe: draws what is hidden; the shipped pipeline by default.
        detector: finds and segments; the shipped segmenter by default, on the pipeline's device.

    Raises:
        AssetError: a shipped model is missing or damaged.
    """
    pipe = load_pipeline("storybook") if pipe is None else pipe
    pipe.set_progress_bar_config(disable=True)
    if detector is None:
        detector = StorybookDetector(load_segmenter(pipe.device))

    def filler(image: Image.Image, hole: Pixels, prompt: str) -> Image.Image:
        made = fill(pipe, image, Mask.of(hole), prompt=prompt).image
        if made.size != image.size:
            raise ValueError(
                f"the picture is {image.width} × {image.height}, but the model draws "
                f"{made.width} × {made.height}; resize it first"
            )
        return made

    def captioner(image: Image.Image) -> str:
        seen = detector.describe(image)
        things = [PlacedSticker(s.sticker, s.colour, (0.0, 0.0), (0.0, 0.0)) for s in seen.stickers]
        return caption_of(tuple(things), seen.place)

    each = (
        Localise(detector),
        Segment(),
        OrderByCompletion(filler, detector),
        Fill(filler, detector),
        Cut(),
    )
    return rounds((Caption(captioner), StorybookNames(detector)), each)
