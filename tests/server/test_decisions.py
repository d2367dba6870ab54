"""`/v1/decisions` and `/v1/systemone`: each question by its adapter, in the order and the words of the request."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Any

import pytest
import small_models
from server.arms import UNITS
from server.conftest import Running
from server.echo import FINGERPRINT, LABELS, Echo, probabilities
from server.test_promises import promised
from store.bundles import tensors, write_bundle

from turret import AsyncClient
from turret.errors import BadRequest
from turret.experiments import Guards
from turret.server.limits import Quota, RequestLimits
from turret.server.services import ServerSettings
from turret.store import Question
from turret.workspace import Workspace

TEXT = "it fell"


def predicate(name: str | None = None) -> dict[str, Any]:
    return {"type": "predicate", "instructions": "is it?"} | ({} if name is None else {"name": name})


def choice(name: str | None, *values: str | bool) -> dict[str, Any]:
    named = {} if name is None else {"name": name}
    return {"type": "choice", "instructions": "which?", "choices": [{"value": each} for each in values]} | named


def score(name: str | None, *levels: str) -> dict[str, Any]:
    named = {} if name is None else {"name": name}
    return {"type": "score", "instructions": "how?", "levels": [{"label": each} for each in levels]} | named


def ask(client: Any, *questions: dict[str, Any], model: str = "tickets", text: Any = TEXT, **more: Any) -> Any:
    headers = more.pop("headers", {})
    body = {"model": model, "input": text, "questions": list(questions), **more}
    return client.post("/v1/decisions", json=body, headers=headers)


def one(client: Any, state: Any, questions: dict[str, Any], model: str = "tickets") -> Any:
    return client.post("/v1/systemone", json={"model": model, "state": state, "questions": questions})


ORDER = ("bad", "so-so", "good")
TICKETS = [
    Question("topic", "topic"),
    Question("grade", "grade@1", "score", ORDER),
    Question("again", "topic"),
    Question("sure", "calm", threshold=0.999),
]


@pytest.fixture
def versions(put, workspace):
    """`topic`, `calm` and `grade` on the echo, in a panel `tickets`. The echo's labels are bad, good and so-so."""
    found = {name: put(name) for name in ("topic", "grade", "calm")}
    workspace.panels.create("tickets", TICKETS)
    return found


@dataclass
class House:
    """A server with the same panel, for tests that change nothing."""

    running: Running
    client: Any
    versions: dict[str, Any]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decisions")
    workspace = Workspace(folder / "store")
    manifest = {
        "base": {"id": "echo", "fingerprint": FINGERPRINT},
        "task": {"kind": "classify", "labels": list(LABELS)},
    }
    found = {
        name: workspace.store.put(name, write_bundle(folder, tensors(seed), said=manifest))
        for seed, name in enumerate(("topic", "grade", "calm"), 900)
    }
    workspace.panels.create("tickets", TICKETS)
    running = Running(workspace, Echo(workspace.store), ServerSettings()).start()
    yield House(running, running.client(), found)
    running.stop()


def said(version: Any, text: str = TEXT) -> dict[str, float]:
    return probabilities(version.digest, text)


def test_each_question_is_answered_by_its_adapter_in_the_order_of_the_request(house) -> None:
    client = house.client
    got = ask(client, score("grade", "bad", "so-so", "good"), choice("again", *LABELS), choice("topic", *LABELS))
    assert got.status_code == 200, got.text
    body, grade, topic = got.json(), said(house.versions["grade"]), said(house.versions["topic"])
    assert body["model"] == got.headers["turret-panel"] == "tickets@1"
    assert [each["name"] for each in body["answers"]] == ["grade", "again", "topic"]
    assert [each["version"] for each in body["answers"]] == ["grade@1", "topic@1", "topic@1"]
    first, again, last = body["answers"]
    assert first["score"] == pytest.approx(grade["so-so"] + 2 * grade["good"])
    assert [(each["label"], each["value"]) for each in first["probabilities"]] == [
        ("bad", 0),
        ("so-so", 1),
        ("good", 2),
    ]
    assert [each["probability"] for each in first["probabilities"]] == [
        pytest.approx(grade[label]) for label in ("bad", "so-so", "good")
    ]
    assert first["confidence"] == pytest.approx(max(grade.values()))
    assert last["choice"] == max(topic, key=topic.__getitem__)
    assert {each["value"]: each["probability"] for each in last["probabilities"]} == pytest.approx(topic)
    assert again["receipt"] == last["receipt"] != first["receipt"], "one answer of one adapter serves both"
    assert {"label_mass": None}.items() <= last.items()


