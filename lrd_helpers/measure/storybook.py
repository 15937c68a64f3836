"""The storybook's detector: which stickers a picture shows, in which colours and where."""

import difflib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lrd_helpers.measure import regions
from lrd_helpers.measure.detectors import Detection
from lrd_helpers.measure.resize import resized
from lrd_helpers.models import load_segmenter
from lrd_helpers.pictures import Picture, pixels_of
from lrd_helpers.storybook import COLOURS, PLACES, STICKERS, tight_boxes

STRIDE = 16  # picture sides are brought to a multiple: the U-Net halves them repeatedly
BATCH_SIZE = 8  # more is slower on CPUs: a layer of 32 pictures is allocated anew at every use
CLASSES = len(STICKERS) + len(PLACES) + len(COLOURS) + 1


@dataclass(frozen=True, eq=False)
class StickerDetection(Detection):
    """A connected region of one sticker in one colour."""

    sticker: str
    colour: str


@dataclass(frozen=True, eq=False)
class Description:
    """What a storybook picture shows: a place and stickers, the largest first."""

    place: str
    place_score: float  # mean probability over the background, in [0, 1]
    stickers: tuple[StickerDetection, ...]


class StorybookDetector:
    """Finds stickers by their name and colour with the shipped segmenter.

    Args:
        model: called as `model(2 * images - 1, timestep=0).sample`, gives for images
            (batch, 3, height, width) in [0, 1] the logits (batch, 27, height, width): 12 stickers
            and 6 places (a background pixel's class is the place), then 8 colours and "none".
            Default: the shipped segmenter.
        noise_floor: smallest region that counts, in pixels of a 128 × 128 picture.
    """

    def __init__(
        self, model: nn.Module | None = None, *, noise_floor: float = regions.NOISE_FLOOR
    ) -> None:
        self.model = (load_segmenter() if model is None else model).eval()
        self.noise_floor = noise_floor

    @property
    def rules(self) -> str:
        """What its answers depend on besides its weights, to be kept beside what it measured."""
        return (
            f"noise floor {self.noise_floor:g}, fragments {regions.FRAGMENT:g}, "
            f"parts {regions.PART:g}, gap {regions.GAP:g}, "
            f"second colour {regions.SECOND_COLOUR:g}, colour reach {regions.COLOUR_REACH:g}"
        )

    def __call__(self, image: Picture, prompts: Sequence[str]) -> list[list[Detection]]:
        """The stickers each prompt names; a prompt without a colour takes any colour.

        Raises:
            ValueError: a prompt that does not name exactly one sticker, or several colours.
        """
        wanted = [sticker_and_colour(prompt) for prompt in prompts]
        stickers = self.describe(image).stickers
        return [
            [
                detection
                for detection in stickers
                if detection.sticker == sticker and colour in (None, detection.colour)
            ]
            for sticker, colour in wanted
        ]

    def find(self, image: Picture, prompt: str) -> Bool[Tensor, "height width"] | None:
        """All pixels that show the prompt, or None if there are none above the noise floor."""
        [detections] = self(image, [prompt])
        masks = [detection.mask for detection in detections]
        return torch.stack(masks).any(0) if masks else None

    def describe(self, image: Picture) -> Description:
        """Everything the picture shows."""
        return self.describe_all([image])[0]

    @torch.no_grad()
    def describe_all(self, images: Sequence[Picture]) -> list[Description]:
        """`describe` for many pictures; neighbours of one size share a forward pass."""
        descriptions = []
        for _, group in itertools.groupby(map(pixels_of, images), key=lambda pixels: pixels.shape):
            pictures = list(group)
            for first in range(0, len(pictures), BATCH_SIZE):
                batch = self._logits(torch.stack(pictures[first : first + BATCH_SIZE]))
                descriptions += [self._description(logits) for logits in batch]
        return descriptions

    def _logits(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        like = next(self.model.parameters())
        height, width = images.shape[-2:]
        sides = [max(1, round(side / STRIDE)) * STRIDE for side in (height, width)]
        images = resized(images, *sides).to(like.device, like.dtype)
        logits = self.model(images * 2 - 1, timestep=0).sample.float().cpu()
        if logits.shape[1] != CLASSES:
            raise ValueError(
                f"the segmenter gives {logits.shape[1]} channels, but {CLASSES} are "
                "expected: 12 stickers, 6 places, 8 colours and 'none'"
            )
        return resized(logits, height, width)

    def _description(self, logits: Float[Tensor, "classes height width"]) -> Description:
        kinds = logits[: len(STICKERS) + len(PLACES)].softmax(0)
        # The last channel, "none", takes part in the probability but is never the answer:
        # what is a sticker has a colour.
        colours = logits[len(STICKERS) + len(PLACES) :].softmax(0)[:-1]
        classes = regions.without_fragments(kinds.argmax(0))
        classes = regions.with_parts(classes, colours.argmax(0), self.noise_floor)

        background = classes >= len(STICKERS)
        places = kinds[len(STICKERS) :, background if background.any() else ~background].mean(1)
        stickers = [
            StickerDetection(
                box=tuple(tight_boxes(mask).tolist()),
                score=float((kinds[number] * colours[colour])[mask].mean()),
                mask=mask,
                sticker=STICKERS[number],
                colour=list(COLOURS)[colour],
            )
            for number in classes.unique().tolist()
            if number < len(STICKERS)
            for thing in regions.things(classes == number, self.noise_floor)
            for colour, mask in regions.things_by_colour(thing, colours, self.noise_floor)
        ]
        stickers.sort(key=lambda detection: int(detection.mask.sum()), reverse=True)
        return Description(PLACES[int(places.argmax())], float(places.max()), tuple(stickers))


def sticker_and_colour(prompt: str) -> tuple[str, str | None]:
    """The sticker and the colour (None if it names none) of a prompt such as "a red car".

    Raises:
        ValueError: no sticker, several stickers, or several colours.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    stickers = [word for word in STICKERS if word in words]
    colours = [word for word in COLOURS if word in words]
    if len(stickers) != 1:
        named = " and ".join(stickers) or "no sticker"
        near = [match for word in words for match in difflib.get_close_matches(word, STICKERS, 1)]
        guess = f"; did you mean {near[0]!r}?" if near and not stickers else ""
        raise ValueError(
            f"{prompt!r} names {named}, but should name exactly one of {', '.join(STICKERS)}{guess}"
        )
    if len(colours) > 1:
        raise ValueError(
            f"{prompt!r} names the colours {' and '.join(colours)}, but should name one or none"
        )
    return stickers[0], colours[0] if colours else None
