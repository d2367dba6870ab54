"""Rows about the answers of each arm: answers, errors, slow answers, and agreements of a shadow.

A server process writes one row per arm and second. `slow` counts answers that took longer than the guard's
`max_seconds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from sqlalchemy import Connection, insert, select

from turret.database import experiment_health
from turret.experiments.experiment import Experiment


@dataclass(frozen=True)
class ArmHealth:
    """Sums over answers of one arm."""

    answers: int = 0
    errors: int = 0
    slow: int = 0
    seconds: float = 0.0
    compared: int = 0  # answers of a shadow that were compared with the returned answer
    agreed: int = 0

    def __add__(self, other: ArmHealth) -> ArmHealth:
        return ArmHealth(
            self.answers + other.answers,
            self.errors + other.errors,
            self.slow + other.slow,
            self.seconds + other.seconds,
            self.compared + other.compared,
            self.agreed + other.agreed,
        )


class HealthRow(NamedTuple):
    """What one process saw of one arm in about one second."""

    id: int
    arm: str
    at: str
    answers: int
    errors: int
    slow: int
    seconds: float
    compared: int
    agreed: int


def keep(connection: Connection, sums: Mapping[tuple[int, str], ArmHealth], at: str) -> None:
    """Write sums by experiment id and arm."""
    rows = [{"experiment_id": key[0], "arm": key[1], **asdict(each), "at": at} for key, each in sums.items()]
    if rows:
        connection.execute(insert(experiment_health), rows)


def rows(connection: Connection, experiment: Experiment, after: int = 0) -> Sequence[HealthRow]:
    """The rows of an experiment with an id above `after`, in order."""
    table = experiment_health.c
    query = select(*(table[column] for column in HealthRow._fields))
    found = connection.execute(query.where(table.experiment_id == experiment.id, table.id > after).order_by(table.id))
    return [HealthRow(*row) for row in found]
