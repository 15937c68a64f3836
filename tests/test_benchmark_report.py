"""The report's parts, as a notebook shows them; the whole report is in test_benchmark.py."""

from __future__ import annotations

import pytest
from test_benchmark import filled, row

from lrd_helpers.benchmark import (
    GROUND_TRUTH,
    BenchmarkError,
    cost_table,
    differences_table,
    methods_figure,
    quality_table,
    results_by_method,
    strata_figure,
)


def test_parts_of_the_report_from_rows_alone(tmp_path) -> None:
    rows = [
        row(name, layout, iou)
        for name, layout, iou in (
            (GROUND_TRUTH, "car", 1.0),
            ("plain", "car", 0.2),
            ("default", "car", 0.8),
            ("plain", "both", 0.4),
        )
    ]
    methods = results_by_method(filled(tmp_path / "out", rows))
    assert list(methods)[-1] == GROUND_TRUTH
    assert [one.layout for one in methods["plain"]] == ["both", "car"]
    assert "| plain | 2 | 0.300 [0.200, 0.400] |" in quality_table(methods, ["iou"]).splitlines()
    assert "| plain | -0.600 |" in differences_table(methods, ["iou"]).splitlines()
    settings = {"machine": "a machine", "batch_size": 1}
    assert "On a machine." in cost_table(methods, settings)
    assert len(methods_figure(methods, ["iou", "clip"]).axes) == 2
    assert strata_figure(methods, methods["plain"], ["iou"]).axes
    with pytest.raises(BenchmarkError, match="holds no results"):
        results_by_method(tmp_path)
