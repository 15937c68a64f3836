"""lrd_helpers.metrics: on pictures whose answer is known, and on scenes with exact truth."""

from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import (
    BatchEncoding,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
)

from lrd_helpers import metrics
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.storybook import COLOURS, PLACES, STICKERS, StorybookDataset, tight_boxes
from lrd_helpers.words import word_tokenizer

# A picture for the fake segmenter says in its red channel which sticker a pixel shows, in green
# which colour, and in blue which place.


def code(name, names):
    return (list(names).index(name) + 1) / 20


class ReadsCodes(nn.Module):
    """A segmenter that is right by construction."""

    def __init__(self):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(1e4))

    def forward(self, sample, timestep):
        assert timestep == 0
        assert sample.abs().max() <= 1
        red, green, blue = ((sample + 1) / 2).unbind(1)
        distances = [(red - code(name, STICKERS)) ** 2 for name in STICKERS]
        distances += [red**2 + (blue - code(name, PLACES)) ** 2 for name in PLACES]
        distances += [(green - code(name, COLOURS)) ** 2 for name in COLOURS] + [green**2]
        return SimpleNamespace(sample=-self.sharpness * torch.stack(distances, 1))


def paint(*things, place="on grass", size=(128, 128)):
    """A picture with (sticker, colour, (x0, y0, x1, y1) in pixels) over a place, in this order."""
    picture = torch.zeros(3, *size)
    picture[2] = code(place, PLACES)
    for sticker, colour, (x0, y0, x1, y1) in things:
        rgb = torch.tensor([code(sticker, STICKERS), code(colour, COLOURS), 0.0])
        picture[:, y0:y1, x0:x1] = rgb[:, None, None]
    return picture


def asked(*layers):
    """A layout of (prompt, box in 128ths)."""
    return Layout(
        caption="a scene",
        layers=[Layer(prompt, box=tuple(value / 128 for value in box)) for prompt, box in layers],
    )


@pytest.fixture
def detector():
    return metrics.StorybookDetector(ReadsCodes())


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
    assert metrics.box_iou(a, b) == pytest.approx(iou)


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
    assert metrics.box_iou(*shrunk) == pytest.approx(expected)


# ------------------------------------------------------------------ connected regions


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("a red car", ("car", "red")),
        ("Car", ("car", None)),
        ("an orange balloon, on grass", ("balloon", "orange")),  # a balloon is no ball
        ("a white house on snow at night", ("house", "white")),
    ],
)
def test_sticker_and_colour(prompt, answer):
    assert metrics.sticker_and_colour(prompt) == answer


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red dragon", "names no sticker, but should name exactly one of ball, balloon"),
        ("a red baloon", "did you mean 'balloon'"),
        ("on grass", "names no sticker"),
        ("a car and a star", "names car and star"),
        ("a red and blue car", "names the colours red and blue"),
    ],
)
def test_a_prompt_that_cannot_be_looked_for(prompt, message, detector):
    with pytest.raises(ValueError, match=message):
        detector.find(paint(), prompt)


# ------------------------------------------------------------------ the detector


def test_describe_names_everything_and_says_where(detector):
    picture = paint(
        ("car", "red", (10, 20, 50, 40)), ("star", "yellow", (64, 64, 128, 128)), place="at night"
    )
    description = detector.describe(picture)
    assert description.place == "at night"
    assert 0.99 < description.place_score <= 1.0001
    star, car = description.stickers  # largest first
    assert (star.sticker, star.colour) == ("star", "yellow")
    assert (car.sticker, car.colour) == ("car", "red")
    assert car.box == pytest.approx((10 / 128, 20 / 128, 50 / 128, 40 / 128))
    assert star.box == (0.5, 0.5, 1, 1)
    assert int(car.mask.sum()) == 40 * 20
    assert car.mask[20, 10]
    assert car.mask[39, 49]
    assert 0.99 < car.score <= 1


@pytest.mark.parametrize("place", PLACES)
def test_describe_knows_every_place_also_without_stickers(detector, place):
    description = detector.describe(paint(place=place))
    assert description.place == place
    assert description.stickers == ()


def test_a_sticker_that_fills_the_picture_leaves_a_place_to_guess(detector):
    description = detector.describe(paint(("fish", "blue", (0, 0, 128, 128))))
    assert description.place in PLACES
    assert description.stickers[0].box == (0, 0, 1, 1)


