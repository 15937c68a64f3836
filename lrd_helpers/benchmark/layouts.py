"""What a benchmark draws: named layouts in a file, and the scene that each asks for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrd_helpers.files import write_atomically
from lrd_helpers.layout import Layout, LayoutError
from lrd_helpers.measure import sticker_and_colour
from lrd_helpers.storybook import PLACES, PlacedSticker, Scene

VERSION = 1
"""Of a file of layouts."""

FORM = '{"version": 1, "layouts": [{"name": …, "stratum": …, "layout": …}, …]}'


class BenchmarkError(ValueError):
    """What cannot be measured, in one sentence."""


@dataclass(frozen=True)
class NamedLayout:
    """A layout of a benchmark.

    Attributes:
        name: letters, digits, - and _; unique within a benchmark.
        stratum: the kind of layouts it belongs to, "small".
        layout: what should be drawn.
    """

    name: str
    stratum: str
    layout: Layout


def load_layouts(*paths: str | os.PathLike[str]) -> list[NamedLayout]:
    """The layouts of one or several files that `save_layouts` wrote.

    Raises:
        LayoutError: a file that cannot be read, is empty, of another version or no file of
            layouts, or an invalid layout; names the file and the layout.
    """
    layouts: dict[str, NamedLayout] = {}
    for path in map(Path, paths):
        for layout in _layouts_in(path):
            if layout.name in layouts:
                raise LayoutError(
                    f"{path}: a second layout has the name {layout.name!r}; rename one"
                )
            layouts[layout.name] = layout
    return list(layouts.values())


def _layouts_in(path: Path) -> Iterator[NamedLayout]:
    for number, entry in enumerate(_entries_of(path), start=1):
        if not isinstance(entry, dict) or set(entry) != {"name", "stratum", "layout"}:
            raise LayoutError(f"{path}, entry {number}: should have name, stratum and layout")
        name, stratum = entry["name"], entry["stratum"]
        # The name becomes a file's.
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise LayoutError(
                f"{path}, entry {number}: the name is {name!r}, but should be letters, "
                "digits, - and _"
            )
        if not isinstance(stratum, str) or not stratum.strip():
            raise LayoutError(f"{path}, {name}: the stratum should be a name")
        layout = Layout.from_json(json.dumps(entry["layout"]), file=f"{path}, {name}")
        yield NamedLayout(name, stratum, layout)


def _entries_of(path: Path) -> list[Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise LayoutError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise LayoutError(f"{path}: not JSON, but a file of layouts is: {FORM}") from None
    if not isinstance(data, dict) or not isinstance(data.get("layouts"), list):
        hint = ""
        if isinstance(data, dict) and "layers" in data:
            hint = "; this is a single layout, which `python -m lrd_helpers render` draws"
        raise LayoutError(f"{path}: not a file of layouts, which is {FORM}{hint}")
    if data.get("version") != VERSION:
        raise LayoutError(
            f"{path}: version is {data.get('version')!r}, but this package reads version {VERSION}"
        )
    if not data["layouts"]:
        raise LayoutError(f"{path}: holds no layouts; give at least one")
    return data["layouts"]


def save_layouts(path: str | os.PathLike[str], layouts: Sequence[NamedLayout]) -> None:
    """Write a file of layouts, a line per layout, whole or not at all.

    Raises:
        OSError: a missing folder, a full disk, …
    """
    lines = [
        json.dumps(
            {
                "name": layout.name,
                "stratum": layout.stratum,
                "layout": json.loads(layout.layout.to_json()),
            },
            ensure_ascii=False,
        )
        for layout in layouts
    ]
    text = f'{{"version": {VERSION}, "layouts": [\n' + ",\n".join(lines) + "\n]}\n"
    write_atomically(path, text.encode())


def spread(layouts: Sequence[NamedLayout], limit: int | None) -> list[NamedLayout]:
    """So many of the layouts, at equal distances in their list."""
    count = min(limit or len(layouts), len(layouts))
    return [layouts[number * len(layouts) // count] for number in range(count)]


def ground_truth_scene(layout: Layout) -> Scene:
    """The storybook scene a layout asks for: each sticker upright, filling its box.

    Raises:
        ValueError: a prompt that does not name exactly one sticker, or no place in the background.
    """
    where = layout.background or layout.caption
    place = next((name for name in PLACES if name in where), None)
    if place is None:
        raise ValueError(f"{where!r} names no place; the places are {', '.join(PLACES)}")
    stickers = []
    for layer in layout.layers:
        sticker, colour = sticker_and_colour(layer.prompt)
        x0, y0, x1, y1 = layer.bounding_box
        centre, size = ((x0 + x1) / 2, (y0 + y1) / 2), (x1 - x0, y1 - y0)
        stickers.append(PlacedSticker(sticker, colour or "red", centre, size))
    return Scene(place, tuple(stickers), layout.caption)
