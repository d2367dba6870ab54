"""A store with three versions of `news`; production names the first."""

from __future__ import annotations

from pathlib import Path

import pytest
from store.bundles import tensors, write_bundle

from turret import Workspace
from turret.experiments import Router


def filled(root: Path, folder: Path) -> Workspace:
    workspace = Workspace(root)
    for seed in range(3):
        metrics = {"test": {"accuracy": 0.9 - seed / 10}}
        workspace.store.put("news", write_bundle(folder, tensors(seed)), metrics=metrics)
    workspace.promote("news@1", "production")
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return filled(tmp_path / "store", tmp_path / "bundles")


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def router(workspace: Workspace, clock: Clock) -> Router:
    return workspace.router(clock)
