"""The training loop: a generator that yields a record after every optimiser step and returns the finished adapter.

The model stays attached, in eval mode, so that the caller can evaluate and probe it before `detach`. `TrainingRun` is
the state of a run: how it starts or resumes, evaluates, saves and finishes. The loop decides when.
"""

from __future__ import annotations

import hashlib
import math
import platform
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from turret import process, quantized
from turret.adapters import Adapter, StoredAdapter
from turret.bases import Base
from turret.bases.sharded import digest_of, parts_of
from turret.data import Dataset
from turret.errors import CheckpointMismatch, Interrupted, LossNotFinite, TrainingError
from turret.manifest import FlatLossSpec, Lineage
from turret.methods.method import Defaults, usual_epochs
from turret.process import StopRequest
from turret.recipe import Recipe
from turret.tasks import Task, task_measured_by
from turret.tasks.shapes import Metrics, number_in, number_of
from turret.tasks.tokens import tokenizer_digest
from turret.train import checkpoint, distributed, memory
from turret.train.adamw import learning_rate, warmup_steps
from turret.train.batches import EncodedRow, EncodedRows, Schedule, splits_of
from turret.train.curve import StepRecord
from turret.train.evaluation import evaluate
from turret.train.initialize import defaults_of, recipe_step
from turret.train.linear_start import head_start
from turret.train.losses import LossScale
from turret.train.slot import LocalSlot
from turret.train.training_plan import Prediction
from turret.transformer import Model

SAVE_SECONDS = 60.0  # between checkpoints, unless the recipe sets the number of steps
SAVE_SHARE = 0.05  # largest share of the time that such checkpoints may take


# --- loop -------------------------------------------------------------------------------------------------------------


def fit(
    recipe: Recipe,
    base: Base,
    task: Task,
    dataset: Dataset,
    *,
    folder: Path | None = None,
    predicted: Prediction | None = None,
    start: StoredAdapter | None = None,
    clock: Callable[[], float] = time.perf_counter,
    asked: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda _: None,
) -> Generator[StepRecord, None, Fitted]:
    """Train a recipe's adapter on a loaded base, whose own weights do not change.

    A record is yielded before the checkpoint that includes its step is written, so a curve that is cut back to the
    checkpoint's step has no gap. On an error the base is left as it was. Under torchrun every process makes the same
    call with the same folder; only the main process evaluates and writes.

    Args:
        recipe: with its defaults filled in, see `fill_recipe`.
        folder: of the checkpoint. A checkpoint in it is resumed. On a CPU the rest of the run is bit-equal to
            one that was not interrupted, on a GPU near it. None: nothing is written.
        predicted: the plan's memory prediction, for the error text when memory runs out.
        start: the version that `train.init_from` names, whose tensors the adapter starts with.
        clock: seconds.
        asked: whether the run shall stop after this step, besides a signal.
        say: called with a line of progress before the first step.

    Yields:
        A StepRecord per optimiser step.

    Raises:
        Interrupted: the user stopped the run.
        LossNotFinite: the loss or the gradient norm became NaN or infinite.
        OutOfMemory: a step needs more memory than there is.
        CheckpointMismatch: the checkpoint belongs to another run.
        TrainingError: the recipe's defaults are not filled in, or the base's weights changed.
    """
    memory.reset_peak(base.model.device)
    run = TrainingRun(recipe, base, task, dataset, folder, start, say)
    train, here = run.recipe.train, run.slot.processes
    run.slot.predicted = predicted
    if base.digests is None:
        process.release_memory()  # return what loading the tokenizer and the weights freed to the system
    try:
        with StopRequest() as stop, process.keep_freed():
            saved_at, pause = clock(), SAVE_SECONDS
            for step, batch in run.remaining():
                rate = learning_rate(
                    step, total=run.schedule.steps, peak=run.lr, warmup=run.warmup, schedule=train.schedule
                )
                started = clock()
                loss, norm = run.slot.train_step(batch, recipe_step(train, rate))
                seconds = clock() - started

                metrics = None
                if run.evaluates(step):
                    started = clock()
                    metrics = _metrics(run)
                    run.judge(step, metrics, clock() - started)

                yield run.record(step, batch, loss=loss, rate=rate, norm=norm, seconds=seconds, metrics=metrics)

                due = train.checkpoint_every is None and clock() - saved_at > pause
                stopping, due = here.any(stop.asked or asked(), due)
                if folder is not None and (run.over or stopping or due or run.saves(step)):
                    started = clock()
                    run.save(folder)
                    saved_at = clock()
                    pause = max(SAVE_SECONDS, (saved_at - started) / SAVE_SHARE)
                if stopping:
                    raise Interrupted(
                        f"stopped by the user after step {step} of {run.schedule.steps}: {run.how_to_resume()}"
                    )
                if run.over:
                    break
        return run.finish()
    except BaseException as error:
        run.slot.drop()
        if isinstance(error, LossNotFinite):
            raise LossNotFinite(f"{error} at step {run.progress.step + 1}: {run.what_to_change()}") from error
        raise


