"""A bundle that is offered to the store: read its manifest, and check its files against it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from turret.errors import BundleError
from turret.json_types import JsonMapping, JsonObject
from turret.store.blobs import Blob, hash_file
from turret.store.catalog import plain_path

MANIFEST = "manifest.json"
_LIMIT = 16 << 20  # bytes; a manifest has a few thousand


def read(bundle: Path) -> tuple[JsonObject, dict[str, Path]]:
    """Read the manifest of a bundle.

    Returns:
        The manifest, and the files that it names by their path in the bundle, with the manifest itself.

    Raises:
        BundleError: the manifest or a file is missing, foreign or unsafe.
    """
    path = bundle / MANIFEST
    try:
        if _plain_file(path).st_size > _LIMIT:
            raise BundleError(f"{path} is larger than {_LIMIT} bytes: this is not a bundle that turret wrote")
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{bundle} is not a bundle: {MANIFEST}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("digest"), str) or "files" not in manifest:
        raise BundleError(f"{path} lacks 'digest' or 'files': this is not a bundle that turret wrote")
    named = [MANIFEST, *manifest["files"]]
    for name in named:
        if not plain_path(name):
            raise BundleError(f"{path} names {name!r}: expected relative paths inside the bundle")
        try:
            _plain_file(bundle / name)
        except OSError as error:
            raise BundleError(f"{path} names {name!r}: {error.strerror}") from error
    return manifest, {name: bundle / name for name in named}


def _plain_file(path: Path) -> os.stat_result:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path} is not a regular file: links and devices are not stored")
    return found


def hashed(manifest: JsonMapping, paths: Mapping[str, Path]) -> dict[str, Blob]:
    """Path in the bundle -> digest and size; raises BundleError if a digest differs from the manifest."""
    try:
        content = {name: hash_file(path) for name, path in paths.items()}
    except OSError as error:
        raise BundleError(f"{error.filename} cannot be read: {error.strerror}") from error
    for name, entry in manifest["files"].items():
        if entry.get("sha256") != content[name].digest.removeprefix("sha256:"):
            raise BundleError(f"{paths[name]} does not match the digest in {MANIFEST}: the bundle was changed")
    return content
