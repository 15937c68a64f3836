"""The storybook world: stickers × colours × places, with exact truth for every picture."""

from lrd_helpers.storybook.layouts import layout_of_scene, sample_layout
from lrd_helpers.storybook.own import own_sticker, scene_with
from lrd_helpers.storybook.places import PLACES, paint_place
from lrd_helpers.storybook.scenes import (
    IMAGE_SIZE,
    WORDS,
    PlacedSticker,
    Rendering,
    Scene,
    StorybookDataset,
    caption_of,
    render_scenes,
    sample_caption,
    sample_scene,
    seeded,
    tight_boxes,
)
from lrd_helpers.storybook.stickers import (
    COLOURS,
    STICKERS,
    STYLES,
    Sticker,
    aspect_ratio,
    sprite_bank,
    sticker_svg,
)

__all__ = [
    "COLOURS",
    "IMAGE_SIZE",
    "PLACES",
    "STICKERS",
    "STYLES",
    "WORDS",
    "PlacedSticker",
    "Rendering",
    "Scene",
    "Sticker",
    "StorybookDataset",
    "aspect_ratio",
    "caption_of",
    "layout_of_scene",
    "own_sticker",
    "paint_place",
    "render_scenes",
    "sample_caption",
    "sample_layout",
    "sample_scene",
    "scene_with",
    "seeded",
    "sprite_bank",
    "sticker_svg",
    "tight_boxes",
]
