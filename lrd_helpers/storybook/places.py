"""Places: six backgrounds, each a sky, a horizon and a ground, painted by formulas of x and y.

Everything is smooth, with soft edges one pixel wide: a background should cost the autoencoder
little, so that its capacity goes into the stickers.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lrd_helpers.storybook.stickers import PAPER

PLACE_NUMBERS = 12  # how many random numbers in [0, 1) a place is drawn from

Columns = Float[Tensor, "1 1 1 width"]  # x in [0, 1], from the left
Rows = Float[Tensor, "1 1 height 1"]  # y in [0, 1], from the top
Numbers = Float[Tensor, "batch 1 1 1"]
Picture = Float[Tensor, "batch 3 height width"]


def _colour(red: float, green: float, blue: float) -> Float[Tensor, "1 3 1 1"]:
    return torch.tensor([red, green, blue])[None, :, None, None]


def _mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    return first + (second - first) * share


def _edge(distance: Tensor) -> Tensor:
    """1 where distance > 0, 0 where < 0, with an edge about one pixel of 128 wide."""
    return torch.sigmoid(distance * 250)


def _disc(
    x: Columns,
    y: Rows,
    centre_x: Tensor | float,
    centre_y: Tensor | float,
    radius: Tensor | float,
    squash: float = 1.0,
) -> Tensor:
    return _edge(radius - ((x - centre_x) ** 2 + ((y - centre_y) * squash) ** 2).sqrt())


def _cloud(x: Columns, y: Rows, centre_x: Tensor, centre_y: Tensor, size: Tensor) -> Tensor:
    puffs = [
        _disc(x, y, centre_x + dx * size, centre_y - dy * size, radius * size, 1.25)
        for dx, dy, radius in ((-0.8, 0.0, 0.6), (0.0, 0.25, 0.85), (0.85, 0.0, 0.65))
    ]
    return torch.stack(puffs).amax(0) * _edge(centre_y + 0.35 * size - y)


def _grass(x: Columns, y: Rows, u: list[Numbers]) -> Picture:
    picture = _mix(_colour(0.45, 0.74, 0.96), _colour(0.80, 0.93, 0.98), y / 0.7)
    for a, b, c in ((0, 1, 2), (3, 4, 5)):
        cloud = _cloud(x, y, u[a], 0.08 + 0.22 * u[b], 0.07 + 0.06 * u[c])
        picture = _mix(picture, _colour(0.98, 0.99, 1.0), 0.9 * cloud)
    horizon = 0.52 + 0.14 * u[6]
    hill = horizon - 0.05 * torch.sin(6.3 * (x * (0.7 + 0.5 * u[7]) + u[8]))
    picture = _mix(picture, _colour(0.53, 0.80, 0.42), _edge(y - hill))
    meadow = horizon + 0.10 - 0.03 * torch.sin(6.3 * (x * (0.6 + 0.4 * u[9]) + u[10]))
    near = _mix(_colour(0.45, 0.75, 0.34), _colour(0.33, 0.62, 0.26), (y - horizon) / 0.5)
    return _mix(picture, near, _edge(y - meadow))


def _sand(x: Columns, y: Rows, u: list[Numbers]) -> Picture:
    picture = _mix(_colour(0.58, 0.84, 0.95), _colour(0.95, 0.95, 0.86), y / 0.65)
    sun = _disc(x, y, 0.12 + 0.76 * u[0], 0.10 + 0.10 * u[1], 0.07 + 0.02 * u[2])
    picture = _mix(picture, _colour(1.0, 0.93, 0.55), sun)
    horizon = 0.50 + 0.14 * u[3]
    for lift, slope, tone in (
        (0.0, 0.06, (0.93, 0.80, 0.53)),
        (0.14, 0.05, (0.89, 0.73, 0.44)),
        (0.30, 0.04, (0.84, 0.66, 0.37)),
    ):
        wave = torch.sin(6.3 * (x * (0.6 + 0.4 * u[4]) + u[5] + 2.7 * lift))
        dune = horizon + lift + slope * wave
        picture = _mix(picture, _colour(*tone), _edge(y - dune))
    return picture


def _snow(x: Columns, y: Rows, u: list[Numbers]) -> Picture:
    picture = _mix(_colour(0.64, 0.74, 0.86), _colour(0.86, 0.90, 0.95), y / 0.6)
    horizon = 0.52 + 0.12 * u[0]
    for shift in (u[1], u[2]):  # two far mountains with a bright side
        peak_x, slope = 0.1 + 0.8 * shift, 0.9 + 0.4 * u[3]
        peak = horizon - 0.30 + 0.08 * shift + slope * (x - peak_x).abs()
        picture = _mix(
            picture,
            _mix(_colour(0.70, 0.77, 0.88), _colour(0.58, 0.66, 0.80), _edge(x - peak_x)),
            _edge(y - peak),
        )
    drift = horizon - 0.03 * torch.sin(6.3 * (x * (0.6 + 0.4 * u[4]) + u[5]))
    near = _mix(_colour(0.93, 0.96, 1.0), _colour(0.80, 0.87, 0.95), (y - horizon) / 0.5)
    picture = _mix(picture, near, _edge(y - drift))
    bank = horizon + 0.22 - 0.04 * torch.sin(6.3 * (x * (0.5 + 0.4 * u[6]) + u[7]))
    return _mix(picture, _colour(0.97, 0.98, 1.0), 0.8 * _edge(y - bank))


def _sea(x: Columns, y: Rows, u: list[Numbers]) -> Picture:
    picture = _mix(_colour(0.52, 0.80, 0.98), _colour(0.90, 0.97, 1.0), y / 0.55)
    cloud = _cloud(x, y, u[0], 0.10 + 0.12 * u[1], 0.08 + 0.05 * u[2])
    picture = _mix(picture, _colour(1.0, 1.0, 1.0), 0.9 * cloud)
    horizon = 0.42 + 0.14 * u[3]
    for band in range(4):  # waves grow towards us
        rows = 9.0 - 1.7 * band
        crest = (
            horizon
            + 0.14 * band
            - 0.004 * (band + 1) ** 1.6 * torch.sin(6.3 * (x * rows / 2 + u[4 + band])) * (band > 0)
        )
        tone = 1 - 0.13 * band
        picture = _mix(picture, _colour(0.22 * tone, 0.60 * tone, 0.86 * tone), _edge(y - crest))
    return picture


def _night(x: Columns, y: Rows, u: list[Numbers]) -> Picture:
    picture = _mix(_colour(0.05, 0.06, 0.22), _colour(0.16, 0.18, 0.42), y / 0.7)
    for i in range(7):  # stars on a loose lattice, moved together
        star_x, star_y = (0.08 + 0.143 * i + 0.10 * u[0]) % 1.0, 0.06 + 0.09 * ((3 * i) % 5)
        star = _disc(x, y, star_x, star_y + 0.06 * u[1 + i % 3], 0.012)
        picture = _mix(picture, _colour(0.95, 0.95, 0.80), 0.9 * star)
    moon_x, moon_y, radius = 0.12 + 0.76 * u[4], 0.12 + 0.08 * u[5], 0.07 + 0.02 * u[6]
    moon = _disc(x, y, moon_x, moon_y, radius) * (
        1 - _disc(x, y, moon_x + 0.045, moon_y - 0.02, radius * 0.9)
    )
    picture = _mix(picture, _colour(0.98, 0.95, 0.78), moon)
    horizon = 0.60 + 0.14 * u[7]
    hill = horizon - 0.05 * torch.sin(6.3 * (x * (0.6 + 0.4 * u[8]) + u[9]))
    near = _mix(_colour(0.10, 0.16, 0.26), _colour(0.05, 0.09, 0.17), (y - horizon) / 0.4)
    return _mix(picture, near, _edge(y - hill))


def _sunset(x: Columns, y: Rows, u: list[Numbers]) -> Picture:
    picture = _mix(_colour(0.52, 0.32, 0.60), _colour(0.98, 0.52, 0.38), (y / 0.42).clamp(0, 1))
    picture = _mix(picture, _colour(1.0, 0.80, 0.45), ((y - 0.35) / 0.3).clamp(0, 1))
    horizon = 0.56 + 0.14 * u[0]
    sun = _disc(x, y, 0.15 + 0.7 * u[1], horizon - 0.03 - 0.06 * u[2], 0.12 + 0.03 * u[3])
    picture = _mix(picture, _colour(1.0, 0.93, 0.62), sun)
    hill = horizon - 0.04 * torch.sin(6.3 * (x * (0.6 + 0.4 * u[4]) + u[5]))
    picture = _mix(picture, _colour(0.52, 0.26, 0.36), _edge(y - hill))
    near = horizon + 0.14 - 0.03 * torch.sin(6.3 * (x * (0.6 + 0.4 * u[6]) + u[7]))
    return _mix(picture, _colour(0.36, 0.17, 0.30), _edge(y - near))


_PAINTERS: dict[str, Callable[[Columns, Rows, list[Numbers]], Picture]] = {
    "on grass": _grass,
    "on sand": _sand,
    "on snow": _snow,
    "at sea": _sea,
    "at night": _night,
    "at sunset": _sunset,
}
PLACES: tuple[str, ...] = tuple(_PAINTERS)


def paint_place(
    place: str, numbers: Float[Tensor, "batch twelve"], size: int, style: str = "flat"
) -> Picture:
    """Pictures of one place, in [0, 1]; the numbers, in [0, 1), vary its hills and clouds."""
    centres = (torch.arange(size) + 0.5) / size
    x, y = centres.view(1, 1, 1, -1), centres.view(1, 1, -1, 1)
    picture = _PAINTERS[place](x, y, [column.view(-1, 1, 1, 1) for column in numbers.T])
    picture = picture.clamp(0, 1).expand(-1, -1, size, size)
    if style == "sketch":  # the faint memory of the place on paper
        return 0.78 * _colour(*PAPER) + 0.22 * picture.mean(1, keepdim=True) + 0 * picture
    if style == "neon":
        return 0.16 * picture
    return picture
