"""The latent upsampler: sizes, back-projection, the condition, sampling, training."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
)
from torch import Tensor

from lrd_helpers import models, upsampling
from lrd_helpers.autoencoder import psnr
from lrd_helpers.storybook import StorybookDataset, seeded
from lrd_helpers.training import upsampler as training
from lrd_helpers.training.loop import HELD_OUT_SEED
from lrd_helpers.upsampling import back_project, condition, encode, enlarge, shrink, upsample


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return training.UpsamplerTraining().unet.eval()


@pytest.fixture(scope="module")
def scheduler() -> DDIMScheduler:
    return upsampling.noise_schedule()


@pytest.fixture
def vae(tiny: StableDiffusionPipeline) -> AutoencoderKL:
    return tiny.vae


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    return StorybookDataset(2).batch(0).images


def smooth(side: int) -> Tensor:
    """Waves that both 32 and 64 pixels are enough for."""
    x = (torch.arange(side) + 0.5) / side
    rows = [0.5 + 0.3 * torch.sin(6.28 * (f * x[:, None] + x[None])) for f in (1, 2, 3)]
    return torch.stack(rows)[None]


# ------------------------------------------------------------------ pictures


def test_enlarge_and_shrink_change_the_size_and_little_else() -> None:
    assert shrink(smooth(64)).shape == (1, 3, 32, 32)
    assert psnr(enlarge(smooth(32)), smooth(64)).item() > 40
    assert psnr(shrink(smooth(64)), smooth(32)).item() > 40


def test_back_projection_keeps_the_small_picture(scenes: Tensor) -> None:
    small = shrink(scenes)
    darker = 0.8 * scenes  # a decoder that gets all areas wrong, and all edges right
    mended = back_project(darker, small)
    assert (psnr(mended, scenes) > psnr(darker, scenes) + 10).all()
    assert (psnr(shrink(mended), small) > psnr(shrink(enlarge(small)), small)).all()
    torch.testing.assert_close(back_project(scenes, small), scenes)


def test_noise_has_the_level_asked_for() -> None:
    grey = torch.full((2, 3, 64, 64), 0.5)
    levels = torch.tensor([0.0, 0.05])
    noisy = upsampling.with_noise(grey, levels, torch.randn(grey.shape, generator=seeded(0)))
    assert torch.equal(noisy[0], grey[0])
    assert noisy[1].std().item() == pytest.approx(0.05, rel=0.05)


def test_residuals_vary_by_about_one(scenes: Tensor, storybook_folder: Path) -> None:
    """σ_r was measured on the shipped autoencoder; with another it would have to be again."""
    vae = AutoencoderKL.from_pretrained(storybook_folder / "vae", torch_dtype=torch.float32)
    images = StorybookDataset(12, seed=5).batch(0).images
    for level in (0.0, 0.05):
        levels = torch.full((12,), level)
        noise = torch.randn(12, 3, 64, 64, generator=seeded(0))
        seen = upsampling.with_noise(shrink(images), levels, noise)
        residual = encode(images, vae) - encode(enlarge(seen).clamp(0, 1), vae)
        scaled = residual / upsampling.residual_scale(levels)[:, None, None, None]
        assert 0.6 < scaled.std() < 1.6


# ------------------------------------------------------------------ condition and sampling


def test_the_condition_holds_every_pixel() -> None:
    small, base = torch.rand(1, 3, 8, 12), torch.randn(1, 4, 2, 3)
    seen = condition(small, base)
    assert seen.shape == (1, 4 + 48, 2, 3)
    assert torch.equal(seen[:, :4], base)
    torch.testing.assert_close(
        seen[0, 4:20, 1, 2].reshape(4, 4), 2 * small[0, 0, 4:, 8:] - 1
    )  # red under the last cell


def test_encode_and_decode_are_the_pipelines_own(vae: AutoencoderKL) -> None:
    images = torch.rand(1, 3, 32, 32, generator=seeded(0))
    latents = encode(images, vae)
    posterior = vae.encode(2 * images - 1).latent_dist
    torch.testing.assert_close(latents, posterior.mode() * vae.config.scaling_factor)
    decoded = upsampling.decode(latents, vae)
    torch.testing.assert_close(decoded, (vae.decode(posterior.mode()).sample / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_model_that_knows_the_answer_draws_it(
    vae: AutoencoderKL, scheduler: DDIMScheduler, kind: type
) -> None:
    """With v = √ᾱ·ε − √(1 − ᾱ)·x_0 worked out from the true x_0, every sampler ends at x_0."""
    small = torch.rand(2, 3, 16, 16, generator=seeded(0))
    images = torch.rand(2, 3, 32, 32, generator=seeded(1))
    sampler = kind.from_config(scheduler.config)
    base = encode(enlarge(small).clamp(0, 1), vae)
    x0 = (encode(images, vae) - base) / 0.08
    signal = scheduler.alphas_cumprod.sqrt()

    class Knowing(UNet2DModel):
        def forward(self, seen: Tensor, t: Tensor, class_labels: Tensor) -> object:
            assert torch.equal(seen[:, 4:], condition(small, base))
            assert torch.equal(class_labels, torch.zeros(2))
            a, s = signal[t], (1 - signal[t] ** 2).sqrt()
            noise = (seen[:, :4] - a * x0) / s
            return argparse.Namespace(sample=a * noise - s * x0)

    knowing = Knowing(block_out_channels=(8,) * 4, norm_num_groups=4)
    large = upsample(small, knowing, sampler, vae, generator=seeded(2), steps=5, consistent=False)
    torch.testing.assert_close(
        large, upsampling.decode(encode(images, vae), vae), atol=2e-3, rtol=0
    )


def test_same_seed_same_picture(
    unet: UNet2DModel, scheduler: DDIMScheduler, vae: AutoencoderKL
) -> None:
    small = torch.rand(1, 3, 16, 24, generator=seeded(0))

    def draw(seed: int, **options: object) -> Tensor:
        return upsample(small, unet, scheduler, vae, generator=seeded(seed), steps=2, **options)

    large = draw(1, consistent=False)
    assert large.shape == (1, 3, 32, 48)
    assert torch.equal(large, draw(1, consistent=False))
    assert not torch.equal(large, draw(2, consistent=False))
    assert not torch.equal(large, draw(1, consistent=False, noise_level=0.05))
    torch.testing.assert_close(draw(1), back_project(large, small))


@pytest.mark.parametrize("broken", ["the picture", "the model"])
def test_numbers_that_are_not_finite_become_no_picture(
    scheduler: DDIMScheduler, vae: AutoencoderKL, broken: str
) -> None:
    unet, small = training.UpsamplerTraining().unet.eval(), torch.rand(1, 3, 16, 16)
    if broken == "the model":
        torch.nn.init.constant_(unet.conv_out.bias, torch.nan)
    else:
        small[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="latents .* are not finite"):
        upsample(small, unet, scheduler, vae, generator=seeded(0), steps=1)


def test_sides_and_noise_that_cannot_be(
    unet: UNet2DModel, scheduler: DDIMScheduler, vae: AutoencoderKL
) -> None:
    with pytest.raises(ValueError, match=r"is 18 × 16 pixels, .* by 4: cut it to 16 × 16"):
        upsample(torch.rand(1, 3, 16, 18), unet, scheduler, vae, generator=seeded(0))
    with pytest.raises(ValueError, match="noise_level is -1, but must be 0 or more"):
        upsample(
            torch.rand(1, 3, 16, 16), unet, scheduler, vae, generator=seeded(0), noise_level=-1.0
        )


def test_load_upsampler(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    folder = tmp_path / "storybook-upsampler"
    remedy = r"; clone the .*train the model with `python -m lrd_helpers\.training\.upsampler`$"
    with pytest.raises(models.AssetError, match="storybook-upsampler is missing" + remedy):
        models.load_upsampler("cpu")
    unet.save_pretrained(folder)
    with pytest.raises(models.AssetError, match="scheduler.*" + remedy):
        models.load_upsampler("cpu")
    scheduler.save_pretrained(folder / "scheduler")
    again, schedule = models.load_upsampler("cpu")
    assert torch.equal(again.conv_in.weight, unet.conv_in.weight)
    assert schedule.config.prediction_type == "v_prediction"
    assert schedule.alphas_cumprod[-1] == 0


# ------------------------------------------------------------------ training


def cache(folder: Path, vae: AutoencoderKL, noise_level: float = 0.05) -> training.EnlargementCache:
    options = training.UpsamplerOptions(
        seed=0, cache=64, batch_size=8, run=folder, mixed_precision="no", noise_level=noise_level
    )
    return training.EnlargementCache(vae, options, 0, 1)


def test_the_cache_holds_what_bicubic_lacks(tmp_path: Path, vae: AutoencoderKL) -> None:
    kept = cache(tmp_path, vae)
    levels = kept.kept["levels"]
    assert not levels[::2].any()
    assert levels[1::2].min() > 0
    assert levels.max() <= 0.05
    batch = next(kept.batches(7))
    large = batch.base + batch.residual
    truth = encode(
        StorybookDataset(64, styles=("flat",) * 6 + ("sketch", "neon")).batch(0).images, vae
    )
    distances = (large[:, None] - truth).abs().amax((2, 3, 4)).min(1).values
    assert distances.max() < 5e-3
    torch.testing.assert_close(
        batch.base, encode(enlarge(batch.small).clamp(0, 1), vae), atol=2e-2, rtol=0
    )
    again = cache(tmp_path, vae)  # read from the file
    other = next(again.batches(7))
    for name in ("small", "levels", "base", "residual"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    assert not torch.equal(next(kept.batches(8)).small, batch.small)


def test_another_autoencoder_is_noticed(tmp_path: Path, vae: AutoencoderKL) -> None:
    before = cache(tmp_path, vae).kept["base"]
    other = copy.deepcopy(vae)
    with torch.no_grad():
        other.quant_conv.bias += 1
    assert not torch.equal(cache(tmp_path, other).kept["base"], before)


def test_a_step_of_training_moves_every_weight(tmp_path: Path, vae: AutoencoderKL) -> None:
    trainee = training.UpsamplerTraining()
    batch = training.Enlargements(
        torch.rand(4, 3, 64, 64),
        torch.tensor([0, 0.01, 0.02, 0.05]),
        torch.randn(4, 4, 16, 16),
        0.1 * torch.randn(4, 4, 16, 16),
    )
    loss = trainee(batch, seeded(0))["loss"]
    assert 0.5 < loss < 2  # it knows nothing yet, and v has variance 1
    loss.backward()
    for name, weight in trainee.named_parameters():
        assert weight.grad.abs().max() > 0, name


def test_the_scores_are_where_they_must_be(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    storybook_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An untrained U-Net: far below what it could be, and bicubic and the ceiling as measured."""
    vae = AutoencoderKL.from_pretrained(storybook_folder / "vae", torch_dtype=torch.float32).eval()
    few = StorybookDataset(8, seed=HELD_OUT_SEED)
    monkeypatch.setattr(training, "StorybookDataset", lambda count, seed: few)
    scores = training.evaluate(unet, scheduler, vae, scenes=32)  # one batch
    scores = {name.removeprefix("PSNR (dB), ").rsplit(",", 1)[0]: x for name, x in scores.items()}
    assert 29 < scores["the autoencoder alone"] < scores["bicubic"] < 35
    assert scores["upsampled"] < scores["nothing drawn"] < scores["the autoencoder alone"]
    ceiling = scores["the autoencoder alone, back-projected"]
    assert scores["upsampled, back-projected"] < ceiling
    assert scores["bicubic, back-projected"] + 1 < ceiling
