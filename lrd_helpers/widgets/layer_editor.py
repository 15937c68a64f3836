"""What `BoxEditor` and `StackEditor` share: `LayerEditor`; its page is `layer_editor.js`."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anywidget
import traitlets

from lrd_helpers.widgets.page import page_text


class LayerEditor(anywidget.AnyWidget):
    """An editor of layers, whose draft the page holds and can undo.

    Attributes:
        document: the draft. `editor.observe(f, "document")` calls f after each change. Replace it,
            never change it in place.
    """

    _css = page_text("theme.css", "fields.css", "layer_editor.css")

    # Not echoed: the page may have gone on meanwhile.
    document = traitlets.Dict().tag(sync=True, echo_update=False)
    width = traitlets.Int(128).tag(sync=True)
    height = traitlets.Int(128).tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self._answered: dict[str, Callable[[], None]] = {}
        self.on_msg(self._on_message)

    def notify(self, text: str, *, mark: Sequence[str] = (), warn: bool = True) -> None:
        """Show a sentence in the page until the next edit.

        Args:
            text: the sentence.
            mark: the `id` of layers whose prompts are to be marked.
            warn: whether something is wrong.
        """
        self.send({"kind": "notice", "text": text, "mark": list(mark), "warn": warn})

    def when_drawn(self, then: Callable[[], None], *, patience: float = 1.0) -> None:
        """Call `then` when Python has all that is drawn in the page.

        Edits and clicks come by different ways, and a click may overtake the edit before it. So
        the page is asked for its draft, and its answer is waited for.

        Args:
            then: called once, when the page has answered or `patience` is over.
            patience: seconds to wait; there may be no page at all.
        """
        question = uuid.uuid4().hex
        timer = threading.Timer(patience, lambda: self._go_on(question))
        self._answered[question] = then
        timer.daemon = True
        timer.start()
        self.send({"kind": "ask", "question": question})

    def _go_on(self, question: str | None) -> None:
        # Taken out in one go: the answer and the end of patience may come at once.
        then = self._answered.pop(question, None)
        if then is not None:
            then()

    def _static(self) -> dict[str, str]:
        """What is seen where no widget can run: MIME type → text."""
        raise NotImplementedError

    def _hear(self, message: Mapping[str, Any]) -> None:
        """Do what a message of another kind than "edit" asks for."""

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        if bundle is not None:
            bundle[0].update(self._static())
        return bundle

    def _on_message(self, _: Any, message: Mapping[str, Any], __: Any) -> None:
        # First of all: what observers do with an edit may take long, or fail.
        self.send({"kind": "received", "number": message.get("number")})
        if message.get("kind") == "edit":
            # As if it had come by ipywidgets' own way, which does not send it back to the page.
            draft = {name: message[name] for name in ("document", "snap") if name in message}
            self.set_state(draft)
            self._go_on(message.get("question"))
        else:
            self._hear(message)
