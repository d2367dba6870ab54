"""Native bfloat16 is detected, and oneDNN multiplies float32 only if it does not round."""

from __future__ import annotations

import pytest
import torch

from turret import bases
from turret.bases import device as devices


def test_bfloat16_is_native_exactly_where_torch_says_so_of_this_processor() -> None:
    if torch.cpu.get_capabilities().get("architecture") == "x86_64":
        expected = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        expected = bases.native_bfloat16()
    assert bases.native_bfloat16() == expected


@pytest.fixture
def default_products():
    """Set torch's default for float32 products, and restore the setting afterwards."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def test_measuring_float32_products_changes_no_setting(default_products) -> None:
    state = torch.random.get_rng_state()
    bases.float32_products.cache_clear()
    found = bases.float32_products()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.error > 0


def test_a_product_rounded_to_bfloat16_is_far_over_the_tolerance(default_products) -> None:
    x, weight = torch.randn(64, 384), torch.randn(384, 384)
    exact = x.double() @ weight.double()
    rounded = (x.bfloat16() @ weight.bfloat16()).double()
    assert (rounded - exact).norm() / exact.norm() > 100 * devices.TRUE_FLOAT32
    assert (((x @ weight).double() - exact).norm() / exact.norm()) < devices.TRUE_FLOAT32


@pytest.mark.parametrize(("error", "faster", "taken"), [(4e-7, 2.0, True), (4e-7, 1.0, False), (2e-3, None, False)])
def test_onednn_is_used_only_if_it_does_not_round_and_is_faster(
    error, faster, taken, default_products, monkeypatch
) -> None:
    found = devices.Float32Products(error, faster)
    monkeypatch.setattr(devices, "float32_products", lambda: found)
    devices.use_quick_float32()
    assert torch.backends.mkldnn.matmul.fp32_precision == ("bf16" if taken else "none")
    assert ("oneDNN, 2.0x faster" in str(found)) == taken


def test_a_setting_of_the_program_is_kept(default_products, monkeypatch) -> None:
    monkeypatch.setattr(devices, "float32_products", lambda: devices.Float32Products(4e-7, 2.0))
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    devices.use_quick_float32()
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_the_library_that_is_used_here_does_not_round(default_products) -> None:
    devices.use_quick_float32()
    for tokens, d_in, d_out in ((1, 384, 384), (300, 384, 1536), (300, 1536, 384), (77, 50, 3)):
        x, weight = torch.randn(tokens, d_in), torch.randn(d_out, d_in)
        exact = x.double() @ weight.double().t()
        assert ((x @ weight.t()).double() - exact).norm() / exact.norm() < devices.TRUE_FLOAT32
