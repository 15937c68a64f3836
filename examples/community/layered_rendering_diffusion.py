"""Layered Rendering Diffusion (LRDiff) for diffusers: boxes or masks → picture, no training.

Generated from `lrd_helpers` 0.1.0 (https://github.com/layered-rendering-diffusion/lrd-course)
by its examples/community/generate.py: change it there. That package also has nine other methods
that obey boxes (the best is a collage, which is no LRDiff), Stable Diffusion XL, and a course.

    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        custom_pipeline="layered_rendering_diffusion.py",  # the path of this file
        trust_remote_code=True,
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe(
        "a red car and a yellow star at night",
        [("a red car", (0.05, 0.55, 0.50, 0.95)), ("a yellow star", (0.60, 0.05, 0.95, 0.40))],
        background="at night",
        generator=torch.Generator().manual_seed(0),
    ).images[0]

Algorithm 1 is `layered_denoising`, right below the imports. Its guidance ξ is `vision_guidance`, δ
is `constant_delta`, `contrast_delta` or `dynamic_delta`; what the paper leaves open is `Choices`.
The pipeline is the last part.

Licence: MIT. Please cite the paper, whose authors have no part in this file:

    @inproceedings{qi2024lrdiff,
      title     = {Layered Rendering Diffusion Model for Controllable Zero-Shot Image Synthesis},
      author    = {Qi, Zipeng and Huang, Guoxi and Liu, Chenyang and Ye, Fei},
      booktitle = {European Conference on Computer Vision (ECCV)},
      year      = {2024},
      note      = {arXiv:2311.18435}
    }
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import math
import numbers
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy
import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, SchedulerMixin, StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    rescale_noise_cfg,
    retrieve_timesteps,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor
from PIL import ImageColor
from torch import Tensor, nn
from torch.nn import functional
from torch.nn import functional as F

# -------------------------------------------------------------------------------------- Algorithm 1


def layered_denoising(run: Run, choices: Choices) -> Iterator[State]:
    """Layers are composed at every step down to t0, then the caption goes on (LRDiff, Algorithm 1).

    With guide="noise" ξ is not seen at each step, but painted into the initial noise once.
    """
    plan = prepared(run, choices)  # who is asked what, where, with ξ^1 … ξ^n
    x = run.x_T
    if choices.guide != "steps" and plan.layered:
        x = plan.regions[0].composed(painted(run, plan))
    for i, t in run.steps.until(plan.end):  # t = T … t0
        regions = plan.regions[i]
        seen = run.seen(x, t, regions)
        scores = run.scores(seen, t, regions)  # s + γ (s_y − s) at x_t + ξ^i, one batch
        phi = regions.composed(scores)  # Φ_t = Σ_i M^i ⊙ …             (Eq. 8b)
        x = run.step(phi, t, x)  # x_{t−1} = α̃ x_t + β̃ Φ_t + σ ε        (Eq. 8a)
        if i < plan.repeats:
            x = x + plan.regions[0].composed(repeated(run, plan, i))
        state = State(i, t, x, regions, seen, scores, xi=plan.xi if i < plan.layered else None)
        yield state
        x = state.x
    yield from general_denoising(run, x, start=plan.end)  # t = t0 − 1 … 1


# ----------------------------------------------------------------- its last steps: the prompt alone


def general_denoising(run: Run, x: Tensor, start: int = 0) -> Iterator[State]:
    """Classifier-free guidance with the caption at each step from `start` on.

    Ho and Salimans 2022, Eq. 6; in LRDiff's Algorithm 1 the steps from t0 − 1 to 1.
    """
    regions = captions(run)
    for i, t in run.steps.since(start):
        state = caption_step(run, regions, i, t, x)
        yield state
        x = state.x


def caption_step(run: Run, regions: Regions, i: int, t: Tensor, x: Tensor) -> State:
    """x_{t−1} from s(x_t) + γ (s(x_t, caption) − s(x_t))."""
    seen = run.seen(x, t)
    scores = run.scores(seen, t, regions)
    return State(i, t, run.step(scores, t, x), regions, seen, scores)


# ------------------------------------------------------------------------- vision guidance: δ and ξ


NORM = 2.0
"""The Euclidean norm of a constant δ: about that of one cell of x_T ~ N(0, I) in 4 channels."""


EARLY_REPEAT = 0.01
"""The share of ξ that an early repeat adds once more (the authors' script: "about 1 %")."""


GREY = "#808080"
"""The colour without a direction: δ points from its latent to that of the colour asked for."""


BACKGROUND_NOISE = 0.8
"""Where, as a share of the training timesteps, the background is asked for that δ contrasts with:
all is open still, and x̂_0 does not yet divide by an α of nearly zero."""


def vision_guidance(
    delta: Annotated[Tensor, "channels"],
    mask: Annotated[Tensor, "height width"],
    inside: float,
    outside: float,
) -> Annotated[Tensor, "channels height width"]:
    """ξ = δ·(inside·M − outside·(1 − M)): added to one layer's noisy latents (LRDiff, Eq. 5).

    `inside` = `outside` = λ is the paper; 0.05 / 0.20 is the authors' script.
    """
    return delta[:, None, None] * (inside * mask - outside * (1 - mask))


@torch.no_grad()
def constant_delta(
    vae: AutoencoderKL,
    colour: str,
    *,
    size: int = 128,
    device: torch.device | str | None = None,
) -> Annotated[Tensor, "channels"]:
    """δ of a flat colour: from grey's latent to the colour's, scaled to norm `NORM` (LRDiff, 3.2).

        z(c) = scaling_factor · mean over cells of E(flat picture of colour c)
        δ    = NORM · (z(colour) − z(grey)) / |z(colour) − z(grey)|

    The paper takes z(colour) itself, chosen by a person. Without taking grey away δ would mostly
    say "a flat picture", whatever the colour; and with one norm for all, a strength λ means the
    same for every colour and model. λ = 0.2 is what our trial used.

    Args:
        vae: the autoencoder of the model that will be guided (δ is in its latent space).
        colour: a CSS name or a hex like "#ff8800".
        size: height and width of the flat pictures in pixels.
        device: where to compute; the autoencoder's own by default.

    Returns:
        δ in single precision; zero where the colour is grey itself.

    Raises:
        ValueError: the colour is no name and no hex.
    """
    flat = colour_latents(vae, [GREY, colour], size=size, device=device)
    return NORM * torch.nn.functional.normalize(flat[1] - flat[0], dim=0)


@torch.no_grad()
def colour_latents(
    vae: AutoencoderKL,
    colours: Sequence[str],
    *,
    size: int = 128,
    device: torch.device | str | None = None,
) -> Annotated[Tensor, "colours channels"]:
    """z(c) = scaling_factor · mean over cells of E(flat picture of colour c), in single precision.

    The arguments are those of `constant_delta`, and so is the error.
    """
    device = vae.device if device is None else device
    rgb = torch.tensor([ImageColor.getrgb(c)[:3] for c in colours], dtype=torch.float32)
    pixels = (rgb / 127.5 - 1)[:, :, None, None].expand(-1, -1, size, size)
    return encode_images(vae, pixels.to(device, vae.dtype)).float().mean(dim=(2, 3))


def contrast_delta(
    colour: Annotated[Tensor, "channels"],
    background: Annotated[Tensor, "channels height width"],
    mask: Annotated[Tensor, "height width"],
) -> Annotated[Tensor, "channels"]:
    """δ from what the background would be in a layer's place to the layer's colour (ours).

        δ = NORM · (z(colour) − b) / |z(colour) − b|,    b = mean of x̂_0(background) over M

    A colour's direction from grey says little where the place has that colour: pink on snow.

    Args:
        colour: z(colour), of `colour_latents`.
        background: clean latents that the model expects for the background's prompt.
        mask: M, 1 where the layer is; not empty.
    """
    b = (mask * background.float()).sum(dim=(1, 2)) / mask.sum()
    return NORM * torch.nn.functional.normalize(colour - b, dim=0)


def dynamic_delta(
    latents: Annotated[Tensor, "channels height width"],
    attention: Annotated[Tensor, "height width"],
    top_k: int,
) -> Annotated[Tensor, "channels"]:
    """δ = 1/|S| · Σ_{(j,k) ∈ S} x_T[j,k], S the `top_k` positions of largest attention (Eq. 6).

    The paper's λ is not in it: it is the strength that `vision_guidance` multiplies δ with.

    Args:
        latents: x_T ~ N(0, I).
        attention: the map of the object's word at t = T, of the same height and width.
        top_k: K, from 1 to height · width.
    """
    chosen = attention.flatten().topk(top_k).indices
    return latents.flatten(1)[:, chosen].float().mean(dim=1)


@torch.no_grad()
def decoded_delta(
    vae: AutoencoderKL,
    latents: Annotated[Tensor, "channels height width"],
    attention: Annotated[Tensor, "height width"],
    top_k: int,
) -> Annotated[Tensor, "channels"]:
    """δ as the authors' script has it: the latent of the mean colour that x_T shows at the object.

        rgb = D(x_T / scaling_factor)                        the initial noise as a picture
        c   = mean of rgb at the `top_k` pixels of largest attention, the map brought to its size
        δ   = scaling_factor · mean over cells of E(flat picture of colour c)

    Args:
        vae: the autoencoder of the model that will be guided.
        latents: x_T ~ N(0, I).
        attention: the map of the object's word at t = T, of any height and width.
        top_k: how many pixels; 20 in the script.
    """
    rgb = decode_latents(vae, latents[None].to(vae.dtype))[0].float()
    pixels = torch.nn.functional.interpolate(
        attention[None, None].float(), size=rgb.shape[-2:], mode="bilinear"
    )
    colour = dynamic_delta(rgb, pixels[0, 0], top_k)
    flat = colour[None, :, None, None].expand(-1, -1, *rgb.shape[-2:])
    return encode_images(vae, flat.to(vae.dtype))[0].float().mean(dim=(1, 2))


def prepared(run: Run, choices: Choices) -> Plan:
    """What comes before the first step: ξ, the plan, and the texts' embeddings."""
    xi = vision_fields(run, choices) if phases(run, choices).layered else None
    plan = make_plan(run, choices, xi)
    run.model.encode_texts(plan.texts)
    return plan


def painted(run: Run, plan: Plan) -> Rows:
    """x_T + ξ^i, a row a region, in the scheduler's units: Euler's are σ times larger."""
    regions, unit = plan.regions[0], run.steps.unit(run.steps.timesteps[0])
    return run.x_T[regions.picture] + _fields_of_rows(run, plan) / unit


def repeated(run: Run, plan: Plan, i: int) -> Rows:
    """The share of ξ^i that is added again after step i."""
    unit = run.steps.unit(run.steps.timesteps[i + 1])
    return EARLY_REPEAT * _fields_of_rows(run, plan) / unit


def _fields_of_rows(run: Run, plan: Plan) -> Rows:
    entries = plan.regions[0].entries
    return stacked([plan.xi[e.picture][e.layer - 1] if e.layer else None for e in entries], run.x_T)


def vision_fields(run: Run, choices: Choices) -> Fields:
    """ξ of each layer of each picture, None where it is zero (LRDiff, section 3.2).

    ξ is built on a layer's whole shape, also where others hide it: a half-hidden car is still a
    whole car behind.
    """
    # In units of N(0, I), which the latents of some schedulers are not.
    noise = run.steps.model_input(run.x_T, run.steps.timesteps[0])
    maps = _attention_maps(run, choices, noise)
    expected = noise
    if choices.delta == "contrast" and choices.guided:
        expected = expected_backgrounds(run, noise)
    colours: dict[str, Tensor] = {}  # what the autoencoder says of each, computed once
    fields: list[list[Tensor | None]] = []
    for number, layout in enumerate(run.layouts):
        fields.append([])
        for layer in layout.layers:
            attention, field = None, None
            if is_guided(layer, choices):
                attention = next(maps) if choices.looks else None
                delta = _delta(run, choices, layer, expected[number], attention, colours)
                field = None if delta is None else _field(choices, layer, delta, attention, noise)
            fields[-1].append(field)
    return fields


def is_guided(layer: Layer, choices: Choices) -> bool:
    """Whether a layer may have a ξ."""
    return bool(layer.strength and choices.guided)


def layers_looked_at(run: Run, choices: Choices) -> list[tuple[int, Layer]]:
    """The layers whose attention makes their δ, each with the number of its picture."""
    if not choices.looks:
        return []
    return [
        (number, layer)
        for number, layout in enumerate(run.layouts)
        for layer in layout.layers
        if is_guided(layer, choices)
    ]


def check_words(run: Run, choices: Choices) -> None:
    """Refuse layers whose word is not in their prompt, where its attention is looked at.

    Raises:
        WordError: it names the layer.
    """
    if not choices.looks:
        return
    for layout in run.layouts:
        for number, layer in enumerate(layout.layers):
            tokens_of_object(run, number, layer)


def tokens_of_object(run: Run, number: int, layer: Layer) -> list[int]:
    """Which tokens of a layer's prompt are its object, `number` being the layer's.

    Raises:
        WordError: none are; it names the layer.
    """
    try:
        return run.model.tokens(layer.prompt).positions(object_of_layer(layer))
    except WordError as error:
        raise WordError(f"{layer_name(number, layer)}, word: {error}") from None


def expected_backgrounds(
    run: Run, noise: Annotated[Tensor, "pictures channels height width"]
) -> Annotated[Tensor, "pictures channels height width"]:
    """x̂_0 of each picture's background, from the noise that the picture begins with."""
    t = run.steps.timestep_at(BACKGROUND_NOISE)
    prompts = [background_prompt(layout) for layout in run.layouts]
    x, numbers = run.steps.coefficients(t)[1] * noise, range(len(noise))
    answers = run.model(x, t, prompts, numbers, [True] * len(noise), watched=False)
    return run.steps.x0(x, answers, t)


def _delta(
    run: Run,
    choices: Choices,
    layer: Layer,
    expected: Annotated[Tensor, "channels height width"],
    attention: Annotated[Tensor, "height width"] | None,
    colours: dict[str, Tensor],
) -> Annotated[Tensor, "channels"] | None:
    """δ of a layer; `expected` is the picture's noise, or with "contrast" its background."""
    vae = run.model.pipe.vae
    if choices.delta == "dynamic":
        return dynamic_delta(expected, attention, choices.top_k)
    if choices.delta == "decoded":
        return decoded_delta(vae, expected, attention, choices.top_k).to(expected.device)
    colour = layer.colour or colour_of_prompt(layer.prompt)
    if colour is None:
        return None
    if choices.delta == "constant":
        if colour not in colours:
            colours[colour] = constant_delta(vae, colour, device=expected.device)
        return colours[colour]
    if colour not in colours:
        [colours[colour]] = colour_latents(vae, [colour], device=expected.device)
    mask = layer.cells(*expected.shape[-2:]).to(expected.device, torch.float32)
    return contrast_delta(colours[colour], expected, mask)


def _field(
    choices: Choices,
    layer: Layer,
    delta: Annotated[Tensor, "channels"],
    attention: Annotated[Tensor, "height width"] | None,
    noise: Annotated[Tensor, "pictures channels height width"],
) -> Annotated[Tensor, "channels height width"]:
    mask = layer.cells(*noise.shape[-2:]).to(noise.device, torch.float32)
    strengths = choices.inside * layer.strength, choices.outside * layer.strength
    field = vision_guidance(delta, mask, *strengths)
    if choices.weighted:
        field = torch.where(mask > 0, field * attention / attention.max(), field)
    return field


def _attention_maps(
    run: Run, choices: Choices, noise: Annotated[Tensor, "pictures channels height width"]
) -> Iterator[Annotated[Tensor, "height width"]]:
    """Where the model looks at t = T when it reads each layer's word (LRDiff, section 3.2)."""
    layers = layers_looked_at(run, choices)
    size = run.model.rows_at_once(noise)
    for first in range(0, len(layers), size):
        numbers = [number for number, _ in layers[first : first + size]]
        prompts = [layer.prompt for _, layer in layers[first : first + size]]
        words = [object_of_layer(layer) for _, layer in layers[first : first + size]]
        with run.model.watched_rows(prompts, layers=choices.attention) as attention:
            x, t = noise[numbers], run.steps.timesteps[0]
            run.model(x, t, prompts, numbers, [True] * len(prompts))
        for row, word in enumerate(words):
            yield attention.pooled(word, prompt=row, size=run.size)[0]


# ---------------------------------------------------------- who is asked what, where, at which step


Fields = Sequence[Sequence[Tensor | None]]
"""ξ of each layer of each picture, None where it is zero."""


@dataclass(frozen=True)
class Phases:
    """How the steps are shared out.

    Attributes:
        fuse: as in `Choices`; "collage" is "steps" where every layer fills the canvas and hides it.
        layered: so many steps, from the first on, are layered (with a collage: left out).
        alone: in so many of them each layer runs alone.
    """

    fuse: Fuse
    layered: int
    alone: int


@dataclass(frozen=True)
class Plan:
    """What the U-Net is asked, step by step.

    Attributes:
        regions: for each step; steps that ask the same have the same `Regions`.
        layered: so many steps are layered: t0 of Algorithm 1.
        end: from this step on, only the captions are asked. Later than `layered` where a layer has
            a later end of its own.
        repeats: after so many first steps a share of ξ is added again.
        xi: ξ of each layer; None where no step is layered.
    """

    regions: list[Regions]
    layered: int
    end: int
    repeats: int
    xi: Fields | None

    @property
    def texts(self) -> list[str]:
        """All texts that will be asked, each once."""
        entries = [entry for regions in dict.fromkeys(self.regions) for entry in regions.entries]
        return list(dict.fromkeys(text for e in entries for text in (e.prompt, e.negative)))


def make_plan(run: Run, choices: Choices, xi: Fields | None = None) -> Plan:
    """What the U-Net is asked at each step of a run; each batch is made once.

    Args:
        run: the layouts, their negative prompts and the steps.
        choices: see `regions_of`; `guide` says whether the regions have ξ.
        xi: ξ of each layer.
    """
    phase = phases(run, choices)
    made: dict[tuple, Regions] = {}
    steps, end = [], phase.layered
    for step in range(len(run.steps)):
        active = tuple(
            tuple(_takes_part(layer, step, phase.layered, len(run.steps)) for layer in each.layers)
            for each in run.layouts
        )
        layered = step < phase.layered
        key = layered, active
        if any(map(any, active)):
            end = max(end, step + 1)
        if key not in made:
            entries = [
                region
                for number in range(len(run.layouts))
                for region in regions_of(run, number, active[number], choices, phase.fuse, layered)
            ]
            if xi is not None and layered and choices.guide != "noise":
                entries = [
                    replace(region, field=_seen_field(run, region, choices, xi))
                    if region.layer
                    else region
                    for region in entries
                ]
            made[key] = batched(entries, run.x_T, share=not (layered and phase.alone))
        steps.append(made[key])
    repeats = choices.early_repeats if choices.guide != "steps" else 0
    return Plan(steps, phase.layered, end, min(repeats, phase.layered, len(steps) - 1), xi)


def _seen_field(run: Run, region: Region, choices: Choices, xi: Fields) -> Tensor | None:
    """What a layer sees of its ξ at each step; with guide="both" only what is outside the layer."""
    field = xi[region.picture][region.layer - 1]
    if field is None or choices.guide == "steps":
        return field
    layer = run.layouts[region.picture].layers[region.layer - 1]
    return field * ~layer.cells(*run.size).to(field.device)


def regions_of(
    run: Run, number: int, active: Sequence[bool], choices: Choices, fuse: Fuse, layered: bool
) -> list[Region]:
    """The parts of one picture in one step, without ξ: the background and every layer in sight.

    Args:
        run: the layouts and their negative prompts.
        number: of the picture.
        active: for each layer whether it takes part in this step.
        choices: its `overlap`, `negative_objects` and `background_in_prompts` count here.
        fuse: see `Phases`.
        layered: whether this is a layered step, so that the background has its own prompt.
    """
    layout, negative = run.layouts[number], run.negatives[number]
    layers = [n for n, takes_part in enumerate(active) if takes_part]
    background = background_prompt(layout) if layered else layout.caption
    unwanted = [negative] if negative else []
    if layered and choices.negative_objects:
        unwanted += [layout.layers[n].prompt for n in layers]
    masks = torch.ones(1, *run.size)
    if layers:
        part = replace(layout, layers=[layout.layers[n] for n in layers])
        masks = part.masks(*run.size, overlap=choices.overlap)
    regions = [Region(number, 0, background, " and ".join(unwanted), masks[0])]
    for n, mask in zip(layers, masks[1:], strict=True):
        layer = layout.layers[n]
        unwanted_here = negative if layer.negative_prompt is None else layer.negative_prompt
        prompt = asked_prompt(layer, layout, choices)
        regions.append(Region(number, n + 1, prompt, unwanted_here, mask))
    # What is hidden completely costs nothing. The background is needed to find objects by.
    keeps_background = fuse == "collage" and layered
    return [
        region for region in regions if region.mask.any() or (keeps_background and not region.layer)
    ]


def background_prompt(layout: Layout) -> str:
    """What the U-Net is asked for the background: the caption where the layout has none."""
    return layout.background or layout.caption


def asked_prompt(layer: Layer, layout: Layout, choices: Choices) -> str:
    """What the U-Net is asked for a layer: its prompt, with the background if choices say so."""
    if choices.background_in_prompts and layout.background:
        return f"{layer.prompt} {layout.background}"
    return layer.prompt


def captions(run: Run) -> Regions:
    """The whole pictures, each asked for its caption: ordinary classifier-free guidance."""
    whole = torch.ones(run.size)
    return batched(
        [
            Region(number, 0, layout.caption, run.negatives[number], whole)
            for number, layout in enumerate(run.layouts)
        ],
        run.x_T,
    )


def _takes_part(layer: Layer, step: int, layered_steps: int, steps: int) -> bool:
    end = layered_steps if layer.end is None else round(layer.end * steps)
    return round(layer.start * steps) <= step < end


def layer_name(number: int, layer: Layer) -> str:
    """How messages call a layer: layer 1 'a red car'."""
    return f"layer {number + 1} {layer.prompt!r}"


def warn_of_hidden_layers(run: Run, method: Choices) -> None:
    """A layer that others cover completely is not drawn: say so."""
    for layout in run.layouts:
        masks = layout.masks(*run.size, overlap=method.overlap)
        for number, layer in enumerate(layout.layers):
            if masks[number + 1].any() or not layer.opacity:
                continue
            cells = layer.cells(*run.size)
            others = ", ".join(
                layer_name(n, other)
                for n, other in enumerate(layout.layers)
                if n != number and (other.cells(*run.size) & cells).any()
            )
            warnings.warn(
                f"{layer_name(number, layer)} is completely hidden by {others} and will not be "
                "drawn; move it to the front (later in the list) or make it larger",
                stacklevel=6,
            )


# ----------------------------------------------------------------------- what the paper leaves open


Delta = Literal["constant", "contrast", "dynamic", "decoded"]


Guide = Literal["steps", "noise", "both"]


Fuse = Literal["steps", "once", "collage"]


# ------------------------------------------------------------------------------- layers and layouts


Overlap = Literal["over", "small_over_large", "mean", "weighted"]
"""Whose a cell is that several layers cover; see `Layout.masks`."""


# ----------------------------------------------------------------------- what the paper leaves open


NAMED = {"delta": Delta, "guide": Guide, "fuse": Fuse, "overlap": Overlap}


@dataclass(frozen=True)
class Choices:
    """Every choice in which the paper, the authors' script and others differ.

    Attributes:
        delta: δ is "constant" (a colour's latent), "contrast" (from what the background would be
            there to the colour's latent: ours), "dynamic" (the mean of x_T where the object's word
            gets most attention, Eq. 6) or "decoded" (the same through the decoder: the script's
            reading).
        inside: strength of +δ where the layer is (λ = `inside` = `outside` is the paper).
        outside: strength of −δ where it is not.
        guide: ξ is added to what the U-Net sees at all layered "steps", or once, to the "noise"
            that the sampling starts from; or "both": once to the noise, and what of it is outside
            the layer also at all layered steps.
        early_repeats: where ξ is in the noise: after so many first steps one per cent of it is
            added again.
        attention: the layers whose maps a dynamic δ looks at.
        top_k: K, how many positions (with "decoded": pixels) of the map δ is the mean of.
        weighted: inside, ξ follows the attention map (over its largest value) instead of being the
            same everywhere.
        fuse: the layers are put together at all "steps": the paper's Algorithm 1, and all that
            there is here. `lrd_helpers` has two more.
        sketch_steps: of one of those.
        layered_fraction: which part of the steps, in [0, 1], is layered (the
            paper's t0).
        overlap: whose a cell is that several layers cover; see `Layout.masks`.
        negative_objects: the layers' prompts are negative prompts of the background.
        background_in_prompts: the background is added to each layer's prompt: "a red car at night".

    Raises:
        ValueError: a value that cannot work.
    """

    delta: Delta = "constant"
    inside: float = 0.2
    outside: float = 0.2
    guide: Guide = "steps"
    early_repeats: int = 0
    attention: Layers = "paper"
    top_k: int = 20
    weighted: bool = False
    fuse: Fuse = "steps"
    sketch_steps: int = 10
    layered_fraction: float = 0.6
    overlap: Overlap = "over"
    negative_objects: bool = False
    background_in_prompts: bool = False

    def __post_init__(self) -> None:
        for name, choice in NAMED.items():
            value, allowed = getattr(self, name), get_args(choice)
            if value not in allowed:
                should = f"should be one of {', '.join(allowed)}"
                raise ValueError(f"{name} is {excerpt(value)}, but {should}")
        for name in ("inside", "outside"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, but should be a finite number")
        if not 0 <= self.layered_fraction <= 1:
            raise ValueError(
                f"layered_fraction is {self.layered_fraction}, but should be between 0 (no layered "
                "step) and 1 (all steps)"
            )
        for name in ("top_k", "sketch_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but should be ≥ 1")
        if self.weighted and not self.looks:
            raise ValueError("weighted needs attention maps: set delta to 'dynamic' or 'decoded'")

    @property
    def looks(self) -> bool:
        """Whether δ depends on attention maps."""
        return self.delta in ("dynamic", "decoded")

    @property
    def guided(self) -> bool:
        """Whether there is vision guidance ξ at all."""
        return bool(self.inside or self.outside)


# -------------------------------------------------------------- one drawing: noise, guidance, steps


Pictures = Annotated[Tensor, "pictures channels height width"]


Rows = Annotated[Tensor, "rows channels height width"]


@dataclass
class State:
    """One step that was made. Whoever iterates over a method may record it, change it, or stop.

    Attributes:
        i: number of the step among its `timesteps`.
        t: the timestep.
        x: x_{t−1}, in the scheduler's units: of the pictures, or, where `alone`, of the regions.
        regions: what was asked.
        seen: x_t as the U-Net saw it, a row a region, without ξ; None where nothing was asked.
        scores: the guided predictions, a row a region.
        alone: whether each region still runs by itself.
        sketch: whether this step belongs to the sketches and not to the picture.
        xi: ξ of each layer of each picture, in layered steps.
        collage: the clean latents that the picture goes on from, after the sketches.
    """

    i: int
    t: Tensor
    x: Tensor
    regions: Regions
    seen: Rows | None = None
    scores: Rows | None = None
    alone: bool = False
    sketch: bool = False
    xi: Sequence[Sequence[Tensor | None]] | None = None
    collage: Pictures | None = None

    @property
    def latents(self) -> Pictures:
        """x_{t−1} of the pictures; where the regions run alone, put together by their masks.

        Setting it sets `x`: the pictures are then what every region goes on from.
        """
        return self.regions.composed(self.x) if self.alone else self.x


def returned_latents(changed: object, latents: Tensor) -> Tensor:
    """The latents that a callback returned; those of before, if it returned none.

    Raises:
        ValueError: no dict, or latents of another shape.
    """
    if not isinstance(changed, Mapping):
        raise ValueError(
            f"the callback returned {excerpt(changed)}, but should return None or a dict, such as "
            '{"latents": …}'
        )
    new = changed.get("latents", latents)
    if not isinstance(new, Tensor) or new.shape != latents.shape:
        given = tuple(new.shape) if isinstance(new, Tensor) else excerpt(new)
        raise ValueError(
            f"the callback returned latents {given}, but should return a tensor of the shape that "
            f"it was given, {tuple(latents.shape)}"
        )
    return new.to(latents)


@dataclass
class Run:
    """One drawing: what every method is given.

    Attributes:
        model: texts, U-Net and autoencoder.
        steps: the timesteps and the scheduler.
        layouts: what each picture should show.
        negatives: the negative prompt of each picture, "" for none.
        x_T: the initial noise, in the scheduler's units.
        guidance_scale: γ; no guidance where γ ≤ 1. It may be changed between steps.
        guidance_rescale: φ of Lin et al. 2024, Eq. 16; 0 = off.
        generator: where noise comes from; a list has one for each picture.
        canvas: pictures in [0, 1] that objects are put onto, instead of the background's.
        first_picture: the number of the first picture, where the run has a part of them.
    """

    model: Model
    steps: Steps
    layouts: Sequence[Layout]
    negatives: Sequence[str]
    x_T: Pictures
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    generator: Generators = None
    canvas: Annotated[Tensor, "pictures 3 height_ width_"] | None = None
    first_picture: int = 0

    def draw_noise(self, latents: Pictures | None = None) -> None:
        """x_T ~ N(0, I), given or drawn, times the scheduler's `init_noise_sigma`."""
        noise = self.noise(self.x_T.shape) if latents is None else latents.to(self.x_T)
        self.x_T = noise * self.steps.scheduler.init_noise_sigma

    @property
    def guided(self) -> bool:
        """Whether there is classifier-free guidance."""
        return self.guidance_scale > 1 and not self.model.distilled

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return tuple(self.x_T.shape[-2:])

    # -------------------------------------------------------------- one step

    def seen(self, x: Tensor, t: Tensor, regions: Regions | None = None) -> Rows:
        """x_t as the U-Net knows it, a row a region; of rows that are regions, without `regions`.

        `model_input` brings the latents of every scheduler to α² + σ² = 1. So a ξ that is added
        after it is as strong with Euler, whose latents are x_0 + (σ/α) ε, as with DDIM.
        """
        x = self.steps.model_input(x, t)
        return x if regions is None else x[regions.picture]

    def scores(self, seen: Rows, t: Tensor, regions: Regions) -> Rows:
        """s(x_t + ξ^i) + γ (s(x_t + ξ^i, y^i) − s(x_t + ξ^i)) for each region i  (LRDiff, Eq. 8b).

        Ordinary classifier-free guidance is the case of one region with M = 1 and ξ = 0.
        """
        shift = None if regions.field is None else self.steps.shift_of_input(t)
        x = seen if shift is None else seen + regions.field
        prompts = [region.prompt for region in regions.entries]
        pictures = [self.first_picture + region.picture for region in regions.entries]
        yes = [True] * len(prompts)
        if not self.guided:
            score = self.model(x, t, prompts, pictures, yes)
        else:
            rows = list(regions.region_of_row)
            negatives = [regions.entries[row].negative for row in rows]
            score = self.model(
                torch.cat([x[rows], x]),
                t,
                negatives + prompts,
                [pictures[row] for row in rows] + pictures,
                [False] * len(rows) + yes,
            )
            unconditional, conditional = score[: len(rows)], score[len(rows) :]
            unconditional = unconditional[regions.unconditional_of]
            score = unconditional + self.guidance_scale * (conditional - unconditional)
            if self.guidance_rescale > 0:
                score = rescale_noise_cfg(score, conditional, self.guidance_rescale)
        return score if shift is None else score + shift * regions.field

    def step(
        self, prediction: Tensor, t: Tensor, x: Tensor, regions: Regions | None = None
    ) -> Tensor:
        """x_{t−1}; of rows that are regions, with `regions`."""
        pictures = None if regions is None else [region.picture for region in regions.entries]
        return self.steps.step(prediction, t, x, pictures)

    # -------------------------------------------------------------- chance

    def noise(self, shape: Sequence[int]) -> Tensor:
        """N(0, 1) from the generator, or from each picture's."""
        return randn_tensor(tuple(shape), self.generator, self.x_T.device, self.x_T.dtype)

    # -------------------------------------------------------------- attention


# ------------------------------------------------ what the U-Net is asked in one step, as one batch


@dataclass(frozen=True)
class Region:
    """One part of one picture in one step: what is asked, and where the answer counts."""

    picture: int
    layer: int
    """0 is the background (or, in general denoising, the whole picture), i + 1 is `layers[i]`."""
    prompt: str
    negative: str
    """What stands for "no prompt"."""
    mask: Annotated[Tensor, "height width"]
    field: Annotated[Tensor, "channels height width"] | None = None
    """ξ, or None where it is zero."""


@dataclass(frozen=True, eq=False)
class Regions:
    """R regions of B pictures as one flat batch.

    Regions whose unconditional input is the same (same picture, ξ = 0, same negative prompt) share
    one of the U ≤ R unconditional rows.
    """

    entries: tuple[Region, ...]
    picture: Annotated[Tensor, "regions"]
    """The picture that region i is a part of."""
    pictures: int
    """B."""
    mask: Annotated[Tensor, "regions 1 height width"]
    """M^i: where its answer counts. In each picture the masks sum to 1 everywhere."""
    field: Annotated[Tensor, "regions channels height width"] | None
    """ξ^i, or None where all are zero."""
    region_of_row: tuple[int, ...]
    """The region whose input an unconditional row is computed on."""
    unconditional_of: Annotated[Tensor, "regions"]
    """The unconditional row that region i uses."""

    def composed(
        self, parts: Annotated[Tensor, "regions channels height width"]
    ) -> Annotated[Tensor, "pictures channels height width"]:
        """Σ_i M^i ⊙ parts^i for each picture."""
        whole = parts.new_zeros(self.pictures, *parts.shape[1:])
        # The masks partition the canvas: each cell gets one summand, in any order.
        return whole.index_add(0, self.picture, self.mask.to(parts) * parts)


def batched(
    entries: Sequence[Region],
    like: Annotated[Tensor, "pictures channels height width"],
    *,
    share: bool = True,
) -> Regions:
    """Regions of several pictures as one batch.

    Args:
        entries: the regions.
        like: latents of the pictures, for their number, device and precision.
        share: whether regions of one picture look at the same latents, so that those with ξ = 0
            have one unconditional row in common.
    """
    rows: dict[tuple, int] = {}  # (picture, negative prompt, ξ) → unconditional row
    region_of_row, unconditional_of = [], []
    for number, region in enumerate(entries):
        alone = number if region.field is not None or not share else None
        key = (region.picture, region.negative, alone)
        if key not in rows:
            rows[key] = len(region_of_row)
            region_of_row.append(number)
        unconditional_of.append(rows[key])
    guided = any(region.field is not None for region in entries)
    return Regions(
        entries=tuple(entries),
        picture=torch.tensor([region.picture for region in entries], device=like.device),
        pictures=len(like),
        mask=torch.stack([region.mask for region in entries])[:, None].to(like),
        field=stacked([region.field for region in entries], like) if guided else None,
        region_of_row=tuple(region_of_row),
        unconditional_of=torch.tensor(unconditional_of, device=like.device),
    )


def stacked(
    fields: Sequence[Tensor | None], like: Annotated[Tensor, "_ channels height width"]
) -> Annotated[Tensor, "regions channels height width"]:
    """Fields as one tensor in the precision of `like`, zero where there is none."""
    zero = torch.zeros_like(like[0])
    return torch.stack([zero if field is None else field.to(like) for field in fields])


# --------------------------------------------------------------------------------------- schedulers


MOST_NOISE = 100.0
"""The noise level that stands for pure noise; Stable Diffusion's own schedule ends at 14.6."""


KINDS: dict[str, Kind] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
"""A scheduler's `prediction_type` → what the network predicts."""


def is_a(scheduler: SchedulerMixin, name: str) -> bool:
    """Whether a scheduler is of this class; importing it would import SciPy's statistics, too."""
    return name in [kind.__name__ for kind in type(scheduler).__mro__]


Generators = torch.Generator | Sequence[torch.Generator] | None


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse schedulers that are none of Stable Diffusion's, in one sentence.

    Raises:
        ValueError: it has no noise schedule of α and σ, or predicts something else.
    """
    name = type(scheduler).__name__
    if not (hasattr(scheduler, "alphas_cumprod") or is_a(scheduler, "EDMEulerScheduler")):
        raise ValueError(
            f"{name} has no alphas_cumprod, so it is no scheduler of Stable Diffusion; use "
            "DDIMScheduler, EulerDiscreteScheduler or another one of pipe.scheduler.compatibles"
        )
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in KINDS:
        *first, last = map(repr, KINDS)
        raise ValueError(
            f"{name}'s prediction_type is {kind!r}, but should be {', '.join(first)} or {last}"
        )


def check_few_steps(scheduler: SchedulerMixin, steps: int | None) -> None:
    """Refuse too few steps for the Runge-Kutta steps that PNDM begins with.

    Raises:
        ValueError: it says how many there should be.
    """
    if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps:
        least = scheduler.pndm_order
        if steps is not None and steps < least:
            raise ValueError(
                f"PNDMScheduler begins with Runge-Kutta steps, for which it needs at least {least} "
                f"steps, not {steps}; PNDMScheduler.from_config(…, skip_prk_steps=True) needs none"
            )


def check_count(name: str, value: object, most: int | None = None) -> None:
    """Refuse what is no whole number from 1 on, or more than the model was trained for."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1 or (most is not None and value > most):
        wanted = "from 1 on" if most is None else f"between 1 and {most}"
        raise ValueError(f"{name} is {excerpt(value)}, but should be a whole number {wanted}")


def finite_number(name: str, value: object) -> float:
    """The number, which is neither NaN nor infinite.

    Raises:
        ValueError: it is, or it is no number.
    """
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise ValueError(f"{name} is {excerpt(value)}, but should be a finite number")


def check_generators(generator: object, pictures: int) -> None:
    """Refuse what is no generator, or a list with more or fewer than there are pictures."""
    several = isinstance(generator, Sequence) and not isinstance(generator, str)
    for each in generator if several else [generator]:
        if each is not None and not isinstance(each, torch.Generator):
            raise ValueError(
                f"generator is {excerpt(each)}, but should be a torch.Generator, such as "
                "torch.Generator().manual_seed(0)"
            )
    if several and len(generator) != pictures:
        raise ValueError(
            f"generator is a list of {len(generator)}, but there are {pictures} pictures; give one "
            "for each, or one for all"
        )


class Steps:
    """The timesteps of one drawing, noisiest first, and what happens at each.

    Latents are in the scheduler's units: x_t = α x_0 + σ ε for most, x_0 + (σ/α) ε for Euler's
    kind. `model_input` brings them to what the U-Net knows, for which α² + σ² = 1.

    Attributes:
        timesteps: as the scheduler has them. One of order 2 visits most of them twice.
        order: of the scheduler: so many timesteps make one whole step.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None,
        *,
        device: torch.device | str = "cpu",
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        generator: Generators = None,
    ) -> None:
        """Set the scheduler's timesteps, as Stable Diffusion's pipeline does.

        Args:
            scheduler: one of `compatibles` of Stable Diffusion's; it is used, not copied.
            num_inference_steps: T; not needed where `timesteps` or `sigmas` are given.
            device: of the timesteps.
            timesteps: these timesteps, for schedulers that take them.
            sigmas: these noise levels, for schedulers that take them.
            eta: η of DDIM, for schedulers that have it.
            generator: of the noise that some schedulers add; a list has one for each picture.
        """
        self.scheduler, self.generator = scheduler, generator
        self._renew = lambda generator: Steps(
            scheduler,
            num_inference_steps,
            device=device,
            timesteps=timesteps,
            sigmas=sigmas,
            eta=eta,
            generator=generator,
        )
        check_few_steps(scheduler, num_inference_steps)
        self.timesteps, _ = retrieve_timesteps(
            scheduler, num_inference_steps, device, timesteps, sigmas
        )
        self.order = scheduler.order
        accepted = inspect.signature(scheduler.step).parameters
        eta = finite_number("eta", eta)
        self._eta = {"eta": eta} if "eta" in accepted else {}
        self._takes_generator = "generator" in accepted
        self._first_is_late = False

    def __len__(self) -> int:
        return len(self.timesteps)

    def until(self, end: int) -> Iterator[tuple[int, Tensor]]:
        """(0, t_0), (1, t_1), … up to step `end`, which is not among them."""
        yield from enumerate(self.timesteps[:end])

    def since(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """(start, t_start), … to the last one."""
        yield from enumerate(self.timesteps[start:], start=start)

    # -------------------------------------------------------------- units and noise levels

    def model_input(self, x: Tensor, t: Tensor) -> Tensor:
        """x_t as the U-Net knows it."""
        return self.scheduler.scale_model_input(x, t)

    def unit(self, t: Tensor) -> float:
        """What `model_input` multiplies latents with at t."""
        return float(self.model_input(torch.ones(1), t))

    def level(self, t: Tensor) -> float:
        """σ/α at t, from 0 to infinity: infinity is pure noise (zero terminal SNR)."""
        level = noise_level(self.scheduler, t)
        return level if level < 0.99 * MOST_NOISE else math.inf

    def coefficients(self, t: Tensor) -> tuple[float, float]:
        """α and σ of what the U-Net sees at t."""
        level = self.level(t)
        if math.isinf(level):
            return 0.0, 1.0
        data = self.scheduler.config.get("sigma_data", 1.0)  # EDM: the data's spread
        alpha = 1 / math.sqrt(data**2 + level**2)
        return alpha, level * alpha

    @property
    def kind(self) -> Kind:
        """What the network predicts."""
        return KINDS[self.scheduler.config.get("prediction_type", "epsilon")]

    def x0(self, seen: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """x̂_0 of a prediction at what the U-Net saw; NaN where ε says nothing of it (α = 0)."""
        alpha, sigma = self.coefficients(t)
        if is_a(self.scheduler, "EDMEulerScheduler"):  # its predictions are preconditioned
            return self.scheduler.precondition_outputs(seen / alpha, prediction, sigma / alpha)
        if alpha == 0 and self.kind == "epsilon":
            return torch.full_like(seen, math.nan)
        return convert(prediction, seen, alpha, sigma, given=self.kind, wanted="x0")

    def shift_of_input(self, t: Tensor) -> float | None:
        """See `predictions.shift_of_input`; None at pure noise, where nothing can be guided yet."""
        alpha, sigma = self.coefficients(t)
        return None if alpha == 0 else shift_of_input(self.kind, alpha, sigma)

    # -------------------------------------------------------------- one step

    def step(
        self,
        prediction: Annotated[Tensor, "rows channels height width"],
        t: Tensor,
        x: Annotated[Tensor, "rows channels height width"],
        pictures: Sequence[int] | None = None,
    ) -> Annotated[Tensor, "rows channels height width"]:
        """x_{t−1} = α̃ x_t + β̃ Φ_t + σ ε (LRDiff, Eq. 8a).

        Args:
            prediction: Φ_t.
            t: the timestep.
            x: x_t.
            pictures: which picture each row is a part of, where rows are not pictures.
        """
        arguments: dict[str, Any] = dict(self._eta)
        generator = self.generator
        if isinstance(generator, Sequence) and pictures is not None:
            generator = [generator[number] for number in pictures]
        if self._takes_generator:
            arguments["generator"] = generator
        elif generator is not None and is_a(self.scheduler, "DPMSolverSDEScheduler"):
            # Its Brownian motion has a seed in place of a generator, by default one of its own.
            several = isinstance(generator, Sequence)
            self.scheduler.noise_sampler_seed = (
                [each.initial_seed() for each in generator] if several else generator.initial_seed()
            )
        if is_a(self.scheduler, "LMSDiscreteScheduler"):
            # By default it would count on predictions that a late beginning has not made.
            arguments["order"] = min(4, len(self.scheduler.derivatives) + 1)
        if self._first_is_late and isinstance(self.scheduler, PNDMScheduler):
            self.scheduler.ets = [prediction] * 3  # the first one stands for those before it
        self._first_is_late = False
        return self.scheduler.step(prediction, t, x, **arguments, return_dict=False)[0]

    # -------------------------------------------------------------- beginning late

    # -------------------------------------------------------------- sketches

    def timestep_at(self, share: float) -> Tensor:
        """The timestep at this share of the noise schedule, 0 = clean, 1 = pure noise."""
        if is_a(self.scheduler, "EDMEulerScheduler"):
            return self.timesteps[round((1 - share) * (len(self) - 1))]
        steps = self.scheduler.config.num_train_timesteps
        return torch.tensor(round(share * steps), device=self.timesteps.device)


def noise_level(scheduler: SchedulerMixin, t: Tensor) -> float:
    """σ/α of x_t = α x_0 + σ ε at t, from 0 to `MOST_NOISE`.

    t may lie between two training steps (Euler, Karras): interpolated, as those schedulers do.
    """
    if is_a(scheduler, "EDMEulerScheduler"):  # t = ln(σ) / 4 (Karras et al. 2022, Table 1)
        return min(math.exp(4 * float(t)), MOST_NOISE)
    least = 1 / (1 + MOST_NOISE**2)
    alphas_cumprod = scheduler.alphas_cumprod.double().cpu().clamp(min=least).numpy()
    levels = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    return float(np.interp(float(t), np.arange(len(levels)), levels))


# -------------------------------------------------------------------------- what a network predicts


Kind = Literal["epsilon", "x0", "v", "flow"]
"""The noise ε, the clean x_0, v = α ε − σ x_0, or the flow u = ε − x_0."""


Coefficient = float | Tensor
"""A number, or a tensor that multiplies the data."""


def convert(
    prediction: Annotated[Tensor, "*shape"],
    x_t: Annotated[Tensor, "*shape"],
    alpha: Coefficient,
    sigma: Coefficient,
    *,
    given: Kind,
    wanted: Kind,
) -> Annotated[Tensor, "*shape"]:
    """The same prediction in other words, at x_t = α x_0 + σ ε.

    ε → x_0 is DDPM, Eq. 9 and 15; v is Salimans & Ho 2022, appendix D, and takes α² + σ² = 1; the
    flow is that of flow matching (Lipman et al. 2023), usually with α = 1 − σ. ε → x_0 divides by
    α: where almost no signal is left, a small error in ε is a large one in x_0.

    Raises:
        ValueError: a kind that is not "epsilon", "x0", "v" or "flow".
    """
    x, a, s = x_t, alpha, sigma
    formulas = {
        ("epsilon", "x0"): lambda: (x - s * prediction) / a,
        ("epsilon", "v"): lambda: (prediction - s * x) / a,
        ("x0", "epsilon"): lambda: (x - a * prediction) / s,
        ("x0", "v"): lambda: (a * x - prediction) / s,
        ("v", "x0"): lambda: a * x - s * prediction,
        ("v", "epsilon"): lambda: s * x + a * prediction,
        ("flow", "x0"): lambda: (x - s * prediction) / (a + s),
        ("flow", "epsilon"): lambda: (x + a * prediction) / (a + s),
        ("x0", "flow"): lambda: (x - (a + s) * prediction) / s,
        ("epsilon", "flow"): lambda: ((a + s) * prediction - x) / a,
        ("v", "flow"): lambda: (a + s) * prediction + (s - a) * x,
        ("flow", "v"): lambda: (prediction - (s - a) * x) / (a + s),
    } | {(kind, kind): lambda: prediction for kind in ("epsilon", "x0", "v", "flow")}
    if (given, wanted) not in formulas:
        raise ValueError(f"{given!r} to {wanted!r}: the kinds are 'epsilon', 'x0', 'v' and 'flow'")
    return formulas[given, wanted]()


def shift_of_input(kind: Kind, alpha: float, sigma: float) -> float:
    """The c of s + c ξ with which an answer to x_t + ξ means the same noise ε̂ at x_t.

    LRDiff's Algorithm 1 is written for ε̂. From v = (ε − σ x) / α, x_0 = (x − σ ε) / α and
    u = ((α + σ) ε − x) / α: seen from x instead of x + ξ it is v + (σ/α) ξ, x_0 − ξ/α or u + ξ/α.
    """
    return {"epsilon": 0.0, "v": sigma / alpha, "x0": -1 / alpha, "flow": 1 / alpha}[kind]


# ----------------------------------------------------------------------------- pictures and latents


Latents = Annotated[Tensor, "rows channels height width"]


Images = Annotated[Tensor, "pictures 3 height_ width_"]


CELLS_AT_ONCE = 2**16
"""So many latent cells go through the U-Net at once where no `chunk_size` is given: 256 rows of
128 × 128 pixels, or 16 of 512 × 512. More take memory, and hardly any time less."""


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL,
    images: Images,
    *,
    sample: bool = False,
    generator: torch.Generator | None = None,
) -> Latents:
    """Images in [−1, 1] → latents that vary by about 1, as the U-Net knows them.

    Args:
        vae: any autoencoder of diffusers.
        images: in the autoencoder's precision.
        sample: draw from the posterior instead of taking its mean.
        generator: of that draw.

    Raises:
        ValueError: numbers that are not finite.
    """
    mode = "sample" if sample else "argmax"
    latents = retrieve_latents(vae.encode(images), generator, sample_mode=mode)
    checked_finite(latents, "the autoencoder's latents of the picture")
    if shift := vae.config.get("shift_factor"):
        latents = latents - shift
    if statistics := _statistics(vae, latents):
        mean, spread = statistics
        return (latents - mean) * vae.config.scaling_factor / spread
    return latents * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Latents, *, generator: Generators = None) -> Images:
    """Latents → images in about [−1, 1]; the inverse of `encode_images`.

    Args:
        vae: any autoencoder of diffusers.
        latents: in the autoencoder's precision.
        generator: for autoencoders whose decoder draws noise.

    Raises:
        ValueError: numbers that are not finite.
    """
    latents = checked_finite(latents, "the latents to decode")
    if statistics := _statistics(vae, latents):
        mean, spread = statistics
        latents = latents * spread / vae.config.scaling_factor + mean
    else:
        latents = latents / vae.config.scaling_factor
    if shift := vae.config.get("shift_factor"):
        latents = latents + shift
    images = vae.decode(latents, return_dict=False, generator=generator)[0]
    return checked_finite(images, "the pixels from the autoencoder")


def _statistics(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and spread of each channel's latents, where the autoencoder tells (Playground 2.5)."""
    mean, spread = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or spread is None:
        return None
    return like.new_tensor(mean)[:, None, None], like.new_tensor(spread)[:, None, None]


def checked_finite(values: Tensor, what: str) -> Tensor:
    """The same values. What is not finite must not become a picture: it would be a black one.

    Raises:
        ValueError: NaN or infinity among them.
    """
    if not values.isfinite().all():
        raise ValueError(
            f"{what} are not finite (NaN or infinite): use float32, a scheduler that the model was "
            "trained for, a smaller strength, or check the model's weights"
        )
    return values


# ---------------------------------------------------------------------------------- cross-attention


SCORES_AT_ONCE = 2**20
"""Attention scores held at one time (4 MB): so a large picture costs no more memory than that."""


Layers = str | Callable[[str], bool]
"""Which cross-attention layers: "all", "paper", "unofficial", or a function of a layer's name."""


def _resized(
    maps: Annotated[Tensor, "*batch height width"], size: tuple[int, int]
) -> Annotated[Tensor, "*batch new_height new_width"]:
    """Bilinear; where the size shrinks each new cell is the mean of what it covers."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    shrinks = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    flat = F.interpolate(flat, size=tuple(size), mode="bilinear", antialias=shrinks)
    return flat.reshape(*maps.shape[:-2], *size)


def _modules(unet: Any) -> dict[str, nn.Module]:
    """The parts of a U-Net by the names they have in a plain U-Net; "" is the U-Net itself.

    `torch.compile` wraps a module, which is then the wrapper's `_orig_mod`.
    """
    modules = unet.named_modules() if isinstance(unet, nn.Module) else []
    return {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in modules
    }


def _uncompiled(model: Any) -> contextlib.AbstractContextManager:
    """While it lasts, compiled parts of the U-Net run as they were written, hooks and all."""
    unet = getattr(model, "unet", model)
    if not any(
        "_orig_mod" in module._modules  # torch.compile(unet)
        or module._compiled_call_impl is not None  # unet.compile()
        or hasattr(module.forward, "_torchdynamo_orig_callable")  # torch.compile(unet.forward)
        for module in unet.modules()
    ):
        return contextlib.nullcontext()
    if not hasattr(torch.compiler, "set_stance"):
        raise ValueError(
            "the U-Net is compiled, and compiled code cannot be watched; load it without "
            f"torch.compile, or use PyTorch 2.6 or later (this is {torch.__version__})"
        )
    return torch.compiler.set_stance("force_eager")


def _cross_attention(
    model: Any, modules: dict[str, nn.Module], layers: Layers
) -> dict[str, Attention]:
    """The cross-attention layers of `layers`, by name, in the order they are called in."""
    # down_blocks, mid_block, up_blocks
    in_order = sorted(modules.items(), key=lambda item: item[0].split(".")[0])
    every = {
        name: module
        for name, module in in_order
        if isinstance(module, Attention)
        and module.is_cross_attention
        and ".transformer_blocks." in name
    }
    if not every:
        raise ValueError(f"{type(model).__name__} has no U-Net with cross-attention to look into")
    if layers == "all":
        return every
    if layers == "paper":
        blocks = _after_down_sampling(modules[""])
        chosen = [name for name in every if name.startswith(blocks)]
    elif layers == "unofficial":
        chosen = [name for name in every if name.startswith("up_blocks.")]
    elif callable(layers):
        chosen = [name for name in every if layers(name)]
    else:
        raise ValueError(
            f"layers is {layers!r}, but should be 'all', 'paper', 'unofficial' or a function of a "
            "layer's name"
        )
    if not chosen:
        blocks = dict.fromkeys(name.split(".transformer_blocks.")[0] for name in every)
        raise ValueError(
            f"layers={layers if isinstance(layers, str) else 'function'} matches none of the "
            f"{len(every)} cross-attention layers; they are in: {', '.join(blocks)}"
        )
    return {name: every[name] for name in chosen}


def _after_down_sampling(unet: nn.Module) -> tuple[str, ...]:
    """Where the names of the first cross-attention block after each down-sampling begin.

    That is one block for each size below the first that has cross-attention on the way down:
    down_blocks.1, down_blocks.2 and (down_blocks.3 has none) the middle of Stable Diffusion 1.5;
    down_blocks.1 and down_blocks.2 of XL.
    """
    stages = [(f"down_blocks.{number}", block) for number, block in enumerate(unet.down_blocks)]
    blocks, waiting = [], False
    for name, block in [*stages, ("mid_block", unet.mid_block)]:
        if waiting and getattr(block, "has_cross_attention", False):
            blocks.append(f"{name}.attentions.0.")
            waiting = False
        waiting = waiting or bool(getattr(block, "downsamplers", None))
    return tuple(blocks)


def _maps(
    layer: Attention,
    query: Annotated[Tensor, "batch positions inner"],
    key: Annotated[Tensor, "batch tokens inner"],
    mask: Annotated[Tensor, "batch heads #positions tokens"] | None,
    row: int,
    columns: Sequence[int],
    *,
    heads: bool = False,
) -> Annotated[Tensor, "kept positions columns"]:
    """softmax(QKᵀ/√d) of one picture, of some tokens: all heads, or their mean as one."""
    positions, tokens = query.shape[1], key.shape[1]
    at_once = max(1, SCORES_AT_ONCE // (positions * tokens))
    every = len(columns) == tokens
    parts = []
    for first in range(0, layer.heads, at_once):
        some = slice(first, first + at_once)
        weights = _logits(layer, query, key, mask, row, some).softmax(dim=-1)
        weights = weights if heads else weights.sum(dim=0, keepdim=True) / layer.heads
        parts.append(weights if every else weights[..., columns])
    return torch.cat(parts) if heads else sum(parts[1:], start=parts[0])


def _logits(
    layer: Attention,
    query: Annotated[Tensor, "batch positions inner"],
    key: Annotated[Tensor, "batch tokens inner"],
    mask: Annotated[Tensor, "batch heads #positions tokens"] | None,
    row: int,
    some: slice = slice(None),
) -> Annotated[Tensor, "heads positions tokens"]:
    """QKᵀ/√d + mask of one picture and of `some` heads, in single precision at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads = query[row].unflatten(-1, (layer.heads, -1)).transpose(0, 1)[some].to(dtype)
    keys = key[row].unflatten(-1, (layer.heads, -1)).permute(1, 2, 0)[some].to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        logits = heads @ (keys * layer.scale)
    return logits if mask is None else logits + mask[row, some]


# ------------------------------------------------------------------------------- layers and layouts


LONGEST_TEXT = 2000
"""Characters of a prompt or another text. The models read 77 tokens, some 300 characters."""


ROUNDING = 1e-5
"""How far a box may lie outside [0, 1]: other programs write six decimals. It is cut off."""


_UNREADABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Control characters, lone surrogates, and what no XML can hold."""


_Class = TypeVar("_Class", bound=type)


class LayoutError(ValueError):
    """A layout that cannot be used: one sentence with file, layer, field and a remedy."""


def _checked_prompt(value: Any) -> str:
    text = checked_text(value)
    if not text:
        raise ValueError("is empty; say what should be there, for example 'a red car'")
    return text


def checked_text(value: Any) -> str:
    """The text on one line, with one space between words: line breaks mean nothing to a model.

    Raises:
        ValueError: no text, longer than `LONGEST_TEXT`, or with a character that is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"is {excerpt(value)}, but should be text")
    if len(value) > LONGEST_TEXT:
        raise ValueError(
            f"has {len(value)} characters, but should have at most {LONGEST_TEXT}; the models read "
            "some 300 of them"
        )
    text = " ".join(value.split())
    if wrong := _UNREADABLE.search(text):
        raise ValueError(
            f"is {excerpt(value)}, in which {wrong[0]!r} is no character to be read; leave it out"
        )
    return text


def _checked_box(value: Any) -> Box:
    if hasattr(value, "tolist"):  # NumPy, torch
        value = value.tolist()
    given = excerpt(value)
    wanted = "(x0, y0, x1, y1) with 0 ≤ x0 < x1 ≤ 1 and 0 ≤ y0 < y1 ≤ 1"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 4:
        raise ValueError(f"is {given}, but should be four numbers {wanted}")
    if not all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in value):
        raise ValueError(f"is {given}, but should be four numbers {wanted}")
    box = tuple(_float(v) for v in value)
    if not all(math.isfinite(v) for v in box):
        raise ValueError(
            f"is {given}, which is not a finite number everywhere; it should be {wanted}"
        )
    if max(box) > 2:
        raise ValueError(
            f"is {given}, which is outside [0, 1]; if it is in pixels or 0–1000, divide x by the "
            "picture's width and y by its height, or all by 1000"
        )
    x0, y0, x1, y1 = inside = tuple(min(max(v, 0.0), 1.0) for v in box)
    if max(abs(a - b) for a, b in zip(box, inside, strict=True)) > ROUNDING:
        remedy = f"{excerpt(inside)} is the part inside" if x0 < x1 and y0 < y1 else f"use {wanted}"
        raise ValueError(f"is {given}, which is outside [0, 1]; {remedy}")
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"is {given}, {_no_corners(inside)}")
    return inside


