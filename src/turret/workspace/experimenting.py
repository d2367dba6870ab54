"""Experiments: split traffic between versions, record outcomes, analyze the evidence, and move aliases.

Ending an experiment and moving its alias is one transaction of the store, so a kill leaves both done or neither.
Analyzing evidence loads numpy; asking golden examples loads torch.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from turret.arguments import checked_methods
from turret.data.source import open_table
from turret.data.table import CellValue
from turret.errors import BadExperiment, DataError, ExperimentError, GateFailed, NotFound, ReplayNeeded
from turret.experiments import assign as assigning
from turret.experiments import outcomes, rows
from turret.experiments.experiment import (
    MISSING_BOUND,
    OUTCOME_TTL,
    Experiment,
    Guards,
    Metric,
    check_alpha,
    check_missing,
    check_steps,
    check_ttl,
    check_unit,
    named_arms,
)
from turret.experiments.outcomes import Recorded, Seen, count_by_status
from turret.json_types import JsonObject, JsonValue, Plain
from turret.reference import Reference, check_alias, check_name
from turret.store import Store, Version
from turret.store.catalog import PRODUCTION, now, who
from turret.store.promises import NOTHING_BUT_ALARM
from turret.workspace import promoting
from turret.workspace.progress import Say, silent
from turret.workspace.promoting import Ask

if TYPE_CHECKING:
    from turret.experiments.analyze import Analysis, EvidenceHistory, Memory


# --- decisions --------------------------------------------------------------------------------------------------------
# Carry out decisions of experiments: roll an arm back, promote an arm, or declare the evidence void.
#
# Ending an experiment and moving its alias is one transaction of the store.


def carry_out(store: Store, analysis: Analysis) -> str | None:
    """Carry out the decision of an analysis.

    Returns:
        What was done or refused; None if nothing changed.
    """
    experiment, decision = analysis.experiment, analysis.decision
    if decision.action == "hold":
        return None if analysis.recorded else _record_alarm(store, analysis)
    if decision.action not in ("drop", "promote"):
        return None
    assert decision.arm is not None
    arm = experiment.arm(decision.arm)
    reference, control = experiment.reference(arm), experiment.reference(experiment.control)
    try:
        if decision.action == "drop":
            drop = _drop(analysis, decision.arm)
            if arm.role == "shadow":  # the alias never pointed at a shadow
                with store.database().writing() as connection:
                    drop(connection)
            else:
                store.back_to(control, experiment.alias, leaving=[reference], also=drop)
            return f"{arm.name} ({reference}) rolled back: {decision.why}"
        if any(event["verb"] == "refused" and event["detail"].get("arm") == arm.name for event in analysis.history):
            return None
        verdict = summary(analysis) | {"how": "promote", "arm": arm.name, "why": decision.why}
        store.promote(reference, experiment.alias, also=ending(experiment, verdict))
    except (GateFailed, ReplayNeeded) as error:
        _record_refusal(store, experiment, arm.name, str(error))
        return f"{arm.name} ({reference}) is better and was not promoted: {error}"
    except ExperimentError:  # another process has ended the experiment meanwhile
        return None
    return f"{arm.name} ({reference}) promoted to {experiment.alias}: {decision.why}"


def _drop(analysis: Analysis, name: str) -> Callable[[Connection], None]:
    """A step of a transaction: drop an arm, and end the experiment if no candidate is left."""

    def drop(connection: Connection) -> None:
        current = rows.still_running(connection, analysis.experiment)
        arm = current.arm(name)
        if not arm.live:
            raise ExperimentError(f"{name} of {current} was rolled back already")
        others = [each for each in current.arms[1:] if each.live and each.name != name]
        why = analysis.decision.why
        version = current.reference(arm)
        said = {"why": why, "version": version, "did": f"{arm.name} ({version}) rolled back"}
        rows.drop(connection, current, arm, said, now(), who())
        if not others:
            verdict = summary(analysis) | {"how": "rollback", "arm": name, "why": why}
            rows.end(connection, current, verdict, now(), who())

    return drop


def ending(experiment: Experiment, verdict: Mapping[str, Plain]) -> Callable[[Connection], None]:
    """A step of a transaction: end the experiment with this verdict."""

    def end(connection: Connection) -> None:
        rows.end(connection, experiment, verdict, now(), who())

    return end


def _record_alarm(store: Store, analysis: Analysis) -> str | None:
    """Record once that the evidence is void. It stays void, whatever later outcomes show."""
    from turret.experiments.analyze import VOID
    from turret.experiments.status_text import why_void

    why = why_void(analysis)
    try:
        with store.database().writing() as connection:
            current = rows.still_running(connection, analysis.experiment)
            if any(event["verb"] == VOID for event in rows.events(connection, current)):
                return None  # another process recorded it first
            said = {"check": analysis.alarm, "why": why, "did": NOTHING_BUT_ALARM}
            rows.add_event(connection, current, VOID, said, now(), who())
    except ExperimentError:  # another process has ended the experiment meanwhile
        return None
    return why


def check_valid(analysis: Analysis, arm: str) -> None:
    """Raise ExperimentError if the evidence is void."""
    if analysis.alarm is None:
        return
    experiment = analysis.experiment
    version = experiment.reference(experiment.arm(arm))
    raise ExperimentError(
        f"{experiment} is void ({analysis.alarm} of the arms differ) and can promote nothing: `turret experiment stop "
        f"{experiment.adapter}` and start again, or `turret promote {version} {experiment.alias}` without its evidence"
    )


def _record_refusal(store: Store, experiment: Experiment, arm: str, why: str) -> None:
    with store.database().writing() as connection:
        current = rows.by_id(connection, experiment.id)
        rows.add_event(connection, current, "refused", {"arm": arm, "why": why}, now(), who())


def summary(analysis: Analysis) -> JsonObject:
    """The evidence at the end of an experiment, as JSON."""
    arms = {each.arm.name: each.against.as_json() for each in analysis.arms if each.against is not None}
    return {"candidates": arms, "log_evidence": analysis.evidence, "void": analysis.alarm}


# --- experimenting ----------------------------------------------------------------------------------------------------


STEPS = (0.05, 0.2, 0.5)
AT_ONCE = 1000  # outcomes in one transaction


@dataclass(frozen=True)
class ExperimentStatus:
    """An experiment as it is now. `verdicts` and `next` are for people, `as_json()` for programs."""

    analysis: Analysis
    done: tuple[str, ...] = ()  # actions that were carried out just now
    points: str | None = None  # the version that the alias names

    @property
    def experiment(self) -> Experiment:
        return self.analysis.experiment

    @property
    def verdicts(self) -> tuple[str, ...]:
        """One line per arm."""
        from turret.experiments import status_text

        return tuple(status_text.verdicts(self.analysis))

    @property
    def next(self) -> str:
        """What to do next."""
        from turret.experiments import status_text

        return status_text.advice(self.analysis)

    def as_json(self) -> JsonObject:
        from turret.experiments.status_text import why_void
        from turret.experiments.validity import NEEDED

        analysis, decision = self.analysis, self.analysis.decision
        return {
            **self.experiment.as_json(),
            "alias_names": self.points,
            "arms": [each.as_json() for each in analysis.arms],
            "sample_ratio": {"ok": not analysis.void, **analysis.checks, "needed": NEEDED},
            "void": why_void(analysis) if analysis.void else None,
            "verdicts": list(self.verdicts),
            "decision": {"action": decision.action, "arm": decision.arm, "why": decision.why},
            "done": list(self.done),
            "next": self.next,
            "history": [dict(each) for each in analysis.history],
        }


@checked_methods
class LiveExperiment:
    """An experiment of an adapter name: number `number`, else the running one, else the last one."""

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
        missing_bound: float = MISSING_BOUND,
        guards: Guards | None = None,
        alias: str = PRODUCTION,
        salt: str | None = None,
    ) -> ExperimentStatus:
        """Start to split the traffic of this name between a control and candidates.

        Args:
            candidates: versions such as "news@2" or "news@candidate".
            control: default: the version that the alias names.
            shadows: versions that get copies of the requests; their answers are discarded.
            share: fraction of the traffic for all candidates together, or for each by its arm; default: the first step.
            steps: the fractions of a ramp; `ramp()` moves to the next one.
            metric: "binary", or bounds such as "1..5".
            goal: "higher" or "lower".
            alpha: false winners stay below this rate.
            outcome_ttl: seconds from the first answer to a unit in which its outcome counts.
            missing_bound: the share of an arm's units whose outcomes may be missing because of what they are. A verdict
                is given only if it holds despite that. 0 claims that there are none.

        Raises:
            BadExperiment: the settings make no sense.
            ExperimentError: another experiment of this name is running, or the control is not in use.
        """
        parsed_metric = Metric.parse(metric, goal)
        ramp = () if steps is None and share is not None else check_steps(STEPS if steps is None else steps)
        checked_guards = (guards or Guards()).check(parsed_metric)
        versions = self._versions(control, _as_list(candidates), _as_list(shadows), check_alias(alias))
        (first, *others), shadowing = versions
        arms = named_arms(_key(first), [_key(each) for each in others], [_key(each) for each in shadowing])
        experiment = Experiment(
            id=0,
            adapter=self.name,
            number=0,
            state="running",
            alias=alias,
            salt=salt or secrets.token_hex(16),
            metric=parsed_metric,
            unit=check_unit(unit),
            alpha=check_alpha(alpha),
            guards=checked_guards,
            steps=ramp if others else (),
            outcome_ttl=check_ttl(outcome_ttl),
            missing_bound=check_missing(missing_bound),
            arms=arms,
            revision=0,
            segments=(),
            weights={},
            created=now(),
            who=who(),
        )
        with self._store.database().writing() as connection:
            started = rows.begin(connection, experiment, share if share is not None else ramp[0])
        return self._status(started)

    def ramp(self, share: float | Mapping[str, float] | None = None) -> ExperimentStatus:
        """Change the candidates' share of the traffic. Default: the next step of the ramp."""
        with self._store.database().writing() as connection:
            running = self._running(connection)
            new_share = running.next_share() if share is None else share
            if new_share is None:
                steps = ", ".join(f"{step:g}" for step in running.steps)
                reason = f"its ramp of {steps} is at its end" if steps else "none was planned"
                raise ExperimentError(
                    f"{running} has no next step, {reason}: give a share, such "
                    f"as `turret experiment ramp {self.name} 50%`"
                )
            ramped = rows.ramp(connection, running, new_share, now(), who())
        return self._status(ramped)

    def assign(self, unit: str, receipt: str | None = None) -> tuple[str, str, float]:
        """Assign a unit and log the assignment. A server uses `Workspace.router()`, which is faster.

        Returns:
            The version, its arm, and the probability with which the arm was drawn.
        """
        if receipt is not None:
            outcomes.check_receipt(receipt)
        with self._store.database().writing() as connection:
            running = self._running(connection)
            key = assigning.key_of(running.salt, unit)
            arm = running.arm(assigning.arm_at(running.segments, assigning.point_of(key)))
            probability = running.weights[arm.name]
            outcomes.log(connection, [Seen(running.id, key, arm.name, running.revision, probability, now(), receipt)])
        return running.reference(arm), arm.name, probability

    def outcome(self, value: Plain, *, receipt: str | None = None, unit: str | None = None) -> Recorded:
        """Record the outcome of an answer, by its receipt or its unit. The result says whether it counts."""
        if (receipt is None) == (unit is None):
            raise BadExperiment("an outcome needs the receipt of its answer or its unit, and one of them only")
        return self.outcomes([(receipt, unit, value)])[0]

    def outcomes(self, entries: Iterable[tuple[str | None, str | None, Plain]]) -> list[Recorded]:
        """Record many outcomes: (receipt or None, unit or None, value) each."""
        recorded: list[Recorded] = []
        left = iter(entries)
        while batch := list(islice(left, AT_ONCE)):
            with self._store.database().writing() as connection:
                experiment = rows.find(connection, self.name, self.number)
                for receipt, unit, value in batch:
                    recorded.append(
                        outcomes.record(connection, value, now(), receipt=receipt, unit=unit, experiment=experiment)
                    )
        return recorded

    def status(self) -> ExperimentStatus:
        """The evidence so far, and what to do next. Changes nothing."""
        with self._store.database().reading() as connection:
            experiment = rows.find(connection, self.name, self.number)
        return self._status(experiment)

    def settle(self, memory: Memory | None = None) -> ExperimentStatus:
        """Apply the guards: roll arms back, and promote a winner if the experiment was started with that setting.

        Args:
            memory: makes the next call cheaper, which then reads only new outcomes.
        """
        done: list[str] = []
        while True:
            with self._store.database().reading() as connection:
                experiment = rows.find(connection, self.name, self.number)
            analysis = self._analyze(experiment, memory)
            action = carry_out(self._store, analysis) if experiment.state == rows.RUNNING else None
            if action is None:
                return ExperimentStatus(analysis, tuple(done), self._points(experiment))
            done.append(action)

    def stop(
        self,
        *,
        promote: str | None = None,
        rollback: bool = False,
        ask: Ask | None = None,
        on_stage: Say | None = None,
    ) -> ExperimentStatus:
        """End the experiment.

        Args:
            promote: the arm that gets the alias, if it passes the alias's gates and golden examples.
            rollback: give the alias to the control.
            ask: answers golden examples, as for `Workspace.promote`.
            on_stage: called with a line of progress.
        """
        if promote is not None and rollback:
            raise BadExperiment("stop: either --promote an arm or --rollback, not both")
        with self._store.database().reading() as connection:
            running = self._running(connection)
        analysis = self._analyze(running)
        verdict = summary(analysis)
        if promote is not None:
            check_valid(analysis, promote)
            arm = running.arm(promote)
            also = ending(running, verdict | {"how": "promote", "arm": arm.name, "why": "asked for"})
            promoting.replay_then_promote(
                self._store, running.reference(arm), running.alias, (), say=on_stage or silent, ask=ask, also=also
            )
        elif rollback:
            also = ending(running, verdict | {"how": "rollback", "arm": None, "why": "asked for"})
            leaving = [running.reference(arm) for arm in running.arms[1:]]
            self._store.back_to(running.reference(running.control), running.alias, leaving=leaving, also=also)
        else:
            with self._store.database().writing() as connection:
                rows.end(connection, running, verdict | {"how": "stop", "arm": None, "why": "asked for"}, now(), who())
        with self._store.database().reading() as connection:
            ended = rows.by_id(connection, running.id)
        return self._status(ended)

    # --- private -----------------------------------------------------------------------------------------------------

    def _versions(
        self, control: str | None, candidates: Sequence[str], shadows: Sequence[str], alias: str
    ) -> tuple[list[Version], list[Version]]:
        """Control and candidates, and shadows. Default control: the version that the alias names."""
        try:
            named: Version | None = self._store.resolve(Reference(self.name, alias=alias))
        except NotFound:
            self._store.resolve(self.name)  # raises NotFound if the name has no version at all
            named = None
        if control is None and named is None:
            raise ExperimentError(
                f"{self.name}@{alias} names nothing, so there is no control: give --control {self.name}@1, "
                f"or promote a version to {alias} first"
            )
        first = self._own(control) if control is not None else named
        assert first is not None
        if named is not None and named.number != first.number:
            raise ExperimentError(
                f"control is {first}, and {self.name}@{alias} names {named}: the control must be the version in use; "
                f"leave --control out, or `turret promote {first} {alias}` first"
            )
        return [first, *map(self._own, candidates)], [self._own(each) for each in shadows]

    def _own(self, reference: str) -> Version:
        version = self._store.resolve(reference)
        if version.name != self.name:
            raise BadExperiment(f"{version} is no version of {self.name}: an experiment compares versions of one name")
        return version

    def _running(self, connection: Connection) -> Experiment:
        return rows.still_running(connection, rows.find(connection, self.name, self.number))

    def _analyze(self, experiment: Experiment, memory: Memory | None = None) -> Analysis:
        from turret.experiments.analyze import analyze

        with self._store.database().reading() as connection:
            current = rows.by_id(connection, experiment.id)
            return analyze(connection, current, now(), memory, lambda: _other_evidence(connection, current))

    def _status(self, experiment: Experiment) -> ExperimentStatus:
        return ExperimentStatus(self._analyze(experiment), points=self._points(experiment))

    def _points(self, experiment: Experiment) -> str | None:
        try:
            return str(self._store.resolve(Reference(self.name, alias=experiment.alias)))
        except NotFound:
            return None


