"""Detectors: they find in a picture what prompts name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

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
    """

    def __init__(self, find: Callable[..., list[dict]], *, threshold: float = 0.1) -> None:
        self.find, self.threshold = find, threshold

    def __call__(self, image: Picture, prompts: Sequence[str]) -> list[list[Detection]]:
        """The boxes that it gives for each prompt; it knows no pixels.

        Raises:
            ValueError: it answers with a label that is none of the prompts. Case and full stops
                make no difference: some models change them.
        """
        picture = picture_of(image)
        sides = {"xmin": picture.width, "ymin": picture.height}
        sides |= {"xmax": picture.width, "ymax": picture.height}
        labels = list({_plain(prompt): prompt for prompt in prompts}.values())
        detections: dict[str, list[Detection]] = {_plain(label): [] for label in labels}
        for answer in self.find(picture, candidate_labels=labels, threshold=self.threshold):
            if _plain(answer["label"]) not in detections:
                asked = ", ".join(map(repr, labels))
                raise ValueError(
                    f"the detector's label {excerpt(answer['label'])} is none of the prompts that "
                    f"it was asked for: {asked if len(asked) <= 150 else asked[:149] + '…'}"
                )
            box = tuple(min(1.0, max(0.0, answer["box"][name] / sides[name])) for name in sides)
            found = Detection(box, float(answer["score"]), None)
            detections[_plain(answer["label"])].append(found)
        return [detections[_plain(prompt)] for prompt in prompts]


def _plain(label: object) -> str:
    return " ".join(str(label).casefold().replace(".", " ").split())
