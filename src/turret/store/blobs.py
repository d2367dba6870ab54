"""Content-addressed files in a folder (`Blobs`) or an object store (`Objects`), behind one interface (`Files`).

In a folder:

- `blobs/sha256/<first two hex digits>/<64 hex digits>-<upload>`: the bytes, read-only. They are written in `tmp/`,
  flushed to disk, then renamed, so a file under its final name is always whole. Users who may enter its folder may
  read it. The upload is the put that wrote it (`turret.store.uploads`); up to format 0005 names had none
- `tmp/`: files being written; after a kill, leftovers that nothing refers to
- a name is written once: it is not used again after its file was removed
- bytes are hashed again at each read, so a flipped bit is detected
- `catalog`: the id of the catalog that the files belong to, unless the catalog is in the same folder
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias, TypedDict

from turret.disk import NO_ROOM, clock_of, create, flush, make_below, permissions, sync
from turret.errors import Corrupt, StoreError, TurretError, require_package

OWNER = "catalog"
_CHUNK = 1 << 20
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_UPLOAD = re.compile(r"[0-9a-f]{32}", re.ASCII)
_PLACE = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})(?:-([0-9a-f]{32}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Blob:
    """The digest and size of some content. Two are equal if their content is."""

    digest: str  # "sha256:<hex>"
    bytes: int
    upload: str = field(default="", compare=False)  # which copy of the content; "" up to format 0005


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


class Blobs:
    """The content-addressed files of a folder. Names are paths under the root of the place, as errors show them."""

    def __init__(self, root: Path) -> None:
        self._folder = root
        self._root = root / "blobs" / "sha256"
        self._tmp = root / "tmp"
        self._created: set[Path] = set()

    def path(self, blob: Blob) -> Path:
        """The path of some content, existing or not."""
        return self._root / blob_path(blob)

    def put(self, source: Path, blob: Blob) -> None:
        """Store a copy of the file as `blob`; raises Corrupt if its content differs from `blob`."""
        final = self.path(blob)
        self._make(final.parent)
        with source.open("rb") as read, self._new_file(final, 0o444) as write:
            _require_same(stream(read, write), blob, source)

    def glance(self, blob: Blob) -> str | None:
        """A problem that is visible without hashing, or None."""
        path = self.path(blob)
        if not path.is_file():
            return f"is missing ({path})"
        return None if path.stat().st_size == blob.bytes else f"is cut ({path})"

    def glances(self, blobs: Iterable[Blob]) -> Mapping[str, str]:
        """Digest -> a problem that is visible without hashing, for those that have one."""
        return {blob.digest: problem for blob in blobs if (problem := self.glance(blob))}

    def walk(self) -> Iterator[tuple[str, Blob]]:
        """Name and content of every stored file, listed in the catalog or not. Hashes nothing."""
        for path in sorted(self._root.glob("??/*")):
            if found := parse_place(path.relative_to(self._root).as_posix()):
                with suppress(FileNotFoundError):  # removed in the meantime
                    yield self._name(path), Blob(found[0], path.stat().st_size, found[1])

    def leftovers(self) -> Iterator[tuple[str, int, float]]:
        """Name, bytes and time of last change of files that are being written, or whose writer was killed."""
        for path in sorted(self._tmp.glob("*")):
            with suppress(FileNotFoundError):
                found = path.lstat()
                yield self._name(path), found.st_size, found.st_mtime

    def clock(self) -> float:
        """The time by the clock of `leftovers`, which may differ from this machine's."""
        return clock_of(self._tmp)

    def remove(self, name: str) -> bool:
        """Remove a file by a name from `walk` or `leftovers`; False if it is gone already."""
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def owner(self) -> str | None:
        """The id of the catalog that the files belong to; a folder store names its own `turret.db`."""
        if (self._folder / "turret.db").exists():
            return f"of {self._folder / 'turret.db'}"
        try:
            return (self._folder / OWNER).read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return None

    def claim(self, identity: str) -> None:
        """Record that the files belong to the catalog with this id, unless another catalog was faster."""
        with self._new_file(self._folder / OWNER, 0o666, replaces=False) as file:
            file.write(identity.encode())

    def check(self, blob: Blob) -> None:
        """Hash the content again; raises Corrupt."""
        with self._open(blob) as read:
            found = stream(read, None)
        if found.digest != blob.digest:
            raise digest_mismatch(self.path(blob), blob.digest)

    @contextmanager
    def checked_file(self, blob: Blob) -> Iterator[Path]:
        """The content, hashed again, as a read-only file for the duration of the block; raises Corrupt."""
        yield self.local(blob)

    def local(self, blob: Blob) -> Path:
        """The content, hashed again, as a file for the lifetime of this object; raises Corrupt."""
        self.check(blob)
        return self.path(blob)

    def copy(self, blob: Blob, target: Path) -> None:
        """Copy the content to a new file `target`, hashing what was copied; raises Corrupt."""
        with self._open(blob) as read, target.open("xb") as write:
            copied = stream(read, write)
        if copied.digest != blob.digest:
            target.unlink()
            raise digest_mismatch(self.path(blob), blob.digest)

    def _open(self, blob: Blob) -> BinaryIO:
        """The stored file. Raises Corrupt if it is missing, or a link, pipe or device: a pipe would block."""
        path = self.path(blob)
        try:
            if not stat.S_ISREG(path.lstat().st_mode):  # Turret never writes one
                what = f"stored file {blob.digest} is not a regular file"
                raise Corrupt(f"{what}: restore {path} from a copy, or train again")
            return path.open("rb")
        except FileNotFoundError:
            raise missing_file(path, blob.digest) from None

    @contextmanager
    def _new_file(self, final: Path, mode: int, *, replaces: bool = True) -> Iterator[BinaryIO]:
        """A file that the block writes. It appears under its final name when it is on the disk.

        Args:
            replaces: whether it takes the place of a file that is there by then. Else that one stays; a disk without
                second names cannot tell, and replaces it.
        """
        self._make(self._tmp)
        temporary = self._tmp / uuid.uuid4().hex
        try:
            with create(temporary) as file:
                yield file
                flush(file)
            temporary.chmod(mode & permissions(final.parent))
            if replaces or not _link_if_new(temporary, final):
                os.replace(temporary, final)
            sync(final.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        """Create a folder once per process, with the permissions of its parent; a new root is private."""
        if folder not in self._created or not folder.is_dir():
            make_below(self._folder, folder)
        self._created.add(folder)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def blob_path(blob: Blob) -> str:
    """The path of some content under `blobs/sha256/`; raises Corrupt for a malformed digest or upload."""
    match = _DIGEST.fullmatch(blob.digest)
    if match is None:
        raise Corrupt(f"{blob.digest[:80]!r} is not a digest: expected sha256: and 64 hex digits")
    if blob.upload and not _UPLOAD.fullmatch(blob.upload):
        raise Corrupt(f"{blob.upload[:80]!r} is not an upload: expected 32 hex digits")
    return f"{match[1][:2]}/{match[1]}{'-' if blob.upload else ''}{blob.upload}"


def parse_place(name: str) -> tuple[str, str] | None:
    """The digest and upload of a path under `blobs/sha256/`; None if `blob_path` would not give that path."""
    match = _PLACE.fullmatch(name)
    return None if match is None else (f"sha256:{match[2]}", match[3] or "")


def digest_of(text: str) -> str:
    """The digest of a text in UTF-8: "sha256:<hex>"."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def hash_file(path: Path) -> Blob:
    """The digest and size of a file."""
    with path.open("rb") as file:
        return stream(file, None)


def stream(read: Readable, write: Writable | None) -> Blob:
    """Read to the end in chunks, write the same bytes to `write` if given, and return their digest and size."""
    digest, size = hashlib.sha256(), 0
    while chunk := read.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if write is not None:
            write.write(chunk)
    return Blob(f"sha256:{digest.hexdigest()}", size)


def missing_file(path: Path | str, digest: str) -> Corrupt:
    """The error for content that is not there."""
    return Corrupt(f"stored file {digest} is missing: restore {path} from a copy, or train again")


def digest_mismatch(path: Path | str, digest: str) -> Corrupt:
    """The error for content that does not match its digest."""
    return Corrupt(
        f"stored file {path} does not match its digest {digest[:19]}...: restore it from a copy, or train again"
    )


# --- in an object store -----------------------------------------------------------------------------------------------
# `Files` through fsspec.
#
# Under the prefix, as in a folder:
#
# - `blobs/sha256/<first two hex digits>/<64 hex digits>-<upload>`: the bytes. An object store has no rename and needs
#   none: an object appears when its upload is complete. Small content is one PUT of bytes that were hashed first.
#   Larger content is hashed while its parts are uploaded, and the upload is completed only if the hash matches the name
# - a request may arrive long after its process ended. No name is used for other content, or again after its removal
#   (`turret.store.uploads`), so a late request does no harm
# - `catalog`: the id of the catalog that the files belong to
# - bytes are hashed again at each read
# - no listing is cached, so changes of other processes are visible at once


PART = 8 << 20
_REFUSED = (errno.EINVAL, errno.EPERM, errno.EMSGSIZE, errno.ENOSYS, errno.ENAMETOOLONG)  # as s3fs translates answers
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")


class _Info(TypedDict):
    """What a listing has of an object."""

    size: int
    type: str  # "file" or "directory"


class _File(Protocol):
    """The methods of fsspec's AbstractBufferedFile that are used here."""

    closed: bool

    def read(self, size: int = ..., /) -> bytes: ...
    def write(self, data: bytes, /) -> int: ...
    def close(self) -> None: ...
    def commit(self) -> None: ...
    def discard(self) -> None: ...


class _FileSystem(Protocol):
    """The methods of fsspec's AbstractFileSystem that are used here."""

    def pipe_file(self, key: str, data: bytes, mode: str = ...) -> None: ...
    def exists(self, key: str) -> bool: ...
    def cat_file(self, key: str) -> bytes: ...
    def get_file(self, key: str, target: str) -> None: ...
    def rm_file(self, key: str) -> None: ...
    def info(self, key: str) -> _Info: ...
    def find(self, prefix: str, *, detail: bool) -> Mapping[str, _Info]: ...
    def open(self, key: str, mode: str, *, block_size: int, cache_type: str = ..., autocommit: bool = ...) -> _File: ...


class Objects:
    """The same as `Blobs` under a prefix of an object store. Nothing is requested before the first use.

    Args:
        connect: makes the fsspec filesystem; called again after a fork, which no connection survives.
        part: bytes of a part of an upload; smaller content is one PUT.
    """

    def __init__(self, url: str, connect: Callable[[], _FileSystem] | None = None, *, part: int = PART) -> None:
        self._url = url
        self._part = part
        self._prefix = url.partition("://")[2]
        self._connect = connect or (lambda: _s3(url))
        self._connected: tuple[int, _FileSystem] | None = None
        self._copies: Path | None = None

    def put(self, source: Path, blob: Blob) -> None:
        key = self._key(blob)
        if blob.bytes < self._part:
            data = source.read_bytes()
            _require_same(Blob(f"sha256:{hashlib.sha256(data).hexdigest()}", len(data)), blob, source)
            with self._system() as system:
                system.pipe_file(key, data)
        else:
            self._put_in_parts(source, blob, key)

    def glance(self, blob: Blob) -> str | None:
        return self._problem(self._size(self._key(blob)), blob)

    def glances(self, blobs: Iterable[Blob]) -> Mapping[str, str]:
        """Digest -> a problem that is visible without hashing; needs one listing."""
        sizes = {(blob.digest, blob.upload): blob.bytes for _, blob in self.walk()}
        checked = ((blob, self._problem(sizes.get((blob.digest, blob.upload)), blob)) for blob in blobs)
        return {blob.digest: problem for blob, problem in checked if problem}

    def check(self, blob: Blob) -> None:
        key = self._key(blob)
        with (
            self._system(blob) as system,
            closing(system.open(key, "rb", block_size=self._part, cache_type="readahead")) as read,
        ):
            found = stream(read, None)
        if found.digest != blob.digest:
            raise digest_mismatch(self._url_of(key), blob.digest)

    def copy(self, blob: Blob, target: Path) -> None:
        key = self._key(blob)
        with target.open("xb"):
            pass
        try:
            with self._system(blob) as system:
                system.get_file(key, str(target))
            if hash_file(target).digest != blob.digest:
                raise digest_mismatch(self._url_of(key), blob.digest)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    @contextmanager
    def checked_file(self, blob: Blob) -> Iterator[Path]:
        """A copy of the content, hashed, for the duration of the block; raises Corrupt."""
        with tempfile.TemporaryDirectory(prefix="turret-") as folder:
            self.copy(blob, Path(folder) / "content")
            yield Path(folder) / "content"

    def local(self, blob: Blob) -> Path:
        """A copy of the content, hashed, that is removed together with this object; raises Corrupt."""
        if self._copies is None:
            self._copies = Path(tempfile.mkdtemp(prefix="turret-"))
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        temporary, copy = self._copies / uuid.uuid4().hex, self._copies / blob_path(blob).rpartition("/")[2]
        self.copy(blob, temporary)
        os.replace(temporary, copy)
        return copy

    def walk(self) -> Iterator[tuple[str, Blob]]:
        with self._system() as system:
            found = system.find(f"{self._prefix}/blobs/sha256", detail=True)
        for key in sorted(found):
            name = key.strip("/").removeprefix(f"{self._prefix}/")
            if match := parse_place(name.removeprefix("blobs/sha256/")):
                yield name, Blob(match[0], found[key]["size"], match[1])

    def leftovers(self) -> Iterator[tuple[str, int, float]]:
        """Yield nothing: listings do not show parts of an unfinished upload, which a rule of the bucket removes."""
        yield from ()

    def clock(self) -> float:
        """This machine's, because there are no leftovers."""
        return time.time()

    def remove(self, name: str) -> bool:
        if self._size(f"{self._prefix}/{name}") is None:
            return False
        with self._system() as system, suppress(FileNotFoundError):
            system.rm_file(f"{self._prefix}/{name}")
            return True
        return False

    def owner(self) -> str | None:
        with self._system() as system, suppress(FileNotFoundError):
            return system.cat_file(f"{self._prefix}/{OWNER}").decode("ascii", "replace").strip()
        return None

    def claim(self, identity: str) -> None:
        key, data = f"{self._prefix}/{OWNER}", identity.encode()
        with self._system() as system:
            try:
                system.pipe_file(key, data, mode="create")
            except OSError:
                if not system.exists(key):  # a server without conditional writes
                    system.pipe_file(key, data)

    # --- private ------------------------------------------------------------------------------------------------------

    def _put_in_parts(self, source: Path, blob: Blob, key: str) -> None:
        with self._system() as system, source.open("rb") as read:
            upload = system.open(key, "wb", block_size=self._part, autocommit=False)
            try:
                copied = stream(read, upload)
                upload.close()  # uploads the last part; the object does not exist yet
                _require_same(copied, blob, source)
                upload.commit()
            except BaseException:
                with suppress(Exception):  # otherwise a rule of the bucket removes the parts
                    upload.closed = True  # an open file would send the rest when it is garbage-collected
                    upload.discard()
                raise

    def _size(self, key: str) -> int | None:
        with self._system() as system, suppress(FileNotFoundError):
            found = system.info(key)
            return found["size"] if found["type"] == "file" else None
        return None

    def _key(self, blob: Blob) -> str:
        return f"{self._prefix}/blobs/sha256/{blob_path(blob)}"

    def _problem(self, size: int | None, blob: Blob) -> str | None:
        where = self._url_of(self._key(blob))
        if size is None:
            return f"is missing ({where})"
        return None if size == blob.bytes else f"is cut ({where})"

    def _url_of(self, key: str) -> str:
        return f"{self._url}{key.removeprefix(self._prefix)}"

    @contextmanager
    def _system(self, blob: Blob | None = None) -> Iterator[_FileSystem]:
        """The filesystem. Its libraries raise many kinds of errors; all become a StoreError of one line.

        Args:
            blob: the content that is read; if it is not there, Corrupt is raised.
        """
        try:
            if self._connected is None or self._connected[0] != os.getpid():
                self._connected = (os.getpid(), self._connect())
            yield self._connected[1]
        except TurretError:
            raise
        except Exception as error:
            if blob is not None and isinstance(error, FileNotFoundError):
                raise missing_file(self._url_of(self._key(blob)), blob.digest) from None
            text, wrong = _describe(error), _is_wrong(error)
            raise StoreError(f"files {self._url}: {text}", outage=not wrong) from error


Files: TypeAlias = Blobs | Objects


def _s3(url: str) -> _FileSystem:
    with require_package(f"files {url}: S3", "s3fs", "pip install 'turret[s3]'", StoreError):
        from turret.store.s3 import S3
    return S3()


def _link_if_new(path: Path, name: Path) -> bool:
    """Give a file a second name, unless a file has it. False on disks that have no second names."""
    try:
        os.link(path, name)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def _require_same(found: Blob, expected: Blob, source: Path) -> None:
    if found != expected:
        raise Corrupt(f"{source} changed while it was being stored: try again when nothing writes to it")


def _is_wrong(error: Exception) -> bool:
    """Whether the settings are wrong, or this machine fails: an error that does not pass when the server answers."""
    if isinstance(error, PermissionError | FileNotFoundError) or type(error).__name__ in _NO_CREDENTIALS:
        return True
    return isinstance(error, OSError) and (error.filename is not None or error.errno in (*NO_ROOM, *_REFUSED))


def _describe(error: Exception) -> str:
    reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
    if type(error).__name__ in _NO_CREDENTIALS:
        return f"{reason}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, PermissionError):
        return f"{reason}: these credentials lack the permission; check the policy of the bucket"
    if "NoSuchBucket" in reason or "bucket does not exist" in reason:
        return f"{reason}: create the bucket, or correct the URL"
    if type(error).__name__ in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError"):
        return f"cannot be reached ({reason}): check the network and AWS_ENDPOINT_URL"
    if isinstance(error, TimeoutError) or type(error).__name__ in ("Silent", "ReadTimeoutError"):
        return f"does not answer ({reason}): check the network and AWS_ENDPOINT_URL, and try again"
    return f"{reason}: nothing was listed; try again"
