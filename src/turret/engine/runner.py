"""One unpadded mixed pass through the hooked base: rows that begin, and one token each of rows that go on.

Knows token ids, slots and lanes. Refuses to know requests, texts and who goes next. Rows that begin are sorted by slot
and lie one behind another; behind them lie the tokens of the rows that go on, in the order of their lanes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from turret.adapters import set_context
from turret.adapters.attached import detach
from turret.adapters.batch_context import BARE
from turret.adapters.fused.blocks import rounded
from turret.adapters.packed import STEPS, pool, ready_mask, shift_right, vocabulary_logits
from turret.bases import Base
from turret.engine.adapter_pool import AdapterPool
from turret.engine.cache import KeyValueCache, KVSlot, PassCache

SHORT_PASS, LONG_PASS = 512, 1024  # tokens
SMALL = 5000  # layers times width of an encoder that takes a long pass in the time that others take a short one


@dataclass(frozen=True)
class Prefill:
    """A row that begins: its tokens, its adapter, and where its keys and values are kept if it generates."""

    ids: Sequence[int]
    slot: int = BARE
    kv_slot: KVSlot | None = None  # None: a text to classify


@dataclass(frozen=True)
class DecodeStep:
    """A row that goes on with one token."""

    token: int
    slot: int
    kv_slot: KVSlot


@dataclass(frozen=True)
class Outcome:
    """What a pass gives, in the order it was asked."""

    classes: list[Tensor]  # a fresh row without a lane each: (C,) float32 on the CPU
    vocabulary: Tensor  # (fresh rows with a lane + steps, V) float32


class Runner:
    """A base with its hooks, its bank and its cache. `close` gives the base back as it was."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.model: Any = base.model
        self.adapter_pool = AdapterPool(self.model, base.family, base.fingerprint)
        self.cache = KeyValueCache(
            self.adapter_pool.attached.sites,
            torch.zeros((), dtype=self.adapter_pool.dtype, device=self.adapter_pool.device),
        )
        self.device = self.adapter_pool.device
        self._crossing = base.family.is_encoder_decoder

    def close(self) -> None:
        detach(self.model)

    def kv_slot(self, prompt: int, answer: int, slot: int) -> KVSlot:
        """A lane for a prompt of so many tokens and an answer of at most so many."""
        return self.cache.open(self.needs(prompt, answer, self.adapter_pool.prefix_length(slot)))

    def reserve(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """Room for the lanes of these that are about to begin: (prompt, answer, slot) each, as `lane` takes them."""
        self.cache.reserve(
            [self.needs(prompt, answer, self.adapter_pool.prefix_length(slot)) for prompt, answer, slot in rows]
        )

    def needs(self, prompt: int, answer: int, prefix: int = 0) -> dict[str, int]:
        """Tokens by group that a row holds at its end; the last token of an answer is never read."""
        if self._crossing:
            return {"decoder": prefix + answer, "cross": prefix + prompt}
        return {"decoder": prefix + prompt + answer - 1}

    @torch.inference_mode()
    def run(self, fresh: Sequence[Prefill], steps: Sequence[DecodeStep] = ()) -> Outcome:
        """One pass. A lane's lengths grow by what it was given; where the pass fails they stay as they were."""
        order = sorted(range(len(fresh)), key=lambda row: fresh[row].slot)
        rows = [fresh[row] for row in order]
        turns = sorted(range(len(steps)), key=lambda row: (id(steps[row].kv_slot.block), steps[row].kv_slot.index))
        going = [steps[row] for row in turns]
        hidden, lengths = (self._crossed if self._crossing else self._straight)(rows, going)
        self._grow(rows, going)
        return self._outcome(fresh, rows, order, turns, hidden, lengths)

    # --- the body -----------------------------------------------------------------------------------------------------

    def _straight(self, rows: Sequence[Prefill], going: Sequence[DecodeStep]) -> tuple[Tensor, list[int]]:
        """An encoder or a decoder: (hidden states (N, D), tokens a fresh row)."""
        family = self.base.family
        lengths = [len(row.ids) for row in rows]
        filler = _filler(sum(lengths) + len(going)) if rows else 0
        tokens = [token for row in rows for token in row.ids] + [0] * filler + [step.token for step in going]
        starts = [self._start(row.slot) for row in rows]
        offset = family.position_offset(self.model.config)
        positions = _positions([*lengths, filler], [*starts, 0], [self._at(step) for step in going], offset)
        ids = torch.tensor([tokens], device=self.device)
        kind = family.kind
        spans = [{"decoder": span} for span in _spans(lengths)]
        call: dict[str, Any] = {"use_cache": False} if family.decoder_only else {}
        with self._pass(rows, going, {kind: [*lengths, *([filler] if filler else [])]}, spans, {kind: positions}):
            output = self.model.base_model(
                input_ids=ids,
                attention_mask=ready_mask(ids),
                position_ids=positions.to(self.device)[None],
                **call,
            )
        return output[0][0], lengths

    def _crossed(self, rows: Sequence[Prefill], going: Sequence[DecodeStep]) -> tuple[Tensor, list[int]]:
        """An encoder-decoder: the decoder's hidden states (M, D), and its tokens a fresh row.

        A text to classify is read again by the decoder, shifted; a prompt starts with one token.
        """
        config = self.model.config
        sources = [list(row.ids) for row in rows]
        targets = [
            [config.decoder_start_token_id]
            if row.kv_slot is not None
            else shift_right(config, torch.tensor(ids)).tolist()
            for row, ids in zip(rows, sources, strict=True)
        ]
        counts = {"encoder": [len(each) for each in sources], "decoder": [len(each) for each in targets]}
        fills = {"encoder": 0, "decoder": 0}
        if rows:  # on both sides, so that each keeps as many rows as the other
            fills = {"encoder": _filler(sum(counts["encoder"]), always=True)}
            fills["decoder"] = _filler(sum(counts["decoder"]) + len(going), always=True)
        lengths = {stream: [*counts[stream], *([fill] if fill else [])] for stream, fill in fills.items()}
        spans = [
            {"encoder": encoder, "decoder": decoder}
            for encoder, decoder in zip(_spans(counts["encoder"]), _spans(counts["decoder"]), strict=True)
        ]
        starts = [self._start(row.slot) for row in rows]
        positions = {
            "encoder": _positions(lengths["encoder"], [0] * len(lengths["encoder"]), [], 0),
            "decoder": _positions(lengths["decoder"], [*starts, 0], [self._at(step) for step in going], 0),
        }
        target = [token for row in targets for token in row] + [0] * fills["decoder"] + [s.token for s in going]
        ids = torch.tensor([target], device=self.device)
        with self._pass(rows, going, lengths, spans, positions):
            if rows:
                tokens = [token for row in sources for token in row] + [0] * fills["encoder"]
                source = torch.tensor([tokens], device=self.device)
                encoded = self.model.get_encoder()(input_ids=source, attention_mask=ready_mask(source))[0]
            else:  # the sources are in the cache; the decoder still wants something to project
                encoded = torch.zeros(1, 1, config.hidden_size, dtype=self.adapter_pool.dtype, device=self.device)
            output = self.model.get_decoder()(
                input_ids=ids,
                attention_mask=ready_mask(ids),
                encoder_hidden_states=encoded,
                encoder_attention_mask=ready_mask(ids),
                use_cache=False,
            )
        return output[0][0], counts["decoder"]

    def _pass(
        self,
        rows: Sequence[Prefill],
        going: Sequence[DecodeStep],
        lengths: Mapping[str, Sequence[int]],
        spans: Sequence[Mapping[str, tuple[int, int]]],
        positions: Mapping[str, Tensor],
    ) -> Any:
        """Everything the hooks read, for the length of the pass."""
        count = max((len(each) for each in lengths.values()), default=0)
        slots = [row.slot for row in rows] + [BARE] * (count - len(rows))
        self.adapter_pool.begin(slots, lengths, [step.slot for step in going])
        tokens = {stream: sum(each) for stream, each in lengths.items()}
        kept = [(row.kv_slot, row.slot, span) for row, span in zip(rows, spans, strict=True)]
        cache = PassCache(self.adapter_pool, kept, tokens, [step.kv_slot for step in going], self.device)
        return _Routed(
            self.adapter_pool.attached.context,
            slots,
            lengths,
            cache,
            {s: p.to(self.device) for s, p in positions.items()},
        )

    def _start(self, slot: int) -> int:
        """The position of a row's first token: behind its prefix, where tokens look back; encoders are not shifted."""
        return self.adapter_pool.prefix_length(slot) if self.base.family.generates and self._shifts(slot) else 0

    def _shifts(self, slot: int) -> bool:
        loaded = self.adapter_pool.at(slot)
        return loaded is not None and loaded.length > 0

    def _at(self, step: DecodeStep) -> int:
        """The position of a row's next token."""
        shift = self._start(step.slot) - step.kv_slot.prefixes["decoder"]
        return step.kv_slot.lengths["decoder"] + shift

    def _grow(self, rows: Sequence[Prefill], going: Sequence[DecodeStep]) -> None:
        for row in rows:
            if row.kv_slot is None:
                continue
            for group in row.kv_slot.lengths:
                P = self._prefix(row.slot, group)
                own = len(row.ids) if group == "cross" or not self._crossing else 1
                row.kv_slot.prefixes[group], row.kv_slot.lengths[group] = P, P + own
        for step in going:
            step.kv_slot.lengths["decoder"] += 1

    def _prefix(self, slot: int, group: str) -> int:
        """P of a slot in one group; an encoder-decoder's prefix may leave some out."""
        loaded = self.adapter_pool.at(slot)
        return loaded.length if loaded is not None and group in loaded.prefix else 0

    # --- what comes of it ---------------------------------------------------------------------------------------------

    def _outcome(
        self,
        fresh: Sequence[Prefill],
        rows: Sequence[Prefill],
        order: Sequence[int],
        turns: Sequence[int],
        hidden: Tensor,
        lengths: Sequence[int],
    ) -> Outcome:
        classes: dict[int, Tensor] = {}
        if any(row.kv_slot is None for row in rows):
            pooled = pool(self.base.family.pooling(self.model.config), hidden, lengths)  # (fresh rows, D)
            places = [place for place, row in enumerate(rows) if row.kv_slot is None]
            logits = self.adapter_pool.logits([rows[place].slot for place in places], pooled[places])
            classes = {order[place]: row for place, row in zip(places, logits, strict=True)}
        ends = list(accumulate(lengths))
        last = {order[place]: ends[place] - 1 for place, row in enumerate(rows) if row.kv_slot is not None}
        wanted = [last[row] for row in sorted(last)]
        behind = hidden.shape[0] - len(turns)
        where = {row: behind + place for place, row in enumerate(turns)}
        wanted += [where[row] for row in range(len(turns))]
        vocabulary = torch.empty(0)
        if wanted:
            vocabulary = vocabulary_logits(self.model, hidden[torch.tensor(wanted, device=hidden.device)]).float()
        return Outcome([classes[row] for row in range(len(fresh)) if row in classes], vocabulary)


def pass_tokens(base: Base) -> int:
    """Tokens of one pass: enough to use the processor well, and no more, since others wait for its end."""
    config = base.model.config
    small = not base.family.generates and config.num_hidden_layers * config.hidden_size <= SMALL
    return LONG_PASS if small else SHORT_PASS


class _Routed:
    """The route of one pass, and the route as it was."""

    def __init__(self, context: Any, slots: Sequence[int], lengths: Any, cache: PassCache, positions: Any) -> None:
        self._route, self._cache, self._positions = context, cache, positions
        self._around = set_context(context, slots, lengths, in_body=True)

    def __enter__(self) -> None:
        self._around.__enter__()
        self._route.cache, self._route.positions = self._cache, self._positions

    def __exit__(self, *exception: Any) -> None:
        self._route.cache = self._route.positions = None
        self._route.adapter_pool.finish()
        self._around.__exit__(*exception)


def _filler(tokens: int, always: bool = False) -> int:
    """Tokens that round a pass up, so that few shapes are computed; always: at least one."""
    return rounded(tokens + always, STEPS) - tokens


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _positions(lengths: Sequence[int], starts: Sequence[int], behind: Sequence[int], offset: int) -> Tensor:
    """Rows counted each from its start, and single tokens: (N,) int64."""
    counted = [
        position for length, start in zip(lengths, starts, strict=False) for position in range(start, start + length)
    ]
    return torch.tensor([*counted, *behind], dtype=torch.long) + offset
