"""MLflow: a run in the experiment of the adapter's name, on the server or in the folder of MLFLOW_TRACKING_URI.

The run is found again by its tag `turret.run`. MLFLOW_EXPERIMENT_NAME names another experiment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from turret.trackers import Point, State, TrackedRun

TAG = "turret.run"
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
LONGEST_PARAM = 6000  # MLflow's limit


class MLflow:
    """Parameters, metrics by step, and recipe and plan as artifacts."""

    def start(self, run: TrackedRun) -> None:
        self._client = MlflowClient()
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.name).experiment_id
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        made = found[0] if found else self._client.create_run(experiment, tags={TAG: run.id}, run_name=run.id)
        self._run, self._last = made.info.run_id, run.after
        self._client.update_run(self._run, status="RUNNING")
        known = made.data.params
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in run.settings.items() if key not in known]
        self._client.log_batch(self._run, params=params)  # in as many requests as MLflow's limits ask for
        for name, text in run.texts.items():
            self._client.log_text(self._run, text, name)

    def log(self, points: Sequence[Point]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for step, values in points for key, value in values.items()]
        self._last = points[-1].step
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self, state: State, summary: Mapping[str, float | str]) -> None:
        now = int(time.time() * 1000)
        metrics = []
        for key, value in summary.items():
            if isinstance(value, str):
                self._client.set_tag(self._run, f"turret.{key}", value)
            else:
                metrics.append(Metric(f"final/{key}", value, now, self._last))
        self._client.log_batch(self._run, metrics=metrics)
        self._client.set_terminated(self._run, STATUS[state])
