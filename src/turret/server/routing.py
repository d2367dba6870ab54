"""Which requests an experiment answers, by which of its versions, and what is told of them. No torch, no HTTP.

An experiment covers its alias: `news@production`, and plain `news` where that means the alias here. `news@3` is never
re-routed. It is in force here once its versions were loaded, or were tried; those that ran when the server began are in
force at once, because a unit must see its arm again after a restart. Where somebody moves the alias away from the
control, the alias is what is answered and the experiment gets no traffic: whoever promotes or rolls back is obeyed.

What an arm's version fails at counts as an error of the arm, and nothing else answers in its place. What is not the
version's doing (a full queue, a bad request, a client that goes away) counts for nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from turret.errors import (
    AdapterError,
    BadReference,
    Busy,
    Cancelled,
    Corrupt,
    DataError,
    Draining,
    NoRoom,
    NotFound,
    RequestError,
    StoreError,
    TurretError,
)
from turret.experiments import Assignment, Experiment, Router
from turret.reference import Reference
from turret.server.alias_watcher import AGAIN, AliasWatcher
from turret.store import Version
from turret.store.catalog import PRODUCTION
from turret.tasks import stored_task

OUTSIDE = "none"  # in place of an arm, of a request that its experiment does not count
NOT_ITS_OWN = (Busy, Draining, Cancelled, DataError, RequestError)  # whatever the version


@dataclass(frozen=True)
class Placed:
    """A request that meets a running experiment. found: its arm; None where it is not counted."""

    experiment: Experiment
    found: Assignment | None

    @property
    def arm(self) -> str:
        return OUTSIDE if self.found is None else self.found.arm

    @property
    def headers(self) -> dict[str, str]:
        """The experiment's part of a receipt."""
        said = {"turret-experiment": str(self.experiment), "turret-arm": self.arm}
        return said if self.found is None else said | {"turret-probability": f"{self.found.probability:.9g}"}


