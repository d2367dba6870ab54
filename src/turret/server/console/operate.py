"""The pages of who runs the server: store and traffic, access tokens, usage, the audit log, jobs and workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Annotated

from fastapi import Depends, Path, Query, Response
from fastapi.responses import JSONResponse

from turret.errors import BadRequest, Forbidden, NotFound
from turret.experiments.experiment import read_duration
from turret.server import accounts
from turret.server.auth import Caller
from turret.server.console import render, snippets
from turret.server.console.render import Form, Page, Sent, one_of, pages
from turret.server.questions import now as epoch
from turret.server.routes import View
from turret.store import Version
from turret.store.access_tokens import OPERATE, SCOPES
from turret.store.catalog import now
from turret.store.usage import Usage

router = pages()
Name = Annotated[str, Path(min_length=1, max_length=100)]
Text = Annotated[str, Query(max_length=200)]
Before = Annotated[int | None, Query(ge=1, le=1 << 31)]
Verb = Annotated[str, one_of("rotate", "revoke")]
FIRST_YEAR = 2000
DAYS = 30  # of usage, unless a page asks for others
MOST_DAYS = 3660
LINES = 6  # of the plot; the rest is one line
ACTIONS = 50  # of a page of the audit log
JOBS = 200  # that are shown


# --- tokens -----------------------------------------------------------------------------------------------------------


@router.get("/store/tokens")
async def tokens(page: Page, tenant: Text = "") -> Response:
    """The tokens of a tenant, and the form for a new one."""
    return await _tokens(page, tenant)


@router.post("/store/tokens")
async def create(page: Page, view: View, form: Sent) -> Response:
    """Make a token, and show its secret once."""
    tenant = form.text("tenant")
    made = await view.control(accounts.create, view, page.caller, _wanted_token(form), tenant or None)
    return await _tokens(page, tenant, secret=made[1], of=made[0].name)


@router.get("/store/tokens/{name}/{verb}")
async def ask(page: Page, view: View, name: Name, verb: Verb, tenant: Text = "") -> Response:
    """The dialog that confirms a change of a token."""
    known = await view.control(lambda: accounts.tokens_of(view, page.caller, tenant or None).list())
    found = next((each for each in known if each.name == name), None)
    if found is None:
        raise NotFound(f"no token {ascii(name)[:60]}")
    return page.show("token_act.html.j2", token=found, verb=verb, tenant=tenant)


@router.post("/store/tokens/{name}/{verb}")
async def act(page: Page, view: View, name: Name, verb: Verb, form: Sent) -> Response:
    """Give a token a new secret, and show it once; or revoke it."""
    tenant, caller = form.text("tenant"), page.caller
    if verb == "revoke":
        await view.control(accounts.revoke, view, caller, name, tenant or None)
        return page.redirect(f"/store/tokens?tenant={tenant}" if tenant else "/store/tokens")
    overlap = read_duration(form.text("overlap") or "1d")
    _, secret = await view.control(accounts.rotate, view, caller, name, overlap, tenant or None)
    return await _tokens(page, tenant, secret=secret, of=name)


def _wanted_token(form: Form) -> accounts.TokenRequest:
    """The token that a form asks for. The store checks it."""
    expires = form.text("expires")
    return accounts.TokenRequest.model_construct(
        name=form.text("name"),
        scopes=form.all("scope"),
        requests_per_minute=_whole(form, "requests"),
        tokens_per_minute=_whole(form, "tokens"),
        adapters=form.text("adapters").split() or ["*"],
        bases=form.text("bases").split() or ["*"],
        lifetime=read_duration(expires) if expires else None,
        sign_in=bool(form.text("sign_in")),
    )


def _whole(form: Form, field: str) -> int | None:
    text = form.text(field)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise BadRequest(f"{field} a minute {ascii(text)[:40]}: expected a whole number, or nothing for no quota")
    return int(text)


async def _tokens(page: Page, tenant: str, *, secret: str | None = None, of: str = "") -> Response:
    found = await page.view.control(lambda: accounts.tokens_of(page.view, page.caller, tenant or None).list())
    at = now()
    scopes = [each for each in SCOPES if each != OPERATE or accounts.may_operate(page.view, page.caller)]
    shown = [(each, "revoked" if each.revoked else "valid" if each.lives(at) else "expired") for each in found]
    values: render.Context = {
        "shown": sorted(shown, key=lambda each: (each[1] != "valid", each[0].name)),
        "tenants": await page.view.control(accounts.tenants, page.view, page.caller),
        "tenant": tenant or page.view.access.tenant,
        "scopes": scopes,
        "secret": secret,
        "of": of,
        "own": page.caller.name,
    }
    return page.show("tokens.html.j2", **values)


# --- usage ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a page of usage shows."""

    since: str
    until: str
    tenant: str  # empty for all that may be seen
    adapter: str  # empty for all
    by: str  # a field of `Usage`
    count: str  # a key of `COUNTS`


