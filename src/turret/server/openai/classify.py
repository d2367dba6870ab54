"""`POST /v1/classify`: labels with probabilities, in vLLM's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from turret.data import TextPair
from turret.server import limits
from turret.server.engines import Input
from turret.server.questions import Asking, Reply, TokenUsage, abstaining, usage
from turret.server.routes import USER, Model, Name, Text, User, View, router
from turret.tasks.shapes import Answer

questions = router("infer")


class Pair(Model):
    """Two texts that are read together."""

    text: Text
    text_pair: Text


Asked = Text | Pair


class ClassifyRequest(Model):
    model: Name
    input: Asked | Annotated[list[Asked], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
    coverage: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Also answer with sets of labels that hold the right one with at least this probability."
    )
    user: User | None = Field(None, description=USER)

    def inputs(self) -> list[Input]:
        asked = self.input if isinstance(self.input, list) else [self.input]
        return [each if isinstance(each, str) else TextPair(each.text, each.text_pair) for each in asked]


class SpanData(BaseModel):
    label: str
    start: int = Field(description="Of the first character in the text, from 0.")
    end: int = Field(description="One past the last character.")
    text: str
    probability: float = Field(description="The mean of those of its words.")


class AnswerData(BaseModel):
    label: str
    probabilities: dict[str, float]


class ClassifyData(BaseModel):
    index: int
    label: str | list[str] | None = Field(default=None, description="A list if the task has several labels per text.")
    probs: list[float] | None = None
    num_classes: int | None = None
    probabilities: dict[str, float] | None = Field(
        default=None, description="Label to probability, in the order of `probs`."
    )
    value: float | None = Field(default=None, description="The number, if the task is regression.")
    spans: list[SpanData] | None = Field(
        default=None, description="The marked parts, if the task is token_classification."
    )
    answers: dict[str, AnswerData] | None = Field(
        default=None, description="The answer to each question, by its column, if the task is questions."
    )
    label_set: list[str] | None = Field(
        default=None, description="With `coverage`: the labels, the most probable first."
    )
    abstain: bool | None = Field(
        default=None,
        description="Whether the probability is below the threshold of the version's promise, so a person decides. "
        "Null without a promise.",
    )


class Classification(Reply):
    object: Literal["list"] = "list"
    data: list[ClassifyData]
    usage: TokenUsage | None = None


@questions.post("/v1/classify")
async def classify(body: ClassifyRequest, view: View, asker: Asking) -> Classification:
    """Classify one text or many: a label for each, and the probabilities of all labels.

    Versions of other tasks answer with a number, with spans, or with an answer to each of several questions.

    A version that reads pairs takes `{"text": …, "text_pair": …}` where others take a text.

    With `coverage`, also a set of labels for each. A version without a calibration answers that with 409.
    """
    inputs = body.inputs()
    options = None if body.coverage is None else [view.services.options(coverage=body.coverage)] * len(inputs)
    pending, answers = await asker.answers("classify", body, inputs, options)
    abstains = await abstaining(view, pending, answers)
    return Classification(
        **pending.reply("classify", body.model),
        data=[_data(index, answer, abstains) for index, answer in enumerate(answers)],
        usage=usage(answers),
    )


def _data(index: int, answer: Answer, abstains: Sequence[bool] | None) -> ClassifyData:
    if found := {key: value for key, value in answer.items() if key in ("value", "spans", "answers")}:
        return ClassifyData.model_validate({"index": index, **found})
    probabilities = answer["probabilities"]
    return ClassifyData(
        index=index,
        label=answer["label"],
        probs=list(probabilities.values()),
        num_classes=len(probabilities),
        probabilities=probabilities,
        label_set=answer.get("label_set"),
        abstain=None if abstains is None else abstains[index],
    )
