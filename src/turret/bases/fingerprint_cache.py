"""Remember the fingerprint of weight files that did not change: hashing gigabytes at every start would be felt.

Knows files and the user's cache. Refuses to know models.
"""

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


def remembered(files: Sequence[Path]) -> str | None:
    """The fingerprint these weight files had when they were last hashed, if none of them changed since."""
    try:
        record = json.loads(_record(files).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = record.get("fingerprint") if isinstance(record, dict) else None
    return known if isinstance(known, str) and known.startswith("sha256:") else None


def remember(files: Sequence[Path], value: str) -> None:
    """Keep `value` for the next load; a cache that cannot be written is no error, a disk that fails is."""
    try:
        write_beside(_record(files), json.dumps({"fingerprint": value, "files": [str(file) for file in files]}))
    except OSError as error:
        if error.errno in FAILING:
            raise BaseModelError(
                f"the cache cannot be written: {describe_error(error, cache_folder())}; "
                "set TURRET_CACHE to another disk"
            ) from error


def _record(files: Sequence[Path]) -> Path:
    # inode and ctime too: a copy that keeps the times (cp -p, rsync -a) must not pass for the file it replaced
    stats = [(str(file.resolve()), file.stat()) for file in files]
    state = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats]
    key = json.dumps([FORMAT, transformers.__version__, state])
    return cache_folder() / "fingerprints" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
