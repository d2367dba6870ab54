"""64 clients mixing 50 adapters while others load, promote, roll back and delete: nothing is lost, nothing is mixed."""

from __future__ import annotations

import pytest
from server.echo import Echo, probabilities
from server.storm import ADAPTERS, storm


@pytest.mark.parametrize("turns", [3, pytest.param(150, marks=pytest.mark.slow)])
def test_every_answer_is_its_adapters_own_and_none_is_lost_while_everything_moves(serve, put, workspace, turns) -> None:
    known: dict[str, str] = {}
    for number in range(ADAPTERS):
        for _ in range(2):
            version = put(f"n{number}")
            known[str(version)] = version.digest
        workspace.promote(f"n{number}@1", "production")
    running = serve(Echo(workspace.store, slots=20, load_seconds=0.002))
    storm(running, workspace, put, known, probabilities, turns)
    assert len(running.engine.loaded()) <= 20
