"""The folder of a benchmark: its settings, its table of results, its pictures.

| file | what |
|---|---|
| `settings.json` | what the numbers depend on: a run with other settings is refused |
| `results.csv` | a row per picture; while a run goes on, `results.N.csv` of each process |
| `pictures/` | the pictures |
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from PIL import Image

from lrd_helpers.benchmark.contenders import Contender, choices_of
from lrd_helpers.benchmark.judges import Judges, digest
from lrd_helpers.benchmark.layouts import BenchmarkError, NamedLayout
from lrd_helpers.files import write_atomically
from lrd_helpers.machine import describe_machine

if TYPE_CHECKING:
    from lrd_helpers.pipeline import LayeredRenderingPipeline

VERSION = 1
"""Of a folder of results."""


Key = tuple[str, str, int]
"""A picture of a folder: method, layout, seed."""


# ------------------------------------------------------------------ results


@dataclass(frozen=True)
class Row:
    """A picture's numbers; of `iou` to `leakage` the mean over its layers.

    So a picture of four objects counts as much as one of one. NaN: there is nothing to measure (no
    layer names a colour; memory on machines other than Linux and CUDA).
    """

    method: str
    layout: str
    stratum: str
    seed: int
    layers: int
    iou: float  # `layout_iou`, 0 to 1
    success: float  # share of the layers with IoU ≥ 0.5
    attribute: float  # `attribute_accuracy`, 0 to 1
    leakage: float  # 0 to 1, less is better
    clip: float  # `clip_score`, 100·cos
    unet_calls: int  # a call: one noisy picture with one prompt
    backward_passes: int
    seconds: float
    memory: float  # peak beyond what was held before, in MB

    @property
    def key(self) -> Key:
        return self.method, self.layout, self.seed


COLUMNS = [field.name for field in fields(Row)]


def read_results(folder: str | os.PathLike[str]) -> list[Row]:
    """The rows of a folder, in the order of their names; a line that was cut off is left out.

    Raises:
        BenchmarkError: a table with other columns.
    """
    rows, kinds = {}, get_type_hints(Row)
    for path in sorted(Path(folder).glob("results*.csv")):
        text = path.read_text(encoding="utf-8")
        header, *lines = [*csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))] or [COLUMNS]
        if header != COLUMNS:
            raise BenchmarkError(f"{path} has other columns than this version; give another folder")
        for line in lines:
            cells = zip(COLUMNS, line, strict=True)
            row = Row(**{name: kinds[name](cell) for name, cell in cells})
            rows[row.key] = row
    return [rows[key] for key in sorted(rows)]


def write_results(folder: Path, rows: Sequence[Row]) -> None:
    """Write the table whole, in place of what the processes wrote."""
    parts = list(folder.glob("results.*.csv"))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_cells(row) for row in rows)
    write_atomically(folder / "results.csv", table.getvalue().encode())
    for part in parts:
        part.unlink()


def merge(folder: Path) -> None:
    """Put the processes' tables together into one."""
    write_results(folder, read_results(folder))


@contextlib.contextmanager
def table_of(folder: Path, process: int) -> Iterator[Callable[[Row], None]]:
    """A function that adds a row to a process's table; each row is on the disk at once."""
    with (folder / f"results.{process}.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)

        def write(row: Row) -> None:
            table.writerow(_cells(row))
            file.flush()

        yield write


def _cells(row: Row) -> list[str]:
    return [
        f"{value:.6g}" if isinstance(value, float) else str(value) for value in vars(row).values()
    ]


# ------------------------------------------------------------------ pictures


def picture_file(folder: Path, method: str, layout: str, seed: int) -> Path:
    """The file of a picture."""
    return folder / "pictures" / method / f"{layout}-{seed}.png"


def write_picture(path: Path, image: Image.Image) -> None:
    """Write a picture whole or not at all."""
    png = io.BytesIO()
    image.save(png, "PNG")
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, png.getvalue())


# ------------------------------------------------------------------ settings


def settings_of(
    pipe: LayeredRenderingPipeline,
    layouts: Sequence[NamedLayout],
    methods: Mapping[str, Contender],
    judges: Judges,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What draws, what is drawn, who judges; and the machine, which makes no difference."""
    scheduler = json.loads(pipe.scheduler.to_json_string())
    settings = {
        "version": VERSION,
        "layouts": digest_of_layouts(layouts),
        "model": digest(pipe.unet, pipe.vae, pipe.text_encoder),
        "scheduler": {
            name: value
            for name, value in scheduler.items()
            if name == "_class_name" or not name.startswith("_")
        },
        **judges.names,
        "machine": describe_machine(),
        **options,
        "methods": {name: choices_of(method) for name, method in methods.items()},
    }
    return json.loads(json.dumps(settings))


def digest_of_layouts(layouts: Sequence[NamedLayout]) -> str:
    """A short name for a list of layouts: another list, another name."""
    text = "".join(
        f"{layout.name} {layout.stratum} {layout.layout.to_json()}" for layout in layouts
    )
    return f"{len(layouts)}, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder.

    Raises:
        BenchmarkError: they are missing, or not those of a benchmark.
    """
    path = folder / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict) or "layouts" not in settings:
        raise BenchmarkError(f"{path} is missing or not a benchmark's")
    return settings


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings whole or not at all."""
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "settings.json", text.encode())


def with_earlier(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, and the methods that are in the folder already.

    Raises:
        BenchmarkError: the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise BenchmarkError(f"{folder} is a file, but should be a folder")
    remedy = "give another folder (--output)"
    path = folder / "settings.json"
    if not path.exists():
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise BenchmarkError(f"{folder} holds other files and no benchmark; {remedy}")
        return settings
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        methods = dict(earlier["methods"])
    except (ValueError, TypeError, KeyError):
        raise BenchmarkError(f"{path} is not a benchmark's; {remedy}") from None
    for name, value in settings.items():
        if name in ("methods", "machine") or earlier.get(name) == value:
            continue
        short = "" if isinstance(value, dict) else f" ({earlier.get(name)}, now {value})"
        raise BenchmarkError(f"{folder} holds results with another {name}{short}; {remedy}")
    for name, choices in settings["methods"].items():
        if methods.get(name, choices) != choices:
            changed = [choice for choice in choices if methods[name].get(choice) != choices[choice]]
            raise BenchmarkError(
                f"{folder} holds results of {name!r} with another {', '.join(changed)}; {remedy}"
            )
    read_results(folder)  # can be gone on with
    return {**settings, "methods": methods | settings["methods"]}
