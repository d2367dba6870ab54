"""Files known by the sha256 of their bytes. Refuses to know names, versions and the database.

On disk, under the store's root:

- `blobs/sha256/<first two hex digits>/<64 hex digits>`: the bytes, read-only; written beside (`tmp/`), flushed to disk,
  then renamed, so that a file under its final name is always whole
- `tmp/`: what is being written; after a kill, leftovers that nothing refers to
- a file that no version lists may be removed at any moment by `turret.store.gc`: who lists one looks, while it is the
  only writer of the database, whether it is still there
- bytes are hashed again whenever they are read, so a flipped bit is never handed on
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from turret.disk import sync
from turret.errors import Corrupt

_CHUNK = 1 << 20
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Blob:
    """The address and size of one file's content."""

    digest: str  # "sha256:<hex>"
    bytes: int


class Blobs:
    """The content-addressed files of one store."""

    def __init__(self, root: Path) -> None:
        self._root = root / "blobs" / "sha256"
        self._beside = root / "tmp"

    def path(self, digest: str) -> Path:
        """Where the content of that digest is, or would be."""
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise Corrupt(f"{digest[:80]!r} is not a digest: expected sha256: and 64 hex digits")
        return self._root / match[1][:2] / match[1]

    def put(self, source: Path) -> Blob:
        """Keep a copy of the file; content that is there already, and whole, is not written again."""
        blob = hash_file(source)
        final = self.path(blob.digest)
        if _whole(final, blob):
            sync(final.parent)  # whoever wrote it may have been killed before this
            return blob
        _folder(self._beside)
        _folder(final.parent)
        beside = self._beside / uuid.uuid4().hex
        try:
            with source.open("rb") as read, beside.open("xb") as write:
                copied = _copy(read, write)
                flush(write)
            if copied != blob:
                raise Corrupt(f"{source} changed while it was being stored: try again when nothing writes to it")
            beside.chmod(0o444)
            os.replace(beside, final)
            sync(final.parent)
        finally:
            beside.unlink(missing_ok=True)
        return blob

    def has(self, digest: str) -> bool:
        """Whether a file of that digest is there; what is there is whole, unless the disk damaged it."""
        return self.path(digest).is_file()

    def glance(self, blob: Blob) -> str | None:
        """What is wrong at a quick look, which hashes nothing."""
        path = self.path(blob.digest)
        if not path.is_file():
            return f"is missing ({path})"
        return None if path.stat().st_size == blob.bytes else f"is cut ({path})"

    def walk(self) -> Iterator[tuple[Path, Blob]]:
        """Every stored file with its address, listed or not; nothing is hashed."""
        for path in sorted(self._root.glob("??/*")):
            if re.fullmatch(r"[0-9a-f]{64}", path.name):
                with suppress(FileNotFoundError):  # removed since
                    yield path, Blob(f"sha256:{path.name}", path.stat().st_size)

    def leftovers(self) -> Iterator[tuple[Path, os.stat_result]]:
        """What is being written, or was when its writer was killed."""
        for path in sorted(self._beside.glob("*")):
            with suppress(FileNotFoundError):
                yield path, path.lstat()

    def check(self, digest: str) -> Path:
        """The path of the content, after hashing it again; raises Corrupt."""
        path = self.path(digest)
        try:
            _require_plain(path, digest)
            found = hash_file(path)
        except FileNotFoundError:
            raise _missing(path, digest) from None
        if found.digest != digest:
            raise _changed(path, digest)
        return path

    def copy(self, digest: str, target: Path) -> None:
        """A copy of the content that was hashed on its way, so what arrives is what was stored; raises Corrupt."""
        path = self.path(digest)
        try:
            _require_plain(path, digest)
            read = path.open("rb")
        except FileNotFoundError:
            raise _missing(path, digest) from None
        with read, target.open("xb") as write:
            copied = _copy(read, write)
        if copied.digest != digest:
            target.unlink()
            raise _changed(path, digest)


def hash_file(path: Path) -> Blob:
    """The address that the file's content has, or would have."""
    with path.open("rb") as file:
        return _copy(file, None)


def flush(file: BinaryIO) -> None:
    """Returns when the bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _copy(read: BinaryIO, write: BinaryIO | None) -> Blob:
    digest, size = hashlib.sha256(), 0
    while chunk := read.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if write is not None:
            write.write(chunk)
    return Blob(f"sha256:{digest.hexdigest()}", size)


def _whole(path: Path, blob: Blob) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode) and hash_file(path) == blob
    except FileNotFoundError:
        return False


def _folder(folder: Path) -> None:
    """Make the folder so that it is still there after a power cut."""
    missing = [folder] if not folder.exists() else []
    while missing and not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for level in reversed(missing):
        level.mkdir(exist_ok=True)
        sync(level.parent)


def _require_plain(path: Path, digest: str) -> None:
    """A link, pipe or device in a store was put there by nobody of ours, and a pipe would never end."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise Corrupt(f"stored file {digest} is no plain file: restore {path} from a copy, or train again")


def _missing(path: Path, digest: str) -> Corrupt:
    return Corrupt(f"stored file {digest} is missing: restore {path} from a copy, or train again")


def _changed(path: Path, digest: str) -> Corrupt:
    return Corrupt(
        f"stored file {path} does not match its digest {digest[:19]}...: restore it from a copy, or train again"
    )
