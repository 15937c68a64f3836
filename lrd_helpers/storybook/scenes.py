"""Scenes: which stickers stand where, the caption, and the picture with the exact truth of it."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.utils.data import IterableDataset, get_worker_info

from lrd_helpers.storybook.places import PLACE_NUMBERS, PLACES, paint_place
from lrd_helpers.storybook.stickers import (
    COLOURS,
    SPRITE_SIZES,
    STICKERS,
    STYLES,
    AnySticker,
    aspect_ratio,
    sprites,
)

IMAGE_SIZE = 128  # pixels
MOST_STICKERS = 4
STICKER_COUNT_SHARES = (0.05, 0.52, 0.27, 0.10, 0.06)  # of scenes with 0, 1, 2, 3 and 4 stickers

# Every word a caption can have: what the tokenizers are built from.
WORDS: tuple[str, ...] = tuple(
    sorted({"a", "an", "and", *STICKERS, *COLOURS, *" ".join(PLACES).split()})
)


@dataclass(frozen=True)
class PlacedSticker:
    """One sticker of a scene. Lengths are shares of the canvas, (0, 0) is its upper left corner."""

    sticker: AnySticker
    colour: str
    centre: tuple[float, float]
    size: tuple[float, float]
    rotation: float = 0.0  # degrees, clockwise
    flip: bool = False


@dataclass(frozen=True)
class Scene:
    """A place with stickers, the furthest back first."""

    place: str
    stickers: tuple[PlacedSticker, ...]
    caption: str
    place_numbers: tuple[float, ...] = (0.5,) * PLACE_NUMBERS
    style: str = "flat"


@dataclass(frozen=True)
class Rendering:
    """Pictures of a batch of scenes and the exact truth about them.

    Scenes with fewer stickers than the fullest one have empty layers at the end: alpha 0, box 0.
    """

    images: Float[Tensor, "batch 3 height width"]  # in [0, 1]
    backgrounds: Float[Tensor, "batch 3 height width"]  # the place without its stickers
    layers: Float[Tensor, "batch stickers 4 height width"]  # RGB premultiplied by A, back to front
    scenes: tuple[Scene, ...]

    @property
    def captions(self) -> list[str]:
        return [scene.caption for scene in self.scenes]

    @property
    def rgba(self) -> Float[Tensor, "batch stickers 4 height width"]:
        """The layers with straight (not premultiplied) colours, as image files store them."""
        alpha = self.layers[:, :, 3:]
        return torch.cat([self.layers[:, :, :3] / alpha.clamp(min=1 / 255), alpha], 2).clamp(0, 1)

    @property
    def masks(self) -> Bool[Tensor, "batch stickers height width"]:
        """The pixels in which each sticker is what one sees: no two masks overlap."""
        alpha = self.layers[:, :, 3]
        # What a sticker and all in front of it let through.
        through = (1 - alpha).flip(1).cumprod(1).flip(1)
        in_front = torch.cat([through[:, 1:], torch.ones_like(through[:, :1])], 1)
        return alpha * in_front > 0.5

    @property
    def boxes(self) -> Float[Tensor, "batch stickers 4"]:
        """x0, y0, x1, y1 in [0, 1] of each whole sticker, the hidden part included."""
        return tight_boxes(self.layers[:, :, 3] > 0.5)


def tight_boxes(masks: Bool[Tensor, "*batch height width"]) -> Float[Tensor, "*batch 4"]:
    """x0, y0, x1, y1 in [0, 1] of the smallest box around each mask; all 0 for an empty mask."""
    ends = []
    for along in (-2, -1):  # columns, then rows
        occupied = masks.any(along)
        length = occupied.shape[-1]
        first = occupied.int().argmax(-1)
        last = length - occupied.flip(-1).int().argmax(-1)
        ends.append((first / length, last / length))
    boxes = torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], -1)
    return boxes * masks.any(-1).any(-1)[..., None]


def caption_of(
    stickers: tuple[PlacedSticker, ...],
    place: str,
    *,
    name_colours: bool = True,
    name_place: bool = True,
    place_first: bool = False,
) -> str:
    """A caption: "a red car and a yellow star on grass", or less, or "on grass a red car and …"."""
    things = [
        f"{placed.colour} {placed.sticker}" if name_colours else str(placed.sticker)
        for placed in stickers
    ]
    text = " and ".join(
        f"an {thing}" if thing.startswith(tuple("aeiou")) else f"a {thing}" for thing in things
    )
    if not text or not name_place:
        return text or place
    return f"{place} {text}" if place_first else f"{text} {place}"


def sample_caption(
    stickers: tuple[PlacedSticker, ...], place: str, generator: torch.Generator
) -> str:
    """One of the captions that are true of a scene: either order, sometimes silent on something."""
    reverse, colours, where, first = torch.rand(4, generator=generator).tolist()
    return caption_of(
        stickers[::-1] if reverse < 0.5 else stickers,
        place,
        name_colours=colours > 0.1,
        name_place=where > 0.15,
        place_first=first < 0.1,
    )


def sample_scene(
    generator: torch.Generator, *, sticker_count: int | None = None, style: str = "flat"
) -> Scene:
    """Draws one scene: 0 to 4 different stickers, sizes from 0.16 to 0.85 of the canvas.

    Positions are uniform, so that a model learns to draw anything anywhere. Of ten candidate
    positions the one that overlaps the earlier stickers least is taken, which leaves some overlap.
    """
    if sticker_count is None:
        shares = torch.tensor(STICKER_COUNT_SHARES)
        sticker_count = int(torch.multinomial(shares, 1, generator=generator))
    place = PLACES[int(torch.randint(len(PLACES), (), generator=generator))]
    kinds = torch.randperm(len(STICKERS) * len(COLOURS), generator=generator)[:sticker_count]
    u = torch.rand(sticker_count, 26, generator=generator).tolist()

    stickers: list[PlacedSticker] = []
    taken: list[tuple[float, float, float, float]] = []
    for kind, numbers in zip(kinds.tolist(), u, strict=True):
        sticker, colour = STICKERS[kind // len(COLOURS)], list(COLOURS)[kind % len(COLOURS)]
        longest = 0.16 * (0.85 / 0.16 if sticker_count < 2 else 0.66 / 0.16) ** numbers[0]
        aspect = aspect_ratio(sticker) * 1.25 ** (2 * numbers[1] - 1)
        width, height = longest * min(1, aspect), longest * min(1, 1 / aspect)
        least = None
        for a, b in zip(numbers[6::2], numbers[7::2], strict=True):
            x0, y0 = a * (1 - width), b * (1 - height)
            overlap = sum(
                max(0, min(x0 + width, right) - max(x0, left))
                * max(0, min(y0 + height, bottom) - max(y0, top))
                / min(width * height, (right - left) * (bottom - top))
                for left, top, right, bottom in taken
            )
            if least is None or overlap < least[0]:
                least = overlap, x0, y0
            if overlap == 0:
                break
        _, x0, y0 = least
        taken.append((x0, y0, x0 + width, y0 + height))
        stickers.append(
            PlacedSticker(
                sticker,
                colour,
                centre=(x0 + width / 2, y0 + height / 2),
                size=(width, height),
                rotation=20 * numbers[2] - 10 if numbers[3] < 0.5 else 0.0,
                flip=numbers[4] < 0.5,
            )
        )

    numbers = tuple(torch.rand(PLACE_NUMBERS, generator=generator).tolist())
    return Scene(
        place, tuple(stickers), sample_caption(tuple(stickers), place, generator), numbers, style
    )


def render_scenes(scenes: list[Scene], size: int = IMAGE_SIZE) -> Rendering:
    """Renders a batch of scenes, size × size pixels each; pure tensor work, no file is touched."""
    backgrounds = torch.zeros(len(scenes), 3, size, size)
    for style in STYLES:
        for place in PLACES:
            rows = [
                i for i, scene in enumerate(scenes) if scene.place == place and scene.style == style
            ]
            if rows:
                numbers = torch.tensor([scenes[i].place_numbers for i in rows])
                backgrounds[rows] = paint_place(place, numbers, size, style)

    depth = max((len(scene.stickers) for scene in scenes), default=0)
    layers = torch.zeros(len(scenes), depth, 4, size, size)
    where: dict[tuple[str, int], list[tuple[int, int, PlacedSticker]]] = {}
    for row, scene in enumerate(scenes):
        for z, placed in enumerate(scene.stickers):
            pixels = max(placed.size) * size
            level = max((i for i, side in enumerate(SPRITE_SIZES) if side >= pixels), default=0)
            where.setdefault((scene.style, level), []).append((row, z, placed))
    for (style, level), entries in where.items():
        rows, zs, placements = zip(*entries, strict=True)
        layers[list(rows), list(zs)] = _draw_sprites(placements, style, level, size)

    images = backgrounds
    for z in range(depth):  # the "over" operator, back to front
        images = layers[:, z, :3] + (1 - layers[:, z, 3:]) * images
    return Rendering(images, backgrounds, layers, tuple(scenes))


def _draw_sprites(
    placements: tuple[PlacedSticker, ...], style: str, level: int, size: int
) -> Float[Tensor, "placements 4 size size"]:
    colours = list(COLOURS)
    bank = torch.stack(
        [
            sprites(placed.sticker, style)[level][colours.index(placed.colour)]
            for placed in placements
        ]
    )
    # grid_sample asks, for each canvas point in [-1, 1]², where in the sprite's [-1, 1]² it lies.
    numbers = torch.tensor(
        [[*placed.centre, *placed.size, placed.rotation, placed.flip] for placed in placements]
    )
    centre_x, centre_y, width, height, rotation, flip = numbers.unbind(1)
    cosine, sine = torch.deg2rad(rotation).cos(), torch.deg2rad(rotation).sin()
    shift_x, shift_y = 2 * centre_x - 1, 2 * centre_y - 1
    to_x = torch.stack([cosine, sine, -(cosine * shift_x + sine * shift_y)], 1) / width[:, None]
    to_y = torch.stack([-sine, cosine, sine * shift_x - cosine * shift_y], 1) / height[:, None]
    theta = torch.stack([to_x * (1 - 2 * flip)[:, None], to_y], 1)
    grid = functional.affine_grid(theta, [len(placements), 4, size, size], align_corners=False)
    return functional.grid_sample(bank, grid, align_corners=False)


def seeded(*numbers: int) -> torch.Generator:
    """A generator that depends on all the numbers, and on their order."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)