def list_experiments(store: Store, alpha: float) -> list[JsonObject]:
    """Every experiment as JSON, with its evidence.

    `arms` has the version of each arm, `verdicts` the verdict on each candidate. `discovery` marks a difference at
    level alpha over all experiments.
    """
    from turret.experiments.analyze import analyze
    from turret.experiments.evidence import find_discoveries

    check_alpha(alpha)
    with store.database().reading() as connection:
        analyses = [analyze(connection, each, now()) for each in rows.list_experiments(connection)]
    logs = {str(each.experiment): _log_evidence(each) for each in analyses if each.experiment.candidates}
    discoveries = find_discoveries({name: -math.inf if log is None else log for name, log in logs.items()}, alpha)
    return [
        {
            **each.experiment.as_json(),
            "arms": {arm.arm.name: arm.version for arm in each.arms},
            "outcomes": sum(arm.outcomes for arm in each.arms),
            "log_evidence": logs.get(str(each.experiment)),
            "discovery": str(each.experiment) in discoveries,
            "verdicts": {arm.arm.name: arm.against.verdict for arm in each.arms if arm.against is not None},
        }
        for each in analyses
    ]


def apply_guards(store: Store, memories: dict[int, Memory]) -> list[ExperimentStatus]:
    """Apply the guards of all running experiments.

    Args:
        memories: by the id of an experiment; kept by the caller so that the next call reads only new outcomes.
    """
    from turret.experiments.analyze import Memory

    with store.database().reading() as connection:
        running = rows.running_experiments(connection)
    for ended in set(memories) - {each.id for each in running}:
        del memories[ended]
    return [
        LiveExperiment(store, each.adapter, each.number).settle(memories.setdefault(each.id, Memory()))
        for each in running
    ]


