"""The exercises of notebook 02b: nearest codes with gradients, and codes back to vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.autoencoder import look_up, nearest_codes, straight_through
from lrd_helpers.checks import Mistake, check_function, normal


def check_quantise(function: Callable[..., Any]) -> None:
    """Exercise 1, `quantise(latents, codebook)`: the nearest codes, gradients passed through.

    A case is called for its values, or for the gradient of a sum of its values with random weights
    with respect to the latents, or to the codebook.
    """

    def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
        return look_up(nearest_codes(latents, codebook), codebook)

    def best_by_product(latents: Tensor, codebook: Tensor) -> Tensor:
        return look_up(torch.einsum("bchw,kc->bkhw", latents, codebook).argmax(1), codebook)

    def looked_at(quantise: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(quantise)
        def look(latents: Tensor, codebook: Tensor, at: str) -> Any:
            if at == "values":
                return quantise(latents, codebook)
            latents, codebook = latents.requires_grad_(), codebook.requires_grad_()
            with torch.enable_grad():
                values = quantise(latents, codebook)
                # A stub is found with the first case, whose output is looked at as it is.
                loss = (values * normal(*values.shape, seed=9)).sum() + 0 * latents.sum()
            wanted = latents if at == "latents" else codebook
            [gradient] = torch.autograd.grad(loss, wanted, allow_unused=True)
            return torch.zeros_like(wanted) if gradient is None else gradient

        return look

    latents, codebook = normal(2, 3, 4, 4, seed=6), normal(5, 3, seed=7)
    check_function(
        looked_at(function),
        looked_at(lambda z, e: straight_through(z, nearest(z, e))),
        [(latents, codebook, at) for at in ("values", "latents", "codebook")],
        expected="at each position the nearest row of the codebook, with the gradient of the "
        "latents: z + (e − z).detach()",
        hint="the nearest row by torch.cdist and argmin; then a sum that is e, with z's gradient",
        mistakes=[
            Mistake(
                "the right values, but no gradient reaches the encoder",
                "argmin and indexing stop it; return latents + (quantised - latents).detach()",
                looked_at(lambda z, e: nearest(z, e).detach()),
            ),
            Mistake(
                "the right values, but the gradient goes to the codebook, none to the encoder",
                "detach the difference, not the latents: latents + (quantised - latents).detach()",
                looked_at(nearest),
            ),
            Mistake(
                "the right values, but the gradient goes to the latents and to the codebook",
                "the codebook has a loss of its own: detach the whole difference, "
                "(quantised - latents).detach()",
                looked_at(lambda z, e: nearest(z, e) + z - z.detach()),
            ),
            Mistake(
                "codes that are chosen by the largest product, not by the smallest distance",
                "a long code has a large product with everything; compare ‖z − e‖: nearest_codes",
                looked_at(lambda z, e: straight_through(z, best_by_product(z, e))),
            ),
        ],
    )


def check_vectors_of(function: Callable[..., Any]) -> None:
    """Exercise 2, `vectors_of(codes, codebook)`: the codebook's row at every position."""

    codes = torch.arange(18).reshape(2, 3, 3) % 5, torch.arange(16).reshape(1, 4, 4) % 7
    check_function(
        function,
        look_up,
        [(codes[0], normal(5, 3, seed=10)), (codes[1], normal(7, 4, seed=11))],
        expected="the channels of each code at its position, (batch, channels, rows, columns)",
        hint="codebook[codes] has the channels last; they have to move to place 1",
        mistakes=[
            Mistake(
                "numbers of neighbours in each other's channels: this is the mosaic's code",
                "reshape reads the numbers in their old order and cuts them anew; "
                "moving an axis is another thing: movedim or permute",
                lambda codes, codebook: codebook[codes].reshape(len(codes), -1, *codes.shape[1:]),
            ),
            Mistake(
                "rows and columns have changed places",
                "only the last axis moves; rows stay before columns",
                lambda codes, codebook: codebook[codes].transpose(1, 3),
            ),
            Mistake(
                "the rows have moved to the end, not the channels to the front",
                "movedim(from, to): the last axis, -1, goes to place 1",
                lambda codes, codebook: codebook[codes].movedim(1, -1),
            ),
        ],
    )
