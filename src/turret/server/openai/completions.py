"""`POST /v1/completions` and `/v1/chat/completions`: texts that continue prompts or chats, in OpenAI's format."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import accumulate
from typing import Annotated, Literal, Self, TypeAlias

from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.types import Receive, Scope, Send

from turret.data import Prompt
from turret.data.conversations import prompt_of, turns_of
from turret.engine import Piece, SamplingParams
from turret.engine.constraint import Constraint
from turret.errors import BadRequest, TurretError
from turret.json_types import JsonObject, Plain
from turret.server import limits
from turret.server.engines import Input
from turret.server.error_responses import error_response
from turret.server.limits import MOST_INPUTS, MOST_TEXT, MOST_TOOLS
from turret.server.questions import Asker, Asking, PendingAnswers, Question, Reply, TokenUsage, Update, admit, usage
from turret.server.routes import (
    NO_EFFECT,
    SEVERAL,
    WHOLE,
    Generation,
    Lenient,
    StructuredOutputs,
    Text,
    Texts,
    Tokens,
    View,
    inputs_in,
    never_together,
    router,
)
from turret.tasks.chat_template import ChatTemplate, base_prompt
from turret.tasks.shapes import Answer, TokenReport, reports_in
from turret.tasks.tool_calls import may_begin, read_calls

# --- every generation -------------------------------------------------------------------------------------------------
# What all generations share: their options, unknown keys of a request, and streams of server-sent events.


Chunk = JsonObject
Chunks: TypeAlias = "CompletionChunks | ChatChunks"
EVENTS: dict[int | str, JsonObject] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream."}
}
SHOWN_KEYS = 20  # unknown keys in a header
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,80}", re.ASCII)


class CompletionChunks:
    """The chunks of a streamed completion.

    Args:
        logprobs: Writes the logprobs of tokens, from so many characters of the text on; None for no logprobs.
    """

    kind = "text_completion"  # of the JSON `object`
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


def repeat_prompts(prompts: Sequence[Input], times: int) -> list[Input]:
    """Every prompt so many times, in the order of the choices. Raises BadRequest for more than the limit."""
    if len(prompts) * times > MOST_INPUTS:
        raise BadRequest(f"{len(prompts)} prompts times n = {times}: expected at most {MOST_INPUTS} choices in all")
    return [prompt for prompt in prompts for _ in range(times)]


def constraint_of(body: Generation) -> Constraint | None:
    """What the answer must look like. Raises BadRequest for two constraints, DataError for one that cannot be."""
    structured, asked = body.structured_outputs or StructuredOutputs.model_validate({}), body.response_format
    found: list[Constraint] = []
    if asked is not None and asked.type == "json_schema":
        given = asked.json_schema.schema_
        found.append(Constraint.json_object() if given is None else Constraint.json_schema(given))
    if (asked is not None and asked.type == "json_object") or structured.json_object:
        found.append(Constraint.json_object())
    if (schema := body.guided_json if structured.json_ is None else structured.json_) is not None:
        found.append(Constraint.json_schema(schema))
    if (regex := body.guided_regex if structured.regex is None else structured.regex) is not None:
        found.append(Constraint.regex(regex))
    if (choice := body.guided_choice if structured.choice is None else structured.choice) is not None:
        found.append(Constraint.choice(choice))
    if structured.grammar is not None:
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
    """The options of each choice. The choices of one prompt have consecutive seeds.

    Args:
        times: Choices of each prompt; `n` if None.
        constraint: What the answer must look like; None: what the request says, which is read on a thread.
        more: SamplingParams that the route sets.
    """
    forms = (body.response_format, body.structured_outputs, body.guided_json, body.guided_regex, body.guided_choice)
    if constraint is None and any(each is not None for each in forms):
        constraint = await view.parsing(constraint_of, body)
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
    asker: Asker, body: Generation, prompts: Sequence[Input], options: Sequence[SamplingParams], chunks: Chunks
) -> StreamingResponse:
    """Answer with chunks as OpenAI's API streams them."""
    headers, lines = unknown_keys(asker.view, body), partial(_lines, asker.view, body, chunks)
    return await stream_events(asker, body, prompts, options, lines, headers)


