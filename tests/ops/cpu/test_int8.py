"""Products in 8 bits: they equal the formula for all sizes, and keep numbers that are not finite."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import BOTH, compiled, draw
from torch import Tensor

from turret.ops.cpu import int8

able = pytest.mark.skipif(not int8(), reason="no products in 8 bits on this processor")
SIZES = [(1, 64, 32), (8, 64, 32), (37, 192, 96), (300, 384, 64), (9, 2048, 192), (33, 4096, 160)]
ONE_STEP = 2e-3  # relative to the largest output: one element rounded to the next integer


def rounded(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(integers from -127 to 127, scale): x ~ integer * scale, scale = max |x| / 127 over `dim`."""
    most = x.float().abs().amax(dim, keepdim=True)
    return (x.float() * torch.where(most == 0.0, most, 127.0 / most)).round(), most / 127.0


def plainly(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: (N, E), weight: (O, E) -> (N, O) float64."""
    (p, s), (q, r) = rounded(x, 1), rounded(weight, 1)
    y = p.double() @ q.double().mT * s.double() * r.double().mT
    return y if bias is None else y + bias.double()


def ours(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    """The product with a matrix that the call rounds, which must equal the product with one rounded before."""
    laid_out = weight.mT.contiguous() if turned else weight
    y = compiled().linear_int8(x, laid_out, bias, turned)
    again = compiled().linear_int8(x, compiled().round_int8(laid_out, turned), bias)
    assert torch.equal(y.isfinite(), again.isfinite())
    assert torch.equal(y.nan_to_num(), again.nan_to_num())
    return y


def off(given: Tensor, expected: Tensor) -> float:
    return float((given.double() - expected.double()).abs().max() / expected.double().abs().max())


@able
@BOTH
@pytest.mark.parametrize("turned", [False, True], ids=["as it lies", "turned"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_the_product_of_the_rounded_matrices(
    sizes: tuple[int, int, int], turned: bool, dtype: torch.dtype
) -> None:
    tokens, deep, outputs = sizes
    torch.manual_seed(tokens)
    x, weight, bias = (draw(*size, dtype=dtype) for size in ((tokens, deep), (outputs, deep), (outputs,)))
    for each in (bias, None):
        given, expected = ours(x, weight, each, turned), plainly(x, weight, each)
        assert given.dtype == dtype
        assert off(given, expected) < (ONE_STEP if dtype == torch.float32 else 1e-2)


@able
def test_control_the_unrounded_product_differs() -> None:
    """The control of the test above."""
    torch.manual_seed(0)
    x, weight = draw(37, 192), draw(96, 192)
    exact = x.double() @ weight.double().mT
    assert ONE_STEP < off(ours(x, weight, None, False), exact) < 5e-2


@able
@BOTH
def test_integers_are_multiplied_exactly(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight = (torch.randint(-127, 128, size).to(dtype) for size in ((19, 64), (64, 64)))
    x[:, 0], weight[:, 1], weight[0] = 127, -127, 127
    given = ours(x, weight, None, False), ours(x, weight, None, True)
    expected = (x.double() @ weight.double().mT).to(dtype)
    assert torch.equal(*given)
    torch.testing.assert_close(given[0], expected, rtol=1e-6, atol=0.0)


@able
@pytest.mark.parametrize("turned", [False, True])
def test_every_token_and_output_is_independent(turned: bool) -> None:
    torch.manual_seed(2)
    x, weight, bias = draw(21, 128), draw(64, 128), draw(64)
    whole = ours(x, weight, bias, turned)
    assert torch.equal(whole[5:6], ours(x[5:6].contiguous(), weight, bias, turned))
    assert torch.equal(whole[:, 32:], ours(x, weight[32:].contiguous(), bias[32:].contiguous(), turned))


@able
@BOTH
@pytest.mark.parametrize("turned", [False, True])
def test_it_does_not_depend_on_the_number_of_threads(turned: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, weight, bias = (draw(*size, dtype=dtype) for size in ((203, 512), (640, 512), (640,)))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ours(x, weight, bias, turned))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


@able
@BOTH
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_where_it_is(bad: float, turned: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x, weight = draw(20, 64, dtype=dtype), draw(64, 64, dtype=dtype)
    clean = ours(x, weight, None, turned)
    x[7, 11], weight[40, 3] = bad, bad
    y = ours(x, weight, None, turned)
    assert not y[7].isfinite().any()
    assert not y[:, 40].isfinite().any()
    tokens, outputs = [each for each in range(20) if each != 7], [each for each in range(64) if each != 40]
    assert torch.equal(y[tokens][:, outputs], clean[tokens][:, outputs])


@able
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_longest_sums_do_not_overflow(sign: float) -> None:
    x, weight = torch.full((3, 1 << 16), sign), torch.ones(32, 1 << 16)
    torch.testing.assert_close(ours(x, weight, None, False), torch.full((3, 32), sign * 65536.0))
    with pytest.raises(AssertionError):
        compiled().linear_int8(torch.ones(1, 64 + (1 << 16)), torch.ones(32, 64 + (1 << 16)), None)


@able
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tiny", [0.0, 1e-38, 1e-44])
def test_zeros_and_what_is_as_small_give_the_bias(tiny: float, turned: bool) -> None:
    x, weight, bias = torch.full((9, 64), tiny), torch.full((32, 64), tiny), draw(32)
    assert torch.equal(ours(x, draw(32, 64), bias, turned), bias.expand(9, 32))
    assert torch.equal(ours(draw(9, 64), weight, bias, turned), bias.expand(9, 32))


@able
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_tokens_size_does_not_matter(scale: float) -> None:
    torch.manual_seed(5)
    x, weight = draw(9, 64), draw(32, 64)
    assert off(ours(x * scale, weight, None, False) / scale, plainly(x, weight, None)) < ONE_STEP


@able
@pytest.mark.parametrize(
    ("x", "weight"), [((4, 48), (32, 48)), ((4, 64), (33, 64)), ((4, 64), (32, 128))], ids=["E", "O", "E of both"]
)
def test_sizes_it_is_not_for_are_refused(x: tuple[int, int], weight: tuple[int, int]) -> None:
    with pytest.raises(AssertionError):
        compiled().linear_int8(torch.zeros(x), torch.zeros(weight), None)
