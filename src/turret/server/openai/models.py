"""`GET /v1/models`: the bases, and every adapter on them by name and by alias, in OpenAI's format; their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from typing import Annotated, Literal

from fastapi import Path, Request
from pydantic import BaseModel, Field

from turret.data import Prompt
from turret.data.conversations import turns_of
from turret.errors import BadRequest, NotFound
from turret.server import limits
from turret.server.engines import ServedBase
from turret.server.limits import MOST_TEXT
from turret.server.openai.completions import Message
from turret.server.questions import admit, count_tokens
from turret.server.routes import WHOLE, Model, Name, Text, View, router
from turret.store import Version
from turret.store.catalog import PRODUCTION
from turret.tasks.chat_template import base_prompt
from turret.transformer import Tokenizer

questions = router("infer")


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["turret"] = "turret"
    root: str = Field(description="The version that the id means here now, or the base.")
    parent: str | None = Field(description="The base of an adapter.")
    task: str | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


@questions.get("/v1/models")
async def list_models(view: View) -> ModelList:
    """The base, and every adapter on it: by name, and by each of its aliases."""
    versions = await view.control(view.workspace.list)
    bases = [_base(view, each.name) for each in view.engines.askable]
    return ModelList(data=[*bases, *_adapters(view, versions)])


@questions.get("/v1/models/{model:path}")
async def show_model(model: Annotated[str, Path(min_length=1, max_length=200)], view: View) -> ModelCard:
    """The base, or one version of an adapter."""
    if view.engines.is_base(model):
        return _base(view, model)
    return _card(view, model, await view.control(version_here, view, model))


def version_here(view: View, model: str) -> Version:
    """The version on a base of this server that a reference means here. Reads the store. Raises NotFound."""
    try:
        found = view.workspace.resolve(view.aliases.exact(model))
    except NotFound as error:
        raise view.missing_model(model, error) from None
    if not view.engines.is_on_base(found):
        raise NotFound(f"no {model} here: it was trained on another base than this server's")
    return found


def _base(view: View, name: str) -> ModelCard:
    return ModelCard(id=name, created=view.services.started_at, root=name, parent=None)


def _adapters(view: View, versions: Sequence[Version]) -> Iterator[ModelCard]:
    for name, group in groupby(versions, key=lambda version: version.name):  # `list` sorts by name and number
        by_number = {version.number: version for version in group}
        aliases = sorted(alias for version in by_number.values() for alias in version.aliases)
        meanings = {f"{name}@{alias}": view.aliases.version_of(name, alias) for alias in aliases}
        default = next((alias for alias in (view.aliases.alias, PRODUCTION) if alias in aliases), None)
        own = max((number for number, each in by_number.items() if each.comparison is None), default=None)
        plain = own if default is None else meanings[f"{name}@{default}"]
        for model, number in {name: plain, **meanings}.items():
            version = by_number.get(number or 0)
            if version is not None and view.engines.is_on_base(version):
                yield _card(view, model, version)


def _card(view: View, model: str, version: Version) -> ModelCard:
    created = int(datetime.fromisoformat(version.created).timestamp())
    task, base = version.task.get("kind"), view.engines.base_of_version(version)
    parent = None if base is None else base.name
    return ModelCard(id=model, created=created, root=str(version), parent=parent, task=task)


# --- tokenizer --------------------------------------------------------------------------------------------------------
# `POST /tokenize` and `/detokenize`: texts as a base's tokens and back, in vLLM's format.


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
    model: Name | None = None
    tokens: Annotated[
        list[Annotated[int, Field(ge=0, le=10_000_000), WHOLE]], Field(max_length=1 << 17, fail_fast=True)
    ]


class TokenIds(BaseModel):
    count: int
    max_model_len: int = Field(description="The most tokens of a prompt and its answer here.")
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str


@questions.post("/tokenize")
async def tokenize(body: TokenizeText | TokenizeMessages, view: View, request: Request) -> TokenIds:
    """The tokens of a text, or of messages by the base's chat template. An adapter's own template is not applied.

    It takes a request and its tokens from the caller's quota, and usage counts it, as a prompt.
    """
    await admit(view, request)
    base = await _base_of(view, body.model)
    ids = await view.parsing(_ids, base.tokenizer, body)
    count_tokens(view, request, len(ids))
    return TokenIds(
        count=len(ids),
        max_model_len=base.engine.longest,
        tokens=ids,
        token_strs=await view.parsing(_texts, base.tokenizer, ids) if body.return_token_strs else None,
    )


@questions.post("/detokenize")
async def detokenize(body: DetokenizeRequest, view: View, request: Request) -> Detokenized:
    """The text of tokens. A request and its tokens are taken from the caller's quota and counted, as of a prompt."""
    await admit(view, request)
    base = await _base_of(view, body.model)
    count_tokens(view, request, len(body.tokens))
    return Detokenized(prompt=await view.parsing(_text, base.tokenizer, body.tokens))


async def _base_of(view: View, model: str | None) -> ServedBase:
    """The base whose tokens a model has. Raises NotFound for a model that is not here."""
    if model is None or view.engines.is_base(model):
        return view.engines.base_of(model)
    base = view.engines.base_of_version(await view.control(version_here, view, model))
    assert base is not None  # `version_here` raises NotFound
    return base


def _ids(tokenizer: Tokenizer, body: TokenizeText | TokenizeMessages) -> list[int]:
    if isinstance(body, TokenizeText):
        special = body.add_special_tokens is not False
        return [int(each) for each in tokenizer(body.prompt, add_special_tokens=special, verbose=False)["input_ids"]]
    if not getattr(tokenizer, "chat_template", None):
        raise BadRequest("this base has no chat template: expected prompt, not messages")
    asked = Prompt(tuple(turns_of([message.known_fields() for message in body.messages]) or ()))
    if asked.characters > MOST_TEXT:
        raise BadRequest(f"the messages have {asked.characters} characters: expected at most {MOST_TEXT} in all")
    return base_prompt(tokenizer, asked, answering=body.add_generation_prompt is not False)


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    size = len(tokenizer)
    if wrong := next((each for each in ids if each >= size), None):
        raise NotFound(f"no token {wrong} in the vocabulary of this base: expected numbers from 0 to {size - 1}")
    return tokenizer.decode(list(ids))


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The vocabulary's name of each token."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [name or "" for name in names]  # a vocabulary may have gaps
