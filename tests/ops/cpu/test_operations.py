"""The elementwise kernels against torch, on odd shapes."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import BOTH, TOLERANCES, close, compiled, draw, needed

from turret.ops.structs import DropoutArguments


@needed
@BOTH
@pytest.mark.parametrize("size", [1, 31, 32, 127, 128, 129, 8191, 20_000])
def test_activations_and_their_gradients_equal_torchs_at_every_size(dtype: torch.dtype, size: int) -> None:
    gate, up, dy = (4 * draw(size, dtype=dtype) for _ in range(3))
    wide, wider = gate.double().requires_grad_(), up.double().requires_grad_()
    y = torch.nn.functional.silu(wide) * wider
    close(compiled(dtype).swiglu(gate, up) / 16, y / 16, dtype)
    for ours, theirs in zip(
        compiled(dtype).swiglu_backward(gate, up, dy), torch.autograd.grad(y, (wide, wider), dy.double()), strict=True
    ):
        close(ours / 64, theirs / 64, dtype)
    y = torch.nn.functional.gelu(wide)
    close(compiled(dtype).gelu(gate) / 4, y / 4, dtype)
    close(compiled(dtype).gelu_backward(gate, dy) / 4, torch.autograd.grad(y, wide, dy.double())[0] / 4, dtype)


@needed
def test_very_large_numbers_do_not_overflow_and_nan_stays() -> None:
    x = torch.tensor([-1e30, -200.0, -100.0, -88.0, 0.0, 88.0, 200.0, 1e30])
    ones = torch.ones_like(x)
    torch.testing.assert_close(compiled().swiglu(x, ones), torch.nn.functional.silu(x))
    torch.testing.assert_close(compiled().gelu(x), torch.nn.functional.gelu(x), atol=1e-6, rtol=1e-5)
    for dtype in TOLERANCES:
        lost = torch.full((40,), float("nan"), dtype=dtype)
        assert compiled(dtype).swiglu(lost, ones[:1].expand(40).to(dtype).contiguous()).isnan().all()
        assert compiled(dtype).gelu(lost).isnan().all()


@needed
@BOTH
def test_dropout_keeps_its_share_and_equal_seeds_give_equal_masks(dtype: torch.dtype) -> None:
    x, keys = (
        draw(1_001, 999, dtype=dtype).abs() + 1,
        torch.randint(1 << 62, (1_001,)),
    )  # no zeros, which would look dropped
    dropped = DropoutArguments.of(0.3, 7, keys)
    y = compiled(dtype).dropout(x, dropped, dropped.scale)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(0.7, abs=2e-3)
    close(y[kept], x[kept].double() / 0.7, dtype)
    assert torch.equal(kept, compiled(dtype).dropout(torch.ones_like(x), dropped, 1.0) != 0)
    other = DropoutArguments.of(0.3, 8, keys)
    assert not torch.equal(kept, compiled(dtype).dropout(torch.ones_like(x), other, 1.0) != 0)


@needed
@BOTH
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 8), (9, 64), (2, 100)])
def test_rotation_is_undone_by_its_transpose(dtype: torch.dtype, heads: int, dim: int) -> None:
    x, angle = draw(5, heads, dim, dtype=dtype), torch.rand(5, dim // 2).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    turned, same = compiled(dtype).rotate(strided, x, cos, sin, 1.0)
    assert torch.equal(turned, same)
    half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
    close(turned, x.double() * cos.double()[:, None] + half.double() * sin.double()[:, None], dtype)
    close(compiled(dtype).rotate(turned, turned, cos, sin, -1.0)[0], x, dtype)
    assert not torch.allclose(turned.float(), x.float(), atol=0.05)  # the control
