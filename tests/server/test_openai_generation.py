"""OpenAI's client against the real engine: texts and tokens, structured answers, tools, penalties, echo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import byte_level
import jsonschema
import openai
import pytest
import torch
from server.answer_schemas import PERSON
from server.conftest import Running
from transformers import AutoModelForCausalLM

from turret.access import Access
from turret.engine import SamplingParams
from turret.server.services import ServerSettings
from turret.workspace import Workspace

PROMPT = "the film "
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "now", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": False}}},
    {"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"],
        "additionalProperties": False}}},
]  # fmt: skip
ASKED = [{"role": "user", "content": "how is it?"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("house")
    base = byte_level.save_base(folder / "base")
    workspace = Workspace(folder / "store")
    workspace.store.put("a", byte_level.save_adapter(folder / "bundle", base, seed=1))
    made = Running(workspace, workspace.engine(str(base), dtype="float32"), ServerSettings(), options=SamplingParams)
    made.folder = base
    yield made.start()
    made.stop()


@pytest.fixture
def client(running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def offsets_hold(text: str, logprobs) -> None:
    assert "".join(logprobs.tokens) == text
    pieces = zip(logprobs.text_offset, logprobs.tokens, strict=True)
    assert [text[at : at + len(token)] for at, token in pieces] == logprobs.tokens


# --- the text --------------------------------------------------------------------------------------------------------


def test_a_completion_is_the_raw_text_and_its_tokens_join_to_it(client, running) -> None:
    words, texts = byte_level.tokenizer(), []
    for seed in range(4):
        options = {"max_tokens": 24, "temperature": 1.5, "seed": seed, "logprobs": 2}
        choice = client.completions.create(model="base", prompt=PROMPT, **options).choices[0]
        offsets_hold(choice.text, choice.logprobs)
        answer = running.engine.submit("generate", PROMPT, None, SamplingParams(**options, strip=False)).result(30)
        ids = [*words(PROMPT)["input_ids"], *(each["id"] for each in answer["logprobs"])]
        assert PROMPT + choice.text == words.decode(ids, skip_special_tokens=True)
        with client.completions.create(model="base", prompt=PROMPT, stream=True, **options) as stream:
            chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == choice.text
        told = [chunk.logprobs for chunk in chunks if chunk.logprobs]
        assert [token for each in told for token in each.tokens] == choice.logprobs.tokens
        assert [at for each in told for at in each.text_offset] == choice.logprobs.text_offset
        assert [one for each in told for one in each.token_logprobs] == choice.logprobs.token_logprobs
        texts.append(choice.text)
    assert any(text != text.strip() for text in texts), "a text with white space around it shows that it stays"
    assert any(not text.isascii() for text in texts), "and one with characters of several bytes"


def test_tokens_join_to_a_text_that_a_stop_string_cuts(client) -> None:
    options = {"model": "base", "prompt": PROMPT, "max_tokens": 24, "temperature": 1.5, "seed": 3}
    whole = client.completions.create(**options).choices[0].text
    pairs = [whole[place : place + 2] for place in range(3, len(whole) - 2)]
    for stop in [pair for pair in pairs if pair.isascii()][:3]:
        choice = client.completions.create(**options, stop=stop, logprobs=0).choices[0]
        assert choice.text == whole[: whole.index(stop)]
        offsets_hold(choice.text, choice.logprobs)
        with client.completions.create(**options, stop=stop, logprobs=0, stream=True) as stream:
            chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == choice.text
        assert "".join(token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens) == choice.text


def test_logprobs_of_a_chat_join_to_its_content_streamed_or_not(client) -> None:
    options = {"messages": ASKED, "max_tokens": 20, "temperature": 1.2, "seed": 2, "logprobs": True, "top_logprobs": 1}
    choice = client.chat.completions.create(model="base", **options).choices[0]
    tokens = choice.logprobs.content
    assert "".join(each.token for each in tokens) == choice.message.content
    assert bytes(byte for each in tokens for byte in each.bytes).decode() == choice.message.content
    with client.chat.completions.create(model="base", stream=True, **options) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == choice.message.content
    told = [each for chunk in chunks if chunk.logprobs for each in chunk.logprobs.content]
    assert [(each.token, each.logprob) for each in told] == [(each.token, each.logprob) for each in tokens]


def test_a_prompt_that_would_be_cut_is_an_error_unless_the_request_allows_it(client) -> None:
    long = "a very long story " * 40
    kept = [{"model": "a", "prompt": long}, {"model": "base", "prompt": long * 20, "max_tokens": 4}]
    for body in kept:
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(**body)
        assert error.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**body, stream=True)
        raw = client.completions.with_raw_response.create(**body, extra_body={"truncate_prompt_tokens": -1})
        assert raw.headers["turret-truncated"] == "1"
        assert raw.parse().choices[0].finish_reason
    raw = client.completions.with_raw_response.create(
        model="base", prompt=[long, "short"], max_tokens=2, extra_body={"truncate_prompt_tokens": 30}, stream=True
    )
    assert raw.headers["turret-truncated"] == "1"
    raw = client.completions.with_raw_response.create(model="base", prompt="short", max_tokens=2)
    assert "turret-truncated" not in raw.headers
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="a", messages=[{"role": "user", "content": long}])
    assert error.value.code == "context_length_exceeded"


# --- structured answers ----------------------------------------------------------------------------------------------


def test_a_json_schema_is_kept_to_and_a_cut_answer_says_length(client) -> None:
    kind = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    reasons = set()
    for seed in range(6):
        choice = client.chat.completions.create(
            model=("base", "a")[seed % 2],
            messages=ASKED,
            response_format=kind,
            temperature=1.0,
            seed=seed,
            max_tokens=80,
        ).choices[0]
        reasons.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert "stop" in reasons
    cut = client.chat.completions.create(model="base", messages=ASKED, response_format=kind, max_tokens=3).choices[0]
    assert cut.finish_reason == "length"


def test_json_objects_choices_expressions_and_grammars(client) -> None:
    def said(**more) -> str:
        options = {"model": "base", "prompt": PROMPT, "temperature": 1.0, "seed": 1, "max_tokens": 60}
        return client.completions.create(**options, extra_body=more).choices[0].text

    assert said(guided_choice=["glad", "sad"]) in ("glad", "sad")
    assert said(structured_outputs={"choice": ["only"]}) == "only"
    assert said(guided_regex="[a-c]{3}-[0-9]{2}")[3] == "-"
    assert json.loads(said(guided_json=PERSON))["mood"] in ("glad", "sad")
    assert said(structured_outputs={"grammar": 'start: "x" ("y" | "z")'}) in ("xy", "xz")
    text = client.chat.completions.create(
        model="base", messages=ASKED, response_format={"type": "json_object"}, max_tokens=200, seed=3, temperature=0.7
    ).choices[0]
    assert text.finish_reason == "length" or isinstance(json.loads(text.message.content), dict)
    assert text.message.content.startswith("{")


def test_what_cannot_be_enforced_is_400_and_named(client) -> None:
    cases = [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"guided_json": {"type": "object", "dependentSchemas": {"a": {}}}}, "dependentSchemas"),
        ({"guided_json": {"type": "strange"}}, "strange"),
        ({"guided_regex": "(?=x)y"}, "regular expression"),
        ({"guided_regex": "(("}, "regular expression"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "grammar"),
        ({"guided_regex": "a", "num_beams": 2}, "num_beams"),
    ]
    for more, named in cases:
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model="base", prompt=PROMPT, extra_body=more)
        assert named in str(error.value), more


# --- tools -----------------------------------------------------------------------------------------------------------


def test_a_required_call_and_a_named_one_fit_their_schemas(client) -> None:
    for choice, names in (
        ("required", {"weather", "add"}),
        ({"type": "function", "function": {"name": "add"}}, {"add"}),
    ):
        options = {"messages": ASKED, "tools": TOOLS, "tool_choice": choice, "temperature": 1.0, "max_tokens": 90}
        got = client.chat.completions.create(model="base", seed=5, **options).choices[0]
        assert got.finish_reason == "tool_calls"
        (call,) = got.message.tool_calls
        assert call.function.name in names
        schema = next(
            tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == call.function.name
        )
        jsonschema.validate(json.loads(call.function.arguments), schema)
        with client.chat.completions.create(model="base", seed=5, stream=True, **options) as stream:
            chunks = [chunk.choices[0] for chunk in stream]
        (streamed,) = [each for chunk in chunks for each in chunk.delta.tool_calls or ()]
        assert (streamed.index, streamed.function) == (0, streamed.function)
        assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
        assert chunks[-1].finish_reason == "tool_calls"
        assert not "".join(chunk.delta.content or "" for chunk in chunks).strip()
    answered = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    got = client.chat.completions.create(model="base", messages=answered, tools=TOOLS, max_tokens=4, tool_choice="none")
    assert got.choices[0].message.content is not None


def test_the_schema_of_a_tool_may_refer_to_its_own_definitions(client) -> None:
    closed = {"type": "object", "additionalProperties": False}
    place = closed | {"properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    whole = closed | {"properties": {"to": {"$ref": "#/$defs/place"}}, "required": ["to"], "$defs": {"place": place}}
    go, stay = ({"type": "function", "function": {"name": name, "parameters": whole}} for name in ("go", "stay"))
    for tools in ([go], [stay, go]):
        options = {"messages": ASKED, "tools": tools, "tool_choice": "required", "temperature": 1.0, "max_tokens": 90}
        (call,) = client.chat.completions.create(model="base", **options).choices[0].message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), whole)


def test_responses_call_tools_and_take_the_output_of_a_call(client) -> None:
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    schemas = {tool["name"]: tool["parameters"] for tool in flat}
    for choice in ("required", {"type": "function", "name": "add"}):
        options = {"input": ASKED, "tools": flat, "tool_choice": choice, "temperature": 1.0, "max_output_tokens": 90}
        got = client.responses.create(model="base", **options)
        (call,) = got.output
        assert (got.status, call.type, call.status) == ("completed", "function_call", "completed")
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])
        with client.responses.create(model="base", stream=True, **options) as stream:
            events = list(stream)
        assert [event.type for event in events] == [
            "response.created", "response.in_progress", "response.output_item.added",
            "response.function_call_arguments.delta", "response.function_call_arguments.done",
            "response.output_item.done", "response.completed",
        ]  # fmt: skip
        assert events[-1].response.output[0] == events[-2].item
        assert events[4].arguments == events[-2].item.arguments
        jsonschema.validate(json.loads(events[4].arguments), schemas[events[4].name])
    items = [*ASKED, call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "3"}]
    got = client.responses.create(model="base", input=items, tools=flat, tool_choice="auto", max_output_tokens=4)
    assert (got.status, got.output[-1].type) == ("incomplete", "message")
    called = {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    chat = [
        *ASKED,
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "3"},
    ]
    same = client.chat.completions.create(model="base", messages=chat, tools=TOOLS, max_tokens=4)
    assert got.usage.input_tokens == same.usage.prompt_tokens
    assert got.output_text == same.choices[0].message.content


def test_responses_have_the_form_that_is_asked_for(client) -> None:
    options = {"model": "base", "input": ASKED, "temperature": 1.0, "max_output_tokens": 120}
    form = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    got = client.responses.create(**options, text={"format": form})
    jsonschema.validate(json.loads(got.output_text), PERSON)
    assert got.text.format.type == "json_schema"
    with client.responses.create(**options, text={"format": {"type": "json_object"}}, stream=True) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text.startswith("{")
    tools = [{"type": "function", **TOOLS[0]["function"]}]
    got = client.responses.create(**options, tools=tools, tool_choice="required", text={"format": form})
    assert json.loads(got.output[0].arguments)["city"] in ("Paris", "Rome")  # the form is that of a text


def test_responses_refuse_what_they_cannot_carry_out(client) -> None:
    tool = {"type": "function", **TOOLS[0]["function"]}
    for more, said in (
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [tool], "tool_choice": {"type": "function", "name": "no"}}, "none of the tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "grammar"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"uniqueItems": True}}}}, "uniqueItems"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            client.responses.create(**{"model": "base", "input": "x"} | more)


def test_tools_that_are_wrong_or_too_large_are_400(client) -> None:
    large = [{"type": "function", "function": {"name": "big", "description": "x" * 1_000_000}}]
    for options, named in (
        ({"tools": large}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "none of the tools"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "two constraints"),
    ):
        with pytest.raises(openai.BadRequestError, match=named):
            client.chat.completions.create(model="base", messages=ASKED, **options)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_a_bias_and_penalties_change_the_text(client) -> None:
    options = {"model": "base", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    plain = client.completions.create(**options, logprobs=0).choices[0]
    token = byte_level.tokenizer()("z", add_special_tokens=False)["input_ids"][0]
    assert client.completions.create(**options, logit_bias={str(token): 100}).choices[0].text == "z" * 20
    assert "z" not in client.completions.create(**options, logit_bias={str(token): -100}).choices[0].text
    for penalty in ("presence_penalty", "frequency_penalty"):
        often = client.completions.create(**options, logit_bias={str(token): 100}, **{penalty: 2}).choices[0].text
        assert often == "z" * 20  # 100 - 2 * 19 is still the most
    varied = client.completions.create(**options, frequency_penalty=2, presence_penalty=2, logprobs=0).choices[0]
    assert len(set(varied.logprobs.tokens)) >= len(set(plain.logprobs.tokens))
    with pytest.raises(openai.BadRequestError, match="logit_bias of token 9999"):
        client.completions.create(**options, logit_bias={"9999": 1})


def test_best_of_gives_the_most_probable_answers(client) -> None:
    options = {"model": "base", "prompt": [PROMPT, "a "], "max_tokens": 6, "temperature": 1.2, "seed": 4}
    every = client.completions.create(**options, n=4, logprobs=0).choices
    best = client.completions.create(**options, n=1, best_of=4).choices

    def mean(choice) -> float:
        found = choice.logprobs.token_logprobs
        return sum(found) / len(found)

    for place, choice in enumerate(best):
        group = every[4 * place : 4 * place + 4]
        assert choice.text == max(group, key=mean).text
        assert choice.logprobs is None


def test_echo_and_no_tokens_score_a_prompt(client, running) -> None:
    words = byte_level.tokenizer()
    ids = words("the lazy dog, über")["input_ids"]
    options = {"model": "base", "prompt": ids, "echo": True, "logprobs": 1}
    scored = client.completions.create(**options, max_tokens=0).choices[0]
    assert scored.text == words.decode(ids)
    offsets_hold(scored.text, scored.logprobs)
    plain = AutoModelForCausalLM.from_pretrained(running.folder)
    with torch.no_grad():
        logits = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logits[place, token]) for place, token in enumerate(ids[1:])]
    assert scored.logprobs.token_logprobs[0] is None
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert [max(top.values()) for top in scored.logprobs.top_logprobs[1:]] == pytest.approx(
        logits[:-1].max(-1).values.tolist(), abs=1e-4
    )
    whole = client.completions.create(**options, max_tokens=5).choices[0]
    assert whole.text.startswith(scored.text)
    offsets_hold(whole.text, whole.logprobs)
    assert whole.logprobs.token_logprobs[: len(ids)] == scored.logprobs.token_logprobs
    with client.completions.create(**options, max_tokens=5, stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [t for chunk in chunks if chunk.logprobs for t in chunk.logprobs.tokens] == whole.logprobs.tokens


def test_keys_without_an_effect_are_taken_and_unknown_ones_named(client, running) -> None:
    plain = {"store": True, "service_tier": "auto", "metadata": {"a": "b"}, "tools": [], "parallel_tool_calls": False}
    raw = client.chat.completions.with_raw_response.create(model="base", messages=ASKED, max_tokens=1, **plain)
    assert "turret-ignored" not in raw.headers
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}]
    said[1] |= {"refusal": "no", "annotations": [], "audio": None}
    for stream in (False, True):
        raw = client.chat.completions.with_raw_response.create(
            model="base", messages=said, max_tokens=1, verbosity="low", stream=stream, extra_body={"colour": 1}
        )
        assert raw.headers["turret-ignored"].split(", ") == ["verbosity", "colour", "messages.1.refusal"]


def test_a_strict_server_refuses_unknown_keys(serve, put) -> None:
    put()
    client = serve(strict=True).client()
    got = client.post("/v1/completions", json={"model": "a", "prompt": "x", "colour": 1})
    assert got.status_code == 400
    assert "colour: unknown key" in got.json()["error"]["message"]
    assert client.post("/v1/completions", json={"model": "a", "prompt": "x", "store": True}).status_code == 200


# --- compositions ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_composition_is_answered_for_those_who_may_use_all_its_adapters(running, tmp_path) -> None:
    workspace = Workspace(tmp_path / "store")
    for seed, name in enumerate("ab", 1):
        workspace.store.put(name, byte_level.save_adapter(tmp_path / name, running.folder, seed))
    workspace.promote("b@1", "production")
    secrets = {"all": workspace.tokens.create("all")[1], "limited": workspace.tokens.create("one", adapters=["a"])[1]}
    engine = workspace.engine(str(running.folder), dtype="float32")
    made = Running(workspace, engine, ServerSettings(), options=SamplingParams).start()
    try:
        clients = {
            name: openai.OpenAI(base_url=f"{made.url}/v1", api_key=secret, max_retries=0)
            for name, secret in secrets.items()
        }
        asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        raw = clients["all"].completions.with_raw_response.create(model="a@1+b@production", **asked)
        assert raw.parse().model == "a@1+b@1"
        assert (raw.headers["turret-adapter"], raw.headers["turret-version"]) == ("a@1+b", "1")
        texts = {model: clients["all"].completions.create(model=model, **asked).choices[0].text for model in ("a", "b")}
        assert raw.parse().choices[0].text not in texts.values()
        assert clients["limited"].completions.create(model="a", **asked).choices[0].text == texts["a"]
        for model in ("a+b", "b+a", "a@1+b@1"):
            with pytest.raises(openai.NotFoundError):
                clients["limited"].completions.create(model=model, **asked)
        assert "a@1+b@1" not in [
            each.version for each in made.served.view(Access(adapters=("a",))).engines.loaded_adapters()
        ]
    finally:
        made.stop()
