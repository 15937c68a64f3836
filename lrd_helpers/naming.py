"""Naming: which words of a prompt say what its object is, and which colour it has.

named_by("a red, shiny car on grass")      # Naming("car", "red, shiny car", "red")

A guess by the grammar of English, without a model. Where it guesses wrong, `Layer.word` and
`Layer.colour` say it better.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from PIL import ImageColor

from lrd_helpers.layout import Layer
from lrd_helpers.messages import excerpt


class WordError(ValueError):
    """A word that is not there to look at: what was asked, and which words there are."""


class Naming(NamedTuple):
    """What a prompt says of its object.

    Attributes:
        word: its object, "car".
        phrase: from the first word that describes it to `word`, as it stands in the prompt.
        colour: a CSS name, "red" or "lightblue"; None if no colour is said of the object.
    """

    word: str
    phrase: str
    colour: str | None


# ------------------------------------------------------------------ words of English


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


DETERMINERS = _set_of(
    "a an the this these those my your his her its our their some any another each every both all "
    "several many few two three four five six seven eight nine ten"
)
"""What a name begins with. They are never the object, and what follows them is never its end."""

PREPOSITIONS = _set_of(
    "above across after against along among amid around as at atop before behind below beneath "
    "beside besides between beyond by during for from in inside into is are was were has have like "
    "near of on onto opposite outside over past than that through to toward towards under "
    "underneath upon via when where which while who whose with within without"
)
"""What ends a name, unless it stands right after a determiner ("an inside joke")."""

HOLDING = _set_of(
    "holding riding wearing carrying eating drinking playing reading saying showing using "
    "containing pulling pushing throwing chasing"
)
"""What ends a name, unless it stands right after a word that describes ("a red playing card")."""

LOOSE = _set_of("and or down off out up close next full made lit seen asleep awake")
"""What ends a name before a preposition, a determiner, another of these, or nothing: "a cat up a
tree", "a cat and a dog", but "a pick up truck", "salt and pepper shakers". Participles do, too."""

_PARTICIPLE = re.compile("[^aeiouy-]*[aeiouy].*ing|.{3,}ed")
NOUNS_LIKE_PARTICIPLES = _set_of(
    "building painting drawing earring pudding dumpling stocking ceiling clothing wedding railing "
    "awning duckling gosling seedling sapling morning evening lightning icing topping landing "
    "crossing engraving etching carving herring being steed bobsled moped seaweed flowerbed "
    "toolshed watershed"
)

ADJECTIVES = _set_of(
    "very extremely slightly dark light bright pale deep vivid big small large little tiny huge "
    "giant tall short long wide narrow thick thin fat slim round flat sharp straight old "
    "new young ancient modern antique vintage retro futuristic classic traditional beautiful "
    "pretty cute lovely adorable ugly elegant cozy cosy majestic scary spooky creepy shiny glossy "
    "matte smooth rough soft hard fluffy furry fuzzy hairy shaggy spiky scaly woolly rusty dusty "
    "dirty muddy clean wet dry broken worn wooden metallic golden silvery "
    "woollen colorful colourful multicolored multicoloured transparent translucent "
    "happy sad angry sleepy playful fierce brave friendly lonely quiet hot cold warm cool frozen "
    "snowy rainy sunny cloudy foggy misty stormy open empty heavy fast slow strong rich fresh ripe "
    "juicy delicious wild magical mystical mysterious simple plain ornate intricate realistic "
    "photorealistic cinematic dramatic moody minimalist abstract fantastic epic stylish fancy "
    "rustic single"
)
"""After these a comma or bracket goes on with the name: "a small, old house". Colours and
participles are adjectives, too."""

TAGS = _set_of(
    "masterpiece quality resolution res highres absurdres detail details detailed realistic "
    "photorealistic cinematic lighting lights shadows focus bokeh background style artstation "
    "trending award-winning photo photograph photography illustration render portrait painting "
    "drawing sketch art artwork 4k 8k hd uhd hdr raw dslr"
)
"""What lies between two commas, has no determiner and ends in one of these, names no object."""

