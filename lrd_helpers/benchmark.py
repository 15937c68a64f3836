"""Layouts × methods × seeds → one table.

    layouts = load_layouts("benchmarks/layouts/storybook-200.json")
    run(load_pipeline(), layouts, methods_named(["default", "plain"]), output="outputs/benchmark")
    print(report("outputs/benchmark", layouts))  # benchmark_report.py

Every method draws every layout from the same noise. What was drawn is not drawn again: a run that
was killed goes on where it stopped, and methods and seeds can be added later.

| in the folder | what |
|---|---|
| `settings.json` | what the numbers depend on: a run with other settings is refused |
| `results.csv` | a row a picture |
| `pictures/` | the pictures |
| `table.md`, `methods.png`, `strata.png` | what `benchmark_report.report` makes of them |

`torchrun --standalone --nproc_per_node 2 -m lrd_helpers benchmark` shares the work; on several GPUs
`accelerate launch` does so, too.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from lrd_helpers.attention import PromptTokens
from lrd_helpers.baselines import (
    BASELINES,
    Baseline,
    BoxDiff,
    LayoutGuidance,
    PaintWithWords,
    draw,
)
from lrd_helpers.benchmark_layouts import BenchmarkError, NamedLayout, ground_truth_scene
from lrd_helpers.caption import layer_words
from lrd_helpers.files import write_atomically
from lrd_helpers.layout import Layout
from lrd_helpers.machine import describe_machine
from lrd_helpers.method import CHOICES, METHODS, Method
from lrd_helpers.metrics import (
    Clip,
    Description,
    Detector,
    StorybookClip,
    StorybookDetector,
    attribute_accuracy,
    clip_score,
    layout_iou,
    leakage,
    success,
)
from lrd_helpers.plotting import as_image
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.rendering import LayeredRenderingPipeline
from lrd_helpers.storybook import render_scenes, seeded

with quiet_libraries():
    from accelerate import PartialState

VERSION = 1
"""Of a folder of results."""


# ------------------------------------------------------------------ methods


@dataclass(frozen=True)
class GroundTruth:
    """Not a method: the scene itself. What the metrics say of it is the most they can say."""


Contender = Method | Baseline | GroundTruth

GROUND_TRUTH = "ground truth"
KNOWN: dict[str, Method | Baseline] = METHODS | BASELINES
"""The methods by name: ours, then the others'."""


def methods_named(names: Sequence[str] = (*KNOWN,)) -> dict[str, Contender]:
    """Methods by name, some of their choices changed.

    Args:
        names: "paper"; "paper,inside=0.3,outside=0.3": the paper's with two choices changed;
            "fuse=once": the default with one.

    Raises:
        BenchmarkError: an unknown method, choice or value; lists the known ones.
    """
    return {name: _method(name) for name in names}


