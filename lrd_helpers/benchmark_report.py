"""Tables and figures of what `benchmark.run` measured: means, intervals, differences, costs."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from lrd_helpers.benchmark import (
    GROUND_TRUTH,
    LookingOnce,
    Row,
    picture_file,
    read_results,
)
from lrd_helpers.benchmark_layouts import BenchmarkError, NamedLayout
from lrd_helpers.files import write_atomically
from lrd_helpers.metrics import Detector, average_precision
from lrd_helpers.plotting import BLUE, GREY

# ------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    heading: str
    decimals: int = 3
    less_is_better: bool = False


METRICS = {
    "iou": Metric("IoU"),
    "success": Metric("success"),
    "attribute": Metric("colour right"),
    "leakage": Metric("leakage", less_is_better=True),
    "clip": Metric("CLIP score", decimals=1),
    "ap": Metric("AP"),
}
"""What can be in the tables; T2I-Sim is the CLIP score / 100."""


class Estimate(NamedTuple):
    """A mean and its 95 % interval (NaN for fewer than two values)."""

    mean: float
    low: float
    high: float


def estimate(
    values: Sequence[float], generator: numpy.random.Generator | None = None, draws: int = 2000
) -> Estimate:
    """The mean with its 95 % percentile bootstrap interval (Efron 1979); NaNs are left out.

    Args:
        values: one an independent thing: of several seeds of a layout, their mean.
        generator: draws the samples; by default a new one of seed 0, so that the same values have
            the same interval.
        draws: how many samples, each as large as `values`, with repetition.
    """
    known = numpy.array([one for one in values if not math.isnan(one)])
    if not len(known):
        return Estimate(math.nan, math.nan, math.nan)
    if len(known) < 2:
        return Estimate(float(known[0]), math.nan, math.nan)
    generator = numpy.random.default_rng(0) if generator is None else generator
    means = known[generator.integers(len(known), size=(draws, len(known)))].mean(1)
    return Estimate(float(known.mean()), *numpy.quantile(means, [0.025, 0.975]).tolist())


def by_layout(rows: Sequence[Row], metric: str) -> list[float]:
    """For each layout the mean over its seeds."""
    layouts: dict[str, list[float]] = {}
    for row in rows:
        if not math.isnan(value := getattr(row, metric)):
            layouts.setdefault(row.layout, []).append(value)
    return [statistics.fmean(values) for values in layouts.values()]


def differences(rows: Sequence[Row], base: Sequence[Row], metric: str) -> list[float]:
    """For each layout by how much `rows` are above `base`, from the same noise: mean over seeds."""
    values = {(row.layout, row.seed): getattr(row, metric) for row in base}
    pairs = [
        replace(row, **{metric: getattr(row, metric) - values[row.layout, row.seed]})
        for row in rows
        if (row.layout, row.seed) in values
    ]
    return by_layout(pairs, metric)


# ------------------------------------------------------------------ tables and figures


def report(
    folder: str | os.PathLike[str],
    layouts: Sequence[NamedLayout],
    *,
    metrics: Sequence[str] | None = None,
    detector: Detector | None = None,
) -> str:
    """Write `table.md`, `methods.png` and `strata.png` into a folder of results.

    Args:
        folder: what `run` filled.
        layouts: the ones it drew.
        metrics: names of `METRICS`; all of them by default (average precision where pycocotools is
            installed). The first is the one that strata are compared by.
        detector: for average precision; the storybook's by default.

    Returns:
        The tables in Markdown.

    Raises:
        BenchmarkError: an unknown metric (lists the known ones), or no results.
    """
    folder, chosen = Path(folder), checked_metrics(metrics)
    methods = results_by_method(folder)
    rows = [row for own in methods.values() for row in own]
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))

    precision: dict[str, float] = {}
    if "ap" in chosen:
        detector = LookingOnce() if detector is None else detector
        named = {one.name: one.layout for one in layouts}
        for name, own in tqdm(methods.items(), "average precision", leave=False, disable=None):
            pairs = []
            for row in own:
                with Image.open(picture_file(folder, name, row.layout, row.seed)) as image:
                    pairs.append((image.convert("RGB"), named[row.layout]))
            precision[name] = average_precision(detector, pairs)["AP"]

    seeds = sorted({row.seed for row in rows})
    text = "\n\n".join(
        [
            f"{len({row.layout for row in rows})} layouts, {len(seeds)} "
            f"seed{'s' if len(seeds) > 1 else ''}, {settings['num_inference_steps']} steps, "
            f"guidance scale {settings['guidance_scale']:g}. In brackets: 95 % bootstrap interval "
            "over layouts. The ground truth is the scene itself: no method can be expected to do "
            "better. A picture's IoU, success, colour and leakage are means over its layers. "
            "T2I-Sim is the CLIP score / 100.",
            "## How well the layouts are obeyed\n\n" + quality_table(methods, chosen, precision),
            "## Difference to our default\n\n" + differences_table(methods, chosen),
            f"## {METRICS[chosen[0]].heading} by stratum\n\n" + _strata(methods, layouts, chosen),
            "## What it costs\n\n" + cost_table(methods, settings),
        ]
    )
    write_atomically(folder / "table.md", text.encode() + b"\n")
    for name, figure in (
        ("methods.png", methods_figure(methods, chosen, precision)),
        ("strata.png", strata_figure(methods, layouts, chosen)),
    ):
        png = io.BytesIO()
        figure.savefig(png, dpi=120)
        write_atomically(folder / name, png.getvalue())
    return text


def results_by_method(folder: str | os.PathLike[str]) -> dict[str, list[Row]]:
    """The rows of a folder of results, method by method, as they were asked for; the ceiling last.

    Raises:
        BenchmarkError: no results.
    """
    rows = read_results(folder)
    if not rows:
        raise BenchmarkError(f"{folder} holds no results; run the benchmark first")
    settings = json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
    # The ceiling stands last, whatever was added later.
    order = sorted(settings["methods"], key=lambda name: name == GROUND_TRUTH)
    methods = {name: [row for row in rows if row.method == name] for name in order}
    return {name: own for name, own in methods.items() if own}


def checked_metrics(metrics: Sequence[str] | None = None) -> list[str]:
    """The metrics by name, or all that can be measured here.

    Raises:
        BenchmarkError: an unknown one (lists the known ones), or one that needs a package.
    """
    installed = importlib.util.find_spec("pycocotools") is not None
    if metrics is None:
        return [name for name in METRICS if name != "ap" or installed]
    for name in metrics:
        if name not in METRICS:
            raise BenchmarkError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
    if list(metrics) == ["ap"]:
        raise BenchmarkError("ap is of all pictures together; give another metric beside it")
    if "ap" in metrics and not installed:
        raise BenchmarkError("ap needs pycocotools: pip install pycocotools")
    return sorted(metrics, key=lambda name: name == "ap")


Rows = Mapping[str, Sequence[Row]]


def quality_table(
    methods: Rows, metrics: Sequence[str], precision: Mapping[str, float] | None = None
) -> str:
    """A row a method in Markdown: means and intervals; `precision` where "ap" is a metric."""
    lines = []
    for name, rows in methods.items():
        cells = [
            _number((precision or {})[name], metric)
            if metric == "ap"
            else _interval(estimate(by_layout(rows, metric)), metric)
            for metric in metrics
        ]
        lines.append([name, str(len(rows)), *cells])
    return _markdown(["method", "pictures", *_headings(metrics)], lines)


def differences_table(methods: Rows, metrics: Sequence[str]) -> str:
    """A row a method in Markdown: the paired differences to our default."""
    if "default" not in methods:
        return "The default was not among the methods."
    metrics = [metric for metric in metrics if metric != "ap"]
    lines = [
        [
            name,
            *(
                _interval(estimate(differences(rows, methods["default"], metric)), metric, sign="+")
                for metric in metrics
            ),
        ]
        for name, rows in methods.items()
        if name not in ("default", GROUND_TRUTH)
    ]
    return "From the same noise.\n\n" + _markdown(["method", *_headings(metrics)], lines)


def _strata(methods: Rows, layouts: Sequence[NamedLayout], metrics: Sequence[str]) -> str:
    lines = []
    for stratum in dict.fromkeys(one.stratum for one in layouts):
        cells = []
        for rows in methods.values():
            own = [row for row in rows if row.stratum == stratum]
            cells.append(_interval(estimate(by_layout(own, metrics[0])), metrics[0], half=True))
        count = sum(one.stratum == stratum for one in layouts)
        lines.append([stratum, str(count), *cells])
    return "± is half of the interval.\n\n" + _markdown(["stratum", "layouts", *methods], lines)


def cost_table(methods: Rows, settings: Mapping[str, Any]) -> str:
    """A row a method in Markdown: seconds, U-Net calls, backward passes, memory."""
    plain = {(row.layout, row.seed): row.seconds for row in methods.get("plain", ())}

    def ratio(rows: Sequence[Row]) -> str:
        ratios = [
            row.seconds / plain[row.layout, row.seed]
            for row in rows
            if (row.layout, row.seed) in plain
        ]
        return f"{statistics.median(ratios):.2f}" if ratios else "–"

    lines = []
    for name, rows in methods.items():
        if name == GROUND_TRUTH:
            continue
        memory = [row.memory for row in rows if not math.isnan(row.memory)]
        lines.append(
            [
                name,
                f"{statistics.median(row.seconds for row in rows):.2f}",
                ratio(rows),
                ratio([row for row in rows if row.layers == 3]),
                f"{statistics.fmean(row.unet_calls for row in rows):.1f}",
                f"{statistics.fmean(row.backward_passes for row in rows):.1f}",
                f"{max(memory):.0f}" if memory else "–",
            ]
        )
    together = ""
    if settings["batch_size"] > 1:
        together = (
            f" Our methods drew {settings['batch_size']} pictures at once, the others one by one: "
            "their seconds and memory are not comparable."
        )
    return (
        f"On {settings['machine']}. Seconds are medians; × plain is the median of the ratios to "
        "the plain caption's seconds for the same layout. A U-Net call is one noisy picture with "
        f"one prompt. Memory is the peak beyond what was held before.{together}\n\n"
        + _markdown(
            [
                "method",
                "seconds a picture",
                "× plain",
                "× plain, three layers",
                "U-Net calls",
                "backward passes",
                "peak memory (MB)",
            ],
            lines,
        )
    )


def _headings(metrics: Sequence[str]) -> list[str]:
    return [
        METRICS[metric].heading + (" (less is better)" if METRICS[metric].less_is_better else "")
        for metric in metrics
    ]


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _number(value: float, metric: str, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{sign}.{METRICS[metric].decimals}f}"


def _interval(value: Estimate, metric: str, *, sign: str = "", half: bool = False) -> str:
    mean, low, high = (_number(one, metric, sign) for one in value)
    if low == "–":
        return mean
    return (
        f"{mean} ± {_number((value.high - value.low) / 2, metric)}"
        if half
        else (f"{mean} [{low}, {high}]")
    )


def methods_figure(
    methods: Rows, metrics: Sequence[str], precision: Mapping[str, float] | None = None
) -> Figure:
    """A panel a metric: each method's mean and interval, the ground truth as a dashed line."""
    names = [name for name in methods if name != GROUND_TRUTH]
    values = {
        metric: {
            name: Estimate((precision or {})[name], math.nan, math.nan)
            if metric == "ap"
            else estimate(by_layout(rows, metric))
            for name, rows in methods.items()
        }
        for metric in metrics
    }
    size = (1.8 + 2.1 * len(metrics), 1.3 + 0.28 * len(names))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        for height, name in enumerate(names):
            mean, low, high = values[metric][name]
            colour = BLUE if name == "default" else GREY
            panel.plot([low, high], [height, height], color=colour)
            panel.plot(mean, height, "o", color=colour)
        if GROUND_TRUTH in methods:
            panel.axvline(values[metric][GROUND_TRUTH].mean, color="black", linestyle="--")
        panel.set_xlabel(_headings([metric])[0])
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    sign = -1 if METRICS[metrics[0]].less_is_better else 1
    best = max(names, key=lambda name: sign * values[metrics[0]][name].mean)
    number = _number(values[metrics[0]][best].mean, metrics[0])
    figure.suptitle(
        f"Best {METRICS[metrics[0]].heading}: {best}, {number} "
        "(lines: 95 % intervals; dashed: ground truth)",
        fontsize=10,
    )
    return figure


