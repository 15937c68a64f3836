"""What the checks take for right is held against second sources: diffusers, COCO, drawn numbers."""

import numpy
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, RePaintScheduler
from diffusers.models.attention_processor import Attention
from PIL import Image

from lrd_helpers.benchmark import estimate
from lrd_helpers.checks import (
    conditioning,
    cross_attention,
    editing,
    evaluation,
    image_tasks,
    latent_diffusion,
    layerdiff,
    stable_diffusion,
    vision_guidance,
)
from lrd_helpers.layerdiff.unet import SlotAttention, Slots
from lrd_helpers.measure.layers import order_right
from lrd_helpers.pictures import picture_of
from lrd_helpers.words import PromptTokens, word_tokenizer

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def scaled_linear(steps, start, end):
    return DDIMScheduler(steps, start, end, beta_schedule="scaled_linear").betas


def attention(x, c, to_q, to_k, to_v):
    """`Attention` with one head and these matrices, and nothing after them."""
    d, width = to_q.shape
    module = Attention(width, c.shape[1], heads=1, dim_head=d, bias=False, out_bias=False)
    for name, matrix in (("to_q", to_q), ("to_k", to_k), ("to_v", to_v)):
        module.get_submodule(name).weight.data = matrix
    module.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    return module(x[None], encoder_hidden_states=c[None])[0]


def noisy_start(z, noise, strength, timesteps, alphas_cumprod):
    """As in StableDiffusionImg2ImgPipeline."""
    left = min(int(len(timesteps) * strength), len(timesteps))
    scheduler = DDIMScheduler(**STABLE_DIFFUSION)
    return scheduler.add_noise(z, noise, timesteps[len(timesteps) - left :][:1])


def noisier(x, noise, bar, more):
    """The mean of RePaint's `undo_step` over its noise, step by step, and the variance left."""
    scheduler = RePaintScheduler(**STABLE_DIFFUSION)
    first, last = ((scheduler.alphas_cumprod - level).abs().argmin() for level in (bar, more))
    kept = (1 - scheduler.betas[first + 1 : last + 1]).sqrt().prod()
    return kept * x + (1 - kept**2).sqrt() * noise


def euler_step(x, epsilon, bar, after):
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False)
    scheduler.alphas_cumprod = torch.stack([after, bar])
    scheduler.num_inference_steps = scheduler.config.num_train_timesteps
    return scheduler.step(epsilon, 1, x).prev_sample


def way_there(z, score, move, times, bars):
    """Up with DDIMInverseScheduler."""
    levels = [z]
    for n in range(1, len(times)):
        scheduler = DDIMInverseScheduler(**STABLE_DIFFUSION, clip_sample=False)
        scheduler.num_inference_steps = scheduler.config.num_train_timesteps
        scheduler.alphas_cumprod = bars[n - 1 : n + 1]
        levels.append(scheduler.step(score(levels[-1], times[n]), 1, levels[-1]).prev_sample)
    return torch.stack(levels)


def slots_attend(x, to_q, to_k, to_v):
    """`SlotAttention` with one head and these matrices, without its norm and its residual."""
    module = SlotAttention(len(to_q), heads=1, everywhere=False)
    module.norm = torch.nn.Identity()
    for name, matrix in (("to_q", to_q), ("to_k", to_k), ("to_v", to_v)):
        module.attention.get_submodule(name).weight.data = matrix
    module.attention.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    return module(x, Slots(len(x), None)) - x


def ddim_move(x, epsilon, bar, bar_to):
    """Down with DDIMScheduler, up with DDIMInverseScheduler."""
    down = bar_to > bar
    kind = DDIMScheduler if down else DDIMInverseScheduler
    scheduler = kind(**STABLE_DIFFUSION, clip_sample=False)
    scheduler.num_inference_steps = scheduler.config.num_train_timesteps
    scheduler.alphas_cumprod = torch.stack([bar_to, bar] if down else [bar, bar_to])
    return scheduler.step(epsilon, 1, x).prev_sample


