"""Reads Parquet: only the requested columns, in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turret.data.table import CellValue, Table, TableRow, check_columns, reason_of
from turret.data.text_file import name_of
from turret.errors import DataError, one_line, shown

if TYPE_CHECKING:
    import pyarrow as pa


def open_parquet(path: Path) -> Table:
    """The table in a Parquet file. Raises DataError."""
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        names = tuple(str(name) for name in schema.names)
    except _unreadable() as error:
        if isinstance(error, OSError) and error.errno:  # from the system, not from Parquet
            raise
        raise DataError(f"{name_of(path)} is not Parquet, or broken: {reason_of(error)}: write it again") from None
    check_columns(name_of(path), names, "give each its own name")

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        number = 0
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=256, columns=list(dict.fromkeys(columns))):
                    cells = [_cells(batch.column(name), name_of(path), name, number) for name in columns]
                    for row in zip(*cells, strict=True):
                        number += 1
                        yield number, row
        except _unreadable() as error:
            raise DataError(
                f"{name_of(path)} is broken after row {number}: {reason_of(error)}: write it again"
            ) from None

    return Table(name_of(path), names, read, classes=_parquet_classes(schema.metadata), unit="row")


def _unreadable() -> tuple[type[Exception], ...]:
    """The errors of pyarrow for a file that it cannot read, or for a value that Python has no type for."""
    import pyarrow as pa

    return (pa.ArrowException, ArithmeticError, LookupError, OSError, TypeError, ValueError)


def _cells(cells: pa.Array, table: str, column: str, before: int) -> list[CellValue]:
    """The cells of one batch as Python values. before: the number of rows of the earlier batches."""
    try:
        return list(cells.to_pylist())
    except _unreadable() as error:
        row = before + 1 + next((place for place, cell in enumerate(cells) if not _is_readable(cell)), 0)
        raise DataError(
            f"{table} row {row}, column {shown(column, 40)}: this {one_line(str(cells.type), 40)} cannot be read "
            f"({reason_of(error, 60)}): expected text or a label; correct it, or leave the row out"
        ) from None


def _is_readable(cell: pa.Scalar) -> bool:
    try:
        cell.as_py()
    except _unreadable():
        return False
    return True


def _parquet_classes(metadata: Mapping[bytes, bytes] | None) -> dict[str, Sequence[str]]:
    """Names of class numbers, if `datasets` wrote the file and stored them."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
