"""Requests of every kind to a decoder whose adapters generate or classify. Each answer is checked.

A text must equal the text of the same version alone. It is compared up to the first token of which the two best
candidates are closer than `CLOSE`: there, sums of a batch in another order may choose the other one.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import jsonschema
import pytest
from server.answer_schemas import PERSON
from server.storm import Tenant, from_its_version

from turret.engine import Embedding, Engine, SamplingParams
from turret.server.openai.completions import ChatRequest, conversation

TEXTS = ("the film was a great", "{ the bank fell", "why not?")
MOST_TOKENS = 12  # of a plain answer
MOST_STRUCTURED = 160  # of an answer by a schema
CLOSE = 1e-2  # between the logarithms of two probabilities
TOLERANCE = 1e-4  # of a number of an embedding, or a probability
REFUSALS = ("busy", "quota_spent")
SCHEMAS: Sequence[Mapping[str, Any]] = (
    PERSON,
    {"type": "array", "items": {"enum": ["a", 1, None]}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    {"type": "array", "prefixItems": [{"type": "string", "format": "date"}, {"type": "null"}], "items": False,
     "minItems": 2},
)  # fmt: skip
BAD_SCHEMA = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "be brief"}, {"role": "user", "content": text}]


@dataclass
class Said:
    """A text, as far as another order of sums cannot change it. whole: all of it."""

    text: str
    finish_reason: str
    whole: bool

    def check(self, text: str, finish_reason: str) -> None:
        if self.whole:
            assert (text, finish_reason) == (self.text, self.finish_reason)
        else:
            assert text.startswith(self.text), (text, self.text)


@dataclass
class Alone:
    """The answers of one version, or of the base, to `TEXTS`, each computed with nothing beside it."""

    completions: dict[str, Said] = field(default_factory=dict)
    chats: dict[str, Said] = field(default_factory=dict)
    embeddings: dict[str, list[float]] = field(default_factory=dict)
    labels: dict[str, dict[str, float]] = field(default_factory=dict)


def alone(engine: Engine, reference: str | None, *, classifies: bool) -> Alone:
    """The answers of the version with this reference of the engine; None: of the base."""
    found = Alone()
    for text in TEXTS:
        embedded = engine.submit("embed", text, reference, SamplingParams(embedding=Embedding())).result(60)
        found.embeddings[text] = embedded["embedding"]
        if classifies and reference is not None:
            found.labels[text] = engine.classify([text], reference)[0]["probabilities"]
        else:
            found.completions[text] = _said(engine, reference, text, strip=False)
        if reference is not None and not classifies:
            asked = conversation(ChatRequest.model_validate({"model": "a", "messages": messages(text)}))
            found.chats[text] = _said(engine, reference, asked, strip=True)
    return found


def _said(engine: Engine, reference: str | None, asked: Any, *, strip: bool) -> Said:
    options = SamplingParams(max_tokens=MOST_TOKENS, logprobs=2, strip=strip)
    answer = engine.submit("generate", asked, reference, options).result(60)
    for sure, step in enumerate(answer["logprobs"]):
        first, second = (each["logprob"] for each in step["top"][:2])
        if first - second < CLOSE:
            text = "".join(each["token"] for each in answer["logprobs"][:sure])
            return Said(text.strip() if strip else text, "", whole=False)
    return Said(answer["text"], answer["finish_reason"], whole=True)


class Mixture:
    """Makes the requests of the clients.

    Args:
        base: The name of the bare base.
        alone: The answers of each version by its digest; of the base by "".
        classifiers: Names of adapters that classify; the others generate.
        foreign: tenant -> names that only other tenants have.
    """

    def __init__(
        self, base: str, alone: Mapping[str, Alone], classifiers: Sequence[str], foreign: Mapping[str, Sequence[str]]
    ) -> None:
        self._base, self._alone, self._classifiers, self._foreign = base, alone, classifiers, foreign
        self._kinds = {self._completion: 5, self._chat: 5, self._structured: 5, self._embedding: 4, self._own_base: 2,
                       self._stranger: 1, self._leaving: 1, self._refused_schema: 1}  # fmt: skip

    async def __call__(self, client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, number: int) -> None:
        name = tenant.names[int(draw.paretovariate(0.7)) % len(tenant.names)]
        model = draw.choice((name, f"{name}@production", f"{name}@1", f"{name}@2"))
        (kind,) = draw.choices(list(self._kinds), list(self._kinds.values()))
        if name in self._classifiers and kind not in (self._embedding, self._own_base, self._stranger):
            kind = self._labels
        try:
            await kind(client, tenant, draw, model)
        except _RefusedError as refused:
            tenant.counts["refused"] += 1
            await asyncio.sleep(min(refused.seconds, 2.0))
        else:
            tenant.counts[kind.__name__.strip("_")] += 1

    # --- each kind ----------------------------------------------------------------------------------------------------

    async def _completion(self, client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, model: str) -> None:
        text = draw.choice(TEXTS)
        body = {"model": model, "prompt": text, "max_tokens": MOST_TOKENS}
        said, reason, digest = await _text(client, "/v1/completions", body, tenant, stream=draw.random() < 0.5)
        self._alone[digest].completions[text].check(said, reason)

    async def _chat(self, client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, model: str) -> None:
        text = draw.choice(TEXTS)
        body = {"model": model, "messages": messages(text), "max_tokens": MOST_TOKENS}
        said, reason, digest = await _text(client, "/v1/chat/completions", body, tenant, stream=draw.random() < 0.5)
        self._alone[digest].chats[text].check(said, reason)

    async def _structured(self, client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, model: str) -> None:
        schema = draw.choice(SCHEMAS)
        body = {"model": model, "messages": messages(draw.choice(TEXTS)), "max_tokens": MOST_STRUCTURED}
        body |= {"temperature": draw.choice((0.0, 1.0)), "seed": draw.randrange(1 << 30)}
        body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        stream = draw.random() < 0.5
        said, reason, _ = await _text(client, "/v1/chat/completions", body, tenant, stream=stream)
        if reason == "stop":
            jsonschema.validate(json.loads(said), schema)
            tenant.counts["valid"] += 1
        else:
            assert reason == "length"

    async def _embedding(self, client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, model: str) -> None:
        got = await _answered(client, "/v1/embeddings", {"model": model, "input": list(TEXTS)})
        digest = from_its_version(tenant, model, got.headers["turret-digest"], got.json()["model"])
        for text, each in zip(TEXTS, got.json()["data"], strict=True):
            assert each["embedding"] == pytest.approx(self._alone[digest].embeddings[text], abs=TOLERANCE)

    async def _labels(self, client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, model: str) -> None:
        got = await _answered(client, "/v1/classify", {"model": model, "input": list(TEXTS)})
        digest = from_its_version(tenant, model, got.headers["turret-digest"], got.json()["model"])
        for text, each in zip(TEXTS, got.json()["data"], strict=True):
            assert each["probabilities"] == pytest.approx(self._alone[digest].labels[text], abs=TOLERANCE)

    async def _own_base(self, client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, model: str) -> None:
        text = draw.choice(TEXTS)
        if draw.random() < 0.5:
            got = await _answered(client, "/v1/embeddings", {"model": self._base, "input": text})
            said = got.json()["data"][0]["embedding"]
            assert said == pytest.approx(self._alone[""].embeddings[text], abs=TOLERANCE)
        else:
            body = {"model": self._base, "prompt": text, "max_tokens": MOST_TOKENS}
            got = await _answered(client, "/v1/completions", body)
            choice = got.json()["choices"][0]
            self._alone[""].completions[text].check(choice["text"], choice["finish_reason"])
        assert "turret-digest" not in got.headers

    async def _stranger(self, client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, model: str) -> None:
        """What only another tenant has is not there."""
        name = draw.choice(self._foreign[tenant.workspace.store.access.tenant])
        body = {"model": name, "prompt": "x"} if draw.random() < 0.5 else {"model": f"{name}@1", "input": "x"}
        route = "/v1/completions" if "prompt" in body else "/v1/embeddings"
        assert (await _answered(client, route, body, 404)).json()["error"]["code"] == "not_found"

    async def _leaving(self, client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, model: str) -> None:
        """A client that does not wait for the end of its answer."""
        body = {"model": model, "prompt": draw.choice(TEXTS), "max_tokens": 200, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as got:
            await _require(got, 200)
            async for _ in got.aiter_lines():
                break

    async def _refused_schema(
        self, client: httpx2.AsyncClient, tenant: Tenant, draw: random.Random, model: str
    ) -> None:
        body = {"model": model, "prompt": "x", "guided_json": BAD_SCHEMA}
        assert "uniqueItems" in (await _answered(client, "/v1/completions", body, 400)).text


class _RefusedError(Exception):
    """The server refused a request, and said for how long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


