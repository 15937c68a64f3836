"""Layered Rendering Diffusion, Algorithm 1 (Qi et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lrd_helpers.methods.choices import Choices
from lrd_helpers.methods.guidance import vision_fields
from lrd_helpers.methods.plain import general_denoising
from lrd_helpers.methods.regions import Fields, phases, plan
from lrd_helpers.sampling.regions import Regions, stacked
from lrd_helpers.sampling.run import Run, State

EARLY_REPEAT = 0.01
"""The share of ξ that an early repeat adds once more (the authors' script: "about 1 %")."""


def layered_denoising(run: Run, choices: Choices) -> Iterator[State]:
    """Layers are composed at every step down to t0, then the caption goes on (LRDiff, Algorithm 1).

    With guide="noise" ξ is not seen at each step, but painted into the initial noise once.
    """
    xi = vision_fields(run, choices) if phases(run, choices).layered else None  # ξ^1 … ξ^n
    steps = plan(run, choices, xi if choices.guide == "steps" else None)
    run.model.encode_texts(steps.texts)
    x = run.x_T
    if choices.guide == "noise" and steps.layered:
        x = steps.regions[0].composed(painted(run, steps.regions[0], xi))
    for i, t in run.steps.until(steps.end):  # t = T … t0
        regions = steps.regions[i]
        seen = run.seen(x, t, regions)
        scores = run.scores(seen, t, regions)  # s + γ (s_y − s) at x_t + ξ^i, one batch
        phi = regions.composed(scores)  # Φ_t = Σ_i M^i ⊙ …             (Eq. 8b)
        x = run.step(phi, t, x)  # x_{t−1} = α̃ x_t + β̃ Φ_t + σ ε        (Eq. 8a)
        if i < repeats(run, choices, steps.layered):
            x = x + steps.regions[0].composed(repeated(run, steps.regions[0], xi, i))
        state = State(i, t, x, regions, seen, scores, xi=xi if i < steps.layered else None)
        yield state
        x = state.x
    yield from general_denoising(run, x, start=steps.end)  # t = t0 − 1 … 1


# ------------------------------------------------------------------ ξ painted into the noise


def fields_of_rows(run: Run, regions: Regions, xi: Fields) -> Tensor:
    """ξ of each region, 0 for the backgrounds."""
    return stacked(
        [xi[entry.picture][entry.layer - 1] if entry.layer else None for entry in regions.entries],
        run.x_T,
    )


def painted(run: Run, regions: Regions, xi: Fields) -> Tensor:
    """x_T + ξ^i, a row a region, in the scheduler's units: Euler's are σ times larger."""
    unit = run.steps.unit(run.steps.timesteps[0])
    return run.x_T[regions.picture] + fields_of_rows(run, regions, xi) / unit


def repeats(run: Run, choices: Choices, layered: int) -> int:
    """After so many first steps a share of ξ is added again."""
    if choices.guide != "noise":
        return 0
    return min(choices.early_repeats, layered, len(run.steps) - 1)


def repeated(run: Run, regions: Regions, xi: Fields, i: int) -> Tensor:
    """The share of ξ^i that is added after step i."""
    unit = run.steps.unit(run.steps.timesteps[i + 1])
    return EARLY_REPEAT * fields_of_rows(run, regions, xi) / unit
