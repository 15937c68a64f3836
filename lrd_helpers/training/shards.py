"""Pictures and captions from webdataset shards, as subsets of LAION-400M are distributed.

A shard is a tar file in which each pair is a few files with one name, side by side: 000000012.jpg,
000000012.txt with the caption, and often 000000012.json with facts to filter by. The name ends at
the last dot: 22.05.jpg belongs to 22.05.txt. A caption is read from .txt, else from .caption, else
it is "caption" in the .json; all of them are UTF-8. img2dataset makes shards from a list of
addresses, `tar --sort=name` makes them from a folder.

A web address will do as well as a file: the webdataset library opens it. So will a command,
"pipe:curl -s …". **It runs in a shell with all your rights: never take one from a stranger.** What
is there as a file, and what a pattern such as "*.tar" matches, is a file, whatever its name.
"""

from __future__ import annotations

import glob
import json
import operator
import os
import random
import re
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from lrd_helpers.pictures import picture_of, read_picture
from lrd_helpers.storybook import seeded

PICTURES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "caption")

HELD_OUT = 100
"""One pair in so many is never trained on; its name decides."""

SHUFFLED = 1000
"""Pairs held in memory (as files, not as pixels) to be drawn from in random order."""

SIDE_BY_SIDE = 8
"""Files of so many other pairs may stand between the files of one pair."""

LARGEST_FILE = 64 * 2**20
"""Bytes; larger files are not read."""

LONGEST_CAPTION = 10_000
"""Characters; text encoders read a few hundred of them."""

LACKING = "without a "
APART = "with files that stand apart (make the shard with tar --sort=name)"
TWICE = "with a name that comes twice"

COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}

Pair = tuple[Float[Tensor, "3 size size"], str]


def shard_list(patterns: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """The shards that patterns name: files as paths; addresses and commands as text.

    Args:
        patterns: "shards/{0000..0009}.tar", "shards/*.tar", an address, a command, or several.

    Raises:
        FileNotFoundError: a pattern matches nothing, or something that is no file.
        ValueError: webdataset opens no such addresses.
        ImportError: webdataset is not installed.
    """
    try:
        from braceexpand import braceexpand  # comes with webdataset
    except ImportError:
        raise ImportError("shards are read by webdataset: pip install webdataset") from None

    shards: list[str | Path] = []
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        if os.path.isfile(pattern):
            shards.append(Path(pattern))
            continue
        for name in braceexpand(str(pattern)):
            matches = _matches(name)
            if not matches:
                origin = "" if name == str(pattern) else f" (from {str(pattern)!r})"
                raise FileNotFoundError(f"no shard matches {name!r}{origin}")
            shards += matches
    if not shards:
        raise FileNotFoundError("no shards were named; give for example 'shards/{0000..0009}.tar'")
    return shards


def _matches(name: str) -> list[str | Path]:
    """The files that a pattern without braces matches, or the address or command that it is."""
    from webdataset.gopen import gopen_schemes

    scheme = re.match(r"([a-z0-9]{2,}):", name)
    if scheme is None:
        matches = [Path(match) for match in sorted(glob.glob(name))]
        for match in matches:
            if not match.is_file():
                raise FileNotFoundError(f"{str(match)!r} is no file; a shard is a tar file")
        return matches
    if scheme[1] not in (*gopen_schemes, "file"):
        raise ValueError(f"{name!r}: webdataset opens no {scheme[0]} addresses")
    return [name]  # it is tried when it is its turn


def name_and_kind(path: str) -> tuple[str, str]:
    """A file's path without its last ending, and this in small letters; "" for hidden files."""
    folder, slash, file = path.rpartition("/")
    stem, _, kind = file.rpartition(".")
    return folder + slash + stem, "" if file.startswith(".") or not stem else kind.lower()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, read: bool) -> bytes | None:
    """A file's content; nothing if it is not read, None if it is too large."""
    if not read:
        return b""
    return tar.extractfile(member).read() if member.size <= LARGEST_FILE else None


@contextmanager
def _opened(shard: str | Path) -> Iterator[BinaryIO]:
    if isinstance(shard, Path):
        with shard.open("rb") as file:
            yield file
        return
    from webdataset.gopen import gopen

    stream = gopen(shard)
    yield stream
    while stream.read(2**20):
        pass  # a command that is not read to its end would fail
    stream.close()


class Condition:
    """A condition on a pair's facts, such as "punsafe<0.3": those of its .json must fulfil it.

    Raises:
        ValueError: it is not NAME, then <, <=, > or >=, then NUMBER.
    """

    def __init__(self, text: str) -> None:
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*", text)
        try:
            self.name, self.compare = match[1], COMPARISONS[match[2]]
            self.number = float(match[3])
        except (TypeError, ValueError):
            raise ValueError(
                f"{text!r} is no condition; it should be like 'punsafe<0.3' or 'similarity>=0.28'"
            ) from None
        self.text = text

    def holds(self, facts: dict[str, Any]) -> bool:
        """Whether it does; a fact that is missing, or no number, does not fulfil it."""
        try:
            return self.compare(float(facts[self.name]), self.number)
        except (KeyError, TypeError, ValueError, OverflowError):
            return False


