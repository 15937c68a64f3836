"""`LayoutStudio`: draw a layout, render it, and look at what came of it.

studio = LayoutStudio(pipe)    # as the last line of a cell: shows it
studio.editor.layout           # what is drawn
studio.renders[-1].image       # the last picture

Without a widget `render` does the same: one layout in, one `Render` out.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets
import matplotlib
import torch
import traitlets
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lrd_helpers.attention import AttentionMaps, capture_attention
from lrd_helpers.benchmark.layouts import load_layouts
from lrd_helpers.layout import Layer, Layout, LayoutError
from lrd_helpers.mask import Box
from lrd_helpers.measure import Detection, Detector, StorybookDetector, found_boxes, layout_iou
from lrd_helpers.methods import METHODS, Choices, Method, check_opacity, named
from lrd_helpers.methods.regions import asked_prompt, phases
from lrd_helpers.pictures import Picture, picture_of, reduced_data_uri
from lrd_helpers.pipeline import texts_of_layout
from lrd_helpers.sampling.memory import Memory
from lrd_helpers.sampling.run import Run
from lrd_helpers.sampling.steps import Steps
from lrd_helpers.widgets.box_editor import BoxEditor, layer_colours, layout_of, layout_svg
from lrd_helpers.widgets.column import Column
from lrd_helpers.widgets.page import page_text
from lrd_helpers.words import WHOLE_WORDS, WordError, faults_of_text

if TYPE_CHECKING:
    from lrd_helpers.pipeline import LayeredRenderingPipeline

HISTORY = 6
"""So many renders are kept to compare."""

PAUSE = 0.7
"""Seconds without an edit after which live mode renders."""

QUICK = 0.3
"""So many seconds a picture that follows the hand should take: its steps are chosen for that."""

SLOW = 1.0
"""Where it takes more seconds, nothing follows by itself."""

QUICK_STEPS = (4, 10)
"""So many steps such a picture has, least and most. Of four a collage makes the last one."""


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
        found: for each layer the box that was found; None without a detector that knows a word.
        ious: for each layer the IoU of what was found with what was asked, None for a layer whose
            prompt the detector does not know; None without a detector that knows a word.
        seconds: what it took.
        remarks: what the pipeline warned of.
    """

    layout: Layout
    settings: Settings
    image: Image.Image
    attention: dict[str, Float[Tensor, "height width"]]
    found: list[Box | None] | None
    ious: list[float | None] | None
    seconds: float
    remarks: tuple[str, ...]


