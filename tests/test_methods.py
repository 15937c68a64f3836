import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lrd_helpers.attention import capture_attention
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.methods import METHODS, LayeredRendering
from lrd_helpers.methods.boxdiff import BoxDiff, box_constraints, maps_nearest_to, smoothed
from lrd_helpers.methods.larender import LaRender, densities, presences, rendered
from lrd_helpers.methods.layout_guidance import (
    LayoutGuidance,
    attention_energy,
    middle_and_first_up,
)
from lrd_helpers.methods.multidiffusion import MultiDiffusion
from lrd_helpers.methods.paint_with_words import PaintWithWords, painted
from lrd_helpers.methods.rag import RAG
from lrd_helpers.pipeline import LayeredRenderingPipeline
from lrd_helpers.sampling.run import Run
from lrd_helpers.sampling.steps import noise_level
from lrd_helpers.words import WordError

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
OTHERS = {name: m for name, m in METHODS.items() if not isinstance(m, LayeredRendering)}
QUICK = OTHERS | {"boxdiff": BoxDiff(refinements=2)}
"""The others' methods, with fewer moves where they change nothing that is tested."""

EVERY_METHOD = pytest.mark.parametrize("method", QUICK.values(), ids=QUICK)
NO_STRENGTH = {
    "paint-with-words": PaintWithWords(strength=0.0),
    "layout-guidance": LayoutGuidance(strength=0.0, repeats=2),
    "boxdiff": BoxDiff(strength=0.0, refinements=1),
}


