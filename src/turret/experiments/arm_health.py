"""How the arms answer, as rows: answers, errors, slow ones, how often a shadow agrees.

A replica adds up what it saw in a second and writes one row an arm. `slow` counts answers over the guard's
`max_seconds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
    compared: int = 0  # with the answer that was returned; of a shadow
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


def keep(connection: Connection, sums: Mapping[tuple[int, str], ArmHealth], at: str) -> None:
    """Write down the sums of experiment (by id) and arm."""
    rows = [{"experiment_id": key[0], "arm": key[1], **asdict(each), "at": at} for key, each in sums.items()]
    if rows:
        connection.execute(insert(experiment_health), rows)


def rows(connection: Connection, experiment: Experiment, after: int = 0) -> Sequence[Any]:
    """`id, arm, at` and the sums of what was written down after that id, in its order."""
    table = experiment_health.c
    mine = (table.experiment_id == experiment.id) & (table.id > after)
    return connection.execute(select(experiment_health).where(mine).order_by(table.id)).all()
