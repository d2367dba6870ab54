"""The fast paths of a real GPU give what the plain ones give: features, layers, pinned copies."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import tiny_training as tiny
import torch
from batches import without_dropout

from turret.engine.protocol import OptimStep
from turret.ops.core import to_device
from turret.ops.gpu import ops as gpu_ops
from turret.ops.gpu.ops import ATTENTION, FEATURES
from turret.train.slot import LocalSlot

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
SIZES = {"hidden_size": 128, "head_dim": 32}


def has(feature: str, dtype: torch.dtype) -> None:
    """Skip where the GPU lacks a feature for a known reason; a difference from torch fails."""
    if (lacking := gpu_ops._lacking(feature, GPU, dtype)) is not None:
        pytest.skip(lacking)
    assert gpu_ops.why_not(feature, GPU, dtype) is None


@pytest.mark.parametrize("dtype", [*gpu_ops.DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_gives_what_torch_gives(feature: str, dtype: torch.dtype) -> None:
    has(feature, dtype)
    difference = gpu_ops.largest_difference(feature, gpu_ops.ops_with(frozenset({feature})), GPU, dtype)
    assert difference <= gpu_ops.ALLOWED[dtype]


@pytest.mark.parametrize(("dim", "heads"), [(64, 14), (96, 32), (128, 32), (256, 8)])
def test_attention_over_rows_takes_heads_of_real_bases(dim: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    has(ATTENTION, torch.bfloat16)
    for name, value in {"DIM": dim, "HEADS": heads, "KV_HEADS": 2}.items():
        monkeypatch.setattr(gpu_ops, name, value)
    ops = gpu_ops.ops_with(frozenset({ATTENTION}))
    assert gpu_ops.largest_difference(ATTENTION, ops, GPU, torch.bfloat16) <= gpu_ops.ALLOWED[torch.bfloat16]


def stepped(fast: bool) -> tuple[float, torch.Tensor]:
    """The loss of a training step in bfloat16, and its gradients."""
    base = tiny.base("llama", "generate", **SIZES)
    without_dropout(base.model).to(GPU, torch.bfloat16)
    kept: list[torch.Tensor] = []
    own = gpu_ops._ops_on
    with patch.object(gpu_ops, "_ops_on", own if fast else lambda device, dtype: gpu_ops.ops_with(frozenset())):
        settings = {"method": "lora", "method.target_modules": "all-linear", "method.lora_dropout": 0.0}
        task, optimiser, items = tiny.started(base, "summarize", **settings)
        update = optimiser.step
        optimiser.step = lambda rate: (kept.append(optimiser.gradients.clone()), update(rate))[1]  # type: ignore[method-assign]
        loss, _ = LocalSlot(base, task, optimiser, 42, 256).train_step(items, OptimStep(1e-3, clip=0.0))
    return loss, kept[0].cpu()


def test_a_training_step_by_features_has_the_gradients_of_plain_torch() -> None:
    (loss, own), (other_loss, other) = stepped(True), stepped(False)
    assert loss == pytest.approx(other_loss, rel=2e-2)
    assert float((own - other).norm() / other.norm()) < 5e-2


def test_a_pinned_copy_arrives_whole_while_the_gpu_is_busy() -> None:
    busy = torch.randn(2048, 2048, device=GPU)
    expected = [torch.arange(number, number + 10_000) for number in range(20)]
    arrived = []
    for each in expected:
        busy = (busy @ busy).tanh()
        arrived.append(to_device(each.clone(), GPU))
    for one, other in zip(arrived, expected, strict=True):
        assert torch.equal(one.cpu(), other)
