"""The benchmark's layouts: the 220 that are shipped, files of them, and the scenes they ask for."""

import importlib.util
import json
import math
from dataclasses import replace
from itertools import combinations

import numpy
import pytest
from benchmark_examples import CAR, FEW, FOLDER, LAYOUTS

from lrd_helpers.benchmark import (
    GroundTruth,
    LookingOnce,
    NamedLayout,
    drawn,
    ground_truth_scene,
    load_layouts,
    save_layouts,
    scored,
    spread,
)
from lrd_helpers.benchmark.layouts import SHIPPED, with_shapes
from lrd_helpers.layout import LayoutError
from lrd_helpers.measure import StorybookClip
from lrd_helpers.storybook import aspect_ratio, render_scenes


def boxes_of(layout: NamedLayout) -> list[tuple[float, ...]]:
    return [layer.bounding_box for layer in layout.layout.layers]


def area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def shares_of_overlap(layout: NamedLayout) -> dict[tuple[int, int], float]:
    """For each pair of layers how much of the smaller box is in both."""
    return {
        (i, j): max(0, min(a[2], b[2]) - max(a[0], b[0]))
        * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        / min(area(a), area(b))
        for (i, a), (j, b) in combinations(enumerate(boxes_of(layout)), 2)
    }


def words_of(layout: NamedLayout) -> tuple[list[str], list[str]]:
    """Colours and stickers: the second and the third word of "a red car"."""
    words = [layer.prompt.split() for layer in layout.layout.layers]
    return [word[1] for word in words], [word[2] for word in words]


def is_small(layout: NamedLayout) -> bool:
    return all(0 < area(box) < 0.04 for box in boxes_of(layout))


def is_large(layout: NamedLayout) -> bool:
    return all(area(box) >= 0.3 for box in boxes_of(layout))


def is_overlapping(layout: NamedLayout) -> bool:
    shares = shares_of_overlap(layout)
    seen = layout.layout.masks(128, 128)[1:].mean((1, 2))
    half_seen = all(s > 0.45 * area(box) for s, box in zip(seen, boxes_of(layout), strict=True))
    numbers = range(len(layout.layout.layers))
    taken = all(any(n in pair and s >= 0.15 for pair, s in shares.items()) for n in numbers)
    return taken and half_seen and max(shares.values()) <= 0.4 + 1e-9


def is_at_the_edge(layout: NamedLayout) -> bool:
    return all(min(b[:2]) == 0 or max(b[2:]) == 1 for b in boxes_of(layout))


def is_extreme(layout: NamedLayout) -> bool:
    def stretch(box: tuple[float, ...], sticker: str) -> tuple[float, float]:
        aspect = (box[2] - box[0]) / (box[3] - box[1])
        stretched = aspect / aspect_ratio(sticker)
        return max(aspect, 1 / aspect), max(stretched, 1 / stretched)

    each = [stretch(b, s) for b, s in zip(boxes_of(layout), words_of(layout)[1], strict=True)]
    return all(aspect >= 2 and 1.4 <= stretched <= 2 for aspect, stretched in each)


def is_out_of_place(layout: NamedLayout) -> bool:
    unusual = {
        "at sea": {"car", "cat", "flower", "house", "mushroom", "tree"},
        "on grass": {"boat", "fish"},
        "on sand": {"boat", "fish", "flower", "mushroom"},
        "on snow": {"boat", "fish", "flower", "mushroom"},
    }
    return set(words_of(layout)[1]) <= unusual[layout.layout.background]


def of_one_sticker(layout: NamedLayout) -> bool:
    colours, stickers = words_of(layout)
    return len(stickers) == len(set(colours)) == 2 and len(set(stickers)) == 1


def of_one_colour(layout: NamedLayout) -> bool:
    colours, stickers = words_of(layout)
    return len(colours) == len(set(stickers)) == 2 and len(set(colours)) == 1


def with_layers(count: int) -> object:
    return lambda layout: (
        len(layout.layout.layers) == count and all(map(len, map(set, words_of(layout))))
    )


