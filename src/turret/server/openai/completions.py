"""`POST /v1/completions`: texts that continue prompts, in OpenAI's format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Literal, Self

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from turret.server import limits
from turret.server.generation import EVENTS, CompletionChunks, options_of, repeated, stream, unknown_keys
from turret.server.questions import ask, now, usage
from turret.server.routes import SEVERAL, WHOLE, Generation, Text, Tokens, Unit, Usage, View, never_together, router
from turret.tasks.shapes import Answer, TokenReport, reports_in

questions = router("infer")


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
        | Annotated[list[Text], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
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

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [each for each in self.prompt if isinstance(each, int)]
        return [tokens] if tokens else [each for each in self.prompt if not isinstance(each, int)]


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


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str = Field(description="The version that answered, such as name@3.")
    choices: list[CompletionChoice]
    usage: Usage | None = None


@questions.post("/v1/completions", response_model=Completion, responses=EVENTS)
async def complete(
    body: CompletionRequest, view: View, unit: Unit, request: Request, response: Response
) -> Completion | StreamingResponse:
    """Continue prompts. With an adapter, each text goes through the template of the adapter's task."""
    ignored = unknown_keys(view, body)
    times = max(body.n or 1, body.best_of or 1)
    ranked = times > (body.n or 1)
    prompts = repeated(body.prompts(), times)
    logprobs = (body.logprobs or 0) if ranked else body.logprobs
    options = await options_of(
        view, body, body.max_tokens, len(prompts), times=times, strip=False, echo=body.echo, logprobs=logprobs
    )
    if body.stream:
        chunks = CompletionChunks(None if body.logprobs is None else token_logprobs)
        return await stream(view, request, body, prompts, options, unit, chunks)
    async with ask(view, request, "generate", body.model, prompts, options, unit=unit or body.user) as pending:
        answers = await pending.all()
    response.headers.update(pending.headers | ignored)
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
    model = pending.model or body.model
    return Completion(id=f"cmpl-{pending.id}", created=now(), model=model, choices=choices, usage=usage(answers))


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
