"""How good the layered model is: measures each of its targets and prints one Markdown table.

    python benchmarks/layers.py [--stacks 500] [--model FOLDER] [--parts text image auto speed]

Nothing here was tuned on these scenes: they come from seeds that no training uses.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

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
from lrd_helpers.models import load_pipeline
from lrd_helpers.pictures import picture_of
from lrd_helpers.storybook import Scene, caption_of, render_scenes, sample_scene, seeded
from lrd_helpers.training.loop import HELD_OUT_SEED

GROUND = Scene("on snow", (), "on snow")
"""The place that layers are laid over, one by one, for the detector to look at."""

TARGETS = {
    "composite right": (">=", None),
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
    """All slots as RGBA."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(output_type="pt", generator=generator, **options).stacks[0]


def asked(scene: Scene) -> list[tuple[str, str]]:
    return sorted((placed.sticker, placed.colour) for placed in scene.stickers)


def from_text(
    pipe: LayerDiffPipeline, detector: StorybookDetector, scenes: list[Scene], **options: object
) -> dict[str, list[float]]:
    """Text → layers: each score of each stack (of each layer, of each overlapping pair)."""
    ground = render_scenes([GROUND]).backgrounds
    kept: dict[str, list[float]] = {name: [] for name in TARGETS}
    for seed, scene in enumerate(tqdm(scenes, desc="text → layers", leave=False)):
        rgba = drawn(
            pipe,
            scene,
            seed,
            prompt=scene.caption,
            layers=prompts_of(scene),
            background=scene.place,
            **options,
        )
        composite, layers = rgba[-1:, :3], rgba[1:-1]
        flat = composed(rgba[:1, :3], layers[None])
        alone = over(layers, ground)
        found = detector.describe_all([*alone, composite[0]])
        things = sorted((each.sticker, each.colour) for each in found[-1].stickers)
        right = things == asked(scene) and found[-1].place == scene.place
        kept["composite right"].append(right)
        for placed, seen in zip(scene.stickers, found[:-1], strict=True):
            names = [(each.sticker, each.colour) for each in seen.stickers]
            exactly = names == [(placed.sticker, placed.colour)]
            kept["layers right, alone"].append(exactly and seen.place == GROUND.place)
            areas = [float(each.mask.sum()) for each in seen.stickers]
            foreign = sum(
                area
                for area, each in zip(areas, seen.stickers, strict=True)
                if each.sticker != placed.sticker
            )
            kept["leakage"].append(foreign / max(1.0, sum(areas)))
        kept["predicted against composed, dB"].append(float(psnr(flat, composite)))
        kept["predicted against composed, SSIM"].append(float(ssim(flat, composite)))
        for back in range(len(layers)):
            for front in range(back + 1, len(layers)):
                answer = order_right(composite[0], layers[back], layers[front])
                if answer is not None:
                    kept["order right"].append(answer)
    return {name: values for name, values in kept.items() if values}


def from_image(
    pipe: LayerDiffPipeline, scenes: list[Scene], **options: object
) -> dict[str, list[float]]:
    """Image → layers, of true scenes."""
    kept: dict[str, list[float]] = {name: [] for name in TARGETS}
    for seed, scene in enumerate(tqdm(scenes, desc="image → layers", leave=False)):
        truth = render_scenes([scene])
        rgba = drawn(
            pipe,
            scene,
            seed,
            prompt=scene.caption,
            layers=prompts_of(scene),
            background=scene.place,
            image=picture_of(truth.images[0]),
            **options,
        )
        layers, true = rgba[1:-1], truth.rgba[0, : len(scene.stickers)]
        ious = soft_iou(layers, true)
        kept["image → layers, alpha soft IoU"] += ious.tolist()
        kept["image → layers, RGB L1"] += colour_error(layers, true).tolist()
        flat = composed(rgba[:1, :3], layers[None])
        kept["image → layers, recomposed dB"].append(float(psnr(flat, truth.images)))
        for number in range(len(true) - 1):
            hidden = (true[number, 3] > 0.5) & ~truth.masks[0, number]
            if float(hidden.float().mean()) > 0.005 and ious[number] > 0.8:
                kept["behind a hidden part, dB"] += psnr(
                    over(layers[number : number + 1], 0.5),
                    over(true[number : number + 1], 0.5),
                    hidden[None],
                ).tolist()
    return {name: values for name, values in kept.items() if values}


def auto(pipe: LayerDiffPipeline, scenes: list[Scene], **options: object) -> dict[str, list[float]]:
    """Caption alone, layers="auto": are there as many layers as the caption has things?"""
    counts = []
    for seed, scene in enumerate(tqdm(scenes, desc="auto", leave=False)):
        rgba = drawn(pipe, scene, seed, prompt=scene.caption, **options)
        full = sum(float(layer[3].mean()) >= LEAST for layer in rgba[1:-1])
        counts.append(float(full == len(scene.stickers)))
    return {"auto: as many layers as things": counts}


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
    parser.add_argument("--parts", nargs="+", default=["text", "image", "auto", "speed"])
    parser.add_argument("--self-mask-scale", type=float, default=0.0)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--without", choices=PARTS, help="a part that is switched off")
    parser.add_argument("--json", type=Path, help="keep every score in this file, for pairs")
    options = parser.parse_args()
    pipe = load_pipeline(options.model, "cpu")
    pipe.set_progress_bar_config(disable=True)
    scenes = scenes_of(options.stacks, options.layers)
    given = {"guidance_scale": options.guidance_scale}
    scores: dict[str, list[float]] = {}
    off = switched_off(pipe.unet, options.without) if options.without else nullcontext()
    with off:
        if "text" in options.parts:
            detector = StorybookDetector()
            more = given | {"self_mask_scale": options.self_mask_scale}
            scores |= from_text(pipe, detector, scenes, **more)
        if "image" in options.parts:
            scores |= from_image(pipe, scenes, **given)
        if "auto" in options.parts:
            mixed = [s for n in (1, 2, 3) for s in scenes_of(-(-options.stacks // 3), n)]
            scores |= auto(pipe, mixed, **given)
        if "speed" in options.parts:
            plain = StableDiffusionPipeline.from_pipe(load_pipeline("storybook", "cpu"))
            plain.set_progress_bar_config(disable=True)
            scores |= ratio_of_four(pipe, plain)
    print("| what | target | measured | n |", "|---|---|---|---|", sep="\n")
    for name, values in scores.items():
        sign, target = TARGETS[name]
        wanted = "" if target is None else f"{'≥' if sign == '>=' else '≤'} {target:g}"
        print(f"| {name} | {wanted} | {statistics.fmean(map(float, values)):.3f} | {len(values)} |")
    if options.json:
        options.json.write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
