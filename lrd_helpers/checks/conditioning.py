"""The exercises of notebook 04: cross-attention, and cross-attention in several heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lrd_helpers.checks import Mistake, check_function, normal


def check_cross_attention(function: Callable[..., Any]) -> None:
    """Exercise 1, `cross_attention(x, c, to_q, to_k, to_v)`: softmax(QKᵀ/√d)·V (LDM, section 3.3).

    Q comes from the picture's positions x, K and V from the condition's tokens c.
    """

    def attention(shares: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda x, c, to_q, to_k, to_v: shares(x @ to_q.T, c @ to_k.T) @ (c @ to_v.T)

    right = attention(lambda q, k: (q @ k.T / q.shape[1] ** 0.5).softmax(1))

    def case(positions: int, tokens: int, width: int, condition: int, d: int, seed: int):
        return (
            normal(positions, width, seed=seed),
            normal(tokens, condition, seed=seed + 1),
            normal(d, width, seed=seed + 2),
            normal(d, condition, seed=seed + 3),
            normal(d, condition, seed=seed + 4),
        )

    check_function(
        function,
        right,
        [case(3, 2, 5, 4, 7, 0), case(6, 4, 3, 8, 5, 10), case(2, 9, 6, 3, 4, 20)],
        axes=("place", "feature"),
        expected="softmax(QKᵀ/√d)·V, a row a position of x, with Q from x and K, V from c",
        hint="three lines: q, k, v by @ with the matrices' .T (q from x, k and v from c); the "
        "softmax of q @ k.T / d**0.5 along its last axis; times v",
        mistakes=[
            Mistake(
                "QKᵀ is not scaled",
                "a sum over d numbers grows with √d: divide by it before the softmax",
                attention(lambda q, k: (q @ k.T).softmax(1)),
            ),
            Mistake(
                "QKᵀ is divided by d: the square root is missing",
                "it is /√d: the spread, not the variance, of a sum over d numbers",
                attention(lambda q, k: (q @ k.T / q.shape[1]).softmax(1)),
            ),
            Mistake(
                "the softmax runs over the positions of the picture",
                "each position shares 1 among the tokens: the softmax is along the last axis",
                attention(lambda q, k: (q @ k.T / q.shape[1] ** 0.5).softmax(0)),
            ),
            Mistake(
                "there is no softmax",
                "QKᵀ/√d says how well they fit; the softmax makes shares of it that sum to 1",
                attention(lambda q, k: q @ k.T / q.shape[1] ** 0.5),
            ),
            Mistake(
                "the keys are handed out in place of the values",
                "V = c·W_Vᵀ: what a token is found by and what it says are two things",
                lambda x, c, to_q, to_k, to_v: right(x, c, to_q, to_k, to_k),
            ),
        ],
    )


def check_many_heads(function: Callable[..., Any]) -> None:
    """Exercise 2, `many_heads(q, k, v, heads)`: softmax(QKᵀ/√d_head)·V in each head, then joined.

    Head h has the features h·d_head to (h + 1)·d_head − 1 of every position (Vaswani et al. 2017).
    """

    def split(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(0, 1)

    def split_by_rows(x: Tensor, heads: int) -> Tensor:
        return x.reshape(heads, len(x), -1)

    def attention(
        cut: Callable[[Tensor, int], Tensor] = split,
        width: Callable[[Tensor, int], int] = lambda q, heads: q.shape[1] // heads,
        axis: int = -1,
        joined: Callable[[Tensor], Tensor] = lambda answers: answers.transpose(0, 1).flatten(1),
    ) -> Callable[..., Tensor]:
        def many_heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            q_h, k_h, v_h = (cut(x, heads) for x in (q, k, v))
            fits = q_h @ k_h.transpose(1, 2) / width(q, heads) ** 0.5
            return joined(fits.softmax(axis) @ v_h)

        return many_heads

    def case(positions: int, tokens: int, d: int, heads: int, seed: int) -> tuple[Any, ...]:
        q, k, v = (normal(n, d, seed=seed + i) for i, n in enumerate((positions, tokens, tokens)))
        return 2 * q, k, v, heads

    check_function(
        function,
        attention(),
        [case(4, 3, 6, 2, 0), case(5, 7, 12, 3, 10), case(3, 2, 4, 1, 20), case(2, 5, 8, 4, 30)],
        axes=("place", "feature"),
        expected="in head h softmax(QKᵀ/√d_head)·V with the features h·d_head … (h + 1)·d_head − 1 "
        "of every row; the heads' answers side by side: (places, d)",
        hint="try x = torch.arange(8.0).view(2, 4), two tokens of four features, with two heads: "
        "head 0 must get [[0, 1], [4, 5]]",
        mistakes=[
            Mistake(
                "with one head it is right; with several, a head gets some *tokens* whole",
                "reshape keeps the order of the numbers in memory: cut each row first, "
                "unflatten(-1, (heads, -1)), then let tokens and heads change places",
                attention(split_by_rows),
            ),
            Mistake(
                "the heads are cut right, but their answers are not put side by side again",
                "the answers are (heads, places, d_head): let heads and places change places "
                "before the last two axes become one",
                attention(joined=lambda x: x.reshape(x.shape[1], -1)),
            ),
            Mistake(
                "QKᵀ is divided by √d of all heads together: the shares are too even",
                "a sum over d_head numbers grows with √d_head, the width of *one* head",
                attention(width=lambda q, heads: q.shape[1]),
            ),
            Mistake(
                "the softmax runs over the places of the picture",
                "each place shares 1 among the tokens: the softmax is along the last axis",
                attention(axis=-2),
            ),
            Mistake(
                "head h gets every heads-th feature in place of a block of neighbours",
                "to_q was trained with blocks: unflatten(-1, (heads, -1)), heads first",
                attention(lambda x, heads: x.unflatten(-1, (-1, heads)).permute(2, 0, 1)),
            ),
        ],
    )
