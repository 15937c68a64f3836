import re
from dataclasses import replace

import pytest
from conftest import WORDS

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.words import (
    LayerWords,
    PromptTokens,
    WordError,
    every_word,
    layer_words,
    word_tokenizer,
)

TOKENIZER = word_tokenizer([*WORDS, "the"], length=16)


def words_of(caption: str, *prompts: str) -> list[LayerWords]:
    layout = Layout(caption, layers=[Layer(prompt, (0, 0, 1, 1)) for prompt in prompts])
    return layer_words(layout, PromptTokens.encode(TOKENIZER, caption))


def test_each_layer_has_its_own_car() -> None:
    red, blue = words_of("a red car and a blue car", "a red car", "a blue car")
    assert red == LayerWords([("red", 1), ("car", 1)], [("car", 1)])
    assert blue == LayerWords([("blue", 1), ("car", 2)], [("car", 2)])
    # whatever their order
    assert words_of("a red car and a blue car", "a blue car", "a red car") == [blue, red]


def test_layers_with_the_same_words_take_turns() -> None:
    first, second = words_of("a red car and a red car", "a red car", "a red car")
    assert first.phrase == [("red", 1), ("car", 1)]
    assert second.phrase == [("red", 2), ("car", 2)]


def test_the_longer_name_comes_first() -> None:
    some, red = words_of("a red car and a car", "a car", "a red car")
    assert red.phrase == [("red", 1), ("car", 1)]
    assert some.phrase == [("car", 2)]


@pytest.mark.parametrize(
    ("caption", "prompt", "phrase"),
    [
        ("a car and a star", "a red car", [("car", 1)]),  # the caption is silent on the colour
        ("a red car at sea", "the red car on grass", [("red", 1), ("car", 1)]),
        ("A RED Car", "a red car", [("red", 1), ("car", 1)]),
        ("a blue boat, and a car", "a car", [("car", 1)]),
    ],
)
def test_the_caption_may_say_it_otherwise(caption, prompt, phrase) -> None:
    assert words_of(caption, prompt)[0].phrase == phrase


def test_the_word_of_a_layer() -> None:
    caption = "a red car and a yellow star"
    layer = Layer("something that shines", (0, 0, 1, 1), word="yellow star")
    tokens = PromptTokens.encode(TOKENIZER, caption)
    (words,) = layer_words(Layout(caption, layers=[layer]), tokens)
    assert words.phrase == words.thing == [("yellow", 1), ("star", 1)]
    with pytest.raises(WordError, match="layer 1 'something that shines': 'that' is not in"):
        layer_words(Layout(caption, layers=[replace(layer, word="that")]), tokens)


@pytest.mark.parametrize(
    ("caption", "prompts", "message"),
    [
        ("a red car", ["a red car", "a blue boat"],
         "layer 2 'a blue boat': 'boat' is not in the prompt \"a red car\"; its words are: a, red, "
         "car; the caption should name each layer's object"),
        ("a red car", ["a red car", "a blue car"],
         "layer 2 'a blue car': every 'car' of the caption \"a red car\" is another layer's; the "
         "caption should name"),
        ("a car and a car", ["a car", "a car", "a car"], "layer 3 'a car': every 'car' of the "
         "caption \"a car and a car\" is another layer's"),
        ("at night " * 7 + "a red car", ["a red car"],
         "layer 1 'a red car': 'car' stands beyond the 16 tokens that the model reads"),
    ],
)  # fmt: skip
def test_a_caption_that_does_not_name_a_layer(caption, prompts, message) -> None:
    with pytest.raises(WordError, match=re.escape(message)):
        words_of(caption, *prompts)


def test_every_word() -> None:
    tokens = PromptTokens.encode(TOKENIZER, "A red car and a blue car, at night")
    assert every_word(tokens) == [
        ("a", 1), ("a", 2), ("red", 1), ("car", 1), ("car", 2), ("and", 1), ("blue", 1), ("at", 1),
        ("night", 1),
    ]  # fmt: skip
    # No token is counted twice.
    positions = [token for word in every_word(tokens) for token in tokens.positions(*word)]
    assert len(positions) == len(set(positions)) == 9