@pytest.fixture
def tiny(tiny: StableDiffusionPipeline) -> LayeredRenderingPipeline:
    pipe = LayeredRenderingPipeline(**tiny.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: LayeredRenderingPipeline, layout: Layout, *, method: object = "plain", **options: object
) -> object:
    return pipe(layout, method=method, **options).images[0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(pipe: object, layout: Layout, **options: object) -> Tensor:
    defaults = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent"}
    return draw(pipe, layout, **defaults | options)[None]


def scored(pipe: object, x: Tensor, t: Tensor, *prompts: str, scale: float = 5.0) -> Tensor:
    """Classifier-free guidance, one U-Net call for each term."""
    encode = lambda text: pipe.encode_prompt(text, "cpu", 1, False)[0]  # noqa: E731
    negative = pipe.unet(x, t, encode("").expand(len(x), -1, -1)).sample
    positive = pipe.unet(x, t, torch.cat([encode(prompt) for prompt in prompts])).sample
    return negative + scale * (positive - negative)


# ------------------------------------------------------------------ what all have in common


@EVERY_METHOD
def test_the_same_seed_is_the_same_picture(tiny, method) -> None:
    first = draw(tiny, TWO, method=method, num_inference_steps=3, generator=seeded())
    again = draw(tiny, TWO, method=method, num_inference_steps=3, generator=seeded())
    assert first.size == (32, 32)
    assert first.tobytes() == again.tobytes()
    other = latents_of(tiny, TWO, method=method, generator=seeded(1))
    assert not torch.allclose(other, latents_of(tiny, TWO, method=method), atol=1e-3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_plain_is_stable_diffusion(tiny, scheduler, guidance_scale) -> None:
    tiny.scheduler = scheduler.from_config(tiny.scheduler.config)
    options = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "output_type": "pt"}
    options |= {"negative_prompt": "a ball"} if guidance_scale > 1 else {}
    plain = StableDiffusionPipeline(**tiny.components, requires_safety_checker=False)
    expected = plain(TWO.caption, generator=seeded(), **options).images[0]
    assert torch.equal(draw(tiny, TWO, generator=seeded(), **options), expected)


@EVERY_METHOD
def test_every_method_starts_from_the_noise_of_layered_rendering(tiny, method, monkeypatch) -> None:
    inputs, forward = [], tiny.unet.forward

    def noting(x: Tensor, *arguments: object, **named: object) -> object:
        inputs.append(x.detach().clone())
        return forward(x, *arguments, **named)

    monkeypatch.setattr(tiny.unet, "forward", noting)
    tiny(TWO, num_inference_steps=1, generator=seeded(), layered_fraction=0.0)
    expected = inputs.pop()
    options = {"num_inference_steps": 1, "generator": seeded(), "height": 32, "width": 32}
    draw(tiny, TWO, method=method, **options)
    assert torch.equal(inputs[0][0], expected[0])
    inputs.clear()
    draw(tiny, TWO, method=method, **options | {"generator": None}, latents=expected[:1].clone())
    assert torch.equal(inputs[0][0], expected[0]), "the noise can be given"


@pytest.mark.parametrize("name", NO_STRENGTH)
@pytest.mark.parametrize("scheduler", SCHEDULERS[::2] + [EulerAncestralDiscreteScheduler])
def test_without_strength_every_method_is_plain(tiny, name, scheduler) -> None:
    tiny.scheduler = scheduler.from_config(tiny.scheduler.config)
    plain = latents_of(tiny, TWO)
    assert torch.equal(latents_of(tiny, TWO, method=NO_STRENGTH[name]), plain)
    drawn = latents_of(tiny, TWO, method=QUICK[name])
    assert drawn.isfinite().all()
    assert not torch.allclose(drawn, plain, atol=1e-4)


@EVERY_METHOD
@pytest.mark.parametrize(
    "layers",
    [
        [Layer("a red car", (0.5, 0.5, 0.501, 0.501)), Layer("a star", (0.99, 0, 1, 1))],
        [Layer("a red car", (0, 0, 1, 1)), Layer("a star", (0, 0, 1, 0.01))],
        [Layer("a red car", mask=np.eye(8)), Layer("a star", mask=np.tri(5))],
    ],
    ids=["tiny boxes", "the whole canvas", "masks"],
)
def test_no_shape_is_too_small_or_too_large(tiny, method, layers) -> None:
    layout = replace(TWO, layers=layers)
    for size in ({"height": 32, "width": 64}, {"height": 64, "width": 64}):
        drawn = latents_of(tiny, layout, method=method, num_inference_steps=2, **size)
        assert drawn.shape == (1, 4, size["height"] // 8, size["width"] // 8)
        assert drawn.isfinite().all()


class Interrupted(Exception):
    pass


@EVERY_METHOD
@pytest.mark.parametrize("broken", ["scheduler", "unet"])
def test_the_model_is_left_as_it_was(tiny, method, broken, monkeypatch) -> None:
    expected = latents_of(tiny, TWO, method=method)
    freed = []
    monkeypatch.setattr(tiny, "maybe_free_model_hooks", lambda: freed.append(True))

    def state() -> object:
        modules = tiny.unet.modules()
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
        weights = [
            (weight.requires_grad, weight.grad, weight.sum().item())
            for part in (tiny.unet, tiny.vae, tiny.text_encoder)
            for weight in part.parameters()
        ]
        return hooks, weights, dict(tiny.unet.attn_processors), tiny.unet.training

    before, attribute = state(), {"scheduler": "step", "unet": "forward"}[broken]
    part, calls = getattr(tiny, broken), []
    wrapped = getattr(part, attribute)

    def failing(*arguments: object, **named: object) -> object:
        calls.append(True)
        if len(calls) == 3:
            raise Interrupted
        return wrapped(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(part, attribute, failing)
        with pytest.raises(Interrupted):
            latents_of(tiny, TWO, method=method)
    assert state() == before
    assert freed == [True], "offloaded parts go back"
    assert torch.equal(latents_of(tiny, TWO, method=method), expected)
    assert state() == before


@EVERY_METHOD
def test_gradients_are_taken_wherever_one_draws(tiny, method) -> None:
    expected = latents_of(tiny, TWO, method=method)
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            drawn = latents_of(tiny, TWO, method=method)
        assert torch.equal(drawn, expected)
        assert not drawn.requires_grad


@EVERY_METHOD
def test_half_precision(tiny, method) -> None:
    tiny.to(torch.bfloat16)
    try:
        drawn = latents_of(tiny, TWO, method=method, num_inference_steps=2)
    finally:
        tiny.to(torch.float32)
    assert drawn.dtype == torch.bfloat16
    assert drawn.isfinite().all()


@pytest.mark.parametrize(
    ("method", "samples", "backward"),
    [
        ("plain", 2 * 10, 0),
        (MultiDiffusion(), 2 * 3 * 10, 0),
        ("paint-with-words", 2 * 10, 0),
        (LayoutGuidance(threshold=0.0), 2 * 10 + 2 * 5, 2 * 5),
        ("larender", 2 * 10, 0),
        (RAG(binding=0.2), 2 * 10 + 2 * (2 * 2), 0),
        (BoxDiff(refinements=0), 2 * 10 + 5, 5),
        (BoxDiff(refine=((0.5, 1.0),), refinements=4), 2 * 10 + 5 + 4, 5 + 4),
        (BoxDiff(refine=((0.5, 0.0),), refinements=4), 2 * 10 + 5 + 1, 5 + 1),
    ],
    ids=str,
)
def test_what_a_picture_costs(tiny, method, samples, backward, monkeypatch) -> None:
    counted, taken, grad = [], [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: taken.append(True) or grad(*a))
    handle = tiny.unet.register_forward_pre_hook(lambda _, args: counted.append(len(args[0])))
    try:
        latents_of(tiny, TWO, method=method, num_inference_steps=10)
    finally:
        handle.remove()
    assert sum(counted) == samples
    assert len(taken) == backward


def losses_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The list that the losses of whatever is drawn from now on are noted in."""
    losses, descended = [], Run.descended

    def noting(*arguments: object, **named: object) -> object:
        loss, x = descended(*arguments, **named)
        losses.append(loss)
        return loss, x

    monkeypatch.setattr(Run, "descended", noting)
    return losses


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize(
    "method",
    [
        LayoutGuidance(strength=10.0, threshold=0.0, steps=0.25, repeats=2),
        BoxDiff(strength=0.1, refine=((0.0, 1.0),), refinements=2, steps=0.0),
    ],
    ids=["layout-guidance", "boxdiff"],
)
def test_small_moves_go_down(tiny, method, scheduler, monkeypatch) -> None:
    tiny.scheduler = scheduler.from_config(tiny.scheduler.config)
    losses = losses_of(monkeypatch)
    latents_of(tiny, TWO, method=method, num_inference_steps=4, height=64, width=64)
    before, after = losses
    assert after < before - 1e-5


# ------------------------------------------------------------------ MultiDiffusion


@torch.no_grad()
def multidiffusion_by_hand(pipe, layout: Layout, bootstrapping: int, steps: int) -> Tensor:
    """region_based.py of the authors, for one view: every region is denoised, then averaged."""
    prompts = [layout.background, *(layer.prompt for layer in layout.layers)]
    masks = torch.stack([layer.cells(4, 4).float() for layer in layout.layers])[:, None]
    bg_mask = 1 - masks.sum(0, keepdim=True)
    bg_mask[bg_mask < 0] = 0
    masks = torch.cat([bg_mask, masks])
    generator = seeded()
    latent = torch.randn(1, 4, 4, 4, generator=generator)
    noise = latent.clone().repeat(len(prompts) - 1, 1, 1, 1)
    backgrounds = []
    for _ in range(bootstrapping):
        flat = 2 * torch.rand(1, 3, 1, 1, generator=generator).repeat(1, 1, 32, 32) - 1
        posterior = pipe.vae.encode(flat).latent_dist
        backgrounds.append(posterior.sample(generator) * pipe.vae.config.scaling_factor)
    pipe.scheduler.set_timesteps(steps)
    for i, t in enumerate(pipe.scheduler.timesteps):
        view = latent.repeat(len(prompts), 1, 1, 1)
        if i < bootstrapping:
            numbers = (torch.rand(len(prompts), generator=generator) * bootstrapping).int()[1:]
            bg = torch.cat([backgrounds[number] for number in numbers])
            bg = pipe.scheduler.add_noise(bg, noise, t[None])
            view[1:] = view[1:] * masks[1:] + bg * (1 - masks[1:])
        noise_pred = scored(pipe, view, t, *prompts)
        denoised = pipe.scheduler.step(noise_pred, t, view)["prev_sample"]
        value = (denoised * masks).sum(dim=0, keepdims=True)
        count = masks.sum(dim=0, keepdims=True)
        latent = torch.where(count > 0, value / count, value)
    return latent


@pytest.mark.parametrize("bootstrapping", [0, 2])
def test_multidiffusion_by_hand(tiny, bootstrapping) -> None:
    assert (TWO.layers[0].cells(4, 4) & TWO.layers[1].cells(4, 4)).any(), "they overlap"
    expected = multidiffusion_by_hand(tiny, TWO, bootstrapping, steps=4)
    method = MultiDiffusion(bootstrapping=bootstrapping / 4)
    assert torch.allclose(latents_of(tiny, TWO, method=method), expected, atol=1e-4)
    other = MultiDiffusion(bootstrapping=(2 - bootstrapping) / 4)
    assert not torch.allclose(latents_of(tiny, TWO, method=other), expected, atol=1e-3)


def test_multidiffusion_with_the_background_in_the_prompts(tiny) -> None:
    named = replace(
        TWO,
        layers=[replace(each, prompt=f"{each.prompt} {TWO.background}") for each in TWO.layers],
    )
    with_background = MultiDiffusion(background_in_prompts=True)
    asked = latents_of(tiny, TWO, method=with_background)
    assert torch.equal(asked, latents_of(tiny, named, method="multidiffusion"))
    assert not torch.equal(asked, latents_of(tiny, TWO, method="multidiffusion"))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_region_over_all_is_plain_with_its_prompt(tiny, scheduler) -> None:
    tiny.scheduler = scheduler.from_config(tiny.scheduler.config)
    layout = replace(TWO, layers=[Layer("a blue boat", (0, 0, 1, 1))])
    plain = latents_of(tiny, replace(TWO, caption="a blue boat"))
    assert torch.equal(latents_of(tiny, layout, method=MultiDiffusion(bootstrapping=0.0)), plain)
    if scheduler is not EulerAncestralDiscreteScheduler:  # whose noise comes after the colours
        assert torch.equal(latents_of(tiny, layout, method="multidiffusion"), plain)


def test_layers_have_their_own_negative_prompts(tiny) -> None:
    layers = [replace(layer, negative_prompt="a ball") for layer in TWO.layers]
    drawn = latents_of(tiny, TWO, method="multidiffusion")
    own = latents_of(tiny, replace(TWO, layers=layers), method="multidiffusion")
    everywhere = latents_of(tiny, TWO, method="multidiffusion", negative_prompt="a ball")
    assert not torch.allclose(own, drawn, atol=1e-4)
    assert not torch.allclose(own, everywhere, atol=1e-4)


# ------------------------------------------------------------------ paint-with-words


def test_painted_is_the_formula_of_the_paper() -> None:
    """softmax((QKᵀ + w A) / √d) with w = w′ log(1 + σ) max(QKᵀ), from Q, K and A."""
    query = torch.randn(3, 6 * 5, 16, generator=seeded(1))
    key = torch.randn(3, 9, 16, generator=seeded(2))
    first, second = torch.zeros(6, 5), torch.zeros(6, 5)
    first[:3, :4], second[2:, 3:] = 1, 1
    paint = torch.zeros(6 * 5, 9)
    paint[:, [2, 3]] = first.flatten()[:, None]
    paint[:, [7]] = second.flatten()[:, None]

    products = query @ key.transpose(1, 2)
    weight = 0.4 * math.log(1 + 7.5) * products.max()
    expected = ((products + weight * paint) / math.sqrt(16)).softmax(-1)

    logits = (products / math.sqrt(16)).view(1, 3, 6, 5, 9)
    places = [([2, 3], first), ([7], second)]
    got = painted(logits, places, 0.4 * math.log1p(7.5)).softmax(-1)
    assert torch.allclose(got.view(3, 30, 9), expected, atol=1e-6)
    # The maximum is that of each picture: what else is in the batch does not count.
    both = painted(torch.cat([logits, 10 * logits]), places, 0.4 * math.log1p(7.5))
    assert torch.allclose(both[:1].softmax(-1), got, atol=1e-6)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_noise_level_is_that_of_the_scheduler(tiny, scheduler) -> None:
    tiny.scheduler = scheduler.from_config(tiny.scheduler.config)
    tiny.scheduler.set_timesteps(7)
    euler = EulerDiscreteScheduler.from_config(tiny.scheduler.config)
    euler.set_timesteps(7)
    levels = [noise_level(tiny.scheduler, t) for t in tiny.scheduler.timesteps]
    if scheduler is EulerDiscreteScheduler:
        assert torch.allclose(torch.tensor(levels), euler.sigmas[:-1], rtol=1e-3)
    clean = torch.zeros(1, 1, 1, 1)
    for t, level in zip(tiny.scheduler.timesteps, levels, strict=True):
        # What one unit of noise is beside one unit of signal.
        noised = [
            tiny.scheduler.add_noise(clean + signal, clean + noise, t[None]).item()
            for signal, noise in ((1, 0), (0, 1))
        ]
        assert noised[1] / noised[0] == pytest.approx(level, rel=1e-3)
    tiny.scheduler.alphas_cumprod = torch.tensor([0.9, 0.0])  # zero terminal SNR
    assert noise_level(tiny.scheduler, torch.tensor(1)) == pytest.approx(100)


def test_words_attend_to_where_they_are_painted(tiny) -> None:
    """The share of a word's attention that is in its box, in the first step from the same noise."""

    def share(method: PaintWithWords, word: str, layer: Layer) -> float:
        with capture_attention(tiny.unet, TWO.caption, tokenizer=tiny.tokenizer, guided=True) as a:
            latents_of(tiny, TWO, method=method, num_inference_steps=1)
        maps = a[word][0]
        return float(maps[layer.cells(*maps.shape)].sum() / maps.sum())

    (car, star) = (replace(TWO.layers[0], box=(0, 0.5, 0.5, 1)), TWO.layers[1])
    for word, layer in (("red", car), ("car", car), ("yellow", star), ("star", star)):
        before, after = (
            share(PaintWithWords(strength=0.0), word, layer),
            share(PaintWithWords(strength=2.0), word, layer),
        )
        assert after > before + 0.01


# ------------------------------------------------------------------ layout-guidance


def compute_ca_loss(maps: list[Tensor], bboxes: list, object_positions: list) -> Tensor:
    """utils.py of the authors: maps are (heads, positions, tokens), boxes (x0, y0, x1, y1)."""
    loss = 0
    for attn_map in maps:
        b, i, _ = attn_map.shape
        H = W = math.isqrt(i)
        for bbox, positions in zip(bboxes, object_positions, strict=True):
            obj_loss = 0
            mask = torch.zeros(H, W)
            x_min, y_min, x_max, y_max = (int(v * W) for v in bbox)
            mask[y_min:y_max, x_min:x_max] = 1
            for position in positions:
                ca_map_obj = attn_map[:, :, position].reshape(b, H, W)
                activation_value = (ca_map_obj * mask).reshape(b, -1).sum(dim=-1) / (
                    ca_map_obj.reshape(b, -1).sum(dim=-1)
                )
                obj_loss += torch.mean((1 - activation_value) ** 2)
            loss += obj_loss / len(positions)
    return loss / (len(bboxes) * len(maps))


def test_attention_energy_is_the_authors() -> None:
    maps = torch.rand(4, 8, 8, generator=seeded())
    for box in ((0, 0.5, 0.75, 1), (0.25, 0.125, 0.375, 0.5), (0, 0, 1, 1)):
        expected = compute_ca_loss([maps.view(4, 64, 1)], [box], [[0]])
        got = attention_energy(maps, Layer("a car", box).cells(8, 8))
        assert torch.allclose(got, expected, atol=1e-6)
    assert attention_energy(maps, torch.ones(8, 8) > 0) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-39, 1e-30])
def test_a_head_that_looks_nowhere_has_no_gradient_that_is_not_finite(scale) -> None:
    # Among six objects some head's attention to a word is below the smallest normal number.
    half = torch.arange(64).view(8, 8) < 32
    maps = torch.rand(2, 8, 8, generator=seeded())
    maps = (maps * torch.tensor([1.0, scale])[:, None, None]).requires_grad_()
    energy = attention_energy(maps, half)
    energy.backward()
    looking = (1 - maps[0, :4].sum() / maps[0].sum()) ** 2
    assert energy.item() == pytest.approx(((looking + 1) / 2).item(), rel=1e-5)
    assert maps.grad.isfinite().all()


def test_the_maps_of_layout_guidance_are_those_of_the_paper() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=8, attention_head_dim=8)  # SD 1.5's blocks
    assert middle_and_first_up(unet) == ("mid_block.", "up_blocks.1.")