COUNTS = {"requests": "requests", "answers": "answers", "tokens": "tokens, read and generated"}
FIELDS = ("adapter", "tenant")


def _usage_query(
    since: Text = "",
    until: Text = "",
    tenant: Text = "",
    adapter: Text = "",
    by: Text = "adapter",
    count: Text = "requests",
) -> Asked:
    today = datetime.now(UTC).date()
    last = accounts.read_day(until, FIRST_YEAR) if until else today
    first = accounts.read_day(since, FIRST_YEAR) if since else last - timedelta(days=DAYS - 1)
    if not 0 <= (last - first).days < MOST_DAYS:
        raise BadRequest(f"{first} to {last}: expected at most {MOST_DAYS} days, the first one first")
    if by not in FIELDS or count not in COUNTS:
        raise BadRequest(f"usage by {ascii(by)[:40]}: expected one of {', '.join(FIELDS)}, in {', '.join(COUNTS)}")
    return Asked(first.isoformat(), last.isoformat(), tenant, adapter, by, count)


Question = Annotated[Asked, Depends(_usage_query)]


@router.get("/store/usage")
async def usage(page: Page, view: View, asked: Question) -> Response:
    """What was answered: a plot by day, and the sums."""
    found = await view.control(_read_usage, view, page.caller, asked)
    values: render.Context = {
        "asked": asked,
        "rows": _sums(found, asked.by),
        "total": _sums(found, None),
        "counts": COUNTS,
        "tenants": await view.control(accounts.tenants, view, page.caller),
        "query": page.request.url.query,
    }
    return page.show("usage.html.j2", **values)


@router.get("/store/usage/days")
async def days(page: Page, view: View, asked: Question) -> JSONResponse:
    """The usage of each day, for the plot: the busiest lines, and one of the rest."""
    found = await view.control(_read_usage, view, page.caller, asked)
    first = date.fromisoformat(asked.since)
    count = (date.fromisoformat(asked.until) - first).days + 1
    names = [(first + timedelta(days=each)).isoformat() for each in range(count)]
    totals = Counter[str]()
    for each in found:
        totals[getattr(each, asked.by)] += _amount(each, asked.count)
    busiest = [name for name, _ in totals.most_common(LINES)]
    lines = {name: Counter[str]() for name in (*busiest, *(["others"] if len(totals) > LINES else []))}
    for each in found:
        name = getattr(each, asked.by)
        lines[name if name in busiest else "others"][each.day] += _amount(each, asked.count)
    shown = {name or "the bare base": [line[day] for day in names] for name, line in lines.items()}
    return JSONResponse({"days": names, "unit": COUNTS[asked.count], "lines": shown})


def _read_usage(view: View, caller: Caller, asked: Asked) -> Sequence[Usage]:
    tenants = [asked.tenant] if asked.tenant else accounts.tenants(view, caller)
    rows = accounts.read_usage(view, caller, tenants, asked.since, asked.until)
    return [each for each in rows if not asked.adapter or each.adapter == asked.adapter]


def _amount(row: Usage, unit: str) -> int:
    return row.prompt_tokens + row.completion_tokens if unit == "tokens" else int(getattr(row, unit))


def _sums(rows: Sequence[Usage], by: str | None) -> Sequence[render.Context]:
    """The sums by a field, the most requests first; None: of all rows."""
    found: dict[str, Counter[str]] = {}
    for each in rows:
        counts = found.setdefault("all" if by is None else getattr(each, by), Counter())
        for key in ("requests", "answers", "prompt_tokens", "completion_tokens"):
            counts[key] += getattr(each, key)
    busiest = sorted(found.items(), key=lambda each: -each[1]["requests"])
    return [{"name": name, **counts} for name, counts in busiest]


