"""The training verb: recipe to data, base and task, the loop, the proof, the store. Refuses to know how each is done.

A run is `interrupted` unless it came to its end or cannot: the same recipe on the same data then goes on from its last
checkpoint. A loss that is not finite and a proof that failed end a run as `failed`, because they would come again.
Of several processes the main one does all that writes or measures; the others make its steps with it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from turret import adapters, bases, bundles, heap
from turret import train as trainer
from turret.data.dataset import read
from turret.disk import plainly
from turret.errors import LossNotFinite, PreflightRefused, ProofFailed, StoreError
from turret.methods.lookup import numbers_of
from turret.recipe import Recipe
from turret.store import HeldRun, Store, Version
from turret.tasks import make_task, schemas, task_of
from turret.train import memory, processes
from turret.workspace.results import Planned, RunResult

HOPELESS = (LossNotFinite, ProofFailed)


PROOF_START = 6.0  # seconds until a fresh process has imported torch and transformers


@dataclass(frozen=True)
class Watching:
    """Who wants to be told what; each may be left out."""

    on_record: Callable[[Any], None] | None = None
    on_plan: Callable[[Planned], None] | None = None
    on_stage: Callable[[str], None] | None = None

    def stage(self, words: str) -> None:
        if self.on_stage is not None:
            self.on_stage(words)

    def planned(self, planned: Planned) -> None:
        if self.on_plan is not None:
            self.on_plan(planned)

    def record(self, record: Any) -> None:
        if self.on_record is not None:
            self.on_record(record)


@dataclass(frozen=True)
class Ready:
    """Everything a training needs, in memory."""

    recipe: Recipe  # with everything filled in that was seen
    dataset: Any
    base: Any
    task: Any
    notes: list[str]
    load_seconds: float
    resident: int  # bytes of the process once the base is loaded
    start: trainer.InitialAdapter | None  # the version that the adapter goes on from


def prepare(store: Store, recipe: Recipe, watching: Watching) -> Ready:
    """Read the data, load the base, and fill in what the recipe left to be seen."""
    numbers_of(recipe.method).require_known()  # a mistake in it costs no loading
    start = _start(store, recipe, watching)
    watching.stage(f"reading {recipe.data.source}")
    dataset = read(recipe.data, schemas(recipe.task), recipe.split_seed)
    asked = task_of(dataset.kind)
    watching.stage(f"loading {recipe.base}")
    started = time.perf_counter()
    base = bases.load(
        recipe.base,
        task=asked.request,
        num_labels=asked.num_labels(dataset.labels),
        dtype=recipe.train.dtype,
        seed=recipe.seed,
    )
    load_seconds = time.perf_counter() - started
    filled = _filled(recipe, dataset, base, start)
    task = make_task(filled.task, dataset, base.tokenizer, base.family.kind)
    notes = [*dataset.notes, *base.notes]
    if start is not None:
        notes.append(f"starts from {start.version} ({start.digest[:19]}), its parent in the lineage")
    heap.give_back()
    return Ready(filled, dataset, base, task, notes, load_seconds, memory.resident(), start)


def _start(store: Store, recipe: Recipe, watching: Watching) -> trainer.InitialAdapter | None:
    """The version that `train.init_from` names, read before anything else is."""
    if recipe.train.init_from is None:
        return None
    watching.stage(f"reading {recipe.train.init_from}")
    with tempfile.TemporaryDirectory(prefix="turret-") as folder:
        version = store.materialize(recipe.train.init_from, Path(folder) / "bundle")
        return trainer.InitialAdapter(str(version), version.digest, bundles.read_bundle(Path(folder) / "bundle"))


def _filled(recipe: Recipe, dataset: Any, base: Any, start: trainer.InitialAdapter | None) -> Recipe:
    """The recipe that says what was guessed, so that a later default or a later guess changes nothing."""
    seen = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=dataset.columns),
            "task": recipe.task.model_copy(update={"kind": dataset.kind}),
            "train": recipe.train.model_copy(update={"init_from": None if start is None else start.version}),
        }
    )
    made: Recipe = trainer.filled(seen, base, dataset.kind, len(trainer.splits_of(recipe, dataset).train))
    return made


def plan(store: Store, recipe: Recipe, watching: Watching) -> Planned:
    """The preflight alone."""
    return _plan(prepare(store, recipe, watching), watching)


def _plan(ready: Ready, watching: Watching) -> Planned:
    watching.stage("checking the plan")
    made = trainer.plan(
        ready.recipe,
        ready.base,
        ready.task,
        ready.dataset,
        start=ready.start,
        proof_seconds=PROOF_START + ready.load_seconds,
    )
    return Planned(ready.recipe, made, ready.notes)


def _with_rate(ready: Ready, planned: Planned, watching: Watching) -> Planned:
    """Carry `lr = "auto"` out: from here on the recipe holds the number that was found."""
    if ready.recipe.train.lr != "auto":
        return planned
    found = trainer.find_rate(
        ready.recipe,
        ready.base,
        ready.task,
        ready.dataset,
        start=ready.start,
        on_trial=lambda lr, steps: watching.stage(f"trying the learning rate {lr:.3g} for {steps} steps"),
    )
    recipe = ready.recipe.model_copy(update={"train": ready.recipe.train.model_copy(update={"lr": found.lr})})
    return Planned(recipe, planned.plan.with_rate(found), [*planned.notes, found.note()])


def train(store: Store, recipe: Recipe, watching: Watching, *, fresh: bool, beside_base: bool = False) -> RunResult:
    """Plan, train, prove and store."""
    here = processes.begin()
    here.require_same(recipe=recipe.to_toml())
    watching = watching if here.main else Watching()
    ready = here.main_first(lambda: prepare(store, recipe, watching))
    if here.device is not None:
        ready.base.model.to(here.device)
    planned = here.from_main(lambda: _planned(_noted(ready, here), watching))
    ready = replace(ready, recipe=planned.recipe, notes=planned.notes)
    watching.planned(planned)
    if planned.plan.refused:
        raise PreflightRefused(planned.plan.refusal())
    if not here.main:
        return _follow(here, ready)
    toml, digest = ready.recipe.to_toml(), ready.dataset.digest
    run = None if fresh else store.unfinished_run(toml, digest)
    run = run or store.new_run(ready.recipe.name, toml, digest)
    try:
        result = _carry_out(store, run, ready, planned, watching, beside_base)
    except BaseException as error:
        with suppress(StoreError):  # a full disk must not hide what went wrong first
            store.end_run(run, "failed" if isinstance(error, HOPELESS) else "interrupted", error=str(error))
        raise
    store.end_run(run, "finished", result=result.as_json())
    shutil.rmtree(run.checkpoint, ignore_errors=True)  # nothing goes on from a finished run
    return here.from_main(lambda: result)


def _planned(ready: Ready, watching: Watching) -> Planned:
    """The plan, with the rate found where it was to be found."""
    planned = _plan(ready, watching)
    return planned if planned.plan.refused else _with_rate(ready, planned, watching)


def _noted(ready: Ready, here: processes.Processes) -> Ready:
    if here.size == 1:
        return ready
    said = f"{here.size} processes share every batch; the plan's memory is that of each, its time that of one alone"
    return replace(ready, notes=[*ready.notes, said])


def _follow(here: processes.Processes, ready: Ready) -> RunResult:
    """What every process but the main one does: the same steps, and nothing else. Returns the main one's result."""
    folder: Path = here.from_main(_never)
    for _ in trainer.fit(ready.recipe, ready.base, ready.task, ready.dataset, folder=folder, start=ready.start):
        pass
    adapters.detach(ready.base.model)
    result: RunResult = here.from_main(_never)
    return result


