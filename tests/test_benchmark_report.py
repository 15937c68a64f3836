"""What a benchmark reports: means and intervals, tables, figures."""

import csv
import importlib.util
import itertools
import json
import math
from dataclasses import replace

import numpy
import pytest
from benchmark_examples import BRIGHT, CAR, FEW, FOLDER, LAYOUTS, Brightness, filled, row
from PIL import Image

from lrd_helpers.benchmark import (
    BEST,
    GROUND_TRUTH,
    METRICS,
    BenchmarkError,
    LookingOnce,
    NamedLayout,
    by_layout,
    checked_metrics,
    cost_figure,
    cost_table,
    differences,
    differences_table,
    estimate,
    methods_figure,
    objects_figure,
    picture_file,
    quality_table,
    read_results,
    report,
    results_by_method,
    strata_figure,
)
from lrd_helpers.benchmark.contenders import choices_of
from lrd_helpers.benchmark.folder import COLUMNS, LATER
from lrd_helpers.benchmark.judges import digest
from lrd_helpers.benchmark.tables import strata_table
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.methods import METHODS
from lrd_helpers.models import ASSETS, load_pipeline

# ------------------------------------------------------------------ numbers


def test_bootstrap_intervals_that_are_known() -> None:
    # The mean of two draws from {0, 1}: 0 and 1 with probability 1/4 each.
    assert estimate([0.0, 1.0]) == (0.5, 0.0, 1.0)
    # The number of ones among ten draws is binomial with p = 1/10: P(X ≤ 2) = .93, P(X ≤ 3) = .987.
    assert estimate([1.0, *[0.0] * 9]) == (0.1, 0.0, 0.3)
    # For many values the mean is normal: ± 1.96 standard deviations of it.
    values = numpy.random.default_rng(7).normal(5, 2, 400)
    mean, low, high = estimate(values, numpy.random.default_rng(1), draws=10_000)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 400**0.5, rel=0.02)
    assert estimate(values) == estimate(values) != estimate(values, numpy.random.default_rng(1))


def test_intervals_of_little() -> None:
    assert estimate([0.25, 0.25, math.nan]) == (0.25, 0.25, 0.25)
    single = estimate([0.25, math.nan])
    assert single.mean == 0.25
    assert math.isnan(single.low)
    assert math.isnan(estimate([]).mean)


def test_seeds_of_a_layout_are_one_value() -> None:
    rows = [row("a", "car", 0.2), row("a", "car", 0.4, 1), row("a", "both", 0.9)]
    assert by_layout(rows, "iou") == pytest.approx([0.3, 0.9])
    base = [row("b", "car", 0.1), row("b", "car", 0.1, 1), row("b", "other", 0.9)]
    assert differences(rows, base, "iou") == pytest.approx([0.2]), "only pairs from the same noise"
    lacking = [replace(of_base, attribute=math.nan) for of_base in base]
    assert differences(rows, lacking, "attribute") == []


# ------------------------------------------------------------------ tables and figures


def test_the_committed_table_is_that_of_the_committed_rows() -> None:
    methods = results_by_method(ASSETS / "benchmark")
    assert set(methods) == {*METHODS, GROUND_TRUTH}
    names = {layout.name for layout in LAYOUTS}
    seeds = {row.seed for rows in methods.values() for row in rows}
    for rows in methods.values():
        pictures = [(row.layout, row.seed) for row in rows]
        assert sorted(pictures) == sorted(itertools.product(names, seeds))
    settings = json.loads((ASSETS / "benchmark" / "settings.json").read_text(encoding="utf-8"))
    table = (FOLDER.parents[1] / "figures" / "benchmark.md").read_text(encoding="utf-8")
    metrics = [name for name in METRICS if name != "ap"]  # AP needs the pictures
    for base in {BEST, "lrdiff"} & set(methods):
        assert differences_table(methods, metrics, base) in table
    assert cost_table(methods, settings) in table
    # Who judged and what was drawn is what is shipped: else the numbers are another model's.
    detector = LookingOnce()
    assert settings["detector"] == f"LookingOnce {digest(detector.model)} {detector.rules}"
    pipe = load_pipeline("storybook", "cpu")
    assert settings["model"] == digest(pipe.unet, pipe.vae, pipe.text_encoder)
    for name in (BEST, "lrdiff"):
        assert settings["methods"][name] == choices_of(METHODS[name])