def _no_corners(box: Box) -> str:
    """What is wrong with a box in [0, 1] that has no area, and which box may be meant."""
    x0, y0, x1, y1 = box
    ordered = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    fault = "whose corners are swapped" if x0 != x1 and y0 != y1 else "which has no area"
    conventions = {"x, y, width, height": box_from_xywh, "centre, width, height": box_from_centre}
    meant = [
        f"{names} ({convert.__name__})"
        for names, convert in conventions.items()
        if all(-ROUNDING <= v <= 1 + ROUNDING for v in convert(box)) and x1 > 0 and y1 > 0
    ]
    if meant:
        return f"{fault}; perhaps it is {' or '.join(meant)}, and the other boxes are suspect, too"
    if x0 != x1 and y0 != y1:
        return f"{fault}; {excerpt(ordered)} would work"
    return f"{fault}; it should have x0 < x1 and y0 < y1"


def checked_colour(value: Any) -> str:
    """The name or hex of a colour as it stands.

    Raises:
        ValueError: no colour; with the nearest names.
    """
    if not isinstance(value, str):
        raise ValueError(
            f"is {excerpt(value)}, but should be a name like 'red' or a hex like '#ff0000'"
        )
    try:
        possible = max(ImageColor.getrgb(value)) <= 255  # "rgb(999, 0, 0)" is read, too
    except ValueError:
        possible = False
    if not possible:
        names = difflib.get_close_matches(value[:50].lower(), ImageColor.colormap, n=3)
        nearest = f"; the nearest names are {', '.join(names)}" if names else ""
        raise ValueError(
            f"is {excerpt(value)}, which is no colour name of CSS and no hex like '#ff0000'"
            + nearest
        )
    return value