def evidence_history(store: Store, name: str, number: int | None, known: dict[int, EvidenceHistory]) -> EvidenceHistory:
    """How the evidence of an experiment grew. Raises NotFound.

    Args:
        known: histories by the id of an experiment; kept by the caller so that the next call reads only new outcomes.
    """
    from turret.experiments.analyze import EvidenceHistory

    with store.database().reading() as connection:
        experiment = rows.find(connection, name, number)
        history = known.setdefault(experiment.id, EvidenceHistory())
        history.read(connection, experiment)
    return history


def _other_evidence(connection: Connection, experiment: Experiment) -> list[float]:
    """The logarithms of the evidence of all other experiments; for an ended one, at its end."""
    from turret.experiments.analyze import analyze

    found = []
    for each in rows.list_experiments(connection):
        if each.id == experiment.id or not each.candidates:
            continue
        verdict = each.verdict or {}
        log = verdict["log_evidence"] if "log_evidence" in verdict else analyze(connection, each, now()).evidence
        found.append(-math.inf if log is None else float(log))
    return found


def _log_evidence(analysis: Analysis) -> float | None:
    """The evidence now, or at the end of an ended experiment; None if it is void."""
    verdict = analysis.experiment.verdict or {}
    log = verdict.get("log_evidence", analysis.evidence)
    return None if log is None else float(log)


