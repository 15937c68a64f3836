"""Pictures whose answer is known, for a segmenter that is right by construction.

A picture says in its red channel which sticker a pixel shows, in green which colour, and in blue
which place.
"""

from types import SimpleNamespace

import torch
from torch import nn

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.storybook import COLOURS, PLACES, STICKERS


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
