"""Run unpadded rows through an attached model: no row is ever padded to the length of another.

The rows lie one behind another in one row of N tokens, filled up at its end to a round number, and the hooks keep them
apart. Both functions are differentiable and honour train() and eval(). Refuses to know tasks, losses and texts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from turret.adapters.attached import attachment, device_of
from turret.adapters.batch_context import set_context
from turret.adapters.fused import enabled
from turret.adapters.fused.blocks import rounded
from turret.adapters.fused.frozen import linear
from turret.adapters.positions import row_positions
from turret.families import Pooling

STEPS = ((64, 8), (512, 32), (1 << 62, 64))  # all rows together are filled up: to 64 tokens by 8, and so on


def classify_logits(model: Any, inputs: Sequence[Tensor], slots: Sequence[int] | None = None) -> Tensor:
    """Logits of a sequence classifier: inputs are B rows of token ids (T_i,) int64 -> (B, C).

    slots: one slot a row; all rows take the attached adapter where left out.
    """
    attached = attachment(model)
    family, lengths = attached.family, [len(row) for row in inputs]
    if family.is_encoder_decoder:  # the whole input again as the decoder's, shifted; its last token is read
        shifted = [shift_right(model.config, row) for row in inputs]
        hidden = _encoder_decoder_hidden(model, inputs, shifted, slots)
    elif (
        attached.narrows
        and slots is None
        and family.pooling(model.config) == "first"
        and attached.context.adapter_pool is None
        and enabled("first_token")
    ):
        ends = torch.tensor(lengths).cumsum(0)
        hidden = _hidden(model, inputs, slots, read=(ends - torch.tensor(lengths)).to(device_of(model)))
        lengths = [1] * len(lengths)  # the body gives (B, D)
    else:
        hidden = _hidden(model, inputs, slots)
    pooled = pool(family.pooling(model.config), hidden, lengths)
    with set_context(attached.context, slots, None):
        logits: Tensor = family.classify(model, pooled)
    return logits


def target_logits(
    model: Any, sources: Sequence[Tensor], targets: Sequence[Tensor], slots: Sequence[int] | None = None
) -> Tensor:
    """Logits that predict every target token, row after row: -> (sum of len(target), V).

    sources: B rows (S_i,), targets: B rows (T_i,), int64. A decoder reads [source; target] as one row; an
    encoder-decoder reads the source, and the target shifted right. Only target positions reach the output layer.
    """
    return vocabulary_logits(model, target_states(model, sources, targets, slots))


def target_states(
    model: Any, sources: Sequence[Tensor], targets: Sequence[Tensor], slots: Sequence[int] | None = None
) -> Tensor:
    """What the output layer makes those logits of: (sum of len(target), D)."""
    attached = attachment(model)
    if attached.family.is_encoder_decoder:
        shifted = [shift_right(model.config, row) for row in targets]
        return _encoder_decoder_hidden(model, sources, shifted, slots)[: sum(len(row) for row in targets)]
    rows = [torch.cat([source, target]) for source, target in zip(sources, targets, strict=True)]
    hidden = _hidden(model, rows, slots)
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    before = [  # the token before each target token predicts it
        torch.arange(end - len(target) - 1, end - 1, device=hidden.device)
        for end, target in zip(ends, targets, strict=True)
    ]
    return hidden[torch.cat(before)]


def vocabulary_logits(model: Any, hidden: Tensor) -> Tensor:
    """The output layer of a model that generates, as its own forward has it: (N, D) -> (N, V)."""
    output = functools.partial(linear, model.get_output_embeddings())
    logits: Tensor = attachment(model).family.vocabulary(model, hidden, output)
    return logits


def _hidden(model: Any, rows: Sequence[Tensor], slots: Sequence[int] | None, read: Tensor | None = None) -> Tensor:
    """Last hidden states of an encoder or a decoder: (N, D), or (B, D) of the tokens that are `read`."""
    attached = attachment(model)
    rows, slots = _filled(rows, slots)
    lengths = [len(row) for row in rows]
    ids = torch.cat(list(rows))[None].to(device_of(model))  # (1, N)
    offset = attached.family.position_offset(model.config)
    call: dict[str, Any] = {"use_cache": False} if attached.family.decoder_only else {}
    with set_context(attached.context, slots, {attached.family.kind: lengths}, in_body=True, read=read):
        output = model.base_model(
            input_ids=ids,
            attention_mask=ready_mask(ids),
            position_ids=row_positions(lengths, offset, ids.device)[None],
            **call,
        )
    hidden: Tensor = output[0][0]
    return hidden


def _encoder_decoder_hidden(
    model: Any, sources: Sequence[Tensor], targets: Sequence[Tensor], slots: Sequence[int] | None
) -> Tensor:
    """Last hidden states of the decoder: (M, D) for M target tokens."""
    attached = attachment(model)
    (sources, slots), (targets, _) = _filled(sources, slots, always=True), _filled(targets, slots, always=True)
    lengths = {"encoder": [len(row) for row in sources], "decoder": [len(row) for row in targets]}
    source, target = (torch.cat(list(rows))[None].to(device_of(model)) for rows in (sources, targets))
    with set_context(attached.context, slots, lengths, in_body=True):
        encoded = model.get_encoder()(input_ids=source, attention_mask=ready_mask(source))[0]  # (1, N, D)
        output = model.get_decoder()(
            input_ids=target,
            attention_mask=ready_mask(target),
            encoder_hidden_states=encoded,
            encoder_attention_mask=ready_mask(target),
            use_cache=False,
        )
    hidden: Tensor = output[0][0]
    return hidden


def _filled(
    rows: Sequence[Tensor], slots: Sequence[int] | None, always: bool = False
) -> tuple[Sequence[Tensor], Sequence[int] | None]:
    """The rows and one more that rounds the number of tokens up, so that few shapes are computed; nobody reads it.

    always: at least one token more, so that the two sides of an encoder-decoder keep as many rows as each other.
    """
    tokens = sum(len(row) for row in rows)
    missing = rounded(tokens + always, STEPS) - tokens
    if missing == 0:
        return rows, slots
    return [*rows, rows[-1].new_zeros(missing)], None if slots is None else [*slots, slots[-1]]


def ready_mask(ids: Tensor) -> Tensor:
    """A 4-dimensional mask counts as made already, so no (N, N) mask is built; the attention function makes its own."""
    return torch.zeros(1, 1, 1, 1, device=ids.device)


def pool(pooling: Pooling, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """The vector a classifier reads of each row: hidden (N, D) -> (B, D)."""
    ends = torch.tensor(lengths, device=hidden.device).cumsum(0)
    hidden = hidden[: sum(lengths)]
    if pooling == "last":
        return hidden[ends - 1]
    if pooling == "mean":
        return torch.stack([row.mean(0) for row in torch.split(hidden, list(lengths))])
    return hidden[ends - torch.tensor(lengths, device=hidden.device)]


def shift_right(config: Any, row: Tensor) -> Tensor:
    start = torch.full((1,), config.decoder_start_token_id, dtype=row.dtype, device=row.device)
    return torch.cat([start, row[:-1]])
