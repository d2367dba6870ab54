"""What every test shares: one thread, no network, no cache of the user's."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch and the tokenizers are loaded: two workers with two threads each are slower than two with one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def turret_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of this test session, shared by its workers; TURRET_CACHE in the environment wins."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "turret-cache"
    return Path(os.environ.setdefault("TURRET_CACHE", str(folder)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need an accelerator are skipped, with a word, where there is none."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
