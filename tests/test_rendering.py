import copy
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from lrd_helpers.guidance import constant_delta, vision_guidance
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.rendering import LayeredRenderingPipeline

SCHEDULERS = [
    DDIMScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
]
TWO = Layout(
    "a red car and a yellow star on grass",
    background="on grass",
    layers=[Layer("a red car", (0, 0.5, 0.75, 1)), Layer("a yellow star", (0.5, 0, 1, 0.75))],
)
ONE = Layout("a blue boat at sea", layers=[Layer("a blue boat", (0.25, 0.25, 0.75, 0.75))])
UNGUIDED = Layout(
    TWO.caption,
    background=TWO.background,
    layers=[Layer(layer.prompt, layer.box, strength=0) for layer in TWO.layers],
)


@pytest.fixture
def pipe(tiny: StableDiffusionPipeline) -> LayeredRenderingPipeline:
    pipe = LayeredRenderingPipeline(**tiny.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(pipe: LayeredRenderingPipeline, layouts: object, **options: object) -> Tensor:
    options = {"num_inference_steps": 5, "generator": seeded(), "output_type": "latent"} | options
    return pipe(layouts, **options).images


class Recorded:
    """Notes what the U-Net is given, call by call."""

    def __init__(self, pipe: LayeredRenderingPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: list[Tensor] = []
        forward = pipe.unet.forward

        def noting(sample: Tensor, *arguments: object, **named: object) -> object:
            self.inputs.append(sample.clone())
            return forward(sample, *arguments, **named)

        monkeypatch.setattr(pipe.unet, "forward", noting)


# ------------------------------------------------------------------ what it must be equal to


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_one_layer_over_all_without_guidance_is_stable_diffusion(
    pipe, tiny, scheduler, guidance_scale
) -> None:
    prompt = "a red car on grass"
    layout = Layout(prompt, layers=[Layer(prompt, (0, 0, 1, 1), strength=0)])
    options = {"num_inference_steps": 5, "guidance_scale": guidance_scale, "output_type": "pt"}
    options |= {"negative_prompt": "a ball"} if guidance_scale > 1 else {}
    for one in (pipe, tiny):
        one.scheduler = scheduler.from_config(one.scheduler.config)
    expected = tiny(prompt, generator=seeded(), **options).images
    assert torch.equal(pipe(layout, generator=seeded(), **options).images, expected)


def test_no_layered_steps_is_stable_diffusion(pipe, tiny) -> None:
    expected = tiny(
        TWO.caption,
        num_inference_steps=5,
        guidance_scale=5.0,
        generator=seeded(),
        output_type="latent",
    ).images
    assert torch.equal(latents_of(pipe, TWO, layered_fraction=0), expected)
    assert not torch.allclose(latents_of(pipe, TWO), expected, atol=1e-3)


@torch.no_grad()
def by_hand(pipe: LayeredRenderingPipeline, layout: Layout, layered_steps: int, steps: int):
    """Algorithm 1 line by line, one U-Net call for each term."""
    encode = lambda text: pipe.encode_prompt(text, "cpu", 1, False)[0]  # noqa: E731
    score = lambda x, text: pipe.unet(x, t, encode(text)).sample  # noqa: E731
    scheduler, gamma = pipe.scheduler, 5.0
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 4, 4, generator=seeded()) * scheduler.init_noise_sigma
    masks = layout.masks(4, 4)
    for number, t in enumerate(scheduler.timesteps):
        if number < layered_steps:
            phi = torch.zeros_like(x)
            prompts = [layout.background, *(layer.prompt for layer in layout.layers)]
            for i, (mask, prompt) in enumerate(zip(masks, prompts, strict=True)):
                xi = torch.zeros(4, 4, 4)
                if i and layout.layers[i - 1].strength:
                    delta = constant_delta(pipe.vae, prompt.split()[1])
                    own = layout.layers[i - 1].mask(4, 4).float()
                    xi = layout.layers[i - 1].strength * vision_guidance(delta, own, 0.1, 0.3)
                unconditional, conditional = score(x + xi, ""), score(x + xi, prompt)
                phi += mask * (unconditional + gamma * (conditional - unconditional))
        else:
            unconditional, conditional = score(x, ""), score(x, layout.caption)
            phi = unconditional + gamma * (conditional - unconditional)
        x = scheduler.step(phi, t, x).prev_sample
    return x


@pytest.mark.parametrize("layout", [UNGUIDED, TWO], ids=["ξ = 0", "ξ"])
def test_algorithm_1_by_hand(pipe, layout) -> None:
    expected = by_hand(pipe, layout, layered_steps=3, steps=5)
    drawn = latents_of(pipe, layout, inside=0.1, outside=0.3, layered_fraction=0.6)
    assert torch.allclose(drawn, expected, atol=1e-4)


def test_the_strength_of_a_layer_is_a_factor(pipe) -> None:
    (car, star) = TWO.layers
    layers = [Layer(car.prompt, car.box, strength=2), Layer(star.prompt, star.box, strength=0.5)]
    layout = Layout(TWO.caption, background=TWO.background, layers=layers)
    expected = by_hand(pipe, layout, layered_steps=3, steps=5)
    assert torch.allclose(latents_of(pipe, layout, inside=0.1, outside=0.3), expected, atol=1e-4)
    assert not torch.allclose(latents_of(pipe, TWO, inside=0.1, outside=0.3), expected, atol=1e-3)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_what_the_model_predicts_makes_no_difference(pipe, scheduler, kind, monkeypatch) -> None:
    pipe.to(torch.float64)
    try:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        noise = torch.randn(1, 4, 4, 4, generator=seeded(), dtype=torch.float64)
        options = {"latents": noise, "generator": None, "inside": 0.3, "outside": 0.3}
        by_noise = latents_of(pipe, TWO, **options)

        # The same model in other words: v = (ε − σ x) / α, x_0 = (x − σ ε) / α.
        forward, table = pipe.unet.forward, pipe.scheduler.alphas_cumprod.double()

        def in_other_words(x, t, **named):
            noise = forward(x, t, **named)[0]
            at = min(int(t), 998)  # Euler's timesteps lie between two steps of the table
            ratio = ((1 - table) / table).sqrt()
            ratio = torch.lerp(ratio[at], ratio[at + 1], float(t) - at)
            alpha = 1 / (1 + ratio**2).sqrt()
            if kind == "sample":
                return ((x - ratio * alpha * noise) / alpha,)
            return ((noise - ratio * alpha * x) / alpha,)

        monkeypatch.setattr(pipe.unet, "forward", in_other_words)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, prediction_type=kind)
        assert torch.allclose(latents_of(pipe, TWO, **options), by_noise, rtol=1e-4, atol=1e-4)
    finally:
        pipe.to(torch.float32)


