"""`GET /v1/models`: the base, and every adapter on it by name and by alias. Decode, call, encode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from typing import Annotated

from fastapi import Path

from turret.errors import NotFound
from turret.server.routes import Here, router
from turret.server.schemas import ModelCard, ModelList
from turret.server.state import ServerState
from turret.store import Version
from turret.store.catalog import PRODUCTION

questions = router("infer")


@questions.get("/v1/models")
async def list_models(here: Here) -> ModelList:
    """The base, and every adapter on it: by name, and by each of its aliases."""
    versions = await here.control(here.workspace.list)
    return ModelList(data=[_base(here), *_adapters(here, versions)])


@questions.get("/v1/models/{model:path}")
async def show_model(model: Annotated[str, Path(min_length=1, max_length=200)], here: Here) -> ModelCard:
    """One of them, or any version of an adapter."""
    if model == here.base_id:
        return _base(here)
    version = await here.control(here.workspace.resolve, here.follow.exact(model))
    if fingerprint(version) != here.engine.base.fingerprint:
        raise NotFound(f"no {model} here: it was trained on another base than this server's")
    return _card(here, model, version)


def fingerprint(version: Version) -> str | None:
    """Of the base that the version was trained on."""
    found = (version.manifest.get("base") or {}).get("fingerprint")
    return None if found is None else str(found)


def _base(here: ServerState) -> ModelCard:
    return ModelCard(id=here.base_id, created=here.began, root=here.base_id, parent=None)


def _adapters(here: ServerState, versions: Sequence[Version]) -> Iterator[ModelCard]:
    for name, several in groupby(versions, key=lambda each: each.name):  # they come by name and number
        numbered = {each.number: each for each in several}
        aliases = sorted(alias for each in numbered.values() for alias in each.aliases)
        meant = {f"{name}@{alias}": here.follow.means(name, alias) for alias in aliases}
        spoken = next((each for each in (here.follow.alias, PRODUCTION) if each in aliases), None)
        plain = max(numbered) if spoken is None else meant[f"{name}@{spoken}"]
        for model, number in {name: plain, **meant}.items():
            version = numbered.get(number or 0)
            if version is not None and fingerprint(version) == here.engine.base.fingerprint:
                yield _card(here, model, version)


def _card(here: ServerState, model: str, version: Version) -> ModelCard:
    created = int(datetime.fromisoformat(version.created).timestamp())
    task = (version.manifest.get("task") or {}).get("kind")
    return ModelCard(id=model, created=created, root=str(version), parent=here.base_id, task=task)
