"""A judge for stickers of your own, which the shipped segmenter never saw."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lrd_helpers.mask import Box
from lrd_helpers.measure import regions
from lrd_helpers.measure.detectors import Detection
from lrd_helpers.measure.resize import resized
from lrd_helpers.measure.storybook import StickerDetection, StorybookDetector
from lrd_helpers.pictures import Picture, pixels_of
from lrd_helpers.storybook import COLOURS, STICKERS, Sticker
from lrd_helpers.storybook.stickers import SPRITE_SIZES, sprites

SIDE = SPRITE_SIZES[-1]  # pixels each way, to which a thing is brought and compared
MISSED = (0.0, 0.15)  # how much longer a thing may be on each side than what the segmenter sees
OUTSIDE = 0.3  # what a pixel of a thing costs where the drawing has none; a squared difference


class OwnStickerDetector(StorybookDetector):
    """Finds the world's stickers as `StorybookDetector` does, and your own by comparison.

    The segmenter says which pixels are some sticker, and of which colour. Each thing is cut out,
    stretched to a square, and compared with the drawings of all stickers, the world's and yours, in
    that colour, also mirrored. What is nearest to a drawing of yours is yours. So it needs no
    training; a thing that is half hidden looks like none of them, and is often missed.

    Args:
        own: your stickers.
        options: of `StorybookDetector`.

    Raises:
        ValueError: no stickers.
    """

    def __init__(self, own: Sequence[Sticker], **options: object) -> None:
        if not own:
            raise ValueError("there are no stickers of your own: use StorybookDetector")
        super().__init__(**options)
        self.own = {sticker.name: sticker for sticker in own}

    def __call__(self, image: Picture, prompts: Sequence[str]) -> list[list[Detection]]:
        """The stickers each prompt names; a prompt without a colour takes any colour.

        Raises:
            ValueError: a prompt that does not name exactly one sticker, or several colours.
        """
        wanted = [self._own_and_colour(prompt) for prompt in prompts]
        known = [prompt for prompt, own in zip(prompts, wanted, strict=True) if own is None]
        by_prompt = dict(zip(known, super().__call__(image, known), strict=True)) if known else {}
        things = self.own_things(image) if len(by_prompt) < len({*prompts}) else []
        return [
            by_prompt[prompt]
            if own is None
            else [
                each for each in things if each.sticker == own[0] and own[1] in (None, each.colour)
            ]
            for prompt, own in zip(prompts, wanted, strict=True)
        ]

    def _own_and_colour(self, prompt: str) -> tuple[str, str | None] | None:
        """Which of your stickers a prompt names, in which colour; None where it names none."""
        words = re.findall(r"[a-z]+", prompt.lower())
        names = [name for name in self.own if name in words]
        if not names:
            return None
        stickers = names + [name for name in STICKERS if name in words]
        colours = [name for name in COLOURS if name in words]
        if len(stickers) > 1 or len(colours) > 1:
            twice = stickers if len(stickers) > 1 else colours
            raise ValueError(f"{prompt!r} names {' and '.join(twice)}, but should name only one")
        return names[0], colours[0] if colours else None

    @torch.no_grad()
    def own_things(self, image: Picture) -> list[StickerDetection]:
        """All of your stickers that the picture shows."""
        pixels = pixels_of(image)
        logits = self._logits(pixels[None])[0]
        sticker = logits[: -len(COLOURS) - 1].argmax(0) < len(STICKERS)
        colours = logits[-len(COLOURS) - 1 : -1].argmax(0)
        found = []
        for number, colour in enumerate(COLOURS):
            for mask in regions.things(sticker & (colours == number), self.noise_floor):
                name, box, score = self._nearest(pixels, mask, number)
                if name in self.own:
                    found.append(StickerDetection(box, score, mask, name, colour))
        return found

    def _nearest(
        self,
        pixels: Float[Tensor, "3 height width"],
        mask: Bool[Tensor, "height width"],
        colour: int,
    ) -> tuple[str, Box, float]:
        """The sticker that looks most like a thing, where, and how little they differ (1: not).

        What differs is the colour where the drawing is, and that there is more of the thing where
        the drawing is not.
        """
        stickers = [*STICKERS, *self.own.values()]
        drawn = torch.stack([sprites(each)[-1][colour] for each in stickers])
        drawn = torch.stack([drawn, drawn.flip(-1)])  # (2, stickers, 4, side, side)
        alpha = drawn[:, :, 3:]
        best = math.inf, "", (0.0, 0.0, 0.0, 0.0)
        for box in _boxes_around(mask):
            thing = _cut_out(torch.cat([pixels, mask[None].float()]), box)
            colours = (alpha * thing[:3] - drawn[:, :, :3]).square().mean((2, 3, 4))
            too_much = OUTSIDE * ((1 - alpha) * thing[3:]).mean((2, 3, 4))
            distances = (colours + too_much) / alpha.mean((2, 3, 4))
            least, number = distances.amin(0).min(0)
            best = min(best, (float(least), str(stickers[int(number)]), box))
        distance, name, (x0, y0, x1, y1) = best
        height, width = mask.shape
        return name, (x0 / width, y0 / height, x1 / width, y1 / height), max(0.0, 1 - distance)


def _boxes_around(mask: Bool[Tensor, "height width"]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes in pixels: the tight one and larger ones, since the segmenter misses ends."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    x0, y0, x1, y1 = (int(i) for i in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    width, height = x1 - x0, y1 - y0
    for left, top, right, bottom in itertools.product(*[MISSED] * 4):
        yield (
            max(0, x0 - round(left * width)),
            max(0, y0 - round(top * height)),
            min(mask.shape[1], x1 + round(right * width)),
            min(mask.shape[0], y1 + round(bottom * height)),
        )


def _cut_out(
    picture: Float[Tensor, "channels height width"], box: tuple[int, int, int, int]
) -> Float[Tensor, "channels side side"]:
    x0, y0, x1, y1 = box
    return resized(picture[None, :, y0:y1, x0:x1], SIDE, SIDE)[0]
