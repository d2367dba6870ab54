"""Golden examples: what a version must answer before an alias may be moved to it. Refuses to know how it answers.

A set is known by the sha256 of its content, JSON lines with sorted keys, and never changes. An example is a text and
one of

- `label`: what a classifier must give; for many labels at once a list, or words with `|` between them
- `equals`, `contains`: what a generated text must be, blanks around it aside, or hold (each of a list)
- `expected` with `min_score`: a text that the generated one must be like, ROUGE-L as a fraction

An alias asks for a set with the share of it that must pass. Replays are kept by the version's digest, so they are asked
for once; only a promote that runs the version (`turret.workspace`) can make one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, delete, insert, select, update

from turret.database import golden_gates, golden_sets, replays
from turret.errors import BadReference, Corrupt, DataError, GateFailed, NotFound, ReplayNeeded
from turret.store import catalog
from turret.store.catalog import Version, now, plain
from turret.tasks import stored_task

MOST_EXAMPLES = 10_000
MOST_CHARACTERS = 4_000_000  # of a set: it is a row of the database
WORD = "golden:"  # how a set is named beside other gates
CHECKS = ("label", "equals", "contains", "expected")
Kind = Literal["label", "text"]  # what must answer: a classifier, or what generates


@dataclass(frozen=True)
class Example:
    """One text, and what the answer to it must be."""

    text: str
    check: str  # one of CHECKS
    wanted: str | tuple[str, ...]
    min_score: float | None = None  # of `expected`

    def as_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {"text": self.text, self.check: self.wanted}
        return plain(said if self.min_score is None else {**said, "min_score": self.min_score})  # type: ignore[no-any-return]

    @property
    def labels(self) -> tuple[str, ...]:
        """Many labels at once."""
        wanted = self.wanted.split("|") if isinstance(self.wanted, str) else self.wanted
        return tuple(sorted({label.strip() for label in wanted} - {""}))

    def words(self) -> str:
        """What is expected, for one line."""
        what = {"label": "label ", "equals": "", "contains": "a text with ", "expected": "a text like "}[self.check]
        score = "" if self.min_score is None else f" (score>={self.min_score:g})"
        return f"{what}{shortly(self.wanted)}{score}"


@dataclass(frozen=True)
class GoldenSet:
    """Examples of one kind, in their order."""

    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        kinds = {example.check == "label" for example in self.examples}
        if not self.examples:
            raise DataError("no golden example: expected at least one text with what its answer must be")
        if len(kinds) > 1:
            raise DataError("golden examples of a classifier and of texts in one set: keep them in two")
        if len(self.examples) > MOST_EXAMPLES:
            raise DataError(
                f"more than {MOST_EXAMPLES} golden examples: keep fewer, they are replayed by every promote"
            )
        if len(self.content) > MOST_CHARACTERS:
            raise DataError(
                f"golden examples of {len(self.content)} characters: at most {MOST_CHARACTERS} are kept in a set"
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
        """The set whose content that is."""
        examples = []
        for line in content.splitlines():
            said = json.loads(line)
            check = next(key for key in CHECKS if key in said)
            wanted = tuple(said[check]) if isinstance(said[check], list) else said[check]
            examples.append(Example(said["text"], check, wanted, said.get("min_score")))
        return cls(tuple(examples))


@dataclass(frozen=True)
class Golden:
    """A set that an alias asks for."""

    alias: str
    golden: str  # its digest
    kind: str
    examples: int
    share: float  # of them must pass

    def __str__(self) -> str:
        return f"{name_of(self.golden)}>={self.share:g}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "gate": str(self)}


@dataclass(frozen=True)
class GoldenReplay:
    """How a version did on a set."""

    golden: str
    passed: int
    total: int
    first: Mapping[str, Any] | None  # the first that failed: example, text, expected, given
    replayed: str  # when

    def __str__(self) -> str:
        return f"{name_of(self.golden)} {self.passed} of {self.total}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def digest_of(content: str) -> str:
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def name_of(digest: str) -> str:
    """`golden:3fa2c1d0e5b4`, enough to tell sets apart."""
    return f"{WORD}{digest.removeprefix('sha256:')[:12]}"


def shortly(value: object) -> str:
    """Someone's words, quoted and short."""
    said = repr(list(value)) if isinstance(value, tuple | list) else repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


