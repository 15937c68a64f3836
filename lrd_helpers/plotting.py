"""Pictures for people: rows of images, layouts drawn over them, stacks taken apart, figures, films.

A layer has the same number wherever it is drawn. Its colour here is that of its number; the editor
and the studio draw it in the colour that it names (`layer_colours` of widgets/box_editor.py).
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from IPython.display import display
from jaxtyping import Float
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from lrd_helpers.layout import Layout
from lrd_helpers.pictures import Picture, picture_of, png_of

if TYPE_CHECKING:
    from lrd_helpers.layerdiff.stack import LayerStack, StackLayer

BOX_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
"""Okabe and Ito (2008): told apart with any kind of colour vision; an eighth layer starts again."""

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7f7f7f"
"""For lines and points: from the same set, and a grey."""

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
