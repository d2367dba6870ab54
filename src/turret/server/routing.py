"""Which version answers a request: what its alias means on this server, and whether an experiment covers it.

An experiment covers its alias: `news@production`, and plain `news` if that means the alias here. `news@3` always means
version 3. An experiment answers here once its versions were loaded or failed to load. Experiments that ran when the
server started answer at once, because a unit must see its arm again after a restart. If the alias no longer names the
control, because somebody promoted or rolled back, the experiment gets no traffic.

`Shadows` runs further versions beside an answer.

An error that the version of an arm causes counts as an error of the arm, and no other version answers instead. Other
errors, such as a full queue, a bad request or a client that disconnects, count for no arm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from turret import errors
from turret.audit import Mark
from turret.engine import Done, Event, Failed, Piece, SamplingParams, Ticket
from turret.experiments import Assignment, Experiment, Router
from turret.reference import Reference
from turret.server.engines import Input, SeenEngines
from turret.server.limits import RequestLimits
from turret.server.logs import Log
from turret.server.metrics import Metrics
from turret.store import Pointing, Store, Version
from turret.store.catalog import PRODUCTION
from turret.tasks import Task, stored_task
from turret.tasks.shapes import Answer
from turret.tasks.task import RequestKind

# --- aliases ----------------------------------------------------------------------------------------------------------
# Which version each alias means on this server: the one in the store, once it is loaded.
#
# Any process may move an alias in the store at any time. `poll` compares a mark of the newest move. If the new version
# replaces one in memory, it is loaded first, so that no request waits for a load. If the load fails, the old version
# stays in force, and `failed_moves` says why. An alias whose version is not in memory moves at once. Plain names mean
# the followed alias (`production`); its versions are loaded in advance, as many as memory holds.


RETRY_SECONDS = 30.0  # until a version that could not be loaded is tried again
Key = tuple[str, str]  # name, alias


@dataclass(frozen=True)
class FailedMove:
    """A move in the store that this server could not follow."""

    version: str  # the version that could not be loaded
    problem: str
    retry_at: float


class AliasWatcher:
    """The aliases as this server has them. One thread calls `poll`; any thread may call the rest.

    Args:
        store: Says where every alias points.
        engines: Load the versions.
        alias: What plain names mean.
    """

    def __init__(self, store: Store, engines: SeenEngines, alias: str, clock: Callable[[], float]) -> None:
        self._store, self._engines, self.alias, self._clock = store, engines, alias, clock
        self._move: int | Mark | None = None  # the mark of the newest move that `poll` has seen
        self._stored: Mapping[Key, Pointing] = {}
        self._to_load: list[str] = []
        self._lock = threading.Lock()
        self._in_force: dict[Key, Pointing] = {}
        self._failed: dict[Key, FailedMove] = {}
        self.failures = 0

    @property
    def ready(self) -> bool:
        """Whether the store was read and every version to load in advance was loaded, or failed to load."""
        return self._move is not None and not self._to_load

    @property
    def failed_moves(self) -> Mapping[Key, FailedMove]:
        """The moves that this server could not follow."""
        return self._failed

    def version_of(self, name: str, alias: str | None) -> int | None:
        """The version in force; None if this server does not follow the alias."""
        found = self._in_force.get((name, alias or self.alias))
        return None if found is None else found.number

    def exact(self, reference: str) -> str:
        """`sentiment@production` -> `sentiment@3`, if this server follows that alias; else the reference unchanged.

        Each part of a composition is taken on its own.
        """
        if "+" in reference:
            return "+".join(map(self.exact, reference.split("+")))
        try:
            parsed = Reference.parse(reference)
        except errors.BadReference:
            return reference
        number = None if parsed.version is not None else self.version_of(parsed.name, parsed.alias)
        return reference if number is None else f"{parsed.name}@{number}"

    def with_alias(self, reference: str) -> str:
        """`sentiment` -> `sentiment@production`, if this server follows that alias; else the reference unchanged."""
        parts = [
            each if self.version_of(each, None) is None else f"{each}@{self.alias}" for each in reference.split("+")
        ]
        return "+".join(parts)

    def poll(self, seconds: float = 0.5, mark: Mark | None = None) -> None:
        """Follow the store once, and then load versions in advance for about that many seconds.

        mark: What differs after a move, if it was just read, for example for many tenants.
        """
        with self._lock:
            if (self._store.last_move() if mark is None else mark) != self._move or self._retry_due():
                move, found = self._store.pointing()
                failed = self._follow_all(found)
                self._move = move if mark is None else mark  # at the end: until then this server is not ready
                if failed is not None:
                    raise failed
            self._load_ahead(self._clock() + seconds)

    def _follow_all(self, found: Sequence[Pointing]) -> Exception | None:
        """Follow every alias, also if one of them fails: it is tried again later. Returns the first error."""
        first, failed = self._move is None, None
        self._stored = {(each.name, each.alias): each for each in found}
        for key in self._in_force.keys() - self._stored.keys():
            del self._in_force[key]
            self._failed.pop(key, None)
        for key, each in self._stored.items():
            if self._digest(key) == each.digest:
                self._failed.pop(key, None)
                continue
            try:
                self._follow(key, each, first=first)
            except Exception as error:  # a bug, or a database that is away
                self._fail(key, f"{each.name}@{each.number}", str(error))
                failed = failed or error
        return failed

    def _retry_due(self) -> bool:
        now = self._clock()
        return any(each.retry_at <= now for each in self._failed.values())

    def _digest(self, key: Key) -> str | None:
        found = self._in_force.get(key)
        return None if found is None else found.digest

    def _follow(self, key: Key, new: Pointing, *, first: bool) -> None:
        old, version = self._in_force.get(key), f"{new.name}@{new.number}"
        if new.base not in self._engines.fingerprints:
            if old is not None:
                self._fail(key, version, f"{version} was trained on another base than this server's")
            return
        followed = new.alias == self.alias
        if first and followed:
            self._to_load.append(version)
        elif (replaces := old is not None and self._engines.in_memory(old.digest)) or followed:
            try:
                (self._engines.warm if replaces else self._engines.warm_ahead)(version)
            except errors.TurretError as error:
                if old is not None:
                    self._fail(key, version, str(error))
                    return
                self.failures += 1
        self._in_force[key] = new
        self._failed.pop(key, None)

    def _fail(self, key: Key, version: str, problem: str) -> None:
        self.failures += 1
        self._failed[key] = FailedMove(version, problem, self._clock() + RETRY_SECONDS)

    def _load_ahead(self, until: float) -> None:
        while self._to_load and self._clock() < until:
            try:
                if not self._engines.warm_ahead(self._to_load[0]):
                    self._to_load = []  # memory is full: requests load what they ask
                    return
            except errors.TurretError:
                self.failures += 1  # a request for the version gets the error
            self._to_load.pop(0)


class SeenAliases(AliasWatcher):
    """The aliases of a tenant, as one access sees them: one that names an unseen version names none. Reads the store.

    Args:
        whole: Follows the store.
        engines: As the access sees them.
    """

    def __init__(self, whole: AliasWatcher, engines: SeenEngines) -> None:
        self._whole, self._engines, self.alias = whole, engines, whole.alias

    @property
    def ready(self) -> bool:
        return self._whole.ready

    @property
    def failed_moves(self) -> Mapping[Key, FailedMove]:
        return {key: each for key, each in self._whole.failed_moves.items() if self._engines.sees(each.version)}

    def version_of(self, name: str, alias: str | None) -> int | None:
        number = self._whole.version_of(name, alias)
        return number if number is not None and self._engines.sees(f"{name}@{number}") else None

    def poll(self, seconds: float = 0.5, mark: Mark | None = None) -> None:
        self._whole.poll(seconds, mark)


# --- experiments ------------------------------------------------------------------------------------------------------


UNCOUNTED = "none"  # the arm of a request that its experiment does not count
NOT_OF_THE_ARM = (
    errors.Busy,
    errors.Draining,
    errors.Cancelled,
    errors.DataError,
    errors.RequestError,
)  # errors that no version causes


@dataclass(frozen=True)
class Placement:
    """A request that a running experiment covers. assignment: None if the experiment does not count the request."""

    experiment: Experiment
    assignment: Assignment | None

    @property
    def arm(self) -> str:
        return UNCOUNTED if self.assignment is None else self.assignment.arm

    @property
    def headers(self) -> dict[str, str]:
        """The experiment's headers of a receipt."""
        headers = {"turret-experiment": str(self.experiment), "turret-arm": self.arm}
        if self.assignment is not None:
            headers["turret-probability"] = f"{self.assignment.probability:.9g}"
        return headers


