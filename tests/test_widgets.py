"""The widgets' Python side; what happens in the page is in test_widgets_browser.py."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy
import pytest
import torch
import traitlets
from IPython.core.formatters import DisplayFormatter
from ipywidgets.embed import dependency_state
from picture_files import as_a_phone_saves
from PIL import Image

import lrd_helpers
from lrd_helpers import widgets
from lrd_helpers.benchmark import ground_truth_scene
from lrd_helpers.layout import Layer, Layout, LayoutError
from lrd_helpers.measure import Detection, StorybookDetector
from lrd_helpers.pipeline import LayeredRenderingPipeline
from lrd_helpers.plotting import BOX_COLOURS
from lrd_helpers.storybook import render_scenes
from lrd_helpers.widgets import (
    BoxEditor,
    LayoutStudio,
    Render,
    Settings,
    layout_studio,
    render,
)
from lrd_helpers.widgets.box_editor import layer_colours, layout_svg
from lrd_helpers.widgets.layout_studio import HISTORY, Job, layout_in, starters

TWO = Layout(
    caption="a yellow house and a purple cat on snow",
    background="on snow",
    layers=[
        Layer(
            "a yellow house",
            box=(0.3, 0.25, 0.85, 0.8),
            strength=1.5,
            opacity=0.25,
            start=0.1,
            end=0.5,
        ),
        Layer("a purple cat", mask=[[0, 1], [1, 1]], colour="purple", negative_prompt="a dog"),
    ],
)


class Heard:
    """What an editor says to its page."""

    def __init__(self, editor: BoxEditor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[dict] = []
        monkeypatch.setattr(editor, "send", lambda message, **_: self.messages.append(message))


@pytest.fixture
def heard(monkeypatch):
    def heard_of(editor: BoxEditor) -> list[dict]:
        return Heard(editor, monkeypatch).messages

    return heard_of


def draft(*layers: dict, caption: str = "", background: str = "") -> dict:
    common = {"hidden": False, "locked": False}
    whole = [{"id": str(number)} | common | layer for number, layer in enumerate(layers)]
    return {"caption": caption, "background": background, "layers": whole}


CAR = {"prompt": "a red car", "box": [0.1, 0.5, 0.6, 0.9]}
STAR = {"prompt": "a yellow star", "box": [0.6, 0.1, 0.9, 0.4]}


def test_a_layout_comes_out_as_it_went_in():
    assert BoxEditor(TWO).layout == TWO
    editor = BoxEditor()
    editor.layout = TWO
    assert editor.layout == TWO


def test_what_is_set_from_python_reaches_the_page_as_one_change():
    editor, changes = BoxEditor(), []
    editor.observe(changes.append, "document")
    editor.layout = TWO
    assert len(changes) == 1
    assert json.loads(json.dumps(editor.document)) == editor.document


def test_the_page_s_draft_becomes_a_layout():
    editor = BoxEditor()
    editor.document = draft(CAR, STAR, background="at night")
    assert editor.layout == Layout(
        caption="a red car and a yellow star at night",
        background="at night",
        layers=[
            Layer("a red car", (0.1, 0.5, 0.6, 0.9)),
            Layer("a yellow star", (0.6, 0.1, 0.9, 0.4)),
        ],
    )


def test_hidden_layers_are_left_out():
    editor = BoxEditor()
    editor.document = draft(CAR | {"hidden": True}, STAR)
    assert [layer.prompt for layer in editor.layout.layers] == ["a yellow star"]
    assert editor.layout.caption == "a yellow star"


def test_a_layout_that_was_read_does_not_change_while_the_page_goes_on():
    editor = BoxEditor(TWO)
    before = editor.layout
    editor.document = draft(CAR)
    assert before == TWO


@pytest.mark.parametrize(
    ("document", "message", "mark"),
    [
        (draft(), "the canvas is empty", []),
        (draft(CAR | {"hidden": True}), "all layers are hidden", []),
        (draft(CAR, STAR | {"prompt": " "}), "layer 2 has no prompt", ["1"]),
        (draft(CAR | {"box": [0.1, 0.5, 1.6, 0.9]}), "layer 1 'a red car', box", []),
    ],
)
def test_a_draft_that_is_no_layout_is_one_sentence_here_and_in_the_page(
    document, message, mark, heard
):
    editor = BoxEditor()
    editor.document = document
    messages = heard(editor)
    with pytest.raises(LayoutError, match=re.escape(message)):
        _ = editor.layout
    assert message in messages[0]["text"]
    assert messages[0]["mark"] == mark


def test_only_a_layout_can_be_set():
    editor = BoxEditor(TWO)
    with pytest.raises(TypeError, match=r"layout is of type dict.*Layout.from_json"):
        editor.layout = {"caption": "c"}
    assert editor.layout == TWO


def test_arguments_that_cannot_work():
    with pytest.raises(ValueError, match="the layout has a caption"):
        BoxEditor(TWO, caption="another")
    with pytest.raises(ValueError, match=r"size is \(0, 128\)"):
        BoxEditor(size=(0, 128))
    with pytest.raises(traitlets.TraitError):
        BoxEditor(snap="yes")


def test_as_code_is_python_that_makes_the_layout():
    names: dict = {}
    exec(BoxEditor(TWO).as_code(), names)
    assert names["layout"] == TWO


def test_json_from_the_page_is_loaded_or_refused_with_the_reason(heard):
    editor = BoxEditor()
    messages = heard(editor)
    editor._on_message(editor, {"kind": "load", "text": TWO.to_json()}, [])
    assert editor.layout == TWO
    assert messages[-1] == {"kind": "loaded"}
    for text in ("", "[1, 2]", '{"caption": "c"}', "not JSON"):
        editor._on_message(editor, {"kind": "load", "text": text}, [])
        assert messages[-1]["text"].startswith("Nothing was loaded: ")
    editor._on_message(editor, {"kind": "something else"}, [])
    assert editor.layout == TWO


def test_an_edit_arrives_is_answered_and_is_not_sent_back(heard, monkeypatch):
    editor = BoxEditor()
    messages, changes, states = heard(editor), [], []
    editor.observe(changes.append, "document")
    monkeypatch.setattr(editor, "send_state", lambda key=None: states.append(key))
    edit = {"kind": "edit", "number": "7", "document": draft(CAR), "snap": True}
    editor._on_message(editor, edit, [])
    assert editor.layout.layers[0].prompt == "a red car"
    assert editor.snap
    assert len(changes) == 1
    assert messages == [{"kind": "received", "number": "7"}]
    assert states == []  # the page may have gone on: an old draft must not come back to it
    editor.layout = TWO
    assert states == ["document"]


def test_what_waits_for_the_draft_comes_after_the_page_s_answer_and_once(heard):
    editor, drawn = BoxEditor(TWO), []
    messages = heard(editor)
    editor.when_drawn(lambda: drawn.append(editor.layout), patience=60)
    (asked,) = messages
    assert asked["kind"] == "ask"
    assert drawn == []
    edit = {"kind": "edit", "number": "7", "document": draft(CAR), "snap": False}
    editor._on_message(editor, edit, [])  # on its way when the page was asked
    assert drawn == []
    answer = edit | {"document": draft(STAR), "question": asked["question"]}
    editor._on_message(editor, answer, [])
    editor._on_message(editor, answer, [])  # of a second view
    assert [layout.caption for layout in drawn] == ["a yellow star"]


def test_without_a_page_nobody_waits_long():
    editor, called = BoxEditor(TWO), threading.Event()
    editor.when_drawn(called.set, patience=0.01)
    assert called.wait(60)


def test_a_caption_of_the_prompts_alone_goes_on_following_them():
    said = Layout(
        "a red car at night", background="at night", layers=[Layer("a red car", CAR["box"])]
    )
    editor = BoxEditor(said)
    assert editor.layout == said
    assert editor.document["caption"] == ""
    editor.document = {**editor.document, "background": "at sea"}
    assert editor.layout.caption == "a red car at sea"
    editor.layout = replace(said, caption="a car")
    assert editor.document["caption"] == "a car"


def test_the_canvas_has_the_picture_s_ratio():
    editor = BoxEditor(image=Image.new("RGB", (64, 32), "red"))
    assert (editor.width, editor.height) == (64, 32)
    assert editor._picture.startswith("data:image/png;base64,")
    photo = Image.open(io.BytesIO(as_a_phone_saves(Image.new("RGB", (64, 32)))))
    assert photo.size == (32, 64)
    assert BoxEditor(image=photo).width == 64, "a photo lies in its file as the phone was held"
    assert (BoxEditor().width, BoxEditor().height) == (128, 128)


@pytest.fixture(scope="module")
def photo():
    """12 million pixels of which no file format can make little, turned as telephones do."""
    noise = numpy.random.default_rng(0).integers(0, 256, (750, 1000, 3), numpy.uint8)
    image = Image.fromarray(noise.repeat(4, 0).repeat(4, 1))
    image.getexif()[0x0112] = 6  # a quarter to the right
    return image


def test_a_photo_behind_the_boxes_leaves_the_saved_notebook_small(photo):
    editor = BoxEditor(TWO, image=photo)
    assert (editor.width, editor.height) == (3000, 4000), "upright, and the photo's own size"
    assert photo.size == (4000, 3000)
    data, _ = editor._repr_mimebundle_()
    outputs = 2 * json.dumps(data).encode()  # shown in two cells
    assert len(outputs + json.dumps(dependency_state(editor)).encode()) < 1e6
    assert f'href="{editor._picture}"' in data["image/svg+xml"]


def test_repr_and_static_picture_say_what_is_drawn_and_have_no_address():
    editor = BoxEditor(TWO)
    assert repr(editor) == 'BoxEditor(128 × 128, layers: "a yellow house", "a purple cat")'
    assert repr(BoxEditor()) == "BoxEditor(128 × 128, layers: none yet)"
    data, _ = editor._repr_mimebundle_()
    assert data["text/plain"] == repr(editor)
    svg = data["image/svg+xml"]
    assert svg == BoxEditor(TWO).static_svg()
    assert "1 a yellow house" in svg
    assert svg.count("<mask ") == 1


HOSTILE = """</text><script>alert(1)</script>'"><image href='x'/>&amp;&lt;\t]]>é猫😀"""


