"""Which words of the caption are which layer's: "a red car and a blue car" has a car for each."""

from __future__ import annotations

import contextlib
import itertools
import re
from typing import NamedTuple

from lrd_helpers.attention import PromptTokens, WordError
from lrd_helpers.guidance import object_of_prompt
from lrd_helpers.layout import Layout

Occurrence = tuple[str, int]
"""A word of the caption, and which of the places it stands at, counted from 1."""


class LayerWords(NamedTuple):
    """Where the caption names a layer: all its words ("red", "car"), and the object alone."""

    phrase: list[Occurrence]
    thing: list[Occurrence]


def layer_words(layout: Layout, tokens: PromptTokens) -> list[LayerWords]:
    """Each layer's own words in the caption, of which no two layers share one.

    A layer is what its prompt says before the first preposition, without the article ("red car" of
    "a red car on grass"), or its `word`. Where the caption says it otherwise ("a car"), the object
    is enough. Of layers with the same words the first has the first occurrence, and so on.

    Raises:
        WordError: the caption does not name a layer, or too few of its kind.
    """
    things = [layer.word or object_of_prompt(layer.prompt) for layer in layout.layers]
    phrases = []
    for layer, thing in zip(layout.layers, things, strict=True):
        words = re.findall(r"[^\W\d_]+", layer.prompt)
        ends = words.index(thing) + 1 if thing in words else 0
        named = [word for word in words[:ends] if word.lower() not in ("a", "an", "the")]
        phrases.append(" ".join(named) or thing)
    found: dict[int, LayerWords] = {}
    taken: set[int] = set()
    for spoken in (phrases, things):
        # The longest first: "a car" must not take the car of "a red car".
        for number in sorted(range(len(spoken)), key=lambda n: -len(spoken[n].split())):
            places = [place for place in _places(tokens, spoken[number]) if not taken & {*place}]
            if number in found or not places:
                continue
            taken.update(places[0])
            phrase = _occurrences(tokens, spoken[number], places[0])
            named = [word.lower() for word in things[number].split()]
            thing = [word for word in phrase if word[0] in named]
            found[number] = LayerWords(phrase, thing)
    for number, thing in enumerate(things):
        if number not in found:
            name = f"layer {number + 1} {layout.layers[number].prompt!r}"
            remedy = "the caption should name each layer's object, or Layer.word say what it has"
            try:
                tokens.positions(thing)
            except WordError as error:
                raise WordError(f"{name}: {error}; {remedy}") from None
            raise WordError(
                f'{name}: every {thing!r} of the caption "{tokens.text}" is another layer\'s; '
                + remedy
            )
    return [found[number] for number in range(len(things))]


def every_word(tokens: PromptTokens) -> list[Occurrence]:
    """All words of the caption that the model reads, each as often as it stands there."""
    words = dict.fromkeys(word.lower() for word in tokens.words)
    return [(word, n + 1) for word in words for n, _ in enumerate(_places(tokens, word))]


def _places(tokens: PromptTokens, word: str) -> list[list[int]]:
    places = []
    with contextlib.suppress(WordError):  # there are no more
        for occurrence in itertools.count(1):
            places.append(tokens.positions(word, occurrence))
    return places


def _occurrences(tokens: PromptTokens, phrase: str, place: list[int]) -> list[Occurrence]:
    """The words of a phrase that stands at `place`."""
    return [
        (word, number)
        for word in dict.fromkeys(phrase.lower().split())
        for number, own in enumerate(_places(tokens, word), start=1)
        if set(own) <= set(place)
    ]
