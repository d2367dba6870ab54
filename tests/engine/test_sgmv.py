"""SGMV in torch: each token gets the product with its own adapter's factors, and no other token changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from turret.engine.adapter_pool import AdapterTensors, factor_layout, sgmv, tensor_layout

SIZES = ((24, 40), (40, 24))  # (D_in, D_out) of two layers


def lora(rank: int, layers: tuple[int, ...] = (0, 1)) -> AdapterTensors:
    layout = factor_layout(rank, tuple((layer, *SIZES[layer]) for layer in layers), len(SIZES), torch.float32)
    flat = torch.randn(sum(rank * sum(SIZES[layer]) for layer in layers))
    task: Any = SimpleNamespace(generates=True)
    return AdapterTensors("sha256:x", task, flat, layout, {}, tensor_layout({}))


def expected(y: Tensor, x: Tensor, rows: list[AdapterTensors | None], layer: int) -> Tensor:
    """y_t + (x_t A^T) B, token by token, in float64."""
    y = y.double()
    for row, adapter in enumerate(rows):
        if adapter is not None and layer in adapter.pairs():
            A, B = adapter.pairs()[layer]
            y[row] += x[row].double() @ A.double().mT @ B.double()
    return y


@pytest.fixture
def adapters() -> list[AdapterTensors]:
    torch.manual_seed(0)
    return [lora(3), lora(5, layers=(0,)), lora(2), lora(7, layers=(1,))]


@pytest.mark.parametrize("layer", [0, 1])
def test_sgmv_adds_the_product_of_each_segment(adapters: list[AdapterTensors], layer: int) -> None:
    a, b, c, _ = adapters
    rows = [a] * 3 + [None] * 2 + [b] * 4 + [c]
    x, y = torch.randn(10, SIZES[layer][0]), torch.randn(10, SIZES[layer][1])
    wanted = expected(y, x, rows, layer)
    sgmv(y, x, [(0, 3, a.pairs()), (5, 9, b.pairs()), (9, 10, c.pairs())], layer)
    torch.testing.assert_close(y.double(), wanted, atol=1e-4, rtol=1e-4)
