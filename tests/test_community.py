"""examples/community: the one file for diffusers draws what the package draws."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler

from lrd_helpers import METHODS, Layer, Layout, load_pipeline
from lrd_helpers.layout import LayoutError
from lrd_helpers.methods import named
from lrd_helpers.pipeline import LayeredRenderingPipeline

FOLDER = Path(__file__).parents[1] / "examples" / "community"
FILE = FOLDER / "layered_rendering_diffusion.py"
CAPTION, BACKGROUND = "a red car and a yellow star at night", "at night"
CAR, STAR = (0.05, 0.5, 0.5, 0.95), (0.6, 0.05, 0.95, 0.4)
PAIRS = [("a red car", CAR), ("a yellow star", STAR)]


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"community_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def community() -> ModuleType:
    return module_of(FILE)


@pytest.fixture
def theirs(community, tiny):
    """The community pipeline with the tiny random models."""
    kind = community.LayeredRenderingDiffusionPipeline
    pipe = kind(**tiny.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_the_file_is_the_one_that_the_script_makes() -> None:
    made = module_of(FOLDER / "generate.py").generated()
    assert FILE.read_text(encoding="utf-8") == made, "run `make community`"


def test_it_needs_only_what_users_of_diffusers_have() -> None:
    tree = ast.parse(FILE.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert roots <= {"torch", "diffusers", "transformers", "numpy", "PIL"}


@pytest.mark.parametrize("method", ["lrdiff", "paper"])
def test_the_methods_are_those_of_the_package(community, method) -> None:
    assert community.METHODS.keys() == {"lrdiff", "paper"}
    assert vars(community.METHODS[method]) == vars(METHODS[method])


def test_diffusers_loads_it_and_it_draws_the_packages_picture(
    storybook_folder, tmp_path, monkeypatch
) -> None:
    """To the bit: the same sums in the same order."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    theirs = DiffusionPipeline.from_pretrained(
        str(storybook_folder),
        custom_pipeline=str(FILE),
        trust_remote_code=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    assert type(theirs).__name__ == "LayeredRenderingDiffusionPipeline"
    assert json.loads(theirs.to_json_string())["_class_name"] == "StableDiffusionPipeline"
    ours = load_pipeline("storybook", "cpu")
    layout = Layout(CAPTION, background=BACKGROUND, layers=[Layer(*pair) for pair in PAIRS])
    for method in ("lrdiff", "paper"):
        options = {"method": method, "num_inference_steps": 5, "output_type": "np"}
        expected = ours(layout, generator=seeded(), **options).images
        drawn = theirs(CAPTION, PAIRS, BACKGROUND, generator=seeded(), **options).images
        assert numpy.array_equal(drawn, expected)
        assert drawn.std() > 0.1, "it is no flat picture"


DISC = (numpy.arange(20)[:, None] - 9.5) ** 2 + (numpy.arange(30) - 14.5) ** 2 < 60


@pytest.mark.parametrize(
    ("layers", "changes", "options", "scheduler"),
    [
        (
            [
                {"prompt": "a red car", "mask": DISC, "negative_prompt": "a ball", "strength": 2.0},
                {"prompt": "a star on grass", "box": STAR, "colour": "blue", "end": 0.9},
            ],
            {"delta": "constant", "overlap": "mean", "negative_objects": True},
            {"negative_prompt": "a boat", "num_images_per_prompt": 2, "height": 40, "width": 24},
            EulerDiscreteScheduler,
        ),
        (
            [
                {"prompt": "a blue boat at sea", "box": CAR},
                {"prompt": "a yellow star", "box": (0.3, 0.3, 0.9, 0.8), "word": "yellow star"},
            ],
            {"delta": "decoded", "attention": "all", "top_k": 3, "weighted": True},
            {"guidance_scale": 1.0, "guidance_rescale": 0.5},
            DDIMScheduler,
        ),
        (
            [{"prompt": "a red car", "box": (0, 0, 1, 1)}, {"prompt": "a ball", "box": STAR}],
            {"background_in_prompts": True, "guide": "noise", "early_repeats": 2, "top_k": 9},
            {"guidance_rescale": 0.5, "eta": 0.5},
            DDIMScheduler,
        ),
    ],
)
@pytest.mark.parametrize("method", ["lrdiff", "paper"])
def test_other_choices_and_arguments_draw_the_same(
    tiny, theirs, layers, changes, options, scheduler, method
) -> None:
    kind = "v_prediction" if method == "paper" else "epsilon"
    noise = theirs.scheduler = scheduler.from_config(tiny.scheduler.config, prediction_type=kind)
    ours = LayeredRenderingPipeline(
        **{**tiny.components, "scheduler": noise}, requires_safety_checker=False
    )
    ours.set_progress_bar_config(disable=True)
    options = options | {"num_inference_steps": 5, "output_type": "latent"}
    layout = Layout(CAPTION, background=BACKGROUND, layers=[Layer(**each) for each in layers])
    expected = ours(layout, method=named(method, **changes), generator=seeded(), **options).images
    drawn = theirs(
        CAPTION, layers, BACKGROUND, method=method, choices=changes, generator=seeded(), **options
    ).images
    assert torch.equal(drawn, expected)


