"""The layered model: layers as latents, the layered U-Net, its training."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from shard_files import tar
from torch import Tensor

from lrd_helpers.layerdiff.alpha import decode_layers, encode_layers, grown, over, straightened
from lrd_helpers.layerdiff.export import ora_of
from lrd_helpers.layerdiff.stack import LayerStack, StackLayer
from lrd_helpers.layerdiff.unet import (
    COMPOSITE,
    MOST_LAYERS,
    PARTS,
    LayeredUNet2DConditionModel,
    LayeredUNetOutput,
    Slots,
    slot_identities,
    switched_off,
)
from lrd_helpers.measure.layers import alpha_sad, blended_psnr, colour_error, soft_iou
from lrd_helpers.pictures import picture_of
from lrd_helpers.storybook import StorybookDataset, caption_of, seeded
from lrd_helpers.training import layerdiff
from lrd_helpers.training.layerdiff import (
    LayerDiffOptions,
    LayerDiffTraining,
    ShardCache,
    StackBatch,
    encoded_stacks,
    sample_given,
    sample_prompts,
)
from lrd_helpers.training.layered_shards import rendering_of
from lrd_helpers.training.rgba_autoencoder import mixed, rgba_losses

WIDTH = 16


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        mid_block_add_attention=False,
    ).eval()


def a_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        cross_attention_dim=WIDTH,
    ).eval()


def talking(model: LayeredUNet2DConditionModel) -> LayeredUNet2DConditionModel:
    """The model with weights in place of all zeros, as training would make them."""
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            if not weight.any():
                weight.copy_(0.3 * noise(*weight.shape, seed=number))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> LayeredUNet2DConditionModel:
    return talking(LayeredUNet2DConditionModel.grown(a_unet()))


def a_stack(slots: int = 4, batch: int = 2) -> dict[str, Tensor]:
    return {
        "sample": noise(batch, slots, 4, 8, 8),
        "timestep": torch.arange(batch * slots).reshape(batch, slots) * 100,
        "text": noise(batch, slots, 5, WIDTH, seed=1),
        "caption": noise(batch, 5, WIDTH, seed=2),
    }


# ------------------------------------------------------------------ layers as latents


def test_a_layer_over_a_ground() -> None:
    layer = torch.tensor([1.0, 0.5, 0.0, 0.25]).reshape(1, 4, 1, 1)
    assert over(layer, 1.0).flatten().tolist() == [1.0, 0.875, 0.75]
    assert torch.allclose(straightened(over(layer, 0.5), layer[:, 3:]), layer)


def test_the_grown_autoencoder_treats_opaque_pictures_as_the_shipped_one() -> None:
    vae, opaque = a_vae(), torch.rand(2, 4, 16, 16)
    opaque[:, 3] = 1
    rgba = grown(vae)
    latents = encode_layers(rgba, opaque)
    assert torch.equal(latents, vae.encode(2 * opaque[:, :3] - 1).latent_dist.mean * 0.5)
    made = decode_layers(rgba, latents)
    assert torch.equal(made[:, 3], opaque[:, 3])
    plain = (vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(made[:, :3], plain)


def test_masks_are_pictures_beside_the_colours() -> None:
    vae, layers = a_vae(), torch.rand(2, 4, 16, 16)
    latents = encode_layers(vae, layers)
    masks = vae.encode(2 * layers[:, 3:].expand(-1, 3, -1, -1) - 1).latent_dist.mean
    assert latents.shape == (2, 8, 8, 8)
    assert torch.allclose(latents[:, 4:], masks * 0.5, atol=1e-6)
    decoded = (vae.decode(masks).sample / 2 + 0.5).clamp(0, 1).mean(1)
    assert torch.allclose(decode_layers(vae, latents)[:, 3], decoded, atol=1e-5)


def test_scores_of_layers() -> None:
    true = torch.zeros(2, 4, 10, 10)
    true[0, :, :4] = 1.0  # 40 white pixels; the second layer is empty
    made = true.clone()
    made[0, 3, 2:6] = 0.5  # half of the alpha in 20 of its pixels, and in 20 beside it
    made[0, 0, :4] = 0.7
    assert soft_iou(made, true).tolist() == pytest.approx([30 / 50, 1.0])
    assert alpha_sad(made, true).tolist() == pytest.approx([0.02, 0.0])
    assert float(colour_error(made, true)[0]) == pytest.approx(0.1)
    assert float(blended_psnr(true, true)[0]) == pytest.approx(100)
    inverted = true[:1].clone()
    inverted[:, 3] = 0  # on white, black, grey: errors 0, 1, 1/4 of the 40 %; on a colour 2/3
    mean = 0.4 * (0 + 1 + 1 / 4 + 1 / 3 + 2 / 3) / 5
    expected = -10 * torch.tensor(mean).log10()
    assert float(blended_psnr(inverted, true[:1])[0]) == pytest.approx(float(expected), abs=1e-3)


# ------------------------------------------------------------------ the layered U-Net


def test_untrained_it_is_the_plain_model_in_every_slot() -> None:
    unet, stack = a_unet(), a_stack()
    model = LayeredUNet2DConditionModel.grown(unet).eval()
    noises = model(**stack).sample
    rows = [stack[name].flatten(0, 1) for name in ("sample", "timestep", "text")]
    assert torch.equal(noises, unet(*rows).sample.unflatten(0, (2, 4)))


def test_masks_beside_colours_leave_the_colours_as_they_are() -> None:
    unet, stack = a_unet(), a_stack()
    plain = LayeredUNet2DConditionModel.grown(unet).eval()(**stack).sample
    model = LayeredUNet2DConditionModel.grown(unet, channels=8).eval()
    stack["sample"] = torch.cat([stack["sample"], noise(2, 4, 4, 8, 8, seed=3)], 2)
    noises = model(**stack).sample
    assert torch.allclose(noises[:, :, :4], plain, atol=1e-6)
    assert not noises[:, :, 4:].any()


def test_every_new_weight_learns(model: LayeredUNet2DConditionModel) -> None:
    model(**a_stack()).sample.square().sum().backward()
    silent = [name for name, w in model.named_parameters() if w.grad is None or not w.grad.any()]
    model.zero_grad()
    assert silent == []


def test_slots_hear_each_other(model: LayeredUNet2DConditionModel) -> None:
    stack, other = a_stack(), a_stack()
    other["sample"][:, 1] += 1
    change = (model(**stack).sample - model(**other).sample).abs().amax((2, 3, 4))
    assert (change > 1e-4).all()


def test_padded_slots_change_nothing(model: LayeredUNet2DConditionModel) -> None:
    stack = a_stack(5)
    identities = torch.tensor([0, 1, COMPOSITE, 3, 4])
    present = torch.tensor([[True, True, True, False, False], [True] * 5])
    noises = model(**stack, identities=identities, present=present).sample
    alone = {name: value[:1, :3] for name, value in stack.items() if name != "caption"}
    without = model(**alone, caption=stack["caption"][:1], identities=identities[:3]).sample
    assert torch.allclose(noises[0, :3], without[0], atol=1e-5)
    assert not noises[0, 3:].any()
    everyone = model(**stack, identities=identities).sample
    assert torch.allclose(noises[1], everyone[1], atol=1e-5)
    assert not torch.allclose(noises[0, :3], everyone[0, :3], atol=1e-3)


def test_permuted_layers_with_their_embeddings_permute_the_answer(
    model: LayeredUNet2DConditionModel,
) -> None:
    stack, order = a_stack(), [2, 0, 3, 1]
    identities = slot_identities(2)
    permuted = {name: x if name == "caption" else x[:, order] for name, x in stack.items()}
    there = model(**permuted, identities=identities[order]).sample
    here = model(**stack, identities=identities).sample[:, order]
    assert torch.allclose(there, here, atol=1e-4)
    # Without their embeddings they are other layers.
    assert not torch.allclose(model(**permuted).sample, here, atol=1e-3)


def test_each_slot_has_its_noise_level(model: LayeredUNet2DConditionModel) -> None:
    stack = a_stack()
    same = {**stack, "timestep": 300}
    assert torch.equal(
        model(**same).sample, model(**{**stack, "timestep": torch.full((2, 4), 300)}).sample
    )
    assert not torch.allclose(model(**same).sample, model(**stack).sample, atol=1e-3)


def test_it_loads_as_it_was_saved(model: LayeredUNet2DConditionModel, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    again = LayeredUNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**a_stack()).sample, model(**a_stack()).sample)


@pytest.mark.parametrize("layers", [-1, MOST_LAYERS + 1])
def test_as_many_layers_as_it_was_trained_for(layers: int) -> None:
    with pytest.raises(ValueError, match=f"^{layers} layers: .* 0 to 4$"):
        slot_identities(layers)


# ------------------------------------------------------------------ its training


def test_a_batch_of_the_rgba_autoencoder_begins_with_whole_scenes() -> None:
    batch = StorybookDataset(8, sticker_shares=[0.0, 0.0, 1.0, 0.0, 0.0], size=32).batch(0)
    rgba, opaque = mixed(batch, seeded(1))
    assert (opaque, len(rgba)) == (2, 8)
    assert (rgba[:2, 3] == 1).all()
    for row in range(2, 8):
        layers = [*batch.rgba[row], torch.zeros(4, 32, 32)]  # a few are empty
        assert any(torch.equal(rgba[row], layer) for layer in layers)


def test_a_wrong_alpha_costs_on_some_ground() -> None:
    truth = torch.rand(2, 4, 8, 8)
    assert all(float(loss) == 0 for loss in rgba_losses(truth, truth, seeded(0)).values())
    opaque = torch.cat([over(truth, 0.5), torch.ones_like(truth[:, :1])], 1)
    assert all(float(loss) > 0.1 for loss in rgba_losses(opaque, truth, seeded(0)).values())


def test_what_is_given() -> None:
    nothing = sample_given([1.0, 0.0, 0.0], 50, 5, seeded(0))
    assert not nothing.any()
    composite = sample_given([0.0, 1.0, 0.0], 50, 5, seeded(0))
    assert composite.sum() == 50
    assert composite[:, -1].all()
    some = sample_given([0.0, 0.0, 1.0], 200, 5, seeded(0))
    assert not some[:, -1].any()
    assert sorted(set(some.sum(1).tolist())) == [1, 2, 3, 4]


def test_prompts_of_slots() -> None:
    (scene,) = StorybookDataset(1, sticker_count=2).scenes(0)
    seen = [sample_prompts(scene, 3, seeded(number)) for number in range(200)]
    assert {len(prompts) for prompts in seen} == {5}
    full = [prompts for prompts in seen if prompts[0] and prompts[-1]]
    assert len(full) > 100
    for background, first, second, empty, caption in full:
        assert (background, empty) == (scene.place, "")
        for placed, layer in zip(scene.stickers, (first, second), strict=True):
            assert placed.sticker in layer
            assert placed.sticker in caption
    assert 10 < sum(not any(prompts) for prompts in seen) < 35  # for guidance
    assert 25 < sum(not any(prompts[:-1]) and bool(prompts[-1]) for prompts in seen) < 55


def test_stacks_are_background_layers_and_composite() -> None:
    vae = grown(a_vae())
    rendering = StorybookDataset(4, sticker_shares=[0.4, 0.3, 0.3, 0.0, 0.0], size=32).batch(0)
    stacks = encoded_stacks(vae, rendering)
    for row, scene in enumerate(rendering.scenes):
        count = len(scene.stickers)
        opaque = torch.ones(1, 32, 32)
        slots = [
            torch.cat([rendering.backgrounds[row], opaque]),
            *rendering.rgba[row, :count],
            *[torch.zeros(4, 32, 32)] * (MOST_LAYERS - count),
            torch.cat([rendering.images[row], opaque]),
        ]
        with torch.no_grad():
            assert torch.allclose(stacks[row], encode_layers(vae, torch.stack(slots)), atol=1e-4)


def test_what_is_given_is_clean_and_costs_nothing() -> None:
    trainee = LayerDiffTraining(LayerDiffOptions()).eval()
    z = noise(2, 3, 4, 16, 16)
    clean = torch.tensor([[True, True, False], [False, True, True]])
    batch = StackBatch(
        z, [["on grass", "a red car", "a red car on grass"]] * 2, slot_identities(1), clean
    )
    heard = {}

    def answer(sample: Tensor, timestep: Tensor, *others: Tensor) -> LayeredUNetOutput:
        heard.update(sample=sample, timestep=timestep)
        return LayeredUNetOutput(sample=torch.zeros_like(sample))

    trainee.model.forward = answer
    losses = trainee(batch, seeded(0))
    assert torch.equal(heard["sample"][clean], z[clean])
    assert not torch.equal(heard["sample"][~clean], z[~clean])
    assert torch.equal(heard["timestep"] == 0, clean)
    assert float(losses["layers"]) == 0
    assert float(losses["background"]) == pytest.approx(1, abs=0.2)  # its noise's square
    assert float(losses["composite"]) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_switched_off_comes_back(model, part):
    stack = a_stack()
    before = model(**stack).sample
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}

    def asked_and_broken() -> None:
        with switched_off(model, part):
            assert not torch.allclose(model(**stack).sample, before)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        asked_and_broken()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_without_attention_and_embedding_slots_are_strangers(model):
    """With its own text a slot is then what the plain U-Net draws."""
    stack = a_stack(slots=3, batch=1)
    with switched_off(model, PARTS[0]), switched_off(model, PARTS[1]):
        with switched_off(model, PARTS[2]):
            together = model(**stack).sample
        alone = [
            model.unet(
                stack["sample"][:, slot],
                stack["timestep"][:, slot],
                stack["text"][:, slot],
                class_labels=torch.tensor([0]),
                cross_attention_kwargs={"slots": Slots(1, None)},
            ).sample
            for slot in range(3)
        ]
    assert torch.allclose(together, torch.stack(alone, 1), atol=1e-5)


def test_only_parts_that_are_there_can_be_switched_off(model):
    with pytest.raises(ValueError, match="is no part"), switched_off(model, "composites"):
        pass


# ------------------------------------------------------------------ stacks from shards


def true_stacks(count: int) -> list[LayerStack]:
    """Scenes of the storybook as stacks, as a perfect construction would give them."""
    stream = StorybookDataset(
        count, seed=5, sticker_shares=[0.0, 1.0, 1.0, 0.0, 0.0], size=32
    ).batch(0)
    stacks = []
    for row, scene in enumerate(stream.scenes):
        pixels = (255 * stream.rgba[row]).round().byte().permute(0, 2, 3, 1).numpy()
        layers = [
            StackLayer(
                caption_of((placed,), scene.place, name_place=False), Image.fromarray(numbers)
            )
            for placed, numbers in zip(scene.stickers, pixels, strict=False)
        ]
        ground, whole = (picture_of(x[row]) for x in (stream.backgrounds, stream.images))
        texts = {"caption": f"caption {row}", "background_prompt": scene.place}
        stacks.append(LayerStack(ground, layers, composite=whole, **texts))
    return stacks


@pytest.fixture
def shard_options(tmp_path, monkeypatch) -> LayerDiffOptions:
    """Two shards of six stacks each; pictures have 32 × 32 pixels."""
    monkeypatch.setattr(layerdiff, "IMAGE_SIZE", 32)
    monkeypatch.setattr(layerdiff, "CACHE_BATCH", 4)
    stacks = true_stacks(12)
    for shard in range(2):
        six = stacks[6 * shard : 6 * shard + 6]
        files = [(f"{shard}{n}.ora", ora_of(stack)) for n, stack in enumerate(six)]
        (tmp_path / f"{shard}.tar").write_bytes(tar(*files))
    data = [str(tmp_path / "*.tar")]
    return LayerDiffOptions(run=tmp_path / "run", data=data, batch_size=3, mixed_precision="no")


def test_batches_of_stacks_from_shards(shard_options) -> None:
    vae, stacks = grown(a_vae()), true_stacks(12)
    cache = ShardCache(vae, shard_options, 0, 1)
    true = encoded_stacks(vae, rendering_of(stacks))
    assert cache.kept["stacks"].shape == (12, 6, 4, 16, 16)
    assert torch.allclose(cache.kept["stacks"].float(), true, atol=0.01)
    captions, layers = set(), set()
    for number in range(40):
        batch = cache.batch(number)
        assert batch.latents.shape[:2] == (3, len(batch.identities))
        layers.add(batch.latents.shape[1] - 2)
        for latents, prompts in zip(batch.latents, batch.prompts, strict=True):
            if prompts[-1] and prompts[0]:
                stack = stacks[int(prompts[-1].split()[1])]
                things = [layer.prompt for layer in stack.layers]
                assert prompts[: 1 + len(things)] == [stack.background_prompt, *things]
                captions.add(prompts[-1])
                row = stacks.index(stack)
                assert torch.allclose(latents[-1], true[row, COMPOSITE], atol=0.01)
    assert len(captions) > 9
    assert layers == {1, 2, 3, 4}, "some slots stay empty"
    parts = [ShardCache(vae, shard_options, reader, 2) for reader in range(2)]
    texts = [caption for part in parts for _, _, caption in part.texts]
    assert sorted(texts) == sorted(caption for _, _, caption in cache.texts)


def test_stacks_from_shards_are_learned(shard_options) -> None:
    batch = ShardCache(grown(a_vae()), shard_options, 0, 1).batch(0)
    trainee = LayerDiffTraining(shard_options)
    optimizer = torch.optim.AdamW(trainee.model.parameters(), lr=1e-4)
    before = trainee(batch, seeded(1))["loss"]
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert trainee(batch, seeded(1))["loss"] < 0.95 * before


def test_a_share_of_the_batches_is_from_shards(shard_options, monkeypatch) -> None:
    class Numbered:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def batch(self, number: int) -> StackBatch:
            slots = torch.arange(3)
            texts = [[self.kind, str(number)]]
            return StackBatch(noise(1, 3, 4, 1, 1), texts, slots, slots[None] > 2)

    for name in ("ShardCache", "StackCache"):
        monkeypatch.setattr(layerdiff, name, lambda *_, name=name: Numbered(name))
    options = replace(shard_options, data_share=0.25)
    batches = layerdiff.stack_batches(a_vae(), options, 0, 0, 1)
    first = [next(batches).prompts[0] for _ in range(400)]
    later = layerdiff.stack_batches(a_vae(), options, 100, 0, 1)
    assert [next(later).prompts[0] for _ in range(20)] == first[100:120], "a run can be taken up"
    assert [number for _, number in first] == [str(number) for number in range(400)]
    assert 70 < sum(kind == "ShardCache" for kind, _ in first) < 130


def test_shards_without_a_stack_are_refused(shard_options, tmp_path) -> None:
    for shard in range(2):
        (tmp_path / f"{shard}.tar").write_bytes(tar((f"{shard}.txt", b"a red car")))
    with pytest.raises(ValueError, match=r"--data: no stack can be used: 2 without a stack of lay"):
        ShardCache(grown(a_vae()), shard_options, 0, 1)
