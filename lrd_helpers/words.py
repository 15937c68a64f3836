"""Words: which words of a prompt name what, which of them a model knows, and which are its tokens.

object_of_prompt("a red car on grass")                     # "car"
unknown_words(pipe.tokenizer, "a red car in a jungle")     # ["in", "jungle"]
PromptTokens.encode(pipe.tokenizer, "a red car").positions("car")     # [3]
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from PIL import ImageColor

from lrd_helpers.layout import Layout

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Occurrence = tuple[str, int]
"""A word, and which of the places it stands at, counted from 1: ("red", 2)."""

Word = str | Occurrence
"""A word or phrase ("red car"), or one occurrence of it."""

START, END, PADDING = "<start>", "<end>", "<padding>"
"""The names of the tokens that stand for no word: the two marks, and all that follows them."""


class WordError(ValueError):
    """A word that is not there to look at: what was asked, and which words there are."""


# ------------------------------------------------------------------ what a prompt names


def colour_of_prompt(prompt: str) -> str | None:
    """The first colour word of `prompt` (a CSS name, lower case), or None if there is none.

    A colour is an adjective: it counts where another word follows it, or where it is all there is.
    So the snow of "a cat on snow" is a thing, although CSS has a colour of that name.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    adjectives = words[:-1] or words
    return next((word for word in adjectives if word in ImageColor.colormap), None)


PREPOSITIONS = re.compile(
    "above|across|against|along|among|around|at|before|behind|below|beneath|beside|between|by|down|"
    "for|from|holding|in|inside|into|near|of|off|on|onto|out|outside|over|past|riding|that|through|"
    "to|toward|towards|under|up|upon|wearing|which|who|with|without",
    re.IGNORECASE,
)
"""What ends the part of a prompt that names its object."""


def object_of_prompt(prompt: str) -> str:
    """The word of `prompt` that names its object: the last one before the first preposition.

    A guess by grammar: "car" of "a red car", "cat" of "a sleepy cat on a sofa". Where it guesses
    wrong, `Layer.word` says it better.
    """
    words = re.findall(r"[^\W\d_]+", prompt)
    if not words:
        return prompt
    ends = (n for n, word in enumerate(words) if n and PREPOSITIONS.fullmatch(word))
    return words[next(ends, len(words)) - 1]


# ------------------------------------------------------------------ which words a model knows

WHOLE_WORDS = 1000
"""A tokenizer with more entries than this builds any word from pieces; ours has whole words."""

_END = "</w>"  # CLIP's mark of a piece that ends a word
_WORD = re.compile(r"[^\W\d_]+|\d")  # letters that stand together, or one digit, as CLIP splits


def known_words(tokenizer: CLIPTokenizer) -> list[str]:
    """The whole words of the tokenizer's vocabulary, in alphabetical order (no single letters)."""
    pieces = (piece for piece in tokenizer.get_vocab() if piece.endswith(_END))
    return sorted(word for piece in pieces if len(word := piece.removesuffix(_END)) > 1)


def unknown_words(tokenizer: CLIPTokenizer, text: str) -> list[str]:
    """The words of `text` that the tokenizer has to take apart, in order, each once.

    In our tokenizers every word the model was trained on is one token, so a word of several pieces
    is one the model has never seen. A token that was added later, such as the "<cat-toy>" of a
    textual inversion, was learnt on its own. Stable Diffusion's vocabulary (49,408 entries) spells
    anything: for a vocabulary of more than `WHOLE_WORDS` entries the answer is empty.
    """
    if len(tokenizer) > WHOLE_WORDS:
        return []
    unknown = []
    for word in _WORD.findall(_without_added_tokens(tokenizer, text)):
        pieces = tokenizer.tokenize(word)
        if len(pieces) != 1 or not pieces[0].endswith(_END):
            unknown.append(word)
    return list(dict.fromkeys(unknown))


def _without_added_tokens(tokenizer: CLIPTokenizer, text: str) -> str:
    # A letter that it cannot spell becomes its mark for that, which counts as added, too.
    added = set(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for token, (first, last) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        if token in added:
            text = text[:first] + " " * (last - first) + text[last:]
    return text


def nearest_words(tokenizer: CLIPTokenizer, word: str) -> list[str]:
    """Up to three known words spelled most like `word`, nearest first; empty if none is near."""
    return difflib.get_close_matches(word.lower(), known_words(tokenizer), n=3)


def word_tokenizer(words: Iterable[str], length: int = 24) -> CLIPTokenizer:
    """A `CLIPTokenizer` in which each of `words` is one token and any other word is spelled.

    Args:
        words: lower-case words of the letters a to z.
        length: tokens a prompt is cut or padded to, the two end marks included.
    """
    from transformers import CLIPTokenizer

    words = sorted(set(words), key=lambda word: (-len(word), word))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + _END for c in letters)]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + _END]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            merges += [pair] if pair not in merges else []
            vocabulary += [pieces[0]] if pieces[0] not in vocabulary else []
    tokenizer = CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(vocabulary)},
        merges=merges,
        model_max_length=length,
    )
    if spelled := [word for word in words if tokenizer.tokenize(word) != [word + _END]]:
        raise ValueError(f"these words cannot be one token each: {', '.join(spelled)}")
    return tokenizer


# ------------------------------------------------------------------ which tokens a word has


