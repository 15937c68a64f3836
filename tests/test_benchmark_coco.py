"""COCO's annotations as layouts, and the whole command by them with judges of the open world."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from judges import save_judge

from lrd_helpers import __main__ as command_line
from lrd_helpers.benchmark import BenchmarkError, CocoRules, coco_layouts, load_layouts
from lrd_helpers.benchmark.folder import COLUMNS, read_results, read_settings

KINDS = {1: "person", 2: "car", 3: "boat", 4: "ball", 5: "hot dog", 6: "dog"}
PICTURES: dict[int, tuple[list[tuple[str, tuple[int, int, int, int]]], list[str]]] = {
    # id: kinds with (x, y, width, height) in pixels of 200 × 100; captions
    1: ([("car", (0, 50, 50, 50)), ("boat", (100, 0, 100, 100))],
        ["two things", "A  Car and a boat."]),
    2: ([("person", (0, 0, 2, 2)), ("car", (0, 0, 99, 99)), ("boat", (100, 0, 99, 99))],
        ["a car and a boat"]),
    3: ([("car", (0, 0, 99, 99)), ("ball", (0, 0, 9, 9))], ["a car"]),
    4: ([("car", (0, 0, 99, 99)), ("car", (100, 0, 99, 99))], ["a car and a car"]),
    5: ([("car", (0, 0, 99, 99)), ("boat", (100, 0, 99, 99))], ["cars and a boat"]),
    6: ([("ball", (0, 0, 40, 40)), ("boat", (100, 0, 100, 100)), ("car", (0, 0, 9, 9))],
        ["a boat and a ball at sea"]),
    7: ([("dog", (0, 0, 99, 99)), ("hot dog", (100, 0, 99, 99))], ["a hot dog"]),
}  # fmt: skip


def write(folder: Path, pictures: dict[int, Any] = PICTURES) -> tuple[Path, Path]:
    """Files of instances and captions, as COCO has them."""
    numbers = {name: number for number, name in KINDS.items()}
    images = [{"id": number, "width": 200, "height": 100} for number in pictures]
    things, texts = [], []
    for number, (objects, captions) in pictures.items():
        for name, (x, y, w, h) in objects:
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            record = {"image_id": number, "category_id": numbers[name], "iscrowd": 0}
            things.append(record | {"bbox": [x, y, w, h], "area": w * h, "segmentation": [corners]})
        texts += [{"image_id": number, "caption": caption} for caption in captions]
    categories = [{"id": number, "name": name} for number, name in KINDS.items()]
    files = folder / "instances_val.json", folder / "captions_val.json"
    files[0].write_text(
        json.dumps({"images": images, "annotations": things, "categories": categories})
    )
    files[1].write_text(json.dumps({"images": images, "annotations": texts}))
    return files


def test_the_pictures_that_the_rules_let_pass(tmp_path) -> None:
    first, sixth = coco_layouts(*write(tmp_path))
    assert (first.name, first.stratum, first.layout.caption) == (
        "coco-1", "2 objects", "A Car and a boat"
    )  # fmt: skip
    boat, car = first.layout.layers
    assert (boat.prompt, boat.word, boat.box) == ("a boat", "boat", (0.5, 0, 1, 1))
    assert (car.prompt, car.box) == ("a car", (0, 0.5, 0.25, 1)), "the larger is further back"
    assert [layer.prompt for layer in sixth.layout.layers] == ["a boat", "a ball"]
    one = coco_layouts(*write(tmp_path), rules=CocoRules(least=1, most=1, without=()))
    assert [layout.name for layout in one] == ["coco-3"]


def test_masks_of_objects(tmp_path) -> None:
    first, _ = coco_layouts(*write(tmp_path), shapes="masks")
    boat, car = first.layout.layers
    assert boat.box is None
    assert torch.equal(boat.cells(100, 200)[:, 101:], torch.ones(100, 99, dtype=torch.bool))
    assert car.mask.box == pytest.approx((0, 0.5, 0.25, 1), abs=0.01)


def test_files_that_are_none(tmp_path) -> None:
    instances, captions = write(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    refused = {
        (tmp_path / "missing.json", captions): "cannot be read: No such file",
        (tmp_path / "broken.json", captions): "is no file of COCO's instances, such as instances_",
        (tmp_path / "list.json", captions): "is no file of COCO's instances",
        (captions, instances): "is no file of COCO's instances",
        (instances, instances): "is no file of COCO's captions",
    }
    for files, message in refused.items():
        with pytest.raises(BenchmarkError, match=message) as error:
            coco_layouts(*files)
        assert len(str(error.value)) <= 300
    data = json.loads(instances.read_text())
    for field, value in {"area": "large", "bbox": [0, 0, 0, 0], "category_id": 99}.items():
        data["annotations"][0] |= {field: value}
        (tmp_path / "damaged.json").write_text(json.dumps(data))
        with pytest.raises(BenchmarkError, match="picture 1 has a damaged annotation: "):
            coco_layouts(tmp_path / "damaged.json", captions)
        data = json.loads(instances.read_text())


def test_when_no_picture_is_left_it_says_why(tmp_path) -> None:
    few = {number: PICTURES[number] for number in (2, 3, 4, 5, 7)}
    message = (
        r"none of its 5 pictures is left as a layout \(2 whose captions do not name all objects, 1 "
        r"with a person, 1 without 2 to 4 objects, 1 with two objects of a kind\)"
    )
    with pytest.raises(BenchmarkError, match=message):
        coco_layouts(*write(tmp_path, few))


def test_the_prompts_of_the_papers_can_be_drawn() -> None:
    layouts = load_layouts(Path(__file__).parents[1] / "benchmarks" / "layouts" / "papers.json")
    assert {layout.stratum for layout in layouts} == {"LRDiff", "BoxDiff", "layout-guidance"}
    for layout in layouts:
        for layer in layout.layout.layers:
            name = layer.word or layer.prompt.split()[-1]
            assert name in layout.layout.caption, "methods that steer words find it"


# ------------------------------------------------------------------ the whole command


@pytest.fixture(scope="module")
def folders(tmp_path_factory, _tiny) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    _tiny.save_pretrained(folder / "model")
    kinds = ("owlv2", "sam", "clip")
    return {kind: str(save_judge(kind, folder)) for kind in kinds} | {
        "model": str(folder / "model")
    }


def test_the_whole_command(folders, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    command = ["benchmark", "--coco", *map(str, write(tmp_path)), "--masks", "--device", "cpu"]
    command += ["--model", folders["model"], "--detector", folders["owlv2"]]
    command += ["--sam", folders["sam"], "--clip", folders["clip"], "--threshold", "0.1"]
    command += ["--methods", "plain", "boxdiff,refinements=0", "--steps", "2"]
    assert command_line.main([*command, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for heading in ("IoU", "picture success", "leakage", "CLIP score", "AP", "U-Net calls"):
        assert f"| {heading}" in printed
    assert "The ground truth is" not in printed
    with (output / "results.csv").open() as file:
        assert next(csv.reader(file)) == COLUMNS
    rows = read_results(output)
    assert sorted((row.method, row.layout, row.stratum) for row in rows) == [
        (method, layout, "2 objects")
        for method in ("boxdiff,refinements=0", "plain")
        for layout in ("coco-1", "coco-6")
    ]
    detector = read_settings(output)["detector"]
    assert detector.startswith("SegmentedDetector ")
    assert detector.endswith("threshold 0.1, overlap 0.5, masks by SAM")
    assert command_line.main([*command, "--output", str(output), "--measure-again"]) == 2
    assert "leave out --methods" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["C.json", "--coco", "A", "B"], "--coco and LAYOUTS.json are two sources of layouts"),
        (["--masks"], "--masks goes with --coco"),
        (["--sam", "x"], "--sam and --threshold go with a --detector"),
        (["--coco", "nothing.json", "B"], "nothing.json: cannot be read: No such file"),
        (["--coco", "A", "B", "--detector", "clip"], "its config.json is of the kind 'clip'"),
        (["--coco", "A", "B", "--detector", "owlv2", "--clip", "sam"], "of the kind 'sam'; a model "
         "of transformers of the kind clip would work"),
        (["--coco", "A", "B", "--masks", "--detector", "owlv2", "--clip", "clip"],
         "layout coco-1: layer 1 'a boat' has a mask, but the detector gives boxes only; add"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(folders, tmp_path, capsys, arguments, message) -> None:
    files = dict(zip("AB", map(str, write(tmp_path)), strict=True))
    known = folders | files
    command = ["benchmark", *(known.get(argument, argument) for argument in arguments)]
    command += ["--model", folders["model"], "--device", "cpu", "--methods", "plain"]
    assert command_line.main([*command, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert len(error) <= 301
    assert not (tmp_path / "out").exists()
