"""The package's docstrings, which have Markdown's tables, `names` and indented code, for Sphinx.

An extension of Sphinx: it runs before napoleon, which reads the sections (Args, Returns, Raises).
"""

from __future__ import annotations

import re
from typing import Any

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Note):$")


def table(rows: list[str]) -> list[str]:
    """A Markdown table as reStructuredText; the second row is the line below the head."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [rows[0], *rows[2:]]:
        cells = re.split(r"(?<!\\)\|", row.strip().strip("|"))
        for number, cell in enumerate(cells):
            lines.append(f"   {'*' if number == 0 else ' '} - {escaped(cell.strip())}")
    return ["", *lines, ""]


def escaped(line: str) -> str:
    """A line whose signs mean what they mean in Markdown: |x|, height_ and ** are text."""
    parts = re.split(r"(`+[^`]*`+)", line)
    parts[::2] = [re.sub(r"(\*\*|\|)|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def restructured(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    result: list[str] = []
    rows: list[str] = []
    section = code = False
    for line in [*lines, ""]:
        if line.startswith("|"):
            rows.append(line)
            continue
        result += table(rows) if len(rows) > 2 else map(escaped, rows)
        rows = []
        if line.strip() and not line.startswith(" "):
            section, code = bool(SECTION.match(line)), False
        elif line.startswith("    ") and not section and not code and result[-1:] == [""]:
            result += [".. code-block:: default", ""]
            code = True
        result.append(line if code else escaped(line))
    return result[:-1]


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""

    def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        # Before a first line that is empty, napoleon takes no "what it is: why" for a type.
        lines[:] = [""] * (what in ("attribute", "data")) + restructured(lines)

    app.connect("autodoc-process-docstring", process, priority=100)  # napoleon: 500
    return {"parallel_read_safe": True}
