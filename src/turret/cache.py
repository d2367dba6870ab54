"""The user's cache folder: things that can be made again, each written beside its name and renamed into place.

$TURRET_CACHE, else ~/.cache/turret. What is run from it must lie where nobody else can write: `private_folder`.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where cached things lie; it may not exist yet."""
    named = os.environ.get("TURRET_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "turret"


def write_beside(path: Path, text: str) -> None:
    """Put `text` at `path`, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def private_folder(folder: Path) -> Path:
    """`folder` without symbolic links above it, made with mode 0700 where it is missing, that nobody else can change.

    It and every folder above it belong to this user or root, and nobody else may write to them. A folder of root's
    that all may write to, but with the sticky bit (/tmp), is good for an entry of this user's.

    Raises:
        OSError: it cannot be made, or somebody else could change it; says which folder and why.
    """
    real = Path(os.path.realpath(folder.parent)) / folder.name
    for each in (*reversed(real.parents), real):
        if not os.path.lexists(each):
            each.mkdir(mode=0o700, exist_ok=True)
    shared = False  # whether the folder above is one that all may write to
    for each in (*reversed(real.parents), real):
        found = each.lstat()
        if stat.S_ISLNK(found.st_mode):
            raise OSError(errno.ELOOP, "is a symbolic link", str(each))
        if not stat.S_ISDIR(found.st_mode):
            raise OSError(errno.ENOTDIR, "is no folder", str(each))
        _require_own(each, found, () if shared else (0,))
        shared = bool(found.st_mode & 0o022)
        if shared and not (found.st_mode & stat.S_ISVTX and found.st_uid == 0 and each != real):
            mode = stat.S_IMODE(found.st_mode)
            raise PermissionError(errno.EPERM, f"may be written by others (mode {mode:o}): chmod go-w it", str(each))
    return real


def open_private(path: Path) -> int:
    """A descriptor of a file in a private folder, to be read, that nobody else can have written.

    Raises OSError: also for a symbolic link, a file with a second name, and one that others may write to.
    """
    descriptor = _open(path)
    try:
        found = os.fstat(descriptor)
        while found.st_nlink == 0:  # another process has just put a new file in its place
            os.close(descriptor)
            descriptor = _open(path)
            found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise PermissionError(errno.EPERM, "is no file of one name", str(path))
        _require_own(path, found, (0,))
        if found.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "may be written by others: delete it", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _require_own(path: Path, found: os.stat_result, others: tuple[int, ...]) -> None:
    if found.st_uid not in (os.getuid(), *others):
        raise PermissionError(errno.EPERM, f"belongs to user {found.st_uid}", str(path))
