"""A tenant that floods a resource, and the single request of another one, within 2 s of its quiet time.

In each case the control is the same request by a second token of the tenant that floods: between the requests of one
tenant there are no turns, so it waits, or is refused, as everybody did before tenants took turns.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
import small_models
from server.console_forms import signed_in
from server.echo import Echo
from server.test_end_to_end import bundle
from store.bundles import tensors, write_bundle

from turret.access import Access
from turret.server.auth import MOST_OF_TOKEN, Sessions
from turret.server.limits import RequestLimits
from turret.server.oidc import BACK, COOKIE, OidcSettings
from turret.store.access_tokens import SessionRows
from turret.workspace import Workspace

LATER = 2.0  # seconds beyond its quiet time that another tenant's request may take
SCOPES = ("infer", "admin")
TENANTS = {"quiet": "quiet", "same": "flood", "flood": "flood"}  # token -> tenant


@dataclass
class House:
    """A server in a process of its own, with the secrets of its tokens."""

    url: str
    secrets: dict[str, str]

    def seconds(self, ask: Callable[[httpx2.Client], httpx2.Response], token: str, most: float = 60) -> float:
        """How long a request of a token takes; infinite if it is refused, or takes longer than the most."""
        headers = {"authorization": f"Bearer {self.secrets[token]}"}
        with httpx2.Client(base_url=self.url, headers=headers, timeout=most, trust_env=False) as client:
            began = time.monotonic()
            try:
                got = ask(client)
            except httpx2.TimeoutException:
                return float("inf")
        assert got.status_code in (200, 429), got.text
        return time.monotonic() - began if got.status_code == 200 else float("inf")

    @contextmanager
    def flooded(
        self, count: int, path: str, body: bytes, content_type: str, length: int | None = None
    ) -> Iterator[None]:
        """So many requests of the tenant that floods, of which nobody reads the answers; they end with the block."""
        address = self.url.removeprefix("http://").split(":")
        head = f"POST {path} HTTP/1.1\r\nhost: {address[0]}\r\nauthorization: Bearer {self.secrets['flood']}\r\n"
        head += f"content-type: {content_type}\r\ncontent-length: {length or len(body)}\r\n\r\n"
        with ExitStack() as opened:
            for _ in range(count):
                one = opened.enter_context(socket.create_connection((address[0], int(address[1])), timeout=30))
                one.sendall(head.encode() + body)
            yield


def tokens(workspace: Workspace) -> dict[str, str]:
    return {
        name: workspace.with_access(Access(tenant)).tokens.create(name, SCOPES)[1] for name, tenant in TENANTS.items()
    }


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The command, on a small base, with an adapter of each tenant."""
    folder = tmp_path_factory.mktemp("house")
    base, workspace = small_models.save_base("qwen3", folder / "qwen3"), Workspace(folder / "store")
    for seed, tenant in enumerate(("quiet", "flood")):
        made = bundle(folder / tenant, base, "qwen3", "generate", seed)
        workspace.with_access(Access(tenant)).store.put("a", made)
    secrets = tokens(workspace)
    command = [sys.executable, "-m", "turret", "serve", "--port", "0", "--json", "--connections-per-client", "0"]
    command += ["--store", str(workspace.store.root), "--base", str(base)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            made = House(json.loads(process.stdout.readline())["url"], secrets)
            assert (
                max(made.seconds(one_token, token) for token in ("quiet", "same")) < 60
            )  # the first ones load and compile
            yield made
        finally:
            process.kill()


def compared(house: House, ask: Callable[[httpx2.Client], httpx2.Response], flood: Callable[[], Any]) -> None:
    """The request under a flood, against its quiet time; and the control. A busy machine may try three times."""
    for last in (False, False, True):
        quiet = max(house.seconds(ask, token) for token in ("quiet", "same") * 2)
        with flood():
            time.sleep(1.0)  # until the flood is where it floods
            same = house.seconds(ask, "same", most=quiet + LATER)
            other = house.seconds(ask, "quiet", most=quiet + 5 * LATER)
        if other <= quiet + LATER and same == float("inf"):
            return
        if last:
            assert other <= quiet + LATER, f"quiet {quiet:.2f} s, under the flood {other:.2f} s"
            assert same == float("inf"), f"the control: {same:.2f} s, for a tenant that floods itself"
        time.sleep(2.0)


LONG = json.dumps({"model": "a", "prompt": "the film", "max_tokens": 1500}).encode()


def one_token(client: httpx2.Client) -> httpx2.Response:
    return client.post("/v1/completions", json={"model": "a", "prompt": "a great film", "max_tokens": 1})


@pytest.mark.slow
@pytest.mark.parametrize("count", [160, 300], ids=["rows and cache", "requests in flight"])
def test_long_answers_of_one_tenant(house: House, count: int) -> None:
    compared(house, one_token, lambda: house.flooded(count, "/v1/completions", LONG, "application/json"))


@pytest.mark.slow
def test_long_texts_of_one_tenant_that_are_parsed_and_tokenized(house: House) -> None:
    text = json.dumps({"model": "a", "prompt": "the quick brown fox " * 49_000}).encode()

    def chat(client: httpx2.Client) -> httpx2.Response:
        said = [{"role": "user", "content": "why not?"}]
        return client.post("/v1/chat/completions", json={"model": "qwen3", "messages": said, "max_tokens": 1})

    compared(house, chat, lambda: house.flooded(60, "/tokenize", text, "application/json"))


@pytest.mark.slow
def test_files_of_one_tenant_that_come_a_byte_at_a_time(house: House) -> None:
    start = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n{'

    def both(client: httpx2.Client) -> httpx2.Response:
        assert one_token(client).status_code == 200, "they are not in flight"
        return client.post("/v1/files", files={"file": ("a", b"{}")}, data={"purpose": "batch"})

    compared(house, both, lambda: house.flooded(252, "/v1/files", start, "multipart/form-data; boundary=x", 1 << 20))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # starlette leaves a temporary file open
def test_a_file_that_comes_too_slowly_is_408_however_many_bytes_come(serve, workspace) -> None:
    running = serve(limits=RequestLimits(body_seconds=0.6, file_rate=10_000))
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    answers = {}
    for rate in (200, 400_000):
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as one:
            length = len(head) + 300_000
            one.sendall(
                b"POST /v1/files HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: multipart/form-data; boundary=x\r\n"
            )
            one.sendall(b"content-length: %d\r\n\r\n" % length + head)
            one.setblocking(False)
            sent, began = 0, time.monotonic()
            while sent < 300_000 and time.monotonic() < began + 4:
                try:
                    sent += one.send(b"x" * min(int(rate * 0.05), 300_000 - sent))
                    answers[rate] = one.recv(100)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
            one.settimeout(20)
            answers[rate] = answers.get(rate) or one.recv(100)
    assert b" 408 " in answers[200]
    assert b" 400 " in answers[400_000], "the control: all of it was read, and it is no whole form"


@pytest.fixture
def running(serve, workspace, tmp_path) -> Any:
    """A server over the echo, whose loads take two seconds, with versions of both tenants."""
    for tenant in ("flood", "quiet"):
        for seed in range(12):
            task = {"kind": "classify", "labels": ["no", "yes"]}
            said = {"base": {"id": "echo", "fingerprint": Echo(workspace.store).fingerprint}, "task": task}
            made = write_bundle(tmp_path / "bundles", tensors(seed), said=said)
            workspace.with_access(Access(tenant)).store.put("a", made)
    return serve(load_seconds=2.0)


@pytest.mark.slow
def test_control_threads_that_one_tenant_holds(serve, workspace, running) -> None:
    secrets = tokens(workspace)
    running.view.refresh()
    house = House(running.url, secrets)

    @contextmanager
    def loads() -> Iterator[None]:
        paths = [f"/api/adapters/a@{number}/load" for number in range(1, 13)]
        with ExitStack() as opened:
            for path in paths:
                opened.enter_context(house.flooded(1, path, b"{}", "application/json"))
            yield

    compared(house, lambda client: client.get("/api/aliases"), loads)


def test_sessions_of_one_token() -> None:
    sessions = Sessions(time.monotonic)
    other = sessions.begin("another token")
    own = [sessions.begin("one token") for _ in range(1030)]
    assert sessions.token_hash(other) == "another token"
    assert [sessions.token_hash(each) is not None for each in own] == [False] * 998 + [True] * MOST_OF_TOKEN
    assert len(sessions._open) == MOST_OF_TOKEN + 1
    many = [sessions.begin(f"token {number}") for number in range(1000)]
    assert len(sessions._open) == 1024
    left = [sessions.token_hash(each) is not None for each in (other, own[-1], *many)]
    assert all(left), "beyond the limit of all sessions, the token with the most loses its oldest ones"


def test_sessions_of_one_token_in_the_catalog_of_all_servers(workspace) -> None:
    rows = SessionRows(workspace.store.database(make=True))
    rows.keep("other", "another token", 60, 20, 5)
    for number in range(30):
        rows.keep(f"own {number}", "one token", 60 + number, 20, 5)
    assert rows.all() == {"other"} | {f"own {number}" for number in range(25, 30)}
    for number in range(16):
        rows.keep(f"new {number}", f"token {number}", 200, 20, 5)
    assert {"other", "own 27", "own 28", "own 29", "new 0", "new 15"} <= rows.all()
    assert len(rows.all()) == 20, "the token that has the most lost its oldest ones"


@pytest.mark.slow
def test_a_flood_of_sign_ins_signs_nobody_else_out(serve, workspace) -> None:
    secrets = tokens(workspace)
    running = serve()
    other, first = signed_in(running, secrets["quiet"]), signed_in(running, secrets["flood"])
    for _ in range(MOST_OF_TOKEN):
        running.served.guard.sessions.keep(running.served.guard.sign_in(secrets["flood"]))
    assert other.get("/adapters").status_code == 200
    assert first.get("/adapters").status_code == 303, "the control: the first session of that token has ended"


# --- sign-ins by a provider ------------------------------------------------------------------------------------------


@pytest.fixture
def slow_provider() -> Iterator[str]:
    """A provider that answers no code before the test ends."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = json.dumps({
                "issuer": issuer, "authorization_endpoint": f"{issuer}/a", "token_endpoint": f"{issuer}/t",
                "jwks_uri": f"{issuer}/k",
            }).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def do_POST(self) -> None:
            over.wait(20)

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    issuer = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield issuer
    over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_people_who_come_back_from_a_slow_provider(serve, workspace, slow_provider) -> None:
    secrets = tokens(workspace)
    running = serve(oidc=OidcSettings(slow_provider, "turret", "secret", "http://127.0.0.1:8000"))
    house = House(running.url, secrets)
    provider = running.served.oidc
    quiet = max(house.seconds(lambda client: client.get("/api/aliases"), "quiet") for _ in range(3))
    with ExitStack() as opened:
        for _ in range(30):
            url, cookie = provider.begin("/")
            state = url.partition("state=")[2].partition("&")[0]
            one = opened.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=30))
            asked = f"GET {BACK}?code=x&state={state} HTTP/1.1\r\nhost: 127.0.0.1\r\ncookie: {COOKIE}={cookie}\r\n\r\n"
            one.sendall(asked.encode())
        time.sleep(0.5)
        assert house.seconds(lambda client: client.get("/api/aliases"), "quiet", most=quiet + LATER) < float("inf")
        for address, waits in (("127.0.0.1", True), ("127.0.0.2", False)):  # the control is at the flood's own address
            transport = httpx2.HTTPTransport(local_address=address)
            with httpx2.Client(base_url=running.url, timeout=LATER, transport=transport) as browser:
                if waits:
                    with pytest.raises(httpx2.ReadTimeout):
                        browser.get(BACK)
                else:
                    assert browser.get(BACK).status_code == 401, "a sign-in that is not known here"
