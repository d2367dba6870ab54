"""Code that asks a version by its task: for a shell, for Python with the client of OpenAI, and with PEFT."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastapi import Request

from turret.access import DEFAULT
from turret.data import TextPair
from turret.json_types import JsonObject
from turret.manifest import Manifest
from turret.server.routes import View
from turret.tasks import stored_task
from turret.tasks.shapes import TaskSpec
from turret.workspace.card import exported_with_peft

WORDS = ("a text of your own", "another text")
MOST_TOKENS = 80  # of a text that is written
FOLDER = "adapter"  # that `turret export` writes


@dataclass(frozen=True)
class Question:
    """A request to a model.

    Args:
        route: below `/v1/`.
        call: the method of OpenAI's client, or None if it has none for the route.
        answer: what the client prints, of `answer`.
    """

    route: str
    body: JsonObject
    call: str | None
    answer: str


QUESTIONS = {  # by request, with None where the input goes
    "classify": Question("classify", {"input": None}, None, 'answer["data"][0]'),
    "embed": Question("embeddings", {"input": None}, "embeddings.create", "answer.data[0].embedding"),
    "generate": Question(
        "completions", {"prompt": None, "max_tokens": MOST_TOKENS}, "completions.create", "answer.choices[0].text"
    ),
}


SETTINGS = frozenset(("top_k", "repetition_penalty", "num_beams"))  # that no call of OpenAI's client has
BEYOND = {"chat.completions.create": SETTINGS, "completions.create": SETTINGS | {"response_format"}}


@dataclass(frozen=True)
class Snippet:
    """Code with what a reader should know about it."""

    title: str
    code: str
    words: Sequence[str] = ()


def question(model: str, spec: TaskSpec) -> Question:
    """A question to a version of a task, or to a base.

    Args:
        spec: of the task, as in a manifest; empty for a base.
    """
    task = stored_task(spec)
    schema = task.schema()
    (asked,) = task.from_words(spec, WORDS if spec.get("pairs") else WORDS[:1])
    text = {"text": asked.text, "text_pair": asked.text_pair} if isinstance(asked, TextPair) else asked
    if schema.conversations or schema.converses:
        messages = [{"role": "user", "content": text}]
        body: JsonObject = {"model": model, "messages": messages, "max_tokens": MOST_TOKENS}
        return Question("chat/completions", body, "chat.completions.create", "answer.choices[0].message.content")
    usual = QUESTIONS[task.request]
    named = {key: text if value is None else value for key, value in usual.body.items()}
    return replace(usual, body={"model": model, **named})


def of_version(request: Request, view: View, version: str, manifest: Manifest) -> Sequence[Snippet]:
    """The snippets of a version."""
    asked = question(version, manifest.get("task") or {})
    code, words = exported_with_peft(manifest, FOLDER)
    export = f"turret export {version} {FOLDER} --store STORE"
    return [
        *of_question(request, view, asked),
        Snippet("PEFT, without a server", export if code is None else f"# first, in a shell: {export}\n{code}", words),
    ]


def of_question(request: Request, view: View, asked: Question) -> Sequence[Snippet]:
    """A request for a shell, and for Python."""
    return [
        Snippet("curl", curl(request, view, asked)),
        Snippet("Python, with the client of OpenAI", python(request, view, asked)),
    ]


def curl(request: Request, view: View, asked: Question) -> str:
    """A request as a shell takes it: whole, with the token where one is needed."""
    send = f"curl {_url(request)}/v1/{asked.route} -H 'content-type: application/json'"
    body = f"-d {shlex.quote(json.dumps(asked.body))}"
    if view.services.guard.open:
        return f"{send} {body}"
    tenant = "" if view.access.tenant == DEFAULT else f" --tenant {view.access.tenant}"
    make = f"TOKEN=$(turret token create shell{tenant} --store STORE)"
    return f'{make}\n{send} -H "authorization: Bearer $TOKEN" {body}'


def python(request: Request, view: View, asked: Question) -> str:
    """The same request with the client of OpenAI."""
    key = '"none"' if view.services.guard.open else 'os.environ["TOKEN"]'
    lines = [] if view.services.guard.open else ["import os", ""]
    lines += ["from openai import OpenAI", "", f'client = OpenAI(base_url="{_url(request)}/v1", api_key={key})']
    if asked.call is None:
        lines.append(f'answer = client.post("/{asked.route}", body={asked.body!a}, cast_to=object)')
    else:
        beyond = BEYOND.get(asked.call, frozenset())
        named = {name: value for name, value in asked.body.items() if name not in beyond}
        if more := {name: value for name, value in asked.body.items() if name in beyond}:
            named["extra_body"] = more
        listed = ", ".join(f"{name}={value!a}" for name, value in named.items())
        lines.append(f"answer = client.{asked.call}({listed})")
    return "\n".join([*lines, f"print({asked.answer})"])


def _url(request: Request) -> str:
    return str(request.base_url).rstrip("/")
