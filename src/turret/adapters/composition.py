"""Several adapters on one row: their low-rank changes are added, and the prefix of one is in front.

    y = W x + sum_i s_i B_i A_i x

The sum is one adapter of rank R_1 + R_2 + ...: A stacked by rows, and s_i B_i by columns. Source: "cat" of PEFT's
`add_weighted_adapter`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turret.adapters.adapter import Adapter, Parts
from turret.errors import AdapterError
from turret.methods.lookup import numbers_of
from turret.transformer import Model


def all_parts(model: Model, adapter: Adapter) -> Parts:
    """The parts of an adapter together with those that it is composed with.

    Args:
        model: an attached model.

    Raises:
        AdapterError: the tensors do not fit the model, or the adapters cannot be composed.
    """
    every = (adapter, *adapter.others)
    if adapter.others and any(each.head for each in every):
        raise AdapterError("one of the composed adapters has a head: only adapters that generate can be composed")
    return composed([numbers_of(each.method).parts(model, each) for each in every])


def composed(parts: Sequence[Parts]) -> Parts:
    """The parts of all adapters as those of one. A single one is returned as it is.

    Raises:
        AdapterError: One of several scales layers or replaces modules, or two have a prefix.
    """
    if len(parts) == 1:
        return parts[0]
    if any(each.layers or each.whole for each in parts):
        raise AdapterError(
            "only LoRAs and one prefix can be composed, and one of these scales layers or replaces modules"
        )
    prefixes = [each.prefix for each in parts if each.prefix]
    if len(prefixes) > 1:
        raise AdapterError(f"{len(prefixes)} of the composed adapters have a prefix: expected at most one")
    factors = [each for each in parts if each.factors]
    ranks = [next(iter(each.factors.values()))[0].shape[0] for each in factors]
    paths = dict.fromkeys(path for each in factors for path in each.factors)
    return Parts({path: _stacked(path, factors, ranks) for path in paths}, 1.0, prefixes[0] if prefixes else {})


def _stacked(path: str, parts: Sequence[Parts], ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A (R, D_in) and B (D_out, R) of one layer, with zeros for adapters that leave it as it is. ranks: of each."""
    known = next(each.factors[path] for each in parts if path in each.factors)
    d_in, d_out = known[0].shape[1], known[1].shape[0]
    A, B = [], []
    for each, rank in zip(parts, ranks, strict=True):
        own = each.factors.get(path)
        A.append(torch.zeros(rank, d_in) if own is None else own[0].float())
        B.append(torch.zeros(d_out, rank) if own is None else own[1].float() * each.scaling)
    return torch.cat(A).contiguous(), torch.cat(B, dim=1).contiguous()
