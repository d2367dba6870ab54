"""Opens table files and folders of them: CSV, TSV, JSONL, JSON, Excel and Parquet. The text formats may be compressed.

All formats are streamed but JSON, which is one value. Of Parquet only the requested columns are read, in batches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from turret.data import excel, json_rows, parquet, separated
from turret.data.columns import later_task_of
from turret.data.table import DETECTED, FileFormat, Table, TableRow, reason_of
from turret.data.text_file import COMPRESSED, check_is_text, kind_of, name_of
from turret.errors import DataError, listed, shown

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".xlsx", ".parquet")
_UNPACKED = (".xlsx", ".parquet")  # compressed inside
_OTHERS = {  # suffix -> what to do instead
    ".xls": "save it as .xlsx or .csv",
    ".ods": "save it as .xlsx or .csv",
    ".xlsm": "save it as .xlsx",
    ".zip": "unpack it",
    ".tar": "unpack it",
    ".7z": "unpack it",
    ".rar": "unpack it",
    ".txt": "name it .csv or .tsv if it has columns",
    ".tab": "name it .tsv",
    ".dat": "name it .csv or .tsv",
    ".feather": "save it as .parquet",
    ".arrow": "save it as .parquet",
    ".pkl": "save it as .parquet or .csv",
    ".pickle": "save it as .parquet or .csv",
    ".pdf": "export its table as .csv",
    ".docx": "export its table as .csv",
}
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def is_table(path: Path) -> bool:
    """Whether the name is that of a table: `.csv`, `.jsonl.gz` and so on."""
    kind = kind_of(path)
    return kind in SUFFIXES and not (kind in _UNPACKED and path.suffix.lower() in COMPRESSED)


def open_table(path: Path, form: FileFormat = DETECTED) -> Table:
    """The table in a file. Only its columns are read at first.

    Args:
        form: how the file is read, as far as a recipe says it.

    Raises:
        DataError: the file cannot be read, or is no table.
    """
    if not is_table(path):
        raise DataError(not_a_table(path))
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{name_of(path)} is empty: give a table with rows")
        kind = kind_of(path)
        if kind == ".parquet":
            return parquet.open_parquet(path)
        if kind == ".xlsx":
            return excel.open_excel(path, form)
        check_is_text(path)
        if kind == ".json":
            return json_rows.open_json(path, form)
        if kind in (".jsonl", ".ndjson"):
            return json_rows.open_jsonl(path, form)
        return separated.open_separated(path, "," if kind == ".csv" else "\t", form)
    except OSError as error:
        raise DataError(f"{name_of(path)} cannot be read: {reason_of(error)}: check the file and its folder") from None


def not_a_table(path: Path) -> str:
    """Why a file name is not that of a table, and what to do."""
    kind = kind_of(path)
    if kind in _UNPACKED:
        return f"{name_of(path)} is compressed twice: unpack it to {kind}"
    known = f"expected one of {', '.join(SUFFIXES)}, or a text format with .gz, .zst, .bz2 or .xz after it"
    advice = _OTHERS.get(path.suffix.lower())
    return f"{name_of(path)} has no known kind of table: {advice or known}"


# --- folders ---------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, form: FileFormat = DETECTED) -> dict[str, Table]:
    """Split -> table. Several files of one split make one table, in the order of their names. Raises DataError."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if is_table(path)
        and path.is_file()
        and not any(part.startswith((".", "~$")) for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise DataError(
            f"the folder {shown(str(folder), 100)} has no tables: expected files with {', '.join(SUFFIXES)}"
        )
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(split_in(path.relative_to(folder)), []).append(path)
    unnamed = groups.pop("", [])
    if not groups:
        return {"": _joined(folder, unnamed, form)}
    note = ""
    if unnamed:
        note = f"{unnamed[0].name} and {len(unnamed) - 1} more" if len(unnamed) > 1 else unnamed[0].name
        note = f"{note} in {folder.name} left out: no train, validation or test in the name"
    tables = {split: _joined(folder, members, form) for split, members in groups.items()}
    if note:
        first = next(iter(tables))
        tables[first] = tables[first].with_note(note)
    return tables


def split_in(path: Path) -> str:
    """The split in a path: in its file name, else in the nearest folder's name; "" if there is none."""
    for part in reversed(path.with_suffix("").parts):
        for word in re.split(r"[^a-z0-9]+|(?<=[a-z])(?=[0-9])", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""


def canonical_split(name: str) -> str:
    """`validation` for `dev` and `val`, and so on. Other names stay as they are."""
    return _SPLIT_WORDS.get(name.lower(), name)


def _joined(folder: Path, paths: Sequence[Path], form: FileFormat) -> Table:
    tables = [open_table(path, form) for path in paths]
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            later = later_task_of(first.columns)
            task = f", and belong to the task {later}, which a later version will have" if later else ""
            raise DataError(
                f"{first.name} and {table.name} in {name_of(folder)} have different columns "
                f"({listed(first.columns, 40)} and {listed(table.columns, 40)}){task}: "
                "give one file, or make them alike"
            )
    if len(tables) == 1:
        return first

    left_out: Counter[str] = Counter()

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        left_out.clear()
        for table in tables:
            yield from table.read(columns)
            left_out.update(table.left_out)

    name = f"{first.name} and {len(tables) - 1} more"
    notes = tuple(dict.fromkeys(note for table in tables for note in table.notes))[:5]
    joined = replace(first, name=name, read=read, notes=notes, left_out=left_out)
    return joined.with_note(f"{len(tables)} files of {folder.name} are read as one: {first.name} ... {tables[-1].name}")
