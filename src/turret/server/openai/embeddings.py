"""`POST /v1/embeddings`, `/v1/score` and `/v1/rerank`: vectors of texts, and what two texts have to do with each other.

That is the number of an adapter which reads two texts together, such as one of the task `rerank`; else the cosine of
their vectors.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from operator import mul

from fastapi import Request, Response

from turret.data import TextPair
from turret.errors import BadRequest, TurretError
from turret.families.family import Pooling
from turret.server.engines import Input
from turret.server.openai import embedding_schemas as schemas
from turret.server.questions import PendingAnswers, ask, now, prompt_tokens, scores_pairs
from turret.server.routes import Unit, View, router
from turret.tasks import Embedding
from turret.tasks.shapes import Answer

questions = router("infer")
Scores = tuple[list[float], schemas.Scoring, PendingAnswers, schemas.EmbeddingUsage]
Vectors = tuple[list[list[float]], PendingAnswers, schemas.EmbeddingUsage]


@questions.post("/v1/embeddings")
async def embed(
    body: schemas.EmbeddingRequest, view: View, unit: Unit, request: Request, response: Response
) -> schemas.Embeddings:
    """One vector for each text, of the base or of an adapter. A text gets no template, only the special tokens."""
    vectors, pending, usage = await _vectors(
        view, request, response, body.model, body.inputs(), body.embedding(), unit or body.user
    )
    return schemas.Embeddings(
        id=f"embd-{pending.id}",
        created=now(),
        model=pending.model or body.model,
        data=[
            schemas.EmbeddingData(index=index, embedding=packed(vector) if body.encoding_format == "base64" else vector)
            for index, vector in enumerate(vectors)
        ],
        usage=usage,
    )


@questions.post("/v1/score")
async def score(
    body: schemas.ScoreRequest, view: View, unit: Unit, request: Request, response: Response
) -> schemas.Scores:
    """How alike the texts of each pair are: the cosine of their embeddings, from -1 to 1, or an adapter's number."""
    first, second = body.pairs()
    if len(first) not in (1, len(second)):
        raise BadRequest(
            f"text_1 has {len(first)} texts and text_2 has {len(second)}: expected one text_1, or as many as text_2"
        )
    pairs = list(zip(first if len(first) > 1 else first * len(second), second, strict=True))
    scores, scoring, pending, usage = await _scores(
        view, request, response, body.model, pairs, body.pooling, unit or body.user
    )
    return schemas.Scores(
        id=f"score-{pending.id}",
        created=now(),
        model=pending.model or body.model,
        scoring=scoring,
        data=[schemas.Score(index=index, score=each) for index, each in enumerate(scores)],
        usage=usage,
    )


@questions.post("/v1/rerank")
async def rerank(
    body: schemas.RerankRequest, view: View, unit: Unit, request: Request, response: Response
) -> schemas.Ranking:
    """The documents by their cosine with the query, or by an adapter's number for both; the highest first."""
    pairs = [(body.query, each) for each in body.documents]
    scores, scoring, pending, usage = await _scores(
        view, request, response, body.model, pairs, body.pooling, unit or body.user
    )
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    return schemas.Ranking(
        id=f"rerank-{pending.id}",
        model=pending.model or body.model,
        scoring=scoring,
        results=[
            schemas.Ranked(
                index=index, document=schemas.Document(text=body.documents[index]), relevance_score=scores[index]
            )
            for index in order
        ],
        usage=usage,
    )


async def _scores(
    view: View,
    request: Request,
    response: Response,
    model: str,
    pairs: Sequence[tuple[str, str]],
    pooling: Pooling | None,
    unit: str | None,
) -> Scores:
    """A number for each pair."""
    if await view.parsing(_gives_numbers, view, model):
        inputs = [TextPair(*pair) for pair in pairs]
        async with ask(view, request, "classify", model, inputs, unit=unit) as pending:
            answers: list[Answer] = await pending.all()
        response.headers.update(pending.headers)
        return [float(each["value"]) for each in answers], "adapter", pending, _usage(answers)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    vectors, pending, usage = await _vectors(
        view, request, response, model, texts, Embedding(pooling, normalize=True), unit
    )
    of = dict(zip(texts, vectors, strict=True))
    scores = await view.parsing(cosines, [of[a] for a, _ in pairs], [of[b] for _, b in pairs])
    return scores, "cosine", pending, usage


def _gives_numbers(view: View, model: str) -> bool:
    """Whether a model is a version that reads two texts together and answers with a number."""
    if view.engines.is_base(model):
        return False
    try:
        spec = view.workspace.resolve(model).task
    except TurretError:  # several adapters, or none of that name: asking says it
        return False
    return scores_pairs(spec)


def _usage(answers: Sequence[Answer]) -> schemas.EmbeddingUsage:
    read = sum(map(prompt_tokens, answers))
    return schemas.EmbeddingUsage(prompt_tokens=read, total_tokens=read)


async def _vectors(
    view: View,
    request: Request,
    response: Response,
    model: str,
    inputs: Sequence[Input],
    how: Embedding,
    unit: str | None,
) -> Vectors:
    options = [view.services.options(embedding=how)] * len(inputs)
    async with ask(view, request, "embed", model, inputs, options, unit=unit) as pending:
        answers: list[Answer] = await pending.all()
    response.headers.update(pending.headers)
    return [answer["embedding"] for answer in answers], pending, _usage(answers)


def cosines(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> list[float]:
    """The cosine of each pair of vectors of length 1, within [-1, 1]."""
    products = (sum(map(mul, a, b)) for a, b in zip(first, second, strict=True))
    return [min(1.0, max(-1.0, each)) for each in products]


def packed(vector: Sequence[float]) -> str:
    """The numbers as base64 of little-endian float32."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