def test_layout_guidance_by_hand(tiny) -> None:
    """The authors' loop with a scheduler whose latents are x_0 + σ ε, as theirs (LMS) are."""
    tiny.scheduler = EulerDiscreteScheduler.from_config(tiny.scheduler.config)
    scheduler, options = tiny.scheduler, LayoutGuidance(steps=0.5, repeats=3, threshold=0.0)
    scheduler.set_timesteps(4)
    text = tiny.encode_prompt(TWO.caption, "cpu", 1, False)[0].detach()
    words = [["red", "car"], ["yellow", "star"]]
    boxes = [layer.box for layer in TWO.layers]
    latents = torch.randn(1, 4, 4, 4, generator=seeded()) * scheduler.init_noise_sigma
    for index, t in enumerate(scheduler.timesteps):
        for _ in range(3 if index < 2 else 0):
            latents = latents.detach().requires_grad_(True)
            x = latents / (scheduler.sigmas[index] ** 2 + 1) ** 0.5
            with capture_attention(
                tiny.unet,
                TWO.caption,
                layers=lambda name: name.startswith(("mid_block", "up_blocks.1")),
                tokenizer=tiny.tokenizer,
                guided=False,
                heads=True,
                gradients=True,
            ) as attention:
                tiny.unet(x, t, text)
            layers = [
                torch.stack(
                    [attention.per_head(word)[name][0].flatten(1) for own in words for word in own],
                    dim=-1,
                )
                for name in attention.layers
            ]
            assert len(layers) == 3  # the middle's one and the block up's two
            loss = 30 * compute_ca_loss(layers, boxes, [[0, 1], [2, 3]])
            grad_cond = torch.autograd.grad(loss, [latents])[0]
            latents = latents - grad_cond * scheduler.sigmas[index] ** 2
        with torch.no_grad():
            x = scheduler.scale_model_input(latents, t)
            latents = scheduler.step(scored(tiny, x, t, TWO.caption), t, latents).prev_sample
    drawn = latents_of(tiny, TWO, method=options, num_inference_steps=4)
    assert torch.allclose(drawn, latents, rtol=1e-3, atol=1e-3)
    plain = latents_of(tiny, TWO, num_inference_steps=4)
    assert not torch.allclose(drawn, plain, rtol=1e-2, atol=1e-2)


