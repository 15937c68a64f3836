"""The benchmark's methods and functions: names, ablations, faults, what their pictures cost."""

import warnings
from dataclasses import asdict, replace
from functools import partial

import numpy
import pytest
import torch
from benchmark_examples import CAR, TWO
from PIL import Image

from lrd_helpers.benchmark import (
    BenchmarkError,
    ContenderError,
    ablations,
    drawn,
    methods_named,
    noise_of,
    with_and_without_background,
)
from lrd_helpers.benchmark.functions import digest_of_function
from lrd_helpers.layout import Layout
from lrd_helpers.methods import METHODS, LayeredRendering
from lrd_helpers.methods.boxdiff import BoxDiff
from lrd_helpers.methods.layout_guidance import LayoutGuidance

PRESETS = [name for name, m in METHODS.items() if isinstance(m, LayeredRendering)]


def test_methods_have_names_and_changes() -> None:
    assert methods_named() == METHODS
    assert len(methods_named()) >= 9
    collage = METHODS["collage"]
    assert methods_named(["fuse=once", "paper,inside=1,outside=0.5", "boxdiff,strength=10"]) == {
        "fuse=once": replace(collage, fuse="once"),
        "paper,inside=1,outside=0.5": replace(METHODS["paper"], inside=1.0, outside=0.5),
        "boxdiff,strength=10": BoxDiff(strength=10.0),
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "there is no method 'best'; there are collage, lrdiff, paper, authors"),
        ("fuze=once", "collage has no choice 'fuze'; it has delta, inside, outside"),
        ("plain,inside=1", "plain has no choice 'inside'; it has none"),
        ("fuse=sometimes", "fuse is 'sometimes', but should be one of steps, once, collage"),
        ("inside=much", "inside is 'much', but should be a number"),
        ("top_k=1.5", "top_k is '1.5', but should be a whole number"),
        ("negative_objects=1", "negative_objects is '1', but should be True or False"),
        ("layered_fraction=2", "layered_fraction is 2.0, but should be between 0"),
        ("x" * 200_000, "has 200000 signs, but a method has at most 500"),
        ("x" * 500, "there is no method 'xxx"),
        ("\ud800", r"there is no method '\ud800'; there are collage"),
        ("x" * 400 + "=1", "collage has no choice 'xxx"),
        ("fuse=" + "x" * 400, "fuse is 'xxx"),
        ("top_k=" + "9" * 400, "top_k is '999"),
        ("inside=" + "9" * 400, "inside is '999"),
        ("inside=" + "-" * 400 + "1", "inside is '---"),
        ("inside=" + "(" * 400, "inside is '((("),
        ("inside=\0", r"inside is '\x00', but should be a number"),
        ("inside=1e999", "inside is inf, but should be a finite number"),
    ],
)
def test_methods_that_do_not_exist(name, message) -> None:
    with pytest.raises(BenchmarkError) as error:
        methods_named([name])
    assert message in str(error.value)
    assert len(str(error.value)) <= 300
    assert str(error.value).isprintable()


@pytest.mark.parametrize("base", PRESETS)
def test_ablations_change_one_choice_at_a_time(base) -> None:
    names = ablations(base)
    changed = []
    for method in methods_named(names).values():
        now = asdict(method)
        changed.append(
            {name for name, value in asdict(METHODS[base]).items() if now[name] != value}
        )
    assert changed[-1] <= {"inside", "outside"}
    assert all(len(choices) == 1 for choices in changed[:-1])
    every = set.union(*changed)
    assert every >= {"inside", "fuse", "layered_fraction", "overlap"}
    guided = METHODS[base].inside or METHODS[base].outside
    assert ({"delta", "guide"} <= every) == bool(guided), "without ξ they change nothing"
    assert every >= {"negative_objects", "background_in_prompts"}
    assert ("top_k" in every) == METHODS[base].looks, "where it changes something"
    assert len(set(names)) == len(names)


