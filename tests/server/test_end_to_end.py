"""The server with the real engine on small bases: HTTP answers equal those of the stored version."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import small_models
import torch
from prometheus_client.parser import text_string_to_metric_families
from server.conftest import Running
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import turret
from turret import engine as engine_room
from turret.server.services import ServerSettings
from turret.tasks.classify import Classify
from turret.tasks.generate import Generate
from turret.tasks.questions import Questions
from turret.tasks.score import Score
from turret.workspace import Question, Workspace, serving

TOLERANCE = 2e-2  # of a probability: the base is bfloat16 if the processor supports it
TEXTS = ["a great film", "a dull story about the bank", "quick"]


@dataclass
class House:
    """A server of a base with two versions of one adapter."""

    workspace: Workspace
    running: Running
    answers: dict[str, list[dict[str, Any]]]  # version -> its answers to TEXTS without a server


def bundle(folder: Path, base: Path, family: str, kind: str, seed: int, task: Any = None, outputs: int = 2) -> Path:
    """An adapter of this base with random numbers in every tensor. task: of a classifier with so many outputs."""
    classifies = kind == "classify"
    torch.manual_seed(50 + seed)  # of the head that the base lacks: no probability within 0.05 of a tie
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs) if classifies else None
    model = model or AutoModelForCausalLM.from_pretrained(base)
    tokenizer = small_models.tokenizer(family)
    draw = torch.Generator().manual_seed(seed)
    turret.attach(model, turret.LoRA(r=4, lora_alpha=8, init_lora_weights=False), generator=draw)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(torch.randn(each.shape, generator=draw) * 0.2)
    if classifies:
        task = task or Classify(("bad", "good"), tokenizer, max_tokens=32)
        turret.save(model, folder, base=str(base), task=task.spec())
    else:
        said = Generate(tokenizer, "decoder", max_tokens=32, max_target_tokens=12)
        turret.save(model, folder, base=str(base), task=said.spec(), generation=said.generation)
    return folder


def alone(workspace: Workspace, engine: Any, version: str, kind: str) -> list[dict[str, Any]]:
    """The version's answer to each text; labels are computed without an engine."""
    if kind == "classify":
        return list(workspace.predict(version, TEXTS))
    raw = engine_room.SamplingParams(strip=False)  # as completions give it
    return [engine.generate([text], adapter=version, options=raw)[0] for text in TEXTS]


def house(folder: Path, family: str, kind: str) -> House:
    base = small_models.save_base(family, folder / family)
    workspace = Workspace(folder / "store")
    for seed in (1, 2):
        workspace.store.put("a", bundle(folder / f"bundle-{seed}", base, family, kind, seed))
    workspace.promote("a@1", "production")
    engine = workspace.engine(str(base), dtype="float32")
    answers = {version: alone(workspace, engine, version, kind) for version in ("a@1", "a@2")}
    running = Running(workspace, engine, ServerSettings(), options=engine_room.SamplingParams)
    return House(workspace, running.start(), answers)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Iterator[House]:
    made = house(tmp_path_factory.mktemp("classifier"), "bert", "classify")
    yield made
    made.running.stop()


@pytest.fixture(scope="module")
def deciders(tmp_path_factory) -> Iterator[House]:
    """Adapters that decide, of different methods of answering, and a panel `tickets` of all of them."""
    folder = tmp_path_factory.mktemp("deciders")
    base, words = small_models.save_base("bert", folder / "bert"), small_models.tokenizer("bert")
    workspace = Workspace(folder / "store")
    heads = ("tone: calm", "tone: angry", "urgent: no", "urgent: yes")
    tasks = {
        "topic": (Classify(("bank", "film", "story"), words, 32), 3),
        "stars": (Score(("1", "2", "3"), words, 32), 2),
        "heads": (Questions(heads, words, 32), 4),
        "many": (Classify(("rude", "spam"), words, 32, multi_label=True), 2),
    }
    for seed, (name, (task, outputs)) in enumerate(tasks.items(), 1):
        made = bundle(folder / name, base, "bert", "classify", seed, task, outputs)
        workspace.store.put(name, made)
    parts = ("topic", "stars", "heads", "many#spam")
    workspace.panels.create("tickets", [Question("", reference) for reference in parts])
    engine = workspace.engine(str(base), dtype="float32")
    running = Running(workspace, engine, ServerSettings(), options=engine_room.SamplingParams)
    yield House(workspace, running.start(), {})
    running.stop()


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Iterator[House]:
    made = house(tmp_path_factory.mktemp("generator"), "qwen3", "generate")
    yield made
    made.running.stop()


