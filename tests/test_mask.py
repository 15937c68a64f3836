"""lrd_helpers.mask: what a mask is made of, the same in all files, and which cells belong together.

How layers and layouts hold masks is in test_layout.py.
"""

import base64
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import LA, PNGS, bomb, exif, lying, png
from PIL import Image, features

from lrd_helpers.layout import Layout, LayoutError
from lrd_helpers.mask import Mask, connected_regions
from lrd_helpers.pictures import MOST_BYTES

# ------------------------------------------------------------------ one shape in all files

# A disc that covers .21 of an 80 × 64 picture, and not in its middle.
_Y, _X = numpy.mgrid[:80, :64]
DISC = (_Y - 30) ** 2 + (_X - 26) ** 2 < 18.5**2


def by_pillow(mode: str, kind: str, **options: object) -> Callable[[numpy.ndarray, int], bytes]:
    """White on black in a mode and a format of Pillow; transparent outside in a mode with alpha."""

    def write(shape: numpy.ndarray, orientation: int) -> bytes:
        pixels = lying(shape, orientation)
        scale, numbers = {
            "I;16": (65535, numpy.uint16), "I": (65535, numpy.int32), "F": (1, numpy.float32),
            "F255": (255, numpy.float32), "F65535": (65535, numpy.float32),
        }.get(mode, (255, numpy.uint8))  # fmt: skip
        image = Image.fromarray(pixels.astype(numbers) * numbers(scale))
        if mode == "RGBA":  # as dark as what is around it: only the alpha tells
            image = Image.merge("RGBA", [Image.new("L", image.size, 40)] * 3 + [image])
        elif image.mode == "L":
            image = image.convert(mode)
        file = io.BytesIO()
        image.save(file, kind, exif=exif(orientation), **options)
        return file.getvalue()

    return write


FORMS = {
    f"{mode} {kind} {' '.join(map(str, options.values()))}": by_pillow(mode, kind, **options)
    for mode, kind, options in [
        *((mode, "TIFF", {}) for mode in ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "I", "F")),
        *((mode, "TIFF", {}) for mode in ("F255", "F65535", "YCbCr")),
        ("L", "TIFF", {"compression": "tiff_lzw"}),
        *((mode, "JPEG", {"quality": 90}) for mode in ("L", "RGB", "CMYK")),
        *((mode, "WEBP", {"lossless": True}) for mode in ("RGB", "RGBA")),
        ("RGB", "WEBP", {"quality": 80}),
        *((mode, "AVIF", {"quality": 90}) for mode in ("RGB", "RGBA") if features.check("avif")),
    ]
}  # fmt: skip
WITHOUT_EXIF = {
    f"{mode} {kind}": by_pillow(mode, kind)
    for mode, kind in [
        *((mode, "GIF") for mode in ("1", "L", "P", "RGBA")),
        *((mode, "BMP") for mode in ("1", "L", "P", "RGB")),
        *((mode, "PPM") for mode in ("1", "L", "RGB", "I;16")),
    ]
}


@st.composite
def shapes(draw: st.DrawFn) -> numpy.ndarray:
    """Neither nothing nor everything, of 16 × 16 blocks, which JPEG keeps."""
    height, width = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    cells = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    cells[0], cells[-1] = (flag := draw(st.booleans())), not flag
    return numpy.kron(numpy.reshape(cells, (height, width)), numpy.ones((16, 16))).astype(bool)


