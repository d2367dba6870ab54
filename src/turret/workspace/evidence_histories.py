"""The course of an experiment's evidence, kept while the workspace lives so that looking again costs what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turret.experiments import rows
from turret.store import Store

if TYPE_CHECKING:
    from turret.experiments.evidence_history import EvidenceHistory


def course(store: Store, name: str, number: int | None, known: dict[int, EvidenceHistory]) -> EvidenceHistory:
    """Of the running experiment of that name, or its last; raises NotFound."""
    from turret.experiments.evidence_history import EvidenceHistory

    with store.database().reading() as connection:
        experiment = rows.find(connection, name, number)
        found = known.setdefault(experiment.id, EvidenceHistory())
        found.read(connection, experiment)
    return found
