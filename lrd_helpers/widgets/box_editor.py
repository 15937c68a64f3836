"""`BoxEditor`: a layout drawn by hand, in the page of a notebook.

editor = BoxEditor(layout)     # or BoxEditor(): an empty canvas
editor                         # as the last line of a cell: shows it
editor.layout                  # a validated Layout of what is drawn now
editor.layout = other          # shown in the page at once (and can be undone there)
print(editor.as_code())        # the same layout as Python to paste

The page is `layer_editor.js` and `box_editor.js`; here is what checks and keeps what it sends.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import traitlets
from PIL import ImageColor

from lrd_helpers.layout import Layer, Layout, LayoutError
from lrd_helpers.layout_json import VERSION
from lrd_helpers.mask import Box
from lrd_helpers.naming import colour_of_prompt
from lrd_helpers.pictures import picture_of, reduced_data_uri
from lrd_helpers.plotting import BOX_COLOURS, ink_on, layer_label
from lrd_helpers.widgets.layer_editor import LayerEditor
from lrd_helpers.widgets.page import page_text

COLOURS = {
    name: "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(name)) for name in ImageColor.colormap
}
"""The colours of CSS by their names, as #rrggbb."""

DOCUMENT_ONLY = ("id", "hidden", "locked")
"""What a layer of the editor has and a `Layer` has not."""


class BoxEditor(LayerEditor):
    """A canvas for boxes and masks, and beside it the list of their prompts.

    Everything is undoable and can be done with mouse, finger or keyboard; the page explains itself.

    Args:
        layout: what to begin with.
        caption: for an empty canvas; left empty, it is put together from the prompts.
        background: likewise, "at night".
        size: width and height of the picture in pixels: the canvas has their ratio, and its grid
            is of latent pixels. The image's own size by default, or else 128 × 128.
        image: a picture behind the boxes, for editing: PIL, tensor or array. The page gets it
            reduced to what it shows; `size` is still the picture's own.
        snap: boxes keep to the grid of latent pixels (8 × 8 pixels each).
        starters: layouts that the page offers to begin with, as small pictures.

    Attributes:
        document: the draft as the page holds it, also where it is no `Layout` yet: a dict of
            `caption`, `background` and `layers` (back to front: `id`, `prompt`, `box` or `mask`,
            `hidden`, `locked`, and what else a `Layer` has). `editor.observe(f, "document")` calls
            f after each change. Replace it, never change it in place.
    """

    _esm = page_text("elements.js", "layer_editor.js", "box_editor.js")

    cell = traitlets.Int(8).tag(sync=True)
    snap = traitlets.Bool(False).tag(sync=True, echo_update=False)
    _palette = traitlets.List(list(BOX_COLOURS)).tag(sync=True)
    _colours = traitlets.Dict(COLOURS).tag(sync=True)
    _starters = traitlets.List().tag(sync=True)
    _picture = traitlets.Unicode("").tag(sync=True)
    _picture_opacity = traitlets.Float(1.0).tag(sync=True)
    _followed = traitlets.Bool(False).tag(sync=True)

    def __init__(
        self,
        layout: Layout | None = None,
        *,
        caption: str = "",
        background: str = "",
        size: tuple[int, int] | None = None,
        image: Any = None,
        snap: bool = False,
        starters: Sequence[Layout] = (),
    ) -> None:
        if layout is not None and (caption or background):
            raise ValueError("the layout has a caption and a background; do not give others")
        self._on_hand: Callable[[dict[str, Any] | None], None] | None = None
        picture = None if image is None else picture_of(image)
        width, height = size or (picture.size if picture else (128, 128))
        if min(width, height) < 1:
            raise ValueError(f"size is {(width, height)}, but should be (width, height) in pixels")
        draft = {"caption": caption, "background": background, "layers": []}
        super().__init__(
            document=draft if layout is None else document_of(layout),
            width=width,
            height=height,
            snap=snap,
            _picture="" if picture is None else reduced_data_uri(picture),
            _starters=[document_of(starter) for starter in starters],
        )

    @property
    def layout(self) -> Layout:
        """What is drawn now (without hidden layers), checked; it does not change any more.

        Raises:
            LayoutError: it is not finished: nothing drawn, or a prompt is missing. The page says
                so too and marks the field.
        """
        try:
            return layout_of(self.document)
        except LayoutError as error:
            self.notify(str(error), mark=_unnamed(self.document))
            raise

    @layout.setter
    def layout(self, layout: Layout) -> None:
        if not isinstance(layout, Layout):
            raise TypeError(
                f"layout is of type {type(layout).__name__}, but should be a Layout; "
                "Layout.from_json(text) and Layout.load(path) make one"
            )
        self.document = document_of(layout)

    def show_behind(self, image: Any) -> None:
        """Show a picture (PIL, tensor or array) under the boxes; the page can make it fainter."""
        self._picture = reduced_data_uri(picture_of(image))

    def follow(self, on_hand: Callable[[dict[str, Any] | None], None] | None) -> None:
        """Hear what the hand does while it drags a box; None: not any more.

        Args:
            on_hand: called with the `document` as it would be if the hand let go now; the next call
                comes when this one has returned, with the newest. With None when it has let go,
                after the edit that it made, if it made one.
        """
        self._on_hand = on_hand
        self._followed = on_hand is not None

    def as_code(self) -> str:
        """The layout as Python that makes it again, to paste into a cell.

        Raises:
            LayoutError: as `layout` does.
        """
        return layout_code(self.layout)

    def static_svg(self) -> str:
        """The draft as an SVG picture: what is seen where no widget can run."""
        shown = [layer for layer in self.document["layers"] if not layer.get("hidden")]
        return layout_svg(shown, (self.width, self.height), picture=self._picture)

    def __repr__(self) -> str:
        names = ", ".join(json.dumps(layer["prompt"]) for layer in self.document["layers"])
        return f"BoxEditor({self.width} × {self.height}, layers: {names or 'none yet'})"

    def _static(self) -> dict[str, str]:
        return {"image/svg+xml": self.static_svg()}

    def _hear(self, message: Mapping[str, Any]) -> None:
        if message.get("kind") == "hand":
            if self._on_hand is not None:
                self._on_hand(message["document"])
            self.send({"kind": "handed"})
        if message.get("kind") == "load":
            try:
                self.layout = Layout.from_json(str(message.get("text", "")))
            except LayoutError as error:
                self.notify(f"Nothing was loaded: {error}.")
            else:
                self.send({"kind": "loaded"})


