"""What one drawing leaves for the next: answers of the model to what is asked again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from lrd_helpers.sampling.model import Model

PROBE_CELLS = 8
"""The side, in latent cells, of what a model is asked to see whether it is still the same."""

Rows = Float[Tensor, "rows ..."]


class Memory:
    """Answers of the models of one pipeline, a row each, from one drawing to the next.

    An answer is looked up by the numbers that it was computed from: the latents of its row, the
    timestep, the embedding of its text, and whatever else the model was given. So it is never that
    of another prompt, seed, field or guidance scale. Weights, LoRAs and attention processors can
    change too: `begin` asks the models a small question, and forgets everything where the answer
    is another. Texts are encoded anew in each drawing.

    What is left of a batch is asked in a smaller batch, so numbers differ by rounding.

    Args:
        most: bytes that are kept; what was used longest ago goes first.

    Attributes:
        size: bytes that are kept now.
        watched: prompts whose rows are always asked, since `capture_attention` looks at them.
    """

    def __init__(self, most: int = 2**26) -> None:
        self.most, self.size = most, 0
        self.watched: frozenset[str] = frozenset()
        self._kept: dict[bytes, Tensor] = {}  # the one used longest ago is first
        self._probes: list[Tensor] | None = None

    def begin(self, model: Model, watched: Sequence[str] = ()) -> None:
        """Forget everything if the models are not those of before; `watched`: see `Memory`."""
        self.watched = frozenset(watched)
        height, width = (min(side, PROBE_CELLS) for side in model.like.shape[-2:])
        shape = 1, model.like.shape[1], height, width
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.like)
        t = torch.ones((), device=x.device)
        probes = [model(x, t, [""], [0], [False], watched=False), model.decode(x)]
        before, self._probes = self._probes, probes
        if before is None or not all(map(torch.equal, before, probes)):
            self._kept.clear()
            self.size = 0

    def answers(self, keys: Sequence[bytes | None], ask: Callable[[list[int]], Rows]) -> Rows:
        """The answer of each row: a kept one, or a new one, which is kept.

        Args:
            keys: of each row the digest of all that its answer depends on; None: always new.
            ask: numbers of rows → their answers.
        """
        names = [key or number for number, key in enumerate(keys)]
        new: dict[bytes | int, int] = {}  # equal rows are asked once
        for number, name in enumerate(names):
            if name not in self._kept:
                new.setdefault(name, number)
        answered = dict(zip(new, ask([*new.values()]), strict=True)) if new else {}
        rows = [answered[name] if name in answered else self._kept[name] for name in names]
        for key, row in zip(keys, rows, strict=True):
            if key is not None:
                self._forget(key)
                self._kept[key] = row.clone()  # not a part of its batch, which would stay with it
                self.size += row.nbytes
        while self.size > self.most:
            self._forget(next(iter(self._kept)))
        return torch.stack(rows)

    def _forget(self, key: bytes) -> None:
        if key in self._kept:
            self.size -= self._kept.pop(key).nbytes


def digest(*parts: Any) -> bytes:
    """A short name for values; equal for equal ones, and for no others.

    Args:
        parts: tensors, mappings and sequences of them, and what its repr says all of.
    """
    made = hashlib.blake2b(digest_size=20)
    for part in parts:
        if isinstance(part, Tensor):
            raw = part.detach().cpu().contiguous()
            made.update(repr((part.dtype, tuple(part.shape))).encode())
            made.update(raw.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, dict):
            made.update(digest(*part.keys(), *part.values()))
        elif isinstance(part, (list, tuple)):
            made.update(b"list" + digest(*part))
        else:
            made.update(repr(part).encode() + b"\0")
    return made.digest()
