"""A process that puts version after version and says so on stdout; the tests kill it, or let many of it race.

- `writer.py STORE NAME COUNT` puts COUNT versions and prints each once it is acknowledged
- `writer.py STORE NAME FIRST LAST` forks a child for each n from FIRST to LAST that kills itself, with SIGKILL, at its
  n-th file operation; prints what was acknowledged, and `done` when a child came through
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from store.bundles import write_bundle

from turret.store import Store

DISK_EVENTS = ("open", "os.", "sqlite3.connect")


def put(store: Store, name: str, folder: Path) -> None:
    version = store.put(name, write_bundle(folder, os.urandom(20_000), {"same": b"in every version"}))
    print(version, flush=True)


def die_at(operation: int) -> None:
    """Kill this process at its n-th file operation from now."""
    seen = 0

    def hook(event: str, _arguments: object) -> None:
        nonlocal seen
        if event.startswith(DISK_EVENTS):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(root: str, name: str, first: int, last: int | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if last is None:
            store = Store(root)
            for _ in range(first):
                put(store, name, Path(folder))
            return
        for operation in range(first, last + 1):
            child = os.fork()
            if child == 0:
                die_at(operation)
                put(Store(root), name, Path(folder))
                os._exit(0)
            if os.waitpid(child, 0)[1] == 0:
                print("done", flush=True)
                return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
