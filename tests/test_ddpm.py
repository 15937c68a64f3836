"""DDPM from scratch: its formulas against each other, and against diffusers with the same noise."""

import dataclasses
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from lrd_helpers.ddpm import (
    NoiseSchedule,
    convert,
    ddim_sample,
    ddpm_sample,
    posterior,
    q_sample,
    training_loss,
)

KINDS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
SCHEDULES = {
    "linear": (NoiseSchedule.linear, {"beta_schedule": "linear"}),
    "cosine": (NoiseSchedule.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
    "scaled_linear": (
        NoiseSchedule.scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Neither linear nor constant in x or t, and cheap."""
    return torch.tanh(0.7 * x + torch.sin(t.reshape(-1, *[1] * (x.ndim - 1)).float()))


@pytest.fixture(params=SCHEDULES)
def both(request):
    """A schedule of ours, and the arguments of diffusers' that make the same one."""
    return of_both(request.param)


def of_both(name, steps=1000):
    ours, theirs = SCHEDULES[name]
    return ours(steps), theirs | {"num_train_timesteps": steps}


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize("steps", [1, 10, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_signal_falls_and_the_schedule_has_as_many_steps_as_asked(name, steps):
    schedule = SCHEDULES[name][0](steps)
    assert schedule.steps == len(schedule.betas) == steps
    assert (schedule.alphas_cumprod.diff() < 0).all()
    torch.testing.assert_close(
        schedule.snr, schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    )


def test_betas_equal_those_of_diffusers(both):
    schedule, options = both
    theirs = DDPMScheduler(**options)
    torch.testing.assert_close(schedule.betas, theirs.betas, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("count", [1, 7, 30, 1000])
def test_timesteps_equal_those_of_diffusers(count, spacing):
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(count)
    assert NoiseSchedule.linear().timesteps(count, spacing) == theirs.timesteps.tolist()


@pytest.mark.parametrize("count", [0, -1, 11])
def test_a_wrong_number_of_timesteps_is_an_error(count):
    with pytest.raises(ValueError, match=f"{count} of 10 steps: give a number from 1 to 10"):
        NoiseSchedule.linear(10, 0.01, 0.2).timesteps(count)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [-0.1], [math.nan]])
def test_betas_that_are_no_variances_are_an_error(betas):
    with pytest.raises(ValueError, match="β must lie in|at least one step"):
        NoiseSchedule(torch.tensor(betas))


def test_a_schedule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NoiseSchedule.linear().betas = torch.ones(3)


# ------------------------------------------------------------------ noising and parameterisations


@pytest.mark.parametrize("shape", [(64, 2), (64, 3, 4, 5)])
def test_q_sample_equals_add_noise(both, shape):
    schedule, options = both
    x0, noise = torch.randn(2, *shape, generator=seeded())
    t = torch.randint(1000, (64,), generator=seeded())
    theirs = DDPMScheduler(**options).add_noise(x0, noise, t)
    torch.testing.assert_close(q_sample(x0, t, noise, schedule), theirs, atol=1e-6, rtol=0)


def test_q_sample_is_what_step_by_step_noising_leads_to():
    schedule, generator = NoiseSchedule.linear(10, 0.01, 0.3), seeded()
    x = torch.full((100_000, 1), 2.0)
    for beta in schedule.betas:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(x.shape, generator=generator)
    last = float(schedule.alphas_cumprod[-1])
    assert x.mean().item() == pytest.approx(2 * last**0.5, abs=0.01)
    assert x.std().item() == pytest.approx((1 - last) ** 0.5, abs=0.01)


@pytest.mark.parametrize("t", [[-1, 0], [0, 1000]])
def test_a_time_outside_the_schedule_is_an_error(t):
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="but this schedule has 0 to 999"):
        q_sample(x, torch.tensor(t), x, NoiseSchedule.linear())


def test_the_velocity_equals_that_of_diffusers(both):
    schedule, options = both
    x0, noise = torch.randn(2, 32, 2, generator=seeded())
    t = torch.randint(900, (32,), generator=seeded())
    x_t = q_sample(x0, t, noise, schedule)
    theirs = DDPMScheduler(**options).get_velocity(x0, noise, t)
    ours = convert(x0, x_t, t, schedule, given="x0", wanted="v")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # x0 → v divides by √(1 − ᾱ)
    torch.testing.assert_close(
        convert(noise, x_t, t, schedule, given="epsilon", wanted="v"), theirs, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("wanted", KINDS)
@pytest.mark.parametrize("given", KINDS)
def test_every_parameterisation_leads_to_every_other(given, wanted):
    schedule = NoiseSchedule.linear()
    x0, noise = torch.randn(2, 32, 3, 2, generator=seeded()).double()
    t = torch.randint(1000, (32,), generator=seeded())
    a = schedule.alphas_cumprod.double()[t].sqrt()[:, None, None]
    s = (1 - a**2).sqrt()
    truth = {"epsilon": noise, "x0": x0, "v": a * noise - s * x0}
    got = convert(truth[given], a * x0 + s * noise, t, schedule, given=given, wanted=wanted)
    torch.testing.assert_close(got, truth[wanted], atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_network_that_knows_the_answer_is_zero(kind):
    schedule, x0 = NoiseSchedule.linear(), torch.randn(1, 2, generator=seeded()).repeat(64, 1)

    def knows_x0(x_t, t):
        return convert(x0, x_t, t, schedule, given="x0", wanted=kind)

    loss = training_loss(knows_x0, x0, schedule, generator=seeded(), kind=kind)
    assert loss == pytest.approx(0, abs=1e-6)


def test_the_loss_of_a_network_that_says_nothing_is_the_noise_itself():
    x0 = torch.zeros(5000, 2)
    loss = training_loss(
        lambda x, t: torch.zeros_like(x), x0, NoiseSchedule.linear(), generator=seeded()
    )
    assert loss == pytest.approx(1, abs=0.05)


def test_every_sample_of_a_batch_has_a_time_of_its_own_over_the_whole_range():
    seen = []

    def model(x, t):
        seen.append(t)
        return x

    training_loss(model, torch.zeros(4000, 1), NoiseSchedule.linear(), generator=seeded())
    assert seen[0].min() < 10
    assert seen[0].max() > 989
    assert len(seen[0].unique()) > 900


# ------------------------------------------------------------------ samplers


class Recorded:
    """Hands a scheduler of diffusers the noise that our sampler has drawn."""

    def __init__(self, monkeypatch, module, seed):
        generator = seeded(seed)
        monkeypatch.setattr(
            f"diffusers.schedulers.{module}.randn_tensor",
            lambda shape, **_: torch.randn(shape, generator=generator),
        )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("kind", "clip", "steps", "count", "variance"),
    [
        ("epsilon", 1.0, 100, 100, "small"),
        ("epsilon", None, 1000, 25, "small"),
        ("epsilon", None, 1000, 25, "large"),
        ("x0", 1.0, 1000, 25, "large"),
        ("x0", None, 1000, 25, "small"),
        ("v", 1.0, 1000, 25, "small"),
    ],
)
def test_ancestral_sampling_equals_diffusers(name, kind, clip, steps, count, variance, monkeypatch):
    schedule, options = of_both(name, steps)
    theirs = DDPMScheduler(
        **options,
        prediction_type=KINDS[kind],
        clip_sample=clip is not None,
        timestep_spacing="leading",
        variance_type=f"fixed_{variance}",
    )
    theirs.set_timesteps(count)
    x = x_T = torch.randn(4, 3, 2, 2, generator=seeded())
    ours = ddpm_sample(
        network,
        x_T,
        schedule,
        generator=seeded(1),
        timesteps=schedule.timesteps(count, "leading"),
        kind=kind,
        clip=clip,
        variance=variance,
    )
    Recorded(monkeypatch, "scheduling_ddpm", 1)
    torch.testing.assert_close(next(ours), x_T)
    for t in theirs.timesteps:
        x = theirs.step(network(x, t.expand(4)), t, x).prev_sample
        torch.testing.assert_close(next(ours), x, atol=1e-5, rtol=1e-5)
    assert next(ours, None) is None


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("kind", "clip", "steps", "count", "eta"),
    [
        ("epsilon", None, 100, 100, 0.0),
        ("epsilon", 1.0, 1000, 25, 0.0),
        ("epsilon", None, 1000, 25, 0.5),
        ("x0", 1.0, 1000, 25, 0.0),
        ("x0", None, 1000, 25, 1.0),
        ("v", 1.0, 1000, 25, 0.5),
    ],
)
def test_ddim_sampling_equals_diffusers(name, kind, clip, steps, count, eta, monkeypatch):
    schedule, options = of_both(name, steps)
    theirs = DDIMScheduler(**options, prediction_type=KINDS[kind], clip_sample=clip is not None)
    theirs.set_timesteps(count)
    x = x_T = torch.randn(4, 3, 2, 2, generator=seeded())
    ours = ddim_sample(
        network,
        x_T,
        schedule,
        generator=seeded(1),
        timesteps=schedule.timesteps(count, "leading"),
        kind=kind,
        clip=clip,
        eta=eta,
    )
    Recorded(monkeypatch, "scheduling_ddim", 1)
    next(ours)
    for t in theirs.timesteps:
        output = network(x, t.expand(4))
        x = theirs.step(output, t, x, eta=eta, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(next(ours), x, atol=1e-5, rtol=1e-5)


def test_ddim_with_eta_1_is_ddpm():
    schedule, x_T = NoiseSchedule.linear(100), torch.randn(8, 2, generator=seeded())
    *_, a = ddpm_sample(network, x_T, schedule, generator=seeded(1))
    *_, b = ddim_sample(network, x_T, schedule, generator=seeded(1), eta=1.0)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1})·q(x_{t-1} | x_0), two Gaussians in x_{t-1}."""
    schedule, t = NoiseSchedule.linear(10, 0.05, 0.3), 6
    x0, x_t = torch.randn(2, 5, 2, generator=seeded())
    beta, bar = schedule.betas[t], schedule.alphas_cumprod[t - 1]
    precision = (1 - beta) / beta + 1 / (1 - bar)
    weighted = (1 - beta).sqrt() * x_t / beta + bar.sqrt() * x0 / (1 - bar)
    mean, variance = posterior(x0, x_t, t, t - 1, schedule)
    torch.testing.assert_close(variance, 1 / precision, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mean, weighted / precision, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sample", [ddpm_sample, ddim_sample])
def test_a_sampler_yields_every_step_keeps_no_graph_and_repeats_itself(sample):
    schedule = NoiseSchedule.linear(20, 0.01, 0.3)
    layer = torch.nn.Linear(2, 2)
    x_T = torch.randn(3, 2, generator=seeded())
    runs = [
        list(sample(lambda x, t: layer(x), x_T, schedule, generator=seeded(3))) for _ in range(2)
    ]
    assert len(runs[0]) == 21
    assert runs[0][0] is x_T
    assert not any(x.requires_grad for x in runs[0])
    assert torch.is_grad_enabled()
    torch.testing.assert_close(runs[0], runs[1], atol=0, rtol=0)


def test_noise_without_a_generator_is_an_error():
    with pytest.raises(ValueError, match="eta = 0.5 draws noise: give a generator"):
        list(ddim_sample(network, torch.zeros(1, 2), NoiseSchedule.linear(), eta=0.5))
