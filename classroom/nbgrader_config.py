"""How nbgrader runs this course. The folder may be moved; whatever you add here is yours."""

import sys
from pathlib import Path

from nbgrader import preprocessors

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from grading import Execute, Restore  # noqa: E402

c = get_config()
c.CourseDirectory.course_id = "lrd"
c.CourseDirectory.root = str(HERE)
c.ClearSolutions.code_stub = {"python": ""}  # the stub stands above its solution, and stays
c.Autograde.sanitize_preprocessors = [
    Restore,
    preprocessors.OverwriteCells,
    preprocessors.CheckCellMetadata,
]
c.Autograde.autograde_preprocessors = [
    Execute,
    preprocessors.LimitOutput,
    preprocessors.SaveAutoGrades,
    preprocessors.AssignLatePenalties,
    preprocessors.CheckCellMetadata,
]