def test_tokens_are_counted_once_for_each_adapter_and_the_receipt_names_the_version(serve, versions, workspace) -> None:
    running = serve()
    client = running.client()
    got = ask(client, choice("topic", *LABELS), choice("again", *LABELS), score("grade", "bad", "good"))
    usage = got.json()["usage"]
    assert usage == {
        "input_tokens": 4,
        "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 4,
    }
    alone = ask(client, choice(None, *LABELS), model="topic")
    assert alone.headers["turret-version"] == "1"
    assert alone.headers["turret-digest"] == versions["topic"].digest
    assert alone.json()["answers"][0]["receipt"] == alone.headers["turret-receipt"]
    assert alone.json()["answers"][0]["name"] is None
    running.served.usage.flush()
    rows = running.client().get("/api/usage").json()["usage"]
    assert {each["adapter"]: (each["requests"], each["prompt_tokens"]) for each in rows} == {
        "topic": (2, 4),
        "grade": (1, 2),
    }
    text = running.client().get("/metrics").text
    assert 'turret_adapter_answers_total{adapter="topic@1",kind="classify"} 2.0' in text
    assert 'turret_adapter_answers_total{adapter="grade@1",kind="classify"} 1.0' in text


def test_a_subset_of_labels_is_renormalised_and_said(house) -> None:
    got = ask(house.client, choice("topic", "good", "bad")).json()["answers"][0]
    own = said(house.versions["topic"])
    mass = own["good"] + own["bad"]
    assert got["label_mass"] == pytest.approx(mass)
    assert [each["value"] for each in got["probabilities"]] == ["good", "bad"]
    assert [each["probability"] for each in got["probabilities"]] == pytest.approx(
        [own["good"] / mass, own["bad"] / mass]
    )
    assert got["confidence"] == pytest.approx(max(own["good"], own["bad"]))


@pytest.mark.parametrize(
    ("questions", "model", "status", "says"),
    [
        (
            [choice("topic", "good", "odd")],
            "tickets",
            400,
            "no label 'odd', panel tickets@1 has 'bad', 'good', 'so-so'",
        ),
        ([choice("topic", "good", True)], "tickets", 400, "no label True, panel tickets@1 has"),
        ([choice("topic", "good", "good")], "tickets", 400, "'good' is asked for twice"),
        (
            [choice("nothing", "good", "bad")],
            "tickets",
            400,
            "no question 'nothing': panel tickets@1 asks 'topic', 'grade'",
        ),
        ([choice(None, "good", "bad")], "tickets", 400, "a question has no name: panel tickets@1 asks"),
        ([predicate("topic")], "tickets", 400, "question 'topic' is a predicate here and a choice in panel tickets@1"),
        ([score("topic", "bad", "good")], "tickets", 400, "question 'topic' is a score here and a choice"),
        ([score("grade", "good", "bad")], "tickets", 400, "from the lowest to the highest: 'bad', 'so-so', 'good'"),
        ([predicate()], "topic", 400, "topic@1 does not say which label is true: ask for a choice of 'bad'"),
        ([choice(None, "good", "odd")], "topic", 400, "no label 'odd', topic@1 has 'bad', 'good', 'so-so'"),
        ([choice("a", "x", "y")], "nobody", 404, "no adapter named 'nobody'"),
        ([choice("a", "x", "y")], "nobody", 404, "calm, grade, topic, echo, or a panel: tickets"),
        ([choice("a", "x", "y")], "tickets@7", 404, "no panel 'tickets@7': it has '1'"),
        ([], "tickets", 400, "questions"),
        ([choice("topic", "good")], "tickets", 400, "choices"),
    ],
)
def test_what_does_not_fit_is_one_line_that_says_what_would(house, questions, model, status, says) -> None:
    before = list(house.running.engine.priorities)
    got = ask(house.client, *questions, model=model)
    assert (got.status_code, says in got.json()["error"]["message"]) == (status, True), got.text
    assert len(got.json()["error"]["message"]) < 300
    assert house.running.engine.priorities == before, "nothing was asked"


