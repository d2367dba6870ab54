"""The playground without a browser: chats, settings, every task, code that asks the same, and what is refused."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import byte_level
import jsonschema
import pytest
from server.answer_schemas import PERSON
from server.conftest import SEEDS, Running
from server.console_forms import SCRIPT, form_token, post, signed_in
from server.echo import FINGERPRINT, LABELS
from server.patience import patient
from server.test_train_pages import SITE
from store.bundles import tensors, write_bundle

from turret.access import Access
from turret.engine import SamplingParams
from turret.server.console.playground import MODES, MOST, MOST_FILE, MOST_ROWS
from turret.server.services import ServerSettings
from turret.store import Version
from turret.workspace import Workspace

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
CHAT = {"as": "chat", "temperature": "0", "max_tokens": "12"}
HTMX = {"hx-request": "true"}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A small decoder that answers, and an adapter on it."""
    folder = tmp_path_factory.mktemp("playground")
    base = byte_level.save_base(folder / "base")
    workspace = Workspace(folder / "store")
    workspace.store.put("a", byte_level.save_adapter(folder / "bundle", base, seed=1))
    made = Running(workspace, workspace.engine(str(base), dtype="float32"), ServerSettings(), options=SamplingParams)
    yield made.start()
    made.stop()


def ask(client: Any, headers: Any = None, path: str = "/playground", **fields: Any) -> Any:
    """The form as a browser sends it."""
    data = {"form_token": form_token(client, "/playground"), **fields}
    own = {"content-type": "application/x-www-form-urlencoded", "sec-fetch-site": "same-origin"}
    return client.post(path, data=data, headers=own | (headers or {}))


def threads(page: Any) -> list[str]:
    return [html.unescape(each) for each in re.findall(r'name="thread" form="ask" value="(.*?)"', page.text)]


def turns(page: Any) -> list[list[dict[str, Any]]]:
    return [json.loads(each)["messages"] for each in threads(page)]


def codes(page: Any) -> list[str]:
    """The lines for a shell and for Python, by turns."""
    return [html.unescape(each) for each in re.findall(r"<pre tabindex[^>]*><code>(.*?)</code>", page.text, re.DOTALL)]


def problems(page: Any) -> list[str]:
    assert "Traceback" not in page.text
    return [html.unescape(each) for each in re.findall(r'role="alert">(.*?)</p>', page.text)]


# --- chats -----------------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_with_each_version_apart_and_as_the_api_answers(real: Running) -> None:
    client = patient(real.client())
    fields = CHAT | {"model": ["base", "a@1"], "system": "Be brief.", "top_k": "40", "top_p": "0.9", "seed": "7"}
    first = ask(client, text="how is it?", **fields)
    assert problems(first) == []
    second = ask(client, text="and then?", thread=threads(first), **fields)
    said = turns(second)
    assert [[each["role"] for each in thread] for thread in said] == [["user", "assistant"] * 2] * 2
    assert said[0][1] != said[1][1], "each has its own conversation"
    for model, thread in zip(fields["model"], said, strict=True):
        body = {"model": model, "messages": [{"role": "system", "content": "Be brief."}, *thread[:3]]}
        body |= {"temperature": 0, "max_tokens": 12, "top_k": 40, "top_p": 0.9, "seed": 7}
        answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert answer["content"] == thread[3]["content"]
    shown = ask(client, HTMX, thread=threads(second), **fields)
    assert turns(shown) == said
    assert "data-stream" not in shown.text, "without a new turn nothing is asked"


def test_with_scripts_each_panel_streams_its_own_question(real: Running) -> None:
    client = patient(real.client())
    whole = ask(client, model="a@1", text="how is it?", **CHAT)
    panel = ask(client, HTMX, model="a@1", text="how is it?", **CHAT)
    (fields,) = re.findall(r'data-fields="(.*?)"', panel.text)
    streamed = ask(client, path="/playground/stream", **json.loads(html.unescape(fields)))
    chunks = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in chunks if each["choices"])
    assert text == turns(whole)[0][1]["content"]
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert streamed.headers["turret-adapter"] == "a"


def test_an_answer_fits_its_schema_and_its_tokens_are_shown(real: Running) -> None:
    client = patient(real.client())
    fields = CHAT | {"schema": json.dumps(PERSON), "max_tokens": "200", "logprobs": "yes", "temperature": "1"}
    page = ask(client, model="base", text="who?", **fields)
    assert problems(page) == []
    jsonschema.validate(json.loads(turns(page)[0][1]["content"]), PERSON)
    token = r'<span class="token p\d" title="[^"]+%[^"]*">(.*?)<span class="hidden"> \([\d.e-]+%\)'
    shown = re.findall(token, page.text, re.DOTALL)
    assert "".join(map(html.unescape, shown)) == turns(page)[0][1]["content"]


