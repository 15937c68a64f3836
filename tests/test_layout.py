import dataclasses
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrd_helpers.layout import (
    Layer,
    Layout,
    LayoutError,
    box_from_coco,
    box_from_thousandths,
)

RED_CAR = Layer("a red car", box=(0.05, 0.5, 0.5, 0.9))
TWO = Layout(
    caption="a red car and a yellow star at night",
    background="at night",
    layers=[RED_CAR, Layer("a yellow star", box=(0.6, 0.05, 0.95, 0.4), colour="#ffff00")],
)


def spans() -> st.SearchStrategy[tuple[float, float]]:
    numbers = st.floats(0, 1)
    return st.tuples(numbers, numbers).map(sorted).filter(lambda span: span[0] < span[1])


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    (x0, x1), (y0, y1) = draw(spans()), draw(spans())
    return Layer(
        draw(st.text(min_size=1).filter(lambda text: text.strip())),
        box=(x0, y0, x1, y1),
        negative_prompt=draw(st.none() | st.text()),
        colour=draw(st.none() | st.sampled_from(["red", "#123abc"])),
        strength=draw(st.floats(-10, 10)),
    )


layouts = st.builds(
    Layout,
    st.text(min_size=1).filter(lambda text: text.strip()),
    background=st.text(),
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
        own = layout.layers[number].mask(height, width)
        assert torch.equal(masks[number + 1], own & ~hidden)
        hidden |= own
    assert torch.equal(masks[0], ~hidden)


@given(layers(), sides, sides)
def test_no_layer_is_lost_by_rounding(layer: Layer, height: int, width: int) -> None:
    assert layer.mask(height, width).any()


def test_a_cell_belongs_to_a_box_that_holds_its_centre() -> None:
    mask = Layer("a ball", box=(0.125, 0.0, 0.63, 0.37)).mask(4, 4)
    # Centres lie at 0.125, 0.375, 0.625, 0.875; an edge on a centre counts on the low side only.
    assert mask.nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]


def test_a_box_thinner_than_a_cell_covers_the_cell_of_its_middle() -> None:
    assert Layer("a ball", box=(0.55, 0.99, 0.56, 1.0)).mask(4, 4).nonzero().tolist() == [[3, 2]]


def test_boxes_with_a_common_edge_leave_no_gap_and_do_not_overlap() -> None:
    left, right = Layer("a", box=(0, 0, 1 / 3, 1)), Layer("b", box=(1 / 3, 0, 1, 1))
    for width in range(2, 40):
        total = left.mask(1, width).int() + right.mask(1, width).int()
        assert torch.equal(total, torch.ones(1, width, dtype=torch.int)), width


# ------------------------------------------------------------------ JSON and files