@pytest.mark.parametrize(
    ("told", "shown"),
    [(HOSTILE, HOSTILE), ("\0\x07\x1b a\ufffe\ud800 b", "\ufffd\ufffd\ufffd a\ufffd\ufffd b")],
    ids=["markup", "what no XML may hold"],
)
def test_the_static_picture_is_an_svg_whatever_is_in_it(told, shown):
    import resvg_py

    layers = [{"prompt": told, "mask": told, "opacity": 0.5}, {"prompt": told, "box": [0, 0, 1, 1]}]
    svg = layout_svg(layers, (64, 128), picture=told, label=told)
    parsed = ElementTree.fromstring(svg.encode())
    tags = [element.tag.partition("}")[2] for element in parsed.iter()]
    masked, boxed = ["mask", "image", "rect"], ["rect", "rect"]
    assert tags == ["svg", "image", *masked, "rect", "text", *boxed, "rect", "text"]
    texts = [f"1 {shown} 50 %", f"2 {shown}"]
    cut = [text if len(text) <= 28 else f"{text[:27]}…" for text in texts]  # 200 wide
    assert [e.text for e in parsed.iter() if e.text] == cut
    attribute = shown.replace("\t", " ")  # as XML reads it
    assert [e.get("href") for e in parsed.iter() if e.get("href")] == [attribute] * 2
    assert parsed.get("aria-label") == attribute
    assert bytes(resvg_py.svg_to_bytes(svg_string=svg)).startswith(b"\x89PNG")