def test_layout_guidance_ends_where_the_energy_is_low(tiny, monkeypatch) -> None:
    taken, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: taken.append(True) or grad(*a))
    latents_of(tiny, TWO, method=LayoutGuidance(steps=1.0, threshold=1.0))
    assert len(taken) == 1, "no energy is above 1"


# ------------------------------------------------------------------ BoxDiff


def gaussian_smoothing(image: Tensor, kernel_size: int = 3, sigma: float = 0.5) -> Tensor:
    """gaussian_smoothing.py of the authors."""
    kernel = 1
    meshgrids = torch.meshgrid(*[torch.arange(kernel_size).float()] * 2, indexing="ij")
    for grid in meshgrids:
        mean = (kernel_size - 1) / 2
        bell = torch.exp(-(((grid - mean) / (2 * sigma)) ** 2))
        kernel = kernel * (1 / (sigma * math.sqrt(2 * math.pi)) * bell)
    kernel = kernel / torch.sum(kernel)
    padded = functional.pad(image[None, None], (1, 1, 1, 1), mode="reflect")
    return functional.conv2d(padded, kernel[None, None])[0, 0]


def boxdiff_losses(attention: Tensor, indices: list, bboxes: list, P: float, L: int) -> Tensor:
    """sd_pipeline_boxdiff.py of the authors: attention is (side, side, tokens), boxes in cells."""
    attention = (attention * 100).softmax(dim=-1)
    rows = []
    for index, (x1, y1, x2, y2) in zip(indices, bboxes, strict=True):
        image = attention[:, :, index]
        obj_mask = torch.zeros_like(image)
        obj_mask[y1:y2, x1:x2] = torch.ones(y2 - y1, x2 - x1)
        bg_mask = 1 - obj_mask
        image = gaussian_smoothing(image)
        k = (obj_mask.sum() * P).long()
        fg = (image * obj_mask).reshape(-1).topk(k)[0].mean()
        k = (bg_mask.sum() * P).long()
        bg = (image * bg_mask).reshape(-1).topk(k)[0].mean()
        gt_proj_x, gt_proj_y = obj_mask.max(dim=0)[0], obj_mask.max(dim=1)[0]
        corner_mask_x, corner_mask_y = torch.zeros_like(gt_proj_x), torch.zeros_like(gt_proj_y)
        N = gt_proj_x.shape[0]
        corner_mask_x[max(x1 - L, 0) : min(x1 + L + 1, N)] = 1.0
        corner_mask_x[max(x2 - L, 0) : min(x2 + L + 1, N)] = 1.0
        corner_mask_y[max(y1 - L, 0) : min(y1 + L + 1, N)] = 1.0
        corner_mask_y[max(y2 - L, 0) : min(y2 + L + 1, N)] = 1.0
        l1 = lambda a, b: functional.l1_loss(a, b, reduction="none")  # noqa: E731
        dist_x = (l1(image.max(dim=0)[0], gt_proj_x) * corner_mask_x).mean()
        dist_y = (l1(image.max(dim=1)[0], gt_proj_y) * corner_mask_y).mean()
        rows.append(torch.stack([max(0, 1.0 - fg), max(0, bg), dist_x + dist_y]))
    return torch.stack(rows)


