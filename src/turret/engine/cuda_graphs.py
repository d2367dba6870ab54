"""Decoding steps as CUDA graphs: the launches of a whole step are recorded once, and then started by one call.

A graph reads and writes fixed places of memory. So it belongs to a number of rows, to the tensors of their KV cache and
to a number of adapters; what differs from step to step is copied into the places that it reads. It is recorded when a
step of one kind comes a second time, and its first result must equal the step without it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turret.adapters.layers import RECORDED
from turret.adapters.packed import ready_mask
from turret.engine.adapter_pool import AdapterPool
from turret.engine.cache import PassCache
from turret.ops.copies import real_gpu
from turret.ops.mixed_lora import GpuRows
from turret.transformer import Model

log = logging.getLogger("turret")

MOST = 32  # graphs that are kept; each holds the activations of one step
ALLOWED = 1e-2  # difference from the step without a graph, of its largest number

Body = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class _Recorded:
    """A graph, the places that it reads, and where its result is."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.output


class CudaGraphs:
    """The recorded steps of one base on one GPU."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._latest: Hashable = None
        self.off: str | None = None  # why no step is recorded any more

    def run(self, key: Hashable, inputs: Sequence[Tensor], body: Body, recordable: Callable[[], bool]) -> Tensor:
        """body(inputs), by a graph if there is one.

        Args:
            key: equal for steps that compute the same with other inputs, in the same places of memory.
            inputs: what may differ between such steps, each of the same shape.
            body: reads nothing else that changes, and makes no copy from or to the CPU.
            recordable: whether that was true of the latest call of `body`.

        Returns:
            The result; it may be overwritten by the next step.
        """
        if (known := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return known.run(inputs)
        again, self._latest = key == self._latest, key
        eager = body(inputs)
        if not again or self.off is not None or not recordable():
            return eager
        try:
            recorded = _record(inputs, body)
            difference = float((recorded.run(inputs) - eager).abs().max() / eager.abs().max())
        except RuntimeError as error:  # an operation that cannot be recorded
            return self._without(f"{type(error).__name__}: {error}".partition("\n")[0], eager)
        if not difference <= ALLOWED:
            return self._without(f"a graph differs from its step by {difference:.1e} of its largest number", eager)
        self._kept[key] = recorded
        while len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return eager

    @property
    def recorded(self) -> int:
        """How many graphs there are."""
        return len(self._kept)

    def clear(self) -> None:
        """Forget all graphs: tensors that they read are about to go."""
        self._kept.clear()
        self._latest = None

    def _without(self, reason: str, eager: Tensor) -> Tensor:
        self.off = reason
        self._kept.clear()
        log.warning("decoding goes on without CUDA graphs: %s", reason)
        return eager


def _record(inputs: Sequence[Tensor], body: Body) -> _Recorded:
    places = [each.clone() for each in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up at their first call on a stream
        body(places)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: another engine on this GPU may allocate memory meanwhile, from its own thread.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = body(places)
    return _Recorded(graph, places, output)


# --- recorded steps ---------------------------------------------------------------------------------------------------
# A decoding step of a base as a CUDA graph: what such a step reads that changes from one to the next.


class RecordedSteps:
    """The decoding steps of one base; without a GPU that computes by its programs, none is recorded."""

    def __init__(self, model: Model, pool: AdapterPool) -> None:
        self._model, self._pool = model, pool
        self.graphs = CudaGraphs()

    @property
    def possible(self) -> bool:
        """Whether a step may be a graph: on a GPU, by its programs, without modules of adapters."""
        return self._pool.by_programs and real_gpu(self._pool.device) and not self._pool.scales

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The hidden states (B, D) of a decoding step, by a graph if there is one. ids: (1, B); positions: (B,)"""
        pool, context = self._pool, self._pool.attached.context
        cache, rows = context.cache, pool.rows("decoder")
        mixed = rows.mixed if isinstance(rows, GpuRows) else None
        assert isinstance(cache, PassCache)
        changing = cache.changing("decoder")

        def body(inputs: Sequence[Tensor]) -> Tensor:
            ids, positions, *others = inputs
            context.positions = {"decoder": positions}
            cache.use("decoder", others[: len(changing)])
            if isinstance(rows, GpuRows) and mixed is not None:
                rows.mixed = mixed.with_changing(others[len(changing) :])
            output = self._model.base_model(
                input_ids=ids, attention_mask=ready_mask(ids), position_ids=positions[None], use_cache=False
            )
            hidden: Tensor = output[0][0]
            return hidden

        layers = self._model.config.num_hidden_layers
        adapters = None if mixed is None else (len(mixed.flats), mixed.most)
        inputs = [ids, positions, *changing, *([] if mixed is None else mixed.changing)]
        recordable = lambda: context.memo.get(RECORDED) == layers
        return self.graphs.run((cache.places("decoder"), adapters), inputs, body, recordable)
