"""A process that writes to a store and says so on stdout; the tests kill it, or let many of it race.

- `writer.py STORE put COUNT` puts COUNT versions of the name `a` and prints each once it is acknowledged
- `writer.py STORE VERB FIRST LAST` forks a child for each n from FIRST to LAST that carries out the verb and kills
  itself, with SIGKILL, at its n-th file operation or call of a server; looks after each that the store holds what it
  must; prints what was acknowledged, and `done` when a child came through
- `writer.py STORE race COUNT SEED VERBS` carries out COUNT verbs of those, `get` and `verify`, drawn with the seed, on
  contents that all processes share; prints `deleting a@1` before and `put a@1`, `delete a@1` after
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3fs import S3FileSystem
from sqlalchemy import Engine
from sqlalchemy.event import listen
from store.bundles import tensors, write_bundle

from turret.errors import InUse, NotFound
from turret.store import Store

DISK_EVENTS = ("open", "os.", "sqlite3.connect", "shutil.")


def put(store: Store, folder: Path) -> None:
    seed = int.from_bytes(os.urandom(6), "big")
    version = store.put("a", write_bundle(folder, tensors(seed, 5000), {"same": b"in every version"}))
    print(version, flush=True)


def die_at(operation: int, store: Store) -> None:
    """Kill this process at its n-th file operation from now; of a store by URL, at its n-th call of a server."""
    seen = 0

    def count(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    if store.location.catalog is None:
        sys.addaudithook(lambda event, _: count() if event.startswith(DISK_EVENTS) else None)
        return
    for moment in ("before_cursor_execute", "after_cursor_execute", "commit"):
        listen(Engine, moment, count)
    ask = S3FileSystem._call_s3

    async def counted(self: S3FileSystem, *arguments: object, **more: object) -> object:
        count()
        answer = await ask(self, *arguments, **more)
        count()
        return answer

    S3FileSystem._call_s3 = counted


# --- killed at every operation: what is made ready, what is done, what must hold after ------------------------------


def ready_to_put(store: Store, folder: Path) -> Callable[[bool], None]:
    return lambda _acknowledged: None  # what was acknowledged is on stdout


def ready_to_promote(store: Store, folder: Path) -> Callable[[bool], None]:
    """`production` names a@1, and is moved to a@2."""
    while len(store.list()) < 2:
        store.put("a", write_bundle(folder, tensors(len(store.list()))))
    store.promote("a@1", "production")
    return lambda acknowledged: names(store, ("a@2",) if acknowledged else ("a@1", "a@2"))


def ready_to_rollback(store: Store, folder: Path) -> Callable[[bool], None]:
    """`production` names a@2, and goes back to a@1."""
    ready_to_promote(store, folder)
    store.promote("a@2", "production")
    return lambda acknowledged: names(store, ("a@1",) if acknowledged else ("a@1", "a@2"))


def ready_to_delete(store: Store, folder: Path) -> Callable[[bool], None]:
    """a@1 is kept and the newest is deleted with the alias that names it."""
    if not store.list():
        store.put("a", write_bundle(folder, tensors(0)))
    newest = store.put("a", write_bundle(folder, tensors(1)))
    store.promote(str(newest), "candidate")

    def hold(acknowledged: bool) -> None:
        listed = [str(version) for version in store.list()]
        assert "a@1" in listed
        assert not acknowledged or listed == ["a@1"]
        if str(newest) in listed:
            assert store.resolve("a@candidate") == store.resolve(str(newest))

    return hold


def ready_to_gc(store: Store, folder: Path) -> Callable[[bool], None]:
    """One version is listed, another was deleted, and a killed writer left something."""
    if not store.list():
        store.put("a", write_bundle(folder, tensors(0)))
    store.delete(str(store.put("a", write_bundle(folder, tensors(1)))))
    if store.location.catalog is None:
        (store.root / "tmp" / "left").write_bytes(b"x")
        os.utime(store.root / "tmp" / "left", (0, 0))

    def hold(acknowledged: bool) -> None:
        assert len(store.list()) == 1
        assert not acknowledged or (store.verify().orphans == 0 and not list(store._blobs.leftovers()))

    return hold


READY = {
    "put": (ready_to_put, lambda store, folder: put(store, folder)),
    "promote": (ready_to_promote, lambda store, _: store.promote("a@2", "production")),
    "rollback": (ready_to_rollback, lambda store, _: store.rollback("a")),
    "delete": (ready_to_delete, lambda store, _: store.delete("a@candidate", force=True)),
    "gc": (ready_to_gc, lambda store, _: store.gc()),
}


def names(store: Store, allowed: tuple[str, ...]) -> None:
    found = str(store.resolve("a@production"))
    assert found in allowed, (found, allowed)


def killed_at_each(root: str, verb: str, first: int, last: int, folder: Path) -> None:
    ready, act = READY[verb]
    for operation in range(first, last + 1):
        hold = ready(Store(root), folder)
        child = os.fork()
        if child == 0:
            die_at(operation, Store(root))
            act(Store(root), folder)
            os._exit(0)
        through = os.waitpid(child, 0)[1] == 0
        found = Store(root).verify() if Store(root).list() else None
        assert found is None or found.ok, (operation, found)
        hold(through)
        if through:
            print("done", flush=True)
            return


# --- racing ---------------------------------------------------------------------------------------------------------


def race(root: str, count: int, seed: int, verbs: list[str], folder: Path) -> None:
    store, draw = Store(root), random.Random(seed)
    bundles = [write_bundle(folder, tensors(content), {"same": b"in every version"}) for content in range(6)]
    for _ in range(count):
        verb = draw.choice(verbs)
        listed = [str(version) for version in store.list()] or ["a@1"]
        chosen = draw.choice(listed)
        try:
            if verb == "put":
                print("put", store.put("a", draw.choice(bundles)), flush=True)
            elif verb == "promote":
                store.promote(chosen, draw.choice(("production", "candidate")))
            elif verb == "rollback":
                store.rollback("a", draw.choice(("production", "candidate")))
            elif verb == "get":
                assert "manifest.json" in store.files(chosen)
            elif verb == "verify":
                assert store.verify().ok
            elif verb == "delete":
                print("deleting", chosen, flush=True)
                print("delete", store.delete(chosen, force=draw.random() < 0.3).version, flush=True)
            else:
                store.gc()
        except (NotFound, InUse):  # another process was quicker, or the alias names it
            pass


def main(root: str, verb: str, *rest: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if verb == "race":
            race(root, int(rest[0]), int(rest[1]), rest[2].split(","), Path(folder))
        elif len(rest) == 2:
            killed_at_each(root, verb, int(rest[0]), int(rest[1]), Path(folder))
        else:
            store = Store(root)
            for _ in range(int(rest[0])):
                put(store, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
