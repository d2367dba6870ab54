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

from turret import adapters, bases, bundles
from turret import train as trainer
from turret.data import Example
from turret.data.dataset import read_inputs, read_test
from turret.errors import AdapterError, DataError
from turret.recipe import Data
from turret.store import Store, Version
from turret.tasks import stored_task, task_from_spec
from turret.train.batches import by_length
from turret.workspace.results import Evaluation

MOST_TOKENS = 4096  # in one pass


@dataclass(frozen=True)
class Mounted:
    """A stored version on its base, or the base alone, ready to answer."""

    version: Version | None
    model: Any
    task: Any  # a `tasks.Task`


def mounted(store: Store, reference: str, stage: Callable[[str], None] | None) -> Mounted:
    """Read the version, load the base it was trained on, and put it on; another base is refused."""
    with tempfile.TemporaryDirectory(prefix="turret-") as folder:
        version = store.materialize(reference, Path(folder) / "bundle")
        adapter = bundles.read_bundle(Path(folder) / "bundle")
    if not adapter.task:
        raise AdapterError(f"{version} says nothing of its task: it cannot answer; train it again")
    if stage is not None:
        stage(f"loading {adapter.base.id}")
    task, labels = stored_task(adapter.task), adapter.task.get("labels") or ()
    base = bases.load(adapter.base.id, task=task.request, num_labels=task.num_labels(labels))
    adapters.mount(base.model, adapter, fingerprint=base.fingerprint)
    return Mounted(version, base.model, task_from_spec(adapter.task, base.tokenizer))


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
    if bare and not ready.task.generates:
        raise AdapterError(f"{ready.version} classifies, and the bare base has no head to do it: ask without bare")
    sources = [encoded.ids for encoded in ready.task.encode_sources(texts)]
    if not ready.task.generates:
        return _labels(ready, sources)
    ready.model.eval()
    with torch.inference_mode(), adapters.on_slot(ready.model, adapters.BARE) if bare else nullcontext():
        return trainer.generate(ready.model, ready.task, sources, most_tokens=MOST_TOKENS)


def _labels(ready: Mounted, rows: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
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


def labelled(ready: Mounted, source: str, columns: Mapping[str, Any]) -> tuple[Data, Sequence[Example], Sequence[str]]:
    """Where they were read, the test examples as the version's task has them, and notes."""
    data, task = Data.model_validate({"source": source, **columns}), ready.task
    schema = task.schema(multi_label=task.multi_label)
    return data, *read_test(data, schema, labels=task.labels)


def inputs(store: Store, reference: str, source: str, column: str | None) -> list[str]:
    """The texts in a file, by the column that is named, or that the version's kind of task reads."""
    schema = stored_task(store.resolve(reference).part("task")).schema()
    return read_inputs(Data.model_validate({"source": source, schema.usual[0]: column}), schema)
