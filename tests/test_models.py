import gc
import json
import logging
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from lrd_helpers import hub, models
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.model_memory import GIB, Needs, Plan, needs_of, on_meta, peak, plans
from lrd_helpers.models import AssetError, load_pipeline
from lrd_helpers.pipeline import LayeredRenderingPipeline
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


def test_loading_says_one_line_and_of_a_shipped_model_none(assets, half, capfd) -> None:
    load_pipeline("storybook", device="cpu")
    assert capfd.readouterr() == ("", "")
    load_pipeline(half, device="cpu")
    assert capfd.readouterr() == (f"{half.name}: cpu, float32\n", "")


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


# ------------------------------------------------------------------ the hub


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))


def changed(file: Path, **values: object) -> None:
    """Write other values into a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | values), encoding="utf-8")


@pytest.fixture
def on_the_hub(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of the hub that has the tiny pipeline, as one commit; it has no weights."""
    snapshot = tmp_path / "snapshots" / ("0" * 40)
    shutil.copytree(half, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))

    def file(name: str, file: str, revision: str | None) -> Path:
        if not (snapshot / file).is_file():
            raise errors.EntryNotFoundError(file)
        return snapshot / file

    monkeypatch.setattr(hub, "hub_file", file)
    monkeypatch.setattr(hub, "files_of", lambda name, revision: None)
    return snapshot


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
        ("stabilityai/sd-turbo", "b261bac6fd2cf515557d5d0707481eafa0485ec2"),
        ("some/model", "0" * 40),  # the commit of the index, for all that follows
    ],
)
def test_all_of_a_model_comes_from_one_commit(on_the_hub, monkeypatch, name, revision) -> None:
    asked = []

    def from_pretrained(name: str, **options: object) -> None:
        asked.append(options)
        raise OSError("the end")

    monkeypatch.setattr(LayeredRenderingPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(AssetError, match=f"^{name} cannot be loaded: the end$"):
        load_pipeline(name, "cpu")
    assert [each["revision"] for each in asked] == [revision]
    assert asked[0]["use_safetensors"] is True
    assert asked[0]["local_files_only"] is True  # the hub does not answer


def test_half_precision_is_fetched_where_all_parts_have_it() -> None:
    parts = ("unet", "vae")
    files = ["unet/a.fp16.safetensors", "vae/b.fp16.safetensors", "unet/a.safetensors"]
    assert models._half_in(Path("nowhere"), files, parts) == "fp16"
    assert models._half_in(Path("nowhere"), files[1:], parts) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError, "https://huggingface.co/runwayml/stable-diffusion-v1-5; then log"),
        (errors.RepositoryNotFoundError, "'stable-diffusion-v1-5/stable-diffusion-v1-5' would wo"),
        (errors.RevisionNotFoundError, "no longer has this commit; give revision='main'"),
        (errors.LocalEntryNotFoundError, "go online and call again .*`hf download runwayml/stable"),
        (errors.OfflineModeIsEnabled, "the hub cannot be reached"),
    ],
)
def test_what_is_wrong_on_the_hub_is_said_with_a_remedy(monkeypatch, error, said) -> None:
    def fails(*arguments: object) -> None:
        try:
            raise error.__new__(error)  # as the hub's library raises it
        except error as raised:
            raise OSError("some page of text") from raised  # and diffusers after it

    monkeypatch.setattr(hub, "hub_file", fails)
    with pytest.raises(AssetError, match=said) as caught:
        load_pipeline("runwayml/stable-diffusion-v1-5", "cpu")
    assert len(str(caught.value)) <= 300


def test_a_notebook_learns_quickly_that_there_is_no_hub(monkeypatch) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(hub.HfApi, "model_info", offline)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a, **o: pytest.fail("it tries again"))
    assert not hub.hub_has("nobody/nothing")


