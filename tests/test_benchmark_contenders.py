"""The benchmark's methods: their names, their ablations, and what their pictures cost."""

from dataclasses import asdict, replace

import pytest
from benchmark_examples import CAR, TWO

from lrd_helpers.benchmark import BenchmarkError, ablations, drawn, methods_named, noise_of
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