def test_unsure_logits_give_a_low_score():
    sure, unsure = ReadsCodes(), ReadsCodes()
    unsure.sharpness.data.fill_(100.0)
    picture = paint(("car", "red", (10, 20, 50, 40)))
    scores = [
        metrics.StorybookDetector(model, noise_floor=1.0).describe(picture).stickers[0].score
        for model in (sure, unsure)
    ]
    assert scores[1] < 0.5 < scores[0]


def test_find_gives_the_pixels_or_none(detector):
    picture = paint(("car", "red", (10, 20, 50, 40)), ("car", "blue", (60, 60, 80, 80)))
    assert torch.equal(detector.find(picture, "a red car"), picture[1] == code("red", COLOURS))
    assert torch.equal(detector.find(picture, "a car"), picture[0] == code("car", STICKERS))
    assert detector.find(picture, "a green car") is None
    assert detector.find(picture, "a red star") is None


def test_regions_below_the_noise_floor_are_not_there(detector):
    assert detector.find(paint(("ball", "red", (0, 0, 19, 1))), "a red ball") is None
    assert detector.find(paint(("ball", "red", (0, 0, 20, 1))), "a red ball") is not None
    # The floor is an area of the picture: four times the pixels at twice the side.
    for length, there in ((79, False), (80, True)):
        picture = paint(("ball", "red", (0, 0, length, 1)), size=(256, 256))
        assert (detector.find(picture, "a red ball") is not None) == there


def test_a_speckle_does_not_stretch_the_box(detector):
    picture = paint(("ball", "red", (10, 10, 40, 40)), ("ball", "red", (120, 120, 123, 123)))
    layout = asked(("a red ball", (10, 10, 40, 40)))
    assert metrics.layout_iou(detector, picture, layout) == [pytest.approx(1)]


def test_a_fragment_belongs_to_the_sticker_it_touches(detector):
    house, bit = ("house", "red", (10, 10, 60, 60)), (60, 30, 69, 39)  # 81 pixels beside it
    [only] = detector.describe(paint(house, ("star", "red", bit))).stickers
    assert (only.sticker, int(only.mask.sum())) == ("house", 2500 + 81)
    # Inside of it, too, and through another fragment.
    inside = paint(house, ("star", "red", (20, 20, 28, 28)), ("fish", "red", (28, 20, 33, 28)))
    [only] = detector.describe(inside).stickers
    assert (only.sticker, int(only.mask.sum())) == ("house", 2500)
    # On its own it is a small star, and where it is as large as the world's smallest as well.
    alone = paint(house, ("star", "red", (80, 30, 89, 39)))
    assert [thing.sticker for thing in detector.describe(alone).stickers] == ["house", "star"]
    large = paint(house, ("star", "blue", (60, 30, 70, 40)))
    assert [thing.sticker for thing in detector.describe(large).stickers] == ["house", "star"]


@pytest.mark.parametrize(
    ("part", "count"),
    [
        (("mushroom", "green", (46, 10, 58, 50)), 1),  # 12 columns, just under a fifth
        (("mushroom", "green", (45, 10, 58, 50)), 2),  # over
        (("mushroom", "pink", (46, 10, 58, 50)), 2),  # of another colour
        (("mushroom", "green", (45, 10, 57, 50)), 2),  # it does not touch
    ],
)
def test_a_part_of_the_same_colour_belongs_to_the_sticker_it_touches(detector, part, count):
    picture = paint(("rocket", "green", (58, 10, 119, 50)), part)  # 61 columns
    found = detector.describe(picture).stickers
    assert len(found) == count
    assert found[0].sticker == "rocket"
    assert sum(int(thing.mask.sum()) for thing in found) == int((picture[0] > 0).sum())


def test_what_goes_to_its_whole_may_pass_through_another_part(detector):
    rocket = ("rocket", "green", (10, 10, 90, 50))
    tips = [("mushroom", "green", (90, 10, 105, 50)), ("flower", "green", (105, 10, 109, 50))]
    [only] = detector.describe(paint(rocket, *tips)).stickers
    assert (only.sticker, int(only.mask.sum())) == ("rocket", 99 * 40)


def test_an_outline_of_another_colour_is_no_sticker(detector):
    ring = paint(("star", "purple", (40, 40, 60, 60)), ("star", "blue", (42, 42, 58, 58)))
    [star] = detector.describe(ring).stickers  # purple are 144 of 400 pixels
    assert (star.colour, int(star.mask.sum())) == ("blue", 400)


