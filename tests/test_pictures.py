"""lrd_helpers.pictures: one picture in all its forms."""

import base64
import io

import numpy
import pytest
import torch
from PIL import Image

from lrd_helpers.pictures import PNG_PREFIX, data_uri, picture_of, pixels_of, png_of


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


def test_a_data_uri_holds_the_image():
    image = Image.effect_noise((9, 4), 60).convert("RGB")
    for optimize in (True, False):
        uri = data_uri(image, optimize=optimize)
        assert uri.startswith(PNG_PREFIX)
        png = base64.b64decode(uri.removeprefix(PNG_PREFIX))
        assert png == png_of(image, optimize=optimize)
        assert Image.open(io.BytesIO(png)).tobytes() == image.tobytes()
