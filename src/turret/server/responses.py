"""`POST /v1/responses`: the plain subset of OpenAI's Responses API. Nothing is kept between two requests.

The input and the instructions become the messages of a chat, so the prompt is that of `/v1/chat/completions`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from turret.errors import TurretError
from turret.json_types import JsonObject
from turret.server import response_schemas as schemas
from turret.server.chat import prompt
from turret.server.chat_schemas import ChatRequest
from turret.server.completions import EVENTS
from turret.server.engine_protocol import Answer
from turret.server.error_responses import error_response
from turret.server.generation import generation_options, stream_events
from turret.server.pending_answers import PendingAnswers, Update, generated_tokens, prompt_tokens
from turret.server.routes import State, Unit, router
from turret.server.state import ServerState

questions = router("infer")


@questions.post("/v1/responses", response_model=schemas.ResponseObject, responses=EVENTS)
async def respond(
    body: schemas.ResponseRequest, state: State, unit: Unit, request: Request, response: Response
) -> schemas.ResponseObject | StreamingResponse:
    """Answer a text or messages. Tools, files, stored responses and other formats are not offered: they are 400."""
    chat = _chat(body)
    prompts = [await state.parsing(prompt, state, chat)]
    options = generation_options(state, chat, chat.max_tokens, 1)
    if body.stream:

        def events(pending: PendingAnswers, updates: AsyncIterator[Update]) -> AsyncIterator[str]:
            return _events(state, body, pending, updates)

        return await stream_events(state, request, body.model, prompts, options, unit or body.user, events)
    async with state.ask(request, "generate", body.model, prompts, options, unit=unit or body.user) as pending:
        (answer,) = await pending.all()
    response.headers.update(pending.headers)
    return _response(state, body, pending, answer, answer["text"])


def _chat(body: schemas.ResponseRequest) -> ChatRequest:
    """The same request to `/v1/chat/completions`."""
    given: list[JsonObject] = []
    if body.instructions:
        given.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        given.append({"role": "user", "content": body.input})
    else:
        given += [{"role": each.role, "content": each.text()} for each in body.input]
    keys = {"temperature": body.temperature, "top_p": body.top_p, "max_tokens": body.max_output_tokens}
    known = {key: value for key, value in keys.items() if value is not None}
    return ChatRequest.model_validate({"model": body.model, "messages": given, **known})


def _response(
    state: ServerState, body: schemas.ResponseRequest, pending: PendingAnswers, answer: Answer | None, text: str
) -> schemas.ResponseObject:
    """The response. answer: None while it is being written."""
    message = _message(pending, answer, text)
    usage = None
    if answer is not None:
        read, made = prompt_tokens(answer), generated_tokens(answer)
        usage = schemas.ResponseUsage(input_tokens=read, output_tokens=made, total_tokens=read + made)
    cut = message.status == "incomplete"
    return schemas.ResponseObject(
        id=f"resp_{pending.id}",
        created_at=state.now(),
        status=message.status,
        incomplete_details=schemas.Incomplete(reason="max_output_tokens") if cut else None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=pending.model or body.model,
        output=[] if answer is None else [message],
        temperature=body.temperature,
        top_p=body.top_p,
        usage=usage,
        user=body.user,
    )


def _message(pending: PendingAnswers, answer: Answer | None, text: str) -> schemas.OutputMessage:
    return schemas.OutputMessage(
        id=f"msg_{pending.id}",
        status="in_progress"
        if answer is None
        else "incomplete"
        if answer["finish_reason"] == "length"
        else "completed",
        content=[] if answer is None else [schemas.OutputText(text=text)],
    )


async def _events(
    state: ServerState,
    body: schemas.ResponseRequest,
    pending: PendingAnswers,
    updates: AsyncIterator[Update],
) -> AsyncIterator[str]:
    lines, text = _Lines(), ""
    begun = _response(state, body, pending, None, "").model_dump()
    yield lines.event("response.created", response=begun)
    yield lines.event("response.in_progress", response=begun)
    item: JsonObject = {"output_index": 0, "item_id": f"msg_{pending.id}", "content_index": 0}
    yield lines.event("response.output_item.added", output_index=0, item=_message(pending, None, "").model_dump())
    yield lines.event("response.content_part.added", **item, part=schemas.OutputText(text="").model_dump())
    try:
        async for _, piece in updates:
            if piece is not None and piece.text:
                text += piece.text
                yield lines.event("response.output_text.delta", **item, delta=piece.text, logprobs=[])
    except TurretError as error:
        state.log.write("stream", "error", error=type(error).__name__, receipt=pending.id)
        yield lines.event("error", **error_response(error).body["error"])
        return
    answer = pending.answers[0]
    assert answer is not None
    for each in _ended(lines, item, pending, answer, text):
        yield each
    whole = _response(state, body, pending, answer, text)
    yield lines.event(f"response.{whole.status}", response=whole.model_dump())


def _ended(lines: _Lines, item: JsonObject, pending: PendingAnswers, answer: Answer, text: str) -> Iterator[str]:
    yield lines.event("response.output_text.done", **item, text=text, logprobs=[])
    yield lines.event("response.content_part.done", **item, part=schemas.OutputText(text=text).model_dump())
    message = _message(pending, answer, text).model_dump()
    yield lines.event("response.output_item.done", output_index=0, item=message)


class _Lines:
    """The events of one stream, numbered."""

    def __init__(self) -> None:
        self._number = 0

    def event(self, kind: str, **fields: JsonObject | list[JsonObject] | str | int | None) -> str:
        said = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(said, ensure_ascii=False)}\n\n"
