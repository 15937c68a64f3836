"""The figures of a report: a panel per metric, and a table in colours of the strata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrd_helpers.benchmark.contenders import BEST, GROUND_TRUTH
from lrd_helpers.benchmark.estimates import METRICS, Estimate, Rows, interval, present
from lrd_helpers.benchmark.folder import Row
from lrd_helpers.benchmark.layouts import NamedLayout
from lrd_helpers.plotting import BLUE, GREEN, GREY, ORANGE

MOST_PANELS = 5
"""Beside each other; more panels get another line."""


def methods_figure(
    methods: Rows, metrics: Sequence[str], precision: Mapping[str, float] | None = None
) -> Figure:
    """A panel per metric: each method's mean and interval, the ground truth as a dashed line.

    A metric that no row has gets no panel.
    """
    metrics = present(methods, metrics)
    names = [name for name in methods if name != GROUND_TRUTH]
    values = {
        metric: {
            name: Estimate((precision or {})[name], math.nan, math.nan)
            if metric == "ap"
            else interval(rows, metric)
            for name, rows in methods.items()
        }
        for metric in metrics
    }
    figure, panels = _panels(len(metrics), 0.28 * len(names))
    for panel, metric in zip(panels, metrics, strict=True):
        for height, name in enumerate(names):
            mean, low, high = values[metric][name]
            colour = BLUE if name == BEST else GREY
            panel.plot([low, high], [height, height], color=colour)
            panel.plot(mean, height, "o", color=colour)
        if GROUND_TRUTH in methods:
            panel.axvline(values[metric][GROUND_TRUTH].mean, color="black", linestyle="--")
        panel.set_xlabel(METRICS[metric].column)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), [*map(_short, names)], parse_math=False)
    panels[0].invert_yaxis()
    title = _best(names, metrics[0], values[metrics[0]])
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels of that height (in inches), in lines of about equal length."""
    lines = math.ceil(count / MOST_PANELS)
    columns = math.ceil(count / lines)
    size = (1.8 + 2.1 * columns, 0.5 + lines * (0.8 + height))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for empty in axes[count:]:
        empty.remove()
    return figure, list(axes[:count])


def _best(names: Sequence[str], metric: str, values: Mapping[str, Estimate]) -> str:
    sign = -1 if METRICS[metric].less_is_better else 1
    measured = [name for name in names if not math.isnan(values[name].mean)]
    best = max(measured or names, key=lambda name: sign * values[name].mean)
    number = METRICS[metric].text(values[best].mean)
    return (
        f"Best {METRICS[metric].heading}: {_short(best)}, {number} "
        "(lines: 95 % intervals; dashed: ground truth)"
    )


def strata_figure(
    methods: Rows, layouts: Sequence[NamedLayout | Row], metrics: Sequence[str]
) -> Figure:
    """The first metric for each stratum (in the order of `layouts`) and method."""
    strata, metric = list(dict.fromkeys(layout.stratum for layout in layouts)), metrics[0]
    table = numpy.array(
        [
            [
                interval([row for row in rows if row.stratum == stratum], metric).mean
                for rows in methods.values()
            ]
            for stratum in strata
        ]
    )
    names = [*map(_short, methods)]
    slanted = 0.05 * max(0, *(len(name) - 16 for name in names))
    size = (3 + 0.75 * len(methods), 1.8 + 0.3 * len(strata) + slanted)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots()
    picture = axes.imshow(table, cmap="cividis", aspect="auto")
    middle = (numpy.nanmin(table) + numpy.nanmax(table)) / 2
    for (row, column), value in numpy.ndenumerate(table):
        text = "–" if math.isnan(value) else f"{value:.{METRICS[metric].decimals - 1}f}"
        colour = "black" if math.isnan(value) or value > middle else "white"
        axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", parse_math=False)
    axes.set_yticks(range(len(strata)), [*map(_short, strata)], parse_math=False)
    figure.colorbar(picture, label=METRICS[metric].heading)
    title = f"{METRICS[metric].heading} by stratum"
    if not numpy.isnan(table[:, 0]).all():
        worst = numpy.nanargmax if METRICS[metric].less_is_better else numpy.nanargmin
        title += f": {names[0]} is weakest at {_short(strata[worst(table[:, 0])])!r}"
    axes.set_title(title, parse_math=False)
    return figure


