"""Makes the package's storybook-220.json: 220 layouts in named strata, the same ones each time.

    python benchmarks/layouts/generate.py

Every layout is drawn at random until it has what its stratum asks for. Boxes have two decimals, and
no sticker is turned, so that the layout alone tells the picture it asks for (`ground_truth_scene`).
Trainings use small seeds; this one is none of theirs.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

import torch

from lrd_helpers.benchmark import NamedLayout, ground_truth_scene, save_layouts
from lrd_helpers.benchmark.layouts import SHIPPED
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.mask import Box
from lrd_helpers.storybook import (
    COLOURS,
    PLACES,
    STICKERS,
    PlacedSticker,
    aspect_ratio,
    caption_of,
    render_scenes,
    seeded,
)

SEED = 1_000_000

Thing = tuple[str, str]  # sticker, colour
Draw = Callable[[torch.Generator, int], Layout | None]

OUT_OF_PLACE = {
    "at sea": ("car", "cat", "flower", "house", "mushroom", "tree"),
    "on grass": ("boat", "fish"),
    "on sand": ("boat", "fish", "flower", "mushroom"),
    "on snow": ("boat", "fish", "flower", "mushroom"),
}
LONGEST = {
    1: (0.25, 0.75),
    2: (0.25, 0.55),
    3: (0.22, 0.45),
    4: (0.2, 0.4),
    5: (0.2, 0.35),
    6: (0.2, 0.32),
}
"""By the number of stickers: how long the longer side of a box is, as a share of the canvas."""


def several(count: int) -> Draw:
    """Stickers and colours that are all different, none of which touches another."""

    def draw(generator: torch.Generator, number: int) -> Layout | None:
        things = different(generator, count)
        boxes = [box_for(generator, sticker, *LONGEST[count]) for sticker, _ in things]
        return None if overlap(boxes) else layout_of(generator, things, boxes)

    return draw


def many(generator: torch.Generator, number: int) -> Layout | None:
    """Five or six things: more than any scene had that the models learned from.

    A caption of six goes without articles: the text encoder reads 24 tokens.
    """
    layout = several(5 + number % 2)(generator, number)
    if layout is None or len(layout.layers) < 6:
        return layout
    return replace(layout, caption=re.sub(r"\ban? ", "", layout.caption))


def small(generator: torch.Generator, number: int) -> Layout | None:
    """Each box has less than 4 % of the canvas."""
    things = different(generator, 1 + number % 3)
    boxes = [box_for(generator, sticker, 0.16, 0.21) for sticker, _ in things]
    if overlap(boxes) or max(map(area, boxes)) >= 0.04:
        return None
    return layout_of(generator, things, boxes)


def large(generator: torch.Generator, number: int) -> Layout | None:
    """One box with at least 30 % of the canvas."""
    things = different(generator, 1)
    box = box_for(generator, things[0][0], 0.55, 0.85)
    return layout_of(generator, things, [box]) if area(box) >= 0.3 else None


def overlapping(generator: torch.Generator, number: int) -> Layout | None:
    """Each box shares 15 to 40 % of the smaller box with another; at least half of each is seen."""
    things = different(generator, 2 + number % 2)
    boxes = [box_for(generator, sticker, 0.3, 0.6) for sticker, _ in things]
    shares = {(a, b): shared(boxes[a], boxes[b]) for a, b in combinations(range(len(boxes)), 2)}
    touched = [max(share for pair, share in shares.items() if n in pair) for n in range(len(boxes))]
    if min(touched) < 0.15 or max(shares.values()) > 0.4:
        return None
    layout = layout_of(generator, things, boxes)
    seen = layout.masks(100, 100)[1:].sum((1, 2)) / 100**2
    fits = all(own >= 0.5 * area(box) for own, box in zip(seen.tolist(), boxes, strict=True))
    return layout if fits else None


def two_colours(generator: torch.Generator, number: int) -> Layout | None:
    """The same sticker twice, in two colours."""
    (sticker, one), (_, other) = different(generator, 2)
    return pair(generator, [(sticker, one), (sticker, other)])


def two_stickers(generator: torch.Generator, number: int) -> Layout | None:
    """Two stickers of the same colour."""
    (one, colour), (other, _) = different(generator, 2)
    return pair(generator, [(one, colour), (other, colour)])


def pair(generator: torch.Generator, things: list[Thing]) -> Layout | None:
    boxes = [box_for(generator, sticker, *LONGEST[2]) for sticker, _ in things]
    return None if overlap(boxes) else layout_of(generator, things, boxes)


def unusual_place(generator: torch.Generator, number: int) -> Layout | None:
    """A car at sea, a fish on grass."""
    count = 1 + number % 2
    place = one_of(generator, tuple(OUT_OF_PLACE))
    things = different(generator, count, OUT_OF_PLACE[place])
    boxes = [box_for(generator, sticker, *LONGEST[count]) for sticker, _ in things]
    return None if overlap(boxes) else layout_of(generator, things, boxes, place)


def at_the_edge(generator: torch.Generator, number: int) -> Layout | None:
    """Each box touches the canvas's edge."""
    count = 1 + number % 2
    things, boxes = different(generator, count), []
    for sticker, _ in things:
        x0, y0, x1, y1 = box_for(generator, sticker, *LONGEST[count])
        width, height = x1 - x0, y1 - y0
        moved = ((0, y0), (1 - width, y0), (x0, 0), (x0, 1 - height))
        x0, y0 = one_of(generator, moved)
        boxes.append(rounded(x0, y0, width, height))
    return None if overlap(boxes) else layout_of(generator, things, boxes)


