"""Stacks in .psd, .ora and folders: read back, read by other readers, and what is refused."""

import contextlib
import errno
import json
import os
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from psd_tools import PSDImage
from psd_tools.api.layers import GroupMixin
from psd_tools.constants import BlendMode, Compression

from lrd_helpers import pictures
from lrd_helpers.layerdiff import export
from lrd_helpers.layerdiff.export import load_stack, save_stack
from lrd_helpers.layerdiff.stack import FURTHEST, LayerStack, StackError, StackLayer
from lrd_helpers.pictures import png_of

WIDTH, HEIGHT = 8, 6
FORMATS = ["stack.psd", "stack.ora", "stack"]


def noise(seed: int, channels: int = 4) -> Image.Image:
    """Noise: every colour and alpha differs, also under what is transparent."""
    random = numpy.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, channels), dtype=numpy.uint8))


def a_stack(**changes: object) -> LayerStack:
    stack = LayerStack(
        noise(0, 3),
        [
            StackLayer("a red car", noise(1), offset=(3, -2)),
            StackLayer("a yellow star & <moon> ☾", noise(2), opacity=128 / 255),
            StackLayer("a boat", noise(3), hidden=True, offset=(-20, 1)),
            StackLayer("", Image.new("RGBA", (WIDTH, HEIGHT))),
        ],
        caption='a car, "a star" & a boat',
        background_prompt="at night",
        composite=noise(4, 3),
    )
    return replace(stack, **changes)


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize(
    "stack",
    [
        a_stack(),
        a_stack(composite=None, caption="", background_prompt=""),
        a_stack(layers=()),
        a_stack(layers=a_stack().layers[::-1]),
    ],
)
def test_what_is_saved_is_read_back_equal(path, stack):
    save_stack(stack, path)
    assert load_stack(path) == stack
    assert os.listdir(path.parent) == [path.name]


TEXT = st.text(st.characters(codec="utf-8"), max_size=12).filter(
    lambda text: (
        not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in text)
        and not {"\ufffe", "\uffff"} & set(text)
    )
)
LAYERS = st.builds(
    StackLayer,
    TEXT,
    st.builds(noise, st.integers(0, 99)),
    offset=st.tuples(*[st.integers(-FURTHEST, FURTHEST) | st.integers(-9, 9)] * 2),
    opacity=st.integers(0, 255).map(lambda step: step / 255),
    hidden=st.booleans(),
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(LAYERS, max_size=3), TEXT, TEXT)
def test_any_stack_is_read_back_equal(tmp_path_factory, name, layers, caption, prompt):
    path = tmp_path_factory.mktemp("any") / name
    stack = LayerStack(noise(0, 3), layers, caption=caption, background_prompt=prompt)
    save_stack(stack, path)
    assert load_stack(path) == stack


@pytest.mark.parametrize(("name", "read"), [("a.ora", 0.3), ("a", 0.3), ("a.psd", 76 / 255)])
def test_only_a_psd_rounds_the_opacity(name, read, tmp_path):
    save_stack(a_stack().changed(0, opacity=0.3), tmp_path / name)
    assert load_stack(tmp_path / name).layers[0].opacity == read


def test_what_is_there_is_replaced(path):
    save_stack(a_stack(), path)
    save_stack(a_stack(layers=(), composite=None), path)
    assert load_stack(path) == a_stack(layers=(), composite=None)
    assert os.listdir(path.parent) == [path.name]


def test_the_suffix_may_be_large_and_the_path_text(tmp_path):
    save_stack(a_stack(), f"{tmp_path}/A.PSD")
    assert load_stack(f"{tmp_path}/A.PSD") == a_stack()


# ------------------------------------------------------------------ other readers

NAMES = ["at night", "a red car", "a yellow star & <moon> ☾", "a boat", ""]
PLACES = [(0, 0), (3, -2), (0, 0), (-20, 1), (0, 0)]


def close(first: Image.Image, second: Image.Image) -> bool:
    """Equal but for rounding, which may add up over the layers."""
    difference = numpy.asarray(first, dtype=int) - numpy.asarray(second, dtype=int)
    return bool(numpy.abs(difference).max() <= 2)


