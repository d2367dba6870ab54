"""`POST /v1/classify`: labels with probabilities, in vLLM's format."""

from __future__ import annotations

from fastapi import Request, Response

from turret.server.engine_protocol import Answer
from turret.server.pending_answers import usage
from turret.server.routes import State, Unit, router
from turret.server.schemas import Classification, ClassifyData, ClassifyRequest

questions = router("infer")


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
