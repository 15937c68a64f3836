"""The storybook world: stickers × colours × places, with exact truth for every picture."""

from lrd_helpers.storybook.layouts import layout_of_scene, sample_layout
from lrd_helpers.storybook.places import PLACES, paint_place
from lrd_helpers.storybook.scenes import (
    IMAGE_SIZE,
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
    "StorybookDataset",
    "aspect_ratio",
    "caption_of",
    "layout_of_scene",
    "paint_place",
    "render_scenes",
    "sample_caption",
    "sample_layout",
    "sample_scene",
    "seeded",
    "sprite_bank",
    "sticker_svg",
    "tight_boxes",
]

# Every word a caption can have: what the tokenizers are built from.
WORDS: tuple[str, ...] = tuple(
    sorted({"a", "an", "and", *STICKERS, *COLOURS, *" ".join(PLACES).split()})
)
