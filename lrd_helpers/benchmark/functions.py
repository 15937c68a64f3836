"""A contender that is a function: a learner's own way to draw a layout, beside the methods.

    def mine(pipe, layout, generator, *, num_inference_steps, guidance_scale):
        ...
        return picture   # a PIL image, or (3, height, width) in [0, 1]

    run(pipe, layouts, {**methods_named(["lrdiff"]), "mine": mine}, output="outputs/mine")

What it draws from `generator` first, `torch.randn(1, 4, 16, 16, generator=generator)`, is the noise
that the methods begin with.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from lrd_helpers.benchmark.layouts import BenchmarkError
from lrd_helpers.layout import Layout
from lrd_helpers.messages import excerpt, sentence
from lrd_helpers.pictures import picture_of

if TYPE_CHECKING:
    from lrd_helpers.pipeline import LayeredRenderingPipeline

Function = Callable[..., "Image.Image | Tensor"]
"""`(pipe, layout, generator, *, num_inference_steps, guidance_scale)` → a picture."""

SLACK = 0.01
"""So far outside of [0, 1] numbers are rounding, and are cut off."""


class ContenderError(BenchmarkError):
    """What a function did that a benchmark cannot use; the other contenders go on."""


def drawn_by(
    function: Function,
    pipe: LayeredRenderingPipeline,
    layout: Layout,
    generator: torch.Generator,
    **options: Any,
) -> Image.Image:
    """A function's picture of a layout.

    Raises:
        ContenderError: it raised something, gave no such picture, or changed the layout.
    """
    given = copy.deepcopy(layout)
    try:
        picture = function(pipe, given, generator, **options)
    except Exception as error:
        fault = sentence(f"it raised {type(error).__name__}: {error}", 200)
        raise ContenderError(fault) from error
    if given.to_json() != layout.to_json():
        raise ContenderError("it changed the layout that it was given; make another one")
    _check_picture(picture, pipe._default_size(0), pipe._default_size(1))
    return picture_of(picture)


def _check_picture(picture: object, height: int, width: int) -> None:
    fault = None
    if isinstance(picture, Image.Image):
        if picture.size != (width, height):
            fault = f"an image of {picture.width} × {picture.height}"
    elif not isinstance(picture, Tensor):
        fault = excerpt(picture)
    elif picture.shape != (3, height, width) or not picture.is_floating_point():
        fault = f"a tensor of shape {tuple(picture.shape)} and {picture.dtype}"
    elif not picture.isfinite().all():
        fault = "a tensor with NaN or infinite numbers"
    elif picture.min() < -SLACK or picture.max() > 1 + SLACK:
        fault = f"a tensor with numbers from {picture.min():.3g} to {picture.max():.3g}"
    if fault:
        raise ContenderError(
            f"it gave {fault}, but should give a PIL image of {width} × {height}, or a tensor of "
            f"floats (3, {height}, {width}) in [0, 1]"
        )


# ------------------------------------------------------------------ what all contenders share


@contextlib.contextmanager
def kept(pipe: LayeredRenderingPipeline) -> Iterator[None]:
    """Put back what is changed of a pipeline's parts and weights, which all contenders share.

    Raises:
        ContenderError: on leaving, where nothing else was raised: names what was changed.
    """
    parts = dict(pipe.components)
    models = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    training = {name: model.training for name, model in models.items()}
    weights = {
        name: {key: value.clone() for key, value in model.state_dict().items()}
        for name, model in models.items()
    }
    changed = []
    try:
        yield
    finally:
        for name, part in parts.items():
            if getattr(pipe, name) is not part:
                setattr(pipe, name, part)
                changed.append(name)
        for name, model in models.items():
            model.train(training[name])
            now = model.state_dict()
            if any(not torch.equal(value, now[key]) for key, value in weights[name].items()):
                model.load_state_dict(weights[name])
                changed.append(f"the weights of {name}")
    if changed:
        raise ContenderError(
            f"it changed {', '.join(changed)}, which all contenders share; that was put back"
        )


# ------------------------------------------------------------------ which function it was


def digest_of_function(function: Function) -> str:
    """A short name for what a function does: another source, another name.

    Looked at are its source, its defaults, and of what it refers to numbers, texts and functions
    of its own module. Of an object that can be called: its `__call__` and its attributes.
    """
    names = ("__func__", "func", "args", "keywords")  # of bound methods and of `partial`
    parts = [function, getattr(type(function), "__call__", None)]  # noqa: B004
    parts += [getattr(function, name, None) for name in names]
    parts += [getattr(function, "__dict__", {}), getattr(function, "__self__", None)]
    text = "\n".join(text for part in parts for text in _texts(part, set()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _texts(value: object, seen: set[int], module: str | None = None) -> Iterator[str]:
    """What is said of a value that a function refers to: nothing, where that is no plain value."""
    function = inspect.unwrap(value) if callable(value) else None
    if isinstance(value, (bool, int, float, str)):
        yield repr(value)
    elif isinstance(value, (list, tuple, dict)):
        for each in sorted(value.items()) if isinstance(value, dict) else value:
            yield from _texts(each, seen, module)
    elif inspect.isfunction(function) and id(function) not in seen:
        seen.add(id(function))
        if module not in (None, function.__module__):
            return
        yield _source(function)
        referred = inspect.getclosurevars(function)
        defaults = function.__defaults__, function.__kwdefaults__
        for each in (referred.globals, referred.nonlocals, defaults):
            yield from _texts(each, seen, function.__module__)


def _source(function: Callable) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed in, or made by exec
        code = function.__code__
        return f"{code.co_code.hex()} {code.co_names}"
