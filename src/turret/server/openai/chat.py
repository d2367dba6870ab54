"""`POST /v1/chat/completions`: messages become a prompt, and the prompt a completion, in OpenAI's format.

Messages to an adapter go through the template of its task, so the prompt has the tokens that the adapter was trained
with. Messages to the base go through its chat template; a base without one takes a single user message.
"""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from turret.data import Prompt
from turret.data.conversations import prompt_of, turns_of
from turret.engine import Piece
from turret.engine.constraint import Constraint
from turret.errors import BadRequest
from turret.json_types import JsonObject, Plain
from turret.server.engines import Input
from turret.server.generation import EVENTS, Chunk, constraint_of, options_of, repeated, stream, unknown_keys
from turret.server.limits import MOST_TEXT, MOST_TOOLS
from turret.server.openai import chat_schemas
from turret.server.questions import admit, ask, now, usage
from turret.server.routes import Unit, View, router
from turret.tasks.chat_template import ChatTemplate, base_prompt
from turret.tasks.shapes import TokenReport, reports_in
from turret.tasks.tool_calls import may_begin, read_calls

CALL_ID = 9  # characters: what templates that check the ids of calls ask for

questions = router("infer")


@questions.post("/v1/chat/completions", response_model=chat_schemas.ChatCompletion, responses=EVENTS)
async def chat(
    body: chat_schemas.ChatRequest, view: View, unit: Unit, request: Request, response: Response
) -> chat_schemas.ChatCompletion | StreamingResponse:
    """Continue a conversation with the assistant's next message."""
    ignored = unknown_keys(view, body)
    await admit(view, request)  # before the messages are tokenized
    called = body.tools and body.tool_choice != "none"
    tools = await view.parsing(ToolCalls, view, body) if called else None
    times = body.n or 1
    prompts = repeated([await view.parsing(prompt, view, body)], times)
    own = None if tools is None else await view.parsing(tools.constraint)
    if own is not None and await view.parsing(constraint_of, body) is not None:
        raise BadRequest("two constraints: a required call of a tool has its own, leave response_format out")
    most = body.max_completion_tokens or body.max_tokens
    options = await options_of(view, body, most, times, constraint=own)
    if body.stream:
        return await stream(view, request, body, prompts, options, unit, ChatChunks(bool(body.logprobs), tools))
    async with ask(view, request, "generate", body.model, prompts, options, unit=unit or body.user) as pending:
        answers = await pending.all()
    response.headers.update(pending.headers | ignored)
    choices = []
    for index, answer in enumerate(answers):
        message, reason = said(answer["text"], answer["finish_reason"], tools)
        found = token_logprobs(reports_in(answer)) if body.logprobs else None
        choices.append(chat_schemas.ChatChoice(index=index, message=message, logprobs=found, finish_reason=reason))
    model = pending.model or body.model
    return chat_schemas.ChatCompletion(
        id=f"chatcmpl-{pending.id}", created=now(), model=model, choices=choices, usage=usage(answers)
    )


def said(text: str, finish_reason: str | None, tools: ToolCalls | None) -> tuple[chat_schemas.ChatMessage, str | None]:
    """The assistant's message, and why it ended: with calls of tools apart from the text."""
    content, calls = (text, []) if tools is None else tools.read(text)
    if not calls:
        return chat_schemas.ChatMessage(role="assistant", content=text), finish_reason
    reason = "tool_calls" if finish_reason == "stop" else finish_reason
    return chat_schemas.ChatMessage(role="assistant", content=content.strip() or None, tool_calls=calls), reason


def prompt(view: View, body: chat_schemas.ChatRequest) -> Input:
    """The messages as one prompt: for the template of the adapter's task, or the tokens of the base's chat template."""
    asked = conversation(body)
    if asked.characters > MOST_TEXT:
        raise BadRequest(f"the messages have {asked.characters} characters: expected at most {MOST_TEXT} in all")
    if view.engines.is_base(body.model):
        tokenizer = view.engines.base_of(body.model).tokenizer
        if asked.text is None or getattr(tokenizer, "chat_template", None):
            return base_prompt(tokenizer, asked)
    return asked if asked.text is None else asked.text


def conversation(body: chat_schemas.ChatRequest) -> Prompt:
    """The messages and tools of a request as training reads them. Raises DataError."""
    turns = turns_of([message.known() for message in body.messages])
    tools = [tool.known() for tool in body.tools or ()] if body.tool_choice != "none" else []
    asked = prompt_of(turns or (), tools or None, None)
    if (size := len(asked.tools.encode())) > MOST_TOOLS:
        raise BadRequest(f"tools: they have {size} bytes, expected at most {MOST_TOOLS}: leave some out")
    return asked


def token_logprobs(steps: Sequence[TokenReport]) -> chat_schemas.ChatLogprobs:
    """Logprobs in the format of chats."""
    return chat_schemas.ChatLogprobs(
        content=[
            chat_schemas.TokenLogprob(
                **_top(step["token"], step["logprob"] or 0.0).model_dump(),
                top_logprobs=[_top(other["token"], other["logprob"]) for other in step["top"] or ()],
            )
            for step in steps
        ]
    )


def _top(text: str, logprob: float) -> chat_schemas.TopLogprob:
    return chat_schemas.TopLogprob(token=text, logprob=logprob, bytes=list(text.encode()))


class ToolCalls:
    """The calls of one request's tools.

    Raises:
        BadRequest: `tool_choice` names none of the tools.
    """

    def __init__(self, view: View, body: chat_schemas.ChatRequest) -> None:
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
            parameters = _moved(self._tools[name].parameters or {"type": "object"}, place)
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

    def read(self, text: str) -> tuple[str, list[chat_schemas.AnsweredCall]]:
        """The text before the first call, and the calls."""
        answer = read_calls(text, self._tools, self._form)
        calls = [
            chat_schemas.AnsweredCall(
                id=secrets.token_hex(5)[:CALL_ID],
                function=chat_schemas.AnsweredFunction(name=call.name, arguments=call.arguments),
            )
            for call in answer.calls
        ]
        return answer.content, calls


def _moved(schema: Plain, place: str) -> Plain:
    """A schema that stands at this place in another one: its references lead there."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _moved(value, place) for key, value in schema.items()}
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
        found = token_logprobs(piece.logprobs) if self._logprobs else None
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
        logprobs: chat_schemas.ChatLogprobs | None = None,
    ) -> Chunk:
        said = None if logprobs is None else logprobs.model_dump()
        return {"index": index, "delta": delta, "logprobs": said, "finish_reason": finish_reason}