def render(
    layout: Layout,
    pipe: LayeredRenderingPipeline,
    settings: Settings | None = None,
    *,
    detector: Detector | None = None,
    attention: bool = True,
    memory: Memory | None = None,
    on_step: Callable[[float], bool] | None = None,
) -> Render | None:
    """Draw a layout and look at the picture: the plain function behind `LayoutStudio`.

    Args:
        layout: what is wanted.
        pipe: draws it.
        settings: how; `Settings()` by default.
        detector: finds the layers in the picture; without one there are no IoUs.
        attention: whether it is noted where the model looks for each word.
        memory: of the pictures before: what they have in common with this one is not drawn anew.
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
    remarks += _faults(layout, pipe)
    run.draw_noise()
    run.memory = memory
    prompts = prompts_looked_at(run, method) if attention else []
    with torch.no_grad(), run.model.drawing():
        if memory is not None:
            memory.begin(run.model, prompts)
        looking = capture_attention(pipe, prompts) if prompts else contextlib.nullcontext()
        with looking as maps:
            latents = _drawn(run, method, on_step)
        if latents is None:
            return None
        image = picture_of(run.model.decode(latents)[0] / 2 + 0.5)
    found, ious = _judged(layout, image, detector) if detector else (None, None)
    seconds = time.perf_counter() - start
    words = {} if maps is None else _maps(maps)
    return Render(layout, settings, image, words, found, ious, seconds, tuple(remarks))


def _drawn(
    run: Run, method: Method, on_step: Callable[[float], bool] | None
) -> Float[Tensor, "1 channels height width"] | None:
    """The latents of the picture; None where `on_step` ends it."""
    sketches, rest = method.count(run)
    latents, made = run.x_T, Counter()
    for state in method.sample(run):
        latents = state.latents
        made[state.sketch] += 1
        done = made[True] if state.sketch else sketches + made[False]
        if on_step is not None and not on_step(done / (sketches + rest)):
            return None
    return latents


def _faults(layout: Layout, pipe: LayeredRenderingPipeline) -> list[str]:
    """What the model does not know or read, each once: a layer's fault is often the caption's."""
    texts, names = texts_of_layout(layout), {}
    for name, text in [*texts[2:], *texts[:2]]:  # the layers', then caption and background
        for fault in faults_of_text(pipe.tokenizer, text):
            names.setdefault(fault, name)
    return [f"{name}: {fault}" for fault, name in names.items()]


def _judged(
    layout: Layout, image: Image.Image, detector: Detector
) -> tuple[list[Box | None] | None, list[float | None] | None]:
    """`found` and `ious` of a `Render`; the detector looks once at what it knows."""
    prompts = list(dict.fromkeys(layer.prompt for layer in layout.layers))
    try:
        seen = dict(zip(prompts, detector(image, prompts), strict=True))
    except ValueError:  # a prompt with no word it knows; the others count all the same
        seen = {}
        for prompt in prompts:
            with contextlib.suppress(ValueError):
                [seen[prompt]] = detector(image, [prompt])
    if not seen:
        return None, None

    def told(_: Any, asked: Sequence[str]) -> list[list[Detection]]:
        return [seen.get(prompt, []) for prompt in asked]

    known = [layer.prompt in seen for layer in layout.layers]
    boxes, ious = found_boxes(told, image, layout), None
    with contextlib.suppress(ValueError):  # a mask, and a detector that gives boxes only
        ious = [
            iou if k else None
            for iou, k in zip(layout_iou(told, image, layout), known, strict=True)
        ]
    return boxes, ious


def layout_in(image: Picture, detector: Detector, prompts: Sequence[str] | None = None) -> Layout:
    """What a detector finds in a picture, as a layout to begin with; the largest is furthest back.

    Args:
        image: any picture.
        detector: finds the things.
        prompts: what to look for. A `StorybookDetector` needs none: it describes the picture.

    Raises:
        LayoutError: nothing is found.
        ValueError: what the detector refuses, or no prompts for one that needs them.
    """
    background = ""
    if prompts is not None:
        answers = zip(prompts, detector(image, prompts), strict=True)
        things = [(prompt, thing.box) for prompt, found in answers for thing in found]
    elif isinstance(detector, StorybookDetector):
        seen = detector.describe(image)
        background = seen.place
        things = [(f"a {each.colour} {each.sticker}", each.box) for each in seen.stickers]
    else:
        raise ValueError(
            f"prompts is None, but {type(detector).__name__} needs to know what to find"
        )
    if not things:
        raise LayoutError("nothing was found in the picture")
    things.sort(key=lambda thing: -(thing[1][2] - thing[1][0]) * (thing[1][3] - thing[1][1]))
    layers = [Layer(prompt, box=box) for prompt, box in things]
    names = " and ".join(prompt for prompt, _ in things)
    return Layout(f"{names} {background}".strip(), background=background, layers=layers)


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


class StudioPanel(anywidget.AnyWidget):
    """What stands around the studio's editor in the page; `LayoutStudio` hears its messages."""

    _esm = page_text("elements.js", "studio.js")
    _css = page_text("theme.css", "fields.css", "studio.css")

    methods = traitlets.Dict().tag(sync=True)  # name → which sliders it looks at
    settings = traitlets.Dict().tag(sync=True, echo_update=False)
    live = traitlets.Bool(False).tag(sync=True, echo_update=False)
    follow = traitlets.Dict().tag(sync=True)  # whether it is `on`, and `why`
    job = traitlets.Dict().tag(sync=True)  # what is said of a render, and the share done
    shown = traitlets.Dict().tag(sync=True)  # the picture, and what stands around it
    strip = traitlets.List().tag(sync=True)  # the last renders, small


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be drawn; `quick`: while the hand drags, for a look only."""

    layout: Layout
    settings: Settings
    quick: bool = False


class LayoutStudio(Column):
    """An editor, the settings, a Render button, and the picture with all one can ask of it.

    A render runs beside the notebook (cells can be run meanwhile, but not with the same pipeline),
    shows its progress, and can be cancelled. It draws the layout as it was when it began. While
    a cell runs, Python does not hear the page, which says so; what was clicked comes after it.

    With *Follow* the picture follows the hand: while a box is dragged it is drawn again and again
    in few steps, and when the box is let go in all steps. What does not change from picture to
    picture (with a collage: the sketches) is kept, see `Memory`.

    Args:
        pipe: draws the pictures.
        layout: what to begin with.
        detector: finds the layers in the pictures; by default the shipped one, for pipelines with
            the vocabulary of its world.
        live: render by itself after each pause in editing.
        follow: the picture follows the hand; by default where that is quick enough, which the
            first picture tells.
        settings: where the sliders begin.

    Attributes:
        editor: the `BoxEditor`; the picture that is shown lies under its boxes, too.
        renders: the last renders, the latest at the end.
    """

    def __init__(
        self,
        pipe: LayeredRenderingPipeline,
        layout: Layout | None = None,
        *,
        detector: Detector | None = None,
        live: bool = False,
        follow: bool | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.pipe = pipe
        if detector is None and len(pipe.tokenizer) <= WHOLE_WORDS:
            detector = StorybookDetector()
        self.detector = detector
        self.editor = BoxEditor(layout, size=_picture_size(pipe), starters=starters())
        self.editor._picture_opacity = 0.5  # what is drawn on it is still seen
        self.renders: list[Render] = []
        self._shown: Render | None = None
        self._view, self._word = "picture", ""
        self._job: Job | None = None  # the render that counts; any other one is outdated
        self._next: Job | None = None  # the newest that the hand asked for while one runs
        self._changes = threading.RLock()  # of these two, and of what is shown of them
        self._memory = Memory()
        self._quick_steps, self._slow = QUICK_STEPS[0], 0
        self._follow_is_chosen = follow is not None
        self._pipe_is_free = threading.Lock()
        self._thread: threading.Thread | None = None
        self._timer: threading.Timer | None = None
        self._panel = StudioPanel(methods=_looked_at(), live=live)
        self.settings = settings or Settings()
        tells = "the first picture tells whether it is quick enough"
        self._set_follow(bool(follow), tells if follow is None else "")
        self._panel.on_msg(self._on_message)
        self._panel.add_class("lrd-contents")
        self.editor.observe(self._edited, "document")
        bench = ipywidgets.VBox([self.editor, self._panel])
        bench.add_class("lrd-bench")
        super().__init__([bench])
        self.add_class("lrd-studio")

    @property
    def settings(self) -> Settings:
        """What the sliders say."""
        return Settings(**self._panel.settings)

    @settings.setter
    def settings(self, settings: Settings) -> None:
        fraction = settings.layered_fraction
        if fraction is None:
            fraction = getattr(named(settings.method), "layered_fraction", 0.0)
        self._panel.settings = asdict(replace(settings, layered_fraction=fraction))

    def start(self) -> None:
        """Render what is drawn now, beside the notebook; a render that still runs is dropped.

        What is not finished is said in the editor.
        """
        try:
            layout = self.editor.layout
        except LayoutError as error:
            self._say(str(error), bad=True)
            return
        self._say("Rendering …", share=0.0)
        self._begin(Job(layout, self.settings))

    def cancel(self) -> None:
        """Stop the render that runs, if one does: it ends after its next step."""
        with self._changes:
            running, self._job, self._next = self._job, None, None
        if running is not None:
            self._say("Cancelled.")

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the render that runs is done."""
        if self._timer is not None:
            self._timer.join(seconds)
        if self._thread is not None:
            self._thread.join(seconds)

    def start_from(self, image: Picture, prompts: Sequence[str] | None = None) -> None:
        """Draw what the detector finds in a picture (see `layout_in`), and show it under the boxes.

        Raises:
            LayoutError: nothing is found, or there is no detector.
            ValueError: as `layout_in` does.
        """
        if self.detector is None:
            raise LayoutError("there is no detector: LayoutStudio(pipe, detector=…)")
        self.editor.layout = layout_in(image, self.detector, prompts)
        self.editor.show_behind(image)

    def __repr__(self) -> str:
        return f"LayoutStudio({self.editor!r}, {len(self.renders)} renders)"

    # -------------------------------------------------------------- rendering

    def _begin(self, job: Job) -> None:
        """Draw this in place of what is drawn now."""
        with self._changes:
            self._job, self._next = job, None
        self._thread = threading.Thread(target=self._work, args=(job,), daemon=True)
        self._thread.start()

    def _work(self, job: Job | None) -> None:
        """Draw a job, and then what the hand asked for meanwhile."""
        while job is not None:
            with self._pipe_is_free:
                made = self._made(job) if job is self._job else None
            with self._changes:
                if job is not self._job:
                    return
                if isinstance(made, Render):
                    self._note_pace(job, made)
                    self._show_quickly(made) if job.quick else self._keep(made)
                elif made:
                    self._say(made, bad=True)
                job = self._job = self._next
                self._next = None

    def _made(self, job: Job) -> Render | str | None:
        """The picture; or the sentence of what went wrong; None where it is outdated."""

        def on_step(share: float) -> bool:
            if job is self._job and not job.quick:
                self._say("Rendering …", share=share)
            return job is self._job

        detector = None if job.quick else self.detector
        options = {"attention": not job.quick, "memory": self._memory, "on_step": on_step}
        try:
            return render(job.layout, self.pipe, job.settings, detector=detector, **options)
        except Exception as error:  # whatever it is: it is shown, and the button works again
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return f"{name}{error}"

    def _keep(self, made: Render) -> None:
        self.renders = [*self.renders, made][-HISTORY:]
        self._show(made)
        self._say("Done.")

    def _say(self, text: str, **more: Any) -> None:
        """Say what a render does: `share` of it is done, or it is `bad`."""
        self._panel.job = {"text": text} | more

    def _edited(self, change: Any = None) -> None:
        """Live mode: render after a pause; what is half drawn waits for the next edit.

        Where the picture follows, what moves layers is rendered at once.
        """
        moved = change is not None and _texts(change["old"]) == _texts(change["new"])
        follows = self._panel.follow["on"] and moved
        if not (self._panel.live or follows):
            return
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(LayoutError):
            layout_of(self.editor.document)
            if follows:
                return self.start()
            self._timer = threading.Timer(PAUSE, self.start)
            self._timer.daemon = True
            self._timer.start()

    # -------------------------------------------------------------- the picture follows the hand

    def _set_follow(self, on: bool, why: str = "") -> None:
        self._panel.follow = {"on": on, "why": why}
        self.editor.follow(self._on_hand if on else None)

    def _on_hand(self, document: dict[str, Any] | None) -> None:
        """Draw quickly what the hand makes of the layout, when the last quick picture is done.

        A full picture that is being drawn is dropped; what it has sketched is kept.
        """
        if document is None:
            return self._let_go()
        with contextlib.suppress(LayoutError):
            steps = min(self._quick_steps, self.settings.steps)
            job = Job(layout_of(document), replace(self.settings, steps=steps), quick=True)
            with self._changes:
                if self._job is not None and self._job.quick:
                    self._next = job
                    return None
            self._say(f"Following the hand, in {steps} steps.")
            self._begin(job)
        return None

    def _let_go(self) -> None:
        """The hand let go: the full picture is on its way, or begins, or was there before."""
        with self._changes, contextlib.suppress(LayoutError):
            if self._job is not None and not self._job.quick:
                return
            self._job = self._next = None
            if self._shown is None or self._shown.layout != layout_of(self.editor.document):
                self.start()
            else:
                self._show(self._shown)
                self._say("")

    def _show_quickly(self, made: Render) -> None:
        """Show a quick picture; what was known of the last does not hold for it."""
        self.editor.show_behind(made.image)
        layers = json.loads(made.layout.to_json())["layers"] if self._view != "picture" else []
        told = _told(made)
        label = f"A quick picture ({told})"
        svg = layout_svg(layers, made.image.size, picture=reduced_data_uri(made.image), label=label)
        more = {"svg": svg, "text": made.layout.caption, "told": told, "quick": True}
        self._panel.shown = self._panel.shown | more | {"word": "", "name": ""}

    def _note_pace(self, job: Job, made: Render) -> None:
        """From what a picture took: the steps of the next quick one, and whether it is worth it."""
        least, most = QUICK_STEPS
        seconds = made.seconds
        if job.quick:
            wanted = round(job.settings.steps * QUICK / seconds)
            self._quick_steps = min(max(wanted, least), most)
            self._slow = self._slow + 1 if seconds > SLOW else 0
            slow = self._slow > 1  # the first may have had sketches to draw
        else:
            seconds *= min(1, least / job.settings.steps)
            slow = seconds > SLOW
        if not self._follow_is_chosen:
            why = f"a quick picture takes about {seconds:.1f} s here"
            self._set_follow(not slow, why if slow else "")

    # -------------------------------------------------------------- the page

    def _on_message(self, _: Any, message: Mapping[str, Any], __: Any) -> None:
        self._panel.send({"kind": "received", "number": message.get("number")})
        self._panel.set_state({n: message[n] for n in ("settings", "live") if n in message})
        kind = message.get("kind")
        if kind == "set":
            self._edited()
        elif kind == "render":  # not before the last edit is here: a click may overtake it
            self.editor.when_drawn(self.start)
        elif kind == "cancel":
            self.cancel()
        elif kind == "follow":
            self._follow_is_chosen = True
            self._set_follow(bool(message["on"]))
        elif kind == "look" and self._shown is not None:
            self._view, self._word = message["view"], message["word"]
            self._draw()
        elif kind == "show":
            self._go_back(message["name"])
        elif kind == "boxes" and self._shown is not None:
            self._take_boxes(self._shown)

    def _go_back(self, name: str) -> None:
        """Show an earlier render, and set the sliders as they were for it."""
        for made in self.renders:
            if str(id(made)) == name:
                self.settings = made.settings
                if self._job is None:
                    self._say("")
                self._show(made)

    def _take_boxes(self, made: Render) -> None:
        describes = isinstance(self.detector, StorybookDetector)
        prompts = None if describes else [layer.prompt for layer in made.layout.layers]
        try:
            self.start_from(made.image, prompts)
        except ValueError as error:
            self._say(str(error), bad=True)

    def _show(self, made: Render) -> None:
        """Show a render: its picture, its words, its IoUs, and its place in the strip."""
        self._shown, self._word = made, ""
        self._panel.strip = [_thumbnail(each) for each in self.renders]
        self.editor.show_behind(made.image)
        self._draw()

    def _draw(self) -> None:
        made, word = self._shown, self._word
        image, below = made.image, made.layout.caption
        view = "" if word else self._view
        layers = json.loads(made.layout.to_json())["layers"]
        if word:
            image = heat(image, made.attention[word])
            below = f"Where the model looks for “{word}” (bright = much)"
        if view == "found":
            below = "Dashed: what the detector found."
            if not made.found:
                below += " There is no detector for these prompts."
        picture = layout_svg(
            layers if view in ("asked", "found") else [],
            image.size,
            picture=reduced_data_uri(image),
            found=made.found or () if view == "found" else (),
            label=f"{below} (seed {made.settings.seed})",
        )
        self._panel.shown = {
            "name": str(id(made)),
            "view": self._view,
            "word": word,
            "words": list(made.attention),
            "svg": picture,
            "text": below,
            "told": _told(made),
            "remarks": list(made.remarks),
            "ious": _ious(made, layers),
            "boxes": self.detector is not None,
            "quick": False,
        }


