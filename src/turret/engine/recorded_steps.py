"""A decoding step of a base as a CUDA graph: what such a step reads that changes from one to the next."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from turret.adapters.fused.card_decoder import BY_PROGRAMS
from turret.adapters.packed import ready_mask
from turret.card_kernels import real_card
from turret.engine.adapter_pool import AdapterPool
from turret.engine.cache import PassCache
from turret.engine.decode_graphs import DecodeGraphs
from turret.transformer import Model


class RecordedSteps:
    """The decoding steps of one base; without a card that computes by its programs, none is recorded."""

    def __init__(self, model: Model, pool: AdapterPool) -> None:
        self._model, self._pool = model, pool
        self.graphs = DecodeGraphs()

    @property
    def possible(self) -> bool:
        """Whether a step may be a graph: on a card, by its programs, without modules of adapters."""
        return self._pool.by_programs and real_card(self._pool.device) and not self._pool.scales

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The hidden states (B, D) of a decoding step, by a graph if there is one. ids: (1, B); positions: (B,)"""
        pool, context = self._pool, self._pool.attached.context
        cache, mixed = context.cache, pool.mixed
        assert isinstance(cache, PassCache)
        changing = cache.changing("decoder")

        def body(inputs: Sequence[Tensor]) -> Tensor:
            ids, positions, *others = inputs
            context.positions = {"decoder": positions}
            cache.use("decoder", others[: len(changing)])
            pool.mixed = None if mixed is None else mixed.with_changing(others[len(changing) :])
            output = self._model.base_model(
                input_ids=ids, attention_mask=ready_mask(ids), position_ids=positions[None], use_cache=False
            )
            hidden: Tensor = output[0][0]
            return hidden

        layers = self._model.config.num_hidden_layers
        adapters = None if mixed is None else (len(mixed.flats), mixed.most)
        inputs = [ids, positions, *changing, *([] if mixed is None else mixed.changing)]
        recordable = lambda: context.memo.get(BY_PROGRAMS) == layers
        return self.graphs.run((cache.places("decoder"), adapters), inputs, body, recordable)