class StorybookDataset(IterableDataset):
    """An endless stream of rendered batches: give it to a DataLoader with `batch_size=None`.

    Batch number n depends on (seed, n) alone. So a stream can be taken up anywhere (`start`), and
    several readers share it without overlap: reader r of R reads batches r, r + R, r + 2R, …

    Args:
        batch_size: scenes a batch.
        seed: of the whole stream. Training uses 0; held-out scenes use seeds from 1,000,000 on.
        start: the first batch to yield, counted for this reader.
        reader, readers: this reader's number and how many there are.
        styles: drawn from with equal chance.
        sticker_count: fixed, or None for the shares.
        sticker_shares: of scenes with 0, 1, 2, 3 and 4 stickers, only their ratio counts; None for
            the world's own.
        size: of the pictures, in pixels.

    Raises:
        ValueError: both a count and shares, or shares that are not five.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        reader: int = 0,
        readers: int = 1,
        styles: tuple[str, ...] = ("flat",),
        sticker_count: int | None = None,
        sticker_shares: Sequence[float] | None = None,
        size: int = IMAGE_SIZE,
    ) -> None:
        if sticker_shares is not None:
            if sticker_count is not None:
                raise ValueError("sticker_count and sticker_shares exclude each other: give one")
            if len(sticker_shares) != MOST_STICKERS + 1:
                raise ValueError(
                    f"sticker_shares has {len(sticker_shares)} entries, but should have "
                    f"{MOST_STICKERS + 1}: for 0 to {MOST_STICKERS} stickers"
                )
        self.batch_size, self.seed, self.start, self.size = batch_size, seed, start, size
        self.reader, self.readers = reader, readers
        self.styles, self.sticker_count = styles, sticker_count
        self.sticker_shares = sticker_shares

    def scenes(self, number: int) -> list[Scene]:
        """The scenes of batch `number`, counted over all readers, not yet rendered."""
        generator = seeded(self.seed, number)
        styles = torch.randint(len(self.styles), (self.batch_size,), generator=generator)
        counts = [self.sticker_count] * self.batch_size
        if self.sticker_shares is not None:
            shares = torch.tensor(self.sticker_shares, dtype=torch.float)
            counts = torch.multinomial(shares, self.batch_size, True, generator=generator).tolist()
        return [
            sample_scene(generator, sticker_count=count, style=self.styles[style])
            for count, style in zip(counts, styles.tolist(), strict=True)
        ]

    def batch(self, number: int) -> Rendering:
        """Batch `number` of the stream, rendered."""
        return render_scenes(self.scenes(number), self.size)

    def __iter__(self) -> Iterator[Rendering]:
        # Workers of a DataLoader take turns, so the stream is the same with any number of them.
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in itertools.count(self.start + first, step):
            yield self.batch(number * self.readers + self.reader)
