"""A finished model's folder: written whole or not at all, with a card that says how it was made."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path

from safetensors import SafetensorError

from lrd_helpers.files import write_atomically
from lrd_helpers.machine import describe_machine
from lrd_helpers.training.options import TrainingOptions
from lrd_helpers.training.progress import Progress, csv_of, earlier_runs, joined_logs


@contextmanager
def exported(
    options: TrainingOptions,
    progress: Progress,
    scores: dict[str, object],
    *,
    title: str,
    what: str,
    data: str | None = None,
    grown_from: Path | None = None,
) -> Iterator[Path]:
    """Yields an empty folder for the model's files, gives it a card, and puts it in `output`.

    Args:
        title, what: the card's heading, and what was trained and how.
        data: what the model was trained on, if not on storybook scenes.
        grown_from: the model whose weights it began with, where `start_from` is none.
    """
    with replacing_folder(options.output) as folder:
        yield folder
        start = options.start_from or grown_from
        model_card(
            folder, options, progress, scores, title=title, what=what, data=data, start=start
        )
    print(scores)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty sibling folder; on success it takes `folder`'s place, on failure it vanishes.

    Raises:
        OSError: as met while writing (a full disk, say), naming `folder`, which is then as it was.
    """
    folder = Path(os.path.realpath(folder))  # a link stays
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
    """Takes out of all configurations where a part was loaded from: elsewhere it means nothing."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def model_card(
    folder: Path,
    options: TrainingOptions,
    progress: Progress,
    scores: dict[str, object],
    *,
    title: str,
    what: str,
    data: str | None = None,
    start: Path | None = None,
) -> None:
    """Writes README.md (for people), training.json and a thinned log.csv (for notebooks)."""
    forget_folders(folder)
    # Folders are no matter of the model.
    used = {
        name: value
        for name, value in asdict(options).items()
        if name not in ("fresh", "data") and not isinstance(value, Path)
    }
    if options.steps is not None:
        used["minutes"] = None
    data = data or f"storybook scenes, rendered as needed from seed {options.seed}"
    before = earlier_runs(options.start_from)
    lines = [
        "---",
        "license: mit",
        "library_name: diffusers",
        "---",
        f"# {title}",
        "",
        what.strip(),
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
        f"| started from | {start.name if start else 'random weights'} |",
        f"| machine | {describe_machine()} |",
        f"| date | {date.today()} |",
        f"| options | `{json.dumps(used)}` |",
        *(
            f"| until step {changed['until_step']:,} | `{json.dumps(changed)}` |"
            for changed in progress.earlier_options
        ),
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
        (folder / "log.csv").write_bytes(csv_of(rows[:: math.ceil(len(rows) / 400)]))


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