STRATA = {
    "one object": (20, with_layers(1)),
    "two objects": (20, with_layers(2)),
    "three objects": (20, with_layers(3)),
    "four objects": (20, with_layers(4)),
    "small": (15, is_small),
    "large": (15, is_large),
    "overlapping": (20, is_overlapping),
    "same sticker in two colours": (15, of_one_sticker),
    "same colour on two stickers": (15, of_one_colour),
    "unusual place": (10, is_out_of_place),
    "at the edge": (10, is_at_the_edge),
    "extreme aspect": (10, is_extreme),
    "masks": (10, lambda layout: all(layer.mask is not None for layer in layout.layout.layers)),
    "many": (20, lambda layout: with_layers(5)(layout) or with_layers(6)(layout)),
}


def generator_script() -> object:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_generator_makes(tmp_path) -> None:
    script = generator_script()
    assert script.SEED >= 1_000_000, "trainings use seeds below"
    save_layouts(tmp_path / "again.json", list(script.layouts()))
    assert (tmp_path / "again.json").read_bytes() == SHIPPED.read_bytes()
    assert SHIPPED.stat().st_size < 100_000


@pytest.mark.parametrize("stratum", STRATA)
def test_every_layout_is_what_its_stratum_says(stratum) -> None:
    count, holds = STRATA[stratum]
    layouts = [layout for layout in LAYOUTS if layout.stratum == stratum]
    assert len(layouts) == count
    assert [layout.name for layout in layouts if not holds(layout)] == []


def test_strata_are_named_and_nothing_else_overlaps() -> None:
    assert len(LAYOUTS) == 220
    assert [*dict.fromkeys(layout.stratum for layout in LAYOUTS)] == [*STRATA]
    assert (
        len({layout.layout for layout in LAYOUTS})
        == len({layout.name for layout in LAYOUTS})
        == 220
    )
    for layout in LAYOUTS:
        # A mask is the sticker's shape, which may stand out of its box by a pixel's breadth.
        if layout.stratum not in ("overlapping", "masks"):
            assert not any(shares_of_overlap(layout).values())
        for layer in layout.layout.layers:
            article, name = layer.prompt.split(maxsplit=1)
            six = len(layout.layout.layers) == 6  # with articles the caption would be cut off
            assert (name if six else f"{article} {name}") in layout.layout.caption
        assert layout.layout.caption.endswith(layout.layout.background)


def test_the_ground_truth_is_the_ceiling() -> None:
    """Every fourteenth layout as it was asked for: the metrics' own mistakes, and overlaps."""
    layouts = [layout for layout in spread(LAYOUTS, 14) if layout.stratum != "overlapping"]
    images, _ = drawn(None, GroundTruth(), [layout.layout for layout in layouts], [])
    detector, clip = LookingOnce(), StorybookClip()
    scores = [
        scored(detector, clip, image, layout.layout)
        for layout, image in zip(layouts, images, strict=True)
    ]
    assert numpy.mean([score["iou"] for score in scores]) >= 0.93
    swapped = scored(detector, clip, images[0], layouts[-1].layout)
    assert swapped["iou"] < 0.1


def test_the_order_is_right_in_true_scenes_and_wrong_in_reversed_ones() -> None:
    layouts = [layout.layout for layout in LAYOUTS if layout.stratum == "overlapping"][8:12]
    scenes = [ground_truth_scene(layout) for layout in layouts]
    back_to_front = [replace(scene, stickers=scene.stickers[::-1]) for scene in scenes]
    detector, clip = LookingOnce(), StorybookClip()
    scores, wrong = (
        [
            scored(detector, clip, image, layout)
            for image, layout in zip(render_scenes(painted).images, layouts, strict=True)
        ]
        for painted in (scenes, back_to_front)
    )
    assert [score["order"] for score in scores] == [1, 1, 1, 1]
    assert numpy.nanmean([score["order"] for score in wrong]) < 0.2
    assert numpy.mean([score["overlap_iou"] for score in scores]) > 0.5
    assert all(0.01 < score["overlay_score"] < 0.2 for score in scores)
    apart = scored(detector, clip, render_scenes(scenes[:1]).images[0], LAYOUTS[0].layout)
    assert math.isnan(apart["order"])
    assert math.isnan(apart["overlap_iou"])
    assert apart["overlay_score"] == 0