@pytest.mark.parametrize(("P", "L"), [(0.2, 1), (0.5, 2), (1.0, 0)])
def test_box_constraints_are_the_authors(P, L) -> None:
    attention = 0.1 * torch.rand(16, 16, 6, generator=seeded())
    boxes = [(0, 8, 12, 16), (3, 1, 9, 7), (10, 0, 13, 15)]
    expected = boxdiff_losses(attention, [0, 2, 5], boxes, P, L)
    shares = (attention * 100).softmax(-1)
    for index, box, row in zip([0, 2, 5], boxes, expected, strict=True):
        cells = Layer("a car", [edge / 16 for edge in box]).cells(16, 16)
        got = box_constraints(smoothed(shares[..., index]), cells, P, L)
        assert torch.allclose(got, row, atol=1e-5)


def test_box_constraints_of_a_word_that_fills_its_box() -> None:
    inside = Layer("a car", (0.25, 0.25, 0.75, 1)).cells(16, 16)
    assert torch.equal(box_constraints(inside.float(), inside, 0.2, 1), torch.zeros(3))
    inner, outer, corner = box_constraints((~inside).float(), inside, 0.2, 1)
    assert inner == outer == 1
    assert corner > 0
    whole = torch.ones(4, 4) > 0
    assert torch.equal(box_constraints(whole.float(), whole, 0.2, 1), torch.zeros(3))


def test_the_maps_nearest_to_a_size() -> None:
    first, second = torch.rand(2, 1, 16, 16, generator=seeded())
    maps = {"down": first, "middle": torch.rand(1, 8, 8), "up": second, "top": torch.rand(1, 64, 9)}
    assert torch.equal(maps_nearest_to(256, [maps])[0], (first[0] + second[0]) / 2)
    assert maps_nearest_to(60, [maps, maps]).shape == (2, 8, 8)


