"""What users of diffusers expect of any pipeline, for every method, held against Stable Diffusion.

In the spirit of diffusers' own tests/pipelines/test_pipelines_common.py, whose names most tests
have. Each is tried on `StableDiffusionPipeline` with the same parts, too ("plain diffusers"): what
that passes, every method should.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ConsistencyDecoderVAE,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.schedulers import KarrasDiffusionSchedulers
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.methods import METHODS, BoxDiff, LayoutGuidance
from lrd_helpers.pipeline import LayeredRenderingPipeline
from lrd_helpers.sampling.steps import Steps, ddim_like, derived

LAYOUT = Layout(
    "a red car and a yellow star on grass",
    background="on grass",
    layers=[Layer("a red car", (0, 0.5, 0.75, 1)), Layer("a yellow star", (0.5, 0, 1, 0.75))],
)
OTHER = Layout("a car at sea", background="at sea", layers=[Layer("a car", (0.25, 0, 1, 0.5))])
SIZE = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 5.0}
QUICK = {
    "boxdiff": BoxDiff(steps=0.3, refinements=1),
    "layout-guidance": LayoutGuidance(steps=0.3, repeats=1),
    "collage": replace(METHODS["collage"], sketch_steps=2, layered_fraction=0.34),
}
"""The slow methods with fewer steps where they change nothing that is tested."""
DIFFUSERS = "plain diffusers"
SCHEDULERS = [getattr(diffusers, scheduler.name) for scheduler in KarrasDiffusionSchedulers]


@pytest.fixture(params=[*METHODS, DIFFUSERS])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(method: str, tiny: StableDiffusionPipeline) -> StableDiffusionPipeline:
    kind = StableDiffusionPipeline if method == DIFFUSERS else LayeredRenderingPipeline
    return made(kind, tiny.components)


def made(kind: type, components: dict[str, object]) -> StableDiffusionPipeline:
    options = (
        {"requires_safety_checker": False} if issubclass(kind, StableDiffusionPipeline) else {}
    )
    pipe = kind(**components, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(
    pipe: StableDiffusionPipeline, method: str, *layouts: Layout, **options: object
) -> Tensor:
    layouts = layouts or (LAYOUT,)
    options = SIZE | {"generator": seeded(), "output_type": "pt"} | options
    if method == DIFFUSERS:
        return pipe([layout.caption for layout in layouts], **options).images
    return pipe(list(layouts), method=QUICK.get(method, method), **options).images


@pytest.fixture(scope="module")
def pictures() -> dict[str, Tensor]:
    return {}


@pytest.fixture
def expected(pictures, pipe, method) -> Tensor:
    """The picture that the shared models draw as they are, drawn once for each method."""
    if method not in pictures:
        pictures[method] = drawn(pipe, method)
    return pictures[method]


def in_diffusers(pipe: StableDiffusionPipeline) -> type:
    """Its class in diffusers, the same for "plain diffusers"."""
    return getattr(pipe, "plain", type(pipe))


def same(first: Tensor, second: Tensor, atol: float = 1e-3) -> bool:
    """Weights that lie elsewhere in memory, and other batches, are rounded otherwise: then a pixel
    of a pasted outline may be another one.
    """
    return float((first - second).abs().mean()) < atol


BROKEN = {
    "unet": ("conv_out.bias", "U-Net's predictions at t = .*"),
    "vae": ("decoder.conv_out.bias", "pixels from the autoencoder"),
    "text_encoder": ("final_layer_norm.bias", "embeddings of '.*'"),
}
"""A weight of each model that becomes NaN, and what is then said."""


# ------------------------------------------------------------------ folders and parts


def test_save_load_local(pipe, method, expected, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert same(drawn(again, method), expected)


@pytest.mark.parametrize("scheduler", [LCMScheduler, EulerDiscreteScheduler])
def test_save_load_with_what_the_constructor_changed(pipe, method, scheduler, tmp_path) -> None:
    """Stable Diffusion's constructor sets steps_offset to 1: a folder must draw the same."""
    pipe = made(type(pipe), pipe.components | {"scheduler": scheduler()})
    expected = drawn(pipe, method)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert same(drawn(again, method), expected)


