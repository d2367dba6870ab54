"""Access tokens, usage and the audit log, as a caller may see them. No token makes one that may do more than itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import date
from typing import Annotated

from pydantic import Field

from turret import audit
from turret.access import ADAPTERS, BASES, MOST_PATTERNS, Access, check_tenant
from turret.errors import BadRequest, Forbidden, NotFound
from turret.server.auth import Caller
from turret.server.error_responses import as_bad_request
from turret.server.limits import Quota
from turret.server.routes import WHOLE, Model
from turret.server.services import View
from turret.store import AccessToken, usage
from turret.store.access_tokens import LONGEST, NAME, OPERATE, SCOPES, AccessTokens, Scope
from turret.timestamp import timestamp
from turret.workspace.core import Workspace

PerMinute = Annotated[int | None, Field(ge=1, le=1 << 31), WHOLE]
AdapterPattern = Annotated[str, Field(pattern=f"^({ADAPTERS.pattern})$")]
BasePattern = Annotated[str, Field(pattern=f"^({BASES.pattern})$")]


class TokenRequest(Model):
    """As in `turret token create NAME`."""

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=len(SCOPES))] = Field(["infer"])
    requests_per_minute: PerMinute = None
    tokens_per_minute: PerMinute = None
    adapters: Annotated[list[AdapterPattern], Field(min_length=1, max_length=MOST_PATTERNS)] = Field(
        ["*"], description="Names, or patterns such as legal-*."
    )
    bases: Annotated[list[BasePattern], Field(min_length=1, max_length=MOST_PATTERNS)] = Field(
        ["*"], description="Ids of bases, or patterns."
    )
    lifetime: Annotated[float | None, Field(ge=1, le=LONGEST)] = Field(None, description="Seconds; null for no end.")
    sign_in: bool = Field(True, description="Whether a person may sign in to the console by it.")


def may_operate(view: View, caller: Caller) -> bool:
    """Whether the caller may see and change the tokens of other tenants."""
    return view.access.operates and OPERATE in caller.scopes


def tenants(view: View, caller: Caller) -> Sequence[str]:
    """The tenants whose tokens, usage and audit log the caller may see."""
    own = view.access.tenant
    return sorted({own, *view.workspace.store.tenants()}) if may_operate(view, caller) else [own]


def tokens_of(view: View, caller: Caller, tenant: str | None = None) -> AccessTokens:
    """The tokens of a tenant; None: of the caller's own.

    Raises:
        Forbidden: the caller's own token is limited to some adapters or bases.
        NotFound: it is another tenant, and the caller's token has not the scope operate.
    """
    if not view.access.whole:
        raise Forbidden("this token is limited to some adapters or bases, so it manages no tokens: use one that is not")
    return workspace_of(view, caller, tenant).tokens


def workspace_of(view: View, caller: Caller, tenant: str | None) -> Workspace:
    """The workspace as a tenant sees it; None: as the caller does. Raises NotFound unless the caller may see it."""
    if tenant is None or tenant == view.access.tenant:
        return view.workspace
    if not may_operate(view, caller):
        raise NotFound(f"no tenant {ascii(tenant)[:60]}: expected {view.access.tenant}")
    return view.workspace.with_access(Access(check_tenant(tenant)))


def create(view: View, caller: Caller, wanted: TokenRequest, tenant: str | None = None) -> tuple[AccessToken, str]:
    """Make a token. Returns it, and its secret, which cannot be shown again."""
    lifetime = wanted.lifetime
    known = tokens_of(view, caller, tenant)
    _require_no_quota(view, caller)
    _require_scopes(caller, wanted.scopes)
    if caller.expires is not None and (
        lifetime is None or lifetime > LONGEST or timestamp(time.time() + lifetime) > caller.expires
    ):
        raise Forbidden(f"this token ends at {caller.expires}, so it makes none that lives longer: set an earlier end")
    with as_bad_request():
        made = known.create(**dict(wanted))
    view.services.read_tokens()
    return made


def rotate(view: View, caller: Caller, name: str, overlap: float, tenant: str | None = None) -> tuple[AccessToken, str]:
    """Give a token a new secret. Returns the token, and the secret."""
    known = tokens_of(view, caller, tenant)
    _require_no_quota(view, caller)
    found = [each for each in known.list() if each.name == name]
    _require_scopes(caller, [scope for each in found for scope in each.scopes])
    if caller.expires is not None and any(each.expires is None or each.expires > caller.expires for each in found):
        raise Forbidden(f"this token ends at {caller.expires}, and {name} later: use one that lives as long")
    with as_bad_request():
        made = known.rotate(name, overlap)
    view.services.read_tokens()
    return made


def revoke(view: View, caller: Caller, name: str, tenant: str | None = None) -> AccessToken:
    """Revoke a token."""
    revoked = tokens_of(view, caller, tenant).revoke(name)
    view.services.read_tokens()
    return revoked


def _require_no_quota(view: View, caller: Caller) -> None:
    """Each token has a quota of its own, so a caller with one could get around it."""
    if caller.quota != Quota() and not may_operate(view, caller):
        raise Forbidden(
            "this token has a quota, so it makes no secrets: use one without, or ask who operates the server"
        )


def _require_scopes(caller: Caller, scopes: Sequence[str]) -> None:
    if OPERATE in scopes and OPERATE not in caller.scopes:
        raise Forbidden(f"this token has not the scope {OPERATE}, so it gives it to none: use one that has")


def read_usage(
    view: View, caller: Caller, tenants: Sequence[str | None], since: str | None, until: str | None
) -> Sequence[usage.Usage]:
    """The usage of tenants by adapter and day, of the last seconds too; None: of the caller's own.

    Raises:
        BadRequest: `since` or `until` is no day.
    """
    for day in filter(None, (since, until)):
        read_day(day)
    databases = [workspace_of(view, caller, each).store.database(make=True) for each in tenants]
    view.services.usage.flush()
    return [row for each in databases for row in usage.read_usage(each, since, until)]


def audit_page(
    view: View, caller: Caller, limit: int, before: int | None, tenant: str | None, **filters: str | None
) -> tuple[Sequence[audit.Action], int | None]:
    """A page of the audit log of a tenant, and the `before` of the next one if there is one.

    Args:
        filters: since, who, verb and what, of `turret.audit.read_actions`.

    Raises:
        BadRequest: `since` is no day, or a filter has a NUL character.
    """
    if day := filters.get("since"):
        read_day(day)
    for field, part in filters.items():
        if part is not None and "\0" in part:
            raise BadRequest(f"{field} {ascii(part)[:40]}: a NUL character is in no action")
    with workspace_of(view, caller, tenant).store.database(make=True).reading() as connection:
        found = audit.read_actions(connection, below=before, limit=limit + 1, **filters)
    return found[:limit], found[limit - 1].id if len(found) > limit else None


def read_day(text: str, first_year: int = 1) -> date:
    """The day that a filter names. Raises BadRequest for one that no calendar has, or of a year before `first_year`."""
    try:
        found = date.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.year < first_year:
        raise BadRequest(f"day {ascii(text)[:40]}: expected year, month and day, such as 2026-11-27")
    return found
