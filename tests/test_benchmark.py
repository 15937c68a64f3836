"""The benchmark: its layouts, what a run writes, how it goes on after a cut, its tables."""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from lrd_helpers import __main__ as command_line
from lrd_helpers import benchmark, benchmark_report
from lrd_helpers.baselines import BASELINES, BoxDiff, LayoutGuidance
from lrd_helpers.benchmark import (
    GROUND_TRUTH,
    METRICS,
    BenchmarkError,
    GroundTruth,
    NamedLayout,
    Row,
    ablations,
    by_layout,
    checked_metrics,
    cost_table,
    differences,
    differences_table,
    drawn,
    estimate,
    load_layouts,
    measure_again,
    methods_named,
    noise_of,
    picture_file,
    read_results,
    report,
    results_by_method,
    run,
    save_layouts,
    scored,
    spread,
)
from lrd_helpers.layout import Layer, Layout, LayoutError
from lrd_helpers.measure import Detection, StorybookClip, StorybookDetector
from lrd_helpers.method import METHODS
from lrd_helpers.models import ASSETS, load_pipeline
from lrd_helpers.rendering import LayeredRenderingPipeline
from lrd_helpers.storybook import aspect_ratio

FOLDER = Path(__file__).parents[1] / "benchmarks" / "layouts"
FILE = FOLDER / "storybook-200.json"
LAYOUTS = load_layouts(FILE)

CAR = Layout(
    "a red car at sea", background="at sea", layers=[Layer("a red car", (0.1, 0.3, 0.6, 0.8))]
)
TWO = Layout(
    "a red car and a yellow star on grass",
    background="on grass",
    layers=[Layer("a red car", (0, 0.5, 0.75, 1)), Layer("a yellow star", (0.5, 0, 1, 0.75))],
)
FEW = [
    NamedLayout("car", "one", CAR),
    NamedLayout("both", "two", TWO),
    NamedLayout("boat", "one", Layout("a boat at sea", layers=[Layer("a boat", (0.5, 0, 1, 1))])),
]


# ------------------------------------------------------------------ the 200 layouts


def boxes_of(one: NamedLayout) -> list[tuple[float, ...]]:
    return [layer.bounding_box for layer in one.layout.layers]


def area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def shares_of_overlap(one: NamedLayout) -> dict[tuple[int, int], float]:
    """For each pair of layers how much of the smaller box is in both."""
    return {
        (i, j): max(0, min(a[2], b[2]) - max(a[0], b[0]))
        * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        / min(area(a), area(b))
        for (i, a), (j, b) in combinations(enumerate(boxes_of(one)), 2)
    }


def words_of(one: NamedLayout) -> tuple[list[str], list[str]]:
    """Colours and stickers: the second and the third word of "a red car"."""
    words = [layer.prompt.split() for layer in one.layout.layers]
    return [word[1] for word in words], [word[2] for word in words]


def is_small(one: NamedLayout) -> bool:
    return all(0 < area(box) < 0.04 for box in boxes_of(one))


def is_large(one: NamedLayout) -> bool:
    return all(area(box) >= 0.3 for box in boxes_of(one))


def is_overlapping(one: NamedLayout) -> bool:
    shares = shares_of_overlap(one)
    seen = one.layout.masks(128, 128)[1:].mean((1, 2))
    half_seen = all(s > 0.45 * area(box) for s, box in zip(seen, boxes_of(one), strict=True))
    numbers = range(len(one.layout.layers))
    taken = all(any(n in pair and s >= 0.15 for pair, s in shares.items()) for n in numbers)
    return taken and half_seen and max(shares.values()) <= 0.4 + 1e-9


def is_at_the_edge(one: NamedLayout) -> bool:
    return all(min(b[:2]) == 0 or max(b[2:]) == 1 for b in boxes_of(one))


def is_extreme(one: NamedLayout) -> bool:
    def stretch(box: tuple[float, ...], sticker: str) -> tuple[float, float]:
        aspect = (box[2] - box[0]) / (box[3] - box[1])
        own = aspect / aspect_ratio(sticker)
        return max(aspect, 1 / aspect), max(own, 1 / own)

    each = [stretch(b, s) for b, s in zip(boxes_of(one), words_of(one)[1], strict=True)]
    return all(aspect >= 2 and 1.4 <= own <= 2 for aspect, own in each)


def is_out_of_place(one: NamedLayout) -> bool:
    unusual = {
        "at sea": {"car", "cat", "flower", "house", "mushroom", "tree"},
        "on grass": {"boat", "fish"},
        "on sand": {"boat", "fish", "flower", "mushroom"},
        "on snow": {"boat", "fish", "flower", "mushroom"},
    }
    return set(words_of(one)[1]) <= unusual[one.layout.background]


