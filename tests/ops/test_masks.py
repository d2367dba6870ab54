"""The hash of a dropout mask: the same by kernels and in torch, of the right rate, and independent of all else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiled_kernels import compiled, needed
from torch import Tensor

from turret.ops.dropout import Draws, Masks
from turret.ops.structs import OF_SITE, AttentionRows, DropoutArguments, Prefixes, dropout_mask
from turret.ops.table import ops_for

KEYS = torch.randint(-(1 << 62), 1 << 62, (57,), generator=torch.Generator().manual_seed(0))


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 31, 33, 128, 1000])
def test_the_kernels_mask_is_the_one_of_the_formula_in_torch(width: int, dtype: torch.dtype) -> None:
    for seed in (7, 0xDEADBEEF):
        dropped = DropoutArguments.of(0.3, seed, KEYS)
        shown = compiled(dtype).dropout(torch.ones(57, width, dtype=dtype), dropped, 1.0) != 0
        assert torch.equal(shown, dropped.keep_mask(shown.shape))
    assert width == 1 or not torch.equal(shown, dropout_mask(KEYS, 7, dropped.threshold, width)), (
        "control: another site"
    )


@needed
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("P", [0, 3])
def test_the_mask_of_attentions_kernel_is_the_one_of_the_formula_in_torch(P: int, causal: bool) -> None:
    """Values that are the identity show which probabilities are kept, of two rows and with a prefix."""
    lengths, heads = (40, 17), 4
    starts = torch.tensor([0, 40])
    rows = AttentionRows(starts, torch.tensor(lengths), starts, torch.tensor(lengths), scaling=1.0, causal=causal)
    q, keys, values = torch.zeros(57, heads, 64), torch.zeros(57, 2, 64), torch.zeros(57, 2, 64)
    for start, length in zip((0, 40), lengths, strict=True):
        values[start : start + length, :, P : P + length] = torch.eye(length)[:, None]
    prefix = torch.zeros(2, P, 64), torch.eye(P, 64).expand(2, P, 64).contiguous()
    prefixes = Prefixes([prefix], [0, 0]) if P else Prefixes([], [None, None])
    dropped = DropoutArguments.of(0.4, 123456789, KEYS)
    y, _ = compiled().attention(rows, q, keys, values, prefixes, dropped)
    for start, length in zip((0, 40), lengths, strict=True):
        shown = y[start : start + length].transpose(0, 1)[..., : P + length] != 0  # (H, T, P + S)
        expected = dropout_mask(KEYS[start : start + length], dropped.seed, dropped.threshold, P + length, heads=heads)
        seen = torch.arange(P + length)[None] <= P + torch.arange(length)[:, None] if causal else torch.tensor(True)
        assert torch.equal(shown, expected & seen)
        assert not torch.equal(shown[0], shown[1]), "control: heads differ"


# --- rate and independence --------------------------------------------------------------------------------------------


P = 0.3
Hash = Callable[[Tensor, int, int, int], Tensor]  # as `dropout_mask`


def weak(keys: Tensor, seed: int, threshold: int, width: int) -> Tensor:
    """A sum is no hash."""
    return ((keys[:, None] + seed + torch.arange(width)) & 0xFFFF) >= threshold


def masks(hashed: Hash, *, seed: int = 1, step: int = 1, site: int = 1, number: int = 0) -> Tensor:
    """(T, D) of one example."""
    drawn = Masks(Draws(seed, step).key, [number], {"encoder": [500]})
    seeds = [drawn.next_seed() for _ in range(site)]
    return hashed(drawn.tokens("encoder", KEYS.device), seeds[-1], round(P * (1 << 16)), 384)


def chi_square(one: Tensor, other: Tensor) -> float:
    """Pearson's statistic of the table of two masks; with one degree of freedom 25 is beyond five standard errors."""
    table = torch.stack([(a & b).sum().double() for a in (one, ~one) for b in (other, ~other)]).view(2, 2)
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    return float(((table - expected).square() / expected).sum())


def worst(hashed: Hash) -> float:
    own = masks(hashed)
    pairs = [(own[:, lag:], own[:, :-lag]) for lag in (1, 2, 15, 16, 17, 32, 64, 100)]
    pairs += [(own[lag:], own[:-lag]) for lag in (1, 2, 7, 64)]
    for changed in (1, 2, 3, 10, 255):
        for name in ("seed", "step", "site", "number"):
            pairs.append((own, masks(hashed, **{name: 1 + changed})))
    return max(chi_square(*pair) for pair in pairs)


def test_neighbours_sites_steps_seeds_tokens_and_examples_have_independent_masks() -> None:
    assert worst(dropout_mask) < 25
    assert worst(weak) > 1000, "control: a weak hash is noticed"


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.3, 0.5, 0.9])
def test_the_share_that_is_kept_is_binomial(p: float) -> None:
    threshold, total, count = round(p * (1 << 16)), 0.0, 0
    for number in range(20):
        keys = Masks(5, [number], {"encoder": [500]}).tokens("encoder", KEYS.device)
        mask = dropout_mask(keys, number * OF_SITE % (1 << 32), threshold, 384)
        total, count = total + float(mask.sum()), count + mask.numel()
    rate = 1 - threshold / (1 << 16)
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert abs(total / count - rate) < 5 * deviation
    assert abs(total / count - (rate - 0.01)) > 5 * deviation, "control: another rate is noticed"


# --- what a mask depends on -------------------------------------------------------------------------------------------


def mask_of(masks: Masks, x: Tensor, p: float) -> Tensor:
    """The next mask of a pass, with which it drops elements of x."""
    return ops_for(x).dropout(torch.ones_like(x), masks.arguments(p, lambda: masks.keys_of(x)), 1.0)


def of_example(masks: Masks, row: int, lengths: list[int]) -> list[Tensor]:
    """The masks of one row of a pass at three sites."""
    start, size = sum(lengths[:row]), lengths[row]
    return [mask_of(masks, torch.ones(1, sum(lengths), 96), 0.4)[0, start : start + size] for _ in range(3)]


def test_an_examples_mask_is_the_same_alone_among_neighbours_and_in_another_order() -> None:
    key = Draws(1, 4).key
    alone = of_example(Masks(key, [5], {"encoder": [9]}), 0, [9])
    for numbers, lengths in (((2, 5, 7), [3, 9, 14]), ((7, 2, 5), [14, 3, 9]), ((5,), [9, 6])):
        found = of_example(Masks(key, numbers, {"encoder": lengths}), numbers.index(5), lengths)
        assert all(torch.equal(one, other) for one, other in zip(alone, found, strict=True))
    assert not torch.equal(alone[0], alone[1]), "control: another site"
    for other in (Masks(key, [6], {"encoder": [9]}), Masks(Draws(1, 5).key, [5], {"encoder": [9]})):
        assert not torch.equal(alone[0], of_example(other, 0, [9])[0]), "control: another example, another step"


def test_what_belongs_to_no_example_has_one_mask_in_every_pass_of_a_step() -> None:
    table = torch.ones(12, 64)
    one, other = (mask_of(Masks(3, numbers, {"encoder": [9, 7]}), table, 0.5) for numbers in ([1, 2], [3, 4]))
    assert torch.equal(one, other)
    assert not torch.equal(one, mask_of(Masks(4, [1, 2], {"encoder": [9, 7]}), table, 0.5)), "control: the step"