def test_shapes_take_the_place_of_boxes() -> None:
    [layout] = [each.layout for each in LAYOUTS if each.name == "overlapping-09"]
    shapes = with_shapes(layout)
    assert [layer.prompt for layer in shapes.layers] == [layer.prompt for layer in layout.layers]
    for shape, layer in zip(shapes.layers, layout.layers, strict=True):
        inside, box = shape.cells(128, 128), layer.cells(128, 128)
        assert 0.3 * box.sum() < inside.sum() < box.sum()
        assert shape.bounding_box == pytest.approx(layer.box, abs=0.02)
    [masked] = [each.layout for each in LAYOUTS if each.name == "masks-01"]
    assert with_shapes(masked) == masked


# ------------------------------------------------------------------ files of layouts


def test_layouts_are_read_as_they_were_written(tmp_path) -> None:
    save_layouts(tmp_path / "few.json", FEW)
    assert load_layouts(tmp_path / "few.json") == FEW
    assert load_layouts(tmp_path / "few.json", SHIPPED) == FEW + LAYOUTS
    assert load_layouts() == LAYOUTS


GOOD = {"name": "car", "stratum": "one", "layout": json.loads(CAR.to_json())}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 1, "layouts": []}, "holds no layouts"),
        ({"version": 2, "layouts": [GOOD]}, "version is 2, but this package reads version 1"),
        ({"version": 1}, "not a file of layouts, which is {"),
        ([1, 2], "expected an object"),
        (json.loads(CAR.to_json()), "a single layout, which `python -m lrd_helpers render`"),
        ({"version": 1, "layouts": [{"name": "a"}]}, "entry 1: should have name, stratum"),
        ({"version": 1, "layouts": [GOOD | {"name": "../a"}]}, "entry 1: the name is '../a'"),
        ({"version": 1, "layouts": [GOOD | {"name": "a" * 100_000}]}, "entry 1: the name is 'aaa"),
        ({"version": 1, "layouts": [GOOD | {"name": 3}]}, "entry 1: the name is 3, but should be"),
        *(
            ({"version": 1, "layouts": [GOOD, GOOD | {"stratum": stratum}]}, "entry 2: the stratum")
            for stratum in ("", " ", "two\nlines", "\ud800", "a" * 100_000, None, ["one"])
        ),
        ({"version": 1, "layouts": [GOOD, GOOD]}, "a second layout has the name 'car'"),
        (
            {"version": 1, "layouts": [GOOD | {"layout": {"caption": "a", "layers": []}}]},
            ", entry 1, layers is empty",
        ),
    ],
)
def test_files_that_are_refused(tmp_path, content, message) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(LayoutError) as error:
        load_layouts(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(LayoutError, match=r"none\.json: cannot be read: No such file"):
        load_layouts(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("boxes")
    with pytest.raises(LayoutError, match=r"text\.json: not JSON: Expecting value at line 1"):
        load_layouts(tmp_path / "text.json")
    (tmp_path / "twice.json").write_text('{"version": 1, "layouts": [], "layouts": [1]}')
    with pytest.raises(LayoutError, match=r"twice\.json: '?layouts'? is given twice"):
        load_layouts(tmp_path / "twice.json")


def test_some_layouts_are_spread_over_the_list() -> None:
    assert spread(LAYOUTS, None) == LAYOUTS == spread(LAYOUTS, 1000)
    assert spread(LAYOUTS, 110) == LAYOUTS[::2]
    assert len({layout.stratum for layout in spread(LAYOUTS, 22)}) == 14
