"""Clients against a real server: OpenAI's package, schemathesis, `turret.AsyncClient`."""

from __future__ import annotations

import asyncio

import openai
import pytest
from hypothesis import HealthCheck, settings
from server.echo import words

from turret import AsyncClient
from turret.errors import ExperimentError, Forbidden, NotFound, QuotaSpent, RequestError, Unauthorized


@pytest.fixture
def speak(serve, put, workspace):
    """OpenAI's client of a server with tokens, and the version that answers."""
    version = put()
    _, secret = workspace.tokens.create("reader")
    with openai.OpenAI(base_url=f"{serve().url}/v1", api_key=secret, max_retries=0) as client:
        yield client, version


def test_openais_client_lists_models_and_completes(speak) -> None:
    client, version = speak
    assert [model.id for model in client.models.list()] == ["echo", "a"]
    assert client.models.retrieve("a@1").id == "a@1"
    got = client.completions.create(model="a", prompt="one two", max_tokens=9, temperature=0.0, n=2, stop=["zzz"])
    assert [choice.text for choice in got.choices] == ["".join(words(version.digest, "one two"))] * 2
    assert got.usage.completion_tokens == 6
    assert got._request_id.startswith("req-")


def test_openais_client_chats_and_streams(speak) -> None:
    client, version = speak
    messages = [{"role": "user", "content": "one two"}]
    got = client.chat.completions.create(model="a", messages=messages, max_completion_tokens=9, seed=3)
    assert got.choices[0].message.content == "".join(words(version.digest, "one two")) + " seed3"
    assert got.choices[0].finish_reason == "stop"
    with client.chat.completions.create(
        model="a", messages=messages, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "".join(
        words(version.digest, "one two")
    )
    assert chunks[-1].usage.completion_tokens == 3
    with client.completions.create(model="a", prompt="one two", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "".join(words(version.digest, "one two"))


def test_openais_client_reads_our_errors_as_its_own(speak) -> None:
    client, _ = speak
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "not_found"
    assert missing.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="a", prompt="x", max_tokens=10**9)
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="turret-nobody").models.list()


# --- schemathesis -----------------------------------------------------------------------------------------------------


