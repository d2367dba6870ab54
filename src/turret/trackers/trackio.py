"""Trackio: a run in the project of the adapter's name, in Trackio's folder on this machine. `trackio show` shows it.

TRACKIO_PROJECT names another project, TRACKIO_DIR another folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import trackio

from turret.trackers import Point, State, TrackedRun


class Trackio:
    """The configuration with recipe and plan, and metrics by step."""

    def start(self, run: TrackedRun) -> None:
        self._last = run.after
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or run.name,
            name=run.id,
            resume="allow",
            config={**run.settings, **run.texts},
        )

    def log(self, points: Sequence[Point]) -> None:
        for step, values in points:
            self._run.log(dict(values), step=step)
            self._last = step

    def finish(self, state: State, summary: Mapping[str, float | str]) -> None:
        final = {f"final/{name}": value for name, value in summary.items()}
        self._run.log({**final, "final/state": state}, step=self._last)
        self._run.finish()
