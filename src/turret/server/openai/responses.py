"""`POST /v1/responses`: a part of OpenAI's Responses API. Nothing is kept between two requests.

The input and the instructions become the messages of a chat, so the prompt is that of `/v1/chat/completions`, and tools
and the form of an answer work as there.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from turret.errors import TurretError
from turret.json_types import JsonObject, JsonValue, Plain
from turret.server import limits
from turret.server.error_responses import error_response
from turret.server.openai import completions
from turret.server.openai.completions import ChatRequest, ToolCalls, ToolName
from turret.server.questions import Asking, PendingAnswers, Update, generated_tokens, now, prompt_tokens
from turret.server.routes import NO_EFFECT, USER, WHOLE, Model, Name, Text, User, View, router
from turret.tasks.shapes import Answer

# --- schemas ----------------------------------------------------------------------------------------------------------
# Requests and responses of `/v1/responses`, in OpenAI's format. Unknown keys are refused.


Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
OF_OUTPUT = "As in the output of an earlier response. " + NO_EFFECT


class Given(Model):
    """A part of the input, which may be a part of an earlier output: clients give keys that they do not use as null."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "null"}})

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Plain) -> Plain:
        return {key: each for key, each in given.items() if each is not None} if isinstance(given, dict) else given


class TextPart(Given):
    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[JsonObject] | None = Field(None, description=OF_OUTPUT)
    logprobs: list[JsonObject] | None = Field(None, description=OF_OUTPUT)


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]


def _chat_content(content: str | list[TextPart]) -> str | list[JsonObject]:
    """A content as chats spell it. Its parts stay apart: a chat joins them, and limits what they have together."""
    return content if isinstance(content, str) else [{"type": "text", "text": part.text} for part in content]


class InputMessage(Given):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Id | None = Field(None, description=OF_OUTPUT)
    status: Status | None = Field(None, description=OF_OUTPUT)


class InputCall(Given):
    """A call of a tool, as an earlier response gave it."""

    type: Literal["function_call"]
    call_id: Id
    name: ToolName
    arguments: Text = Field(description="A JSON object as text.")
    id: Id | None = Field(None, description=OF_OUTPUT)
    status: Status | None = Field(None, description=OF_OUTPUT)


class CallOutput(Given):
    """What a tool gave."""

    type: Literal["function_call_output"]
    call_id: Id
    output: Content
    id: Id | None = Field(None, description=NO_EFFECT)
    status: Status | None = Field(None, description=NO_EFFECT)


def _kind(item: Plain | InputItemTypes) -> str:
    """The `type` of an input item; a message may have none."""
    kind = item.get("type") if isinstance(item, Mapping) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)


InputItemTypes = InputMessage | InputCall | CallOutput
InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")],
    Discriminator(_kind),
]


class FunctionTool(Model):
    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema.")
    strict: bool | None = Field(None, description="The schema is enforced if a call is required.")


class FunctionChoice(Model):
    type: Literal["function"]
    name: ToolName


class PlainFormat(Model):
    type: Literal["text", "json_object"]


class SchemaFormat(Model):
    type: Literal["json_schema"]
    name: Id
    schema_: JsonObject = Field(alias="schema", description="A JSON schema.")
    description: Text | None = None
    strict: bool | None = Field(None, description="The schema is enforced in any case.")


