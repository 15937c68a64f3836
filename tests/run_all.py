"""Run the tests and, beside them, replay the notebooks: `make test`.

Small models leave half of the cores idle: two processes with half of the threads each are done much
sooner than one after the other. What `pytest` alone runs is the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITH_THE_TESTS = 3  # so many notebooks come after the tests: then both processes take as long


def main() -> int:
    """0 if all is well, otherwise the status of the first of the two that failed."""
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    pytest = [sys.executable, "-m", "pytest"]
    notebooks = sorted(str(path) for path in (ROOT / "notebooks").glob("*.ipynb"))
    with tempfile.TemporaryFile() as replayed:
        beside = subprocess.Popen(
            # Its cache would be the other one's, too.
            [*pytest, "-p", "no:cacheprovider", *notebooks[WITH_THE_TESTS:]],
            cwd=ROOT,
            env=environment,
            stdout=replayed,
            stderr=subprocess.STDOUT,
        )
        try:
            tests = subprocess.run(
                [*pytest, "tests", *notebooks[:WITH_THE_TESTS]],
                cwd=ROOT,
                env=environment,
                check=False,
            )
            print("waiting for the other notebooks, which are replayed beside", flush=True)
            beside.wait()
        finally:
            beside.terminate()
            beside.wait()
            replayed.seek(0)
            sys.stdout.write(replayed.read().decode(errors="replace"))
    return tests.returncode or beside.returncode


if __name__ == "__main__":
    sys.exit(main())
