"""Stacks of layers: what they show, and the edits that leave pixels as they are."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lrd_helpers.layerdiff.stack import FURTHEST, LayerStack, StackError, StackLayer
from lrd_helpers.layout import LayoutError

WIDTH, HEIGHT = 8, 6


def pixels(seed: int, channels: int = 4) -> Image.Image:
    """Noise: every colour and alpha differs, also under what is transparent."""
    random = numpy.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, channels), dtype=numpy.uint8))


def block(colour: tuple[int, int, int, int], box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGBA", (WIDTH, HEIGHT))
    image.paste(colour, box)
    return image


def a_stack() -> LayerStack:
    """A car behind a star on black; they overlap in column 3 of the rows 2 and 3."""
    car = StackLayer("a red car", block((200, 0, 0, 255), (0, 2, 4, 4)))
    star = StackLayer("a yellow star", block((100, 200, 0, 102), (3, 0, 6, 6)), opacity=0.5)
    moon = StackLayer("a moon", block((255, 255, 255, 255), (0, 0, 8, 6)), hidden=True)
    return LayerStack(
        Image.new("RGB", (WIDTH, HEIGHT)),
        [car, star, moon],
        caption="a red car and a yellow star",
        background_prompt="at night",
    )


# ------------------------------------------------------------------ looking


def test_flatten_is_over_with_opacity_and_without_the_hidden():
    picture = a_stack().flatten()
    assert (picture.mode, picture.size) == ("RGB", (WIDTH, HEIGHT))
    assert picture.getpixel((0, 0)) == (0, 0, 0)
    assert picture.getpixel((0, 2)) == (200, 0, 0)
    # a = 0.5 · 102 / 255 = 0.2: 0.2 · (100, 200, 0), and 0.8 · what is behind.
    assert picture.getpixel((4, 2)) == (20, 40, 0)
    assert picture.getpixel((3, 2)) == (180, 40, 0)


def test_the_mask_and_box_of_a_layer_are_those_on_the_canvas():
    stack = a_stack()
    assert stack.layers[0].box == (0, 2 / 6, 4 / 8, 4 / 6)
    assert stack.layers[0].mask.pixels().sum() == 8
    assert stack.moved("a red car", (-0.25, 0.5)).layers[0].box == (0, 5 / 6, 2 / 8, 1)
    assert stack.layers[1].box is None  # an alpha of 102 is no object
    assert stack.moved(0, (1, 0)).layers[0].mask is None


def test_the_layout_has_the_layers_that_are_seen():
    layout = a_stack().layout()
    assert (layout.caption, layout.background) == ("a red car and a yellow star", "at night")
    assert [(layer.prompt, layer.box) for layer in layout.layers] == [
        ("a red car", (0, 2 / 6, 4 / 8, 4 / 6))
    ]
    with pytest.raises(LayoutError, match="layers is empty"):
        a_stack().without(0).layout()


def test_equal_pixels_are_equal_stacks_whatever_their_files_said():
    picture = pixels(0)
    marked = picture.copy()
    marked.info["dpi"] = (72, 72)
    assert StackLayer("x", picture) == StackLayer("x", marked)
    background = picture.convert("RGB")
    assert LayerStack(background, ()) == LayerStack(background, (), composite=None)
    composite = LayerStack(background, (), composite=picture).composite
    assert (composite.mode, composite.info) == ("RGB", {})


def test_sixteen_bits_are_scaled_not_cut_off():
    deep = Image.fromarray(numpy.full((HEIGHT, WIDTH), 2**15, dtype=numpy.uint16))
    assert StackLayer("x", deep).image.getpixel((0, 0)) == (128, 128, 128, 255)


# ------------------------------------------------------------------ edits


def test_an_edit_leaves_the_stack_as_it_is():
    stack = a_stack()
    stack.moved(0, (0.5, 0)).recoloured(0, "blue").without(1).changed(0, hidden=True)
    assert stack == a_stack()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(*[st.floats(-3, 3)] * 2), max_size=4))
def test_moved_there_and_back_it_is_what_it_was(moves):
    stack = LayerStack(pixels(0, 3), [StackLayer("a", pixels(1)), StackLayer("b", pixels(2))])
    there = stack
    for move in moves:
        there = there.moved("b", move)
    assert there.layers[1].image == stack.layers[1].image
    x, y = there.layers[1].offset
    assert there.moved("b", (-x / WIDTH, -y / HEIGHT)) == stack


def test_moved_pixels_are_the_same_in_another_place():
    image = pixels(1)
    layer = LayerStack(pixels(0, 3), [StackLayer("a", image)]).moved(0, (3 / 8, -2 / 6)).layers[0]
    assert layer.offset == (3, -2)
    shown, was = numpy.asarray(layer.shown()), numpy.asarray(image)
    assert (shown[:4, 3:] == was[2:, :5]).all()
    assert not shown[4:].any()
    assert not shown[:, :3].any()


def test_restacked_added_and_without():
    stack = a_stack()
    order = [layer.prompt for layer in stack.restacked([2, "a red car", -2]).layers]
    assert order == ["a moon", "a red car", "a yellow star"]
    assert stack.restacked(["a yellow star", 0, 2]).flatten().getpixel((3, 2)) == (200, 0, 0)
    assert stack.without("a red car").flatten().getpixel((3, 2)) == (20, 40, 0)
    removed = stack.layers[1]
    assert stack.without(1).added(removed, at=1) == stack
    assert stack.without(2).added(stack.layers[2]) == stack
    assert stack.changed(numpy.int64(2), hidden=False).flatten().getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize("old", ["red", "#123456", "white", "#777777", "hotpink"])
@pytest.mark.parametrize("new", ["lime", "#4060c0", "orange", "white", "black"])
def test_the_main_colour_becomes_the_wanted_colour_and_alpha_stays(old, new):
    image = Image.new("RGB", (WIDTH, HEIGHT), old)
    image.putalpha(pixels(3).getchannel("A"))
    image.putpixel((0, 0), (0, 0, 0, 255))
    stack = LayerStack(pixels(0, 3), [StackLayer("a", image)]).recoloured("a", new)
    after = stack.layers[0].image
    assert after.getchannel("A") == image.getchannel("A")
    assert after.getpixel((0, 0)) == (0, 0, 0, 255)
    wanted = Image.new("RGB", (1, 1), new).getpixel((0, 0))
    # PIL's hue has 256 steps: 6 levels of a channel.
    assert numpy.abs(numpy.array(after.getpixel((5, 5))[:3]) - wanted).max() <= 6


def test_shades_and_white_lights_stay_what_they_are_to_the_main_colour():
    image = block((200, 40, 40, 255), (0, 0, 8, 6))
    image.paste((100, 20, 20, 255), (0, 0, 2, 2))
    image.paste((255, 255, 255, 255), (2, 0, 4, 1))
    after = LayerStack(pixels(0, 3), [StackLayer("a", image)]).recoloured(0, "#28c828")
    assert after.layers[0].image.getpixel((7, 5)) == (40, 200, 40, 255)
    assert after.layers[0].image.getpixel((0, 0)) == (20, 100, 20, 255)
    assert after.layers[0].image.getpixel((2, 0)) == (255, 255, 255, 255)


# ------------------------------------------------------------------ what cannot be

IMAGE = pixels(1)
BLACK = block((9, 9, 9, 255), (0, 0, 8, 6))


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: StackLayer("a", "a.png"), "layer 'a': image is 'a.png', but should be one of PIL"),
        (lambda: StackLayer(5, IMAGE), "prompt is 5, but should be text"),
        (lambda: StackLayer("a\0", IMAGE), r"'\\x00' is no character to be read"),
        (lambda: StackLayer("a", IMAGE, opacity=1.01), "opacity is 1.01, but should be a number"),
        (lambda: StackLayer("a", IMAGE, opacity=float("nan")), "opacity is nan, but should be"),
        (lambda: StackLayer("a", IMAGE, opacity="1"), "opacity is '1', but should be"),
        (lambda: StackLayer("a", IMAGE, offset=(0.5, 0)), r"offset is \(0.5, 0\), but should be"),
        (lambda: StackLayer("a", IMAGE, offset=(0, FURTHEST + 1)), "at most 16777216 away"),
        (lambda: StackLayer("a", IMAGE, offset=3), "offset is 3, but should be two whole numbers"),
        (lambda: StackLayer("a", IMAGE, hidden="no"), "hidden is 'no', but should be True or"),
        (lambda: LayerStack(numpy.zeros(3), []), "background: the picture is an array of shape"),
        (lambda: LayerStack(IMAGE, ["a"]), "layer 0 is 'a', but should be a StackLayer"),
        (lambda: LayerStack(IMAGE, [], caption=None), "caption is None, but should be text"),
        (
            lambda: LayerStack(IMAGE.resize((4, 6)), [StackLayer("a", IMAGE)]),
            "layer 'a' is 8 × 6, but the background is 4 × 6; resize it",
        ),
        (
            lambda: LayerStack(IMAGE, [], composite=IMAGE.resize((4, 6))),
            "composite is 4 × 6, but the background is 8 × 6; resize it",
        ),
        (lambda: a_stack().number(3), r"there is no layer 3; the stack has 0 \(a red car\), 1 "),
        (lambda: a_stack().number(True), "no layer of the stack is True"),
        (lambda: a_stack().number("a read car"), "'a read car'; did you mean 'a red car'"),
        (lambda: LayerStack(IMAGE, []).number(0), "there is no layer 0; the stack has no layers"),
        (
            lambda: a_stack().changed(2, prompt="a red car").number("a red car"),
            r"'a red car' is the prompt of layers \[0, 2\]; give a number",
        ),
        (lambda: a_stack().restacked([0, 1]), r"the order \[0, 1\] should name each of 0 \(a red"),
        (lambda: a_stack().restacked([0, 1, "a red car"]), "should name each of"),
        (lambda: a_stack().added(a_stack().layers[0], at=4), "at is 4, but should be 0 to 3"),
        (lambda: a_stack().moved(0, 0.5), "by is 0.5, but should be two numbers"),
        (lambda: a_stack().moved(0, (0, float("inf"))), "should be two numbers"),
        (lambda: a_stack().moved(0, (1e9, 0)), "offset is .* at most 16777216 away"),
        (lambda: a_stack().recoloured(0, "rde"), "colour is 'rde', which is no colour name of CSS"),
        (lambda: a_stack().recoloured(1, "red"), "layer 'a yellow star' is empty: it has no c"),
        (
            lambda: a_stack().changed(0, image=BLACK).recoloured(0, "white"),
            "layer 'a red car' is black, and black stays black",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(make, fault):
    with pytest.raises(StackError, match=fault) as caught:
        make()
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)


def test_a_message_about_many_layers_is_short():
    stack = LayerStack(IMAGE, [StackLayer(f"{n} {'x' * 500}", IMAGE) for n in range(5)])
    with pytest.raises(StackError) as caught:
        stack.number(9)
    assert len(str(caught.value)) <= 300
