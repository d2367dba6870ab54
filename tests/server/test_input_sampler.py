"""Samples of live texts: drawn at random, embedded after all requests, kept, and compared with a promise's examples."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import small_models
from server.echo import FINGERPRINT, Echo, SamplingParams
from server.patience import until
from server.test_alarms import Receiver
from server.test_promises import TERMS, TEXTS, classify, promised

from turret import audit
from turret.data import TextPair
from turret.errors import AdapterError, Busy
from turret.experiments.input_drift import pack_vectors
from turret.server import live_promises, services
from turret.server.engines import Engines
from turret.server.live_promises import AlarmSettings, InputSampler
from turret.server.logs import Log
from turret.store import promises
from turret.store.promises import Promise
from turret.workspace import Workspace

NEAR = np.random.default_rng(0).normal(size=(60, 8))
NEAR /= np.linalg.norm(NEAR, axis=1)[:, None]
FAR = np.abs(NEAR)  # all in one corner


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_promises, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(services, "INPUT_SECONDS", 0.01)
    monkeypatch.setattr(services, "GUARD_SECONDS", 0.2)


def watched(workspace: Workspace, version: Any, vectors: Any = FAR) -> Promise:
    """A promise whose examples have these embeddings. The echo's are about as those of NEAR."""
    with workspace.store.database().writing() as connection:
        return promises.make(connection, version, TERMS, inputs=pack_vectors(vectors))


def kept(workspace: Workspace, promise: Promise) -> int:
    with workspace.store.database().reading() as connection:
        watch = promises.watch_of(connection, promise.id)
        return 0 if watch is None else promises.rows_of(connection, watch)


def echo(workspace: Workspace, **settings: Any) -> Echo:
    return Echo(workspace.store, tokenizer=small_models.tokenizer("bert"), **settings)


@pytest.mark.slow
def test_texts_that_are_unlike_the_examples_warn_and_change_nothing(workspace, put, serve) -> None:
    version, receiver = put("a"), Receiver()
    promise = watched(workspace, version)
    running = serve(echo(workspace), alarm=AlarmSettings(receiver.url))
    client, numbers = running.client(), iter(range(100_000))

    def drifted() -> bool:
        classify(client, f"text number {next(numbers)}")
        return 'turret_promise_inputs_drifted{adapter="a@1"} 1.0' in client.get("/metrics").text

    until(drifted, 60)
    status = workspace.promise("a")
    assert (status.inputs.state, status.promise, status.standing.state) == ("drifted", promise, "cannot be known")
    assert status.inputs.why.startswith("have drifted since 20")
    assert status.as_json()["inputs"]["evidence"] >= 40
    assert 5 < status.inputs.texts <= 60
    page = client.get("/adapters/a/1").text
    assert "have drifted since" in page
    with workspace.store.database().reading() as connection:
        assert [each.verb for each in audit.read_actions(connection)].count("promise drift") == 1
    until(lambda: receiver.got, 20)
    (told, _, _), *more = receiver.got
    assert (told["kind"], told["version"], told["did"], more) == ("promise drift", "a@1", "nothing but this alarm", [])
    assert "unlike the examples that its promise was chosen on" in told["why"]
    assert [each["done"] for each in running.log() if each["event"] == "promise"] == [told["why"]]
    assert classify(client, TEXTS).json()["data"][0]["abstain"] is not None, "the promise is in force"
    receiver.close()


@pytest.mark.slow
def test_texts_that_are_like_the_examples_warn_of_nothing_and_new_rounds_begin(workspace, put, serve) -> None:
    promise = watched(workspace, put("a"), NEAR)
    running = serve(echo(workspace))
    client, numbers = running.client(), iter(range(100_000))

    def second_round() -> bool:
        classify(client, f"text number {next(numbers)}")
        return workspace.promise("a").inputs.round == 2

    until(second_round, 60)
    status = workspace.promise("a").inputs
    assert (status.state, status.needed) == ("alike so far", pytest.approx(120))
    assert status.texts >= 60
    assert status.why == f"like the held-out ones so far, {status.texts} texts seen"
    assert kept(workspace, promise) <= 120
    assert 'turret_promise_inputs_drifted{adapter="a@1"} 0.0' in client.get("/metrics").text


def test_two_servers_feed_one_test(workspace, put, serve) -> None:
    promise = watched(workspace, put("a"), NEAR)
    running = [serve(echo(workspace)) for _ in range(2)]
    for place, client in enumerate(each.client() for each in running):
        until(lambda place=place, client=client: _more(workspace, promise, client, place))
    assert workspace.promise("a").inputs.texts >= 6


def _more(workspace: Workspace, promise: Promise, client: Any, place: int) -> bool:
    classify(client, f"{place} {time.monotonic()}")
    return kept(workspace, promise) >= 3 * (place + 1)