def strata_figure(
    methods: Rows, layouts: Sequence[NamedLayout | Row], metrics: Sequence[str]
) -> Figure:
    """The first metric for each stratum (in the order of `layouts`) and method."""
    strata, metric = list(dict.fromkeys(one.stratum for one in layouts)), metrics[0]
    table = numpy.array(
        [
            [
                estimate(by_layout([row for row in rows if row.stratum == stratum], metric)).mean
                for rows in methods.values()
            ]
            for stratum in strata
        ]
    )
    size = (3 + 0.75 * len(methods), 1.8 + 0.3 * len(strata))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots()
    picture = axes.imshow(table, cmap="cividis", aspect="auto")
    middle = (numpy.nanmin(table) + numpy.nanmax(table)) / 2
    for (row, column), value in numpy.ndenumerate(table):
        text = "–" if math.isnan(value) else f"{value:.{METRICS[metric].decimals - 1}f}"
        colour = "black" if math.isnan(value) or value > middle else "white"
        axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(methods)), methods, rotation=40, ha="right")
    axes.set_yticks(range(len(strata)), strata)
    figure.colorbar(picture, label=METRICS[metric].heading)
    first = next(iter(methods))
    own = table[:, 0]
    worst = (numpy.nanargmax if METRICS[metric].less_is_better else numpy.nanargmin)(own)
    axes.set_title(f"{METRICS[metric].heading} by stratum: {first} is weakest at {strata[worst]!r}")
    return figure