def test_a_score_that_nobody_ordered_takes_the_order_of_the_request(house) -> None:
    client, own = house.client, said(house.versions["topic"])
    for order in (("bad", "good", "so-so"), ("good", "so-so", "bad")):
        got = ask(client, score(None, *order), model="topic").json()["answers"][0]
        assert got["score"] == pytest.approx(sum(place * own[label] for place, label in enumerate(order)))


def test_below_the_threshold_there_is_no_answer(serve, versions, workspace) -> None:
    client, own = serve().client(), said(versions["calm"])
    best = max(own.values())
    got = ask(client, choice("sure", *LABELS), choice("topic", *LABELS)).json()["answers"]
    assert [each["type"] for each in got] == ["refusal", "choice"]
    assert {"name": "sure", "threshold": 0.999, "version": "calm@1"}.items() <= got[0].items()
    assert got[0]["confidence"] == pytest.approx(best)
    assert not {"choice", "probabilities"} & got[0].keys()
    for threshold, kind in ((best - 1e-6, "choice"), (best + 1e-6, "refusal")):
        panel = workspace.panels.create("other", [Question("sure", "calm", threshold=threshold)])
        assert ask(client, choice("sure", *LABELS), model=str(panel)).json()["answers"][0]["type"] == kind
    # of a subset the adapter's own probability counts, not the renormalised one
    low = [label for label in LABELS if own[label] < best]
    panel = workspace.panels.create("other", [Question("sure", "calm", threshold=best - 1e-6)])
    assert ask(client, choice("sure", *low), model=str(panel)).json()["answers"][0]["type"] == "refusal"


@pytest.mark.slow
def test_without_a_threshold_of_its_own_a_question_takes_that_of_the_promise(serve, versions, workspace) -> None:
    own = said(versions["topic"])
    best = max(own.values())
    questions = [Question("plain", "topic"), Question("own", "topic", threshold=best - 1e-6)]
    workspace.panels.create("promised", questions)
    client = serve().client()
    asked = [choice("plain", *LABELS), choice("own", *LABELS)]
    assert [each["type"] for each in ask(client, *asked, model="promised").json()["answers"]] == ["choice", "choice"]
    promised(workspace, versions["topic"], threshold=best + 1e-6)
    other = serve().client()
    plain, first = ask(other, *asked, model="promised").json()["answers"]
    assert (plain["type"], first["type"]) == ("refusal", "choice")
    assert plain["threshold"] == pytest.approx(best + 1e-6)
    assert ask(other, choice(None, *LABELS), model="topic").json()["answers"][0]["type"] == "refusal"
    page = other.get("/panels/promised").text
    assert "of the promise" in page
    assert 'href="/adapters/topic/1#promise"' in page
    told = other.post("/api/outcomes", json={"receipt": plain["receipt"], "value": "bad"}).json()
    assert told["outcomes"][0]["status"] == "noted", "an answer that was not decided is noted"


def test_a_threshold_applies_to_the_median_level_which_is_the_answer_of_a_score(serve, put, workspace) -> None:
    """As the promise of its version, `/v1/classify` and the evaluation of a panel do."""
    version = put("grade", labels=ORDER)
    workspace.panels.create("p", [Question("grade", "grade", "score", ORDER)])
    chances = {"bad": 0.4, "so-so": 0.25, "good": 0.35}
    client = serve(heads={"grade": {"label": "so-so", "probabilities": chances}}).client()
    for model in ("p", "grade"):
        level, chosen = ask(client, score("grade", *ORDER), choice("grade", *ORDER), model=model).json()["answers"]
        assert (level["confidence"], level["score"]) == (0.25, pytest.approx(0.95))
        assert (chosen["choice"], chosen["confidence"]) == ("so-so", 0.25)
        (few,) = ask(client, choice("grade", "bad", "good"), model=model).json()["answers"]
        assert (few["choice"], few["confidence"]) == ("bad", 0.4), (
            "the most probable, where the answer is not asked for"
        )
    asked = {"grade": {"type": "choice", "criteria": dict.fromkeys(ORDER)}}
    said = one(client, TEXT, asked, "p").json()
    assert (said["answers"]["grade"]["choice"], said["answers"]["grade"]["confidence"]) == ("so-so", 0.25)
    assert said["diagnostics"]["grade"]["argmax_is_label"] is True
    promised(workspace, version, threshold=0.3)
    other = serve(heads={"grade": {"label": "so-so", "probabilities": chances}}).client()
    for model in ("p", "grade"):
        (refused,) = ask(other, score("grade", *ORDER), model=model).json()["answers"]
        assert (refused["type"], refused["confidence"], refused["threshold"]) == ("refusal", 0.25, 0.3)
    asked = {"grade": {"type": "score", "criteria": list(ORDER)}}
    assert one(other, TEXT, asked, "p").json()["answers"]["grade"]["type"] == "refusal"
    abstains = other.post("/v1/classify", json={"model": "grade", "input": TEXT}).json()["data"][0]["abstain"]
    assert abstains is True


