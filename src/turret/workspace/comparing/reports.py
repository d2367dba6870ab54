"""Find and read the reports of `compare` and `control` in a store."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from turret.errors import NotFound, StoreError
from turret.json_types import JsonObject

FOLDERS = {"comparisons": "comparison", "controls": "control"}  # folder in the store -> kind of report
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", re.ASCII)


def listed(root: Path, sees: Callable[[str], bool]) -> Sequence[JsonObject]:
    """`key`, `kind`, `written` and the contents of report.json, newest first; an unreadable report has a `problem`.

    sees: whether a recipe's name, with which a key starts, may be seen.
    """
    reports = [
        {**_summary(path), "kind": kind}
        for folder, kind in FOLDERS.items()
        for path in (root / folder).glob("*/report.json")
        if _KEY.fullmatch(path.parent.name) and sees(_name(path.parent.name))
    ]
    return sorted(reports, key=lambda each: (each["written"], each["key"]), reverse=True)


def read(root: Path, key: str, sees: Callable[[str], bool]) -> str:
    """The HTML of a report. Raises NotFound."""
    known = _KEY.fullmatch(key) and sees(_name(key))
    paths = [root / folder / (key if known else "-") / "report.html" for folder in FOLDERS]
    path = next((each for each in paths if each.exists()), paths[0])
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"no comparison {ascii(key)[:60]}: `turret compare` makes one") from None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read ({type(error).__name__}): run `turret compare` again to rewrite it"
        ) from None


def _name(key: str) -> str:
    """The recipe's name in a key, which ends in 10 digits of a digest."""
    return re.sub("-[0-9a-f]{10}$", "", key)


def _summary(path: Path) -> JsonObject:
    key = path.parent.name
    try:
        changed = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError
    except (OSError, ValueError) as error:
        return {"key": key, "written": "", "problem": f"its report cannot be read ({type(error).__name__})"}
    return {**report, "key": key, "written": changed.replace("+00:00", "Z"), "problem": None}
