"""An adapter trains on the base of an engine, verb by verb, and answers after its last step without a file between."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import save_base
from torch import Tensor

from turret import adapters, bases
from turret.adapters import Adapter, drawing
from turret.data import Example, Labelled, Pair
from turret.engine import Engine, Limits, Loss, Named, OptimStep, SamplingParams
from turret.errors import AdapterError, LossNotFinite, NotFound, OutOfMemory, RecipeError, TrainingError
from turret.methods import Full, LoRA, Prefix
from turret.ops.dropout import Draws
from turret.train import losses
from turret.train.batches import encode
from turret.train.slot import LocalSlot, TrainingSlot

GOOD, BAD = "a great film, a pleasure", "a dull and boring story"
LABELS = ("good", "bad")
TEXTS = [(f"{text} {number}", label) for number in range(4) for text, label in ((GOOD, "good"), (BAD, "bad"))]
LABELLED = [Labelled(text, label) for text, label in TEXTS]
PAIRS = [Pair(f"{text} {number}", text[:8]) for number in range(4) for text in (GOOD, BAD)]


class NoStore:
    def resolve(self, reference: str) -> Named:
        raise NotFound(f"no {reference}")

    def load(self, named: Named) -> Adapter:
        raise NotFound(f"no {named}")


def engine_of(family: str, task: Any, folder: Path, **limits: Any) -> Engine:
    base = bases.load(str(save_base(family, folder / family)), task=task, dtype="float32")
    return Engine(base, NoStore(), Limits(**limits))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with engine_of("bert", "classify", tmp_path) as engine:
        yield engine


def classifier(engine: Engine, name: str = "news", method: Any = "lora", **how: Any) -> TrainingSlot:
    return TrainingSlot(engine, name, method, kind="classify", labels=LABELS, **how)


def steps(slot: TrainingSlot, examples: list[Any], count: int = 30, lr: float = 1e-2) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(slot.forward_backward(examples))
        slot.optim_step(OptimStep(lr))
    return losses


def tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {**adapter.tensors, **adapter.head}


def equal(one: Adapter, other: Adapter) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return set(ours) == set(theirs) and all(torch.equal(each, theirs[name]) for name, each in ours.items())


@pytest.mark.parametrize("method", ["lora", Prefix(num_virtual_tokens=4), "head"])
def test_a_slot_learns_and_answers_with_what_it_has_learnt(method: Any, engine: Engine) -> None:
    with classifier(engine, method=method) as slot:
        texts = [each.text for each in LABELLED]
        before = slot.sample(texts)
        losses = steps(slot, LABELLED, 60)
        after = slot.sample(texts)

        assert losses[-1] < losses[0] / 2
        assert [each["label"] for each in after] == [each.label for each in LABELLED]
        assert after != before
        surprise = [-math.log(answer["probabilities"][label]) for answer, (_, label) in zip(after, TEXTS, strict=True)]
        assert slot.forward(LABELLED) == pytest.approx(sum(surprise) / len(surprise), rel=1e-3)
        assert slot.steps == 60


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_slot_that_writes_answers_as_the_stored_adapter_does(family: str, tmp_path: Path) -> None:
    with engine_of(family, "generate", tmp_path) as engine:
        slot = TrainingSlot(engine, "short", LoRA(r=4), kind="summarize", settings={"max_target_tokens": 8})
        steps(slot, PAIRS, 20)
        options = SamplingParams(temperature=0, max_tokens=6)
        inputs: list[Any] = [each.source for each in PAIRS[:4]]
        answers = slot.sample(inputs, options)
        named = engine.hold("stored", 1, slot.save())
        assert answers == [engine.submit("generate", each, named, options).result() for each in inputs]
        assert answers != engine.generate(inputs, None, options)  # the bare base answers otherwise
        slot.drop()


def test_gradients_of_several_batches_add_up(engine: Engine) -> None:
    """Two halves added are the mean of the two, so twice the whole's with half the loss each. Control: one half."""
    norms = []
    for batches in ([LABELLED], [LABELLED[:4], LABELLED[4:]], [LABELLED[:4]]):
        with classifier(engine, method=LoRA(r=2, lora_dropout=0.0)) as slot:
            slot._local.model.eval()  # the base's own dropout would draw other masks for other passes
            for batch in batches:
                slot.forward_backward(batch)
            norms.append(slot.optim_step(OptimStep(1e-3, clip=None)))
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)
    assert norms[2] != pytest.approx(norms[0], rel=1e-3)


