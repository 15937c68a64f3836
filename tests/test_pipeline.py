import copy
import io
import re
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from picture_files import as_a_phone_saves
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lrd_helpers.attention import AttentionMaps, capture_attention
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.methods import METHODS, LayeredRendering
from lrd_helpers.methods.guidance import colour_latents, constant_delta, vision_guidance
from lrd_helpers.methods.placement import object_pixels, pasted
from lrd_helpers.pictures import picture_of, pixels_of
from lrd_helpers.pipeline import LayeredRenderingPipeline, checked_canvas
from lrd_helpers.sampling.model import StableDiffusion

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


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(pipe: LayeredRenderingPipeline, layouts: object, **options: object) -> Tensor:
    defaults = {"num_inference_steps": 5, "generator": seeded(), "output_type": "latent"}
    # Algorithm 1 as the paper has it, with a constant δ; the default method has tests of its own.
    options = defaults | {"method": LayeredRendering()} | options
    return pipe(layouts, **options).images


def nearly_same(first: Tensor, second: Tensor, unlike: Tensor) -> bool:
    """Whether two pictures differ by under a hundredth of what an unlike one differs by.

    Batches of other sizes are rounded otherwise, on some processors visibly: a pixel of a pasted
    object's outline may then be another one.
    """
    return bool((first - second).abs().mean() < 0.01 * (first - unlike).abs().mean())


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
                    own = layout.layers[i - 1].cells(4, 4).float()
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


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("method", [LayeredRendering(), METHODS["collage"]])
def test_zero_terminal_snr_stays_finite(pipe, kind, steps, method) -> None:
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type=kind, **ZERO_SNR
    )
    assert latents_of(pipe, TWO, method=method, num_inference_steps=steps).isfinite().all()


@pytest.mark.parametrize("method", ["plain", LayeredRendering(), "collage", "boxdiff"])
def test_a_schedule_that_the_model_was_not_trained_for_is_named(pipe, method) -> None:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **ZERO_SNR)  # ε of ε alone
    message = "noisy latents at t = .* are not finite .* a scheduler that the model was trained for"
    with pytest.raises(ValueError, match=message):
        latents_of(pipe, TWO, method=method, num_inference_steps=3)


@pytest.mark.parametrize("method", ["paper", "authors", "unofficial"])
def test_a_strength_that_is_far_too_large_is_no_black_picture(pipe, method) -> None:
    layout = replace(TWO, layers=[replace(layer, strength=1e30) for layer in TWO.layers])
    with pytest.raises(ValueError, match="not finite .* a smaller strength"):
        latents_of(pipe, layout, method=replace(METHODS[method], top_k=4))


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


def test_hidden_layers_are_not_computed_and_named(pipe, monkeypatch) -> None:
    recorded = Recorded(pipe, monkeypatch)
    layers = [Layer("a car", (0.2, 0.2, 0.6, 0.6)), Layer("a boat", (0, 0, 1, 1))]
    with pytest.warns(UserWarning, match="^layer 1 'a car' is completely hidden by layer 2 'a b"):
        latents_of(pipe, Layout("a boat", layers=layers))
    assert len(recorded.inputs[0]) == 2


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_guidance_has_the_same_strength_with_every_scheduler(pipe, scheduler, monkeypatch) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    recorded = Recorded(pipe, monkeypatch)
    latents_of(pipe, TWO, inside=0.1, outside=0.3)
    background, car = recorded.inputs[0][3], recorded.inputs[0][4]
    mask = TWO.layers[0].cells(4, 4).float()
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


def test_many_layers_are_warned_of_and_go_through_the_model_in_parts(pipe, monkeypatch) -> None:
    """A layout of 64 layers at 512 × 512 needed 3.3 GB."""
    boxes = [(n / 16, 0, n / 16 + 0.2, 1) for n in range(12)]
    many = Layout("a car", layers=[Layer("a red car", box) for box in boxes])
    monkeypatch.setattr(type(pipe), "cells_at_once", 8 * 16 * 16)
    recorded = Recorded(pipe, monkeypatch)
    options = {"layered_fraction": 1, "num_inference_steps": 2, "height": 128, "width": 128}
    message = "with 12 layers .* 13 prompts at once: .* up to 13 × as long as .*plain"
    with pytest.warns(UserWarning, match=message):
        latents_of(pipe, many, method="paper", **options)
    assert max(len(x) for x in recorded.inputs) == 8


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_chunks(pipe, chunk_size, monkeypatch) -> None:
    whole = latents_of(pipe, [TWO, ONE])
    recorded = Recorded(pipe, monkeypatch)
    assert torch.allclose(latents_of(pipe, [TWO, ONE], chunk_size=chunk_size), whole, atol=1e-4)
    assert max(len(x) for x in recorded.inputs) <= chunk_size
    assert len(recorded.inputs[0]) == min(chunk_size, 10)


# ------------------------------------------------------------------ the methods

EVERYWHERE = Layout(
    TWO.caption, layers=[Layer(TWO.caption, layer.box, strength=0) for layer in TWO.layers]
)
"""Layers that all ask for the caption: however they are put together, it is the plain picture."""


def composed(layout: Layout, fields: list[Tensor]) -> Tensor:
    """Σ_i M^i ξ^i at 4 × 4."""
    return sum(mask * field for mask, field in zip(layout.masks(4, 4)[1:], fields, strict=True))[
        None
    ]


def fields_of(pipe, layout: Layout, delta, inside: float, outside: float) -> list[Tensor]:
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    return [
        vision_guidance(delta(layer, noise), layer.cells(4, 4).float(), inside, outside)
        for layer in layout.layers
    ]


def dynamic(pipe, where: str = "all", top_k: int = 3):
    """δ of Eq. 6 by hand: one U-Net call, with the maps of its cross-attention."""

    def delta(layer: Layer, noise: Tensor) -> Tensor:
        word = layer.prompt.split()[-1]
        text = pipe.encode_prompt(layer.prompt, "cpu", 1, False)[0]
        options = {"layers": where, "tokenizer": pipe.tokenizer, "guided": False}
        with torch.no_grad(), capture_attention(pipe.unet, layer.prompt, **options) as attention:
            pipe.unet(noise, pipe.scheduler.timesteps[0], text)
        best = attention.pooled(word, size=(4, 4))[0].flatten().argsort(descending=True)[:top_k]
        return noise[0].flatten(1)[:, best].mean(1)

    return delta


