"""`GET /api/usage` and `GET /api/audit`: what the tenant's adapters answered, and who changed what."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from fastapi import Query

from turret import audit
from turret.server.admin import schemas
from turret.server.routes import View, router
from turret.store import usage

control = router("admin")
Day = Annotated[str | None, Query(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$", description="Such as 2026-11-27, in UTC.")]
Before = Annotated[int | None, Query(ge=1, le=1 << 31, description="The `before` of the previous page.")]


@control.get("/api/usage")
async def show_usage(view: View, since: Day = None, until: Day = None) -> schemas.UsageList:
    """Requests, answers and tokens by adapter and UTC day, of the last seconds too."""
    await view.control(view.services.usage.flush)
    found = await view.control(usage.read, view.workspace.store.database(), since, until)
    return schemas.UsageList(usage=[schemas.UsageOfDay(**each.as_json()) for each in found])


@control.get("/api/audit")
async def show_audit(
    view: View, since: Day = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100, before: Before = None
) -> schemas.AuditLog:
    """The control actions of the tenant, the newest first, in pages."""
    read = partial(_actions, view, since, before, limit + 1)
    found = await view.control(read)
    more = found[limit - 1].id if len(found) > limit else None
    return schemas.AuditLog(actions=[schemas.Action(**each.as_json()) for each in found[:limit]], before=more)


def _actions(view: View, since: str | None, before: int | None, limit: int) -> Sequence[audit.Action]:
    with view.workspace.store.database().reading() as connection:
        return audit.read(connection, since=since, below=before, limit=limit)
