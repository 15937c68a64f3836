"""Stickers: twelve SVG drawings in eight colours and three styles, rasterised into a sprite bank.

A sticker is a file `stickers/NAME.svg` with four placeholders, {main}, {dark}, {light} and
{outline}; every other colour in it is a fixed detail (a window, an eye). A sticker of your own is a
`Sticker`, see `own_sticker`: scenes show it beside the others, and `training.new_sticker` teaches
its name to a model.
"""

import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy
import resvg_py
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

STICKER_FOLDER = Path(__file__).parent / "stickers"
STICKERS: tuple[str, ...] = tuple(sorted(path.stem for path in STICKER_FOLDER.glob("*.svg")))

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.16, 0.18),
    "orange": (0.97, 0.55, 0.12),
    "yellow": (0.98, 0.84, 0.20),
    "green": (0.18, 0.63, 0.28),
    "blue": (0.16, 0.38, 0.86),
    "purple": (0.52, 0.24, 0.70),
    "pink": (0.97, 0.52, 0.70),
    "white": (0.96, 0.96, 0.95),
}
STYLES: tuple[str, ...] = ("flat", "sketch", "neon")

PAPER = (0.96, 0.94, 0.88)  # the sketch style's background
SPRITE_SIZES = (128, 64, 32)  # a small mip pyramid: a sprite is sampled from the next larger size

FIXED_COLOUR = re.compile(r"#[0-9a-f]{6}\b")


@dataclass(frozen=True)
class Sticker:
    """A sticker that the world does not have: `own_sticker` makes it.

    Attributes:
        name: the word for it.
        svg: its drawing, in the form of the files in `stickers/`: placeholders in place of its
            colours, and a viewBox from 0 to 100 each way.
    """

    name: str
    svg: str

    def __str__(self) -> str:
        return self.name


AnySticker = str | Sticker
"""One of `STICKERS`, or a sticker of your own."""


def _hexadecimal(rgb: Float[numpy.ndarray, "3"]) -> str:
    return "#" + "".join(f"{round(255 * float(value)):02x}" for value in rgb.clip(0, 1))


def sticker_svg(sticker: AnySticker, colour: str, style: str = "flat") -> str:
    """The SVG text of one sticker in one colour and style.

    Raises:
        ValueError: a sticker, colour or style that the world does not have.
    """
    for value, names, what in (
        (sticker, STICKERS, "sticker"),
        (colour, COLOURS, "colour"),
        (style, STYLES, "style"),
    ):
        if value not in names and not isinstance(value, Sticker):
            raise ValueError(f"no {what} {value!r}; there are: {', '.join(names)}")
    main = numpy.array(COLOURS[colour])
    paper, ink = numpy.array(PAPER), numpy.array((0.2, 0.2, 0.24))
    if style == "flat":
        shades = {
            "main": main,
            "dark": 0.72 * main,
            "light": 0.55 * main + 0.45,
            "outline": 0.36 * main,
        }
    elif style == "sketch":  # a wash of colour on paper under a dark line
        shades = {
            "main": 0.45 * main + 0.55 * paper,
            "dark": 0.6 * main + 0.4 * paper,
            "light": 0.2 * main + 0.8 * paper,
            "outline": ink,
        }
    else:  # neon: a glowing line around a dark shape
        shades = {
            "main": 0.22 * main,
            "dark": 0.12 * main,
            "light": 0.4 * main,
            "outline": 0.85 * main + 0.15,
        }
    if isinstance(sticker, Sticker):
        svg = sticker.svg
    else:
        svg = (STICKER_FOLDER / f"{sticker}.svg").read_text(encoding="utf-8")
    if style != "flat":
        detail = _hexadecimal(paper if style == "sketch" else 0.55 * main + 0.1)
        svg = FIXED_COLOUR.sub(detail, svg)
    for name, rgb in shades.items():
        svg = svg.replace("{" + name + "}", _hexadecimal(rgb))
    return svg


def rasterised(svg: str, size: int) -> Float[numpy.ndarray, "size size 4"]:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return numpy.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"), numpy.float32) / 255


@functools.cache
def _tight_view(sticker: AnySticker) -> tuple[float, float, float, float]:
    """x, y, width and height, in viewBox units (0 to 100), of what a sticker really paints."""
    alpha = rasterised(sticker_svg(sticker, "red"), 400)[..., 3] > 0.5
    rows, columns = numpy.flatnonzero(alpha.any(1)) / 4, numpy.flatnonzero(alpha.any(0)) / 4
    return (
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] - columns[0] + 0.25),
        float(rows[-1] - rows[0] + 0.25),
    )


def aspect_ratio(sticker: AnySticker) -> float:
    """Width over height of the drawing itself, without its margins."""
    _, _, width, height = _tight_view(sticker)
    return width / height


@functools.cache
def sprites(
    sticker: AnySticker, style: str = "flat"
) -> tuple[Float[Tensor, "colours 4 size size"], ...]:
    """A sticker in all colours, one tensor per size of SPRITE_SIZES, in [0, 1].

    The drawing is cropped to its tight box and stretched to a square; `aspect_ratio` undoes that
    when a scene is rendered. Colours are premultiplied by alpha, so that sampling between pixels
    leaves no fringe.
    """
    x, y, width, height = _tight_view(sticker)
    size = SPRITE_SIZES[0]
    view = (
        f'width="{size}" height="{size}" viewBox="{x} {y} {width} {height}" '
        'preserveAspectRatio="none"'
    )
    drawn = [
        rasterised(
            sticker_svg(sticker, colour, style).replace('viewBox="0 0 100 100"', view, 1), size
        )
        for colour in COLOURS
    ]
    bank = torch.from_numpy(numpy.stack(drawn)).permute(0, 3, 1, 2)
    bank = torch.cat([bank[:, :3] * bank[:, 3:], bank[:, 3:]], dim=1)
    return tuple(functional.adaptive_avg_pool2d(bank, size) for size in SPRITE_SIZES)


@functools.cache
def sprite_bank(style: str = "flat") -> tuple[Float[Tensor, "stickers colours 4 size size"], ...]:
    """The `sprites` of all stickers of the world, one tensor per size of SPRITE_SIZES."""
    each = [sprites(sticker, style) for sticker in STICKERS]
    return tuple(torch.stack(of_size) for of_size in zip(*each, strict=True))