PICTURES_AND_AMOUNTS = _set_of(
    "photo photos photograph photography picture pictures image painting watercolor watercolour "
    "drawing illustration sketch cartoon render rendering portrait shot view close-up closeup up "
    "one pair couple group lots bunch herd flock pack swarm crowd row lot set kind type piece "
    "slice scoop pile heap stack"
)
"""What these are *of* is the object: "a photo of a dog", "a pair of shoes"; not "a cup of tea"."""

# ------------------------------------------------------------------ how they name an object

_BETWEEN = r"\s,;:!?|/\\()\[\]{}<>\"“”„«»…–—_*+=&、。，・！？（）"
WORD = re.compile(rf"(?![-'’.])(?:[^{_BETWEEN}]|(?<=\d),(?=\d))+(?<![-'’.])")
"""A word as people write it: "T-shirt", "woman's", "3D", "1,000"."""

MOST_CHARACTERS = 5000
"""What is read of a prompt; models read some 300."""

_BREAK = re.compile(r"[,;!?|()\[\]{}<>…–—、。，！？（）]|::|[.:]\s|\s-+\s")
_WEIGHT = re.compile(
    r"[(\[][^()\[\]]*[^()\[\]\d]:\s*-?\d*\.?\d+\s*[)\]]"  # (a red car:1.2)
    r"|\(\([^()]*\)\)|\[\[[^\[\]]*\]\]"  # ((a red car))
    r"|\w{1,40}::\s*-?\d[\d.]*"  # a red car::2
)

_JOINTS = PREPOSITIONS | DETERMINERS | LOOSE
_DESCRIBING = ADJECTIVES | DETERMINERS | LOOSE
_Words = Sequence[re.Match[str]]


def named_by(prompt: str) -> Naming:
    """The object of `prompt`, the phrase that names it, and its colour.

    The object is the last word of the phrase. The phrase ends

    - at the first preposition or verb ("a cat on a sofa", "a cat sleeping"), but not in a
      hyphenated word or right after an article ("an off-road car", "a down jacket");
    - at the first comma, bracket or full stop, but not after adjectives ("a red, shiny car, best
      quality"). What holds only tags is passed over ("best quality, a red car").

    What a picture or an amount is *of* is the object ("a photo of a dog", "a pair of shoes"), what
    a thing is full of is not ("a cup of coffee"). The colour is that of the phrase, or of what it
    is full of or made of ("a bowl of red apples"), not that of other things ("a cat on a red
    sofa"): the first CSS name that stands before a word that it describes, or alone.

    Raises:
        WordError: no word is left, or it has letters that are not Latin: there the grammar is not
            that of English, and spaces may not part the words.
    """
    phrase, _ = _phrase(_parts(prompt))
    word = _object(phrase)
    if word is None or not all(map(_is_latin, word[0])):
        raise WordError(
            f"which word of {excerpt(prompt)} names its object cannot be guessed; give it as "
            "Layer.word"
        )
    text = re.sub("['’]s$", "", word[0])
    first = next(each for each in phrase if each[0].lower() not in DETERMINERS)
    end = word.start() + len(text)
    return Naming(text, prompt[first.start() : end], colour_of_prompt(prompt))


def colour_of_prompt(prompt: str) -> str | None:
    """The colour of `named_by`, also where it cannot say which word is the object."""
    phrase, rest = _phrase(_parts(prompt))
    word = _object(phrase)
    describing = phrase[: phrase.index(word)] if word else []
    return _colour(describing or phrase) or _colour(rest[:-1] or rest)


def object_of_layer(layer: Layer) -> str:
    """The word or phrase that names a layer's object: its `word`, else that of its prompt.

    Raises:
        WordError: it cannot be guessed.
    """
    return (layer.word or "").strip() or named_by(layer.prompt).word


def weight_in(prompt: str) -> str | None:
    """The first weight of other programs in `prompt`, such as "(a red car:1.2)"; None without."""
    found = _WEIGHT.search(prompt[:MOST_CHARACTERS])
    return found[0] if found else None


