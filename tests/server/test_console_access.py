"""Signing in to the console, and requests from pages of other sites."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from server.console_forms import PAGES, form_token, post, signed_in

from turret.errors import Forbidden, Unauthorized
from turret.server.app import ROUTERS, create
from turret.server.auth import SESSION_COOKIE, Guard, Sessions, check_origin, session_cookie, session_of
from turret.server.console.render import form_of
from turret.server.limits import FILES
from turret.store import Store
from turret.store.access_tokens import SessionRows

# --- signing in ------------------------------------------------------------------------------------------------------


def test_without_tokens_nobody_signs_in(serve) -> None:
    client = serve().client()
    assert client.get("/").headers["location"] == "/adapters"
    for path in PAGES:
        got = client.get(path)
        assert got.status_code == 200, path
        assert got.headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/sign-in").status_code == 303


def test_another_name_for_an_open_server_opens_no_page(serve) -> None:
    got = serve().client().get("/adapters", headers={"host": "evil.example:8000"})
    assert got.status_code == 403
    assert "loopback names only" in got.text


def test_with_tokens_every_page_leads_to_the_sign_in_and_back(serve, workspace) -> None:
    _, secret = workspace.tokens.create("boss", ["admin"])
    running = serve()
    client = running.client()
    for path in ("/", *PAGES, "/adapters/news/1", "/runs/x/curve"):
        got = client.get(path)
        assert got.status_code == 303, path
        assert got.headers["location"].startswith("/sign-in?next="), path
    got = client.get("/store/traffic", headers={"hx-request": "true"})
    assert (got.status_code, got.headers["hx-redirect"]) == (401, "/sign-in?next=%2Fstore%2Ftraffic")
    page = client.get("/sign-in?next=/runs")
    assert page.status_code == 200
    assert client.get("/static/console.css").status_code == 200
    got = post(client, "/sign-in", form_token(client, "/sign-in"), token=secret, next="/runs")
    assert (got.status_code, got.headers["location"]) == (303, "/runs")
    assert signed_in(running, secret).get("/runs").status_code == 200


def test_a_wrong_token_is_told_in_the_page_and_begins_nothing(serve, workspace) -> None:
    workspace.tokens.create("boss", ["admin"])
    running = serve()
    client = running.client()
    for wrong in ("turret-nobody", "", "x" * 300):
        got = post(client, "/sign-in", form_token(client, "/sign-in"), token=wrong)
        assert got.status_code == 401
        assert 'role="alert"' in got.text
        assert "set-cookie" not in got.headers
    assert len(running.served.guard.sessions._open) == 0


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nx: y", "runs"])
def test_signing_in_leads_to_no_other_server(serve, workspace, wanted) -> None:
    _, secret = workspace.tokens.create("boss", ["admin"])
    client = serve().client()
    got = post(client, "/sign-in", form_token(client, "/sign-in"), token=secret, next=wanted)
    assert got.headers["location"] == "/"


def test_the_cookie_is_for_this_server_alone_and_secure_where_the_browser_came_by_https(serve, workspace) -> None:
    _, secret = workspace.tokens.create("boss", ["admin"])
    running = serve()

    def cookie_of(scheme: str) -> str:
        client = running.client()
        said = {"token": secret, "form_token": form_token(client, "/sign-in")}
        origin = {"origin": f"{scheme}://127.0.0.1:{running.port}"}
        return str(client.post("/sign-in", data=said, headers=origin).headers["set-cookie"])

    assert cookie_of("http").split("; ")[1:] == ["Path=/", "Max-Age=43200", "HttpOnly", "SameSite=Strict"]
    assert secret not in cookie_of("http")
    assert cookie_of("https").endswith("; SameSite=Strict; Secure")


def test_signing_out_ends_the_session_here_too(serve, workspace) -> None:
    _, secret = workspace.tokens.create("boss", ["admin"])
    running = serve()
    client = signed_in(running, secret)
    kept = client.cookies[SESSION_COOKIE]
    got = post(client, "/sign-out")
    assert "Max-Age=0" in got.headers["set-cookie"]
    again = running.client()
    again.cookies.set(SESSION_COOKIE, kept)
    assert again.get("/adapters").status_code == 303


def test_a_revoked_token_ends_its_sessions(serve, workspace) -> None:
    _, secret = workspace.tokens.create("boss", ["admin"])
    running = serve()
    client = signed_in(running, secret)
    workspace.tokens.revoke("boss")
    running.view.refresh()
    assert client.get("/adapters").status_code == 303


def test_infer_opens_the_playground_and_nothing_else(serve, put, workspace) -> None:
    put()
    _, secret = workspace.tokens.create("reader")
    client = signed_in(serve(), secret)
    assert client.get("/").headers["location"] == "/playground"
    page = client.get("/playground").text
    assert 'href="/adapters"' not in page
    for path in PAGES:
        assert client.get(path).status_code == (200 if path == "/playground" else 403), path
    got = post(client, "/adapters/a/move/promote", form_token(client, "/playground"), version="1", alias="production")
    assert got.status_code == 403
    assert "has no scope admin" in got.text
    answer = post(client, "/playground/answer", form_token(client, "/playground"), model="a@1", text="x")
    assert answer.status_code == 200


def test_a_session_is_no_key_to_the_api_and_a_bearer_token_none_to_the_pages(serve, workspace) -> None:
    _, secret = workspace.tokens.create("boss", ["admin", "infer"])
    running = serve()
    assert signed_in(running, secret).get("/api/status").status_code == 401
    assert running.client(secret).get("/adapters").status_code == 303


def test_sessions_end_by_time_and_by_number_and_are_kept_as_hashes() -> None:
    now = [0.0]
    sessions = Sessions(lambda: now[0], seconds=10, limit=2)
    first = sessions.begin("one")
    assert sessions.token_hash(first) == "one"
    assert first not in str(vars(sessions))
    now[0] = 10.0
    assert sessions.token_hash(first) is None
    others = [sessions.begin(name) for name in ("two", "three")]
    assert len(sessions._open) == 2
    assert [sessions.token_hash(each) for each in others] == ["two", "three"]
    assert [sessions.token_hash(each) for each in (None, "", "nobody")] == [None, None, None]
    assert session_of(f"other=1; {session_cookie('abc', 5, secure=False).split(';')[0]}") == "abc"
    assert session_of("=;;\x00") is None
    assert session_of(f"{SESSION_COOKIE}=first; {SESSION_COOKIE}=second") == "first"
    assert session_of(f'{SESSION_COOKIE}="quoted"') is None


def test_a_session_that_the_catalog_does_not_know_is_asked_for_again_after_a_second(tmp_path) -> None:
    now = [1000.0]
    catalog = SessionRows(Store(tmp_path / "store").database(make=True))
    sessions, elsewhere = Sessions(lambda: now[0]), Sessions(lambda: now[0])
    assert not sessions.is_strange("of another server"), "without a catalog nobody else has sessions"
    for each in (sessions, elsewhere):
        each.share(catalog)
    session = elsewhere.begin("token")
    assert sessions.is_strange(session)
    sessions.look_up(session)
    assert not sessions.is_strange(session)
    now[0] += 1.01
    assert sessions.is_strange(session)
    elsewhere.keep(session)
    sessions.look_up(session)
    assert not sessions.is_strange(session)
    assert sessions.token_hash(session) == "token"


def test_a_session_that_ends_on_one_server_ends_on_all_at_the_next_look(tmp_path) -> None:
    catalog = SessionRows(Store(tmp_path / "store").database(make=True))
    sessions, elsewhere = Sessions(time.monotonic), Sessions(time.monotonic)
    for each in (sessions, elsewhere):
        each.share(catalog)
    ends, stays = (elsewhere.begin(token) for token in ("one", "two"))
    for session in (ends, stays):
        elsewhere.keep(session)
        sessions.look_up(session)
    begins = sessions.begin("three")  # the catalog does not have it yet
    elsewhere.forget(ends)
    sessions.refresh()
    assert [sessions.token_hash(session) for session in (ends, stays, begins)] == [None, "two", "three"]


def test_a_session_over_https_counts_only_in_a_cookie_that_no_other_host_can_set() -> None:
    sessions = Sessions(time.monotonic)
    over_https, over_http = sessions.begin("one", secure=True), sessions.begin("two")
    sent = session_cookie(over_https, 5, secure=True)
    assert sent.startswith("__Host-turret_session=")
    assert "; Secure" in sent
    assert "Path=/;" in sent
    assert "Domain" not in sent
    assert session_of(sent.split(";")[0]) == over_https
    assert session_of(f"{SESSION_COOKIE}={over_https}") is None, "another host or a page over http may have set it"
    assert session_of(f"{SESSION_COOKIE}={over_http}; {sent.split(';')[0]}") == over_https
    assert sessions.token_hash(over_https.removeprefix("s.")) is None


@pytest.mark.parametrize("text", ["\\" * 31_000, '"' * 31_000, ";" * 31_000, "=" * 31_000, 'a="\\134' * 4_000])
def test_a_cookie_header_is_read_in_the_time_that_its_bytes_take(text) -> None:
    started = time.perf_counter()
    for _ in range(10):
        assert session_of(f'{SESSION_COOKIE}="{text}"') is None
    assert time.perf_counter() - started < 1  # http.cookies takes 24 s for the backslashes in Python 3.11.7


def test_forms_are_read_as_browsers_encode_them() -> None:
    form = form_of(b"a=b+c%20d&a=%C3%A9%2B&empty=&=nameless&&alone&bad=%zz%")
    assert form.all("a") == ["b c d", "é+"]
    assert (form.raw("empty"), form.raw("alone"), form.raw("bad"), form.raw("")) == ("", "", "%zz%", "nameless")
    for wrong in (b"a=%ff", b"a=\xff", b"&".join(b"a=b" for _ in range(65))):
        with pytest.raises(ValueError):
            form_of(wrong)
    started = time.perf_counter()
    form_of(b"token=" + b"%" * (4 << 20))
    assert time.perf_counter() - started < 2  # urllib takes 11 s


def test_forms_of_one_session_are_none_of_another() -> None:
    sessions = Sessions(time.monotonic)
    assert sessions.is_form_token("a", sessions.form_token("a"))
    for session, token in (("b", sessions.form_token("a")), ("a", ""), ("a", "ü"), (None, sessions.form_token("a"))):
        assert not sessions.is_form_token(session, token)
    assert not Sessions(time.monotonic).is_form_token("a", sessions.form_token("a"))


# --- pages of other sites --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none"])
def test_a_form_from_another_site_writes_nothing_even_with_its_token(serve, put, workspace, site) -> None:
    put()
    client = serve().client()
    got = post(client, "/adapters/a/move/promote", site=site, version="1", alias="production")
    assert got.status_code == 403
    assert "another site" in got.text
    assert workspace.resolve("a").aliases == ()


def test_an_origin_is_compared_where_a_browser_says_no_more(serve, put, workspace) -> None:
    put()
    client = serve().client()
    said = {"form_token": form_token(client), "version": "1", "alias": "production"}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert client.post("/adapters/a/move/promote", data=said, headers={"origin": origin}).status_code == 403
    assert client.post("/adapters/a/move/promote", data=said).status_code == 403  # no header names its origin
    origin = f"http://127.0.0.1:{client.base_url.port}"
    assert client.post("/adapters/a/move/promote", data=said, headers={"origin": origin}).status_code == 303
    assert workspace.resolve("a").aliases == ("production",)


def test_no_page_writes_without_the_form_token(serve, put, workspace) -> None:
    """Finds every route of a page that writes, so that new ones are tested too."""
    put()
    workspace.promote("a@1", "production")
    put()
    client = serve().client()
    values = {
        "name": "a",
        "number": "1",
        "verb": "rollback",
        "key": "x",
        "run_id": "x",
        "study_id": "x",
        "file_id": "x",
    }
    writes = [
        route.path.format(**{**values, "verb": "stop"})
        for router in ROUTERS
        for route in router.routes
        if not route.include_in_schema and route.methods != {"GET"}
    ]
    assert len(writes) >= 11
    for path in writes:
        for wrong in ("", "0" * 64):
            if path in FILES:
                sent, headers = {"file": ("a.csv", "text,label\n")}, {"sec-fetch-site": "same-origin"}
                got = client.post(path, files=sent, data={"form_token": wrong}, headers=headers)
            else:
                got = post(client, path, wrong, version="2", alias="production")
            assert got.status_code == 403, path
    assert str(workspace.resolve("a")) == "a@1"


def test_an_open_api_takes_no_writes_from_pages_of_other_sites(serve, put, workspace) -> None:
    """A write without a body needs no preflight: the browser sends it with its origin."""
    put()
    put()
    workspace.promote("a@1", "production")
    workspace.promote("a@2", "production")
    client = serve().client()
    path = "/api/aliases/a/production/rollback"
    for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "http://evil.example"}, {"origin": "null"}):
        assert client.post(path, headers=headers).status_code == 403
    assert str(workspace.resolve("a")) == "a@2"
    assert client.post(path).status_code == 200  # a program sends no origin


def test_where_a_write_comes_from() -> None:
    check_origin("GET", {b"sec-fetch-site": "cross-site"}, page=True)
    check_origin("POST", {b"sec-fetch-site": "same-origin"}, page=True)
    check_origin("POST", {}, page=False)
    for headers in ({}, {b"sec-fetch-site": "none"}, {b"origin": "null", b"host": ""}):
        with pytest.raises(Forbidden):
            check_origin("POST", headers, page=True)


@pytest.mark.slow
def test_a_page_takes_forms_and_no_other_body(serve, put) -> None:
    put()
    client = serve().client()
    headers = {"sec-fetch-site": "same-origin", "x-form-token": form_token(client)}
    assert client.post("/store/verify", headers=headers).status_code == 200
    assert client.post("/store/verify", headers=headers, json={}).status_code == 415
    kind = {"content-type": "application/x-www-form-urlencoded"}
    for body in (b"a=%ff", b"\xff", "&".join(f"k{n}=1" for n in range(99)).encode()):
        got = client.post("/store/verify", headers=headers | kind, content=body)
        assert got.status_code == 400, body
        assert "the form cannot be read" in got.text
    assert client.post("/v1/classify", data={"model": "a"}).status_code == 415


# --- the guard, alone ------------------------------------------------------------------------------------------------


def test_the_guard_tells_pages_apart(tmp_path: Path) -> None:
    tokens = Store(tmp_path / "store").tokens
    kept, secret = tokens.create("boss", ["admin"])
    guard = Guard("127.0.0.1", [kept], lambda: 0.0)
    session = guard.sign_in(secret)
    assert guard.authorize_page("/adapters", session, None).name == "boss"
    assert guard.authorize_page("/sign-in", None, None).scopes == ()
    with pytest.raises(Unauthorized):
        guard.authorize_page("/adapters", "nobody", None)
    with pytest.raises(Unauthorized):
        guard.authorize("/api/status", None, None)
    assert create  # `app.create` puts the middleware around the routes
