"""The queue of trainings: submit a recipe with its data, watch it, cancel it, and work.

A worker may run on another machine, so the store gets a copy of the data, in the tenant's `queued/<digest>/<name>`. Its
path in the recipe becomes `<digest>/<name>`, which is the same on all machines: a worker trains in a folder with that
data alone. So nothing that a recipe names can be another file of the store or of the worker's machine, except a base in
a folder, which clients of a server cannot name.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, TypeAlias

from sqlalchemy import Connection

from turret.access import ANY, Access, check_patterns
from turret.arguments import checked_methods
from turret.data import memory
from turret.data.source import is_table, looks_like_id, not_a_table, open_rows
from turret.disk import PRIVATE, make_folder, permissions
from turret.errors import DataError, Interrupted, NotFound, RecipeError, StoreError
from turret.json_types import JsonObject
from turret.process import stop_on_sigterm
from turret.recipe import AUTO, Recipe
from turret.store import JobQueue, Store, client_files, queued_data, scratch
from turret.store.blobs import hash_file
from turret.store.jobs import STUDY_ID, OpenJob, StudyRow, StudySpec
from turret.store.queued_data import PLACE
from turret.store.runs import RunRow
from turret.workspace.progress import Say, silent

if TYPE_CHECKING:
    from turret.workspace.queue_worker import Worker

MOST_FILES = 1000  # in a folder of data
STORED = re.compile(f"{client_files.ID}/")  # begins the name of a file that was sent before
MOST_NAME = 200  # bytes of the name of a file that a client sends
STDIN = "-"
MOST_CELLS = 500  # of a comparison or a sweep that waits


@checked_methods
class Queue:
    """The trainings that wait in a store, and those that workers have taken from there."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def submit(self, recipe: Recipe, *, priority: int = 0) -> RunRow | StudyRow:
        """Put a training into the queue, with a copy of its data. Returns the run, as `Workspace.run` does.

        Args:
            priority: of -100 to 100, among the trainings of the same tenant; higher is earlier.

        Raises:
            QueueFull: too many trainings of the tenant wait.
        """
        return self._submit(with_absolute_base(recipe), _files_of(self._store, recipe.data.source), priority)

    def submit_sent(
        self,
        recipe: Recipe,
        files: Mapping[str, bytes | Path],
        *,
        priority: int = 0,
        own_base: str | None = None,
        study: StudySpec | None = None,
    ) -> RunRow | StudyRow:
        """As `submit`, for a client of a server: the data is in `files`, on the Hub, or in an installed package.

        Args:
            files: tables by name; `data.source` names one of them.
            own_base: the base of the server, which may be a folder.
            study: what the recipe is compared or searched by, as `as_spec` writes it.

        Raises:
            DataError: `data.source` or `base` would be a file of the server.
        """
        self.require_sent(recipe, files, own_base)
        source = recipe.data.source
        if source not in files:
            return self._submit(recipe, {}, priority, study)
        with scratch.folder(self._store.root) as working:
            return self._submit(recipe, {source: sent_file(files, source, working)}, priority, study)

    def require_sent(self, recipe: Recipe, files: Mapping[str, bytes | Path], own_base: str | None = None) -> None:
        """Raise unless a client of a server may plan and train a recipe with these files, as for `submit_sent`."""
        require_sent_source(recipe.data.source, files)
        if not _is_elsewhere_base(recipe.base) and recipe.base not in (AUTO, own_base):
            raise RecipeError(f"base {ascii(recipe.base)[:60]}: expected a Hub id or pypi:package, not a path")
        self._require_seen(recipe)

    def cancel(self, run: str) -> RunRow | StudyRow:
        """End a waiting training or study, or ask the worker of a running one to end it. Returns it.

        Raises:
            NotFound: no such run.
            InUse: it has ended, or is not from the queue.
        """
        self._queue().cancel(run)
        return self._row(run)

    def studies(self, most: int = 100) -> Sequence[StudyRow]:
        """The newest comparisons and sweeps that workers conduct, newest first."""
        return self._queue().studies(most) if self._store.exists() else []

    def study(self, id: str) -> StudyRow:
        """One of them; `result` has its cells. Raises NotFound."""
        return self._queue().study(id)

    def open_jobs(self, limit: int = 100) -> Sequence[OpenJob]:
        """What runs, then what waits, of all kinds of jobs."""
        return self._queue().open_jobs(limit) if self._store.exists() else []

    def _row(self, id: str) -> RunRow | StudyRow:
        return self.study(id) if id.startswith(STUDY_ID) else self._store.run(id)

    def resume(self, run: str) -> RunRow | StudyRow:
        """Put a training or a study that has failed or was cancelled back into the queue. Returns it.

        It resumes from its last checkpoint, or starts over if there is none.

        Raises:
            NotFound: no such run.
            InUse: it has not ended, has finished, or is not from the queue.
            DataError: its data is gone.
            QueueFull: too many trainings of the tenant wait.
        """

        def require(connection: Connection, recipe: str) -> None:
            source = str(tomllib.loads(recipe)["data"]["source"])
            if not queued_data.is_there(connection, self._store.root, self._store.artifacts, source):
                raise DataError(f"the data of run {run} was removed by a gc: send it again, as a new training")

        self._queue().resume(run, require)
        return self._row(run)

    def delete(self, run: str) -> None:
        """Delete a training that has ended, queued or not: its row, files and log. Its version stays.

        Raises:
            NotFound: no such run.
            InUse: it waits or runs.
        """
        self._store.run(run)
        self._store.training_runs().delete(run)

    def place(self, run: str) -> tuple[int, int] | None:
        """The place of a waiting training among those of its tenant, from 1, and how many wait; else None."""
        return self._queue().place(run)

    def log(self, run: str, after: int = 0) -> Sequence[JsonObject]:
        """The lines of a run's log, with `id`, `at` and `line`. after: the `id` of the last line that is known."""
        return self._queue().log(run, after)

    def limit(self, tenant: str, *, running: int | None = None, waiting: int | None = None) -> None:
        """Set how many trainings of a tenant may run and wait; None for no limit."""
        JobQueue.of(self._store, make=True).limit(tenant, running=running, waiting=waiting)

    def work(
        self,
        *,
        until_empty: bool = False,
        slots: int = 4,
        most_hours: float | None = None,
        silent_minutes: float = 60,
        bases: Sequence[str] = ANY,
        on_stage: Say | None = None,
    ) -> int:
        """Take trainings from the queue, of any tenants. Those of one base share it in memory. Returns how many.

        Args:
            until_empty: end once nothing is due; otherwise only Ctrl-C or SIGTERM ends it.
            slots: how many run at once. One that needs its base for itself runs alone.
            most_hours: a training that takes longer in one try ends as failed; None: any time.
            silent_minutes: a training without a step or a stage for longer is killed, and tried again.
            bases: patterns of the bases on the Hub that recipes may name.
        """
        if slots < 1:
            raise RecipeError(f"slots {slots}: expected 1 or more")
        say = on_stage or silent
        worker = None
        try:
            worker = self._start_worker(say, slots, most_hours, silent_minutes, bases)
            worker.work(until_empty)
        except (KeyboardInterrupt, Interrupted):
            say("stopped")
        finally:
            if worker is not None:
                worker.stop()
        return 0 if worker is None else worker.count

    def work_one(
        self,
        job: str | None = None,
        *,
        most_hours: float | None = None,
        silent_minutes: float = 60,
        bases: Sequence[str] = ANY,
        on_stage: Say | None = None,
    ) -> str | None:
        """Do one job of the queue: this one, or the next. Returns its state then; None if there was none to do.

        If another process has the job, this one waits until that ends it or is lost.

        Args:
            job: the id of a training or a cell, of any tenant. One that has ended is not done again.

        Raises:
            NotFound: no such job.
        """
        worker = self._start_worker(on_stage or silent, 1, most_hours, silent_minutes, bases)
        try:
            return worker.run_next() if job is None else worker.finish(job)
        finally:
            worker.stop()

    def _start_worker(
        self, say: Say, slots: int, most_hours: float | None, silent_minutes: float, bases: Sequence[str]
    ) -> Worker:
        """A worker in this process. Its `stop` returns its trainings to the queue."""
        from turret.workspace.queue_worker import WorkerLimits, start_worker

        for name, value in (("most_hours", most_hours), ("silent_minutes", silent_minutes)):
            if value is not None and not 0 < value < float("inf"):
                raise RecipeError(f"{name} {value}: expected a number above 0")
        most_seconds = None if most_hours is None else 3600 * most_hours
        stop_on_sigterm()
        check_patterns(["*"], bases)
        return start_worker(
            self._store, say, slots, WorkerLimits(most_seconds, 60 * silent_minutes, bases=tuple(bases))
        )

    def _queue(self) -> JobQueue:
        return JobQueue.of(self._store)

    def _submit(
        self, recipe: Recipe, files: Mapping[str, Path], priority: int, study: StudySpec | None = None
    ) -> RunRow | StudyRow:
        """files: path under the data -> file; a single one is the data itself."""
        queue = JobQueue.of(self._store, make=True)
        self._require_seen(recipe)
        if not files and PLACE.match(recipe.data.source):
            raise DataError(f"data.source {ascii(recipe.data.source)[:60]} is not a file here: give its path")
        source, place = _place_data(self._store, recipe.data.source, files)
        recipe = recipe.changed(data={"source": source})
        return self._row(queue.submit(recipe.name, recipe.to_toml(), priority=priority, place=place, study=study))

    def _require_seen(self, recipe: Recipe) -> None:
        """Raise NotFound if this caller does not see the adapter, the base or the first version of a recipe."""
        access = self._store.access
        if not access.sees(recipe.name):
            raise NotFound(f"no adapter {recipe.name} can be trained with this token: give a name that it may see")
        if "*" not in access.bases and not access.sees_base(recipe.base):
            raise NotFound(f"no base {ascii(recipe.base)[:60]} for this token: give a base that it may use")
        for version in (recipe.train.init_from, recipe.task.reference):
            if version is not None:
                self._store.resolve(version)


