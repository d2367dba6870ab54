"""The control plane under `/api/`: adapters in the store and in memory, aliases, verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated

from fastapi import Path, Query, Request

from turret import audit
from turret.engine import Named
from turret.json_types import JsonObject
from turret.reference import Reference
from turret.server import moves
from turret.server import routes as names
from turret.server.admin import schemas
from turret.server.routes import View, owner_of, router
from turret.store import Move, Version, folded
from turret.store.catalog import now, plain, who
from turret.store.gates import GateStatus

control = router("admin")
Ref = Annotated[names.Reference, Path(description="name, name@3 or name@production")]
Name = Annotated[names.AdapterName, Path()]
After = Annotated[names.Reference | None, Query(description="The `after` of the previous page.")]


@control.get("/api/status", response_model_exclude_unset=True)
async def status(view: View) -> schemas.Status:
    """The base, and the engine's own figures; of a server with several bases, those of each."""
    figures = view.engines.stats() if view.access.operates else {}
    bases = [
        schemas.BaseStatus(
            id=each.name,
            fingerprint=each.fingerprint,
            engine=plain(asdict(figures[each.name])) if each.name in figures else None,
        )
        for each in view.engines.bases
    ]
    only = None if view.engines.only is None else bases[0]
    shown = schemas.Status(
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
    name: Annotated[names.AdapterName | None, Query()] = None,
    comparison: Annotated[str | None, Query(max_length=255, description="Only the versions of this one.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: After = None,
) -> schemas.Adapters:
    """The versions in the store by name and number, in pages. Those of comparisons are a line each on the first one."""
    versions, compared = folded(every := await view.control(view.workspace.list, name))
    if comparison is not None:
        versions, compared = [each for each in every if each.comparison == comparison], []
    if after is not None:
        last = Reference.parse(after)
        versions = [each for each in versions if (each.name, each.number) > (last.name, last.version or 0)]
    page, loaded = versions[:limit], {each.digest for each in view.engines.loaded()}
    more = str(page[-1]) if len(versions) > limit else None
    return schemas.Adapters(
        adapters=[schemas.Adapter(**each.as_json(), loaded=each.digest in loaded) for each in page],
        comparisons=[schemas.Compared(**each.as_json()) for each in compared] if after is None else [],
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
async def diff(reference: Ref, other: Ref, view: View) -> schemas.Diff:
    """How another version differs from one: settings, metrics, data and size."""
    found = await view.control(view.workspace.diff, reference, other, weights=False)
    return schemas.Diff.model_validate(found.as_json())


@control.get("/api/loaded")
async def list_loaded(view: View) -> schemas.LoadedList:
    """The versions in memory."""
    loaded = [asdict(each) for each in view.engines.loaded()]
    return schemas.LoadedList(
        loaded=[plain({key: value for key, value in each.items() if key != "tenant"}) for each in loaded]
    )


@control.post("/api/adapters/{reference}/load")
async def load(reference: Ref, view: View, body: schemas.LoadRequest | None = None) -> schemas.Version:
    """Load a version now. With `pin` it stays in memory."""
    return await _load(view, reference, pin=body is not None and body.pin)


@control.post("/api/adapters/{reference}/unload")
async def unload(reference: Ref, view: View) -> schemas.Version:
    """Remove a version from memory. It is refused while a request needs it; the next request loads it again."""
    return await _apply(view, reference, "unload", view.engines.unload)


@control.post("/api/adapters/{reference}/pin")
async def pin(reference: Ref, view: View) -> schemas.Version:
    """Load a version now and keep it in memory."""
    return await _load(view, reference, pin=True)


@control.post("/api/adapters/{reference}/unpin")
async def unpin(reference: Ref, view: View) -> schemas.Version:
    """Allow a version's eviction when its place is needed."""
    return await _apply(view, reference, "unpin", view.engines.unpin)


def _version(version: Version | Named) -> schemas.Version:
    return schemas.Version(version=str(version), digest=version.digest)


async def _load(view: View, reference: str, *, pin: bool) -> schemas.Version:
    version = await view.control(view.engines.warm, view.aliases.exact(reference), pin=pin)
    await view.control(_record, view, "pin" if pin else "load", version)
    return _version(version)


async def _apply(view: View, reference: str, verb: str, action: Callable[[str], Named]) -> schemas.Version:
    version = await view.control(view.workspace.resolve, view.aliases.exact(reference))
    await view.control(action, str(version))
    await view.control(_record, view, verb, version)
    return _version(version)


def _record(view: View, verb: str, version: Version | Named) -> None:
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
async def move_alias(reference: Ref, body: schemas.PromoteRequest, view: View) -> schemas.Moved:
    """Move an alias to a version. The version is loaded first; nothing moves if that fails."""
    return _moved(view, await moves.move_alias(view, reference, body.alias, require=body.require, replay=body.replay))


@control.get("/api/adapters/{name}/gates")
async def list_gates(name: Name, view: View) -> schemas.Gates:
    """The gates and golden examples of all aliases, and whether the version of each alias passes now."""
    return _gates(await view.control(view.workspace.gate_status, name))


@control.post("/api/adapters/{name}/gates")
async def change_gates(name: Name, body: moves.GateRequest, view: View) -> schemas.Gates:
    """Add and remove gates and golden examples of an alias. Nothing moves; the next promote is checked."""
    return _gates(await view.control(moves.change_gates, view, name, body))


def _gates(found: Sequence[GateStatus]) -> schemas.Gates:
    return schemas.Gates(gates=[schemas.GateShown.model_validate(each.as_json()) for each in found])


@control.post("/api/adapters/{reference}/promise")
async def make_promise(reference: Ref, body: moves.PromiseAsked, view: View, request: Request) -> JsonObject:
    """Promise a bound on the errors of a version, as `turret promise`. Another process asks it labelled examples."""
    owner = owner_of(request.state.caller)
    return (await view.preview(moves.make_promise, view, owner, reference, body)).as_json()


@control.post("/api/aliases/{name}/{alias}/rollback")
async def rollback(
    name: Annotated[names.AdapterName, Path()], alias: Annotated[names.AliasName, Path()], view: View
) -> schemas.Moved:
    """Move an alias back to the version that it named before."""
    return _moved(view, await moves.roll_back(view, name, alias))


def _moved(view: View, move: Move) -> schemas.Moved:
    return schemas.Moved(**move.as_json(), serving=moves.serving(view, move.name, move.alias))


@control.get("/api/aliases")
async def list_aliases(view: View, name: Annotated[names.AdapterName | None, Query()] = None) -> schemas.Aliases:
    """Every alias: its version in the store, its version in force here, and why they differ."""
    return schemas.Aliases(aliases=[schemas.Alias(**asdict(each)) for each in await moves.list_here(view, name)])
