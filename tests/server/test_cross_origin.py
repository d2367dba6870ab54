"""Pages of the origins that `--cors-origin` names may call the API; pages of other sites may not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from turret.errors import ServeRefused
from turret.server.auth import READ, origins

ROOT = Path(__file__).parents[2]

APP, OTHER = "https://app.example", "https://other.example"
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
BODY = {"model": "a", "input": "x"}


def test_a_browser_may_call_the_api_from_an_allowed_origin(serve, put, workspace) -> None:
    put()
    _, token = workspace.tokens.create("website", scopes=("infer",))
    client = serve(origins=(APP,)).client()
    asked = client.options("/v1/classify", headers={"origin": APP, **ASKS})  # a browser sends no token here
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == APP
    assert "authorization" in asked.headers["access-control-allow-headers"]
    got = client.post("/v1/classify", json=BODY, headers={"origin": APP, "authorization": f"Bearer {token}"})
    assert got.status_code == 200
    assert got.headers["access-control-allow-origin"] == APP
    assert "turret-receipt" in got.headers["access-control-expose-headers"]
    refused = client.post("/v1/classify", json=BODY, headers={"origin": APP})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, APP)  # it may read why
    assert client.options("/v1/classify", headers={"origin": OTHER, **ASKS}).status_code == 400
    other = client.post("/v1/classify", json=BODY, headers={"origin": OTHER, "authorization": f"Bearer {token}"})
    assert "access-control-allow-origin" not in other.headers


def test_scripts_of_other_origins_may_read_every_header_that_the_reference_names() -> None:
    page = (ROOT / "docs" / "reference" / "http.md").read_text("utf-8")
    other = {"turret-load-seconds", "turret-signature"}  # of the console's own pages, and of alarms that are sent
    named = set(re.findall(r"`(turret-[a-z-]+)", page)) - other
    assert {"turret-receipt", "turret-panel"} <= named
    assert named <= set(READ)


def test_on_a_server_without_tokens_only_an_allowed_origin_may_write(serve, put) -> None:
    put()
    open_to_app, closed, any_origin = serve(origins=(APP,)), serve(), serve(origins=("*",))
    headers = {"origin": APP, "sec-fetch-site": "cross-site"}
    assert open_to_app.client().post("/v1/classify", json=BODY, headers=headers).status_code == 200
    assert closed.client().post("/v1/classify", json=BODY, headers=headers).status_code == 403
    assert any_origin.client().post("/v1/classify", json=BODY, headers=headers).status_code == 403
    elsewhere = open_to_app.client().post("/v1/classify", json=BODY, headers={**headers, "origin": OTHER})
    assert elsewhere.status_code == 403


def test_pages_of_the_console_stay_closed_to_other_sites(serve) -> None:
    client = serve(origins=(APP,)).client()
    assert "access-control-allow-origin" not in client.get("/sign-in", headers={"origin": APP}).headers
    got = client.post("/sign-in", data={"token": "x"}, headers={"origin": APP, "sec-fetch-site": "cross-site"})
    assert got.status_code == 403


@pytest.mark.parametrize("text", ["app.example", "https://app.example/", "https://", "null", "ftp://x", ""])
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(ServeRefused, match="expected a scheme, a host"):
        origins([text])
    assert origins([APP, "http://localhost:3000", "http://[::1]:80", "*"])
