"""lrd_helpers.plotting: what is drawn is where it should be, and nothing is cut off."""

import base64
import io
from typing import Any

import numpy
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_hex
from matplotlib.patches import StepPatch
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

WHITE = torch.ones(4, 3, 8, 8)


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


def test_curves_are_told_apart_and_named():
    figure, axis = pyplot.subplots()
    curves = {"time": ([1, 2, 4], [1, 4, 16]), "memory": ([2, 4], [3.0, 5.0])}
    plotting.draw_curves(axis, curves, title="a $5 title", log="x", ticks=[1, 2, 4])
    assert [line.get_xydata().tolist() for line in axis.lines] == [
        [[1, 1], [2, 4], [4, 16]],
        [[2, 3], [4, 5]],
    ]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axis.lines}
    assert len(looks) == 2
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "linear")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "4"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["time", "memory"]
    pyplot.close(figure)


@pytest.mark.parametrize(
    ("count", "log", "said"), [(1, "z", "'z', but should be"), (5, "", "5 curves, but at most 4")]
)
def test_curves_that_cannot_be_drawn_are_refused(count, log, said):
    figure, axis = pyplot.subplots()
    curves = {str(number): ([1], [1]) for number in range(count)}
    with pytest.raises(ValueError, match=said):
        plotting.draw_curves(axis, curves, log=log)
    assert not axis.lines
    pyplot.close(figure)


def test_numbers_from_n_0_1_fill_the_bell_drawn_over_them():
    figure, axis = pyplot.subplots()
    numbers = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    plotting.draw_numbers(axis, numbers, reach=4.0, title="as they come")
    heights = [bar.get_height() for bar in axis.patches]
    assert max(heights) == pytest.approx(0.4, abs=0.03)
    assert axis.lines[0].get_ydata().max() == pytest.approx(0.4, abs=0.01)
    pyplot.close(figure)


def test_a_bell_is_an_ellipse_two_deviations_wide_at_its_mean():
    figure, axis = pyplot.subplots()
    means, deviations = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 0.25]])
    plotting.draw_bells(axis, means, deviations, colours=["red"], reach=3.0)
    bell, standard = axis.patches
    assert (bell.center, bell.width, bell.height) == ([1.0, -1.0], 2.0, 1.0)
    assert (standard.center, standard.width, standard.height) == ((0, 0), 4, 4)
    plotting.draw_bells(axis, means, colours=["red"], reach=3.0)
    assert len(axis.patches) == 3, "bare points have no ellipses"
    pyplot.close(figure)


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


def test_a_map_goes_from_blue_to_yellow_on_a_scale_of_its_own_or_on_one_for_all():
    blue, yellow = (pyplot.get_cmap("cividis")(end)[:3] for end in (0.0, 1.0))
    values = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.1, 0.1]])
    alone, compared = plotting.map_image(values), plotting.map_image(values, top=0.3)
    assert alone.shape == (3, 2, 3)
    assert alone[:, 0, 0].tolist() == pytest.approx(blue)
    assert alone[:, 1, 0].tolist() == pytest.approx(yellow)
    assert compared[:, 0, 2].tolist() == pytest.approx(yellow)
    assert compared[:, 0, 0].tolist() == pytest.approx(pyplot.get_cmap("cividis")(1 / 3)[:3])
    assert plotting.map_image(torch.ones(2, 2)).flatten(1).T.tolist() == [pytest.approx(blue)] * 4
    with pytest.raises(ValueError, match="top is 0.0, but should be above 0"):
        plotting.map_image(values, top=0.0)


def test_a_map_over_a_picture_shows_its_light_and_shade():
    picture = torch.zeros(3, 8, 8)
    picture[:, :, 4:] = 1
    over = plotting.map_image(torch.ones(2, 2), picture)
    assert over.shape == (3, 8, 8)
    torch.testing.assert_close(over[:, :, 0], 0.65 * over[:, :, 7])


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


def test_sheets_stand_one_below_the_other_under_their_titles():
    figure = plotting.show_sheets({"two rows": torch.zeros(4, 3, 8, 8), "$5": WHITE[:2]}, 2)
    shapes = [axis.images[0].get_array().shape for axis in figure.axes]
    assert shapes == [(16, 16, 3), (8, 16, 3)]
    assert [axis.get_title() for axis in figure.axes] == ["two rows", "$5"]
    pyplot.close(figure)


@pytest.mark.parametrize(
    ("sheets", "message"), [({}, "there are no sheets"), ({"a": WHITE[:1]}, "1 images do not fill")]
)
def test_sheets_that_cannot_be_shown(sheets, message):
    with pytest.raises(ValueError, match=message):
        plotting.show_sheets(sheets, 2)
    pyplot.close("all")


