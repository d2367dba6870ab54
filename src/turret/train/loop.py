"""The loop that trains, in one piece and in sight: a generator that yields a record after every optimiser step.

It puts a new adapter on a base, moves the adapter's weights and nothing else, and returns the finished Adapter; the
model stays attached, in eval mode, so that the caller can evaluate and probe it before `detach`. Refuses to know the
store, terminals and where a recipe came from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from turret import heap
from turret.errors import Interrupted, LossNotFinite
from turret.interrupt import StopRequest
from turret.train import memory
from turret.train.curve import StepRecord
from turret.train.initialize import InitialAdapter
from turret.train.optim import learning_rate
from turret.train.run import Fitted, TrainingRun
from turret.train.step import explained, train_step

SAVE_SECONDS = 60.0  # longest time without a checkpoint where the recipe names no number of steps
SAVE_SHARE = 0.05  # of the time, at most, that goes into such checkpoints


def fit(
    recipe: Any,
    base: Any,
    task: Any,
    dataset: Any,
    *,
    folder: Path | None = None,
    predicted: memory.Prediction | None = None,
    start: InitialAdapter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[StepRecord, None, Fitted]:
    """Train `recipe` on a loaded base; yields a StepRecord a step and returns `Fitted`.

    folder: where the checkpoint is kept; one that is there already is gone on from, and the rest of the run is the same
    to the last bit. Without a folder nothing is written. Every record is yielded before the checkpoint that includes
    it, so a curve that is cut back to the checkpoint's step has no gap. On any error the base is left as it was.
    start: the version that the recipe's `train.init_from` names, whose numbers the adapter begins with.
    Under torchrun every process makes the same call, with the same folder; the main one alone evaluates and writes.
    """
    memory.reset_peak()
    run = TrainingRun.begin(recipe, base, task, dataset, folder, start)
    train, model, here = run.recipe.train, base.model, run.processes
    heap.give_back()  # what reading the tokenizer's rules and the first numbers took
    try:
        with StopRequest() as stop, heap.kept():
            saved_at, pause = clock(), SAVE_SECONDS
            for step, batch in run.remaining():
                rate = learning_rate(
                    step, total=run.schedule.steps, peak=run.lr, warmup=run.warmup, schedule=train.schedule
                )
                started = clock()
                with run.randomness, explained(run.most_tokens, batch, step, predicted):
                    loss, norm = train_step(
                        model,
                        task,
                        run.optimiser,
                        batch,
                        rate=rate,
                        clip=train.gradient_clip,
                        most_tokens=run.most_tokens,
                        processes=here,
                    )
                seconds = clock() - started
                run.count(step, batch, loss, seconds)

                metrics = None
                if run.evaluates(step):
                    started = clock()
                    metrics = here.from_main(run.evaluate)
                    run.judge(step, metrics, clock() - started)

                yield run.record(step, batch, loss=loss, rate=rate, norm=norm, seconds=seconds, metrics=metrics)

                late = train.checkpoint_every is None and clock() - saved_at > pause
                stopping, late = here.any(stop.asked, late)
                if folder is not None and (run.over or stopping or late or run.saves(step)):
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