def test_labels_over_http_are_those_of_the_stored_version(classifier) -> None:
    client = classifier.running.client()
    first, second = ([each["probabilities"]["good"] for each in some] for some in classifier.answers.values())
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 10 * TOLERANCE
    for model, version in (("a", "a@1"), ("a@2", "a@2")):
        got = client.post("/v1/classify", json={"model": model, "input": TEXTS})
        assert got.status_code == 200, got.text
        assert got.json()["model"] == version
        assert got.headers["turret-digest"] == classifier.workspace.resolve(version).digest
        for said, expected in zip(got.json()["data"], classifier.answers[version], strict=True):
            assert said["probabilities"] == pytest.approx(expected["probabilities"], abs=TOLERANCE)


def test_a_promote_by_another_process_is_followed(classifier, until) -> None:
    client = classifier.running.client()

    def version() -> str:
        return client.post("/v1/classify", json={"model": "a", "input": "x"}).json()["model"]

    Workspace(classifier.workspace.store.root).promote("a@2", "production")
    until(lambda: version() == "a@2", seconds=5)
    Workspace(classifier.workspace.store.root).rollback("a")
    until(lambda: version() == "a@1", seconds=5)


def test_a_panel_answers_in_one_pass_with_what_each_adapter_says_alone(deciders) -> None:
    client = deciders.running.client()
    sent = [{"model": name, "input": TEXTS[1]} for name in ("topic", "stars", "heads", "many")]
    topic, stars, heads, many = (client.post("/v1/classify", json=each).json()["data"][0] for each in sent)
    choices = {
        "topic": ("story", "bank", "film"),
        "tone": ("angry", "calm"),
        "urgent": (True, False),
    }
    questions: list[dict[str, Any]] = [
        {"type": "choice", "name": name, "instructions": "", "choices": [{"value": each} for each in values]}
        for name, values in choices.items()
    ]
    levels = [{"label": each} for each in "123"]
    questions += [
        {"type": "score", "name": "stars", "instructions": "", "levels": levels},
        {"type": "predicate", "name": "spam", "instructions": ""},
    ]
    before = deciders.running.engine.stats()
    got = client.post("/v1/decisions", json={"model": "tickets", "input": TEXTS[1], "questions": questions})
    assert got.status_code == 200, got.text
    after = deciders.running.engine.stats()
    assert (after.passes, after.answers) == (before.passes + 1, before.answers + 4), "one pass of four rows"
    *chosen, graded, spam = got.json()["answers"]
    found = [{each["value"]: each["probability"] for each in answer["probabilities"]} for answer in chosen]
    assert found[0] == pytest.approx(topic["probabilities"], abs=1e-5)
    assert found[1] == pytest.approx(heads["answers"]["tone"]["probabilities"], abs=1e-5)
    urgent = heads["answers"]["urgent"]["probabilities"]
    assert found[2] == pytest.approx({True: urgent["yes"], False: urgent["no"]}, abs=1e-5)
    assert [each["probability"] for each in graded["probabilities"]] == pytest.approx(
        list(stars["probabilities"].values()), abs=1e-5
    )
    assert spam["probability"] == pytest.approx(many["probabilities"]["spam"], abs=1e-5)
    assert len({answer["receipt"] for answer in got.json()["answers"]}) == 4


