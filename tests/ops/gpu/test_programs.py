"""The programs of a GPU, run by Triton's interpreter on the CPU, against torch; and compiled at real sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import GPU, OnCard, on_cpu, pretend_gpu

from turret.ops.core import REFERENCE
from turret.ops.gpu import ops as gpu_ops
from turret.ops.gpu.ops import ATTENTION, DROPOUT, FEATURES, LIGER
from turret.ops.structs import NO_DROPOUT, STEPS, DropoutArguments, Lora, dropout_mask

CPU = torch.device("cpu")
ALLOWED = {"float32": 2e-6, "float16": 3e-3}
HERE = Path(__file__)
missing = [each for each in ("triton", "liger_kernel") if importlib.util.find_spec(each) is None]
needs_programs = pytest.mark.skipif(bool(missing), reason=f"not installed: {' and '.join(missing)}")


def said_by(script: str, *arguments: str, **variables: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(HERE.with_name(script)), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_programs
@pytest.mark.slow
def test_the_programs_give_what_torch_gives_in_one_launch_each() -> None:
    found = said_by("interpreted.py", TRITON_INTERPRET="1")
    for feature in (LIGER, DROPOUT):
        for dtype, difference in found[feature]["difference"].items():
            assert difference <= ALLOWED[dtype], (feature, dtype)
    # in two dtypes: both norms and both of SwiGLU, two rotations, two masks
    one = {"_rms_norm_forward_kernel", "_rms_norm_backward_kernel", "_swiglu_forward_kernel", "_swiglu_backward_kernel"}
    assert found[LIGER]["launches"] == {**dict.fromkeys(one, 2), "_triton_rope": 4}
    assert found[DROPOUT]["launches"] == {"_dropout": 4}


@needs_programs
@pytest.mark.slow
def test_every_program_compiles_at_the_sizes_of_real_bases_for_gpus_since_ampere(tmp_path: Path) -> None:
    found = said_by("compiled.py", "80", "89", "90", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 6 * 4 * 3
    for name, made in found.items():
        assert made["bytes"] > 1000, name
        assert made["shared"] <= 99 * 1024, name  # of a GPU for desktops


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_of_a_gpu_gives_what_torch_gives_on_the_pretend_one(feature: str) -> None:
    """The whole way but the programs: views, memory that is changed, what is returned."""
    with pretend_gpu() as gpu:
        gpu.clear()
        ops = gpu_ops.ops_with(frozenset({feature}))
        assert gpu_ops.largest_difference(feature, ops, GPU, torch.float32) <= 1e-5
        names = {ATTENTION: "_flash_attention_forward", LIGER: "rotate", DROPOUT: "dropout"}
        assert gpu.launches[names[feature]] == 2


def test_control_another_formula_is_noticed() -> None:
    class Wrong(gpu_ops.GpuOps):
        def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return gate * up

        def dropout(self, x: torch.Tensor, dropped: DropoutArguments, scale: float) -> torch.Tensor:
            return x * scale

    for feature in (LIGER, DROPOUT):
        assert gpu_ops.largest_difference(feature, Wrong(frozenset()), CPU, torch.float32) > 0.1
        assert gpu_ops.largest_difference(feature, gpu_ops.ops_with(frozenset()), CPU, torch.float32) == 0


def test_dropout_drops_the_share_that_was_asked_for_and_other_elements_for_another_seed() -> None:
    keys, threshold = torch.randint(1 << 62, (500,), generator=torch.Generator().manual_seed(0)), round(0.1 * STEPS)
    one, other = dropout_mask(keys, 7, threshold, 400), dropout_mask(keys, 8, threshold, 400)
    assert float(one.float().mean()) == pytest.approx(0.9, abs=0.003)
    assert float((one == other).float().mean()) == pytest.approx(0.82, abs=0.01)
    for dim in (0, 1):  # neither a row nor a column is favoured
        assert float(one.float().mean(dim).sub(0.9).abs().max()) < 0.09


def test_the_plain_mask_on_a_gpu_is_the_cpus() -> None:
    """Where Triton is missing, and in attention; a shift of bits is no operation in place."""
    keys = torch.randint(-(1 << 62), 1 << 62, (2, 7), generator=torch.Generator().manual_seed(0))
    for heads in (0, 4):
        with pretend_gpu():
            there = on_cpu(dropout_mask(OnCard(keys), 99, 6553, 40, heads=heads))
        assert torch.equal(there, dropout_mask(keys, 99, 6553, 40, heads=heads))
        assert 0.8 < float(there.float().mean()) < 0.98


def test_a_gpu_without_one_feature_keeps_the_others_and_says_why(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """An AMD GPU without attention over rows, a GPU of 2018, a machine without the extra."""
    asked = gpu_ops._why_not.__wrapped__
    monkeypatch.setattr(gpu_ops, "_why_not", asked)  # nothing is remembered
    monkeypatch.setattr(gpu_ops, "largest_difference", lambda *arguments: 0.0)
    monkeypatch.setattr(gpu_ops, "find_spec", lambda name: None if name == "liger_kernel" else object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    half = torch.float16
    assert gpu_ops.why_not(ATTENTION, GPU, half) == "the GPU is older than Ampere"
    assert "pip install 'turret[gpu]'" in str(gpu_ops.why_not(LIGER, GPU, half))
    assert gpu_ops.why_not(DROPOUT, GPU, half) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpu_ops.why_not(ATTENTION, GPU, half) is None, "AMD's are tried"
    monkeypatch.setattr(gpu_ops, "largest_difference", lambda *arguments: 0.5)
    assert "differs from torch by 5.0e-01" in str(gpu_ops.why_not(ATTENTION, GPU, half))

    def refuses(*arguments: object) -> float:
        raise RuntimeError("no kernel image is available\nand more lines")

    monkeypatch.setattr(gpu_ops, "largest_difference", refuses)
    assert gpu_ops.why_not(DROPOUT, GPU, half) == "RuntimeError: no kernel image is available"
    assert all("\n" not in each.getMessage() for each in caplog.records)


def test_what_flash_attention_does_not_take_is_left_to_torch() -> None:
    assert "float32" in str(gpu_ops.why_not(ATTENTION, GPU, torch.float32))
    assert "no GPU" in str(gpu_ops.why_not(DROPOUT, CPU, torch.float32))
    assert gpu_ops.ops_of(torch.ones(2)) is REFERENCE


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rank", [3, 128, 256])
def test_the_gradients_of_lora_on_a_gpu_are_autograds(p: float, rank: int) -> None:
    """Three layers with one input, of which one has no LoRA, or another rank; any rank fits."""
    generator = torch.Generator().manual_seed(0)
    N, d_in, sizes, ranks, ops = 11, 70, (50, 60, 40), (rank, 2, rank), gpu_ops.ops_with(frozenset({DROPOUT}))
    keys = torch.randint(1 << 62, (N,), generator=generator)
    draw = lambda *shape: torch.randn(*shape, generator=generator) / 4
    x = draw(N, d_in).requires_grad_()
    A = [draw(r, d_in).requires_grad_() for r in ranks]
    B = [draw(size, r).requires_grad_() for size, r in zip(sizes, ranks, strict=True)]
    dy, plus = [draw(N, size) for size in sizes], None
    dropped = [DropoutArguments.of(p, seed, keys) for seed in (7, 8, 9)]
    masks = [dropout_mask(each.keys, each.seed, each.threshold, d_in) if p else torch.ones(1) for each in dropped]
    scales = [0.7 * (each.scale if p else 1.0) for each in dropped]
    expected = [s * ((x * mask) @ a.mT @ b.mT) for s, mask, a, b in zip(scales, masks, A, B, strict=True)]
    gradients = torch.autograd.grad(expected, [x, *A, *B], dy)
    with pretend_gpu(), torch.no_grad():
        card = lambda given: OnCard(given.detach().clone())
        own = [DropoutArguments(each.seed, each.threshold, each.scale, card(keys)) for each in dropped]
        drawn = own if p else [NO_DROPOUT] * len(own)
        loras = [Lora(card(a), card(b), 0.7, p, each) for a, b, each in zip(A, B, drawn, strict=True)]
        y, given = [OnCard(torch.zeros(N, size)) for size in sizes], card(x)
        inner = ops.add_lora(y, given, loras, plus)
        dx = OnCard(torch.zeros(N, d_in))
        found = ops.lora_backward(loras, lambda: given, inner, [card(each) for each in dy], dx)
        results = [on_cpu(each) for each in (*y, dx, *found[::2], *found[1::2])]
    for one, other in zip(results, (*expected, *gradients), strict=True):
        torch.testing.assert_close(one, other.detach(), atol=1e-4, rtol=1e-4)