def test_zero_terminal_snr_stays_finite(pipe) -> None:
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    assert latents_of(pipe, TWO).isfinite().all()


# ------------------------------------------------------------------ what the U-Net is asked


def test_one_batch_a_step_and_the_unconditional_half_shared(pipe, monkeypatch) -> None:
    recorded = Recorded(pipe, monkeypatch)
    latents_of(pipe, UNGUIDED)
    # Layered: 1 unconditional + background + 2 layers; then 1 + 1.
    assert [len(x) for x in recorded.inputs] == [4, 4, 4, 2, 2]
    recorded.inputs.clear()
    latents_of(pipe, TWO)
    # Each ξ makes an unconditional input of its own.
    assert [len(x) for x in recorded.inputs] == [6, 6, 6, 2, 2]
    recorded.inputs.clear()
    latents_of(pipe, [TWO, UNGUIDED], guidance_scale=1)
    assert [len(x) for x in recorded.inputs] == [6, 6, 6, 2, 2]


def test_layers_with_other_negative_prompts_share_nothing(pipe, monkeypatch) -> None:
    recorded = Recorded(pipe, monkeypatch)
    layers = [
        Layer("a car", (0, 0, 0.5, 1), negative_prompt="a star"),
        Layer("a boat", (0, 0, 1, 0.5)),
    ]
    layout = Layout("a car and a boat", layers=layers)
    plain = latents_of(pipe, layout)
    assert len(recorded.inputs[0]) == 2 + 3
    assert not torch.equal(plain, latents_of(pipe, layout, negative_prompt="a ball"))


