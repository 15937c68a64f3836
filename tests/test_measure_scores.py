"""Layout against picture: IoU, success, overlaps, colours, leakage, precision; any detector."""

from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from painted import ReadsCodes, asked, paint
from PIL import Image
from transformers import (
    BatchEncoding,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
)

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.measure import (
    Detection,
    StorybookDetector,
    ZeroShotDetector,
    attribute_accuracy,
    average_precision,
    box_iou,
    found_boxes,
    front_seen,
    layout_iou,
    leakage,
    overlap_ious,
    overlapping_pairs,
    overlay_score,
    picture_success,
    success,
    success_rate,
)
from lrd_helpers.words import word_tokenizer


@pytest.fixture
def detector():
    return StorybookDetector(ReadsCodes())


# ------------------------------------------------------------------ boxes


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1),
        ((0, 0, 0.5, 1), (0.5, 0, 1, 1), 0),  # they share an edge
        ((0, 0, 0.5, 1), (0.25, 0, 0.75, 1), 1 / 3),
        ((0, 0, 1, 1), (0.25, 0.25, 0.75, 0.75), 1 / 4),
        ((0.1, 0.1, 0.2, 0.2), (0.8, 0.8, 0.9, 0.9), 0),
        ((0.5, 0.5, 0.5, 0.5), (0, 0, 1, 1), 0),  # no area
    ],
)
def test_box_iou(a, b, iou):
    a, b = (tuple(map(float, box)) for box in (a, b))
    assert box_iou(a, b) == pytest.approx(iou)


cells = st.integers(0, 7)
grid_boxes = st.builds(
    lambda x, y, w, h: (x, y, min(x + w + 1, 8), min(y + h + 1, 8)), cells, cells, cells, cells
)


