"""BoxDiff (Xie et al. 2023): x_t moves so that words fill their boxes and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from lrd_helpers.attention import AttentionMaps
from lrd_helpers.methods.plain import CaptionMethod, caption_step, check_options, words_of_layers
from lrd_helpers.methods.regions import captions
from lrd_helpers.sampling.run import Run, State
from lrd_helpers.words import every_word


@dataclass(frozen=True)
class BoxDiff(CaptionMethod):
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
        check_options(self, shares=("steps", "brightest"))

    def sample(self, run: Run) -> Iterator[State]:
        words = words_of_layers(run)
        things = [word for spoken in words for word in spoken.thing]
        caption, regions = every_word(run.model.tokens(run.layout.caption), things), captions(run)

        def constraints(attention: AttentionMaps) -> Float[Tensor, "layers 3"]:
            maps = maps_nearest_to(16 * 16, [attention.per_layer(*word) for word in caption])
            shares = (100 * maps).softmax(dim=0)
            rows = []
            for spoken, layer in zip(words, run.layout.layers, strict=True):
                share = shares[[caption.index(word) for word in spoken.thing]].sum(dim=0)
                cells = layer.cells(*share.shape)
                rows.append(box_constraints(smoothed(share), cells, self.brightest, self.corner))
            return torch.stack(rows)

        def worst_inner(attention: AttentionMaps) -> Float[Tensor, ""]:
            return constraints(attention)[:, 0].max()

        def everything(attention: AttentionMaps) -> Float[Tensor, ""]:
            return constraints(attention).sum()

        x, count = run.x_T, len(run.steps)
        targets = {round(share * count): target for share, target in self.refine}
        for i, t in run.steps.until(count):
            rate = self.strength * math.sqrt(1 - 0.5 * i / max(1, count - 1))
            for _ in range(self.refinements if i in targets else 0):
                loss, moved = run.descended(x, t, worst_inner, rate)
                if loss <= 1 - targets[i]:
                    break
                x = moved
            if i < round(self.steps * count):
                _, x = run.descended(x, t, everything, rate)
            state = caption_step(run, regions, i, t, x)
            yield state
            x = state.x


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
    sizes = {tuple(map_.shape[-2:]) for map_ in maps[0].values()}
    size = min(sizes, key=lambda size: abs(math.log(size[0] * size[1] / positions)))
    alike = [[m[0] for m in layers.values() if tuple(m.shape[-2:]) == size] for layers in maps]
    return torch.stack([torch.stack(same_size).mean(dim=0) for same_size in alike])
