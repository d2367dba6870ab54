"""The fast paths of a real GPU give what the plain ones give: programs, layers, recorded steps, pinned copies."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import tiny_training as tiny
import torch
from adapters_at_hand import GENERATES, made
from batches import without_dropout

from turret.engine.protocol import OptimStep
from turret.engine.runner import CudaGraphs, DecodeStep, Prefill, Runner
from turret.methods import LoRA
from turret.ops.copies import copied
from turret.ops.dropout import Draws
from turret.ops.gpu import available, operations
from turret.train.step import train_step

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
SIZES = {"hidden_size": 128, "head_dim": 32}


@pytest.fixture(autouse=True)
def ampere() -> None:
    if torch.cuda.get_device_capability(GPU) < available.OLDEST:
        pytest.skip("the GPU is older than Ampere")


@pytest.mark.parametrize("dtype", available.DTYPES, ids=str)
@pytest.mark.parametrize("name", operations.NAMES)
def test_a_program_gives_what_its_reference_gives(name: str, dtype: torch.dtype) -> None:
    program = getattr(torch.ops.turret, name)
    assert available.largest_difference(name, program, GPU, dtype) <= available.ALLOWED[dtype]


def stepped(programs: bool) -> tuple[float, torch.Tensor]:
    """The loss of a training step in bfloat16, and its gradients."""
    base = tiny.base("llama", "generate", **SIZES)
    without_dropout(base.model).to(GPU, torch.bfloat16)
    kept: list[torch.Tensor] = []
    reason = None if programs else "off for a comparison"
    with patch.object(available, "why_not", lambda device, dtype: reason):
        settings = {"method": "lora", "method.target_modules": "all-linear", "method.lora_dropout": 0.0}
        task, optimiser, items = tiny.started(base, "summarize", **settings)
        update = optimiser.step
        optimiser.step = lambda rate: (kept.append(optimiser.gradients.clone()), update(rate))[1]  # type: ignore[method-assign]
        loss, _ = train_step(
            base.model, task, optimiser, items, OptimStep(1e-3, clip=0.0), most_tokens=256, draws=Draws(42, 1)
        )
    return loss, kept[0].cpu()


def test_a_training_step_by_programs_has_the_gradients_of_the_modules() -> None:
    (loss, own), (other_loss, other) = stepped(True), stepped(False)
    assert loss == pytest.approx(other_loss, rel=2e-2)
    assert float((own - other).norm() / other.norm()) < 5e-2


def test_a_recorded_step_gives_what_the_step_itself_gives() -> None:
    base = tiny.base("llama", "generate", **SIZES)
    base.model.to(GPU, torch.bfloat16)
    method = LoRA(r=4, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear")
    runners: list[Any] = []

    def logits(graphs: bool) -> list[torch.Tensor]:
        runner = Runner(base)  # type: ignore[arg-type]
        runners.append(runner)
        if not graphs:
            runner.recorded.graphs.off = "off for a comparison"
        for slot in (1, 2):
            adapter = made("llama", "generate", method, slot, **SIZES)
            loaded = runner.adapter_pool.prepare(adapter, f"sha256:{slot}", GENERATES)  # type: ignore[arg-type]
            runner.adapter_pool.mount(slot, loaded)
        places = [runner.kv_slot(4, 20, slot) for slot in (1, 2)]
        runner.run([Prefill([7, 8, 9 + slot], slot, place) for slot, place in zip((1, 2), places, strict=True)])
        found = []
        for number in range(8):  # the third and the following are replays
            steps = [DecodeStep(20 + number + slot, slot, place) for slot, place in zip((1, 2), places, strict=True)]
            found.append(runner.run([], steps).vocabulary.float().cpu())
        runner.close()
        return found

    recorded, eager = logits(True), logits(False)
    assert runners[0].recorded.graphs.off is None
    assert runners[0].recorded.graphs.recorded == 1
    for one, other in zip(recorded, eager, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def test_a_graph_that_differs_from_its_step_is_not_used() -> None:
    graphs, calls = CudaGraphs(), [0]

    def body(inputs: Any) -> torch.Tensor:
        calls[0] += 1
        return inputs[0] * calls[0]  # reads what a graph cannot see change

    given = [torch.ones(4, device=GPU)]
    for _ in range(3):
        graphs.run("key", given, body, lambda: True)
    assert graphs.off is not None


def test_a_pinned_copy_arrives_whole_while_the_gpu_is_busy() -> None:
    busy = torch.randn(2048, 2048, device=GPU)
    expected = [torch.arange(number, number + 10_000) for number in range(20)]
    arrived = []
    for each in expected:
        busy = (busy @ busy).tanh()
        arrived.append(copied(each.clone(), GPU))
    for one, other in zip(arrived, expected, strict=True):
        assert torch.equal(one.cpu(), other)
