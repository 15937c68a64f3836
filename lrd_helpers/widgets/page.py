"""What the page of a widget is made of: what all of them share, then its own."""

from pathlib import Path


def page_text(*names: str) -> str:
    """The files of this folder as one text: a page loads one module, and no file beside it."""
    return "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)
