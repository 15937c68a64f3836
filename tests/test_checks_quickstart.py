"""Layouts as answers to exercise 1 of notebook 00, right ones and wrong ones."""

import numpy
import pytest
from test_checks import assert_rejected

from lrd_helpers.checks.quickstart import check_star_in_front
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
RIGHT = [
    layout(house(), star()),
    layout(house(), ("a red ball", (0, 0, 0.3, 0.3)), star()),
    layout(("a House,", HOUSE), ("one star.", STAR)),
    MASKED,
]
WRONG = [
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


@pytest.mark.parametrize("answer", RIGHT)
def test_a_star_in_front_of_a_house_is_right(answer, capsys):
    check_star_in_front(answer)
    assert capsys.readouterr().out.startswith("✓ ")


@pytest.mark.parametrize(("answer", "message"), WRONG)
def test_what_is_wrong_with_a_layout_is_said(answer, message, capsys):
    check_star_in_front(answer)
    assert_rejected(capsys.readouterr().out, message)


@pytest.mark.parametrize("stub", [..., None])
def test_a_layout_that_is_not_there_yet(stub, capsys):
    check_star_in_front(stub)
    assert capsys.readouterr().out == "not implemented yet: star_in_front\n"
