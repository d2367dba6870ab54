"""`turret serve --engine vllm` over a real vLLM: its answers, promotes, tenants, experiments, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import small_models
from byte_level import save_adapter, save_base, tokenizer
from command_line import typed
from server.conftest import Running
from server.patience import until
from server.test_end_to_end import TEXTS
from vllm_server import HEAD_DIM, MAX_RANK, Vllm, needs_vllm

import turret
from turret import bundles
from turret.access import Access
from turret.engine import SamplingParams
from turret.engine.constraint import Constraint
from turret.engine.request import VllmServer
from turret.engine.vllm import lark_of
from turret.experiments import Guards
from turret.server.services import ServerSettings
from turret.tasks.generate import Generate
from turret.workspace import Workspace
from turret.workspace.serving import vllm_engine

ALL = ("infer", "admin")
LENGTH = 12
NAME = "small"  # of the base


def wide(folder: Path, base: Path) -> Path:
    """An adapter whose rank is above vLLM's limit here."""
    return save_adapter(folder, base, 1, turret.LoRA(r=2 * MAX_RANK, lora_alpha=8))


@dataclass
class House:
    """A server of Turret whose answers a vLLM computes, and what the versions of `a` answer there to TEXTS."""

    workspace: Workspace
    vllm: Vllm
    running: Running
    base: Path
    expected: dict[str, list[str]]

    def client(self, tenant: str = "default") -> httpx2.Client:
        workspace = self.workspace.with_access(Access(tenant))
        secret = workspace.tokens.create(f"t{time.monotonic_ns()}", ALL)[1]
        self.running.view.refresh()
        return self.running.client(
            secret,
        )


def whole(text: str) -> str:
    """A text without the bytes of a character that its end has cut: vLLM leaves them out, Turret writes one sign."""
    return text.rstrip("�").strip()


def direct(vllm: Vllm, workspace: Workspace, base: Path, version: str, folder: Path) -> list[str]:
    """What this vLLM answers with a version, asked without Turret: a folder, a name, and the tokens of each prompt."""
    workspace.store.materialize(version, folder)
    vllm.ask("/v1/load_lora_adapter", {"lora_name": f"direct {version}", "lora_path": str(folder)})
    spec = bundles.read_bundle(folder).task
    task = Generate.from_spec(spec, tokenizer())
    prompts = [each.ids.tolist() for each in task.encode_sources(TEXTS)]
    said = {"max_tokens": LENGTH, "temperature": 0, "ignore_eos": True, "stop_token_ids": [task.end]}
    got = vllm.ask("/v1/completions", {"model": f"direct {version}", "prompt": prompts, **said})
    vllm.ask("/v1/unload_lora_adapter", {"lora_name": f"direct {version}"})
    return [whole(each["text"]) for each in got["choices"]]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("vllm")
    base = save_base(folder / NAME, head_dim=HEAD_DIM)
    workspace = Workspace(folder / "store")
    for seed in (1, 2):
        workspace.store.put("a", save_adapter(folder / f"a{seed}", base, seed))
        own = workspace.with_access(Access(f"tenant{seed}")).store
        own.put("a", save_adapter(folder / f"t{seed}", base, 10 + seed))
        own.put("same", save_adapter(folder / f"s{seed}", base, 20))
    workspace.promote("a@1", "production")
    workspace.store.put("wide", wide(folder / "wide", base))
    vllm = Vllm(base, folder)
    try:
        vllm.start()
        expected = {each: direct(vllm, workspace, base, each, folder / each) for each in ("a@1", "a@2")}
        assert expected["a@1"] != expected["a@2"]
        engine = vllm_engine(workspace.store, str(base), server=VllmServer(vllm.url))
        running = Running(workspace, engine, ServerSettings(), options=SamplingParams).start()
        yield House(workspace, vllm, running, base, expected)
        running.stop()
    finally:
        if vllm.process is not None:
            vllm.kill()


def completed(client: httpx2.Client, model: str, **more: Any) -> httpx2.Response:
    body = {"model": model, "prompt": TEXTS, "max_tokens": LENGTH, "temperature": 0, **more}
    return client.post("/v1/completions", json=body)


def texts(got: httpx2.Response) -> list[str]:
    assert got.status_code == 200, got.text
    return [whole(each["text"]) for each in got.json()["choices"]]