def test_a_tool_is_called_and_its_result_goes_back(real: Running) -> None:
    client = patient(real.client())
    fields = CHAT | {"model": "base", "tools": json.dumps(TOOLS), "max_tokens": "60"}
    called = ask(client, text="how is it?", tool_choice="required", **fields)
    (call,) = turns(called)[0][1]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)
    assert f'name="result:{call["id"]}"' in called.text
    again = ask(client, tool_choice="none", thread=threads(called), **{f"result:{call['id']}": "mild"}, **fields)
    assert problems(again) == []
    user, assistant, result, said = turns(again)[0]
    assert result == {"role": "tool", "content": "mild", "tool_call_id": call["id"]}
    assert said["role"] == "assistant"
    assert (user, assistant) == tuple(turns(called)[0])


def printed(code: str) -> str:
    """What the Python of a page prints."""
    out, scope = io.StringIO(), dict[str, Any]()
    with redirect_stdout(out):
        exec(compile(code, "code", "exec"), scope)
    scope["client"].close()
    return out.getvalue()


# --- code ------------------------------------------------------------------------------------------------------------

SAID = {  # what is on the page; where its answer is
    "text": {"text": "the film ", "top_k": "5", "stop": "zz\nyy", "presence_penalty": "0.5", "seed": "3"},
    "schema": {"text": "the film ", "schema": '{"enum": ["it\'s", "no"]}', "repetition_penalty": "1.2"},
    "chat": CHAT | {"text": 'say "it\'s"\n$HOME `x`', "system": "Be brief.", "logit_bias": '{"70": -100}'},
    "beams": {"text": "the film ", "num_beams": "2"},
}


@pytest.mark.parametrize("name", SAID)
def test_the_code_on_the_page_runs_and_gets_the_answer_on_the_page(real: Running, name: str) -> None:
    client = patient(real.client())
    before = real.engine.stats().answers
    fields = {"model": "a@1", "temperature": "0", "max_tokens": "12", **SAID[name]}
    page = ask(client, **fields)
    assert problems(page) == []
    shown = html.unescape(re.findall(r'<output class="written">(.*?)</output>', page.text, re.DOTALL)[0])
    curl, python = codes(page)
    done = subprocess.run(["bash", "-c", curl.replace("curl ", "curl -s ", 1)], capture_output=True, check=True)
    choice = json.loads(done.stdout)["choices"][0]
    assert shown == (choice["text"] if "text" in choice else choice["message"]["content"])
    assert printed(python) == f"{shown}\n"
    asked = real.engine.stats().answers
    assert asked == before + 3
    only = ask(client, HTMX, code="yes", **fields)
    assert codes(only) == [curl, python]
    assert "data-stream" not in only.text
    assert real.engine.stats().answers == asked, "code alone asks nothing"


# --- every task ------------------------------------------------------------------------------------------------------


SPECS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {  # the task; the form; the route that is asked
    "classify": ({"labels": list(LABELS)}, {}, "classify"),
    "text_pairs": ({"labels": list(LABELS), "pairs": True}, {"second": "another"}, "classify"),
    "generate": ({"family_kind": "decoder"}, {}, "completions"),
    "embedding": ({"pooling": "mean"}, {}, "embeddings"),
    "alike": ({"kind": "embedding", "pooling": "mean"}, {"second": "one\ntwo"}, "rerank"),
}


# Heads that the echo has not: the task, what the engine answers, what a panel shows, and the cell of a table.
HEADS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "regression": ({}, {"value": 3.25}, '<p class="label">3.25</p>', "3.25"),
    "rerank": ({"pairs": True}, {"value": 0.75}, '<li><span>one</span><span class="n">0.75</span></li>', "0.75"),
    "token_classification": (
        {"labels": ["PER"]},
        {"spans": [{"label": "PER", "start": 2, "end": 6, "text": "text", "probability": 0.9}]},
        'a <mark>text <span class="badge">PER</span></mark>',
        "PER: text",
    ),
    "questions": (
        {"labels": {"mood": ["sad", "glad"]}},
        {"answers": {"mood": {"label": "glad", "probabilities": {"sad": 0.25, "glad": 0.75}}}},
        "<h3>mood: glad</h3>",
        "mood: glad",
    ),
    "several": (
        {"kind": "classify", "labels": ["a", "b"], "multi_label": True},
        {"label": ["a", "b"], "probabilities": {"a": 0.9, "b": 0.8}},
        '<p class="label">a, b</p>',
        "a, b",
    ),
}


