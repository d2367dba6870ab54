"""Bundles small enough to make by the hundred: the store looks at the manifest's digest and files only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from store.bundles import write_bundle

from turret.store import Store

MakeBundle = Callable[..., Path]


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    def make(content: bytes = b"tensors", **more: bytes) -> Path:
        return write_bundle(tmp_path / "bundles", content, more)

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")