@pytest.mark.parametrize("side", [128, 256])
def test_parts_with_a_narrow_gap_are_one_sticker(detector, side):
    scale = side // 128
    for gap, count in ((4, 1), (5, 2)):
        parts = [(10, 10, 40, 30), (10, 30 + gap, 40, 60)]
        boxes = [tuple(scale * edge for edge in part) for part in parts]
        picture = paint(*(("boat", "red", box) for box in boxes), size=(side, side))
        found = detector.describe(picture).stickers
        assert len(found) == count
        # The gap itself is not part of it.
        assert sum(int(thing.mask.sum()) for thing in found) == scale**2 * 30 * (50 - gap)


def test_touching_stickers_of_two_colours_are_two(detector):
    picture = paint(("ball", "red", (10, 10, 40, 40)), ("ball", "blue", (40, 10, 70, 40)))
    found = detector.describe(picture).stickers
    assert sorted(thing.colour for thing in found) == ["blue", "red"]
    assert [int(thing.mask.sum()) for thing in found] == [900, 900]


def test_a_detail_in_another_colour_is_part_of_the_sticker(detector):
    picture = paint(("ball", "red", (10, 10, 40, 40)), ("ball", "white", (20, 20, 30, 30)))
    [ball] = detector.describe(picture).stickers
    assert ball.colour == "red"
    assert int(ball.mask.sum()) == 900


@pytest.mark.parametrize(("width", "colours"), [(8, ["red"]), (10, ["red", "white"])])
def test_a_third_in_another_colour_is_a_sticker_of_its_own(detector, width, colours):
    strip = ("ball", "white", (40 - width, 10, 40, 40))  # 27 or 33 of 100 pixels
    found = detector.describe(paint(("ball", "red", (10, 10, 40, 40)), strip)).stickers
    assert sorted(thing.colour for thing in found) == colours


def test_pil_images_and_tensors_say_the_same(detector):
    picture = paint(("tree", "green", (30, 40, 60, 100)), place="at sunset")
    array = (255 * picture).round().permute(1, 2, 0).numpy().astype(numpy.uint8)
    description = detector.describe(Image.fromarray(array))
    assert description.place == "at sunset"
    assert torch.equal(description.stickers[0].mask, detector.find(picture, "a tree"))


