"""The editor of layers: what Python keeps, and the page in a real browser."""

from __future__ import annotations

import base64
import io
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import editor_page
import numpy
import pytest
import torch
from editor_page import Page, touch
from PIL import Image
from widget_page import SCREENSHOTS

import lrd_helpers
from lrd_helpers.layerdiff.stack import LayerStack, StackError, StackLayer
from lrd_helpers.storybook import PlacedSticker, Scene, render_scenes
from lrd_helpers.widgets import StackEditor

tab, shown = editor_page.tab, editor_page.shown  # pytest has them by these names


def images_of(pixels: torch.Tensor) -> list[Image.Image]:
    arrays = (255 * pixels).round().byte().movedim(-3, -1).numpy()
    return [Image.fromarray(array) for array in arrays]


@pytest.fixture(scope="module")
def stack() -> LayerStack:
    """A house far back, a cat in front of it, and a balloon: rendered, not generated."""
    stickers = (
        PlacedSticker("house", "yellow", (0.58, 0.55), (0.55, 0.55)),
        PlacedSticker("cat", "purple", (0.36, 0.66), (0.42, 0.42)),
        PlacedSticker("balloon", "red", (0.16, 0.24), (0.2, 0.3)),
    )
    made = render_scenes([Scene("on snow", stickers, "a yellow house, a purple cat")])
    prompts = [f"a {placed.colour} {placed.sticker}" for placed in stickers]
    layers = [
        StackLayer(prompt, image)
        for prompt, image in zip(prompts, images_of(made.rgba[0]), strict=True)
    ]
    caption = " and ".join(prompts) + " on snow"
    [ground] = images_of(made.backgrounds)
    return LayerStack(ground, layers, caption=caption, background_prompt="on snow")


def turned(image: Image.Image) -> Image.Image:
    """The layer in other colours."""
    red, green, blue, alpha = image.split()
    return Image.merge("RGBA", (blue, red, green, alpha))


