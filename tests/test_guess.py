"""Guess: what is asked, what is locked, what is told at the end, and its page in a real browser."""

from __future__ import annotations

import re

import nbformat
import numpy
import pytest
from execute_notebooks import cleaned
from widget_page import SCREENSHOTS, load

from lrd_helpers.widgets import Guess, guess_summary
from lrd_helpers.widgets import guess as guess_module

QUESTION = "Which form of ξ obeys best?"
ANSWERS = ["seen at each step", "painted once", "both"]
WHY = "What is painted belongs to the noise, and no step takes it away."


@pytest.fixture(autouse=True)
def _a_new_kernel(monkeypatch):
    monkeypatch.setattr(guess_module, "_ASKED", {})


def asked(question=QUESTION, answers=ANSWERS, *, answer=1, why=WHY):
    return Guess(question, answers, answer=answer, why=why)


# ------------------------------------------------------------------ asked


def test_run_all_shows_the_same_text_each_time():
    first, again = asked(), asked()
    assert repr(first) == repr(again) == f"Guess first. {QUESTION} {' / '.join(ANSWERS)}."
    (one, _), (other, _) = first._repr_mimebundle_(), again._repr_mimebundle_()
    view = "application/vnd.jupyter.widget-view+json"
    assert one.pop(view) != other.pop(view)
    assert one == other
    assert sorted(one) == ["text/html", "text/plain"]


def test_without_a_kernel_the_question_is_read_and_the_answer_is_folded():
    page = asked(why="a < b & c").static_html()
    open_part, folded = page.split("<details>")
    assert all(text in open_part for text in (QUESTION, *ANSWERS))
    assert "a &lt; b" not in open_part
    assert "<b>painted once</b>. a &lt; b &amp; c" in folded
    saved = nbformat.v4.new_output("display_data", data=asked()._repr_mimebundle_()[0])
    cell = nbformat.v4.new_code_cell("", outputs=[saved])
    [kept] = cleaned(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs
    assert sorted(kept.data) == ["text/html", "text/plain"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"question": " "}, "question is ' ', but should be a text that is not empty"),
        ({"question": None}, "question is None, but should be a text"),
        ({"why": ""}, "why is '', but should be a text that is not empty"),
        ({"answers": ["yes"]}, "the number of answers is 1, but should be 2 to 4"),
        ({"answers": list("abcde")}, "the number of answers is 5, but should be 2 to 4"),
        ({"answers": "yes"}, "answers is 'yes', but should be a list of texts"),
        ({"answers": 3}, "answers is 3, but should be a list of texts"),
        ({"answers": ["yes", "\n"]}, r"answers\[1\] is '\\n', but should be a text"),
        ({"answers": ["yes", 7]}, r"answers\[1\] is 7, but should be a text"),
        ({"answers": ["yes", "no", "yes "]}, r"answers\[0\] and answers\[2\] are both 'yes'"),
        ({"answer": 3}, r"answer is 3, but the answers have the numbers 0 \('seen .*\) to 2"),
        ({"answer": -1}, "answer is -1, but the answers have the numbers 0"),
        ({"answer": True}, "answer is True, but the answers have the numbers 0"),
        ({"answer": 1.0}, "answer is 1, but the answers have the numbers 0"),
        ({"answer": "both"}, "answer is a text; give its number, 2"),
        ({"answer": "a", "answers": ["x" * 900, "y" * 900]}, "answer is 'a', but the answers"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(wrong, said):
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        asked(**wrong)
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)
    assert guess_summary().asked == 0


# ------------------------------------------------------------------ locked


def test_a_guess_is_locked_for_good():
    guess = asked()
    guess.lock(numpy.int64(2))
    assert guess.chosen == 2
    assert repr(guess).endswith(" Your guess: both.")
    with pytest.raises(ValueError, match="the guess 'both' is locked; restart the kernel"):
        guess.lock(1)
    with pytest.raises(ValueError, match="the guess is 3, but the answers have the numbers 0"):
        asked("Another?").lock(3)


def test_a_cell_that_is_run_again_has_its_guess_still():
    asked().lock(0)
    again = asked(why="said better")
    assert again.chosen == 0
    assert asked(answers=ANSWERS[:2]).chosen is None
    assert guess_summary().asked == 2