@pytest.mark.parametrize("where", ["all", "paper", "unofficial"])
def test_dynamic_delta_by_hand(pipe, where, monkeypatch) -> None:
    pipe.scheduler.set_timesteps(5)
    expected = fields_of(pipe, TWO, dynamic(pipe, where), 0.4, 0.7)
    recorded = Recorded(pipe, monkeypatch)
    method = LayeredRendering(delta="dynamic", inside=0.4, outside=0.7, top_k=3, attention=where)
    latents_of(pipe, TWO, method=method)
    assert [len(x) for x in recorded.inputs] == [2, 6, 6, 6, 2, 2], "the layers' maps come first"
    background, car, star = recorded.inputs[1][3:]
    assert torch.allclose(car - background, expected[0], atol=1e-5)
    assert torch.allclose(star - background, expected[1], atol=1e-5)


def test_contrast_delta_by_hand(pipe, monkeypatch) -> None:
    t = torch.tensor(800)
    alpha = float(pipe.scheduler.alphas_cumprod[800]) ** 0.5
    sigma = (1 - alpha**2) ** 0.5

    def delta(layer: Layer, noise: Tensor) -> Tensor:
        """From x̂_0 of "on grass" in the layer's place to the latent of its colour."""
        text = pipe.encode_prompt("on grass", "cpu", 1, False)[0]
        with torch.no_grad():
            epsilon = pipe.unet(sigma * noise, t, text).sample
        x0 = (sigma * noise - sigma * epsilon) / alpha
        place = x0[0][:, layer.cells(4, 4)].mean(1)
        [colour] = colour_latents(pipe.vae, [layer.prompt.split()[1]])
        return 2 * torch.nn.functional.normalize(colour - place, dim=0)

    expected = fields_of(pipe, TWO, delta, 0.4, 0.7)
    recorded = Recorded(pipe, monkeypatch)
    latents_of(pipe, TWO, method=LayeredRendering(delta="contrast", inside=0.4, outside=0.7))
    assert [len(x) for x in recorded.inputs] == [1, 6, 6, 6, 2, 2], "the background comes first"
    background, car, star = recorded.inputs[1][3:]
    assert torch.allclose(car - background, expected[0], atol=1e-4)
    assert torch.allclose(star - background, expected[1], atol=1e-4)


def test_the_word_of_a_layer(pipe, monkeypatch) -> None:
    asked = []
    pooled = AttentionMaps.pooled

    def noting(maps, word, *arguments, **options):
        asked.append(word)
        return pooled(maps, word, *arguments, **options)

    monkeypatch.setattr(AttentionMaps, "pooled", noting)
    layers = [Layer("a red car at sea", (0, 0, 0.5, 1), word=word) for word in (None, "red car")]
    latents_of(
        pipe,
        Layout("a car", layers=layers),
        method=LayeredRendering(delta="dynamic", top_k=2, overlap="mean"),
    )
    assert asked == ["car", "red car"]


def test_guidance_in_the_initial_noise(pipe) -> None:
    delta = lambda layer, _: constant_delta(pipe.vae, layer.prompt.split()[1])  # noqa: E731
    added = composed(TWO, fields_of(pipe, TWO, delta, 0.4, 0.7))
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    expected = latents_of(pipe, UNGUIDED, latents=noise + added)
    method = LayeredRendering(guide="noise", inside=0.4, outside=0.7)
    assert torch.allclose(latents_of(pipe, TWO, method=method), expected, atol=1e-5)
    repeated = latents_of(pipe, TWO, method=replace(method, early_repeats=2))

    def again(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] + (0.01 * added if step < 2 else 0)}

    by_hand = latents_of(pipe, UNGUIDED, latents=noise + added, callback_on_step_end=again)
    assert torch.allclose(repeated, by_hand, atol=1e-5)


def test_guidance_in_the_noise_and_seen_outside(pipe, monkeypatch) -> None:
    delta = lambda layer, _: constant_delta(pipe.vae, layer.prompt.split()[1])  # noqa: E731
    fields = fields_of(pipe, TWO, delta, 0.4, 0.7)
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    recorded = Recorded(pipe, monkeypatch)
    latents_of(pipe, TWO, method=LayeredRendering(guide="both", inside=0.4, outside=0.7))
    assert [len(x) for x in recorded.inputs] == [6, 6, 6, 2, 2]
    for step in range(3):
        background, car, star = recorded.inputs[step][3:]
        if not step:
            assert torch.allclose(background, (noise + composed(TWO, fields))[0], atol=1e-5)
        for row, layer, field in zip((car, star), TWO.layers, fields, strict=True):
            outside = ~layer.cells(4, 4) * field
            assert torch.allclose(row - background, outside, atol=1e-5)


