"""Who is compared: the methods by name, with choices changed, and the scene itself."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image

from lrd_helpers.attention import PromptTokens
from lrd_helpers.baselines import (
    BASELINES,
    Baseline,
    BoxDiff,
    LayoutGuidance,
    PaintWithWords,
    draw,
)
from lrd_helpers.benchmark.cost import Cost, measured
from lrd_helpers.benchmark.layouts import BenchmarkError, ground_truth_scene
from lrd_helpers.caption import layer_words
from lrd_helpers.layout import Layout
from lrd_helpers.method import CHOICES, METHODS, Method
from lrd_helpers.plotting import as_image
from lrd_helpers.storybook import render_scenes

if TYPE_CHECKING:
    from lrd_helpers.rendering import LayeredRenderingPipeline


@dataclass(frozen=True)
class GroundTruth:
    """Not a method: the scene itself. What the metrics say of it is the most they can say."""


Contender = Method | Baseline | GroundTruth

GROUND_TRUTH = "ground truth"
DEFAULT = "default"
"""Our best method: what the others are compared with."""

CONTENDERS: dict[str, Method | Baseline] = METHODS | BASELINES
"""The methods by name: ours, then the others'."""


# ------------------------------------------------------------------ by name


def methods_named(names: Iterable[str] = (*CONTENDERS,)) -> dict[str, Contender]:
    """Methods by name, some of their choices changed.

    Args:
        names: "paper"; "paper,inside=0.3,outside=0.3": the paper's with two choices changed;
            "fuse=once": the default with one.

    Raises:
        BenchmarkError: an unknown method, choice or value; lists what there is.
    """
    return {name: _parsed(name) for name in names}


def _parsed(name: str) -> Method | Baseline:
    parts = [part.strip() for part in name.split(",")]
    base = DEFAULT if "=" in parts[0] else parts.pop(0)
    if base not in CONTENDERS:
        raise BenchmarkError(f"there is no method {base!r}; there are {', '.join(CONTENDERS)}")
    method, changes = CONTENDERS[base], {}
    for part in parts:
        choice, _, text = part.partition("=")
        if choice not in vars(method):
            choices = ", ".join(vars(method)) or "none"
            raise BenchmarkError(f"{name!r}: {base} has no choice {choice!r}; it has {choices}")
        try:
            changes[choice] = _value(text, getattr(method, choice))
        except ValueError as error:
            raise BenchmarkError(f"{name!r}: {choice} is {text!r}, {error}") from None
    try:
        return replace(method, **changes)
    except ValueError as error:
        raise BenchmarkError(f"{name!r}: {error}") from None


def _value(text: str, default: Any) -> Any:
    """What `text` says, if it is of the kind of `default`."""
    try:  # 0.2, True
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # once
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default) or isinstance(default, tuple):
        kinds = {bool: "True or False", int: "a whole number", float: "a number"}
        raise ValueError(f"but should be {kinds.get(type(default)) or f'like {default!r}'}")
    return value


# ------------------------------------------------------------------ ablations


def ablations(base: str = DEFAULT) -> list[str]:
    """One factor at a time around one of our methods, as names for `methods_named`.

    Every other name that a choice can have, no for yes, numbers at half and at twice what they are
    (shares at most 1), no ξ at all (or, where there is none, λ = 0.1). A choice that changes
    nothing there is left out.
    """
    method, names = METHODS[base], []
    idle = _idle_choices(method)
    for choice, value in vars(method).items():
        if choice in idle:
            continue
        for other in _alternatives(choice, value):
            with contextlib.suppress(ValueError):  # what does not go with the other choices
                replace(method, **{choice: other})
                text = f"{other:.4g}" if type(other) is float else str(other)
                names.append(f"{choice}={text}")
    guided = method.inside or method.outside
    names.append("inside=0,outside=0" if guided else "inside=0.1,outside=0.1")
    return names if base == DEFAULT else [f"{base},{name}" for name in names]


def _idle_choices(method: Method) -> set[str]:
    """The choices that change nothing beside the others; and `attention`, which is for experts."""
    idle = {"attention"}
    if not (method.inside or method.outside):
        idle |= {"delta", "inside", "outside", "guide", "early_repeats", "top_k", "weighted"}
    if method.delta == "constant":
        idle |= {"top_k", "weighted"}
    if method.guide != "noise":
        idle |= {"early_repeats"}
    if method.fuse != "collage":
        idle |= {"sketch_steps"}
    return idle


def _alternatives(choice: str, value: Any) -> list[Any]:
    if choice in CHOICES:
        return [name for name in get_args(CHOICES[choice]) if name != value]
    if isinstance(value, bool):
        return [not value]
    if choice == "layered_fraction":
        return sorted({value / 2, min(1.0, 2 * value)} - {value})
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
    """The layouts' pictures and what each took; our methods draw them as one batch.

    In a batch, seconds and memory are those of the batch, divided by its pictures.
    """
    if isinstance(method, GroundTruth):
        scenes = [ground_truth_scene(layout) for layout in layouts]
        return [as_image(image) for image in render_scenes(scenes).images], [Cost() for _ in scenes]
    if isinstance(method, Method):
        with measured(pipe, len(layouts)) as costs:
            images = pipe(layouts, method=method, generator=list(generators), **options).images
        return images, costs
    images, costs = [], []
    for layout, generator in zip(layouts, generators, strict=True):
        with measured(pipe, 1) as [cost]:
            images.append(draw(pipe, layout, method=method, generator=generator, **options))
        costs.append(cost)
    return images, costs


def check_captions(
    pipe: LayeredRenderingPipeline, layout: Layout, methods: Mapping[str, Contender]
) -> None:
    """Refuse a layout whose caption does not name each layer, where a method needs that.

    Raises:
        BenchmarkError: names the method.
    """
    steered = (PaintWithWords, LayoutGuidance, BoxDiff)
    names = [name for name, method in methods.items() if isinstance(method, steered)]
    if names:
        try:
            layer_words(layout, PromptTokens.encode(pipe.tokenizer, layout.caption))
        except ValueError as error:
            raise BenchmarkError(f"method {names[0]}: {error}") from None


def choices_of(method: Contender) -> dict[str, Any]:
    """What a method is, as the settings of a folder keep it."""
    return {"kind": type(method).__name__, **asdict(method)}
