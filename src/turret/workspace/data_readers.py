"""Helper processes that read the data of tenants, and who asks them. Loads neither torch nor numpy.

They alone open files of tenants: the data of queued runs, and files that clients of a server send. One writes the data
of a run as lines of JSON into a file, which the process that trains reads.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NotRequired, TypeAlias, TypedDict, final

from turret.access import Access
from turret.data import Dataset
from turret.data.examples import load_dataset, write_dataset
from turret.errors import DataError, EngineError, Interrupted, StoreError, TurretError
from turret.json_types import JsonObject
from turret.process import Died, HelperProcess
from turret.recipe import Recipe
from turret.store import Store
from turret.store.jobs import Job
from turret.workspace.child_process import MACHINE, OUTAGE, STOPPED, never_stopped, parents_store, status_of
from turret.workspace.queueing import bring_data
from turret.workspace.reading import read_dataset

READ = "dataset.jsonl"  # in the folder of a question
MEMORY = 16 << 30  # bytes that a reading may take
OFFLINE = "HF_HUB_OFFLINE"


class AboutReader(TypedDict):
    """The store of the helper process, and whether it leaves the Hub alone."""

    local: str
    offline: bool


@final
class ReadQuestion(TypedDict):
    """Data to read. sent: whether a client has put it into the folder."""

    tenant: str
    recipe: str
    folder: str
    sent: bool


@final
class LookQuestion(TypedDict):
    """A table to look at. rows: a sample of so many; 0: a draft of its recipe."""

    source: str
    folder: str
    settings: dict[str, str]
    rows: int


class HelperReply(TypedDict):
    """What was found, or an error with the status of the command line."""

    status: int
    text: NotRequired[str]
    found: NotRequired[JsonObject]


Reader: TypeAlias = HelperProcess[ReadQuestion | LookQuestion, HelperReply]


class DataReaders:
    """Helper processes that read data: as many as work at a time, each kept for the next question.

    Args:
        store: whose data it is.
        seconds: that a reading may take.
        folder: a private one, for what they write; None: the system's.
        idle: seconds without a question after which a process ends; None: never.
        offline: whether data of the Hub is read from its cache alone.
    """

    def __init__(
        self,
        store: Store,
        seconds: float,
        *,
        folder: Path | None = None,
        idle: float | None = None,
        offline: bool = False,
    ) -> None:
        self._store, self._folder, self._seconds = store, folder, seconds
        self._idle_seconds, self._offline = idle, offline
        self._idle: list[Reader] = []
        self._lock = threading.Lock()

    def read(self, taken: Job, stop: Callable[[], bool]) -> Dataset:
        """The data of a run. Raises the error of the data. stop: whether the run shall end."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            asked: ReadQuestion = {"tenant": taken.tenant, "recipe": taken.recipe, "folder": folder, "sent": False}
            self._ask(asked, stop)
            return load_dataset(Path(folder) / READ)

    def read_sent(self, tenant: str, recipe: Recipe, folder: Path) -> Path:
        """Read the data that a client sent into a folder. Returns the file for `load_dataset`, in the same folder."""
        asked: ReadQuestion = {"tenant": tenant, "recipe": recipe.to_toml(), "folder": str(folder), "sent": True}
        self._ask(asked, never_stopped)
        return folder / READ

    def inspect(self, source: str, folder: Path, settings: Mapping[str, str]) -> JsonObject:
        """As `turret.workspace.drafting.inspect`, as JSON, for a source in a folder."""
        return self._look({"source": source, "folder": str(folder), "settings": dict(settings), "rows": 0})

    def sample(self, source: str, folder: Path, most: int) -> JsonObject:
        """As `turret.workspace.drafting.sample`, as JSON, for a source in a folder."""
        return self._look({"source": source, "folder": str(folder), "settings": {}, "rows": most})

    def _look(self, asked: LookQuestion) -> JsonObject:
        return dict(self._ask(asked, never_stopped)["found"])

    def close(self) -> None:
        """End the processes that wait."""
        with self._lock:
            idle, self._idle = self._idle, []
        for each in idle:
            each.close()

    def _ask(self, asked: ReadQuestion | LookQuestion, stop: Callable[[], bool]) -> HelperReply:
        with self._reader() as reader:
            try:
                found = reader.ask(asked, stop)
            except EngineError as error:
                raise StoreError(str(error)) from None
        if stop():
            raise Interrupted(STOPPED)
        if isinstance(found, Died):
            seconds = self._seconds
            span = f"{seconds / 60:g} minutes" if seconds >= 120 else f"{seconds:g} seconds"
            why = f"took longer than {span}" if found.late else "ended its process"
            raise DataError(f"the data was not read: it {why}: check the file, or give a smaller or simpler one")
        if found["status"] in (OUTAGE, MACHINE):
            raise StoreError(str(found["text"]), outage=found["status"] == OUTAGE)
        if found["status"]:
            raise DataError(str(found["text"]))
        return found

    @contextmanager
    def _reader(self) -> Iterator[Reader]:
        """A process that reads data. A new one if all are at work."""
        with self._lock:
            reader = self._idle.pop() if self._idle else None
        if reader is None:
            where, problem = self._store.location.given, "the data cannot be read"
            reader = Reader(
                __name__,
                {"local": str(self._store.root.absolute()), "offline": self._offline},
                self._seconds,
                MEMORY,
                problem,
                store=where,
                idle=self._idle_seconds,
            )
        try:
            yield reader
        finally:
            with self._lock:
                self._idle.append(reader)


# --- the process ------------------------------------------------------------------------------------------------------


def helper(about: AboutReader) -> Callable[[ReadQuestion | LookQuestion], HelperReply]:
    """What reads the data of a run, or looks at a table, in a process of its own."""
    from turret.workspace.drafting import inspect, sample  # imports numpy

    store = parents_store(about["local"])
    if about["offline"]:
        os.environ[OFFLINE] = "1"

    def answer(asked: ReadQuestion | LookQuestion) -> HelperReply:
        try:
            if "source" in asked:
                os.chdir(asked["folder"])
                source, most = asked["source"], asked["rows"]
                found = asdict(sample(source, most)) if most else asdict(inspect(source, asked["settings"]))
                return {"status": 0, "found": found}
            _read_table(store.with_access(Access(asked["tenant"])), asked)
        except TurretError as error:
            return {"status": status_of(error), "text": str(error)}
        except (MemoryError, OSError) as error:
            return {"status": 1, "text": f"the data cannot be read: {str(error) or 'it takes too much memory'}"}
        finally:
            os.chdir("/")
        return {"status": 0}

    return answer


def _read_table(store: Store, asked: ReadQuestion) -> None:
    folder, recipe = Path(asked["folder"]), Recipe.from_toml(asked["recipe"])
    working = Path(tempfile.mkdtemp(prefix="data-", dir=folder))  # a reader that died has left its own
    os.chdir(folder if asked["sent"] else bring_data(store, recipe, working))
    write_dataset(read_dataset(store, recipe), folder / READ)
