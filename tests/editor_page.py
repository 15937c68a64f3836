"""An editor of layers in the page of `widget_page`: what tests do to it, and their fixtures.

A test file has the fixtures by naming them: `tab, shown = editor_page.tab, editor_page.shown`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from widget_page import SCREENSHOTS, load

from lrd_helpers.widgets.layer_editor import LayerEditor

# How Python answers, and which documents it gets.
PYTHON = 'fromPython({ kind: "received", number: message.number })'
SENT = 'messages.filter(({ kind }) => kind === "edit").map(({ document }) => document)'


class Page:
    """A page with one editor, and what a test does to it."""

    def __init__(self, page: Any, editor: LayerEditor) -> None:
        self.page, self.context = page, page.context
        self.errors: list[str] = []
        self.page.on("pageerror", self._note_error)
        self.page.on("console", self._note)
        load(page, editor, PYTHON)

    def close(self) -> None:
        """Leave the browser's page to the next test."""
        self.page.remove_listener("pageerror", self._note_error)
        self.page.remove_listener("console", self._note)
        self.page.unroute_all()
        assert self.errors == []

    def _note_error(self, error: Any) -> None:
        self.errors.append(str(error))

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    @property
    def document(self) -> dict[str, Any]:
        """What Python got last."""
        return self.page.evaluate(f"{SENT}.at(-1) ?? state.document")

    @property
    def boxes(self) -> list[list[float]]:
        return [layer["box"] for layer in self.document["layers"]]

    @property
    def syncs(self) -> int:
        return self.page.evaluate(f"{SENT}.length")

    @property
    def status(self) -> str:
        return self.page.locator(".status").inner_text()

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A place on the canvas, in [0, 1], as a place on the screen."""
        box = self.page.locator(".canvas").first.bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def drag(
        self, start: tuple[float, float], end: tuple[float, float], *, up: bool = True
    ) -> None:
        mouse = self.page.mouse
        mouse.move(*self.at(*start))
        mouse.down()
        mouse.move(*self.at(*((a + b) / 2 for a, b in zip(start, end, strict=True))))
        mouse.move(*self.at(*end))
        if up:
            mouse.up()

    def click(self, x: float, y: float) -> None:
        self.page.mouse.click(*self.at(x, y))

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=re.compile(name)).first

    def prompt(self, number: int) -> Any:
        return self.page.get_by_label(f"Prompt of layer {number}", exact=True).first

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


VIEWPORT = {"width": 900, "height": 640}


@pytest.fixture(scope="module")
def tab(chromium: Any) -> Iterator[Any]:
    """A page of the browser that tests load anew: a new page takes longer than most of them."""
    context = chromium.new_context(viewport=VIEWPORT)
    yield context.new_page()
    context.close()


@pytest.fixture
def shown(chromium: Any, tab: Any) -> Iterator[Callable[..., Page]]:
    """Shows an editor; at the end its page may not have complained of anything.

    With options of a `context` the page is a new page.
    """
    pages: list[Page] = []

    def show(editor: LayerEditor, *, context: dict | None = None) -> Page:
        page = chromium.new_context(viewport=VIEWPORT, **context).new_page() if context else tab
        page.set_default_timeout(10_000)
        page.set_viewport_size(VIEWPORT)
        pages.append(Page(page, editor))
        return pages[-1]

    yield show
    for page in pages:
        page.close()
        if page.page is not tab:
            page.context.close()


def near(*numbers: float) -> Any:
    return pytest.approx(list(numbers), abs=0.006)


def touch(page: Page, *places: tuple[tuple[float, float], ...]) -> None:
    """Put fingers on the canvas, move them from place to place, and lift them."""
    session = page.context.new_cdp_session(page.page)
    # Measured once: where two fingers scroll the page, the canvas moves with it.
    screen = [[page.at(*finger) for finger in fingers] for fingers in places]
    for number, fingers in enumerate(screen):
        points = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(fingers)]
        kind = "touchMove" if number else "touchStart"
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
