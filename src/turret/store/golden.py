"""Golden examples: texts with expected answers, which a version must give before an alias moves to it.

A set never changes. Its id is the sha256 of its content, which is JSON lines with sorted keys. An example is a text
with one of

- `label`: the label that a classifier must give; for several labels a list, or words separated by `|`
- `equals`: the exact text that must be generated, apart from surrounding blanks
- `contains`: a text, or a list of texts, that the generated one must contain
- `expected` with `min_score`: a text that the generated one must resemble: ROUGE-L (0 to 1) of at least `min_score`

An alias requires a set with the share of it that must pass. Replays are stored under the version's digest, so each is
made once. A promote of `turret.workspace` makes them, because that needs a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypedDict

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from turret.database import access_of, adapters, golden_gates, golden_sets, replays, seen_adapters, upsert
from turret.errors import BadReference, Corrupt, DataError, GateFailed, NotFound, ReplayNeeded
from turret.json_types import AsJson, JsonMapping, JsonObject
from turret.store import catalog
from turret.store.blobs import digest_of
from turret.store.catalog import Version, now, plain_object
from turret.tasks.task import Prediction, stored_task
from turret.timestamp import to_minute

MOST_EXAMPLES = 10_000
MOST_CHARACTERS = 4_000_000  # of a set, which is one row of the database
WORD = "golden:"  # prefix of a set's name among other gates
CHECKS = ("label", "equals", "contains", "expected")
Kind = Literal["label", "text"]  # the answer: of a classifier, or generated


@dataclass(frozen=True)
class Example:
    """One text and the expected answer."""

    text: str
    check: str  # one of CHECKS
    wanted: str | tuple[str, ...]
    min_score: float | None = None  # only with `expected`

    def as_json(self) -> JsonObject:
        fields: JsonObject = {"text": self.text, self.check: self.wanted}
        return plain_object(fields if self.min_score is None else {**fields, "min_score": self.min_score})

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of a `label` example, sorted."""
        labels = self.wanted.split("|") if isinstance(self.wanted, str) else self.wanted
        return tuple(sorted({label.strip() for label in labels} - {""}))

    def words(self) -> str:
        """The expected answer on one line, for people."""
        prefix = {"label": "label ", "equals": "", "contains": "a text with ", "expected": "a text like "}[self.check]
        score = "" if self.min_score is None else f" (score>={self.min_score:g})"
        return f"{prefix}{quote_value(self.wanted)}{score}"

    def failure(self, given: str | list[str]) -> str | None:
        """None if the answer passes; else what to add to `words()`, such as ", scored 0.512"."""
        wanted = self.wanted
        if self.check == "label":
            right = tuple(sorted(given)) == self.labels if isinstance(given, list) else given == wanted
            return None if right else ""
        assert isinstance(given, str)
        if self.check == "contains":
            right = all(part in given for part in ([wanted] if isinstance(wanted, str) else wanted))
        elif self.check == "equals":
            right = given.strip() == str(wanted).strip()
        else:
            from turret.tasks.metrics import rouge_l

            score = rouge_l(given, str(wanted))
            assert self.min_score is not None
            return None if score >= self.min_score else f", scored {score:.3f}"
        return None if right else ""


@dataclass(frozen=True)
class GoldenSet:
    """Examples of one kind, in order; raises DataError if there are none, too many, or two kinds."""

    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        kinds = {example.check == "label" for example in self.examples}
        if not self.examples:
            raise DataError("no golden examples: expected at least one text with its expected answer")
        if len(kinds) > 1:
            raise DataError("labels and generated texts in one set of golden examples: keep them in two sets")
        if len(self.examples) > MOST_EXAMPLES:
            raise DataError(f"more than {MOST_EXAMPLES} golden examples: use fewer, since a promote replays them all")
        if len(self.content) > MOST_CHARACTERS:
            raise DataError(
                f"golden examples of {len(self.content)} characters: a set may have at most {MOST_CHARACTERS}"
            )

    @property
    def kind(self) -> Kind:
        return "label" if self.examples[0].check == "label" else "text"

    @property
    def content(self) -> str:
        lines = (json.dumps(each.as_json(), sort_keys=True, separators=(",", ":")) for each in self.examples)
        return "".join(f"{line}\n" for line in lines)

    @property
    def digest(self) -> str:
        return digest_of(self.content)

    @classmethod
    def of_content(cls, content: str) -> GoldenSet:
        """Parse the content of a set."""
        examples = []
        for line in content.splitlines():
            fields = json.loads(line)
            check = next(key for key in CHECKS if key in fields)
            wanted = tuple(fields[check]) if isinstance(fields[check], list) else fields[check]
            examples.append(Example(fields["text"], check, wanted, fields.get("min_score")))
        return cls(tuple(examples))


