"""An adapter from outside, brought into a folder of ours: from a folder, an archive or the Hub.

Only the adapter's own three files are copied, never through a link, so what is checked afterwards is what is kept.
Refuses to know what is in them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub

from turret.bundles.archive import ENDINGS, is_archive, unpack
from turret.bundles.bundle import FILES, PICKLES, WEIGHTS, refuse_foreign_files
from turret.errors import BundleError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]{0,60}", re.ASCII)


@dataclass(frozen=True)
class Brought:
    """A copy of an adapter's files, and the commit where they are the Hub's."""

    folder: Path
    revision: str | None = None


def bring(source: str, beside: Path, *, download: Callable[..., str] = huggingface_hub.snapshot_download) -> Brought:
    """Copy what `source` names into a new folder in `beside`. Raises BundleError in one line."""
    if not source.strip() or "\0" in source:
        raise BundleError(f"adapter {_short(source)} is not there: {_EXPECTED}")
    path = Path(source).expanduser()
    name = path.name if _PLAIN.fullmatch(path.name) else "adapter"
    target = beside / name
    if os.path.isdir(path):  # unlike Path's, it bears any name, however long
        refuse_foreign_files(path)
        _copy(path, target)
        return Brought(target)
    if os.path.isfile(path):
        if is_archive(path.name):
            unpack(path, target)
            return Brought(target)
        if path.name.lower().endswith(PICKLES):
            raise BundleError(f"{_short(source)} is a pickle, which is never opened: save the adapter as safetensors")
        raise BundleError(f"{_short(source)} is a file: {_EXPECTED}")
    if not _HUB_ID.fullmatch(source) or ".." in source:
        raise BundleError(f"adapter {_short(source)} is not there: {_EXPECTED}")
    return _from_hub(source, target, download)


_EXPECTED = f"expected a folder with {WEIGHTS}, such a folder packed as {', '.join(ENDINGS)}, or a Hub id"


def _from_hub(source: str, target: Path, download: Callable[..., Any]) -> Brought:
    try:
        folder = Path(download(source, allow_patterns=list(FILES)))
    except (hub.GatedRepoError, hub.DisabledRepoError):
        raise BundleError(
            f"adapter {source!r}: the Hub refuses it to you: accept its licence there and log in with `hf auth login`"
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
        raise BundleError(f"adapter {source!r} on the Hub has no {WEIGHTS}: only safetensors is fetched, no pickle")
    _copy(folder, target, links=True)  # the Hub's cache is made of links
    return Brought(target, folder.name)


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
