"""The report of a folder: its tables in a page of Markdown, and two figures."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lrd_helpers.benchmark.contenders import BEST, GROUND_TRUTH
from lrd_helpers.benchmark.estimates import METRICS, Rows, checked_metrics, present
from lrd_helpers.benchmark.figures import methods_figure, strata_figure
from lrd_helpers.benchmark.folder import (
    Row,
    check_rows,
    picture_file,
    read_picture,
    read_results,
    read_settings,
)
from lrd_helpers.benchmark.judges import LookingOnce
from lrd_helpers.benchmark.layouts import BenchmarkError, NamedLayout
from lrd_helpers.benchmark.tables import (
    cost_table,
    differences_table,
    difficulty_table,
    objects_table,
    overlaps_table,
    quality_table,
    strata_table,
)
from lrd_helpers.files import write_atomically
from lrd_helpers.measure import Detector, average_precision

OVERLAPS = (
    "Of the layouts whose boxes overlap. O-mIoU: the overlap of two things against that of their "
    "boxes. Order right: where two things meet, most of what is seen is the front one's."
)


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
        layouts: the layouts it drew.
        metrics: names of `METRICS`; all of them by default (average precision where pycocotools is
            installed). The first is the metric that strata are compared by.
        detector: for average precision; the storybook's by default.

    Returns:
        The tables in Markdown.

    Raises:
        BenchmarkError: an unknown metric (lists what there is), no results, those of other
            layouts, or a damaged file; names it.
    """
    folder, chosen = Path(folder), checked_metrics(metrics)
    methods, settings = results_by_method(folder), read_settings(folder)
    drawn = (row.layout for rows in methods.values() for row in rows)
    check_rows(folder, "layout", drawn, {layout.name for layout in layouts})
    precision: dict[str, float] = {}
    if "ap" in chosen:
        precision = _precision(folder, methods, layouts, detector)
    text = _page(methods, layouts, settings, chosen, precision)
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
        BenchmarkError: no results, or a damaged file; names it.
    """
    rows = read_results(folder)
    if not rows:
        raise BenchmarkError(f"{folder} holds no results; run the benchmark first")
    # The ceiling stands last, whatever was added later.
    order = sorted(read_settings(folder)["methods"], key=lambda name: name == GROUND_TRUTH)
    check_rows(Path(folder), "method", (row.method for row in rows), order)
    methods = {name: [row for row in rows if row.method == name] for name in order}
    return {name: rows for name, rows in methods.items() if rows}


def _precision(
    folder: Path, methods: Rows, layouts: Sequence[NamedLayout], detector: Detector | None
) -> dict[str, float]:
    """Average precision of each method, from its pictures."""
    detector = LookingOnce() if detector is None else detector
    by_name = {layout.name: layout.layout for layout in layouts}
    precision = {}
    for name, rows in tqdm(methods.items(), "average precision", leave=False, disable=None):
        pairs = []
        for row in rows:
            image = read_picture(picture_file(folder, name, row.layout, row.seed))
            pairs.append((image, by_name[row.layout]))
        precision[name] = average_precision(detector, pairs)["AP"]
    return precision


def _page(
    methods: Rows,
    layouts: Sequence[NamedLayout],
    settings: Mapping[str, Any],
    metrics: Sequence[str],
    precision: Mapping[str, float],
) -> str:
    rows = [row for rows in methods.values() for row in rows]
    seeds = len({row.seed for row in rows})
    first, metrics = metrics[0], present(methods, metrics)
    whole = [metric for metric in metrics if not METRICS[metric].of_overlaps]
    overlaps = [metric for metric in metrics if METRICS[metric].of_overlaps]
    truth = "The ground truth is the scene itself: no method can be expected to do better. "
    sections = [
        f"{len({row.layout for row in rows})} layouts, {seeds} "
        f"seed{'s' if seeds > 1 else ''}, {settings['num_inference_steps']} steps, "
        f"guidance scale {settings['guidance_scale']:g}. In brackets: 95 % bootstrap interval "
        f"over layouts. {truth if GROUND_TRUTH in methods else ''}"
        "A picture's IoU, success, colour and leakage are means over its layers. "
        "A picture succeeds where all its layers do. T2I-Sim is the CLIP score / 100.",
    ]
    if whole:
        table = quality_table(methods, whole, precision)
        sections.append(f"## How well the layouts are obeyed\n\n{table}")
    if overlaps:
        tables = [overlaps_table(methods, overlaps)]
        for metric in overlaps:
            tables.append(f"{METRICS[metric].heading}. {difficulty_table(methods, metric)}")
        sections.append("\n\n".join(["## Where boxes overlap", OVERLAPS, *tables]))
    for base, name in ((BEST, "the collage"), ("lrdiff", "lrdiff")):
        if base == BEST or base in methods:
            table = differences_table(methods, metrics, base)
            sections.append(f"## Difference to {name}\n\n{table}")
    table = strata_table(methods, layouts, first)
    sections.append(f"## {METRICS[first].heading} by stratum\n\n{table}")
    if "picture_success" in metrics:
        sections.append(f"## Picture success by number of objects\n\n{objects_table(methods)}")
    sections.append("## What it costs\n\n" + cost_table(methods, settings))
    return "\n\n".join(sections)
