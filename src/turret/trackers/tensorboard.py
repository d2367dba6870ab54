"""TensorBoard: event files in the folder `tensorboard` of the run. `tensorboard --logdir .turret/runs` shows all runs.

It writes the files with TensorBoard's own package, which needs neither TensorFlow nor torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from turret.trackers import Point, State, TrackedRun


class TensorBoard:
    """Scalars by step; recipe, plan and version as texts."""

    def start(self, run: TrackedRun) -> None:
        self._last = run.after
        self._writer = EventFileWriter(str(Path(run.folder) / "tensorboard"))
        if run.after:  # TensorBoard drops what an earlier process wrote from this step on
            event = Event(step=run.after + 1, session_log=SessionLog(status=SessionLog.START))
            self._add(event, run.after + 1)
            return
        settings = json.dumps(dict(run.settings), indent=2, ensure_ascii=False)
        for name, text in {**run.texts, "settings.json": settings}.items():
            self._text(name, f"```\n{text}\n```", 0)

    def log(self, points: Sequence[Point]) -> None:
        for step, values in points:
            self._last = step
            found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._add(Event(summary=Summary(value=found)), step)
        self._writer.flush()

    def finish(self, state: State, summary: Mapping[str, float | str]) -> None:
        for name, value in summary.items():
            if isinstance(value, str):
                self._text(f"final/{name}", value, self._last)
            else:
                found = [Summary.Value(tag=f"final/{name}", simple_value=value)]
                self._add(Event(summary=Summary(value=found)), self._last)
        self._text("final/state", state, self._last)
        self._writer.close()

    def _add(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        self._writer.add_event(event)

    def _text(self, name: str, text: str, step: int) -> None:
        """Add a text for the plugin of that name, as `tf.summary.text` does."""
        self._add(Event(summary=text_pb(f"{name}/text_summary", text)), step)