@given(layouts)
def test_json_round_trip(layout: Layout) -> None:
    assert Layout.from_json(layout.to_json()) == layout


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
        ((12, 40, 300, 500), "box is (12, 40, 300, 500), which is outside [0, 1] and looks like "
         "pixels or 0–1000 coordinates; divide x by the picture's width and y by its height"),
        ((-0.1, 0.1, 0.6, 1.4), "outside [0, 1]; (0, 0.1, 0.6, 1) is the part inside"),
        ((1.2, 0.1, 1.4, 0.6), f"outside [0, 1]; use {BOX}"),
        ((0.6, 0.1, 0.3, 0.4), "whose corners are swapped (it should be " + BOX + "); "
         "(0.3, 0.1, 0.6, 0.4) would work, or (0.6, 0.1, 0.9, 0.5) if it is x, y, width, height"),
        ((0.6, 0.1, 0.6, 0.4), "box is (0.6, 0.1, 0.6, 0.4), which has no area"),
        ((float("nan"), 0.1, 0.6, 0.4), "box is (nan, 0.1, 0.6, 0.4), which is not a finite"),
        ((10**400, 0, 1, 1), "which is not a finite number everywhere"),
        ((0.1, 0.2, 0.3), f"box is (0.1, 0.2, 0.3), but should be four numbers {BOX}"),
        ("left", "box is 'left', but should be four numbers"),
        ((0, 0, True, 1), "but should be four numbers"),
        (("0", "0", "1", "1"), "but should be four numbers"),
        (None, "box is None, but should be four numbers"),
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
        ('{"caption": "a", "caption": "b"}', "f.json: caption is given twice in one object"),
        ('{"version": 2}', "f.json: version is 2, but this package reads version 1"),
        ('{"caption": "a"}', "f.json, layers is missing"),
        ('{"caption": "a", "layers": []}', "f.json, layers is empty; give at least one layer"),
        ('{"caption": "a", "layers": 3}', "f.json, layers is 3, but should be a list of layers"),
        ('{"caption": "a", "layers": [3]}', "f.json, layer 1 is 3, but should have prompt, box"),
        ('{"caption": " ", "layers": [LAYER]}', "f.json, caption is empty; say what"),
        ('{"caption": "a", "layers": [LAYER], "backgruond": ""}', "f.json, backgruond is no known "
         "field (known: caption, background, layers); did you mean background?"),
        ('{"caption": "a", "layers": [LAYER], "background": 3}', "f.json, background is 3, but"),
        ('{"caption": "a", "layers": [LAYER, {"prompt": "a cat"}]}', "layer 2 'a cat', box is mis"),
        ('{"caption": "a", "layers": [{"prompt": "", "box": [0, 0, 1, 1]}]}',
         "f.json, layer 1, prompt is empty; say what should be there"),
        ('{"caption": "a", "layers": [{"prompt": "a cat", "bx": [0, 0, 1, 1]}]}',
         "f.json, layer 1 'a cat', bx is no known field (known: prompt, box, negative_prompt, "
         "colour, strength); did you mean box?"),
        ('{"caption": "a", "layers": [{"prompt": "a cat", "box": [0, 0, NaN, 1]}]}',
         "f.json, layer 1 'a cat', box is (0, 0, nan, 1), which is not a finite number"),
        ('{"caption": "a", "layers": [{"prompt": "a cat", "box": [0, 0, 1, 1], "colour": "rad"}]}',
         "layer 1 'a cat', colour is 'rad', which is no colour name of CSS and no hex"),
        ('{"caption": "a", "layers": [{"prompt": "a cat", "box": [0, 0, 1, 1], "strength": "1"}]}',
         "layer 1 'a cat', strength is '1', but should be a number"),
    ],
)  # fmt: skip
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(text.replace("LAYER", '{"prompt": "a cat", "box": [0, 0, 1, 1]}'))
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


def test_a_version_may_be_missing() -> None:
    text = '{"caption": "c", "layers": [{"prompt": "a red car", "box": [0.05, 0.5, 0.5, 0.9]}]}'
    assert Layout.from_json(text) == Layout("c", layers=[RED_CAR])


def test_mistakes_in_python_are_named_as_in_json() -> None:
    with pytest.raises(LayoutError, match=r"^layer 'a cat', bx is no known field .* mean box\?$"):
        Layer("a cat", bx=(0, 0, 1, 1))
    with pytest.raises(LayoutError, match="^layer 'a cat', box is .* no area"):
        Layer("a cat", (0.5, 0, 0.5, 1))
    with pytest.raises(LayoutError, match="^layer 'a cat', negative_prompt must be given by name"):
        Layer("a cat", (0, 0, 1, 1), "a dog")
    with pytest.raises(LayoutError, match="^caption is empty"):
        dataclasses.replace(TWO, caption="")


# ------------------------------------------------------------------ converters


@given(spans(), spans(), st.integers(1, 4000), st.integers(1, 4000))
def test_coco_boxes(
    horizontal: tuple[float, float], vertical: tuple[float, float], width: int, height: int
) -> None:
    (x0, x1), (y0, y1) = horizontal, vertical
    coco = (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)
    assert box_from_coco(coco, width, height) == pytest.approx((x0, y0, x1, y1))


def test_boxes_in_thousandths_are_y_first() -> None:
    assert box_from_thousandths((100, 200, 300, 400)) == (0.2, 0.1, 0.4, 0.3)


# ------------------------------------------------------------------ the examples


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[1].glob("examples/*.json")), ids=lambda path: path.stem
)
def test_examples(path: Path) -> None:
    layout = Layout.load(path)
    assert layout.to_json() == path.read_text(), "as Layout.save writes it"
    assert layout.background, path
    assert layout.caption.endswith(layout.background)
    for layer in layout.layers:
        assert layer.prompt in layout.caption
        assert 0.25 <= layer.box[2] - layer.box[0] <= 0.56
