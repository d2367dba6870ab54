"""The version that a request means answers it, in the formats that clients read."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

from server.echo import FINGERPRINT, LABELS, SamplingParams, label_set, probabilities, words

from turret.server.openai.completions import CompletionRequest, options_of


def test_classify_answers_in_the_shape_vllm_uses_with_a_receipt(serve, put) -> None:
    version = put()
    client = serve().client()
    got = client.post("/v1/classify", json={"model": "a", "input": ["one", "two"]})
    assert got.status_code == 200, got.text
    said = got.json()
    assert (said["object"], said["model"]) == ("list", "a@1")
    for place, text in enumerate(("one", "two")):
        expected = probabilities(version.digest, text)
        data = said["data"][place]
        assert data["index"] == place
        assert data["probs"] == list(expected.values())
        assert data["probabilities"] == expected
        assert data["num_classes"] == len(LABELS)
        assert data["label"] == max(expected, key=lambda key: expected[key])
    assert said["usage"]["prompt_tokens"] == 2
    receipt = {key: got.headers[f"turret-{key}"] for key in ("adapter", "version", "digest", "base")}
    assert receipt == {"adapter": "a", "version": "1", "digest": version.digest, "base": FINGERPRINT}
    assert said["id"] == f"classify-{got.headers['turret-receipt']}"
    assert got.headers["x-request-id"].startswith("req-")
    alone = client.post("/v1/classify", json={"model": "a@1", "input": "one"}).json()
    assert alone["data"] == said["data"][:1]


def test_classify_answers_with_sets_of_labels_on_request(serve, put) -> None:
    version = put()
    client = serve().client()
    body = {"model": "a", "input": ["one", "two"]}
    got = client.post("/v1/classify", json=body | {"coverage": 0.8})
    assert got.status_code == 200, got.text
    for text, data in zip(("one", "two"), got.json()["data"], strict=True):
        assert data["label_set"] == label_set(probabilities(version.digest, text), 0.8)
    assert all(data["label_set"] is None for data in client.post("/v1/classify", json=body).json()["data"])
    for wrong in (0, 1, 1.5, -0.1, "0.9", True):
        got = client.post("/v1/classify", json=body | {"coverage": wrong})
        assert got.status_code == 400, wrong
        assert "coverage" in got.json()["error"]["message"]


def test_a_completion_of_an_adapter_and_of_the_base(serve, put) -> None:
    version = put()
    client = serve().client()
    got = client.post("/v1/completions", json={"model": "a", "prompt": "hello there", "max_tokens": 8})
    said = got.json()
    assert said["choices"] == [
        {"index": 0, "text": "".join(words(version.digest, "hello there")), "logprobs": None, "finish_reason": "stop"}
    ]
    assert said["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    base = client.post("/v1/completions", json={"model": "echo", "prompt": "hello there"})
    assert base.json()["choices"][0]["text"] == "".join(words(None, "hello there"))
    assert base.json()["model"] == "echo"
    assert "turret-adapter" not in base.headers
    assert base.headers["turret-base"] == FINGERPRINT


def test_prompts_times_n_are_choices_in_order_with_seeds_of_their_own(serve, put) -> None:
    version = put()
    body = {"model": "a", "prompt": ["x", [1, 2]], "n": 2, "seed": 7}
    client = serve().client()
    assert client.post("/v1/completions", json=body).status_code == 400  # a list has texts or tokens, not both
    body["prompt"] = ["x", "y"]
    choices = client.post("/v1/completions", json=body).json()["choices"]
    expected = [f"<{version.digest[-8:]}> {text} seed{seed}" for text in "xy" for seed in (7, 8)]
    assert [choice["text"] for choice in choices] == expected
    tokens = client.post("/v1/completions", json={"model": "a", "prompt": [[1, 2], [3]]}).json()["choices"]
    assert [choice["text"].partition(" ")[2] for choice in tokens] == ["[1, 2]", "[3]"]


def test_logprobs_come_beside_every_token_of_a_completion(serve, put) -> None:
    put()
    body = {"model": "a", "prompt": "hello there", "max_tokens": 8, "logprobs": 2}
    client = serve().client()
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    said = choice["logprobs"]
    assert "".join(said["tokens"]) == choice["text"]
    assert said["token_logprobs"] == [0.0, -0.25, -0.5]
    assert said["top_logprobs"][1] == {" hello0": 0.0, " hello1": -1.0}
    assert [
        choice["text"][at:][: len(token)] for at, token in zip(said["text_offset"], said["tokens"], strict=True)
    ] == said["tokens"]
    none = client.post("/v1/completions", json=body | {"logprobs": 0}).json()["choices"][0]["logprobs"]
    assert none["top_logprobs"] == [{}, {}, {}]
    for more in ({"num_beams": 2}, {"logprobs": 21}):
        got = client.post("/v1/completions", json=body | more)
        assert got.status_code == 400
        assert "logprobs" in got.text


def test_logprobs_come_beside_every_token_of_a_chat(serve, put) -> None:
    put()
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 1}
    client = serve().client()
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == choice["message"]["content"]
    assert content[1]["logprob"] == -0.25
    assert bytes(content[1]["bytes"]).decode() == " hi"
    assert content[1]["top_logprobs"] == [{"token": " hi0", "logprob": 0.0, "bytes": list(b" hi0")}]
    assert (
        client.post("/v1/chat/completions", json=body | {"logprobs": False, "top_logprobs": None}).json()["choices"][0][
            "logprobs"
        ]
        is None
    )
    got = client.post("/v1/chat/completions", json=body | {"logprobs": None})
    assert got.status_code == 400
    assert "top_logprobs need logprobs" in got.text


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_streamed_completion_is_the_same_text_in_pieces(serve, put) -> None:
    version = put()
    client = serve().client()
    body = {"model": "a", "prompt": "one two three", "stream": True, "stream_options": {"include_usage": True}}
    got = client.post("/v1/completions", json=body)
    assert got.headers["content-type"].startswith("text/event-stream")
    assert got.headers["turret-digest"] == version.digest
    chunks = events(got.text)
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    pieces = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(piece["text"] for piece in pieces) == "".join(words(version.digest, "one two three"))
    assert len(pieces) == 5
    assert [piece["finish_reason"] for piece in pieces] == [None] * 4 + ["stop"]


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason(serve, put) -> None:
    put()
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    choices = [chunk["choices"][0] for chunk in events(serve().client().post("/v1/chat/completions", json=body).text)]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices).endswith(" hi")
    assert choices[-1]["finish_reason"] == "stop"


def test_models_are_the_base_and_every_adapter_on_it_by_name_and_by_alias(serve, put, workspace) -> None:
    put()
    put()
    put("other", base="sha256:another")
    put("b")
    workspace.promote("a@1", "production")
    client = serve().client()
    found = {gpu["id"]: gpu["root"] for gpu in client.get("/v1/models").json()["data"]}
    assert found == {"echo": "echo", "a": "a@1", "a@production": "a@1", "b": "b@1"}
    assert client.get("/v1/models/a@2").json()["root"] == "a@2"
    assert client.get("/v1/models/echo").json()["parent"] is None
    for missing in ("c", "other", "a@7", "..%2Fx"):
        got = client.get(f"/v1/models/{missing}")
        assert got.status_code in (400, 404), got.text


def test_a_plain_name_never_means_a_version_of_a_comparison(serve, put, workspace) -> None:
    put()
    for name in ("a", "a", "only"):
        put(name, comparison=f"comparisons/{name}-0123456789")
    client = serve().client()
    ask = {"input": "x"}
    assert client.post("/v1/classify", json=ask | {"model": "a"}).json()["model"] == "a@1"
    assert client.post("/v1/classify", json=ask | {"model": "a@3"}).json()["model"] == "a@3"
    assert {gpu["id"]: gpu["root"] for gpu in client.get("/v1/models").json()["data"]} == {
        "echo": "echo",
        "a": "a@1",
    }
    got = client.post("/v1/classify", json=ask | {"model": "only"})
    assert got.status_code == 404
    assert "only versions of comparisons" in got.text
    workspace.promote("a@3", "candidate")
    workspace.promote("only@1", "production")
    found = {gpu["id"]: gpu["root"] for gpu in serve().client().get("/v1/models").json()["data"]}
    expected = {"a": "a@1", "a@candidate": "a@3", "only": "only@1", "only@production": "only@1"}
    assert found == {"echo": "echo"} | expected


def test_an_unknown_adapter_is_404_and_never_the_bases_answer(serve, put) -> None:
    put()
    put("other", base="sha256:another")
    client = serve().client()
    for path, body in (
        ("/v1/classify", {"input": "x"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        for model in ("nobody", "a@9", "a@candidate", "Echo"):
            got = client.post(path, json={"model": model, **body})
            assert got.status_code in (400, 404), got.text
            assert "choices" not in got.json()
        assert client.post(path, json={"model": "other", **body}).json()["error"]["code"] == "wrong_base"
    got = client.post("/v1/classify", json={"model": "nobody", "input": "x"})
    assert got.status_code == 404
    assert set(got.json()["error"]) == {"message", "type", "param", "code"}
    assert got.json()["error"]["code"] == "not_found"
    assert client.post("/v1/classify", json={"model": "echo", "input": "x"}).status_code == 409


def test_several_messages_to_an_adapter_go_to_the_template_of_its_task(serve, put) -> None:
    put()
    said = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    got = serve().client().post("/v1/chat/completions", json={"model": "a", "messages": said})
    answer = got.json()["choices"][0]["message"]["content"].partition(" ")[2]
    told = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert answer.startswith(json.dumps(told)[:40])


def test_several_messages_to_the_base_go_through_its_own_template(serve) -> None:
    import small_models

    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    running = serve()
    plain = running.client().post("/v1/chat/completions", json={"model": "echo", "messages": said})
    assert plain.status_code == 400
    assert "no chat template" in plain.json()["error"]["message"]
    tokenizer = small_models.tokenizer("qwen3")
    running = serve(tokenizer=tokenizer)
    got = running.client().post("/v1/chat/completions", json={"model": "echo", "messages": said})
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=False)
    answer = got.json()["choices"][0]["message"]["content"]
    assert answer.partition(" ")[2].startswith(str(list(ids))[:20])


def test_what_narrows_the_draws_without_a_temperature_draws_at_1(serve) -> None:
    view = SimpleNamespace(services=SimpleNamespace(options=SamplingParams))
    for said, temperature in (
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"top_p": 1.0}, None),
        ({"top_k": 5, "temperature": 0.0}, 0.0),
        ({}, None),
    ):
        body = CompletionRequest(model="a", prompt="x", **said)
        (made,) = asyncio.run(options_of(view, body, None, 1))  # type: ignore[arg-type]
        assert made.temperature == temperature, said
