import dataclasses
import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from malformed import EXAMPLES, check_malformed, malformed
from PIL import Image

from lrd_helpers.layout import Layer, Layout, LayoutError
from lrd_helpers.layout_json import (
    LARGEST,
    box_from_centre,
    box_from_coco,
    box_from_pixels,
    box_from_thousandths,
    box_from_xywh,
    box_to_coco,
    box_to_thousandths,
)
from lrd_helpers.mask import Mask

RED_CAR = Layer("a red car", box=(0.05, 0.5, 0.5, 0.9))
TWO = Layout(
    caption="a red car and a yellow star at night",
    background="at night",
    layers=[RED_CAR, Layer("a yellow star", box=(0.6, 0.05, 0.95, 0.4), colour="#ffff00")],
)


def spans() -> st.SearchStrategy[tuple[float, float]]:
    numbers = st.floats(0, 1)
    return st.tuples(numbers, numbers).map(sorted).filter(lambda span: span[0] < span[1])


texts = st.text(st.characters(exclude_categories=("Cc", "Cs")))


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    pixels = np.zeros(height * width, bool)
    pixels[draw(st.lists(st.integers(0, height * width - 1), min_size=1))] = True
    return Mask.of(pixels.reshape(height, width))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    (x0, x1), (y0, y1) = draw(spans()), draw(spans())
    shape = draw(masks()) if draw(st.booleans()) else None
    start = draw(st.just(0.0) | st.floats(0, 0.9))
    return Layer(
        draw(texts.filter(str.strip)),
        box=(x0, y0, x1, y1) if shape is None else None,
        mask=shape,
        start=start,
        end=draw(st.none() | st.floats(start, 1, exclude_min=True)),
        negative_prompt=draw(st.none() | texts),
        colour=draw(st.none() | st.sampled_from(["red", "#123abc"])),
        word=draw(st.none() | st.just("car")),
        strength=draw(st.floats(-10, 10)),
    )


layouts = st.builds(
    Layout,
    texts.filter(str.strip),
    background=texts,
    layers=st.lists(layers(), min_size=1, max_size=5),
)
sides = st.integers(1, 20)


# ------------------------------------------------------------------ masks


@given(layouts, sides, sides)
def test_visible_masks_partition_the_canvas(layout: Layout, height: int, width: int) -> None:
    masks = layout.masks(height, width)
    assert masks.shape == (len(layout.layers) + 1, height, width)
    assert torch.equal(masks.sum(0), torch.ones(height, width))
    assert set(masks.unique().tolist()) <= {0.0, 1.0}


@given(layouts, sides, sides)
def test_later_layers_are_in_front(layout: Layout, height: int, width: int) -> None:
    masks = layout.masks(height, width).bool()
    hidden = torch.zeros(height, width, dtype=torch.bool)
    for number in reversed(range(len(layout.layers))):
        own = layout.layers[number].cells(height, width)
        assert torch.equal(masks[number + 1], own & ~hidden)
        hidden |= own
    assert torch.equal(masks[0], ~hidden)


@given(layers(), sides, sides)
def test_no_layer_is_lost_by_rounding(layer: Layer, height: int, width: int) -> None:
    assert layer.cells(height, width).any()


def test_a_cell_belongs_to_a_box_that_holds_its_centre() -> None:
    mask = Layer("a ball", box=(0.125, 0.0, 0.63, 0.37)).cells(4, 4)
    # Centres lie at 0.125, 0.375, 0.625, 0.875; an edge on a centre counts on the low side only.
    assert mask.nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]


def test_a_box_thinner_than_a_cell_covers_the_cell_of_its_middle() -> None:
    assert Layer("a ball", box=(0.55, 0.99, 0.56, 1.0)).cells(4, 4).nonzero().tolist() == [[3, 2]]


def test_boxes_with_a_common_edge_leave_no_gap_and_do_not_overlap() -> None:
    left, right = Layer("a", box=(0, 0, 1 / 3, 1)), Layer("b", box=(1 / 3, 0, 1, 1))
    for width in range(2, 40):
        total = left.cells(1, width).int() + right.cells(1, width).int()
        assert torch.equal(total, torch.ones(1, width, dtype=torch.int)), width


LEFT, RIGHT = Layer("a", box=(0, 0, 0.75, 1)), Layer("b", box=(0.25, 0, 1, 0.5))
OVERLAPPING = Layout("c", layers=[LEFT, RIGHT])


