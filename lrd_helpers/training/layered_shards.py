"""Shards of pictures into shards of layers, and those into stacks to learn from.

A shard of layers is a webdataset shard like the pictures' (`training.shards`), with the names that
the pictures had. Each name has four files:

NAME.png   the picture
NAME.txt   its caption
NAME.ora   the stack of layers (OpenRaster: Krita, GIMP and `layerdiff.export` open it)
NAME.json  what the gates said, each with its number

So it is also a shard of pictures and captions. Beside SHARD.tar lies SHARD.json: how many pictures
were kept, or left out for each reason, and what the gates said of those that were left out.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from lrd_helpers.files import (
    check_folder,
    checked_file,
    locked,
    naming,
    replacing,
    write_atomically,
)
from lrd_helpers.layerdiff.construction import (
    MOST_THINGS,
    Gate,
    Stage,
    Work,
    take_apart,
    timed,
)
from lrd_helpers.layerdiff.export import ora_of, stack_of_ora
from lrd_helpers.layerdiff.stack import LayerStack
from lrd_helpers.messages import excerpt, sentence
from lrd_helpers.pictures import pixels_of, png_of
from lrd_helpers.storybook import Rendering
from lrd_helpers.training.shards import (
    LARGEST_FILE,
    PICTURES,
    TEXTS,
    Pair,
    ShardPairs,
    name_and_kind,
    shard_list,
)

KEPT = "kept"
NOTHING = "without a layer"  # which gates of one's own may pass
USED = "used"
BUSY = "shards at which another process is"
SETTINGS = "settings.json"


class ConstructionError(ValueError):
    """A construction that cannot begin: one sentence with file, option or folder."""

    def __init__(self, text: str) -> None:
        super().__init__(sentence(text))


class Busy(Exception):
    """Another process is at a shard."""


class Unread(Exception):
    """A shard that could not be read: nothing is written, and the next run tries it again."""


class Construction:
    """Takes the pictures of shards apart, and writes shards of layers.

    What was written is whole: a shard that is there is skipped. Until then what is done of it lies
    in .SHARD.tar.partial, so a run that was killed goes on with the next picture. Several processes
    may do the same at the same time: each shard is made by one of them. Picture files are taken,
    too: each becomes NAME.ora, to look at.

    Args:
        sources: shards as `shard_list` takes them, and picture files.
        output: folder; it is made.
        stages: such as `storybook_stages` gives.
        settings: what the result depends on. A folder with other ones is refused, lest two kinds of
            layers get mixed.
        size: of the pictures, in pixels: what the stages' models draw.
        gates: what to keep.
        captioned: pictures without a caption are left out; otherwise the stages caption all of
            them, whatever stands beside them.

    Attributes:
        counts: how many pictures were kept, or left out for each reason.
        seconds: what each stage took of this run, in all.
        done: how many pictures this run has taken apart.

    Raises:
        ConstructionError: two sources of one name, a folder with other settings, or one that
            holds other things.
        FileNotFoundError, ValueError, ImportError: as `shard_list`.
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        output: Path,
        stages: Sequence[Stage],
        *,
        settings: Mapping[str, Any],
        size: int,
        gates: Mapping[str, Gate],
        captioned: bool = True,
    ) -> None:
        self.targets = targets_of(shard_list(sources), output)
        self.counts, self.seconds, self.done = Counter[str](), Counter[str](), 0
        self.output, self.size, self.gates, self.captioned = output, size, gates, captioned
        self.stages = timed(stages, self.seconds)
        limits = {name: f"{gate.least:g} to {gate.most:g}" for name, gate in gates.items()}
        settings = {**settings, "size": size, "captioned": captioned, "gates": limits}
        check_folder(output)
        # Hidden files may be those of another process, which begins at the same time.
        if output.exists() and any(not file.name.startswith(".") for file in output.iterdir()):
            check_settings(output, settings)
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / SETTINGS, _json(settings))

    def run(self) -> None:
        """Take apart what is not there yet; a bar counts the pictures."""
        with tqdm(unit="picture", disable=None) as bar:
            for number, (target, source) in enumerate(self.targets.items(), start=1):
                bar.set_description(f"{target.name} ({number} of {len(self.targets)})")
                if not is_done(target):
                    self._make(target, source, bar)
                if is_done(target):
                    self.counts.update(_counts_of(target))
                bar.set_postfix(kept=self.counts[KEPT])

    def _make(self, target: Path, source: str | Path, bar: tqdm) -> None:
        """The layers of a source, then the report; a shard at which another process is, is left."""
        pairs = ShardPairs(source, self.size, held_out=None, captioned=self.captioned)
        folder = target.with_name(f".{target.name}.partial")
        folder.mkdir(exist_ok=True)
        try:
            with locked(folder, Busy()):
                if not is_done(target):  # by another process, a moment ago
                    self._write(target, pairs, folder / "done.tar", bar)
                shutil.rmtree(folder, ignore_errors=True)
        except Busy:
            self.counts[BUSY] += 1
        except Unread:
            self.counts += _faults(pairs)

    def _write(self, target: Path, pairs: ShardPairs, partial: Path, bar: tqdm) -> None:
        """Take each picture apart, if an earlier run has not; then write target and report."""
        records = records_in(partial)
        for name, (picture, caption) in _pairs_of(pairs, target):
            if name not in records:
                work = take_apart(picture, caption, self.stages, gates=self.gates)
                records[name] = record_of(work)
                self.done += 1
                with naming(target), partial.open("ab") as file:
                    file.write(files_of(name, work))
            bar.update()
        if is_unread(pairs):
            raise Unread
        kept = {name for name, record in records.items() if record["kept"]}
        if target.suffix == ".tar":
            with replacing(target) as temporary:
                copy_of(partial, temporary, kept)
        elif kept:
            with tarfile.open(partial) as tar:
                write_atomically(target, tar.extractfile(f"{target.stem}.ora").read())
        counts = Counter(_reason(record) for record in records.values()) + _faults(pairs)
        left_out = {name: record for name, record in records.items() if name not in kept}
        report = {"counts": counts, "left_out": left_out}
        write_atomically(target.with_suffix(".json"), _json(report))

    def summary(self) -> str:
        """How many pictures were kept and left out, in one line."""
        counts = sorted(self.counts.items(), key=lambda each: (-each[1], each[0]))
        left_out = [f"{number:,} {reason}" for reason, number in counts if reason != KEPT]
        return ", ".join([f"{self.counts[KEPT]:,} {KEPT}", *left_out])

    def rates(self) -> str:
        """What a picture took in this run, and which stages most of it; "" where none was done."""
        total = sum(self.seconds.values())
        if not self.done or not total:
            return ""
        parts = [f"{name} {spent / total:.0%}" for name, spent in self.seconds.most_common(4)]
        return f"{total / self.done:.2g} s a picture: {', '.join(parts)}"