class Routing:
    """The running experiments on this server. `prepare` and `turn` have a thread each; any thread calls the rest.

    Args:
        engines: Load the versions.
        store: Has them.
    """

    def __init__(
        self, router: Router, aliases: AliasWatcher, engines: SeenEngines, store: Store, clock: Callable[[], float]
    ) -> None:
        self.router, self.aliases = router, aliases
        self._engines, self._store, self._clock = engines, store, clock
        self._lock = threading.Lock()
        self._controls: dict[int, Version] = {}  # of each experiment
        self._in_force: set[int] | None = None  # None until `prepare` has run
        self._problems: dict[tuple[int, str], str] = {}  # (experiment, arm) -> why its version cannot be loaded
        self._retry_at = 0.0
        self.ready = False

    # --- a request ----------------------------------------------------------------------------------------------------

    def place(self, reference: str, unit: str | None, request: str, sees: Callable[[str], bool]) -> Placement | None:
        """The arm of a request; None if no running experiment covers the reference.

        Args:
            unit: As the client names it.
            request: The request's id, which is the unit of an experiment that counts requests.
            sees: Whether the caller sees a version. One that does not see all arms is outside the experiment.
        """
        if self._in_force is not None and not self._in_force:
            return None  # no experiment answers here
        experiment = self._covering(reference)
        if experiment is None or not self._is_in_force(experiment):
            return None
        if not all(sees(experiment.reference(arm)) for arm in experiment.arms):
            return None
        control_only = not any(arm.live for arm in experiment.candidates)  # then every unit sees the control
        key = request if experiment.unit == "request" else unit or (request if control_only else None)
        if key is None or self.pause_reason(experiment) is not None:
            return Placement(experiment, None)
        return Placement(experiment, self.router.choose(experiment, key))

    def log_accepted(self, placement: Placement, receipt: str) -> None:
        """The engine has accepted the request."""
        if placement.assignment is not None:
            self.router.log(placement.assignment, receipt)

    def refused(self, placement: Placement, kind: RequestKind, error: BaseException, seconds: float) -> bool:
        """The engine has refused the request. If the arm caused that, log its unit, and return True."""
        own = self.failed(placement, kind, error, seconds)
        if own and placement.assignment is not None:
            self.router.log(placement.assignment)
        return own

    def failed(
        self, placement: Placement, kind: RequestKind, error: BaseException, seconds: float, arm: str | None = None
    ) -> bool:
        """Count an error if the arm caused it, and return whether it did. arm: of a shadow."""
        assignment, name = placement.assignment, arm or placement.arm
        if assignment is None or not self._caused_by_arm(placement.experiment, name, kind, error):
            return False
        if arm is None:
            self.router.answered(assignment, seconds=seconds, error=True)
        else:
            self.router.shadowed(assignment, arm, seconds=seconds, error=True)
        return True

    def note_answer(self, placement: Placement, seconds: float) -> None:
        if placement.assignment is not None:
            self.router.answered(placement.assignment, seconds=seconds)

    def abandoned(self, placement: Placement, seconds: float) -> bool:
        """The client disconnected before the first word. Count that, and return True, if it waited too long."""
        bound = placement.experiment.guards.max_seconds
        if placement.assignment is None or bound is None or seconds <= bound:
            return False
        self.router.answered(placement.assignment, seconds=seconds)
        return True

    # --- the state of an experiment -----------------------------------------------------------------------------------

    def task(self, experiment: Experiment) -> type[Task]:
        """The task of the experiment's control."""
        return stored_task(self._control(experiment).task)

    def pause_reason(self, experiment: Experiment) -> str | None:
        """Why a running experiment gets no traffic here; None if it does."""
        number = self.aliases.version_of(experiment.adapter, experiment.alias)
        if number is None or number == experiment.control.version:
            return None
        return (
            f"{experiment.adapter}@{experiment.alias} names {experiment.adapter}@{number}, not the control "
            f"{experiment.reference(experiment.control)}: that version answers every request; stop {experiment}, "
            "or move the alias back"
        )

    def problems(self, experiment: Experiment) -> Mapping[str, str]:
        """Arm -> why its version cannot be loaded here."""
        return {arm: why for (known, arm), why in list(self._problems.items()) if known == experiment.id}

    def in_force(self, experiment: Experiment) -> bool:
        """Whether the experiment answers requests of this server."""
        running = any(each.id == experiment.id for each in self.router.running_experiments())
        return running and self._is_in_force(experiment) and self.pause_reason(experiment) is None

    # --- following the store ------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Read the running experiments and write the log. Raises StoreError if the store cannot be reached."""
        self.router.turn()
        if self.router.problem is not None:
            raise errors.StoreError(self.router.problem)

    def refresh(self) -> None:
        """Apply at once what was started, changed or ended."""
        self.router.look()
        self.prepare()

    def prepare(self) -> None:
        """Load the versions of new experiments, and then let them answer."""
        with self._lock:
            running = [each for each in self.router.running_experiments() if self._is_on_base(each)]
            if self._in_force is None:
                self._in_force = {each.id for each in running}
                new = running
            else:
                new = [each for each in running if each.id not in self._in_force]
            if self._problems and self._clock() >= self._retry_at:
                new = running
            for experiment in new:
                self._load(experiment)
                self._in_force.add(experiment.id)
            ids = {each.id for each in running}
            self._in_force &= ids
            self._problems = {key: why for key, why in self._problems.items() if key[0] in ids}
            self.ready = True

    def _load(self, experiment: Experiment) -> None:
        for arm in experiment.arms:
            key = (experiment.id, arm.name)
            try:
                if arm.live:
                    self._engines.warm(experiment.reference(arm))
                self._problems.pop(key, None)
            except errors.TurretError as error:
                self._problems[key] = str(error)
                self._retry_at = self._clock() + RETRY_SECONDS

    # --- internals ----------------------------------------------------------------------------------------------------

    def _covering(self, reference: str) -> Experiment | None:
        try:
            parsed = Reference.parse(reference)
        except errors.BadReference:
            return None
        if parsed.version is not None:
            return None
        experiment = self.router.running(parsed.name)
        if experiment is None:
            return None
        plain = self.aliases.alias if self.aliases.version_of(parsed.name, None) is not None else PRODUCTION
        return experiment if (parsed.alias or plain) == experiment.alias else None

    def _is_in_force(self, experiment: Experiment) -> bool:
        prepared = self._in_force is None or experiment.id in self._in_force
        return prepared and self._is_on_base(experiment)

    def _is_on_base(self, experiment: Experiment) -> bool:
        """Whether the experiment's versions were trained on a base of this server."""
        return self._control(experiment).base.get("fingerprint") in self._engines.fingerprints

    def _control(self, experiment: Experiment) -> Version:
        if experiment.id not in self._controls:
            self._controls[experiment.id] = self._store.resolve(experiment.reference(experiment.control))
        return self._controls[experiment.id]

    def _caused_by_arm(self, experiment: Experiment, arm: str, kind: RequestKind, error: BaseException) -> bool:
        if isinstance(error, errors.NoRoom):  # the version could not be loaded, or the text was too long
            return arm in self.problems(experiment)
        if isinstance(error, errors.StoreError):
            return isinstance(error, errors.Corrupt | errors.NotFound)
        if isinstance(error, errors.AdapterError):  # a request of the wrong kind fails with every arm
            return self.task(experiment).request == kind
        return isinstance(error, Exception) and not isinstance(error, NOT_OF_THE_ARM)


