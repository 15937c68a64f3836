"""Distils a finished pipeline into a student that draws in few steps, with guidance built in.

The teacher draws from noise, with classifier-free guidance, and its noisy latents are kept at the
timesteps of the student's steps. In a single prediction, without guidance, the student learns to go
from each of them to the next: progressive distillation (Salimans & Ho 2022), with all halvings at
once, and guidance as in Meng et al. 2023 at a fixed scale. The U-Net is the teacher's, and DDIM
draws with it. With --from, a student goes on from the states that its steps lead to: from there,
too, the teacher shows the way.
"""

import itertools
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from lrd_helpers.sampling.steps import derived
from lrd_helpers.storybook import StorybookDataset, sample_scene, seeded
from lrd_helpers.training import export, loop
from lrd_helpers.training.latent_cache import CACHE_BATCH, Latents, encoded_once
from lrd_helpers.training.latent_diffusion import (
    TIMESTEPS,
    LatentDiffusionTraining,
    noise_schedule,
    pipeline,
)
from lrd_helpers.training.options import (
    ASSETS,
    CacheOptions,
    SceneOptions,
    check_trained,
    command,
    parse,
)
from lrd_helpers.training.sheets import save_sheet

PART = 4  # batches of drawings a file: what a stop may cost


# ------------------------------------------------------------------ the student's steps


def few_steps(steps: int) -> TCDScheduler:
    """The schedule of a student: t = 999 and so on, in `steps` even steps, and no others.

    Without its noise (η = 0) a step of it is DDIM's.
    """
    scheduler = derived(TCDScheduler, noise_schedule(), original_inference_steps=steps)
    scheduler.set_timesteps(steps)
    return scheduler


class Jumps(NamedTuple):
    """A batch: noisy latents at a step's timestep, and where the teacher went from there."""

    x_t: Latents
    x_s: Latents  # at the next step's timestep; x_0 after the last step
    step: Int[Tensor, "batch"]  # the student's, counted from 0
    captions: list[str]


class DistillationTraining(LatentDiffusionTraining):
    """The student: a U-Net whose DDIM steps are to lead to where the teacher's led.

    Args:
        start_from: the folder of the pipeline whose weights the student begins with.
        steps: that the student draws in.
    """

    def __init__(self, start_from: Path, steps: int = 4) -> None:
        super().__init__(start_from)
        self.few_steps = few_steps(steps)
        # After the last step comes t = 0, whose little noise a student has to take away as well.
        ᾱ = self.few_steps.alphas_cumprod[self.few_steps.timesteps.tolist() + [0]]
        self.alphas, self.sigmas = ᾱ.sqrt(), (1 - ᾱ).sqrt()

    def levels(self, step: Int[Tensor, "batch"]) -> tuple[Tensor, Tensor]:
        """α and σ of x_t = α·x_0 + σ·ε at the timestep of each step."""
        return self.alphas[step].view(-1, 1, 1, 1), self.sigmas[step].view(-1, 1, 1, 1)

    def clean(self, x: Latents, guess: Latents, step: Int[Tensor, "batch"]) -> Latents:
        """x̂_0 = (x_t − σ_t·ε̂) / α_t."""
        α, σ = self.levels(step)
        return (x - σ * guess) / α

    def clean_of_jump(self, batch: Jumps) -> Latents:
        """The x̂_0 with which a DDIM step leads from x_t to x_s (Salimans & Ho 2022, appendix G)."""
        (α_t, σ_t), (α_s, σ_s) = self.levels(batch.step), self.levels(batch.step + 1)
        return (batch.x_s - σ_s / σ_t * batch.x_t) / (α_s - α_t * σ_s / σ_t)

    def guess(
        self, x: Latents, step: Int[Tensor, "batch"], captions: list[str], unet: object = None
    ) -> Latents:
        """ε̂ of the student, in a single prediction without guidance."""
        t = self.few_steps.timesteps[step]
        device = self.unet.device
        text = self.encoded_text(captions)
        return (unet or self.unet)(x.to(device), t.to(device), text).sample.float()

    def jump(self, x: Latents, step: int, captions: list[str]) -> Latents:
        """From the timestep of a step to that of the next, as the pipeline draws: DDIM, η = 0."""
        steps = torch.full((len(x),), step)
        guess = self.guess(x, steps, captions).to(x.device)
        α, σ = self.levels(steps + 1)
        return α * self.clean(x, guess, steps) + σ * guess

    def forward(self, batch: Jumps, generator: torch.Generator) -> dict[str, Tensor]:
        unet = self.trained_unet if self.training else self.unet
        guess = self.guess(batch.x_t, batch.step, batch.captions, unet).cpu()
        errors = self.clean(batch.x_t, guess, batch.step) - self.clean_of_jump(batch)
        squares = errors.square().flatten(1).mean(1)
        of_steps = {
            f"step {step + 1}": squares[batch.step == step].mean().nan_to_num()
            for step in range(len(self.few_steps.timesteps))
        }
        return {"loss": squares.mean(), **of_steps}


# ------------------------------------------------------------------ the teacher


