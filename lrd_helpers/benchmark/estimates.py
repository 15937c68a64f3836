"""Means, their intervals, and paired differences of what was measured."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy

from lrd_helpers.benchmark.folder import Row
from lrd_helpers.benchmark.layouts import BenchmarkError

Rows = Mapping[str, Sequence[Row]]
"""The rows of each method."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    heading: str
    decimals: int = 3
    less_is_better: bool = False
    of_overlaps: bool = False  # so that most pictures have none

    @property
    def column(self) -> str:
        """The heading, and which way is better where it is not up."""
        return self.heading + (" (less is better)" if self.less_is_better else "")

    def text(self, value: float, sign: str = "") -> str:
        """A value, or a dash for NaN."""
        return "–" if math.isnan(value) else f"{value:{sign}.{self.decimals}f}"


METRICS = {
    "iou": Metric("IoU"),
    "success": Metric("success"),
    "picture_success": Metric("picture success"),
    "attribute": Metric("colour right"),
    "leakage": Metric("leakage", less_is_better=True),
    "clip": Metric("CLIP score", decimals=1),
    "overlap_iou": Metric("O-mIoU", of_overlaps=True),
    "order": Metric("order right", of_overlaps=True),
    "ap": Metric("AP"),
}
"""What can be in the tables; T2I-Sim is the CLIP score / 100."""


def checked_metrics(metrics: Sequence[str] | None = None) -> list[str]:
    """The metrics by name, or all that can be measured here.

    Raises:
        BenchmarkError: an unknown name (lists what there is), or a metric that needs a package.
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


def present(methods: Rows, metrics: Sequence[str]) -> list[str]:
    """The metrics that some row has; the first also where none has it."""
    rows = [row for of_method in methods.values() for row in of_method]
    return [
        metric
        for number, metric in enumerate(metrics)
        if not number or metric == "ap" or any(not math.isnan(getattr(row, metric)) for row in rows)
    ]


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
        values: a value per independent thing: of several seeds of a layout, their mean.
        generator: draws the samples; by default a new one of seed 0, so that the same values have
            the same interval.
        draws: how many samples, each as large as `values`, with repetition.
    """
    numbers = numpy.array([value for value in values if not math.isnan(value)])
    if not len(numbers):
        return Estimate(math.nan, math.nan, math.nan)
    if len(numbers) < 2:
        return Estimate(float(numbers[0]), math.nan, math.nan)
    generator = numpy.random.default_rng(0) if generator is None else generator
    means = numbers[generator.integers(len(numbers), size=(draws, len(numbers)))].mean(1)
    return Estimate(float(numbers.mean()), *numpy.quantile(means, [0.025, 0.975]).tolist())


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


def interval(rows: Sequence[Row], metric: str) -> Estimate:
    """The mean over layouts, with its interval."""
    return estimate(by_layout(rows, metric))
