"""The engine's interface: which version answers, which requests fail, and that every ticket ends."""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import Any

import pytest
import torch
from adapters_at_hand import METHODS, made
from shelf import LABELS, TEXTS, Shelf, agree, reference

from turret.adapters import Adapter, BaseInfo
from turret.engine import Limits
from turret.errors import (
    AdapterError,
    BundleError,
    DataError,
    Draining,
    EngineError,
    NoRoom,
    NotFinite,
    NotFound,
    TurretError,
    WrongBase,
)
from turret.methods import Full

# --- which version answers --------------------------------------------------------------------------------------------


def test_answers_are_those_of_each_adapter_alone(shelf: Shelf) -> None:
    with shelf.engine() as engine:
        for name in "abcd":
            agree(engine.classify(TEXTS, name), reference(shelf, name, TEXTS))


def test_a_request_keeps_the_version_its_alias_named_at_submission(shelf: Shelf) -> None:
    shelf.aliases["live"] = "a@1"
    shelf.gate.clear()
    with shelf.engine() as engine:
        before = engine.submit("classify", TEXTS[0], "live")
        shelf.aliases["live"] = "c@1"
        after = engine.submit("classify", TEXTS[0], "live")
        shelf.gate.set()
        agree([before.result(30)], reference(shelf, "a", TEXTS[:1]))
        agree([after.result(30)], reference(shelf, "c", TEXTS[:1]))
    receipts = [before.receipt, after.receipt]
    assert [(each.name, each.number, each.digest) for each in receipts] == [
        ("a", 1, "sha256:a@1"),
        ("c", 1, "sha256:c@1"),
    ]
    assert receipts[0].base == "sha256:small"
    assert receipts[0].id != receipts[1].id


def test_a_reused_name_gets_no_answer_of_the_old_weights(shelf: Shelf) -> None:
    with shelf.engine() as engine:
        engine.classify(TEXTS, "a")
        shelf.adapters["a@2"] = shelf.adapters["b@1"]
        shelf.aliases["a"] = "a@2"
        agree(engine.classify(TEXTS, "a"), reference(shelf, "b", TEXTS))


def test_a_generator_of_a_base_classifies_as_its_classifier_does() -> None:
    for family in ("llama", "gpt2", "t5", "bart"):
        classifiers = Shelf(family)
        classifiers.put("c", "wide", 3, labels=4)
        generators = Shelf(family, "generate")
        generators.put("g", "lora", 2)
        generators.adapters |= classifiers.adapters
        with generators.engine() as engine:
            alone_first = engine.generate(["a great film"], "g")
            tickets = [engine.submit("classify", text, "c") for text in TEXTS]
            beside = engine.submit("generate", "a great film", "g")
            agree([ticket.result(30) for ticket in tickets], reference(classifiers, "c", TEXTS))
            assert beside.result(30) == alone_first[0]


def test_closing_restores_the_base(shelf: Shelf) -> None:
    base = shelf.base()
    modules = {name: id(each) for name, each in base.model.named_modules()}
    before = {name: each.clone() for name, each in base.model.state_dict().items()}
    with shelf.engine(base) as engine:
        engine.classify(TEXTS, "b")
    assert modules == {name: id(each) for name, each in base.model.named_modules()}
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_answered_are_refused_at_submission(shelf: Shelf) -> None:
    with shelf.engine(max_inputs=3, max_tokens=20) as engine:
        with pytest.raises(NotFound, match="no nobody"):
            engine.submit("classify", "x", "nobody")
        with pytest.raises(AdapterError, match="bare base has no head"):
            engine.submit("classify", "x", None)
        with pytest.raises(AdapterError, match="cannot generate"):
            engine.submit("generate", "x", None)
        with pytest.raises(DataError, match="kind 'guess'"):
            engine.submit("guess", "x", "a")  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"1 to 3 texts \(limit max_inputs\), given 4 texts"):
            engine.classify(TEXTS[:4], "a")
        with pytest.raises(DataError, match="given one text"):
            engine.classify("x", "a")
        with pytest.raises(DataError, match="has 24 tokens or more and this engine takes at most 20"):
            engine.submit("classify", [5] * 24, "a")
        engine.warm("a")
        with pytest.raises(AdapterError, match="cannot generate"):
            engine.submit("generate", "x", "a")
        assert engine.stats().waiting == 0
        assert engine.loaded()[0].requests == 0


