"""64 clients with 50 adapters, during loads, promotes, rollbacks and deletes: no answer is lost or mixed up."""

from __future__ import annotations

import pytest
from server.conftest import Running
from server.echo import Echo, SamplingParams, probabilities
from server.storm import ADAPTERS, SOAK_SECONDS, OnlyBugs, Tenant, classifies, storm

from turret.server.services import ServerSettings


def filled(put, workspace) -> Tenant:
    """A tenant with two versions of each adapter, on a server without tokens."""
    known: dict[str, str] = {}
    names = [f"n{number}" for number in range(ADAPTERS)]
    for name in names:
        for _ in range(2):
            version = put(name)
            known[str(version)] = version.digest
        workspace.promote(f"{name}@1", "production")
    return Tenant(workspace, names, put, known, replaced=names)


@pytest.mark.slow
def test_every_answer_is_its_adapters_own_and_none_is_lost_while_everything_moves(serve, put, workspace) -> None:
    tenant = filled(put, workspace)
    running = serve(Echo(workspace.store, slots=20, load_seconds=0.002))
    storm(running, [tenant], classifies(probabilities), turns=3)
    assert len(running.engine.loaded()) <= 20


@pytest.mark.slow
def test_for_minutes_no_answer_is_wrong_or_lost_and_memory_does_not_grow(put, workspace) -> None:
    """Takes a third of the time of the soak with a real engine in test_mixed_soak.py."""
    tenant = filled(put, workspace)
    engine = Echo(workspace.store, slots=20, load_seconds=0.002)
    tenant.bad = str(put("bad"))
    engine.broken.add(tenant.bad)
    running = Running(workspace, engine, ServerSettings(), SamplingParams, lines=OnlyBugs())
    try:
        storm(running.start(), [tenant], classifies(probabilities), seconds=SOAK_SECONDS / 3)
    finally:
        running.stop()