def test_ablations_of_others_and_of_the_background() -> None:
    assert ablations("multidiffusion") == [
        "multidiffusion,bootstrapping=0.1",
        "multidiffusion,bootstrapping=0.4",
        "multidiffusion,background_in_prompts=True",
    ]
    assert ablations("plain") == []
    with pytest.raises(BenchmarkError, match="there is no method 'best'"):
        ablations("best")
    names = with_and_without_background()
    methods = methods_named(names)
    assert len(methods) == len(names) == 2 * len({*PRESETS, "multidiffusion"})
    assert {*PRESETS, "multidiffusion"} <= set(names)
    for first, second in zip(*[iter(methods.values())] * 2, strict=True):
        other = not first.background_in_prompts
        assert second == replace(first, background_in_prompts=other)


def test_every_ablation_runs(pipe) -> None:
    names = ablations("lrdiff")
    methods = methods_named([*names, *with_and_without_background()])
    pictures = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name, method in methods.items():
            if getattr(method, "looks", False):
                method = replace(method, top_k=2)  # there are 16 positions
            if getattr(method, "fuse", "") == "collage":
                method = replace(method, sketch_steps=2)
            options = {"num_inference_steps": 2, "guidance_scale": 3.0}
            [picture], [cost] = drawn(pipe, method, [TWO], [noise_of("two", 0)], **options)
            pictures[name] = numpy.asarray(picture)
            assert cost.unet_calls > 0
    assert len({picture.tobytes() for picture in pictures.values()}) > len(names) / 2


# ------------------------------------------------------------------ functions


def grey(pipe, layout, generator, **options):
    return torch.full((3, 32, 32), 0.5)


def fault_of(pipe, function) -> str:
    with pytest.raises(ContenderError) as error:
        drawn(pipe, function, [TWO], [noise_of("two", 0)], num_inference_steps=2)
    assert len(str(error.value)) <= 250
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_function_draws_from_the_noise_and_with_the_options_of_methods(pipe) -> None:
    def mine(pipe, layout, generator, *, num_inference_steps, guidance_scale):
        noise = torch.randn(1, 4, 4, 4, generator=generator)
        options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return pipe(layout, method="plain", latents=noise, **options).images[0]

    options = {"num_inference_steps": 4, "guidance_scale": 3.0}
    noise = [[noise_of("car", 1), noise_of("two", 1)] for _ in range(2)]
    ours, costs = drawn(pipe, mine, [CAR, TWO], noise[0], **options)
    theirs, plain = drawn(pipe, METHODS["plain"], [CAR, TWO], noise[1], **options)
    # The method draws both at once, which may round a level differently.
    for picture, other in zip(ours, theirs, strict=True):
        levels = numpy.asarray(picture, int) - numpy.asarray(other, int)
        assert abs(levels).max() <= 1
    assert [cost.unet_calls for cost in costs] == [cost.unet_calls for cost in plain] == [8, 8]
    [picture], _ = drawn(pipe, grey, [CAR], [noise_of("car", 0)], **options)
    assert picture.getpixel((3, 4)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(32, 32, 3), "a tensor of shape (32, 32, 3) and torch.float32"),
        (torch.zeros(1, 3, 32, 32), "a tensor of shape (1, 3, 32, 32)"),
        (
            torch.zeros(3, 32, 32, dtype=torch.uint8),
            "a tensor of shape (3, 32, 32) and torch.uint8",
        ),
        (torch.full((3, 32, 32), torch.nan), "a tensor with NaN or infinite numbers"),
        (torch.full((3, 32, 32), -1.0), "a tensor with numbers from -1 to -1"),
        (torch.full((3, 32, 32), 128.0), "a tensor with numbers from 128 to 128"),
        (Image.new("RGB", (32, 48)), "an image of 32 × 48"),
        (None, "None, but should give a PIL image of 32 × 32, or a tensor of floats (3, 32, 32)"),
        ("x" * 1000, "'xxx"),
    ],
)
def test_a_function_that_gives_no_such_picture(pipe, given, message) -> None:
    assert f"it gave {message}" in fault_of(pipe, lambda *arguments, **options: given)


