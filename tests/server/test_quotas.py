"""Quotas are token buckets: no pattern of requests gets more than the rate. The tests pass in the clock."""

from __future__ import annotations

import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st
from server import walk

from turret.errors import QuotaSpent
from turret.server import limits as module
from turret.server.app import routes as application
from turret.server.limits import Quota, Quotas
from turret.store import usage


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_quota_of_requests_is_given_at_once_and_then_a_piece_at_a_time() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    for _ in range(6):
        quotas.admit("t", "token t", Quota(requests=6))
    with pytest.raises(
        QuotaSpent, match=r"the quota of token t is spent: 6 requests a minute; try again in 10 s"
    ) as said:
        quotas.admit("t", "token t", Quota(requests=6))
    assert said.value.retry_after == pytest.approx(10)
    clock.now += said.value.retry_after
    quotas.admit("t", "token t", Quota(requests=6))
    quotas.admit("other", "token other", Quota(requests=6))


def test_a_wait_of_less_than_a_second_is_a_wait_too() -> None:
    clock = Clock()
    quotas, quota = Quotas(clock), Quota(requests=600)
    for _ in range(600):
        quotas.admit("t", "t", quota)
    with pytest.raises(QuotaSpent) as said:
        quotas.admit("t", "t", quota)
    assert said.value.retry_after == pytest.approx(0.1)


def test_a_request_that_is_given_back_can_be_asked_again_and_no_more() -> None:
    quotas, quota = Quotas(Clock()), Quota(requests=2)
    quotas.give_back("t")  # nothing was taken
    quotas.admit("t", "t", quota)
    for _ in range(3):
        quotas.give_back("t")
    for _ in range(2):
        quotas.admit("t", "t", quota)
    with pytest.raises(QuotaSpent):
        quotas.admit("t", "t", quota)


def test_tokens_are_charged_when_they_are_known_and_the_debt_is_waited_for() -> None:
    clock = Clock()
    quotas, quota = Quotas(clock), Quota(tokens=60)
    quotas.admit("t", "t", quota)
    quotas.charge("t", quota, 100)
    with pytest.raises(QuotaSpent, match="60 tokens a minute") as said:
        quotas.admit("t", "t", quota)
    assert said.value.retry_after == pytest.approx(41)
    clock.now += 41
    quotas.admit("t", "t", quota)


def test_a_refused_request_takes_nothing() -> None:
    clock = Clock()
    quotas, quota = Quotas(clock), Quota(requests=2, tokens=10)
    quotas.admit("t", "t", quota)
    quotas.charge("t", quota, 10)
    for _ in range(5):
        with pytest.raises(QuotaSpent):
            quotas.admit("t", "t", quota)
    clock.now += 6  # one token, and 0.2 requests more than the one that is left
    quotas.admit("t", "t", quota)
    with pytest.raises(QuotaSpent, match="2 requests a minute"):
        quotas.admit("t", "t", quota)


def test_without_a_quota_nothing_is_kept() -> None:
    quotas = Quotas(Clock())
    for number in range(100):
        quotas.admit(f"t{number}", "t", Quota())
        quotas.charge(f"t{number}", Quota(), 1000)
    assert len(quotas._buckets) == 0


def test_what_is_full_again_is_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 10)
    clock = Clock()
    quotas = Quotas(clock)
    for number in range(100):
        clock.now += 60
        quotas.admit(f"t{number}", "t", Quota(requests=1))
    assert len(quotas._buckets) <= 11


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_never_more_than_the_quota_and_what_filled_up_meanwhile(pauses, quota) -> None:
    clock = Clock()
    quotas, admitted, waits = Quotas(clock), 0, []
    for pause in pauses:
        clock.now += pause
        try:
            quotas.admit("t", "t", Quota(requests=quota))
            admitted += 1
        except QuotaSpent as error:
            waits.append(error.retry_after)
    assert all(0 < wait <= 60 / quota + 1e-6 for wait in waits)
    assert admitted <= quota + clock.now * quota / 60 + 1e-6


