"""Panels: named, versioned lists of questions about a text, each answered by an adapter.

A version of a panel never changes. The plain name means `production`, which `promote` moves and `rollback` moves back,
or the newest version while nothing was promoted. A question keeps its reference as it was given, so the alias in
`urgency@production` moves on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from sqlalchemy import ColumnElement, Connection, Row, RowMapping, Select, func, insert, select, update

from turret import audit
from turret.database import (
    Database,
    access_of,
    adapters,
    insert_row,
    panel_moves,
    panel_versions,
    panels,
    seen_adapters,
)
from turret.errors import AdapterError, BadArgument, BadReference, DataError, InUse, NotFound, quote, quote_all
from turret.json_types import AsJson, JsonMapping, JsonObject
from turret.reference import Reference, check_name
from turret.store import catalog
from turret.store.catalog import PRODUCTION, now, who
from turret.tasks.task import Decision, QuestionType, stored_task

MOST_QUESTIONS = 400
MOST_LABELS = 255
TYPES: tuple[QuestionType, ...] = ("predicate", "choice", "score")


@dataclass(frozen=True)
class Question:
    """A question of a panel.

    Args:
        name: when a panel is created, an empty one stands for every question of the adapter, by its own name.
        reference: the adapter, such as `urgency@production`; `tickets@3#topic` is one question of an adapter that
            answers several, or one label of an adapter that gives several.
        type: default: as the adapter was trained.
        labels: of a choice in any order, of a score from the lowest to the highest, of a predicate false and true;
            default: those of the adapter.
        threshold: the least probability of an answer; below it the question is not decided.
    """

    name: str
    reference: str
    type: QuestionType | None = None
    labels: tuple[str, ...] = ()
    threshold: float | None = None

    @property
    def adapter(self) -> str:
        """The reference of the adapter alone."""
        return self.reference.partition("#")[0]

    @property
    def part(self) -> str:
        """The question of the adapter that is meant; empty if it answers only one."""
        return self.reference.partition("#")[2]

    def least(self, promised: float | None) -> float | None:
        """The least probability of an answer that is decided. promised: the threshold of the version's promise."""
        return promised if self.threshold is None else self.threshold

    def as_json(self) -> JsonObject:
        return {**asdict(self), "labels": list(self.labels)}


Asked = Mapping[str, str] | Sequence[Question]


@dataclass(frozen=True)
class Panel:
    """One version of a panel. It never changes, except for `production`."""

    name: str
    number: int
    questions: tuple[Question, ...]
    created: str  # ISO 8601, UTC
    who: str | None
    production: bool  # whether it was promoted and the plain name means it

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    def question(self, name: str | None) -> Question:
        """The question of this name; without a name the only one. Raises BadArgument, which lists them."""
        found = next((each for each in self.questions if each.name == name), None)
        if found is None and name is None and len(self.questions) == 1:
            return self.questions[0]
        if found is None:
            names = [each.name for each in self.questions]
            what = "a question has no name" if name is None else f"no question {quote(name, 40)}"
            raise BadArgument(f"{what}: panel {self} asks {quote_all(names, 160)}")
        return found

    def as_json(self) -> JsonObject:
        return {
            "panel": str(self),
            "created": self.created,
            "who": self.who,
            "production": self.production,
            "questions": [each.as_json() for each in self.questions],
        }


@dataclass(frozen=True)
class PanelMove(AsJson):
    """A move of a panel's `production`."""

    panel: str  # the version that the plain name means now, such as "tickets@2"
    before: str | None
    changed: bool


