"""The mixture in the plane: against autograd, against many samples, and as the samplers' model."""

import dataclasses

import pytest
import torch

from lrd_helpers import ddpm
from lrd_helpers.mixture import THREE, Mixture
from lrd_helpers.sampling import predictions

EXACT = Mixture(THREE.means.double(), THREE.variances.double(), THREE.weights, THREE.classes)
SCHEDULE = ddpm.NoiseSchedule.cosine(200)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def places(count=50, seed=0):
    return 3 * torch.randn(count, 2, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("mixture", [EXACT, EXACT.given("star"), EXACT.noised(0.6, 0.8)])
def test_the_score_is_the_gradient_of_the_log_density(mixture):
    x = places().requires_grad_()
    [gradient] = torch.autograd.grad(mixture.log_density(x).sum(), x)
    torch.testing.assert_close(mixture.score(x), gradient)


@pytest.mark.parametrize("mixture", [EXACT, EXACT.given("cat"), EXACT.noised(0.6, 0.8)])
def test_the_density_integrates_to_one(mixture):
    lines = torch.linspace(-8, 8, 400, dtype=torch.float64)
    grid = torch.cartesian_prod(lines, lines)
    assert float(mixture.log_density(grid).exp().sum()) * float(
        lines[1] - lines[0]
    ) ** 2 == pytest.approx(1, abs=1e-3)


def test_the_density_of_one_component_is_the_normal_one():
    cat = EXACT.given("cat")
    normal = torch.distributions.MultivariateNormal(
        cat.means[0], cat.variances[0] * torch.eye(2, dtype=torch.float64)
    )
    torch.testing.assert_close(cat.log_density(places()), normal.log_prob(places()))


def test_the_classes_together_are_the_whole():
    x = places()
    parts = [
        share * EXACT.given(name).log_density(x).exp()
        for name, share in (("cat", 0.35), ("star", 0.65))
    ]
    torch.testing.assert_close(sum(parts), EXACT.log_density(x).exp(), rtol=1e-6, atol=1e-12)


def test_samples_have_the_moments_and_shares_of_the_mixture():
    x, k = THREE.sample(40_000, seeded())
    for component, (mean, variance, weight) in enumerate(
        zip(THREE.means, THREE.variances, THREE.weights, strict=True)
    ):
        cloud = x[k == component]
        assert len(cloud) / len(x) == pytest.approx(float(weight), abs=0.01)
        torch.testing.assert_close(cloud.mean(0), mean, atol=0.02, rtol=0)
        torch.testing.assert_close(cloud.var(0), variance.expand(2), atol=0.01, rtol=0)
    assert x.var(0).mean() == pytest.approx(1, abs=0.1), "as the schedules expect it"


@pytest.mark.parametrize(
    ("signal", "spread"), [(0.95**0.5, 0.05**0.5), (0.5, 0.75**0.5), (0.8, 0.2), (0.3, 0.7)]
)
def test_noised_samples_have_the_law_of_the_noised_mixture(signal, spread):
    """Of many noised samples near a place: how many there are, and their mean noise and flow."""
    x0, _ = THREE.sample(200_000, seeded())
    noise = torch.randn(x0.shape, generator=seeded(1))
    x = signal * x0 + spread * noise
    law = THREE.noised(signal, spread)
    for place in torch.tensor([[0.0, 0.7], [-0.8, -0.2]]):
        near = ((x - place).abs() < 0.2).all(1)
        square = place + 0.4 * torch.rand(10_000, 2, generator=seeded(2)) - 0.2
        expected = float(law.log_density(square).exp().mean()) * 0.4**2 * len(x)
        assert int(near.sum()) == pytest.approx(expected, abs=4 * expected**0.5)
        if signal + spread == 1:
            seen, said = (noise - x0)[near], THREE.velocity(x[near], spread)
        else:
            seen, said = noise[near], THREE.eps(x[near], signal**2)
        error = (seen - said).mean(0) / (seen - said).std(0) * len(seen) ** 0.5
        assert error.abs().max() < 4


def test_velocity_and_eps_are_one_prediction_in_two_words():
    """At ᾱ with √ᾱ = c·(1 − t), √(1 − ᾱ) = c·t the same x_0 and ε make c times the same x."""
    x, t = places(), 0.3
    c = 1 / (t**2 + (1 - t) ** 2) ** 0.5
    eps = EXACT.eps(c * x, torch.tensor((c * (1 - t)) ** 2, dtype=torch.float64))
    flow = predictions.convert(eps, x, 1 - t, t, given="epsilon", wanted="flow")
    torch.testing.assert_close(EXACT.velocity(x, t), flow)


def test_pure_noise_tells_nothing():
    """At t = 1 the velocity is x − E[x_0], at ᾱ = 0 eps is x itself: both finite."""
    x = places()
    mean = (EXACT.weights[:, None] * EXACT.means).sum(0)
    torch.testing.assert_close(EXACT.velocity(x, 1.0), x - mean)
    torch.testing.assert_close(EXACT.eps(x, 0.0), x)


def test_each_point_may_have_a_time_of_its_own():
    x = places(6)
    bars = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    for exact in (EXACT.eps, EXACT.velocity):
        single = torch.stack([exact(point, bar) for point, bar in zip(x, bars, strict=True)])
        torch.testing.assert_close(exact(x, bars), single)


@pytest.mark.parametrize("sampler", [ddpm.ddpm_sample, ddpm.ddim_sample])
@pytest.mark.parametrize("name", [None, "star"])
def test_the_samplers_lead_from_noise_to_the_mixture(sampler, name):
    """The reverse SDE and the probability-flow ODE, both with the exact eps."""
    mixture = THREE if name is None else THREE.given(name)
    x_T = torch.randn(4000, 2, generator=seeded(2))
    model, times = mixture.model(SCHEDULE), SCHEDULE.timesteps(50)
    *_, x = sampler(model, x_T, SCHEDULE, generator=seeded(3), timesteps=times)
    nearest = torch.cdist(x, mixture.means).argmin(1)
    shares = nearest.bincount(minlength=len(mixture.weights)) / len(x)
    torch.testing.assert_close(shares, mixture.weights / mixture.weights.sum(), atol=0.04, rtol=0)
    torch.testing.assert_close(
        x.var(0), mixture.sample(20_000, seeded())[0].var(0), atol=0.08, rtol=0
    )


def test_flow_matching_leads_from_noise_to_the_mixture():
    x = torch.randn(4000, 2, generator=seeded(2))
    for i in range(50, 0, -1):
        x = x - THREE.velocity(x, i / 50) / 50
    shares = torch.cdist(x, THREE.means).argmin(1).bincount() / len(x)
    torch.testing.assert_close(shares, THREE.weights, atol=0.03, rtol=0)


def test_the_exact_eps_has_the_least_loss():
    """Any other answer costs more, and the least is not 0: nobody can tell all of the noise."""
    x0, _ = THREE.sample(20_000, seeded())
    exact = THREE.model(SCHEDULE)
    others = [
        exact,
        lambda x, t: 0.9 * exact(x, t),
        lambda x, t: exact(x, t) + 0.1,
        THREE.given("star").model(SCHEDULE),
    ]
    least, *losses = (
        float(ddpm.training_loss(model, x0, SCHEDULE, generator=seeded(1))) for model in others
    )
    assert 0.1 < least < min(losses)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match=r"'dog' is no class; there are \['cat', 'star'\]"):
        THREE.given("dog")
    with pytest.raises(ValueError, match="every weight must be above 0"):
        dataclasses.replace(THREE, weights=torch.tensor([0.5, 0.0, 0.5]))
    with pytest.raises(ValueError, match="3 components, but 1 classes"):
        dataclasses.replace(THREE, classes=("cat",))