@dataclass(frozen=True)
class Golden:
    """A set that an alias requires."""

    alias: str
    golden: str  # the digest of the set
    kind: str
    examples: int
    share: float  # of the examples that must pass, in (0, 1]

    def __str__(self) -> str:
        return f"{name_of(self.golden)}>={self.share:g}"

    def as_json(self) -> JsonObject:
        return {**asdict(self), "gate": str(self)}


class GoldenFailure(TypedDict):
    """An example that failed. example: its number."""

    example: int
    text: str
    expected: str
    given: Prediction


@dataclass(frozen=True)
class GoldenReplay(AsJson):
    """The result of a set on a version."""

    golden: str
    passed: int
    total: int
    first: GoldenFailure | None
    replayed: str  # time, ISO 8601 in UTC

    def __str__(self) -> str:
        return f"{name_of(self.golden)} {self.passed} of {self.total}"


def name_of(digest: str) -> str:
    """The short name of a set, such as `golden:3fa2c1d0e5b4`."""
    return f"{WORD}{digest.removeprefix('sha256:')[:12]}"


def quote_value(value: object) -> str:
    """Quote a value from a user, in at most 80 characters."""
    text = repr(list(value)) if isinstance(value, tuple | list) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_share(share: float | None, examples: GoldenSet | None) -> float:
    """The share of examples that must pass, by default all; raises BadReference."""
    if share is None:
        return 1.0
    if examples is None:
        raise BadReference(f"share {share!r} needs golden examples: add --golden FILE")
    if not 0 < share <= 1:
        raise BadReference(f"share {share!r}: expected a fraction above 0 and at most 1, such as 0.95")
    return share


# --- sets that aliases require ----------------------------------------------------------------------------------------


def golden_sets_of(connection: Connection, name: str, alias: str | None = None) -> Sequence[Golden]:
    """The sets that an alias requires, or all aliases of a name."""
    query = (
        select(golden_gates, golden_sets.c.kind, golden_sets.c.examples)
        .join(golden_sets, golden_gates.c.golden == golden_sets.c.digest)
        .where(golden_gates.c.adapter_id == catalog.adapter_of(connection, name))
        .order_by(golden_gates.c.alias, golden_gates.c.created, golden_gates.c.golden)
    )
    if alias is not None:
        query = query.where(golden_gates.c.alias == alias)
    rows = connection.execute(query)
    return [Golden(row.alias, row.golden, row.kind, row.examples, row.share) for row in rows]


def add(connection: Connection, name: str, alias: str, examples: GoldenSet, share: float) -> None:
    """Store a set and let the alias require it. If the set exists, this repairs it and changes its share."""
    adapter_id, digest = catalog.adapter_of(connection, name), examples.digest
    row: JsonObject = {"kind": examples.kind, "examples": len(examples.examples), "content": examples.content}
    upsert(connection, golden_sets, [{"digest": digest, **row, "created": now()}], change=None)
    connection.execute(update(golden_sets).where(golden_sets.c.digest == digest).values(row))  # it may be damaged
    gate: JsonObject = {"adapter_id": adapter_id, "alias": alias, "golden": digest, "share": share, "created": now()}
    upsert(connection, golden_gates, [gate], change="set")


def remove(connection: Connection, name: str, alias: str, text: str) -> None:
    """Let the alias no longer require a set, named by its digest or the start of it; raises NotFound."""
    known = golden_sets_of(connection, name, alias)
    prefix = text.strip().removeprefix(WORD).removeprefix("sha256:").partition(">")[0].strip()
    matching = [each for each in known if prefix and each.golden.removeprefix("sha256:").startswith(prefix)]
    if len(matching) != 1:
        existing = f"it has {', '.join(map(str, known))}" if known else "it has none"
        found = "no golden examples" if not matching else f"{len(matching)} sets of golden examples match"
        raise NotFound(f"{found} {ascii(text)[:90]} on {name}@{alias}: {existing}")
    adapter_id = catalog.adapter_of(connection, name)
    connection.execute(delete(golden_gates).where(_requirement(adapter_id, alias, matching[0].golden)))


def content_of(connection: Connection, digest: str) -> GoldenSet:
    """The examples of a set, after a check of its digest; raises Corrupt. A tenant has those of its aliases."""
    query = select(golden_sets.c.content).where(golden_sets.c.digest == digest)
    if not access_of(connection).operates:
        required = select(golden_gates.c.golden).join(adapters, golden_gates.c.adapter_id == adapters.c.id)
        query = query.where(golden_sets.c.digest.in_(required.where(seen_adapters(connection))))
    content = connection.execute(query).scalar()
    if content is None or digest_of(content) != digest:
        problem = "are missing" if content is None else "do not match their digest"
        raise Corrupt(
            f"golden examples {name_of(digest)} {problem}: give the same file again to `turret gate --golden`"
        )
    try:
        return GoldenSet.of_content(content)
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError, DataError):
        raise Corrupt(
            f"golden examples {name_of(digest)} cannot be read: remove them from the alias with `turret gate --remove`"
        ) from None