def extreme_aspect(generator: torch.Generator, number: int) -> Layout | None:
    """Boxes at least twice as long as wide, 1.4 to 2 times as stretched as their sticker is.

    Stretched further, the segmenter no longer knows a sticker when it sees it.
    """
    things, boxes = different(generator, 1 + number % 2), []
    for sticker, _ in things:
        aspect = uniform(generator, 2, 2.4) ** one_of(generator, (-1, 1))
        boxes.append(box_for(generator, sticker, 0.5, 0.85, aspect=aspect))
        x0, y0, x1, y1 = boxes[-1]
        aspect = (x1 - x0) / (y1 - y0)
        stretch = aspect / aspect_ratio(sticker)
        if 1 / 2 < aspect < 2 or not 1.4 <= max(stretch, 1 / stretch) <= 2:
            return None
    return None if overlap(boxes) else layout_of(generator, things, boxes)


def masks(generator: torch.Generator, number: int) -> Layout | None:
    """The stickers' own shapes, pixel by pixel, instead of boxes."""
    layout = several(1 + number % 2)(generator, number)
    if layout is None:
        return None
    shapes = render_scenes([ground_truth_scene(layout)]).layers[0, :, 3] > 0.5
    return Layout(
        layout.caption,
        background=layout.background,
        layers=[
            Layer(layer.prompt, mask=shape)
            for layer, shape in zip(layout.layers, shapes, strict=True)
        ],
    )


STRATA: dict[str, tuple[int, Draw]] = {
    "one object": (20, several(1)),
    "two objects": (20, several(2)),
    "three objects": (20, several(3)),
    "four objects": (20, several(4)),
    "small": (15, small),
    "large": (15, large),
    "overlapping": (20, overlapping),
    "same sticker in two colours": (15, two_colours),
    "same colour on two stickers": (15, two_stickers),
    "unusual place": (10, unusual_place),
    "at the edge": (10, at_the_edge),
    "extreme aspect": (10, extreme_aspect),
    "masks": (10, masks),
    "many": (20, many),
}
"""Each stratum's number of layouts, and what draws one (None: try again)."""


def layouts() -> Iterator[NamedLayout]:
    """The layouts of the file, in its order."""
    for row, (stratum, (count, draw)) in enumerate(STRATA.items()):
        for number in range(count):
            generator = seeded(SEED, 7, row, number)
            while (layout := draw(generator, number)) is None:
                pass
            yield NamedLayout(f"{stratum.replace(' ', '-')}-{number + 1:02}", stratum, layout)


# ------------------------------------------------------------------ boxes and things


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def one_of(generator: torch.Generator, choices: tuple) -> object:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def different(
    generator: torch.Generator, count: int, stickers: tuple[str, ...] = STICKERS
) -> list[Thing]:
    """So many things, no two of one sticker or one colour."""
    kinds = torch.randperm(len(stickers), generator=generator)[:count].tolist()
    colours = torch.randperm(len(COLOURS), generator=generator)[:count].tolist()
    return [(stickers[a], list(COLOURS)[b]) for a, b in zip(kinds, colours, strict=True)]


def box_for(
    generator: torch.Generator,
    sticker: str,
    shortest: float,
    longest: float,
    *,
    aspect: float | None = None,
) -> Box:
    """A box anywhere, its longer side in [shortest, longest], about as wide as the sticker is."""
    if aspect is None:
        aspect = aspect_ratio(sticker) * 1.2 ** uniform(generator, -1, 1)
    side = uniform(generator, shortest, longest)
    width, height = side * min(1, aspect), side * min(1, 1 / aspect)
    x0, y0 = uniform(generator, 0, 1 - width), uniform(generator, 0, 1 - height)
    return rounded(x0, y0, width, height)


def rounded(x0: float, y0: float, width: float, height: float) -> Box:
    return tuple(round(value, 2) for value in (x0, y0, x0 + width, y0 + height))


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def shared(one: Box, other: Box) -> float:
    """The share of the smaller box that is in both."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height) / min(area(one), area(other))


def overlap(boxes: list[Box]) -> bool:
    return any(shared(one, other) > 0 for one, other in combinations(boxes, 2))


def layout_of(
    generator: torch.Generator, things: list[Thing], boxes: list[Box], place: str | None = None
) -> Layout:
    place = one_of(generator, PLACES) if place is None else place
    stickers = [PlacedSticker(*thing, (0.0, 0.0), (0.0, 0.0)) for thing in things]
    prompts = [caption_of((sticker,), place, name_place=False) for sticker in stickers]
    return Layout(
        caption_of(tuple(stickers), place),
        background=place,
        layers=[Layer(prompt, box) for prompt, box in zip(prompts, boxes, strict=True)],
    )


if __name__ == "__main__":
    save_layouts(SHIPPED, list(layouts()))
    print(f"{SHIPPED.name}: {sum(count for count, _ in STRATA.values())} layouts")