def test_the_page_locks_and_a_second_view_comes_too_late():
    guess = asked()
    guess._on_message(guess, {"kind": "lock", "number": 0}, [])
    guess._on_message(guess, {"kind": "lock", "number": 2}, [])
    assert guess.chosen == 0


# ------------------------------------------------------------------ at the end


def test_after_run_all_the_summary_is_a_stable_line():
    asked()
    asked("Another?")
    said = "Guesses locked in: 0 of 2. Guess above, then run this cell again."
    assert repr(guess_summary()) == said
    assert guess_summary()._repr_html_() is None


def test_the_summary_shows_where_intuition_was_wrong():
    asked("First <b>?").lock(1)
    asked("Second?").lock(2)
    asked("Third?")
    summary = guess_summary()
    assert repr(summary).splitlines() == [
        "Guesses locked in: 2 of 3; right: 1.",
        "✗ wrong: Second? You guessed: both. It is: painted once.",
        "✓ right: First <b>? You guessed: painted once. It is: painted once.",
    ]
    table = summary._repr_html_()
    lines = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line) for line in table.split("<tr>")[1:]]
    assert lines[:2] == [
        ["verdict", "question", "your guess", "answer"],
        ["✗ wrong", "Second?", "both", "painted once"],
    ]
    assert "First &lt;b&gt;?" in table
    assert "Third" not in table


# ------------------------------------------------------------------ its page

PYTHON = 'message.kind === "lock" && model.set("chosen", message.number)'


@pytest.fixture
def page(chromium):
    context = chromium.new_context(viewport={"width": 360, "height": 640}, has_touch=True)
    page, complaints = context.new_page(), []
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    yield page
    context.close()
    assert complaints == []


def screenshot(page, name, background):
    theme = "light" if background == "#fff" else "dark"
    page.evaluate(f"document.body.style.background = '{background}'")
    page.wait_for_selector(f".lrd-guess[data-theme={theme}]")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"guess-{name}-{theme}.png")


@pytest.mark.slow
def test_a_guess_by_keyboard_then_the_answer_in_words(page):
    load(page, asked(), PYTHON)
    group = page.get_by_role("radiogroup", name=f"Guess first. {QUESTION}", exact=True)
    radios = group.get_by_role("radio")
    assert [radio.is_checked() for radio in radios.all()] == [False] * 3
    assert page.get_by_role("button", name="Lock in").is_disabled()
    page.evaluate("window.heard = 0; document.body.addEventListener('keydown', () => heard++)")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # marks
    assert radios.nth(0).is_checked()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert radios.nth(2).is_checked()
    screenshot(page, "marked", "#fff")
    screenshot(page, "marked", "#111318")
    page.keyboard.press("Enter")  # locks
    page.wait_for_function("state.chosen === 2")
    assert page.evaluate("heard") == 1  # Tab, before anything had the focus
    assert page.evaluate("messages") == [{"kind": "lock", "number": 2}]
    told = page.locator(".told").inner_text()
    assert told.startswith("✗ Not so: you guessed “both”, the answer is “painted once”.")
    assert WHY in told
    assert page.evaluate("document.activeElement.className") == "told"
    assert page.locator("label").all_inner_texts() == [
        "seen at each step",
        "painted once\n✓ right answer",
        "both\n✗ your guess",
    ]
    assert all(radio.is_disabled() for radio in radios.all())
    assert page.get_by_role("button").count() == 0
    screenshot(page, "wrong", "#fff")
    screenshot(page, "wrong", "#111318")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.slow
def test_a_guess_by_finger_in_one_of_two_views_without_python(page):
    load(page, asked(answers=[*ANSWERS, "x" * 90]), PYTHON)
    page.evaluate("void show(document.body.appendChild(document.createElement('div')))")
    page.clock.install()
    page.evaluate("answers = false")
    first, second = page.locator(".lrd-guess").all()
    first.get_by_text("painted once").tap()
    assert second.get_by_role("radio").nth(1).is_checked() is False
    first.get_by_role("button", name="Lock in").tap()
    assert first.locator(".told").inner_text().startswith("✓ Right: painted once.")
    assert second.locator(".told").is_hidden()
    page.clock.run_for(6000)
    assert "Python does not answer" in first.get_by_role("alert").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    screenshot(page, "lost", "#fff")
    page.evaluate("model.set('chosen', 1)")
    assert first.get_by_role("alert").count() == 0
    assert second.locator(".told").inner_text().startswith("✓ Right: painted once.")