async def stream_events(
    asker: Asker,
    body: Question,
    prompts: Sequence[Input],
    options: Sequence[SamplingParams],
    lines: Callable[[PendingAnswers, AsyncIterator[Update]], AsyncIterator[str]],
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    """Submit the prompts, and start the response with the first word: an error before it has an HTTP status.

    Args:
        lines: Makes the events from the updates of the answers.
        headers: Added to those of the answers.
    """
    async with AsyncExitStack() as opened:
        pending = await opened.enter_async_context(asker.ask("generate", body, prompts, options))
        first, rest = await pending.first()
        return _EventStream(
            lines(pending, _chain_updates(first, rest)), pending.headers | (headers or {}), opened.pop_all()
        )


class _EventStream(StreamingResponse):
    """A stream of server-sent events. Closes what is `opened` at its end, also after a disconnect or an error."""

    def __init__(self, lines: AsyncIterator[str], headers: dict[str, str], opened: AsyncExitStack) -> None:
        more = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(lines, headers=headers | more, media_type="text/event-stream")
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._opened:
            await super().__call__(scope, receive, send)


async def _chain_updates(first: Update, rest: AsyncIterator[Update]) -> AsyncIterator[Update]:
    yield first
    async for update in rest:
        yield update


async def _lines(
    view: View, body: Generation, chunks: Chunks, pending: PendingAnswers, updates: AsyncIterator[Update]
) -> AsyncIterator[str]:
    head = pending.reply(chunks.prefix, body.model) | {"object": chunks.kind}
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


def _choices(pending: PendingAnswers, chunks: Chunks, begun: set[int], update: Update) -> Iterator[Chunk]:
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


questions = router("infer")


# --- completions ------------------------------------------------------------------------------------------------------


class CompletionRequest(Generation):
    model_config = ConfigDict(
        json_schema_extra=never_together(
            {"logprobs": {"type": "integer"}, "num_beams": SEVERAL},
            {"best_of": SEVERAL, "num_beams": SEVERAL},
            {"best_of": SEVERAL, "stream": {"const": True}},
            {"best_of": SEVERAL, "echo": {"const": True}},
            {"echo": {"const": True}, "num_beams": SEVERAL},
        )
        | {
            "if": {"required": ["max_tokens"], "properties": {"max_tokens": {"const": 0}}},
            "then": {"required": ["echo"], "properties": {"echo": {"const": True}}},
        }
    )
    prompt: (
        Text
        | Texts
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=limits.MOST_TOKENS), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=limits.MOST_CHOICES), WHOLE] | None = Field(
        None, description="Answers of each prompt, of which the n most probable by token are given. At least n."
    )
    echo: bool | None = Field(None, description="Begin each text, and its logprobs, with the prompt.")
    logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS), WHOLE] | None = None
    suffix: None = None

    def logprob_count(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        for key, given in (("num_beams", (self.num_beams or 1) > 1), ("stream", self.stream), ("echo", self.echo)):
            if given and (self.best_of or 1) > 1:
                raise ValueError(f"best_of does not work with {key}: leave out one of them")
        if self.echo and (self.num_beams or 1) > 1:
            raise ValueError("echo does not work with num_beams: leave out one of them")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 gives only the prompt: expected echo = true with it")
        return self


class CompletionLogprobs(BaseModel):
    """Logprobs by token of the answer; for each of them the most probable tokens at its position, by their text."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where each token begins in the text, in characters.")


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None


class Completion(Reply):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None


@questions.post("/v1/completions", response_model=Completion, responses=EVENTS)
async def complete(body: CompletionRequest, view: View, asker: Asking) -> Completion | StreamingResponse:
    """Continue prompts. With an adapter, each text goes through the template of the adapter's task."""
    ignored = unknown_keys(view, body)
    times = max(body.n or 1, body.best_of or 1)
    ranked = times > (body.n or 1)
    prompts = repeat_prompts(inputs_in(body.prompt), times)
    logprobs = (body.logprobs or 0) if ranked else body.logprobs
    options = await options_of(
        view, body, body.max_tokens, len(prompts), times=times, strip=False, echo=body.echo, logprobs=logprobs
    )
    if body.stream:
        chunks = CompletionChunks(None if body.logprobs is None else token_logprobs)
        return await stream(asker, body, prompts, options, chunks)
    pending, answers = await asker.answers("generate", body, prompts, options)
    asker.response.headers.update(ignored)
    given = most_probable(answers, times, body.n or 1) if ranked else answers
    choices = [
        CompletionChoice(
            index=index,
            text=answer["text"],
            logprobs=None if body.logprobs is None else token_logprobs(reports_in(answer)),
            finish_reason=answer["finish_reason"],
        )
        for index, answer in enumerate(given)
    ]
    return Completion(**pending.reply("cmpl", body.model), choices=choices, usage=usage(answers))


def most_probable(answers: Sequence[Answer], times: int, count: int) -> list[Answer]:
    """Of each `times` answers to one prompt, the `count` with the highest mean logprob of a token."""

    def mean(answer: Answer) -> float:
        steps = reports_in(answer)
        return sum(step["logprob"] or 0.0 for step in steps) / len(steps) if steps else -math.inf

    groups = [answers[start : start + times] for start in range(0, len(answers), times)]
    return [answer for group in groups for answer in sorted(group, key=mean, reverse=True)[:count]]


def token_logprobs(steps: Sequence[TokenReport], start: int = 0) -> CompletionLogprobs:
    """Logprobs in the format of completions. Of two tokens with one text, the more probable is kept.

    Args:
        start: Characters of the text before the first token.
    """
    tokens = [step["token"] for step in steps]
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[step["logprob"] for step in steps],
        top_logprobs=[
            None if step["top"] is None else {other["token"]: other["logprob"] for other in reversed(step["top"])}
            for step in steps
        ],
        text_offset=list(accumulate(map(len, tokens[:-1]), initial=start)) if tokens else [],
    )


