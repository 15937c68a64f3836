import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

from lrd_helpers.attention import (
    AttentionMaps,
    capture_attention,
    composed_attention,
    control_words,
)
from lrd_helpers.words import END, PADDING, START, PromptTokens, WordError, word_tokenizer

PROMPT = "a red car and a blue zebra at sea"
WORDS = ["a", "red", "blue", "car", "star", "and", "at", "sea"]
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS, length=LENGTH)


def tiny_unet(kind: str) -> UNet2DConditionModel:
    """A random U-Net of a few thousand parameters with the geometry of SD 1.x, 2.x or XL."""
    torch.manual_seed(0)
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    blocks = (plain, cross, cross) if kind == "sdxl" else (cross, cross, plain)
    special = {
        "sd1": {"attention_head_dim": 2},
        "sd2": {"attention_head_dim": (1, 2, 4), "use_linear_projection": True},
        "sdxl": {
            "attention_head_dim": (1, 2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 6,
        },
    }[kind]
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        down_block_types=tuple(block.format("Down") for block in blocks),
        up_block_types=tuple(block.format("Up") for block in reversed(blocks)),
        cross_attention_dim=6,
        norm_num_groups=2,
        **special,
    ).eval()


def inputs(unet: UNet2DConditionModel, batch: int, height: int = 8, width: int = 8) -> dict:
    """What a U-Net is called with."""
    like = {"generator": torch.Generator().manual_seed(1), "dtype": unet.dtype}
    called = {
        "sample": torch.randn(batch, 4, height, width, **like),
        "timestep": 500,
        # Large, so that the maps are far from uniform.
        "encoder_hidden_states": 4 * torch.randn(batch, LENGTH, 6, **like),
    }
    if unet.config.addition_embed_type:
        added = {"text_embeds": torch.randn(batch, 6, **like), "time_ids": torch.ones(batch, 6)}
        called["added_cond_kwargs"] = added
    return called


class ByHand:
    """An attention processor in four lines, which remembers its weights."""

    def __init__(self, name: str, control: Callable | None = None) -> None:
        self.name, self.control, self.weights = name, control, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(x).unflatten(-1, (attn.heads, -1))
            for layer, x in [(attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text)]
        )
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        if attention_mask is not None:
            logits = logits + attention_mask[:, None]
        if self.control is not None:
            logits = self.control(logits)
        weights = logits.softmax(dim=-1)
        self.weights.append(weights)
        out = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
        return attn.to_out[0](out)


@contextlib.contextmanager
def by_hand(unet: UNet2DConditionModel, control: Callable | None = None) -> Iterator[dict]:
    """Attention by hand while it lasts; cross-attention layer → its processor."""
    before = unet.attn_processors
    cross = {}
    processors = {}
    for name in before:
        layer = name.removesuffix(".processor")
        processors[name] = ByHand(layer, control if layer.endswith("attn2") else None)
        if layer.endswith("attn2"):
            cross[layer] = processors[name]
    unet.set_attn_processor(dict(processors))
    try:
        yield cross
    finally:
        unet.set_attn_processor(before)


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def stored(attention: AttentionMaps) -> int:
    return sum(maps.nbytes for record in attention._records.values() for maps in record.maps)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(pipe, prompt=PROMPT, **options) -> Tensor:
    options = {"num_inference_steps": 3, "generator": seeded(), "output_type": "latent"} | options
    return pipe(prompt, **options).images


def test_a_learnt_word_of_several_tokens(tiny) -> None:
    tiny.tokenizer = copy.deepcopy(tiny.tokenizer)
    tiny.tokenizer.add_tokens(["<cat>", "<cat>_1"])
    with capture_attention(tiny, "a <cat> on grass") as attention:
        assert attention.tokens("<cat>") == [2, 3]
        assert attention.tokens("grass") == [5]