# ------------------------------------------------------------------ document ↔ Layout


def document_of(layout: Layout) -> dict[str, Any]:
    """The document that a layout is.

    A caption that only puts the prompts together is left to the page, which does so as they change.
    """
    data = json.loads(layout.to_json())
    layers = [
        {"id": f"layer-{number}", "hidden": False, "locked": False} | layer
        for number, layer in enumerate(data["layers"], start=1)
    ]
    document = {"caption": "", "background": data["background"], "layers": layers}
    if data["caption"] != default_caption(document):
        document["caption"] = data["caption"]
    return document


def layout_of(document: Mapping[str, Any]) -> Layout:
    """The layout that a document is.

    Raises:
        LayoutError: it is not finished, or not possible.
    """
    layers = document["layers"]
    shown = [layer for layer in layers if not layer.get("hidden")]
    if not shown:
        raise LayoutError(
            "all layers are hidden; show at least one"
            if layers
            else "the canvas is empty; draw at least one box"
        )
    unnamed = _unnamed(document)
    for number, layer in enumerate(layers, start=1):
        if layer["id"] in unnamed:
            raise LayoutError(
                f"layer {number} has no prompt; say what should be there, for example 'a red car'"
            )
    data = {
        "version": VERSION,
        "caption": document["caption"].strip() or default_caption(document),
        "background": document["background"],
        "layers": [
            {name: value for name, value in layer.items() if name not in DOCUMENT_ONLY}
            for layer in shown
        ],
    }
    return Layout.from_json(json.dumps(data))


def _unnamed(document: Mapping[str, Any]) -> list[str]:
    return [
        layer["id"]
        for layer in document["layers"]
        if not layer.get("hidden") and not layer["prompt"].strip()
    ]


def default_caption(document: Mapping[str, Any]) -> str:
    """The prompts and the background in one line: "a red car and a yellow star at night"."""
    prompts = [layer["prompt"].strip() for layer in document["layers"] if not layer.get("hidden")]
    return f"{' and '.join(prompts)} {document['background'].strip()}".strip()


def layout_code(layout: Layout) -> str:
    """Python that makes the layout."""
    lines = ["from lrd_helpers import Layer, Layout", "", "layout = Layout("]
    lines += [f"    {name}={_quoted(getattr(layout, name))}," for name in ("caption", "background")]
    lines += ["    layers=["]
    for layer in json.loads(layout.to_json())["layers"]:
        given = [_quoted(layer["prompt"])]
        for field in fields(Layer)[1:]:
            if field.name in layer:
                given.append(f"{field.name}={_literal(layer[field.name])}")
        lines.append(f"        Layer({', '.join(given)}),")
    return "\n".join([*lines, "    ],", ")", ""])


