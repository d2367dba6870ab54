"""Files and folders that are on the disk when a call returns, who may read them, and what a failing disk says."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PRIVATE = 0o700  # a folder that only its owner may enter
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAILING = (errno.EIO, errno.ENXIO, errno.ENODEV)


def sync(path: Path) -> None:
    """Returns when a file's bytes, or the names in a folder, are on the disk. Raises OSError that names the path."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        _fsync(handle, str(path))
    finally:
        os.close(handle)


def flush(file: BinaryIO) -> None:
    """Returns when what was written to the file is on the disk. Raises OSError that names the file."""
    file.flush()
    _fsync(file.fileno(), file.name)


def _fsync(handle: int, name: str) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from error


def make_folder(folder: Path, mode: int | None = None) -> None:
    """Make a folder, and those above it, so that they are still there after a power cut.

    mode: its permissions where it is new; None, and for those above: as the process makes any folder.
    The folder above is flushed also where `folder` is there: its maker may have been killed before doing so.
    """
    if not folder.parent.exists():
        make_folder(folder.parent)
    try:
        folder.mkdir(mode=0o777 if mode is None else PRIVATE)
    except FileExistsError:
        if not folder.is_dir():
            raise
        with suppress(PermissionError):  # the folder above is somebody else's, who made this one
            sync(folder.parent)
        return
    if mode is not None:
        folder.chmod(mode)
    sync(folder.parent)


def permissions(folder: Path) -> int:
    """The permissions of a folder, for what is put into it."""
    return stat.S_IMODE(folder.stat().st_mode) & (0o777 | stat.S_ISGID)


def make_file(path: Path) -> None:
    """Make an empty file, where there is none, that those may read and write who may do so with its folder."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    os.close(handle)
    path.chmod(permissions(path.parent) & 0o666)
    sync(path.parent)


def create(path: Path) -> BinaryIO:
    """A new file to write, that only its owner may read until it is given other permissions."""
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))


@contextmanager
def alone(folder: Path, seconds: float = 10.0) -> Iterator[bool]:
    """Whether this process has the folder to itself while the block lasts, among those that ask; waits for the others.

    The system lets go of it when the process dies. True also where the system cannot tell: Windows, some network disks.
    """
    if os.name == "nt":
        yield True
        return
    import fcntl

    handle, deadline, held = os.open(folder, os.O_RDONLY), time.monotonic() + seconds, False
    try:
        while not held and time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a disk that knows no locks
                held = True
        yield held
    finally:
        os.close(handle)


def mount_of(path: Path) -> Path:
    """Where the disk that `path` is on, or would be on, is mounted."""
    mount = path.resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    return mount


def number_of(error: Exception) -> int | None:
    """The system's number of an error, also where a library wrote it into words of its own."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def plainly(error: Exception, where: Path) -> str:
    """What the system said, of which file; where the disk itself fails, which disk that is.

    where: the file that was being written, in case the error names none.
    """
    named, number = getattr(error, "filename", None), number_of(error)
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else where
    said = os.strerror(number) if number else " ".join(str(error).split())[:160]
    fails = f": the disk at {mount_of(path)} fails, look at its health" if number in FAILING else ""
    return f"{said}: {path}{fails}"