# --- chat -------------------------------------------------------------------------------------------------------------
# Messages become a prompt, and the prompt a completion, in OpenAI's format.
#
# Messages to an adapter go through the template of its task, so the prompt has the tokens that the adapter was trained
# with. Messages to the base go through its chat template; a base without one takes a single user message.


# --- requests and responses of chats ----------------------------------------------------------------------------------
# In OpenAI's format. Unknown keys are kept, to be named.


class Part(Lenient):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[Part], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]
ToolName = Annotated[str, Field(min_length=1, max_length=256)]


class Said(Lenient):
    role: Literal["system", "developer", "user"]
    content: Content
    name: Annotated[str, Field(max_length=256)] | None = Field(None, description="Accepted and ignored.")


class CalledFunction(Lenient):
    name: ToolName
    arguments: Text = Field(description="A JSON object as text.")


class ToolCall(Lenient):
    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"]
    function: CalledFunction


class Answered(Lenient):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.MOST_MESSAGES, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = Field(None, description="Accepted and ignored.")


class ToolResult(Lenient):
    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    name: ToolName | None = None


Message = Annotated[Said | Answered | ToolResult, Field(discriminator="role")]


class Function(Lenient):
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema.")
    strict: bool | None = Field(None, description="The schema is enforced if a call is required.", exclude=True)


class Tool(Lenient):
    type: Literal["function"]
    function: Function


class NamedFunction(Lenient):
    name: ToolName


class NamedTool(Lenient):
    type: Literal["function"]
    function: NamedFunction


TRUE: JsonObject = {"const": True}
CHOICE_NEEDS_TOOLS: JsonObject = {
    "if": {"required": ["tool_choice"], "properties": {"tool_choice": {"not": {"enum": [None, "none", "auto"]}}}},
    "then": {"required": ["tools"], "properties": {"tools": {"type": "array", "minItems": 1}}},
}


class ChatRequest(Generation):
    model_config = ConfigDict(
        json_schema_extra=never_together({"logprobs": TRUE, "num_beams": SEVERAL})
        | {
            "anyOf": [
                {"properties": {"top_logprobs": {"type": "null"}}},
                {"required": ["logprobs"], "properties": {"logprobs": TRUE}},
            ],
        }
        | CHOICE_NEEDS_TOOLS
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=limits.MOST_MESSAGES, fail_fast=True)] | None = Field(
        None, description="Written into the prompt, as in training. Calls in the answer are its `tool_calls`."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="`required`, or a tool: the answer is a call whose arguments fit the tool's schema."
    )
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)
    max_tokens: Annotated[int, Field(ge=1, le=limits.MOST_TOKENS), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=limits.MOST_TOKENS), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MOST_LOGPROBS), WHOLE] | None = Field(
        None, description="Only with logprobs."
    )

    def logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs need logprobs: set it to true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools: give them, or leave it out")
        return self


class AnsweredCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class AnsweredFunction(BaseModel):
    name: str
    arguments: str = Field(description="A JSON object as text.")


class ChatMessage(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None


class ChatCompletion(Reply):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: TokenUsage | None = None


# --- chats ------------------------------------------------------------------------------------------------------------


CALL_ID = 9  # characters: what templates that check the ids of calls ask for


@questions.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENTS)
async def chat(body: ChatRequest, view: View, asker: Asking) -> ChatCompletion | StreamingResponse:
    """Continue a conversation with the assistant's next message."""
    ignored = unknown_keys(view, body)
    times = body.n or 1
    asked, tools, own = await read_chat(asker, body)
    prompts = repeat_prompts([asked], times)
    if own is not None and await view.parsing(constraint_of, body) is not None:
        raise BadRequest("two constraints: a required call of a tool has its own, leave response_format out")
    most = body.max_completion_tokens or body.max_tokens
    options = await options_of(view, body, most, times, constraint=own)
    if body.stream:
        return await stream(asker, body, prompts, options, ChatChunks(bool(body.logprobs), tools))
    pending, answers = await asker.answers("generate", body, prompts, options)
    asker.response.headers.update(ignored)
    choices = []
    for index, answer in enumerate(answers):
        message, reason = assistant_message(answer["text"], answer["finish_reason"], tools)
        found = chat_logprobs(reports_in(answer)) if body.logprobs else None
        choices.append(ChatChoice(index=index, message=message, logprobs=found, finish_reason=reason))
    return ChatCompletion(**pending.reply("chatcmpl", body.model), choices=choices, usage=usage(answers))


async def read_chat(asker: Asker, body: ChatRequest) -> tuple[Input, ToolCalls | None, Constraint | None]:
    """The messages as one prompt, the calls that the answer may hold, and what a required call must look like."""
    view = asker.view
    await admit(view, asker.request)  # before the messages are tokenized
    called = body.tools and body.tool_choice != "none"
    tools = await view.parsing(ToolCalls, view, body) if called else None
    asked = await view.parsing(prompt, view, body)
    return asked, tools, None if tools is None else await view.parsing(tools.constraint)


def assistant_message(text: str, finish_reason: str | None, tools: ToolCalls | None) -> tuple[ChatMessage, str | None]:
    """The assistant's message, and why it ended: with calls of tools apart from the text."""
    content, calls = (text, []) if tools is None else tools.read(text)
    if not calls:
        return ChatMessage(role="assistant", content=text), finish_reason
    reason = "tool_calls" if finish_reason == "stop" else finish_reason
    return ChatMessage(role="assistant", content=content.strip() or None, tool_calls=calls), reason


def prompt(view: View, body: ChatRequest) -> Input:
    """The messages as one prompt: for the template of the adapter's task, or the tokens of the base's chat template."""
    asked = conversation(body)
    if asked.characters > MOST_TEXT:
        raise BadRequest(f"the messages have {asked.characters} characters: expected at most {MOST_TEXT} in all")
    if view.engines.is_base(body.model):
        tokenizer = view.engines.base_of(body.model).tokenizer
        if asked.text is None or getattr(tokenizer, "chat_template", None):
            return base_prompt(tokenizer, asked)
    return asked if asked.text is None else asked.text


def conversation(body: ChatRequest) -> Prompt:
    """The messages and tools of a request as training reads them. Raises DataError."""
    turns = turns_of([message.known_fields() for message in body.messages])
    tools = [tool.known_fields() for tool in body.tools or ()] if body.tool_choice != "none" else []
    asked = prompt_of(turns or (), tools or None, None)
    if (size := len(asked.tools.encode())) > MOST_TOOLS:
        raise BadRequest(f"tools: they have {size} bytes, expected at most {MOST_TOOLS}: leave some out")
    return asked


