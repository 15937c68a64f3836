"""The loop all trainings share: budget, learning rate, EMA, log, checkpoints, exact resume, export.

A training is a module whose `forward(batch, generator)` returns a dictionary of losses; "loss" is
minimised, the others are logged. Batch number n and the random numbers of step n depend on
(seed, n) alone, so a training that is cut and taken up again walks the same path.
"""

import argparse
import csv
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from lrd_helpers.files import write_atomically
from lrd_helpers.machine import describe_machine
from lrd_helpers.storybook import StorybookDataset, seeded
from lrd_helpers.storybook.scenes import MOST_STICKERS, STICKER_COUNT_SHARES

ASSETS = Path(__file__).parents[1] / "assets"
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


def parser(name: str, description: str, **defaults: object) -> argparse.ArgumentParser:
    """The options every training has; `defaults` are this training's own."""
    result = argparse.ArgumentParser(
        f"python -m lrd_helpers.training.{name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add(
        "--steps",
        type=int,
        metavar="N",
        help="stop after N optimiser steps, whatever "
        "--minutes says; such a run is exactly repeatable, resumed or not",
    )
    add("--minutes", type=float, help="stop after this many minutes of training, resumes included")
    add("--batch-size", type=int, help="scenes a step and process")
    add("--learning-rate", type=float, help="at its peak: after a warm-up, before the decay")
    add("--warmup", type=int, help="steps of linear warm-up", default=100)
    add(
        "--decay",
        type=float,
        default=0.5,
        help="share of the budget over which the rate falls to 0",
    )
    add("--weight-decay", type=float, default=0.01)
    add("--ema-decay", type=float, default=0.999, help="of the averaged weights that are exported")
    add("--seed", type=int, default=0)
    add(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        default="bf16",
        help="bf16 helps on GPUs and on CPUs with AVX512-BF16 or AMX; elsewhere say no",
    )
    add("--run", type=Path, default=Path("runs") / name, help="folder of checkpoints, log, samples")
    add("--output", type=Path, help="folder the finished model is written to")
    add(
        "--from",
        dest="start_from",
        type=Path,
        metavar="FOLDER",
        help="start from the weights of a finished model instead of from nothing",
    )
    add("--fresh", action="store_true", help="begin anew; the run's checkpoints are removed")
    add("--log-every", type=int, default=50, metavar="STEPS")
    add("--checkpoint-every", type=int, default=1000, metavar="STEPS")
    add("--sample-every", type=int, default=2000, metavar="STEPS", help="0 for no sample sheets")
    result.set_defaults(**defaults)
    return result


def add_sticker_shares(options: argparse.ArgumentParser) -> None:
    """The option --sticker-shares, for trainings on storybook scenes; `parse` checks it."""
    options.add_argument(
        "--sticker-shares",
        type=float,
        nargs=MOST_STICKERS + 1,
        default=list(STICKER_COUNT_SHARES),
        metavar="SHARE",
        help="how many of the scenes have 0, 1, 2, 3 and 4 stickers (only their ratio counts); "
        "default: as the world has them",
    )