@given(grid_boxes, grid_boxes)
def test_box_iou_counts_cells(a, b):
    def covered(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    expected = len(covered(a) & covered(b)) / len(covered(a) | covered(b))
    shrunk = [tuple(value / 8 for value in box) for box in (a, b)]
    assert box_iou(*shrunk) == pytest.approx(expected)


# ------------------------------------------------------------------ layout against picture


def test_layout_iou_a_number_for_each_layer(detector):
    picture = paint(("car", "red", (0, 0, 64, 64)), ("star", "yellow", (80, 80, 112, 112)))
    layout = asked(
        ("a red car", (0, 0, 64, 64)),  # exactly
        ("a yellow star", (96, 80, 128, 112)),  # half a width aside
        ("a blue star", (80, 80, 112, 112)),  # right place, wrong colour
        ("a boat", (10, 10, 20, 20)),
    )  # not there
    ious = layout_iou(detector, picture, layout)
    assert ious == pytest.approx([1, 1 / 3, 0, 0])
    assert success(ious) == [True, False, False, False]
    assert success([0.5, 0.4999]) == [True, False]
    assert found_boxes(detector, picture, layout)[3] is None


def test_two_layers_of_one_kind_each_get_their_own_object(detector):
    picture = paint(("ball", "red", (0, 0, 40, 40)), ("ball", "red", (80, 80, 128, 128)))
    layout = asked(("a red ball", (80, 80, 128, 128)), ("a red ball", (0, 0, 40, 40)))
    assert layout_iou(detector, picture, layout) == pytest.approx([1, 1])
    # Also where one of them names the colour and the other does not.
    layout = asked(("a ball", (80, 80, 128, 128)), ("a red ball", (0, 0, 40, 40)))
    assert layout_iou(detector, picture, layout) == pytest.approx([1, 1])


def test_one_object_does_not_count_for_two_layers(detector):
    picture = paint(("ball", "red", (0, 0, 40, 40)))
    layout = asked(("a red ball", (0, 0, 40, 40)), ("a red ball", (10, 10, 50, 50)))
    assert layout_iou(detector, picture, layout) == pytest.approx([1, 0])


def test_an_object_near_no_box_goes_to_the_nearest_layer(detector):
    picture = paint(("ball", "red", (60, 0, 70, 10)))
    layout = asked(("a red ball", (0, 0, 20, 20)), ("a red ball", (80, 0, 100, 20)))
    assert found_boxes(detector, picture, layout)[0] is None
    assert found_boxes(detector, picture, layout)[1] is not None


def test_a_second_copy_elsewhere_counts_against(detector):
    picture = paint(("ball", "red", (0, 0, 32, 32)), ("ball", "red", (96, 96, 128, 128)))
    layout = asked(("a red ball", (0, 0, 32, 32)))
    assert layout_iou(detector, picture, layout) == pytest.approx([1 / 16])


def test_an_object_cut_in_two_counts_whole(detector):
    picture = paint(("car", "red", (0, 40, 128, 80)), ("tree", "green", (50, 0, 70, 128)))
    layout = asked(("a red car", (0, 40, 128, 80)), ("a green tree", (50, 0, 70, 128)))
    assert layout_iou(detector, picture, layout) == pytest.approx([1, 1])


def test_success_rate_counts_layers_of_all_pictures():
    assert success_rate([[0.5, 0.2], [0.9], []]) == pytest.approx(2 / 3)
    assert success_rate([[0.5, 0.2]], threshold=0.6) == 0
    with pytest.raises(ValueError, match="no layers"):
        success_rate([[]])


def test_a_picture_succeeds_where_all_its_layers_do():
    assert picture_success([0.5, 0.9])
    assert not picture_success([0.4999, 0.9])
    assert not picture_success([0.5, 0.9], threshold=0.6)
    with pytest.raises(ValueError, match="no layers"):
        picture_success([])


# ------------------------------------------------------------------ where boxes overlap

BACK, FRONT = (0, 0, 64, 64), (32, 32, 96, 96)  # they share 32 × 32 of 2·64² − 32²: IoU 1/7
CAR, STAR = ("car", "red", BACK), ("star", "yellow", FRONT)


@pytest.mark.parametrize(
    ("things", "iou", "right"),
    [
        ([CAR, STAR], 1, True),
        ([STAR, CAR], 1, False),  # the star's box is whole, though the car hides a corner
        ([CAR, ("star", "yellow", (40, 32, 104, 96))], 24 * 32 / 32**2, True),
        # Half of the overlap shows the one, half the other.
        ([CAR, ("star", "yellow", (48, 32, 112, 96))], 16 * 32 / 32**2, False),
        # Larger than asked: 48 × 48 are shared.
        ([CAR, ("star", "yellow", (16, 16, 96, 96))], 32**2 / 48**2, True),
        ([CAR, ("star", "yellow", (80, 80, 112, 112))], 0, False),  # both there, no overlap
        ([CAR], 0, False),
        ([STAR], 0, False),
        ([("car", "blue", BACK)], 0, None),  # neither is there
    ],
)
def test_overlaps_by_hand(detector, things, iou, right):
    layout = asked(("a red car", BACK), ("a yellow star", FRONT))
    picture = paint(*things)
    assert overlapping_pairs(layout) == [(0, 1)]
    assert overlap_ious(detector, picture, layout) == pytest.approx([iou])
    assert front_seen(detector, picture, layout) == [right]


def test_each_pair_of_boxes_that_overlap_counts(detector):
    layout = asked(
        ("a red car", BACK),
        ("a yellow star", FRONT),
        ("a blue boat", (64, 64, 128, 128)),  # touches the car in a corner only
        ("a green tree", (92, 0, 128, 36)),  # shares 4 × 4 with the star: too little to be seen
    )
    picture = paint(
        CAR, STAR, ("boat", "blue", (80, 64, 128, 128)), ("tree", "green", (92, 0, 128, 36))
    )
    assert overlapping_pairs(layout) == [(0, 1), (1, 2), (1, 3)]
    assert overlap_ious(detector, picture, layout) == pytest.approx([1, 0.5, 1])
    assert front_seen(detector, picture, layout) == [True, False, None]
    apart = asked(("a red car", BACK), ("a blue boat", (64, 64, 128, 128)))
    assert overlap_ious(detector, picture, apart) == front_seen(detector, picture, apart) == []


def test_the_order_is_that_of_shapes_where_layers_have_them(detector):
    picture = paint(CAR, ("star", "yellow", (56, 32, 96, 96)))  # of the overlap 8 × 32
    boxes = asked(("a red car", BACK), ("a yellow star", FRONT))
    assert front_seen(detector, picture, boxes) == [False]
    shape = torch.zeros(128, 128, dtype=torch.bool)
    shape[32:96, 56:96] = True
    shapes = replace(boxes, layers=[boxes.layers[0], Layer("a yellow star", mask=shape)])
    assert front_seen(detector, picture, shapes) == [True]
    turned = replace(shapes, layers=shapes.layers[::-1])
    assert front_seen(detector, picture, turned) == [False]


def test_a_detector_without_pixels_cannot_tell_the_order():
    def boxes(image, prompts):
        return [[Detection((0.0, 0.0, 0.5, 0.5), 0.9, None)] for _ in prompts]

    layout = asked(("a red car", BACK), ("a yellow star", FRONT))
    assert front_seen(boxes, paint(), layout) == [None]
    assert overlap_ious(boxes, paint(), layout) == pytest.approx([32**2 / 64**2])


def test_overlay_score_by_hand():
    class Clip:
        def encode_images(self, images):
            raise AssertionError("no picture is needed")

        def encode_texts(self, texts):
            vectors = {"a car": (1.0, 0.0), "a star": (0.6, 0.8), "a boat": (0.0, 1.0)}
            return torch.tensor([vectors[text] for text in texts])

    three = asked(("a car", BACK), ("a star", FRONT), ("a boat", (64, 64, 128, 128)))
    assert overlay_score(Clip(), three) == pytest.approx(0.6 / 7 + 0.8 / 7)
    assert overlay_score(Clip(), asked(("a car", BACK))) == 0


# ------------------------------------------------------------------ colours, leakage, precision


def test_the_attribute_is_right_where_the_thing_in_its_place_has_its_colour(detector):
    layout = asked(
        ("a red car", (0, 0, 64, 64)),
        ("a blue star", (64, 64, 128, 128)),
        ("a tree", (64, 0, 128, 64)),
    )
    right = [("car", "red", (2, 2, 62, 62)), ("star", "blue", (66, 66, 126, 126))]
    assert attribute_accuracy(detector, paint(*right), layout) == [True, True, None]
    swapped = paint(("car", "blue", (2, 2, 62, 62)), ("star", "red", (66, 66, 126, 126)))
    assert attribute_accuracy(detector, swapped, layout) == [False, False, None]
    # The red car is elsewhere, and a blue one is where it should be.
    decoy = paint(("car", "blue", (2, 2, 62, 62)), ("car", "red", (66, 2, 126, 62)))
    assert attribute_accuracy(detector, decoy, layout) == [False, False, None]
    small = paint(("car", "red", (2, 2, 22, 22)))
    assert attribute_accuracy(detector, small, layout) == [False, False, None]
    assert attribute_accuracy(detector, small, layout, 0.05) == [True, False, None]


def test_leakage_is_the_share_that_is_elsewhere(detector):
    layout = asked(("a red car", (0, 0, 64, 64)), ("a blue star", (64, 64, 128, 128)))

    def leak(*things):
        return leakage(detector, paint(*things), layout)

    assert leak() == [0, 0]
    star = ("star", "blue", (64, 64, 128, 128))
    assert leak(("car", "red", (0, 0, 64, 64)), star) == pytest.approx([0, 0])
    assert leak(("car", "red", (32, 0, 96, 64)), star) == pytest.approx([0.5, 0])
    # A car in the star's blue, in the car's place: the star's colour is elsewhere.
    assert leak(("car", "blue", (0, 0, 64, 64)), star) == pytest.approx([0, 0.5])
    assert leak(("car", "green", (64, 64, 128, 128))) == pytest.approx([1, 0])
    # Two cars were asked for: neither leaks into the other's place.
    both = asked(("a red car", (0, 0, 64, 64)), ("a blue car", (64, 64, 128, 128)))
    right = paint(("car", "red", (0, 0, 64, 64)), ("car", "blue", (64, 64, 128, 128)))
    assert leakage(detector, right, both) == pytest.approx([0, 0])
    wrong = paint(("car", "blue", (0, 0, 64, 64)), ("car", "red", (64, 64, 128, 128)))
    assert leakage(detector, wrong, both) == pytest.approx([0.5, 0.5])


def test_leakage_by_boxes_where_the_detector_knows_no_pixels():
    def boxes(image, prompts):
        return [[Detection((0.25, 0.0, 0.75, 0.5), 0.9, None)] for _ in prompts]

    layout = Layout(caption="c", layers=[Layer("a dog", box=(0, 0, 0.5, 0.5))])
    assert leakage(boxes, paint(), layout) == pytest.approx([0.5])


def test_average_precision_is_one_for_the_truth_and_falls_with_the_overlap(detector):
    layout = asked(("a red car", (0, 0, 64, 64)), ("a blue star", (64, 64, 128, 128)))
    right = paint(("car", "red", (0, 0, 64, 64)), ("star", "blue", (64, 64, 128, 128)))
    assert average_precision(detector, [(right, layout)]) == pytest.approx(
        {"AP": 1, "AP50": 1, "AP75": 1}
    )
    # IoU of the car: 48 / 80 = 0.6, good enough at the thresholds .50, .55 and .60 of ten.
    moved = paint(("car", "red", (16, 0, 80, 64)), ("star", "blue", (64, 64, 128, 128)))
    assert average_precision(detector, [(moved, layout)]) == pytest.approx(
        {"AP": (0.3 + 1) / 2, "AP50": 1, "AP75": 0.5}, abs=0.051
    )
    # A second picture without its star: half of the stars are found.
    half = average_precision(detector, [(right, layout), (paint(), layout)])
    assert half["AP50"] == pytest.approx(0.5, abs=0.01)
    assert average_precision(detector, [(paint(), layout)])["AP"] == 0
    with pytest.raises(ValueError, match="no pictures"):
        average_precision(detector, [])


def test_any_detector_will_do():
    def detector(image, prompts):
        there = {"a dog": (0.0, 0.0, 0.5, 0.5)}
        return [
            [Detection(there[prompt], 0.9, None)] if prompt in there else [] for prompt in prompts
        ]

    layout = asked(("a dog", (0, 0, 64, 64)), ("a cat", (0, 0, 64, 64)))
    assert layout_iou(detector, Image.new("RGB", (8, 8)), layout) == [1, 0]


# ------------------------------------------------------------------ a detector of transformers


@pytest.fixture(scope="module")
def zero_shot():
    """A real pipeline around a tiny detector with random weights."""
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokenizer = word_tokenizer(["a", "red", "car", "boat"], length=16)
    text = small | {"vocab_size": len(tokenizer) + 1, "max_position_embeddings": 16}
    vision = small | {"image_size": 32, "patch_size": 8}
    model = OwlViTForObjectDetection(
        OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)
    )
    find = transformers.pipeline(
        "zero-shot-object-detection",
        model=model.eval(),
        tokenizer=tokenizer,
        image_processor=OwlViTImageProcessorPil(size={"height": 32, "width": 32}),
    )

    def tokens(text: str, **options: object) -> BatchEncoding:
        encoded = tokenizer(text, **options)
        encoded["input_ids"] += 1  # OWL-ViT ignores texts that begin with token 0
        return encoded

    find.tokenizer = tokens
    return find


