"""Train a recipe: read the data, load the base, plan, run the loop, prove the bundle, store it.

A run that did not finish is stored as `interrupted`: the same recipe on the same data resumes it from its last
checkpoint. A run whose loss is not finite or whose proof failed is stored as `failed`, because it would fail again.
With several processes, the main one measures, writes and reports; the others take part in the training steps.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from turret import adapters, bundles, process
from turret.adapters import StoredAdapter
from turret.adapters.hooks import ATTRIBUTE
from turret.adapters.tuners.tuner import tuner_of
from turret.bases import Base, ChosenDevice
from turret.bases.device import CPU, gigabytes
from turret.bases.sharded import parts_of
from turret.compare.collapse import binned_losses, still_falling
from turret.compare.results import RunReport
from turret.data import Dataset
from turret.errors import (
    CheckpointMismatch,
    CheckpointTooOld,
    DeviceError,
    Interrupted,
    LossNotFinite,
    NotFinite,
    OutOfMemory,
    PreflightRefused,
    ProofFailed,
    StoreError,
    memory_ran_out,
)
from turret.json_types import JsonObject, Plain
from turret.manifest import Lineage
from turret.methods.method import Check
from turret.recipe import AUTO, Recipe
from turret.store import HeldRun, Store, Version
from turret.store.gates import FORGETTING
from turret.store.leases import LeaseRenewer
from turret.store.scratch import disk_errors
from turret.tasks import make_task, task_of
from turret.tasks.calibration import FEWEST, FEWEST_TEMPERATURE
from turret.tasks.shapes import Metrics, numbers_in
from turret.trackers import State, TrackedRun, require_installed
from turret.trackers.tracking import Tracking
from turret.train import distributed, initialize, memory, preflight, proof
from turret.train.asking import Asking, twin_base
from turret.train.batches import EncodedRows, pass_tokens, splits_of
from turret.train.checkpoint import step_of
from turret.train.curve import Curve, StepRecord, learnt_by_heart
from turret.train.loop import Fitted, fit
from turret.train.lr_finder import find_rate
from turret.train.memory import Work
from turret.train.training_plan import Plan
from turret.workspace import forgetting, promising
from turret.workspace.evaluation import AnsweredSplit, answer_split
from turret.workspace.history import every_step
from turret.workspace.progress import Say, silent
from turret.workspace.reading import read_dataset, with_base
from turret.workspace.resident import (
    ALONE,
    OwnProcess,
    PreparedTraining,
    TrainingBase,
    checkpoints_for,
    choose_for,
    connect_parts,
    gather_parts,
    pass_tokens_for,
    predicted_for,
    proof_device,
    read_adapter,
)
from turret.workspace.results import Planned, RunResult

T = TypeVar("T")


# --- measuring --------------------------------------------------------------------------------------------------------
# Every pass of a training after its last step: calibration, metrics, forgetting, and the probe for the proof.
#
# With a base in parts all processes make these passes together; otherwise the main one makes them.


@dataclass(frozen=True)
class Measured:
    """The results of these passes. `ready` and `fitted` have the calibrated task."""

    ready: PreparedTraining
    fitted: Fitted
    metrics: dict[str, Metrics]  # split -> metrics
    answered: Mapping[str, AnsweredSplit]  # each held-out split
    forgot: Metrics | None  # on neutral text; None for a classifier
    probe: proof.Probe
    seconds: float
    warnings: list[str]  # of a promise that the examples cannot carry
    inputs: list[bytes]  # embeddings of the examples of its promise


def measure_adapter(ready: PreparedTraining, fitted: Fitted, say: Say, *, beside_base: bool) -> Measured:
    """Make the passes on the attached, trained model.

    Args:
        beside_base: measure the bare base on the held-out examples too.
    """
    say("measuring on held-out examples")
    started = time.perf_counter()
    most = pass_tokens(ready.recipe.train, ready.base.model.config, ready.base.pass_tokens)
    with Asking(ready.bare, fitted.adapter, ready.task, ready.base.model, most) as asking:
        ready, fitted, known = _calibrate(ready, fitted, asking)
        answered = _answer_splits(ready, asking, known=known)
        metrics = {split: each.metrics for split, each in answered.items()}
        if beside_base:
            say("measuring the bare base on the same examples")
            bare = _answer_splits(ready, asking, bare=True)
            metrics |= {f"{split} bare base": each.metrics for split, each in bare.items()}
        promise, inputs, warnings = promising.promise_after_training(ready.recipe, ready.dataset, ready.task, asking)
        if promise is not None:
            lineage: Lineage = fitted.adapter.lineage | {"promise": promise}
            fitted = replace(fitted, adapter=replace(fitted.adapter, lineage=lineage))
        ready = replace(ready, notes=[*ready.notes, *asking.notes])
    forgot = None
    if ready.base.model.get_output_embeddings() is not None:
        say("measuring forgetting")
        forgot = forgetting.metrics_of(forgetting.on_neutral_texts(ready.base.model, ready.task.tokenizer))
    seconds = time.perf_counter() - started
    examples = ready.dataset.test or ready.dataset.validation or ready.dataset.train
    probe = proof.probe(ready.base.model, ready.task, examples)
    return Measured(ready, fitted, metrics, answered, forgot, probe, seconds, warnings, inputs)


def uncalibrated_note(ready: PreparedTraining) -> list[str]:
    """The sentence of a classifier without enough validation examples for a calibration.

    The linear solution's folds cannot stand for them: an adapter is too sure because it was trained on its examples,
    and a temperature from folds of its own would cost as many trainings.
    """
    task, splits = ready.task, splits_of(ready.recipe, ready.dataset)
    count = len(splits.watched) if splits.selects and splits.watched else 0
    if not task.calibrates or count >= FEWEST:
        return []
    found = f"{count} validation examples" if count else "no validation split"
    return [
        f"probabilities are not calibrated ({found}) and are often too sure: set data.validation = 0.1, for "
        f"{FEWEST_TEMPERATURE} examples or more"
    ]


def _calibrate(
    ready: PreparedTraining, fitted: Fitted, asking: Asking
) -> tuple[PreparedTraining, Fitted, Tensor | None]:
    """Fit the task's calibration on the validation split, if there is one; give it to the adapter and to `asking`.

    Returns:
        Both with the calibrated task, and the logits (B, C) of the data set's validation split.
    """
    task, splits = ready.task, splits_of(ready.recipe, ready.dataset)
    if not task.calibrates:
        return ready, fitted, None
    examples = splits.watched if splits.selects and splits.watched else ()
    if len(examples) < FEWEST:  # `uncalibrated_note` says it
        return ready, fitted, None
    logits = asking.logits(EncodedRows(task, examples).windows())
    train = ready.recipe.train
    chose = train.keep == "best" or train.early_stopping is not None
    asking.task = task = task.calibrated(logits, examples, chose_weights=chose)
    adapter = replace(fitted.adapter, task=task.spec())
    known = logits if ready.dataset.validation else None
    return replace(ready, task=task), replace(fitted, adapter=adapter), known


def _report(found: Measured) -> RunReport:
    """Of the test split, or else of the validation split."""
    split = "test" if "test" in found.answered else "validation"
    answered = found.answered[split]
    count = len(answered.examples)
    return RunReport.of(split, count, answered.details(found.ready.task, range(count)))


def _answer_splits(
    ready: PreparedTraining, asking: Asking, *, bare: bool = False, known: Tensor | None = None
) -> dict[str, AnsweredSplit]:
    """Answers and metrics on every held-out split.

    Args:
        bare: of the base alone.
        known: the logits (B, C) of the validation split.
    """
    splits = {"validation": (ready.dataset.validation, known), "test": (ready.dataset.test, None)}
    return {
        split: answer_split(ready.task, asking, examples, bare=bare, known=logits)
        for split, (examples, logits) in splits.items()
        if examples
    }


# --- tracked ----------------------------------------------------------------------------------------------------------
# What the trackers of `[train] trackers` are told about a training: its settings, each step, its result.


STEP = ("loss", "lr", "grad_norm", "epoch", "tokens_per_second")  # fields of a record, as train/<field>


@contextmanager
def follow_training(recipe: Recipe, run: TrackedRun, warn: Callable[[str], None]) -> Iterator[Tracking]:
    """Start the trackers that a recipe names, and end them with the state in which the training ends.

    Args:
        warn: gets a line when a tracker fails.
    """
    tracking = Tracking(recipe.train.trackers or (), run, warn)
    try:
        yield tracking
    except BaseException as error:
        state: State = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        tracking.end(state, tracking.summary)
        raise
    tracking.end("finished", tracking.summary)


def settings_of(recipe: Recipe, facts: Mapping[str, float | str]) -> dict[str, float | str]:
    """A recipe's settings by key (train.lr, method.r, ...), and the facts. Settings that are not set are left out."""
    found: dict[str, float | str] = {}
    for key, value in recipe.without_trackers().model_dump(mode="json").items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        found |= {f"{key}.{name}".rstrip("."): _plain(each) for name, each in parts if each is not None}
    return found | dict(facts)