def test_two_static_pictures_of_one_mask_share_a_name_only_if_they_are_alike():
    names = [
        re.search('mask id="(.*?)"', BoxEditor(TWO, size=size).static_svg())[1]
        for size in ((64, 64), (128, 128), (64, 128))
    ]
    assert names[0] == names[1] != names[2]


def test_a_name_that_would_be_cut_off_ends_at_the_right_edge():
    layers = [Layer("a car", (0, 0, 0.5, 0.5)), Layer("a yellow house", (0.8, 0.5, 1, 1))]
    svg = BoxEditor(Layout("c", layers=layers)).static_svg()
    left, right = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="18"', svg)
    assert left[0] == "0.0"
    assert sum(map(float, right)) == pytest.approx(400)
    assert "2 a yellow house" in svg


@pytest.mark.parametrize(
    ("layer", "colour"),
    [
        ({"prompt": "a yellow star"}, "#ffff00"),
        ({"prompt": "a light-blue star"}, "#add8e6"),
        ({"prompt": "a yellow star", "colour": "Teal"}, "#008080"),
        ({"prompt": "a cat"}, BOX_COLOURS[1].lower()),
        ({"prompt": ""}, BOX_COLOURS[1].lower()),
    ],
)
def test_a_layer_is_drawn_in_its_own_colour(layer, colour):
    assert layer_colours([{"prompt": "a dog"}, layer]) == [BOX_COLOURS[0].lower(), colour]


