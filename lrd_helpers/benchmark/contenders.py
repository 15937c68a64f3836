"""Who is compared: methods by name, with choices changed; functions; and the scene itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image

from lrd_helpers.benchmark.cost import Cost, measured
from lrd_helpers.benchmark.functions import Function, digest_of_function, drawn_by, kept
from lrd_helpers.benchmark.layouts import BenchmarkError, ground_truth_scene
from lrd_helpers.layout import Layout
from lrd_helpers.messages import excerpt
from lrd_helpers.methods import METHODS, Choices, Method, parsed
from lrd_helpers.methods.choices import NAMED
from lrd_helpers.methods.plain import CaptionMethod
from lrd_helpers.naming import object_of_layer
from lrd_helpers.pictures import picture_of
from lrd_helpers.storybook import render_scenes
from lrd_helpers.words import PromptTokens, layer_words

if TYPE_CHECKING:
    from lrd_helpers.pipeline import LayeredRenderingPipeline


@dataclass(frozen=True)
class GroundTruth:
    """Not a method: the scene itself. What the metrics say of it is the most they can say."""


Contender = Method | GroundTruth | Function

GROUND_TRUTH = "ground truth"
BEST = "collage"
"""Our best method: what the others are compared with."""


def methods_named(names: Iterable[str] = (*METHODS,)) -> dict[str, Contender]:
    """Methods by name, some of their choices changed.

    Args:
        names: as `lrd_helpers.methods.parsed` takes them.

    Raises:
        BenchmarkError: an unknown method, choice or value; lists what there is.
    """
    try:
        return {name: parsed(name) for name in names}
    except ValueError as error:
        raise BenchmarkError(str(error)) from None


# ------------------------------------------------------------------ ablations


def ablations(base: str = BEST) -> list[str]:
    """One factor at a time around a method, as names for `methods_named`.

    Every other name that a choice can have, no for yes, numbers at half and at twice what they are
    (shares at most 1); of ours also no ξ at all (or, where there is none, λ = 0.1). A choice that
    changes nothing there is left out.

    Raises:
        BenchmarkError: there is no such method.
    """
    [method], names = methods_named([base]).values(), []
    idle = _idle_choices(method) if isinstance(method, Choices) else ()
    for choice, value in vars(method).items():
        if choice in idle:
            continue
        for other in _alternatives(choice, value):
            with contextlib.suppress(ValueError):  # what does not go with the other choices
                replace(method, **{choice: other})
                text = f"{other:.4g}" if type(other) is float else str(other)
                names.append(f"{choice}={text}")
    if isinstance(method, Choices):
        names.append("inside=0,outside=0" if method.guided else "inside=0.1,outside=0.1")
    return names if base == BEST else [f"{base},{name}" for name in names]


def with_and_without_background() -> list[str]:
    """The methods that can have the background in their layers' prompts, each with and without."""
    names = []
    for name, method in METHODS.items():
        there = vars(method).get("background_in_prompts")
        if there is not None:
            other = f"background_in_prompts={not there}"
            names += [name, other if name == BEST else f"{name},{other}"]
    return names


def _idle_choices(method: Choices) -> set[str]:
    """The choices that change nothing beside the others; and `attention`, which is for experts."""
    idle = {"attention"}
    if not method.guided:
        idle |= {"delta", "inside", "outside", "guide", "early_repeats", "top_k", "weighted"}
    if not method.looks:
        idle |= {"top_k", "weighted"}
    if method.guide == "steps":
        idle |= {"early_repeats"}
    if method.fuse != "collage":
        idle |= {"sketch_steps"}
    return idle


def _alternatives(choice: str, value: Any) -> list[Any]:
    if choice in NAMED:
        return [name for name in get_args(NAMED[choice]) if name != value]
    if isinstance(value, bool):
        return [not value]
    if not isinstance(value, (int, float)):
        return []
    if choice == "layered_fraction":
        return sorted({value / 2, min(1.0, 2 * value)} - {value})
    if choice == "early_repeats" and not value:
        return [METHODS["authors"].early_repeats]
    others = [number for number in (value / 2, 2 * value) if number != value]
    return [max(1, round(other)) for other in others] if isinstance(value, int) else others


# ------------------------------------------------------------------ their pictures


def drawn(
    pipe: LayeredRenderingPipeline,
    method: Contender,
    layouts: Sequence[Layout],
    generators: Sequence[torch.Generator],
    **options: Any,
) -> tuple[list[Image.Image], list[Cost]]:
    """The layouts' pictures and what each took; drawn as one batch where the method can.

    In a batch, seconds and memory are those of the batch, divided by its pictures.

    Raises:
        ContenderError: a function that raises something, gives no such picture, or changes what it
            was given.
    """
    if isinstance(method, GroundTruth):
        scenes = [ground_truth_scene(layout) for layout in layouts]
        images = render_scenes(scenes).images
        return [picture_of(image) for image in images], [Cost() for _ in scenes]
    images, costs = [], []
    if not isinstance(method, Method):
        for layout, generator in zip(layouts, generators, strict=True):
            with kept(pipe), measured(pipe, 1) as cost:
                images.append(drawn_by(method, pipe, layout, generator, **options))
            costs += cost
        return images, costs
    size = len(layouts) if method.batched else 1
    for first in range(0, len(layouts), size):
        part = list(layouts[first : first + size])
        chance = list(generators[first : first + size])
        with measured(pipe, len(part)) as of_part:
            images += pipe(part, method=method, generator=chance, **options).images
        costs += of_part
    return images, costs


def check_captions(
    pipe: LayeredRenderingPipeline, layout: Layout, methods: Mapping[str, Contender]
) -> None:
    """Refuse a layout of which a metric or a method cannot say what words name its layers.

    Raises:
        BenchmarkError: names the layer, and the method that needs each layer in the caption.
    """
    for number, layer in enumerate(layout.layers, start=1):
        try:
            object_of_layer(layer)  # leakage looks for it
        except ValueError as error:
            raise BenchmarkError(f"layer {number}: {error}") from None
    names = [name for name, method in methods.items() if isinstance(method, CaptionMethod)]
    if names:
        try:
            layer_words(layout, PromptTokens.encode(pipe.tokenizer, layout.caption))
        except ValueError as error:
            raise BenchmarkError(f"method {excerpt(names[0])}: {error}") from None


def choices_of(method: Contender) -> dict[str, Any]:
    """What a method is, as the settings of a folder keep it."""
    if not isinstance(method, (Method, GroundTruth)):
        return {"kind": type(method).__name__, "source": digest_of_function(method)}
    return {"kind": type(method).__name__, **asdict(method)}
