"""Teaches a finished U-Net out of its own mistakes.

It draws captions as users do, from noise, with guidance, and a detector says what is there that the
caption does not name, and where. With that hindsight each step of the drawing can be corrected: in
that place, away from what came there and toward what belongs there (negative prompts, kept to one
place). What the corrected steps would have predicted is then learned, at the very states the U-Net
had come to (DAgger, Ross et al. 2011), beside scenes and noise as ever. The detector is the one
that measures; but it only points at places: what is learned is what the U-Net itself predicts for
other captions, never a gradient of the detector's.
"""

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, StableDiffusionPipeline
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from lrd_helpers.measure import Description, StorybookDetector
from lrd_helpers.storybook import PlacedSticker, Scene, caption_of, sample_scene, seeded
from lrd_helpers.training import loop
from lrd_helpers.training.latent_diffusion import Latents, Lessons

GUIDANCE_SCALE = 5.0
STEPS = 25
CORRECTION = 0.4  # of the difference of two captions' noise; guidance makes five times that of it
NOISIEST = 801  # the first timestep corrected: earlier nothing tells what will come where
CLEANEST = 121  # the last one
OWN_STEPS = 6  # kept of a picture that is right
GROUP = 16  # pictures drawn at once
STICKER_SHARES = (0.0, 0.1, 0.6, 0.3)  # of captions with 0, 1, 2 and 3 stickers


class Mistake(NamedTuple):
    """Something too much in picture number `picture` of a group."""

    picture: int
    drawn: str  # a caption of what is there
    right: str  # a caption of what belongs there
    cells: Float[Tensor, "1 height width"]  # 1 where it is, else 0


def mistakes(found: Description, scene: Scene, picture: int, factor: int = 8) -> list[Mistake]:
    """What a picture shows too much of, where (in cells of factor × factor pixels, and one cell
    around it), and what belongs there: a thing that is missing, of the same kind if possible, or
    nothing but the place. Of several things alike the largest is the one that was asked for.
    """
    missing = Counter(asked_things(scene))
    extra = []
    for one in found.stickers:  # the largest first
        if missing[one.sticker, one.colour]:
            missing[one.sticker, one.colour] -= 1
        else:
            extra.append(one)
    lacking = {sticker for sticker, _ in missing.elements()}
    extra.sort(key=lambda one: one.sticker not in lacking)
    result = []
    for one in extra:
        wanted = sorted(missing.elements(), key=lambda thing: thing[0] != one.sticker)[:1]
        missing.subtract(wanted)
        cells = (functional.avg_pool2d(one.mask[None].float(), factor) > 0.1).float()
        cells = functional.max_pool2d(cells, 3, stride=1, padding=1)
        drawn, right = (
            caption_of(
                tuple(PlacedSticker(*thing, (0.5, 0.5), (0.5, 0.5)) for thing in things),
                scene.place,
            )
            for things in ([(one.sticker, one.colour)], wanted)
        )
        result.append(Mistake(picture, drawn, right, cells))
    return result


def asked_things(scene: Scene) -> list[tuple[str, str]]:
    """Sticker and colour of all that the caption names, sorted."""
    return sorted((placed.sticker, placed.colour) for placed in scene.stickers)


def is_right(found: Description, scene: Scene) -> bool:
    """Whether the picture shows exactly what the caption names."""
    return sorted((one.sticker, one.colour) for one in found.stickers) == asked_things(scene)


