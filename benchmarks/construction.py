"""How well pictures are taken apart into layers: the construction against scenes whose layers it
does not see; prints one Markdown table, with the gates and without.

    python benchmarks/construction.py [--scenes 30] [--seed 0] [--rows FILE]

The scenes have two to four stickers and a caption that names all of them. Nothing was tuned on the
scenes of seeds 0 to 9: the limit of the gate "order" was chosen on pairs of those of seed 11.
"""

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lrd_helpers.benchmark.estimates import Metric, estimate
from lrd_helpers.layerdiff.construction import Stage, Work, storybook_stages, take_apart, timed
from lrd_helpers.layerdiff.stack import LayerStack
from lrd_helpers.measure.layers import colour_error, composed, psnr, soft_iou
from lrd_helpers.models import load_pipeline
from lrd_helpers.pictures import pixels_of
from lrd_helpers.storybook import (
    Rendering,
    Scene,
    caption_of,
    render_scenes,
    sample_scene,
    seeded,
)
from lrd_helpers.training.loop import HELD_OUT_SEED

OVERLAP = 0.005
"""Share of the canvas that two layers must share, at least, for their order to be counted."""

METRICS = {
    "mask IoU": (Metric("mask IoU", 3), 0.90),
    "alpha soft IoU": (Metric("alpha soft IoU", 3), None),
    "RGB L1": (Metric("RGB L1", 3, less_is_better=True), None),
    "behind": (Metric("what was behind, dB", 1), 22),
    "background": (Metric("background, dB", 1), None),
    "order": (Metric("order right", 2), 0.95),
}
"""The scores of a scene, and the target of each."""

KEPT = Metric("kept by the gates", 2), 0.60


def scene_of(seed: int, number: int) -> Scene:
    """A scene of two, three or four stickers, in turns, whose caption names everything."""
    drawn = sample_scene(seeded(HELD_OUT_SEED, 29, seed, number), sticker_count=2 + number % 3)
    caption = caption_of(drawn.stickers, drawn.place)
    return Scene(drawn.place, drawn.stickers, caption, drawn.place_numbers)


def numbers_in(stack: LayerStack, scene: Scene) -> list[int]:
    """For each layer of the stack, the furthest back first, which sticker of the scene it is."""
    names = [caption_of((each,), scene.place, name_place=False) for each in scene.stickers]
    return [names.index(layer.prompt) for layer in stack.layers]


def rgba_of(stack: LayerStack) -> Tensor:
    """The layers as numbers in [0, 1]: (layers, 4, height, width)."""
    images = [layer.image for layer in stack.layers]
    alphas = [pixels_of(image.getchannel("A"))[:1] for image in images]
    colours = [pixels_of(image.convert("RGB")) for image in images]
    return torch.stack([torch.cat(pair) for pair in zip(colours, alphas, strict=True)])


def scores(work: Work, scene: Scene) -> dict[str, list[float]]:
    """Each score of each layer (of each overlapping pair) of a scene, against the truth."""
    truth, kept = render_scenes([scene]), {name: [] for name in METRICS}
    if work.stack is None:
        return kept
    numbers, made = numbers_in(work.stack, scene), rgba_of(work.stack)
    true = truth.rgba[0, numbers]
    kept["mask IoU"] = soft_iou((made > 0.5).float(), (true > 0.5).float()).tolist()
    kept["alpha soft IoU"] = soft_iou(made, true).tolist()
    kept["RGB L1"] = colour_error(made, true).tolist()
    ground = pixels_of(work.stack.background)[None]
    kept["background"] = psnr(ground, truth.backgrounds).tolist()
    kept["behind"] = behind(ground, made, truth, numbers)
    kept["order"] = order(truth, numbers)
    return kept


def behind(ground: Tensor, made: Tensor, truth: Rendering, numbers: list[int]) -> list[float]:
    """PSNR of what each layer hid of all that is behind it, in its pixels that were seen."""
    values, gone = [], set()
    for place in reversed(range(len(numbers))):  # as they were cut out
        seen = _over(truth, gone)[1][numbers[place]]
        gone.add(numbers[place])
        if seen.any():
            left = composed(ground, made[None, :place])
            values.append(float(psnr(left, _over(truth, gone)[0], seen[None])))
    return values