def test_a_value_that_is_given_twice_to_a_base_is_refused(serve) -> None:
    client = serve(tokenizer=small_models.tokenizer("llama")).client()
    for question, label in (
        (choice("a", "x", "x", "y"), "x"),
        (choice("a", True, True, False), "yes"),
        (choice("a", "yes", True), "yes"),
        (score("a", "lo", "lo", "hi"), "lo"),
    ):
        got = ask(client, question, model="echo")
        assert got.status_code == 400, got.text
        says = f"question 'a': '{label}' is asked for twice: give each value once"
        assert got.json()["error"]["message"] == says
    got = one(client, TEXT, {"a": {"type": "score", "criteria": ["lo", "lo", "hi"]}}, "echo")
    assert (got.status_code, "'lo' is asked for twice" in got.text) == (400, True), got.text


def test_a_predicate_is_the_probability_of_the_true_label_and_its_choices_keep_their_type(
    serve, workspace, put
) -> None:
    class Sides(Echo):
        """Its labels are no and yes."""

    put("urgent", labels=("no", "yes"))
    workspace.panels.create("p", {"urgent": "urgent"})
    running = serve(Sides(workspace.store, labels=("no", "yes")))
    client = running.client()
    own = probabilities(workspace.resolve("urgent").digest, TEXT, ("no", "yes"))
    for model in ("p", "urgent"):
        questions = [predicate("urgent"), choice("urgent", True, False), choice("urgent", "yes", "no")]
        said, typed, plain = ask(client, *questions, model=model).json()["answers"]
        assert said["probability"] == pytest.approx(own["yes"])
        best = own["yes"] > own["no"]
        assert typed["choice"] is best
        assert [each["value"] for each in typed["probabilities"]] == [True, False]
        assert plain["choice"] == ("yes" if best else "no")
        assert typed["probabilities"][0]["probability"] == pytest.approx(own["yes"])
    twice = ask(client, choice("urgent", True, "yes"), model="p")
    assert "'yes' is asked for twice" in twice.json()["error"]["message"]


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("it fell", "it fell"),
        ([{"role": "user", "content": "it fell"}], "it fell"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "it "}, {"type": "input_text", "text": "fell"}],
                }
            ],
            "it fell",
        ),
        ([{"type": "message", "role": "user", "content": "it"}, {"role": "user", "content": "fell"}], "it\n\nfell"),
        ([{"role": "user", "content": [{"type": "input_json", "data": {"message": "it fell"}}]}], "it fell"),
        ([{"role": "user", "content": [{"type": "input_json", "data": {"a": "it", "b": 2}}]}], '{"a":"it","b":2}'),
        (
            [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "it fell"}],
            "developer: be kind\n\nuser: it fell",
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "why?"}, {"type": "refusal", "refusal": " no"}],
                },
                {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "it fell"},
                {"type": "custom_tool_call", "call_id": "2", "name": "run", "input": "x"},
                {"type": "custom_tool_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
            ],
            "assistant: why? no\n\nfunction_call: look {}\n\nfunction_call_output: it fell\n\n"
            "custom_tool_call: run x\n\ncustom_tool_call_output: y",
        ),
    ],
)
def test_messages_become_the_text_that_is_read(house, given, read) -> None:
    got = ask(house.client, choice("topic", *LABELS), text=given)
    assert got.status_code == 200, got.text
    found = {each["value"]: each["probability"] for each in got.json()["answers"][0]["probabilities"]}
    assert found == pytest.approx(said(house.versions["topic"], read))


