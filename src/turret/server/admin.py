"""The control plane under `/api/`: adapters in the store and in memory, aliases, verify. Decode, call, encode."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

from fastapi import Path, Query

from turret.errors import BadReference, BadRequest, ReplayNeeded
from turret.reference import Reference as Parsed
from turret.server import golden_replay
from turret.server.admin_schemas import (
    Adapter,
    AdapterName,
    Adapters,
    Alias,
    Aliases,
    AliasName,
    LoadedList,
    LoadRequest,
    Moved,
    PromoteRequest,
    Reference,
    Status,
    Version,
)
from turret.server.error_responses import without_paths
from turret.server.routes import Here, router
from turret.server.state import ServerState, said
from turret.store import Gate, Move
from turret.store.catalog import plain

control = router("admin")
Ref = Annotated[Reference, Path(description="name, name@3 or name@production")]
After = Annotated[Reference | None, Query(description="The last version of the page before.")]


@control.get("/api/status")
async def status(here: Here) -> Status:
    """The base, and what is at work now."""
    return Status(
        base={"id": here.base_id, "fingerprint": here.engine.base.fingerprint},
        ready=here.ready,
        draining=here.load.draining,
        in_flight=here.load.requests,
        engine=plain(said(here.engine.stats())),
    )


@control.get("/api/adapters")
async def list_adapters(
    here: Here,
    name: Annotated[AdapterName | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: After = None,
) -> Adapters:
    """The versions in the store by name and number, a page at a time."""
    versions = await here.control(here.workspace.list, name)
    if after is not None:
        mark = Parsed.parse(after)
        versions = [each for each in versions if (each.name, each.number) > (mark.name, mark.version or 0)]
    page, digests = versions[:limit], {each.digest for each in here.engine.loaded()}
    more = str(page[-1]) if len(versions) > limit else None
    found = [Adapter(**each.as_json(), loaded=each.digest in digests) for each in page]
    return Adapters(adapters=found, after=more)


@control.get("/api/adapters/{reference}")
async def show_adapter(reference: Ref, here: Here) -> dict[str, Any]:
    """All that is known of one version, as `turret show --json`, and whether it is in memory."""
    shown = await here.control(here.workspace.show, reference)
    if shown["run"] is not None:
        shown["run"] = {key: value for key, value in shown["run"].items() if key in ("id", "name", "state", "created")}
    return {**shown, "loaded": here.in_memory(shown["digest"])}


@control.get("/api/loaded")
async def list_loaded(here: Here) -> LoadedList:
    """The versions in memory."""
    return LoadedList(loaded=[plain(said(each)) for each in here.engine.loaded()])


@control.post("/api/adapters/{reference}/load")
async def load(reference: Ref, here: Here, body: LoadRequest | None = None) -> Version:
    """Load a version now; with `pin` it stays."""
    pin = body is not None and body.pin
    return version(await here.control(here.engine.warm, here.follow.exact(reference), pin=pin))


@control.post("/api/adapters/{reference}/unload")
async def unload(reference: Ref, here: Here) -> Version:
    """Take a version out of memory, where no request needs it now; the next one loads it again."""
    return await _by_name(here, reference, here.engine.unload)


@control.post("/api/adapters/{reference}/pin")
async def pin(reference: Ref, here: Here) -> Version:
    """Load a version now and keep it whatever else is loaded."""
    return version(await here.control(here.engine.warm, here.follow.exact(reference), pin=True))


@control.post("/api/adapters/{reference}/unpin")
async def unpin(reference: Ref, here: Here) -> Version:
    """Let a version go when its place is needed."""
    return await _by_name(here, reference, here.engine.unpin)


def version(named: Any) -> Version:
    return Version(version=str(named), digest=named.digest)


async def _by_name(here: ServerState, reference: str, verb: Any) -> Version:
    exact = await here.control(here.workspace.resolve, here.follow.exact(reference))
    await here.control(verb, str(exact))
    return version(exact)


@control.post("/api/adapters/{reference}/verify")
async def verify(reference: Ref, here: Here) -> dict[str, Any]:
    """Hash and open all of one version again."""
    return (await here.control(here.workspace.verify, reference)).as_json()


@control.post("/api/adapters/{reference}/promote")
async def promote(reference: Ref, body: PromoteRequest, here: Here) -> Moved:
    """Move an alias to a version: loaded first, so that no request waits, and not moved where it cannot be."""
    check_gates(body.require)
    exact = str(await here.control(here.workspace.resolve, reference))
    if body.alias == here.settings.alias or here.follow.means(exact.partition("@")[0], body.alias):
        await here.control(here.engine.warm, exact)
    return await _moved(here, await _promoted(here, exact, body))


async def _promoted(here: ServerState, exact: str, body: PromoteRequest) -> Move:
    """At once where every golden example was asked before; else aside, for it may take minutes."""
    if not body.replay:
        with suppress(ReplayNeeded):
            return await here.control(here.workspace.store.promote, exact, body.alias, require=body.require)
    asked = {"require": body.require, "replay": body.replay, "ask": partial(golden_replay.answers, here)}
    return await here.aside(here.workspace.promote, exact, body.alias, **asked)


def check_gates(texts: Sequence[str]) -> None:
    """Raises BadRequest: a gate that cannot be read is the request's fault, not a name that is not there."""
    try:
        for text in texts:
            Gate.parse(text)
    except BadReference as error:
        raise BadRequest(str(error)) from None


@control.post("/api/aliases/{name}/{alias}/rollback")
async def rollback(name: Annotated[AdapterName, Path()], alias: Annotated[AliasName, Path()], here: Here) -> Moved:
    """Move an alias back to what it named before."""
    return await _moved(here, await here.control(here.workspace.rollback, name, alias))


async def _moved(here: ServerState, move: Move) -> Moved:
    await here.control(here.look)
    return Moved(**move.as_json(), serving=_serving(here, move.name, move.alias))


@control.get("/api/aliases")
async def list_aliases(here: Here, name: Annotated[AdapterName | None, Query()] = None) -> Aliases:
    """Every alias: what the store says, what is in force here, and why where they differ."""
    _, found = await here.control(here.workspace.store.pointing)
    return Aliases(
        aliases=[
            Alias(
                name=each.name,
                alias=each.alias,
                version=f"{each.name}@{each.number}",
                serving=_serving(here, each.name, each.alias),
                problem=_problem(here, each.name, each.alias),
                moved=each.moved,
            )
            for each in found
            if name in (None, each.name)
        ]
    )


def _serving(here: ServerState, name: str, alias: str) -> str | None:
    number = here.follow.means(name, alias)
    return None if number is None else f"{name}@{number}"


def _problem(here: ServerState, name: str, alias: str) -> str | None:
    trouble = here.follow.trouble.get((name, alias))
    return None if trouble is None else without_paths(f"{trouble.version}: {trouble.problem}")
