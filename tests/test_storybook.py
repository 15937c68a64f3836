"""The world: its stickers, its pictures and the truth that comes with them."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lrd_helpers.storybook import (
    COLOURS,
    PLACES,
    STICKERS,
    STYLES,
    WORDS,
    PlacedSticker,
    Scene,
    Sticker,
    StorybookDataset,
    aspect_ratio,
    caption_of,
    layout_of_scene,
    own_sticker,
    render_scenes,
    sample_layout,
    sample_scene,
    scene_with,
    seeded,
    sprite_bank,
    sticker_svg,
    tight_boxes,
)


def one(sticker="ball", colour="red", centre=(0.5, 0.5), size=(0.5, 0.5), **more):
    return PlacedSticker(sticker, colour, centre, size, **more)


def scene(*stickers, place="on grass", style="flat"):
    return Scene(place, stickers, caption_of(stickers, place), style=style)


def test_the_world_has_what_the_course_promises():
    assert len(STICKERS) == 12
    assert len(COLOURS) == 8
    assert len(PLACES) == 6
    assert {"ball", "balloon", "boat", "car", "fish", "flower", "house", "star"} < set(STICKERS)
    assert {"mushroom", "tree"} < set(STICKERS)
    assert {"red", "grass", "sunset", "rocket", "an"} < set(WORDS)


@pytest.mark.parametrize("sticker", STICKERS)
def test_a_sticker_is_mostly_its_colour_and_keeps_its_details(sticker):
    red, blue = (
        sprite_bank()[0][STICKERS.index(sticker), list(COLOURS).index(colour)]
        for colour in ("red", "blue")
    )
    assert torch.equal(red[3], blue[3])  # same silhouette
    silhouette = red[3] > 0.5
    changed = ((red[:3] - blue[:3]).abs().sum(0) > 0.05) & silhouette
    assert changed.sum() / silhouette.sum() > 0.5
    assert "{" not in sticker_svg(sticker, "red")


@pytest.mark.parametrize("style", STYLES)
def test_sprites_fill_their_box_and_are_premultiplied(style):
    for sprites in sprite_bank(style):
        assert sprites.shape[:3] == (12, 8, 4)
        assert (sprites[:, :, :3] <= sprites[:, :, 3:] + 1e-5).all()
    alpha = sprite_bank(style)[0][:, :, 3] > 0.5
    assert (tight_boxes(alpha) - torch.tensor([0, 0, 1, 1])).abs().max() < 0.03


def test_silhouettes_can_be_told_apart():
    alpha = sprite_bank()[0][:, 0, 3] > 0.5
    for i in range(len(STICKERS)):
        for j in range(i):
            overlap = (alpha[i] & alpha[j]).sum() / (alpha[i] | alpha[j]).sum()
            same_shape = abs(aspect_ratio(STICKERS[i]) / aspect_ratio(STICKERS[j]) - 1) < 0.1
            assert overlap < 0.9 or not same_shape, (STICKERS[i], STICKERS[j])


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no sticker 'dog'; there are: ball, balloon"):
        sticker_svg("dog", "red")
    with pytest.raises(ValueError, match=r"no colour 'teal'; there are: red"):
        sticker_svg("car", "teal")


def test_a_sticker_stands_where_it_was_placed():
    placed = one("house", "green", centre=(0.3, 0.6), size=(0.4, 0.3))
    rendering = render_scenes([scene(placed)])
    assert (rendering.boxes[0, 0] - torch.tensor([0.1, 0.45, 0.5, 0.75])).abs().max() < 0.012
    outside = ~(rendering.layers[0, 0, 3] > 0)
    assert torch.equal(rendering.images[0][:, outside], rendering.backgrounds[0][:, outside])
    assert not torch.equal(rendering.images[0], rendering.backgrounds[0])


def test_flip_mirrors_and_rotation_turns_clockwise():
    plain, flipped, turned = (
        render_scenes([scene(one("fish", **more))]).layers[0, 0]
        for more in ({}, {"flip": True}, {"rotation": 90.0})
    )
    assert torch.allclose(plain.flip(-1), flipped, atol=1e-4)
    assert torch.allclose(plain.rot90(-1, (-2, -1)), turned, atol=0.02)


def test_the_one_in_front_hides_the_one_behind():
    behind, front = one("ball", "red"), one("star", "blue", size=(0.3, 0.3))
    rendering = render_scenes([scene(behind, front)])
    masks = rendering.masks[0]
    assert not (masks[0] & masks[1]).any()
    assert masks[1, 64, 64]
    assert not masks[0, 64, 64]
    alone = render_scenes([scene(behind)])
    assert torch.equal(rendering.boxes[0, 0], alone.boxes[0, 0])  # hidden parts count for boxes
    assert masks[0].sum() < alone.masks[0, 0].sum()


def test_layers_compose_to_the_image():
    rendering = StorybookDataset(8, sticker_count=4, styles=STYLES).batch(3)
    image = rendering.backgrounds
    for z in range(4):
        rgb, alpha = rendering.rgba[:, z].split([3, 1], 1)
        image = alpha * rgb + (1 - alpha) * image
    assert (image - rendering.images).abs().max() < 0.01
    assert rendering.images.min() >= 0
    assert rendering.images.max() <= 1


def test_empty_layers_pad_a_batch():
    rendering = render_scenes([scene(), scene(one())])
    assert rendering.layers.shape[:2] == (2, 1)
    assert rendering.boxes[0].sum() == 0
    assert not rendering.masks[0].any()
    assert torch.equal(rendering.images[0], rendering.backgrounds[0])
    assert render_scenes([scene()]).masks.shape == (1, 0, 128, 128)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("place", PLACES)
def test_every_place_has_a_picture_of_its_own(place, style):
    picture = render_scenes([scene(place=place, style=style)]).images[0]
    assert picture.isfinite().all()
    others = [
        render_scenes([scene(place=other, style=style)]).images[0]
        for other in PLACES
        if other != place
    ]
    least = 0.02 if style == "flat" else 0.002
    assert all((picture - other).abs().mean() > least for other in others)


def test_captions():
    car, star = one("car"), one("star", "orange")
    assert caption_of((car, star), "on grass") == "a red car and an orange star on grass"
    assert caption_of((car,), "at sea", name_colours=False) == "a car at sea"
    assert caption_of((car,), "at sea", name_place=False) == "a red car"
    assert caption_of((car,), "at night", place_first=True) == "at night a red car"
    assert caption_of((), "at night", name_place=False) == "at night"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_sampled_scenes_are_legal(seed):
    drawn = sample_scene(seeded(seed))
    kinds = {(placed.sticker, placed.colour) for placed in drawn.stickers}
    assert len(kinds) == len(drawn.stickers) <= 4
    assert set(drawn.caption.split()) <= set(WORDS)
    for placed in drawn.stickers:
        assert 0.15 < max(placed.size) < 0.86
        for centre, size in zip(placed.centre, placed.size, strict=True):
            assert size / 2 - 1e-6 <= centre <= 1 - size / 2 + 1e-6


def test_same_seed_same_scenes_also_in_another_process():
    code = (
        "from lrd_helpers.storybook import StorybookDataset as D\n"
        "batch = D(4, seed=7).batch(2)\n"
        "print(batch.captions, f'{batch.images.double().sum():.6f}')"
    )
    batch = StorybookDataset(4, seed=7).batch(2)
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == f"{batch.captions} {batch.images.double().sum():.6f}"
    assert StorybookDataset(4, seed=8).batch(2).captions != batch.captions


def test_readers_share_a_stream_and_start_anywhere():
    whole = [batch.captions for _, batch in zip(range(6), StorybookDataset(4), strict=False)]
    second = StorybookDataset(4, reader=1, readers=2, start=1)
    assert [batch.captions for _, batch in zip(range(2), second, strict=False)] == [
        whole[3],
        whole[5],
    ]


def test_a_data_loader_gives_the_same_stream_with_workers():
    streams = [
        DataLoader(StorybookDataset(2, seed=3, start=1), batch_size=None, num_workers=workers)
        for workers in (0, 2)
    ]
    for one, other, _ in zip(*streams, range(4), strict=False):
        assert one.scenes == other.scenes
        assert torch.equal(one.images, other.images)


def test_a_stream_of_more_stickers():
    stream = StorybookDataset(200, seed=2, sticker_shares=(0.0, 2.0, 0.0, 1.0, 0.0))
    counts = [len(scene.stickers) for scene in stream.scenes(0)]
    assert set(counts) == {1, 3}
    assert 0.55 < counts.count(1) / 200 < 0.78
    assert stream.scenes(0) == stream.scenes(0)
    with pytest.raises(ValueError, match="exclude each other"):
        StorybookDataset(2, sticker_count=1, sticker_shares=(1.0,) * 5)
    with pytest.raises(ValueError, match="has 6 entries, but should have 5"):
        StorybookDataset(2, sticker_shares=(1.0,) * 6)


def test_shares_of_sticker_counts_and_places():
    drawn = [sample_scene(seeded(5, i)) for i in range(2000)]
    counts = torch.tensor([len(one.stickers) for one in drawn]).bincount(minlength=5) / 2000
    assert (counts - torch.tensor([0.05, 0.52, 0.27, 0.10, 0.06])).abs().max() < 0.04
    places = [one.place for one in drawn]
    assert all(abs(places.count(place) / 2000 - 1 / 6) < 0.04 for place in PLACES)


def test_tight_boxes():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:5, 1:7] = True
    assert tight_boxes(mask)[0].tolist() == [1 / 8, 2 / 8, 7 / 8, 5 / 8]
    assert tight_boxes(torch.zeros(1, 8, 8, dtype=torch.bool))[0].tolist() == [0, 0, 0, 0]


# ------------------------------------------------------------------ layouts


def test_a_sampled_layout_asks_for_its_scene() -> None:
    scene = sample_scene(seeded(0, 1), sticker_count=3)
    layout = layout_of_scene(scene)
    assert layout.caption == caption_of(scene.stickers, scene.place)
    assert layout.background == scene.place
    assert [layer.prompt.split()[1:] for layer in layout.layers] == [
        [placed.colour, placed.sticker] for placed in scene.stickers
    ]
    boxes = render_scenes([scene]).boxes[0]
    assert torch.allclose(torch.tensor([layer.box for layer in layout.layers]), boxes)


def test_sampled_layouts_are_seeded_and_not_too_small() -> None:
    for number in range(5):
        layout = sample_layout(seeded(number), sticker_count=2, smallest=0.3)
        assert layout == sample_layout(seeded(number), sticker_count=2, smallest=0.3)
        for x0, y0, x1, y1 in (layer.box for layer in layout.layers):
            assert max(x1 - x0, y1 - y0) > 0.25
    with pytest.raises(ValueError, match="sticker_count is 0"):
        sample_layout(seeded(0), sticker_count=0)


# ------------------------------------------------------------------ stickers of one's own

FLAG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">'
    '<rect x="10" y="20" width="80" height="40" fill="{main}"/></svg>'
)
SMILEY = (
    '<?xml version="1.0"?><svg width="36px" height="36px"><circle fill="#FC4" cx="18" cy="18" '
    'r="18"/><circle cx="12" cy="14" r="3" fill="#664500"/></svg>'
)


def test_a_sticker_of_ones_own_stands_in_a_scene_beside_the_others():
    flag = own_sticker("flag", FLAG)
    assert aspect_ratio(flag) == pytest.approx(2, abs=0.02)
    placed = one(flag, "blue", centre=(0.5, 0.6), size=(0.5, 0.25))
    rendering = render_scenes([scene(one("star"), placed)])
    assert rendering.captions == ["a red star and a blue flag on grass"]
    assert (rendering.boxes[0, 1] - torch.tensor([0.25, 0.475, 0.75, 0.725])).abs().max() < 0.012
    colour = rendering.images[0, :, 77, 64]
    assert torch.allclose(colour, torch.tensor(COLOURS["blue"]), atol=0.01)
    assert own_sticker("flag", flag.svg) == flag
    assert caption_of((one(Sticker("owl", FLAG)),), "at sea", name_colours=False) == "an owl at sea"


def test_an_emoji_takes_the_scenes_colour_where_it_has_most_of_one(tmp_path):
    path = tmp_path / "smiley.svg"
    path.write_text(SMILEY)
    smiley = own_sticker("smiley", path)
    assert smiley.svg.count("{main}") == 1
    pixels = render_scenes([scene(one(smiley, "red", size=(0.9, 0.9)))]).images[0]
    assert torch.allclose(pixels[:, 90, 64], torch.tensor(COLOURS["red"]), atol=0.01)
    eye = torch.tensor([0x66, 0x45, 0x00]) / 255
    assert torch.allclose(pixels[:, 51, 45], eye, atol=0.05)


@pytest.mark.parametrize(
    ("name", "drawing", "said"),
    [
        ("star", FLAG, "'star' is a word of the world already"),
        ("grass", FLAG, "'grass' is a word of the world already"),
        ("red flag", FLAG, "'red flag' cannot be a sticker's name"),
        ("flag", "<svg", r"not SVG: unclosed token: line 1, column 0"),
        ("flag", "<html/>", "it begins with <html>, not <svg>"),
        ("flag", "<svg/>", "it has no viewBox"),
        ("flag", '<svg viewBox="0 0 9 9"/>', "empty: it paints 0 of 10,000 pixels"),
        ("flag", FLAG.replace("{main}", "red"), 'write fill="{main}" where it should'),
    ],
)
def test_what_cannot_be_a_sticker_is_said_plainly(name, drawing, said):
    with pytest.raises(ValueError, match=said) as caught:
        own_sticker(name, drawing)
    assert len(str(caught.value)) <= 300


def test_a_drawing_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.svg: the sticker 'flag': .* No such file"):
        own_sticker("flag", tmp_path / "none.svg")
    (tmp_path / "picture.svg").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"picture\.svg: .*not text in UTF-8"):
        own_sticker("flag", tmp_path / "picture.svg")


@pytest.mark.parametrize("count", [None, 1, 3])
def test_scenes_with_a_sticker_of_ones_own_show_it_whole(count):
    flag = own_sticker("flag", FLAG)
    scenes = [scene_with(flag, seeded(4, n), sticker_count=count) for n in range(20)]
    assert scenes == [scene_with(flag, seeded(4, n), sticker_count=count) for n in range(20)]
    for each in scenes:
        assert count in (None, len(each.stickers))
        [placed] = [placed for placed in each.stickers if placed.sticker == flag]
        for centre, size in zip(placed.centre, placed.size, strict=True):
            assert size / 2 - 1e-6 <= centre <= 1 - size / 2 + 1e-6
        assert "flag" in each.caption
    assert len({placed.colour for each in scenes for placed in each.stickers}) > 4
