"""`LayoutStudio`: draw a layout, render it, and look at what came of it.

studio = LayoutStudio(pipe)    # as the last line of a cell: shows it
studio.editor.layout           # what is drawn
studio.renders[-1].image       # the last picture

Without a widget `render` does the same: one layout in, one `Render` out.
"""

from __future__ import annotations

import contextlib
import html
import json
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ipywidgets
import matplotlib
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lrd_helpers.attention import AttentionMaps, capture_attention
from lrd_helpers.layout import Layout, LayoutError
from lrd_helpers.mask import Box
from lrd_helpers.measure import Detector, StorybookDetector, found_boxes, layout_iou
from lrd_helpers.methods import METHODS, Choices, Method, check_opacity, named
from lrd_helpers.methods.regions import asked_prompt, phases
from lrd_helpers.pictures import picture_of, reduced_data_uri
from lrd_helpers.pipeline import warn_of_words
from lrd_helpers.sampling.run import Run
from lrd_helpers.sampling.steps import Steps
from lrd_helpers.widgets.box_editor import BoxEditor, layout_of, layout_svg
from lrd_helpers.words import WHOLE_WORDS, WordError

if TYPE_CHECKING:
    from lrd_helpers.pipeline import LayeredRenderingPipeline

HISTORY = 6
"""So many renders are kept to compare."""

PAUSE = 0.7
"""Seconds without an edit after which live mode renders."""


# ------------------------------------------------------------------ without a widget


@dataclass(frozen=True)
class Settings:
    """How a layout is rendered.

    Attributes:
        seed: of the initial noise; the same seed is the same noise on every device.
        steps: denoising steps.
        guidance_scale: γ of classifier-free guidance.
        layered_fraction: which part of the steps, in [0, 1], is layered (t0); None: the method's.
        strength: factor on the method's strengths of vision guidance; 0 = none. Methods that have
            no such choice do not look at these two.
        method: a method's name, see `lrd_helpers.METHODS`.
    """

    seed: int = 0
    steps: int = 25
    guidance_scale: float = 5.0
    layered_fraction: float | None = None
    strength: float = 1.0
    method: str = "collage"


@dataclass(frozen=True, eq=False)
class Render:
    """A picture, and what is known about it.

    Attributes:
        layout: what was asked for.
        settings: how.
        image: the picture.
        attention: for each word of the caption where the model looked for it, in [0, 1], mean over
            steps, layers and heads. Where all steps are layered, so that the U-Net never reads the
            caption: for the words of the layers' prompts.
        found: for each layer the box that was found; None without a detector that knows the words.
        ious: for each layer the IoU of what was found with what was asked; None likewise.
        seconds: what it took.
        remarks: what the pipeline warned of.
    """

    layout: Layout
    settings: Settings
    image: Image.Image
    attention: dict[str, Float[Tensor, "height width"]]
    found: list[Box | None] | None
    ious: list[float] | None
    seconds: float
    remarks: tuple[str, ...]


def render(
    layout: Layout,
    pipe: LayeredRenderingPipeline,
    settings: Settings | None = None,
    *,
    detector: Detector | None = None,
    on_step: Callable[[float], bool] | None = None,
) -> Render | None:
    """Draw a layout and look at the picture: the plain function behind `LayoutStudio`.

    Args:
        layout: what is wanted.
        pipe: draws it.
        settings: how; `Settings()` by default.
        detector: finds the layers in the picture; without one there are no IoUs.
        on_step: called after each step, those of sketches too, with the share that is done, up to
            1; if it says False, nothing more is drawn, and the answer is None.

    Raises:
        ValueError: what the method refuses.
    """
    settings = settings or Settings()
    method, start = method_of(settings), time.perf_counter()
    steps = Steps(
        pipe.scheduler,
        settings.steps,
        device=pipe._execution_device,
        generator=torch.Generator("cpu").manual_seed(settings.seed),
    )
    size = _picture_size(pipe)[::-1]
    run = Run.begin(pipe, [layout], size, steps, guidance_scale=settings.guidance_scale)
    with _remarks() as remarks:
        check_opacity(run, method)
        method.check(run)
        warn_of_words(pipe, [layout])
    run.draw_noise()
    total, latents = sum(method.count(run)), run.x_T
    with torch.no_grad(), run.model.drawing():
        with capture_attention(pipe, prompts_looked_at(run, method)) as attention:
            for done, state in enumerate(method.sample(run), start=1):
                latents = state.latents
                if on_step is not None and not on_step(done / total):
                    return None
        image = picture_of(run.model.decode(latents)[0] / 2 + 0.5)
    found = ious = None
    if detector is not None:
        with contextlib.suppress(ValueError):  # a prompt with no word the detector knows
            found = found_boxes(detector, image, layout)
            ious = layout_iou(detector, image, layout)
    seconds = time.perf_counter() - start
    return Render(layout, settings, image, _maps(attention), found, ious, seconds, tuple(remarks))


