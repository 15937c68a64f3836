"""All methods by name: `pipe(layout, method="boxdiff")`.

| method | paper | what it changes | U-Net samples a step |
|---|---|---|---|
| collage | ours, no LRDiff | a collage of sketches, noised and finished | 2 a region, then 2 |
| lrdiff | Qi et al. 2024, Algorithm 1 | each region apart, with ξ | 2 a region, then 2 |
| paper, authors, unofficial | three readings of it | the same | the same |
| plain | Ho and Salimans 2022 | nothing: the caption alone | 2 |
| multidiffusion | Bar-Tal et al. 2023 | each region is predicted apart | 2 a region |
| paint-with-words | Balaji et al. 2022 (eDiff-I) | the attention to words | 2 |
| layout-guidance | Chen, Laina, Vedaldi 2023 | x_t, by a gradient | 2; in the first 20 %: 2 + 5·3 |
| boxdiff | Xie et al. 2023 | x_t, by a gradient | 2; in the first half: 2 + 3 or more |
| larender | Zhan and Liu 2025 | what cross-attention answers | 2 |
| rag | Chen et al. 2024 | x_t, then cross-attention | 2; in the first tenth 2 a layer more |

(A backward pass counts as two samples.) Every method starts from the same noise for the same
generator. A new one is one file with a `Method`, and one line in `METHODS`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lrd_helpers.messages import excerpt
from lrd_helpers.methods.boxdiff import BoxDiff
from lrd_helpers.methods.choices import Choices
from lrd_helpers.methods.collage import collage_of_sketches
from lrd_helpers.methods.guidance import check_words, layers_looked_at, positions
from lrd_helpers.methods.larender import LaRender
from lrd_helpers.methods.layout_guidance import LayoutGuidance
from lrd_helpers.methods.lrdiff import layered_denoising
from lrd_helpers.methods.multidiffusion import MultiDiffusion
from lrd_helpers.methods.paint_with_words import PaintWithWords
from lrd_helpers.methods.plain import Plain
from lrd_helpers.methods.rag import RAG
from lrd_helpers.methods.regions import (
    background_prompt,
    check_no_canvas,
    check_no_times,
    check_texts,
    make_plan,
    phases,
    warn_of_cost,
    warn_of_hidden_layers,
)
from lrd_helpers.methods.script import merged_once
from lrd_helpers.sampling.run import Method, Run, State

__all__ = [
    "METHODS",
    "RAG",
    "BoxDiff",
    "Choices",
    "LaRender",
    "LayeredRendering",
    "LayoutGuidance",
    "Method",
    "MultiDiffusion",
    "PaintWithWords",
    "Plain",
    "check_opacity",
    "named",
    "parsed",
]

ALGORITHMS = {"steps": layered_denoising, "once": merged_once, "collage": collage_of_sketches}
"""`Choices.fuse` → the algorithm, in a file of its own."""


@dataclass(frozen=True)
class LayeredRendering(Choices, Method):
    """LRDiff with every choice a name (see `Choices`); `fuse` says which algorithm it is."""

    batched: ClassVar[bool] = True
    traces: ClassVar[bool] = True

    @property
    def translucent(self) -> bool:
        return self.fuse == "collage"

    def check(self, run: Run) -> None:
        there = run.size[0] * run.size[1]
        if self.delta == "decoded":
            there *= run.model.pipe.vae_scale_factor**2
        if self.looks and (asked := positions(self, run.size)) > there:
            here = "" if asked == self.top_k else f", on this canvas {asked}"
            raise ValueError(
                f"top_k is {self.top_k}{here}, but there are only {there} positions to choose from"
            )
        check_words(run, self)
        if self.fuse != "steps":
            because = f"with fuse={self.fuse!r} every layer runs alone up to the same step"
            check_no_times(run, because)
        most = run.steps.scheduler.config.num_train_timesteps - 1
        if self.fuse == "collage" and self.sketch_steps > most:
            raise ValueError(f"sketch_steps is {self.sketch_steps}, but should be at most {most}")
        phase = phases(run, self)
        if phase.fuse != "collage" or not phase.layered:
            check_no_canvas(
                run,
                "that takes fuse='collage', a layered_fraction above 0 and a layer that does not "
                "fill the picture",
            )
        warn_of_hidden_layers(run, self)
        plan = make_plan(run, self)
        prompts = [layer.prompt for _, layer in layers_looked_at(run, self)]
        if self.delta == "contrast" and self.guided:
            prompts += map(background_prompt, run.layouts)
        check_texts(run, dict.fromkeys(plan.regions), prompts if phase.layered else [])
        warn_of_cost(run, plan.regions[0])

    def sample(self, run: Run) -> Iterator[State]:
        phase = phases(run, self)
        algorithm = ALGORITHMS[phase.fuse] if phase.layered else layered_denoising
        return algorithm(run, self)

    def count(self, run: Run) -> tuple[int, int]:
        phase = phases(run, self)
        if phase.fuse == "collage" and phase.layered:
            return run.steps.sketch_steps(self.sketch_steps) + 1, len(run.steps) - phase.layered
        return 0, len(run.steps)


METHODS: dict[str, Method] = {
    # The best on storybook so far; `python -m lrd_helpers benchmark --ablations` measures it.
    "collage": LayeredRendering(
        fuse="collage", inside=0.0, outside=0.0, layered_fraction=0.68, background_in_prompts=True
    ),
    # Algorithm 1 with the choices that obey best (benchmarks/README.md has the search).
    "lrdiff": LayeredRendering(
        delta="contrast", inside=0.6, outside=0.5, guide="both", layered_fraction=0.4
    ),
    # The paper's K, λ and t0 are not published; these are ours.
    "paper": LayeredRendering(delta="dynamic", inside=1.0, outside=1.0),
    "authors": LayeredRendering(
        delta="decoded",
        inside=0.05,
        outside=0.20,
        guide="noise",
        early_repeats=5,
        fuse="once",
        layered_fraction=15 / 51,
        overlap="small_over_large",
        negative_objects=True,
    ),
    "unofficial": LayeredRendering(
        delta="dynamic",
        inside=1.0,
        outside=0.0,
        guide="noise",
        attention="unofficial",
        weighted=True,
    ),
    # The others', with published constants.
    "plain": Plain(),
    "multidiffusion": MultiDiffusion(),
    "paint-with-words": PaintWithWords(),
    "layout-guidance": LayoutGuidance(),
    "boxdiff": BoxDiff(),
    "larender": LaRender(),
    "rag": RAG(),
}
"""Every method by its name."""

LONGEST = 500
"""Signs of a method's text; all choices there are, changed, take half of it."""


