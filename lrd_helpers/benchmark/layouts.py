"""What a benchmark draws: named layouts in a file, and the scene that each asks for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrd_helpers.files import write_atomically
from lrd_helpers.layout import Layout, LayoutError
from lrd_helpers.layout_json import VERSION, fields_of, text_of_file
from lrd_helpers.measure import sticker_and_colour
from lrd_helpers.messages import excerpt
from lrd_helpers.models import ASSETS
from lrd_helpers.storybook import PLACES, PlacedSticker, Scene, render_scenes

SHIPPED = ASSETS / "storybook-220.json"
"""The 220 layouts of the benchmark; `benchmarks/layouts/generate.py` makes them."""

FORM = '{"version": 1, "layouts": [{"name": …, "stratum": …, "layout": …}, …]}'


class BenchmarkError(ValueError):
    """What cannot be measured, in one sentence."""


@dataclass(frozen=True)
class NamedLayout:
    """A layout of a benchmark.

    Attributes:
        name: letters, digits, - and _, at most 100; unique within a benchmark.
        stratum: the kind of layouts it belongs to, "small"; a line of at most 100 signs.
        layout: what should be drawn.

    Raises:
        LayoutError: another name or stratum.
    """

    name: str
    stratum: str
    layout: Layout

    def __post_init__(self) -> None:
        # The name becomes a file's.
        name, stratum = self.name, self.stratum
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,100}", name):
            raise LayoutError(
                f"the name is {excerpt(name)}, but should be 1 to 100 letters, digits, - and _"
            )
        printable = isinstance(stratum, str) and stratum.strip() and stratum.isprintable()
        if not printable or len(stratum) > 100:
            raise LayoutError(
                f"the stratum is {excerpt(stratum)}, but should be a name of 1 to 100 printable "
                "signs"
            )


def load_layouts(*paths: str | os.PathLike[str]) -> list[NamedLayout]:
    """The layouts of files that `save_layouts` wrote; without a path, the 220 that are shipped.

    Raises:
        LayoutError: a file that cannot be read, is empty, of another version or no file of
            layouts, or an invalid layout; names the file and the layout.
    """
    layouts: dict[str, NamedLayout] = {}
    for path in map(Path, paths or [SHIPPED]):
        for layout in _layouts_in(path):
            if layout.name in layouts:
                raise LayoutError(
                    f"{path}: a second layout has the name {excerpt(layout.name)}; rename one"
                )
            layouts[layout.name] = layout
    return list(layouts.values())


def _layouts_in(path: Path) -> Iterator[NamedLayout]:
    for number, entry in enumerate(_entries_of(path), start=1):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or set(entry) != {"name", "stratum", "layout"}:
            raise LayoutError(f"{where}: should have name, stratum and layout")
        layout = Layout.from_json(json.dumps(entry["layout"]), file=where)
        try:
            named = NamedLayout(entry["name"], entry["stratum"], layout)
        except LayoutError as error:
            raise LayoutError(f"{where}: {error}") from None
        yield named


def _entries_of(path: Path) -> list[Any]:
    try:
        fields = fields_of(text_of_file(path), str(path))
    except ValueError as error:
        raise LayoutError(str(error)) from None
    if not isinstance(fields.get("layouts"), list):
        hint = ""
        if "layers" in fields:
            hint = "; this is a single layout, which `python -m lrd_helpers render` draws"
        raise LayoutError(f"{path}: not a file of layouts, which is {FORM}{hint}")
    if not fields["layouts"]:
        raise LayoutError(f"{path}: holds no layouts; give at least one")
    return fields["layouts"]


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


def with_shapes(layout: Layout) -> Layout:
    """The layout with the stickers' shapes, as `ground_truth_scene` has them, in place of boxes.

    Raises:
        ValueError: as for `ground_truth_scene`.
    """
    shapes = render_scenes([ground_truth_scene(layout)]).layers[0, :, 3] > 0.5
    layers = [
        replace(layer, box=None, mask=shape) if layer.mask is None and shape.any() else layer
        for layer, shape in zip(layout.layers, shapes, strict=True)
    ]
    return replace(layout, layers=layers)
