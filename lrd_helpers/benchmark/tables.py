"""The tables of a report, in Markdown: quality, differences, strata, costs.

A metric that no row has gets no column.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lrd_helpers.benchmark.contenders import BEST, GROUND_TRUTH
from lrd_helpers.benchmark.estimates import (
    METRICS,
    Estimate,
    Rows,
    differences,
    estimate,
    interval,
    present,
)
from lrd_helpers.benchmark.folder import Row
from lrd_helpers.benchmark.layouts import NamedLayout

DIFFICULTIES = ("simple", "regular", "complex")
"""Thirds of the layouts that have overlaps. OverLayBench has such parts, too, by its own scores."""


def quality_table(
    methods: Rows, metrics: Sequence[str], precision: Mapping[str, float] | None = None
) -> str:
    """A row per method: means and intervals; `precision` where "ap" is a metric."""
    metrics, lines = present(methods, metrics), []
    for name, rows in methods.items():
        cells = [
            METRICS[metric].text((precision or {})[name])
            if metric == "ap"
            else _with_interval(interval(rows, metric), metric)
            for metric in metrics
        ]
        lines.append([name, str(len(rows)), *cells])
    return _markdown(["method", "pictures", *_columns(metrics)], lines)


def overlaps_table(methods: Rows, metrics: Sequence[str]) -> str:
    """As `quality_table`, of the pictures whose layouts have boxes that overlap."""
    overlapping = {
        name: [row for row in rows if not math.isnan(row.overlap_iou)]
        for name, rows in methods.items()
    }
    return quality_table({name: rows for name, rows in overlapping.items() if rows}, metrics)


def differences_table(methods: Rows, metrics: Sequence[str], base: str = BEST) -> str:
    """A row per method: the paired differences to `base`."""
    if base not in methods:
        return f"The {base} was not among the methods."
    metrics = present(methods, [metric for metric in metrics if metric != "ap"])
    lines = []
    for name, rows in methods.items():
        if name not in (base, GROUND_TRUTH):
            pairs = [differences(rows, methods[base], metric) for metric in metrics]
            cells = [
                _with_interval(estimate(values), metric, sign="+")
                for values, metric in zip(pairs, metrics, strict=True)
            ]
            lines.append([name, *cells])
    return "From the same noise.\n\n" + _markdown(["method", *_columns(metrics)], lines)


def strata_table(methods: Rows, layouts: Sequence[NamedLayout | Row], metric: str) -> str:
    """A row per stratum (in the order of `layouts`): each method's mean, half of the interval."""
    strata = dict.fromkeys(layout.stratum for layout in layouts)
    return _grouped(methods, metric, "stratum", strata, lambda row: row.stratum)


def objects_table(methods: Rows, metric: str = "picture_success") -> str:
    """A row per number of objects: each method's mean, half of the interval."""
    numbers = sorted({row.layers for rows in methods.values() for row in rows})
    return _grouped(methods, metric, "objects", map(str, numbers), lambda row: str(row.layers))


def difficulty_table(methods: Rows, metric: str) -> str:
    """A row per third of the layouts with overlaps, by their OverLayScore: as `strata_table`."""
    scores = {row.layout: row.overlay_score for rows in methods.values() for row in rows}
    order = sorted((score, layout) for layout, score in scores.items() if score)
    third = {
        layout: DIFFICULTIES[len(DIFFICULTIES) * place // len(order)]
        for place, (_, layout) in enumerate(order)
    }
    edges = [
        f"{name} {min(scores[layout] for layout in part):.3f} to "
        f"{max(scores[layout] for layout in part):.3f}"
        for name in DIFFICULTIES
        if (part := [layout for layout in third if third[layout] == name])
    ]
    table = _grouped(methods, metric, "overlaps", DIFFICULTIES, lambda row: third.get(row.layout))
    return f"OverLayScore: {', '.join(edges)}. {table}"


def _grouped(
    methods: Rows,
    metric: str,
    heading: str,
    groups: Iterable[str],
    group_of: Callable[[Row], str | None],
) -> str:
    """A row per group of layouts, a column per method."""
    lines = []
    for group in groups:
        parts = [[row for row in rows if group_of(row) == group] for rows in methods.values()]
        count = len({row.layout for part in parts for row in part})
        lines.append([group, str(count), *(_with_half(interval(p, metric), metric) for p in parts)])
    return "± is half of the interval.\n\n" + _markdown([heading, "layouts", *methods], lines)


def cost_table(methods: Rows, settings: Mapping[str, Any]) -> str:
    """A row per method: seconds, U-Net calls, backward passes, memory."""
    plain = methods.get("plain", ())
    lines = [[name, *_costs(rows, plain)] for name, rows in methods.items() if name != GROUND_TRUTH]
    together = ""
    if settings["batch_size"] > 1:
        together = (
            f" Our methods drew {settings['batch_size']} pictures at once, the others one by one: "
            "their seconds and memory are not comparable."
        )
    headings = ["method", "seconds a picture", "× plain", "× plain, three layers", "U-Net calls"]
    headings += ["backward passes", "peak memory (MB)"]
    return (
        f"On {settings['machine']}. Seconds are medians; × plain is the median of the ratios to "
        "the plain caption's seconds for the same layout. A U-Net call is one noisy picture with "
        f"one prompt. Memory is the peak beyond what was held before.{together}\n\n"
        + _markdown(headings, lines)
    )


def _costs(rows: Sequence[Row], plain: Sequence[Row]) -> list[str]:
    memory = [row.memory for row in rows if not math.isnan(row.memory)]
    return [
        f"{statistics.median(row.seconds for row in rows):.2f}",
        _ratio(rows, plain),
        _ratio([row for row in rows if row.layers == 3], plain),
        f"{statistics.fmean(row.unet_calls for row in rows):.1f}",
        f"{statistics.fmean(row.backward_passes for row in rows):.1f}",
        f"{max(memory):.0f}" if memory else "–",
    ]


def _ratio(rows: Sequence[Row], plain: Sequence[Row]) -> str:
    seconds = {(row.layout, row.seed): row.seconds for row in plain}
    ratios = [
        row.seconds / seconds[row.layout, row.seed]
        for row in rows
        if (row.layout, row.seed) in seconds
    ]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def _columns(metrics: Sequence[str]) -> list[str]:
    return [METRICS[metric].column for metric in metrics]


def _with_half(value: Estimate, metric: str) -> str:
    mean, half = (METRICS[metric].text(v) for v in (value.mean, (value.high - value.low) / 2))
    return mean if math.isnan(value.low) else f"{mean} ± {half}"


def _with_interval(value: Estimate, metric: str, sign: str = "") -> str:
    mean, low, high = (METRICS[metric].text(number, sign) for number in value)
    return mean if math.isnan(value.low) else f"{mean} [{low}, {high}]"


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    named = [[_plain(first), *others] for first, *others in lines]
    rows = [[*map(_plain, headings)], ["---"] * len(headings), *named]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _plain(name: str) -> str:
    """A name that Markdown shows as it is: no cell ends in it, and no formula begins."""
    return re.sub(r"([\\|$<*`\[])", r"\\\1", name)
