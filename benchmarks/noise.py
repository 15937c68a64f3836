"""What the initial noise decides: trigger patches and the green screen.

    python benchmarks/noise.py [--parts patches screen] [--cases 200]

Writes the table that notebook 07 shows, lrd_helpers/assets/noise.csv: a row a setting, with the
mean over its cases and the 95 % bootstrap interval. Small on purpose, 8 or 10 steps, in
bfloat16: ten minutes on one core.

- patches (Ban et al. 2024, arXiv:2406.01970): the cells of x_T under an object that was sampled
  are put into a fresh noise at another place. Does the object come to that place?
- screen (TKG-DM, Morita et al. 2025, arXiv:2411.15580): a colour is added outside an object's box.
  Does the ground become flat, and does the object stay?
"""

import argparse
import csv
import io
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lrd_helpers import Layer, load_pipeline
from lrd_helpers.benchmark.estimates import estimate
from lrd_helpers.files import write_atomically
from lrd_helpers.mask import Box
from lrd_helpers.measure import StorybookDetector, box_iou
from lrd_helpers.measure.storybook import Description
from lrd_helpers.methods.guidance import colour_latents, constant_delta, vision_guidance
from lrd_helpers.models import ASSETS
from lrd_helpers.sampling.model import decode_latents
from lrd_helpers.storybook import caption_of, sample_scene, seeded

SEED = 9_070_000  # of no training and no benchmark
SCALE, BATCH, CELLS = 5.0, 12, 16
STEPS = {"patches": 8, "screen": 10}
CASES = {"patches": 200, "screen": 12}
NOISES = 5  # of each prompt; a patch goes from one of them into the others
LARGEST = CELLS**2 // 3  # cells of a patch: larger ones have nowhere to go
FARTHEST = CELLS // 4  # at least so many cells away, in one direction
THERE = 0.3  # IoU from which a thing has come to a place
SAME = 0.15  # a pixel is of a colour within this distance in RGB, each channel in [0, 1]

Noise = Float[Tensor, "4 16 16"]
Pictures = Float[Tensor, "count 3 128 128"]
Row = dict[str, object]
Place = tuple[int, int]  # column and row of the upper left cell


MOVED = "the patch, moved"
ELSEWHERE = "a patch from elsewhere in the same noise"
FRESH = "no patch: the other noise as it is"


