"""One forward pass through the hooked base: unpadded prefill rows, and one token for each decode row.

The tokens are in one row (1, N): first those of the prefill rows, sorted by slot, then those of the decode rows, in the
order of their KV slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from turret.adapters.batch_context import BARE, set_context
from turret.adapters.hooks import detach
from turret.adapters.packed import (
    body_states,
    decoder_states,
    pool_rows,
    ready_mask,
    shift_right,
    token_arguments,
    vocabulary_logits,
)
from turret.bases.base import Base, copy_modules
from turret.bases.device import gpu_memory
from turret.engine.adapter_pool import AdapterPool
from turret.engine.cache import KeyValueCache, KVSlot, PassCache
from turret.engine.request import Limits, common_prefix_length, limits_within
from turret.engine.sampler import TokenLogprobs, token_logprobs
from turret.engine.sequence import DecodeStep, Prefill, TextTokens
from turret.ops.core import to_device
from turret.ops.table import narrows_last_layer, ops_for
from turret.transformer import Model

SHORT_PASS, LONG_PASS = 512, 1024  # tokens
WIDTHS = 32  # of the base: what one token of a pass has in memory at a time
SCORES = 4  # of each row that decodes: the logits, and what choosing makes of them
GPU_PASS = 4096  # tokens: fewer leave a GPU waiting for launches
PROMPT_PASS = 4096  # tokens of one prompt in a pass: its memory grows with them
PROMPT_ROWS = 128  # tokens of a prompt whose scores are in memory at a time
SMALL = 5000  # layers times width of an encoder that gets long passes


@dataclass(frozen=True)
class _Path:
    """A row with one of its branches: what is read to score the branch. The last token of a branch is not read."""

    row: Prefill
    branch: Sequence[int]

    @cached_property
    def ids(self) -> list[int]:
        return [*self.row.ids, *self.branch[:-1]]

    def follows(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The places from `start` to `end` after which a token of the branch follows, and that token."""
        first = len(self.row.ids) - 1
        for place in range(max(start, first), end):
            yield place, self.branch[place - first]


@dataclass(frozen=True)
class Outcome:
    """The outputs of a pass, in the order of its inputs."""

    classes: list[Tensor]  # (C,) float32 on the CPU for each text to classify, or (K, C) of its tokens that are read
    embeddings: list[Tensor]  # (D,) float32 on the CPU for each text to embed
    vocabulary: Tensor  # (prefill rows with a KV slot + decode rows, V) float32
    prompts: dict[int, list[TokenLogprobs]]  # by place among the prefill rows with a KV slot: tokens after the first
    scores: list[list[float]] = field(default_factory=list)  # of each row with branches, the log-probability of each


class _Shared(NamedTuple):
    """The rows that pass through the lower layers, for each row of the pass which of them it is, and the first layer
    that all rows pass through.
    """

    rows: list[Prefill]
    row: list[int]
    layers: int


class _States(NamedTuple):
    """The last hidden states of a pass.

    Args:
        hidden: (N, D), of the only stack or of the decoder.
        lengths: Tokens of each prefill row in `hidden`.
        read: (M, D), of the stack that reads a text: the encoder if there is one. What is embedded.
        read_lengths: Tokens of each prefill row in `read`.
    """

    hidden: Tensor
    lengths: list[int]
    read: Tensor
    read_lengths: list[int]


