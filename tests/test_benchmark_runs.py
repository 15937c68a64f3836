"""A run of the benchmark: what it writes, how it goes on after a cut, what it refuses."""

import csv
import errno
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_examples import (
    CAR,
    FEW,
    JUDGES,
    TWO,
    Grey,
    command_of_a_process,
    pictures_in,
    rows_in,
    snapshot,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from painted import ReadsCodes, paint
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lrd_helpers import __main__ as command_line
from lrd_helpers import benchmark, models
from lrd_helpers.benchmark import (
    BenchmarkError,
    LookingOnce,
    NamedLayout,
    ablations,
    measure_again,
    methods_named,
    picture_file,
    read_results,
    run,
    runs,
    save_layouts,
    scored,
)
from lrd_helpers.benchmark.folder import COLUMNS, LATER, file_name
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.measure import Detection, StorybookDetector
from lrd_helpers.methods import METHODS
from lrd_helpers.pipeline import LayeredRenderingPipeline

OURS = "sketch_steps=2"
THREE = methods_named([OURS, "plain", "fuse=once"])
OPTIONS = {"num_inference_steps": 2, "seeds": 2, **JUDGES}


@pytest.fixture(scope="module")
def whole(_tiny, tmp_path_factory) -> dict[int, Path]:
    """Folders of all pictures of `FEW` by `THREE` methods, by the size of a batch."""
    pipe = LayeredRenderingPipeline(**_tiny.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    folders = {size: tmp_path_factory.mktemp("whole") / "out" for size in (1, 2)}
    for size, folder in folders.items():
        run(pipe, FEW, THREE, output=folder, batch_size=size, **OPTIONS)
    return folders


def test_looking_once_is_looking(monkeypatch) -> None:
    calls, describe_all = [], StorybookDetector.describe_all

    def counting(self, images):
        calls.append(len(images))
        return describe_all(self, images)

    monkeypatch.setattr(StorybookDetector, "describe_all", counting)
    once, anew = LookingOnce(ReadsCodes()), StorybookDetector(ReadsCodes())
    size = (64, 64)
    car = paint(("car", "red", (6, 20, 38, 50)), size=size)
    both = paint(("car", "red", (0, 32, 48, 64)), ("star", "yellow", (32, 0, 64, 48)), size=size)
    for image in (both, car, both):
        first = len(calls)
        scores = scored(once, Grey(), image, TWO)
        assert len(calls) == first + 1
        assert scores == scored(anew, Grey(), image, TWO)
        assert len(calls) > first + 2


def test_a_run_writes_a_row_and_a_picture_each(whole) -> None:
    out = whole[1]
    rows = read_results(out)
    assert {row.key for row in rows} == {
        (name, layout.name, seed) for name in THREE for layout in FEW for seed in range(2)
    }
    assert len(rows) == len(pictures_in(out)) == 18
    assert sorted(os.listdir(out)) == [".lock", "pictures", "results.csv", "settings.json"]
    for row in rows:
        with Image.open(picture_file(out, row.method, row.layout, row.seed)) as image:
            layout = next(layout.layout for layout in FEW if layout.name == row.layout)
            scores = scored(image=image.convert("RGB"), layout=layout, **JUDGES)
        assert {name: f"{value:.6g}" for name, value in scores.items()} == {
            name: f"{getattr(row, name):.6g}" for name in scores
        }
        assert math.isnan(row.attribute) == (row.layout == "boat"), "no colour was asked for"
    by_key = {row.key: row for row in rows}
    assert by_key[OURS, "both", 0].iou != by_key["plain", "both", 0].iou
    assert by_key[OURS, "both", 0].iou != by_key[OURS, "both", 1].iou
    settings = json.loads((out / "settings.json").read_text())
    assert settings["methods"]["fuse=once"]["fuse"] == "once"
    assert settings["num_inference_steps"] == 2
    with (out / "results.csv").open() as file:
        assert [*csv.DictReader(file)][0]["method"] == "fuse=once"


def test_a_run_that_was_killed_goes_on_as_if_it_had_not(pipe, whole, tmp_path, monkeypatch) -> None:
    options = OPTIONS | {"batch_size": 2}  # of three layouts: a batch of two, and of one
    count = 0

    def killed(*arguments, **named):
        nonlocal count
        count += 1
        if count == 10:
            raise KeyboardInterrupt
        return scored(*arguments, **named)

    cut = tmp_path / "cut"
    monkeypatch.setattr(runs, "scored", killed)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, FEW, THREE, output=cut, **options)
    assert len(rows_in(cut)) == 9
    # Power failed in the middle of a line: that row is gone.
    part = cut / "results.0.csv"
    part.write_bytes(part.read_bytes()[:-5])
    assert len(rows_in(cut)) == 8
    before = {row.key: str(row) for row in read_results(cut)}

    count = 100
    again = run(pipe, FEW, THREE, output=cut, **options)
    assert count == 100 + 10, "what was there was not measured anew"
    assert str(again) == str(read_results(cut))
    kept = {row.key: str(row) for row in again if row.key in before}
    assert kept == before, "nor its seconds"
    assert rows_in(cut) == rows_in(whole[2])
    assert pictures_in(cut) == pictures_in(whole[2])
    assert not part.exists()
    run(pipe, FEW, THREE, output=cut, **options)
    assert count == 110, "all there"


def test_in_pieces_as_in_one_go(pipe, whole, tmp_path) -> None:
    out = tmp_path / "out"
    first, *others = THREE
    run(pipe, FEW, {first: THREE[first]}, output=out, limit=2, **OPTIONS | {"seeds": 1})
    assert {row.key for row in read_results(out)} == {(first, "car", 0), (first, "both", 0)}
    for name in others:
        run(pipe, FEW, {name: THREE[name]}, output=out, **OPTIONS)
    run(pipe, FEW, THREE, output=out, **OPTIONS)
    assert rows_in(out) == rows_in(whole[1])
    assert [*json.loads((out / "settings.json").read_text())["methods"]] == [*THREE]


def test_a_folder_with_other_results_is_left_alone(pipe, tmp_path) -> None:
    out = tmp_path / "out"
    plain = methods_named(["plain"])
    options = {"output": out, "num_inference_steps": 1, **JUDGES}
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
    refused("results with another guidance_scale (5, now 3)", guidance_scale=3.0)
    refused("results with another batch_size", batch_size=2)
    refused("results with another layouts", FEW[:2])
    moved = replace(CAR, layers=[Layer("a red car", (0.1, 0.3, 0.6, 0.81))])
    refused("results with another layouts", [NamedLayout("car", "one", moved), *FEW[1:]])
    refused("results with another detector", detector=LookingOnce())
    refused("results of 'plain' with another kind", methods={"plain": THREE["fuse=once"]})
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
    seeing = run(pipe, FEW, plain, **options, **JUDGES)
    pictures = pictures_in(out)
    assert any(row.iou for row in seeing)
    judges = {**JUDGES, "detector": Blind()}
    blind = measure_again(out, FEW, **judges)
    assert [row.key for row in blind] == [row.key for row in seeing]
    assert not any(row.iou or row.success for row in blind)
    assert [(row.seconds, row.unet_calls) for row in blind] == [
        (row.seconds, row.unet_calls) for row in seeing
    ]
    assert pictures_in(out) == pictures, "nothing was drawn"
    with pytest.raises(BenchmarkError, match="results with another detector"):
        run(pipe, FEW, plain, **options, **JUDGES)
    assert str(run(pipe, FEW, plain, **options, **judges)) == str(blind), "all is there already"
    assert str(measure_again(out, FEW, **JUDGES)) == str(seeing)

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
        with pytest.raises(BenchmarkError, match=r"settings\.json is missing, damaged or not"):
            measure_again(out, FEW, **judges)
        (out / "settings.json").touch()


def test_a_measuring_that_is_cut_off_has_to_be_done_again(pipe, tmp_path, monkeypatch) -> None:
    plain, options = methods_named(["plain"]), {"output": tmp_path, "num_inference_steps": 1}
    rows = run(pipe, FEW, plain, **options, **JUDGES)
    whole = snapshot(tmp_path)

    def cut(folder: Path, rows: object) -> None:
        write_results(folder, rows)
        raise KeyboardInterrupt

    write_results = runs.write_results
    monkeypatch.setattr(runs, "write_results", cut)
    with pytest.raises(KeyboardInterrupt):
        measure_again(tmp_path, FEW, **JUDGES)
    monkeypatch.undo()
    with pytest.raises(BenchmarkError, match="results with another detector"):
        run(pipe, FEW, plain, **options, **JUDGES)
    assert str(measure_again(tmp_path, FEW, **JUDGES)) == str(rows)
    assert snapshot(tmp_path) == whole


def test_a_folder_of_the_version_before_is_measured_again(pipe, tmp_path) -> None:
    methods, out = methods_named(["plain", "multidiffusion"]), tmp_path / "out"
    options = {"output": out, "num_inference_steps": 1, **JUDGES}
    rows = run(pipe, FEW, methods, **options)
    # As that version wrote it: fewer columns, and a choice less of MultiDiffusion.
    settings = json.loads((out / "settings.json").read_text())
    del settings["methods"]["multidiffusion"]["background_in_prompts"]
    (out / "settings.json").write_text(json.dumps(settings | {"version": 1}))
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        kept = [name for name in COLUMNS if name not in LATER]
        writer.writerows([kept, *([vars(row)[name] for name in kept] for row in rows)])
    pictures, before = pictures_in(out), snapshot(out)
    with pytest.raises(BenchmarkError, match="before there were picture_success, overlap_iou, ord"):
        run(pipe, FEW, methods, **options)
    assert snapshot(out) == before
    assert rows_in(out) != [*map(str, rows)]
    again = measure_again(out, FEW, **JUDGES)
    assert [str(row) for row in again] == [
        str(replace(row, **{name: float(f"{vars(row)[name]:.6g}") for name in ("seconds",)}))
        for row in rows
    ]
    assert pictures_in(out) == pictures
    assert str(run(pipe, FEW, methods, **options)) == str(again), "and a run goes on"
    changed = {"multidiffusion": replace(methods["multidiffusion"], background_in_prompts=True)}
    with pytest.raises(BenchmarkError, match="'multidiffusion' with another background_in_prompts"):
        run(pipe, FEW, changed, **options)


def test_functions_are_contenders_and_their_faults_stop_nobody(pipe, tmp_path) -> None:
    def mine(pipe, layout, generator, **options):
        if layout.caption == broken:
            raise RuntimeError("not yet")
        shade = 0.5 + 0.1 * torch.rand((), generator=generator)
        return shade.expand(3, 32, 32)

    broken, plain = TWO.caption, methods_named(["plain"])
    options = {"output": tmp_path / "out", "num_inference_steps": 1, "batch_size": 2, **JUDGES}
    with pytest.warns(UserWarning, match="failed at") as remarks:
        rows = run(pipe, FEW, {"mine": mine, **plain}, **options)
    [remark] = [str(each.message) for each in remarks if "failed at" in str(each.message)]
    assert remark == (
        "'mine' failed at 1 of its pictures, which are missing; the next run tries them again. "
        "Layout both, seed 0: it raised RuntimeError: not yet"
    )
    drawn = [(row.method, row.layout) for row in rows]
    assert drawn == [("mine", "boat"), ("mine", "car")] + [
        ("plain", layout.name) for layout in sorted(FEW, key=lambda layout: layout.name)
    ]
    assert rows[0].unet_calls == 0
    broken = ""
    with pytest.raises(BenchmarkError, match="results of 'mine' with another source"):
        run(pipe, FEW, {"mine": mine}, **options)
    broken = TWO.caption
    with pytest.warns(UserWarning, match="'mine' failed at 1 of its"):
        again = run(pipe, FEW, {"mine": mine}, **options)
    assert str(again) == str(rows)
    for name, method, message in (
        ("mine", type(plain["plain"]), "should be a method, such as METHODS"),
        ("mine", 3, "'mine' is 3, but should be a method"),
        ("ground truth", mine, "a method is called 'ground truth', as the scene itself is"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            run(pipe, FEW, {name: method}, **options)


def test_folders_that_are_no_benchmark(pipe, tmp_path) -> None:
    out, plain = tmp_path / "out", methods_named(["plain"])
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BenchmarkError, match="holds other files and no benchmark; give another"):
        run(pipe, FEW, plain, output=out, **JUDGES)
    (out / "settings.json").write_text("{}")
    with pytest.raises(BenchmarkError, match=r"settings\.json is missing, damaged or not a bench"):
        run(pipe, FEW, plain, output=out, **JUDGES)
    with pytest.raises(BenchmarkError, match=r"notes\.txt is a file, but should be a folder"):
        run(pipe, FEW, plain, output=out / "notes.txt", **JUDGES)
    assert snapshot(out) == {"notes.txt": b"mine", "settings.json": b"{}"}


def test_a_folder_is_one_run_s_at_a_time(pipe, tmp_path) -> None:
    plain = methods_named(["plain"])
    options = {"output": tmp_path / "out", "num_inference_steps": 1, **JUDGES}
    rows = run(pipe, FEW[:1], plain, **options)
    before = snapshot(tmp_path)
    code = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print(flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out" / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        other.stdout.readline()  # it has the lock
        for writes in (
            lambda: run(pipe, FEW[:1], methods_named(["plain", "boxdiff"]), **options),
            lambda: measure_again(tmp_path / "out", FEW[:1], **JUDGES),
        ):
            with pytest.raises(BenchmarkError, match="another benchmark is writing into .*out;"):
                writes()
        assert snapshot(tmp_path) == before
        other.kill()
    assert str(run(pipe, FEW[:1], plain, **options)) == str(rows), "a killed one blocks nobody"


def test_a_disk_that_was_full_can_be_gone_on_with(pipe, tmp_path, monkeypatch) -> None:
    out, plain = tmp_path / "out", methods_named(["plain"])

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for part in ("folder.write_atomically", "runs.write_picture"):
        with monkeypatch.context() as patch:
            patch.setattr(f"lrd_helpers.benchmark.{part}", full)
            with pytest.raises(OSError, match="No space left"):
                run(pipe, FEW[:1], plain, output=out, num_inference_steps=1, **JUDGES)
        assert read_results(out) == []
    (out / "settings.json").unlink()
    (out / "results.csv").unlink()
    (out / "results.0.csv").unlink()
    (out / "pictures").mkdir()  # as earlier versions left it
    assert len(run(pipe, FEW[:1], plain, output=out, num_inference_steps=1, **JUDGES)) == 1


def test_what_no_table_can_hold_is_not_written(pipe, tmp_path) -> None:
    class Broken(Grey):
        def encode_images(self, images):
            return super().encode_images(images) * math.nan

    judges = {**JUDGES, "clip": Broken()}
    with pytest.raises(BenchmarkError, match=r"'plain', layout car: clip is 'nan', but should be"):
        run(
            pipe,
            FEW[:1],
            methods_named(["plain"]),
            output=tmp_path,
            num_inference_steps=1,
            **judges,
        )
    assert read_results(tmp_path) == []


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "text",
    [
        "collage",
        "ground truth",
        "paint-with-words",
        "inside=0.1,outside=0.1",
        "negative_objects=True",
        "paper,inside=-0.3,top_k=40",
        "layout-1-0",
        "Auto_rötlich-3",
    ],
)
def test_usual_names_of_files_stay(text) -> None:
    assert file_name(text) == text


HOSTILE = [
    "../../x",
    "/etc/x",
    "paper,inside=0.3#/../../../x",
    "..",
    ".",
    "",
    ".lock",
    "a\\b",
    "C:x",
    "con",
    "NUL.txt",
    "a\0b",
    "a\nb",
    "a.",
    "a ",
    "\ud800",
    "e\u0301",
    "x" * 300,
    "é" * 150,
]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(st.text(max_size=20) | st.sampled_from(HOSTILE), min_size=2, max_size=2, unique=True)
)
def test_every_text_becomes_a_name_of_its_own(texts) -> None:
    first, second = map(file_name, texts)
    assert first != second
    for name in (first, second):
        assert Path("pictures", name).parent == Path("pictures")
        assert len(f".{name}.png.tmp".encode()) < 255
        assert not {*name} & {*'/\\:*?"<>|'}
        assert name.isprintable()
        assert file_name(name) == name or "~" in name


@pytest.mark.parametrize("text", HOSTILE)
def test_names_that_some_system_refuses_get_another(text) -> None:
    assert re.fullmatch(r"[a-z0-9-]{0,60}~[0-9a-f]{16}", file_name(text))


def test_no_method_and_no_layout_leaves_the_folder(pipe, tmp_path) -> None:
    name = "multidiffusion,bootstrapping=0.2#/../../../../x"
    methods = methods_named([name]) | {"../../y": THREE["plain"]}
    out = tmp_path / "a" / "b" / "out"
    run(pipe, FEW[:1], methods, output=out, num_inference_steps=1, **JUDGES)
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]
    assert len(pictures_in(out)) == 2
    for method in methods:
        assert picture_file(out, method, "car", 0).is_file()