def test_the_widgets_are_public_names():
    assert lrd_helpers.BoxEditor is BoxEditor
    assert lrd_helpers.LayoutStudio is LayoutStudio


SHOWN = {
    "BoxEditor": lambda pipe: BoxEditor(TWO),
    "Guess": lambda pipe: widgets.Guess("What?", ["this", "that"], answer=0, why="So."),
    "LayoutStudio": lambda pipe: LayoutStudio(pipe),
    "SideBySide": lambda pipe: widgets.SideBySide(
        [widgets.Pair(TWO, ("a", "b"), (Image.new("RGB", (8, 8)),) * 2)]
    ),
    "StackEditor": lambda pipe: lrd_helpers.StackEditor(
        lrd_helpers.LayerStack(Image.new("RGB", (8, 8)), [])
    ),
}


@pytest.mark.parametrize("widget", SHOWN)
def test_on_colab_a_widget_says_where_its_manager_is_as_the_last_line_of_a_cell(
    pipe, widget, monkeypatch
):
    """As `display` does there: with ipywidgets 8 nothing else tells Colab."""
    address = "https://example.org/manager.js"
    colab = SimpleNamespace(
        enable_custom_widget_manager=lambda: None,
        _widgets=SimpleNamespace(_installed_url=address),
    )
    monkeypatch.setitem(sys.modules, "google.colab.output", colab)
    kind = "application/vnd.jupyter.widget-view+json"
    data, metadata = DisplayFormatter().format(SHOWN[widget](pipe))
    assert data[kind]["model_id"]
    assert metadata[kind] == {"colab": {"custom_widget_manager": {"url": address}}}


# ------------------------------------------------------------------ the studio

CARS = Layout(
    caption="a red car and a yellow star at night",
    background="at night",
    layers=[Layer("a red car", box=(0, 0.5, 0.5, 1)), Layer("a yellow star", box=(0.5, 0, 1, 0.5))],
)
QUICK = Settings(steps=3)


def say(studio, kind, **more):
    """What the studio's page says to Python."""
    studio._on_message(studio._panel, {"kind": kind, "number": "1"} | more, [])


def finds_what_was_asked(image, prompts):
    """A detector that finds a car and no star."""
    car = Detection(box=(0.0, 0.5, 0.5, 1.0), score=1.0, mask=None)
    return [[car] if "car" in prompt else [] for prompt in prompts]


@pytest.fixture
def pipe(tiny):
    return LayeredRenderingPipeline(**tiny.components, requires_safety_checker=False)


@pytest.fixture
def studio(pipe):
    return LayoutStudio(pipe, CARS, detector=finds_what_was_asked, settings=QUICK)


def test_render_is_the_pipeline_s_picture_and_what_is_known_about_it(pipe):
    steps = []
    note = lambda share: steps.append(share) or True  # noqa: E731
    made = render(CARS, pipe, QUICK, detector=finds_what_was_asked, on_step=note)
    generator = torch.Generator().manual_seed(0)
    plain = pipe(CARS, num_inference_steps=3, generator=generator).images[0]
    assert made.image.tobytes() == plain.tobytes()
    # Ten sketching steps, the collage, one step.
    assert steps == pytest.approx([step / 12 for step in range(1, 13)]), "in equal parts"
    assert made.ious == [1, 0]
    assert made.found == [(0, 0.5, 0.5, 1), None]
    assert set(made.attention) == {"a", "red", "car", "and", "yellow", "star", "at", "night"}
    assert made.attention["car"].shape == (4, 4)


def test_a_render_that_is_not_wanted_any_more_ends_at_once(pipe, monkeypatch):
    calls = []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: calls.append(a) or forward(*a, **k))
    assert render(CARS, pipe, QUICK, on_step=lambda share: share < 2 / 12) is None
    assert len(calls) == 2, "among the sketches"
    assert pipe.prompts_of_rows is None


