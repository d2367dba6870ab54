"""Small bundles: the store looks only at the files and at the digest of the manifest.

The fixture `store` is one of each kind in turn: a folder, and a catalog on PostgreSQL. The catalog's files are in a
folder, and on S3 in the modules that say `FILES = "s3"`, because they test the files.
"""

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


@pytest.fixture(params=["folder", "url"])
def where(request: pytest.FixtureRequest, tmp_path: Path, new_url: Callable[..., str]) -> str:
    """A value of `--store`."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return new_url(getattr(request.module, "FILES", str(tmp_path / "files")))


@pytest.fixture
def store(where: str) -> Store:
    return Store(where)


@pytest.fixture
def folder_store(tmp_path: Path) -> Store:
    """A store in a folder, for tests of its disk and of its SQLite file."""
    return Store(tmp_path / "store")


@pytest.fixture
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Version]:
    """Stores a version with its own tensors and these metrics of its test split."""
    name = "folder_store" if "folder_store" in request.fixturenames else "store"
    store, seeds = request.getfixturevalue(name), iter(range(1000))

    def put(name: str = "a", said: dict[str, Any] | None = None, **test: Any) -> Version:
        bundle = write_bundle(tmp_path / "bundles", tensors(next(seeds)), said=said)
        return store.put(name, bundle, metrics={"test": test} if test else {})

    return put