def _checked_strength(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"is {excerpt(value)}, but should be a number (1 = as strong as usual)")
    if not math.isfinite(_float(value)):
        raise ValueError(f"is {excerpt(value)}, but should be finite (1 = as strong as usual)")
    return float(value)


def _from_0_to_1(wanted: str) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not 0 <= _float(value) <= 1:
            raise ValueError(f"is {excerpt(value)}, but should be {wanted}")
        return float(value)

    return check


_checked_share = _from_0_to_1(
    "a share of the steps, a number between 0 (the first) and 1 (the last)"
)


_checked_opacity = _from_0_to_1("a number from 0 (not seen) to 1 (nothing shines through)")


def _float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _strict(cls: _Class) -> _Class:
    """Let `cls(…)` refuse missing, unknown and misplaced arguments with a `LayoutError`."""
    filled: Callable[..., None] = cls.__init__
    names = [field.name for field in fields(cls)]
    places = [field.name for field in fields(cls) if not field.kw_only]

    @functools.wraps(filled)
    def __init__(self: Any, /, *values: Any, **named: Any) -> None:
        given = dict(zip(names, values, strict=False)) | named
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
        # A misspelt field is also a missing field; the misspelling is what helps.
        if unknown := [name for name in named if name not in names]:
            fault = _unknown_field(unknown[0], names)
        elif len(values) > len(places):
            fault = f"{names[len(places)]} must be given by name, not by position"
        elif twice := [name for name in places[: len(values)] if name in named]:
            fault = f"{twice[0]} is given twice, by position and by name"
        elif missing:
            fault = f"{missing[0]} is missing"
        else:
            return filled(self, *values, **named)
        layer = f"{_layer_called(given.get('prompt'))}, " if cls is Layer else ""
        raise LayoutError(layer + fault)

    cls.__init__ = __init__
    return cls


