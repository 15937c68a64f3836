"""LayerDiffPipeline on a tiny random model: what is asked for, what stays, what comes out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

import lrd_helpers
from lrd_helpers import Layer, Layout
from lrd_helpers.layerdiff.alpha import encode_layers, grown
from lrd_helpers.layerdiff.pipeline import LayerDiffPipeline, given_pictures, recaptioned
from lrd_helpers.layerdiff.stack import LayerStack, StackLayer
from lrd_helpers.layerdiff.unet import LayeredUNet2DConditionModel
from lrd_helpers.methods.layerdiff import degraded, self_mask
from lrd_helpers.models import load_pipeline
from lrd_helpers.sampling.steps import Steps
from lrd_helpers.widgets import StackEditor

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

SIZE = 32
LAYOUT = Layout(
    "a red car and a yellow star at night",
    background="at night",
    layers=[
        Layer("a red car", (0.0, 0.5, 0.5, 1.0)),
        Layer("a yellow star", (0.5, 0.0, 1.0, 0.5), opacity=0.5),
    ],
)
WORDS = {"layers": ["a red car", "a yellow star"], "background": "at night"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def _model(_tiny: StableDiffusionPipeline) -> LayerDiffPipeline:
    unet = LayeredUNet2DConditionModel.grown(_tiny.unet)
    with torch.no_grad():
        for number, weight in enumerate(unet.parameters()):
            if not weight.any():  # as training would make them
                weight.copy_(0.2 * torch.randn(weight.shape, generator=seeded(number)))
    vae = grown(_tiny.vae)
    with torch.no_grad():
        vae.decoder.conv_out.weight[3] = torch.randn(
            vae.decoder.conv_out.weight[3].shape, generator=seeded()
        )
    return LayerDiffPipeline(
        vae.eval(), _tiny.text_encoder, _tiny.tokenizer, unet.eval(), _tiny.scheduler
    )


@pytest.fixture
def layers(_model: LayerDiffPipeline) -> LayerDiffPipeline:
    config = DDIMScheduler.from_config(_model.scheduler.config)
    pipe = LayerDiffPipeline(**_model.components | {"scheduler": config})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def stack() -> LayerStack:
    pixels = torch.rand(3, SIZE, SIZE, 4, generator=seeded(3))
    pixels[..., 3] = pixels[..., 3].round()
    images = [Image.fromarray((255 * each).byte().numpy(), "RGBA") for each in pixels]
    return LayerStack(
        images[0].convert("RGB"),
        (StackLayer("a red car", images[1]), StackLayer("a yellow star", images[2], opacity=0.5)),
        caption="a red car and a yellow star at night",
        background_prompt="at night",
    )


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


# ------------------------------------------------------------------ what comes out


def test_a_caption_with_layers_is_a_stack(layers):
    kept = layers("a red car and a yellow star at night", **WORDS, num_inference_steps=2)
    (stack,) = kept.stacks
    assert [layer.prompt for layer in stack.layers] == WORDS["layers"]
    assert stack.caption == "a red car and a yellow star at night"
    assert stack.background_prompt == "at night"
    assert {stack.background.mode, stack.composite.mode} == {"RGB"}
    assert all(layer.image.mode == "RGBA" for layer in stack.layers)
    assert stack.size == (SIZE, SIZE)


@pytest.mark.parametrize("output_type", ["pt", "np", "latent"])
def test_tensors_hold_background_layers_and_composite(layers, output_type):
    (kept,) = layers(
        "a car", **WORDS, num_inference_steps=1, output_type=output_type, return_dict=False
    )
    shapes = {"pt": (4, 4, SIZE, SIZE), "np": (4, SIZE, SIZE, 4), "latent": (4, 4, 4, 4)}
    assert tuple(kept[0].shape) == shapes[output_type]


def test_layers_that_nobody_named_are_dropped_where_they_are_empty(layers, monkeypatch):
    def decoded(_, latents):
        rgba = torch.ones(len(latents), 4, SIZE, SIZE)
        rgba[1::2, 3] = 0.0
        rgba[2, 3] = 0.0
        rgba[2, 3, :4] = 1.0
        return rgba

    monkeypatch.setattr("lrd_helpers.layerdiff.pipeline.decode_layers", decoded)
    (stack,) = layers("a red car", num_inference_steps=1).stacks
    assert [layer.box for layer in stack.layers] == [(0, 0, 1, 0.125), (0, 0, 1, 1)]
    named = layers("a red car", layers=["a car"], num_inference_steps=1).stacks[0]
    assert len(named.layers) == 1  # what was asked for is there, also where it is empty


def test_a_seed_draws_the_same_stack_again_alone_and_in_a_batch(layers):
    alone = [
        layers(prompt, generator=seeded(n), num_inference_steps=2, output_type="pt").stacks[0]
        for n, prompt in enumerate(("a red car", LAYOUT))
    ]
    together = layers(
        ["a red car", LAYOUT],
        generator=[seeded(0), seeded(1)],
        num_inference_steps=2,
        output_type="pt",
    ).stacks
    for one, other in zip(alone, together, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-4)


def test_noise_of_the_scheduler_does_not_depend_on_the_neighbours(layers):
    asked = {"num_inference_steps": 3, "eta": 1.0, "output_type": "latent"}
    alone = layers("a red car", layers=["a car"], generator=seeded(1), **asked).stacks[0]
    generators = [seeded(0), seeded(1)]
    together = layers(LAYOUT, generator=seeded(0), **asked).stacks
    layouts = [LAYOUT, Layout("a red car", layers=[Layer("a car", (0, 0, 1, 1), strength=0)])]
    both = layers(layouts, generator=generators, **asked).stacks
    for one, other in zip([*together, alone], both, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_layers_negative_prompt_comes_before_the_usual(layers):
    first = replace(LAYOUT.layers[0], negative_prompt="a blue boat")
    wanted = [layers._wanted(replace(LAYOUT, layers=[first, LAYOUT.layers[1]]), "auto", "", {})]
    run = layers._begin(wanted, Steps(layers.scheduler, 1, generator=seeded()), "a ball", 0.0, 0.0)
    negatives = [["a ball", "a blue boat", "a ball", "a ball"]]
    assert torch.equal(run.text[0], layers._read(negatives))


def test_words_that_are_not_known_or_read_are_a_warning(layers):
    long = "a red car " * 6
    with pytest.warns(UserWarning, match="does not know the word") as remarks:
        layers(long, layers=["a red zebra", "(a car:1.2)"], num_inference_steps=1)
    texts = [str(remark.message) for remark in remarks if remark.category is UserWarning]
    assert "caption: the model reads only 16 tokens, and not 'car a red car'" in texts
    assert "layer 1 'a red zebra': the model does not know the word 'zebra'" in texts
    assert any("reads the weight of '(a car:1.2)' as text" in text for text in texts)


def test_several_stacks_of_one_prompt_differ(layers):
    one, other = layers(
        "a red car", num_images_per_prompt=2, generator=seeded(), num_inference_steps=1
    ).stacks
    assert not same(one.composite, other.composite)


@pytest.mark.parametrize("guide_from", ["alone", "together"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_guidance_is_the_formula(layers, kind, guide_from):
    """One step by hand: s(∅) + γ (s(y) − s(∅)), and DDIM's step of it."""
    config = dict(layers.scheduler.config) | {"prediction_type": kind}
    layers.scheduler = DDIMScheduler.from_config(config)
    noise = torch.randn(4, 4, 4, 4, generator=seeded())
    (made,) = layers(
        "a red car and a yellow star at night",
        **WORDS,
        generator=seeded(),
        num_inference_steps=1,
        guidance_scale=3.0,
        guide_from=guide_from,
        output_type="latent",
    ).stacks
    t = layers.scheduler.timesteps[0]
    texts = ["at night", "a red car", "a yellow star", "a red car and a yellow star at night"]
    scores = []
    for prompts in ([""] * 4, texts):
        tokens = layers.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        text = layers.text_encoder(tokens)[0][None]
        if guide_from == "alone" and prompts[0] == "":
            stacks, identities = noise[:, None], torch.tensor([0, 1, 2, 5])[:, None]
            scores.append(
                layers.unet(stacks, t, text[0][:, None], text[0], identities).sample[:, 0]
            )
        else:
            scores.append(layers.unet(noise[None], t, text, text[:, -1]).sample[0])
    guided = scores[0] + 3 * (scores[1] - scores[0])
    wanted = layers.scheduler.step(guided, t, noise).prev_sample
    assert torch.allclose(made, wanted, atol=1e-5)


