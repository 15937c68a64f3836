"""Pictures for people: rows of images, layouts over them, stacks taken apart, planes, films.

A layer has the same number wherever it is drawn. Its colour here is that of its number; the editor
and the studio draw it in the colour that it names (`layer_colours` of widgets/box_editor.py).
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy
import torch
from IPython.display import display
from jaxtyping import Float
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyBboxPatch, Polygon, Rectangle
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from torch.nn import functional

from lrd_helpers.layout import Layout
from lrd_helpers.mask import Box
from lrd_helpers.pictures import Picture, picture_of, png_of

if TYPE_CHECKING:
    from lrd_helpers.layerdiff.stack import LayerStack, StackLayer

BOX_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
"""Okabe and Ito (2008): told apart with any kind of colour vision; an eighth layer starts again."""

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7f7f7f"
"""For lines and points: from the same set, and a grey."""

CURVES = ((BLUE, "o-"), (ORANGE, "s--"), (GREY, "^:"), (GREEN, "D-."))
"""Colour, mark and dash of the curves in a plot, in their order."""

Numbers = Sequence[int | float] | Tensor
Values = Sequence[float | int | Tensor] | Float[Tensor, "values"]
"""What is drawn along an axis."""

CAPTION_PAPER, CAPTION_INK = "#ffffff", "#202020"
CHECKS = ("#ffffff", "#cccccc")
"""Of the ground that shows through a layer, as picture editors draw it."""


def show_images(
    images: Sequence[Picture],
    titles: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    width: float = 2.2,
    suptitle: str | None = None,
) -> Figure:
    """The images in rows, each under its title.

    Args:
        images: at least one, of any sizes.
        titles: one an image, or none at all.
        columns: images a row; default: as many as there are, at most 6.
        width: of one image, in inches.
        suptitle: above everything: what the figure shows.

    Raises:
        ValueError: no images, no columns, or another number of titles than of images.
    """
    if not images:
        raise ValueError("there are no images to show")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"{len(images)} images, but {len(titles)} titles")
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}, but should be at least 1")
    pictures = [picture_of(image) for image in images]
    columns = min(columns or 6, len(pictures))
    rows = -(-len(pictures) // columns)
    tallest = max(picture.height / picture.width for picture in pictures)
    letters = max(8, int(width * 13))  # of nine points stand in one line above an image
    lines = [textwrap.fill(_writable(title), letters) for title in titles or [""] * len(pictures)]
    most_lines = max(line.count("\n") + bool(line) for line in lines)
    height = width * tallest + (0.16 * most_lines + 0.17 if most_lines else 0)
    # White also where the notebook is dark: the titles stay readable.
    figure, axes = pyplot.subplots(
        rows,
        columns,
        squeeze=False,
        layout="compressed",
        facecolor="white",
        figsize=(columns * width, rows * height + (0.4 if suptitle else 0)),
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, line in zip(axes.flat, pictures, lines, strict=False):
        # Small pictures are shown as the pixels they are, not smoothed into something prettier.
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(line, fontsize=9, color="black", parse_math=False)  # "$5" is no formula
    if suptitle:
        figure.suptitle(_writable(suptitle), fontsize=11, color="black", parse_math=False)
    return figure


def draw_layout(image: Picture, layout: Layout, *, longest_side: int = 512) -> Image.Image:
    """The image, enlarged, with every layer's outline (box or mask), number, prompt and opacity.

    Args:
        image: of any size; its sides keep their ratio.
        layout: its layers are drawn back to front, as they are rendered.
        longest_side: of the result, in pixels.
    """
    picture = _enlarged(picture_of(image), longest_side)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(longest_side / 128))
    font = _font(max(11, round(longest_side / 32)))
    corners = [_pixel_box(layer.bounding_box, picture.size) for layer in layout.layers]
    for number, (layer, box) in enumerate(zip(layout.layers, corners, strict=True)):
        if layer.mask is not None:
            inside = layer.mask.image().convert("L").resize(picture.size)
            colours = ("#202020", BOX_COLOURS[number % len(BOX_COLOURS)])
            for colour, rim in zip(colours, (line + 1, line), strict=True):
                around = inside.filter(ImageFilter.MaxFilter(2 * rim + 1))
                picture.paste(colour, mask=ImageChops.difference(around, inside))
            continue
        # A dark rim, so that a light box shows on snow and a dark one at night.
        draw.rectangle(box, outline="#202020", width=line + 2)
        inner = (box[0] + 1, box[1] + 1, max(box[0] + 1, box[2] - 1), max(box[1] + 1, box[3] - 1))
        draw.rectangle(inner, outline=BOX_COLOURS[number % len(BOX_COLOURS)], width=line)
    taken: list[tuple[int, int, int, int]] = []
    for number, (layer, box) in enumerate(zip(layout.layers, corners, strict=True)):
        text = layer_label(number, layer.prompt, layer.opacity)
        text = _fitted(text, font, picture.width - 4 * line)
        tag = _free_place(box, _text_size(text, font, line // 2), picture.size, taken)
        taken.append(tag)
        colour = BOX_COLOURS[number % len(BOX_COLOURS)]
        draw.rectangle(tag, fill=colour, outline="#202020")
        draw.multiline_text(
            (tag[0] + line, tag[1] + line // 2), text, font=font, fill=ink_on(colour)
        )
    return picture


def layer_label(number: int, prompt: str, opacity: float = 1.0) -> str:
    """What stands beside a layer wherever it is drawn: "2 a red car", or "2 a red car 50 %".

    Args:
        number: of the layer, counted from 0.
        prompt: of the layer.
        opacity: likewise; named only where something shines through.
    """
    return f"{number + 1} {prompt}".rstrip() + (f" {100 * opacity:.0f} %" if opacity < 1 else "")


def side_by_side(
    image: Picture, layout: Layout, *, caption: str | None = None, longest_side: int = 512
) -> Image.Image:
    """The picture, and beside it the picture with the layout drawn over it, with a caption below.

    Args:
        image: of any size.
        layout: its caption is written below both.
        caption: another text instead; "" for none.
        longest_side: of each half, in pixels.
    """
    plain = _enlarged(picture_of(image), longest_side)
    boxes = draw_layout(image, layout, longest_side=longest_side)
    gap = max(4, longest_side // 64)
    width = 2 * plain.width + 3 * gap
    font = _font(max(12, round(longest_side / 26)))
    text = _fitted(layout.caption if caption is None else caption, font, width - 2 * gap)
    below = _text_size(text, font, gap)[1] + gap if text else 0
    sheet = Image.new("RGB", (width, plain.height + 2 * gap + below), CAPTION_PAPER)
    sheet.paste(plain, (gap, gap))
    sheet.paste(boxes, (2 * gap + plain.width, gap))
    ImageDraw.Draw(sheet).multiline_text(
        (width / 2, plain.height + 2 * gap),
        text,
        font=font,
        fill=CAPTION_INK,
        anchor="ma",
        align="center",
    )
    return sheet


def draw_stack(*stacks: LayerStack, width: float = 1.5) -> Figure:
    """Stacks taken apart, a row each: background, layers back to front, flattened, composite.

    Layers stand on a checkerboard where they were moved to, under their number and prompt; hidden
    ones are named so. A stack with fewer layers than the others has room left before the last two.

    Args:
        stacks: at least one.
        width: of a picture, in inches.

    Raises:
        ValueError: no stacks.
    """
    if not stacks:
        raise ValueError("there are no stacks to draw")
    most = max(len(stack.layers) for stack in stacks)
    pictures: list[Image.Image] = []
    titles: list[str] = []
    for stack in stacks:
        blank = Image.new("RGB", stack.size, CAPTION_PAPER)
        room = most - len(stack.layers)
        pictures += [stack.background, *map(on_checks, stack.layers), *[blank] * room]
        pictures += [stack.flatten(), stack.composite or blank]
        titles += [stack.background_prompt or "background"]
        titles += [
            layer_label(number, layer.prompt, layer.opacity) + " (hidden)" * layer.hidden
            for number, layer in enumerate(stack.layers)
        ]
        titles += [""] * room + ["flattened", "composite" if stack.composite else "no composite"]
    return show_images(pictures, titles, columns=most + 3, width=width)


def on_checks(layer: StackLayer, cell: int = 8) -> Image.Image:
    """A layer's pixels where they were moved to, on a checkerboard of squares of `cell` pixels."""
    image = layer.shown()
    ground = Image.new("RGB", image.size, CHECKS[0])
    draw = ImageDraw.Draw(ground)
    for y in range(0, image.height, cell):
        for x in range(y % (2 * cell), image.width, 2 * cell):
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=CHECKS[1])
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def map_image(
    values: Float[Tensor, "rows columns"],
    picture: Float[Tensor, "3 height width"] | None = None,
    *,
    top: float | None = None,
) -> Float[Tensor, "3 _ _"]:
    """A map in colours from blue to yellow (cividis): its cells as they are, or over a picture.

    Args:
        values: the least becomes blue and the largest yellow.
        picture: of values in [0, 1]. The map is brought to its size, smoothly, and what is in it is
            seen in the map as light and shade.
        top: the value that becomes yellow, and 0 becomes blue: maps on one scale can be compared.

    Raises:
        ValueError: `top` is not above 0.
    """
    if top is not None and not top > 0:
        raise ValueError(f"top is {top}, but should be above 0")
    values = values.detach().float().cpu()
    shade = torch.ones(values.shape)
    if picture is not None:
        size, grey = picture.shape[-2:], picture.detach().float().cpu().mean(0)
        values = functional.interpolate(values[None, None], size, mode="bilinear")[0, 0]
        shade = 0.65 + 0.35 * _stretched(grey)
    values = _stretched(values) if top is None else values / top
    colours = torch.from_numpy(pyplot.get_cmap("cividis")(values.clamp(0, 1).numpy())[..., :3])
    return (colours * shade[..., None]).permute(2, 0, 1).float()


