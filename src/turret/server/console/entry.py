"""`/`, signing in and out, and the static files of the pages."""

from __future__ import annotations

from functools import cache

from fastapi import Response
from fastapi.responses import RedirectResponse

from turret.errors import NotFound, Unauthorized
from turret.server import oidc
from turret.server.auth import cookie_value, session_cookie
from turret.server.console import render
from turret.server.console.render import Page, Sent, pages
from turret.server.limits import client_of
from turret.server.routes import View

router = pages()
MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain"}


@router.get("/")
async def home(page: Page) -> Response:
    """Go to the first page that the caller may open."""
    return RedirectResponse("/adapters" if "admin" in page.caller.scopes else "/playground", 303)


@router.get("/sign-in")
async def login_form(page: Page, view: View, next: str = "/") -> Response:
    """The form for a token."""
    if view.services.guard.open:
        return RedirectResponse("/", 303)
    return _form(page, _local(next))


@router.post("/sign-in")
async def sign_in(page: Page, view: View, form: Sent) -> Response:
    """Open a session."""
    next = _local(form.text("next"))
    try:
        session = view.services.guard.sign_in(form.text("token"), secure=_secure(page))
    except Unauthorized as error:
        return _form(page, next, why=str(error))
    view.services.guard.sessions.end(page.caller.session)
    await view.services.replica.share_session(session, page.caller.session)
    cookie = session_cookie(session, view.services.guard.sessions.seconds, secure=_secure(page))
    return RedirectResponse(next, 303, {"set-cookie": cookie})


@router.get(oidc.PATH)
async def ask_provider(page: Page, view: View, next: str = "/") -> Response:
    """Go to the page of the OpenID Connect provider."""
    provider = _provider(view)
    url, begun = provider.begin(_local(next))
    return RedirectResponse(url, 303, {"set-cookie": oidc.cookie(begun, secure=_secure_by(provider, page))})


@router.get(oidc.BACK)
async def oidc_callback(page: Page, view: View) -> Response:
    """Open a session for the person whom the provider sent back.

    The answer is a page, not a redirect: the browser comes from another site, and would leave a SameSite=Strict cookie
    out of the request that follows a redirect.
    """
    provider = _provider(view)
    secure = _secure_by(provider, page)
    try:
        begun = cookie_value(page.request.headers.get("cookie"), oidc.cookie_name(secure=secure))
        asking = view.services.signing_in.of(client_of(page.request.scope.get("client")) or "")
        person = await asking(provider.finish, begun, dict(page.request.query_params))
        session = view.services.guard.sign_in_as(person.name, person.tenant, secure=secure)
        await view.services.replica.share_session(session, None)
    except Unauthorized as error:
        refused = _form(page, "/", why=str(error))
        refused.headers["set-cookie"] = oidc.cookie("", secure=secure)
        return refused
    response = page.show("signed_in.html.j2", next=_local(person.next))
    response.headers.append("set-cookie", session_cookie(session, view.services.guard.sessions.seconds, secure=secure))
    response.headers.append("set-cookie", oidc.cookie("", secure=secure))
    return response


@router.post("/sign-out")
async def sign_out(page: Page, view: View) -> Response:
    """End the session on the server, and delete its cookie."""
    view.services.guard.sessions.end(page.caller.session)
    await view.services.replica.share_session(None, page.caller.session)
    next = "/" if view.services.guard.open else "/sign-in"
    return RedirectResponse(next, 303, {"set-cookie": session_cookie("", 0, secure=_secure(page))})


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


def _form(page: Page, next: str, why: str | None = None) -> Response:
    provider = None if page.view.services.oidc is None else oidc.PATH
    status = 200 if why is None else 401
    return page.show("sign_in.html.j2", status, next=next, why=why, oidc=provider)


def _provider(view: View) -> oidc.Oidc:
    """Raises NotFound if the server has no provider."""
    if view.services.oidc is None:
        raise NotFound("this server has no sign-in by a provider: sign in with a token")
    return view.services.oidc


def _local(url: str) -> str:
    """The URL if it is a path of this server, else `/`. Browsers read `//host` and a backslash as another server."""
    local = url.startswith("/") and not url.startswith("//") and "\\" not in url
    return url if local and url.isascii() and url.isprintable() and len(url) <= 500 else "/"


def _secure_by(provider: oidc.Oidc, page: Page) -> bool:
    """Whether the browser uses https: a request that no form sent does not say so behind a proxy with TLS."""
    return provider.settings.public_url.startswith("https://") or _secure(page)


def _secure(page: Page) -> bool:
    """Whether the browser used https. The Origin header says so even behind a proxy with TLS."""
    return page.request.headers.get("origin", "").startswith("https://") or page.request.url.scheme == "https"
