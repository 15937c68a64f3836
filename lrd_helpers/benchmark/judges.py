"""Who judges a picture, and what they say of it."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from lrd_helpers.benchmark.layouts import with_shapes
from lrd_helpers.layout import Layout
from lrd_helpers.measure import (
    Clip,
    Description,
    Detection,
    Detector,
    StorybookClip,
    StorybookDetector,
    ZeroShotDetector,
    attribute_accuracy,
    clip_score,
    front_seen,
    layout_iou,
    leakage,
    overlap_ious,
    overlapping_pairs,
    overlay_score,
    picture_success,
    success,
)
from lrd_helpers.messages import excerpt


class LookingOnce(StorybookDetector):
    """Remembers the last picture: each metric asks about it anew."""

    last: tuple[object, Description] | None = None

    def describe(self, image: Any) -> Description:
        if self.last is None or self.last[0] is not image:
            self.last = image, super().describe(image)
        return self.last[1]


class Remembering:
    """A detector of any kind that remembers what it said of the last picture, prompt by prompt."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.last: tuple[object, dict[str, list[Detection]]] | None = None

    def __call__(self, image: Any, prompts: Sequence[str]) -> list[list[Detection]]:
        if self.last is None or self.last[0] is not image:
            self.last = image, {}
        found = self.last[1]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if new:
            found |= dict(zip(new, self.detector(image, new), strict=True))
        return [found[prompt] for prompt in prompts]


class Judges(NamedTuple):
    """The detector and the CLIP of a benchmark."""

    detector: Detector
    clip: Clip

    @property
    def names(self) -> dict[str, str]:
        """Their kinds and weights: other judges, other names."""
        detector = self.detector
        detector = detector.detector if isinstance(detector, Remembering) else detector
        weights = digest(getattr(detector, "model", None))
        rules = getattr(detector, "rules", "")
        return {
            "detector": f"{type(detector).__name__} {weights} {rules}",
            "clip": f"{type(self.clip).__name__} {digest(getattr(self.clip, 'model', None))}",
        }


def judges(detector: Detector | None = None, clip: Clip | None = None) -> Judges:
    """The judges that were given, and the storybook's for those that were not."""
    if detector is None:
        detector = LookingOnce()
    elif not isinstance(detector, (StorybookDetector, Remembering)):
        detector = Remembering(detector)
    return Judges(detector, StorybookClip() if clip is None else clip)


def check_masks(detector: Detector, layout: Layout) -> None:
    """Refuse layers with a mask where the detector is one that gives boxes only.

    Raises:
        ValueError: names the first.
    """
    inner = detector.detector if isinstance(detector, Remembering) else detector
    for number, layer in enumerate(layout.layers, start=1):
        if layer.mask is not None and isinstance(inner, ZeroShotDetector):
            raise ValueError(
                f"layer {number} {excerpt(layer.prompt)} has a mask, but the detector gives boxes "
                "only; add a segmenter of pixels (--sam facebook/sam-vit-base)"
            )


def scored(detector: Detector, clip: Clip, image: Image.Image, layout: Layout) -> dict[str, float]:
    """What `Row` has of a picture's quality: all `METRICS` but average precision."""
    ious = layout_iou(detector, image, layout)
    storybook = isinstance(detector, StorybookDetector)  # then the stickers' shapes are there, too
    shapes = with_shapes(layout) if storybook and overlapping_pairs(layout) else layout
    return {
        "iou": statistics.fmean(ious),
        "success": statistics.fmean(success(ious)),
        "picture_success": float(picture_success(ious)),
        "overlap_iou": _mean(overlap_ious(detector, image, layout)),
        "order": _mean(front_seen(detector, image, shapes)),
        "attribute": _mean(attribute_accuracy(detector, image, layout)),
        "leakage": statistics.fmean(leakage(detector, image, layout)),
        "clip": clip_score(clip, image, layout.caption),
        "overlay_score": overlay_score(clip, layout),
    }


def _mean(values: Sequence[float | bool | None]) -> float:
    """The mean of those that say something; NaN where none does."""
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else math.nan


def digest(*modules: nn.Module | None) -> str:
    """A short name for weights: other weights, another name."""
    sha = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items() if isinstance(module, nn.Module) else ():
            sha.update(name.encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]
