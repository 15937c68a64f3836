"""`SideBySide`: two pictures of one layout, whose is whose is not said. Which is better?

pairs = shuffled_pairs(layouts, {"collage": pictures, "plain": others}, generator)
judge = SideBySide(pairs)    # as the last line of a cell: shows it
judge.counts                 # how often each method was preferred

After the last pair the page says who drew what, and whether a coin could have chosen like this.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ipywidgets
import torch
from PIL import Image

from lrd_helpers.layout import Layout
from lrd_helpers.pictures import Picture, picture_of, reduced_data_uri
from lrd_helpers.plotting import draw_layout
from lrd_helpers.widgets.column import Column

NEITHER = "no difference"
ANSWERS = ("left", NEITHER, "right")
PAPER = Image.new("RGB", (128, 128), "#f4f5f8")  # the layout is drawn on it


@dataclass(frozen=True, eq=False)
class Pair:
    """Two pictures of one layout.

    Attributes:
        layout: what was asked for.
        methods: who drew the left and the right one.
        images: the left and the right one.
    """

    layout: Layout
    methods: tuple[str, str]
    images: tuple[Image.Image, Image.Image]


def shuffled_pairs(
    layouts: Sequence[Layout],
    pictures: Mapping[str, Sequence[Picture]],
    generator: torch.Generator,
) -> list[Pair]:
    """The pictures of two methods as pairs: in random order, on random sides.

    Args:
        layouts: what was drawn.
        pictures: for each of two methods a picture of each layout.
        generator: draws order and sides.

    Raises:
        ValueError: not two methods, or not a picture of each layout.
    """
    if len(pictures) != 2:
        raise ValueError(f"pictures of {len(pictures)} methods, but two are compared at a time")
    for name, drawn in pictures.items():
        if len(drawn) != len(layouts) or not layouts:
            count = len(layouts)
            raise ValueError(f"{name!r}: {len(drawn)} pictures, but there are {count} layouts")
    order = torch.randperm(len(layouts), generator=generator).tolist()
    turned = torch.rand(len(layouts), generator=generator) < 0.5
    pairs = []
    for number, turn in zip(order, turned.tolist(), strict=True):
        left, right = reversed(pictures) if turn else pictures
        images = picture_of(pictures[left][number]), picture_of(pictures[right][number])
        pairs.append(Pair(layouts[number], (left, right), images))
    return pairs


def sign_test(wins: int, losses: int) -> float:
    """How likely a fair coin is to be at least as one-sided: p of the two-sided sign test.

    p = min(1, 2·Σ_{k ≥ max(wins, losses)} C(n, k)/2ⁿ), n = wins + losses; draws are not counted.
    """
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(max(wins, losses), count + 1))
    return min(1.0, 2 * tail / 2**count)


class SideBySide(Column):
    """Shows pair after pair and asks which is better; says at the end what was chosen.

    Args:
        pairs: as `shuffled_pairs` gives them.

    Attributes:
        answers: "left", "right" or "no difference", one for each pair that was judged.

    Raises:
        ValueError: no pairs.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        if not pairs:
            raise ValueError("there are no pairs to judge")
        self.pairs, self.answers = list(pairs), []
        self._page = ipywidgets.HTML()
        self._buttons = [ipywidgets.Button(description=answer) for answer in ANSWERS]
        for button in self._buttons:
            button.on_click(lambda button: self.answer(button.description))
        self._again = ipywidgets.Button(description="back", tooltip="Judge the last pair again")
        self._again.on_click(lambda _: self.back())
        super().__init__([self._page, ipywidgets.HBox([*self._buttons, self._again])])
        self._show()

    @property
    def counts(self) -> dict[str, int]:
        """How often each method was preferred, and how often none."""
        preferred = dict.fromkeys((*sorted(self.pairs[0].methods), NEITHER), 0)
        for pair, answer in zip(self.pairs, self.answers, strict=False):
            sides = dict(zip(("left", "right"), pair.methods, strict=True))
            preferred[sides.get(answer, NEITHER)] += 1
        return preferred

    def answer(self, which: str) -> None:
        """Judge the pair that is shown.

        Raises:
            ValueError: another answer than "left", "right" or "no difference".
        """
        if which not in ANSWERS:
            raise ValueError(f"the answer is {which!r}, but should be one of {', '.join(ANSWERS)}")
        if len(self.answers) < len(self.pairs):
            self.answers.append(which)
        self._show()

    def back(self) -> None:
        """Take the last answer back."""
        self.answers = self.answers[:-1]
        self._show()

    def __repr__(self) -> str:
        return f"SideBySide({len(self.pairs)} pairs, {len(self.answers)} judged)"

    def _show(self) -> None:
        done, count = len(self.answers), len(self.pairs)
        for button in self._buttons:
            button.disabled = done == count
        self._again.disabled = not done
        self._page.value = self._verdict() if done == count else self._question(self.pairs[done])

    def _question(self, pair: Pair) -> str:
        asked = draw_layout(PAPER, pair.layout, longest_side=256)
        views = {"asked for": asked, "left": pair.images[0], "right": pair.images[1]}
        return (
            f'<p role="status">Pair {len(self.answers) + 1} of {len(self.pairs)}. '
            f"Which picture obeys <q>{html.escape(pair.layout.caption)}</q> and its boxes better?"
            '</p><div style="display:flex;flex-wrap:wrap;gap:12px">'
            + "".join(_figure(image, name) for name, image in views.items())
            + "</div>"
        )

    def _verdict(self) -> str:
        counts = self.counts
        one, other = (name for name in counts if name != NEITHER)
        p = sign_test(counts[one], counts[other])
        told = ", ".join(f"{html.escape(name)} {number}" for name, number in counts.items())
        rows = "".join(
            f"<tr><td>{html.escape(pair.layout.caption)}</td><td>{html.escape(pair.methods[0])}"
            f"</td><td>{html.escape(pair.methods[1])}</td><td>{answer}</td></tr>"
            for pair, answer in zip(self.pairs, self.answers, strict=True)
        )
        return (
            f'<p role="status">You preferred: {told}. A coin would be at least as one-sided with '
            f"probability {p:.2f}.</p><table><tr><th>layout</th><th>left</th><th>right</th>"
            f"<th>you chose</th></tr>{rows}</table>"
        )


def _figure(image: Image.Image, name: str) -> str:
    uri = reduced_data_uri(image, 512)  # two pixels for each that is shown, for fine screens
    return (
        f'<figure style="margin:0"><img src="{uri}" alt="{name}" width="256" '
        f'style="image-rendering:pixelated"><figcaption>{name}</figcaption></figure>'
    )
