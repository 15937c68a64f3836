"""How good the layered model is: measures each of its targets and prints one Markdown table.

    python benchmarks/layers.py [--stacks 500] [--model FOLDER] [--parts text image auto speed]
    python benchmarks/layers.py --ablations --stacks 100

Nothing here was tuned on these scenes: they come from seeds that no training uses.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from lrd_helpers.benchmark.estimates import estimate
from lrd_helpers.layerdiff.alpha import over
from lrd_helpers.layerdiff.pipeline import LEAST, LayerDiffPipeline
from lrd_helpers.layerdiff.unet import PARTS, switched_off
from lrd_helpers.measure import StorybookDetector
from lrd_helpers.measure.layers import (
    colour_error,
    composed,
    order_right,
    psnr,
    soft_iou,
    ssim,
)
from lrd_helpers.measure.storybook import Description
from lrd_helpers.models import load_pipeline
from lrd_helpers.pictures import picture_of
from lrd_helpers.storybook import Scene, caption_of, render_scenes, sample_scene, seeded
from lrd_helpers.training.loop import HELD_OUT_SEED

GROUND = Scene("on snow", (), "on snow")
"""The place that layers are laid over, one by one, for the detector to look at."""

TARGETS = {
    "composite right": (">=", None),
    "flattened right": (">=", None),
    "base model, caption alone, right": (">=", None),
    "layers right, alone": (">=", 0.92),
    "leakage": ("<=", 0.05),
    "predicted against composed, dB": (">=", 27),
    "predicted against composed, SSIM": (">=", 0.95),
    "order right": (">=", 0.95),
    "image → layers, alpha soft IoU": (">=", 0.90),
    "image → layers, RGB L1": ("<=", 0.04),
    "image → layers, recomposed dB": (">=", 27),
    "behind a hidden part, dB": (">=", 22),
    "auto: as many layers as things": (">=", 0.90),
    "four layers against a plain picture": ("<=", 6),
}


def scenes_of(count: int, layers: int) -> list[Scene]:
    """Scenes whose caption names everything, of seeds of this script alone."""
    drawn = (
        sample_scene(seeded(HELD_OUT_SEED, 24, layers, number), sticker_count=layers)
        for number in range(count)
    )
    return [
        Scene(s.place, s.stickers, caption_of(s.stickers, s.place), s.place_numbers) for s in drawn
    ]


def prompts_of(scene: Scene) -> list[str]:
    """A prompt for each sticker."""
    return [caption_of((placed,), scene.place, name_place=False) for placed in scene.stickers]


def drawn(pipe: LayerDiffPipeline, scene: Scene, seed: int, **options: object) -> Tensor:
    """All slots as RGBA, from the scene's prompts if there are no others."""
    asked = {"prompt": scene.caption, "layers": prompts_of(scene), "background": scene.place}
    generator = torch.Generator().manual_seed(seed)
    return pipe(output_type="pt", generator=generator, **asked | options).stacks[0]


def asked(scene: Scene) -> list[tuple[str, str]]:
    return sorted((placed.sticker, placed.colour) for placed in scene.stickers)


Scores = dict[str, float]
"""What one stack scores; of a score for each layer, their mean."""


def from_text(
    pipe: LayerDiffPipeline, scene: Scene, seed: int, detector: StorybookDetector, **options: object
) -> Scores:
    """Text → layers."""
    ground = render_scenes([GROUND]).backgrounds
    rgba = drawn(pipe, scene, seed, **options)
    composite, layers = rgba[-1:, :3], rgba[1:-1]
    flat = composed(rgba[:1, :3], layers[None])
    *alone, whole, laid = detector.describe_all([*over(layers, ground), composite[0], flat[0]])
    right, leaks = [], []
    for placed, seen in zip(scene.stickers, alone, strict=True):
        names = [(each.sticker, each.colour) for each in seen.stickers]
        right.append(names == [(placed.sticker, placed.colour)] and seen.place == GROUND.place)
        areas = {each.sticker: 0.0 for each in seen.stickers}
        for each in seen.stickers:
            areas[each.sticker] += float(each.mask.sum())
        total = sum(areas.values())
        leaks.append(1 - areas.get(placed.sticker, 0.0) / total if total else 0.0)
    orders = [order_right(composite[0], *pair) for pair in itertools.combinations(layers, 2)]
    orders = [answer for answer in orders if answer is not None]  # None: they hardly overlap
    scores = {
        "composite right": float(is_right(whole, scene)),
        "flattened right": float(is_right(laid, scene)),
        "layers right, alone": statistics.fmean(right),
        "leakage": statistics.fmean(leaks),
        "predicted against composed, dB": float(psnr(flat, composite)),
        "predicted against composed, SSIM": float(ssim(flat, composite)),
    }
    return scores | ({"order right": statistics.fmean(orders)} if orders else {})


def is_right(seen: Description, scene: Scene) -> bool:
    """Whether the detector sees the scene's things and place, and nothing else."""
    things = sorted((each.sticker, each.colour) for each in seen.stickers)
    return things == asked(scene) and seen.place == scene.place


def from_caption(
    plain: StableDiffusionPipeline, scene: Scene, seed: int, detector: StorybookDetector
) -> Scores:
    """What the model that the layered one has grown from makes of the caption."""
    generator = torch.Generator().manual_seed(seed)
    [image] = plain(
        scene.caption,
        num_inference_steps=15,
        guidance_scale=5.0,
        generator=generator,
        output_type="pt",
    ).images
    return {"base model, caption alone, right": float(is_right(detector.describe(image), scene))}


