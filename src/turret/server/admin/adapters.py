"""The control plane under `/api/`: adapters in the store and in memory, aliases, gates, promises, panels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated

from fastapi import Path, Query
from pydantic import BaseModel, Field

from turret import audit
from turret.engine import Named
from turret.json_types import JsonObject, JsonValue
from turret.reference import Reference as ParsedReference
from turret.server import moves
from turret.server.routes import AdapterName, AliasName, GateText, Model, Owner, Reference, View, router
from turret.store import Move, fold_comparisons
from turret.store import Version as StoredVersion
from turret.store.catalog import now, plain, who
from turret.store.gates import GateStatus
from turret.store.panels import MOST_LABELS, MOST_QUESTIONS, PanelMove, Question
from turret.tasks import QuestionType

control = router("admin")
Ref = Annotated[Reference, Path(description="name, name@3 or name@production")]
Name = Annotated[AdapterName, Path()]
After = Annotated[Reference | None, Query(description="The `after` of the previous page.")]


class LoadRequest(Model):
    pin: bool = False


class PromoteRequest(Model):
    alias: AliasName
    require: Annotated[list[GateText], Field(max_length=32, fail_fast=True)] = Field(default_factory=list)
    replay: bool = Field(False, description="Ask golden examples again that this version has answered before.")


class Adapter(BaseModel):
    """As in `turret list --json`, and whether it is in memory."""

    version: str
    digest: str
    created: str
    aliases: list[str]
    base: str | None
    method: str | None
    task: str | None
    metrics: JsonObject
    bytes: int
    run: str | None
    comparison: str | None = Field(description="The comparison that trained it; then a plain name never means it.")
    loaded: bool


class Compared(BaseModel):
    """The trainings of one comparison under one name that no alias names."""

    name: str
    comparison: str = Field(description="Its folder in the store, which `?comparison=` takes.")
    first: str = Field(description="The version with the lowest number.")
    last: str
    versions: int
    methods: list[str]
    bytes: int
    created: str = Field(description="When the newest was stored.")


class Adapters(BaseModel):
    adapters: list[Adapter]
    comparisons: list[Compared] = Field(description="The trainings of comparisons; on the first page.")
    after: str | None = Field(description="The `after` of the next page; null on the last one.")


class Aliases(BaseModel):
    aliases: list[moves.Alias]


class GateShown(BaseModel):
    """A gate of an alias, or a set of golden examples."""

    gate: str
    alias: str
    holder: str | None = Field(description="The version that the alias names.")
    passes: bool | None = Field(description="Whether that passes; null if nothing is known.")
    found: str
    examples: int | None = Field(default=None, description="Golden ones.")


class Gates(BaseModel):
    gates: list[GateShown]


class Replay(BaseModel):
    """The result of a version on a set of golden examples."""

    golden: str = Field(description="The digest of the set.")
    passed: int
    total: int
    first: JsonObject | None = Field(description="The first example that failed, if the gate allows some to fail.")
    replayed: str


class Moved(BaseModel):
    name: str
    alias: str
    version: str
    before: str | None
    changed: bool
    skipped: list[str]
    replays: list[Replay]
    serving: str | None = Field(description="The version in force here now.")


class Diff(BaseModel):
    versions: list[str] = Field(description="The two.")
    differs: dict[str, list[JsonValue]] = Field(description="By setting: its value in each of the two.")
    metrics: dict[str, dict[str, JsonObject]] = Field(description="By split and metric: `a`, `b` and `difference`.")
    bytes: list[int]


class LoadedList(BaseModel):
    loaded: list[JsonObject]


class Version(BaseModel):
    version: str
    digest: str


class BaseStatus(BaseModel):
    id: str
    fingerprint: str
    engine: JsonObject | None = Field(description="Its engine's figures; null but for the tenant default.")


class Status(BaseModel):
    base: dict[str, str] | None = Field(description="Null if there are several.")
    ready: bool
    draining: bool
    in_flight: int
    engine: JsonObject | None = Field(
        description="The whole engine's figures; null but for the tenant default, and if there are several bases."
    )
    bases: list[BaseStatus] = Field(default_factory=list, description="Missing if there is one.")


@control.get("/api/status", response_model_exclude_unset=True)
async def status(view: View) -> Status:
    """The base, and the engine's own figures; of a server with several bases, those of each."""
    figures = view.engines.stats() if view.access.operates else {}
    bases = [
        BaseStatus(
            id=each.name,
            fingerprint=each.fingerprint,
            engine=plain(asdict(figures[each.name])) if each.name in figures else None,
        )
        for each in view.engines.bases
    ]
    only = None if view.engines.only is None else bases[0]
    shown = Status(
        base=None if only is None else {"id": only.id, "fingerprint": only.fingerprint},
        ready=view.ready,
        draining=view.services.load.draining,
        in_flight=view.in_flight,
        engine=None if only is None else only.engine,
    )
    if only is None:
        shown.bases = bases
    return shown