def test_every_head_has_its_own_answer_on_the_page_and_in_a_table(serve, store_task) -> None:
    for name, (task, *_) in HEADS.items():
        store_task(name, **{"kind": name, **task})
    client = serve(heads={name: answer for name, (_, answer, _, _) in HEADS.items()}).client()
    models = [f"{name}@1" for name in HEADS]
    page = ask(client, model=models, text="a text", second="one")
    assert problems(page) == []
    for name, (_, _, shown, _) in HEADS.items():
        assert shown in page.text, name
    table = json.dumps({"name": "a", "columns": ["t", "u"], "rows": [["a text", "one"]]})
    page = ask(client, model=models, table=table, text_column="t", second_column="u", **{"as": "file"})
    assert problems(page) == []
    assert downloaded(page)[1][2:] == [cell for *_, cell in HEADS.values()]


@pytest.fixture
def store_task(workspace: Workspace, tmp_path: Path) -> Callable[..., Version]:
    def put(name: str, **task: Any) -> Version:
        said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": task}
        return workspace.store.put(name, write_bundle(tmp_path / "bundles", tensors(next(SEEDS)), said=said))

    return put


@pytest.mark.slow
def test_every_kind_of_version_answers_side_by_side_by_its_own_route(serve, store_task) -> None:
    for name, (task, _, _) in SPECS.items():
        store_task(name, **{"kind": name, **task})
    client = serve().client()
    for mode in MODES:
        page = client.get("/playground", params={"as": mode}).text
        assert len(page) < 100_000
        assert re.findall(r"<script(?![^>]* src=\"/static/)|<style| style=| on[a-z]+=\"|https?://", page) == []
    page = client.get("/playground").text
    for name, (_, fields, route) in SPECS.items():
        assert f'value="{name}@1"' in page
        got = ask(client, model=f"{name}@1", text="a text", **fields)
        assert (got.status_code, problems(got)) == (200, []), name
        curl, python = codes(got)
        assert f"/v1/{route} " in curl
        assert printed(python).strip() not in ("", "None")
        assert got.text.count('<dl class="receipt">') == 1
        part = ask(client, HTMX, path="/playground/answer", model=f"{name}@1", text="a text", **fields)
        assert part.status_code == 200
        assert '<dl class="receipt">' in part.text
    together = ask(client, model=[f"{name}@1" for name in SPECS], text="a text", second="one\ntwo")
    assert problems(together) == []
    assert together.text.count('<dl class="receipt">') == len(SPECS)


# --- a file of inputs ------------------------------------------------------------------------------------------------

ROWS = f"no,text,other\n1,the cup final,cup\n2,=cmd(),rate\n3, ,none\n4,{SCRIPT},x\n"


def send(client: Any, name: str, content: bytes | str) -> Any:
    data = {"form_token": form_token(client, "/playground")}
    return client.post("/playground/file", files={"file": (name, content)}, data=data, headers=SITE)


def table_in(page: Any) -> str:
    (found,) = re.findall(r'name="table" value="(.*?)"', page.text)
    return html.unescape(found)


def downloaded(page: Any) -> list[list[str]]:
    (content,) = re.findall(r'href="data:text/csv;charset=utf-8;base64,(.*?)"', page.text)
    return list(csv.reader(base64.b64decode(content).decode("utf-8-sig").splitlines()))


@pytest.mark.slow
def test_every_row_of_a_file_is_asked_and_the_answers_are_a_table(serve, store_task) -> None:
    for name, (task, _, _) in SPECS.items():
        store_task(name, **{"kind": name, **task})
    running = serve()
    client = patient(running.client())
    sent = send(client, "rows.csv", ROWS)
    assert (sent.status_code, problems(sent)) == (200, [])
    assert "<option selected>text</option>" in sent.text, "the column with the longest texts"
    assert "<script>alert" not in sent.text
    models = [f"{name}@1" for name in SPECS]
    fields = {"as": "file", "table": table_in(sent), "text_column": "text", "second_column": "other", "model": models}
    page = ask(client, **fields)
    assert problems(page) == []
    assert "<script>alert" not in page.text
    head, *rows = downloaded(page)
    assert head[:5] == ["no", "text", "other", "classify@1", "classify@1 probability"]
    assert [row[:3] for row in rows] == [["1", "the cup final", "cup"], ["2", "'=cmd()", "rate"], ["4", SCRIPT, "x"]]
    inputs = ["the cup final", "=cmd()", SCRIPT]
    got = client.post("/v1/classify", json={"model": "classify@1", "input": inputs}).json()["data"]
    assert [row[3] for row in rows] == [each["label"] for each in got]
    assert [float(row[4]) for row in rows] == [round(max(each["probs"]), 4) for each in got]
    got = client.post("/v1/completions", json={"model": "generate@1", "prompt": inputs}).json()["choices"]
    assert [row[head.index("generate@1")] for row in rows] == [each["text"] for each in got]
    parts = ask(client, HTMX, **fields)
    assert downloaded(parts) == [head, *rows]
    assert "<html" not in parts.text
    alone = ask(client, **fields | {"second_column": "", "model": ["embedding@1", "classify@1"]})
    assert ["choose the column of the second one" in each for each in problems(alone)] == [True]
    assert downloaded(alone)[0][3:] == ["classify@1", "classify@1 probability"]
    assert client.get("/v1/files").json()["data"] == [], "nothing is stored"


