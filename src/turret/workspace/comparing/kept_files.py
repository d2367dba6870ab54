"""The files of a comparison, as one process writes them: on this machine, and copied to a store by URL."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from turret.database import Database
from turret.disk import sync
from turret.errors import StoreError
from turret.json_types import JsonObject, Plain
from turret.recipe import Recipe
from turret.store import Store, leases
from turret.store.leases import Lease, LeaseRenewer
from turret.workspace.progress import Say

# --- state ------------------------------------------------------------------------------------------------------------
# The files of a comparison. A killed comparison resumes from them: each cell's result is complete or missing.
#
# Under the store's root, `comparisons/<name>-<digest of recipe and data>/`:
#
# - `lock`: held by the process that conducts the comparison
# - `cells/<key>/recipe.toml`, `plan.json`: written by that process before its first step
# - `cells/<key>/result.json`: written atomically, after the version is stored and everything is measured
# - `report.html`, `report.md`, `report.json`: of all results so far
#
# Why a cell has no result is in its job (`turret.store.jobs`); the next call tries again.
#
# A comparison of a composition with its parts is in `comparisons/<name>+<name>-<digest of versions and data>/`. Its
# cells are the rows, and have a result only. Measurements of control have the same layout under `controls/`, and the
# classifier's training data in `references/`.
#
# A cell's key depends only on its recipe, so a later call with more methods, seeds or fractions uses the same results.


FORMAT = 1
TRIAL = "trial"  # the kind of a cell of a sweep


def folder_of(root: Path, recipe: Recipe, data_digest: str, kind: str = "comparisons") -> Path:
    """The folder of a comparison. It depends on the recipe's base, data and training settings, not on its method."""
    same = recipe.with_overrides({"method": "head", "train.lr": "none"})
    same = same.model_copy(update={"train": same.train.model_copy(update={"init_from": None, "trackers": None})})
    digest = hashlib.sha256(f"{FORMAT}\n{same.to_toml()}\n{data_digest}".encode()).hexdigest()
    return root / kind / f"{recipe.name}-{digest[:10]}"


def write(path: Path, value: Mapping[str, Plain]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises StoreError."""
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{path.name} cannot be written to {path.parent}: {reason}: free some space there") from None


def read(path: Path) -> JsonObject | None:
    """The contents of a JSON file; None if it does not exist. Raises StoreError if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({type(error).__name__}): delete it to run that cell again") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path} is not a JSON object: delete it to run that cell again")
    return value


# --- kept files -------------------------------------------------------------------------------------------------------


class KeptFiles:
    """Writes the files of a comparison.

    Args:
        store: has the comparison's folder under its root, and a copy of it if it is a store by URL.
        lease: of the comparison, which each write to the store checks; None for a folder store.
        keeper: renews the lease; None in the process of a cell.
    """

    def __init__(self, store: Store, lease: Lease | None = None, keeper: LeaseRenewer | None = None) -> None:
        self.store, self.lease, self._keeper = store, lease, keeper

    def write(self, path: Path, value: Mapping[str, Plain]) -> None:
        """Write a JSON file."""
        self.write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False))

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file. Raises LeaseLost if another process conducts the comparison by now."""
        write_text(path, text)
        self.store.artifacts.keep([path], self.lease)

    def require(self) -> None:
        """Raise LeaseLost if another process conducts the comparison by now."""
        if self._keeper is not None:
            self._keeper.require()


@contextmanager
def held(store: Store, folder: Path, say: Say) -> Iterator[KeptFiles]:
    """Hold a comparison for this process: its folder by a lock, and with a store by URL also a lease.

    With a store by URL, the files that other machines wrote are copied to the folder first.

    Raises:
        StoreError: another process conducts it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", timeout=0):
            if not store.artifacts.copies:
                yield KeptFiles(store)
                return
            database, name = store.database(make=True), folder.relative_to(store.root).as_posix()
            lease = _taken(database, name, say)
            try:
                with LeaseRenewer(database, lease, warn=say) as keeper:
                    store.artifacts.bring(f"{name}/")
                    yield KeptFiles(store, lease, keeper)
            finally:
                with suppress(StoreError), database.writing() as connection:  # otherwise it ends by itself
                    leases.release(connection, lease)
    except Timeout:
        raise StoreError(f"another process runs the comparison in {folder}: wait for it, or end it") from None
    except OSError as error:
        raise StoreError(f"the comparison cannot be written to {folder}: {error.strerror or error}") from None


def _taken(database: Database, name: str, say: Say) -> Lease:
    if leases.is_free(database, name, say):
        with database.writing() as connection:
            if (lease := leases.take(connection, name)) is not None:
                return lease
    raise StoreError(f"another process runs the comparison {name}: wait for it, or end it")
