"""lrd_helpers.words: what a prompt names, what a model knows, and which tokens a word has."""

import copy
import re
from dataclasses import replace

import pytest
from conftest import WORDS
from transformers import CLIPTokenizer

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.words import (
    END,
    PADDING,
    START,
    LayerWords,
    PromptTokens,
    WordError,
    colour_of_prompt,
    every_word,
    known_words,
    layer_words,
    nearest_words,
    object_of_prompt,
    unknown_words,
    word_tokenizer,
)

TOKENIZER = word_tokenizer([*WORDS, "the"], length=16)
PROMPT = "a red car and a blue zebra at sea"

# ------------------------------------------------------------------ what a prompt names


@pytest.mark.parametrize(
    ("prompt", "colour"),
    [
        ("a red car", "red"),
        ("An ORANGE rocket, at sea", "orange"),
        ("a white cat and a red ball", "white"),
        ("a car", None),
        ("a cat on snow", None),
        ("a pink cat on snow", "pink"),
        ("red", "red"),
        ("a redder car", None),
    ],
)
def test_colour_of_prompt(prompt: str, colour: str | None) -> None:
    assert colour_of_prompt(prompt) == colour


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a red car", "car"),
        ("a sleepy cat on a sofa", "cat"),
        ("car", "car"),
        ("at sea", "sea"),
        ("a knight holding a sword", "knight"),
        ("on top of the hill a house", "top"),
        ("日本の家", "日本の家"),
        ("123", "123"),
    ],
)
def test_object_of_prompt(prompt: str, word: str) -> None:
    assert object_of_prompt(prompt) == word


# ------------------------------------------------------------------ which words a model knows


def test_words() -> None:
    tokenizer = word_tokenizer(WORDS, length=16)
    assert set(known_words(tokenizer)) == set(WORDS) - {"a"}
    assert unknown_words(tokenizer, "A red car, on grass.") == []
    assert unknown_words(tokenizer, "a red dog, on gras, a dog!") == ["dog", "gras"]
    assert unknown_words(tokenizer, "ein Café 7") == ["ein", "Café", "7"]
    assert unknown_words(tokenizer, "") == []
    assert nearest_words(tokenizer, "Gras") == ["grass"]
    assert nearest_words(tokenizer, "xylophone") == []


def test_a_large_vocabulary_knows_every_word() -> None:
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    vocabulary |= {f"w{number}": number for number in range(2, 1500)}
    assert unknown_words(CLIPTokenizer(vocab=vocabulary, merges=[]), "a dog") == []


def test_tokens_that_were_added_are_known() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    text = "a red <cat-toy> and a dog on <cat-toy>_1 grass"
    assert unknown_words(tokenizer, text) == ["cat", "toy", "dog", "1"]
    # As diffusers' load_textual_inversion adds a learnt word of several vectors.
    tokenizer.add_tokens(["<cat-toy>", "<cat-toy>_1"])
    assert unknown_words(tokenizer, text) == ["dog"]
    assert unknown_words(tokenizer, "<cat-toy> <cat-toy>_1") == []
    assert unknown_words(tokenizer, "a <cat> " + "at sea " * 20) == ["cat"]


# ------------------------------------------------------------------ which tokens a word has


@pytest.mark.parametrize(
    ("word", "tokens"),
    [
        (START, [0]),
        ("a", [1, 5]),
        (("a", 1), [1]),
        (("a", 2), [5]),
        ("RED", [2]),
        ("red car", [2, 3]),
        ("Red  car", [2, 3]),
        ("zebra", [7, 8, 9, 10, 11]),
        ("blue zebra", [6, 7, 8, 9, 10, 11]),
        ("sea", [13]),
        (END, [14]),
        (PADDING, [15]),
    ],
)
def test_words_are_found_by_the_tokenizers_offsets(word, tokens) -> None:
    occurrence = (word,) if isinstance(word, str) else word
    assert PromptTokens.encode(TOKENIZER, PROMPT).positions(*occurrence) == tokens


def test_case_spaces_marks_and_accents() -> None:
    prompt = PromptTokens.encode(TOKENIZER, " A  red, Red\ncar's cafe\u0301 12")
    assert prompt.positions("red") == [2, 4]
    assert prompt.positions("red, red car") == [2, 3, 4, 5]
    assert prompt.positions(",") == [3]
    assert prompt.positions("car") == [5]
    assert prompt.positions("car's") == [5, 6, 7]
    ids = TOKENIZER("café").input_ids[1:-1]
    assert prompt.positions("café") == list(range(8, 8 + len(ids)))
    assert prompt.positions("12") == [12, 13]
    assert prompt.words == ["A", "red", "Red", "car", "s", "café", "12"]


def test_a_word_inside_another_is_not_found() -> None:
    prompt = PromptTokens.encode(TOKENIZER, "a redcar and scar, a car_red")
    assert prompt.positions("car") == [prompt.positions("scar")[-1] + 3]
    assert prompt.positions("red") == [prompt.positions("car")[0] + 2]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (("dogs",), "'dogs' is not in the prompt \"a red car\"; its words are: a, red, car"),
        (("car red",), "'car red' is not in the prompt \"a red car\"; its words are: a, red, car"),
        (("",), "'' is not in the prompt"),
        (("red", 2), "'red' stands 1 times in the prompt \"a red car\"; there is no occurrence 2"),
        (("red", 0), "no occurrence 0 (they are counted from 1)"),
    ],
)
def test_a_word_that_is_not_there(word, message) -> None:
    with pytest.raises(WordError, match=re.escape(message)):
        PromptTokens.encode(TOKENIZER, "a red car").positions(*word)


def test_a_word_beyond_the_last_token() -> None:
    prompt = PromptTokens.encode(TOKENIZER, "red " * 14 + "car red")
    assert prompt.positions("red") == list(range(1, 15))
    message = "'car' stands beyond the 16 tokens that the model reads of the prompt \"red red red"
    with pytest.raises(WordError, match=re.escape(message)):
        prompt.positions("car")
    with pytest.raises(WordError, match="fills all 16 tokens: it has no <padding>"):
        prompt.positions(PADDING)


def test_an_empty_prompt() -> None:
    prompt = PromptTokens.encode(TOKENIZER, "")
    assert (prompt.positions(START), prompt.positions(END)) == ([0], [1])
    assert prompt.positions(PADDING) == list(range(2, 16))
    with pytest.raises(WordError, match='not in the prompt ""; its words are: none'):
        prompt.positions("car")


# ------------------------------------------------------------------ which words a layer has


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
