"""`StackEditor`: the layers of a picture, moved and restacked in the page of a notebook.

editor = StackEditor(stack, pipe)   # as the last line of a cell: shows it
editor.stack                        # the LayerStack of now
editor.stack = editor.stack.recoloured("a red car", "blue")   # shown at once, can be undone there

The page is `layer_editor.js` and `stack_editor.js`. It lays the layers over each other itself;
Python is told of each edit, makes layers anew, and writes files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import traitlets
from PIL import Image
from tqdm import tqdm

from lrd_helpers.layerdiff.stack import LayerStack, StackError, StackLayer, check_stack
from lrd_helpers.messages import sentence
from lrd_helpers.pictures import SHOWN_SIDE, data_uri, reduced_data_uri
from lrd_helpers.widgets.layer_editor import LayerEditor
from lrd_helpers.widgets.page import page_text


class StackEditor(LayerEditor):
    """A canvas with the layers, and beside it their list, as editors of pictures have them.

    Layers are dragged, restacked, hidden, made translucent, renamed and deleted with mouse, finger
    or keyboard, and everything can be undone; the page explains itself. With a pipeline a layer is
    made anew and the stack harmonised, beside the notebook: cells can be run meanwhile.

    Args:
        stack: what to begin with.
        pipe: makes layers anew and harmonises; without a pipeline both are switched off.
        seed: of the first picture that is made; each later picture has the next.

    Attributes:
        document: the draft as the page holds it: a dict of `caption`, `background` (its prompt),
            `ground` and `composite` (names of pictures), and `layers` (back to front: `id`,
            `prompt`, `made` (the prompt of its pixels), `picture`, `offset`, `hidden`, and
            `opacity` where it is not 1).
        harmonised: the last harmonised picture; None after an edit.
    """

    _esm = page_text("elements.js", "layer_editor.js", "stack_editor.js")

    _pictures = traitlets.Dict().tag(sync=True)  # name → data URI
    _job = traitlets.Dict().tag(sync=True)  # what is being made: its text, and the share done
    _harmonised = traitlets.Unicode("").tag(sync=True)
    _can_draw = traitlets.Bool(False).tag(sync=True)

    def __init__(self, stack: LayerStack, pipe: Any = None, *, seed: int = 0) -> None:
        self.pipe, self.seed = pipe, seed
        self.harmonised: Image.Image | None = None
        self._images: dict[str, Image.Image] = {}
        self._pipe_is_free = threading.Lock()
        self._thread: threading.Thread | None = None
        document = document_of(stack, self._images)
        names = {"width": stack.size[0], "height": stack.size[1], "_pictures": self._shown()}
        super().__init__(document=document, _can_draw=pipe is not None, **names)
        self.observe(self._forget_harmonised, "document")

    @property
    def stack(self) -> LayerStack:
        """The layers as they are now; it does not change any more."""
        return stack_of(self.document, self._images)

    @stack.setter
    def stack(self, stack: LayerStack) -> None:
        document = document_of(stack, self._images)
        if stack.size != (self.width, self.height):
            raise StackError(
                f"the stack is {stack.size[0]} × {stack.size[1]}, but the editor was made for "
                f"{self.width} × {self.height}; make another editor: StackEditor(stack)"
            )
        self._pictures = self._shown()  # before the document that names them
        self.document = document

    def redraw(self, layer: int | str) -> None:
        """Make a layer anew from its prompt, beside the notebook; the others stay as they are.

        Where the prompt was edited, the caption follows it.

        Args:
            layer: its number, counted from 0 (the furthest back), or its prompt.

        Raises:
            StackError: there is no such layer or no pipeline, or something else is being made.
        """
        number = self.stack.number(layer)
        before = self.document["layers"][number]
        prompt = before["prompt"]
        stack = self.stack.changed(number, prompt=before["made"])

        self._start(
            f"Making “{prompt}” anew …",
            lambda draws: self.pipe.redraw(stack, number, prompt=prompt, generator=draws),
            lambda made: self._take_layer(number, before, stack.caption, made),
        )

    def _take_layer(
        self, number: int, before: dict[str, Any], caption: str, made: LayerStack
    ) -> str:
        """Put layer `number` of `made` where `before` was; what was done meanwhile stays."""
        document, new = self.document, document_of(made, self._images)
        self._pictures = self._shown()
        layers = {each["id"]: each for each in document["layers"]}
        now, later = layers.get(before["id"]), new["layers"][number] | {"id": before["id"]}
        if now is None:
            return f"“{before['prompt']}” was deleted meanwhile, and stays away."
        same = [key for key in later if now.get(key) == before.get(key)]
        layers[before["id"]] = now | {key: later[key] for key in {*same, "made", "picture"}}
        words = {"composite": new["composite"]}
        if document["caption"] == caption:
            words["caption"] = new["caption"]
        self.document = document | words | {"layers": list(layers.values())}
        return f"“{before['prompt']}” is new."

    def harmonise(self) -> None:
        """Make one coherent picture of the layers, beside the notebook: `harmonised`.

        Raises:
            StackError: there is no pipeline, or something else is being made.
        """
        stack = self.stack

        def take(made: Image.Image) -> str:
            self.harmonised, self._harmonised = made, reduced_data_uri(made)
            return "Harmonised; an edit goes back to the layers."

        self._start(
            "Harmonising …", lambda draws: self.pipe.harmonise(stack, generator=draws), take
        )

    def wait(self, seconds: float | None = None) -> None:
        """Wait until what is being made is done."""
        if self._thread is not None:
            self._thread.join(seconds)

    def __repr__(self) -> str:
        prompts = ", ".join(json.dumps(layer["prompt"]) for layer in self.document["layers"])
        return f"StackEditor({self.width} × {self.height}, layers: {prompts or 'none'})"

    def _static(self) -> dict[str, str]:
        kind, _, data = reduced_data_uri(self.stack.flatten()).partition(";base64,")
        return {kind.removeprefix("data:"): data}

    def _hear(self, message: Mapping[str, Any]) -> None:
        kind = message.get("kind")
        try:
            if kind == "redraw":
                ids = [layer["id"] for layer in self.document["layers"]]
                self.redraw(ids.index(message["layer"]))
            elif kind == "harmonise":
                self.harmonise()
            elif kind == "export":
                self._export(f"stack{message['suffix']}", message["number"])
        except (ValueError, OSError, ImportError) as error:
            self.notify(sentence(str(error)))

    def _export(self, name: str, number: str) -> None:
        from lrd_helpers.layerdiff.export import save_stack

        with tempfile.TemporaryDirectory() as folder:
            save_stack(self.stack, Path(folder) / name)
            file = (Path(folder) / name).read_bytes()
        self.send({"kind": "file", "name": name, "number": number}, [file])

    def _start(
        self, text: str, make: Callable[[torch.Generator], Any], take: Callable[[Any], str]
    ) -> None:
        if self.pipe is None:
            raise StackError("no pipeline was given: StackEditor(stack, pipe)")
        if not self._pipe_is_free.acquire(blocking=False):
            raise StackError("something else is being made; wait until it is done")
        job = (torch.Generator().manual_seed(self.seed), make, take)
        self.seed += 1
        self._job = {"text": text}
        self._thread = threading.Thread(target=self._work, args=job, daemon=True)
        self._thread.start()

    def _work(self, draws: torch.Generator, make: Callable, take: Callable) -> None:
        """Make something and take it over; what goes wrong is said, and the buttons work again."""
        drawn = threading.Event()
        self.pipe.progress_bar = functools.partial(_Told, self._tell)
        try:
            made = make(draws)
            self.when_drawn(drawn.set)  # the page may have an edit that Python has not
            drawn.wait()
            text, warn = f"{take(made)} Seed {draws.initial_seed()}.", False
        except Exception as error:
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            text, warn = sentence(f"Nothing was changed: {name}{error}"), True
        del self.pipe.progress_bar  # its class has one
        self._job = {}
        self._pipe_is_free.release()
        self.notify(text, warn=warn)

    def _tell(self, share: float) -> None:
        self._job = self._job | {"share": share}

    def _forget_harmonised(self, _: Any) -> None:
        self.harmonised, self._harmonised = None, ""

    def _shown(self) -> dict[str, str]:
        """All pictures as the page gets them."""
        return {n: self._pictures.get(n) or _uri(image) for n, image in self._images.items()}


class _Told(tqdm):
    """A pipeline's progress bar that is not printed: `tell` gets the share that is done."""

    def __init__(
        self, tell: Callable[[float], None], iterable: Any = None, total: int | None = None
    ) -> None:
        super().__init__(iterable, total=total, disable=True)
        self.tell, self.done = tell, 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float = 1) -> None:
        self.done += n
        self.tell(self.done / self.total)