def test_the_field_of_a_layout_is_painted_and_seen(layers):
    """With ε the U-Net is asked at x + ξ; without strength nothing is added."""
    asked = {"num_inference_steps": 2, "output_type": "latent"}
    plain = layers(LAYOUT.caption, **WORDS, generator=seeded(), **asked).stacks[0]
    off = layers(LAYOUT, inside=0, outside=0, generator=seeded(), **asked).stacks[0]
    on = layers(LAYOUT, generator=seeded(), **asked).stacks[0]
    assert torch.equal(plain, off)
    assert not torch.allclose(plain, on)


def test_self_mask_guidance_blurs_things_only(layers):
    wanted = [layers._wanted("a red car", ["a car"], "", {})]
    run = layers._begin(wanted, Steps(layers.scheduler, 4, generator=seeded()), "", 0, 0)
    run.empty = torch.zeros(4, 4, 4)
    x0 = torch.zeros(1, 3, 4, 4, 4)
    x0[:, :, :, 1, 2] = 9.0
    t = run.steps.timesteps[1]
    alpha, sigma = run.steps.coefficients(t)
    noise = torch.randn(x0.shape, generator=seeded())
    seen = alpha * x0 + sigma * noise
    assert self_mask(x0, run.empty)[0, 1, 0].nonzero().tolist() == [[1, 2]]
    changed = degraded(run, seen, noise, t) - seen
    assert not changed[:, [0, 2]].any()
    assert changed[0, 1].abs().sum(0).nonzero().tolist() == [[1, 2]]
    # the mean of 4 × 4 cells around it (the square is cut off at the canvas), one of them 9
    assert torch.allclose(changed[0, 1, :, 1, 2], torch.tensor(alpha * (9 / 16 - 9)), atol=1e-5)
    on = layers("a car", self_mask_scale=1.0, generator=seeded(), num_inference_steps=2)
    off = layers("a car", generator=seeded(), num_inference_steps=2)
    assert not same(on.stacks[0].composite, off.stacks[0].composite)


