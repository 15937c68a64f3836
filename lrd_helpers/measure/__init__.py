"""How well a picture obeys its layout and its caption.

| function | question | range |
|---|---|---|
| `layout_iou`, `success_rate` | is each layer where it was asked for? | 0 to 1 |
| `attribute_accuracy` | has the thing in its place the colour that was asked for? | yes or no |
| `leakage` | how much of it, or of its colour, is elsewhere? | 0 (none) to 1 |
| `picture_success` | are all layers of a picture where they should be? | yes or no |
| `overlap_ious` | where boxes overlap: is that in its place? | 0 to 1 |
| `front_seen` | and is the thing in front seen in front? | yes or no |
| `overlay_score` | how hard do overlaps make a layout? (of no picture) | 0 (none) and up |
| `average_precision` | the first question as detectors are judged, over many pictures | 0 to 1 |
| `clip_score`, `text_image_similarity` | does the picture fit the caption? | ±100, ±1 |

What looks at the picture is an argument: any `Detector` finds things, any `Clip` compares pictures
with words. `StorybookDetector` and `StorybookClip` are the shipped ones; `OwnStickerDetector` also
finds stickers of your own; `load_detector` (OWLv2, Grounding DINO; SAM) and
`load_pretrained_clip` give judges that know the real world.

    ious = layout_iou(StorybookDetector(), image, layout)      # a number per layer
    score = clip_score(StorybookClip(), image, layout.caption)
"""

from lrd_helpers.measure.clip import (
    Clip,
    PretrainedClip,
    StorybookClip,
    clip_score,
    text_image_similarity,
)
from lrd_helpers.measure.detectors import (
    Detection,
    Detector,
    SegmentedDetector,
    ZeroShotDetector,
    box_iou,
)
from lrd_helpers.measure.overlaps import (
    front_seen,
    overlap_ious,
    overlapping_pairs,
    overlay_score,
)
from lrd_helpers.measure.own import OwnStickerDetector
from lrd_helpers.measure.precision import average_precision
from lrd_helpers.measure.pretrained import load_detector, load_pretrained_clip
from lrd_helpers.measure.scores import (
    attribute_accuracy,
    found_boxes,
    layout_iou,
    leakage,
    picture_success,
    success,
    success_rate,
)
from lrd_helpers.measure.storybook import (
    Description,
    StickerDetection,
    StorybookDetector,
    sticker_and_colour,
)

__all__ = [
    "Clip",
    "Description",
    "Detection",
    "Detector",
    "OwnStickerDetector",
    "PretrainedClip",
    "SegmentedDetector",
    "StickerDetection",
    "StorybookClip",
    "StorybookDetector",
    "ZeroShotDetector",
    "attribute_accuracy",
    "average_precision",
    "box_iou",
    "clip_score",
    "found_boxes",
    "front_seen",
    "layout_iou",
    "leakage",
    "load_detector",
    "load_pretrained_clip",
    "overlap_ious",
    "overlapping_pairs",
    "overlay_score",
    "picture_success",
    "sticker_and_colour",
    "success",
    "success_rate",
    "text_image_similarity",
]
