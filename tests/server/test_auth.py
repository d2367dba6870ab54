"""Tokens with scopes on every path, stored as hashes; without tokens, loopback only."""

from __future__ import annotations

import hmac
import itertools
import sqlite3
import threading

import pytest

from turret.errors import BadReference, Forbidden, InUse, NotFound, ServeRefused, Unauthorized
from turret.server.auth import Guard, is_loopback
from turret.store import Store
from turret.store.access_tokens import PREFIX, SCOPES, AccessTokens, hash_secret, token_with_secret

CLASSIFY = {"model": "a", "input": "x"}


def test_without_a_token_401_with_the_wrong_scope_403_on_every_guarded_path(serve, put, workspace) -> None:
    put()
    _, infer = workspace.tokens.create("reader")
    _, admin = workspace.tokens.create("boss", ["admin"])
    running = serve()
    anyone, reader, boss = running.client(), running.client(infer), running.client(admin)
    for path in ("/api/status", "/api/adapters", "/api/loaded", "/api/aliases", "/metrics"):
        assert anyone.get(path).status_code == 401, path
        assert reader.get(path).status_code == 403, path
        assert boss.get(path).status_code == 200, path
    for client, status in ((anyone, 401), (boss, 200), (reader, 200)):
        assert client.post("/v1/classify", json=CLASSIFY).status_code == status
        assert client.get("/v1/models").status_code == status
    assert anyone.get("/nothing/here").status_code == 401
    assert anyone.get("/openapi.json").status_code == 401
    assert reader.get("/openapi.json").status_code == 200
    got = anyone.get("/v1/models")
    assert got.headers["www-authenticate"] == "Bearer"
    assert got.json()["error"]["code"] == "unauthorized"
    for path in ("/healthz", "/readyz"):
        assert anyone.get(path).status_code == 200


def test_a_403_says_which_command_makes_the_token_that_is_needed(serve, put, workspace) -> None:
    put()
    secrets = {scope: workspace.tokens.create(scope, [scope])[1] for scope in ("infer", "metrics")}
    running = serve()
    got = running.client(secrets["infer"]).get("/api/status")
    assert got.status_code == 403
    assert "`turret token create NAME --scope admin` makes one" in got.json()["error"]["message"]
    got = running.client(secrets["metrics"]).post("/v1/classify", json=CLASSIFY)
    assert "has no scope infer or admin" in got.text
    assert "`turret token create NAME --scope infer` makes one" in got.json()["error"]["message"]


def test_a_token_for_metrics_reads_them_and_opens_nothing_else(serve, put, workspace) -> None:
    put()
    _, secret = workspace.tokens.create("prometheus", ["metrics"])
    running = serve()
    client = running.client(secret)
    assert "turret_tenant_requests_total" in client.get("/metrics").text
    for path in ("/api/status", "/api/adapters", "/api/usage", "/v1/models", "/nothing", "/metrics/x"):
        assert client.get(path).status_code == 403, path
    assert client.post("/v1/classify", json=CLASSIFY).status_code == 403
    assert client.post("/api/outcomes", json={"outcomes": []}).status_code == 403
    with pytest.raises(Unauthorized, match="opens no page"):
        running.served.guard.sign_in(secret)
    with pytest.raises(Unauthorized, match="opens no page"):
        running.served.guard.sign_in_as("prometheus", "default")


def test_an_unknown_path_is_401_without_a_token_403_with_one_that_is_not_admin_and_404_with_one_that_is(
    serve, workspace
) -> None:
    _, infer = workspace.tokens.create("reader")
    _, admin = workspace.tokens.create("boss", ["admin"])
    running = serve()
    paths = ("/nothing", "/nothing/here", "/v2/models", "/metrics/x", "/api", "/v1", "//v1/models")
    for token, status in ((None, 401), (infer, 403), (admin, 404)):
        client = running.client(token)
        for method, path in itertools.product(("GET", "POST", "DELETE"), paths):
            assert client.request(method, running.url + path).status_code == status, (method, path, token)


