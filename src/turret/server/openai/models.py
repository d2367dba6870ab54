"""`GET /v1/models`: the bases, and every adapter on them by name and by alias, in OpenAI's format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from typing import Annotated, Literal

from fastapi import Path
from pydantic import BaseModel, Field

from turret.errors import NotFound
from turret.server.routes import View, router
from turret.store import Version
from turret.store.catalog import PRODUCTION

questions = router("infer")


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["turret"] = "turret"
    root: str = Field(description="The version that the id means here now, or the base.")
    parent: str | None = Field(description="The base of an adapter.")
    task: str | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


@questions.get("/v1/models")
async def list_models(view: View) -> ModelList:
    """The base, and every adapter on it: by name, and by each of its aliases."""
    versions = await view.control(view.workspace.list)
    bases = [_base(view, each.name) for each in view.engines.askable]
    return ModelList(data=[*bases, *_adapters(view, versions)])


@questions.get("/v1/models/{model:path}")
async def show_model(model: Annotated[str, Path(min_length=1, max_length=200)], view: View) -> ModelCard:
    """The base, or one version of an adapter."""
    if view.engines.is_base(model):
        return _base(view, model)
    return _gpu(view, model, await view.control(version_here, view, model))


def version_here(view: View, model: str) -> Version:
    """The version on a base of this server that a reference means here. Reads the store. Raises NotFound."""
    try:
        found = view.workspace.resolve(view.aliases.exact(model))
    except NotFound as error:
        raise view.missing_model(model, error) from None
    if not view.engines.is_on_base(found):
        raise NotFound(f"no {model} here: it was trained on another base than this server's")
    return found


def _base(view: View, name: str) -> ModelCard:
    return ModelCard(id=name, created=view.services.started_at, root=name, parent=None)


def _adapters(view: View, versions: Sequence[Version]) -> Iterator[ModelCard]:
    for name, group in groupby(versions, key=lambda version: version.name):  # `list` sorts by name and number
        by_number = {version.number: version for version in group}
        aliases = sorted(alias for version in by_number.values() for alias in version.aliases)
        meanings = {f"{name}@{alias}": view.aliases.version_of(name, alias) for alias in aliases}
        default = next((alias for alias in (view.aliases.alias, PRODUCTION) if alias in aliases), None)
        own = max((number for number, each in by_number.items() if each.comparison is None), default=None)
        plain = own if default is None else meanings[f"{name}@{default}"]
        for model, number in {name: plain, **meanings}.items():
            version = by_number.get(number or 0)
            if version is not None and view.engines.is_on_base(version):
                yield _gpu(view, model, version)


def _gpu(view: View, model: str, version: Version) -> ModelCard:
    created = int(datetime.fromisoformat(version.created).timestamp())
    task, base = version.task.get("kind"), view.engines.base_of_version(version)
    parent = None if base is None else base.name
    return ModelCard(id=model, created=created, root=str(version), parent=parent, task=task)