def test_boxdiff_by_hand(tiny) -> None:
    """The authors' loop, without the refinement, at 64 × 64 pixels (maps of 8 × 8)."""
    scheduler, steps = tiny.scheduler, 4
    scheduler.set_timesteps(steps)
    text = tiny.encode_prompt(TWO.caption, "cpu", 1, False)[0].detach()
    scale_range = np.linspace(1.0, 0.5, steps)
    words = [("a", 1), ("red", 1), ("car", 1), ("and", 1), ("a", 2), ("yellow", 1), ("star", 1),
             ("on", 1), ("grass", 1)]  # fmt: skip
    latents = torch.randn(1, 4, 8, 8, generator=seeded())
    for i, t in enumerate(scheduler.timesteps):
        if i < 2:
            latents = latents.detach().requires_grad_(True)
            with capture_attention(
                tiny.unet, TWO.caption, tokenizer=tiny.tokenizer, guided=False, gradients=True
            ) as attention:
                tiny.unet(latents, t, text)
            layers = [
                torch.stack([attention.per_layer(*word)[name][0] for word in words], dim=-1)
                for name in attention.layers
                if "mid_block" not in name  # 4 × 4
            ]
            mean = torch.stack(layers).mean(0)
            assert mean.shape == (8, 8, 9)
            loss = boxdiff_losses(mean, [2, 6], [(0, 4, 6, 8), (4, 0, 8, 6)], 0.2, 1).sum()
            grad_cond = torch.autograd.grad(loss, [latents])[0]
            latents = latents - 20 * np.sqrt(scale_range[i]) * grad_cond
        with torch.no_grad():
            latents = scheduler.step(scored(tiny, latents, t, TWO.caption), t, latents).prev_sample
    options = {"method": BoxDiff(refinements=0), "num_inference_steps": steps}
    drawn = latents_of(tiny, TWO, height=64, width=64, **options)
    assert torch.allclose(drawn, latents.float(), rtol=1e-3, atol=1e-3)
    plain = latents_of(tiny, TWO, height=64, width=64, num_inference_steps=steps)
    assert not torch.allclose(drawn, plain, rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------ LaRender and RAG


def cross_attention_by_hand(module, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer answers to one text, and its softmax: heads, positions, tokens."""
    split = [module.to_q(hidden), module.to_k(text), module.to_v(text)]
    query, key, value = (module.head_to_batch_dim(part) for part in split)
    weights = module.get_attention_scores(query, key)
    answer = module.batch_to_head_dim(torch.bmm(weights, value))
    return module.to_out[1](module.to_out[0](answer))[0], weights


def box_by_hand(box: tuple[float, ...], side: int) -> list[list[bool]]:
    """Whether a cell's centre is in the box, row by row."""
    centres = [(number + 0.5) / side for number in range(side)]
    return [[box[0] <= x < box[2] and box[1] <= y < box[3] for x in centres] for y in centres]


def predicted_by_hand(pipe, monkeypatch, compose, x: Tensor, t: Tensor, caption: str) -> Tensor:
    """Guidance of 5 where the conditional row's cross-attentions answer what `compose` says."""
    encode = lambda text: pipe.encode_prompt(text, "cpu", 1, False)[0]  # noqa: E731

    def answering(module):
        def forward(hidden, encoder_hidden_states=None, **_):
            plain, _ = cross_attention_by_hand(module, hidden[:1], encoder_hidden_states[:1])
            return torch.stack([plain, compose(module, hidden[1:], encode)])

        return forward

    with monkeypatch.context() as patch:
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):
                patch.setattr(module, "forward", answering(module))
        both = pipe.unet(torch.cat([x, x]), t, torch.cat([encode(""), encode(caption)])).sample
    return both[:1] + 5.0 * (both[1:] - both[:1])


@torch.no_grad()
def larender_by_hand(pipe, layout: Layout, steps: int, monkeypatch) -> Tensor:
    """The authors' layer in loops; "a red car" has its object at token 3, "on grass" at token 2."""
    prompts = [layout.background, *(layer.prompt for layer in layout.layers)]
    x = torch.randn(1, 4, 8, 8, generator=seeded())
    pipe.scheduler.set_timesteps(steps)
    for step, t in enumerate(pipe.scheduler.timesteps):
        sigma = -math.log(1 - 0.8) * steps / (step + 1)

        def compose(module, hidden, encode, sigma=sigma):
            side = math.isqrt(hidden.shape[1])
            answers, present = [], []
            for number, prompt in enumerate(prompts):
                answer, weights = cross_attention_by_hand(module, hidden, encode(prompt))
                answers.append(answer)
                seen = weights[:, :, 3 if number else 2].mean(0).view(side, side)
                seen = (seen - seen.min()) / (seen.max() - seen.min())
                box = layout.layers[number - 1].box if number else (0, 0, 1, 1)
                present.append(seen * torch.tensor(box_by_hand(box, side)))
            composed = torch.zeros_like(answers[0])
            for position in range(side * side):
                light, total = 1.0, 1e-30
                for number in reversed(range(len(prompts))):
                    opacity = layout.layers[number - 1].opacity if number else 1.0
                    density = -math.log(1 - opacity * (1 - math.exp(-sigma)))
                    m = present[number].flatten()[position].item()
                    share = light * (1 - math.exp(-density)) * m
                    composed[position] += share * answers[number][position]
                    total += share
                    light *= math.exp(-density * m)
                alone = total == 1e-30  # the background's map is 0 here, and nothing is in front
                composed[position] = answers[0][position] if alone else composed[position] / total
            return composed

        noise = predicted_by_hand(pipe, monkeypatch, compose, x, t, layout.caption)
        x = pipe.scheduler.step(noise, t, x).prev_sample
    return x


@torch.no_grad()
def rag_by_hand(pipe, layout: Layout, bound: int, delta: float, steps: int, monkeypatch) -> Tensor:
    """The authors' loop: each layer's own latents, pasted over the picture's, back to front."""
    prompts = [layout.background, *(layer.prompt for layer in layout.layers)]
    boxes = [[round(8 * side) for side in layer.box] for layer in layout.layers]

    def compose(module, hidden, encode):
        side = math.isqrt(hidden.shape[1])
        base, _ = cross_attention_by_hand(module, hidden, encode(layout.caption))
        answers = [cross_attention_by_hand(module, hidden, encode(p))[0] for p in prompts]
        regions = [box_by_hand(layer.box, side) for layer in layout.layers]
        blended = torch.zeros_like(base)
        for position in range(side * side):
            front = 0
            for number, inside in enumerate(regions, start=1):
                front = number if inside[position // side][position % side] else front
            blended[position] = (1 - delta) * base[position] + delta * answers[front][position]
        return blended

    x = torch.randn(1, 4, 8, 8, generator=seeded())
    own = [x[:, :, y0:y1, x0:x1].clone() for x0, y0, x1, y1 in boxes]
    pipe.scheduler.set_timesteps(steps)
    for step, t in enumerate(pipe.scheduler.timesteps):
        noise = predicted_by_hand(pipe, monkeypatch, compose, x, t, layout.caption)
        x = pipe.scheduler.step(noise, t, x).prev_sample
        for number, (x0, y0, x1, y1) in enumerate(boxes if step < bound else []):
            noise = scored(pipe, own[number], t, prompts[number + 1])
            own[number] = pipe.scheduler.step(noise, t, own[number]).prev_sample
            x[:, :, y0:y1, x0:x1] = own[number]
    return x


@pytest.mark.parametrize("opacity", [1.0, 0.4])
def test_larender_by_hand(tiny, opacity, monkeypatch) -> None:
    layout = replace(TWO, layers=[TWO.layers[0], replace(TWO.layers[1], opacity=opacity)])
    expected = larender_by_hand(tiny, layout, 3, monkeypatch)
    options = {"height": 64, "width": 64, "num_inference_steps": 3}
    drawn = latents_of(tiny, layout, method="larender", **options)
    assert torch.allclose(drawn, expected, atol=1e-4)
    swapped = replace(layout, layers=layout.layers[::-1])
    other = latents_of(tiny, swapped, method="larender", **options)
    assert not torch.allclose(drawn, other, atol=1e-3), "who is in front"


@pytest.mark.parametrize(("bound", "delta"), [(1, 1.0), (2, 0.25), (0, 0.5)])
def test_rag_by_hand(tiny, bound, delta, monkeypatch) -> None:
    expected = rag_by_hand(tiny, TWO, bound, delta, 4, monkeypatch)
    options = {"height": 64, "width": 64, "method": RAG(binding=bound / 4, refinement=delta)}
    drawn = latents_of(tiny, TWO, **options)
    assert torch.allclose(drawn, expected, atol=1e-4)
    swapped = replace(TWO, layers=TWO.layers[::-1])
    assert not torch.allclose(latents_of(tiny, swapped, **options), drawn, atol=1e-3)


def test_the_front_hides_what_is_behind_by_its_density() -> None:
    """Two layers before a background, each of one number: 100 far back, then 10, in front 1."""
    answers = torch.tensor([100.0, 10.0, 1.0]).view(3, 1, 1, 1)
    one, half = math.log(2), math.log(4 / 3)  # they hide a half, and a quarter
    present = torch.ones(3, 1, 1)
    got = rendered(answers, present, [one, one, one])
    assert got.item() == pytest.approx((0.5 * 1 + 0.25 * 10 + 0.125 * 100) / 0.875)
    got = rendered(answers, present, [one, one, half])
    assert got.item() == pytest.approx((0.25 * 1 + 0.375 * 10 + 0.1875 * 100) / 0.8125)
    present[2] = 0.5  # the front one is half there: it dims by e^{−σ/2}
    got = rendered(answers, present, [one, one, one])
    dim = math.sqrt(0.5)
    total = 0.25 + 0.5 * dim + 0.25 * dim
    assert got.item() == pytest.approx((0.25 * 1 + 0.5 * dim * 10 + 0.25 * dim * 100) / total)
    dense = rendered(answers, torch.ones(3, 1, 1), [1600.0, 1600.0, 1600.0])
    assert dense.item() == pytest.approx(1.0), "opaque, and finite"


def test_an_opacity_is_the_share_that_a_layer_hides() -> None:
    for sigma in (0.01, 1.6, 40.0):
        hidden = [1 - math.exp(-each) for each in densities(sigma, [1.0, 0.3, 0.0])]
        share = 1 - math.exp(-sigma)
        assert hidden == pytest.approx([share, 0.3 * share, 0.0], abs=1e-9)


def test_a_layer_is_present_where_its_object_is_attended_to() -> None:
    cells = torch.tensor([[[True, False], [True, True]]] * 2)
    same, varied = [[0.2, 0.2], [0.2, 0.2]], [[0.1, 0.5], [0.3, 0.2]]
    expected = [[[1, 1], [1, 1]], [[1, 0], [1, 1]], [[0, 0], [0.5, 0.25]]]
    got = presences(torch.tensor([same, same, varied]), cells)
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float32))
    got = presences(torch.tensor([varied, same, same]), cells)  # the background's never is 0
    assert torch.allclose(got[0], torch.tensor([[1e-6, 1], [0.5, 0.25]]))


