"""Every family and method gives the CPU's numbers on a pretend GPU, in a training step and in a pass of the engine."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import small_models
import tiny_training as tiny
import torch
from adapters_at_hand import CLASSIFIES, GENERATES, METHODS, made
from batches import rows, with_eos, without_dropout
from marks import fast_if_in
from pretend_gpu import GPU, OnCard, on_cpu, pretend_gpu, to_gpu

from turret import adapters
from turret.engine.protocol import OptimStep
from turret.engine.runner import Runner
from turret.engine.sequence import DecodeStep, Prefill
from turret.families import family_named
from turret.methods import Method, Peft
from turret.train.proof import answer
from turret.train.slot import LocalSlot

TRAINED = {
    "lora": {"method": "lora", "method.lora_dropout": 0.0},
    "all-linear": {"method": "lora", "method.lora_dropout": 0.0, "method.target_modules": "all-linear"},
    "prefix": {"method": "prefix"},
    "head": {"method": "head"},
    "full": {"method": "full"},
    "IA3": {"method": "peft", "method.peft_type": "IA3"},
    "DORA": {"method": "peft", "method.peft_type": "DORA", "method.r": 4, "method.lora_dropout": 0.0},
}
QUICK = [("bert", "lora"), ("bert", "prefix"), ("llama", "all-linear"), ("llama", "prefix"), ("t5", "lora")]
QUICK += [("bert", "DORA")]
FAMILIES = small_models.FAMILIES + small_models.RELATIVES
ENCODERS = small_models.ENCODERS + small_models.RELATIVE_ENCODERS
IA3 = ("bert", "roberta", "t5", "bart", "llama", "qwen3", "mistral")  # PEFT knows where to put it


def fits(family: str, method: str) -> bool:
    generates = family not in ENCODERS
    if method == "IA3" and family not in IA3:
        return False
    return not (method == "head" and generates) and not (method == "prefix" and family_named(family).rows_alone)


def points(methods: Any) -> list[Any]:
    """Every family with every method; those that are not quick are slow tests."""
    return fast_if_in(QUICK, [(family, method) for family in FAMILIES for method in methods if fits(family, method)])


def task_of(family: str) -> Any:
    return "classify" if family in ENCODERS else "generate"


def stepped(family: str, method: str, on_gpu: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Loss and gradients of the first step, the weights after it, and outputs, all on the CPU."""
    kind = "classify" if family in ENCODERS else "summarize"
    base = tiny.base(family, task_of(family))
    without_dropout(base.model).to(dtype)
    with pretend_gpu() if on_gpu else nullcontext():
        if on_gpu:
            to_gpu(base.model)
        task, optimiser, items = tiny.started(base, kind, **TRAINED[method])
        if method == "DORA":  # PEFT draws its factors where they are: both sides begin with the same ones
            drawn = torch.randn(optimiser.weights.shape, generator=torch.Generator().manual_seed(3))
            optimiser.set_weights(0.2 * drawn + 0.05)
        kept: list[torch.Tensor] = []
        update = optimiser.step
        optimiser.step = lambda rate: (kept.append(on_cpu(optimiser.gradients).clone()), update(rate))[1]  # type: ignore[method-assign]
        loss, norm = LocalSlot(base, task, optimiser, 42, 256).train_step(items, OptimStep(1e-3, clip=0.0))
        base.model.eval()
        targets = [] if kind == "classify" else [item.target for item in items[:3]]
        with torch.no_grad():
            outputs = answer(base.model, [item.source for item in items[:3]], targets)  # type: ignore[arg-type]
        tensors = adapters.extract(base.model)
    assert isinstance(optimiser.weights, OnCard) == on_gpu
    assert not any(isinstance(each, OnCard) for each in (outputs, *tensors.tensors.values(), *tensors.head.values()))
    return {"loss": loss, "norm": norm, "gradients": kept[0], "outputs": outputs, "names": sorted(tensors.tensors)}


