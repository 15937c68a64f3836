"""Who judges a picture, and what they say of it."""

from __future__ import annotations

import hashlib
import math
import statistics
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from lrd_helpers.layout import Layout
from lrd_helpers.measure import (
    Clip,
    Description,
    Detector,
    StorybookClip,
    StorybookDetector,
    attribute_accuracy,
    clip_score,
    layout_iou,
    leakage,
    success,
)


class LookingOnce(StorybookDetector):
    """Remembers the last picture: each metric asks about it anew."""

    last: tuple[object, Description] | None = None

    def describe(self, image: Any) -> Description:
        if self.last is None or self.last[0] is not image:
            self.last = image, super().describe(image)
        return self.last[1]


class Judges(NamedTuple):
    """The detector and the CLIP of a benchmark."""

    detector: Detector
    clip: Clip

    @property
    def names(self) -> dict[str, str]:
        """Their kinds and weights: other judges, other names."""
        weights = digest(getattr(self.detector, "model", None))
        rules = getattr(self.detector, "rules", "")
        return {
            "detector": f"{type(self.detector).__name__} {weights} {rules}",
            "clip": f"{type(self.clip).__name__} {digest(getattr(self.clip, 'model', None))}",
        }


def judges(detector: Detector | None = None, clip: Clip | None = None) -> Judges:
    """The judges that were given, and the storybook's for those that were not."""
    return Judges(
        LookingOnce() if detector is None else detector, StorybookClip() if clip is None else clip
    )


def scored(detector: Detector, clip: Clip, image: Image.Image, layout: Layout) -> dict[str, float]:
    """`METRICS` but average precision, which is of many pictures together."""
    ious = layout_iou(detector, image, layout)
    colours = [right for right in attribute_accuracy(detector, image, layout) if right is not None]
    return {
        "iou": statistics.fmean(ious),
        "success": statistics.fmean(success(ious)),
        "attribute": statistics.fmean(colours) if colours else math.nan,
        "leakage": statistics.fmean(leakage(detector, image, layout)),
        "clip": clip_score(clip, image, layout.caption),
    }


def digest(*modules: nn.Module | None) -> str:
    """A short name for weights: other weights, another name."""
    sha = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items() if isinstance(module, nn.Module) else ():
            sha.update(name.encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]
