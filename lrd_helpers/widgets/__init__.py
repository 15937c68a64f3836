"""What one touches in a notebook: `BoxEditor` (draw a layout) and `LayoutStudio` (render it)."""

from lrd_helpers.widgets.box_editor import BoxEditor
from lrd_helpers.widgets.layout_studio import LayoutStudio, Render, Settings, render

__all__ = ["BoxEditor", "LayoutStudio", "Render", "Settings", "render"]
