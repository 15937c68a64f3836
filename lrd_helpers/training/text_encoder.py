"""Trains the storybook's text encoder on captions alone, before the U-Net that reads it.

Stable Diffusion takes the text encoder of a CLIP that has read 400 million captions. Ours has a
few dozen words, and learns from them what a U-Net needs to be told at each: at "red" that this is
red, at "car" that this is a red car. Linear readouts of the state at each token must name the word,
the sticker, the colour and the place it stands for. The end mark and the padding say nothing, so
that a U-Net finds a caption's words only at the words, and its attention to them means something.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lrd_helpers.storybook import (
    COLOURS,
    PLACES,
    STICKERS,
    WORDS,
    sample_caption,
    sample_scene,
    seeded,
)
from lrd_helpers.training import export, loop
from lrd_helpers.training.options import TrainingOptions, command, parse
from lrd_helpers.words import word_tokenizer

RANDOM_WORDS = 0.25
"""The share of the captions that are words in any order: people type what no scene would say."""
SHARPNESS = 20.0
"""Times the cosine between a state and a readout's direction is a logit, as CLIP has it."""


@dataclass(frozen=True)
class TextEncoderOptions(TrainingOptions):
    """The options of this training."""

    minutes: float = 4.0
    batch_size: int = 128
    run: Path = Path("runs/text-encoder")
    output: Path = Path("runs/text-encoder/model")


def random_words(generator: torch.Generator) -> str:
    """One to twelve words of the storybook in any order."""
    length = int(torch.randint(1, 13, (), generator=generator))
    words = torch.randint(len(WORDS), (length,), generator=generator)
    return " ".join(WORDS[word] for word in words.tolist())


class TextEncoderTraining(nn.Module):
    """The encoder, and the readouts that are thrown away after training."""

    def __init__(self, start_from: Path | None = None) -> None:
        super().__init__()
        if start_from is not None:
            self.tokenizer = CLIPTokenizer.from_pretrained(start_from)
            self.text_encoder = CLIPTextModel.from_pretrained(start_from, dtype=torch.float32)
        else:
            self.tokenizer = word_tokenizer(WORDS)
            self.text_encoder = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(self.tokenizer),
                    hidden_size=128,
                    projection_dim=128,
                    intermediate_size=512,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    max_position_embeddings=self.tokenizer.model_max_length,
                    bos_token_id=self.tokenizer.bos_token_id,
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            )
        # Class 0 of the last three: none.
        classes = {
            "word": len(self.tokenizer),
            "sticker": 1 + len(STICKERS),
            "colour": 1 + len(COLOURS),
            "place": 1 + len(PLACES),
        }
        width = self.text_encoder.config.hidden_size
        self.readouts = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(kinds, width)) for name, kinds in classes.items()}
        )

    def truth(self, tokens: Int[Tensor, "batch tokens"]) -> dict[str, Int[Tensor, "batch tokens"]]:
        """What each token stands for: "car" after "red" for a red car, "sea" after "at" for it."""
        words = [self.tokenizer.convert_ids_to_tokens(row) for row in tokens.tolist()]
        words = [[word.removesuffix("</w>") for word in row] for row in words]
        colours, stickers, places = ([""] + list(names) for names in (COLOURS, STICKERS, PLACES))
        truth = {name: torch.zeros_like(tokens) for name in self.readouts}
        truth["word"] = tokens.clone()
        for row, spoken in enumerate(words):
            for column, word in enumerate(spoken):
                before = spoken[column - 1] if column else ""
                if word in colours:
                    truth["colour"][row, column] = colours.index(word)
                if word in stickers:
                    truth["sticker"][row, column] = stickers.index(word)
                    if before in colours:
                        truth["colour"][row, column] = colours.index(before)
                if f"{before} {word}" in places:
                    truth["place"][row, column] = places.index(f"{before} {word}")
        return truth

    def logits(
        self, states: Float[Tensor, "batch tokens channels"]
    ) -> dict[str, Float[Tensor, "batch tokens _classes"]]:
        """What the readouts make of the states."""
        return {
            name: SHARPNESS
            * functional.linear(functional.normalize(states, dim=-1), functional.normalize(each))
            for name, each in self.readouts.items()
        }

    def forward(self, captions: list[str], generator: torch.Generator) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        device = self.text_encoder.device
        logits = self.logits(self.text_encoder(tokens.to(device))[0].float())
        # The first end mark is a token like others; what follows it would outweigh the words.
        end = tokens == self.tokenizer.eos_token_id
        weights = torch.where(end & (end.cumsum(1) > 1), 0.1, 1.0).to(device)
        truth = {name: each.to(device) for name, each in self.truth(tokens).items()}
        losses = [
            functional.cross_entropy(logits[name].transpose(1, 2), truth[name], reduction="none")
            for name in truth
        ]
        right = [(logits[name].argmax(-1) == truth[name])[weights == 1] for name in truth]
        return {
            "loss": sum((weights * loss).sum() for loss in losses) / weights.sum(),
            "right": torch.stack(right).all(0).float().mean(),
        }


def captions_of_batch(number: int, reader: int, size: int, seed: int) -> list[str]:
    """Batch `number`: captions of scenes, and words in any order."""
    generator = seeded(seed, 3, number, reader)
    captions = []
    for draw in torch.rand(size, generator=generator).tolist():
        if draw < RANDOM_WORDS:
            captions.append(random_words(generator))
        else:
            scene = sample_scene(generator)
            captions.append(sample_caption(scene.stickers, scene.place, generator))
    return captions


@torch.no_grad()
def evaluate(trainee: TextEncoderTraining) -> dict[str, object]:
    """How often a token's four readouts are all right, on captions never trained on."""
    captions = captions_of_batch(0, 0, 1024, loop.HELD_OUT_SEED)
    return {
        "tokens read right in word, sticker, colour and place, 1,024 held-out captions": round(
            float(trainee(captions, seeded(0))["right"]), 4
        )
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(TextEncoderOptions, "text_encoder", __doc__, arguments)
    torch.manual_seed(options.seed)
    trainee = TextEncoderTraining(options.start_from)

    def batches(start: int, reader: int, readers: int) -> Iterator[list[str]]:
        for number in count(start):
            yield captions_of_batch(number, reader, options.batch_size, options.seed)

    progress = loop.train(trainee, options, batches=batches)
    scores = evaluate(trainee)
    with export.exported(
        options, progress, scores, title="storybook: the text encoder", what=__doc__
    ) as folder:
        trainee.text_encoder.save_pretrained(folder)
        trainee.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    command(main)