def test_save_load_optional_components(pipe, method, expected, tmp_path: Path) -> None:
    for name in pipe._optional_components:
        setattr(pipe, name, None)
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    again = type(pipe).from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert all(getattr(again, name) is None for name in pipe._optional_components)
    assert same(drawn(again, method), expected)


def test_save_load_dtype(pipe, method, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, variant="fp16")
    again = type(pipe).from_pretrained(str(tmp_path), variant="fp16", torch_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    assert again.unet.dtype == torch.bfloat16
    assert drawn(again, method).isfinite().all()


def test_components_and_from_pipe(pipe, method, expected) -> None:
    assert same(drawn(made(type(pipe), pipe.components), method), expected)
    again = type(pipe).from_pipe(in_diffusers(pipe).from_pipe(pipe))
    again.set_progress_bar_config(disable=True)
    assert same(drawn(again, method), expected)


def test_auto_pipelines_know_it(pipe, method) -> None:
    family = in_diffusers(pipe).__name__.removesuffix("Pipeline")
    to_image, inpaint = (
        getattr(diffusers, f"{family}{to}Pipeline") for to in ("Img2Img", "Inpaint")
    )
    assert type(AutoPipelineForImage2Image.from_pipe(pipe)) is to_image
    assert type(AutoPipelineForInpainting.from_pipe(pipe)) is inpaint
    text_to_image = AutoPipelineForText2Image.from_pipe(pipe)
    assert text_to_image.unet is pipe.unet


def test_device_map(pipe, method, expected, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(str(tmp_path), device_map="cpu")
    again.set_progress_bar_config(disable=True)
    assert same(drawn(again, method), expected)


# ------------------------------------------------------------------ batches and outputs


def test_inference_batch_single_identical(pipe, method) -> None:
    both = drawn(pipe, method, LAYOUT, OTHER, generator=[seeded(1), seeded(2)])
    assert same(both[:1], drawn(pipe, method, LAYOUT, generator=[seeded(1)]))
    assert same(both[1:], drawn(pipe, method, OTHER, generator=[seeded(2)]))


@pytest.mark.parametrize("count", [1, 2])
def test_num_images_per_prompt(pipe, method, count) -> None:
    images = drawn(pipe, method, LAYOUT, OTHER, num_images_per_prompt=count)
    assert images.shape == (2 * count, 3, 64, 64)


def test_cfg(pipe, method, expected) -> None:
    assert not same(expected, drawn(pipe, method, guidance_scale=1.0), 1e-5)


def test_output_types_and_tuples(pipe, method, expected) -> None:
    array = drawn(pipe, method, output_type="np")
    assert np.allclose(array, expected.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    assert drawn(pipe, method, output_type="pil")[0].size == (64, 64)
    assert drawn(pipe, method, output_type="latent").shape == (1, 4, 8, 8)
    options = SIZE | {"generator": seeded(), "output_type": "pt", "return_dict": False}
    asked = LAYOUT.caption if method == DIFFUSERS else LAYOUT
    options |= {} if method == DIFFUSERS else {"method": QUICK.get(method, method)}
    assert same(pipe(asked, **options)[0], expected, 1e-5)


# ------------------------------------------------------------------ callbacks


def test_callback_inputs(pipe, method) -> None:
    assert "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    seen = []

    def look(pipe, number, t, tensors):
        seen.append(number)
        assert set(tensors) == set(pipe._callback_tensor_inputs)
        if number == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    names = pipe._callback_tensor_inputs
    options = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
    assert drawn(pipe, method, output_type="latent", **options).abs().sum() == 0
    assert seen == list(range(pipe.num_timesteps))


def test_callback_cfg(pipe, method) -> None:
    def stronger(pipe, number, t, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    drawn(pipe, method, callback_on_step_end=stronger)
    assert pipe.guidance_scale == SIZE["guidance_scale"] + pipe.num_timesteps


def test_a_callback_of_diffusers_cuts_guidance_off(pipe, method) -> None:
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        drawn(pipe, method)
        guided = rows[-1]
        xl = "add_time_ids" in pipe._callback_tensor_inputs
        cut_off = (SDXLCFGCutoffCallback if xl else SDCFGCutoffCallback)(None, 0)
        drawn(pipe, method, callback_on_step_end=cut_off)
    finally:
        hook.remove()
    assert pipe.guidance_scale == 0.0
    assert 2 * rows[-1] == guided, "no unconditional rows are left"


def test_interruption(pipe, method) -> None:
    numbers = []

    def stop(pipe, number, t, tensors):
        numbers.append(number)
        pipe._interrupt = True
        return tensors

    drawn(pipe, method, callback_on_step_end=stop)
    assert numbers[0] == 0
    # Stable Diffusion goes on through its loop, but asks nothing.
    assert len(numbers) == 1


# ------------------------------------------------------------------ schedulers


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_karras_schedulers_shape(pipe, method, scheduler) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    steps = 5 if "KDPM2" in scheduler.__name__ else 2
    latents = drawn(pipe, method, num_inference_steps=steps, output_type="latent")
    assert latents.shape == (1, 4, 8, 8)
    assert latents.isfinite().all()


def test_one_step(pipe, method) -> None:
    for scheduler in (DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
        assert drawn(pipe, method, num_inference_steps=1).isfinite().all()


def test_too_few_steps_for_runge_kutta(pipe, method) -> None:
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    assert drawn(pipe, method, num_inference_steps=4).isfinite().all()
    if method != DIFFUSERS:  # which raises an error of numpy's
        with pytest.raises(ValueError, match="at least 4 steps, not 2; .* skip_prk_steps=True"):
            drawn(pipe, method, num_inference_steps=2)


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, LCMScheduler])
@pytest.mark.parametrize("configured", [True, False])
def test_every_derived_scheduler_has_the_noise_of_its_source(tiny, scheduler, configured) -> None:
    source = scheduler.from_config(tiny.scheduler.config) if configured else scheduler()
    source.set_timesteps(4)
    steps = Steps(source, 4)
    quick = steps.sketching(3).scheduler
    if not hasattr(source, "alphas_cumprod"):  # EDM has σ only
        assert type(quick) is type(source)
        assert quick.config.sigma_max == source.config.sigma_max
        return
    assert torch.equal(quick.alphas_cumprod, source.alphas_cumprod)
    assert torch.equal(ddim_like(source).alphas_cumprod, source.alphas_cumprod)


@pytest.fixture
def distilled(pipe, tiny):
    """The pipeline, as if its model had been distilled to four steps."""
    options = {"original_inference_steps": 4, "set_alpha_to_one": False}
    pipe.scheduler = derived(TCDScheduler, tiny.scheduler, **options)
    return pipe


def test_a_distilled_model_is_asked_for_what_it_has_learned(distilled, method, monkeypatch) -> None:
    """Its timesteps alone, sketches and relevance too, and never the empty prompt's prediction."""
    asked, forward = [], distilled.unet.forward
    empty = distilled.encode_prompt("", "cpu", 1, False)[0][0]

    def noting(sample, timestep, encoder_hidden_states, **options):
        asked.append(int(timestep))
        assert not any(torch.equal(row, empty) for row in encoder_hidden_states)
        return forward(sample, timestep, encoder_hidden_states, **options)

    monkeypatch.setattr(distilled.unet, "forward", noting)
    few = {"num_inference_steps": 4, "guidance_scale": 1.0}
    options = few if method == DIFFUSERS else dict.fromkeys(few)
    picture = drawn(distilled, method, **options)
    assert set(asked) == {999, 749, 499, 249}
    assert torch.equal(picture, drawn(distilled, method, **few)), "the default"


@pytest.mark.parametrize("method", ["collage", "plain"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 5}, "is 5, but this model was distilled to 4 steps; 4 would work"),
        ({"timesteps": [999, 600]}, "4 timesteps and knows no others; give num_inference_steps=4"),
        ({"guidance_scale": 5.0}, "is 5, but guidance was distilled into this model; 1 would work"),
    ],
)
def test_what_a_distilled_model_does_not_know(distilled, method, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(
            distilled, method, **dict.fromkeys(("num_inference_steps", "guidance_scale")) | options
        )


def test_a_distilled_model_cannot_be_inverted(tiny) -> None:
    scheduler = derived(TCDScheduler, tiny.scheduler, original_inference_steps=4)
    with pytest.raises(ValueError, match="distilled to 4 steps and cannot be inverted"):
        ddim_like(scheduler)


# ------------------------------------------------------------------ other parts


def test_multi_vae(pipe, method, tiny) -> None:
    shape = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    torch.manual_seed(0)
    autoencoders = [
        AutoencoderKL(latent_channels=4, **shape, **blocks),
        AsymmetricAutoencoderKL(
            down_block_types=blocks["down_block_types"],
            down_block_out_channels=shape["block_out_channels"],
            layers_per_down_block=1,
            up_block_types=blocks["up_block_types"],
            up_block_out_channels=shape["block_out_channels"],
            layers_per_up_block=1,
            norm_num_groups=4,
        ),
        ConsistencyDecoderVAE(
            encoder_block_out_channels=shape["block_out_channels"],
            encoder_down_block_types=blocks["down_block_types"],
            encoder_norm_num_groups=4,
            decoder_block_out_channels=[8, 16],
            decoder_norm_num_groups=4,
            decoder_down_block_types=["ResnetDownsampleBlock2D"] * 2,
            decoder_up_block_types=["ResnetUpsampleBlock2D"] * 2,
        ),
        AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
        ),
    ]
    for vae in autoencoders:
        other = made(type(pipe), pipe.components | {"vae": vae.eval()})
        assert drawn(other, method).shape == (1, 3, 64, 64), type(vae).__name__


def test_slicing_and_tiling(pipe, method) -> None:
    expected, processors = drawn(pipe, method, LAYOUT, OTHER), pipe.unet.attn_processors
    try:
        pipe.vae.enable_slicing()
        assert same(drawn(pipe, method, LAYOUT, OTHER), expected)
        pipe.vae.enable_tiling()
        assert drawn(pipe, method).isfinite().all()
        pipe.enable_attention_slicing("max")
        assert drawn(pipe, method).isfinite().all()
    finally:
        pipe.vae.disable_slicing()
        pipe.vae.disable_tiling()
        pipe.disable_attention_slicing()
        pipe.unet.set_attn_processor(processors)


def own_unet(pipe: StableDiffusionPipeline) -> None:
    """The models are shared by all tests: what is changed for good is copied first."""
    pipe.unet = copy.deepcopy(pipe.unet)


def test_fused_projections_and_freeu(pipe, method, expected) -> None:
    own_unet(pipe)
    pipe.fuse_qkv_projections(vae=False)
    assert same(drawn(pipe, method), expected)
    pipe.unfuse_qkv_projections(vae=False)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert drawn(pipe, method).isfinite().all()
    pipe.disable_freeu()


def test_a_lora_changes_the_picture(pipe, method, expected) -> None:
    own_unet(pipe)
    pipe.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    with_lora = drawn(pipe, method)
    assert with_lora.isfinite().all()
    assert not torch.equal(with_lora, expected)
    without = drawn(pipe, method, cross_attention_kwargs={"scale": 0.0})
    assert same(without, expected)


def lora_for(width: int) -> dict[str, torch.Tensor]:
    """A LoRA of one matrix that reads text of so many features, as diffusers writes it."""
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    return {f"{place}.lora_A.weight": torch.ones(2, width),
            f"{place}.lora_B.weight": torch.ones(8, 2)}  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (lora_for(2048), r"for XL \(it reads text of 2048 features\), but this is a U-Net"),
        (lora_for(768), "was made for Stable Diffusion 1.x"),
        ({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8)},
         "has weights for transformer, but this pipeline has a U-Net"),
    ],
    ids=["XL", "1.x", "transformer"],
)  # fmt: skip
def test_a_lora_of_another_family_is_refused(pipe, method, expected, lora, said) -> None:
    if method == DIFFUSERS:
        pytest.skip("it is our pipelines that refuse")
    own_unet(pipe)
    with pytest.raises(ValueError, match=said):
        pipe.load_lora_weights(lora)
    assert same(drawn(pipe, method), expected)
    width = pipe.unet.config.cross_attention_dim
    place = next(name for name, _ in pipe.unet.named_modules() if name.endswith("attn2.to_k"))
    fitting = {
        key.replace("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", place): tensor
        for key, tensor in lora_for(width).items()
    }
    out = pipe.unet.get_submodule(place).out_features
    # Not of equal columns: what the U-Net reads is normed, and its features' sum is 0.
    reads = torch.linspace(-1, 1, 2 * width).reshape(2, width)
    fitting = {k: torch.ones(out, 2) if "lora_B" in k else reads for k in fitting}
    pipe.load_lora_weights(fitting)
    assert not same(drawn(pipe, method), expected)


