"""Keeping the libraries' remarks out of a learner's first cell, and some of its waiting."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While it lasts, no library logs a warning (errors are still logged and raised).

    For imports and loading only: what diffusers and transformers remark there ("torchvision is not
    installed", "casting directly with to()") is about choices this package has made. The garbage
    collector rests, too: almost all that an import makes stays, and looking through it again and
    again takes a sixth of the time until the first picture.
    """
    before, collecting = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.WARNING)
    gc.disable()
    try:
        yield
    finally:
        logging.disable(before)
        if collecting:
            gc.enable()
