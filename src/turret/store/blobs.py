"""Files known by the sha256 of their bytes, in a folder. Refuses to know names, versions and the database.

`Files` says what any place for them can do; `turret.store.objects` is the other one. In a folder:

- `blobs/sha256/<first two hex digits>/<64 hex digits>`: the bytes, read-only; written beside (`tmp/`), flushed to disk,
  then renamed, so that a file under its final name is always whole; who may enter its folder may read it
- `tmp/`: what is being written; after a kill, leftovers that nothing refers to
- a file that no version lists may be removed at any moment by `turret.store.gc`: who lists one looks, while it is the
  only writer of the database, whether it is still there
- bytes are hashed again whenever they are read, so a flipped bit is never handed on
- `catalog`: the id of the catalog that the files belong to, where that is not in this folder too
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from turret.disk import PRIVATE, create, flush, make_folder, permissions, sync
from turret.errors import Corrupt

OWNER = "catalog"
_CHUNK = 1 << 20
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Blob:
    """The address and size of one file's content."""

    digest: str  # "sha256:<hex>"
    bytes: int


class Files(Protocol):
    """Where content is kept under its digest. Names are paths under the place's root, as people are shown them."""

    def put(self, source: Path) -> Blob:
        """Keep a copy of the file; content that is there already, and whole, is not written again."""

    def has(self, digest: str) -> bool:
        """Whether content of that digest is there; what is there is whole, unless something damaged it."""

    def glance(self, blob: Blob) -> str | None:
        """What is wrong at a quick look, which hashes nothing."""

    def glances(self, blobs: Iterable[Blob]) -> Mapping[str, str]:
        """Digest -> what is wrong with it, of many, at a quick look."""

    def check(self, digest: str) -> Blob:
        """Hash the content again; raises Corrupt."""

    def copy(self, digest: str, target: Path) -> None:
        """A copy of the content that was hashed on its way, so what arrives is what was stored; raises Corrupt."""

    def held(self, digest: str) -> AbstractContextManager[Path]:
        """The content, hashed again, as a file that nobody may write to, while the block lasts; raises Corrupt."""

    def local(self, digest: str) -> Path:
        """The same, for as long as this object lasts."""

    def walk(self) -> Iterator[tuple[str, Blob]]:
        """Every stored content with its name, listed or not; nothing is hashed."""

    def leftovers(self) -> Iterator[tuple[str, int, float]]:
        """Name, bytes and last change of what is being written, or was when its writer was killed."""

    def remove(self, name: str) -> bool:
        """Take away what `walk` or `leftovers` named; False where it is gone already."""

    def owner(self) -> str | None:
        """The id of the catalog that these files belong to."""

    def claim(self, identity: str) -> None:
        """Write down that they belong to that catalog."""


