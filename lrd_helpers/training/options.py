"""The options of the trainings: a dataclass each, of which transformers makes a command line."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import Field, asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from safetensors import SafetensorError
from transformers.hf_argparser import HfArg, HfArgumentParser

from lrd_helpers.files import check_folder
from lrd_helpers.storybook.scenes import MOST_STICKERS, STICKER_COUNT_SHARES
from lrd_helpers.training.progress import earlier_runs, read_log

ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class TrainingOptions:
    """The options of every training. A subclass adds some, and may give others a new default.

    A run is resumed with the options it began with. Only those of `schedule` may change on the way
    (the card tells), and those of `free`, which are no matter of the weights.
    """

    schedule: ClassVar[tuple[str, ...]] = ("steps", "minutes", "learning_rate")
    free: ClassVar[tuple[str, ...]] = (
        "run",
        "output",
        "fresh",
        "log_every",
        "checkpoint_every",
        "sample_every",
    )

    steps: int | None = HfArg(
        default=None,
        help="stop after N optimiser steps, whatever --minutes says; such a run is exactly "
        "repeatable, resumed or not",
        metadata={"metavar": "N"},
    )
    minutes: float = HfArg(
        default=60.0, help="stop after this many minutes of training, resumes included"
    )
    batch_size: int = HfArg(default=32, help="scenes per step and process")
    learning_rate: float = HfArg(
        default=1e-3, help="at its peak: after a warm-up, before the decay"
    )
    warmup: int = HfArg(default=100, help="steps of linear warm-up")
    decay: float = HfArg(default=0.5, help="share of the budget over which the rate falls to 0")
    weight_decay: float = HfArg(default=0.01, help="of AdamW")
    ema_decay: float = HfArg(default=0.999, help="of the averaged weights that are exported")
    seed: int = HfArg(default=0, help="of scenes, captions and noise")
    mixed_precision: Literal["no", "bf16", "fp16"] = HfArg(
        default="bf16",
        help="bf16 helps on GPUs and on CPUs with AVX512-BF16 or AMX; elsewhere say no",
    )
    run: Path = HfArg(default=Path("runs"), help="folder of checkpoints, log, samples")
    output: Path = HfArg(default=Path("runs/model"), help="folder the finished model is written to")
    start_from: Path | None = HfArg(
        default=None,
        aliases="--from",
        help="start from the weights of a finished model instead of from nothing",
        metadata={"metavar": "FOLDER"},
    )
    fresh: bool = HfArg(default=False, help="begin anew; the run's checkpoints are removed")
    log_every: int = HfArg(
        default=50, help="steps from row to row of log.csv", metadata={"metavar": "STEPS"}
    )
    checkpoint_every: int = HfArg(
        default=1000, help="steps from checkpoint to checkpoint", metadata={"metavar": "STEPS"}
    )
    sample_every: int = HfArg(
        default=2000, help="steps from sheet to sheet; 0 for none", metadata={"metavar": "STEPS"}
    )

    def __init_subclass__(cls) -> None:
        """A field that only gets a new default keeps its help."""
        for name, before in cls.__dataclass_fields__.items():
            default = cls.__dict__.get(name)
            if name in cls.__dict__ and not isinstance(default, Field):
                setattr(cls, name, field(default=default, metadata=before.metadata))

    def check(self) -> None:
        """Whether a training can work with these options.

        Raises:
            ValueError: it cannot; names the option.
        """
        if not 0 < (self.minutes if self.steps is None else self.steps) < math.inf:
            raise ValueError("the budget, --steps or --minutes, must be more than 0")
        for name in ("batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: it must be 1 or more")
        for option, folder in (("--run", self.run), ("--output", self.output)):
            try:
                check_folder(folder)
            except NotADirectoryError as error:
                raise ValueError(f"{option} {error.strerror}") from None
        if self.start_from is not None:
            if not self.start_from.is_dir():
                raise ValueError(f"--from {self.start_from}: no such folder")
            # The card will need them: better now than after all steps.
            earlier_runs(self.start_from)
            read_log(self.start_from / "log.csv")

    def as_json(self) -> dict[str, Any]:
        """The options as JSON has them; shipped folders wherever the package lies."""

        def text(path: Path) -> str:
            shipped = path.is_relative_to(ASSETS)
            return f"assets/{path.relative_to(ASSETS)}" if shipped else str(path)

        return json.loads(json.dumps(asdict(self), default=text))

    def check_resumed(self, begun: dict[str, Any]) -> None:
        """Whether these options can go on with a run that was begun with others (as JSON).

        Raises:
            ValueError: they cannot; names the option and both values.
        """
        for name, value in self.as_json().items():
            may_change = name in self.schedule + self.free
            if not may_change and begun.get(name, value) != value:
                option = "--from" if name == "start_from" else f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{self.run} was begun with {option} {str(begun[name])[:60]}, not "
                    f"{str(value)[:60]}: keep it to go on, name another --run, or begin anew "
                    "with --fresh"
                )

    def changed_since(self, begun: dict[str, Any]) -> dict[str, Any]:
        """What the options of `schedule` were, where they differ."""
        now = self.as_json()
        return {
            name: begun[name]
            for name in self.schedule
            if name in begun and begun[name] != now[name]
        }


@dataclass(frozen=True)
class SceneOptions(TrainingOptions):
    """For trainings that choose how many stickers their scenes have."""

    sticker_shares: list[float] = HfArg(
        default_factory=lambda: list(STICKER_COUNT_SHARES),
        help="how many of the scenes have 0, 1, 2, 3 and 4 stickers; only their ratio counts",
        metadata={"metavar": "SHARE"},
    )

    def check(self) -> None:
        super().check()
        shares = self.sticker_shares
        if len(shares) != MOST_STICKERS + 1:
            raise ValueError(f"--sticker-shares: {len(shares)} of them, but 5 are expected")
        if not all(0 <= share < math.inf for share in shares) or not sum(shares):
            raise ValueError("--sticker-shares: none can be negative, and one must be more than 0")


@dataclass(frozen=True)
class CacheOptions(TrainingOptions):
    """For trainings on latents that are encoded once and kept."""

    cache: int = HfArg(default=32_000, help="scenes encoded once and kept")


def check_trained(option: str, folder: Path, what: str, training: str, file: str) -> None:
    """Whether a model that a training needs is there.

    Raises:
        ValueError: it is not; says which training makes it.
    """
    if not (folder / file).exists():
        raise ValueError(
            f"{option} {folder}: no {what} there; train it first: "
            f"python -m lrd_helpers.training.{training}"
        )


Options = TypeVar("Options", bound=TrainingOptions)


def parse(kind: type[Options], name: str, description: str, arguments: list[str] | None) -> Options:
    """The options of training `name`; what cannot work is refused in one sentence (exit code 2)."""
    parser = HfArgumentParser(
        kind, prog=f"python -m lrd_helpers.training.{name}", description=description
    )
    for action in parser._actions:  # help shows a single spelling: --batch-size, --from
        action.option_strings = action.option_strings[-1:]
    options, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"there is no option {unknown[0]}; --help lists them")
    try:
        options.check()
    except ValueError as error:
        parser.error(str(error))
    return options


def command(main: Callable[[], None]) -> None:
    """Runs a training as a command: what a user can mend is one sentence, exit code 2."""
    try:
        main()
    except (OSError, ValueError, ImportError, FloatingPointError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
