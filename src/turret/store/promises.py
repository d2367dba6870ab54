"""Promises about the errors of versions: the bound, the threshold that keeps it, the answers and their outcomes.

A promise is bound to the digest of a version; the newest of a digest is in force. `promise_answers` has every answer
that it covers, by receipt, and no text; `promise_outcomes` has what became of them. Both are append-only. An outcome
names the right label, or says whether the answer was right (1) or wrong (0):

| status | meaning | stored | counted |
| --- | --- | --- | --- |
| counted | of an answer that the bound is about | yes | yes |
| noted | of another one, such as an answer that was not decided | yes | no |
| repeated | this answer already has an outcome | no | no |
| unknown | no answer of a promise has this receipt | no | no |
| late | a newer promise is in force, or the time to live of outcomes has passed | no | no |
| refused | the value is no label of the version, and neither 0 nor 1 | no | no |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, case, delete, func, insert, select, true, update

from turret import audit
from turret.database import (
    LONGEST_RECEIPT,
    access_of,
    adapters,
    alarms,
    insert_row,
    promise_inputs,
    promise_watches,
    promises,
    seen_adapters,
    seen_versions,
    upsert,
    versions,
)
from turret.database import audit as actions
from turret.database import promise_answers as answers
from turret.database import promise_outcomes as outcomes
from turret.errors import BundleError, NotFound
from turret.json_types import AsJson, Plain, mapping_of
from turret.manifest import Manifest, lineage_in, task_in
from turret.store.catalog import Version, now, who
from turret.tasks.calibration import Sureness
from turret.tasks.shapes import Answer, TaskSpec
from turret.tasks.task import Task, stored_task
from turret.timestamp import timestamp

# --- inputs -----------------------------------------------------------------------------------------------------------
# What is kept to notice that texts have changed: embeddings of the examples of a promise, and of live texts.
#
# `promise_watches` has a row for each promise whose inputs are watched. `promise_inputs` has embeddings as float16
# (`turret.experiments.input_drift`), and no text. Round 0 is the held-out examples; a later one is the live texts of
# that round, and only the current one is kept. All of it goes when a newer promise replaces this one, or at a gc when
# no version with the digest is left.


REFERENCE_ROUND = 0  # the round of the held-out examples
SPARE = 2  # rows of a round for each reference: a text that comes twice is kept twice, and used once


@dataclass(frozen=True)
class InputWatch:
    """How far the inputs of a promise were watched.

    Args:
        size: numbers of an embedding.
        examples: held-out examples that live texts are compared with.
        round: the current one, from 1.
        earlier: live texts of the rounds before; of all once they have drifted.
        drifted: when the texts were found to have changed.
        evidence: the e-value then.
    """

    promise_id: int
    size: int
    examples: int
    round: int
    earlier: int
    drifted: str | None
    evidence: float | None


def keep_inputs(connection: Connection, promise_id: int, vectors: Sequence[bytes]) -> None:
    """Begin to watch the inputs of a new promise. vectors: of its examples; none: its inputs are not watched."""
    if not vectors:
        return
    row = {"promise_id": promise_id, "size": len(vectors[0]) // 2, "examples": len(vectors), "round": 1, "earlier": 0}
    connection.execute(insert(promise_watches).values(row))
    _add(connection, promise_id, REFERENCE_ROUND, vectors)


def watch_of(connection: Connection, promise_id: int) -> InputWatch | None:
    """How far the inputs of a promise were watched; None if they are not."""
    columns = [promise_watches.c[each.name] for each in fields(InputWatch)]
    row = connection.execute(select(*columns).where(promise_watches.c.promise_id == promise_id)).first()
    return None if row is None else InputWatch(**row._mapping)


def vectors_of(connection: Connection, watch: InputWatch, number: int, after: int = 0) -> list[tuple[int, bytes]]:
    """Id and embedding of each text of a round, in the order in which they came.

    Args:
        number: of the round.
        after: only those with a larger id.
    """
    later = _of(watch.promise_id, number) & (promise_inputs.c.id > after)
    query = select(promise_inputs.c.id, promise_inputs.c.vector).where(later).order_by(promise_inputs.c.id)
    return [(row.id, bytes(row.vector)) for row in connection.execute(query)]


def add_input(connection: Connection, promise_id: int, vector: bytes) -> bool:
    """Add a live text to the current round; False if the promise is watched no more, or the round is full."""
    watch = watch_of(connection, promise_id)
    if watch is None or watch.drifted is not None or len(vector) != 2 * watch.size:
        return False
    if rows_of(connection, watch) >= SPARE * watch.examples:
        return False
    _add(connection, promise_id, watch.round, [vector])
    return True


def rows_of(connection: Connection, watch: InputWatch) -> int:
    """How many live texts of the current round are kept."""
    query = select(func.count()).select_from(promise_inputs).where(_of(watch.promise_id, watch.round))
    return int(connection.execute(query).scalar_one())


def begin_round(connection: Connection, watch: InputWatch, texts: int) -> None:
    """Go on to the next round, unless another process has. texts: that this round has used."""
    values = {"round": watch.round + 1, "earlier": watch.earlier + texts}
    if connection.execute(update(promise_watches).where(_same(watch)).values(values)).rowcount:
        connection.execute(delete(promise_inputs).where(_of(watch.promise_id, watch.round)))


def forget_vectors(connection: Connection, promise_ids: Sequence[int]) -> int:
    """Remove all that is kept for these promises. Returns the bytes of the embeddings."""
    size = sum(bytes_of_inputs(connection, each) for each in promise_ids)
    for table in (promise_inputs, promise_watches):
        connection.execute(delete(table).where(table.c.promise_id.in_(promise_ids)))
    return size


def bytes_of_inputs(connection: Connection, promise_id: int) -> int:
    """Bytes of the embeddings of a promise."""
    size = select(func.sum(func.length(promise_inputs.c.vector))).where(promise_inputs.c.promise_id == promise_id)
    return int(connection.execute(size).scalar() or 0)


def _add(connection: Connection, promise_id: int, number: int, vectors: Sequence[bytes]) -> None:
    row = {"promise_id": promise_id, "round": number, "at": now()}
    connection.execute(insert(promise_inputs), [row | {"vector": each} for each in vectors])


def _of(promise_id: int, number: int) -> ColumnElement[bool]:
    return (promise_inputs.c.promise_id == promise_id) & (promise_inputs.c.round == number)


def _same(watch: InputWatch) -> ColumnElement[bool]:
    mine = (promise_watches.c.promise_id == watch.promise_id) & (promise_watches.c.round == watch.round)
    return mine & promise_watches.c.drifted.is_(None)


# --- alarms -----------------------------------------------------------------------------------------------------------
# Alarms: the rows of the audit log that somebody is told of, and which of them were sent.
#
# An alarm is a row of the audit log. The transaction that changes something writes its row too, so a kill loses no
# alarm. `alarms` has a row for each that was delivered.


PROMISE_BROKEN, INPUTS_DRIFTED = "promise broken", "promise drift"
ARM_DROPPED, EVIDENCE_VOID = "experiment drop", "experiment void"
ALARM_KINDS = (PROMISE_BROKEN, INPUTS_DRIFTED, ARM_DROPPED, EVIDENCE_VOID)  # verbs of the audit log
NOTHING_BUT_ALARM = "nothing but this alarm"  # what was done, if nothing else was asked for
ALARM_KEPT = timedelta(days=1)  # an alarm that could not be sent for so long is not sent any more


@dataclass(frozen=True)
class Alarm(AsJson):
    """What a receiver is told.

    Args:
        id: of the row in the audit log; a receiver that gets it twice knows it by this.
        kind: the verb of that row.
        version: the version with the promise, or of the arm.
        experiment: NAME#NUMBER; None for a promise.
        promise: what was promised, in words; None for an experiment.
        why, did: what happened, and what was done.
    """

    id: int
    kind: str
    tenant: str
    version: str | None
    experiment: str | None
    promise: str | None
    why: str
    did: str
    at: str


def unsent_alarms(connection: Connection) -> Sequence[Alarm]:
    """The alarms of all tenants in the last day that nobody has sent, the oldest first."""
    query = select(actions).outerjoin(alarms, alarms.c.audit_id == actions.c.id).where(alarms.c.audit_id.is_(None))
    query = query.where(actions.c.verb.in_(ALARM_KINDS), actions.c.at >= timestamp(datetime.now(UTC) - ALARM_KEPT))
    found = []
    for row in connection.execute(query.order_by(actions.c.id)):
        said, about = row.after or {}, row.verb.startswith("experiment")
        version, experiment = (said.get("version"), row.what) if about else (row.what, None)
        why, did = str(said.get("why", "")), str(said.get("did", ""))
        found.append(Alarm(row.id, row.verb, row.tenant, version, experiment, said.get("promise"), why, did, row.at))
    return found


def mark_sent(connection: Connection, alarm: Alarm) -> None:
    """Record that an alarm was delivered, unless another server has recorded it."""
    upsert(connection, alarms, [{"audit_id": alarm.id, "sent": now()}], change=None)


# --- promises ---------------------------------------------------------------------------------------------------------


ALARM, STRICTER, ROLLBACK = "alarm", "stricter", "rollback"
WHEN_BROKEN = (ALARM, STRICTER, ROLLBACK)
NEVER = 2.0  # a threshold that no probability reaches


@dataclass(frozen=True)
class Terms:
    """What a promise says, as a bundle and the catalog keep it.

    Args:
        metric: what the bound is about: error, misses:LABEL or precision:LABEL.
        error: the largest share of it that is wrong.
        confidence: of the bound.
        threshold: the least probability of an answer that is decided.
        examples: that the threshold was chosen on.
        counted: how many of them the bound is about, at this threshold.
        wrong: how many of these.
        decided: how many of all examples.
        source, split, data_digest: where the examples are from.
        when_broken: alarm, stricter or rollback.
        outcome_ttl: seconds after an answer in which its outcome counts.
        missing_bound: the share of the answers whose missing outcome may depend on whether they are wrong.
    """

    metric: str
    error: float
    confidence: float
    threshold: float
    examples: int
    counted: int
    wrong: int
    decided: int
    source: str
    split: str
    data_digest: str
    when_broken: str
    outcome_ttl: float
    missing_bound: float

    @property
    def label(self) -> str | None:
        """The label that the bound is about; None for all."""
        return self.metric.partition(":")[2] or None

    def abstains(self, task: type[Task], answer: Answer) -> bool:
        """Whether an answer is not decided, because its probability is below the threshold."""
        decision = task.decision(answer)
        return decision is not None and decision[1] < self.threshold

    @classmethod
    def from_json(cls, value: Plain) -> Terms:
        """The promise in a manifest. Raises BundleError for one that no training writes."""
        try:
            given = mapping_of(value)
            kept = {each.name: given[each.name] for each in fields(cls)}
            numbers = [kept[name] for name in ("error", "confidence", "threshold", "outcome_ttl", "missing_bound")]
            if given.keys() != kept.keys() or not all(isinstance(each, int | float) for each in numbers):
                raise ValueError
            found = cls(**kept)
            if not (0 < found.error <= 0.5 and 0 <= found.threshold <= NEVER and found.when_broken in WHEN_BROKEN):
                raise ValueError
        except (TypeError, KeyError, ValueError, AttributeError):
            raise BundleError("the bundle's promise cannot be read: train it again, or remove it") from None
        return found


@dataclass(frozen=True)
class Promise(Terms, AsJson):
    """A promise in force. `broken` is when its outcomes broke it, and `verdict` what they said then."""

    id: int
    digest: str
    created: str
    who: str | None
    broken: str | None
    verdict: Mapping[str, Plain] | None


class LoggedAnswer(NamedTuple):
    """An answer that a promise covers."""

    promise_id: int
    receipt: str
    label: str
    probability: float
    decided: int
    at: str


class Told(NamedTuple):
    """An outcome that counts."""

    id: int
    probability: float
    label: str
    decided: int
    wrong: int
    right_label: str | None


Status = Literal["counted", "noted", "repeated", "unknown", "late", "refused"]


class Counts(NamedTuple):
    """Answers that the bound is about: all, those without an outcome, those whose time to live is over, and both."""

    answers: int
    silent: int
    due: int
    missing: int


def make(
    connection: Connection,
    version: Version,
    terms: Terms,
    sureness: Sureness | None = None,
    *,
    inputs: Sequence[bytes] = (),
    why: Mapping[str, Plain] | None = None,
) -> Promise:
    """Store a promise of a version. It replaces an earlier one, whose answers and outcomes stay.

    Args:
        sureness: of the answers to the examples that its threshold was chosen on, to be drawn.
        inputs: embeddings of its examples, with which live texts are compared.
        why: further facts for the audit log.
    """
    before = of_digest(connection, version.digest)
    row = asdict(terms) | {"tenant": access_of(connection).tenant, "digest": version.digest, "created": now()}
    drawn = None if sureness is None else sureness.to_json()
    insert_row(connection, promises, row | {"who": who(), "sureness": drawn})
    told, at = ("metric", "error", "confidence", "threshold"), row["created"]
    was = None if before is None else {name: getattr(before, name) for name in told}
    after = {name: getattr(terms, name) for name in told} | dict(why or {})
    audit.record(connection, "promise", str(version), version.name, before=was, after=after, at=at, who=who())
    made = of_digest(connection, version.digest)
    assert made is not None
    if before is not None:
        forget_vectors(connection, [before.id])
    keep_inputs(connection, made.id, inputs)
    return made


def take_from_bundle(connection: Connection, version: Version, inputs: Sequence[bytes] = ()) -> None:
    """Store the promise that a version's bundle has, unless the version has one. Raises BundleError.

    Args:
        inputs: as in `make`; a bundle from elsewhere has none.
    """
    found = lineage_in(version.manifest).get("promise")
    if found is None or of_digest(connection, version.digest) is not None:
        return
    drawn = found.get("sureness") if isinstance(found, dict) else None
    terms = {key: value for key, value in found.items() if key != "sureness"} if isinstance(found, dict) else found
    try:
        sureness = None if drawn is None else Sureness.from_json(drawn)
    except ValueError as error:
        raise BundleError(f"what the bundle's promise was chosen on cannot be read ({error}): train it again") from None
    make(connection, version, Terms.from_json(terms), sureness, inputs=inputs)


def of_digest(connection: Connection, digest: str) -> Promise | None:
    """The promise in force of a version with this digest; None without one."""
    found = in_force(connection, promises.c.digest == digest)
    return found[0] if found else None


def in_force(connection: Connection, condition: ColumnElement[bool] | None = None) -> list[Promise]:
    """The newest promise of each digest that may be seen, the oldest first."""
    own = promises.c.tenant == access_of(connection).tenant
    seen = select(versions.c.digest).join(adapters, versions.c.adapter_id == adapters.c.id)
    seen = seen.where(seen_adapters(connection), seen_versions(connection))
    newest = select(func.max(promises.c.id)).where(own).group_by(promises.c.digest)
    query = select(*(promises.c[each.name] for each in fields(Promise)))
    query = query.where(own, promises.c.id.in_(newest), promises.c.digest.in_(seen))
    query = query.where(true() if condition is None else condition).order_by(promises.c.id)
    return [Promise(**row._mapping) for row in connection.execute(query)]


def of_version(connection: Connection, version: Version) -> Promise:
    """The promise of a version; raises NotFound."""
    found = of_digest(connection, version.digest)
    if found is None:
        raise NotFound(f"{version} has no promise: `turret promise {version} --error 2% --confidence 95%` makes one")
    return found


def sureness_of(connection: Connection, promise: Promise) -> Sureness | None:
    """What can be drawn of the examples that its threshold was chosen on; None for a promise of an older Turret."""
    found = connection.execute(select(promises.c.sureness).where(promises.c.id == promise.id)).scalar_one()
    return None if found is None else Sureness.from_json(found)


def versions_of(connection: Connection, promise: Promise) -> list[str]:
    """The versions with the digest of a promise, as references."""
    query = select(adapters.c.name, versions.c.number).join(adapters, versions.c.adapter_id == adapters.c.id)
    query = query.where(versions.c.digest == promise.digest, seen_adapters(connection), seen_versions(connection))
    return [f"{row.name}@{row.number}" for row in connection.execute(query.order_by(adapters.c.name))]


def task_of(connection: Connection, promise: Promise) -> type[Task]:
    """The task of the promise's version."""
    return stored_task(_spec(connection, promise))


