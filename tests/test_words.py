"""lrd_helpers.words: what a prompt names, what a model knows, and which tokens a word has."""

import copy
import re
from dataclasses import replace

import pytest
from conftest import WORDS
from transformers import CLIPTokenizer

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.naming import Naming, WordError, named_by, object_of_layer, weight_in
from lrd_helpers.words import (
    END,
    PADDING,
    START,
    LayerWords,
    PromptTokens,
    every_word,
    known_words,
    layer_words,
    nearest_words,
    unknown_words,
    word_tokenizer,
)

TOKENIZER = word_tokenizer([*WORDS, "the"], length=16)
PROMPT = "a red car and a blue zebra at sea"

# ------------------------------------------------------------------ what a prompt names


@pytest.mark.parametrize(
    ("prompt", "word", "phrase", "colour"),
    [
        # articles, plurals, numbers
        ("a red car", "car", "red car", "red"),
        ("car", "car", "car", None),
        ("A RED CAR", "CAR", "RED CAR", "red"),
        ("two red cars", "cars", "red cars", "red"),
        ("3 cats", "cats", "3 cats", None),
        ("1,000 balloons", "balloons", "1,000 balloons", None),
        ("a Porsche 911", "Porsche", "Porsche", None),
        ("123", "123", "123", None),
        ("my dog", "dog", "dog", None),
        # prepositions
        ("a sleepy cat on a sofa", "cat", "sleepy cat", None),
        ("at sea", "sea", "at sea", None),
        ("on top of the hill a house", "top", "on top", None),
        ("The Eiffel Tower at night", "Tower", "Eiffel Tower", None),
        ("a sign that says \"STOP\"", "sign", "sign", None),
        ("a house like a mushroom", "house", "house", None),
        # hyphens, digits, and prepositions that are none
        ("an off-road car", "car", "off-road car", None),
        ("an off road car", "car", "off road car", None),
        ("a down jacket", "jacket", "down jacket", None),
        ("a blue down jacket", "jacket", "blue down jacket", "blue"),
        ("a take-out box", "box", "take-out box", None),
        ("a take out box on a table", "box", "take out box", None),
        ("a pick up truck", "truck", "pick up truck", None),
        ("a walk-in closet", "closet", "walk-in closet", None),
        ("a cat up a tree", "cat", "cat", None),
        ("an orange off the coast", "orange", "orange", None),
        ("a merry-go-round at night", "merry-go-round", "merry-go-round", None),
        ("a jack-in-the-box", "jack-in-the-box", "jack-in-the-box", None),
        ("a T-shirt", "T-shirt", "T-shirt", None),
        ("a white T-shirt with a stripe", "T-shirt", "white T-shirt", "white"),
        ("a 3D printer", "printer", "3D printer", None),
        ("an F-16 at sea", "F-16", "F-16", None),
        # verbs
        ("a knight holding a sword", "knight", "knight", None),
        ("a robot playing guitar", "robot", "robot", None),
        ("a red playing card", "card", "red playing card", "red"),
        ("a dog running on grass", "dog", "dog", None),
        ("a cat sleeping", "cat", "cat", None),
        ("a sleeping cat", "cat", "sleeping cat", None),
        ("a cat sitting next to a dog", "cat", "cat", None),
        ("a wall covered with ivy", "wall", "wall", None),
        ("an ice covered mountain", "mountain", "ice covered mountain", None),
        ("a cat is on the table", "cat", "cat", None),
        # what it is made of, full of, a picture of
        ("a cup of coffee", "cup", "cup", None),
        ("a bowl of red apples", "bowl", "bowl", "red"),
        ("a basket full of green fruit", "basket", "basket", "green"),
        ("a house made of red brick", "house", "house", "red"),
        ("a picture of a dog", "dog", "dog", None),
        ("photo of a red car on grass", "car", "red car", "red"),
        ("a black and white photo of a cat", "cat", "cat", None),
        ("a close up of a bee", "bee", "bee", None),
        ("an oil painting of two red boats at sea", "boats", "red boats", "red"),
        ("a pair of red shoes", "shoes", "red shoes", "red"),
        ("a pair of running shoes", "shoes", "running shoes", None),
        ("a slice of pizza on a plate", "pizza", "pizza", None),
        ("a herd of cows", "cows", "cows", None),
        # adjectives with commas
        ("a red, shiny car", "car", "red, shiny car", "red"),
        ("a small, old, wooden house on a hill", "house", "small, old, wooden house", None),
        ("a very old, rusty car, best quality", "car", "very old, rusty car", None),
        ("An ORANGE rocket, at sea", "rocket", "ORANGE rocket", "orange"),
        # tags, weights, brackets
        ("a red car, masterpiece, best quality", "car", "red car", "red"),
        ("red car,8k,masterpiece", "car", "red car", "red"),
        ("masterpiece, best quality, a red car", "car", "red car", "red"),
        ("best quality, car, snow", "car", "car", None),
        ("cinematic, a red car", "car", "red car", "red"),
        ("a car with studio lighting, sharp focus", "car", "car", None),
        ("1girl, solo, red dress", "1girl", "1girl", None),
        ("(a red car:1.2)", "car", "red car", "red"),
        ("((red car)), (best quality:1.4)", "car", "red car", "red"),
        ("a (red:1.3) car", "car", "red:1.3) car", "red"),
        ("a car (vintage)", "car", "car", None),
        ("a red car::2 blue sky::1", "car", "red car", "red"),
        ("red_car", "car", "red_car", "red"),
        ("a <cat-toy> on grass", "cat-toy", "cat-toy", None),
        # several things
        ("a cat and a dog", "cat", "cat", None),
        ("a white cat and a red ball", "cat", "white cat", "white"),
        ("a black and white cat", "cat", "black and white cat", "black"),
        ("salt and pepper shakers", "shakers", "salt and pepper shakers", None),
        # possessives, marks
        ("a woman's hat", "hat", "woman's hat", None),
        ("the dog\u2019s bowl", "bowl", "dog\u2019s bowl", None),
        ("the baker's", "baker", "baker", None),
        ("a red car.", "car", "red car", "red"),
        ("A red car. It is fast.", "car", "red car", "red"),
        ("a St. Bernard on snow", "Bernard", "St. Bernard", None),
        ("a red car \u2013 old style", "car", "red car", "red"),
        ("a rock'n'roll guitar", "guitar", "rock'n'roll guitar", None),
        # colours
        ("a dark-red car", "car", "dark-red car", "darkred"),
        ("a light blue boat", "boat", "light blue boat", "lightblue"),
        ("a dark yellow star", "star", "dark yellow star", "yellow"),
        ("a blue-eyed cat", "cat", "blue-eyed cat", None),
        ("a cat on a red sofa", "cat", "cat", None),
        ("a cat on snow", "cat", "cat", None),
        ("a redder car", "car", "redder car", None),
        ("red", "red", "red", "red"),
        ("an orange", "orange", "orange", None),
        ("an orange, an apple", "orange", "orange", None),
        ("an orange on a table, best quality", "orange", "orange", None),
        ("a glass of orange juice", "glass", "glass", "orange"),
        # letters beyond a to z
        ("a cr\u00e8me br\u00fbl\u00e9e", "br\u00fbl\u00e9e", "cr\u00e8me br\u00fbl\u00e9e", None),
        ("a red cafe\u0301 at night", "cafe\u0301", "red cafe\u0301", "red"),
        ("a Wei\u00dfbier glass", "glass", "Wei\u00dfbier glass", None),
        ("a car \U0001f697", "car", "car", None),
    ],
)  # fmt: skip
def test_what_a_prompt_names(prompt: str, word: str, phrase: str, colour: str | None) -> None:
    assert named_by(prompt) == Naming(word, phrase, colour)


