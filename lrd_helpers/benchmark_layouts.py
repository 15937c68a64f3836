"""What a benchmark draws: named layouts in one file, and the scene that each asks for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrd_helpers.files import write_atomically
from lrd_helpers.layout import Layout, LayoutError
from lrd_helpers.metrics import sticker_and_colour
from lrd_helpers.storybook import PLACES, PlacedSticker, Scene

VERSION = 1
"""Of a file of layouts."""


class BenchmarkError(ValueError):
    """What cannot be measured, in one sentence."""


@dataclass(frozen=True)
class NamedLayout:
    """One layout of a benchmark.

    Attributes:
        name: letters, digits, - and _; its own within a benchmark.
        stratum: the kind of layouts it belongs to, "small".
        layout: what should be drawn.
    """

    name: str
    stratum: str
    layout: Layout


def load_layouts(*paths: str | os.PathLike[str]) -> list[NamedLayout]:
    """The layouts of one or several files that `save_layouts` wrote.

    Raises:
        LayoutError: a file that cannot be read, is empty, of another version or no such file, or a
            layout that is none; names the file and the layout.
    """
    layouts: dict[str, NamedLayout] = {}
    for path in map(Path, paths):
        for one in _layouts_in(path):
            if one.name in layouts:
                raise LayoutError(f"{path}: a second layout has the name {one.name!r}; rename one")
            layouts[one.name] = one
    return list(layouts.values())


def _layouts_in(path: Path) -> Iterator[NamedLayout]:
    wanted = '{"version": 1, "layouts": [{"name": …, "stratum": …, "layout": …}, …]}'
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise LayoutError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise LayoutError(f"{path}: not JSON, but a file of layouts is: {wanted}") from None
    if not isinstance(data, dict) or not isinstance(data.get("layouts"), list):
        hint = ""
        if isinstance(data, dict) and "layers" in data:
            hint = "; this is a single layout, which `python -m lrd_helpers render` draws"
        raise LayoutError(f"{path}: not a file of layouts, which is {wanted}{hint}")
    if data.get("version") != VERSION:
        raise LayoutError(
            f"{path}: version is {data.get('version')!r}, but this package reads version {VERSION}"
        )
    if not data["layouts"]:
        raise LayoutError(f"{path}: holds no layouts; give at least one")
    for number, one in enumerate(data["layouts"], start=1):
        if not isinstance(one, dict) or set(one) != {"name", "stratum", "layout"}:
            raise LayoutError(f"{path}, entry {number}: should have name, stratum and layout")
        # The name becomes a file's.
        if not isinstance(one["name"], str) or not re.fullmatch(r"[\w-]+", one["name"]):
            raise LayoutError(
                f"{path}, entry {number}: the name is {one['name']!r}, but should be letters, "
                "digits, - and _"
            )
        if not isinstance(one["stratum"], str) or not one["stratum"].strip():
            raise LayoutError(f"{path}, {one['name']}: the stratum should be a name")
        layout = Layout.from_json(json.dumps(one["layout"]), file=f"{path}, {one['name']}")
        yield NamedLayout(one["name"], one["stratum"], layout)


def save_layouts(path: str | os.PathLike[str], layouts: Sequence[NamedLayout]) -> None:
    """Write a file of layouts, one a line, whole or not at all.

    Raises:
        OSError: a missing folder, a full disk, …
    """
    lines = [
        json.dumps(
            {"name": one.name, "stratum": one.stratum, "layout": json.loads(one.layout.to_json())},
            ensure_ascii=False,
        )
        for one in layouts
    ]
    text = f'{{"version": {VERSION}, "layouts": [\n' + ",\n".join(lines) + "\n]}\n"
    write_atomically(path, text.encode())


def ground_truth_scene(layout: Layout) -> Scene:
    """The storybook scene a layout asks for: each sticker upright, filling its box.

    Raises:
        ValueError: a prompt that does not name exactly one sticker, or no place in the background.
    """
    where = layout.background or layout.caption
    place = next((one for one in PLACES if one in where), None)
    if place is None:
        raise ValueError(f"{where!r} names no place; the places are {', '.join(PLACES)}")
    stickers = []
    for layer in layout.layers:
        sticker, colour = sticker_and_colour(layer.prompt)
        x0, y0, x1, y1 = layer.bounding_box
        centre, size = ((x0 + x1) / 2, (y0 + y1) / 2), (x1 - x0, y1 - y0)
        stickers.append(PlacedSticker(sticker, colour or "red", centre, size))
    return Scene(place, tuple(stickers), layout.caption)
