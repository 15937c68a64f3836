"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`: whoever reads it sees the old file or the new one, never a half.

    The bytes go to a temporary file in the same folder, which then takes the name in one step.

    Raises:
        OSError: the folder is missing, the disk is full, …; the temporary file is removed and
            what stood at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            # Without it a full disk or a power cut can show up after the rename.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Name the file that was asked for, not the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
