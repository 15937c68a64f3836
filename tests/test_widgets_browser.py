"""The box editor in a real browser: every gesture with mouse, finger and keyboard, then notebooks.

Most tests open the module in a page of its own with a stand-in for the notebook's model; the last
ones go through JupyterLab and Notebook 7. Screenshots are left in `outputs/screenshots/`.

The browser is Chromium, from the system or installed by `make test`; without one all is skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import editor_page
import numpy
import pytest
from editor_page import Page, near, touch
from widget_page import SCREENSHOTS

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.methods import METHODS
from lrd_helpers.pictures import reduced_data_uri
from lrd_helpers.widgets import Settings, layout_studio
from lrd_helpers.widgets.box_editor import BoxEditor, layer_colours
from lrd_helpers.widgets.layout_studio import StudioPanel

pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
tab, shown = editor_page.tab, editor_page.shown  # pytest has them by these names

TWO = Layout(
    caption="a yellow house and a purple cat on snow",
    background="on snow",
    layers=[
        Layer("a yellow house", box=(0.3, 0.25, 0.85, 0.8)),
        Layer("a purple cat", box=(0.12, 0.48, 0.52, 0.95)),
    ],
)


@pytest.fixture
def opened(shown: Callable[..., Page]) -> Callable[..., Page]:
    """Opens an editor; with options of a `context` in a new page."""

    def open_page(
        layout: Layout | None = None, *, context: dict | None = None, **given: Any
    ) -> Page:
        return shown(BoxEditor(layout, **given), context=context)

    return open_page


# ------------------------------------------------------------------ drawing


def test_a_drag_on_the_empty_canvas_draws_a_box_and_asks_for_its_prompt(opened):
    page = opened()
    page.screenshot("editor-empty")
    page.drag((0.1, 0.2), (0.5, 0.7))
    assert page.boxes == [near(0.1, 0.2, 0.5, 0.7)]
    assert page.syncs == 1  # a gesture, not every movement
    page.page.keyboard.type("a red car")
    page.press("Tab")
    assert page.document["layers"][0]["prompt"] == "a red car"


def test_a_drag_beyond_the_canvas_is_cut_at_its_edge(opened):
    page = opened()
    page.drag((0.8, 0.9), (1.4, 1.3))
    assert page.boxes == [near(0.8, 0.9, 1, 1)]


def test_a_box_of_no_area_is_not_made(opened):
    page = opened()
    page.click(0.5, 0.5)
    page.drag((0.2, 0.5), (0.6, 0.5))
    assert page.syncs == 0
    assert page.page.locator(".layers li").count() == 0
    assert "Drag further" in page.status


def test_a_box_inside_another_needs_shift_or_draw_over(opened):
    page = opened(Layout(caption="c", layers=[Layer("a red car", box=(0.1, 0.1, 0.9, 0.9))]))
    page.page.keyboard.down("Shift")
    page.drag((0.2, 0.2), (0.4, 0.4))
    page.page.keyboard.up("Shift")
    page.button("Draw over").click()
    page.drag((0.5, 0.5), (0.8, 0.8))
    assert page.boxes == [
        near(*b) for b in ([0.1, 0.1, 0.9, 0.9], [0.2, 0.2, 0.4, 0.4], [0.5, 0.5, 0.8, 0.8])
    ]


def test_a_box_is_moved_and_stays_on_the_canvas(opened):
    page = opened(TWO)
    page.drag((0.7, 0.3), (0.75, 0.35))
    assert page.boxes[0] == near(0.35, 0.3, 0.9, 0.85)
    page.drag((0.7, 0.35), (1.3, 1.3))
    assert page.boxes[0] == near(0.45, 0.45, 1, 1)
    assert page.syncs == 2


@pytest.mark.parametrize(
    ("handle", "start", "box"),
    [
        ("nw", (0.3, 0.25), (0.35, 0.35, 0.85, 0.8)),
        ("n", (0.575, 0.25), (0.3, 0.35, 0.85, 0.8)),
        ("ne", (0.85, 0.25), (0.3, 0.35, 0.9, 0.8)),
        ("e", (0.85, 0.525), (0.3, 0.25, 0.9, 0.8)),
        ("se", (0.85, 0.8), (0.3, 0.25, 0.9, 0.9)),
        ("s", (0.575, 0.8), (0.3, 0.25, 0.85, 0.9)),
        ("sw", (0.3, 0.8), (0.35, 0.25, 0.85, 0.9)),
        ("w", (0.3, 0.525), (0.35, 0.25, 0.85, 0.8)),
    ],
)
def test_eight_handles(opened, handle, start, box):
    page = opened(Layout(caption="c", layers=TWO.layers[:1]))
    page.click(0.6, 0.5)
    page.drag(start, (start[0] + 0.05, start[1] + 0.1))
    assert page.boxes == [near(*box)], handle


def test_a_handle_cannot_turn_a_box_over(opened):
    page = opened(Layout(caption="c", layers=TWO.layers[:1]))
    page.click(0.6, 0.5)
    page.drag((0.85, 0.8), (0.1, 0.1))
    assert page.boxes == [near(0.3, 0.25, 0.31, 0.26)]


def test_clicks_go_on_to_what_lies_behind(opened):
    page = opened(TWO)
    selected = page.page.locator(".layers li.selected .prompt")
    page.click(0.4, 0.6)
    assert selected.input_value() == "a purple cat"
    page.click(0.4, 0.6)
    assert selected.input_value() == "a yellow house"
    assert page.syncs == 0  # looking is not an edit


def test_the_grid_of_latent_pixels(opened):
    page = opened(snap=True)
    page.drag((0.11, 0.2), (0.52, 0.7))
    assert page.boxes == [near(0.125, 0.1875, 0.5, 0.6875)]
    page.button("Keep to the grid").click()
    assert page.page.evaluate("state.snap") is False


@pytest.mark.parametrize(("size", "ratio"), [((256, 128), 2), ((96, 192), 0.5)])
def test_pictures_that_are_not_square(opened, size, ratio):
    page = opened(size=size)
    box = page.page.locator(".canvas").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(ratio, abs=0.01)
    page.drag((0.25, 0.25), (0.75, 0.5))
    assert page.boxes == [near(0.25, 0.25, 0.75, 0.5)]


def test_escape_and_a_cancelled_pointer_drop_the_gesture(opened):
    page = opened(TWO)
    page.drag((0.7, 0.3), (0.9, 0.5), up=False)
    page.press("Escape")
    page.page.mouse.up()
    page.drag((0.7, 0.3), (0.9, 0.5), up=False)
    page.page.dispatch_event(".canvas", "pointercancel")
    page.page.mouse.up()
    assert page.syncs == 0
    assert page.document["layers"][0]["box"] == list(TWO.layers[0].box)


HAND = "messages.filter(({ kind }) => kind === 'hand').map(({ document }) => document)"


def test_python_hears_the_newest_of_a_box_that_is_dragged_and_no_more(opened):
    page = opened(TWO)
    page.drag((0.7, 0.3), (0.75, 0.35))
    assert page.page.evaluate(HAND) == [], "nothing follows"
    page.press("Control+z")
    page.page.evaluate("state._followed = true")
    page.drag((0.7, 0.3), (0.8, 0.3), up=False)  # two movements
    page.page.mouse.move(*page.at(0.8, 0.4))
    page.page.evaluate("fromPython({ kind: 'handed' })")
    boxes = [each["layers"][0]["box"] for each in page.page.evaluate(HAND)]
    assert boxes == [near(0.35, 0.25, 0.9, 0.8), near(0.4, 0.35, 0.95, 0.9)]
    page.page.evaluate("fromPython({ kind: 'handed' })")  # and there is nothing more
    before = page.syncs
    page.page.mouse.up()
    kinds = [message["kind"] for message in page.page.evaluate("messages")][-3:]
    assert kinds == ["hand", "edit", "hand"]
    assert page.page.evaluate(HAND)[2:] == [None], "it is let go, after its edit"
    page.drag((0.8, 0.4), (0.7, 0.3), up=False)
    page.press("Escape")
    page.page.mouse.up()
    assert page.page.evaluate(HAND)[-1] is None
    assert page.syncs == before + 1


# ------------------------------------------------------------------ the list


def prompts(page: Page) -> list[str]:
    return [layer["prompt"] for layer in page.document["layers"]]


def test_the_order_by_buttons_by_keys_and_by_drag(opened):
    page = opened(TWO)
    page.click(0.2, 0.6)
    page.button("Send backward").click()
    assert prompts(page) == ["a purple cat", "a yellow house"]
    page.page.locator(".canvas").focus()
    page.press("]")
    assert prompts(page) == ["a yellow house", "a purple cat"]
    page.press("[")
    grips = page.page.locator(".grip")
    start, end = grips.nth(0).bounding_box(), grips.nth(1).bounding_box()
    page.page.mouse.move(start["x"] + 5, start["y"] + 10)
    page.page.mouse.down()
    page.page.mouse.move(end["x"] + 5, end["y"] + 12, steps=4)
    page.page.mouse.move(end["x"] + 5, end["y"] + 30, steps=2)
    page.page.mouse.up()
    assert prompts(page) == ["a yellow house", "a purple cat"]
    grips.nth(0).focus()
    page.press("ArrowDown")
    assert prompts(page) == ["a purple cat", "a yellow house"]


def test_lock_hide_and_delete(opened):
    page = opened(TWO)
    page.button("Lock: layer 2").click()
    page.drag((0.2, 0.6), (0.9, 0.95))  # the locked one is not moved; this draws
    assert page.document["layers"][1]["box"] == list(TWO.layers[1].box)
    assert len(page.boxes) == 3
    page.page.locator(".canvas").focus()
    page.press("Delete")
    page.button("Hide: layer 1").click()
    assert page.document["layers"][0]["hidden"] is True
    assert page.page.locator("svg .layer").count() == 1
    page.button("Select: layer 2").click()
    page.press("Delete")
    assert "locked" in page.status
    assert len(page.document["layers"]) == 2


def test_typing_in_one_prompt_and_going_on_to_the_next_loses_nothing(opened):
    page = opened(TWO)
    page.prompt(2).fill("a red car")
    page.prompt(1).click()
    page.page.keyboard.press("End")
    page.page.keyboard.type(" with snow")
    page.press("Enter")
    assert prompts(page) == ["a yellow house with snow", "a red car"]
    page.press("Control+z", "Control+z")  # one step a prompt
    assert prompts(page) == ["a yellow house", "a purple cat"]


def test_an_empty_caption_shows_the_one_that_will_be_taken(opened):
    page = opened(TWO)
    page.page.get_by_label("Caption").fill("")
    assert page.page.get_by_label("Caption").get_attribute("placeholder") == TWO.caption


def test_the_colour_of_the_guidance(opened):
    page = opened(TWO)
    page.button("Select: layer 2").click()
    page.page.locator("li.selected input[type=color]").fill("#ff8800")
    page.page.locator("li.selected input[type=color]").dispatch_event("change")
    assert page.document["layers"][1]["colour"] == "#ff8800"
    page.button("Take the colour from the prompt").click()
    assert "colour" not in page.document["layers"][1]


@pytest.mark.parametrize("touch", [False, True], ids=["keyboard", "finger"])
def test_the_opacity_of_a_layer(opened, touch):
    page = opened(TWO, **({"context": {"has_touch": True}} if touch else {}))
    page.button("Select: layer 2").click()
    slider = page.page.get_by_role("slider", name="Opacity: layer 2, a purple cat")
    assert slider.get_attribute("aria-valuetext") == "100 %"
    if touch:
        box = slider.bounding_box()
        page.page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    else:
        slider.focus()
        page.press(*5 * ["PageDown"])
    assert page.document["layers"][1]["opacity"] == pytest.approx(0.5, abs=0.02)
    percent = f"{100 * page.document['layers'][1]['opacity']:.0f} %"
    assert slider.get_attribute("aria-valuetext") == percent
    assert page.page.locator(".layer .tag text").all_text_contents() == [
        "1 a yellow house",
        f"2 a purple cat {percent}",
    ]
    page.button("Select: layer 1").click()
    assert slider.is_visible(), "what is not usual is always shown"
    page.screenshot(f"editor-opacity-{'finger' if touch else 'keyboard'}")
    page.press(*(1 if touch else 5) * ["Control+z"])
    assert "opacity" not in page.document["layers"][1]
    assert slider.is_hidden()


def test_an_opacity_from_python_is_shown_and_all_of_it_is_left_out_again(opened):
    layers = [dataclasses.replace(TWO.layers[0], opacity=0.0), TWO.layers[1]]
    page = opened(dataclasses.replace(TWO, layers=layers))
    slider = page.page.get_by_role("slider", name="Opacity: layer 1, a yellow house")
    assert slider.input_value() == "0"
    slider.focus()
    page.press("End")
    assert "opacity" not in page.document["layers"][0]


# ------------------------------------------------------------------ keyboard


def test_everything_by_keyboard(opened):
    page = opened()
    page.page.locator(".canvas").focus()
    page.press("Enter")  # a box in the middle, and the focus is in its prompt
    page.page.keyboard.type("a red car")
    page.press("Enter", "ArrowLeft", "ArrowLeft", "ArrowUp", "Shift+ArrowRight", "Shift+ArrowDown")
    page.page.wait_for_timeout(250)
    assert page.boxes == [near(0.28, 0.29, 0.69, 0.7)]
    page.press("Control+d", "n")
    page.page.keyboard.type("a star")
    page.press("Enter", "[", "PageDown", "Delete")
    assert prompts(page) == ["a star", "a red car"]
    page.press("Control+z")
    assert prompts(page) == ["a red car", "a star", "a red car"]
    page.press("Control+Shift+z")
    assert prompts(page) == ["a star", "a red car"]


def test_several_boxes_with_one_prompt_and_a_larger_canvas(opened):
    page = opened(TWO)
    page.page.keyboard.down("Alt")
    page.drag((0.7, 0.3), (0.75, 0.35))
    page.page.keyboard.up("Alt")
    assert prompts(page) == ["a yellow house", "a purple cat", "a yellow house"]
    assert page.boxes[2] == near(0.35, 0.3, 0.9, 0.85)
    assert page.boxes[0] == list(TWO.layers[0].box)
    width = page.page.locator(".canvas").bounding_box()["width"]
    page.button("Larger canvas").click()
    canvas = page.page.locator(".canvas").bounding_box()
    assert width + 50 < canvas["width"] <= 640, "and all of it on the screen"
    assert canvas["width"] == pytest.approx(canvas["height"], abs=1)
    page.drag((0.05, 0.02), (0.25, 0.2))
    assert page.boxes[3] == near(0.05, 0.02, 0.25, 0.2)
    page.screenshot("editor-large")


def test_undo_goes_all_the_way_back_and_forth(opened):
    page = opened(TWO)
    page.drag((0.7, 0.3), (0.75, 0.35))
    page.button("Undo").click()
    assert page.boxes[0] == list(TWO.layers[0].box)
    assert page.button("Undo").is_disabled()
    page.button("Redo").click()
    assert page.boxes[0] == near(0.35, 0.3, 0.9, 0.85)


def test_every_focusable_element_keeps_its_keys_from_the_notebook(opened):
    page = opened(TWO)
    bare = page.page.evaluate(
        """[...document.querySelectorAll("#cell button, #cell input, #cell textarea, [tabindex]")]
           .filter((e) => e.getAttribute("data-lm-suppress-shortcuts") !== "true").length"""
    )
    assert bare == 0
    heard = "window.heard = 0; document.body.addEventListener('keydown', () => heard++)"
    page.page.evaluate(heard)
    page.page.locator(".canvas").focus()
    page.press("x", "d", "d", "ArrowDown", "m")
    assert page.page.evaluate("heard") == 0


def test_every_control_has_a_name_and_the_focus_is_seen(opened):
    page = opened(TWO)
    nameless = page.page.evaluate(
        """[...document.querySelectorAll("#cell :is(button, input:not([type=file]), textarea)")]
           .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).length"""
    )
    assert nameless == 0
    page.page.locator(".canvas").focus()
    page.press("PageUp")
    assert "Layer 1 of 2, a yellow house, left 30 %" in page.page.locator(".canvas").get_attribute(
        "aria-label"
    )
    page.press("Tab")
    outline = page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_keys_are_the_input_method_s_while_it_composes(opened):
    page = opened(TWO)
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
    session = page.context.new_cdp_session(page.page)
    page.button("Load a layout").click()
    text = page.page.get_by_label("Layout as text")
    for field in (page.prompt(1), page.page.get_by_label("Caption"), text):
        field.fill("")
        field.focus()
        here = page.page.evaluate(focused)
        composed = {"text": "ねこ", "selectionStart": 2, "selectionEnd": 2}
        session.send("Input.imeSetComposition", composed)
        page.press("Escape", *(["Enter"] if field is not text else []))
        field.evaluate(  # Safari's, which comes when the composition has just ended
            """element => ["Enter", "Escape"].forEach((key) => element.dispatchEvent(
               new KeyboardEvent("keydown", { key, keyCode: 229, bubbles: true })))"""
        )
        assert page.page.evaluate(focused) == here
        session.send("Input.insertText", {"text": "猫"})
        assert field.input_value() == "猫"
    assert text.is_visible()
    page.prompt(1).focus()
    page.press("Enter")
    assert page.page.evaluate("document.activeElement.matches('.canvas')")
    assert prompts(page) == ["猫", "a purple cat"]


# ------------------------------------------------------------------ several views


def test_two_views_are_one_editor(opened):
    page = opened(TWO)
    page.page.evaluate("void show(document.body.appendChild(document.createElement('div')))")
    page.page.set_viewport_size({"width": 900, "height": 1280})  # nothing scrolls
    first, second = (page.page.locator(".lrd-editor").nth(number) for number in (0, 1))
    rows = ".layers li .prompt"
    second.get_by_role("button", name="Select: layer 1").click()
    page.drag((0.1, 0.05), (0.5, 0.2))
    page.page.keyboard.type("a star")  # seen there at once, sent to Python later
    assert second.locator(rows).first.input_value() == "a star"
    assert second.locator("li.selected .prompt").input_value() == "a yellow house"
    second.get_by_role("button", name="Undo").click()
    second.get_by_role("button", name="Undo").click()
    assert [second.locator(rows).count(), first.locator(rows).count()] == [2, 2]
    assert second.get_by_role("button", name="Undo").is_disabled()
    first.get_by_role("button", name="Redo").click()
    assert [second.locator(rows).count(), first.locator(rows).count()] == [3, 3]
    later = json.dumps(BoxEditor(Layout(caption="c", layers=TWO.layers[1:])).document)
    page.page.evaluate(f"model.set('document', {later})")
    assert [second.locator(rows).count(), first.locator(rows).count()] == [1, 1]
    second.get_by_role("button", name="Undo").click()
    assert len(page.boxes) == 3
    page.page.evaluate("close_()")
    second.get_by_role("button", name="Undo").click()
    assert prompts(page) == ["a yellow house", "a purple cat"]


def test_two_editors_of_a_page_share_no_name(opened):
    page = opened(Layout(caption="c", layers=[Layer("a star", mask=[[0, 1], [1, 1]])]))
    page.page.evaluate(  # anywidget loads the module anew for each editor
        """async () => {
           const { default: editor } = await import("./widget.js?again");
           const other = editor();
           other.initialize({ model });
           show(document.body.appendChild(document.createElement("div")), other);
        }"""
    )
    page.page.wait_for_function("document.querySelectorAll('svg .layer mask').length === 2")
    names = page.page.evaluate("[...document.querySelectorAll('[id]')].map(({ id }) => id)")
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------ wheel, touch, themes, masks

LONG = "document.body.style.minHeight = '3000px'"


def test_the_wheel_scrolls_the_page_whatever_the_tool(opened):
    page = opened(TWO)
    page.page.evaluate(LONG)
    for tool in ("Draw and move", "Paint a shape"):
        page.page.evaluate("scrollTo(0, 0)")
        page.button(tool).click()
        page.page.mouse.move(*page.at(0.5, 0.3))
        page.page.mouse.wheel(0, 100)
        page.page.wait_for_function("scrollY === 100")
    assert page.syncs == 0


def test_one_finger_draws_and_moves_and_two_scroll(opened):
    page = opened(context={"has_touch": True})
    page.page.evaluate(LONG)
    touch(page, [(0.2, 0.2)], [(0.4, 0.5)], [(0.6, 0.7)])
    assert page.boxes == [near(0.2, 0.2, 0.6, 0.7)]
    touch(page, [(0.4, 0.4)], [(0.45, 0.45)], [(0.5, 0.5)])
    assert page.boxes == [near(0.3, 0.3, 0.7, 0.8)]
    page.screenshot("editor-touch")
    assert page.page.evaluate("scrollY") == 0
    touch(page, *([(0.4, y), (0.6, y)] for y in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)))
    page.page.wait_for_function("scrollY > 50")
    assert page.boxes == [near(0.3, 0.3, 0.7, 0.8)]


@pytest.mark.parametrize("dark", [False, True])
def test_it_takes_the_theme_of_the_page(opened, dark):
    y, x = numpy.ogrid[:64, :64]
    moon = Layer("a white balloon", mask=(x - 49) ** 2 + (y - 13) ** 2 < 81)
    page = opened(dataclasses.replace(TWO, layers=[*TWO.layers, moon]))
    page.page.evaluate(f"document.body.style.background = '{'#111318' if dark else '#fff'}'")
    page.page.wait_for_selector(f".lrd-editor[data-theme={'dark' if dark else 'light'}]")
    page.click(0.2, 0.6)
    ground, ink = page.page.evaluate(
        """["backgroundColor", "color"].map((name) => getComputedStyle(
           document.querySelector(".lrd-editor"))[name].match(/\\d+/g).map(Number)
           .reduce((a, b) => a + b))"""
    )
    assert (ground < ink) == dark
    page.page.mouse.move(0, 0)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / ("editor-dark.png" if dark else "editor-light.png")
    page.page.locator(".lrd-editor").screenshot(path=path)


def test_it_fits_into_a_telephone(opened):
    page = opened(
        dataclasses.replace(
            TWO, layers=[TWO.layers[0], dataclasses.replace(TWO.layers[1], opacity=0.4)]
        )
    )
    page.page.set_viewport_size({"width": 360, "height": 800})
    page.page.wait_for_timeout(100)
    assert page.page.get_by_role("slider", name="Opacity: layer 2").bounding_box()["width"] > 120
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot("editor-narrow")


def mask_of(page: Page, number: int) -> Any:
    data = dict(page.document["layers"][number])
    return Layer(data["prompt"] or "?", mask=data["mask"]).mask


def test_brush_and_eraser_make_masks_that_python_reads(opened):
    page = opened()
    page.button("Paint a shape").click()
    page.drag((0.3, 0.5), (0.6, 0.5))
    page.page.keyboard.type("a white boat")
    page.press("Enter")
    assert mask_of(page, 0).box == near(0.26, 0.46, 0.64, 0.54)
    page.drag((0.6, 0.5), (0.6, 0.8))  # the same layer grows
    assert mask_of(page, 0).box == near(0.26, 0.46, 0.64, 0.84)
    page.screenshot("editor-mask")
    page.button("Erase").click()
    page.drag((0.2, 0.5), (0.5, 0.5))
    assert mask_of(page, 0).box[0] > 0.5
    page.press("Escape", "b")
    page.drag((0.6, 0.6), (0.7, 0.7))  # moved as a whole
    assert mask_of(page, 0).box[2:] == near(0.74, 0.94)
    page.press("Control+z", "Control+z", "Control+z", "Control+z", "Control+z")
    assert page.document["layers"] == []


def test_the_eraser_cuts_a_box_into_a_shape(opened):
    page = opened(Layout(caption="c", layers=TWO.layers[:1]))
    page.click(0.6, 0.5)
    page.press("e")
    page.drag((0.3, 0.25), (0.3, 0.8))
    assert "box" not in page.document["layers"][0]
    assert mask_of(page, 0).box == near(0.34, 0.25, 0.85, 0.8)


def test_an_ellipse_is_drawn_and_moved_as_a_box_is(opened):
    page = opened()
    page.button("Draw ellipses").click()
    page.drag((0.2, 0.3), (0.6, 0.5))
    page.page.keyboard.type("a white balloon")
    page.press("Enter")
    mask = mask_of(page, 0)
    assert mask.box == near(0.2, 0.3, 0.6, 0.5)
    assert numpy.mean(mask.image()) == pytest.approx(0.4 * 0.2 * numpy.pi / 4, abs=0.002)
    page.screenshot("editor-ellipse")
    page.drag((0.4, 0.4), (0.5, 0.6))
    assert mask_of(page, 0).box == near(0.3, 0.5, 0.7, 0.7)
    page.press("Escape", "Enter")
    assert mask_of(page, 1).box == near(0.3, 0.3, 0.7, 0.7)


def test_painting_by_keyboard(opened):
    page = opened()
    page.press("Tab", "p")
    page.page.locator(".canvas").focus()
    page.press("ArrowRight", "Space")
    assert mask_of(page, 0).box == near(0.48, 0.46, 0.56, 0.54)


def test_a_mask_from_python_is_shown_and_can_be_resized(opened):
    pixels = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    page = opened(Layout(caption="c", layers=[Layer("a star", mask=pixels)]))
    page.page.wait_for_selector("svg .layer mask", state="attached")
    page.click(0.4, 0.4)
    page.drag((0.75, 0.75), (1, 1))
    assert mask_of(page, 0).box == near(0.25, 0.25, 1, 1)


# ------------------------------------------------------------------ Python, JSON, no kernel


def test_the_code_of_the_page_is_the_code_of_python(opened):
    layout = Layout(
        caption='say "hé"\\',
        background="at night",
        layers=[
            Layer("a red car", box=(0, 0.05, 1 / 3, 1), strength=0.5, start=0.25, colour="#ff8800"),
            TWO.layers[1],
        ],
    )
    page = opened(layout, context={"permissions": ["clipboard-read", "clipboard-write"]})
    page.button("Copy as Python").click()
    page.page.wait_for_function("document.querySelector('.status').textContent.includes('Copied')")
    code = page.page.evaluate("navigator.clipboard.readText()")
    assert code == BoxEditor(layout).as_code()
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["layout"].caption == layout.caption
    assert names["layout"].layers[0].box == pytest.approx(layout.layers[0].box)


def test_json_down_and_up(opened, tmp_path):
    page = opened(TWO)
    with page.page.expect_download() as download:
        page.button("Download").click()
    download.value.save_as(tmp_path / "layout.json")
    assert Layout.load(tmp_path / "layout.json") == TWO
    page.button("Load a layout").click()
    page.page.locator("input[type=file]").set_input_files(tmp_path / "layout.json")
    page.page.wait_for_function("messages.length")
    [message] = page.page.evaluate("messages")
    assert Layout.from_json(message["text"]) == TWO


def test_what_python_refuses_is_said_and_changes_nothing(opened):
    page = opened(TWO)
    page.button("Load a layout").click()
    page.page.get_by_label("Layout as text").fill("not a layout")
    page.page.get_by_text("Load", exact=True).click()
    [message] = page.page.evaluate("messages")
    assert (message["kind"], message["text"]) == ("load", "not a layout")
    page.page.evaluate(
        "fromPython({kind: 'notice', text: 'Nothing was loaded: not JSON.', mark: []})"
    )
    assert page.status == "Nothing was loaded: not JSON."
    assert page.page.get_by_label("Layout as text").input_value() == "not a layout"
    assert prompts(page) == ["a yellow house", "a purple cat"]


def test_a_missing_prompt_is_marked(opened):
    page = opened()
    page.drag((0.1, 0.2), (0.5, 0.7))
    page.button("Copy as Python").click()
    assert "Layer 1 has no prompt" in page.status
    assert page.prompt(1).get_attribute("aria-invalid") == "true"
    page.screenshot("editor-missing-prompt")
    page.prompt(1).fill("a red car")
    assert page.prompt(1).get_attribute("aria-invalid") == "false"


def test_python_may_ask_for_what_is_drawn(opened):
    page = opened(TWO)
    page.prompt(1).fill("a red car")  # not yet sent
    page.page.evaluate("fromPython({kind: 'ask', question: '42'})")
    message = page.page.evaluate("messages.at(-1)")
    assert message["question"] == "42"
    assert message["document"]["layers"][0]["prompt"] == "a red car"


def test_a_layout_from_python_is_shown_and_can_be_undone(opened):
    page = opened(TWO)
    other = json.dumps(
        BoxEditor(Layout(caption="c", layers=[Layer("a star", box=(0, 0, 1, 1))])).document
    )
    page.page.evaluate(f"model.set('document', {other})")
    assert page.prompt(1).input_value() == "a star"
    page.button("Undo").click()
    assert prompts(page) == ["a yellow house", "a purple cat"]


def test_a_lost_kernel_is_noticed_and_nothing_drawn_is_lost(opened):
    page = opened(TWO, context={"permissions": ["clipboard-read", "clipboard-write"]})
    page.page.clock.install()
    page.page.evaluate("answers = false")
    page.drag((0.7, 0.3), (0.75, 0.35))
    page.page.clock.run_for(6000)
    assert "Python does not answer" in page.page.locator(".lost").inner_text()
    page.drag((0.75, 0.35), (0.7, 0.3))
    assert page.boxes[0] == near(0.3, 0.25, 0.85, 0.8)
    page.button("Copy as Python").click()
    page.page.evaluate("answers = true")
    page.drag((0.7, 0.3), (0.75, 0.35))
    page.page.clock.run_for(100)
    assert page.page.locator(".lost").is_hidden()


def test_closing_the_page_leaves_no_listener(opened):
    page = opened(TWO)
    page.prompt(1).fill("a red car")  # not yet sent
    page.page.evaluate("close_()")
    assert prompts(page) == ["a red car", "a purple cat"]
    page.page.evaluate("model.set('document', {...state.document, caption: 'later'})")


# ------------------------------------------------------------------ what is drawn, and on what


def test_a_layer_has_python_s_colour_and_its_whole_name(opened):
    layers = [
        Layer("a yellow star", box=(0.8, 0.1, 0.95, 0.3)),
        Layer("a red car", box=(0.1, 0.5, 0.2, 0.9), colour="teal"),
        Layer("a dark-blue field mouse", box=(0.4, 0.5, 0.5, 0.9), opacity=0.5),
        Layer("a field", box=(0.6, 0.5, 0.7, 0.9)),  # a word that is a colour of the system
    ]
    editor = BoxEditor(Layout(caption="c", layers=layers))
    page = opened(Layout(caption="c", layers=layers))
    drawn = page.page.evaluate(
        """[...document.querySelectorAll(".layer .tag")].map((tag) => ["fill", "x", "width"]
           .map((name) => tag.querySelector("rect").getAttribute(name)))"""
    )
    assert [fill.lower() for fill, _, _ in drawn] == layer_colours(editor.document["layers"])
    assert drawn[0][0] == "#ffff00"
    assert float(drawn[0][1]) + float(drawn[0][2]) == pytest.approx(400)
    assert page.page.locator(".tag text").all_text_contents() == [
        "1 a yellow star", "2 a red car", "3 a dark-blue field mouse 50 %", "4 a field",
    ]  # fmt: skip
    chip = page.page.locator(".chip").last
    assert chip.evaluate("e => getComputedStyle(e).color") == "rgb(0, 0, 0)", "not white on yellow"


def test_a_layer_by_a_button_and_a_layout_to_begin_with(opened):
    page = opened(starters=[TWO, Layout("a sea", layers=[Layer("a sea", mask=[[1, 0]])])])
    page.screenshot("editor-starters")
    starters = page.page.locator(".starters button")
    assert starters.count() == 2
    starters.first.click()
    assert prompts(page) == ["a yellow house", "a purple cat"]
    assert starters.first.is_hidden()
    page.button("Add a layer").click()
    page.page.keyboard.type("a red car")
    page.press("Enter")
    assert prompts(page) == ["a yellow house", "a purple cat", "a red car"]
    assert page.boxes[2] == near(0.3, 0.3, 0.7, 0.7)
    page.press("Control+z", "Control+z", "Control+z")
    assert prompts(page) == []
    page.button("Begin with one of").click()
    assert starters.first.is_visible()


def test_the_picture_under_the_boxes_can_be_made_fainter(opened):
    page = opened(TWO)
    slider = page.page.get_by_role("slider", name="Picture under the boxes")
    assert slider.is_hidden()
    picture = BoxEditor(image=numpy.full((8, 8, 3), 200, numpy.uint8))._picture
    page.page.evaluate(f"model.set('_picture', '{picture}')")
    slider.focus()
    page.press("Home")
    assert page.page.locator("svg.canvas image").first.get_attribute("opacity") == "0"
    assert page.page.evaluate("state._picture_opacity") == 0
    assert page.syncs == 0, "only what one sees"


# ------------------------------------------------------------------ the studio around the editor

SEEN = {
    "name": "2",
    "view": "found",
    "word": "",
    "words": ["a", "yellow", "house", "and", "a", "purple", "cat", "on", "snow", "<b>"],
    "svg": BoxEditor(TWO).static_svg(),
    "text": "Dashed: what the detector found.",
    "told": "seed 0 · 25 steps · collage · 4.1 s",
    "remarks": ["layer 2 'a purple cat': " + "a_long_word_" * 12],
    "ious": [
        {"prompt": "a yellow house", "colour": "#ffff00", "iou": 0.63},
        {"prompt": "a purple cat", "colour": "#800080", "iou": None},
    ],
    "boxes": True,
}


@pytest.fixture
def panel(shown: Callable[..., Page]) -> Page:
    """The studio's page without its editor, with a picture."""
    settings = dataclasses.asdict(Settings(layered_fraction=0.5))
    uri = reduced_data_uri(numpy.zeros((8, 8, 3), numpy.uint8))
    strip = [{"name": name, "uri": uri, "label": "seed 0 · .6", "about": "again"} for name in "12"]
    methods = layout_studio._looked_at()
    widget = StudioPanel(methods=methods, settings=settings, shown=SEEN, strip=strip)
    return shown(widget)


