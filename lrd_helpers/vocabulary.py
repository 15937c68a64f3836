"""The words a model was taught: which words of a prompt its tokenizer does not know."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

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
    is one the model has never seen. Stable Diffusion's vocabulary (49,408 entries) spells anything:
    for a vocabulary of more than `WHOLE_WORDS` entries the answer is empty.
    """
    if len(tokenizer) > WHOLE_WORDS:
        return []
    unknown = []
    for word in _WORD.findall(text):
        pieces = tokenizer.tokenize(word)
        if len(pieces) != 1 or not pieces[0].endswith(_END):
            unknown.append(word)
    return list(dict.fromkeys(unknown))


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
        raise ValueError(f"these words cannot be tokens of their own: {', '.join(spelled)}")
    return tokenizer
