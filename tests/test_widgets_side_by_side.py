"""The blinded comparison: what it shows, what it counts, and that it does not tell too early."""

import math

import numpy
import pytest
import torch
from PIL import Image

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.pictures import data_uri
from lrd_helpers.widgets import SideBySide, shuffled_pairs, sign_test

LAYOUTS = [
    Layout(f"a {colour} ball", layers=[Layer(f"a {colour} ball", box=(0.1, 0.2, 0.5, 0.6))])
    for colour in ("red", "blue", "green", "pink", "white", "orange")
]


def pictures(shade):
    return [Image.new("RGB", (8, 8), (shade, 40 * number, 0)) for number in range(len(LAYOUTS))]


def pairs(seed=0):
    both = {"ours": pictures(250), "theirs": pictures(10)}
    return shuffled_pairs(LAYOUTS, both, torch.Generator().manual_seed(seed))


def shade(image):
    return {250: "ours", 10: "theirs"}[image.getpixel((0, 0))[0]]


def test_pairs_hold_what_they_say_in_another_order_on_random_sides():
    shuffled = pairs()
    assert sorted(pair.layout.caption for pair in shuffled) == sorted(
        layout.caption for layout in LAYOUTS
    )
    assert [pair.layout for pair in shuffled] != LAYOUTS
    assert {pair.methods for pair in shuffled} == {("ours", "theirs"), ("theirs", "ours")}
    for pair in shuffled:
        assert tuple(map(shade, pair.images)) == pair.methods
        number = LAYOUTS.index(pair.layout)
        assert all(image.getpixel((0, 0))[1] == 40 * number for image in pair.images)


def test_the_same_generator_gives_the_same_pairs():
    told = [[(pair.layout.caption, pair.methods) for pair in pairs(seed)] for seed in (1, 1, 2)]
    assert told[0] == told[1] != told[2]


def test_pictures_that_cannot_be_compared():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="pictures of 1 methods, but two"):
        shuffled_pairs(LAYOUTS, {"ours": pictures(1)}, generator)
    with pytest.raises(ValueError, match="'theirs': 1 pictures, but there are 6 layouts"):
        shuffled_pairs(LAYOUTS, {"ours": pictures(1), "theirs": pictures(1)[:1]}, generator)
    with pytest.raises(ValueError, match="there are no pairs"):
        SideBySide([])


def test_before_the_end_nobody_is_named():
    judge = SideBySide(pairs())
    for number, pair in enumerate(judge.pairs, start=1):
        page = judge._page.value
        assert f"Pair {number} of 6" in page
        assert pair.layout.caption in page
        assert page.index(data_uri(pair.images[0])) < page.index(data_uri(pair.images[1]))
        assert "ours" not in page
        assert "theirs" not in page
        assert 'role="status"' in page
        judge.answer("left")
    assert "ours" in judge._page.value


def test_answers_are_counted_by_method():
    judge = SideBySide(pairs())
    for pair in judge.pairs[:4]:
        judge.answer("left" if pair.methods[0] == "ours" else "right")
    judge.answer("no difference")
    assert judge.counts == {"ours": 4, "theirs": 0, "no difference": 1}
    judge.answer("left" if judge.pairs[5].methods[0] == "theirs" else "right")
    assert judge.counts == {"ours": 4, "theirs": 1, "no difference": 1}
    assert "ours 4, theirs 1, no difference 1" in judge._page.value
    assert f"probability {sign_test(4, 1):.2f}" in judge._page.value
    assert repr(judge) == "SideBySide(6 pairs, 6 judged)"


def test_the_buttons_answer_and_take_back():
    judge = SideBySide(pairs())
    left, neither, right = judge._buttons
    assert judge._again.disabled
    for button in (right, neither, left):
        button.click()
    assert judge.answers == ["right", "no difference", "left"]
    judge._again.click()
    assert judge.answers == ["right", "no difference"]
    assert "Pair 3 of 6" in judge._page.value


def test_after_the_last_pair_only_back_is_left():
    judge = SideBySide(pairs())
    for _ in judge.pairs:
        judge.answer("no difference")
    assert all(button.disabled for button in judge._buttons)
    assert "probability 1.00" in judge._page.value
    judge.answer("left")
    assert len(judge.answers) == 6
    judge.back()
    assert not any(button.disabled for button in judge._buttons)


def test_another_answer_is_refused():
    with pytest.raises(ValueError, match="'both', but should be one of left, no difference, right"):
        SideBySide(pairs()).answer("both")


def test_large_pictures_are_reduced():
    noise = numpy.random.default_rng(0).integers(0, 256, (1500, 1500, 3), numpy.uint8)
    both = {"ours": [noise], "theirs": [noise]}
    judge = SideBySide(shuffled_pairs(LAYOUTS[:1], both, torch.Generator()))
    assert judge.pairs[0].images[0].size == (1500, 1500)
    assert len(judge._page.value) < 7e5


def test_the_captions_are_escaped():
    layout = Layout("a <b>ball</b>", layers=[Layer("a ball", box=(0, 0, 1, 1))])
    both = {"<i>": [Image.new("RGB", (8, 8))], "b": [Image.new("RGB", (8, 8))]}
    judge = SideBySide(shuffled_pairs([layout], both, torch.Generator().manual_seed(0)))
    assert "<b>" not in judge._page.value
    judge.answer("left")
    assert "<b>" not in judge._page.value
    assert "<i>" not in judge._page.value


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (8, 2), (2, 8), (0, 9)])
def test_the_sign_test_counts_coins(wins, losses):
    n, far = wins + losses, abs(wins - losses)
    expected = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= far) / 2**n
    assert sign_test(wins, losses) == pytest.approx(expected)