def test_psd_tools_sees_the_layers_and_the_same_picture(tmp_path):
    save_stack(a_stack(), tmp_path / "a.psd")
    psd = PSDImage.open(tmp_path / "a.psd")
    assert (psd.size, psd.channels) == ((WIDTH, HEIGHT), 3)
    assert [layer.name for layer in psd] == NAMES
    assert [layer.offset for layer in psd] == PLACES
    assert [layer.opacity for layer in psd] == [255, 255, 128, 255, 255]
    assert [layer.visible for layer in psd] == [True, True, True, False, True]
    assert psd[1].topil() == noise(1)
    flat = a_stack().flatten()
    assert close(psd.composite(ignore_preview=True).convert("RGB"), flat)
    assert close(psd.composite(), flat)
    assert b'a car, "a star" &amp; a boat' in psd.image_resources.get_data(1060)


def test_pillow_sees_the_layers_of_a_psd(tmp_path):
    layers = (*a_stack().layers[:2], StackLayer("a tree", noise(5)))
    save_stack(a_stack(layers=layers), tmp_path / "a.psd")
    with Image.open(tmp_path / "a.psd") as image:
        assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
        assert close(image.copy(), a_stack(layers=layers).flatten())
        read = [(name, mode, box) for name, mode, box, _ in image.layers]
        assert [name for name, _, _ in read] == ["at night", "a red car", "?", "a tree"]
        assert [box for _, _, box in read][:2] == [(0, 0, 8, 6), (3, -2, 11, 4)]
        assert {mode for _, mode, _ in read} == {"RGBA"}
        image.seek(4)
        # Pillow takes the channels for R, G, B, A as they come; Photoshop's alpha comes first.
        assert numpy.array_equal(numpy.roll(image, -1, axis=2), noise(5))


def test_an_ora_is_as_the_specification_says(tmp_path):
    save_stack(a_stack(), tmp_path / "a.ora")
    # The type of the file is at byte 38, not compressed, so that tools can see it.
    assert (tmp_path / "a.ora").read_bytes()[30:54] == b"mimetypeimage/openraster"
    with zipfile.ZipFile(tmp_path / "a.ora") as archive:
        assert archive.testzip() is None
        assert archive.infolist()[0].compress_type == zipfile.ZIP_STORED
        image = ElementTree.fromstring(archive.read("stack.xml"))
        layers = image.findall("stack/layer")[::-1]  # a stack lists the frontmost first
        assert (image.tag, image.get("w"), image.get("h")) == ("image", "8", "6")
        assert [layer.get("name") for layer in layers] == NAMES
        assert [(int(layer.get("x")), int(layer.get("y"))) for layer in layers] == PLACES
        assert float(layers[2].get("opacity")) == 128 / 255
        assert [layer.get("visibility") for layer in layers[2:4]] == ["visible", "hidden"]
        pictures = [Image.open(archive.open(layer.get("src"))) for layer in layers]
        assert numpy.array_equal(pictures[1], noise(1))
        merged = Image.open(archive.open("mergedimage.png"))
        assert numpy.array_equal(merged, a_stack().flatten())
        assert Image.open(archive.open("Thumbnails/thumbnail.png")).size == (WIDTH, HEIGHT)


def test_a_folder_says_its_layers_in_json(tmp_path):
    save_stack(a_stack(), tmp_path / "a")
    names = ["at-night", "a-red-car", "a-yellow-star-moon", "a-boat"]
    files = [f"layer-{number:02}-{name}.png" for number, name in enumerate(names)]
    assert sorted(os.listdir(tmp_path / "a")) == sorted(
        [*files, "layer-04.png", "composite.png", "stack.json"]
    )
    fields = json.loads((tmp_path / "a" / "stack.json").read_text())
    assert fields["layers"][1] == {
        "name": "a red car", "file": files[1], "x": 3, "y": -2, "opacity": 1.0, "hidden": False,
    }  # fmt: skip
    assert numpy.array_equal(Image.open(tmp_path / "a" / files[1]), noise(1))


# ------------------------------------------------------------------ files of other programs


