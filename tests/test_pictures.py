"""lrd_helpers.pictures: one picture in all its forms."""

import base64
import io
import re

import numpy
import pytest
import torch
from picture_files import as_a_phone_saves
from PIL import Image

from lrd_helpers.pictures import (
    PNG_PREFIX,
    SHOWN_BYTES,
    data_uri,
    picture_of,
    pixels_of,
    png_of,
    read_picture,
    reduced_data_uri,
)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (2, 2), (255, 0, 128)),
        torch.tensor([1.0, -3.0, 0.502]).view(3, 1, 1).expand(3, 2, 2),
        numpy.broadcast_to(numpy.array([9.0, 0.0, 0.502]), (2, 2, 3)),
        numpy.broadcast_to(numpy.array([255, 0, 128], numpy.uint8), (2, 2, 3)),
    ],
    ids=["pil", "tensor", "floats", "bytes"],
)
def test_every_kind_of_picture_becomes_the_same_image(image):
    result = picture_of(image)
    assert result.size == (2, 2)
    assert result.getpixel((1, 1)) == (255, 0, 128)


@pytest.mark.parametrize("kind", ["pil", "tensor", "half", "floats", "bytes"])
def test_there_and_back_again(kind):
    array = numpy.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=numpy.uint8)
    floats = numpy.float32(array) / 255
    picture = {
        "pil": Image.fromarray(array),
        "tensor": torch.from_numpy(floats).permute(2, 0, 1),
        "half": torch.from_numpy(floats).permute(2, 0, 1).half(),
        "floats": floats,
        "bytes": array,
    }[kind]
    pixels = pixels_of(picture)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 5, 7)
    assert numpy.array_equal(numpy.asarray(picture_of(pixels)), array)
    assert numpy.array_equal(numpy.asarray(picture_of(picture)), array)
    torch.testing.assert_close(
        pixels,
        torch.from_numpy(floats).permute(2, 0, 1),
        atol=5e-4 if kind == "half" else 0,
        rtol=0,
    )


def test_white_shines_through_where_an_image_is_transparent():
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (255, 0, 0, 51))
    assert [picture_of(image).getpixel((x, 0)) for x in range(3)] == [
        (255, 0, 0),
        (255, 255, 255),
        (255, 204, 204),
    ]
    grey = Image.new("L", (1, 1), 7)
    assert picture_of(grey).getpixel((0, 0)) == (7, 7, 7)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Black, a grey of .2 and one of .8, white; and the same with the grey of .2 transparent.
GREYS = numpy.array([[0, 51, 204, 255]], numpy.uint8)
ON_WHITE = [0, 255, 204, 255]


def with_palette() -> Image.Image:
    image = Image.fromarray(numpy.uint8([[2, 0, 1, 3]]))
    image.putpalette([51] * 3 + [204] * 3 + [0] * 3 + [255] * 3)
    return image


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(Image.fromarray(GREYS), "PNG"), GREYS[0]),
        (saved(Image.fromarray(GREYS.astype(numpy.uint16) * 257), "PNG"), GREYS[0]),
        (saved(Image.fromarray(GREYS.astype(numpy.uint16) * 257), "TIFF"), GREYS[0]),
        (saved(Image.fromarray(GREYS.astype(numpy.int32) * 257), "TIFF"), GREYS[0]),
        (saved(Image.fromarray(GREYS.astype(numpy.float32) / 255), "TIFF"), GREYS[0]),
        (saved(Image.fromarray(GREYS.astype(numpy.float32)), "TIFF"), GREYS[0]),
        (saved(Image.fromarray(GREYS).convert("CMYK"), "TIFF"), GREYS[0]),
        (saved(Image.fromarray(GREYS), "PNG", transparency=51), ON_WHITE),
        (saved(Image.fromarray(GREYS.astype(numpy.uint16) * 257), "PNG", transparency=51 * 257),
         ON_WHITE),
        (saved(Image.fromarray(GREYS).convert("RGB"), "PNG", transparency=(51,) * 3), ON_WHITE),
        (saved(with_palette(), "PNG"), GREYS[0]),
        (saved(with_palette(), "PNG", transparency=0), ON_WHITE),
        (saved(with_palette(), "GIF", transparency=0), ON_WHITE),
    ],
)  # fmt: skip
def test_every_depth_and_transparency_of_a_file_is_the_same_picture(data, expected):
    for image in (read_picture(data), Image.open(io.BytesIO(data))):
        picture = picture_of(image)
        assert picture.mode == "RGB"
        assert numpy.asarray(picture)[0, :, 1].tolist() == list(expected)
        assert pixels_of(image)[1, 0].tolist() == pytest.approx(numpy.divide(expected, 255))


def test_a_photo_of_a_phone_is_turned_once():
    photo = Image.effect_noise((6, 4), 90).convert("RGB")
    lying = Image.open(io.BytesIO(as_a_phone_saves(photo)))
    assert lying.size == (4, 6)
    for image in (lying, read_picture(as_a_phone_saves(photo)), picture_of(lying)):
        assert picture_of(image).tobytes() == photo.tobytes()
        assert torch.equal(pixels_of(image), pixels_of(photo))
    assert picture_of(lying.crop((0, 0, 4, 3))).size == (3, 4), "a part of it lies as it did"


