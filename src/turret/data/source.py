"""Opens a source of data: a file, a folder, a data set of the Hub, or one that is installed as a wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

from turret.data import hub, packaged
from turret.data.files import SUFFIXES, Table, open_folder, open_table
from turret.errors import DataError, shown


def open_source(source: str) -> dict[str, Table]:
    """Split -> table of a file, a folder, a wheel or the Hub. The split is "" if there is only one table.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    if "\0" in source or not source.strip():
        raise DataError(f"data.source {shown(source)} names nothing: give a file, a folder, a Hub id or pypi:package")
    if source.startswith("pypi:"):
        return packaged.load(source)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return open_folder(path)
        if path.exists():
            return {"": open_table(path)}
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"data {shown(source, 100)} cannot be read: {reason}: check the path") from None
    if path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or not hub.looks_like_id(source):
        raise DataError(f"there is no file or folder {shown(source, 100)}{_near(path)}")
    return hub.load(source)


def _near(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir() if other.suffix.lower() in SUFFIXES or other.is_dir()]
    except OSError:
        return f": there is no folder {shown(str(path.parent), 100)} either"
    close = difflib.get_close_matches(path.name, names, n=1)
    return (
        f": did you mean {shown(str(path.with_name(close[0])), 100)}?"
        if close
        else f" in {shown(str(path.parent.resolve()), 100)}"
    )