@pytest.mark.slow
@needs_vllm
def test_answers_are_those_of_the_same_vllm_asked_directly_whole_and_as_a_stream(house: House) -> None:
    client = house.client()
    for version, expected in house.expected.items():
        got = completed(client, version)
        assert texts(got) == expected
        assert got.headers["turret-digest"] == house.workspace.resolve(version).digest
        pieces = ["", "", ""]
        with client.stream("POST", "/v1/completions", json={"model": version, "prompt": TEXTS, "max_tokens": LENGTH,
                                                            "temperature": 0, "stream": True}) as stream:  # fmt: skip
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    pieces[choice["index"]] += choice["text"]
        assert list(map(whole, pieces)) == expected
    base = completed(client, NAME)
    ids = [house.running.engine.base.tokenizer(each)["input_ids"] for each in TEXTS]
    asked = {"model": "base", "prompt": ids, "max_tokens": LENGTH, "temperature": 0}
    assert texts(base) == [whole(each["text"]) for each in house.vllm.ask("/v1/completions", asked)["choices"]]


@pytest.mark.slow
@needs_vllm
def test_answers_and_logprobs_are_those_of_an_engine_of_this_process(house: House) -> None:
    options = SamplingParams(max_tokens=LENGTH, logprobs=3)
    with house.workspace.engine(str(house.base), dtype="float32") as own:
        for reference in ("a@1", "a@2", None):
            mine, theirs = (each.generate(TEXTS, reference, options) for each in (own, house.running.engine))
            for one, other in zip(mine, theirs, strict=True):
                assert {key: one[key] for key in ("text", "finish_reason", "tokens", "prompt_tokens")} == {
                    key: other[key] for key in ("text", "finish_reason", "tokens", "prompt_tokens")
                }
                for a, b in zip(one["logprobs"], other["logprobs"], strict=True):
                    assert (a["id"], a["token"]) == (b["id"], b["token"])
                    assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)
                    assert [each["id"] for each in a["top"]] == [each["id"] for each in b["top"]]


@pytest.mark.slow
@needs_vllm
def test_a_promote_and_a_rollback_under_load_give_no_stale_answer_and_no_error(house: House) -> None:
    client, seen, problems = house.client(), list[tuple[float, str]](), list[str]()
    over = threading.Event()

    def ask() -> None:
        own = house.client()
        while not over.is_set():
            sent = time.monotonic()
            got = completed(own, "a")
            if got.status_code != 200:
                problems.append(got.text)
                continue
            version = str(got.json()["model"])
            seen.append((sent, version))
            if texts(got) != house.expected[version]:
                problems.append(f"{version} did not answer as itself")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for each in threads:
        each.start()
    moves: list[tuple[float, str]] = []
    try:
        for version in ("a@2", "a@1", "a@2", "a@1"):
            before = len(seen)
            until(lambda count=before: len(seen) > count + 8, 120)
            got = client.post(f"/api/adapters/{version}/promote", json={"alias": "production"})
            assert got.status_code == 200, got.text
            moves.append((time.monotonic(), version))
        before = len(seen)
        until(lambda: len(seen) > before + 8, 120)
    finally:
        over.set()
        for each in threads:
            each.join(timeout=120)
    assert problems == []
    assert {version for _, version in seen} == {"a@1", "a@2"}
    for at, (moved, version) in enumerate(moves):
        end = moves[at + 1][0] - 5 if at + 1 < len(moves) else float("inf")
        stale = [each for sent, each in seen if moved < sent < end and each != version]
        assert stale == [], f"after the move to {version}"


@pytest.mark.slow
@needs_vllm
def test_one_name_is_another_adapter_for_each_tenant_and_equal_bytes_are_loaded_apart(house: House) -> None:
    clients = {tenant: house.client(tenant) for tenant in ("default", "tenant1", "tenant2")}
    answers = {tenant: texts(completed(client, "a@1")) for tenant, client in clients.items()}
    assert answers["default"] == house.expected["a@1"]
    assert answers["tenant1"] != answers["tenant2"]
    for tenant in ("tenant1", "tenant2"):
        assert texts(completed(clients[tenant], "same")) == texts(completed(clients["tenant1"], "same"))
        assert completed(clients[tenant], "wide").status_code == 404
    digest = house.workspace.with_access(Access("tenant1")).resolve("same").digest
    assert {f"tenant1/{digest}", f"tenant2/{digest}"} <= house.vllm.names()
    assert digest not in house.vllm.names()
    loaded = clients["tenant1"].get("/api/loaded").json()["loaded"]
    assert {each["version"] for each in loaded} == {"a@1", "same@1"}


