"""Opens a source of data: a file, a folder, stdin, rows in memory, a data set of the Hub, or one of a wheel."""

from __future__ import annotations

import atexit
import difflib
import functools
import shutil
import sys
import tempfile
from pathlib import Path

from turret.data import hub, memory, packaged
from turret.data.files import is_table, open_folder, open_table
from turret.data.table import DETECTED, FileFormat, Table
from turret.errors import DataError, shown

STDIN = "-"


def open_source(source: str, form: FileFormat = DETECTED) -> dict[str, Table]:
    """Split -> table of a file, a folder, stdin, rows in memory, a wheel or the Hub. A single table has the split "".

    Args:
        form: how files are read, as far as a recipe says it.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    if "\0" in source or not source.strip():
        raise DataError(f"data.source {shown(source)} names nothing: give a file, a folder, a Hub id or pypi:package")
    if source == STDIN:
        return {"": open_table(_stdin(), form)}
    if source.startswith("pypi:"):
        return packaged.load(source)
    if memory.is_rows_source(source):
        return memory.open_rows(source)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return open_folder(path, form)
        if path.exists():
            return {"": open_table(path, form)}
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"data {shown(source, 100)} cannot be read: {reason}: check the path") from None
    if is_table(path) or source.startswith((".", "/", "~")) or not hub.looks_like_id(source):
        raise DataError(f"there is no file or folder {shown(source, 100)}{_near(path)}")
    return hub.load(source)


@functools.cache
def _stdin() -> Path:
    """A copy of stdin in a temporary file, whose suffix fits its content. A table is read more than once."""
    folder = Path(tempfile.mkdtemp(prefix="turret-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / "stdin"
    try:
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        with copy.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(
            f"stdin cannot be copied to {folder}: {error.strerror}: free some space, or give a file"
        ) from None
    if not head:
        raise DataError("stdin is empty: pipe a table into it, or give a file")
    return copy.rename(copy.with_suffix(_suffix(head)))


def _suffix(head: bytes) -> str:
    """The suffix of a table, by its first bytes."""
    if head.startswith(b"PAR1"):
        return ".parquet"
    if head.startswith(b"PK\x03\x04"):
        return ".xlsx"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return ".jsonl" if start[:1] in (b"{", b"[") else ".csv"


def _near(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir() if is_table(other) or other.is_dir()]
    except OSError:
        return f": there is no folder {shown(str(path.parent), 100)} either"
    close = difflib.get_close_matches(path.name, names, n=1)
    return (
        f": did you mean {shown(str(path.with_name(close[0])), 100)}?"
        if close
        else f" in {shown(str(path.parent.resolve()), 100)}"
    )
