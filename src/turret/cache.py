"""The user's cache folder: `$TURRET_CACHE`, else `~/.cache/turret`. Its files can be deleted at any time.

Compiled code is loaded only from a `private_folder`, which no other user can write to.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The path of the cache folder, which may not exist yet."""
    if configured := os.environ.get("TURRET_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "turret"


def write_beside(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: to a temporary file first, which is then renamed. Raises OSError."""
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
    """Make `folder` and its parents with mode 0700 if they are missing, and check that no other user can change them.

    The folder and all its parents must belong to this user or root, and must not be writable for others. One exception:
    a parent may be a world-writable folder of root with the sticky bit (/tmp), if the entry in it belongs to this user.

    Returns:
        The path with the symbolic links above `folder` resolved.

    Raises:
        OSError: a folder cannot be made, or another user could change it. Names the folder and the reason.
    """
    real = Path(os.path.realpath(folder.parent)) / folder.name
    for part in (*reversed(real.parents), real):
        if not os.path.lexists(part):
            part.mkdir(mode=0o700, exist_ok=True)
    parent_is_shared = False
    for part in (*reversed(real.parents), real):
        status = part.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise OSError(errno.ELOOP, "is a symbolic link", str(part))
        if not stat.S_ISDIR(status.st_mode):
            raise OSError(errno.ENOTDIR, "is not a folder", str(part))
        _require_owner(part, status, allow_root=not parent_is_shared)
        parent_is_shared = bool(status.st_mode & 0o022)
        if parent_is_shared and not (status.st_mode & stat.S_ISVTX and status.st_uid == 0 and part != real):
            mode = stat.S_IMODE(status.st_mode)
            raise PermissionError(errno.EPERM, f"is writable for others (mode {mode:o}): chmod go-w it", str(part))
    return real


def open_private(path: Path) -> int:
    """Open a file in a private folder for reading, and check that no other user can have written it.

    Returns:
        The file descriptor. The caller closes it.

    Raises:
        OSError: it cannot be opened, is a symbolic link, has a second hard link, or is writable for others.
    """
    descriptor = _open(path)
    try:
        status = os.fstat(descriptor)
        while status.st_nlink == 0:  # another process has just replaced the file
            os.close(descriptor)
            descriptor = _open(path)
            status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise PermissionError(errno.EPERM, "is not a regular file with one link", str(path))
        _require_owner(path, status, allow_root=True)
        if status.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "is writable for others: delete it", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _require_owner(path: Path, status: os.stat_result, *, allow_root: bool) -> None:
    if status.st_uid != os.getuid() and not (allow_root and status.st_uid == 0):
        raise PermissionError(errno.EPERM, f"belongs to user {status.st_uid}", str(path))
