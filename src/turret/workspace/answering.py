"""The verbs that answer from the store: a version back on its base, then predictions or metrics.

Refuses to know how a base is loaded, a bundle read or a text encoded; the rooms do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turret import adapters, bases
from turret import train as trainer
from turret.errors import AdapterError, DataError
from turret.recipe import Data
from turret.store import Store, Version
from turret.tasks import make, tables
from turret.tasks.task import Labelled, Pair
from turret.train.batches import by_length
from turret.workspace.results import Evaluation

MOST_TOKENS = 4096  # in one pass


@dataclass(frozen=True)
class Mounted:
    """A stored version on its base, or the base alone, ready to answer."""

    version: Version | None
    model: Any
    task: Any


def mounted(store: Store, reference: str, stage: Callable[[str], None] | None) -> Mounted:
    """Read the version, load the base it was trained on, and put it on; another base is refused."""
    with tempfile.TemporaryDirectory(prefix="turret-") as folder:
        version = store.materialize(reference, Path(folder) / "bundle")
        adapter = adapters.read_bundle(Path(folder) / "bundle")
    if not adapter.task:
        raise AdapterError(f"{version} says nothing of its task: it cannot answer; train it again")
    if stage is not None:
        stage(f"loading {adapter.base.id}")
    classes = adapter.task.get("labels")
    base = bases.load(
        adapter.base.id, task="classify" if classes else "generate", num_labels=len(classes) if classes else None
    )
    adapters.mount(base.model, adapter, fingerprint=base.fingerprint)
    return Mounted(version, base.model, make.task_from_spec(adapter.task, base.tokenizer))


def predict(
    store: Store,
    reference: str,
    texts: Sequence[str],
    stage: Callable[[str], None] | None = None,
    *,
    bare: bool = False,
) -> list[dict[str, Any]]:
    """An answer per text, in their order."""
    if not texts:
        raise DataError("nothing to answer: give a text, or a file with at least one line")
    ready = mounted(store, reference, stage)
    if stage is not None:
        stage(f"answering {len(texts)} texts" if len(texts) > 1 else "answering")
    return answers(ready, texts, bare=bare)


def answers(ready: Mounted, texts: Sequence[str], *, bare: bool = False) -> list[dict[str, Any]]:
    """An answer per text, in their order, of a version that is on its base."""
    if ready.task.kind == "classify":
        if bare:
            raise AdapterError(f"{ready.version} classifies, and the bare base has no head to do it: ask without bare")
        return _labels(ready, texts)
    sources = [encoded.ids for encoded in ready.task.encode_sources(texts)]
    ready.model.eval()
    with torch.inference_mode(), adapters.on_slot(ready.model, adapters.BARE) if bare else nullcontext():
        return trainer.generate(ready.model, ready.task, sources, most_tokens=MOST_TOKENS)


def _labels(ready: Mounted, texts: Sequence[str]) -> list[dict[str, Any]]:
    rows = [encoded.ids for encoded in ready.task.encode_all(texts)]
    found: list[dict[str, Any]] = [{} for _ in rows]
    ready.model.eval()
    with torch.inference_mode():
        for places in by_length([len(row) for row in rows], MOST_TOKENS):
            logits = adapters.classify_logits(ready.model, [rows[place] for place in places])
            for place, answer in zip(places, ready.task.answers(logits), strict=True):
                found[place] = answer
    return found


def evaluate(
    store: Store,
    reference: str,
    source: str,
    columns: Mapping[str, Any],
    stage: Callable[[str], None] | None = None,
) -> Evaluation:
    """Metrics of the version on the test split of the data, or on all of it where it has no splits."""
    ready = mounted(store, reference, stage)
    assert ready.version is not None
    task = ready.task
    data, examples, notes = labelled(ready, source, columns)
    if stage is not None:
        stage(f"answering {len(examples)} examples")
    started = time.perf_counter()
    measured, _ = trainer.evaluate(ready.model, task, examples, most_tokens=MOST_TOKENS)
    return Evaluation(
        version=str(ready.version),
        digest=ready.version.digest,
        data={"source": data.source, "examples": len(examples)},
        metrics=measured,
        seconds=time.perf_counter() - started,
        notes=list(notes),
    )


def labelled(
    ready: Mounted, source: str, columns: Mapping[str, Any]
) -> tuple[Data, Sequence[Labelled | Pair], Sequence[str]]:
    """Where they were read, the test examples as the version's task has them, and notes."""
    data, task = Data.model_validate({"source": source, **columns}), ready.task
    labels, many = (task.labels, task.multi_label) if task.kind == "classify" else ((), False)
    return data, *tables.read_test(data, task.kind, labels=labels, multi_label=many)


def inputs(store: Store, reference: str, source: str, column: str | None) -> list[str]:
    """The texts in a file, by the column that is named, or that the version's kind of task reads."""
    kind = store.resolve(reference).part("task").get("kind", "classify")
    role = {"classify": "text", "summarize": "document", "generate": "prompt"}[kind]
    return tables.read_inputs(Data.model_validate({"source": source, role: column}), kind)
