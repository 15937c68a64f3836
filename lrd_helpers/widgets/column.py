"""`Column`: widgets one below the other, in every notebook."""

from __future__ import annotations

from typing import Any

import ipywidgets
from anywidget._util import get_repr_metadata


class Column(ipywidgets.VBox):
    """A column of widgets that is shown as the last line of a cell, on Colab too.

    Colab must be told where its manager of such widgets is. It adds that by itself to what
    `display(…)` shows, but not to a cell's value; there anywidget adds it, for its own widgets.
    """

    if hasattr(ipywidgets.VBox, "_repr_mimebundle_"):  # ipywidgets 7 calls display itself

        def _repr_mimebundle_(self, **options: Any) -> Any:
            data = super()._repr_mimebundle_(**options)
            return None if data is None else (data, get_repr_metadata())