def _never() -> Any:
    raise AssertionError("only the main process makes this")


def _carry_out(
    store: Store, run: HeldRun, ready: Ready, planned: Planned, watching: Watching, beside_base: bool
) -> RunResult:
    fitted = _fit(run, ready, planned, watching)
    try:
        watching.stage("measuring on held-out examples")
        started = time.perf_counter()
        measured = _measure(ready)
        if beside_base:
            watching.stage("measuring the bare base on the same examples")
            bare = _measure(ready, slot=adapters.BARE)
            measured |= {f"{split} bare base": metrics for split, metrics in bare.items()}
        evaluate_seconds = fitted.evaluate_seconds + time.perf_counter() - started
        started = time.perf_counter()
        version = _keep(store, run, ready, fitted, measured, watching)
        proof_seconds = time.perf_counter() - started
    finally:
        adapters.detach(ready.base.model)
    return RunResult(
        version=str(version),
        digest=version.digest,
        base={"id": ready.base.id, "fingerprint": ready.base.fingerprint},
        metrics=measured,
        parameters=fitted.parameters,
        timing={
            "load_seconds": ready.load_seconds,
            "train_seconds": fitted.seconds,
            "evaluate_seconds": evaluate_seconds,
            "proof_seconds": proof_seconds,
            "steps": fitted.steps,
            "examples_per_second": fitted.examples / max(fitted.seconds, 1e-9),
            "tokens_per_second": fitted.tokens / max(fitted.seconds, 1e-9),
        },
        memory={
            "base_bytes": ready.base.bytes,
            "peak_bytes": fitted.peak_bytes,
            "above_base_bytes": max(0, fitted.peak_bytes - ready.resident),
            "predicted_bytes": planned.plan.memory.total if planned.plan.memory else None,
        },
        bundle_bytes=version.bytes,
        run=run.id,
        resumed_from=fitted.resumed_from,
        stopped_early=fitted.stopped_early,
        flat_loss=None if fitted.flat_loss is None else fitted.flat_loss.to_json(),
        warnings=[] if fitted.flat_loss is None else [fitted.flat_loss.warning()],
        notes=ready.notes,
    )