def test_a_textual_inversion_of_another_family_is_refused(pipe, method) -> None:
    if method == DIFFUSERS:
        pytest.skip("it is our pipelines that refuse")
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    words = len(pipe.tokenizer)
    said = "was made for Stable Diffusion 2.x, but this text encoder has 16 features"
    with pytest.raises(ValueError, match=said):
        pipe.load_textual_inversion({"<cat-toy>": torch.ones(1024)})
    assert len(pipe.tokenizer) == words
    pipe.load_textual_inversion(torch.ones(16), "<cat-toy>")
    assert len(pipe.tokenizer) == words + 1


@pytest.fixture
def ip_adapter(pipe) -> Callable[[float], None]:
    """An IP-Adapter of random weights in the U-Net; says how strong it is."""
    own_unet(pipe)
    state, key, features = {}, 1, pipe.unet.config.cross_attention_dim
    torch.manual_seed(0)
    for name in pipe.unet.attn_processors:
        if name.endswith("attn1.processor") or "motion_modules" in name:
            continue
        size = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
        processor = IPAdapterAttnProcessor2_0(size, features, scale=1.0)
        for part, weights in processor.state_dict().items():
            which = "to_k_ip" if "to_k_ip" in part else "to_v_ip"
            state[f"{key}.{which}.weight"] = weights
        key += 2
    projection = diffusers.models.ImageProjection(32, features, 4).state_dict()
    image_proj = {
        "proj.weight": projection["image_embeds.weight"],
        "proj.bias": projection["image_embeds.bias"],
        "norm.weight": projection["norm.weight"],
        "norm.bias": projection["norm.bias"],
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": state}])
    return pipe.set_ip_adapter_scale


def test_ip_adapter(pipe, method, ip_adapter) -> None:
    embeds = torch.randn(2, 1, 32, generator=seeded())
    ip_adapter(0.0)
    without = drawn(pipe, method, ip_adapter_image_embeds=[embeds])
    ip_adapter(42.0)
    with_adapter = drawn(pipe, method, ip_adapter_image_embeds=[embeds])
    assert with_adapter.isfinite().all()
    assert not same(with_adapter, without, 1e-4)
    assert not same(drawn(pipe, method, ip_adapter_image_embeds=[-embeds]), with_adapter, 1e-6)
    unguided = drawn(pipe, method, guidance_scale=1.0, ip_adapter_image_embeds=[embeds[1:]])
    assert unguided.isfinite().all()
    if method != DIFFUSERS:
        with pytest.raises(ValueError, match="an IP-Adapter is loaded, but there is no ip_adapter"):
            drawn(pipe, method)


def test_encoded_prompts_need_no_encoder(pipe, method, expected) -> None:
    encode = lambda text: pipe.encode_prompt(text, "cpu", 1, False)[0][0]  # noqa: E731
    if method == DIFFUSERS:
        options = {"prompt_embeds": encode(LAYOUT.caption)[None]}
        options["negative_prompt_embeds"] = encode("")[None]
        both = made(type(pipe), pipe.components | {"tokenizer": None, "text_encoder": None})
        images = both(**SIZE, **options, generator=seeded(), output_type="pt").images
        assert same(images, expected, 1e-5)
        return
    texts = ["", LAYOUT.caption, LAYOUT.background, "a red car", "a yellow star"]
    texts += [f"{layer.prompt} {LAYOUT.background}" for layer in LAYOUT.layers]
    texts += ["a red car and a yellow star"]
    embeddings = {text: encode(text) for text in texts}
    bare = made(type(pipe), pipe.components | {"tokenizer": None, "text_encoder": None})
    words = {"paper", "authors", "unofficial", "paint-with-words", "layout-guidance", "boxdiff"}
    words.add("larender")
    if method in words:  # they ask for words of a prompt, which only a tokenizer knows
        with pytest.raises(ValueError, match="the pipeline has no tokenizer, so no word"):
            drawn(bare, method, prompt_embeds=embeddings)
        bare.tokenizer = pipe.tokenizer
    with pytest.warns(UserWarning, match="nobody asks for it"):
        assert same(drawn(bare, method, prompt_embeds=embeddings), expected)
    with pytest.raises(ValueError, match="the pipeline has no text_encoder, and prompt_embeds"):
        drawn(bare, method)


@pytest.mark.parametrize(
    "method", ["paper", "authors", "paint-with-words", "boxdiff", "larender", "rag"]
)
def test_a_compiled_unet(pipe, method) -> None:
    """Those that look at the attention; for the others it is as for Stable Diffusion."""
    expected = drawn(pipe, method, num_inference_steps=2)
    pipe.unet = torch.compile(copy.deepcopy(pipe.unet), backend="eager")
    assert same(drawn(pipe, method, num_inference_steps=2), expected, 1e-5)


def test_a_safety_checker_is_asked(pipe, method, monkeypatch) -> None:
    monkeypatch.setattr(
        pipe, "run_safety_checker", lambda images, *_: (images, [True] * len(images))
    )
    asked = LAYOUT.caption if method == DIFFUSERS else LAYOUT
    options = SIZE | ({} if method == DIFFUSERS else {"method": QUICK.get(method, method)})
    out = pipe(asked, **options, generator=seeded(), output_type="pil")
    assert out.nsfw_content_detected == [True]
    assert isinstance(out.images[0], Image.Image)


def test_the_schedule_of_the_pipeline_is_left_alone(pipe, method) -> None:
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    drawn(pipe, method)
    assert pipe.scheduler is scheduler
    assert dict(scheduler.config) == config
    assert isinstance(scheduler, DDIMScheduler)


@pytest.mark.parametrize("part", BROKEN)
def test_numbers_that_are_not_finite_never_become_a_picture(pipe, method, part) -> None:
    broken, scheduler = copy.deepcopy(pipe.components[part]), pipe.scheduler
    name, what = BROKEN[part]
    weight = next(weight for each, weight in broken.named_parameters() if each.endswith(name))
    torch.nn.init.constant_(weight, torch.nan)
    pipe = made(type(pipe), pipe.components | {part: broken})
    if method == DIFFUSERS:
        assert drawn(pipe, method).isnan().any()  # which would be shown as black
        return
    with pytest.raises(ValueError, match=f"{what} are not finite .NaN or infinite.: use float32"):
        drawn(pipe, method)
    assert pipe.scheduler is scheduler
    assert pipe.prompts_of_rows is None
