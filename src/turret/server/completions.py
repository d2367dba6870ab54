"""`POST /v1/completions`: texts that continue prompts, in OpenAI's format."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from turret.engine import Piece
from turret.json_types import JsonMapping
from turret.server.engine_protocol import Answer
from turret.server.generation import EVENTS, Chunk, options_of, repeated, stream, unknown_keys
from turret.server.pending_answers import usage
from turret.server.routes import State, Unit, router
from turret.server.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest

questions = router("infer")


@questions.post("/v1/completions", response_model=Completion, responses=EVENTS)
async def complete(
    body: CompletionRequest, state: State, unit: Unit, request: Request, response: Response
) -> Completion | StreamingResponse:
    """Continue prompts. With an adapter, each text goes through the template of the adapter's task."""
    ignored = unknown_keys(state, body)
    times = max(body.n or 1, body.best_of or 1)
    ranked = times > (body.n or 1)
    prompts = repeated(body.prompts(), times)
    logprobs = (body.logprobs or 0) if ranked else body.logprobs
    options = await options_of(
        state, body, body.max_tokens, len(prompts), times=times, strip=False, echo=body.echo, logprobs=logprobs
    )
    if body.stream:
        return await stream(state, request, body, prompts, options, unit, CompletionChunks(body.logprobs is not None))
    async with state.ask(request, "generate", body.model, prompts, options, unit=unit or body.user) as pending:
        answers = await pending.all()
    response.headers.update(pending.headers | ignored)
    given = most_probable(answers, times, body.n or 1) if ranked else answers
    choices = [
        CompletionChoice(
            index=index,
            text=answer["text"],
            logprobs=None if body.logprobs is None else token_logprobs(answer["logprobs"]),
            finish_reason=answer["finish_reason"],
        )
        for index, answer in enumerate(given)
    ]
    model = pending.model or body.model
    return Completion(id=f"cmpl-{pending.id}", created=state.now(), model=model, choices=choices, usage=usage(answers))


def most_probable(answers: Sequence[Answer], times: int, count: int) -> list[Answer]:
    """Of each `times` answers to one prompt, the `count` with the highest mean logprob of a token."""

    def mean(answer: Answer) -> float:
        steps = answer["logprobs"]
        return sum(step["logprob"] for step in steps) / len(steps) if steps else -math.inf

    groups = [answers[start : start + times] for start in range(0, len(answers), times)]
    return [answer for group in groups for answer in sorted(group, key=mean, reverse=True)[:count]]


def token_logprobs(steps: Sequence[JsonMapping], start: int = 0) -> CompletionLogprobs:
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


class CompletionChunks:
    """The chunks of a streamed completion. logprobs: whether the request wants them."""

    kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, logprobs: bool = False) -> None:
        self._logprobs = logprobs
        self._sent: Counter[int] = Counter()  # characters, by choice

    def begin(self, index: int) -> Chunk | None:
        return None

    def piece(self, index: int, piece: Piece) -> Chunk:
        said = token_logprobs(piece.logprobs, self._sent[index]).model_dump() if self._logprobs else None
        self._sent[index] += len(piece.text)
        return {"index": index, "text": piece.text, "logprobs": said, "finish_reason": None}

    def end(self, index: int, finish_reason: str | None) -> Sequence[Chunk]:
        return [{"index": index, "text": "", "logprobs": None, "finish_reason": finish_reason}]
