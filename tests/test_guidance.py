from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageColor

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.methods import METHODS, guidance
from lrd_helpers.methods.guidance import (
    NORM,
    colour_latents,
    constant_delta,
    contrast_delta,
    decoded_delta,
    dynamic_delta,
    positions,
    vision_guidance,
)


def test_vision_guidance_is_plus_delta_inside_and_minus_delta_outside() -> None:
    delta = torch.tensor([1.0, -2.0, 3.0, 0.5])
    mask = torch.zeros(5, 7)
    mask[1:3, 2:6] = 1
    field = vision_guidance(delta, mask, inside=0.05, outside=0.2)
    for row in range(5):
        for column in range(7):
            strength = 0.05 if 1 <= row < 3 and 2 <= column < 6 else -0.2
            assert torch.allclose(field[:, row, column], strength * delta)


@given(st.floats(-2, 2))
def test_equal_strengths_are_the_papers_equation(strength: float) -> None:
    # Eq. 5 word by word: ξ[j,k,l] = δ[l]·M[j,k] − δ[l]·(1 − M[j,k])
    delta, mask = torch.tensor([0.5, 1.0]), torch.tensor([[1.0, 0.0, 1.0]])
    scaled = strength * delta
    expected = scaled[:, None, None] * mask - scaled[:, None, None] * (1 - mask)
    assert torch.allclose(vision_guidance(delta, mask, strength, strength), expected)


def test_constant_delta_is_the_direction_from_grey_to_the_colour(tiny) -> None:
    def latent(colour: str) -> torch.Tensor:
        rgb = torch.tensor(ImageColor.getrgb(colour)) / 127.5 - 1
        flat = rgb[None, :, None, None].expand(1, 3, 64, 64)
        with torch.no_grad():
            encoded = tiny.vae.encode(flat).latent_dist.mode()
        return encoded.mean(dim=(0, 2, 3)) * tiny.vae.config.scaling_factor

    delta = constant_delta(tiny.vae, "red", size=64)
    direction = latent("red") - latent("#808080")
    assert torch.allclose(delta, 2 * direction / direction.norm(), atol=1e-4)
    assert delta.norm().item() == pytest.approx(NORM)
    assert delta.dtype == torch.float32
    assert not torch.allclose(delta, constant_delta(tiny.vae, "blue", size=64), atol=0.01)


def test_grey_has_no_direction(tiny) -> None:
    assert constant_delta(tiny.vae, "grey", size=64).tolist() == [0, 0, 0, 0]


def test_an_unknown_colour_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="unknown color specifier: 'reddish'"):
        constant_delta(tiny.vae, "reddish")


def test_contrast_delta_points_from_the_background_to_the_colour() -> None:
    # In the mask the background is (1, 0, 2) and (3, 0, 0): in the mean (2, 0, 1).
    background = torch.tensor([[[1.0, 3.0, 9.0]], [[0.0, 0.0, 9.0]], [[2.0, 0.0, 9.0]]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    delta = contrast_delta(torch.tensor([2.0, 3.0, -3.0]), background, mask)
    assert torch.allclose(delta, NORM * torch.tensor([0.0, 0.6, -0.8]))


def test_over_grey_the_contrast_is_the_colour(tiny) -> None:
    grey, red = colour_latents(tiny.vae, ["grey", "red"], size=64)
    delta = contrast_delta(red, grey[:, None, None].expand(-1, 4, 4), torch.ones(4, 4))
    assert torch.allclose(delta, constant_delta(tiny.vae, "red", size=64), atol=1e-4)


def test_dynamic_delta_is_the_mean_of_the_noise_where_attention_is_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 3, 5, generator=generator)
    attention = torch.rand(3, 5, generator=generator)
    by_hand = sorted(
        ((attention[j, k], latents[:, j, k]) for j in range(3) for k in range(5)),
        key=lambda pair: -pair[0],
    )
    expected = torch.stack([cell for _, cell in by_hand[:4]]).mean(0)
    assert torch.allclose(dynamic_delta(latents, attention, 4), expected)
    assert torch.allclose(dynamic_delta(latents, attention, 15), latents.mean((1, 2)), atol=1e-6)


@torch.no_grad()
def test_decoded_delta_goes_through_the_colour_of_the_noise(tiny) -> None:
    latents = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
    attention = torch.zeros(4, 4)
    attention[1, 2] = 1.0
    scaling_factor = tiny.vae.config.scaling_factor
    rgb = tiny.vae.decode(latents[None] / scaling_factor).sample[0]
    # Bilinear, half-pixel centres: of 8 × 8 pixels a cell, the middle four are the brightest.
    colour = rgb[:, 11:13, 19:21].mean((1, 2))
    flat = colour[None, :, None, None].expand(1, 3, 32, 32)
    expected = tiny.vae.encode(flat).latent_dist.mean.mean((0, 2, 3)) * scaling_factor
    assert torch.allclose(decoded_delta(tiny.vae, latents, attention, 4), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "side", "wanted"), [("paper", 4, 16), ("paper", 32, 80), ("authors", 32, 20)]
)
def test_k_is_a_share_of_the_canvas_where_it_counts_cells(
    pipe, monkeypatch, method, side, wanted
) -> None:
    """20 of 16 × 16 are 80 of 32 × 32; pixels, with the script's δ, are 20 anywhere."""
    seen = []

    def counting(latents, attention, top_k):
        seen.append(top_k)
        return dynamic_delta(latents, attention, top_k)

    monkeypatch.setattr(guidance, "dynamic_delta", counting)
    choices = replace(METHODS[method], top_k=min(20, side**2))
    layout = Layout("a red car", layers=[Layer("a red car", (0, 0, 0.5, 0.5))])
    pipe(layout, method=choices, num_inference_steps=2, height=8 * side, width=8 * side)
    assert seen == [wanted]


def test_delta_stands_out_as_much_of_a_wider_canvas() -> None:
    """δ, a mean of K cells of noise, against the mean of noise in a region of a tenth."""
    ratios = []
    for side in (16, 64):
        noise = torch.randn(64, 4, side, side, generator=torch.Generator().manual_seed(0))
        k = positions(METHODS["paper"], (side, side))
        deltas = torch.stack([dynamic_delta(each, torch.rand(side, side), k) for each in noise])
        ratios.append(float(deltas.std() / noise.flatten(2)[..., : side**2 // 10].mean(2).std()))
    assert ratios[0] == pytest.approx(ratios[1], rel=0.15)
