"""Copy an adapter's files from a folder, an archive or the Hub.

Only the adapter's three files are copied, and links are not followed, so the files that are checked later are the files
that are stored.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub

from turret.bundles.archive import ENDINGS, is_archive, unpack
from turret.bundles.bundle import FILES, PICKLES, WEIGHTS, refuse_foreign_files
from turret.bundles.hub import ID, bounded, check_id, newest
from turret.errors import BundleError, HubError

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
    newest: Callable[[str, str | None], str] = newest,
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
            with bounded():
                found = _from_hub(hub_id, target, partial(download, revision=revision, local_files_only=True))
        except BundleError:
            raise error from None
        return replace(found, note=f"{error}; this is the copy in the Hub's cache, commit {found.revision}")
    with bounded():
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