def _parts(prompt: str) -> list[_Words]:
    """The words of `prompt`, cut at commas, brackets and the ends of sentences."""
    parts: list[list[re.Match[str]]] = [[]]
    for word in WORD.finditer(prompt[:MOST_CHARACTERS]):
        if parts[-1]:
            last = parts[-1][-1]
            between = prompt[last.end() : word.start()]
            short = between.startswith(".") and re.fullmatch("[A-Z][a-z]", last[0])  # "St. Bernard"
            if _BREAK.search(between) and not short:
                parts.append([])
        parts[-1].append(word)
    return parts if parts[0] else []


def _phrase(parts: Sequence[_Words]) -> tuple[_Words, _Words]:
    """The words that name the object, and those that it is made of or full of."""
    names = [_name(part) for part in parts]
    names = [name for name in names if not _is_tag(name[0])] or names
    phrase: list[re.Match[str]] = []
    rest: _Words = []
    for words, of in names:
        begins = words[0][0].lower() in DETERMINERS
        if begins and phrase and phrase[0][0].lower() in DETERMINERS:  # "an orange, an apple"
            break
        phrase, rest = [*words] if begins else [*phrase, *words], of
        if not _describe(words):
            break
    return phrase, rest


def _is_tag(words: _Words) -> bool:
    texts = [word[0].lower() for word in words if any(map(str.isalpha, word[0]))]
    return bool(texts) and texts[-1] in TAGS and texts[0] not in DETERMINERS


def _name(part: _Words) -> tuple[_Words, _Words]:
    """The words of `part` that name the object, and those that name what it is "of"."""
    words = [word[0].lower() for word in part]
    names: list[_Words] = []
    start = 0
    while start < len(words) and len(names) < 2:
        end = next((n for n in range(start + 1, len(words)) if _ends(words, n)), len(words))
        of = end + 1 if words[end + 1 : end + 2] == ["of"] else end  # "full of", "made of"
        nothing = words[of : of + 1] != ["of"] or of + 1 == len(words)
        if names or nothing or words[of - 1] not in PICTURES_AND_AMOUNTS:
            names.append(part[start:end])
        start = len(words) if nothing else of + 1
    return names[0], names[1] if len(names) > 1 else []


def _ends(words: Sequence[str], n: int) -> bool:
    """Whether the name that begins before word n ends before it."""
    before, word, after = words[n - 1], words[n], words[n + 1] if n + 1 < len(words) else None
    if before in DETERMINERS:
        return False
    if word in HOLDING and not _describes(before):
        return True
    if word in LOOSE or _is_participle(word):
        goes_on = after is None or after in _JOINTS or _is_participle(after)
        return goes_on and not (_describes(before) and before not in ImageColor.colormap)
    return word in PREPOSITIONS


def _is_participle(word: str) -> bool:
    return bool(_PARTICIPLE.fullmatch(word)) and word not in NOUNS_LIKE_PARTICIPLES


def _describes(word: str) -> bool:
    adjective = word in _DESCRIBING or word in ImageColor.colormap or _is_participle(word)
    return adjective or not any(map(str.isalpha, word))


def _describe(words: _Words) -> bool:
    return all(_describes(word[0].lower()) for word in words)


def _object(phrase: _Words) -> re.Match[str] | None:
    """The last word that is no determiner and, where there is such a word, no bare number."""
    words = [word for word in phrase if word[0].lower() not in DETERMINERS]
    words = [word for word in words if any(map(str.isalnum, word[0]))]
    lettered = [word for word in words if any(map(str.isalpha, word[0]))]
    return (lettered or words or [None])[-1]


def _is_latin(letter: str) -> bool:
    return not letter.isalpha() or unicodedata.name(letter, "").startswith("LATIN")


def _colour(words: _Words) -> str | None:
    """The first colour among words that describe, the longest name first: "light blue"."""
    texts = [word[0].lower() for word in words]
    for n, text in enumerate(texts):
        names = ["".join(texts[n : n + length]).replace("-", "") for length in (3, 2, 1)]
        names.append(text.rpartition("-")[2])  # "dark-yellow", but not "blue-eyed"
        if colour := next((name for name in names if name in ImageColor.colormap), None):
            return colour
    return None
