"""One place asks for a device; every matrix product of the source belongs to an operation that is listed here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from syntax import module_of

import turret
from turret.ops.core import REFERENCE
from turret.ops.gpu.ops import GpuOps
from turret.ops.table import gpu_paths_on_meta, ops_for, without

SOURCE = Path(turret.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
OUTSIDE = [path for path in MODULES if SOURCE / "ops" not in path.parents]
ASKS = re.compile(r"turret\.ops(?:\.| import )(?:cpu|gpu)\b|\benabled\(|\blibrary\(\)\.(?!f)")


def asking(text: str) -> list[str]:
    return ASKS.findall(text)


def test_nothing_outside_the_operations_asks_for_a_devices_kernels_or_a_path_by_name() -> None:
    quantized = SOURCE / "quantized.py"  # its library is bitsandbytes
    found = {path.name: asking(path.read_text()) for path in OUTSIDE if path != quantized}
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.parametrize(
    "text",
    [
        "from turret.ops.cpu import CpuOps",
        "from turret.ops import gpu as kernels",
        'if enabled("flash"):',
    ],
)
def test_the_test_of_asking_sees_one(text: str) -> None:
    assert asking(text)


def test_the_operations_are_those_of_device_and_dtype() -> None:
    x, gpu = torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16, device="meta")
    assert ops_for(x) is ops_for(x, x)
    assert ops_for(x, x.double()) is REFERENCE
    assert ops_for(x.double()) is REFERENCE
    assert ops_for(gpu) is REFERENCE
    with gpu_paths_on_meta(True):
        assert isinstance(ops_for(gpu), GpuOps)
    with without("kernels"):
        assert ops_for(x) is REFERENCE


# --- matrix products --------------------------------------------------------------------------------------------------

CALLS = {
    *("mm", "bmm", "addmm", "addmm_", "baddbmm", "matmul", "einsum", "linear", "scaled_dot_product_attention", "dot"),
    *("matmul_4bit", "varlen_attn", "_flash_attention_forward", "_flash_attention_backward"),
}
PRODUCTS = {  # operation -> where it is written: module, and function
    "LoRA, in torch": {
        "ops/core.py Ops._add_one_lora",
        "ops/core.py Ops._one_lora_backward",
        "ops/lora.py low_rank",  # of one adapter; the reference
        "ops/lora.py sgmv",  # of rows with several
    },
    "LoRA, on a GPU": {
        "ops/gpu/ops.py GpuOps.add_lora",  # of one adapter that trains
        "ops/gpu/ops.py GpuOps.lora_backward",
        "ops/lora.py Stack._put",  # of rows that decode, with several
        "ops/lora.py Stack.add",
    },
    "LoRA, merged": {
        "adapters/lora.py ScaledLayer.merged_parameters",
        "adapters/lora.py dora",
    },
    "attention, in torch": {
        "ops/attention.py _Attention.backward",
        "ops/attention.py _Attention.forward",
        "ops/attention.py attend_plainly",
        "ops/core.py attention_by_rows",  # the kernels' reference, for their checks
    },
    "attention, on a GPU": {
        "ops/gpu/ops.py GpuOps.attention",
        "ops/gpu/ops.py GpuOps.attention_backward",
    },
    "a frozen layer": {
        "ops/core.py Ops.linear_few",
        "ops/lora.py FrozenProducts.backward",
        "ops/lora.py FrozenProducts.forward",
        "quantized.py FourBitProducts.backward",
        "quantized.py FourBitProducts.forward",
        "adapters/layers.py TokenLogits.forward",
    },
    "a prefix's MLP": {
        "adapters/prefix.py PrefixGroup.folded_keys_values",
        "adapters/prefix.py _Outer.backward",
        "adapters/prefix.py _Outer.forward",
    },
    "the routed layer, which asks its pool, which adds an axis": {
        "adapters/layers.py RoutedLinear.forward",
        "engine/adapter_pool.py AdapterPool.linear",
    },
    "cosines of vectors": {"tasks/embedding.py _rank_texts", "tasks/embedding.py multiple_negatives"},
    "a head that is solved": {"train/linear_start.py _logits", "train/linear_start.py solve"},
    "statistics": {
        "compare/verdict.py interval",
        "compare/design.py simulate_intervals",
        "experiments/input_drift.py Score._fit",
        "experiments/input_drift.py Score.of",
        "experiments/input_drift.py _has",
        "statistics.py sign_flips",
        "store/difference.py _squared_norm",
        "workspace/measure.py nearest.answer",
    },
    "the check of the kernels, and of a device's speed": {
        *(f"ops/cpu/compiled.py _checked_{name}" for name in ("low_rank", "step")),
        *(f"bases/device.py {name}" for name in ("_speed.seconds", "relative_error")),
    },
}
IN_C = {  # operation -> the kernels, by file
    "LoRA": {"lora.inc.c", "low_rank.inc.c"},
    "attention": {"attention.inc.c"},
    "a decoding step: a frozen layer with its LoRA, and attention": {"step.inc.c"},
    "the building blocks of all of them": {"products.inc.c"},
}
MULTIPLIES = re.compile(r"\b(?:dot|dot32|_tile_dpbf16ps|_mm\d+_(?:fmadd|dpbf16|dpbusd)_\w+)\(|\bsum\w* \+= [^;]*\*")


def products(tree: ast.AST, names: tuple[str, ...] = ()) -> Iterator[str]:
    """The function around every matrix product of a module."""
    for node in ast.iter_child_nodes(tree):
        inside = names
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inside = (*names, node.name)
        operator = isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.MatMult)
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS
        if operator or call:
            yield ".".join(inside)
        yield from products(node, inside)


def written() -> set[str]:
    return {
        f"{path.relative_to(SOURCE).as_posix()} {where}"
        for path in MODULES
        for where in products(module_of(path.read_text(encoding="utf-8")))
    }


@pytest.mark.slow
def test_every_matrix_product_belongs_to_an_operation() -> None:
    assert written() == set().union(*PRODUCTS.values())


def test_lora_and_attention_are_written_few_times() -> None:
    """Once a back-end, and once merged: the C kernels are one more each."""
    assert len([each for each in PRODUCTS if each.startswith("LoRA")]) + 1 <= 4
    assert len([each for each in PRODUCTS if each.startswith("attention")]) + 2 <= 5


def test_every_kernel_in_c_that_multiplies_belongs_to_an_operation() -> None:
    files = {path.name for path in (SOURCE / "ops" / "cpu").glob("*.c") if MULTIPLIES.search(path.read_text())}
    norms = {"operations.inc.c"}  # sums of squares
    assert files - norms == set().union(*IN_C.values())


@pytest.mark.parametrize("text", ["y = x @ w", "x @= w", "torch.addmm(a, b, c)", "y = F.linear(x, w)"])
def test_the_test_of_products_sees_one(text: str) -> None:
    assert list(products(module_of(f"def f():\n    {text}"))) == ["f"]
