"""Unpack a bundle or a PEFT folder from a zip, tar or tar.gz. Only an adapter's three files are unpacked.

The name, type and size of every member are checked. The three files are streamed into files that are named here, so an
archive cannot choose where they are written.

Limits: 1,000 members; names of 200 characters; 16 GiB unpacked, and 100 times the archive's size (beyond 8 MiB).
"""

from __future__ import annotations

import gzip
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Protocol, Self

from turret.bundles.bundle import CONFIG, FILES, MAX_FILE, MAX_JSON, PICKLES, WEIGHTS
from turret.disk import FAILING, NO_ROOM
from turret.errors import BundleError

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_MEMBERS, MAX_NAME, MAX_RATIO, FLOOR = 1_000, 200, 100, 8 * 2**20
_PART = re.compile(r"[A-Za-z0-9._+=@,()][A-Za-z0-9._+=@,() -]*", re.ASCII)
_CHUNK = 2**20
_BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, ValueError, NotImplementedError)


def is_archive(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the adapter's files into `folder`, which is created. Raises BundleError if the archive is not accepted."""
    label = ascii(archive.name)[1:-1][:80]
    limit = min(MAX_FILE, max(FLOOR, MAX_RATIO * archive.stat().st_size))
    folder.mkdir(parents=True)
    try:
        if archive.name.lower().endswith(".zip"):
            found = _unzip(archive, folder, label, limit)
        else:
            found = _untar(archive, folder, label, limit)
    except RuntimeError as error:  # zipfile's, for an encrypted member
        raise BundleError(f"{label} cannot be unpacked ({error}): give it without a password") from None
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno in (
            *NO_ROOM,
            *FAILING,
        ):  # the disk's error
            raise
        if isinstance(error, OSError) and error.filename == str(archive):
            raise BundleError(f"{label} cannot be read ({error.strerror}): check its permissions") from None
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise BundleError(f"{label} cannot be unpacked ({reason}): pack it again as {', '.join(ENDINGS)}") from None
    _require_one(found, label)


def check_name(name: str, label: str) -> tuple[str, ...]:
    """The parts of a member's name. Raises BundleError unless it is a plain relative path."""
    shown = ascii(name)[1:-1][:60]
    if len(name) > MAX_NAME:
        raise BundleError(f"{label} has a member with a name of {len(name)} characters: the limit is {MAX_NAME}")
    parts = tuple(name.removesuffix("/").removeprefix("./").split("/"))
    for part in parts:
        if not _PART.fullmatch(part) or part in (".", "..") or part[-1] in ". ":
            if name in (".", "./"):
                return ()
            raise BundleError(
                f"{label} has a member called {shown!r}: expected a plain relative path of letters, digits and ._-"
            )
    return parts


class _Members:
    """The members so far, checked for number, names and duplicates."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.names: set[str] = set()
        self.count = 0
        self.found: list[tuple[str, ...]] = []

    def admit(self, name: str, *, folder: bool) -> str | None:
        """The name under which to unpack a member, or None to skip it. Raises BundleError for an odd member."""
        self.count += 1
        if self.count > MAX_MEMBERS:
            raise BundleError(f"{self.label} has more than {MAX_MEMBERS} members: expected an adapter")
        parts = check_name(name, self.label)
        key = "/".join(parts).casefold()
        if not folder and key in self.names:
            raise BundleError(f"{self.label} has two members called {key[:60]!r} (ignoring case): pack it again")
        self.names.add(key)
        if folder or not parts:
            return None
        last = parts[-1]
        if last.casefold() in FILES and last not in FILES:
            raise BundleError(f"{self.label} holds {last!r}: expected {last.casefold()}, in lower case")
        self.found.append(parts)
        return last if last in FILES and len(parts) <= 2 else None


def _require_one(found: list[tuple[str, ...]], label: str) -> None:
    """Raises BundleError unless the archive has one adapter, at the top or in one folder."""
    files = [parts for parts in found if parts[-1] in FILES and len(parts) <= 2]
    if len({parts[:-1] for parts in files}) > 1:
        raise BundleError(f"{label} holds several adapters: expected one; pack each one alone")
    names = {parts[-1] for parts in files}
    if WEIGHTS not in names:
        pickles = [parts[-1] for parts in found if parts[-1].lower().endswith(PICKLES)]
        note = f"; {pickles[0]} is a pickle, which is never opened" if pickles else ""
        raise BundleError(f"{label} holds no {WEIGHTS}{note}: save the adapter as safetensors")
    if CONFIG not in names:
        raise BundleError(f"{label} holds no {CONFIG}: expected a bundle or a PEFT folder")


def _unzip(archive: Path, folder: Path, label: str, limit: int) -> list[tuple[str, ...]]:
    members, total = _Members(label), 0
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist()[: MAX_MEMBERS + 1]:
            name = member.orig_filename  # `filename` ends at a NUL
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise BundleError(f"{label} holds a link or a device, {ascii(name)[1:61]}: expected plain files")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BundleError(f"{label} uses compression method {member.compress_type}: expected deflate or none")
            total += member.file_size
            if total > limit:
                raise _bomb(label, limit)
            target = members.admit(name, folder=name.endswith("/"))
            if target is not None:
                with opened.open(member) as stream:
                    _write(stream, folder / target, label)
    return members.found


def _untar(archive: Path, folder: Path, label: str, limit: int) -> list[tuple[str, ...]]:
    members = _Members(label)
    with archive.open("rb") as raw:
        packed = not archive.name.lower().endswith(".tar")
        stream = _Limited(gzip.GzipFile(fileobj=raw) if packed else raw, limit, label)
        # A stream of tarfile needs read() alone; typeshed wants more.
        with closing(tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header)) as opened:  # type: ignore[call-overload]
            for member in _headers(opened):
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise BundleError(
                        f"{label} holds a link or a device, {ascii(member.name)[1:61]}: expected plain files"
                    )
                target = members.admit(member.name, folder=member.isdir())
                if target is not None:
                    content = opened.extractfile(member)
                    assert content is not None
                    _write(content, folder / target, label)
    return members.found


def _headers(opened: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := opened.next()) is not None:
        yield member
        opened.members = []  # type: ignore[attr-defined]  # not in typeshed; tarfile would keep every header in memory


class _Header(tarfile.TarInfo):
    """A header of limited size: tarfile would read one of any size into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in (b"x", b"g", b"X", b"L", b"K") and header.size > 64 * 1024:
            raise BundleError(f"the archive has a header of {header.size} bytes: pack it again")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise BundleError("the archive holds a sparse file: expected plain files; pack it again")
        return header


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Limited:
    """A stream that raises BundleError after `limit` bytes."""

    def __init__(self, stream: _Readable, limit: int, label: str) -> None:
        self.stream, self.left, self.limit, self.label = stream, limit, limit, label

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise _bomb(self.label, self.limit)
        return data


def _bomb(label: str, limit: int) -> BundleError:
    return BundleError(f"{label} unpacks to more than {limit} bytes, too many for its size: pack it again")


def _write(stream: IO[bytes], path: Path, label: str) -> None:
    left = limit = MAX_FILE if path.name == WEIGHTS else MAX_JSON
    if path.exists():
        raise BundleError(f"{label} holds several adapters: expected one; pack each one alone")
    with path.open("xb") as file:
        while chunk := stream.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise BundleError(f"{label} holds a {path.name} of more than {limit} bytes: fetch it again")
            file.write(chunk)
