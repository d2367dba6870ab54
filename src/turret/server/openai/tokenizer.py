"""`POST /tokenize` and `/detokenize`: texts as a base's tokens and back, in vLLM's format."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request

from turret.data import Prompt
from turret.data.conversations import turns_of
from turret.errors import BadRequest, NotFound
from turret.server.engines import ServedBase
from turret.server.limits import MOST_TEXT
from turret.server.openai import embedding_schemas as schemas
from turret.server.openai.models import version_here
from turret.server.questions import admit, count_tokens
from turret.server.routes import View, router
from turret.tasks.chat_template import base_prompt
from turret.transformer import Tokenizer

questions = router("infer")


@questions.post("/tokenize")
async def tokenize(
    body: schemas.TokenizeText | schemas.TokenizeMessages, view: View, request: Request
) -> schemas.TokenIds:
    """The tokens of a text, or of messages by the base's chat template. An adapter's own template is not applied.

    It takes a request and its tokens from the caller's quota, and usage counts it, as a prompt.
    """
    await admit(view, request)
    base = await _base(view, body.model)
    ids = await view.parsing(_ids, base.tokenizer, body)
    count_tokens(view, request, len(ids))
    return schemas.TokenIds(
        count=len(ids),
        max_model_len=base.engine.longest,
        tokens=ids,
        token_strs=await view.parsing(_texts, base.tokenizer, ids) if body.return_token_strs else None,
    )


@questions.post("/detokenize")
async def detokenize(body: schemas.DetokenizeRequest, view: View, request: Request) -> schemas.Detokenized:
    """The text of tokens. A request and its tokens are taken from the caller's quota and counted, as of a prompt."""
    await admit(view, request)
    base = await _base(view, body.model)
    count_tokens(view, request, len(body.tokens))
    return schemas.Detokenized(prompt=await view.parsing(_text, base.tokenizer, body.tokens))


async def _base(view: View, model: str | None) -> ServedBase:
    """The base whose tokens a model has. Raises NotFound for a model that is not here."""
    if model is None or view.engines.is_base(model):
        return view.engines.base_of(model)
    base = view.engines.base_of_version(await view.control(version_here, view, model))
    assert base is not None  # `version_here` raises NotFound
    return base


def _ids(tokenizer: Tokenizer, body: schemas.TokenizeText | schemas.TokenizeMessages) -> list[int]:
    if isinstance(body, schemas.TokenizeText):
        special = body.add_special_tokens is not False
        return [int(each) for each in tokenizer(body.prompt, add_special_tokens=special, verbose=False)["input_ids"]]
    if not getattr(tokenizer, "chat_template", None):
        raise BadRequest("this base has no chat template: expected prompt, not messages")
    asked = Prompt(tuple(turns_of([message.known() for message in body.messages]) or ()))
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