def log(connection: Connection, seen: Sequence[LoggedAnswer]) -> None:
    """Store answers in order; a receipt that is already stored is skipped."""
    last = {each.receipt: each._asdict() for each in seen}
    upsert(connection, answers, list(last.values()), change=None)


def record(connection: Connection, receipt: str, value: Plain) -> tuple[Status, str]:
    """Record the outcome of the answer with this receipt. Returns its status, and a line for people."""
    row = None
    if 0 < len(receipt) <= LONGEST_RECEIPT and receipt.isprintable():
        query = select(answers, promises.c.digest).join(promises, answers.c.promise_id == promises.c.id)
        own = promises.c.tenant == access_of(connection).tenant
        row = connection.execute(query.where(answers.c.receipt == receipt, own)).first()
    promise = None if row is None else of_digest(connection, row.digest)
    if row is None or promise is None:
        hint = "check the id; an answer of the last second may not be logged yet, so try again"
        return "unknown", f"no answer of an experiment or a promise has receipt {ascii(receipt)[:60]}: {hint}"
    version = next(iter(versions_of(connection, promise)), None)
    if promise.id != row.promise_id:
        return "late", f"{version} has a newer promise since {promise.created}: this outcome is not counted"
    if connection.execute(select(outcomes.c.id).where(outcomes.c.answer_id == row.id)).first() is not None:
        return "repeated", "this answer already has an outcome, which stays"
    if row.at < _before(promise):
        hours = promise.outcome_ttl / 3600
        return "late", f"the outcomes of {version} count for {hours:.3g} hours after an answer: not counted"
    read = _read_outcome(value, row.label, list(_spec(connection, promise).get("labels") or ()))
    if isinstance(read, str):
        return "refused", f"{read}; nothing is recorded"
    wrong, right = read
    kept = {"promise_id": promise.id, "answer_id": row.id, "wrong": int(wrong), "right_label": right, "at": now()}
    new = insert_row(connection, outcomes, kept)
    if connection.execute(_select_outcomes(promise).where(outcomes.c.id == new)).first() is None:
        return "noted", f"stored, not counted: the promise of {version} is not about this answer"
    return "counted", f"counted for the promise of {version}"