def from_image(pipe: LayerDiffPipeline, scene: Scene, seed: int, **options: object) -> Scores:
    """Image → layers, of a true scene."""
    truth = render_scenes([scene])
    rgba = drawn(pipe, scene, seed, image=picture_of(truth.images[0]), **options)
    layers, true = rgba[1:-1], truth.rgba[0, : len(scene.stickers)]
    ious = soft_iou(layers, true)
    hidden = [(true[n, 3] > 0.5) & ~truth.masks[0, n] for n in range(len(true))]
    behind = [
        float(psnr(over(layers[n : n + 1], 0.5), over(true[n : n + 1], 0.5), part[None]))
        for n, part in enumerate(hidden)
        if float(part.float().mean()) > 0.005 and ious[n] > 0.8
    ]
    scores = {
        "image → layers, alpha soft IoU": float(ious.mean()),
        "image → layers, RGB L1": float(colour_error(layers, true).mean()),
        "image → layers, recomposed dB": float(
            psnr(composed(rgba[:1, :3], layers[None]), truth.images)
        ),
    }
    return scores | ({"behind a hidden part, dB": statistics.fmean(behind)} if behind else {})


def auto(pipe: LayerDiffPipeline, scene: Scene, seed: int, **options: object) -> Scores:
    """Caption alone, layers="auto": are there as many layers as the caption has things?"""
    rgba = drawn(pipe, scene, seed, layers="auto", background="", **options)
    full = sum(float(layer[3].mean()) >= LEAST for layer in rgba[1:-1])
    return {"auto: as many layers as things": float(full == len(scene.stickers))}


def scored(
    score: Callable[..., Scores], model: DiffusionPipeline, scenes: list[Scene], **options: object
) -> dict[str, list[float]]:
    """The scores of all scenes; NaN where a scene has none of a kind."""
    rows = [
        score(model, scene, seed, **options)
        for seed, scene in enumerate(tqdm(scenes, desc=score.__name__, leave=False))
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


def ablations(
    pipe: LayerDiffPipeline, scenes: list[Scene], detector: StorybookDetector, **options: object
) -> None:
    """Prints what each part is worth: the same noise without it, and the difference."""
    ways = {f"without {part}": (part, {}) for part in PARTS}
    ways["with self-mask guidance, s = 1"] = (None, {"self_mask_scale": 1.0})
    whole = scored(from_text, pipe, scenes, detector=detector, **options)
    names = list(whole)
    print("| |", " | ".join(names), "|\n|" + "---|" * (len(names) + 1))
    print("| as it is |", *(f"{with_interval(whole[name])} |" for name in names))
    for way, (part, more) in ways.items():
        with switched_off(pipe.unet, part) if part else nullcontext():
            other = scored(from_text, pipe, scenes, detector=detector, **options | more)
        cells = [
            "–"  # no composite is drawn
            if part == "composite slot" and name.startswith(("composite", "predicted", "order"))
            else with_interval([b - a for a, b in zip(whole[name], other[name], strict=True)], "+")
            for name in names
        ]
        print(f"| {way} |", *(f"{cell} |" for cell in cells), flush=True)


def with_interval(values: list[float], sign: str = "") -> str:
    """Their mean with its 95 % interval; a single value alone."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return "{0:{3}.3f} [{1:{3}.3f}, {2:{3}.3f}]".format(*estimate(values), sign)


def ratio_of_four(
    pipe: LayerDiffPipeline, plain: StableDiffusionPipeline
) -> dict[str, list[float]]:
    """The time of four layers over that of a plain picture, 15 steps each, in turns."""
    ratios = []
    for _ in range(5):
        times = []
        for draw in (
            lambda: pipe("a red car", layers=["a red car"] * 4, num_inference_steps=15),
            lambda: plain("a red car", num_inference_steps=15, guidance_scale=5.0),
        ):
            began = time.perf_counter()
            draw()
            times.append(time.perf_counter() - began)
        ratios.append(times[0] / times[1])
    return {"four layers against a plain picture": [statistics.median(ratios)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stacks", type=int, default=500)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--model", default="storybook-layers", help="a folder, or the shipped one")
    parser.add_argument("--parts", nargs="+", default=["text", "base", "image", "auto", "speed"])
    parser.add_argument("--ablations", action="store_true", help="each part switched off instead")
    parser.add_argument("--guidance-scale", type=float, help="another than the pipeline's")
    parser.add_argument("--json", type=Path, help="keep every score in this file, for pairs")
    options = parser.parse_args()
    pipe = load_pipeline(options.model, "cpu")
    plain = StableDiffusionPipeline.from_pipe(load_pipeline("storybook", "cpu"))
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)
    scenes, detector = scenes_of(options.stacks, options.layers), StorybookDetector()
    mixed = [s for n in (1, 2, 3) for s in scenes_of(-(-options.stacks // 3), n)]
    more = {} if options.guidance_scale is None else {"guidance_scale": options.guidance_scale}
    if options.ablations:
        ablations(pipe, scenes, detector, **more)
        return
    parts = {
        "text": lambda: scored(from_text, pipe, scenes, detector=detector, **more),
        "base": lambda: scored(from_caption, plain, scenes, detector=detector),
        "image": lambda: scored(from_image, pipe, scenes, **more),
        "auto": lambda: scored(auto, pipe, mixed, **more),
        "speed": lambda: ratio_of_four(pipe, plain),
    }
    print("| what | target | measured | stacks |", "|---|---|---|---|", sep="\n")
    scores: dict[str, list[float]] = {}
    for part in options.parts:
        scores |= parts[part]()
    for name, values in scores.items():
        sign, target = TARGETS[name]
        wanted = "" if target is None else f"{'≥' if sign == '>=' else '≤'} {target:g}"
        count = sum(not math.isnan(value) for value in values)
        print(f"| {name} | {wanted} | {with_interval(values)} | {count} |")
    if options.json:
        options.json.write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
