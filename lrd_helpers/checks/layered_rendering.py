"""The exercises of notebook 08: the five pieces of Algorithm 1, and the machine made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lrd_helpers.checks import Mistake, check_function, is_right, normal
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.mask import Box
from lrd_helpers.methods.guidance import constant_delta, vision_guidance
from lrd_helpers.naming import colour_of_prompt

if TYPE_CHECKING:
    from lrd_helpers.pipeline import LayeredRenderingPipeline

__all__ = ["Pieces", "assembled"]

BACK: Box = (0.05, 0.10, 0.63, 0.80)
FRONT: Box = (0.41, 0.45, 0.93, 0.97)
SMALL: Box = (0.50, 0.05, 0.78, 0.62)


# ------------------------------------------------------------------ the right pieces


def _visible_masks(boxes: list[Box], height: int, width: int) -> Tensor:
    return Layout("x", layers=[Layer("x", box=box) for box in boxes]).masks(height, width)


def _whole_shapes(boxes: list[Box], height: int, width: int) -> Tensor:
    return torch.stack([Layer("x", box=box).cells(height, width) for box in boxes]).float()


def _fields_of(deltas: Tensor, shapes: Tensor, inside: float, outside: float) -> Tensor:
    fields = [
        vision_guidance(delta, shape, inside, outside)
        for delta, shape in zip(deltas, shapes, strict=True)
    ]
    return torch.stack([torch.zeros_like(fields[0]), *fields])


def _layer_noises(
    ask: Callable[..., Tensor],
    x: Tensor,
    t: float,
    fields: Tensor,
    empty: Tensor,
    prompts: Tensor,
    scale: float,
) -> Tensor:
    seen, texts = x + fields, torch.cat([empty.expand_as(prompts), prompts])
    # In one batch, as the pipeline asks: so it rounds like the pipeline.
    s, s_y = ask(torch.cat([seen, seen]), t, texts).chunk(2)
    return s + scale * (s_y - s)


def _composed(noises: Tensor, masks: Tensor) -> Tensor:
    return (masks[:, None] * noises).sum(0)


def _switched(is_layered: Callable[..., bool]) -> Callable[..., Tensor]:
    """The loop of Algorithm 1; `is_layered(number, t, steps, fraction)` says whom to ask."""

    def algorithm_1(x, times, fraction, layered, general, step):
        for number, t in enumerate(times):
            noise_at = layered if is_layered(number, t, len(times), fraction) else general
            x = step(noise_at(x, t), t, x)
        return x

    return algorithm_1


_algorithm_1 = _switched(lambda number, t, steps, fraction: number < round(fraction * steps))


def _calls(algorithm: Callable[..., Any], case: tuple[Any, ...]) -> list[str]:
    """What an algorithm_1 calls, in order."""
    x, times, fraction, *_ = case
    calls: list[str] = []

    def noted(name: str) -> Callable[[Tensor, float], Tensor]:
        def ask(x: Tensor, t: float) -> Tensor:
            calls.append(f"{name}(x, {t})")
            return x

        return ask

    def step(noise: Tensor, t: float, x: Tensor) -> Tensor:
        calls.append(f"step(noise, {t}, x)")
        return x

    algorithm(x, times, fraction, noted("layered"), noted("general"), step)
    return calls


def _first_other_call(function: Callable[..., Any], case: tuple[Any, ...]) -> str:
    """Where the calls of an algorithm_1 part from those of the right one; "" if they do not."""
    pairs = zip_longest(_calls(function, case), _calls(_algorithm_1, case), fillvalue="nothing")
    for number, (saw, right) in enumerate(pairs, start=1):
        if saw != right:
            return f": call {number} is {saw} where {right} is due"
    return ""


# ------------------------------------------------------------------ the checks


def check_visible_masks(function: Callable[..., Any]) -> None:
    """Exercise 1, `visible_masks(boxes, height, width)`: whose cell is it? Later is in front."""

    def first_in_front(boxes: list[Box], height: int, width: int) -> Tensor:
        masks = _visible_masks(boxes[::-1], height, width)
        return torch.cat([masks[:1], masks[1:].flip(0)])

    def overlapping(boxes: list[Box], height: int, width: int) -> Tensor:
        shapes = _whole_shapes(boxes, height, width)
        return torch.cat([1 - shapes.amax(0, keepdim=True), shapes])

    def background_behind_all(boxes: list[Box], height: int, width: int) -> Tensor:
        masks = _visible_masks(boxes, height, width)
        return torch.cat([torch.ones_like(masks[:1]), masks[1:]])

    def axes_swapped(boxes: list[Box], height: int, width: int) -> Tensor:
        return _visible_masks([(y0, x0, y1, x1) for x0, y0, x1, y1 in boxes], height, width)

    check_function(
        function,
        _visible_masks,
        [([BACK, FRONT], 6, 9), ([FRONT, BACK, SMALL], 16, 16), ([SMALL, BACK], 8, 5)],
        axes=("mask", "row", "column"),
        expected="a tensor (layers + 1, height, width): background first, and in each cell one 1, "
        "where the latest layer is whose box holds the cell's centre",
        hint="the centre of column k is (k + 0.5) / width; go through the boxes from back to front "
        "and let each take its cells away from all before it",
        mistakes=[
            Mistake(
                "the first layer of the list is in front",
                "a list of layers goes from back to front: the last one lies on top",
                first_in_front,
            ),
            Mistake(
                "a cell in two boxes belongs to both layers",
                "one cell, one owner: what a nearer layer covers is taken away from those behind",
                overlapping,
            ),
            Mistake(
                "the background keeps the cells that layers cover",
                "the background has what the layers leave: in each cell the masks add up to 1",
                background_behind_all,
            ),
            Mistake(
                "x and y have changed places",
                "a box is left, top, right, bottom: x belongs to columns, y to rows",
                axes_swapped,
            ),
            Mistake(
                "the background is the last mask",
                "the background comes first: it is furthest back",
                lambda boxes, height, width: _visible_masks(boxes, height, width).roll(-1, 0),
            ),
        ],
    )


def check_fields_of(function: Callable[..., Any]) -> None:
    """Exercise 2, `fields_of(deltas, shapes, inside, outside)`: ξ^i (Eq. 5), 0 for background."""

    def case(layers: int, seed: int, inside: float, outside: float) -> tuple[Any, ...]:
        shapes = _whole_shapes([BACK, FRONT, SMALL][:layers], 5, 6)
        return normal(layers, 4, seed=seed), shapes, inside, outside

    check_function(
        function,
        _fields_of,
        [case(2, 0, 0.2, 0.2), case(3, 1, 0.05, 0.2), case(2, 2, 1.0, 0.5)],
        axes=("layer", "channel", "row", "column"),
        expected="a tensor (layers + 1, channels, height, width): zeros for the background, then "
        "inside·δ in each layer's shape and −outside·δ around it",
        hint="notebook 07's line for each layer: delta[:, None, None] * (inside * shape − outside "
        "* (1 − shape)); then torch.cat or torch.stack with a field of zeros in front",
        mistakes=[
            Mistake(
                "the background's field is the last",
                "in all our stacks the background is number 0",
                lambda deltas, shapes, a, b: _fields_of(deltas, shapes, a, b).roll(-1, 0),
            ),
            Mistake(
                "nothing outside",
                "outside, −outside·δ is added: the minus keeps second copies away",
                lambda deltas, shapes, a, b: _fields_of(deltas, shapes, a, 0.0),
            ),
            Mistake(
                "outside has the sign of inside: +outside·δ",
                "outside the object is suppressed: minus",
                lambda deltas, shapes, a, b: _fields_of(deltas, shapes, a, -b),
            ),
            Mistake(
                "all layers have the first layer's δ",
                "deltas[i] belongs to shapes[i]",
                lambda deltas, shapes, a, b: _fields_of(deltas[:1].expand_as(deltas), shapes, a, b),
            ),
        ],
    )


def check_layer_noises(function: Callable[..., Any]) -> None:
    """Exercise 3, `layer_noises(ask, x, t, fields, empty, prompts, scale)`: Eq. 8b's bracket."""

    def ask(x: Tensor, t: float, text: Tensor) -> Tensor:
        if x.ndim != 4 or text.ndim != 3 or len(x) != len(text):
            raise ValueError(
                "ask wants a batch: x (rows, channels, height, width) and text (rows, tokens, "
                f"features), got {tuple(x.shape)} and {tuple(text.shape)}"
            )
        return torch.tanh(x) * (1 + text.mean((1, 2)))[:, None, None, None] + 0.1 * t

    def case(layers: int, seed: int, t: float, scale: float) -> tuple[Any, ...]:
        x, empty = normal(4, 5, 6, seed=seed), normal(3, 2, seed=seed + 1)
        fields = 0.5 * normal(layers, 4, 5, 6, seed=seed + 2)
        fields[0] = 0  # the background's
        return ask, x, t, fields, empty, normal(layers, 3, 2, seed=seed + 3), scale

    def combined(formula: Callable[[Tensor, Tensor, float], Tensor], *, xi: float = 1) -> Any:
        """`formula(s, s_y, scale)`; s, the answer without a prompt, sees x + `xi`·ξ."""

        def answer(ask, x, t, fields, empty, prompts, scale):
            s = ask(x + xi * fields, t, empty.expand_as(prompts))
            return formula(s, ask(x + fields, t, prompts), scale)

        return answer

    def blind(ask, x, t, fields, empty, prompts, scale):
        return _layer_noises(ask, x, t, 0 * fields, empty, prompts, scale)

    check_function(
        function,
        _layer_noises,
        [case(3, 0, 0.9, 5.0), case(2, 10, 0.2, 3.0), case(1, 20, 0.5, 5.0)],
        axes=("layer", "channel", "row", "column"),
        expected="s + scale·(s_y − s) with s = ask(x + ξ, t, empty) and s_y = ask(x + ξ, t, "
        "prompts), a row a layer",
        hint="x + fields is the batch (x is repeated by itself); empty.expand_as(prompts) repeats "
        "the empty text for every row",
        mistakes=[
            Mistake(
                "the answer without a prompt does not see ξ",
                "both answers look at x + ξ: guidance is the difference that the *prompt* makes",
                combined(lambda s, s_y, scale: s + scale * (s_y - s), xi=0),
            ),
            Mistake(
                "the U-Net does not see ξ at all",
                "ask(x + fields, …) in place of ask(x, …)",
                blind,
            ),
            Mistake(
                "s_y + scale·(s_y − s): one scale too much",
                "our γ begins at s: s + scale·(s_y − s), so that γ = 1 is the prompt alone",
                combined(lambda s, s_y, scale: s_y + scale * (s_y - s)),
            ),
            Mistake(
                "guided away from the prompt: s + scale·(s − s_y)",
                "from the empty text towards the prompt: s_y − s",
                combined(lambda s, s_y, scale: s + scale * (s - s_y)),
            ),
        ],
    )