def problems(connection: Connection) -> Iterable[tuple[str, str]]:
    """Name and problem of every set that does not match its digest."""
    for row in connection.execute(select(golden_sets.c.digest, golden_sets.c.content)):
        if digest_of(row.content) != row.digest:
            yield name_of(row.digest), "does not match its digest: give the same file again to `turret gate --golden`"


# --- results of versions ----------------------------------------------------------------------------------------------


def record(connection: Connection, version: Version, replay: GoldenReplay) -> None:
    """Store the result of a set on a version."""
    row = {"tenant": access_of(connection).tenant, "version": version.digest, **plain_object(asdict(replay))}
    connection.execute(insert(replays).values(row))


def replays_of(connection: Connection, version: Version) -> dict[str, GoldenReplay]:
    """Digest of a set -> the newest replay of it on the version."""
    own = (replays.c.tenant == access_of(connection).tenant) & (replays.c.version == version.digest)
    query = select(replays).where(own).order_by(replays.c.id)
    names = [each.name for each in fields(GoldenReplay)]
    rows = connection.execute(query).mappings()
    return {row["golden"]: GoldenReplay(**{name: row[name] for name in names}) for row in rows}


def check(connection: Connection, version: Version, alias: str) -> tuple[GoldenReplay, ...]:
    """The replays of all sets that the alias requires, if they pass.

    Raises:
        GateFailed: too few examples passed, or the version can never pass.
        ReplayNeeded: sets were not yet replayed on the version.
    """
    replays, missing, failed = replays_of(connection, version), [], []
    required = golden_sets_of(connection, version.name, alias)
    refusal = f"{version} may not become {version.name}@{alias}"
    remedy = f"promote another version, or change the gate with `turret gate {version.name} {alias}`"
    for gate in required:
        replay = replays.get(gate.golden)
        if replay is None:
            if problem := why_unfit(version, content_of(connection, gate.golden)):
                raise GateFailed(f"{refusal}: {name_of(gate.golden)} {problem}: {remedy}")
            missing.append(gate.golden)
        elif not passes(replay, gate):
            failed.append(_failure(replay, gate))
    if failed:
        raise GateFailed(f"{refusal}: {'; '.join(failed)}: {remedy}")
    if missing:
        raise ReplayNeeded(
            f"{refusal}: golden examples {', '.join(map(name_of, missing))} were never replayed on it: "
            "promote with `turret promote` or Workspace.promote, which replays them",
            tuple(missing),
        )
    return tuple(replays[gate.golden] for gate in required)


def judge_golden(connection: Connection, version: Version, gate: Golden) -> tuple[bool | None, str]:
    """Whether the version passes the set (None if it was never replayed), and the result for people."""
    replay = replays_of(connection, version).get(gate.golden)
    if replay is None:
        problem = why_unfit(version, content_of(connection, gate.golden))
        return (None, "never replayed on it") if problem is None else (False, problem)
    return passes(replay, gate), f"{replay.passed} of {replay.total} passed, {to_minute(replay.replayed)}"


def passes(replay: GoldenReplay, gate: Golden) -> bool:
    """Whether enough examples passed."""
    return replay.passed >= gate.share * replay.total - 1e-9


def why_unfit(version: Version, examples: GoldenSet) -> str | None:
    """Why the version can never pass the set, judged by its manifest alone; None if it may pass."""
    task = version.task
    if task.get("pairs"):
        return f"has one text in each example, but {version} reads two texts together"
    labels, gives = task.get("labels") or (), stored_task(task).gives
    wanted = "labels" if examples.kind == "label" else "texts"
    if gives != wanted:
        does = {"labels": "classifies", "texts": "generates texts"}.get(gives, f"answers with {gives}")
        return f"expects {wanted}, but {version} {does}"
    for place, example in () if gives == "texts" else enumerate(examples.examples, start=1):
        many = example.labels if task.get("multi_label") else (example.wanted,)
        for label in many:
            if label not in labels:
                known = ", ".join(map(str, labels[:8])) + (", ..." if len(labels) > 8 else "")
                return f"expects label {quote_value(label)} in example {place}, but {version} has labels {known}"
    return None


def _failure(replay: GoldenReplay, gate: Golden) -> str:
    first: JsonMapping = replay.first or {}
    return (
        f"{replay.total - replay.passed} of {replay.total} golden examples failed "
        f"({gate} is required, replayed {to_minute(replay.replayed)}), "
        f"first: example {first.get('example')} {quote_value(first.get('text'))}, expected {first.get('expected')}, "
        f"given {quote_value(first.get('given'))}"
    )


def _requirement(adapter_id: int, alias: str, digest: str) -> ColumnElement[bool]:
    gate = golden_gates.c
    return (gate.adapter_id == adapter_id) & (gate.alias == alias) & (gate.golden == digest)