def test_every_setting_changes_the_picture(pipe):
    pictures = {
        render(CARS, pipe, settings).image.tobytes()
        for settings in (
            QUICK,
            replace(QUICK, seed=1),
            replace(QUICK, steps=10),
            replace(QUICK, guidance_scale=9.0),
            replace(QUICK, layered_fraction=1.0),
            replace(QUICK, method="authors"),
            replace(QUICK, method="authors", strength=0.0),
        )
    }
    assert len(pictures) == 7


def test_without_a_step_for_the_caption_the_maps_are_the_layers(pipe):
    made = render(CARS, pipe, replace(QUICK, layered_fraction=1.0))
    asked = {"a", "red", "car", "yellow", "star", *CARS.background.split()}
    assert set(made.attention) == asked
    assert made.ious is None


def test_the_caption_may_be_a_layer_s_prompt(pipe):
    layout = Layout(caption="a red car", layers=[Layer("a red car", box=(0, 0.5, 0.5, 1))])
    made = render(layout, pipe, QUICK)
    generator = torch.Generator().manual_seed(0)
    plain = pipe(layout, num_inference_steps=3, generator=generator).images[0]
    assert made.image.tobytes() == plain.tobytes()
    assert made.layout == layout
    assert set(made.attention) == {"a", "red", "car"}


def test_remarks_of_the_pipeline_are_kept(pipe, recwarn):
    hidden = Layout(
        caption="a car", layers=[Layer("a car", (0, 0, 0.5, 1)), Layer("a boat", (0, 0, 1, 1))]
    )
    assert "completely hidden" in " ".join(render(hidden, pipe, QUICK).remarks)
    assert len(recwarn) == 0


def test_the_button_renders_shows_and_works_again(studio):
    jobs = []
    studio._panel.observe(lambda change: jobs.append(change["new"].get("share")), "job")
    studio.start()
    studio.wait()
    assert jobs == [0, *(pytest.approx(step / 12) for step in range(1, 13)), None]
    assert [made.layout for made in studio.renders] == [CARS]
    shown = studio._panel.shown
    assert shown["svg"].startswith("<svg")
    assert shown["text"] == CARS.caption
    assert [row["iou"] for row in shown["ious"]] == [1, 0]
    assert shown["told"].startswith("seed 0 · 3 steps · collage · ")
    assert studio._panel.job == {"text": "Done."}
    assert [each["label"] for each in studio._panel.strip] == ["seed 0 · 0.50"]
    assert studio.editor._picture.startswith("data:image/"), "it lies under the boxes, too"
    assert repr(studio).endswith("1 renders)")


def test_large_pictures_are_reduced_and_texts_are_escaped_once(studio, photo):
    layout = replace(CARS, caption="a <b>car</b> & a star")
    image = photo.resize((1500, 1125), Image.Resampling.NEAREST)
    made = Render(layout, QUICK, image, {"a&b": torch.rand(4, 4)}, None, None, 1.0, ())
    studio.renders = [made] * HISTORY
    studio._show(made)
    assert len(json.dumps(dependency_state(studio))) < 1e6
    for text, word in (
        (layout.caption, ""),
        ("Where the model looks for “a&b” (bright = much)", "a&b"),
    ):
        say(studio, "look", view="picture", word=word)
        assert studio._panel.shown["text"] == text
        figure = ElementTree.fromstring(studio._panel.shown["svg"])
        assert figure.get("aria-label") == f"{text} (seed 0)"


def test_the_button_draws_what_the_page_has(studio, heard):
    messages = heard(studio.editor)
    say(studio, "render")
    answer = {"kind": "edit", "number": "7", "document": draft(STAR), "snap": False}
    answer["question"] = messages[0]["question"]
    studio.editor._on_message(studio.editor, answer, [])
    studio.wait()
    assert [made.layout.caption for made in studio.renders] == ["a yellow star"]


def test_the_views_and_the_word_that_is_clicked(studio):
    say(studio, "look", view="found", word="")  # nothing is there to look at
    studio.start()
    studio.wait()
    plain = studio._panel.shown["svg"]
    say(studio, "look", view="asked", word="")
    assert studio._panel.shown["svg"].count("<rect") > plain.count("<rect")
    say(studio, "look", view="found", word="car")
    assert "looks for “car”" in studio._panel.shown["text"]
    say(studio, "look", view="found", word="")
    assert "stroke-dasharray" in studio._panel.shown["svg"]
    say(studio, "look", view="found", word="car")
    studio.start()
    studio.wait()
    assert studio._panel.shown["word"] == "", "a new picture is not covered by an old word's map"
    assert studio._panel.shown["view"] == "found"
    say(studio, "look", view="picture", word="")
    assert studio._panel.shown["svg"] == plain


