"""Inversion and edits, on a tiny random model: what is kept, refused and left behind."""

from __future__ import annotations

import io
import math
import warnings

import numpy
import pytest
import torch
from conftest import tiny_stable_diffusion
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from picture_files import as_a_phone_saves
from PIL import Image

from lrd_helpers import editing
from lrd_helpers.editing import (
    EditError,
    fill,
    find,
    fitted,
    insert,
    invert,
    move,
    redraw,
    remove,
    replace_object,
)
from lrd_helpers.layout import Layer, LayoutError
from lrd_helpers.mask import Mask
from lrd_helpers.measure import Detection
from lrd_helpers.methods import LayeredRendering
from lrd_helpers.pictures import picture_of, pixels_of
from lrd_helpers.pipeline import LayeredRenderingPipeline

STEPS = {"num_inference_steps": 4}
BOX = (0.5, 0.5, 0.75, 0.75)  # one cell of 4 × 4, and so 3 × 3 with its neighbours


@pytest.fixture
def image():
    """Noise: whatever is kept of it, is kept on purpose."""
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(3))
    return picture_of(pixels)


def seeded():
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize(
    ("method", "levels"),
    [("collage", 4), (LayeredRendering(fuse="once"), 5), (LayeredRendering(), 11)],
)
def test_an_insertion_inverts_only_the_levels_it_keeps(pipe, image, monkeypatch, method, levels):
    inverted, invert_some = [], editing._levels
    monkeypatch.setattr(
        editing,
        "_levels",
        lambda *args, **options: inverted.append(invert_some(*args, **options)) or inverted[-1],
    )
    star = Layer("a yellow star", BOX)
    insert(pipe, image, star, background="at sea", method=method, num_inference_steps=10)
    assert len(inverted[0]) == levels
    whole = invert(pipe, image, "at sea", num_inference_steps=10).latents
    assert torch.equal(inverted[0], whole[:levels])