@dataclass(frozen=True)
class PromptTokens:
    """Which tokens of an encoded prompt are which of its words.

    Attributes:
        text: the prompt (in Unicode's NFC, as CLIP reads it).
        spans: for each token the characters [first, last) of `text` it stands for; an empty span
            for the start mark, the end mark and the padding.
    """

    text: str
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def encode(cls, tokenizer: CLIPTokenizer, prompt: str) -> PromptTokens:
        """The tokens of `prompt` as a pipeline encodes it: padded, cut at the model's length."""
        text = unicodedata.normalize("NFC", prompt)
        encoded = tokenizer(
            text,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_offsets_mapping=True,
        )
        return cls(text, tuple(map(tuple, encoded["offset_mapping"])))

    @property
    def words(self) -> list[str]:
        """The prompt's words in order, each once."""
        return list(dict.fromkeys(re.findall(r"[^\W\d_]+|\d+", self.text)))

    def positions(self, word: str, occurrence: int | None = None) -> list[int]:
        """The tokens of `word`, in order.

        A word is found whatever its case and only as a whole ("car" is not in "cars"); the words of
        a phrase stand side by side.

        Args:
            word: a word, a phrase, or `START`, `END` or `PADDING`.
            occurrence: 1 for the first place it stands at, 2 for the second, …; None for all.

        Raises:
            WordError: it does not stand there, or beyond the last token that the model reads.
        """
        places = self._places(word)
        if occurrence is None:
            return sorted({token for place in places for token in place})
        if not 1 <= occurrence <= len(places):
            raise WordError(
                f'{word!r} stands {len(places)} times in the prompt "{self.text}"; there is '
                f"no occurrence {occurrence} (they are counted from 1)"
            )
        return places[occurrence - 1]

    def _places(self, word: str) -> list[list[int]]:
        marks = [token for token, (first, last) in enumerate(self.spans) if first == last]
        if word in (START, END, PADDING):
            named = {START: marks[:1], END: marks[1:2], PADDING: marks[2:]}[word]
            if not named:
                raise WordError(
                    f'the prompt "{self.text}" fills all {len(self.spans)} tokens: it has no {word}'
                )
            return [[token] for token in named]
        matches = (
            list(re.finditer(_pattern(word), self.text, re.IGNORECASE)) if word.split() else []
        )
        if not matches:
            words = ", ".join(self.words) or "none"
            raise WordError(f'{word!r} is not in the prompt "{self.text}"; its words are: {words}')
        read = max(last for _, last in self.spans)
        matches = [match for match in matches if match.end() <= read]
        if not matches:
            raise WordError(
                f"{word!r} stands beyond the {len(self.spans)} tokens that the model reads of the "
                f'prompt "{self.text}"; it reads "{self.text[:read]}"'
            )
        return [
            [
                token
                for token, (first, last) in enumerate(self.spans)
                if first < min(last, match.end()) and last > match.start()
            ]
            for match in matches
        ]


def _pattern(word: str) -> str:
    parts = unicodedata.normalize("NFC", word).split()
    letter = r"[^\W_]"  # or a digit: what a whole word does not stand next to
    before = f"(?<!{letter})" if parts[0][0].isalnum() else ""
    after = f"(?!{letter})" if parts[-1][-1].isalnum() else ""
    return before + r"\s+".join(map(re.escape, parts)) + after


# ------------------------------------------------------------------ which words a layer has


class LayerWords(NamedTuple):
    """Where the caption names a layer: all its words ("red", "car"), and the object alone."""

    phrase: list[Occurrence]
    thing: list[Occurrence]


def layer_words(layout: Layout, tokens: PromptTokens) -> list[LayerWords]:
    """The words of the caption that name each layer; no word names two layers.

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
        end = words.index(thing) + 1 if thing in words else 0
        phrase = [word for word in words[:end] if word.lower() not in ("a", "an", "the")]
        phrases.append(" ".join(phrase) or thing)
    result: dict[int, LayerWords] = {}
    occupied: set[int] = set()  # tokens
    for names in (phrases, things):
        # The longest first: "a car" must not take the car of "a red car".
        for layer in sorted(range(len(names)), key=lambda layer: -len(names[layer].split())):
            places = [place for place in _places(tokens, names[layer]) if not occupied & {*place}]
            if layer in result or not places:
                continue
            occupied.update(places[0])
            phrase = _occurrences(tokens, names[layer], places[0])
            words = [word.lower() for word in things[layer].split()]
            result[layer] = LayerWords(phrase, [word for word in phrase if word[0] in words])
    for layer, thing in enumerate(things):
        if layer not in result:
            name = f"layer {layer + 1} {layout.layers[layer].prompt!r}"
            remedy = "the caption should name each layer's object, or Layer.word say what it has"
            try:
                tokens.positions(thing)
            except WordError as error:
                raise WordError(f"{name}: {error}; {remedy}") from None
            raise WordError(
                f'{name}: every {thing!r} of the caption "{tokens.text}" is another layer\'s; '
                + remedy
            )
    return [result[layer] for layer in range(len(things))]


def every_word(tokens: PromptTokens) -> list[Occurrence]:
    """All words of the caption that the model reads, each as often as it stands there."""
    words = dict.fromkeys(word.lower() for word in tokens.words)
    return [(word, n + 1) for word in words for n, _ in enumerate(_places(tokens, word))]


def _places(tokens: PromptTokens, word: str) -> list[list[int]]:
    """The tokens of each occurrence of a word or phrase."""
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
        for number, positions in enumerate(_places(tokens, word), start=1)
        if set(positions) <= set(place)
    ]
