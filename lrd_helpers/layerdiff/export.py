"""Stacks of layers in files that other programs open, and back.

.psd       Photoshop, by psd-tools (`pip install psd-tools`). Opacity in 255 steps, names of at most
           255 characters. The caption is the description in the file's XMP.
.ora       OpenRaster (Krita, GIMP, MyPaint): a zip of PNGs and `stack.xml`.
no suffix  A folder with a PNG of each layer, and `stack.json`.

All three keep the layers' order, prompts (as names), positions, opacity and visibility, and every
pixel: also what lies outside the canvas, and the colours under what is transparent. The background
is the lowest layer, named "Background" where it has no prompt. Caption and composite are kept
beside the layers: the composite is no layer, not even a hidden one, so that the file shows what the
stack shows. What is read back equals the stack that was saved (in a .psd but for the steps of
opacity); programs that save the file again may drop what they do not know.

Files of other programs: each layer is put on a canvas of the file's size. One that is larger than
the canvas loses what lies outside. Where the lowest layer is hidden, translucent or does not cover
the canvas, the background is white, and that layer is a layer like the others. A damaged .psd may
give wrong pixels, because the format has no checksums; a damaged .ora or PNG is refused.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy
from PIL import Image

from lrd_helpers import pictures
from lrd_helpers.files import checked_file, replacing_folder, write_atomically
from lrd_helpers.layerdiff.stack import LayerStack, StackError, StackLayer, check_stack
from lrd_helpers.messages import excerpt, in_file, sentence
from lrd_helpers.pictures import png_of, read_picture

MOST_PIXELS = 2**27
"""Pixels of all layers together that are written and read: 0.5 GB of memory."""

MOST_BYTES = 5 * MOST_PIXELS
"""A larger file is not read."""

MOST_TEXT = 2**20
"""Bytes of `stack.xml` and `stack.json` that are read."""

UNNAMED = "Background"
"""The name of a background without a prompt: other programs call it so, too."""

VERSION = 1
"""The version written into `stack.json`."""

LONGEST_NAME, LONGEST_SIDE = 255, 30_000
"""Characters of a layer's name, and pixels of a side, that a .psd can have."""

_OURS = re.compile(r"stack\.json|composite\.png|layer-\d+(-[a-z0-9-]+)?\.png|\.DS_Store|Thumbs\.db")
_LRD = "{urn:lrd_helpers:stack}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_COMPOSITE = "lrd/composite.png"
_NORMAL = "svg:src-over"

for _prefix, _space in {"lrd": _LRD, "rdf": _RDF, "dc": _DC}.items():
    ElementTree.register_namespace(_prefix, _space[1:-1])


def save_stack(stack: LayerStack, path: str | os.PathLike[str]) -> None:
    """Write the stack to `path`, whole or not at all: a .psd, a .ora, or a folder.

    A file is replaced; a folder only if it is empty or holds a stack and nothing else.

    Raises:
        StackError: another suffix, or what the format cannot hold; nothing is written.
        TypeError: no stack.
        ImportError: a .psd, and psd-tools is not installed.
        OSError: a missing folder, a full disk, …; what was at `path` is then untouched.
    """
    check_stack(stack)
    suffix = _suffix(path)
    try:
        _check_pixels((1 + len(stack.layers)) * stack.size[0] * stack.size[1])
        if suffix:
            write_atomically(path, {".psd": _psd_of, ".ora": ora_of}[suffix](stack))
        else:
            _save_folder(stack, path)
    except StackError as error:
        raise StackError(in_file(path, str(error))) from None


def load_stack(path: str | os.PathLike[str]) -> LayerStack:
    """The stack in a .psd, a .ora, or a folder: ours, or of another program.

    Raises:
        StackError: another suffix; a file that cannot be read, is damaged or too large; one without
            layers, or with what a stack has not (groups, masks, effects, …); names file and layer.
        ImportError: a .psd, and psd-tools is not installed.
    """
    read = {".psd": _read_psd, ".ora": _read_ora, "": _read_folder}[_suffix(path)]
    try:
        return read(Path(path))
    except ImportError:
        raise
    except StackError as error:
        fault = str(error)
    except OSError as error:
        fault = f"cannot be read: {error.strerror or error}"
    except Exception as error:  # damaged files raise whatever their reader comes upon
        fault = f"cannot be read: {sentence(str(error), 120) or type(error).__name__}"
    raise StackError(in_file(path, fault))