def _literal(value: str | float | Sequence[float]) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Sequence):
        return f"({', '.join(map(_literal, value))})"
    return f"{value:.10g}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # also a Python string


# ------------------------------------------------------------------ pictures

MONOSPACE = "ui-monospace, DejaVu Sans Mono, Menlo, Consolas, monospace"
LETTER = 6.6
"""How wide a letter of a label is, in units of the SVG."""

_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML may hold, not even escaped (XML 1.0, section 2.2)."""


def _xml(text: str) -> str:
    return html.escape(_NOT_IN_XML.sub("\ufffd", text))


def layer_colours(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The colour in which each layer of a `document` is drawn, as #rrggbb.

    It is the layer's or the one that its prompt names, so that a yellow star is not drawn in
    orange; without either, the one of `BOX_COLOURS` with the layer's number.
    """
    colours = []
    for number, layer in enumerate(layers):
        colour = layer.get("colour") or colour_of_prompt(layer["prompt"])
        rgb = ImageColor.getrgb(colour or BOX_COLOURS[number % len(BOX_COLOURS)])
        colours.append("#{:02x}{:02x}{:02x}".format(*rgb[:3]))
    return colours


def layout_svg(
    layers: Sequence[Mapping[str, Any]],
    size: tuple[int, int],
    *,
    picture: str = "",
    found: Sequence[Box | None] = (),
    label: str = "",
) -> str:
    """Layers of a `document` as an SVG picture.

    Args:
        layers: back to front.
        size: width and height of the picture; only their ratio counts.
        picture: what is behind them, a data URI.
        found: for each layer the box that a detector found, drawn dashed.
        label: what a screen reader says; the prompts by default.
    """
    scale = 400 / max(size)
    width, height = (round(side * scale) for side in size)
    whole = f'width="{width}" height="{height}"'
    parts = [f'<rect {whole} fill="#f4f5f8"/>']
    if picture:
        parts = [f'<image href="{_xml(picture)}" {whole} style="image-rendering:auto"/>']
    for number, (layer, colour) in enumerate(zip(layers, layer_colours(layers), strict=True)):
        x, y = 0.0, 18.0 * number
        if "mask" in layer:
            parts += _masked(layer, colour, whole)
        else:
            x, y = layer["box"][0] * width, layer["box"][1] * height
            parts += _outline(layer["box"], colour, (width, height))
        if number < len(found) and found[number] is not None:
            parts += _outline(found[number], colour, (width, height), dashed=True)
        parts += _tag(
            layer_label(number, layer["prompt"], layer.get("opacity", 1.0)), colour, x, y, width
        )
    prompts = "; ".join(layer["prompt"] for layer in layers) or "nothing drawn yet"
    label = _xml(label or f"Layout: {prompts}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{label}" font-family="sans-serif">'
        + "".join(parts)
        + "</svg>"
    )


def _masked(layer: Mapping[str, Any], colour: str, whole: str) -> list[str]:
    mask = f'<image href="{_xml(layer["mask"])}" {whole} preserveAspectRatio="none"/>'
    # Two pictures on one page must not share an id.
    name = "mask-" + hashlib.sha256(mask.encode()).hexdigest()[:12]
    opacity = 0.2 + 0.3 * layer.get("opacity", 1.0)
    return [
        f'<mask id="{name}">{mask}</mask>',
        f'<rect {whole} fill="{colour}" fill-opacity="{opacity:.2g}" mask="url(#{name})"/>',
    ]


def _outline(
    box: Sequence[float], colour: str, size: tuple[int, int], *, dashed: bool = False
) -> list[str]:
    """A box with a dark rim, so that a light one shows on snow and a dark one at night."""
    (x0, y0, x1, y1), (width, height) = box, size
    numbers = x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height
    place = 'x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"'.format(*numbers)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return [
        f'<rect {place} fill="none" stroke="{stroke}" stroke-width="{wide}"{more}/>'
        for stroke, wide, more in (("#202020", 2 if dashed else 4, ""), (colour, 2, dash))
    ]


def _tag(text: str, colour: str, x: float, y: float, width: int) -> list[str]:
    """A layer's label, as `drawTag` of box_editor.js draws it: moved to the left to stay whole."""
    room = int((width - 10) / LETTER)
    text = text if len(text) <= room else text[: room - 1] + "…"
    wide = LETTER * len(text) + 10
    x = max(0.0, min(x, width - wide))
    return [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="18" rx="2" fill="{colour}"/>',
        f'<text x="{x + 5:.1f}" y="{y + 13:.1f}" fill="{ink_on(colour)}" font-size="11.5" '
        f'font-weight="600" font-family="{MONOSPACE}" letter-spacing="-0.3">{_xml(text)}</text>',
    ]