class Illustrator:
    """Draws captions with a pipeline and collects lessons from its drawings.

    Attributes:
        drawn, right, repaired: how many pictures so far, how many of them were right at once, and
            how many others once their steps were corrected.
    """

    def __init__(self, pipe: StableDiffusionPipeline, detector: StorybookDetector) -> None:
        self.pipe, self.detector = pipe, detector
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.scheduler.set_timesteps(STEPS)
        self.drawn = self.right = self.repaired = 0
        self.rows: list[tuple[Tensor, Tensor, Tensor, str]] = []

    def tokens(self, captions: list[str]) -> Int[Tensor, "batch length"]:
        """As the text encoder takes them."""
        return self.pipe.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    def noise(self, latents: Latents, timestep: Tensor, captions: list[str]) -> list[Latents]:
        """Predicted for the latents, once for each len(latents) captions."""
        text = self.pipe.text_encoder(self.tokens(captions))[0]
        times = len(captions) // len(latents)
        repeated = latents.repeat(times, 1, 1, 1)
        return list(self.pipe.unet(repeated, timestep, text).sample.chunk(times))

    def described(self, latents: Latents) -> list[Description]:
        """What the detector finds in the pictures."""
        decoded = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        return self.detector.describe_all(list((decoded / 2 + 0.5).clamp(0, 1)))

    def next_latents(
        self, empty: Latents, conditional: Latents, timestep: Tensor, latents: Latents
    ) -> Latents:
        eps = empty + GUIDANCE_SCALE * (conditional - empty)
        return self.scheduler.step(eps, timestep, latents).prev_sample

    def correction(self, latents: Latents, timestep: Tensor, wrong: list[Mistake]) -> Latents:
        """What the noise predicted for the caption is to be changed by."""
        rows = [mistake.picture for mistake in wrong]
        captions = [mistake.drawn for mistake in wrong] + [mistake.right for mistake in wrong]
        drawn, right = self.noise(latents[rows], timestep, captions)
        change = torch.zeros_like(latents)
        for mistake, difference in zip(wrong, right - drawn, strict=True):
            change[mistake.picture] += CORRECTION * difference * mistake.cells
        return change

    @torch.no_grad()
    def draw(self, scenes: list[Scene], generator: torch.Generator) -> None:
        """Collects of pictures that are right a few of their own predictions, of others the
        corrected ones: along their own path and along the corrected one, if that led to a picture
        that is right.
        """
        captions = [caption_of(scene.stickers, scene.place) for scene in scenes]
        config = self.pipe.unet.config
        latents = torch.randn(
            len(scenes), config.in_channels, *[config.sample_size] * 2, generator=generator
        )
        path, predicted = [], []
        for timestep in self.scheduler.timesteps:
            path.append(latents)
            empty, conditional = self.noise(latents, timestep, [""] * len(scenes) + captions)
            predicted.append(conditional)
            latents = self.next_latents(empty, conditional, timestep, latents)
        found = self.described(latents)
        right = [is_right(one, scene) for one, scene in zip(found, scenes, strict=True)]
        steps = [
            step
            for step, timestep in enumerate(self.scheduler.timesteps)
            if CLEANEST <= timestep <= NOISIEST
        ]
        for picture, caption in enumerate(captions):
            if right[picture]:
                few = torch.randperm(len(steps), generator=generator)[:OWN_STEPS]
                for step in (steps[number] for number in few.tolist()):
                    state, prediction = path[step][picture], predicted[step][picture]
                    timestep = self.scheduler.timesteps[step]
                    self.rows.append((state, timestep, prediction, caption))
        self.drawn, self.right = self.drawn + len(scenes), self.right + sum(right)

        numbers = [n for n, scene in enumerate(scenes) if mistakes(found[n], scene, n)]
        wrong = [
            mistake
            for row, n in enumerate(numbers)
            for mistake in mistakes(found[n], scenes[n], row)
        ]
        if wrong:
            self._draw_corrected(
                [scenes[n] for n in numbers],
                [captions[n] for n in numbers],
                wrong,
                steps,
                [states[numbers] for states in path],
                [predictions[numbers] for predictions in predicted],
            )

    def _draw_corrected(
        self,
        scenes: list[Scene],
        captions: list[str],
        wrong: list[Mistake],
        steps: list[int],
        path: list[Latents],
        predicted: list[Latents],
    ) -> None:
        """From the first of the steps on."""
        latents, corrected = path[steps[0]], []
        for step, timestep in enumerate(self.scheduler.timesteps[steps[0] :], steps[0]):
            empty, conditional = self.noise(latents, timestep, [""] * len(scenes) + captions)
            if step in steps:
                conditional = conditional + self.correction(latents, timestep, wrong)
                corrected.append((latents, conditional))
            latents = self.next_latents(empty, conditional, timestep, latents)
        good = [
            row
            for row, (found, scene) in enumerate(zip(self.described(latents), scenes, strict=True))
            if is_right(found, scene)
        ]
        self.repaired += len(good)
        wrong = [mistake for mistake in wrong if mistake.picture in good]
        if not wrong:
            return
        for step, (states, predictions) in zip(steps, corrected, strict=True):
            timestep = self.scheduler.timesteps[step]
            should = predicted[step] + self.correction(path[step], timestep, wrong)
            for row in good:
                self.rows.append((path[step][row], timestep, should[row], captions[row]))
                self.rows.append((states[row], timestep, predictions[row], captions[row]))

    def lessons(self) -> Lessons:
        """All that were collected.

        Raises:
            ValueError: none were.
        """
        if not self.rows:
            raise ValueError(
                f"of {self.drawn} pictures none was right, corrected or not: nothing to learn from"
            )
        states, timesteps, predictions, captions = zip(*self.rows, strict=True)
        return Lessons(
            torch.stack(states),
            torch.stack(timesteps),
            torch.stack(predictions),
            self.tokens(list(captions)),
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m lrd_helpers.training.repair",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--from",
        dest="start_from",
        type=Path,
        metavar="FOLDER",
        default=loop.ASSETS / "storybook",
        help="the pipeline that draws, and is to learn from it",
    )
    add("--output", type=Path, default=Path("runs") / "lessons", help="folder the lessons go to")
    add("--pictures", type=int, default=800, help="to be drawn, by all processes together")
    add("--seed", type=int, default=0, help="of captions and noise")
    options = parser.parse_args(arguments)
    if options.pictures < 1:
        parser.error(f"--pictures {options.pictures}: it must be at least 1")
    if list(options.output.glob("lessons-*.safetensors")):
        # Those of another U-Net or number of processes would be learned along with the new ones.
        parser.error(f"--output {options.output}: it has lessons already; name another folder")
    if not options.start_from.is_dir():
        parser.error(f"--from {options.start_from}: no such folder")
    pipe = StableDiffusionPipeline.from_pretrained(options.start_from, torch_dtype=torch.float32)
    state = PartialState(cpu=not torch.cuda.is_available())
    illustrator = Illustrator(pipe, StorybookDetector())
    shares = torch.tensor(STICKER_SHARES)
    groups = range(state.process_index, -(-options.pictures // GROUP), state.num_processes)
    bar = tqdm(groups, desc="drawing and correcting", disable=not state.is_main_process)
    for number in bar:
        # Group number n depends on (seed, n) alone, whoever draws it.
        generator = seeded(options.seed, 5, number)
        counts = torch.multinomial(shares, GROUP, replacement=True, generator=generator).tolist()
        scenes = [sample_scene(generator, sticker_count=count) for count in counts]
        illustrator.draw(scenes, generator)
        bar.set_postfix_str(f"{illustrator.right} right, {illustrator.repaired} corrected")
    kept = {
        field: part.half() if part.is_floating_point() else part
        for field, part in illustrator.lessons()._asdict().items()
    }
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"lessons-{state.process_index}-of-{state.num_processes}.safetensors"
    partial = options.output / f".{name}.partial"
    save_file(kept, partial)
    os.replace(partial, options.output / name)
    print(
        f"{options.output / name}: {illustrator.drawn} pictures, {illustrator.right} right, "
        f"{illustrator.repaired} more when corrected; {len(kept['states'])} lessons"
    )


if __name__ == "__main__":
    loop.command(main)