class Pipe:
    """Makes a layer anew in other colours, and a picture as its mirror image.

    As in LayerDiffPipeline, a layer that is made anew is where it is drawn, and shown; the caption
    follows its prompt.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        raise AssertionError("the widget shows the progress")

    def redraw(
        self, stack: LayerStack, layer: int, prompt: str, *, generator: torch.Generator
    ) -> LayerStack:
        old = stack.layers[layer]
        self.asked.append((old.prompt, prompt, generator.initial_seed()))
        if not prompt:
            raise ValueError(f"layer {layer} has no prompt")
        for _ in self.progress_bar(range(4)):
            self.go_on.wait(20)
        new = {"prompt": prompt, "image": turned(old.image), "offset": (0, 0), "hidden": False}
        caption = stack.caption.replace(old.prompt, prompt)
        return replace(stack.changed(layer, **new), caption=caption, composite=stack.flatten())

    def harmonise(self, stack: LayerStack, *, generator: torch.Generator) -> Image.Image:
        with self.progress_bar(total=2) as bar:
            bar.update()
            bar.update()
        return stack.flatten().transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def same(one: LayerStack, other: LayerStack) -> bool:
    def seen(stack: LayerStack) -> list[Any]:
        layers = [
            (each.prompt, each.image.tobytes(), each.offset, each.opacity, each.hidden)
            for each in stack.layers
        ]
        composite = None if stack.composite is None else stack.composite.tobytes()
        words = stack.caption, stack.background_prompt
        return [stack.background.tobytes(), layers, words, composite]

    return seen(one) == seen(other)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[StackEditor], list[dict]]:
    """What an editor says to its page; nobody answers for a page that is asked."""

    def listen(editor: StackEditor) -> list[dict]:
        messages: list[dict] = []
        monkeypatch.setattr(
            editor,
            "send",
            lambda message, buffers=(): messages.append(message | {"buffers": list(buffers)}),
        )
        monkeypatch.setattr(editor, "when_drawn", lambda then: then())
        return messages

    return listen


# ------------------------------------------------------------------ Python


def test_every_stack_comes_out_as_it_went_in(stack: LayerStack) -> None:
    edits = [
        stack,
        stack.moved(1, (0.1, -0.05)).restacked([2, 0, 1]),
        stack.changed(0, opacity=0.25, hidden=True, prompt="").without(1),
        stack.added(stack.layers[0]),  # twice the same picture
        LayerStack(stack.background, (), composite=stack.flatten()),
    ]
    editor = StackEditor(edits[0])
    for edited in edits:
        assert same(StackEditor(edited).stack, edited)
        editor.stack = edited
        assert same(editor.stack, edited)
        ids = [layer["id"] for layer in editor.document["layers"]]
        assert len(set(ids)) == len(ids)
    assert len(editor._pictures) == 5, "each picture goes to the page once"


def test_layers_keep_their_names_when_python_moves_them(stack: LayerStack) -> None:
    editor = StackEditor(stack)
    before = [layer["id"] for layer in editor.document["layers"]]
    editor.stack = editor.stack.moved(0, (0.5, 0)).restacked([1, 0, 2])
    assert [layer["id"] for layer in editor.document["layers"]] == [before[1], before[0], before[2]]


def test_what_is_no_stack_for_this_editor_is_refused(stack: LayerStack) -> None:
    editor = StackEditor(stack)
    with pytest.raises(TypeError, match="stack is of type list, but should be a LayerStack"):
        editor.stack = []
    small = LayerStack(Image.new("RGB", (64, 32)), ())
    with pytest.raises(StackError, match="64 × 32, but the editor was made for 128 × 128"):
        editor.stack = small
    assert same(editor.stack, stack)


def test_large_layers_are_reduced_for_the_page_alone() -> None:
    fog = StackLayer("fog", Image.new("RGBA", (2000, 1500), (255, 0, 0, 128)))
    editor = StackEditor(LayerStack(Image.new("RGB", (2000, 1500)), [fog]))
    for uri in editor._pictures.values():
        shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert shown.size == (1024, 768)
    assert (shown.mode, shown.getpixel((0, 0))) == ("RGB", (0, 0, 0)), "the ground comes last"
    assert editor.stack.layers[0].image.size == (2000, 1500)


def test_repr_and_static_picture(stack: LayerStack) -> None:
    editor = StackEditor(stack)
    names = '"a yellow house", "a purple cat", "a red balloon"'
    assert repr(editor) == f"StackEditor(128 × 128, layers: {names})"
    data, _ = editor._repr_mimebundle_()
    assert data["image/png"] in "".join(editor._static().values())
    assert lrd_helpers.StackEditor is StackEditor


def test_a_layer_is_made_anew_and_what_was_done_meanwhile_stays(
    stack: LayerStack, told: Callable
) -> None:
    pipe = Pipe()
    editor = StackEditor(stack.changed(1, offset=(13, 0), hidden=True), pipe, seed=7)
    messages, shares = told(editor), []
    editor.observe(lambda change: shares.append(change["new"].get("share")), "_job")
    layers = [dict(layer) for layer in editor.document["layers"]]
    layers[1]["prompt"] = "a green cat"  # typed in the page
    editor.document = editor.document | {"layers": layers}
    pipe.go_on.clear()
    editor._on_message(editor, {"kind": "redraw", "layer": layers[1]["id"]}, [])
    with pytest.raises(StackError, match="something else is being made"):
        editor.harmonise()
    layers = [layers[1] | {"opacity": 0.5}, layers[0] | {"offset": [1, 2]}, layers[2]]
    editor.document = editor.document | {"layers": layers}
    pipe.go_on.set()
    editor.wait()
    assert pipe.asked == [("a purple cat", "a green cat", 7)]
    new = turned(stack.layers[1].image)
    cat = StackLayer("a green cat", new, opacity=0.5)
    house = replace(stack.layers[0], offset=(1, 2))
    assert same(
        editor.stack,
        replace(
            stack,
            layers=(cat, house, stack.layers[2]),
            caption="a yellow house and a green cat and a red balloon on snow",
            composite=stack.changed(1, hidden=True).flatten(),
        ),
    )
    assert editor.document["layers"][0]["id"] == layers[0]["id"], "so that it stays selected"
    assert shares == [None, 0.25, 0.5, 0.75, 1, None]
    assert messages[-1]["text"] == "“a green cat” is new. Seed 7."
    assert not messages[-1]["warn"]
    assert "progress_bar" not in vars(pipe)
    editor.redraw(0)
    editor.wait()
    assert pipe.asked[-1] == ("a green cat", "a green cat", 8)


def test_a_layer_that_is_gone_does_not_come_back(stack: LayerStack, told: Callable) -> None:
    pipe = Pipe()
    editor = StackEditor(stack, pipe)
    messages = told(editor)
    pipe.go_on.clear()
    editor.redraw("a purple cat")
    editor.stack = editor.stack.without(1)
    pipe.go_on.set()
    editor.wait()
    assert same(editor.stack, stack.without(1))
    assert "was deleted meanwhile" in messages[-1]["text"]


def test_a_harmonised_picture_is_there_until_the_next_edit(
    stack: LayerStack, told: Callable
) -> None:
    editor = StackEditor(stack, Pipe())
    told(editor)
    editor._on_message(editor, {"kind": "harmonise"}, [])
    editor.wait()
    mirrored = stack.flatten().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert editor.harmonised.tobytes() == mirrored.tobytes()
    assert editor._harmonised.startswith("data:image/png")
    assert same(editor.stack, stack)
    editor.stack = stack.without(0)
    assert (editor.harmonised, editor._harmonised) == (None, "")


def test_what_goes_wrong_is_said_and_the_buttons_work_again(
    stack: LayerStack, told: Callable
) -> None:
    nameless, pipe = stack.changed(0, prompt=""), Pipe()
    editor = StackEditor(nameless, pipe)
    messages = told(editor)
    editor.redraw(0)
    editor.wait()
    assert messages[-1]["text"] == "Nothing was changed: layer 0 has no prompt"
    pipe.harmonise = lambda stack, generator: 1 / 0
    editor.harmonise()
    editor.wait()
    assert messages[-1]["text"] == "Nothing was changed: ZeroDivisionError: division by zero"
    assert messages[-1]["warn"]
    assert editor._job == {}
    assert same(editor.stack, nameless)
    with pytest.raises(StackError, match="no layer of the stack is 'a dog'"):
        editor.redraw("a dog")
    with pytest.raises(StackError, match="no pipeline was given"):
        StackEditor(stack).redraw(0)


def test_a_file_goes_to_the_page_or_the_reason_why_not(
    stack: LayerStack, told: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_stack(stack: LayerStack, path: Path) -> None:
        if path.suffix == ".psd":
            raise ImportError("PSD files need psd-tools: pip install psd-tools")
        path.write_bytes(b"%d layers" % len(stack.layers))

    export = types.SimpleNamespace(save_stack=save_stack)
    monkeypatch.setitem(sys.modules, "lrd_helpers.layerdiff.export", export)
    editor = StackEditor(stack)
    messages = told(editor)
    for suffix in (".ora", ".psd"):
        editor._on_message(editor, {"kind": "export", "suffix": suffix, "number": "7"}, [])
    file, fault = (message for message in messages if message["kind"] != "received")
    assert file == {
        "kind": "file",
        "name": "stack.ora",
        "number": "7",
        "buffers": [b"3 layers"],
    }
    assert fault["text"] == "PSD files need psd-tools: pip install psd-tools"


# ------------------------------------------------------------------ the page

CAT, HOUSE, BALLOON = (0.36, 0.68), (0.72, 0.6), (0.16, 0.2)
"""A place on each sticker that no other covers."""


class StackPage(Page):
    """A page, and the editor that it belongs to, which gets and answers what the page sends."""

    def __init__(self, page: Page, editor: StackEditor) -> None:
        vars(self).update(vars(page))
        self.editor, self.heard = editor, 0

    @property
    def stack(self) -> LayerStack:
        """What Python has after all messages."""
        for message in self.page.evaluate("messages")[self.heard :]:
            self.heard += 1
            self.editor._on_message(self.editor, message, [])
        return self.editor.stack

    def update(self) -> None:
        """Show the page what Python has changed."""
        for name in ("_pictures", "document", "_job", "_harmonised"):
            value = getattr(self.editor, name)
            self.page.evaluate("([name, value]) => model.set(name, value)", [name, value])

    def shows(self, picture: Image.Image) -> bool:
        """Whether the canvas is this picture, if it is as large; its edge is the focus's."""
        canvas = self.page.locator(".canvas")
        usual = canvas.get_attribute("style")
        small = (
            "position: fixed; inset: 0; width: 128px; height: 128px; max-width: none; outline: 0"
        )
        canvas.evaluate("(canvas, style) => { canvas.style.cssText = style }", small)
        shot = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
        canvas.evaluate("(canvas, style) => { canvas.style.cssText = style }", usual)
        seen, meant = (numpy.asarray(each, dtype=int)[6:-6, 6:-6] for each in (shot, picture))
        return bool(abs(seen - meant).max() <= 2)

    def selected(self) -> str:
        return self.page.locator("li.selected .prompt").input_value()


