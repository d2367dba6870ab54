"""Who uses the server under `/api/`: access tokens, usage by adapter and day, the audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request
from pydantic import BaseModel, Field

from turret.audit import Action
from turret.server import accounts
from turret.server.routes import WHOLE, Model, View, router
from turret.store import AccessToken
from turret.store.access_tokens import LONGEST, OVERLAP
from turret.store.jobs import OpenJob
from turret.store.usage import Usage

control = router("admin")
Day = Annotated[
    str | None,
    Query(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$",
        description="Such as 2026-11-27, in UTC.",
        json_schema_extra={"format": "date"},
    ),
]
Before = Annotated[int | None, Query(ge=1, le=1 << 31, description="The `before` of the previous page.")]
TENANT = "Another tenant, for a token with the scope operate."
Tenant = Annotated[str | None, Query(max_length=63, description=TENANT)]
NO_NUL = {"pattern": r"^[^\x00]*$"}  # what `accounts.audit_page` checks
PART = Query(min_length=1, max_length=200, description="Only actions with this in it.", json_schema_extra=NO_NUL)
Part = Annotated[str | None, PART]
TokenName = Annotated[str, Path(min_length=1, max_length=100, description="The name of a token.")]


class UsageList(BaseModel):
    usage: list[Usage]


class AuditLog(BaseModel):
    actions: list[Action]
    before: int | None = Field(description="The `before` of the next page; null on the last one.")


# --- tokens -----------------------------------------------------------------------------------------------------------


class RotateRequest(Model):
    """As in `turret token rotate NAME`."""

    overlap: Annotated[int, Field(ge=0, le=int(LONGEST)), WHOLE] = Field(
        int(OVERLAP), description="Seconds for which the secret so far stays valid."
    )


class Token(BaseModel):
    """A token, without its secret."""

    name: str
    tenant: str
    scopes: list[str]
    adapters: list[str]
    bases: list[str]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created: str
    expires: str | None
    revoked: str | None
    former_until: str | None = Field(description="Until when the secret before the last rotation is valid.")
    sign_in: bool


class Secret(Token):
    """A token with its secret, which is shown once."""

    token: str


class TokenList(BaseModel):
    tokens: list[Token]


class TenantList(BaseModel):
    tenants: list[str]


@control.get("/api/tenants")
async def list_tenants(view: View, request: Request) -> TenantList:
    """The tenants with a token or an adapter; without the scope operate, the own one alone."""
    return TenantList(tenants=list(await view.control(accounts.tenants, view, request.state.caller)))


@control.get("/api/tokens")
async def list_tokens(view: View, request: Request, tenant: Tenant = None) -> TokenList:
    """The tokens of the tenant, without their secrets; revoked ones too."""
    found = await view.control(lambda: accounts.tokens_of(view, request.state.caller, tenant).list())
    return TokenList(tokens=[Token(**each.as_json()) for each in found])


@control.post("/api/tokens")
async def create_token(body: accounts.TokenRequest, view: View, request: Request, tenant: Tenant = None) -> Secret:
    """Make a token. The answer has its secret, which the store does not keep."""
    return _secret(*await view.control(accounts.create, view, request.state.caller, body, tenant))


@control.post("/api/tokens/{name}/rotate")
async def rotate_token(
    name: TokenName, body: RotateRequest, view: View, request: Request, tenant: Tenant = None
) -> Secret:
    """Give a token a new secret. The one so far stays valid for the overlap."""
    return _secret(*await view.control(accounts.rotate, view, request.state.caller, name, body.overlap, tenant))


@control.delete("/api/tokens/{name}")
async def revoke_token(name: TokenName, view: View, request: Request, tenant: Tenant = None) -> Token:
    """Revoke a token. All servers of the store refuse it within a second, and its name stays taken."""
    return Token(**(await view.control(accounts.revoke, view, request.state.caller, name, tenant)).as_json())


def _secret(token: AccessToken, secret: str) -> Secret:
    return Secret(**token.as_json(), token=secret)


# --- usage, audit -----------------------------------------------------------------------------------------------------


@control.get("/api/usage")
async def show_usage(
    view: View, request: Request, since: Day = None, until: Day = None, tenant: Tenant = None
) -> UsageList:
    """Requests, answers and tokens by adapter and UTC day, of the last seconds too."""
    found = await view.control(accounts.read_usage, view, request.state.caller, [tenant], since, until)
    return UsageList(usage=list(found))


@control.get("/api/audit")
async def show_audit(
    view: View,
    request: Request,
    since: Day = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Before = None,
    who: Part = None,
    verb: Part = None,
    what: Part = None,
    tenant: Tenant = None,
) -> AuditLog:
    """The control actions of the tenant, the newest first, in pages."""
    filters = {"since": since, "who": who, "verb": verb, "what": what}
    found, more = await view.control(accounts.audit_page, view, request.state.caller, limit, before, tenant, **filters)
    return AuditLog(actions=list(found), before=more)


# --- jobs -------------------------------------------------------------------------------------------------------------


class OpenJobs(BaseModel):
    jobs: list[OpenJob] = Field(
        description="Those that run, then those that wait. `kind` is training, study (a comparison or a sweep), cell "
        "(of one) or batch (of requests); `name` is the adapter that it is for."
    )


@control.get("/api/jobs")
async def list_jobs(view: View, limit: Annotated[int, Query(ge=1, le=1000)] = 200) -> OpenJobs:
    """What waits and what runs: trainings, comparisons and sweeps with their cells, and batches of the tenant."""
    return OpenJobs(jobs=list(await view.control(view.workspace.queue.open_jobs, limit)))