def check_share(share: float | None, examples: GoldenSet | None) -> float:
    """The share that must pass, all where none is said; raises BadReference."""
    if share is None:
        return 1.0
    if examples is None:
        raise BadReference(f"share {share!r} is of golden examples, and none are given: give --golden FILE with it")
    if not 0 < share <= 1:
        raise BadReference(f"share {share!r}: expected a fraction above 0 and at most 1, such as 0.95")
    return share


# --- what an alias asks for ------------------------------------------------------------------------------------------


def of(connection: Connection, name: str, alias: str | None = None) -> Sequence[Golden]:
    """The sets that a name's alias asks for, or all its aliases."""
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


def keep(connection: Connection, name: str, alias: str, wanted: GoldenSet, share: float) -> None:
    """Store the set, once, and let the alias ask for it; the same set again changes the share, and mends it."""
    adapter_id, digest = catalog.adapter_of(connection, name), wanted.digest
    row = {"kind": wanted.kind, "examples": len(wanted.examples), "content": wanted.content}
    there = connection.execute(select(golden_sets).where(golden_sets.c.digest == digest)).first()
    if there is None:
        connection.execute(insert(golden_sets).values(**row, digest=digest, created=now()))
    elif any(there._mapping[key] != value for key, value in row.items()):  # damaged since
        connection.execute(update(golden_sets).where(golden_sets.c.digest == digest).values(row))
    connection.execute(delete(golden_gates).where(_one(adapter_id, alias, digest)))
    key = {"adapter_id": adapter_id, "alias": alias, "golden": digest}
    connection.execute(insert(golden_gates).values(**key, share=share, created=now()))


def drop(connection: Connection, name: str, alias: str, text: str) -> None:
    """Let the alias no longer ask for the set; raises NotFound saying which there are."""
    known = of(connection, name, alias)
    said = text.strip().removeprefix(WORD).removeprefix("sha256:").partition(">")[0].strip()
    wanted = [each for each in known if said and each.golden.removeprefix("sha256:").startswith(said)]
    if len(wanted) != 1:
        there = f"it has {', '.join(map(str, known))}" if known else "it has none"
        found = "no golden examples" if not wanted else f"{len(wanted)} sets of golden examples are called"
        raise NotFound(f"{found} {ascii(text)[:90]} on {name}@{alias}: {there}")
    adapter_id = catalog.adapter_of(connection, name)
    connection.execute(delete(golden_gates).where(_one(adapter_id, alias, wanted[0].golden)))


def content_of(connection: Connection, digest: str) -> GoldenSet:
    """The examples of a set, their digest checked; raises Corrupt."""
    content = connection.execute(select(golden_sets.c.content).where(golden_sets.c.digest == digest)).scalar()
    if content is None or digest_of(content) != digest:
        said = "are missing" if content is None else "do not match their digest"
        raise Corrupt(f"golden examples {name_of(digest)} {said}: give the same file again to `turret gate --golden`")
    try:
        return GoldenSet.of_content(content)
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError, DataError):
        raise Corrupt(
            f"golden examples {name_of(digest)} make no sense: take them off the alias with `turret gate --remove`"
        ) from None


def problems(connection: Connection) -> Iterable[tuple[str, str]]:
    """(name, what is wrong) of every set that is not as it was stored."""
    for row in connection.execute(select(golden_sets.c.digest, golden_sets.c.content)):
        if digest_of(row.content) != row.digest:
            yield name_of(row.digest), "does not match its digest: give the same file again to `turret gate --golden`"


# --- how versions did ------------------------------------------------------------------------------------------------


def record(connection: Connection, version: Version, replay: GoldenReplay) -> None:
    """Keep how the version did."""
    connection.execute(insert(replays).values(version=version.digest, **plain(asdict(replay))))


