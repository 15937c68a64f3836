"""What one picture leaves for the next: the same pictures, and fewer questions to the U-Net."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.pipeline import LayeredRenderingXLPipeline
from lrd_helpers.sampling.memory import Memory, digest
from lrd_helpers.widgets import Settings, render

CARS = Layout(
    caption="a red car and a yellow star at night",
    background="at night",
    layers=[Layer("a red car", box=(0, 0.5, 0.5, 1)), Layer("a yellow star", box=(0.5, 0, 1, 0.5))],
)
QUICK = Settings(steps=5, layered_fraction=0.8)
# So many rows are asked for a layer: in ten steps with and without its prompt, then its relevance
# in two noises. What has no prompt is the same for all layers in the first step.
LAYER = 10 * 2 - 1 + 2 * 2
ALL = 2 * LAYER + 10 * 2  # and the background
PROBE = 1


@pytest.fixture
def rows(pipe):
    """So many rows the U-Net is asked."""
    asked = []
    with_hook = pipe.unet.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    yield asked
    with_hook.remove()


def moved(layout):
    return replace(
        layout, layers=[replace(layout.layers[0], box=(0.25, 0.5, 0.75, 1)), CARS.layers[1]]
    )


def other_prompt(layout):
    return replace(layout, layers=[layout.layers[0], replace(CARS.layers[1], prompt="a blue boat")])


@pytest.mark.parametrize(
    ("layout", "settings", "drawn_anew"),
    [
        (moved(CARS), replace(QUICK, steps=10), 0),
        (replace(CARS, caption="a car"), QUICK, 0),
        (other_prompt(CARS), QUICK, LAYER),
        (CARS, replace(QUICK, seed=1), ALL),
    ],
    ids=["a box, in more steps", "the caption", "a prompt", "the seed"],
)
def test_what_stayed_is_not_asked_again_and_the_picture_is_the_same(
    pipe, rows, layout, settings, drawn_anew
):
    memory = Memory()
    render(CARS, pipe, QUICK, memory=memory)
    rows.clear()
    kept = render(layout, pipe, settings, memory=memory)
    finish = 2 * (settings.steps // 5)
    assert sum(rows) == PROBE + drawn_anew + finish, "the probe, what is new, and the last steps"
    fresh = render(layout, pipe, settings)
    difference = numpy.subtract(kept.image, fresh.image, dtype=int)
    assert abs(difference).max() <= 1
    for word, where in fresh.attention.items():
        torch.testing.assert_close(kept.attention[word], where)


def stronger(pipe):
    pipe.unet.conv_out.weight.data *= 1.5  # behind the back of PyTorch's version counters


def another_decoder(pipe):
    pipe.vae.decoder.conv_out.bias.data += 0.25


def other_texts(pipe):
    next(pipe.text_encoder.parameters()).data *= 1.5


@pytest.mark.parametrize("change", [stronger, another_decoder, other_texts])
def test_another_model_finds_nothing_of_the_model_before(pipe, change):
    parts = pipe.unet, pipe.vae, pipe.text_encoder
    before = [{name: v.clone() for name, v in part.state_dict().items()} for part in parts]
    memory = Memory()
    try:
        first = render(CARS, pipe, QUICK, memory=memory)
        change(pipe)
        kept, fresh = (render(CARS, pipe, QUICK, memory=m).image for m in (memory, None))
    finally:  # all tests share the models
        for part, state in zip(parts, before, strict=True):
            part.load_state_dict(state)
    assert kept.tobytes() == fresh.tobytes() != first.image.tobytes()


def test_it_also_works_with_xl(tiny_xl):
    pipe = LayeredRenderingXLPipeline(**tiny_xl.components)
    memory = Memory()
    render(CARS, pipe, QUICK, memory=memory)
    size = memory.size
    again, fresh = (render(moved(CARS), pipe, QUICK, memory=m).image for m in (memory, None))
    assert memory.size == size > 0, "nothing new was asked"
    assert abs(numpy.subtract(again, fresh, dtype=int)).max() <= 1


def test_what_is_looked_at_is_always_asked(pipe):
    layout = replace(CARS, caption="a red car at night")  # a sketch's prompt, too
    memory, maps = Memory(), []
    for _ in range(2):
        maps.append(render(layout, pipe, QUICK, memory=memory).attention["car"])
    torch.testing.assert_close(*maps)


def test_a_render_that_was_cancelled_is_gone_on_with(pipe, rows):
    memory = Memory()
    assert render(CARS, pipe, QUICK, memory=memory, on_step=lambda share: share < 0.5) is None
    before = sum(rows)
    render(CARS, pipe, QUICK, memory=memory)
    assert before > PROBE
    assert sum(rows) == 2 * PROBE + ALL + 2, "the probe twice, the rest once"


def test_it_is_bounded_and_the_oldest_goes_first():
    memory, asked = Memory(most=3 * 8), []

    def ask(numbers):
        asked.append(numbers)
        return torch.zeros(len(numbers), 2)

    keys = [digest(n) for n in range(4)]
    memory.answers(keys[:3], ask)
    memory.answers([keys[0], None, keys[3], keys[3]], ask)
    assert memory.size == 3 * 8
    memory.answers([keys[0], keys[2], keys[1]], ask)
    assert asked == [[0, 1, 2], [1, 2], [2]]


def test_a_digest_is_that_of_the_value_alone():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]])
    assert digest(one, {"a": [one]}) == digest(one.clone(), {"a": [one.clone()]})
    different = [one, two, one.double(), one.half(), [one], [1.0, 2.0], "1", 1, None, (None,)]
    assert len({digest(value) for value in different}) == len(different)