def _metrics(run: TrainingRun) -> Metrics:
    """The main process's evaluation. With a base in parts all processes compute it together."""
    here = run.slot.processes
    if parts_of(run.slot.model) == 1:
        return here.from_main(run.evaluate)
    with here.noticing():
        metrics = run.evaluate()
    return here.from_main(lambda: metrics)


# --- flat loss --------------------------------------------------------------------------------------------------------
# Tells whether a training has learnt anything, by comparing its latest losses with the loss of guessing.


WINDOW, FEWEST = 50, 20  # latest steps that count, and the fewest that are enough to tell
ERRORS = 2.0  # standard errors; a smaller distance from `guessing` is noise
SHARE = 0.01  # of `guessing`; a smaller distance is too little


@dataclass(frozen=True)
class FlatLoss:
    """A training whose latest losses are no better than guessing."""

    loss: float  # mean of the latest steps
    guessing: float  # the loss of answering with the shares of the classes, whatever the text
    remedy: str = "use more examples, or another method"

    def __str__(self) -> str:
        return f"the training loss is {self.loss:.3f}, no better than guessing ({self.guessing:.3f})"

    def warning(self) -> str:
        """The finding with its remedy, in one line."""
        return f"nothing was learnt: {self}; {self.remedy}"

    def to_json(self) -> FlatLossSpec:
        return {"loss": self.loss, "guessing": self.guessing}


def flat_loss(latest: Sequence[float], guessing: float | None) -> FlatLoss | None:
    """A `FlatLoss` if the latest losses are no better than guessing, else None.

    Better means a mean that is below `guessing` by more than two standard errors and by more than one percent.

    Args:
        latest: the losses of the steps so far; the last WINDOW of them count.
        guessing: the loss of guessing; None if the task has none.
    """
    losses = latest[-WINDOW:]
    if guessing is None or len(losses) < FEWEST:
        return None
    mean = statistics.fmean(losses)
    error = statistics.stdev(losses) / math.sqrt(len(losses))
    return FlatLoss(mean, guessing) if mean > guessing - max(ERRORS * error, SHARE * guessing) else None


# --- run --------------------------------------------------------------------------------------------------------------


LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "turret")


