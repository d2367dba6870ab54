"""`AsyncClient(url, token)`: a small asynchronous client of `turret serve`. Refuses to know stores and engines.

    async with turret.AsyncClient("http://127.0.0.1:8000", token) as client:
        answer = await client.classify(["a great film"], "sentiment")
        print(answer.labels, answer.receipt.version)
        async for piece in client.stream("Once", "stories@production"):
            print(piece, end="")

Where an experiment runs on a name, `unit` says whose question it is, and outcomes say what came of answers:

        answer = await client.classify("a great film", "sentiment", unit="ann")
        await client.outcome(1, receipt=answer.receipt.id)

What a server refuses is raised as the same class of `turret.errors` that it was there.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx2

from turret import errors
from turret.errors import RequestError, TurretError

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Receipt:
    """Which version answered, as the headers of every answer say."""

    id: str
    adapter: str | None  # None: the bare base
    version: str | None  # "sentiment@3"
    digest: str | None
    base: str  # fingerprint
    experiment: str | None = None  # "sentiment#1", where one covers what was asked
    arm: str | None = None  # "none": not counted, because no unit was said
    probability: float | None = None  # of the arm


@dataclass(frozen=True)
class Answer:
    """What the server said, and who answered."""

    body: Mapping[str, Any]
    receipt: Receipt

    @property
    def labels(self) -> list[Any]:
        """Of `classify`: a label per text, or a list of them where the task has many at once."""
        return [each["label"] for each in self.body["data"]]

    @property
    def probabilities(self) -> list[dict[str, float]]:
        """Of `classify`: label to probability, per text."""
        return [each["probabilities"] for each in self.body["data"]]

    @property
    def texts(self) -> list[str]:
        """Of `complete` and `chat`: a text per choice."""
        choices = self.body["choices"]
        return [each["text"] if "text" in each else each["message"]["content"] for each in choices]


class AsyncClient:
    """One server. Options of `complete`, `chat` and `stream` are those of the API: `max_tokens`, `temperature`, …"""

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 300.0) -> None:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._http = httpx2.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # --- questions --------------------------------------------------------------------------------------------------

    async def classify(self, texts: str | Sequence[str], model: str, *, unit: str | None = None) -> Answer:
        """Labels with probabilities."""
        given = texts if isinstance(texts, str) else list(texts)
        return _answer(await self._ask("POST", "/v1/classify", {"model": model, "input": given, **_user(unit)}))

    async def complete(
        self, prompt: str | Sequence[Any], model: str, *, unit: str | None = None, **options: Any
    ) -> Answer:
        """Texts that follow prompts."""
        given = prompt if isinstance(prompt, str) else list(prompt)
        body = {"model": model, "prompt": given, **options, **_user(unit)}
        return _answer(await self._ask("POST", "/v1/completions", body))

    async def chat(self, messages: Messages, model: str, *, unit: str | None = None, **options: Any) -> Answer:
        """What the assistant says next."""
        body = {"model": model, "messages": [dict(each) for each in messages], **options, **_user(unit)}
        return _answer(await self._ask("POST", "/v1/chat/completions", body))

    async def stream(
        self,
        prompt: str | Messages,
        model: str,
        *,
        unit: str | None = None,
        on_receipt: Callable[[Receipt], None] = lambda receipt: None,
        **options: Any,
    ) -> AsyncIterator[str]:
        """The pieces of one text, of a prompt or of messages; leaving the loop early ends the work on the server.

        on_receipt: told who answers, before the first piece.
        """
        if isinstance(prompt, str):
            path, body = "/v1/completions", {"model": model, "prompt": prompt, **options}
        else:
            path, body = "/v1/chat/completions", {"model": model, "messages": [dict(m) for m in prompt], **options}
        try:
            async with self._http.stream("POST", path, json=body | {"stream": True} | _user(unit)) as got:
                if got.status_code >= 400:
                    await got.aread()
                    raise _error(got)
                on_receipt(_receipt(got))
                async for line in got.aiter_lines():
                    if (piece := _piece(line)) is not None:
                        yield piece
        except httpx2.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from error

    async def models(self) -> list[dict[str, Any]]:
        """The base, and every adapter on it by name and by alias."""
        return list((await self._json("GET", "/v1/models"))["data"])

    # --- what came of answers ---------------------------------------------------------------------------------------

    async def outcome(
        self, value: float, *, receipt: str | None = None, unit: str | None = None, adapter: str | None = None
    ) -> dict[str, Any]:
        """Tell what came of an answer, by its receipt, or by the unit and the adapter: `status` and `text` of it."""
        named = {"receipt": receipt, "unit": unit, "adapter": adapter}
        given = {key: said for key, said in named.items() if said is not None}
        return (await self.outcomes([{"value": value, **given}]))[0]

    async def outcomes(self, told: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The same for many, each with `value`, and `receipt` or `unit` and `adapter`."""
        body = [dict(each) for each in told]
        return list((await self._json("POST", "/api/outcomes", body))["outcomes"])

    # --- control ----------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """The base, and what is at work now."""
        return await self._json("GET", "/api/status")

    async def adapters(self, name: str | None = None) -> list[dict[str, Any]]:
        """Every version in the store, or those of one name."""
        found: list[dict[str, Any]] = []
        query = {} if name is None else {"name": name}
        while True:
            page = await self._json("GET", "/api/adapters", query=query)
            found += page["adapters"]
            if page["after"] is None:
                return found
            query["after"] = page["after"]

    async def show(self, reference: str) -> dict[str, Any]:
        """All that is known of one version."""
        return await self._json("GET", f"/api/adapters/{reference}")

    async def loaded(self) -> list[dict[str, Any]]:
        """The versions in memory."""
        return list((await self._json("GET", "/api/loaded"))["loaded"])

    async def load(self, reference: str, *, pin: bool = False) -> dict[str, Any]:
        """Load a version now."""
        return await self._json("POST", f"/api/adapters/{reference}/load", {"pin": pin})

    async def unload(self, reference: str) -> dict[str, Any]:
        """Take a version out of memory."""
        return await self._json("POST", f"/api/adapters/{reference}/unload")

    async def pin(self, reference: str) -> dict[str, Any]:
        """Load a version and keep it in memory."""
        return await self._json("POST", f"/api/adapters/{reference}/pin")

    async def unpin(self, reference: str) -> dict[str, Any]:
        """Let a version go when its place is needed."""
        return await self._json("POST", f"/api/adapters/{reference}/unpin")

    async def verify(self, reference: str) -> dict[str, Any]:
        """Hash and open all of one version again."""
        return await self._json("POST", f"/api/adapters/{reference}/verify")

    async def aliases(self, name: str | None = None) -> list[dict[str, Any]]:
        """Every alias: what the store says, and what is in force on the server."""
        query = {} if name is None else {"name": name}
        return list((await self._json("GET", "/api/aliases", query=query))["aliases"])

    async def promote(
        self, reference: str, alias: str, *, require: Sequence[str] = (), replay: bool = False
    ) -> dict[str, Any]:
        """Move an alias to a version, once it is loaded and has passed; `replay` asks its golden examples again."""
        body = {"alias": alias, "require": list(require), "replay": replay}
        return await self._json("POST", f"/api/adapters/{reference}/promote", body)

    async def rollback(self, name: str, alias: str = "production") -> dict[str, Any]:
        """Move an alias back to what it named before."""
        return await self._json("POST", f"/api/aliases/{name}/{alias}/rollback")

    async def experiments(self, *, alpha: float = 0.05) -> list[dict[str, Any]]:
        """Every experiment, and which of them are discoveries at that level."""
        return list((await self._json("GET", "/api/experiments", query={"alpha": str(alpha)}))["experiments"])

    async def experiment(self, name: str, number: int | None = None) -> dict[str, Any]:
        """The running experiment of a name, or its last, or that one."""
        return await self._json(
            "GET", f"/api/experiments/{name}", query={} if number is None else {"number": str(number)}
        )

    async def start_experiment(self, name: str, candidates: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
        """Begin: `shadows`, `share`, `steps`, `metric`, `unit`, `guards`, … as the API has them."""
        return await self._json("POST", f"/api/experiments/{name}/start", {"candidates": list(candidates), **settings})

    async def ramp_experiment(self, name: str, share: float | Mapping[str, float] | None = None) -> dict[str, Any]:
        """Send another share to the candidates, or the next that was planned."""
        return await self._json("POST", f"/api/experiments/{name}/ramp", {"share": share})

    async def stop_experiment(self, name: str, *, promote: str | None = None, rollback: bool = False) -> dict[str, Any]:
        """End it; `promote` gives an arm the alias, `rollback` the control."""
        return await self._json("POST", f"/api/experiments/{name}/stop", {"promote": promote, "rollback": rollback})

    # --- the wire ---------------------------------------------------------------------------------------------------

    async def _json(
        self, method: str, path: str, body: Any = None, *, query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        said: dict[str, Any] = (await self._ask(method, path, body, query)).json()
        return said

    async def _ask(
        self, method: str, path: str, body: Any = None, query: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        try:
            got = await self._http.request(method, path, json=body, params=dict(query or {}))
        except httpx2.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from error
        if got.status_code >= 400:
            raise _error(got)
        return got


def _user(unit: str | None) -> dict[str, str]:
    return {} if unit is None else {"user": unit}


def _answer(got: httpx2.Response) -> Answer:
    return Answer(got.json(), _receipt(got))


def _receipt(got: httpx2.Response) -> Receipt:
    said, name = got.headers, got.headers.get("turret-adapter")
    version = None if name is None else f"{name}@{said['turret-version']}"
    chance = said.get("turret-probability")
    return Receipt(
        id=said["turret-receipt"],
        adapter=name,
        version=version,
        digest=said.get("turret-digest"),
        base=said["turret-base"],
        experiment=said.get("turret-experiment"),
        arm=said.get("turret-arm"),
        probability=None if chance is None else float(chance),
    )


def _piece(line: str) -> str | None:
    """The text in a line of a stream, where it has one; raises what the server says went wrong."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    said = json.loads(line.removeprefix("data: "))
    if "error" in said:
        raise _made(said["error"], None)
    for choice in said["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        return text or None
    return None


def _error(got: httpx2.Response) -> TurretError:
    try:
        told = got.json()["error"]
    except (ValueError, KeyError, TypeError):
        return RequestError(f"the server answered {got.status_code}, and nothing that a turret server says")
    return _made(told, got.headers.get("retry-after"))


def _made(told: Mapping[str, Any], retry_after: str | None) -> TurretError:
    """The class that the error had on the server."""
    name = "".join(part.capitalize() for part in str(told.get("code")).split("_"))
    kind = getattr(errors, name, RequestError)
    if not (isinstance(kind, type) and issubclass(kind, TurretError)):
        kind = RequestError
    made: TurretError = kind.__new__(kind, str(told.get("message")))  # what else a class is made with stays there
    if kind in (errors.Busy, errors.QuotaSpent):
        vars(made)["retry_after"] = float(retry_after or 1)
    return made


def _unreachable(url: Any, error: Exception) -> RequestError:
    return RequestError(f"no answer from {url}: {type(error).__name__}: {error}: is `turret serve` running there?")
