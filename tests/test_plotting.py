"""lrd_helpers.plotting: what is drawn is where it should be, and nothing is cut off."""

import base64
import io
from typing import Any

import numpy
import pytest
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import RendererAgg
from PIL import Image, ImageColor, ImageFont

from lrd_helpers import plotting
from lrd_helpers.layerdiff.stack import LayerStack, StackLayer
from lrd_helpers.layout import Layer, Layout

GREY = Image.new("RGB", (128, 128), (128, 128, 128))
LAYOUT = Layout(
    caption="a red car and a yellow star at night",
    layers=[
        Layer("a red car", box=(0.05, 0.55, 0.50, 0.95)),
        Layer("a yellow star", box=(0.60, 0.25, 0.95, 0.60)),
    ],
)


def colour_at(image: Image.Image, x: float, y: float) -> tuple[int, int, int]:
    return image.getpixel((round(x), round(y)))


def test_each_box_is_drawn_at_its_place_in_its_colour():
    drawn = plotting.draw_layout(GREY, LAYOUT, longest_side=512)
    assert drawn.size == (512, 512)
    for number, layer in enumerate(LAYOUT.layers):
        x0, _, x1, y1 = (512 * value for value in layer.box)
        colour = ImageColor.getrgb(plotting.BOX_COLOURS[number])
        middle = 512 * (layer.box[1] + layer.box[3]) / 2
        assert colour_at(drawn, x0 + 3, middle) == colour  # left line
        assert colour_at(drawn, x1 - 4, middle) == colour  # right line
        assert colour_at(drawn, (x0 + x1) / 2, y1 - 4) == colour
        assert colour_at(drawn, (x0 + x1) / 2, middle) == (128, 128, 128)  # open inside
        assert colour_at(drawn, x0 - 4, middle) == (128, 128, 128)


def test_a_mask_is_drawn_as_its_outline():
    ring = numpy.ones((8, 8), bool)
    ring[2:6, 2:6] = False
    layout = Layout("c", layers=[Layer("a ring", mask=ring), LAYOUT.layers[0]])
    plain = Image.new("RGB", (64, 32), "white")
    drawn = plotting.draw_layout(plain, layout, longest_side=256)
    assert drawn.size == (256, 128)
    # The hole of the ring (a quarter to three quarters) has a rim, its middle is untouched.
    assert drawn.getpixel((150, 50)) == (255, 255, 255)
    assert any(drawn.getpixel((x, 50)) != (255, 255, 255) for x in range(186, 198))


def test_the_picture_given_is_not_drawn_upon():
    image = GREY.resize((512, 512))
    plotting.draw_layout(image, LAYOUT)
    assert image.getcolors() == [(512 * 512, (128, 128, 128))]


def test_sides_keep_their_ratio():
    assert plotting.draw_layout(Image.new("RGB", (192, 96)), LAYOUT, longest_side=384).size == (
        384,
        192,
    )


BORDER_BOXES = [
    (0, 0, 1, 1),
    (0, 0, 0.02, 0.02),
    (0.98, 0, 1, 0.02),
    (0, 0.98, 0.02, 1),
    (0.98, 0.98, 1, 1),
    (0, 0.5, 1, 0.501),
    (0.999, 0.4, 1, 0.6),
]
PROMPTS = ["a cat", "a very long prompt about a boat " * 6, "Donaudampfschifffahrt" * 8]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "long", "one word"])
@pytest.mark.parametrize("box", BORDER_BOXES)
def test_a_label_is_never_cut_off(box, prompt, monkeypatch):
    labels = []

    def recorded(draw, xy, text, font, **options):
        labels.append((draw.multiline_textbbox(xy, text, font=font), text))

    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.multiline_text", recorded)
    plotting.draw_layout(GREY, Layout(caption="x", layers=[Layer(prompt, box=box)]))
    [(drawn, text)] = labels
    assert drawn[0] >= 0
    assert drawn[1] >= 0
    assert drawn[2] <= 512
    assert drawn[3] <= 512
    assert "".join(text.split()) == "1" + "".join(prompt.split())


@pytest.mark.parametrize(
    ("opacity", "label"), [(1, "2 a car"), (0.5, "2 a car 50 %"), (0, "2 a car 0 %")]
)
def test_an_opacity_is_a_part_of_the_label(opacity, label, monkeypatch):
    written = []
    monkeypatch.setattr(plotting, "_fitted", lambda text, *rest: written.append(text) or text)
    layers = [LAYOUT.layers[0], Layer("a car", (0, 0, 1, 1), opacity=opacity)]
    plotting.draw_layout(GREY, Layout("c", layers=layers))
    assert written[1] == label