def test_hidden_layers_are_not_computed(pipe, monkeypatch) -> None:
    recorded = Recorded(pipe, monkeypatch)
    layers = [Layer("a car", (0.2, 0.2, 0.6, 0.6)), Layer("a boat", (0, 0, 1, 1))]
    latents_of(pipe, Layout("a boat", layers=layers))
    assert len(recorded.inputs[0]) == 2


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_guidance_has_the_same_strength_with_every_scheduler(pipe, scheduler, monkeypatch) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    recorded = Recorded(pipe, monkeypatch)
    latents_of(pipe, TWO, inside=0.1, outside=0.3)
    background, car = recorded.inputs[0][3], recorded.inputs[0][4]
    mask = TWO.layers[0].mask(4, 4).float()
    field = vision_guidance(constant_delta(pipe.vae, "red"), mask, 0.1, 0.3)
    assert torch.allclose(car - background, field, atol=1e-5)


def test_the_colour_comes_from_the_field_before_the_prompt(pipe) -> None:
    def drawn(prompt: str, colour: str | None) -> Tensor:
        return latents_of(
            pipe, Layout("a car", layers=[Layer(prompt, (0, 0, 0.5, 1), colour=colour)])
        )

    assert torch.equal(drawn("a red car", "red"), drawn("a red car", None))
    assert torch.equal(drawn("a red car", "#ff0000"), drawn("a red car", None))
    assert not torch.allclose(drawn("a red car", "blue"), drawn("a red car", None), atol=1e-4)
    assert not torch.allclose(drawn("a car", "blue"), drawn("a car", None), atol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_chunks(pipe, chunk_size, monkeypatch) -> None:
    whole = latents_of(pipe, [TWO, ONE])
    recorded = Recorded(pipe, monkeypatch)
    assert torch.allclose(latents_of(pipe, [TWO, ONE], chunk_size=chunk_size), whole, atol=1e-4)
    assert max(len(x) for x in recorded.inputs) <= chunk_size
    assert len(recorded.inputs[0]) == min(chunk_size, 10)


# ------------------------------------------------------------------ a diffusers pipeline


def test_batches_are_like_singles(pipe) -> None:
    options = {"eta": 0.5, "negative_prompt": ["a ball", "a star"]}
    both = latents_of(pipe, [TWO, ONE], generator=[seeded(1), seeded(2)], **options)
    first = latents_of(pipe, TWO, generator=seeded(1), eta=0.5, negative_prompt="a ball")
    second = latents_of(pipe, ONE, generator=[seeded(2)], eta=0.5, negative_prompt=["a star"])
    assert torch.allclose(both, torch.cat([first, second]), atol=1e-4)


def test_images_per_prompt_stand_together(pipe) -> None:
    generators = [seeded(number) for number in range(4)]
    out = pipe(
        [TWO, ONE],
        num_images_per_prompt=2,
        num_inference_steps=3,
        generator=generators,
        output_type="latent",
    )
    assert [len(masks) for masks in out.masks] == [3, 3, 2, 2]
    alone = latents_of(pipe, ONE, num_inference_steps=3, generator=seeded(3))
    assert torch.allclose(out.images[3:], alone, atol=1e-4)


def test_output_types_agree(pipe) -> None:
    def drawn(kind: str) -> object:
        return pipe(TWO, num_inference_steps=2, generator=seeded(), output_type=kind).images

    tensor, array, (picture,) = drawn("pt"), drawn("np"), drawn("pil")
    assert tensor.shape == (1, 3, 32, 32)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal((array[0] * 255).round().astype("uint8"), np.asarray(picture))


def test_tuple_output_and_masks(pipe) -> None:
    images, nsfw, masks = pipe(
        TWO, num_inference_steps=2, generator=seeded(), output_type="pt", return_dict=False
    )
    out = pipe(TWO, num_inference_steps=2, generator=seeded(), output_type="pt")
    assert torch.equal(images, out.images)
    assert nsfw is None
    assert torch.equal(masks[0], TWO.masks(4, 4))


def test_size_and_latents(pipe) -> None:
    noise = torch.randn(1, 4, 5, 8, generator=seeded())
    drawn = pipe(TWO, height=40, width=64, num_inference_steps=2, generator=seeded()).images[0]
    assert drawn.size == (64, 40)
    given = pipe(TWO, height=40, width=64, num_inference_steps=2, latents=noise).images[0]
    assert np.array_equal(np.asarray(given), np.asarray(drawn))


def test_callbacks(pipe) -> None:
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].shape))
        return tensors

    plain = latents_of(pipe, TWO)
    assert torch.equal(latents_of(pipe, TWO, callback_on_step_end=look), plain)
    assert [step for step, *_ in seen] == [0, 1, 2, 3, 4]

    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        return tensors

    assert not torch.equal(latents_of(pipe, TWO, callback_on_step_end=stop), plain)
    zeros = lambda pipeline, step, timestep, tensors: {  # noqa: E731
        "latents": torch.zeros_like(tensors["latents"])
    }
    assert latents_of(pipe, TWO, callback_on_step_end=zeros).abs().max() == 0