@pytest.fixture
def opened(shown: Callable[..., Page], stack: LayerStack) -> Callable[..., StackPage]:
    def show(pipe: Any = None, **options: Any) -> StackPage:
        editor = StackEditor(stack, pipe)
        page = StackPage(shown(editor, **options), editor)
        page.page.wait_for_function(
            "document.querySelectorAll('.thumb canvas').length === 4 &&"
            "[...document.querySelectorAll('.thumb canvas')].every((each) => each.shows)"
        )
        return page

    return show


def prompts(page: StackPage) -> list[str]:
    return [layer.prompt for layer in page.stack.layers]


@pytest.mark.slow
def test_the_page_lays_layers_over_each_other_as_python_does(opened: Callable) -> None:
    page = opened()
    page.button("Select: layer 2").click()
    page.page.get_by_role("slider", name="Opacity: layer 2").focus()
    page.press(*5 * ["PageDown"])
    page.button("Hide: layer 3").click()
    page.drag(HOUSE, (HOUSE[0] + 0.1, HOUSE[1] - 0.1))
    page.press("Escape")
    stack = page.stack
    assert stack.layers[1].opacity == pytest.approx(0.5, abs=0.02)
    assert stack.layers[2].hidden
    assert stack.layers[0].offset == pytest.approx((13, -13), abs=1)
    assert page.shows(stack.flatten())
    assert not page.shows(stack.changed(1, opacity=0.7).flatten()), "the measure is fine enough"


