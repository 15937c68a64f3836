"""The checks of notebook 04: a right answer passes however written, each mistake is recognised."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from test_checks import assert_diagnosed
from torch.distributions import Normal, kl
from torch.nn import functional

from lrd_helpers.checks import conditioning as checks

# ------------------------------------------------------------------ answers to exercise 1


def attention(fits=lambda q, k: q @ k.T / q.shape[1] ** 0.5, axis=1, said="v"):
    def answer(x, c, to_q, to_k, to_v):
        parts = {"q": x @ to_q.T, "k": c @ to_k.T, "v": c @ to_v.T}
        return functional.softmax(fits(parts["q"], parts["k"]), axis) @ parts[said]

    return answer


def fused(x, c, to_q, to_k, to_v):
    q, k, v = functional.linear(x, to_q), functional.linear(c, to_k), functional.linear(c, to_v)
    return functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def without_softmax(x, c, to_q, to_k, to_v):
    return (x @ to_q.T) @ (c @ to_k.T).T / len(to_q) ** 0.5 @ (c @ to_v.T)


def softmax_of_all(x, c, to_q, to_k, to_v):
    fits = (x @ to_q.T) @ (c @ to_k.T).T / len(to_q) ** 0.5
    return (fits.exp() / fits.exp().sum()) @ (c @ to_v.T)


def self_attention(x, c, to_q, to_k, to_v):
    return attention()(x, x, to_q, to_k, to_v)


def no_transpose(x, c, to_q, to_k, to_v):
    return x @ to_q


def only_shares(x, c, to_q, to_k, to_v):
    return ((x @ to_q.T) @ (c @ to_k.T).T / len(to_q) ** 0.5).softmax(1)


# ------------------------------------------------------------------ answers to the others


def by_loop(features):
    rows = []
    for picture in features:
        means = [channel.mean() for channel in picture]
        rows.append(torch.stack(means + [channel.var().sqrt() for channel in picture]))
    return torch.stack(rows)


def as_adain(features):
    variance, mean = torch.var_mean(features, (2, 3))
    return torch.cat([mean, (variance + 1e-5).sqrt()], 1)


def statistics(spread, combine=lambda a, b: torch.cat([a, b], 1)):
    return lambda x: combine(x.mean((2, 3)), spread(x))


def std(x):
    return x.std((2, 3))


def joined(combine):
    return lambda text, style, strength: torch.cat(combine(text, style, strength), dim=1)


def divergence(mean, log_variance):
    code = Normal(mean, (log_variance / 2).exp())
    return kl.kl_divergence(code, Normal(0.0, 1.0)).sum(1).mean()


def loss(error=functional.mse_loss, code=divergence, combine=lambda a, b, w: a + w * b):
    def answer(noise, prediction, mean, log_variance, kl_weight):
        return combine(error(prediction, noise), code(mean, log_variance), kl_weight)

    return answer


def half(formula):
    """A KL made of a formula in μ and log σ²."""
    return lambda m, v: 0.5 * formula(m, v).sum(1).mean()


ANSWERS = [
    ("cross_attention", attention(), "✓"),
    ("cross_attention", fused, "✓"),
    ("cross_attention", attention(lambda q, k: q @ k.T), "not scaled"),
    ("cross_attention", attention(lambda q, k: q @ k.T / q.shape[1]), "divided by d: the square"),
    ("cross_attention", attention(lambda q, k: q @ k.T * q.shape[1] ** 0.5), "multiplied by √d"),
    ("cross_attention", attention(lambda q, k: -q @ k.T / q.shape[1] ** 0.5), "the wrong sign"),
    ("cross_attention", attention(axis=0), "over the positions of the picture"),
    ("cross_attention", softmax_of_all, "positions and tokens together"),
    ("cross_attention", without_softmax, "there is no softmax"),
    ("cross_attention", attention(said="k"), "in place of the values"),
    ("cross_attention", self_attention, "it raised RuntimeError"),
    ("cross_attention", no_transpose, "it raised RuntimeError"),
    ("cross_attention", only_shares, "the shape (3, 2)"),
    ("cross_attention", attention(lambda q, k: q @ k.T / len(k) ** 0.5), "softmax(QKᵀ/√d)·V"),
    ("style_statistics", as_adain, "✓"),
    ("style_statistics", by_loop, "✓"),
    ("style_statistics", statistics(lambda x: x.std((2, 3), correction=0)), "✓"),
    ("style_statistics", statistics(lambda x: x.var((2, 3))), "the square root is missing"),
    (
        "style_statistics",
        statistics(lambda x: x.var((2, 3), correction=0)),
        "the square root is missing",
    ),
    (
        "style_statistics",
        statistics(lambda x: x.square().mean((2, 3)).sqrt()),
        "the mean was not taken off",
    ),
    (
        "style_statistics",
        statistics(lambda x: (x - x.mean((2, 3), keepdim=True)).abs().mean((2, 3))),
        "mean absolute differences",
    ),
    ("style_statistics", statistics(std, lambda a, b: torch.cat([b, a], 1)), "come first"),
    (
        "style_statistics",
        statistics(std, lambda a, b: torch.stack([a, b], -1).flatten(1)),
        "side by side",
    ),
    ("style_statistics", statistics(std, lambda a, b: torch.cat([a, a], 1)), "twice"),
    ("style_statistics", statistics(std, lambda a, b: a), "the shape (2, 3)"),
    ("style_statistics", statistics(std, lambda a, b: (a, b)), "a tuple"),
    ("style_statistics", lambda x: torch.cat([x.mean(1), x.std(1)], 1), "the shape (2, 40, 16)"),
    ("style_statistics", statistics(lambda x: x.amax((2, 3))), "the means of all channels"),
    ("joined", joined(lambda text, style, s: [text, s * style]), "✓"),
    ("joined", joined(lambda text, style, s: [s * style, text]), "before the text"),
    ("joined", joined(lambda text, style, s: [text, style]), "ignored"),
    ("joined", joined(lambda text, style, s: [s * text, s * style]), "the text is scaled, too"),
    ("joined", joined(lambda text, style, s: [s * text, style]), "instead of the style"),
    ("joined", joined(lambda text, style, s: [(1 - s) * text, s * style]), "fades"),
    ("joined", joined(lambda text, style, s: [text, (1 - s) * style]), "1 − strength"),
    ("joined", lambda text, style, s: torch.cat([text, s * style], 0), "it raised RuntimeError"),
    ("joined", lambda text, style, s: torch.cat([text, s * style], 2), "it raised RuntimeError"),
    ("joined", lambda text, style, s: text, "the shape (2, 5, 4)"),
    ("joined", joined(lambda text, style, s: [text, s**0.5 * style]), "[text; strength·style]"),
    ("two_part_loss", loss(), "✓"),
    ("two_part_loss", loss(combine=lambda a, b, w: (a + w * b).item()), "✓"),
    ("two_part_loss", loss(combine=lambda a, b, w: a - w * b), "subtracted"),
    ("two_part_loss", loss(code=half(lambda m, v: 1 + v - m**2 - v.exp())), "subtracted"),
    ("two_part_loss", loss(combine=lambda a, b, w: a + b), "not weighted"),
    ("two_part_loss", loss(combine=lambda a, b, w: a), "there is no KL"),
    (
        "two_part_loss",
        loss(code=lambda m, v: (m**2 + v.exp() - 1 - v).mean() / 2),
        "averaged over the numbers",
    ),
    (
        "two_part_loss",
        loss(code=lambda m, v: (m**2 + v.exp() - 1 - v).sum() / 2),
        "summed over the batch",
    ),
    ("two_part_loss", loss(code=lambda m, v: 2 * divergence(m, v)), "lacks its ½"),
    (
        "two_part_loss",
        loss(code=half(lambda m, v: m**2 + (v / 2).exp() - 1 - v)),
        "takes σ where σ² belongs",
    ),
    (
        "two_part_loss",
        loss(code=half(lambda m, v: m**2 + v.exp() - 1 + v)),
        "the wrong sign in the KL",
    ),
    (
        "two_part_loss",
        loss(code=half(lambda m, v: m**2 + v - 1 - v.abs().log())),
        "log_variance for the variance",
    ),
    ("two_part_loss", loss(code=half(lambda m, v: m**2 + v - 1 - v.log())), "nan"),
    ("two_part_loss", loss(code=half(lambda m, v: m + v.exp() - 1 - v)), "μ where μ² belongs"),
    ("two_part_loss", loss(lambda a, b: (a - b).square().sum()), "added up"),
    ("two_part_loss", loss(lambda a, b: (a - b).square().mean().sqrt()), "the root of the mean"),
    ("two_part_loss", loss(lambda a, b: (b - a).mean()), "cancel"),
    ("two_part_loss", loss(lambda a, b: (a - b).square()), "a Tensor"),
    ("two_part_loss", loss(lambda a, b: (a - b).abs().mean()), "mean((noise − prediction)²)"),
]


@pytest.mark.parametrize(("exercise", "answer", "said"), ANSWERS)
def test_every_answer_of_notebook_04_is_diagnosed(exercise, answer, said, capsys):
    assert_diagnosed(getattr(checks, f"check_{exercise}"), answer, said, capsys)


EXERCISES = ["cross_attention", "style_statistics", "joined", "two_part_loss"]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_untouched_stub_is_no_mistake(exercise, capsys):
    def stub(*arguments): ...

    getattr(checks, f"check_{exercise}")(stub)
    assert capsys.readouterr().out == "not implemented yet: stub\n"


def test_exercise_1_accepts_what_diffusers_does(capsys):
    """Its `Attention` with one head and these matrices, and nothing after them."""

    def cross_attention(x, c, to_q, to_k, to_v):
        d, width = to_q.shape
        module = Attention(width, c.shape[1], heads=1, dim_head=d, bias=False, out_bias=False)
        for name, matrix in (("to_q", to_q), ("to_k", to_k), ("to_v", to_v)):
            module.get_submodule(name).weight.data = matrix
        module.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        return module(x[None], encoder_hidden_states=c[None])[0]

    checks.check_cross_attention(cross_attention)
    assert capsys.readouterr().out.startswith("✓")