def _over(truth: Rendering, gone: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The true picture without some stickers, and what is seen of each other one."""
    rest = [n for n in range(truth.layers.shape[1]) if n not in gone]
    picture = composed(truth.backgrounds, truth.rgba[:, rest])
    some = Rendering(picture, truth.backgrounds, truth.layers[:, rest], truth.scenes)
    return picture, dict(zip(rest, some.masks[0], strict=True))


def order(truth: Rendering, numbers: list[int]) -> list[float]:
    """For each pair of stickers that overlap, whether the right one is in front."""
    alphas = truth.layers[0, :, 3] > 0.5
    return [
        float(numbers.index(back) < numbers.index(front))
        for front in numbers
        for back in numbers
        if back < front and float((alphas[back] & alphas[front]).float().mean()) >= OVERLAP
    ]


def measured(seed: int, number: int, stages: Sequence[Stage]) -> dict:
    """A scene's scores, what the gates said, why it is not kept, and the CPU's seconds a stage."""
    scene, seconds = scene_of(seed, number), Counter[str]()
    picture = render_scenes([scene]).images[0]
    watched = timed(stages, seconds, time.process_time)
    work = take_apart(picture, scene.caption, watched, go_on=True)
    return {
        "scores": scores(work, scene),
        "verdicts": [[v.gate, v.of, v.value, v.passed] for v in work.verdicts],
        "fault": work.fault,
        "kept": work.kept,
        "stickers": len(scene.stickers),
        "seconds": seconds,
    }


def rows_of(path: Path | None) -> list[dict]:
    """What an earlier run has measured; a line that was cut off is not there."""
    lines = path.read_text().splitlines(keepends=True) if path and path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def mean_of(row: dict, name: str) -> float:
    """The mean of a score over a scene's layers (or pairs); NaN where there are none."""
    values = [value for value in row["scores"][name] if not math.isnan(value)]
    return statistics.fmean(values) if values else math.nan


def interval(metric: Metric, values: list[float]) -> str:
    """Mean, 95 % interval and number of the values that are there."""
    mean, low, high = estimate(values)
    count = sum(not math.isnan(value) for value in values)
    return f"{metric.text(mean)} [{metric.text(low)}, {metric.text(high)}] ({count})"


def table(rows: list[dict]) -> str:
    """All scores with their intervals over scenes, and how many scenes each gate leaves out."""
    kept = [row for row in rows if row["kept"]]
    lines = [["", "target", "kept by the gates", "without gates"], ["---"] * 4]
    for name, (metric, target) in METRICS.items():
        parts = [interval(metric, [mean_of(row, name) for row in part]) for part in (kept, rows)]
        lines.append([metric.column, "" if target is None else f"≥ {target:g}", *parts])
    metric, target = KEPT
    share = interval(metric, [float(row["kept"]) for row in rows])
    lines.append([metric.column, f"≥ {target:g}", share, ""])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    faults = Counter(row["fault"] for row in rows if row["fault"])
    seconds = sum((Counter(row["seconds"]) for row in rows), Counter[str]())
    costs = [f"{name} {spent / len(rows):.2f}" for name, spent in seconds.most_common()]
    left_out = (f"{n} × {fault}" for fault, n in faults.most_common())
    return "\n".join([text, "", *left_out, f"CPU seconds a picture: {', '.join(costs)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="a line a scene, in JSON; goes on after them")
    options = parser.parse_args()
    rows = rows_of(options.rows)[: options.scenes]
    with options.rows.open("w") if options.rows else nullcontext() as file:
        if file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        stages = storybook_stages(load_pipeline("storybook", "cpu"))
        for number in tqdm(range(len(rows), options.scenes), unit="scene", leave=False):
            rows.append(measured(options.seed, number, stages))
            if file:
                print(json.dumps(rows[-1]), file=file, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
