"""The caption alone: what layered rendering is compared with, and how it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrd_helpers.methods.regions import captions, check_no_canvas, check_no_times, check_texts
from lrd_helpers.sampling.regions import Regions
from lrd_helpers.sampling.run import Method, Run, State
from lrd_helpers.words import LayerWords, layer_words


def general_denoising(run: Run, x: Tensor, start: int = 0) -> Iterator[State]:
    """Classifier-free guidance with the caption at each step from `start` on.

    Ho and Salimans 2022, Eq. 6; in LRDiff's Algorithm 1 the steps from t0 − 1 to 1.
    """
    regions = captions(run)
    for i, t in run.steps.since(start):
        state = caption_step(run, regions, i, t, x)
        yield state
        x = state.x


def caption_step(run: Run, regions: Regions, i: int, t: Tensor, x: Tensor) -> State:
    """x_{t−1} from s(x_t) + γ (s(x_t, caption) − s(x_t))."""
    seen = run.seen(x, t)
    scores = run.scores(seen, t, regions)
    return State(i, t, run.step(scores, t, x), regions, seen, scores)


@dataclass(frozen=True)
class Plain(Method):
    """The caption alone, at every step: `general_denoising`. No layer is looked at."""

    batched: ClassVar[bool] = True

    def check(self, run: Run) -> None:
        check_no_canvas(run, "that takes method='collage'")
        check_texts(run, [captions(run)])

    def sample(self, run: Run) -> Iterator[State]:
        yield from general_denoising(run, run.x_T)


class CaptionMethod(Method):
    """A method that steers the words of the caption, which must name every layer.

    Of a layer it knows the prompt, word, negative prompt and shape.
    """

    def check(self, run: Run) -> None:
        check_no_canvas(run, "that takes method='collage'")
        check_no_times(run, f"{type(self).__name__} steers every layer at every step")
        check_texts(run, [captions(run)])
        words_of_layers(run)


def words_of_layers(run: Run) -> list[LayerWords]:
    """Which words of the caption are which layer's.

    Raises:
        WordError: the caption does not name a layer.
    """
    return layer_words(run.layout, run.model.tokens(run.layout.caption))


def check_options(method: Method, *, shares: Sequence[str] = ()) -> None:
    """Refuse numbers that are negative or not finite, and shares above 1."""
    for name, value in vars(method).items():
        if isinstance(value, tuple):
            continue
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, but should be a finite number ≥ 0")
        if name in shares and value > 1:
            raise ValueError(f"{name} is {value}, but should be a share between 0 and 1")