@pytest.mark.slow
def test_what_is_dragged_is_the_front_layer_that_is_solid_there(opened: Callable) -> None:
    page = opened()
    before = page.stack
    page.drag(CAT, (CAT[0] + 0.25, CAT[1] + 0.125), up=False)
    assert page.page.evaluate("messages.length") == 0, "seen at once, told at the end"
    moved = before.moved("a purple cat", (0.25, 0.125))
    page.page.wait_for_timeout(50)
    frame = page.page.locator(".outline").first
    assert frame.is_visible()
    page.page.mouse.up()
    assert same(page.stack, moved)
    page.button("Undo").click()
    assert same(page.stack, before)
    page.button("Redo").click()
    assert same(page.stack, moved)
    # A corner of the balloon's box, where its alpha is 0, is the background's.
    page.click(0.07, 0.1)
    assert page.page.locator("li.selected").count() == 0
    page.drag(BALLOON, (2, 2))
    x, y = page.stack.layers[2].offset
    assert 100 < x < 128, "its middle stays on the canvas"
    assert 80 < y < 128


@pytest.mark.slow
def test_clicks_go_on_to_what_lies_behind(opened: Callable) -> None:
    page = opened()
    both = (0.5, 0.62)
    page.click(*both)
    first = page.selected()
    page.click(*both)
    assert {first, page.selected()} == {"a purple cat", "a yellow house"}
    assert page.page.evaluate("messages.length") == 0


@pytest.mark.slow
def test_everything_by_keyboard(opened: Callable) -> None:
    page = opened()
    before = page.stack
    page.page.locator(".canvas").focus()
    page.press("PageUp", "PageUp", "ArrowRight", "ArrowRight", "Shift+ArrowUp")
    label = page.page.locator(".canvas").get_attribute("aria-label")
    assert label.startswith("Layer 2 of 3, a purple cat, left 1")
    page.page.wait_for_timeout(200)
    assert page.stack.layers[1].offset == (2, -8)
    page.press("[", "Delete")
    assert prompts(page) == ["a yellow house", "a red balloon"]
    assert "Deleted a purple cat; Ctrl+Z" in page.status
    page.press("Control+z", "Control+z", "Control+z")
    assert same(page.stack, before)
    page.press("Control+Shift+z")
    assert page.stack.layers[1].offset == (2, -8), "arrows in a row are one step"
    page.press("PageUp", "PageUp", "Enter")
    page.page.keyboard.type("!")
    page.press("Tab")
    assert prompts(page)[1] == "a purple cat!"
    nameless = page.page.evaluate(
        """[...document.querySelectorAll("#cell :is(button, input, progress)")].filter((e) =>
           !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).length"""
    )
    assert nameless == 0


