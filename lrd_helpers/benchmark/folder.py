"""The folder of a benchmark: its settings, its table of results, its pictures.

| file | what |
|---|---|
| `settings.json` | what the numbers depend on: a run with other settings is refused |
| `results.csv` | a row per picture; while a run goes on, `results.N.csv` of each process |
| `pictures/METHOD/LAYOUT-SEED.png` | the pictures |
| `.lock` | held by the run that writes; a second run is refused, a killed one holds nothing |
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from PIL import Image

from lrd_helpers import pictures
from lrd_helpers.benchmark.contenders import Contender, choices_of
from lrd_helpers.benchmark.judges import Judges, digest
from lrd_helpers.benchmark.layouts import BenchmarkError, NamedLayout
from lrd_helpers.files import check_folder, locked, write_atomically
from lrd_helpers.machine import describe_machine
from lrd_helpers.messages import excerpt
from lrd_helpers.methods import METHODS

if TYPE_CHECKING:
    from lrd_helpers.pipeline import LayeredRenderingPipeline

VERSION = 2
"""Of a folder of results; one of version 1 lacks the columns `LATER`."""

OTHER_FOLDER = "give another folder (--output)"

Key = tuple[str, str, int]
"""A picture of a folder: method, layout, seed."""


def alone_in(folder: Path) -> AbstractContextManager[None]:
    """Keep other runs out of a folder.

    Raises:
        BenchmarkError: on entering: another run is writing there.
    """
    message = (
        f"another benchmark is writing into {folder}; wait until it is done, or {OTHER_FOLDER}"
    )
    return locked(folder, BenchmarkError(message))


# ------------------------------------------------------------------ results


@dataclass(frozen=True)
class Row:
    """A picture's numbers; of `iou`, `success`, `attribute`, `leakage` the mean over its layers.

    So a picture of four objects counts as much as one of one. NaN: there is nothing to measure (no
    boxes overlap; no layer names a colour; memory on machines other than Linux and CUDA), or it was
    measured before there was such a column.
    """

    method: str
    layout: str
    stratum: str
    seed: int
    layers: int
    iou: float  # `layout_iou`, 0 to 1
    success: float  # share of the layers with IoU ≥ 0.5
    picture_success: float  # 1 where all layers have it, else 0
    overlap_iou: float  # mean of `overlap_ious`, 0 to 1
    order: float  # share of the pairs of `front_seen`
    attribute: float  # `attribute_accuracy`, 0 to 1
    leakage: float  # 0 to 1, less is better
    clip: float  # `clip_score`, 100·cos
    overlay_score: float  # of the layout; 0 where no boxes overlap
    unet_calls: int  # a call: one noisy picture with one prompt
    backward_passes: int
    seconds: float
    memory: float  # peak beyond what was held before, in MB

    @property
    def key(self) -> Key:
        return self.method, self.layout, self.seed


COLUMNS = [field.name for field in fields(Row)]
KINDS = get_type_hints(Row)
LATER = ("picture_success", "overlap_iou", "order", "overlay_score")
"""The columns that tables of version 1 lack; `measure_again` adds them."""
SHARES = ("iou", "success", "picture_success", "overlap_iou", "order", "attribute", "leakage")
RANGES = dict.fromkeys(SHARES, (0, 1)) | {"clip": (-100, 100), "overlay_score": (-1000, 1000)}
"""Of the columns that are not simply ≥ 0."""
ABSENT = ("overlap_iou", "order", "attribute", "memory")
"""The columns that can be NaN."""


def read_results(folder: str | os.PathLike[str]) -> list[Row]:
    """The rows of a folder, in the order of their names; a last line that was cut off is left out.

    Raises:
        BenchmarkError: a table with other columns, or a damaged line; names file and line.
    """
    rows = {}
    for path in sorted(Path(folder).glob("results*.csv")):
        # A process's table that goes meanwhile was merged into results.csv, which comes last.
        with contextlib.suppress(FileNotFoundError):
            rows |= {row.key: row for row in _rows_in(path)}
    return [rows[key] for key in sorted(rows)]


def _rows_in(path: Path) -> Iterator[Row]:
    data = path.read_bytes()
    # What is not UTF-8 becomes U+FFFD, which no cell may have.
    text = data[: data.rfind(b"\n") + 1].decode("utf-8-sig", errors="replace")
    table = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 0
    try:
        columns = next(table, COLUMNS)
        if columns not in (COLUMNS, [name for name in COLUMNS if name not in LATER]):
            raise BenchmarkError(f"{path} has other columns than this version; {OTHER_FOLDER}")
        line = table.line_num
        for cells in table:
            if cells:
                yield _row(cells, columns)
            line = table.line_num
    except BenchmarkError:
        raise
    except (ValueError, csv.Error) as error:
        raise BenchmarkError(
            f"{path}, line {line + 1}: {error}; delete the line, and a run draws its picture again"
        ) from None


def _row(cells: Sequence[str], columns: Sequence[str] = COLUMNS) -> Row:
    """A row from a line's cells; NaN in the columns that are not there.

    Raises:
        ValueError: says which cell is wrong, and what it should be.
    """
    if len(cells) != len(columns):
        raise ValueError(f"there are {len(cells)} cells, but should be {len(columns)}")
    values: dict[str, Any] = dict.fromkeys(LATER, math.nan)
    for name, cell in zip(columns, cells, strict=True):
        kind, (low, high) = KINDS[name], RANGES.get(name, (0, math.inf))
        try:
            values[name] = value = kind(cell)
            if kind is str:
                valid = value.isprintable() and value.strip() and "\ufffd" not in value
            else:
                valid = low <= value <= high and not math.isinf(value)
                valid |= math.isnan(value) and name in ABSENT
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            number = "a whole number" if kind is int else "a number"
            to = f"from {low} to {high}" if math.isfinite(high) else f"≥ {low}"
            wanted = "a name" if kind is str else f"{number} {to}"
            raise ValueError(f"{name} is {excerpt(cell)}, but should be {wanted}")
    return Row(**values)


def check_rows(folder: Path, kind: str, names: Iterable[str], there: Container[str]) -> None:
    """Refuse rows of a method or a layout that is not there.

    Raises:
        BenchmarkError: names the first.
    """
    for name in names:
        if name not in there:
            raise BenchmarkError(
                f"{folder / 'results.csv'} has a row of {kind} {excerpt(name)}, which is not among "
                f"the {kind}s of this benchmark; delete the row"
            )


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
    with (folder / f"results.{process}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)

        def write(row: Row) -> None:
            table.writerow(_cells(row))
            file.flush()

        yield write


def _cells(row: Row) -> list[str]:
    """What is written can be read again."""
    cells = [
        f"{value:.6g}" if isinstance(value, float) else str(value) for value in vars(row).values()
    ]
    try:
        _row(cells)
    except ValueError as error:
        raise BenchmarkError(f"{excerpt(row.method)}, layout {row.layout}: {error}") from None
    return cells


# ------------------------------------------------------------------ pictures


def picture_file(folder: Path, method: str, layout: str, seed: int) -> Path:
    """The file of a picture."""
    return folder / "pictures" / file_name(method) / f"{file_name(f'{layout}-{seed}')}.png"


def file_name(text: str) -> str:
    """A name for a file or a folder, another one for each text.

    The text itself where every system can keep it; else its first letters, ~ and a digest.
    """
    reserved = re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", text, re.IGNORECASE)  # on Windows
    if (
        re.fullmatch(r"[\w=+-]([\w=+,. -]*[\w=+-])?", text)
        and not reserved
        and len(text.encode()) <= 200
        and unicodedata.is_normalized("NFC", text)
    ):
        return text
    letters = re.sub(r"[^a-z0-9]+", "-", text[:60].lower()).strip("-")
    sha = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    return f"{letters}~{sha.hexdigest()[:16]}"


def check_file_names(kind: str, names: Iterable[str]) -> None:
    """Refuse names that become a single file where capitals make no difference (macOS, Windows).

    Raises:
        BenchmarkError: names the two.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(file_name(name).casefold(), name)
        if other != name:
            raise BenchmarkError(
                f"{kind}s {excerpt(other)} and {excerpt(name)} differ in capitals only, which some "
                "systems do not see in a file's name; change one of them"
            )