def test_an_image_is_refused_and_keys_without_effect_are_taken(house) -> None:
    client = house.client
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA=="}]}]
    refused = ask(client, choice("topic", *LABELS), text=image)
    assert refused.status_code == 400
    assert "input_image" in refused.text or "type" in refused.text
    plain = {"prompt_cache_key": "k", "prompt_cache_options": {"ttl": "30m"}, "safety_identifier": "s"}
    assert ask(client, choice("topic", *LABELS), **plain).status_code == 200
    assert ask(client, choice("topic", *LABELS), temperature=1).status_code == 400


# --- /v1/systemone ----------------------------------------------------------------------------------------------------


def test_systemone_answers_by_the_ids_of_the_questions(house) -> None:
    asked = {
        "topic": {"type": "choice", "instructions": "which?", "criteria": {"good": None, "bad": "not good"}},
        "grade": {"type": "score", "instructions": "how?", "criteria": ["bad", "so-so", "good"]},
        "sure": {"type": "choice", "criteria": dict.fromkeys(LABELS)},
    }
    got = one(house.client, TEXT, asked)
    assert got.status_code == 200, got.text
    body, topic, grade = got.json(), said(house.versions["topic"]), said(house.versions["grade"])
    mass = topic["good"] + topic["bad"]
    assert (body["object"], body["model"]) == ("structured_decision", "tickets@1")
    assert list(body["answers"]) == ["topic", "grade", "sure"]
    assert body["answers"]["topic"] == {
        "type": "choice",
        "choice": "good" if topic["good"] >= topic["bad"] else "bad",
        "probabilities": {"good": pytest.approx(topic["good"] / mass), "bad": pytest.approx(topic["bad"] / mass)},
        "confidence": pytest.approx(max(topic["good"], topic["bad"])),
    }
    assert body["answers"]["grade"]["legend"] == {"0": "bad", "1": "so-so", "2": "good"}
    assert body["answers"]["grade"]["score"] == pytest.approx(grade["so-so"] + 2 * grade["good"])
    assert body["answers"]["sure"]["type"] == "refusal"
    assert body["usage"] == {"input_tokens": 6, "output_tokens": 0}
    diagnostics = body["diagnostics"]["topic"]
    assert diagnostics["label_mass"] == pytest.approx(mass)
    assert diagnostics["argmax_is_label"] is (topic["so-so"] <= max(topic["good"], topic["bad"]))
    assert (diagnostics["version"], body["diagnostics"]["grade"]["version"]) == ("topic@1", "grade@1")


@pytest.mark.parametrize(
    ("state", "read"),
    [
        ("it fell", "it fell"),
        ({"document": "it fell"}, "it fell"),
        ({"a": 1, "b": [2]}, '{"a":1,"b":[2]}'),
        (["a", {"b": 1}], '["a",{"b":1}]'),
    ],
)
def test_a_state_of_any_form_becomes_a_text(house, state, read) -> None:
    got = one(house.client, state, {"topic": {"type": "choice", "criteria": dict.fromkeys(LABELS)}})
    assert got.json()["answers"]["topic"]["probabilities"] == pytest.approx(said(house.versions["topic"], read))


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ({"type": "choice"}, "criteria must be an object from its labels, 1 to 255"),
        ({"type": "score", "criteria": {"a": None}}, "criteria must be a list of its levels"),
        ({"type": "choice", "criteria": {"odd": None}}, "no label 'odd'"),
        ({"type": "noul"}, "is a predicate here and a choice in panel"),
        ({"type": "box"}, "type"),
    ],
)
def test_a_question_of_systemone_that_does_not_fit_is_one_line(house, question, says) -> None:
    got = one(house.client, TEXT, {"topic": question})
    assert got.status_code == 400
    assert says in got.json()["error"]["message"]


# --- the client -------------------------------------------------------------------------------------------------------


def test_turrets_own_client_asks_a_panel(house) -> None:
    async def decide() -> Any:
        async with AsyncClient(house.running.url) as client:
            with pytest.raises(BadRequest, match="no label 'odd'"):
                await client.decide(TEXT, [choice("topic", "good", "odd")], "tickets")
            asked = [{"type": "choice", "name": "topic", "choices": [{"value": label} for label in LABELS]}]
            texts = (TEXT, [{"role": "user", "content": TEXT}])
            return [await client.decide(text, asked, "tickets", unit="ann") for text in texts]

    for found in asyncio.run(decide()):
        assert found["model"] == "tickets@1"
        given = {each["value"]: each["probability"] for each in found["answers"][0]["probabilities"]}
        assert given == pytest.approx(said(house.versions["topic"]))