# ------------------------------------------------------------------ the maps are the weights


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("guided", [True, False])
def test_maps_are_the_softmax_by_hand(tokenizer, kind, guided) -> None:
    unet = tiny_unet(kind).double()
    called = inputs(unet, 2, 7, 10)  # odd and not square
    with by_hand(unet) as processors:
        expected = unet(**called).sample
    options = {"tokenizer": tokenizer, "guided": guided, "steps": True, "heads": True}
    with capture_attention(unet, PROMPT if guided else [PROMPT] * 2, **options) as attention:
        out = unet(**called).sample
        unet(**called)
    assert torch.allclose(out, expected, atol=1e-9)

    assert set(attention.layers) == set(processors)
    car = attention.detailed("car")
    zebra = attention.detailed("zebra")
    rows = slice(1, 2) if guided else slice(0, 2)
    sizes = {70: (7, 10), 20: (4, 5), 6: (2, 3)}
    largest = (4, 5) if kind == "sdxl" else (7, 10)
    pooled = []
    for name, processor in processors.items():
        weights = processor.weights[0][rows]
        size = sizes[weights.shape[2]]
        assert car[name].shape == (2, len(weights), weights.shape[1], *size)
        assert car[name].dtype == torch.float64
        for step in range(2):
            assert torch.allclose(car[name][step].flatten(-2), weights[..., 3], atol=1e-12)
            several = weights[..., 7:12].sum(dim=-1)
            assert torch.allclose(zebra[name][step].flatten(-2), several, atol=1e-12)
        mean = weights[..., 3].mean(dim=1).view(-1, 1, *size)
        pooled.append(F.interpolate(mean, largest, mode="bilinear")[:, 0])
    assert torch.allclose(attention["car"], torch.stack(pooled).mean(0), atol=1e-12)
    assert {len(maps[0, 0]) for maps in car.values()} == (
        {"sd1": {2}, "sd2": {1, 2, 4}, "sdxl": {2, 4}}[kind]
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_maps_of_all_tokens_sum_to_one(tokenizer, kind) -> None:
    unet = tiny_unet(kind)
    with capture_attention(unet, PROMPT, tokenizer=tokenizer, guided=True) as attention:
        unet(**inputs(unet, 2, 8, 4))
        unet(**inputs(unet, 2, 8, 4))
    names = [START, *PromptTokens.encode(tokenizer, PROMPT).words, END, PADDING]
    total = sum(attention[name] for name in names)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    parts = sum(attention.pooled(name, size=(3, 9)) for name in names)
    assert torch.allclose(parts, torch.ones(1, 3, 9), atol=1e-5)
    assert all((maps >= 0).all() for maps in attention.per_layer("car").values())


@torch.no_grad()
def test_the_kept_axes_are_the_pooled_ones_taken_apart(tokenizer) -> None:
    unet = tiny_unet("sd2")
    calls = [inputs(unet, 1), inputs(unet, 1) | {"timestep": 20}]
    options = {"tokenizer": tokenizer, "guided": False}
    with (
        capture_attention(unet, PROMPT, **options) as pooled,
        capture_attention(unet, PROMPT, steps=True, heads=True, **options) as apart,
    ):
        for call in calls:
            unet(**call)
    for word in [("red",), ("a", 2), ("red car",), (PADDING,)]:
        whole = pooled.pooled(*word)
        assert whole.shape == (1, 8, 8)
        assert torch.allclose(apart.pooled(*word), whole, atol=1e-6)
        steps = apart.per_step(*word)
        assert steps.shape == (2, 1, 8, 8)
        assert torch.allclose(steps.mean(0), whole, atol=1e-6)
        assert not torch.allclose(steps[0], steps[1], atol=1e-6)
        layers, heads = pooled.per_layer(*word), apart.per_head(*word)
        assert list(layers) == list(heads) == list(pooled.layers)
        for name, maps in layers.items():
            assert torch.allclose(heads[name].mean(1), maps, atol=1e-6)
    assert torch.allclose(pooled["a", 1] + pooled["a", 2], pooled["a"], atol=1e-6)
    assert torch.allclose(pooled["red"] + pooled["car"], pooled["red car"], atol=1e-6)
    with pytest.raises(ValueError, match=re.escape("keep them with capture_attention(steps=True)")):
        pooled.per_step("red")
    with pytest.raises(ValueError, match=re.escape("keep them with capture_attention(heads=True)")):
        pooled.per_head("red")


@torch.no_grad()
def test_scores_in_chunks_of_heads(tokenizer, monkeypatch) -> None:
    unet = tiny_unet("sd2")
    maps = []
    for limit in [2**20, 2 * 64 * LENGTH, 1]:
        monkeypatch.setattr("lrd_helpers.attention.SCORES_AT_ONCE", limit)
        for heads in [True, False]:
            options = {"tokenizer": tokenizer, "heads": heads, "words": ["car"]}
            with capture_attention(unet, PROMPT, **options) as attention:
                unet(**inputs(unet, 1))
            maps.append(attention["car"])
    assert all(torch.allclose(one, maps[0], atol=1e-6) for one in maps)


@torch.no_grad()
def test_masked_tokens_get_nothing(tokenizer) -> None:
    unet = tiny_unet("sd2").double()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 3] = False
    called = inputs(unet, 2) | {"encoder_attention_mask": mask}
    with by_hand(unet) as processors:
        expected = unet(**called).sample
    with capture_attention(unet, PROMPT, tokenizer=tokenizer, guided=True, heads=True) as attention:
        assert torch.allclose(unet(**called).sample, expected, atol=1e-9)
    for name, maps in attention.per_head("red").items():
        weights = processors[name].weights[0][1:, ..., 2]
        assert torch.allclose(maps.flatten(-2), weights, atol=1e-12)
    assert attention["car"].max() == 0


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "autocast"])
def test_half_precision_is_looked_at_in_single(tokenizer, precision) -> None:
    unet = tiny_unet("sd1")
    unet = unet if precision == "autocast" else unet.to(getattr(torch, precision))
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    made = []
    for projection in ("to_q", "to_k"):
        layer = unet.get_submodule(f"{name}.{projection}")
        layer.register_forward_hook(lambda layer, args, output: made.append(output))
    with (
        capture_attention(unet, PROMPT, tokenizer=tokenizer, heads=True) as attention,
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
    ):
        unet(**inputs(unet, 1))
    query, key = (one.float().unflatten(-1, (2, -1)) for one in made)
    logits = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])
    maps = attention.per_head("car")[name]
    assert maps.dtype == torch.float32
    assert torch.allclose(maps.flatten(-2), logits.softmax(-1)[..., 3], atol=1e-6)
    total = attention[PROMPT] + sum(attention[name] for name in (START, END, PADDING))
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


