"""`AsyncClient(url, token)`: an asynchronous client of `turret serve`.

    async with turret.AsyncClient("http://127.0.0.1:8000", token) as client:
        answer = await client.classify(["a great film"], "sentiment")
        print(answer.labels, answer.receipt.version)
        async for piece in client.stream("Once", "stories@production"):
            print(piece, end="")

If an experiment runs on the adapter, name the unit of each question, and send the outcomes of answers:

        answer = await client.classify("a great film", "sentiment", unit="ann")
        await client.outcome(1, receipt=answer.receipt.id)

An error of the server is raised as the class of `turret.errors` that it had there. With several addresses of servers of
one store, a request goes to the next one if a server does not answer. What is sent again, and when, says `AsyncClient`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import httpx2

from turret import errors
from turret.arguments import checked_methods
from turret.errors import RequestError, TurretError, quote
from turret.json_types import JsonMapping, JsonObject, JsonValue, Plain

Messages = Sequence[JsonMapping]
FIRST_WAIT = 0.5  # seconds before the first try after a server did not answer; twice as long before each further one


@dataclass(frozen=True)
class Receipt:
    """Which version answered, from the headers of the response."""

    id: str
    adapter: str | None  # None for the bare base
    version: str | None  # "sentiment@3"
    digest: str | None
    base: str  # its fingerprint
    experiment: str | None = None  # "sentiment#1", if an experiment covers the request
    arm: str | None = None  # "none" if the experiment does not count the request, because it names no unit
    probability: float | None = None  # of the arm


@dataclass(frozen=True)
class Answer:
    """The body of a response, and its receipt."""

    body: JsonMapping
    receipt: Receipt

    @property
    def labels(self) -> list[str] | list[list[str]]:
        """The label of each text of `classify`; a list of labels each if the task has several labels per text."""
        return [each["label"] for each in self.body["data"]]

    @property
    def probabilities(self) -> list[dict[str, float]]:
        """The probability of each label, for each text of `classify`."""
        return [each["probabilities"] for each in self.body["data"]]

    @property
    def values(self) -> list[float]:
        """The number of each text of `classify`, from an adapter whose answers are numbers."""
        return [each["value"] for each in self.body["data"]]

    @property
    def answers(self) -> list[JsonObject]:
        """The answer to each question, by its column, for each text of `classify`, from an adapter for several."""
        return [each["answers"] for each in self.body["data"]]

    @property
    def label_sets(self) -> list[list[str]]:
        """The labels for each text of `classify` with `coverage`, the most probable first."""
        return [each["label_set"] for each in self.body["data"]]

    @property
    def abstains(self) -> list[bool]:
        """Whether each text of `classify` is left to a person; always False from an adapter without a promise."""
        return [bool(each.get("abstain")) for each in self.body["data"]]

    @property
    def texts(self) -> list[str]:
        """The text of each choice of `complete` or `chat`."""
        choices = self.body["choices"]
        return [each["text"] if "text" in each else each["message"]["content"] for each in choices]


@checked_methods
class AsyncClient:
    """A client of one server or of several servers of one store: a context manager, or call `close`.

    Every method raises the server's error as a class of `turret.errors`, and RequestError if no server answers.
    `complete`, `chat` and `stream` take the options of the HTTP API: `max_tokens`, `temperature`, ...

    A request is sent again only if that is safe:

    - any request that no server began: no connection, 429, or 503 of a server that ends. `Retry-After` is followed
    - a GET also after a broken connection, a timeout of the connection, or 502, 503 and 504

    Args:
        url: Such as "http://127.0.0.1:8000"; a list of several addresses.
        token: One of `turret token create`; None for a server without tokens.
        timeout: Seconds that a request may take.
        retries: How often a request is sent again at most, apart from the first try of each address.
        longest_wait: Seconds; if the server asks to wait longer, its error is raised at once.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        token: str | None = None,
        *,
        timeout: float = 300.0,
        retries: int = 2,
        longest_wait: float = 10.0,
    ) -> None:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._urls = [each.rstrip("/") for each in ([url] if isinstance(url, str) else url)]
        if not self._urls:
            raise RequestError("no address of a server: give one, such as http://127.0.0.1:8000")
        self._at = 0  # the address that is used
        self._retries, self._longest_wait = retries, longest_wait
        self._http = httpx2.AsyncClient(headers=headers, timeout=timeout)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # --- questions --------------------------------------------------------------------------------------------------

    async def classify(
        self,
        texts: str | Mapping[str, str] | Sequence[str | Mapping[str, str]],
        model: str,
        *,
        unit: str | None = None,
        coverage: float | None = None,
    ) -> Answer:
        """Classify one text or many.

        Args:
            texts: A text, or `{"text": …, "text_pair": …}` for an adapter that reads two; or a list of them.
            model: An adapter: name, name@3 or name@production.
            unit: The unit of an experiment, such as a user's id.
            coverage: Also ask for sets that contain the right label with at least this probability.
        """
        given = texts if isinstance(texts, (str, Mapping)) else list(texts)
        body: JsonObject = {"model": model, "input": given, **_user(unit)}
        if coverage is not None:
            body["coverage"] = coverage
        return _answer(await self._send("POST", "/v1/classify", body))

    async def decide(
        self, text: str | Messages, questions: Sequence[Mapping[str, Plain]], model: str, *, unit: str | None = None
    ) -> JsonMapping:
        """Ask questions about a text: `answers` in their order, each with its `version` and `receipt`, and `usage`.

        Args:
            text: A text, or messages.
            questions: As OpenAI's `/v1/decisions` takes them; `instructions` may be left out.
            model: A panel: name or name@3; or an adapter.
            unit: The unit of an experiment.
        """
        asked = [{"instructions": "", **each} for each in questions]
        given = text if isinstance(text, str) else [dict(each) for each in text]
        body = {"model": model, "input": given, "questions": asked, **_user(unit)}
        return (await self._send("POST", "/v1/decisions", body)).json()

    async def complete(
        self,
        prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        model: str,
        *,
        unit: str | None = None,
        **options: JsonValue,
    ) -> Answer:
        """Continue a prompt or several.

        Args:
            prompt: A text, several texts, token ids, or several lists of token ids.
            model: An adapter, or the id of the base.
        """
        prompts = prompt if isinstance(prompt, str) else list(prompt)
        body = {"model": model, "prompt": prompts, **options, **_user(unit)}
        return _answer(await self._send("POST", "/v1/completions", body))

    async def chat(self, messages: Messages, model: str, *, unit: str | None = None, **options: JsonValue) -> Answer:
        """Continue a conversation with the assistant's next message."""
        body = {"model": model, "messages": [dict(each) for each in messages], **options, **_user(unit)}
        return _answer(await self._send("POST", "/v1/chat/completions", body))

    async def stream(
        self,
        prompt: str | Messages,
        model: str,
        *,
        unit: str | None = None,
        on_receipt: Callable[[Receipt], None] = lambda receipt: None,
        **options: JsonValue,
    ) -> AsyncIterator[str]:
        """The pieces of one text, for a prompt or for messages. Leaving the loop early cancels the request.

        Args:
            on_receipt: Called with the receipt before the first piece.
        """
        if isinstance(prompt, str):
            path, body = "/v1/completions", {"model": model, "prompt": prompt, **options}
        else:
            path, body = "/v1/chat/completions", {"model": model, "messages": [dict(m) for m in prompt], **options}
        response = await self._send("POST", path, body | {"stream": True} | _user(unit), stream=True)
        try:
            on_receipt(_receipt(response))
            async for line in response.aiter_lines():
                if (piece := _piece(line)) is not None:
                    yield piece
        except httpx2.HTTPError as error:
            raise _unreachable(self._urls[self._at], error) from error
        finally:
            await response.aclose()

    async def models(self) -> list[JsonObject]:
        """The base, and every adapter on it by name and by alias."""
        return list((await self._json("GET", "/v1/models"))["data"])

    # --- outcomes ---------------------------------------------------------------------------------------------------

    async def outcome(
        self, value: float | str, *, receipt: str | None = None, unit: str | None = None, adapter: str | None = None
    ) -> JsonObject:
        """Send the outcome of an answer, named by its receipt, or by its unit and adapter.

        Args:
            value: A number; of an answer that a promise covers also the right label.

        Returns:
            The result: `status`, `text`, `experiment`, `arm`.
        """
        keys = {"receipt": receipt, "unit": unit, "adapter": adapter}
        known = {key: each for key, each in keys.items() if each is not None}
        return (await self.outcomes([{"value": value, **known}]))[0]

    async def outcomes(self, outcomes: Sequence[Mapping[str, Plain]]) -> list[JsonObject]:
        """Send many outcomes, each with `value`, and `receipt` or `unit` and `adapter`."""
        body = [dict(each) for each in outcomes]
        return list((await self._json("POST", "/api/outcomes", body))["outcomes"])

    # --- control ----------------------------------------------------------------------------------------------------

    async def status(self) -> JsonObject:
        """The base, and the engine's own figures."""
        return await self._json("GET", "/api/status")

    async def adapters(self, name: str | None = None, comparison: str | None = None) -> list[JsonObject]:
        """Every version in the store, or those of one name; without those of comparisons, or those of one comparison.

        Args:
            comparison: its folder in the store, such as `comparisons/news-3f2a91c07b`.
        """
        found: list[JsonObject] = []
        given = {"name": name, "comparison": comparison}
        query = {key: value for key, value in given.items() if value is not None}
        while True:
            page = await self._json("GET", "/api/adapters", query=query)
            found += page["adapters"]
            if page["after"] is None:
                return found
            query["after"] = page["after"]

    async def show(self, reference: str) -> JsonObject:
        """One version, as `turret show --json`."""
        return await self._json("GET", f"/api/adapters/{reference}")

    async def loaded(self) -> list[JsonObject]:
        """The versions in memory."""
        return list((await self._json("GET", "/api/loaded"))["loaded"])

    async def load(self, reference: str, *, pin: bool = False) -> JsonObject:
        """Load a version now."""
        return await self._json("POST", f"/api/adapters/{reference}/load", {"pin": pin})

    async def unload(self, reference: str) -> JsonObject:
        """Remove a version from memory."""
        return await self._json("POST", f"/api/adapters/{reference}/unload")

    async def pin(self, reference: str) -> JsonObject:
        """Load a version and keep it in memory."""
        return await self._json("POST", f"/api/adapters/{reference}/pin")

    async def unpin(self, reference: str) -> JsonObject:
        """Allow a version's eviction when its place is needed."""
        return await self._json("POST", f"/api/adapters/{reference}/unpin")

    async def verify(self, reference: str) -> JsonObject:
        """Hash and open all files of one version again."""
        return await self._json("POST", f"/api/adapters/{reference}/verify")

    async def aliases(self, name: str | None = None) -> list[JsonObject]:
        """Every alias: its version in the store, and its version in force on the server."""
        query = {} if name is None else {"name": name}
        return list((await self._json("GET", "/api/aliases", query=query))["aliases"])

    async def promote(
        self, reference: str, alias: str, *, require: Sequence[str] = (), replay: bool = False
    ) -> JsonObject:
        """Move an alias to a version that passes its gates. `replay` asks its golden examples again."""
        body: JsonObject = {"alias": alias, "require": list(require), "replay": replay}
        return await self._json("POST", f"/api/adapters/{reference}/promote", body)

    async def rollback(self, name: str, alias: str = "production") -> JsonObject:
        """Move an alias back to the version that it named before."""
        return await self._json("POST", f"/api/aliases/{name}/{alias}/rollback")

    async def draft(
        self, source: str, files: Mapping[str, str] | None = None, settings: Mapping[str, str] | None = None
    ) -> JsonObject:
        """Look at a table: its first rows, the task and the columns that they show, and a recipe for them.

        Args:
            source: The id of a file of `/v1/files`, one of `files`, or pypi:package.
            files: Name -> content of tables.
            settings: Of the recipe, that are known, such as `{"data.label": "topic"}`.
        """
        body: JsonObject = {"source": source, "files": dict(files or {}), "settings": dict(settings or {})}
        return await self._json("POST", "/api/runs/draft", body)

    async def plan(self, recipe: str, files: Mapping[str, str] | None = None) -> JsonObject:
        """Check a training without starting it: memory, time and what is wrong.

        Args:
            recipe: TOML.
            files: Name -> content of tables; `data.source` names one of them, or a file of `/v1/files`.
        """
        return await self._json("POST", "/api/runs/plan", {"recipe": recipe, "files": dict(files or {})})

    async def train(self, recipe: str, files: Mapping[str, str] | None = None, *, priority: int = 0) -> JsonObject:
        """Put a training into the queue of the server's store. Returns the run.

        Args:
            recipe: TOML.
            files: Name -> content of tables; `data.source` names one of them.
            priority: Of -100 to 100; higher is earlier.
        """
        body: JsonObject = {"recipe": recipe, "files": dict(files or {}), "priority": priority}
        return await self._json("POST", "/api/runs", body)

    async def runs(self) -> list[JsonObject]:
        """The newest trainings, those that wait too."""
        return list((await self._json("GET", "/api/runs"))["runs"])

    async def run(self, run: str) -> JsonObject:
        """One training, with its recipe and its log."""
        return await self._json("GET", f"/api/runs/{run}")

    async def resume_run(self, run: str) -> JsonObject:
        """Put a training that has failed or was cancelled back into the queue. It resumes from its last checkpoint."""
        return await self._json("POST", f"/api/runs/{run}/resume")

    async def delete_run(self, run: str) -> None:
        """Delete a training that has ended. Its version stays."""
        await self._json("DELETE", f"/api/runs/{run}")

    async def cancel_run(self, run: str) -> JsonObject:
        """End a training of the queue: at once if it waits, after its step if it runs."""
        return await self._json("POST", f"/api/runs/{run}/cancel")

    async def experiments(self, *, alpha: float = 0.05) -> list[JsonObject]:
        """Every experiment, and which are discoveries at that level."""
        return list((await self._json("GET", "/api/experiments", query={"alpha": str(alpha)}))["experiments"])

    async def experiment(self, name: str, number: int | None = None) -> JsonObject:
        """The running experiment of a name, or its last one, or the one of that number."""
        query = {} if number is None else {"number": str(number)}
        return await self._json("GET", f"/api/experiments/{name}", query=query)

    async def start_experiment(self, name: str, candidates: Sequence[str] = (), **settings: JsonValue) -> JsonObject:
        """Start an experiment. The settings are those of the HTTP API: `shadows`, `share`, `metric`, `guards`, ..."""
        return await self._json("POST", f"/api/experiments/{name}/start", {"candidates": list(candidates), **settings})

    async def ramp_experiment(self, name: str, share: float | Mapping[str, float] | None = None) -> JsonObject:
        """Change the candidates' share, to the next planned one by default."""
        return await self._json("POST", f"/api/experiments/{name}/ramp", {"share": share})

    async def stop_experiment(self, name: str, *, promote: str | None = None, rollback: bool = False) -> JsonObject:
        """End an experiment. `promote` names the arm that takes the alias; `rollback` gives it to the control."""
        return await self._json("POST", f"/api/experiments/{name}/stop", {"promote": promote, "rollback": rollback})

    # --- requests ---------------------------------------------------------------------------------------------------

    async def _json(
        self, method: str, path: str, body: Plain = None, *, query: Mapping[str, str] | None = None
    ) -> JsonObject:
        return (await self._send(method, path, body, query)).json()

    async def _send(
        self,
        method: str,
        path: str,
        body: Plain = None,
        query: Mapping[str, str] | None = None,
        *,
        stream: bool = False,
    ) -> httpx2.Response:
        """Send a request, again if that is safe. A stream is open when this returns."""
        moves, left = len(self._urls) - 1, self._retries  # further addresses to try at once; tries after a wait
        while True:
            url = self._urls[self._at]
            wait: float | None = None
            error: Exception
            if self._http.is_closed:
                raise RequestError("this client is closed: open another one with `async with turret.AsyncClient(...)`")
            try:
                request = self._http.build_request(method, url + path, json=body, params=dict(query or {}))
                response = await self._http.send(request, stream=stream)
                if response.status_code < 400:
                    return response
                await response.aread()
                error, wait = _error(response), _retry_after(method, response)
            except (httpx2.InvalidURL, TypeError, ValueError) as failure:  # of the name, or of a value that is not JSON
                raise RequestError(
                    f"{quote(path)} cannot be asked ({failure}): correct the name, or the value"
                ) from None
            except httpx2.HTTPError as failure:
                error = _unreachable(url, failure)
                error.__cause__ = failure
                if method == "GET" or isinstance(failure, (httpx2.ConnectError, httpx2.ConnectTimeout)):
                    wait = FIRST_WAIT * 2 ** (self._retries - left)
            if wait is None:
                raise error
            if moves and not isinstance(error, errors.QuotaSpent):  # a quota is the same at every server
                moves, self._at = moves - 1, (self._at + 1) % len(self._urls)
                continue
            if not left or wait > self._longest_wait:
                raise error
            left, self._at = left - 1, (self._at + 1) % len(self._urls)
            await asyncio.sleep(wait)