def test_names_that_differ_in_capitals_only(pipe, tmp_path) -> None:
    options = {"output": tmp_path / "out", "num_inference_steps": 1, **JUDGES}
    layouts = [replace(FEW[0], name=name) for name in ("car", "Car")]
    with pytest.raises(BenchmarkError, match="layouts 'car' and 'Car' differ in capitals only"):
        run(pipe, layouts, methods_named(["plain"]), **options)
    methods = methods_named(["inside=1e-1", "inside=1E-1"])
    with pytest.raises(BenchmarkError, match="methods 'inside=1e-1' and 'inside=1E-1' differ in"):
        run(pipe, FEW, methods, **options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_drawn_is_refused_first(pipe, tmp_path) -> None:
    out = tmp_path / "out"
    looking = {"detector": LookingOnce()}
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
        ([*FEW, silent], ["boxdiff"], {}, "layout silent, method 'boxdiff': "),
    ]:
        with pytest.raises(BenchmarkError) as error:
            run(pipe, layouts, methods_named(methods), output=out, **JUDGES | changes)
        assert message in str(error.value)
    assert not out.exists()


# ------------------------------------------------------------------ the command


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(pipe, tmp_path, capsys, request) -> None:
    # As many threads as each of the two has: sums are rounded otherwise with more.
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    pipe.save_pretrained(tmp_path / "tiny")
    save_layouts(tmp_path / "few.json", FEW[:2])
    arguments = ["benchmark", tmp_path / "few.json", "--model", tmp_path / "tiny", "--steps", 2]
    arguments += ["--methods", OURS, "plain", "--metrics", "iou", "clip"]
    arguments = [*map(str, arguments), "--device", "cpu", "--output"]
    assert command_line.main([*arguments, str(tmp_path / "one")]) == 0
    table = capsys.readouterr().out
    assert "| ground truth | 2 |" in table

    # What torchrun does, but the packages are imported once for both processes.
    multiprocessing.set_forkserver_preload(["benchmark_examples", "lrd_helpers.benchmark"])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
    )
    results = elastic_launch(config, command_of_a_process)([*arguments, str(tmp_path / "two")])
    assert [status for status, _ in results.values()] == [0, 0]
    [printed] = [text for _, text in results.values() if text]
    assert rows_in(tmp_path / "two") == rows_in(tmp_path / "one")
    assert pictures_in(tmp_path / "two") == pictures_in(tmp_path / "one")
    quality = [text.split("## What it costs")[0] for text in (table, printed)]
    assert quality[1] == quality[0]
    assert not list((tmp_path / "two").glob("results.*.csv"))