def check_composed(function: Callable[..., Any]) -> None:
    """Exercise 4, `composed(noises, masks)`: Φ = Σ_i M^i ⊙ noises^i (Eq. 8b)."""

    def case(boxes: list[Box], seed: int) -> tuple[Tensor, Tensor]:
        return normal(len(boxes) + 1, 4, 6, 7, seed=seed), _visible_masks(boxes, 6, 7)

    check_function(
        function,
        _composed,
        [case([BACK, FRONT], 0), case([FRONT], 1), case([BACK, FRONT, SMALL, FRONT], 2)],
        axes=("channel", "row", "column"),
        expected="in each cell the noise of the layer that owns it: the sum over layers of mask "
        "times noise, of shape (channels, height, width)",
        hint="masks has no channels: masks[:, None] has the shape (layers, 1, height, width); then "
        ".sum(0)",
        mistakes=[
            Mistake(
                "the mean over the layers, without masks",
                "each layer counts only where its mask is 1: multiply first",
                lambda noises, masks: noises.mean(0),
            ),
            Mistake(
                "the sum over the layers, without masks",
                "each layer counts only where its mask is 1: multiply first",
                lambda noises, masks: noises.sum(0),
            ),
            Mistake(
                "the right cells, but divided by the number of layers",
                "the masks add up to 1 already: a sum, not a mean",
                lambda noises, masks: _composed(noises, masks) / len(masks),
            ),
            Mistake(
                "nothing where the background is",
                "the background is layer 0 and counts like the others",
                lambda noises, masks: _composed(noises[1:], masks[1:]),
            ),
        ],
    )