def test_labels_of_neighbours_do_not_cover_each_other():
    taken = []
    for _ in range(10):  # ten times the same box
        taken.append(plotting._free_place((100, 100, 200, 200), (120, 20), (512, 512), taken))
    for number, a in enumerate(taken):
        for b in taken[:number]:
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_labels_stay_on_the_canvas_when_there_is_no_room_left():
    taken = [(0, 0, 511, 511)]
    x0, y0, x1, y1 = plotting._free_place((500, 0, 511, 10), (120, 20), (512, 512), taken)
    assert x0 >= 0
    assert y0 >= 0
    assert x1 < 512
    assert y1 < 512


@pytest.mark.parametrize("colour", plotting.BOX_COLOURS)
def test_labels_can_be_read(colour):
    def luminance(text):
        linear = [
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
            for v in (c / 255 for c in ImageColor.getrgb(text))
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted([luminance(colour), luminance(plotting.ink_on(colour))], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA


def test_side_by_side_has_the_plain_picture_the_boxes_and_the_caption():
    sheet = plotting.side_by_side(GREY, LAYOUT, longest_side=256)
    bare = plotting.side_by_side(GREY, LAYOUT, longest_side=256, caption="")
    assert sheet.width == bare.width > 512
    assert sheet.height > bare.height
    gap = (bare.width - 512) // 3
    left = sheet.crop((gap, gap, gap + 256, gap + 256))
    assert left.getcolors() == [(256 * 256, (128, 128, 128))]
    right = sheet.crop((2 * gap + 256, gap, 2 * gap + 512, gap + 256))
    boxes = plotting.draw_layout(GREY, LAYOUT, longest_side=256)
    assert right.tobytes() == boxes.tobytes()
    below = numpy.asarray(sheet.crop((0, bare.height, sheet.width, sheet.height)))
    assert (below < 100).any()  # letters
    assert (below[:, :gap] == 255).all()  # and none at the edges
    assert (below[-2:] == 255).all()


def test_a_long_caption_is_broken_into_lines():
    font = plotting._font(20)
    assert isinstance(font, ImageFont.FreeTypeFont)
    text = "word " * 50
    lines = plotting._fitted(text, font, 300).split("\n")
    assert " ".join(lines) == text.strip()
    assert max(map(font.getlength, lines)) <= 300


def test_show_images_lays_out_rows_and_titles():
    mixed = [GREY, torch.rand(3, 8, 6), torch.rand(3, 4, 4), numpy.zeros((9, 5, 3)), GREY]
    figure = plotting.show_images(mixed, list("abcde"), columns=3, suptitle="five")
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in shown] == list("abcde")
    assert len(figure.axes) == 6
    assert figure._suptitle.get_text() == "five"
    pyplot.close(figure)


def test_long_titles_of_neighbours_do_not_overlap():
    title = "a red house and a purple tree and an orange flower at night"
    figure = plotting.show_images([GREY] * 3, [title] * 3)
    figure.canvas.draw()
    extents = [axis.title.get_window_extent() for axis in figure.axes]
    for left, right in zip(extents, extents[1:], strict=False):
        assert left.x1 <= right.x0
    assert max(extent.y1 for extent in extents) <= figure.bbox.y1
    pyplot.close(figure)


@pytest.mark.parametrize(
    ("title", "written"),
    [
        ("$5 or $10", "$5 or $10"),
        ("$\\frac$", "$\\frac$"),
        ("50 \\$", "50 \\$"),
        ("a\ud800b", "a?b"),
    ],
)
def test_titles_are_no_formulas(title, written, monkeypatch, displayed):
    drawn = []
    draw_text = RendererAgg.draw_text

    def noting(renderer, context, x, y, text, *others, ismath=False, **options):
        drawn.append((text, ismath))
        draw_text(renderer, context, x, y, text, *others, ismath=ismath, **options)

    monkeypatch.setattr(RendererAgg, "draw_text", noting)
    figure = plotting.show_images([GREY], [title], suptitle=title)
    plotting.draw_sheet(figure.add_subplot(), torch.zeros(1, 3, 4, 4), 1, title)
    plotting.show(figure, title)
    assert drawn == [(written, False)] * 3
    assert displayed[0][0]["text/plain"] == written


@pytest.mark.parametrize(
    ("images", "titles", "columns", "message"),
    [
        ([], None, None, "no images"),
        ([GREY], ["a", "b"], None, "1 images, but 2 titles"),
        ([GREY], None, 0, "columns is 0"),
    ],
)
def test_show_images_says_what_is_wrong(images, titles, columns, message):
    with pytest.raises(ValueError, match=message):
        plotting.show_images(images, titles, columns=columns)


# ------------------------------------------------------------------ stacks


def half_red(**changes: Any) -> StackLayer:
    """Red on the left, empty on the right."""
    image = Image.new("RGBA", (32, 32))
    image.paste("#ff0000ff", (0, 0, 16, 32))
    return StackLayer("a red wall", image, **changes)


def test_a_layer_stands_on_a_checkerboard_where_it_was_moved_to():
    drawn = plotting.on_checks(half_red(offset=(8, 0)))
    light, dark = (ImageColor.getrgb(colour) for colour in plotting.CHECKS)
    columns = [drawn.getpixel((x, 4)) for x in (4, 12, 20, 28)]
    assert columns == [dark, (255, 0, 0), (255, 0, 0), light]
    assert [drawn.getpixel((x, 12)) for x in (4, 28)] == [light, dark]
    half = plotting.on_checks(StackLayer("x", Image.new("RGBA", (32, 32), "#ff000080")))
    assert half.getpixel((12, 4)) == pytest.approx((255, 127, 127), abs=1)


def test_stacks_are_taken_apart_a_row_each():
    composite = Image.new("RGB", (32, 32), "yellow")
    ground = Image.new("RGB", (32, 32), "blue")
    one = LayerStack(ground, (half_red(),), background_prompt="at sea", composite=composite)
    hidden = half_red(hidden=True, opacity=0.5)
    other = LayerStack(ground, (half_red(offset=(16, 0)), hidden))
    figure = plotting.draw_stack(one, other)
    titles = [axis.get_title().replace("\n", " ") for axis in figure.axes]
    assert titles == [
        *("at sea", "1 a red wall", "", "flattened", "composite"),
        *("background", "1 a red wall", "2 a red wall 50 % (hidden)", "flattened", "no composite"),
    ]
    pixels = [axis.images[0].get_array()[8, 24].tolist() for axis in figure.axes]
    red, blue, yellow, white = [255, 0, 0], [0, 0, 255], [255, 255, 0], [255, 255, 255]
    assert pixels[0] == pixels[3] == pixels[5] == blue
    assert pixels[6] == pixels[8] == red  # moved to the right, in front of the blue ground
    assert pixels[4] == yellow
    assert pixels[2] == pixels[9] == white
    pyplot.close(figure)
    with pytest.raises(ValueError, match="no stacks"):
        plotting.draw_stack()


# ------------------------------------------------------------------ in a notebook


@pytest.fixture
def displayed(monkeypatch) -> list[tuple[dict, dict]]:
    """What was shown under the cell: (data, metadata)."""
    calls: list[tuple[dict, dict]] = []

    def display(data: dict, *, metadata: dict, raw: bool) -> None:
        assert raw
        calls.append((data, metadata))

    monkeypatch.setattr(plotting, "display", display)
    return calls


def image_of(data: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data["image/png"])))


