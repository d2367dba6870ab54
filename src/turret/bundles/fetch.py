"""Copy an adapter's files from a folder, an archive or the Hub.

Only the adapter's three files are copied, and links are not followed, so the files that are checked later are the files
that are stored.
"""

from __future__ import annotations

import gzip
import logging
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Protocol, Self

import httpx2
import huggingface_hub
from huggingface_hub import errors as hub
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from turret.bundles.bundle import CONFIG, FILES, MAX_FILE, MAX_JSON, PICKLES, WEIGHTS, refuse_foreign_files
from turret.disk import FAILING, NO_ROOM
from turret.errors import BundleError, HubError, one_line

# --- archive ----------------------------------------------------------------------------------------------------------
# Unpack a bundle or a PEFT folder from a zip, tar or tar.gz. Only an adapter's three files are unpacked.
#
# The name, type and size of every member are checked. The three files are streamed into files that are named here, so
# an archive cannot choose where they are written.
#
# Limits: 1,000 members; names of 200 characters; 16 GiB unpacked, and 100 times the archive's size (beyond 8 MiB).


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
        if isinstance(error, OSError) and error.errno in (*NO_ROOM, *FAILING):  # the disk's error
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


# --- the Hub ----------------------------------------------------------------------------------------------------------
# The token is huggingface_hub's own: HF_TOKEN, or what `hf auth login` stored. It is never part of an error. A Hub that
# does not answer is given up after `PATIENCE` seconds.


PATIENCE = 15.0  # seconds without an answer
ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_id(hub_id: str) -> str:
    """The id of a repository. Raises HubError unless it is OWNER/NAME."""
    if not ID.fullmatch(hub_id) or ".." in hub_id or "--" in hub_id:
        raise HubError(f"{one_line(hub_id, 60)!a} is no id of the Hub: expected OWNER/NAME, such as me/sentiment")
    return hub_id


def newest_commit(hub_id: str, revision: str | None) -> str:
    """The commit of a branch, a tag or a commit; None: of the main branch.

    Raises:
        HubError: there is no such repository or revision, or the Hub cannot be reached (`unreachable` is True).
    """
    with bounded_requests(), plain_errors(hub_id):
        info = huggingface_hub.HfApi().model_info(hub_id, revision=revision, timeout=PATIENCE)
        return str(info.sha)


@contextmanager
def bounded_requests() -> Iterator[None]:
    """In the block no request of huggingface_hub waits longer than PATIENCE, and it prints nothing."""
    session, shown, level = huggingface_hub.get_session(), not are_progress_bars_disabled(), hub_logging.get_verbosity()
    before = session.timeout
    session.timeout = httpx2.Timeout(PATIENCE)
    hub_logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        session.timeout = before
        hub_logging.set_verbosity(level)
        if shown:
            enable_progress_bars()


@contextmanager
def plain_errors(hub_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError of one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        cause: Exception = error
        while isinstance(cause, RuntimeError) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__  # huggingface_hub wraps what an upload raises
        raise _plain(hub_id, cause) from None


def _plain(hub_id: str, error: Exception) -> HubError:
    if isinstance(error, (hub.GatedRepoError, hub.DisabledRepoError)):
        return HubError(f"{hub_id}: the Hub denies access: accept its licence there, and log in with `hf auth login`")
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(f"{hub_id} has no such revision on the Hub: name one of its branches, tags or commits")
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        return HubError(_refusal(hub_id, status), unreachable=status >= 500)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return HubError(f"{hub_id}: HF_HUB_OFFLINE is set, so the Hub is not asked: unset it", unreachable=True)
    if isinstance(error, httpx2.TimeoutException):
        return HubError(f"{hub_id}: the Hub did not answer for {PATIENCE:g} seconds: try again later", unreachable=True)
    if isinstance(error, httpx2.HTTPError):
        return HubError(f"{hub_id}: the Hub cannot be reached ({type(error).__name__}): try again", unreachable=True)
    return HubError(f"{hub_id}: {one_line(str(error), 160)}: check the id, and try again")


def _refusal(hub_id: str, status: int) -> str:
    """The error for an answer of the Hub, in words of our own: the answer may repeat what was sent."""
    if status == 401:
        return f"{hub_id} is not there, or wants a token: check the name, log in with `hf auth login` or set HF_TOKEN"
    if status == 403:
        return f"{hub_id}: the token may not write there: use one with write access, or an owner that is yours"
    if status == 404:
        return f"{hub_id} is not on the Hub, or the token may not see it: check the name, or use `hf auth login`"
    if status in (409, 412):
        return f"{hub_id} was changed by another push at the same time: try again"
    if status == 429:
        return f"{hub_id}: the Hub has too many requests from here: wait a few minutes, and try again"
    return f"{hub_id}: the Hub answered {status}: try again later"


# --- fetch ------------------------------------------------------------------------------------------------------------


_EXPECTED = f"expected a folder with {WEIGHTS}, such a folder packed as {', '.join(ENDINGS)}, or a Hub id"
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]{0,60}", re.ASCII)