@given(layouts, sides, sides, st.sampled_from(["small_over_large", "mean", "weighted"]))
def test_every_overlap_rule_partitions_the_canvas(layout, height, width, overlap) -> None:
    masks = layout.masks(height, width, overlap=overlap)
    assert torch.allclose(masks.sum(0), torch.ones(height, width))
    assert masks.min() >= 0
    # Where no two layers meet, all rules are one.
    alone = torch.stack([layer.cells(height, width) for layer in layout.layers]).sum(0) < 2
    assert torch.equal(masks[:, alone], layout.masks(height, width)[:, alone])


def test_overlap_rules() -> None:
    both = (slice(0, 2), slice(1, 3))  # of 4 × 4 cells, the ones that both cover
    over = OVERLAPPING.masks(4, 4)
    assert over[1][both].sum() == 0
    assert over[2][both].sum() == 4
    small = Layout("c", layers=[RIGHT, LEFT]).masks(4, 4, overlap="small_over_large")
    assert small[1][both].sum() == 4, "the smaller one is in front although it is first"
    mean = OVERLAPPING.masks(4, 4, overlap="mean")
    assert torch.equal(mean[1][both], torch.full((2, 2), 0.5))
    assert torch.equal(mean[2][both], torch.full((2, 2), 0.5))
    weighted = OVERLAPPING.masks(4, 4, overlap="weighted")
    # The left half of the overlap is nearer to the left layer's middle, the right half further.
    assert weighted[1][0, 1] > weighted[1][0, 2]
    assert weighted[2][0, 2] > weighted[2][0, 1]
    # By hand for the cell whose centre is (0.375, 0.125): exp(−8 |(c − middle) / size|²).
    a = np.exp(-8 * (0 + (0.375 / 1) ** 2))
    b = np.exp(-8 * ((0.25 / 0.75) ** 2 + (0.125 / 0.5) ** 2))
    assert float(weighted[1][0, 1]) == pytest.approx(a / (a + b), rel=1e-5)
    with pytest.raises(ValueError, match="overlap is 'under', but should be one of over, small_ov"):
        OVERLAPPING.masks(4, 4, overlap="under")


@pytest.mark.parametrize(
    ("overlap", "opacities", "shares"),
    [  # of the background, the left layer and the right one, where both are
        ("over", (1, 1), (0, 0, 1)),
        ("over", (1, 0.25), (0, 0.75, 0.25)),
        ("over", (0.5, 0.25), (0.375, 0.375, 0.25)),
        ("over", (0.5, 0), (0.5, 0.5, 0)),
        ("over", (0.5, 1), (0, 0, 1)),
        ("small_over_large", (0.5, 0.25), (0.375, 0.375, 0.25)),
        ("mean", (1, 0.5), (0.25, 0.5, 0.25)),
        ("mean", (0, 0), (1, 0, 0)),
    ],
)
def test_a_layer_with_an_opacity_leaves_the_rest_to_what_lies_behind(overlap, opacities, shares):
    layers = [
        dataclasses.replace(layer, opacity=opacity)
        for layer, opacity in zip((LEFT, RIGHT), opacities, strict=True)
    ]
    masks = Layout("c", layers=layers).masks(4, 4, overlap=overlap)
    assert masks[:, 0, 1].tolist() == list(shares)
    assert torch.equal(masks[:, 0, 0], torch.tensor([1 - opacities[0], opacities[0], 0]))
    assert torch.equal(masks.sum(0), torch.ones(4, 4))


# ------------------------------------------------------------------ masks of pixels

RING = np.ones((8, 8), bool)
RING[2:6, 2:6] = False


@given(masks())
def test_a_mask_is_its_pixels(mask: Mask) -> None:
    pixels = mask.pixels()
    assert Mask.of(pixels) == Mask.of(pixels.numpy()) == Mask.of(pixels.float() * 255) == mask
    assert Mask.of(mask.image()) == Mask.of(mask.to_text()) == mask
    assert torch.equal(mask.cells(mask.height, mask.width), pixels)