class Panels:
    """The panels of a store, as one access sees them.

    A token with limits sees a version of a panel only if it sees every adapter of all its questions; with limited
    bases, only if it sees the versions that these mean now.

    Args:
        found: the catalog; None if the store does not exist.
        made: the catalog, made if it does not exist.
    """

    def __init__(self, found: Callable[[], Database | None], made: Callable[[], Database]) -> None:
        self._found, self._made = found, made

    def create(self, name: str, questions: Asked) -> Panel:
        """Store the next version of a panel; the version that has these questions already, if there is one.

        Args:
            questions: references by the names of their questions, or questions.

        Raises:
            NotFound: a reference names no version, or a limited access may not use the name.
            InUse: an adapter has the name.
            AdapterError: a version decides nothing.
            DataError: a question does not fit its version.
        """
        check_name(name)
        asked = [Question(*pair) for pair in questions.items()] if isinstance(questions, Mapping) else list(questions)
        with self._made().writing() as connection:
            every = [one for each in asked for one in _expand_question(connection, each)]
            _check_names(every)
            completed = [_complete_question(connection, each) for each in every]
            _require_own_name(connection, name)
            return _create(connection, name, completed)

    def list(self) -> Sequence[Panel]:
        """All versions that may be seen, by name and number."""
        database = self._found()
        if database is None:
            return []
        with database.reading() as connection:
            return _list(connection)

    def show(self, reference: str) -> Panel:
        """The version that a reference means now: `tickets`, `tickets@2` or `tickets@production`. Raises NotFound."""
        found = self.find(reference)
        if found is not None:
            return found
        names = self.names()
        name = reference.partition("@")[0]
        known = f"there are {quote_all(names, 120)}" if names else "there is none: `turret panel create` makes one"
        if name in names:
            known = f"it has {quote_all([str(each.number) for each in self.list() if each.name == name], 80)}"
        raise NotFound(f"no panel {ascii(reference)[:60]}: {known}")

    def find(self, reference: str) -> Panel | None:
        """As `show`; None if there is no such panel, or if the reference is none."""
        try:
            parsed = Reference.parse(reference)
        except BadReference:
            return None
        database = self._found()
        if database is None or parsed.alias not in (None, PRODUCTION):
            return None
        with database.reading() as connection:
            return _find(connection, parsed)

    def names(self) -> Sequence[str]:
        """The names that may be seen, sorted."""
        return list(dict.fromkeys(each.name for each in self.list()))

    def missing(self, reference: str, error: NotFound) -> NotFound:
        """The error for a name that is neither an adapter nor a panel, with the panels that there are.

        Args:
            error: of the store; kept if there is such an adapter, since it then lists its own versions and aliases.
        """
        name, names, database = reference.partition("@")[0], self.names(), self._found()
        if not names or database is None:
            return error
        with database.reading() as connection:
            own = select(adapters.c.id).where(adapters.c.name == name, seen_adapters(connection))
            if connection.execute(own).first() is not None:
                return error
        if name not in names:
            return NotFound(f"{error}; its panels are {quote_all(names, 80)}")
        try:
            return NotFound(
                f"{self.show(reference)} is a panel and no adapter: `turret evaluate` and `evaluate_panel` take it"
            )
        except NotFound as own:
            return own

    def promote(self, reference: str) -> PanelMove:
        """Make a version the one that the plain name means.

        Raises:
            NotFound: an adapter of a question is gone.
            DataError: a question does not fit what its reference means now.
        """
        panel = self.show(reference)
        with self._made().writing() as connection:
            for each in panel.questions:
                _complete_question(connection, each)
            return _promote(connection, panel)

    def rollback(self, name: str) -> PanelMove:
        """Go back to the version that was promoted before. Repeated rollbacks go further back, past unseen versions.

        Raises NotFound.
        """
        panel = self.show(check_name(name))
        with self._made().writing() as connection:
            return _rollback(connection, panel.name)

    def moves(self, name: str) -> Sequence[JsonObject]:
        """All moves of a panel's `production`, the oldest first."""
        panel = self.show(check_name(name))
        with self._made().reading() as connection:
            query = select(panel_moves).where(panel_moves.c.panel_id == _row(connection, panel.name).id)
            query = query.where(panel_moves.c.number.in_(_seen_numbers(connection, panel.name)))
            rows = connection.execute(query.order_by(panel_moves.c.id)).mappings()
            return [{key: row[key] for key in ("verb", "number", "moved", "who")} for row in rows]


def panels_naming(connection: Connection, version: catalog.Version) -> Sequence[str]:
    """The panels with a question for exactly this version, whatever the access sees."""
    query = _rows(connection)
    found = [_panel(row) for row in connection.execute(query).mappings()]
    return [str(each) for each in found if any(one.adapter == str(version) for one in each.questions)]


# --- questions --------------------------------------------------------------------------------------------------------


def _check_names(asked: Sequence[Question]) -> None:
    if not 1 <= len(asked) <= MOST_QUESTIONS:
        raise DataError(f"a panel of {len(asked)} questions: expected 1 to {MOST_QUESTIONS}")
    names = [each.name for each in asked]
    for name in names:
        if len(name) > 100 or not name.isprintable() or name != name.strip():
            raise DataError(f"question {ascii(name)[:60]}: expected at most 100 printable characters")
        if names.count(name) > 1:
            raise DataError(f"question {quote(name, 40)} is there twice: name each once")


def decisions_of(version: catalog.Version) -> Mapping[str, Decision]:
    """What a version decides, by the names of its questions or labels; the only question has an empty name.

    Raises:
        AdapterError: it decides nothing, or reads two texts.
    """
    spec = version.task
    found = stored_task(spec).decisions(spec)
    if not found or spec.get("pairs"):
        why = "reads two texts together" if found else "gives no probabilities of labels"
        raise AdapterError(f"{version} {why}: a question needs a version that classifies one text")
    return found