def test_euler_draws_in_its_own_units(layers):
    layers.scheduler = EulerDiscreteScheduler.from_config(layers.scheduler.config)
    stack = layers(LAYOUT, num_inference_steps=2, generator=seeded()).stacks[0]
    assert len(stack.layers) == 2


# ------------------------------------------------------------------ what stays


def test_what_is_given_comes_back_pixel_for_pixel(layers, stack):
    fixed = {"background": stack.background, 1: stack.layers[1].image}
    made = layers("a car", **WORDS, fixed=fixed, num_inference_steps=2).stacks[0]
    assert same(made.background, stack.background)
    assert same(made.layers[1].image, stack.layers[1].image)
    assert not same(made.layers[0].image, stack.layers[0].image)


def test_given_pictures_may_be_arrays_or_of_16_bits(layers):
    grey = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    wanted = layers._wanted("", ["a car"], "", {0: Image.fromarray(grey), "composite": grey})
    for picture in given_pictures(wanted).values():
        assert torch.allclose(picture[0, 0], torch.from_numpy(grey / 65535).float(), atol=1 / 255)
        assert picture[0, 3].min() == 1


@pytest.fixture
def seen(layers, monkeypatch):
    """The samples and times that the U-Net is called with."""
    calls = []
    forward = layers.unet.forward

    def watched(sample, timestep, *rest):
        calls.append((sample, timestep))
        return forward(sample, timestep, *rest)

    monkeypatch.setattr(layers.unet, "forward", watched)
    return calls


def test_given_slots_are_clean_and_at_time_0(layers, stack, seen):
    together = {"guide_from": "together", "num_inference_steps": 2}
    layers("a car", **WORDS, image=stack.composite or stack.flatten(), **together)
    (slots,) = [given_pictures(layers._wanted("", "auto", "", {"composite": stack.flatten()}))]
    assert list(slots) == [5]
    clean = encode_layers(layers.vae, slots[5])
    for sample, times in seen:
        assert times[:, -1].tolist() == [0, 0]
        assert times[:, :-1].min() > 0
        assert torch.allclose(sample[:, -1], clean.expand(2, -1, -1, -1), atol=1e-5)


