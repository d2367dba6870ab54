"""Jobs as tasks of Ray: `--on ray://HOST:PORT`. The only module that imports Ray.

A task does one job of the store's queue, as `turret worker --job ID --exit` does. Ray starts it again if its worker or
its node is lost; the job's lease and its checkpoint decide what is left to do. An error of the job itself is in the
store, so the task succeeds. Results are in the store too: a driver that is killed loses none.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from turret.errors import RecipeError, TrainingError, one_line
from turret.location import Location
from turret.process import STORE_PREFIXES, environment
from turret.recipe import Recipe
from turret.store import Store
from turret.tasks import Task
from turret.workspace.prepared import predicted_for
from turret.workspace.progress import Progress
from turret.workspace.queueing import Queue

STARTS = 3  # tries to begin: Ray gives its own process for a driver half a minute to start
LOST = 3  # times that a task whose worker was lost is started again


def do_job(store: str, job: str) -> str | None:
    """The task: do a job of a store, with the files of runs in a folder of this node. Returns its state."""
    import ray

    where = Location.parse(store)
    node = where.local / f"ray-{ray.get_runtime_context().get_node_id()[:12]}"
    queue = Queue(Store(replace(where, local=node)))
    while (state := queue.work_one(job)) == "waiting":  # for another try
        pass
    return state


class RayTasks:
    """The tasks of one comparison or sweep.

    Args:
        address: such as `ray://head:10001`.
        task: of the recipes, whose heads have these labels: they tell how much memory a training needs.

    Raises:
        RecipeError: Ray is not installed or does not answer, or the store is a folder of this machine.
    """

    def __init__(self, address: str, store: Store, task: type[Task], labels: Sequence[str]) -> None:
        try:
            import ray
        except ImportError as error:
            raise RecipeError(f"--on {address[:60]} needs Ray ({error}): pip install 'turret[ray]'") from None
        if store.location.catalog is None:
            raise RecipeError(
                f"--on {address[:60]}: other machines cannot open the folder {store}: give a store by URL"
            )
        passed = {key: value for key, value in environment(store=True).items() if key.startswith(STORE_PREFIXES)}
        for left in reversed(range(STARTS)):
            try:
                ray.init(address, namespace="turret", log_to_driver=False, runtime_env={"env_vars": passed})
                break
            except (ConnectionError, RuntimeError, ValueError) as error:
                if not left:
                    why = one_line(str(error), 160)
                    raise RecipeError(f"--on {address[:60]}: Ray does not answer ({why}): is it running?") from None
        self._gpus = ray.cluster_resources().get("GPU", 0.0) > 0
        self._ray, self._store, self._kind, self._labels = ray, store, task, labels
        self._remote = ray.remote(do_job)
        self._tasks: dict[str, Hashable] = {}  # job -> the reference of its task

    def begin(self, job: str, recipe: Recipe) -> None:
        """Start the task of a job that is in the queue."""
        device = recipe.train.device or "auto"
        gpu = device.startswith("cuda") or (device == "auto" and self._gpus)
        predicted = predicted_for(recipe, self._kind, self._labels, torch.device("cuda" if gpu else "cpu"))
        asked = {"num_cpus": 1, "num_gpus": int(gpu), "max_retries": LOST, "name": f"turret {job}"}
        if predicted is not None and not gpu:
            asked["memory"] = predicted.total
        self._tasks[job] = self._remote.options(**asked).remote(self._store.location.given, job)

    def check(self) -> None:
        """Raise TrainingError if Ray gave a task up. Whatever the job itself did is in the store."""
        if not self._tasks:
            return
        done, _ = self._ray.wait(list(self._tasks.values()), num_returns=len(self._tasks), timeout=0)
        for job in [job for job, task in self._tasks.items() if task in done]:
            try:
                self._ray.get(self._tasks.pop(job))
            except self._ray.exceptions.RayError as error:
                raise TrainingError(one_line(f"Ray could not run {job}: {error}", 280)) from None

    def tell(self, progress: Progress) -> None:
        """Nobody watches."""

    def close(self) -> None:
        """Leave Ray. Tasks that still run are ended, and their jobs go on with the next call."""
        self._ray.shutdown()