def test_an_adapter_refuses_the_other_kind_of_request() -> None:
    shelf = Shelf("llama", "generate")
    shelf.put("g")
    with shelf.engine() as engine:
        ticket = engine.submit("classify", "x", "g")  # not loaded yet, so its ticket raises
        with pytest.raises(AdapterError, match="g@1 generates and was asked to classify: ask it to generate"):
            ticket.result(30)
        with pytest.raises(AdapterError, match="asked to classify"):
            engine.submit("classify", "x", "g")


@pytest.mark.parametrize(
    ("break_it", "error", "said"),
    [
        (lambda adapter: BundleError("torn"), BundleError, "torn"),
        (lambda adapter: OSError("disk"), AdapterError, r"bad@1 cannot be loaded \(OSError: disk\)"),
        (lambda a: Adapter(a.method, a.tensors, a.head, BaseInfo("x", "sha256:o"), a.task), WrongBase, "trained on"),
        (lambda a: Adapter(a.method, a.tensors, {}, a.base, a.task), AdapterError, "has no head classifier"),
        (lambda a: Adapter(a.method, a.tensors, a.head, a.base, {}), AdapterError, "stores no task"),
        (lambda a: Adapter(Full(), a.tensors, a.head, a.base, a.task), AdapterError, "export it merged"),
        (lambda a: Adapter(a.method, {k: v * torch.nan for k, v in a.tensors.items()}, a.head, a.base, a.task),
         AdapterError, "not finite"),
        (lambda a: Adapter(a.method, dict(list(a.tensors.items())[1:]), a.head, a.base, a.task), AdapterError, "needs"),
    ],
)  # fmt: skip
def test_a_load_that_fails_fails_its_own_requests_only(shelf: Shelf, break_it: Any, error: Any, said: str) -> None:
    broken = break_it(shelf.adapters["a@1"])
    (shelf.broken if isinstance(broken, BaseException) else shelf.adapters)["bad@1"] = broken
    with shelf.engine() as engine:
        good = [engine.submit("classify", text, "b") for text in TEXTS]
        bad = [engine.submit("classify", text, "bad") for text in TEXTS]
        for ticket in bad:
            with pytest.raises(error, match=said):
                ticket.result(30)
        agree([ticket.result(30) for ticket in good], reference(shelf, "b", TEXTS))
        with pytest.raises(error, match=said):
            engine.warm("bad")
        assert engine.stats().failed_loads == len(shelf.loads) - 1 >= 2
        assert [each.version for each in engine.loaded()] == ["b@1"]


def test_an_exception_in_a_pass_fails_its_requests_and_the_engine_continues() -> None:
    shelf = Shelf("llama", "generate")
    shelf.put("a")
    with shelf.engine() as engine:
        expected = engine.generate(["a great film"], "a")
        run, fails = engine._runner.run, iter([False, False, True])

        def sometimes(*work: Any) -> Any:
            if next(fails, False):
                raise RuntimeError("a bad day")
            return run(*work)

        engine._runner.run = sometimes  # type: ignore[method-assign]
        ticket = engine.submit("generate", "a great film", "a")
        with pytest.raises(EngineError, match=r"a pass failed \(RuntimeError: a bad day\)"):
            ticket.result(30)
        assert engine.generate(["a great film"], "a") == expected
        stats = engine.stats()
        assert (stats.running, stats.cache_tokens, stats.errors) == (0, 0, 1)
        assert len(engine._runner.cache) == 0