@functools.cache
def starters() -> tuple[Layout, ...]:
    """Layouts to begin with: of each kind in the benchmark the first, those of masks left out."""
    kinds: dict[str, Layout] = {}
    for each in load_layouts():
        if all(layer.mask is None for layer in each.layout.layers):
            kinds.setdefault(each.stratum, each.layout)
    return tuple(kinds.values())


def _looked_at() -> dict[str, dict[str, Any]]:
    """For each method the layered part it brings, and which sliders it looks at."""
    return {
        name: {
            "layered_fraction": getattr(method, "layered_fraction", 0.0),
            "layered": isinstance(method, Choices),
            "guided": isinstance(method, Choices) and method.guided,
        }
        for name, method in METHODS.items()
    }


def _texts(document: Mapping[str, Any]) -> list[str]:
    """What is written in a draft, in any order."""
    prompts = sorted(layer["prompt"] for layer in document["layers"])
    return [document["caption"], document["background"], *prompts]


def _told(made: Render) -> str:
    settings = made.settings
    return (
        f"seed {settings.seed} · {settings.steps} steps · {settings.method} · {made.seconds:.1f} s"
    )


def _ious(made: Render, layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the table of a render has: a line a layer."""
    if made.ious is None:
        return []
    rows = zip(layers, layer_colours(layers), made.ious, strict=True)
    return [{"prompt": each["prompt"], "colour": c, "iou": iou} for each, c, iou in rows]


def _thumbnail(made: Render) -> dict[str, str]:
    judged = [iou for iou in made.ious or [] if iou is not None]
    mean = f" · {sum(judged) / len(judged):.2f}" if judged else ""
    return {
        "name": str(id(made)),
        "uri": reduced_data_uri(made.image, 128),
        "label": f"seed {made.settings.seed}{mean}",
        "about": f"Show again: {made.layout.caption} ({_told(made)}; the number is the mean IoU)",
    }


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
