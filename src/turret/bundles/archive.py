"""A bundle or a PEFT folder in one file: zip, tar, tar.gz. Only its known files are unpacked, into a folder of ours.

Nothing of an archive chooses where it is written: of every member the name, the kind and the size are checked, and the
bytes of the few that are wanted are streamed into files that are named here. Refuses to know what is inside them.

Limits: 1,000 members; a name of 200 characters; 16 GiB unpacked; 100 times the archive's own size (beyond 8 MiB).
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
from typing import IO, Any

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
    """Put the adapter's files, and no others, into `folder`, which is made. Raises BundleError in one line."""
    called = ascii(archive.name)[1:-1][:80]
    most = min(MAX_FILE, max(FLOOR, MAX_RATIO * archive.stat().st_size))
    folder.mkdir(parents=True)
    try:
        if archive.name.lower().endswith(".zip"):
            found = _unzip(archive, folder, called, most)
        else:
            found = _untar(archive, folder, called, most)
    except RuntimeError as error:  # zipfile, of an encrypted member
        raise BundleError(f"{called} cannot be unpacked ({error}): give it without a password") from None
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno in (*NO_ROOM, *FAILING):  # of the disk, not of what is in it
            raise
        if isinstance(error, OSError) and error.filename == str(archive):
            raise BundleError(f"{called} cannot be read ({error.strerror}): check its permissions") from None
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise BundleError(f"{called} cannot be unpacked ({reason}): pack it again as {', '.join(ENDINGS)}") from None
    _require_one(found, called)


def check_name(name: str, called: str) -> tuple[str, ...]:
    """The parts of a member's name; raises BundleError for one that could mean anything but a file below the top."""
    shown = ascii(name)[1:-1][:60]
    if len(name) > MAX_NAME:
        raise BundleError(f"{called} has a member with a name of {len(name)} characters: at most {MAX_NAME} are read")
    parts = tuple(name.removesuffix("/").removeprefix("./").split("/"))
    for part in parts:
        if not _PART.fullmatch(part) or part in (".", "..") or part[-1] in ". ":
            if name in (".", "./"):
                return ()
            raise BundleError(
                f"{called} has a member called {shown!r}: expected a plain relative path of letters, digits and ._-"
            )
    return parts


class _Seen:
    """The members so far: counted, told apart in any case, and those that are wanted remembered."""

    def __init__(self, called: str) -> None:
        self.called = called
        self.names: set[str] = set()
        self.count = 0
        self.found: list[tuple[str, ...]] = []

    def admit(self, name: str, *, folder: bool) -> str | None:
        """What the member is to be called in our folder, or None where it is not wanted."""
        self.count += 1
        if self.count > MAX_MEMBERS:
            raise BundleError(f"{self.called} has more than {MAX_MEMBERS} members: this is no adapter")
        parts = check_name(name, self.called)
        key = "/".join(parts).casefold()
        if not folder and key in self.names:
            raise BundleError(f"{self.called} has two members called {key[:60]!r} (in any case): pack it again")
        self.names.add(key)
        if folder or not parts:
            return None
        last = parts[-1]
        if last.casefold() in FILES and last not in FILES:
            raise BundleError(f"{self.called} holds {last!r}: expected {last.casefold()}, in small letters")
        self.found.append(parts)
        return last if last in FILES and len(parts) <= 2 else None


def _require_one(found: list[tuple[str, ...]], called: str) -> None:
    """One adapter, at the top or in the one folder there; a pickle in its place is named."""
    wanted = [parts for parts in found if parts[-1] in FILES and len(parts) <= 2]
    if len({parts[:-1] for parts in wanted}) > 1:
        raise BundleError(f"{called} holds several adapters: expected one; pack each by itself")
    names = {parts[-1] for parts in wanted}
    if WEIGHTS not in names:
        pickles = [parts[-1] for parts in found if parts[-1].lower().endswith(PICKLES)]
        also = f"; {pickles[0]} is a pickle, which is never opened" if pickles else ""
        raise BundleError(f"{called} holds no {WEIGHTS}{also}: save the adapter as safetensors")
    if CONFIG not in names:
        raise BundleError(f"{called} holds no {CONFIG}: expected a bundle or a PEFT folder")


def _unzip(archive: Path, folder: Path, called: str, most: int) -> list[tuple[str, ...]]:
    seen, total = _Seen(called), 0
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        for member in members[: MAX_MEMBERS + 1]:
            name = member.orig_filename  # `filename` ends at a NUL
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise BundleError(f"{called} holds a link or a device, {ascii(name)[1:61]}: expected plain files")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BundleError(f"{called} is packed by method {member.compress_type}: expected deflate or none")
            total += member.file_size
            if total > most:
                raise _bomb(called, most)
            wanted = seen.admit(name, folder=name.endswith("/"))
            if wanted is not None:
                with opened.open(member) as stream:
                    _write(stream, folder / wanted, called)
    return seen.found


def _untar(archive: Path, folder: Path, called: str, most: int) -> list[tuple[str, ...]]:
    seen = _Seen(called)
    with archive.open("rb") as raw:
        packed = not archive.name.lower().endswith(".tar")
        stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
        counted: Any = _Counted(stream, most, called)
        with closing(tarfile.open(fileobj=counted, mode="r|", tarinfo=_Member)) as opened:
            for member in _members(opened):
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise BundleError(
                        f"{called} holds a link or a device, {ascii(member.name)[1:61]}: expected plain files"
                    )
                wanted = seen.admit(member.name, folder=member.isdir())
                if wanted is not None:
                    content = opened.extractfile(member)
                    assert content is not None
                    _write(content, folder / wanted, called)
    return seen.found


def _members(opened: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := opened.next()) is not None:
        yield member
        opened.members = []  # type: ignore[attr-defined]  # or it keeps every one


class _Member(tarfile.TarInfo):
    """A header that does not make the reader hold a long one in memory."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        made = super().frombuf(buf, encoding, errors)
        if made.type in (b"x", b"g", b"X", b"L", b"K") and made.size > 64 * 1024:
            raise BundleError(f"the archive has a header of {made.size} bytes: pack it again")
        if made.type == tarfile.GNUTYPE_SPARSE:
            raise BundleError("the archive holds a sparse file: pack it again without")
        return made


class _Counted:
    """A stream that ends in an error once it has given more than it may."""

    def __init__(self, stream: IO[bytes], most: int, called: str) -> None:
        self.stream, self.left, self.most, self.called = stream, most, most, called

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise _bomb(self.called, self.most)
        return data


def _bomb(called: str, most: int) -> BundleError:
    return BundleError(f"{called} unpacks to more than {most} bytes, which no adapter of its size does: pack it again")


def _write(stream: IO[bytes], path: Path, called: str) -> None:
    left = MAX_FILE if path.name == WEIGHTS else MAX_JSON
    if path.exists():
        raise BundleError(f"{called} holds several adapters: expected one; pack each by itself")
    with path.open("xb") as file:
        while chunk := stream.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise BundleError(f"{called} holds a {path.name} that is larger than is read: fetch it again")
            file.write(chunk)
