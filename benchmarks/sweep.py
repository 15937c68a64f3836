"""A first default for layered rendering: one table of choices, all on the same layouts and noise.

    python benchmarks/sweep.py [--layouts 24] [--seeds 1]

Each row differs from the first in what its name says. IoU is the mean over layers of what the
shipped segmenter finds; ± is half of the 95 % interval of the paired difference to the first row
(bootstrap over layouts). The layouts are random scenes of one to three stickers.
"""

import argparse
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from lrd_helpers.layout import Layout
from lrd_helpers.method import METHODS, Method
from lrd_helpers.metrics import StorybookClip, StorybookDetector, clip_score, layout_iou, success
from lrd_helpers.models import load_pipeline
from lrd_helpers.storybook import sample_layout, seeded
from lrd_helpers.training.loop import HELD_OUT_SEED

DEFAULT = METHODS["default"]


def choices() -> dict[str, Method]:
    """The rows of the table, by name."""
    rows = {"default": DEFAULT, "plain caption": replace(DEFAULT, layered_fraction=0)}
    rows |= {name: METHODS[name] for name in ("paper", "authors", "unofficial")}
    for strength in (0.0, 0.2):
        rows[f"inside = outside = {strength}"] = replace(DEFAULT, inside=strength, outside=strength)
    rows["dynamic δ, strength 0.5"] = replace(DEFAULT, delta="dynamic", inside=0.5, outside=0.5)
    rows["background not in the prompts"] = replace(DEFAULT, background_in_prompts=False)
    for share in (0.2, 0.4):
        rows[f"placed_at {share}"] = replace(DEFAULT, placed_at=share)
    for fraction in (0.32, 0.8):
        rows[f"layered_fraction {fraction}"] = replace(DEFAULT, layered_fraction=fraction)
    together = replace(DEFAULT, fuse="steps")
    rows["fused at all steps"] = together
    for strength in (0.0, 0.2):
        rows[f"fused at all steps, inside = outside = {strength}"] = replace(
            together, inside=strength, outside=strength
        )
    rows["fused once"] = replace(DEFAULT, fuse="once")
    for strength in (0.3, 0.5):
        rows[f"paper, strength {strength}"] = replace(
            METHODS["paper"], inside=strength, outside=strength
        )
    return rows


def measured(pipe, detector, clip, layouts: list[Layout], seeds: int, method: Method):
    """For each layout the mean IoU, the share of layers that succeed, and the CLIP score."""
    rows = []
    for seed in range(seeds):
        for first in range(0, len(layouts), 8):
            batch = layouts[first : first + 8]
            generators = [seeded(seed, 5, first + number) for number in range(len(batch))]
            images = pipe(batch, method=method, generator=generators).images
            for image, layout in zip(images, batch, strict=True):
                ious = layout_iou(detector, image, layout)
                succeeded = success(ious)
                rows.append(
                    (
                        sum(ious) / len(ious),
                        sum(succeeded) / len(succeeded),
                        clip_score(clip, image, layout.caption),
                    )
                )
    return torch.tensor(rows).view(seeds, len(layouts), 3).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name contains this, and the default")
    options = parser.parse_args()
    pipe = load_pipeline("storybook", "cpu")
    pipe.set_progress_bar_config(disable=True)
    detector, clip = StorybookDetector(), StorybookClip()
    layouts = [
        sample_layout(seeded(HELD_OUT_SEED, 6, number), sticker_count=1 + number % 3)
        for number in range(options.layouts)
    ]
    wanted = {
        name: method
        for name, method in choices().items()
        if options.only in name or name == "default"
    }
    print(
        "| choice | IoU | difference | layers with IoU ≥ 0.5 | CLIP score |\n|---|---|---|---|---|"
    )
    base = None
    for name, method in tqdm(wanted.items(), leave=False, disable=None):
        scores = measured(pipe, detector, clip, layouts, options.seeds, method)
        iou, succeeded, score = scores.mean(0).tolist()
        base = scores[:, 0] if base is None else base
        difference = scores[:, 0] - base
        draws = torch.randint(len(layouts), (2000, len(layouts)), generator=seeded(0))
        low, high = difference[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
        tqdm.write(
            f"| {name} | {iou:.3f} | {difference.mean():+.3f} ± {(high - low) / 2:.3f} "
            f"| {succeeded:.0%} | {score:.1f} |"
        )


if __name__ == "__main__":
    main()
