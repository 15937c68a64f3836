"""Draws the pictures in figures/.

    python benchmarks/figures.py [NAME ...]

The world's contact sheet, samples, the demo and the methods are drawn here; the others are taken
out of the notebooks as they were last executed.
"""

import argparse
import base64
import io
import json
import textwrap
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from lrd_helpers.files import write_atomically
from lrd_helpers.layout import Layout
from lrd_helpers.methods import METHODS, LayeredRendering
from lrd_helpers.models import load_pipeline
from lrd_helpers.pictures import picture_of, png_of
from lrd_helpers.plotting import BOX_COLOURS, on_checks, side_by_side
from lrd_helpers.storybook import (
    COLOURS,
    PLACES,
    STICKERS,
    STYLES,
    PlacedSticker,
    Scene,
    aspect_ratio,
    caption_of,
    render_scenes,
    sample_layout,
    sample_scene,
    seeded,
)
from lrd_helpers.training.loop import HELD_OUT_SEED

REPOSITORY = Path(__file__).parents[1]
FIGURES = REPOSITORY / "figures"
INK, PAPER = "#202020", "#ffffff"
NOTEBOOKS = {
    "style": ("04b_style", "styles-figure"),
    "collage": ("08_layered_rendering", "sketches-figure"),
    "gallery": ("08_layered_rendering", "gallery-figure"),
    "gallery-collage": ("08_layered_rendering", "collage-gallery"),
    "editing": ("10_editing", "edits-figure"),
}
"""Figures that are the picture below a notebook's cell: notebook and the cell's id."""