def list_outcomes(connection: Connection, promise: Promise, after: int = 0) -> list[Told]:
    """The outcomes that count, in the order in which they came, with an id above `after`."""
    query = _select_outcomes(promise).where(outcomes.c.id > after).order_by(outcomes.c.id)
    return [Told._make(row) for row in connection.execute(query)]


def counts(connection: Connection, promise: Promise) -> Counts:
    """How many answers the bound is about, and how many of them have no outcome."""
    silent = case((outcomes.c.id.is_(None), 1), else_=0)
    due = case((answers.c.at < _before(promise), 1), else_=0)
    query = select(func.count(), func.sum(silent), func.sum(due), func.sum(silent * due))
    query = query.select_from(answers).outerjoin(outcomes, outcomes.c.answer_id == answers.c.id)
    row = connection.execute(query.where(answers.c.promise_id == promise.id, _about(promise))).one()
    return Counts(*(int(each or 0) for each in row))


def count_decided(connection: Connection, promise: Promise) -> tuple[int, int]:
    """How many answers the promise covers, and how many of them were decided."""
    query = select(func.count(), func.sum(answers.c.decided)).where(answers.c.promise_id == promise.id)
    row = connection.execute(query).one()
    return int(row[0]), int(row[1] or 0)


def count_broken(connection: Connection, promise: Promise) -> int:
    """How many promises of the same version outcomes have broken."""
    own = (promises.c.tenant == access_of(connection).tenant) & (promises.c.digest == promise.digest)
    query = select(func.count()).select_from(promises).where(own, promises.c.broken.is_not(None))
    return int(connection.execute(query).scalar_one())