@given(shapes(), st.sampled_from(PNGS), st.integers(1, 8), st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_kind_of_png_gives_the_mask_of_its_shape(shape, kind, orientation, dark):
    mask = Mask.of(shape)
    data = png(shape, *kind, orientation, dark)
    assert Mask.of(Image.open(io.BytesIO(data))) == mask


@given(shapes(), st.sampled_from(sorted(FORMS)), st.integers(1, 8))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_format_gives_the_mask_of_its_shape(tmp_path_factory, shape, form, orientation):
    path = tmp_path_factory.getbasetemp() / "mask"
    path.write_bytes(FORMS[form](shape, orientation))
    assert Mask.of(path) == Mask.of(Image.open(path)) == Mask.of(shape)


@given(shapes(), st.sampled_from(sorted(WITHOUT_EXIF)))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_formats_without_exif_give_the_mask_of_their_shape(shape, form):
    assert Mask.of(Image.open(io.BytesIO(WITHOUT_EXIF[form](shape, 1)))) == Mask.of(shape)


@pytest.mark.parametrize(("kind", "depth", "clear"), PNGS)
def test_a_disc_is_a_fifth_of_the_canvas_in_every_png(kind, depth, clear):
    for dark in {False, clear}:
        mask = Mask.of(Image.open(io.BytesIO(png(DISC, kind, depth, clear, 1, dark))))
        assert float(mask.pixels().float().mean()) == pytest.approx(0.21, abs=0.005)
        assert mask == Mask.of(DISC)


def test_the_text_of_a_mask_may_be_any_of_these():

    data = base64.b64encode(png(DISC, LA, 16, True, 6)).decode()
    assert Mask.of(f"data:image/png;base64,{data}") == Mask.of(DISC)


# ------------------------------------------------------------------ half of the way, and alpha


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(numpy.uint8([[0, 127, 128, 255]])), [0, 0, 1, 1]),
        (Image.fromarray(numpy.uint16([[0, 32767, 32768, 65535]])), [0, 0, 1, 1]),
        (Image.fromarray(numpy.uint16([[0, 127, 40000, 41000]])), [0, 0, 1, 1]),
        (Image.fromarray(numpy.float32([[0, 0.5, 0.51, 1]])), [0, 0, 1, 1]),
        (Image.fromarray(numpy.float32([[0, 127.4, 127.6, 255]])), [0, 0, 1, 1]),
        (numpy.uint16([[0, 32767, 32768, 65535]]), [0, 0, 1, 1]),
        (numpy.array([[0, 32767, 32768, 65535]], ">u2"), [0, 0, 1, 1]),
        (numpy.float16([[0, 0.5, 0.51, 1]]), [0, 0, 1, 1]),
        (torch.tensor([[0, 0.5, 0.51, 1]], dtype=torch.bfloat16), [0, 0, 1, 1]),
        (torch.tensor([[0, 0.2, 0.6, 1]], requires_grad=True), [0, 0, 1, 1]),
        (torch.tensor([[0, 1, 0, 1]]), [0, 1, 0, 1]),
        (numpy.int64([[0, 255, 0, 255]]), [0, 1, 0, 1]),
        (numpy.float64([[-1e-6, 1.000001, 0.4, 0.6]]), [0, 1, 0, 1]),
        (numpy.float32([[-0.001, 255.002, 100.5, 140]]), [0, 1, 0, 1]),
    ],
)  # fmt: skip
def test_more_than_half_of_the_way_to_the_top_of_its_format(image, expected):
    assert Mask.of(image).pixels().int().tolist() == [expected]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a: a[None], lambda a: a[None, None], lambda a: a[..., None],
        lambda a: a[None, ..., None], lambda a: torch.from_numpy(a)[None], lambda a: a.tolist(),
        lambda a: torch.from_numpy(a)[None].half(), lambda a: 255 * a.astype(numpy.uint8)[None],
    ],
)  # fmt: skip
def test_axes_of_length_one_are_dropped(wrap):
    assert Mask.of(wrap(DISC)) == Mask.of(DISC)


def with_alpha(brightness: numpy.ndarray, alpha: numpy.ndarray) -> Image.Image:
    bands = [Image.fromarray(band.astype(numpy.uint8)) for band in (brightness, alpha)]
    return Image.merge("LA", bands)