def _unknown_field(name: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(name[:50], names, n=1, cutoff=0.5)
    guess = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{excerpt(name)} is no known field (known: {', '.join(names)}){guess}"


def _layer_called(prompt: Any) -> str:
    called = isinstance(prompt, str) and prompt.strip()
    return f"layer {excerpt(prompt, 24)}" if called else "layer"


def _check_fields(instance: Any, checks: dict[str, Callable[[Any], Any]], place: str = "") -> None:
    """Put what `checks` make of the fields in their place; an error names the place and field."""
    for name, check in checks.items():
        try:
            value = check(getattr(instance, name))
        except LayoutError:  # of a layer of the layout: it says already which
            raise
        except ValueError as error:
            raise LayoutError(sentence(f"{place}{name} {error}", 240)) from None
        object.__setattr__(instance, name, value)


@_strict
@dataclass(frozen=True)
class Layer:
    """One object: what it is, where, and how strongly it is asked for.

    Attributes:
        prompt: what the object is, "a red car".
        box: where it is, by its corners: (x0, y0, x1, y1) as fractions of the canvas in [0, 1], y
            downwards. `box_from_xywh` and `box_from_centre`
            make it of other conventions. Up to 1e-5 outside [0, 1] is rounding.
        mask: where it is, pixel by pixel, in place of a box: an array (height, width) of
            True, where the object is, and False. Of any size, stretched to the canvas.
        negative_prompt: what this layer should not show; None takes the picture's own.
        colour: the flat colour whose latent is the layer's constant δ, a CSS name or a hex like
            "#ff8800"; None
            takes that of `colour_of_prompt`, and no guidance where there is none.
        word: the word or phrase that names the object: where a dynamic δ and the methods that steer
            by words look, and what metrics look for; None
            takes that of `object_of_layer` ("car" of "a red car on grass").
        strength: factor on the strength of this layer's vision guidance; 1 = as the pipeline's
            arguments say, 0 = none.
        opacity: how much of what lies behind the layer hides, from 0 to 1: 1 = nothing shines
            through, 0 = the layer is not seen. Algorithm 1 refuses it.
        start: the share of the steps, in [0, 1], after which the layer begins to count. Before, its
            place belongs to what lies behind it.
        end: the share of the steps after which it no longer counts; None: as the pipeline's
            `layered_fraction` says.

    Raises:
        LayoutError: one sentence that names the layer and the field.
    """

    prompt: str
    box: Box | None = None
    _: KW_ONLY
    mask: Mask | None = None
    negative_prompt: str | None = None
    colour: str | None = None
    word: str | None = None
    strength: float = 1.0
    opacity: float = 1.0
    start: float = 0.0
    end: float | None = None

    def __post_init__(self) -> None:
        layer = _layer_called(self.prompt)
        checks = {
            "prompt": _checked_prompt,
            "box": _optional(_checked_box),
            "mask": _optional(Mask.of),
            "negative_prompt": _optional(checked_text),
            "colour": _optional(checked_colour),
            "word": _optional(checked_text),
            "strength": _checked_strength,
            "opacity": _checked_opacity,
            "start": _checked_share,
            "end": _optional(_checked_share),
        }
        _check_fields(self, checks, f"{layer}, ")
        if (self.box is None) == (self.mask is None):
            has = "neither a box nor a mask" if self.box is None else "both a box and a mask"
            raise LayoutError(
                f"{layer} has {has}; give one of them, for example box=(0.1, 0.5, 0.6, 0.9)"
            )
        if self.end is not None and self.end <= self.start:
            raise LayoutError(
                f"{layer} ends at {self.end:g} of the steps, but starts at {self.start:g}; end "
                "should be later than start"
            )

    @property
    def bounding_box(self) -> Box:
        """The box, or the tight one around the mask."""
        return self.mask.box if self.box is None else self.box

    def cells(self, height: int, width: int) -> Annotated[Tensor, "{height} {width}"]:
        """The cells of a `height` × `width` canvas that the layer covers, whatever lies in front.

        A cell is covered if its centre is in the box. A box so thin that it holds no centre covers
        the one row (or column) in which its own middle lies. Of a mask, a cell is covered if half
        of its area is, and if that leaves nothing, the cell that is covered most: no layer is ever
        lost by rounding.
        """
        if self.mask is not None:
            return self.mask.cells(height, width)
        x0, y0, x1, y1 = self.box
        return _covered(y0, y1, height)[:, None] & _covered(x0, x1, width)[None, :]


def _covered(low: float, high: float, cells: int) -> Annotated[Tensor, "{cells}"]:
    centre = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    covered = (low <= centre) & (centre < high)
    if not covered.any():
        covered[min(int((low + high) / 2 * cells), cells - 1)] = True
    return covered


def _bell(box: Box, height: int, width: int) -> Annotated[Tensor, "{height} {width}"]:
    """A Gaussian over the box: 1 in its middle, e⁻² in the middle of its edges."""
    x0, y0, x1, y1 = box
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    square = ((y - (y0 + y1) / 2) / (y1 - y0))[:, None] ** 2
    square = square + ((x - (x0 + x1) / 2) / (x1 - x0))[None, :] ** 2
    # Never quite 0: a cell far out on a box of no width must still belong to someone.
    return torch.exp(-8 * square).clamp(min=1e-6)


def _checked_layers(value: Any) -> tuple[Layer, ...]:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise ValueError(f"is {excerpt(value)}, but should be a list of layers")
    layers = []
    for number, layer in enumerate(value, start=1):
        if isinstance(layer, dict):
            try:
                layer = Layer(**layer)
            except LayoutError as error:
                fault = str(error).removeprefix("layer")
                raise LayoutError(f"layer {number}{fault}") from None
        if not isinstance(layer, Layer):
            names = ", ".join(field.name for field in fields(Layer))
            raise LayoutError(f"layer {number} is {excerpt(layer)}, but should have {names}")
        layers.append(layer)
    if not layers:
        raise ValueError("is empty; give at least one layer with a prompt and a box")
    return tuple(layers)


@_strict
@dataclass(frozen=True)
class Layout:
    """A picture to be made: a caption, a background, and layers from back to front.

    Attributes:
        caption: the whole picture in words, "a red car and a yellow star at night".
        background: what is behind all layers, "at night"; empty: the caption is used.
        layers: at least one, first = furthest back. Where two overlap, the later one is seen.

    Raises:
        LayoutError: one sentence that names the layer and the field.
    """

    caption: str
    _: KW_ONLY
    background: str = ""
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        checks = {
            "caption": _checked_prompt,
            "background": checked_text,
            "layers": _checked_layers,
        }
        _check_fields(self, checks)

    def masks(
        self, height: int, width: int, *, overlap: Overlap = "over"
    ) -> Annotated[Tensor, "{len(self.layers)+1} {height} {width}"]:
        """The *visible* masks: index 0 is the background, index i + 1 is `layers[i]`.

        They partition the canvas: in each cell they sum to 1. Where no layer is, the background is;
        where one is, it has the cell to itself; where several are, `overlap` decides:

        - "over": the cell is the frontmost one's, the one that is latest in the list.
        - "small_over_large": the cell is that of the smallest layer, whatever the list says (the
          authors' script paints the largest area first).
        - "mean": all have the same share (MultiDiffusion, Bar-Tal et al. 2023, Eq. 5).
        - "weighted": shares fall off as a Gaussian from the middle of each layer's box (Mixture of
          Diffusers, Jiménez 2023, section 3), so that there is no seam.

        Of what would be its part of a cell a layer with an opacity takes that share only, and
        leaves the rest to what lies behind it ("over", "small_over_large") or to the background
        ("mean", "weighted"). A layer that others hide completely has an empty mask.

        Raises:
            ValueError: another overlap rule.
        """
        if overlap not in get_args(Overlap):
            raise ValueError(
                f"overlap is {overlap!r}, but should be one of {', '.join(get_args(Overlap))}"
            )
        cells = [layer.cells(height, width) for layer in self.layers]
        opacity = torch.tensor([layer.opacity for layer in self.layers])[:, None, None]
        if overlap in ("mean", "weighted"):
            shares = torch.stack(cells).float()
            if overlap == "weighted":
                boxes = [layer.bounding_box for layer in self.layers]
                shares = shares * torch.stack([_bell(box, height, width) for box in boxes])
            background = ~torch.stack(cells).any(0, keepdim=True)
            shares = torch.cat([background.float(), shares])
            shares = shares / shares.sum(0)
            background = shares[:1] + ((1 - opacity) * shares[1:]).sum(0, keepdim=True)
            return torch.cat([background, opacity * shares[1:]])
        order = list(range(len(cells)))
        if overlap == "small_over_large":
            order.sort(key=lambda number: -int(cells[number].sum()))
        masks, free = torch.zeros(len(cells) + 1, height, width), torch.ones(height, width)
        for number in reversed(order):
            masks[number + 1] = free * cells[number] * opacity[number]
            free = free - masks[number + 1]
        masks[0] = free
        return masks


# ----------------------------------------------------------------------- boxes of other conventions


def box_from_xywh(box: Sequence[float]) -> Box:
    """(x, y, width, height) in [0, 1], from the upper left corner → (x0, y0, x1, y1)."""
    x, y, w, h = box
    return (x, y, x + w, y + h)


def box_from_centre(box: Sequence[float]) -> Box:
    """YOLO's (x, y, width, height) in [0, 1], where (x, y) is the centre → (x0, y0, x1, y1)."""
    x, y, w, h = box
    return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


# -------------------------------------------------------------------------------------------- masks


Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 as fractions of the canvas in [0, 1], y downwards."""


def tight_box(mask: Annotated[Tensor, "height width"]) -> Box:
    """The smallest box around a mask that is not empty."""
    height, width = mask.shape
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return (
        int(columns[0]) / width,
        int(rows[0]) / height,
        (int(columns[-1]) + 1) / width,
        (int(rows[-1]) + 1) / height,
    )


# -------------------------------------------------------------------------------------------- words


class WordError(ValueError):
    """A word that is not there to look at: what was asked, and which words there are."""


# ------------------------------------------------------------------------------- what messages show


LONGEST = 300
"""Characters of a message."""


class _Short(reprlib.Repr):
    """`repr` of a part of a value only, however large or deep it is; no binary dust in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 2, 4, 4, 2
        self.maxstring = self.maxother = 48

    def repr_float(self, x: float, level: int) -> str:
        return f"{x:.7g}"

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out numbers of thousands of digits.
        return repr(x) if x.bit_length() <= 64 else f"a number of {x.bit_length()} bits"

    def repr_list(self, x: list, level: int) -> str:
        return self.repr_tuple(tuple(x[: self.maxlist + 1]), level)


_SHORT = _Short()


def excerpt(value: object, most: int = 50) -> str:
    """`value` as Python writes it, but at most `most` characters on one line."""
    return _cut(" ".join(_SHORT.repr(value).splitlines()), most)


def sentence(text: str, most: int = LONGEST) -> str:
    """`text` on one line, and no longer than a message may be."""
    return _cut(" ".join(text.split()), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


# ---------------------------------------------------------------------------------------- arguments


Callback = Callable[..., dict[str, Any] | None]


def check_layouts(
    pipe: LayeredRenderingDiffusionPipeline, layouts: Sequence[Layout], size: tuple[int, int]
) -> None:
    if not layouts or not all(isinstance(layout, Layout) for layout in layouts):
        kinds = sorted({type(layout).__name__ for layout in layouts}) or ["nothing"]
        raise ValueError(f"layouts is {', '.join(kinds)}, but should be a Layout or several")
    factor = pipe.vae_scale_factor
    if any(side % factor or side < factor for side in size):
        near = tuple(max(factor, round(side / factor) * factor) for side in size)
        raise ValueError(
            f"height and width are {size[0]} and {size[1]}, but should be divisible by {factor}; "
            f"{near[0]} and {near[1]} would work"
        )


def check_sampling(
    pipe: LayeredRenderingDiffusionPipeline,
    steps: int | None,
    pictures: int,
    chunk_size: int | None,
) -> None:
    check_scheduler(pipe.scheduler)
    most = pipe.scheduler.config.num_train_timesteps
    if steps is not None:
        check_count("num_inference_steps", steps, most)
    check_count("num_images_per_prompt", pictures)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)


def tensor_names(
    pipe: LayeredRenderingDiffusionPipeline, callback: Callback | None, names: Sequence[str]
) -> Sequence[str]:
    """Which tensors a callback gets; those of diffusers say so themselves."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    if unknown := set(names) - set(pipe._callback_tensor_inputs):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {', '.join(sorted(unknown))}, but only "
            f"{', '.join(pipe._callback_tensor_inputs)} can be given to a callback"
        )
    return names


def check_noise(latents: Tensor | None, generator: Generators, shape: Sequence[int]) -> None:
    check_generators(generator, shape[0])
    if latents is None:
        return
    if tuple(latents.shape) != tuple(shape):
        raise ValueError(
            f"latents has shape {tuple(latents.shape)}, but should have {tuple(shape)}"
        )
    if not latents.isfinite().all():
        raise ValueError("latents has values that are not finite (NaN or infinite)")


def for_each_layout(text: str | Sequence[str] | None, layouts: Sequence[Layout]) -> list[str]:
    """The negative prompt of each layout, "" for none."""
    if text is None or isinstance(text, str):
        text = [text or ""] * len(layouts)
    if not isinstance(text, (list, tuple)):
        raise ValueError(f"negative_prompt is {excerpt(text)}, but should be text or a list of it")
    if len(text) != len(layouts):
        raise ValueError(
            f"negative_prompt has {len(text)} entries for {len(layouts)} layouts; give one text "
            "for all, or one for each layout"
        )
    try:
        return [checked_text(negative) for negative in text]
    except ValueError as error:
        raise ValueError(f"negative_prompt {error}") from None


# ----------------------------------------------- the pipeline, and what stands around the algorithm


METHODS = {
    # The choices that obey best on the course's small model.
    "lrdiff": Choices(
        delta="contrast", inside=0.6, outside=0.5, guide="both", layered_fraction=0.4
    ),
    # The paper's K, λ and t0 are not published; these are the course's.
    "paper": Choices(delta="dynamic", inside=1.0, outside=1.0),
}
"""Algorithm 1 with two sets of the choices that it leaves open."""


class LayeredRenderingDiffusionPipeline(StableDiffusionPipeline):
    """Boxes or masks → picture, without training: LRDiff (Qi et al. 2024), Algorithm 1.

    For Stable Diffusion 1.x and 2.x with any of their schedulers; DDIM is best. Everything but
    `__call__` is `StableDiffusionPipeline`'s: loading, saving, offloading, LoRA.
    """

    _callback_tensor_inputs = ["latents"]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        layers: Sequence[dict[str, Any] | tuple[str, Box]],
        background: str = "",
        *,
        method: str = "lrdiff",
        choices: dict[str, Any] | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Annotated[Tensor, "pictures channels height_ width_"] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draw a picture in which each layer is where it should be.

        Args:
            prompt: the whole picture in words, "a red car and a yellow star at night".
            layers: from back to front: where two overlap, the later one is seen. Each is a pair
                ("a red car", (x0, y0, x1, y1)), its corners as fractions of the picture in [0, 1];
                or a dict of what `Layer` has, such as {"prompt": "a red car", "box": (…), "colour":
                "red"}, with "mask", an array (height, width) of True and False, for any shape.
            background: what is behind all layers, "at night"; empty: the prompt.
            method: "lrdiff" or "paper"; see `METHODS`.
            choices: changes of the method's `Choices`, {"inside": 0.3, "layered_fraction": 0.5}.
            negative_prompt: in place of the empty prompt; a layer's own comes first.
            height: of the picture in pixels, divisible by 8; the model's own size by default.
            width: likewise.
            num_inference_steps: T, the denoising steps.
            guidance_scale: γ of classifier-free guidance, s + γ (s(y) − s); off where γ ≤ 1.
            guidance_rescale: φ of Lin et al. 2024, Eq. 16; 0 = off.
            num_images_per_prompt: pictures from as many initial noises, drawn as one batch.
            eta: η of DDIM, for schedulers that have it.
            generator: where the noise comes from; a list has one for each picture.
            latents: the initial noise ~ N(0, I), instead of drawing it.
            cross_attention_kwargs: for the attention processors, such as LoRA's {"scale": 0.5}.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False gives a tuple (images, nsfw_content_detected).
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": …}) after each step;
                it may return other latents, set `pipe._interrupt`, change `pipe._guidance_scale`.
            callback_on_step_end_tensor_inputs: which tensors it gets: "latents".

        Raises:
            ValueError: an argument that cannot work, before the first U-Net call; or numbers that
                are not finite, while it draws.
        """
        choices = chosen(method, choices)
        layout = layout_of(prompt, layers, background)
        check_unet(self.unet)
        size = self._size(height, width)
        check_layouts(self, [layout], size)
        check_sampling(self, num_inference_steps, num_images_per_prompt, None)
        tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._guidance_scale = finite_number("guidance_scale", guidance_scale)
        self._guidance_rescale = finite_number("guidance_rescale", guidance_rescale)
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False
        model = Model(self, size)
        run = Run(
            model,
            Steps(
                self.scheduler,
                num_inference_steps,
                device=model.like.device,
                eta=eta,
                generator=generator,
            ),
            layouts=[layout] * num_images_per_prompt,
            negatives=for_each_layout(negative_prompt, [layout]) * num_images_per_prompt,
            x_T=model.like.new_empty(num_images_per_prompt, *model.like.shape[1:]),
            guidance_scale=self._guidance_scale,
            guidance_rescale=self._guidance_rescale,
            generator=generator,
        )
        check_noise(latents, generator, run.x_T.shape)
        check_run(run, choices)
        run.draw_noise(latents)
        try:
            x = self._draw(run, choices, callback_on_step_end)
            images, nsfw = self._pictures(run, x, output_type)
        finally:
            self.maybe_free_model_hooks()
        if not return_dict:
            return images, nsfw
        return StableDiffusionPipelineOutput(images, nsfw)

    def to_json_string(self) -> str:
        """The text of `model_index.json`: a saved folder is one of `StableDiffusionPipeline`."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = StableDiffusionPipeline.__name__
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        size = self.unet.config.sample_size
        own = (size, size) if isinstance(size, int) else size
        return tuple(
            side or cells * self.vae_scale_factor
            for side, cells in zip((height, width), own, strict=True)
        )

    def _draw(
        self, run: Run, choices: Choices, callback: Callback | None
    ) -> Annotated[Tensor, "pictures channels height width"]:
        """Iterate over Algorithm 1: progress, callbacks and interruption are not its matter."""
        x, self._num_timesteps = run.x_T, len(run.steps)
        with self.progress_bar(total=len(run.steps)) as progress_bar:
            for number, state in enumerate(layered_denoising(run, choices)):
                if callback is not None:
                    changed = callback(self, number, state.t, {"latents": state.x})
                    if changed is not None:
                        state.x = returned_latents(changed, state.x)
                    run.guidance_scale = self._guidance_scale
                    run.guidance_rescale = self._guidance_rescale
                x = state.x
                progress_bar.update()
                if self.interrupt:
                    break
        return checked_finite(x, "the latents")

    def _pictures(
        self, run: Run, x: Annotated[Tensor, "pictures channels height width"], output_type: str
    ) -> tuple[Any, list[bool] | None]:
        """Pictures as `output_type` says, and what the safety checker makes of them."""
        if output_type == "latent":
            return x, None
        images = decode_latents(self.vae, x.to(self.vae.dtype), generator=run.generator)
        images, nsfw = self.run_safety_checker(images, images.device, self.unet.dtype)
        shown = [not hit for hit in nsfw or [False] * len(images)]
        return self.image_processor.postprocess(images, output_type, do_denormalize=shown), nsfw


def chosen(method: str, changes: dict[str, Any] | None) -> Choices:
    """The choices of a method, with some of them changed."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method is {excerpt(method)}, but should be one of {', '.join(METHODS)}")
    for name in changes or {}:
        if name not in vars(METHODS[method]):
            known = ", ".join(vars(METHODS[method]))
            raise ValueError(f"there is no choice {excerpt(name)}; there are {known}")
    choices = replace(METHODS[method], **(changes or {}))
    if choices.fuse != "steps":
        raise ValueError(
            f"fuse is {choices.fuse!r}, but Algorithm 1, all there is here, is 'steps'"
        )
    return choices