def test_layers_that_all_ask_the_same_are_plain(tiny) -> None:
    layers = [replace(layer, prompt="a blue boat") for layer in TWO.layers]
    layout = Layout("a blue boat", background="a blue boat", layers=layers)
    plain = latents_of(tiny, layout)
    for method in (LaRender(), LaRender(alpha=0.3), RAG(binding=0.0)):
        assert torch.allclose(latents_of(tiny, layout, method=method), plain, atol=1e-4)


def test_a_layer_without_opacity_is_as_none(tiny) -> None:
    without = replace(TWO, layers=TWO.layers[:1])
    unseen = replace(TWO, layers=[TWO.layers[0], replace(TWO.layers[1], opacity=0.0)])
    drawn = [latents_of(tiny, layout, method="larender") for layout in (without, unseen, TWO)]
    assert torch.allclose(drawn[0], drawn[1], atol=1e-5)
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3)


@pytest.mark.parametrize("scheduler", SCHEDULERS[:-1])  # the last draws noise for each region
def test_a_layer_over_all_is_plain_with_its_prompt(tiny, scheduler) -> None:
    tiny.scheduler = scheduler.from_config(tiny.scheduler.config)
    layout = replace(TWO, layers=[Layer("a blue boat", (0, 0, 1, 1))])
    plain = latents_of(tiny, replace(TWO, caption="a blue boat"))
    for binding in (0.0, 0.5, 1.0):
        drawn = latents_of(tiny, layout, method=RAG(binding=binding))
        assert torch.allclose(drawn, plain, atol=1e-4)
    unrefined = latents_of(tiny, layout, method=RAG(binding=0.0, refinement=0.0))
    assert torch.allclose(unrefined, latents_of(tiny, layout), atol=1e-4)


def test_larender_asks_for_a_word_of_each_prompt(tiny, monkeypatch) -> None:
    monkeypatch.setattr(tiny.unet, "forward", None)  # is not called
    layout = replace(TWO, layers=[TWO.layers[0], replace(TWO.layers[1], word="ball")])
    with pytest.raises(WordError, match="^layer 2 'a yellow star', word: 'ball' is not in the pro"):
        latents_of(tiny, layout, method="larender")


# ------------------------------------------------------------------ the shipped model