def test_alpha_decides_only_where_it_tells_the_object_from_the_rest():
    white, disc = numpy.full(DISC.shape, 255), 255 * DISC
    mask = Mask.of(DISC)
    assert Mask.of(with_alpha(disc, white)) == mask
    assert Mask.of(with_alpha(disc, white // 3)) == mask, "the same everywhere"
    assert Mask.of(with_alpha(disc, numpy.where(_X == 0, 250, 255))) == mask, "soft edges only"
    assert Mask.of(with_alpha(white, disc)) == mask
    assert Mask.of(with_alpha(255 - disc, disc)) == mask
    with pytest.raises(ValueError, match="is transparent everywhere"):
        Mask.of(with_alpha(white, 0 * white))
    with pytest.raises(ValueError, match=r"has an alpha from 0 to 102, but none above 127\.5"):
        Mask.of(with_alpha(white, 102 * DISC))


# ------------------------------------------------------------------ maps of labels


def voc_map(values: list[int], mode: str = "P") -> Image.Image:
    """A map of labels as the PASCAL VOC has them: stripes, the last value thin between them."""
    numbers = numpy.repeat(numpy.uint8([values[:-1]]), 8, axis=1).repeat(16, axis=0)
    numbers[::8] = values[-1]
    image = Image.fromarray(numbers)
    if mode == "L":
        return image
    palette = [(0, 0, 0)] * 256
    palette[1], palette[15], palette[255] = (128, 0, 0), (192, 128, 128), (224, 224, 192)
    image.putpalette([channel for colour in palette for channel in colour])
    return image.convert("RGB") if mode == "RGB" else image


@pytest.mark.parametrize("mode", ["P", "L", "array", "tensor"])
@pytest.mark.parametrize("values", [[0, 1, 15, 255], [0, 1, 255], [0, 15, 1], [0, 1, 2, 3]])
def test_a_map_of_labels_is_refused_by_its_values_and_read_by_a_label(mode, values):
    image = voc_map(values, "P" if mode == "P" else "L")
    given = {"array": numpy.asarray(image), "tensor": torch.from_numpy(numpy.array(image))}
    given = given.get(mode, image)
    listed = ", ".join(str(value) for value in sorted(values))
    with pytest.raises(ValueError, match=f"the values {listed}, .*choose one.*label=1\\)"):
        Mask.of(given)
    for value in values:
        expected = numpy.asarray(image) == value
        assert numpy.array_equal(Mask.of(given, label=value).pixels(), expected)
    with pytest.raises(ValueError, match=r"is Mask\(height=16, .*but should be a picture"):
        Mask.of(Mask.of(given, label=1), label=1)
    with pytest.raises(ValueError, match=f"has no label 7; it has the values {listed}$"):
        Mask.of(given, label=7)


def test_a_map_in_colours_names_them():
    image, indices = voc_map([0, 1, 15, 255], "RGB"), voc_map([0, 1, 15, 255])
    with pytest.raises(ValueError, match=r"the colours #000000, #800000, #c08080, #e0e0c0, .*"):
        Mask.of(image)
    assert Mask.of(image, label="#c08080") == Mask.of(indices, label=15)
    with pytest.raises(ValueError, match="has no label 'red'; it has the colours #000000"):
        Mask.of(image, label="red")
    photo = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (9, 9, 3), numpy.uint8))
    with pytest.raises(ValueError, match=r"… \(81 in all\)"):
        Mask.of(photo)


def test_of_two_colours_the_bright_one_is_meant_if_there_is_one():
    def drawn(behind: str, disc: str) -> Image.Image:
        return Image.composite(
            Image.new("RGB", DISC.shape[::-1], disc), Image.new("RGB", DISC.shape[::-1], behind),
            Image.fromarray(DISC),
        )  # fmt: skip

    assert Mask.of(drawn("navy", "yellow")) == Mask.of(DISC)
    assert Mask.of(drawn("navy", "yellow").quantize(4)) == Mask.of(DISC)
    for behind, disc in (("black", "red"), ("yellow", "white")):
        with pytest.raises(ValueError, match="is not in black and white"):
            Mask.of(drawn(behind, disc))