def test_what_is_set_goes_to_python_with_each_click(panel):
    page = panel.page
    number = page.get_by_label("steps, as a number")
    number.fill("250")
    number.press("Tab")
    assert page.get_by_role("slider", name="steps").input_value() == "100"
    strength = page.get_by_role("slider", name="strength of ξ")
    assert strength.is_disabled(), "the collage has no ξ"
    page.get_by_label("method").select_option("authors")
    assert strength.is_enabled()
    assert page.get_by_label("layered part t0, as a number").input_value() == "0.29"
    panel.button("^Render$").click()
    message = page.evaluate("messages.at(-1)")
    assert message["kind"] == "render"
    assert message["settings"] | {"steps": 100, "method": "authors"} == message["settings"]
    assert message["settings"]["layered_fraction"] == METHODS["authors"].layered_fraction
    panel.button("^Live$").click()
    assert page.evaluate("messages.at(-1)")["live"] is True
    panel.button("^Follow$").click()
    assert page.evaluate("(({ kind, on }) => [kind, on])(messages.at(-1))") == ["follow", True]
    page.evaluate("model.set('follow', { on: false, why: 'a quick picture takes 3.1 s here' })")
    assert page.get_by_text("Follow is off: a quick picture takes 3.1 s here.").is_visible()
    for name, kind in (("asked", "look"), ("Take boxes", "boxes"), ("seed 0", "show")):
        panel.button(name).click()
        assert page.evaluate("messages.at(-1).kind") == kind
    untold = "[...document.querySelectorAll(':is(button, input, select)')].filter((e) => !e.title)"
    assert page.evaluate(f"{untold}.length") == 0