class TextSettings(Model):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponseRequest(Model):
    model_config = ConfigDict(json_schema_extra=completions.CHOICE_NEEDS_TOOLS)
    model: Name
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=limits.MOST_MESSAGES - 1, fail_fast=True)]
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: Annotated[int, Field(ge=1, le=limits.MOST_TOKENS), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextSettings | None = Field(None, description="The form of the answer, unless a call of a tool is required.")
    tools: Annotated[list[FunctionTool], Field(max_length=limits.MOST_MESSAGES, fail_fast=True)] | None = Field(
        None, description="Written into the prompt, as in training. Calls in the answer are items of the output."
    )
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = Field(
        None, description="`required`, or a tool: the answer is a call whose arguments fit the tool's schema."
    )
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)
    stream: bool | None = None
    store: Literal[False] | None = Field(None, description="Only false: no response is kept.")
    user: User | None = Field(None, description=USER)

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools: give them, or leave it out")
        return self


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[JsonObject] = []
    logprobs: list[JsonObject] = []


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputCall(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: Status
    call_id: str
    name: str
    arguments: str = Field(description="A JSON object as text.")


OutputItem = OutputMessage | OutputCall


class TokenDetails(BaseModel):
    cached_tokens: int = 0


class OutputDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Incomplete(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    model: str = Field(description="The version that answered, such as name@3.")
    output: list[OutputItem]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None = None
    text: JsonObject = Field(description="As in the request.")
    tool_choice: str | JsonObject = "auto"
    tools: list[JsonObject] = []
    top_p: float | None = None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


# --- response output --------------------------------------------------------------------------------------------------
# The output of `/v1/responses`: a message and calls of tools, whole or as the events of a stream.


class ResponseOutput:
    """The output of one request.

    Args:
        tools: the calls that the answer may hold; None: no call is looked for.
    """

    def __init__(self, view: View, body: ResponseRequest, tools: ToolCalls | None) -> None:
        self._view, self._body, self._tools = view, body, tools
        self._number = 0  # of the next event

    def items(self, pending: PendingAnswers, answer: Answer, sent: int = 0) -> list[OutputItem]:
        """The message, if there is text or no call, and the calls. sent: characters of its text that were streamed."""
        text = str(answer["text"])
        content, calls = (text, []) if self._tools is None else self._tools.read(text)
        if calls:
            content = content[: max(sent, len(content.rstrip()))]
        items: list[OutputItem] = []
        if content.strip() or not calls:
            items.append(_message(pending, _status(answer), content))
        for call in calls:
            asked = call.function.model_dump()
            items.append(OutputCall(id=f"fc_{call.id}", status="completed", call_id=call.id, **asked))
        return items

    def whole(self, pending: PendingAnswers, answer: Answer | None, items: Sequence[OutputItem]) -> ResponseObject:
        """The response. answer: None while it is being written."""
        body, usage = self._body, None
        if answer is not None:
            read, made = prompt_tokens(answer), generated_tokens(answer)
            usage = ResponseUsage(input_tokens=read, output_tokens=made, total_tokens=read + made)
        status, choice = _status(answer), body.tool_choice or "auto"
        form = None if body.text is None else body.text.format
        given = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
        return ResponseObject(
            id=f"resp_{pending.id}",
            created_at=now(),
            status=status,
            incomplete_details=Incomplete(reason="max_output_tokens") if status == "incomplete" else None,
            model=pending.model or body.model,
            output=list(items),
            text={"format": given},
            tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
            tools=[tool.model_dump() for tool in body.tools or ()],
            usage=usage,
            **body.model_dump(include={"instructions", "max_output_tokens", "temperature", "top_p", "user"}),
        )

    # --- a stream ----------------------------------------------------------------------------------------------------

    async def events(self, pending: PendingAnswers, updates: AsyncIterator[Update]) -> AsyncIterator[str]:
        """The events of a stream. Where a call of a tool may begin, the text is held back until the end."""
        begun = self.whole(pending, None, []).model_dump()
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        text, sent, opened = "", 0, self._tools is None
        if opened:
            for each in self._open_message(pending):
                yield each
        try:
            async for _, piece in updates:
                text += "" if piece is None else piece.text
                end = len(text) if self._tools is None else self._tools.may_begin(text)
                if not opened and text[:end].strip():
                    opened = True
                    for each in self._open_message(pending):
                        yield each
                if opened and end > sent:
                    yield self._delta(pending, text[sent:end])
                    sent = end
        except TurretError as error:
            self._view.services.log.write("stream", "error", error=type(error).__name__, receipt=pending.id)
            yield self._event("error", **error_response(error).body["error"])
            return
        answer = pending.answers[0]
        assert answer is not None
        items = self.items(pending, answer, sent)
        for index, item in enumerate(items):
            if isinstance(item, OutputCall):
                ended = self._call_events(index, item)
            else:
                ended = self._end_message(pending, item, sent, opened)
            for each in ended:
                yield each
        last = self.whole(pending, answer, items)
        yield self._event(f"response.{last.status}", response=last.model_dump())

    def _open_message(self, pending: PendingAnswers) -> Iterator[str]:
        """A message begins. It is the first item."""
        message = _message(pending, "in_progress").model_dump()
        yield self._event("response.output_item.added", output_index=0, item=message)
        part = OutputText(text="").model_dump()
        yield self._event("response.content_part.added", **_place(pending), part=part)

    def _delta(self, pending: PendingAnswers, text: str) -> str:
        return self._event("response.output_text.delta", **_place(pending), delta=text, logprobs=[])

    def _end_message(self, pending: PendingAnswers, item: OutputMessage, sent: int, opened: bool) -> Iterator[str]:
        """A message ends, with the text that was held back."""
        text = item.content[0].text
        if not opened:
            yield from self._open_message(pending)
        if rest := text[sent:]:
            yield self._delta(pending, rest)
        yield self._event("response.output_text.done", **_place(pending), text=text, logprobs=[])
        yield self._event("response.content_part.done", **_place(pending), part=item.content[0].model_dump())
        yield self._event("response.output_item.done", output_index=0, item=item.model_dump())

    def _call_events(self, index: int, item: OutputCall) -> Iterator[str]:
        """A call of a tool, whole."""
        begun = item.model_copy(update={"status": "in_progress", "arguments": ""}).model_dump()
        place: JsonObject = {"output_index": index, "item_id": item.id}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=item.arguments)
        yield self._event("response.function_call_arguments.done", **place, name=item.name, arguments=item.arguments)
        yield self._event("response.output_item.done", output_index=index, item=item.model_dump())

    def _event(self, kind: str, **fields: JsonValue) -> str:
        said = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(said, ensure_ascii=False)}\n\n"