# ------------------------------------------------------------------ document ↔ LayerStack


def document_of(stack: LayerStack, images: dict[str, Image.Image]) -> dict[str, Any]:
    """The document that a stack is; its pictures are put into `images`."""
    check_stack(stack)
    layers: list[dict[str, Any]] = []
    for layer in stack.layers:
        picture = named(layer.image, images)
        alike = sum(each["picture"] == picture for each in layers)
        entry = {"id": f"{picture}-{alike}", "prompt": layer.prompt, "made": layer.prompt}
        entry |= {"picture": picture, "offset": list(layer.offset), "hidden": layer.hidden}
        layers.append(entry | ({"opacity": layer.opacity} if layer.opacity < 1 else {}))
    return {
        "caption": stack.caption,
        "background": stack.background_prompt,
        "ground": named(stack.background, images),
        "composite": None if stack.composite is None else named(stack.composite, images),
        "layers": layers,
    }


def stack_of(document: Mapping[str, Any], images: Mapping[str, Image.Image]) -> LayerStack:
    """The stack that a document is."""
    layers = [
        StackLayer(
            layer["prompt"],
            images[layer["picture"]],
            offset=tuple(layer["offset"]),
            opacity=layer.get("opacity", 1.0),
            hidden=layer["hidden"],
        )
        for layer in document["layers"]
    ]
    prompts = {"caption": document["caption"], "background_prompt": document["background"]}
    composite = images.get(document["composite"])
    return LayerStack(images[document["ground"]], layers, composite=composite, **prompts)


def named(image: Image.Image, images: dict[str, Image.Image]) -> str:
    """The image's name among `images`, from its pixels: equal pictures are kept once."""
    name = hashlib.sha256(image.tobytes()).hexdigest()[:16]
    images.setdefault(name, image)
    return name


def _uri(image: Image.Image) -> str:
    if image.mode == "RGB":
        return reduced_data_uri(image)
    image = image.copy()
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    return data_uri(image)
