"""The checks of notebook 03: a right answer passes however written, each mistake is recognised."""

import pytest
import torch
from diffusers import DDIMScheduler
from test_checks import assert_diagnosed

from lrd_helpers.checks import latent_diffusion as checks

# ------------------------------------------------------------------ answers to exercise 2


def loss(*, scaled=None, seen=None, wanted=None, compare=None, text_of=None):
    """An answer made of its five choices; each is right where it is not given."""

    def answer(unet, z, text, t, noise, alphas_cumprod, scaling_factor):
        x0 = (scaled or (lambda z, factor: factor * z))(z, scaling_factor)
        bar = alphas_cumprod[t][:, None, None, None]
        x_t = bar**0.5 * x0 + (1 - bar) ** 0.5 * noise
        guess = unet((seen or (lambda x_t, x0: x_t))(x_t, x0), t, (text_of or (lambda y: y))(text))
        target = (wanted or (lambda noise, x0: noise))(noise, x0)
        return (compare or (lambda a, b: ((a - b) ** 2).mean()))(guess.sample, target)

    return answer


def forgets_sample(unet, z, text, t, noise, alphas_cumprod, scaling_factor):
    bar = alphas_cumprod[t][:, None, None, None]
    x_t = bar.sqrt() * scaling_factor * z + (1 - bar).sqrt() * noise
    return torch.nn.functional.mse_loss(unet(x_t, t, text), noise)


def bars_not_reshaped(unet, z, text, t, noise, alphas_cumprod, scaling_factor):
    bar = alphas_cumprod[t]
    x_t = bar.sqrt() * scaling_factor * z + (1 - bar).sqrt() * noise
    return torch.nn.functional.mse_loss(unet(x_t, t, text).sample, noise)


def no_square_roots(unet, z, text, t, noise, alphas_cumprod, scaling_factor):
    bar = alphas_cumprod[t][:, None, None, None]
    x_t = bar * scaling_factor * z + (1 - bar) * noise
    return torch.nn.functional.mse_loss(unet(x_t, t, text).sample, noise)


def in_place(average, weight, decay):
    return average.mul_(decay).add_(weight, alpha=1 - decay)


ANSWERS = [
    ("scaled_linear", lambda n, a, b: torch.linspace(a**0.5, b**0.5, n) ** 2, "✓"),
    ("scaled_linear", lambda n, a, b: torch.linspace(a, b, n), "DDPM's linear schedule"),
    ("scaled_linear", lambda n, a, b: torch.linspace(a, b, n).sqrt(), "saw"),
    ("scaled_linear", lambda n, a, b: torch.linspace(a**0.5, b**0.5, n), "the square roots of β"),
    ("scaled_linear", lambda n, a, b: torch.linspace(a**2, b**2, n).sqrt(), "changed places"),
    (
        "scaled_linear",
        lambda n, a, b: torch.logspace(torch.tensor(a).log10(), torch.tensor(b).log10(), n),
        "logarithm of β",
    ),
    (
        "scaled_linear",
        lambda n, a, b: torch.linspace(a**0.5, b**0.5, n + 1)[:n] ** 2,
        "one step short",
    ),
    ("scaled_linear", lambda n, a, b: torch.linspace(a**0.5, b**0.5, n)[1:] ** 2, "(999,)"),
    ("scaled_linear", lambda n, a, b: [a, b], "a list"),
    ("latent_loss", loss(), "✓"),
    ("latent_loss", loss(scaled=lambda z, factor: z), "the scaling factor is missing"),
    ("latent_loss", loss(scaled=lambda z, factor: z / factor), "divided by the scaling factor"),
    ("latent_loss", loss(wanted=lambda noise, x0: x0), "held against the clean latents"),
    ("latent_loss", loss(wanted=lambda noise, x0: x0 / 0.4), "held against the unscaled latents"),
    ("latent_loss", loss(seen=lambda x_t, x0: x0), "is shown the clean latents"),
    ("latent_loss", loss(text_of=lambda text: 0 * text), "not told the caption"),
    ("latent_loss", loss(compare=lambda a, b: ((a - b) ** 2).sum()), "added up"),
    ("latent_loss", loss(compare=lambda a, b: (a - b) ** 2), "the shape (4, 4, 3, 3)"),
    ("latent_loss", loss(compare=lambda a, b: (a - b).abs().mean()), "the mean over all"),
    ("latent_loss", no_square_roots, "no square roots"),
    ("latent_loss", forgets_sample, "unet(z_t, t, text).sample"),
    ("latent_loss", bars_not_reshaped, "(batch, 1, 1, 1)"),
    ("ema_update", lambda m, w, d: d * m + (1 - d) * w, "✓"),
    ("ema_update", lambda m, w, d: torch.lerp(m, w, 1 - d), "✓"),
    ("ema_update", lambda m, w, d: m + (1 - d) * (w - m), "✓"),
    ("ema_update", lambda m, w, d: (1 - d) * m + d * w, "changed places"),
    ("ema_update", lambda m, w, d: d * m + w, "the new weight counts in full"),
    ("ema_update", lambda m, w, d: m + (1 - d) * w, "the old average counts in full"),
    ("ema_update", lambda m, w, d: d * m - (1 - d) * w, "taken away"),
    ("ema_update", lambda m, w, d: m - (1 - d) * (w - m), "moves away"),
    ("ema_update", lambda m, w, d: 0.5 * m + 0.5 * w, "the plain mean"),
    ("ema_update", lambda m, w, d: m, "decay·average"),
    ("ema_update", in_place, "changed its arguments in place"),
    ("guided", lambda s, s_y, g: s + g * (s_y - s), "✓"),
    ("guided", lambda s, s_y, g: (1 - g) * s + g * s_y, "✓"),
    ("guided", lambda s, s_y, g: s_y + (g - 1) * (s_y - s), "✓"),
    ("guided", lambda s, s_y, g: s_y + g * (s - s_y), "halves have changed places"),
    ("guided", lambda s, s_y, g: s - g * (s_y - s), "the wrong sign"),
    ("guided", lambda s, s_y, g: (1 + g) * s_y - g * s, "one step too far"),
    ("guided", lambda s, s_y, g: s + g * s_y, "not taken off"),
    ("guided", lambda s, s_y, g: g * (s_y - s), "without the start"),
    ("guided", lambda s, s_y, g: g * s_y, "made larger as a whole"),
    ("guided", lambda s, s_y, g: s_y, "unconditional + scale·(conditional − unconditional)"),
]


@pytest.mark.parametrize(("exercise", "answer", "said"), ANSWERS)
def test_every_answer_of_notebook_03_is_diagnosed(exercise, answer, said, capsys):
    assert_diagnosed(getattr(checks, f"check_{exercise}"), answer, said, capsys)


@pytest.mark.parametrize("exercise", ["scaled_linear", "latent_loss", "ema_update", "guided"])
def test_an_untouched_stub_is_no_mistake(exercise, capsys):
    def stub(*arguments): ...

    getattr(checks, f"check_{exercise}")(stub)
    assert capsys.readouterr().out == "not implemented yet: stub\n"


def test_what_exercise_1_accepts_is_what_diffusers_uses(capsys):
    """The check's own solution is held against a second source."""

    def from_diffusers(steps, start, end):
        return DDIMScheduler(steps, start, end, beta_schedule="scaled_linear").betas

    checks.check_scaled_linear(from_diffusers)
    assert capsys.readouterr().out.startswith("✓")