def test_slots_beside_one_another_equal_the_same_slots_alone(engine: Engine) -> None:
    """Bit for bit, with dropout, with answers in between. Control: another seed."""

    def trained(seed: int) -> Adapter:
        with classifier(engine, method=LoRA(r=4, lora_dropout=0.2), seed=seed) as slot:
            for _ in range(6):
                slot.forward_backward(LABELLED)
                slot.optim_step(OptimStep(1e-2))
                slot.sample([GOOD])
            return slot.save()

    alone = {seed: trained(seed) for seed in range(3)}
    found: dict[int, Adapter] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: trained(seed)})) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(found[seed], alone[seed]) for seed in alone)
    assert not equal(alone[0], alone[1])


def test_a_request_keeps_the_copy_that_it_began_with(tmp_path: Path) -> None:
    with engine_of("llama", "generate", tmp_path, running=1) as engine:
        slot = TrainingSlot(engine, "short", LoRA(r=4), kind="summarize", settings={"max_target_tokens": 8})
        options = SamplingParams(temperature=0, max_tokens=8)
        steps(slot, PAIRS, 5)
        alone = slot.sample([GOOD], options)[0]
        tickets = slot.submit([GOOD] * 4, options)
        steps(slot, PAIRS, 40)
        assert [ticket.result() for ticket in tickets] == [alone] * 4
        later = slot.sample([GOOD], options)[0]
        assert later != alone
        assert len(engine._source.adapters) == 1  # stale copies are gone
        slot.drop()
        assert not engine._source.adapters


def test_texts_that_are_asked_at_once_take_one_pass_so_that_their_answers_are_the_same_each_time(
    engine: Engine,
) -> None:
    with classifier(engine) as slot:
        slot.sample([GOOD])
        for _ in range(5):
            before = engine.stats().passes
            slot.sample([GOOD + " again" * more for more in range(12)])
            assert engine.stats().passes - before == 1


def test_a_slot_goes_on_from_an_adapter_and_is_saved_as_one(engine: Engine) -> None:
    with classifier(engine) as slot:
        steps(slot, LABELLED, 10)
        saved = slot.save()
    with classifier(engine, seed=5) as other:
        assert not equal(other.save(), saved)
        other.load(saved)
        assert equal(other.save(), saved)
        assert other.steps == 0
        with pytest.raises(AdapterError, match="this recipe has r 8"):
            other.load(tensors_of_another_rank(engine))


def tensors_of_another_rank(engine: Engine) -> Adapter:
    with classifier(engine, method=LoRA(r=2)) as slot:
        return slot.save()


def test_the_base_is_left_as_it_was(engine: Engine) -> None:
    before = {name: each.clone() for name, each in engine.base.model.state_dict().items()}
    with classifier(engine) as slot:
        steps(slot, LABELLED, 5)
    after = engine.base.model.state_dict()
    assert all(torch.equal(each, after[name]) for name, each in before.items())
    assert not hasattr(engine.base.model, adapters.hooks.ATTRIBUTE)


