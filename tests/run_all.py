"""Run every test and replay every notebook, on all cores: `make test`.

It is pytest, spread over one process a core by pytest-xdist. A file stays within one process,
because a notebook is one kernel. The longest files go first, so that all cores are done together.

python tests/run_all.py            all of it, as `pytest` alone runs it on one core
python tests/run_all.py --quick    without the notebooks and without what is marked as slow

What else is given goes to pytest: `python tests/run_all.py --quick -k mask`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_PROCESSES = 8  # each of them, and each kernel, holds a PyTorch of its own
LONGEST = (
    "test_pipeline_common",
    "test_widgets_browser",
    "test_pipeline",
    "test_assets",
    "test_methods",
    "test_training",
    "test_attention",
    "test_site",
)
"""The test files that take longest, the longest first. They follow the notebooks."""


def files(*, quick: bool) -> list[str]:
    """What is run, in this order."""
    notebooks = [] if quick else sorted((ROOT / "notebooks").glob("*.ipynb"))
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    tests.sort(key=lambda path: LONGEST.index(path.stem) if path.stem in LONGEST else len(LONGEST))
    return [str(path.relative_to(ROOT)) for path in (*notebooks, *tests)]


def main(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Pytest's status: 0 if all was collected, and nothing failed."""
    more = [argument for argument in arguments if argument != "--quick"]
    quick = len(more) < len(arguments)
    cores = os.cpu_count() or 1
    processes = min(cores, MOST_PROCESSES)
    command = [sys.executable, "-m", "pytest", *(["-m", "not slow"] if quick else [])]
    command += [f"--numprocesses={processes}", "--dist=loadfile", "--no-loadscope-reorder"]
    threads = {"OMP_NUM_THREADS": str(cores // processes)}
    done = subprocess.run(
        [*command, *more, *files(quick=quick)],
        cwd=ROOT,
        env={**threads, **environment},
        check=False,
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