class Sampled(NamedTuple):
    """A thing that plain sampling drew."""

    prompt: str
    noise: Noise
    box: Box

    @property
    def cells(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the cells that the box touches."""
        x0, y0, x1, y1 = (CELLS * edge for edge in self.box)
        return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)


class Lab:
    """The shipped model, sampled plainly, and the detector."""

    def __init__(self) -> None:
        self.pipe = load_pipeline("storybook", device="cpu")
        self.pipe.set_progress_bar_config(disable=True)
        parts = self.pipe.components
        self.plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        self.plain.set_progress_bar_config(disable=True)
        self.detector = StorybookDetector()

    def pictures(
        self, prompts: Sequence[str], noises: Sequence[Noise], steps: int
    ) -> tuple[Pictures, list[Description]]:
        """Plain sampling, a picture a prompt, and what the detector sees in each."""
        if not prompts:
            return torch.empty(0, 3, 128, 128), []
        batches = [slice(i, i + BATCH) for i in range(0, len(prompts), BATCH)]
        pictures = torch.cat(
            [
                self.plain(
                    list(prompts[part]),
                    latents=torch.stack(noises[part]),
                    num_inference_steps=steps,
                    guidance_scale=SCALE,
                    output_type="pt",
                ).images
                for part in tqdm(batches, leave=False, disable=None)
            ]
        ).float()
        return pictures, self.detector.describe_all(list(pictures))


def fresh(seed: int, number: int) -> Noise:
    return torch.randn(4, CELLS, CELLS, generator=seeded(seed, number))


def prompt_of(number: int) -> str:
    """A thing and its colour, no place: "a red car"."""
    scene = sample_scene(seeded(SEED, number), sticker_count=1)
    return caption_of(scene.stickers, scene.place, name_place=False)


def thing_in(look: Description, prompt: str, noise: Noise) -> Sampled | None:
    """The one thing in a picture, if it is the prompt's and not too large to go elsewhere."""
    boxes = boxes_of(look, prompt)
    if len(look.stickers) != 1 or len(boxes) != 1:
        return None
    thing = Sampled(prompt, noise, boxes[0])
    left, top, right, bottom = thing.cells
    return thing if (right - left) * (bottom - top) <= LARGEST else None


def boxes_of(look: Description, prompt: str) -> list[Box]:
    """Where the prompt's thing is, in its colour."""
    return [thing.box for thing in look.stickers if f"{thing.colour} {thing.sticker}" in prompt]


# ------------------------------------------------------------------ trigger patches


def put(patch: Tensor, noise: Noise, place: Place) -> Noise:
    """The noise with the patch at the place."""
    (column, row), (height, width) = place, patch.shape[1:]
    noise = noise.clone()
    noise[:, row : row + height, column : column + width] = patch
    return noise


def places_away(thing: Sampled) -> list[Place]:
    """Where the thing's cells could be moved to."""
    left, top, right, bottom = thing.cells
    return [
        (column, row)
        for column in range(CELLS + 1 - (right - left))
        for row in range(CELLS + 1 - (bottom - top))
        if max(abs(column - left), abs(row - top)) >= FARTHEST
    ]


def moved_box(box: Box, by: Place) -> Box:
    (x0, y0, x1, y1), (right, down) = box, (by[0] / CELLS, by[1] / CELLS)
    return x0 + right, y0 + down, x1 + right, y1 + down


def moves(thing: Sampled, ground: Noise, number: int) -> tuple[Box, dict[str, Noise]]:
    """A place for the thing, and the other noise with two patches at that place."""
    left, top, right, bottom = thing.cells
    places, generator = places_away(thing), seeded(SEED + 2, number)
    target, (column, row) = (
        places[int(torch.randint(len(places), (), generator=generator))] for _ in range(2)
    )
    height, width = bottom - top, right - left
    patches = {
        MOVED: thing.noise[:, top:bottom, left:right],
        ELSEWHERE: thing.noise[:, row : row + height, column : column + width],
    }
    box = moved_box(thing.box, (target[0] - left, target[1] - top))
    return box, {name: put(patch, ground, target) for name, patch in patches.items()}


def patch_cases(lab: Lab, count: int) -> Iterator[tuple[tuple[int, int], dict[str, bool]]]:
    """Each thing goes into the other noises of its prompt: which thing, and what brings it."""
    done = 0
    for scene in itertools.count():
        prompt = prompt_of(scene)
        noises = [fresh(SEED + 3, NOISES * scene + n) for n in range(NOISES)]
        _, plain = lab.pictures([prompt] * NOISES, noises, STEPS["patches"])
        for a, noise in enumerate(noises):
            thing = thing_in(plain[a], prompt, noise)
            others = [b for b in range(NOISES) if thing and b != a][: count - done]
            made = [moves(thing, noises[b], done + n) for n, b in enumerate(others)]
            changed = [noise for _, patched in made for noise in patched.values()]
            _, looks = lab.pictures([prompt] * len(changed), changed, STEPS["patches"])
            rest = iter(looks)
            for b, (box, patched) in zip(others, made, strict=True):
                seen = {name: next(rest) for name in patched} | {FRESH: plain[b]}
                yield (scene, a), {name: comes(look, prompt, box) for name, look in seen.items()}
            done += len(others)
        if done == count:
            return


def comes(look: Description, prompt: str, box: Box) -> bool:
    return any(box_iou(there, box) >= THERE for there in boxes_of(look, prompt))


def measure_patches(lab: Lab, count: int) -> Iterator[Row]:
    """In how many cases the thing comes with its patch, and how often it is there without."""
    by_thing: dict[tuple[int, int], list[dict[str, bool]]] = {}
    for thing, came in tqdm(patch_cases(lab, count), total=count, disable=None):
        by_thing.setdefault(thing, []).append(came)
    for name in (MOVED, ELSEWHERE, FRESH):
        # A thing's cases are not independent: a value a thing, whose mean is that of all cases.
        sums = [sum(came[name] for came in cases) for cases in by_thing.values()]
        values = [total * len(sums) / count for total in sums]
        yield row("patches", name, "comes to the place", values, count)


# ------------------------------------------------------------------ the green screen

SCREENS = {"green": "#00b140", "white": "white"}
STRENGTHS = (0.0, 0.4, 0.8, 1.2)


def share_of(picture: Tensor, colour: Tensor, ground: Tensor) -> float:
    """The share of the ground's pixels that have the colour."""
    distance = (picture - colour[:, None, None]).norm(dim=0)[ground]
    return float((distance <= SAME).float().mean())


def looked_at(
    thing: Sampled, picture: Tensor, look: Description, asked: Tensor
) -> dict[str, float]:
    """What became of one picture's ground and thing; `asked` is the screen's colour."""
    ground = ~Layer(thing.prompt, thing.box).cells(*picture.shape[1:])
    for found in look.stickers:
        ground &= ~found.mask
    median = picture[:, ground].median(1).values
    stays = any(box_iou(box, thing.box) >= 0.5 for box in boxes_of(look, thing.prompt))
    return {
        "ground of one colour": share_of(picture, median, ground),
        "ground of the colour asked for": share_of(picture, asked, ground),
        "thing stays": float(stays),
    }


def things(lab: Lab, count: int) -> list[Sampled]:
    """The first `count` things that plain sampling draws alone."""
    found: list[Sampled] = []
    for first in itertools.count(step=BATCH):
        prompts = [prompt_of(n) for n in range(first, first + BATCH)]
        noises = [fresh(SEED + 1, n) for n in range(first, first + BATCH)]
        _, looks = lab.pictures(prompts, noises, STEPS["screen"])
        found += filter(None, map(thing_in, looks, prompts, noises))
        if len(found) >= count:
            return found[:count]


def measure_screen(lab: Lab, count: int) -> Iterator[Row]:
    """How flat the ground gets where a colour is added outside a thing's box."""
    sampled, vae = things(lab, count), lab.pipe.vae
    flat = colour_latents(vae, list(SCREENS.values()))[:, :, None, None]
    with torch.no_grad():  # the colour as the autoencoder shows it
        shown = decode_latents(vae, flat.expand(-1, -1, CELLS, CELLS)).mean((2, 3)) / 2 + 0.5
    prompts = [thing.prompt for thing in sampled]
    masks = [Layer(t.prompt, t.box).cells(CELLS, CELLS).float() for t in sampled]
    for (name, colour), asked in zip(SCREENS.items(), shown, strict=True):
        delta = constant_delta(vae, colour)
        for strength in STRENGTHS:
            fields = [vision_guidance(delta, mask, 0, -strength) for mask in masks]
            noises = [thing.noise + field for thing, field in zip(sampled, fields, strict=True)]
            pictures, looks = lab.pictures(prompts, noises, STEPS["screen"])
            rows = [looked_at(*each, asked) for each in zip(sampled, pictures, looks, strict=True)]
            for measure in rows[0]:
                values = [each[measure] for each in rows]
                yield row("screen", f"{name}, {strength:g}", measure, values)
            [(place, _)] = Counter(look.place for look in looks).most_common(1)
            same = [look.place == place for look in looks]
            yield row("screen", f"{name}, {strength:g}", f"place: {place}", same)


# ------------------------------------------------------------------ the table

PARTS: dict[str, Callable[[Lab, int], Iterator[Row]]] = {
    "patches": measure_patches,
    "screen": measure_screen,
}


def row(
    part: str, setting: str, measure: str, values: Sequence[float], cases: int | None = None
) -> Row:
    """The mean of independent values, with its 95 % bootstrap interval."""
    texts = (f"{number:.3f}" for number in estimate([float(value) for value in values]))
    names = "part", "setting", "measure", "cases", "mean", "low", "high"
    return dict(zip(names, (part, setting, measure, cases or len(values), *texts), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--cases", type=int, default=CASES["patches"], help="of trigger patches")
    parser.add_argument("--table", type=Path, default=ASSETS / "noise.csv")
    options = parser.parse_args()
    rows: list[Row] = []
    if options.table.exists():  # the parts that are not measured again stay
        with options.table.open(encoding="utf-8", newline="") as file:
            rows = [each for each in csv.DictReader(file) if each["part"] not in options.parts]
    lab, counts = Lab(), CASES | {"patches": options.cases}
    with torch.autocast("cpu", torch.bfloat16):
        for part in options.parts:
            for each in PARTS[part](lab, counts[part]):
                print(*each.values(), sep=" | ", flush=True)
                rows.append(each)
                write(rows, options.table)


def write(rows: list[Row], path: Path) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(rows, key=lambda each: list(PARTS).index(str(each["part"]))))
    write_atomically(path, text.getvalue().encode())


if __name__ == "__main__":
    main()