def test_a_function_that_raises_or_changes_what_it_is_given(pipe) -> None:
    weights = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    parts = dict(pipe.components)

    def raises(pipe, layout, generator, **options):
        pipe.unet.conv_in.bias.data.add_(1)
        raise ZeroDivisionError("one\nby none " + "x" * 500)

    def trains(pipe, layout, generator, **options):
        pipe.unet.train().conv_in.bias.data.add_(1)
        return grey(pipe, layout, generator)

    def exchanges(pipe, layout, generator, **options):
        pipe.scheduler = None
        return grey(pipe, layout, generator)

    def moves(pipe, layout, generator, **options):
        object.__setattr__(layout, "caption", "a boat")
        return grey(pipe, layout, generator)

    for function, message in (
        (raises, "it raised ZeroDivisionError: one by none xxx"),
        (trains, "it changed the weights of unet, which all contenders share; that was put back"),
        (exchanges, "it changed scheduler, which all contenders share"),
        (moves, "it changed the layout that it was given"),
        (lambda pipe: None, "it raised TypeError: "),
    ):
        assert message in fault_of(pipe, function)
        assert all(torch.equal(weights[key], now) for key, now in pipe.unet.state_dict().items())
        assert pipe.components == parts
        assert not pipe.unet.training
        assert not pipe.unet._forward_pre_hooks
    assert TWO.caption.startswith("a red car")


def test_a_function_is_known_by_what_it_does() -> None:
    def made(strength, helper):
        def draw(pipe, layout, generator, bias=0.0, **options):
            return helper(strength + bias)

        return draw

    def double(x):
        return 2 * x

    def triple(x):
        return 3 * x

    first = made(0.5, double)
    assert digest_of_function(first) == digest_of_function(made(0.5, double))
    others = [made(0.25, double), made(0.5, triple), partial(first, bias=1.0), grey, double, triple]
    others += [partial(first, bias=2.0), lambda *arguments: None]
    assert len({digest_of_function(each) for each in [first, *others]}) == 1 + len(others)
    for text in ("x + 1", "x + 1", "x - 1"):  # without a source that can be read
        exec(f"def typed(x): return {text}", names := {})
        others.append(digest_of_function(names["typed"]))
    assert others[-3] == others[-2] != others[-1]


# ------------------------------------------------------------------ what a picture costs


def costs(pipe, method: object, *layouts: Layout, steps: int = 5) -> list[tuple[int, int]]:
    noise = [noise_of(layout.caption, 0) for layout in layouts]
    images, costs = drawn(pipe, method, layouts, noise, num_inference_steps=steps)
    assert len(images) == len(layouts)
    assert all(cost.seconds > 0 for cost in costs)
    assert not pipe.unet._forward_pre_hooks
    return [(cost.unet_calls, cost.backward_passes) for cost in costs]


def test_calls_and_backward_passes_are_counted(pipe) -> None:
    assert costs(pipe, METHODS["plain"], CAR, TWO) == [(10, 0), (10, 0)]
    # a background and one or two layers
    assert costs(pipe, METHODS["multidiffusion"], CAR, TWO) == [(20, 0), (30, 0)]
    # 40 % of 5 steps with 3 moves each, of a call and a backward pass
    guided = LayoutGuidance(strength=0.0, steps=0.4, repeats=3, threshold=0.0)
    assert costs(pipe, guided, TWO) == [(10 + 6, 6)]
    # 60 % of 5 steps with a move each
    assert costs(pipe, BoxDiff(steps=0.6, refinements=0), TWO) == [(10 + 3, 3)]


def test_a_picture_counts_the_same_in_a_batch(pipe) -> None:
    for method in (METHODS["collage"], replace(METHODS["paper"], top_k=4)):
        together = costs(pipe, method, CAR, TWO)
        assert together == [*costs(pipe, method, CAR), *costs(pipe, method, TWO)]
        assert together[0][0] < together[1][0]
    layered = replace(METHODS["collage"], layered_fraction=0.0)
    assert costs(pipe, layered, CAR, TWO) == [(10, 0), (10, 0)]