@pytest.mark.parametrize(("family", "method"), points(TRAINED))
def test_a_training_step_on_a_gpu_has_the_cpus_gradients(family: str, method: str) -> None:
    there, here = stepped(family, method, on_gpu=True), stepped(family, method, on_gpu=False)
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-5)
    assert there["norm"] == pytest.approx(here["norm"], rel=1e-4)
    assert there["names"] == here["names"]
    largest = float(here["gradients"].abs().max())
    assert largest > 0
    assert float((there["gradients"] - here["gradients"]).abs().max()) <= 1e-4 * largest
    torch.testing.assert_close(
        there["outputs"], here["outputs"], atol=2e-2, rtol=1e-2
    )  # the update divides tiny numbers


@torch.no_grad()
def run(runner: Runner, fresh: list[Prefill], steps: Any = ()) -> Any:
    """A pass without inference mode, in which the pretended tensors cannot be written to."""
    return Runner.run.__wrapped__(runner, fresh, steps)  # type: ignore[attr-defined]


def answered(family: str, method: Method, on_gpu: bool) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """A mixed pass of the bare base and two adapters, then a decode step of the rows that generate."""
    kind = task_of(family)
    spec = CLASSIFIES if kind == "classify" else GENERATES
    given = [made(family, kind, method, seed) for seed in (1, 2)]
    base = tiny.base(family, kind)
    with pretend_gpu() if on_gpu else nullcontext():
        if on_gpu:
            to_gpu(base.model)
        runner = Runner(base)  # type: ignore[arg-type]
        for slot, adapter in enumerate(given, 1):
            loaded = runner.adapter_pool.prepare(adapter, f"sha256:{slot}", spec)  # type: ignore[arg-type]
            runner.adapter_pool.mount(slot, loaded)
        slots = [1, 2, 2] if kind == "classify" else [0, 1, 2]
        inputs = with_eos(runner.model, rows(lengths=(9, 3, 14)))
        if kind == "classify":
            found = run(runner, [Prefill(row.tolist(), slot) for row, slot in zip(inputs, slots, strict=True)])
            return found.classes, torch.empty(0), torch.empty(0)
        places = [runner.kv_slot(len(row), 8, slot) for row, slot in zip(inputs, slots, strict=True)]
        fresh = [Prefill(row.tolist(), *at) for row, at in zip(inputs, zip(slots, places, strict=True), strict=True)]
        first = run(runner, fresh).vocabulary
        steps = [DecodeStep(7 + row, slot, places[row]) for row, slot in enumerate(slots)]
        return [], on_cpu(first), on_cpu(run(runner, [], steps).vocabulary)


MIXED: dict[str, Method] = {**METHODS, "IA3": Peft(peft_type="IA3"), "DORA": Peft(peft_type="DORA", r=4)}
MIXED_QUICK = [("bert", "lora"), ("llama", "wide"), ("llama", "prefix"), ("t5", "lora")]


@pytest.mark.parametrize(
    ("family", "method"),
    fast_if_in(MIXED_QUICK, [(family, method) for family in FAMILIES for method in MIXED if fits(family, method)]),
)
def test_a_mixed_pass_of_the_engine_on_a_gpu_has_the_cpus_logits(family: str, method: str) -> None:
    there, here = answered(family, MIXED[method], on_gpu=True), answered(family, MIXED[method], on_gpu=False)
    for one, other in zip((*there[0], *there[1:]), (*here[0], *here[1:]), strict=True):
        assert not isinstance(one, OnCard)
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_control_a_tensor_that_stayed_on_the_cpu_is_refused_as_a_gpu_refuses_it() -> None:
    with pretend_gpu() as gpu:
        there, here = to_gpu(torch.nn.Linear(4, 4)), torch.ones(2, 4)
        with pytest.raises(RuntimeError, match="on the same device"):
            there(here)
        y = there(here.to(GPU))
        assert y.device == GPU
        assert gpu.launches["addmm"] == 1
        assert gpu.copies["_to_copy"] == 1
        assert float(y.sum().detach()) == pytest.approx(float(on_cpu(y.detach()).sum()))
        assert gpu.syncs["a number"] == 1


def test_control_another_weight_on_the_gpu_is_noticed() -> None:
    here = stepped("bert", "lora", on_gpu=False)
    there = stepped("bert", "all-linear", on_gpu=True)
    assert len(there["gradients"]) != len(here["gradients"])
    assert there["names"] != here["names"]