def test_a_text_over_http_whole_and_in_pieces_is_that_of_the_stored_version(generator) -> None:
    with openai.OpenAI(base_url=f"{generator.running.url}/v1", api_key="none", max_retries=0) as client:
        assert generator.answers["a@1"] != generator.answers["a@2"]
        for version, answers in generator.answers.items():
            got = client.completions.create(model=version, prompt=TEXTS)
            assert [choice.text for choice in got.choices] == [answer["text"] for answer in answers]
            assert [choice.finish_reason for choice in got.choices] == [answer["finish_reason"] for answer in answers]
            read, made = (sum(answer[key] for answer in answers) for key in ("prompt_tokens", "tokens"))
            assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (read, made)
            assert read > len(TEXTS)
            message = [{"role": "user", "content": TEXTS[0]}]
            with client.chat.completions.create(model=version, messages=message, stream=True) as stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text == answers[0]["text"].strip()


def test_the_bare_base_answers_by_its_own_name_and_chat_template(generator) -> None:
    client = generator.running.client()
    body = {"model": "qwen3", "prompt": "the market", "max_tokens": 5}
    got = client.post("/v1/completions", json=body)
    assert got.status_code == 200, got.text
    assert "turret-adapter" not in got.headers
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    got = client.post("/v1/chat/completions", json={"model": "qwen3", "messages": said, "max_tokens": 5})
    assert got.status_code == 200, got.text


def test_what_the_engine_refuses_is_told_by_the_table(generator) -> None:
    client = generator.running.client()
    assert client.post("/v1/completions", json={"model": "a@9", "prompt": "x"}).status_code == 404
    assert client.post("/v1/classify", json={"model": "a", "input": "x"}).status_code in (400, 409)
    assert client.post("/v1/completions", json={"model": "a", "prompt": [9_999_999]}).status_code == 400
    beams = {"model": "a", "prompt": "x", "num_beams": 2, "temperature": 1.0}
    assert client.post("/v1/completions", json=beams).status_code == 400


def test_the_control_plane_shows_and_unloads_what_the_engine_holds(classifier) -> None:
    client = classifier.running.client()
    assert client.post("/api/adapters/a@2/load", json={"pin": True}).status_code == 200
    loaded = {each["version"]: each for each in client.get("/api/loaded").json()["loaded"]}
    assert loaded["a@2"]["pinned"] is True
    assert client.post("/api/adapters/a@2/unpin").status_code == 200
    assert client.post("/api/adapters/a@2/unload").status_code == 200
    assert "a@2" not in {each["version"] for each in client.get("/api/loaded").json()["loaded"]}
    assert client.get("/api/status").json()["base"]["id"] == "bert"
    assert "turret_engine_" in client.get("/metrics").text


