"""Latents that are encoded once and kept in a file beside a run's checkpoints."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm


@torch.no_grad()
def encoded_once(
    file: Path,
    vae: AutoencoderKL,
    numbers: Sequence[int],
    encode: Callable[[int], dict[str, Tensor]],
    *,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """`encode(number)` for all numbers, each tensor joined along its first axis.

    Read from `file` if it is there and this very autoencoder made it; else computed and written.
    The file's name must tell everything else that the tensors depend on.
    """
    # In double precision, so that the sum is the same however it is split.
    fingerprint = sum(float(weight.double().abs().sum()) for weight in vae.parameters())
    stored = load_file(file) if file.exists() else {}
    if float(stored.pop("autoencoder", torch.zeros(()))) == fingerprint:
        return stored
    parts = [encode(number) for number in tqdm(numbers, desc="encoding scenes", disable=quiet)]
    joined = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    mark = torch.tensor(fingerprint, dtype=torch.float64)
    save_file({**joined, "autoencoder": mark}, partial)
    os.replace(partial, file)
    return joined
