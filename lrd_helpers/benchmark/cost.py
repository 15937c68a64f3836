"""What a picture costs: U-Net calls, backward passes, seconds, memory."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from lrd_helpers.pipeline import LayeredRenderingPipeline


@dataclass
class Cost:
    """What a picture took; the attributes are those of `Row`."""

    unet_calls: int = 0
    backward_passes: int = 0
    seconds: float = 0.0
    memory: float = math.nan


@contextlib.contextmanager
def measured(pipe: LayeredRenderingPipeline, pictures: int) -> Iterator[list[Cost]]:
    """Counts and times what the pipeline does for so many pictures.

    Seconds and memory are those of all pictures together, divided by their number.
    """
    costs = [Cost() for _ in range(pictures)]

    def count(_: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        x = arguments[0] if arguments else named["sample"]
        for picture in pipe.pictures_of_rows or [0] * len(x):
            costs[picture].unet_calls += 1
        if x.requires_grad:  # the gradient reaches the noisy picture once per backward pass
            x.register_hook(count_backward)

    def count_backward(_: torch.Tensor) -> None:
        for cost in costs:
            cost.backward_passes += 1

    hook = pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    peak, began = peak_memory(), time.perf_counter()
    try:
        yield costs
    finally:
        hook.remove()
    seconds, memory = time.perf_counter() - began, peak()
    for cost in costs:
        cost.seconds, cost.memory = seconds / pictures, memory / pictures


def peak_memory() -> Callable[[], float]:
    """A function that says by how many MB memory has grown since now, at most."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(name: str) -> float:
        [size] = re.findall(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())
        return int(size) / 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the process's peak starts anew
        resident = status("VmRSS")
    except OSError:  # not Linux
        return lambda: math.nan
    return lambda: max(0.0, status("VmHWM") - resident)
