"""Other people's clients get from a real server what the engine answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import small_models
import torch

from turret.data.conversations import prompt_of, turns_of
from turret.engine import Embedding, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.clients]
TEXT = "the market fell"


@pytest.fixture(scope="session")
def expected(house) -> dict[str, Any]:
    """What the engine answers, without HTTP."""
    options = SamplingParams(max_tokens=8)
    turns = turns_of([{"role": "user", "content": TEXT}]) or ()
    asked = prompt_of(turns, None, None)
    chat = house.engine.submit("generate", asked if asked.text is None else asked.text, "a", options).result(60)
    completion = house.engine.submit("generate", TEXT, "a", options).result(60)
    how = SamplingParams(embedding=Embedding(dimensions=16))
    vectors = [house.engine.submit("embed", text, "a", how).result(60)["embedding"] for text in (TEXT, "a film")]
    return {"chat": chat["text"], "completion": completion["text"], "embeddings": vectors}


def agree(told: dict[str, Any], expected: dict[str, Any], *keys: str) -> None:
    for key in keys:
        wanted = expected[key.removesuffix("_stream").replace("response", "chat")]
        if key == "embeddings":
            torch.testing.assert_close(torch.tensor(told[key]), torch.tensor(wanted), atol=1e-5, rtol=1e-5)
        else:
            assert told[key].strip() == wanted.strip(), key


def test_openai_for_python(run, expected) -> None:
    told = run("openai", "openai_python.py")
    agree(told, expected, "chat", "chat_stream", "completion", "completion_stream", "embeddings")
    agree(told, expected, "response", "response_stream")
    assert told["models"] == ["qwen3", "a"]
    assert told["at_once"] == [told["chat"]]
    assert told["batch"] == [told["chat"]] * 3
    errors = [told[key] for key in ("not_found", "bad_request", "unauthorized")]
    assert errors == ["NotFoundError", "BadRequestError", "AuthenticationError"]


def test_openai_for_javascript(run, expected) -> None:
    told = run("openai_node", "openai_node.mjs")
    agree(told, expected, "chat", "chat_stream", "completion", "embeddings", "response", "response_stream")
    assert told["models"] == ["qwen3", "a"]
    assert told["not_found"] == "NotFoundError"


def test_litellm(run, expected) -> None:
    told = run("litellm", "with_litellm.py")
    agree(told, expected, "chat", "chat_stream", "completion", "embeddings")
    assert 0 < told["tokens"] <= 8
    assert told["not_found"] == "NotFoundError"


def test_langchain(run, expected) -> None:
    told = run("langchain", "with_langchain.py")
    agree(told, expected, "chat", "chat_stream", "completion", "embeddings")
    assert told["chats"] == [told["chat"]] * 3
    torch.testing.assert_close(torch.tensor(told["query"]), torch.tensor(told["embeddings"][1]))


def test_llama_index(run, expected) -> None:
    told = run("llama_index", "with_llama_index.py")
    agree(told, expected, "chat", "chat_stream", "completion", "completion_stream")


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def decided(deciders) -> dict[str, dict[str, float]]:
    """The probability of each label by adapter, as the engine gives it without HTTP."""
    asked = {name: deciders.engine.submit("classify", TEXT, name) for name in ("topic", "urgent", "stars")}
    return {name: ticket.result(60)["probabilities"] for name, ticket in asked.items()}


def near(value: Any) -> Any:
    return pytest.approx(value, abs=1e-5)


def test_openai_for_python_asks_a_panel(run, deciders, decided) -> None:
    told = run("openai", "openai_decisions.py", URL=deciders.url, TOKEN=deciders.token)
    kinds = ["Score", "Predicate", "Choice", "Choice", "Refusal"]
    assert told["types"] == [f"AnswerAnswerResource{kind}" for kind in kinds]
    assert (told["model"], told["panel"], told["typed"]) == ("tickets@1", "tickets@1", ["bool", "str"])
    stars, urgent, typed, topic, sure = told["sync"]
    assert [each["name"] for each in told["sync"]] == ["stars", "urgent", "urgent", "topic", "sure"]
    assert [(each["label"], each["value"]) for each in stars["probabilities"]] == [("1", 0), ("2", 1), ("3", 2)]
    assert [each["probability"] for each in stars["probabilities"]] == near(list(decided["stars"].values()))
    assert stars["score"] == near(decided["stars"]["2"] + 2 * decided["stars"]["3"])
    assert urgent["probability"] == near(decided["urgent"]["yes"])
    assert typed["choice"] is (decided["urgent"]["yes"] > decided["urgent"]["no"])
    assert {each["value"]: each["probability"] for each in topic["probabilities"]} == near(decided["topic"])
    assert topic["confidence"] == near(max(decided["topic"].values()))
    assert sure["type"] == "refusal"
    for other in (told["messages"], told["raw"], *told["async"]):
        assert alike(other) == alike(told["sync"])
    assert told["usage"]["total_tokens"] == told["usage"]["input_tokens"] > 0
    assert told["not_found"][0] == "NotFoundError"
    assert told["bad_request"][0] == "BadRequestError"
    assert "no label 'x', panel tickets@1 has 'bank', 'film'" in told["bad_request"][1]


def alike(answers: Any) -> Any:
    """The same without receipts, and with five digits: a pass of other rows may round otherwise."""
    if isinstance(answers, dict):
        return {key: alike(value) for key, value in answers.items() if key != "receipt"}
    if isinstance(answers, list):
        return [alike(each) for each in answers]
    return round(answers, 5) if isinstance(answers, float) else answers


def test_langchain_asks_a_panel(run, deciders, decided) -> None:
    told = run("langchain", "langchain_decisions.py", URL=deciders.url, TOKEN=deciders.token)
    assert told["model"] == "tickets@1"
    assert told["refusals"] == ["sure"]
    found = told["sync"]
    assert found["topic"]["probabilities"] == near(decided["topic"])
    assert found["urgent"]["probability"] == near(decided["urgent"]["yes"])
    assert found["stars"]["legend"] == {"0": "1", "1": "2", "2": "3"}
    assert list(found["stars"]["probabilities"].values()) == near(list(decided["stars"].values()))
    names = ["stars", "urgent", "topic"]
    for other in (told["message"], told["async"], *told["batch"]):
        assert alike([other[name] for name in names]) == alike([found[name] for name in names])
    assert told["conversation"] == ["stars", "urgent", "topic", "sure"]
    assert told["tokens"] > 0


def test_typesafe_asks_a_panel(run, deciders, decided) -> None:
    told = run("typesafe", "typesafe_decisions.py", URL=deciders.url, TOKEN=deciders.token)
    found = told["sync"]
    assert told["model"] == "tickets@1"
    assert list(found) == ["stars", "urgent", "topic"], "its client leaves a refusal out"
    assert told["raw"]["answers"]["sure"]["type"] == "refusal"
    assert found["topic"]["probabilities"] == near(decided["topic"])
    assert found["urgent"]["noul"] == near(decided["urgent"]["yes"])
    assert found["stars"]["score"] == near(decided["stars"]["2"] + 2 * decided["stars"]["3"])
    assert list(found["stars"]["probabilities"].values()) == near(list(decided["stars"].values()))
    assert alike(told["json"]) == alike(told["async"]) == alike(found)
    assert told["tokens"] > 0
    assert told["bad_request"][0] == "TypeSafeBadRequestError"
    assert "no label 'x'" in told["bad_request"][1]


# --- structured output -----------------------------------------------------------------------------------------------

CALM, LOUD = {"good": True, "tone": "calm"}, {"good": False, "tone": "loud"}
# A mode that enforces the form works with any model whose template knows tools. The others ask for the form in words,
# so the answer fits if the model has learnt to write it: these adapters have.
MODES = {
    "TOOLS": "base",
    "TOOLS_STRICT": "base",
    "FUNCTIONS": "base",
    "JSON_SCHEMA": "base",
    "JSON_O1": "base",
    "RESPONSES_TOOLS": "base",
    "RESPONSES_TOOLS_WITH_INBUILT_TOOLS": "base",
    "JSON": "json",
    "MD_JSON": "markdown",
    "PARALLEL_TOOLS": "caller",
}


def is_review(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"good", "tone"}:
        return False
    return isinstance(value["good"], bool) and value["tone"] in ("calm", "loud")


def test_instructor_in_every_mode_of_its_openai_client(run, scribe) -> None:
    found = run("instructor", "with_instructor.py", MODES=json.dumps(MODES), **scribe)
    told = found["told"]
    assert set(found["offered"]) <= set(MODES)
    assert (told.pop("JSON"), told.pop("MD_JSON"), told.pop("PARALLEL_TOOLS")) == (CALM, CALM, [CALM, LOUD])
    assert len(told) == 7
    assert all(map(is_review, told.values())), told


def test_instructor_gets_no_object_where_a_model_has_not_learnt_a_form_that_nothing_enforces(run, scribe) -> None:
    modes = dict.fromkeys(("JSON", "MD_JSON", "PARALLEL_TOOLS"), "base")
    told = run("instructor", "with_instructor.py", MODES=json.dumps(modes), **scribe)["told"]
    assert [name for name, value in told.items() if isinstance(value, str)] == list(modes), told


def test_langchain_gets_structured_output_and_calls_of_tools(run, scribe) -> None:
    told = run("langchain", "langchain_structured.py", **scribe)
    structured = told["structured"]
    assert structured.pop("json_mode") == CALM
    assert len(structured) == 5
    assert all(map(is_review, structured.values())), structured
    (required,), (loose,) = told["required"], told["required, with keys of its own"]  # only strict forbids other keys
    assert is_review(required)
    assert is_review({name: loose[name] for name in ("good", "tone")})
    assert told["calls"] == told["streamed"] == [CALM, LOUD]
    assert told["after"] == "AIMessage"


def test_llama_index_gets_structured_output_and_calls_of_tools(run, scribe) -> None:
    told = run("llama_index", "llama_index_structured.py", **scribe)
    assert told.pop("tools") == [CALM]  # it keeps the first call, unless several are allowed
    assert len(told) == 3
    assert all(map(is_review, told.values())), told


# --- accuracy by lm-eval ----------------------------------------------------------------------------------------------

TASK = """
task: reviews
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: "{{label}}"
doc_to_choice: [" good", " bad", " odd"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_lm_eval_finds_the_accuracy_that_it_finds_without_a_server(run, house, tmp_path) -> None:
    words = ["great", "dull", "fine", "odd", "bank", "film", "story", "market", "quick", "lazy"]
    rows = [{"text": f"a {words[n % 10]} {words[n * 3 % 7]} {words[n // 10]}", "label": n % 3} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "reviews.yaml").write_text(TASK % (tmp_path / "rows.jsonl"))
    base = house.workspace.resolve("a").manifest["base"]["id"]
    house.workspace.export("a", tmp_path / "peft")
    alone = {"pretrained": base, "peft": str(tmp_path / "peft"), "dtype": "float32", "device": "cpu"}
    served = {"model": "a@1", "base_url": f"{house.url}/completions", "tokenizer": base, "num_concurrent": 4,
              "tokenized_requests": True, "max_retries": 1}  # fmt: skip
    home = {"HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": house.token}
    ours = run("lm_eval", "with_lm_eval.py", "local-completions", json.dumps(served), str(tasks), **home)
    theirs = run("lm_eval", "with_lm_eval.py", "hf", json.dumps(alone), str(tasks), **home)
    assert ours["samples"] == theirs["samples"] == 100
    assert 0.05 < theirs["acc"] < 0.95
    assert ours["acc"] == pytest.approx(theirs["acc"], abs=0.001)


# --- schemathesis -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarded", [True, False], ids=["with tokens", "without tokens"])
def test_schemathesis_finds_no_failure(run, serve, put, workspace, guarded: bool) -> None:
    put()
    workspace.promote("a@1", "production")
    token = workspace.tokens.create("all", ["infer", "admin"])[1] if guarded else ""
    running = serve(tokenizer=small_models.tokenizer("qwen3"))
    told = run("schemathesis", "with_schemathesis.py", running.url, "20", token, seconds=230)
    assert told["status"] == 0, told["text"]
    assert not [line for line in running.log() if line["event"] == "bug"]