@dataclass(frozen=True)
class Fetched:
    """A copy of an adapter's files."""

    folder: Path
    revision: str | None = None  # the commit, if they are from the Hub
    note: str | None = None  # what the user should know of where they came from


def fetch(source: str, parent: Path, *, download: Callable[..., str] = huggingface_hub.snapshot_download) -> Fetched:
    """Copy the adapter at `source` into a new folder in `parent`.

    Args:
        source: a folder, an archive or a Hub id.

    Raises:
        BundleError: there is no adapter at `source`, or it is not accepted.
    """
    if not source.strip() or "\0" in source:
        raise BundleError(f"adapter {_short(source)} is not there: {_EXPECTED}")
    path = Path(source).expanduser()
    name = path.name if _PLAIN.fullmatch(path.name) else "adapter"
    target = parent / name
    if os.path.isdir(path):  # unlike Path.is_dir, it accepts names of any length
        refuse_foreign_files(path)
        _copy(path, target)
        return Fetched(target)
    if os.path.isfile(path):
        if is_archive(path.name):
            unpack(path, target)
            return Fetched(target)
        if path.name.lower().endswith(PICKLES):
            raise BundleError(f"{_short(source)} is a pickle, which is never opened: save the adapter as safetensors")
        raise BundleError(f"{_short(source)} is a file: {_EXPECTED}")
    if not ID.fullmatch(source) or ".." in source:
        raise BundleError(f"adapter {_short(source)} is not there: {_EXPECTED}")
    return _from_hub(source, target, download)


def pull(
    hub_id: str,
    parent: Path,
    revision: str | None = None,
    *,
    newest: Callable[[str, str | None], str] = newest_commit,
    download: Callable[..., str] = huggingface_hub.snapshot_download,
) -> Fetched:
    """Copy the adapter in a repository of the Hub into a new folder in `parent`.

    Without the Hub, the copy in its cache is taken, and a note says so.

    Args:
        revision: a branch, a tag or a commit; default: the main branch.

    Raises:
        HubError: there is no such repository or revision, or neither the Hub nor its cache has it.
        BundleError: it holds no adapter.
    """
    target = parent / "adapter"
    try:
        commit = newest(check_id(hub_id), revision)
    except HubError as error:
        if not error.unreachable:
            raise
        try:
            with bounded_requests():
                found = _from_hub(hub_id, target, partial(download, revision=revision, local_files_only=True))
        except BundleError:
            raise error from None
        return replace(found, note=f"{error}; this is the copy in the Hub's cache, commit {found.revision}")
    with bounded_requests():
        found = _from_hub(hub_id, target, partial(download, revision=revision))
    if found.revision != commit:  # the library falls back to its cache without a word
        note = f"{hub_id}: the Hub stopped answering; this is the copy in its cache, commit {found.revision}"
        return replace(found, note=note)
    return found


def _from_hub(source: str, target: Path, download: Callable[..., str]) -> Fetched:
    try:
        folder = Path(download(source, allow_patterns=list(FILES)))
    except (hub.GatedRepoError, hub.DisabledRepoError):
        raise BundleError(
            f"adapter {source!r}: the Hub denies access: accept its licence there and log in with `hf auth login`"
        ) from None
    except hub.RepositoryNotFoundError:
        raise BundleError(
            f"adapter {source!r} is neither a folder here nor an adapter on the Hub that you may read: check its name"
        ) from None
    except (OSError, ValueError, hub.HfHubHTTPError):
        raise BundleError(
            f"adapter {source!r} is not a folder here, not in the Hub's cache, and the Hub cannot be reached: "
            "give a folder or an archive instead"
        ) from None
    if not (folder / WEIGHTS).is_file():
        raise BundleError(f"adapter {source!r} on the Hub has no {WEIGHTS}: only safetensors files are fetched")
    _copy(folder, target, links=True)  # the Hub's cache is made of links
    return Fetched(target, folder.name)


def _copy(folder: Path, target: Path, *, links: bool = False) -> None:
    target.mkdir(parents=True)
    for name in FILES:
        if not (folder / name).is_file():
            continue
        flags = os.O_RDONLY | (0 if links else getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(os.open(folder / name, flags), "rb") as read, (target / name).open("xb") as write:
            shutil.copyfileobj(read, write, 2**20)


def _short(source: str) -> str:
    shown = ascii(source)
    return shown if len(shown) <= 120 else f"{shown[:116]}…'"
