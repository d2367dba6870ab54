"""Copy an adapter's files from a folder, an archive or the Hub.

Only the adapter's three files are copied, and links are not followed, so the files that are checked later are the files
that are stored.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub

from turret.bundles.archive import ENDINGS, is_archive, unpack
from turret.bundles.bundle import FILES, PICKLES, WEIGHTS, refuse_foreign_files
from turret.errors import BundleError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_EXPECTED = f"expected a folder with {WEIGHTS}, such a folder packed as {', '.join(ENDINGS)}, or a Hub id"
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]{0,60}", re.ASCII)


@dataclass(frozen=True)
class Fetched:
    """A copy of an adapter's files."""

    folder: Path
    revision: str | None = None  # the commit, if they are from the Hub


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
    if not _HUB_ID.fullmatch(source) or ".." in source:
        raise BundleError(f"adapter {_short(source)} is not there: {_EXPECTED}")
    return _from_hub(source, target, download)


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