OF_A_RECIPE = ("recipe_error", "data_error")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with tokens, an adapter and an alias, for requests generated from its OpenAPI description."""
    import small_models
    from server.conftest import SEEDS, Running
    from server.echo import FINGERPRINT, Echo
    from store.bundles import tensors, write_bundle

    from turret.server.services import ServerSettings
    from turret.workspace import Workspace

    folder = tmp_path_factory.mktemp("guarded")
    workspace = Workspace(folder / "store")
    for _ in range(2):
        said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}}
        workspace.store.put("a", write_bundle(folder, tensors(next(SEEDS)), said=said))
    workspace.promote("a@1", "production")
    _, secret = workspace.tokens.create("all", ["infer", "admin"])
    tokenizer = small_models.tokenizer("qwen3")  # its chat template takes any messages
    running = Running(workspace, Echo(workspace.store, tokenizer=tokenizer), ServerSettings()).start()
    yield running, secret
    running.stop()


@pytest.mark.slow
def test_what_the_description_says_holds_for_many_requests(guarded) -> None:
    examine(guarded, 150)


def examine(guarded, examples: int) -> None:
    import schemathesis

    running, secret = guarded
    description = running.client(secret).get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(description)
    schema.config.update(base_url=running.url)

    @schema.auth()
    class Bearer:
        def get(self, case, context) -> str:
            return secret

        def set(self, case, data, context) -> None:
            case.headers = {**(case.headers or {}), "Authorization": f"Bearer {data}"}

    broken: list[str] = []
    heard: list[str] = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @_each(operation, examples)
        def holds(case) -> None:
            got = case.call()
            beyond = ("are the same version", "is none of the tools", "two constraints")
            if got.status_code == 400 and any(text in got.text for text in beyond):
                return  # OpenAPI cannot say what a reference means in this store, or which keys exclude each other
            if got.status_code == 400 and "expected one text_1, or as many as text_2" in got.text:
                return  # nor that two lists have the same length
            biases = case.body.get("logit_bias") if isinstance(case.body, dict) else None
            if got.status_code == 400 and any(key.endswith("\n") for key in biases or ()):
                return  # `$` of a pattern: the end in JSON Schema, but also before a last newline in Python's checks
            if got.status_code == 400 and ": criteria must be " in got.text:
                return  # nor that one key has another form with each value of another
            names = ("expected at most 100 printable characters", "is there twice: name each once")
            if got.status_code == 400 and any(text in got.text for text in names):
                return  # nor which characters are printable, or that two items have different names
            of_a_recipe = got.status_code == 400 and got.json()["error"]["code"] in OF_A_RECIPE
            tables = ("/v1/files", "/api/runs", "/api/studies", "/api/adapters/{name}/gates")
            if of_a_recipe and case.path.startswith(tables):
                return  # nor what a recipe in TOML, or a table, may have, or what its file may be called
            try:
                case.validate_response(got)
            except BaseExceptionGroup:
                heard.append(got.text[:300])
                raise

        try:
            holds()
        except BaseExceptionGroup as error:
            broken.append(f"{operation.label}: {[each.message for each in error.exceptions]} {heard[-1]}")
    assert broken == [], "\n".join(broken)
    assert not [line for line in running.log() if line["event"] == "bug"]


def _each(operation, examples: int):
    from hypothesis import given

    def decorate(test):
        quick = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        return quick(given(case=operation.as_strategy())(test))

    return decorate


# --- our client -------------------------------------------------------------------------------------------------------


def test_our_client_asks_streams_and_steers(serve, put, workspace) -> None:
    first, second = put(), put()
    _, secret = workspace.tokens.create("boss", ["infer", "admin"])
    url = serve().url

    async def talk() -> None:
        async with AsyncClient(url, secret) as client:
            moved = await client.promote("a@1", "production")
            assert moved["serving"] == "a@1"
            got = await client.classify(["x", "y"], "a")
            assert (got.receipt.version, got.receipt.digest) == ("a@1", first.digest)
            assert [max(each, key=each.get) for each in got.probabilities] == got.labels
            assert (await client.complete("x", "a@2")).texts == ["".join(words(second.digest, "x"))]
            assert (await client.complete(["x", "y"], "echo", max_tokens=5)).receipt.version is None
            chatted = await client.chat([{"role": "user", "content": "x"}], "a")
            assert chatted.texts == ["".join(words(first.digest, "x"))]
            for prompt in ("one two", [{"role": "user", "content": "one two"}]):
                pieces = [piece async for piece in client.stream(prompt, "a")]
                assert pieces == words(first.digest, "one two")
            assert [each["id"] for each in await client.models()] == ["echo", "a", "a@production"]
            assert (await client.status())["ready"] is True
            assert [each["version"] for each in await client.adapters("a")] == ["a@1", "a@2"]
            assert (await client.show("a@2"))["digest"] == second.digest
            for verb in (client.load, client.pin, client.unpin, client.unload):
                assert (await verb("a@2"))["version"] == "a@2"
            assert [each["version"] for each in await client.loaded()] == ["a@1"]
            assert (await client.verify("a@1"))["ok"] is True
            await client.promote("a@2", "production")
            assert (await client.rollback("a"))["version"] == "a@1"
            assert [each["serving"] for each in await client.aliases("a")] == ["a@1"]

    asyncio.run(talk())


def test_our_client_says_units_hears_arms_tells_outcomes_and_steers_experiments(serve, put, workspace) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    _, secret = workspace.tokens.create("boss", ["infer", "admin"])
    url = serve().url

    async def talk() -> None:
        async with AsyncClient(url, secret) as client:
            begun = await client.start_experiment("a", ["a@2"], share=1.0, guards={"max_errors": 0.1})
            assert begun["serving"]["in_force"] is True
            answers = [
                await client.classify("x", "a", unit="Zoë\n"),
                await client.complete("x", "a", unit="Zoë\n"),
                await client.chat([{"role": "user", "content": "x"}], "a", unit="Zoë\n"),
            ]
            heard: list = []
            assert [piece async for piece in client.stream("x", "a", unit="Zoë\n", on_receipt=heard.append)]
            for receipt in (*(answer.receipt for answer in answers), *heard):
                assert (receipt.version, receipt.experiment, receipt.arm) == ("a@2", "a#1", "candidate")
                assert receipt.probability == 1.0
            assert (await client.classify("x", "a")).receipt.arm == "none"
            assert (await client.outcome(1, receipt=heard[0].id))["status"] == "counted"
            told = [{"value": 0, "receipt": heard[0].id}, {"value": 1, "unit": "nobody", "adapter": "a"}]
            assert [each["status"] for each in await client.outcomes(told)] == ["repeated", "unknown"]
            assert (await client.ramp_experiment("a", 0.5))["experiment"] == "a#1"
            assert [each["experiment"] for each in await client.experiments()] == ["a#1"]
            assert (await client.experiment("a", 1))["state"] == "running"
            assert (await client.stop_experiment("a", rollback=True))["alias_names"] == "a@1"
            with pytest.raises(ExperimentError, match="has ended"):
                await client.ramp_experiment("a", 0.5)

    asyncio.run(talk())


@pytest.mark.slow
def test_our_client_raises_what_the_server_raised(serve, put, workspace) -> None:
    put()
    _, secret = workspace.tokens.create("few", requests_per_minute=1)
    url = serve().url

    async def talk() -> None:
        async with AsyncClient(url, secret) as client:
            with pytest.raises(NotFound, match="no adapter named 'nobody'"):
                await client.classify("x", "nobody")
            with pytest.raises(QuotaSpent) as spent:
                [piece async for piece in client.stream("x", "a")]
            assert 1 <= spent.value.retry_after <= 60
            with pytest.raises(Forbidden):
                await client.status()
        async with AsyncClient(url) as client:
            with pytest.raises(Unauthorized):
                await client.models()
        async with AsyncClient("http://127.0.0.1:9") as client:
            with pytest.raises(RequestError, match=r"no answer from http://127\.0\.0\.1:9.*turret serve"):
                await client.models()

    asyncio.run(talk())


def test_leaving_a_stream_of_our_client_ends_the_work(serve, put, until) -> None:
    put()
    running = serve(pace=0.02)

    async def talk() -> None:
        async with AsyncClient(running.url) as client:
            stream = client.stream(" ".join("abcdefgh"), "a")
            assert await anext(stream)
            await stream.aclose()

    asyncio.run(talk())
    until(lambda: len(running.engine.cancelled) == 1, seconds=3)