def chat_logprobs(steps: Sequence[TokenReport]) -> ChatLogprobs:
    """Logprobs in the format of chats."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                **_top(step["token"], step["logprob"] or 0.0).model_dump(),
                top_logprobs=[_top(other["token"], other["logprob"]) for other in step["top"] or ()],
            )
            for step in steps
        ]
    )


def _top(text: str, logprob: float) -> TopLogprob:
    return TopLogprob(token=text, logprob=logprob, bytes=list(text.encode()))


class ToolCalls:
    """The calls of one request's tools.

    Raises:
        BadRequest: `tool_choice` names none of the tools.
    """

    def __init__(self, view: View, body: ChatRequest) -> None:
        self._tools = {tool.function.name: tool.function for tool in body.tools or ()}
        self._template = ChatTemplate(view.base_of(body.model).tokenizer)
        self._form = self._template.call_format
        choice = body.tool_choice
        self._callable = list(self._tools)
        if choice is not None and not isinstance(choice, str):
            if choice.function.name not in self._tools:
                raise BadRequest(f"tool_choice: {ascii(choice.function.name)[:60]} is none of the tools")
            self._callable = [choice.function.name]
        self._must = choice not in (None, "auto")

    def constraint(self) -> Constraint | None:
        """One call as the base's chat template writes it, with arguments that fit; None if a call is not required."""
        if not self._must:
            return None
        several, key = len(self._callable) > 1, self._form.key
        calls = []
        for number, name in enumerate(self._callable):
            place = f"#{f'/anyOf/{number}' if several else ''}/properties/{key}"
            parameters = _move_references(self._tools[name].parameters or {"type": "object"}, place)
            properties = {"name": {"const": name}, key: parameters}
            call: JsonObject = {"type": "object", "properties": properties, "required": ["name", key]}
            calls.append(call | {"additionalProperties": False})
        return Constraint.json_between(
            self._template.in_ids(self._form.before),
            {"anyOf": calls} if several else calls[0],
            self._template.in_ids(self._form.after),
            "the schema of a tool",
        )

    def may_begin(self, text: str) -> int:
        """Where a call may begin in a text, at the earliest."""
        return may_begin(text, self._form)

    def read(self, text: str) -> tuple[str, list[AnsweredCall]]:
        """The text before the first call, and the calls."""
        answer = read_calls(text, self._tools, self._form)
        calls = [
            AnsweredCall(
                id=secrets.token_hex(5)[:CALL_ID],
                function=AnsweredFunction(name=call.name, arguments=call.arguments),
            )
            for call in answer.calls
        ]
        return answer.content, calls


def _move_references(schema: Plain, place: str) -> Plain:
    """A schema that stands at this place in another one: its references lead there."""
    if isinstance(schema, list):
        return [_move_references(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _move_references(value, place) for key, value in schema.items()}
    reference = found.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        found["$ref"] = place + reference[1:]
    return found


class ChatChunks:
    """The chunks of a streamed chat. Where a call of a tool may begin, the text is held back until the end."""

    kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, logprobs: bool = False, tools: ToolCalls | None = None) -> None:
        self._logprobs, self._tools = logprobs, tools
        self._texts: defaultdict[int, str] = defaultdict(str)
        self._sent: Counter[int] = Counter()  # characters, by choice

    def begin(self, index: int) -> Chunk | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, piece: Piece) -> Chunk:
        text = piece.text
        if self._tools is not None:
            self._texts[index] += text
            text = self._new(index, self._tools.may_begin(self._texts[index]))
        found = chat_logprobs(piece.logprobs) if self._logprobs else None
        return self._chunk(index, {"content": text}, logprobs=found)

    def end(self, index: int, finish_reason: str | None) -> Sequence[Chunk]:
        chunks: list[Chunk] = []
        whole = self._texts[index]
        if self._tools is not None:
            content, calls = self._tools.read(whole)
            if rest := self._new(index, len(content.rstrip() if calls else whole)):
                chunks.append(self._chunk(index, {"content": rest}))
            listed = [{"index": place, **call.model_dump()} for place, call in enumerate(calls)]
            if calls:
                chunks.append(self._chunk(index, {"tool_calls": listed}))
                finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
        return [*chunks, self._chunk(index, {}, finish_reason)]

    def _new(self, index: int, end: int) -> str:
        """The text up to a character that was not sent yet."""
        start = self._sent[index]
        self._sent[index] = max(start, end)
        return self._texts[index][start:end]

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Plain],
        finish_reason: str | None = None,
        logprobs: ChatLogprobs | None = None,
    ) -> Chunk:
        said = None if logprobs is None else logprobs.model_dump()
        return {"index": index, "delta": delta, "logprobs": said, "finish_reason": finish_reason}
