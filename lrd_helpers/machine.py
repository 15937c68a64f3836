"""The machine a number was measured on."""

from __future__ import annotations

import os
import platform

import torch


def describe_machine() -> str:
    """The GPU's name, or how many cores of which processor, with torch's version."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