@dataclass
class Files:
    """The files of one name, by kind (what follows the last dot), and why they are left out."""

    kinds: dict[str, bytes | None] = field(default_factory=dict)
    fault: str = ""

    def first(self, kinds: Sequence[str]) -> bytes | None:
        return next((self.kinds[kind] for kind in kinds if kind in self.kinds), None)

    def lack(self, what: str) -> str:
        """That `what` is not there, and what is."""
        kinds = [f".{kind}" for kind in sorted(self.kinds) if re.fullmatch(r"\w{1,9}", kind)]
        return f"{LACKING}{what} (only {', '.join(kinds[:4]) or 'other files'})"


def facts_of(content: bytes) -> dict[str, Any] | None:
    """What a .json says; None if it cannot be read or is no object."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def caption_of(text: bytes | None, facts: dict[str, Any]) -> str | None:
    """The caption in a text file or, without it, among the facts of a .json; None if there is none.

    Raises:
        UnicodeError: it is not UTF-8.
    """
    caption = facts.get("caption") if text is None else text.decode("utf-8-sig")
    if not isinstance(caption, str):
        return None
    caption.encode()  # JSON can spell halves of characters
    if "\0" in caption:
        raise UnicodeError("UTF-16 that passes for UTF-8")
    return " ".join(caption.split())


class ShardPairs:
    """An endless stream of (picture, caption), the same for the same arguments.

    Pictures are cut to the largest square in their middle and brought to `size`. Each pass goes
    through the shards in another order. What cannot be used is left out and counted in `counts`,
    once, for the first reason that is met.

    Args:
        shards: paths, patterns, addresses or commands; see `shard_list`.
        size: of the pictures, in pixels.
        least_side: pictures with a shorter side are left out; `size` by default.
        most_aspect: so are those more than so many times longer than wide, or the other way.
        conditions: so are those whose facts do not fulfil all of these.
        held_out: only the pairs that are never trained on, instead of all but these; None: all.
        captioned: pairs without a caption are left out; otherwise no caption is read, it is "".
        seed: of the order.
        reader: this reader's number, of `readers` that share the shards without overlap.
        readers: how many there are.

    Attributes:
        counts: how many pairs were used, or left out, for each reason; and how many shards could
            not be read (to their end). A warning names each of these.

    Raises:
        FileNotFoundError: as `shard_list`.
        ValueError: fewer shards than readers; while reading, a whole pass without a single pair.
    """

    kinds: tuple[str, ...] = (*PICTURES, *TEXTS, "json")

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        size: int,
        *,
        least_side: int | None = None,
        most_aspect: float = 2.0,
        conditions: Sequence[Condition] = (),
        held_out: bool | None = False,
        captioned: bool = True,
        seed: int = 0,
        reader: int = 0,
        readers: int = 1,
    ) -> None:
        self.shards, self.size = shard_list(shards), size
        if len(self.shards) < readers:
            raise ValueError(f"{len(self.shards)} shards cannot be shared by {readers} processes")
        self.least_side = size if least_side is None else least_side
        self.most_aspect, self.conditions = most_aspect, tuple(conditions)
        self.held_out, self.captioned, self.seed = held_out, captioned, seed
        self.reader, self.readers = reader, readers
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Pair]:
        for number in count():
            before = self.counts["used"]
            yield from self.one_pass(number)
            if self.counts["used"] == before:
                raise ValueError(
                    f"no pair in {len(self.shards)} shards can be used: {self.summary(3)}"
                )
            if number == 0 and self.counts["used"] < self.counts.total() / 2:
                warnings.warn(f"most pairs are left out: {self.summary(3)}", stacklevel=2)

    def one_pass(self, number: int = 0) -> Iterator[Pair]:
        """Every pair of this reader's shards once, in the order of pass `number`."""
        from webdataset.filters import shuffle

        order = torch.randperm(len(self.shards), generator=seeded(self.seed, number)).tolist()
        mine = [self.shards[index] for index in order[self.reader :: self.readers]]
        shuffled = shuffle(SHUFFLED, initial=SHUFFLED, rng=random.Random(f"{self.seed} {number}"))
        for _, item in shuffled(item for shard in mine for item in self._items(shard)):
            yield from self._counted(item)

    def in_order(self) -> Iterator[tuple[str, Any]]:
        """Name and content of every pair of all shards once, as they lie there."""
        for shard in self.shards:
            for name, item in self._items(shard):
                for made in self._counted(item):
                    yield name, made

    def of_files(self, kinds: dict[str, bytes | None]) -> Iterator[Pair]:
        """The pair of files that lie in no shard, by kind; counted, and none if it is left out."""
        item = self._judged(Files(kinds))
        if isinstance(item, str):
            self.counts[item] += 1
        else:
            yield from self._counted(item)

    def _counted(self, item: Any) -> Iterator[Any]:
        made = self._made(item)
        self.counts[made if isinstance(made, str) else "used"] += 1
        if not isinstance(made, str):
            yield made

    def summary(self, most: int = 12) -> str:
        """How many pairs were used and left out, in one line, for the most frequent reasons."""
        counts = self.counts.most_common()
        parts = [f"{number:,} {reason}" for reason, number in counts[:most]]
        if rest := sum(number for _, number in counts[most:]):
            parts.append(f"{rest:,} for other reasons")
        return ", ".join(parts)

    def _items(self, shard: str | Path) -> Iterator[tuple[str, Any]]:
        """Names and files of a shard's pairs, in its order; counts what is left out.

        A pair is complete as soon as SIDE_BY_SIDE others were begun after it.
        """
        begun: dict[str, Files] = {}
        done: dict[str, Files] = {}

        def complete(name: str) -> Iterator[tuple[str, Any]]:
            files = done[name] = begun.pop(name)
            item = self._judged(files)
            files.kinds = dict.fromkeys(files.kinds)  # the contents are no longer needed
            if isinstance(item, str):
                files.fault = item
            else:
                yield name, item

        for name, kind, content in self._members(shard):
            files = done.get(name) or begun.setdefault(name, Files())
            if kind in files.kinds:
                files.fault = TWICE
            elif files.fault.startswith(LACKING):
                files.fault = APART
            if name in begun:
                if content is None:
                    files.fault = f"with a file of more than {LARGEST_FILE // 2**20} MB"
                files.kinds[kind] = content
            if len(begun) > SIDE_BY_SIDE:
                yield from complete(next(iter(begun)))
        for name in list(begun):
            yield from complete(name)
            if self.cut_off and done[name].fault.startswith(LACKING):
                del done[name]  # what it lacks was behind the cut, which is counted
        self.counts.update(files.fault for files in done.values() if files.fault)

    def _members(self, shard: str | Path) -> Iterator[tuple[str, str, bytes | None]]:
        """Name, kind and content of a shard's files; None for a content that is too large."""
        state, self.cut_off = "unreachable", False
        try:
            with _opened(shard) as stream:
                state = "not in tar format"
                with tarfile.open(fileobj=stream, mode="r|*") as tar:
                    for member in tar:
                        state = "cut off or damaged"
                        tar.members = []  # or it would keep all of them
                        name, kind = name_and_kind(member.name)
                        if member.isreg() and kind and self._is_ours(name):
                            yield name, kind, _content(tar, member, kind in self.kinds)
                    if tar.fileobj.tell() < tar.offset + tarfile.BLOCKSIZE:
                        raise tarfile.ReadError("it has no end mark")
        except Exception as error:  # damaged files raise whatever their decoder comes upon
            self.counts[f"shards {state}"] += 1
            self.cut_off = True
            message = " ".join(f"{shard} is {state}: {error}".split())
            warnings.warn(message[:300], stacklevel=2)

    def _is_ours(self, name: str) -> bool:
        number = zlib.crc32(name.encode("utf-8", "surrogateescape"))
        return self.held_out in (None, number % HELD_OUT == 0)

    def _judged(self, files: Files) -> tuple[bytes, str] | str:
        """A picture (as a file) and its caption, or why the pair is left out."""
        picture, text, facts = files.first(PICTURES), files.first(TEXTS), {}
        if files.fault or picture is None:
            return files.fault or files.lack("picture")
        if self.conditions and "json" not in files.kinds:
            return files.lack(".json")
        if "json" in files.kinds and (self.conditions or (self.captioned and text is None)):
            facts = facts_of(files.kinds["json"])
        if facts is None:
            return "with a .json that cannot be read"
        try:
            caption = caption_of(text, facts) if self.captioned else ""
        except UnicodeError:
            return "with a caption that is not UTF-8"
        if self.captioned and not caption:
            return files.lack("caption") if caption is None else "with an empty caption"
        if len(caption) > LONGEST_CAPTION:
            return f"with a caption of more than {LONGEST_CAPTION:,} characters"
        for condition in self.conditions:
            if not condition.holds(facts):
                return f"not {condition.text}"
        return picture, caption

    def _made(self, item: tuple[bytes, str]) -> Pair | str:
        """Picture and caption, or why they are left out."""
        file, caption = item
        try:
            opened = read_picture(file)
            if min(opened.size) < self.least_side:
                return "too small"
            if max(opened.size) > self.most_aspect * min(opened.size):
                return "too long and thin"
            picture = picture_of(opened)
        except Exception:  # damaged files raise whatever their decoder comes upon
            return "with a broken picture"
        picture = ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)
        return pixels.float() / 255, caption