def test_masks_in_all_their_forms(tmp_path: Path) -> None:
    cut_out = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    cut_out.putalpha(Image.fromarray(RING))
    cut_out.save(tmp_path / "ring.png")
    expected = Mask.of(RING)
    given = [cut_out, tmp_path / "ring.png", str(tmp_path / "ring.png"), RING.astype(float)]
    given += [RING.astype(np.uint8), torch.from_numpy(RING), RING.tolist(), expected.to_text()]
    for value in given:
        layer = Layer("a ring", mask=value)
        assert layer.mask == expected, value
        assert torch.equal(layer.cells(8, 8), torch.from_numpy(RING))
    assert layer.bounding_box == (0, 0, 1, 1)
    assert Layer("a dot", mask=np.eye(4)[1:2]).bounding_box == (0.25, 0, 0.5, 1)


def test_a_cell_belongs_to_a_mask_that_covers_half_of_it() -> None:
    pixels = np.zeros((4, 4), bool)
    pixels[0, :2] = pixels[3, 3] = True
    cells = Layer("a", mask=pixels).cells(2, 2)
    assert cells.tolist() == [[True, False], [False, False]]
    pixels[0, :2] = False
    assert Layer("a", mask=pixels).cells(2, 2).tolist() == [[False, False], [False, True]]