def test_what_is_not_finished_is_said_and_nothing_is_rendered(studio, heard):
    messages = heard(studio.editor)
    studio.editor.document = draft(CAR, STAR | {"prompt": ""})
    studio.start()
    assert "layer 2 has no prompt" in studio._panel.job["text"]
    assert messages[0]["mark"] == ["1"]
    assert studio._panel.job["bad"]
    assert studio.renders == []


def test_an_error_is_shown_and_the_button_works_again(studio):
    studio.settings = Settings(
        method="paper", steps=3
    )  # its K is larger than this tiny model's latents
    studio.start()
    studio.wait()
    assert studio._panel.job["bad"]
    assert "share" not in studio._panel.job, "the button works again"
    assert "top_k is 20" in studio._panel.job["text"]
    studio.settings = Settings(method="boxdiff", steps=3)
    studio.editor.layout = replace(CARS, layers=[replace(CARS.layers[0], opacity=0.5)])
    studio.start()
    studio.wait()
    assert "has an opacity of 0.5, but method 'boxdiff' knows none" in studio._panel.job["text"]


def test_a_render_draws_the_layout_as_it_was_when_it_began(studio):
    with studio._pipe_is_free:  # so it cannot go on before the edit
        studio.start()
        studio.editor.document = draft(CAR)
    studio.wait()
    assert studio.renders[0].layout == CARS


def test_cancel_and_what_is_outdated_leave_no_picture(studio):
    with studio._pipe_is_free:
        studio.start()
        studio.cancel()
    studio.wait()
    assert studio.renders == []
    assert "Cancelled" in studio._panel.job["text"]
    with studio._pipe_is_free:
        studio.start()
        first = studio._thread
        studio.settings = replace(QUICK, seed=7)
        studio.start()
    first.join()
    studio.wait()
    assert [made.settings.seed for made in studio.renders] == [7]


@pytest.mark.parametrize("by", ["cancel", "start"])
def test_a_render_also_stops_while_it_sketches(studio, monkeypatch, by):
    asked, forward = [], studio.pipe.unet.forward

    def first_call_meets_the_button(*inputs, **more):
        asked.append(inputs)
        if len(asked) == 1:
            getattr(studio, by)()
        return forward(*inputs, **more)

    monkeypatch.setattr(studio.pipe.unet, "forward", first_call_meets_the_button)
    studio.start()
    first = studio._thread
    first.join()
    if by == "cancel":
        assert len(asked) == 2, "whether the model is still the same, and a step"
        assert "Cancelled" in studio._panel.job["text"]
    studio.wait()
    assert len(studio.renders) == (by == "start")
    if by == "start":
        steps = [len(rows) for rows, *_ in asked]
        assert steps[:3] == [1, 4, 1], "the one that was dropped asked once"
        assert len(asked) == 2 + 1 + 9 + 2 + 1, "nine more steps, the relevance, the last step"


def test_live_mode_waits_for_a_pause_and_for_prompts(pipe, monkeypatch):
    monkeypatch.setattr("lrd_helpers.widgets.layout_studio.PAUSE", 0.05)
    studio = LayoutStudio(pipe, CARS, detector=finds_what_was_asked, settings=QUICK, live=True)
    studio.editor.document = draft(CAR | {"prompt": ""})
    studio.wait()
    assert studio.renders == []
    studio.editor.document = draft(CAR)
    studio.editor.document = draft(STAR)
    studio.wait()
    assert [made.layout.caption for made in studio.renders] == ["a yellow star"]


def hand(studio, *layers):
    """What the editor's page says while a box is dragged; no layers: it is let go."""
    document = draft(*layers) if layers else None
    studio.editor._on_message(studio.editor, {"kind": "hand", "document": document}, [])


@pytest.fixture
def follower(pipe):
    """A studio whose picture follows, with a picture."""
    studio = LayoutStudio(
        pipe, detector=finds_what_was_asked, follow=True, settings=replace(QUICK, steps=10)
    )
    studio.editor.document = draft(CAR, STAR)
    studio.start()
    studio.wait()
    return studio