def test_soft_edges_and_damage_by_jpeg_are_no_labels():
    grey = Image.fromarray(DISC).convert("L")
    soft = grey.resize((640, 800), Image.Resampling.BICUBIC).resize((64, 80))
    assert (Mask.of(soft).pixels().numpy() != DISC).mean() < 0.03
    steps = numpy.uint8([[0, 0, 64, 128, 191, 255, 255]])
    assert Mask.of(steps).pixels().int().tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    for quality in (10, 50, 95):
        file = io.BytesIO()
        grey.save(file, "JPEG", quality=quality)
        assert (Mask.of(Image.open(file)).pixels().numpy() != DISC).mean() < 0.03


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (numpy.zeros((2, 3)), "is empty: no pixel of it is set"),
        (numpy.float32([[0, 0.3]]), "has values from 0 to 0.3, but none above 0.5, half of white"),
        (numpy.float32([[0, 100.5]]), "has values from 0 to 100.5, but none above 127.5"),
        (numpy.uint16([[0, 255]]), "is not in black and white, but has the values 0, 255"),
        (numpy.int64([[-1, 1]]), "has values outside 0 to 1 (or 0 to 255, or to 65535): they go "
         "from -1 to 1"),
        (numpy.float64([[0, 1e5]]), "they go from 0 to 100000"),
        (numpy.float64([[-0.01, 1]]), "they go from -0.01 to 1"),
        (numpy.float64([[0, numpy.nan]]), "some are not finite (NaN or infinite)"),
        (torch.tensor([[0, torch.inf]]), "some are not finite"),
        (Image.fromarray(numpy.float32([[0, numpy.nan]])), "some are not finite"),
        (numpy.zeros((0, 3)), "is an array of shape (0, 3), but should be"),
        (numpy.ones((8, 8, 3)), "is an array of shape (8, 8, 3), but should be"),
        (numpy.ones(5), "is an array of shape (5,), but should be"),
        (numpy.array([[1j]]), "is array([[0.+1.j]]), but should be"),
        (b"\x89PNG", r"is b'\x89PNG', but should be a picture of yes and no"),
        ("a\0b.png", r"is 'a\x00b.png', which cannot be read: no file can have this name"),
        ("\ud800.png", r"is '\ud800.png', which cannot be read: no file can have this name"),
        ("long" * 100_000, "which cannot be read: File name too long"),
        ("data:image/png;base64,AAAA", "as it is no image file of these kinds: PNG, JPEG"),
        ("data:image/png;base64,ä", "begins with 'data:' but is no picture, as it is not in base"),
    ],
)  # fmt: skip
def test_the_sentence_says_what_is_there(value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        Mask.of(value)
    assert len(str(refused.value)) < 230
    assert "\n" not in str(refused.value)


def hostile(folder: Path, name: str) -> Path:
    path = folder / name
    picture = Image.fromarray(DISC).convert("RGB")
    if name == "pipe":
        os.mkfifo(path)
    elif name == "empty":
        path.touch()
    elif name == "huge":
        path.touch()
        os.truncate(path, MOST_BYTES + 1)  # without using the disk
    elif name.startswith("bomb"):
        path.write_bytes(bomb(int(name[4:-4])))
    elif name == "ghost.eps":  # a program, which Ghostscript would run
        picture.save(path, "EPS")
    elif name == "shape.dds":
        picture.save(path, "DDS")
    elif name == "damaged.avif":
        path.write_bytes(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + bytes(300))
    else:
        file = io.BytesIO()
        Image.effect_noise((64, 64), 60).save(file, name.partition(".")[2])
        path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe", "which cannot be read: it is a pipe, but should be a file"),
        ("empty", "which is an empty file"),
        ("huge", "which cannot be read: it is larger than 256 MB"),
        ("bomb14000.png", "which has more than 89,478,485 pixels"),
        ("bomb10000.png", "which has more than 89,478,485 pixels"),
        ("ghost.eps", "which is no image file of these kinds: PNG, JPEG, GIF"),
        ("shape.dds", "which is no image file of these kinds: PNG, JPEG, GIF"),
        ("damaged.avif", "which "),
        ("half.png", "which cannot be read: "),
        ("half.jpeg", "which cannot be read: "),
        ("half.tiff", "which "),
        ("half.webp", "which "),
    ],
)
def test_files_that_would_do_harm_are_refused_in_a_layout(tmp_path, name, message):
    path, layout = hostile(tmp_path, name), tmp_path / "layout.json"
    masks = {name: message}
    if path.is_file() and name != "huge":
        data = base64.b64encode(path.read_bytes()).decode()
        masks[f"data:image/png;base64,{data}"] = "begins with 'data:' but is no picture, as it "
    for mask, reason in masks.items():
        text = json.dumps({"caption": "c", "layers": [{"prompt": "a ball", "mask": mask}]})
        with pytest.raises(LayoutError, match=re.escape(reason)) as refused:
            Layout.from_json(text, file=layout)
        assert str(refused.value).startswith(f"{layout}, layer 1 'a ball', mask ")
        assert len(str(refused.value)) - len(str(layout)) < 300


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device")
def test_a_device_without_an_end_is_not_read():
    with pytest.raises(ValueError, match="is '/dev/zero', which cannot be read: it is a device"):
        Mask.of("/dev/zero")