def named(method: str | Method, **changes: Any) -> Method:
    """A method by its name, or the method itself, with some of its choices changed.

    Raises:
        ValueError: an unknown name, a choice that the method does not have, or an invalid value.
    """
    name = method
    if not isinstance(method, Method):
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(
                f"method is {excerpt(method)}, but should be one of {', '.join(METHODS)}, or "
                "options such as BoxDiff(strength=10)"
            )
        method = METHODS[method]
    for choice in changes:
        if choice not in vars(method):
            choices = ", ".join(vars(method)) or "none"
            name = name if isinstance(name, str) else type(method).__name__
            raise ValueError(f"method {name!r} has no choice {excerpt(choice)}; it has {choices}")
    return replace(method, **changes)


def check_opacity(run: Run, method: Method) -> None:
    """Refuse layers with an opacity where the method does not heed it.

    Whoever draws calls this beside `method.check`: a new method need not think of it.

    Raises:
        ValueError: names the layer, and the methods that are translucent.
    """
    if method.translucent:
        return
    name = next((n for n, each in METHODS.items() if each == method), type(method).__name__)
    able = " or ".join(repr(n) for n, each in METHODS.items() if each.translucent)
    for layout in run.layouts:
        for number, layer in enumerate(layout.layers):
            if layer.opacity < 1:
                raise ValueError(
                    f"layer {number + 1} {excerpt(layer.prompt)} has an opacity of "
                    f"{layer.opacity:g}, but method {name!r} knows none; use {able}"
                )


def parsed(text: str) -> Method:
    """A method by its name, some of its choices changed, as the command line has it.

    Args:
        text: "paper"; "paper,inside=0.3,outside=0.3": the paper's with two choices changed;
            "fuse=once": the collage with another choice.

    Raises:
        ValueError: an unknown method, choice or value (lists the known ones), or a text of more
            than `LONGEST` signs.
    """
    if len(text) > LONGEST:
        raise ValueError(
            f"{excerpt(text)} has {len(text)} signs, but a method has at most {LONGEST}, such as "
            "'paper,inside=0.3'"
        )
    parts = [part.strip() for part in text.split(",")]
    name = "collage" if "=" in parts[0] else parts.pop(0)
    if name not in METHODS:
        raise ValueError(f"there is no method {excerpt(name)}; there are {', '.join(METHODS)}")
    changes = {}
    for part in parts:
        choice, _, value = part.partition("=")
        if choice not in vars(METHODS[name]):
            choices = ", ".join(vars(METHODS[name])) or "none"
            raise ValueError(f"{name} has no choice {excerpt(choice)}; it has {choices}")
        changes[choice] = _value(choice, value, getattr(METHODS[name], choice))
    try:
        return named(name, **changes)
    except ValueError as error:
        raise ValueError(f"{excerpt(text)}: {error}") from None


def _value(choice: str, written: str, default: Any) -> Any:
    """What was written for a choice, of the kind of its default."""
    try:  # 0.2, True
        value = ast.literal_eval(written)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
    except (ValueError, SyntaxError, OverflowError, RecursionError, MemoryError):  # once
        value = written
    if type(value) is not type(default) or isinstance(default, tuple) or len(written) > 60:
        kinds = {bool: "True or False", int: "a whole number", float: "a number"}
        kind = kinds.get(type(default), f"like {default!r}")
        raise ValueError(f"{choice} is {excerpt(written)}, but should be {kind}")
    return value