def values_of(record: StepRecord) -> dict[str, float]:
    """The numbers of a step, such as train/loss, and those of an evaluation after it, such as validation/accuracy."""
    values = {f"train/{name}": float(getattr(record, name)) for name in STEP}
    return values | {f"{record.split}/{name}": value for name, value in numbers_in(record.metrics or {}).items()}


def summary_of(result: RunResult) -> dict[str, float | str]:
    """The final metrics, such as test/accuracy, and the version with its digest."""
    summary: dict[str, float | str] = {"version": result.version, "digest": result.digest}
    for split, metrics in result.metrics.items():
        summary |= {f"{split}/{name}": value for name, value in numbers_in(metrics).items()}
    summary |= {f"forgetting/{name}": value for name, value in numbers_in(result.forgetting or {}).items()}
    return summary | {"train_seconds": float(result.timing["train_seconds"])}


def _plain(value: Plain) -> float | str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return value
    return json.dumps(value, ensure_ascii=False)


# --- training ---------------------------------------------------------------------------------------------------------


NOT_RESUMABLE = (LossNotFinite, NotFinite, ProofFailed)
PROOF_START = 6.0  # seconds in which a fresh process imports torch and transformers


@dataclass(frozen=True)
class Callbacks:
    """Functions that are called during a training."""

    record: Callable[[StepRecord], None] = silent  # after every step
    planned: Callable[[Planned], None] = silent  # once, before the first step
    stage: Say = silent
    warning: Say = silent  # a line for something that failed and does not stop the training


