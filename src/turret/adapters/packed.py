"""Run unpadded rows through an attached model: no row is padded to the length of another.

The rows follow one another in one row of N tokens, which is filled up at its end to a round number. The hooks keep the
rows apart. All functions are differentiable and honour train() and eval().
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from turret.adapters.batch_context import set_context
from turret.adapters.hooks import attachment, device_of, drawing, row_positions
from turret.families.family import Pooling, head_of, parts_of_head
from turret.ops.attention import rounded_size
from turret.ops.core import to_device
from turret.ops.lora import linear
from turret.ops.table import narrows_last_layer
from turret.transformer import Model, ModelConfig

TARGETS = 32  # target tokens whose logits a CPU has in memory at a time
GPU_LOGITS = 1 << 25  # logits that a GPU has in memory at a time: enough to read the output layer rarely
# Token ids (T,) or (T, 2), and positions (K,): those that a head for tokens reads, or the last token of each text.
HeadRow = tuple[Tensor, Tensor | None]
STEPS = ((64, 8), (512, 32), (1 << 62, 64))  # the tokens of all rows are rounded up: to 64 by 8, and so on


def classify_logits(model: Model, inputs: Sequence[Tensor], slots: Sequence[int] | None = None) -> Tensor:
    """Logits of a sequence classifier.

    Args:
        model: a classifier with an attachment.
        inputs: B rows of token ids, each (T_i,) int64, or (T_i, 2) with the segment of each token.
        slots: a slot for each row; None: all rows take the attached adapter.

    Returns:
        (B, C).
    """
    attached = attachment(model)
    family = attached.family
    read = pooled_states(model, inputs, family.pooling(model.config), slots)
    with set_context(attached.context, slots, None, masked={"head": [1] * len(inputs)}):
        logits: Tensor = family.classify(parts_of_head(model), read)
    return logits


def tag_logits(model: Model, rows: Sequence[HeadRow], slots: Sequence[int] | None = None) -> Tensor:
    """Logits of a token classifier: (sum of K_i, C), of the tokens that are read, row after row."""
    attached = attachment(model)
    sources = [source for source, _ in rows]
    hidden = _hidden(model, sources, slots)
    starts = [0, *torch.tensor([len(source) for source in sources]).cumsum(0).tolist()]
    places = torch.cat([start + read for start, (_, read) in zip(starts, rows, strict=False) if read is not None])
    counts = [read_in(row) for row in rows]
    own = None if slots is None else [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
    with set_context(attached.context, own, None, masked={"head": counts}):
        logits: Tensor = attached.family.tag(parts_of_head(model), hidden[to_device(places, hidden.device)])
    return logits


def text_vectors(model: Model, rows: Sequence[HeadRow], pooling: Pooling, slots: Sequence[int] | None = None) -> Tensor:
    """A vector for each text of each row, row after row: (sum of K_i, D). The texts of a row are read apart."""
    counts, draws = [read_in(row) for row in rows], attachment(model).context.draws
    texts = [text for row in rows for text in texts_in(row)]
    own = None if slots is None else [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
    if draws is None:
        return pooled_states(model, texts, pooling, own)
    numbers = [number << 32 | place for number, count in zip(draws[1], counts, strict=True) for place in range(count)]
    with drawing(model, draws[0], numbers):
        return pooled_states(model, texts, pooling, own)


def texts_in(row: HeadRow) -> Sequence[Tensor]:
    """The token ids of each text of a row."""
    source, ends = row
    return [source] if ends is None else torch.tensor_split(source, ends[:-1] + 1)


def head_logits(
    model: Model, rows: Sequence[HeadRow], slots: Sequence[int] | None = None, pooling: Pooling | None = None
) -> Tensor:
    """The outputs of a head of either kind. pooling: of a task without a head, whose outputs are vectors."""
    if pooling is not None:
        return text_vectors(model, rows, pooling, slots)
    if head_of(model) == "tag":
        return tag_logits(model, rows, slots)
    return classify_logits(model, [source for source, _ in rows], slots)


def read_in(row: HeadRow) -> int:
    """The number of outputs that a task has for a row."""
    return 1 if row[1] is None else len(row[1])


def pooled_states(
    model: Model, inputs: Sequence[Tensor], pooling: Pooling, slots: Sequence[int] | None = None
) -> Tensor:
    """One vector for each row, from its last hidden states: (B, D)."""
    attached = attachment(model)
    family, lengths = attached.family, [len(row) for row in inputs]
    if family.is_encoder_decoder:  # the decoder reads the whole input again, shifted; its last token is classified
        shifted = [shift_right(model.config, row) for row in inputs]
        hidden = _encoder_decoder_hidden(model, inputs, shifted, slots)
    elif (
        attached.narrows
        and slots is None
        and pooling == "first"
        and attached.context.adapter_pool is None
        and narrows_last_layer()
    ):
        ends = torch.tensor(lengths).cumsum(0)
        hidden = _hidden(model, inputs, slots, read=to_device(ends - torch.tensor(lengths), device_of(model)))
        lengths = [1] * len(lengths)  # the body gives (B, D)
    else:
        hidden = _hidden(model, inputs, slots)
    return pool_rows(pooling, hidden, lengths)


def target_logits(
    model: Model, sources: Sequence[Tensor], targets: Sequence[Tensor], slots: Sequence[int] | None = None
) -> Tensor:
    """Logits that predict every target token, row after row.

    A decoder reads [source; target] as one row. An encoder-decoder reads the source, and the target shifted right. Only
    target positions reach the output layer.

    Args:
        model: a generator with an attachment.
        sources: B rows of token ids, each (S_i,) int64.
        targets: B rows of token ids, each (T_i,) int64.
        slots: a slot for each row; None: all rows take the attached adapter.

    Returns:
        (sum of T_i, V).
    """
    of_token = None
    if slots is not None:
        of_token = [slot for slot, row in zip(slots, targets, strict=True) for _ in range(len(row))]
    return vocabulary_logits(model, target_states(model, sources, targets, slots), of_token)


def target_states(
    model: Model,
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    slots: Sequence[int] | None = None,
    *,
    earlier: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The hidden states from which the output layer computes those logits, and more of a source's tokens.

    Args:
        model, sources, targets, slots: as of `target_logits`.
        earlier: for each row, positions in its source of K_i further tokens to predict, each (K_i,) int64 and > 0; they
            come before the row's target tokens. Only a decoder can predict them.

    Returns:
        (sum of K_i + T_i, D).
    """
    attached = attachment(model)
    more = [None] * len(sources) if earlier is None else earlier
    if attached.family.is_encoder_decoder:
        assert all(places is None for places in more), "an encoder-decoder predicts its target alone"
        shifted = [shift_right(model.config, row) for row in targets]
        return _encoder_decoder_hidden(model, sources, shifted, slots)[: sum(len(row) for row in targets)]
    rows = [torch.cat([source, target]) for source, target in zip(sources, targets, strict=True)]
    hidden = _hidden(model, rows, slots)
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    before = []  # the token before each target token predicts it
    for end, row, target, places in zip(ends, rows, targets, more, strict=True):
        if places is not None:
            before.append(places.cpu() + (end - len(row) - 1))
        before.append(torch.arange(end - len(target) - 1, end - 1))
    return hidden[to_device(torch.cat(before), hidden.device)]


