"""Words: which words of a prompt a model knows, which are its tokens, and which name a layer.

unknown_words(pipe.tokenizer, "a red car in a jungle")     # ["in", "jungle"]
PromptTokens.encode(pipe.tokenizer, "a red car").positions("car")     # [3]
"""

from __future__ import annotations

import difflib
import re
import unicodedata
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.messages import excerpt
from lrd_helpers.naming import WORD, WordError, named_by, weight_in

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Occurrence = tuple[str, int]
"""A word, and which of the places it stands at, counted from 1: ("red", 2)."""

Word = str | Occurrence
"""A word or phrase ("red car"), or one occurrence of it."""

START, END, PADDING = "<start>", "<end>", "<padding>"
"""The names of the tokens that stand for no word: the two marks, and all that follows them."""


# ------------------------------------------------------------------ which words a model knows

WHOLE_WORDS = 1000
"""A tokenizer with more entries than this builds any word from pieces; ours has whole words."""

_END = "</w>"  # CLIP's mark of a piece that ends a word
_CLIP_WORD = re.compile(r"[^\W\d_]+|\d")  # letters that stand together, or one digit


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
    for word in _CLIP_WORD.findall(_without_added_tokens(tokenizer, text)):
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


def warn_of_texts(
    tokenizer: CLIPTokenizer | None, texts: Iterable[tuple[str, str]], *, stacklevel: int
) -> None:
    """Warn of words that the model does not know, of weights, and of what it does not read.

    Args:
        tokenizer: None knows nothing of words.
        texts: how messages call each text, and the text.
        stacklevel: as for `warnings.warn`, counted from here.
    """
    for name, text in texts:
        for fault in faults_of_text(tokenizer, text):
            warnings.warn(f"{name}: {fault}", stacklevel=stacklevel)


def faults_of_text(tokenizer: CLIPTokenizer | None, text: str) -> list[str]:
    """What `warn_of_texts` warns of in one text, a sentence each."""
    faults = []
    if weight := weight_in(text):
        faults.append(
            f"the model reads the weight of {excerpt(weight)} as text; a layer's strength "
            "(Layer.strength) says how strongly it is guided"
        )
    for word in unknown_words(tokenizer, text) if tokenizer else ():
        near = ", ".join(nearest_words(tokenizer, word))
        nearest = f"; the nearest it knows: {near}" if near else ""
        faults.append(f"the model does not know the word {word!r}{nearest}")
    if tokenizer and (rest := PromptTokens.encode(tokenizer, text).unread):
        most = tokenizer.model_max_length
        faults.append(f"the model reads only {most} tokens, and not {excerpt(rest)}")
    return faults


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
        return list(dict.fromkeys(WORD.findall(self.text)))

    def positions(self, word: str, occurrence: int | None = None) -> list[int]:
        """The tokens of `word`, in order.

        A word is found whatever its case and only as a whole ("car" is not in "cars"); the words of
        a phrase stand side by side. In scripts without spaces a word stands anywhere.

        Args:
            word: a word, a phrase, or `START`, `END` or `PADDING`.
            occurrence: 1 for the first place it stands at, 2 for the second, …; None for all.

        Raises:
            WordError: it does not stand there, or beyond the last token that the model reads.
        """
        places = self.places(word)
        if not places:
            raise WordError(self.why_not(word))
        if occurrence is None:
            return sorted({token for place in places for token in place})
        if not 1 <= occurrence <= len(places):
            raise WordError(
                f"{excerpt(word)} stands {len(places)} times in the prompt {_quoted(self.text)}; "
                f"there is no occurrence {occurrence} (they are counted from 1)"
            )
        return places[occurrence - 1]

    def places(self, word: str) -> list[list[int]]:
        """The tokens of each place that `word` stands at, as far as the model reads."""
        marks = [token for token, (first, last) in enumerate(self.spans) if first == last]
        if word in (START, END, PADDING):
            named = {START: marks[:1], END: marks[1:2], PADDING: marks[2:]}[word]
            return [[token] for token in named]
        matches = _pattern(word).finditer(self.text, 0, self._read + 1) if word.split() else []
        return [
            [
                token
                for token, (first, last) in enumerate(self.spans)
                if first < min(last, match.end()) and last > match.start()
            ]
            for match in matches
            if match.end() <= self._read
        ]

    @property
    def _read(self) -> int:
        return max(last for _, last in self.spans)

    @property
    def unread(self) -> str:
        """The end of the prompt that the model does not read; "" where it reads all."""
        return self.text[self._read :].strip()

    def why_not(self, word: str) -> str:
        """Why `word` has no tokens."""
        prompt = f"the prompt {_quoted(self.text)}"
        if word in (START, END, PADDING):
            return f"{prompt} fills all {len(self.spans)} tokens: it has no {word}"
        if word.split() and _pattern(word).search(self.text):
            return (
                f"{excerpt(word)} stands beyond the {len(self.spans)} tokens that the model reads "
                f"of {prompt}; it reads {_quoted(self.text[: self._read])}"
            )
        words = ", ".join(self.words) or "none"
        return f"{excerpt(word)} is not in {prompt}; its words are: {_shortened(words)}"


