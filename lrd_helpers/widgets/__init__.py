"""What one touches in a notebook.

`BoxEditor` (draw a layout), `LayoutStudio` (render it), `StackEditor` (move and restack layers),
`SideBySide` (judge pictures blindly), `Guess` (answer before the figure does).
"""

from lrd_helpers.widgets.box_editor import BoxEditor
from lrd_helpers.widgets.guess import Guess, GuessSummary, guess_summary
from lrd_helpers.widgets.layout_studio import LayoutStudio, Render, Settings, render
from lrd_helpers.widgets.side_by_side import Pair, SideBySide, shuffled_pairs, sign_test
from lrd_helpers.widgets.stack_editor import StackEditor

__all__ = [
    "BoxEditor",
    "Guess",
    "GuessSummary",
    "LayoutStudio",
    "Pair",
    "Render",
    "Settings",
    "SideBySide",
    "StackEditor",
    "guess_summary",
    "render",
    "shuffled_pairs",
    "sign_test",
]