def _stretched(values: Tensor) -> Tensor:
    """From 0, the least, to 1, the largest."""
    values = values - values.min()
    return values / values.max().clamp(min=1e-12)


# ------------------------------------------------------------------ on the axes of a figure


def frame(
    axis: Axes,
    picture: Picture,
    title: str = "",
    below: str = "",
    layout: Layout | None = None,
) -> None:
    """A picture on an axis from 0 to 1, and on it the box, or else the mask, of each layer.

    Args:
        picture: of any size; shown as the pixels it has.
        below: what stands under it.
    """
    axis.imshow(picture_of(picture), extent=(0, 1, 1, 0), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(_writable(title), fontsize=9, parse_math=False)
    axis.set_xlabel(_writable(below), fontsize=9, parse_math=False)
    for number, layer in enumerate(layout.layers if layout else ()):
        # A dark rim, so that a light line shows on snow and a dark one at night.
        for colour, width in (("black", 3.2), (BOX_COLOURS[number % len(BOX_COLOURS)], 1.8)):
            if layer.mask is None:
                x0, y0, x1, y1 = layer.bounding_box
                axis.add_patch(
                    Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=width)
                )
            else:
                outline = {"colors": [colour], "linewidths": width}
                place = {"origin": "lower", "extent": (0, 1, 0, 1)}
                axis.contour(layer.mask.pixels(), [0.5], **outline, **place)


