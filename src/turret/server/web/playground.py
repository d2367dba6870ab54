"""The playground: one text to several versions side by side, with what it took and who answered.

A version is asked for by its number, so that no experiment counts what is played here.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from turret.errors import BadRequest
from turret.methods import method_named
from turret.server import generation
from turret.server.completions import Pieces
from turret.server.limits import MOST_TEXT, MOST_TOKENS
from turret.server.models import fingerprint
from turret.server.routes import Here
from turret.server.schemas import CompletionRequest
from turret.server.state import ServerState
from turret.server.web import render
from turret.server.web.forms import Form, Sent, pages
from turret.store import Version
from turret.tasks import stored_task

router = pages()
MOST = 6  # versions side by side
SHOWN = 200  # versions to choose from


@router.get("/playground")
async def show(request: Request, here: Here) -> Response:
    """The form, with the versions that this base carries."""
    asked = request.query_params.getlist("model")
    versions = await _versions(here)
    chosen = asked or [str(each) for each in versions if each.aliases][:2] or [str(each) for each in versions[:1]]
    writes = any(stored_task(each.part("task")).generates for each in versions)
    values = {"versions": versions[:SHOWN], "chosen": chosen, "writes": writes, "most": MOST, "kind": _kind}
    return render.page(request, here, "playground.html.j2", **values)


@router.post("/playground")
async def panels(request: Request, here: Here, form: Sent) -> Response:
    """A panel for each version, which asks by itself."""
    text, models = _text(form), form.all("model")
    if not 1 <= len(models) <= MOST:
        raise BadRequest(f"{len(models)} versions are chosen: expected 1 to {MOST}")
    known = {str(each): each for each in await _versions(here)}
    asked = [(model, _kind(known[model]) if model in known else "generate") for model in models]
    settings = {"text": text, "max_tokens": form.text("max_tokens"), "temperature": form.text("temperature")}
    return render.page(request, here, "panels.html.j2", asked=asked, settings=settings)


@router.post("/playground/answer")
async def answer(request: Request, here: Here, form: Sent) -> Response:
    """One classification, with the time of the load that it had to wait for."""
    model = form.text("model")
    loading = await _loaded(here, model)
    began = here.clock()
    async with here.ask(request, "classify", model, [_text(form)]) as asked:
        (found,) = await asked.all()
    took = {"seconds": here.clock() - began, "loading": loading}
    return render.page(request, here, "answer.html.j2", answer=found, asked=asked, took=took, model=model)


@router.post("/playground/stream")
async def stream(request: Request, here: Here, form: Sent) -> Response:
    """One generation, as `/v1/completions` streams it, with the time of the load in a header."""
    body = _request(form)
    loading = await _loaded(here, body.model)
    options = generation.options(here, body, body.max_tokens, 1)
    streamed = await generation.stream(here, request, body, body.prompts(), options, None, Pieces())
    if loading is not None:
        streamed.headers["turret-load-seconds"] = f"{loading:.6f}"
    return streamed


def _request(form: Form) -> CompletionRequest:
    """Raises BadRequest."""
    said: dict[str, Any] = {"model": form.text("model"), "prompt": _text(form), "stream": True}
    try:
        if tokens := form.text("max_tokens"):
            said["max_tokens"] = int(tokens)
        if temperature := form.text("temperature"):
            said["temperature"] = float(temperature)
        return CompletionRequest(**said, stream_options={"include_usage": True})  # type: ignore[arg-type]
    except ValueError:
        raise BadRequest(f"expected 1 to {MOST_TOKENS} tokens, and a temperature from 0 to 2") from None


def _text(form: Form) -> str:
    text = form.raw("text").replace("\r\n", "\n")
    if not text.strip() or len(text) > MOST_TEXT:
        raise BadRequest(f"the text has {len(text)} characters: expected 1 to {MOST_TEXT}")
    return text


async def _loaded(here: ServerState, model: str) -> float | None:
    """Seconds that the version took to be loaded now; None where it was there, or is the base."""
    if model == here.base_id:
        return None
    version = await here.control(here.workspace.resolve, model)
    if here.in_memory(version.digest):
        return None
    began = here.clock()
    await here.control(here.engine.warm, str(version))
    return here.clock() - began


async def _versions(here: ServerState) -> list[Version]:
    """Those that this base carries beside others: what has an alias first, then the newest."""
    found = [
        each
        for each in await here.control(here.workspace.list)
        if fingerprint(each) == here.engine.base.fingerprint
        and method_named(each.part("method").get("kind")).shares_base
    ]  # fmt: skip
    return sorted(found, key=lambda each: (not each.aliases, each.name, -each.number))


def _kind(version: Version) -> str:
    return stored_task(version.part("task")).request