def mark_broken(connection: Connection, promise: Promise, verdict: Mapping[str, Plain]) -> bool:
    """Record once that outcomes have broken a promise, also in the audit log; False if it was recorded already."""
    mine = (promises.c.id == promise.id) & promises.c.broken.is_(None)
    done = connection.execute(update(promises).where(mine).values(broken=now(), verdict=dict(verdict)))
    if not done.rowcount:
        return False
    _tell(connection, promise, PROMISE_BROKEN, verdict)
    return True


def mark_drifted(
    connection: Connection, promise: Promise, watch: InputWatch, said: Mapping[str, str], *, evidence: float, texts: int
) -> bool:
    """Record once that live texts are unlike a promise's examples, also in the audit log.

    Args:
        said: why, and what is done.
        evidence: the e-value.
        texts: live ones that were compared, in all rounds.

    Returns:
        False if it was recorded already, or the promise was replaced.
    """
    values = {"drifted": now(), "evidence": evidence, "earlier": texts}
    if not connection.execute(update(promise_watches).where(_same(watch)).values(values)).rowcount:
        return False
    connection.execute(delete(promise_inputs).where(promise_inputs.c.promise_id == watch.promise_id))  # used up
    _tell(connection, promise, INPUTS_DRIFTED, {**said, "evidence": evidence, "texts": texts})
    return True