def of_one_sticker(one: NamedLayout) -> bool:
    colours, stickers = words_of(one)
    return len(stickers) == len(set(colours)) == 2 and len(set(stickers)) == 1


def of_one_colour(one: NamedLayout) -> bool:
    colours, stickers = words_of(one)
    return len(colours) == len(set(stickers)) == 2 and len(set(colours)) == 1


def with_layers(count: int) -> object:
    return lambda one: len(one.layout.layers) == count and all(map(len, map(set, words_of(one))))


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
    "masks": (10, lambda one: all(layer.mask is not None for layer in one.layout.layers)),
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
    assert (tmp_path / "again.json").read_bytes() == FILE.read_bytes()
    assert FILE.stat().st_size < 100_000


@pytest.mark.parametrize("stratum", STRATA)
def test_every_layout_is_what_its_stratum_says(stratum) -> None:
    count, holds = STRATA[stratum]
    own = [one for one in LAYOUTS if one.stratum == stratum]
    assert len(own) == count
    assert [one.name for one in own if not holds(one)] == []


def test_strata_are_named_and_nothing_else_overlaps() -> None:
    assert len(LAYOUTS) == 200
    assert [*dict.fromkeys(one.stratum for one in LAYOUTS)] == [*STRATA]
    assert len({one.layout for one in LAYOUTS}) == len({one.name for one in LAYOUTS}) == 200
    for one in LAYOUTS:
        # A mask is the sticker's shape, which may stand out of its box by a pixel's breadth.
        if one.stratum not in ("overlapping", "masks"):
            assert not any(shares_of_overlap(one).values())
        for layer in one.layout.layers:
            assert layer.prompt in one.layout.caption
        assert one.layout.caption.endswith(one.layout.background)


def test_the_ground_truth_is_the_ceiling() -> None:
    """Every seventh layout as it was asked for: the metrics' own mistakes, and overlaps."""
    some = [one for one in spread(LAYOUTS, 28) if one.stratum != "overlapping"]
    images, _ = drawn(None, GroundTruth(), [one.layout for one in some], [])
    detector, clip = benchmark.LookingOnce(), StorybookClip()
    scores = [
        scored(detector, clip, image, one.layout) for one, image in zip(some, images, strict=True)
    ]
    assert numpy.mean([score["iou"] for score in scores]) >= 0.93
    swapped = scored(detector, clip, images[0], some[-1].layout)
    assert swapped["iou"] < 0.1


def test_looking_once_is_looking(monkeypatch) -> None:
    calls, describe_all = [], StorybookDetector.describe_all

    def counting(self, images):
        calls.append(len(images))
        return describe_all(self, images)

    monkeypatch.setattr(StorybookDetector, "describe_all", counting)
    images, _ = drawn(None, GroundTruth(), [CAR, TWO], [])
    once, anew = benchmark.LookingOnce(), StorybookDetector()
    clip = StorybookClip()
    for image, layout in ((images[1], TWO), (images[0], TWO), (images[1], TWO)):
        first = len(calls)
        mine = scored(once, clip, image, layout)
        assert len(calls) == first + 1
        assert mine == scored(anew, clip, image, layout)


# ------------------------------------------------------------------ files of layouts


def test_layouts_are_read_as_they_were_written(tmp_path) -> None:
    save_layouts(tmp_path / "few.json", FEW)
    assert load_layouts(tmp_path / "few.json") == FEW
    assert load_layouts(tmp_path / "few.json", FILE) == FEW + LAYOUTS


