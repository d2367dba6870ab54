"""The ways in and out: `/`, signing in and out, and the files that pages are made of."""

from __future__ import annotations

from functools import cache

from fastapi import Request, Response
from fastapi.responses import RedirectResponse

from turret.errors import NotFound, Unauthorized
from turret.server.auth import Asker
from turret.server.routes import Here
from turret.server.sessions import cookie
from turret.server.web import render
from turret.server.web.forms import Sent, pages

router = pages()
KINDS = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain"}


@router.get("/")
async def home(request: Request) -> Response:
    """The first page that whoever asks may see."""
    return RedirectResponse("/adapters" if "admin" in request.state.asker.scopes else "/playground", 303)


@router.get("/sign-in")
async def ask_in(request: Request, here: Here, next: str = "/") -> Response:
    """The form for a token."""
    if here.guard.open:
        return RedirectResponse("/", 303)
    return render.page(request, here, "sign_in.html.j2", next=_within(next), problem=None)


@router.post("/sign-in")
async def sign_in(request: Request, here: Here, form: Sent) -> Response:
    """Begin a session; a token that is not known is told so in the page."""
    try:
        session = here.guard.enter(form.text("token"))
    except Unauthorized as error:
        return render.page(request, here, "sign_in.html.j2", 401, next=_within(form.text("next")), problem=str(error))
    here.guard.sessions.end(request.state.asker.session)
    answer = RedirectResponse(_within(form.text("next")), 303)
    answer.headers["set-cookie"] = cookie(session, here.guard.sessions.seconds, secure=_secure(request))
    return answer


@router.post("/sign-out")
async def sign_out(request: Request, here: Here) -> Response:
    """End the session, here and in the browser."""
    asker: Asker = request.state.asker
    here.guard.sessions.end(asker.session)
    answer = RedirectResponse("/sign-in" if not here.guard.open else "/", 303)
    answer.headers["set-cookie"] = cookie("", 0, secure=_secure(request))
    return answer


@router.get("/static/{file:path}")
async def static(file: str) -> Response:
    """One of our files; its address has its digest, so it may be kept."""
    content, kind = _files().get(file, (None, ""))
    if content is None:
        raise NotFound("no such file here")
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    folder = render.HERE / "static"
    there = [path for path in folder.rglob("*") if path.suffix[1:] in KINDS]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), KINDS[path.suffix[1:]]) for path in there}


def _within(wanted: str) -> str:
    """A path of this server; anything else leads home. Browsers read `//host` and a backslash as another server."""
    ours = wanted.startswith("/") and not wanted.startswith("//") and "\\" not in wanted
    return wanted if ours and wanted.isascii() and wanted.isprintable() and len(wanted) <= 500 else "/"


def _secure(request: Request) -> bool:
    """Whether the browser came by https: it says so, even where a proxy stands between."""
    return request.headers.get("origin", "").startswith("https://") or request.url.scheme == "https"