def right(layer, by):
    x0, y0, x1, y1 = layer["box"]
    return layer | {"box": [x0 + by, y0, x1 + by, y1]}


def test_while_a_box_is_dragged_quick_pictures_follow_and_the_newest_wins(follower, monkeypatch):
    drawn, shown = [], []
    draws = layout_studio.render

    def noting(layout, pipe, settings, **options):
        drawn.append((layout.layers[0].box[0], settings.steps, options["attention"]))
        return draws(layout, pipe, settings, **options)

    monkeypatch.setattr(layout_studio, "render", noting)
    follower._panel.observe(lambda change: shown.append(change["new"]), "shown")
    with follower._pipe_is_free:  # so it cannot go on meanwhile
        for by in (0.01, 0.02, 0.03):
            hand(follower, right(CAR, by), STAR)
    follower.wait()
    assert [place for place, *_ in drawn] == [pytest.approx(0.11), pytest.approx(0.13)]
    assert drawn[0][1:] == (4, False), "few steps, and no maps"
    assert [each["quick"] for each in shown] == [True, True]
    assert len(follower.renders) == 1, "a look only"
    before = shown[-1]["svg"]
    hand(follower, right(CAR, 0.05), STAR)
    follower.editor._on_message(  # let go
        follower.editor, {"kind": "edit", "document": draft(right(CAR, 0.05), STAR)}, []
    )
    hand(follower)
    follower.wait()
    assert drawn[-1] == (pytest.approx(0.15), 10, True), "the full picture"
    assert len(follower.renders) == 2
    assert not shown[-1]["quick"]
    assert shown[-1]["svg"] != before


def test_a_drag_that_changes_nothing_ends_with_the_picture_of_before(follower):
    before = follower._panel.shown
    hand(follower, right(CAR, 0.2), STAR)
    follower.wait()
    assert follower._panel.shown["quick"]
    assert follower._panel.shown["svg"] != before["svg"]
    hand(follower)
    assert follower._panel.shown == before
    assert follower._job is None


def test_what_moves_is_drawn_again_and_what_is_typed_waits(follower):
    follower.editor.document = draft(CAR, right(STAR, 0.05))
    follower.wait()
    follower.editor.document = draft(CAR, right(STAR, 0.05) | {"prompt": "a yellow boat"})
    follower.wait()
    assert len(follower.renders) == 2
    say(follower, "follow", on=False)
    hand(follower, right(CAR, 0.2), STAR)
    follower.editor.document = draft(CAR, STAR | {"prompt": "a yellow boat"})
    follower.wait()
    assert len(follower.renders) == 2
    assert follower._panel.follow == {"on": False, "why": ""}


@pytest.mark.parametrize(
    ("pace", "chosen", "on", "steps"),
    [
        ([(25, 3.0, False)], None, True, 4),
        ([(25, 30.0, False)], None, False, 4),
        ([(25, 30.0, False)], True, True, 4),
        ([(25, 3.0, False), (4, 0.1, True)], None, True, 10),
        ([(25, 3.0, False), (10, 0.5, True)], None, True, 6),
        ([(25, 3.0, False), (4, 1.5, True), (4, 0.2, True)], None, True, 6),
        ([(25, 3.0, False), (4, 1.5, True), (4, 1.5, True)], None, False, 4),
    ],
)
def test_the_measured_time_says_in_how_many_steps_it_follows(pipe, pace, chosen, on, steps):
    studio = LayoutStudio(pipe, CARS, follow=chosen)
    image = Image.new("RGB", (8, 8))
    for count, seconds, quick in pace:
        settings = Settings(steps=count)
        made = Render(CARS, settings, image, {}, None, None, seconds, ())
        studio._note_pace(Job(CARS, settings, quick), made)
    assert studio._panel.follow["on"] == on
    assert studio._quick_steps == steps
    why = studio._panel.follow["why"]
    assert bool(why) != on
    assert on or re.fullmatch(r"a quick picture takes about \d\.\d s here", why)


def test_the_history_keeps_the_last_renders_to_go_back_to(studio):
    for seed in range(HISTORY + 1):
        studio.settings = replace(QUICK, seed=seed)
        studio.start()
        studio.wait()
    assert [made.settings.seed for made in studio.renders] == list(range(1, HISTORY + 1))
    newest = studio._panel.shown
    say(studio, "show", name=studio._panel.strip[0]["name"])
    assert studio._panel.shown["svg"] != newest["svg"]
    assert studio._panel.shown["told"].startswith("seed 1 · ")
    assert studio.settings.seed == 1, "the sliders are those of the picture"
    assert studio._panel.job == {"text": ""}