class Teacher:
    """Draws with classifier-free guidance, `steps` of DPM-Solver++ (2M) for each of a student's.

    Lu et al. 2022; the first step after a stop is of first order.
    """

    def __init__(self, options: "DistillationOptions") -> None:
        self.model = LatentDiffusionTraining(options.teacher).eval().requires_grad_(False)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.model.unet.set_attn_processor(AttnProcessor2_0())
        self.steps, self.scale = options.teacher_steps, options.guidance_scale
        self.scheduler = derived(
            DPMSolverMultistepScheduler, noise_schedule(), timestep_spacing="trailing"
        )
        self.count = options.student_steps

    def begin(self, step: int) -> None:
        """The next `jump` starts with the student's step of this number."""
        self.scheduler.set_timesteps(self.steps * self.count)
        self.scheduler.set_begin_index(self.steps * step)
        self.at = self.steps * step

    def jump(self, x: Latents, text: Float[Tensor, "rows tokens channels"]) -> Latents:
        """From the timestep of a student's step to that of the next."""
        device = self.model.unet.device
        for t in self.scheduler.timesteps[self.at : self.at + self.steps]:
            both = torch.cat([x, x]).to(device)
            without, with_text = self.model.unet(both, t.to(device), text).sample.float().chunk(2)
            ε = without + self.scale * (with_text - without)
            x = self.scheduler.step(ε.to(x.device), t, x).prev_sample
        self.at += self.steps
        return x

    def text(self, captions: list[str]) -> Float[Tensor, "rows tokens channels"]:
        """What `jump` reads: the empty caption for every row, then the captions."""
        return self.model.encoded_text([""] * len(captions) + captions)


# ------------------------------------------------------------------ what it learns from


@dataclass(frozen=True)
class DistillationOptions(CacheOptions, SceneOptions):
    """The options of this training."""

    free: ClassVar[tuple[str, ...]] = (*SceneOptions.free, "compile")

    minutes: float = 60.0
    learning_rate: float = 4e-4
    ema_decay: float = 0.998
    cache: int = HfArg(default=8_000, help="drawings of the teacher that are kept")
    run: Path = Path("runs/distillation")
    output: Path = ASSETS / "storybook-turbo"
    teacher: Path = HfArg(default=ASSETS / "storybook", help="folder of the pipeline to distil")
    student_steps: int = HfArg(default=4, help="steps that the student draws in")
    teacher_steps: int = HfArg(default=3, help="steps of the teacher for each of the student's")
    guidance_scale: float = HfArg(default=5.0, help="of the teacher; the student has it built in")
    compile: bool = HfArg(default=False, help="torch.compile the U-Net, as latent_diffusion does")

    def check(self) -> None:
        super().check()
        needed = "model_index.json"
        check_trained("--teacher", self.teacher, "pipeline", "latent_diffusion", needed)
        for name in ("student_steps", "teacher_steps"):
            if not 1 <= getattr(self, name) <= 50:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} {getattr(self, name)}: it must be from 1 to 50")
        if TIMESTEPS % self.student_steps:
            near = max(n for n in range(1, self.student_steps) if TIMESTEPS % n == 0)
            raise ValueError(
                f"--student-steps {self.student_steps}: the {TIMESTEPS:,} timesteps must be "
                f"divisible by it; {near} would work"
            )
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(f"--guidance-scale {self.guidance_scale:g}: it must be 1 or more")


