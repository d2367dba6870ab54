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
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from turret.data import TextPair
from turret.errors import BadRequest, TurretError
from turret.families.family import Pooling
from turret.server import limits
from turret.server.engines import Input
from turret.server.questions import Asker, Asking, PendingAnswers, Question, Reply, prompt_tokens, scores_pairs
from turret.server.routes import USER, WHOLE, Model, Name, Text, Texts, Tokens, User, View, inputs_in, router
from turret.tasks import Embedding
from turret.tasks.shapes import Answer

# --- schemas ----------------------------------------------------------------------------------------------------------
# Requests and responses of embeddings, scores and reranking, in the formats of OpenAI and vLLM.


POOLING = "The mean of all tokens, or the first or last one; default: as trained, else mean, or last for a decoder."
Pooled = Annotated[Pooling | None, Field(description=POOLING)]

Scoring = Annotated[
    Literal["cosine", "adapter"],
    Field(description="What a score is: the cosine of two embeddings, or the number of an adapter that reads both."),
]


class EmbeddingRequest(Model):
    model: Name
    input: Text | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1, max_length=limits.MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: little-endian float32, as OpenAI's clients read it."
    )
    dimensions: Annotated[int, Field(ge=1, le=1 << 16), WHOLE] | None = Field(
        None,
        description="The first so many numbers; default: as trained, else all. Useful only if it was trained for them.",
    )
    pooling: Pooled = None
    normalize: bool | None = Field(None, description="Scale to length 1; default: as trained, else yes.")
    user: User | None = Field(None, description=USER)

    def embedding(self) -> Embedding:
        return Embedding(self.pooling, self.dimensions, self.normalize)


class ScoreRequest(Model):
    model: Name
    text_1: Text | Texts = Field(description="One text, which is paired with each text_2, or as many as text_2.")
    text_2: Text | Texts
    pooling: Pooled = None
    user: User | None = Field(None, description=USER)

    def pairs(self) -> tuple[list[str], list[str]]:
        first, second = ([each] if isinstance(each, str) else each for each in (self.text_1, self.text_2))
        return first, second


class RerankRequest(Model):
    model: Name
    query: Text
    documents: Texts
    top_n: Annotated[int, Field(ge=0, le=limits.MOST_INPUTS), WHOLE] | None = Field(
        None, description="How many of the best to return; 0 or missing: all."
    )
    pooling: Pooled = None
    user: User | None = Field(None, description=USER)


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingData(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(Reply):
    object: Literal["list"] = "list"
    data: list[EmbeddingData]
    usage: EmbeddingUsage


class Score(BaseModel):
    object: Literal["score"] = "score"
    index: int
    score: float


class Scores(Reply):
    object: Literal["list"] = "list"
    scoring: Scoring
    data: list[Score]
    usage: EmbeddingUsage


class Document(BaseModel):
    text: str


class Ranked(BaseModel):
    index: int = Field(description="The place of the document in the request.")
    document: Document
    relevance_score: float


class Ranking(BaseModel):
    id: str
    model: str
    scoring: Scoring
    results: list[Ranked] = Field(description="The best first.")
    usage: EmbeddingUsage


# --- routes -----------------------------------------------------------------------------------------------------------


questions = router("infer")
Scored = tuple[list[float], Scoring, PendingAnswers, EmbeddingUsage]
Vectors = tuple[list[list[float]], PendingAnswers, EmbeddingUsage]


@questions.post("/v1/embeddings")
async def embed(body: EmbeddingRequest, asker: Asking) -> Embeddings:
    """One vector for each text, of the base or of an adapter. A text gets no template, only the special tokens."""
    vectors, pending, usage = await _vectors(asker, body, inputs_in(body.input), body.embedding())
    return Embeddings(
        **pending.reply("embd", body.model),
        data=[
            EmbeddingData(index=index, embedding=base64_vector(vector) if body.encoding_format == "base64" else vector)
            for index, vector in enumerate(vectors)
        ],
        usage=usage,
    )


@questions.post("/v1/score")
async def score(body: ScoreRequest, asker: Asking) -> Scores:
    """How alike the texts of each pair are: the cosine of their embeddings, from -1 to 1, or an adapter's number."""
    first, second = body.pairs()
    if len(first) not in (1, len(second)):
        raise BadRequest(
            f"text_1 has {len(first)} texts and text_2 has {len(second)}: expected one text_1, or as many as text_2"
        )
    pairs = list(zip(first if len(first) > 1 else first * len(second), second, strict=True))
    scores, scoring, pending, usage = await _scores(asker, body, pairs)
    return Scores(
        **pending.reply("score", body.model),
        scoring=scoring,
        data=[Score(index=index, score=each) for index, each in enumerate(scores)],
        usage=usage,
    )


@questions.post("/v1/rerank")
async def rerank(body: RerankRequest, asker: Asking) -> Ranking:
    """The documents by their cosine with the query, or by an adapter's number for both; the highest first."""
    pairs = [(body.query, each) for each in body.documents]
    scores, scoring, pending, usage = await _scores(asker, body, pairs)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    return Ranking(
        id=f"rerank-{pending.id}",
        model=pending.model or body.model,
        scoring=scoring,
        results=[
            Ranked(index=index, document=Document(text=body.documents[index]), relevance_score=scores[index])
            for index in order
        ],
        usage=usage,
    )


async def _scores(asker: Asker, body: ScoreRequest | RerankRequest, pairs: Sequence[tuple[str, str]]) -> Scored:
    """A number for each pair."""
    view = asker.view
    if await view.parsing(_gives_numbers, view, body.model):
        pending, answers = await asker.answers("classify", body, [TextPair(*pair) for pair in pairs])
        return [float(each["value"]) for each in answers], "adapter", pending, _usage(answers)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    vectors, pending, usage = await _vectors(asker, body, texts, Embedding(body.pooling, normalize=True))
    of = dict(zip(texts, vectors, strict=True))
    scores = await view.parsing(cosines, [of[a] for a, _ in pairs], [of[b] for _, b in pairs])
    return scores, "cosine", pending, usage


def _gives_numbers(view: View, model: str) -> bool:
    """Whether a model is a version that reads two texts together and answers with a number."""
    if view.engines.is_base(model):
        return False
    try:
        spec = view.workspace.resolve(view.aliases.exact(model)).task
    except TurretError:  # several adapters, or none of that name: asking says it
        return False
    return scores_pairs(spec)


def _usage(answers: Sequence[Answer]) -> EmbeddingUsage:
    read = sum(map(prompt_tokens, answers))
    return EmbeddingUsage(prompt_tokens=read, total_tokens=read)


async def _vectors(asker: Asker, body: Question, inputs: Sequence[Input], how: Embedding) -> Vectors:
    options = [asker.view.services.options(embedding=how)] * len(inputs)
    pending, answers = await asker.answers("embed", body, inputs, options)
    return [answer["embedding"] for answer in answers], pending, _usage(answers)


def cosines(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> list[float]:
    """The cosine of each pair of vectors of length 1, within [-1, 1]."""
    products = (sum(map(mul, a, b)) for a, b in zip(first, second, strict=True))
    return [min(1.0, max(-1.0, each)) for each in products]


def base64_vector(vector: Sequence[float]) -> str:
    """The numbers as base64 of little-endian float32."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
