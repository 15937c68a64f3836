"""The first stage's formulas, on small tensors: against the papers and against diffusers."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, VectorQuantizer
from torch import nn
from torch.nn import functional

from lrd_helpers.autoencoder import (
    PatchDiscriminator,
    adaptive_weight,
    codebook_loss,
    gradient_loss,
    hinge_loss,
    kl_divergence,
    look_up,
    nearest_codes,
    perceptual_distance,
    perplexity,
    psnr,
    reparameterise,
    scaling_factor,
    straight_through,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ KL


def test_the_divergence_is_that_of_diffusers():
    moments = random(3, 8, 4, 4)
    theirs = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(kl_divergence(theirs.mean, theirs.logvar), theirs.kl().mean())


def test_the_divergence_is_the_integral():
    mean, deviation = 0.7, 0.4
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)

    def log_density(mu, sigma):
        return -(((x - mu) / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi))

    p, q = log_density(mean, deviation), log_density(0, 1)
    integral = torch.trapezoid(p.exp() * (p - q), x)
    ours = kl_divergence(torch.tensor([[mean]]), torch.tensor([[2 * math.log(deviation)]]))
    assert float(ours) == pytest.approx(float(integral), abs=1e-5)


def test_only_a_standard_gaussian_costs_nothing():
    assert float(kl_divergence(torch.zeros(2, 5), torch.zeros(2, 5))) == 0
    assert float(kl_divergence(random(2, 5), random(2, 5, seed=1))) > 0


def test_a_draw_has_the_mean_and_the_deviation_asked_for():
    mean, log_variance = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, math.log(9.0)]])
    draws = reparameterise(
        mean.expand(40_000, 2), log_variance.expand(40_000, 2), random(40_000, 2)
    )
    torch.testing.assert_close(draws.mean(0), mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.tensor([1.0, 3.0]), atol=0.05, rtol=0)


def test_a_draw_lets_gradients_through_to_mean_and_variance():
    mean, log_variance = random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()
    noise = random(2, 3, seed=2)
    reparameterise(mean, log_variance, noise).sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(2, 3))
    torch.testing.assert_close(log_variance.grad, (log_variance / 2).exp().detach() / 2 * noise)


@pytest.mark.parametrize("shape", [(64, 4, 8, 8), (5, 7)])
def test_scaled_latents_have_unit_variance(shape):
    latents = 3 * random(*shape) + 11
    scaled = scaling_factor(latents) * latents
    assert float(scaled.std(correction=0)) == pytest.approx(1, abs=1e-5)


# ------------------------------------------------------------------ VQ


def quantised(latents, codebook):
    codes = nearest_codes(latents, codebook)
    return codes, look_up(codes, codebook)


def test_codes_loss_and_gradients_are_those_of_diffusers():
    latents, codebook = random(2, 3, 4, 5).requires_grad_(), random(6, 3, seed=1).requires_grad_()
    # legacy=True would weigh the other term with β, by a bug of old.
    theirs = VectorQuantizer(6, 3, beta=0.25, legacy=False)
    theirs.embedding.weight.data = codebook.detach().clone()

    codes, vectors = quantised(latents, codebook)
    loss = codebook_loss(latents, vectors)
    passed = straight_through(latents, vectors)
    weights = random(*passed.shape, seed=2)
    gradients = torch.autograd.grad((passed * weights).sum() + loss, [latents, codebook])

    again = latents.detach().clone().requires_grad_()
    their_vectors, their_loss, (_, _, their_codes) = theirs(again)
    their_gradients = torch.autograd.grad(
        (their_vectors * weights).sum() + their_loss, [again, theirs.embedding.weight]
    )
    assert torch.equal(codes.flatten(), their_codes)
    torch.testing.assert_close(passed, their_vectors)
    torch.testing.assert_close(loss, their_loss)
    for ours, other in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(ours, other)


def test_every_position_gets_its_nearest_code():
    latents, codebook = random(2, 3, 4, 4), random(5, 3, seed=1)
    codes, vectors = quantised(latents, codebook)
    distances = (latents[:, None] - codebook[:, :, None, None]).norm(dim=2)
    assert torch.equal(codes, distances.argmin(1))
    torch.testing.assert_close((latents - vectors).norm(dim=1), distances.amin(1))


def test_the_codebook_loss_moves_codes_to_latents_and_holds_latents_at_codes():
    latents, codebook = torch.ones(1, 1, 1, 1), torch.zeros(1, 1)
    latents, codebook = latents.requires_grad_(), codebook.requires_grad_()
    loss = codebook_loss(latents, look_up(torch.zeros(1, 1, 1, dtype=torch.long), codebook), 0.5)
    by_latents, by_codes = torch.autograd.grad(loss, [latents, codebook])
    assert float(loss.detach()) == pytest.approx(1.5)
    assert float(by_latents) == pytest.approx(0.5 * 2)  # towards the code, weighed with 0.5
    assert float(by_codes) == pytest.approx(-2)  # towards the latent


def test_perplexity_counts_the_codes_in_use():
    assert float(perplexity(torch.tensor([[0, 1], [2, 3]]), 64)) == pytest.approx(4)
    assert float(perplexity(torch.full((3, 4, 4), 7), 64)) == pytest.approx(1)
    assert 1 < float(perplexity(torch.tensor([0, 0, 0, 1]), 2)) < 2


# ------------------------------------------------------------------ losses on pictures


def test_psnr_of_a_known_error():
    target = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    difference = torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr(target + difference, target), torch.tensor([20.0, 40.0]))


def test_the_gradient_loss_sees_edges_and_not_brightness():
    edge = torch.zeros(1, 3, 4, 4)
    edge[..., 2:] = 1
    assert float(gradient_loss(edge + 0.3, edge)) == pytest.approx(0, abs=1e-6)
    flat = torch.full((1, 3, 4, 4), 0.5)
    assert float(gradient_loss(flat, edge)) == pytest.approx(1 / 3)  # one of three steps a row


def test_the_perceptual_distance_is_the_formula():
    first = [random(2, 3, 4, 4), random(2, 5, 2, 2, seed=1)]
    second = [random(2, 3, 4, 4, seed=2), random(2, 5, 2, 2, seed=3)]
    expected = torch.zeros(2)
    for one, other in zip(first, second, strict=True):
        for sample in range(2):
            height, width = one.shape[2:]
            for y in range(height):
                for x in range(width):
                    a, b = one[sample, :, y, x], other[sample, :, y, x]
                    square = ((a / a.norm() - b / b.norm()) ** 2).sum()
                    expected[sample] += square / (height * width)
    torch.testing.assert_close(perceptual_distance(first, second), expected)
    assert torch.equal(perceptual_distance(first, first), torch.zeros(2))
    scaled = [5 * layer for layer in first]  # only directions count
    assert perceptual_distance(first, scaled).max() < 1e-5


@pytest.mark.parametrize(("first", "second"), [([], []), ([random(1, 2, 3, 3)], [])])
def test_the_perceptual_distance_wants_the_same_layers(first, second):
    with pytest.raises(ValueError, match="the same layers of both"):
        perceptual_distance(first, second)


@pytest.mark.parametrize(("layers", "sees"), [(1, 10), (2, 22), (3, 46)])
def test_an_answer_of_the_discriminator_sees_one_patch(layers, sees):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=4, layers=layers)
    images = random(1, 3, 96, 96).requires_grad_()
    answers = discriminator(images)
    assert answers.shape[1] == 1
    middle = answers.shape[-1] // 2
    [gradient] = torch.autograd.grad(answers[0, 0, middle, middle], images)
    rows = gradient[0].abs().sum(0).sum(1).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == sees


def test_right_by_a_margin_costs_the_discriminator_nothing():
    real, made = torch.tensor([3.0, 1.0]), torch.tensor([-1.0, -7.0])
    assert float(hinge_loss(real, made)) == 0
    assert float(hinge_loss(torch.tensor([0.0]), torch.tensor([0.5]))) == pytest.approx(1 + 1.5)


def test_a_discriminator_learns_what_is_sharp():
    torch.manual_seed(0)
    discriminator, generator = PatchDiscriminator(width=8), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(discriminator.parameters(), 5e-3)

    def pair():
        real = torch.randn(4, 3, 24, 24, generator=generator)
        return real, functional.avg_pool2d(real, 3, 1, 1)

    for _ in range(30):
        real, blurred = pair()
        loss = hinge_loss(discriminator(real), discriminator(blurred))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, blurred = pair()
    assert discriminator(real).mean() > discriminator(blurred).mean() + 1


def test_the_adaptive_weight_makes_both_losses_pull_equally_hard():
    layer = nn.Linear(3, 3)
    output = layer(random(5, 3))
    reconstruction, adversarial = output.square().mean(), 1000 * output.sum()
    weight = adaptive_weight(reconstruction, adversarial, layer.weight)
    pulls = [
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm()
        for loss in (reconstruction, weight * adversarial)
    ]
    torch.testing.assert_close(pulls[0], pulls[1], rtol=1e-4, atol=0)
    assert not weight.requires_grad


def test_the_adaptive_weight_is_bounded_where_the_adversary_has_no_say():
    layer = nn.Linear(3, 3)
    output = layer(random(5, 3))
    weight = adaptive_weight(output.square().mean(), 0 * output.sum(), layer.weight)
    assert float(weight) == 1e4