@pytest.fixture(scope="module")
def storybook(storybook_folder) -> LayeredRenderingPipeline:
    pipe = LayeredRenderingPipeline.from_pretrained(str(storybook_folder), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_guidance_moves_the_words_of_the_shipped_model(storybook, monkeypatch) -> None:
    losses = losses_of(monkeypatch)
    layout = Layout("a red car on grass", layers=[Layer("a red car", (0.5, 0.5, 1.0, 1.0))])
    drawn = draw(
        storybook, layout, method="layout-guidance", num_inference_steps=10, generator=seeded()
    )
    assert drawn.size == (128, 128)
    assert len(losses) == 10
    assert min(losses[5:]) < 0.95 * losses[0]


def test_the_shipped_model_draws_what_stable_diffusion_draws(storybook) -> None:
    plain = StableDiffusionPipeline(**storybook.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 5.0}
    expected = plain(TWO.caption, generator=seeded(), **options).images[0]
    for method in ("plain", *NO_STRENGTH.values()):
        drawn = draw(storybook, TWO, method=method, generator=seeded(), **options)
        assert drawn.tobytes() == expected.tobytes()


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "boxdif"}, "method is 'boxdif', but should be one of collage, lrdiff, paper, "
         "authors, unofficial, plain, multidiffusion, paint-with-words, layout-guidance, boxdiff, "
         "larender, rag, or opt"),
        ({"height": 36, "width": 33}, "height and width are 36 and 33, but should be divisible by "
         "8; 32 and 32 would work"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, but should be a whole number"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_the_first_call(tiny, options, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        latents_of(tiny, TWO, **options)


@pytest.mark.parametrize("method", ["paint-with-words", "layout-guidance", "boxdiff"])
def test_a_caption_that_does_not_name_a_layer(tiny, method, monkeypatch) -> None:
    layout = replace(TWO, layers=[*TWO.layers, Layer("a blue boat", (0, 0, 0.5, 0.5))])
    monkeypatch.setattr(tiny.unet, "forward", None)  # is not called
    with pytest.raises(WordError, match="^layer 3 'a blue boat': 'boat' is not in the prompt"):
        latents_of(tiny, layout, method=method)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MultiDiffusion(bootstrapping=20.0),
            "bootstrapping is 20.0, but should be a share",
        ),
        (lambda: PaintWithWords(strength=math.nan), "strength is nan, but should be a finite"),
        (lambda: LayoutGuidance(steps=-0.1), "steps is -0.1, but should be a finite number ≥ 0"),
        (lambda: BoxDiff(brightest=1.5), "brightest is 1.5, but should be a share between 0 and"),
        (lambda: LaRender(alpha=1.0), "alpha is 1.0, but should be between 0 and 1, both excluded"),
        (lambda: LaRender(alpha=0.0), "alpha is 0.0, but should be between 0 and 1, both excluded"),
        (lambda: RAG(binding=2.0), "binding is 2.0, but should be a share between 0 and 1"),
        (lambda: RAG(refinement=math.inf), "refinement is inf, but should be a finite number ≥ 0"),
    ],
)
def test_options_that_are_none(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@EVERY_METHOD
def test_guidance_may_be_distilled_into_the_model(tiny, method) -> None:
    tiny.unet = type(tiny.unet).from_config(tiny.unet.config, time_cond_proj_dim=8).eval()
    drawn = [latents_of(tiny, TWO, method=method, guidance_scale=scale) for scale in (3.0, 5.0)]
    assert drawn[0].isfinite().all()
    assert not torch.equal(*drawn), "the scale is a condition"


@EVERY_METHOD
def test_pictures_of_a_batch_are_those_drawn_alone(tiny, method) -> None:
    other = replace(TWO, caption="a yellow star and a red car at sea")
    options = {"method": method, "num_inference_steps": 3, "output_type": "latent"}
    numbers, seeds = [], [seeded(1), seeded(2)]
    callback = lambda pipe, number, t, tensors: numbers.append(number) or {}  # noqa: E731
    both = tiny([TWO, other], generator=seeds, callback_on_step_end=callback, **options).images
    alone = [latents_of(tiny, TWO, generator=seeded(1), **options)]
    alone += [latents_of(tiny, other, generator=seeded(2), **options)]
    assert torch.allclose(both, torch.cat(alone), atol=1e-3)
    assert numbers == [0, 1, 2] * (1 if method.batched else 2)
    assert tiny.num_timesteps == 3


@EVERY_METHOD
def test_callbacks_can_change_and_stop_a_picture(tiny, method) -> None:
    zeros = lambda *_: {"latents": torch.zeros(1, 4, 4, 4)}  # noqa: E731
    assert latents_of(tiny, TWO, method=method, callback_on_step_end=zeros).abs().max() == 0
    numbers = []

    def stop(pipe, number, t, tensors):
        numbers.append(number)
        pipe._interrupt = number == 1
        return {}

    latents_of(tiny, TWO, method=method, callback_on_step_end=stop)
    assert numbers == [0, 1]


@EVERY_METHOD
def test_what_a_method_cannot_do_is_said(tiny, method, monkeypatch) -> None:
    monkeypatch.setattr(tiny.unet, "forward", None)  # is not called
    late = replace(TWO, layers=[replace(TWO.layers[0], start=0.5), TWO.layers[1]])
    canvas = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="canvas: nothing would be pasted onto it; that takes"):
        latents_of(tiny, TWO, method=method, canvas=canvas)
    if method != METHODS["plain"]:  # which looks at no layer
        with pytest.raises(ValueError, match="layer 1 'a red car' has a start or an end, but"):
            latents_of(tiny, late, method=method)


@pytest.mark.parametrize(
    ("method", "name"),
    [(name, name) for name, method in METHODS.items() if not method.translucent]
    + [(BoxDiff(strength=3.0), "BoxDiff"), (replace(METHODS["collage"], fuse="once"), "Layered")],
)
def test_what_is_not_translucent_refuses_an_opacity(tiny, method, name, monkeypatch) -> None:
    monkeypatch.setattr(tiny.unet, "forward", None)  # is not called
    long = replace(TWO.layers[0], prompt="a red car " * 150, opacity=0.0)
    glass = replace(TWO, layers=[TWO.layers[1], long])
    with pytest.raises(
        ValueError, match=f"opacity of 0, but method '{name}.* knows none; use 'col"
    ) as e:
        latents_of(tiny, [TWO, glass], method=method)
    assert str(e.value).startswith("layer 2 'a red car")
    assert len(str(e.value)) <= 300