class Runner:
    """A base with its hooks, its adapters and its KV cache."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.model: Model = base.model
        bare = copy_modules(base.model) if base.family.decoder_only else None  # computes what virtual tokens say
        self.adapter_pool = AdapterPool(self.model, base.family, base.fingerprint)
        self.adapter_pool.attached.spare = None if bare is None else lambda: bare
        self.cache = KeyValueCache(
            self.adapter_pool.attached.sites,
            torch.zeros((), dtype=self.adapter_pool.dtype, device=self.adapter_pool.device),
        )
        self.device = self.adapter_pool.device
        self._is_encoder_decoder = base.family.is_encoder_decoder
        self._offset = base.family.position_offset(self.model.config)
        self._pooling = base.family.pooling(self.model.config)  # of a text to classify
        windowed = any(base.family.window(site.module) is not None for site in self.adapter_pool.attached.sites)
        self._cuts = base.family.decoder_only and not windowed  # whether a prompt may take several passes

    def close(self) -> None:
        """Remove the hooks from the base."""
        detach(self.model)

    def within(self, limits: Limits) -> Limits:
        """The limits that this base's GPU has memory for; on a CPU as they are."""
        if self.device.type != "cuda":
            return limits
        config, size = self.model.config, self.adapter_pool.dtype.itemsize
        tokens = limits.batch_tokens or pass_tokens(self.base)
        scores = SCORES * 4 * limits.running * self.model.get_input_embeddings().weight.shape[0]
        pass_bytes = WIDTHS * config.hidden_size * size * tokens + scores
        return limits_within(limits, gpu_memory(self.device)[0], self.cache.token_bytes, pass_bytes)

    def make_room(self) -> None:
        """Free what no row needs now: memory ran out."""
        self.adapter_pool.free_decoding()
        self.cache.free_empty()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def kv_slot(self, prompt: int, answer: int, slot: int) -> KVSlot:
        """A KV slot for a prompt of so many tokens and an answer of at most so many. slot: of the adapter."""
        return self.cache.open(self.needs(prompt, answer, self.adapter_pool.prefix_length(slot)))

    def reserve(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """Make room for the KV slots of rows that begin next: (prompt, answer, slot) each, as in `kv_slot`."""
        if rows:
            self.cache.reserve(
                [self.needs(prompt, answer, self.adapter_pool.prefix_length(slot)) for prompt, answer, slot in rows]
            )

    def needs(self, prompt: int, answer: int, prefix: int = 0) -> dict[str, int]:
        """Tokens in the cache at the end of a row, by group. The last token of an answer is never stored."""
        if self._is_encoder_decoder:
            return {"decoder": prefix + answer, "cross": prefix + prompt}
        return {"decoder": prefix + prompt + answer - 1}

    @torch.inference_mode()
    def run(self, prefill: Sequence[Prefill], steps: Sequence[DecodeStep] = ()) -> Outcome:
        """Run one pass. The lengths of the KV slots grow by their new tokens, unless the pass fails.

        A prompt beyond PROMPT_PASS takes several passes: the last of them is this one.
        """
        scored = [row for row in prefill if row.branches]
        scores = self._scores(scored) if scored else []
        prefill = [self._begin_prompt(row) for row in prefill if not row.branches]
        if not prefill and not steps:
            return Outcome([], [], torch.empty(0), {}, scores)
        order = sorted(range(len(prefill)), key=lambda row: prefill[row].slot)
        rows = [prefill[row] for row in order]
        step_order = sorted(range(len(steps)), key=lambda row: (id(steps[row].kv_slot.block), steps[row].kv_slot.index))
        sorted_steps = [steps[row] for row in step_order]
        bodies, body = self._bodies(rows)
        states = self._body(bodies, sorted_steps)
        self._grow(rows, sorted_steps)
        return replace(self._outcome(prefill, steps, rows, order, step_order, states, body), scores=scores)

    def _scores(self, rows: Sequence[Prefill]) -> list[list[float]]:
        """Score branches, log p(branch | row) of each branch of each row. What they have in common is read once.

        A pass reads nodes of the tree whose nodes above are read. Those with children have a KV slot until the end.
        """
        paths = [_Path(row, branch) for row in rows for branch in row.branches]
        slots = [path.row.slot for path in paths]
        found, opened = [0.0] * len(paths), list[KVSlot]()
        waiting: list[tuple[Node, KVSlot | None]] = [
            (node, None) for node in token_tree([path.ids for path in paths], slots, shared=self._cuts)
        ]
        try:
            while waiting:
                totals = accumulate(len(node.ids) for node, _ in waiting)
                count = max(1, sum(total <= PROMPT_PASS for total in totals))
                part = sorted(waiting[:count], key=lambda each: slots[each[0].rows[0]])
                reads = [self._node(node, slots[node.rows[0]], source, opened) for node, source in part]
                hidden = self._body(reads, []).hidden
                self._grow(reads, [])
                self._score([node for node, _ in part], paths, hidden, found)
                below = zip(part, reads, strict=True)
                waiting = waiting[count:] + [
                    (child, read.kv_slot) for (node, _), read in below for child in node.children
                ]
        finally:
            for each in opened:
                self.cache.close(each)
        scores = iter(found)
        return [[next(scores) for _ in row.branches] for row in rows]

    def _node(self, node: Node, slot: int, source: KVSlot | None, opened: list[KVSlot]) -> Prefill:
        """The row of a node. source: has what is before it. opened: gets the KV slot of a node with children."""
        if not node.children:
            return Prefill(node.ids, slot, source, earlier=node.start, keeps=False)
        kv_slot = self.cache.open({"decoder": self.adapter_pool.prefix_length(slot) + node.end})
        opened.append(kv_slot)
        if source is not None:
            kv_slot.follow(source)
        return Prefill(node.ids, slot, kv_slot, earlier=node.start)

    def _score(self, nodes: Sequence[Node], paths: Sequence[_Path], hidden: Tensor, found: list[float]) -> None:
        """Add the log-probabilities of the tokens that follow those of a level. hidden: (N, D), of all its nodes."""
        follows: dict[int, list[tuple[int, int]]] = {}  # by place in `hidden`: (path, token that follows)
        first = 0
        for node in nodes:
            for number in node.rows:
                for place, token in paths[number].follows(node.start, node.end):
                    follows.setdefault(first + place - node.start, []).append((number, token))
            first += len(node.ids)
        places = sorted(follows)
        for start in range(0, len(places), PROMPT_ROWS):
            part = places[start : start + PROMPT_ROWS]
            slots = [paths[follows[place][0][0]].row.slot for place in part]
            read = hidden[to_device(torch.tensor(part), hidden.device)]
            logprobs = vocabulary_logits(self.model, read, slots).float().log_softmax(-1)
            asked = [(row, number, token) for row, place in enumerate(part) for number, token in follows[place]]
            index = to_device(torch.tensor([(row, token) for row, _, token in asked]), hidden.device)
            for (_, number, _), value in zip(asked, logprobs[index[:, 0], index[:, 1]].tolist(), strict=True):
                found[number] += value

    def _begin_prompt(self, row: Prefill) -> Prefill:
        """What is left of a prompt for its last pass. The passes before it run here, each of one part of the prompt."""
        if not self._cuts or row.kv_slot is None or row.logprobs is not None or len(row.ids) <= PROMPT_PASS:
            return row
        row.kv_slot.lengths = dict.fromkeys(row.kv_slot.lengths, 0)  # this may be another try
        parts = [
            replace(row, ids=row.ids[start : start + PROMPT_PASS], earlier=start)
            for start in range(0, len(row.ids), PROMPT_PASS)
        ]
        for part in parts[:-1]:
            self._body([part], [])
            self._grow([part], [])
        return parts[-1]

    # --- the body -----------------------------------------------------------------------------------------------------

    def _bodies(self, rows: Sequence[Prefill]) -> tuple[list[Prefill], list[int]]:
        """The rows that pass through the body, and for each row which of them it is.

        Rows with the same tokens share one if their adapters have only a head, which reads the bare base.
        """
        bodies: list[Prefill] = []
        body: list[int] = []
        known: dict[TextTokens, int] = {}
        for row in rows:
            place = len(bodies)
            if row.classifies and self.adapter_pool.is_bare(row.slot):
                place = known.setdefault(row.text, place)
            if place == len(bodies):
                bodies.append(row)
            body.append(place)
        return bodies, body

    def _shared_rows(self, rows: Sequence[Prefill], steps: Sequence[DecodeStep]) -> _Shared | None:
        """What rows with the same tokens share, because their adapters change only layers above."""
        pool, groups = self.adapter_pool, dict[TextTokens, list[int]]()
        if steps or not pool.layers or any(not row.classifies for row in rows):
            return None
        for place, row in enumerate(rows):
            if pool.first_layer(row.slot) > 0:
                groups.setdefault(row.text, []).append(place)
        several = [places for places in groups.values() if len(places) > 1]
        if not several:
            return None
        number = {place: own for own, places in enumerate(several) for place in places}
        lower = [replace(rows[places[0]], slot=BARE) for places in several]
        for place, row in enumerate(rows):
            if place not in number:
                number[place] = len(lower)
                lower.append(row)
        first = min(pool.first_layer(rows[place].slot) for places in several for place in places)
        return _Shared(lower, [number[place] for place in range(len(rows))], first)

    def _body(self, rows: Sequence[Prefill], steps: Sequence[DecodeStep]) -> _States:
        if self.base.family.rows_alone:
            return self._one_by_one(rows)
        return (self._encoder_decoder if self._is_encoder_decoder else self._single_stack)(rows, steps)

    def _one_by_one(self, rows: Sequence[Prefill]) -> _States:
        """An encoder that computes its attention itself: one call of the body for each row."""
        parts, kind = [], self.base.family.kind
        for row in rows:
            ids, settings = token_arguments(self.model, [row.row])  # (1, T)
            with self._pass([row], [], {kind: [len(row.ids)]}, [{}], {}):
                parts.append(
                    self.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0][0]
                )
        hidden, lengths = torch.cat(parts), [len(row.ids) for row in rows]
        return _States(hidden, lengths, hidden, lengths)

    def _single_stack(self, rows: Sequence[Prefill], steps: Sequence[DecodeStep]) -> _States:
        """An encoder or a decoder."""
        kind, shared = self.base.family.kind, self._shared_rows(rows, steps)
        lower = rows if shared is None else shared.rows
        ids, call = self._tokens(lower, steps)
        lengths = [len(row.ids) for row in rows]
        read = self._read(rows, steps, lengths)
        counts = [len(row.ids) for row in lower]
        starts = [self._start(row.slot) + row.earlier for row in lower]
        positions = _positions(counts, starts, [self._next_position(step) for step in steps], self._offset)
        spans = [{"decoder": span} for span in _spans(counts)]
        with self._pass(lower, steps, {kind: counts}, spans, {kind: positions}, read), self._widening(rows, shared):
            hidden = body_states(self.model, ids, to_device(positions, self.device), call)
        lengths = lengths if read is None else [1] * len(lengths)
        return _States(hidden, lengths, hidden, lengths)

    @contextmanager
    def _widening(self, rows: Sequence[Prefill], shared: _Shared | None) -> Iterator[None]:
        """From the first layer that rows do not share, the pass has all of them."""
        if shared is None:
            yield
            return
        spans = _spans([len(row.ids) for row in shared.rows])
        index = to_device(torch.tensor([token for own in shared.row for token in range(*spans[own])]), self.device)
        pool, slots = self.adapter_pool, [row.slot for row in rows]
        lengths: dict[str, tuple[int, ...]] = {self.base.family.kind: tuple(len(row.ids) for row in rows)}

        def widen(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            context = pool.attached.context
            context.slots, context.lengths, context.memo = tuple(slots), lengths, {}
            pool.begin(slots, lengths, [])
            return given[0].index_select(1, index), *given[1:]  # (1, tokens of the shared rows, D) -> (1, N, D)

        hook = pool.layers[shared.layers].register_forward_pre_hook(widen)
        try:
            yield
        finally:
            hook.remove()

    def _read(self, rows: Sequence[Prefill], steps: Sequence[DecodeStep], lengths: Sequence[int]) -> Tensor | None:
        """(B,) int64, the only tokens that a pass of texts to classify reads, if its last layer computes them alone."""
        others = any(row.kv_slot is not None or row.pooling is not None or row.read is not None for row in rows)
        if (
            steps
            or others
            or self._pooling != "first"
            or not self.adapter_pool.attached.narrows
            or not narrows_last_layer()
        ):
            return None
        if sum(lengths) <= ops_for(self.model.get_input_embeddings().weight).few_for_layers():
            return None  # one call of a kernel computes all layers
        return to_device(torch.tensor([start for start, _ in _spans(lengths)]), self.device)

    def _tokens(self, rows: Sequence[Prefill], steps: Sequence[DecodeStep]) -> tuple[Tensor, dict[str, Tensor | bool]]:
        """The ids (1, N) of a pass, and the argument of its segments if it has any."""
        new = [step.token for step in steps]
        if all(row.segments is None for row in rows):
            return to_device(torch.tensor([[token for row in rows for token in row.ids] + new]), self.device), {}
        return token_arguments(self.model, [*[row.row for row in rows], torch.tensor(new, dtype=torch.long)])

    def _encoder_decoder(self, rows: Sequence[Prefill], steps: Sequence[DecodeStep]) -> _States:
        """The decoder reads a text to classify again, shifted right. For any other row it starts with one token."""
        config = self.model.config
        sources = [list(row.ids) for row in rows]
        targets = [
            [config.decoder_start_token_id]
            if row.kv_slot is not None or row.pooling is not None
            else shift_right(config, torch.tensor(ids)).tolist()
            for row, ids in zip(rows, sources, strict=True)
        ]
        lengths = {"encoder": [len(each) for each in sources], "decoder": [len(each) for each in targets]}
        spans = [
            {"encoder": encoder, "decoder": decoder}
            for encoder, decoder in zip(_spans(lengths["encoder"]), _spans(lengths["decoder"]), strict=True)
        ]
        starts = [self._start(row.slot) for row in rows]
        positions = {
            "encoder": _positions(lengths["encoder"], [0] * len(lengths["encoder"]), [], 0),
            "decoder": _positions(lengths["decoder"], starts, [self._next_position(step) for step in steps], 0),
        }
        target = [token for row in targets for token in row] + [step.token for step in steps]
        ids = to_device(torch.tensor([target]), self.device)
        with self._pass(rows, steps, lengths, spans, positions):
            if rows:
                source = to_device(torch.tensor([[token for row in sources for token in row]]), self.device)
                encoded = self.model.get_encoder()(input_ids=source, attention_mask=ready_mask(source))[0]
            else:  # the sources are in the cache, but the decoder still projects an encoder output
                encoded = torch.zeros(1, 1, config.hidden_size, dtype=self.adapter_pool.dtype, device=self.device)
            hidden = decoder_states(self.model, ids, encoded)
        return _States(hidden, lengths["decoder"], encoded[0], lengths["encoder"])

    @contextmanager
    def _pass(
        self,
        rows: Sequence[Prefill],
        steps: Sequence[DecodeStep],
        lengths: Mapping[str, Sequence[int]],
        spans: Sequence[Mapping[str, tuple[int, int]]],
        positions: Mapping[str, Tensor],
        read: Tensor | None = None,
    ) -> Iterator[None]:
        """Set what the hooks read, for the length of the pass."""
        counts = {stream: sum(each) for stream, each in lengths.items()}
        begun = {-1 - place: row.kv_slot for place, row in enumerate(rows) if row.earlier and row.kv_slot is not None}
        slots = [-1 - place if row.earlier else row.slot for place, row in enumerate(rows)]
        kept = [row.kv_slot if row.keeps else None for row in rows]
        prefill = list(zip(kept, slots, spans, strict=True))
        self.adapter_pool.begin([row.slot for row in rows], lengths, [step.slot for step in steps], begun)
        context = self.adapter_pool.attached.context
        with set_context(context, slots, lengths, in_body=True, read=read):
            if steps or any(kv_slot is not None for kv_slot in kept):
                own = [step.kv_slot for step in steps]
                context.cache = PassCache(self.adapter_pool, prefill, counts, own, self.device)
            context.positions = {stream: to_device(each, self.device) for stream, each in positions.items()}
            try:
                yield
            finally:
                context.cache = context.positions = None
                self.adapter_pool.finish()

    def _start(self, slot: int) -> int:
        """The position of a row's first token: after its prefix in a causal model, 0 in an encoder."""
        return self.adapter_pool.prefix_length(slot) if self.base.family.causal else 0

    def _next_position(self, step: DecodeStep) -> int:
        """The position of a row's next token."""
        shift = self._start(step.slot) - step.kv_slot.prefixes["decoder"]
        return step.kv_slot.lengths["decoder"] + shift

    def _grow(self, rows: Sequence[Prefill], steps: Sequence[DecodeStep]) -> None:
        """Count the new tokens of the KV slots."""
        for row in rows:
            if row.kv_slot is None or not row.keeps:
                continue
            for group in row.kv_slot.lengths:
                P = row.kv_slot.lengths[group] if row.earlier else self._prefix(row.slot, group)
                tokens = len(row.ids) if group == "cross" or not self._is_encoder_decoder else 1
                row.kv_slot.lengths[group] = P + tokens
                if not row.earlier:
                    row.kv_slot.prefixes[group] = P
        for step in steps:
            step.kv_slot.lengths["decoder"] += 1

    def _prefix(self, slot: int, group: str) -> int:
        """P of a slot in one group; an encoder-decoder's prefix may not cover all groups."""
        loaded = self.adapter_pool.at(slot)
        return loaded.prefix_length if loaded is not None and group in loaded.prefix else 0

    # --- the outputs --------------------------------------------------------------------------------------------------

    def _outcome(
        self,
        prefill: Sequence[Prefill],
        steps: Sequence[DecodeStep],
        rows: Sequence[Prefill],
        order: Sequence[int],
        step_order: Sequence[int],
        states: _States,
        body: Sequence[int],
    ) -> Outcome:
        hidden, ends = states.hidden, list(accumulate(states.lengths))
        starts = [0, *ends]
        classes: dict[int, Tensor] = {}
        places = [place for place, row in enumerate(rows) if row.kv_slot is None and row.pooling is None]
        if texts := [place for place in places if rows[place].read is None]:
            pooled = pool_rows(self._pooling, hidden, states.lengths)  # (bodies, D)
            slots, counts = [rows[place].slot for place in texts], [1] * len(texts)
            logits = self.adapter_pool.logits("classify", slots, counts, pooled[[body[place] for place in texts]])
            classes = {order[place]: row[0] for place, row in zip(texts, logits, strict=True)}
        if tagged := [(place, own) for place in places if (own := rows[place].read) is not None]:
            index = [starts[body[place]] + token for place, taken in tagged for token in taken]
            slots, counts = [rows[place].slot for place, _ in tagged], [len(taken) for _, taken in tagged]
            read = hidden[to_device(torch.tensor(index, dtype=torch.long), hidden.device)]  # blank texts have no word
            logits = self.adapter_pool.logits("tag", slots, counts, read)
            classes |= {order[place]: row for (place, _), row in zip(tagged, logits, strict=True)}
        vectors = {order[place]: row for place, row in self._pooled_states(rows, states, body).items()}
        last = {order[place]: ends[body[place]] - 1 for place, row in enumerate(rows) if row.kv_slot is not None}
        tokens = [last[row] for row in sorted(last)]
        first_step = hidden.shape[0] - len(step_order)
        step_token = {row: first_step + place for place, row in enumerate(step_order)}
        tokens += [step_token[row] for row in range(len(step_order))]
        slots = [prefill[row].slot for row in sorted(last)] + [step.slot for step in steps]
        vocabulary = torch.empty(0)
        if tokens:
            read = hidden[to_device(torch.tensor(tokens), hidden.device)]
            vocabulary = vocabulary_logits(self.model, read, slots).float()
        first = {row: starts[own] for row, own in zip(order, body, strict=True)}
        prompts = {
            place: self._prompt_logprobs(prefill[row], hidden[first[row] : last[row]], count)
            for place, row in enumerate(sorted(last))
            if (count := prefill[row].logprobs) is not None
        }
        numbers = range(len(prefill))
        return Outcome(
            [classes[row] for row in numbers if row in classes],
            [vectors[row] for row in numbers if row in vectors],
            vocabulary,
            prompts,
        )

    def _pooled_states(self, rows: Sequence[Prefill], states: _States, body: Sequence[int]) -> dict[int, Tensor]:
        """The pooled hidden states (D,) of each row to embed, by its place, float32 on the CPU."""
        found: dict[int, Tensor] = {}
        for pooling in {row.pooling for row in rows if row.pooling is not None}:
            places = [place for place, row in enumerate(rows) if row.pooling == pooling]
            own = [body[place] for place in places]
            pooled = pool_rows(pooling, states.read.float(), states.read_lengths)[own].cpu()  # (B, D)
            found |= dict(zip(places, pooled, strict=True))
        return found

    def _prompt_logprobs(self, row: Prefill, hidden: Tensor, count: int) -> list[TokenLogprobs]:
        """The logprobs of a prompt's tokens after the first. hidden: (T - 1, D), before each of them."""
        found: list[TokenLogprobs] = []
        for start in range(0, len(hidden), PROMPT_ROWS):
            part = hidden[start : start + PROMPT_ROWS]
            logprobs = vocabulary_logits(self.model, part, [row.slot] * len(part)).float().log_softmax(-1)
            tokens = row.ids[start + 1 : start + 1 + len(part)]
            found += [token_logprobs(each, token, count) for each, token in zip(logprobs, tokens, strict=True)]
        return found


def pass_tokens(base: Base) -> int:
    """The default `batch_tokens`: enough to use the processor well, and no more, because other requests wait."""
    config = base.model.config
    if base.model.device.type == "cuda":
        return GPU_PASS
    small = not base.family.causal and config.num_hidden_layers * config.hidden_size <= SMALL
    return LONG_PASS if small else SHORT_PASS


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _positions(lengths: Sequence[int], starts: Sequence[int], steps: Sequence[int], offset: int) -> Tensor:
    """Positions of all tokens, (N,) int64: each row counts from its start, then come those of the decode rows."""
    counted = [
        position for length, start in zip(lengths, starts, strict=True) for position in range(start, start + length)
    ]
    return torch.tensor([*counted, *steps], dtype=torch.long) + offset


# --- a tree of tokens -------------------------------------------------------------------------------------------------
# What rows have in common at their start is one node, and is read once.


LEAST = 32  # tokens that a node saves: a pass of its own costs about as much


@dataclass(eq=False)
class Node:
    """Tokens that rows have in common.

    Args:
        ids: the tokens.
        start: how many tokens its rows have before them, in the nodes above.
        rows: the numbers of its rows.
        children: what its rows have after them.
    """

    ids: Sequence[int]
    start: int
    rows: Sequence[int]
    children: list[Node] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


def token_tree(rows: Sequence[Sequence[int]], slots: Sequence[int], *, shared: bool = True) -> list[Node]:
    """The topmost nodes, by slot. Each row is the tokens of one path.

    Args:
        rows: one token or more each.
        slots: the adapter's slot of each row: only rows of one slot have a node in common.
        shared: False: each row is a node of its own.
    """
    order = sorted(range(len(rows)), key=lambda row: (slots[row], rows[row]))
    if not shared:
        return [Node(rows[row], 0, [row]) for row in order]
    own = (list(each) for _, each in groupby(order, key=slots.__getitem__))
    return [node for each in own for node in _nodes(rows, each, 0, 0)]


def _nodes(rows: Sequence[Sequence[int]], own: Sequence[int], start: int, known: int) -> Iterator[Node]:
    """The nodes of some sorted rows after `start`. known: how many tokens they are known to have in common."""
    first, last = rows[own[0]], rows[own[-1]]
    end = known + common_prefix_length(first[known:], last[known:])
    if len(own) == 1 or (len(own) - 1) * (end - start) >= LEAST:
        going = [row for row in own if len(rows[row]) > end]
        children = [child for part in _parts(rows, going, end) for child in _nodes(rows, part, end, end)]
        yield Node(first[start:end], start, own, children)
        return
    ended = [row for row in own if len(rows[row]) == end]
    if ended:
        yield Node(first[start:end], start, ended)
    for part in _parts(rows, own[len(ended) :], end):
        yield from _nodes(rows, part, start, end)


def _parts(rows: Sequence[Sequence[int]], own: Iterable[int], place: int) -> Iterator[list[int]]:
    """The sorted rows by their token at a place."""
    return (list(each) for _, each in groupby(own, key=lambda row: rows[row][place]))
