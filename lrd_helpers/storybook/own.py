"""A sticker of your own: an SVG drawing and a word, checked and brought into the world's form.

robot = own_sticker("robot", Path("robot.svg"))
render_scenes([Scene("on sand", (PlacedSticker(robot, "red", (0.5, 0.6), (0.4, 0.4)),), "")])

`training.new_sticker` teaches its name to a model.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy
import torch

from lrd_helpers.files import checked_file
from lrd_helpers.messages import excerpt, in_file
from lrd_helpers.storybook.scenes import WORDS, Scene, sample_caption, sample_scene
from lrd_helpers.storybook.stickers import (
    COLOURS,
    FIXED_COLOUR,
    Sticker,
    aspect_ratio,
    rasterised,
    sticker_svg,
)

LARGEST = 2**18
"""Bytes of an SVG file."""

SVG = "http://www.w3.org/2000/svg"
OUR_VIEW = "0 0 100 100"
FEWEST_PIXELS = 100
"""What a sticker must paint at least, of 100 × 100 pixels."""


def own_sticker(name: str, drawing: str | Path) -> Sticker:
    """A sticker for scenes and for training, from an SVG drawing of any size.

    Where the drawing has {main}, it gets a scene's colour, and shades of it where it has {dark},
    {light} and {outline}. A drawing without {main}, an emoji say, gets it in place of the colour
    that covers most of it.

    Args:
        name: its word: lower-case letters a to z, none of the world's words.
        drawing: SVG text, or the path of an SVG file.

    Raises:
        ValueError: a name that is taken or no such word, a file that is missing, no SVG, a drawing
            that is nearly empty, or no colour in it that could become {main}.
    """
    if not re.fullmatch(r"[a-z]{2,20}", name):
        raise ValueError(f"{excerpt(name)} cannot be a sticker's name: 2 to 20 letters from a to z")
    if name in WORDS:
        raise ValueError(f"{name!r} is a word of the world already: give the sticker another name")
    file = drawing if isinstance(drawing, Path) else None
    try:
        sticker = Sticker(name, _in_our_form(_text_of(drawing)))
        painted = _painted(sticker_svg(sticker, "red"))
        if (count := int((painted[..., 3] > 0.5).sum())) < FEWEST_PIXELS:
            raise ValueError(f"it is (nearly) empty: it paints {count} of 10,000 pixels")
        if "{main}" not in sticker.svg:
            sticker = replace(sticker, svg=_with_main(sticker.svg, painted))
    except ValueError as error:
        raise ValueError(in_file(file, f"the sticker {name!r}: {error}")) from None
    return sticker


def _text_of(drawing: str | Path) -> str:
    if not isinstance(drawing, Path):
        return drawing
    try:
        return checked_file(drawing, LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not SVG: it is not text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"the drawing cannot be read: {error.strerror}") from None


def _in_our_form(text: str) -> str:
    """The drawing within a viewBox of 0 to 100 each way, its colours like #0a1b2c.

    Raises:
        ValueError: no SVG; says where it cannot be read.
    """
    try:
        root = ElementTree.fromstring(text.strip())
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"not SVG: {error}") from None
    if root.tag == "svg":  # written without its xmlns
        for element in root.iter():
            element.tag = f"{{{SVG}}}{element.tag}"
    if root.tag != f"{{{SVG}}}svg":
        raise ValueError(f"not SVG: it begins with <{root.tag.split('}')[-1][:30]}>, not <svg>")
    if root.get("viewBox") != OUR_VIEW or "width" in root.attrib or "height" in root.attrib:
        root = _within_our_view(root)
    ElementTree.register_namespace("", SVG)
    svg = ElementTree.tostring(root, encoding="unicode")
    svg = re.sub(r"#[0-9a-fA-F]{6}\b", lambda colour: colour[0].lower(), svg)
    return re.sub(r"(?<=[\"': ])#([0-9a-fA-F]{3})(?=[\"';])", _six_digits, svg)


def _within_our_view(root: ElementTree.Element) -> ElementTree.Element:
    if "viewBox" not in root.attrib:
        width, height = (_number(root.get(side)) for side in ("width", "height"))
        if not (width and height):
            raise ValueError(f'it has no viewBox: write viewBox="{OUR_VIEW}" into its <svg …>')
        root.set("viewBox", f"0 0 {width:g} {height:g}")
    root.set("width", "100")
    root.set("height", "100")
    outer = ElementTree.Element(root.tag, viewBox=OUR_VIEW)
    outer.append(root)
    return outer


def _number(text: str | None) -> float:
    match = re.match(r"\d+(\.\d+)?", text or "")
    return float(match[0]) if match else 0.0


def _six_digits(three: re.Match[str]) -> str:
    return "#" + "".join(2 * digit for digit in three[1].lower())


def _with_main(svg: str, pixels: numpy.ndarray) -> str:
    """The drawing with {main} in place of the colour that covers most of its pixels."""
    opaque = numpy.rint(255 * pixels[pixels[..., 3] > 0.99][:, :3]).astype(int)
    painted = Counter("#" + "".join(f"{value:02x}" for value in pixel) for pixel in opaque)
    counts = {colour: painted[colour] for colour in FIXED_COLOUR.findall(svg)}
    most = max(counts, key=counts.get, default=None)
    if most is None or not counts[most]:
        raise ValueError('no colour in it can change: write fill="{main}" where it should')
    return svg.replace(most, "{main}")


def _painted(svg: str) -> numpy.ndarray:
    try:
        return rasterised(svg, 100)
    except ValueError as error:
        raise ValueError(f"not SVG: {error}") from None


# ------------------------------------------------------------------ scenes that show it


def scene_with(
    sticker: Sticker, generator: torch.Generator, *, sticker_count: int | None = None
) -> Scene:
    """A random scene in which `sticker` stands in the place of another one.

    Args:
        generator: same generator, same scene.
        sticker_count: 1 to 4; None for the world's own shares.
    """
    scene = sample_scene(generator, sticker_count=sticker_count)
    while not scene.stickers:
        scene = sample_scene(generator, sticker_count=sticker_count)
    number = int(torch.randint(len(scene.stickers), (), generator=generator))
    colour = list(COLOURS)[int(torch.randint(len(COLOURS), (), generator=generator))]
    before, aspect = scene.stickers[number], aspect_ratio(sticker)
    longest = max(before.size)
    width, height = longest * min(1, aspect), longest * min(1, 1 / aspect)
    x, y = before.centre
    centre = (min(max(x, width / 2), 1 - width / 2), min(max(y, height / 2), 1 - height / 2))
    placed = replace(before, sticker=sticker, colour=colour, centre=centre, size=(width, height))
    stickers = (*scene.stickers[:number], placed, *scene.stickers[number + 1 :])
    return replace(
        scene, stickers=stickers, caption=sample_caption(stickers, scene.place, generator)
    )