class Routing:
    """`prepare` and `turn` are called by threads of their own; everything else by any."""

    def __init__(
        self,
        router: Router,
        follow: AliasWatcher,
        warm: Callable[[str], object],
        resolve: Callable[[str], Version],
        *,
        base: str,
        clock: Callable[[], float],
    ) -> None:
        self.router, self.follow = router, follow
        self._warm, self._resolve, self._base, self._clock = warm, resolve, base, clock
        self._one = threading.Lock()
        self._ours: dict[int, bool] = {}  # experiment -> whether its control is of this server's base
        self._in_force: set[int] | None = None  # None: nobody has looked yet
        self._trouble: dict[tuple[int, str], str] = {}  # experiment and arm -> why its version cannot be loaded
        self._again = 0.0
        self.ready = False

    # --- a request ----------------------------------------------------------------------------------------------------

    def place(self, reference: str, unit: str | None, request: str) -> Placed | None:
        """Where the running experiment sends the request; None where none covers the reference.

        unit: as the client says it; request: the request's own id, the unit where requests are what is counted.
        """
        experiment = self._covering(reference)
        if experiment is None or not self._is_in_force(experiment):
            return None
        alone = not any(arm.live for arm in experiment.candidates)  # all units see the control, whoever they are
        said = request if experiment.unit == "request" else unit or (request if alone else None)
        if said is None or self.paused(experiment) is not None:
            return Placed(experiment, None)
        return Placed(experiment, self.router.choose(experiment, said))

    def began(self, placed: Placed, receipt: str) -> None:
        """The version has taken the request."""
        if placed.found is not None:
            self.router.log(placed.found, receipt)

    def refused(self, placed: Placed, kind: str, error: BaseException, seconds: float) -> bool:
        """It has not; whether that is the arm's own error. Then the unit is noted: it was sent there."""
        own = self.failed(placed, kind, error, seconds)
        if own and placed.found is not None:
            self.router.log(placed.found)
        return own

    def failed(self, placed: Placed, kind: str, error: BaseException, seconds: float, arm: str | None = None) -> bool:
        """Count the error where it is the arm's own, and say whether it is. arm: a shadow's."""
        found, name = placed.found, arm or placed.arm
        if found is None or not self._its_own(placed.experiment, name, kind, error):
            return False
        if arm is None:
            self.router.answered(found, seconds=seconds, error=True)
        else:
            self.router.shadowed(found, arm, seconds=seconds, error=True)
        return True

    def answered(self, placed: Placed, seconds: float) -> None:
        if placed.found is not None:
            self.router.answered(placed.found, seconds=seconds)

    def given_up(self, placed: Placed, seconds: float) -> bool:
        """A client went away before the first word; whether it had waited for longer than the guard allows."""
        bound = placed.experiment.guards.max_seconds
        if placed.found is None or bound is None or seconds <= bound:
            return False
        self.router.answered(placed.found, seconds=seconds)
        return True

    # --- what is said of an experiment --------------------------------------------------------------------------------

    def paused(self, experiment: Experiment) -> str | None:
        """Why a running experiment gets no traffic here, if so."""
        number = self.follow.means(experiment.adapter, experiment.alias)
        if number is None or number == experiment.control.version:
            return None
        return (
            f"{experiment.adapter}@{experiment.alias} names {experiment.adapter}@{number}, not the control "
            f"{experiment.reference(experiment.control)}: that answers everybody; stop {experiment}, or move it back"
        )

    def trouble(self, experiment: Experiment) -> Mapping[str, str]:
        """Arm -> why its version cannot be loaded here."""
        return {arm: why for (known, arm), why in list(self._trouble.items()) if known == experiment.id}

    def in_force(self, experiment: Experiment) -> bool:
        """Whether it answers requests of this server."""
        known = any(each.id == experiment.id for each in self.router.all_running())
        return known and self._is_in_force(experiment) and self.paused(experiment) is None

    # --- upkeep -------------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Read what runs and write the log, once a second; raises StoreError where that could not be done."""
        self.router.turn()
        if self.router.problem is not None:
            raise StoreError(self.router.problem)

    def look(self) -> None:
        """Take up now what was begun, changed or ended."""
        self.router.look()
        self.prepare()

    def prepare(self) -> None:
        """Load the versions of what was begun, and only then let it answer."""
        with self._one:
            running = [each for each in self.router.all_running() if self._is_ours(each)]
            if self._in_force is None:
                self._in_force = {each.id for each in running}
                new = running
            else:
                new = [each for each in running if each.id not in self._in_force]
            if self._trouble and self._clock() >= self._again:
                new = running
            for experiment in new:
                self._load(experiment)
                self._in_force.add(experiment.id)
            ids = {each.id for each in running}
            self._in_force &= ids
            self._trouble = {key: why for key, why in self._trouble.items() if key[0] in ids}
            self.ready = True

    def _load(self, experiment: Experiment) -> None:
        for arm in experiment.arms:
            key = (experiment.id, arm.name)
            try:
                if arm.live:
                    self._warm(experiment.reference(arm))
                self._trouble.pop(key, None)
            except TurretError as error:
                self._trouble[key] = str(error)
                self._again = self._clock() + AGAIN

    # --- the inside ---------------------------------------------------------------------------------------------------

    def _covering(self, reference: str) -> Experiment | None:
        try:
            wanted = Reference.parse(reference)
        except BadReference:
            return None
        if wanted.version is not None:
            return None
        experiment = self.router.running(wanted.name)
        if experiment is None:
            return None
        plain = self.follow.alias if self.follow.means(wanted.name, None) is not None else PRODUCTION
        return experiment if (wanted.alias or plain) == experiment.alias else None

    def _is_in_force(self, experiment: Experiment) -> bool:
        here = self._in_force is None or experiment.id in self._in_force
        return here and self._is_ours(experiment)

    def _is_ours(self, experiment: Experiment) -> bool:
        known = self._ours.get(experiment.id)
        if known is None:
            base = self._resolve(experiment.reference(experiment.control)).manifest.get("base") or {}
            known = self._ours[experiment.id] = base.get("fingerprint") == self._base
        return known

    def _its_own(self, experiment: Experiment, arm: str, kind: str, error: BaseException) -> bool:
        if isinstance(error, NoRoom):  # of a version that could not be loaded; else of the text
            return arm in self.trouble(experiment)
        if isinstance(error, StoreError):
            return isinstance(error, Corrupt | NotFound)
        if isinstance(error, AdapterError):  # whoever asks a classifier for a text is wrong with every arm
            return self._fits(experiment, kind)
        return isinstance(error, Exception) and not isinstance(error, NOT_ITS_OWN)

    def _fits(self, experiment: Experiment, kind: str) -> bool:
        """Whether the control is asked for what it does."""
        try:
            task = self._resolve(experiment.reference(experiment.control)).part("task")
        except TurretError:
            return True
        return stored_task(task).request == kind
