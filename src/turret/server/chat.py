"""`POST /v1/chat/completions`: messages become a prompt, and the prompt a completion, in OpenAI's format.

Messages to an adapter go through the template of its task, so the prompt has the tokens that the adapter was trained
with. Messages to the base go through its chat template; a base without one takes a single user message.
"""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from turret.data import Prompt
from turret.data.cells import Replacements
from turret.data.conversations import prompt_of, turns_of
from turret.errors import BadRequest
from turret.json_types import JsonMapping
from turret.server import schemas
from turret.server.completions import EVENTS
from turret.server.engine_protocol import Answer, Input
from turret.server.generation import Chunk, generation_options, repeated, stream
from turret.server.limits import MOST_TEXT
from turret.server.routes import State, Unit, router, usage
from turret.server.state import ServerState

questions = router("infer")


@questions.post("/v1/chat/completions", response_model=schemas.ChatCompletion, responses=EVENTS)
async def chat(
    body: schemas.ChatRequest, state: State, unit: Unit, request: Request, response: Response
) -> schemas.ChatCompletion | StreamingResponse:
    """Continue a conversation with the assistant's next message."""
    prompts = repeated(body, [await state.parsing(prompt, state, body)])
    options = generation_options(state, body, body.max_completion_tokens or body.max_tokens, len(prompts))
    if body.stream:
        return await stream(state, request, body, prompts, options, unit, ChatChunks())
    async with state.ask(request, "generate", body.model, prompts, options, unit=unit or body.user) as pending:
        answers = await pending.all()
    response.headers.update(pending.headers)
    choices = [
        schemas.ChatChoice(
            index=index,
            message=schemas.ChatMessage(role="assistant", content=answer["text"]),
            logprobs=logprobs(answer),
            finish_reason=answer["finish_reason"],
        )
        for index, answer in enumerate(answers)
    ]
    model = pending.model or state.base_id
    return schemas.ChatCompletion(
        id=f"chatcmpl-{pending.id}", created=state.now(), model=model, choices=choices, usage=usage(answers)
    )


def prompt(state: ServerState, body: schemas.ChatRequest) -> Input:
    """The messages as one prompt: for the template of the adapter's task, or the tokens of the base's chat template."""
    asked = conversation(body)
    if asked.characters > MOST_TEXT:
        raise BadRequest(f"the messages have {asked.characters} characters: expected at most {MOST_TEXT} in all")
    if not state.is_base(body.model):
        return asked if asked.text is None else asked.text
    tokenizer = state.engine.base.tokenizer
    if asked.tools or any(turn.tool_calls or turn.role == "tool" for turn in asked.turns):
        return asked
    if getattr(tokenizer, "chat_template", None):
        try:
            ids = tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in asked.turns],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:  # a template may raise anything, for example for roles in the wrong order
            raise BadRequest(f"the base's chat template does not accept these messages: {error}") from None
        return [int(token) for token in ids]
    if asked.text is not None:
        return asked.text
    raise BadRequest("this base has no chat template: expected one user message")


def conversation(body: schemas.ChatRequest) -> Prompt:
    """The messages and tools of a request as training reads them. Raises DataError."""
    turns = turns_of([message.model_dump(exclude_none=True) for message in body.messages], Replacements())
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return prompt_of(turns or (), tools or None, None)


def logprobs(answer: Answer) -> schemas.ChatLogprobs | None:
    """The answer's logprobs in the format of chats."""
    steps = answer.get("logprobs")
    if steps is None:
        return None
    return schemas.ChatLogprobs(
        content=[
            schemas.TokenLogprob(**_top(step).model_dump(), top_logprobs=[_top(other) for other in step["top"]])
            for step in steps
        ]
    )


def _top(token: JsonMapping) -> schemas.TopLogprob:
    return schemas.TopLogprob(token=token["token"], logprob=token["logprob"], bytes=list(token["token"].encode()))


class ChatChunks:
    """The chunks of a streamed chat."""

    kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def begin(self, index: int) -> Chunk | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str) -> Chunk:
        return self._chunk(index, {"content": text})

    def end(self, index: int, finish_reason: str | None) -> Chunk:
        return self._chunk(index, {}, finish_reason)

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> Chunk:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