def has_area(box: dict[str, int]) -> bool:
    """On the picture of 64 × 32 pixels."""
    sides = (("xmin", "xmax", 64), ("ymin", "ymax", 32))
    return all(max(0, box[low]) < min(most, box[high]) for low, high, most in sides)


def test_a_detector_of_transformers(zero_shot):
    image = Image.new("RGB", (64, 32), "red")
    prompts = ["a red car", "a boat"]
    detections = ZeroShotDetector(zero_shot, threshold=0.0)(image, prompts)
    plain = zero_shot(image, candidate_labels=prompts, threshold=0.0)
    assert len(plain) == 2 * 16, "a box for each of 4 × 4 patches"
    plain = [answer for answer in plain if has_area(answer["box"])]
    for prompt, things in zip(prompts, detections, strict=True):
        answers = [answer for answer in plain if answer["label"] == prompt]
        scores = [answer["score"] for answer in answers]
        assert [thing.score for thing in things] == pytest.approx(scores)
        for thing, answer in zip(things, answers, strict=True):
            x0, y0, x1, y1 = (answer["box"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
            inside = [max(0, x0) / 64, max(0, y0) / 32, min(64, x1) / 64, min(32, y1) / 32]
            assert list(thing.box) == pytest.approx(inside)
    assert ZeroShotDetector(zero_shot, threshold=1.0)(image, prompts) == [[], []]
    layout = Layout(caption="c", layers=[Layer(p, box=(0, 0, 1, 1)) for p in prompts])
    assert len(layout_iou(ZeroShotDetector(zero_shot), image, layout)) == 2


@pytest.mark.parametrize(
    ("label", "prompt"),
    [("a red car", 0), ("A Red Car", 0), ("a red car.", 0), ("2 5D boat", 1), (1, None),
     ("car", None), ("a red", None), ("x" * 500, None)],
)  # fmt: skip
def test_a_detector_that_answers_with_other_labels(label, prompt):
    def find(image, candidate_labels, threshold):
        assert candidate_labels == ["a red car", "2.5D boat"]
        box = {"xmin": 0, "ymin": 0, "xmax": 4, "ymax": 8}
        return [{"label": label, "score": 0.5, "box": box}]

    image, prompts = Image.new("RGB", (8, 8)), ["a red car", "2.5D boat"]
    if prompt is not None:
        found = ZeroShotDetector(find)(image, prompts)
        assert [len(things) for things in found] == [prompt == 0, prompt == 1]
        assert found[prompt][0].box == (0, 0, 0.5, 1)
        return
    with pytest.raises(
        ValueError, match=r"label .* is none of the prompts .*'a red car', '2.5D"
    ) as e:
        ZeroShotDetector(find)(image, prompts)
    assert len(str(e.value)) <= 300


def test_prompts_that_differ_in_case_only_are_asked_for_once():
    def find(image, candidate_labels, threshold):
        box = {"xmin": 0, "ymin": 0, "xmax": 4, "ymax": 8}
        return [{"label": label, "score": 0.5, "box": box} for label in candidate_labels]

    first, second = ZeroShotDetector(find)(Image.new("RGB", (8, 8)), ["A car.", "a car"])
    assert len(first) == 1
    assert first[0] is second[0]


def test_the_object_of_a_layer_is_what_leaks():
    asked = []

    def detector(image, prompts):
        asked.append(list(prompts))
        return [[] for _ in prompts]

    box = (0, 0, 1, 1)
    layers = [Layer("a red, shiny Car, best quality", box), Layer("青い箱", box, word="箱")]
    layers += [Layer("a blue take-out box at sea", box)]
    assert leakage(detector, paint(), Layout(caption="c", layers=layers)) == [0, 0, 0]
    assert asked == [["a car", "a red box"], ["a 箱"], ["a blue car", "a box"]]
