"""`connected_regions` of a mask, against a flood fill."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lrd_helpers.mask import connected_regions


def test_connected_regions_largest_first_and_corners_connect():
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    regions = connected_regions(mask)
    assert [int(region.sum()) for region in regions] == [4, 2, 1]
    assert torch.equal(torch.stack(regions).any(0), mask)
    assert regions[1][0, 0]
    assert regions[1][1, 1]
    assert len(connected_regions(mask, least=2)) == 2
    assert connected_regions(torch.zeros(3, 3, dtype=torch.bool)) == []


def test_connected_regions_follow_a_spiral():
    mask = torch.zeros(41, 41, dtype=torch.bool)
    x = y = 0
    mask[0, 0] = True
    turn = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    for leg, length in enumerate(n for m in range(40, 0, -2) for n in (m, m) if n > 0):
        dx, dy = turn[leg % 4]
        for _ in range(length - (leg > 0)):
            if not (0 <= x + dx < 41 and 0 <= y + dy < 41):
                break
            x, y = x + dx, y + dy
            mask[y, x] = True
    assert len(connected_regions(mask)) == 1


@given(st.integers(0, 2**31), st.floats(0.1, 0.7))
def test_connected_regions_agree_with_a_flood_fill(seed, density):
    mask = torch.rand(12, 9, generator=torch.Generator().manual_seed(seed)) < density
    left = {tuple(pixel) for pixel in mask.nonzero().tolist()}
    expected = set()
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        expected.add(frozenset(region))
    regions = connected_regions(mask)
    assert {frozenset(map(tuple, region.nonzero().tolist())) for region in regions} == expected
    sizes = [int(region.sum()) for region in regions]
    assert sizes == sorted(sizes, reverse=True)