def layout_of(prompt: str, layers: Iterable[Any], background: str) -> Layout:
    """The layout, of dicts or of pairs of a prompt and a box."""
    if isinstance(layers, (list, tuple)):
        pair = ("prompt", "box")
        layers = [
            dict(zip(pair, each, strict=True))
            if isinstance(each, (list, tuple)) and len(each) == len(pair)
            else each
            for each in layers
        ]
    try:
        return Layout(prompt, background=background, layers=layers)
    except LayoutError as error:
        raise LayoutError(re.sub("^caption", "prompt", str(error))) from None


def check_unet(unet: nn.Module) -> None:
    """Refuse what does not draw from one text alone."""
    config = unet.config
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"this U-Net takes {config.in_channels} channels where latents have "
            f"{config.out_channels}, as for inpainting; use the model it was made from"
        )
    if config.time_cond_proj_dim is not None or config.addition_embed_type is not None:
        raise ValueError(
            "this U-Net wants more than a prompt, as that of XL or LCM does; use a Stable "
            "Diffusion 1.x or 2.x"
        )


def check_run(run: Run, choices: Choices) -> None:
    """Refuse what Algorithm 1 cannot do, and warn of layers that will not be seen."""
    positions = run.size[0] * run.size[1]
    if choices.delta == "decoded":
        positions *= run.model.pipe.vae_scale_factor**2
    if choices.looks and choices.top_k > positions:
        raise ValueError(
            f"top_k is {choices.top_k}, but there are only {positions} positions to choose from"
        )
    for number, layer in enumerate(run.layouts[0].layers):
        if layer.opacity < 1:
            raise ValueError(
                f"{layer_name(number, layer)} has an opacity of {layer.opacity:g}, but Algorithm 1 "
                "knows none; leave it out"
            )
    check_words(run, choices)
    warn_of_hidden_layers(run, choices)


