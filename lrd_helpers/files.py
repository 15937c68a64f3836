"""Reading files of a stated size and kind; writing files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_DEAD_AFTER = 600
"""Seconds after which a temporary file is a killed process's: no write rests so long."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def checked_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of the regular file `path`, of which there are at most `limit`.

    A device such as /dev/zero never ends, and a pipe may never begin.

    Raises:
        OSError: the file is missing, no regular file, larger, …; `strerror` says it in words.
    """
    with naming(path):
        if kind := _kind(path):
            raise OSError(errno.EINVAL, f"it is {kind}, but should be a file")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit / 2**20:.3g} MB")
        return data


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` as `replacing` does; a device or a pipe is written to as it stands.

    Raises:
        OSError: as `replacing` does.
    """
    with naming(path):
        if _is_stream(path):
            with open(path, "ab") as file:
                file.write(data)
            return
        with replacing(path) as temporary:
            temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary file in the folder of `path`, which takes that name in the end.

    Whoever reads `path` sees the old file or the new one, never a half. A symbolic link stays: what
    it points to is replaced. The mode of an old file is kept; a new file has the usual one (umask).

    Raises:
        OSError: the folder is missing, the disk is full, …; names `path`. The temporary file is
            removed and what stood at `path` before is untouched.
    """
    with naming(path):
        if kind := _kind(path):
            raise OSError(errno.EINVAL, f"it is {kind}, but should be a file")
        target = Path(os.path.realpath(path))
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        temporary = _beside(target)
        try:
            # Never more open than the old file, not even for a moment.
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            os.close(os.open(temporary, flags, 0o666 if mode is None else mode | stat.S_IWUSR))
            yield temporary
            with open(temporary, "rb+") as file:
                # Without it a full disk or a power cut can show up after the rename.
                os.fsync(file.fileno())
            if mode is not None:
                os.chmod(temporary, mode)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`, which takes that name in the end.

    What stood at `path` is removed last. No system call puts a folder in the place of a full one:
    for a moment neither is there, and a process killed then leaves the old one as ".NAME.….old".

    Raises:
        OSError: as `replacing` does; also where `path` is a file.
    """
    with naming(path):
        kind = "a file" if os.path.isfile(path) else _kind(path)
        if kind not in ("", "a folder"):
            raise OSError(errno.ENOTDIR, f"it is {kind}, but should be a folder")
        target = Path(os.path.realpath(path))
        temporary = _beside(target)
        old = temporary.with_suffix(".old")
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
            if target.exists():
                target.rename(old)
            try:
                temporary.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made, because it, or a folder above it, is a file.

    Raises:
        NotADirectoryError: names the file.
    """
    for each in (folder, *folder.parents):
        if os.path.lexists(each) and not each.is_dir():
            message = f"{each} is a file, but should be a folder"
            raise NotADirectoryError(errno.ENOTDIR, message, os.fspath(folder))


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], refusal: Exception) -> Iterator[None]:
    """Keep other processes out of a folder; the system frees the lock of one that was killed.

    Raises:
        Exception: `refusal`, where another process is in there.
    """
    lock = FileLock(os.path.join(folder, ".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise refusal from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors name the file that was asked for, not a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _kind(path: str | os.PathLike[str]) -> str:
    """What `path` is if it is there and no regular file: "a folder", "a pipe"; else ""."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return ""
    except ValueError:  # a NUL or a lone surrogate
        raise OSError(errno.EINVAL, "no file can have this name") from None
    return "" if kind == stat.S_IFREG else _KINDS.get(kind, "no file")


def _is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether `path` cannot be replaced, only written to: a device, a pipe, or /dev/stdout."""
    if _kind(path) in ("a pipe", "a device"):
        return True
    # /dev/stdout may lead to a regular file, which others write to as well.
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    return folder == "/dev" or folder.startswith("/proc/")


def _beside(target: Path) -> Path:
    """A temporary name in the folder of `target`; what killed processes left there is removed."""
    _sweep(target.parent)
    # Not the whole name: it may be as long as names can be.
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.lrd.tmp")


@functools.lru_cache(maxsize=1024)
def _sweep(folder: Path) -> None:
    """Remove what killed processes left in `folder`: once for each process that writes there."""
    with contextlib.suppress(OSError):  # no right to list it; or another process sweeps, too
        for file in folder.iterdir():
            ours = re.fullmatch(r"\..+\.[0-9a-f]{8}\.lrd\.tmp", file.name)
            if ours and time.time() - file.stat().st_mtime > _DEAD_AFTER:
                if file.is_dir():
                    shutil.rmtree(file)
                else:
                    file.unlink()