@pytest.mark.parametrize(
    ("error", "said", "logged"),
    [
        (ZeroDivisionError("my secret text"), "a pass failed", r"a pass of 1 requests failed \(ZeroDivisionError at "),
        (NoRoom("too large"), "^too large$", "^a pass of 1 requests failed: too large$"),
    ],
)
def test_a_failed_pass_is_one_line_of_the_log_and_a_traceback_only_for_debugging(
    error: Exception, said: str, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise error

    def lines(level: str) -> list[logging.LogRecord]:
        return [each for each in caplog.records if each.name == "turret.engine" and each.levelname == level]

    shelf = Shelf("bert")
    shelf.put("a")
    with shelf.engine() as engine, caplog.at_level(logging.DEBUG, "turret.engine"):
        engine.classify(["a great film"], "a")
        engine._runner.run = broken  # type: ignore[method-assign]
        with pytest.raises(TurretError, match=said):
            engine.classify(["a great film"], "a")
    (line,) = lines("ERROR")
    assert re.search(logged, line.getMessage())
    assert "\n" not in line.getMessage()
    assert "secret" not in line.getMessage()
    assert line.exc_info is None
    unexpected = isinstance(error, ZeroDivisionError)
    assert [each.exc_info is not None for each in lines("DEBUG")] == [True] * unexpected


@pytest.mark.parametrize("kind", ["classify", "generate"])
def test_logits_that_are_not_finite_fail_their_row_only(kind: Any) -> None:
    shelf = Shelf("llama", kind)
    shelf.put("good", "wide")
    adapter = shelf.put("huge", "wide", 2)
    tensors = {name: value * 1e30 for name, value in adapter.tensors.items()}  # finite, but their products are not
    shelf.adapters["huge@1"] = Adapter(adapter.method, tensors, adapter.head, adapter.base, adapter.task)
    with shelf.engine() as engine:
        engine.warm("good")
        engine.warm("huge")
        expected = [engine.submit(kind, text, "good").result(30) for text in TEXTS]
        tickets = [(engine.submit(kind, text, "good"), engine.submit(kind, text, "huge")) for text in TEXTS]
        for (good, huge), wanted in zip(tickets, expected, strict=True):
            with pytest.raises(NotFinite, match="huge@1 gave logits that are not finite"):
                huge.result(30)
            if kind == "classify":
                agree([good.result(30)], [wanted])
            else:
                assert good.result(30) == wanted
        assert len(engine._runner.cache) == 0


# --- the end ----------------------------------------------------------------------------------------------------------


def test_draining_finishes_open_requests_and_takes_no_new_ones(shelf: Shelf) -> None:
    with shelf.engine() as engine:
        tickets = [engine.submit("classify", text, name) for text in TEXTS for name in "abc"]
        assert engine.drain(30)
        assert all(ticket.done and ticket.error() is None for ticket in tickets)
        for ask in (lambda: engine.submit("classify", "x", "a"), lambda: engine.warm("a")):
            with pytest.raises(Draining):
                ask()


def test_closing_ends_every_ticket(shelf: Shelf) -> None:
    shelf.gate.clear()
    engine = shelf.engine()
    tickets = [engine.submit("classify", text, name) for text in TEXTS for name in "ab"]
    warming: list[BaseException] = []

    def warm() -> None:
        try:
            engine.warm("c")
        except EngineError as error:
            warming.append(error)

    thread = threading.Thread(target=warm)
    thread.start()
    assert not engine.drain(0.05)
    time.sleep(0.05)
    closing = threading.Thread(target=engine.close)
    closing.start()
    for ticket in tickets:
        with pytest.raises(Draining, match="was closed before it answered"):
            ticket.result(30)
    shelf.gate.set()
    closing.join(30)
    thread.join(30)
    assert not closing.is_alive()
    assert all(isinstance(each, Draining) for each in warming)
    engine.close()  # a second time does nothing


def test_a_limit_that_is_no_positive_integer_is_refused() -> None:
    for wrong in ({"slots": 0}, {"memory": -1}, {"batch_tokens": 1.5}):
        with pytest.raises(DataError, match="expected a whole number"):
            Limits(**wrong)  # type: ignore[arg-type]


def test_counts_are_kept_by_version(shelf: Shelf) -> None:
    shelf.broken["bad@1"] = BundleError("torn")
    with shelf.engine() as engine:
        engine.classify(TEXTS, "a")
        with pytest.raises(BundleError):
            engine.classify(["x"], "bad")
        stats = engine.stats()
        one = stats.versions["sha256:a@1"]
        assert (one.version, one.requests, one.answers, one.errors) == ("a@1", 5, 5, 0)
        assert one.prompt_tokens == stats.prompt_tokens > 0
        assert stats.versions["sha256:bad@1"].errors == stats.errors == 1
        assert (stats.answers, stats.loads, stats.failed_loads, stats.adapters) == (5, 1, 1, 1)


def test_heads_with_different_numbers_of_labels_share_a_batch(shelf: Shelf) -> None:
    shelf.adapters["two@1"] = made("bert", "classify", METHODS["lora"], 7, 2, shelf.spec(2))
    shelf.adapters["five@1"] = made("bert", "classify", METHODS["head"], 8, 5, shelf.spec(5))
    with shelf.engine() as engine:
        tickets = [engine.submit("classify", text, name) for text in TEXTS for name in ("two", "five")]
        widths = [len(ticket.result(30)["probabilities"]) for ticket in tickets]
    assert widths == [2, 5] * len(TEXTS)
    assert set(LABELS) >= {ticket.result()["label"] for ticket in tickets}