# --- shadows ----------------------------------------------------------------------------------------------------------
# Shadows: versions that are run in addition to the answer. They are recorded and compared, and never returned.


LOW_PRIORITY = -1  # that of requests is 0


class Shadows:
    """The shadows of this server.

    Args:
        limits: Of inputs at work or waiting, and of the seconds after which a shadow is abandoned.
        log: Gets the shadows' answers; None if texts are not logged.
    """

    def __init__(
        self,
        engines: SeenEngines,
        routing: Routing,
        metrics: Metrics,
        limits: RequestLimits,
        clock: Callable[[], float],
        log: Log | None,
    ) -> None:
        self.engines, self.routing, self.metrics = engines, routing, metrics
        self.limits, self.clock, self.log = limits, clock, log
        self._thread = ThreadPoolExecutor(1, "turret-shadow")
        self._closed = False
        self.lock = threading.Lock()
        self.running: set[_Shadow] = set()
        self.inputs = 0  # at work or waiting

    def start(
        self,
        placement: Placement,
        kind: RequestKind,
        inputs: Sequence[Input],
        options: Sequence[SamplingParams] | None,
        tickets: Sequence[Ticket],
    ) -> None:
        """Start the shadows of a request if there is room. Returns at once. tickets: of the request."""
        if placement.assignment is None:
            return
        for arm, version in placement.assignment.shadows:
            if not self._reserve(len(inputs)):
                self.metrics.shadow(str(placement.experiment), arm, "shed")
                continue
            shadow = _Shadow(self, placement, arm, kind, tickets)
            with suppress(RuntimeError):  # the server is shutting down
                self._thread.submit(shadow.run, version, list(inputs), options)

    def close(self) -> None:
        """Cancel all shadows."""
        with self.lock:
            self._closed = True
            running = list(self.running)
        self._thread.shutdown(wait=False, cancel_futures=True)
        for each in running:
            each.cancel()

    def _reserve(self, inputs: int) -> bool:
        with self.lock:
            if self._closed or self.inputs + inputs > self.limits.shadow_inputs:
                return False
            self.inputs += inputs
            return True


