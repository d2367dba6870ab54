"""`POST /v1/classify`: labels with probabilities, in vLLM's format."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Request, Response
from pydantic import BaseModel, Field

from turret.server import limits
from turret.server.engine_protocol import Answer
from turret.server.pending_answers import usage
from turret.server.routes import State, Unit, router
from turret.server.schemas import USER, Model, Name, Text, Usage, User

questions = router("infer")


class ClassifyRequest(Model):
    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
    coverage: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Also answer with sets of labels that hold the right one with at least this probability."
    )
    user: User | None = Field(None, description=USER)

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class ClassifyData(BaseModel):
    index: int
    label: str | list[str] = Field(description="A list if the task has several labels per text.")
    probs: list[float]
    num_classes: int
    probabilities: dict[str, float] = Field(description="Label to probability, in the order of `probs`.")
    label_set: list[str] | None = Field(None, description="With `coverage`: the labels, the most probable first.")


class Classification(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifyData]
    usage: Usage | None = None


@questions.post("/v1/classify")
async def classify(
    body: ClassifyRequest, state: State, unit: Unit, request: Request, response: Response
) -> Classification:
    """Classify one text or many: a label for each, and the probabilities of all labels.

    With `coverage`, also a set of labels for each. A version without a calibration answers that with 409.
    """
    texts = body.texts()
    options = None if body.coverage is None else [state.options(coverage=body.coverage)] * len(texts)
    async with state.ask(request, "classify", body.model, texts, options, unit=unit or body.user) as pending:
        answers = await pending.all()
    response.headers.update(pending.headers)
    return Classification(
        id=f"classify-{pending.id}",
        created=state.now(),
        model=pending.model or body.model,
        data=[_data(index, answer) for index, answer in enumerate(answers)],
        usage=usage(answers),
    )


def _data(index: int, answer: Answer) -> ClassifyData:
    probabilities = answer["probabilities"]
    return ClassifyData(
        index=index,
        label=answer["label"],
        probs=list(probabilities.values()),
        num_classes=len(probabilities),
        probabilities=probabilities,
        label_set=answer.get("label_set"),
    )
