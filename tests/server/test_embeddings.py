"""`/v1/embeddings`, `/v1/score`, `/v1/rerank`, `/tokenize` and `/detokenize` in the formats of OpenAI and vLLM."""

from __future__ import annotations

import base64
import struct

import openai
import pytest
import small_models
from server.echo import FINGERPRINT, vector
from store.bundles import tensors, write_bundle

from turret.engine import Embedding


def test_an_embedding_of_each_text_by_the_base_and_by_an_adapter(serve, put) -> None:
    version = put()
    client = serve().client()
    for model, digest in (("echo", None), ("a", version.digest)):
        got = client.post("/v1/embeddings", json={"model": model, "input": ["one two", "three"]})
        assert got.status_code == 200, got.text
        said = got.json()
        assert [each["embedding"] for each in said["data"]] == [vector(digest, "one two"), vector(digest, "three")]
        assert [(each["index"], each["object"]) for each in said["data"]] == [(0, "embedding"), (1, "embedding")]
        assert said["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        assert got.headers.get("turret-digest") == digest
    tokens = client.post("/v1/embeddings", json={"model": "a", "input": [[5, 6], [7]]}).json()["data"]
    assert [each["embedding"] for each in tokens] == [vector(version.digest, text) for text in ("[5, 6]", "[7]")]


def test_the_options_of_an_embedding_reach_the_engine(serve, put) -> None:
    put()
    client = serve().client()

    def ask(**more: object) -> list[float]:
        got = client.post("/v1/embeddings", json={"model": "echo", "input": "x", **more})
        assert got.status_code == 200, got.text
        return got.json()["data"][0]["embedding"]

    assert ask(dimensions=3) == vector(None, "x", Embedding(dimensions=3))
    assert ask(pooling="first") == vector(None, "x", Embedding("first"))
    assert ask(normalize=False) == vector(None, "x", Embedding(normalize=False))
    packed = base64.b64decode(ask(encoding_format="base64"))
    assert struct.unpack("<8f", packed) == pytest.approx(vector(None, "x"))
    for wrong in ({"pooling": "max"}, {"dimensions": 0}, {"encoding_format": "int8"}, {"input": []}):
        got = client.post("/v1/embeddings", json={"model": "echo", "input": "x", **wrong})
        assert got.status_code == 400, wrong
        assert next(iter(wrong)) in got.json()["error"]["message"]


def test_openais_client_reads_embeddings(serve, put) -> None:
    put()
    with openai.OpenAI(base_url=f"{serve().url}/v1", api_key="none", max_retries=0) as client:
        got = client.embeddings.create(model="echo", input=["x", "y"])  # it asks for base64 and unpacks it
        assert [each.embedding for each in got.data] == [pytest.approx(vector(None, text)) for text in "xy"]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_scores_are_cosines_of_pairs(serve, put) -> None:
    version = put()
    client = serve().client()
    made = {text: vector(version.digest, text) for text in ("q", "one", "two")}
    one = client.post("/v1/score", json={"model": "a", "text_1": "q", "text_2": ["one", "two"]}).json()
    assert one["scoring"] == "cosine"
    assert [each["score"] for each in one["data"]] == pytest.approx(
        [cosine(made["q"], made[t]) for t in ("one", "two")]
    )
    both = client.post("/v1/score", json={"model": "a", "text_1": ["q", "one"], "text_2": ["one", "two"]}).json()
    expected = [cosine(made["q"], made["one"]), cosine(made["one"], made["two"])]
    assert [each["score"] for each in both["data"]] == pytest.approx(expected)
    got = client.post("/v1/score", json={"model": "a", "text_1": ["q", "q"], "text_2": ["x", "y", "z"]})
    assert got.status_code == 400
    assert "text_1 has 2 texts and text_2 has 3" in got.json()["error"]["message"]


def test_documents_are_ranked_by_their_cosine_with_the_query(serve, put) -> None:
    version = put()
    client = serve().client()
    documents = ["one", "two", "three", "four"]
    query = vector(version.digest, "q")
    expected = {text: cosine(query, vector(version.digest, text)) for text in documents}
    got = client.post("/v1/rerank", json={"model": "a", "query": "q", "documents": documents}).json()["results"]
    assert [each["document"]["text"] for each in got] == sorted(documents, key=lambda text: -expected[text])
    for each in got:
        assert documents[each["index"]] == each["document"]["text"]
        assert each["relevance_score"] == pytest.approx(expected[each["document"]["text"]])
    few = client.post("/v1/rerank", json={"model": "a", "query": "q", "documents": documents, "top_n": 2}).json()
    assert few["results"] == got[:2]


def test_scores_are_of_the_version_that_the_servers_alias_means(serve, put, workspace, tmp_path) -> None:
    put()
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": "rerank", "pairs": True}}
    workspace.store.put("a", write_bundle(tmp_path / "rerank", tensors(7), said=said))
    workspace.promote("a@1", "production")
    workspace.promote("a@2", "staging")
    client = serve(alias="staging", heads={"a": {"value": 0.75}}).client()
    got = client.post("/v1/score", json={"model": "a", "text_1": "q", "text_2": "one"}).json()
    assert (got["model"], got["scoring"], got["data"][0]["score"]) == ("a@2", "adapter", 0.75)
    got = client.post("/v1/rerank", json={"model": "a", "query": "q", "documents": ["one"]}).json()
    assert (got["model"], got["scoring"], got["results"][0]["relevance_score"]) == ("a@2", "adapter", 0.75)


def test_texts_become_the_tokens_of_the_base_and_back(serve, put) -> None:
    put()
    tokenizer = small_models.tokenizer("llama")
    client = serve(tokenizer=tokenizer, longest=77).client()
    text = "the market fell"
    for more, expected in (
        ({}, tokenizer(text)["input_ids"]),
        ({"add_special_tokens": False, "model": "a"}, tokenizer(text, add_special_tokens=False)["input_ids"]),
    ):
        got = client.post("/tokenize", json={"prompt": text, "return_token_strs": True, **more}).json()
        assert (got["tokens"], got["count"], got["max_model_len"]) == (expected, len(expected), 77)
        assert got["token_strs"] == tokenizer.convert_ids_to_tokens(expected)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert client.post("/detokenize", json={"tokens": plain}).json() == {"prompt": tokenizer.decode(plain)}
    got = client.post("/detokenize", json={"tokens": [5, 128]})
    assert (got.status_code, got.json()["error"]["message"]) == (
        404,
        "no token 128 in the vocabulary of this base: expected numbers from 0 to 127",
    )
    assert client.post("/tokenize", json={"prompt": text, "model": "nobody"}).status_code == 404
    got = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]})
    assert "no chat template" in got.json()["error"]["message"]


