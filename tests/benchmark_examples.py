"""Layouts, judges and rows that the benchmark's tests share."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import torch

from lrd_helpers import __main__ as command_line
from lrd_helpers.benchmark import NamedLayout, Row, load_layouts, read_results
from lrd_helpers.benchmark.folder import COLUMNS
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.measure import Detection

FOLDER = Path(__file__).parents[1] / "benchmarks" / "layouts"
LAYOUTS = load_layouts()

CAR = Layout(
    "a red car at sea", background="at sea", layers=[Layer("a red car", (0.1, 0.3, 0.6, 0.8))]
)
TWO = Layout(
    "a red car and a yellow star on grass",
    background="on grass",
    layers=[Layer("a red car", (0, 0.5, 0.75, 1)), Layer("a yellow star", (0.5, 0, 1, 0.75))],
)
FEW = [
    NamedLayout("car", "one", CAR),
    NamedLayout("both", "two", TWO),
    NamedLayout("boat", "one", Layout("a boat at sea", layers=[Layer("a boat", (0.5, 0, 1, 1))])),
]

BRIGHT = (0.1, 0.2, 0.9, 0.9)


class Brightness:
    """Finds everything in a place that depends on the picture; in a white picture in `BRIGHT`."""

    def __call__(self, image, prompts) -> list[list[Detection]]:
        bright = float(numpy.asarray(image).mean()) / 255
        return [[Detection((0.1, 0.2, 0.2 + 0.7 * bright, 0.9), bright, None)] for _ in prompts]


class Grey:
    """Pictures and texts as two numbers."""

    def encode_images(self, images):
        return torch.tensor([[numpy.asarray(image).mean() / 255, 1.0] for image in images]).float()

    def encode_texts(self, texts):
        return torch.tensor([[len(text) / 100, 0.5] for text in texts])


JUDGES = {"detector": Brightness(), "clip": Grey()}


def row(method: str, layout: str, iou: float, seed: int = 0, **more: object) -> Row:
    values = {"stratum": "one", "layers": 1, "success": float(iou >= 0.5), "attribute": 1.0}
    values |= {"picture_success": float(iou >= 0.5), "overlap_iou": math.nan, "order": math.nan}
    values |= {
        "overlay_score": 0.0,
        "leakage": 0.0,
        "clip": 70.0,
        "unet_calls": 50,
        "backward_passes": 0,
    }
    return Row(
        method=method,
        layout=layout,
        iou=iou,
        seed=seed,
        **values | {"seconds": 1.0, "memory": math.nan} | more,
    )


def filled(folder: Path, rows: list[Row]) -> Path:
    """A folder of results with these rows."""
    folder.mkdir()
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([vars(row)[name] for name in COLUMNS] for row in rows)
    settings = {"methods": {row.method: {} for row in rows}, "batch_size": 1, "layouts": "few"}
    settings |= {"num_inference_steps": 25, "guidance_scale": 5.0, "machine": "an abacus"}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def rows_in(folder: Path) -> list[str]:
    """All that does not depend on the machine's mood, as text: NaN is like NaN."""
    return [str(replace(row, seconds=0.0, memory=0.0)) for row in read_results(folder)]


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (folder / "pictures").rglob("*.png")
    }


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def command_of_a_process(arguments: list[str]) -> tuple[int, str]:
    """What the command returns and prints in one of several processes."""
    torch.set_num_threads(1)
    path = Path(arguments[-1]).with_name(f"stdout-{os.environ['RANK']}.txt")
    with path.open("w") as sys.stdout:
        status = command_line.main(arguments)
    return status, path.read_text()