def draw_judged(
    rows: dict[str, Sequence[tuple[Layout, Picture, Sequence[float]]]],
    *,
    titles: Sequence[str] = (),
    mean: bool = True,
    width: float = 1.7,
) -> Figure:
    """A row of pictures under each name, with their layouts drawn in and the IoUs below.

    Args:
        rows: a name → of each picture its layout, itself and the IoU of each layer.
        titles: one for each column; default: none.
        mean: whether the mean of a row's IoUs stands beside its name.
        width: of one picture, in inches.

    Raises:
        ValueError: no rows, rows of different or no length, or titles for other columns.
    """
    lengths = sorted({len(row) for row in rows.values()})
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(f"every row needs as many pictures, at least one, but they have {lengths}")
    [columns] = lengths
    if titles and len(titles) != columns:
        raise ValueError(f"{columns} pictures a row, but {len(titles)} titles")
    titles = titles or [""] * columns
    height = width + (0.42 if any(rows) or mean else 0.25)
    figure = pyplot.figure(figsize=(width * columns, height * len(rows) + 0.2 * any(titles)))
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (name, row) in zip(parts, rows.items(), strict=True):
        ious = [iou for *_, each in row for iou in each]
        name = _writable(f"{name}: mean IoU {sum(ious) / len(ious):.2f}" if mean else name)
        if name:
            part.suptitle(name, fontsize=10, parse_math=False)
        axes = part.subplots(1, columns, squeeze=False)[0]
        above = titles if part is parts[0] else [""] * columns
        for axis, (layout, picture, each), title in zip(axes, row, above, strict=True):
            frame(axis, picture, title, "IoU " + ", ".join(f"{iou:.2f}" for iou in each), layout)
    return figure


