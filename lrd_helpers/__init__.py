"""Layered Rendering Diffusion: draw boxes, get a picture that obeys them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrd_helpers.attention import capture_attention
    from lrd_helpers.layerdiff.pipeline import LayerDiffPipeline
    from lrd_helpers.layerdiff.stack import LayerStack
    from lrd_helpers.layout import Layer, Layout, LayoutError
    from lrd_helpers.methods import METHODS, LayeredRendering, Method
    from lrd_helpers.methods.guidance import vision_guidance
    from lrd_helpers.models import AssetError, load_pipeline
    from lrd_helpers.pipeline import LayeredRenderingPipeline, LayeredRenderingXLPipeline
    from lrd_helpers.widgets import BoxEditor, LayoutStudio, StackEditor

# Public name → its module, imported when the name is first asked for (PEP 562): importing the
# package must not wait for torch.
_MODULES = {
    "METHODS": "methods",
    "AssetError": "models",
    "BoxEditor": "widgets",
    "LayerDiffPipeline": "layerdiff.pipeline",
    "LayerStack": "layerdiff.stack",
    "LayeredRendering": "methods",
    "LayeredRenderingPipeline": "pipeline",
    "LayeredRenderingXLPipeline": "pipeline",
    "Layer": "layout",
    "Layout": "layout",
    "LayoutError": "layout",
    "LayoutStudio": "widgets",
    "Method": "methods",
    "StackEditor": "widgets",
    "capture_attention": "attention",
    "load_pipeline": "models",
    "vision_guidance": "methods.guidance",
}

__all__ = [
    "METHODS",
    "AssetError",
    "BoxEditor",
    "LayerDiffPipeline",
    "LayerStack",
    "LayeredRendering",
    "LayeredRenderingPipeline",
    "LayeredRenderingXLPipeline",
    "Layer",
    "Layout",
    "LayoutError",
    "LayoutStudio",
    "Method",
    "StackEditor",
    "capture_attention",
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