def _fit(run: HeldRun, ready: Ready, planned: Planned, watching: Watching) -> Any:
    """The loop, watched, with its curve written beside its checkpoint."""
    after = trainer.step_of(run.checkpoint)
    if after:
        watching.stage(f"going on from step {after} of run {run.id}")
    with _written(run):
        curve = trainer.Curve(run.curve, resume_after=after)
    processes.begin().from_main(lambda: run.checkpoint)
    steps = trainer.fit(
        ready.recipe,
        ready.base,
        ready.task,
        ready.dataset,
        folder=run.checkpoint,
        predicted=planned.plan.memory,
        start=ready.start,
    )
    while True:
        try:
            record = next(steps)
        except StopIteration as end:
            return end.value
        with _written(run):
            curve.append(record)
        watching.record(record)


def _measure(ready: Ready, slot: int | None = None) -> dict[str, dict[str, Any]]:
    """Metrics of the finished adapter on every split that was held out."""
    most = trainer.pass_tokens(ready.recipe.train, ready.base.model.config)
    held = {"validation": ready.dataset.validation, "test": ready.dataset.test}
    model, task = ready.base.model, ready.task
    return {
        split: trainer.evaluate(model, task, examples, most_tokens=most, slot=slot)[0]
        for split, examples in held.items()
        if examples
    }


def _keep(
    store: Store, run: HeldRun, ready: Ready, fitted: Any, measured: dict[str, dict[str, Any]], watching: Watching
) -> Version:
    """Write the bundle, have a fresh process prove it, and store it."""
    with _written(run), tempfile.TemporaryDirectory(prefix="bundle-", dir=run.folder) as beside:
        bundle = Path(beside) / "bundle"
        bundles.save_bundle(fitted.adapter, bundle)
        watching.stage("proving the bundle in a fresh process")
        examples = ready.dataset.test or ready.dataset.validation or ready.dataset.train
        trainer.prove(bundle, ready.base, trainer.probe(ready.base.model, ready.task, examples))
        watching.stage("storing" if fitted.flat_loss is None else f"storing, flagged: {fitted.flat_loss}")
        return store.put(ready.recipe.name, bundle, run=run.id, metrics=measured)


@contextmanager
def _written(run: HeldRun) -> Iterator[None]:
    """What the disk says while a run writes its own files, as one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"run {run.id} cannot write to {run.folder}: {plainly(error, run.folder)}: make room or make it writable, "
            "and start the same command again to go on"
        ) from error