def check_algorithm_1(function: Callable[..., Any]) -> None:
    """Exercise 5, `algorithm_1(x, times, fraction, layered, general, step)`: the switch at t0."""

    def layered(x: Tensor, t: int) -> Tensor:
        return torch.tanh(x + t / 1000)

    def general(x: Tensor, t: int) -> Tensor:
        return 0.3 * x - t / 500

    def step(noise: Tensor, t: int, x: Tensor) -> Tensor:
        return 1.05 * x - (0.2 + t / 2000) * noise

    def case(times: list[int], fraction: float, seed: int) -> tuple[Any, ...]:
        return normal(4, 3, 3, seed=seed), times, fraction, layered, general, step

    # Uneven on purpose: a share of the steps is no share of the time.
    several = [990, 940, 900, 600, 100]
    check_function(
        function,
        _algorithm_1,
        [
            case(several, 0.6, 0),
            case([999, 400, 300, 200, 100, 1], 0.45, 1),
            case(several, 0.0, 2),
            case(several[:4], 1.0, 3),
        ],
        axes=("channel", "row", "column"),
        where=_first_other_call,
        expected="the first round(fraction·T) of the T steps with layered(x, t), the rest with "
        "general(x, t), each followed by x = step(noise, t, x)",
        hint="for number, t in enumerate(times): number < round(fraction * len(times)) says which "
        "of the two to ask",
        mistakes=[
            Mistake(
                "one layered step too many",
                "numbers begin at 0: <, not <=",
                _switched(lambda number, t, steps, share: number <= round(share * steps)),
            ),
            Mistake(
                "the fraction is taken of the time t, not of the steps",
                "compare the number of the step: times need not be evenly spaced",
                _switched(lambda number, t, steps, share: t > (1 - share) * 1000),
            ),
            Mistake(
                "the number of layered steps is cut off, not rounded",
                "round(fraction * len(times)): int(2.7) is 2",
                _switched(lambda number, t, steps, share: number < int(share * steps)),
            ),
            Mistake(
                "it stops after the first step",
                "return after the loop, not in it",
                lambda x, times, *rest: _algorithm_1(x, times[:1], *rest),
            ),
        ],
    )