SentFiles: TypeAlias = Mapping[str, bytes | Path]  # name of a table -> its content, or a file with that


def require_sent_source(source: str, files: SentFiles) -> None:
    """Raise DataError unless a source is one of the files that a client sent, or data that no machine has as a file."""
    for name in files:
        require_table_name(name.partition("/")[2] if STORED.match(name) else name)
    if source not in files and (PLACE.match(source) or not _is_elsewhere(source)):
        raise DataError(
            f"data.source {ascii(source)[:60]} is not in files: send the table there, or give a Hub id or pypi:package"
        )


def is_sent_source(source: str) -> bool:
    """Whether the data of a recipe was sent to the store, or is of the Hub or of a package: no file of a machine."""
    return PLACE.match(source) is not None or _is_elsewhere(source)


def require_table_name(name: str) -> None:
    """Raise DataError unless a file that a client sends has a plain name, of a table."""
    plain = name.isprintable() and "\\" not in name and len(name.encode("utf-8", "replace")) <= MOST_NAME
    plain = plain and PurePosixPath(name).name == name and not name.startswith((".", "~"))
    if not plain:
        raise DataError(f"files: {ascii(name)[:60]} is not a plain file name of a table, such as reviews.csv")
    if not is_table(Path(name)):
        raise DataError(not_a_table(Path(name)))


