"""The reports of comparisons, and of findings on control, that are in a store.

Reads what `conduct` and `controlling` wrote and refuses to know how it was judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turret.errors import NotFound, StoreError

ROOMS = {"comparisons": "comparison", "controls": "control"}  # where they lie, and what they are
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", re.ASCII)


def listed(root: Path) -> Sequence[dict[str, Any]]:
    """`key`, `kind`, `written` and what report.json says, the newest first; one that cannot be read has `problem`."""
    found = [
        {**_one(path), "kind": kind}
        for room, kind in ROOMS.items()
        for path in (root / room).glob("*/report.json")
        if _KEY.fullmatch(path.parent.name)
    ]
    return sorted(found, key=lambda each: (each["written"], each["key"]), reverse=True)


def read(root: Path, key: str) -> str:
    """The page; raises NotFound."""
    paths = [root / room / (key if _KEY.fullmatch(key) else "-") / "report.html" for room in ROOMS]
    path = next((each for each in paths if each.exists()), paths[0])
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"no comparison {ascii(key)[:60]}: `turret compare` makes one") from None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read ({type(error).__name__}): compare again, which writes it anew"
        ) from None


def _one(path: Path) -> dict[str, Any]:
    key = path.parent.name
    try:
        changed = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError
    except (OSError, ValueError) as error:
        return {"key": key, "written": "", "problem": f"its report cannot be read ({type(error).__name__})"}
    return {**said, "key": key, "written": changed.replace("+00:00", "Z"), "problem": None}
