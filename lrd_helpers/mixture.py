"""A mixture of Gaussians in the plane: all of diffusion in closed form, nothing to train.

Noise turns a mixture into another mixture. So at every noise level the density, the score, the
network's ideal answer and the velocity of flow matching are sums over the components.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lrd_helpers.ddpm import Model, NoiseSchedule

Level = float | Float[Tensor, ""] | Float[Tensor, "batch"]
"""One number for all points, or one a point."""

Points = Float[Tensor, "*batch 2"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """p(x) = Σ_k w_k N(x; μ_k, σ_k² I), each component of a class.

    Attributes:
        means: μ_k. Of a noised mixture they may differ from point to point.
        variances: σ_k².
        weights: w_k > 0; only their ratios count.
        classes: the name of each component's class; components may share one.

    Raises:
        ValueError: a weight that is not above 0, or another number of classes than of weights.
    """

    means: Float[Tensor, "*batch components 2"]
    variances: Float[Tensor, "*batch components"]
    weights: Float[Tensor, "components"]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not (self.weights > 0).all():
            raise ValueError(f"every weight must be above 0, not {self.weights.tolist()}")
        if len(self.classes) != len(self.weights):
            raise ValueError(f"{len(self.weights)} components, but {len(self.classes)} classes")

    def given(self, name: str) -> Mixture:
        """p(x | class): only the components of one class.

        Raises:
            ValueError: there is no such class.
        """
        if name not in self.classes:
            raise ValueError(f"{name!r} is no class; there are {sorted(set(self.classes))}")
        keep = [k for k, other in enumerate(self.classes) if other == name]
        return Mixture(
            self.means[..., keep, :],
            self.variances[..., keep],
            self.weights[keep],
            (name,) * len(keep),
        )

    def sample(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "count 2"], Int[Tensor, "count"]]:
        """Points of the mixture, and the number of the component that each comes from."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        return self.means[k] + self.variances[k, None].sqrt() * noise, k

    def noised(self, signal: Level, spread: Level) -> Mixture:
        """The law of signal·x_0 + spread·ε: components N(signal·μ_k, (signal²σ_k² + spread²) I).

        DDPM's Eq. 4 has signal √ᾱ_t and spread √(1 − ᾱ_t); flow matching has 1 − t and t.
        """
        a, s = (torch.as_tensor(value)[..., None] for value in (signal, spread))
        return replace(
            self, means=a[..., None] * self.means, variances=a**2 * self.variances + s**2
        )

    def log_density(self, x: Points) -> Float[Tensor, "*batch"]:
        """log p(x) = log Σ_k w_k N(x; μ_k, σ_k² I)."""
        return self._joint(x).logsumexp(-1)

    def score(self, x: Points) -> Points:
        """∇ log p(x) = Σ_k p(k | x) (μ_k − x)/σ_k²: where the density rises fastest, and how."""
        return self._mean(x, (self.means - x[..., None, :]) / self.variances[..., None])

    def eps(self, x: Points, alphas_cumprod: Level) -> Points:
        """E[ε | x_t = x] = −√(1 − ᾱ_t)·∇ log p_t(x): the answer of a perfect network (DDPM)."""
        bar = torch.as_tensor(alphas_cumprod)
        spread = (1 - bar).sqrt()
        return -spread[..., None] * self.noised(bar.sqrt(), spread).score(x)

    def velocity(self, x: Points, t: Level) -> Points:
        """E[ε − x_0 | x_t = x], where x_t = (1 − t)·x_0 + t·ε (flow matching, Lipman et al. 2023).

        u = Σ_k p(k | x) [(t − (1 − t)σ_k²)/v_k·(x − (1 − t)μ_k) − μ_k],  v_k = (1 − t)²σ_k² + t²
        """
        t = torch.as_tensor(t)
        now = self.noised(1 - t, t)
        pull = (t[..., None] - (1 - t[..., None]) * self.variances) / now.variances
        return now._mean(x, pull[..., None] * (x[..., None, :] - now.means) - self.means)

    def model(self, schedule: NoiseSchedule) -> Model:
        """`eps` in a network's place: for `ddpm.ddpm_sample`, `ddim_sample`, `training_loss`."""
        return lambda x, t: self.eps(x, schedule.alphas_cumprod[t])

    def _joint(self, x: Points) -> Float[Tensor, "*batch components"]:
        """log (w_k N(x; μ_k, σ_k² I))."""
        squares = (x[..., None, :] - self.means).square().sum(-1)
        normal = -squares / (2 * self.variances) - torch.log(2 * torch.pi * self.variances)
        return functional.log_softmax(self.weights.log(), -1) + normal

    def _mean(self, x: Points, values: Float[Tensor, "*batch components 2"]) -> Points:
        """Σ_k p(k | x)·values_k (Bayes' rule)."""
        return (self._joint(x).softmax(-1)[..., None] * values).sum(-2)


THREE = Mixture(
    torch.tensor([[-1.3, -0.5], [0.2, 1.3], [1.2, -0.6]]),
    torch.tensor([0.30, 0.25, 0.35]) ** 2,
    torch.tensor([0.35, 0.30, 0.35]),
    ("cat", "star", "star"),
)
"""The course's example: a cat on the left, two stars, together with about the variance 1."""
