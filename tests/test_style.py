"""Style from a reference picture: encoder, joined tokens, the U-Net's other weights, training."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from lrd_helpers import models
from lrd_helpers.pictures import pixels_of
from lrd_helpers.storybook import STYLES, StorybookDataset, render_scenes, seeded
from lrd_helpers.style import StyleConditioning, StyleEncoder, join, styled_prompt, weight_sum
from lrd_helpers.training import style as training

WORDS, FEATURES = 16, 16  # of the tiny pipeline


@pytest.fixture
def encoder() -> StyleEncoder:
    torch.manual_seed(0)
    return StyleEncoder(token_size=FEATURES, token_count=3).eval()


@pytest.fixture
def conditioning(tiny: StableDiffusionPipeline, encoder: StyleEncoder) -> StyleConditioning:
    """Random weights for the tiny U-Net's cross-attention."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(weight.shape, generator=generator)
        for name, weight in tiny.unet.named_parameters()
        if "attn2" in name
    }
    return StyleConditioning(encoder, weights, weight_sum(tiny.unet))


def pictures(count: int = 2, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------ encoder


def test_pictures_of_any_size_become_tokens(encoder: StyleEncoder) -> None:
    for side in (32, 128, 50):
        images = pictures(2, side)
        mean, log_variance = encoder.encode(images)
        assert mean.shape == log_variance.shape == (2, 2)
        tokens = encoder(images)
        assert tokens.shape == (2, 3, FEATURES)
        torch.testing.assert_close(tokens, encoder.tokens(mean))
    assert (log_variance < -2).all()  # a fresh encoder whispers, so that μ is heard


def test_an_image_of_pil_is_a_picture_too(encoder: StyleEncoder) -> None:
    image = Image.fromarray((255 * pictures(1)[0]).byte().permute(1, 2, 0).numpy())
    assert torch.equal(encoder(image), encoder(pixels_of(image)[None]))


def test_the_code_does_not_ask_where_things_are(encoder: StyleEncoder) -> None:
    """Shifted around the edge by one of the largest strides, a picture keeps its code, nearly."""
    image = pictures(1, 64)
    codes = [encoder.encode(each)[0] for each in (image, image.roll(8, -1), image / 2)]
    moved, darkened = (float((code - codes[0]).detach().norm()) for code in codes[1:])
    assert moved < 0.1 * darkened


def test_an_encoder_comes_back_as_it_was_saved(encoder: StyleEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    again = StyleEncoder.from_pretrained(tmp_path)
    assert again.config.token_count == 3
    assert torch.equal(again(pictures()), encoder(pictures()))


# ------------------------------------------------------------------ joined tokens


def test_join_puts_the_style_behind_the_text() -> None:
    text, style = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    joined = join(text, style, 0.5)
    assert torch.equal(joined[:, :5], text)
    assert torch.equal(joined[:, 5:], 0.5 * style)
    assert not join(text, style, 0.0)[:, 5:].any()


def test_one_row_serves_all_rows() -> None:
    text, style = torch.randn(1, 5, 4), torch.randn(1, 3, 4)
    joined = join(text, style, [0.0, 0.5, 1.0])
    assert joined.shape == (3, 8, 4)
    assert torch.equal(joined[:, :5], text.expand(3, -1, -1))
    assert torch.equal(joined[:, 5:], torch.tensor([0, 0.5, 1])[:, None, None] * style)


def test_rows_that_do_not_fit_are_counted() -> None:
    with pytest.raises(ValueError, match="2 texts, 3 styles, 1 strengths: give one of each"):
        join(torch.zeros(2, 5, 4), torch.zeros(3, 3, 4))


@pytest.mark.parametrize(("style", "strength"), [(torch.nan, 1.0), (1.0, torch.inf)])
def test_styles_that_are_not_finite_are_refused(style: float, strength: float) -> None:
    with pytest.raises(ValueError, match="the style's tokens are not finite"):
        join(torch.zeros(1, 5, 4), torch.full((1, 3, 4), style), strength)


def test_tokens_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"have 5 features and the style's 4: .*another pipeline"):
        join(torch.zeros(1, 5, 5), torch.zeros(1, 3, 4))


def test_the_prompt_is_the_pipelines_own_with_the_style_behind_it(
    tiny: StableDiffusionPipeline,
) -> None:
    style = torch.randn(1, 3, FEATURES)
    prompt = styled_prompt(tiny, "a red car", style, 0.5, negative_prompt="a boat")
    positive, negative = tiny.encode_prompt("a red car", "cpu", 1, True, "a boat")
    assert torch.equal(prompt["prompt_embeds"], join(positive, style, 0.5))
    assert torch.equal(prompt["negative_prompt_embeds"], join(negative, style, 0.5))
    unguided = styled_prompt(tiny, "a red car", style, negative_strength=0.0)
    assert not unguided["negative_prompt_embeds"][:, WORDS:].any()


def test_the_example_in_the_readme_draws(
    tiny: StableDiffusionPipeline,
    conditioning: StyleConditioning,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    [example] = [block for block in blocks if "load_style" in block]
    monkeypatch.setattr(models, "load_style", lambda: conditioning)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "orange").save("reference.png")
    before = copy.deepcopy(tiny.unet.state_dict())
    exec(example, {"load_pipeline": lambda name: tiny})
    assert Image.open("styled.png").size == (32, 32)
    assert all(torch.equal(before[name], x) for name, x in tiny.unet.state_dict().items())


def test_a_prompt_in_three_styles_at_once(tiny: StableDiffusionPipeline) -> None:
    def draw(prompt: str | list[str], style: Tensor) -> Tensor:
        return tiny(
            **styled_prompt(tiny, prompt, style),
            num_inference_steps=2,
            output_type="pt",
            generator=[torch.Generator().manual_seed(0) for _ in range(len(style))],
        ).images

    style = torch.randn(3, 3, FEATURES, generator=torch.Generator().manual_seed(0))
    together = draw("a red car", style)
    assert together.shape == (3, 3, 32, 32)
    for number in range(3):
        torch.testing.assert_close(together[number], draw("a red car", style[[number]])[0])
        torch.testing.assert_close(together[number], draw(["a red car"] * 3, style)[number])
    assert (together[0] - together[1]).abs().max() > 1e-3


# ------------------------------------------------------------------ the U-Net's weights


def test_the_unet_is_left_as_it_was(
    tiny: StableDiffusionPipeline, conditioning: StyleConditioning
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.unet.state_dict().items()}
    with conditioning.applied_to(tiny.unet):
        inside = tiny.unet.state_dict()
        for name, tensor in before.items():
            assert torch.equal(inside[name], conditioning.unet_weights.get(name, tensor)), name
    with pytest.raises(InterruptedError), conditioning.applied_to(tiny.unet):
        raise InterruptedError
    for name, tensor in tiny.unet.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_compiled_unet_takes_the_weights(
    tiny: StableDiffusionPipeline, conditioning: StyleConditioning
) -> None:
    compiled = torch.compile(tiny.unet, backend="eager")  # its names begin with _orig_mod.
    name, weights = next(iter(conditioning.unet_weights.items()))
    with conditioning.applied_to(compiled):
        assert torch.equal(tiny.unet.state_dict()[name], weights)
    assert not torch.equal(tiny.unet.state_dict()[name], weights)


def test_weights_in_half_precision_fit_their_unet_in_single(
    tiny: StableDiffusionPipeline, conditioning: StyleConditioning, tmp_path: Path
) -> None:
    halves = {name: tensor.half() for name, tensor in conditioning.unet_weights.items()}
    dataclasses.replace(conditioning, unet_weights=halves).save_pretrained(tmp_path)
    again = StyleConditioning.from_pretrained(tmp_path)
    assert again.base == conditioning.base
    assert torch.equal(again.encoder(pictures()), conditioning.encoder(pictures()))
    with again.applied_to(tiny.unet):
        name, half = next(iter(halves.items()))
        weight = tiny.unet.get_parameter(name)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, half.float())


