"""Bundles small enough to make by the hundred: the store looks at the manifest's digest and files only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store.bundles import tensors, write_bundle

from turret.store import Store, Version

MakeBundle = Callable[..., Path]


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    def make(content: bytes = b"tensors", **more: bytes) -> Path:
        return write_bundle(tmp_path / "bundles", content, more)

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def put(store: Store, tmp_path: Path) -> Callable[..., Version]:
    """Stores a version with tensors of its own and these metrics of its test split."""
    seeds = iter(range(1000))

    def put(name: str = "a", said: dict[str, Any] | None = None, **test: Any) -> Version:
        bundle = write_bundle(tmp_path / "bundles", tensors(next(seeds)), said=said)
        return store.put(name, bundle, metrics={"test": test} if test else {})

    return put
