"""Keeping the libraries' remarks out of a learner's first cell."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While it lasts, no library logs a warning (errors are still logged and raised).

    For imports and loading only: what diffusers and transformers remark there ("torchvision is not
    installed", "casting directly with to()") is about choices this package has made.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