class _Shadow:
    """One shadow of one request. It ends when both it and the request's own answers have ended."""

    def __init__(
        self, shadows: Shadows, placement: Placement, arm: str, kind: RequestKind, tickets: Sequence[Ticket]
    ) -> None:
        self._shadows, self._placement, self._arm, self._kind = shadows, placement, arm, kind
        self._request_tickets = list(tickets)
        self._tickets: list[Ticket] = []
        self._answers: dict[tuple[bool, int], Answer | None] = {}  # (of the shadow?, input) -> None if it failed
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._ended_at = 0.0
        self._samples = False

    def run(self, version: str, inputs: Sequence[Input], options: Sequence[SamplingParams] | None) -> None:
        """Submit the shadow and listen to it, on the shadows' thread. Errors are recorded, never raised."""
        engines, clock = self._shadows.engines, self._shadows.clock
        self._started_at = self._ended_at = clock()
        self._samples = options is not None and options[0].samples
        with self._shadows.lock:
            self._shadows.running.add(self)
        try:
            for place, each in enumerate(inputs):
                settings = None if options is None else options[place]
                deadline = self._shadows.limits.answer_seconds
                self._tickets.append(
                    engines.submit(self._kind, each, version, settings, priority=LOW_PRIORITY, deadline=deadline)
                )
        except Exception as error:
            self._error, self._ended_at = error, clock()
            self.cancel()
            self._end()
            return
        for shadow, tickets in ((True, list(self._tickets)), (False, self._request_tickets)):
            for place, ticket in enumerate(tickets):
                ticket.listen(self._listener(shadow, place))

    def cancel(self) -> None:
        for ticket in list(self._tickets):
            ticket.cancel()

    def _listener(self, shadow: bool, place: int) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if isinstance(event, Piece):
                return
            with self._lock:
                self._answers[shadow, place] = event.answer if isinstance(event, Done) else None
                if shadow:
                    self._ended_at = self._shadows.clock()
                    if isinstance(event, Failed):
                        self._error = self._error or event.error
                complete = len(self._answers) == len(self._tickets) + len(self._request_tickets)
            if complete:
                self._end()

        return hear

    def _end(self) -> None:
        try:
            self._record()
        finally:
            with self._shadows.lock:
                self._shadows.inputs -= len(self._request_tickets)
                self._shadows.running.discard(self)

    def _record(self) -> None:
        shadows, placement, arm = self._shadows, self._placement, self._arm
        seconds, agrees = self._ended_at - self._started_at, self._agrees()
        assert placement.assignment is not None
        if self._error is not None:
            own = shadows.routing.failed(placement, self._kind, self._error, seconds, arm)
            what = "failed" if own else "shed"
        else:
            shadows.routing.router.shadowed(placement.assignment, arm, seconds=seconds, agrees=agrees)
            what = "answered" if agrees is None else "agreed" if agrees else "differed"
        experiment = str(placement.experiment)
        shadows.metrics.shadow(experiment, arm, what)
        if shadows.log is not None:
            answers = [self._answers.get((True, place)) for place in range(len(self._request_tickets))]
            shadows.log.write("shadow", experiment=experiment, arm=arm, what=what, answers=answers)

    def _agrees(self) -> bool | None:
        """Whether the task judges all answers equal; None if one is missing, or if texts are sampled."""
        pairs = [
            (self._answers.get((True, place)), self._answers.get((False, place)))
            for place in range(len(self._request_tickets))
        ]
        both = [(shadow, answer) for shadow, answer in pairs if shadow and answer]
        task = self._shadows.routing.task(self._placement.experiment)
        if self._samples or len(both) < len(pairs) or task.request != self._kind:
            return None
        return all(task.prediction_of(shadow) == task.prediction_of(answer) for shadow, answer in both)
