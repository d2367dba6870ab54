"""`gc` removes the data of trainings that have ended, and never what a waiting or running one needs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from store.by_hand import everything, forget_uploads

from turret.errors import QueueFull
from turret.store import JobQueue, Store, queued_data
from turret.store.artifacts import Artifacts

FILES = "s3"  # of a store by URL

PLACE, OTHER = "a" * 32, "b" * 32
Submit = Callable[..., str]


@pytest.fixture
def line(store: Store) -> JobQueue:
    return JobQueue.of(store, make=True)


@pytest.fixture
def submit(store: Store, line: JobQueue, tmp_path: Path) -> Submit:
    """Queues a training of the data at a place."""
    table = tmp_path / "table.csv"
    table.write_text("text,label\n")

    def submit(place: str = PLACE, files: tuple[str, ...] = ("a.csv",)) -> str:
        data = {f"{place}/{name}": table for name in files}
        keep = partial(queued_data.submit, store.root, store.database(), store.artifacts, data)
        return line.submit("a", f'[data]\nsource = "{place}/{files[0]}"\n', place=keep)

    return submit


def there(store: Store, place: str = PLACE, name: str = "a.csv") -> bool:
    """Whether a worker would find the data."""
    store.artifacts.bring(f"queued/{place}/")
    return (store.root / "queued" / place / name).exists()


def collected(store: Store, **how: bool) -> list[str]:
    return [each.path for each in store.gc(**how).removed if each.why == queued_data.WHY]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["cancelled", "finished", "failed"])
def test_data_goes_when_its_last_training_has_ended(store, line, submit, end) -> None:
    first, second, other = submit(), submit(), submit(OTHER)
    assert collected(store) == []
    assert there(store)
    line.cancel(first)
    taken = line.take()
    assert taken is not None
    assert taken.id == second
    assert collected(store) == [], "one runs"
    if end == "cancelled":
        line.cancel(second)
        line.end_try(taken, None)
    elif end == "failed":
        line.end_try(taken, "a missing column", again=False)
    else:
        store.end_run(line.adopt_training(taken), "finished", result={})
    assert store.run(second)["state"] == end
    would = collected(store, dry_run=True)
    assert would
    assert all(PLACE in path for path in would)
    assert there(store)
    assert collected(store) == would
    assert not there(store)
    assert there(store, OTHER)
    assert store.run(other)["state"] == "waiting"
    assert collected(store) == []


def test_submissions_beside_a_gc_that_never_rests_keep_their_data(store, line, submit) -> None:
    """The same data each time, which the gc removes as soon as its training has ended."""
    stop, removed, failed = threading.Event(), [0], list[BaseException]()

    def collect() -> None:
        own = Store(store.location)
        while not stop.is_set():
            try:
                removed[0] += len(collected(own))
            except BaseException as error:
                failed.append(error)
                return

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for _ in range(12):
            run = submit(files=("a.csv", "b.csv"))
            assert there(store)
            assert there(store, name="b.csv")
            line.cancel(run)
    finally:
        stop.set()
        thread.join()
    removed[0] += len(collected(store))  # the last one, or on a slow store all
    assert failed == []
    assert removed[0] > 0


def test_a_submission_that_is_refused_leaves_nothing(store, line, submit) -> None:
    line.limit("default", running=None, waiting=0)
    before = everything(store)
    with pytest.raises(QueueFull):
        submit()
    store.gc()
    assert store.artifacts.list_files("queued/") == []
    assert everything(store).keys() == before.keys()


def test_what_a_killed_gc_has_given_up_goes_with_the_next_one(store, line, submit, monkeypatch) -> None:
    run = submit()
    there(store)
    line.cancel(run)
    with monkeypatch.context() as killed:
        killed.setattr(Artifacts, "discard", lambda *_: None)
        killed.setattr(queued_data.shutil, "rmtree", lambda *_, **__: None)
        store.gc()
    assert list((store.root / "queued").iterdir()) != []
    assert not there(store), "the catalog does not list it"
    store.gc()
    assert list((store.root / "queued").iterdir()) == []
    assert store.verify().orphans == 0


def test_two_gcs_remove_the_same_folders_at_one_time(store, submit) -> None:
    submit()
    failed: list[Exception] = []

    def gc() -> None:
        try:
            for _ in range(6):
                store.gc()
        except Exception as error:
            failed.append(error)

    for number in range(60):
        folder = store.root / "queued" / f"{queued_data.GONE}{number:08x}-{number:032x}"
        for depth in range(4):
            folder = folder / f"deeper{depth}"
            folder.mkdir(parents=True)
            (folder / "a.csv").write_text("a")
    threads = [threading.Thread(target=gc) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failed == []
    assert not [path for path in (store.root / "queued").iterdir() if path.name.startswith(queued_data.GONE)]


def test_what_a_killed_submission_has_written_goes_once_it_is_old(store, line, submit, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as killed:
        killed.setattr("turret.store.uploads.end", die)
        killed.setattr(queued_data, "_move", die)
        with pytest.raises(Killed):
            submit()
    assert not there(store)
    forget_uploads(store)
    store.gc()
    assert store.verify().orphans == 0
    assert submit()
    assert there(store)