@pytest.mark.slow
@needs_vllm
def test_a_guard_rolls_back_a_candidate_that_vllm_cannot_serve(house: House, tmp_path: Path) -> None:
    """The candidate's rank is above the limit of this vLLM. Its errors are its arm's, and the control goes on."""
    workspace, client = house.workspace, house.client()
    workspace.store.put("b", save_adapter(tmp_path / "b", house.base, 5))
    workspace.promote("b@1", "production")
    candidate = str(workspace.store.put("b", wide(tmp_path / "wide", house.base)))
    house.running.view.refresh()
    workspace.experiment("b").start(candidate, share=0.5, guards=Guards(max_errors=0.02))  # by another process
    until(lambda: client.get("/api/experiments/b").json()["serving"]["in_force"], 60)
    arms: dict[str, set[int]] = {}

    def ended() -> bool:
        for unit in range(40):
            got = completed(client, "b", user=f"user {unit}", max_tokens=1, prompt="x")
            arms.setdefault(got.headers.get("turret-arm", "none"), set()).add(got.status_code)
        return not client.get("/api/experiments/b").json()["serving"]["in_force"]

    until(ended, 120)
    assert arms["control"] == {200}
    assert 200 not in arms["candidate"]
    got = completed(client, "b", user="user 1", prompt="x")
    assert (got.status_code, got.json()["model"]) == (200, "b@1")


@pytest.mark.slow
@needs_vllm
def test_an_experiment_divides_units_and_each_arm_answers_with_its_own_version(house: House) -> None:
    client = house.client()
    began = client.post("/api/experiments/a/start", json={"candidates": ["a@2"], "share": 0.5})
    assert began.status_code == 200, began.text
    house.running.view.refresh()
    try:
        arms: dict[str, str] = {}
        for unit in range(16):
            got = completed(client, "a", user=f"user {unit}")
            arms[got.headers["turret-arm"]] = version = got.json()["model"]
            assert texts(got) == house.expected[version]
            again = completed(client, "a", user=f"user {unit}")
            assert again.headers["turret-arm"] == got.headers["turret-arm"]
        assert arms == {"control": "a@1", "candidate": "a@2"}
        receipt = {"receipt": got.headers["turret-receipt"], "value": 1}
        assert client.post("/api/outcomes", json=[receipt]).json()["counts"] == {"counted": 1}
    finally:
        assert client.post("/api/experiments/a/stop").status_code == 200


@pytest.mark.slow
@needs_vllm
def test_what_vllm_cannot_do_is_refused_in_one_line(house: House) -> None:
    client = house.client()
    refused = {
        "rank": completed(client, "wide"),
        "sum": completed(client, "a@1+a@2"),
        "beams": completed(client, "a@1", num_beams=2),
        "echo": completed(client, "a@1", echo=True),
        "labels": client.post("/v1/classify", json={"model": "a@1", "input": "x"}),
        "vectors": client.post("/v1/embeddings", json={"model": NAME, "input": "x"}),
    }
    said = {name: got.json()["error"]["message"] for name, got in refused.items()}
    for name, got in refused.items():
        assert 400 <= got.status_code < 500, (name, got.text)
        assert "\n" not in said[name]
        assert len(said[name]) < 300
    assert f"rank {2 * MAX_RANK}" in said["rank"]
    assert "turret merge" in said["sum"]
    assert "num_beams" in said["beams"]


@pytest.mark.slow
@needs_vllm
def test_a_constrained_answer_keeps_to_its_constraint(house: House) -> None:
    client, schema = house.client(), {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
                                      "additionalProperties": False}  # fmt: skip
    got = completed(client, "a@1", structured_outputs={"choice": ["yes", "no"]}, prompt="x")
    assert texts(got)[0] in ("yes", "no")
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    got = completed(client, "a@1", response_format=form, prompt="x", max_tokens=100)
    assert texts(got)[0].replace(" ", "").replace("\n", "") in ('{"n":1}', '{"n":2}'), got.text
    got = completed(client, "a@1", structured_outputs={"regex": "[a-c]{3}"}, prompt="x")
    assert set(texts(got)[0]) <= set("abc")