def test_over_http_a_spent_quota_is_429_and_others_go_on(serve, put, workspace) -> None:
    put()
    put("b")
    _, few = workspace.tokens.create("few", requests_per_minute=2)
    _, many = workspace.tokens.create("many")
    running = serve(per_adapter=Quota(tokens=50))
    body = {"model": "a", "input": "x"}
    assert [running.client(few).post("/v1/classify", json=body).status_code for _ in range(3)] == [200, 200, 429]
    client = running.client(many)
    got = running.client(few).post("/v1/classify", json=body)
    assert got.json()["error"]["code"] == "quota_spent"
    assert 1 <= int(got.headers["retry-after"]) <= 30
    assert client.post("/v1/classify", json=body | {"input": ["x"] * 60}).status_code == 200
    assert client.post("/v1/classify", json=body).status_code == 429  # the quota of adapter a
    assert client.post("/v1/classify", json=body | {"model": "b"}).status_code == 200


def test_of_a_text_that_is_cut_a_token_is_charged_for_every_64_characters_sent(serve, put, workspace) -> None:
    put()
    _, secret = workspace.tokens.create("some", tokens_per_minute=1000)
    running = serve()
    client, body = running.client(secret), {"model": "a", "prompt": "x" * 640_000, "max_tokens": 1}
    assert client.post("/v1/completions", json=body).status_code == 200
    got = client.post("/v1/completions", json=body | {"prompt": "x"})
    assert (got.status_code, got.json()["error"]["code"]) == (429, "quota_spent")


# Routes that work for a token with the scope infer, and ask no quota themselves, each with its reason.
FREE = {
    "/v1/files": "its bytes count against the space of its owner",
    "/v1/batches": "each of its lines is a request",
    "/v1/batches/{batch_id}/cancel": "ends work",
    "/api/outcomes": "a row of an experiment, with limits of its own",
}


CHOICE = {"name": "q", "type": "choice", "instructions": "?", "choices": [{"value": "bad"}, {"value": "good"}]}
ASKED = {  # bodies that an adapter answers, where the smallest one that the schema allows is for a panel or a base
    "/v1/decisions": {"model": "a", "input": "x", "questions": [CHOICE]},
    "/v1/systemone": {
        "model": "a", "state": "x", "questions": {"q": {"type": "choice", "criteria": {"bad": None, "good": None}}}
    },
}  # fmt: skip


@pytest.mark.slow
def test_every_route_that_works_for_a_token_takes_from_its_quota_and_is_counted_once(serve, put, workspace) -> None:
    """The walk over the schema finds a new route; `FREE` says why one is not counted."""
    put()
    running = serve(tokenizer=small_models.tokenizer("qwen3"))
    named = dict.fromkeys(walk.NAMES, "x") | {"model": "echo", "adapter": "a", "name": "a", "reference": "a@1"}
    named |= {"candidates": ["a@1"], "control": "a@1", "shadows": ["a@1"], "comparison": "comparisons/a-0123456789"}
    routes = {each.route: each for each in walk.asks(application(running.served), named) if each.method == "POST"}
    counted = []
    for number, (route, ask) in enumerate(sorted(routes.items())):
        if ask.page:
            continue
        _, secret = workspace.tokens.create(f"once{number}", scopes=("infer",), requests_per_minute=1)
        running.view.refresh()
        client, model = running.client(secret), "a" if "classify" in route else "echo"
        body = ask.body | {"model": model} if isinstance(ask.body, dict) and "model" in ask.body else ask.body
        body = ASKED.get(route, body)
        before = requests(running)
        statuses = [client.post(ask.path, json=body).status_code for _ in range(2)]
        if 403 in statuses or 404 in statuses or route in FREE:
            continue
        assert statuses == [200, 429], (route, statuses, client.post(ask.path, json=body).text)
        assert requests(running) == before + 1, route
        counted.append(route)
    expected = {"/tokenize", "/detokenize", "/v1/completions", "/v1/classify", "/v1/chat/completions", *ASKED}
    assert expected <= set(counted)


def requests(running) -> int:
    """All requests that usage has counted."""
    running.served.usage.flush()
    return sum(each.requests for each in usage.read_usage(running.workspace.store.database()))