def draw_maps(
    maps: Sequence[Float[Tensor, "height width"]],
    titles: Sequence[str],
    *,
    limits: tuple[float, float] = (0.0, 1.0),
    columns: int | None = None,
    layout: Layout | None = None,
    width: float = 2.0,
) -> Figure:
    """Maps such as masks, channels or attention, dark to bright between two values.

    Args:
        maps: at least one.
        titles: one a map.
        limits: the values of the darkest and the brightest colour.
        columns: maps a row; default: all in one.
        layout: drawn over each.
        width: of one map, in inches.

    Raises:
        ValueError: no maps, or another number of titles than of maps.
    """
    if not len(maps) or len(maps) != len(titles):
        raise ValueError(f"{len(maps)} maps and {len(titles)} titles, but it should be one each")
    low, high = limits
    shades = [((each.float() - low) / (high - low)).clamp(0, 1).cpu().numpy() for each in maps]
    columns = columns or len(maps)
    rows = -(-len(maps) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, squeeze=False, figsize=(width * columns, (width + 0.3) * rows)
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, shade, title in zip(axes.flat, shades, titles, strict=False):
        frame(axis, pyplot.colormaps["cividis"](shade)[..., :3], title, layout=layout)
        axis.axis("on")
    return figure


def draw_lines(axis: Axes, x: Values, lines: dict[str, Values], **labels: object) -> None:
    """Lines over x, told apart by colour, dash and mark, with a legend.

    Args:
        lines: a name → its values, at most four.
        labels: of the axis, as `axis.set` takes them: title, xlabel, ylabel, yscale …

    Raises:
        ValueError: more than four lines.
    """
    if len(lines) > 4:
        raise ValueError(f"{len(lines)} lines, but only four can be told apart")
    styles = zip((ORANGE, BLUE, GREEN, GREY), ("-", "--", "-.", ":"), "osDv", strict=True)
    for (name, values), (colour, dash, mark) in zip(lines.items(), styles, strict=False):
        axis.plot(x, values, color=colour, linestyle=dash, marker=mark, label=_writable(name))
    axis.set(**labels)
    axis.legend(frameon=False, fontsize=8)


def draw_dots(axis: Axes, rows: dict[str, Values], **labels: object) -> None:
    """A row of dots under each name, from the top down, and a line at their mean.

    Args:
        rows: a name → its values.
        labels: of the axis, as `axis.set` takes them.
    """
    for row, values in enumerate(rows.values()):
        colour = (GREY, ORANGE, BLUE, GREEN)[row % 4]
        axis.scatter(values, [row] * len(values), color=colour, alpha=0.6, s=36)
        axis.plot([sum(values) / len(values)] * 2, [row - 0.32, row + 0.32], color=colour, lw=3)
    axis.set_yticks(range(len(rows)), [_writable(name) for name in rows])
    axis.invert_yaxis()
    axis.set(**labels)


# ------------------------------------------------------------------ in a notebook


def notebook_style() -> None:
    """Small figures without lost margins, for the pages of the course."""
    pyplot.rcParams.update(
        {"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.titlesize": 10}
    )


def show(picture: Figure | Image.Image | bytes, alt: str) -> None:
    """Show a figure (and close it), an image or the bytes of a PNG under the cell.

    Args:
        picture: a figure gets a white ground, readable on a dark page too. A picture with much
            noise is reduced to 256 colours, so that notebooks stay small.
        alt: what a screen reader reads aloud: what one would see.

    Raises:
        ValueError: alt is empty.
    """
    if not alt.strip():
        raise ValueError("alt is empty, but should say what the picture shows")
    png = picture if isinstance(picture, bytes) else _png_of(picture)
    if len(png) > 70_000 and b"acTL" not in png:  # acTL: an animation, which has its palette
        image = Image.open(io.BytesIO(png)).convert("RGB")
        png = _png_of(image.quantize(palette=_palette(image, 256), dither=Image.Dither.NONE))
    alt = _writable(alt)
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": alt}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)


def movie(
    pictures: Iterable[Figure | Image.Image], alt: str, *, frame: int = 120, hold: int = 2000
) -> None:
    """Show figures or images of one size one after the other, as one animated PNG.

    Args:
        pictures: at least two; figures are closed.
        alt: as for `show`.
        frame: milliseconds that each is seen.
        hold: the same for the first and the last.

    Raises:
        ValueError: fewer than two pictures, or of different sizes.
    """
    frames = [Image.open(io.BytesIO(_png_of(picture))).convert("RGB") for picture in pictures]
    if len(frames) < 2 or len({image.size for image in frames}) > 1:
        sizes = ", ".join(str(size) for size in dict.fromkeys(image.size for image in frames))
        raise ValueError(
            f"a film needs two or more pictures of one size, not {len(frames)} of {sizes or 'none'}"
        )
    sample = Image.new("RGB", (4 * frames[0].width, frames[0].height))
    for place, image in enumerate((frames[0], frames[0], frames[1], frames[-1])):
        sample.paste(image, (place * image.width, 0))
    palette = _palette(sample, 160)  # one for all frames
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in frames]
    times = [hold] + [frame] * (len(frames) - 2) + [hold]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], duration=times, loop=0)
    show(file.getvalue(), alt)


# ------------------------------------------------------------------ curves, sheets and the plane