# --- as for /v1/classify ----------------------------------------------------------------------------------------------


def test_a_panel_of_another_tenant_does_not_exist(serve, versions, workspace) -> None:
    legal = Workspace(workspace.store.root, tenant="legal")
    tokens = {
        name: each.tokens.create(name, ("infer",))[1] for name, each in (("default", workspace), ("legal", legal))
    }
    running = serve()
    theirs, never = (
        ask(running.client(tokens["legal"]), choice("topic", *LABELS), model=model) for model in ("tickets", "nothing")
    )
    assert theirs.status_code == never.status_code == 404
    assert theirs.text.replace("tickets", "nothing") == never.text
    assert ask(running.client(tokens["default"]), choice("topic", *LABELS)).status_code == 200
    assert ask(running.client(), choice("topic", *LABELS)).status_code == 401


def test_a_token_without_one_of_the_adapters_does_not_see_the_panel(serve, versions, workspace) -> None:
    some = workspace.tokens.create("some", ("infer",), adapters=("tickets", "topic"))[1]
    every = workspace.tokens.create("every", ("infer",), adapters=("tickets", "topic", "grade", "calm"))[1]
    running = serve()
    assert ask(running.client(some), choice("topic", *LABELS)).status_code == 404
    assert ask(running.client(every), choice("topic", *LABELS)).status_code == 200


def test_one_request_is_taken_from_a_token_and_one_from_each_adapter(serve, versions, workspace) -> None:
    token = workspace.tokens.create("some", ("infer",), requests_per_minute=2)[1]
    running = serve()
    client = running.client(token)
    asked = [choice("topic", *LABELS), choice("again", *LABELS), score("grade", "bad", "good")]
    assert [ask(client, *asked).status_code for _ in range(3)] == [200, 200, 429]
    other = workspace.tokens.create("other", ("infer",))[1]
    limited = serve(per_adapter=Quota(requests=1)).client(other)
    assert ask(limited, asked[0]).status_code == 200
    refused = ask(limited, *asked)
    assert refused.status_code == 429
    assert "adapter topic" in refused.json()["error"]["message"]


@pytest.mark.slow
def test_an_experiment_on_one_adapter_places_the_unit_and_counts_its_outcome(serve, put, workspace) -> None:
    for _ in range(2):
        put("a")
    put("b")
    workspace.promote("a@1", "production")
    workspace.panels.create("p", {"a": "a", "b": "b"})
    running = serve()
    workspace.experiment("a").start("a@2", share=0.5, guards=Guards(worse_by=None))
    running.view.refresh()
    client, router, seen = running.client(), workspace.router(), set()
    for unit in UNITS:
        found = router.choose(router.running("a"), unit)
        got = ask(client, choice("a", *LABELS), choice("b", *LABELS), model="p", headers={"turret-unit": unit})
        first, second = got.json()["answers"]
        assert (first["version"], second["version"]) == (found.version, "b@1")
        seen.add(first["version"])
        told = client.post("/api/outcomes", json=[{"value": 1, "receipt": each["receipt"]} for each in (first, second)])
        assert [each["status"] for each in told.json()["outcomes"]] == ["counted", "unknown"]
    assert seen == {"a@1", "a@2"}


def test_an_alias_that_moves_changes_the_answer_and_a_number_does_not(serve, versions, put, workspace) -> None:
    running = serve()
    client = running.client()
    put("topic"), put("grade")
    for name in ("topic", "grade"):
        workspace.promote(f"{name}@2", "production")
    running.view.refresh()
    got = ask(client, choice("topic", *LABELS), score("grade", "bad", "good")).json()["answers"]
    assert [each["version"] for each in got] == ["topic@2", "grade@1"]


def test_a_promote_of_a_panel_is_followed_at_once_and_a_rollback_too(serve, versions, workspace) -> None:
    client = serve().client()
    workspace.panels.create("tickets", {"topic": "grade"})
    model = lambda: ask(client, choice("topic", *LABELS)).json()["model"]
    assert model() == "tickets@2", "the newest, while nothing was promoted"
    workspace.panels.promote("tickets@1")
    assert model() == "tickets@1"
    workspace.panels.promote("tickets@2")
    workspace.panels.rollback("tickets")
    assert model() == "tickets@1"


