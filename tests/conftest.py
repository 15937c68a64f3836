"""What the tests share: a tiny random Stable Diffusion (and XL), the shipped models, a browser.

Torch, diffusers and Playwright are imported in the fixtures: the process that hands the tests out
to the others (see run_all.py) reads this file, too, and needs none of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest
from install_browser import MISSING, OPTIONS, browser_path

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    from lrd_helpers.pipeline import LayeredRenderingPipeline

# In the tests, and only there, calls are held against the shapes in their signatures. Not so in
# pipeline.py, editing.py and the methods' options: what they say of wrong arguments is tested, and
# must not be forestalled.
CHECKED = (
    "attention",
    "autoencoder",
    "ddpm",
    "measure",
    "methods.boxdiff",
    "methods.collage",
    "methods.guidance",
    "methods.larender",
    "methods.layout_guidance",
    "methods.lrdiff",
    "methods.multidiffusion",
    "methods.paint_with_words",
    "methods.placement",
    "methods.plain",
    "methods.rag",
    "methods.regions",
    "methods.script",
    "mixture",
    "pictures",
    "plotting",
    "sampling",
    "storybook",
    "style",
    "training",
    "upsampling",
    "words",
)
jaxtyping.install_import_hook([f"lrd_helpers.{name}" for name in CHECKED], "beartype.beartype")

WORDS = ["a", "red", "yellow", "blue", "car", "star", "boat", "ball"]
WORDS += ["on", "grass", "at", "sea", "night", "and"]


def tiny_stable_diffusion(**scheduler: object) -> StableDiffusionPipeline:
    """A random Stable Diffusion of 73 thousand parameters: 32 × 32 pixels, f = 8."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from lrd_helpers.words import word_tokenizer

    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, length=16)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    noise = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        **scheduler,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=noise,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_stable_diffusion_xl(tiny: StableDiffusionPipeline) -> StableDiffusionXLPipeline:
    """A random Stable Diffusion XL with the tokenizer, autoencoder and text encoder of `tiny`.

    As in XL, the first block down has no cross-attention. The U-Net has 69 thousand parameters.
    """
    import torch
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(1)
    text = tiny.text_encoder.config.to_dict() | {"projection_dim": 8, "num_hidden_layers": 2}
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )
    pipe = StableDiffusionXLPipeline(
        vae=tiny.vae,
        text_encoder=tiny.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig.from_dict(text)).eval(),
        tokenizer=tiny.tokenizer,
        tokenizer_2=tiny.tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler.from_config(tiny.scheduler.config),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def _tiny() -> StableDiffusionPipeline:
    return tiny_stable_diffusion()


@pytest.fixture
def tiny(_tiny: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The tiny pipeline with a scheduler of its own (the models are shared: do not change them)."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        **_tiny.components | {"scheduler": DDIMScheduler.from_config(_tiny.scheduler.config)},
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def _tiny_xl(_tiny: StableDiffusionPipeline) -> StableDiffusionXLPipeline:
    return tiny_stable_diffusion_xl(_tiny)


@pytest.fixture
def tiny_xl(_tiny_xl: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """The tiny XL with a scheduler of its own (the models are shared: do not change them)."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(_tiny_xl.scheduler.config)
    pipe = type(_tiny_xl)(**_tiny_xl.components | {"scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny: StableDiffusionPipeline) -> LayeredRenderingPipeline:
    """The same as a layered pipeline."""
    from lrd_helpers.pipeline import LayeredRenderingPipeline

    pipe = LayeredRenderingPipeline(**tiny.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def storybook_folder() -> Path:
    """The shipped pipeline's folder. Missing is a failure, not a skip: the course needs it."""
    from lrd_helpers.models import ASSETS

    folder = ASSETS / "storybook"
    assert (folder / "model_index.json").is_file(), f"{folder} is missing: the shipped model"
    return folder


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a text encoder after no step of training, as its training leaves it."""
    import torch

    from lrd_helpers.training.text_encoder import TextEncoderTraining

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("text-encoder")
    trainee = TextEncoderTraining()
    trainee.text_encoder.save_pretrained(folder)
    trainee.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; without one the test is skipped."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = browser_path()
    if path is None:
        warnings.warn(MISSING, stacklevel=1)  # a skip alone is easily overlooked
        pytest.skip(MISSING)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()
