"""Record outcomes of an experiment from a command or a table, then apply the experiment's guards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turret.data.source import open_table
from turret.data.table import CellValue
from turret.errors import BadExperiment, DataError
from turret.experiments.outcomes import Recorded, grouped
from turret.json_types import JsonObject, JsonValue

if TYPE_CHECKING:
    from turret.workspace.core import Workspace
    from turret.workspace.experimenting import ExperimentStatus

SHOWN = 5  # lines about outcomes that were not counted
COLUMNS = ("receipt", "unit", "value")


@dataclass(frozen=True)
class Telling:
    """The recorded outcomes, and the status of the experiment after its guards were applied."""

    recorded: tuple[Recorded, ...]
    settled: ExperimentStatus

    @property
    def lines(self) -> list[str]:
        return lines_of(self.recorded)

    def as_json(self) -> JsonObject:
        return {
            "outcomes": [each.as_json() for each in self.recorded],
            "counts": dict(grouped(self.recorded)),
            "done": list(self.settled.done),
        }


def lines_of(recorded: Sequence[Recorded]) -> list[str]:
    """What became of outcomes, for people."""
    if len(recorded) == 1:
        return [recorded[0].text]
    counts = ", ".join(f"{count} {status}" for status, count in grouped(recorded).items())
    rejected = [each.text for each in recorded if not each.kept]
    more = [f"... and {len(rejected) - SHOWN} more"] if len(rejected) > SHOWN else []
    return [f"{len(recorded)} outcomes: {counts}", *rejected[:SHOWN], *more]


def tell(
    workspace: Workspace, name: str, value: str | None, receipt: str | None, unit: str | None, file: Path | None
) -> Telling:
    """Record one outcome, or all outcomes of a table."""
    if (file is None) == (value is None) or (file is not None and (receipt or unit)):
        raise BadExperiment(
            "outcome: give one value with --receipt or --unit, or a table of many with --file, and not both"
        )
    experiment = workspace.experiment(name)
    if file is None:
        recorded = [experiment.outcome(value, receipt=receipt, unit=unit)]
    else:
        recorded = experiment.outcomes(read(file))
    return Telling(tuple(recorded), experiment.settle())


def read(path: Path) -> Iterator[tuple[str | None, str | None, JsonValue]]:
    """(receipt, unit, value) of each row of a table. Raises DataError that names the line."""
    if not path.is_file():
        raise DataError(f"there is no file {str(path)[:200]!r}: give a table with value and receipt or unit")
    table = open_table(path)
    columns = [column for column in COLUMNS if column in table.columns]
    if "value" not in columns or len(columns) < 2:
        raise DataError(
            f"{table.name} needs the columns value, and receipt or unit: it has {', '.join(table.columns)[:200]}"
        )
    for place, row in table.read(columns):
        cells = dict(zip(columns, row, strict=True))
        receipt, unit = (_text(cells.get(column)) for column in ("receipt", "unit"))
        if (receipt is None) == (unit is None):
            raise DataError(f"{table.name} {table.unit} {place}: expected a receipt or a unit, and one of them only")
        yield receipt, unit, cells["value"]


def _text(cell: CellValue) -> str | None:
    return (None if cell is None else str(cell).strip()) or None