@pytest.mark.slow
@needs_vllm
def test_a_client_that_leaves_ends_its_request_in_vllm(house: House) -> None:
    client = house.client()

    def made() -> float:
        """Tokens that vLLM has generated."""
        lines = house.vllm.ask("/metrics").splitlines()
        return sum(float(each.rpartition(" ")[2]) for each in lines if each.startswith("vllm:generation_tokens_total"))

    def at_rest() -> bool:
        before = made()
        time.sleep(1)
        return made() == before

    def ends_early(ask: Callable[[], None]) -> bool:
        """Whether vLLM makes less than the whole answer in one of ten tries: often it ends before it sends one."""
        for _ in range(10):
            before = made()
            ask()
            until(at_rest, 60)
            if made() - before < 200:
                return True
        return False

    end = house.running.engine.base.tokenizer.eos_token_id
    body = {"prompt": "x", "max_tokens": 200, "logit_bias": {str(end): -100}}

    def stay() -> None:
        got = completed(client, "a@1", **body)
        assert got.json()["usage"]["completion_tokens"] == 200, got.text

    def leave() -> None:
        with client.stream("POST", "/v1/completions", json=body | {"model": "a@1", "stream": True}) as stream:
            first = next(stream.iter_lines())
            assert (stream.status_code, '"text"' in first) == (200, True), first

    def stop() -> None:
        got = completed(client, "a@1", **body, stop=[word])
        assert got.json()["choices"][0]["finish_reason"] == "stop", got.text

    word = texts(completed(client, "a@1", **body))[0][3:5]
    assert not ends_early(stay), "control: nobody leaves"
    assert ends_early(leave)
    assert ends_early(stop), "a stop text ends the request in vLLM too"
    assert house.running.engine.stats().running == 0


@pytest.mark.slow
@needs_vllm
def test_a_vllm_that_was_killed_is_503_and_after_its_start_its_adapters_are_loaded_again(house: House) -> None:
    client = house.client()
    assert texts(completed(client, "a@2")) == house.expected["a@2"]
    house.vllm.kill()
    got = completed(client, "a@2")
    assert got.status_code == 503, got.text
    assert "does not answer" in got.json()["error"]["message"]
    house.vllm.start()
    assert house.vllm.names() == set()
    assert texts(completed(client, "a@2")) == house.expected["a@2"]
    assert len(house.vllm.names()) == 1


@pytest.mark.slow
@needs_vllm
def test_the_command_serves_by_a_vllm_and_leaves_no_adapter_there(house: House, tmp_path: Path) -> None:
    store = str(house.workspace.store.root)
    command = [sys.executable, "-m", "turret", "serve", "--store", store, "--base", str(house.base), "--port", "0"]
    command += ["--json", "--engine", "vllm", "--engine-url", house.vllm.url, "--engine-folder", str(tmp_path)]
    token = house.workspace.tokens.create("command", ("infer",))[1]
    before = house.vllm.names()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            assert said["device"] == f"vLLM at {house.vllm.url}"
            headers = {"authorization": f"Bearer {token}"}
            with httpx2.Client(base_url=said["url"], headers=headers, timeout=120, trust_env=False) as client:
                until(lambda: client.get("/readyz").status_code == 200, 60)
                assert texts(completed(client, "a@2")) == house.expected["a@2"]
                assert list(tmp_path.iterdir())
            process.terminate()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    assert house.vllm.names() <= before
    assert list(tmp_path.iterdir()) == []


# --- without vLLM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--engine vllm needs the address"),
        (("--engine-url", "127.0.0.1:8000"), "expected a URL such as"),
        (("--engine-url", "http://127.0.0.1:9", "--base", "x"), "serves one base, and 2 are given"),
        (("--engine-url", "http://127.0.0.1:9", "--train"), "--train does not go with --engine vllm"),
        (("--engine-url", "http://127.0.0.1:9", "--engine-folder", "/not/there"), "is not a folder"),
        (("--engine-url", "http://127.0.0.1:9"), "vLLM does not answer /v1/models"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    base = small_models.save_base("llama", tmp_path / "llama")
    command = ["serve", "--engine", "vllm", "--base", str(base), "--store", str(tmp_path / "store"), "--port", "0"]
    status, out, err = typed(*command, *words)
    assert (status, out) == (2, ""), err
    assert said in err
    assert len(err.strip().splitlines()[-1]) < 300


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint.regex("[a-c]+"),
        Constraint.choice(["yes", "no"]),
        Constraint.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}}),
        Constraint.json_between(["<t>"], {"type": "object"}, ["</t>"], "x"),
    ],
    ids=lambda each: each.what,
)
def test_a_constraint_is_the_same_in_the_form_that_vllm_reads(constraint: Constraint) -> None:
    from llguidance import LLMatcher

    lark = lark_of(constraint.grammar)
    assert "start:" in lark
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(lark)) == ""
