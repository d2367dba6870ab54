"""The Triton programs of a GPU, run by Triton's interpreter on the CPU, against their references in torch."""

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

from turret.ops.formulas import OF_SITE, kept
from turret.ops.gpu import available, operations, usable, why_not
from turret.ops.structs import STEPS

CPU = torch.device("cpu")
ALLOWED = {"float32": 2e-6, "float16": 3e-3}
PROGRAMS = [name for name in operations.NAMES if name not in ("attention", "attention_backward")]  # those are torch's


@pytest.fixture(scope="module")
def interpreted() -> Any:
    """By operation, the largest difference from its reference in each dtype, and the launches of both calls."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: it has wheels for Linux only")
    script = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_what_its_reference_gives(interpreted: Any, name: str) -> None:
    for dtype, difference in interpreted[name]["difference"].items():
        assert difference <= ALLOWED[dtype], dtype


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_operation_is_one_launch(interpreted: Any, name: str) -> None:
    """The ceilings count an operation as one."""
    assert interpreted[name]["launches"] == {f"_{name}": 2}  # called in two dtypes


@pytest.mark.slow
def test_every_program_compiles_for_gpus_since_ampere_within_their_shared_memory(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: it has wheels for Linux only")
    script = Path(__file__).with_name("compiled.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), "80", "90"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * 3 * len(PROGRAMS)
    for name, made in found.items():
        assert made["bytes"] > 1000, name
        assert made["shared"] <= 99 * 1024, name  # of a GPU for desktops


def test_control_a_program_with_another_formula_is_noticed() -> None:
    assert available.largest_difference("swiglu", lambda gate, up: gate * up, CPU, torch.float32) > 0.1
    assert available.largest_difference("rotate", lambda *arguments: None, CPU, torch.float32) > 0.1


def test_attention_over_packed_rows_is_torchs_attention_of_each_row_and_so_are_its_gradients() -> None:
    """The reference of FlashAttention, whose own form for the CPU there is none."""
    case = available.Case(CPU, torch.float32)
    q, k, v, starts, key_starts, *numbers = case.arguments("attention")
    y, log_sum = torch.ops.turret.attention(q, k, v, starts, key_starts, *numbers)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = torch.ops.turret.attention_backward(dy, q, k, v, y, log_sum, starts, key_starts, *numbers)
    inputs = [each.clone().requires_grad_() for each in (q, k, v)]
    parts = []
    for here, there in (((0, 20), (0, 23)), ((20, 37), (23, 43))):
        own = [inputs[0][slice(*here)], *(each[slice(*there)] for each in inputs[1:])]
        T, S = here[1] - here[0], there[1] - there[0]
        behind = torch.arange(T)[:, None] + (S - T) - torch.arange(S)[None]
        seen = (behind >= 0) & (behind < 9)
        row = torch.nn.functional.scaled_dot_product_attention(
            *(each.transpose(0, 1)[None] for each in own), attn_mask=seen, scale=numbers[-1], enable_gqa=True
        )
        parts.append(row[0].transpose(0, 1))
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected)
    for one, other in zip(found, torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_drops_the_share_that_was_asked_for_and_other_elements_for_another_seed() -> None:
    keys, threshold = torch.randint(1 << 62, (500,), generator=torch.Generator().manual_seed(0)), round(0.1 * STEPS)
    one, other = kept(keys, 7, threshold, 400), kept(keys, 8, threshold, 400)
    assert float(one.float().mean()) == pytest.approx(0.9, abs=0.003)
    assert float((one == other).float().mean()) == pytest.approx(0.82, abs=0.01)
    for dim in (0, 1):  # neither a row nor a column is favoured
        assert float(one.float().mean(dim).sub(0.9).abs().max()) < 0.09


def test_a_cpu_and_what_flash_attention_does_not_take_are_left_to_the_modules() -> None:
    assert not usable(torch.ones(2))
    assert "float32" in str(why_not(torch.device("cuda", 0), torch.float32))


def test_the_gradients_of_lora_with_dropout_are_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    N, R, d_in, sizes, scaling, threshold, seed = 11, 3, 7, (5, 6, 4), 0.7, 26_000, 99
    keys = torch.randint(1 << 62, (N,), generator=generator)
    x = torch.randn(N, d_in, generator=generator, requires_grad=True)
    A = [torch.randn(R, d_in, generator=generator, requires_grad=True) for _ in sizes]
    B = [torch.randn(size, R, generator=generator, requires_grad=True) for size in sizes]
    dy = [torch.randn(N, size, generator=generator) for size in sizes]
    masks = [kept(keys, (seed + g * OF_SITE) % (1 << 32), threshold, d_in) for g in range(3)]
    expected = [scaling * ((x * mask) @ a.mT @ b.mT) for mask, a, b in zip(masks, A, B, strict=True)]
    gradients = torch.autograd.grad(expected, [x, *A, *B], dy)

    ops, plain = torch.ops.turret, [each.detach() for each in (x, *A, *B)]
    x, A, B = plain[0], plain[1:4], plain[4:]
    y, plus = [torch.zeros(N, size) for size in sizes], None
    h = ops.add_lora(y, x, A, B, plus, scaling, keys, seed, threshold)
    dx, into = torch.zeros_like(x), [torch.zeros_like(each) for each in (*A, *B)]
    dh = ops.lora_input_gradient(dx, dy, A, B, scaling, keys, seed, threshold)
    ops.lora_factor_gradients(into[:3], into[3:], x, h, dh, dy, scaling, keys, seed, threshold)
    for one, other in zip((*y, dx, *into), (*expected, *gradients), strict=True):
        torch.testing.assert_close(one, other)
