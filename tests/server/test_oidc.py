"""Sign-in to the console by a real OpenID Connect provider, which runs in a thread."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import oidc_provider_mock
import pytest
from command_line import typed
from joserfc import jwt
from joserfc.jwk import ECKey
from oidc_provider_mock import User
from server.console_forms import form_token, post

from turret.errors import ServeRefused, Unauthorized
from turret.server.auth import SESSION_COOKIE
from turret.server.oidc import BACK, PATH, Oidc, OidcSettings
from turret.server.oidc import COOKIE as SIGN_IN

PEOPLE = (
    User(sub="1", claims={"preferred_username": "ann", "org": "legal"}),
    User(sub="2", claims={"preferred_username": "bob", "org": "legal"}),
    User(sub="3", claims={"email": "nameless@example.com"}),
)
SECRET = b"of all servers of a store"
HERE = "http://127.0.0.1:8000"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the provider, which runs in this process


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    with oidc_provider_mock.run_server_in_thread(require_nonce=True, user_claims=PEOPLE) as server:
        yield f"http://localhost:{server.server_port}"


def settings(issuer: str, **changes: str) -> OidcSettings:
    return OidcSettings(issuer, "turret", "secret", HERE, **changes)


def sent_back(url: str, sub: str, **form: str) -> dict[str, str]:
    """What the provider sends the browser back with, after a person has signed in there."""
    answer = httpx2.post(url, data={"sub": sub, **form})
    assert answer.status_code in (302, 303), answer.text[:500]
    assert answer.headers["location"].startswith(HERE + BACK)
    return {name: values[0] for name, values in parse_qs(urlsplit(answer.headers["location"]).query).items()}


def oidc_callback(client, sub: str, next: str = "/runs"):
    """Sign in with a browser: to the provider, and back."""
    gone = client.get(PATH, params={"next": next})
    assert gone.status_code == 303
    return client.get(BACK, params=sent_back(gone.headers["location"], sub))


@pytest.fixture
def running(serve, workspace, issuer):
    workspace.tokens.create("ann", ["admin"])
    return serve(oidc=settings(issuer))


def test_a_person_gets_the_rights_of_the_token_with_their_name_until_it_is_revoked(running, workspace) -> None:
    client = running.client()
    assert f'href="{PATH}?next=/runs"' in client.get("/sign-in?next=/runs").text
    got = oidc_callback(client, "1")
    assert got.status_code == 200
    assert 'content="0; url=/runs"' in got.text
    session = next(each for each in got.headers.get_list("set-cookie") if each.startswith(SESSION_COOKIE))
    assert "SameSite=Strict" in session
    assert client.get("/runs").status_code == 200
    assert post(client, "/sign-out", form_token(client)).status_code == 303
    assert client.get("/runs").status_code == 303
    oidc_callback(client, "1")
    workspace.tokens.revoke("ann")
    running.view.refresh()
    assert client.get("/runs").status_code == 303


@pytest.mark.parametrize(("sub", "why"), [("2", "no token for &#39;bob&#39;"), ("3", "named no preferred_username")])
def test_a_person_without_a_token_or_a_name_does_not_come_in(running, sub, why) -> None:
    client = running.client()
    got = oidc_callback(client, sub)
    assert got.status_code == 401
    assert why in got.text
    assert client.get("/runs").status_code == 303


def test_an_answer_counts_once_in_the_browser_that_asked_and_with_its_state(running) -> None:
    client, other = running.client(), running.client()
    url = client.get(PATH).headers["location"]
    answer = sent_back(url, "1")
    assert other.get(BACK, params=answer).status_code == 401, "another browser"
    assert client.get(BACK, params=answer | {"state": "x"}).status_code == 401, "the state of another sign-in"
    assert client.get(BACK, params=answer).status_code == 401, "the sign-in has ended"
    assert (
        "refused the sign-in"
        in client.get(BACK, params=sent_back(client.get(PATH).headers["location"], "1", action="deny")).text
    )
    assert oidc_callback(client, "1").status_code == 200


def test_the_provider_may_send_the_browser_back_to_another_server_of_the_store(serve, workspace, issuer) -> None:
    workspace.tokens.create("ann", ["admin"])
    one, other = (serve(oidc=settings(issuer)).client() for _ in range(2))
    gone = one.get(PATH, params={"next": "/runs"})
    answer = sent_back(gone.headers["location"], "1")
    cookie = {"cookie": f"{SIGN_IN}={one.cookies[SIGN_IN]}"}
    got = other.get(BACK, params=answer, headers=cookie)
    assert got.status_code == 200, got.text
    assert 'content="0; url=/runs"' in got.text
    assert other.get("/runs").status_code == 200
    session = {"cookie": f"{SESSION_COOKIE}={other.cookies[SESSION_COOKIE]}"}
    assert one.get("/runs", headers=session).status_code == 200, "the session is one of both"
    assert other.get(BACK, params=answer, headers=cookie).status_code == 401, "it has counted there"
    assert one.get(BACK, params=answer, headers=cookie).status_code == 401, "the provider takes its code once"


def test_a_cookie_that_a_server_of_another_store_made_or_somebody_changed_is_refused(issuer) -> None:
    provider, other = Oidc(settings(issuer), SECRET), Oidc(settings(issuer), b"of another store")
    for name, made in {"another store": other, "changed": provider}.items():
        url, cookie = made.begin("/runs")
        answer = sent_back(url, "1")
        if name == "changed":
            parts = cookie.split(".")
            cookie = ".".join([*parts[:2], "L2V2aWw", parts[3]])  # /evil
        with pytest.raises(Unauthorized, match="not known here"):
            provider.finish(cookie, answer)
    url, cookie = provider.begin("/runs")
    assert provider.finish(cookie, sent_back(url, "1")).name == "ann"


@pytest.mark.parametrize("changed", ["nonce", "client"])
def test_a_token_for_another_request_or_client_is_refused(issuer, changed) -> None:
    provider = Oidc(settings(issuer), SECRET)
    url, key = provider.begin("/")
    if changed == "client":
        url = url.replace("client_id=turret", "client_id=other")
    else:
        url, count = re.subn("nonce=[^&]+", f"nonce={'x' * 43}", url)
        assert count == 1
    with pytest.raises(Unauthorized, match="begin again"):
        provider.finish(key, sent_back(url, "1"))


def test_a_claim_names_the_tenant(issuer) -> None:
    provider = Oidc(settings(issuer, tenant_claim="org"), SECRET)
    url, key = provider.begin("/adapters")
    person = provider.finish(key, sent_back(url, "2"))
    assert (person.name, person.tenant, person.next) == ("bob", "legal", "/adapters")


def test_a_sign_in_ends_after_ten_minutes(issuer) -> None:
    now = [0.0]
    provider = Oidc(settings(issuer), SECRET, clock=lambda: now[0])
    url, key = provider.begin("/")
    now[0] = 600.0
    with pytest.raises(Unauthorized, match="10 minutes"):
        provider.finish(key, sent_back(url, "1"))


@pytest.mark.parametrize("url", ["http://example.com", "ftp://localhost", "localhost", "http://localhost:9/x"])
def test_a_provider_that_cannot_be_asked_refuses_the_start(url) -> None:
    with pytest.raises(ServeRefused, match="--oidc"):
        Oidc(settings(url), SECRET)


def test_the_command_needs_the_clients_secret(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TURRET_OIDC_SECRET", raising=False)
    status, _, err = typed("serve", "--base", "x", "--store", str(tmp_path), "--oidc", "https://id.example.com")
    assert status == 2
    assert err.count("\n") == 1
    assert "TURRET_OIDC_SECRET" in err


def test_a_server_without_a_provider_has_no_such_page(serve, workspace) -> None:
    workspace.tokens.create("ann", ["admin"])
    client = serve().client()
    assert client.get(PATH).status_code == 404
    assert client.get(BACK).status_code == 404
    assert PATH not in client.get("/sign-in").text


# --- a provider that says what a test wants ---------------------------------------------------------------------------


class Provider:
    """A provider whose ID token and userinfo have these claims."""

    def __init__(self) -> None:
        self.claims: dict[str, Any] = {}
        self.userinfo: dict[str, Any] = {}
        key = ECKey.generate_key("P-256", {"kid": "1"})
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({
                    "/.well-known/openid-configuration": provider.metadata,
                    "/keys": {"keys": [key.as_dict(private=False)]},
                    "/userinfo": provider.userinfo,
                }[self.path])  # fmt: skip

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                token = jwt.encode({"alg": "ES256", "kid": "1"}, provider.claims, key)
                self.answer({"access_token": "x", "token_type": "Bearer", "id_token": token})

            def answer(self, said: dict[str, Any]) -> None:
                content = json.dumps(said).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.issuer = f"http://127.0.0.1:{self.server.server_port}"
        places = {"authorization": "authorize", "token": "token", "userinfo": "userinfo"}
        self.metadata = {f"{name}_endpoint": f"{self.issuer}/{path}" for name, path in places.items()}
        self.metadata |= {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys"}

    def person(self, userinfo: dict[str, Any] | None = None, claim: str = "preferred_username", **claims: Any) -> str:
        """The name of who signs in."""
        oidc = Oidc(settings(self.issuer, claim=claim), SECRET)
        url, cookie = oidc.begin("/")
        asked = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        now = int(time.time())
        self.claims = {"iss": self.issuer, "sub": "1", "aud": "turret", "iat": now, "exp": now + 60}
        self.claims |= {"nonce": asked["nonce"], **claims}
        self.userinfo = {"sub": "1"} | (userinfo or {})
        return oidc.finish(cookie, {"code": "x", "state": asked["state"]}).name


@pytest.fixture(scope="module")
def chosen() -> Iterator[Provider]:
    made = Provider()
    threading.Thread(target=made.server.serve_forever, daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize("audience", ["other", "", [], ["other"], ["other", "another"], {"turret": 1}, 5, [["turret"]]])
def test_an_answer_for_another_client_signs_nobody_in(chosen, audience) -> None:
    with pytest.raises(Unauthorized, match="begin again"):
        chosen.person(aud=audience, azp="turret", preferred_username="ann")
    for own in ("turret", ["turret"], ["other", "turret"]):  # the control
        assert chosen.person(aud=own, azp="turret", preferred_username="ann") == "ann"


def test_an_email_counts_only_if_the_provider_has_verified_it(chosen) -> None:
    for verified in ({}, {"email_verified": False}, {"email_verified": "false"}, {"email_verified": 1.5}):
        with pytest.raises(Unauthorized, match="named no email that it has verified"):
            chosen.person(claim="email", email="ann@example.com", **verified)
        with pytest.raises(Unauthorized, match="named no email that it has verified"):
            chosen.person({"email": "ann@example.com", **verified}, claim="email")
    with pytest.raises(Unauthorized):  # of another email
        chosen.person({"email_verified": True}, claim="email", email="ann@example.com")
    assert chosen.person(claim="email", email="ann@example.com", email_verified=True) == "ann@example.com"
    assert chosen.person({"email": "b@c.de", "email_verified": True}, claim="email", email="x@y.z") == "b@c.de"


def test_no_person_signs_in_by_a_token_of_a_machine(workspace, serve) -> None:
    _, secret = workspace.tokens.create("ci", ["admin"], sign_in=False)
    workspace.tokens.create("ann", ["admin"])
    running = serve()
    with pytest.raises(Unauthorized, match="there is no token for 'ci'"):
        running.served.guard.sign_in_as("ci", "default")
    with pytest.raises(Unauthorized, match="made with --no-sign-in"):
        running.served.guard.sign_in(secret)
    assert running.client(secret).get("/api/status").status_code == 200, "the API takes it as before"
    assert running.served.guard.sign_in_as("ann", "default"), "the control"