def apart(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that compares all rows: those with different targets shall be far apart."""
    x = outputs.float().reshape(len(outputs), -1)
    return (torch.cdist(x, x) - (targets[:, None] != targets).float()).square().mean()


def gradients(slot: TrainingSlot, rows: list[Any], loss: Loss, most_tokens: int) -> tuple[float, Tensor]:
    slot._local.most_tokens, slot._local._added = most_tokens, False
    return slot.forward_backward(rows, loss), slot._local.optimiser.gradients.clone()


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_loss_over_the_batch_is_that_of_all_rows_at_once(family: str, tmp_path: Path) -> None:
    """Computed in small passes and at once, and by autograd itself. Control: each pass alone."""
    classify = family == "bert"
    rows: list[Any] = LABELLED if classify else PAIRS
    whole, alone = Loss("apart", apart, spans="batch"), Loss("apart", apart)
    how: dict[str, Any] = {"kind": "classify", "labels": LABELS} if classify else {"kind": "summarize"}
    with (
        engine_of(family, "classify" if classify else "generate", tmp_path) as engine,
        TrainingSlot(engine, "one", LoRA(r=2, lora_dropout=0.0), **how) as slot,
    ):
        local = slot._local
        local.model.eval()
        loss, found = gradients(slot, rows, whole, most_tokens=20)
        assert (loss, found) == (pytest.approx(gradients(slot, rows, whole, 4096)[0], rel=1e-5), found)
        items = encode(slot.task, rows)

        def plain() -> Tensor:
            local.optimiser.zero_gradients()
            targets = slot.task.targets(rows) if classify else torch.tensor([each.weight for each in items])
            apart(losses._outputs(local.model, slot.task, items), targets).backward()
            return local.optimiser.gradients.clone()

        wanted = slot._run(plain)
        assert float(wanted.norm()) > 0
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
        if classify:
            each = gradients(slot, rows, alone, most_tokens=20)[1]
            assert float((each - wanted).norm()) > 0.1 * float(wanted.norm())


def test_a_loss_over_the_batch_computes_with_the_same_dropout_again(engine: Engine) -> None:
    """Other masks would not give the gradients of the first pass. Control: those of the next step are others."""
    loss = Loss("apart", apart, spans="batch")
    with (
        classifier(engine, method=LoRA(r=2, lora_dropout=0.5)) as one,
        classifier(engine, method=LoRA(r=2, lora_dropout=0.5)) as other,
    ):
        local = other._local
        found = gradients(one, LABELLED, loss, 4096)[1]

        def plain(number: int = 1) -> Tensor:
            local.optimiser.zero_gradients()
            with drawing(local.model, Draws(local.seed, number), range(len(LABELLED))):
                outputs = losses._outputs(local.model, other.task, encode(other.task, LABELLED))
                apart(outputs, other.task.targets(LABELLED)).backward()
            return local.optimiser.gradients.clone()

        wanted = other._run(plain)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
        assert float((other._run(lambda: plain(2)) - wanted).norm()) > 0.1 * float(wanted.norm())


def test_a_mistake_is_one_line(engine: Engine) -> None:
    examples: list[Example] = [*LABELLED]
    with classifier(engine) as slot:
        with pytest.raises(TrainingError, match="call forward_backward first"):
            slot.optim_step(OptimStep(1e-3))
        slot.forward_backward(examples)
        before = slot.save()
        slot._local.optimiser.gradients[0] = float("nan")
        with pytest.raises(LossNotFinite):
            slot.optim_step(OptimStep(1e-3))
        assert equal(slot.save(), before)
        steps(slot, LABELLED, 1)  # the gradients that were not finite are gone
    with pytest.raises(TrainingError, match="every weight"):
        classifier(engine, method=Full())
    with pytest.raises(TrainingError, match="loaded to classify"):
        TrainingSlot(engine, "short", "lora", kind="summarize")
    with pytest.raises(TrainingError, match="no labels"):
        TrainingSlot(engine, "news", "lora", kind="classify")
    with pytest.raises(RecipeError, match=r"task\.beta = 0\.5 is not read by the task classify"):
        classifier(engine, settings={"beta": 0.5})
    with pytest.raises(RecipeError, match="unknown"):
        classifier(engine, settings={"max_token": 8})


def test_memory_that_runs_out_drops_the_gradients_of_half_a_batch(engine: Engine) -> None:
    """By a real error of torch, in the second pass of a batch. Control: the slot goes on as one that had no error."""
    with classifier(engine, most_tokens=16) as slot, classifier(engine, most_tokens=16) as other:
        for each in (slot, other):
            each._local.model.eval()  # the failed passes draw no dropout
        passes: list[int] = []

        def eat(*_: Any) -> None:
            passes.append(1)
            if len(passes) == 2:
                torch.empty(1 << 60)

        hook = slot._local.model.get_input_embeddings().register_forward_hook(eat)
        with pytest.raises(OutOfMemory, match="out of memory at step 1, in a pass of"):
            slot.forward_backward(LABELLED)
        hook.remove()
        assert float(slot._local.optimiser.gradients.abs().max()) > 0
        with pytest.raises(TrainingError, match="call forward_backward first"):
            slot.optim_step(OptimStep(1e-2))
        for each in (slot, other):
            each.forward_backward(LABELLED)
            each.optim_step(OptimStep(1e-2))
        assert equal(slot.save(), other.save())


def verb_by_verb(slot: LocalSlot | TrainingSlot, rows: list[Any], how: OptimStep) -> tuple[float, float]:
    return slot.forward_backward(rows), slot.optim_step(how)


def test_the_verbs_one_by_one_are_the_step_of_the_training_loop(engine: Engine) -> None:
    how = OptimStep(1e-2, weight_decay=0.1, clip=0.5)
    with classifier(engine) as one, classifier(engine) as other, classifier(engine) as control:
        rows = encode(one.task, LABELLED)
        for _ in range(3):
            together = other._run(lambda: other._local.train_step(rows, how))
            assert verb_by_verb(one, LABELLED, how) == together
            control._run(lambda: control._local.train_step(rows, replace(how, weight_decay=0.0)))
        assert verb_by_verb(one._local, rows, how) == other._local.train_step(rows, how)
        assert one.steps == other.steps == 4
        assert equal(one.save(), other.save())
        assert not equal(one.save(), control.save())
        assert one.sample([GOOD]) == other.sample([GOOD])