# ------------------------------------------------------------------ the machine


@dataclass(frozen=True)
class Pieces:
    """The five functions that Algorithm 1 is made of."""

    visible_masks: Callable[..., Tensor]
    fields_of: Callable[..., Tensor]
    layer_noises: Callable[..., Tensor]
    composed: Callable[..., Tensor]
    algorithm_1: Callable[..., Tensor]

    @torch.no_grad()
    def __call__(
        self,
        pipe: LayeredRenderingPipeline,
        layout: Layout,
        generator: torch.Generator,
        *,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Float[Tensor, "3 height width"]:
        """The machine as a contender of the benchmark: a layout's picture, in [0, 1].

        As in the notebook: δ is the constant one, λ = 0.2, 60 % of the steps are layered, DDIM.
        """
        vae, scheduler, size = pipe.vae, pipe.scheduler, pipe.unet.config.sample_size
        boxes = [layer.bounding_box for layer in layout.layers]
        masks = self.visible_masks(boxes, size, size).float()
        shapes = torch.stack([self.visible_masks([box], size, size)[1] for box in boxes]).float()
        colours = [colour_of_prompt(layer.prompt) or "gray" for layer in layout.layers]
        deltas = torch.stack([constant_delta(vae, colour) for colour in colours])
        fields = self.fields_of(deltas, shapes, 0.2, 0.2)
        asked = [layout.background or layout.caption, *(layer.prompt for layer in layout.layers)]
        empty, caption = _encoded(pipe, [""])[0], _encoded(pipe, [layout.caption])
        prompts = _encoded(pipe, asked)

        def noises(x: Tensor, t: Tensor, fields: Tensor, texts: Tensor) -> Tensor:
            return self.layer_noises(
                lambda *seen: pipe.unet(*seen).sample, x, t, fields, empty, texts, guidance_scale
            )

        scheduler.set_timesteps(num_inference_steps)
        x = self.algorithm_1(
            torch.randn(1, vae.config.latent_channels, size, size, generator=generator)[0],
            list(scheduler.timesteps),
            0.6,
            lambda x, t: self.composed(noises(x, t, fields, prompts), masks),
            lambda x, t: noises(x, t, torch.zeros_like(fields[:1]), caption)[0],
            lambda noise, t, x: scheduler.step(noise, t, x).prev_sample,
        )
        return (vae.decode(x[None] / vae.config.scaling_factor).sample[0] / 2 + 0.5).clamp(0, 1)


def _encoded(pipe: LayeredRenderingPipeline, texts: list[str]) -> Tensor:
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return pipe.text_encoder(pipe.tokenizer(texts, **options).input_ids).last_hidden_state


_PARTS = {
    "visible_masks": (check_visible_masks, _visible_masks),
    "fields_of": (check_fields_of, _fields_of),
    "layer_noises": (check_layer_noises, _layer_noises),
    "composed": (check_composed, _composed),
    "algorithm_1": (check_algorithm_1, _algorithm_1),
}


def assembled(*functions: Callable[..., Any] | None) -> Pieces:
    """The learner's five functions where their checks say ✓, in place of the others the right ones.

    Prints whose is used.

    Args:
        functions: in the order of the exercises; None for a side road that was not taken.
    """
    pieces, yours = {}, []
    for (name, (check, right)), function in zip(_PARTS.items(), functions, strict=True):
        if is_right(check, function):
            yours.append(name)
            right = function
        pieces[name] = right
    ours = [name for name in pieces if name not in yours]
    print(f"yours: {', '.join(yours) or 'none yet'}")
    print(f"ours:  {', '.join(ours) or 'none'}")
    return Pieces(**pieces)
