"""The tables of a report, in Markdown: quality, differences, strata, costs."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lrd_helpers.benchmark.contenders import BEST, GROUND_TRUTH
from lrd_helpers.benchmark.estimates import (
    METRICS,
    Estimate,
    Rows,
    differences,
    estimate,
    interval,
)
from lrd_helpers.benchmark.folder import Row
from lrd_helpers.benchmark.layouts import NamedLayout


def quality_table(
    methods: Rows, metrics: Sequence[str], precision: Mapping[str, float] | None = None
) -> str:
    """A row per method: means and intervals; `precision` where "ap" is a metric."""
    lines = []
    for name, rows in methods.items():
        cells = [
            METRICS[metric].text((precision or {})[name])
            if metric == "ap"
            else _with_interval(interval(rows, metric), metric)
            for metric in metrics
        ]
        lines.append([name, str(len(rows)), *cells])
    return _markdown(["method", "pictures", *_columns(metrics)], lines)


def differences_table(methods: Rows, metrics: Sequence[str]) -> str:
    """A row per method: the paired differences to the collage."""
    if BEST not in methods:
        return "The collage was not among the methods."
    metrics = [metric for metric in metrics if metric != "ap"]
    lines = []
    for name, rows in methods.items():
        if name not in (BEST, GROUND_TRUTH):
            pairs = [differences(rows, methods[BEST], metric) for metric in metrics]
            cells = [
                _with_interval(estimate(values), metric, sign="+")
                for values, metric in zip(pairs, metrics, strict=True)
            ]
            lines.append([name, *cells])
    return "From the same noise.\n\n" + _markdown(["method", *_columns(metrics)], lines)


def strata_table(methods: Rows, layouts: Sequence[NamedLayout], metric: str) -> str:
    """A row per stratum: each method's mean, and half of the interval."""
    lines = []
    for stratum in dict.fromkeys(layout.stratum for layout in layouts):
        cells = []
        for rows in methods.values():
            value = interval([row for row in rows if row.stratum == stratum], metric)
            half = METRICS[metric].text((value.high - value.low) / 2)
            mean = METRICS[metric].text(value.mean)
            cells.append(mean if math.isnan(value.low) else f"{mean} ± {half}")
        count = sum(layout.stratum == stratum for layout in layouts)
        lines.append([stratum, str(count), *cells])
    return "± is half of the interval.\n\n" + _markdown(["stratum", "layouts", *methods], lines)


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