def _expand_question(connection: Connection, question: Question) -> list[Question]:
    """The question; if it has no name, one for everything that its adapter decides."""
    if question.name:
        return [question]
    version = catalog.find(connection, Reference.parse(question.adapter))
    parts = [question.part] if question.part else list(decisions_of(version))
    references = [f"{question.adapter}#{part}" if part else question.adapter for part in parts]
    names = [part or version.name for part in parts]
    return [replace(question, name=name, reference=each) for name, each in zip(names, references, strict=True)]


def _complete_question(connection: Connection, question: Question) -> Question:
    """The question with the type and the labels of its adapter where it has none."""
    version = catalog.find(connection, Reference.parse(question.adapter))
    every = decisions_of(version)
    if question.part not in every:
        parts = [each for each in every if each]
        if not parts:
            raise DataError(f"{version} answers one question: leave #{question.part[:40]} out")
        example = f"{version}#{parts[0][:40]}"
        raise DataError(f"{version} answers {quote_all(parts, 120)}: name one of them, such as {example}")
    own = every[question.part]
    type_, labels, known = question.type or own.type, tuple(question.labels), set(own.labels)
    name = quote(question.name, 40)
    if type_ not in TYPES:
        raise DataError(f"type of question {name} is {quote(type_, 40)}: expected {', '.join(TYPES)}")
    for label in labels:
        if label not in known:
            raise DataError(f"question {name}: no label {quote(label, 40)}, {version} has {quote_all(own.labels, 120)}")
    if len(set(labels)) < len(labels) or len(labels or own.labels) > MOST_LABELS:
        raise DataError(f"question {name}: expected different labels, at most {MOST_LABELS}")
    if labels and set(labels) != known:
        raise DataError(
            f"question {name}: the labels lack {quote(min(known - set(labels)), 40)}: name all of {version}"
        )
    if type_ != own.type and type_ != "choice" and not labels:
        order = "false and true" if type_ == "predicate" else "the lowest to the highest"
        raise DataError(f"question {name} is a {type_}: give the labels of {version} from {order}")
    if type_ == "predicate" and len(known) != 2:
        raise DataError(f"question {name} is a predicate and {version} has {len(known)} labels: expected 2")
    if question.threshold is not None and not (math.isfinite(question.threshold) and 0 < question.threshold < 1):
        raise DataError(f"threshold of question {name} is {question.threshold}: expected a number between 0 and 1")
    return replace(question, type=type_, labels=labels or own.labels)


# --- rows -------------------------------------------------------------------------------------------------------------


_Row = Row[tuple[int, str, str, int, int | None, str]]  # of `panels`


def _find_row(connection: Connection, name: str) -> _Row | None:
    own = (panels.c.tenant == access_of(connection).tenant) & (panels.c.name == name)
    return connection.execute(select(panels).where(own)).first()


def _row(connection: Connection, name: str) -> _Row:
    row = _find_row(connection, name)
    if row is None:
        raise NotFound(f"no panel {ascii(name)[:60]}: see `turret panel list`")
    return row


def _rows(connection: Connection) -> Select[tuple[str | int | None, ...]]:
    columns = panel_versions.c.number, panel_versions.c.questions, panel_versions.c.created, panel_versions.c.who
    query = select(panels.c.name, panels.c.production, *columns).join(panels, panel_versions.c.panel_id == panels.c.id)
    return query.where(panels.c.tenant == access_of(connection).tenant)


def _panel(row: RowMapping) -> Panel:
    questions = tuple(Question(**{**each, "labels": tuple(each["labels"])}) for each in row["questions"])
    used = row["production"] == row["number"]
    return Panel(row["name"], row["number"], questions, row["created"], row["who"], production=used)


def _find(connection: Connection, reference: Reference) -> Panel | None:
    query = _rows(connection).where(panels.c.name == reference.name)
    if reference.version is not None:
        query = query.where(panel_versions.c.number == reference.version)
    elif reference.alias is not None:
        query = query.where(panel_versions.c.number == panels.c.production)
    else:
        meant = panels.c.production.is_(None) | (panel_versions.c.number == panels.c.production)
        query = query.where(meant).order_by(panel_versions.c.number.desc()).limit(1)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    if _sees(connection, panel := _panel(row)):
        return panel
    if str(reference) != reference.name:
        return None
    return next(reversed(_list(connection, panels.c.name == reference.name)), None)  # the last one that is seen


def _list(connection: Connection, *conditions: ColumnElement[bool]) -> list[Panel]:
    """The versions that may be seen, by name and number."""
    query = _rows(connection).where(*conditions).order_by(panels.c.name, panel_versions.c.number)
    every = [_panel(row) for row in connection.execute(query).mappings().all()]
    return [each for each in every if _sees(connection, each)]


def _seen_numbers(connection: Connection, name: str) -> set[int]:
    return {each.number for each in _list(connection, panels.c.name == name)}


