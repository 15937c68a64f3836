"""Layouts as text and in files, and boxes as other programs write them.

What a layout's fields may hold is the matter of `lrd_helpers.layout`; here they are plain values.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrd_helpers.files import checked_file
from lrd_helpers.mask import Box
from lrd_helpers.messages import excerpt, in_file

VERSION = 1
"""The version written into a layout's JSON; a file without one is read as this version."""

LARGEST = 2**24
"""Bytes of a JSON file, or characters of a JSON text, that are read."""


# ------------------------------------------------------------------ text


def json_of(fields: dict[str, Any]) -> str:
    """JSON text of a layout's fields, the version first; indented, ending in a newline."""
    text = json.dumps({"version": VERSION} | fields, indent=2, ensure_ascii=False) + "\n"
    # A box on one line. Strings are safe: JSON writes no line break inside them.
    return re.sub(r"\[\n([-+.\de,\s]+)\n\s*\]", _on_one_line, text)


def fields_of(text: str, file: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The fields of the layout in JSON `text`, without the version, as they stand there.

    A number of more than 19 digits is the nearest float.

    Args:
        text: what `json_of` writes.
        file: where the text comes from: named in messages, and a mask's path is relative to it.

    Raises:
        ValueError: not JSON (says line and column), nested too deeply, larger than `LARGEST`, not
            an object, a field given twice, or another version.
    """
    try:
        fields = _value_of(text)
        if not isinstance(fields, dict):
            raise ValueError(f"not a layout: expected an object {{…}}, got {excerpt(fields)}")
        version = fields.pop("version", VERSION)
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"version is {excerpt(version)}, but this package reads version {VERSION}"
            )
    except ValueError as error:
        raise ValueError(in_file(file, str(error))) from None
    if file is not None:
        _resolve_masks(fields, Path(file).parent)
    return fields


def text_of_file(path: str | os.PathLike[str]) -> str:
    """The text in the file `path`.

    Raises:
        ValueError: the file cannot be read, is larger than `LARGEST`, or is not text in UTF-8;
            names the file.
    """
    try:
        return checked_file(path, LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(in_file(path, "not JSON: it is not text in UTF-8")) from None
    except OSError as error:
        raise ValueError(in_file(path, f"cannot be read: {error.strerror}")) from None


def _value_of(text: str) -> Any:
    if not isinstance(text, str):
        raise ValueError(f"not JSON: expected text, got {excerpt(text)}")
    if len(text) > LARGEST:
        raise ValueError(f"not JSON to read: it is larger than {LARGEST / 2**20:.3g} MB")
    repeated: list[tuple[dict[str, Any], str]] = []

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(fields := dict(pairs)) < len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            repeated.append((fields, name))
        return fields

    try:
        value = json.loads(text, object_pairs_hook=object_of, parse_int=_integer)
    except json.JSONDecodeError as error:
        fault = error.msg.removesuffix(" at")
        raise ValueError(
            f"not JSON: {fault} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError("not a layout: it is nested too deeply") from None
    if repeated:
        owner, name = repeated[0]
        raise ValueError(
            f"{_place_of(owner, value)}{excerpt(name)} is given twice in one object, and only one "
            "can count"
        )
    return value


def _resolve_masks(fields: dict[str, Any], folder: Path) -> None:
    """A mask's path in a file is relative to the folder of that file."""
    layers = fields.get("layers")
    for layer in layers if isinstance(layers, list) else []:
        mask = layer.get("mask") if isinstance(layer, dict) else None
        if isinstance(mask, str) and not mask.startswith("data:"):
            layer["mask"] = str(folder / mask)


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + " ".join(match[1].split()) + "]"


def _integer(digits: str) -> int | float:
    # Python refuses thousands of digits; a field says better what it should be.
    return int(digits) if len(digits) < 20 else float(digits)


def _place_of(owner: dict[str, Any], value: Any) -> str:
    """Where in a layout `owner` is: a layer, a field, a layer's field; else nothing."""
    layers = value.get("layers") if isinstance(value, dict) else None
    layers = layers if isinstance(layers, list) else []
    holders = [("", value), *((f"layer {n}, ", layer) for n, layer in enumerate(layers, start=1))]
    for place, holder in holders:
        if holder is owner:
            return place
        for name, field in holder.items() if isinstance(holder, dict) else ():
            if field is owner:
                return f"{place}{excerpt(name)}: "
    return ""


# ------------------------------------------------------------------ boxes of other conventions


def box_from_xywh(box: Sequence[float]) -> Box:
    """(x, y, width, height) in [0, 1], from the upper left corner → (x0, y0, x1, y1)."""
    x, y, w, h = box
    return (x, y, x + w, y + h)


def box_from_centre(box: Sequence[float]) -> Box:
    """YOLO's (x, y, width, height) in [0, 1], where (x, y) is the centre → (x0, y0, x1, y1)."""
    x, y, w, h = box
    return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


def box_from_pixels(box: Sequence[float], width: float, height: float) -> Box:
    """Corners in pixels of a `width` × `height` picture (Pascal VOC) → (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    return (x0 / width, y0 / height, x1 / width, y1 / height)


def box_from_coco(box: Sequence[float], width: float, height: float) -> Box:
    """COCO's (x, y, w, h) in pixels of a `width` × `height` picture → (x0, y0, x1, y1)."""
    x, y, w, h = box
    return (x / width, y / height, (x + w) / width, (y + h) / height)


def box_to_coco(box: Box, width: float, height: float) -> Box:
    """(x0, y0, x1, y1) → COCO's (x, y, w, h) in pixels of a `width` × `height` picture."""
    x0, y0, x1, y1 = box
    return (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)


def box_from_thousandths(box: Sequence[float]) -> Box:
    """(y0, x0, y1, x1) in 0–1000, as many language models write → (x0, y0, x1, y1) in [0, 1]."""
    y0, x0, y1, x1 = box
    return (x0 / 1000, y0 / 1000, x1 / 1000, y1 / 1000)


def box_to_thousandths(box: Box) -> Box:
    """(x0, y0, x1, y1) in [0, 1] → (y0, x0, y1, x1) in 0–1000."""
    x0, y0, x1, y1 = box
    return (1000 * y0, 1000 * x0, 1000 * y1, 1000 * x1)