def routed(client: httpx2.Client) -> dict[str, tuple[dict[str, str], float]]:
    """What a router of replicas reads: vLLM's series, with their labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    found = [sample for family in families for sample in family.samples if sample.name.startswith("vllm:")]
    return {sample.name: (sample.labels, sample.value) for sample in found}


@pytest.mark.slow
def test_a_router_reads_under_vllms_names_which_adapters_are_in_memory_and_which_wait(generator, until) -> None:
    """By protocol 003 of the Gateway API Inference Extension. A name stands there as clients write it in `model`."""
    client, started = generator.running.client(), time.time()
    for version in ("a@1", "a@2"):
        assert client.post("/v1/completions", json={"model": version, "prompt": "x"}).status_code == 200
    generator.running.view.refresh()
    labels, read_at = routed(client)["vllm:lora_requests_info"]
    assert labels["running_lora_adapters"].split(",") == ["a@2", "a@1", "a"]  # a means a@1
    assert (labels["waiting_lora_adapters"], labels["max_lora"]) == ("", "1024")
    assert started <= read_at <= time.time()
    idle = routed(client)
    names = "num_requests_waiting", "num_requests_running", "gpu_cache_usage_perc", "kv_cache_usage_perc"
    assert [idle[f"vllm:{name}"][1] for name in names] == [0, 0, 0, 0]

    limits = engine_room.Limits(running=1)
    engine = generator.workspace.engine(generator.running.engine.base.id, dtype="float32", limits=limits)
    running = Running(generator.workspace, engine, ServerSettings(), options=engine_room.SamplingParams).start()
    try:
        client = running.client()
        endless = ((engine.base.tokenizer.eos_token_id, -100.0),)
        long = engine_room.SamplingParams(max_tokens=100, logit_bias=endless)
        tickets = [engine.submit("generate", "the market", "a@2", long)]
        until(lambda: routed(client)["vllm:num_requests_running"][1] == 1, seconds=20)
        tickets += [engine.submit("generate", "the market", "a@1", long) for _ in range(2)]
        busy = routed(client)
        assert busy["vllm:num_requests_waiting"][1] == 2
        assert busy["vllm:lora_requests_info"][0]["waiting_lora_adapters"] == "a@1,a"
        assert 0 < busy["vllm:gpu_cache_usage_perc"][1] < 1
        for each in tickets:
            each.cancel()
    finally:
        running.stop()


@pytest.mark.slow
def test_a_version_that_is_deleted_while_it_waits_to_be_loaded_loses_no_request(classifier, tmp_path, until) -> None:
    workspace, client = classifier.workspace, classifier.running.client()
    base = Path(workspace.resolve("a@1").manifest["base"]["id"])
    third = str(workspace.store.put("a", bundle(tmp_path / "third", base, "bert", "classify", 3)))
    workspace.promote(third, "production")
    follow, text = classifier.running.view.aliases, {"input": "x"}
    until(lambda: client.post("/v1/classify", json={"model": "a"} | text).json()["model"] == third, seconds=5)
    with follow._lock:  # the server cannot poll now
        time.sleep(serving.FRESH)
        assert client.post(f"/api/adapters/{third}/unload").status_code == 200
        workspace.promote("a@1", "production")
        workspace.delete(third)
        assert follow.exact("a") == third
        got = client.post("/v1/classify", json={"model": "a"} | text)
        assert (got.status_code, got.json()["model"]) == (200, "a@1"), got.text
        assert client.post("/v1/classify", json={"model": third} | text).status_code == 404


def test_golden_examples_are_put_to_the_engine_that_serves_and_no_second_base_is_loaded(
    classifier, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("turret.bases.load", None)  # loading a base fails
    golden = tmp_path / "golden.csv"
    said = [f"{text},{answer['label']}" for text, answer in zip(TEXTS, classifier.answers["a@2"], strict=True)]
    golden.write_text("\n".join(["text,label", *said]))
    classifier.workspace.gate("a", "checked", golden=golden)
    got = classifier.running.client().post("/api/adapters/a@2/promote", json={"alias": "checked"})
    assert got.status_code == 200, got.text
    assert [(each["passed"], each["total"]) for each in got.json()["replays"]] == [(len(TEXTS), len(TEXTS))]


def test_a_shadow_shares_passes_with_the_answer_which_is_what_it_is_without_one(generator, until) -> None:
    client, engine, view = generator.running.client(), generator.running.engine, generator.running.view

    def passes(model: str) -> tuple[int, str]:
        before = engine.stats().passes
        got = client.post("/v1/completions", json={"model": model, "prompt": TEXTS[0], "user": "ann"})
        assert got.status_code == 200, got.text
        until(lambda: view.shadows.inputs == 0)
        return engine.stats().passes - before, got.json()["choices"][0]["text"]

    (first, text), (second, other) = passes("a@1"), passes("a@2")
    experiment = generator.workspace.experiment("a")
    experiment.start(shadows="a@2")
    try:
        view.refresh()
        tries = [passes("a") for _ in range(8)]  # on a busy machine an answer may end before its shadow starts
        assert {said for _, said in tries} == {text}
        assert min(both for both, _ in tries) < first + second - min(first, second) / 2
    finally:
        view.routing.router.flush()
        shadow = experiment.stop().as_json()["arms"][1]
    assert (shadow["compared"], shadow["agreed"]) == (len(tries), len(tries) * (text == other))