def check_format(path: str | os.PathLike[str]) -> None:
    """Refuse a path that `save_stack` cannot write a stack to, before anything is drawn.

    Raises:
        StackError: another suffix, or a folder with other things than a stack.
        ImportError: a .psd, and psd-tools is not installed.
    """
    suffix = _suffix(path)
    if suffix == ".psd":
        _psd_image()
    elif not suffix:
        try:
            _check_folder(path)
        except StackError as error:
            raise StackError(in_file(path, str(error))) from None


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".psd", ".ora", ""):
        fault = f"{suffix} is no format for layers; use .psd, .ora, or a folder without a suffix"
        raise StackError(in_file(path, fault))
    return suffix


def _check_pixels(count: int) -> None:
    if count > MOST_PIXELS:
        raise StackError(
            f"the layers have more than {MOST_PIXELS:,} pixels in all; make them smaller"
        )


# ------------------------------------------------------------------ what all formats share


def _sheets(stack: LayerStack) -> list[StackLayer]:
    """The background as a layer, and the layers, the furthest back first."""
    return [StackLayer(stack.background_prompt or UNNAMED, stack.background), *stack.layers]


def _assembled(
    size: tuple[int, int],
    sheets: Iterable[StackLayer],
    *,
    caption: str,
    composite: Image.Image | None,
) -> LayerStack:
    """The stack on a canvas of `size`, of layers of any size, the furthest back first.

    They are read one by one, so that the number of their pixels is limited.
    """
    if not all(type(side) is int and side > 0 for side in size):
        raise StackError(f"its size is {excerpt(size)}, but should be two whole numbers above 0")
    placed, pixels = [], 0
    for sheet in sheets:
        pixels += max(sheet.image.width * sheet.image.height, size[0] * size[1])
        _check_pixels(pixels)
        placed.append(_placed(sheet, size))
    if not placed:
        raise StackError("it has no layers; a picture alone is no stack")
    if composite is not None and composite.size != size:  # another program changed the canvas
        warnings.warn(
            "the composite has another size than the layers; it is left out", stacklevel=4
        )
        composite = None
    background, prompt = Image.new("RGB", size, "white"), ""
    lowest = placed[0]
    covers = lowest.shown().getchannel("A").getextrema() == (255, 255)
    if covers and lowest.opacity == 1 and not lowest.hidden:
        background, placed = lowest.shown(), placed[1:]
        prompt = "" if lowest.prompt == UNNAMED else lowest.prompt
    return LayerStack(
        background,
        tuple(placed),
        caption=caption,
        background_prompt=prompt,
        composite=composite,
    )


def _placed(sheet: StackLayer, size: tuple[int, int]) -> StackLayer:
    """A layer of any size on a canvas: inside where it has room, and moved from there."""
    at = [
        min(max(start, 0), whole - side) if side <= whole else start
        for start, side, whole in zip(sheet.offset, sheet.image.size, size, strict=True)
    ]
    image = Image.new("RGBA", size)
    image.paste(sheet.image, tuple(at))
    moved = tuple(start - place for start, place in zip(sheet.offset, at, strict=True))
    return replace(sheet, image=image, offset=moved)


def _picture(source: bytes | Path, called: str) -> Image.Image:
    try:
        return read_picture(source)
    except ValueError as error:
        raise StackError(f"{called} {error}") from None


class _NoDocumentType(ElementTree.TreeBuilder):
    """Refuses what can define entities: they can grow without end, and name other files."""

    def doctype(self, *_: object) -> None:
        raise StackError("its XML has a document type; leave it out")


def _xml(data: bytes) -> ElementTree.Element:
    return ElementTree.fromstring(data, ElementTree.XMLParser(target=_NoDocumentType()))


# ------------------------------------------------------------------ OpenRaster