def test_a_word_is_pressed_once_more_for_the_picture(panel):
    look = "(({ view, word }) => [view, word])(messages.at(-1))"
    panel.button("^house$").click()
    assert panel.page.evaluate(look) == ["found", "house"]
    panel.page.evaluate("model.set('shown', { ...state.shown, word: 'house' })")
    pressed = panel.page.locator(".result [aria-pressed=true]")
    assert pressed.all_text_contents() == ["house"], "a map is no view"
    panel.button("^house$").click()
    assert panel.page.evaluate(look) == ["found", ""]


def test_while_a_cell_runs_the_studio_says_that_it_waits(panel):
    panel.page.clock.install()
    panel.page.evaluate("answers = false")
    panel.button("^Render$").click()
    panel.page.clock.run_for(1000)
    message = panel.page.locator(".message")
    assert message.inner_text().startswith("Python is busy with another cell")
    panel.page.evaluate("fromPython({ kind: 'received', number: messages.at(-1).number })")
    assert message.inner_text() == ""
    panel.page.evaluate("model.set('job', { text: 'Rendering …', share: 0.5 })")
    assert panel.page.evaluate("document.querySelector('progress').value") == 0.5
    assert panel.button("^Render$").is_disabled()
    assert panel.button("^Cancel$").is_enabled()