def replays_of(connection: Connection, version: Version) -> dict[str, GoldenReplay]:
    """Digest of a set -> the newest replay of the version on it."""
    query = select(replays).where(replays.c.version == version.digest).order_by(replays.c.id)
    return {
        row.golden: GoldenReplay(row.golden, row.passed, row.total, row.first, row.replayed)
        for row in connection.execute(query)
    }


def check(connection: Connection, version: Version, alias: str) -> tuple[GoldenReplay, ...]:
    """How the version did on all that the alias asks for. Raises GateFailed where that is not enough or cannot be, and
    ReplayNeeded where it was never asked."""
    kept, missing, failed = replays_of(connection, version), [], []
    wanted = of(connection, version.name, alias)
    for gate in wanted:
        replay = kept.get(gate.golden)
        if replay is None:
            if said := misfit(version, content_of(connection, gate.golden)):
                raise GateFailed(
                    f"{_refused(version, alias)}: {name_of(gate.golden)} {said}: {_remedy(version, alias)}"
                )
            missing.append(gate.golden)
        elif not passed(replay, gate):
            failed.append(_said(replay, gate))
    if failed:
        raise GateFailed(f"{_refused(version, alias)}: {'; '.join(failed)}: {_remedy(version, alias)}")
    if missing:
        raise ReplayNeeded(
            f"{_refused(version, alias)}: golden examples {', '.join(map(name_of, missing))} were never put to it: "
            "promote with `turret promote` or Workspace.promote, which asks them",
            tuple(missing),
        )
    return tuple(kept[gate.golden] for gate in wanted)


def judged(connection: Connection, version: Version, gate: Golden) -> tuple[bool | None, str]:
    """Whether the version passed the examples when they were put to it, None where they never were; and how it did."""
    replay = replays_of(connection, version).get(gate.golden)
    if replay is None:
        said = misfit(version, content_of(connection, gate.golden))
        return (None, "never put to it") if said is None else (False, said)
    when = replay.replayed[:16].replace("T", " ")
    return passed(replay, gate), f"{replay.passed} of {replay.total} passed, {when} UTC"


def passed(replay: GoldenReplay, gate: Golden) -> bool:
    """Whether that is enough."""
    return replay.passed >= gate.share * replay.total - 1e-9


def misfit(version: Version, wanted: GoldenSet) -> str | None:
    """Why no version of that kind could pass, from its manifest alone."""
    task = version.part("task")
    labels, generates = task.get("labels") or (), stored_task(task).generates
    if generates == (wanted.kind == "label"):
        does = "writes texts" if generates else "classifies"
        return f"has {'labels' if wanted.kind == 'label' else 'texts'} as answers, and {version} {does}"
    for place, example in () if generates else enumerate(wanted.examples, start=1):
        many = example.labels if task.get("multi_label") else (example.wanted,)
        for label in many:
            if label not in labels:
                known = ", ".join(map(str, labels[:8])) + (", ..." if len(labels) > 8 else "")
                return f"expects label {shortly(label)} in example {place}, and {version} knows {known}"
    return None


def _said(replay: GoldenReplay, gate: Golden) -> str:
    first = replay.first or {}
    asked = replay.replayed[:16].replace("T", " ")
    where = f"example {first.get('example')} {shortly(first.get('text'))}"
    return (
        f"{replay.total - replay.passed} of {replay.total} golden examples failed "
        f"({gate} is wanted, asked {asked} UTC), "
        f"the first is {where}, expected {first.get('expected')}, given {shortly(first.get('given'))}"
    )


def _refused(version: Version, alias: str) -> str:
    return f"{version} may not become {version.name}@{alias}"


def _remedy(version: Version, alias: str) -> str:
    return f"promote another version, or change the gate with `turret gate {version.name} {alias}`"


def _one(adapter_id: int, alias: str, digest: str) -> Any:
    gate = golden_gates.c
    return (gate.adapter_id == adapter_id) & (gate.alias == alias) & (gate.golden == digest)