def test_guidance_in_the_noise_is_as_strong_with_every_scheduler(pipe, monkeypatch) -> None:
    recorded, inputs = Recorded(pipe, monkeypatch), {}
    for scheduler in (DDIMScheduler, EulerDiscreteScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        for strength in (0.0, 1.0):
            recorded.inputs.clear()
            method = LayeredRendering(guide="noise", inside=strength, outside=strength)
            latents_of(pipe, TWO, method=method)
            inputs[scheduler, strength] = recorded.inputs[0][-1]
    ddim, euler = (
        inputs[one, 1.0] - inputs[one, 0.0] for one in (DDIMScheduler, EulerDiscreteScheduler)
    )
    assert ddim.abs().max() > 0.5
    assert torch.allclose(ddim, euler, atol=1e-3)


def test_weighted_guidance_follows_the_attention_map(pipe, monkeypatch) -> None:
    recorded = Recorded(pipe, monkeypatch)
    plain = LayeredRendering(delta="dynamic", inside=0.4, outside=0.7, top_k=3)
    differences = []
    for method in (plain, replace(plain, weighted=True)):
        recorded.inputs.clear()
        latents_of(pipe, TWO, method=method)
        differences.append(recorded.inputs[1][4] - recorded.inputs[1][3])
    whole, weighted = differences
    inside = TWO.layers[0].cells(4, 4)
    assert torch.allclose(weighted[:, ~inside], whole[:, ~inside], atol=1e-5)
    ratio = (weighted / whole)[:, inside]
    assert torch.allclose(ratio, ratio[:1].expand(4, -1), atol=1e-4), "one factor for all channels"
    assert ratio.min() >= 0
    assert ratio.max() <= 1 + 1e-4
    assert ratio.max() - ratio.min() > 1e-4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_layers_that_ask_the_same_are_one_picture_however_they_are_fused(pipe, scheduler) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    if "Ancestral" in scheduler.__name__:
        pytest.skip("each layer draws noise of its own")
    plain = latents_of(pipe, EVERYWHERE, layered_fraction=0)
    for method in (
        LayeredRendering(),
        LayeredRendering(fuse="once"),
        LayeredRendering(overlap="mean"),
    ):
        assert torch.allclose(latents_of(pipe, EVERYWHERE, method=method), plain, atol=1e-4)


def test_fused_once_by_hand(pipe, tiny) -> None:
    states = {}

    def keep(text):
        def note(pipeline, step, timestep, tensors):
            if step == 2:
                states[text] = tensors["latents"]
            return tensors

        return note

    prompts = [TWO.background, *(layer.prompt for layer in TWO.layers)]
    for text in prompts:
        tiny(
            text,
            num_inference_steps=5,
            guidance_scale=5.0,
            generator=seeded(),
            output_type="latent",
            callback_on_step_end=keep(text),
        )
    masks = TWO.masks(4, 4)
    fused = sum(mask * states[text] for mask, text in zip(masks, prompts, strict=True))
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append(tensors["latents"])
        return tensors

    out = latents_of(
        pipe, UNGUIDED, method=LayeredRendering(fuse="once"), callback_on_step_end=look
    )
    assert all(latents.shape == (1, 4, 4, 4) for latents in seen)
    assert torch.allclose(seen[2], fused, atol=1e-4)
    # From there on it is an ordinary picture of the caption.
    rest = lambda pipeline, step, timestep, tensors: {  # noqa: E731
        "latents": fused if step == 2 else tensors["latents"]
    }
    plain = tiny(
        TWO.caption,
        num_inference_steps=5,
        guidance_scale=5.0,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=rest,
    ).images
    assert torch.allclose(out, plain, atol=1e-4)


def test_a_callback_can_change_latents_before_the_layers_are_fused(pipe) -> None:
    zeros = lambda pipeline, step, timestep, tensors: {  # noqa: E731
        "latents": torch.zeros_like(tensors["latents"]) if step == 0 else tensors["latents"]
    }
    method = LayeredRendering(fuse="once")
    first = latents_of(pipe, TWO, method=method, callback_on_step_end=zeros)
    second = latents_of(pipe, TWO, method=method, callback_on_step_end=zeros, generator=seeded(1))
    assert torch.allclose(first, second, atol=1e-5), "what came before step 0 is forgotten"


def test_interrupted_before_the_layers_are_fused(pipe) -> None:
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = True
        return tensors

    out = latents_of(pipe, TWO, method=LayeredRendering(fuse="once"), callback_on_step_end=stop)
    assert out.shape == (1, 4, 4, 4)


def test_generators_of_their_own_with_layers_alone(pipe) -> None:
    options = {"method": LayeredRendering(fuse="once"), "eta": 1.0}
    both = latents_of(pipe, [TWO, ONE], generator=[seeded(1), seeded(2)], **options)
    second = latents_of(pipe, ONE, generator=[seeded(2)], **options)
    assert torch.allclose(both[1:], second, atol=1e-4)


PRESETS = [name for name, method in METHODS.items() if isinstance(method, LayeredRendering)]
"""What all methods have in common is tried in test_pipeline_common.py."""

COLLAGE = replace(METHODS["collage"], sketch_steps=3, layered_fraction=0.6)


@torch.no_grad()
def collage_by_hand(pipe, layout: Layout, steps: int = 5, begin: int = 3) -> Tensor:
    """In the pipeline's batches: rounded otherwise, a pixel of an outline may be another one."""

    def ask(x: Tensor, t: Tensor | int, texts: list[str]) -> Tensor:
        embeddings = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in texts]
        return pipe.unet(x, t, torch.cat(embeddings)).sample

    def score(x: Tensor, t: Tensor, texts: list[str]) -> Tensor:
        answers = ask(torch.cat([x, x]), t, [""] * len(texts) + texts)
        unconditional, conditional = answers.chunk(2)
        return unconditional + 5.0 * (conditional - unconditional)

    generator, scheduler, factor = seeded(), pipe.scheduler, pipe.vae.config.scaling_factor
    table = scheduler.alphas_cumprod
    x_T = torch.randn(1, 4, 4, 4, generator=generator)
    prompts = [f"{layer.prompt} {layout.background}" for layer in layout.layers]
    quick = DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="leading", clip_sample=False, set_alpha_to_one=False
    )
    quick.set_timesteps(COLLAGE.sketch_steps)
    z = x_T.expand(1 + len(prompts), -1, -1, -1)
    for t in quick.timesteps:
        z = quick.step(score(z, t, [layout.background, *prompts]), t, z).prev_sample
    relevance = 0
    for noise in torch.randn(2, 1, 4, 4, 4, generator=generator):
        x = table[400].sqrt() * z[1:] + (1 - table[400]).sqrt() * noise
        answers = ask(torch.cat([x, x]), 400, prompts + [layout.background] * len(prompts))
        own, other = answers.chunk(2)
        relevance = relevance + (own - other).square().sum(1).sqrt() / 2
    background, *pictures = [
        (pipe.vae.decode(one[None] / factor).sample[0] / 2 + 0.5).clamp(0, 1) for one in z
    ]
    canvas = background
    for picture, relevant, layer in zip(pictures, relevance, layout.layers, strict=True):
        mask = object_pixels(picture, background, relevant)
        canvas = pasted(canvas, picture, mask, layer.box, layer.cells(*canvas.shape[-2:]))
    z = pipe.vae.encode(2 * canvas[None] - 1).latent_dist.mean * factor
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps[begin]
    fresh = torch.randn(1, 4, 4, 4, generator=generator)
    x = table[t].sqrt() * z + (1 - table[t]).sqrt() * fresh
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(score(x, t, [layout.caption]), t, x).prev_sample
    return x


def test_a_collage_of_sketches_by_hand(pipe) -> None:
    out = latents_of(pipe, TWO, method=COLLAGE)
    assert torch.allclose(out, collage_by_hand(pipe, TWO), atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [(one, {}) for one in (*SCHEDULERS, UniPCMultistepScheduler)]
    + [(PNDMScheduler, {"skip_prk_steps": True})],
)
def test_a_collage_with_every_scheduler(pipe, scheduler, options) -> None:
    pipe.scheduler = own = scheduler.from_config(pipe.scheduler.config, **options)
    options = {"num_inference_steps": 25, "method": COLLAGE}
    seeds = lambda: [seeded(1), seeded(2)]  # noqa: E731
    whole = latents_of(pipe, [TWO, ONE], generator=seeds(), **options)
    assert pipe.scheduler is own
    assert whole.isfinite().all()
    second = latents_of(pipe, ONE, generator=[seeded(2)], chunk_size=1, **options)
    assert nearly_same(whole[1:], second, unlike=whole[:1])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    other = latents_of(pipe, [TWO, ONE], generator=seeds(), **options)
    assert 0.5 < float(whole.std() / other.std()) < 2, "in the latents' units, not Euler's"


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, UniPCMultistepScheduler])
def test_the_collage_is_what_the_picture_goes_on_from(pipe, monkeypatch, scheduler) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pictures = []
    for added in (0.0, 3.0):
        collages = lambda self, images, added=added: torch.full(  # noqa: E731
            (len(images), 4, 4, 4), added
        )
        monkeypatch.setattr(StableDiffusion, "encode", collages)
        pictures.append(latents_of(pipe, TWO, method=COLLAGE, num_inference_steps=25))
    assert (pictures[1] - pictures[0]).mean() > 1


