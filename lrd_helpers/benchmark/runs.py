"""A run: layouts × methods × seeds, drawn and measured into a folder."""

from __future__ import annotations

import contextlib
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from tqdm.auto import tqdm

from lrd_helpers.benchmark.contenders import (
    GROUND_TRUTH,
    Contender,
    GroundTruth,
    check_captions,
    drawn,
)
from lrd_helpers.benchmark.cost import Cost
from lrd_helpers.benchmark.folder import (
    VERSION,
    Key,
    Row,
    alone_in,
    check_file_names,
    check_rows,
    digest_of_layouts,
    merge,
    picture_file,
    read_picture,
    read_results,
    read_settings,
    settings_of,
    table_of,
    with_earlier,
    write_picture,
    write_results,
    write_settings,
)
from lrd_helpers.benchmark.functions import ContenderError
from lrd_helpers.benchmark.judges import Judges, check_masks, judges, scored
from lrd_helpers.benchmark.layouts import BenchmarkError, NamedLayout, ground_truth_scene, spread
from lrd_helpers.measure import Clip, Detector, StorybookDetector
from lrd_helpers.messages import excerpt, sentence
from lrd_helpers.methods import LONGEST, Method
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.storybook import seeded

if TYPE_CHECKING:
    from lrd_helpers.pipeline import LayeredRenderingPipeline

with quiet_libraries():
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list


# ------------------------------------------------------------------ draw and measure


def run(
    pipe: LayeredRenderingPipeline,
    layouts: Sequence[NamedLayout],
    methods: Mapping[str, Contender],
    *,
    output: str | os.PathLike[str],
    seeds: int = 1,
    limit: int | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    batch_size: int = 1,
    detector: Detector | None = None,
    clip: Clip | None = None,
) -> list[Row]:
    """Draw and measure what `output` does not hold yet; the ground truth comes with it.

    Layout by layout, each by all methods: whatever is there when a run is cut can be compared.

    Args:
        pipe: the model; a picture is forgotten once it is written.
        layouts, methods: as `load_layouts` and `methods_named` give them. A method can be a
            function, too (see `functions`): what it fails to draw is warned of at the end, is
            missing, and is tried again by the next run.
        output: a new folder, or one with results of the same settings.
        seeds: pictures of each layout and method; seed and layout's name make the noise.
        limit: only so many layouts, evenly spread over the list.
        num_inference_steps, guidance_scale: T and γ.
        batch_size: layouts that our methods draw at once: quicker, but then their seconds cannot be
            held against those of methods that draw one by one.
        detector, clip: judge what was drawn; the storybook's by default.

    Returns:
        All rows of the folder.

    Raises:
        BenchmarkError: layouts that cannot be drawn or measured, or a folder with other results or
            with a run that goes on; nothing is written then.
    """
    _check_counts(seeds=seeds, limit=limit, batch_size=batch_size)
    jury = judges(detector, clip)
    _check_contenders(methods)
    _check_layouts(pipe, layouts, methods, jury)
    if isinstance(jury.detector, StorybookDetector):
        methods = {**methods, GROUND_TRUTH: GroundTruth()}
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    settings = settings_of(pipe, layouts, methods, jury, options | {"batch_size": batch_size})
    folder = Path(output)
    with _begun(folder, settings) as keys:
        batches = _batches(spread(layouts, limit), seeds, batch_size)
        _fill(folder, keys, pipe, batches, methods, jury, options)
        return _end(folder)


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise BenchmarkError(f"{name} is {value}, but should be at least 1")


def _check_contenders(methods: Mapping[str, Contender]) -> None:
    """Refuse names and kinds that cannot be compared."""
    if not methods:
        raise BenchmarkError("there are no methods to compare")
    for name, method in methods.items():
        if not name.strip() or not name.isprintable() or len(name) > LONGEST:
            raise BenchmarkError(
                f"a method is called {excerpt(name)}, but should have a name of 1 to {LONGEST} "
                "printable signs"
            )
        if name == GROUND_TRUTH and not isinstance(method, GroundTruth):
            raise BenchmarkError(f"a method is called {name!r}, as the scene itself is; rename it")
        if isinstance(method, type) or not (_of_ours(method) or callable(method)):
            raise BenchmarkError(
                f"{excerpt(name)} is {excerpt(method)}, but should be a method, such as "
                "METHODS['collage'], or a function that draws a layout"
            )
    check_file_names("method", methods)