def test_the_tables_say_what_was_measured(tmp_path) -> None:
    rows = [
        row(GROUND_TRUTH, "car", 1.0, unet_calls=0),
        row(GROUND_TRUTH, "both", 0.9, stratum="two", layers=3, unet_calls=0),
        row("collage", "car", 0.8, seconds=2.0, clip=75.0, memory=12.0),
        row("collage", "both", 0.6, seconds=6.0, clip=65.0, stratum="two", layers=3, memory=30.0),
        row("plain", "car", 0.2),
        row("plain", "both", 0.4, seconds=2.0, stratum="two", layers=3),
        row("boxdiff", "car", 0.5, unet_calls=80, backward_passes=30, seconds=5.0),
    ]
    folder = filled(tmp_path / "out", rows)
    text = report(folder, FEW[:2], metrics=["iou", "success", "clip"])
    assert (folder / "table.md").read_text() == text + "\n"
    assert text.startswith("2 layouts, 1 seed, 25 steps, guidance scale 5.")
    for line in (
        "| method | pictures | IoU | success | CLIP score |",
        "| collage | 2 | 0.700 [0.600, 0.800] | 1.000 [1.000, 1.000] | 70.0 [65.0, 75.0] |",
        "| plain | 2 | 0.300 [0.200, 0.400] | 0.000 [0.000, 0.000] | 70.0 [70.0, 70.0] |",
        "| boxdiff | 1 | 0.500 | 1.000 | 70.0 |",
        "| ground truth | 2 | 0.950 [0.900, 1.000] | 1.000 [1.000, 1.000] | 70.0 [70.0, 70.0] |",
        # differences
        "| plain | -0.400 [-0.600, -0.200] | -1.000 [-1.000, -1.000] | +0.0 [-5.0, +5.0] |",
        "| boxdiff | -0.300 | +0.000 | -5.0 |",
        # strata
        "| stratum | layouts | collage | plain | boxdiff | ground truth |",
        "| one | 1 | 0.800 | 0.200 | 0.500 | 1.000 |",
        "| two | 1 | 0.600 | 0.400 | – | 0.900 |",
        # costs
        "| collage | 4.00 | 2.50 | 3.00 | 50.0 | 0.0 | 30 |",
        "| plain | 1.50 | 1.00 | 1.00 | 50.0 | 0.0 | – |",
        "| boxdiff | 5.00 | 5.00 | – | 80.0 | 30.0 | – |",
    ):
        assert line in text.splitlines(), line
    for name in ("methods.png", "strata.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 150
    other = strata_table(results_by_method(folder), FEW[:2], "success")
    assert "| one | 1 | 1.000 | 0.000 | 1.000 | 1.000 |" in other.splitlines()


def test_a_report_of_overlaps_objects_and_both_bases(tmp_path) -> None:
    values = {  # O-mIoU, order right, OverLayScore, objects
        "car": (math.nan, math.nan, 0.0, 1),
        "a": (0.2, 0.0, 0.01, 2),
        "b": (0.4, 1.0, 0.02, 2),
        "c": (0.8, math.nan, 0.5, 6),
    }
    rows = [
        row(name, layout, iou, overlap_iou=o, order=order, overlay_score=score, layers=layers)
        for name, iou in (("collage", 0.8), ("lrdiff", 0.6), ("plain", 0.1))
        for layout, (o, order, score, layers) in values.items()
    ]
    # A second seed, and a method with nothing that overlaps.
    rows += [replace(rows[1], seed=1, overlap_iou=0.6), row("paper", "car", 0.5)]
    layouts = [NamedLayout(name, "one", CAR) for name in values]
    text = report(
        filled(tmp_path / "out", rows), layouts, metrics=[n for n in METRICS if n != "ap"]
    )
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## How well the layouts are obeyed",
        "## Where boxes overlap",
        "## Difference to the collage",
        "## Difference to lrdiff",
        "## IoU by stratum",
        "## Picture success by number of objects",
        "## What it costs",
    ]
    parts = dict(zip(headings, text.split("\n## ")[1:], strict=True))
    for heading, line in (
        ("## How well the layouts are obeyed", "| method | pictures | IoU | success | picture "
         "success | colour right | leakage (less is better) | CLIP score |"),
        ("## Where boxes overlap", "| method | pictures | O-mIoU | order right |"),
        # Of two seeds the mean: (.4 + .4 + .8) / 3; and order (0 + 1) / 2.
        ("## Where boxes overlap", "| collage | 4 | 0.533 [0.400, 0.800] | 0.500 [0.000, 1.000] |"),
        ("## Where boxes overlap", "| overlaps | layouts | collage | lrdiff | plain | paper |"),
        ("## Where boxes overlap", "| simple | 1 | 0.400 | 0.200 | 0.200 | – |"),
        ("## Where boxes overlap", "| complex | 1 | 0.800 | 0.800 | 0.800 | – |"),
        ("## Where boxes overlap", "| regular | 1 | 1.000 | 1.000 | 1.000 | – |"),
        ("## Difference to lrdiff", "| plain | -0.500 [-0.500, -0.500] | -1.000 [-1.000, -1.000] | "
         "-1.000 [-1.000, -1.000] | +0.000 [+0.000, +0.000] | +0.000 [+0.000, +0.000] | "
         "+0.0 [+0.0, +0.0] | +0.000 [+0.000, +0.000] | +0.000 [+0.000, +0.000] |"),
        ("## Picture success by number of objects", "| objects | layouts | collage | lrdiff | "
         "plain | paper |"),
        ("## Picture success by number of objects", "| 2 | 2 | 1.000 ± 0.000 | 1.000 ± 0.000 | "
         "0.000 ± 0.000 | – |"),
        ("## Picture success by number of objects", "| 6 | 1 | 1.000 | 1.000 | 0.000 | – |"),
    ):  # fmt: skip
        assert line in parts[heading].splitlines(), line
    score = "OverLayScore: simple 0.010 to 0.010, regular 0.020 to 0.020, complex 0.500 to 0.500. "
    assert f"O-mIoU. {score}" in parts["## Where boxes overlap"]
    assert not any(line.startswith("| paper") for line in parts["## Where boxes overlap"].split())
    figure = methods_figure(results_by_method(tmp_path / "out"), [n for n in METRICS if n != "ap"])
    assert len(figure.axes) == 8
    assert figure.get_figwidth() < 14


