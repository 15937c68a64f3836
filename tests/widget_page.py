"""A widget's module in a page of its own, with a stand-in for the notebook's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anywidget

SCREENSHOTS = Path(__file__).parent.parent / "outputs" / "screenshots"
ADDRESS = "http://localhost/"  # the clipboard is for trusted pages only

PAGE = """<!doctype html><html><head><meta charset="utf-8"><link rel="icon" href="data:,">
<link rel="stylesheet" href="widget.css"><style>body { margin: 16px; font-family: sans-serif }
</style></head><body><div id="cell"></div><script type="module">
import definition from "./widget.js";
const listeners = {};
window.messages = [];
window.answers = true;  // whether Python is there
window.state = STATE;
window.model = {
  get: (name) => state[name],
  set(name, value) {
    if (state[name] === value) return;
    state[name] = value;
    (listeners["change:" + name] ?? []).forEach((listener) => listener());
  },
  send(message) {
    messages.push(structuredClone(message));
    if (answers) setTimeout(() => PYTHON, 5);
  },
  on: (name, listener) => (listeners[name] ??= []).push(listener),
  off: (name, listener) => { listeners[name] = listeners[name].filter((l) => l !== listener); },
};
window.fromPython = (message, buffers = []) =>
  (listeners["msg:custom"] ?? []).forEach((listener) => listener(message, buffers));
const widget = typeof definition === "function" ? definition() : definition;
widget.initialize?.({ model });
window.show = (el, of = widget) => of.render({ model, el });
window.close_ = show(document.getElementById("cell"));
window.ready = true;
</script></body></html>"""


def load(page: Any, widget: anywidget.AnyWidget, python: str) -> None:
    """Show the widget in the browser's `page`.

    Args:
        page: of playwright.
        widget: its state, module and looks go to the page, as to a notebook's.
        python: what Python does with a `message`, in JavaScript.
    """
    names = [name for name in widget.keys if name not in ("_esm", "_css")]
    state = {name: getattr(widget, name) for name in names if widget.has_trait(name)}
    kinds = (dict, list, str, int, bool, type(None))
    state = {name: value for name, value in state.items() if isinstance(value, kinds)}
    text = PAGE.replace("STATE", json.dumps(state)).replace("PYTHON", python)
    files = {
        "": (text, "text/html"),
        "widget.js": (str(widget._esm), "text/javascript"),
        "widget.css": (str(widget._css), "text/css"),
    }

    def answer(route: Any) -> None:
        body, kind = files[urlsplit(route.request.url).path.removeprefix("/")]
        route.fulfill(body=body, content_type=f"{kind}; charset=utf-8")

    page.route(ADDRESS + "**", answer)
    page.goto(ADDRESS)
    page.wait_for_function("window.ready")
