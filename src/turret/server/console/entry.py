"""`/`, signing in and out, and the static files of the pages."""

from __future__ import annotations

from functools import cache

from fastapi import Request, Response
from fastapi.responses import RedirectResponse

from turret.errors import NotFound, Unauthorized
from turret.server import oidc
from turret.server.auth import Caller
from turret.server.console import render
from turret.server.console.forms import Sent, pages
from turret.server.limits import client_of
from turret.server.routes import State
from turret.server.sessions import cookie, cookie_value
from turret.server.state import ServerState

router = pages()
MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain"}


@router.get("/")
async def home(request: Request) -> Response:
    """Go to the first page that the caller may open."""
    return RedirectResponse("/adapters" if "admin" in request.state.caller.scopes else "/playground", 303)


@router.get("/sign-in")
async def login_form(request: Request, state: State, next: str = "/") -> Response:
    """The form for a token."""
    if state.guard.open:
        return RedirectResponse("/", 303)
    return _form(request, state, _local(next))


@router.post("/sign-in")
async def sign_in(request: Request, state: State, form: Sent) -> Response:
    """Open a session."""
    next = _local(form.text("next"))
    try:
        session = state.guard.sign_in(form.text("token"), secure=_secure(request))
    except Unauthorized as error:
        return _form(request, state, next, problem=str(error))
    state.guard.sessions.end(request.state.caller.session)
    await state.replica.share_session(session, request.state.caller.session)
    response = RedirectResponse(next, 303)
    response.headers["set-cookie"] = cookie(session, state.guard.sessions.seconds, secure=_secure(request))
    return response


@router.get(oidc.PATH)
async def ask_provider(request: Request, state: State, next: str = "/") -> Response:
    """Go to the page of the OpenID Connect provider."""
    provider = _provider(state)
    url, begun = provider.begin(_local(next))
    response = RedirectResponse(url, 303)
    response.headers["set-cookie"] = oidc.cookie(begun, secure=_secure_by(provider, request))
    return response


@router.get(oidc.BACK)
async def oidc_callback(request: Request, state: State) -> Response:
    """Open a session for the person whom the provider sent back.

    The answer is a page, not a redirect: the browser comes from another site, and would leave a SameSite=Strict cookie
    out of the request that follows a redirect.
    """
    provider = _provider(state)
    secure = _secure_by(provider, request)
    try:
        begun = cookie_value(request.headers.get("cookie"), oidc.cookie_name(secure=secure))
        asking = state.signing_in.of(client_of(request.scope.get("client")) or "")
        person = await asking(provider.finish, begun, dict(request.query_params))
        session = state.guard.sign_in_as(person.name, person.tenant, secure=secure)
        await state.replica.share_session(session, None)
    except Unauthorized as error:
        refused = _form(request, state, "/", problem=str(error))
        refused.headers["set-cookie"] = oidc.cookie("", secure=secure)
        return refused
    response = render.page(request, state, "signed_in.html.j2", next=_local(person.next))
    response.headers.append("set-cookie", cookie(session, state.guard.sessions.seconds, secure=secure))
    response.headers.append("set-cookie", oidc.cookie("", secure=secure))
    return response


@router.post("/sign-out")
async def sign_out(request: Request, state: State) -> Response:
    """End the session on the server, and delete its cookie."""
    caller: Caller = request.state.caller
    state.guard.sessions.end(caller.session)
    await state.replica.share_session(None, caller.session)
    response = RedirectResponse("/sign-in" if not state.guard.open else "/", 303)
    response.headers["set-cookie"] = cookie("", 0, secure=_secure(request))
    return response


@router.get("/static/{file:path}")
async def static(file: str) -> Response:
    """A static file. Its URL contains its digest, so browsers may cache it permanently."""
    content, media_type = _files().get(file, (None, ""))
    if content is None:
        raise NotFound("no such file here")
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(content, media_type=f"{media_type}; charset=utf-8", headers=headers)


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    folder = render.FOLDER / "static"
    paths = [path for path in folder.rglob("*") if path.suffix[1:] in MEDIA_TYPES]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), MEDIA_TYPES[path.suffix[1:]]) for path in paths}


def _form(request: Request, state: ServerState, next: str, problem: str | None = None) -> Response:
    values = {"next": next, "problem": problem, "oidc": None if state.oidc is None else oidc.PATH}
    return render.page(request, state, "sign_in.html.j2", 200 if problem is None else 401, **values)


def _provider(state: ServerState) -> oidc.Oidc:
    """Raises NotFound if the server has no provider."""
    if state.oidc is None:
        raise NotFound("this server has no sign-in by a provider: sign in with a token")
    return state.oidc


def _local(url: str) -> str:
    """The URL if it is a path of this server, else `/`. Browsers read `//host` and a backslash as another server."""
    local = url.startswith("/") and not url.startswith("//") and "\\" not in url
    return url if local and url.isascii() and url.isprintable() and len(url) <= 500 else "/"


def _secure_by(provider: oidc.Oidc, request: Request) -> bool:
    """Whether the browser uses https: a request that no form sent does not say so behind a proxy with TLS."""
    return provider.settings.public_url.startswith("https://") or _secure(request)


def _secure(request: Request) -> bool:
    """Whether the browser used https. The Origin header says so even behind a proxy with TLS."""
    return request.headers.get("origin", "").startswith("https://") or request.url.scheme == "https"