def prepare(
    store: Store,
    recipe: Recipe,
    callbacks: Callbacks,
    dataset: Dataset | None = None,
    device: ChosenDevice | None = None,
    place: OwnProcess = ALONE,
    *,
    filled: bool = False,
) -> PreparedTraining:
    """Read the data, load the base, and fill in the recipe's defaults.

    Args:
        dataset: the data, if it is read already.
        device: where the base goes; None: as `train.device` says.
        place: where the training computes.
        filled: the recipe's defaults are filled in already.

    Raises:
        DeviceError: the device is not there.
        PreflightRefused: the weights and the trained states do not fit on the GPU that the recipe names.
    """
    connect_parts(recipe, distributed.begin())
    initialize.require_optimizer(recipe)
    tuner_of(recipe.method).require_known()  # an error in the method is found before anything is loaded
    require_installed(recipe.train.trackers or ())
    start = _stored_adapter(store, recipe.train.init_from, callbacks)
    reference = _stored_adapter(store, recipe.task.reference, callbacks)
    dataset = dataset or read_dataset(store, recipe, callbacks.stage)
    recipe, base_notes = with_base(recipe, dataset.kind)
    task_class = task_of(dataset.kind)
    machine = place.machine()
    device = choose_for(recipe, task_class, dataset.labels, machine) if device is None else device
    needed = TrainingBase(recipe, task_class, dataset.labels, device)
    callbacks.stage(f"{recipe.base} is in memory" if place.has(needed) else f"loading {recipe.base}")
    started = time.perf_counter()
    base = replace(place.model_for(needed), reference=reference)
    bare = place.run(lambda: twin_base(base), store.access.tenant)
    base = replace(base, checkpoints=checkpoints_for(recipe, task_class, dataset.labels, device.device, machine))
    light = recipe.train.checkpoint_layers or base.checkpoints is not None
    most = pass_tokens_for(recipe, task_class, dataset.labels, device.device, machine, checkpointed=light)
    base = replace(base, pass_tokens=most)
    load_seconds = time.perf_counter() - started
    recipe = recipe if filled else _fill_recipe(recipe, dataset, base, start)
    task = make_task(recipe.task, dataset, base.tokenizer, base.family.kind)
    promising.require_carried(recipe, dataset, task)
    whole, dataset = dataset.train, replace(dataset, train=task.pieces(dataset.train))
    notes = [*base_notes, *dataset.notes, *base.notes, *task.notes]
    if len(dataset.train) > len(whole):
        notes.append(f"texts of more than {task.max_tokens} tokens train in pieces: {len(dataset.train)} examples")
    if start is not None:
        notes.append(f"starts from {start.version} ({start.digest[:19]}), its parent in the lineage")
    if not place.stays:
        process.release_memory()
    resident = memory.resident_bytes(device.device)
    return PreparedTraining(recipe, dataset, base, bare, task, notes, load_seconds, resident, start, device)