# ------------------------------------------------------------------ the picture stays


class LowRank(nn.Module):
    """LoRA as peft wraps a layer: W x + B A x."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def sliced(pipe) -> None:
    pipe.enable_attention_slicing("max")


def classic(pipe) -> None:
    pipe.unet.set_attn_processor(AttnProcessor())


def fused(pipe) -> None:
    pipe.fuse_qkv_projections(vae=False)


def lora(pipe) -> None:
    for module in list(pipe.unet.modules()):
        if hasattr(module, "to_q"):
            module.to_q, module.to_k = LowRank(module.to_q), LowRank(module.to_k)


@pytest.mark.parametrize(
    "prepare", [lambda pipe: None, sliced, classic, fused, lora], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_the_picture_is_the_same_bit_for_bit(tiny, prepare, guidance_scale) -> None:
    tiny.unet = copy.deepcopy(tiny.unet)
    prepare(tiny)
    options = {"guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    processors = {name: type(one) for name, one in tiny.unet.attn_processors.items()}
    plain = drawn(tiny, **options)
    before = hooks(tiny.unet)
    with capture_attention(tiny, PROMPT, steps=True) as attention:
        assert torch.equal(drawn(tiny, **options), plain)
    assert hooks(tiny.unet) == before
    assert {name: type(one) for name, one in tiny.unet.attn_processors.items()} == processors
    assert torch.equal(drawn(tiny, **options), plain)

    # Whatever computes it shows the same maps.
    assert attention.per_step("red car").shape == (3, 2, 4, 4)
    tiny.unet.set_attn_processor(AttnProcessor2_0())
    with capture_attention(tiny, PROMPT) as again:
        drawn(tiny, **options)
    assert torch.allclose(again["red car"], attention["red car"], atol=1e-5)


def test_the_conditional_half_is_what_is_shown(tiny) -> None:
    seen = []
    with capture_attention(tiny, "a red car", steps=True) as attention:
        tiny.unet.register_forward_pre_hook(
            lambda unet, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        drawn(tiny, "a red car", negative_prompt="a blue star", num_inference_steps=2)
    tiny.unet._forward_pre_hooks.clear()
    (sample, t), text = seen[1][0], seen[1][1]["encoder_hidden_states"]
    options = {"tokenizer": tiny.tokenizer, "guided": False}
    with torch.no_grad(), capture_attention(tiny.unet, "a red car", **options) as alone:
        tiny.unet(sample[1:], t, text[1:])
    assert torch.allclose(alone["car"], attention.per_step("car")[1], atol=1e-6)


def test_batches_of_prompts_are_like_singles(tiny) -> None:
    prompts = ["a red car", "a star and a car"]
    options = {"num_images_per_prompt": 2, "generator": [seeded(i) for i in range(4)]}
    with capture_attention(tiny, prompts, words=["car", "star"]) as both:
        drawn(tiny, prompts, **options)
    assert both["car"].shape == (4, 4, 4)
    options = {"generator": seeded(3)}
    with capture_attention(tiny, prompts[1]) as second:
        drawn(tiny, prompts[1], **options)
    assert torch.allclose(both["car"][3:], second["car"], atol=1e-5)
    assert torch.allclose(both.pooled("star", prompt=1)[1:], second["star"], atol=1e-5)
    assert torch.equal(both.pooled("star", prompt=-1), both.pooled("star", prompt=1))
    assert both.tokens("car", prompt=1) == [5]
    with pytest.raises(WordError, match="'star' is not in the prompt \"a red car\""):
        both["star"]


def test_size_of_the_picture(tiny) -> None:
    with capture_attention(tiny, PROMPT) as attention:
        drawn(tiny, height=40, width=64)
    assert attention["car"].shape == (1, 5, 8)


def test_xl_pipelines(tokenizer, tiny) -> None:
    # Only what the U-Net sees: the pipeline itself is diffusers' own.
    unet = tiny_unet("sdxl")
    pipe = StableDiffusionXLPipeline(
        tiny.vae, None, None, tokenizer, None, unet, tiny.scheduler, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    called = inputs(unet, 2)
    text, pooled = called["encoder_hidden_states"], called["added_cond_kwargs"]["text_embeds"]
    options = {
        "prompt_embeds": text[:1],
        "negative_prompt_embeds": text[1:],
        "pooled_prompt_embeds": pooled[:1],
        "negative_pooled_prompt_embeds": pooled[1:],
    }
    options |= {"height": 64, "width": 64}
    plain = drawn(pipe, None, **options)
    with capture_attention(pipe, PROMPT) as attention:
        assert torch.equal(drawn(pipe, None, **options), plain)
    assert attention["car"].shape == (1, 4, 4)


def test_memory_does_not_grow_with_the_steps(tiny) -> None:
    sizes = {}
    for steps in (1, 4):
        for keep in (False, True):
            with capture_attention(tiny, PROMPT, words=["car"], steps=keep) as attention:
                drawn(tiny, num_inference_steps=steps)
            sizes[steps, keep] = stored(attention)
    # 4 × 4 positions in three layers and 2 × 2 in one, one token, 4 bytes
    assert sizes[1, False] == sizes[4, False] == sizes[1, True] == (3 * 16 + 4) * 4
    assert sizes[4, True] == 4 * sizes[1, True]
    with capture_attention(tiny, PROMPT, words=["car"], heads=True) as attention:
        drawn(tiny)
    assert stored(attention) == 2 * sizes[1, False]


def test_nothing_remains_after_an_exception(tiny) -> None:
    def fail(pipe, step, timestep, tensors):
        raise InterruptedError("enough")

    before, processors = hooks(tiny.unet), tiny.unet.attn_processors
    with pytest.raises(InterruptedError), capture_attention(tiny, PROMPT) as attention:
        drawn(tiny, callback_on_step_end=fail)
    assert hooks(tiny.unet) == before
    assert tiny.unet.attn_processors == processors
    assert attention["car"].shape == (1, 4, 4)  # what was seen until then
    with pytest.raises(WordError), capture_attention(tiny, PROMPT, words=["dog"]):
        raise AssertionError("not reached")
    assert hooks(tiny.unet) == before


def whole(unet: nn.Module) -> nn.Module:
    return torch.compile(unet, backend="eager")


def in_place(unet: nn.Module) -> nn.Module:
    unet.compile(backend="eager")
    return unet


def forward(unet: nn.Module) -> nn.Module:
    unet.forward = torch.compile(unet.forward, backend="eager")
    return unet


def by_block(unet: nn.Module) -> nn.Module:
    unet.down_blocks[0] = torch.compile(unet.down_blocks[0], backend="eager")
    unet.mid_block.compile(backend="eager")
    return unet


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="PyTorch before 2.6")
@pytest.mark.slow
@pytest.mark.parametrize("compiled", [whole, in_place, forward, by_block])
def test_a_compiled_unet(tiny, compiled) -> None:
    plain = drawn(tiny)
    with capture_attention(tiny, PROMPT, steps=True) as expected:
        drawn(tiny)
    torch.compiler.reset()
    unet = copy.deepcopy(tiny.unet)
    tiny.unet = compiled(unet)
    before = hooks(unet)
    drawn(tiny)  # so that there is compiled code, which knows of no hooks
    with capture_attention(tiny, PROMPT, steps=True) as attention:
        assert torch.equal(drawn(tiny), plain)
    assert attention.layers == expected.layers
    for word in ("red car", "zebra", PADDING):
        assert torch.equal(attention.per_step(word), expected.per_step(word))
    for layers in ("paper", "unofficial", lambda name: name.startswith("mid_block.")):
        with capture_attention(tiny.unet, PROMPT, layers=layers, tokenizer=tiny.tokenizer) as maps:
            assert maps.layers
            assert set(maps.layers) <= set(expected.layers)

    def more(logits: Tensor, layer: str, timestep: Tensor) -> Tensor:
        return control_words(logits, [3], torch.ones(4, 4), add=5.0)

    with capture_attention(tiny, PROMPT, control=more):
        assert not torch.allclose(drawn(tiny), plain, atol=1e-4)
    assert hooks(unet) == before
    assert torch.allclose(drawn(tiny), plain, atol=1e-5)  # compiled again, and with no control


def test_a_compiled_unet_and_an_old_pytorch(tiny, monkeypatch) -> None:
    tiny.unet = whole(copy.deepcopy(tiny.unet))
    monkeypatch.delattr("torch.compiler.set_stance", raising=False)
    with (
        pytest.raises(ValueError, match="the U-Net is compiled, and compiled code cannot be wat"),
        capture_attention(tiny, PROMPT),
    ):
        raise AssertionError("not reached")


def test_nested_and_repeated(tiny) -> None:
    with capture_attention(tiny, PROMPT) as outer:
        drawn(tiny, generator=seeded(1))
        with capture_attention(tiny, PROMPT, layers="unofficial") as inner:
            drawn(tiny, generator=seeded(2))
    with capture_attention(tiny, PROMPT) as first:
        drawn(tiny, generator=seeded(1))
    with capture_attention(tiny, PROMPT) as second:
        drawn(tiny, generator=seeded(2))
    assert torch.allclose(outer["car"], (first["car"] + second["car"]) / 2, atol=1e-6)
    for name, maps in inner.per_layer("car").items():
        assert torch.allclose(maps, second.per_layer("car")[name], atol=1e-6)


def test_gradient_checkpointing_counts_once(tokenizer) -> None:
    unet = tiny_unet("sd1")
    called = inputs(unet, 1)
    called["sample"].requires_grad_()
    unet.enable_gradient_checkpointing()
    with capture_attention(unet, PROMPT, tokenizer=tokenizer, steps=True) as attention:
        unet(**called).sample.sum().backward()
    assert attention.per_step("car").shape == (1, 1, 8, 8)
    with (
        pytest.raises(ValueError, match="disable_gradient_checkpointing"),
        capture_attention(unet, PROMPT, tokenizer=tokenizer, gradients=True),
    ):
        raise AssertionError("not reached")


# ------------------------------------------------------------------ which layers


def stable_diffusion_15() -> UNet2DConditionModel:
    """The stages of Stable Diffusion 1.5, very narrow."""
    return UNet2DConditionModel(
        block_out_channels=(2, 2, 2, 2), cross_attention_dim=6, norm_num_groups=1,
        attention_head_dim=1, layers_per_block=2,
    )  # fmt: skip


def test_which_layers(tokenizer) -> None:
    unet = stable_diffusion_15()

    def blocks(layers: object, unet: UNet2DConditionModel = unet) -> list[str]:
        with capture_attention(unet, PROMPT, tokenizer=tokenizer, layers=layers) as attention:
            return [name.split(".transformer_blocks.")[0] for name in attention.layers]

    assert len(blocks("all")) == 16
    assert blocks("paper") == [
        "down_blocks.1.attentions.0", "down_blocks.2.attentions.0", "mid_block.attentions.0",
    ]  # fmt: skip
    assert blocks("unofficial") == [
        f"up_blocks.{block}.attentions.{layer}" for block in (1, 2, 3) for layer in range(3)
    ]
    assert blocks(lambda name: name.startswith("mid")) == ["mid_block.attentions.0"]
    # The same stage has several transformer layers in SDXL; its last stage is not sampled down.
    assert blocks("paper", tiny_unet("sdxl")) == [
        "down_blocks.1.attentions.0", *["down_blocks.2.attentions.0"] * 2,
    ]  # fmt: skip
    assert blocks("paper", tiny_unet("sd1")) == [
        "down_blocks.1.attentions.0", "mid_block.attentions.0",
    ]  # fmt: skip


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_gradients_are_those_of_attention_by_hand(tokenizer, kind) -> None:
    unet = tiny_unet(kind).double().requires_grad_(False)
    called = inputs(unet, 2, 8, 6)
    latents = called["sample"].requires_grad_()
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"

    with by_hand(unet) as processors:
        unet(**called)
    weights = processors[name].weights[0][1:, :, :, 2:4].sum(-1).mean(1)  # "red car"
    target = torch.arange(weights.shape[-1], dtype=torch.float64).sin()
    (expected,) = torch.autograd.grad((weights * target).sum(), latents)

    options = {"tokenizer": tokenizer, "guided": True, "gradients": True}
    with capture_attention(unet, PROMPT, **options) as attention:
        unet(**called)
        loss = (attention.per_layer("red car")[name].flatten(-2) * target).sum()
        (gradient,) = torch.autograd.grad(loss, latents, retain_graph=True)
        (pooled,) = torch.autograd.grad(attention["red car"].amax(), latents)
        attention.clear()
        unet(**called)
        unet(**called)
        twice = (attention.per_layer("red car")[name].flatten(-2) * target).sum()
        (mean,) = torch.autograd.grad(twice, latents)
    assert torch.allclose(twice, loss)
    assert torch.allclose(mean, gradient, atol=1e-14, rtol=1e-6)
    assert gradient.abs().max() > 1e-8
    assert torch.allclose(gradient, expected, atol=1e-14, rtol=1e-6)
    assert pooled[1].abs().max() > 0
    assert pooled[0].abs().max() == 0  # the unconditional row


def test_without_gradients_no_graph_is_kept(tokenizer) -> None:
    unet = tiny_unet("sd1")
    called = inputs(unet, 1)
    called["sample"].requires_grad_()
    with capture_attention(unet, PROMPT, tokenizer=tokenizer) as attention:
        assert unet(**called).sample.requires_grad
    assert not attention["car"].requires_grad
    options = {"tokenizer": tokenizer, "gradients": True}
    with (
        torch.no_grad(),
        capture_attention(unet, PROMPT, **options),
        pytest.raises(RuntimeError, match=r"called without \(torch.no_grad"),
    ):
        unet(**called)


# ------------------------------------------------------------------ control


def left_half(height: int, width: int) -> Tensor:
    return (torch.arange(width) < width // 2).expand(height, width)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, None])
def test_control_is_attention_by_hand_with_other_logits(tokenizer, kind, processor) -> None:
    unet = tiny_unet(kind).double()
    called = inputs(unet, 2, 8, 4)
    plain = unet(**called).sample

    def manual(logits: Tensor) -> Tensor:
        height = int(math.sqrt(logits.shape[2] * 2))
        inside = left_half(height, height // 2).flatten().double()
        logits = logits.clone()
        for token in (2, 3):
            logits[1, ..., token] = logits[1, ..., token] * (1 + inside) + 3 * inside
        return logits

    with by_hand(unet, manual) as processors:
        expected = unet(**called).sample
    if processor is None:
        unet.set_attention_slice("max")
    else:
        unet.set_attn_processor(processor())

    seen = []

    def control(logits: Tensor, layer: str, timestep: int) -> Tensor:
        seen.append((layer, timestep, logits.shape[:1]))
        mask = left_half(*logits.shape[2:4])
        return control_words(logits, attention.tokens("red car"), mask, add=3.0, scale=2.0)

    options = {"tokenizer": tokenizer, "guided": True, "control": control, "heads": True}
    with capture_attention(unet, PROMPT, **options) as attention:
        out = unet(**called).sample
    assert torch.allclose(out, expected, atol=1e-9)
    assert torch.allclose(out[0], plain[0], atol=1e-9)  # the unconditional row
    assert not torch.allclose(out[1], plain[1], atol=1e-3)
    assert sorted(seen) == sorted((layer, 500, (1,)) for layer in attention.layers)
    for name, maps in attention.per_head("red").items():
        weights = processors[name].weights[0][1:, ..., 2]
        assert torch.allclose(maps.flatten(-2), weights, atol=1e-9)


def test_control_of_some_layers_or_of_none(tiny) -> None:
    plain = drawn(tiny)
    with capture_attention(tiny, PROMPT, control=lambda logits, layer, t: None):
        assert torch.equal(drawn(tiny), plain)
    with capture_attention(tiny, PROMPT, control=lambda logits, layer, t: logits):
        assert torch.allclose(drawn(tiny), plain, atol=1e-5)

    def more(logits: Tensor, layer: str, timestep: Tensor) -> Tensor:
        return control_words(logits, [3], torch.ones(4, 4), add=5.0)

    with capture_attention(tiny, PROMPT) as without:
        drawn(tiny)
    with capture_attention(tiny, PROMPT, layers="unofficial", control=more) as attention:
        assert not torch.allclose(drawn(tiny), plain, atol=1e-4)
    assert (attention["car"] > without["car"]).all()
    assert torch.equal(drawn(tiny), plain)


@torch.no_grad()
def test_nested_controls_follow_each_other(tokenizer) -> None:
    unet = tiny_unet("sd1").double()

    def adding(amount: float) -> Callable:
        return lambda logits, layer, t: control_words(logits, [2], torch.ones(8, 8), add=amount)

    options = {"tokenizer": tokenizer}
    with capture_attention(unet, PROMPT, control=adding(3.0), **options) as expected:
        out = unet(**inputs(unet, 1)).sample
    with (
        capture_attention(unet, PROMPT, control=adding(1.0), **options) as outer,
        capture_attention(unet, PROMPT, control=adding(2.0), **options) as inner,
    ):
        assert torch.allclose(unet(**inputs(unet, 1)).sample, out, atol=1e-9)
    assert torch.allclose(inner["red"], expected["red"], atol=1e-9)
    assert torch.allclose(outer["red"], expected["red"], atol=1e-9)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_several_texts_are_read_at_once(tokenizer, kind) -> None:
    """Row 1 asks for the prompt; what it answers is the mean of its answers to two other texts."""
    unet = tiny_unet(kind)
    pipe = SimpleNamespace(unet=unet, tokenizer=tokenizer, prompts_of_rows=[None, PROMPT])
    called = inputs(unet, batch=2, height=8, width=12)
    texts = inputs(unet, batch=4)["encoder_hidden_states"][2:]
    seen, columns = [], [[], [2, 3]]

    def mean(answers: Tensor, attention: Tensor) -> Tensor:
        seen.append(attention)
        return answers.mean(dim=0)

    def halves(attn, hidden, encoder_hidden_states, attention_mask=None) -> Tensor:
        rows = [AttnProcessor()(attn, hidden[1:], text[None]) for text in texts]
        return torch.cat(
            [AttnProcessor()(attn, hidden[:1], encoder_hidden_states[:1]), sum(rows) / 2]
        )

    with torch.no_grad():
        before = unet(**called).sample
        with composed_attention(pipe, PROMPT, texts, mean, columns=columns):
            composed = unet(**called).sample
        assert torch.equal(unet(**called).sample, before), "nothing remains"
        processors = unet.attn_processors
        by_hand = dict.fromkeys((name for name in processors if "attn2" in name), halves)
        for name, module in unet.named_modules():
            if f"{name}.processor" in by_hand:
                module.processor = by_hand[f"{name}.processor"]
        assert torch.allclose(composed, unet(**called).sample, atol=1e-5)
    assert torch.allclose(composed[:1], before[:1], atol=1e-5), "another row's"
    assert not torch.allclose(composed[1:], before[1:], atol=1e-3)
    assert len(seen) == len(by_hand)
    for attention in seen:
        assert attention.shape[2] == 1.5 * attention.shape[1]
        assert (attention[0] == 0).all(), "no column was asked for"
        assert ((attention[1] > 0) & (attention[1] < 1)).all()


def test_control_words_takes_the_share_of_a_cell_that_the_mask_covers() -> None:
    logits = torch.ones(1, 1, 2, 2, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0.0]])
    changed = control_words(logits, [1], mask, add=1.0, scale=3.0)
    assert torch.equal(changed[..., [0, 2]], logits[..., [0, 2]])
    assert changed[0, 0, 0, 0, 1] > changed[0, 0, 1, 0, 1] > changed[0, 0, 1, 1, 1]
    corner = torch.zeros(8, 8)
    corner[0, 0] = 1
    assert control_words(logits, [1], corner, add=1.0)[0, 0, 0, 0, 1] > 1
    exact = control_words(logits, [1, 2], torch.tensor([[True, False]] * 2), add=1.0, scale=3.0)
    assert exact[0, 0, :, :, 1].tolist() == [[4, 1], [4, 1]]


# ------------------------------------------------------------------ rows of the batch


@torch.no_grad()
def test_a_pipeline_can_say_which_row_is_which_prompt(tokenizer) -> None:
    unet = tiny_unet("sd1")
    pipe = SimpleNamespace(unet=unet, tokenizer=tokenizer, prompts_of_rows=None)
    called = inputs(unet, 3)
    with capture_attention(pipe, ["a car", "a red car"], steps=True) as attention:
        pipe.prompts_of_rows = [None, "a red car", "a car"]
        unet(**called)
        pipe.prompts_of_rows = [None, "a car", "at sea"]
        unet(**called)
        pipe.prompts_of_rows = [None, "a star", "at sea"]
        unet(**called)
        pipe.prompts_of_rows = ["a car"]
        with pytest.raises(ValueError, match="prompts_of_rows has 1 entries for 3 rows"):
            unet(**called)
    assert attention.per_step("car", prompt=0).shape == (2, 1, 8, 8)
    assert attention.per_step("car", prompt=1).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"different numbers of steps \(2, 1\)"):
        attention.per_step("car")
    alone = {"tokenizer": tokenizer, "guided": False}
    with capture_attention(unet, ["a", "a red car", "a car"], **alone) as by_row:
        unet(**called)
    assert torch.allclose(
        attention.per_step("car", prompt=1)[0], by_row.pooled("car", prompt=1), atol=1e-6
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("prompt", "options", "batch", "message"),
    [
        (PROMPT, {}, 2, "called with 2 rows for 1 prompts; say capture_attention(guided=True)"),
        (PROMPT, {"guided": True}, 3, "called with 3 rows, which cannot be 1 prompts with equally "
         "many pictures with unconditional rows"),
        ([PROMPT, "a car"], {"guided": False}, 1, "which cannot be 2 prompts with equally many "
         "pictures without unconditional rows"),
        (PROMPT, {"guided": False}, 2, "rows 0, 1 of the U-Net's batch should all be the prompt "
         f'"{PROMPT}", but were given different texts'),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit(tokenizer, prompt, options, batch, message) -> None:
    unet = tiny_unet("sd1")
    with (
        capture_attention(unet, prompt, tokenizer=tokenizer, **options),
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        unet(**inputs(unet, batch))
    assert hooks(unet) == 0


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("unet", {"tokenizer": None}, "give the tokenizer, capture_attention(tokenizer=…)"),
        ("unet", {"prompt": []}, "prompt is an empty list"),
        ("unet", {"words": ["car", "dog"]}, f"'dog' is not in the prompt \"{PROMPT}\"; its words "
         "are: a, red, car, and, blue, zebra, at, sea"),
        ("unet", {"words": [("red", 2)]}, "'red' stands 1 times"),
        ("unet", {"layers": "down"}, "layers is 'down', but should be 'all', 'paper', 'unoff"),
        ("unet", {"layers": lambda name: False}, "layers=function matches none of the 7 cross-"
         "attention layers; they are in: down_blocks.0.attentions.0, down_blocks.1.attentions.0"),
        ("other", {}, "UNet2DModel has no U-Net with cross-attention to look into"),
        ("none", {}, "SimpleNamespace has no U-Net with cross-attention to look into"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_at_entry(tokenizer, model, options, message) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = {
        "unet": tiny_unet("sd1"),
        "other": UNet2DModel(
            8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, **blocks
        ),
        "none": SimpleNamespace(tokenizer=tokenizer),
    }[model]
    options = {"prompt": PROMPT, "tokenizer": tokenizer} | options
    with (
        pytest.raises(ValueError, match=re.escape(message)),
        capture_attention(model, options.pop("prompt"), **options),
    ):
        raise AssertionError("not reached")


def test_asking_for_what_was_not_captured(tiny) -> None:
    with capture_attention(tiny, PROMPT, words=["red car", ("a", 2), PADDING]) as attention:
        with pytest.raises(RuntimeError, match=f'no U-Net call with the prompt "{PROMPT}" was'):
            attention["red"]
        drawn(tiny)
    assert attention["red"].shape == attention["a", 2].shape == attention[PADDING].shape
    with pytest.raises(WordError, match=re.escape("'a' was not captured")):
        attention["a"]
    with pytest.raises(WordError, match="its words are: a, red, car, and, blue, zebra"):
        attention["dogs"]
    for word in (3, ("red", "car"), ("red", 1, 2)):
        with pytest.raises(TypeError):
            attention[word]


@torch.no_grad()
def test_calls_that_have_no_mean(tokenizer) -> None:
    unet = tiny_unet("sd1")
    with capture_attention(unet, PROMPT, tokenizer=tokenizer, guided=False) as attention:
        unet(**inputs(unet, 1))
        with pytest.raises(ValueError, match=re.escape("had 1 rows of (8, 8) positions, and now")):
            unet(**inputs(unet, 1, 8, 16))
        attention.clear()
        unet(**inputs(unet, 1, 8, 16))
    assert attention["car"].shape == (1, 8, 16)


@torch.no_grad()
def test_text_of_another_length(tokenizer) -> None:
    unet = tiny_unet("sd1")
    called = inputs(unet, 1)
    called["encoder_hidden_states"] = called["encoder_hidden_states"][:, :9]
    message = "the U-Net was given 9 text tokens, but the tokenizer makes 16"
    with (
        capture_attention(unet, PROMPT, tokenizer=tokenizer),
        pytest.raises(ValueError, match=message),
    ):
        unet(**called)


@torch.no_grad()
def test_control_of_another_shape(tokenizer) -> None:
    unet = tiny_unet("sd1")
    options = {"tokenizer": tokenizer, "control": lambda logits, layer, t: logits[..., :3]}
    with (
        capture_attention(unet, PROMPT, **options),
        pytest.raises(ValueError, match=re.escape("should return (1, 2, 8, 8, 16)")),
    ):
        unet(**inputs(unet, 1))


@torch.no_grad()
def test_a_processor_with_keys_of_its_own(tokenizer) -> None:
    class Identity:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states

    unet = tiny_unet("sd1")
    unet.set_attn_processor(Identity())
    with (
        capture_attention(unet, PROMPT, tokenizer=tokenizer),
        pytest.raises(RuntimeError, match="Identity makes its queries and keys in a way of its"),
    ):
        unet(**inputs(unet, 1))