def _check_layouts(
    pipe: LayeredRenderingPipeline,
    layouts: Sequence[NamedLayout],
    methods: Mapping[str, Contender],
    jury: Judges,
) -> None:
    """Refuse before the first picture what would stop the run after an hour."""
    if not layouts:
        raise BenchmarkError("there are no layouts to draw")
    check_file_names("layout", [layout.name for layout in layouts])
    for layout in layouts:
        try:
            if isinstance(jury.detector, StorybookDetector):
                ground_truth_scene(layout.layout)
            check_masks(jury.detector, layout.layout)
        except ValueError as error:
            raise BenchmarkError(f"layout {layout.name}: {error}") from None
        try:
            check_captions(pipe, layout.layout, methods)
        except BenchmarkError as error:
            raise BenchmarkError(f"layout {layout.name}, {error}") from None


def processes() -> PartialState:
    """Who shares the work: this process alone, or those of `accelerate launch` or `torchrun`."""
    # accelerate looks for other processes on CPUs only if it is told to.
    cpu = not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))  # how long the first waits for the last


@contextlib.contextmanager
def _begun(folder: Path, settings: dict[str, Any]) -> Iterator[set[Key]]:
    """Make the folder, or go on with it, and keep others out; yields the keys of its rows."""
    state = processes()
    keys: set[Key] = set()
    refusal: Exception | None = None
    with contextlib.ExitStack() as lock:
        if state.is_main_process:
            try:
                with_earlier(folder, settings)  # refuses before anything is written
                folder.mkdir(parents=True, exist_ok=True)
                lock.enter_context(alone_in(folder))
                write_settings(folder, with_earlier(folder, settings))
                merge(folder)
                keys = {row.key for row in read_results(folder)}
            except (BenchmarkError, OSError) as error:
                refusal = error
        # What stops the first process stops all of them.
        keys, refusal = broadcast_object_list([keys, refusal])
        if refusal:
            raise refusal
        yield keys


def _end(folder: Path) -> list[Row]:
    """The rows of all processes, in one table."""
    state = processes()
    state.wait_for_everyone()
    if state.is_main_process:
        merge(folder)
    state.wait_for_everyone()
    return read_results(folder)


class _Batch(NamedTuple):
    """Layouts that are drawn together, from one seed."""

    seed: int
    layouts: Sequence[NamedLayout]

    def missing(self, method: str, keys: set[Key]) -> list[str]:
        """The names of the layouts of which there is no row by a method."""
        names = [layout.name for layout in self.layouts]
        return [name for name in names if (method, name, self.seed) not in keys]


def _batches(layouts: Sequence[NamedLayout], seeds: int, size: int) -> list[_Batch]:
    return [
        _Batch(seed, layouts[first : first + size])
        for seed in range(seeds)
        for first in range(0, len(layouts), size)
    ]


def _fill(
    folder: Path,
    keys: set[Key],
    pipe: LayeredRenderingPipeline,
    batches: Sequence[_Batch],
    methods: Mapping[str, Contender],
    jury: Judges,
    options: Mapping[str, Any],
) -> None:
    """Draw, write and measure this process's share of what is missing."""
    state, faults = processes(), {name: [] for name in methods}
    missing = [batch for batch in batches if any(batch.missing(name, keys) for name in methods)]
    share = missing[state.process_index :: state.num_processes]
    total = sum(len(batch.missing(name, keys)) for batch in share for name in methods)
    shown = {"disable": None if state.is_main_process else True}
    with (
        tqdm(total=total, unit="picture", smoothing=0.02, leave=False, **shown) as progress,
        table_of(folder, state.process_index) as write,
    ):
        for batch in share:
            for name, method in methods.items():
                missing_names = batch.missing(name, keys)
                if not missing_names:
                    continue
                progress.set_description(name)
                for layout, image, cost in _drawn_batch(
                    pipe, method, batch, missing_names, options, faults[name]
                ):
                    if layout.name in missing_names:
                        write_picture(picture_file(folder, name, layout.name, batch.seed), image)
                        scores = scored(*jury, image, layout.layout)
                        write(_row(name, layout, batch.seed, scores, cost))
                        progress.update()
    _warn_of(faults)


