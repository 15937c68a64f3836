"""Sample sheets: a grid of pictures in one PNG, written whole or not at all."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lrd_helpers.files import write_atomically
from lrd_helpers.pictures import picture_of, png_of


def save_sheet(images: Float[Tensor, "count 3 height width"], path: Path, columns: int) -> None:
    """Writes images in [0, 1] as a grid with white gaps of four pixels."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + 4) - 4, columns * (width + 4) - 4)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 4), i % columns * (width + 4)
        sheet[:, top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png_of(picture_of(sheet)))
