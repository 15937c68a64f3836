"""The checks of notebook 02: answers as people write them, right and wrong, are diagnosed."""

import pytest
import torch
from test_checks import assert_diagnosed

from lrd_helpers.checks import autoencoder as checks


def kl(mean, log_variance):
    return -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).flatten(1).sum(1).mean()


def codes_of(latents, codebook):
    """Without the package: all distances, position by position."""
    difference = latents[:, None] - codebook[None, :, :, None, None]
    return difference.square().sum(2).argmin(1)


def quantise(latents, codebook):
    quantised = codebook[codes_of(latents, codebook)].permute(0, 3, 1, 2)
    return latents + (quantised - latents).detach()


def with_inverted_sum(latents, codebook):
    quantised = codebook[codes_of(latents, codebook)].permute(0, 3, 1, 2)
    return quantised.detach() + latents - latents.detach()


def not_moved(latents, codebook):
    return codebook[codes_of(latents, codebook)]


def without_straight_through(latents, codebook):
    return codebook[codes_of(latents, codebook)].permute(0, 3, 1, 2)


@torch.no_grad()
def without_gradients(latents, codebook):
    return quantise(latents, codebook)


def half_a_gradient(latents, codebook):
    return 0.5 * latents + (quantise(latents, codebook) - 0.5 * latents).detach()


ANSWERS = [
    ("kl", kl, "✓"),
    ("kl", lambda m, v: kl(m, v) / 4, "number, ½·Σ"),  # right divided by a wrong count
    ("kl", lambda m, v: -kl(m, v), "the sign is wrong"),
    ("kl", lambda m, v: kl(m, v) * len(m), "the sum over the batch"),
    ("kl", lambda m, v: kl(m, v) * len(m) / m.numel(), "averaged, not added up"),
    ("kl", lambda m, v: kl(m, 2 * v), "saw:"),
    ("kl", lambda m, v: kl(m, v)[None], "the shape (1,)"),
    ("kl", lambda m, v: float(kl(m, v)), "a float"),
    ("draw", lambda m, v, e: m + v.mul(0.5).exp() * e, "✓"),
    ("draw", lambda m, v, e: torch.normal(m, v.exp().sqrt()) + 0 * e, "saw:"),  # its own noise
    ("draw", lambda m, v, e: m + v.exp() * e, "the variance σ²"),
    ("draw", lambda m, v, e: m + v.sqrt() * e, "nan"),
    ("draw", lambda m, v, e: e, "saw:"),
    ("quantise", quantise, "✓"),
    ("quantise", with_inverted_sum, "✓"),
    ("quantise", not_moved, "the shape (2, 4, 4, 3)"),
    ("quantise", without_straight_through, "the gradient goes to the codebook"),
    ("quantise", without_gradients, "no gradient reaches the encoder"),
    ("quantise", half_a_gradient, "saw:"),
    ("quantise", lambda z, e: z, "the latents themselves"),
    ("quantise", codes_of, "the shape (2, 4, 4)"),
    ("factor", lambda z: 1 / z.std(), "✓"),
    ("factor", lambda z: 1 / float(z.std(correction=0)), "✓"),
    ("factor", lambda z: z.std() ** -2, "the square root is missing"),
    ("factor", lambda z: z.std(), "σ̂ itself"),
    ("factor", lambda z: (z**2).mean() ** -0.5, "the mean is not taken off"),
    ("factor", lambda z: 0.18215, "0.1822"),
    ("factor", lambda z: 1 / z.std((0, 2, 3)), "a number"),
]


@pytest.mark.parametrize(("exercise", "answer", "said"), ANSWERS)
def test_every_answer_of_notebook_02_is_diagnosed(exercise, answer, said, capsys):
    assert_diagnosed(getattr(checks, f"check_{exercise}"), answer, said, capsys)