def sent_file(files: SentFiles, name: str, folder: Path) -> Path:
    """The file of that name, written into a folder if a client sent its content."""
    content = files[name]
    if isinstance(content, Path):
        return content
    (folder / name).write_bytes(content)
    return folder / name


Place = Callable[[Callable[[Connection], str]], str]  # makes sure of data, for `JobQueue`


def placed_data(store: Store, source: str) -> tuple[str, Place]:
    """The source under which workers find some data, and what copies local files there. Raises DataError."""
    return _place_data(store, source, _files_of(store, source))


def _place_data(store: Store, source: str, files: Mapping[str, Path]) -> tuple[str, Place]:
    if files:
        name = (memory.name_of_rows(source) if memory.is_rows_source(source) else Path(source).name) or "data"
        named = {name if path == source else f"{name}/{path}": file for path, file in files.items()}
        place = _digest(named)
        source, files = f"{place}/{name}", {f"{place}/{path}": file for path, file in named.items()}
    return source, partial(queued_data.submit, store.root, store.database(make=True), store.artifacts, files)


def _files_of(store: Store, source: str) -> Mapping[str, Path]:
    """The files of local data; empty for data of the Hub or of a package. Raises DataError."""
    if not memory.is_rows_source(source):
        return _local_files(source)
    store.bring_rows(source)
    open_rows(source)  # an error if they are nowhere
    return dict(_of_folder(memory.folder_of(source)))


def _digest(files: Mapping[str, Path]) -> str:
    """Of names and contents: the same data is the same place, wherever it comes from."""
    digest = hashlib.sha256()
    for path, file in sorted(files.items()):
        digest.update(f"{path}\n{hash_file(file).digest}\n".encode())
    return digest.hexdigest()[:32]


