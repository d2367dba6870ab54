"""Files known by the sha256 of their bytes, in a folder. Refuses to know names, versions and the database.

`Files` says what any place for them can do; `turret.store.objects` is the other one. In a folder:

- `blobs/sha256/<first two hex digits>/<64 hex digits>-<upload>`: the bytes, read-only; written beside (`tmp/`), flushed
  to disk, then renamed, so that a file under its final name is always whole; who may enter its folder may read it. The
  upload is the put that wrote it (`turret.store.uploads`); up to format 0005 names ended after the digest
- `tmp/`: what is being written; after a kill, leftovers that nothing refers to
- a name is written once: nothing is ever written under the name of a file that was removed
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from turret.disk import PRIVATE, create, flush, make_folder, permissions, sync
from turret.errors import Corrupt

OWNER = "catalog"
_CHUNK = 1 << 20
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_UPLOAD = re.compile(r"[0-9a-f]{32}", re.ASCII)
_PLACE = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})(?:-([0-9a-f]{32}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Blob:
    """The address and size of one file's content. Two are equal when their content is."""

    digest: str  # "sha256:<hex>"
    bytes: int
    upload: str = field(default="", compare=False)  # which of its copies; "" for those of format 0005 and before


class Files(Protocol):
    """Where content is kept under its digest. Names are paths under the place's root, as people are shown them."""

    def put(self, source: Path, blob: Blob) -> None:
        """Keep a copy of the file as `blob`; raises Corrupt where the file is not what `blob` says."""

    def glance(self, blob: Blob) -> str | None:
        """What is wrong at a quick look, which hashes nothing."""

    def glances(self, blobs: Iterable[Blob]) -> Mapping[str, str]:
        """Digest -> what is wrong with it, of many, at a quick look."""

    def check(self, blob: Blob) -> None:
        """Hash the content again; raises Corrupt."""

    def copy(self, blob: Blob, target: Path) -> None:
        """A copy of the content that was hashed on its way, so what arrives is what was stored; raises Corrupt."""

    def held(self, blob: Blob) -> AbstractContextManager[Path]:
        """The content, hashed again, as a file that nobody may write to, while the block lasts; raises Corrupt."""

    def local(self, blob: Blob) -> Path:
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

    def path(self, blob: Blob) -> Path:
        """Where that content is, or would be."""
        return self._root / place(blob)

    def put(self, source: Path, blob: Blob) -> None:
        """Keep a copy of the file as `blob`; raises Corrupt where the file is not what `blob` says."""
        final = self.path(blob)
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

    def glance(self, blob: Blob) -> str | None:
        """What is wrong at a quick look, which hashes nothing."""
        path = self.path(blob)
        if not path.is_file():
            return f"is missing ({path})"
        return None if path.stat().st_size == blob.bytes else f"is cut ({path})"

    def glances(self, blobs: Iterable[Blob]) -> Mapping[str, str]:
        """Digest -> what is wrong with it, of many, at a quick look."""
        return {blob.digest: said for blob in blobs if (said := self.glance(blob))}

    def walk(self) -> Iterator[tuple[str, Blob]]:
        """Every stored file with its name, listed or not; nothing is hashed."""
        for path in sorted(self._root.glob("??/*")):
            if found := placed(path.relative_to(self._root).as_posix()):
                with suppress(FileNotFoundError):  # removed since
                    yield self._name(path), Blob(found[0], path.stat().st_size, found[1])

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

    def check(self, blob: Blob) -> None:
        """Hash the content again; raises Corrupt."""
        path = self.path(blob)
        try:
            _require_plain(path, blob.digest)
            found = hash_file(path)
        except FileNotFoundError:
            raise missing(path, blob.digest) from None
        if found.digest != blob.digest:
            raise changed(path, blob.digest)

    @contextmanager
    def held(self, blob: Blob) -> Iterator[Path]:
        """The content, hashed again, as a file that nobody may write to, while the block lasts; raises Corrupt."""
        yield self.local(blob)

    def local(self, blob: Blob) -> Path:
        """The file itself, after hashing it again; raises Corrupt."""
        self.check(blob)
        return self.path(blob)

    def copy(self, blob: Blob, target: Path) -> None:
        """A copy of the content that was hashed on its way, so what arrives is what was stored; raises Corrupt."""
        path = self.path(blob)
        try:
            _require_plain(path, blob.digest)
            read = path.open("rb")
        except FileNotFoundError:
            raise missing(path, blob.digest) from None
        with read, target.open("xb") as write:
            copied = stream(read, write)
        if copied.digest != blob.digest:
            target.unlink()
            raise changed(path, blob.digest)

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


def place(blob: Blob) -> str:
    """Where that content is under `blobs/sha256/`; raises Corrupt."""
    match = _DIGEST.fullmatch(blob.digest)
    if match is None:
        raise Corrupt(f"{blob.digest[:80]!r} is not a digest: expected sha256: and 64 hex digits")
    if blob.upload and not _UPLOAD.fullmatch(blob.upload):
        raise Corrupt(f"{blob.upload[:80]!r} is not an upload: expected 32 hex digits")
    return f"{match[1][:2]}/{match[1]}{'-' if blob.upload else ''}{blob.upload}"


def placed(name: str) -> tuple[str, str] | None:
    """The digest and the upload of what lies there under `blobs/sha256/`; None where `place` gives no such name."""
    match = _PLACE.fullmatch(name)
    return None if match is None else (f"sha256:{match[2]}", match[3] or "")


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
