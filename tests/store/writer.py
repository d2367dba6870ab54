"""A process that works in a store and prints what it did. Tests kill it, or run many of it at once.

- `writer.py STORE put COUNT` puts COUNT versions of the name `a` and prints each when it is acknowledged
- `writer.py STORE race COUNT SEED VERBS` carries out COUNT commands, drawn with the seed, on contents shared by all
  processes; prints `deleting a@1` before and `put a@1`, `delete a@1` after
- `writer.py STORE read` reads everything again and again until its stdin ends, and fails at anything that is not whole

In the next ones each round forks a child that carries out one command of `verbs.py` and is stopped in it. After each
round the store is checked. They print what was acknowledged, and at the end the number of rounds by their end:

- `writer.py STORE operations VERBS FIRST LAST` kills the child at its n-th file operation or call of a server, for n
  from FIRST to LAST or until one survives
- `writer.py STORE moments VERBS ROUNDS SEED` kills it at a random moment
- `writer.py STORE writes VERBS MOST STEP` lets the kernel kill it in the write that makes a file longer than n bytes,
  for n from 0 to MOST, inside SQLite too
- `writer.py STORE limits VERBS MOST STEP` lets that write fail instead, as a full disk or a quota does
- `writer.py STORE errors VERBS FIRST LAST` lets the n-th write or flush fail as on a broken disk (`failing_disk.py`),
  for n from FIRST to LAST or until none fails; it is an error if the command is acknowledged all the same
"""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from failing_disk import fail_at, of_sqlite, what_failed
from store.bundles import tensors, write_bundle
from store.verbs import VERBS, put, ready_to_put

from turret.errors import InUse, NotFound, TurretError
from turret.location import Location
from turret.store import Store

DISK_EVENTS = ("open", "os.", "sqlite3.connect", "shutil.")
SAID = 3  # exit status of a child whose command failed with one line
Wait = Callable[[int], None]


# --- a child that is stopped ---------------------------------------------------------------------------------------


def at_operation(operation: int, where: str) -> None:
    """Kill this process at its n-th file operation in the store, or also, with a URL, at its n-th call of a server."""
    location, seen = Location.parse(where), 0

    def count(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(DISK_EVENTS) and any(str(location.local) in str(argument) for argument in arguments):
            count()

    sys.addaudithook(hook)
    if location.catalog is not None:
        count_calls(count)


def count_calls(count: Callable[..., None]) -> None:
    """Count before each statement, commit and request, and after a transaction, where a server sees a change."""
    from s3fs import S3FileSystem
    from sqlalchemy import Engine, Pool
    from sqlalchemy.event import listen

    for moment in ("before_cursor_execute", "commit"):
        listen(Engine, moment, count)
    listen(Pool, "checkin", count)
    ask = S3FileSystem._call_s3

    async def counted(self: S3FileSystem, *arguments: object, **more: object) -> object:
        count()
        return await ask(self, *arguments, **more)

    S3FileSystem._call_s3 = counted


def at_size(size: int, *, killed: bool) -> None:
    """The write that makes a file longer than this kills the process, or fails with `File too large`."""
    if killed:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def child(act: Callable[[], object], arm: Callable[[], None]) -> int:
    """Fork a process that carries out the command, and return its id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            arm()
            act()
            status = 0
        except TurretError as error:
            os.write(2, f"{error}\n".encode())
            status = 1 if "\n" in str(error) else SAID
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    return process


def rounds(where: str, verb: str, folder: Path, how: Iterator[tuple[Callable[[], None], Wait]]) -> Iterator[str]:
    """Yield `done`, `killed` or `said` per round, after the store was checked."""
    made = VERBS[verb]
    for arm, wait in how:
        hold = made.ready(where, folder)
        process = child(lambda: made.act(where, folder), arm)
        wait(process)
        status = os.waitpid(process, 0)[1]
        told = {0: "done", SAID: "said"}.get(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1)
        told = told or ("killed" if os.WIFSIGNALED(status) else "failed")
        assert told != "failed", f"{verb} ended with status {status}"
        store = Store(where)
        found = store.verify() if store.list() else None
        assert found is None or found.ok, (verb, found)
        hold(told == "done")
        yield told


def nothing(_process: int) -> None:
    pass


def operations(where: str, first: int, last: int) -> Iterator[tuple[Callable[[], None], Wait]]:
    for operation in range(first, last + 1):
        yield partial(at_operation, operation, where), nothing


def moments(count: int, seed: int) -> Iterator[tuple[Callable[[], None], Wait]]:
    draw, whole = random.Random(seed), list[float]()

    def timed(process: int) -> None:
        started = time.perf_counter()
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        whole.append(time.perf_counter() - started)

    def wait(process: int) -> None:
        time.sleep(draw.uniform(0, 1.2 * min(whole)))
        os.kill(process, signal.SIGKILL)

    yield lambda: None, timed
    yield lambda: None, timed  # the first round may import libraries or compile kernels
    for _ in range(count):
        yield lambda: None, wait


def sizes(most: int, step: int, *, killed: bool) -> Iterator[tuple[Callable[[], None], Wait]]:
    for size in range(0, most, step):
        yield partial(at_size, size, killed=killed), nothing


def errors(where: str, verb: str, first: int, last: int, folder: Path) -> Iterator[str]:
    told, root = folder / "failed", Location.parse(where).local.absolute()
    for number in range(first, last + 1):
        arm = partial(fail_at, number, root, told)
        (ended,) = rounds(where, verb, folder, iter([(arm, nothing)]))
        failed = what_failed(told)
        assert failed is None or ended == "said" or of_sqlite(failed), f"{verb}: nobody heard that {failed} failed"
        yield ended
        if failed is None:
            return


def unfinished(where: str, mode: str, verbs: list[str], first: int, second: int, folder: Path) -> None:
    ended: Counter[str] = Counter()
    for verb in verbs:
        if mode == "errors":
            ended.update(errors(where, verb, first, second, folder))
            continue
        if mode == "operations":
            how = operations(where, first, second)
        else:
            how = moments(first, second) if mode == "moments" else sizes(first, second, killed=mode == "writes")
        for told in rounds(where, verb, folder, how):
            ended[told] += 1
            if mode == "operations" and told == "done":
                break
    print(dict(ended), flush=True)


# --- racing, and reading --------------------------------------------------------------------------------------------


def race(where: str, count: int, seed: int, verbs: list[str], folder: Path) -> None:
    store, draw = Store(where), random.Random(seed)
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
        except (NotFound, InUse):  # another process deleted it, or an alias names it
            pass


def read(where: str, folder: Path) -> None:
    """Show, materialize and verify every listed version, and resolve every alias, until stdin ends."""
    turns = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        store = Store(where)
        for version in store.list():
            try:
                assert store.show(str(version))["digest"] == version.digest
                store.materialize(str(version), folder / f"out-{turns}-{version}")
                for alias in version.aliases:
                    assert store.resolve(f"{version.name}@{alias}").aliases
            except NotFound:  # deleted or moved in the meantime
                pass
        if store.exists():
            found = store.verify()
            assert found.ok, found
        turns += 1
    print(turns, flush=True)


def main(where: str, verb: str, *rest: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if verb == "race":
            race(where, int(rest[0]), int(rest[1]), rest[2].split(","), folder)
        elif verb == "read":
            read(where, folder)
        elif verb in ("operations", "moments", "writes", "limits", "errors"):
            unfinished(where, verb, rest[0].split(","), int(rest[1]), int(rest[2]), folder)
        else:
            for _ in range(int(rest[0])):
                ready_to_put(where, folder)
                put(where, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
