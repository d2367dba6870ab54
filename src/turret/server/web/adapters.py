"""Adapters: the list, one name with its versions and aliases, one version, and the two moves of an alias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any

from fastapi import Path, Request, Response
from fastapi.responses import RedirectResponse

from turret.errors import BadReference, BadRequest, NotFound
from turret.reference import check_alias
from turret.server import admin
from turret.server.admin_schemas import PromoteRequest
from turret.server.routes import Here
from turret.server.state import ServerState
from turret.server.web import render
from turret.server.web.forms import Sent, pages
from turret.store import Version
from turret.store.catalog import PRODUCTION

router = pages()
Name = Annotated[str, Path(min_length=1, max_length=200)]
Number = Annotated[int, Path(ge=1, lt=1 << 53)]
USUAL = (PRODUCTION, "candidate")


@router.get("/adapters")
async def listing(request: Request, here: Here) -> Response:
    """Every name, with what is in use of it."""
    versions = await here.control(here.workspace.list)
    names = [_summary(here, name, list(some)) for name, some in groupby(versions, key=lambda each: each.name)]
    return render.page(request, here, "adapters.html.j2", names=names, store=str(here.workspace.store))


@router.get("/adapters/{name}")
async def show(request: Request, here: Here, name: Name, moved: str | None = None) -> Response:
    """One name: versions, where the aliases point, how they got there, what they ask."""
    values = await _known(here, name)
    done = next((each for each in values["aliases"] if each.alias == moved), None)
    return render.page(request, here, "adapter.html.j2", **values, moved=done)


@router.get("/adapters/{name}/{number}")
async def version(request: Request, here: Here, name: Name, number: Number) -> Response:
    """All that is known of one version."""
    shown = await here.control(here.workspace.show, f"{name}@{number}")
    known = {each.digest: each for each in await here.control(here.workspace.list)}
    values = {"name": name, "number": number, "shown": shown, "loaded": here.in_memory(shown["digest"])}
    return render.page(request, here, "version.html.j2", **values, parent=_parent(shown["manifest"], known))


@router.get("/adapters/{name}/move/{verb}")
async def ask(
    request: Request, here: Here, name: Name, verb: str, alias: str = PRODUCTION, version: int | None = None
) -> Response:
    """What a move would do, and the button that does it."""
    if verb not in ("promote", "rollback"):
        raise NotFound(f"no move {ascii(verb)[:40]}: expected promote or rollback")
    values = await _known(here, name)
    values |= {"verb": verb, "alias": _alias(alias), "aliases_said": _offered(values["aliases"], alias)}
    values["chosen"] = next((each for each in values["versions"] if each.number == version), values["versions"][0])
    return render.page(request, here, "move.html.j2", **values)


@router.post("/adapters/{name}/move/promote")
async def promote(request: Request, here: Here, name: Name, form: Sent) -> Response:
    """Move an alias to a version, past its gates; a refusal is told in the page."""
    number, alias = form.text("version"), _alias(form.text("alias"))
    if not number.isdecimal():
        raise BadRequest(f"version {ascii(number)[:40]}: expected a number")
    await admin.promote(f"{name}@{int(number)}", PromoteRequest(alias=alias, replay=False), here)
    return gone(request, f"/adapters/{name}?moved={alias}")


@router.post("/adapters/{name}/move/rollback")
async def rollback(request: Request, here: Here, name: Name, form: Sent) -> Response:
    """Move an alias back to what it named before."""
    alias = _alias(form.text("alias"))
    await admin.rollback(name, alias, here)
    return gone(request, f"/adapters/{name}?moved={alias}")


@router.post("/adapters/{name}/{number}/verify")
async def verify(request: Request, here: Here, name: Name, number: Number) -> Response:
    """Hash and open all of a version again."""
    found = await here.control(here.workspace.verify, f"{name}@{number}")
    return render.page(request, here, "verified.html.j2", found=found, what=f"{name}@{number}")


def gone(request: Request, where: str) -> Response:
    """On to another page, whoever asked."""
    return Response(headers={"hx-redirect": where}) if render.live(request) else RedirectResponse(where, 303)


async def _known(here: ServerState, name: str) -> dict[str, Any]:
    versions = await here.control(here.workspace.list)
    ours = [each for each in versions if each.name == name]
    if not ours:
        await here.control(here.workspace.resolve, name)  # says which names there are
    shown = await here.control(here.workspace.show, str(ours[-1]))
    known = {each.digest: each for each in versions}
    return {
        "name": name,
        "versions": ours[::-1],
        "aliases": (await admin.list_aliases(here, name)).aliases,
        "gates": await here.control(here.workspace.gate, name),
        "history": shown["alias_history"][::-1],
        "parents": {each.number: _parent(each.manifest, known) for each in ours},
        "loaded": {each.number for each in ours if here.in_memory(each.digest)},
    }


def _parent(manifest: Mapping[str, Any], known: Mapping[str, Version]) -> Version | str | None:
    """The version that it went on from, or its digest where it is not in the store any more."""
    lineage = manifest.get("lineage")
    parent = lineage.get("parent") if isinstance(lineage, Mapping) else None
    return None if not parent else known.get(str(parent), str(parent))


def _summary(here: ServerState, name: str, versions: Sequence[Version]) -> dict[str, Any]:
    used = next((each for each in versions if PRODUCTION in each.aliases), None)
    return {
        "name": name,
        "used": used,
        "newest": versions[-1],
        "shown": used or versions[-1],
        "count": len(versions),
        "bytes": sum(each.bytes for each in versions),
        "aliases": [(alias, each.number) for each in versions for alias in each.aliases],
        "loaded": sum(here.in_memory(each.digest) for each in versions),
    }


def _offered(aliases: Sequence[Any], also: str) -> list[str]:
    return list(dict.fromkeys([*USUAL, also, *(each.alias for each in aliases)]))


def _alias(text: str) -> str:
    try:
        return check_alias(text)
    except BadReference as error:
        raise BadRequest(str(error)) from None
