"""The playground: one text to several versions, with the time and the receipt of each answer.

Versions are asked by number, so no experiment counts these requests.
"""

from __future__ import annotations

from fastapi import Request, Response

from turret.errors import BadRequest
from turret.json_types import JsonObject
from turret.methods import method_named
from turret.server import generation
from turret.server.console import render
from turret.server.console.forms import Form, Sent, pages
from turret.server.limits import MOST_TEXT, MOST_TOKENS
from turret.server.questions import ask
from turret.server.routes import View
from turret.server.schemas import Generation
from turret.store import Version
from turret.tasks import stored_task

router = pages()
MOST = 6  # versions in one question
SHOWN = 200  # versions to choose from
OUT_OF_RANGE = f"expected 1 to {MOST_TOKENS} tokens, and a temperature from 0 to 2"


@router.get("/playground")
async def show(request: Request, view: View) -> Response:
    """The form, with the versions to choose from."""
    versions = await _versions(view)
    default = [str(each) for each in versions if each.aliases][:2] or [str(each) for each in versions[:1]]
    chosen = request.query_params.getlist("model") or default
    generating = {each.part("base").get("fingerprint") for each in versions if _generates(each)}
    writing = [each.name for each in view.engines.bases if each.fingerprint in generating]
    values = {"versions": versions[:SHOWN], "chosen": chosen, "writing": writing, "most": MOST}
    return render.page(request, view, "playground.html.j2", **values)


@router.post("/playground")
async def panels(request: Request, view: View, form: Sent) -> Response:
    """A panel for each version. Each panel then sends its own request."""
    text, models = _text(form), form.all("model")
    if not 1 <= len(models) <= MOST:
        raise BadRequest(f"{len(models)} versions are chosen: expected 1 to {MOST}")
    known = {str(each): each for each in await _versions(view)}
    generates = {model: model not in known or _generates(known[model]) for model in models}  # else it is the base
    settings = {"text": text, "max_tokens": form.text("max_tokens"), "temperature": form.text("temperature")}
    return render.page(
        request, view, "playground_answers.html.j2", models=models, generates=generates, settings=settings
    )


@router.post("/playground/answer")
async def answer(request: Request, view: View, form: Sent) -> Response:
    """One classification, with its time and the time of its load."""
    model = form.text("model")
    loading = await _load(view, model)
    started = view.services.clock()
    async with ask(view, request, "classify", model, [_text(form)]) as pending:
        (found,) = await pending.all()
    seconds = view.services.clock() - started
    values = {"answer": found, "pending": pending, "seconds": seconds, "loading": loading, "model": model}
    return render.page(request, view, "answer.html.j2", **values)


@router.post("/playground/stream")
async def stream(request: Request, view: View, form: Sent) -> Response:
    """One generation, streamed as by `/v1/completions`, with the time of its load in a header."""
    text, body, max_tokens = _text(form), _request(form), _max_tokens(form)
    loading = await _load(view, body.model)
    options = generation.generation_options(view, body, max_tokens, 1, strip=False)
    response = await generation.stream(view, request, body, [text], options, None, generation.CompletionChunks())
    if loading is not None:
        response.headers["turret-load-seconds"] = f"{loading:.6f}"
    return response


def _request(form: Form) -> Generation:
    values: JsonObject = {"model": form.text("model"), "stream": True, "truncate_prompt_tokens": -1}
    try:
        if temperature := form.text("temperature"):
            values["temperature"] = float(temperature)
        return Generation.model_validate({**values, "stream_options": {"include_usage": True}})
    except ValueError:
        raise BadRequest(OUT_OF_RANGE) from None


def _max_tokens(form: Form) -> int | None:
    text = form.text("max_tokens")
    try:
        tokens = int(text) if text else None
    except ValueError:
        raise BadRequest(OUT_OF_RANGE) from None
    if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
        raise BadRequest(OUT_OF_RANGE)
    return tokens


def _text(form: Form) -> str:
    text = form.raw("text").replace("\r\n", "\n")
    if not text.strip() or len(text) > MOST_TEXT:
        raise BadRequest(f"the text has {len(text)} characters: expected 1 to {MOST_TEXT}")
    return text


async def _load(view: View, model: str) -> float | None:
    """Load the version if necessary, and return the seconds that took; None for the base or a version in memory."""
    if view.engines.is_base(model):
        return None
    version = await view.control(view.workspace.resolve, model)
    if view.engines.in_memory(version.digest):
        return None
    started = view.services.clock()
    await view.control(view.engines.warm, str(version))
    return view.services.clock() - started


async def _versions(view: View) -> list[Version]:
    """The versions that the engine can load and that answer in words.

    Those with an alias are first, those of comparisons last, and the newest first among equals.
    """
    found = [
        each
        for each in await view.control(view.workspace.list)
        if view.engines.is_on_base(each)
        and method_named(each.part("method").get("kind")).mixes(each.part("method"))
        and stored_task(each.part("task")).request != "embed"
    ]
    return sorted(found, key=lambda each: (not each.aliases, each.comparison is not None, each.name, -each.number))


def _generates(version: Version) -> bool:
    return stored_task(version.part("task")).generates