GOOD = {"name": "car", "stratum": "one", "layout": json.loads(CAR.to_json())}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 1, "layouts": []}, "holds no layouts"),
        ({"version": 2, "layouts": [GOOD]}, "version is 2, but this package reads version 1"),
        ({"layouts": [GOOD]}, "version is None"),
        ([1, 2], "not a file of layouts"),
        (json.loads(CAR.to_json()), "a single layout, which `python -m lrd_helpers render`"),
        ({"version": 1, "layouts": [{"name": "a"}]}, "entry 1: should have name, stratum"),
        ({"version": 1, "layouts": [GOOD | {"name": "../a"}]}, "entry 1: the name is '../a'"),
        ({"version": 1, "layouts": [GOOD | {"stratum": ""}]}, "car: the stratum should be a name"),
        ({"version": 1, "layouts": [GOOD, GOOD]}, "a second layout has the name 'car'"),
        (
            {"version": 1, "layouts": [GOOD | {"layout": {"caption": "a", "layers": []}}]},
            ", car, layers is empty",
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


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(LayoutError, match=r"none\.json: cannot be read: No such file"):
        load_layouts(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("boxes")
    with pytest.raises(LayoutError, match=r"text\.json: not JSON, but a file of layouts is"):
        load_layouts(tmp_path / "text.json")


def test_some_layouts_are_spread_over_the_list() -> None:
    assert spread(LAYOUTS, None) == LAYOUTS == spread(LAYOUTS, 1000)
    assert spread(LAYOUTS, 100) == LAYOUTS[::2]
    assert len({one.stratum for one in spread(LAYOUTS, 20)}) == 13


# ------------------------------------------------------------------ methods


def test_methods_have_names_and_changes() -> None:
    assert methods_named() == METHODS | BASELINES
    assert len(methods_named()) >= 9
    default = METHODS["default"]
    assert methods_named(["fuse=once", "paper,inside=1,outside=0.5", "boxdiff,strength=10"]) == {
        "fuse=once": replace(default, fuse="once"),
        "paper,inside=1,outside=0.5": replace(METHODS["paper"], inside=1.0, outside=0.5),
        "boxdiff,strength=10": BoxDiff(strength=10.0),
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "there is no method 'best'; there are default, paper, authors, unofficial, plain"),
        ("fuze=once", "default has no choice 'fuze'; it has delta, inside, outside"),
        ("plain,inside=1", "plain has no choice 'inside'; it has none"),
        ("fuse=sometimes", "fuse is 'sometimes', but should be one of steps, once, collage"),
        ("inside=much", "inside is 'much', but should be a number"),
        ("top_k=1.5", "top_k is '1.5', but should be a whole number"),
        ("negative_objects=1", "negative_objects is '1', but should be True or False"),
        ("layered_fraction=2", "layered_fraction is 2.0, but should be between 0"),
    ],
)
def test_methods_that_do_not_exist(name, message) -> None:
    with pytest.raises(BenchmarkError) as error:
        methods_named([name])
    assert message in str(error.value)


@pytest.mark.parametrize("base", METHODS)
def test_ablations_change_one_choice_at_a_time(base) -> None:
    names = ablations(base)
    changed = []
    for method in methods_named(names).values():
        now = asdict(method)
        changed.append(
            {name for name, value in asdict(METHODS[base]).items() if now[name] != value}
        )
    assert changed[-1] <= {"inside", "outside"}
    assert all(len(one) == 1 for one in changed[:-1])
    every = set.union(*changed)
    assert every >= {"inside", "fuse", "layered_fraction", "overlap"}
    guided = METHODS[base].inside or METHODS[base].outside
    assert ({"delta", "guide"} <= every) == bool(guided), "without ξ they change nothing"
    assert every >= {"negative_objects", "background_in_prompts"}
    assert ("top_k" in every) == (METHODS[base].delta != "constant"), "where it changes something"
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------ what a picture costs


@pytest.fixture
def pipe(tiny) -> LayeredRenderingPipeline:
    pipe = LayeredRenderingPipeline(**tiny.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def costs(pipe, method: object, *layouts: Layout, steps: int = 5) -> list[tuple[int, int]]:
    noise = [noise_of(layout.caption, 0) for layout in layouts]
    images, costs = drawn(pipe, method, layouts, noise, num_inference_steps=steps)
    assert len(images) == len(layouts)
    assert all(cost.seconds > 0 for cost in costs)
    assert not pipe.unet._forward_pre_hooks
    return [(cost.unet_calls, cost.backward_passes) for cost in costs]


def test_calls_and_backward_passes_are_counted(pipe) -> None:
    assert costs(pipe, BASELINES["plain"], CAR, TWO) == [(10, 0), (10, 0)]
    # a background and one or two layers
    assert costs(pipe, BASELINES["multidiffusion"], CAR, TWO) == [(20, 0), (30, 0)]
    # 40 % of 5 steps with 3 moves each, of a call and a backward pass
    guided = LayoutGuidance(strength=0.0, steps=0.4, repeats=3, threshold=0.0)
    assert costs(pipe, guided, TWO) == [(10 + 6, 6)]
    # 60 % of 5 steps with a move each
    assert costs(pipe, BoxDiff(steps=0.6, refinements=0), TWO) == [(10 + 3, 3)]


def test_a_picture_counts_the_same_in_a_batch(pipe) -> None:
    for method in (METHODS["default"], replace(METHODS["paper"], top_k=4)):
        together = costs(pipe, method, CAR, TWO)
        assert together == [*costs(pipe, method, CAR), *costs(pipe, method, TWO)]
        assert together[0][0] < together[1][0]
    layered = replace(METHODS["default"], layered_fraction=0.0)
    assert costs(pipe, layered, CAR, TWO) == [(10, 0), (10, 0)]


# ------------------------------------------------------------------ runs


class Brightness:
    """Finds everything in a place that depends on the picture."""

    def __call__(self, image, prompts) -> list[list[Detection]]:
        bright = float(numpy.asarray(image).mean()) / 255
        return [[Detection((0.1, 0.2, 0.2 + 0.7 * bright, 0.9), bright, None)] for _ in prompts]


class Grey:
    """Pictures and texts as two numbers."""

    def encode_images(self, images):
        import torch

        return torch.tensor([[numpy.asarray(one).mean() / 255, 1.0] for one in images]).float()

    def encode_texts(self, texts):
        import torch

        return torch.tensor([[len(text) / 100, 0.5] for text in texts])


FOUR = methods_named(["default", "plain", "multidiffusion", "fuse=once"])
LOOKS = {"detector": Brightness(), "clip": Grey()}
OPTIONS = {"num_inference_steps": 2, "seeds": 2, **LOOKS}


def measured_in(folder: Path) -> list[str]:
    """All that does not depend on the machine's mood, as text: NaN is like NaN."""
    return [str(replace(row, seconds=0.0, memory=0.0)) for row in read_results(folder)]


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (folder / "pictures").rglob("*.png")
    }