def test_what_a_collage_costs(pipe, monkeypatch) -> None:
    recorded = Recorded(pipe, monkeypatch)
    latents_of(pipe, TWO, method=COLLAGE)
    # Sketches of the background and two layers, twice two prompts for each layer, the caption.
    assert [len(x) for x in recorded.inputs] == [6, 6, 6, 4, 4, 2, 2]


def test_sketches_have_fewer_steps_than_the_training(pipe) -> None:
    with pytest.raises(ValueError, match="sketch_steps is 1000, but should be at most 999"):
        latents_of(pipe, TWO, method=replace(COLLAGE, sketch_steps=1000))


@pytest.mark.parametrize(
    ("scheduler", "options", "fraction"),
    [
        (DDIMScheduler, {}, 0.68),
        (HeunDiscreteScheduler, {}, 0.68),
        (HeunDiscreteScheduler, {}, 1.0),
        (PNDMScheduler, {"skip_prk_steps": True}, 0.68),
        (PNDMScheduler, {}, 0.68),
    ],
)
def test_the_progress_bar_ends_where_it_should(
    pipe, monkeypatch, scheduler, options, fraction
) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    bars = []

    def bar(total: int) -> tqdm:
        bars.append(tqdm(total=total, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(pipe, "progress_bar", bar)
    method = replace(COLLAGE, layered_fraction=fraction)
    latents_of(pipe, TWO, method=method, num_inference_steps=25)
    assert bars[0].total == bars[0].n
    assert bars[0].n > 3 or fraction == 1


def test_interrupted_while_it_sketches(pipe, monkeypatch) -> None:
    recorded = Recorded(pipe, monkeypatch)
    hook = pipe.unet.register_forward_hook(lambda *_: setattr(pipe, "_interrupt", True))
    try:
        assert latents_of(pipe, TWO, method=COLLAGE).shape == (1, 4, 4, 4)
    finally:
        hook.remove()
    assert len(recorded.inputs) == 1


def test_a_collage_that_nothing_follows(pipe) -> None:
    steps = []
    note = lambda pipeline, step, timestep, tensors: steps.append(step) or tensors  # noqa: E731
    everything = latents_of(
        pipe, TWO, method=COLLAGE, layered_fraction=1.0, callback_on_step_end=note
    )
    assert everything.isfinite().all()
    assert not steps
    latents_of(pipe, TWO, method=COLLAGE, callback_on_step_end=note)
    assert steps == [0, 1], "sketches are not counted"
    assert pipe.num_timesteps == 2


def test_what_fills_the_canvas_is_not_looked_for(pipe, monkeypatch) -> None:
    looked_at = []

    def nowhere(picture, background, relevance):
        looked_at.append(picture)
        return torch.ones_like(picture[0], dtype=torch.bool)

    monkeypatch.setattr("lrd_helpers.methods.collage.object_pixels", nowhere)
    everywhere = Layer("a yellow star", (0, 0, 1, 1))
    latents_of(pipe, replace(TWO, layers=[everywhere, TWO.layers[0]]), method=COLLAGE)
    assert len(looked_at) == 1


@pytest.mark.parametrize(
    ("overlap", "seen"),
    [
        ("over", [0.5, 1.0, 1.0]),
        ("small_over_large", [0.5, 0.5, 1.0]),
        ("mean", [0.5, 0.75, 1.0]),
    ],
)
def test_who_is_in_front_in_a_collage(pipe, monkeypatch, overlap, seen) -> None:
    """Left the first layer alone, in the middle both, right the second one alone."""
    layers = [Layer("a red car", (0, 0, 0.5, 1)), Layer("a yellow star", (0.25, 0, 1, 1))]
    layout = replace(TWO, layers=layers)
    made = []
    values = torch.tensor([0.0, 0.5, 1.0])  # background, first, second
    decoded = values[:, None, None, None].expand(3, 3, 32, 32)
    rows = iter(2 * decoded - 1)
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **_: (next(rows)[None],))
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: made.append(x / 2 + 0.5) or encode(x))
    monkeypatch.setattr(
        "lrd_helpers.methods.collage.object_pixels",
        lambda picture, *rest: torch.ones_like(picture[0], dtype=torch.bool),
    )
    latents_of(pipe, layout, method=replace(COLLAGE, overlap=overlap))
    columns = made[0][0, 0, 16, [3, 12, 28]]
    assert columns.tolist() == pytest.approx(seen, abs=1e-6)


def with_opacity(layout: Layout, *opacities: float) -> Layout:
    pairs = zip(layout.layers, opacities, strict=True)
    return replace(layout, layers=[replace(layer, opacity=o) for layer, o in pairs])