def targets_of(sources: Sequence[str | Path], output: Path) -> dict[Path, str | Path]:
    """The file that each source becomes.

    Raises:
        ConstructionError: two sources would become one file.
    """
    targets: dict[Path, str | Path] = {}
    for source in sources:
        # Of an address or a command the last name in it.
        name = re.split(r"[/\\\s=]", str(source).split("?")[0].rstrip("/- "))[-1]
        stem, _, kind = name.rpartition(".")
        suffix = ".ora" if isinstance(source, Path) and kind.lower() in PICTURES else ".tar"
        target = output / f"{stem or name}{suffix}"
        if target in targets:
            raise ConstructionError(
                f"{targets[target]} and {source} would both become {target}; rename one"
            )
        targets[target] = source
    return targets


def is_done(target: Path) -> bool:
    """Whether a target was written, and its report, which comes last; a picture may be left out."""
    return target.with_suffix(".json").exists() and (target.suffix == ".ora" or target.exists())


def is_unread(pairs: ShardPairs) -> bool:
    """Whether a shard that could not be read to its end may come whole another time.

    A file that is cut off stays so: what could be read of it is taken.
    """
    cut = any(reason.startswith("shards ") for reason in pairs.counts)
    [shard] = pairs.shards
    return cut and not (isinstance(shard, Path) and pairs.counts[USED])


