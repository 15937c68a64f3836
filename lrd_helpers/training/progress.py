"""How far a training has come: its counts, its log.csv, and those of the runs it started from."""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lrd_helpers.files import write_atomically

COUNTS = ("step", "samples", "seconds")

Row = dict[str, str]


@dataclass
class Progress:
    """How far a training has come; `seconds` counts time spent in steps, over all resumes.

    `earlier_options` has the values of options that were changed since, and "until_step".
    """

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    earlier_options: list[dict[str, Any]] = field(default_factory=list)


class Log:
    """log.csv: one row every so many steps, each the mean over the steps since the last row."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.sums, self.count = path, {}, 0
        rows = [row for row in read_log(path) if int(row["step"]) <= step]
        if rows:  # without those after the checkpoint, and one that was cut off
            write_atomically(path, csv_of(rows))
        else:
            path.unlink(missing_ok=True)

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.count += 1

    def write(self, progress: Progress, learning_rate: float) -> dict[str, float]:
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        row = {
            "step": progress.step,
            "samples": progress.samples,
            "seconds": round(progress.seconds, 1),
            "learning_rate": f"{learning_rate:.3g}",
            **{name: f"{mean:.5g}" for name, mean in means.items()},
        }
        try:
            with self.path.open("ab") as file:
                file.write(csv_of([row], header=not file.tell()))
        except OSError as error:
            raise OSError(f"could not write {self.path}: {error}; the checkpoints stand") from error
        self.sums, self.count = {}, 0
        return means


def csv_of(rows: list[dict[str, Any]], *, header: bool = True) -> bytes:
    """The rows as a table, in UTF-8."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_log(path: Path) -> list[Row]:
    """The rows of a log.csv; none if it is not there.

    A last row without a line break is left out: it was cut off by a kill or a full disk.

    Raises:
        ValueError: another row is no row of numbers.
    """
    if not path.exists():
        return []
    text = path.read_bytes().decode(errors="replace")
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    rows = []
    try:
        for row in reader:
            for name, value in row.items():
                (int if name in ("step", "samples") else float)(value)
            rows.append(row)
        if rows and not rows[0].keys() >= set(COUNTS):
            raise ValueError
    except (ValueError, TypeError, csv.Error):
        raise ValueError(
            f"{path}, line {reader.line_num}: expected are the numbers {', '.join(COUNTS)}, …; "
            "delete that line"
        ) from None
    return rows


def earlier_runs(start_from: Path | None) -> list[dict[str, int | float]]:
    """The runs that made the weights a training starts from, the latest first.

    Raises:
        ValueError: `training.json` is there, but does not tell.
    """
    if start_from is None or not (start_from / "training.json").exists():
        return []
    file = start_from / "training.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return [
            {name: run[name] + 0 for name in COUNTS} for run in (record, *record.get("before", []))
        ]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is no record of a training ({type(error).__name__}: {str(error)[:80]}); "
            "without this file the model can be started from"
        ) from error


def joined_logs(
    start_from: Path | None, run: Path, before: list[dict[str, int | float]]
) -> list[Row]:
    """The rows of a run's log, after those of the runs it started from; counts go on."""
    rows = read_log(run / "log.csv")
    for row in rows:
        for name in ("step", "samples"):
            row[name] = str(int(row[name]) + sum(earlier[name] for earlier in before))
        seconds = float(row["seconds"]) + sum(earlier["seconds"] for earlier in before)
        row["seconds"] = f"{seconds:.1f}"
    earlier = [] if start_from is None else read_log(start_from / "log.csv")
    if not earlier or not rows:
        return rows
    # Another version of the training, or other options, may have logged other losses.
    shared = [name for name in earlier[0] if name in rows[0]]
    return [{name: row[name] for name in shared} for row in earlier + rows]
