"""How the arms answer, as rows: answers, errors, slow ones, how often a shadow agrees. Refuses to know what it proves.

A replica adds up what it saw in a second and writes one row an arm. `slow` counts answers over the guard's
`max_seconds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select

from turret.database import experiment_health
from turret.experiments.experiment import Experiment


@dataclass(frozen=True)
class Answering:
    """Sums over answers of one arm."""

    answers: int = 0
    errors: int = 0
    slow: int = 0
    seconds: float = 0.0
    compared: int = 0  # with the answer that was returned; of a shadow
    agreed: int = 0

    def __add__(self, other: Answering) -> Answering:
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Answering(*(a + b for a, b in pairs))


def keep(connection: Connection, sums: Mapping[tuple[int, str], Answering], at: str) -> None:
    """Write down the sums of experiment (by id) and arm."""
    rows = [{"experiment_id": key[0], "arm": key[1], **asdict(each), "at": at} for key, each in sums.items()]
    if rows:
        connection.execute(insert(experiment_health), rows)


def of(connection: Connection, experiment: Experiment) -> dict[str, Answering]:
    """Arm -> all that is known of its answers."""
    table = experiment_health.c
    columns = ("answers", "errors", "slow", "seconds", "compared", "agreed")
    query = (
        select(table.arm, *(func.sum(table[name]).label(name) for name in columns))
        .where(table.experiment_id == experiment.id)
        .group_by(table.arm)
    )
    found: dict[str, Answering] = {}
    for row in connection.execute(query):
        sums: dict[str, Any] = {name: int(getattr(row, name)) for name in columns if name != "seconds"}
        found[row.arm] = Answering(**sums, seconds=float(row.seconds))
    return found
