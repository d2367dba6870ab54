"""`POST /v1/responses`: a part of OpenAI's Responses API. Nothing is kept between two requests.

The input and the instructions become the messages of a chat, so the prompt is that of `/v1/chat/completions`, and tools
and the form of an answer work as there.
"""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from turret.json_types import JsonObject
from turret.server import response_schemas as schemas
from turret.server.chat import ToolCalls, prompt
from turret.server.chat_schemas import ChatRequest
from turret.server.completions import EVENTS
from turret.server.generation import options_of, stream_events
from turret.server.response_output import ResponseOutput
from turret.server.routes import State, Unit, router

questions = router("infer")


@questions.post("/v1/responses", response_model=schemas.ResponseObject, responses=EVENTS)
async def respond(
    body: schemas.ResponseRequest, state: State, unit: Unit, request: Request, response: Response
) -> schemas.ResponseObject | StreamingResponse:
    """Answer a text or messages, also by calls of tools. Files and stored responses are not offered: they are 400."""
    chat = _chat(body)
    await state.admit(request)  # before the messages are tokenized
    called = chat.tools and chat.tool_choice != "none"
    tools = await state.parsing(ToolCalls, state, chat) if called else None
    prompts = [await state.parsing(prompt, state, chat)]
    own = None if tools is None else await state.parsing(tools.constraint)
    options = await options_of(state, chat, chat.max_tokens, 1, constraint=own)
    output = ResponseOutput(state, body, tools)
    if body.stream:
        return await stream_events(state, request, body.model, prompts, options, unit or body.user, output.events)
    async with state.ask(request, "generate", body.model, prompts, options, unit=unit or body.user) as pending:
        (answer,) = await pending.all()
    response.headers.update(pending.headers)
    return output.whole(pending, answer, output.items(pending, answer))


def _chat(body: schemas.ResponseRequest) -> ChatRequest:
    """The same request to `/v1/chat/completions`."""
    given: list[JsonObject] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    given += [{"role": "user", "content": body.input}] if isinstance(body.input, str) else _messages(body.input)
    asked: JsonObject = {"model": body.model, "messages": given, "max_tokens": body.max_output_tokens}
    asked |= {"temperature": body.temperature, "top_p": body.top_p}
    if body.tools:
        asked["tools"] = [_wrapped(tool.model_dump(exclude={"type"}, exclude_none=True)) for tool in body.tools]
    choice = body.tool_choice
    if choice is not None:
        asked["tool_choice"] = choice if isinstance(choice, str) else _wrapped({"name": choice.name})
    form = None if body.text is None else body.text.format
    if isinstance(form, schemas.SchemaFormat):
        given_form = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        asked["response_format"] = {"type": form.type, "json_schema": given_form}
    elif form is not None:
        asked["response_format"] = {"type": form.type}
    return ChatRequest.model_validate({key: value for key, value in asked.items() if value is not None})


def _messages(items: list[schemas.InputItem]) -> list[JsonObject]:
    """The items as messages: calls belong to the message of the assistant before them."""
    given: list[JsonObject] = []
    for item in items:
        if isinstance(item, schemas.InputMessage):
            given.append({"role": item.role, "content": schemas.text_of(item.content)})
        elif isinstance(item, schemas.CallOutput):
            output = schemas.text_of(item.output)
            given.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        else:
            call = _wrapped({"name": item.name, "arguments": item.arguments}) | {"id": item.call_id}
            if not given or given[-1]["role"] != "assistant":
                given.append({"role": "assistant", "content": None})
            given[-1]["tool_calls"] = [*given[-1].get("tool_calls", []), call]
    return given


def _wrapped(function: JsonObject) -> JsonObject:
    """A function as chats spell it, a level deeper."""
    return {"type": "function", "function": function}