def test_the_example_in_the_readme_draws(layers, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    [example] = [block for block in blocks if "storybook-layers" in block]
    monkeypatch.setattr(lrd_helpers, "load_pipeline", lambda name: layers, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="does not know"):
        exec(example, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "boat.png",
        "house.png",
        "moved.png",
        "scene.psd",
    ]
    assert Image.open("house.png").mode == "RGBA"


def test_alone_nobody_hears_what_is_given(layers, stack, seen):
    layers("a car", **WORDS, image=stack.flatten(), num_inference_steps=1)
    (together, times), (alone, times_alone) = seen
    assert torch.equal(alone[:, 0], together[0])  # a stack of one slot for each slot
    assert torch.equal(times_alone[:, 0], times[0])


def test_a_picture_is_taken_apart(layers, stack):
    picture = stack.flatten()
    made = layers.decompose(picture, ["a red car"], num_inference_steps=1)
    assert same(made.composite, picture)
    assert len(made.layers) == 1


def test_one_layer_is_drawn_anew_and_nothing_else(layers, stack):
    moved = stack.moved("a yellow star", (0.25, 0.0))
    made = layers.redraw(moved, "a red car", "a blue boat", num_inference_steps=2)
    assert made.layers[0].prompt == "a blue boat"
    assert made.caption == "a blue boat and a yellow star at night"
    assert not same(made.layers[0].image, stack.layers[0].image)
    assert made.layers[1] is moved.layers[1]
    assert same(made.background, stack.background)


@pytest.mark.parametrize(
    ("caption", "prompts", "number", "wanted"),
    [
        ("a red carpet and a red car", ["a red car"], 0, "a red carpet and a blue boat"),
        ("a car and a car", ["a car", "a car"], 1, "a car and a blue boat"),
        ("a car and a car", ["a car", "a car"], 0, "a blue boat and a car"),
        ("two cars", ["a car"], 0, "two cars"),
        ("two cars", [""], 0, "two cars"),
    ],
)
def test_the_caption_follows_the_layer(stack, caption, prompts, number, wanted):
    layers = [StackLayer(prompt, stack.layers[0].image) for prompt in prompts]
    assert (
        recaptioned(replace(stack, caption=caption, layers=layers), number, "a blue boat") == wanted
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output_type": "pt"}, ValueError, "output_type: one LayerStack is drawn here"),
        ({"num_images_per_prompt": 2}, ValueError, "one LayerStack is drawn here"),
        ({"prompt": 3}, ValueError, "prompt is 3, but should be text"),
        ({"stack": Image.new("RGB", (32, 32))}, TypeError, "should be a LayerStack"),
    ],
)
def test_what_cannot_be_redrawn_is_refused(layers, stack, options, error, message):
    with pytest.raises(error, match=message):
        layers.redraw(**{"stack": stack, "layer": 0} | options)


def test_layers_that_nobody_named_stay_beside_one_that_is_drawn_anew(layers, stack):
    nameless = stack.changed(1, prompt="")
    made = layers.redraw(nameless, 0, "a blue boat", num_inference_steps=1)
    assert made.layers[1] is nameless.layers[1]
    with pytest.raises(ValueError, match="layer 2 has an empty prompt"):
        layers.redraw(nameless, 1)


def test_hidden_layers_are_not_seen_and_stay(layers, stack):
    hidden = stack.changed(1, hidden=True)
    made = layers.redraw(hidden, 0, num_inference_steps=2, generator=seeded())
    without = layers.redraw(stack.without(1), 0, num_inference_steps=2, generator=seeded())
    assert same(made.layers[0].image, without.layers[0].image)
    assert made.layers[1] is hidden.layers[1]


def test_one_layer_more(layers, stack):
    made = layers.add_layer(stack, "a blue ball", at=1, num_inference_steps=1)
    assert [layer.prompt for layer in made.layers] == ["a red car", "a blue ball", "a yellow star"]
    assert made.caption.startswith("a blue ball and")
    assert made.layers[0] is stack.layers[0]


def test_harmonising_goes_from_the_flattened_picture_to_a_new_one(layers, stack):
    kept = layers.harmonise(stack, 0.0)
    assert same(kept, stack.flatten())
    made = [layers.harmonise(stack, s, generator=seeded(), num_inference_steps=4) for s in (0.5, 1)]
    assert made[0].size == stack.size
    assert not same(*made)
    assert not same(made[0], kept)


# ------------------------------------------------------------------ as a pipeline of diffusers


def test_the_editor_of_layers_draws_with_it(layers, stack):
    editor, shares = StackEditor(stack, layers, seed=3), []
    editor.observe(lambda change: shares.append(change["new"].get("share")), "_job")
    editor.redraw("a yellow star")
    editor.wait()
    made = layers.redraw(stack, 1, generator=seeded(3))
    assert same(editor.stack.layers[1].image, made.layers[1].image)
    assert same(editor.stack.composite, made.composite)
    assert same(editor.stack.layers[0].image, stack.layers[0].image)
    assert shares[1:-1] == pytest.approx([step / 15 for step in range(1, 16)])
    editor.harmonise()
    editor.wait()
    assert same(editor.harmonised, layers.harmonise(made, generator=seeded(4)))


def test_a_saved_pipeline_loads_with_load_pipeline(layers, tmp_path):
    layers.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, "cpu")
    assert isinstance(again, LayerDiffPipeline)
    pictures = [
        each("a red car", num_inference_steps=1, generator=seeded(), output_type="pt").stacks[0]
        for each in (layers, again)
    ]
    assert torch.equal(*pictures)


