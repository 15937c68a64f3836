"""The exercises of notebook 00: a star before a house, the best seed, another program's boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.checks import Mistake, check_function, explain
from lrd_helpers.layout import Layout
from lrd_helpers.naming import WORD

GRID = 64
"""Shapes are compared on so many × so many cells."""

LEAST_SHARED = 0.1
"""So much of the smaller shape must be shared, or one cannot see which is in front."""

LEAST_VISIBLE = 0.2
"""So much of the house must be left to see."""


def check_star_in_front(layout: Any) -> None:
    """Exercise 1: a layout of a house and a star that stands in front of it. Never raises."""
    name = "star_in_front"
    if layout is None or layout is ...:
        print(f"not implemented yet: {name}")
        return
    if not isinstance(layout, Layout):
        explain(
            name,
            f"a {type(layout).__name__}",
            "a Layout",
            "begin as above: Layout(caption=…, background=…, layers=[Layer(…), Layer(…)])",
        )
        return
    if fault := _fault(layout):
        explain(name, *fault)
        return
    print(f"✓ {name}: right. Look at it: look(picture({name}))")


def _fault(layout: Layout) -> tuple[str, str, str] | None:
    """What was seen and expected and what helps, or None where the star is in front."""
    places = {
        noun: [i for i, layer in enumerate(layout.layers) if noun in _words(layer.prompt)]
        for noun in ("star", "house")
    }
    for noun, indices in places.items():
        if len(indices) != 1:
            prompts = ", ".join(repr(layer.prompt) for layer in layout.layers)
            return (
                f"{len(indices)} layers with a {noun}; the prompts are {prompts}",
                f"exactly one layer with a {noun}",
                f"one Layer(…) an object, its prompt says what it is: 'a yellow {noun}'",
            )
    for noun in places:
        if noun not in _words(layout.caption):
            return (
                f"the caption {layout.caption!r}, without the {noun}",
                "a caption that speaks of the whole picture",
                "the last steps read the caption alone: it has to name every object",
            )
    [star], [house] = places.values()
    star_cells, house_cells = (layout.layers[i].cells(GRID, GRID) for i in (star, house))
    shared = (star_cells & house_cells).sum() / min(star_cells.sum(), house_cells.sum())
    if shared < LEAST_SHARED:
        return (
            "shapes that hardly overlap" if shared else "shapes that do not overlap",
            "boxes that share a part of the picture: only there is one in front of the other",
            "(x0, y0, x1, y1): left, top, right, bottom; let the star begin before the house ends",
        )
    if star < house:
        return (
            "the house is in front of the star",
            "the star in front of the house",
            "layers are like sheets of paper laid on each other: the last of the list is on top",
        )
    if (house_cells & ~star_cells).sum() / house_cells.sum() < LEAST_VISIBLE:
        return (
            "a star that hides nearly the whole house",
            "a house of which one sees something",
            "make the star's box smaller, or move it to the house's corner",
        )
    return None


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


CASES: list[tuple[dict[int, list[float]]]] = [
    ({3: [0.95, 0.1], 8: [0.6, 0.5], 5: [0.8, 0.4], 1: [0.05, 0.7]},),
    ({0: [0.8, 0.7, 0.0], 4: [0.4, 0.3, 0.5], 7: [0.2, 0.9, 0.6], 2: [0.1, 0.1, 0.1]},),
    ({11: [0.7], 12: [0.6], 10: [0.8]},),
]


def check_best_seed(function: Callable[..., Any]) -> None:
    """Exercise 2, `best_seed(ious)`: the seed whose worst layer is placed best."""

    def chosen(score: Callable[[list[float]], float]) -> Callable[..., int]:
        return lambda ious: max(ious, key=lambda seed: score(ious[seed]))

    best = chosen(min)
    check_function(
        function,
        best,
        CASES,
        expected="the seed with the largest min(ious[seed])",
        hint="two questions: how good is one seed (its worst layer)? Which seed has the most?",
        mistakes=[
            Mistake(
                "it takes the mean over the layers: a missing object can hide behind a good one",
                "a picture is as good as its worst layer: min(ious[seed])",
                chosen(lambda values: sum(values) / len(values)),
            ),
            Mistake(
                "it goes by the best layer of each picture",
                "a picture is as good as its worst layer: min, not max, over the layers",
                chosen(max),
            ),
            Mistake(
                "it goes by the first layer alone",
                "all layers count: min(ious[seed])",
                chosen(lambda values: values[0]),
            ),
            Mistake(
                "it returns the IoU, not the seed",
                "max(ious, key=…) gives the key of the dictionary, which is the seed",
                lambda ious: min(ious[best(ious)]),
            ),
        ],
    )


def check_corners(function: Callable[..., Any]) -> None:
    """Exercise 3, `corners(box)`: left, top, width, height become left, top, right, bottom."""

    @wraps(function)
    def numbers(box: tuple[float, ...]) -> Any:
        answer = function(box)
        return torch.tensor(answer) if isinstance(answer, Sequence) else answer

    def version(right: Callable[..., Sequence[float]]) -> Callable[..., Tensor]:
        return lambda box: torch.tensor(right(*box))

    check_function(
        numbers,
        version(lambda x, y, w, h: (x, y, x + w, y + h)),
        [((0.05, 0.1, 0.45, 0.6),), ((0.35, 0.4, 0.55, 0.5),), ((0.7, 0.1, 0.2, 0.3),)],
        expected="left, top, right, bottom of the friend's box",
        hint="look at a box that is too small: which of its four sides are where they should be?",
        axes=("place",),
        mistakes=[
            Mistake(
                "it returns the friend's numbers as they are",
                "left and top are right already; what must be done to the other two?",
                version(lambda x, y, w, h: (x, y, w, h)),
            ),
            Mistake(
                "it takes the first two numbers for the middle of the box",
                "the upper left corners agree on both canvases: they are no middles",
                version(lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2)),
            ),
            Mistake(
                "the last two numbers have changed places",
                "the house is higher than wide: which of the two belongs to which side?",
                version(lambda x, y, w, h: (x, y, x + h, y + w)),
            ),
            Mistake(
                "it subtracts left and top where it should add them",
                "the box gets smaller still; it should become larger",
                version(lambda x, y, w, h: (x, y, w - x, h - y)),
            ),
        ],
    )