class Drawings:
    """The teacher's jumps between the student's timesteps, computed once and kept with the run.

    Args:
        options: of the training. Where it goes on from a finished student (--from), the jumps
            begin where the student's steps lead to, else where the teacher's do.
        reader, readers: this process's number, of so many that share the drawings.
    """

    def __init__(self, options: DistillationOptions, reader: int, readers: int) -> None:
        self.options, self.reader = options, reader
        self.stream = StorybookDataset(
            CACHE_BATCH, seed=options.seed, sticker_shares=options.sticker_shares
        )
        self.teacher, self.student = Teacher(options), None
        if options.start_from is not None:
            self.student = DistillationTraining(options.start_from, options.student_steps).eval()
            self.student.to(self.teacher.model.unet.device)
            self.student.unet.set_attn_processor(AttnProcessor2_0())
        rounds = max(1, options.cache // CACHE_BATCH // readers)
        numbers = range(reader, rounds * readers, readers)
        firsts = tqdm(range(0, rounds, PART), desc="the teacher draws", disable=reader > 0)
        parts = [self.part(numbers[first : first + PART]) for first in firsts]
        self.kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        scenes = (scene for number in numbers for scene in self.stream.scenes(number))
        self.captions = [scene.caption for scene in scenes]

    def part(self, numbers: range) -> dict[str, Tensor]:
        """The jumps of these batches of drawings, read from their file if it is there."""
        options = self.options
        shares = "-".join(f"{share:g}" for share in options.sticker_shares)
        kind = "own" if self.student else "drawings"
        name = (
            f"{kind}-{options.student_steps}x{options.teacher_steps}-{options.guidance_scale:g}-"
            f"{options.seed}-{shares}-{numbers[0]}-{numbers[-1]}.safetensors"
        )
        drawers = [model.unet for model in (self.teacher.model, self.student) if model]
        file = options.run / name
        return encoded_once(file, nn.ModuleList(drawers), numbers, self.drawn, quiet=True)

    def drawn(self, number: int) -> dict[str, Tensor]:
        """Jumps of a batch of drawings, "drawings steps 4 height width", in half precision."""
        captions = [scene.caption for scene in self.stream.scenes(number)]
        size = self.teacher.model.unet.config.sample_size
        x = torch.randn(
            len(captions), 4, size, size, generator=seeded(self.options.seed, 4, number)
        )
        before, after = [], []
        half = self.options.mixed_precision == "bf16"
        with torch.autocast(self.teacher.model.unet.device.type, torch.bfloat16, enabled=half):
            text = self.teacher.text(captions)
            for step in range(self.options.student_steps):
                if step == 0 or self.student:
                    self.teacher.begin(step)
                before.append(x)
                after.append(self.teacher.jump(x, text))
                x = self.student.jump(x, step, captions) if self.student else after[-1]
        return {
            "x_t": torch.stack(before, 1).half(),
            "x_s": torch.stack(after, 1).half(),
        }

    def batch(self, number: int) -> Jumps:
        """Batch `number`, of all steps alike; it depends on (seed, number, reader) alone."""
        generator = seeded(self.options.seed, 2, number, self.reader)
        size = self.options.batch_size
        rows = torch.randint(len(self.captions), (size,), generator=generator)
        step = torch.arange(size) % self.options.student_steps
        return Jumps(
            self.kept["x_t"][rows, step].float(),
            self.kept["x_s"][rows, step].float(),
            step,
            [self.captions[row] for row in rows.tolist()],
        )

    def batches(self, start: int) -> Iterator[Jumps]:
        """All batches from number `start` on."""
        return map(self.batch, itertools.count(start))


# ------------------------------------------------------------------ the command


@torch.no_grad()
def evaluate(
    trainee: DistillationTraining, options: DistillationOptions, drawings: int = 128
) -> dict[str, object]:
    """How far the student's x_0 are from the teacher's, from the same noise and held-out captions.

    benchmarks/targets.py says how good the pictures are.
    """
    scenes = StorybookDataset(drawings, seed=loop.HELD_OUT_SEED).scenes(5)
    captions = [scene.caption for scene in scenes]
    size = trainee.unet.config.sample_size
    noise = torch.randn(drawings, 4, size, size, generator=seeded(5))
    teacher, x, y = Teacher(options), noise, noise
    teacher.begin(0)
    text = teacher.text(captions)
    for step in range(options.student_steps):
        x, y = trainee.jump(x, step, captions), teacher.jump(y, text)
    name = f"distance from the teacher's latents (RMS), {drawings} held-out captions"
    return {name: round(float((x - y).square().mean().sqrt()), 4)}


def sample_sheet(trainee: DistillationTraining, vae: AutoencoderKL, path: Path) -> None:
    """A picture for each of 24 held-out captions, always from the same noise."""
    pipe = student_pipeline(trainee, vae)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        [sample_scene(seeded(loop.HELD_OUT_SEED, i)).caption for i in range(24)],
        num_inference_steps=len(trainee.few_steps.timesteps),
        guidance_scale=1.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    save_sheet(images.cpu().float(), path, columns=8)


def student_pipeline(trainee: DistillationTraining, vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The parts as the pipeline that is shipped; its U-Net's configuration says how to draw."""
    pipe = pipeline(trainee, vae)
    pipe.scheduler = few_steps(len(trainee.few_steps.timesteps))
    return pipe


def main(arguments: list[str] | None = None) -> None:
    options = parse(DistillationOptions, "distillation", __doc__, arguments)
    torch.manual_seed(options.seed)
    vae = AutoencoderKL.from_pretrained(options.teacher / "vae", torch_dtype=torch.float32).eval()
    trainee = DistillationTraining(options.start_from or options.teacher, options.student_steps)
    if options.compile:
        trainee.compile_unet()
    progress = loop.train(
        trainee,
        options,
        batches=lambda start, reader, readers: Drawings(options, reader, readers).batches(start),
        sample=lambda path: sample_sheet(trainee, vae, path),
    )
    trainee.unet.set_attn_processor(AttnProcessor2_0())
    with export.exported(
        options,
        progress,
        evaluate(trainee, options),
        title=f"storybook-turbo: Stable Diffusion in {options.student_steps} steps",
        what=__doc__,
        data=f"drawings of {options.teacher.name}, captions of seed {options.seed}",
        grown_from=options.teacher,
    ) as folder:
        student_pipeline(trainee, vae).to(torch.float16).save_pretrained(folder)
        export.read_in_single_precision(folder / "text_encoder")
        # The first stage as it was shipped, with its own card.
        shutil.rmtree(folder / "vae")
        shutil.copytree(options.teacher / "vae", folder / "vae")


if __name__ == "__main__":
    command(main)
