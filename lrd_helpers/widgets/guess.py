"""`Guess`: a question that the learner answers before the figure does.

Guess(                       # as the last line of a cell: shows it
    "Which form of ξ obeys best?",
    ["seen at each step", "painted once", "both"],
    answer=2,                # counted from 0
    why="What is painted stays, and what is seen keeps the rest away.",
)
guess_summary()              # at the end of a notebook: where intuition was wrong

The page is `guess.js`. A locked guess stays in the kernel's memory, and goes nowhere else.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import anywidget
import traitlets

from lrd_helpers.messages import excerpt
from lrd_helpers.widgets.page import page_text

FEWEST, MOST = 2, 4
"""Answers of a question."""

_ASKED: dict[tuple[str, ...], Guess] = {}
"""Question and answers → its widget, in the order in which they were first asked."""


class Guess(anywidget.AnyWidget):
    """A question with two to four answers; a locked guess shows the right one, and why.

    A cell that is run again still has its locked guess, until the kernel is restarted.

    Args:
        question: what is asked. All texts are plain text.
        answers: what there is to choose from.
        answer: the number of the right one, counted from 0.
        why: said when a guess is locked, whether right or wrong.

    Attributes:
        chosen: the number of the locked guess, or None.

    Raises:
        ValueError: a text is empty, there are too few or too many answers, or `answer` has no text.
    """

    _esm = page_text("elements.js", "guess.js")
    _css = page_text("theme.css", "guess.css")

    question = traitlets.Unicode().tag(sync=True)
    answers = traitlets.List(traitlets.Unicode()).tag(sync=True)
    answer = traitlets.Int().tag(sync=True)
    why = traitlets.Unicode().tag(sync=True)
    chosen = traitlets.Int(None, allow_none=True).tag(sync=True)

    def __init__(self, question: str, answers: Sequence[str], *, answer: int, why: str) -> None:
        texts = _checked_answers(answers)
        question = _checked_text("question", question)
        key = (question, *texts)
        earlier = _ASKED.get(key)
        super().__init__(
            question=question,
            answers=texts,
            answer=_checked_number("answer", answer, texts),
            why=_checked_text("why", why),
            chosen=earlier.chosen if earlier else None,
        )
        self.on_msg(self._on_message)
        _ASKED[key] = self

    def lock(self, number: int) -> None:
        """Guess the answer of this number, counted from 0, for good.

        Raises:
            ValueError: there is no such answer, or a guess is locked already.
        """
        number = _checked_number("the guess", number, self.answers)
        if self.chosen is not None:
            raise ValueError(
                f"the guess {excerpt(self.answers[self.chosen])} is locked; "
                "restart the kernel to guess again"
            )
        self.chosen = number

    def static_html(self) -> str:
        """What is seen where no widget can run: the answer is folded."""
        answers = "".join(f"<li>{html.escape(answer)}</li>" for answer in self.answers)
        return (
            f"<p><b>Guess first.</b> {html.escape(self.question)}</p><ul>{answers}</ul>"
            f"<details><summary>Answer</summary><p><b>{html.escape(self.answers[self.answer])}</b>."
            f" {html.escape(self.why)}</p></details>"
        )

    def __repr__(self) -> str:
        locked = "" if self.chosen is None else f" Your guess: {self.answers[self.chosen]}."
        return f"Guess first. {self.question} {' / '.join(self.answers)}.{locked}"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        if bundle is not None:
            bundle[0]["text/html"] = self.static_html()
        return bundle

    def _on_message(self, _: Any, message: Mapping[str, Any], __: Any) -> None:
        # Another view of the same question may have been faster.
        if message.get("kind") == "lock" and self.chosen is None:
            self.lock(message["number"])


def _checked_text(name: str, text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} is {excerpt(text)}, but should be a text that is not empty")
    return " ".join(text.split())


def _checked_answers(answers: Sequence[str]) -> list[str]:
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        raise ValueError(f"answers is {excerpt(answers)}, but should be a list of texts")
    if not FEWEST <= len(answers) <= MOST:
        raise ValueError(
            f"the number of answers is {len(answers)}, but should be {FEWEST} to {MOST}"
        )
    texts = [_checked_text(f"answers[{n}]", text) for n, text in enumerate(answers)]
    for n, text in enumerate(texts):
        if text in texts[:n]:
            first = texts.index(text)
            raise ValueError(f"answers[{first}] and answers[{n}] are both {excerpt(text)}")
    return texts


def _checked_number(name: str, number: int, answers: Sequence[str]) -> int:
    if isinstance(number, str) and number in answers:
        raise ValueError(f"{name} is a text; give its number, {answers.index(number)}")
    whole = isinstance(number, Integral) and not isinstance(number, bool)
    if not whole or not 0 <= number < len(answers):
        raise ValueError(
            f"{name} is {excerpt(number)}, but the answers have the numbers 0 "
            f"({excerpt(answers[0])}) to {len(answers) - 1} ({excerpt(answers[-1])})"
        )
    return int(number)


# ------------------------------------------------------------------ at the end of a notebook


@dataclass(frozen=True, repr=False)
class GuessSummary:
    """What was guessed of all that was asked; a notebook shows it as a table, wrong guesses first.

    Attributes:
        asked: how many questions there were.
        rows: for each locked guess the question, the guess and the right answer.
    """

    asked: int
    rows: tuple[tuple[str, str, str], ...]

    @property
    def headline(self) -> str:
        """How many guesses are locked in, and how many of these are right."""
        locked = f"Guesses locked in: {len(self.rows)} of {self.asked}"
        if not self.rows:
            return f"{locked}. Guess above, then run this cell again."
        return f"{locked}; right: {sum(guess == answer for _, guess, answer in self.rows)}."

    def __repr__(self) -> str:
        lines = [
            f"{_verdict(guess, answer)}: {question} You guessed: {guess}. It is: {answer}."
            for question, guess, answer in self.rows
        ]
        return "\n".join([self.headline, *lines])

    def _repr_html_(self) -> str | None:
        if not self.rows:
            return None
        lines = [_line("th", "verdict", "question", "your guess", "answer")]
        lines += [_line("td", _verdict(*row[1:]), *row) for row in self.rows]
        return f"<p>{self.headline}</p><table>{''.join(lines)}</table>"


def _line(tag: str, *texts: str) -> str:
    left = ' style="text-align:left"'  # in JupyterLab it is right
    return f"<tr>{''.join(f'<{tag}{left}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"


def _verdict(guess: str, answer: str) -> str:
    return "✓ right" if guess == answer else "✗ wrong"


def guess_summary() -> GuessSummary:
    """Where intuition was wrong: the guesses that were locked in since the kernel's start."""
    rows = [
        (guess.question, guess.answers[guess.chosen], guess.answers[guess.answer])
        for guess in _ASKED.values()
        if guess.chosen is not None
    ]
    rows.sort(key=lambda row: row[1] == row[2])
    return GuessSummary(len(_ASKED), tuple(rows))
