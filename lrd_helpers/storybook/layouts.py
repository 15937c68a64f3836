"""Layouts out of scenes: what one would have to ask for to get such a scene."""

import torch

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.storybook.scenes import Scene, caption_of, render_scenes, sample_scene


def layout_of_scene(scene: Scene) -> Layout:
    """The layout that asks for `scene`: a layer a sticker with its whole box, back to front."""
    boxes = render_scenes([scene]).boxes[0, : len(scene.stickers)]
    return Layout(
        caption_of(scene.stickers, scene.place),
        background=scene.place,
        layers=[
            Layer(caption_of((placed,), scene.place, name_place=False), box)
            for placed, box in zip(scene.stickers, boxes, strict=True)
        ],
    )


def sample_layout(
    generator: torch.Generator, *, sticker_count: int, smallest: float = 0.25
) -> Layout:
    """The layout of a random scene.

    Args:
        generator: same generator, same layout.
        sticker_count: 1 to 4 layers.
        smallest: no box's longer side is less, as a share of the canvas; at most 0.5.

    Raises:
        ValueError: no stickers, or `smallest` too large.
    """
    if not 1 <= sticker_count <= 4 or not 0 <= smallest <= 0.5:
        raise ValueError(
            f"sticker_count is {sticker_count} and smallest {smallest}, but should be 1 to 4 and "
            "0 to 0.5"
        )
    while True:
        scene = sample_scene(generator, sticker_count=sticker_count)
        if all(max(placed.size) >= smallest for placed in scene.stickers):
            return layout_of_scene(scene)