def _sees(connection: Connection, panel: Panel) -> bool:
    """Whether the panel's name and all its adapters may be seen; with limited bases, the versions that it asks now."""
    access = access_of(connection)
    if access.whole:
        return True
    if not access.sees(panel.name):
        return False
    if "*" not in access.bases:
        try:
            return all(catalog.find(connection, Reference.parse(each.adapter)) for each in panel.questions)
        except NotFound:
            return False
    names = {each.adapter.partition("@")[0] for each in panel.questions}
    query = select(adapters.c.name).where(adapters.c.name.in_(names), seen_adapters(connection))
    return names == set(connection.execute(query).scalars())


def _require_own_name(connection: Connection, name: str) -> None:
    """Raise NotFound if a limited access may not make a panel of this name, or a version of it.

    It may not use a name that it cannot see, that of an adapter that it does not see, and that of a panel with a
    version that it does not see. The error is the same for each.
    """
    access = access_of(connection)
    if access.whole:
        return
    own = access.sees(name)
    if own:
        named = (adapters.c.tenant == access.tenant) & (adapters.c.name == name)
        unseen = select(adapters.c.id).where(named, ~seen_adapters(connection))
        versions = connection.execute(_rows(connection).where(panels.c.name == name)).mappings()
        own = connection.execute(unseen).first() is None
        own = own and all(_sees(connection, _panel(row)) for row in versions.all())
    if not own:
        raise NotFound(
            f"no panel {ascii(name)[:60]} that you may make: choose another name, of {quote_all(access.adapters, 120)}"
        )


def _create(connection: Connection, name: str, questions: Sequence[Question]) -> Panel:
    tenant, at = access_of(connection).tenant, now()
    taken = select(adapters.c.id).where(adapters.c.tenant == tenant, adapters.c.name == name)
    if connection.execute(taken).first() is not None:
        raise InUse(f"an adapter is called {name}: give the panel another name, such as {name}-panel")
    known = _find_row(connection, name)
    if known is None:
        first: JsonMapping = {"tenant": tenant, "name": name, "last_number": 0, "created": at}
        panel_id, last = insert_row(connection, panels, first), 0
    else:
        panel_id, last = known.id, known.last_number
    for same in _list(connection, panels.c.name == name):
        if same.questions == tuple(questions):
            return same
    content = [each.as_json() for each in questions]
    values = {"panel_id": panel_id, "number": last + 1, "questions": content, "created": at, "who": who()}
    connection.execute(insert(panel_versions).values(values))
    connection.execute(update(panels).where(panels.c.id == panel_id).values(last_number=last + 1))
    after = {"questions": {each.name: each.reference for each in questions}}
    audit.record(connection, "panel", f"{name}@{last + 1}", name, after=after, at=at, who=who())
    return Panel(name, last + 1, tuple(questions), at, who(), production=False)


def _promote(connection: Connection, panel: Panel) -> PanelMove:
    row = _row(connection, panel.name)
    before = f"{panel.name}@{row.production}" if row.production in _seen_numbers(connection, panel.name) else None
    if row.production == panel.number:
        return PanelMove(str(panel), before, changed=False)
    last = connection.execute(select(func.max(panel_moves.c.id)).where(panel_moves.c.panel_id == row.id)).scalar()
    _move(connection, panel.name, row, "promote", panel.number, last)
    return PanelMove(str(panel), before, changed=True)


def _rollback(connection: Connection, name: str) -> PanelMove:
    row, seen = _row(connection, name), _seen_numbers(connection, name)
    before = f"{name}@{row.production}" if row.production in seen else None
    query = select(panel_moves).where(panel_moves.c.panel_id == row.id).order_by(panel_moves.c.id.desc())
    target = connection.execute(query.limit(1)).first()
    while target is not None and (target.number == row.production or target.number not in seen):
        earlier = select(panel_moves).where(panel_moves.c.id == target.before)
        target = None if target.before is None else connection.execute(earlier).one()
    if target is None:
        meant = "nothing was promoted" if before is None else f"{before} was the first"
        raise NotFound(f"nothing to roll back to: {meant}; `turret panel promote {name}@NUMBER` chooses a version")
    _move(connection, name, row, "rollback", target.number, target.before)
    return PanelMove(f"{name}@{target.number}", before, changed=True)


def _move(connection: Connection, name: str, row: _Row, verb: str, number: int, before: int | None) -> None:
    at = now()
    was, is_now = {"version": row.production}, {"version": number}
    audit.record(connection, verb, f"{name}@{PRODUCTION}", name, before=was, after=is_now, at=at, who=who())
    connection.execute(update(panels).where(panels.c.id == row.id).values(production=number))
    values = {"panel_id": row.id, "verb": verb, "number": number, "before": before, "moved": at, "who": who()}
    connection.execute(insert(panel_moves).values(values))
