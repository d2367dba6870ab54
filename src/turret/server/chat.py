"""`POST /v1/chat/completions`: messages become a prompt, then it is a completion. Decode, call, encode.

One user message to an adapter goes through the adapter's own template: it was trained so. Everything else goes through
the base's chat template, as tokens; without one there is no honest way to put several messages, and that is said.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from turret.errors import BadRequest
from turret.server.completions import EVENTS
from turret.server.engine_protocol import Text
from turret.server.generation import Chunk, options, several, stream
from turret.server.limits import MOST_TEXT
from turret.server.routes import Here, Unit, router, usage
from turret.server.schemas import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Message,
    TokenLogprob,
    TopLogprob,
)
from turret.server.state import ServerState

questions = router("infer")


@questions.post("/v1/chat/completions", response_model=ChatCompletion, responses=EVENTS)
async def chat(body: ChatRequest, here: Here, unit: Unit, request: Request, response: Response) -> Any:
    """What the assistant says next."""
    texts = several(body, [await here.reading(prompt, here, body.model, body.messages)])
    asking = options(here, body, body.max_completion_tokens or body.max_tokens, len(texts))
    if body.stream:
        return await stream(here, request, body, texts, asking, unit, Deltas())
    async with here.ask(request, "generate", body.model, texts, asking, unit=unit or body.user) as asked:
        answers = await asked.all()
    response.headers.update(asked.headers)
    said = [ChatMessage(role="assistant", content=answer["text"]) for answer in answers]
    choices = [
        ChatChoice(index=place, message=message, logprobs=logprobs(answer), finish_reason=answer["finish_reason"])
        for place, (message, answer) in enumerate(zip(said, answers, strict=True))
    ]
    model = asked.model or here.base_id
    return ChatCompletion(
        id=f"chatcmpl-{asked.id}", created=here.now(), model=model, choices=choices, usage=usage(answers)
    )


def prompt(here: ServerState, model: str, messages: list[Message]) -> Text:
    """The messages as one prompt: a text for the adapter's template, or tokens of the base's chat template."""
    alone = len(messages) == 1 and messages[0].role == "user"
    if alone and model != here.base_id:
        return messages[0].text()
    tokenizer = here.engine.base.tokenizer
    if getattr(tokenizer, "chat_template", None):
        if (characters := sum(len(message.text()) for message in messages)) > MOST_TEXT:
            raise BadRequest(f"the messages have {characters} characters: expected at most {MOST_TEXT} in all")
        said = [
            {"role": message.role.replace("developer", "system"), "content": message.text()} for message in messages
        ]
        try:
            ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # a template raises what it likes: roles out of order, no place for a system message
            raise BadRequest(f"the base's chat template does not take these messages: {error}") from None
        return [int(token) for token in ids]
    if alone:
        return messages[0].text()
    raise BadRequest("this base has no chat template: expected one user message")


def logprobs(answer: dict[str, Any]) -> ChatLogprobs | None:
    """The answer's in the shape of OpenAI's chats; the bytes are those of the token's text."""
    told = answer.get("logprobs")
    if told is None:
        return None
    return ChatLogprobs(
        content=[
            TokenLogprob(**_top(each).model_dump(), top_logprobs=[_top(other) for other in each["top"]])
            for each in told
        ]
    )


def _top(each: dict[str, Any]) -> TopLogprob:
    return TopLogprob(token=each["token"], logprob=each["logprob"], bytes=list(each["token"].encode()))


class Deltas:
    """The chunks of a streamed chat."""

    object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def begin(self, index: int) -> Chunk | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str) -> Chunk:
        return self._chunk(index, {"content": text})

    def end(self, index: int, finish_reason: str | None) -> Chunk:
        return self._chunk(index, {}, finish_reason)

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> Chunk:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
