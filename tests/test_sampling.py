"""Predictions in other words, and the steps of every scheduler."""

import itertools
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch.nn import functional

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.methods import METHODS, LayeredRendering
from lrd_helpers.methods.regions import phases
from lrd_helpers.pipeline import LayeredRenderingPipeline
from lrd_helpers.sampling.predictions import convert, shift_of_input
from lrd_helpers.sampling.run import Run
from lrd_helpers.sampling.steps import Steps

KINDS = ("epsilon", "x0", "v", "flow")
SCHEDULERS = [getattr(diffusers, scheduler.name) for scheduler in KarrasDiffusionSchedulers]
TWO = Layout(
    "a red car and a yellow star on grass",
    background="on grass",
    layers=[Layer("a red car", (0, 0.5, 0.75, 1)), Layer("a yellow star", (0.5, 0, 1, 0.75))],
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ predictions

ALPHA, SIGMA = 0.8, 0.6


def by_definition(x0: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"epsilon": noise, "x0": x0, "v": ALPHA * noise - SIGMA * x0, "flow": noise - x0}


@pytest.mark.parametrize(("given", "wanted"), itertools.product(KINDS, KINDS))
def test_every_prediction_in_every_other_words(given, wanted) -> None:
    x0, noise = torch.randn(2, 3, 5, generator=seeded(), dtype=torch.float64)
    words = by_definition(x0, noise)
    x_t = ALPHA * x0 + SIGMA * noise
    answer = convert(words[given], x_t, ALPHA, SIGMA, given=given, wanted=wanted)
    assert torch.allclose(answer, words[wanted])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_noise_seen_from_another_input(kind) -> None:
    x_t, noise, xi = torch.randn(3, 3, 5, generator=seeded(), dtype=torch.float64)
    options = {"given": "epsilon", "wanted": kind}
    there = convert(noise, x_t + xi, ALPHA, SIGMA, **options)
    here = convert(noise, x_t, ALPHA, SIGMA, **options)
    assert torch.allclose(there + shift_of_input(kind, ALPHA, SIGMA) * xi, here)


def test_an_unknown_prediction() -> None:
    anything = getattr(convert, "__wrapped__", convert)  # past the tests' own type check
    with pytest.raises(ValueError, match="'noise' to 'x0': the kinds are 'epsilon', 'x0', 'v' and"):
        anything(torch.zeros(1), torch.zeros(1), 0.8, 0.6, given="noise", wanted="x0")


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_units_and_coefficients_agree_with_add_noise(tiny, scheduler) -> None:
    """α x_0 + σ ε, divided by the unit, is what the scheduler itself makes of x_0 and ε."""
    source = scheduler.from_config(tiny.scheduler.config)
    steps = Steps(source, 6)
    start = steps.late_start(0.5)
    clean, noise = torch.randn(2, 1, 4, 4, 4, generator=seeded())
    began = steps.begin_at(start, clean, noise)
    expected = source.add_noise(clean, noise, steps.timesteps[start : start + 1])
    assert torch.allclose(began, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_late_start_always_leaves_out_a_whole_step(tiny, scheduler, count) -> None:
    options = {"skip_prk_steps": True}
    steps = Steps(scheduler.from_config(tiny.scheduler.config, **options), count)
    assert steps.late_start(1.0) == len(steps)
    for share in (0.01, 0.5, 0.99):
        start = steps.late_start(share)
        assert 0 < start <= len(steps)
        assert start == len(steps) or start % steps.order == 0 or scheduler is PNDMScheduler


def test_lms_begins_late_as_if_it_had_just_begun(tiny) -> None:
    """Of one prediction it makes Euler's step, not a quarter of it."""
    scheduler = LMSDiscreteScheduler.from_config(tiny.scheduler.config)
    steps = Steps(scheduler, 8)
    x = steps.begin_at(4, *torch.randn(2, 1, 4, 4, 4, generator=seeded()))
    noise = torch.randn(1, 4, 4, 4, generator=seeded(1))
    euler = x + (scheduler.sigmas[5] - scheduler.sigmas[4]) * noise
    assert torch.allclose(steps.step(noise, steps.timesteps[4], x), euler, atol=1e-4)


def test_brownian_noise_comes_from_the_generator(pipe) -> None:
    pipe.scheduler = diffusers.DPMSolverSDEScheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 3, "output_type": "latent"}
    for method in (LayeredRendering(), LayeredRendering(fuse="once"), "collage", "plain"):
        one, again, other = (
            pipe([TWO, TWO], method=method, generator=[seeded(n), seeded(5)], **options).images
            for n in (0, 0, 1)
        )
        assert one.isfinite().all()
        assert torch.equal(one, again)
        assert not torch.allclose(one[0], other[0], atol=1e-2)


def test_pure_noise_has_no_coefficient_of_the_signal() -> None:
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    steps = Steps(DDIMScheduler(**zero_snr), 4)
    assert steps.level(steps.timesteps[0]) == math.inf
    assert steps.coefficients(steps.timesteps[0]) == (0.0, 1.0)
    assert steps.shift_of_input(steps.timesteps[0]) is None
    seen = torch.ones(1, 4, 4, 4)
    assert steps.x0(seen, seen, steps.timesteps[0]).isnan().all()


# ------------------------------------------------------------------ whoever iterates


def begun(pipe: LayeredRenderingPipeline, count: int = 4) -> Run:
    steps = Steps(pipe.scheduler, count, generator=seeded())
    run = Run.begin(pipe, [TWO], (32, 32), steps)
    run.draw_noise()
    return run


def test_iterating_draws_what_the_pipeline_draws(pipe) -> None:
    for method in (LayeredRendering(), LayeredRendering(fuse="once"), *METHODS.values()):
        if getattr(method, "delta", "constant") != "constant":
            continue  # wants more positions than the tiny model has
        options = {"num_inference_steps": 4, "output_type": "latent"}
        expected = pipe(TWO, method=method, generator=seeded(), **options).images
        run = begun(pipe)
        states = [(state.sketch, state.latents) for state in method.sample(run)]
        assert torch.allclose(states[-1][1], expected, atol=1e-5)
        sketches = sum(sketch for sketch, _ in states)
        assert (sketches, len(states) - sketches) == method.count(run)


def test_a_state_can_be_changed_by_whoever_iterates(pipe) -> None:
    for method in (LayeredRendering(), LayeredRendering(fuse="once"), METHODS["plain"]):
        x = torch.randn(1, 4, 4, 4, generator=seeded(3))
        ends = []
        for noise in (x, x + 1):
            for state in method.sample(begun(pipe)):
                if state.i == 1:
                    state.latents = noise
            ends.append(state.latents)
        assert (ends[1] - ends[0]).abs().mean() > 0.1, "the steps go on from what was set"


# ------------------------------------------------------------------ wider canvases


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_wider_canvas_begins_with_as_many_times_the_noise(tiny, scheduler) -> None:
    steps = Steps(scheduler.from_config(tiny.scheduler.config, skip_prk_steps=True), 40)
    usual, wide = steps.late_start(0.7), steps.late_start(0.7, 4.0)
    levels = [steps.level(t) for t in steps.timesteps]
    assert levels[wide] <= 4 * levels[usual] < levels[wide - steps.order]
    assert wide % steps.order == 0
    assert steps.late_start(0.7, 1e9) == steps.late_start(0.01), "one step is always left out"
    assert steps.late_start(1.0, 4.0) == len(steps), "no noise stays none"


def test_noise_hides_as_much_of_a_collage_of_512_pixels(pipe) -> None:
    """A hand-made picture, noised where the collage goes on, seen in 16 × 16 parts."""

    def begun_with(side: int, count: int) -> tuple[Run, int]:
        run = Run.begin(pipe, [TWO], (8 * side, 8 * side), Steps(pipe.scheduler, count))
        return run, phases(run, METHODS["collage"]).alone

    errors = []
    for side in (16, 64):
        run, start = begun_with(side, 200)
        clean = torch.zeros(1, 4, side, side)
        clean[..., side // 4 : side // 2, side // 4 : side // 2] = 1.0
        x = run.steps.noised(clean, torch.randn(clean.shape, generator=seeded()), start)
        alpha, _ = run.steps.coefficients(run.steps.timesteps[start])
        errors.append(float(functional.adaptive_avg_pool2d(x / alpha - clean, 16).std()))
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    # What `Choices.layered_fraction` says of 25 steps.
    assert [begun_with(side, 25)[1] for side in (4, 16, 64)] == [17, 17, 7]