def _key(version: Version) -> tuple[int, str]:
    return version.number, version.digest


def _as_list(references: str | Sequence[str]) -> Sequence[str]:
    return [references] if isinstance(references, str) else references


# --- outcomes of a command or a table ---------------------------------------------------------------------------------


SHOWN = 5  # lines about outcomes that were not counted
COLUMNS = ("receipt", "unit", "value")


def lines_of(recorded: Sequence[Recorded]) -> list[str]:
    """What became of outcomes, for people."""
    if len(recorded) == 1:
        return [recorded[0].text]
    counts = ", ".join(f"{count} {status}" for status, count in count_by_status(recorded).items())
    rejected = [each.text for each in recorded if not each.kept]
    more = [f"... and {len(rejected) - SHOWN} more"] if len(rejected) > SHOWN else []
    return [f"{len(recorded)} outcomes: {counts}", *rejected[:SHOWN], *more]


def read_outcomes(path: Path) -> Iterator[tuple[str | None, str | None, JsonValue]]:
    """(receipt, unit, value) of each row of a table. Raises DataError that names the line."""
    if not path.is_file():
        raise DataError(f"there is no file {str(path)[:200]!r}: give a table with value and receipt or unit")
    table = open_table(path)
    columns = [column for column in COLUMNS if column in table.columns]
    if "value" not in columns or len(columns) < 2:
        raise DataError(
            f"{table.name} needs the columns value, and receipt or unit: it has {', '.join(table.columns)[:200]}"
        )
    for place, row in table.read(columns):
        cells = dict(zip(columns, row, strict=True))
        receipt, unit = (_text(cells.get(column)) for column in ("receipt", "unit"))
        if (receipt is None) == (unit is None):
            raise DataError(f"{table.name} {table.unit} {place}: expected a receipt or a unit, and one of them only")
        yield receipt, unit, cells["value"]


def _text(cell: CellValue) -> str | None:
    return (None if cell is None else str(cell).strip()) or None
