"""The same layout by other methods: what layered rendering is compared with.

    image = draw(pipe, layout, method="boxdiff", generator=torch.Generator().manual_seed(0))

| method | paper | what it changes | U-Net samples a step |
|---|---|---|---|
| plain | Ho and Salimans 2022 | nothing: the caption alone | 2 |
| multidiffusion | Bar-Tal et al. 2023 | each region is predicted apart | 2 a region |
| paint-with-words | Balaji et al. 2022 (eDiff-I) | the attention to words | 2 |
| layout-guidance | Chen, Laina, Vedaldi 2023 | x_t, by a gradient | 2; in the first 20 %: 2 + 5·3 |
| boxdiff | Xie et al. 2023 | x_t, by a gradient | 2; in the first half: 2 + 3 or more |

(A backward pass counts as two samples.) Every method starts from the same noise for the same
generator, as `LayeredRenderingPipeline` does.

The last three steer the words of the *caption*, so it must name every layer. Of a layer the methods
know its prompt, word, negative prompt and shape; colour, strength, start and end are layered
rendering's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lrd_helpers.attention import AttentionMaps, control_words
from lrd_helpers.layout import Layout
from lrd_helpers.sampling import Sampling, noise_level
from lrd_helpers.words import every_word, layer_words

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@torch.inference_mode(False)  # no gradient could be taken there
@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline,
    layout: Layout,
    *,
    method: str | Baseline = "plain",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    negative_prompt: str = "",
    generator: torch.Generator | None = None,
    latents: Float[Tensor, "1 channels height_ width_"] | None = None,
    output_type: str = "pil",
) -> Image.Image | np.ndarray | Tensor:
    """Draw one picture of `layout`; the pipeline is left as it was found.

    Args:
        pipe: any pipeline of Stable Diffusion 1.x or 2.x, ours included.
        layout: what should be where.
        method: a name of `BASELINES` (with published constants), or options of your own, such as
            `BoxDiff(strength=10)`.
        height: of the picture in pixels, divisible by 8; the model's own size by default.
        width: likewise.
        num_inference_steps: T, the denoising steps.
        guidance_scale: γ of classifier-free guidance, s + γ (s(y) − s); off where γ ≤ 1.
        negative_prompt: in place of the empty prompt.
        generator: where the noise comes from.
        latents: the initial noise ~ N(0, I), instead of drawing it.
        output_type: "pil"; "np" (height width 3) or "pt" (3 height width) in [0, 1]; "latent".

    Raises:
        ValueError: an argument that cannot work, before the first U-Net call; as a `WordError`,
            that the caption does not name a layer.
    """
    if isinstance(method, str):
        if method not in BASELINES:
            raise ValueError(
                f"method is {method!r}, but should be one of {', '.join(BASELINES)}, or options "
                "such as BoxDiff(strength=10)"
            )
        method = BASELINES[method]
    try:
        run = Sampling.begin(
            pipe,
            layout,
            size=(height, width),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            generator=generator,
            latents=latents,
        )
        latents = method.sample(run)
        if output_type == "latent":
            return latents
        images = pipe.vae.decode(
            latents / pipe.vae.config.scaling_factor, return_dict=False, generator=generator
        )[0]
        images, nsfw = pipe.run_safety_checker(images, latents.device, latents.dtype)
    finally:
        pipe.maybe_free_model_hooks()
    shown = [True] if nsfw is None else [not hit for hit in nsfw]
    return pipe.image_processor.postprocess(images, output_type, do_denormalize=shown)[0]


# ------------------------------------------------------------------ plain


@dataclass(frozen=True)
class Plain:
    """The caption alone: s(x_t) + γ (s(x_t, caption) − s(x_t)) (Ho and Salimans 2022, Eq. 6)."""

    def sample(self, run: Sampling) -> Float[Tensor, "1 channels height width"]:
        x = run.noise
        for _, t in run.steps():
            x = run.step(run.scores(x, t, [run.layout.caption]), t, x)
        return x


# ------------------------------------------------------------------ MultiDiffusion


@dataclass(frozen=True)
class MultiDiffusion:
    """Each region is denoised with its own prompt; a cell takes the mean of its regions.

        Ψ(x_t) = Σ_i M_i ⊗ Φ(x_t^i, y_i) / Σ_j M_j             (Bar-Tal et al. 2023, section 3)
        x_t^i  = M_i ⊗ x_t + (1 − M_i) ⊗ b_t                    (bootstrapping, section 4.2)

    b_t is a random flat colour, noised to t, new at each step: an object that begins in front of it
    does not grow beyond its mask. As Φ is linear in the prediction, the mean of the predictions
    gives the same Ψ, and it is right for schedulers that add noise as well.

    Attributes:
        bootstrapping: the share of the steps, in [0, 1], that have it: the first 20 % in the paper.
    """

    bootstrapping: float = 0.2

    def __post_init__(self) -> None:
        _check_options(self, shares=("bootstrapping",))

    def sample(self, run: Sampling) -> Float[Tensor, "1 channels height width"]:
        layout, x = run.layout, run.noise
        size = x.shape[-2:]
        shares = layout.masks(*size, overlap="mean").to(x)[:, None]  # M_i / Σ_j M_j
        masks = torch.stack([torch.ones(size), *(layer.cells(*size) for layer in layout.layers)])
        masks = masks.to(x)[:, None]
        prompts = [layout.background or layout.caption, *(one.prompt for one in layout.layers)]
        negatives = [None, *(layer.negative_prompt for layer in layout.layers)]
        if not shares[0].any():  # layers cover the background
            shares, masks, prompts, negatives = shares[1:], masks[1:], prompts[1:], negatives[1:]
        begin = round(self.bootstrapping * len(run.timesteps))
        colours = [run.flat_latents() for _ in range(begin)]
        unit_noise = x / run.pipe.scheduler.init_noise_sigma
        for i, t in run.steps():
            views = x.expand(len(prompts), -1, -1, -1)
            if i < begin:
                chosen = (run.uniform(len(prompts)) * begin).long()
                flat = torch.cat([colours[number] for number in chosen])
                behind = run.pipe.scheduler.add_noise(
                    flat, unit_noise.expand_as(flat), t.expand(len(flat))
                )
                views = masks * views + (1 - masks) * behind
            scores = run.scores(views, t, prompts, negatives)
            x = run.step((shares * scores).sum(0, keepdim=True), t, x)
        return x


# ------------------------------------------------------------------ paint-with-words


@dataclass(frozen=True)
class PaintWithWords:
    """Forward guidance: where a layer is, its words get more attention (eDiff-I, section 4.3).

        softmax((QKᵀ + w A) / √d) V,    w = w′ · log(1 + σ) · max(QKᵀ)

    A is 1 where a token belongs to a layer that is visible there, and σ is the noise level.

    Attributes:
        strength: w′. The paper leaves it to the user.
    """

    strength: float = 0.4

    def __post_init__(self) -> None:
        _check_options(self)

    def sample(self, run: Sampling) -> Float[Tensor, "1 channels height width"]:
        words = layer_words(run.layout, run.tokens)
        masks = run.layout.masks(*run.noise.shape[-2:])[1:]
        places = [
            ([token for word in own.phrase for token in run.tokens.positions(*word)], mask)
            for own, mask in zip(words, masks, strict=True)
        ]

        def control(logits: Tensor, name: str, t: Tensor) -> Tensor | None:
            weight = self.strength * math.log1p(noise_level(run.pipe.scheduler, t))
            return painted(logits, places, weight) if weight else None

        with run.watched(words=words[0].thing, guided=run.guided, control=control):
            return Plain().sample(run)


def painted(
    logits: Float[Tensor, "rows heads height width tokens"],
    places: Sequence[tuple[Sequence[int], Float[Tensor, "_ _"]]],
    weight: float,
) -> Float[Tensor, "rows heads height width tokens"]:
    """(QKᵀ + `weight` · max(QKᵀ) · A) / √d from QKᵀ/√d, the maximum being that of each picture.

    Args:
        logits: QKᵀ/√d of one layer of the U-Net.
        places: the tokens of each word or phrase, and its mask (of any size).
        weight: w′ · log(1 + σ).
    """
    largest = logits.amax(dim=(1, 2, 3, 4), keepdim=True)
    for tokens, mask in places:
        logits = control_words(logits, tokens, mask, add=weight * largest)
    return logits


# ------------------------------------------------------------------ layout-guidance


@dataclass(frozen=True)
class LayoutGuidance:
    """Backward guidance: x_t moves so that words attend to their boxes (Chen et al. 2023, 3.3).

        E(A, B, i) = (1 − Σ_{u ∈ B} A_ui / Σ_u A_ui)²
        x̂_t ← x̂_t − η σ_t² ∇ mean E,       x̂_t = x_0 + σ_t ε

    for each word i of each layer, each head, and the maps of the U-Net's middle and of its first
    block up with cross-attention. The U-Net looks at x_t = x̂_t / √(1 + σ_t²), for which the same
    step is x_t ← x_t − η σ_t² / (1 + σ_t²) ∇ mean E. Maps are their code's: of each word apart.

    Attributes:
        strength: η (30 in their code).
        steps: the share of the steps, in [0, 1], that are guided (10 of 51).
        repeats: how often x_t moves in each of them, at most.
        threshold: guidance ends for good where the mean energy is not above it.
    """

    strength: float = 30.0
    steps: float = 0.2
    repeats: int = 5
    threshold: float = 0.2

    def __post_init__(self) -> None:
        _check_options(self, shares=("steps",))

    def sample(self, run: Sampling) -> Float[Tensor, "1 channels height width"]:
        words = layer_words(run.layout, run.tokens)
        blocks = middle_and_first_up(run.pipe.unet)
        watched = {
            "words": [word for own in words for word in own.phrase],
            "layers": lambda name: name.startswith(blocks),
            "heads": True,
        }

        def mean_energy(attention: AttentionMaps) -> Float[Tensor, ""]:
            energies = []
            for own, layer in zip(words, run.layout.layers, strict=True):
                maps = [m for word in own.phrase for m in attention.detailed(*word).values()]
                parts = [attention_energy(m[0, 0], layer.cells(*m.shape[-2:])) for m in maps]
                energies.append(torch.stack(parts).mean())
            return torch.stack(energies).mean()

        x, energy, last = run.noise, math.inf, round(self.steps * len(run.timesteps))
        for i, t in run.steps():
            variance = noise_level(run.pipe.scheduler, t) ** 2
            rate = self.strength * variance / (1 + variance)
            for _ in range(self.repeats if i < last else 0):
                if energy <= self.threshold:
                    break
                energy, x = run.descended(x, t, mean_energy, rate, **watched)
            x = run.step(run.scores(x, t, [run.layout.caption]), t, x)
        return x


def attention_energy(
    maps: Float[Tensor, "heads height width"], inside: Bool[Tensor, "height width"]
) -> Float[Tensor, ""]:
    """E = (1 − Σ_{u ∈ B} A_u / Σ_u A_u)², the mean over heads, in [0, 1] (Chen et al. 2023)."""
    share = (maps * inside.to(maps)).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))
    return (1 - share).square().mean()


def middle_and_first_up(unet: torch.nn.Module) -> tuple[str, ...]:
    """How the names of the layers begin whose maps layout-guidance looks at."""
    ups = [n for n, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")]
    return ("mid_block.", *(f"up_blocks.{number}." for number in ups[:1]))


# ------------------------------------------------------------------ BoxDiff


@dataclass(frozen=True)
class BoxDiff:
    """x_t moves so that words fill their boxes and nothing else (Xie et al. 2023, section 3.2).

        L = Σ_layers (L_inner + L_outer + L_corner)     (`box_constraints`)
        x_t ← x_t − α_t ∇L,      α_t = α √(1 − t′/2),   t′ from 0 to 1 over the steps

    on the word's share among the words of the caption, softmax(100 A), smoothed; A is the mean of
    the maps nearest to 16 × 16. As in their code, x_t also moves along the worst L_inner alone at
    three of the steps, until the target is reached (Attend-and-Excite's refinement).

    Attributes:
        strength: α.
        steps: the share of the steps, in [0, 1], that are guided (25 of 50).
        brightest: P: of the cells in and outside the box, the share that counts.
        corner: L: how many cells on either side of a box's edge its corners are compared in.
        refine: (share of the steps, share of attention to reach there) for each such step.
        refinements: moves at each of these, at most; 0 = none.
    """

    strength: float = 20.0
    steps: float = 0.5
    brightest: float = 0.2
    corner: int = 1
    refine: tuple[tuple[float, float], ...] = ((0.0, 0.05), (0.2, 0.5), (0.4, 0.8))
    refinements: int = 20

    def __post_init__(self) -> None:
        _check_options(self, shares=("steps", "brightest"))

    def sample(self, run: Sampling) -> Float[Tensor, "1 channels height width"]:
        words = layer_words(run.layout, run.tokens)
        caption = every_word(run.tokens)

        def constraints(attention: AttentionMaps) -> Float[Tensor, "layers 3"]:
            maps = maps_nearest_to(16 * 16, [attention.per_layer(*word) for word in caption])
            shares = (100 * maps).softmax(dim=0)
            rows = []
            for own, layer in zip(words, run.layout.layers, strict=True):
                share = shares[[caption.index(word) for word in own.thing]].sum(dim=0)
                cells = layer.cells(*share.shape)
                rows.append(box_constraints(smoothed(share), cells, self.brightest, self.corner))
            return torch.stack(rows)

        def worst_inner(attention: AttentionMaps) -> Float[Tensor, ""]:
            return constraints(attention)[:, 0].max()

        def everything(attention: AttentionMaps) -> Float[Tensor, ""]:
            return constraints(attention).sum()

        x, count = run.noise, len(run.timesteps)
        targets = {round(share * count): target for share, target in self.refine}
        for i, t in run.steps():
            rate = self.strength * math.sqrt(1 - 0.5 * i / max(1, count - 1))
            for _ in range(self.refinements if i in targets else 0):
                loss, moved = run.descended(x, t, worst_inner, rate)
                if loss <= 1 - targets[i]:
                    break
                x = moved
            if i < round(self.steps * count):
                _, x = run.descended(x, t, everything, rate)
            x = run.step(run.scores(x, t, [run.layout.caption]), t, x)
        return x


def box_constraints(
    share: Float[Tensor, "height width"],
    inside: Bool[Tensor, "height width"],
    brightest: float,
    corner: int,
) -> Float[Tensor, "3"]:
    """L_inner, L_outer, L_corner of one word (Xie et al. 2023, Eq. 3 to 6).

        L_inner  = 1 − mean of the brightest P of the cells in the box
        L_outer  = mean of the brightest P of the cells outside
        L_corner = mean over columns |max_rows A − max_rows M| · near an edge, and so for rows

    Their code has no number for a box of less than 1/P cells; here one cell counts at least.
    """
    mask = inside.to(share)
    zero = share.new_zeros(())

    def bright(cells: Float[Tensor, "height width"]) -> Float[Tensor, ""]:
        if not cells.any():  # no outside
            return zero
        count = max(1, int(cells.sum() * brightest))
        return (share * cells).flatten().topk(count).values.mean()

    differences = zero
    for axis in (0, 1):
        seen, asked = share.amax(dim=axis), mask.amax(dim=axis)
        covered = asked.nonzero()[:, 0]
        near = torch.zeros_like(asked)
        for edge in (int(covered[0]), int(covered[-1]) + 1):
            near[max(edge - corner, 0) : edge + corner + 1] = 1
        differences = differences + ((seen - asked).abs() * near).mean()
    return torch.stack([(1 - bright(mask)).clamp(min=0), bright(1 - mask), differences])


def smoothed(share: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    """3 × 3 Gaussian; its exponent −(d / 2σ)² with σ = 0.5 is that of their code."""
    bell = torch.exp(-torch.tensor([1.0, 0.0, 1.0])).to(share)
    kernel = bell[:, None] * bell / (bell.sum() ** 2)
    padded = functional.pad(share[None, None], (1, 1, 1, 1), mode="reflect")
    return functional.conv2d(padded, kernel[None, None])[0, 0]


def maps_nearest_to(
    positions: int, maps: Sequence[dict[str, Float[Tensor, "1 _ _"]]]
) -> Float[Tensor, "words height width"]:
    """Each word's mean over the U-Net's layers whose maps have about so many positions."""
    sizes = {tuple(one.shape[-2:]) for one in maps[0].values()}
    size = min(sizes, key=lambda size: abs(math.log(size[0] * size[1] / positions)))
    alike = [[one[0] for one in own.values() if tuple(one.shape[-2:]) == size] for own in maps]
    return torch.stack([torch.stack(own).mean(dim=0) for own in alike])


def _check_options(options: Baseline, *, shares: Sequence[str] = ()) -> None:
    for name, value in vars(options).items():
        if isinstance(value, tuple):
            continue
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}, but should be a finite number ≥ 0")
        if name in shares and value > 1:
            raise ValueError(f"{name} is {value}, but should be a share between 0 and 1")


Baseline = Plain | MultiDiffusion | PaintWithWords | LayoutGuidance | BoxDiff

BASELINES: dict[str, Baseline] = {
    "plain": Plain(),
    "multidiffusion": MultiDiffusion(),
    "paint-with-words": PaintWithWords(),
    "layout-guidance": LayoutGuidance(),
    "boxdiff": BoxDiff(),
}
"""The methods by name, with published constants."""