@dataclass
class RunProgress:
    """The counters of a run, as its checkpoint has them."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of the head's start and all optimiser steps, also those before the run was resumed
    evaluate_seconds: float = 0.0
    best_step: int = 0
    best_metrics: Metrics | None = None
    stale: int = 0  # evaluations since the best one
    gave_up: bool = False  # early stopping
    losses: list[float] = field(default_factory=list)  # of the latest WINDOW steps
    head_start: dict[str, float] | None = None  # how the head began: see `linear_start`
    scale: list[float] = field(default_factory=list)  # value and good steps of the loss scale; empty without one


@dataclass(frozen=True)
class Fitted:
    """The result of a finished training. `model` is still attached and in eval mode, with the chosen weights."""

    adapter: Adapter
    model: Model
    progress: RunProgress
    peak_bytes: int  # of this process, or of its tensors on a GPU
    resumed_from: int  # step of the checkpoint that this process resumed; 0 for none
    parameters: dict[str, int]  # trainable, stored, total
    flat_loss: FlatLoss | None  # if the training loss ended at the level of guessing


class TrainingRun:
    """A training run in progress. See `fit`.

    It attaches the recipe's adapter, and resumes the folder's checkpoint if there is one.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Base,
        task: Task,
        dataset: Dataset,
        folder: Path | None,
        start: StoredAdapter | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        here = distributed.begin()
        self.recipe, self.base, self.task, self.dataset = recipe, base, task, dataset
        self.folder, self.start = folder, start
        self.splits = splits_of(recipe, dataset)
        self.items = EncodedRows(task, self.splits.train)
        self.watched = None if self.splits.watched is None else EncodedRows(task, self.splits.watched)
        self.schedule = Schedule.of(recipe, len(self.splits.train))
        if recipe.train.lr is None or isinstance(recipe.train.lr, str):
            raise TrainingError(
                'train.lr is "auto": find it first (Workspace.train does, or find_rate), or give a number'
            )
        self.lr = recipe.train.lr
        self.warmup = warmup_steps(recipe.train.warmup, self.schedule.steps)
        self.tokenizer = tokenizer_digest(base.tokenizer) if base.digests is None else base.digests.tokenizer
        self.guessing = task.guessing_loss(self.splits.train)  # of the best answer that ignores the input
        self.progress = RunProgress()
        self.best_weights: Tensor | None = None
        self.resumed_from = 0
        self.originals = [*base.model.parameters(), *base.model.buffers()]  # before the adapter is attached
        self.unchanged = checksum(self.originals, base.digests.tensors if base.digests is not None else {})
        self.total = quantized.count_weights(base.model)
        self.slot = LocalSlot.of_recipe(recipe, base, task, start, here)
        try:
            here.require_same(**self._identity())
            self._resume()
            self._start_head(say)
        except BaseException:
            self.slot.drop()
            raise
        base.model.train()

    # --- questions of the loop --------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether all steps are done, or the run stopped early."""
        return self.progress.gave_up or self.progress.step >= self.schedule.steps

    def remaining(self) -> Iterator[tuple[int, list[EncodedRow]]]:
        """(step, batch) for every remaining step."""
        if not self.over:
            for step, indices in self.schedule.batches(after=self.progress.step):
                yield step, self.items.take(indices)

    def evaluates(self, step: int) -> bool:
        """Whether the recipe evaluates after this step."""
        every = self.recipe.train.evaluate
        if self.watched is None or every == "never":
            return False
        each = every if isinstance(every, int) else self.schedule.steps_per_epoch
        return step % each == 0 or step == self.schedule.steps

    def evaluate(self) -> Metrics:
        """Metrics of the present weights on the watched examples."""
        assert self.watched is not None
        metrics, _ = evaluate(self.slot.model, self.task, self.watched, most_tokens=self.slot.most_tokens)
        return metrics

    def saves(self, step: int) -> bool:
        """Whether the recipe writes a checkpoint after this step."""
        every = self.recipe.train.checkpoint_every
        return step % (every or self.schedule.steps_per_epoch) == 0

    # --- results of a step ------------------------------------------------------------------------------------------

    def judge(self, step: int, metrics: Metrics, seconds: float) -> None:
        """Compare an evaluation with the best one so far. Only a validation split chooses, never the test split."""
        progress, train = self.progress, self.recipe.train
        progress.evaluate_seconds += seconds
        if not self.splits.selects:
            return
        kind, best = self.task.kind, progress.best_metrics
        if best is None or rank_of(metrics, kind) > rank_of(best, kind):
            progress.best_step, progress.best_metrics, progress.stale = step, metrics, 0
            if train.keep == "best":
                self.best_weights = self.slot.optimiser.weights.clone()
        else:
            progress.stale += 1
            progress.gave_up = train.early_stopping is not None and progress.stale >= train.early_stopping

    def record(
        self,
        step: int,
        batch: Sequence[EncodedRow],
        *,
        loss: float,
        rate: float,
        norm: float,
        seconds: float,
        metrics: Metrics | None,
    ) -> StepRecord:
        """Add a step to the counters. Returns its record."""
        tokens, scale = sum(item.tokens for item in batch), self.slot.scale
        self.progress.step = step
        self.progress.losses = [*self.progress.losses, loss][-WINDOW:]
        self.progress.examples += len(batch)
        self.progress.tokens += tokens
        self.progress.seconds += seconds
        self.progress.scale = [] if scale is None else [scale.value, scale.good]
        return StepRecord(
            step=step,
            steps=self.schedule.steps,
            epoch=self.schedule.epoch_after(step),
            loss=loss,
            lr=rate,
            grad_norm=norm,
            examples=len(batch),
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / max(seconds, 1e-9),
            rss=memory.resident_bytes(),
            metrics=metrics,
            split=self.splits.watched_name if metrics is not None else None,
            guessing=None if self.flat_loss() is None else self.guessing,
        )

    def flat_loss(self) -> FlatLoss | None:
        """Whether the latest losses are at the level of guessing; None in the first steps of a long run."""
        progress = self.progress
        early = progress.step < min(WINDOW, self.schedule.steps)
        found = None if early else flat_loss(progress.losses, self.guessing)
        return None if found is None else replace(found, remedy=self._to_learn())

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _origin(self) -> checkpoint.Origin:
        origin: checkpoint.Origin = {
            "data": self.dataset.digest,
            "base": self.base.fingerprint,
            "tokenizer": self.tokenizer,
            "world_size": self.slot.processes.size,  # decides the order of sums
        }
        if self.slot.model.device.type != "cpu":  # another device rounds otherwise
            origin["device"] = self.slot.model.device.type
        if self.start is not None:
            origin["parent"] = self.start.digest
        if self.base.reference is not None:
            origin["reference"] = self.base.reference.digest
        return origin

    def _identity(self) -> checkpoint.Identity:
        return {
            "recipe": hashlib.sha256(self.recipe.to_toml().encode()).hexdigest(),
            **self._origin(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }

    def _lineage(self) -> Lineage:
        """Everything the weights depend on, and nothing that differs when the same training is repeated."""
        libraries = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
        lineage: Lineage = {
            "recipe": self.recipe.to_toml(),
            "seed": self.recipe.seed,
            "libraries": libraries,
            "steps": self.progress.step,
            "lr": self.lr,
        }
        if self.progress.head_start is not None:
            lineage["head_start"] = self.progress.head_start
        if (flat := self.flat_loss()) is not None:
            lineage["flat_loss"] = flat.to_json()
        if self.best_weights is not None:
            lineage["kept_step"] = self.progress.best_step
        return {**self._origin(), **lineage}

    def save(self, folder: Path) -> None:
        """Write the checkpoint, unless a weight is NaN or infinite. The main process writes, the others wait."""
        here, optimiser = self.slot.processes, self.slot.optimiser
        ends = torch.stack(torch.aminmax(optimiser.weights))  # both are NaN if a weight is; this makes no copy
        if not bool(torch.isfinite(ends).all()):
            return  # keep the last good checkpoint; the next loss raises the error
        tensors = dict(optimiser.state())
        if self.best_weights is not None:
            tensors["best"] = self.best_weights
        identity, progress = self._identity(), vars(self.progress)
        here.from_main(
            lambda: checkpoint.save(folder, tensors, identity=identity, layout=optimiser.layout, progress=progress)
        )

    def _resume(self) -> None:
        """Resume the folder's checkpoint if there is one. The main process reads it and sends it to the others."""
        here, optimiser = self.slot.processes, self.slot.optimiser
        saved = self._read() if here.main else None
        if saved is not None:
            self.progress = RunProgress(**saved.progress)
            optimiser.load_state(saved.tensors, self.progress.step)
            best = saved.tensors.get("best")
            self.best_weights = None if best is None else best.to(optimiser.weights.device)
        progress, has_best = here.from_main(lambda: (vars(self.progress), self.best_weights is not None))
        self.progress = RunProgress(**progress)
        self.resumed_from = self.progress.step
        if self.progress.scale:
            self.slot.scale = LossScale(self.progress.scale[0], round(self.progress.scale[1]))
        rows = {name: here.take_from_main(row) for name, row in optimiser.state().items()}
        optimiser.load_state(rows, self.progress.step)
        if has_best:
            row = optimiser.weights.clone() if self.best_weights is None else self.best_weights
            self.best_weights = here.take_from_main(row)

    def _start_head(self, say: Callable[[str], None]) -> None:
        """Give a new head the linear solution, unless a checkpoint or a finished adapter has given it its weights."""
        here, task = self.slot.processes, self.task
        if self.progress.step or self.start is not None:
            return
        begins = head_start(self.recipe, self.base, task, self.items, self.slot.most_tokens)
        if begins is None:
            return
        started = time.perf_counter()
        try:
            self.progress.head_start = begins.begin(self.slot, self.lr, self.schedule.steps, say)
        except LossNotFinite as error:
            raise LossNotFinite(f"{error} at step 0, where the head starts: {self.what_to_change()}") from error
        self.slot.optimiser.set_weights(here.take_from_main(self.slot.optimiser.weights.clone()))
        self.progress.seconds += time.perf_counter() - started

    def _read(self) -> checkpoint.Checkpoint | None:
        saved = None if self.folder is None else checkpoint.load(self.folder, identity=self._identity())
        if saved is not None and saved.layout != self.slot.optimiser.layout:
            raise CheckpointMismatch(f"checkpoint in {self.folder} holds other weights than this run trains: delete it")
        return saved

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> Fitted:
        """Choose the last or the best weights, check that the base has not changed, and extract the adapter."""
        here, optimiser = self.slot.processes, self.slot.optimiser
        if self.best_weights is not None:
            optimiser.set_weights(self.best_weights)
        optimiser.end()
        self.slot.model.eval()
        if checksum(self.originals) != self.unchanged:
            raise TrainingError(
                "the base's weights changed while an adapter was trained: load the base again, and report this"
            )
        if here.size > 1:
            here.require_same(weights=checksum([optimiser.weights]))
        adapter = self.slot.save(self._lineage())
        stored = sum(each.numel() for each in (*adapter.tensors.values(), *adapter.head.values()))
        return Fitted(
            adapter=adapter,
            model=self.slot.model,
            progress=self.progress,
            peak_bytes=memory.peak(self.slot.model.device),
            resumed_from=self.resumed_from,
            parameters={
                "trainable": optimiser.weights.numel(),
                "stored": stored,
                "total": self.total,
            },
            flat_loss=self.flat_loss(),
        )

    # --- error texts ------------------------------------------------------------------------------------------------

    def what_to_change(self) -> str:
        """The remedy for a loss that is not finite, and the last checkpoint."""
        remedy = f"set train.lr to {min(self._usual().lr, self.lr / 10):g} (now {self.lr:g})"
        if str(self.base.dtype).endswith("float16"):  # or bfloat16
            remedy += ' or train.dtype to "float32"'
        return f"{remedy}; {self._last_checkpoint()}"

    def _to_learn(self) -> str:
        """The remedy for a training that learnt nothing. It names a setting only if that is not the usual one."""
        recipe, examples = self.recipe, len(self.splits.train)
        usual = self._usual()
        rate, epochs = usual.lr, usual_epochs(usual.steps, examples, recipe.train.batch_size)
        remedies = []
        if not math.isclose(self.lr, rate):
            remedies.append(f"leave train.lr out (it is {self.lr:g}, usual is {rate:g})")
        if self.schedule.epochs < epochs:
            remedies.append(f"leave train.epochs out (it is {self.schedule.epochs}, usual are {epochs})")
        return ", ".join((*remedies, "use more examples, or another method"))

    def _usual(self) -> Defaults:
        return defaults_of(self.recipe.method, self.base, self.task.kind, parameters=self.total)

    def how_to_resume(self) -> str:
        """The remedy for a run that the user stopped."""
        if self.folder is None:
            return "nothing is kept, because no folder was given"
        return f"start the same command again to resume ({self._last_checkpoint()})"

    def _last_checkpoint(self) -> str:
        step = 0 if self.folder is None else checkpoint.step_of(self.folder)
        return f"the state after step {step} is kept in {self.folder}" if step else "no checkpoint had been written yet"


def rank_of(metrics: Metrics, kind: str) -> tuple[float, float]:
    """The sort key of evaluations, larger is better: the task's own metric if it was measured, then a lower loss.

    Args:
        kind: of the task. The metrics alone may not tell it, because some are named after settings of the recipe.
    """
    loss = number_of(metrics, "loss")
    own = number_in(metrics, task_measured_by(metrics, kind).metric) or 0.0
    return own, -loss if math.isfinite(loss) else -math.inf


def checksum(tensors: Sequence[Tensor], known: Mapping[int, str] = MappingProxyType({})) -> str:
    """A hash of the bytes of some tensors. known: the digests of some of them, by address."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update((known.get(tensor.data_ptr()) or digest_of(tensor)).encode())
    return digest.hexdigest()