def _faults(pairs: ShardPairs) -> Counter[str]:
    return Counter({why: number for why, number in pairs.counts.items() if why != USED})


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder of other things, or of layers that were made in another way.

    Raises:
        ConstructionError: says what differs.
    """
    try:
        earlier = json.loads(checked_file(folder / SETTINGS, 2**20))
    except (OSError, ValueError):
        earlier = None
    if not isinstance(earlier, dict):
        raise ConstructionError(
            f"{folder} holds other things than layers that were made here, for {SETTINGS} is "
            "missing or damaged; give another folder (--output)"
        )
    for name in [*settings, *earlier]:
        if earlier.get(name) != settings.get(name):
            raise ConstructionError(
                f"{folder} has layers made with {name} {excerpt(earlier.get(name))}, not "
                f"{excerpt(settings.get(name))}; give another folder (--output)"
            )


def _pairs_of(pairs: ShardPairs, target: Path) -> Iterable[tuple[str, Pair]]:
    """Name, picture and caption of each pair of a shard, or of a picture file."""
    if target.suffix == ".tar":
        return pairs.in_order()
    [picture] = pairs.shards
    beside = {kind: picture.with_suffix(f".{kind}") for kind in (*TEXTS, "json")}
    files = {picture.suffix[1:].lower(): picture}
    files |= {kind: file for kind, file in beside.items() if file.is_file()}
    kinds = {kind: checked_file(file, LARGEST_FILE) for kind, file in files.items()}
    return ((picture.stem, pair) for pair in pairs.of_files(kinds))


def records_in(partial: Path) -> dict[str, dict[str, Any]]:
    """What is done of a shard, by name. What comes after the last whole picture is cut off."""
    records, end = {}, 0
    partial.touch()
    # Its last file is cut off where the process was killed.
    with suppress(tarfile.ReadError), tarfile.open(partial, "r:") as tar:
        for member in tar:
            name, kind = name_and_kind(member.name)
            if kind == "json":  # comes last
                records[name] = json.loads(tar.extractfile(member).read())
                end = tar.offset
    os.truncate(partial, end)
    return records


def files_of(name: str, work: Work) -> bytes:
    """The four files of a picture that is kept, or the .json of another one: a part of a tar."""
    files = {"json": _json(record_of(work))}
    if work.kept:
        picture = {"png": png_of(work.original), "txt": work.caption.encode()}
        files = {**picture, "ora": ora_of(work.stack), **files}
    part = io.BytesIO()
    with tarfile.open(fileobj=part, mode="w") as tar:
        for kind, content in files.items():
            member = tarfile.TarInfo(f"{name}.{kind}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        return part.getvalue()  # without the end mark, for more will come


def copy_of(partial: Path, target: Path, kept: Set[str]) -> None:
    """The shard of the pictures that are kept; the same works give the same bytes."""
    with tarfile.open(target, "w") as shard:
        if kept:
            with tarfile.open(partial, "r:") as tar:
                for member in tar:
                    if name_and_kind(member.name)[0] in kept:
                        shard.addfile(member, tar.extractfile(member))


def record_of(work: Work) -> dict[str, Any]:
    """What the gates said of a picture, for its .json."""
    return {
        "caption": work.caption,
        "place": work.place,
        "layers": [layer.prompt for layer in reversed(work.layers)],
        "kept": work.kept,
        "fault": work.fault,
        "verdicts": [asdict(verdict) for verdict in work.verdicts],
    }


def _reason(record: Mapping[str, Any]) -> str:
    """Why it is left out, as it is counted; or `KEPT`."""
    return record["fault"] or (KEPT if record["kept"] else NOTHING)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def _counts_of(target: Path) -> dict[str, int]:
    """What was counted while a target was written; nothing where that file is lost."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(checked_file(target.with_suffix(".json"), 2**30))["counts"]
    return {}


# ------------------------------------------------------------------ stacks to learn from


class StackShards(ShardPairs):
    """The stacks in shards of layers, counted as `ShardPairs` counts pictures."""

    kinds = ("ora",)

    def _judged(self, files: Any) -> bytes | str:
        return files.fault or files.first(self.kinds) or files.lack("stack of layers (.ora)")

    def _made(self, item: bytes) -> LayerStack | str:
        """The stack, or why it is left out."""
        try:
            stack = stack_of_ora(item)
        except Exception:  # damaged files raise whatever their decoder comes upon
            return "with a broken stack"
        if stack.size != (self.size, self.size):
            return f"of another size than {self.size} × {self.size}"
        if len(stack.layers) > MOST_THINGS:
            return f"with more than {MOST_THINGS} layers"
        return stack


def rendering_of(stacks: Sequence[LayerStack]) -> Rendering:
    """Stacks of one size as the storybook has its scenes, but for the scenes themselves."""
    size = stacks[0].size
    layers = torch.zeros(len(stacks), MOST_THINGS, 4, size[1], size[0])
    for row, stack in enumerate(stacks):
        for number, layer in enumerate(stack.layers):
            image = layer.shown()
            alpha = layer.opacity * pixels_of(image.getchannel("A"))[:1]
            layers[row, number] = torch.cat([alpha * pixels_of(image.convert("RGB")), alpha])
    pictures = [stack.composite or stack.flatten() for stack in stacks]
    return Rendering(
        torch.stack([pixels_of(picture) for picture in pictures]),
        torch.stack([pixels_of(stack.background) for stack in stacks]),
        layers,
        (),
    )