def _stored_adapter(store: Store, reference: str | None, callbacks: Callbacks) -> StoredAdapter | None:
    """Read a version that a recipe names."""
    if reference is None:
        return None
    callbacks.stage(f"reading {reference}")
    version, adapter = read_adapter(store, reference)
    return StoredAdapter(str(version), version.digest, adapter)


def _fill_recipe(recipe: Recipe, dataset: Dataset, base: Base, start: StoredAdapter | None) -> Recipe:
    """The recipe with every guess written out, so that later defaults and guesses do not change it."""
    found = {
        role: column for role, column in dataset.columns.items() if not isinstance(getattr(recipe.data, role), list)
    }
    reference = None if base.reference is None else base.reference.version
    guessed = recipe.changed(
        data=found,
        task={"kind": dataset.kind, "reference": reference},
        train={"init_from": None if start is None else start.version},
    )
    return initialize.fill_recipe(guessed, base, dataset.kind, len(splits_of(recipe, dataset).train))


def plan(store: Store, recipe: Recipe, callbacks: Callbacks, dataset: Dataset | None = None) -> Planned:
    """Plan a training without running it."""
    return _plan_training(store, prepare(store, recipe, callbacks, dataset), callbacks)[1]


def _plan_training(store: Store, ready: PreparedTraining, callbacks: Callbacks) -> tuple[PreparedTraining, Planned]:
    """The plan; on the CPU instead if a GPU was not asked for and the plan does not fit there after all."""
    planned, asked = _plan(ready, callbacks), ready.recipe.train.device or AUTO
    if (small := with_checkpoints(ready, planned)) is not None:
        again = _plan(small, callbacks)
        ready, planned = (ready, planned) if again.plan.refused else (small, again)
    refused = [check for check in planned.plan.checks if check.level == "refuse" and check.name == "memory"]
    if asked != AUTO or ready.device.device.type == "cpu" or not refused:
        return ready, planned
    device = ChosenDevice(CPU, f"{refused[0].text} on {ready.device.device}")
    proof.make_room(ready.base.model)
    ready = prepare(store, ready.recipe, callbacks, ready.dataset, device, filled=True)
    return ready, _plan(ready, callbacks)


def _plan(ready: PreparedTraining, callbacks: Callbacks, *, measured: bool = True) -> Planned:
    callbacks.stage("checking the plan")
    seconds = PROOF_START + ready.load_seconds
    whole = measured and ready.recipe.train.shard is None
    plan = preflight.plan(*ready.parts, measured=whole, start=ready.start, proof_seconds=seconds, device=ready.device)
    return Planned(ready.recipe, plan if whole else _with_memory(plan, ready), ready.notes)


