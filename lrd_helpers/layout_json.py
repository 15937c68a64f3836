"""Layouts as text and in files, and boxes as other programs write them.

What a layout's fields may hold is the matter of `lrd_helpers.layout`; here they are plain values.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrd_helpers.mask import Box

VERSION = 1
"""The version written into a layout's JSON; a file without one is read as this version."""


# ------------------------------------------------------------------ text


def json_of(fields: dict[str, Any]) -> str:
    """JSON text of a layout's fields, the version first; indented, ending in a newline."""
    text = json.dumps({"version": VERSION} | fields, indent=2, ensure_ascii=False) + "\n"
    # A box on one line. Strings are safe: JSON writes no line break inside them.
    return re.sub(r"\[\n([-+.\de,\s]+)\n\s*\]", _on_one_line, text)


def fields_of(text: str, file: str | None = None) -> dict[str, Any]:
    """The fields of the layout in JSON `text`, without the version, as they stand there.

    Args:
        text: what `json_of` writes.
        file: where the text comes from: named in messages, and a mask's path is relative to it.

    Raises:
        ValueError: not JSON (says line and column), not an object, a field given twice, or
            another version.
    """
    prefix = f"{file}: " if file else ""
    try:
        fields = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{prefix}not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError(f"{prefix}not a layout: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{prefix}{str(error).partition(';')[0]}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{prefix}not a layout: expected an object {{…}}, got {excerpt(fields)}")
    version = fields.pop("version", VERSION)
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"{prefix}version is {excerpt(version)}, but this package reads version {VERSION}"
        )
    if file is not None:
        _resolve_masks(fields, Path(file).parent)
    return fields


def text_of_file(path: str | os.PathLike[str]) -> str:
    """The text in the file `path`.

    Raises:
        ValueError: the file cannot be read, or is not text in UTF-8; names the file.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{os.fspath(path)}: not JSON: it is not text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from None


def excerpt(value: Any) -> str:
    """`value` as an error message shows it: short, and numbers without binary dust."""
    if isinstance(value, (tuple, list)):
        text = "(" + ", ".join(f"{v:.10g}" if type(v) is float else repr(v) for v in value) + ")"
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _resolve_masks(fields: dict[str, Any], folder: Path) -> None:
    """A mask's path in a file is relative to the folder of that file."""
    layers = fields.get("layers")
    for layer in layers if isinstance(layers, list) else []:
        mask = layer.get("mask") if isinstance(layer, dict) else None
        if isinstance(mask, str) and not mask.startswith("data:"):
            layer["mask"] = str(folder / mask)


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + " ".join(match[1].split()) + "]"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice in one object, and only one can count")
    return dict(pairs)


# ------------------------------------------------------------------ boxes of other conventions


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