async def _answered(
    client: httpx2.AsyncClient, route: str, body: Mapping[str, Any], status: int = 200
) -> httpx2.Response:
    got = await client.post(route, json=body)
    await _require(got, status)
    return got


async def _require(got: httpx2.Response, status: int) -> None:
    """Check the status; a refusal must state its reason and for how long."""
    if got.status_code == status:
        return
    await got.aread()
    assert got.status_code == 429, (got.status_code, got.text)
    assert got.json()["error"]["code"] in REFUSALS
    raise _RefusedError(float(got.headers["retry-after"]))


async def _text(
    client: httpx2.AsyncClient, route: str, body: Mapping[str, Any], tenant: Tenant, *, stream: bool
) -> tuple[str, str, str]:
    """The text of one choice, why it ended, and the digest of the version that the model names."""
    if not stream:
        got = await _answered(client, route, body)
        choice = got.json()["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        version, reason = got.json()["model"], choice["finish_reason"]
    else:
        async with client.stream("POST", route, json={**body, "stream": True}) as got:
            await _require(got, 200)
            lines = [line.removeprefix("data: ") async for line in got.aiter_lines() if line]
        assert lines.pop() == "[DONE]", lines
        chunks = [json.loads(line) for line in lines]
        (version,) = {chunk["model"] for chunk in chunks}
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        text = "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in choices)
        (reason,) = {each["finish_reason"] for each in choices} - {None}
    return text, reason, from_its_version(tenant, body["model"], got.headers["turret-digest"], version)