def forget_inputs(connection: Connection, *, dry_run: bool) -> list[tuple[int, int]]:
    """Remove the embeddings of promises of all tenants that are not in force. Returns their ids, and bytes."""
    kept = select(promises.c.id).where(promises.c.digest.in_(select(versions.c.digest)))
    newest = select(func.max(promises.c.id)).group_by(promises.c.tenant, promises.c.digest)
    watched = promise_watches.c.promise_id
    query = select(watched).where(~(watched.in_(kept) & watched.in_(newest))).order_by(watched)
    found = list(connection.execute(query).scalars())
    if dry_run:
        return [(each, bytes_of_inputs(connection, each)) for each in found]
    return [(each, forget_vectors(connection, [each])) for each in found]


def _tell(connection: Connection, promise: Promise, verb: str, verdict: Mapping[str, Plain]) -> None:
    """Write into the audit log what happened to a promise, for each version that has it."""
    for version in versions_of(connection, promise):
        name = version.partition("@")[0]
        audit.record(connection, verb, version, name, after=dict(verdict), at=now(), who=who())


# --- private ----------------------------------------------------------------------------------------------------------


def _select_outcomes(promise: Promise) -> Select[tuple[int, float, str, int, int, str | None]]:
    columns = (outcomes.c.id, answers.c.probability, answers.c.label, answers.c.decided, outcomes.c.wrong)
    query = select(*columns, outcomes.c.right_label).join(answers, outcomes.c.answer_id == answers.c.id)
    known = outcomes.c.right_label == promise.label if promise.metric.startswith("misses") else true()
    return query.where(outcomes.c.promise_id == promise.id, _about(promise), known)


def _about(promise: Promise) -> ColumnElement[bool]:
    """The answers that the bound may be about, as far as they show it themselves."""
    if promise.metric.startswith("misses"):
        return true()
    return (answers.c.decided == 1) & (true() if promise.label is None else answers.c.label == promise.label)


def _before(promise: Promise) -> str:
    """Answers before this time are too old for an outcome."""
    return timestamp(datetime.now(UTC) - timedelta(seconds=promise.outcome_ttl))


def _spec(connection: Connection, promise: Promise) -> TaskSpec:
    """The task in the manifest of the promise's version."""
    query = select(versions.c.manifest).where(versions.c.digest == promise.digest).limit(1)
    manifest: Manifest = connection.execute(query).scalar_one()
    return task_in(manifest)


def _read_outcome(value: Plain, given: str, labels: Sequence[str]) -> tuple[bool, str | None] | str:
    """Whether the answer was wrong, and the right label if it is known; or why the value is no outcome."""
    if isinstance(value, str) and value in labels:
        return value != given, value
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true", "yes"):
        return False, given
    if text in ("0", "0.0", "false", "no"):
        return True, None
    return f"outcome {ascii(value)[:40]}: expected the right label, or 1 if the answer was right and 0 if not"