@pytest.mark.parametrize("size", [(96, 160), (100, 60), (250, 333)])
def test_masks_have_the_size_of_the_picture(detector, size):
    height, width = size
    box = (width // 4, height // 4, width // 2, height // 2)
    found = detector.describe(paint(("boat", "pink", box), size=size)).stickers[0]
    assert (found.sticker, found.colour) == ("boat", "pink")
    assert found.mask.shape == size
    assert found.box == pytest.approx((0.25, 0.25, 0.5, 0.5), abs=0.04)


def test_describe_all_keeps_the_order(detector, monkeypatch):
    monkeypatch.setattr(metrics, "BATCH_SIZE", 2)
    pictures = [paint(place=PLACES[0])] * 3 + [
        paint(place=PLACES[1], size=(64, 64)),
        paint(place=PLACES[2]),
    ]
    places = [description.place for description in detector.describe_all(pictures)]
    assert places == [PLACES[0]] * 3 + [PLACES[1], PLACES[2]]
    assert detector.describe_all([]) == []


def test_a_segmenter_of_another_shape_is_refused():
    class Wrong(ReadsCodes):
        def forward(self, sample, timestep):
            return SimpleNamespace(sample=super().forward(sample, timestep).sample[:, :26])

    with pytest.raises(ValueError, match="gives 26 channels, but 27 are expected"):
        metrics.StorybookDetector(Wrong()).describe(paint())


# ------------------------------------------------------------------ layout against picture


def test_layout_iou_a_number_for_each_layer(detector):
    picture = paint(("car", "red", (0, 0, 64, 64)), ("star", "yellow", (80, 80, 112, 112)))
    layout = asked(
        ("a red car", (0, 0, 64, 64)),  # exactly
        ("a yellow star", (96, 80, 128, 112)),  # half a width aside
        ("a blue star", (80, 80, 112, 112)),  # right place, wrong colour
        ("a boat", (10, 10, 20, 20)),
    )  # not there
    ious = metrics.layout_iou(detector, picture, layout)
    assert ious == pytest.approx([1, 1 / 3, 0, 0])
    assert metrics.success(ious) == [True, False, False, False]
    assert metrics.success([0.5, 0.4999]) == [True, False]
    assert metrics.found_boxes(detector, picture, layout)[3] is None


def test_two_layers_of_one_kind_each_get_their_own_object(detector):
    picture = paint(("ball", "red", (0, 0, 40, 40)), ("ball", "red", (80, 80, 128, 128)))
    layout = asked(("a red ball", (80, 80, 128, 128)), ("a red ball", (0, 0, 40, 40)))
    assert metrics.layout_iou(detector, picture, layout) == pytest.approx([1, 1])
    # Also where one of them names the colour and the other does not.
    layout = asked(("a ball", (80, 80, 128, 128)), ("a red ball", (0, 0, 40, 40)))
    assert metrics.layout_iou(detector, picture, layout) == pytest.approx([1, 1])


def test_one_object_does_not_count_for_two_layers(detector):
    picture = paint(("ball", "red", (0, 0, 40, 40)))
    layout = asked(("a red ball", (0, 0, 40, 40)), ("a red ball", (10, 10, 50, 50)))
    assert metrics.layout_iou(detector, picture, layout) == pytest.approx([1, 0])


def test_an_object_near_no_box_goes_to_the_nearest_layer(detector):
    picture = paint(("ball", "red", (60, 0, 70, 10)))
    layout = asked(("a red ball", (0, 0, 20, 20)), ("a red ball", (80, 0, 100, 20)))
    assert metrics.found_boxes(detector, picture, layout)[0] is None
    assert metrics.found_boxes(detector, picture, layout)[1] is not None


def test_a_second_copy_elsewhere_counts_against(detector):
    picture = paint(("ball", "red", (0, 0, 32, 32)), ("ball", "red", (96, 96, 128, 128)))
    layout = asked(("a red ball", (0, 0, 32, 32)))
    assert metrics.layout_iou(detector, picture, layout) == pytest.approx([1 / 16])


def test_an_object_cut_in_two_counts_whole(detector):
    picture = paint(("car", "red", (0, 40, 128, 80)), ("tree", "green", (50, 0, 70, 128)))
    layout = asked(("a red car", (0, 40, 128, 80)), ("a green tree", (50, 0, 70, 128)))
    assert metrics.layout_iou(detector, picture, layout) == pytest.approx([1, 1])


def test_success_rate_counts_layers_of_all_pictures():
    assert metrics.success_rate([[0.5, 0.2], [0.9], []]) == pytest.approx(2 / 3)
    assert metrics.success_rate([[0.5, 0.2]], threshold=0.6) == 0
    with pytest.raises(ValueError, match="no layers"):
        metrics.success_rate([[]])


def test_the_attribute_is_right_where_the_thing_in_its_place_has_its_colour(detector):
    layout = asked(
        ("a red car", (0, 0, 64, 64)),
        ("a blue star", (64, 64, 128, 128)),
        ("a tree", (64, 0, 128, 64)),
    )
    right = [("car", "red", (2, 2, 62, 62)), ("star", "blue", (66, 66, 126, 126))]
    assert metrics.attribute_accuracy(detector, paint(*right), layout) == [True, True, None]
    swapped = paint(("car", "blue", (2, 2, 62, 62)), ("star", "red", (66, 66, 126, 126)))
    assert metrics.attribute_accuracy(detector, swapped, layout) == [False, False, None]
    # The red car is elsewhere, and a blue one is where it should be.
    decoy = paint(("car", "blue", (2, 2, 62, 62)), ("car", "red", (66, 2, 126, 62)))
    assert metrics.attribute_accuracy(detector, decoy, layout) == [False, False, None]
    small = paint(("car", "red", (2, 2, 22, 22)))
    assert metrics.attribute_accuracy(detector, small, layout) == [False, False, None]
    assert metrics.attribute_accuracy(detector, small, layout, 0.05) == [True, False, None]


def test_leakage_is_the_share_that_is_elsewhere(detector):
    layout = asked(("a red car", (0, 0, 64, 64)), ("a blue star", (64, 64, 128, 128)))

    def leak(*things):
        return metrics.leakage(detector, paint(*things), layout)

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
    assert metrics.leakage(detector, right, both) == pytest.approx([0, 0])
    wrong = paint(("car", "blue", (0, 0, 64, 64)), ("car", "red", (64, 64, 128, 128)))
    assert metrics.leakage(detector, wrong, both) == pytest.approx([0.5, 0.5])


def test_leakage_by_boxes_where_the_detector_knows_no_pixels():
    def boxes(image, prompts):
        return [[metrics.Detection((0.25, 0.0, 0.75, 0.5), 0.9, None)] for _ in prompts]

    layout = Layout(caption="c", layers=[Layer("a dog", box=(0, 0, 0.5, 0.5))])
    assert metrics.leakage(boxes, paint(), layout) == pytest.approx([0.5])


def test_average_precision_is_one_for_the_truth_and_falls_with_the_overlap(detector):
    layout = asked(("a red car", (0, 0, 64, 64)), ("a blue star", (64, 64, 128, 128)))
    right = paint(("car", "red", (0, 0, 64, 64)), ("star", "blue", (64, 64, 128, 128)))
    assert metrics.average_precision(detector, [(right, layout)]) == pytest.approx(
        {"AP": 1, "AP50": 1, "AP75": 1}
    )
    # IoU of the car: 48 / 80 = 0.6, good enough at the thresholds .50, .55 and .60 of ten.
    moved = paint(("car", "red", (16, 0, 80, 64)), ("star", "blue", (64, 64, 128, 128)))
    assert metrics.average_precision(detector, [(moved, layout)]) == pytest.approx(
        {"AP": (0.3 + 1) / 2, "AP50": 1, "AP75": 0.5}, abs=0.051
    )
    # A second picture without its star: half of the stars are found.
    one = metrics.average_precision(detector, [(right, layout), (paint(), layout)])
    assert one["AP50"] == pytest.approx(0.5, abs=0.01)
    assert metrics.average_precision(detector, [(paint(), layout)])["AP"] == 0
    with pytest.raises(ValueError, match="no pictures"):
        metrics.average_precision(detector, [])


def test_any_detector_will_do():
    def detector(image, prompts):
        there = {"a dog": (0.0, 0.0, 0.5, 0.5)}
        return [
            [metrics.Detection(there[prompt], 0.9, None)] if prompt in there else []
            for prompt in prompts
        ]

    layout = asked(("a dog", (0, 0, 64, 64)), ("a cat", (0, 0, 64, 64)))
    assert metrics.layout_iou(detector, Image.new("RGB", (8, 8)), layout) == [1, 0]


# ------------------------------------------------------------------ words against picture


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


def test_a_detector_of_transformers(zero_shot):
    image = Image.new("RGB", (64, 32), "red")
    prompts = ["a red car", "a boat"]
    found = metrics.ZeroShotDetector(zero_shot, threshold=0.0)(image, prompts)
    plain = zero_shot(image, candidate_labels=prompts, threshold=0.0)
    assert [len(things) for things in found] == [16, 16], "a box for each of 4 × 4 patches"
    for prompt, things in zip(prompts, found, strict=True):
        own = [one for one in plain if one["label"] == prompt]
        assert [thing.score for thing in things] == pytest.approx([one["score"] for one in own])
        for thing, one in zip(things, own, strict=True):
            x0, y0, x1, y1 = (one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
            inside = [max(0, x0) / 64, max(0, y0) / 32, min(64, x1) / 64, min(32, y1) / 32]
            assert list(thing.box) == pytest.approx(inside)
    assert metrics.ZeroShotDetector(zero_shot, threshold=1.0)(image, prompts) == [[], []]
    layout = Layout(caption="c", layers=[Layer(p, box=(0, 0, 1, 1)) for p in prompts])
    assert len(metrics.layout_iou(metrics.ZeroShotDetector(zero_shot), image, layout)) == 2


def test_any_clip_model_with_its_processor(tiny_clip):
    model, tokenizer = tiny_clip
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=Image.Resampling.BILINEAR,
    )
    clip = metrics.PretrainedClip(model, CLIPProcessor(images, tokenizer))
    ours = metrics.StorybookClip(model, tokenizer)
    picture = Image.new("RGB", (16, 16), (255, 128, 0))
    assert torch.allclose(clip.encode_images([picture]), ours.encode_images([picture]), atol=1e-5)
    assert torch.equal(clip.encode_texts(["a car"]), ours.encode_texts(["a car"]))
    tensor = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    assert clip.encode_images([tensor]).norm() == pytest.approx(1, abs=1e-5)


def test_clip_score_is_a_hundred_times_the_cosine():
    class Fake:
        def encode_images(self, images):
            return torch.tensor([[1.0, 0.0]] * len(images))

        def encode_texts(self, texts):
            vectors = {
                "same": [1.0, 0.0],
                "unlike": [0.0, 1.0],
                "half": [0.5, 0.75**0.5],
                "opposite": [-1.0, 0.0],
            }
            return torch.tensor([vectors[text] for text in texts])

    scores = [
        metrics.clip_score(Fake(), paint(), text) for text in ("same", "unlike", "half", "opposite")
    ]
    assert scores == pytest.approx([100, 0, 50, -100])


def test_text_image_similarity_is_the_mean_cosine(tiny_clip):
    clip = metrics.StorybookClip(*tiny_clip)
    images, texts = [paint(), paint(("car", "red", (0, 0, 64, 64)))], ["a red car", "a tree"]
    scores = [metrics.clip_score(clip, *pair) for pair in zip(images, texts, strict=True)]
    mean = metrics.text_image_similarity(clip, images, texts)
    assert mean == pytest.approx(sum(scores) / 200, abs=1e-6)
    for wrong in ([], texts[:1]):
        with pytest.raises(ValueError, match="cannot be compared"):
            metrics.text_image_similarity(clip, images if wrong else [], wrong)


@pytest.fixture(scope="module")
def tiny_clip():
    tokenizer = word_tokenizer(["a", "red", "car", "boat"], length=16)
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = small | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return CLIPModel(config).eval(), tokenizer


def test_storybook_clip_encodes_as_the_model_does(tiny_clip):
    model, tokenizer = tiny_clip
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = ["a red car", "boat"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, pixel_values=(image[None] - 0.5) / 0.5)
    clip = metrics.StorybookClip(model, tokenizer)
    torch.testing.assert_close(clip.encode_images([image]), expected.image_embeds)
    torch.testing.assert_close(clip.encode_texts(texts), expected.text_embeds)


def test_storybook_clip_takes_any_size_and_any_length(tiny_clip):
    clip = metrics.StorybookClip(*tiny_clip)
    image = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    large = functional.interpolate(image[None], scale_factor=16)[0]
    vectors = clip.encode_images([image.repeat_interleave(4, 1).repeat_interleave(4, 2), large])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    assert vectors[0] @ vectors[1] > 0.95
    assert clip.encode_texts(["a red car " * 40]).shape == (1, 8)


def test_storybook_clip_wants_both_or_neither(tiny_clip):
    with pytest.raises(ValueError, match="both a model and its tokenizer"):
        metrics.StorybookClip(tiny_clip[0])


# ------------------------------------------------------------------ the shipped models


HELD_OUT = 1_000_000


@pytest.fixture(scope="module")
def shipped_detector():
    return metrics.StorybookDetector()  # raises, and so fails, where the asset is missing


SHORT = "the shipped segmenter has not had the training it needs; see its card"


@pytest.mark.parametrize(
    "count", [1, pytest.param(3, marks=pytest.mark.xfail(strict=True, reason=SHORT))]
)
def test_on_true_scenes_the_iou_is_nearly_one(shipped_detector, count):
    rendering = StorybookDataset(24, seed=HELD_OUT, sticker_count=count).batch(0)
    ious, places = [], []
    for image, scene, masks in zip(
        rendering.images, rendering.scenes, rendering.masks, strict=True
    ):
        seen = [
            number for number, mask in enumerate(masks) if mask.sum() >= 3 * metrics.NOISE_FLOOR
        ]  # what others hide cannot be found
        layout = Layout(
            caption=scene.caption,
            layers=[
                Layer(
                    f"a {scene.stickers[i].colour} {scene.stickers[i].sticker}",
                    box=tuple(tight_boxes(masks[i]).tolist()),
                )
                for i in seen
            ],
        )
        ious += metrics.layout_iou(shipped_detector, image, layout)
        places.append(shipped_detector.describe(image).place == scene.place)
    assert sum(ious) / len(ious) >= 0.95
    assert sum(metrics.success(ious)) / len(ious) >= 0.95
    assert sum(places) / len(places) >= 0.95


def test_on_true_scenes_the_right_caption_scores_highest():
    clip = metrics.StorybookClip()
    rendering = StorybookDataset(16, seed=HELD_OUT + 1).batch(0)
    scores = clip.encode_images(list(rendering.images)) @ clip.encode_texts(rendering.captions).T
    captions = numpy.array(rendering.captions)
    best = captions[scores.argmax(1).numpy()]
    assert (best == captions).mean() >= 0.9
    for number in range(4):
        score = metrics.clip_score(clip, rendering.images[number], rendering.captions[number])
        assert score == pytest.approx(100 * float(scores[number, number]), abs=1e-3)
