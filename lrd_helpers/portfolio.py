"""What two people exchange: stickers, layouts and their pictures in a zip file.

mine = Portfolio("ann", (robot,), layouts)                   # first: what is to be drawn
mine.save("ann.zip")
Portfolio("ann", (robot,), layouts, pictures).save("ann.zip")     # later: with the pictures
theirs = Portfolio.load("ben.zip")

In the file: `portfolio.json`, `stickers/robot.svg`, `layouts/1.json`, `pictures/1.png`. Reading it
runs nothing that is in it.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lrd_helpers.files import checked_file, write_atomically
from lrd_helpers.layout import Layout
from lrd_helpers.messages import excerpt, in_file, sentence
from lrd_helpers.pictures import png_of, read_picture
from lrd_helpers.storybook import Sticker, own_sticker

VERSION = 1
LARGEST = 2**24
"""Bytes of a file that is read, and of each part of it when it is unpacked."""
MOST = 100
"""Layouts, or stickers, of a portfolio."""


class PortfolioError(ValueError):
    """A portfolio that cannot be used: one sentence with the file and what is wrong in it."""


@dataclass(frozen=True)
class Portfolio:
    """Somebody's stickers, layouts, and a picture of each layout once they are drawn.

    Attributes:
        author: whose it is.
        stickers: those that the world does not have.
        layouts: what is to be drawn.
        pictures: none, or a picture of each layout.

    Raises:
        PortfolioError: no author, no layouts, too many of something, or some pictures missing.
    """

    author: str
    stickers: tuple[Sticker, ...]
    layouts: tuple[Layout, ...]
    pictures: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.author, str) or not self.author.strip():
            raise PortfolioError(f"the author is {excerpt(self.author)}: write a name")
        for name in ("stickers", "layouts"):
            if len(getattr(self, name)) > MOST:
                raise PortfolioError(f"{len(getattr(self, name))} {name}, but {MOST} at most")
        if not self.layouts:
            raise PortfolioError("there are no layouts")
        if len(self.pictures) not in (0, len(self.layouts)):
            raise PortfolioError(
                f"{len(self.pictures)} pictures of {len(self.layouts)} layouts: draw all of them"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a zip file, whole or not at all.

        Raises:
            OSError: the file cannot be written; names it.
        """
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            names = [sticker.name for sticker in self.stickers]
            head = {"version": VERSION, "author": self.author, "stickers": names}
            head |= {"layouts": len(self.layouts), "pictures": len(self.pictures)}
            archive.writestr("portfolio.json", json.dumps(head, indent=2, ensure_ascii=False))
            for sticker in self.stickers:
                archive.writestr(f"stickers/{sticker.name}.svg", sticker.svg)
            for number, layout in enumerate(self.layouts, start=1):
                archive.writestr(f"layouts/{number}.json", layout.to_json())
            for number, picture in enumerate(self.pictures, start=1):
                archive.writestr(f"pictures/{number}.png", png_of(picture))
        write_atomically(path, data.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Portfolio:
        """Read what `save` wrote.

        Raises:
            PortfolioError: missing, no such file, damaged, too large, or a part that is not what it
                should be; names the file and the part.
        """
        with _sentence(path), zipfile.ZipFile(io.BytesIO(checked_file(path, LARGEST))) as archive:
            head = json.loads(_part(archive, "portfolio.json"))
            names, layouts, pictures = (_checked(head)[name] for name in _COUNTED)
            return cls(
                head["author"],
                tuple(own_sticker(name, _text(archive, f"stickers/{name}.svg")) for name in names),
                tuple(
                    Layout.from_json(_text(archive, part), file=part)
                    for part in (f"layouts/{n + 1}.json" for n in range(layouts))
                ),
                tuple(
                    read_picture(_part(archive, f"pictures/{n + 1}.png")).convert("RGB")
                    for n in range(pictures)
                ),
            )

    def check_comparable(self, other: Portfolio) -> None:
        """Whether both can be judged against each other: the same layouts, drawn by two people.

        Raises:
            PortfolioError: they cannot; says why.
        """
        if self.author == other.author:
            raise PortfolioError(f"both are by {excerpt(self.author)}: two names are needed")
        for portfolio in (self, other):
            if not portfolio.pictures:
                raise PortfolioError(f"that of {excerpt(portfolio.author)} has no pictures yet")
        if len(self.layouts) != len(other.layouts):
            counts = f"{len(self.layouts)} and {len(other.layouts)}"
            raise PortfolioError(f"they have {counts} layouts: only pictures of the same compare")
        for number, (mine, theirs) in enumerate(zip(self.layouts, other.layouts, strict=True), 1):
            if mine.to_json() != theirs.to_json():
                raise PortfolioError(
                    f"layout {number} is {excerpt(mine.caption)} here and "
                    f"{excerpt(theirs.caption)} there, or its boxes differ: agree on one"
                )


_COUNTED = ("stickers", "layouts", "pictures")


def _checked(head: object) -> dict:
    """The fields of `portfolio.json`.

    Raises:
        ValueError: not those that `save` writes.
    """
    fields = {"version": int, "author": str, "stickers": list, "layouts": int, "pictures": int}
    for name, kind in fields.items():
        value = head.get(name) if isinstance(head, dict) else None
        if type(value) is not kind:
            raise ValueError(f"portfolio.json: {name} is {excerpt(value)}, not of {kind.__name__}")
    if head["version"] != VERSION:
        raise ValueError(f"portfolio.json: version {head['version']}, but {VERSION} is read here")
    if max(len(head["stickers"]), head["layouts"], head["pictures"]) > MOST:
        raise ValueError(f"portfolio.json: more than {MOST} stickers, layouts or pictures")
    return head


def _part(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        size = archive.getinfo(name).file_size
    except KeyError:
        raise ValueError(f"it has no {name}") from None
    if size > LARGEST:
        raise ValueError(f"{name} is larger than {LARGEST / 2**20:g} MB")
    return archive.read(name)


def _text(archive: zipfile.ZipFile, name: str) -> str:
    return _part(archive, name).decode("utf-8")


@contextmanager
def _sentence(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong with a file becomes one sentence that names it."""
    name = Path(path).name
    try:
        yield
    except zipfile.BadZipFile as error:
        fault = f"not a portfolio: it is no zip file, or a damaged one ({error})"
        raise PortfolioError(sentence(in_file(name, fault))) from None
    except OSError as error:
        fault = f"cannot be read: {error.strerror or error}"
        raise PortfolioError(sentence(in_file(name, fault))) from None
    except (ValueError, RuntimeError, NotImplementedError) as error:  # encrypted, unknown packing
        raise PortfolioError(sentence(in_file(name, f"not a portfolio: {error}"))) from None
