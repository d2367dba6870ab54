"""64 clients with 50 adapters, during loads, promotes, rollbacks and deletes: no answer is lost or mixed up."""

from __future__ import annotations

import pytest
from server.conftest import Running
from server.echo import Echo, Options, probabilities
from server.storm import ADAPTERS, SOAK_SECONDS, OnlyBugs, storm

from turret.server.settings import ServerSettings


def filled(put, workspace) -> dict[str, str]:
    """Two versions of each adapter; returns version -> digest."""
    known: dict[str, str] = {}
    for number in range(ADAPTERS):
        for _ in range(2):
            version = put(f"n{number}")
            known[str(version)] = version.digest
        workspace.promote(f"n{number}@1", "production")
    return known


def test_every_answer_is_its_adapters_own_and_none_is_lost_while_everything_moves(serve, put, workspace) -> None:
    known = filled(put, workspace)
    running = serve(Echo(workspace.store, slots=20, load_seconds=0.002))
    storm(running, workspace, put, known, probabilities, turns=3)
    assert len(running.engine.loaded()) <= 20


@pytest.mark.slow
def test_for_minutes_no_answer_is_wrong_or_lost_and_memory_does_not_grow(put, workspace) -> None:
    """Takes a third of the time of the soak with a real engine in test_end_to_end.py."""
    known = filled(put, workspace)
    engine = Echo(workspace.store, slots=20, load_seconds=0.002)
    engine.broken.add(str(put("bad")))
    running = Running(workspace, engine, ServerSettings(), Options, lines=OnlyBugs())
    try:
        storm(running.start(), workspace, put, known, probabilities, seconds=SOAK_SECONDS / 3, bad="bad@1")
    finally:
        running.stop()
