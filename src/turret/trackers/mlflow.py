"""MLflow: a run in the experiment of the adapter's name, on the server or in the folder of MLFLOW_TRACKING_URI.

The run is found again by its tag `turret.run`. MLFLOW_EXPERIMENT_NAME names another experiment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from turret.trackers import Point, State, TrackedRun

TAG = "turret.run"
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 6000  # of one request; MLflow's limits


class MLflow:
    """Parameters, metrics by step, and recipe and plan as artifacts."""

    def start(self, run: TrackedRun) -> None:
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.name
        experiment = self._experiment(name)
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        made = found[0] if found else self._client.create_run(experiment, tags={TAG: run.id}, run_name=run.id)
        self._run, self._last = made.info.run_id, run.after
        self._client.update_run(self._run, status="RUNNING")
        known = made.data.params
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in run.settings.items() if key not in known]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + MOST_PARAMS])
        for name, text in run.texts.items():
            self._client.log_text(self._run, text, name)

    def log(self, points: Sequence[Point]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for step, values in points for key, value in values.items()]
        self._last = points[-1].step
        self._log_metrics(metrics)

    def finish(self, state: State, summary: Mapping[str, float | str]) -> None:
        now = int(time.time() * 1000)
        metrics = []
        for key, value in summary.items():
            if isinstance(value, str):
                self._client.set_tag(self._run, f"turret.{key}", value)
            else:
                metrics.append(Metric(f"final/{key}", value, now, self._last))
        self._log_metrics(metrics)
        self._client.set_terminated(self._run, STATUS[state])

    def _log_metrics(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[start : start + MOST_METRICS])

    def _experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # another training has made it meanwhile
            known = self._client.get_experiment_by_name(name)
            if known is None:
                raise
            return str(known.experiment_id)