def _quoted(text: str) -> str:
    return f'"{_shortened(text)}"'


def _shortened(text: str) -> str:
    text = " ".join(text[:200].split())
    return text if len(text) <= 70 else text[:69] + "…"


_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Thai, Lao, Burmese, Khmer, Japanese, Chinese: words that stand side by side."""


def _pattern(word: str) -> re.Pattern[str]:
    parts = unicodedata.normalize("NFC", word).split()
    letter = r"[^\W_]"  # or a digit: what a whole word does not stand next to

    def bounded(character: str) -> bool:
        return character.isalnum() and not _NO_SPACES.match(character)

    before = f"(?<!{letter})" if bounded(parts[0][0]) else ""
    after = f"(?!{letter})" if bounded(parts[-1][-1]) else ""
    return re.compile(before + r"\s+".join(map(re.escape, parts)) + after, re.IGNORECASE)


# ------------------------------------------------------------------ which words a layer has


class LayerWords(NamedTuple):
    """Where the caption names a layer: all its words ("red", "car"), and the object alone."""

    phrase: list[Occurrence]
    thing: list[Occurrence]


def layer_words(layout: Layout, tokens: PromptTokens) -> list[LayerWords]:
    """The words of the caption that name each layer; no word names two layers.

    A layer is the phrase of its prompt that names its object, as it stands there ("red car" of "a
    red car on grass"; see `named_by`), or its `word`. Where the caption says it otherwise ("a
    car"), the object is enough. Of layers with the same words the first has the first occurrence,
    and so on.

    Raises:
        WordError: the caption does not name a layer, or too few of its kind.
    """
    names = [_phrase_and_thing(number, layer) for number, layer in enumerate(layout.layers)]
    result: dict[int, LayerWords] = {}
    occupied: set[int] = set()  # tokens
    for texts in zip(*names, strict=True):  # the phrases, then the things
        # The longest first: "a car" must not take the car of "a red car".
        for layer in sorted(range(len(texts)), key=lambda layer: -len(texts[layer].split())):
            places = [place for place in tokens.places(texts[layer]) if not occupied & {*place}]
            if layer in result or not places:
                continue
            occupied.update(places[0])
            phrase = _occurrences(tokens, texts[layer], places[0])
            words = _words_of(names[layer][1])
            result[layer] = LayerWords(phrase, [word for word in phrase if word[0] in words])
    for number, layer in enumerate(layout.layers):
        if number not in result:
            raise WordError(_unnamed(number, layer, names[number][1], tokens))
    return [result[number] for number in range(len(names))]


def every_word(tokens: PromptTokens, named: Iterable[Occurrence] = ()) -> list[Occurrence]:
    """All words of the caption that the model reads, each as often as it stands there.

    The "out" of "take-out" is no word, unless it is one of `named`: then it counts instead.
    """
    words, named = dict.fromkeys(word.lower() for word in tokens.words), set(named)
    every = [(word, n + 1) for word in words for n, _ in enumerate(tokens.places(word))]
    places = {word: set(tokens.positions(*word)) for word in [*every, *sorted(named)]}
    taken = {token for word in named for token in places[word]}

    def counts(word: Occurrence) -> bool:
        inside = any(places[word] < place for place in places.values())
        return word in named or not (inside or places[word] & taken)

    return list(filter(counts, places))


def _phrase_and_thing(number: int, layer: Layer) -> tuple[str, str]:
    thing = (layer.word or "").strip()
    try:
        named = named_by(layer.prompt)
    except WordError as error:
        if thing:
            return thing, thing
        raise WordError(f"layer {number + 1}: {error}") from None
    if not thing:
        return named.phrase, named.word
    spoken = _pattern(thing).search(named.phrase)
    return named.phrase[: spoken.end()] if spoken else thing, thing


def _unnamed(number: int, layer: Layer, thing: str, tokens: PromptTokens) -> str:
    """Why no words of the caption are left for a layer."""
    why = f"every {excerpt(thing)} of the caption {_quoted(tokens.text)} is another layer's"
    if not tokens.places(thing):
        why = tokens.why_not(thing)
    return (
        f"layer {number + 1} {excerpt(layer.prompt)}: {why}; the caption should name each layer's "
        "object, or Layer.word say what it has"
    )


def _words_of(text: str) -> list[str]:
    return list(dict.fromkeys(WORD.findall(text.lower()))) or [text]


def _occurrences(tokens: PromptTokens, phrase: str, place: list[int]) -> list[Occurrence]:
    """The words of a phrase that stands at `place`."""
    return [
        (word, number)
        for word in _words_of(phrase)
        for number, positions in enumerate(tokens.places(word), start=1)
        if set(positions) <= set(place)
    ]
