"""The exercises of notebook 11: layers laid over, slots that attend, given slots, an order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrd_helpers.checks import Mistake, check_function, normal
from lrd_helpers.ddpm import NoiseSchedule

BARS = NoiseSchedule.scaled_linear().alphas_cumprod


def check_flattened(function: Callable[..., Any]) -> None:
    """Exercise 1, `flattened(background, layers)`: x ← α·c + (1 − α)·x, back to front."""

    def laid(by: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        """All layers, back to front, by a rule for colours, alpha and what is below."""

        def flattened(background: Tensor, layers: Tensor) -> Tensor:
            picture = background
            for layer in layers:
                picture = by(layer[:3], layer[3:], picture)
            return picture

        return flattened

    def disjoint(background: Tensor, layers: Tensor) -> Tensor:
        colours, alphas = layers[:, :3], layers[:, 3:]
        return (alphas * colours).sum(0) + (1 - alphas.sum(0)) * background

    def case(seed: int, count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        background = normal(3, height, width, seed=seed).sigmoid()
        return background, normal(count, 4, height, width, seed=seed + 1).mul(2).sigmoid()

    right = laid(lambda colours, alpha, below: alpha * colours + (1 - alpha) * below)
    check_function(
        function,
        right,
        [case(0, 2, 4, 6), case(10, 3, 5, 3), case(20, 4, 2, 2)],
        expected="x of shape (3, height, width): the background at first; then for each layer, "
        "back to front, α·c + (1 − α)·x",
        hint="for layer in layers: colours, alpha = layer[:3], layer[3:], and one line that lays "
        "them over what you have",
        mistakes=[
            Mistake(
                "the layers are laid on front to back",
                "the first layer is the furthest back: begin with it",
                lambda background, layers: right(background, layers.flip(0)),
            ),
            Mistake(
                "colours are taken for premultiplied: α is missing before c",
                "these colours are straight: each layer brings α·c",
                laid(lambda colours, alpha, below: colours + (1 - alpha) * below),
            ),
            Mistake(
                "what is below shines through in full: 1 − α is missing",
                "a layer lets through 1 − α of what is below it",
                laid(lambda colours, alpha, below: alpha * colours + below),
            ),
            Mistake(
                "Σ α·c + (1 − Σ α)·background, as if no two layers overlapped",
                "that is right for disjoint masks; here a layer covers the layers below it as well",
                disjoint,
            ),
            Mistake(
                "only the layer in front is laid over the background",
                "x is what you have so far, not the background each time",
                lambda background, layers: right(background, layers[-1:]),
            ),
        ],
    )


def check_slots_attend(function: Callable[..., Any]) -> None:
    """Exercise 2, `slots_attend(x, to_q, to_k, to_v)`: attention over the slots at each position.

    x is (slots, channels, height, width).
    """

    def attend(tokens: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, **changes: Any) -> Tensor:
        """softmax(q·kᵀ/√d)·v over the last axis but one, that of the tokens."""
        q, k, v = (tokens @ matrix.T for matrix in (to_q, to_k, to_v))
        scores = q @ k.mT * changes.get("scale", len(to_q) ** -0.5)
        return scores.softmax(changes.get("axis", -1)) @ v

    def right(x: Tensor, *matrices: Tensor, **changes: Any) -> Tensor:
        return attend(x.permute(2, 3, 0, 1), *matrices, **changes).permute(2, 3, 0, 1)

    def within(x: Tensor, *matrices: Tensor) -> Tensor:
        """Attention over the positions of each slot, as the plain U-Net has it."""
        tokens = x.flatten(2).mT
        return attend(tokens, *matrices).mT.reshape(len(x), -1, *x.shape[2:])

    def everywhere(x: Tensor, *matrices: Tensor) -> Tensor:
        tokens = x.movedim(1, -1)
        return attend(tokens.flatten(0, 2), *matrices).reshape(*tokens.shape[:3], -1).movedim(-1, 1)

    def case(seed: int, slots: int, channels: int, height: int, width: int) -> tuple[Tensor, ...]:
        x = normal(slots, channels, height, width, seed=seed)
        return x, *(normal(channels, channels, seed=seed + n) for n in (1, 2, 3))

    check_function(
        function,
        right,
        [case(0, 2, 4, 3, 5), case(10, 4, 3, 2, 2), case(20, 3, 8, 1, 4)],
        expected="at each position softmax(q·kᵀ/√d)·v with the slots as tokens, of x's shape",
        hint="bring the slots beside the channels, x.permute(2, 3, 0, 1); then it is ordinary "
        "attention, and .permute(2, 3, 0, 1) leads back",
        mistakes=[
            Mistake(
                "attention over the positions of each slot",
                "that is the plain U-Net's own; here the slots are the tokens, and no position "
                "looks at another one",
                within,
            ),
            Mistake(
                "attention over all positions of all slots",
                "that is what the coarser levels do; here each position is a batch of its own",
                everywhere,
            ),
            Mistake(
                "the scores are not divided by √d",
                "softmax(q·kᵀ/√d), with d = len(to_q)",
                lambda *case: right(*case, scale=1.0),
            ),
            Mistake(
                "the softmax runs over the queries",
                "each query's weights over all keys should sum to 1: softmax over the last axis",
                lambda *case: right(*case, axis=-2),
            ),
        ],
    )


def check_step_with_given(function: Callable[..., Any]) -> None:
    """Exercise 3, `step_with_given(ask, x, clean, given, t, bar, bar_to)`: one step, DDIM's.

    Given slots are shown clean, told time 0, and stay what they are.
    """

    def ask(slots: Tensor, times: Tensor) -> Tensor:
        """A U-Net in which all slots hear each other, and the time decides what they say."""
        heard = slots * (1 + times[:, None, None, None] / 1000)
        return torch.tanh(heard + heard.mean(0))

    def version(
        *,
        shown: bool = True,
        told: Callable[[Tensor, Tensor], Tensor] = lambda given, t: torch.where(given, 0, t),
        kept: bool = True,
    ) -> Callable[..., Tensor]:
        def step_with_given(
            ask: Any,
            x: Tensor,
            clean: Tensor,
            given: Tensor,
            t: Tensor,
            bar: Tensor,
            bar_to: Tensor,
        ) -> Tensor:
            where = given[:, None, None, None]
            noise = ask(torch.where(where, clean, x) if shown else x, told(given, t))
            x0 = (x - (1 - bar).sqrt() * noise) / bar.sqrt()
            x = bar_to.sqrt() * x0 + (1 - bar_to).sqrt() * noise
            return torch.where(where, clean, x) if kept else x

        return step_with_given

    def case(seed: int, given: list[bool], t: int, t_to: int) -> tuple[Any, ...]:
        x, clean = (normal(len(given), 4, 3, 2, seed=seed + n) for n in (0, 1))
        return ask, x, clean, torch.tensor(given), torch.tensor(t), BARS[t], BARS[t_to]

    check_function(
        function,
        version(),
        [
            case(0, [False, False, False, True], 601, 534),
            case(10, [True, False, True], 201, 134),
            case(20, [True, True, False, True, False], 934, 867),
        ],
        expected="the slots at level bar_to; given ones are shown as `clean`, told time 0, and are "
        "`clean` afterwards",
        hint="three things of a given slot should be clean: what is shown, the time that is told, "
        "and what comes out",
        mistakes=[
            Mistake(
                "given slots are told the time t of the noisy ones",
                "they are clean, so their time is 0: torch.where(given, 0, t)",
                version(told=lambda given, t: t.expand(len(given))),
            ),
            Mistake(
                "given slots are told t, and the noisy ones 0",
                "the other way round: torch.where(given, 0, t)",
                version(told=lambda given, t: torch.where(given, t, 0)),
            ),
            Mistake(
                "all slots are told time 0",
                "only the given ones are clean: torch.where(given, 0, t)",
                version(told=lambda given, t: torch.zeros(len(given), dtype=torch.long)),
            ),
            Mistake(
                "given slots are shown as what x has there, not as `clean`",
                "show torch.where(given[:, None, None, None], clean, x)",
                version(shown=False),
            ),
            Mistake(
                "given slots are not clean after the step",
                "DDIM has moved them as well: put `clean` back at the end",
                version(kept=False),
            ),
        ],
    )


def check_front_share(function: Callable[..., Any]) -> None:
    """Exercise 4, `front_share(composite, back, front)`: how much of an overlap shows the front."""

    def share(
        where: Callable[[Tensor, Tensor], Tensor], turned: bool = False
    ) -> Callable[..., float]:
        def front_share(composite: Tensor, back: Tensor, front: Tensor) -> float:
            to_front, to_back = ((composite - each[:3]).abs().sum(0) for each in (front, back))
            nearer = to_front > to_back if turned else to_front < to_back
            return float(nearer[where(back[3] > 0.5, front[3] > 0.5)].float().mean())

        return front_share

    def case(seed: int, shares: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Four bands: the back alone, both, the front alone, none; shares that show the front."""
        back, front = (normal(4, 11, 10, seed=seed + n).sigmoid() for n in (0, 1))
        back[3], front[3] = 0.0, 0.0
        back[3, :7], front[3, 2:9] = 0.9, 0.9
        rows = torch.cat([torch.full((n,), x) for n, x in zip((2, 5, 2, 2), shares, strict=True)])
        seen = torch.arange(10) < (10 * rows[:, None]).round()
        return torch.where(seen, front[:3], back[:3]), back, front

    check_function(
        function,
        share(torch.logical_and),
        [case(seed, (0.2, 0.1 * seed, 0.9, 0.3)) for seed in (8, 1, 10)],
        expected="a number from 0 to 1: of the pixels in which both alphas are above 0.5, the "
        "share whose colour is nearer to the front layer's than to the back's",
        hint="both = (back[3] > 0.5) & (front[3] > 0.5); distances are "
        "(composite - layer[:3]).abs().sum(0); then a mean of yes and no over [both]",
        mistakes=[
            Mistake(
                "all pixels of the canvas are counted",
                "order shows only where the two overlap: [both]",
                share(lambda back, front: torch.ones_like(back)),
            ),
            Mistake(
                "all pixels of the front layer are counted",
                "where the back layer is not, nothing says who is in front: both alphas count",
                share(lambda back, front: front),
            ),
            Mistake(
                "pixels of either layer are counted",
                "where only one of them is, nothing says who is in front: & in place of |",
                share(torch.logical_or),
            ),
            Mistake(
                "the share that shows the back layer",
                "nearer means a smaller distance: to the front < to the back",
                share(torch.logical_and, turned=True),
            ),
        ],
        tolerance=1e-3,
    )
