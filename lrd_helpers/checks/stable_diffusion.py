"""The exercises of notebook 12: tokens of a word, a level for more cells, bytes that must fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.checks import Mistake, check_function

START, END = "<|startoftext|>", "<|endoftext|>"


def check_word_mask(function: Callable[..., Any]) -> None:
    """Exercise 1, `word_mask(pieces, number)`: which tokens are word number 0, 1, … of a text.

    A word's last piece ends in "</w>"; the marks at both ends belong to no word.
    """

    def counted(pieces: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each piece: the words that ended before it; is it a mark; does a word end here."""
        marks = torch.tensor([piece.startswith("<|") for piece in pieces])
        ends = torch.tensor([piece.endswith("</w>") for piece in pieces])
        return ends.cumsum(0) - ends.long(), marks, ends

    def word_mask(pieces: Sequence[str], number: int) -> Tensor:
        word, marks, _ = counted(pieces)
        return (word == number) & ~marks

    def first_piece(pieces: Sequence[str], number: int) -> Tensor:
        mask = word_mask(pieces, number)
        return mask & (mask.cumsum(0) == 1)

    def with_marks(pieces: Sequence[str], number: int) -> Tensor:
        return counted(pieces)[0] == number

    def last_piece(pieces: Sequence[str], number: int) -> Tensor:
        return word_mask(pieces, number) & counted(pieces)[2]

    def next_word(pieces: Sequence[str], number: int) -> Tensor:
        _, marks, ends = counted(pieces)
        return (ends.cumsum(0) == number) & ~marks

    def one_a_word(pieces: Sequence[str], number: int) -> Tensor:
        return torch.arange(len(pieces)) == number + 1

    text = [START, "an</w>", "ax", "ol", "otl</w>", "and</w>", "a</w>", "car</w>", END]
    check_function(
        function,
        word_mask,
        [
            (text, 4),
            (text, 1),
            ([START, "hum", "ming", "bird</w>", "on</w>", "snow</w>", END, END], 0),
            ([START, "a</w>", "star", "ship</w>", END, END, END], 1),
        ],
        expected="as many yes and no as there are pieces: yes where a piece belongs to that word",
        hint="a word may have several pieces, and only the last of them ends in '</w>'; count the "
        "words that ended before each piece",
        mistakes=[
            Mistake(
                "token number + 1, as if each word were one token",
                "every piece of a longer word before it moves a word to the right",
                one_a_word,
            ),
            Mistake(
                "the last piece alone",
                "all pieces of a word belong to it, also those without '</w>'",
                last_piece,
            ),
            Mistake(
                "the first piece alone",
                "a word goes on up to the piece that ends in '</w>'",
                first_piece,
            ),
            Mistake(
                "the marks belong to a word, too",
                "the start mark and the end marks begin with '<|': leave them out",
                with_marks,
            ),
            Mistake(
                "a word's last piece is counted to the next word",
                "count the words that ended *before* a piece, not at it",
                next_word,
            ),
        ],
        axes=("token",),
    )


def check_level_for_cells(function: Callable[..., Any]) -> None:
    """Exercise 2, `level_for_cells(bar, cells, more)`: ᾱ with the same ratio for more cells."""
    check_function(
        function,
        lambda bar, cells, more: bar * cells / (bar * cells + (1 - bar) * more),
        [(0.5, 64, 1024), (0.1, 16, 64), (0.0047, 256, 4096), (0.9, 100, 50)],
        expected="the ᾱ' with ᾱ'·more/(1 − ᾱ') = ᾱ·cells/(1 − ᾱ)",
        hint="call the right-hand side r and solve ᾱ'·more = r·(1 − ᾱ') for ᾱ'",
        mistakes=[
            Mistake(
                "the two numbers of cells the wrong way round",
                "more cells average more noise away, so a smaller ᾱ' will do",
                lambda bar, cells, more: bar * more / (bar * more + (1 - bar) * cells),
            ),
            Mistake(
                "the roots of the numbers of cells",
                "the ratio is of variances, and these go with the number of cells",
                lambda bar, cells, more: (
                    bar * cells**0.5 / (bar * cells**0.5 + (1 - bar) * more**0.5)
                ),
            ),
            Mistake(
                "ᾱ divided by how many times more cells there are",
                "the noise's share 1 − ᾱ changes as well: equate the ratios",
                lambda bar, cells, more: bar * cells / more,
            ),
            Mistake(
                "the odds ᾱ'/(1 − ᾱ'), not ᾱ' itself",
                "one more step: from odds o to ᾱ' = o/(1 + o)",
                lambda bar, cells, more: bar * cells / ((1 - bar) * more),
            ),
        ],
        tolerance=1e-6,
    )


def check_bytes_needed(function: Callable[..., Any]) -> None:
    """Exercise 3, `bytes_needed(weights, row, rows, decoding)`: what a GPU must hold at its worst.

    Weights stay; rows go through the U-Net at once; decoding comes afterwards.
    """

    def bytes_needed(weights: Mapping[str, float], row: float, rows: int, decoding: float) -> float:
        return sum(weights.values()) + max(rows * row, decoding)

    parts = {"unet": 1.6, "text_encoder": 0.23, "vae": 0.16}
    check_function(
        function,
        bytes_needed,
        [(parts, 0.06, 8, 0.4), (parts, 0.06, 2, 0.4), ({"unet": 4.8, "vae": 0.3}, 0.2, 4, 3.0)],
        expected="all weights, and the larger one of what the rows take and what decoding takes",
        hint="what lies there all the time? Which two things are never there at the same time?",
        mistakes=[
            Mistake(
                "the rows and the decoding at once",
                "the picture is decoded when the U-Net has done its work: the larger one counts",
                lambda weights, row, rows, decoding: sum(weights.values()) + rows * row + decoding,
            ),
            Mistake(
                "one row, however many there are",
                "rows go through the U-Net at once, and each takes its share",
                lambda weights, row, rows, decoding: sum(weights.values()) + max(row, decoding),
            ),
            Mistake(
                "the rows alone, without the decoding",
                "the decoder works on all pixels, and may take more than the U-Net",
                lambda weights, row, rows, decoding: sum(weights.values()) + rows * row,
            ),
            Mistake(
                "the largest part's weights alone",
                "that is so when parts are fetched in turn; here all of them stay on the GPU",
                lambda weights, row, rows, decoding: (
                    max(weights.values()) + max(rows * row, decoding)
                ),
            ),
            Mistake(
                "the weights once for each row",
                "all rows use the same weights",
                lambda weights, row, rows, decoding: (
                    rows * sum(weights.values()) + max(rows * row, decoding)
                ),
            ),
        ],
        tolerance=1e-6,
    )