def test_a_mask_file_is_relative_to_the_layout_file(tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    Mask.of(RING).image().save(tmp_path / "shapes" / "ring.png")
    text = '{"caption": "c", "layers": [{"prompt": "a ring", "mask": "shapes/ring.png"}]}'
    (tmp_path / "layout.json").write_text(text)
    layout = Layout.load(tmp_path / "layout.json")
    assert layout.layers[0].mask == Mask.of(RING)
    layout.save(tmp_path / "again.json")
    (tmp_path / "shapes" / "ring.png").unlink()
    assert Layout.load(tmp_path / "again.json") == layout, "the mask is in the file itself"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((4, 4)), "mask is empty: no pixel of it is set"),
        (np.zeros((3, 4, 4)), "mask is an array of shape (3, 4, 4), but should be a picture"),
        (np.full((2, 2), np.nan), "mask has values outside 0 to 1"),
        (np.full((2, 2), -1), "mask has values outside 0 to 1"),
        ([[1, 0], [1]], "mask is ((1, 0), (1,)), but should be a picture of yes and no"),
        (3, "mask is 3, but should be a picture of yes and no"),
        ("gone.png", "mask is 'gone.png', but there is no such file"),
        (Path(__file__), "which is no image file"),
        (Path(__file__).parent, "which cannot be read"),
        ("data:image/png;base64,AAAA", "mask begins with 'data:' but is no picture"),
        ("data:image/png;base64,=", "mask begins with 'data:' but is no picture"),
    ],
)  # fmt: skip
def test_bad_masks(mask: object, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout("c", layers=[RED_CAR, {"prompt": "a ball", "mask": mask}])
    assert message in str(caught.value)
    assert str(caught.value).startswith("layer 2 'a ball', mask ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "layer 'a cat' has neither a box nor a mask; give one of them"),
        ({"box": (0, 0, 1, 1), "mask": RING}, "layer 'a cat' has both a box and a mask"),
        ({"box": (0, 0, 1, 1), "start": 0.6, "end": 0.4}, "layer 'a cat' ends at 0.4 of the steps, "
         "but starts at 0.6; end should be later than start"),
        ({"box": (0, 0, 1, 1), "start": -0.1}, "layer 'a cat', start is -0.1, but should be a"),
        ({"box": (0, 0, 1, 1), "end": 25}, "layer 'a cat', end is 25, but should be a share of"),
        ({"box": (0, 0, 1, 1), "opacity": 1.4}, "layer 'a cat', opacity is 1.4, but should be a "
         "number from 0 (not seen) to 1"),
        ({"box": (0, 0, 1, 1), "opacity": -1e-9}, "layer 'a cat', opacity is -1e-09, but should"),
        ({"box": (0, 0, 1, 1), "opacity": float("nan")}, "layer 'a cat', opacity is nan, but"),
        ({"box": (0, 0, 1, 1), "opacity": "50 %"}, "layer 'a cat', opacity is '50 %', but should"),
        ({"box": (0, 0, 1, 1), "opacity": True}, "layer 'a cat', opacity is True, but should be"),
        ({"box": (0, 0, 1, 1), "opacity": None}, "layer 'a cat', opacity is None, but should be"),
        ({"box": (0, 0, 1, 1), "end": True}, "layer 'a cat', end is True, but should be a share"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(fields: dict, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layer("a cat", **fields)
    assert message in str(caught.value)


# ------------------------------------------------------------------ JSON and files


@given(layouts, st.floats(0, 1))
def test_json_round_trip(layout: Layout, opacity: float) -> None:
    front = dataclasses.replace(layout.layers[-1], opacity=opacity)
    layout = dataclasses.replace(layout, layers=[*layout.layers[:-1], front])
    assert Layout.from_json(layout.to_json()) == layout
    assert ("opacity" in layout.to_json()) == (opacity < 1)


def test_json_is_as_one_would_write_it() -> None:
    text = TWO.to_json()
    assert '"version": 1' in text
    assert '"box": [0.05, 0.5, 0.5, 0.9]' in text
    assert text.count("colour") == 1, "defaults are left out"
    assert text.endswith("}\n")


def test_save_and_load(tmp_path: Path) -> None:
    TWO.save(tmp_path / "two.json")
    assert Layout.load(tmp_path / "two.json") == TWO
    assert os.listdir(tmp_path) == ["two.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layout.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        TWO.save(path)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["layout.json"]


def test_a_layout_is_a_value() -> None:
    assert pickle.loads(pickle.dumps(TWO)) == TWO
    assert len({TWO, dataclasses.replace(TWO)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        TWO.caption = "other"


# ------------------------------------------------------------------ bad input

BOX = "(x0, y0, x1, y1) with 0 ≤ x0 < x1 ≤ 1 and 0 ≤ y0 < y1 ≤ 1"


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((12, 40, 300, 500), "box is (12, 40, 300, 500), which is outside [0, 1]; if it is in "
         "pixels or 0–1000, divide x by the picture's width and y by its height, or all by 1000"),
        ((0, 0, 1, 1.00002), "box is (0, 0, 1, 1.00002), which is outside [0, 1]; (0, 0, 1, 1) is"),
        ((-0.1, 0.1, 0.6, 1.4), "outside [0, 1]; (0, 0.1, 0.6, 1) is the part inside"),
        ((1.2, 0.1, 1.4, 0.6), f"outside [0, 1]; use {BOX}"),
        ((0.6, 0.1, 0.3, 0.4), "whose corners are swapped; perhaps it is x, y, width, height "
         "(box_from_xywh), and the other boxes are suspect, too"),
        ((0.9, 0.8, 0.2, 0.2), "whose corners are swapped; perhaps it is centre, width, height "
         "(box_from_centre), and the other boxes are suspect, too"),
        ((0.5, 0.5, 0.5, 0.4), "which has no area; perhaps it is x, y, width, height "
         "(box_from_xywh) or centre, width, height (box_from_centre), and the other boxes are"),
        ((0.9, 0.1, 0.8, 0.9), "whose corners are swapped; (0.8, 0.1, 0.9, 0.9) would work"),
        ((0, 1, 0, 1), "which has no area; it should have x0 < x1 and y0 < y1"),
        ((1 + 1e-6, 0, 1 + 2e-6, 1), "which has no area"),
        ((float("nan"), 0.1, 0.6, 0.4), "box is (nan, 0.1, 0.6, 0.4), which is not a finite"),
        ((10**400, 0, 1, 1), "which is not a finite number everywhere"),
        ((0.1, 0.2, 0.3), f"box is (0.1, 0.2, 0.3), but should be four numbers {BOX}"),
        ("left", "box is 'left', but should be four numbers"),
        ({0.1, 0.2, 0.3, 0.4}, "but should be four numbers"),
        ([[0.1] * 10**6] * 4, "but should be four numbers"),
        ((0, 0, True, 1), "but should be four numbers"),
        (("0", "0", "1", "1"), "but should be four numbers"),
    ],
)  # fmt: skip
def test_bad_boxes(box: object, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout("c", layers=[RED_CAR, {"prompt": "a ball", "box": box}])
    assert message in str(caught.value)
    assert str(caught.value).startswith("layer 2 'a ball', box ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"caption": "a",}', "f.json: not JSON: "),
        ('{\n"caption" "a"}', "at line 2, column 11"),
        ("[1]", "f.json: not a layout: expected an object {…}"),
        ("[" * 100_000, "f.json: not a layout: it is nested too deeply"),
        ('{"caption": "a", "caption": "b"}', "f.json: 'caption' is given twice in one object"),
        ('{"caption": "a", "layers": [LAYER, {"box": 1, "b": 2, "box": 3}]}',
         "f.json: layer 2, 'box' is given twice in one object, and only one can count"),
        ('{"version": 2}', "f.json: version is 2, but this package reads version 1"),
        ('{"caption": "a"}', "f.json, layers is missing"),
        ('{"caption": "a", "layers": []}', "f.json, layers is empty; give at least one layer"),
        ('{"caption": "a", "layers": 3}', "f.json, layers is 3, but should be a list of layers"),
        ('{"caption": "a", "layers": [3]}', "f.json, layer 1 is 3, but should have prompt, box"),
        ('{"caption": " ", "layers": [LAYER]}', "f.json, caption is empty; say what"),
        ('{"caption": "a", "layers": [LAYER], "backgruond": ""}', "f.json, 'backgruond' is no "
         "known field (known: caption, background, layers); did you mean background?"),
        ('{"caption": "a", "layers": [LAYER], "background": 3}', "f.json, background is 3, but"),
        ('{"caption": "a", "layers": [LAYER, {"prompt": "a cat"}]}',
         "layer 2 'a cat' has neither a box nor a mask; give one of them, for example box="),
        ('{"caption": "a", "layers": [{"prompt": "", "box": [0, 0, 1, 1]}]}',
         "f.json, layer 1, prompt is empty; say what should be there"),
        ('{"caption": "a", "layers": [{"prompt": "a cat", "bx": [0, 0, 1, 1]}]}',
         "f.json, layer 1 'a cat', 'bx' is no known field (known: prompt, box, mask, "
         "negative_prompt, colour, word, strength, opacity, start, end); did you mean box?"),
        ('{"caption": "a", "layers": [{"prompt": "a cat", "box": [0, 0, NaN, 1]}]}',
         "f.json, layer 1 'a cat', box is (0, 0, nan, 1), which is not a finite number"),
        ('{"caption": "a", "layers": [{"prompt": "a cat", "box": [0, 0, 1, 1], "colour": "rad"}]}',
         "layer 1 'a cat', colour is 'rad', which is no colour name of CSS and no hex"),
        ('{"caption": "a", "layers": [{"prompt": "a cat", "box": [0, 0, 1, 1], '
         '"colour": "rgb(0, 999, 0)"}]}', "colour is 'rgb(0, 999, 0)', which is no colour"),
        ('{"caption": "a", "layers": [{"prompt": "a cat", "box": [0, 0, NUMBER, 1]}]}',
         "f.json, layer 1 'a cat', box is (0, 0, inf, 1), which is not a finite number"),
        ('{"version": -NUMBER, "caption": "a"}', "f.json: version is -inf, but this package"),
        ('{"caption": "a", "layers": [{"prompt": "a cat", "box": [0, 0, 1, 1], "strength": "1"}]}',
         "layer 1 'a cat', strength is '1', but should be a number"),
    ],
)  # fmt: skip
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(
        text.replace("LAYER", '{"prompt": "a cat", "box": [0, 0, 1, 1]}').replace(
            "NUMBER", 5000 * "9"
        )
    )
    with pytest.raises(LayoutError) as caught:
        Layout.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"gone.json: cannot be read: No such file"):
        Layout.load(tmp_path / "gone.json")
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\xff")
    with pytest.raises(LayoutError, match="picture.json: not JSON: it is not text in UTF-8"):
        Layout.load(tmp_path / "picture.json")
    with pytest.raises(LayoutError, match="^/dev/zero: cannot be read: it is a device, but should"):
        Layout.load("/dev/zero")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(LayoutError, match=r"large.json: cannot be read: it is larger than 16 MB"):
        Layout.load(tmp_path / "large.json")
    with pytest.raises(LayoutError, match="^not JSON to read: it is larger than 16 MB"):
        Layout.from_json(" " * (LARGEST + 1))


def test_a_file_name_in_a_message_is_short_and_on_one_line() -> None:
    file = "folder/" * 100 + "my\nlayout.json"
    with pytest.raises(LayoutError) as caught:
        Layout.from_json("{}", file=file)
    message = str(caught.value)
    assert message.startswith("…")
    assert message.endswith(r"/my\nlayout.json, caption is missing")
    assert len(message) == 300 - len("warning: ")


@pytest.mark.parametrize("field", ["caption", "background", "prompt", "negative_prompt", "word"])
def test_texts(field: str) -> None:
    def layout(text: str) -> str:
        layer = {"prompt": "a cat", "box": (0, 0, 1, 1)}
        fields = {"caption": "a cat", "layers": [layer]}
        (fields if field in ("caption", "background") else layer)[field] = text
        made = Layout(**fields)
        return getattr(made if field in ("caption", "background") else made.layers[0], field)

    assert layout(" a\r\n\tcat\u2028on\u00a0grass ") == "a cat on grass"
    assert layout("👩\u200d🚀 naïve 猫") == "👩\u200d🚀 naïve 猫"
    for text in ("a \ud800cat", "a cat\x00", "a\x1b[31m cat", "a\x9bcat"):
        with pytest.raises(LayoutError, match="is no character to be read; leave it out") as caught:
            layout(text)
        assert f"{field} is {text!r}, in which" in str(caught.value)
    with pytest.raises(
        LayoutError, match=f"{field} has 1000000 characters, but should have at most"
    ):
        layout("a" * 10**6)


def test_a_version_may_be_missing() -> None:
    text = '{"caption": "c", "layers": [{"prompt": "a red car", "box": [0.05, 0.5, 0.5, 0.9]}]}'
    assert Layout.from_json(text) == Layout("c", layers=[RED_CAR])


def test_mistakes_in_python_are_named_as_in_json() -> None:
    with pytest.raises(LayoutError, match=r"^layer 'a cat', 'bx' is no known field .* mean box\?$"):
        Layer("a cat", bx=(0, 0, 1, 1))
    with pytest.raises(LayoutError, match="^layer 'a cat', box is .* no area"):
        Layer("a cat", (0.5, 0, 0.5, 1))
    with pytest.raises(LayoutError, match="^layer 'a cat', mask must be given by name"):
        Layer("a cat", (0, 0, 1, 1), "a dog")
    with pytest.raises(LayoutError, match="^caption is empty"):
        dataclasses.replace(TWO, caption="")


# ------------------------------------------------------------------ malformed on purpose


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(malformed())
@example(
    (
        '{"caption": "a", "layers": [' + 20_000 * '{"prompt": "a", "box": [0, 0, 1, 1]},' + "3]}",
        ["layer 20001"],
    )
)
def test_malformed_layouts(case: tuple[str, list[str]]) -> None:
    check_malformed(*case, file="folder/f.json")


# ------------------------------------------------------------------ converters


@given(spans(), spans(), st.integers(1, 4000), st.integers(1, 4000))
def test_coco_boxes(
    horizontal: tuple[float, float], vertical: tuple[float, float], width: int, height: int
) -> None:
    (x0, x1), (y0, y1) = horizontal, vertical
    coco = (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)
    assert box_from_coco(coco, width, height) == pytest.approx((x0, y0, x1, y1))
    assert box_to_coco((x0, y0, x1, y1), width, height) == pytest.approx(coco)
    thousandths = box_to_thousandths((x0, y0, x1, y1))
    assert box_from_thousandths(thousandths) == pytest.approx((x0, y0, x1, y1))


@given(spans(), spans())
def test_boxes_by_their_size(
    horizontal: tuple[float, float], vertical: tuple[float, float]
) -> None:
    (x0, x1), (y0, y1) = horizontal, vertical
    width, height = x1 - x0, y1 - y0
    corners = pytest.approx((x0, y0, x1, y1), abs=1e-12)
    assert box_from_xywh((x0, y0, width, height)) == corners
    assert box_from_centre(((x0 + x1) / 2, (y0 + y1) / 2, width, height)) == corners


def test_boxes_in_pixels() -> None:
    assert box_from_pixels((64, 48, 320, 480), 640, 480) == (0.1, 0.1, 0.5, 1)


def test_rounding_outside_the_canvas_is_cut_off() -> None:
    yolo = box_from_centre((0.833333, 0.5, 0.333335, 1.00001))  # 1.0000005, −0.000005
    assert Layer("a cat", yolo).box == pytest.approx((0.6666655, 0, 1, 1), abs=1e-12)
    assert Layer("a cat", np.array([-1e-6, 0.5, 1, 1 + 9e-6])).box == (0, 0.5, 1, 1)


def test_boxes_in_thousandths_are_y_first() -> None:
    assert box_from_thousandths((100, 200, 300, 400)) == (0.2, 0.1, 0.4, 0.3)


# ------------------------------------------------------------------ the examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    layout = Layout.load(path)
    assert layout.to_json() == path.read_text(), "as Layout.save writes it"
    assert layout.background, path
    assert layout.caption.endswith(layout.background)
    for layer in layout.layers:
        assert layer.prompt in layout.caption
        assert 0.25 <= layer.box[2] - layer.box[0] <= 0.56
