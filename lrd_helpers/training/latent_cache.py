"""Latents that are encoded once and kept with a run's checkpoints, and batches drawn from them."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from lrd_helpers.files import write_atomically
from lrd_helpers.training.options import CacheOptions

CACHE_BATCH = 64

Latents = Float[Tensor, "batch 4 height width"]
Classes = Int[Tensor, "batch height width"]


class Batch(NamedTuple):
    """What a U-Net learns from in one step."""

    latents: Latents  # scaled
    captions: list[str]
    classes: Classes | None = None  # what each cell shows, see `seeing.cell_classes`
    flawed: Latents | None = None  # the scenes with a mistake each, see `ghosts.flawed_scene`


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Float[Tensor, "batch 3 _height _width"]) -> Latents:
    """The latents of images in [0, 1]: the mean of the posterior, times the scaling factor."""
    posterior = vae.encode(2 * images.to(vae.device) - 1).latent_dist
    return (posterior.mean * vae.config.scaling_factor).cpu()


class SceneCache:
    """Tensors of the first scenes of a stream, computed once, and the batches drawn from them.

    A subclass says what is computed (`tensors`) and how a batch is drawn (`batch`).

    Args:
        name: of the file. It must tell everything that the tensors depend on, but the autoencoder.
        reader: this process's number, of `readers` that share the scenes.
        rounds: how many batches of the stream each process keeps; as `options.cache` says.
    """

    def __init__(
        self,
        name: str,
        vae: AutoencoderKL,
        options: CacheOptions,
        reader: int,
        readers: int,
        rounds: int | None = None,
    ) -> None:
        self.vae, self.options, self.reader = vae, options, reader
        if rounds is None:
            rounds = max(1, options.cache // CACHE_BATCH // readers)
        self.numbers = range(reader, rounds * readers, readers)
        file = options.run / f"{name}-{reader}-of-{readers}.safetensors"
        self.kept = encoded_once(file, vae, self.numbers, self.tensors, quiet=reader > 0)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """What is kept of the scenes of batch `number` of the stream."""
        raise NotImplementedError

    def batch(self, number: int) -> Any:
        """Batch `number`; it depends on (seed, number, reader) alone."""
        raise NotImplementedError

    def batches(self, start: int) -> Iterator[Any]:
        """All batches from number `start` on."""
        return map(self.batch, itertools.count(start))

    def half_precision(self) -> torch.autocast:
        """Inside, the autoencoder runs in bf16, if the training does."""
        half = self.options.mixed_precision == "bf16"
        return torch.autocast(self.vae.device.type, torch.bfloat16, enabled=half)


@torch.no_grad()
def encoded_once(
    file: Path,
    model: nn.Module,
    numbers: Sequence[int],
    encode: Callable[[int], dict[str, Tensor]],
    *,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """`encode(number)` for all numbers, each tensor joined along its first axis.

    Read from `file` if it is there and this very model made it; else computed and written.
    """
    # In double precision, so that the sum is the same however it is split.
    fingerprint = sum(float(weight.double().abs().sum()) for weight in model.parameters())
    stored = load_file(file) if file.exists() else {}
    if float(stored.pop("autoencoder", torch.zeros(()))) == fingerprint:
        return stored
    parts = [encode(number) for number in tqdm(numbers, desc="encoding scenes", disable=quiet)]
    joined = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    file.parent.mkdir(parents=True, exist_ok=True)
    mark = torch.tensor(fingerprint, dtype=torch.float64)
    write_atomically(file, save({**joined, "autoencoder": mark}))
    return joined