def test_of_an_animation_the_first_frame_is_taken_and_said():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="a picture is animated; its first frame is taken"):
        assert picture_of(read_picture(data)).getpixel((0, 0)) == (255, 0, 0)


def test_damage_in_exif_does_not_hide_the_picture():
    data = saved(Image.new("RGB", (4, 2), "red"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01")
    assert picture_of(read_picture(data)).size == (4, 2)


RED = numpy.broadcast_to(numpy.array([1.0, 0.2, 0.0]), (2, 5, 3))
GREY = numpy.full((2, 5), 0.2)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        ((RED * 255).astype(numpy.uint8), [255, 51, 0]),
        ((RED * 65535).astype(numpy.uint16), [255, 51, 0]),
        ((RED * 255).astype(numpy.int64), [255, 51, 0]),
        (RED.astype(numpy.float16), [255, 51, 0]),
        (RED[None], [255, 51, 0]),
        (torch.tensor(255 * RED).byte().permute(2, 0, 1), [255, 51, 0]),
        (torch.tensor(RED).permute(2, 0, 1)[None].bfloat16(), [255, 51, 0]),
        (torch.tensor(RED).permute(2, 0, 1).requires_grad_(), [255, 51, 0]),
        (GREY, [51] * 3),
        (GREY[..., None], [51] * 3),
        (GREY[None], [51] * 3),
        (torch.tensor(GREY), [51] * 3),
        (torch.tensor(GREY)[None, None], [51] * 3),
        (GREY > 0, [255] * 3),
        (numpy.dstack([RED, numpy.full((2, 5), 0.2)]), [255, 214, 204]),
        (torch.tensor(numpy.dstack([255 * RED, GREY * 0])).permute(2, 0, 1).byte(), [255] * 3),
    ],
)
def test_arrays_of_every_kind(picture, expected):
    assert picture_of(picture).size == (5, 2)
    assert picture_of(picture).getpixel((3, 1)) == tuple(expected)
    pixels = pixels_of(picture)
    assert pixels[:, 1, 3].tolist() == pytest.approx(numpy.divide(expected, 255), abs=2e-3)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (255 * RED, "the picture has values from 0 to 255, but floats should be in [0, 1]; divide"),
        (torch.full((3, 2, 2), torch.nan), "the picture has values that are not finite"),
        (numpy.full((2, 2, 3), -1), "they go from -1 to -1"),
        (numpy.full((2, 2, 3), 70_000), "they go from 70000 to 70000"),
        (Image.fromarray(numpy.float32([[0, numpy.inf]])), "the picture has values outside 0 to 1"),
        (numpy.zeros((3, 8, 8)), "is an array of shape (3, 8, 8), but should be a PIL image, or "
         "numbers of shape (height, width, 3)"),
        (torch.zeros(8, 8, 3), "or numbers of shape (3, height, width)"),
        (torch.zeros(2, 3, 8, 8), "is an array of shape (2, 3, 8, 8)"),
        (numpy.zeros((0, 4, 3)), "is an array of shape (0, 4, 3)"),
        (numpy.array("photo.png"), "is array('photo.png', dtype='<U9'), but should be a PIL image"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_one_sentence(picture, message):
    for read in (picture_of, pixels_of):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(picture)


def test_a_data_uri_holds_the_image():
    image = Image.effect_noise((9, 4), 60).convert("RGB")
    for optimize in (True, False):
        uri = data_uri(image, optimize=optimize)
        assert uri.startswith(PNG_PREFIX)
        png = base64.b64decode(uri.removeprefix(PNG_PREFIX))
        assert png == png_of(image, optimize=optimize)
        assert Image.open(io.BytesIO(png)).tobytes() == image.tobytes()


def read(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_small_picture_is_shown_as_it_is():
    image = Image.effect_noise((90, 40), 60).convert("RGB")
    assert reduced_data_uri(image) == data_uri(image)


@pytest.mark.parametrize(
    ("size", "longest_side", "shown"),
    [
        ((3000, 1500), 1024, (1024, 512)),
        ((900, 1024), 1024, (900, 1024)),
        ((5, 4000), 400, (1, 400)),
    ],
)
def test_a_large_picture_is_reduced_and_stays_what_it_is(size, longest_side, shown):
    width, height = size
    noise = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), numpy.uint8)
    noise[: height // 2] //= 4  # the upper half is dark
    image = Image.fromarray(noise)
    result = read(reduced_data_uri(image, longest_side))
    assert image.size == size
    assert result.size == shown
    assert result.fp.seek(0, io.SEEK_END) <= SHOWN_BYTES
    means = [
        result.convert("L").crop((0, y, shown[0], y + shown[1] // 2)) for y in (0, shown[1] // 2)
    ]
    assert [numpy.asarray(mean).mean() for mean in means] == pytest.approx([31, 127], abs=6)