def test_a_callback_changes_latents_and_guidance_and_interrupts(theirs, community) -> None:
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append((step, float(t), pipe.guidance_scale))
        pipe._guidance_scale, pipe._interrupt = 2.0, step == 2
        return {"latents": torch.zeros_like(tensors["latents"])}

    options = {"num_inference_steps": 5, "output_type": "latent", "return_dict": False}
    images, nsfw = theirs(CAPTION, PAIRS, callback_on_step_end=callback, **options)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [scale for _, _, scale in seen] == [5.0, 2.0, 2.0]
    assert not images.any()
    assert nsfw is None
    assert theirs.num_timesteps == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [("a red car", (0.5, 0.1, 0.5, 0.9))]}, "layer 1 'a red car', box .* no area"),
        ({"layers": [{"prompt": "a car", "boxes": CAR}]}, "'boxes' is no known .* mean box"),
        ({"layers": [("a car", CAR, 1)]}, "layer 1 is .* should have prompt, box"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [{"prompt": "a car", "mask": DISC.astype(float)}]}, "mask is of shape .20, 30"),
        ({"layers": [{"prompt": "a car", "mask": DISC & False}]}, "mask is empty"),
        ({"layers": [{"prompt": "a car", "box": CAR, "opacity": 0.5}]}, "layer 1 .* an opacity"),
        ({"prompt": " "}, "^prompt is empty"),
        ({"method": "collage"}, "'collage', but should be one of lrdiff, paper"),
        ({"choices": {"lambda": 1}}, "no choice 'lambda'; there are delta, inside"),
        ({"choices": {"fuse": "once"}}, "fuse is 'once'"),
        ({"choices": {"inside": float("nan")}}, "inside is nan"),
        ({"method": "paper", "choices": {"top_k": 17}}, "top_k is 17, but .* only 16 positions"),
        (
            {"layers": [{"prompt": "a car", "box": CAR, "word": "ball"}]}
            | {"method": "paper", "choices": {"top_k": 1}},
            "layer 1 'a car', word: 'ball' is not",
        ),
        ({"height": 33}, "height and width are 33 and 32"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"guidance_scale": None}, "guidance_scale is None"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"latents": torch.zeros(1, 4, 4, 5)}, r"latents has shape \(1, 4, 4, 5\)"),
        ({"generator": [seeded(), seeded()]}, "generator is a list of 2"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds"),
    ],
)
def test_errors_are_one_sentence_before_the_first_unet_call(
    theirs, monkeypatch, arguments, message
) -> None:
    monkeypatch.setattr(theirs.unet, "forward", None)
    with pytest.raises(ValueError, match=message) as error:
        theirs(**{"prompt": CAPTION, "layers": PAIRS} | arguments)
    assert len(str(error.value)) <= 300
    assert "\n" not in str(error.value)


def test_a_layer_that_is_hidden_is_warned_of(theirs) -> None:
    hidden = [("a red car", CAR), ("a ball", (0, 0, 1, 1))]
    with pytest.warns(UserWarning, match="'a red car' is completely hidden by layer 2 'a ball'"):
        theirs(CAPTION, hidden, num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "9 channels .* inpainting"),
        ({"addition_embed_type": "text_time"}, "XL"),
        ({"time_cond_proj_dim": 8}, "LCM"),
    ],
)
def test_models_that_want_more_than_a_prompt_are_refused(community, tiny, changes, message) -> None:
    from types import SimpleNamespace

    unet = SimpleNamespace(config=SimpleNamespace(**dict(tiny.unet.config) | changes))
    with pytest.raises(ValueError, match=message):
        community.check_unet(unet)


@pytest.mark.parametrize(
    ("prompt", "word", "colour"),
    [
        ("a red car on grass", "car", "red"),
        ("a photo of a blue cat", "cat", "blue"),
        ("A Yellow star, best quality", "star", "yellow"),
        ("a cat on a red sofa", "cat", None),
    ],
)
def test_words_of_ordinary_prompts_are_those_of_the_package(
    community, prompt, word, colour
) -> None:
    from lrd_helpers.naming import named_by

    assert (named_by(prompt).word, named_by(prompt).colour) == (word, colour)
    assert community.object_of_layer(Layer(prompt, CAR)) == word
    assert community.colour_of_prompt(prompt) == colour


def test_no_word_no_colour(community) -> None:
    assert community.colour_of_prompt("on grass") is None
    with pytest.raises(community.WordError, match="'on grass'"):
        community.object_of_layer(community.Layer("on grass", CAR))
    assert issubclass(community.LayoutError, ValueError)
    assert community.LayoutError is not LayoutError