def test_an_authorization_that_is_no_known_token_is_401(serve, workspace) -> None:
    workspace.tokens.create("reader")
    client = serve().client()
    for said in ("", "Bearer", "Basic abc", "Bearer turret-nobody", "Bearer " + "x" * 9999):
        got = client.get("/v1/models", headers={"authorization": said})
        assert got.status_code == 401, said
        assert "nobody" not in got.text


def test_an_authorization_of_another_form_is_said_to_be_unreadable(serve, workspace) -> None:
    workspace.tokens.create("reader")
    client = serve().client()
    for said in ("Bearer", "Basic abc", "Digest abc", "Bearer " + "x" * 257):
        assert "expected Bearer TOKEN" in client.get("/v1/models", headers={"authorization": said}).text, said


def test_a_token_is_nowhere_in_the_store_and_the_log(serve, put, workspace, until) -> None:
    put()
    kept, secret = workspace.tokens.create("reader")
    assert secret.startswith(PREFIX)
    assert len(secret) > 40
    running = serve()
    assert running.client(secret).post("/v1/classify", json=CLASSIFY).status_code == 200
    running.client(secret).get("/api/status")
    until(lambda: sum(line["event"] == "request" for line in running.log()) == 2)
    assert secret not in running.lines.getvalue()
    assert '"token": "reader"' in running.lines.getvalue()
    row = sqlite3.connect(workspace.store.root / "turret.db").execute("SELECT * FROM tokens").fetchone()
    assert secret not in str(row)
    assert hash_secret(secret) in row
    assert secret not in repr(kept)
    assert kept.hash not in repr(kept)
    assert "hash" not in kept.as_json()


def test_a_token_is_compared_in_constant_time_with_every_one_known(tmp_path, monkeypatch) -> None:
    tokens = Store(tmp_path / "store").tokens
    made = [tokens.create(f"t{number}") for number in range(4)]
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or a == b)
    known = [kept for kept, _ in made]
    assert token_with_secret(known, made[0][1]) == known[0]
    assert compared == [kept.hash for kept in known]
    assert token_with_secret(known, "\ud800 not text") is None


def test_a_revoked_token_is_unknown_within_a_second_and_the_door_stays_closed(serve, workspace, until) -> None:
    _, secret = workspace.tokens.create("reader")
    running = serve()
    client = running.client(secret)
    assert client.get("/v1/models").status_code == 200
    workspace.tokens.revoke("reader")
    until(lambda: client.get("/v1/models").status_code == 401, seconds=2)
    assert running.client().get("/v1/models").status_code == 401
    assert serve().client().get("/v1/models").status_code == 401


@pytest.mark.slow
def test_a_load_that_takes_its_time_does_not_hold_up_a_token_that_is_revoked(serve, put, workspace, until) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    _, secret = workspace.tokens.create("reader")
    running = serve()
    running.engine.load_seconds = 3.0
    workspace.promote("a@2", "production")
    workspace.tokens.revoke("reader")
    client = running.client(secret)
    until(lambda: client.get("/v1/models").status_code == 401, seconds=1.5)


def test_a_reading_of_tokens_that_is_late_does_not_bring_back_a_revoked_one(serve, workspace, monkeypatch) -> None:
    _, boss = workspace.tokens.create("boss", ["admin"])
    _, secret = workspace.tokens.create("reader")
    served = serve().served
    all_tokens, has_read, may_go_on = AccessTokens.of_all_tenants, threading.Event(), threading.Event()

    def slow_reading(tokens):
        found = all_tokens(tokens)
        if threading.current_thread().name == "late":
            has_read.set()
            may_go_on.wait(0.5)  # under a lock, the other reading cannot let it go on
        return found

    monkeypatch.setattr(AccessTokens, "of_all_tenants", slow_reading)
    late = threading.Thread(target=served.read_tokens, name="late")
    late.start()
    assert has_read.wait(10)
    workspace.tokens.revoke("reader")
    served.read_tokens()
    may_go_on.set()
    late.join()
    assert served.guard.authorize("/api/status", f"Bearer {boss}", None).name == "boss"
    with pytest.raises(Unauthorized):
        served.guard.authorize("/v1/models", f"Bearer {secret}", None)