def vocabulary_logits(model: Model, hidden: Tensor, slots: Sequence[int] | None = None) -> Tensor:
    """The output layer of a generator, as its own forward computes it: (N, D) -> (N, V).

    slots: a slot for each of the N; None: all take the attached adapter.
    """
    attached = attachment(model)
    layer = model.get_output_embeddings()
    assert layer is not None
    output = functools.partial(linear, layer)
    with set_context(attached.context, slots, None, masked={"output": [1] * len(hidden)}):
        logits: Tensor = attached.family.vocabulary(model, hidden, output)
    return logits


def targets_at_once(model: Model) -> int:
    """Target tokens whose logits are in memory at a time."""
    weight = model.get_input_embeddings().weight
    return TARGETS if weight.is_cpu else max(TARGETS, GPU_LOGITS // weight.shape[0])


def _hidden(model: Model, rows: Sequence[Tensor], slots: Sequence[int] | None, read: Tensor | None = None) -> Tensor:
    """Last hidden states of an encoder or a decoder: (N, D), or (B, D) of the tokens `read`."""
    attached = attachment(model)
    if attached.family.rows_alone:
        return _one_by_one(model, rows, slots)
    rows, slots = _padded_rows(rows, slots)
    lengths = [len(row) for row in rows]
    ids, settings = token_arguments(model, rows)
    positions = row_positions(lengths, attached.family.position_offset(model.config), ids.device)
    with set_context(attached.context, slots, {attached.family.kind: lengths}, in_body=True, read=read):
        return body_states(model, ids, positions, settings)


def body_states(model: Model, ids: Tensor, positions: Tensor, settings: dict[str, Tensor | bool]) -> Tensor:
    """Last hidden states of an encoder or a decoder: (N, D). ids: (1, N). positions: (N,). settings: as of `tokens`."""
    if attachment(model).family.decoder_only:
        settings = settings | {"use_cache": False}
    output = model.base_model(input_ids=ids, attention_mask=ready_mask(ids), position_ids=positions[None], **settings)
    return output[0][0]


def token_arguments(model: Model, rows: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor | bool]]:
    """The token ids (1, N) of rows, and the argument `token_type_ids` if one has segments and the base embeds them."""
    device = device_of(model)
    ids = to_device(torch.cat([row if row.ndim == 1 else row[:, 0] for row in rows])[None], device)
    if all(row.ndim == 1 for row in rows) or getattr(model.config, "type_vocab_size", 0) < 2:
        return ids, {}
    types = torch.cat([torch.zeros_like(row) if row.ndim == 1 else row[:, 1] for row in rows])
    return ids, {"token_type_ids": to_device(types[None], device)}


