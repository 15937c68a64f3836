"""Detectors: they find in a picture what prompts name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor, nn

from lrd_helpers.layout import Layer
from lrd_helpers.mask import Box
from lrd_helpers.messages import excerpt
from lrd_helpers.pictures import Picture, picture_of


@dataclass(frozen=True, eq=False)
class Detection:
    """A thing in a picture.

    Attributes:
        box: (x0, y0, x1, y1) as fractions of the picture, the tight box of what is visible.
        score: how sure the detector is, in [0, 1].
        mask: the pixels, where the detector knows them.
    """

    box: Box
    score: float
    mask: Bool[Tensor, "height width"] | None


@runtime_checkable
class Detector(Protocol):
    """Finds in a picture what each of several prompts names."""

    def __call__(self, image: Picture, prompts: Sequence[str]) -> list[list[Detection]]:
        """A list of detections per prompt, empty where there is nothing.

        A thing that answers to several prompts ("a car", "a red car") is the same `Detection`
        object in each of their lists.
        """
        ...


class ZeroShotDetector:
    """Finds what prompts name in photographs and anything else, by a detector of transformers.

    Args:
        find: a pipeline for "zero-shot-object-detection", such as `transformers.pipeline(task,
            model="google/owlv2-base-patch16-ensemble", revision=…)`.
        threshold: how sure it must be, in [0, 1].
        overlap: of two boxes for a prompt that have a larger IoU only the surer one counts: such
            detectors often see a thing more than once. 1: both count.
    """

    def __init__(
        self, find: Callable[..., list[dict]], *, threshold: float = 0.1, overlap: float = 1.0
    ) -> None:
        self.find, self.threshold, self.overlap = find, threshold, overlap

    @property
    def model(self) -> Any:
        """Whose weights its answers depend on, where the pipeline tells."""
        return getattr(self.find, "model", None)

    @property
    def rules(self) -> str:
        """What its answers depend on besides, to be kept beside what it measured."""
        return f"threshold {self.threshold:g}, overlap {self.overlap:g}"

    def __call__(self, image: Picture, prompts: Sequence[str]) -> list[list[Detection]]:
        """The boxes that it gives for each prompt; it knows no pixels.

        Raises:
            ValueError: it answers with a label that is none of the prompts. Case and full stops
                make no difference: some models change them.
        """
        picture = picture_of(image)
        sides = {"xmin": picture.width, "ymin": picture.height}
        sides |= {"xmax": picture.width, "ymax": picture.height}
        labels = list({_plain(prompt): self.asked(prompt) for prompt in prompts}.values())
        detections: dict[str, list[Detection]] = {_plain(label): [] for label in labels}
        for answer in self.find(picture, candidate_labels=labels, threshold=self.threshold):
            if _plain(answer["label"]) not in detections:
                asked = ", ".join(map(repr, labels))
                raise ValueError(
                    f"the detector's label {excerpt(answer['label'])} is none of the prompts that "
                    f"it was asked for: {asked if len(asked) <= 150 else asked[:149] + '…'}"
                )
            box = tuple(min(1.0, max(0.0, answer["box"][name] / sides[name])) for name in sides)
            if box[0] < box[2] and box[1] < box[3]:  # it rounds to pixels: a thin one is none
                found = Detection(box, float(answer["score"]), None)
                detections[_plain(answer["label"])].append(found)
        detections = {label: self._apart(things) for label, things in detections.items()}
        return [detections[_plain(prompt)] for prompt in prompts]

    def asked(self, label: str) -> str:
        """How the model wants a prompt to be written."""
        return label

    def _apart(self, things: Sequence[Detection]) -> list[Detection]:
        """The things of which no surer one is in the same place (non-maximum suppression)."""
        kept: list[Detection] = []
        for thing in sorted(things, key=lambda thing: -thing.score):
            if all(box_iou(thing.box, other.box) <= self.overlap for other in kept):
                kept.append(thing)
        return kept


class SegmentedDetector:
    """The things that a detector finds, with their pixels: SAM looks into each box.

    Source: Kirillov et al. 2023, "Segment Anything"; after a detector as in "Grounded SAM".

    Args:
        detector: gives the boxes.
        model: a `SamModel` of transformers.
        processor: its `SamProcessor`.
    """

    def __init__(self, detector: Detector, model: nn.Module, processor: Any) -> None:
        self.detector, self.segmenter, self.processor = detector, model.eval(), processor
        self.model = nn.ModuleList([getattr(detector, "model", None) or nn.Identity(), model])

    @property
    def rules(self) -> str:
        """Those of the detector, and that masks were added."""
        return f"{getattr(self.detector, 'rules', '')}, masks by SAM"

    def __call__(self, image: Picture, prompts: Sequence[str]) -> list[list[Detection]]:
        """As the detector; where SAM sees nothing in a box, the pixels of the box."""
        picture = picture_of(image)
        found = self.detector(picture, prompts)
        things = list({id(thing): thing for of_prompt in found for thing in of_prompt}.values())
        masks = self._masks(picture, [thing.box for thing in things]) if things else []
        masked = {
            id(thing): replace(thing, mask=mask) for thing, mask in zip(things, masks, strict=True)
        }
        return [[masked[id(thing)] for thing in of_prompt] for of_prompt in found]

    @torch.no_grad()
    def _masks(
        self, picture: Image.Image, boxes: Sequence[Box]
    ) -> list[Bool[Tensor, "height width"]]:
        sides = (picture.width, picture.height) * 2
        pixels = [[value * side for value, side in zip(b, sides, strict=True)] for b in boxes]
        inputs = self.processor(picture, input_boxes=[pixels], return_tensors="pt")
        sizes = [inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes")]
        device = next(self.segmenter.parameters()).device
        answer = self.segmenter(**inputs.to(device), multimask_output=False)
        [masks] = self.processor.post_process_masks([*answer.pred_masks.cpu()], *sizes)
        whole = [Layer("a box", box).cells(picture.height, picture.width) for box in boxes]
        return [mask if mask.any() else box for mask, box in zip(masks[:, 0], whole, strict=True)]


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1); 0 where either has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def _plain(label: object) -> str:
    return " ".join(str(label).casefold().replace(".", " ").split())