def test_show_carries_its_text_and_closes_the_figure(displayed):
    figure, axis = pyplot.subplots(figsize=(2, 1), dpi=50)
    axis.axis("off")
    plotting.show(figure, "nothing at all")
    [(data, metadata)] = displayed
    assert data["text/plain"] == metadata["image/png"]["alt"] == "nothing at all"
    assert image_of(data).size == (100, 50)
    assert image_of(data).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert not pyplot.fignum_exists(figure.number)
    with pytest.raises(ValueError, match="should say what"):
        plotting.show(GREY, " ")


def test_show_reduces_a_noisy_picture_and_only_that(displayed):
    generator = numpy.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (200, 200, 3), dtype=numpy.uint8))
    plotting.show(noise, "noise")
    plotting.show(GREY, "grey")
    (noisy, _), (plain, _) = displayed
    assert image_of(noisy).mode == "P"
    assert len(noisy["image/png"]) < 70_000
    assert image_of(plain).getpixel((5, 5)) == (128, 128, 128)


def test_a_movie_holds_its_ends(displayed):
    frames = [Image.new("RGB", (20, 10), (level, 0, 0)) for level in (0, 120, 250)]
    plotting.movie(frames, "red grows", frame=50, hold=900)
    film = image_of(displayed[0][0])
    assert film.n_frames == 3
    times, reds = [], []
    for number in range(3):
        film.seek(number)
        times.append(film.info["duration"])
        reds.append(film.convert("RGB").getpixel((3, 3))[0])
    assert times == [900, 50, 900]
    assert reds == pytest.approx([0, 120, 250], abs=3)
    with pytest.raises(ValueError, match="not 1 of"):
        plotting.movie(frames[:1], "one")
    with pytest.raises(ValueError, match="of one size"):
        plotting.movie([GREY, frames[0]], "two sizes")


def test_a_sheet_puts_images_edge_to_edge():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    figure, axis = pyplot.subplots()
    plotting.draw_sheet(axis, images, 2, "sheet")
    [shown] = axis.images
    assert shown.get_array().shape == (4, 4, 3), "the fifth has no full row"
    assert shown.get_array()[::2, ::2, 0].ravel().tolist() == pytest.approx([0, 0.25, 0.5, 0.75])
    assert axis.get_title() == "sheet"
    with pytest.raises(ValueError, match="do not fill a row of 6"):
        plotting.draw_sheet(axis, images, 6)
    pyplot.close(figure)