def test_a_file_that_is_no_table_or_too_large_is_one_line(serve, put, workspace) -> None:
    put()
    reader = workspace.tokens.create("reader")[1]
    client = patient(signed_in(serve(), reader))
    long = "text\n" + f"{'x' * 3000}\n" * 299
    for name, content, words in (
        ("a.xlsx", b"PK no workbook", "a.xlsx"),
        ("a.pdf", b"x", "a.pdf"),
        ("", b"", "no file is chosen"),
        ("a.csv", "text\n", ""),
        ("a.csv", long, "have over 400000 characters"),
        ("a.csv", b"x" * (MOST_FILE + 1), f"more than {MOST_FILE} bytes"),
    ):
        got = send(client, name, content)
        assert got.status_code in (400, 413), (name, got.status_code)
        (line,) = problems(got)
        assert words in line
        assert not re.search("/tmp|turret-table", line)
    odd = send(client, "a.jsonl", '{"text \\ud800": "half a pair \\ud800"}\n' * 3)
    assert len(json.loads(table_in(odd))["rows"]) == 3
    many = send(client, "a.csv", "text\n" + "a text\n" * (MOST_ROWS + 50))
    assert len(json.loads(table_in(many))["rows"]) == MOST_ROWS
    assert f"{MOST_ROWS} of more rows" in many.text
    for table in (
        "{",
        json.dumps({"name": "a", "columns": ["a"], "rows": [["x", "y"]]}),
        json.dumps({"rows": [["x"]]}),
    ):
        got = ask(client, HTMX, table=table, model="a@1", text_column="a", **{"as": "file"})
        assert (got.status_code, len(problems(got))) == (400, 1)
    wrong = client.post("/playground/file", files={"file": ("a.csv", ROWS)}, data={"form_token": "x"}, headers=SITE)
    assert wrong.status_code == 403


