"""The loop all trainings share: budget, learning rate, EMA, log, checkpoints, exact resume.

A training is a module whose `forward(batch, generator)` returns a dictionary of losses; "loss" is
minimised, the others are logged. Batch number n and the random numbers of step n depend on
(seed, n) alone, so a training that is cut and taken up again walks the same path.
"""

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from lrd_helpers.files import locked
from lrd_helpers.storybook import StorybookDataset, seeded
from lrd_helpers.training.checkpoint import State
from lrd_helpers.training.options import TrainingOptions
from lrd_helpers.training.progress import Log, Progress

HELD_OUT_SEED = 1_000_000  # trainings use small seeds: a held-out scene was never trained on


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

    Raises:
        ValueError: the run's folder has a checkpoint of other options or of another model, or
            another training is writing there.
        FloatingPointError: the loss is not finite.
        OSError: the log or a checkpoint could not be written.
    """
    # bf16 needs no loss scaling, so one code path serves CPU and GPU.
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, cpu=not torch.cuda.is_available()
    )
    if not accelerator.is_main_process:
        return _trained(accelerator, trainee, options, batches, sample)
    message = f"--run {options.run}: another training is writing there; name another folder"
    options.run.mkdir(parents=True, exist_ok=True)
    with locked(options.run, ValueError(message)):
        return _trained(accelerator, trainee, options, batches, sample)


def _trained(
    accelerator: Accelerator,
    trainee: nn.Module,
    options: TrainingOptions,
    batches: Callable[[int, int, int], Iterable] | None,
    sample: Callable[[Path], None] | None,
) -> Progress:
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
    state = State(options, trainee, optimizer, average, progress, accelerator.scaler)

    if options.fresh and accelerator.is_main_process:
        (options.run / "log.csv").unlink(missing_ok=True)
        for older in options.run.glob("checkpoint-*"):
            shutil.rmtree(older)
    accelerator.wait_for_everyone()
    if latest := state.resume():
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
            if progress.step % options.checkpoint_every == 0 and accelerator.is_main_process:
                state.save()
            if (
                sample
                and options.sample_every
                and progress.step % options.sample_every == 0
                and accelerator.is_main_process
            ):
                with averaged(trainee, average):
                    sample(options.run / f"samples-{progress.step:07d}.png")
    bar.close()
    if accelerator.is_main_process:
        state.save()
    accelerator.wait_for_everyone()
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
