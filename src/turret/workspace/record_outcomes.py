"""Outcomes from a command or a table: read, told, and then the guards are asked. Refuses to know what is proved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turret.errors import BadExperiment, DataError
from turret.experiments.outcomes import Recorded, grouped

if TYPE_CHECKING:
    from turret.workspace.core import Workspace
    from turret.workspace.experimenting import ExperimentStatus

SHOWN = 5  # lines about outcomes that were not counted
COLUMNS = ("receipt", "unit", "value")
Told = tuple[str | None, str | None, object]


@dataclass(frozen=True)
class Telling:
    """What became of the outcomes, and what was done then."""

    recorded: tuple[Recorded, ...]
    settled: ExperimentStatus

    @property
    def lines(self) -> list[str]:
        if len(self.recorded) == 1:
            return [self.recorded[0].text]
        counts = ", ".join(f"{count} {status}" for status, count in grouped(self.recorded).items())
        odd = [each.text for each in self.recorded if not each.kept]
        more = [f"... and {len(odd) - SHOWN} more"] if len(odd) > SHOWN else []
        return [f"{len(self.recorded)} outcomes: {counts}", *odd[:SHOWN], *more]

    def as_json(self) -> dict[str, Any]:
        return {
            "outcomes": [each.as_json() for each in self.recorded],
            "counts": dict(grouped(self.recorded)),
            "done": list(self.settled.done),
        }


def tell(
    workspace: Workspace, name: str, value: object, receipt: str | None, unit: str | None, file: Path | None
) -> Telling:
    """One outcome, or those of a table."""
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


def read(path: Path) -> Iterator[Told]:
    """The rows of a table of outcomes; raises DataError that names the line."""
    from turret.data.files import open_table

    if not path.is_file():
        raise DataError(f"there is no file {str(path)[:200]!r}: give a table with value and receipt or unit")
    table = open_table(path)
    there = [column for column in COLUMNS if column in table.columns]
    if "value" not in there or len(there) < 2:
        raise DataError(
            f"{table.name} needs the columns value, and receipt or unit: it has {', '.join(table.columns)[:200]}"
        )
    for place, row in table.read(there):
        cells = dict(zip(there, row, strict=True))
        receipt, unit = (_text(cells.get(column)) for column in ("receipt", "unit"))
        if (receipt is None) == (unit is None):
            raise DataError(f"{table.name} {table.unit} {place}: expected a receipt or a unit, and one of them only")
        yield receipt, unit, cells["value"]


def _text(cell: Any) -> str | None:
    said = "" if cell is None else str(cell).strip()
    return said or None