# --- what is refused, and who may ask --------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"text": " "}, "the text has 1 characters"),
    "no number": ({"as": "chat", "temperature": "hot"}, "Temperature: 'hot' is no number from 0 to 2"),
    "beyond": ({"as": "chat", "temperature": "9"}, "Temperature: '9' is no number from 0 to 2"),
    "nan": ({"as": "chat", "top_p": "nan"}, "Top p: 'nan' is no number from 0 to 1"),
    "endless": ({"temperature": "inf"}, "Temperature: 'inf' is no number from 0 to 2"),
    "overflow": ({"top_k": "1e999"}, "Top k: '1e999' is no number from 1 to 100000"),
    "endless schema": ({"schema": '{"maximum": 1e999}'}, "schema: not JSON: Out of range float values"),
    "long number": ({"as": "chat", "seed": "9" * 5000}, "Seed: '9999"),
    "schema": ({"as": "chat", "schema": "{"}, "schema: not JSON"),
    "deep": ({"as": "chat", "schema": "[" * 100_000}, "schema: not JSON"),
    "keys": ({"as": "chat", "tools": "[" + ",".join(['{"a":1}'] * 5000) + "]"}, "the body has more than 4096 keys"),
    "tools": ({"as": "chat", "tools": f'"{SCRIPT}"'}, "tools: Input should be a valid list"),
    "thread": ({"as": "chat", "thread": "{}"}, "the conversation cannot be read"),
    "role": (
        {"as": "chat", "thread": json.dumps({"model": "a@1", "messages": [{"role": "system", "content": SCRIPT}]})},
        "the conversation cannot be read",
    ),
    "turns": (
        {"as": "chat", "thread": json.dumps({"model": "a@1", "messages": [{"role": "user", "content": "x"}] * 300})},
        "the conversation cannot be read",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_value_is_one_line_with_and_without_scripts(serve, store_task, name: str) -> None:
    store_task("a", kind="generate", family_kind="decoder")
    client = serve().client()
    fields, expected = HOSTILE[name]
    fields = {"model": "a@1", "text": "x"} | fields
    page = ask(client, **fields)
    assert (page.status_code, "<script>alert" in page.text) == (200, False)
    (line,) = problems(page)
    assert expected in line
    assert "\n" not in line
    got = ask(client, HTMX, "/playground/stream", **fields)
    assert (got.status_code in (400, 413), problems(got)) == (True, [line])


@pytest.mark.parametrize(
    ("count", "role", "fits"), [(255, "user", True), (256, "assistant", False), (256, "user", False)]
)
def test_a_conversation_without_room_for_a_turn_and_its_answer_is_one_line(serve, put, count, role, fits) -> None:
    put()
    client = serve().client()
    turn = {"role": "user", "content": "x"}
    thread = json.dumps({"model": "a@1", "messages": [*[turn] * (count - 1), turn | {"role": role}]})
    text = "" if role == "user" else "x"
    for headers in (None, HTMX):
        page = ask(client, headers, model="a@1", thread=thread, text=text, **{"as": "chat"})
        assert (page.status_code, any("the conversation has" in line for line in problems(page))) == (200, not fits)


@pytest.mark.parametrize("name", ["rerank", "embedding", "classify"])
def test_the_rows_of_a_file_have_no_page_of_one_answer(serve, store_task, name) -> None:
    task, answer = HEADS[name][:2] if name in HEADS else (SPECS[name][0], {})
    store_task(name, **{"kind": name, **task})
    client = serve(heads={name: answer}).client()
    table = json.dumps({"name": "a", "columns": ["t", "u"], "rows": [["a text", "one"]]})
    fields = {"as": "file", "table": table, "text_column": "t", "second_column": "u", "model": f"{name}@1"}
    got = ask(client, HTMX, "/playground/answer", **fields)
    (line,) = problems(got)
    assert (got.status_code, "the rows of a file" in line) == (400, True)
    assert (ask(client, **fields).status_code, problems(ask(client, **fields))) == (200, [])


def test_words_of_a_conversation_are_escaped_and_too_many_versions_are_refused(serve, put) -> None:
    put()
    client = serve().client()
    call = {"id": SCRIPT, "function": {"name": SCRIPT, "arguments": SCRIPT}}
    messages = [{"role": "user", "content": SCRIPT}, {"role": "assistant", "content": SCRIPT, "tool_calls": [call]}]
    thread = json.dumps({"model": "a@1", "messages": messages})
    page = ask(client, model="a@1", thread=thread, schema=SCRIPT, tools=SCRIPT, system=SCRIPT, **{"as": "chat"})
    assert "<script>alert" not in page.text
    assert page.text.count("&lt;script&gt;") > 5
    assert ask(client, model=["a@1"] * (MOST + 1), text="x").status_code == 400
    assert ask(client, model="a@1", text="x", **{"as": SCRIPT}).status_code == 404
    assert client.get("/playground?as=none").status_code == 404


def test_who_may_only_ask_chats_and_each_version_counts_in_the_quota(serve, put, workspace) -> None:
    put()
    put()
    secret = workspace.tokens.create("reader", requests_per_minute=3)[1]
    client = signed_in(serve(), secret)
    page = ask(client, model=["a@1", "a@2"], text="x", **{"as": "chat"})
    assert problems(page) == []
    assert len(turns(page)) == 2
    page = ask(client, model=["a@1", "a@2"], text="x", **{"as": "chat"})
    (line,) = problems(page)
    assert "reader" in line
    refused = post(client, "/playground", "wrong", model="a@1", text="x")
    assert (refused.status_code, "this form is not from this session" in refused.text) == (403, True)


def test_a_version_of_another_tenant_is_as_one_that_nobody_has(serve, put, workspace, tmp_path: Path) -> None:
    put()
    other = workspace.with_access(Access("legal"))
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": "classify", "labels": list(LABELS)}}
    other.store.put("secret", write_bundle(tmp_path / "other", tensors(77), said=said))
    reader = workspace.tokens.create("reader")[1]
    client = signed_in(serve(), reader)
    for path in ("/playground", "/playground/answer", "/playground/stream"):
        for mode in ("text", "chat"):
            here, nowhere = (
                ask(client, HTMX, path, model=model, text="x", **{"as": mode}) for model in ("secret@1", "absent@1")
            )
            assert here.status_code == nowhere.status_code
            assert here.text.replace("secret", "absent") == nowhere.text
            assert len(problems(here)) == 1
    assert "secret" not in client.get("/playground").text
