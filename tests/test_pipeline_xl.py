"""Stable Diffusion XL through the same call: held against diffusers' own XL pipeline."""

from __future__ import annotations

import contextlib
import copy
import itertools
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from test_pipeline_common import (  # noqa: F401 (fixtures and tests, here of XL)
    DIFFUSERS,
    LAYOUT,
    drawn,
    expected,
    ip_adapter,
    made,
    pictures,
    same,
    seeded,
    test_a_callback_of_diffusers_cuts_guidance_off,
    test_a_lora_changes_the_picture,
    test_a_lora_of_another_family_is_refused,
    test_a_textual_inversion_of_another_family_is_refused,
    test_auto_pipelines_know_it,
    test_callback_cfg,
    test_callback_inputs,
    test_cfg,
    test_components_and_from_pipe,
    test_inference_batch_single_identical,
    test_interruption,
    test_ip_adapter,
    test_num_images_per_prompt,
    test_one_step,
    test_output_types_and_tuples,
    test_save_load_local,
    test_the_schedule_of_the_pipeline_is_left_alone,
)

from lrd_helpers import capture_attention
from lrd_helpers.benchmark.folder import settings_of
from lrd_helpers.benchmark.judges import Judges
from lrd_helpers.editing import insert, invert, redraw
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.methods import METHODS, LayeredRendering
from lrd_helpers.models import AssetError, load_pipeline
from lrd_helpers.pictures import picture_of
from lrd_helpers.pipeline import LayeredRenderingPipeline, LayeredRenderingXLPipeline
from lrd_helpers.sampling.model import decode_latents, encode_images, model_of

WHOLE = Layout("a red car", layers=[Layer("a red car", (0, 0, 1, 1))])
NO_FIELD = {"inside": 0.0, "outside": 0.0}


@pytest.fixture(params=["collage", DIFFUSERS])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(method: str, tiny_xl: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    kind = StableDiffusionXLPipeline if method == DIFFUSERS else LayeredRenderingXLPipeline
    return made(kind, tiny_xl.components)


@pytest.fixture
def xl(tiny_xl: StableDiffusionXLPipeline) -> LayeredRenderingXLPipeline:
    return made(LayeredRenderingXLPipeline, tiny_xl.components)


# ------------------------------------------------------------------ diffusers' own pictures


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 5.0},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a ball"},
        {"guidance_rescale": 0.7, "num_images_per_prompt": 2},
        {"height": 48},
    ],
    ids=lambda options: " ".join(options),
)
def test_one_layer_over_the_canvas_is_stable_diffusion_xl(xl, tiny_xl, scheduler, options) -> None:
    xl.scheduler = scheduler.from_config(xl.scheduler.config)
    tiny_xl.scheduler = scheduler.from_config(xl.scheduler.config)
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "pt"}
    options = size | {"guidance_scale": 5.0} | options
    wanted = tiny_xl("a red car", generator=seeded(), **options).images
    for method, changes in {"plain": {}, "paper": NO_FIELD, "collage": NO_FIELD}.items():
        images = xl(WHOLE, method=method, generator=seeded(), **changes, **options).images
        assert torch.equal(images, wanted), method


def test_an_empty_prompt_is_encoded_where_the_model_was_trained_so(xl, tiny_xl) -> None:
    options = {"num_inference_steps": 2, "output_type": "latent"}
    zeros = xl(WHOLE, method="plain", generator=seeded(), **options).images
    for pipe in (xl, tiny_xl):
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    encoded = xl(WHOLE, method="plain", generator=seeded(), **options).images
    assert torch.equal(encoded, tiny_xl("a red car", generator=seeded(), **options).images)
    assert not same(encoded, zeros, 1e-5)


def test_distilled_guidance_is_passed_on(xl, tiny_xl) -> None:
    torch.manual_seed(0)
    unet = type(xl.unet).from_config(xl.unet.config, time_cond_proj_dim=8).eval()
    xl.unet = tiny_xl.unet = unet
    xl.scheduler, tiny_xl.scheduler = LCMScheduler(), LCMScheduler()
    options = {"guidance_scale": 5.0, "num_inference_steps": 2, "output_type": "latent"}
    wanted = tiny_xl("a red car", generator=seeded(), **options).images
    assert torch.equal(xl(WHOLE, method="plain", generator=seeded(), **options).images, wanted)


def test_an_autoencoder_that_overflows_is_in_single_precision_while_it_draws(tiny_xl) -> None:
    parts = {name: copy.deepcopy(part) for name, part in tiny_xl.components.items()}
    pipes = [made(kind, parts) for kind in (LayeredRenderingXLPipeline, StableDiffusionXLPipeline)]
    options = {"num_inference_steps": 1, "output_type": "pt", "generator": seeded()}
    for pipe in pipes:
        pipe.to(torch.float16)
    ours = pipes[0](WHOLE, method="plain", **options).images
    wanted = pipes[1]("a red car", **options | {"generator": seeded()}).images
    assert torch.equal(ours, wanted)
    assert ours.dtype == torch.float32
    assert pipes[0].vae.dtype == torch.float16
    model = model_of(pipes[0], (32, 32))
    with contextlib.suppress(KeyError), model.drawing():
        assert pipes[0].vae.dtype == torch.float32
        raise KeyError
    assert pipes[0].vae.dtype == torch.float16
    parts["vae"].register_to_config(force_upcast=False)
    with model.drawing():
        assert pipes[0].vae.dtype == torch.float16


