"""A stored version, read back from its bundle onto a freshly loaded base; the bare base is beside it in the same model.

Knows turret by its public names only; what is measured with it is the benchmarks' business.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turret import adapters, bases, bundles
from turret.data import Labelled, Pair
from turret.store import Store
from turret.tasks import task_from_spec
from turret.train import evaluate

BARE, VERSION = 0, 1  # slots


@dataclass(frozen=True)
class Reloaded:
    """`task` as the bundle has it; slot BARE of the model answers as the base, slot VERSION as the adapter."""

    model: Any
    task: Any
    tokenizer: Any

    @classmethod
    def read(cls, store: Path, reference: str, dtype: str = "auto") -> Reloaded:
        """Copy the bundle out of the store, read it, and mount it."""
        with tempfile.TemporaryDirectory() as folder:
            Store(store).materialize(reference, Path(folder, "bundle"))
            adapter = bundles.read_bundle(Path(folder, "bundle"))
        kind = "classify" if adapter.task["kind"] == "classify" else "generate"
        labels = len(adapter.task["labels"]) if kind == "classify" else None
        base = bases.load(adapter.base.id, task=kind, num_labels=labels, dtype=dtype)
        adapters.mount(base.model, adapter, slot=VERSION, fingerprint=base.fingerprint)
        return cls(base.model, task_from_spec(adapter.task, base.tokenizer), base.tokenizer)

    def metrics(self, examples: Sequence[Labelled | Pair], slot: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Of all examples together, and the answers one by one; texts are generated with the cache."""
        return evaluate(self.model, self.task, examples, slot=slot)

    def losses(self, pairs: Sequence[Pair], slot: int) -> list[float]:
        """The mean loss per target token of every pair."""
        return [evaluate(self.model, self.task, [pair], texts=False, slot=slot)[0]["loss"] for pair in pairs]

    def target_tokens(self, pairs: Sequence[Pair]) -> list[int]:
        """How many tokens the loss of every pair is a mean of."""
        return [len(target.ids) for target in self.task.encode_targets([pair.target for pair in pairs])]
