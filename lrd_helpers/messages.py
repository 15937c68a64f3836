"""What error messages show of a value and of a file's name: short, and on one line."""

from __future__ import annotations

import os
import reprlib

LONGEST = 300
"""Characters of a message."""


class _Short(reprlib.Repr):
    """`repr` of a part of a value only, however large or deep it is; no binary dust in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 2, 4, 4, 2
        self.maxstring = self.maxother = 48

    def repr_float(self, x: float, level: int) -> str:
        return f"{x:.7g}"

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out numbers of thousands of digits.
        return repr(x) if x.bit_length() <= 64 else f"a number of {x.bit_length()} bits"

    def repr_list(self, x: list, level: int) -> str:
        return self.repr_tuple(tuple(x[: self.maxlist + 1]), level)


_SHORT = _Short()


def excerpt(value: object, most: int = 50) -> str:
    """`value` as Python writes it, but at most `most` characters on one line."""
    return _cut(" ".join(_SHORT.repr(value).splitlines()), most)


def sentence(text: str, most: int = LONGEST) -> str:
    """`text` on one line, and no longer than a message may be."""
    return _cut(" ".join(text.split()), most)


def in_file(file: str | os.PathLike[str] | None, fault: str, mark: str = ": ") -> str:
    """`fault` after the name of its file, if it has one; a long name loses its beginning."""
    if file is None:
        return fault
    name = os.fspath(file)
    name = name if name.isprintable() else repr(name)[1:-1]
    room = max(LONGEST - len("warning: ") - len(mark + fault), 48)
    return (name if len(name) <= room else "…" + name[1 - room :]) + mark + fault


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
