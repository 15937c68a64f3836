"""The checks of notebook 07: a right answer passes however written, each mistake is recognised."""

import pytest
import torch
from test_checks import assert_diagnosed

from lrd_helpers.checks import vision_guidance as checks


def xi_by_where(delta, mask, inside, outside):
    strength = torch.where(mask > 0, inside, -outside)
    return torch.einsum("c,hw->chw", delta, strength)


def xi_with_channels_last(delta, mask, inside, outside):
    return delta * (inside * mask - outside * (1 - mask))[..., None]


def xi_without_channels(delta, mask, inside, outside):
    return inside * mask - outside * (1 - mask)


def delta_by_sorting(x, attention, k):
    order = sorted(range(attention.numel()), key=lambda n: -float(attention.flatten()[n]))
    return torch.stack([x.flatten(1)[:, n] for n in order[:k]]).mean(0)


def delta_as_one_number(x, attention, k):
    return x.flatten(1)[:, attention.flatten().topk(k).indices].mean()


def delta_top_of_x(x, attention, k):
    return x.flatten(1).topk(k).values.mean(1)


def step_in_place(score, step, x, xi, t):
    x += xi
    return step(score(x, t), t, x)


ANSWERS = [
    ("snr_of_mean", lambda bar, v, n: n * v * bar / (1 - bar), "✓"),
    ("snr_of_mean", lambda bar, v, n: torch.tensor(n * v * bar / (1 - bar)), "✓"),
    ("snr_of_mean", lambda bar, v, n: v * bar / (1 - bar), "the noise of one cell"),
    ("snr_of_mean", lambda bar, v, n: v * bar / (1 - bar) / n, "grows with the number"),
    ("snr_of_mean", lambda bar, v, n: v * bar / (1 - bar) * n**0.5, "divided by √n"),
    ("snr_of_mean", lambda bar, v, n: (n * v * bar / (1 - bar)) ** 0.5, "a ratio of spreads"),
    ("snr_of_mean", lambda bar, v, n: (1 - bar) / (n * v * bar), "noise over signal"),
    ("snr_of_mean", lambda bar, v, n: n * v * bar**2 / (1 - bar) ** 2, "twice"),
    ("snr_of_mean", lambda bar, v, n: n * bar / (1 - bar), "own variance is missing"),
    ("snr_of_mean", lambda bar, v, n: bar * v, "variance of the signal, ᾱ·v, over"),
    ("snr_of_mean", lambda bar, v, n: [bar], "a list"),
    ("xi", lambda d, m, a, b: d[:, None, None] * (a * m - b * (1 - m)), "✓"),
    ("xi", xi_by_where, "✓"),
    ("xi", lambda d, m, a, b: d[:, None, None] * ((a + b) * m - b), "✓"),
    ("xi", lambda d, m, a, b: d[:, None, None] * (a * m), "nothing outside"),
    ("xi", lambda d, m, a, b: d[:, None, None] * (a * m + b * (1 - m)), "the sign of inside"),
    ("xi", lambda d, m, a, b: d[:, None, None] * (b * (1 - m) - a * m), "signs have changed"),
    ("xi", lambda d, m, a, b: d[:, None, None] * (a * (1 - m) - b * m), "what is around it"),
    ("xi", lambda d, m, a, b: d[:, None, None] * (b * m - a * (1 - m)), "two strengths"),
    ("xi", lambda d, m, a, b: d[:, None, None] * (a * (2 * m - 1)), "`outside` has no effect"),
    ("xi", lambda d, m, a, b: d[:, None, None] * (-b * (1 - m)), "nothing inside the box"),
    ("xi", lambda d, m, a, b: d[:, None, None] * (a * m - b), "inside too"),
    ("xi", lambda d, m, a, b: d[:, None, None] * (2 * a * m - b * (1 - m)), "the mask is 1"),
    ("xi", xi_with_channels_last, "the shape (4, 5, 6)"),
    ("xi", xi_without_channels, "the shape (4, 5, 6)"),
    ("guided_step", lambda score, step, x, xi, t: step(score(x + xi, t), t, x), "✓"),
    ("guided_step", lambda score, step, x, xi, t: step(score(x + xi, t), t, x + xi), "piles up"),
    ("guided_step", lambda score, step, x, xi, t: step(score(x, t), t, x), "does not see ξ"),
    ("guided_step", lambda score, step, x, xi, t: step(score(x, t), t, x + xi), "in the latents"),
    ("guided_step", lambda score, step, x, xi, t: step(score(x - xi, t), t, x), "taken away"),
    ("guided_step", lambda score, step, x, xi, t: step(score(x, t) + xi, t, x), "to the answer"),
    ("guided_step", lambda score, step, x, xi, t: score(x + xi, t), "without the step"),
    ("guided_step", lambda score, step, x, xi, t: x + xi, "seen with ξ"),
    ("guided_step", step_in_place, "changed its arguments in place"),
    ("delta_from_attention", delta_by_sorting, "✓"),
    (
        "delta_from_attention",
        lambda x, a, k: x.flatten(1)[:, a.flatten().topk(k).indices].mean(1),
        "✓",
    ),
    (
        "delta_from_attention",
        lambda x, a, k: x.flatten(1)[:, a.flatten().topk(k).indices].sum(1),
        "the sum over",
    ),
    ("delta_from_attention", lambda x, a, k: x.mean((1, 2)), "the mean over all positions"),
    (
        "delta_from_attention",
        lambda x, a, k: (x * a).sum((1, 2)) / a.sum(),
        "weighted by attention",
    ),
    (
        "delta_from_attention",
        lambda x, a, k: x.flatten(1)[:, a.flatten().argsort()[:k]].mean(1),
        "*smallest*",
    ),
    ("delta_from_attention", delta_top_of_x, "k positions with the largest attention"),
    ("delta_from_attention", delta_as_one_number, "the shape (4,)"),
]


@pytest.mark.parametrize(("exercise", "answer", "said"), ANSWERS)
def test_every_answer_of_notebook_07_is_diagnosed(exercise, answer, said, capsys):
    assert_diagnosed(getattr(checks, f"check_{exercise}"), answer, said, capsys)


@pytest.mark.parametrize("exercise", ["snr_of_mean", "xi", "guided_step", "delta_from_attention"])
def test_an_untouched_stub_is_no_mistake(exercise, capsys):
    def stub(*arguments): ...

    getattr(checks, f"check_{exercise}")(stub)
    assert capsys.readouterr().out == "not implemented yet: stub\n"


def test_what_exercise_1_accepts_is_what_noise_does(capsys):
    """The check's own solution is held against a second source: drawn numbers."""

    def drawn(bar, variance, cells):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(20_000, cells, generator=generator, dtype=torch.float64).mean(1)
        # Only the spread of this draw differs from theory; take that much away.
        return bar * variance / ((1 - bar) * noise.var())

    for bar, variance, cells in ((0.1, 0.6, 16), (0.5, 1.0, 1)):
        exact = bar * variance / ((1 - bar) / cells)
        assert drawn(bar, variance, cells) == pytest.approx(exact, rel=0.05)
    checks.check_snr_of_mean(lambda bar, variance, cells: bar * variance * cells / (1 - bar))
    assert capsys.readouterr().out.startswith("✓")