@pytest.mark.parametrize(
    ("overlap", "opacities", "seen"),
    [  # of black, grey and white; the second layer fills the canvas
        ("over", (1, 0.5), [0.75, 0.5]),
        ("over", (0.5, 0.5), [0.625, 0.5]),
        ("over", (0.5, 1), [1.0, 1.0]),
        ("over", (0.5, 0), [0.25, 0.0]),
        ("small_over_large", (0.5, 0.25), [0.375, 0.25]),
        ("mean", (0.5, 1), [0.625, 1.0]),
    ],
)
def test_what_lies_behind_shines_through(pipe, monkeypatch, overlap, opacities, seen) -> None:
    """Left both layers, right the second one alone."""
    layers = [Layer("a red car", (0, 0, 0.5, 1)), Layer("a yellow star", (0, 0, 1, 1))]
    layout = with_opacity(replace(TWO, layers=layers), *opacities)
    made = []
    some = layout.masks(4, 4, overlap=overlap).flatten(1).any(1)  # what is hidden is not drawn
    values = zip((0.0, 0.5, 1.0), some, strict=True)
    asked = iter([value for value, drawn in values if drawn or not value])
    shown = lambda z, **_: (torch.full((1, 3, 32, 32), 2 * next(asked) - 1),)  # noqa: E731
    monkeypatch.setattr(pipe.vae, "decode", shown)
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: made.append(x / 2 + 0.5) or encode(x))
    monkeypatch.setattr(
        "lrd_helpers.methods.collage.object_pixels",
        lambda picture, *rest: torch.ones_like(picture[0], dtype=torch.bool),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer is hidden
        latents_of(pipe, layout, method=replace(COLLAGE, overlap=overlap))
    assert made[0][0, 0, 16, [3, 28]].tolist() == pytest.approx(seen, abs=1e-6)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_is_translucent_is_kept_while_the_rest_is_finished(
    pipe, monkeypatch, scheduler
) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    monkeypatch.setattr(
        "lrd_helpers.methods.collage.object_pixels",
        lambda picture, *rest: torch.ones_like(picture[0], dtype=torch.bool),
    )
    layers = [Layer("a red car", (0, 0, 1, 1)), Layer("a yellow star", (0, 0, 0.5, 1))]
    layout = replace(TWO, layers=layers)
    options = {"output_type": "latent", "output_layers": True, "num_inference_steps": 25}
    for opacities, columns in [((1, 0.5), [1, 1, 0, 0]), ((0.5, 1), [0, 0, 1, 1])]:
        given = with_opacity(layout, *opacities)
        out = pipe([given, layout], method=COLLAGE, generator=seeded(), **options)
        kept = [(x == y.collage).all(0) for x, y in zip(out.images, out.layers, strict=True)]
        # The rim of what is pasted, a pixel of 32, may take the next column with it.
        assert kept[0].all(0).float()[[0, 3]].tolist() == [columns[0], columns[3]]
        assert not kept[1].any(), "what hides everything is finished"


def test_with_an_opacity_of_0_a_layer_is_not_there(pipe, recwarn) -> None:
    options = {"method": COLLAGE}
    unseen = latents_of(pipe, with_opacity(TWO, 1, 0), **options)
    assert torch.equal(unseen, latents_of(pipe, replace(TWO, layers=TWO.layers[:1]), **options))
    everywhere = replace(TWO, layers=[replace(TWO.layers[0], box=(0, 0, 1, 1), opacity=0)])
    nothing = latents_of(pipe, with_opacity(TWO, 0, 0), **options)
    assert torch.equal(nothing, latents_of(pipe, everywhere, **options))
    assert not any("hidden" in str(warning.message) for warning in recwarn), "it was asked for"
    half = latents_of(pipe, with_opacity(TWO, 1, 0.5), **options)
    assert not torch.equal(half, unseen)


@pytest.mark.parametrize("overlap", ["over", "mean"])
def test_objects_are_pasted_onto_a_canvas(pipe, monkeypatch, overlap) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=seeded())
    canvas = [picture_of(one) for one in pixels]
    made = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: made.append(x / 2 + 0.5) or encode(x))
    options = {"method": replace(COLLAGE, overlap=overlap)}
    both = latents_of(pipe, [TWO, ONE], canvas=canvas, **options)
    for collage, image, layout in zip(torch.cat(made), canvas, [TWO, ONE], strict=True):
        # A rim of one pixel (of 32) goes with what is pasted.
        covered = sum(layer.cells(32, 32).float() for layer in layout.layers)
        outside = torch.nn.functional.max_pool2d(covered[None], 3, 1, 1)[0] == 0
        assert torch.allclose(collage[:, outside], pixels_of(image)[:, outside], atol=1e-6)
        assert not torch.allclose(collage[:, ~outside], pixels_of(image)[:, ~outside], atol=0.1)
    several = [seeded(1), seeded(2)]
    twice = latents_of(
        pipe, TWO, canvas=canvas[0], num_images_per_prompt=2, generator=several, **options
    )
    one = latents_of(pipe, TWO, canvas=canvas[0], generator=[seeded(2)], **options)
    assert nearly_same(twice[1:], one, unlike=both[1:])


def test_an_ip_adapter_sees_a_photo_upright() -> None:
    photo, seen = Image.effect_noise((6, 4), 90).convert("RGB"), []
    pipe = Mock(prepare_ip_adapter_image_embeds=lambda images, *_: seen.append(images))
    pipe.unet.config.encoder_hid_dim_type = "ip_image_proj"
    sides = Image.open(io.BytesIO(as_a_phone_saves(photo)))
    for given in (sides, [[sides, sides]]):
        LayeredRenderingPipeline._image_embeds(pipe, given, None)
    assert [seen[0].tobytes(), seen[1][0][1].tobytes()] == [photo.tobytes()] * 2


def test_a_canvas_is_upright_and_on_white() -> None:
    photo = Image.effect_noise((40, 32), 90).convert("RGB")
    sides = Image.open(io.BytesIO(as_a_phone_saves(photo)))
    clear = Image.new("RGBA", (40, 32))
    turned, white = checked_canvas([sides, clear], [TWO, ONE], (32, 40))
    assert turned.tobytes() == photo.tobytes()
    assert white == Image.new("RGB", (40, 32), "white")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvas": torch.zeros(3, 32, 32)}, "canvas has Tensor, but should have PIL images"),
        ({"canvas": "page.png"}, "canvas has str, but should have PIL images"),
        ({"canvas": [Image.new("RGB", (32, 32))] * 2}, "canvas has 2 pictures for 1 layouts"),
        ({"canvas": Image.new("RGB", (32, 40))}, "canvas is 32 × 40, but the picture will be 32"),
        (
            {"canvas": Image.new("RGB", (32, 32)), "method": LayeredRendering()},
            "nothing would be pasted",
        ),
        ({"canvas": Image.new("RGB", (32, 32)), "layered_fraction": 0}, "nothing would be pasted"),
    ],
)
def test_a_canvas_that_cannot_be_pasted_onto(pipe, monkeypatch, options, message) -> None:
    recorded = Recorded(pipe, monkeypatch)
    with pytest.raises(ValueError, match=message):
        latents_of(pipe, TWO, **{"method": COLLAGE} | options)
    assert not recorded.inputs


def test_start_and_end_of_a_layer(pipe, monkeypatch) -> None:
    recorded = Recorded(pipe, monkeypatch)
    car, star = UNGUIDED.layers
    layers = [replace(car, start=0.4), replace(star, end=0.8)]
    timed = Layout(TWO.caption, background=TWO.background, layers=layers)
    latents_of(pipe, timed)
    # background + star; + car from step 2 on; car ends with the layered steps, star a step later.
    assert [len(x) for x in recorded.inputs] == [3, 3, 4, 3, 2]
    late = Layout("a ball", background="at sea", layers=[replace(star, start=0.4, end=0.6)])
    # Without any layer at work the background alone is drawn, then the caption.
    early = latents_of(pipe, late, num_inference_steps=2, layered_fraction=1.0)
    alone = Layout("at sea", layers=[Layer("at sea", (0, 0, 1, 1), strength=0)])
    assert torch.allclose(early, latents_of(pipe, alone, num_inference_steps=2), atol=1e-5)