@pytest.mark.parametrize(
    "prompt",
    [
        "a",
        "The",
        "",
        "!!",
        "\U0001f697",
        "日本の家",
        "赤い車, best quality",
        "красная машина",
        "قطة حمراء",
    ],
)
def test_an_object_that_cannot_be_guessed(prompt: str) -> None:
    with pytest.raises(WordError, match=r"which word .* its object .*Layer\.word"):
        named_by(prompt)
    assert object_of_layer(Layer("赤い車", (0, 0, 1, 1), word="車")) == "車"


@pytest.mark.parametrize(
    ("prompt", "weight"),
    [
        ("(a red car:1.2)", "(a red car:1.2)"),
        ("a (red:1.3) car", "(red:1.3)"),
        ("a [red: .5 ] car", "[red: .5 ]"),
        ("((red car))", "((red car))"),
        ("a red car::2", "car::2"),
        ("a red car (vintage), 16:9", None),
        ("a clock at (about) 3:45, (16:9)", None),
    ],
)
def test_weight_in_a_prompt(prompt: str, weight: str | None) -> None:
    assert weight_in(prompt) == weight


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
    assert prompt.words == ["A", "red", "Red", "car's", "café", "12"]


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


@pytest.mark.parametrize(
    ("caption", "prompt", "phrase"),
    [
        ("a take-out box, an off-road car", "an off-road car at sea", ["off-road", "car"]),
        ("a red, shiny car at sea", "a red, shiny car, best quality", ["red", "shiny", "car"]),
        ("a red car at sea", "(a red car:1.2)", ["red", "car"]),
        ("a dog and a cup of tea", "a cup of tea", ["cup"]),
        ("my friend's red cafe\u0301", "a photo of a red caf\u00e9", ["red", "caf\u00e9"]),
    ],
)
def test_the_phrase_is_searched_as_it_stands(caption, prompt, phrase) -> None:
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.model_max_length = 77
    tokens = PromptTokens.encode(tokenizer, caption)
    layout = Layout(caption, layers=[Layer(prompt, (0, 0, 1, 1))])
    (words,) = layer_words(layout, tokens)
    assert words == LayerWords([(word, 1) for word in phrase], [(phrase[-1], 1)])
    assert set(words.thing) <= set(every_word(tokens, words.thing))


def test_words_without_spaces() -> None:
    caption = "\u8d64\u3044\u8eca\u3068\u9752\u3044\u8eca"  # a red car and a blue car
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.model_max_length = 77
    tokens = PromptTokens.encode(tokenizer, caption)
    layers = [Layer(caption, (0, 0, 1, 1), word=word) for word in ("\u8eca", "\u9752\u3044\u8eca")]
    red, blue = layer_words(Layout(caption, layers=layers), tokens)
    assert red.thing == [("\u8eca", 1)]
    assert blue.phrase == [("\u9752\u3044\u8eca", 1)]
    things = red.thing + blue.thing
    assert every_word(tokens, things) == sorted(things)
    message = r"layer 1: which word of .* cannot be guessed; give it as Layer\.word"
    with pytest.raises(WordError, match=message):
        layer_words(Layout(caption, layers=[Layer(caption, (0, 0, 1, 1))]), tokens)


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
    tokens = PromptTokens.encode(TOKENIZER, "a red-car, red")
    assert every_word(tokens) == [("a", 1), ("red-car", 1), ("red", 2)]
    assert every_word(tokens, [("car", 1)]) == [("a", 1), ("red", 2), ("car", 1)]
