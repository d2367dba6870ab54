"""Every route of a server, asked for what another tenant has and for what nobody has.

The requests are made from the OpenAPI schema and from the routes of the pages, so a new route is asked too. A parameter
or a key of a body that stands in no table below is an error: say there whether it names something.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from turret.server import app as server_app
from turret.server.limits import FILES

JSON, MULTIPART = "application/json", "multipart/form-data"
ENDS_THE_SESSION = {"/sign-in", "/sign-out"}  # they name nothing
NAMES = ("name", "reference", "model", "adapter", "after", "run_id", "key", "receipt")
NAMES += ("candidates", "control", "shadows", "batch_id", "file_id", "input_file_id", "comparison", "source", "recipe")
NAMES += ("tenant", "other", "run", "study_id", "candidate")
# Parameters and keys that name nothing of a tenant: the values to send.
PLAIN: dict[str, Sequence[Any]] = {
    "alias": ["production"], "number": [1], "version": [1], "verb": ["promote", "rollback", "ramp", "stop"],
    "limit": [10], "alpha": [0.05], "moved": ["production"], "arm": ["candidate"], "next": ["/"],
    "file": ["console.css"], "unit": ["u"], "value": [1], "since": ["2026-01-01"], "until": ["2030-01-01"],
    "before": [1000], "purpose": ["batch"], "endpoint": ["/v1/classify"],
    "past": [0], "who": ["token"], "what": ["a"], "by": ["adapter"], "count": ["requests"],
    "first": [1], "second": [2], "then": ["compare"],
}  # fmt: skip
VERBS = {  # to delete a run is asked over the API
    "/runs/": ["cancel", "resume"],
    "/tokens/": ["rotate", "revoke"],
    "/studies/": ["cancel", "resume"],
    "/start/": ["compare", "sweep"],
}
FORM = {"version": "1", "alias": "production", "arm": "candidate", "share": "50%", "text": "x"}
CHANGES = ("date", "x-request-id")  # headers that differ between two equal answers


@dataclass(frozen=True)
class Ask:
    """One request; `names` says whether it names something of a tenant."""

    route: str
    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    form: Mapping[str, str] | None = None
    file: bool = False  # whether it sends one
    names: bool = False
    page: bool = False


def asks(app: FastAPI, named: Mapping[str, Any]) -> list[Ask]:
    """A request, or some, for every route. named: a value for each of NAMES."""
    found = [*_of_api(app.openapi(), named), *_of_pages(named)]
    known = {(route.path, method) for route in every_route() for method in route.methods}
    asked = {(ask.route, ask.method) for ask in found}
    left = {(path.replace(":path", ""), method) for path, method in known if path not in ENDS_THE_SESSION}
    assert left <= asked, f"never asked: {left - asked}"
    return sorted(found, key=lambda ask: ask.method == "DELETE")  # last: the others need what it removes


def every_route() -> list[APIRoute]:
    """The routes of the API and of the pages."""
    return [route for each in server_app.ROUTERS for route in each.routes if isinstance(route, APIRoute)]


def _of_api(schema: Mapping[str, Any], named: Mapping[str, Any]) -> Iterator[Ask]:
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            where = f"{method.upper()} {path}"
            parameters = [each for each in route.get("parameters", ()) if each["in"] in ("path", "query")]
            for values in _chosen(where, [each["name"] for each in parameters], named):
                query = {each["name"]: values[each["name"]] for each in parameters if each["in"] == "query"}
                filled = _filled(path, values)
                names = any(each["name"] in NAMES for each in parameters)
                file = MULTIPART in route.get("requestBody", {}).get("content", {})
                if file:
                    yield Ask(path, method.upper(), filled, query, file=True)
                    continue
                for body in _bodies(where, route, schema, named):
                    yield Ask(path, method.upper(), filled, query, body, names=names or _names_something(body))


def _bodies(where: str, route: Mapping[str, Any], schema: Mapping[str, Any], named: Mapping[str, Any]) -> list[Any]:
    if "requestBody" not in route:
        return [None]
    content = route["requestBody"]["content"]
    assert JSON in content, f"{where} takes {list(content)}: teach the walk how to send that"
    return list(_instances(where, content[JSON]["schema"], schema, named))


def _instances(
    where: str, part: Mapping[str, Any], whole: Mapping[str, Any], named: Mapping[str, Any]
) -> Iterator[Any]:
    """Small values that fit a schema: one for each member of a union."""
    if "$ref" in part:
        yield from _instances(where, whole["components"]["schemas"][part["$ref"].rpartition("/")[2]], whole, named)
    elif ("anyOf" in part or "oneOf" in part) and "properties" not in part:
        for each in part.get("anyOf", part.get("oneOf", ())):
            if each.get("type") != "null":
                yield from _instances(where, each, whole, named)
    elif "const" in part or "enum" in part:
        yield part.get("const", part.get("enum", [None])[0])
    elif part.get("type") == "object":
        fields: dict[str, Any] = {}
        for key, value in part.get("properties", {}).items():
            if key in NAMES:
                fields[key] = named[key]
            elif key in part.get("required", ()):
                fields[key] = PLAIN[key][0] if key in PLAIN else next(_instances(where, value, whole, named))
        yield fields
        if "stream" in part.get("properties", {}):
            yield fields | {"stream": True}
    elif part.get("type") == "array":
        yield [next(_instances(where, part["items"], whole, named))]
    else:
        kinds = {"string": "x", "integer": 1, "number": 1, "boolean": True}
        assert part.get("type") in kinds, f"{where} has a key with schema {part}: teach the walk to fill it"
        yield kinds[part["type"]]


def _of_pages(named: Mapping[str, Any]) -> Iterator[Ask]:
    for route in every_route():
        if route.include_in_schema or route.path in ENDS_THE_SESSION:
            continue
        query = [each.name for each in route.dependant.query_params]
        path = [each.name for each in route.dependant.path_params]
        for method in route.methods:
            where = f"{method} {route.path}"
            for values in _chosen(where, [*path, *query], named):
                if method != "GET" and route.path in FILES:
                    yield Ask(route.path, method, route.path, file=True, page=True)
                    continue
                form = (
                    None
                    if method == "GET"
                    else FORM | {key: named[key] for key in ("model", "source", "recipe", "tenant")}
                )
                asked = {key: values[key] for key in query}
                names = form is not None or any(each in NAMES for each in (*path, *query))
                plain = route.path.replace(":path", "")
                yield Ask(plain, method, _filled(route.path, values), asked, form=form, names=names, page=True)


def _chosen(where: str, keys: Sequence[str], named: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key in keys:
        assert key in NAMES or key in PLAIN, f"{where} has a parameter {key}: say in walk.py whether it names something"
    plain = PLAIN | {"verb": next((found for part, found in VERBS.items() if part in where), PLAIN["verb"])}
    for values in itertools.product(*([named[key]] if key in NAMES else plain[key] for key in keys)):
        yield dict(zip(keys, values, strict=True))


def _filled(path: str, values: Mapping[str, Any]) -> str:
    if "/panels/" in path:  # no panel is called as an adapter
        panel = f"{values.get('name') or str(values['reference']).partition('@')[0]}-panel"
        values = {**values, "name": panel, "reference": f"{panel}@1"}
    return re.sub(r"\{(\w+)(?::\w+)?\}", lambda found: str(values[found[1]]), path)


def _names_something(body: Any) -> bool:
    if isinstance(body, list):
        return any(map(_names_something, body))
    return isinstance(body, dict) and any(key in NAMES for key in body)


class Stranger:
    """Sends requests with a token, and those of pages with a session that it opened."""

    def __init__(self, api: Any, pages: Any, form_token: str) -> None:
        self.api, self.pages, self.form_token = api, pages, form_token

    def answer(self, ask: Ask, named: Mapping[str, Any]) -> tuple[int, str, dict[str, str]]:
        """Status, body and headers, with every name that was sent replaced by its key."""
        if ask.form is not None:
            headers = {"content-type": "application/x-www-form-urlencoded", "sec-fetch-site": "same-origin"}
            data = {**ask.form, "form_token": self.form_token}
            got = self.pages.request(ask.method, ask.path, params=ask.query, data=data, headers=headers)
        elif ask.file and ask.page:
            table, data = {"file": ("table.csv", b"text,label\n")}, {"form_token": self.form_token}
            got = self.pages.post(ask.path, files=table, data=data, headers={"sec-fetch-site": "same-origin"})
        elif ask.file:
            got = self.api.post(ask.path, files={"file": ("lines.jsonl", b"{}\n")}, data={"purpose": "batch"})
        elif not ask.page:
            got = self.api.request(ask.method, ask.path, params=ask.query, json=ask.body)
        else:
            got = self.pages.request(ask.method, ask.path, params=ask.query)
        kept = {key: neutral(value, named) for key, value in got.headers.items() if key not in CHANGES}
        return got.status_code, neutral(got.text, named), kept


def neutral(text: str, named: Mapping[str, Any]) -> str:
    """The text with the names that were sent replaced by their keys, the longest first."""
    texts = {(each[0] if isinstance(each, list) else each): key for key, each in named.items()}
    for each in sorted(texts, key=len, reverse=True):
        text = text.replace(each, f"<{texts[each]}>")
    return text


def differences(app: FastAPI, stranger: Stranger, foreign: Mapping[str, Any], missing: Mapping[str, Any]) -> list[str]:
    """Every request that tells something that exists from something that does not."""
    found = []
    for here, nowhere in zip(asks(app, foreign), asks(app, missing), strict=True):
        if here.names:
            seen, wanted = stranger.answer(here, foreign), stranger.answer(nowhere, missing)
            if seen != wanted:
                found.append(f"{here.method} {here.path} {here.query} {here.body}: {seen} instead of {wanted}")
    return found


def leaks(app: FastAPI, stranger: Stranger, named: Mapping[str, Any], secrets: Sequence[str]) -> list[str]:
    """Every request without a name whose answer has one of the secrets."""
    return _told(stranger, [ask for ask in asks(app, named) if not ask.names and ask.form is None], secrets)


def tells(app: FastAPI, stranger: Stranger, named: Mapping[str, Any], secrets: Sequence[str]) -> list[str]:
    """Every request, with a name or without, whose answer has one of the secrets. named: has none of them."""
    return _told(stranger, asks(app, named), secrets)


def _told(stranger: Stranger, asked: Iterable[Ask], secrets: Sequence[str]) -> list[str]:
    found = []
    for ask in asked:
        said = " ".join(map(str, stranger.answer(ask, {})))
        found += [f"{ask.method} {ask.path}: {secret}" for secret in secrets if secret in said]
    return found
