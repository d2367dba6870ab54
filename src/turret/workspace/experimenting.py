"""The verbs of experiments: rows are begun, split and weighed by the room `experiments`, aliases moved by the store.

What ends an experiment and what moves its alias is one transaction of the store, so it is done or not done, whoever is
killed. Loads numpy where evidence is weighed, torch where golden examples must be asked.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from turret.errors import BadExperiment, ExperimentError, NotFound
from turret.experiments import assign as assigning
from turret.experiments import outcomes, rows
from turret.experiments.experiment import (
    OUTCOME_TTL,
    Experiment,
    Guards,
    Metric,
    check_alpha,
    check_steps,
    check_ttl,
    check_unit,
    named_arms,
)
from turret.experiments.outcomes import Recorded, Seen
from turret.reference import Reference, check_alias, check_name
from turret.store import Store, Version
from turret.store.catalog import PRODUCTION, now, who
from turret.workspace import decisions

if TYPE_CHECKING:
    from turret.experiments.analyze import Analysis, Memory
    from turret.workspace.promoting import Ask

STEPS = (0.05, 0.2, 0.5)
AT_ONCE = 1000  # outcomes in one transaction
Stage = Callable[[str], None] | None


@dataclass(frozen=True)
class ExperimentStatus:
    """An experiment as it is now: `verdicts` and `next` are for people, `as_json()` for machines."""

    weighed: Analysis
    done: tuple[str, ...] = ()  # what was carried out just now
    points: str | None = None  # the version that the alias names

    @property
    def experiment(self) -> Experiment:
        return self.weighed.experiment

    @property
    def verdicts(self) -> tuple[str, ...]:
        from turret.experiments import status_text

        return tuple(status_text.verdicts(self.weighed))

    @property
    def next(self) -> str:
        from turret.experiments import status_text

        return status_text.advice(self.weighed)

    def as_json(self) -> dict[str, Any]:
        from turret.experiments.status_text import void
        from turret.experiments.validity import NEEDED

        found, decision = self.weighed, self.weighed.decision
        return {
            **self.experiment.as_json(),
            "alias_names": self.points,
            "arms": [each.as_json() for each in found.arms],
            "sample_ratio": {"ok": not found.void, **found.checks, "needed": NEEDED},
            "void": void(found) if found.void else None,
            "verdicts": list(self.verdicts),
            "decision": {"action": decision.action, "arm": decision.arm, "why": decision.why},
            "done": list(self.done),
            "next": self.next,
            "history": [dict(each) for each in found.history],
        }


class LiveExperiment:
    """The experiment of one adapter name: the running one, or the last."""

    def __init__(self, store: Store, name: str, number: int | None = None) -> None:
        self._store, self.name, self.number = store, check_name(name), number

    def start(
        self,
        candidates: str | Sequence[str] = (),
        *,
        control: str | None = None,
        shadows: str | Sequence[str] = (),
        share: float | Mapping[str, float] | None = None,
        steps: Sequence[float] | None = None,
        metric: str = "binary",
        goal: str = "higher",
        unit: str = "user",
        alpha: float = 0.05,
        outcome_ttl: float = OUTCOME_TTL,
        guards: Guards | None = None,
        alias: str = PRODUCTION,
        salt: str | None = None,
    ) -> ExperimentStatus:
        """Begin to split the traffic of this name between the control and candidates, with shadows run beside.

        candidates, control, shadows: versions such as "news@2" or "news@candidate"; control is what the alias names,
        where left out. share: what the candidates get among them at first, or each by arm, the first of `steps` where
        left out. outcome_ttl: seconds after the first answer to a unit that its outcome counts.
        """
        measured = Metric.parse(metric, goal)
        planned = () if steps is None and share is not None else check_steps(STEPS if steps is None else steps)
        wanted_guards = (guards or Guards()).check(measured)
        versions = self._versions(control, _some(candidates), _some(shadows), check_alias(alias))
        (first, *others), shadowing = versions
        arms = named_arms(_known(first), [_known(each) for each in others], [_known(each) for each in shadowing])
        wanted = Experiment(
            id=0,
            adapter=self.name,
            number=0,
            state="running",
            alias=alias,
            salt=salt or secrets.token_hex(16),
            metric=measured,
            unit=check_unit(unit),
            alpha=check_alpha(alpha),
            guards=wanted_guards,
            steps=planned if others else (),
            outcome_ttl=check_ttl(outcome_ttl),
            arms=arms,
            revision=0,
            segments=(),
            weights={},
            created=now(),
            who=who(),
        )
        with self._store.database().writing() as connection:
            begun = rows.begin(connection, wanted, share if share is not None else planned[0])
        return self._status(begun)

    def ramp(self, share: float | Mapping[str, float] | None = None) -> ExperimentStatus:
        """Send another share of the traffic to the candidates: this one, or the next that was planned."""
        with self._store.database().writing() as connection:
            running = self._running(connection)
            wanted = running.next_share() if share is None else share
            if wanted is None:
                said = f"its ramp of {', '.join(f'{step:g}' for step in running.steps)} is at its end"
                raise ExperimentError(
                    f"{running} has no next step, {said if running.steps else 'none was planned'}: say a share, such "
                    f"as `turret experiment ramp {self.name} 50%`"
                )
            ramped = rows.ramp(connection, running, wanted, now(), who())
        return self._status(ramped)

    def assign(self, unit: str, receipt: str | None = None) -> tuple[str, str, float]:
        """Version, arm and probability of a unit, logged at once; a server asks `Workspace.router`, which is quick."""
        if receipt is not None:
            outcomes.check_receipt(receipt)
        with self._store.database().writing() as connection:
            running = self._running(connection)
            key = assigning.key_of(running.salt, unit)
            arm = running.arm(assigning.arm_at(running.segments, assigning.point_of(key)))
            chance = running.weights[arm.name]
            outcomes.log(connection, [Seen(running.id, key, arm.name, running.revision, chance, now(), receipt)])
        return running.reference(arm), arm.name, chance

    def outcome(self, value: object, *, receipt: str | None = None, unit: str | None = None) -> Recorded:
        """Tell what came of an answer, by its receipt or its unit; the result says what becomes of it."""
        if (receipt is None) == (unit is None):
            raise BadExperiment("an outcome needs the receipt of its answer or its unit, and one of them only")
        return self.outcomes([(receipt, unit, value)])[0]

    def outcomes(self, told: Iterable[tuple[str | None, str | None, object]]) -> list[Recorded]:
        """The same for many: (receipt or None, unit or None, value) each."""
        found: list[Recorded] = []
        for some in _pieces(told):
            with self._store.database().writing() as connection:
                experiment = rows.find(connection, self.name, self.number)
                for receipt, unit, value in some:
                    said = outcomes.record(connection, value, now(), receipt=receipt, unit=unit, experiment=experiment)
                    found.append(said)
        return found

    def status(self) -> ExperimentStatus:
        """Everything that is known of it, and what to do; changes nothing."""
        with self._store.database().reading() as connection:
            found = rows.find(connection, self.name, self.number)
        return self._status(found)

    def settle(self, memory: Memory | None = None) -> ExperimentStatus:
        """Carry out what its guards ask: roll an arm back, or promote one where that was asked for."""
        done: list[str] = []
        while True:
            with self._store.database().reading() as connection:
                found = rows.find(connection, self.name, self.number)
            weighed = self._weighed(found, memory)
            said = decisions.carry_out(self._store, weighed) if found.state == rows.RUNNING else None
            if said is None:
                return ExperimentStatus(weighed, tuple(done), self._points(found))
            done.append(said)

    def stop(
        self,
        *,
        promote: str | None = None,
        rollback: bool = False,
        ask: Ask | None = None,
        on_stage: Stage = None,
    ) -> ExperimentStatus:
        """End it. promote: the arm that takes the alias, past gates and golden examples; rollback: control does.

        ask: gives a version's answers to golden examples, as for `Workspace.promote`.
        """
        if promote is not None and rollback:
            raise BadExperiment("stop: either --promote an arm or --rollback, not both")
        with self._store.database().reading() as connection:
            running = self._running(connection)
        weighed = self._weighed(running)
        verdict = decisions.summary(weighed)
        if promote is not None:
            from turret.workspace import promoting

            decisions.check_valid(weighed, promote)

            arm = running.arm(promote)
            said = verdict | {"how": "promote", "arm": arm.name, "why": "asked for"}
            also = decisions.ending(running, said)
            promoting.promote(
                self._store, running.reference(arm), running.alias, (), stage=on_stage, ask=ask, also=also
            )
        elif rollback:
            said = verdict | {"how": "rollback", "arm": None, "why": "asked for"}
            leaving = [running.reference(arm) for arm in running.arms[1:]]
            control = running.reference(running.control)
            self._store.back_to(control, running.alias, leaving=leaving, also=decisions.ending(running, said))
        else:
            with self._store.database().writing() as connection:
                rows.end(connection, running, verdict | {"how": "stop", "arm": None, "why": "asked for"}, now(), who())
        with self._store.database().reading() as connection:
            ended = rows.by_id(connection, running.id)
        return self._status(ended)

    # --- the inside --------------------------------------------------------------------------------------------------

    def _versions(
        self, control: str | None, candidates: Sequence[str], shadows: Sequence[str], alias: str
    ) -> tuple[list[Version], list[Version]]:
        """Control and candidates, and shadows; control is what the alias names, if it names anything."""
        try:
            named: Version | None = self._store.resolve(Reference(self.name, alias=alias))
        except NotFound:
            self._store.resolve(self.name)  # where the name has no version at all, this says so
            named = None
        if control is None and named is None:
            raise ExperimentError(
                f"{self.name}@{alias} names nothing, so the control is not known: say it with --control {self.name}@1, "
                f"or promote a version to {alias} first"
            )
        first = self._own(control) if control is not None else named
        assert first is not None
        if named is not None and named.number != first.number:
            raise ExperimentError(
                f"control is {first}, and {self.name}@{alias} names {named}: the control must be what is in use; leave "
                f"--control out, or `turret promote {first} {alias}` first"
            )
        return [first, *map(self._own, candidates)], [self._own(each) for each in shadows]

    def _own(self, reference: str) -> Version:
        version = self._store.resolve(reference)
        if version.name != self.name:
            raise BadExperiment(f"{version} is no version of {self.name}: an experiment compares versions of one name")
        return version

    def _running(self, connection: Connection) -> Experiment:
        return rows.still_running(connection, rows.find(connection, self.name, self.number))

    def _weighed(self, experiment: Experiment, memory: Memory | None = None) -> Analysis:
        from turret.experiments.analyze import weigh

        with self._store.database().reading() as connection:
            found = rows.by_id(connection, experiment.id)
            return weigh(connection, found, now(), memory, lambda: _others(connection, found))

    def _status(self, experiment: Experiment) -> ExperimentStatus:
        return ExperimentStatus(self._weighed(experiment), points=self._points(experiment))

    def _points(self, experiment: Experiment) -> str | None:
        try:
            return str(self._store.resolve(Reference(self.name, alias=experiment.alias)))
        except NotFound:
            return None


def listed(store: Store, alpha: float) -> list[dict[str, Any]]:
    """Every experiment with its evidence, and which of them are discoveries at that level, over all of them."""
    from turret.experiments.analyze import weigh
    from turret.experiments.discoveries import named

    check_alpha(alpha)
    with store.database().reading() as connection:
        weighed = [weigh(connection, each, now()) for each in rows.listed(connection)]
    logs = {str(each.experiment): _log_evidence(each) for each in weighed if each.experiment.candidates}
    found = named({name: -math.inf if log is None else log for name, log in logs.items()}, alpha)
    return [
        {
            **each.experiment.as_json(),
            "arms": {arm.arm.name: arm.version for arm in each.arms},
            "outcomes": sum(arm.outcomes for arm in each.arms),
            "log_evidence": logs.get(str(each.experiment)),
            "discovery": str(each.experiment) in found,
            "verdicts": {arm.arm.name: arm.against.verdict for arm in each.arms if arm.against is not None},
        }
        for each in weighed
    ]


def settle_all(store: Store, memories: dict[int, Any]) -> list[ExperimentStatus]:
    """Settle every running experiment; `memories` makes the next time cheap."""
    from turret.experiments.analyze import Memory

    with store.database().reading() as connection:
        running = rows.all_running(connection)
    for gone in set(memories) - {each.id for each in running}:
        del memories[gone]
    return [
        LiveExperiment(store, each.adapter, each.number).settle(memories.setdefault(each.id, Memory()))
        for each in running
    ]


def _others(connection: Connection, experiment: Experiment) -> list[float]:
    """The logarithms of the evidence of all other experiments; of those that ended, as it was then."""
    from turret.experiments.analyze import weigh

    found = []
    for each in rows.listed(connection):
        if each.id == experiment.id or not each.candidates:
            continue
        known = each.verdict or {}
        log = known["log_evidence"] if "log_evidence" in known else weigh(connection, each, now()).evidence
        found.append(-math.inf if log is None else float(log))
    return found


def _log_evidence(weighed: Analysis) -> float | None:
    """As it is now, or was when the experiment ended; None where it is void."""
    known = weighed.experiment.verdict or {}
    kept = known.get("log_evidence", weighed.evidence)
    return None if kept is None else float(kept)


def _known(version: Version) -> tuple[int, str]:
    return version.number, version.digest


def _some(references: str | Sequence[str]) -> Sequence[str]:
    return [references] if isinstance(references, str) else references


def _pieces(told: Iterable[Any]) -> Iterator[list[Any]]:
    piece: list[Any] = []
    for each in told:
        piece.append(each)
        if len(piece) == AT_ONCE:
            yield piece
            piece = []
    if piece:
        yield piece