def _drawn_batch(
    pipe: LayeredRenderingPipeline,
    method: Contender,
    batch: _Batch,
    missing: Sequence[str],
    options: Mapping[str, Any],
    faults: list[str],
) -> Iterator[tuple[NamedLayout, Image.Image, Cost]]:
    """The whole batch, also where a part of it is there: a picture is the same to the last bit only
    in the same company. Functions draw one by one what is missing; what they do wrong is added to
    `faults`."""
    parts = [batch]
    if not _of_ours(method):
        parts = [batch._replace(layouts=[each]) for each in batch.layouts if each.name in missing]
    for part in parts:
        layouts = [layout.layout for layout in part.layouts]
        noise = [noise_of(layout.name, part.seed) for layout in part.layouts]
        try:
            pictures = drawn(pipe, method, layouts, noise, **options)
        except ContenderError as error:
            faults.append(f"Layout {part.layouts[0].name}, seed {part.seed}: {error}")
            continue
        yield from zip(part.layouts, *pictures, strict=True)


def _warn_of(faults: Mapping[str, Sequence[str]]) -> None:
    """A sentence for each contender that failed: how often, and the first fault."""
    for name, of_method in faults.items():
        if of_method:
            remark = f"{excerpt(name)} failed at {len(of_method)} of its pictures, which are "
            remark += f"missing; the next run tries them again. {of_method[0]}"
            warnings.warn(sentence(remark), stacklevel=4)


def _of_ours(method: Contender) -> bool:
    return isinstance(method, (Method, GroundTruth))


def _row(
    method: str, layout: NamedLayout, seed: int, scores: Mapping[str, float], cost: Cost
) -> Row:
    layers = len(layout.layout.layers)
    return Row(method, layout.name, layout.stratum, seed, layers, **scores, **vars(cost))


def noise_of(layout: str, seed: int) -> torch.Generator:
    """Where a layout's noise comes from: another for each layout, the same for each method."""
    return seeded(seed, zlib.crc32(layout.encode()))


# ------------------------------------------------------------------ measure only


def measure_again(
    folder: str | os.PathLike[str],
    layouts: Sequence[NamedLayout],
    *,
    detector: Detector | None = None,
    clip: Clip | None = None,
) -> list[Row]:
    """Measure the pictures of a folder anew; what they cost stays.

    By another detector or CLIP; or because this version measures more (`folder.LATER`).

    Args:
        folder: what `run` filled.
        layouts: the layouts it drew.
        detector, clip: as for `run`.

    Returns:
        All rows of the folder.

    Raises:
        BenchmarkError: no results, those of other layouts, no settings, a picture that is missing
            or damaged, or a run that goes on; nothing is written then.
    """
    folder, jury = Path(folder), judges(detector, clip)
    if not read_results(folder):
        raise BenchmarkError(f"{folder} holds no results; run the benchmark first")
    with alone_in(folder):
        settings = read_settings(folder)
        if settings["layouts"] != digest_of_layouts(layouts):
            raise BenchmarkError(f"{folder} holds results of other layouts")
        by_name = {layout.name: layout.layout for layout in layouts}
        measured = []
        rows = read_results(folder)
        check_rows(folder, "layout", (row.layout for row in rows), by_name)
        for row in tqdm(rows, "measuring", unit="picture", leave=False, disable=None):
            picture = read_picture(picture_file(folder, row.method, row.layout, row.seed))
            measured.append(replace(row, **scored(*jury, picture, by_name[row.layout])))
        # Rows and judges are two files: cut off between them, this must be done again.
        names = jury.names | {"version": VERSION}
        unfinished = dict.fromkeys(jury.names, "half-way through --measure-again")
        write_settings(folder, settings | unfinished)
        write_results(folder, measured)
        write_settings(folder, settings | names)
        return read_results(folder)