def test_the_command_refuses_in_one_sentence(tmp_path, capsys) -> None:
    (tmp_path / "empty.json").write_text('{"version": 1, "layouts": []}')
    for arguments, message in [
        (["--methods", "best"], "there is no method 'best'; there are collage, lrdiff, paper"),
        (["--metrics", "fid"], "there is no metric 'fid'; there are iou, success"),
        (["--ablations", "best"], "there is no method 'best'; there are collage, lrdiff, paper"),
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


def test_the_command_ablates_what_it_is_told_to(tmp_path, capsys, monkeypatch) -> None:
    asked: list[str] = []

    def collected(pipe: object, layouts: object, methods: dict, **options: object) -> None:
        asked[:] = methods

    silent = SimpleNamespace(set_progress_bar_config=lambda **options: None)
    monkeypatch.setattr(benchmark, "run", collected)
    monkeypatch.setattr(benchmark, "report", lambda *arguments, **options: "")
    monkeypatch.setattr(models, "load_pipeline", lambda *arguments: silent)
    of_background = ["paper", "paper,background_in_prompts=True"]
    for arguments, first, others in (
        ([], [*METHODS], []),
        (["--ablations"], ["collage", "lrdiff", *ablations("collage")], ablations("lrdiff")),
        (["--ablations"], ["collage", "lrdiff"], of_background),
        (["--ablations", "multidiffusion"], ["multidiffusion", *ablations("multidiffusion")], []),
        (["--methods", "plain", "--ablations", "collage"], ["plain", *ablations("collage")], []),
    ):
        assert command_line.main(["benchmark", "--output", str(tmp_path), *arguments]) == 0
        assert asked[: len(first)] == first
        assert others or len(asked) == len(first)
        assert set(others) <= set(asked)


def test_control_c_says_how_to_go_on(tmp_path, capsys, monkeypatch) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "methods_named", stopped)
    assert command_line.main(["benchmark", "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from here\n"
    monkeypatch.setattr(command_line, "_render", stopped)
    assert command_line.main(["render", "layout.json", "--output", "pictures"]) == 130
    assert capsys.readouterr().err == "interrupted\n", "a rendering begins anew"
