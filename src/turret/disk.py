"""Make files and folders durable: they are on the disk when a call returns. Also permissions, errors, the cache."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

PRIVATE = 0o700  # mode of a folder that only its owner may enter
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAILING = (errno.EIO, errno.ENXIO, errno.ENODEV)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex digits. It is computed again only if the file has changed since."""
    state = path.stat()
    return _sha256(path, state.st_ino, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _sha256(path: Path, *_state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk. Raises OSError that names the path."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        _fsync(handle, str(path))
    finally:
        os.close(handle)


def flush(file: BinaryIO) -> None:
    """Flush an open file to the disk. Raises OSError that names the file."""
    file.flush()
    _fsync(file.fileno(), file.name)


def _fsync(handle: int, name: str) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from error


def make_folder(folder: Path, mode: int | None = None) -> None:
    """Make a folder and its parents, so that they survive a power cut.

    Args:
        mode: permissions of the folder if it is new. None, and all parents: the process's default.
    """
    if not folder.parent.exists():
        make_folder(folder.parent)
    try:
        folder.mkdir(mode=0o777 if mode is None else PRIVATE)
    except FileExistsError:
        if not folder.is_dir():
            raise
        # The process that made the folder may have been killed before it flushed the parent.
        with suppress(PermissionError):  # the parent belongs to another user, who made this folder
            sync(folder.parent)
        return
    if mode is not None:
        folder.chmod(mode)
    sync(folder.parent)


def make_below(root: Path, folder: Path) -> None:
    """Make a folder below a root, each level with the permissions of its parent; a new root is private."""
    if not root.exists():
        make_folder(root, PRIVATE)
    level = root
    for name in folder.relative_to(root).parts:
        make_folder(level / name, permissions(level))
        level /= name


def permissions(folder: Path) -> int:
    """The permissions of a folder, to be given to its new entries."""
    return stat.S_IMODE(folder.stat().st_mode) & (0o777 | stat.S_ISGID)


def make_file(path: Path) -> None:
    """Make an empty file if it is missing. Users who can read or write its folder can read or write the file."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    os.close(handle)
    path.chmod(permissions(path.parent) & 0o666)
    sync(path.parent)


def create(path: Path) -> BinaryIO:
    """Open a new file for writing that only its owner may read, until its permissions are changed."""
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole: after a kill or a power cut it has the old text or the new one. Raises OSError.

    One process at a time writes a path. Others have `write_beside`.
    """
    beside = path.with_name(f"{path.name}.new")
    with beside.open("wb") as file:
        file.write(text.encode())
        flush(file)
    os.replace(beside, path)
    sync(path.parent)


def place_folder(folder: Path, target: Path) -> None:
    """Rename a folder to a name that tells its content, unless somebody else has just placed that there."""
    try:
        os.replace(folder, target)
    except OSError:
        if not target.exists():
            raise


@contextmanager
def exclusive_lock(folder: Path, seconds: float = 10.0) -> Iterator[bool]:
    """Hold an exclusive lock on a folder during the block; wait up to `seconds` for other processes to release it.

    The operating system releases the lock when the process dies.

    Yields:
        Whether the lock was acquired. Also True where locks do not work: Windows, some network disks.
    """
    if os.name == "nt":
        yield True
        return
    import fcntl

    handle, deadline, locked = os.open(folder, os.O_RDONLY), time.monotonic() + seconds, False
    try:
        while not locked and time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a disk without locks
                locked = True
        yield locked
    finally:
        os.close(handle)


def clock_of(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder: a shared folder's is its server's, not this machine's.

    Where nothing may be written, and so nothing removed, the time of this machine.
    """
    try:
        os.utime(folder)
        return folder.stat().st_mtime
    except OSError:
        return time.time()


def mount_of(path: Path) -> Path:
    """The mount point of the disk that `path` is on, or would be on."""
    mount = path.resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    return mount


def errno_of(error: Exception) -> int | None:
    """The errno of an error; also if a library only wrote it into the error's text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def describe_error(error: Exception, where: Path) -> str:
    """An error of the disk for users: the reason and the file; if the disk itself fails, also its mount point.

    Args:
        where: the file that was being written, for an error that names none.
    """
    filename, number = getattr(error, "filename", None), errno_of(error)
    path = Path(os.fsdecode(filename)) if isinstance(filename, str | bytes) else where
    reason = os.strerror(number) if number else " ".join(str(error).split())[:160]
    failing = f": the disk at {mount_of(path)} fails, look at its health" if number in FAILING else ""
    return f"{reason}: {path}{failing}"


def everything_below(folder: Path) -> Iterator[os.stat_result]:
    """Files and folders below a folder. What another process removes meanwhile is left out, and is no error."""
    for top, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):
                yield os.lstat(os.path.join(top, name))


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return file_bytes(everything_below(folder))


def file_bytes(found: Iterable[os.stat_result]) -> int:
    """Bytes of the files among what was found."""
    return sum(each.st_size for each in found if stat.S_ISREG(each.st_mode))


# --- the user's cache folder ------------------------------------------------------------------------------------------
# The user's cache folder: `$TURRET_CACHE`, else `~/.cache/turret`. Its files can be deleted at any time.
#
# Compiled code is loaded only from a `private_folder`, which no other user can write to.


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