# ------------------------------------------------------------------ connected regions


def test_connected_regions_largest_first_and_corners_connect():
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    regions = connected_regions(mask)
    assert [int(region.sum()) for region in regions] == [4, 2, 1]
    assert torch.equal(torch.stack(regions).any(0), mask)
    assert regions[1][0, 0]
    assert regions[1][1, 1]
    assert len(connected_regions(mask, least=2)) == 2
    assert connected_regions(torch.zeros(3, 3, dtype=torch.bool)) == []


def test_connected_regions_follow_a_spiral():
    mask = torch.zeros(41, 41, dtype=torch.bool)
    x = y = 0
    mask[0, 0] = True
    turn = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    for leg, length in enumerate(n for m in range(40, 0, -2) for n in (m, m) if n > 0):
        dx, dy = turn[leg % 4]
        for _ in range(length - (leg > 0)):
            if not (0 <= x + dx < 41 and 0 <= y + dy < 41):
                break
            x, y = x + dx, y + dy
            mask[y, x] = True
    assert len(connected_regions(mask)) == 1


@given(st.integers(0, 2**31), st.floats(0.1, 0.7))
def test_connected_regions_agree_with_a_flood_fill(seed, density):
    mask = torch.rand(12, 9, generator=torch.Generator().manual_seed(seed)) < density
    left = {tuple(pixel) for pixel in mask.nonzero().tolist()}
    expected = set()
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        expected.add(frozenset(region))
    regions = connected_regions(mask)
    assert {frozenset(map(tuple, region.nonzero().tolist())) for region in regions} == expected
    sizes = [int(region.sum()) for region in regions]
    assert sizes == sorted(sizes, reverse=True)


def test_parts_with_a_gap_between_them_are_one_region() -> None:
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[1, [0, 3, 8]] = True  # 2 cells between the first two, 4 between the last two
    assert [region.nonzero().tolist() for region in connected_regions(mask, gap=1)] == [
        [[1, 0], [1, 3]],
        [[1, 8]],
    ]
    (whole,) = connected_regions(mask, gap=2)
    assert torch.equal(whole, mask)


def test_regions_of_one_size_are_in_the_order_of_their_last_cells() -> None:
    mask = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 1]]).bool()
    columns = [int(region.nonzero()[0, 1]) for region in connected_regions(mask)]
    assert columns == [0, 2, 4]
    mask[2, 0], mask[0, 0] = True, False  # the first region now ends below the second
    columns = [int(region.nonzero()[0, 1]) for region in connected_regions(mask)]
    assert columns == [2, 0, 4]
