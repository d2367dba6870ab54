"""The user's cache folder: things that can be made again, each written beside its name and renamed into place.

$TURRET_CACHE, else ~/.cache/turret. Refuses to know what is cached.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where cached things lie; it may not exist yet."""
    named = os.environ.get("TURRET_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "turret"


def write_beside(path: Path, text: str) -> None:
    """Put `text` at `path`, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