def test_a_folder_that_was_measured_before_there_were_such_columns(tmp_path) -> None:
    folder = filled(tmp_path / "out", [row("collage", "car", 0.5), row("plain", "car", 0.25)])
    with (folder / "results.csv").open(newline="") as file:
        table = [*csv.DictReader(file)]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in COLUMNS if name not in LATER])
        writer.writeheader()
        writer.writerows({n: c for n, c in line.items() if n not in LATER} for line in table)
    collage, plain = read_results(folder)
    assert (collage.iou, plain.iou, plain.seconds) == (0.5, 0.25, 1.0)
    assert all(math.isnan(getattr(plain, name)) for name in LATER)
    text = report(folder, FEW, metrics=[name for name in METRICS if name != "ap"])
    heading = "| method | pictures | IoU | success | colour right | leakage (less is better) | "
    assert heading + "CLIP score |" in text.splitlines(), "what nobody has gets no column"
    assert "Where boxes overlap" not in text
    assert "number of objects" not in text


def test_a_table_without_the_best_or_a_ceiling(tmp_path) -> None:
    folder = filled(tmp_path / "out", [row("plain", "car", 0.2), row("paper", "car", 0.3)])
    text = report(folder, FEW[:1], metrics=["iou"])
    assert "The collage was not among the methods." in text
    assert "| paper | 1 | 0.300 |" in text.splitlines()


def test_average_precision_looks_at_the_pictures(tmp_path) -> None:
    pytest.importorskip("pycocotools")
    folder = filled(tmp_path / "out", [row(name, "car", 0.2) for name in ("plain", "collage")])
    # What Brightness finds in a white picture is the car's box; in a black one it is not.
    layouts = [NamedLayout("car", "one", Layout("a car", layers=[Layer("a car", BRIGHT)]))]
    for name, colour in (("plain", "black"), ("collage", "white")):
        path = picture_file(folder, name, "car", 0)
        path.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(path)
    text = report(folder, layouts, metrics=["ap", "iou"], detector=Brightness())
    assert "| collage | 1 | 0.200 | 1.000 |" in text.splitlines()
    assert "| plain | 1 | 0.200 | 0.000 |" in text.splitlines()


