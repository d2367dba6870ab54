"""The process of a comparison or a sweep that waits in the queue, which a worker starts.

`python -P -m turret.workspace.studying REQUEST` conducts one by the same functions as `turret compare --on workers` and
`turret sweep --on workers`. It runs in a folder that has its data alone, and writes how far it is into its job. If it
is killed, another worker conducts it from there, as the same command would. Loads no torch.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from turret.compare.report import headline
from turret.process import stop_on_sigterm
from turret.recipe import Recipe
from turret.store import JobQueue, Store
from turret.store.jobs import Job, StudyResult
from turret.store.queued_data import PLACE
from turret.workspace import comparing, sweeping
from turret.workspace.cells import Workers
from turret.workspace.child_process import Ended, WorkerRequest, attempt_job, do_request
from turret.workspace.progress import Progress, Say
from turret.workspace.queueing import ComparisonRequest, bring_data, order_of, require_base


def main(request: str) -> None:
    """Carry out a request of the worker."""
    stop_on_sigterm()
    do_request(request, _do)


def _do(asked: WorkerRequest, store: Store, taken: Job, say: Say) -> Ended:
    return attempt_job(store, taken, lambda queue: _conduct(store, queue, taken, asked, say))


class _Watched(Workers):
    """The workers of the store; how far they are is written into the row of the study."""

    def __init__(self, queue: JobQueue, taken: Job) -> None:
        self._queue, self._taken, self.noted = queue, taken, StudyResult()

    def tell(self, progress: Progress) -> None:
        """Write it, if it is new."""
        noted = progress.as_json()
        if noted != self.noted:
            self._queue.note(self._taken, noted)
        self.noted = noted


def _conduct(store: Store, queue: JobQueue, taken: Job, asked: WorkerRequest, say: Say) -> None:
    assert taken.spec is not None
    assert "verb" in taken.spec
    queue.adopt(taken)
    recipe, order, tasks = Recipe.from_toml(taken.recipe), order_of(taken.spec), _Watched(queue, taken)
    require_base(recipe, asked["bases"])
    assert asked["folder"] is not None
    folder = bring_data(store, recipe, Path(asked["folder"]))
    place = PLACE.match(recipe.data.source)
    os.chdir(folder if place is None else folder / place[0])  # where the data has the name that it was sent with
    if place is not None:
        named = recipe.data.source.removeprefix(f"{place[0]}/")
        recipe = recipe.changed(data={"source": named})
    if isinstance(order, ComparisonRequest):
        compared = comparing.compare(store, recipe, order, say, comparing.require_few, tasks)
        missing, version = compared.missing, compared.promotion.version
        result: StudyResult = {"report": Path(compared.folder).name, "said": headline(compared), "version": version}
    else:
        recipe, request = sweeping.split(order, recipe)
        found = sweeping.sweep(store, recipe, replace(request, on=tasks), say)
        missing, best = found.missing, found.ranked[0]
        toml = found.best.changed(data={"source": taken.spec["sent"]}).to_toml()
        said = f"the best of {len(found.ranked)} trials: {best.title}"
        result = {"recipe": toml, "said": said, "version": best.version}
    queue.finish(taken, tasks.noted | result | {"missing": missing})


if __name__ == "__main__":
    main(sys.argv[1])