def test_the_background_can_have_the_objects_as_negative_prompt(pipe, monkeypatch) -> None:
    asked = []
    encode = pipe.encode_prompt
    monkeypatch.setattr(
        pipe, "encode_prompt", lambda text, *a, **k: asked.append(text) or encode(text, *a, **k)
    )
    latents_of(pipe, TWO, negative_prompt="a ball", method=LayeredRendering(negative_objects=True))
    assert "a ball and a red car and a yellow star" in asked
    assert "a ball" in asked, "the layers keep theirs"


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(pipe, name, scheduler) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    drawn = {}
    for options in ({}, {"chunk_size": 1}, {"guidance_scale": 1.0}):
        drawn[str(options)] = latents_of(pipe, TWO, height=64, width=48, method=name, **options)
    first, chunked, unguided = drawn.values()
    assert first.isfinite().all()
    assert nearly_same(first, chunked, unlike=unguided)


def test_presets_are_what_the_facts_say() -> None:
    paper, authors, unofficial = (METHODS[name] for name in ("paper", "authors", "unofficial"))
    assert METHODS["lrdiff"].fuse == "steps", "Algorithm 1"
    assert (paper.delta, paper.guide, paper.fuse) == ("dynamic", "steps", "steps")
    assert paper.inside == paper.outside
    assert (authors.inside, authors.outside, authors.fuse) == (0.05, 0.20, "once")
    assert round(authors.layered_fraction * 51) == 15
    assert (unofficial.guide, unofficial.attention, unofficial.weighted) == (
        "noise", "unofficial", True,
    )  # fmt: skip


def test_what_the_layers_did(pipe, monkeypatch) -> None:
    layout = Layout("a car", layers=[Layer("a car", (0, 0, 1, 1), strength=0)])
    clean = []
    step = pipe.scheduler.step

    def noting(*arguments, **options):
        out = step(*arguments, **options | {"return_dict": True})
        clean.append(out.pred_original_sample)
        return (out.prev_sample,)

    monkeypatch.setattr(pipe.scheduler, "step", noting)
    options = {"num_inference_steps": 5, "output_layers": True, "method": LayeredRendering()}
    (trace,) = pipe(layout, generator=seeded(), **options).layers
    assert trace.x0.shape == (3, 2, 4, 4, 4)
    assert trace.x0[:, 0].isnan().all(), "the background is nowhere to be seen"
    assert torch.allclose(trace.x0[:, 1], torch.cat(clean[:3]), atol=1e-4)
    monkeypatch.undo()
    (trace,) = pipe(TWO, inside=0.1, outside=0.3, **options).layers
    field = vision_guidance(
        constant_delta(pipe.vae, "red"), TWO.layers[0].cells(4, 4).float(), 0.1, 0.3
    )
    assert torch.allclose(trace.guidance[1], field)
    assert trace.guidance[0].abs().max() == 0
    assert trace.x0.isfinite().all()


def test_attention_can_be_captured_while_layers_are_drawn(pipe) -> None:
    expected = latents_of(pipe, TWO)
    prompts = [layer.prompt for layer in TWO.layers]
    for chunk_size in (None, 1):
        with capture_attention(pipe, prompts) as attention:
            assert torch.allclose(latents_of(pipe, TWO, chunk_size=chunk_size), expected, atol=1e-4)
        assert attention.pooled("car", prompt=0).shape == (1, 4, 4)
        assert attention.pooled("star", prompt=1).shape == (1, 4, 4)
    with capture_attention(pipe, TWO.caption, steps=True) as attention:
        assert torch.equal(latents_of(pipe, TWO), expected)
    assert len(attention.per_step("car")) == 2, "the caption is read in general denoising only"
    assert pipe.prompts_of_rows is pipe.pictures_of_rows is None
    # A learner's first layout: caption, background and layer have one text.
    first = Layout("a red car", layers=[Layer("a red car", (0, 0, 0.5, 1))])
    for method in PRESETS:
        with capture_attention(pipe, "a red car", steps=True) as attention:
            latents_of(pipe, first, method=method, height=64, width=64)
        assert attention.pooled("car").shape == (1, 8, 8), method


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
        method=LayeredRendering(),
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
    images, nsfw, masks, layers = pipe(
        TWO, num_inference_steps=2, generator=seeded(), output_type="pt", return_dict=False
    )
    out = pipe(TWO, num_inference_steps=2, generator=seeded(), output_type="pt")
    assert torch.equal(images, out.images)
    assert nsfw is None
    assert torch.equal(masks[0], TWO.masks(4, 4))


def test_size_and_latents(pipe) -> None:
    noise = torch.randn(1, 4, 5, 8, generator=seeded())
    options = {"height": 40, "width": 64, "num_inference_steps": 2, "method": LayeredRendering()}
    drawn = pipe(TWO, generator=seeded(), **options).images[0]
    assert drawn.size == (64, 40)
    given = pipe(TWO, latents=noise, **options).images[0]
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


