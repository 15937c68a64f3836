import pytest
import torch

from lrd_helpers.mask import tight_box
from lrd_helpers.placement import moved, object_box, object_mask, placed


def test_the_object_is_where_the_words_make_a_difference() -> None:
    without = torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(0))
    with_object = without.clone()
    with_object[:, 3:8, 2:6] += 1.0
    with_object[:, 11, 11] += 1.5  # a speck elsewhere: large, but alone
    mask = object_mask(with_object, without)
    assert mask[3:8, 2:6].all()
    assert not mask[9:, 9:].any(), "not connected to the largest difference"
    # The mean over 3 × 3 reaches one cell further; a higher threshold cuts that off.
    assert tight_box(mask) == (1 / 12, 2 / 12, 7 / 12, 9 / 12)
    assert tight_box(object_mask(with_object, without, 0.4)) == (2 / 12, 3 / 12, 6 / 12, 8 / 12)


def test_the_box_of_an_object_is_without_what_the_mean_added() -> None:
    without = torch.zeros(4, 16, 16)
    with_object = without.clone()
    with_object[:, 3:9, 2:6] = 1.0
    assert object_box(object_mask(with_object, without)) == (2 / 16, 3 / 16, 6 / 16, 9 / 16)
    with_object[:, :9] = with_object[:, 3:4]  # up to the canvas' edge, where nothing was added
    assert object_box(object_mask(with_object, without)) == (2 / 16, 0, 6 / 16, 9 / 16)


@pytest.mark.parametrize(("cells", "left"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3)])
def test_of_a_small_object_two_cells_are_left(cells, left) -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4 : 4 + cells, 5 : 5 + cells] = True
    x0, y0, x1, y1 = object_box(mask)
    assert ((x1 - x0) * 16, (y1 - y0) * 16) == (left, left)
    assert (x0 + x1) * 8 == 5 + cells / 2, "in the same place"


def test_two_equal_predictions_leave_the_whole_canvas() -> None:
    same = torch.zeros(4, 5, 5)
    assert object_mask(same, same).all(), "nothing stands out, so nothing is left out"


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


def test_objects_are_painted_back_to_front_each_in_its_box() -> None:
    background = torch.zeros(1, 8, 8)
    objects = [torch.full((1, 8, 8), value) for value in (1.0, 2.0)]
    whole = torch.zeros(8, 8, dtype=torch.bool)
    whole[:2, :2] = True
    cells = [torch.zeros(8, 8, dtype=torch.bool) for _ in range(2)]
    cells[0][:4, :4] = True
    cells[1][2:6, 2:6] = True
    boxes = [(0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75)]
    canvas = placed(background, objects, [whole, whole], boxes, cells)[0]
    assert canvas[0, 0] == 1
    assert canvas[3, 3] == 2, "the later one is in front"
    assert (canvas[~(cells[0] | cells[1])] == 0).all()
