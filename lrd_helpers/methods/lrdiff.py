"""Layered Rendering Diffusion, Algorithm 1 (Qi et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator

from lrd_helpers.methods.choices import Choices
from lrd_helpers.methods.guidance import painted, prepared, repeated
from lrd_helpers.methods.plain import general_denoising
from lrd_helpers.sampling.run import Run, State


def layered_denoising(run: Run, choices: Choices) -> Iterator[State]:
    """Layers are composed at every step down to t0, then the caption goes on (LRDiff, Algorithm 1).

    With guide="noise" ξ is not seen at each step, but painted into the initial noise once.
    """
    plan = prepared(run, choices)  # who is asked what, where, with ξ^1 … ξ^n
    x = run.x_T
    if choices.guide != "steps" and plan.layered:
        x = plan.regions[0].composed(painted(run, plan))
    for i, t in run.steps.until(plan.end):  # t = T … t0
        regions = plan.regions[i]
        seen = run.seen(x, t, regions)
        scores = run.scores(seen, t, regions)  # s + γ (s_y − s) at x_t + ξ^i, one batch
        phi = regions.composed(scores)  # Φ_t = Σ_i M^i ⊙ …             (Eq. 8b)
        x = run.step(phi, t, x)  # x_{t−1} = α̃ x_t + β̃ Φ_t + σ ε        (Eq. 8a)
        if i < plan.repeats:
            x = x + plan.regions[0].composed(repeated(run, plan, i))
        state = State(i, t, x, regions, seen, scores, xi=plan.xi if i < plan.layered else None)
        yield state
        x = state.x
    yield from general_denoising(run, x, start=plan.end)  # t = t0 − 1 … 1