def phases(run: Run, choices: Choices) -> Phases:
    """How the steps are shared out: the first are layered."""
    return Phases("steps", layered=round(choices.layered_fraction * len(run.steps)), alone=0)


class Model:
    """What the algorithm asks of Stable Diffusion 1.x and 2.x.

    Each text is encoded once, and alone: a picture must not depend on what else is in the batch.

    Args:
        pipe: holds the models.
        size: height and width of the pictures in pixels.
    """

    distilled = False

    def __init__(self, pipe: StableDiffusionPipeline, size: tuple[int, int]) -> None:
        self.pipe = pipe
        self.like = torch.empty(
            (0, pipe.unet.config.in_channels, *(side // pipe.vae_scale_factor for side in size)),
            device=pipe._execution_device,
            dtype=pipe.unet.dtype,
        )
        self._embeddings: dict[str, Tensor] = {}

    def encode_texts(self, texts: Iterable[str]) -> None:
        """All at once, so that an offloaded text encoder is fetched once and not between steps."""
        for text in texts:
            self.embedding(text)

    def embedding(self, text: str) -> Annotated[Tensor, "tokens features"]:
        """What the U-Net reads of a text."""
        if text not in self._embeddings:
            scale = (self.pipe.cross_attention_kwargs or {}).get("scale")
            encoded, _ = self.pipe.encode_prompt(text, self.like.device, 1, False, lora_scale=scale)
            encoded = checked_finite(encoded[0], f"the embeddings of {text!r}")
            self._embeddings[text] = encoded.to(self.like)
        return self._embeddings[text]

    def __call__(
        self,
        x: Annotated[Tensor, "rows channels height width"],
        t: Tensor,
        texts: Sequence[str],
        pictures: Sequence[int],
        conditional: Sequence[bool],
        *,
        watched: bool = True,
    ) -> Annotated[Tensor, "rows channels height width"]:
        """The U-Net's predictions for rows of noisy latents, each with a text."""
        checked_finite(x, f"the noisy latents at t = {float(t):g}")
        size = self.rows_at_once(x)
        parts = []
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            answers = self.pipe.unet(
                x[rows],
                t,
                encoder_hidden_states=torch.stack([self.embedding(text) for text in texts[rows]]),
                cross_attention_kwargs=self.pipe.cross_attention_kwargs,
                return_dict=False,
            )
            parts.append(answers[0])
        return checked_finite(torch.cat(parts), f"the U-Net's predictions at t = {float(t):g}")

    def rows_at_once(self, x: Annotated[Tensor, "rows channels height width"]) -> int:
        """How many rows of such latents go through the U-Net at once."""
        return max(1, CELLS_AT_ONCE // (x.shape[-2] * x.shape[-1]))

    def tokens(self, prompt: str) -> PromptTokens:
        """Which tokens of a prompt are which of its words."""
        return PromptTokens(self.pipe, prompt)

    @contextmanager
    def watched_rows(self, prompts: Sequence[str], *, layers: Layers) -> Iterator[AttentionMaps]:
        """Watch the cross-attention of a call of the U-Net with one row for each prompt."""
        unet = self.pipe.unet
        maps = AttentionMaps([self.tokens(prompt) for prompt in prompts], self.like.shape[-2:])
        with _uncompiled(unet), ExitStack() as stack:
            for layer in _cross_attention(unet, _modules(unet), layers).values():
                handle = layer.register_forward_hook(maps.note, with_kwargs=True)
                stack.callback(handle.remove)
            yield maps


@dataclass
class AttentionMaps:
    """Where the rows of one call of the U-Net look when they read a word.

    Attributes:
        prompts: the tokens of each row's prompt.
        size: height and width of the latents.
        layers: for each layer softmax(QKᵀ/√d) of each row, the mean over the heads.
    """

    prompts: Sequence[PromptTokens]
    size: tuple[int, int]
    layers: list[Annotated[Tensor, "rows height_ width_ tokens"]] = field(default_factory=list)

    def note(self, layer: Attention, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        """A forward hook of a cross-attention layer."""
        query, key = layer.to_q(args[0]), layer.to_k(kwargs["encoder_hidden_states"])
        every, (height, width) = range(key.shape[1]), self.size
        while height * width > query.shape[1]:
            height, width = (height + 1) // 2, (width + 1) // 2
        rows = [_maps(layer, query, key, None, row, every) for row in range(len(query))]
        self.layers.append(torch.cat(rows).unflatten(1, (height, width)))

    def pooled(
        self, word: str, *, prompt: int, size: tuple[int, int]
    ) -> Annotated[Tensor, "1 height width"]:
        """The map of a word of one row's prompt: the sum of its tokens, the mean over layers."""
        columns = self.prompts[prompt].positions(word)
        maps = [layer[None, prompt, :, :, columns].sum(dim=-1) for layer in self.layers]
        return torch.stack([_resized(each, size) for each in maps]).mean(dim=0)


class PromptTokens:
    """The tokens of a prompt, as the pipeline encodes it."""

    def __init__(self, pipe: StableDiffusionPipeline, prompt: str) -> None:
        self.prompt, self._tokenizer = prompt, pipe.tokenizer
        # Textual inversion spells one learnt word as several.
        self._spelled = lambda text: pipe.maybe_convert_prompt(text, pipe.tokenizer)
        read = pipe.tokenizer(self._spelled(prompt), truncation=True)
        self._ids = list(read.input_ids)

    def positions(self, word: str) -> list[int]:
        """Which of them are a word's or a phrase's, everywhere that it stands."""
        ids = self._tokenizer(self._spelled(word), add_special_tokens=False).input_ids
        starts = [n for n in range(len(self._ids)) if ids and self._ids[n : n + len(ids)] == ids]
        if not starts:
            raise WordError(
                f"{excerpt(word)} is not in what the model reads of the prompt {self.prompt!r}"
            )
        return [start + n for start in starts for n in range(len(ids))]


_NAME_ENDS = re.compile(
    r"[,;.:()]|\b(?:on|in|at|of|with|by|under|over|above|below|behind|beside|near|and|from|to"
    r"|inside|between|through|against|wearing|holding|made)\b"
)


_PICTURE_OF = re.compile(r"^(?:an? |the )?(?:\w+ )?(?:photo|picture|image|painting|drawing) of ")


def _name(prompt: str) -> list[str]:
    """The words up to the first comma or preposition: "a red car" of "a red car on grass"."""
    return _NAME_ENDS.split(_PICTURE_OF.sub("", prompt.lower()))[0].split()


def object_of_layer(layer: Layer) -> str:
    """The word that names a layer's object: its `word`, else the last one of the name."""
    words = [layer.word] if layer.word else _name(layer.prompt)
    if not words:
        raise WordError(f"which word names the object of {excerpt(layer.prompt)}? Give it as word")
    return words[-1]


def colour_of_prompt(prompt: str) -> str | None:
    """The first colour of CSS in the name; None without."""
    return next((word for word in _name(prompt) if word in ImageColor.colormap), None)


@dataclass(frozen=True, eq=False)
class Mask:
    """Where something is, pixel by pixel: an array (height, width), stretched to the canvas."""

    array: Annotated[Tensor, "height width"]

    @classmethod
    def of(cls, value: Any) -> Mask:
        """Only True and False count: what a grey value means, nobody can tell."""
        array = numpy.asarray(value)
        if array.ndim != 2 or array.dtype != bool:
            raise ValueError(
                f"is of shape {array.shape} and type {array.dtype}, but should be an array "
                "(height, width) of True and False: numpy.asarray(image.convert('L')) > 127"
            )
        if not array.any():
            raise ValueError("is empty: no pixel of it is set")
        return cls(torch.from_numpy(array.copy()))

    def cells(self, height: int, width: int) -> Annotated[Tensor, "{height} {width}"]:
        """A cell is covered if half of its area is; else the one that is covered most."""
        covered = functional.adaptive_avg_pool2d(self.array[None].float(), (height, width))[0]
        return covered >= min(0.5, float(covered.max()))

    @property
    def box(self) -> Box:
        """The tight box around the mask."""
        return tight_box(self.array)