def test_an_adapter_that_answers_with_other_labels_now_is_said(serve, versions, put, workspace) -> None:
    put("topic", labels=("bad", "good", "new"))
    workspace.promote("topic@2", "production")
    running = serve(Echo(workspace.store, labels=("bad", "good", "new")))
    got = ask(running.client(), choice("topic", *LABELS))
    assert got.status_code == 409
    assert "topic@2 has no label 'so-so', it has 'bad', 'good', 'new'" in got.json()["error"]["message"]


@pytest.mark.slow
def test_a_version_that_cannot_be_loaded_fails_the_request_and_cancels_the_others(serve, versions, workspace) -> None:
    running = serve(broken={"grade@1"}, pace=2.0)
    assert ask(running.client(), choice("topic", *LABELS)).status_code == 200  # it now pauses
    got = ask(running.client(), choice("topic", *LABELS), score("grade", "bad", "good"), choice("sure", *LABELS))
    assert got.status_code == 409
    assert len(running.engine.cancelled) == 1
    assert ask(running.client(), choice("topic", *LABELS)).status_code == 200


def test_the_log_has_one_line_with_all_versions(serve, versions, until) -> None:
    running = serve()
    ask(running.client(), choice("topic", *LABELS), score("grade", "bad", "good"))
    until(lambda: any("adapters" in each for each in running.log()))
    (line,) = [each for each in running.log() if "adapters" in each]
    assert line["adapters"] == ["topic@1", "grade@1"]
    assert (line["inputs"], line["tokens"]) == (2, 4)


def test_a_line_of_a_batch_asks_a_panel(serve, versions, until) -> None:
    client = serve().client()
    body = {"model": "tickets", "input": TEXT, "questions": [choice("topic", *LABELS)]}
    line = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/decisions", "body": body})
    sent = client.post("/v1/files", files={"file": ("x.jsonl", line)}, data={"purpose": "batch"}).json()["id"]
    asked = {"input_file_id": sent, "endpoint": "/v1/decisions", "completion_window": "24h"}
    batch = client.post("/v1/batches", json=asked).json()["id"]
    found = lambda: client.get(f"/v1/batches/{batch}").json()
    until(lambda: found()["status"] == "completed", seconds=20)
    output = client.get(f"/v1/files/{found()['output_file_id']}/content").text
    answered = json.loads(output)["response"]["body"]["answers"][0]
    assert {each["value"]: each["probability"] for each in answered["probabilities"]} == pytest.approx(
        said(versions["topic"])
    )


@pytest.mark.slow
def test_400_questions_to_400_adapters_are_answered_and_one_more_is_refused(serve, put, workspace) -> None:
    names = [f"a{number}" for number in range(400)]
    found = {name: put(name) for name in names}
    workspace.panels.create("wide", {name: name for name in names})
    client = serve(slots=16).client()
    got = ask(client, *(choice(name, *LABELS) for name in names), model="wide")
    assert got.status_code == 200, got.text[:300]
    for name, answer in zip(names, got.json()["answers"], strict=True):
        assert {e["value"]: e["probability"] for e in answer["probabilities"]} == pytest.approx(said(found[name]))
    refused = ask(client, *(choice("a1", *LABELS) for _ in range(401)), model="wide")
    assert refused.status_code == 400
    assert "400" in refused.json()["error"]["message"]
    many = [choice("a1", *map(str, range(255))) for _ in range(400)]
    refused = ask(client, *many, model="wide")
    assert refused.status_code == 413
    assert (
        refused.json()["error"]["message"] == "the body has more than 4096 keys: send what it asks in several requests"
    )


def test_a_client_that_leaves_frees_every_adapter(serve, versions, until) -> None:
    running = serve(pace=0.5, limits=RequestLimits())
    body = json.dumps(
        {"model": "tickets", "input": TEXT, "questions": [choice("topic", *LABELS), score("grade", "bad", "good")]}
    )
    head = f"POST /v1/decisions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\n\r\n"
    running.engine.pace = 30.0
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall((head + body).encode())
        until(lambda: len(running.engine.cold) == 2, seconds=10)
    until(lambda: running.served.load.requests == 0, seconds=10)