def a_psd(*places: tuple[int, int, int, int], mode: str = "RGB", **kinds: object) -> PSDImage:
    """Layers of one colour (10, 20, 30) in boxes of left, top, width, height."""
    psd = PSDImage.new(mode, (WIDTH, HEIGHT), **kinds)
    for left, top, width, height in places:
        colour = numpy.full((height, width, 3), (10, 20, 30), numpy.uint8)
        psd.create_pixel_layer_from_array(colour, left=left, top=top, name="x")
    return psd


WHOLE = (0, 0, WIDTH, HEIGHT)


def test_small_layers_are_put_on_the_canvas_with_what_lies_outside(tmp_path):
    a_psd(WHOLE, (2, 3, 2, 1), (-1, 5, 3, 2), (-5, 0, 20, 1)).save(tmp_path / "a.psd")
    stack = load_stack(tmp_path / "a.psd")
    assert (stack.background_prompt, stack.background.getpixel((0, 0))) == ("x", (10, 20, 30))
    assert [layer.offset for layer in stack.layers] == [(0, 0), (-1, 1), (0, 0)]
    boxes = [layer.image.getbbox() for layer in stack.layers]
    assert boxes == [(2, 3, 4, 4), (0, 4, 3, 6), (0, 0, 8, 1)]
    assert stack.layers[1].box == (0, 5 / 6, 2 / 8, 1)


@pytest.mark.parametrize("change", [{"opacity": 100}, {"visible": False}, {"top": 1}])
def test_a_lowest_layer_that_does_not_cover_is_a_layer_on_white(change, tmp_path):
    psd = a_psd(WHOLE)
    for name, value in change.items():
        setattr(psd[0], name, value)
    psd.save(tmp_path / "a.psd")
    stack = load_stack(tmp_path / "a.psd")
    assert stack.background == Image.new("RGB", (WIDTH, HEIGHT), "white")
    assert [layer.prompt for layer in stack.layers] == ["x"]


def test_a_composite_of_another_size_is_left_out(tmp_path):
    save_stack(a_stack(), tmp_path / "a")
    noise(4).resize((4, 6)).save(tmp_path / "a" / "composite.png")
    with pytest.warns(UserWarning, match="the composite has another size than the layers"):
        assert load_stack(tmp_path / "a") == a_stack(composite=None)


def test_fill_is_an_opacity_and_an_empty_layer_is_empty(tmp_path):
    psd = a_psd(WHOLE, WHOLE, WHOLE)
    psd[1].opacity, psd[1].fill_opacity = 102, 51
    psd[2]._record.right = psd[2]._record.bottom = 0
    for channel in psd[2]._channels:
        channel.data = b""
    for info in psd[2]._record.channel_info:
        info.length = 2
    psd._updated = False
    psd.save(tmp_path / "a.psd")
    stack = load_stack(tmp_path / "a.psd")
    assert stack.layers[0].opacity == pytest.approx(0.4 * 0.2)
    assert stack.layers[1].box is None


# ------------------------------------------------------------------ what is refused


