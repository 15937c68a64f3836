import gc
import json
import logging
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lrd_helpers import models
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.models import AssetError, load_pipeline
from lrd_helpers.pipeline import LayeredRenderingPipeline, LayeredRenderingXLPipeline
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.words import unknown_words

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
LAYOUT = Layout("a red car", layers=[Layer("a red car", (0, 0, 0.5, 1))])


@pytest.fixture(scope="session")
def half(_tiny: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline's folder with weights in half precision, as the shipped ones are."""
    folder = tmp_path_factory.mktemp("half")
    _tiny.save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.fixture
def assets(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the place of the shipped storybook, for a test to damage."""
    shutil.copytree(half, tmp_path / "storybook")
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    return tmp_path


def test_loads_half_precision_as_single_on_the_cpu(half: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = load_pipeline(half, device="cpu")
    assert type(pipe) is LayeredRenderingPipeline
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}
        assert not part.training
    stored = load_file(half / UNET)
    assert torch.equal(pipe.unet.conv_in.weight.half(), stored["conv_in.weight"])
    assert pipe.safety_checker is None


def test_weights_of_a_variant(half: Path, tmp_path: Path) -> None:
    StableDiffusionPipeline.from_pretrained(str(half)).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    for variant in (None, "fp16"):  # the only one that is there is taken
        pipe = load_pipeline(tmp_path, "cpu", variant=variant)
        assert torch.equal(pipe.unet.conv_in.weight, load_pipeline(half, "cpu").unet.conv_in.weight)
    with pytest.raises(AssetError, match="cannot be loaded"):
        load_pipeline(tmp_path, "cpu", variant="bf16")


def test_dtype_and_name(assets: Path) -> None:
    pipe = load_pipeline("storybook", device="cpu", dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_loading_says_nothing(half: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_pipeline(half, device="cpu")
    assert capfd.readouterr() == ("", "")


def damaged(assets: Path) -> str:
    with pytest.raises(AssetError) as caught:
        load_pipeline("storybook", device="cpu")
    message = str(caught.value)
    assert str(assets / "storybook") in message
    assert message.endswith(
        "; clone the repository again, or train the model with "
        "`python -m lrd_helpers.training.latent_diffusion`"
    )
    assert "\n" not in message
    return message


def test_missing_folder(assets: Path) -> None:
    shutil.rmtree(assets / "storybook")
    assert "storybook is missing;" in damaged(assets)


def test_folder_without_an_index(assets: Path) -> None:
    (assets / "storybook" / "model_index.json").unlink()
    assert "holds no model_index.json or config.json;" in damaged(assets)


@pytest.mark.parametrize("weights", [UNET, TEXT])
def test_missing_weights_file(assets: Path, weights: str) -> None:
    (assets / "storybook" / weights).unlink()
    assert "no file named" in damaged(assets)


@pytest.mark.parametrize("weights", [UNET, TEXT])
def test_truncated_weights(assets: Path, weights: str) -> None:
    with open(assets / "storybook" / weights, "r+b") as file:
        file.truncate(1000)
    damaged(assets)


@pytest.mark.parametrize("weights", [UNET, TEXT])
def test_weights_of_another_shape(assets: Path, weights: str) -> None:
    path = assets / "storybook" / weights
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file(tensors | {name: torch.zeros(7, 7)}, path, metadata={"format": "pt"})
    assert "the weights have another shape than config.json says" in damaged(assets)


@pytest.mark.parametrize("weights", [UNET, TEXT])
def test_weights_that_lack_one_tensor(assets: Path, weights: str) -> None:
    """The libraries would leave it at random."""
    path = assets / "storybook" / weights
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    assert f"the weights are not complete, 1 missing ({name}, …)" in damaged(assets)


@pytest.mark.parametrize("weights", [UNET, TEXT])
def test_weights_that_are_not_finite(assets: Path, weights: str) -> None:
    path = assets / "storybook" / weights
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    assert f"{name} is not finite (NaN or infinite)" in damaged(assets)


def test_other_shipped_models_are_named_in_the_message(assets: Path) -> None:
    with pytest.raises(AssetError, match=r"storybook-clip is missing; .*training\.clip`$"):
        models.load_clip()
    with pytest.raises(AssetError, match=r"storybook-segmenter is missing; .*\.segmenter`$"):
        models.load_segmenter()


def test_a_name_that_is_nothing() -> None:
    message = "no model 'storibook': give 'storybook' or 'storybook-layers', a folder"
    with pytest.raises(AssetError, match=message):
        load_pipeline("storibook")


def test_a_device_that_is_not_there(half: Path) -> None:
    for device in ("cuda:99", "qpu"):
        with pytest.raises(ValueError, match=f"there is no device '{device}' on this machine; '"):
            load_pipeline(half, device=device)


def written(path: Path, index: dict[str, object]) -> str:
    path.write_text(json.dumps(index), encoding="utf-8")
    return str(path)


PARTS = dict.fromkeys(["unet", "vae", "scheduler", "tokenizer", "text_encoder"], ["library", "A"])
XL = PARTS | {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}


@pytest.mark.parametrize(
    ("name", "index", "cls", "revision"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", PARTS, LayeredRenderingPipeline,
         "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
        ("stabilityai/stable-diffusion-xl-base-1.0", XL, LayeredRenderingXLPipeline,
         "462165984030d82259a11f4367a4eed129e94a7b"),
    ],
)  # fmt: skip
def test_models_of_the_hub_have_a_fixed_revision(
    monkeypatch, tmp_path, name, index, cls, revision
) -> None:
    asked = []

    def download(name: str, file: str, **options: object) -> str:
        asked.append(options | {"name": name})
        return written(tmp_path / file, index)

    def from_pretrained(name: str, **options: object) -> None:
        asked.append(options | {"name": name})
        raise OSError("offline")

    monkeypatch.setattr(models, "hf_hub_download", download)
    monkeypatch.setattr(cls, "from_pretrained", from_pretrained)
    with pytest.raises(AssetError, match=f"^{name} cannot be loaded: offline$"):
        load_pipeline(name)
    assert len(asked) == 2
    assert all(each["revision"] == revision for each in asked)
    assert asked[1]["use_safetensors"] is True


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
         "FluxPipeline is of another family; Stable Diffusion 1.x, 2.x or XL would work"),
        (XL | {"requires_aesthetics_score": True}, "this is a refiner of Stable Diffusion XL (it"),
        (PARTS | {"scheduler": None}, "model_index.json names no scheduler"),
        (XL | {"text_encoder": [None, None]}, "model_index.json names no text_encoder"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_its_weights_are_fetched(
    monkeypatch, tmp_path, index, message
) -> None:
    path = written(tmp_path / "model_index.json", index)
    monkeypatch.setattr(models, "hf_hub_download", lambda name, file, **options: path)
    with pytest.raises(AssetError, match=re.escape(f"a/b cannot be loaded: {message}")) as caught:
        load_pipeline("a/b")
    assert len(str(caught.value)) <= 300


# ------------------------------------------------------------------ the shipped model


def test_the_shipped_model_draws(storybook_folder: Path) -> None:
    pipe = load_pipeline("storybook", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(LAYOUT, num_inference_steps=2).images[0]
    assert image.size == (128, 128)


def test_the_shipped_model_knows_the_words_of_the_examples(storybook_folder: Path) -> None:
    tokenizer = load_pipeline("storybook", device="cpu").tokenizer
    examples = sorted(Path(__file__).parents[1].glob("examples/*.json"))
    assert len(examples) == 8
    for path in examples:
        layout = Layout.load(path)
        prompts = [layer.prompt for layer in layout.layers]
        for text in [layout.caption, layout.background, *prompts]:
            assert unknown_words(tokenizer, text) == [], path


def test_the_shipped_folder_is_plain_stable_diffusion(storybook_folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(str(storybook_folder))
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red car", num_inference_steps=1).images[0].size == (128, 128)


def test_loading_leaves_the_logs_and_the_collector_as_they_were() -> None:
    def fails() -> None:
        with quiet_libraries():
            with quiet_libraries():
                assert not gc.isenabled()
            assert not gc.isenabled()
            assert logging.root.manager.disable == logging.WARNING
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert gc.isenabled()
    assert logging.root.manager.disable == logging.NOTSET
