"""`POST /v1/completions`: texts that continue prompts, in OpenAI's format."""

from __future__ import annotations

from itertools import accumulate

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from turret.json_types import JsonObject
from turret.server.engine_protocol import Answer
from turret.server.generation import Chunk, generation_options, repeated, stream
from turret.server.routes import State, Unit, router, usage
from turret.server.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest

questions = router("infer")
EVENTS: dict[int | str, JsonObject] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream."}
}


@questions.post("/v1/completions", response_model=Completion, responses=EVENTS)
async def complete(
    body: CompletionRequest, state: State, unit: Unit, request: Request, response: Response
) -> Completion | StreamingResponse:
    """Continue prompts. With an adapter, each text goes through the template of the adapter's task."""
    prompts = repeated(body, body.prompts())
    options = generation_options(state, body, body.max_tokens, len(prompts))
    if body.stream:
        return await stream(state, request, body, prompts, options, unit, CompletionChunks())
    async with state.ask(request, "generate", body.model, prompts, options, unit=unit or body.user) as pending:
        answers = await pending.all()
    response.headers.update(pending.headers)
    choices = [
        CompletionChoice(
            index=index, text=answer["text"], logprobs=logprobs(answer), finish_reason=answer["finish_reason"]
        )
        for index, answer in enumerate(answers)
    ]
    model = pending.model or state.base_id
    return Completion(id=f"cmpl-{pending.id}", created=state.now(), model=model, choices=choices, usage=usage(answers))


def logprobs(answer: Answer) -> CompletionLogprobs | None:
    """The answer's logprobs in the format of completions. Of two tokens with one text, the more probable is kept."""
    steps = answer.get("logprobs")
    if steps is None:
        return None
    tokens = [step["token"] for step in steps]
    text = "".join(tokens)
    blanks = len(text) - len(text.lstrip())  # the answer's text starts after them
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[step["logprob"] for step in steps],
        top_logprobs=[{other["token"]: other["logprob"] for other in reversed(step["top"])} for step in steps],
        text_offset=[
            max(0, end - len(token) - blanks) for end, token in zip(accumulate(map(len, tokens)), tokens, strict=True)
        ],
    )


class CompletionChunks:
    """The chunks of a streamed completion."""

    kind = "text_completion"
    prefix = "cmpl"

    def begin(self, index: int) -> Chunk | None:
        return None

    def piece(self, index: int, text: str) -> Chunk:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def end(self, index: int, finish_reason: str | None) -> Chunk:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish_reason}
