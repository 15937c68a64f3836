"""Ghosts: flawed versions of a scene in its noise (`latent_diffusion --ghosts`).

Gaussian noise never shows a U-Net what its own steps of sampling do: a thing that the caption does
not name, half drawn already. A ghost is such a thing. It is added to the noise, and the U-Net has
to predict it with the noise: so it learns to take it back.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lrd_helpers.storybook import COLOURS, STICKERS, PlacedSticker, Scene
from lrd_helpers.storybook.stickers import aspect_ratio
from lrd_helpers.training.latent_cache import Batch, Latents


@dataclass(frozen=True)
class Ghosts:
    """Noise in which, for some pictures, a flawed version of the scene shines through.

    Half of the ghosts are as strong as the scene itself, the others weaker. A picture whose caption
    is left empty has none: nobody could tell what is too much in it.

    Attributes:
        share: of the pictures that have a ghost, from 0 to 1.
    """

    share: float

    def __call__(
        self,
        noise: Latents,
        batch: Batch,
        snr: Float[Tensor, "batch"],
        empty: Bool[Tensor, "batch"],
        generator: torch.Generator,
    ) -> Latents:
        """ε + strength·√SNR·(flawed − z): in z_t the ghost stands in units of z."""
        draws, strength, whole = torch.rand(3, len(noise), generator=generator)
        strength = torch.where(whole < 0.5, 1.0, strength)
        # Where little noise is left, √SNR would make it many times the noise.
        strength = strength * snr.sqrt().clamp(max=2) * (draws < self.share) * ~empty
        return noise + strength[:, None, None, None] * (batch.flawed - batch.latents)


def flawed_scene(scene: Scene, generator: torch.Generator) -> Scene:
    """The scene with a mistake that a U-Net makes and a caption tells.

    A thing too much (in three of ten cases a smaller copy of a thing that is there), a thing too
    few, or a thing in another colour (one time in eight by chance the same).
    """
    draw, *numbers = torch.rand(7, generator=generator).tolist()
    stickers = list(scene.stickers)
    kind = int(torch.randint(len(STICKERS) * len(COLOURS), (), generator=generator))
    sticker, colour = STICKERS[kind // len(COLOURS)], list(COLOURS)[kind % len(COLOURS)]
    place = int(numbers[3] * len(stickers))
    if not stickers or draw < 0.8:
        longest = 0.16 * (0.5 / 0.16) ** numbers[0]
        ratio = aspect_ratio(sticker)
        size = (longest * min(1, ratio), longest * min(1, 1 / ratio))
        extra = PlacedSticker(sticker, colour, (0.5, 0.5), size)
        if stickers and draw < 0.25:
            # Smaller, so that the two can be told apart: which of two alike is too much?
            smaller = tuple((0.4 + 0.5 * numbers[0]) * side for side in stickers[place].size)
            extra = replace(stickers[place], size=smaller, flip=numbers[5] < 0.5)
        centre = tuple(
            side / 2 + (1 - side) * at for side, at in zip(extra.size, numbers[1:3], strict=True)
        )
        stickers.insert(int(numbers[4] * (len(stickers) + 1)), replace(extra, centre=centre))
    elif draw < 0.9:
        del stickers[place]
    else:
        stickers[place] = replace(stickers[place], colour=colour)
    return replace(scene, stickers=tuple(stickers))