def with_checkpoints(ready: PreparedTraining, planned: Planned) -> PreparedTraining | None:
    """The same training with its layers checkpointed, if its plan does not fit its GPU; None if that is no way out."""
    refused = [check for check in planned.plan.checks if check.level == "refuse"]
    decided = ready.recipe.train.checkpoint_layers is not None or ready.base.checkpoints is not None
    if ready.device.device.type != "cuda" or decided or [check.name for check in refused] != ["memory"]:
        return None
    return replace(ready, base=replace(ready.base, checkpoints=f"without it {refused[0].text}", pass_tokens=None))


def _with_memory(plan: Plan, ready: PreparedTraining) -> Plan:
    """The plan of a training whose base is in parts or resident: its memory is computed from shapes, not measured.

    On a resident base from the shapes of its real batches.
    """
    parts, base, rows = parts_of(ready.base.model), ready.base, list[Check]()
    if parts > 1:
        text = f"{parts} processes, each keeps {gigabytes(base.bytes)} of the base and gathers one layer after another"
        rows.append(Check("shard", "ok", text))
    kind, labels, work = type(ready.task), ready.task.labels, None
    if parts == 1:
        batches = preflight.sampled_batches(splits_of(ready.recipe, ready.dataset), ready.recipe, ready.task)
        work = Work.of_items(
            ready.recipe, batches, pass_tokens(ready.recipe.train, base.model.config, base.pass_tokens)
        )
    predicted = predicted_for(ready.recipe, kind, labels, base.model.device, parts=parts, work=work)
    if predicted is not None:
        rows.append(preflight.fits(predicted, base))
    what = "a base in parts" if parts > 1 else "a resident base"
    rows.append(Check("time", "ok", f"not measured for {what}: watch the first steps"))
    trainable = None if predicted is None else predicted.trainable // 4
    return replace(plan, checks=(*plan.checks, *rows), memory=predicted, trainable=trainable)


def _with_rate(ready: PreparedTraining, planned: Planned, callbacks: Callbacks) -> Planned:
    """Run the trials of `lr = "auto"`, unless the plan is refused, and put the rate that they found into the recipe."""
    if planned.plan.refused or ready.recipe.train.lr != "auto":
        return planned
    found = find_rate(
        *ready.parts,
        start=ready.start,
        on_trial=lambda lr, steps: callbacks.stage(f"trying the learning rate {lr:.3g} for {steps} steps"),
    )
    recipe = ready.recipe.changed(train={"lr": found.lr})
    return Planned(recipe, planned.plan.with_rate(found), [*planned.notes, found.note()])


