"""Sampling of layers that are generated together, by the trained layered U-Net (LayerDiff).

Huang et al., "LayerDiff", ECCV 2024, has no public code. The steps are its text's as far as that
goes; what is a reconstruction of ours says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from lrd_helpers.layerdiff.unet import COMPOSITE
from lrd_helpers.sampling.model import checked_finite
from lrd_helpers.sampling.steps import Steps

if TYPE_CHECKING:
    from lrd_helpers.layerdiff.unet import LayeredUNet2DConditionModel, Stacks

THING = 1.0
"""A cell belongs to the layer where its clean latents are so far from an empty layer's."""

BLUR = 5
"""Cells along the side of the square over which self-mask guidance takes the mean."""


@dataclass
class StackRun:
    """One drawing of stacks: background, layers back to front, composite, in this order.

    Attributes:
        unet: the layered U-Net.
        steps: the timesteps and the scheduler.
        text: embeddings of the prompts, [unconditional, conditional].
        identities: which slot is which; see `slot_identities`.
        present: False for slots that only fill up the batch.
        given: the slots that are not drawn: they are what `clean` says, without noise, at t = 0.
        clean: latents of the given slots.
        x: the noise that the drawing begins with, in the scheduler's units.
        empty: latents of a layer that shows nothing.
        guidance_scale: γ of classifier-free guidance; none where γ ≤ 1.
        guide_from: what guidance leads away from: each slot "alone", or all "together" without
            their prompts.
        self_mask_scale: s of self-mask guidance; 0 = none.
        xi: ξ of each slot that every step sees, in units of x_T ~ N(0, I); None: no slot has one.
    """

    unet: LayeredUNet2DConditionModel
    steps: Steps
    text: Float[Tensor, "two batch slots tokens width"]
    identities: Int[Tensor, "batch slots"]
    present: Bool[Tensor, "batch slots"]
    given: Bool[Tensor, "batch slots"]
    clean: Stacks
    x: Stacks
    empty: Float[Tensor, "channels height width"]
    guidance_scale: float = 3.0
    guide_from: Literal["alone", "together"] = "alone"
    self_mask_scale: float = 0.0
    xi: Stacks | None = None

    @property
    def composites(self) -> tuple[Tensor, Tensor]:
        """Stack and slot of each composite."""
        return (self.identities == COMPOSITE).nonzero(as_tuple=True)


@dataclass
class StackState:
    """One step that was made; whoever iterates may look at `x` or replace it."""

    i: int
    t: Tensor
    x: Stacks


def layer_denoising(run: StackRun, start: int = 0) -> Iterator[StackState]:
    """All slots of a stack, denoised together; given ones stay what they are.

    Text → layers: nothing is given. Image → layers: the composite is. Layer inpainting: the other
    slots are. So one model does all three (as MRT, 2026; LayerDiff re-noises the given layers).
    """
    x, here = run.x, run.present
    pictures = here.nonzero()[:, 0].tolist()
    for i, t in run.steps.since(start):
        seen = torch.where(run.given[..., None, None, None], run.clean, run.steps.model_input(x, t))
        noise = guided_noise(run, seen, t)
        drawn = x.clone()  # what a scheduler adds to a stack does not depend on its neighbours
        drawn[here] = run.steps.step(noise[here], t, x[here], pictures)
        x = torch.where(run.given[..., None, None, None], run.clean, drawn)
        state = StackState(i, t, x)
        yield state
        x = state.x


def guided_noise(run: StackRun, seen: Stacks, t: Tensor) -> Stacks:
    """ε(∅) + γ (ε(y) − ε(∅)) + s (ε(y) − ε̃(y)), where ε̃ sees the layers' things blurred.

    In ε(∅) a slot has neither prompt nor neighbours, so that guidance strengthens not only what
    its prompt says, but also what the other slots tell it [ours, as InstructPix2Pix does with its
    picture: Brooks et al. 2023]. With `guide_from` = "together" it loses its prompt alone.

    The last part is LayerDiff's self-mask guidance. [reconstruction, after self-attention guidance:
    Hong et al. 2023] It costs one more row a slot.
    """
    unasked, asked = run.text
    shift = None if run.xi is None else run.steps.shift_of_input(t)
    x = seen if shift is None else seen + run.xi
    if run.guidance_scale <= 1:
        (noise,) = predicted_noise(run, [x], t, [asked])
        guided = noise
    else:
        if run.guide_from == "alone":
            (noise,) = predicted_noise(run, [x], t, [asked])
            without = noise_alone(run, x, t, unasked)
        else:
            without, noise = predicted_noise(run, [x, x], t, [unasked, asked])
        guided = without + run.guidance_scale * (noise - without)
    if run.self_mask_scale:
        (worse,) = predicted_noise(run, [degraded(run, x, noise, t)], t, [asked])
        guided = guided + run.self_mask_scale * (noise - worse)
    return guided if shift is None else guided + shift * run.xi


def noise_alone(
    run: StackRun, x: Stacks, t: Tensor, text: Float[Tensor, "batch slots tokens width"]
) -> Stacks:
    """What the layered U-Net predicts for each slot by itself, as a stack of one."""
    batch, slots = x.shape[:2]
    rows, prompts = x.flatten(0, 1)[:, None], text.flatten(0, 1)
    times, identities = (
        each.expand(batch, slots).reshape(-1, 1)
        for each in (torch.where(run.given, 0, t), run.identities)
    )
    noise = run.unet(rows, times, prompts[:, None], prompts, identities).sample[:, 0]
    checked_finite(noise, f"the U-Net's predictions at t = {float(t):g}")
    return noise.unflatten(0, (batch, slots))


def predicted_noise(
    run: StackRun, stacks: Sequence[Stacks], t: Tensor, texts: Sequence[Tensor]
) -> Sequence[Stacks]:
    """The layered U-Net's predictions for several versions of the stacks, in one batch."""
    count = len(stacks)
    times = torch.where(run.given, 0, t)
    noise = run.unet(
        torch.cat(list(stacks)),
        times.repeat(count, 1),
        torch.cat(list(texts)),
        torch.cat([text[run.composites] for text in texts]),  # whose prompt is the caption
        run.identities.repeat(count, 1),
        run.present.repeat(count, 1),
    ).sample
    return checked_finite(noise, f"the U-Net's predictions at t = {float(t):g}").chunk(count)


def self_mask(
    x0: Stacks, empty: Float[Tensor, "channels height width"]
) -> Float[Tensor, "batch slots 1 height width"]:
    """m: 1 in the cells in which a layer's own clean latents are a thing's, not an empty layer's.

    The paper decodes a mask from latents of its own; an RGBA autoencoder's have none apart.
    """
    return ((x0 - empty).square().mean(2, keepdim=True).sqrt() > THING).to(x0)


def degraded(run: StackRun, seen: Stacks, noise: Stacks, t: Tensor) -> Stacks:
    """z̃ = (1 − m)·z + m·(α·blur(x̂_0) + σ·ε̂): the things blurred, their noise as it was."""
    alpha, sigma = run.steps.coefficients(t)
    x0 = run.steps.x0(seen, noise, t)
    m = self_mask(x0, run.empty)
    m[:, 0] = m[run.composites] = 0  # background and composite have no mask
    m = m.where(~run.given[..., None, None, None], 0.0)
    blurred = functional.avg_pool2d(
        x0.flatten(0, 1), BLUR, stride=1, padding=BLUR // 2, count_include_pad=False
    )
    again = alpha * blurred.unflatten(0, x0.shape[:2]) + sigma * noise
    return (1 - m) * seen + m * again