def _one_by_one(model: Model, rows: Sequence[Tensor], slots: Sequence[int] | None) -> Tensor:
    """Last hidden states of an encoder that keeps packed rows apart by nothing: (N, D)."""
    attached, parts = attachment(model), []
    for place, row in enumerate(rows):
        ids, settings = token_arguments(model, [row])  # (1, T)
        own, kind = None if slots is None else [slots[place]], attached.family.kind
        with set_context(attached.context, own, None, in_body=True, masked={kind: [len(row)]}, examples=[place]):
            parts.append(model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0][0])
    return torch.cat(parts)


def _encoder_decoder_hidden(
    model: Model, sources: Sequence[Tensor], targets: Sequence[Tensor], slots: Sequence[int] | None
) -> Tensor:
    """Last hidden states of the decoder: (M, D) for M target tokens."""
    attached = attachment(model)
    (sources, slots), (targets, _) = (
        _padded_rows(sources, slots, always=True),
        _padded_rows(targets, slots, always=True),
    )
    lengths = {"encoder": [len(row) for row in sources], "decoder": [len(row) for row in targets]}
    source, target = (to_device(torch.cat(list(rows))[None], device_of(model)) for rows in (sources, targets))
    with set_context(attached.context, slots, lengths, in_body=True):
        encoded = model.get_encoder()(input_ids=source, attention_mask=ready_mask(source))[0]  # (1, N, D)
        if attached.context.masks is not None:
            attached.context.masks.stream = "decoder"
        return decoder_states(model, target, encoded)


def decoder_states(model: Model, target: Tensor, encoded: Tensor) -> Tensor:
    """Last hidden states of an encoder-decoder's decoder: (M, D). target: (1, M) ids. encoded: (1, N, D)."""
    output = model.get_decoder()(
        input_ids=target,
        attention_mask=ready_mask(target),
        encoder_hidden_states=encoded,
        encoder_attention_mask=ready_mask(target),
        use_cache=False,
    )
    return output[0][0]


def _padded_rows(
    rows: Sequence[Tensor], slots: Sequence[int] | None, always: bool = False
) -> tuple[Sequence[Tensor], Sequence[int] | None]:
    """The rows and one more that rounds the number of tokens up, so that few shapes are computed; it is not read.

    always: at least one token more, so that both sides of an encoder-decoder have the same number of rows.
    """
    tokens = sum(len(row) for row in rows)
    missing = rounded_size(tokens + always, STEPS) - tokens
    if missing == 0:
        return rows, slots
    return [*rows, rows[-1].new_zeros(missing)], None if slots is None else [*slots, slots[-1]]


def ready_mask(ids: Tensor) -> Tensor:
    """A 4-dimensional mask, which transformers takes as it is: no (N, N) mask is built. `attention` makes its own."""
    return torch.zeros(1, 1, 1, 1, device=ids.device)


def pool_rows(pooling: Pooling, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """The vector of each row that a classifier reads: hidden (N, D) -> (B, D)."""
    ends = to_device(torch.tensor(lengths), hidden.device).cumsum(0)
    hidden = hidden[: sum(lengths)]
    if pooling == "last":
        return hidden[ends - 1]
    if pooling == "mean":
        return torch.stack([row.mean(0) for row in torch.split(hidden, list(lengths))])
    return hidden[ends - to_device(torch.tensor(lengths), hidden.device)]


def shift_right(config: ModelConfig, row: Tensor) -> Tensor:
    """The row as an encoder-decoder's decoder reads it: its start token first, the last token left out."""
    start = torch.full((1,), config.decoder_start_token_id, dtype=row.dtype, device=row.device)
    return torch.cat([start, row[:-1]])