def _maps(attention: AttentionMaps) -> dict[str, Float[Tensor, "height width"]]:
    maps = {}
    for number, prompt in enumerate(attention.prompts):
        for word in prompt.words:
            with contextlib.suppress(WordError, RuntimeError):  # beyond the end; never drawn
                maps[word.lower()] = attention.pooled(word, prompt=number).mean(0)
    return maps


def method_of(settings: Settings) -> Method:
    """The method that settings name, with their choices."""
    method = named(settings.method)
    if not isinstance(method, Choices):
        return method
    changes = {
        "inside": settings.strength * method.inside,
        "outside": settings.strength * method.outside,
    }
    if settings.layered_fraction is not None:
        changes["layered_fraction"] = settings.layered_fraction
    return named(method, **changes)


def prompts_looked_at(run: Run, method: Method) -> list[str]:
    """The prompts whose words' maps are shown: the caption, or the layers' if it is not drawn."""
    layout = run.layout
    if isinstance(method, Choices) and layout.background.strip():
        phase = phases(run, method)
        if phase.layered == len(run.steps):
            counts = Counter(asked_prompt(layer, layout, method) for layer in layout.layers)
            return [prompt for prompt, count in counts.items() if count == 1] or [layout.caption]
    return [layout.caption]


@contextlib.contextmanager
def _remarks() -> Any:
    """The texts of the warnings given in the block, each once."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield texts
    texts += dict.fromkeys(
        str(warning.message) for warning in caught if warning.category is UserWarning
    )


# ------------------------------------------------------------------ the widget


class LayoutStudio(ipywidgets.VBox):
    """An editor, the settings, a Render button, and the picture with all one can ask of it.

    A render runs beside the notebook (cells can be run meanwhile, but not with the same pipeline),
    shows its progress, and can be cancelled. It draws the layout as it was when it began.

    Args:
        pipe: draws the pictures.
        layout: what to begin with.
        detector: finds the layers in the pictures; by default the shipped one, for pipelines with
            the vocabulary of its world.
        live: render by itself after each pause in editing.
        settings: where the sliders begin.

    Attributes:
        editor: the `BoxEditor`.
        renders: the last renders, the latest at the end.
    """

    def __init__(
        self,
        pipe: LayeredRenderingPipeline,
        layout: Layout | None = None,
        *,
        detector: Detector | None = None,
        live: bool = False,
        settings: Settings | None = None,
    ) -> None:
        self.pipe = pipe
        if detector is None and len(pipe.tokenizer) <= WHOLE_WORDS:
            detector = StorybookDetector()
        self.detector = detector
        self.editor = BoxEditor(layout, size=_picture_size(pipe))
        self.renders: list[Render] = []
        self._shown: Render | None = None
        self._word: str | None = None
        self._job: object | None = None  # the render that counts; any other one is outdated
        self._pipe_is_free = threading.Lock()
        self._thread: threading.Thread | None = None
        self._timer: threading.Timer | None = None
        self._build(settings or Settings(), live)
        super().__init__([self.editor, self._below, self._strip])
        self.add_class("lrd-studio")
        self._show()

    @property
    def settings(self) -> Settings:
        """What the sliders say."""
        return Settings(**{name: slider.value for name, slider in self._sliders.items()})

    def start(self) -> None:
        """Render what is drawn now, beside the notebook; a render that still runs is dropped.

        What is not finished is said in the editor.
        """
        try:
            layout = self.editor.layout
        except LayoutError as error:
            self._say(str(error), bad=True)
            return
        self._drop()
        job = self._job = object()
        self._render_button.disabled, self._cancel_button.disabled = not self._live.value, False
        self._progress.value = 0
        self._progress.layout.visibility = "visible"
        self._say("Rendering …")
        self._thread = threading.Thread(
            target=self._work, args=(job, layout, self.settings), daemon=True
        )
        self._thread.start()

    def cancel(self, *_: Any) -> None:
        """Stop the render that runs, if one does."""
        if self._job is not None:
            self._drop()
            self._finish("Cancelled.")

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the render that runs is done."""
        if self._timer is not None:
            self._timer.join(seconds)
        if self._thread is not None:
            self._thread.join(seconds)

    def __repr__(self) -> str:
        return f"LayoutStudio({self.editor!r}, {len(self.renders)} renders)"

    # -------------------------------------------------------------- rendering

    def _work(self, job: object, layout: Layout, settings: Settings) -> None:
        def on_step(share: float) -> bool:
            if job is self._job:
                self._progress.value = share
            return job is self._job

        with self._pipe_is_free:
            if job is not self._job:
                return
            try:
                made = render(layout, self.pipe, settings, detector=self.detector, on_step=on_step)
            except Exception as error:  # whatever it is: it is shown, and the button works again
                if job is self._job:
                    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                    self._finish(f"{name}{error}", bad=True)
                return
        if job is self._job:
            self.renders = [*self.renders, made][-HISTORY:]
            self._word = self._word if self._word in made.attention else None
            self._finish(" ".join([f"{made.seconds:.1f} s.", *made.remarks]))
            self._show(made)

    def _drop(self) -> None:
        """The render that runs ends after its next step, also while it sketches."""
        self._job = None

    def _finish(self, text: str, *, bad: bool = False) -> None:
        self._job = None
        self._render_button.disabled, self._cancel_button.disabled = False, True
        self._progress.layout.visibility = "hidden"
        self._say(text, bad=bad)

    def _say(self, text: str, *, bad: bool = False) -> None:
        kind = "bad" if bad else ""
        self._message.value = f'<p class="lrd-message {kind}" role="status">{html.escape(text)}</p>'

    def _edited(self, _: Any) -> None:
        """Live mode: render after a pause; what is half drawn waits for the next edit."""
        if not self._live.value:
            return
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(LayoutError):
            layout_of(self.editor.document)
            self._timer = threading.Timer(PAUSE, self.start)
            self._timer.daemon = True
            self._timer.start()

    # -------------------------------------------------------------- what one sees

    def _build(self, settings: Settings, live: bool) -> None:
        def slider(kind: Any, text: str, value: float, low: float, high: float, step: float) -> Any:
            return kind(
                value=value,
                min=low,
                max=high,
                step=step,
                description=text,
                continuous_update=False,
                style={"description_width": "104px"},
                layout={"width": "300px"},
            )

        whole, real = ipywidgets.IntSlider, ipywidgets.FloatSlider
        fraction = settings.layered_fraction
        if fraction is None:
            fraction = getattr(named(settings.method), "layered_fraction", 0.0)
        self._sliders = {
            "seed": slider(whole, "seed", settings.seed, 0, 999, 1),
            "steps": slider(whole, "steps", settings.steps, 1, 100, 1),
            "guidance_scale": slider(real, "guidance γ", settings.guidance_scale, 1, 15, 0.5),
            "layered_fraction": slider(real, "layered part t0", fraction, 0, 1, 0.05),
            "strength": slider(real, "strength of ξ", settings.strength, 0, 3, 0.1),
            "method": ipywidgets.Dropdown(
                options=list(METHODS),
                value=settings.method,
                description="method",
                style={"description_width": "104px"},
                layout={"width": "300px"},
            ),
        }
        self._allow(settings.method)
        self._sliders["method"].observe(self._take_method, "value")
        self._render_button = ipywidgets.Button(description="Render", button_style="primary")
        self._cancel_button = ipywidgets.Button(description="Cancel", disabled=True)
        self._live = ipywidgets.ToggleButton(
            value=live, description="Live", tooltip="Render after each pause in editing"
        )
        for button in (self._render_button, self._cancel_button, self._live):
            button.layout.width = "96px"
        hidden = {"width": "300px", "visibility": "hidden"}
        self._progress = ipywidgets.FloatProgress(max=1, layout=hidden)
        self._message = ipywidgets.HTML()
        # Not before the last edit is here: a click may overtake it.
        self._render_button.on_click(lambda _: self.editor.when_drawn(self.start))
        self._cancel_button.on_click(self.cancel)
        for watched in (*self._sliders.values(), self._live):
            watched.observe(self._edited, "value")
        self.editor.observe(self._edited, "document")

        self._view = ipywidgets.ToggleButtons(options=["picture", "asked", "found"])
        self._view.style.button_width = "84px"
        self._view.observe(self._look_again, "value")
        self._picture = ipywidgets.HTML()
        self._words = ipywidgets.HBox()
        self._numbers = ipywidgets.HTML()
        self._strip = ipywidgets.HBox()
        self._words.add_class("lrd-words")
        self._strip.add_class("lrd-strip")
        buttons = ipywidgets.HBox([self._render_button, self._cancel_button, self._live])
        controls = ipywidgets.VBox(
            [*self._sliders.values(), buttons, self._progress, self._message, self._numbers]
        )
        picture = ipywidgets.VBox([self._view, self._picture, self._words])
        picture.add_class("lrd-result")
        self._below = ipywidgets.HBox([controls, picture])
        self._below.add_class("lrd-below")

    def _take_method(self, change: dict[str, Any]) -> None:
        method = METHODS[change["new"]]
        if isinstance(method, Choices):
            self._sliders["layered_fraction"].value = method.layered_fraction
        self._allow(change["new"])

    def _allow(self, name: str) -> None:
        """Only the sliders that the method looks at can be moved."""
        method = METHODS[name]
        layered = isinstance(method, Choices)
        self._sliders["layered_fraction"].disabled = not layered
        self._sliders["strength"].disabled = not (layered and method.guided)

    def _show(self, made: Render | None = None) -> None:
        """Show a render: its picture, its words, its IoUs, and its place in the strip."""
        if made is None:
            self._picture.value = '<p class="lrd-empty">Press Render to see the picture here.</p>'
            return
        self._shown = made
        self._words.children = [self._word_button(word) for word in made.attention]
        self._numbers.value = _table(made)
        self._strip.children = [self._thumbnail(each) for each in self.renders]
        self._draw()

    def _look_again(self, _: Any) -> None:
        self._word = None
        self._draw()

    def _draw(self) -> None:
        made = self._shown
        if made is None:
            return
        image, below = made.image, made.layout.caption
        if self._word is not None:
            image = heat(image, made.attention[self._word])
            below = f"Where the model looks for “{self._word}” (bright = much)"
        view = None if self._word else self._view.value
        layers = json.loads(made.layout.to_json())["layers"]
        found = made.found or [None] * len(layers)
        if view == "found":
            below = "Dashed: what the detector found. " + (
                "" if made.found else "There is no detector for these prompts."
            )
        picture = layout_svg(
            layers if view in ("asked", "found") else [],
            image.size,
            picture=reduced_data_uri(image),
            found=found if view == "found" else (),
            label=f"{below} (seed {made.settings.seed})",
        )
        text = html.escape(below)
        self._picture.value = f'<figure class="lrd-figure">{picture}<p>{text}</p></figure>'
        for button in self._words.children:
            button.button_style = "info" if button.description == self._word else ""

    def _word_button(self, word: str) -> ipywidgets.Button:
        button = ipywidgets.Button(
            description=word, tooltip=f"Where does the model look for {word!r}?"
        )
        button.layout.width = "auto"

        def clicked(_: Any) -> None:
            self._word = None if self._word == word else word
            self._draw()

        button.on_click(clicked)
        return button

    def _thumbnail(self, made: Render) -> ipywidgets.VBox:
        mean = "" if made.ious is None else f" · {sum(made.ious) / len(made.ious):.2f}"
        button = ipywidgets.Button(
            description=f"seed {made.settings.seed}{mean}",
            tooltip=f"Show again: {made.layout.caption}; seed · mean IoU; {made.settings}",
            button_style="info" if made is self._shown else "",
        )
        button.layout.width = "128px"
        button.on_click(lambda _: self._show(made))
        caption = html.escape(made.layout.caption, quote=True)
        uri = reduced_data_uri(made.image, 128)
        picture = ipywidgets.HTML(f'<img src="{uri}" alt="{caption}">')
        return ipywidgets.VBox([picture, button])


def _picture_size(pipe: LayeredRenderingPipeline) -> tuple[int, int]:
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def heat(image: Image.Image, attention: Float[Tensor, "height width"]) -> Image.Image:
    """The picture in grey under its attention map (cividis, from its least to its most)."""
    least, most = attention.min(), attention.max()
    share = ((attention - least) / (most - least).clamp(min=1e-12)).float().cpu().numpy()
    colours = Image.fromarray(matplotlib.colormaps["cividis"](share, bytes=True)).convert("RGB")
    colours = colours.resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(image.convert("L").convert("RGB"), colours, 0.7)


def _table(made: Render) -> str:
    if made.ious is None:
        return ""
    rows = "".join(
        f"<tr><td>{number}</td><td>{html.escape(layer.prompt)}</td>"
        f'<td><span class="bar"><span style="width:{100 * iou:.0f}%"></span></span></td>'
        f"<td>{iou:.2f}</td></tr>"
        for number, (layer, iou) in enumerate(
            zip(made.layout.layers, made.ious, strict=True), start=1
        )
    )
    return f'<table class="lrd-ious"><caption>IoU with what was found</caption>{rows}</table>'