# --- audit ------------------------------------------------------------------------------------------------------------


@router.get("/store/audit")
async def audit(
    page: Page,
    view: View,
    since: Text = "",
    who: Text = "",
    verb: Text = "",
    what: Text = "",
    tenant: Text = "",
    before: Before = None,
) -> Response:
    """Who changed what, the newest first."""
    filters = {
        "who": who,
        "verb": verb,
        "what": what,
        "since": since and accounts.read_day(since, FIRST_YEAR).isoformat(),
    }
    only, caller = {key: value for key, value in filters.items() if value}, page.caller
    found, more = await view.control(accounts.audit_page, view, caller, ACTIONS, before, tenant or None, **only)
    given = only | ({"tenant": tenant} if tenant else {})
    tenants, shown = await view.control(accounts.tenants, view, caller), filters | {"tenant": tenant}
    return page.show("audit.html.j2", found=found, filters=shown, given=given, more=more, tenants=tenants)


# --- jobs -------------------------------------------------------------------------------------------------------------


@router.get("/store/jobs")
async def jobs(page: Page, view: View) -> Response:
    """What waits and what runs, and who does it."""
    found = await view.control(view.workspace.queue.open_jobs, JOBS)
    workers = Counter(each.host for each in found if each.host)
    return page.show("jobs.html.j2", found=found, workers=workers, most=JOBS)


# --- the store and its traffic ----------------------------------------------------------------------------------------
# The page of the store and of this server's traffic.


@router.get("/store")
async def show_store(page: Page, view: View) -> Response:
    """The contents of the store, and the traffic."""
    versions = await view.control(view.workspace.list)
    where = str(view.workspace.store) if view.access.operates else f"tenant {view.access.tenant}"
    runs, problems = await view.control(view.workspace.runs), await view.control(view.workspace.store.problems)
    stored = {"where": where, "versions": versions, "runs": len(runs), "problems": problems}
    values = await view.control(_traffic, view)
    return page.show("store.html.j2", stored=stored, example=_example(page, versions), **values)


@router.get("/store/traffic")
async def traffic(page: Page, view: View) -> Response:
    """The live part: the traffic of each version, and the engine's own figures."""
    versions = await view.control(view.workspace.list)
    values = await view.control(_traffic, view)
    return page.show("traffic.html.j2", example=_example(page, versions), **values)


@router.post("/store/verify")
async def verify_store(page: Page, view: View) -> Response:
    """Hash and open all files again."""
    found = await view.control(view.workspace.verify)
    return page.show("verified.html.j2", found=found, what="the store")


@router.post("/store/gc")
async def leftovers(page: Page, view: View) -> Response:
    """List what a gc would remove from the whole store. It removes nothing."""
    if not view.access.operates:
        raise Forbidden("the files of a store belong to all its tenants: an admin of the tenant default may list them")
    found = await view.control(view.workspace.gc, dry_run=True)
    return page.show("leftovers.html.j2", found=found)


def _example(page: Page, versions: Sequence[Version]) -> str:
    """A request to a version of this server, as a shell takes it."""
    here = [each for each in versions if page.view.engines.is_on_base(each)]
    chosen = next((each for each in here if each.aliases or each.comparison is None), here[0] if here else None)
    if chosen is None:
        return snippets.curl(page.request, page.view, snippets.question(page.view.engines.bases[0].name, {}))
    plain = page.view.aliases.version_of(chosen.name, None) == chosen.number
    asked = snippets.question(chosen.name if plain else str(chosen), chosen.task)
    return snippets.curl(page.request, page.view, asked)


def _traffic(view: View) -> render.Context:
    return {
        "traffic": view.metrics.traffic(view.engines.sees),
        "engines": {name: asdict(each) for name, each in view.engines.stats().items()} if view.access.operates else {},
        "memory": [asdict(each) for each in view.engines.loaded_adapters()],
        "in_flight": max(0, view.in_flight - 1),  # without this page's own request
        "failed_moves": view.aliases.failed_moves,
        "since": epoch() - view.services.started_at,
    }