def test_a_run_writes_a_row_and_a_picture_each(pipe, tmp_path) -> None:
    rows = run(pipe, FEW, FOUR, output=tmp_path / "out", **OPTIONS)
    assert str(rows) == str(read_results(tmp_path / "out"))
    assert {row.key for row in rows} == {
        (name, one.name, seed) for name in FOUR for one in FEW for seed in range(2)
    }
    assert len(rows) == len(pictures_in(tmp_path / "out")) == 24
    assert sorted(os.listdir(tmp_path / "out")) == ["pictures", "results.csv", "settings.json"]
    for row in rows:
        with Image.open(picture_file(tmp_path / "out", row.method, row.layout, row.seed)) as image:
            layout = next(one.layout for one in FEW if one.name == row.layout)
            scores = scored(image=image.convert("RGB"), layout=layout, **LOOKS)
        assert {name: f"{value:.6g}" for name, value in scores.items()} == {
            name: f"{getattr(row, name):.6g}" for name in scores
        }
        assert math.isnan(row.attribute) == (row.layout == "boat"), "no colour was asked for"
    by_key = {row.key: row for row in rows}
    assert by_key["default", "both", 0].iou != by_key["plain", "both", 0].iou
    assert by_key["default", "both", 0].iou != by_key["default", "both", 1].iou
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["methods"]["fuse=once"]["fuse"] == "once"
    assert settings["num_inference_steps"] == 2
    with (tmp_path / "out" / "results.csv").open() as file:
        assert [*csv.DictReader(file)][0]["method"] == "default"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(pipe, tmp_path, monkeypatch, batch_size):
    options = OPTIONS | {"batch_size": batch_size}
    run(pipe, FEW, FOUR, output=tmp_path / "whole", **options)
    whole = measured_in(tmp_path / "whole")
    assert len(whole) == 24

    count = 0

    def killed(*arguments, **named):
        nonlocal count
        count += 1
        if count == 12:
            raise KeyboardInterrupt
        return scored(*arguments, **named)

    cut = tmp_path / "cut"
    monkeypatch.setattr(benchmark, "scored", killed)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, FEW, FOUR, output=cut, **options)
    assert len(measured_in(cut)) == 11
    # Power failed in the middle of a line: that row is gone.
    part = cut / "results.0.csv"
    part.write_bytes(part.read_bytes()[:-5])
    assert len(measured_in(cut)) == 10
    before = {row.key: str(row) for row in read_results(cut)}

    count = 100
    again = run(pipe, FEW, FOUR, output=cut, **options)
    assert count == 100 + 14, "what was there was not measured anew"
    kept = {row.key: str(row) for row in again if row.key in before}
    assert kept == before, "nor its seconds"
    assert measured_in(cut) == whole
    assert pictures_in(cut) == pictures_in(tmp_path / "whole")
    assert not part.exists()
    run(pipe, FEW, FOUR, output=cut, **options)
    assert count == 114, "all there"


