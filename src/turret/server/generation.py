"""What all generations share: their options, unknown keys of a request, and streams of server-sent events."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from turret.engine import Piece, SamplingParams
from turret.engine.constraint import Constraint
from turret.errors import BadRequest, TurretError
from turret.json_types import JsonObject
from turret.server.engines import Input
from turret.server.error_responses import error_response
from turret.server.limits import MOST_INPUTS
from turret.server.questions import PendingAnswers, Update, finish, now, submit, usage
from turret.server.routes import Generation
from turret.server.services import View
from turret.tasks.shapes import TokenReport

Chunk = JsonObject
EVENTS: dict[int | str, JsonObject] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream."}
}
SHOWN_KEYS = 20  # unknown keys in a header
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,80}", re.ASCII)


class ChunkFormat(Protocol):
    """The chunks of one kind of stream."""

    kind: str  # of the JSON `object`
    prefix: str

    def begin(self, index: int) -> Chunk | None: ...
    def piece(self, index: int, piece: Piece) -> Chunk: ...
    def end(self, index: int, finish_reason: str | None) -> Sequence[Chunk]: ...


class CompletionChunks:
    """The chunks of a streamed completion.

    Args:
        logprobs: Writes the logprobs of tokens, from so many characters of the text on; None for no logprobs.
    """

    kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, logprobs: Callable[[Sequence[TokenReport], int], BaseModel] | None = None) -> None:
        self._logprobs = logprobs
        self._sent: Counter[int] = Counter()  # characters, by choice

    def begin(self, index: int) -> Chunk | None:
        return None

    def piece(self, index: int, piece: Piece) -> Chunk:
        logprobs = None if self._logprobs is None else self._logprobs(piece.logprobs, self._sent[index]).model_dump()
        self._sent[index] += len(piece.text)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}

    def end(self, index: int, finish_reason: str | None) -> Sequence[Chunk]:
        return [{"index": index, "text": "", "logprobs": None, "finish_reason": finish_reason}]


def unknown_keys(view: View, body: Generation) -> dict[str, str]:
    """The header that names the unknown keys of a request. Raises BadRequest for one if the server is strict."""
    found = [key if _KEY.fullmatch(key) else "?" for key in body.unknown()]
    if found and view.services.settings.strict:
        raise BadRequest(f"{found[0]}: unknown key, and this server runs with --strict: leave it out")
    more = [f"and {len(found) - SHOWN_KEYS} more"] if len(found) > SHOWN_KEYS else []
    return {"turret-ignored": ", ".join([*found[:SHOWN_KEYS], *more])} if found else {}


def repeated(prompts: Sequence[Input], times: int) -> list[Input]:
    """Every prompt so many times, in the order of the choices. Raises BadRequest for more than the limit."""
    if len(prompts) * times > MOST_INPUTS:
        raise BadRequest(f"{len(prompts)} prompts times n = {times}: expected at most {MOST_INPUTS} choices in all")
    return [prompt for prompt in prompts for _ in range(times)]


def constraint_of(body: Generation) -> Constraint | None:
    """What the answer must look like. Raises BadRequest for two constraints, DataError for one that cannot be."""
    structured, asked = body.structured_outputs, body.response_format
    schema = structured.json_ if structured and structured.json_ is not None else body.guided_json
    regex = structured.regex if structured and structured.regex is not None else body.guided_regex
    choice = structured.choice if structured and structured.choice is not None else body.guided_choice
    found: list[Constraint] = []
    if asked is not None and asked.type == "json_schema":
        given = asked.json_schema.schema_
        found.append(Constraint.json_object() if given is None else Constraint.json_schema(given))
    if (asked is not None and asked.type == "json_object") or (structured and structured.json_object):
        found.append(Constraint.json_object())
    if schema is not None:
        found.append(Constraint.json_schema(schema))
    if regex is not None:
        found.append(Constraint.regex(regex))
    if choice is not None:
        found.append(Constraint.choice(choice))
    if structured and structured.grammar is not None:
        found.append(Constraint.lark(structured.grammar))
    if len(found) > 1:
        raise BadRequest("two constraints: give one of response_format, structured_outputs and the guided_ keys")
    return found[0] if found else None


async def options_of(
    view: View,
    body: Generation,
    max_tokens: int | None,
    choices: int,
    *,
    times: int | None = None,
    constraint: Constraint | None = None,
    **more: bool | int | None,
) -> Sequence[SamplingParams]:
    """`generation_options`, on a thread if the request has a constraint, which may be long."""
    forms = (body.response_format, body.structured_outputs, body.guided_json, body.guided_regex, body.guided_choice)
    if constraint is None and any(each is not None for each in forms):
        constraint = await view.parsing(constraint_of, body)
    return generation_options(view, body, max_tokens, choices, times=times, constraint=constraint, **more)


def generation_options(
    view: View,
    body: Generation,
    max_tokens: int | None,
    choices: int,
    *,
    times: int | None = None,
    constraint: Constraint | None = None,
    **more: bool | int | None,
) -> Sequence[SamplingParams]:
    """The options of each choice. The choices of one prompt have consecutive seeds.

    Args:
        times: Choices of each prompt; `n` if None.
        constraint: What the answer must look like; `options_of` reads it from the request.
        more: SamplingParams that the route sets.
    """
    times = times or body.n or 1
    keys = ("temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {key: getattr(body, key) for key in (*keys, "num_beams", "truncate_prompt_tokens")}
    given |= {"max_tokens": max_tokens, "stop": body.stops(), "logprobs": body.logprob_count()}
    given |= {"constraint": constraint, "cut": body.truncate_prompt_tokens is not None}
    if body.logit_bias:
        given["logit_bias"] = tuple((int(token), bias) for token, bias in body.logit_bias.items() if bias)
    given = {key: value for key, value in (given | more).items() if value is not None}
    if "temperature" not in given and ("top_k" in given or given.get("top_p", 1.0) < 1.0):
        given["temperature"] = 1.0  # the default of OpenAI's API
    if body.seed is None:
        return [view.services.options(**given)] * choices
    return [view.services.options(**given, seed=body.seed + index % times) for index in range(choices)]


async def stream(
    view: View,
    request: Request,
    body: Generation,
    prompts: Sequence[Input],
    options: Sequence[SamplingParams],
    unit: str | None,
    chunks: ChunkFormat,
) -> StreamingResponse:
    """Answer with chunks as OpenAI's API streams them."""

    def lines(pending: PendingAnswers, updates: AsyncIterator[Update]) -> AsyncIterator[str]:
        return _lines(view, body, pending, updates, chunks)

    headers = unknown_keys(view, body)
    return await stream_events(view, request, body.model, prompts, options, unit or body.user, lines, headers)


