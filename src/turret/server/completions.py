"""`POST /v1/completions`: a prompt goes on, by an adapter or the base. Decode, call, encode."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from fastapi import Request, Response

from turret.server.generation import Chunk, options, several, stream
from turret.server.routes import Here, Unit, router, usage
from turret.server.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest

questions = router("infer")
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream."}
}


@questions.post("/v1/completions", response_model=Completion, responses=EVENTS)
async def complete(body: CompletionRequest, here: Here, unit: Unit, request: Request, response: Response) -> Any:
    """Texts that follow prompts; with an adapter each prompt is put as the adapter's task puts it."""
    texts = several(body, body.prompts())
    asking = options(here, body, body.max_tokens, len(texts))
    if body.stream:
        return await stream(here, request, body, texts, asking, unit, Pieces())
    async with here.ask(request, "generate", body.model, texts, asking, unit=unit or body.user) as asked:
        answers = await asked.all()
    response.headers.update(asked.headers)
    choices = [
        CompletionChoice(
            index=place, text=answer["text"], logprobs=logprobs(answer), finish_reason=answer["finish_reason"]
        )
        for place, answer in enumerate(answers)
    ]
    model = asked.model or here.base_id
    return Completion(id=f"cmpl-{asked.id}", created=here.now(), model=model, choices=choices, usage=usage(answers))


def logprobs(answer: dict[str, Any]) -> CompletionLogprobs | None:
    """The answer's in the shape of OpenAI's completions: where two tokens have one text, the more probable counts."""
    told = answer.get("logprobs")
    if told is None:
        return None
    tokens = [each["token"] for each in told]
    whole = "".join(tokens)
    blank = len(whole) - len(whole.lstrip())  # in front, which the answer's text leaves out
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[each["logprob"] for each in told],
        top_logprobs=[{other["token"]: other["logprob"] for other in reversed(each["top"])} for each in told],
        text_offset=[
            max(0, end - len(token) - blank) for end, token in zip(accumulate(map(len, tokens)), tokens, strict=True)
        ],
    )


class Pieces:
    """The chunks of a streamed completion."""

    object = "text_completion"
    prefix = "cmpl"

    def begin(self, index: int) -> Chunk | None:
        return None

    def piece(self, index: int, text: str) -> Chunk:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def end(self, index: int, finish_reason: str | None) -> Chunk:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish_reason}