def test_an_autoencoder_that_tells_the_statistics_of_its_latents(xl, tiny_xl) -> None:
    """As that of Playground 2.5; diffusers' img2img encodes so, too."""
    vae = copy.deepcopy(xl.vae)
    vae.register_to_config(latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[2.0, 1.0, 0.5, 1.5])
    xl.vae = tiny_xl.vae = vae
    options = {"num_inference_steps": 1, "output_type": "pt"}
    wanted = tiny_xl("a red car", generator=seeded(), **options).images
    assert torch.equal(xl(WHOLE, method="plain", generator=seeded(), **options).images, wanted)
    images = torch.rand(1, 3, 32, 32, generator=seeded())
    latents = encode_images(vae, images)
    assert same(decode_latents(vae, latents), vae(images).sample, 1e-5)


# ------------------------------------------------------------------ methods, words, edits


def test_every_method_draws(xl) -> None:
    images = {method: drawn(xl, method, num_inference_steps=2) for method in METHODS}
    assert all(image.isfinite().all() for image in images.values())
    for first, second in itertools.combinations(METHODS, 2):
        assert not torch.equal(images[first], images[second]), (first, second)


def test_attention_of_words(xl) -> None:
    with capture_attention(xl, "a red car", layers="paper") as attention:
        drawn(xl, "plain", WHOLE)
    assert attention.layers == ("down_blocks.1.attentions.0.transformer_blocks.0.attn2",)
    parts = [attention[word] for word in ("<start>", "a red car", "<end>", "<padding>")]
    assert parts[1].shape == (1, 4, 4)
    torch.testing.assert_close(sum(parts), torch.ones(1, 4, 4))
    with capture_attention(xl, "a red car", layers="unofficial") as attention:
        drawn(xl, "plain", WHOLE)
    assert {name.split(".attentions")[0] for name in attention.layers} == {"up_blocks.0"}


@pytest.mark.filterwarnings("error")
def test_layers_without_cross_attention(xl) -> None:
    method = LayeredRendering(
        delta="dynamic", attention=lambda name: name.startswith("down_blocks.0")
    )
    with pytest.raises(
        ValueError, match=r"matches none of the 4 .*; they are in: down_blocks\.1\."
    ):
        drawn(xl, method)


@pytest.mark.parametrize("kind", [LayeredRenderingXLPipeline, StableDiffusionXLPipeline])
def test_editing(tiny_xl, kind) -> None:
    pipe = made(kind, tiny_xl.components)
    image = picture_of(torch.rand(3, 32, 32, generator=seeded()))
    star = Layer("a yellow star", (0, 0, 0.5, 0.5))
    options = {"num_inference_steps": 4, "generator": seeded()}
    edited = insert(pipe, image, star, background="on grass", **options)
    assert edited.kept == float("inf")
    assert edited.image.tobytes() != image.tobytes()
    inversion = invert(pipe, image, "a red car", num_inference_steps=4)
    assert redraw(pipe, inversion).size == (32, 32)
    assert pipe.scheduler is pipe.components["scheduler"]


