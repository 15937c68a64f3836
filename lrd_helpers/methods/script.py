"""The authors' published script: each layer runs alone and they are merged once."""

from __future__ import annotations

from collections.abc import Iterator

from lrd_helpers.methods.choices import Choices
from lrd_helpers.methods.guidance import painted, prepared, repeated
from lrd_helpers.methods.plain import general_denoising
from lrd_helpers.sampling.run import Run, State


def merged_once(run: Run, choices: Choices) -> Iterator[State]:
    """Each layer runs alone down to t0; there they are put together, and the caption goes on.

    It is not Algorithm 1: what one layer draws is not seen by the others before t0.
    """
    plan = prepared(run, choices)
    regions = plan.regions[0]
    x = painted(run, plan) if choices.guide != "steps" else run.x_T[regions.picture]
    for i, t in run.steps.until(plan.layered):  # t = T … t0, a row a layer
        seen = run.seen(x, t)
        scores = run.scores(seen, t, regions)
        x = run.step(scores, t, x, regions)
        if i < plan.repeats:
            x = x + repeated(run, plan, i)
        last = i + 1 == plan.layered
        x = run.merged(x, regions) if last else x  # Σ_i M^i ⊙ x^i, once
        state = State(i, t, x, regions, seen, scores, alone=not last, xi=plan.xi)
        yield state
        x = state.x
    yield from general_denoising(run, x, start=plan.layered)
