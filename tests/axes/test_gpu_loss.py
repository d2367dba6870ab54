"""The loss over the vocabulary on a pretend GPU: in large pieces, by torch's own operation where torch has it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny_training as tiny
import torch
from batches import without_dropout
from pretend_gpu import on_cpu, pretend_gpu, to_gpu

from turret.adapters import packed
from turret.train import losses
from turret.train.batches import EncodedRow
from turret.train.slot import LocalSlot

COUNT, V = 320, 128  # target tokens: ten pieces of a CPU
LORA = {"method": "lora", "method.lora_dropout": 0.0}


def of(item: EncodedRow) -> EncodedRow:
    """The example with a long target."""
    return EncodedRow(item.example, item.source, torch.arange(COUNT) % 90 + 5)


def passed(family: str, on_gpu: bool, dtype: torch.dtype, **settings: Any) -> tuple[float, torch.Tensor, Counter[str]]:
    """The loss of a step with one long target, its gradients, and its launches."""
    base = tiny.base(family, "generate", max_position_embeddings=512)
    without_dropout(base.model).to(dtype)
    with pretend_gpu() as gpu:
        if on_gpu:
            to_gpu(base.model)
        task, optimiser, items = tiny.started(base, "summarize", **{**LORA, **settings})
        gpu.clear()
        loss = LocalSlot(base, task, optimiser, 42, 1024).forward_backward([of(items[0])])
        return loss, on_cpu(optimiser.gradients).clone(), Counter(gpu.launches)


@pytest.mark.parametrize("fused", [True, False], ids=["torch's operation", "the loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_layer_is_read_for_all_targets_at_once(
    monkeypatch: pytest.MonkeyPatch, fused: bool, dtype: torch.dtype
) -> None:
    if fused and not losses.FUSED:
        pytest.skip("torch is older than 2.13")
    monkeypatch.setattr(losses, "FUSED", fused)
    here = passed("llama", False, dtype)
    there = passed("llama", True, dtype)
    one, bf16 = there[2], dtype == torch.bfloat16
    assert there[0] == pytest.approx(here[0], rel=1e-2 if bf16 else 1e-5)
    largest = float(here[1].abs().max())
    assert float((there[1] - here[1]).abs().max()) <= (8e-2 if bf16 else 1e-4) * largest
    assert (one["_linear_cross_entropy_batch_chunked_no_reduction"] == 1) == fused
    small = monkeypatch.setattr(packed, "GPU_LOGITS", 32 * V), passed("llama", True, dtype)[2]
    more = {name: count - one[name] for name, count in small[1].items() if count > one[name]}
    assert sum(more.values()) > 50, "the control: in pieces of 32 it is read ten times"


def test_an_amd_gpu_takes_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert passed("llama", True, torch.float32)[2]["_linear_cross_entropy_batch_chunked_no_reduction"] == 0


def test_a_task_with_a_loss_of_its_own_and_a_capped_vocabulary_are_not_given_to_torchs_operation() -> None:
    name = "_linear_cross_entropy_batch_chunked_no_reduction"
    assert passed("gemma2", True, torch.float32)[2][name] == 0
    here, there = (passed("gemma2", on_gpu, torch.float32) for on_gpu in (False, True))
    assert there[0] == pytest.approx(here[0], rel=1e-5)