def test_in_pieces_as_in_one_go(pipe, tmp_path) -> None:
    run(pipe, FEW, FOUR, output=tmp_path / "whole", **OPTIONS)
    one, *others = FOUR
    run(pipe, FEW, {one: FOUR[one]}, output=tmp_path / "out", limit=2, **OPTIONS | {"seeds": 1})
    assert {row.key for row in read_results(tmp_path / "out")} == {
        (one, "car", 0),
        (one, "both", 0),
    }
    for name in others:
        run(pipe, FEW, {name: FOUR[name]}, output=tmp_path / "out", **OPTIONS)
    run(pipe, FEW, FOUR, output=tmp_path / "out", **OPTIONS)
    assert measured_in(tmp_path / "out") == measured_in(tmp_path / "whole")
    assert [*json.loads((tmp_path / "out" / "settings.json").read_text())["methods"]] == [*FOUR]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_a_folder_with_other_results_is_left_alone(pipe, tmp_path) -> None:
    out = tmp_path / "out"
    plain = methods_named(["plain"])
    options = {"output": out, "num_inference_steps": 1, **LOOKS}
    run(pipe, FEW, plain, **options)
    before = snapshot(out)

    def refused(message: str, layouts=FEW, methods=plain, **changes: object) -> None:
        with pytest.raises(BenchmarkError) as error:
            run(pipe, layouts, methods, **options | changes)
        assert message in str(error.value)
        assert str(out) in str(error.value)
        assert "\n" not in str(error.value)
        assert snapshot(out) == before

    refused("results with another num_inference_steps (1, now 2)", num_inference_steps=2)
    refused("results with another guidance_scale (5.0, now 3.0)", guidance_scale=3.0)
    refused("results with another batch_size", batch_size=2)
    refused("results with another layouts", FEW[:2])
    moved = replace(CAR, layers=[Layer("a red car", (0.1, 0.3, 0.6, 0.81))])
    refused("results with another layouts", [NamedLayout("car", "one", moved), *FEW[1:]])
    refused("results with another detector", detector=benchmark.LookingOnce())
    refused("results of 'plain' with another kind", methods={"plain": METHODS["paper"]})
    weight = pipe.unet.conv_in.bias
    earlier = weight.data.clone()
    weight.data[0] += 1e-3
    try:
        refused("results with another model")
    finally:
        weight.data.copy_(earlier)
    run(pipe, FEW, plain, **options)  # and with the same ones it goes on


def test_pictures_are_measured_again_by_other_judges(pipe, tmp_path) -> None:
    class Blind:
        def __call__(self, image: object, prompts: list[str]) -> list[list[Detection]]:
            return [[] for _ in prompts]

    out, plain = tmp_path / "out", methods_named(["plain"])
    options = {"output": out, "num_inference_steps": 1}
    seeing = run(pipe, FEW, plain, **options, **LOOKS)
    pictures = pictures_in(out)
    assert any(row.iou for row in seeing)
    judges = {**LOOKS, "detector": Blind()}
    blind = measure_again(out, FEW, **judges)
    assert [row.key for row in blind] == [row.key for row in seeing]
    assert not any(row.iou or row.success for row in blind)
    assert [(row.seconds, row.unet_calls) for row in blind] == [
        (row.seconds, row.unet_calls) for row in seeing
    ]
    assert pictures_in(out) == pictures, "nothing was drawn"
    with pytest.raises(BenchmarkError, match="results with another detector"):
        run(pipe, FEW, plain, **options, **LOOKS)
    assert str(run(pipe, FEW, plain, **options, **judges)) == str(blind), "all is there already"
    assert str(measure_again(out, FEW, **LOOKS)) == str(seeing)

    before = snapshot(out)
    with pytest.raises(BenchmarkError, match="holds results of other layouts"):
        measure_again(out, FEW[:2], **judges)
    with pytest.raises(BenchmarkError, match="holds no results"):
        measure_again(tmp_path / "nothing", FEW, **judges)
    assert snapshot(out) == before
    missing = picture_file(out, "plain", "car", 0)
    for content in (None, b"\x89PNG no more"):
        missing.unlink()
        if content:
            missing.write_bytes(content)
        before = snapshot(out)
        with pytest.raises(BenchmarkError, match=r"car-0\.png is missing or damaged"):
            measure_again(out, FEW, **judges)
        assert snapshot(out) == before
        missing.touch()
    for content in ("{}", "[]", "no JSON", None):
        (out / "settings.json").unlink()
        if content:
            (out / "settings.json").write_text(content)
        with pytest.raises(BenchmarkError, match=r"settings\.json is missing or not a benchmark's"):
            measure_again(out, FEW, **judges)
        (out / "settings.json").touch()


