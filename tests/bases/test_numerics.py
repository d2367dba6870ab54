"""What is asked of the processor changes no setting, and what is chosen is exact."""

from __future__ import annotations

import torch

from turret.bases import numerics


def test_the_chosen_product_is_exact_and_the_setting_is_put_back() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with numerics.quickest_exact_matmul() as chosen:
        assert matmul.fp32_precision == chosen
        x, y = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
        exact = x.double() @ y.double()
        assert float(((x @ y).double() - exact).norm() / exact.norm()) <= numerics.EXACT
    assert matmul.fp32_precision == before


def test_bfloat16_is_a_yes_or_a_no() -> None:
    assert numerics.native_bfloat16() in (True, False)
