"""One server with several bases: every route asks the base of the adapter, and one base changes nothing for another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import small_models
from server.conftest import SEEDS, Running
from server.echo import FINGERPRINT, LABELS, Echo, probabilities, words
from server.test_end_to_end import TEXTS, TOLERANCE, bundle
from store.bundles import tensors, write_bundle

import turret
from turret.engine import Embedding, Engine, Limits, MemoryBudget, SamplingParams
from turret.engine.untrained import Question, decide
from turret.errors import ServeRefused
from turret.server.engines import Engines
from turret.server.services import ServerSettings
from turret.workspace import Workspace

PLACES = (("bert", "classify", "labels"), ("qwen3", "generate", "news"), ("llama", "generate", "law"))
RAW = SamplingParams(strip=False, max_tokens=6)


@dataclass
class House:
    """A server of an encoder and two decoders, each with two versions of an adapter."""

    workspace: Workspace
    running: Running
    engines: dict[str, Engine]  # by the name of the base

    def client(self) -> httpx2.Client:
        return self.running.client()


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    workspace, budget, engines = Workspace(folder / "store"), MemoryBudget(10**9), {}
    for family, kind, name in PLACES:
        base = small_models.save_base(family, folder / family)
        for seed in (1, 2):
            workspace.store.put(name, bundle(folder / f"{name}-{seed}", base, family, kind, seed))
        workspace.promote(f"{name}@1", "production")
        engines[family] = workspace.engine(str(base), dtype="float32", limits=Limits(memory=budget))
    far = small_models.save_base("qwen3", folder / "far", seed=7)
    workspace.store.put("far", bundle(folder / "far-1", far, "qwen3", "generate", 1))
    running = Running(workspace, list(engines.values()), ServerSettings(), options=SamplingParams)
    yield House(workspace, running.start(), engines)
    running.stop()


def complete(client: httpx2.Client, model: str, text: str = TEXTS[0]) -> httpx2.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": text, "max_tokens": 6})


# --- the real engines -------------------------------------------------------------------------------------------------


def test_a_request_goes_to_the_base_of_its_adapter(house: House) -> None:
    client = house.client()
    got = client.post("/v1/classify", json={"model": "labels", "input": TEXTS})
    for said, expected in zip(got.json()["data"], house.engines["bert"].classify(TEXTS, "labels@1"), strict=True):
        assert said["probabilities"] == pytest.approx(expected["probabilities"], abs=TOLERANCE)
    assert got.headers["turret-base"] == house.engines["bert"].base.fingerprint
    for family, model in (("qwen3", "news"), ("qwen3", "news@2"), ("llama", "law"), ("llama", "law@2")):
        got, engine = complete(client, model), house.engines[family]
        version = model if "@" in model else f"{model}@1"
        assert got.status_code == 200, got.text
        assert got.json()["model"] == version
        assert got.json()["choices"][0]["text"] == engine.generate(TEXTS[:1], version, RAW)[0]["text"]
        assert got.headers["turret-base"] == engine.base.fingerprint
    assert client.post("/v1/classify", json={"model": "news", "input": "x"}).status_code in (400, 409)


def test_the_name_of_a_base_asks_that_base(house: House) -> None:
    client, said = house.client(), set()
    for family in ("qwen3", "llama"):
        got = complete(client, family)
        assert (got.status_code, got.json()["model"]) == (200, family), got.text
        assert "turret-adapter" not in got.headers
        text = got.json()["choices"][0]["text"]
        assert text == house.engines[family].generate(TEXTS[:1], None, RAW)[0]["text"]
        said.add(text)
    assert len(said) == 2


@pytest.mark.slow
def test_a_base_decides_without_training_and_says_so(house: House) -> None:
    client, text = house.client(), TEXTS[0]
    client.timeout = 120
    for family in ("qwen3", "llama", "bert"):
        asked = [
            {
                "type": "choice",
                "name": "topic",
                "instructions": "What is it about?",
                "choices": [{"value": "film", "description": "a film"}, {"value": "bank"}, {"value": True}],
            },
            {"type": "predicate", "name": "urgent", "instructions": [{"type": "input_text", "text": "Is it urgent?"}]},
            {"type": "score", "instructions": "How good?", "levels": [{"label": "bad"}, {"label": "good"}]},
        ]
        got = client.post("/v1/decisions", json={"model": family, "input": text, "questions": asked})
        assert got.status_code == 200, got.text
        topic, urgent, grade = got.json()["answers"]
        engine = house.engines[family]
        questions = [
            Question(["film", "bank", "yes"], "What is it about?", {"film": "a film"}),
            Question(["no", "yes"], "Is it urgent?"),
            Question(["bad", "good"], "How good?"),
        ]
        first, second, third = (decide(engine, each, [text])[0] for each in questions)
        chances = [each["probability"] for each in topic["probabilities"]]
        assert chances == pytest.approx(list(first.probabilities.values()), abs=1e-4)
        assert [each["value"] for each in topic["probabilities"]] == ["film", "bank", True]
        assert topic["confidence"] == pytest.approx(max(chances), abs=1e-6)
        assert urgent["probability"] == pytest.approx(second.probabilities["yes"], abs=1e-4)
        assert grade["score"] == pytest.approx(third.probabilities["good"], abs=1e-4)
        for own, found in ((topic, first), (grade, third)):
            assert own["label_mass"] == (
                None if found.label_mass is None else pytest.approx(found.label_mass, rel=0.01)
            )
        assert all(each["untrained"] and each["version"] == family for each in (topic, urgent, grade))
        assert got.json()["model"] == family
        assert got.json()["usage"]["input_tokens"] >= sum(each.prompt_tokens for each in (first, second, third))
        assert "turret-adapter" not in got.headers

        system = {
            "topic": {
                "type": "choice",
                "instructions": "What is it about?",
                "criteria": {"film": "a film", "bank": None},
            }
        }
        said = client.post("/v1/systemone", json={"model": family, "state": text, "questions": system}).json()
        own = decide(engine, Question(["film", "bank"], "What is it about?", {"film": "a film"}), [text])[0]
        assert said["answers"]["topic"]["probabilities"] == pytest.approx(dict(own.probabilities), abs=1e-4)
        assert said["diagnostics"]["topic"]["untrained"] is True

        (prior,) = decide(engine, Question(["bad", "good"], "How good?"), [text], prior=True)
        body = {"model": family, "input": text, "questions": asked[2:], "prior": True}
        (grade,) = client.post("/v1/decisions", json=body).json()["answers"]
        assert grade["score"] == pytest.approx(prior.probabilities["good"], abs=1e-4)
        assert prior.probabilities["good"] != pytest.approx(third.probabilities["good"], abs=1e-3)
    many = [{"type": "score", "instructions": "?", "levels": [{"label": str(n)} for n in range(200)]}] * 6
    refused = client.post("/v1/decisions", json={"model": "bert", "input": text, "questions": many})
    assert (refused.status_code, "need 1206 rows of a base, at most 1024" in refused.text) == (400, True)
    twice = [{"type": "choice", "instructions": "?", "choices": [{"value": "yes"}, {"value": True}]}]
    assert client.post("/v1/decisions", json={"model": "llama", "input": text, "questions": twice}).status_code == 400


def test_chats_and_responses_use_the_template_of_the_right_base(house: House) -> None:
    client = house.client()
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    statuses = {
        model: client.post("/v1/chat/completions", json={"model": model, "messages": said, "max_tokens": 3}).status_code
        for model in ("qwen3", "llama")
    }
    assert statuses == {"qwen3": 200, "llama": 400}  # that base has no chat template
    one = [{"role": "user", "content": TEXTS[0]}]
    for model, family in (("news", "qwen3"), ("law", "llama")):
        got = client.post("/v1/chat/completions", json={"model": model, "messages": one, "stream": True})
        pieces = [json.loads(line[6:]) for line in got.text.splitlines() if line.startswith("data: {")]
        text = "".join(each["choices"][0]["delta"].get("content") or "" for each in pieces)
        assert text == house.engines[family].generate(TEXTS[:1], f"{model}@1")[0]["text"].strip()
        got = client.post("/v1/responses", json={"model": model, "input": TEXTS[0]})
        assert got.json()["model"] == f"{model}@1"
        assert got.json()["output"][0]["content"][0]["text"] == text


def test_tokens_are_those_of_the_models_base(house: House) -> None:
    client = house.client()
    for model, family in (("labels", "bert"), ("bert", "bert"), ("law@2", "llama"), ("qwen3", "qwen3")):
        tokenizer = house.engines[family].base.tokenizer
        got = client.post("/tokenize", json={"model": model, "prompt": TEXTS[0]}).json()
        assert got["tokens"] == tokenizer(TEXTS[0])["input_ids"]
        assert got["max_model_len"] == house.engines[family].longest
        back = client.post("/detokenize", json={"model": model, "tokens": got["tokens"]}).json()
        assert back["prompt"] == tokenizer.decode(got["tokens"])
    got = client.post("/tokenize", json={"prompt": "x"})
    assert got.status_code == 400
    assert "several bases, bert, qwen3, llama: name one" in got.json()["error"]["message"]


def test_vectors_are_those_of_the_models_base(house: House) -> None:
    client, options = house.client(), SamplingParams(embedding=Embedding())
    for model, family, adapter in (("bert", "bert", None), ("labels", "bert", "labels@1"), ("law", "llama", "law@1")):
        got = client.post("/v1/embeddings", json={"model": model, "input": TEXTS}).json()
        engine = house.engines[family]
        expected = [engine.submit("embed", text, adapter, options).result(30)["embedding"] for text in TEXTS]
        for said, vector in zip(got["data"], expected, strict=True):
            assert said["embedding"] == pytest.approx(vector, abs=1e-4)
        body = {"model": model, "query": TEXTS[0], "documents": TEXTS}
        assert client.post("/v1/rerank", json=body).json()["results"][0]["index"] == 0
        body = {"model": model, "text_1": TEXTS[0], "text_2": TEXTS[0]}
        assert client.post("/v1/score", json=body).json()["data"][0]["score"] == pytest.approx(1.0, abs=1e-4)


def test_a_composition_is_of_one_base(house: House) -> None:
    client = house.client()
    assert complete(client, "law@1+law@2").status_code == 200
    for model in ("news+law", "news@production+law@1", "far+news"):
        got = complete(client, model)
        assert got.status_code == 400, got.text
        assert "composes adapters of different bases: compose those of one base" in got.json()["error"]["message"]


def test_an_adapter_of_no_base_of_the_server_is_not_here(house: House) -> None:
    client = house.client()
    for got in (
        complete(client, "far"),
        client.post("/v1/chat/completions", json={"model": "far", "messages": [{"role": "user", "content": "x"}]}),
        client.post("/tokenize", json={"model": "far", "prompt": "x"}),
        client.get("/v1/models/far"),
        client.post("/api/adapters/far@1/load"),
    ):
        assert (got.status_code, got.json()["error"]["code"]) == (404, "not_found"), got.text
    known = "labels, law, news, bert, qwen3, llama"
    assert complete(client, "far").json()["error"]["message"] == (
        f"no adapter named 'far' on the bases of this server: expected one of {known}"
    )


def test_models_status_and_metrics_show_every_base(house: House) -> None:
    client = house.client()
    complete(client, "law")
    gpus = {each["id"]: each for each in client.get("/v1/models").json()["data"]}
    assert [each for each in gpus if gpus[each]["parent"] is None] == ["bert", "qwen3", "llama"]
    assert {name: gpus[name]["parent"] for *_, name in PLACES} == {name: family for family, _, name in PLACES}
    assert "far" not in gpus
    status = client.get("/api/status").json()
    assert (status["base"], status["engine"]) == (None, None)
    assert [each["id"] for each in status["bases"]] == ["bert", "qwen3", "llama"]
    assert all(each["engine"]["adapters"] >= 0 for each in status["bases"])
    text = client.get("/metrics").text
    counted = [line for line in text.splitlines() if line.startswith("turret_engine_")]
    assert {line.partition('base="')[2].partition('"')[0] for line in counted} == set(house.engines)
    tokens = house.engines["llama"].stats().tokens
    assert f'turret_engine_tokens_total{{base="llama"}} {float(tokens)}' in counted
    for family, engine in house.engines.items():
        assert f'turret_build_info{{base="{family}",fingerprint="{engine.base.fingerprint}"' in text
        assert text.count(f'turret_engine_queue_seconds_count{{base="{family}"}}') == 1


def test_adapters_of_all_bases_are_loaded_pinned_and_unloaded(house: House) -> None:
    client = house.client()

    def loaded() -> dict[str, bool]:
        return {each["version"]: each["pinned"] for each in client.get("/api/loaded").json()["loaded"]}

    for reference in ("labels@2", "news@2", "law@2"):
        assert client.post(f"/api/adapters/{reference}/pin").status_code == 200
        assert loaded()[reference] is True
        assert client.get(f"/api/adapters/{reference}").json()["loaded"] is True
        assert client.post(f"/api/adapters/{reference}/unpin").status_code == 200
        assert client.post(f"/api/adapters/{reference}/unload").status_code == 200
        assert reference not in loaded()


def test_a_promote_asks_golden_examples_on_the_adapters_own_base(house: House, tmp_path, monkeypatch, until) -> None:
    monkeypatch.setattr("turret.bases.load", None)  # loading a base fails
    client = house.client()
    expected = house.engines["bert"].classify(TEXTS, "labels@2")
    golden = tmp_path / "golden.csv"
    golden.write_text("\n".join(["text,label", *(f"{t},{a['label']}" for t, a in zip(TEXTS, expected, strict=True))]))
    house.workspace.gate("labels", "checked", golden=golden)
    got = client.post("/api/adapters/labels@2/promote", json={"alias": "checked"})
    assert [(each["passed"], each["total"]) for each in got.json()["replays"]] == [(len(TEXTS), len(TEXTS))]
    for name, family in (("law", "llama"), ("news", "qwen3")):
        got = client.post(f"/api/adapters/{name}@2/promote", json={"alias": "production"})
        assert (got.status_code, got.json()["serving"]) == (200, f"{name}@2")
        assert f"{name}@2" in {each.version for each in house.engines[family].loaded()}
        assert complete(client, name).json()["model"] == f"{name}@2"
    Workspace(house.workspace.store.root).rollback("law")
    until(lambda: complete(client, "law").json()["model"] == "law@1", seconds=5)
    assert complete(client, "news").json()["model"] == "news@2"
    client.post("/api/aliases/news/production/rollback")


def test_a_shadow_of_an_adapter_runs_on_its_own_base(house: House, until) -> None:
    client, view = house.client(), house.running.view
    experiment = house.workspace.experiment("law")
    experiment.start(shadows="law@2")
    try:
        view.refresh()
        got = client.post("/v1/completions", json={"model": "law", "prompt": TEXTS[0], "user": "ann"})
        assert (got.status_code, got.headers["turret-experiment"]) == (200, "law#1")
        until(lambda: view.shadows.inputs == 0)
        assert client.get("/api/experiments/law").json()["serving"]["in_force"] is True
    finally:
        view.routing.router.flush()
        arms = experiment.stop().as_json()["arms"]
    assert arms[1]["compared"] == 1


# --- echoes: what needs no model --------------------------------------------------------------------------------------

HERE, THERE = ("echo", "sha256:echo"), ("other-echo", "sha256:other")


@pytest.fixture
def store_on(workspace: Workspace, tmp_path: Path):
    """Stores a version of an adapter that was trained on the base."""

    def put(base: tuple[str, str], name: str) -> Any:
        id, fingerprint = base
        said = {"base": {"id": id, "fingerprint": fingerprint}, "task": {"kind": "classify", "labels": list(LABELS)}}
        return workspace.store.put(name, write_bundle(tmp_path / "bundles", tensors(next(SEEDS)), said=said))

    return put


@pytest.fixture
def two(serve, workspace: Workspace, store_on) -> Running:
    """A server of two echoes, with an adapter on each."""
    store_on(HERE, "here")
    store_on(THERE, "there")
    return serve([Echo(workspace.store, base_id=id, fingerprint=fingerprint) for id, fingerprint in (HERE, THERE)])


def test_a_token_for_one_base_sees_nothing_of_the_other(two: Running, workspace: Workspace) -> None:
    whole = workspace.tokens.create("whole", ["infer", "admin"])[1]
    limited = workspace.tokens.create("limited", ["infer", "admin"], bases=["other*"])[1]
    two.view.refresh()
    for model in ("here", "there"):
        got = two.client(whole).post("/v1/classify", json={"model": model, "input": "x"})
        assert got.json()["data"][0]["probabilities"] == probabilities(workspace.resolve(model).digest, "x")
    client = two.client(limited)
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["other-echo", "there"]
    statuses = [
        client.post("/v1/classify", json={"model": each, "input": "x"}).status_code for each in ("here", "there")
    ]
    assert statuses == [404, 200]
    assert [complete(client, each).status_code for each in ("echo", "other-echo")] == [404, 200]
    assert complete(client, "here").json()["error"]["message"].endswith("expected one of there, other-echo")
    assert [each["version"] for each in client.get("/api/loaded").json()["loaded"]] == ["there@1"]
    status, text = client.get("/api/status").json(), client.get("/metrics").text
    assert [each["id"] for each in status["bases"]] == ["other-echo"]
    assert 'adapter="there@1"' in text
    for hidden in ('adapter="here', 'base="echo"', 'base="other-echo"', 'adapter="base"'):
        assert hidden not in text
        assert hidden in two.client(whole).get("/metrics").text


@pytest.mark.slow
def test_batches_pages_and_aliases_reach_both_bases(two: Running, workspace: Workspace, until) -> None:
    client = two.client()
    lines = [
        {"custom_id": model, "method": "POST", "url": "/v1/completions", "body": {"model": model, "prompt": "a b"}}
        for model in ("here", "there", "echo", "other-echo")
    ]
    files = {"file": ("lines.jsonl", "\n".join(map(json.dumps, lines)).encode())}
    file = client.post("/v1/files", files=files, data={"purpose": "batch"}).json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = client.post("/v1/batches", json=body).json()["id"]
    until(lambda: client.get(f"/v1/batches/{batch}").json()["status"] == "completed", seconds=10)
    output = client.get(f"/v1/batches/{batch}").json()["output_file_id"]
    answers = map(json.loads, client.get(f"/v1/files/{output}/content").text.splitlines())
    said = {each["custom_id"]: each["response"]["body"]["choices"][0]["text"] for each in answers}
    digests = {name: workspace.resolve(name).digest for name in ("here", "there")} | {"echo": None, "other-echo": None}
    assert said == {name: "".join(words(digest, "a b")) for name, digest in digests.items()}
    page = client.get("/playground").text
    assert all(f">{each}<" in page for each in ("here@1", "there@1", "echo", "other-echo"))
    page = client.get("/store/traffic").text
    assert all(f"<h3>{base}</h3>" in page for base, _ in (HERE, THERE))
    for reference in ("here@1", "there@1"):
        assert client.post(f"/api/adapters/{reference}/promote", json={"alias": "live"}).status_code == 200
    serving = {each["name"]: each["serving"] for each in client.get("/api/aliases").json()["aliases"]}
    assert serving == {"here": "here@1", "there": "there@1"}


def test_with_one_base_no_label_and_no_key_is_added(serve, put) -> None:
    put()
    client = serve().client()
    assert set(client.get("/api/status").json()) == {"base", "ready", "draining", "in_flight", "engine"}
    text = client.get("/metrics").text
    assert "turret_engine_queue_length 0.0" in text
    assert f'turret_build_info{{base="echo",fingerprint="{FINGERPRINT}",version="{turret.__version__}"}} 1.0' in text


def test_bases_that_cannot_be_told_apart_are_refused(workspace: Workspace) -> None:
    def echo(id: str, fingerprint: str) -> Echo:
        return Echo(workspace.store, base_id=id, fingerprint=fingerprint)

    with echo("/a/tiny", "sha256:1") as one, echo("/b/tiny", "sha256:2") as two, echo("/c/other", "sha256:1") as three:
        with pytest.raises(ServeRefused, match="/a/tiny and /b/tiny are both called tiny: rename one of the folders"):
            Engines(one, two)
        with pytest.raises(ServeRefused, match="/a/tiny and /c/other have the same weights: name each base once"):
            Engines(one, three)


@pytest.mark.slow
def test_one_command_serves_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "store")
    for family, kind, name in PLACES[:2]:
        base = small_models.save_base(family, tmp_path / family)
        workspace.store.put(name, bundle(tmp_path / name, base, family, kind, 1))
    command = [sys.executable, "-m", "turret", "serve", "--port", "0", "--json", "--memory", "50MB"]
    command += ["--store", str(workspace.store.root)]
    command += [f"--base={tmp_path / family}" for family, *_ in PLACES[:2]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        try:
            said = json.loads(server.stdout.readline())
            assert (said["base"], said["bases"]) == ("bert", ["bert", "qwen3"])
            with httpx2.Client(base_url=said["url"], timeout=30, trust_env=False) as client:
                assert client.post("/v1/classify", json={"model": "labels", "input": "x"}).status_code == 200
                assert complete(client, "news").status_code == 200
                assert complete(client, "news+labels").status_code == 400
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=20) == 0
        finally:
            server.kill()
