"""What a network predicts: ε, x_0, v and the flow follow from one another at (α, σ)."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

Kind = Literal["epsilon", "x0", "v", "flow"]
"""The noise ε, the clean x_0, v = α ε − σ x_0, or the flow u = ε − x_0."""

Coefficient = float | Tensor
"""A number, or a tensor that multiplies the data."""


def convert(
    prediction: Float[Tensor, "*shape"],
    x_t: Float[Tensor, "*shape"],
    alpha: Coefficient,
    sigma: Coefficient,
    *,
    given: Kind,
    wanted: Kind,
) -> Float[Tensor, "*shape"]:
    """The same prediction in other words, at x_t = α x_0 + σ ε.

    ε → x_0 is DDPM, Eq. 9 and 15; v is Salimans & Ho 2022, appendix D, and takes α² + σ² = 1; the
    flow is that of flow matching (Lipman et al. 2023), usually with α = 1 − σ. ε → x_0 divides by
    α: where almost no signal is left, a small error in ε is a large one in x_0.

    Raises:
        ValueError: a kind that is not "epsilon", "x0", "v" or "flow".
    """
    x, a, s = x_t, alpha, sigma
    formulas = {
        ("epsilon", "x0"): lambda: (x - s * prediction) / a,
        ("epsilon", "v"): lambda: (prediction - s * x) / a,
        ("x0", "epsilon"): lambda: (x - a * prediction) / s,
        ("x0", "v"): lambda: (a * x - prediction) / s,
        ("v", "x0"): lambda: a * x - s * prediction,
        ("v", "epsilon"): lambda: s * x + a * prediction,
        ("flow", "x0"): lambda: (x - s * prediction) / (a + s),
        ("flow", "epsilon"): lambda: (x + a * prediction) / (a + s),
        ("x0", "flow"): lambda: (x - (a + s) * prediction) / s,
        ("epsilon", "flow"): lambda: ((a + s) * prediction - x) / a,
        ("v", "flow"): lambda: (a + s) * prediction + (s - a) * x,
        ("flow", "v"): lambda: (prediction - (s - a) * x) / (a + s),
    } | {(kind, kind): lambda: prediction for kind in ("epsilon", "x0", "v", "flow")}
    if (given, wanted) not in formulas:
        raise ValueError(f"{given!r} to {wanted!r}: the kinds are 'epsilon', 'x0', 'v' and 'flow'")
    return formulas[given, wanted]()


def shift_of_input(kind: Kind, alpha: float, sigma: float) -> float:
    """The c of s + c ξ with which an answer to x_t + ξ means the same noise ε̂ at x_t.

    LRDiff's Algorithm 1 is written for ε̂. From v = (ε − σ x) / α, x_0 = (x − σ ε) / α and
    u = ((α + σ) ε − x) / α: seen from x instead of x + ξ it is v + (σ/α) ξ, x_0 − ξ/α or u + ξ/α.
    """
    return {"epsilon": 0.0, "v": sigma / alpha, "x0": -1 / alpha, "flow": 1 / alpha}[kind]