def train(
    store: Store,
    recipe: Recipe,
    callbacks: Callbacks,
    dataset: Dataset | None = None,
    *,
    fresh: bool,
    beside_base: bool = False,
    held: HeldRun | None = None,
    comparison: str | None = None,
    place: OwnProcess = ALONE,
    asked: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Plan, train, prove and store.

    Args:
        dataset: the data, if it is read already.
        fresh: start a new run even if an unfinished one of the same recipe and data could be resumed.
        beside_base: measure the bare base on the held-out examples too.
        held: the run, from the queue; the caller records an error. It starts over if it cannot resume here.
        comparison: the folder of the comparison that the training is part of. A plain name never means its version.
        place: where it computes.
        asked: whether it shall stop after the present step, with a checkpoint.
    """
    here = distributed.begin()
    with here.noticing():
        callbacks = callbacks if here.main else Callbacks()
        here.require_same(recipe=recipe.to_toml())
        own = _of_process(here, recipe)
        connect_parts(recipe, here)
        ready = here.main_first(lambda: prepare(store, recipe, callbacks, dataset, own, place))
        gather_parts(ready)
        if place.stays:
            planned = place.admit_plan(lambda: _plan(ready, callbacks, measured=False))
        elif own is None:
            ready, planned = _plan_training(store, ready, callbacks)
            planned = _with_rate(ready, planned, callbacks)
        else:
            noted = _note_processes(ready, here)
            planned = here.from_main(lambda: _with_rate(noted, _plan(noted, callbacks), callbacks))
        left_out = [check.text for check in planned.plan.checks if check.name == "turns"]
        ready = replace(ready, recipe=planned.recipe, notes=[*planned.notes, *left_out])
        callbacks.planned(planned)
        if planned.plan.refused:
            raise PreflightRefused(planned.plan.refusal())
        ready = replace(ready, recipe=planned.recipe.without_trackers())  # they do not decide which run is resumed
        if not here.main:
            return _follow(here, ready, beside_base)
        toml, digest = ready.recipe.to_toml(), ready.dataset.digest
        run = held or (None if fresh else store.unfinished_run(toml, digest, callbacks.stage))
        run = replace(run or store.new_run(ready.recipe.name, toml, digest), comparison=comparison)
        if held is not None:
            store.training_runs().fill(held, toml, digest)
        store.keep_rows(ready.recipe.data.source)  # after the run is listed, so that no gc removes them
        try:
            with (
                store.training_runs().keeper(run, callbacks.warning) as keeper,
                follow_training(planned.recipe, _tracked_run(run, ready, planned), callbacks.warning) as tracking,
            ):
                begun = _Run(store, run, planned, _both(callbacks, tracking, keeper), place, asked)
                with _memory_explained():
                    result = begun.carry_out(ready, keeper, tracking, beside_base=beside_base, moves=held is not None)
                tracking.summary = summary_of(result)
            result = replace(result, notes=[*ready.notes, *tracking.warnings])
        except BaseException as error:
            with suppress(StoreError):  # a full disk must not hide the first error
                if held is None:
                    store.end_run(
                        run, "failed" if isinstance(error, NOT_RESUMABLE) else "interrupted", error=str(error)
                    )
            raise
        shutil.rmtree(run.checkpoint, ignore_errors=True)  # a finished run is not resumed
        return here.from_main(lambda: result)


def _tracked_run(run: HeldRun, ready: PreparedTraining, planned: Planned) -> TrackedRun:
    """What the trackers are told at the start."""
    facts: dict[str, float | str] = {
        "base.fingerprint": ready.base.fingerprint,
        "data.digest": ready.dataset.digest,
        "plan.steps": planned.plan.steps,
        "turret": version("turret"),
    }
    texts = {
        "recipe.toml": ready.recipe.to_toml(),
        "plan.json": json.dumps(planned.plan.to_json(), indent=2, ensure_ascii=False),
    }
    after = step_of(run.checkpoint)
    folder = str(run.folder.absolute())
    return TrackedRun(run.id, ready.recipe.name, folder, after, settings_of(ready.recipe, facts), texts)


def _both(callbacks: Callbacks, tracking: Tracking, keeper: LeaseRenewer) -> Callbacks:
    """The callbacks, with every record passed to the trackers too. A step after the lease is lost raises LeaseLost."""

    def record(record: StepRecord) -> None:
        keeper.require()
        callbacks.record(record)
        tracking.log(record.step, values_of(record))

    return replace(callbacks, record=record)


def _of_process(here: distributed.Processes, recipe: Recipe) -> ChosenDevice | None:
    """The GPU of this process, if it is one of several; each takes its own."""
    if here.size == 1:
        return None
    if recipe.train.device not in (None, AUTO, "cpu" if here.device is None else "cuda"):
        raise DeviceError(
            f"train.device is {recipe.train.device}, and each of several processes takes its own GPU: leave it out, or "
            "set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return ChosenDevice(here.device or CPU, f"process {here.rank} of {here.size}")


def _note_processes(ready: PreparedTraining, here: distributed.Processes) -> PreparedTraining:
    note = f"{here.size} processes share every batch; the plan's memory is per process, its time is for one process"
    return replace(ready, notes=[*ready.notes, note])


def _follow(here: distributed.Processes, ready: PreparedTraining, beside_base: bool) -> RunResult:
    """Run the training steps in a process other than the main one. Returns the main process's result.

    With a base in parts, make the passes after them too.
    """
    folder = here.from_main(Path)  # the checkpoint's; `from_main` makes the value only in the main process
    steps = fit(*ready.parts, folder=folder, start=ready.start)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            fitted: Fitted = end.value
            break
    if ready.recipe.train.shard is not None:
        measure_adapter(ready, fitted, silent, beside_base=beside_base)
    adapters.detach(ready.base.model)
    return here.from_main(_no_result)


def _no_result() -> RunResult:
    raise AssertionError("only the main process makes the result")


@dataclass(frozen=True)
class _Run:
    """A run that trains now. Its parts that compute take turns with others at its place."""

    store: Store
    run: HeldRun
    planned: Planned
    callbacks: Callbacks
    place: OwnProcess
    asked: Callable[[], bool]

    def carry_out(
        self,
        ready: PreparedTraining,
        keeper: LeaseRenewer,
        tracking: Tracking,
        *,
        beside_base: bool,
        moves: bool,
    ) -> RunResult:
        """Train, measure, and store the version and the result.

        Args:
            moves: whether the run may come from another machine, where it could resume; else only one of an older
                turret starts over.
        """
        try:
            fitted = self._fit(ready)
        except CheckpointMismatch as error:
            if not (moves or isinstance(error, CheckpointTooOld)):
                raise
            who = "worker" if moves else "version"
            self.callbacks.warning(f"starting over, because this {who} cannot resume: {error}")
            self.store.training_runs().start_over(self.run)
            fitted = self._fit(ready)
        try:
            found = self._run_work(
                lambda: measure_adapter(ready, fitted, self.callbacks.stage, beside_base=beside_base)
            )
            ready, fitted, done = found.ready, found.fitted, found.fitted.progress
            started = time.perf_counter()
            advice = [*self._advice(ready, fitted), *uncalibrated_note(ready)]

            def result(version: Version) -> RunResult:
                return RunResult(
                    version=str(version),
                    digest=version.digest,
                    base={"id": ready.base.id, "fingerprint": ready.base.fingerprint},
                    metrics=found.metrics,
                    parameters=fitted.parameters,
                    timing={
                        "load_seconds": ready.load_seconds,
                        "train_seconds": done.seconds,
                        "evaluate_seconds": done.evaluate_seconds + found.seconds,
                        "proof_seconds": time.perf_counter() - started,
                        "steps": done.step,
                        "examples_per_second": done.examples / max(done.seconds, 1e-9),
                        "tokens_per_second": done.tokens / max(done.seconds, 1e-9),
                    },
                    memory={
                        "base_bytes": ready.base.bytes,
                        "peak_bytes": fitted.peak_bytes,
                        "above_base_bytes": max(0, fitted.peak_bytes - ready.resident),
                        "predicted_bytes": self.planned.plan.memory.total if self.planned.plan.memory else None,
                    },
                    bundle_bytes=version.bytes,
                    run=self.run.id,
                    resumed_from=fitted.resumed_from,
                    stopped_early=done.gave_up,
                    flat_loss=None if fitted.flat_loss is None else fitted.flat_loss.to_json(),
                    warnings=[*([] if fitted.flat_loss is None else [fitted.flat_loss.warning()]), *found.warnings],
                    advice=advice,
                    notes=[*ready.notes, *tracking.warnings],
                    device=str(ready.device.device),
                    forgetting=found.forgot,
                )

            if found.answered and self.run.comparison is None:  # a comparison has a report of its own
                with _disk_errors(self.run):
                    self.store.training_runs().write_report(self.run, _report(found).to_json())
            with self._prove_bundle(found) as bundle:
                keeper.end_turns()  # curve and checkpoint are in the store before the run ends
                return self._store_version(found, bundle, result)
        finally:
            adapters.detach(ready.base.model)

    def _run_work(self, work: Callable[[], T]) -> T:
        return self.place.run(work, self.store.access.tenant)

    def _fit(self, ready: PreparedTraining) -> Fitted:
        """Run the training loop, and write the loss curve next to the checkpoint."""
        run, callbacks = self.run, self.callbacks
        after = step_of(run.checkpoint)
        if after:
            callbacks.stage(f"resuming run {run.id} from step {after}")
        with _disk_errors(run):
            curve = Curve(run.curve, resume_after=after)
        distributed.begin().from_main(lambda: run.checkpoint)
        predicted = self.planned.plan.memory
        steps = fit(
            *ready.parts,
            folder=run.checkpoint,
            predicted=predicted,
            start=ready.start,
            asked=self.asked,
            say=callbacks.stage,
        )
        told = False
        while True:
            try:
                record = self._run_work(lambda: next(steps))
            except StopIteration as end:
                return end.value
            with _disk_errors(run):
                curve.append(record)
            callbacks.record(record)
            if record.guessing is not None and not told:
                told = True
                callbacks.warning(
                    f"after step {record.step} the loss is no better than guessing ({record.guessing:.3f}): the "
                    "training has learnt nothing yet, or has lost it"
                )

    def _advice(self, ready: PreparedTraining, fitted: Fitted) -> list[str]:
        """What would make a better version: a line each."""
        if fitted.flat_loss is not None or fitted.progress.gave_up:
            return []
        steps, train = every_step(self.store, self.run.id), ready.recipe.train
        if train.keep == "last" and (found := learnt_by_heart(steps)) is not None:
            return [f'{found}: set train.keep = "best", which keeps the weights of the best evaluation']
        if not still_falling(binned_losses([record.loss for record in steps])):
            return []
        longer = f"train.epochs to {2 * (train.epochs or 1)} (now {train.epochs})"
        if train.max_steps is not None and fitted.progress.step >= train.max_steps:
            longer = f"train.max_steps to {2 * train.max_steps} (now {train.max_steps})"
        return [f"the training loss still fell at the last step, so longer training would help: set {longer}"]

    @contextmanager
    def _prove_bundle(self, found: Measured) -> Iterator[Path]:
        """Write the bundle and prove it, in a fresh process or on the resident base. It is removed after the block."""
        ready, fitted, run, stage = found.ready, found.fitted, self.run, self.callbacks.stage
        with _disk_errors(run), tempfile.TemporaryDirectory(prefix="bundle-", dir=run.folder) as folder:
            bundle = Path(folder) / "bundle"
            bundles.save_bundle(fitted.adapter, bundle)
            if self.place.stays:
                stage("proving the bundle on the resident base")
                self._run_work(lambda: _prove_here(ready, bundle, found.probe, self.place))
            else:
                stage("proving the bundle in a fresh process")
                where = proof_device(ready).device
                if where == ready.device.device:
                    proof.make_room(ready.base.model)
                proof.prove(bundle, ready.base, found.probe, device=where, taken_on=ready.device.device)
            stage("storing" if fitted.flat_loss is None else f"storing, with a warning: {fitted.flat_loss}")
            yield bundle

    def _store_version(self, found: Measured, bundle: Path, result: Callable[[Version], RunResult]) -> RunResult:
        """Store the version and finish the run, in one transaction."""
        run, made = self.run, list[RunResult]()

        def finish(version: Version) -> JsonObject:
            made.append(result(version))
            return made[-1].as_json()

        metrics = found.metrics if found.forgot is None else found.metrics | {FORGETTING: found.forgot}
        name = found.ready.recipe.name
        self.store.put(
            name, bundle, run=run, metrics=metrics, comparison=run.comparison, inputs=found.inputs, result=finish
        )
        return made[-1]


def _prove_here(ready: PreparedTraining, bundle: Path, probe: proof.Probe, place: OwnProcess) -> None:
    """Read the bundle from disk onto another model of the resident base, and compare."""
    base = place.model_for(TrainingBase(ready.recipe, type(ready.task), ready.task.labels, ready.device))
    try:
        proof.prove_here(bundle, base, probe)
    finally:
        if hasattr(base.model, ATTRIBUTE):
            adapters.detach(base.model)


@contextmanager
def _memory_explained() -> Iterator[None]:
    """Turn the errors that torch raises when memory runs out between steps into OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        raise OutOfMemory(
            "out of memory in an evaluation, or before the first step: lower train.micro_batch_tokens or "
            "task.max_tokens, or free memory"
        ) from error


def _disk_errors(run: HeldRun) -> AbstractContextManager[None]:
    """Turn an error of the disk, while a run's own files are written, into a StoreError."""
    remedy = "free some space or make it writable, and start the same command again to resume"
    return disk_errors(f"run {run.id} cannot write to {run.folder}", run.folder, remedy)