WHOLE = Layout("a red car", layers=[Layer("a red car", (0, 0, 1, 1), strength=0)])


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (DDIMScheduler, {"guidance_rescale": 0.7}),
        (DDIMScheduler, {"eta": 0.5}),
        (EulerDiscreteScheduler, {"sigmas": [12.0, 3.0, 1.0, 0.2]}),
        (EulerDiscreteScheduler, {"timesteps": [900, 600, 200]}),
        (PNDMScheduler, {"negative_prompt": "a ball"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_option_means_what_it_means_in_stable_diffusion(
    pipe, tiny, scheduler, options
) -> None:
    for one in (pipe, tiny):
        one.scheduler = scheduler.from_config(one.scheduler.config)
    options = {"guidance_scale": 5.0, "num_inference_steps": 4, "output_type": "pt"} | options
    expected = tiny("a red car", generator=seeded(), **options).images
    assert torch.equal(pipe(WHOLE, generator=seeded(), **options).images, expected)


def test_distilled_guidance_is_passed_on(pipe, tiny) -> None:
    torch.manual_seed(0)
    unet = type(pipe.unet).from_config(pipe.unet.config, time_cond_proj_dim=8).eval()
    options = {"guidance_scale": 5.0, "num_inference_steps": 2, "output_type": "latent"}
    pipe.unet = tiny.unet = unet
    expected = tiny("a red car", generator=seeded(), **options).images
    assert torch.equal(latents_of(pipe, WHOLE, num_inference_steps=2), expected)


def test_prompts_as_embeddings(pipe) -> None:
    texts = ["", TWO.caption, TWO.background, *(layer.prompt for layer in TWO.layers)]
    embeddings = {text: pipe.encode_prompt(text, "cpu", 1, False)[0][0] for text in texts}
    expected = latents_of(pipe, TWO)
    without = LayeredRenderingPipeline(
        **pipe.components | {"text_encoder": None}, requires_safety_checker=False
    )
    without.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(without, TWO, prompt_embeds=embeddings), expected)
    changed = embeddings | {"a red car": embeddings["a yellow star"]}
    assert not torch.allclose(latents_of(pipe, TWO, prompt_embeds=changed), expected, atol=1e-4)
    del embeddings["a red car"]
    with pytest.raises(ValueError, match="lacks: layer 1 asks 'a red car'$"):
        latents_of(without, TWO, prompt_embeds=embeddings)
    with pytest.raises(ValueError, match=r"prompt_embeds\['a'\] has shape \(3, 5\), but should be"):
        latents_of(pipe, TWO, prompt_embeds={"a": torch.zeros(3, 5)})


@pytest.mark.parametrize("method", PRESETS)
def test_embeddings_are_of_what_is_asked_and_nothing_is_ignored_in_silence(
    pipe, method, monkeypatch
) -> None:
    options = {"height": 64, "width": 64, "method": method, "num_inference_steps": 6}
    asked: list[str] = []
    encode = pipe.encode_prompt
    with monkeypatch.context() as patched:
        patched.setattr(
            pipe,
            "encode_prompt",
            lambda text, *rest, **more: asked.append(text) or encode(text, *rest, **more),
        )
        expected = latents_of(pipe, TWO, **options)
    embeddings = {text: encode(text, "cpu", 1, False)[0][0] for text in asked}
    without = LayeredRenderingPipeline(
        **pipe.components | {"text_encoder": None}, requires_safety_checker=False
    )
    without.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(latents_of(without, TWO, prompt_embeds=embeddings, **options), expected)
    with monkeypatch.context() as patched:
        patched.setattr(without.unet, "forward", None)  # nothing is computed before the error
        for text in asked:
            fewer = {other: value for other, value in embeddings.items() if other != text}
            with pytest.raises(ValueError, match=f"prompt_embeds lacks: .*{re.escape(repr(text))}"):
                latents_of(without, TWO, prompt_embeds=fewer, **options)
    with pytest.warns(UserWarning, match="prompt_embeds has 'a rde car', but nobody asks for it"):
        latents_of(pipe, TWO, prompt_embeds={"a rde car": embeddings[asked[0]]}, **options)


@pytest.mark.parametrize("method", PRESETS)
def test_the_same_seed_is_the_same_picture(pipe, method) -> None:
    options = {"height": 64, "width": 64, "method": method}
    first = latents_of(pipe, TWO, **options)
    assert torch.equal(latents_of(pipe, TWO, **options), first)
    assert not torch.allclose(latents_of(pipe, TWO, generator=seeded(1), **options), first)


def test_a_pipeline_may_lack_optional_components(pipe, tmp_path: Path) -> None:
    assert pipe.components["safety_checker"] is pipe.components["feature_extractor"] is None
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    again = LayeredRenderingPipeline.from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        assert getattr(again, name) is None
    assert torch.equal(latents_of(again, TWO), latents_of(pipe, TWO))


def test_half_precision_variants_are_saved_and_loaded(pipe, tmp_path: Path) -> None:
    half = LayeredRenderingPipeline(
        **{k: copy.deepcopy(v) for k, v in pipe.components.items()}, requires_safety_checker=False
    ).to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    assert list(tmp_path.glob("unet/*.fp16.safetensors"))
    again = LayeredRenderingPipeline.from_pretrained(
        str(tmp_path), variant="fp16", torch_dtype=torch.float16
    )
    assert again.unet.dtype == again.vae.dtype == torch.float16
    back = again.to(torch.float32)
    back.set_progress_bar_config(disable=True)
    assert torch.allclose(latents_of(back, TWO), latents_of(pipe, TWO), atol=0.05)


def test_attention_slicing_changes_nothing(pipe) -> None:
    expected = latents_of(pipe, TWO)
    processors = dict(pipe.unet.attn_processors)
    pipe.enable_attention_slicing(slice_size=1)
    try:
        assert torch.allclose(latents_of(pipe, TWO), expected, atol=1e-4)
    finally:
        pipe.disable_attention_slicing()
        pipe.unet.set_attn_processor(processors)


def test_vae_tiling_draws_large_pictures(pipe) -> None:
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    expected = pipe(TWO, generator=seeded(), **options).images
    pipe.vae.enable_tiling()  # 4 × 4 latents a tile
    try:
        tiled = pipe(TWO, generator=seeded(), **options).images
    finally:
        pipe.vae.disable_tiling()
    assert tiled.shape == expected.shape
    assert (tiled - expected).abs().mean() < 0.2


def test_sequential_offload(pipe) -> None:
    """accelerate's hooks move weights in and out; here both places are the CPU."""
    expected = latents_of(pipe, TWO)
    own = LayeredRenderingPipeline(
        **{k: copy.deepcopy(v) for k, v in pipe.components.items()}, requires_safety_checker=False
    )
    own.set_progress_bar_config(disable=True)
    for part in (own.unet, own.vae, own.text_encoder):
        cpu_offload(part, execution_device=torch.device("cpu"))
    assert next(own.unet.parameters()).device.type == "meta", "the weights are away"
    for method in ("collage", "paper"):
        drawn = latents_of(own, TWO, method=method, height=64, width=64)
        assert torch.allclose(
            drawn, latents_of(pipe, TWO, method=method, height=64, width=64), atol=1e-4
        )
    assert torch.allclose(latents_of(own, TWO), expected, atol=1e-4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", ["collage", "paper", "authors"])
def test_a_callback_that_raises_leaves_the_model_as_it_was(pipe, method, monkeypatch) -> None:
    options = {"method": method, "height": 64, "width": 64}
    expected = latents_of(pipe, TWO, **options)
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]
    processors = dict(pipe.unet.attn_processors)

    def fail(pipeline, step, timestep, tensors):
        raise Interrupted

    with pytest.raises(Interrupted), capture_attention(pipe, "a red car"):
        latents_of(pipe, TWO, callback_on_step_end=fail, **options)
    assert pipe.prompts_of_rows is None
    assert freed == [True], "offloaded parts go back"
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]
    assert dict(pipe.unet.attn_processors) == processors
    assert torch.equal(latents_of(pipe, TWO, **options), expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_progress_bar_counts_the_steps(pipe, scheduler, capsys) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    latents_of(pipe, TWO, num_inference_steps=4)
    shown = capsys.readouterr().err
    assert "drawing" in shown
    count = len(pipe.scheduler.timesteps)
    assert f"{count}/{count}" in shown
    pipe.set_progress_bar_config(disable=True)
    latents_of(pipe, TWO)
    assert capsys.readouterr().err == ""


def test_pictures_that_are_not_square(pipe) -> None:
    for height, width in ((32, 64), (64, 40)):
        out = pipe(TWO, height=height, width=width, num_inference_steps=2, generator=seeded())
        assert out.images[0].size == (width, height)
        assert out.masks[0].shape == (3, height // 8, width // 8)


def test_masks_draw_like_the_boxes_they_are(pipe) -> None:
    pixels = [(layer, np.kron(layer.cells(4, 4).numpy(), np.ones((8, 8)))) for layer in TWO.layers]
    layers = [Layer(layer.prompt, mask=mask) for layer, mask in pixels]
    masked = Layout(TWO.caption, background=TWO.background, layers=layers)
    assert torch.equal(latents_of(pipe, masked), latents_of(pipe, TWO))


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("layouts", "options", "message"),
    [
        ("a red car", {}, "layouts is str, but should be a Layout or several"),
        ([], {}, "layouts is nothing, but should be a Layout or several"),
        (TWO, {"height": 36, "width": 33}, "height and width are 36 and 33, but should be "
         "divisible by 8; 32 and 32 would work"),
        (TWO, {"num_inference_steps": 0}, "num_inference_steps is 0, but should be a whole num"),
        (TWO, {"num_inference_steps": 1001}, "should be a whole number between 1 and 1000"),
        (TWO, {"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        (TWO, {"method": "papper"}, "method is 'papper', but should be one of collage, lrdiff"),
        (TWO, {"inside": float("nan")}, "inside is nan, but should be a finite number"),
        (TWO, {"method": "paper"}, "top_k is 20, but there are only 16 positions to choose from"),
        (TWO, {"method": LayeredRendering(delta="dynamic", top_k=300), "height": 256, "width": 256},
         "top_k is 300, on this canvas 1200, but there are only 1024 positions to choose from"),
        (replace(TWO, layers=[replace(TWO.layers[0], word="bike")]),
         {"method": LayeredRendering(delta="dynamic", top_k=1)},
         "layer 1 'a red car', word: 'bike' is not in the prompt \"a red car\"; its words are: a, "
         "red, car"),
        (replace(TWO, layers=[replace(TWO.layers[0], start=0.1)]),
         {"method": LayeredRendering(fuse="once")},
         "layer 1 'a red car' has a start or an end, but with fuse='once' every layer runs alone"),
        (TWO, {"method": LayeredRendering(delta="dynamic", top_k=1, attention=lambda name: False)},
         "matches none of the"),
        (TWO, {"layered_fraction": 1.5}, "layered_fraction is 1.5, but should be between 0 (no"),
        (TWO, {"layered_fraction": float("nan")}, "layered_fraction is nan"),
        (TWO, {"chunk_size": 0}, "chunk_size is 0, but should be a whole number"),
        (TWO, {"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 layouts"),
        (TWO, {"negative_prompt": 3}, "negative_prompt is 3, but should be text or a list"),
        (TWO, {"negative_prompt": "a" * 10**6}, "negative_prompt has 1000000 characters, but"),
        (TWO, {"latents": torch.zeros(2, 4, 4, 4)}, "latents has shape (2, 4, 4, 4), but should "
         "have (1, 4, 4, 4)"),
        (TWO, {"latents": torch.full((1, 4, 4, 4), torch.nan)}, "latents has values that are not"),
        (TWO, {"callback_on_step_end_tensor_inputs": ["noise"]}, "has noise, but only latents"),
        (TWO, {"prompt_embeds": torch.zeros(1, 16, 16)}, "prompt_embeds is a Tensor, but should"),
        (TWO, {"method": "boxdiff", "inside": 1.0}, "method 'boxdiff' has no choice 'inside'"),
        (TWO, {"method": "plain", "output_layers": True}, "output_layers: Plain predicts no"),
        (TWO, {"ip_adapter_image": Image.new("RGB", (8, 8))}, "no IP-Adapter is loaded"),
        (TWO, {"guidance_scale": float("nan")}, "guidance_scale is nan, but should be a"),
        (TWO, {"generator": [seeded(), seeded()]}, "generator is a list of 2, but there are 1 p"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_the_first_call(
    pipe, layouts, options, message, monkeypatch
) -> None:
    recorded = Recorded(pipe, monkeypatch)
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe(layouts, **options)
    assert recorded.inputs == []


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"delta": "static"}, "delta is 'static', but should be one of constant, contrast"),
        ({"guide": "never"}, "guide is 'never', but should be one of steps, noise, both"),
        ({"fuse": 1}, "fuse is 1, but should be one of steps, once, collage"),
        ({"overlap": "under"}, "overlap is 'under', but should be one of over, small_over_large"),
        ({"top_k": 0}, "top_k is 0, but should be ≥ 1"),
        ({"weighted": True}, "weighted needs attention maps: set delta to 'dynamic' or 'decoded'"),
    ],
)
def test_methods_that_are_none(choices: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayeredRendering(**choices)


def test_models_that_cannot_be_used(pipe) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        latents_of(pipe, TWO)
    pipe.scheduler = DDIMScheduler(prediction_type="flow")
    with pytest.raises(ValueError, match="DDIMScheduler's prediction_type is 'flow', but should"):
        latents_of(pipe, TWO)
    pipe.scheduler = DDIMScheduler()
    pipe.unet = UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="this UNet2DModel has no cross-attention, so no prompt"):
        latents_of(pipe, TWO)


@pytest.mark.filterwarnings("ignore:.*does not know the word")
def test_a_weight_in_a_prompt_is_a_warning(pipe) -> None:
    layout = Layout("a red car", layers=[Layer("(a red car:1)", (0, 0, 1, 1))])
    message = (
        "layer 1 '(a red car:1)': the model reads the weight of '(a red car:1)' as text; a layer's "
        "strength (Layer.strength) says how strongly it is guided"
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        pipe(layout, num_inference_steps=1)


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
