"""Files known by the sha256 of their bytes, in an object store through fsspec. Refuses to know names and versions.

Under the prefix, as in a folder (`turret.store.blobs`):

- `blobs/sha256/<first two hex digits>/<64 hex digits>-<upload>`: the bytes. An object store has no rename and needs
  none: an object is there whole once its upload is complete, and not at all before. Small content is one PUT of bytes
  that were hashed; larger content goes up in parts as it is hashed, and is completed only where the hash is the one in
  the name
- a request may arrive long after its process gave up or ended. No name is used for other content, nor again after it
  was removed (`turret.store.uploads`), so a late request harms nothing
- `catalog`: the id of the catalog that the files belong to
- bytes are hashed again whenever they are read
- no list of objects is remembered: what another process put or removed is seen at once
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from turret.errors import Corrupt, StoreError, TurretError
from turret.store.blobs import OWNER, Blob, changed, hash_file, missing, place, placed, stream

PART = 8 << 20


class Objects:
    """The content-addressed files under a prefix of an object store; nothing is asked before the first use.

    connect: makes the fsspec filesystem; it is made anew after a fork, which none outlives.
    part: bytes of a part; what is smaller is one PUT.
    """

    def __init__(self, url: str, connect: Callable[[], Any] | None = None, *, part: int = PART) -> None:
        self._url = url
        self._part = part
        self._prefix = url.partition("://")[2]
        self._connect = connect or (lambda: _s3(url))
        self._made: tuple[int, Any] | None = None
        self._copies: Path | None = None

    def put(self, source: Path, blob: Blob) -> None:
        """Keep a copy of the file as `blob`; raises Corrupt where the file is not what `blob` says."""
        key = self._key(blob)
        if blob.bytes < self._part:
            data = source.read_bytes()
            _same(Blob(f"sha256:{hashlib.sha256(data).hexdigest()}", len(data)), blob, source)
            with self._told() as system:
                system.pipe_file(key, data)
        else:
            self._put_in_parts(source, blob, key)

    def glance(self, blob: Blob) -> str | None:
        """What is wrong at a quick look, which hashes nothing."""
        return self._said(self._size(self._key(blob)), blob)

    def glances(self, blobs: Iterable[Blob]) -> Mapping[str, str]:
        """Digest -> what is wrong with it, of many, at a quick look: one listing."""
        there = {(blob.digest, blob.upload): blob.bytes for _, blob in self.walk()}
        looked = ((blob, self._said(there.get((blob.digest, blob.upload)), blob)) for blob in blobs)
        return {blob.digest: said for blob, said in looked if said}

    def check(self, blob: Blob) -> None:
        """Hash the content again; raises Corrupt."""
        key = self._key(blob)
        with self._told() as system:
            try:
                with system.open(key, "rb", block_size=self._part, cache_type="readahead") as read:
                    found = stream(read, None)
            except FileNotFoundError:
                raise missing(self._shown(key), blob.digest) from None
        if found.digest != blob.digest:
            raise changed(self._shown(key), blob.digest)

    def copy(self, blob: Blob, target: Path) -> None:
        """A copy of the content that was hashed before it is handed on; raises Corrupt."""
        key = self._key(blob)
        with target.open("xb"):
            pass
        try:
            with self._told() as system:
                try:
                    system.get_file(key, str(target))
                except FileNotFoundError:
                    raise missing(self._shown(key), blob.digest) from None
            if hash_file(target).digest != blob.digest:
                raise changed(self._shown(key), blob.digest)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    @contextmanager
    def held(self, blob: Blob) -> Iterator[Path]:
        """The content, hashed, as a file that is there while the block lasts; raises Corrupt."""
        with tempfile.TemporaryDirectory(prefix="turret-") as folder:
            self.copy(blob, Path(folder) / "content")
            yield Path(folder) / "content"

    def local(self, blob: Blob) -> Path:
        """A copy, hashed, that goes when this object does; raises Corrupt."""
        if self._copies is None:
            self._copies = Path(tempfile.mkdtemp(prefix="turret-"))
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        beside, copy = self._copies / uuid.uuid4().hex, self._copies / place(blob).rpartition("/")[2]
        self.copy(blob, beside)
        os.replace(beside, copy)
        return copy

    def walk(self) -> Iterator[tuple[str, Blob]]:
        """Every stored object with its name, listed or not; nothing is hashed."""
        with self._told() as system:
            found = system.find(f"{self._prefix}/blobs/sha256", detail=True)
        for key in sorted(found):
            name = key.strip("/").removeprefix(f"{self._prefix}/")
            if match := placed(name.removeprefix("blobs/sha256/")):
                yield name, Blob(match[0], found[key]["size"], match[1])

    def leftovers(self) -> Iterator[tuple[str, int, float]]:
        """None that a listing shows: parts of an upload that never ended go by a rule of the bucket."""
        yield from ()

    def remove(self, name: str) -> bool:
        """Take away what `walk` named; False where it is gone already."""
        if self._size(f"{self._prefix}/{name}") is None:
            return False
        with self._told() as system:
            try:
                system.rm_file(f"{self._prefix}/{name}")
            except FileNotFoundError:
                return False
        return True

    def owner(self) -> str | None:
        """The id of the catalog that these files belong to."""
        with self._told() as system:
            try:
                return bytes(system.cat_file(f"{self._prefix}/{OWNER}")).decode("ascii", "replace").strip()
            except FileNotFoundError:
                return None

    def claim(self, identity: str) -> None:
        """Write down that they belong to that catalog."""
        with self._told() as system:
            system.pipe_file(f"{self._prefix}/{OWNER}", identity.encode())

    # --- the inside ---------------------------------------------------------------------------------------------------

    def _put_in_parts(self, source: Path, blob: Blob, key: str) -> None:
        with self._told() as system, source.open("rb") as read:
            upload = system.open(key, "wb", block_size=self._part, autocommit=False)
            try:
                copied = stream(read, upload)
                upload.close()  # every part is there, and nothing under the key
                _same(copied, blob, source)
                upload.commit()
            except BaseException:
                with suppress(Exception):  # the bucket's rule ends the upload where this cannot
                    upload.closed = True  # a file that is left open tries to send the rest when it is forgotten
                    upload.discard()
                raise

    def _size(self, key: str) -> int | None:
        with self._told() as system:
            try:
                found = system.info(key)
            except FileNotFoundError:
                return None
        return int(found["size"]) if found["type"] == "file" else None

    def _key(self, blob: Blob) -> str:
        return f"{self._prefix}/blobs/sha256/{place(blob)}"

    def _said(self, size: int | None, blob: Blob) -> str | None:
        where = self._shown(self._key(blob))
        if size is None:
            return f"is missing ({where})"
        return None if size == blob.bytes else f"is cut ({where})"

    def _shown(self, key: str) -> str:
        return f"{self._url}{key.removeprefix(self._prefix)}"

    @contextmanager
    def _told(self) -> Iterator[Any]:
        """The filesystem; what it complains of becomes one line. Its libraries raise whatever they like."""
        try:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), self._connect())
            yield self._made[1]
        except TurretError:
            raise
        except Exception as error:
            raise StoreError(f"files {self._url}: {_plainly(error)}") from error


def _s3(url: str) -> Any:
    try:
        from turret.store.s3 import S3
    except ImportError as error:
        raise StoreError(f"files {url}: S3 needs s3fs ({error}): pip install 'turret[s3]'") from None
    return S3()


def _same(found: Blob, wanted: Blob, source: Path) -> None:
    if found != wanted:
        raise Corrupt(f"{source} changed while it was being stored: try again when nothing writes to it")


def _plainly(error: Exception) -> str:
    reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return f"{reason}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, PermissionError):
        return f"{reason}: these credentials may not do this; look at the bucket's policy"
    if "NoSuchBucket" in reason or "bucket does not exist" in reason:
        return f"{reason}: make the bucket, or correct the URL"
    if type(error).__name__ in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError"):
        return f"cannot be reached ({reason}): check the network and AWS_ENDPOINT_URL"
    if isinstance(error, TimeoutError) or type(error).__name__ in ("Silent", "ReadTimeoutError"):
        return f"does not answer ({reason}): check the network and AWS_ENDPOINT_URL, and try again"
    return f"{reason}: nothing was listed; try again"
