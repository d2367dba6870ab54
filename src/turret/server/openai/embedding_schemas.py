"""Requests and responses of embeddings, scores, reranking and tokens, in the formats of OpenAI and vLLM."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from turret.families.family import Pooling
from turret.server import limits
from turret.server.openai.chat_schemas import Message
from turret.server.routes import USER, WHOLE, Model, Name, Text, Tokens, User
from turret.tasks import Embedding

Texts = Annotated[list[Text], Field(min_length=1, max_length=limits.MOST_INPUTS, fail_fast=True)]
POOLING = "The mean of all tokens, or the first or last one; default: as trained, else mean, or last for a decoder."
Pooled = Annotated[Pooling | None, Field(description=POOLING)]

Scoring = Annotated[
    Literal["cosine", "adapter"],
    Field(description="What a score is: the cosine of two embeddings, or the number of an adapter that reads both."),
]

# --- requests --------------------------------------------------------------------------------------------------------


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

    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str):
            return [self.input]
        tokens = [each for each in self.input if isinstance(each, int)]
        return [tokens] if tokens else [each for each in self.input if not isinstance(each, int)]

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


class TokenizeText(Model):
    model: Name | None = Field(None, description="An adapter or the base; both have the base's tokens.")
    prompt: Text
    add_special_tokens: bool | None = Field(None, description="Put the special tokens around the text; the default.")
    return_token_strs: bool | None = None


class TokenizeMessages(Model):
    """Messages go through the base's chat template."""

    model: Name | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MOST_MESSAGES, fail_fast=True)]
    add_generation_prompt: bool | None = Field(None, description="End with the start of an answer; the default.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Model):
    model_config = ConfigDict(extra="forbid", strict=True)
    model: Name | None = None
    tokens: Annotated[
        list[Annotated[int, Field(ge=0, le=10_000_000), WHOLE]], Field(max_length=1 << 17, fail_fast=True)
    ]


# --- responses -------------------------------------------------------------------------------------------------------


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingData(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str = Field(description="The version that answered, such as name@3.")
    data: list[EmbeddingData]
    usage: EmbeddingUsage


class Score(BaseModel):
    object: Literal["score"] = "score"
    index: int
    score: float


class Scores(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
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


class TokenIds(BaseModel):
    count: int
    max_model_len: int = Field(description="The most tokens of a prompt and its answer here.")
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str