def _status(answer: Answer | None) -> Status:
    if answer is None:
        return "in_progress"
    return "incomplete" if answer["finish_reason"] == "length" else "completed"


def _place(pending: PendingAnswers) -> JsonObject:
    """Where the text of the message is."""
    return {"output_index": 0, "item_id": f"msg_{pending.id}", "content_index": 0}


def _message(pending: PendingAnswers, status: Status, text: str | None = None) -> OutputMessage:
    content = [] if text is None else [OutputText(text=text)]
    return OutputMessage(id=f"msg_{pending.id}", status=status, content=content)


# --- route ------------------------------------------------------------------------------------------------------------


questions = router("infer")


@questions.post("/v1/responses", response_model=ResponseObject, responses=completions.EVENTS)
async def respond(body: ResponseRequest, view: View, asker: Asking) -> ResponseObject | StreamingResponse:
    """Answer a text or messages, also by calls of tools. Files and stored responses are not offered: they are 400."""
    chat = _chat(body)
    asked, tools, own = await completions.read_chat(asker, chat)
    options = await completions.options_of(view, chat, chat.max_tokens, 1, constraint=own)
    output = ResponseOutput(view, body, tools)
    if body.stream:
        return await completions.stream_events(asker, body, [asked], options, output.events)
    pending, (answer,) = await asker.answers("generate", body, [asked], options)
    return output.whole(pending, answer, output.items(pending, answer))


def _chat(body: ResponseRequest) -> ChatRequest:
    """The same request to `/v1/chat/completions`."""
    given: list[JsonObject] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    given += [{"role": "user", "content": body.input}] if isinstance(body.input, str) else _messages(body.input)
    asked: JsonObject = {"model": body.model, "messages": given, "max_tokens": body.max_output_tokens}
    asked |= {"temperature": body.temperature, "top_p": body.top_p}
    if body.tools:
        asked["tools"] = [_wrap_function(tool.model_dump(exclude={"type"}, exclude_none=True)) for tool in body.tools]
    choice = body.tool_choice
    if choice is not None:
        asked["tool_choice"] = choice if isinstance(choice, str) else _wrap_function({"name": choice.name})
    form = None if body.text is None else body.text.format
    if isinstance(form, SchemaFormat):
        given_form = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        asked["response_format"] = {"type": form.type, "json_schema": given_form}
    elif form is not None:
        asked["response_format"] = {"type": form.type}
    return ChatRequest.model_validate({key: value for key, value in asked.items() if value is not None})


def _messages(items: list[InputItem]) -> list[JsonObject]:
    """The items as messages: calls belong to the message of the assistant before them."""
    given: list[JsonObject] = []
    for item in items:
        if isinstance(item, InputMessage):
            given.append({"role": item.role, "content": _chat_content(item.content)})
        elif isinstance(item, CallOutput):
            output = _chat_content(item.output)
            given.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        else:
            call = _wrap_function({"name": item.name, "arguments": item.arguments}) | {"id": item.call_id}
            if not given or given[-1]["role"] != "assistant":
                given.append({"role": "assistant", "content": None})
            given[-1]["tool_calls"] = [*given[-1].get("tool_calls", []), call]
    return given


def _wrap_function(function: Mapping[str, Plain]) -> JsonObject:
    """A function as chats spell it, a level deeper."""
    return {"type": "function", "function": function}
