"""What the paper, the authors' script and others do differently: every choice has a name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lrd_helpers.attention import Layers
from lrd_helpers.layout import Overlap
from lrd_helpers.messages import excerpt

Delta = Literal["constant", "contrast", "dynamic", "decoded"]
Guide = Literal["steps", "noise", "both"]
Fuse = Literal["steps", "once", "collage"]
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
        attention: the layers whose maps a dynamic δ looks at; see `capture_attention`.
        top_k: K, how many positions of the map δ is the mean of; on a canvas of more than 16 × 16
            cells as large a share (of 64 × 64: 16 K), or else δ, a mean of noise, would outweigh
            the noise's own mean in a region. With "decoded" pixels, on any canvas: the script's 20
            of 512 × 512 lie in one or two cells, as 20 of 128 × 128 do.
        weighted: inside, ξ follows the attention map (over its largest value) instead of being the
            same everywhere.
        fuse: the layers are put together at all "steps" (`lrdiff.layered_denoising`: the paper's
            Algorithm 1); or each runs alone and they are put together "once", after the last
            layered step (`script.merged_once`); or each is sketched alone, and its object is put
            into a "collage" (`collage.collage_of_sketches`, which is no LRDiff). Where all layers
            (of all pictures) fill the canvas there is nothing to move: "collage" is "steps".
        sketch_steps: with fuse="collage": in how many steps of DDIM a layer is sketched.
        layered_fraction: which part of the steps, in [0, 1], is layered (the paper's t0). With
            fuse="collage" these steps are not made: the sketches take their place. There it is
            meant for 16 × 16 cells: on a wider canvas fewer are left out, so that the noise hides
            as much of the collage (`Steps.late_start`): of 25 steps 17 at .68, of 64 × 64 cells 7.
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