def test_a_callback_sees_changes_and_stops(layers):
    calls = []

    def callback(pipe, i, t, tensors):
        calls.append(tensors["latents"].shape)
        pipe._interrupt = i == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    kept = layers(
        "a car", num_inference_steps=4, callback_on_step_end=callback, output_type="latent"
    ).stacks[0]
    assert calls == [(1, 6, 4, 4, 4)] * 2
    assert not kept.any()


# ------------------------------------------------------------------ what cannot work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["a car"] * 5}, "5 layers: the model was trained for up to 4"),
        ({"layers": ["a car", " "]}, "layer 2 has an empty prompt"),
        ({"layers": "a car"}, "should be a list of prompts or 'auto'"),
        ({"prompt": LAYOUT, "layers": ["a car"]}, "leave out layers"),
        ({"prompt": LAYOUT, "background": "at night"}, "leave out background"),
        ({"prompt": 3}, "should be a text or a Layout"),
        ({"prompt": []}, "prompt is empty"),
        ({"image": Image.new("RGB", (8, 8))}, "composite is 8 × 8, but should be 32 × 32"),
        ({"image": "star.png"}, "but should be an image of PIL"),
        ({"fixed": {7: Image.new("RGB", (32, 32))}}, "fixed has a picture for 7"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"output_type": "gif"}, "output_type is 'gif'"),
        ({"generator": [torch.Generator()] * 2}, "generator is a list of 2, but there are 1"),
        ({"generator": 0}, "generator is 0, but should be a torch.Generator"),
        ({"num_inference_steps": 1001}, "should be a whole number between 1 and 1000"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"guide_from": "others"}, "guide_from is 'others', but should be 'alone' or 'together'"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan, but should be a finite number"),
        ({"self_mask_scale": "1"}, "self_mask_scale is '1', but should be a finite number"),
        ({"eta": float("nan")}, "eta is nan, but should be a finite number"),
        ({"prompt": LAYOUT, "inside": float("inf")}, "inside is inf"),
        ({"negative_prompt": ["dog"]}, "negative_prompt is .*, but should be text"),
        ({"background": None}, "background is None, but should be text"),
        ({"layers": None}, "layers is None, but should be a list of prompts"),
        ({"layers": {"a car"}}, "should be a list of prompts or 'auto'"),
        ({"fixed": [Image.new("RGB", (32, 32))]}, "but should be a dict of pictures"),
        ({"fixed": {True: Image.new("RGB", (32, 32))}}, "fixed has a picture for True"),
        (
            {"fixed": {0: np.zeros((32, 32, 4))}},
            "layer 0 is array.*, but should be an image of PIL",
        ),
        ({"image": np.full((32, 32, 3), 200.0)}, "composite: the picture has values from 200"),
        (
            {"image": Image.new("RGB", (32, 32)), "fixed": {"composite": Image.new("L", (32, 32))}},
            "image is the composite, and fixed has another",
        ),
        ({"callback_on_step_end": SDCFGCutoffCallback()}, "callbacks of diffusers change prompts"),
        (
            {"prompt": Layout("a car", layers=[Layer("a car", (0, 0, 1, 1), start=0.5)])},
            "leave out start and end",
        ),
    ],
)
def test_what_cannot_work_is_said_before_the_first_call(layers, arguments, message, monkeypatch):
    monkeypatch.setattr(layers.unet, "forward", None)
    with pytest.raises(ValueError, match=message) as error:
        layers(**{"prompt": "a car"} | arguments)
    assert "\n" not in str(error.value)


def test_numbers_that_are_not_finite_are_refused(layers):
    def callback(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * float("nan")}

    with pytest.raises(ValueError, match="not finite"):
        layers("a car", num_inference_steps=2, callback_on_step_end=callback)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"latents": torch.zeros(1)},
            "returned latents .1,., but should return a tensor of the sh",
        ),
        ({"latents": None}, "returned latents None"),
        ([1], "returned .1,., but should return None or a dict"),
    ],
)
def test_what_a_callback_returns_is_looked_at(layers, changed, message):
    with pytest.raises(ValueError, match=message):
        layers("a car", num_inference_steps=1, callback_on_step_end=lambda *_: changed)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "0.5"])
def test_harmonising_has_a_strength_from_0_to_1(layers, stack, strength):
    with pytest.raises(ValueError, match="should be 0 to 1|should be a finite number"):
        layers.harmonise(stack, strength)