def test_metrics_that_do_not_exist(tmp_path, monkeypatch) -> None:
    known = "there are iou, success, picture_success, attribute, leakage, clip, overlap_iou, order"
    with pytest.raises(BenchmarkError, match=f"there is no metric 'fid'; {known}"):
        checked_metrics(["iou", "fid"])
    with pytest.raises(BenchmarkError, match="give another metric beside it"):
        checked_metrics(["ap"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert checked_metrics() == [name for name in METRICS if name != "ap"]
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


@pytest.mark.parametrize(
    ("whole", "damaged", "message"),
    [
        ("0.25", "", "iou is '', but should be a number from 0 to 1"),
        ("0.25", "much", "iou is 'much'"),
        ("0.25", "nan", "iou is 'nan'"),
        ("0.25", "inf", "iou is 'inf'"),
        ("0.25", "-0.25", "iou is '-0.25'"),
        ("0.25", "25", "iou is '25'"),
        ("70.0", "700", "clip is '700', but should be a number from -100 to 100"),
        ("1.5", "1e999", "seconds is '1e999', but should be a number ≥ 0"),
        ("1.5", "-1.5", "seconds is '-1.5'"),
        ("12.0", "inf", "memory is 'inf'"),
        (",50,", ",50.5,", "unet_calls is '50.5', but should be a whole number ≥ 0"),
        (",50,", "," + "9" * 200_000 + ",", "field larger than field limit"),
        (",50,", ",", "there are 17 cells, but should be 18"),
        (",50,", ",5,0,", "there are 19 cells"),
        ("both", "", "layout is '', but should be a name"),
        ("both", "bo\ud800th", "layout is 'bo"),
        ("both", "bo\0th", "layout is 'bo\\x00th'"),
        ("both", '"bo"th', "',' expected after '\"'"),
        ("both", '"both', "unexpected end of data"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, whole, damaged, message) -> None:
    more = {"seconds": 1.5, "memory": 12.0}
    rows = [row("plain", "car", 0.5), row("plain", "both", 0.25, **more), row("plain", "boat", 0.5)]
    path = filled(tmp_path / "out", rows) / "results.csv"
    lines = path.read_text().split("\n")
    assert lines[2].count(whole) == 1
    lines[2] = lines[2].replace(whole, damaged)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    for read in (read_results, results_by_method, lambda folder: report(folder, FEW)):
        with pytest.raises(BenchmarkError) as error:
            read(path.parent)
        sentence = str(error.value).removeprefix(str(path))
        assert sentence.startswith(f", line 3: {message}")
        assert sentence.endswith("; delete the line, and a run draws its picture again")
        assert len(sentence) < 200
        assert sentence.isprintable()
    assert not (path.parent / "table.md").exists()


def test_rows_of_nobody(tmp_path) -> None:
    folder = filled(tmp_path / "out", [row("plain", "car", 0.5), row("plain", "both", 0.5)])
    with pytest.raises(BenchmarkError, match="a row of layout 'both', which is not among the lay"):
        report(folder, FEW[:1])
    text = (folder / "results.csv").read_text().replace("plain,both", "plane,both")
    (folder / "results.csv").write_text(text)
    with pytest.raises(BenchmarkError, match="a row of method 'plane', which is not among the met"):
        report(folder, FEW)


def test_a_table_that_is_cut_anywhere_keeps_its_whole_rows(tmp_path) -> None:
    rows = [row("inside=1,outside=1", "both", 0.25), row("plain", "car", 0.5)]
    path = filled(tmp_path / "out", rows) / "results.csv"
    data = path.read_bytes()
    for end in range(0, len(data) + 1, 2):
        path.write_bytes(data[:end])
        whole = max(0, data[:end].count(b"\n") - 1)
        assert str(read_results(path.parent)) == str(rows[:whole])
    path.write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n") + b"\0\0")
    assert str(read_results(path.parent)) == str(rows), "as a spreadsheet saves it; a power cut"


def test_settings_that_are_damaged(tmp_path) -> None:
    folder = filled(tmp_path / "out", [row("plain", "car", 0.5)])
    whole = json.loads((folder / "settings.json").read_text())
    for damaged in (
        *({name: whole[name] for name in whole if name != missing} for missing in whole),
        whole | {"methods": ["plain"]},
        whole | {"methods": {"plain": 3}},
        whole | {"guidance_scale": "5"},
        [whole],
    ):
        (folder / "settings.json").write_text(json.dumps(damaged))
        with pytest.raises(BenchmarkError, match=r"settings\.json is missing, damaged or not a"):
            report(folder, FEW)
    (folder / "settings.json").write_text("[" * 100_000)
    with pytest.raises(BenchmarkError, match=r"settings\.json is missing, damaged or not a"):
        report(folder, FEW)


def test_names_are_shown_as_they_are(tmp_path) -> None:
    """A dollar begins no formula (Matplotlib could not set this), a bar ends no cell."""
    stratum, method = r"from $5 to $\frac | <b>", "plain#$_{" + "x" * 400
    layouts = [replace(FEW[0], stratum=stratum)]
    rows = [row(method, "car", 0.5, stratum=stratum), row("collage", "car", 0.5, stratum=stratum)]
    folder = filled(tmp_path / "out", rows)
    text = report(folder, layouts, metrics=["iou"])
    assert r"| from \$5 to \$\\frac \| \<b> | 1 | 0.500 | 0.500 |" in text.splitlines()
    assert rf"| plain#\${method[7:]} | 1 | 0.500 |" in text.splitlines()
    figure = strata_figure(results_by_method(folder), layouts, ["iou"])
    [label] = figure.axes[0].get_yticklabels()
    assert label.get_text() == stratum
    with Image.open(folder / "methods.png") as picture:
        assert picture.width < 2000


def test_a_figure_of_a_metric_that_nobody_has() -> None:
    rows = [row("plain", "car", 0.5, attribute=math.nan)]
    methods = {"paper": rows, "plain": [row("plain", "car", 0.5)]}
    figure = strata_figure(methods, FEW[:1], ["attribute"])
    assert figure.axes[0].get_title() == "colour right by stratum"
    assert (
        "Best colour right: plain, 1.000" in methods_figure(methods, ["attribute"]).get_suptitle()
    )


def test_parts_of_the_report_from_rows_alone(tmp_path) -> None:
    rows = [
        row(name, layout, iou)
        for name, layout, iou in (
            (GROUND_TRUTH, "car", 1.0),
            ("plain", "car", 0.2),
            ("collage", "car", 0.8),
            ("plain", "both", 0.4),
        )
    ]
    methods = results_by_method(filled(tmp_path / "out", rows))
    assert list(methods)[-1] == GROUND_TRUTH
    assert [plain.layout for plain in methods["plain"]] == ["both", "car"]
    assert "| plain | 2 | 0.300 [0.200, 0.400] |" in quality_table(methods, ["iou"]).splitlines()
    assert "| plain | -0.600 |" in differences_table(methods, ["iou"]).splitlines()
    settings = {"machine": "a machine", "batch_size": 1}
    assert "On a machine." in cost_table(methods, settings)
    assert len(methods_figure(methods, ["iou", "clip"]).axes) == 2
    assert strata_figure(methods, methods["plain"], ["iou"]).axes
    with pytest.raises(BenchmarkError, match="holds no results"):
        results_by_method(tmp_path)


def test_figures_of_objects_and_of_costs() -> None:
    methods = {
        name: [replace(row(name, "car", iou), layers=n, seconds=3.0) for n in (1, 2)]
        for name, iou in (("plain", 0.4), ("boxdiff", 0.41), ("collage", 0.9))
    }
    axes = objects_figure(methods, ["collage", "plain"]).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 1], [0, 0], [1, 1]]
    assert [line.get_label() for line in axes.lines[::2]] == ["collage", "1.00 to the power of n"]
    above, below = cost_figure(methods).axes
    assert "U-Net samples" in above.get_xlabel()
    assert below.lines[0].get_xdata()[0] == 3
    names = {text.get_text(): text.get_position()[1] for text in below.texts}
    assert names["boxdiff"] - names["plain"] > 0.04, "names of neighbours do not meet"
    assert names["collage"] == 0.9