def test_a_measuring_that_is_cut_off_has_to_be_done_again(pipe, tmp_path, monkeypatch) -> None:
    plain, options = methods_named(["plain"]), {"output": tmp_path, "num_inference_steps": 1}
    rows = run(pipe, FEW, plain, **options, **LOOKS)
    whole = snapshot(tmp_path)

    def cut(folder: Path, rows: object) -> None:
        write_results(folder, rows)
        raise KeyboardInterrupt

    write_results = benchmark._write_results
    monkeypatch.setattr(benchmark, "_write_results", cut)
    with pytest.raises(KeyboardInterrupt):
        measure_again(tmp_path, FEW, **LOOKS)
    monkeypatch.undo()
    with pytest.raises(BenchmarkError, match="results with another detector"):
        run(pipe, FEW, plain, **options, **LOOKS)
    assert str(measure_again(tmp_path, FEW, **LOOKS)) == str(rows)
    assert snapshot(tmp_path) == whole


def test_folders_that_are_no_benchmark(pipe, tmp_path) -> None:
    out, plain = tmp_path / "out", methods_named(["plain"])
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BenchmarkError, match="holds other files and no benchmark; give another"):
        run(pipe, FEW, plain, output=out, **LOOKS)
    (out / "settings.json").write_text("{}")
    with pytest.raises(BenchmarkError, match=r"settings\.json is not a benchmark's"):
        run(pipe, FEW, plain, output=out, **LOOKS)
    with pytest.raises(BenchmarkError, match=r"notes\.txt is a file, but should be a folder"):
        run(pipe, FEW, plain, output=out / "notes.txt", **LOOKS)
    assert snapshot(out) == {"notes.txt": b"mine", "settings.json": b"{}"}


def test_what_cannot_be_drawn_is_refused_first(pipe, tmp_path) -> None:
    out = tmp_path / "out"
    looking = {"detector": benchmark.LookingOnce()}
    dog = NamedLayout("dog", "one", Layout("a dog at sea", layers=[Layer("a dog", (0, 0, 1, 1))]))
    silent = NamedLayout("silent", "one", replace(CAR, caption="a star at sea"))
    for layouts, methods, changes, message in [
        ([], ["plain"], {}, "there are no layouts"),
        (FEW, [], {}, "there are no methods"),
        (FEW, ["plain"], {"seeds": 0}, "seeds is 0, but should be at least 1"),
        (FEW, ["plain"], {"limit": 0}, "limit is 0"),
        (
            [*FEW, dog],
            ["plain"],
            looking,
            "layout dog: 'a dog' names",
        ),
        ([*FEW, silent], ["boxdiff"], {}, "layout silent, method boxdiff: "),
    ]:
        with pytest.raises(BenchmarkError) as error:
            run(pipe, layouts, methods_named(methods), output=out, **LOOKS | changes)
        assert message in str(error.value)
    assert not out.exists()


# ------------------------------------------------------------------ numbers


def test_bootstrap_intervals_that_are_known() -> None:
    # The mean of two draws from {0, 1}: 0 and 1 with probability 1/4 each.
    assert estimate([0.0, 1.0]) == (0.5, 0.0, 1.0)
    # The number of ones among ten draws is binomial with p = 1/10: P(X ≤ 2) = .93, P(X ≤ 3) = .987.
    assert estimate([1.0, *[0.0] * 9]) == (0.1, 0.0, 0.3)
    # For many values the mean is normal: ± 1.96 standard deviations of it.
    values = numpy.random.default_rng(7).normal(5, 2, 1000)
    mean, low, high = estimate(values, numpy.random.default_rng(1), draws=20_000)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 1000**0.5, rel=0.02)
    assert estimate(values) == estimate(values) != estimate(values, numpy.random.default_rng(1))


def test_intervals_of_little() -> None:
    assert estimate([0.25, 0.25, math.nan]) == (0.25, 0.25, 0.25)
    one = estimate([0.25, math.nan])
    assert one.mean == 0.25
    assert math.isnan(one.low)
    assert math.isnan(estimate([]).mean)


def row(method: str, layout: str, iou: float, seed: int = 0, **more: object) -> Row:
    values = {"stratum": "one", "layers": 1, "success": float(iou >= 0.5), "attribute": 1.0}
    values |= {"leakage": 0.0, "clip": 70.0, "unet_calls": 50, "backward_passes": 0}
    return Row(
        method=method,
        layout=layout,
        iou=iou,
        seed=seed,
        **values | {"seconds": 1.0, "memory": math.nan} | more,
    )


def test_seeds_of_a_layout_are_one_value() -> None:
    rows = [row("a", "car", 0.2), row("a", "car", 0.4, 1), row("a", "both", 0.9)]
    assert by_layout(rows, "iou") == pytest.approx([0.3, 0.9])
    base = [row("b", "car", 0.1), row("b", "car", 0.1, 1), row("b", "other", 0.9)]
    assert differences(rows, base, "iou") == pytest.approx([0.2]), "only pairs from the same noise"
    lacking = [replace(one, attribute=math.nan) for one in base]
    assert differences(rows, lacking, "attribute") == []


