import pytest
import torch

from lrd_helpers.mask import tight_box
from lrd_helpers.methods.placement import moved, object_pixels, otsu_threshold, pasted


def test_otsu_divides_two_groups() -> None:
    values = torch.tensor([0.1, 0.2, 0.15, 5.0, 5.5, 0.05]).view(2, 3)
    assert otsu_threshold(values) == pytest.approx(2.6)
    # The definition, written out for every cut.
    values = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) ** 3
    ordered = values.flatten().sort().values
    between = [
        (low := ordered[:n], high := ordered[n:])
        and n * (64 - n) * float(low.mean() - high.mean()) ** 2
        for n in range(1, 64)
    ]
    cut = between.index(max(between)) + 1
    assert otsu_threshold(values) == pytest.approx(float(ordered[cut - 1] + ordered[cut]) / 2)


def test_moving_to_the_same_box_changes_nothing() -> None:
    picture = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        moved(picture, (0.1, 0.2, 0.7, 0.9), (0.1, 0.2, 0.7, 0.9)), picture, atol=1e-5
    )


def test_moving_by_whole_cells_is_a_shift_and_stretching_by_two_repeats() -> None:
    picture = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    shifted = moved(picture, (0.0, 0.0, 0.5, 0.5), (0.5, 0.25, 1.0, 0.75))
    assert torch.allclose(shifted[:, 2:6, 4:], picture[:, :4, :4], atol=1e-5)
    ramp = torch.arange(8.0).expand(1, 8, 8)
    wide = moved(ramp, (0.25, 0.0, 0.75, 1.0), (0.0, 0.0, 1.0, 1.0))
    # Cell centres 0.5/8, 1.5/8, … show what was at 2.25, 2.75, … cells.
    assert torch.allclose(wide[0, 0], torch.arange(8) / 2 + 1.75, atol=1e-4)


def scene_with_an_object() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A picture with a disc, the same without it and with its horizon two pixels higher, R."""
    without = torch.zeros(3, 128, 128)
    without[:, 80:] = 0.6
    picture = torch.zeros(3, 128, 128)
    picture[:, 78:] = 0.6
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    disc = (x - 40) ** 2 + (y - 50) ** 2 < 15**2
    picture[0] = torch.where(disc, 0.7, picture[0])
    relevance = torch.full((16, 16), 0.1)
    relevance[4:9, 3:8] = 1.0
    return picture, without, disc


def test_an_object_is_found_beside_a_line_that_differs_more() -> None:
    picture, without, disc = scene_with_an_object()
    everywhere = torch.ones(16, 16)
    found = object_pixels(picture, without, everywhere)
    assert (found & disc).sum() / (found | disc).sum() > 0.9, "the horizon is thin"
    # A cloud that is another one is not thin, but no matter of the prompt.
    picture[:, 10:26, 60:120] = 1.0
    assert not (object_pixels(picture, without, everywhere) & disc).any()
    relevance = torch.full((16, 16), 0.01)
    relevance[4:9, 3:8] = 1.0
    found = object_pixels(picture, without, relevance)
    assert (found & disc).sum() / (found | disc).sum() > 0.9


def test_two_equal_pictures_have_no_object_but_the_whole_canvas() -> None:
    same = torch.zeros(3, 128, 128)
    assert object_pixels(same, same, torch.ones(16, 16)).all()


@pytest.mark.parametrize("side", [32, 128, 512])
def test_objects_are_found_at_any_size(side) -> None:
    picture = torch.zeros(3, side, side)
    low, high = side // 4, side // 2
    picture[1, low:high, low:high] = 1.0
    found = object_pixels(picture, torch.zeros_like(picture), torch.ones(4, 4))
    rim = max(3, side // 40)
    assert found[low + rim : high - rim, low + rim : high - rim].all()
    assert found.sum() <= (high - low + 2 * rim) ** 2


def test_what_is_pasted_fills_its_box_and_no_more_than_it_may() -> None:
    picture, _, disc = scene_with_an_object()
    canvas = torch.full((3, 128, 128), 0.25)
    box = (0.5, 0.25, 0.75, 0.75)
    cells = torch.zeros(128, 128, dtype=torch.bool)
    cells[32:96, 64:96] = True
    made = pasted(canvas, picture, disc, box, cells)
    changed = (made - canvas).abs().sum(0) > 0.2
    x0, y0, x1, y1 = tight_box(changed)
    assert (x0, y0, x1, y1) == pytest.approx(box, abs=0.03)
    assert made[0, 64, 80] == pytest.approx(0.7)
    assert (made[:, :28] == 0.25).all()
    glass = pasted(canvas, picture, disc, box, cells, 0.25)
    assert torch.allclose(glass, 0.25 * made + 0.75 * canvas)
    assert torch.equal(pasted(canvas, picture, disc, box, cells, 0.0), canvas)
    half = cells.clone()
    half[64:] = False
    above = pasted(canvas, picture, disc, box, half)
    assert torch.equal(above[:, :60], made[:, :60])
    assert (above[:, 68:] == 0.25).all(), "below it may cover nothing"


@pytest.mark.parametrize(
    ("side", "gap", "parts"), [(128, 4, 1), (128, 6, 2), (512, 16, 1), (512, 20, 2)]
)
def test_how_far_apart_the_parts_of_an_object_may_be_follows_from_the_size(
    side, gap, parts
) -> None:
    picture, wide = torch.zeros(3, side, side), side // 4
    left, right = side // 8, side // 8 + wide + gap
    picture[0, wide : 2 * wide, left : left + wide] = 1.0
    picture[0, wide : 2 * wide, right : right + wide] = 1.0
    relevance = torch.ones(4, 4)
    found = object_pixels(picture, torch.zeros_like(picture), relevance)
    assert found.any(dim=0)[[left + wide // 2, right + wide // 2]].sum() == 3 - parts
