"""The training loop: a generator that yields a record after every optimiser step and returns the finished adapter.

The model stays attached, in eval mode, so that the caller can evaluate and probe it before `detach`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from pathlib import Path

from turret import process
from turret.bases import Base
from turret.bases.sharded import parts_of
from turret.data import Dataset
from turret.errors import Interrupted, LossNotFinite
from turret.json_types import JsonObject
from turret.process import StopRequest
from turret.recipe import Recipe
from turret.tasks import Task
from turret.train import memory
from turret.train.adamw import learning_rate
from turret.train.curve import StepRecord
from turret.train.initialize import InitialAdapter
from turret.train.run import Fitted, TrainingRun
from turret.train.step import explained, train_step

SAVE_SECONDS = 60.0  # between checkpoints, unless the recipe sets the number of steps
SAVE_SHARE = 0.05  # largest share of the time that such checkpoints may take


def fit(
    recipe: Recipe,
    base: Base,
    task: Task,
    dataset: Dataset,
    *,
    folder: Path | None = None,
    predicted: memory.Prediction | None = None,
    start: InitialAdapter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[StepRecord, None, Fitted]:
    """Train a recipe's adapter on a loaded base, whose own weights do not change.

    A record is yielded before the checkpoint that includes its step is written, so a curve that is cut back to the
    checkpoint's step has no gap. On an error the base is left as it was. Under torchrun every process makes the same
    call with the same folder; only the main process evaluates and writes.

    Args:
        folder: where the checkpoint is kept. A checkpoint in it is resumed, and the rest of the run is bit-equal to an
            uninterrupted one. None: nothing is written.
        predicted: the plan's memory prediction, for the error text when memory runs out.
        start: the version that `train.init_from` names, whose tensors the adapter starts with.
        clock: seconds.

    Yields:
        A StepRecord per optimiser step.

    Raises:
        Interrupted: the user stopped the run.
        LossNotFinite: the loss or the gradient norm became NaN or infinite.
        OutOfMemory: a step needs more memory than there is.
        CheckpointMismatch: the checkpoint belongs to another run.
        TrainingError: the base's weights changed.
    """
    memory.reset_peak(base.model.device)
    run = TrainingRun.begin(recipe, base, task, dataset, folder, start)
    train, model, here = run.recipe.train, run.model, run.processes
    process.release()  # return what loading the tokenizer and the weights freed to the system
    try:
        with StopRequest() as stop, process.keep_freed():
            saved_at, pause = clock(), SAVE_SECONDS
            for step, batch in run.remaining():
                rate = learning_rate(
                    step, total=run.schedule.steps, peak=run.lr, warmup=run.warmup, schedule=train.schedule
                )
                started = clock()
                with run.randomness, here.noticing(), explained(run.most_tokens, batch, step, predicted):
                    loss, norm = train_step(
                        model,
                        task,
                        run.optimiser,
                        batch,
                        rate=rate,
                        clip=train.gradient_clip,
                        most_tokens=run.most_tokens,
                        processes=here,
                        scale=run.scale,
                    )
                seconds = clock() - started
                run.count(step, batch, loss, seconds)

                metrics = None
                if run.evaluates(step):
                    started = clock()
                    metrics = _metrics(run)
                    run.judge(step, metrics, clock() - started)

                yield run.record(step, batch, loss=loss, rate=rate, norm=norm, seconds=seconds, metrics=metrics)

                due = train.checkpoint_every is None and clock() - saved_at > pause
                stopping, due = here.any(stop.asked, due)
                if folder is not None and (run.over or stopping or due or run.saves(step)):
                    started = clock()
                    run.save()
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
        run.abandon()
        if isinstance(error, LossNotFinite):
            raise LossNotFinite(f"{error} at step {run.progress.step + 1}: {run.what_to_change()}") from error
        raise


def _metrics(run: TrainingRun) -> JsonObject:
    """The main process's evaluation. With a base in parts all processes compute it together."""
    here = run.processes
    if parts_of(run.model) == 1:
        return here.from_main(run.evaluate)
    with here.noticing():
        metrics = run.evaluate()
    return here.from_main(lambda: metrics)
