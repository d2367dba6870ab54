"""Several servers on one store: quotas, sessions and the guards of experiments are those of all of them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from server.conftest import Running
from server.echo import FINGERPRINT, LABELS, Echo
from server.patience import until
from store.bundles import tensors, write_bundle

from turret.access import Access
from turret.audit import LOOK_SECONDS, NewestActions
from turret.client import AsyncClient
from turret.errors import Draining, NotFound, QuotaSpent, StoreError, TurretError
from turret.server.auth import SESSION_COOKIE
from turret.server.limits import Quota, SharedQuotas
from turret.server.metrics import Metrics
from turret.server.services import Leader, ServerSettings
from turret.store import Store
from turret.store.usage import Budgets
from turret.workspace import Workspace

BODY = {"model": "a", "input": "x"}


@pytest.fixture(params=["folder", "url"])
def where(request: pytest.FixtureRequest, tmp_path: Path, new_url: Callable[..., str]) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    return new_url(str(tmp_path / "files"))


@pytest.fixture
def two(where: str, tmp_path: Path) -> Iterator[list[Running]]:
    """Two servers of one store, with an adapter `a`."""
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": "classify", "labels": list(LABELS)}}
    Store(where).put("a", write_bundle(tmp_path / "bundles", tensors(1), said=said))
    Workspace(where).tokens.create("operator", ["admin", "infer"])
    servers = []
    for name in ("one", "two"):
        workspace = Workspace(where)
        servers.append(Running(workspace, Echo(workspace.store), ServerSettings(replica=name)).start())
    yield servers
    for each in servers:
        each.stop()


def shared(where: str, clock: Callable[[], float] = time.monotonic) -> SharedQuotas:
    def fail(error: StoreError) -> None:
        raise error

    return SharedQuotas(clock, Budgets(Store(where).database(make=True)), fail)


def admitted(quotas: SharedQuotas, quota: Quota, asked: int) -> int:
    count = 0
    for _ in range(asked):
        try:
            if not quotas.admit("t", "token t", quota):
                quotas.reserve("t", "token t", quota)
            count += 1
        except QuotaSpent:
            pass
    return count


def test_a_token_of_ten_requests_a_minute_gets_ten_over_two_servers(two, where) -> None:
    _, secret = Workspace(where).tokens.create("few", requests_per_minute=10)
    for each in two:
        each.view.refresh()
    clients, started = [each.client(secret) for each in two], time.monotonic()
    codes = [client.post("/v1/classify", json=BODY).status_code for _ in range(8) for client in clients]
    refilled = (time.monotonic() - started) / 6
    assert 10 <= codes.count(200) <= 10 + refilled
    assert set(codes) == {200, 429}
    while two[1].client(secret).post("/v1/classify", json=BODY).status_code == 200:
        pass
    got = two[1].client(secret).post("/v1/classify", json=BODY)
    assert got.json()["error"]["message"].startswith("the quota of token few is spent: 10 requests a minute")
    assert 1 <= int(got.headers["retry-after"]) <= 6


@pytest.mark.parametrize("per_minute", [3, 64, pytest.param(2000, marks=pytest.mark.slow)])
def test_servers_that_ask_at_once_get_the_quota_and_not_one_more(where, per_minute) -> None:
    """What one of them has reserved at its end, and does not use, goes back and is used by the others."""
    servers, quota, counts = [shared(where) for _ in range(3)], Quota(requests=per_minute), list[int]()
    started = time.monotonic()

    def ask(quotas: SharedQuotas) -> None:
        counts.append(admitted(quotas, quota, per_minute))

    threads = [threading.Thread(target=ask, args=[each]) for each in servers]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for each in servers:
        each.turn(last=True)
    counts.append(admitted(servers[0], quota, per_minute))
    refilled = (time.monotonic() - started) * per_minute / 60
    assert per_minute <= sum(counts) <= per_minute + refilled + 1


def test_a_busy_token_asks_the_catalog_only_when_what_it_took_is_used_up(where, monkeypatch) -> None:
    quotas, taken = shared(where), list[int]()
    take = Budgets.take

    def count(*each: Any) -> tuple[int, float]:
        found = take(*each)
        taken.append(found[0])
        return found

    monkeypatch.setattr(Budgets, "take", count)
    assert admitted(quotas, Quota(requests=6400), 1000) == 1000
    assert 1 < len(taken) < 20
    assert sum(taken[:-1]) < 1000 <= sum(taken)


def test_tokens_of_answers_are_charged_to_all_servers(where) -> None:
    one, other, quota = shared(where), shared(where), Quota(tokens=100)
    assert one.admit("t", "token t", quota)
    assert other.admit("t", "token t", quota)
    one.charge("t", quota, 150)
    one.turn()
    other.charge("t", quota, 1)
    other.turn()
    with pytest.raises(QuotaSpent, match="100 tokens a minute"):
        other.admit("t", "token t", quota)


def test_without_its_catalog_a_server_counts_alone_and_says_so(where, monkeypatch) -> None:
    said: list[str] = []
    quotas = SharedQuotas(
        time.monotonic, Budgets(Store(where).database(make=True)), lambda error: said.append(str(error))
    )

    def fail(*_: object) -> None:
        raise StoreError("the server is silent")

    monkeypatch.setattr(Budgets, "take", fail)
    assert admitted(quotas, Quota(requests=5), 9) == 5
    assert said == ["the server is silent"]


def test_a_session_opened_at_one_server_is_one_of_all_and_ends_at_all(two, where) -> None:
    _, secret = Workspace(where).tokens.create("ann", ["admin"])
    one, other = (each.client() for each in two)
    for each in two:
        each.view.refresh()
    form = one.get("/sign-in").text.partition('name="form_token" value="')[2].partition('"')[0]
    same = {"origin": two[0].url}
    assert one.post("/sign-in", data={"token": secret, "form_token": form}, headers=same).status_code == 303
    session = one.cookies[SESSION_COOKIE]
    cookie = {"cookie": f"{SESSION_COOKIE}={session}"}
    page = other.get("/adapters", headers=cookie)
    assert page.status_code == 200
    form = page.text.partition('name="form_token" value="')[2].partition('"')[0]
    assert form, "a form of one server can be sent to another"
    out = other.post("/sign-out", data={"form_token": form}, headers=cookie | {"origin": two[1].url})
    assert out.status_code == 303
    until(lambda: one.get("/adapters", headers=cookie).status_code != 200)
    assert other.get("/adapters", headers=cookie | {"cookie": f"{SESSION_COOKIE}=unknown"}).status_code in (303, 401)


def test_one_server_does_the_work_of_the_guards_and_another_takes_over(two, where) -> None:
    until(lambda: sum("turret_leads_guards" in line and line.endswith(" 1.0") for line in metrics(two)) == 1)
    first = next(each for each in two if each.served.replica.leads)
    other = next(each for each in two if each is not first)
    first.served.replica._guards.close()
    assert other.served.replica.lead()
    assert not first.served.replica.lead()


def metrics(servers: list[Running]) -> list[str]:
    token = Workspace(servers[0].workspace.store.location).tokens
    _, secret = token.create(f"reader-{time.monotonic_ns()}", ["admin"])
    for each in servers:
        each.view.refresh()
    return [line for each in servers for line in each.client(secret).get("/metrics").text.splitlines()]


def test_a_server_knows_by_one_look_which_tenants_changed_what(where, tmp_path) -> None:
    store, now = Store(where), [0.0]
    database = store.database(make=True)
    newest = NewestActions(database, lambda: now[0])
    subjects = [("tokens", None), ("tokens", "one"), ("tokens", "other"), ("aliases", "one"), ("experiments", "one")]

    def changed(act: Callable[[], object]) -> list[int]:
        before = [newest.mark(*each) for each in subjects]
        act()
        assert [newest.mark(*each) for each in subjects] == before, "it has looked again at once"
        now[0] += 2 * LOOK_SECONDS
        after = [newest.mark(*each) for each in subjects]
        return [place for place, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]

    one = Workspace(where).with_access(Access("one"))
    assert changed(lambda: one.tokens.create("first")) == [0, 1, 2, 3, 4], "nothing was known before the first row"
    assert changed(lambda: None) == []
    assert changed(lambda: one.tokens.create("t")) == [0, 1]
    assert changed(lambda: one.tokens.revoke("t")) == [0, 1]
    assert changed(lambda: Workspace(where).tokens.create("another")) == [0]
    one.store.put("a", write_bundle(tmp_path, tensors(1)))
    assert changed(lambda: one.promote("a@1", "production")) == [3]
    one.store.put("a", write_bundle(tmp_path, tensors(2)))
    assert changed(lambda: one.experiment("a").start(["a@2"], unit="request")) == [4]

    def restore() -> None:
        """As an older copy of the catalog has it, and with one more action since."""
        how = "audit_keeps ON audit" if "://" in where else "audit_keeps_delete"
        with database.writing() as connection:
            connection.exec_driver_sql(f"DROP TRIGGER {how}")
            connection.exec_driver_sql("DELETE FROM audit WHERE id > 1")

    assert changed(restore) == [0, 1, 2, 3, 4]
    assert changed(lambda: one.tokens.create("again")) == [0, 1]


def test_without_its_catalog_a_server_asks_for_changes_no_more_often_than_before(where, monkeypatch) -> None:
    database, now, looks = Store(where).database(make=True), [0.0], []
    newest = NewestActions(database, lambda: now[0])
    newest.mark("tokens")

    def away() -> object:
        looks.append(now[0])
        raise StoreError("the server is away")

    monkeypatch.setattr(database, "reading", away)
    now[0] += 2 * LOOK_SECONDS
    for tenant in range(1000):
        with pytest.raises(StoreError, match="away"):
            newest.mark("aliases", f"tenant{tenant}")
    assert looks == [2 * LOOK_SECONDS]
    monkeypatch.undo()
    now[0] += 2 * LOOK_SECONDS
    assert newest.mark("aliases", "tenant1") is not None


def test_metrics_carry_the_name_of_the_server(two) -> None:
    lines = [line for line in metrics(two) if not line.startswith("#")]
    assert lines
    assert all('replica="one"' in line or 'replica="two"' in line for line in lines)
    alone = Metrics(dict)
    alone.request("/x", 200, 0.1)
    assert 'turret_requests_total{route="/x",status="200"} 1.0' in alone.text().decode()


def test_a_leader_that_was_replaced_stops(where) -> None:
    database = Store(where).database(make=True)
    one, other, now = Leader(database, "work", lambda: now[0]), Leader(database, "work"), [0.0]
    assert one.lead()
    assert not other.lead()
    from sqlalchemy import update

    from turret.store import leases

    with database.writing() as connection:
        connection.execute(update(leases.leases).values(until=1.0))
    assert other.lead()
    now[0] = 1e6  # it renews
    assert not one.lead()
    assert other.lead()


# --- the client -------------------------------------------------------------------------------------------------------


class Counting:
    """A server that answers each request with the next status, and counts them."""

    def __init__(self, *statuses: int, retry_after: str = "0.1", code: str = "draining") -> None:
        counting, self.requests = self, list[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", "0")))
                counting.requests.append(self.command)
                status = statuses[min(len(counting.requests), len(statuses)) - 1]
                if status == 0:
                    self.close_connection = True
                    return
                error = {"message": "no", "type": "x", "param": None, "code": code}
                body = json.dumps({"error": error, "data": [], "outcomes": []}).encode()
                self.send_response(status)
                self.send_header("retry-after", retry_after)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def ask(urls: str | list[str], post: bool = False, **settings: float) -> list[dict]:
    async def talk() -> list[dict]:
        async with AsyncClient(urls, **settings) as client:  # type: ignore[arg-type]
            return await (client.outcomes([]) if post else client.models())

    return asyncio.run(talk())


def test_a_client_of_two_servers_goes_to_the_one_that_answers(two, where) -> None:
    _, secret = Workspace(where).tokens.create("client", ["infer", "admin"])
    two[0].view.refresh()
    two[1].view.refresh()

    async def talk() -> None:
        async with AsyncClient(["http://127.0.0.1:9", *(each.url for each in two)], secret) as client:
            assert (await client.classify("x", "a")).receipt.version == "a@1"
            two[0].server.drain()
            until(lambda: two[0].ended)
            assert (await client.classify("x", "a")).receipt.version == "a@1"
            assert [piece async for piece in client.stream("x", "a")]

    asyncio.run(talk())


@pytest.mark.slow
@pytest.mark.parametrize("post", [False, True])
def test_what_no_server_has_begun_is_sent_again_after_the_time_that_it_asks_for(post) -> None:
    with Counting(503, 503, 200, retry_after="0.2") as server:
        started = time.monotonic()
        assert ask(server.url, post) == []
        assert time.monotonic() - started >= 0.4
        assert len(server.requests) == 3
    with Counting(503) as server, pytest.raises(Draining):
        ask(server.url, post)
    assert len(server.requests) == 3, "two times more, and no longer"
    with Counting(429, retry_after="60", code="quota_spent") as server, pytest.raises(QuotaSpent) as spent:
        ask(server.url, post)
    assert (len(server.requests), spent.value.retry_after) == (1, 60)


@pytest.mark.parametrize(("status", "code"), [(503, "store_error"), (500, "internal_error"), (0, "")])
def test_a_write_that_may_have_begun_is_never_sent_again(status, code) -> None:
    with Counting(status, 200, code=code) as server, pytest.raises(TurretError):
        ask(server.url, post=True)
    assert server.requests == ["POST"]


@pytest.mark.parametrize("status", [503, 0])
def test_a_read_is_sent_again_after_an_outage(status) -> None:
    with Counting(status, 200, code="store_error") as server:
        assert ask(server.url) == []
    assert server.requests == ["GET", "GET"]


def test_a_mistake_is_not_sent_again() -> None:
    with Counting(404, code="not_found") as server, pytest.raises(NotFound):
        ask([server.url, server.url])
    assert server.requests == ["GET"]
