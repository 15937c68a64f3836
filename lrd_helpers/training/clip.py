"""Trains storybook-clip: a small CLIPModel that scores how well a caption fits a picture.

The loss is CLIP's (Radford et al. 2021, Fig. 3), except that equal captions within a batch count as
equally right: the world is small, and "on sand" is true of every picture so captioned.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from lrd_helpers.storybook import IMAGE_SIZE, WORDS, Rendering, StorybookDataset
from lrd_helpers.training import export, loop
from lrd_helpers.training.options import ASSETS, TrainingOptions, command, parse
from lrd_helpers.training.sheets import save_sheet
from lrd_helpers.words import word_tokenizer


@dataclass(frozen=True)
class ClipOptions(TrainingOptions):
    """The options of this training."""

    minutes: float = 20.0
    batch_size: int = 128
    decay: float = 0.6
    weight_decay: float = 0.05
    ema_decay: float = 0.995
    run: Path = Path("runs/clip")
    output: Path = ASSETS / "storybook-clip"


class ClipTraining(nn.Module):
    """The model with its tokenizer and its loss."""

    def __init__(self, start_from: Path | None = None) -> None:
        super().__init__()
        if start_from is not None:
            self.tokenizer = CLIPTokenizer.from_pretrained(start_from)
            self.clip = CLIPModel.from_pretrained(start_from, dtype=torch.float32)
            return
        self.tokenizer = word_tokenizer(WORDS)
        tower = {"hidden_size": 160, "intermediate_size": 640, "num_attention_heads": 4}
        config = CLIPConfig(
            text_config={
                **tower,
                "num_hidden_layers": 3,
                "vocab_size": len(self.tokenizer),
                "max_position_embeddings": self.tokenizer.model_max_length,
                "bos_token_id": self.tokenizer.bos_token_id,
                "eos_token_id": self.tokenizer.eos_token_id,
                "pad_token_id": self.tokenizer.pad_token_id,
            },
            vision_config={
                **tower,
                "num_hidden_layers": 4,
                "image_size": IMAGE_SIZE,
                "patch_size": 16,
            },
            projection_dim=128,
        )
        # On CPUs the fused attention's backward pass is slower than the plain one's.
        config._attn_implementation = "eager"
        self.clip = CLIPModel(config)

    def similarities(self, images: Tensor, captions: list[str]) -> Tensor:
        """(images, captions): temperature × cosine, as `CLIPModel.forward` returns it."""
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.clip.device)
        return self.clip(
            **tokens, pixel_values=2 * images.to(self.clip.device) - 1
        ).logits_per_image

    def forward(self, batch: Rendering, generator: torch.Generator) -> dict[str, Tensor]:
        logits = self.similarities(batch.images, batch.captions).float()
        same = torch.tensor(
            [[row == column for column in batch.captions] for row in batch.captions],
            device=logits.device,
        ).float()
        target = same / same.sum(1, keepdim=True)
        loss = (
            functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        ) / 2
        top1 = (same.gather(1, logits.argmax(1, keepdim=True)) > 0).float().mean()
        return {"loss": loss, "top1": top1}


@torch.no_grad()
def evaluate(trainee: ClipTraining, batches: int = 16) -> dict[str, object]:
    """Top-1 accuracy of picking a picture's caption among 64 different ones, held-out scenes."""
    right = []
    for number in range(batches):
        rendering = StorybookDataset(160, seed=loop.HELD_OUT_SEED).batch(number)
        first = {caption: row for row, caption in reversed(list(enumerate(rendering.captions)))}
        captions, rows = list(first)[:64], list(first.values())[:64]
        logits = trainee.similarities(rendering.images[rows], captions)
        right.append(logits.argmax(1) == torch.arange(len(captions)))
    return {
        f"right caption among 64, top-1, {64 * batches:,} held-out scenes": round(
            float(torch.cat(right).float().mean()), 4
        )
    }


@torch.no_grad()
def sample_sheet(trainee: ClipTraining, path: Path) -> None:
    """32 held-out pictures against their captions: a trained model shows a bright diagonal."""
    rendering = StorybookDataset(32, seed=loop.HELD_OUT_SEED).batch(0)
    shares = trainee.similarities(rendering.images, rendering.captions).float().softmax(1).cpu()
    save_sheet(
        functional.interpolate(shares[None, None], scale_factor=8).expand(1, 3, -1, -1), path, 1
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse(ClipOptions, "clip", __doc__, arguments)
    torch.manual_seed(options.seed)
    trainee = ClipTraining(options.start_from)
    progress = loop.train(trainee, options, sample=lambda path: sample_sheet(trainee, path))
    scores = evaluate(trainee)
    with export.exported(
        options, progress, scores, title="storybook: CLIP", what=__doc__
    ) as folder:
        trainee.clip.half().save_pretrained(folder)
        export.read_in_single_precision(folder)
        trainee.tokenizer.save_pretrained(folder)
        CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size=IMAGE_SIZE,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(folder)


if __name__ == "__main__":
    command(main)
