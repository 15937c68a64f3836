"""The authors' published script: each layer runs alone and they are merged once."""

from __future__ import annotations

from collections.abc import Iterator

from lrd_helpers.methods.choices import Choices
from lrd_helpers.methods.guidance import vision_fields
from lrd_helpers.methods.lrdiff import painted, repeated, repeats
from lrd_helpers.methods.plain import general_denoising
from lrd_helpers.methods.regions import phases, plan
from lrd_helpers.sampling.run import Run, State


def merged_once(run: Run, choices: Choices) -> Iterator[State]:
    """Each layer runs alone down to t0; there they are put together, and the caption goes on.

    It is not Algorithm 1: what one layer draws is not seen by the others before t0.
    """
    xi = vision_fields(run, choices) if phases(run, choices).layered else None
    steps = plan(run, choices, xi if choices.guide == "steps" else None)
    run.model.encode_texts(steps.texts)
    regions, x = steps.regions[0], run.x_T
    if steps.layered:
        x = painted(run, regions, xi) if choices.guide == "noise" else x[regions.picture]
    for i, t in run.steps.until(steps.layered):  # t = T … t0, a row a layer
        seen = run.seen(x, t)
        scores = run.scores(seen, t, regions)
        x = run.step(scores, t, x, regions)
        if i < repeats(run, choices, steps.layered):
            x = x + repeated(run, regions, xi, i)
        last = i + 1 == steps.layered
        x = run.merged(x, regions) if last else x  # Σ_i M^i ⊙ x^i, once
        state = State(i, t, x, regions, seen, scores, alone=not last, xi=xi)
        yield state
        x = state.x
    yield from general_denoising(run, x, start=steps.layered)
