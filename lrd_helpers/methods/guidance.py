"""Vision guidance: the field ξ that tells one layer where its object is (LRDiff, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from PIL import ImageColor
from torch import Tensor

from lrd_helpers.layout import Layer
from lrd_helpers.methods.choices import Choices
from lrd_helpers.methods.regions import (
    Fields,
    Plan,
    background_prompt,
    layer_name,
    make_plan,
    phases,
    times_wider,
)
from lrd_helpers.naming import WordError, colour_of_prompt, object_of_layer
from lrd_helpers.sampling.model import decode_latents, encode_images
from lrd_helpers.sampling.regions import stacked
from lrd_helpers.sampling.run import Rows, Run

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

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
    delta: Float[Tensor, "channels"],
    mask: Float[Tensor, "height width"],
    inside: float,
    outside: float,
) -> Float[Tensor, "channels height width"]:
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
) -> Float[Tensor, "channels"]:
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
) -> Float[Tensor, "colours channels"]:
    """z(c) = scaling_factor · mean over cells of E(flat picture of colour c), in single precision.

    The arguments are those of `constant_delta`, and so is the error.
    """
    device = vae.device if device is None else device
    rgb = torch.tensor([ImageColor.getrgb(c)[:3] for c in colours], dtype=torch.float32)
    pixels = (rgb / 127.5 - 1)[:, :, None, None].expand(-1, -1, size, size)
    return encode_images(vae, pixels.to(device, vae.dtype)).float().mean(dim=(2, 3))


def contrast_delta(
    colour: Float[Tensor, "channels"],
    background: Float[Tensor, "channels height width"],
    mask: Float[Tensor, "height width"],
) -> Float[Tensor, "channels"]:
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
    latents: Float[Tensor, "channels height width"],
    attention: Float[Tensor, "height width"],
    top_k: int,
) -> Float[Tensor, "channels"]:
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
    latents: Float[Tensor, "channels height width"],
    attention: Float[Tensor, "height width"],
    top_k: int,
) -> Float[Tensor, "channels"]:
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


# ------------------------------------------------------------------ the fields of a run


def positions(choices: Choices, size: Sequence[int]) -> int:
    """K on a canvas of so many cells; see `Choices.top_k`."""
    wider = 1.0 if choices.delta == "decoded" else times_wider(size)
    return round(choices.top_k * wider**2)


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
    run: Run, noise: Float[Tensor, "pictures channels height width"]
) -> Float[Tensor, "pictures channels height width"]:
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
    expected: Float[Tensor, "channels height width"],
    attention: Float[Tensor, "height width"] | None,
    colours: dict[str, Tensor],
) -> Float[Tensor, "channels"] | None:
    """δ of a layer; `expected` is the picture's noise, or with "contrast" its background."""
    vae = run.model.pipe.vae
    if choices.delta == "dynamic":
        return dynamic_delta(expected, attention, positions(choices, run.size))
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
    delta: Float[Tensor, "channels"],
    attention: Float[Tensor, "height width"] | None,
    noise: Float[Tensor, "pictures channels height width"],
) -> Float[Tensor, "channels height width"]:
    mask = layer.cells(*noise.shape[-2:]).to(noise.device, torch.float32)
    strengths = choices.inside * layer.strength, choices.outside * layer.strength
    field = vision_guidance(delta, mask, *strengths)
    if choices.weighted:
        field = torch.where(mask > 0, field * attention / attention.max(), field)
    return field


def _attention_maps(
    run: Run, choices: Choices, noise: Float[Tensor, "pictures channels height width"]
) -> Iterator[Float[Tensor, "height width"]]:
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