def test_a_table_has_its_numbers_in_its_cells_where_they_can_be_read():
    figure, axis = pyplot.subplots()
    plotting.draw_table(axis, torch.tensor([[0.0, 2.4], [5.0, 1.0]]), ["a", "b"], ["c", "d"], "e")
    numbers = {text.get_position(): (text.get_text(), text.get_color()) for text in axis.texts}
    assert numbers[(1, 0)] == ("2.40", "white")
    assert numbers[(0, 1)] == ("5.00", "black")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert axis.get_title() == "e"
    pyplot.close(figure)


def test_the_diagram_names_the_parts_and_only_one_learns():
    figure = plotting.diagram_of_latent_diffusion()
    [axis] = figure.axes
    words = [text.get_text() for text in axis.texts]
    for part in ("tokenizer", r"text encoder $\tau$", r"$\mathcal{E}$", r"$\mathcal{D}$"):
        assert part in words
    colours = [patch.get_facecolor() for patch in axis.patches]
    assert len({colour for colour in colours if colours.count(colour) == 2}) == 1  # the U-Net's


def test_a_plane_has_its_density_points_paths_and_arrows():
    figure, axis = pyplot.subplots()
    corner = torch.tensor([[1.0, 1.0]])
    paths = torch.stack([torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
    plotting.draw_plane(
        axis,
        lambda x: -4 * (x - corner).square().sum(-1),
        points=corner,
        paths=paths,
        field=lambda x: 2 * (corner - x),
        title="$5",
        limit=2.0,
    )
    [ground] = axis.images
    row, column = divmod(int(ground.get_array().argmax()), 120)
    assert ground.origin == "lower"
    assert (column, row) == pytest.approx((89, 89), abs=1), "(1, 1) lies at three quarters"
    arrows, dots, starts, ends = axis.collections
    pull = numpy.stack([arrows.U, arrows.V], 1)
    assert pull == pytest.approx(2 * (1 - arrows.XY)), "the arrow at each place"
    assert numpy.linalg.norm(pull / arrows.scale, axis=1).max() == pytest.approx(4 / 15)
    assert dots.get_offsets().tolist() == [[1, 1]]
    assert starts.get_offsets().tolist() == paths[0].tolist()
    assert ends.get_offsets().tolist() == paths[1].tolist()
    assert axis.lines[0].get_xdata().tolist() == [0, 1]
    assert axis.get_xlim() == axis.get_ylim() == (-2, 2)
    assert axis.get_title() == "$5"
    pyplot.close(figure)


def test_a_plane_has_a_colour_for_each_point_and_path():
    figure, axis = pyplot.subplots()
    colours = [plotting.BLUE, plotting.ORANGE]
    plotting.draw_plane(axis, points=torch.zeros(2, 2), paths=torch.zeros(3, 2, 2), colour=colours)
    dots, _, ends = axis.collections
    for drawn in (dots, ends):
        assert [to_hex(colour).upper() for colour in drawn.get_facecolor()] == colours
    assert [line.get_color() for line in axis.lines] == colours
    assert not axis.images


# ------------------------------------------------------------------ on the axes of a figure


def judged(*ious: float) -> tuple[Layout, Image.Image, list[float]]:
    return LAYOUT, GREY, list(ious)


def drawn(figure) -> numpy.ndarray:
    """The figure's pixels, (height, width, 3)."""
    return numpy.asarray(Image.open(io.BytesIO(plotting._png_of(figure))).convert("RGB"))


def test_rows_of_judged_pictures_say_name_mean_and_ious_and_have_their_boxes():
    rows = {"plain": [judged(0.2, 0.4), judged(0.6, 0.8)], "$ξ$": [judged(0, 0), judged(1, 1)]}
    figure = plotting.draw_judged(rows, titles=["left", "right"])
    upper, lower = figure.subfigs
    assert [part._suptitle.get_text() for part in (upper, lower)] == [
        "plain: mean IoU 0.50",
        "$ξ$: mean IoU 0.50",
    ]
    assert [axis.get_title() for axis in upper.axes] == ["left", "right"]
    assert [axis.get_title() for axis in lower.axes] == ["", ""]
    assert [axis.get_xlabel() for axis in upper.axes] == ["IoU 0.20, 0.40", "IoU 0.60, 0.80"]
    boxes = [(patch.get_xy(), patch.get_edgecolor()[:3]) for patch in upper.axes[0].patches[1::2]]
    colours = [tuple(v / 255 for v in ImageColor.getrgb(c)) for c in plotting.BOX_COLOURS[:2]]
    assert boxes == [((0.05, 0.55), colours[0]), ((0.60, 0.25), colours[1])]
    drawn(figure)


def test_without_a_mean_an_empty_name_takes_no_room():
    figure = plotting.draw_judged({"": [judged(0.5)]}, mean=False)
    assert figure.subfigs[0]._suptitle is None
    with_name = plotting.draw_judged({"a": [judged(0.5)]}, mean=False)
    assert with_name.get_figheight() > figure.get_figheight()
    assert with_name.subfigs[0]._suptitle.get_text() == "a"
    drawn(figure), drawn(with_name)


@pytest.mark.parametrize("rows", [{}, {"a": []}, {"a": [judged(1.0)], "b": [judged(1.0)] * 2}])
def test_rows_of_no_or_different_lengths_are_refused(rows):
    with pytest.raises(ValueError, match="every row needs as many pictures"):
        plotting.draw_judged(rows)


def test_another_number_of_titles_than_of_columns_is_refused():
    with pytest.raises(ValueError, match="2 pictures a row, but 1 titles"):
        plotting.draw_judged({"a": [judged(1.0)] * 2}, titles=["x"])


def test_the_outline_of_a_mask_lies_where_the_mask_is():
    mask = torch.zeros(20, 20)
    mask[2:6, 10:18] = 1  # above, on the right
    figure, axis = pyplot.subplots()
    plotting.frame(axis, GREY, "t", "b", Layout("c", layers=[Layer("a ring", mask=mask)]))
    [rim, line] = axis.collections
    x, y = line.get_paths()[0].vertices.T
    assert [x.min(), x.max()] == pytest.approx([0.5, 0.9], abs=0.06)
    assert [y.min(), y.max()] == pytest.approx([0.1, 0.3], abs=0.06)
    assert axis.get_ylim() == (1, 0), "the picture's upper edge is above"
    drawn(figure)


def test_maps_are_dark_at_the_lower_and_bright_at_the_upper_limit():
    figure = plotting.draw_maps([torch.full((4, 4), value) for value in (-3.0, 0.0, 9.0)], "abc")
    shades = [axis.images[0].get_array()[0, 0] for axis in figure.axes]
    cividis = pyplot.colormaps["cividis"]
    for shade, value in zip(shades, (0.0, 0.0, 1.0), strict=True):
        assert [float(v) / 255 for v in shade] == pytest.approx(cividis(value)[:3], abs=0.01)
    drawn(figure)


@pytest.mark.parametrize(("maps", "titles"), [([], []), ([torch.zeros(2, 2)], [])])
def test_maps_without_a_title_each_are_refused(maps, titles):
    with pytest.raises(ValueError, match="it should be one each"):
        plotting.draw_maps(maps, titles)


def test_lines_differ_in_more_than_colour_and_a_fifth_is_refused():
    figure, axis = pyplot.subplots()
    plotting.draw_lines(axis, [0, 1], {name: [0, n] for n, name in enumerate("abcd")}, title="T")
    assert len({(line.get_linestyle(), line.get_marker()) for line in axis.lines}) == 4
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list("abcd")
    assert axis.get_title() == "T"
    with pytest.raises(ValueError, match="5 lines"):
        plotting.draw_lines(axis, [0], {name: [0] for name in "abcde"})
    pyplot.close(figure)


def test_dots_stand_in_rows_from_the_top_with_a_line_at_their_mean():
    figure, axis = pyplot.subplots()
    plotting.draw_dots(axis, {"a": [0.0, 1.0], "b": [0.25, 0.25]}, xlabel="IoU")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert [float(line.get_xdata()[0]) for line in axis.lines] == [0.5, 0.25]
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first name is above"


# ------------------------------------------------------------------ figures with boxes and numbers


def outlines(axis: Axes) -> list[tuple[tuple[float, ...], str, str]]:
    """Corner and size, line style and colour of each outline, without their dark rims."""
    found = [
        (p.get_bbox().bounds, p.get_linestyle(), to_hex(p.get_edgecolor())) for p in axis.patches
    ]
    return [outline for outline in found if outline[2] != "#000000"]


def test_boxes_stand_where_they_were_asked_for_and_found():
    other = Layout("a boat", layers=[Layer("a boat", box=(0.5, 0.5, 1.0, 1.0))])
    found = [[(0.1, 0.5, 0.5, 0.9), None], [None]]
    figure = plotting.show_boxes(
        [GREY, torch.ones(3, 8, 8)], [LAYOUT, other], ["$5", "b"], ["one\ntwo", ""], found=found
    )
    left, right = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["$5", "b"]
    assert left.get_xlabel() == "one\ntwo"
    first, _, dotted = outlines(left)
    assert first == (
        pytest.approx((0.05, 0.55, 0.45, 0.40)),
        "solid",
        plotting.BOX_COLOURS[0].lower(),
    )
    assert dotted == (pytest.approx((0.1, 0.5, 0.4, 0.4)), ":", "#ffffff")
    assert [bounds for bounds, *_ in outlines(right)] == [pytest.approx((0.5, 0.5, 0.5, 0.5))]
    assert left.images[0].get_extent() == [0, 1, 1, 0]
    figure.canvas.draw()
    pyplot.close(figure)


@pytest.mark.parametrize(
    ("pictures", "more", "message"),
    [
        ([], {}, "no pictures"),
        ([GREY] * 2, {"layouts": [LAYOUT]}, "2 pictures, but 1 layouts"),
        ([GREY] * 2, {"titles": ["a"]}, "2 pictures, but 1 titles"),
        ([GREY], {"below": ["a", "b"]}, "1 pictures, but 2 texts below"),
        ([GREY], {"found": [[], []]}, "1 pictures, but 2 lists of boxes"),
    ],
)
def test_boxes_of_something_else_are_refused(pictures, more, message):
    with pytest.raises(ValueError, match=message):
        plotting.show_boxes(pictures, **{"layouts": LAYOUT, **more})


def test_a_table_has_its_numbers_and_each_picture_its_row():
    values = torch.tensor([[0.0, 1.0], [0.25, 0.5]])
    figure = plotting.show_scored([GREY] * 2, LAYOUT, values, ["a", "b"], ["c", "d"])
    *pictures, table = figure.axes
    assert [len(outlines(axis)) for axis in pictures] == [2, 2]
    assert [text.get_text() for text in table.texts] == ["0.00", "1.00", "0.25", "0.50"]
    assert [text.get_color() for text in table.texts] == ["white", "black", "white", "black"]
    assert table.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in table.get_yticklabels()] == ["a", "b"]
    figure.canvas.draw()
    pyplot.close(figure)
    with pytest.raises(ValueError, match="1 pictures, but 2 names of rows"):
        plotting.show_scored([GREY], LAYOUT, values, ["a", "b"], ["c", "d"])


def test_a_table_is_coloured_from_its_least_to_its_largest_number():
    _, axis = pyplot.subplots()
    texts = [["a", "b", "c"]]
    plotting.draw_table(axis, [[-20.0, 31.0, 80.0]], ["row"], ["1", "2", "3"], "title", texts=texts)
    assert axis.images[0].get_clim() == (-20, 80)
    assert [text.get_text() for text in axis.texts] == ["a", "b", "c"]
    assert [text.get_color() for text in axis.texts] == ["white", "black", "black"]
    assert axis.get_title() == "title"
    pyplot.close(axis.figure)


def test_pairs_are_joined_and_their_means_dashed():
    texts = {"title": "t", "xlabel": "x", "ylabel": "y"}
    figure = plotting.show_paired({"a": [0.1, 0.5], "b": [0.2, 0.2]}, **texts)
    lines = [line.get_ydata() for line in figure.axes[0].lines]
    drawn = [[float(y) for y in line] for line in lines]
    assert [0.3, 0.3] in [pytest.approx(line) for line in drawn]
    assert drawn[-2:] == [[0.1, 0.2], [0.5, 0.2]]
    pyplot.close(figure)
    for wrong in ({"a": [1.0]}, {"a": [1.0], "b": [1.0, 0.0]}):
        with pytest.raises(ValueError, match="two equal counts are paired"):
            plotting.show_paired(wrong, **texts)


def test_histograms_share_their_axis():
    samples = {"wide": torch.linspace(0, 1, 601), "narrow": [0.5] * 9}
    figure = plotting.show_histograms(samples, title="t", xlabel="x", interval=(0.4, 0.6))
    wide, narrow = (patch for patch in figure.axes[0].patches if isinstance(patch, StepPatch))
    assert len(figure.axes[0].patches) == 3, "the interval is shaded"
    assert numpy.nanmin(wide.get_data().values) > 0.8
    counts, edges, _ = narrow.get_data()
    assert sum(counts) == 1
    assert edges[int(counts.argmax())] <= 0.5 <= edges[int(counts.argmax()) + 1]
    pyplot.close(figure)