def test_a_callback_can_change_the_guidance_scale(pipe, monkeypatch) -> None:
    def no_guidance(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 1.0
        return tensors

    recorded = Recorded(pipe, monkeypatch)
    latents_of(pipe, UNGUIDED, callback_on_step_end=no_guidance)
    assert [len(x) for x in recorded.inputs] == [4, 3, 3, 1, 1]


def test_save_and_load(pipe, tmp_path: Path) -> None:
    expected = latents_of(pipe, TWO)
    pipe.save_pretrained(tmp_path)
    again = LayeredRenderingPipeline.from_pretrained(str(tmp_path))
    assert torch.equal(latents_of(again, TWO), expected)
    # It is a plain Stable Diffusion folder.
    assert type(DiffusionPipeline.from_pretrained(str(tmp_path))) is StableDiffusionPipeline


def test_from_pipe_both_ways(pipe, tiny) -> None:
    assert torch.equal(
        latents_of(LayeredRenderingPipeline.from_pipe(tiny), TWO), latents_of(pipe, TWO)
    )
    back = StableDiffusionPipeline.from_pipe(pipe)
    assert back.unet is pipe.unet
    assert back("a car", num_inference_steps=1, output_type="latent").images.shape == (1, 4, 4, 4)


def test_slicing_changes_nothing(pipe) -> None:
    options = {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipe([TWO, ONE], generator=seeded(), **options).images
    pipe.vae.enable_slicing()
    assert torch.allclose(
        pipe([TWO, ONE], generator=seeded(), **options).images, expected, atol=1e-4
    )
    pipe.vae.disable_slicing()


def test_half_precision(pipe, monkeypatch) -> None:
    half = LayeredRenderingPipeline(
        **{k: copy.deepcopy(v) for k, v in pipe.components.items()}, requires_safety_checker=False
    ).to(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    out = half(TWO, num_inference_steps=2, generator=seeded(), output_type="pt").images
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("layouts", "options", "message"),
    [
        ("a red car", {}, "layouts is str, but should be a Layout or several"),
        ([], {}, "layouts is nothing, but should be a Layout or several"),
        (TWO, {"height": 36, "width": 33}, "height and width are 36 and 33, but should be "
         "divisible by 8; 32 and 32 would work"),
        (TWO, {"num_inference_steps": 0}, "num_inference_steps is 0, but should be between 1 and"),
        (TWO, {"num_inference_steps": 1001}, "is 1001, but should be between 1 and 1000"),
        (TWO, {"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        (TWO, {"layered_fraction": 1.5}, "layered_fraction is 1.5, but should be between 0 (no"),
        (TWO, {"layered_fraction": float("nan")}, "layered_fraction is nan"),
        (TWO, {"chunk_size": 0}, "chunk_size is 0, but should be ≥ 1, or None"),
        (TWO, {"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 layouts"),
        (TWO, {"latents": torch.zeros(2, 4, 4, 4)}, "latents has shape (2, 4, 4, 4), but should "
         "have (1, 4, 4, 4)"),
        (TWO, {"latents": torch.full((1, 4, 4, 4), torch.nan)}, "latents has values that are not"),
        (TWO, {"callback_on_step_end_tensor_inputs": ["noise"]}, "has noise, but only latents"),
        (TWO, {"generator": [seeded(), seeded()]}, "list of generators of length 2"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_the_first_call(
    pipe, layouts, options, message, monkeypatch
) -> None:
    recorded = Recorded(pipe, monkeypatch)
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe(layouts, **options)
    assert recorded.inputs == []


def test_a_word_the_model_does_not_know_is_a_warning(pipe) -> None:
    layout = Layout("a red dog on gras", layers=[Layer("a red dog", (0, 0, 1, 1))])
    with pytest.warns(UserWarning, match="does not know the word") as caught:
        pipe(layout, num_inference_steps=1)
    assert [str(warning.message) for warning in caught] == [
        "caption: the model does not know the word 'dog'",
        "caption: the model does not know the word 'gras'; the nearest it knows: grass",
        "layer 1 'a red dog': the model does not know the word 'dog'",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(TWO, num_inference_steps=1)
