"""Pictures and captions from webdataset shards, as subsets of LAION-400M are distributed.

A shard is a tar file in which each pair is a few files with one name, side by side: 000000012.jpg,
000000012.txt with the caption, and often 000000012.json with facts to filter by. img2dataset makes
shards from a list of addresses. The webdataset library reads them; a web address or a command
("pipe:…") will do as well as a file.
"""

from __future__ import annotations

import glob
import io
import json
import operator
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from lrd_helpers.storybook import seeded

PICTURES = ("jpg", "jpeg", "png", "webp")

HELD_OUT = 100
"""One pair in so many is never trained on; its name decides."""

SHUFFLED = 1000
"""Pairs held in memory (as files, not as pixels) to be drawn from in random order."""

COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}

Pair = tuple[Float[Tensor, "3 size size"], str]


def shard_list(patterns: str | Sequence[str]) -> list[str]:
    """The shards that patterns name: "shards/{0000..0009}.tar", "shards/*.tar", an address.

    Raises:
        FileNotFoundError: a pattern matches nothing, or a file that it names is not there.
        ImportError: webdataset is not installed.
    """
    try:
        from braceexpand import braceexpand  # comes with webdataset
    except ImportError:
        raise ImportError("shards are read by webdataset: pip install webdataset") from None

    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in braceexpand(pattern):
            # An address (https:, s3:) or a command (pipe:) is tried when it is its turn.
            matches = [name] if re.match(r"[a-z0-9]{2,}:", name) else sorted(glob.glob(name))
            if not matches:
                origin = "" if name == pattern else f" (from {pattern!r})"
                raise FileNotFoundError(f"no shard matches {name!r}{origin}")
            shards += matches
    if not shards:
        raise FileNotFoundError("no shards were named; give for example 'shards/{0000..0009}.tar'")
    return shards


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
        except (KeyError, TypeError, ValueError):
            return False


class ShardPairs:
    """An endless stream of (picture, caption), the same for the same arguments.

    Pictures are cut to the largest square in their middle and brought to `size`. Each pass goes
    through the shards in another order. What cannot be used is left out and counted in `counts`.

    Args:
        shards: paths, addresses or commands; see `shard_list`.
        size: of the pictures, in pixels.
        least_side: pictures with a shorter side are left out; `size` by default.
        most_aspect: so are those more than so many times longer than wide, or the other way.
        conditions: so are those whose facts do not fulfil all of these.
        held_out: only the pairs that are never trained on, instead of all but these.
        seed: of the order.
        reader: this reader's number, of `readers` that share the shards without overlap.
        readers: how many there are.

    Attributes:
        counts: how many pairs were used, or left out, for each reason.

    Raises:
        ValueError: fewer shards than readers; while reading, a whole pass without a single pair.
    """

    def __init__(
        self,
        shards: Sequence[str],
        size: int,
        *,
        least_side: int | None = None,
        most_aspect: float = 2.0,
        conditions: Sequence[Condition] = (),
        held_out: bool = False,
        seed: int = 0,
        reader: int = 0,
        readers: int = 1,
    ) -> None:
        if len(shards) < readers:
            raise ValueError(f"{len(shards)} shards cannot be shared by {readers} processes")
        self.shards, self.size = list(shards), size
        self.least_side = size if least_side is None else least_side
        self.most_aspect, self.conditions = most_aspect, tuple(conditions)
        self.held_out, self.seed = held_out, seed
        self.reader, self.readers = reader, readers
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Pair]:
        for number in count():
            before = self.counts["used"]
            yield from self.one_pass(number)
            if self.counts["used"] == before:
                raise ValueError(
                    f"no pair in {len(self.shards)} shards can be used: {self.summary()}"
                )

    def one_pass(self, number: int = 0) -> Iterator[Pair]:
        """Every pair of this reader's shards once, in the order of pass `number`."""
        import webdataset

        order = torch.randperm(len(self.shards), generator=seeded(self.seed, number)).tolist()
        mine = [self.shards[index] for index in order[self.reader :: self.readers]]
        files = webdataset.WebDataset(
            mine,
            shardshuffle=False,
            nodesplitter=None,
            workersplitter=None,
            handler=self._note_fault,
            empty_check=False,
        ).shuffle(SHUFFLED, initial=SHUFFLED, rng=random.Random(f"{self.seed} {number}"))
        for pair in files:
            if (zlib.crc32(pair["__key__"].encode()) % HELD_OUT == 0) != self.held_out:
                continue
            made = self._made(pair)
            if isinstance(made, str):
                self.counts[made] += 1
            else:
                self.counts["used"] += 1
                yield made

    def summary(self) -> str:
        """How many pairs were used and left out, in one line."""
        return ", ".join(f"{number:,} {reason}" for reason, number in self.counts.most_common())

    def _made(self, pair: dict[str, Any]) -> Pair | str:
        """The pair, or why it is left out."""
        file = next((pair[kind] for kind in PICTURES if kind in pair), None)
        caption = " ".join(pair.get("txt", b"").decode("utf-8", "replace").split())
        if file is None or not caption:
            return "without a picture" if file is None else "without a caption"
        try:
            facts = json.loads(pair.get("json", b"{}"))
        except ValueError:
            facts = {}
        for condition in self.conditions:
            if not condition.holds(facts):
                return f"not {condition.text}"
        try:
            with Image.open(io.BytesIO(file)) as opened:
                if min(opened.size) < self.least_side:
                    return "too small"
                if max(opened.size) > self.most_aspect * min(opened.size):
                    return "too long and thin"
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except Exception:  # damaged files raise whatever their decoder comes upon
            return "with a broken picture"
        picture = ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)
        return pixels.float() / 255, caption

    def _note_fault(self, error: Exception) -> bool:
        self.counts["broken shards"] += 1
        return True  # go on with the next one
