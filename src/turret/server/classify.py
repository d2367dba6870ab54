"""`POST /v1/classify`: labels with probabilities, in the shape vLLM uses. Decode, call, encode."""

from __future__ import annotations

from fastapi import Request, Response

from turret.server.pending_answers import Answer
from turret.server.routes import Here, Unit, router, usage
from turret.server.schemas import Classification, ClassifyData, ClassifyRequest

questions = router("infer")


@questions.post("/v1/classify")
async def classify(
    body: ClassifyRequest, here: Here, unit: Unit, request: Request, response: Response
) -> Classification:
    """Labels for one text or many, each with the probabilities of all labels."""
    async with here.ask(request, "classify", body.model, body.texts(), unit=unit or body.user) as asked:
        answers = await asked.all()
    response.headers.update(asked.headers)
    return Classification(
        id=f"classify-{asked.id}",
        created=here.now(),
        model=asked.model or here.base_id,
        data=[_data(place, answer) for place, answer in enumerate(answers)],
        usage=usage(answers),
    )


def _data(place: int, answer: Answer) -> ClassifyData:
    probabilities = answer["probabilities"]
    return ClassifyData(
        index=place,
        label=answer["label"],
        probs=list(probabilities.values()),
        num_classes=len(probabilities),
        probabilities=probabilities,
    )