def contact_sheet(cell: int = 40, margin: int = 76) -> Image.Image:
    """Every sticker and style (rows) in every place and colour (columns)."""
    sheet = Image.new(
        "RGB",
        (margin + cell * len(PLACES) * len(COLOURS), 24 + cell * len(STYLES) * len(STICKERS)),
        PAPER,
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, place in enumerate(PLACES):
        draw.text((margin + cell * len(COLOURS) * (column + 0.5), 12), place, INK, font, "mm")
    for block, style in enumerate(STYLES):
        for row, sticker in enumerate(STICKERS):
            top = 24 + cell * (block * len(STICKERS) + row)
            draw.text((4, top + cell / 2), f"{sticker}", INK, font, "lm")
            aspect = aspect_ratio(sticker)
            size = (0.8 * min(1, aspect), 0.8 * min(1, 1 / aspect))
            scenes = [
                Scene(place, (PlacedSticker(sticker, colour, (0.5, 0.5), size),), "", style=style)
                for place in PLACES
                for colour in COLOURS
            ]
            for column, image in enumerate(render_scenes(scenes, 2 * cell).images):
                picture = picture_of(image).resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(picture, (margin + cell * column, top))
    return sheet


def samples(pipe, count: int = 64, columns: int = 8) -> Image.Image:
    """What the model draws for random captions: the first that come, none left out."""
    captions = [sample_scene(seeded(HELD_OUT_SEED, 4, i)).caption for i in range(count)]
    plain = StableDiffusionPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    images = []
    for first in tqdm(range(0, count, 16), desc="samples"):
        images += plain(
            captions[first : first + 16],
            num_inference_steps=25,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(first),
        ).images
    width, height, font = 150, 176, ImageFont.load_default(10)
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * width, i // columns * height
        sheet.paste(image, (left + 11, top + 4))
        text = "\n".join(textwrap.wrap(caption, 27)[:3])
        draw.multiline_text((left + width / 2, top + 136), text, INK, font, "ma", align="center")
    return sheet


def demo(pipe) -> Image.Image:
    """Four example layouts, each as it came from seed 0, with its boxes beside it."""
    names = ("2_side_by_side", "3_two_colours_of_one_sticker", "5_four_objects", "6_unusual_place")
    panels = []
    for name in tqdm(names, desc="demo"):
        layout = Layout.load(REPOSITORY / "examples" / f"{name}.json")
        picture = pipe(layout, generator=torch.Generator().manual_seed(0)).images[0]
        panels.append(side_by_side(picture, layout))
    width, height = (max(getattr(panel, side) for panel in panels) for side in ("width", "height"))
    sheet = Image.new("RGB", (2 * width + 12, 2 * height + 12), PAPER)
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % 2 * (width + 12), i // 2 * (height + 12)))
    return sheet


def methods(pipe, count: int = 24, cell: int = 112) -> Image.Image:
    """24 random layouts by the plain caption, the collage and LRDiff's versions, from one noise."""
    names = {"plain caption": "plain"} | {
        name: name for name, method in METHODS.items() if isinstance(method, LayeredRendering)
    }
    layouts = [
        sample_layout(seeded(HELD_OUT_SEED, 6, number), sticker_count=1 + number % 3)
        for number in range(count)
    ]
    columns = {}
    for name, method in tqdm(names.items(), desc="methods"):
        columns[name] = []
        for first in range(0, count, 8):
            generators = [seeded(0, 5, first + number) for number in range(8)]
            batch = layouts[first : first + 8]
            columns[name] += pipe(batch, method=method, generator=generators).images
    half = -(-count // 2)
    block = cell * len(names) + 12
    sheet = Image.new("RGB", (2 * block, 24 + half * (cell + 20)), PAPER)
    draw, font, small = (
        ImageDraw.Draw(sheet),
        ImageFont.load_default(13),
        ImageFont.load_default(10),
    )
    for side in range(2):
        for column, name in enumerate(names):
            draw.text((side * block + cell * (column + 0.5), 12), name, INK, font, "mm")
    for number, layout in enumerate(layouts):
        left, top = number // half * block, 24 + number % half * (cell + 20)
        for column, name in enumerate(names):
            picture = columns[name][number].resize((cell - 4, cell - 4), Image.Resampling.LANCZOS)
            boxes = ImageDraw.Draw(picture)
            for layer, colour in zip(layout.layers, BOX_COLOURS, strict=False):
                corners = [round(value * (cell - 5)) for value in layer.bounding_box]
                boxes.rectangle(corners, outline=INK, width=3)
                boxes.rectangle(
                    [value + sign for value, sign in zip(corners, (1, 1, -1, -1), strict=True)],
                    outline=colour,
                )
            sheet.paste(picture, (left + cell * column + 2, top))
        draw.text((left + 4, top + cell), layout.caption, INK, small)
    return sheet


def layers(_, count: int = 12, cell: int = 112) -> Image.Image:
    """Twelve stacks of two layers taken apart: background, layers, flattened, composite."""
    pipe = load_pipeline("storybook-layers", "cpu")
    pipe.set_progress_bar_config(disable=True)
    half, block = -(-count // 2), 5 * cell + 12
    sheet = Image.new("RGB", (2 * block, 24 + half * (cell + 20)), PAPER)
    draw, font, small = (
        ImageDraw.Draw(sheet),
        ImageFont.load_default(13),
        ImageFont.load_default(10),
    )
    names = ("background", "layer 1", "layer 2", "laid over", "composite")
    for side in range(2):
        for column, name in enumerate(names):
            draw.text((side * block + cell * (column + 0.5), 12), name, INK, font, "mm")
    for number in tqdm(range(count), desc="layers"):
        scene = sample_scene(seeded(HELD_OUT_SEED, 11, number), sticker_count=2)
        prompts = [caption_of((each,), scene.place, name_place=False) for each in scene.stickers]
        stack = pipe(
            caption_of(scene.stickers, scene.place),
            layers=prompts,
            background=scene.place,
            generator=seeded(0, 11, number),
        ).stacks[0]
        shown = [stack.background, *map(on_checks, stack.layers), stack.flatten(), stack.composite]
        left, top = number // half * block, 24 + number % half * (cell + 20)
        for column, picture in enumerate(shown):
            small_one = picture.resize((cell - 4, cell - 4), Image.Resampling.LANCZOS)
            sheet.paste(small_one, (left + cell * column + 2, top))
        draw.text((left + 4, top + cell), stack.caption, INK, small)
    return sheet


def layers_edited(_, cell: int = 192) -> Image.Image:
    """A stack, and what can be done to it with no new drawing but the last two."""
    pipe = load_pipeline("storybook-layers", "cpu")
    pipe.set_progress_bar_config(disable=True)
    house, car = "a blue house", "a red car"
    stack = pipe(
        f"{house} and {car} on grass",
        layers=[house, car],
        background="on grass",
        generator=seeded(0, 12, 0),
    ).stacks[0]
    again = pipe.redraw(stack, car, "a purple boat", generator=seeded(0, 12, 1))
    moved = stack.moved(car, (0.05, -0.35))
    shown = {
        "as drawn": stack.flatten(),
        "the car moved": moved.flatten(),
        "and behind the house": moved.restacked([car, house]).flatten(),
        "the house hidden": stack.changed(house, hidden=True).flatten(),
        "the car in yellow": stack.recoloured(car, "gold").flatten(),
        "its layer drawn anew: a boat": again.flatten(),
    }
    sheet = Image.new("RGB", (3 * cell, 2 * (cell + 22)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (name, picture) in enumerate(shown.items()):
        left, top = number % 3 * cell, number // 3 * (cell + 22)
        sheet.paste(picture.resize((cell - 4, cell - 4), Image.Resampling.LANCZOS), (left + 2, top))
        draw.text((left + cell / 2, top + cell + 8), name, INK, font, "mm")
    return sheet


def below_cell(notebook: str, cell_id: str) -> bytes:
    """The first picture (PNG) that a cell of an executed notebook shows."""
    path = REPOSITORY / "notebooks" / f"{notebook}.ipynb"
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []) if cell["id"] == cell_id else []:
            if "image/png" in output.get("data", {}):
                return base64.b64decode(output["data"]["image/png"])
    raise ValueError(f"{path.name} has no cell {cell_id!r} with a picture below it; execute it")


def chapter_picture(path: Path, width: int = 280) -> bytes:
    """The picture in a notebook's title, small, as PNG."""
    title = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    [picture] = title["attachments"].values()
    image = Image.open(io.BytesIO(base64.b64decode(picture["image/png"]))).convert("RGB")
    image.thumbnail((width, width), Image.Resampling.LANCZOS)
    return png_of(image.quantize(256), optimize=True)


def chapters() -> None:
    """The picture of each notebook into figures/chapters/."""
    folder = FIGURES / "chapters"
    folder.mkdir(exist_ok=True)
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        write_atomically(folder / f"{path.stem}.png", chapter_picture(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ours = {
        "contact-sheet": lambda _: contact_sheet(),
        "samples-64": samples,
        "demo": demo,
        "methods": methods,
        "layers": layers,
        "layers-edited": layers_edited,
    }
    there = [*ours, *NOTEBOOKS, "chapters"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(there)} (all)")
    names = parser.parse_args().names or there
    for name in names:
        if name not in there:
            parser.error(f"there is no figure {name!r}; there are {', '.join(there)}")
    FIGURES.mkdir(exist_ok=True)
    pipe = None
    if any(name in ours for name in names):
        pipe = load_pipeline("storybook", "cpu")
        pipe.set_progress_bar_config(disable=True)
    for name in names:
        path = FIGURES / f"{name}.png"
        if name in NOTEBOOKS:
            write_atomically(path, below_cell(*NOTEBOOKS[name]))
            continue
        if name == "chapters":
            chapters()
            continue
        image = ours[name](pipe)
        if name in ("contact-sheet", "methods", "layers"):
            # 256 colours are enough for flat drawings, and a third of the size.
            image = image.quantize(256)
        write_atomically(path, png_of(image, optimize=True))


if __name__ == "__main__":
    main()
