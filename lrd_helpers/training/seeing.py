"""Features of the U-Net that have to tell what stands in each cell (`latent_diffusion --see`).

After REPA (Yu et al. 2024), with the renderer's truth in place of a pretrained encoder.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrd_helpers.storybook import COLOURS, STICKERS, Rendering
from lrd_helpers.training.latent_cache import Batch, Classes

BLOCKS = (0, 1)  # the U-Net's up-blocks whose features are read
KINDS = 1 + len(STICKERS)  # 0: the place
WIDTH = 192  # of the layer between features and answers


def cell_classes(rendering: Rendering, factor: int = 8) -> Classes:
    """What most of each cell of factor × factor pixels shows: 0 for the place, or 1 + a number that
    counts through all stickers in all colours."""
    coverage = functional.avg_pool2d(rendering.masks.float(), factor)
    coverage = torch.cat([1 - coverage.sum(1, keepdim=True), coverage], 1)
    kinds = torch.zeros(coverage.shape[:2], dtype=torch.long)
    for row, scene in enumerate(rendering.scenes):
        for z, placed in enumerate(scene.stickers):
            sticker, colour = STICKERS.index(placed.sticker), list(COLOURS).index(placed.colour)
            kinds[row, 1 + z] = 1 + sticker * len(COLOURS) + colour
    winner = coverage.argmax(1)
    return kinds.gather(1, winner.flatten(1)).view_as(winner)


class Seeing(nn.Module):
    """A training with a second loss: `weight` times the cross-entropy of what each cell shows.

    What reads the features is no part of the trainee, so it is not exported.

    Args:
        trainee: a training of a `unet` on batches that have classes.
        weight: of the second loss.
    """

    def __init__(self, trainee: nn.Module, weight: float) -> None:
        super().__init__()
        self.trainee, self.weight = trainee, weight
        self.features: dict[int, Tensor] = {}
        self.readouts = nn.ModuleDict()
        for number in BLOCKS:
            block = trainee.unet.up_blocks[number]
            width = block.resnets[-1].out_channels
            self.readouts[str(number)] = nn.Sequential(
                nn.GroupNorm(16, width),
                nn.Conv2d(width, WIDTH, 1),
                nn.SiLU(),
                nn.Conv2d(WIDTH, KINDS + 1 + len(COLOURS), 1),
            )
            block.register_forward_hook(partial(self._keep_features, number))

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        losses = self.trainee(batch, generator)
        seen = self.cross_entropy(batch.classes)
        return losses | {"loss": losses["loss"] + self.weight * seen, "seen": seen}

    def cross_entropy(self, classes: Classes) -> Tensor:
        """Of sticker and colour in each cell, the mean over the blocks that were read last."""
        total = 0.0
        for number, readout in self.readouts.items():
            answers = readout(self.features.pop(int(number))).float()
            stride = classes.shape[-1] // answers.shape[-1]
            truth = classes[:, stride // 2 :: stride, stride // 2 :: stride].to(answers.device)
            sticker = torch.where(truth > 0, 1 + (truth - 1) // len(COLOURS), 0)
            colour = torch.where(truth > 0, 1 + (truth - 1) % len(COLOURS), 0)
            total = total + functional.cross_entropy(answers[:, :KINDS], sticker)
            total = total + functional.cross_entropy(answers[:, KINDS:], colour)
        return total / len(self.readouts)

    def _keep_features(self, number: int, block: nn.Module, given: tuple, features: Tensor) -> None:
        self.features[number] = features
