"""The scheduler: no request starves, limits hold, turns are fair, priorities and deadlines count."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from turret.engine.request import Named, Receipt, Request, SamplingParams, Ticket
from turret.engine.scheduler import Scheduler
from turret.errors import Cancelled, DeadlineExceeded

_numbers = iter(range(1 << 30))


def request(adapter: str = "a", tokens: int = 10, kind: Any = "classify", **settings: Any) -> Request:
    named = Named(adapter, 1, f"sha256:{adapter}", 1) if adapter else None
    ticket = Ticket(Receipt(str(next(_numbers)), adapter or None, 1, None, "base"), lambda: None)
    return Request(kind, ticket, named, "text", SamplingParams(), tokens, settings.pop("arrived", 0.0), **settings)


def scheduler(**settings: Any) -> Scheduler:
    return Scheduler(**({"batch_tokens": 100, "running": 4, "cache_tokens": 1000} | settings))


REQUESTS = st.builds(
    lambda adapter, tokens, generates, priority, rows, cache: (
        request(
            adapter, tokens, "generate" if generates else "classify", priority=priority, rows=rows, cache_tokens=cache
        )
        if generates
        else request(adapter, tokens, priority=priority)
    ),
    st.sampled_from("abcde"),
    st.integers(1, 400),
    st.booleans(),
    st.integers(-1, 2),
    st.integers(1, 4),
    st.integers(1, 1000),
)


@settings(deadline=None)
@given(st.lists(st.lists(REQUESTS, max_size=4), max_size=12), st.integers(1, 5), st.randoms())
def test_every_request_is_served_once_within_the_limits(arrivals: Any, steps: int, random: Any) -> None:
    plan = scheduler()
    waiting = [each for group in arrivals for each in group]
    pending, served, running = list(arrivals), [], []
    for _ in range(20 * len(waiting) + 20):
        if pending:
            for each in pending.pop(0):
                plan.add(each)
        rows = plan.rows
        chosen = plan.next()
        served += chosen
        fresh = sum(each.tokens for each in chosen)
        assert len(chosen) <= 1 or fresh + rows <= plan.batch_tokens
        running += [[each, steps] for each in chosen if each.kind == "generate"]
        assert plan.rows == sum(each.rows for each, _ in running) <= plan.running
        assert plan.held_tokens == sum(each.cache_tokens for each, _ in running) <= plan.cache_tokens
        for entry in running:
            entry[1] -= 1
        for entry in [entry for entry in running if entry[1] < 1]:
            running.remove(entry)
            plan.free_request(entry[0])
    assert sorted(map(id, served)) == sorted(map(id, waiting))
    assert len(plan) == plan.rows == plan.held_tokens == 0


def test_an_adapter_that_floods_the_queue_does_not_keep_another_waiting() -> None:
    plan = scheduler(quantum=50)
    for _ in range(200):
        plan.add(request("flood", 20))
    plan.add(request("small", 20))
    assert any(each.named and each.named.name == "small" for each in plan.next())


@given(st.lists(st.integers(1, 60), min_size=2, max_size=5), st.integers(5, 40))
@settings(deadline=None)
def test_adapters_that_always_wait_get_equal_tokens(sizes: list[int], passes: int) -> None:
    plan, got = scheduler(quantum=50, patience=1000), [0] * len(sizes)
    sent: list[int] = []
    for passes_gone in range(passes):
        for index, size in enumerate(sizes):
            for _ in range(120 // size + 1 if not passes_gone else sent[index]):
                plan.add(request(str(index), size))
        sent = [0] * len(sizes)
        for each in plan.next():
            got[int(each.flow[7:])] += each.tokens
            sent[int(each.flow[7:])] += 1
    assert max(got) - min(got) <= plan.quantum + max(sizes)


def test_a_higher_priority_goes_first() -> None:
    plan = scheduler()
    low, high = request("a", 80), request("b", 80, priority=1)
    plan.add(low)
    plan.add(high)
    assert plan.next() == [high]
    assert plan.next() == [low]


def test_a_low_priority_is_served_eventually() -> None:
    plan = scheduler(patience=5)
    low = request("a", 80)
    plan.add(low)
    for count in range(1, 10):
        plan.add(request("b", 80, priority=9))
        if low in plan.next():
            assert count == 6
            return
    raise AssertionError("never served")


def test_a_large_request_gets_its_cache_although_small_ones_keep_coming() -> None:
    plan, running = scheduler(patience=5), []
    large = request("large", 10, "generate", cache_tokens=1000)
    plan.add(request("small", 1, "generate", cache_tokens=400))
    running += plan.next()
    plan.add(large)
    for _ in range(30):
        plan.add(request("small", 1, "generate", cache_tokens=400))
        chosen = plan.next()
        if large in chosen:
            return
        running += chosen
        if len(running) > 1 or not chosen:
            plan.free_request(running.pop(0))
    raise AssertionError("never served")


def test_rows_that_generate_take_tokens_of_a_pass_before_others_begin() -> None:
    plan = scheduler(batch_tokens=10, running=8)
    for _ in range(6):
        plan.add(request("a", 1, "generate", cache_tokens=1))
    assert len(plan.next()) == 6
    plan.add(request("b", 4))
    plan.add(request("b", 1))
    assert [each.tokens for each in plan.next()] == [4]


def test_a_removed_request_never_begins() -> None:
    plan = scheduler()
    first, second = request("a", 5), request("a", 6)
    plan.add(first)
    plan.add(second)
    plan.remove([first])
    assert list(plan.waiting()) == [second]
    assert plan.next() == [second]


def test_a_late_request_ends_with_deadline_exceeded() -> None:
    late = request("a", arrived=1.0, deadline=3.0)
    assert late.end_of_time(2.9) is None
    assert isinstance(late.end_of_time(3.0), DeadlineExceeded)
    late.cancelled = True
    assert isinstance(late.end_of_time(2.0), Cancelled)


# --- tenants ---------------------------------------------------------------------------------------------------------


def passes(plan: Scheduler, running: list[list[Any]], steps: int = 1 << 30) -> list[Request]:
    """One pass: what begins in it. A request that generates ends after so many."""
    chosen = plan.next()
    running += [[each, steps] for each in chosen if each.rows]
    for entry in list(running):
        entry[1] -= 1
        if entry[1] < 0:
            running.remove(entry)
            plan.free_request(entry[0])
    return chosen


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), REQUESTS), max_size=40), st.integers(0, 5))
def test_every_request_of_every_tenant_is_served_once_within_the_limits_and_their_spare_places(
    arrivals: Any, steps: int
) -> None:
    plan, running, served = scheduler(), [], []
    for tenant, each in arrivals:
        each.tenant = tenant
        plan.add(each)
    for _ in range(20 * len(arrivals) + 20):
        served += passes(plan, running, steps)
        held = [each for each, _ in running]
        assert plan.rows == sum(each.rows for each in held) <= plan.running + 1
        assert plan.held_tokens == sum(each.cache_tokens for each in held) <= plan.cache_tokens * 9 // 8
    assert sorted(map(id, served)) == sorted(id(each) for _, each in arrivals)
    assert len(plan) == plan.rows == plan.held_tokens == 0


def test_tenants_that_always_wait_get_equal_tokens_however_many_adapters_and_requests_they_have() -> None:
    plan = scheduler(batch_tokens=200)
    for number in range(2000):
        plan.add(request(f"many{number % 40}", 30, tenant="many"))
    for _ in range(400):
        plan.add(request("one", 70, tenant="one"))
    got = {"many": 0, "one": 0}
    for _ in range(100):
        for each in plan.next():
            got[each.tenant] += each.tokens
    assert abs(got["many"] - got["one"]) <= 2 * 70, got


def test_the_tokens_of_answers_count_too() -> None:
    plan, running = scheduler(running=8, cache_tokens=10_000), []
    for _ in range(8):
        plan.add(request("long", 10, "generate", tenant="writes", cache_tokens=10))
    passes(plan, running)
    for _ in range(100):
        plan.add(request("short", 10, tenant="writes"))
        plan.add(request("short", 10, tenant="reads"))
    got = [each.tenant for _ in range(15) for each in passes(plan, running)]
    assert 9 <= got.count("reads") - got.count("writes") <= 15, "8 rows take 8 tokens of each pass, a request has 10"


def test_a_tenant_that_floods_delays_anothers_request_by_one_pass_although_all_its_own_have_waited_too_long() -> None:
    plan = scheduler(patience=5)
    for number in range(3000):
        plan.add(request(f"flood{number % 20}", 50, tenant="flood"))
    for _ in range(20):
        plan.next()
    plan.add(request("b", 50, tenant="quiet"))
    assert "quiet" in [each.tenant for each in plan.next()]
    alone = scheduler(patience=5)  # the control: the same requests, as those of one tenant
    for number in range(3000):
        alone.add(request(f"flood{number % 20}", 50, tenant="flood"))
    for _ in range(20):
        alone.next()
    alone.add(request("b", 50, tenant="flood"))
    assert not any(each.flow == "sha256:b" for _ in range(5) for each in alone.next())


def test_a_tenant_that_holds_all_rows_and_the_whole_cache_keeps_no_other_from_beginning() -> None:
    plan, running = scheduler(running=64, cache_tokens=6400, patience=5), []
    for _ in range(200):
        plan.add(request("flood", 1, "generate", tenant="flood", cache_tokens=100))
    for _ in range(10):
        passes(plan, running)
    assert plan.rows == plan.running
    plan.add(request("b", 1, "generate", tenant="quiet", cache_tokens=100))
    assert [each.tenant for each in passes(plan, running)] == ["quiet"]
    plan.add(request("b", 1, "generate", tenant="flood", cache_tokens=100))
    assert not passes(plan, running), "the control: the tenant that holds them has no spare places"


def test_a_tenant_that_paused_has_saved_no_turns() -> None:
    plan = scheduler()
    for _ in range(200):
        plan.add(request("a", 50, tenant="works"))
    for _ in range(50):
        plan.next()
    for _ in range(20):
        plan.add(request("b", 50, tenant="comes"))
    got = [each.tenant for _ in range(10) for each in plan.next()]
    assert abs(got.count("comes") - got.count("works")) <= 1, got


def test_a_higher_priority_goes_before_the_turns_of_tenants() -> None:
    plan = scheduler()
    for _ in range(10):
        plan.add(request("a", 50, tenant="batch", priority=-1))
        plan.add(request("b", 50, tenant="asks"))
    assert {each.tenant for _ in range(5) for each in plan.next()} == {"asks"}
    assert {each.tenant for _ in range(5) for each in plan.next()} == {"batch"}


def test_answers_to_score_after_one_prompt_share_its_tokens_in_a_pass() -> None:
    """The prompt of 80 tokens is read once a pass, and each request has 10 tokens of its own."""

    def scored(ids: list[int]) -> Request:
        own = request("", 90, "generate")
        own.options, own.ids, own.rows = SamplingParams(scored=((1,) * 10,)), ids, 0
        return own

    turns = scheduler()
    same, other = [scored([1] * 80) for _ in range(3)], scored([2] * 80)
    for each in (*same, other):
        turns.add(each)
    assert turns.next() == same[:2]
    assert turns.next() == same[2:], "another prompt does not fit beside it"
    assert turns.next() == [other]
    plain = [request("", 90, "embed") for _ in range(2)]
    for each in plain:
        each.ids = [1] * 80
        turns.add(each)
    assert turns.next() == plain[:1]