def test_inversion_tells_xl_the_size(xl) -> None:
    """One step by hand: ε at x_0, from the U-Net with pooled text and sizes."""
    image = picture_of(torch.rand(3, 32, 32, generator=seeded()))
    latents = invert(xl, image, "a red car", num_inference_steps=4).latents
    with torch.no_grad():
        text, _, pooled, _ = xl.encode_prompt("a red car", do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
        eps = xl.unet(latents[:1], 1, text, added_cond_kwargs=added).sample
    before, after = xl.scheduler.alphas_cumprod[[0, 1]]
    x0 = (latents[:1] - (1 - before).sqrt() * eps) / before.sqrt()
    torch.testing.assert_close(after.sqrt() * x0 + (1 - after).sqrt() * eps, latents[1:2])


# ------------------------------------------------------------------ encoded prompts


def test_encoded_prompts_need_no_encoder(xl) -> None:
    texts = [LAYOUT.caption, LAYOUT.background]
    texts += [f"{layer.prompt} {LAYOUT.background}" for layer in LAYOUT.layers]
    encoded = {text: xl.encode_prompt(text, do_classifier_free_guidance=False) for text in texts}
    embeddings = {text: (parts[0][0], parts[2][0]) for text, parts in encoded.items()}
    encoders = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    bare = made(type(xl), xl.components | encoders)
    wanted = drawn(xl, "collage")
    assert same(drawn(bare, "collage", prompt_embeds=embeddings), wanted)
    with pytest.raises(
        ValueError, match="has no text_encoder, and prompt_embeds lacks: .* has the"
    ):
        drawn(bare, "collage", prompt_embeds=embeddings, negative_prompt="a boat")
    only_second = made(type(xl), xl.components | {"text_encoder_2": None})
    with pytest.raises(ValueError, match="the pipeline has no text_encoder_2, and prompt_embeds l"):
        drawn(only_second, "collage")
    # An empty prompt that was given is what unguided rows read; by default they read zeros.
    zeros = (torch.zeros(16, 32), torch.zeros(8))
    assert same(drawn(bare, "collage", prompt_embeds=embeddings | {"": zeros}), wanted)
    ones = (torch.ones(16, 32), torch.ones(8))
    assert not same(drawn(bare, "collage", prompt_embeds=embeddings | {"": ones}), wanted, 1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 16, 32), "prompt_embeds is a Tensor, but should say whose embedding it is: "
         r'\{"a red car": embedding, …\}, each of shape \(tokens, 32\) and \(8\)$'),
        ({"a": torch.zeros(16, 32)}, r"prompt_embeds\['a'\] has shape \(16, 32\), but should be "
         r"\(tokens, 32\) and \(8\)$"),
        ({"a": (torch.zeros(16, 32), torch.zeros(9))}, r"has shape \(16, 32\) and \(9,\), but"),
        ({"a": None}, r"has shape \(\), but should be \(tokens, 32\) and \(8\)$"),
        ({"a": (torch.zeros(16, 16), torch.zeros(8))}, r"has shape \(16, 16\) and \(8,\), but"),
    ],
)  # fmt: skip
def test_embeddings_that_do_not_fit(xl, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(xl, "plain", prompt_embeds=given)


# ------------------------------------------------------------------ folders


def test_load_pipeline_knows_xl(xl, tmp_path: Path) -> None:
    xl.save_pretrained(tmp_path)
    assert (
        '"_class_name": "StableDiffusionXLPipeline"' in (tmp_path / "model_index.json").read_text()
    )
    again = load_pipeline(tmp_path, device="cpu")
    assert type(again) is LayeredRenderingXLPipeline
    assert not again.text_encoder_2.training
    again.set_progress_bar_config(disable=True)
    assert same(drawn(again, "collage"), drawn(xl, "collage"))


def test_the_name_of_a_model_counts_both_text_encoders(xl) -> None:
    """A benchmark goes on only with the weights that it was begun with."""
    judges = Judges(None, None)
    first = settings_of(xl, [], {}, judges, {})["model"]
    xl.text_encoder_2 = type(xl.text_encoder_2)(xl.text_encoder_2.config)
    assert settings_of(xl, [], {}, judges, {})["model"] != first


def refiner(tiny_xl: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    """Only the second text encoder, and two sizes and a score in the place of three sizes."""
    wants = {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": 5 * 4 + 8}
    unet = UNet2DConditionModel.from_config(tiny_xl.unet.config, **wants)
    parts = {"text_encoder": None, "tokenizer": None, "unet": unet}
    return StableDiffusionXLImg2ImgPipeline(
        **tiny_xl.components | parts, requires_aesthetics_score=True
    )


def test_a_refiner_is_refused(tiny_xl, tmp_path: Path) -> None:
    pipe, message = (
        refiner(tiny_xl),
        "this is a refiner of Stable Diffusion XL .*; use the base mod",
    )
    with pytest.raises(ValueError, match=message):
        drawn(LayeredRenderingXLPipeline.from_pipe(pipe), "plain")
    with pytest.raises(ValueError, match=message):
        invert(pipe, Image.new("RGB", (32, 32)))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(AssetError, match=f"cannot be loaded: {message}"):
        load_pipeline(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "takes 9 channels where latents have 4, as for inpainting; use the"),
        ({"addition_embed_type": "image", "encoder_hid_dim": 8},
         r"wants more than a prompt \(addition_embed_type is 'image'\); use a Stable Diffusion"),
        ({"addition_embed_type": None}, "is of another kind than its LayeredRenderingXLPipeline .* "
         "it belongs into a LayeredRenderingPipeline$"),
    ],
)  # fmt: skip
def test_unets_that_are_refused(xl, tmp_path: Path, changes, message) -> None:
    xl.unet = UNet2DConditionModel.from_config(xl.unet.config, **changes)
    with pytest.raises(ValueError, match=message):
        drawn(xl, "plain")
    with pytest.raises(ValueError, match=message):
        invert(xl, Image.new("RGB", (32, 32)))
    xl.save_pretrained(tmp_path)
    with pytest.raises(AssetError, match=message):
        load_pipeline(tmp_path, device="cpu")


def test_a_unet_of_xl_in_stable_diffusion_is_refused(tiny, tiny_xl) -> None:
    pipe = made(LayeredRenderingPipeline, tiny.components | {"unet": tiny_xl.unet})
    with pytest.raises(ValueError, match="it belongs into a LayeredRenderingXLPipeline$"):
        drawn(pipe, "plain")
