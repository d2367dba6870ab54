"""Cache the fingerprints of weight files, because hashing gigabytes takes seconds at every start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import transformers

from turret.cache import cache_folder, write_beside
from turret.disk import FAILING, describe_error
from turret.errors import BaseModelError
from turret.fingerprint import FORMAT


def read(files: Sequence[Path]) -> str | None:
    """The cached fingerprint of these weight files; None if there is none, or if a file changed since."""
    try:
        record = json.loads(_record(files).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = record.get("fingerprint") if isinstance(record, dict) else None
    return value if isinstance(value, str) and value.startswith("sha256:") else None


def write(files: Sequence[Path], value: str) -> None:
    """Cache a fingerprint. A cache that cannot be written is not an error, but a failing disk is.

    Raises:
        BaseModelError: the disk failed.
    """
    try:
        write_beside(_record(files), json.dumps({"fingerprint": value, "files": [str(file) for file in files]}))
    except OSError as error:
        if error.errno in FAILING:
            raise BaseModelError(
                f"the cache cannot be written: {describe_error(error, cache_folder())}; "
                "set TURRET_CACHE to another disk"
            ) from error


def _record(files: Sequence[Path]) -> Path:
    # Inode and ctime too, because a copy can keep the other times (cp -p, rsync -a).
    stats = [(str(file.resolve()), file.stat()) for file in files]
    state = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats]
    key = json.dumps([FORMAT, transformers.__version__, state])
    return cache_folder() / "fingerprints" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