def parse(options: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parses, and refuses with one sentence (exit code 2) what no training can do."""
    parsed = options.parse_args(arguments)
    if parsed.steps is not None:
        parsed.minutes = None
    if (parsed.minutes if parsed.steps is None else parsed.steps) <= 0:
        options.error("the budget, --steps or --minutes, must be more than 0")
    if parsed.start_from is not None and not parsed.start_from.is_dir():
        options.error(f"--from {parsed.start_from}: no such folder")
    shares = getattr(parsed, "sticker_shares", STICKER_COUNT_SHARES)
    if not all(0 <= share < math.inf for share in shares) or not sum(shares):
        options.error("--sticker-shares: none can be negative, and one must be more than 0")
    return parsed


def command(main: Callable[[], None]) -> None:
    """Runs a training as a command: what a user can mend is one sentence, exit code 2."""
    try:
        main()
    except (OSError, ValueError, ImportError, FloatingPointError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def learning_rate_factor(step: int, done: float, warmup: int, decay: float) -> float:
    """Trapezoid: linear warm-up, constant, then linear to 0 over the last `decay` of the budget."""
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, 1 - done) / max(decay, 1e-9))


def train(
    trainee: nn.Module,
    options: argparse.Namespace,
    *,
    batches: Callable[[int, int, int], Iterable] | None = None,
    sample: Callable[[Path], None] | None = None,
) -> Progress:
    """Trains `trainee` within the budget and leaves the averaged (EMA) weights in it.

    Of several processes only the first returns; the others end here.

    Args:
        trainee: `forward(batch, generator) -> {"loss": …}`, losses as means over the batch.
        options: from `parse`.
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
        # Processes must agree on when to stop, so the first one's clock counts.
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
                    # Not done(): that asks all processes, and only the first one is here.
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
    found = [path for path in run.glob("checkpoint-*") if path.suffix != ".partial"]
    return max(found, default=None)


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
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch reports a full disk its own way
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


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty sibling folder; on success it takes `folder`'s place, on failure it vanishes.

    Raises:
        OSError: as met while writing (a full disk, say), naming `folder`, which is then as it was.
    """
    partial, previous = (
        folder.with_name(f".{folder.name}.{word}") for word in ("partial", "previous")
    )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"could not write {folder}: {error}; it was left as it was") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    os.replace(partial, folder)
    shutil.rmtree(previous, ignore_errors=True)


def read_in_single_precision(folder: Path) -> None:
    """Lets `from_pretrained` make a float32 model of half-precision weights, as diffusers does.

    transformers would keep the precision of the file, and half precision is slow on CPUs.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    for part in ("text_config", "vision_config"):
        if part in config:
            config[part]["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def forget_folders(folder: Path) -> None:
    """Takes out of all configurations where a part was loaded from: that is one machine's own."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def earlier_runs(start_from: Path | None) -> list[dict[str, int | float]]:
    """The runs that made the weights a training starts from, the latest first."""
    if start_from is None or not (start_from / "training.json").exists():
        return []
    record = json.loads((start_from / "training.json").read_text(encoding="utf-8"))
    return [{name: record[name] for name in asdict(Progress())}, *record.get("before", [])]


def own_data(options: argparse.Namespace) -> str:
    """What a model was trained on, if nothing else is said."""
    return f"storybook scenes, rendered as needed from seed {options.seed}"


def model_card(
    folder: Path,
    *,
    title: str,
    what: str,
    options: argparse.Namespace,
    progress: Progress,
    scores: dict[str, object],
    data: str | None = None,
) -> None:
    """Writes README.md (for people), training.json and a thinned log.csv (for notebooks).

    `data` says what the model was trained on, if not on storybook scenes.
    """
    forget_folders(folder)
    # Folders are this machine's own affair.
    used = {
        name: value
        for name, value in vars(options).items()
        if name not in ("fresh", "data") and not isinstance(value, Path)
    }
    data = data or own_data(options)
    before = earlier_runs(options.start_from)
    lines = [
        "---",
        "license: mit",
        "library_name: diffusers",
        "---",
        f"# {title}",
        "",
        what,
        "",
        "| training | |",
        "|---|---|",
        f"| data | {data} |",
        f"| optimiser steps | {progress.step:,} |",
        f"| samples seen | {progress.samples:,} |",
        *(
            f"| before that | {run['samples']:,} samples in {run['seconds'] / 60:.1f} minutes |"
            for run in before
        ),
        f"| time in steps | {progress.seconds / 60:.1f} minutes |",
        f"| started from | {options.start_from.name if options.start_from else 'random weights'} |",
        f"| machine | {describe_machine()} |",
        f"| date | {date.today()} |",
        f"| options | `{json.dumps(used)}` |",
        "",
        "| held-out score | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in scores.items()),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {**asdict(progress), "before": before, "scores": scores, "options": used}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = joined_logs(options.start_from, options.run, before)
    if rows:
        with (folder / "log.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows[:: math.ceil(len(rows) / 400)])


def joined_logs(
    start_from: Path | None, run: Path, before: list[dict[str, int | float]]
) -> list[dict[str, str]]:
    """The rows of a run's log, after those of the runs it started from; counts go on."""
    logs = [folder / "log.csv" for folder in (start_from, run) if folder is not None]
    parts = [list(csv.DictReader(log.open(newline=""))) if log.exists() else [] for log in logs]
    rows = parts.pop()
    for row in rows:
        for name in ("step", "samples"):
            row[name] = str(int(row[name]) + sum(earlier[name] for earlier in before))
        row["seconds"] = f"{float(row['seconds']) + sum(one['seconds'] for one in before):.1f}"
    earlier = parts.pop() if parts else []
    if not earlier or not rows:
        return rows
    # Another version of the training, or other options, may have logged other losses.
    shared = [name for name in earlier[0] if name in rows[0]]
    return [{name: row[name] for name in shared} for row in earlier + rows]


def add_scores(folder: Path, scores: dict[str, object]) -> None:
    """Puts scores that were measured after the training into a model's card and training.json."""
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    for name, value in scores.items():
        record["scores"][name] = value
        card = [line for line in card if not line.startswith(f"| {name} | ")]
        card.append(f"| {name} | {value} |")
    write_atomically(folder / "README.md", ("\n".join(card) + "\n").encode())
    write_atomically(folder / "training.json", (json.dumps(record, indent=1) + "\n").encode())