def objects_figure(methods: Rows, names: Sequence[str]) -> Figure:
    """Picture success by number of objects, mean and interval of the methods called `names`.

    The dotted line is what the first of them would have if its objects succeeded as often as they
    do on average, each whatever the others do: that share to the power of their number.
    """
    figure = Figure(figsize=(7.4, 3.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    counts = sorted({row.layers for row in methods[names[0]]})
    colours = (GREEN, BLUE, ORANGE, GREY, "black")
    for shift, (name, colour) in enumerate(zip(names, cycle(colours), strict=False)):
        rows = ([row for row in methods[name] if row.layers == count] for count in counts)
        means, lows, highs = zip(*(interval(each, "picture_success") for each in rows), strict=True)
        places = [count + 0.05 * (shift - len(names) / 2) for count in counts]
        axes.plot(places, means, "o-", color=colour, label=_short(name))
        axes.vlines(places, lows, highs, color=colour, lw=1)
    share = interval(methods[names[0]], "success").mean
    line = [share**count for count in counts]
    axes.plot(counts, line, ":", color=colours[0], label=f"{share:.2f} to the power of n")
    axes.set(xlabel="objects in the layout", ylabel="all of them right", ylim=(-0.03, 1.05))
    axes.set_title("Picture success falls with every object")
    axes.set_xticks(counts)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def cost_figure(methods: Rows, metric: str = "iou") -> Figure:
    """A metric against the cost of a picture: samples through the U-Net above, seconds below.

    A backward pass counts as two samples. The best method is blue, the other ones grey.
    """
    names = [name for name in methods if name != GROUND_TRUTH]
    names.sort(key=lambda name: interval(methods[name], metric).mean)
    kinds = {
        "U-Net samples a picture, a backward pass as two": lambda rows: numpy.mean(
            [row.unet_calls + 2 * row.backward_passes for row in rows]
        ),
        "median seconds a picture": lambda rows: numpy.median([row.seconds for row in rows]),
    }
    figure = Figure(figsize=(8.6, 6.4), layout="constrained", facecolor="white")
    for axes, (label, cost) in zip(figure.subplots(2, 1), kinds.items(), strict=True):
        costs = [float(cost(methods[name])) for name in names]
        _scatter(axes, names, costs, [interval(methods[name], metric).mean for name in names])
        axes.set(xlabel=label, ylabel=f"mean {METRICS[metric].heading}")
    figure.suptitle("Quality against cost: up and to the left is better", fontsize=10)
    return figure


def _scatter(axes: Axes, names: Sequence[str], costs: list[float], values: list[float]) -> None:
    """Named points on a logarithmic axis of costs; names that would meet move up."""
    taken: list[tuple[float, float]] = []
    room = 0.04 * max(values)
    for name, cost, value in zip(names, costs, values, strict=True):
        colour, height = BLUE if name == BEST else GREY, value
        axes.plot(cost, value, "o", color=colour)
        while any(abs(height - y) < 1.5 * room and 0.75 < cost / x < 1.33 for x, y in taken):
            height += room / 8
        taken.append((cost, height))
        axes.plot((cost, 1.03 * cost), (value, height), color=colour, lw=0.7)
        axes.text(1.035 * cost, height, _short(name), fontsize=9, va="center", parse_math=False)
    low, high = 0.85 * min(costs), 1.6 * max(costs)
    ticks = [n for n in (1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 200, 300) if low < n < high]
    axes.set(xscale="log", xlim=(low, high), ylim=(0, 1.2 * max(values)))
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _short(name: str) -> str:
    """A name as a label: dollars are no formula (`parse_math`), and panels keep their room."""
    return name if len(name) <= 40 else name[:39] + "…"