def test_a_server_with_no_watch_inputs_keeps_nothing(workspace, put, serve) -> None:
    promise = watched(workspace, put("a"))
    running = serve(echo(workspace), watch_inputs=False)
    for number in range(20):
        classify(running.client(), f"text {number}")
    time.sleep(0.3)
    assert kept(workspace, promise) == 0


def test_a_promise_without_embeddings_is_not_watched(workspace, put, serve) -> None:
    promised(workspace, put("a"))
    running = serve()  # its echo has no tokenizer, so an embedding would fail
    classify(running.client(), TEXTS)
    time.sleep(0.2)
    assert workspace.promise("a").inputs.state == "not watched"
    assert "not watched: no embeddings of its examples are kept" in running.client().get("/adapters/a/1").text
    assert "turret_promise_inputs_drifted{" not in running.client().get("/metrics").text


# --- the sampler alone ------------------------------------------------------------------------------------------------


class Offers:
    """A sampler over an echo, whose turns are made by hand."""

    def __init__(self, workspace: Workspace, promise: Promise, engine: Echo, seconds: float = 0.0) -> None:
        self.now, self.engine, self.lines, self.promise = 0.0, engine, [], promise
        log = Log()
        log.write = lambda event, level="info", **fields: self.lines.append(fields)  # type: ignore[method-assign]
        database = workspace.store.database()
        clock = lambda: self.now
        self.sampler = InputSampler(database, Engines(engine), SamplingParams, "", log, clock, seconds)

    def offer(self, *inputs: Any) -> None:
        self.sampler.offer(self.promise.id, FINGERPRINT, inputs)


@pytest.mark.slow
def test_one_text_of_each_few_seconds_is_drawn_whatever_the_requests(workspace, put) -> None:
    promise = watched(workspace, put("a"), np.tile(NEAR, (20, 1)))
    offers, drawn = Offers(workspace, promise, echo(workspace), 5.0), Counter[str]()
    offers.sampler._keep = lambda promise_id, base, text: drawn.update([text])  # type: ignore[method-assign]
    for _ in range(1200):
        offers.offer("alone")
        offers.offer(*(f"t{number}" for number in range(4)), TextPair("a", "b"))
        offers.sampler.turn()
        offers.now += 5
        offers.sampler.turn()
    assert drawn.total() == 1200
    assert set(drawn) == {"alone", "t0", "t1", "t2", "t3", "a | b"}
    assert all(140 <= count <= 260 for count in drawn.values()), "each text is as likely, 200 times"


def test_nothing_is_embedded_while_requests_wait_and_a_full_queue_is_no_error(workspace, put) -> None:
    promise = watched(workspace, put("a"))
    offers = Offers(workspace, promise, echo(workspace, pace=60))
    offers.engine.submit("classify", "one", "a@1").result()
    offers.engine.submit("classify", "two", "a@1")  # waits: the echo pauses after each step
    offers.offer("sampled")
    offers.sampler.turn()
    assert kept(workspace, promise) == 0
    assert offers.engine.priorities == [0, 0]
    idle = Offers(workspace, promise, echo(workspace))
    idle.offer("sampled")
    idle.sampler.turn()
    assert kept(workspace, promise) == 1, "the control"
    assert idle.engine.priorities == [live_promises.LOWEST_PRIORITY]
    idle.engine.waiting = 0
    idle.offer("refused")
    idle.sampler.turn()
    with pytest.raises(Busy):
        idle.engine.submit("classify", "x", "a@1")
    assert (kept(workspace, promise), idle.lines) == (1, [])


def test_a_base_that_cannot_embed_is_said_once(workspace, put) -> None:
    promise = watched(workspace, put("a"))
    offers = Offers(workspace, promise, echo(workspace))

    def refuse(*words: Any, **named: Any) -> Any:
        raise AdapterError("this base embeds nothing")

    offers.engine.submit = refuse  # type: ignore[method-assign]
    for _ in range(3):
        offers.offer("text")
        offers.sampler.turn()
    (line,) = offers.lines
    assert line["message"] == "input drift is not watched: this base embeds nothing"


def test_token_ids_are_no_text_and_are_left_out(workspace, put) -> None:
    promise = watched(workspace, put("a"))
    offers = Offers(workspace, promise, echo(workspace))
    offers.offer([1, 2, 3])
    offers.sampler.turn()
    assert kept(workspace, promise) == 0


def test_requests_do_not_wait_for_an_embedding(workspace, put, serve) -> None:
    watched(workspace, put("a"))
    engine, slow = echo(workspace), threading.Event()
    submit = engine.submit

    def delayed(kind: str, *words: Any, **named: Any) -> Any:
        if kind == "embed":
            slow.wait(5)
        return submit(kind, *words, **named)

    engine.submit = delayed  # type: ignore[method-assign]
    running = serve(engine)
    started = time.monotonic()
    for number in range(30):
        classify(running.client(), f"text {number}")
    assert time.monotonic() - started < 4
    slow.set()