def _method(name: str) -> Method | Baseline:
    parts = [part.strip() for part in name.split(",")]
    base = "default" if "=" in parts[0] else parts.pop(0)
    if base not in KNOWN:
        raise BenchmarkError(f"there is no method {base!r}; there are {', '.join(KNOWN)}")
    method, changes = KNOWN[base], {}
    for part in parts:
        choice, _, text = part.partition("=")
        if choice not in vars(method):
            known = ", ".join(vars(method)) or "none"
            raise BenchmarkError(f"{name!r}: {base} has no choice {choice!r}; it has {known}")
        try:  # 0.2, True
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # once
            value = text
        now = getattr(method, choice)
        if isinstance(now, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(now) or isinstance(now, tuple):
            kind = {bool: "True or False", int: "a whole number", float: "a number"}.get(type(now))
            raise BenchmarkError(
                f"{name!r}: {choice} is {text!r}, but should be {kind or f'like {now!r}'}"
            )
        changes[choice] = value
    try:
        return replace(method, **changes)
    except ValueError as error:
        raise BenchmarkError(f"{name!r}: {error}") from None


def ablations(base: str = "default") -> list[str]:
    """One factor at a time around one of our methods, as names for `methods_named`.

    Every other name that a choice can have, no for yes, numbers at half and at twice what they are
    (shares at most 1), no ξ at all (or, where there is none, λ = 0.1). A choice that changes
    nothing there is left out.
    """
    method, names = METHODS[base], []
    unused = {"attention"}
    guided = method.inside or method.outside
    if not guided:
        unused |= {"delta", "inside", "outside", "guide", "early_repeats", "top_k", "weighted"}
    if method.delta == "constant":
        unused |= {"top_k", "weighted"}
    if method.guide != "noise":
        unused |= {"early_repeats"}
    if method.fuse != "collage":
        unused |= {"sketch_steps"}
    for choice, value in vars(method).items():
        if choice in unused:
            continue
        if choice in CHOICES:
            others = [one for one in get_args(CHOICES[choice]) if one != value]
        elif isinstance(value, bool):
            others = [not value]
        elif choice == "layered_fraction":
            others = sorted({value / 2, min(1.0, 2 * value)} - {value})
        else:
            others = [one for one in (value / 2, 2 * value) if one != value]
            if isinstance(value, int):
                others = [max(1, round(one)) for one in others]
        for one in others:
            with contextlib.suppress(ValueError):  # what does not go with the other choices
                replace(method, **{choice: one})
                names.append(f"{choice}={one:.4g}" if type(one) is float else f"{choice}={one}")
    names.append("inside=0,outside=0" if guided else "inside=0.1,outside=0.1")
    return names if base == "default" else [f"{base},{name}" for name in names]


# ------------------------------------------------------------------ one picture


@dataclass(frozen=True)
class Row:
    """One picture's numbers; of `iou` to `leakage` the mean over its layers.

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
    def key(self) -> tuple[str, str, int]:
        return self.method, self.layout, self.seed


@dataclass
class Cost:
    """What one picture took."""

    unet_calls: int = 0
    backward_passes: int = 0
    seconds: float = 0.0
    memory: float = math.nan


class LookingOnce(StorybookDetector):
    """Remembers the last picture: each metric asks about it anew."""

    last: tuple[object, Description] | None = None

    def describe(self, image: Any) -> Description:
        if self.last is None or self.last[0] is not image:
            self.last = image, super().describe(image)
        return self.last[1]


def drawn(
    pipe: LayeredRenderingPipeline,
    method: Contender,
    layouts: Sequence[Layout],
    generators: Sequence[torch.Generator],
    **options: Any,
) -> tuple[list[Image.Image], list[Cost]]:
    """The layouts' pictures and what each took; of our methods they are drawn as one batch.

    In a batch, seconds and memory are those of the batch, divided by its pictures.
    """
    if isinstance(method, GroundTruth):
        scenes = [ground_truth_scene(layout) for layout in layouts]
        return [as_image(image) for image in render_scenes(scenes).images], [Cost() for _ in scenes]
    if isinstance(method, Method):
        with measured(pipe, len(layouts)) as costs:
            images = pipe(layouts, method=method, generator=list(generators), **options).images
        return images, costs
    images, costs = [], []
    for layout, generator in zip(layouts, generators, strict=True):
        with measured(pipe, 1) as [cost]:
            images.append(draw(pipe, layout, method=method, generator=generator, **options))
        costs.append(cost)
    return images, costs


@contextlib.contextmanager
def measured(pipe: LayeredRenderingPipeline, pictures: int) -> Iterator[list[Cost]]:
    """Counts and times what the pipeline does for so many pictures."""
    costs = [Cost() for _ in range(pictures)]

    def count(_: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        x = arguments[0] if arguments else named["sample"]
        for owner in pipe.pictures_of_rows or [0] * len(x):
            costs[owner].unet_calls += 1
        if x.requires_grad:  # the gradient reaches the noisy picture once a backward pass
            x.register_hook(count_backward)

    def count_backward(_: torch.Tensor) -> None:
        for cost in costs:
            cost.backward_passes += 1

    hook = pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    peak, began = _peak_memory(), time.perf_counter()
    try:
        yield costs
    finally:
        hook.remove()
    seconds, memory = time.perf_counter() - began, peak()
    for cost in costs:
        cost.seconds, cost.memory = seconds / pictures, memory / pictures


def _peak_memory() -> Callable[[], float]:
    """A function that says by how many MB memory has grown since now, at most."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(name: str) -> float:
        [size] = re.findall(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())
        return int(size) / 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the process's peak starts anew
        before_ = status("VmRSS")
    except OSError:  # not Linux
        return lambda: math.nan
    return lambda: max(0.0, status("VmHWM") - before_)


def scored(detector: Detector, clip: Clip, image: Image.Image, layout: Layout) -> dict[str, float]:
    """`METRICS` but average precision, which is of many pictures together."""
    ious = layout_iou(detector, image, layout)
    colours = [one for one in attribute_accuracy(detector, image, layout) if one is not None]
    return {
        "iou": statistics.fmean(ious),
        "success": statistics.fmean(success(ious)),
        "attribute": statistics.fmean(colours) if colours else math.nan,
        "leakage": statistics.fmean(leakage(detector, image, layout)),
        "clip": clip_score(clip, image, layout.caption),
    }


# ------------------------------------------------------------------ all pictures


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
        pipe: the model. What it draws it keeps no longer than a batch.
        layouts: as `load_layouts` gives them.
        methods: as `methods_named` gives them.
        output: a new folder, or one with results of the same settings.
        seeds: pictures of each layout and method; seed and layout's name make the noise.
        limit: only so many layouts, evenly spread over the list.
        num_inference_steps: T.
        guidance_scale: γ.
        batch_size: layouts that our methods draw at once: quicker, but then their seconds cannot be
            held against those of methods that draw one by one.
        detector: finds what was drawn; the storybook's by default.
        clip: compares it with the caption; the storybook's by default.

    Returns:
        All rows of the folder.

    Raises:
        BenchmarkError: layouts that cannot be drawn or measured, or a folder with other results;
            nothing is written then.
    """
    state = processes()
    detector = LookingOnce() if detector is None else detector
    clip = StorybookClip() if clip is None else clip
    folder = Path(output)
    for name, value in (("seeds", seeds), ("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise BenchmarkError(f"{name} is {value}, but should be at least 1")
    _check_layouts(pipe, layouts, methods, detector)
    if isinstance(detector, StorybookDetector):
        methods = {**methods, GROUND_TRUTH: GroundTruth()}
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    settings = {
        **_identity(pipe, layouts, detector, clip),
        **options,
        "batch_size": batch_size,
        "methods": {
            name: {"kind": type(method).__name__, **asdict(method)}
            for name, method in methods.items()
        },
    }
    settings = _with_earlier(folder, json.loads(json.dumps(settings)))
    state.wait_for_everyone()  # nobody writes before all have looked
    if state.is_main_process:
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "settings.json", _pretty(settings))
        _merge(folder)
    state.wait_for_everyone()

    done = {row.key for row in read_results(folder)}
    state.wait_for_everyone()  # the same for all processes
    some = spread(layouts, limit)
    batches = [
        (seed, some[first : first + batch_size])
        for seed in range(seeds)
        for first in range(0, len(some), batch_size)
    ]
    missing = [
        (seed, batch)
        for seed, batch in batches
        if any((name, one.name, seed) not in done for name in methods for one in batch)
    ]
    mine = missing[state.process_index :: state.num_processes]
    total = sum(
        (name, one.name, seed) not in done
        for seed, batch in mine
        for name in methods
        for one in batch
    )
    shown = {"disable": None if state.is_main_process else True}
    with (
        tqdm(total=total, unit="picture", smoothing=0.02, leave=False, **shown) as progress,
        (folder / f"results.{state.process_index}.csv").open("w", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for seed, batch in mine:
            for name, method in methods.items():
                new = [one for one in batch if (name, one.name, seed) not in done]
                if not new:
                    continue
                progress.set_description(name)
                # The whole batch also where a part of it is there: a picture is the same to the
                # last bit only in the same company.
                images, costs = drawn(
                    pipe,
                    method,
                    [one.layout for one in batch],
                    [noise_of(one.name, seed) for one in batch],
                    **({} if isinstance(method, GroundTruth) else options),
                )
                for one, image, cost in zip(batch, images, costs, strict=True):
                    if one not in new:
                        continue
                    png = io.BytesIO()
                    image.save(png, "PNG")
                    path = picture_file(folder, name, one.name, seed)
                    path.parent.mkdir(exist_ok=True)
                    write_atomically(path, png.getvalue())
                    scores = scored(detector, clip, image, one.layout)
                    row = Row(
                        name,
                        one.name,
                        one.stratum,
                        seed,
                        len(one.layout.layers),
                        **scores,
                        **vars(cost),
                    )
                    table.writerow(map(_text, vars(row).values()))
                    file.flush()
                    progress.update()
    state.wait_for_everyone()
    if state.is_main_process:
        _merge(folder)
    state.wait_for_everyone()
    return read_results(folder)


def measure_again(
    folder: str | os.PathLike[str],
    layouts: Sequence[NamedLayout],
    *,
    detector: Detector | None = None,
    clip: Clip | None = None,
) -> list[Row]:
    """Measure the pictures of a folder anew, by another detector or CLIP; what they cost stays.

    Args:
        folder: what `run` filled.
        layouts: the ones it drew.
        detector, clip: as for `run`.

    Returns:
        All rows of the folder.

    Raises:
        BenchmarkError: no results, those of other layouts, no settings, or a picture that is
            missing or damaged; nothing is written then.
    """
    folder = Path(folder)
    detector = LookingOnce() if detector is None else detector
    clip = StorybookClip() if clip is None else clip
    rows = read_results(folder)
    if not rows:
        raise BenchmarkError(f"{folder} holds no results; run the benchmark first")
    path = folder / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        drawn_layouts = settings["layouts"]
    except (OSError, ValueError, TypeError, KeyError):
        raise BenchmarkError(f"{path} is missing or not a benchmark's") from None
    if drawn_layouts != _digest_of_layouts(layouts):
        raise BenchmarkError(f"{folder} holds results of other layouts")
    named = {one.name: one.layout for one in layouts}
    new = []
    for row in tqdm(rows, "measuring", unit="picture", leave=False, disable=None):
        path = picture_file(folder, row.method, row.layout, row.seed)
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
        except OSError:
            raise BenchmarkError(
                f"{path} is missing or damaged, so its row cannot be measured again"
            ) from None
        scores = scored(detector, clip, picture, named[row.layout])
        new.append(replace(row, **scores))
    judges = _judges(detector, clip)
    # Rows and judges are two files: cut off between them, this must be done again.
    unfinished = dict.fromkeys(judges, "half-way through --measure-again")
    write_atomically(folder / "settings.json", _pretty(settings | unfinished))
    _write_results(folder, new)
    write_atomically(folder / "settings.json", _pretty(settings | judges))
    return read_results(folder)


def processes() -> PartialState:
    """Who shares the work: this process alone, or those of `accelerate launch` or `torchrun`."""
    # accelerate looks for other processes on CPUs only if it is told to.
    cpu = not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))  # how long the first waits for the last


def noise_of(layout: str, seed: int) -> torch.Generator:
    """Where a layout's noise comes from: another for each layout, the same for each method."""
    return seeded(seed, zlib.crc32(layout.encode()))


def spread(layouts: Sequence[NamedLayout], limit: int | None) -> list[NamedLayout]:
    """So many of the layouts, at equal distances in their list."""
    count = min(limit or len(layouts), len(layouts))
    return [layouts[number * len(layouts) // count] for number in range(count)]


def picture_file(folder: Path, method: str, layout: str, seed: int) -> Path:
    """The file of a picture."""
    return folder / "pictures" / method / f"{layout}-{seed}.png"


def _check_layouts(
    pipe: LayeredRenderingPipeline,
    layouts: Sequence[NamedLayout],
    methods: Mapping[str, Contender],
    detector: Detector,
) -> None:
    """Refuse before the first picture what would stop the run after an hour."""
    if not layouts:
        raise BenchmarkError("there are no layouts to draw")
    if not methods:
        raise BenchmarkError("there are no methods to compare")
    steered = (PaintWithWords, LayoutGuidance, BoxDiff)
    names = [name for name, method in methods.items() if isinstance(method, steered)]
    tokenizer = pipe.tokenizer
    for one in layouts:
        who = f"layout {one.name}"
        try:
            if isinstance(detector, StorybookDetector):
                ground_truth_scene(one.layout)
            if names:
                who += f", method {names[0]}"
                layer_words(one.layout, PromptTokens.encode(tokenizer, one.layout.caption))
        except ValueError as error:
            raise BenchmarkError(f"{who}: {error}") from None


# ------------------------------------------------------------------ the folder

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


def _merge(folder: Path) -> None:
    """Put the processes' tables together into one."""
    _write_results(folder, read_results(folder))


def _write_results(folder: Path, rows: Sequence[Row]) -> None:
    parts = list(folder.glob("results.*.csv"))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(map(_text, vars(row).values()) for row in rows)
    write_atomically(folder / "results.csv", table.getvalue().encode())
    for part in parts:
        part.unlink()


def _text(value: str | int | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _with_earlier(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, and the methods that are in the folder already.

    Raises:
        BenchmarkError: the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise BenchmarkError(f"{folder} is a file, but should be a folder")
    remedy = "give another folder (--output)"
    path = folder / "settings.json"
    if not path.exists():
        if folder.exists() and any(not one.name.startswith(".") for one in folder.iterdir()):
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
            changed = [one for one in choices if methods[name].get(one) != choices[one]]
            raise BenchmarkError(
                f"{folder} holds results of {name!r} with another {', '.join(changed)}; {remedy}"
            )
    read_results(folder)  # can be gone on with
    return {**settings, "methods": methods | settings["methods"]}


def _identity(
    pipe: LayeredRenderingPipeline,
    layouts: Sequence[NamedLayout],
    detector: Detector,
    clip: Clip,
) -> dict[str, Any]:
    """What draws, what is drawn, who judges; and the machine, which makes no difference."""
    scheduler = json.loads(pipe.scheduler.to_json_string())
    return {
        "version": VERSION,
        "layouts": _digest_of_layouts(layouts),
        "model": _digest(pipe.unet, pipe.vae, pipe.text_encoder),
        "scheduler": {
            name: value
            for name, value in scheduler.items()
            if name == "_class_name" or not name.startswith("_")
        },
        **_judges(detector, clip),
        "machine": describe_machine(),
    }


def _judges(detector: Detector, clip: Clip) -> dict[str, str]:
    weights = _digest(getattr(detector, "model", None))
    return {
        "detector": " ".join([type(detector).__name__, weights, getattr(detector, "rules", "")]),
        "clip": f"{type(clip).__name__} {_digest(getattr(clip, 'model', None))}",
    }


def _digest(*modules: nn.Module | None) -> str:
    """A short name for weights: other weights, another name."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items() if isinstance(module, nn.Module) else ():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _digest_of_layouts(layouts: Sequence[NamedLayout]) -> str:
    text = "".join(f"{one.name} {one.stratum} {one.layout.to_json()}" for one in layouts)
    return f"{len(layouts)}, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _pretty(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
