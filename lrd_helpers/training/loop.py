"""The loop all trainings share: budget, learning rate, EMA, log, checkpoints, exact resume.

A training is a module whose `forward(batch, generator)` returns a dictionary of losses; "loss" is
minimised, the others are logged. Batch number n and the random numbers of step n depend on
(seed, n) alone, so a training that is cut and taken up again walks the same path.
"""

import csv
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from lrd_helpers.storybook import StorybookDataset, seeded
from lrd_helpers.training.options import TrainingOptions

HELD_OUT_SEED = 1_000_000  # trainings use small seeds: a held-out scene was never trained on


@dataclass
class Progress:
    """How far a training has come; `seconds` counts time spent in steps, over all resumes."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, int | float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def learning_rate_factor(step: int, done: float, warmup: int, decay: float) -> float:
    """Trapezoid: linear warm-up, constant, then linear to 0 over the last `decay` of the budget."""
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, 1 - done) / max(decay, 1e-9))


def train(
    trainee: nn.Module,
    options: TrainingOptions,
    *,
    batches: Callable[[int, int, int], Iterable] | None = None,
    sample: Callable[[Path], None] | None = None,
) -> Progress:
    """Trains `trainee` within the budget and leaves the averaged (EMA) weights in it.

    Of several processes only the first returns; the others end here.

    Args:
        trainee: `forward(batch, generator) -> {"loss": …}`, losses as means over the batch.
        options: budget, rates, folders.
        batches: (start, process, processes) → batches; by default rendered storybook scenes.
        sample: draws pictures with the averaged weights into the file it is given.
    """
    # bf16 needs no loss scaling, so one code path serves CPU and GPU.
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, cpu=not torch.cuda.is_available()
    )
    optimizer = torch.optim.AdamW(
        trainee.parameters(),
        options.learning_rate,
        weight_decay=options.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    average = EMAModel(trainee.parameters(), decay=options.ema_decay, foreach=True)
    model, optimizer = accelerator.prepare(trainee, optimizer)
    average.to(accelerator.device)
    progress = Progress()
    accelerator.register_for_checkpointing(progress, average)

    if options.fresh and accelerator.is_main_process:
        for older in options.run.glob("checkpoint-*"):
            shutil.rmtree(older)
    accelerator.wait_for_everyone()
    latest = latest_checkpoint(options.run)
    if latest is not None:
        try:
            accelerator.load_state(str(latest))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{latest} does not fit this model ({str(error).splitlines()[0]}); "
                "--fresh begins anew, --run names another folder"
            ) from error
        accelerator.print(f"resumed {latest} at step {progress.step}")
    log = Log(options.run / "log.csv", progress.step) if accelerator.is_main_process else None
    if batches is None:

        def batches(start: int, reader: int, readers: int) -> Iterable:
            return StorybookDataset(
                options.batch_size, seed=options.seed, start=start, reader=reader, readers=readers
            )

    stream = iter(batches(progress.step, accelerator.process_index, accelerator.num_processes))

    def done() -> float:
        if options.steps is not None:
            return progress.step / options.steps
        spent = progress.seconds / 60 / options.minutes
        if accelerator.num_processes == 1:
            return spent
        # Processes must agree on when to stop, so the first process's clock counts.
        return float(broadcast(torch.tensor(spent, device=accelerator.device)))

    bar = tqdm(
        total=100,
        initial=round(100 * min(1, done()), 2),
        unit="%",
        desc=options.run.name,
        disable=not accelerator.is_main_process,
        bar_format="{desc} {n:.1f}%|{bar}| {elapsed}<{remaining} {postfix}",
    )
    model.train()
    with stop_requests() as stopped:
        while (share := done()) < 1 and not stopped:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * learning_rate_factor(
                    progress.step, share, options.warmup, options.decay
                )
            generator = seeded(options.seed, 1, progress.step, accelerator.process_index)
            losses = model(next(stream), generator)
            if not torch.isfinite(losses["loss"]):
                raise FloatingPointError(
                    f"the loss is {losses['loss'].item()} at step {progress.step}; the last "
                    f"checkpoint in {options.run} is good: resume with a lower --learning-rate"
                )
            accelerator.backward(losses["loss"])
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(trainee.parameters())
            progress.step += 1
            progress.samples += options.batch_size * accelerator.num_processes
            progress.seconds += time.perf_counter() - began
            if log is not None:
                log.add(losses)
                if progress.step % options.log_every == 0:
                    means = log.write(progress, optimizer.param_groups[0]["lr"])
                    bar.set_postfix_str(f"step {progress.step}, loss {means['loss']:.4f}")
                    # Not done(): that asks all processes, and only the first is here.
                    bar.update(100 * share - bar.n)
            if progress.step % options.checkpoint_every == 0:
                save_checkpoint(accelerator, options.run, progress.step)
            if (
                sample
                and options.sample_every
                and progress.step % options.sample_every == 0
                and accelerator.is_main_process
            ):
                with averaged(trainee, average):
                    sample(options.run / f"samples-{progress.step:07d}.png")
    bar.close()
    save_checkpoint(accelerator, options.run, progress.step)
    if stopped:
        sys.exit(f"stopped at step {progress.step}; the same command goes on from there")
    if not accelerator.is_main_process:
        sys.exit()  # the first process judges the model and writes it
    average.copy_to(trainee.parameters())
    trainee.eval().cpu()
    return progress


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or a termination comes; a second Ctrl-C stops at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def averaged(trainee: nn.Module, average: EMAModel) -> Iterator[None]:
    """Inside, `trainee` has the averaged weights and is in eval mode; then all is as before."""
    average.store(trainee.parameters())
    average.copy_to(trainee.parameters())
    trainee.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        average.restore(trainee.parameters())
        trainee.train()


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint: a folder gets its name only when it is complete."""
    complete = [path for path in run.glob("checkpoint-*") if path.suffix != ".partial"]
    return max(complete, default=None)


def save_checkpoint(accelerator: Accelerator, run: Path, step: int) -> None:
    """Writes `checkpoint-STEP` beside the older one, then removes that: never a moment without."""
    final = run / f"checkpoint-{step:07d}"
    partial = final.with_suffix(".partial")
    if final.exists():
        return
    if accelerator.is_main_process:
        for leftover in run.glob("*.partial"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"could not write {final}: {error}; the checkpoint before it stands"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(partial, final)
        for older in run.glob("checkpoint-*"):
            if older != final:
                shutil.rmtree(older)


class Log:
    """log.csv: one row every so many steps, each the mean over the steps since the last row."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.sums, self.count = path, {}, 0
        rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
        rows = [row for row in rows if int(row["step"]) <= step]  # rows after the checkpoint go
        if rows:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.unlink(missing_ok=True)

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.count += 1

    def write(self, progress: Progress, learning_rate: float) -> dict[str, float]:
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        row = {
            "step": progress.step,
            "samples": progress.samples,
            "seconds": round(progress.seconds, 1),
            "learning_rate": f"{learning_rate:.3g}",
            **{name: f"{mean:.5g}" for name, mean in means.items()},
        }
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.sums, self.count = {}, 0
        return means