def test_a_method_brings_its_own_layered_part(studio):
    studio.settings = Settings(method="authors")
    assert studio.settings.layered_fraction == pytest.approx(15 / 51)


def test_settings_come_with_what_is_clicked_and_live_mode_hears_them(studio, monkeypatch):
    started = []
    monkeypatch.setattr("lrd_helpers.widgets.layout_studio.PAUSE", 0.01)
    monkeypatch.setattr(studio, "start", lambda: started.append(studio.settings.seed))
    later = asdict(replace(studio.settings, seed=5))
    say(studio, "set", settings=later, live=False)
    assert studio._timer is None
    say(studio, "set", settings=later, live=True)
    studio.wait()
    assert started == [5]


def test_a_word_that_is_not_known_hides_only_its_own_iou_and_is_told_once(studio, pipe):
    def knows_no_unicorn(image, prompts):
        if any("unicorn" in prompt for prompt in prompts):
            raise ValueError("no unicorn")
        return finds_what_was_asked(image, prompts)

    layers = [CARS.layers[0], Layer("a unicorn", box=(0.5, 0, 1, 0.5))]
    layout = Layout("a red car and a unicorn at night", background="at night", layers=layers)
    made = render(layout, pipe, QUICK, detector=knows_no_unicorn)
    assert made.ious == [1, None]
    assert made.found == [(0, 0.5, 0.5, 1), None]
    told = [remark for remark in made.remarks if "unicorn" in remark]
    assert told == ["layer 2 'a unicorn': the model does not know the word 'unicorn'"]
    studio.renders = [made]
    studio._show(made)
    assert [row["iou"] for row in studio._panel.shown["ious"]] == [1, None]
    assert studio._panel.strip[0]["label"] == "seed 0 · 1.00"


def test_a_layout_begins_with_what_is_found_in_a_picture(studio, heard):
    heard(studio.editor)
    image = Image.new("RGB", (64, 64), "red")
    studio.start_from(image, ["a star", "a red car"])
    assert studio.editor.layout.layers == (Layer("a red car", box=(0, 0.5, 0.5, 1)),)
    assert studio.editor._picture
    with pytest.raises(LayoutError, match="nothing was found"):
        studio.start_from(image, ["a star"])
    with pytest.raises(ValueError, match="needs to know what to find"):
        studio.start_from(image)
    studio.start()
    studio.wait()
    say(studio, "boxes")
    assert [layer.prompt for layer in studio.editor.layout.layers] == ["a red car"]
    studio.detector = None
    say(studio, "boxes")
    assert studio._panel.job["bad"]


def test_the_shipped_detector_needs_no_prompts():
    layout = Layout("a red car on snow", layers=[Layer("a red car", (0.2, 0.3, 0.8, 0.8))])
    scene = ground_truth_scene(replace(layout, background="on snow"))
    picture = render_scenes([scene]).images[0]
    seen = layout_in(picture, StorybookDetector())
    assert (seen.caption, seen.background) == ("a red car on snow", "on snow")
    assert seen.layers[0].box == pytest.approx(layout.layers[0].box, abs=0.05)


def test_starters_are_of_every_kind_that_has_boxes():
    assert len(starters()) == 13
    assert all(layer.mask is None for layout in starters() for layer in layout.layers)


# ------------------------------------------------------------------ what they look like

RULE = re.compile(r"[^{}]+\{[^{}]*\}")


@pytest.mark.parametrize(
    "sheet", sorted(Path(widgets.__file__).parent.glob("*.css")), ids=lambda sheet: sheet.name
)
def test_every_rule_of_a_style_sheet_stands_alone(sheet):
    """A rule inside another, or an open brace, takes what follows out of the page, silently."""
    text = re.sub(r"/\*.*?\*/", "", sheet.read_text(encoding="utf-8"), flags=re.DOTALL)
    inner = re.sub(r"@(media|container)[^{}]*\{((?:[^{}]+\{[^{}]*\})*)\s*\}", r"\2", text)
    assert RULE.sub("", inner).strip() == ""