def filled(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir()
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(benchmark.COLUMNS)
        writer.writerows(vars(one).values() for one in rows)
    settings = {"methods": dict.fromkeys(one.method for one in rows), "batch_size": 1}
    settings |= {"num_inference_steps": 25, "guidance_scale": 5.0, "machine": "an abacus"}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


SOME = ["iou", "success", "clip"]


def test_the_committed_table_is_that_of_the_committed_rows() -> None:
    methods = results_by_method(ASSETS / "benchmark")
    assert set(methods) == {*benchmark.KNOWN, GROUND_TRUTH}
    names = {one.name for one in LAYOUTS}
    for own in methods.values():
        assert {row.layout for row in own} == names
        assert len(own) == len(names)
    settings = json.loads((ASSETS / "benchmark" / "settings.json").read_text(encoding="utf-8"))
    table = (FOLDER.parents[1] / "figures" / "benchmark.md").read_text(encoding="utf-8")
    metrics = [name for name in METRICS if name != "ap"]  # AP needs the pictures
    assert differences_table(methods, metrics) in table
    assert cost_table(methods, settings) in table
    # Who judged and what was drawn is what is shipped: else the numbers are another model's.
    detector = benchmark.LookingOnce()
    assert (
        settings["detector"] == f"LookingOnce {benchmark._digest(detector.model)} {detector.rules}"
    )
    pipe = load_pipeline("storybook", "cpu")
    digest = benchmark._digest(pipe.unet, pipe.vae, pipe.text_encoder)
    assert settings["model"] == digest
    assert settings["methods"]["default"] == {"kind": "Method", **asdict(METHODS["default"])}


def test_the_tables_say_what_was_measured(tmp_path) -> None:
    rows = [
        row(GROUND_TRUTH, "car", 1.0, unet_calls=0),
        row(GROUND_TRUTH, "both", 0.9, stratum="two", layers=3, unet_calls=0),
        row("default", "car", 0.8, seconds=2.0, clip=75.0, memory=12.0),
        row("default", "both", 0.6, seconds=6.0, clip=65.0, stratum="two", layers=3, memory=30.0),
        row("plain", "car", 0.2),
        row("plain", "both", 0.4, seconds=2.0, stratum="two", layers=3),
        row("boxdiff", "car", 0.5, unet_calls=80, backward_passes=30, seconds=5.0),
    ]
    folder = filled(tmp_path / "out", rows)
    text = report(folder, FEW[:2], metrics=SOME)
    assert (folder / "table.md").read_text() == text + "\n"
    assert text.startswith("2 layouts, 1 seed, 25 steps, guidance scale 5.")
    for line in (
        "| method | pictures | IoU | success | CLIP score |",
        "| default | 2 | 0.700 [0.600, 0.800] | 1.000 [1.000, 1.000] | 70.0 [65.0, 75.0] |",
        "| plain | 2 | 0.300 [0.200, 0.400] | 0.000 [0.000, 0.000] | 70.0 [70.0, 70.0] |",
        "| boxdiff | 1 | 0.500 | 1.000 | 70.0 |",
        "| ground truth | 2 | 0.950 [0.900, 1.000] | 1.000 [1.000, 1.000] | 70.0 [70.0, 70.0] |",
        # differences
        "| plain | -0.400 [-0.600, -0.200] | -1.000 [-1.000, -1.000] | +0.0 [-5.0, +5.0] |",
        "| boxdiff | -0.300 | +0.000 | -5.0 |",
        # strata
        "| stratum | layouts | default | plain | boxdiff | ground truth |",
        "| one | 1 | 0.800 | 0.200 | 0.500 | 1.000 |",
        "| two | 1 | 0.600 | 0.400 | – | 0.900 |",
        # costs
        "| default | 4.00 | 2.50 | 3.00 | 50.0 | 0.0 | 30 |",
        "| plain | 1.50 | 1.00 | 1.00 | 50.0 | 0.0 | – |",
        "| boxdiff | 5.00 | 5.00 | – | 80.0 | 30.0 | – |",
    ):
        assert line in text.splitlines(), line
    for name in ("methods.png", "strata.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 150
    other = report(folder, FEW[:2], metrics=["success", "iou"])
    assert "| one | 1 | 1.000 | 0.000 | 1.000 | 1.000 |" in other.splitlines()


def test_a_table_without_a_default_or_a_ceiling(tmp_path) -> None:
    folder = filled(tmp_path / "out", [row("plain", "car", 0.2), row("paper", "car", 0.3)])
    text = report(folder, FEW[:1], metrics=["iou"])
    assert "The default was not among the methods." in text
    assert "| paper | 1 | 0.300 |" in text.splitlines()


def test_average_precision_looks_at_the_pictures(tmp_path) -> None:
    pytest.importorskip("pycocotools")
    folder = filled(tmp_path / "out", [row(name, "car", 0.2) for name in ("plain", "default")])
    # What Brightness finds in a white picture is the car's box; in a black one it is not.
    layouts = [NamedLayout("car", "one", Layout("a car", layers=[Layer("a car", BRIGHT)]))]
    for name, colour in (("plain", "black"), ("default", "white")):
        path = picture_file(folder, name, "car", 0)
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(path)
    text = report(folder, layouts, metrics=["ap", "iou"], detector=Brightness())
    assert "| default | 1 | 0.200 | 1.000 |" in text.splitlines()
    assert "| plain | 1 | 0.200 | 0.000 |" in text.splitlines()


BRIGHT = (0.1, 0.2, 0.9, 0.9)


def test_metrics_that_do_not_exist(tmp_path, monkeypatch) -> None:
    known = "there are iou, success, attribute, leakage, clip, ap"
    with pytest.raises(BenchmarkError, match=f"there is no metric 'fid'; {known}"):
        checked_metrics(["iou", "fid"])
    with pytest.raises(BenchmarkError, match="give another metric beside it"):
        checked_metrics(["ap"])
    monkeypatch.setattr(benchmark_report.importlib.util, "find_spec", lambda name: None)
    assert checked_metrics() == ["iou", "success", "attribute", "leakage", "clip"]
    with pytest.raises(BenchmarkError, match="ap needs pycocotools: pip install pycocotools"):
        checked_metrics(["iou", "ap"])
    with pytest.raises(BenchmarkError, match="holds no results"):
        report(tmp_path, FEW)


def test_a_table_of_other_columns(tmp_path) -> None:
    (tmp_path / "results.csv").write_text("method,iou\nplain,0.5\n")
    with pytest.raises(BenchmarkError, match=r"results\.csv has other columns"):
        read_results(tmp_path)
    (tmp_path / "results.csv").write_text("meth")
    assert read_results(tmp_path) == [], "cut in the heading"


# ------------------------------------------------------------------ the command


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(pipe, tmp_path, capsys, request) -> None:
    # As many threads as each of the two has: sums are rounded otherwise with more.
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    pipe.save_pretrained(tmp_path / "tiny")
    layouts = tmp_path / "few.json"
    save_layouts(layouts, [FEW[0], FEW[1], NamedLayout("again", "two", TWO)])
    arguments = ["benchmark", layouts, "--model", tmp_path / "tiny", "--steps", 2]
    arguments += ["--methods", "default", "plain", "--device", "cpu", "--output"]
    assert command_line.main([*map(str, arguments), str(tmp_path / "one")]) == 0
    table = capsys.readouterr().out
    assert "| ground truth | 3 |" in table

    # `accelerate launch` starts several processes on GPUs only; on a CPU it is torchrun's work.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", "lrd_helpers"]
    two = subprocess.run(
        [*launch, *map(str, arguments), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("How well the layouts are obeyed") == 1
    assert measured_in(tmp_path / "two") == measured_in(tmp_path / "one")
    assert pictures_in(tmp_path / "two") == pictures_in(tmp_path / "one")
    quality = [text.split("## What it costs")[0] for text in (table, two.stdout)]
    assert quality[1].strip().endswith(quality[0].strip())
    assert not list((tmp_path / "two").glob("results.*.csv"))


def test_the_command_refuses_in_one_sentence(tmp_path, capsys) -> None:
    (tmp_path / "empty.json").write_text('{"version": 1, "layouts": []}')
    for arguments, message in [
        (["--methods", "best"], "there is no method 'best'; there are default, paper"),
        (["--metrics", "fid"], "there is no metric 'fid'; there are iou, success"),
        ([tmp_path / "empty.json"], "empty.json: holds no layouts"),
        (["--measure-again"], "out holds no results"),
        (["--measure-again", "--limit", "2"], "measures every picture of the folder"),
        (["--measure-again", "--ablations"], "measures every picture of the folder"),
    ]:
        given = ["benchmark", *map(str, arguments), "--output", str(tmp_path / "out")]
        assert command_line.main(given) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_control_c_says_how_to_go_on(tmp_path, capsys, monkeypatch) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "methods_named", stopped)
    assert command_line.main(["benchmark", "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from here\n"
    monkeypatch.setattr(command_line, "_render", stopped)
    assert command_line.main(["render", "layout.json", "--output", "pictures"]) == 130
    assert capsys.readouterr().err == "interrupted\n", "a rendering begins anew"