def _retry_after(method: str, response: httpx2.Response) -> float | None:
    """Seconds after which a request that was refused may be sent again; None if it must not be."""
    status = response.status_code
    begun = status not in (429, 503) or (status == 503 and not isinstance(_error(response), errors.Draining))
    if begun and not (method == "GET" and status in (502, 503, 504)):
        return None
    try:
        return max(0.0, float(response.headers.get("retry-after", "")))
    except ValueError:  # a date, or none
        return FIRST_WAIT


def _user(unit: str | None) -> dict[str, str]:
    return {} if unit is None else {"user": unit}


def _answer(response: httpx2.Response) -> Answer:
    return Answer(response.json(), _receipt(response))


def _receipt(response: httpx2.Response) -> Receipt:
    headers = response.headers
    name, probability = headers.get("turret-adapter"), headers.get("turret-probability")
    return Receipt(
        id=headers["turret-receipt"],
        adapter=name,
        version=None if name is None else f"{name}@{headers['turret-version']}",
        digest=headers.get("turret-digest"),
        base=headers["turret-base"],
        experiment=headers.get("turret-experiment"),
        arm=headers.get("turret-arm"),
        probability=None if probability is None else float(probability),
    )


def _piece(line: str) -> str | None:
    """The text in a line of a stream, if it has one. Raises the error in the line."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    chunk = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        raise _server_error(chunk["error"], None)
    for choice in chunk["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        return text or None
    return None


def _error(response: httpx2.Response) -> TurretError:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return RequestError(f"the server answered {response.status_code} without an error of turret: check the URL")
    return _server_error(error, response.headers.get("retry-after"))


def _server_error(error: Mapping[str, Plain], retry_after: str | None) -> TurretError:
    """The error as the class that it had on the server."""
    name = "".join(part.capitalize() for part in str(error.get("code")).split("_"))
    kind = getattr(errors, name, RequestError)
    if not (isinstance(kind, type) and issubclass(kind, TurretError)):
        kind = RequestError
    raised: TurretError = kind.__new__(kind, str(error.get("message")))  # `__init__` may need more than the message
    if kind in (errors.Busy, errors.QuotaSpent):
        vars(raised)["retry_after"] = float(retry_after or 1)
    return raised


def _unreachable(url: str, error: Exception) -> RequestError:
    return RequestError(f"no answer from {url}: {type(error).__name__}: {error}: is `turret serve` running there?")
