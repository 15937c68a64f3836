"""Layered Rendering Diffusion: draw boxes, get a picture that obeys them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrd_helpers.attention import capture_attention
    from lrd_helpers.baselines import BASELINES, draw
    from lrd_helpers.guidance import vision_guidance
    from lrd_helpers.layout import Layer, Layout, LayoutError
    from lrd_helpers.method import METHODS, Method
    from lrd_helpers.models import AssetError, load_pipeline
    from lrd_helpers.rendering import LayeredRenderingPipeline
    from lrd_helpers.widgets import BoxEditor, LayoutStudio

# Public name → its module, imported when the name is first asked for (PEP 562): importing the
# package must not wait for torch.
_MODULES = {
    "BASELINES": "baselines",
    "METHODS": "method",
    "AssetError": "models",
    "BoxEditor": "widgets",
    "Layer": "layout",
    "LayeredRenderingPipeline": "rendering",
    "Layout": "layout",
    "LayoutError": "layout",
    "LayoutStudio": "widgets",
    "Method": "method",
    "capture_attention": "attention",
    "draw": "baselines",
    "load_pipeline": "models",
    "vision_guidance": "guidance",
}

__all__ = [
    "BASELINES",
    "METHODS",
    "AssetError",
    "BoxEditor",
    "Layer",
    "LayeredRenderingPipeline",
    "Layout",
    "LayoutError",
    "LayoutStudio",
    "Method",
    "capture_attention",
    "draw",
    "load_pipeline",
    "vision_guidance",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