def draw_curves(
    axis: Axes,
    curves: Mapping[str, tuple[Numbers, Numbers]],
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    log: str = "",
    ticks: Numbers | None = None,
) -> None:
    """Curves with points, each in a colour, dash and mark of its own; a legend names several.

    Args:
        curves: name → its x and y.
        log: which axes are logarithmic: "", "x", "y" or "xy".
        ticks: the only places marked along x, as plain numbers.

    Raises:
        ValueError: `log` names another axis, or there are more curves than ways to tell them apart.
    """
    if set(log) - set("xy"):
        raise ValueError(f"log is {log!r}, but should be '', 'x', 'y' or 'xy'")
    if len(curves) > len(CURVES):
        raise ValueError(f"{len(curves)} curves, but at most {len(CURVES)} can be told apart")
    for (name, (x, y)), (colour, line) in zip(curves.items(), CURVES, strict=False):
        axis.plot(x, y, line, color=colour, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(_writable(title), parse_math=False)
    for letter, scale in (("x", axis.set_xscale), ("y", axis.set_yscale)):
        if letter in log:
            scale("log")
    if ticks is not None:
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
    if len(curves) > 1:
        axis.legend(frameon=False, fontsize=8)


def draw_numbers(
    axis: Axes, numbers: Float[Tensor, "*shape"], *, reach: float, title: str = ""
) -> None:
    """A histogram of numbers between -reach and reach, and over it the bell of N(0, 1)."""
    at = torch.linspace(-reach, reach, 200)
    density = {"range": (-reach, reach), "density": True, "color": BLUE, "label": "latents"}
    axis.hist(numbers.flatten().numpy(), 60, **density)
    axis.plot(at, torch.exp(-(at**2) / 2) / math.sqrt(2 * math.pi), color=ORANGE, label="N(0, 1)")
    axis.set(xlim=(-reach, reach))
    axis.set_title(_writable(title), parse_math=False)


def draw_bells(
    axis: Axes,
    means: Float[Tensor, "count 2"],
    deviations: Float[Tensor, "count 2"] | None = None,
    *,
    colours: Sequence[str],
    reach: float,
    title: str = "",
) -> None:
    """Bells of the plane: a dot at the mean, an ellipse two deviations wide; dashed, N(0, 1)'s.

    Args:
        deviations: of each bell, along x and y; None for bare points.
        colours: one a bell.
        reach: the square ±reach is shown.
    """
    if deviations is not None:
        for mean, wide, colour in zip(means.tolist(), deviations.tolist(), colours, strict=True):
            size = {"width": 4 * wide[0], "height": 4 * wide[1]}
            axis.add_patch(Ellipse(mean, **size, facecolor=colour, alpha=0.35, edgecolor="black"))
    axis.scatter(*means.T, c=list(colours), s=12, edgecolors="black", linewidths=0.4, zorder=3)
    axis.add_patch(Ellipse((0, 0), 4, 4, fill=False, edgecolor=GREY, linestyle="--", zorder=4))
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")


def show_sheets(
    sheets: Mapping[str, Float[Tensor, "batch 3 height width"]], columns: int, *, width: float = 8.0
) -> Figure:
    """Sheets of images in [-1, 1] one below the other, each under its title.

    Args:
        sheets: title → images of one size, in full rows of `columns`.
        columns: images a row.
        width: of the figure, in inches.

    Raises:
        ValueError: no sheets, or one with fewer images than fill a row.
    """
    if not sheets:
        raise ValueError("there are no sheets to show")
    rows = [max(1, len(images) // columns) for images in sheets.values()]
    height = width / columns * sum(rows) + 0.35 * len(rows)
    figure, axes = pyplot.subplots(
        len(rows), squeeze=False, figsize=(width, height), height_ratios=rows, facecolor="white"
    )
    for axis, (title, images) in zip(axes.flat, sheets.items(), strict=True):
        draw_sheet(axis, images, columns, title)
    return figure


def draw_sheet(
    axis: Axes, images: Float[Tensor, "batch 3 height width"], columns: int, title: str = ""
) -> None:
    """Images in [-1, 1] edge to edge, in full rows of `columns`, as the pixels they are."""
    rows = len(images) // columns
    if not rows:
        raise ValueError(f"{len(images)} images do not fill a row of {columns}")
    sheet = images[: rows * columns].reshape(rows, columns, *images.shape[1:])
    sheet = sheet.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    axis.imshow(((sheet + 1) / 2).clamp(0, 1).cpu().numpy(), interpolation="nearest")
    axis.axis("off")
    axis.set_title(_writable(title), parse_math=False)


def draw_plane(
    axis: Axes,
    log_density: Callable[[Tensor], Tensor] | None = None,
    *,
    points: Float[Tensor, "count 2"] | None = None,
    paths: Float[Tensor, "times lines 2"] | None = None,
    field: Callable[[Tensor], Tensor] | None = None,
    colour: str | Sequence[str] = BLUE,
    title: str = "",
    limit: float = 3.0,
) -> None:
    """The square ±limit of the plane: a density in grey, and over it points, paths and arrows.

    Args:
        log_density: of points (count, 2); e^0.5 times its largest value would be black.
        points: a dot each.
        paths: a line each, from a white dot to a dot of its colour.
        field: at points (count, 2) the arrows that begin there; the longest spans a mesh.
        colour: of the points and paths; a sequence has one for each of them.
    """
    if log_density is not None:
        line = torch.linspace(-limit, limit, 120)
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
        density = log_density(grid.flatten(0, 1)).exp().view(120, 120)
        extent = (-limit, limit, -limit, limit)
        most = 1.65 * density.max().item()
        axis.imshow(density, cmap="Greys", vmin=0, vmax=most, origin="lower", extent=extent)
    if field is not None:
        mesh = torch.linspace(-limit, limit, 16)[1:-1]
        at = torch.cartesian_prod(mesh, mesh)
        arrows = field(at)
        scale = float(arrows.norm(dim=1).max() / (mesh[1] - mesh[0]))
        axis.quiver(*at.T, *arrows.T, angles="xy", scale_units="xy", scale=scale, color=ORANGE)
    if points is not None:
        axis.scatter(*points.T, s=3, color=colour, linewidths=0)
    if paths is not None:
        each = [colour] * paths.shape[1] if isinstance(colour, str) else colour
        for path, ink in zip(paths.unbind(1), each, strict=True):
            axis.plot(*path.T, color=ink, linewidth=0.9, alpha=0.8)
        axis.scatter(*paths[0].T, s=18, facecolor="white", edgecolor="black", zorder=3)
        axis.scatter(*paths[-1].T, s=18, facecolor=each, edgecolor="black", zorder=3)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axis.set_title(_writable(title), parse_math=False)


# ------------------------------------------------------------------ a diagram

_FIXED, _LEARNED, _DATA = "#d9d9d9", "#f5c99b", "white"
_AREAS = (  # left edge, width, colour, title
    (0.0, 4.1, "#f3ece4", "pixels: 3 × 128 × 128"),
    (4.3, 9.0, "#e8f0f6", "latents: 4 × 16 × 16"),
    (13.5, 3.3, "#eaf3ee", "condition: 24 tokens"),
)
_BLOCKS = (  # text, left edge, width, middle, height at the left and at the right, colour
    ("$x$", 0.3, 1.1, 5.2, 1.2, 1.2, _DATA),
    (r"$\mathcal{E}$", 2.1, 1.6, 5.2, 1.6, 0.8, _FIXED),
    ("$z$", 4.7, 0.9, 5.2, 0.8, 0.8, _DATA),
    ("$z_T$", 11.9, 0.9, 5.2, 0.8, 0.8, _DATA),
    ("$z_t$", 11.9, 0.9, 2.2, 0.8, 0.8, _DATA),
    ("", 7.4, 1.8, 2.2, 2.6, 1.2, _LEARNED),
    ("", 9.2, 1.8, 2.2, 1.2, 2.6, _LEARNED),
    ("$z$", 4.7, 0.9, 2.2, 0.8, 0.8, _DATA),
    (r"$\mathcal{D}$", 2.1, 1.6, 2.2, 1.6, 0.8, _FIXED),
    (r"$\tilde{x}$", 0.3, 1.1, 2.2, 1.2, 1.2, _DATA),
    ("“a red car\nat night”", 14.0, 2.3, 5.45, 0.9, 0.9, _DATA),
    ("tokenizer", 14.0, 2.3, 3.75, 0.9, 0.9, _FIXED),
    (r"text encoder $\tau$", 14.0, 2.3, 2.25, 0.9, 0.9, _FIXED),
)
_ARROWS = (  # from x, y to x, y
    (1.4, 5.2, 2.1, 5.2),
    (3.7, 5.2, 4.7, 5.2),
    (5.6, 5.2, 11.9, 5.2),
    (12.35, 4.8, 12.35, 2.6),
    (11.9, 2.2, 11.0, 2.2),
    (7.4, 2.2, 5.6, 2.2),
    (4.7, 2.2, 3.7, 2.2),
    (2.1, 2.2, 1.4, 2.2),
    (15.15, 5.0, 15.15, 4.2),
    (15.15, 3.3, 15.15, 2.7),
    (11.9, 4.2, 12.35, 4.2),
)
_WORDS = (  # text, x, y, colour
    ("× scaling\nfactor", 4.2, 5.4, "black"),
    ("÷ scaling\nfactor", 4.2, 2.4, "black"),
    ("forward: noise, a fixed formula (scheduler)", 8.75, 5.35, "black"),
    ("again, until t = 0", 9.2, 4.28, "black"),
    (r"U-Net  $\varepsilon_\theta(z_t, t, \tau(y))$", 9.2, 3.6, "black"),
    ("a little\nless noise", 6.5, 1.1, "black"),
    ("$y$", 15.5, 4.45, "black"),
    ("cross-attention: Q from the latents, K and V from the text", 9.2, 0.15, BLUE),
)


def diagram_of_latent_diffusion() -> Figure:
    """The parts of Stable Diffusion and what goes from one to the next (LDM, Fig. 3).

    Grey parts are frozen while the orange one, the U-Net, learns.
    """
    figure, axis = pyplot.subplots(figsize=(10, 4.3), facecolor="white")
    for x, width, colour, title in _AREAS:
        style = "round,pad=0,rounding_size=0.25"
        axis.add_patch(FancyBboxPatch((x, 0), width, 7.4, style, facecolor=colour, linewidth=0))
        axis.text(x + width / 2, 6.85, title, ha="center", fontsize=10)
    for text, x, width, y, left, right, colour in _BLOCKS:
        sides = [(x, y - left / 2), (x + width, y - right / 2)]
        sides += [(x + width, y + right / 2), (x, y + left / 2)]
        axis.add_patch(Polygon(sides, facecolor=colour, edgecolor="black", linewidth=1.2))
        size = 9.5 if len(text) > 15 else 11
        axis.text(x + width / 2, y, text, ha="center", va="center", fontsize=size)
    arrow = {"arrowstyle": "-|>", "lw": 1.5, "color": "black", "shrinkA": 0, "shrinkB": 0}
    for x0, y0, x1, y1 in _ARROWS:
        axis.annotate("", xy=(x1, y1), xytext=(x0, y0), arrowprops=arrow)
    for text, x, y, colour in _WORDS:
        axis.text(x, y, text, ha="center", va="bottom", fontsize=8.5, color=colour)
    for x in (7.75, 8.5, 9.9, 10.65):  # the layers with cross-attention
        axis.plot([x, x], [1.45, 2.95], color=BLUE, linewidth=5, solid_capstyle="butt")
        axis.plot([x, x], [0.65, 1.45], color=BLUE, linewidth=1.5)
    axis.plot([15.15, 15.15, 7.75], [1.8, 0.65, 0.65], color=BLUE, linewidth=1.5)
    axis.plot([6.6, 6.6, 11.9], [2.2, 4.2, 4.2], color="black", linewidth=1.5, linestyle="--")
    axis.set(xlim=(-0.1, 16.9), ylim=(-0.1, 7.5))
    axis.axis("off")
    axis.set_title("Only the orange part learns here; the noise lives in the small space")
    return figure


# ------------------------------------------------------------------ figures with boxes and numbers


def show_boxes(
    pictures: Sequence[Picture],
    layouts: Layout | Sequence[Layout],
    titles: Sequence[str] | None = None,
    below: Sequence[str] | None = None,
    *,
    found: Sequence[Sequence[Box | None]] | None = None,
    suptitle: str = "",
    width: float = 2.25,
) -> Figure:
    """The pictures in a row, each with the boxes of its layout and, dotted, those that were found.

    Args:
        pictures: at least one.
        layouts: one for all of them, or one a picture.
        titles: one a picture.
        below: likewise: what is written below it.
        found: for each picture a box a layer, None where nothing was found.
        suptitle: above everything.
        width: of a picture, in inches.

    Raises:
        ValueError: no pictures, or another number of something else than of pictures.
    """
    count = len(pictures)
    if not count:
        raise ValueError("there are no pictures to show")
    rows = {
        "layouts": [layouts] * count if isinstance(layouts, Layout) else layouts,
        "titles": titles or [""] * count,
        "texts below": below or [""] * count,
        "lists of boxes": found or [()] * count,
    }
    for what, row in rows.items():
        if len(row) != count:
            raise ValueError(f"{count} pictures, but {len(row)} {what}")
    lines = 1 + max(text.count("\n") for text in rows["texts below"])
    size = (width * count, width + 0.2 * (lines + 1) + (0.3 if suptitle else 0))
    figure, axes = pyplot.subplots(1, count, figsize=size, squeeze=False)
    for axis, picture, layout, title, text, boxes in zip(
        axes.flat, pictures, *rows.values(), strict=True
    ):
        frame(axis, picture, title, text, layout)
        for x0, y0, x1, y1 in filter(None, boxes):
            for colour, edge in (("black", 3.2), ("white", 1.8)):
                corner, size = (x0, y0), (x1 - x0, y1 - y0)
                dots = {"fill": False, "edgecolor": colour, "lw": edge, "ls": ":"}
                axis.add_patch(Rectangle(corner, *size, **dots))
    figure.suptitle(suptitle, fontsize=10, parse_math=False)
    return figure


def draw_table(
    axis: Axes,
    values: Sequence[Sequence[float]] | Float[Tensor, "rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    *,
    texts: Sequence[Sequence[str]] | None = None,
    ends: tuple[float, float] | None = None,
) -> None:
    """A cell for each number, coloured by it and with the number in it, under its names.

    Args:
        axis: what it is drawn on.
        values: a row a row of the table.
        rows, columns: their names.
        title: what the table says.
        texts: what is written into the cells; default: the values with two decimals.
        ends: what is darkest and what is lightest; default: the least and the largest value.
    """
    numbers = numpy.array([[float(value) for value in row] for row in values])
    low, high = ends or (numbers.min(), numbers.max())
    axis.imshow(numbers, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in numpy.ndenumerate(numbers):
        text = f"{value:.2f}" if texts is None else texts[row][column]
        ink = "black" if value >= (low + high) / 2 else "white"
        axis.text(column, row, text, color=ink, ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(columns)), columns, fontsize=9)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(_writable(title), parse_math=False)


def show_scored(
    pictures: Sequence[Picture],
    layout: Layout,
    values: Sequence[Sequence[float]] | Float[Tensor, "pictures columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None,
    *,
    suptitle: str = "",
) -> Figure:
    """A row a picture: the picture with the boxes of the layout, and its numbers as `draw_table`.

    The numbers are 0 (dark) to 1 (light).

    Raises:
        ValueError: another number of rows than of pictures.
    """
    count = len(pictures)
    if not count or len(rows) != count:
        raise ValueError(f"{count} pictures, but {len(rows)} names of rows")
    figure = pyplot.figure(figsize=(7.4, 0.8 + 0.83 * count), layout="none")
    edges = {"left": 0.02, "right": 0.99, "top": 1 - 0.9 / (1 + count), "bottom": 0.02}
    grid = figure.add_gridspec(count, 2, width_ratios=(1, 6.2), hspace=0.06, wspace=0.32, **edges)
    for row, picture in enumerate(pictures):
        frame(figure.add_subplot(grid[row, 0]), picture, layout=layout)
    axis = figure.add_subplot(grid[:, 1])
    draw_table(axis, values, rows, columns, texts=texts, ends=(0.0, 1.0))
    axis.xaxis.tick_top()
    for row in range(1, count):
        axis.axhline(row - 0.5, color="white", lw=3)
    figure.suptitle(suptitle, fontsize=11)
    return figure


def show_paired(
    values: Mapping[str, Sequence[float]], *, title: str, xlabel: str, ylabel: str
) -> Figure:
    """Two rows of points, those of a pair joined by a line, and the two means as dashed lines.

    Args:
        values: what is compared: two names, each with as many numbers (from 0 to 1).
        title, xlabel, ylabel: what the figure says, what a pair is, what the numbers are.

    Raises:
        ValueError: not two names, or another number of numbers.
    """
    counts = [len(numbers) for numbers in values.values()]
    if len(counts) != 2 or counts[0] != counts[1]:
        raise ValueError(
            f"{counts} numbers of {', '.join(values)}, but two equal counts are paired"
        )
    figure, axis = pyplot.subplots(figsize=(7.4, 2.9))
    colours = (BLUE, ORANGE)
    for (name, numbers), colour, shift in zip(values.items(), colours, (-0.1, 0.1), strict=True):
        axis.plot([n + shift for n in range(counts[0])], numbers, "o", color=colour, label=name)
        axis.axhline(sum(map(float, numbers)) / counts[0], color=colour, lw=1, ls="--")
    for number, pair in enumerate(zip(*values.values(), strict=True)):
        axis.plot((number - 0.1, number + 0.1), pair, color=GREY, lw=0.8, zorder=0)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(-0.03, 1), xticks=range(counts[0]))
    axis.legend(fontsize=8, loc="upper right")
    return figure


def show_histograms(
    samples: Mapping[str, Sequence[float] | Float[Tensor, "samples"]],
    *,
    title: str,
    xlabel: str,
    interval: tuple[float, float] | None = None,
) -> Figure:
    """Histograms on one axis, each as high as its own highest bin: where numbers lie, how wide.

    Args:
        samples: name → numbers.
        title, xlabel: what the figure says, what the numbers are.
        interval: a part of the axis to shade.
    """
    figure, axis = pyplot.subplots(figsize=(6.6, 2.8))
    numbers = {name: numpy.asarray(sample) for name, sample in samples.items()}
    ends = min(map(numpy.min, numbers.values())), max(map(numpy.max, numbers.values()))
    for (name, sample), colour in zip(numbers.items(), cycle((GREY, BLUE)), strict=False):
        counts, edges = numpy.histogram(sample, bins=60, range=ends)
        axis.stairs(counts / counts.max(), edges, fill=True, color=colour, alpha=0.6, label=name)
    if interval:
        axis.axvspan(*interval, color=BLUE, alpha=0.15, lw=0)
    axis.set(title=title, xlabel=xlabel, ylabel="share of the highest bin")
    axis.legend(fontsize=8)
    return figure


# ------------------------------------------------------------------ parts of these


def _writable(text: str) -> str:
    """`text` with "?" for lone surrogates, which no font and no encoding has."""
    return text.encode("utf-8", "replace").decode()


def _palette(image: Image.Image, colours: int) -> Image.Image:
    """The colours that suit an image best, found in every third pixel each way.

    In all pixels k-means takes ten times as long, for a mean error that is 5 % smaller.
    """
    size = (max(1, image.width // 3), max(1, image.height // 3))
    return image.resize(size, Image.Resampling.NEAREST).quantize(colours, kmeans=2)


def _png_of(picture: Figure | Image.Image) -> bytes:
    if isinstance(picture, Image.Image):
        return png_of(picture, optimize=True)
    file = io.BytesIO()
    picture.savefig(file, facecolor="white", pil_kwargs={"optimize": True})
    pyplot.close(picture)
    return file.getvalue()


def _enlarged(picture: Image.Image, longest_side: int) -> Image.Image:
    scale = longest_side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _pixel_box(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    width, height = size
    x0, y0, x1, y1 = box
    left, top = min(int(x0 * width), width - 1), min(int(y0 * height), height - 1)
    return left, top, max(left, round(x1 * width) - 1), max(top, round(y1 * height) - 1)


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib's own DejaVu: there on every machine, with far more letters than Pillow's.
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return ImageFont.truetype(str(file), size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` broken into lines of at most `width` pixels, within a word only where it must be."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines)


def _text_size(text: str, font: ImageFont.FreeTypeFont, pad: int) -> tuple[int, int]:
    """Width and height in pixels of a tag with `text` in it."""
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    _, _, right, bottom = draw.multiline_textbbox((0, 0), text, font=font)
    return round(right) + 4 * pad, round(bottom) + 2 * pad + 1


def _free_place(
    box: tuple[int, int, int, int],
    tag: tuple[int, int],
    canvas: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Where the tag goes: inside the canvas, best above its box, covering no earlier tag."""
    left, top, right, bottom = box
    width, height = tag
    tops = (top - height, bottom + 1, top, bottom - height, *range(0, canvas[1], height))
    places = []
    for y in tops:
        for x in (left, right - width + 1):
            x0 = max(0, min(x, canvas[0] - width))
            y0 = max(0, min(y, canvas[1] - height))
            places.append((x0, y0, x0 + width - 1, y0 + height - 1))
    wanted = [
        place
        for place, y in zip(places, (y for y in tops for _ in range(2)), strict=True)
        if place[1] == y
    ]  # not one that had to be pushed back onto the canvas
    for place in wanted + places:
        if not any(
            place[0] <= other[2]
            and other[0] <= place[2]
            and place[1] <= other[3]
            and other[1] <= place[3]
            for other in taken
        ):
            return place
    return (wanted + places)[0]


def ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on `colour` (by WCAG's contrast ratio)."""
    channels = [value / 255 for value in ImageColor.getrgb(colour)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#ffffff"