def step_with_given(ask, x, clean, given, t, bar, bar_to):
    """DDIMScheduler, for the slots that are not given."""
    rows = (given.nonzero().flatten(), (~given).nonzero().flatten())
    noise = ask(
        torch.zeros_like(x).index_copy(0, rows[0], clean[given]).index_copy(0, rows[1], x[~given]),
        torch.zeros(len(x), dtype=torch.long).index_fill(0, rows[1], int(t)),
    )
    return clean.index_copy(0, rows[1], ddim_move(x[~given], noise[~given], bar, bar_to))


def level_by_search(bar, cells, more):
    """By halving, with notebook 07's ratio."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        larger = middle / ((1 - middle) / more) > bar / ((1 - bar) / cells)
        low, high = (low, middle) if larger else (middle, high)
    return low


def mended_map(query, key, heads, token):
    module = Attention(query.shape[1], heads=heads, dim_head=query.shape[1] // heads)
    q, k = (module.head_to_batch_dim(x[None]) for x in (query, key))
    return module.get_attention_scores(q, k)[..., token].mean(0)


SOURCES = [
    (latent_diffusion.check_scaled_linear, scaled_linear),
    (conditioning.check_cross_attention, attention),
    (image_tasks.check_noisy_start, noisy_start),
    (image_tasks.check_noisier, noisier),
    (image_tasks.check_euler_step, euler_step),
    (layerdiff.check_slots_attend, slots_attend),
    (layerdiff.check_step_with_given, step_with_given),
    (cross_attention.check_mended_map, mended_map),
    (editing.check_way_there, way_there),
    (stable_diffusion.check_level_for_cells, level_by_search),
]


@pytest.mark.parametrize(("check", "function"), SOURCES)
def test_a_check_accepts_what_another_source_computes(check, function, capsys):
    check(function)
    assert capsys.readouterr().out.startswith("✓ ")


def solution_and_cases(monkeypatch, module, check):
    """What a check takes for right, and what it tries it on."""
    noted = []
    monkeypatch.setattr(module, "check_function", lambda *given, **_: noted.append(given[1:3]))
    check(None)
    return noted[0]


def test_the_solution_of_flattened_is_what_pil_composes(monkeypatch):
    solution, cases = solution_and_cases(monkeypatch, layerdiff, layerdiff.check_flattened)
    for background, layers in cases:
        picture = picture_of(background).convert("RGBA")
        for layer in layers:
            pixels = (255 * layer).round().byte().permute(1, 2, 0).numpy()
            picture.alpha_composite(Image.fromarray(pixels, "RGBA"))
        right = torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
        assert torch.allclose(solution(background, layers), right, atol=0.01)


def test_the_share_of_the_front_says_what_the_package_says_of_the_order(monkeypatch):
    solution, cases = solution_and_cases(monkeypatch, layerdiff, layerdiff.check_front_share)
    assert [order_right(*case) for case in cases] == [solution(*case) > 0.5 for case in cases]
    assert len({order_right(*case) for case in cases}) == 2


def test_the_tokens_of_a_word_are_those_that_the_package_finds(monkeypatch):
    module = stable_diffusion
    solution, _ = solution_and_cases(monkeypatch, module, module.check_word_mask)
    tokenizer, text = word_tokenizer(["a", "red", "car"]), "an axolotl and a red car"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, padding="max_length").input_ids)
    for number, word in enumerate(text.split()):
        tokens = solution(pieces, number).nonzero().flatten().tolist()
        assert tokens == PromptTokens.encode(tokenizer, text).positions(word)


def test_the_interval_is_what_the_report_computes():
    values = torch.rand(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    chosen = numpy.random.default_rng(0).integers(20, size=(2000, 20))
    interval = evaluation.bootstrap_interval(values, torch.from_numpy(chosen))
    assert interval.tolist() == pytest.approx(estimate(values.tolist())[1:], abs=1e-9)


def test_the_ratio_of_signal_to_noise_is_that_of_drawn_noise(capsys):
    def drawn(bar, variance, cells):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(20_000, cells, generator=generator, dtype=torch.float64).mean(1)
        return bar * variance / ((1 - bar) * noise.var())

    def exact(bar, variance, cells):
        return bar * variance * cells / (1 - bar)

    for case in ((0.1, 0.6, 16), (0.5, 1.0, 1)):
        assert drawn(*case) == pytest.approx(exact(*case), rel=0.05)
    vision_guidance.check_snr_of_mean(exact)
    assert capsys.readouterr().out.startswith("✓ ")