def ora_of(stack: LayerStack) -> bytes:
    """The stack as the bytes of a .ora.

    https://www.openraster.org/baseline/file-layout-spec.html, and layer-stack-spec.html.
    """
    width, height = (str(side) for side in stack.size)
    image = ElementTree.Element("image", version="0.0.3", w=width, h=height)
    if stack.caption:
        image.set(f"{_LRD}caption", stack.caption)
    root, files = ElementTree.SubElement(image, "stack"), {}
    for number, sheet in reversed([*enumerate(_sheets(stack))]):  # the frontmost first
        name = f"data/layer{number:03}.png"
        files[name] = png_of(sheet.image)
        attributes = {
            "name": sheet.prompt,
            "src": name,
            "x": str(sheet.offset[0]),
            "y": str(sheet.offset[1]),
            "opacity": str(sheet.opacity),
            "visibility": "hidden" if sheet.hidden else "visible",
            "composite-op": _NORMAL,
        }
        ElementTree.SubElement(root, "layer", attributes)
    merged = stack.flatten()
    files["mergedimage.png"] = png_of(merged)
    merged.thumbnail((256, 256))
    files["Thumbnails/thumbnail.png"] = png_of(merged)
    if stack.composite is not None:
        files[_COMPOSITE] = png_of(stack.composite)
    xml = ElementTree.tostring(image, encoding="utf-8", xml_declaration=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:  # stored: PNGs are compressed
        for name, data in {"mimetype": b"image/openraster", "stack.xml": xml, **files}.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o644 << 16
            file.writestr(member, data)
    return archive.getvalue()


def _read_ora(path: Path) -> LayerStack:
    return stack_of_ora(checked_file(path, MOST_BYTES))


def stack_of_ora(data: bytes) -> LayerStack:
    """The stack in the bytes of a .ora; what is damaged raises whatever its reader comes upon."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        image = _xml(_member(archive, "stack.xml"))
        root = image.find("stack")
        if image.tag != "image" or root is None:
            raise StackError("its stack.xml has no <image> with a <stack>")
        kept = _COMPOSITE in archive.namelist()
        return _assembled(
            (_whole(image, "w"), _whole(image, "h")),
            (_sheet_of_ora(element, archive) for element in reversed(root)),
            caption=image.get(f"{_LRD}caption", ""),
            composite=_picture(_member(archive, _COMPOSITE), "composite") if kept else None,
        )


def _sheet_of_ora(element: ElementTree.Element, archive: zipfile.ZipFile) -> StackLayer:
    prompt = element.get("name", "")
    called = f"layer {excerpt(prompt, 24)}"
    if element.tag != "layer":
        what = "group" if element.tag == "stack" else f"<{sentence(element.tag, 24)}>"
        raise StackError(f"{called} is a {what}; merge it into a layer first")
    operation, visibility = element.get("composite-op", _NORMAL), element.get("visibility")
    if operation != _NORMAL:
        raise StackError(
            f"{called} is blended by {excerpt(operation)}, but should be by {_NORMAL} (normal)"
        )
    if visibility not in (None, "visible", "hidden"):
        raise StackError(
            f"{called}: visibility is {excerpt(visibility)}, but should be visible or hidden"
        )
    opacity = element.get("opacity", "1")
    try:
        opacity = float(opacity)
    except ValueError:
        raise StackError(f"{called}: opacity is {excerpt(opacity)}, but should be 0 to 1") from None
    return StackLayer(
        prompt,
        _picture(_member(archive, element.get("src", "")), called),
        offset=(_whole(element, "x", "0"), _whole(element, "y", "0")),
        opacity=opacity,
        hidden=visibility == "hidden",
    )


def _whole(element: ElementTree.Element, name: str, default: str = "") -> int:
    text = element.get(name, default)
    if not re.fullmatch(r"[-+]?\d{1,9}", text):
        raise StackError(
            f"{name} of a <{element.tag}> is {excerpt(text)}, but should be a whole number"
        )
    return int(text)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file of the archive; nothing is unpacked to the disk."""
    limit = MOST_TEXT if name == "stack.xml" else pictures.MOST_BYTES
    if name not in archive.namelist():
        raise StackError(f"it has no {excerpt(name)} in it")
    if archive.getinfo(name).file_size > limit:
        raise StackError(f"its {excerpt(name)} is larger than {limit / 2**20:.3g} MB")
    return archive.read(name)


# ------------------------------------------------------------------ Photoshop


def _psd_image() -> Any:
    """The class `PSDImage` of psd-tools."""
    try:
        from psd_tools import PSDImage
    except ImportError:
        raise ImportError("a .psd needs psd-tools: pip install psd-tools") from None
    if not hasattr(PSDImage, "create_pixel_layer_from_array"):
        raise ImportError("a .psd needs psd-tools 1.25 or later, which needs Python 3.11")
    return PSDImage


def _psd_of(stack: LayerStack) -> bytes:
    PSDImage = _psd_image()
    if max(stack.size) > LONGEST_SIDE:
        raise StackError(f"a .psd has at most {LONGEST_SIDE:,} pixels a side; save it as .ora")
    psd = PSDImage.frompil(stack.flatten())
    for sheet in _sheets(stack):
        if len(sheet.prompt) > LONGEST_NAME:
            raise StackError(
                f"layer {excerpt(sheet.prompt, 24)} has a name of {len(sheet.prompt)} characters, "
                f"but a .psd has at most {LONGEST_NAME}; shorten the prompt, or save it as .ora"
            )
        left, top = sheet.offset
        layer = psd.create_pixel_layer_from_array(
            numpy.asarray(sheet.image), left=left, top=top, opacity=round(255 * sheet.opacity)
        )
        layer.name, layer.visible = sheet.prompt, not sheet.hidden
    _keep(psd, stack)
    file = io.BytesIO()
    psd.save(file)
    return file.getvalue()


def _keep(psd: Any, stack: LayerStack) -> None:
    """The caption as XMP's description, and the composite as a plug-in's resource."""
    from psd_tools.constants import Resource
    from psd_tools.psd.image_resources import ImageResource

    def add(key: Resource, data: bytes, name: str = "") -> None:
        psd.image_resources[key] = ImageResource(key=key.value, data=data, name=name)

    if stack.caption:
        rdf = ElementTree.Element(f"{_RDF}RDF")
        about = ElementTree.SubElement(rdf, f"{_RDF}Description", {f"{_RDF}about": ""})
        texts = ElementTree.SubElement(about, f"{_DC}description")
        language = {"{http://www.w3.org/XML/1998/namespace}lang": "x-default"}
        text = ElementTree.SubElement(
            ElementTree.SubElement(texts, f"{_RDF}Alt"), f"{_RDF}li", language
        )
        text.text = stack.caption
        add(Resource.XMP_METADATA, ElementTree.tostring(rdf, encoding="utf-8"))
    if stack.composite is not None:
        add(Resource.PLUGIN_RESOURCE_0, png_of(stack.composite), _COMPOSITE)


def _read_psd(path: Path) -> LayerStack:
    PSDImage = _psd_image()
    from psd_tools.compression import PSDDecompressionWarning
    from psd_tools.constants import ColorMode, Resource

    data = checked_file(path, MOST_BYTES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PSDDecompressionWarning)  # else what is damaged is black
        psd = PSDImage.open(io.BytesIO(data), max_alloc_bytes=MOST_BYTES)
        if (psd.color_mode, psd.depth) != (ColorMode.RGB, 8):
            raise StackError(
                f"it is {ColorMode(psd.color_mode).name} with {psd.depth} bits, but should be RGB "
                "with 8; convert it"
            )
        xmp = psd.image_resources.get_data(Resource.XMP_METADATA)
        caption = _xml(xmp).findtext(f".//{_DC}description/{_RDF}Alt/{_RDF}li") if xmp else ""
        plugin = psd.image_resources.get(Resource.PLUGIN_RESOURCE_0)
        kept = plugin is not None and plugin.name == _COMPOSITE
        return _assembled(
            psd.size,
            map(_sheet_of_psd, psd),
            caption=caption or "",
            composite=_picture(plugin.data, "composite") if kept else None,
        )


def _sheet_of_psd(layer: Any) -> StackLayer:
    faults = {
        "is a group": layer.is_group(),
        f"is of the kind {layer.kind!r}": layer.kind != "pixel",
        f"is blended by {layer.blend_mode.name}": layer.blend_mode.name != "NORMAL",
        "has a mask": layer.has_mask() or layer.has_vector_mask(),
        "has effects": layer.has_effects(),
        "is clipped by the layer below": layer.clipping,
    }
    if fault := next((fault for fault, there in faults.items() if there), None):
        raise StackError(
            f"layer {excerpt(layer.name, 24)} {fault}; merge or rasterise it into a normal layer"
        )
    return StackLayer(
        layer.name,
        layer.topil() or Image.new("RGBA", (1, 1)),  # an empty layer has no pixels
        offset=layer.offset,
        opacity=layer.opacity * layer.fill_opacity / 255**2,
        hidden=not layer.visible,
    )


# ------------------------------------------------------------------ a folder


def _check_folder(path: str | os.PathLike[str]) -> None:
    if os.path.isdir(path) and (there := os.listdir(path)):
        others = sorted(name for name in there if not _OURS.fullmatch(name))
        if others or "stack.json" not in there:
            has = excerpt(others[0]) if others else "no stack.json"
            raise StackError(f"it is a folder with {has}, not of a stack; name another folder")


def _save_folder(stack: LayerStack, path: str | os.PathLike[str]) -> None:
    _check_folder(path)
    layers, files = [], {}
    for number, sheet in enumerate(_sheets(stack)):
        words = re.sub("[^a-z0-9]+", "-", sheet.prompt.lower())[:40].strip("-")
        file = f"layer-{number:02}{words and '-' + words}.png"
        files[file] = png_of(sheet.image)
        x, y = sheet.offset
        entry = {"name": sheet.prompt, "file": file, "x": x, "y": y, "opacity": sheet.opacity}
        layers.append(entry | {"hidden": sheet.hidden})
    if stack.composite is not None:
        files["composite.png"] = png_of(stack.composite)
    fields = {"version": VERSION, "size": list(stack.size), "caption": stack.caption}
    text = json.dumps(fields | {"layers": layers}, indent=2, ensure_ascii=False) + "\n"
    with replacing_folder(path) as folder:
        for name, data in (files | {"stack.json": text.encode()}).items():
            (folder / name).write_bytes(data)


def _read_folder(path: Path) -> LayerStack:
    if path.is_dir() and not (path / "stack.json").exists():
        raise StackError("it has no stack.json in it")
    fields = json.loads(checked_file(path / "stack.json", MOST_TEXT).decode("utf-8-sig"))
    size, layers = (
        (fields.get("size"), fields.get("layers")) if isinstance(fields, dict) else (None, None)
    )
    if not isinstance(size, list) or len(size) != 2 or not isinstance(layers, list):
        raise StackError("its stack.json should have version, size, caption and layers")
    if fields.get("version") != VERSION:
        version = excerpt(fields.get("version"))
        raise StackError(f"its version is {version}, but this package reads version {VERSION}")
    composite = path / "composite.png"
    return _assembled(
        tuple(size),
        _sheets_of_folder(layers, path),
        caption=fields.get("caption", ""),
        composite=_picture(composite, "composite") if composite.exists() else None,
    )


def _sheets_of_folder(layers: list[Any], folder: Path) -> Iterator[StackLayer]:
    for number, entry in enumerate(layers):
        names = ("name", "file", "x", "y", "opacity", "hidden")
        if not isinstance(entry, dict) or not entry.keys() >= set(names):
            raise StackError(f"layer {number} should have {', '.join(names)}")
        prompt, file, x, y, opacity, hidden = (entry[name] for name in names)
        if not isinstance(file, str) or os.path.basename(file) != file:
            raise StackError(
                f"layer {number}: file is {excerpt(file)}, but should be the name of one beside it"
            )
        image = _picture(folder / file, f"layer {number}")
        yield StackLayer(prompt, image, offset=(x, y), opacity=opacity, hidden=hidden)
