"""What completions and chat share: options from a request, choices from answers, and a stream of server-sent events.

Refuses to know how a prompt is made; `Shape` says how a chunk is written.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from turret.errors import BadRequest, TurretError
from turret.server.engine_protocol import Text
from turret.server.error_responses import problem
from turret.server.limits import MOST_INPUTS
from turret.server.pending_answers import PendingAnswers
from turret.server.routes import usage
from turret.server.schemas import Generation
from turret.server.state import ServerState

Chunk = dict[str, Any]


class ChunkFormat(Protocol):
    """How the chunks of one kind of stream are written."""

    object: str
    prefix: str

    def begin(self, index: int) -> Chunk | None: ...
    def piece(self, index: int, text: str) -> Chunk: ...
    def end(self, index: int, finish_reason: str | None) -> Chunk: ...


def several(body: Generation, prompts: Sequence[Text]) -> list[Text]:
    """Every prompt `n` times, as the choices are numbered."""
    times = body.n or 1
    if len(prompts) * times > MOST_INPUTS:
        raise BadRequest(f"{len(prompts)} prompts times n = {times}: expected at most {MOST_INPUTS} choices in all")
    return [prompt for prompt in prompts for _ in range(times)]


def options(here: ServerState, body: Generation, max_tokens: int | None, count: int) -> list[Any]:
    """An options object for each choice; choices of one prompt draw by seeds that follow each other."""
    keys = ("temperature", "top_p", "top_k", "repetition_penalty", "num_beams")
    said = {key: getattr(body, key) for key in keys}
    said |= {"max_tokens": max_tokens, "stop": body.stops(), "logprobs": body.told()}
    said = {key: value for key, value in said.items() if value is not None}
    if "temperature" not in said and ("top_k" in said or said.get("top_p", 1.0) < 1.0):
        said["temperature"] = 1.0  # what OpenAI's API means where it is left out
    if body.seed is None:
        return [here.options(**said)] * count
    return [here.options(**said, seed=body.seed + place % (body.n or 1)) for place in range(count)]


async def stream(
    here: ServerState,
    request: Request,
    body: Generation,
    texts: Sequence[Text],
    options: Sequence[Any],
    unit: str | None,
    shape: ChunkFormat,
) -> StreamingResponse:
    """Open the tickets and begin to answer once the first word is there: until then an error has a status."""
    asked = await here.open(request, "generate", body.model, texts, options, unit=unit or body.user)
    try:
        first, rest = await asked.first()
    except BaseException:
        here.close(request, "generate", asked)
        raise
    lines = _lines(here, body, asked, _again(first, rest), shape)
    return _Closing(lines, asked.headers, lambda: here.close(request, "generate", asked))


class _Closing(StreamingResponse):
    """A stream of events that is closed however it ends: read, left by its client, or broken."""

    def __init__(self, lines: AsyncIterator[str], headers: dict[str, str], close: Callable[[], None]) -> None:
        told = {**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(lines, headers=told, media_type="text/event-stream")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _again(
    first: tuple[int, str | None], rest: AsyncIterator[tuple[int, str | None]]
) -> AsyncIterator[tuple[int, str | None]]:
    yield first
    async for event in rest:
        yield event


async def _lines(
    here: ServerState,
    body: Generation,
    asked: PendingAnswers,
    events: AsyncIterator[tuple[int, str | None]],
    shape: ChunkFormat,
) -> AsyncIterator[str]:
    head = {
        "id": f"{shape.prefix}-{asked.id}",
        "object": shape.object,
        "created": here.now(),
        "model": asked.model or here.base_id,
    }
    begun: set[int] = set()
    try:
        async for place, text in events:
            for choice in _choices(asked, shape, begun, place, text):
                yield _line(head | {"choices": [choice]})
    except TurretError as error:
        here.log.say("stream", "error", error=type(error).__name__, receipt=asked.id)
        yield _line(problem(error).body)
        return
    if body.stream_options is not None and body.stream_options.include_usage:
        told = usage([answer for answer in asked.answers if answer is not None])
        yield _line(head | {"choices": [], "usage": None if told is None else told.model_dump()})
    yield "data: [DONE]\n\n"


def _choices(
    asked: PendingAnswers, shape: ChunkFormat, begun: set[int], place: int, text: str | None
) -> Iterator[Chunk]:
    if place not in begun:
        begun.add(place)
        if (opening := shape.begin(place)) is not None:
            yield opening
    if text is not None:
        yield shape.piece(place, text)
    else:
        yield shape.end(place, (asked.answers[place] or {}).get("finish_reason"))


def _line(said: Chunk) -> str:
    return f"data: {json.dumps(said, ensure_ascii=False)}\n\n"