def refusal(path: Path) -> str:
    with pytest.raises(StackError) as caught:
        load_stack(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 300
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("function", [load_stack, lambda path: save_stack(a_stack(), path)])
def test_an_unknown_suffix_is_refused(function, tmp_path):
    wanted = "a.xcf: .xcf is no format for layers; use .psd, .ora, or a folder without a suffix"
    with pytest.raises(StackError, match=wanted):
        function(tmp_path / "a.xcf")
    assert not os.listdir(tmp_path)


def test_a_missing_psd_tools_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psd_tools", None)
    for function in (load_stack, lambda path: save_stack(a_stack(), path)):
        with pytest.raises(ImportError, match="a .psd needs psd-tools: pip install psd-tools"):
            function(tmp_path / "a.psd")
    assert not os.listdir(tmp_path)
    save_stack(a_stack(), tmp_path / "a.ora")  # needs none


def test_an_old_psd_tools_is_named(tmp_path, monkeypatch):
    monkeypatch.delattr(GroupMixin, "create_pixel_layer_from_array")
    with pytest.raises(ImportError, match="needs psd-tools 1.25 or later, which needs Python 3.11"):
        load_stack(tmp_path / "a.psd")


def test_a_name_too_long_for_a_psd_is_refused(tmp_path):
    stack = a_stack().changed(0, prompt="x" * 256)
    with pytest.raises(StackError, match="name of 256 characters, but a .psd has at most 255; sho"):
        save_stack(stack, tmp_path / "a.psd")
    assert not os.listdir(tmp_path)
    save_stack(stack, tmp_path / "a.ora")
    assert load_stack(tmp_path / "a.ora") == stack


def test_too_many_pixels_are_neither_written_nor_read(path, monkeypatch):
    save_stack(a_stack(), path)
    monkeypatch.setattr(export, "MOST_PIXELS", 5 * WIDTH * HEIGHT)
    load_stack(path)
    monkeypatch.setattr(export, "MOST_PIXELS", 5 * WIDTH * HEIGHT - 1)
    assert refusal(path) == "the layers have more than 239 pixels in all; make them smaller"
    with pytest.raises(StackError, match="the layers have more than 239 pixels"):
        save_stack(a_stack(caption="new"), path)


def test_a_text_that_no_xml_can_hold_is_refused_before():
    with pytest.raises(StackError, match="caption is .* is no character to be read"):
        a_stack(caption="a\uffff")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_what_was_there(path, there, monkeypatch):
    if there:
        save_stack(a_stack(), path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_stack(a_stack(layers=()), path)
    assert caught.value.filename == str(path)
    assert os.listdir(path.parent) == ([path.name] if there else [])
    if there:
        assert load_stack(path) == a_stack()


def test_a_missing_folder_and_a_file_in_the_place_of_a_folder(path):
    with pytest.raises(FileNotFoundError):
        save_stack(a_stack(), path.parent / "gone" / path.name)
    assert refusal(path) == "cannot be read: No such file or directory"
    if path.suffix:
        path.mkdir()
        wanted = "it is a folder, but should be a file"
    else:
        path.write_text("mine")
        wanted = "it is a file, but should be a folder"
    with pytest.raises(OSError, match=wanted):
        save_stack(a_stack(), path)
    assert refusal(path).startswith("cannot be read: ")
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (["notes.txt"], "it is a folder with 'notes.txt', not of a stack; name another folder"),
        (["stack.json", "me.png"], "it is a folder with 'me.png', not of a stack"),
        (["layer-1.png"], "it is a folder with no stack.json, not of a stack"),
    ],
)
def test_a_folder_with_other_files_is_not_replaced(files, fault, tmp_path):
    (tmp_path / "a").mkdir()
    for name in files:
        (tmp_path / "a" / name).write_text("mine")
    with pytest.raises(StackError, match=fault):
        save_stack(a_stack(), tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == sorted(files)
    save_stack(a_stack(), tmp_path / "b")
    (tmp_path / "c").mkdir()
    save_stack(a_stack(), tmp_path / "c")  # an empty folder is in nobody's way


@pytest.mark.parametrize("keep", [0, 10, 30, 100, 400, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", FORMATS[:2])
def test_a_file_that_was_cut_off_is_refused(name, keep, tmp_path):
    save_stack(a_stack(), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    length = int(keep * len(data)) if isinstance(keep, float) else keep
    (tmp_path / name).write_bytes(data[:length])
    assert refusal(tmp_path / name)


def test_a_psd_of_zipped_channels_is_read_but_damaged_it_is_not_black(tmp_path):
    psd = PSDImage.new("RGB", (WIDTH, HEIGHT))
    array = numpy.asarray(noise(1))
    psd.create_pixel_layer_from_array(array, compression=Compression.ZIP)
    psd.save(tmp_path / "a.psd")
    assert load_stack(tmp_path / "a.psd").layers[0].image == noise(1)
    data = bytearray((tmp_path / "a.psd").read_bytes())
    data[data.index(zlib.compress(array[..., 0].tobytes())[:9]) + 4] ^= 255
    (tmp_path / "a.psd").write_bytes(data)
    assert refusal(tmp_path / "a.psd").startswith("cannot be read: ZIP decode failed (")


@pytest.mark.parametrize(
    ("psd", "fault"),
    [
        (a_psd(), "it has no layers; a picture alone is no stack"),
        (PSDImage.new("CMYK", (8, 6)), "it is CMYK with 8 bits, but should be RGB with 8; convert"),
        (PSDImage.new("L", (8, 6)), "it is GRAYSCALE with 8 bits, but should be RGB with 8"),
        (a_psd(WHOLE, depth=16), "it is RGB with 16 bits, but should be RGB with 8; convert it"),
    ],
)
def test_a_psd_of_another_kind_is_refused(psd, fault, tmp_path):
    psd.save(tmp_path / "a.psd")
    assert refusal(tmp_path / "a.psd").startswith(fault)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda psd: psd.create_group([psd[1]], name="both"), "layer 'both' is a group; merge or"),
        (lambda psd: setattr(psd[1], "blend_mode", BlendMode.MULTIPLY), "is blended by MULTIPLY; "),
        (lambda psd: setattr(psd[1], "clipping", True), "layer 'x' is clipped by the layer below"),
        (lambda psd: psd[1].create_mask(Image.new("L", (8, 6))), "layer 'x' has a mask; merge or"),
    ],
)
def test_what_a_stack_has_not_is_refused(change, fault, tmp_path):
    psd = a_psd(WHOLE, WHOLE)
    change(psd)
    psd.save(tmp_path / "a.psd")
    assert fault in refusal(tmp_path / "a.psd")


IMAGE = '<image w="8" h="6"><stack>{}</stack></image>'
LAYER = '<layer src="a.png" {}/>'
A_LAYER = IMAGE.format(LAYER.format(""))
BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>' + IMAGE.format("&b;")
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + IMAGE.format("&a;")


@pytest.mark.parametrize(
    ("xml", "fault"),
    [
        (None, "it has no 'stack.xml' in it"),
        ("<image", "cannot be read: unclosed token"),
        ("<svg/>", "its stack.xml has no <image> with a <stack>"),
        (BOMB, "its XML has a document type; leave it out"),
        (BOMB.encode("utf-16"), "its XML has a document type; leave it out"),
        (OUTSIDE, "its XML has a document type; leave it out"),
        ("<!--" + 2**20 * "x" + "-->", "its 'stack.xml' is larger than 1 MB"),
        (IMAGE.format(""), "it has no layers; a picture alone is no stack"),
        (A_LAYER.replace("8", "0"), "its size is (0, 6), but should be two whole numbers above 0"),
        (A_LAYER.replace("8", "1e9"), "w of a <image> is '1e9', but should be a whole number"),
        (A_LAYER.replace("8", "9" * 5000), "w of a <image> is '9999"),
        (A_LAYER.replace("8", "999999999"), "the layers have more than 134,217,728 pixels in all"),
        (IMAGE.format('<layer name="a" src="../a.png"/>'), "it has no '../a.png' in it"),
        (IMAGE.format('<layer name="a"/>'), "it has no '' in it"),
        (IMAGE.format('<layer src="stack.xml" name="a"/>'), "layer 'a' is no image file of these"),
        (IMAGE.format('<stack name="a"/>'), "layer 'a' is a group; merge it into a layer first"),
        (IMAGE.format('<text name="a"/>'), "layer 'a' is a <text>; merge it into a layer first"),
        (IMAGE.format(LAYER.format('composite-op="svg:plus"')), "is blended by 'svg:plus', but sh"),
        (IMAGE.format(LAYER.format('visibility="no"')), "visibility is 'no', but should be vis"),
        (IMAGE.format(LAYER.format('opacity="half"')), "opacity is 'half', but should be 0 to 1"),
        (IMAGE.format(LAYER.format('opacity="nan"')), "opacity is nan, but should be a number fr"),
        (IMAGE.format(LAYER.format('x="0.5"')), "x of a <layer> is '0.5', but should be a whole"),
        (IMAGE.format(LAYER.format('y="99999999"')), "offset is (0, 99999999), but should be two"),
    ],
    ids=range(23),
)
def test_a_damaged_or_malicious_ora_is_refused(xml, fault, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ora", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png_of(noise(0)))
        if xml is not None:
            archive.writestr("stack.xml", xml)
    assert fault in refusal(tmp_path / "a.ora")


def test_a_zip_bomb_and_a_bomb_of_pixels_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(pictures, "MOST_BYTES", 2**20)
    for data, fault in [
        (2**20 * b"\0" + b"\0", "its 'a.png' is larger than 1 MB"),
        (png_of(Image.new("L", (100, 100))), "layer '' has more than 1,000 pixels"),
    ]:
        with zipfile.ZipFile(tmp_path / "a.ora", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", data)
            archive.writestr("stack.xml", IMAGE.format(LAYER.format("")))
        assert refusal(tmp_path / "a.ora") == fault


def test_a_wrong_checksum_and_a_file_that_is_no_zip_are_refused(tmp_path):
    save_stack(a_stack(), tmp_path / "a.ora")
    data = bytearray((tmp_path / "a.ora").read_bytes())
    data[data.index(b"IDAT") + 9] ^= 1
    (tmp_path / "a.ora").write_bytes(data)
    assert "Bad CRC-32" in refusal(tmp_path / "a.ora")
    (tmp_path / "a.ora").write_bytes(png_of(noise(0)))
    assert refusal(tmp_path / "a.ora") == "cannot be read: File is not a zip file"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda fields: [], "its stack.json should have version, size, caption and layers"),
        (lambda fields: fields | {"size": [8]}, "its stack.json should have version, size"),
        (lambda fields: fields | {"size": [8, -6]}, "its size is (8, -6), but should be two whole"),
        (
            lambda fields: fields | {"size": [10**9] * 2},
            "the layers have more than 134,217,728 pix",
        ),
        (lambda fields: fields | {"version": 2}, "its version is 2, but this package reads vers"),
        (lambda fields: fields | {"caption": 5}, "caption is 5, but should be text"),
        (lambda fields: fields | {"layers": [5]}, "layer 0 should have name, file, x, y, opacity"),
        (lambda fields: fields["layers"][1].pop("x"), "layer 1 should have name, file, x, y, opac"),
        (lambda fields: fields["layers"][1].update(x=0.5), "offset is (0.5, -2), but should be"),
        (lambda fields: fields["layers"][1].update(hidden="no"), "hidden is 'no', but should be"),
        (lambda fields: fields["layers"][1].update(opacity=2), "opacity is 2, but should be a num"),
        (
            lambda fields: fields["layers"][1].update(name=None),
            "prompt is None, but should be text",
        ),
        (lambda fields: fields["layers"][1].update(file="../a.png"), "file is '../a.png', but sho"),
        (lambda fields: fields["layers"][1].update(file="/etc/passwd"), "file is '/etc/passwd', b"),
        (lambda fields: fields["layers"][1].update(file="b.png"), "b.png', but there is no such"),
    ],
    ids=range(15),
)
def test_a_damaged_folder_is_refused(change, fault, tmp_path):
    path = tmp_path / "a"
    save_stack(a_stack(), path)
    fields = json.loads((path / "stack.json").read_text())
    changed = change(fields)
    if not isinstance(changed, dict | list):
        changed = fields
    (path / "stack.json").write_text(json.dumps(changed))
    assert fault in refusal(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "\ud800"])
def test_what_is_no_json_is_refused(text, tmp_path):
    (tmp_path / "a").mkdir()
    assert refusal(tmp_path / "a") == "it has no stack.json in it"
    (tmp_path / "a" / "stack.json").write_text(text, errors="surrogatepass")
    assert refusal(tmp_path / "a").startswith("cannot be read: ")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_bytes_are_read_or_refused_in_one_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / data.draw(st.sampled_from(FORMATS[:2]))
    save_stack(a_stack(layers=a_stack().layers[:1]), path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with contextlib.suppress(StackError):
        load_stack(path)


def test_the_same_stack_is_the_same_file(tmp_path):
    assert export.ora_of(a_stack()) == export.ora_of(a_stack())
    assert export._psd_of(a_stack()) == export._psd_of(a_stack())