@pytest.mark.slow
def test_messages_that_are_too_long_together_are_refused_before_they_are_read(serve) -> None:
    """A NUL in the arguments of a call becomes 7 characters, and searching them holds up all threads."""
    client = serve(tokenizer=small_models.tokenizer("qwen3")).client()
    call = {"type": "function", "function": {"name": "a", "arguments": "\0" * 600_000}}
    got = client.post("/tokenize", json={"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert got.status_code == 400
    assert "expected at most 1000000 in all" in got.json()["error"]["message"]
    two = [{"role": "user", "content": "x" * 499_000}] * 2
    assert client.post("/tokenize", json={"messages": two}).status_code == 200
    assert client.post("/tokenize", json={"messages": [*two, *two[:1]]}).status_code == 400


def test_tokens_of_a_text_are_charged_like_a_prompt(serve, workspace) -> None:
    text = "the market fell " * 20
    asks = (("/tokenize", {"prompt": text}), ("/detokenize", {"tokens": [5] * 60}))
    for number, (path, body) in enumerate(asks):
        _, by_tokens = workspace.tokens.create(f"tokens{number}", tokens_per_minute=50)
        _, by_requests = workspace.tokens.create(f"requests{number}", requests_per_minute=1)
        _, free = workspace.tokens.create(f"free{number}")
        running = serve(tokenizer=small_models.tokenizer("llama"))
        statuses = {
            name: [running.client(secret).post(path, json=body).status_code for _ in range(2)]
            for name, secret in (("tokens", by_tokens), ("requests", by_requests), ("free", free))
        }
        assert statuses == {"tokens": [200, 429], "requests": [200, 429], "free": [200, 200]}, path


def test_messages_take_one_request_from_a_quota_before_they_are_read(serve, put, workspace) -> None:
    put()
    _, secret = workspace.tokens.create("few", requests_per_minute=2)
    client = serve(tokenizer=small_models.tokenizer("qwen3")).client(secret)
    asked = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert [client.post("/v1/chat/completions", json=asked).status_code for _ in range(3)] == [200, 200, 429]
    too_long = asked | {"messages": [{"role": "user", "content": "x " * 400_000}]}
    assert client.post("/v1/chat/completions", json=too_long).status_code == 429, "it is not read"


@pytest.mark.slow
def test_no_question_reads_the_whole_vocabulary(serve, monkeypatch) -> None:
    tokenizer = small_models.tokenizer("llama")
    client = serve(tokenizer=tokenizer).client()
    with monkeypatch.context() as context:
        context.setattr(
            type(tokenizer), "get_vocab", lambda self: pytest.fail("150,000 tokens take a tenth of a second")
        )
        assert client.post("/detokenize", json={"tokens": [5]}).status_code == 200
        assert client.post("/tokenize", json={"prompt": "the", "return_token_strs": True}).status_code == 200


def test_messages_become_the_tokens_of_the_bases_chat_template(serve) -> None:
    tokenizer = small_models.tokenizer("qwen3")
    said = [{"role": "user", "content": "hi"}]
    got = serve(tokenizer=tokenizer).client().post("/tokenize", json={"messages": said})
    assert got.json()["tokens"] == list(
        tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=False)
    )


def test_the_scope_infer_opens_tokens_too(serve, workspace) -> None:
    _, token = workspace.tokens.create("website", scopes=("infer",))
    running = serve(tokenizer=small_models.tokenizer("llama"))
    assert running.client().post("/tokenize", json={"prompt": "x"}).status_code == 401
    assert running.client(token).post("/tokenize", json={"prompt": "x"}).status_code == 200
    assert running.client(token).post("/tokenizes", json={"prompt": "x"}).status_code == 403