def test_a_first_token_closes_the_door_of_a_server_that_runs(serve, workspace, until) -> None:
    client = serve().client()
    assert client.get("/v1/models").status_code == 200
    workspace.tokens.create("reader")
    until(lambda: client.get("/v1/models").status_code == 401, seconds=2)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_without_tokens_nothing_but_loopback_is_served(tmp_path, host) -> None:
    with pytest.raises(ServeRefused, match="without tokens: expected a loopback address"):
        Guard(host, [])
    tokens = Store(tmp_path / "store").tokens
    kept, secret = tokens.create("reader")
    assert Guard(host, [kept]).authorize("/v1/models", f"Bearer {secret}", None).name == "reader"


def test_an_open_server_answers_to_loopback_names_only(serve) -> None:
    """An attacker's name may resolve to 127.0.0.1; the browser then sends that name as the host."""
    client = serve().client()
    got = client.get("/v1/models", headers={"host": "evil.example:8000"})
    assert got.status_code == 403
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "localhost.example.org", "", "128.0.0.1")))


def test_names_scopes_and_quotas_of_tokens_are_checked(tmp_path) -> None:
    tokens = Store(tmp_path / "store").tokens
    assert list(tokens.list()) == []
    with pytest.raises(NotFound, match="no token named 'x'"):
        tokens.revoke("x")
    for name in ("", "-x", "a b", "x" * 101, "ä"):
        with pytest.raises(BadReference, match="bad token name"):
            tokens.create(name)
    for scopes in ([], ["root"]):
        with pytest.raises(BadReference, match="bad scopes"):
            tokens.create("x", scopes)
    with pytest.raises(BadReference, match="a quota must be at least 1 per minute"):
        tokens.create("x", requests_per_minute=0)
    kept, _ = tokens.create("x", ["admin", "infer"], requests_per_minute=3, tokens_per_minute=9)
    assert (kept.scopes, kept.requests_per_minute, kept.tokens_per_minute) == (("infer", "admin"), 3, 9)
    tokens.revoke("x")
    assert tokens.revoke("x").revoked
    with pytest.raises(InUse, match="a token 'x' exists or existed"):
        tokens.create("x")


def test_the_guard_tells_what_is_wrong_by_class(tmp_path) -> None:
    kept, secret = Store(tmp_path / "store").tokens.create("reader")
    guard = Guard("127.0.0.1", [kept])
    with pytest.raises(Unauthorized, match="no token"):
        guard.authorize("/v1/models", None, None)
    with pytest.raises(Forbidden, match="no scope admin"):
        guard.authorize("/api/status", f"Bearer {secret}", None)
    assert guard.authorize("/v1/models", f"bearer {secret}", None).name == "reader"


def test_a_person_gets_the_session_of_their_own_token(tmp_path) -> None:
    tokens = Store(tmp_path / "store").tokens
    guard = Guard("127.0.0.1", [tokens.create(name)[0] for name in ("ann", "bob")])
    session = guard.sign_in_as("bob", "default")
    assert guard.authorize_page("/", session, None).name == "bob"
    for person in (("eve", "default"), ("bob", "other")):
        with pytest.raises(Unauthorized, match="there is no token for"):
            guard.sign_in_as(*person)


def test_the_owner_of_a_batch_asks_while_its_token_is_valid_and_anyone_while_the_server_is_open(tmp_path) -> None:
    tokens = Store(tmp_path / "store").tokens
    anyone = Guard("127.0.0.1", []).caller_of("")
    assert anyone is not None
    assert (anyone.name, anyone.scopes) == (None, SCOPES)
    guard = Guard("127.0.0.1", [tokens.create("reader")[0]])
    owner = guard.caller_of("token reader")
    assert owner is not None
    assert owner.name == "reader"
    guard.set_tokens([tokens.revoke("reader")])
    assert [guard.caller_of(key) for key in ("", "token reader", "token nobody")] == [None] * 3