class Blobs:
    """The content-addressed files of a folder."""

    def __init__(self, root: Path) -> None:
        self._folder = root
        self._root = root / "blobs" / "sha256"
        self._beside = root / "tmp"
        self._made: set[Path] = set()

    def path(self, digest: str) -> Path:
        """Where the content of that digest is, or would be."""
        return self._root / place(digest)

    def put(self, source: Path) -> Blob:
        """Keep a copy of the file; content that is there already, and whole, is not written again."""
        blob = hash_file(source)
        final = self.path(blob.digest)
        if _whole(final, blob):
            sync(final.parent)  # whoever wrote it may have been killed before this
            return blob
        self._make(self._beside)
        self._make(final.parent)
        beside = self._beside / uuid.uuid4().hex
        try:
            with source.open("rb") as read, create(beside) as write:
                copied = stream(read, write)
                flush(write)
            if copied != blob:
                raise Corrupt(f"{source} changed while it was being stored: try again when nothing writes to it")
            beside.chmod(0o444 & permissions(final.parent))
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

    def glances(self, blobs: Iterable[Blob]) -> Mapping[str, str]:
        """Digest -> what is wrong with it, of many, at a quick look."""
        return {blob.digest: said for blob in blobs if (said := self.glance(blob))}

    def walk(self) -> Iterator[tuple[str, Blob]]:
        """Every stored file with its name, listed or not; nothing is hashed."""
        for path in sorted(self._root.glob("??/*")):
            if re.fullmatch(r"[0-9a-f]{64}", path.name):
                with suppress(FileNotFoundError):  # removed since
                    yield self._name(path), Blob(f"sha256:{path.name}", path.stat().st_size)

    def leftovers(self) -> Iterator[tuple[str, int, float]]:
        """Name, bytes and last change of what is being written, or was when its writer was killed."""
        for path in sorted(self._beside.glob("*")):
            with suppress(FileNotFoundError):
                found = path.lstat()
                yield self._name(path), found.st_size, found.st_mtime

    def remove(self, name: str) -> bool:
        """Take away what `walk` or `leftovers` named; False where it is gone already."""
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def owner(self) -> str | None:
        """The id of the catalog that these files belong to; a folder store's own is in its folder."""
        if (self._folder / "turret.db").exists():
            return f"of {self._folder / 'turret.db'}"
        try:
            return (self._folder / OWNER).read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None

    def claim(self, identity: str) -> None:
        """Write down that they belong to that catalog."""
        self._make(self._beside)
        beside = self._beside / uuid.uuid4().hex
        with create(beside) as file:
            file.write(identity.encode())
            flush(file)
        beside.chmod(0o666 & permissions(self._folder))
        os.replace(beside, self._folder / OWNER)
        sync(self._folder)

    def check(self, digest: str) -> Blob:
        """Hash the content again; raises Corrupt."""
        path = self.path(digest)
        try:
            _require_plain(path, digest)
            found = hash_file(path)
        except FileNotFoundError:
            raise missing(path, digest) from None
        if found.digest != digest:
            raise changed(path, digest)
        return found

    @contextmanager
    def held(self, digest: str) -> Iterator[Path]:
        """The content, hashed again, as a file that nobody may write to, while the block lasts; raises Corrupt."""
        yield self.local(digest)

    def local(self, digest: str) -> Path:
        """The file itself, after hashing it again; raises Corrupt."""
        self.check(digest)
        return self.path(digest)

    def copy(self, digest: str, target: Path) -> None:
        """A copy of the content that was hashed on its way, so what arrives is what was stored; raises Corrupt."""
        path = self.path(digest)
        try:
            _require_plain(path, digest)
            read = path.open("rb")
        except FileNotFoundError:
            raise missing(path, digest) from None
        with read, target.open("xb") as write:
            copied = stream(read, write)
        if copied.digest != digest:
            target.unlink()
            raise changed(path, digest)

    def _make(self, folder: Path) -> None:
        """Make a folder here, once a process: it has the permissions of the folder it is in, the topmost is private."""
        if folder in self._made and folder.is_dir():
            return
        if not self._folder.exists():
            make_folder(self._folder, PRIVATE)
        for level in (*reversed(folder.relative_to(self._folder).parents[:-1]), folder.relative_to(self._folder)):
            make_folder(self._folder / level, permissions((self._folder / level).parent))
        self._made.add(folder)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def place(digest: str) -> str:
    """Where the content of that digest is under `blobs/sha256/`; raises Corrupt."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise Corrupt(f"{digest[:80]!r} is not a digest: expected sha256: and 64 hex digits")
    return f"{match[1][:2]}/{match[1]}"


def hash_file(path: Path) -> Blob:
    """The address that the file's content has, or would have."""
    with path.open("rb") as file:
        return stream(file, None)


def stream(read: BinaryIO, write: BinaryIO | None) -> Blob:
    """Read to the end, in pieces, and write what was read; returns its address."""
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


def _require_plain(path: Path, digest: str) -> None:
    """A link, pipe or device in a store was put there by nobody of ours, and a pipe would never end."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise Corrupt(f"stored file {digest} is no plain file: restore {path} from a copy, or train again")


def missing(path: object, digest: str) -> Corrupt:
    return Corrupt(f"stored file {digest} is missing: restore {path} from a copy, or train again")


def changed(path: object, digest: str) -> Corrupt:
    return Corrupt(
        f"stored file {path} does not match its digest {digest[:19]}...: restore it from a copy, or train again"
    )