def test_inversion_follows_song_et_al(pipe, image):
    inversion = invert(pipe, image, "a red car", **STEPS)
    x, bars = inversion.latents[:1], pipe.scheduler.alphas_cumprod
    ids = pipe.tokenizer("a red car", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = pipe.text_encoder(ids)[0]
        before = bars[0]
        for number, t in enumerate((1, 251, 501, 751), start=1):
            eps = pipe.unet(x, t, text).sample
            x0 = (x - (1 - before).sqrt() * eps) / before.sqrt()
            x = bars[t].sqrt() * x0 + (1 - bars[t]).sqrt() * eps
            torch.testing.assert_close(x, inversion.latents[number : number + 1])
            before = bars[t]


@pytest.fixture
def own_pipe():
    """With models of its own, which a test may change."""
    pipe = LayeredRenderingPipeline(
        **tiny_stable_diffusion().components, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_more_steps_come_back_better(own_pipe, image):
    pipe = own_pipe
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.1)  # a trained U-Net is smoother than a random one

    def error(steps):
        inversion = invert(pipe, image, num_inference_steps=steps)
        direct = pixels_of(decoded(pipe, inversion.latents[:1]))
        return (pixels_of(redraw(pipe, inversion)) - direct).square().mean()

    assert error(100) < 0.5 * error(5)


def decoded(pipe, latents):
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return picture_of(pixels[0] / 2 + 0.5)


def test_what_may_not_change_is_the_inversion_s(pipe, image):
    inversion = invert(pipe, image, **STEPS)
    nowhere = torch.zeros(4, 4, dtype=torch.bool)
    kept = redraw(pipe, inversion, "a boat", changing=nowhere, guidance_scale=5.0)
    assert kept.tobytes() == decoded(pipe, inversion.latents[:1]).tobytes()
    everywhere = redraw(pipe, inversion, "a boat", guidance_scale=5.0)
    assert everywhere.tobytes() != kept.tobytes()


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none(pipe, image, share):
    inversion = invert(pipe, image, **STEPS)
    with pytest.raises(ValueError, match=f"share is {share}"):
        redraw(pipe, inversion, share=share)


def test_the_last_share_of_the_steps_changes_less(pipe, image):
    inversion = invert(pipe, image, **STEPS)
    original = pixels_of(decoded(pipe, inversion.latents[:1]))

    def change(share):
        new = redraw(pipe, inversion, "a boat", share=share, guidance_scale=9.0)
        return (pixels_of(new) - original).square().mean()

    assert 0 < change(0.25) < change(1.0)


# ------------------------------------------------------------------ edits


def edits(pipe, image, **options):
    """Every edit of one box, each from the same noise."""
    options = STEPS | {"background": "on grass"} | options
    star = Layer("a yellow star", BOX)
    corner = (0.0, 0.0, 0.25, 0.25)
    return {
        "insert": insert(pipe, image, star, generator=seeded(), **options),
        "replace": replace_object(pipe, image, corner, star, generator=seeded(), **options),
        "remove": remove(pipe, image, BOX, generator=seeded(), **options),
    }


def test_nothing_changes_outside_and_something_inside(pipe, image):
    for name, edited in edits(pipe, image).items():
        difference = (pixels_of(edited.image) - pixels_of(image)).abs().amax(0)
        assert difference[~edited.changed].max() == 0, name
        assert difference[edited.changed].max() > 0.1, name
        assert edited.kept == math.inf, name
        # 3 × 3 cells of 8 × 8 pixels around the box, and with "replace" the corner's 2 × 2.
        assert edited.changed.sum() == 64 * (13 - 1 if name == "replace" else 9), name


def test_a_hole_is_filled_and_no_pixel_far_from_it_changes(pipe, image):
    hole, near = torch.zeros(2, 32, 32, dtype=torch.bool)
    hole[8:16, 22:] = True  # up to the picture's edge
    near[4:20, 18:] = True
    options = {"prompt": "a car on grass", "num_inference_steps": 4}
    filled = fill(pipe, image, Mask.of(hole), **options)
    difference = (pixels_of(filled.image) - pixels_of(image)).abs().amax(0)
    assert torch.equal(filled.changed, near)
    assert difference[~near].max() == 0
    assert difference[hole].mean() > 0.1
    # There is no noise in it, and not a trace of what stood in the hole.
    red = Image.composite(Image.new("RGB", image.size, "red"), image, Mask.of(hole).image())
    assert fill(pipe, red, Mask.of(hole), **options).image.tobytes() == filled.image.tobytes()


@pytest.mark.parametrize("box", [(0.0, 0.5, 0.25, 0.75), (0.75, 0.75, 1.0, 1.0)])
def test_nothing_of_an_object_is_left_at_the_edge_of_the_picture(pipe, image, box):
    cells = Layer("a car", box).cells(32, 32) > 0
    red = Image.composite(Image.new("RGB", image.size, "red"), image, Mask.of(cells).image())
    options = {"background": "on grass", **STEPS}
    with_pixels = remove(pipe, red, box, generator=seeded(), **options)
    without = remove(pipe, red, box, generator=seeded(), keep_pixels=False, **options)
    difference = pixels_of(with_pixels.image) - pixels_of(without.image)
    assert difference[:, cells].abs().max() < 1 / 255 + 1e-6


def test_colours_are_spread_over_a_hole():
    hole = torch.zeros(9, 9, dtype=torch.bool)
    hole[2:7, 2:7] = True
    flat = torch.full((3, 9, 9), 0.25)
    assert torch.allclose(editing._spread(torch.where(hole, 1.0, flat), hole), flat)
    ramp = torch.linspace(0, 1, 9).expand(3, 9, 9)
    spread = editing._spread(torch.where(hole, 1.0, ramp), hole)
    assert torch.equal(spread[:, ~hole], ramp[:, ~hole])
    assert (spread - ramp).abs().max() < 0.05
    everything = torch.ones(9, 9, dtype=torch.bool)
    assert torch.equal(editing._spread(ramp, everything), ramp)


def test_without_the_old_pixels_only_the_autoencoder_s_error_is_left(pipe, image):
    edited = insert(
        pipe,
        image,
        Layer("a yellow star", BOX),
        background="on grass",
        generator=seeded(),
        keep_pixels=False,
        **STEPS,
    )
    assert edited.kept < 60
    # As far from the old one as what the autoencoder makes of it, or nearly: its normalisation
    # looks at the whole picture.
    outside = ~edited.changed
    plain = pixels_of(decoded(pipe, invert(pipe, image, **STEPS).latents[:1]))
    loss = -10 * (plain - pixels_of(image)).square()[:, outside].mean().log10()
    assert edited.kept == pytest.approx(float(loss), abs=1)


def test_the_same_seed_is_the_same_edit_and_another_one_is_not(pipe, image):
    first, second = (edits(pipe, image) for _ in range(2))
    for name in first:
        assert first[name].image.tobytes() == second[name].image.tobytes(), name
    star = Layer("a yellow star", BOX)
    other = insert(
        pipe,
        image,
        star,
        background="on grass",
        generator=torch.Generator().manual_seed(1),
        **STEPS,
    )
    assert other.image.tobytes() != first["insert"].image.tobytes()


def test_a_mask_may_change_less_than_its_box(pipe, image):
    corners = torch.zeros(32, 32, dtype=torch.bool)
    corners[:8, :8] = corners[24:, 24:] = True
    edited = remove(pipe, image, Mask.of(corners), background="on grass", **STEPS)
    assert edited.changed.sum() == 64 * 8


def test_other_schedulers_and_pipelines_are_left_as_they_were(pipe, image):
    euler = LayeredRenderingPipeline.from_pipe(
        pipe, scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    )
    euler.set_progress_bar_config(disable=True)
    before = dict(vars(euler.scheduler))
    by_euler, by_ddim = edits(euler, image), edits(pipe, image)
    for name in by_ddim:
        assert by_euler[name].image.tobytes() == by_ddim[name].image.tobytes(), name
    assert isinstance(euler.scheduler, EulerDiscreteScheduler)
    assert vars(euler.scheduler).keys() == before.keys()
    assert euler.scheduler.num_inference_steps is None
    plain = StableDiffusionPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    removed = remove(plain, image, BOX, background="on grass", generator=seeded(), **STEPS)
    assert removed.image.tobytes() == by_ddim["remove"].image.tobytes()


def test_an_object_is_moved(pipe, image):
    """Without a touch-up what is put down is what was picked up."""
    pixels = torch.zeros(32, 32, dtype=torch.bool)
    pixels[16:24, 16:24] = True

    def moved(touch_up):
        return move(
            pipe,
            image,
            Mask.of(pixels),
            (0.0, 0.0, 0.25, 0.25),
            prompt="a red car",
            background="on grass",
            touch_up=touch_up,
            generator=seeded(),
            **STEPS,
        )

    edited, touched = moved(0.0), moved(0.5)
    before, after = pixels_of(image), pixels_of(edited.image)
    torch.testing.assert_close(after[:, :8, :8], before[:, 16:24, 16:24], atol=1 / 255, rtol=0)
    assert not torch.equal(after[:, 16:24, 16:24], before[:, 16:24, 16:24])
    assert edited.kept == math.inf
    redrawn = pixels_of(touched.image)
    # its cell is drawn again, and one cell around it; the rest stays
    assert not torch.equal(redrawn[:, :8, :8], after[:, :8, :8])
    torch.testing.assert_close(redrawn[:, 16:, 16:], after[:, 16:, 16:])
    assert touched.kept == math.inf


def test_the_smallest_object_that_can_be_moved_follows_from_the_size(pipe, image):
    """2 × 2 pixels of 32 are as much as 8 × 8 of storybook's 128."""
    pixels = torch.zeros(32, 32, dtype=torch.bool)
    pixels[16:18, 16:18] = True
    options = {"prompt": "a red car", "background": "on grass", **STEPS}
    edited = move(pipe, image, Mask.of(pixels), (0.0, 0.0, 0.25, 0.25), **options)
    assert edited.image.tobytes() != image.tobytes()


def test_rims_and_seams_follow_from_the_size():
    """Of 512 pixels four times those of 128: as large a share of the picture."""
    shares = []
    for side in (16, 64):
        cells = torch.zeros(side, side, dtype=torch.bool)
        cells[side // 4 : side // 2, side // 4 : side // 2] = True
        grown = editing._grown(cells)
        black, white = (
            Image.new("RGB", (8 * side, 8 * side), colour) for colour in ("black", "white")
        )
        faded = editing._edited(white, black, grown, keep=True)
        shares.append((grown, pixels_of(faded.image)[0]))
    (few, small), (many, large) = shares
    assert torch.equal(few.repeat_interleave(4, 0).repeat_interleave(4, 1), many)
    assert few.sum() == 6 * 6
    small = small.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (small - large).abs().max() < 0.3  # a step of the fade
    assert (small == 1).float().mean() == pytest.approx(
        float((large == 1).float().mean()), abs=0.02
    )


@pytest.mark.parametrize("edit", [insert, replace_object])
def test_half_precision_stays_half(own_pipe, image, edit):
    """The layered pipeline inside shares the models: it must not cast them."""
    pipe = own_pipe.to(torch.bfloat16)
    where = [BOX] if edit is replace_object else []
    edited = edit(pipe, image, *where, Layer("a boat", BOX), background="", **STEPS)
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert edited.kept == math.inf


# ------------------------------------------------------------------ what is refused


def test_a_box_with_nothing_in_it(pipe, image, monkeypatch):
    monkeypatch.setattr("lrd_helpers.editing.DIFFERENT", 1.0)  # as if nothing had changed
    with pytest.raises(EditError, match=r"nothing to move in \(0\.5, 0\.5, 0\.75, 0\.75\)"):
        move(pipe, image, BOX, (0.0, 0.0, 0.25, 0.25), prompt="a car", background="", **STEPS)


@pytest.mark.parametrize("box", [(0.5, 0.5, 0.5, 0.9), (0.2, 0.2, 1.4, 0.9)])
def test_a_box_that_is_none(pipe, image, box):
    with pytest.raises(LayoutError, match="box"):
        remove(pipe, image, box, background="on grass", **STEPS)


def test_what_is_not_found_and_what_is(image):
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[4:9, 2:5] = True
    weak = Detection(box=(0.0, 0.0, 1.0, 1.0), score=0.2, mask=None)
    strong = Detection(box=(0.1, 0.1, 0.2, 0.3), score=0.9, mask=inside)
    assert find(lambda *_: [[weak, strong]], image, "a car") == Mask.of(inside)
    boxed = find(lambda *_: [[Detection((0.0, 0.0, 0.5, 1.0), 1.0, None)]], image, "a car")
    assert boxed.box == (0, 0, 0.5, 1)
    with pytest.raises(EditError, match="'a car' was not found"):
        find(lambda *_: [[]], image, "a car")


def test_pictures_of_other_sizes_and_modes(pipe, image):
    assert fitted(pipe, image) == image
    sides = Image.open(io.BytesIO(as_a_phone_saves(image)))
    assert fitted(pipe, sides).tobytes() == image.tobytes()
    with pytest.warns(UserWarning, match="mode is I;16"):
        deep = fitted(pipe, Image.fromarray(numpy.full((32, 32), 51 * 257, numpy.uint16)))
    assert deep.getpixel((0, 0)) == (51, 51, 51)
    with pytest.warns(UserWarning, match="64 × 64; it was resized to 32 × 32"):
        assert fitted(pipe, image.resize((64, 64))).size == (32, 32)
    with pytest.warns(UserWarning, match="mode is L"):
        assert fitted(pipe, image.convert("L")).mode == "RGB"
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    with pytest.warns(UserWarning, match="mode is RGBA"):
        assert fitted(pipe, clear).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(EditError, match="64 × 32, but should have the ratio.*crop it"):
        fitted(pipe, image.resize((64, 32)))
    with pytest.raises(EditError, match=r"of type Tensor.*picture_of"):
        fitted(pipe, torch.zeros(3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        invert(pipe, image, **STEPS)


def test_a_new_object_is_pasted_into_the_picture_without_the_old_one(pipe, image, monkeypatch):
    canvases = []
    sample = LayeredRendering.sample

    def noting(method, run):
        canvases.append(run.canvas)
        return sample(method, run)

    monkeypatch.setattr(LayeredRendering, "sample", noting)
    star, corner = Layer("a yellow star", BOX), (0.0, 0.0, 0.25, 0.25)
    options = STEPS | {"background": "on grass"}
    insert(pipe, image, star, generator=seeded(), **options)
    replaced = replace_object(pipe, image, corner, star, generator=seeded(), **options)
    emptied = remove(pipe, image, corner, generator=seeded(), **options)
    insert(pipe, image, star, method=LayeredRendering(), generator=seeded(), **options)
    assert torch.equal(canvases[0][0], pixels_of(image))
    assert torch.equal(canvases[1][0], pixels_of(emptied.image))
    assert not torch.equal(canvases[1], canvases[0])
    assert canvases[2] is None, "without a collage there is nothing to paste"
    assert replaced.before == image


def test_what_layered_rendering_refuses_is_refused_before_anything_is_drawn(
    pipe, image, monkeypatch
):
    calls = []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: calls.append(a) or forward(*a, **k))
    star = Layer("a yellow star", BOX, start=0.2)
    with pytest.raises(ValueError, match="layer 1 'a yellow star' has a start or an end"):
        replace_object(pipe, image, BOX, star, background="on grass", **STEPS)
    glass = Layer("a yellow star", BOX, opacity=0.5)
    with pytest.raises(ValueError, match="has an opacity of 0.5, but method 'paper' knows none"):
        insert(pipe, image, glass, background="on grass", method="paper", **STEPS)
    assert not calls


def test_an_object_that_is_not_seen_leaves_more_of_the_picture(pipe, image):
    def changed(opacity: float) -> float:
        layer = Layer("a yellow star", (0, 0, 1, 1), opacity=opacity)
        edited = insert(pipe, image, layer, background="on grass", generator=seeded(), **STEPS)
        return float((pixels_of(edited.image) - kept).abs().mean())

    # Against the picture through the autoencoder, whose weights are random here.
    latents = pipe.vae.encode(2 * pixels_of(image)[None] - 1).latent_dist.mode()
    kept = (pipe.vae.decode(latents).sample[0] / 2 + 0.5).clamp(0, 1)
    assert changed(0.05) < changed(0.95)


@pytest.mark.parametrize("edit", [invert, remove, fill, insert, replace_object, move])
def test_numbers_that_are_not_finite_never_become_an_edit(own_pipe, image, edit):
    torch.nn.init.constant_(own_pipe.unet.conv_out.bias, torch.nan)
    arguments = {
        invert: [],
        remove: [BOX],
        fill: [BOX],
        insert: [Layer("a star", BOX)],
        replace_object: [BOX, Layer("a star", BOX)],
        move: [BOX, (0.0, 0.0, 0.25, 0.25)],
    }[edit]
    options = {} if edit in (invert, fill) else {"background": "on grass"}
    options |= {"prompt": "a star"} if edit in (move, fill) else {}
    with pytest.raises(ValueError, match="the U-Net's predictions at t = .* are not finite"):
        edit(own_pipe, image, *arguments, **options, **STEPS)


def test_a_failure_on_the_way_leaves_the_pipeline_as_it_was(pipe, image):
    scheduler, unet = pipe.scheduler, pipe.unet
    with pytest.raises(ValueError, match="method is 'none'"):
        insert(pipe, image, Layer("a star", BOX), background="", method="none", **STEPS)
    assert pipe.scheduler is scheduler
    assert pipe.unet is unet
    assert not any(hook for module in unet.modules() for hook in module._forward_hooks.values())