# ------------------------------------------------------------------ refused before weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": None}, "AssetError"),
        ({"requires_aesthetics_score": True}, "this is a refiner of Stable Diffusion XL (it"),
        ({"scheduler": None}, "model_index.json names no scheduler"),
        ({"text_encoder": [None, None]}, "model_index.json names no text_encoder"),
    ],
)
def test_an_index_that_cannot_work_is_refused(on_the_hub, changes, message) -> None:
    index = index_of(on_the_hub) | changes
    if index["unet"] is None:
        del index["unet"]
        index["_class_name"] = "FluxPipeline"
        message = "FluxPipeline is of another family; Stable Diffusion 1.x, 2.x or XL would work"
    (on_the_hub / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(AssetError, match=re.escape(f"a/b cannot be loaded: {message}")) as caught:
        load_pipeline("a/b", "cpu")
    assert len(str(caught.value)) <= 300


def inpainting(folder: Path) -> None:
    changed(folder / "unet" / "config.json", in_channels=9)


def no_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (inpainting, "takes 9 channels where latents have 4, as for inpainting; use the model"),
        (no_scheduler, "scheduler/scheduler_config.json is missing; copy the folder scheduler fr"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(on_the_hub, half, tmp_path, spoil, said):
    folder = tmp_path / "folder"
    shutil.copytree(half, folder)
    for place, name in ((on_the_hub, "a/b"), (folder, folder)):
        spoil(place)
        with pytest.raises(AssetError, match=said):
            load_pipeline(name, "cpu")


def test_too_little_memory_is_said_before_weights_are_read(on_the_hub, half, monkeypatch) -> None:
    monkeypatch.setattr(models, "free_memory", lambda device: GIB // 2)
    said = (
        "too little memory: on cpu it takes at least 1.0 GiB in float32, and 0.5 GiB are free; "
        "dtype=torch.bfloat16 takes half"
    )
    for name in ("a/b", half):
        with pytest.raises(AssetError, match=said):
            load_pipeline(name, "cpu")


def test_half_precision_on_a_cpu_is_refused(half: Path) -> None:
    with pytest.raises(ValueError, match="^a CPU is slow in float16; use float32, or bfloat16"):
        load_pipeline(half, "cpu", torch.float16)


def test_a_clone_without_git_lfs_is_explained(half: Path, tmp_path: Path) -> None:
    shutil.copytree(half, tmp_path / "clone")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167536\n"
    (tmp_path / "clone" / UNET).write_bytes(pointer)
    with pytest.raises(AssetError, match=f"{UNET} is a pointer of Git LFS .*; run `git lfs pull`"):
        load_pipeline(tmp_path / "clone", "cpu")


# ------------------------------------------------------------------ where it is put


def test_the_peak_of_a_call_by_hand() -> None:
    """Two matrices: 8 × 16 and 16 × 4 numbers of 4 bytes, the first freed at last."""
    down, up = (torch.empty(shape, device="meta") for shape in ((32, 16), (16, 4)))
    x = torch.empty(8, 32, device="meta")
    assert peak(lambda: (x @ down) @ up) == 4 * (8 * 16 + 8 * 4)
    assert peak(lambda: x.view(32, 8).mT) == 0  # views, also of what was there before
    heads = torch.empty(1, 2, 1000, 4, device="meta")
    attention = torch.nn.functional.scaled_dot_product_attention
    assert peak(lambda: attention(heads, heads, heads)) == 4 * heads.numel()


def test_stable_diffusions_unet_has_the_published_number_of_parameters() -> None:
    unet = on_meta(UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768})
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964


def test_only_the_decoder_of_xl_is_counted_in_single_precision(tiny, tiny_xl) -> None:
    sizes = {}
    for name, pipe in {"1.x": tiny, "XL": tiny_xl}.items():
        parts = {
            "unet": on_meta(UNet2DConditionModel, pipe.unet.config),
            "vae": on_meta(type(pipe.vae), pipe.vae.config),
        }
        sizes[name] = needs_of(parts, torch.float16).weights["vae"]
    count = sum(parameter.numel() for parameter in tiny.vae.parameters())
    assert sizes == {"1.x": 2 * count, "XL": 4 * count}


def test_plans_by_hand() -> None:
    needs = Needs({"unet": 4 * GIB, "vae": GIB, "text": 2 * GIB}, GIB // 2, 6 * GIB, 2 * GIB)
    # One GiB of margin. All: 7 + 6; in tiles 7 + 2; the U-Net alone 4 + 2 rows; a layer: the tile.
    assert [each.least for each in plans(needs, 0)] == [14 * GIB, 10 * GIB, 6 * GIB, 3 * GIB]
    assert [each.rows for each in plans(needs, 10 * GIB)] == [4, 4, 10, 18]
    assert [each.offload for each in plans(needs, 0, offload=False)] == ["no", "no"]


def test_a_decoder_in_tiles_and_few_samples_at_once(half, monkeypatch, capsys) -> None:
    monkeypatch.setattr(models, "plans", lambda *a, **o: [Plan("no", True, 0, 3)])
    monkeypatch.setattr(models, "TILE", 16)
    pipe = load_pipeline(half, "cpu")
    assert capsys.readouterr().out.endswith("decoded in tiles of 16 pixels, 3 samples at once\n")
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.vae.use_tiling, pipe.vae.tile_latent_min_size) == (True, 2)
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    four = [LAYOUT] * 4
    assert len(pipe(four, method="plain", num_inference_steps=1).images) == 4
    assert rows == [3, 3, 2]


# ------------------------------------------------------------------ few steps

TURBO = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
LCM = {"_class_name": "LCMScheduler"}


@pytest.mark.parametrize(
    ("scheduler", "steps", "rows"), [(TURBO, 4, 1), (LCM, 4, 1), ({}, 25, 2)],
    ids=["turbo", "lcm", "other"],
)  # fmt: skip
def test_a_few_step_model_draws_in_few_steps_without_guidance(
    half, tmp_path, capsys, scheduler, steps, rows
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(half, folder)
    changed(folder / "scheduler" / "scheduler_config.json", **scheduler)
    if scheduler:
        changed(folder / "model_index.json", scheduler=["diffusers", scheduler["_class_name"]])
    pipe = load_pipeline(folder, "cpu")
    said = "4 steps and guidance 1 by default" in capsys.readouterr().out
    assert said == bool(scheduler)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    pipe(LAYOUT, method="plain", output_type="latent")
    assert seen == [rows] * steps


def test_a_distilled_guidance_stays_on() -> None:
    """LCM_Dreamshaper's U-Net is told γ; 8.5 is the default of diffusers' own pipeline of LCMs."""
    unet = SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=256))
    assert models._few_steps(SimpleNamespace(scheduler=LCM, unet=unet)) == (4, 8.5)


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
