"""`/v1/responses`: texts and messages, read by OpenAI's own client. `test_openai_generation` has forms and tools."""

from __future__ import annotations

import openai
import pytest
from server.echo import words


@pytest.fixture
def speak(serve, put):
    version = put()
    with openai.OpenAI(base_url=f"{serve().url}/v1", api_key="none", max_retries=0) as client:
        yield client, version


def test_openais_client_gets_a_response(speak) -> None:
    client, version = speak
    got = client.responses.create(model="a", input="one two", max_output_tokens=9, temperature=0.0)
    assert got.output_text == "".join(words(version.digest, "one two"))
    assert (got.status, got.model, got.output[0].role) == ("completed", "a@1", "assistant")
    assert (got.usage.output_tokens, got.usage.total_tokens) == (3, 5)
    assert got.id.startswith("resp_")


def test_instructions_and_messages_are_the_turns_of_a_chat(speak) -> None:
    client, _ = speak
    said = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    got = client.responses.create(model="a", instructions="be brief", input=said)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert got.output_text == client.chat.completions.create(model="a", messages=chat).choices[0].message.content
    assert got.instructions == "be brief"


def test_parts_that_are_too_long_together_are_refused_as_in_a_chat(speak) -> None:
    client, _ = speak
    parts = [{"type": "input_text", "text": "x" * 600_000}] * 2
    chat = [{"role": "user", "content": [{"type": "text", "text": part["text"]} for part in parts]}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="a", messages=chat)
    call = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}
    for said in (
        [{"role": "user", "content": parts}],
        [{"role": "user", "content": "hi"}, call, {"type": "function_call_output", "call_id": "1", "output": parts}],
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model="a", input=said)
        assert "expected at most 1000000 in all" in str(error.value)
        assert (error.value.code, error.value.param) == (refused.value.code, refused.value.param)
    short = [{"type": "input_text", "text": text} for text in ("one ", "two")]
    got = client.responses.create(model="a", input=[{"role": "user", "content": short}])
    assert got.output_text == client.responses.create(model="a", input="one two").output_text


def test_openais_client_reads_the_stream(speak) -> None:
    client, version = speak
    with client.responses.create(model="a", input="one two", stream=True) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert pieces == words(version.digest, "one two")
    assert events[-1].response.output_text == "".join(pieces)


def test_what_is_not_offered_is_a_400_that_names_it(speak) -> None:
    client, _ = speak
    for more in (
        {"previous_response_id": "resp_1"},
        {"tools": [{"type": "web_search"}]},
        {"text": {"format": {"type": "grammar"}}},
        {"reasoning": {"effort": "low"}},
        {"background": True},
        {"store": True},
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(model="a", input="x", **more)  # type: ignore[call-overload]
        assert error.value.param == next(iter(more))