def write_picture(path: Path, image: Image.Image) -> None:
    """Write a picture whole or not at all."""
    png = io.BytesIO()
    image.save(png, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png.getvalue())


def read_picture(path: Path) -> Image.Image:
    """A picture as `write_picture` wrote it.

    Raises:
        BenchmarkError: it is missing or damaged.
    """
    try:
        return pictures.picture_of(pictures.read_picture(path))
    except ValueError:
        raise BenchmarkError(
            f"{path} is missing or damaged; delete its row in results.csv, and a run draws it again"
        ) from None


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
    text_encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    settings = {
        "version": VERSION,
        "layouts": digest_of_layouts(layouts),
        "model": digest(pipe.unet, pipe.vae, *text_encoders),
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


SETTINGS = {
    "layouts": str,
    "methods": dict,
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "batch_size": int,
    "machine": str,
}
"""What is looked up in settings, and of what kind it is."""


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a folder.

    Raises:
        BenchmarkError: they are missing, or not those of a benchmark.
    """
    path = Path(folder) / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        settings = None
    if not (
        isinstance(settings, dict)
        and all(isinstance(settings.get(name), kind) for name, kind in SETTINGS.items())
        and all(isinstance(choices, dict) for choices in settings["methods"].values())
    ):
        raise BenchmarkError(f"{path} is missing, damaged or not a benchmark's; {OTHER_FOLDER}")
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
    try:
        check_folder(folder)
    except NotADirectoryError as error:
        raise BenchmarkError(error.strerror) from None
    if not (folder / "settings.json").exists():
        # A full disk may have left an empty folder of pictures.
        if folder.exists() and any(map(_holds_something, folder.iterdir())):
            raise BenchmarkError(f"{folder} holds other files and no benchmark; {OTHER_FOLDER}")
        return settings
    earlier = read_settings(folder)
    methods = earlier["methods"]
    if earlier.get("version") == 1:
        raise BenchmarkError(
            f"{folder} was measured before there were {', '.join(LATER)}; `--measure-again` adds "
            "them, and then a run goes on"
        )
    for name, value in settings.items():
        if name in ("methods", "machine") or earlier.get(name) == value:
            continue
        short = f" ({excerpt(earlier.get(name))}, now {excerpt(value)})"
        short = "" if isinstance(value, dict) else short
        raise BenchmarkError(f"{folder} holds results with another {name}{short}; {OTHER_FOLDER}")
    _check_methods(folder, methods, settings["methods"])
    methods |= settings["methods"]
    check_file_names("method", methods)
    rows = read_results(folder)  # can be gone on with
    check_rows(folder, "method", (row.method for row in rows), methods)
    return {**settings, "methods": methods}


def _check_methods(folder: Path, earlier: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
    """Refuse methods that are in the folder with other choices."""
    for name, choices in methods.items():
        before = _completed(earlier.get(name, choices))
        changed = [choice for choice in choices if before.get(choice) != choices[choice]]
        if changed or before.keys() != choices.keys():
            changed = changed or sorted(before.keys() - choices.keys())
            raise BenchmarkError(
                f"{folder} holds results of {excerpt(name)} with another {', '.join(changed)}; "
                f"{OTHER_FOLDER}"
            )


def _completed(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Choices as a folder keeps them, with those that methods have since then: their defaults."""
    kinds = {type(method).__name__: type(method) for method in METHODS.values()}
    kind = kinds.get(choices.get("kind", ""))
    return {field.name: field.default for field in fields(kind)} | choices if kind else {**choices}


def _holds_something(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return not path.is_dir() or any(path.iterdir())
