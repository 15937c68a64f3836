"""The checks of notebook 05: a right answer passes however written, each mistake is recognised."""

import pytest
import torch
from diffusers import DDIMScheduler, RePaintScheduler
from test_checks import assert_diagnosed

from lrd_helpers.checks import image_tasks as checks


def mixed(a, b, bar):
    return bar**0.5 * a + (1 - bar) ** 0.5 * b


# ------------------------------------------------------------------ answers to exercise 1


def start(index=lambda n, steps: steps - n, mix=mixed):
    def answer(z, noise, strength, timesteps, alphas_cumprod):
        t = timesteps[index(int(strength * len(timesteps)), len(timesteps))]
        return mix(z, noise, alphas_cumprod[t])

    return answer


def from_the_end(z, noise, strength, timesteps, alphas_cumprod):
    t = timesteps[-int(strength * len(timesteps))]
    return torch.lerp(torch.zeros_like(z), z, alphas_cumprod[t].sqrt()) + noise * torch.sqrt(
        1 - alphas_cumprod[t]
    )


def strength_as_index(z, noise, strength, timesteps, alphas_cumprod):
    return mixed(z, noise, alphas_cumprod[timesteps[strength]])


def in_place(z, noise, strength, timesteps, alphas_cumprod):
    bar = alphas_cumprod[timesteps[len(timesteps) - int(strength * len(timesteps))]]
    return z.mul_(bar.sqrt()).add_((1 - bar).sqrt() * noise)


# ------------------------------------------------------------------ answers to the others


def blend(known=mixed):
    return lambda x, z, noise, mask, bar: mask * x + (1 - mask) * known(z, noise, bar)


def chosen(x, z, noise, mask, bar):
    return torch.where(mask > 0, x, mixed(z, noise, bar))


def keeps_indexing(x, z, noise, mask, bar):
    return x[mask == 1]


def noisier(share=lambda bar, more: more / bar, mix=mixed):
    return lambda x, noise, bar, more: mix(x, noise, share(bar, more))


def sigma(bar):
    return (1 / bar - 1) ** 0.5


def euler(scale=lambda x, bar: x / bar**0.5, sigma=sigma, sign=1, back=lambda x, bar: x * bar**0.5):
    def answer(x, epsilon, bar, after):
        return back(scale(x, bar) + sign * (sigma(after) - sigma(bar)) * epsilon, after)

    return answer