@pytest.mark.parametrize("width", [320, 400, 1000])
def test_nothing_of_the_studio_is_cut_off(panel, width):
    page = panel.page
    page.set_viewport_size({"width": width, "height": 1500})
    page.evaluate("document.body.style.background = '#111318'")
    page.evaluate("model.set('job', { text: 'layer 1 has no prompt', bad: true })")
    page.wait_for_selector(".lrd-panel[data-theme=dark]")
    cut = page.evaluate(
        """[...document.querySelectorAll("#cell :is(section *, .strip *)")].filter((e) => {
           const { left, right } = e.getBoundingClientRect();
           return left < 0 || right > innerWidth || e.scrollWidth > Math.max(1, e.clientWidth) + 1
             && getComputedStyle(e).display !== "inline" && !e.closest("svg");
        }).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert cut == []
    ground = page.locator(".message").evaluate("e => getComputedStyle(e).backgroundColor")
    assert ground == "rgb(69, 34, 31)", "dark, as the page"
    panel.screenshot(f"studio-panel-{width}")


# ------------------------------------------------------------------ in real notebooks

CELLS = (
    """import json, time
from lrd_helpers import BoxEditor
editor, heard = BoxEditor(background="on grass"), []
editor.observe(lambda change: heard.append(1000 * time.time()), "document")
editor""",
    """from pathlib import Path
Path("result.json").write_text(json.dumps([editor.layout.to_json(), heard]))
editor""",
)


def notebook(cells: tuple[str, ...]) -> str:
    """The text of a notebook with these code cells."""
    made = [
        {
            "cell_type": "code",
            "id": f"cell-{number}",
            "metadata": {},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        for number, source in enumerate(cells)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps(
        {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": made}
    )


class Jupyter:
    """A server: where it is, and the folder it shows."""

    def __init__(self, port: int, folder: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.folder = folder

    def ask(self, what: str, **options: Any) -> Any:
        headers = {"Authorization": "token course"}
        request = urllib.request.Request(f"{self.address}/api/{what}", headers=headers, **options)
        answer = urllib.request.urlopen(request, timeout=30).read()
        return json.loads(answer) if answer else None


@pytest.fixture(scope="module")
def jupyter(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    """One server for all: where Notebook 7 is installed, JupyterLab serves it, too."""
    pytest.importorskip("jupyterlab")
    pytest.importorskip("notebook")
    folder = tmp_path_factory.mktemp("jupyter")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: str(folder / ".jupyter") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    extension = folder / ".jupyter" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    extension.mkdir(parents=True)
    news = {"fetchNews": "false", "checkForUpdates": False}
    (extension / "notification.jupyterlab-settings").write_text(json.dumps(news))
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
            + [f"--port={port}", "--IdentityProvider.token=course", f"--notebook-dir={folder}"]
            + ["--expose-app-in-browser"],
            env=os.environ | own | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    server = Jupyter(port, folder)
    try:
        wait_for(lambda: server.ask("status"), "the server's start")
        yield server
    finally:
        process.terminate()
        process.wait(20)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 180) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if value := condition():
                return value
        time.sleep(0.2)
    raise TimeoutError(f"{what} did not happen within {seconds} s")


class NotebookPage(Page):
    """A new notebook with these cells in JupyterLab or Notebook 7, its kernel ready."""

    def __init__(self, browser: Any, jupyter: Jupyter, view: str, cells: tuple[str, ...]) -> None:
        self.jupyter = jupyter
        self.folder = Path(tempfile.mkdtemp(prefix="course-", dir=jupyter.folder))
        self.path = f"{self.folder.name}/course.ipynb"
        (jupyter.folder / self.path).write_text(notebook(cells), encoding="utf-8")
        self.errors: list[str] = []
        self.context = browser.new_context(viewport={"width": 1200, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(180_000)  # a busy machine
        self.page.on("pageerror", lambda error: self._note_own(str(error), error.stack))
        self.page.on("console", self._note)
        # "reset": without what other tests have left open.
        self.page.goto(f"{jupyter.address}/{view}/{self.path}?token=course&reset")
        self.kernel = self.idle_kernel()

    def idle_kernel(self) -> str:
        """The page says "idle" before the kernel is there: the server is asked."""
        idle = wait_for(
            lambda: [
                session["kernel"]["id"]
                for session in self.jupyter.ask("sessions")
                if session["path"] == self.path and session["kernel"]["execution_state"] == "idle"
            ],
            "a kernel",
        )
        return idle[0]

    def restart_kernel(self) -> None:
        self.jupyter.ask(f"kernels/{self.kernel}/restart", method="POST", data=b"")
        self.idle_kernel()

    def close(self) -> None:
        self.context.close()
        self.jupyter.ask(f"kernels/{self.kernel}", method="DELETE")

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self._note_own(message.text, str(message.location))

    def _note_own(self, text: str, where: str | None) -> None:
        # A notebook's page has errors of its own; anywidget loads our module as a blob.
        if "blob:" in f"{text} {where}":
            self.errors.append(text)

    def run_cell(self, number: int) -> None:
        self.page.locator(".jp-CodeCell :is(.cm-content, .CodeMirror)").nth(number).click()
        self.page.keyboard.press("Shift+Enter")


@pytest.mark.parametrize(
    ("application", "view"), [("jupyterlab", "lab/tree"), ("notebook", "notebooks")]
)
def test_a_round_trip_through_a_real_notebook(chromium, jupyter, application, view):
    page = NotebookPage(chromium, jupyter, view, CELLS)
    result = page.folder / "result.json"
    page.run_cell(0)
    page.page.wait_for_selector(".lrd-editor")
    page.page.wait_for_timeout(300)
    page.page.evaluate(
        "window.ups = [], addEventListener('pointerup', () => ups.push(Date.now()), true)"
    )
    for start, end, prompt in [
        ((0.3, 0.2), (0.9, 0.8), "a blue house"),
        ((0.1, 0.5), (0.5, 0.9), "a red car"),
    ]:
        page.drag(start, end)
        page.page.keyboard.type(prompt)
    page.button("Send backward").click()
    page.page.locator(".canvas").focus()
    page.press("x", "d", "d", "ArrowRight")  # would cut the cell, or leave it
    page.screenshot(f"{application}-round-trip")
    # Edits and cells go to Python by different ways, so that a cell may overtake an edit.
    page.page.wait_for_timeout(300)
    page.page.wait_for_selector(".lrd-editor[data-synced=true]")
    page.run_cell(1)
    wait_for(result.exists, "the second cell")
    wait_for(lambda: result.read_text().endswith("]"), "its end")
    ups = page.page.evaluate("ups")
    page.page.wait_for_function("document.querySelectorAll('.lrd-editor .box').length === 4")
    page.restart_kernel()
    page.page.locator(".canvas").first.scroll_into_view_if_needed()
    page.drag((0.7, 0.3), (0.75, 0.35))
    page.page.wait_for_selector("text=Python does not answer")
    drawn = "[...document.querySelectorAll('.lrd-editor .box')].map((e) => e.getAttribute('x'))"
    boxes = page.page.evaluate(drawn)
    assert boxes[:2] == boxes[2:], "one editor in both cells"
    assert float(boxes[1]) == pytest.approx(0.35 * 400, abs=3)
    assert page.prompt(1).input_value() == "a red car"
    page.screenshot(f"{application}-restarted")
    page.close()
    text, heard = json.loads(result.read_text())
    layout = Layout.from_json(text)
    assert layout.caption == "a red car and a blue house on grass"
    assert [layer.prompt for layer in layout.layers] == ["a red car", "a blue house"]
    assert layout.layers[0].box == near(0.11, 0.5, 0.51, 0.9)
    assert layout.layers[1].box == near(0.3, 0.2, 0.9, 0.8)
    latencies = [min(after - up for after in heard if after >= up) for up in ups[:2]]
    print(f"{application}: pointer release → Python", ", ".join(f"{t:.0f} ms" for t in latencies))
    assert page.errors == []


SEA = Layout(
    caption="a yellow star and a red balloon and a white boat at sea",
    background="at sea",
    layers=[
        Layer("a yellow star", box=(0.66, 0.06, 0.92, 0.32)),
        Layer("a red balloon", box=(0.12, 0.05, 0.36, 0.42)),
        Layer("a white boat", box=(0.25, 0.42, 0.75, 0.92)),
    ],
)
STUDIO = """from lrd_helpers import Layout, LayoutStudio, load_pipeline
from lrd_helpers.widgets import Settings
layout = Layout.from_json(LAYOUT)
LayoutStudio(load_pipeline("storybook"), layout, follow=True, settings=Settings(steps=STEPS))"""


def in_both_themes(page: NotebookPage, name: str) -> None:
    """Pictures of the studio in JupyterLab's light and dark theme, changed while it is open."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for theme in ("Dark", "Light"):
        page.page.evaluate(
            "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})",
            f"JupyterLab {theme}",
        )
        for part in (".lrd-editor", ".lrd-panel"):
            page.page.wait_for_selector(f"{part}[data-theme={theme.lower()}]", state="attached")
        path = SCREENSHOTS / f"{name}-{theme.lower()}.png"
        page.page.locator(".lrd-studio").screenshot(path=path)


def the_picture_follows(page: NotebookPage) -> None:
    """Drag a box of the studio slowly: quick pictures come meanwhile, the full picture after it."""
    under = "document.querySelector('.lrd-editor .canvas image').getAttribute('href')"
    assert page.button("^Follow$").get_attribute("aria-pressed") == "true"
    page.page.locator(".canvas").first.scroll_into_view_if_needed()
    pictures = [page.page.evaluate(under)]
    page.drag((0.8, 0.2), (0.7, 0.3), up=False)
    for x in (0.6, 0.5):
        page.page.wait_for_function(f"seen => !seen.includes({under})", arg=pictures)
        pictures.append(page.page.evaluate(under))
        page.page.mouse.move(*page.at(x, 0.3))
    page.page.wait_for_selector(".lrd-panel .result.quick")
    page.screenshot("studio-follows")
    assert page.page.locator(".lrd-panel .strip button").count() == 1, "a look only"
    page.page.mouse.up()
    page.page.wait_for_selector(".lrd-panel .result:not(.quick)")
    page.page.wait_for_function(
        "document.querySelectorAll('.lrd-panel .strip button').length === 2"
    )


def test_the_studio_renders_with_the_shipped_model(chromium, jupyter):
    steps = os.environ.get("STUDIO_STEPS", "4")  # for a better screenshot: 25
    cell = STUDIO.replace("LAYOUT", repr(SEA.to_json())).replace("STEPS", steps)
    page = NotebookPage(chromium, jupyter, "lab/tree", (cell, "import time\ntime.sleep(4)"))
    page.page.set_viewport_size({"width": 1366, "height": 768})  # a laptop
    page.run_cell(0)
    page.page.wait_for_selector(".lrd-editor[data-theme=light]")
    places = "['.canvas', '.figure'].map((e) => document.querySelector(e).getBoundingClientRect())"
    empty = page.page.evaluate(places)
    page.run_cell(1)  # as after "Run all": Python does not hear the click yet
    start = time.monotonic()
    page.button("Render").click()
    page.page.wait_for_selector("text=Python is busy with another cell")
    page.page.wait_for_selector(".lrd-panel .figure svg image")
    print(f"Render → picture: {time.monotonic() - start:.1f} s for {steps} steps")
    page.page.locator(".lrd-panel .views").scroll_into_view_if_needed()
    places = page.page.evaluate(places)
    assert [place["x"] for place in places] == [place["x"] for place in empty], "nothing jumps"
    top = min(place["top"] for place in places)
    render = page.button("Render").bounding_box()
    assert max(*(place["bottom"] for place in places), render["y"] + render["height"]) - top < 600
    assert places[0]["right"] < places[1]["left"], "side by side"
    page.page.set_viewport_size({"width": 1366, "height": 1300})
    page.button("found").click()
    page.page.wait_for_selector(".lrd-panel .figure svg text")
    in_both_themes(page, "studio")
    page.button("^boat$").click()
    page.page.wait_for_selector("text=Where the model looks for “boat”")
    in_both_themes(page, "studio-attention")
    the_picture_follows(page)
    page.prompt(1).fill("")
    page.button("Render").click()  # at once: what is drawn, not what Python last had
    page.page.wait_for_selector("text=layer 1 has no prompt")
    page.page.wait_for_selector(".lrd-editor li.marked")
    page.close()
    assert page.errors == []