def test_another_unet_is_refused(
    tiny: StableDiffusionPipeline, conditioning: StyleConditioning
) -> None:
    message = r"trained on another U-Net .*style must follow: python -m lrd_helpers\.training\.styl"
    with conditioning.applied_to(tiny.unet):
        inside = {name: tensor.clone() for name, tensor in tiny.unet.state_dict().items()}
        with pytest.raises(ValueError, match=message), conditioning.applied_to(tiny.unet):
            pass
        for name, tensor in tiny.unet.state_dict().items():
            assert torch.equal(tensor, inside[name]), name
    elsewhere = dataclasses.replace(conditioning, unet_weights={"conv_in.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"needs conv_in\.bias of shape \[3\], but this U-Net has"):
        elsewhere.applied_to(tiny.unet).__enter__()
    elsewhere = dataclasses.replace(conditioning, unet_weights={"nowhere": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"needs nowhere of shape \[3\], but this U-Net has none"):
        elsewhere.applied_to(tiny.unet).__enter__()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_unet_is_known_in_any_precision(dtype: torch.dtype, storybook_folder: Path) -> None:
    weights = load_file(storybook_folder / "unet" / "diffusion_pytorch_model.safetensors")
    unet = torch.nn.ParameterList(weight.float() for weight in weights.values())
    found = weight_sum(unet)
    assert weight_sum(unet.to(dtype)) == pytest.approx(found, rel=1e-5)
    with torch.no_grad():  # one weight in a hundred, a tenth smaller: another U-Net
        for weight in unet:
            weight.flatten()[::100] *= 0.9
    assert weight_sum(unet) != pytest.approx(found, rel=1e-5)


def test_load_style_says_what_is_missing(
    conditioning: StyleConditioning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    folder = tmp_path / "storybook-style"
    remedy = r"; clone the .*train the model with `python -m lrd_helpers\.training\.style`$"
    with pytest.raises(models.AssetError, match="storybook-style is missing" + remedy):
        models.load_style("cpu")
    conditioning.save_pretrained(folder)
    loaded = models.load_style("cpu")
    assert torch.equal(loaded.encoder(pictures()), conditioning.encoder(pictures()))
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["norm.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(models.AssetError, match=r"1 missing \(norm\.bias, …\)" + remedy):
        models.load_style("cpu")
    conditioning.save_pretrained(folder)
    (folder / "unet.safetensors").unlink()
    with pytest.raises(models.AssetError, match=r"unet\.safetensors.*" + remedy):
        models.load_style("cpu")


# ------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def pairs(
    _tiny: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[training.StyledPairs]:
    """Batches of 256 from 64 scenes; their "latents" are the pictures, 16 pixels wide."""
    run = tmp_path_factory.mktemp("run")
    options = training.StyleOptions(seed=0, cache=64, batch_size=256, run=run, mixed_precision="no")

    def small(_: object, images: Tensor) -> Tensor:
        small = functional.avg_pool2d(images, 8)
        return torch.cat([small, small[:, :1]], 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "encoded", small)
        patch.setattr(training, "render_scenes", partial(render_scenes, size=32))
        yield training.StyledPairs(_tiny.vae, options, 0, 1)


def target_styles(pairs: training.StyledPairs, batch: training.Pairs) -> list[str]:
    """Which style each target of the batch is drawn in."""
    same = (batch.latents[:, None] == pairs.latents.float()).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    return [pairs.scenes[row].style for row in same.int().argmax(1).tolist()]


def reference_styles(batch: training.Pairs) -> list[str | None]:
    """The style of a reference, where its brightness tells: paper is light, neon dark."""
    brightness = batch.references.mean((1, 2, 3)).tolist()
    return ["neon" if each < 0.16 else "sketch" if each > 0.88 else None for each in brightness]


def test_reference_and_target_share_the_style_alone(pairs: training.StyledPairs) -> None:
    batch = pairs.batch(0)
    targets, references = target_styles(pairs, batch), reference_styles(batch)
    strengths = batch.strengths.tolist()
    full = [row for row, strength in enumerate(strengths) if strength == 1]
    none = [row for row, strength in enumerate(strengths) if strength == 0]
    assert 0.5 < len(full) / 256 < 0.7
    assert 0.03 < len(none) / 256 < 0.2
    assert {targets[row] for row in none} == {"flat"}
    assert {targets[row] for row in full} == set(STYLES)
    known = [row for row in full if references[row]]
    assert len(known) > 40
    assert all(targets[row] == references[row] for row in known)
    shown = functional.avg_pool2d(batch.references, 2)
    different = (shown - batch.latents[:, :3]).abs().amax((1, 2, 3))
    assert (different > 0.02).all()  # never the same scene


def test_a_style_is_kept_as_often_as_it_is_strong(pairs: training.StyledPairs) -> None:
    kept, asked = [], []
    for number in range(8):
        batch = pairs.batch(number)
        for target, reference, strength in zip(
            target_styles(pairs, batch),
            reference_styles(batch),
            batch.strengths.tolist(),
            strict=True,
        ):
            if reference and 0 < strength < 1:
                kept.append(target == reference)
                asked.append(strength)
    assert len(kept) > 100
    assert sum(kept) / len(kept) == pytest.approx(sum(asked) / len(asked), abs=0.12)
    weak = [keep for keep, strength in zip(kept, asked, strict=True) if strength < 0.3]
    strong = [keep for keep, strength in zip(kept, asked, strict=True) if strength > 0.7]
    assert sum(weak) / len(weak) < 0.35 < 0.65 < sum(strong) / len(strong)


def test_batches_depend_on_their_number_alone(pairs: training.StyledPairs) -> None:
    stream = pairs.batches(3)
    for number in (3, 4):
        one, other = next(stream), pairs.batch(number)
        assert one.captions == other.captions
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.references, other.references)
        assert torch.equal(one.strengths, other.strengths)
    assert pairs.batch(3).captions != pairs.batch(4).captions


def test_only_the_tuned_part_learns(tiny: StableDiffusionPipeline) -> None:
    tiny.unet = copy.deepcopy(tiny.unet)  # the fixture's is shared
    trainee = training.StyleTraining(tiny, tuned=("attn2",), token_count=3)
    scenes = StorybookDataset(4, styles=STYLES).scenes(0)
    batch = training.Pairs(
        torch.randn(4, 4, 4, 4, generator=seeded(0)),
        [scene.caption for scene in scenes],
        render_scenes(scenes, 32).images,
        torch.tensor([1.0, 0.5, 0.0, 1.0]),
    )
    losses = trainee(batch, seeded(0))
    loss, noise, kl = (losses[name].detach() for name in ("loss", "noise", "kl"))
    torch.testing.assert_close(loss, noise + trainee.kl_weight * kl)
    losses["loss"].backward()
    learning = {name for name, weight in trainee.named_parameters() if weight.grad is not None}
    moving = {name for name in learning if trainee.get_parameter(name).grad.any()}
    assert moving >= {name for name, _ in trainee.named_parameters() if name.startswith("encoder")}
    assert {name for name in learning if name.startswith("unet")} == {
        f"unet.{name}" for name in trainee.tuned
    }
    assert all("attn2" in name for name in trainee.tuned)


def test_without_a_style_the_loss_ignores_the_reference(tiny: StableDiffusionPipeline) -> None:
    tiny.unet = copy.deepcopy(tiny.unet)
    trainee = training.StyleTraining(tiny, token_count=3).eval()
    latents = torch.randn(2, 4, 4, 4, generator=seeded(0))

    def loss(side: int, strength: float) -> float:
        batch = training.Pairs(
            latents, ["a red car"] * 2, pictures(2, side), torch.full((2,), strength)
        )
        with torch.no_grad():
            return float(trainee(batch, seeded(1))["noise"])

    assert loss(32, 0.0) == loss(64, 0.0)
    assert loss(32, 1.0) != loss(64, 1.0)


def test_a_part_that_is_nowhere_is_named(tiny: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="no weight of the U-Net has 'atn2' in its name"):
        training.StyleTraining(tiny, tuned=("atn2",))
