"""The adapters of a pass as the kernel `low_rank` reads them: spans of tokens, and the addresses of their factors.

They are computed once a pass, so each layer is one call for any mixture of adapters. `sgmv` is the reference in torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from turret.engine.adapter_tensors import AdapterTensors
from turret.kernels import AdapterSpans

Span = tuple[int, int, AdapterTensors]  # first token, one past the last, and their adapter


def spans_of(rows: Iterable[tuple[AdapterTensors | None, int]]) -> list[Span]:
    """The spans of tokens that have a LoRA; neighbouring rows of one adapter are one span.

    Args:
        rows: The adapter and the number of tokens of each row, in order.
    """
    spans: list[Span] = []
    start = 0
    for adapter, tokens in rows:
        end = start + tokens
        if adapter is not None and adapter.layout is not None and tokens:
            if spans and spans[-1][2] is adapter and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end, adapter)
            else:
                spans.append((start, end, adapter))
        start = end
    return spans


def kernel_spans(spans: Sequence[Span], tokens: int) -> AdapterSpans | None:
    """The spans of a pass of that many tokens for the kernels; None if there are none.

    The result holds addresses: keep the adapters as long as it is used.
    """
    if not spans:
        return None
    starts, ends, adapters = zip(*spans, strict=True)
    offsets = torch.stack([adapter.offsets for adapter in adapters])  # (S, L, 2)
    addresses = offsets + torch.tensor([adapter.address for adapter in adapters])[:, None, None]
    return AdapterSpans(
        torch.tensor(starts),
        torch.tensor(ends),
        torch.tensor([adapter.rank for adapter in adapters]),
        addresses.masked_fill_(offsets < 0, 0),
        tokens,
    )