def ddim(x, epsilon, bar, after):
    x0 = (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()
    return after.sqrt() * x0 + (1 - after).sqrt() * epsilon


def same(x, bar):
    return x


ANSWERS = [
    ("noisy_start", start(), "✓"),
    ("noisy_start", from_the_end, "✓"),
    ("noisy_start", start(lambda n, steps: n), "the wrong end"),
    ("noisy_start", start(lambda n, steps: 0), "whatever the strength"),
    ("noisy_start", start(lambda n, steps: steps - n + 1), "one step too late"),
    ("noisy_start", start(mix=lambda a, b, bar: bar * a + (1 - bar) * b), "no square roots"),
    ("noisy_start", start(mix=lambda a, b, bar: mixed(b, a, bar)), "changed places"),
    ("noisy_start", start(mix=lambda a, b, bar: a + (1 - bar).sqrt() * b), "on top of"),
    ("noisy_start", start(mix=lambda a, b, bar: bar.sqrt() * a), "there is no noise"),
    ("noisy_start", start(mix=lambda a, b, bar: a), "timesteps[N − int(strength·N)]"),
    ("noisy_start", strength_as_index, "it raised"),
    ("noisy_start", in_place, "changed its arguments in place"),
    ("blended", blend(), "✓"),
    ("blended", chosen, "✓"),
    ("blended", lambda x, z, e, m, bar: (1 - m) * x + m * mixed(z, e, bar), "changed places"),
    ("blended", blend(lambda z, noise, bar: z), "has no noise"),
    ("blended", blend(lambda z, noise, bar: bar.sqrt() * z), "faded"),
    ("blended", blend(lambda z, noise, bar: noise), "pure noise"),
    ("blended", blend(lambda z, noise, bar: bar * z + (1 - bar) * noise), "no square roots"),
    ("blended", blend(lambda z, noise, bar: mixed(noise, z, bar)), "of the known latents and"),
    ("blended", lambda x, z, e, m, bar: mixed(z, e, bar), "everywhere"),
    ("blended", lambda x, z, e, m, bar: m * x + mixed(z, e, bar), "in the hole, too"),
    ("blended", lambda x, z, e, m, bar: x + (1 - m) * mixed(z, e, bar), "x stays as it is"),
    ("blended", keeps_indexing, "saw:      "),
    ("blended", lambda x, z, e, m, bar: x, "mask·x + (1 − mask)"),
    ("noisier", noisier(), "✓"),
    (
        "noisier",
        lambda x, e, bar, more: (x * more.sqrt() + (bar - more).sqrt() * e) / bar**0.5,
        "✓",
    ),
    ("noisier", noisier(lambda bar, more: more), "as if x were clean"),
    ("noisier", noisier(mix=lambda x, e, r: r * x + (1 - r) * e), "no square roots"),
    ("noisier", noisier(mix=lambda x, e, r: mixed(e, x, r)), "changed places"),
    ("noisier", noisier(mix=lambda x, e, r: r.sqrt() * x), "no noise comes in"),
    ("noisier", noisier(mix=lambda x, e, r: x + (1 - r).sqrt() * e), "does not shrink"),
    (
        "noisier",
        lambda x, e, bar, more: (more / bar).sqrt() * x + (bar - more).sqrt() * e,
        "the variance bar − bar_noisier",
    ),
    ("noisier", noisier(lambda bar, more: bar / more), "nan"),
    ("euler_step", euler(), "✓"),
    ("euler_step", ddim, "✓"),
    ("euler_step", euler(sign=-1), "the wrong sign"),
    ("euler_step", euler(scale=same), "not divided by √bar"),
    ("euler_step", euler(back=same), "not shrunk again"),
    ("euler_step", euler(scale=same, back=same), "neither"),
    ("euler_step", euler(sigma=lambda bar: (1 - bar) ** 0.5), "σ is √(1 − ᾱ)"),
    ("euler_step", euler(sigma=lambda bar: 1 / bar - 1), "no square root"),
    ("euler_step", lambda x, e, bar, after: (x - (1 - bar) ** 0.5 * e) / bar**0.5, "all the noise"),
    ("euler_step", lambda x, e, bar, after: x, "√bar_next·(x/√bar"),
]


@pytest.mark.parametrize(("exercise", "answer", "said"), ANSWERS)
def test_every_answer_of_notebook_05_is_diagnosed(exercise, answer, said, capsys):
    assert_diagnosed(getattr(checks, f"check_{exercise}"), answer, said, capsys)


@pytest.mark.parametrize("exercise", ["noisy_start", "blended", "noisier", "euler_step"])
def test_an_untouched_stub_is_no_mistake(exercise, capsys):
    def stub(*arguments): ...

    getattr(checks, f"check_{exercise}")(stub)
    assert capsys.readouterr().out == "not implemented yet: stub\n"


# ------------------------------------------------------------------ against a second source

OPTIONS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_exercise_1_accepts_what_diffusers_does(capsys):
    scheduler = DDIMScheduler(**OPTIONS)

    def noisy_start(z, noise, strength, timesteps, alphas_cumprod):
        left = min(int(len(timesteps) * strength), len(timesteps))
        return scheduler.add_noise(z, noise, timesteps[len(timesteps) - left :][:1])

    checks.check_noisy_start(noisy_start)
    assert capsys.readouterr().out.startswith("✓")


def test_exercise_3_and_4_accept_what_diffusers_does(capsys):
    repaint = RePaintScheduler(**OPTIONS)
    bars = repaint.alphas_cumprod

    def noisier(x, noise, bar, more):
        """The mean of `undo_step` over its noise, step by step, and the variance that is left."""
        first, last = ((bars - one).abs().argmin() for one in (bar, more))
        kept = (1 - repaint.betas[first + 1 : last + 1]).sqrt().prod()
        return kept * x + (1 - kept**2).sqrt() * noise

    def euler_step(x, epsilon, bar, after):
        ddim = DDIMScheduler(**OPTIONS, clip_sample=False)
        ddim.alphas_cumprod = torch.stack([after, bar])
        ddim.num_inference_steps = ddim.config.num_train_timesteps
        return ddim.step(epsilon, 1, x).prev_sample

    checks.check_noisier(noisier)
    checks.check_euler_step(euler_step)
    assert capsys.readouterr().out.count("✓") == 2
