"""Layouts × methods × seeds → a table.

    layouts = load_layouts()
    run(load_pipeline(), layouts, methods_named(["collage", "plain"]), output="outputs/benchmark")
    print(report("outputs/benchmark", layouts))

Every method draws every layout from the same noise. What was drawn is not drawn again: a run that
was killed goes on where it stopped, and methods and seeds can be added later.

| module | what |
|---|---|
| `layouts`, `coco` | what is drawn |
| `contenders` | who draws it: the methods, their ablations, the ground truth |
| `functions` | who else draws it: a function of your own |
| `cost`, `judges` | what a picture takes, and how good it is |
| `folder` | settings, rows and pictures on the disk |
| `runs` | draw and measure what is missing |
| `estimates`, `tables`, `figures`, `reports` | what came out: `table.md`, figures |

`torchrun --standalone --nproc_per_node 2 -m lrd_helpers benchmark` shares the work; on several GPUs
`accelerate launch` does so, too.
"""

from lrd_helpers.benchmark.coco import CocoRules, coco_layouts
from lrd_helpers.benchmark.contenders import (
    BEST,
    GROUND_TRUTH,
    Contender,
    GroundTruth,
    ablations,
    drawn,
    methods_named,
    with_and_without_background,
)
from lrd_helpers.benchmark.cost import Cost
from lrd_helpers.benchmark.estimates import (
    METRICS,
    Estimate,
    Metric,
    by_layout,
    checked_metrics,
    differences,
    estimate,
)
from lrd_helpers.benchmark.figures import cost_figure, methods_figure, objects_figure, strata_figure
from lrd_helpers.benchmark.folder import Row, picture_file, read_results
from lrd_helpers.benchmark.functions import ContenderError, Function
from lrd_helpers.benchmark.judges import LookingOnce, scored
from lrd_helpers.benchmark.layouts import (
    BenchmarkError,
    NamedLayout,
    ground_truth_scene,
    load_layouts,
    save_layouts,
    spread,
)
from lrd_helpers.benchmark.reports import report, results_by_method
from lrd_helpers.benchmark.runs import measure_again, noise_of, processes, run
from lrd_helpers.benchmark.tables import (
    cost_table,
    differences_table,
    difficulty_table,
    objects_table,
    overlaps_table,
    quality_table,
)

__all__ = [
    "BEST",
    "GROUND_TRUTH",
    "METRICS",
    "BenchmarkError",
    "CocoRules",
    "Contender",
    "ContenderError",
    "Cost",
    "Estimate",
    "Function",
    "GroundTruth",
    "LookingOnce",
    "Metric",
    "NamedLayout",
    "Row",
    "ablations",
    "by_layout",
    "checked_metrics",
    "coco_layouts",
    "cost_figure",
    "cost_table",
    "differences",
    "differences_table",
    "difficulty_table",
    "drawn",
    "estimate",
    "ground_truth_scene",
    "load_layouts",
    "measure_again",
    "methods_figure",
    "methods_named",
    "noise_of",
    "objects_figure",
    "objects_table",
    "overlaps_table",
    "picture_file",
    "processes",
    "quality_table",
    "read_results",
    "report",
    "results_by_method",
    "run",
    "save_layouts",
    "scored",
    "spread",
    "strata_figure",
    "with_and_without_background",
]
