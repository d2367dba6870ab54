"""Parts of trainings run in the engine's thread, in turn, and leave answers their share of the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from shelf import Shelf

from turret.engine.core import Engine
from turret.engine.request import Limits
from turret.engine.scheduler import Part, TrainingTurns, between_passes
from turret.errors import DataError, Draining
from turret.workspace.resident import PassThread


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Shelf("llama", "generate").engine() as engine:
        yield engine


def part() -> Part:
    return Part(lambda: None)


@pytest.mark.parametrize(("share", "owed"), [(0.5, 2.0), (0.8, 0.5), (0.2, 8.0), (1.0, 0.0)])
def test_answers_that_wait_get_the_rest_of_the_time(share: float, owed: float) -> None:
    turns = TrainingTurns(share)
    turns.put("", part())
    turns.charge_training(2.0)
    if owed:
        assert turns.take(answers_wait=True) is None
        turns.credit_answers(owed * 0.99)
        assert turns.take(answers_wait=True) is None
        turns.credit_answers(owed * 0.02)
    assert turns.take(answers_wait=True) is not None


def test_nothing_is_owed_to_answers_that_do_not_wait() -> None:
    turns = TrainingTurns(0.1)
    turns.put("", part())
    turns.charge_training(60.0)
    assert turns.take(answers_wait=False) is not None
    assert not turns.owes


def test_the_tenant_that_was_given_least_goes_next() -> None:
    turns, order = TrainingTurns(1.0), []
    for tenant in ("a", "a", "a", "b"):
        turns.put(tenant, part())
    while (taken := turns.take(answers_wait=False)) is not None:
        order.append(taken[0])
        turns.end_part(taken[0], 1.0)
    assert order == ["a", "b", "a", "a"]


def test_a_part_runs_with_gradients_in_the_engines_thread(engine: Engine) -> None:
    def work() -> tuple[str, bool, bool]:
        weight = torch.ones(2, requires_grad=True)
        torch.autograd.backward((weight * 2).sum())
        between_passes()
        return threading.current_thread().name, weight.grad is not None, weight.is_inference()

    assert engine.run(work) == ("turret-engine", True, False)
    assert engine.run(lambda: engine.run(work)) == ("turret-engine", True, False)  # a part that has parts
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda: 1 // 0)
    assert engine.run(lambda: 5) == 5  # the error was the part's own


@pytest.mark.slow
def test_an_answer_waits_for_a_pass_of_a_training_not_for_a_step(engine: Engine) -> None:
    """Control: a part that never calls `between_passes` keeps the answer waiting to its end."""

    def passes_until_an_answer(pauses: bool) -> int:
        begun, passes = threading.Event(), 0

        def step() -> None:
            nonlocal passes
            begun.set()
            for _ in range(20):
                time.sleep(0.05)
                passes += 1
                if pauses:
                    between_passes()

        thread = threading.Thread(target=lambda: engine.run(step))
        thread.start()
        begun.wait()
        engine.generate(["a dull story"])
        answered = passes
        thread.join()
        return answered

    engine.generate(["a dull story"])  # warm
    assert passes_until_an_answer(pauses=False) == 20
    assert passes_until_an_answer(pauses=True) < 20


def test_parts_that_wait_end_when_the_engine_does(engine: Engine) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def first() -> str:
        begun.set()
        go_on.wait(30)
        return "done"

    results: dict[str, object] = {}

    def run(name: str, work: object) -> None:
        try:
            results[name] = engine.run(work)  # type: ignore[arg-type]
        except Draining as error:
            results[name] = error

    threads = [threading.Thread(target=run, args=[name, work]) for name, work in (("a", first), ("b", lambda: 1))]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    time.sleep(0.1)
    closer = threading.Thread(target=engine.close)
    closer.start()
    time.sleep(0.1)
    go_on.set()
    for thread in (*threads, closer):
        thread.join(30)
    assert results["a"] == "done"
    assert isinstance(results["b"], Draining)
    with pytest.raises(Draining):
        engine.run(lambda: 1)


def test_a_thread_of_passes_runs_parts_in_turn_and_ends() -> None:
    thread = PassThread()
    assert thread.run(lambda: torch.is_grad_enabled()) is True
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 // 0)
    thread.close()
    with pytest.raises(Draining):
        thread.run(lambda: 1)


def test_the_share_of_trainings_is_a_percentage() -> None:
    assert Limits(train_percent=100).train_percent == 100
    for wrong in (0, 101):
        with pytest.raises(DataError, match="train_percent"):
            Limits(train_percent=wrong)