@control.get("/api/adapters")
async def list_adapters(
    view: View,
    name: Annotated[AdapterName | None, Query()] = None,
    comparison: Annotated[str | None, Query(max_length=255, description="Only the versions of this one.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: After = None,
) -> Adapters:
    """The versions in the store by name and number, in pages. Those of comparisons are a line each on the first one."""
    versions, compared = fold_comparisons(every := await view.control(view.workspace.list, name))
    if comparison is not None:
        versions, compared = [each for each in every if each.comparison == comparison], []
    if after is not None:
        last = ParsedReference.parse(after)
        versions = [each for each in versions if (each.name, each.number) > (last.name, last.version or 0)]
    page, loaded = versions[:limit], {each.digest for each in view.engines.loaded_adapters()}
    more = str(page[-1]) if len(versions) > limit else None
    return Adapters(
        adapters=[Adapter(**each.as_json(), loaded=each.digest in loaded) for each in page],
        comparisons=[Compared(**each.as_json()) for each in compared] if after is None else [],
        after=more,
    )


@control.get("/api/adapters/{reference}")
async def show_adapter(reference: Ref, view: View) -> JsonObject:
    """One version, as `turret show --json`, and whether it is in memory."""
    shown: JsonObject = {**await view.control(view.workspace.show, reference)}
    if shown["run"] is not None:
        shown["run"] = {key: value for key, value in shown["run"].items() if key in ("id", "name", "state", "created")}
    return {**shown, "loaded": view.engines.in_memory(shown["digest"])}


@control.get("/api/adapters/{reference}/diff/{other}")
async def diff(reference: Ref, other: Ref, view: View) -> Diff:
    """How another version differs from one: settings, metrics, data and size."""
    found = await view.control(view.workspace.diff, reference, other, weights=False)
    return Diff.model_validate(found.as_json())


@control.get("/api/loaded")
async def list_loaded(view: View) -> LoadedList:
    """The versions in memory."""
    loaded = [asdict(each) for each in view.engines.loaded_adapters()]
    return LoadedList(loaded=[plain({key: value for key, value in each.items() if key != "tenant"}) for each in loaded])


@control.post("/api/adapters/{reference}/load")
async def load(reference: Ref, view: View, body: LoadRequest | None = None) -> Version:
    """Load a version now. With `pin` it stays in memory."""
    return await _load(view, reference, pin=body is not None and body.pin)


@control.post("/api/adapters/{reference}/unload")
async def unload(reference: Ref, view: View) -> Version:
    """Remove a version from memory. It is refused while a request needs it; the next request loads it again."""
    return await _apply(view, reference, "unload", view.engines.unload)


@control.post("/api/adapters/{reference}/pin")
async def pin(reference: Ref, view: View) -> Version:
    """Load a version now and keep it in memory."""
    return await _load(view, reference, pin=True)


@control.post("/api/adapters/{reference}/unpin")
async def unpin(reference: Ref, view: View) -> Version:
    """Allow a version's eviction when its place is needed."""
    return await _apply(view, reference, "unpin", view.engines.unpin)


def _version(version: StoredVersion | Named) -> Version:
    return Version(version=str(version), digest=version.digest)


async def _load(view: View, reference: str, *, pin: bool) -> Version:
    version = await view.control(lambda: view.engines.warm(view.aliases.exact(reference), pin=pin))
    await view.control(_record, view, "pin" if pin else "load", version)
    return _version(version)


async def _apply(view: View, reference: str, verb: str, action: Callable[[str], Named]) -> Version:
    version = await view.control(lambda: view.workspace.resolve(view.aliases.exact(reference)))
    await view.control(action, str(version))
    await view.control(_record, view, verb, version)
    return _version(version)


def _record(view: View, verb: str, version: StoredVersion | Named) -> None:
    """Write what was done in memory alone to the audit log; on a read-only store to the server's log."""
    database = view.workspace.store.database()
    if not database.writable():
        view.services.log.write("audit", verb=verb, what=str(version), who=who())
        return
    with database.writing() as connection:
        after = {"server": view.services.id, "digest": version.digest}
        audit.record(connection, verb, str(version), version.name, after=after, at=now(), who=who())


@control.post("/api/adapters/{reference}/verify")
async def verify(reference: Ref, view: View) -> JsonObject:
    """Hash and open all files of one version again."""
    return (await view.control(view.workspace.verify, reference)).as_json()


@control.post("/api/adapters/{reference}/promote", name="promote")
async def move_alias(reference: Ref, body: PromoteRequest, view: View) -> Moved:
    """Move an alias to a version. The version is loaded first; nothing moves if that fails."""
    moved = await moves.move_alias(view, reference, body.alias, require=body.require, replay=body.replay)
    return await view.control(_move_response, view, moved)


@control.get("/api/adapters/{name}/gates")
async def list_gates(name: Name, view: View) -> Gates:
    """The gates and golden examples of all aliases, and whether the version of each alias passes now."""
    return _gates(await view.control(view.workspace.gate_status, name))


@control.post("/api/adapters/{name}/gates")
async def change_gates(name: Name, body: moves.GateRequest, view: View) -> Gates:
    """Add and remove gates and golden examples of an alias. Nothing moves; the next promote is checked."""
    return _gates(await view.control(moves.change_gates, view, name, body))


def _gates(found: Sequence[GateStatus]) -> Gates:
    return Gates(gates=[GateShown.model_validate(each.as_json()) for each in found])


@control.post("/api/adapters/{reference}/promise")
async def make_promise(reference: Ref, body: moves.PromiseAsked, view: View, owner: Owner) -> JsonObject:
    """Promise a bound on the errors of a version, as `turret promise`. Another process asks it labelled examples."""
    return (await view.preview(moves.make_promise, view, owner, reference, body)).as_json()


@control.post("/api/aliases/{name}/{alias}/rollback")
async def rollback(name: Annotated[AdapterName, Path()], alias: Annotated[AliasName, Path()], view: View) -> Moved:
    """Move an alias back to the version that it named before."""
    return await view.control(_move_response, view, await moves.roll_back(view, name, alias))


def _move_response(view: View, move: Move) -> Moved:
    return Moved(**move.as_json(), serving=moves.serving(view, move.name, move.alias))


@control.get("/api/aliases")
async def list_aliases(view: View, name: Annotated[AdapterName | None, Query()] = None) -> Aliases:
    """Every alias: its version in the store, its version in force here, and why they differ."""
    return Aliases(aliases=await moves.list_here(view, name))


# --- panels -----------------------------------------------------------------------------------------------------------
# The control plane of panels: list, show, create, promote, roll back.


Label = Annotated[str, Field(max_length=1000)]
PanelRef = Annotated[Reference, Path(description="A panel: name or name@2.")]
PanelName = Annotated[AdapterName, Path(description="The name of a panel.")]


class AskedQuestion(Model):
    """A question of a new panel. The store takes type and labels from the adapter where they are missing."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    reference: Reference = Field(description="An adapter: name@production, or name@3#column for one of its questions.")
    type: QuestionType | None = None
    labels: Annotated[list[Label], Field(max_length=MOST_LABELS, fail_fast=True)] = Field(default_factory=list)
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None


class PanelRequest(Model):
    name: AdapterName
    questions: Annotated[list[AskedQuestion], Field(min_length=1, max_length=MOST_QUESTIONS, fail_fast=True)]


class PanelVersion(BaseModel):
    panel: str
    created: str
    who: str | None
    production: bool = Field(description="Whether it was promoted, and the plain name means it.")
    questions: list[Question]


class PanelList(BaseModel):
    panels: list[PanelVersion]


@control.get("/api/panels")
async def list_panels(view: View) -> PanelList:
    """All versions of all panels, by name and number."""
    found = await view.control(view.workspace.panels.list)
    return PanelList(panels=[PanelVersion(**each.as_json()) for each in found])


@control.post("/api/panels")
async def create_panel(body: PanelRequest, view: View) -> PanelVersion:
    """Store the next version of a panel. One with the same questions keeps its number."""
    asked = [
        Question(each.name, each.reference, each.type, tuple(each.labels), each.threshold) for each in body.questions
    ]
    made = await view.control(view.workspace.panels.create, body.name, asked)
    return PanelVersion(**made.as_json())


@control.get("/api/panels/{reference}")
async def show_panel(reference: PanelRef, view: View) -> PanelVersion:
    """One version of a panel."""
    return PanelVersion(**(await view.control(view.workspace.panels.show, reference)).as_json())


@control.post("/api/panels/{reference}/promote")
async def promote_panel(reference: PanelRef, view: View) -> PanelMove:
    """Make a version the one that the plain name means. Requests that have begun keep theirs."""
    return await view.control(view.workspace.panels.promote, reference)


@control.post("/api/panels/{name}/rollback")
async def rollback_panel(name: PanelName, view: View) -> PanelMove:
    """Go back to the version that was promoted before."""
    return await view.control(view.workspace.panels.rollback, name)