@pytest.mark.slow
def test_the_order_by_buttons_and_by_drag(opened: Callable) -> None:
    page = opened()
    page.click(*CAT)
    page.button("Bring forward").click()
    assert prompts(page) == ["a yellow house", "a red balloon", "a purple cat"]
    grips = page.page.locator(".grip")
    start, end = grips.nth(0).bounding_box(), grips.nth(2).bounding_box()
    page.page.mouse.move(start["x"] + 5, start["y"] + 10)
    page.page.mouse.down()
    page.page.mouse.move(end["x"] + 5, end["y"] + 40, steps=4)
    page.page.mouse.up()
    assert prompts(page) == ["a purple cat", "a yellow house", "a red balloon"]
    order = page.page.locator("svg [data-layer]").evaluate_all(
        "all => all.map((e) => e.href.baseVal)"
    )
    pictures = page.editor._pictures
    assert order == [pictures[layer["picture"]] for layer in page.editor.document["layers"]]


@pytest.mark.slow
def test_fingers_move_layers_on_a_telephone(opened: Callable) -> None:
    page = opened(context={"has_touch": True})
    page.page.set_viewport_size({"width": 360, "height": 860})
    page.page.wait_for_timeout(100)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
    touch(page, [CAT], [(0.4, 0.6)], [(CAT[0] + 0.25, CAT[1] - 0.25)])
    assert page.stack.layers[1].offset == pytest.approx((32, -32), abs=1)
    page.screenshot("stack-editor-narrow")


@pytest.mark.slow
def test_a_layer_made_anew_and_a_harmonised_picture(opened: Callable) -> None:
    pipe = Pipe()
    page = opened(pipe)
    assert page.page.locator(".hint").first.is_hidden()
    redraw, harmonise = page.button("Re-generate"), page.button("Harmonise")
    assert redraw.is_disabled()
    page.click(*CAT)
    page.page.keyboard.press("Enter")
    page.page.keyboard.type("!")  # not yet sent: the button sends it first
    assert page.status == "Re-generate makes the layer anew from its new prompt."
    pipe.go_on.clear()
    redraw.click()
    old = page.stack
    page.update()
    assert page.page.locator(".job").is_visible()
    assert harmonise.is_disabled()
    page.screenshot("stack-editor-busy")
    pipe.go_on.set()
    page.editor.wait()
    page.update()
    assert pipe.asked == [("a purple cat", "a purple cat!", 0)]
    assert page.selected() == "a purple cat!"
    assert page.page.locator(".job").is_hidden()
    page.page.wait_for_timeout(100)
    new = page.stack
    assert not same(new, old)
    page.press("Escape")
    assert page.shows(new.flatten())
    page.button("Undo").click()
    assert same(page.stack, old)
    harmonise.click()
    mirrored = page.stack.flatten().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    page.editor.wait()
    page.update()
    page.page.wait_for_timeout(50)
    assert page.shows(mirrored)
    page.button("Back to the layers").click()
    assert page.shows(old.flatten())
    page.button("Harmonised picture").click()
    page.drag(CAT, (0.6, 0.5))
    assert page.stack.layers[1].offset != (0, 0)
    page.update()
    assert page.page.get_by_text("Harmonised picture").is_hidden()


@pytest.mark.slow
def test_without_a_pipeline_the_page_says_why_and_files_are_saved(
    opened: Callable, tmp_path: Path
) -> None:
    page = opened()
    page.click(*CAT)
    for name in ("Re-generate", "Harmonise"):
        assert page.button(name).is_disabled()
    assert "give the editor a pipeline" in page.page.locator(".hint").first.inner_text()
    with page.page.expect_download() as download:
        page.button("PSD").click()
        number = page.page.evaluate("messages.at(-1).number")
        page.page.evaluate(
            """number => { const data = new DataView(Uint8Array.from([56, 66, 80, 83]).buffer);
               fromPython({kind: "file", name: "stack.psd", number: "another view's"}, [data]);
               fromPython({kind: "file", name: "stack.psd", number}, [data]); }""",
            number,
        )
    download.value.save_as(tmp_path / "stack.psd")
    assert download.value.suggested_filename == "stack.psd"
    assert (tmp_path / "stack.psd").read_bytes() == b"8BPS"
    assert page.status == "Saved as stack.psd."


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_takes_the_theme_of_the_page(opened: Callable, theme: str) -> None:
    page = opened(Pipe())
    page.page.evaluate(
        f"document.body.style.background = '{'#111318' if theme == 'dark' else '#fff'}'"
    )
    page.page.wait_for_selector(f".lrd-editor[data-theme={theme}]")
    page.click(*CAT)
    page.page.mouse.move(0, 0)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.page.locator(".lrd-editor").screenshot(path=SCREENSHOTS / f"stack-editor-{theme}.png")