def _local_files(source: str) -> Mapping[str, Path]:
    """The files of local data; empty for data of the Hub or of a package. Raises DataError."""
    if source == STDIN:
        raise DataError("data from stdin cannot wait in the queue: write it to a file first")
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return {source: path}
        if path.is_dir():
            return dict(_of_folder(path))
    except OSError as error:
        raise DataError(f"data {ascii(source)[:100]} cannot be read: {error.strerror}: check the path") from None
    if not _is_elsewhere(source):
        raise DataError(f"there is no file or folder {ascii(source)[:100]}: check the path")
    return {}


def _of_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if len(found) > MOST_FILES:
        raise DataError(f"data {folder}: {len(found)} files, and at most {MOST_FILES} go into the queue: use fewer")
    for path in found:
        yield path.relative_to(folder).as_posix(), path


def _is_elsewhere(source: str) -> bool:
    """Whether data or a base is of the Hub or of a package, wherever the worker runs."""
    local = source.startswith((".", "/", "~")) or memory.is_rows_source(source) or is_table(Path(source))
    return source.startswith("pypi:") or (not local and looks_like_id(source))


def _is_elsewhere_base(base: str) -> bool:
    """Whether a base is of the Hub or of a package: not a file, whose name may look like an id of the Hub."""
    return base.startswith("pypi:") or (_is_elsewhere(base) and not base.lower().endswith(".gguf"))


def require_base(recipe: Recipe, patterns: Sequence[str]) -> None:
    """Raise RecipeError if a recipe names a base of the Hub that a worker does not allow."""
    base = recipe.base
    free = base == AUTO or base.startswith("pypi:") or Path(base).is_absolute()
    if not free and not Access(bases=tuple(patterns)).sees_base(base):
        raise RecipeError(
            f"base {ascii(base)[:80]} is not one that this worker may use (--bases {' '.join(patterns)[:80]}): name "
            "another, or ask the operator"
        )


def with_absolute_base(recipe: Recipe) -> Recipe:
    """A base in a folder keeps its place when the worker's current folder is another one."""
    base = Path(recipe.base).expanduser()
    if not recipe.base.startswith("pypi:") and base.exists():
        return recipe.model_copy(update={"base": str(base.absolute())})
    return recipe


def bring_data(store: Store, recipe: Recipe, folder: Path) -> Path:
    """Copy the data of a queued recipe to this machine, and show it in an empty folder. Returns that.

    Raises:
        StoreError: the store does not have the data of its tenant, or does not answer.
    """
    place = PLACE.match(recipe.data.source)
    if place is None:
        return folder
    own = queued_data.folder_of(store.access.tenant)
    if not store.root.exists():
        make_folder(store.root, PRIVATE)
    make_folder(store.root / own, permissions(store.root))
    store.artifacts.bring(f"{own}/{recipe.data.source}")
    if not (store.root / own / recipe.data.source).exists():
        raise StoreError(f"the data of the training, {recipe.data.source}, is not in the store: submit it again")
    data = (store.root / own / place[0]).absolute()
    try:
        (folder / place[0]).symlink_to(data, target_is_directory=True)
    except OSError:  # Windows
        shutil.copytree(data, folder / place[0])
    return folder


# --- comparisons and sweeps that wait ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparisonRequest:
    """The options of a comparison."""

    methods: str | None = None  # None: base, the task's baselines, full, lora and prefix
    seeds: int = 5
    budget: float | None = None  # seconds; None: until all cells have run
    fractions: tuple[float, ...] = (1.0,)  # of the training examples
    margin: float = 1.0  # points
    against: str = "full"
    lr: float | Literal["auto"] | None = None  # for every method; None: each method's own
    texts: bool = True  # whether the report shows examples


@dataclass(frozen=True)
class SweepOrder:
    """A sweep that waits: as `Workspace.sweep` takes it."""

    settings: Mapping[str, str]
    trials: int | None = None
    at_once: int = 4
    budget: float | None = None


Order: TypeAlias = ComparisonRequest | SweepOrder


def as_spec(order: Order, sent: str) -> StudySpec:
    """For the row of its job. sent: the data, as the client named it."""
    verb = "sweep" if isinstance(order, SweepOrder) else "compare"
    return {"verb": verb, "sent": sent, "order": asdict(order)}


def order_of(spec: StudySpec) -> Order:
    """What `as_spec` wrote."""
    values: JsonObject = dict(spec["order"])
    if spec["verb"] == "sweep":
        return SweepOrder(**values)
    return ComparisonRequest(**values | {"fractions": tuple(values["fractions"])})