async def stream_events(
    view: View,
    request: Request,
    model: str,
    prompts: Sequence[Input],
    options: Sequence[SamplingParams],
    unit: str | None,
    lines: Callable[[PendingAnswers, AsyncIterator[Update]], AsyncIterator[str]],
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    """Submit the prompts, and start the response with the first word: an error before it has an HTTP status.

    Args:
        lines: Makes the events from the updates of the answers.
        headers: Added to those of the answers.
    """
    pending = await submit(view, request, "generate", model, prompts, options, unit=unit)
    try:
        first, rest = await pending.first()
    except BaseException:
        finish(view, request, "generate", pending)
        raise
    events = lines(pending, _chained(first, rest))
    return _EventStream(events, pending.headers | (headers or {}), lambda: finish(view, request, "generate", pending))


class _EventStream(StreamingResponse):
    """A stream of server-sent events. Calls `finish` at its end, also if the client disconnects or an error ends it."""

    def __init__(self, lines: AsyncIterator[str], headers: dict[str, str], finish: Callable[[], None]) -> None:
        more = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(lines, headers=headers | more, media_type="text/event-stream")
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._finish()


async def _chained(first: Update, rest: AsyncIterator[Update]) -> AsyncIterator[Update]:
    yield first
    async for update in rest:
        yield update


async def _lines(
    view: View,
    body: Generation,
    pending: PendingAnswers,
    updates: AsyncIterator[Update],
    chunks: ChunkFormat,
) -> AsyncIterator[str]:
    head = {
        "id": f"{chunks.prefix}-{pending.id}",
        "object": chunks.kind,
        "created": now(),
        "model": pending.model or body.model,
    }
    begun: set[int] = set()
    try:
        async for update in updates:
            for choice in _choices(pending, chunks, begun, update):
                yield _line(head | {"choices": [choice]})
    except TurretError as error:
        view.services.log.write("stream", "error", error=type(error).__name__, receipt=pending.id)
        yield _line(error_response(error).body)
        return
    if body.stream_options is not None and body.stream_options.include_usage:
        counts = usage([answer for answer in pending.answers if answer is not None])
        yield _line(head | {"choices": [], "usage": None if counts is None else counts.model_dump()})
    yield "data: [DONE]\n\n"


def _choices(pending: PendingAnswers, chunks: ChunkFormat, begun: set[int], update: Update) -> Iterator[Chunk]:
    index, piece = update
    if index not in begun:
        begun.add(index)
        if (opening := chunks.begin(index)) is not None:
            yield opening
    if piece is not None:
        yield chunks.piece(index, piece)
    else:
        yield from chunks.end(index, (pending.answers[index] or {}).get("finish_reason"))


def _line(chunk: Chunk) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
