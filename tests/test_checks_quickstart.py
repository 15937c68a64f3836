"""Answers to the exercises of notebook 00, right ones and wrong ones."""

import numpy
import pytest
from test_checks import assert_diagnosed

from lrd_helpers.checks.quickstart import check_best_seed, check_star_in_front
from lrd_helpers.layout import Layer, Layout

HOUSE, STAR = (0.1, 0.2, 0.6, 0.8), (0.5, 0.5, 0.9, 0.9)
CAPTION = "a blue house and a yellow star on snow"


def layout(*layers, caption=CAPTION):
    return Layout(caption, background="on snow", layers=[Layer(*layer) for layer in layers])


def house(box=HOUSE):
    return ("a blue house", box)


def star(box=STAR):
    return ("a yellow star", box)


MASKED = Layout(
    CAPTION,
    layers=[Layer(*house()), Layer("a star", mask=numpy.tri(8, dtype=bool)[:, ::-1])],
)
LAYOUTS = [
    (layout(house(), star()), "✓"),
    (layout(house(), ("a red ball", (0, 0, 0.3, 0.3)), star()), "✓"),
    (layout(("a House,", HOUSE), ("one star", STAR)), "✓"),
    (MASKED, "✓"),
    (layout(star(), house()), "the house is in front of the star"),
    (layout(house(), star((0.65, 0.5, 0.9, 0.9))), "shapes that do not overlap"),
    (layout(house(), star((0.58, 0.5, 0.9, 0.9))), "shapes that hardly overlap"),
    (layout(house(), star((0.05, 0.1, 0.65, 0.9))), "hides nearly the whole house"),
    (layout(house()), "0 layers with a star"),
    (layout(star()), "0 layers with a house"),
    (layout(house(), star(), star()), "2 layers with a star"),
    (layout(("a starry house", HOUSE), ("a red ball", STAR)), "0 layers with a star"),
    (layout(house(), star(), caption="a yellow star on snow"), "without the house"),
    (layout(house(), star(), caption="a house on snow"), "without the star"),
    (CAPTION, "a str"),
    ([house(), star()], "a list"),
    (layout, "a function"),
]


@pytest.mark.parametrize(("answer", "said"), LAYOUTS)
def test_every_layout_is_diagnosed(answer, said, capsys):
    assert_diagnosed(check_star_in_front, answer, said, capsys)


@pytest.mark.parametrize("stub", [..., None])
def test_a_layout_that_is_not_there_yet(stub, capsys):
    check_star_in_front(stub)
    assert capsys.readouterr().out == "not implemented yet: star_in_front\n"


def by_loop(ious):
    best, most = None, -1.0
    for seed, values in ious.items():
        if min(values) > most:
            best, most = seed, min(values)
    return best


def consuming(ious):
    best = by_loop(ious)
    ious.clear()
    return best


FUNCTIONS = [
    (by_loop, "✓"),
    (lambda ious: sorted(ious, key=lambda seed: min(ious[seed]))[-1], "✓"),
    (lambda ious: max(ious, key=lambda seed: sum(ious[seed])), "the mean over the layers"),
    (lambda ious: max(ious, key=lambda seed: max(ious[seed])), "goes by the best layer"),
    (lambda ious: max(ious, key=ious.get), "goes by the first layer alone"),
    (lambda ious: sorted(ious, key=lambda seed: min(ious[seed]))[0], "finds the worst seed"),
    (lambda ious: max(map(min, ious.values())), "returns the IoU"),
    (lambda ious: [*ious].index(by_loop(ious)), "the place in the row"),
    (lambda ious: max(ious), "saw:      7"),
    (lambda ious: 0, "saw:      0"),
    (lambda ious: ious[by_loop(ious)], "a list"),
    (lambda ious: "8", "a str"),
    (consuming, "changed its arguments in place"),
    (lambda ious: max(ious, key=min), "it raised TypeError"),
]


@pytest.mark.parametrize(("answer", "said"), FUNCTIONS)
def test_every_choice_of_a_seed_is_diagnosed(answer, said, capsys):
    assert_diagnosed(check_best_seed, answer, said, capsys)
